"""The four friends and the two closed vocabularies. SDS.md lists them; a test compares the two."""

from __future__ import annotations

from enum import StrEnum
from typing import Final


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
