"""The learning rate: its peak, and its course over the optimizer steps."""

from __future__ import annotations

import math
from typing import Literal

Schedule = Literal["cosine", "linear", "constant"]


def learning_rate_factor(step: int, steps: int, warmup_steps: int, schedule: Schedule) -> float:
    """Return the fraction of the peak learning rate at step `step` of `steps`, counted from 0. It is never 0.

    The fraction rises linearly over `warmup_steps` and reaches 1 on the following step. From there it falls along a half cosine
    (Loshchilov & Hutter, arXiv 1608.03983) or a line that would reach 0 one step after the last.
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


def learning_rate_for_width(hidden_size: int, sequences_per_step: int) -> float:
    """Return a peak learning rate for LoRA on a base of Qwen's family, whose hidden states have the width `hidden_size`.

    The rule of Thinking Machines' cookbook (https://github.com/thinking-machines-lab/tinker-cookbook, hyperparam_utils), fitted at
    128 sequences per step: ten times the rate of full fine-tuning, with the exponent 0.0775 for Qwen. With Adam, the rate grows
    with the square root of the step's size (Malladi et al., arXiv 2205.10287).
    """
    at_128 = 5e-5 * 10 * math.pow(2000 / hidden_size, 0.0775)
    return at_128 * math.sqrt(sequences_per_step / 128)
