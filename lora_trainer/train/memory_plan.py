"""Choose gradient checkpointing and micro-batch size from the GPU's memory.

The rule is fitted to measurements on one H100 with Unsloth 2026.10.9. A 7B-shaped NF4 base with rank-16 adapters took 13.5, 21.3,
36.4 and 67.2 GiB at 2,048, 4,096, 8,192 and 16,384 tokens without checkpointing, and 6.7 and 9.1 GiB at 4,096 and 16,384 tokens
with "unsloth" checkpointing. Both series are straight lines whose value at 0 tokens is the size of the weights. Without
checkpointing the slope is `2 * (3 * intermediate + 4 * hidden)` bytes per token and layer (142 kB, as measured); with it, 1.5 times
one layer's share per token for the whole model (213 kB; measured 205 kB).
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal

from lora_trainer.config import MemoryConfig, Quantization, TrainingConfig
from lora_trainer.errors import ConfigError, HardwareError

GIB: Final = 1024**3
USABLE_SHARE: Final = 0.9
"""Fraction of the free memory that a plan may use. The rest allows for fragmentation and other processes."""
FIXED_BYTES: Final = int(0.75 * GIB)
"""Memory for the CUDA context, library workspaces, and the adapter's optimizer state and gradients."""
CPU_ROW_TOKENS: Final = 512
"""Row length on a CPU. The cost of attention without a fused kernel grows with its square: on the tiny base, a step of 900 tokens
takes a quarter less in rows of 512 than in one of 2,048, and no less in rows of 256.
"""

LEAST_ROW_TOKENS: Final = 256
"""Shortest row to step down to. Shorter rows save little, because the weights take most of the memory."""

Checkpointing = Literal["off", "on", "unsloth"]

# (recompute, row tokens), from fastest to smallest; rows longer than these were not faster in measurements
_CANDIDATES: Final[tuple[tuple[bool, int], ...]] = (
    (False, 8192),
    (False, 4096),
    (True, 8192),
    (True, 4096),
    (True, 2048),
    (True, 1024),
)


@dataclass(frozen=True, slots=True)
class ModelShape:
    """The sizes in a Qwen2-like decoder's `config.json` that determine its memory."""

    layers: int
    hidden: int
    intermediate: int
    attention_heads: int
    key_value_heads: int
    vocabulary: int
    tied_embeddings: bool
    positions: int
    """`max_position_embeddings`: maximum context of the base, in tokens."""

    @classmethod
    def of(cls, base: Path) -> ModelShape:
        """Read the `config.json` of the base in folder `base`. Raises `ConfigError` if it is not a Qwen2-like decoder."""
        path = base / "config.json"
        try:
            settings = json.loads(path.read_text(encoding="utf-8"))
            return cls(
                layers=settings["num_hidden_layers"],
                hidden=settings["hidden_size"],
                intermediate=settings["intermediate_size"],
                attention_heads=settings["num_attention_heads"],
                key_value_heads=settings.get("num_key_value_heads", settings["num_attention_heads"]),
                vocabulary=settings["vocab_size"],
                tied_embeddings=settings.get("tie_word_embeddings", False),
                positions=settings["max_position_embeddings"],
            )
        except (OSError, ValueError, KeyError) as error:
            raise ConfigError(f"base.model: {path}: expected a Qwen2-like decoder's configuration, got {error!r}") from None

    @property
    def linear_parameters(self) -> int:
        """Number of weights in the seven linear projections of all layers."""
        key_value = self.hidden * self.key_value_heads // self.attention_heads
        return self.layers * (2 * self.hidden * self.hidden + 2 * self.hidden * key_value + 3 * self.hidden * self.intermediate)

    def weight_bytes(self, quantization: Quantization, bytes_per_value: int) -> int:
        """Return the size of the loaded base. NF4 with double quantization takes 4.13 bits per weight (QLoRA, arXiv 2305.14314)."""
        linear = self.linear_parameters * (bytes_per_value if quantization == "none" else 4.13 / 8)
        embeddings = self.vocabulary * self.hidden * bytes_per_value * (1 if self.tied_embeddings else 2)
        return int(linear) + embeddings

    def activation_bytes(self, tokens: int, recompute: bool) -> int:
        """Return the peak activation size of one micro-batch in bfloat16, by the slopes in the module docstring."""
        layer = 2 * (3 * self.intermediate + 4 * self.hidden)
        return int(tokens * layer * (1.5 if recompute else self.layers))


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    """The chosen memory layout, and the reason for it."""

    gradient_checkpointing: Checkpointing
    micro_batch_tokens: int
    estimated_peak_gib: float | None
    """None on a CPU, where the module's rule does not apply."""
    reason: str


@dataclass(frozen=True, slots=True)
class MemoryLimit:
    """Upper bound for the next plan after an OOM. The user's settings override it."""

    recompute: bool
    """Whether the plan has to recompute activations."""
    row_tokens: int
    """Maximum row length. A single longer record still gets a row of its own length."""


def step_down(plan: MemoryPlan, memory: MemoryConfig, longest_tokens: int) -> MemoryLimit | None:
    """Return the limit for the next plan after an OOM with `plan`, or None if the user's settings allow no smaller one.

    First recompute activations, which frees the most and costs a third of the speed. Then shorten the rows. Optimizer steps keep
    their records, and only need more rows for them.
    """
    if plan.gradient_checkpointing == "off" and memory.gradient_checkpointing == "auto":
        return MemoryLimit(recompute=True, row_tokens=plan.micro_batch_tokens)
    shorter = max(plan.micro_batch_tokens // 2, LEAST_ROW_TOKENS, longest_tokens)
    if memory.micro_batch_tokens != "auto" or shorter >= plan.micro_batch_tokens:
        return None
    return MemoryLimit(plan.gradient_checkpointing != "off", shorter)


def plan_memory(
    memory: MemoryConfig,
    training: TrainingConfig,
    shape: ModelShape,
    free_bytes: int | None,
    longest_tokens: int,
    backend: Literal["unsloth", "transformers"],
    limit: MemoryLimit | None = None,
) -> MemoryPlan:
    """Choose the memory settings that `memory` leaves on `auto`, within `limit`.

    `free_bytes` is the GPU's free memory, None on a CPU. Values that the user set are used unchanged, except that no row is longer
    than `shape.positions`: Unsloth would stretch the rotary embedding to the row and change the base's output (with rows of 8,192
    on a base of 2,048 positions, only 7 of 480 greedy replies began correctly).

    Raises `HardwareError` if the smallest candidate does not fit, `ConfigError` if a record is longer than the base's positions.
    """
    if longest_tokens > shape.positions:
        raise ConfigError(
            f"training.max_length_tokens: the longest record has {longest_tokens:,} tokens, expected at most {shape.positions:,}, "
            "the positions that base.model supports (max_position_embeddings); lower training.max_length_tokens to leave "
            "such records out"
        )
    recompute_with: Checkpointing = "unsloth" if backend == "unsloth" else "on"
    chosen_checkpointing = None if memory.gradient_checkpointing == "auto" else memory.gradient_checkpointing
    chosen_tokens = None if memory.micro_batch_tokens == "auto" else memory.micro_batch_tokens
    most_tokens = limit.row_tokens if limit else shape.positions

    def row_tokens(candidate: int) -> int:
        return max(min(chosen_tokens or min(candidate, most_tokens), shape.positions), longest_tokens)

    if free_bytes is None:
        tokens = row_tokens(CPU_ROW_TOKENS)
        checkpointing = chosen_checkpointing or (recompute_with if limit and limit.recompute else "off")
        reason = "on the CPU: no recomputation, short rows" if limit is None else "on the CPU, after memory ran out"
        return MemoryPlan(checkpointing, tokens, None, reason)
    value_bytes = 2 if training.compute_dtype == "bfloat16" else 4
    weights = shape.weight_bytes(training.quantization, value_bytes) + FIXED_BYTES
    usable = free_bytes * USABLE_SHARE

    def peak(recompute: bool, tokens: int) -> int:
        return weights + shape.activation_bytes(tokens, recompute) * value_bytes // 2

    for recompute, candidate in _CANDIDATES:
        if limit and limit.recompute and not recompute:
            continue
        checkpointing = chosen_checkpointing or (recompute_with if recompute else "off")
        tokens = row_tokens(candidate)
        need = peak(checkpointing != "off", tokens)
        both_set = chosen_checkpointing is not None and chosen_tokens is not None
        if need <= usable or both_set:
            verb = "asked for" if both_set else "fastest that fits" if limit is None else "next smaller after memory ran out"
            reason = f"{verb}: {need / GIB:.1f} GiB estimated, {usable / GIB:.1f} GiB usable of {free_bytes / GIB:.1f} GiB free"
            return MemoryPlan(checkpointing, tokens, round(need / GIB, 1), reason)
    least = peak(chosen_checkpointing != "off", row_tokens(_CANDIDATES[-1][1]))
    raise HardwareError(
        f"GPU memory: {free_bytes / GIB:.1f} GiB free, expected at least {least / USABLE_SHARE / GIB:.1f} GiB for this base; "
        "use a larger GPU, free the memory that other processes hold, or set memory.micro_batch_tokens and "
        "memory.gradient_checkpointing yourself to try anyway"
    )
