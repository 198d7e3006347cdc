"""Split records into training and held-out sets by a hash of their situation."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Sequence

from lora_trainer.data.duplicates import normalized
from lora_trainer.data.records import TrainingRecord


def record_digest(record: TrainingRecord) -> bytes:
    """Return the SHA-256 of a record's content, independent of the formatting of its JSON line."""
    canonical = json.dumps(record.model_dump(mode="json"), sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(canonical.encode()).digest()


def situation_digest(record: TrainingRecord) -> bytes:
    """Return the SHA-256 of a record's situation: its normalized summary and input."""
    texts = (record.context.summary, record.input)
    return hashlib.sha256("\0".join(map(normalized, texts)).encode()).digest()


def split_held_out(records: Sequence[TrainingRecord], fraction: float) -> tuple[list[int], list[int]]:
    """Return the indices of the training records and of the held-out records.

    Records of one situation land on the same side, whatever their feelings, intensities and replies, because a model that has
    learned one of them knows much of the others. The side of a situation depends only on its text: it does not change with the
    file's size, its order or the training seed. Each side gets at least one record if at least two situations are distinct. If all
    records share one situation, each record's content decides instead.
    """
    digests = [situation_digest(record) for record in records]
    if len(set(digests)) == 1:
        digests = [record_digest(record) for record in records]
    draws = [int.from_bytes(digest[:8], "big") / 2**64 for digest in digests]
    limit = fraction
    if draws and not any(draw < limit for draw in draws):
        limit = math.nextafter(min(draws), 2)
    if draws and all(draw < limit for draw in draws):
        limit = max(draws)
    held_out = [index for index, draw in enumerate(draws) if draw < limit]
    train = [index for index, draw in enumerate(draws) if draw >= limit]
    return train, held_out
