"""Count emoji as a reader sees them, with the data of the `emoji` library (https://github.com/carpedm20/emoji)."""

from __future__ import annotations

import re
from functools import lru_cache
from typing import Final

import emoji as emoji_library

# a cheap test that saves the library's slower scan for most replies
_PERHAPS_EMOJI: Final = re.compile("[\u00a9\u00ae\u203c\u2049\u20e3\u2122\u2139\u2194-\u3299\ufe0f\U0001f000-\U0001faff]")
MAX_SCANNED_CHARACTERS: Final = 1000
"""`emoji_count` reads no further: replies have 20 to 100 characters, and the library takes quadratic time on a chain of
zero-width joiners."""

_TEXT_STYLE: Final = "\ufe0e"
_KEYCAP: Final = "\u20e3"


# cached, because several rules count the emoji of the same reply
@lru_cache(maxsize=64)
def emoji_count(text: str) -> int:
    """Return the number of emoji in the first `MAX_SCANNED_CHARACTERS` of `text`.

    A family, a flag, a keycap or an emoji with a skin tone counts as one; `ㅋㅋ`, `^^` and `♡` don't count. Symbols from U+2600 on
    count even without U+FE0F, because people type ❤ and ☺ without it; earlier ones (©, ™, ↔) count only with it.
    """
    text = text[:MAX_SCANNED_CHARACTERS]
    first = _PERHAPS_EMOJI.search(text)
    if not first:
        return 0
    # the digit of a keycap comes before the first match
    text = text[max(0, first.start() - 1) :]
    return sum(
        1
        for found in emoji_library.emoji_list(text)
        if _is_shown_as_emoji(found["emoji"], text[found["match_end"] : found["match_end"] + 1])
    )


def is_emoji(text: str) -> bool:
    """Return whether `text` is exactly one emoji."""
    return emoji_library.is_emoji(text)


def _is_shown_as_emoji(symbol: str, following: str) -> bool:
    status = (
        emoji_library.EMOJI_DATA[symbol]["status"]
        if symbol in emoji_library.EMOJI_DATA
        else emoji_library.STATUS["fully_qualified"]
    )
    is_unqualified = status == emoji_library.STATUS["unqualified"]
    return not is_unqualified or symbol.endswith(_KEYCAP) or (symbol >= "\u2600" and following != _TEXT_STYLE)
