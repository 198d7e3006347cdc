"""Draw what the teacher is asked for: family, feeling, speech act, typing, summary, length and emoji of each dialogue.

A model repeats itself and keeps no rates, so chance decides these, and the prompt names the result.
"""

from __future__ import annotations

import random
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from functools import cache
from importlib import resources
from typing import Annotated, Final

import yaml
from pydantic import BaseModel, ConfigDict, Field

from lora_trainer.generator.collector import INTENSITIES, QUESTION_RATE, Cell
from lora_trainer.persona.specs import persona_spec
from lora_trainer.persona.vocabulary import BloodType, Feeling


class SummaryKind(StrEnum):
    """What a dialogue's summary tells."""

    NONE = "none"
    ONE = "one"
    """One sentence."""
    TURNS = "turns"
    """Several earlier turns, in `SUMMARY_CHARACTERS`, of which the reply uses something."""


class ReplyLength(StrEnum):
    """How long a reply is."""

    SHORT = "short"
    USUAL = "usual"
    LONG = "long"


SUMMARY_CHARACTERS: Final = range(60, 151)
"""Length of a summary of several turns."""

_SUMMARIES: Final = {SummaryKind.NONE: 1 / 3, SummaryKind.ONE: 1 - 1 / 3 - 1 / 5, SummaryKind.TURNS: 1 / 5}
_LENGTHS: Final = {ReplyLength.SHORT: 0.25, ReplyLength.USUAL: 0.55, ReplyLength.LONG: 0.2}
_COMMA_RATE: Final = 1 / 6
_LAUGHTER_RATE: Final = 1 / 8
_LAUGHING: Final = frozenset((Feeling.HAPPY, Feeling.EXCITED, Feeling.EMBARRASSED, Feeling.SURPRISED, Feeling.LOVE))


class _Entry(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Habit(_Entry):
    """A habit of typing."""

    weight: Annotated[int, Field(ge=0)]
    """How often it is drawn, relative to the others; 0 for families that name it only."""
    says: str


class SpeechAct(Habit):
    """What the user's message does, and what a reply to it does first."""

    reply: str
    avoids: tuple[Feeling, ...] = ()
    """Feelings with which hardly anybody answers it."""
    needs_summary: bool = False
    has_words: bool = True
    """Whether there is something to type."""


class FamilyRules(_Entry):
    """What a family of situations restricts. Empty means no restriction."""

    topics: tuple[str, ...] = ()
    """Tags of data/POLICY.ko.md."""
    is_danger: bool = False
    feelings: tuple[Feeling, ...] = ()
    acts: tuple[str, ...] = ()
    typing: tuple[str, ...] = ()


class Orders(_Entry):
    """The content of prompts/orders.yaml."""

    acts: Mapping[str, SpeechAct]
    typing: Mapping[str, Habit]
    families: Mapping[str, FamilyRules]
    findings: Mapping[str, str]
    """A rule's code -> how the critic names what the rule found."""


_UNRESTRICTED: Final = FamilyRules()


@dataclass(frozen=True, slots=True)
class DialogueSpec:
    """Specification of one requested dialogue."""

    cell: Cell
    intensity: float
    family: str
    act: str
    typing: str
    """Empty if the message has no words."""
    summary: SummaryKind
    length: ReplyLength
    has_comma: bool
    has_laughter: bool
    emoji: int
    asks_back: bool
    """Whether the reply should end with a question."""

    @property
    def rules(self) -> FamilyRules:
        """The rules of its family."""
        return family_rules(self.family)


@cache
def families() -> dict[str, str]:
    """Load the situation families as name -> Korean title."""
    text = resources.files("lora_trainer.generator").joinpath("families.yaml").read_text(encoding="utf-8")
    return dict(yaml.safe_load(text))


@cache
def orders() -> Orders:
    """Load prompts/orders.yaml."""
    text = resources.files("lora_trainer.generator").joinpath("prompts/orders.yaml").read_text(encoding="utf-8")
    return Orders.model_validate(yaml.safe_load(text))


def family_rules(family: str) -> FamilyRules:
    """Return what `family` restricts."""
    return orders().families.get(family, _UNRESTRICTED)


def draw_specs(cells: Sequence[Cell], blood_type: BloodType, rng: random.Random) -> list[DialogueSpec]:
    """Return one dialogue per cell, each from another family that can carry the cell's feeling."""
    specs: list[DialogueSpec] = []
    for cell in cells:
        used = {spec.family for spec in specs}
        specs.append(_draw(cell, blood_type, used, rng))
    return specs


def _draw(cell: Cell, blood_type: BloodType, used: Collection[str], rng: random.Random) -> DialogueSpec:
    feeling, third = cell
    fitting = [name for name in families() if name not in used and feeling in (family_rules(name).feelings or Feeling)]
    family = rng.choice(fitting)
    rules = family_rules(family)
    acts = [name for name in rules.acts or orders().acts if feeling not in orders().acts[name].avoids]
    act = _weighted(acts, orders().acts, rng, is_even=bool(rules.acts))
    summary = rng.choices(list(_SUMMARIES), list(_SUMMARIES.values()))[0]
    if orders().acts[act].needs_summary and summary is SummaryKind.NONE:
        summary = SummaryKind.ONE
    emoji = rng.randint(*persona_spec(blood_type).emoji.usual[third])
    if rules.topics:
        emoji = 0 if rules.is_danger else min(emoji, 1)
    return DialogueSpec(
        cell=cell,
        intensity=rng.choice(INTENSITIES[third]),
        family=family,
        act=act,
        typing=_weighted(rules.typing or orders().typing, orders().typing, rng, is_even=bool(rules.typing))
        if orders().acts[act].has_words
        else "",
        summary=summary,
        length=ReplyLength.LONG if rules.is_danger else rng.choices(list(_LENGTHS), list(_LENGTHS.values()))[0],
        has_comma=rng.random() < _COMMA_RATE,
        has_laughter=not rules.topics and feeling in _LAUGHING and rng.random() < _LAUGHTER_RATE * len(Feeling) / len(_LAUGHING),
        emoji=emoji,
        asks_back=rng.random() < QUESTION_RATE,
    )


def _weighted(names: Collection[str], entries: Mapping[str, Habit], rng: random.Random, *, is_even: bool) -> str:
    """Return one of `names`, by the weights of their entries, or each as likely as the others."""
    return rng.choices(list(names), [1 if is_even else entries[name].weight for name in names])[0]
