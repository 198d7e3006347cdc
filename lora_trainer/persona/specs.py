"""Persona specifications: one YAML file per persona, validated when it is loaded."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from importlib import resources
from typing import Annotated, Self

import yaml
from pydantic import BaseModel, ConfigDict, Field, model_validator

from lora_trainer.persona.emoji import is_emoji
from lora_trainer.persona.vocabulary import BloodType, Feeling, IntensityThird

_Text = Annotated[str, Field(min_length=1)]
_Texts = Annotated[tuple[_Text, ...], Field(min_length=3)]


class _Spec(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class EmojiRule(_Spec):
    """The emoji that a persona uses, and their number per reply."""

    by_feeling: Mapping[Feeling, Annotated[tuple[str, ...], Field(min_length=2)]] = Field(
        description="The persona's emoji for each feeling. A reply may add others that fit the situation (a cake, a dog)."
    )
    most: Mapping[IntensityThird, Annotated[int, Field(ge=0, le=6)]] = Field(
        description="Most emoji in one reply; the linter warns above this. A reply without emoji is fine at any intensity."
    )
    usual: Mapping[IntensityThird, tuple[int, int]] = Field(description="Fewest and most emoji in a typical reply.")

    @model_validator(mode="after")
    def _complete(self) -> Self:
        problems = [
            f"{name}: expected every one of {', '.join(expected)}"
            for name, expected in (("by_feeling", Feeling), ("most", IntensityThird), ("usual", IntensityThird))
            if set(getattr(self, name)) != set(expected)
        ]
        problems += [
            f"by_feeling: {text!r} is not one emoji" for texts in self.by_feeling.values() for text in texts if not is_emoji(text)
        ]
        if not problems:
            problems += [
                f"usual.{third}: expected 0 <= fewest <= most <= {self.most[third]}, got {self.usual[third]}"
                for third in IntensityThird
                if not 0 <= self.usual[third][0] <= self.usual[third][1] <= self.most[third]
            ]
        if problems:
            raise ValueError("; ".join(problems))
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
    feelings: Mapping[Feeling, _Text] = Field(description="How it expresses each feeling.")
    emoji: EmojiRule
    never: _Texts = Field(description="What it never does.")
    examples: _Texts = Field(description="Replies that no other persona would give.")

    @model_validator(mode="after")
    def _complete(self) -> Self:
        if missing := set(Feeling) - set(self.feelings):
            raise ValueError(f"feelings: missing {', '.join(sorted(missing))}; expected every one of {', '.join(Feeling)}")
        return self


@cache
def persona_spec(blood_type: BloodType) -> PersonaSpec:
    """Return the specification in the package's `definitions/<blood type>.yaml`."""
    text = resources.files("lora_trainer.persona").joinpath(f"definitions/{blood_type}.yaml").read_text(encoding="utf-8")
    return PersonaSpec.model_validate(yaml.safe_load(text))
