"""Assign records to optimizer steps, and pack the records of a step into rows.

Steps are part of the recipe and depend only on the number of records and the seed. Rows are part of the memory layout: a step's
records are packed into as few rows as the micro-batch size allows. Another GPU may pack differently, but takes the same optimizer
steps.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence


def plan_steps(records: int, sequences_per_step: int, epochs: float, seed: int, max_steps: int | None = None) -> list[list[int]]:
    """Return the record indices of each optimizer step.

    Each epoch has its own permutation. A step may span two epochs, so only the last step can be smaller. The permutation sorts by
    a hash, which, unlike a random generator, is the same on every platform and version.
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
    """Return, for each row, the positions in `lengths` of its sequences. No row exceeds `row_tokens`.

    Put the longest remaining sequence into the emptiest row (LPT, Graham 1969), and use the fewest rows for which this works. It
    also balances the rows, which lowers the peak memory. Raises `ValueError` for a sequence longer than a row.
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
            # keep this order, longest first: without a varlen kernel, adjacent records of equal length share an attention call
            return [row for row in rows if row]
        count += 1
