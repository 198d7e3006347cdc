"""What training reports after each optimizer step, and what the steps add up to."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field


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


OnStep = Callable[[StepLog, int], None]
"""Called after each optimizer step with its log and the number of all steps."""
AfterStep = Callable[[int], None]
"""Called between two optimizer steps with the number of the one behind it: the place to checkpoint."""
