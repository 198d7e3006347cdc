"""Draw replies at random, to show what an adapter usually says rather than its best or worst."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Final, NamedTuple

from lora_trainer.evaluate.rules import ScoredReply

DRAWN: Final = 20
"""Number of replies that the report and the demo show."""


class DrawnReply(NamedTuple):
    """A greedy reply of the adapter, and the base's to the same question."""

    adapter: ScoredReply
    base: ScoredReply | None


def drawn_replies(replies: Sequence[ScoredReply], run_id: str, count: int = DRAWN) -> list[DrawnReply]:
    """Return at most `count` greedy replies, one per prompt, in the order of the draw.

    The run id decides the draw, so that nobody chooses and everybody sees the same. An evaluation of the same run again draws the
    same questions.
    """
    greedy = [reply for reply in replies if reply.decoding == "greedy"]
    base = {(reply.prompt, reply.intensity): reply for reply in greedy if reply.model == "base"}

    def draw(reply: ScoredReply) -> bytes:
        return hashlib.sha256(f"{run_id} {reply.prompt} {reply.intensity:g}".encode()).digest()

    drawn: dict[int, ScoredReply] = {}
    for reply in sorted((reply for reply in greedy if reply.model == "adapter"), key=draw):
        if len(drawn) < count:
            drawn.setdefault(reply.prompt, reply)
    return [DrawnReply(reply, base.get((reply.prompt, reply.intensity))) for reply in drawn.values()]
