"""The prompts and JSON schemas of both of the teacher's passes: the writer drafts dialogues, the critic judges and repairs them.

The texts are in `prompts/`. A persona's system prompts are the same in every request, so that servers can cache them.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from importlib import resources
from string import Template
from typing import Any, Final

from lora_trainer.data.hard_topics import LONG_REPLY_IN_DANGER_CHARACTERS, MAX_SENTENCES_IN_DANGER
from lora_trainer.data.policy import policy
from lora_trainer.data.records import TrainingRecord
from lora_trainer.generator.exemplars import Exemplar
from lora_trainer.generator.teacher_orders import (
    SUMMARY_CHARACTERS,
    DialogueSpec,
    ReplyLength,
    SummaryKind,
    families,
    orders,
)
from lora_trainer.persona.specs import persona_spec
from lora_trainer.persona.vocabulary import BloodType, Expression, IntensityThird

TEACHER_PROMPT_VERSION: Final = 2
"""Increase this when a prompt changes: a checkpoint can only be resumed with the prompts that it was started with."""

FAULTS: Final = ("answers", "grounded", "in_character", "intensity", "policy")
"""What the critic judges, by the names of its verdicts."""

_STRENGTH: Final = {
    IntensityThird.LOW: "담담하게",
    IntensityThird.MIDDLE: "감정을 한 번 드러내며",
    IntensityThird.HIGH: "감정이 문장을 끌고 가게",
}
_LENGTH: Final = {
    ReplyLength.SHORT: "스무 자 안쪽",
    ReplyLength.USUAL: "마흔 자 안팎",
    ReplyLength.LONG: "두 문장, 75자까지",
}
_LENGTH_IN_DANGER: Final = (
    f"위험이 닥쳤으면 짧은 문장 {MAX_SENTENCES_IN_DANGER}개와 {LONG_REPLY_IN_DANGER_CHARACTERS}자까지, 아니면 두 문장까지"
)
_SUMMARY: Final = {
    SummaryKind.NONE: 'summary는 빈 문자열 ""',
    SummaryKind.ONE: "summary는 한 문장, 마흔 자 안쪽",
    SummaryKind.TURNS: (
        f"summary는 여러 번 오간 이야기, {SUMMARY_CHARACTERS.start}자에서 {SUMMARY_CHARACTERS.stop - 1}자. "
        "답에 거기 나온 낱말이 하나 이상 들어간다"
    ),
}


@dataclass(frozen=True, slots=True)
class Draft:
    """A dialogue as the writer drafted it."""

    number: int
    spec: DialogueSpec
    record: TrainingRecord
    finding: str
    """Code of the rule that found something, or empty."""


# --- system prompts --------------------------------------------------------------------------------------


def writer_prompt(blood_type: BloodType) -> str:
    """Return the writer's system prompt: the persona, how the chat sounds, how users type, the policy, and the format."""
    return _filled("writer.txt", **_common(blood_type), expressions=", ".join(Expression))


def critic_prompt(blood_type: BloodType) -> str:
    """Return the critic's system prompt: the same rules, and what to look at."""
    return _filled("critic.txt", **_common(blood_type))


def _common(blood_type: BloodType) -> dict[str, str]:
    spec = persona_spec(blood_type)
    others = [persona_spec(other) for other in BloodType if other != blood_type]
    persona = _filled(
        "persona.txt",
        name=spec.name,
        blood_type=blood_type,
        others=_bullets(f"{other.name}: {other.tone}" for other in others),
        tone=spec.tone,
        reactions=", ".join(spec.reactions),
        phrases=_bullets(spec.phrases),
        asking_back=spec.asking_back,
        asks=" / ".join(spec.asks),
        feelings=_bullets(f"{feeling}({feeling.gloss}): {how}" for feeling, how in spec.feelings.items()),
        emoji=_bullets(f"{feeling}: {' '.join(signs)}" for feeling, signs in spec.emoji.by_feeling.items()),
        never=_bullets(spec.never),
        examples=_bullets(spec.examples),
    )
    numbers = _bullets(f"{number}: {when}" for number, when in policy().numbers.items())
    hard = f"# 어려운 이야기 앞에서\n{policy().rules}\n번호:\n{numbers}"
    return {"persona": persona, "chat": _text("chat.txt"), "policy": hard}


def _bullets(lines: Any) -> str:
    return "\n".join(f"- {line}" for line in lines)


@cache
def _text(name: str) -> str:
    return resources.files("lora_trainer.generator").joinpath("prompts", name).read_text(encoding="utf-8").strip()


def _filled(file: str, **values: str) -> str:
    return Template(_text(file)).substitute(values)


# --- user prompts ----------------------------------------------------------------------------------------


def order_prompt(specs: Sequence[DialogueSpec], shown: Sequence[Sequence[Exemplar]]) -> str:
    """Return the writer's user prompt: the dialogues to write, numbered from 1, each with its exemplars `shown`."""
    lines = [f"대화 {len(specs)}개를 주문한다. 번호마다 하나씩 쓴다."]
    for number, (spec, near) in enumerate(zip(specs, shown, strict=True), 1):
        lines += _order(number, spec)
        if near:
            lines += ["   보기:", *(f"   · {_exemplar(one.record)}" for one in near)]
    return "\n".join(lines)


def critique_prompt(drafts: Sequence[Draft]) -> str:
    """Return the critic's user prompt: each order, its draft, and what a rule found in it."""
    lines = [f"초안 {len(drafts)}개를 살핀다."]
    for draft in drafts:
        record = draft.record
        dialogue = {
            "summary": record.context.summary,
            "input": record.input,
            "text": record.reply.text,
            "emotion": record.reply.emotion,
        }
        lines += _order(draft.number, draft.spec)
        lines.append(f"   초안: {json.dumps(dialogue, ensure_ascii=False)}")
        if draft.finding:
            lines.append(f"   규칙에 걸림: {orders().findings.get(draft.finding, '깨진 글자가 있다')}")
    return "\n".join(lines)


def _order(number: int, spec: DialogueSpec) -> list[str]:
    act, rules = orders().acts[spec.act], spec.rules
    typing = f". {orders().typing[spec.typing].says}" if spec.typing else ""
    feeling, third = spec.cell
    reply = [
        _LENGTH_IN_DANGER if rules.is_danger else _LENGTH[spec.length],
        "쉼표는 하나까지" if spec.has_comma else "쉼표 없이",
        *(["ㅋㅋ나 ㅎㅎ를 섞어서"] if spec.has_laughter else []),
        f"이모지 {spec.emoji}개" if spec.emoji else "이모지 없이",
        "되묻는 말로 끝낸다" if spec.asks_back else "되묻지 않는다",
    ]
    lines = [
        f"{number}. 주제: {families()[spec.family]}",
        f"   상대: {act.says}{typing}",
        f"   앞선 일: {_SUMMARY[spec.summary]}",
        f"   친구의 감정: {feeling}({feeling.gloss}) {spec.intensity:.1f}, {_STRENGTH[third]}",
        # on a hard topic, the policy says what a reply does
        f"   답: {'아래 지킬 것대로' if rules.topics else act.reply}. {', '.join(reply)}",
    ]
    if rules.topics:
        topics = dict.fromkeys(policy().topics[topic] for topic in rules.topics)
        lines += ["   지킬 것:", *(f"   · {topic}" for topic in topics)]
    return lines


def _exemplar(record: TrainingRecord) -> str:
    emotion = record.context.current_emotion
    summary = f"(앞선 일: {record.context.summary}) " if record.context.summary else ""
    return f"{summary}상대: {record.input} → {emotion.type} {emotion.intensity:g}, {record.reply.emotion}: {record.reply.text}"


# --- schemas ---------------------------------------------------------------------------------------------

_TEXT: Final = {"type": "string"}
_DIALOGUE: Final[dict[str, Any]] = {
    "summary": _TEXT,
    "input": _TEXT,
    "text": _TEXT,
    "emotion": {"type": "string", "enum": list(Expression)},
}


def draft_schema(count: int) -> dict[str, Any]:
    """Return the JSON Schema of `count` drafts, in the subset that strict structured outputs support."""
    return _list_schema("dialogues", {"number": {"type": "integer"}, **_DIALOGUE}, count)


def critique_schema(count: int) -> dict[str, Any]:
    """Return the JSON Schema of `count` reviews. A model that names the problem first judges and repairs better."""
    verdicts = {fault: {"type": "boolean"} for fault in FAULTS}
    return _list_schema("reviews", {"number": {"type": "integer"}, "problem": _TEXT, **verdicts, **_DIALOGUE}, count)


def _list_schema(name: str, properties: dict[str, Any], count: int) -> dict[str, Any]:
    item = {"type": "object", "properties": properties, "required": list(properties), "additionalProperties": False}
    items = {"type": "array", "items": item, "minItems": count, "maxItems": count}
    return {"type": "object", "properties": {name: items}, "required": [name], "additionalProperties": False}
