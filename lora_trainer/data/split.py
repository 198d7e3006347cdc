"""Split records into training and held-out sets by a hash of their content."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Sequence

from lora_trainer.data.records import TrainingRecord


def record_digest(record: TrainingRecord) -> bytes:
    """Return the SHA-256 of a record's content, independent of the formatting of its JSON line."""
    canonical = json.dumps(record.model_dump(mode="json"), sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(canonical.encode()).digest()


def split_held_out(records: Sequence[TrainingRecord], fraction: float) -> tuple[list[int], list[int]]:
    """Return the indices of the training records and of the held-out records.

    A record's side depends only on its content: it does not change with the file's size, its order or the training seed, and
    duplicates land on the same side. Each side gets at least one record if at least two are distinct.
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
