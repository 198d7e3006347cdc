"""Estimate the seconds of a run on a GPU from measured ones.

All constants come from `benchmarks/results/`: a random-weight base of Qwen2.5-7B's shape in NF4, rank 16, on one H200 (training,
start) or H100 (generation), which have the same processor. An estimate is a range. Its lower end scales a measurement by the
base's FLOP per token; its upper end assumes that a row, a batch or a load takes no less time for being smaller, because the GPU
then waits for the kernel launches of each layer.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Final, Literal

from lora_trainer.train.memory_plan import MemoryPlan, ModelShape

Backend = Literal["unsloth", "transformers"]

SOURCES: Final = ("train-speed-h200.json", "run-7b-defaults-h200.json", "evaluation-speed-h100.json")
"""Result files that the constants come from."""
REFERENCE: Final = ModelShape(
    layers=28,
    hidden=3584,
    intermediate=18944,
    attention_heads=28,
    key_value_heads=4,
    vocabulary=152064,
    tied_embeddings=False,
    positions=32768,
)
"""Qwen2.5-7B, the shape of the measured base."""


@dataclass(frozen=True, slots=True)
class Seconds:
    """A range of seconds."""

    low: float
    high: float

    def __add__(self, other: Seconds) -> Seconds:
        """Add both ends."""
        return Seconds(self.low + other.low, self.high + other.high)

    def money(self, price_per_hour: float) -> tuple[float, float]:
        """Return the price of the range at `price_per_hour`, in its currency."""
        return self.low * price_per_hour / 3600, self.high * price_per_hour / 3600


@dataclass(frozen=True, slots=True)
class _Speed:
    tokens_per_s: float
    """Speed in full rows."""
    least_row_s: float
    """Shortest time measured for a row of any length."""
    warm_up: Seconds
    """How much longer the first step took than the others, because it compiles kernels."""


# train-speed-h200.json, cases by name: tokens_per_s, row_ms, first_step_s - step_ms. Recomputation: full rows only.
_RECOMPUTING: Final[dict[Backend, _Speed]] = {
    "unsloth": _Speed(10_627.0, 0.361, Seconds(0.71, 0.71)),  # unsloth-4096-unsloth
    "transformers": _Speed(5_224.0, 0.726, Seconds(0.28, 0.28)),  # transformers-4096-on
}
# unsloth-8192-off; run-7b-defaults-h200.json: step 7 with 2,131 tokens, and step 1 for the longer warm-up
_UNSLOTH_OFF: Final = _Speed(17_165.0, 0.245, Seconds(1.54, 2.20))
_RECOMPUTED_SHARE: Final = 2 / 3
"""Frozen weights take 4 FLOP per weight and token without recomputation and 6 with it. Bounds the speed of the transformers backend
without recomputation, which was not measured.
"""
_FORWARD_SHARE: Final = 1 / 2
"""Share of a forward pass in one forward and backward pass through frozen weights, in FLOP."""

# imports: train-speed-h200.json (lowest) and, highest, run-7b-defaults-h200.json or evaluation-speed-h100.json (reference)
_IMPORT: Final[dict[Backend, Seconds]] = {"unsloth": Seconds(23.1, 33.5), "transformers": Seconds(15.5, 22.3)}
# load: train-speed-h200.json: load_s; the highest of transformers is evaluation-speed-h100.json's
_LOAD: Final[dict[Backend, Seconds]] = {"unsloth": Seconds(7.4, 9.9), "transformers": Seconds(3.5, 5.4)}
# run-7b-defaults-h200.json: timings_s.identify, the SHA-256 of all files
_HASH_S: Final = 4.46
# run-7b-defaults-h200.json: timings_s, save + read_back
_SAVE_S: Final = 1.9

# evaluation-speed-h100.json: generate_s of 120 replies of 64 tokens, all of which took 64 decoding steps
_BATCH: Final = 120
_STEPS: Final = 64
_GENERATE_S: Final[dict[Backend, dict[str, float]]] = {
    "unsloth": {"adapter": 13.85, "base": 4.22},
    "transformers": {"adapter": 15.03, "base": 3.99},
}


def work_share(shape: ModelShape) -> float:
    """Return the FLOP per token of a base, relative to the measured one: weights of the projections and the head."""

    def weights(one: ModelShape) -> int:
        return one.linear_parameters + one.vocabulary * one.hidden

    return weights(shape) / weights(REFERENCE)


def training_seconds(
    row_lengths: Iterable[int], held_out_tokens: int, measurements: int, shape: ModelShape, memory: MemoryPlan, backend: Backend
) -> Seconds:
    """Estimate training, with `measurements` passes over `held_out_tokens` and saving.

    `row_lengths` has the tokens of each row of every step.
    """
    recomputes = memory.gradient_checkpointing != "off"
    speed = _UNSLOTH_OFF if backend == "unsloth" and not recomputes else _RECOMPUTING[backend]
    fastest = speed.tokens_per_s / (_RECOMPUTED_SHARE if backend == "transformers" and not recomputes else 1)
    share = work_share(shape)
    least_row_s = speed.least_row_s * shape.layers / REFERENCE.layers
    low, high = speed.warm_up.low + _SAVE_S, speed.warm_up.high + _SAVE_S
    for tokens in row_lengths:
        low += share * tokens / fastest
        high += max(least_row_s, share * tokens / speed.tokens_per_s)
    held_out_s = share * held_out_tokens * measurements
    rows = measurements * math.ceil(held_out_tokens / memory.micro_batch_tokens)
    low += held_out_s / fastest * _FORWARD_SHARE * (_RECOMPUTED_SHARE if recomputes else 1)
    high += max(rows * least_row_s, held_out_s / speed.tokens_per_s)
    return Seconds(low, high)


def evaluation_seconds(
    questions: int, ways: int, reply_tokens: int, max_new_tokens: int, batch_size: int, shape: ModelShape, backend: Backend
) -> Seconds:
    """Estimate generating the replies of adapter and base to `questions`, each in `ways` decodings.

    Low: a batch takes as long as the measured one, whatever its size, and ends after the data's longest reply, `reply_tokens`.
    High: the time grows with the replies, and one reply of each batch reaches `max_new_tokens`. A decoding step waits for kernel
    launches, so a shallower base is faster, but not a narrower one.
    """
    layers = shape.layers / REFERENCE.layers
    batch_s = sum(_GENERATE_S[backend].values()) * ways
    low = batch_s * min(layers, work_share(shape)) * math.ceil(questions / batch_size) * min(reply_tokens, max_new_tokens) / _STEPS
    high = batch_s * max(layers, work_share(shape)) * math.ceil(questions / min(_BATCH, batch_size)) * max_new_tokens / _STEPS
    return Seconds(low, high)


def start_seconds(shape: ModelShape, backend: Backend, *, hashes: bool, loads: Sequence[Backend]) -> Seconds:
    """Estimate imports, hashing the base if the run `hashes` it, and loading it into each of `loads`. Downloads come on top."""
    size = shape.weight_bytes("none", 2) / REFERENCE.weight_bytes("none", 2)
    total = _IMPORT[backend]
    if hashes:
        total += Seconds(_HASH_S * size, _HASH_S * max(1, size))
    for loaded in loads:
        total += Seconds(_LOAD[loaded].low * size, _LOAD[loaded].high * max(1, size))
    return total
