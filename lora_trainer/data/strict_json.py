"""Decode JSON from untrusted lines: limited depth and size, no duplicate keys, and NaN only with its place."""

from __future__ import annotations

import json
import math
import re
import unicodedata
from collections.abc import Iterator
from typing import Any, Final

from lora_trainer.config import LimitsConfig
from lora_trainer.data.problems import IncompleteJsonError, RecordError
from lora_trainer.messages import Message

RECORD_SHAPE: Final = Message("one JSON object on the line: instruction, context, input, output")
# what the json module says
_REASONS: Final = (
    Message("expecting value"),
    Message("expecting property name enclosed in double quotes"),
    Message("expecting ':' delimiter"),
    Message("expecting ',' delimiter"),
    Message("extra data"),
    Message("unterminated string starting"),
    Message("invalid control character"),
    Message("invalid \\escape"),
    Message("invalid \\uxxxx escape"),
    Message("illegal trailing comma before end of object"),
    Message("illegal trailing comma before end of array"),
)
MAX_QUOTED_CHARACTERS: Final = 24
"""Longest number that messages quote."""

# a longer name is probably training text with misplaced quotes; two Korean words can be a column, three are a sentence
_NAME: Final = re.compile(r"(?=.{1,40}\Z)[A-Za-z0-9_.\-/()\[\]]+(?: [A-Za-z0-9_.\-/()\[\]]+){0,2}")
_KOREAN_NAME: Final = re.compile(r"(?=.{1,12}\Z)[\w.\-/()\[\]]+(?: [\w.\-/()\[\]]+)?")
# a record has four keys; without a limit, a line of a megabyte could produce a problem for each of its keys
_MAX_KEYS: Final = 64
# a JSON string, an unmatched quote, or a bracket
_STRUCTURE: Final = re.compile(r'"(?:[^"\\]++|\\.)*+"|["\[\]{}]', re.DOTALL)


def decode_json(text: str, limits: LimitsConfig) -> object:
    """Decode `text` like `json.loads`, but refuse duplicate keys and deep nesting. Raises only `RecordError`.

    `NaN` and `Infinity` become floats that are not finite, because only the caller knows what its fields expect.
    """
    _check_depth(text, limits.nesting_depth)
    try:
        return _DECODER.decode(text)
    except RecordError:
        raise
    except json.JSONDecodeError as error:
        got = Message(
            "something that is not JSON ({reason} at character {character})",
            reason=Message(error.msg.lower().removesuffix(" at")),
            character=error.pos + 1,
        )
        if error.msg == "Extra data":
            fix = Message("put one record on a line, with nothing after it")
        else:
            fix = Message("write it with a JSON library, which escapes quotes and line breaks in text")
        # truncated inside a string, or before the last brace
        is_open = error.msg.startswith("Unterminated string") or not text.rstrip().endswith("}")
        is_object = text.lstrip().startswith("{") and error.msg != "Extra data"
        kind = IncompleteJsonError if is_object and (is_open or error.pos >= len(text.rstrip())) else RecordError
        raise kind("not_json", got, RECORD_SHAPE, fix) from None
    except ValueError:
        # the only other cause: int() refuses very long numbers
        raise RecordError("not_json", "a number with too many digits", RECORD_SHAPE, "write it with fewer digits") from None


def is_quotable(text: str) -> bool:
    """Return whether `text` looks like the name of a field, a column or an emotion, so that a message may quote it."""
    return _NAME.fullmatch(text) is not None or _KOREAN_NAME.fullmatch(unicodedata.normalize("NFC", text)) is not None


def visible_name(key: str) -> str:
    """Return `key` without the characters that nobody sees: byte-order marks, joiners, controls."""
    return "".join(sign for sign in key if sign.isspace() or unicodedata.category(sign) not in ("Cf", "Cc", "Cs"))


def shown_key(key: str) -> str | None:
    """Return `key` for a message, composed and with its invisible characters escaped, or None if it does not look like a name."""
    if not is_quotable(visible_name(key).strip()):
        return None
    composed = unicodedata.normalize("NFC", key)
    return "".join(sign if sign.isprintable() else f"\\u{ord(sign):04x}" for sign in composed)


def quoted_key(key: str) -> str:
    """Return `key` in quotes if a message may quote it, and its length otherwise."""
    shown = shown_key(key)
    return Message("of {count} characters", count=len(key)) if shown is None else f"'{shown}'"


def _check_depth(text: str, max_depth: int) -> None:
    """Raise `RecordError` if `text` nests deeper than `max_depth`: the JSON parser is recursive."""
    # a cheap test that nearly every line passes: a record with its reply has four opening braces
    if text.count("[") + text.count("{") <= max_depth:
        return
    depth = 0
    for found in _STRUCTURE.finditer(text):
        first = text[found.start()]
        if first in "[{":
            depth += 1
            if depth > max_depth:
                raise RecordError(
                    "too_deep",
                    Message("lists or objects nested more than {max_depth} deep (limits.nesting_depth)", max_depth=max_depth),
                    RECORD_SHAPE,
                    "check how the file was exported: a record nests two objects and its output",
                )
        elif first in "]}":
            depth -= 1
        elif found.end() - found.start() == 1:
            # an unterminated string, which the parser reports
            return


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(pairs) > _MAX_KEYS:
        raise RecordError(
            "too_many_keys",
            Message("an object of {count:,} keys", count=len(pairs)),
            Message("at most {most:,}", most=_MAX_KEYS),
            "check how the file was exported: a record has four keys",
        )
    found = dict(pairs)
    if len(found) != len(pairs):
        keys = [key for key, _ in pairs]
        repeated = next(key for key in keys if keys.count(key) > 1)
        raise RecordError(
            "duplicate_key",
            Message("the key {key} more than once", key=quoted_key(repeated)),
            "each key once",
            "keep the one that is meant",
        )
    return found


def non_finite_numbers(value: object, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], float]]:
    """Yield the path and value of each number in `value` that is not finite. List items are numbered from 1."""
    if isinstance(value, float) and not math.isfinite(value):
        yield path, value
    elif isinstance(value, dict):
        for key, inner in value.items():
            yield from non_finite_numbers(inner, (*path, key))
    elif isinstance(value, list):
        for number, inner in enumerate(value, 1):
            yield from non_finite_numbers(inner, (*path, str(number)))


_DECODER: Final = json.JSONDecoder(object_pairs_hook=_object)
