"""Which records make up which optimizer step, and how a step's records share rows.

Steps belong to the recipe: they depend on the number of records and the seed alone. Rows belong to the
memory layout: a step's records are spread over as few rows as the micro-batch size allows, so that
another GPU packs differently and still takes the same optimizer steps.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence


def plan_steps(records: int, sequences_per_step: int, epochs: float, seed: int, max_steps: int | None = None) -> list[list[int]]:
    """Indices of the records of each optimizer step.

    Each epoch is its own permutation and epochs follow one another without a gap, so only the very last
    step may be smaller. The permutation sorts by a hash and not by a random generator: it is the same on
    every platform and version.
    """
    wanted = max(1, round(records * epochs))
    order: list[int] = []
    for epoch in range(math.ceil(wanted / records)):
        order += sorted(
            range(records), key=lambda index: hashlib.blake2b(f"{seed}/{epoch}/{index}".encode(), digest_size=8).digest()
        )
    order = order[:wanted]
    steps = [order[start : start + sequences_per_step] for start in range(0, wanted, sequences_per_step)]
    return steps[:max_steps]


def pack(lengths: Sequence[int], row_tokens: int) -> list[list[int]]:
    """Positions in `lengths` of the sequences of each row, no row above `row_tokens`.

    Fewest rows that longest-first-into-emptiest (LPT, Graham 1969) can fill; it also keeps them even,
    and even rows mean even peak memory. Raises `ValueError` for a sequence longer than a row.
    """
    if not lengths:
        return []
    if max(lengths) > row_tokens:
        raise ValueError(f"a sequence of {max(lengths)} tokens does not fit a row of {row_tokens}")
    longest_first = sorted(range(len(lengths)), key=lambda position: (-lengths[position], position))
    count = math.ceil(sum(lengths) / row_tokens)
    while True:
        rows: list[list[int]] = [[] for _ in range(count)]
        filled = [0] * count
        for position in longest_first:
            row = filled.index(min(filled))
            rows[row].append(position)
            filled[row] += lengths[position]
        if max(filled) <= row_tokens:
            # longest first: where attention has no varlen kernel, records of one length that stand together share a call
            return [row for row in rows if row]
        count += 1
