"""Column names and labels of spreadsheets and chat exports, in English and Korean, and what they mean in a training record."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Mapping
from enum import StrEnum
from typing import Final, TypeVar

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
_Value = TypeVar("_Value", bound=Feeling | Expression)
_COLUMNS: Final = {name: column for column, names in _NAMES.items() for name in names.split()}

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


def _labels(vocabulary: Iterable[_Value]) -> dict[str, _Value]:
    return {_key(label): word for word in vocabulary for label in (str(word), word.gloss, *word.aliases)}


_FEELING_LABELS: Final = _labels(Feeling)
_FACE_LABELS: Final = _labels(Expression)


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
