"""Read JSON documents that others wrote: bounded, without NaN, and validated before anybody uses a field."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from typing import Any, Final, NoReturn, TypeVar

from pydantic import TypeAdapter, ValidationError

from lora_trainer.errors import ConfigError
from lora_trainer.escaping import one_line

_MAX_DEPTH: Final = 32
_MAX_INTEGER: Final = 2**63
_MAX_PROBLEMS: Final = 8
_SHOWN_CHARACTERS: Final = 80
_KINDS: Final = {dict: "an object", list: "a list", type(None): "null"}

_Type = TypeVar("_Type")


def parse_object(data: bytes, where: str, *, unique: bool = False) -> dict[str, Any]:
    """Parse a JSON object. Raise `ConfigError` for anything else, for NaN, for numbers without end, and for deep nesting.

    With `unique`, refuse repeated keys as well.
    """
    try:
        document = json.loads(
            data.decode(),
            parse_constant=_refuse,
            parse_float=_finite,
            parse_int=_bounded,
            object_pairs_hook=_once_each if unique else None,
        )
        if _depth(document) > _MAX_DEPTH:
            raise RecursionError
    except UnicodeDecodeError:
        raise ConfigError(f"{where}: got bytes that are not UTF-8, expected a JSON object") from None
    except RecursionError:
        raise ConfigError(f"{where}: got nesting of more than {_MAX_DEPTH} levels, expected a JSON object") from None
    except ValueError as error:
        raise ConfigError(f"{where}: not JSON ({one_line(str(error), _SHOWN_CHARACTERS)}); expected a JSON object") from None
    if not isinstance(document, dict):
        raise ConfigError(f"{where}: got {shown(document)}, expected a JSON object")
    return document


def validated(model: type[_Type], document: object, where: str, *, quote: bool = True, strict: bool = True) -> _Type:
    """Return `document`, parsed JSON, as `model`. Raise `ConfigError` with one line for each wrong field.

    With `quote`, the lines show wrong values, shortened. Pass False for documents that may hold training text. Settings are not
    `strict`: they have converters of their own.
    """
    try:
        return TypeAdapter(model).validate_json(json.dumps(document), strict=strict)
    except ValidationError as error:
        raise ConfigError(list(_problems(error, where, quote=quote))) from None


def shown(value: object, *, quote: bool = True) -> str:
    """Describe a foreign value on one line of a message."""
    if type(value) in _KINDS:
        return _KINDS[type(value)]
    if not quote:
        return f"a {type(value).__name__}"
    return one_line(repr(value) if isinstance(value, str) else str(value), _SHOWN_CHARACTERS)


def _problems(error: ValidationError, where: str, *, quote: bool) -> Iterator[str]:
    found = error.errors(include_url=False, include_context=False)
    for problem in found[:_MAX_PROBLEMS]:
        place = one_line(".".join(map(str, problem["loc"])), _SHOWN_CHARACTERS)
        got = "nothing" if problem["type"] == "missing" else shown(problem["input"], quote=quote)
        message = (
            problem["msg"]
            .removeprefix("Value error, ")
            .replace("a valid dictionary", "an object")
            .replace("a valid array", "a list")
            .replace("a valid integer", "an integer")
        )
        expected = one_line(message[0].lower() + message[1:]).replace("input should be", "expected").replace("valid ", "")
        yield f"{where}: {f'{place}: ' if place else ''}got {got}; {expected}"
    if len(found) > _MAX_PROBLEMS:
        yield f"{where}: and {len(found) - _MAX_PROBLEMS} more such fields"


def _depth(document: object) -> int:
    depth, level = 0, [document]
    while level and depth <= _MAX_DEPTH:
        depth += 1
        level = [
            child
            for value in level
            if isinstance(value, dict | list)
            for child in (value.values() if isinstance(value, dict) else value)
        ]
    return depth


def _refuse(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is no JSON number")


def _once_each(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a repeated key")
    return found


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"the number {text[:20]} is too large")
    return value


def _bounded(text: str) -> int:
    value = int(text) if len(text) <= 20 else _MAX_INTEGER  # int() takes long for very long numbers
    if abs(value) >= _MAX_INTEGER:
        raise ValueError(f"the number {text[:20]}… is too large")
    return value
