"""Check for silent failures: packed records that attend to each other, wrong weights trained, a broken saved adapter."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import torch

from lora_trainer.errors import InvariantError
from lora_trainer.train.backends.fingerprints import WeightFingerprints
from lora_trainer.train.backends.rows import Row, make_row
from lora_trainer.train.tokenization import TokenSequence

ISOLATION_TOLERANCE: Final = 0.01
"""bfloat16 rounds at 0.4 %. A record that attends to the one before it moves its logits by tens of percent."""
READ_BACK_TOLERANCE: Final = 0.01


@dataclass(frozen=True, slots=True)
class ReadBack:
    """Differences between the logits of a held-out record with the saved adapter and two references."""

    base_difference: float
    """Largest |logit| difference between the saved adapter and the base."""
    memory_difference: float
    """Largest |logit| difference between the saved adapter and the trained one in memory."""


def check_isolation(row_logits: Callable[[Row], torch.Tensor], first: TokenSequence, second: TokenSequence) -> float:
    """Check that records in one row do not attend to each other.

    Compute the second record's logits after the first record and after another record of the same length. Return their largest
    difference relative to the largest logit. `row_logits` returns the logits of one row [T, V].

    Raises `InvariantError` if the difference exceeds rounding noise.
    """
    other = TokenSequence(tuple(reversed(first.input_ids)), first.prompt_tokens)
    if other.input_ids == first.input_ids:
        raise ValueError("the first record reads the same backwards: the check would prove nothing")
    logits = [row_logits(make_row([before, second]))[len(first) :] for before in (first, other)]
    scale = logits[0].abs().max().clamp(min=1e-6)
    difference = float((logits[0] - logits[1]).abs().max() / scale)
    if not difference <= ISOLATION_TOLERANCE or not torch.isfinite(scale):
        raise InvariantError(
            f"records packed into one row see each other: logits of the second change by {difference:.1%} with the first, "
            f"expected at most {ISOLATION_TOLERANCE:.1%}; this attention implementation can't be used with packing"
        )
    return difference


def check_trained_weights(before: WeightFingerprints, after: WeightFingerprints, steps: int) -> None:
    """Raise `InvariantError` if `steps` optimizer steps changed a base weight or left an adapter weight unchanged."""
    changed = [name for name, value in after.base.items() if before.base[name] != value]
    if changed:
        raise InvariantError(f"{len(changed)} base weights changed in training ({changed[0]}, ...): only the adapter may change")
    unchanged = [name for name, value in after.adapter.items() if before.adapter[name] == value]
    # B starts at zero: it changes at the first step, and A, whose gradient is proportional to B, from the second on
    stuck = [name for name in unchanged if "lora_B" in name or steps > 1]
    if stuck or not after.adapter:
        raise InvariantError(f"{len(stuck)} of {len(after.adapter)} adapter weights did not change in training ({stuck[:1]})")


def compare_read_back(base: torch.Tensor, trained: torch.Tensor, loaded: torch.Tensor) -> ReadBack:
    """Compare a record's logits [T, V] from the base, from the trained adapter, and from the adapter loaded after saving.

    Raises `InvariantError` if the loaded adapter does not change the base's logits or differs from the trained one.
    """
    result = ReadBack(float((loaded - base).abs().max()), float((loaded - trained).abs().max()))
    if not result.base_difference > 0:
        raise InvariantError("the saved adapter does not change the base's logits: nothing was learned or nothing was saved")
    if not result.memory_difference <= READ_BACK_TOLERANCE * max(1.0, result.base_difference):
        raise InvariantError(
            f"the saved adapter is not the one that was trained: its logits differ by {result.memory_difference:.3g} "
            f"(from the base by {result.base_difference:.3g})"
        )
    return result
