"""JSON decoding for untrusted lines: bounded depth and size, no NaN, no duplicate key."""

from __future__ import annotations

import json
import re
from typing import Any, Final, NoReturn

from lora_trainer.config import LimitsConfig
from lora_trainer.data.problems import IncompleteJsonError, RecordError

QUOTED_CHARACTERS: Final = 24
"""A value or a key is shown only up to this length: what is longer is probably text, not a slip in a name."""
_NAME: Final = re.compile(r"[A-Za-z0-9_-]+")
_MOST_KEYS: Final = 64
"""Of one object. A record has four: beyond this there would be a problem for each of a megabyte's keys."""
RECORD_SHAPE: Final = "one JSON object on the line: instruction, context, input, output"
_STRUCTURE: Final = re.compile(r'"(?:[^"\\]++|\\.)*+"|["\[\]{}]', re.DOTALL)


def _check_depth(text: str, most: int) -> None:
    """Refuse what is nested deeper than `most`, before a parser that recurses sees it."""
    # a record has three braces and its reply one more: most lines need no second look
    if text.count("[") + text.count("{") <= most:
        return
    depth = 0
    for found in _STRUCTURE.finditer(text):
        mark = text[found.start()]
        if mark in "[{":
            depth += 1
            if depth > most:
                raise RecordError(
                    "too_deep",
                    f"lists or objects nested more than {most} deep (limits.nesting_depth)",
                    RECORD_SHAPE,
                    "remove what does not belong there",
                )
        elif mark in "]}":
            depth -= 1
        elif found.end() - found.start() == 1:
            # a text without its end: the parser says so
            return


def decode_json(text: str, limits: LimitsConfig) -> object:
    """`json.loads` that takes no NaN, no key twice and no depth beyond the limit. Raises `_RecordError` only."""
    _check_depth(text, limits.nesting_depth)
    try:
        return _DECODER.decode(text)
    except RecordError:
        raise
    except json.JSONDecodeError as error:
        got = f"something that is not JSON ({error.msg.lower().removesuffix(' at')} at character {error.pos + 1})"
        if error.msg == "Extra data":
            fix = "put one record on a line, and nothing behind it"
        else:
            fix = "write it with a JSON library, which escapes quotes and line breaks inside a text"
        # cut inside a string, or in front of the last brace
        can_go_on = error.msg.startswith("Unterminated string") or not text.rstrip().endswith("}")
        could_begin = text.lstrip().startswith("{") and error.msg != "Extra data"
        kind = IncompleteJsonError if could_begin and (can_go_on or error.pos >= len(text.rstrip())) else RecordError
        raise kind("not_json", got, RECORD_SHAPE, fix) from None
    except ValueError:
        # the one that is left: int() refuses very long numbers
        raise RecordError("not_json", "a number with too many digits", RECORD_SHAPE, "write a number from 0 to 1") from None


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(pairs) > _MOST_KEYS:
        raise RecordError(
            "too_many_keys", f"an object of {len(pairs):,} keys", f"at most {_MOST_KEYS}", "remove what does not belong there"
        )
    found = dict(pairs)
    if len(found) != len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise RecordError(
            "duplicate_key", f"the key {short_key(twice)} more than once", "each key once", "keep the one that is meant"
        )
    return found


def _not_a_number(constant: str) -> NoReturn:
    raise RecordError("not_finite", constant, "a finite number", "write a number from 0 to 1")


_DECODER: Final = json.JSONDecoder(object_pairs_hook=_object, parse_constant=_not_a_number)


def is_name(text: str) -> bool:
    """As the names of fields and emotions are: what people say to each other never is quoted."""
    return len(text) <= QUOTED_CHARACTERS and _NAME.fullmatch(text) is not None


def short_key(text: str) -> str:
    return f"'{text}'" if is_name(text) else f"of {len(text)} characters"
