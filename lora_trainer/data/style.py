"""Describe how the replies of a file read together: length, commas, laughter, sentences built alike, and phrases said too often.

Nothing here judges a single reply. The shares are reported and are never a reason to refuse somebody's data; `TARGETS` holds what
the bundled data keeps, measured against real chats (`data/README.md`).
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from importlib import resources
from statistics import median
from typing import Final, NamedTuple

from lora_trainer.data.korean import morphemes

MAX_STYLE_REPLIES: Final = 20_000
"""Only the first so many replies of a file are described, so that memory stays flat. Shares over as many are exact to a percent."""

SHORT_REPLY_CHARACTERS: Final = 20
MOST_PHRASE_WORDS: Final = 4
_LAUGHTER: Final = re.compile("[ㅋㅎ]")
_WORD: Final = re.compile("[가-힣ㄱ-ㅎㅏ-ㅣA-Za-z0-9]+")

# words that occur everywhere in chat: a share of 5 % says nothing about them
_ORDINARY_TAGS: Final = ("J", "E", "NP", "NNB", "VX", "VCP", "VCN", "XS", "MM", "NR", "S", "W")
_ORDINARY_WORDS: Final = frozenset(
    word
    for line in (resources.files("lora_trainer.data") / "assets" / "ordinary_words.txt").read_text(encoding="utf-8").splitlines()
    if not line.startswith("#")
    for word in line.split()
)

# words that a reply shares with a summary by chance
_CONTENT_TAGS: Final = ("NNG", "NNP", "VV", "VA", "XR", "SN", "SL", "MAG")
_LIGHT_STEMS: Final = frozenset(
    [
        "하",
        "되",
        "있",
        "없",
        "가",
        "오",
        "보",
        "주",
        "않",
        "말",
        "같",
        "싶",
        "알",
        "모르",
        "그러",
        "이러",
        "좋",
        "안",
        "못",
        "잘",
        "더",
        "좀",
        "또",
        "다",
        "나",
        "너",
        "오늘",
        "어제",
        "내일",
        "지금",
        "때",
    ]
)


@dataclass(frozen=True, slots=True)
class Style:
    """Shares over replies, each in [0, 1] unless said otherwise."""

    replies: int
    median_characters: float
    short: float
    """Replies of at most `SHORT_REPLY_CHARACTERS` characters."""
    comma: float
    spliced: float
    """Replies with a comma between two sentences that each have a final ending (카드부터 막아, 그게 먼저야)."""
    laughter: float
    """Replies with ㅋ or ㅎ."""
    alike: float
    """Replies that are another reply with other nouns."""
    phrase: str
    """The phrase that most replies share, as morphemes. Empty without replies. Training text: show it only to its owner."""
    phrase_share: float

    def as_json(self) -> dict[str, object]:
        """Return JSON-compatible values, without the text of the phrase."""
        return {
            name: round(value, 4) if isinstance(value, float) else value for name, value in asdict(self).items() if name != "phrase"
        }


EMPTY_STYLE: Final = Style(0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, "", 0.0)
"""The style of no replies."""


@dataclass(frozen=True, slots=True)
class Target:
    """The range that a share of the bundled data keeps."""

    least: float
    most: float


TARGETS: Final[dict[str, Target]] = {
    "short": Target(0.15, 1.0),
    "comma": Target(0.0, 0.35),
    "laughter": Target(0.05, 0.15),
    "alike": Target(0.0, 0.10),
    "phrase_share": Target(0.0, 0.05),
}
"""By the names of `Style`'s fields."""


def skeleton(tokens: Sequence[tuple[str, str]]) -> tuple[str, ...]:
    """Return the morphemes of a reply with every noun, number and foreign word replaced by `N`, and without punctuation.

    Neighbouring nouns count as one, so that 김치찌개 집 and 국밥집 are the same.
    """
    found: list[str] = []
    for form, tag in tokens:
        if tag.startswith("NN") or tag in ("SN", "SL", "NR", "SH", "XPN", "XSN"):
            if found[-1:] != ["N"]:
                found.append("N")
        elif not tag.startswith(("S", "W")):
            found.append(form)
    return tuple(found)


# endings that close a sentence although the analyser takes them for connective ones before a comma
_CLOSING: Final = (
    "어",
    "아",
    "지",
    "네",
    "자",
    "거든",
    "잖아",
    "ᆯ게",
    "을게",
    "래",
    "냐",
    "니",
    "다",
    "야",
    "ᆯ까",
    "을까",
    "구나",
    "걸",
    "ᆯ걸",
)


def has_splice(tokens: Sequence[tuple[str, str]]) -> bool:
    """Return whether a comma joins two sentences that each end by themselves."""
    for at, (form, tag) in enumerate(tokens):
        if tag != "SP" or form not in (",", "，") or at < 3:
            continue
        last, last_tag = tokens[at - 1]
        closes = last_tag == "EF" or (last_tag == "EC" and last in _CLOSING)
        # two halves of a choice belong together: 갈 거야, 말 거야?
        is_choice = any(other == last and tag in ("EF", "EC") and tokens[-1][0] == "?" for other, tag in tokens[at + 1 :])
        if closes and not is_choice and any(tag == "EF" for _, tag in tokens[at + 1 :]):
            return True
    return False


def phrases(tokens: Sequence[tuple[str, str]]) -> set[tuple[str, ...]]:
    """Return what a reply says as phrases: runs of two to four words' stems, and single words that are not ordinary ones."""
    stems = [form for form, tag in tokens if not tag.startswith(("S", "W", "J", "E", "XS", "VCP", "VX"))]
    content = {
        form
        for form, tag in tokens
        if not tag.startswith(_ORDINARY_TAGS) and form not in _ORDINARY_WORDS and (len(form) > 1 or tag in ("IC", "MAG"))
    }
    runs = {
        tuple(stems[at : at + length])
        for length in range(2, MOST_PHRASE_WORDS + 1)
        for at in range(len(stems) - length + 1)
        if any(word not in _ORDINARY_WORDS for word in stems[at : at + length])
    }
    return {(word,) for word in content} | runs


def uses_summary(summary: str, message: str, text: str) -> bool:
    """Return whether the reply `text` has a content word of the summary that the input `message` has not."""
    return bool((_content(summary) - _content(message)) & _content(text))


def _content(text: str) -> set[str]:
    return {form for form, tag in morphemes(text) if tag.startswith(_CONTENT_TAGS) and form not in _LIGHT_STEMS}


class ReplyStyle(NamedTuple):
    """What `StyleCounter` counts of one reply."""

    characters: int
    has_comma: bool
    has_laughter: bool
    is_spliced: bool
    skeleton: tuple[str, ...]
    phrases: frozenset[tuple[str, ...]]


def described(text: str) -> ReplyStyle:
    """Return what `StyleCounter` counts of one reply."""
    text = unicodedata.normalize("NFC", text)
    tokens = morphemes(text)
    return ReplyStyle(
        characters=len(text),
        has_comma="," in text or "，" in text,
        has_laughter=_LAUGHTER.search(text) is not None,
        is_spliced=has_splice(tokens),
        skeleton=skeleton(tokens),
        phrases=frozenset(phrases(tokens)),
    )


class StyleCounter:
    """Collect what `Style` describes, one reply at a time."""

    def __init__(self) -> None:
        self._lengths: list[int] = []
        self._counts: Counter[str] = Counter()
        self._skeletons: Counter[tuple[str, ...]] = Counter()
        self._phrases: Counter[tuple[str, ...]] = Counter()

    @property
    def is_full(self) -> bool:
        """Whether `MAX_STYLE_REPLIES` have been added."""
        return len(self._lengths) >= MAX_STYLE_REPLIES

    def add(self, reply: ReplyStyle) -> None:
        """Add a reply, unless the counter is full."""
        if self.is_full:
            return
        self._lengths.append(reply.characters)
        self._counts["comma"] += reply.has_comma
        self._counts["laughter"] += reply.has_laughter
        self._counts["spliced"] += reply.is_spliced
        self._skeletons[reply.skeleton] += 1
        self._phrases.update(reply.phrases)

    def result(self) -> Style:
        """Return the shares over the replies added so far."""
        count = len(self._lengths)
        if not count:
            return EMPTY_STYLE
        phrase, often = min(self._phrases.items(), key=lambda found: (-found[1], found[0]), default=((), 0))
        return Style(
            replies=count,
            median_characters=median(self._lengths),
            short=sum(length <= SHORT_REPLY_CHARACTERS for length in self._lengths) / count,
            comma=self._counts["comma"] / count,
            spliced=self._counts["spliced"] / count,
            laughter=self._counts["laughter"] / count,
            alike=sum(often for often in self._skeletons.values() if often > 1) / count,
            phrase=" ".join(phrase),
            phrase_share=often / count,
        )


def style_of(replies: Iterable[str]) -> Style:
    """Return the style of `replies`."""
    counter = StyleCounter()
    for reply in replies:
        counter.add(described(reply))
    return counter.result()
