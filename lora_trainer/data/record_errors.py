"""Explain what is wrong with a record: which field, what it holds, what is expected there, and how to fix it.

Messages never quote training text: values are described by their kind and size, and only short names are shown.
"""

from __future__ import annotations

import math
from collections.abc import Container, Iterator, Mapping, Sequence
from typing import Final

from pydantic import BaseModel, ValidationError

from lora_trainer.config import LimitsConfig
from lora_trainer.data.advice import CONVERT_COLUMNS, intensity_advice, is_label, key_advice, label_advice, type_advice
from lora_trainer.data.file_layouts import Shape, item_shape
from lora_trainer.data.problems import Problem, RecordError, Severity
from lora_trainer.data.records import (
    EXPECTED_BY_FIELD,
    TEXT_FIELDS,
    VOCABULARIES,
    EvaluationPrompt,
    TrainingRecord,
    is_blank,
    lone_surrogate_error,
)
from lora_trainer.data.strict_json import (
    MAX_QUOTED_CHARACTERS,
    RECORD_SHAPE,
    decode_json,
    non_finite_numbers,
    quoted_key,
    shown_key,
)
from lora_trainer.data.text_damage import text_problems
from lora_trainer.messages import Message, counted

_RECORD_FIELDS: Final = ("instruction", "context", "input", "output")


def record_problems(
    error: ValidationError, number: int, schema: type[BaseModel], data: Mapping[str, object], limits: LimitsConfig
) -> Iterator[Problem]:
    """Yield everything that is wrong with the invalid record `data` on line `number`: schema errors, NaN and damaged text."""
    if schema is TrainingRecord and "context" not in data and item_shape(data) is Shape.FLAT:
        yield error_problem(
            number,
            "",
            RecordError("flat_record", Message(Shape.FLAT), RECORD_SHAPE, Message("nest them; {convert}", convert=CONVERT_COLUMNS)),
        )
        return
    data = {**data, "output": _parsed(data["output"], limits)} if "output" in data else data
    non_finite = list(non_finite_numbers(data))
    for path, value in non_finite:
        yield error_problem(number, _shown_path(path), _not_finite(path, value))
    yield from _schema_problems(error, number, schema, {path for path, _ in non_finite})
    for field in TEXT_FIELDS:
        text = _value_at(data, field)
        # blank text is an error of its own
        if isinstance(text, str) and not is_blank(text):
            yield from text_problems(number, field, text)


def _parsed(output: object, limits: LimitsConfig) -> object:
    """Return the reply in `output` if that is a JSON string, else `output` as it is."""
    if not isinstance(output, str):
        return output
    try:
        return decode_json(output, limits)
    except RecordError:
        return output


def _value_at(data: Mapping[str, object], field: str) -> object:
    value: object = data
    for key in field.split("."):
        value = value.get(key) if isinstance(value, Mapping) else None
    return value


def _not_finite(path: Sequence[str], value: float) -> RecordError:
    fields = (".".join(path[:length]) for length in range(len(path), 0, -1))
    field = next((field for field in fields if field in EXPECTED_BY_FIELD), "")
    if field == "context.summary":
        fix = Message('write it, or ""')
    elif field == "context.current_emotion.intensity":
        fix = Message("write a number from 0 to 1")
    else:
        fix = Message("write the value; pandas writes NaN for an empty cell")
    return RecordError("not_finite", described(value), EXPECTED_BY_FIELD[field] if field else "a value that JSON has", fix)


def _schema_problems(
    error: ValidationError, number: int, schema: type[BaseModel], reported: Container[tuple[str, ...]]
) -> Iterator[Problem]:
    """Yield a problem for each schema error of the record on line `number`, except in the `reported` places."""
    details = error.errors(include_url=False)
    missing = [[str(part) for part in detail["loc"]] for detail in details if detail["type"] == "missing"]
    for detail in details:
        # list items are numbered from 1, as `non_finite_numbers` does
        path = [str(part + 1) if isinstance(part, int) else part for part in detail["loc"]]
        if tuple(path) in reported and detail["type"] != "extra_forbidden":
            continue
        if detail["type"] == "extra_forbidden":
            beside = [name for *parents, name in missing if parents == path[:-1]]
            yield _unknown_field(path, number, schema, detail["input"], beside)
            continue
        raised = detail.get("ctx", {}).get("error")
        field = ".".join(part for part in detail["loc"] if isinstance(part, str))
        fault = raised if isinstance(raised, RecordError) else _fault(detail["type"], field, detail["input"])
        yield error_problem(number, ".".join(path), fault)


def error_problem(number: int, field: str, fault: RecordError) -> Problem:
    """Return `fault` as an error in `field` of line `number`."""
    return Problem(number, field, Severity.ERROR, fault.code, fault.got, fault.expected, fault.fix)


def _fault(kind: str, field: str, value: object) -> RecordError:
    """Translate `kind`, pydantic's error type for `field`, into a `RecordError` for the author."""
    expected = EXPECTED_BY_FIELD[field]
    if kind == "missing":
        return RecordError("missing_field", "nothing", expected, Message("add '{key}'", key=field.rsplit(".", 1)[-1]))
    if kind == "enum":
        got = f"'{value}'" if isinstance(value, str) and is_label(value) else described(value)
        labels = VOCABULARIES[field]
        return RecordError(
            "unknown_value", got, Message("one of {names}", names=", ".join(labels)), label_advice(field, value, labels)
        )
    if kind in ("greater_than_equal", "less_than_equal", "finite_number"):
        return RecordError("out_of_range", described(value), expected, intensity_advice(value))
    if kind == "string_unicode":
        return lone_surrogate_error("half of a surrogate pair")
    return RecordError("wrong_type", described(value), expected, type_advice(field, value))


def _unknown_field(path: list[str], number: int, schema: type[BaseModel], value: object, missing: Sequence[str]) -> Problem:
    """Describe the unknown key at `path`, in an object that lacks the keys `missing`."""
    *parents, key = path
    siblings = [name.rsplit(".", 1)[-1] for name in EXPECTED_BY_FIELD if name and name.split(".")[:-1] == parents]
    if not parents:
        siblings = list(EvaluationPrompt.model_fields) if schema is EvaluationPrompt else list(_RECORD_FIELDS)
    field = _shown_path(path)
    advice = key_advice(parents, key, value, siblings, missing)
    fault = RecordError(
        "unknown_field", Message("the key {key}", key=quoted_key(key)), Message("only {names}", names=", ".join(siblings)), advice
    )
    return error_problem(number, field, fault)


def _shown_path(path: Sequence[str]) -> str:
    """Return the dotted path for a message, with `?` for a key that does not look like a name: it may be training text."""
    return ".".join(shown_key(key) or "?" for key in path)


def described(value: object) -> str:
    """Describe a JSON value by its kind and size, without quoting text."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int):
        return str(value) if abs(value) < 10**MAX_QUOTED_CHARACTERS else Message("a very large number")
    if isinstance(value, float):
        return repr(value) if math.isfinite(value) else "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    if isinstance(value, str):
        return counted(len(value), "text of {count} character", "text of {count} characters")
    return Message("a list") if isinstance(value, list) else Message("an object")
