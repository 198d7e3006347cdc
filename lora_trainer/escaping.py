"""Escape text from files, models and servers before a terminal sees it.

A terminal obeys control characters: they move the cursor, rename the window, recolour or hide text, and answer as if somebody had
typed. Direction controls reorder what a person reads.
"""

from __future__ import annotations

import re
from typing import Final

# C0 without line feed and tab, DEL and C1 (U+009B starts a control sequence as ESC [ does); soft hyphen; direction controls,
# zero-width and line separators; interlinear marks; surrogates, which no stream can encode. Zero-width joiners and variation
# selectors stay: emoji need them.
_UNSAFE: Final = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u00ad\u061c\u180e\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb\ud800-\udfff]"
)
_LINE_BREAK: Final = re.compile(r"[\n\t]")


def escaped(text: str) -> str:
    r"""Return `text` with every character that a terminal would obey or hide written as `\u001b`. Line feeds and tabs stay.

    JSON stays the same JSON: inside a string, it spells these characters in the same way.
    """
    return _UNSAFE.sub(_code, text)


def one_line(text: str, at_most: int | None = None) -> str:
    """Return `text` escaped, with line feeds and tabs escaped as well, and shortened to `at_most` characters."""
    if at_most is not None and len(text) > at_most:
        text = f"{text[:at_most]}…"
    return _LINE_BREAK.sub(_code, escaped(text))


def escaped_value(value: object) -> object:
    """Escape all strings in a value of a log event, at any depth."""
    if isinstance(value, str):
        return escaped(value)
    if isinstance(value, dict):
        return {key: escaped_value(item) for key, item in value.items()}
    if isinstance(value, list):
        return [escaped_value(item) for item in value]
    if isinstance(value, tuple):
        return tuple(escaped_value(item) for item in value)
    return value


def _code(found: re.Match[str]) -> str:
    return f"\\u{ord(found[0]):04x}"
