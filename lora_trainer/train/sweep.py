"""What a sweep records of its trials, which of them it drops early, and how it ranks those that it trains to the end.

Trials are dropped by successive halving (Jamieson & Talwalkar, arXiv 1502.07943), with two rungs: after a quarter and after half
of its own schedule, each trial is paused, and the better half goes on, rounded up and at least two. Better means a lower held-out
loss of the weights that `training.keep` would publish if training ended there. Losses are compared at the same share of the
schedule rather than after the same number of steps, because a cosine's loss falls with its learning rate: after 100 steps, a
trial that ends there is ahead of one that has 200 left, and would win whatever happens later.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final, Literal

from pydantic import BaseModel, ConfigDict, Field

from lora_trainer.evaluate.metrics import HeldOutLossMetrics, Verdict
from lora_trainer.persona.vocabulary import BloodType

RUNGS: Final = (0.25, 0.5)
"""Shares of its own schedule after which a trial is compared with the others."""
_FEWEST: Final = 2
"""Trials that are always trained to the end, so that the gates have a choice."""
_VERSION: Final = 1
"""Increase this when trials are dropped or ranked by another rule."""

State = Literal["training", "dropped", "diverged", "trained"]


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Rung(_Part):
    """A trial's held-out loss after a share of its schedule."""

    share: float
    step: int
    loss: float


class Trial(_Part):
    """One combination of the settings that a sweep tries, and how far it has come."""

    run_id: str
    settings: Mapping[str, Any] = Field(description="The settings that the trials differ in, by their dotted names.")
    planned_steps: int
    state: State = "training"
    problem: str = Field(default="", description="Why it diverged.")
    steps: int = Field(default=0, description="Completed steps.")
    rungs: tuple[Rung, ...] = ()
    loss: float | None = Field(default=None, description="Held-out loss of the weights that it would publish; null before a rung.")
    held_out_losses: tuple[HeldOutLossMetrics, ...] = Field(default=(), description="Every measurement, in order.")
    train_s: float = 0.0
    was_published: bool = Field(default=False, description="An earlier run had published it, so it was not trained again.")
    verdict: Verdict | None = Field(default=None, description="Verdict on its replies; null for a trial that was not evaluated.")

    @property
    def missed(self) -> int:
        """Number of missed gates."""
        if self.verdict is None:
            raise RuntimeError("the trial was not evaluated")
        return sum(not gate.passed for gate in self.verdict.gates)

    def loss_at(self, share: float) -> float | None:
        """Return the loss at a rung, or None before it."""
        return next((rung.loss for rung in self.rungs if rung.share == share), None)


class SweepRecord(_Part):
    """`sweep.json`."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, populate_by_name=True)

    schema_version: Literal[1] = Field(default=1, alias="schema")
    sweep_id: str
    blood_type: BloodType
    gate_id: str
    loss_base: float | None = Field(default=None, description="Held-out loss of the base; null until a trial has started.")
    trials: tuple[Trial, ...]
    winner: str | None = Field(default=None, description="Run id of the published trial; null until it is published.")
    bundle: str | None = Field(default=None, description="URI of its bundle.")
    started_at: str
    finished_at: str | None = None

    def as_json(self) -> dict[str, Any]:
        """Return the content of `sweep.json`."""
        return self.model_dump(mode="json", by_alias=True)

    def trial(self, run_id: str) -> Trial:
        """Return the trial with this run id."""
        return next(trial for trial in self.trials if trial.run_id == run_id)

    def with_trial(self, run_id: str, **changes: Any) -> SweepRecord:
        """Return a copy in which this trial has changed."""
        trials = (trial.model_copy(update=changes) if trial.run_id == run_id else trial for trial in self.trials)
        return self.model_copy(update={"trials": tuple(trials)})


def sweep_id(run_ids: Iterable[str], gate_id: str) -> str:
    """Return 16 hex digits that identify a sweep by its trials, whatever their order, and by the gates that rank them."""
    identity = json.dumps({"version": _VERSION, "gate_id": gate_id, "run_ids": sorted(run_ids)}, sort_keys=True)
    return hashlib.sha256(identity.encode()).hexdigest()[:16]


def pause_step(share: float, planned_steps: int) -> int:
    """Return the step to pause after at a rung, at least 1. The last step is no pause."""
    return max(1, math.ceil(share * planned_steps))


def places(trials: Sequence[Trial], share: float) -> int:
    """Return how many trials go on after the rung at `share`. It depends only on how many a sweep began to train."""
    left = sum(not trial.was_published for trial in trials)
    for rung in RUNGS:
        left = min(left, max(_FEWEST, math.ceil(left / 2)))
        if rung == share:
            return left
    raise ValueError(f"no rung at {share}")


def dropped_at(trials: Sequence[Trial], share: float) -> list[str]:
    """Return the run ids of the trials to drop at a rung that all have reached. Of equal losses, the first trial goes on."""
    reached = [(loss, trial) for trial in trials if trial.state == "training" and (loss := trial.loss_at(share)) is not None]
    ranked = sorted(reached, key=lambda pair: pair[0])
    return [trial.run_id for _, trial in ranked[places(trials, share) :]]


def by_loss(trials: Iterable[Trial]) -> list[Trial]:
    """Return the trials that were trained to the end, lowest held-out loss first."""
    return sorted((trial for trial in trials if trial.state == "trained"), key=lambda trial: trial.loss or 0.0)


def best_of(trials: Iterable[Trial]) -> Trial:
    """Return the best of the evaluated trials: the fewest missed gates, then the lowest held-out loss."""
    return min((trial for trial in by_loss(trials) if trial.verdict is not None), key=lambda trial: trial.missed)
