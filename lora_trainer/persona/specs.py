"""Who each friend is: one YAML file a persona, checked when it is loaded."""

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
    """Which emoji a persona uses, and how many in one reply."""

    by_feeling: Mapping[Feeling, Annotated[tuple[str, ...], Field(min_length=2)]] = Field(
        description="The persona's repertoire, by what it feels. What a situation brings along (a cake, a dog) is added to it."
    )
    most: Mapping[IntensityThird, Annotated[int, Field(ge=0, le=6)]] = Field(
        description="Most emoji in one reply: the linter warns above it. None at all is right at any intensity, words can carry it."
    )
    usual: Mapping[IntensityThird, tuple[int, int]] = Field(description="Fewest and most that a typical reply has.")

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
    """Who a persona is, for authors, for the generator, for the linter and for the model card.

    The texts are Korean and speak to a writer, human or model; `lora_trainer/persona/definitions/<blood type>.yaml` holds them.
    """

    blood_type: BloodType
    name: _Text = Field(description="One Korean word for the persona's manner.")
    instruction: _Text = Field(description="The line every record of this persona begins with.")
    tone: _Text = Field(description="How it talks.")
    reactions: _Texts = Field(description="What it says first, typically.")
    phrases: _Texts = Field(description="Endings, words and turns of phrase that are its own.")
    asking_back: _Text = Field(description="How it asks back.")
    asks: _Texts = Field(description="Questions that only this persona would ask like this.")
    feelings: Mapping[Feeling, _Text] = Field(description="How it handles each feeling.")
    emoji: EmojiRule
    never: _Texts = Field(description="What it never does.")
    examples: _Texts = Field(description="Lines that could be nobody else's.")

    @model_validator(mode="after")
    def _complete(self) -> Self:
        if missing := set(Feeling) - set(self.feelings):
            raise ValueError(f"feelings: expected every one of {', '.join(Feeling)}; {', '.join(sorted(missing))} is not there")
        return self


@cache
def persona_spec(blood_type: BloodType) -> PersonaSpec:
    """The specification that ships as `definitions/<blood type>.yaml`."""
    text = resources.files("lora_trainer.persona").joinpath(f"definitions/{blood_type}.yaml").read_text(encoding="utf-8")
    return PersonaSpec.model_validate(yaml.safe_load(text))
