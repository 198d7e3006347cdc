"""A made-up record of a sweep."""

from __future__ import annotations

import math
from typing import Any

from lora_trainer.evaluate.metrics import GateResult, HeldOutLossMetrics, Verdict
from lora_trainer.persona.vocabulary import BloodType
from lora_trainer.train.sweep import RUNGS, Rung, SweepRecord, Trial, pause_step


def trial(run_id: str, *losses: float, **changes: Any) -> Trial:
    """Return a trial of 100 steps with these losses at the rungs."""
    rungs = tuple(Rung(share=share, step=pause_step(share, 100), loss=loss) for share, loss in zip(RUNGS, losses, strict=False))
    fields = {"settings": {"training.epochs": 1.0}, "planned_steps": 100, "rungs": rungs, "loss": losses[-1] if losses else None}
    return Trial(run_id=run_id, **{**fields, **changes})


def verdict(*missed: str) -> Verdict:
    """Return a verdict that misses these gates."""
    gates = tuple(
        GateResult(name=name, measure="m", value=0.5, compared=0.5, relation=">=", threshold=0.6, passed=False) for name in missed
    )
    return Verdict(gate_id="g", passed=not missed, gates=gates, not_judged={})


def sweep_record() -> SweepRecord:
    """Return a finished sweep of five trials, one in each state."""

    def curve(trained: Trial) -> Trial:
        falling = (4.5 - trained.loss) / math.log(100) if trained.loss else 0
        measured = tuple(
            HeldOutLossMetrics(step=step, loss=4.5 - falling * math.log(step)) for step in range(10, trained.steps + 1, 10)
        )
        return trained.model_copy(update={"held_out_losses": measured, "train_s": 12.5})

    trials = (
        trial(
            "a" * 16, 2.5, 2.25, settings={"training.learning_rate": 1e-4}, state="trained", steps=100, verdict=verdict("persona")
        ),
        trial("b" * 16, 2.4, 2.1, settings={"training.learning_rate": 2e-4}, state="trained", steps=100, verdict=verdict()),
        trial("c" * 16, 2.9, settings={"training.learning_rate": 5e-5}, state="dropped", steps=25),
        trial("d" * 16, settings={"training.learning_rate": 1.0}, state="diverged", problem="training diverged at step 3"),
        trial("e" * 16, settings={"training.learning_rate": 3e-4}, state="trained", steps=100, loss=2.3, was_published=True),
    )
    return SweepRecord(
        sweep_id="0" * 16,
        blood_type=BloodType.A,
        gate_id="g",
        loss_base=4.5,
        trials=tuple(map(curve, trials)),
        winner="b" * 16,
        bundle="s3://bucket/<lora>/adapters/A/bbbbbbbbbbbbbbbb/",
        started_at="2026-11-30T10:00:00+00:00",
        finished_at="2026-11-30T11:00:00+00:00",
    )
