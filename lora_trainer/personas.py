"""The four friends and the two closed vocabularies. SDS.md lists them; a test compares the two."""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum
from functools import cache
from importlib import resources
from typing import Annotated, Final, Self

import yaml
from pydantic import BaseModel, ConfigDict, Field, model_validator

from lora_trainer.emoji import is_emoji


class BloodType(StrEnum):
    """The persona's name everywhere: configuration, keys in storage, labels in the cluster."""

    A = "A"
    B = "B"
    O = "O"  # noqa: E741  (the blood type's own name)
    AB = "AB"


def named_blood_types(value: object) -> tuple[BloodType, ...]:
    """`A`, `A,B`, `all` or a list of names, in the order given and each once. Raises `ValueError`."""
    names = value.split(",") if isinstance(value, str) else value
    if not isinstance(names, list | tuple) or not names:
        raise ValueError(f"got {value!r:.100}; {_EXPECTED}")
    known: dict[str, tuple[BloodType, ...]] = {str(blood_type): (blood_type,) for blood_type in BloodType}
    if len(names) == 1:
        known["ALL"] = tuple(BloodType)
    found = [known.get(name.strip().upper(), ()) if isinstance(name, str) else () for name in names]
    if unknown := [name for name, blood_types in zip(names, found, strict=True) if not blood_types]:
        raise ValueError(f"got {', '.join(f'{name!r:.50}' for name in unknown[:5])}; {_EXPECTED}")
    return tuple(dict.fromkeys(blood_type for blood_types in found for blood_type in blood_types))


_EXPECTED: Final = "expected A, B, O or AB, several as A,B, or all"


class Feeling(StrEnum):
    """`current_emotion.type`: what the AI feels while it answers."""

    NEUTRAL = "neutral"
    HAPPY = "happy"
    EXCITED = "excited"
    LOVE = "love"
    SURPRISED = "surprised"
    WORRIED = "worried"
    SAD = "sad"
    ANGRY = "angry"
    EMBARRASSED = "embarrassed"
    TIRED = "tired"


class Expression(StrEnum):
    """`emotion` of a reply: what the AI's face shows while it says `text`."""

    NEUTRAL = "neutral"
    SMILE = "smile"
    LAUGH = "laugh"
    LOVE = "love"
    WINK = "wink"
    PROUD = "proud"
    SURPRISE = "surprise"
    THINK = "think"
    WORRY = "worry"
    SAD = "sad"
    CRY = "cry"
    ANGRY = "angry"
    POUT = "pout"
    SHY = "shy"
    SLEEPY = "sleepy"


class IntensityThird(StrEnum):
    """How strongly the AI feels, as coarsely as a person would say it."""

    LOW = "low"
    MIDDLE = "middle"
    HIGH = "high"

    @classmethod
    def of(cls, intensity: float) -> IntensityThird:
        """The third that an intensity in [0, 1] belongs to: below 0.34, up to 0.67, and from 0.67 on."""
        if intensity < LOW_INTENSITY_BELOW:
            return cls.LOW
        return cls.MIDDLE if intensity < HIGH_INTENSITY_FROM else cls.HIGH


LOW_INTENSITY_BELOW: Final = 0.34
HIGH_INTENSITY_FROM: Final = 0.67

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

    The texts are Korean and speak to a writer, human or model; `lora_trainer/persona_specs/<blood type>.yaml` holds them.
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
    """The specification that ships as `persona_specs/<blood type>.yaml`."""
    text = resources.files("lora_trainer").joinpath(f"persona_specs/{blood_type}.yaml").read_text(encoding="utf-8")
    return PersonaSpec.model_validate(yaml.safe_load(text))
