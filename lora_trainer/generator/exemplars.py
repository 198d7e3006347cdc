"""Hand-written exchanges that show the teacher how a persona answers. `tools/bundled_data.py` takes them from data/handwritten."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import resources

from lora_trainer.data.records import TrainingRecord
from lora_trainer.generator.collector import Cell
from lora_trainer.persona.specs import persona_spec
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
    """Return a persona's exemplars."""
    return tuple(_read(blood_type))


def _read(blood_type: BloodType) -> Iterator[Exemplar]:
    text = resources.files("lora_trainer.generator").joinpath("exemplars.jsonl").read_text(encoding="utf-8")
    for line in text.splitlines():
        situation = json.loads(line)
        for reply in situation["replies"].get(blood_type, ()):
            yield Exemplar(
                situation["family"],
                TrainingRecord.model_validate(
                    {
                        "instruction": persona_spec(blood_type).instruction,
                        "context": {
                            "summary": situation["summary"],
                            "current_emotion": {"type": reply["feeling"], "intensity": reply["intensity"]},
                        },
                        "input": situation["input"],
                        "output": {"text": reply["text"], "emotion": reply["emotion"]},
                    }
                ),
            )


def nearest(known: Sequence[Exemplar], family: str, cell: Cell, count: int, rng: random.Random) -> list[Exemplar]:
    """Return the `count` exemplars nearest to a family and a cell, in random order among equals.

    An exemplar of the family comes before others, then one of the same third, then one of the same feeling.
    """
    shuffled = rng.sample(known, len(known))
    feeling, third = cell
    return sorted(shuffled, key=lambda one: (one.family != family, one.cell[1] != third, one.cell[0] != feeling))[:count]
