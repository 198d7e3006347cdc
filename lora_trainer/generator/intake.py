"""What both engines share: how many records of which feeling and intensity are wanted, and which record is taken."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Final

from lora_trainer.data.duplicates import NearDuplicateFinder
from lora_trainer.data.lint import lint_reply
from lora_trainer.data.records import TrainingRecord
from lora_trainer.persona.vocabulary import BloodType, Feeling, IntensityThird

Cell = tuple[Feeling, IntensityThird]

INTENSITIES: Final[Mapping[IntensityThird, tuple[float, ...]]] = {
    IntensityThird.LOW: (0.0, 0.1, 0.2, 0.3),
    IntensityThird.MIDDLE: (0.4, 0.5, 0.6),
    IntensityThird.HIGH: (0.7, 0.8, 0.9, 1.0),
}
"""One decimal, as the prompt shows it."""

QUESTION_RATE: Final = 0.65
"""Share of the replies that are to ask something back: in the middle of the 50 to 75 % that the data is meant to have."""


def all_cells() -> list[Cell]:
    """Every feeling at every third of intensity."""
    return [(feeling, third) for feeling in Feeling for third in IntensityThird]


def wanted_cells(count: int, rng: random.Random) -> list[Cell]:
    """`count` cells in random order, each as often as every other, or once more."""
    cells = all_cells()
    whole, rest = divmod(count, len(cells))
    wanted = cells * whole + rng.sample(cells, rest)
    rng.shuffle(wanted)
    return wanted


@dataclass(slots=True)
class Intake:
    """Takes records one by one, and says of each that it does not take why.

    What is refused: anything that the linter warns about, and near-duplicates, by the reply alone and by input and reply
    together, of what was taken before and of what the output is held against.
    """

    blood_type: BloodType
    taken: list[TrainingRecord] = field(default_factory=list)
    rejects: Counter[str] = field(default_factory=Counter)
    _replies: NearDuplicateFinder = field(default_factory=NearDuplicateFinder)
    _dialogues: NearDuplicateFinder = field(default_factory=NearDuplicateFinder)
    _held_out: NearDuplicateFinder = field(default_factory=NearDuplicateFinder)

    def hold_against(self, records: Iterable[TrainingRecord]) -> None:
        """Refuse what is nearly one of `records`."""
        for record in records:
            self._remember(record)

    def hold_out(self, inputs: Iterable[str]) -> None:
        """Refuse records whose input is nearly one of `inputs`: the evaluation's prompts must stay unseen."""
        for text in inputs:
            self._held_out.add(text)

    def problem(self, record: TrainingRecord) -> str | None:
        """Why `record` is not taken, as one word that counts are kept by; `None` when it can be."""
        emotion = record.context.current_emotion
        for problem in lint_reply(record.reply.text, emotion.intensity, blood_type=self.blood_type):
            return problem.code
        if self._held_out.find(record.input) is not None:
            return "evaluation_prompt"
        if self._replies.find(record.reply.text) is not None:
            return "near_duplicate_reply"
        if self._dialogues.find(_dialogue(record)) is not None:
            return "near_duplicate_dialogue"
        return None

    def take(self, record: TrainingRecord) -> bool:
        """Take `record`, or count why not."""
        if problem := self.problem(record):
            self.rejects[problem] += 1
            return False
        self._remember(record)
        self.taken.append(record)
        return True

    def _remember(self, record: TrainingRecord) -> None:
        self._replies.add(record.reply.text)
        self._dialogues.add(_dialogue(record))


def _dialogue(record: TrainingRecord) -> str:
    return f"{record.input}\n{record.reply.text}"
