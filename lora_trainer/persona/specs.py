"""Persona specifications: one YAML file per persona, validated when it is loaded."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from enum import StrEnum
from functools import cache
from importlib import resources
from typing import Annotated, Any, Self, TypeVar

import yaml
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator
from pydantic_core import PydanticCustomError

from lora_trainer.errors import ConfigError
from lora_trainer.messages import Message
from lora_trainer.persona.emoji import is_emoji
from lora_trainer.persona.vocabulary import BloodType, Feeling, IntensityThird

_Text = Annotated[str, Field(min_length=1)]
_Texts = Annotated[tuple[_Text, ...], Field(min_length=3)]
_Value = TypeVar("_Value")


def _has_every(vocabulary: type[StrEnum]) -> AfterValidator:
    def check(found: Mapping[Any, _Value]) -> Mapping[Any, _Value]:
        if missing := [str(word) for word in vocabulary if word not in found]:
            raise PydanticCustomError("lacks_words", "missing words", {"words": missing})
        return found

    return AfterValidator(check)


_every_feeling = _has_every(Feeling)
_every_third = _has_every(IntensityThird)


class _Spec(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class EmojiRule(_Spec):
    """The emoji that a persona uses, and their number per reply."""

    by_feeling: Annotated[Mapping[Feeling, Annotated[tuple[str, ...], Field(min_length=2)]], _every_feeling] = Field(
        description="The persona's emoji for each feeling. A reply may add others that fit the situation (a cake, a dog)."
    )
    most: Annotated[Mapping[IntensityThird, Annotated[int, Field(ge=0, le=6)]], _every_third] = Field(
        description="Most emoji in one reply; the linter warns above this. A reply without emoji is fine at any intensity."
    )
    usual: Annotated[Mapping[IntensityThird, tuple[int, int]], _every_third] = Field(
        description="Fewest and most emoji in a typical reply."
    )

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        problems = [
            f"by_feeling.{feeling}: {text!r} is not one emoji"
            for feeling, texts in self.by_feeling.items()
            for text in texts
            if not is_emoji(text)
        ]
        problems += [
            f"usual.{third}: expected 0 <= fewest <= most <= {self.most[third]}, got {self.usual[third]}"
            for third in IntensityThird
            if not 0 <= self.usual[third][0] <= self.usual[third][1] <= self.most[third]
        ]
        if problems:
            raise ValueError("\n".join(problems))
        return self


class PersonaSpec(_Spec):
    """The character of one persona, as authors, the generator, the linter and the model card use it.

    The texts in `lora_trainer/persona/definitions/<blood type>.yaml` are Korean and address the writer, human or model.
    """

    blood_type: BloodType
    name: _Text = Field(description="One Korean word for the persona's character.")
    instruction: _Text = Field(description="The `instruction` of every record of this persona.")
    tone: _Text = Field(description="How the persona talks.")
    reactions: _Texts = Field(description="Its typical first words.")
    phrases: _Texts = Field(description="Its characteristic endings, words and phrases.")
    asking_back: _Text = Field(description="How it asks questions back.")
    asks: _Texts = Field(description="Questions in a wording that only this persona uses.")
    feelings: Annotated[Mapping[Feeling, _Text], _every_feeling] = Field(description="How it expresses each feeling.")
    emoji: EmojiRule
    never: _Texts = Field(description="What it never does.")
    examples: _Texts = Field(description="Replies that no other persona would give.")


def parse_spec(text: str, name: str) -> PersonaSpec:
    """Parse the YAML `text` of the specification `name`. Raises `ConfigError` with one line per problem."""
    try:
        return PersonaSpec.model_validate(yaml.safe_load(text))
    except yaml.YAMLError as error:
        raise ConfigError(f"{name}: not YAML: {' '.join(str(error).split())}") from None
    except ValidationError as error:
        lines = [line for problem in error.errors() for line in _described(problem)]
        raise ConfigError([Message("{name}: {line}", name=name, line=line) for line in lines]) from None


def _described(problem: Any) -> Iterator[str]:
    # pydantic adds [key] to the place of a key that is not in the vocabulary
    place = ".".join(str(part) for part in problem["loc"] if part != "[key]")
    where = f"{place}: " if place else ""
    if problem["type"] == "lacks_words":
        yield from (Message("{where}missing {word}", where=where, word=word) for word in problem["ctx"]["words"])
    elif problem["type"] == "missing":
        yield Message("{where}missing key", where=where)
    elif problem["type"] == "extra_forbidden":
        yield Message("{where}unknown key", where=where)
    elif problem["type"] == "value_error":
        yield from (f"{where}{line}" for line in str(problem["ctx"]["error"]).splitlines())
    else:
        yield f"{where}got {problem['input']!r:.100}; {problem['msg'][:1].lower()}{problem['msg'][1:]}"


@cache
def persona_spec(blood_type: BloodType) -> PersonaSpec:
    """Return the specification in the package's `definitions/<blood type>.yaml`.

    Raises `ConfigError` with the problems of all four specifications if this one is incomplete or invalid, as it is after a value
    was added to a vocabulary.
    """
    try:
        return _read_spec(blood_type)
    except ConfigError:
        problems: list[str] = []
        for each in BloodType:
            try:
                _read_spec(each)
            except ConfigError as error:
                problems += error.problems
        advice = Message(
            "incomplete personas: complete these files (CONTRIBUTING.md); "
            "python tools/vocabulary.py lists everything that a value of a vocabulary needs"
        )
        raise ConfigError([*problems, advice]) from None


def _read_spec(blood_type: BloodType) -> PersonaSpec:
    name = f"definitions/{blood_type}.yaml"
    try:
        text = resources.files("lora_trainer.persona").joinpath(name).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"lora_trainer/persona/{name}: cannot be read: {error}") from None
    return parse_spec(text, f"lora_trainer/persona/{name}")
