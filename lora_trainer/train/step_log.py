"""Log of the optimizer steps, and totals."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from lora_trainer.train.held_out import HeldOutLoss


@dataclass(frozen=True, slots=True)
class StepLog:
    """One optimizer step, as written to `train_log.jsonl`."""

    step: int
    loss: float
    """Mean over the step's loss tokens, in nats."""
    learning_rate: float
    grad_norm: float
    tokens: int
    """Number of tokens in the step. Rows have no padding."""
    loss_tokens: int
    rows: int
    step_s: float


@dataclass(slots=True)
class TrainingLog:
    """All steps of a training run and their totals."""

    steps: list[StepLog] = field(default_factory=list)
    packed_rows: int = 0
    """Number of rows with more than one record."""
    train_s: float = 0.0
    """Seconds of all steps, without the measurements between them."""
    held_out: list[HeldOutLoss] = field(default_factory=list)
    """Held-out losses, in order."""

    @property
    def tokens(self) -> int:
        """Number of tokens in all steps."""
        return sum(step.tokens for step in self.steps)

    @property
    def tokens_per_s(self) -> float:
        """Tokens per second over all steps, including compilation and warm-up."""
        return self.tokens / self.train_s if self.train_s else 0.0


OnStep = Callable[[StepLog, int], None]
"""Called after each optimizer step with its log and the total number of steps."""
AfterStep = Callable[[int, bool], None]
"""Called after each optimizer step with its number and whether it is the last, before the next step begins. Checkpoints are
written here."""
