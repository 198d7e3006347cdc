"""Decide when to measure the held-out loss during training, which step is the best one, and when to stop early."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from lora_trainer.train.tokenization import TokenSequence


@dataclass(frozen=True, slots=True)
class HeldOutLoss:
    """The held-out loss after one optimizer step."""

    step: int
    loss: float
    """Mean over all reply tokens of the held-out records, in nats."""


OnMeasured = Callable[[HeldOutLoss, HeldOutLoss], None]
"""Called after each measurement with its result and with the lowest one so far."""


@dataclass(frozen=True, slots=True)
class HeldOutPlan:
    """What to measure during training, when, and what follows from it."""

    sequences: Sequence[TokenSequence]
    at_steps: frozenset[int]
    """Measure after these steps. Contains the last step."""
    keep_best: bool
    """Whether training ends with the weights of the lowest loss instead of the last ones."""
    early_stopping: int | None
    """Stop after this many measurements in a row without a new lowest loss; None: never."""
    on_measured: OnMeasured


def measurement_steps(records: int, sequences_per_step: int, per_epoch: int, steps: int) -> frozenset[int]:
    """Return the steps to measure after: `per_epoch` evenly spaced ones in each epoch of `records`, and the last of `steps`."""
    interval = max(1.0, records / sequences_per_step / per_epoch)
    return frozenset(round(number * interval) for number in range(1, int(steps / interval) + 1)) | {steps}


def lowest(losses: Sequence[HeldOutLoss]) -> HeldOutLoss:
    """Return the measurement with the lowest loss, the earliest of equal ones. `losses` must not be empty."""
    return min(losses, key=lambda measured: measured.loss)


def is_overfitting(losses: Sequence[HeldOutLoss], early_stopping: int | None) -> bool:
    """Return whether the last `early_stopping` measurements brought no new lowest loss."""
    if early_stopping is None or not losses:
        return False
    best = lowest(losses)
    return sum(measured.step > best.step for measured in losses) >= early_stopping
