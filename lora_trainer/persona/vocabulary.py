"""The blood types and the two closed emotion vocabularies. SDS.md lists the same values; a test compares the two lists."""

from __future__ import annotations

from enum import StrEnum
from typing import Final


class BloodType(StrEnum):
    """A persona's name in configuration, storage keys and Kubernetes labels."""

    A = "A"
    B = "B"
    O = "O"  # noqa: E741  (the blood type's own name)
    AB = "AB"


_EXPECTED: Final = "expected A, B, O or AB, several as A,B, or all"


def parse_blood_types(value: object) -> tuple[BloodType, ...]:
    """Return the blood types that `value` names, in order and without duplicates.

    `value` is `A`, `A,B`, `all` or a list of names, in upper or lower case. Raises `ValueError` for anything else.
    """
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


LOW_INTENSITY_BELOW: Final = 0.34
HIGH_INTENSITY_FROM: Final = 0.67


class IntensityThird(StrEnum):
    """A third of the intensity range [0, 1]. Emoji rules and coverage are stated per third."""

    LOW = "low"
    MIDDLE = "middle"
    HIGH = "high"

    @classmethod
    def of(cls, intensity: float) -> IntensityThird:
        """Return the third that contains `intensity`: below 0.34, from 0.34 to below 0.67, or from 0.67 on."""
        if intensity < LOW_INTENSITY_BELOW:
            return cls.LOW
        return cls.MIDDLE if intensity < HIGH_INTENSITY_FROM else cls.HIGH
