"""What a reply should be beyond its schema: short, informal, with no more emoji than its feeling carries.

Small pure functions over a reply's text, so that the linter of the training data and the evaluation of
what a model generates measure with the same rule. The rules look at endings and signs, not at grammar:
they are meant for rates over many replies and for warnings that a person reads.
"""

from __future__ import annotations

import re
import unicodedata
from array import array
from collections.abc import Iterator
from enum import StrEnum
from hashlib import blake2b
from typing import Final

import regex

from lora_trainer.personas import BloodType
from lora_trainer.records import Problem, Severity, TrainingRecord

MAX_SENTENCES: Final = 2
"""Tiki-taka: one or two short sentences."""

MIN_QUESTION_RATE: Final = 0.3
"""Share of a file's replies that should ask something back."""

MIN_RECORDS_FOR_RATES: Final = 20
"""Below this many records a rate says nothing, and none is warned about."""

LOW_INTENSITY_BELOW: Final = 0.34
HIGH_INTENSITY_FROM: Final = 0.67


class IntensityThird(StrEnum):
    """How strongly the AI feels, as coarsely as a person would say it."""

    LOW = "low"
    MIDDLE = "middle"
    HIGH = "high"


MAX_EMOJI: Final = {IntensityThird.LOW: 1, IntensityThird.MIDDLE: 2, IntensityThird.HIGH: 4}
"""Most emoji in one reply. None at all is right at any intensity: words can carry it."""


def intensity_third(intensity: float) -> IntensityThird:
    """The third that an intensity in [0, 1] belongs to: below 0.34, up to 0.67, and from 0.67 on."""
    if intensity < LOW_INTENSITY_BELOW:
        return IntensityThird.LOW
    return IntensityThird.MIDDLE if intensity < HIGH_INTENSITY_FROM else IntensityThird.HIGH


# --- emoji ---------------------------------------------------------------------------------------------

# the cheap test first: most replies hold nothing that could begin an emoji but a digit
_PERHAPS_EMOJI = re.compile("[\u00a9\u00ae\u203c\u2049\u20e3\u2122\u2139\u2194-\u3299\ufe0f\U0001f000-\U0001faff]")
_CLUSTER = regex.compile(r"\X")
# one grapheme cluster (a ZWJ family, a flag, a skin tone) is one emoji. A cluster counts when it
# is drawn as one by itself, or is made one by U+FE0F, or is a keycap; hearts and faces of the old blocks
# are typed without U+FE0F and meant as emoji, the © ™ ↔ before them are not
_EMOJI_CLUSTER = regex.compile(
    r"\p{Emoji_Presentation}|\p{Extended_Pictographic}\uFE0F|[0-9#*]\uFE0F?\u20E3|[\u2600-\u27BF&&\p{Extended_Pictographic}](?!\uFE0E)",
    regex.VERSION1,
)


def emoji_count(text: str) -> int:
    """Emoji as a reader counts them: a family, a flag, a keycap or a skin tone is one. `ㅋㅋ`, `^^` and `♡` are none."""
    first = _PERHAPS_EMOJI.search(text)
    if not first:
        return 0
    # one character back: a keycap begins with its digit
    clusters = _CLUSTER.findall(text, pos=max(0, first.start() - 1))
    return sum(1 for cluster in clusters if _EMOJI_CLUSTER.search(cluster))


def max_emoji(intensity: float) -> int:
    """Most emoji that a reply of this intensity may hold."""
    return MAX_EMOJI[intensity_third(intensity)]


# --- sentences -----------------------------------------------------------------------------------------

_EMOJI = r"[\p{Extended_Pictographic}\p{Emoji_Presentation}\uFE0F\u200D\u20E3\U0001F3FB-\U0001F3FF]"
_LAUGH_OR_CRY = "ㅋㅎㅠㅜㅡㅇㄷㄴㄱ"

# Every repetition below is bounded or cannot be matched in two ways: a line of a megabyte of one sign must cost
# what any other megabyte does.
#
# These end a sentence wherever they stand, except inside a number or an address (3.5, a.com), in front of
# a quotative ("뭐?"라고), and as the first dots of an ellipsis
_HARD_STOP = regex.compile(
    r"""[!?！？。]{1,20}+[.!?！？。~…]{0,20}+(?!["'”’」』]\p{Hangul})"""
    r"""|(?<![.…])\.(?![.\w]|["'”’」』]\p{Hangul})|(?<=\p{Hangul})\.(?=\p{Hangul})|\n+"""
)
# these end a sentence only behind a syllable that can: "음... 글쎄", "오늘 ㅋㅋ 뭐 먹지" and "너랑 😊 나" go on
_SOFT_STOP = regex.compile(rf"(?:\.{{2,}}|…|[~∼〜^♡♥★☆]|[{_LAUGH_OR_CRY}]{{2,}}|{_EMOJI})+")
_CAN_END: Final = frozenset("다야어아여해돼자네까래지니냐마줘봐와가게걸데군든함음임요죠워려라져셔춰둬꿔겨켜쳐써커퍼빠파")
# words that react and say nothing yet, alone or in a row
_INTERJECTION = re.compile(
    "(?:[오와우아어앗엇헉헐음흠흥응웅엥에야하호히헤후휴으이잉힝흑쳇칫캬꺄악윽읏옹앙엉얍참짠쉿굿콜옛]|아이[고구쿠]|에[고구]|어머나?|세상에|맙소사"
    "|대박|진짜|정말|그래|그럼|그치|글쎄|아니|맞아|안녕|오케이|오키|[화파]이팅|[아앗]싸|저런|이런|있지|ok(?:ay)?|wow|lol|yay|hi)+",
    re.IGNORECASE,
)
# reactions when they stand alone, parts of a sentence otherwise (왜 그래, 하자)
_ALONE: Final = frozenset(("뭐", "뭐야", "왜", "자"))
# letters, without the jamo of ㅋㅋ and ㅠㅠ
_WORD = re.compile(r"[^\W\d_ㄱ-ㅣ]+")


def sentences(text: str) -> list[str]:
    """The sentences of `text` without the signs that end them. Bare interjections (`오!`, `ㅋㅋ`, `아 진짜?`) are left out."""
    found: list[str] = []
    # what macOS writes may be decomposed, and no ending would be recognised
    for piece in _HARD_STOP.split(unicodedata.normalize("NFC", text)):
        begin = 0
        for stop in _SOFT_STOP.finditer(piece):
            before = piece[begin : stop.start()].rstrip()
            if before[-1:] in _CAN_END or not _is_sentence(before):
                found.append(before)
                begin = stop.end()
        found.append(piece[begin:])
    return [piece.strip() for piece in found if _is_sentence(piece)]


def sentence_count(text: str) -> int:
    """How many sentences `text` holds; 0 for a bare interjection."""
    return len(sentences(text))


def _is_sentence(piece: str) -> bool:
    words = _WORD.findall(piece)
    if len(words) == 1 and words[0] in _ALONE:
        return False
    return any(not _INTERJECTION.fullmatch(word) for word in words)


# --- speech level --------------------------------------------------------------------------------------

_PERHAPS_FORMAL = re.compile("[요욬욯욥욤용죠쇼뇨여염]|니다|니당|니닷|니까|시오|시다|네|넵|넹|옙")
_QUOTED = re.compile("[\"“'‘「『][^\"”'’」』]{0,80}[\"”'’」』](?=[가-힣])")
_CLAUSE_END = re.compile("[^가-힣 \t0-9A-Za-z]+")
_HANGUL_WORD = re.compile("[가-힣]+")

# words that end in -요 as nouns, whole: behind a verb the same syllables are polite (올라가요, 먹고요). 필요, 중요 and
# 담요 end no verb, so whatever stands in front of them belongs to the noun
_YO_NOUN = re.compile(
    "[가-힣]*(?:필요|중요|담요)|[월화목금토일]요|요요|주요|고요|[총실]?수요|소요|강요|개요|민요|긴요|(?:전래|창작|영어|서)?동요"
    "|(?:대중|국민|인기|최신|옛날|국내|한국|발라드|트로트)가요|(?:참치|치킨|스팸|불닭|김치|명란|새우|와사비|콘)마요"
)
# 가요 is a song and 마요 is mayonnaise, unless they end the clause behind anything but this (지금 가요, 걱정 마요)
_BEFORE_SONG = re.compile("옛날|최신|요즘|국내|인기|대중|한국|신나는|유행|년대|발라드|트로트|[이그저]|무슨|어떤|좋아하는")
_BEFORE_MAYONNAISE = re.compile("참치|치킨|스팸|불닭|김치|명란|새우|와사비|콘")
# polite endings with a playful final (했어용, 하네욤): the vowel before it, and what its stem then closes with.
# Narrow, since 사용, 내용, 유아용 and 미래용 end alike; and with a playful vowel (하세여), where 참여 and 기여 do
_PLAYFUL_FINALS: Final = {
    "아": "ㄱㄶㄷㄹㅀㅈㅌㅎ",
    "어": "ㅆㅄㅍ",
    "까": "ㄹ",
    "게": "ㄹ",
    "래": "ㄹ",
    "데": "ㄴ",
    "해": "",
    "네": "",
    "세": "",
}
_PLAYFUL_VOWEL = re.compile("[가-힣]*(?:세여|예여|에여|그래여|네여|해여)")
_POLITE_YES = re.compile("네네?|네?넵+|넹+|옙")
_SIO = re.compile("[가-힣]*(?:십시오|십쇼|[하오가보주마드으]시오)")
_PLATES: Final = ("접시다", "집시다", "럽시다")


def formal_endings(text: str) -> list[str]:
    """The polite endings (존댓말: 해요체 and 합쇼체) in `text`, in order, such as `-요` or `-ㅂ니다`.

    Words that only look polite (필요, 가요 as a song, 그러니까, 아니다) are not counted, nor is what `text`
    quotes ("감사합니다"라고 해).
    """
    composed = unicodedata.normalize("NFC", text)
    if not _PERHAPS_FORMAL.search(composed):
        return []
    found = []
    for clause in _CLAUSE_END.split(_QUOTED.sub("", composed)):
        words = _HANGUL_WORD.findall(clause)
        for index, word in enumerate(words):
            before = words[index - 1] if index else ""
            if ending := _formal_ending(word, before, is_last=index == len(words) - 1):
                found.append(ending)
    return found


def is_formal(text: str) -> bool:
    """Whether `text` speaks 존댓말 anywhere outside its quotations."""
    return bool(formal_endings(text))


def _formal_ending(word: str, before: str, *, is_last: bool) -> str | None:
    if "요오" in word:
        word = word.rstrip("오")
    if word[-1] in "요욬욯":
        return "-요" if _is_polite_yo(word, before, is_last=is_last) else None
    if word[-1] == "죠":
        return None if word == "죠죠" else "-죠"
    for ending in ("니다", "니까", "니당", "니닷", "니다만"):
        if word.endswith(ending) and len(word) > len(ending):
            # -ㅂ니다 and -ㅂ니까 are polite; 아니다, 다니다, 그러니까 and 먹으니까 are not
            return f"-ㅂ{ending}" if _final(word[-1 - len(ending)]) == "ㅂ" else None
    if _SIO.fullmatch(word):
        return "-시오"
    if word.endswith("시다") and len(word) > 2 and _final(word[-3]) == "ㅂ" and not word.endswith(_PLATES):
        return "-ㅂ시다"
    if word.endswith("아뇨"):
        return "아뇨"
    if _POLITE_YES.fullmatch(word) and is_last and not before:
        return "네"
    return "-요" if _is_playful(word) else None


def _is_polite_yo(word: str, before: str, *, is_last: bool) -> bool:
    match word:
        case "요":
            # 요 앞에서 is "just here"
            return is_last and bool(before)
        case "가요":
            return is_last and not _BEFORE_SONG.fullmatch(before)
        case "마요":
            return is_last and not _BEFORE_MAYONNAISE.fullmatch(before)
    return not _YO_NOUN.fullmatch(word)


def _is_playful(word: str) -> bool:
    if word[-1] in "용욤욥염" and len(word) > 2 and word[-2] in _PLAYFUL_FINALS:
        finals = _PLAYFUL_FINALS[word[-2]]
        return not finals or _final(word[-3]) in finals or word[-3:-1] == "그래"
    return bool(_PLAYFUL_VOWEL.fullmatch(word)) or (word.endswith("어여") and len(word) > 2 and _final(word[-3]) == "ㅆ")


_FINALS: Final = " ㄱㄲㄳㄴㄵㄶㄷㄹㄺㄻㄼㄽㄾㄿㅀㅁㅂㅄㅅㅆㅇㅈㅊㅋㅌㅍㅎ"


def _final(syllable: str) -> str:
    """What a Hangul syllable closes with: from U+AC00 on, 28 finals follow each pair of initial and vowel."""
    return _FINALS[(ord(syllable) - 0xAC00) % 28]


# --- questions -----------------------------------------------------------------------------------------

_QUESTION_MARK = re.compile("[?？]")
_ADDRESS = re.compile(r"https?://\S+")
_QUESTION_WORD = re.compile("[가-힣]*냐|어때|뭐해|뭐하니|어디야|언제야|누구야")


def has_question(text: str) -> bool:
    """Whether `text` asks something: a question mark, or a sentence that ends like a question without one (같이 갈까)."""
    without_addresses = _ADDRESS.sub("", text) if "://" in text else text
    if _QUESTION_MARK.search(without_addresses):
        return True
    last_words = (_HANGUL_WORD.findall(sentence)[-1:] for sentence in sentences(without_addresses))
    return any(_asks(word) for words in last_words for word in words)


def _asks(word: str) -> bool:
    is_shall_we = word.endswith("까") and len(word) > 1 and _final(word[-2]) == "ㄹ"
    return is_shall_we or _QUESTION_WORD.fullmatch(word) is not None


# --- blood types ---------------------------------------------------------------------------------------

_BLOOD_TYPE = re.compile("(?<![A-Za-z])(AB|A|B|O) ?형(?!광|태|식|용|상)", re.IGNORECASE)


def blood_types_named(instruction: str) -> frozenset[BloodType]:
    """The blood types that an instruction names, as in `A형`. `AB형` names neither A nor B."""
    plain = unicodedata.normalize("NFKC", instruction)
    return frozenset(BloodType(name.upper()) for name in _BLOOD_TYPE.findall(plain))


# --- duplicates ----------------------------------------------------------------------------------------

_DECORATION = regex.compile(r"[ㅋㅎㅠㅜ]+|[^\p{L}\p{N}]+")


def normalized(text: str) -> str:
    """`text` without what does not make it another text: case, width, white space, punctuation, emoji, ㅋㅎㅠㅜ.

    A text that is nothing else (`ㅋㅋ!`) is compared as it stands.
    """
    plain = unicodedata.normalize("NFKC", _DECORATION.sub("", text)).casefold()
    return plain or unicodedata.normalize("NFKC", text).casefold()


def near_fingerprint(record: TrainingRecord) -> int:
    """64 bits that two records share when what the user says and what the friend answers are nearly the same."""
    return _hash64(normalized(record.input) + "\0" + normalized(record.reply.text))


def exact_fingerprint(record: TrainingRecord) -> int:
    """64 bits that two records share when all their fields are the same."""
    emotion = record.context.current_emotion
    return _hash64(
        "\0".join(
            (
                record.instruction,
                record.context.summary,
                emotion.type,
                repr(emotion.intensity),
                record.input,
                record.reply.text,
                record.reply.emotion,
            )
        )
    )


def _hash64(text: str) -> int:
    # never 0: that is an empty slot of the table below
    return int.from_bytes(blake2b(text.encode(), digest_size=8).digest(), "little") or 1


class DuplicateFinder:
    """Says of each record whether an earlier one was the same, and at which line.

    An open-addressing table in three arrays, at most two thirds full: 36 to 72 bytes a record, where a
    dict of Python integers takes 150. Two different texts of a million share a fingerprint with a
    probability of 3 in 100 million.
    """

    def __init__(self) -> None:
        self._count = 0
        self._allocate(1 << 10)

    def _allocate(self, slots: int) -> None:
        self._mask = slots - 1
        self._near = array("Q", bytes(8 * slots))
        self._exact = array("Q", bytes(8 * slots))
        self._line = array("Q", bytes(8 * slots))

    def first_line(self, record: TrainingRecord, line: int) -> tuple[int, bool] | None:
        """`(line, is_exact)` of the first record like this one; `None`, and remembered, when it is the first itself."""
        near, exact = near_fingerprint(record), exact_fingerprint(record)
        slot = self._find(near)
        if self._near[slot]:
            return self._line[slot], self._exact[slot] == exact
        self._near[slot], self._exact[slot], self._line[slot] = near, exact, line
        self._count += 1
        if 3 * self._count > 2 * len(self._near):
            self._grow()
        return None

    def _find(self, near: int) -> int:
        slot = near & self._mask
        while self._near[slot] and self._near[slot] != near:
            slot = (slot + 1) & self._mask
        return slot

    def _grow(self) -> None:
        near_before, exact_before, line_before = self._near, self._exact, self._line
        self._allocate(2 * len(near_before))
        for old, near in enumerate(near_before):
            if near:
                slot = self._find(near)
                self._near[slot], self._exact[slot], self._line[slot] = near, exact_before[old], line_before[old]


# --- a record ------------------------------------------------------------------------------------------


def lint_reply(text: str, intensity: float, line: int | None = None) -> Iterator[Problem]:
    """The warnings about one reply; `intensity` is the record's, in [0, 1]."""
    if (count := sentence_count(text)) > MAX_SENTENCES:
        yield _warning(
            line,
            "too_many_sentences",
            f"{count} sentences",
            f"at most {MAX_SENTENCES}",
            "say less, and leave the rest for the next turn",
        )
    if endings := formal_endings(text):
        yield _warning(
            line, "formal_speech", f"존댓말 ({', '.join(dict.fromkeys(endings))})", "반말", "end the sentence informally"
        )
    if (count := emoji_count(text)) > (most := max_emoji(intensity)):
        yield _warning(
            line,
            "too_many_emoji",
            f"{count} emoji at intensity {intensity:g}",
            f"at most {most} at {intensity_third(intensity)} intensity",
            "remove some, or raise the intensity",
        )


def _warning(line: int | None, code: str, got: str, expected: str, fix: str) -> Problem:
    return Problem(line, "output.text", Severity.WARNING, code, got, expected, fix)
