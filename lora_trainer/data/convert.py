"""Turn records of other formats into the project's: chats, Alpaca, prompt and completion, spreadsheets, nested or flat JSON.

What a record lacks is taken from `Defaults` and never invented. No message quotes an instruction, a summary, an input or a reply.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from lora_trainer.config import DEFAULT_LIMITS, LimitsConfig
from lora_trainer.data.convert_columns import (
    PLACES,
    Column,
    bare_number,
    blood_type_of,
    columns_of,
    face_of,
    feeling_of,
    intensity_word,
    percentage,
)
from lora_trainer.data.convert_source import Item, python_as_json, read_source
from lora_trainer.data.file_layouts import Shape, item_shape
from lora_trainer.data.jsonl import parse_record
from lora_trainer.data.problems import ConversionError, Problem, RecordError, Severity
from lora_trainer.data.record_errors import described
from lora_trainer.data.records import EXPECTED_BY_FIELD, TrainingRecord
from lora_trainer.data.strict_json import decode_json, is_quotable
from lora_trainer.errors import DataError
from lora_trainer.messages import Message, marked
from lora_trainer.persona.prompt import OUTPUT_LINE
from lora_trainer.persona.specs import persona_spec
from lora_trainer.persona.vocabulary import BloodType, Expression, Feeling

INTENSITY_SCALES: Final = (1, 5, 10, 100)
"""What the strongest feeling may be written as."""

_SYSTEM, _USER, _ASSISTANT = "system", "user", "assistant"
_ROLES: Final = {
    role: meant
    for meant, roles in (
        (_SYSTEM, "system developer"),
        (_USER, "user human customer 사용자"),
        (_ASSISTANT, "assistant gpt model bot chatbot chatgpt ai 챗봇"),
    )
    for role in roles.split()
}
# the system message of this project's own prompt (persona/prompt.py): a word for the intensity, one decimal in version 2
_OWN_PROMPT: Final = re.compile(
    r"(?P<instruction>[^\n]+)\n(?:상황: (?P<summary>[^\n]*)\n)?"
    r"감정: (?P<feeling>[a-z]+) (?:(?P<intensity>[01]\.\d)|(?P<strength>약함|보통|강함))\n" + re.escape(OUTPUT_LINE)
)
_INTENSITY_OF: Final = {"약함": 0.2, "보통": 0.5, "강함": 0.8}
"""The middle of each word's third."""
_TABLE_NAMES: Final = frozenset(map(str, Column))
_FENCED: Final = re.compile(r"\s*```(?:json)?\s*(\{.*\})\s*```\s*", re.DOTALL)
_OPTIONS: Final[Mapping[Column, str]] = {
    Column.INSTRUCTION: Message("pass --blood-type or --instruction"),
    Column.FEELING: Message("name the feeling in the file, or pass --feeling for records without one"),
    Column.INTENSITY: Message("write it in the file, or pass --intensity for records without one"),
    Column.FACE: Message("name the face in the file, or pass --face for records without one"),
}


@dataclass(frozen=True, slots=True)
class Defaults:
    """What records that lack a value get, and how the file is read."""

    instruction: str | None = None
    blood_type: BloodType | None = None
    """Persona whose instruction is used, and whose records are taken if the file names several."""
    feeling: Feeling | None = None
    intensity: float | None = None
    face: Expression | None = None
    intensity_max: int | None = None
    """What the file writes for the strongest feeling; None to judge by its numbers."""
    split_turns: bool = False
    """Whether each answer of a longer conversation becomes a record."""
    sheet: str | None = None


@dataclass(slots=True)
class Conversion:
    """The result of converting one file."""

    records: list[TrainingRecord] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)
    """Errors, in file order; each record that could not be converted has at least one."""
    failed: int = 0
    """Number of records that could not be converted."""
    notes: list[str] = field(default_factory=list)

    def problem_lines(self, name: str) -> list[str]:
        """Return the problems as text; one that several lines share is one line of text."""
        same: dict[tuple[str, ...], list[Problem]] = {}
        for problem in self.problems:
            same.setdefault((problem.field, problem.code, problem.got, problem.fix), []).append(problem)
        return [line for problems in same.values() for line in _rendered(problems, name)]


@dataclass(slots=True)
class _Draft:
    """The raw values of one record, before defaults and labels are applied."""

    line: int
    values: dict[Column, Any]
    left_out: tuple[str, ...] = ()


def convert_file(path: Path, defaults: Defaults, limits: LimitsConfig = DEFAULT_LIMITS, *, name: str = "") -> Conversion:
    """Return the records of `path` in the project's format, and what could not be converted.

    `name` replaces the path in messages. Raises `DataError` for a file that holds no records at all, or cannot be read.
    """
    try:
        source = read_source(path, limits, defaults.sheet)
    except RecordError as fault:
        raise DataError(
            Problem(None, "", Severity.ERROR, fault.code, fault.got, fault.expected, fault.fix).render(name or path)
        ) from None
    except OSError as error:
        raise DataError(
            Message("{file}: got {reason}, expected a file that can be read", file=name or path, reason=error.strerror or error)
        ) from None
    conversion = Conversion(notes=source.notes)
    drafts: list[_Draft] = []
    for item in source.items:
        try:
            if isinstance(item.value, RecordError):
                raise item.value
            drafts.extend(_drafts(item, item.value, defaults, limits))
        except RecordError as fault:
            conversion.failed += 1
            conversion.problems.append(_problem(item.line, "", fault))
    _convert(drafts, conversion, defaults, limits)
    conversion.problems.sort(key=lambda problem: problem.line or 0)
    if not conversion.records and not conversion.problems:
        raise DataError(
            Message("{file}: got no records, expected at least one; check that it is the right file", file=name or path)
        )
    return conversion


def _convert(drafts: Sequence[_Draft], conversion: Conversion, defaults: Defaults, limits: LimitsConfig) -> None:
    intensities = _Intensities([draft.values.get(Column.INTENSITY) for draft in drafts], defaults)
    personas: Counter[BloodType] = Counter()
    left_out: Counter[str] = Counter()
    others = 0
    for draft in drafts:
        left_out.update(draft.left_out)
        try:
            persona = _persona(draft.values.get(Column.BLOOD_TYPE))
            if persona and defaults.blood_type and persona is not defaults.blood_type:
                others += 1
                continue
            problems, whole = _assembled(draft, persona, intensities, defaults)
        except RecordError as fault:
            problems, whole = [_problem(draft.line, str(Column.BLOOD_TYPE), fault)], {}
        if not problems:
            line = parse_record(json.dumps(whole), draft.line, limits)
            problems = [problem for problem in line.problems if problem.severity is Severity.ERROR]
            if line.record:
                conversion.records.append(line.record)
                personas.update([persona] if persona else [])
        conversion.failed += bool(problems)
        conversion.problems.extend(problems)
    conversion.notes.extend(intensities.notes())
    if others:
        conversion.notes.append(
            Message(
                "left out the records of other personas than {blood_type} ({others:,})",
                blood_type=defaults.blood_type,
                others=others,
            )
        )
    if len(personas) > 1:
        counts = ", ".join(f"{persona} {count:,}" for persona, count in sorted(personas.items()))
        conversion.notes.append(
            Message(
                "the file has records of several personas ({counts}): convert it once for each, with --blood-type", counts=counts
            )
        )
    if left_out:
        keys = ", ".join(f"'{key}'" if is_quotable(key) else f"one of {len(key)} characters" for key in list(left_out)[:10])
        conversion.notes.append(
            Message("left out keys that no record has: {keys}", keys=f"{keys}{', …' if len(left_out) > 10 else ''}")
        )


# --- from an object to the values of a record ------------------------------------------------------------


def _drafts(item: Item, value: Mapping[str, Any], defaults: Defaults, limits: LimitsConfig) -> Iterator[_Draft]:
    if _TABLE_NAMES.issuperset(value):
        yield _of_columns(item.line, value, limits)
        return
    shape = item_shape(value)
    if shape in (Shape.MESSAGES, Shape.BATCH, Shape.CONVERSATIONS, Shape.CONTENTS):
        yield from _of_chat(item.line, value, defaults, limits)
    elif shape is Shape.ALPACA:
        yield _Draft(item.line, _with_reply(_of_alpaca(value), limits))
    elif shape in (None, Shape.NO_INSTRUCTION) and isinstance(value.get("context"), dict):
        yield _of_nested(item.line, value, limits)
    elif shape in (None, Shape.FLAT, Shape.PAIRS):
        yield _of_columns(item.line, value, limits)
    else:
        raise ConversionError(
            "not_convertible",
            Message(str(shape)),
            "a question and its answer",
            "write the records in the format; docs/data-format.md describes it",
        )


def _of_nested(line: int, value: Mapping[str, Any], limits: LimitsConfig) -> _Draft:
    context = dict(value["context"])
    values = {Column.SUMMARY: context.pop("summary", "")}
    emotion = context.pop("current_emotion", None)
    if isinstance(emotion, dict):
        rest = {f"current_emotion.{key}": one for key, one in emotion.items() if key not in ("type", "intensity")}
        values |= {Column.FEELING: emotion.get("type"), Column.INTENSITY: emotion.get("intensity")}
    else:
        rest, values[Column.FEELING] = {}, emotion
    others = [key for key in value if key not in ("instruction", "context", "input", "output")]
    values |= {Column.INSTRUCTION: value.get("instruction"), Column.INPUT: value.get("input"), Column.TEXT: value.get("output")}
    return _Draft(line, _with_reply(_given(values), limits), (*others, *context, *rest))


def _of_columns(line: int, value: Mapping[str, Any], limits: LimitsConfig) -> _Draft:
    names = list(value)
    columns = columns_of(names)
    for column in set(columns) - {None}:
        if columns.count(column) > 1:
            raise ConversionError(
                "same_column",
                Message("{count} keys that mean {column}", count=columns.count(column), column=column),
                Message("one key for {column}", column=column),
                "rename or remove the others",
            )
    values: dict[Column, Any] = {column: value[name] for name, column in zip(names, columns, strict=True) if column}
    left_out = tuple(name for name, column in zip(names, columns, strict=True) if column is None)
    # a table may hold objects in its cells, as JSON or as Python writes them
    context = _object_in(values.get(Column.SUMMARY), limits)
    if context is None and (emotion := _object_in(values.get(Column.FEELING), limits)) is not None:
        context = {"summary": values.get(Column.SUMMARY), "current_emotion": emotion}
    if context is not None:
        nested = _of_nested(line, {"context": context}, limits)
        values = {key: one for key, one in values.items() if key not in (Column.SUMMARY, Column.FEELING)} | nested.values
        left_out += nested.left_out
    return _Draft(line, _with_reply(_given(values), limits), left_out)


def _of_alpaca(value: Mapping[str, Any]) -> dict[Column, Any]:
    if value.get("history"):
        raise ConversionError(
            "several_turns",
            "earlier turns in `history`",
            "one question and one answer",
            "summarize the earlier turns in a column `summary`",
        )
    values: dict[Column, Any] = {
        Column.INSTRUCTION: value["instruction"],
        Column.INPUT: value.get("input"),
        Column.TEXT: value["output"],
    }
    if system := value.get("system"):
        # as LLaMA-Factory reads it: the system prompt says who answers, instruction and input together are what the user says
        parts = [part for part in (value["instruction"], value.get("input")) if isinstance(part, str) and part.strip()]
        values |= {Column.INSTRUCTION: system, Column.INPUT: "\n".join(parts)}
    elif not value.get("input"):
        values |= {Column.INSTRUCTION: None, Column.INPUT: value["instruction"]}
    return _given(values)


def _of_chat(line: int, value: Mapping[str, Any], defaults: Defaults, limits: LimitsConfig) -> Iterator[_Draft]:
    turns = list(_turns(value))
    systems = [text for role, text in turns if role == _SYSTEM]
    talk = [(role, text) for role, text in turns if role != _SYSTEM]
    beside = {
        key: one
        for key, one in value.items()
        if key not in ("messages", "body", "conversations", "conversation", "contents", "context")
    }
    extra = _of_columns(line, beside, limits)
    values = extra.values
    if isinstance(value.get("context"), dict):
        values |= _of_nested(line, {"context": value["context"]}, limits).values
    if not systems and isinstance(values.get(Column.INSTRUCTION), str):
        systems = [values[Column.INSTRUCTION]]
    if own := _OWN_PROMPT.fullmatch(systems[0]) if len(systems) == 1 else None:
        values |= _given(
            {Column.INSTRUCTION: own["instruction"], Column.SUMMARY: own["summary"] or "", Column.FEELING: own["feeling"]}
        )
        values[Column.INTENSITY] = float(own["intensity"]) if own["intensity"] else _INTENSITY_OF[own["strength"]]
    elif systems:
        values[Column.INSTRUCTION] = "\n".join(systems)
    roles = [role for role, _ in talk]
    pairs = len(talk) // 2
    if not talk or roles != [_USER, _ASSISTANT] * pairs:
        raise ConversionError(
            "turns",
            Message("{count} turns that do not alternate", count=len(talk)),
            "a user's turn and an answer, by turns",
            "remove what has no counterpart",
        )
    if pairs > 1 and not defaults.split_turns:
        raise ConversionError(
            "several_turns",
            "a conversation of several answers",
            "one question and one answer",
            "summarize the earlier turns in `context`, or pass --split-turns to make a record of each answer alone",
        )
    for at in range(0, len(talk), 2):
        yield _Draft(line, _with_reply({**values, Column.INPUT: talk[at][1], Column.TEXT: talk[at + 1][1]}, limits), extra.left_out)


def _turns(value: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield role and text of each turn of a chat."""
    body = value["body"] if isinstance(value.get("body"), dict) else value
    turns = next((body[key] for key in ("messages", "conversations", "conversation", "contents") if key in body), None)
    for turn in turns if isinstance(turns, list) else [None]:
        if not isinstance(turn, dict):
            raise ConversionError(
                "turns",
                Message("{value} as a turn", value=described(turn)),
                "an object with role and content",
                "write each turn as an object",
            )
        role = turn.get("role", turn.get("from", turn.get("speaker")))
        known = _ROLES.get(role.strip().lower()) if isinstance(role, str) else None
        if known is None or turn.get("tool_calls") or turn.get("function_call"):
            raise ConversionError(
                "turns", "a turn of a tool or an unknown role", "system, user and assistant", "remove it, or name its role"
            )
        yield known, _turn_text(turn.get("content", turn.get("value", turn.get("parts", turn.get("text")))))


def _turn_text(content: object) -> str:
    if isinstance(content, str):
        return content
    if isinstance(content, dict):
        return json.dumps(content, ensure_ascii=False)
    texts = (
        [part if isinstance(part, str) else part.get("text") if isinstance(part, dict) else None for part in content]
        if isinstance(content, list)
        else []
    )
    if not texts or not all(isinstance(text, str) for text in texts):
        raise ConversionError("turns", "a turn whose content is not only text", "text", "remove images and other parts")
    return "\n".join(str(text) for text in texts)


def _with_reply(values: dict[Column, Any], limits: LimitsConfig) -> dict[Column, Any]:
    """Return `values` with text and face taken out of a reply that is an object or its JSON."""
    reply = values.get(Column.TEXT)
    if isinstance(reply, str) and (found := _FENCED.fullmatch(reply)):
        reply = found[1]
    reply = _object_in(reply, limits)
    if reply is None:
        return values
    if unknown := [key for key in reply if key not in ("text", "emotion")]:
        raise ConversionError(
            "unknown_field",
            Message("a reply with {count} other keys", count=len(unknown)),
            EXPECTED_BY_FIELD["output"],
            "remove or rename them",
        )
    if reply.get("text") is None:
        raise ConversionError(
            "missing_field", "a reply without text", EXPECTED_BY_FIELD["output"], "write it, or remove the record"
        )
    return values | _given({Column.TEXT: reply["text"], Column.FACE: reply.get("emotion")})


def _object_in(value: object, limits: LimitsConfig) -> dict[str, Any] | None:
    """Return an object, or the one that text in braces holds, or None for anything else. Raises `RecordError` for broken text."""
    if not (isinstance(value, str) and value.lstrip().startswith("{")):
        return value if isinstance(value, dict) else None
    text = python_as_json(value.strip()) if re.match(r"\s*\{\s*'", value) else value
    try:
        found = decode_json(text, limits)
    except RecordError as fault:
        raise ConversionError(
            "output_not_json", fault.got, "plain text, or a JSON object", "write it with json.dumps, or without the brace"
        ) from None
    return found if isinstance(found, dict) else None


def _given(values: dict[Column, Any]) -> dict[Column, Any]:
    """Return the values that are neither missing nor empty. pandas writes NaN for an empty cell."""
    return {
        column: value
        for column, value in values.items()
        if value is not None
        and not (isinstance(value, str) and not value.strip())
        and not (isinstance(value, float) and not math.isfinite(value))
    }


# --- from the values to a record -------------------------------------------------------------------------


def _persona(value: object) -> BloodType | None:
    if value is None:
        return None
    if isinstance(value, str) and (found := blood_type_of(value)):
        return found
    raise ConversionError("unknown_value", described(value), "A, B, O or AB", "write the blood type as one of them")


def _assembled(
    draft: _Draft, persona: BloodType | None, intensities: _Intensities, defaults: Defaults
) -> tuple[list[Problem], dict[str, Any]]:
    """Return what is wrong with the values, and the record as its file holds it."""
    values = dict(draft.values)
    persona = persona or defaults.blood_type
    own = persona_spec(persona).instruction if persona else None
    values.setdefault(Column.INSTRUCTION, defaults.instruction or own)
    for column, default in (
        (Column.FEELING, defaults.feeling),
        (Column.FACE, defaults.face),
        (Column.INTENSITY, defaults.intensity),
    ):
        values.setdefault(column, default)
    problems = []
    try:
        if Column.INTENSITY in draft.values:
            values[Column.INTENSITY] = intensities.number(values[Column.INTENSITY])
    except RecordError as fault:
        problems.append(_problem(draft.line, PLACES[Column.INTENSITY], fault))
    for column, name in PLACES.items():
        if column is not Column.SUMMARY and values.get(column) is None:
            fix = _OPTIONS.get(column, Message("add '{key}'", key=column))
            problems.append(_problem(draft.line, name, ConversionError("missing_field", "nothing", EXPECTED_BY_FIELD[name], fix)))
    if problems:
        return problems, {}
    feeling, face = values[Column.FEELING], values[Column.FACE]
    return [], {
        "instruction": values[Column.INSTRUCTION],
        "context": {
            "summary": values.get(Column.SUMMARY, ""),
            "current_emotion": {
                "type": (feeling_of(feeling) if isinstance(feeling, str) else None) or feeling,
                "intensity": values[Column.INTENSITY],
            },
        },
        "input": values[Column.INPUT],
        "output": {"text": values[Column.TEXT], "emotion": (face_of(face) if isinstance(face, str) else None) or face},
    }


class _Intensities:
    """Turn a file's intensities into numbers from 0 to 1. What a bare number means is judged over the whole file."""

    def __init__(self, values: Sequence[object], defaults: Defaults) -> None:
        bare = [number for value in values if (number := bare_number(value)) is not None]
        self._scale = defaults.intensity_max
        has_fractions = any(0 < number < 1 for number in bare)
        self._is_percent = any(10 < number <= 100 for number in bare) and not has_fractions
        # where others are 2 to 10, a 1 is the weakest feeling of an unknown scale, not the strongest
        self._is_unclear = any(1 < number <= 10 for number in bare) and not has_fractions
        self._words: Counter[tuple[str, float]] = Counter()
        self._percentages = 0

    def number(self, value: object) -> object:
        """Return the intensity. Raises `RecordError` for one whose meaning is not certain; leaves other types to the schema."""
        if (percent := percentage(value)) is not None:
            return round(percent / 100, 4)
        if (number := bare_number(value)) is not None:
            return self._scaled(number)
        if isinstance(value, str):
            if (found := intensity_word(value)) is not None:
                self._words[value.strip(), found] += 1
                return found
            raise ConversionError(
                "out_of_range", described(value), "a number from 0 to 1, a percentage, or 강함, 보통 or 약함", "write a number"
            )
        return value

    def _scaled(self, number: float) -> float:
        if self._scale:
            return round(number / self._scale, 4)
        if number < 0 or number > 100:
            raise ConversionError(
                "out_of_range", f"{number:g}", EXPECTED_BY_FIELD["context.current_emotion.intensity"], "use 0 (barely) to 1 (fully)"
            )
        if number > 10 or (number >= 1 and self._is_percent):
            self._percentages += 1
            return round(number / 100, 4)
        if number > 1 or (number == 1 and self._is_unclear):
            raise ConversionError(
                "unclear_scale",
                "a number from 1 to 10",
                "a number from 0 to 1",
                "say what the strongest feeling is written as: --intensity-max 5, 10 or 100",
            )
        return number

    def notes(self) -> list[str]:
        """Return how numbers and words were read, if not as they are."""
        notes: list[str] = []
        if self._percentages:
            notes.append(
                Message("read intensities above 1 as percentages ({percentages:,}): 80 became 0.8", percentages=self._percentages)
            )
        if self._words:
            words = ", ".join(f"{word} → {number:g} ({count:,})" for (word, number), count in sorted(self._words.items()))
            notes.append(Message("turned words for the intensity into numbers: {words}", words=words))
        return notes


def _problem(line: int, name: str, fault: RecordError) -> Problem:
    return Problem(line, name, Severity.ERROR, fault.code, fault.got, fault.expected, fault.fix)


def _rendered(problems: Sequence[Problem], name: str) -> list[Message]:
    if len(problems) <= 3:
        return [problem.render(name) for problem in problems]
    first = problems[0]
    lines = ", ".join(str(problem.line) for problem in problems[:5])
    what = f"{first.field}: " if first.field else ""
    more = ", …" if len(problems) > 5 else ""
    return [
        Message(
            "{file}: {field}got {got} in {count:,} records (line {lines}), expected {expected}; {fix}",
            file=name,
            field=what,
            got=marked(first.got),
            count=len(problems),
            lines=f"{lines}{more}",
            expected=marked(first.expected),
            fix=marked(first.fix),
        )
    ]
