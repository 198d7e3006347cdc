"""Hand-written exchanges that show the teacher how a persona answers."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

from lora_trainer.data.records import TrainingRecord
from lora_trainer.generator.collector import Cell
from lora_trainer.generator.exchanges import load_exchanges, record_of
from lora_trainer.persona.vocabulary import BloodType, IntensityThird


@dataclass(frozen=True, slots=True)
class Exemplar:
    """A hand-written record and its family."""

    family: str
    record: TrainingRecord

    @property
    def cell(self) -> Cell:
        """Its feeling and third of intensity."""
        emotion = self.record.context.current_emotion
        return emotion.type, IntensityThird.of(emotion.intensity)


@cache
def exemplars(blood_type: BloodType) -> tuple[Exemplar, ...]:
    """Return a persona's exemplars: all exchanges of the package."""
    return tuple(
        Exemplar(exchange.family, record_of(blood_type, exchange.summary, exchange.input, reply.text, reply))
        for exchange in load_exchanges()
        for reply in exchange.replies.get(blood_type, ())
    )


def nearest(known: Sequence[Exemplar], family: str, cell: Cell, count: int, rng: random.Random) -> list[Exemplar]:
    """Return the `count` exemplars nearest to a family and a cell, in random order among equals.

    An exemplar of the family comes before others, then one of the same third, then one of the same feeling.
    """
    shuffled = rng.sample(known, len(known))
    feeling, third = cell
    return sorted(shuffled, key=lambda one: (one.family != family, one.cell[1] != third, one.cell[0] != feeling))[:count]
