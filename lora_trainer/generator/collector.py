"""Shared by both engines: the wanted distribution of feelings and intensities, and the filter that accepts records."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Final

from lora_trainer.data.duplicates import NearDuplicateFinder, jaccard, shingles
from lora_trainer.data.lint import lint_exchange
from lora_trainer.data.records import TrainingRecord, texts_of
from lora_trainer.data.text_damage import text_problems
from lora_trainer.persona.vocabulary import BloodType, Feeling, IntensityThird

Cell = tuple[Feeling, IntensityThird]
"""Records are balanced over these cells."""

INTENSITIES: Final[Mapping[IntensityThird, tuple[float, ...]]] = {
    IntensityThird.LOW: (0.0, 0.1, 0.2, 0.3),
    IntensityThird.MIDDLE: (0.4, 0.5, 0.6),
    IntensityThird.HIGH: (0.7, 0.8, 0.9, 1.0),
}
"""Intensities to draw from, with one decimal as in the prompt."""

QUESTION_RATE: Final = 0.65
"""Target share of replies that ask a question back; the data should have 50 to 75 %."""

EXEMPLAR_JACCARD: Final = 0.5
"""Lower than for near-duplicates: a model that copies an exemplar changes some words."""


def all_cells() -> list[Cell]:
    """Return every combination of feeling and third of intensity."""
    return [(feeling, third) for feeling in Feeling for third in IntensityThird]


def wanted_cells(count: int, rng: random.Random) -> list[Cell]:
    """Return `count` cells in random order; the counts of any two cells differ by at most 1."""
    cells = all_cells()
    whole, rest = divmod(count, len(cells))
    wanted = cells * whole + rng.sample(cells, rest)
    rng.shuffle(wanted)
    return wanted


class RepeatFinder:
    """Find records that nearly repeat an earlier one. Variants of one source may resemble each other."""

    def __init__(self) -> None:
        self._replies, self._dialogues = NearDuplicateFinder(), NearDuplicateFinder()
        self._sources: list[int | None] = []
        """Source of the record at each position of both finders."""

    def add(self, record: TrainingRecord, source: int | None = None) -> None:
        """Add `record`, which is a variant of `source` or of nothing."""
        self._replies.add(record.reply.text)
        self._dialogues.add(_dialogue(record))
        self._sources.append(source)

    def has_reply(self, record: TrainingRecord, source: int | None = None) -> bool:
        """Return whether the reply of `record` nearly repeats one that was added."""
        return self._is_repeat(self._replies.find_all(record.reply.text), source)

    def has_dialogue(self, record: TrainingRecord, source: int | None = None) -> bool:
        """Return whether input and reply of `record` together nearly repeat those of a record that was added."""
        return self._is_repeat(self._dialogues.find_all(_dialogue(record)), source)

    def _is_repeat(self, positions: Iterable[int], source: int | None) -> bool:
        return any(source is None or self._sources[at] != source for at in positions)


def _dialogue(record: TrainingRecord) -> str:
    return f"{record.input}\n{record.reply.text}"


def variant_count(sources: Iterable[int | None]) -> int:
    """Return how many records share their source with another one, by the source of each record."""
    counts = Counter(source for source in sources if source is not None)
    return sum(count for count in counts.values() if count > 1)


@dataclass(slots=True)
class RecordCollector:
    """Accepts or rejects records one by one, and counts the reasons for rejections.

    Rejects records with a linter warning or damaged text, inputs similar to an excluded one, and near-duplicates of an accepted or
    excluded record, by the reply alone or by input and reply together. Variants of one source may resemble each other.
    """

    blood_type: BloodType
    accepted: list[TrainingRecord] = field(default_factory=list)
    sources: list[int | None] = field(default_factory=list)
    """Source of each accepted record; None for one that is no variant."""
    rejects: Counter[str] = field(default_factory=Counter)
    """Number of rejected records by reason."""
    _repeats: RepeatFinder = field(default_factory=RepeatFinder)
    _excluded_inputs: NearDuplicateFinder = field(default_factory=NearDuplicateFinder)
    _exemplars: list[frozenset[str]] = field(default_factory=list)

    @property
    def variants(self) -> int:
        """Number of accepted records that are variants of the same source as another one."""
        return variant_count(self.sources)

    def exclude_similar(self, records: Iterable[TrainingRecord]) -> None:
        """Reject near-duplicates of `records` from now on."""
        for record in records:
            self._repeats.add(record)

    def exclude_exemplars(self, records: Iterable[TrainingRecord]) -> None:
        """Reject records that take over much of a reply, or of input and reply, of `records`, which a model has been shown."""
        for record in records:
            self._exemplars += shingles(record.reply.text), shingles(_dialogue(record))

    def exclude_inputs(self, inputs: Iterable[str]) -> None:
        """Reject records with an input similar to one of `inputs`, to keep evaluation prompts out of the data."""
        for text in inputs:
            self._excluded_inputs.add(text)

    def rejection_reason(self, record: TrainingRecord, source: int | None = None) -> str | None:
        """Return the reason to reject `record` (a key of `rejects`), or None to accept it."""
        emotion = record.context.current_emotion
        for problem in lint_exchange(
            record.context.summary, record.input, record.reply.text, emotion.intensity, blood_type=self.blood_type
        ):
            return problem.code
        # models cut a character in half or escape it twice
        for name, text in texts_of(record):
            for problem in text_problems(None, name, text):
                return problem.code
        if self._excluded_inputs.find(record.input) is not None:
            return "evaluation_prompt"
        if self._copies_exemplar(record.reply.text) or self._copies_exemplar(_dialogue(record)):
            return "near_exemplar"
        if self._repeats.has_reply(record, source):
            return "near_duplicate_reply"
        if self._repeats.has_dialogue(record, source):
            return "near_duplicate_dialogue"
        return None

    def accept(self, record: TrainingRecord, source: int | None = None) -> bool:
        """Add `record` and return True, or count the reason for the rejection and return False.

        `source` is the number of the exchange that the record is a variant of, if it is one.
        """
        if reason := self.rejection_reason(record, source):
            self.rejects[reason] += 1
            return False
        self._repeats.add(record, source)
        self.accepted.append(record)
        self.sources.append(source)
        return True

    def _copies_exemplar(self, text: str) -> bool:
        parts = shingles(text)
        return any(jaccard(parts, shown) >= EXEMPLAR_JACCARD for shown in self._exemplars)
