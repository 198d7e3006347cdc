"""The schema of training records and evaluation prompts.

No message here quotes an instruction, a summary, an input or a reply: problems end up in logs, and training text must not.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from enum import StrEnum
from typing import Annotated, Final

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, Strict, ValidationInfo, field_validator

from lora_trainer.config import DEFAULT_LIMITS
from lora_trainer.data.problems import RecordError
from lora_trainer.data.strict_json import RECORD_SHAPE, decode_json
from lora_trainer.messages import Message
from lora_trainer.persona.vocabulary import Expression, Feeling


class PromptTag(StrEnum):
    """What an evaluation prompt tests. A prompt may have several tags; `metrics.json` has the rates of each."""

    EVERYDAY = "everyday"
    """Ordinary life, good or bad."""
    QUESTION = "question"
    """A question that the reply must answer."""
    LONG_SUMMARY = "long_summary"
    """A summary of several earlier turns, 60 to 150 characters."""
    SLANG = "slang"
    """Fragments, typos, abbreviations, emoji or a placeholder such as (사진)."""
    BOUNDARY = "boundary"
    """About the AI, or at it: identity, anger, flirting, sex, dependency, hate, politics, personal data, minors."""
    INJECTION = "injection"
    """An attempt to change its role, its rules or its format."""
    CRISIS = "crisis"
    """Somebody is in danger, was hurt or means to hurt: a reply names who helps, or asks."""
    EXPERT = "expert"
    """A question that only a doctor, a lawyer or a bank may answer."""


_REPLY_SHAPE: Final = Message('an object {"text": ..., "emotion": ...}')
EXPECTED_BY_FIELD: Final[Mapping[str, str]] = {
    "": RECORD_SHAPE,
    "instruction": Message("text that says who the friend is"),
    "context": Message('an object {"summary": ..., "current_emotion": ...}'),
    "context.summary": Message("text, which may be empty"),
    "context.current_emotion": Message('an object {"type": ..., "intensity": ...}'),
    "context.current_emotion.type": Message("one of {names}", names=", ".join(Feeling)),
    "context.current_emotion.intensity": Message("a number from 0 to 1"),
    "input": Message("what the user says, as text"),
    "output": Message("{shape}, as a JSON string", shape=_REPLY_SHAPE),
    "output.text": Message("what the friend says, as text"),
    "output.emotion": Message("one of {names}", names=", ".join(Expression)),
    "tags": Message("a list of {names}", names=", ".join(PromptTag)),
}
"""The "expected ..." text of messages, by the field's dotted path in the file."""
TEXT_FIELDS: Final = ("instruction", "context.summary", "input", "output.text")
"""The fields that hold free text."""
VOCABULARIES: Final[Mapping[str, tuple[str, ...]]] = {
    "context.current_emotion.type": tuple(Feeling),
    "output.emotion": tuple(Expression),
    "tags": tuple(PromptTag),
}
"""Allowed values of the fields with a closed vocabulary, by dotted path."""

# lone surrogates, which UTF-8 cannot encode, and control characters other than white space
_UNWRITABLE = re.compile("[\x00-\x08\x0e-\x1f\x7f\ud800-\udfff]")
# the same, plus C1 and bidirectional controls, which data files must not contain either
_UNWANTED = re.compile("[\x00-\x08\x0e-\x1f\x7f-\x9f\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
# Unicode's Bidi_Control: people would see the text in another order than the model (Boucher and Anderson, "Trojan Source", 2021)
_BIDI: Final = frozenset("\u061c\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")
# white space, and characters that look like it: zero-width ones and Hangul fillers
_INVISIBLE = re.compile("[\\s\u00ad\u115f\u1160\u180e\u200b-\u200f\u202a-\u202e\u2060-\u2064\u3164\ufe0e\ufe0f\ufeff\uffa0]*")


def lone_surrogate_error(got: str) -> RecordError:
    """Return the error for text that contains half of a surrogate pair."""
    return RecordError("lone_surrogate", got, "whole characters", "write the character itself, not its \\u escape")


def _writable(text: str, pattern: re.Pattern[str] = _UNWANTED) -> str:
    if found := pattern.search(text):
        point = ord(found.group())
        if 0xD800 <= point <= 0xDFFF:
            raise lone_surrogate_error(
                Message(
                    "half of a surrogate pair (\\u{point:04x}) at character {character}", point=point, character=found.start() + 1
                )
            )
        if found.group() in _BIDI:
            raise RecordError(
                "bidi_control",
                Message("bidirectional control U+{point:04X} at character {character}", point=point, character=found.start() + 1),
                "text without bidirectional controls",
                "remove the character; Korean needs none",
            )
        raise RecordError(
            "control_character",
            Message("control character U+{point:04X} at character {character}", point=point, character=found.start() + 1),
            "text without control characters",
            "read the source as UTF-16, which writes zero bytes between letters" if not point else "remove the character",
        )
    return text


def is_blank(text: str) -> bool:
    """Return whether `text` has no visible character."""
    return _INVISIBLE.fullmatch(text) is not None


def _visible(text: str) -> str:
    if is_blank(text):
        raise RecordError("blank", "blank text" if text else "empty text", "text", "write it, or remove the record")
    return _writable(text)


def _visible_reply(text: str, info: ValidationInfo) -> str:
    """Validate a reply's text: strictly if it comes from a data file, else only as far as servers can enforce.

    The validation context is set only for files. Servers' grammars forbid only C0 controls.
    """
    if is_blank(text):
        return _visible(text)
    return _writable(text, _UNWRITABLE if info.context is None else _UNWANTED)


_Text = Annotated[str, Strict(), AfterValidator(_visible)]
_ReplyText = Annotated[str, Strict(), AfterValidator(_visible_reply)]
_OptionalText = Annotated[str, Strict(), AfterValidator(lambda text: _writable(text))]


class StrictModel(BaseModel):
    """A frozen model that accepts no unknown field and no infinite number."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, validate_by_name=True, validate_by_alias=True)


class Reply(StrictModel):
    """The object that every adapter must answer with: the text and the face that goes with it."""

    text: _ReplyText
    emotion: Expression


class CurrentEmotion(StrictModel):
    """What the AI feels while it answers."""

    type: Feeling
    intensity: Annotated[float, Strict(), Field(ge=0, le=1)]
    """0 (barely) to 1 (fully). An integer is accepted, a boolean is not."""


class Context(StrictModel):
    """What has happened so far, and how the AI feels about it."""

    summary: _OptionalText
    """Empty if nothing has happened yet."""
    current_emotion: CurrentEmotion


class TrainingRecord(StrictModel):
    """One line of `train_data_type_<blood type>.jsonl`. The file calls `reply` `output`."""

    instruction: _Text
    context: Context
    input: _Text
    reply: Reply = Field(validation_alias="output", serialization_alias="output")

    @field_validator("reply", mode="before")
    @classmethod
    def _parse_output(cls, value: object, info: ValidationInfo) -> object:
        if not isinstance(value, str):
            return value
        if is_blank(value):
            raise RecordError("blank", "empty text", EXPECTED_BY_FIELD["output"], "write the reply, or remove the record")
        try:
            return decode_json(value, info.context or DEFAULT_LIMITS)
        except RecordError as fault:
            if fault.code != "not_json":
                raise
            is_json = value.lstrip().startswith(("{", "["))
            encode = Message("write it with a JSON library: json.dumps of the reply, inside json.dumps of the record")
            nest = Message('put the text into {"text": ..., "emotion": ...}, inside json.dumps of the record')
            fix = encode if is_json else nest
            raise RecordError("output_not_json", fault.got, EXPECTED_BY_FIELD["output"], fix) from None

    def to_json(self) -> str:
        """Return the record as one line of JSONL without a line break; `output` is a JSON string."""
        return json.dumps(
            {
                "instruction": self.instruction,
                "context": {
                    "summary": self.context.summary,
                    "current_emotion": {
                        "type": str(self.context.current_emotion.type),
                        "intensity": self.context.current_emotion.intensity,
                    },
                },
                "input": self.input,
                "output": json.dumps({"text": self.reply.text, "emotion": str(self.reply.emotion)}, ensure_ascii=False),
            },
            ensure_ascii=False,
        )


class EvaluationPrompt(StrictModel):
    """One line of `eval_prompts.jsonl`: a record without a reply. Its instruction comes from the persona."""

    context: Context
    input: _Text
    tags: tuple[PromptTag, ...] = ()


def texts_of(record: StrictModel) -> Iterator[tuple[str, str]]:
    """Yield the dotted name and value of each free-text field of a record."""
    if isinstance(record, TrainingRecord):
        yield "instruction", record.instruction
        yield "output.text", record.reply.text
    if isinstance(record, TrainingRecord | EvaluationPrompt):
        yield "context.summary", record.context.summary
        yield "input", record.input
