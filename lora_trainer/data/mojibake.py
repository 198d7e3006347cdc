"""Find text that was decoded with the wrong encoding, and prove it by decoding it again.

Two encodings of Korean end up misread: UTF-8, and CP949 (the superset of EUC-KR that Windows uses). Text is called mojibake only if
its bytes in the wrong encoding form Korean in the right one. Accents, hanja and kana that people write don't.
"""

from __future__ import annotations

import re
import unicodedata
from functools import cache
from typing import Final, NamedTuple

from lora_trainer.messages import Message, marked

_FREQUENT: Final = frozenset(
    "가각간갈감갔강같개걔거건걸것게겠겨결경계고골공과관괜교구국굴귀그근글금기긴길김까깨꺼꼭꾸끝끼나난날남났내냈냉냐냥너넘넣네녁년노놀놓누눈느는늘늦니님다단달담답당대더던데도돌동돼됐되된두둘뒀뒤드든듣들등디"
    "따때떠떡떨또뚱뛰뜻라락란람랑래러럼렇레려렸로료루룸르른를름리린릴림마막만많말망맞매머먹먼메며면명몇모목몰못무문물뭐미민밀바박반받발밤밥방배백버번벌벽별보복본볼봐봤부분불붙비빠빨빵사산살삼상새생서석선설"
    "섯성세센소속손솔수숨쉬스습시식신실심십싶싸써쓰씩아안앉않알았앞애야약양얘어언얼엄업없었엉에엔여역연열였영옆예오온올와완왔왜외요용우운울웃워원웠위유으은을음응의이인일읽임입있자작잖잘잠잡장재저적전절점접"
    "정제져졌조졸좀종좋주죽준줄중줘줬즘증지직진질짐집짜짝짧째쪽찍차찬찮참창찾책챙처천첫청체쳐쳤초추축출취치친칠침카케코콜크키타터테토톡통투트틀티팀파판퍼편폰표풀프피하학한할함해했행험형호혼화활회후휴흘히힘"
)
"""The 400 most frequent syllables of the bundled data, which make up 94 % of it but only 17 % of KS X 1001."""

_LATIN: Final = "cp1252"
"""CP1252, where the five bytes that it leaves undefined are Latin-1's, as browsers read them."""
_LATIN_SCRIPT: Final = (_LATIN, "mac_roman", "cp1250", "cp1254", "iso8859_15")
_SINGLE_BYTE: Final = (*_LATIN_SCRIPT, "cp437", "cp850", "cp1251", "koi8_r")
_DOUBLE_BYTE: Final = ("cp949", "gbk", "cp932", "cp950", "euc_jp")
_UTF16: Final = ("utf_16_le", "utf_16_be")
_NAMES: Final = {
    _LATIN: Message("CP1252 or Latin-1"),
    "utf_8": "UTF-8",
    "utf_16_le": "UTF-16 (little-endian)",
    "utf_16_be": "UTF-16 (big-endian)",
}

# punctuation, kana, hanja and Hangul have three bytes in UTF-8, emoji four
_WHOLE: Final = re.compile(rb"[\xe2-\xed][\x80-\xbf]{2}|\xf0[\x90-\xbf][\x80-\xbf]{2}")
# the same with a byte that the wrong encoding has no character for (`?` here), or that became a space
_PARTIAL: Final = re.compile(rb"[\xe2-\xed](?:[\x80-\xbf][? ]|[? ][\x80-\xbf]|\?)|\?[\x80-\xbf]{1,2}")
_UTF8: Final = re.compile(_WHOLE.pattern + b"|" + _PARTIAL.pattern)
_ROW: Final = re.compile(rb"(?:[\xe3-\xed][\x80-\xbf]{2}){2,}")
_LATIN_TO_BYTES: Final = {
    ord(bytes((byte,)).decode(_LATIN)): byte for byte in range(0x80, 0xA0) if byte not in (0x81, 0x8D, 0x8F, 0x90, 0x9D)
}
_HIGH_LATIN: Final = re.compile("[\x80-\xff" + re.escape("".join(map(chr, _LATIN_TO_BYTES))) + "]{2,}")
_EAST_ASIAN: Final = re.compile("[\u3001-\u9fff\uf900-\ufaff\uff61-\uff9f\ufffd]")
_MAX_LAYERS: Final = 3
_MAX_EXAMINED_CHARACTERS: Final = 2000


class Misread(NamedTuple):
    """How text was misread. Both encodings are Python's names."""

    right: str
    wrong: str

    def described(self) -> Message:
        """Return in which way the text was misread."""
        return Message("{right} that was read as {wrong}", right=marked(self.encoding), wrong=marked(_name(self.wrong)))

    @property
    def encoding(self) -> str:
        """The right encoding, as people write it."""
        return _name(self.right)

    def is_reversible(self, text: str) -> bool:
        """Return whether `text.encode(wrong).decode(right)` restores the text."""
        try:
            text.encode(self.wrong).decode(self.right)
        except UnicodeError:
            return False
        return True


def _name(encoding: str) -> str:
    return _NAMES.get(encoding, encoding.upper().replace("_", "-"))


@cache
def common_syllables() -> frozenset[str]:
    """Return the 2,350 syllables of KS X 1001, which hold nearly all Korean text."""
    return frozenset(bytes((lead, trail)).decode("euc_kr") for lead in range(0xB0, 0xC9) for trail in range(0xA1, 0xFF))


def find_mojibake(text: str) -> Misread | None:
    """Return how `text` was misread, or None if nothing proves that it was."""
    return _find(text[:_MAX_EXAMINED_CHARACTERS], _MAX_LAYERS)


def _find(text: str, layers: int) -> Misread | None:
    foreign = [sign for sign in text if sign > "\x7f" and sign not in common_syllables()]
    if not foreign:
        return None
    is_korean = _is_korean(text)
    for wrong in _SINGLE_BYTE:
        raw = _encoded(text, wrong)
        if max(raw, default=0) < 0x80:
            continue
        if _is_utf8(raw, 1 if wrong == _LATIN else 2, is_korean):
            return Misread("utf_8", wrong)
        if _is_cp949(raw, wrong):
            return Misread("cp949", wrong)
    is_east_asian = len(_EAST_ASIAN.findall(text)) >= 0.5 * len(foreign)
    for wrong in _DOUBLE_BYTE:
        raw = _encoded(text, wrong)
        if raw.count(b"&#") > 0.2 * len(foreign):
            # text in this encoding would hardly have characters that the encoding lacks
            continue
        if _is_utf8(raw, 2 if wrong == "cp949" else 3, is_korean) or _has_utf8_row(raw, wrong):
            return Misread("utf_8", wrong)
        if is_east_asian and not is_korean and wrong != "cp949" and _is_korean_in(raw, "cp949", 5):
            return Misread("cp949", wrong)
    if not is_korean:
        for wrong in _UTF16:
            raw = text.encode(wrong, "surrogatepass")
            if _is_utf8(raw, 3, is_korean):
                return Misread("utf_8", wrong)
            for right in ("cp949", *_UTF16):
                if right != wrong and _is_korean_in(raw, right, 5 if right == "cp949" else 3, is_rare=right in _UTF16):
                    return Misread(right, wrong)
        for right in _UTF16:
            if _is_korean_in(_encoded(text, _LATIN), right, 3, is_rare=True):
                return Misread(right, _LATIN)
    return _find_below(text, layers - 1) if layers > 1 else None


def _find_below(text: str, layers: int) -> Misread | None:
    """Undo one misreading of UTF-8 and look again: text can be misread on every copy."""
    once = _HIGH_LATIN.sub(lambda run: _decoded(_encoded(run.group(), _LATIN), run.group()), text)
    if once != text and (found := _find(once, layers)):
        return found
    try:
        once = text.encode("cp949").decode("utf-8")
    except UnicodeError:
        return None
    return _find(once, layers) if once != text else None


def _decoded(raw: bytes, otherwise: str) -> str:
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError:
        return otherwise


def _encoded(text: str, encoding: str) -> bytes:
    """Return the bytes of `text`: `?` for each character that was lost, ASCII for those that the encoding does not have."""
    text = text.replace("\ufffd", "?")
    if encoding == _LATIN:
        text, encoding = text.translate(_LATIN_TO_BYTES), "latin-1"
    return text.encode(encoding, "xmlcharrefreplace")


def _is_korean(text: str) -> bool:
    """Return whether `text` is Korean as it stands: most of its letters outside ASCII are frequent syllables."""
    letters = [sign for sign in unicodedata.normalize("NFC", text) if sign > "\x7f" and sign.isalpha() and not "ㄱ" <= sign <= "ㆎ"]
    return bool(letters) and sum(sign in _FREQUENT for sign in letters) >= 0.5 * len(letters)


def _is_utf8(raw: bytes, min_characters: int, is_korean: bool) -> bool:
    """Return whether the bytes above ASCII form at least `min_characters` characters in UTF-8, apart from lost ones."""
    high = len(raw) - len(raw.translate(None, bytes(range(0x80, 0x100))))
    whole = certain = partial = explained = 0
    for found in _UTF8.finditer(raw):
        sequence = found.group()
        if _WHOLE.fullmatch(sequence):
            whole += 1
            sign = sequence.decode("utf-8", "replace")
            certain += sign in common_syllables() or len(sequence) == 4
            explained += len(sequence)
        else:
            partial += b"?" in sequence
            explained += sum(byte >= 0x80 for byte in sequence)
    if not is_korean and partial >= 3 and explained >= 0.9 * high:
        return True
    # a lone sequence is proof only if it is a common syllable or an emoji: é»… can be a quotation's end
    is_certain = (certain > 0 or whole > 1) if min_characters == 1 else certain >= 0.5 * whole
    return whole >= min_characters and is_certain and explained >= 0.75 * high


def _has_utf8_row(raw: bytes, wrong: str) -> bool:
    """Return whether `raw` holds three syllables of UTF-8 in a row. Other text may surround them.

    In CP949, two frequent ones are proof.
    """
    rows = [row.decode("utf-8", "replace") for row in _ROW.findall(raw)]
    if wrong == "cp949" and any(map(_FREQUENT.issuperset, rows)):
        return True
    return any(len(row) >= 3 and sum(sign in common_syllables() for sign in row) >= 0.5 * len(row) for row in rows)


def _is_cp949(raw: bytes, wrong: str) -> bool:
    """Return whether nearly all bytes above ASCII, which stand for other characters in `raw`, form Korean in CP949."""
    decoded = raw.decode("cp949", "replace")
    foreign = [sign for sign in decoded if sign > "\x7f" and not "ㄱ" <= sign <= "ㅣ"]
    syllables = [sign for sign in foreign if sign in common_syllables()]
    kinds = len(set(syllables))
    if kinds < 2 or len(syllables) < 0.8 * len(foreign):
        return False
    frequent = sum(sign in _FREQUENT for sign in syllables)
    # four syllables don't come about by chance, except from box-drawing characters and Cyrillic capitals
    if kinds >= 4:
        return wrong in _LATIN_SCRIPT or frequent >= 0.6 * len(syllables)
    return wrong == _LATIN and frequent >= 0.5 * len(syllables)


def _is_korean_in(raw: bytes, encoding: str, min_syllables: int, *, is_rare: bool = False) -> bool:
    """Return whether `raw` is Korean in `encoding`.

    Other scripts share CP949's bytes, so only the most frequent syllables are proof. `is_rare` says that they hardly share any.
    """
    decoded = raw.decode(encoding, "replace")
    foreign = [sign for sign in decoded if sign > "\x7f" and not "ㄱ" <= sign <= "ㅣ"]
    syllables = [sign for sign in foreign if sign in common_syllables()]
    frequent = sum(sign in _FREQUENT for sign in syllables)
    is_likely = frequent >= 0.7 * len(syllables) or (is_rare and len(syllables) >= 5)
    # text in one script has only a few different bytes in every other place
    is_varied = len({ord(sign) & 0xFF for sign in syllables}) >= 3
    return len(syllables) >= min_syllables and is_varied and len(syllables) >= 0.8 * len(foreign) and is_likely
