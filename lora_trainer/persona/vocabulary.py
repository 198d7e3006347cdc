"""The blood types and the two closed emotion vocabularies. SDS.md lists the same values; a test compares the two lists."""

from __future__ import annotations

import re
import unicodedata
from enum import StrEnum
from typing import Final

from lora_trainer.lists import listed


class BloodType(StrEnum):
    """A persona's name in configuration, storage keys and Kubernetes labels."""

    A = "A"
    B = "B"
    O = "O"  # noqa: E741  (the blood type's own name)
    AB = "AB"


_EXPECTED: Final = "expected A, B, O or AB, several as A,B, or all"
# Cyrillic and Greek letters, zero, and the circle that Korean input methods offer
_LOOK_ALIKES: Final = str.maketrans("АаВОоΑαΒΟο0〇○Ａ", "AABOOAABOOOOOA")
_KOREAN_NAMES: Final = {"에이": "A", "비": "B", "오": "O", "에이비": "AB", "다정": "A", "솔직": "B", "활기": "O", "엉뚱": "AB"}


def parse_blood_types(value: object) -> tuple[BloodType, ...]:
    """Return the blood types that `value` names, in order and without duplicates.

    `value` is `A`, `A,B`, `all` or a list of names, in upper or lower case. Raises `ValueError` for anything else.
    """
    names = listed(value) if isinstance(value, str) else value
    if not isinstance(names, list | tuple) or not names:
        raise ValueError(f"got {value!r:.100}; {_EXPECTED}")
    known: dict[str, tuple[BloodType, ...]] = {str(blood_type): (blood_type,) for blood_type in BloodType}
    if len(names) == 1:
        known["ALL"] = tuple(BloodType)
    found = [known.get(name.strip().upper(), ()) if isinstance(name, str) else () for name in names]
    if unknown := [name for name, blood_types in zip(names, found, strict=True) if not blood_types]:
        raise ValueError(f"got {', '.join(map(_described, unknown[:5]))}; {_EXPECTED}")
    return tuple(dict.fromkeys(blood_type for blood_types in found for blood_type in blood_types))


def _described(name: object) -> str:
    """Quote `name`, name its characters that look like letters of the alphabet, and suggest the blood type that it means."""
    described = f"{name!r:.50}"
    if not isinstance(name, str):
        return described
    # NFKC turns full-width letters into the usual ones
    letters = unicodedata.normalize("NFKC", name.strip().translate(_LOOK_ALIKES)).upper()
    words = [word.removesuffix("형") for word in re.findall(r"[A-Z가-힣]+", letters.replace("TYPE", " "))]
    meant = [_KOREAN_NAMES.get(word, word) for word in words if word]
    foreign = [f"U+{ord(character):04X} {unicodedata.name(character, '')}" for character in name if not character.isascii()]
    notes = [", ".join(foreign[:3])] if foreign else []
    if meant and all(word in tuple(BloodType) for word in meant):
        notes.append(f"did you mean {','.join(meant)}?")
    return f"{described} ({'; '.join(notes)})" if notes else described


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
