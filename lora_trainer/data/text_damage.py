"""Find damage in the texts of a record: lost or misread characters, escapes that nobody decoded, and characters that nobody sees.

Lost text is an error, and so is text that is proved to be misread. What only looks odd is a warning. How people write is neither:
`???`, `ㅋㅋ`, emoji with joiners and variation selectors, accents, hanja. No message quotes the text.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache
from typing import Final

from lora_trainer.data.mojibake import common_syllables, find_mojibake
from lora_trainer.data.problems import Problem, RecordError, Severity
from lora_trainer.messages import Message, counted, marked

# U+FFFD as such, and as its UTF-8 looks in other encodings; double-byte ones read two of them as three characters
_REPLACED: Final = re.compile(
    "[\ufffc\ufffd]|"
    + "|".join(
        ("\ufffd" * count).encode().decode(wrong)
        for count, wrongs in ((1, ("cp1252", "mac_roman", "cp437", "cp850")), (2, ("cp949", "gbk")))
        for wrong in wrongs
    )
)
_NONCHARACTER: Final = re.compile(
    "[\ufdd0-\ufdef\ufffe\uffff" + "".join(chr(plane * 0x10000 + end) for plane in range(1, 17) for end in (0xFFFE, 0xFFFF)) + "]"
)
_PRIVATE: Final = re.compile("[\ue000-\uf8ff\U000f0000-\U000ffffd\U00100000-\U0010fffd]")
# conjoining jamo that NFC leaves over, and half-width ones
_STRAY_JAMO: Final = re.compile("[\u1100-\u115e\u1161-\u11ff\ua960-\ua97c\ud7b0-\ud7fb\uffa1-\uffdc]")
_INVISIBLE: Final = re.compile(
    "[\u00ad\u034f\u115f\u1160\u17b4\u17b5\u180b-\u180f\u200b-\u200d\u2028\u2029\u2060-\u2065\u206a-\u206f\u2800\u3164\ufe00-\ufe0f\ufeff\uffa0"
    "\ufff0-\ufffb\U0001d173-\U0001d17a\U000e0000-\U000e0fff]"
)
_PICTURE: Final = (
    "[\u00a9\u00ae\u203c\u2049\u2122\u2139\u2190-\u21ff\u231a-\u23ff\u24c2\u25a0-\u27bf\u2934\u2935\u2b05-\u2b55"
    "\u3030\u303d\u3297\u3299\U0001f000-\U0001faff]"
)
# emoji may hold joiners (families), variation selectors (hearts, keycaps) and tags (the flags of England, Scotland and Wales)
_EMOJI: Final = re.compile(
    f"\U0001f3f4[\U000e0020-\U000e007e]+\U000e007f|{_PICTURE}[\ufe0e\ufe0f]*(?:\u200d{_PICTURE}[\ufe0e\ufe0f]*)*|[0-9#*]\ufe0f\u20e3"
)

# the ways in which programs write a character in ASCII: JSON, JavaScript, Python, R on Windows, HTML
_CODE_POINT: Final = re.compile(
    r"\\u([0-9A-Fa-f]{4})|\\u\{([0-9A-Fa-f]{1,6})\}|\\U([0-9A-Fa-f]{8})|<U\+([0-9A-Fa-f]{4,6})>|%u([0-9A-Fa-f]{4})"
    r"|&#[xX]([0-9A-Fa-f]{1,6});|&#([0-9]{1,7});"
)
# also the tokens of a byte-fallback tokenizer, such as <0xEA>
_BYTES: Final = re.compile(r"(?:(?:\\x|%|=)[0-9A-Fa-f]{2}|<0x[0-9A-Fa-f]{2}>|\\[0-3][0-7]{2}){2,}")
_ONE_BYTE: Final = re.compile(r"(?:\\x|%|=|<0x)([0-9A-Fa-f]{2})|\\([0-3][0-7]{2})")
_LEFTOVER: Final = re.compile(
    r"\\[nrt](?![A-Za-z0-9_])|\\\"|\\u[0-9A-Fa-f]{4}|(?:\\x[0-9A-Fa-f]{2}){2}|&(?:amp|lt|gt|quot|apos|nbsp);|&#(?:[0-9]{1,7}|x[0-9A-Fa-f]{1,6});"
    r"|(?:%[0-9A-F]{2}){2}|%20|_x000[0-9A-F]_|</?(?:br|p|div|span) ?/?>",
    re.IGNORECASE,
)
_KOREAN_OR_EMOJI: Final = re.compile("[가-힣ㄱ-ㆎ\U0001f000-\U0001faff]")
# what programs write for an empty cell or a missing value
_MISSING: Final = frozenset(("nan", "none", "null", "nil", "nat", "<na>", "#n/a", "n/a", "undefined", "[object object]"))


@cache
def _ordinary() -> frozenset[str]:
    """Return the characters of which nearly all texts consist, and that no kind of damage is made of alone."""
    # without the first characters of escapes
    plain = {chr(point) for point in range(0x20, 0x7F)} - set("\\%&<=_") | set("\t\n\r")
    jamo = {chr(point) for point in range(0x3131, 0x3164)}
    pictures = {chr(point) for first, end in ((0x2600, 0x27C0), (0x1F300, 0x1FB00)) for point in range(first, end)}
    # syllables that chats have and KS X 1001 lacks: 설렜어, and frequent misspellings (됬어, 졋어)
    typed = set("렜됏됬졋썻웟쳣왤")
    return common_syllables() | typed | plain | jamo | pictures | set("…‘’“”·~♡〜！？～")


def text_problems(line: int | None, name: str, text: str) -> tuple[Problem, ...]:
    """Return the problems of `text`, the value of the field `name` on line `line`, errors first."""
    if text.strip().lower() in _MISSING:
        return (_missing_value(line, name),)
    # nearly every text takes this way, which costs a few microseconds
    if _ordinary().issuperset(text):
        return ()
    composed = unicodedata.normalize("NFC", text)
    if _ordinary().issuperset(_EMOJI.sub("", composed)):
        return ()
    errors = (Problem(line, name, Severity.ERROR, fault.code, fault.got, fault.expected, fault.fix) for fault in _faults(composed))
    return (*errors, *_suspicions(line, name, composed))


def _faults(text: str) -> Iterator[RecordError]:
    if found := _REPLACED.findall(text):
        # several characters are U+FFFD that was misread
        signs = [sign if len(sign) == 1 else "\ufffd" for sign in found]
        yield RecordError(
            "replacement_character",
            Message(
                "{counted} in place of lost characters, the first at character {character}",
                counted=_counted(signs),
                character=text.index(found[0]) + 1,
            ),
            "the characters themselves",
            "read the source again in its own encoding, often UTF-8 or CP949; this file no longer has them",
        )
    if misread := find_mojibake(text):
        fix = Message("read the source again as {encoding}", encoding=marked(misread.encoding))
        if misread.is_reversible(text):
            fix = Message(
                "{fix}, or mend it with text.encode('{wrong}').decode('{right}')", fix=fix, wrong=misread.wrong, right=misread.right
            )
        yield RecordError("mojibake", misread.described(), "Korean text", fix)
    if match := _NONCHARACTER.search(text):
        yield RecordError(
            "noncharacter",
            Message(
                "the noncharacter U+{code_point:04X} at character {character}",
                code_point=ord(match.group()),
                character=match.start() + 1,
            ),
            "text",
            "read the source again: it holds other data than text, or has another encoding",
        )
    if at := _escaped_korean(text):
        yield RecordError(
            "escaped_text",
            Message("Korean as literal escapes (such as \\uXXXX) from character {at}", at=at),
            "the characters themselves",
            "decode the text once more: it was encoded twice, for example by json.dumps of a text that already was JSON",
        )


def _suspicions(line: int | None, name: str, text: str) -> Iterator[Problem]:
    if not _escaped_korean(text) and (match := _LEFTOVER.search(text)):
        yield Problem(
            line,
            name,
            Severity.WARNING,
            "escape_sequence",
            Message("an escape sequence of JSON, HTML or a URL as text at character {character}", character=match.start() + 1),
            "the character that it stands for",
            "decode the text once more before it is written",
        )
    without_emoji = _EMOJI.sub(lambda emoji: " " * len(emoji.group()), text)
    if found := _INVISIBLE.findall(without_emoji):
        yield Problem(
            line,
            name,
            Severity.WARNING,
            "invisible_character",
            Message(
                "the invisible {counted}, the first at character {character}",
                counted=_counted(found),
                character=without_emoji.index(found[0]) + 1,
            ),
            "visible characters",
            "remove this character, not the words around it; people don't see it, but the model learns it",
        )
    if match := _PRIVATE.search(text):
        yield Problem(
            line,
            name,
            Severity.WARNING,
            "private_use_character",
            Message(
                "the private-use character U+{code_point:04X} at character {character}",
                code_point=ord(match.group()),
                character=match.start() + 1,
            ),
            "characters that mean the same everywhere",
            "write what it showed in the font of its source (an icon, an old syllable)",
        )
    if match := _STRAY_JAMO.search(text):
        yield Problem(
            line,
            name,
            Severity.WARNING,
            "stray_jamo",
            Message(
                "the conjoining or half-width jamo U+{code_point:04X} at character {character}",
                code_point=ord(match.group()),
                character=match.start() + 1,
            ),
            "whole syllables, or compatibility jamo (ㅋㅋ)",
            "write the whole syllables; unicodedata.normalize('NFC', text) does not compose these",
        )


def _missing_value(line: int | None, name: str) -> Problem:
    return Problem(
        line,
        name,
        Severity.WARNING,
        "missing_value",
        "the name of a missing value, such as nan or None, as text",
        "text",
        "write the text, or remove the record; in pandas, call fillna before you export",
    )


def _counted(found: list[str]) -> Message:
    names = ", ".join(f"U+{ord(sign):04X}" for sign in sorted(set(found))[:5])
    return counted(len(found), "{names} {count:,} time", "{names} {count:,} times", names=names)


def _escaped_korean(text: str) -> int:
    """Return the number, from 1, of the character where escapes for Korean or emoji begin, or 0."""
    points = list(_CODE_POINT.finditer(text))
    values = [int(next(filter(None, match.groups())), 10 if match[7] else 16) for match in points]
    # a pair of surrogates is one character
    units = "".join(chr(value) for value in values if value <= 0x10FFFF).encode("utf-16-le", "surrogatepass")
    if _KOREAN_OR_EMOJI.search(units.decode("utf-16-le", "replace")):
        return points[0].start() + 1
    for match in _BYTES.finditer(text):
        raw = bytes(int(code, 16) if code else int(octal, 8) & 0xFF for code, octal in _ONE_BYTE.findall(match.group()))
        for encoding in ("utf-8", "cp949"):
            if _KOREAN_OR_EMOJI.search(raw.decode(encoding, "ignore")):
                return match.start() + 1
    return 0


# --- Hangul that became question marks -----------------------------------------------------------------

SHOWN_LINES: Final = 5
# a word of question marks, with the punctuation and the laughter that the conversion left: "??", (????), ??!ㅋㅋ
_LOST_WORD: Final = re.compile(r"[\"'“‘(\[]*(\?+)[.,!~…\"'”’)\]ㅋㅎㅠㅜ^;:]*")
_HANGUL: Final = re.compile("[가-힣]")
# Oracle writes ¿ for what its encoding lacks, others write a full-width question mark, a box or a geta mark
_OTHER_MARKS: Final = "¿？□▯☐〓"
_QUESTION_MARKS: Final = str.maketrans(dict.fromkeys(_OTHER_MARKS, "?"))
# a question mark that begins a word or stands before a syllable: a cheap test that most texts fail
_ODD_MARK: Final = re.compile(rf"(?<!\S)[\"'“‘(\[]*[?{_OTHER_MARKS}]|[?{_OTHER_MARKS}][가-힣]")
_LOST_SYLLABLE: Final = re.compile(r"(?<![?\S])\?{1,3}[가-힣]|[가-힣]\?[가-힣]")


@dataclass(slots=True)
class _Field:
    texts: int = 0
    lost: int = 0
    """Texts that look as if their words had become question marks."""
    lines: list[int] = field(default_factory=list)
    bare: int = 0
    """Texts of question marks alone: `???`, which people write, but not all the time."""
    bare_lines: list[int] = field(default_factory=list)
    uneven_lines: list[int] = field(default_factory=list)
    """Lines of those with words of uneven length."""
    suspicious: int = 0
    """Texts with question marks where syllables belong."""
    suspicious_lines: list[int] = field(default_factory=list)
    without_hangul: int = 0
    """Texts that are not blank and have no Hangul syllable."""
    without_hangul_lines: list[int] = field(default_factory=list)

    def merge(self, later: _Field) -> None:
        """Add the counts of later lines."""
        self.texts += later.texts
        self.lost += later.lost
        self.bare += later.bare
        self.suspicious += later.suspicious
        self.without_hangul += later.without_hangul
        for lines, more in (
            (self.lines, later.lines),
            (self.bare_lines, later.bare_lines),
            (self.uneven_lines, later.uneven_lines),
            (self.suspicious_lines, later.suspicious_lines),
            (self.without_hangul_lines, later.without_hangul_lines),
        ):
            for line in more:
                _remember(lines, line)


class LostText:
    """Judge over a whole file whether its Hangul was lost: replaced by question marks or boxes, or missing altogether.

    People write `???`, `뭐???` and `?!?!`. Lost text is words of question marks: `?? ???? ??`. One such text may be a joke, so the
    file decides: a text is lost if it has four such words of uneven length, or if a twentieth of its field's texts look like it.
    A single text may have no Hangul. If half of a field's texts have none, something removed or encoded it.
    """

    MIN_SHARE: Final = 0.05
    MIN_BARE_SHARE: Final = 0.3
    """Share of texts without any letter from which even `???` is lost text."""
    MIN_SUSPICIOUS_SHARE: Final = 0.2
    MIN_SHARE_WITHOUT_HANGUL: Final = 0.5

    def __init__(self) -> None:
        self._fields: dict[str, _Field] = {}
        self._is_certain = False

    def add(self, line: int, name: str, text: str) -> None:
        """Count `text`, the value of the field `name` on line `line`."""
        counts = self._fields.setdefault(name, _Field())
        counts.texts += 1
        if not _HANGUL.search(text) and not _HANGUL.search(unicodedata.normalize("NFC", text)) and text.strip():
            counts.without_hangul += 1
            _remember(counts.without_hangul_lines, line)
        if not _ODD_MARK.search(text):
            return
        text = text.translate(_QUESTION_MARKS)
        lengths, words_with_hangul = [], 0
        for word in text.split():
            if match := _LOST_WORD.fullmatch(word):
                lengths.append(len(match[1]))
            elif _HANGUL.search(word):
                words_with_hangul += 1
        is_even = len(set(lengths)) < 2
        if lengths and len(lengths) == len(text.split()):
            counts.bare += 1
            _remember(counts.bare_lines, line)
        if len(lengths) >= 2 and len(lengths) > words_with_hangul and not (is_even and len(lengths) < 4):
            counts.lost += 1
            _remember(counts.lines, line)
            # escalations such as "? ?? ???" are how people write
            is_uneven = lengths not in (sorted(lengths), sorted(lengths, reverse=True))
            if is_uneven:
                _remember(counts.uneven_lines, line)
                self._is_certain |= len(lengths) >= 4
        elif _LOST_SYLLABLE.search(text):
            counts.suspicious += 1
            _remember(counts.suspicious_lines, line)

    def merge(self, later: LostText) -> None:
        """Add the counts of later lines."""
        for name, counts in later._fields.items():
            self._fields.setdefault(name, _Field()).merge(counts)
        self._is_certain |= later._is_certain

    def problems(self) -> Iterator[Problem]:
        """Yield one problem for each field that lost text, or may have."""
        for name, counts in self._fields.items():
            is_share = counts.lost >= self.MIN_SHARE * counts.texts and (counts.lost >= 3 or counts.lost >= 0.5 * counts.texts)
            is_bare = counts.bare >= 3 and counts.bare >= self.MIN_BARE_SHARE * counts.texts
            if is_bare and counts.bare > counts.lost:
                counts.lost, counts.lines = counts.bare, counts.bare_lines
            if counts.lost and (is_share or is_bare or self._is_certain):
                fault = RecordError(
                    "lost_text",
                    Message(
                        "words of question marks in {lost:,} of {texts:,} texts ({lines})",
                        lost=counts.lost,
                        texts=counts.texts,
                        lines=_lines(counts.lines, counts.lost),
                    ),
                    "Korean text",
                    "export the source again as UTF-8; this file has lost its Hangul, and nothing can bring it back from here",
                )
                yield Problem(None, name, Severity.ERROR, fault.code, fault.got, fault.expected, fault.fix)
            elif counts.without_hangul >= max(3, self.MIN_SHARE_WITHOUT_HANGUL * counts.texts):
                yield Problem(
                    None,
                    name,
                    Severity.WARNING,
                    "no_hangul",
                    Message(
                        "no Hangul syllable in {without_hangul:,} of {texts:,} texts ({lines})",
                        without_hangul=counts.without_hangul,
                        texts=counts.texts,
                        lines=_lines(counts.without_hangul_lines, counts.without_hangul),
                    ),
                    "Korean text",
                    "compare with the source: an encoding may have removed it, or a program may have encoded the text once more",
                )
            elif counts.uneven_lines:
                yield Problem(
                    None,
                    name,
                    Severity.WARNING,
                    "question_marks",
                    Message("words of question marks ({lines})", lines=_lines(counts.uneven_lines, len(counts.uneven_lines))),
                    "Korean text",
                    "compare with the source: an encoding without Hangul writes ? for it",
                )
            elif counts.suspicious >= 3 and counts.suspicious >= self.MIN_SUSPICIOUS_SHARE * counts.texts:
                yield Problem(
                    None,
                    name,
                    Severity.WARNING,
                    "question_marks",
                    Message(
                        "question marks inside or before words in {suspicious:,} of {texts:,} texts ({lines})",
                        suspicious=counts.suspicious,
                        texts=counts.texts,
                        lines=_lines(counts.suspicious_lines, counts.suspicious),
                    ),
                    "whole words",
                    "compare with the source: an encoding that lacks a syllable writes ? for it; export it as UTF-8",
                )


def _remember(lines: list[int], line: int) -> None:
    if len(lines) < SHOWN_LINES:
        lines.append(line)


def _lines(lines: list[int], count: int) -> str:
    return Message("line {lines}", lines=f"{', '.join(map(str, lines))}{', …' if count > len(lines) else ''}")
