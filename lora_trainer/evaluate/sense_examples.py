"""The labelled replies on which a judge of sense is fitted and examined, and the folds that keep the examination honest.

`assets/sense_examples.jsonl` ships with the package; data/README.md says where the replies come from and who labelled them.
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from functools import cache
from hashlib import blake2b
from importlib import resources
from typing import Annotated, Final

from pydantic import BaseModel, ConfigDict, Field

from lora_trainer.data.duplicates import normalized
from lora_trainer.persona.prompt import Message, prompt_messages
from lora_trainer.persona.specs import persona_spec
from lora_trainer.persona.vocabulary import BloodType, Feeling

BY_HAND: Final = "hand"
"""`written_by` of a reply that no adapter wrote."""

SITUATION_FOLDS: Final = 5
WRITER_FOLDS: Final = 3

_Text = Annotated[str, Field(min_length=1)]


class SenseKind(StrEnum):
    """What is right or wrong with a reply."""

    GOOD = "good"
    MISSES = "misses"
    """Fluent, but it misses the point."""
    SALAD = "salad"
    """Nobody could say what it means."""
    HARMFUL = "harmful"
    EXCHANGED = "exchanged"
    """A good reply to another message."""


BAD_KINDS: Final = (SenseKind.MISSES, SenseKind.SALAD, SenseKind.HARMFUL, SenseKind.EXCHANGED)


class SenseExample(BaseModel):
    """One line of `sense_examples.jsonl`: a message, a reply and its label."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    situation: _Text
    """All examples of a situation have the same message and summary."""
    written_by: _Text
    """`hand`, or the name of the adapter."""
    persona: BloodType
    summary: str
    feeling: Feeling
    intensity: Annotated[float, Field(ge=0, le=1)]
    input: _Text
    reply: _Text
    kind: SenseKind

    @property
    def is_good(self) -> bool:
        """Whether the reply makes sense."""
        return self.kind is SenseKind.GOOD

    @property
    def messages(self) -> tuple[Message, ...]:
        """The prompt that the reply answers, as training and evaluation write it."""
        instruction = persona_spec(self.persona).instruction
        return tuple(prompt_messages(instruction, self.summary, self.feeling, self.intensity, self.input))


Cell = tuple[int, int]
"""A situation fold and a writer fold. A judge fitted for a cell knows no situation and no adapter of it."""


@dataclass(frozen=True, slots=True)
class Folds:
    """Assignment of situations and adapters to folds, by hash, so that it depends on their names alone.

    Situations for which adapters wrote replies are dealt out first, so that each fold has its share of both sources.
    """

    situations: Mapping[str, int]
    """Fold of each situation, below `SITUATION_FOLDS`."""
    halves: Mapping[str, int]
    """0 if the situation helps to set the threshold, 1 if it helps to measure the judge's errors."""
    writers: Mapping[str, int]
    """Fold of each adapter, below `WRITER_FOLDS`."""

    @classmethod
    def of(cls, examples: Iterable[SenseExample]) -> Folds:
        """Assign the situations and adapters of `examples`."""
        by_adapter: dict[str, bool] = defaultdict(bool)
        writers = set()
        for example in examples:
            by_adapter[example.situation] |= example.written_by != BY_HAND
            writers.add(example.written_by)
        situations: dict[str, int] = {}
        halves: dict[str, int] = {}
        for source in (True, False):
            for number, name in enumerate(sorted((name for name, found in by_adapter.items() if found is source), key=_hash)):
                situations[name] = number % SITUATION_FOLDS
                halves[name] = number // SITUATION_FOLDS % 2
        adapters = sorted(writers - {BY_HAND}, key=_hash)
        return cls(situations, halves, {name: number % WRITER_FOLDS for number, name in enumerate(adapters)})

    def cell(self, example: SenseExample) -> Cell:
        """Return the situation fold and the writer fold whose judge is examined on this example.

        People are no adapter to leave out: a reply by hand takes the writer fold that its situation's name selects.
        """
        written_by = example.written_by
        writer = _hash(example.situation) % WRITER_FOLDS if written_by == BY_HAND else self.writers[written_by]
        return self.situations[example.situation], writer

    def may_teach(self, example: SenseExample, cell: Cell) -> bool:
        """Return whether a judge examined on `cell` may learn from this example: neither its situation nor its adapter is in it."""
        situation, writer = cell
        if self.situations[example.situation] == situation:
            return False
        return example.written_by == BY_HAND or self.writers[example.written_by] != writer


@dataclass(frozen=True, slots=True)
class SenseSet:
    """The examples, exchanged replies included, and their folds."""

    examples: tuple[SenseExample, ...]
    folds: Folds

    @classmethod
    def of(cls, labelled: Sequence[SenseExample]) -> SenseSet:
        """Add the exchanged replies to the labelled ones."""
        folds = Folds.of(labelled)
        return cls((*labelled, *_exchanged(labelled, folds)), folds)

    @property
    def sha256(self) -> str:
        """Digest of everything that a judge sees of the examples, in order."""
        digest = hashlib.sha256()
        for example in self.examples:
            digest.update(example.model_dump_json().encode() + b"\n")
        return digest.hexdigest()

    def situations_of(self, dialogues: Iterable[tuple[str, str]]) -> list[str | None]:
        """Return the situation that each pair of summary and message is, or None if it is none of these."""
        known = {_dialogue(example.summary, example.input): example.situation for example in self.examples}
        return [known.get(_dialogue(*dialogue)) for dialogue in dialogues]


def _exchanged(labelled: Iterable[SenseExample], folds: Folds) -> list[SenseExample]:
    """Give each good reply by hand to the next situation of the same persona, fold and half, in a circle.

    Both situations of an exchanged reply are then left out together.
    """
    groups: dict[tuple[int, int, str], list[SenseExample]] = defaultdict(list)
    for example in labelled:
        if example.is_good and example.written_by == BY_HAND:
            groups[folds.situations[example.situation], folds.halves[example.situation], example.persona].append(example)
    found = []
    for _, group in sorted(groups.items()):
        ordered = sorted(group, key=lambda example: _hash(example.situation))
        for example, other in zip(ordered, [*ordered[1:], ordered[0]], strict=True):
            if example.situation != other.situation:
                found.append(example.model_copy(update={"reply": other.reply, "kind": SenseKind.EXCHANGED}))
    return found


@cache
def bundled_examples() -> SenseSet:
    """Load the examples that ship with the package."""
    text = resources.files("lora_trainer.evaluate").joinpath("assets", "sense_examples.jsonl").read_text(encoding="utf-8")
    return SenseSet.of([SenseExample.model_validate_json(line) for line in text.splitlines()])


def _dialogue(summary: str, message: str) -> str:
    return normalized(f"{summary}\n{message}")


def _hash(name: str) -> int:
    return int.from_bytes(blake2b(name.encode(), digest_size=8).digest(), "little")
