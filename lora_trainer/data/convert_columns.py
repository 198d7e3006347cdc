"""Column names and labels of spreadsheets and chat exports, in English and Korean, and what they mean in a training record."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Mapping
from enum import StrEnum
from typing import Final

from lora_trainer.persona.vocabulary import BloodType, Expression, Feeling


class Column(StrEnum):
    """A field of a flat record. The values are the names that messages use."""

    INSTRUCTION = "instruction"
    BLOOD_TYPE = "blood type"
    SUMMARY = "summary"
    FEELING = "feeling"
    INTENSITY = "intensity"
    INPUT = "input"
    TEXT = "reply"
    FACE = "face"
    EMOTION = "emotion"
    """Named just `emotion`: the feeling, unless another column is; then the face."""


_NAMES: Final[Mapping[Column, str]] = {
    Column.INSTRUCTION: "instruction system systemprompt 지시 지시문 지시사항 명령 명령문 시스템 시스템프롬프트 시스템메시지",
    Column.BLOOD_TYPE: "bloodtype blood persona 혈액형 페르소나",
    Column.SUMMARY: "summary contextsummary context 요약 상황 상황요약 대화요약 맥락 배경 상황설명",
    Column.FEELING: "feeling currentemotion currentemotiontype contextcurrentemotiontype contextcurrentemotion emotiontype "
    "감정 현재감정 감정유형 감정종류 감정상태 감정타입 감정라벨 감정레이블 기분 느낌",
    Column.INTENSITY: "intensity currentemotionintensity contextcurrentemotionintensity emotionintensity strength "
    "강도 감정강도 감정의강도 감정세기 세기 감정정도 정도",
    Column.INPUT: "input prompt query question user userinput human usermessage 입력 사용자 사용자입력 사용자발화 사용자말 "
    "사용자메시지 사용자질문 질문 질의 유저 유저입력 발화 입력문 입력내용 입력텍스트",
    Column.TEXT: "output outputtext text reply response answer completion assistant bot replytext "
    "답변 응답 출력 대답 답 모델응답 모델답변 챗봇 챗봇응답 친구답변 출력문 답변내용 답변텍스트 응답텍스트 출력텍스트 대답텍스트",
    Column.FACE: "face expression outputemotion replyemotion outputface 표정 얼굴 얼굴표정 답변표정 응답표정 출력표정 출력감정 "
    "답변감정 응답감정",
    Column.EMOTION: "emotion",
}
PLACES: Final[Mapping[Column, str]] = {
    Column.INSTRUCTION: "instruction",
    Column.SUMMARY: "context.summary",
    Column.FEELING: "context.current_emotion.type",
    Column.INTENSITY: "context.current_emotion.intensity",
    Column.INPUT: "input",
    Column.TEXT: "output.text",
    Column.FACE: "output.emotion",
}
"""The field of a record that each column fills."""
_COLUMNS: Final = {name: column for column, names in _NAMES.items() for name in names.split()}

_FEELINGS: Final[Mapping[Feeling, str]] = {
    Feeling.NEUTRAL: "담담함 담담 담담해 중립 무감정 무덤덤 무덤덤함 평온 평온함 평범 차분 차분함 덤덤 덤덤함 calm normal",
    Feeling.HAPPY: "기쁨 기뻐 기쁜 행복 행복함 행복해 즐거움 즐거워 happiness joy joyful glad pleased delighted cheerful",
    Feeling.EXCITED: "신남 신나 신나함 흥분 흥분됨 설렘 설레 들뜸 기대 기대감 excitement thrilled",
    Feeling.LOVE: "애정 사랑 사랑함 사랑해 사랑스러움 loving affection",
    Feeling.SURPRISED: "놀람 놀라움 놀라 깜짝놀람 surprise shocked astonished",
    Feeling.WORRIED: "걱정 걱정됨 걱정돼 불안 불안함 염려 근심 초조 초조함 두려움 무서움 공포 worry fear anxiety "
    "anxious nervous concerned",
    Feeling.SAD: "슬픔 슬퍼 슬픈 우울 우울함 서운함 속상함 외로움 실망 sadness unhappy depressed",
    Feeling.ANGRY: "화 화남 화나 분노 짜증 짜증남 anger mad furious annoyed",
    Feeling.EMBARRASSED: "민망함 민망 민망해 당황 당황함 당황스러움 당혹 부끄러움 창피 창피함 쑥스러움 "
    "embarrassment ashamed awkward flustered",
    Feeling.TIRED: "피곤함 피곤 피곤해 지침 지쳐 피로 졸림 tiredness exhausted sleepy",
}
_FACES: Final[Mapping[Expression, str]] = {
    Expression.NEUTRAL: "무표정 담담함 담담한얼굴 중립",
    Expression.SMILE: "미소 웃음 웃는얼굴 웃는 기쁨 smiling",
    Expression.LAUGH: "활짝웃음 활짝웃는얼굴 큰웃음 폭소 laughing laughter",
    Expression.LOVE: "사랑스러운눈빛 사랑 애정 하트 heart loving",
    Expression.WINK: "윙크 winking",
    Expression.PROUD: "뿌듯한얼굴 뿌듯함 뿌듯 자랑스러움 pride",
    Expression.SURPRISE: "놀란얼굴 놀람 놀라움 surprised shocked",
    Expression.THINK: "생각하는얼굴 생각 생각중 고민 thinking thoughtful",
    Expression.WORRY: "걱정스러운얼굴 걱정 걱정하는얼굴 worried anxious",
    Expression.SAD: "슬픈얼굴 슬픔 슬퍼 sadness",
    Expression.CRY: "우는얼굴 울음 눈물 crying tears",
    Expression.ANGRY: "화난얼굴 화 화남 분노 anger mad",
    Expression.POUT: "삐친얼굴 삐침 삐짐 뾰로통 pouting sulky",
    Expression.SHY: "수줍은얼굴 수줍음 부끄러움 쑥스러움 blush blushing embarrassed",
    Expression.SLEEPY: "졸린얼굴 졸림 피곤함 tired yawn",
}
_FEELING_LABELS: Final = {name: feeling for feeling, names in _FEELINGS.items() for name in (str(feeling), *names.split())}
_FACE_LABELS: Final = {name: face for face, names in _FACES.items() for name in (str(face), *names.split())}
# the middle of each third of the range
_INTENSITY_LABELS: Final = {
    name: value
    for value, names in (
        (0.2, "약함 약 약하게 약한 낮음 하 조금 low weak"),
        (0.5, "보통 중간 중 중간정도 medium middle"),
        (0.8, "강함 강 강하게 강한 높음 상 많이 매우강함 high strong"),
    )
    for name in names.split()
}
_DECORATION: Final = re.compile(r"[\s_.\-·:/()\[\]]+")
_REMARK: Final = re.compile(r"[(\[（［][^)\]）］]*[)\]）］]")
_NUMBER: Final = re.compile(r"[+-]?\d{1,9}(?:[.,]\d{1,18})?")


def _key(name: str) -> str:
    return _DECORATION.sub("", unicodedata.normalize("NFKC", name)).casefold()


def column_of(name: object) -> Column | None:
    """Return the column that `name` means, whatever its case, spaces and punctuation, or None.

    A remark in brackets does not count: `감정 강도 (0~1)` is the intensity.
    """
    if not isinstance(name, str) or len(name) > 60:
        return None
    return _COLUMNS.get(_key(name)) or _COLUMNS.get(_key(_REMARK.sub("", name)))


def columns_of(names: Iterable[object]) -> list[Column | None]:
    """Return the column of each name; `emotion` becomes the feeling, or the face if another column is the feeling."""
    found = [column_of(name) for name in names]
    meant = Column.FACE if Column.FEELING in found else Column.FEELING
    return [meant if column is Column.EMOTION else column for column in found]


def feeling_of(label: str) -> Feeling | None:
    """Return the feeling that an English or Korean label means, or None."""
    return _FEELING_LABELS.get(_key(label))


def face_of(label: str) -> Expression | None:
    """Return the face that an English or Korean label means, or None."""
    return _FACE_LABELS.get(_key(label))


def blood_type_of(label: str) -> BloodType | None:
    """Return the blood type that a label such as `A`, `ab형` or `O형 (활기)` means, or None."""
    found = re.match(r"(AB|A|B|O)(?:형|型|type|-type)?(?![A-Za-z])", unicodedata.normalize("NFKC", label).strip().upper())
    return BloodType(found[1]) if found else None


def intensity_word(label: str) -> float | None:
    """Return the number for a word such as `강함`, or None."""
    return _INTENSITY_LABELS.get(_key(label))


def bare_number(value: object) -> float | None:
    """Return a number that is written without a percent sign, or None. A decimal comma is accepted."""
    if isinstance(value, bool):
        return None
    if isinstance(value, int | float):
        # a huge integer overflows a float
        return float(value) if abs(value) < 1e9 else None
    if isinstance(value, str) and _NUMBER.fullmatch(value.strip()):
        return float(value.strip().replace(",", "."))
    return None


def percentage(value: object) -> float | None:
    """Return the number before a percent sign, or None."""
    if isinstance(value, str) and (text := unicodedata.normalize("NFKC", value).strip()).endswith("%"):
        return bare_number(text[:-1])
    return None
