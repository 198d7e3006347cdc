"""The four friends and the two closed vocabularies. SDS.md lists them; a test compares the two."""

from __future__ import annotations

from enum import StrEnum
from functools import cache
from importlib import resources

import yaml
from pydantic import BaseModel, ConfigDict, Field


class BloodType(StrEnum):
    """The persona's name everywhere: configuration, keys in storage, labels in the cluster."""

    A = "A"
    B = "B"
    O = "O"  # noqa: E741  (the blood type's own name)
    AB = "AB"


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


class PersonaSpec(BaseModel):
    """Who a persona is, as far as training and serving have to know."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    blood_type: BloodType
    name: str = Field(description="One Korean word for the persona's manner.")
    instruction: str = Field(min_length=1, description="The line every record of this persona begins with.")
    tone: str = Field(min_length=1, description="How it talks, for authors and for the model card.")


@cache
def persona_spec(blood_type: BloodType) -> PersonaSpec:
    """The specification that ships as `persona_specs/<blood type>.yaml`."""
    text = resources.files("lora_trainer").joinpath(f"persona_specs/{blood_type}.yaml").read_text(encoding="utf-8")
    return PersonaSpec.model_validate(yaml.safe_load(text))
