"""Emoji as a reader counts them, by the data of the `emoji` library (https://github.com/carpedm20/emoji)."""

from __future__ import annotations

import re
from typing import Final

import emoji as emoji_library

# the cheap test first: most replies hold nothing that could begin an emoji but a digit
_PERHAPS_EMOJI: Final = re.compile("[\u00a9\u00ae\u203c\u2049\u20e3\u2122\u2139\u2194-\u3299\ufe0f\U0001f000-\U0001faff]")
MAX_SCANNED_CHARACTERS: Final = 1000
"""Of a longer text only this much is looked at: a reply has 20 to 100, and the library's time grows with the square of a chain
of joiners."""

_TEXT_STYLE: Final = "\ufe0e"
_KEYCAP: Final = "\u20e3"


def emoji_count(text: str) -> int:
    """How many emoji `text` holds. A family, a flag, a keycap or a skin tone is one; `ㅋㅋ`, `^^` and `♡` are none.

    Hearts and faces of the old blocks (❤, ☺) are typed without U+FE0F and meant as emoji; © ™ ↔ before them are text
    unless U+FE0F makes them one. Of a text longer than `MAX_ANALYSED_CHARACTERS` only the beginning is counted.
    """
    text = text[:MAX_SCANNED_CHARACTERS]
    if not _PERHAPS_EMOJI.search(text):
        return 0
    return sum(
        1
        for found in emoji_library.emoji_list(text)
        if _is_meant(found["emoji"], text[found["match_end"] : found["match_end"] + 1])
    )


def is_emoji(text: str) -> bool:
    """Whether `text` is one emoji and nothing else."""
    return emoji_library.is_emoji(text)


def _is_meant(sign: str, behind: str) -> bool:
    status = (
        emoji_library.EMOJI_DATA[sign]["status"] if sign in emoji_library.EMOJI_DATA else emoji_library.STATUS["fully_qualified"]
    )
    is_unqualified = status == emoji_library.STATUS["unqualified"]
    return not is_unqualified or sign.endswith(_KEYCAP) or (sign >= "\u2600" and behind != _TEXT_STYLE)
