"""The blood types and the two closed emotion vocabularies. `tools/vocabulary.py` reports what a new value still needs elsewhere."""

from __future__ import annotations

import re
import unicodedata
from enum import StrEnum
from typing import Final, Self

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


class _Word(StrEnum):
    """A value of a vocabulary: the word in the data, its Korean gloss, and other labels that `convert` understands."""

    gloss: str
    aliases: tuple[str, ...]

    # `gloss` has a default because type checkers take a lookup by value, Feeling("happy"), for a call of this
    def __new__(cls, word: str, gloss: str = "", aliases: str = "") -> Self:
        member = str.__new__(cls, word)
        member._value_ = word
        member.gloss = gloss
        member.aliases = tuple(aliases.split())
        return member


class Feeling(_Word):
    """`current_emotion.type`: what the AI feels while it answers."""

    NEUTRAL = "neutral", "담담함", "담담 담담해 중립 무감정 무덤덤 무덤덤함 평온 평온함 평범 차분 차분함 덤덤 덤덤함 calm normal"
    HAPPY = "happy", "기쁨", "기뻐 기쁜 행복 행복함 행복해 즐거움 즐거워 happiness joy joyful glad pleased delighted cheerful"
    EXCITED = "excited", "신남", "신나 신나함 흥분 흥분됨 설렘 설레 들뜸 기대 기대감 excitement thrilled"
    LOVE = "love", "애정", "사랑 사랑함 사랑해 사랑스러움 loving affection"
    SURPRISED = "surprised", "놀람", "놀라움 놀라 깜짝놀람 surprise shocked astonished"
    WORRIED = (
        "worried",
        "걱정",
        "걱정됨 걱정돼 불안 불안함 염려 근심 초조 초조함 두려움 무서움 공포 worry fear anxiety anxious nervous concerned",
    )
    SAD = "sad", "슬픔", "슬퍼 슬픈 우울 우울함 서운함 속상함 외로움 실망 sadness unhappy depressed"
    ANGRY = "angry", "화", "화남 화나 분노 짜증 짜증남 anger mad furious annoyed"
    EMBARRASSED = (
        "embarrassed",
        "민망함",
        "민망 민망해 당황 당황함 당황스러움 당혹 부끄러움 창피 창피함 쑥스러움 embarrassment ashamed awkward flustered",
    )
    TIRED = "tired", "피곤함", "피곤 피곤해 지침 지쳐 피로 졸림 tiredness exhausted sleepy"


class Expression(_Word):
    """`emotion` of a reply: what the AI's face shows while it says `text`."""

    NEUTRAL = "neutral", "무표정", "담담함 담담한얼굴 중립"
    SMILE = "smile", "미소", "웃음 웃는얼굴 웃는 기쁨 smiling"
    LAUGH = "laugh", "활짝 웃음", "활짝웃는얼굴 큰웃음 폭소 laughing laughter"
    LOVE = "love", "사랑스러운 눈빛", "사랑 애정 하트 heart loving"
    WINK = "wink", "윙크", "winking"
    PROUD = "proud", "뿌듯한 얼굴", "뿌듯함 뿌듯 자랑스러움 pride"
    SURPRISE = "surprise", "놀란 얼굴", "놀람 놀라움 surprised shocked"
    THINK = "think", "생각하는 얼굴", "생각 생각중 고민 thinking thoughtful"
    WORRY = "worry", "걱정스러운 얼굴", "걱정 걱정하는얼굴 worried anxious"
    SAD = "sad", "슬픈 얼굴", "슬픔 슬퍼 sadness"
    CRY = "cry", "우는 얼굴", "울음 눈물 crying tears"
    ANGRY = "angry", "화난 얼굴", "화 화남 분노 anger mad"
    POUT = "pout", "삐친 얼굴", "삐침 삐짐 뾰로통 pouting sulky"
    SHY = "shy", "수줍은 얼굴", "수줍음 부끄러움 쑥스러움 blush blushing embarrassed"
    SLEEPY = "sleepy", "졸린 얼굴", "졸림 피곤함 tired yawn"


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
