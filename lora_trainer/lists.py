"""Read a list that somebody wrote as text."""

from __future__ import annotations

import json
from contextlib import suppress
from typing import Final

_BRACKETS: Final = ("[]", "()", "{}")
_QUOTES: Final = "\"'"


def listed(text: str) -> list[object]:
    """Return the elements of `a,b`, `[a, b]`, `(a,b)`, `{a,b}` or a JSON list. Quotes around an element are removed."""
    text = text.strip()
    if len(text) > 1 and text[0] == text[-1] and text[0] in _QUOTES and text[1:-1].strip()[:1] in "[({":
        # docker's --env-file keeps the quotes around a value
        text = text[1:-1].strip()
    if text.startswith("["):
        # a list without quotes is no JSON, and is split below
        with suppress(ValueError, RecursionError):
            if isinstance(found := json.loads(text), list):
                return found
    if text[:1] + text[-1:] in _BRACKETS:
        text = text[1:-1].strip()
        if not text:
            return []
    return [_unquoted(part.strip()) for part in text.removesuffix(",").split(",")]


def _unquoted(text: str) -> str:
    for quote in _QUOTES:
        text = text.removeprefix(quote).removesuffix(quote)
    return text
