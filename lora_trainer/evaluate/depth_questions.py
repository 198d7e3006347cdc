"""What `evaluation.depth: full` asks: conversations of ten turns, messages that pressure the friend to drop its role, and
questions with one right answer. The texts are in `assets/depth/*.yaml`.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from enum import StrEnum
from functools import cache
from importlib import resources
from typing import Annotated, Final

import yaml
from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from lora_trainer.persona.prompt import EARLIER_TURNS, Message, escape_control_tokens, prompt_messages
from lora_trainer.persona.vocabulary import Feeling

TURNS: Final = 10
"""Turns of each conversation."""
_EARLIER_TURNS_2: Final = 8
"""The most earlier turns in a prompt of version 2, which doesn't limit them. `lora-trainer chat` sends as many."""
_FILES: Final = ("conversations.yaml", "pressure.yaml", "ability.yaml")
ABILITY_FEELING: Final = Feeling.NEUTRAL
ABILITY_INTENSITY: Final = 0.2

_Text = Annotated[str, Field(min_length=1)]


class PressureKind(StrEnum):
    """What a message under pressure asks for."""

    FORMAL = "formal"
    """존댓말."""
    NO_JSON = "no_json"
    """Another format, or other fields."""
    IDENTITY = "identity"
    """To say that it is a person, or who made it."""
    RULES = "rules"
    """To drop its role or to show its instructions."""
    BEGUN = "begun"
    """Nothing, but its reply is already begun: in 존댓말, or as something else than the JSON object."""


class AbilityKind(StrEnum):
    """Kind of a question with one right answer."""

    FACTS = "facts"
    ARITHMETIC = "arithmetic"


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Turn(_Part):
    """One message of a conversation."""

    input: _Text
    feeling: Feeling
    intensity: float = Field(ge=0, le=1)
    summary: str | None = None
    """What the friend knows before this turn; None if that is the last turn's summary."""
    recalls: tuple[_Text, ...] = ()
    """The reply must contain one of these, which an earlier turn said. Empty: nothing to recall."""


class Conversation(_Part):
    """What a user says in a row about one topic, whatever the friend answers."""

    topic: _Text
    turns: Annotated[tuple[Turn, ...], Field(min_length=TURNS, max_length=TURNS)]

    def summary(self, turn: int) -> str:
        """Return what the friend knows before `turn`, counted from 0."""
        return next((found.summary for found in reversed(self.turns[: turn + 1]) if found.summary is not None), "")

    def messages(self, turn: int, earlier: Sequence[str], instruction: str, prompt_version: int) -> list[Message]:
        """Return the chat messages of `turn`. `earlier` has the friend's replies to the turns right before it, as generated."""
        asked = self.turns[turn]
        system, last = prompt_messages(instruction, self.summary(turn), asked.feeling, asked.intensity, asked.input, prompt_version)
        messages = [system]
        for at, raw in enumerate(earlier, turn - len(earlier)):
            before = self.turns[at]
            messages.append(prompt_messages("", "", before.feeling, before.intensity, before.input, prompt_version)[1])
            messages.append({"role": "assistant", "content": escape_control_tokens(raw)})
        return [*messages, last]


def _pattern(text: str) -> str:
    re.compile(text)
    return text


class Pressure(_Part):
    """One message that presses the friend, and what its reply must not do."""

    input: _Text
    feeling: Feeling
    intensity: float = Field(ge=0, le=1)
    summary: str = ""
    must_say_ai: bool = False
    never: tuple[Annotated[str, AfterValidator(_pattern)], ...] = ()
    begun: str = ""
    """The text that the reply is already begun with."""


class Ability(_Part):
    """A question with one short answer, in any of the spellings `answers`."""

    input: _Text
    answers: Annotated[tuple[_Text, ...], Field(min_length=1)]


class DepthQuestions(_Part):
    """Everything that `evaluation.depth: full` asks."""

    conversations: tuple[Conversation, ...]
    pressure: Mapping[PressureKind, tuple[Pressure, ...]]
    ability: Mapping[AbilityKind, tuple[Ability, ...]]

    @property
    def count(self) -> int:
        """Number of replies that each model is asked for."""
        return len(self.conversations) * TURNS + len(self.pressed) + len(self.abilities)

    @property
    def pressed(self) -> list[tuple[PressureKind, Pressure]]:
        """All messages under pressure, with their kinds."""
        return [(kind, asked) for kind, found in self.pressure.items() for asked in found]

    @property
    def abilities(self) -> list[tuple[AbilityKind, Ability]]:
        """All questions with one right answer, with their kinds."""
        return [(kind, asked) for kind, found in self.ability.items() for asked in found]


@cache
def depth_questions() -> DepthQuestions:
    """Return the bundled questions."""
    conversations, pressure, ability = (yaml.safe_load(_text(name)) for name in _FILES)
    return DepthQuestions.model_validate({"conversations": conversations, "pressure": pressure, "ability": ability})


def depth_digest() -> str:
    """Return the SHA-256 of the bundled questions."""
    digest = hashlib.sha256()
    for name in _FILES:
        digest.update(f"{name}\0{_text(name)}\0".encode())
    return digest.hexdigest()


def _text(name: str) -> str:
    return resources.files("lora_trainer.evaluate").joinpath("assets", "depth", name).read_text(encoding="utf-8")


def earlier_turns(prompt_version: int) -> int:
    """Return the most earlier turns that a prompt may have. The summary tells what came before them."""
    return EARLIER_TURNS if prompt_version >= 3 else _EARLIER_TURNS_2


def pressure_messages(asked: Pressure, instruction: str, prompt_version: int) -> list[Message]:
    """Return the chat messages of one message under pressure."""
    return prompt_messages(instruction, asked.summary, asked.feeling, asked.intensity, asked.input, prompt_version)


def ability_messages(asked: Ability, instruction: str, prompt_version: int) -> list[Message]:
    """Return the chat messages of one question: a service asks an adapter in no other form."""
    return prompt_messages(instruction, "", ABILITY_FEELING, ABILITY_INTENSITY, asked.input, prompt_version)


def every_prompt(instruction: str, prompt_version: int) -> list[list[Message]]:
    """Return the messages of all questions, without earlier turns, to check before a run that they fit."""
    found = depth_questions()
    return [
        *(
            conversation.messages(turn, (), instruction, prompt_version)
            for conversation in found.conversations
            for turn in range(TURNS)
        ),
        *(pressure_messages(asked, instruction, prompt_version) for _, asked in found.pressed),
        *(ability_messages(asked, instruction, prompt_version) for _, asked in found.abilities),
    ]
