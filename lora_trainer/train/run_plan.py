"""What a run would take, before it starts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import reduce
from operator import add

from lora_trainer.persona.vocabulary import BloodType
from lora_trainer.train.memory_plan import MemoryPlan
from lora_trainer.train.time_estimate import SOURCES, Seconds


@dataclass(frozen=True, slots=True)
class PersonaPlan:
    """One persona's share of the run."""

    blood_type: BloodType
    data: str
    """URI of the data file."""
    train_records: int
    held_out_records: int
    left_out: int
    """Number of records longer than `training.max_length_tokens`."""
    tokens: int
    """Tokens of the training records, counted once."""
    held_out_tokens: int
    longest_tokens: int
    steps: int
    """Optimizer steps; early stopping may take fewer."""
    step_tokens: int
    """Tokens of all steps: each epoch counts."""
    rows: int
    """Rows of all steps: one forward and backward pass each."""
    memory: MemoryPlan
    replies: int
    """Replies that the evaluation generates."""
    training: Seconds | None
    evaluation: Seconds | None

    def as_json(self) -> dict[str, object]:
        """Return JSON-compatible values."""
        return {
            "blood_type": str(self.blood_type),
            "data": self.data,
            "train_records": self.train_records,
            "held_out_records": self.held_out_records,
            "left_out": self.left_out,
            "tokens": self.tokens,
            "held_out_tokens": self.held_out_tokens,
            "longest_tokens": self.longest_tokens,
            "steps": self.steps,
            "step_tokens": self.step_tokens,
            "rows": self.rows,
            "memory_plan": {
                "gradient_checkpointing": self.memory.gradient_checkpointing,
                "micro_batch_tokens": self.memory.micro_batch_tokens,
                "estimated_peak_gib": self.memory.estimated_peak_gib,
                "reason": self.memory.reason,
            },
            "replies": self.replies,
            "seconds": {"training": _seconds_json(self.training), "evaluation": _seconds_json(self.evaluation)},
        }


@dataclass(frozen=True, slots=True)
class RunPlan:
    """What a run of one or several personas would take."""

    base: str
    backend: str
    device: str
    gpu: str | None
    """Name of the GPU; None on a CPU, or for a GPU that is not here."""
    free_gib: float | None
    """Free memory of the GPU; None on a CPU."""
    personas: tuple[PersonaPlan, ...]
    start: Seconds | None
    """Imports, hashing and loading, once for all personas. None without an estimate."""
    no_estimate: str
    """Why there are no seconds; empty if there are."""

    @property
    def total(self) -> Seconds | None:
        """Seconds of the whole run, or None without an estimate."""
        parts = [self.start, *(part for persona in self.personas for part in (persona.training, persona.evaluation))]
        known = [part for part in parts if part is not None]
        return reduce(add, known) if len(known) == len(parts) else None

    def money(self, price_per_hour: float | None) -> tuple[float, float] | None:
        """Return the range of the run's price, or None without a price or an estimate."""
        total = self.total
        return None if total is None or price_per_hour is None else total.money(price_per_hour)

    def as_json(self, price_per_hour: float | None) -> Mapping[str, object]:
        """Return JSON-compatible values. Every range is `[low, high]`."""
        money = self.money(price_per_hour)
        return {
            "base": self.base,
            "backend": self.backend,
            "device": self.device,
            "gpu": self.gpu,
            "free_gib": None if self.free_gib is None else round(self.free_gib, 1),
            "personas": [persona.as_json() for persona in self.personas],
            "seconds": {"start": _seconds_json(self.start), "total": _seconds_json(self.total)},
            "price_per_hour": price_per_hour,
            "money": None if money is None else [round(end, 4) for end in money],
            "estimated_from": [] if self.no_estimate else list(SOURCES),
            "no_estimate": self.no_estimate or None,
        }


def _seconds_json(seconds: Seconds | None) -> list[float] | None:
    return None if seconds is None else [round(seconds.low, 1), round(seconds.high, 1)]
