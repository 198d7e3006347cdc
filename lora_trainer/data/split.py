"""The held-out split: a record's side depends on its content alone."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Sequence

from lora_trainer.data.records import TrainingRecord


def record_digest(record: TrainingRecord) -> bytes:
    """SHA-256 of a record's content; spelling of its JSON line does not matter."""
    canonical = json.dumps(record.model_dump(mode="json"), sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(canonical.encode()).digest()


def split_held_out(records: Sequence[TrainingRecord], fraction: float) -> tuple[list[int], list[int]]:
    """Indices of the training and of the held-out records.

    A record's side depends on its content alone, so it keeps it when the file grows, is reordered, or
    is trained on with another seed, and copies of one record stay on one side. At least one record is
    held out and one is kept, as long as there are two different ones.
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
