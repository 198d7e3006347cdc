"""What training is given and what it gives back; the loop itself is `backends/trainer.py`, which needs torch."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal

from lora_trainer.records import TrainingRecord


@dataclass(frozen=True, slots=True)
class StepLog:
    """One optimizer step, as `train_log.jsonl` has it."""

    step: int
    loss: float
    """Mean over the step's loss tokens, nats."""
    learning_rate: float
    grad_norm: float
    tokens: int
    """Real tokens; rows are never padded."""
    loss_tokens: int
    rows: int
    step_s: float


@dataclass(slots=True)
class TrainingLog:
    """All steps of a training run, and what they add up to."""

    steps: list[StepLog] = field(default_factory=list)
    packed_rows: int = 0
    """Rows that hold more than one record."""
    train_s: float = 0.0

    @property
    def tokens(self) -> int:
        """Real tokens that went through the model."""
        return sum(step.tokens for step in self.steps)

    @property
    def tokens_per_s(self) -> float:
        """Real tokens a second, from the first step to the last, compilation and warm-up included."""
        return self.tokens / self.train_s if self.train_s else 0.0


Schedule = Literal["cosine", "linear", "constant"]


def learning_rate_factor(step: int, steps: int, warmup_steps: int, schedule: Schedule) -> float:
    """Share of the peak learning rate at optimizer step `step` of `steps`, counted from 0; never 0 within the run.

    Rises linearly over `warmup_steps`, reaches 1 on the step after them, and from there falls by a half
    cosine (Loshchilov & Hutter, arXiv 1608.03983) or a line that would reach 0 one step after the last.
    """
    if step < warmup_steps:
        return (step + 1) / (warmup_steps + 1)
    progress = min(1.0, (step - warmup_steps) / max(1, steps - warmup_steps))
    match schedule:
        case "cosine":
            return 0.5 * (1 + math.cos(math.pi * progress))
        case "linear":
            return 1 - progress
        case "constant":
            return 1.0


OnStep = Callable[[StepLog, int], None]
"""Called after each optimizer step with its log and the number of all steps."""


AfterStep = Callable[[int], None]
"""Called between two optimizer steps with the number of the one behind it: the place to checkpoint."""


def record_digest(record: TrainingRecord) -> bytes:
    """SHA-256 of a record's content; spelling of its JSON line does not matter."""
    canonical = json.dumps(record.model_dump(mode="json"), sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(canonical.encode()).digest()


def split_held_out(records: Sequence[TrainingRecord], fraction: float) -> tuple[list[int], list[int]]:
    """Indices of the training and of the held-out records.

    A record's side depends on its content alone, so it keeps it when the file grows, is reordered, or
    is trained on with another seed, and copies of one record stay on one side. At least one record is
    held out and one is kept, as long as there are two different ones.
    """
    draws = [int.from_bytes(record_digest(record)[:8], "big") / 2**64 for record in records]
    limit = fraction
    if draws and not any(draw < limit for draw in draws):
        limit = math.nextafter(min(draws), 2)
    if draws and all(draw < limit for draw in draws):
        limit = max(draws)
    held_out = [index for index, draw in enumerate(draws) if draw < limit]
    train = [index for index, draw in enumerate(draws) if draw >= limit]
    return train, held_out
