"""The grammar for composing dialogues: scenes with user inputs and each persona's replies.

The scenes are in `scenes/*.yaml`, the reactions that may start a reply in `reactions.yaml`. Loading validates everything and
reports unknown slots, particles and feelings with file and scene.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from importlib import resources
from typing import Annotated, Any, Final, Self

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from lora_trainer.data.korean import PARTICLES, with_particle
from lora_trainer.errors import InvariantError
from lora_trainer.persona.emoji import is_emoji
from lora_trainer.persona.vocabulary import BloodType, Expression, Feeling, IntensityThird

_Text = Annotated[str, Field(min_length=1)]
SlotValue = str | Mapping[str, str]
"""A noun, or a mapping of related values (`{pet.name}`, `{pet.does}`)."""

_PLACEHOLDER: Final = re.compile(r"\{([^{}]*)\}")
_PLACEHOLDER_PARTS: Final = re.compile(r"([a-z_]+)(?:\.([a-z_]+))?(?::([가-힣]+))?")


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Take(_Part):
    """One way for a persona to respond to a scene. Every sentence in `say` goes with every question in `ask`."""

    feelings: Annotated[Mapping[Feeling, Expression], Field(min_length=1)]
    """Feelings that this take fits, and the emotion that the persona shows for each."""
    at: tuple[IntensityThird, ...] = tuple(IntensityThird)
    """Intensities that the take fits."""
    say: Annotated[tuple[_Text, ...], Field(min_length=2)]
    """Sentences without closing punctuation."""
    ask: Annotated[tuple[_Text, ...], Field(min_length=2)]
    """Questions, each of which can follow any sentence in `say`."""


class Scene(_Part):
    """A situation with slots and the takes of the four personas."""

    scene: Annotated[str, Field(pattern=r"^[a-z0-9_]+$")]
    family: Annotated[str, Field(pattern=r"^[a-z_]+$")]
    is_grave: bool = Field(default=False, alias="grave")
    """Whether the topic is serious: replies have at most one emoji, and sentences end in a full stop."""
    emoji: tuple[str, ...] = ()
    """Emoji that fit the topic."""
    slots: Mapping[str, Annotated[tuple[SlotValue, ...], Field(min_length=2)]] = {}
    summaries: Annotated[tuple[str, ...], Field(min_length=1)]
    inputs: Annotated[tuple[_Text, ...], Field(min_length=4)]
    takes: Mapping[BloodType, Annotated[tuple[Take, ...], Field(min_length=2)]]

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        problems = [f"takes: {name} is missing" for name in BloodType if name not in self.takes]
        problems += [f"emoji: {sign!r} is not one emoji" for sign in self.emoji if not is_emoji(sign)]
        for where, text in self._texts():
            problems += [f"{where}: {problem}" for problem in _placeholder_problems(text, self.slots)]
        if problems:
            raise ValueError("; ".join(problems))
        return self

    def _texts(self) -> Iterator[tuple[str, str]]:
        yield from ((f"summaries: {text}", text) for text in self.summaries)
        yield from ((f"inputs: {text}", text) for text in self.inputs)
        for name, takes in self.takes.items():
            for take in takes:
                yield from ((f"{name}: {text}", text) for text in (*take.say, *take.ask))


class SceneFile(_Part):
    """One file of `scenes/`."""

    scenes: tuple[Scene, ...]


Reactions = Mapping[BloodType, Mapping[Feeling, Mapping[IntensityThird, tuple[str, ...]]]]


def fill(text: str, values: Mapping[str, SlotValue]) -> str:
    """Fill the placeholders of `text`: `{food}`, `{pet.name}`, or `{food:을}` with a particle that agrees with the noun."""

    def one(found: re.Match[str]) -> str:
        slot, attribute, particle = _placeholder_parts(found)
        value = values[slot]
        noun = value if isinstance(value, str) else value[attribute or ""]
        return with_particle(noun, particle) if particle else noun

    return _PLACEHOLDER.sub(one, text)


def _placeholder_parts(placeholder: re.Match[str]) -> tuple[str, str | None, str | None]:
    """Split a validated placeholder into slot, attribute and particle."""
    slot, _, particle = placeholder[1].partition(":")
    slot, _, attribute = slot.partition(".")
    return slot, attribute or None, particle or None


def _placeholder_problems(text: str, slots: Mapping[str, Sequence[SlotValue]]) -> Iterator[str]:
    for found in _PLACEHOLDER.finditer(text):
        if not _PLACEHOLDER_PARTS.fullmatch(found[1]):
            yield f"{found[0]}: expected {{slot}}, {{slot.name}} or {{slot:particle}}"
            continue
        slot, attribute, particle = _placeholder_parts(found)
        if slot not in slots:
            yield f"{found[0]}: unknown slot; expected one of: {', '.join(slots) or 'none'}"
            continue
        for value in slots[slot]:
            names = set(value) if isinstance(value, Mapping) else {None}
            if attribute not in names:
                yield f"{found[0]}: missing in some values of {slot}"
                break
        if particle and particle not in PARTICLES:
            yield f"{found[0]}: unknown particle; use the form after a consonant: {', '.join(sorted(PARTICLES))}"


def parse_scenes(text: str, name: str) -> tuple[Scene, ...]:
    """Parse the scenes of one YAML document called `name`. Raises `ValueError` with one line per problem."""
    try:
        document: Any = yaml.safe_load(text)
        return SceneFile.model_validate(document).scenes
    except yaml.YAMLError as error:
        raise ValueError(f"{name}: {error}") from None
    except ValidationError as error:
        raise ValueError("\n".join(_located(document, name, problem) for problem in error.errors())) from None


def _located(document: Any, name: str, problem: Any) -> str:
    where = list(problem["loc"])
    if len(where) > 1 and where[0] == "scenes" and isinstance(where[1], int):
        where[:2] = [document["scenes"][where[1]].get("scene", where[1])]
    return f"{name}: {'.'.join(map(str, where))}: {problem['msg']}"


@cache
def load_scenes() -> tuple[Scene, ...]:
    """Load all scenes that ship with the package, in a fixed order."""
    folder = resources.files("lora_trainer.generator").joinpath("scenes")
    files = sorted((file for file in folder.iterdir() if file.name.endswith(".yaml")), key=lambda file: file.name)
    scenes = tuple(scene for file in files for scene in parse_scenes(file.read_text(encoding="utf-8"), file.name))
    names = [scene.scene for scene in scenes]
    if duplicates := {name for name in names if names.count(name) > 1}:
        raise InvariantError(f"duplicate scene names: {', '.join(sorted(duplicates))}")
    return scenes


@cache
def load_reactions() -> Reactions:
    """Load the reactions that may start a reply, by persona, feeling and intensity."""
    text = resources.files("lora_trainer.generator").joinpath("reactions.yaml").read_text(encoding="utf-8")
    document = yaml.safe_load(text)
    return {
        BloodType(name): {
            Feeling(feeling): {IntensityThird(third): tuple(texts) for third, texts in by_third.items()}
            for feeling, by_third in by_feeling.items()
        }
        for name, by_feeling in document.items()
    }
