"""Analyse Korean text: split it into sentences and morphemes, and find polite speech.

The morphological analyser is Kiwi (https://github.com/bab2min/Kiwi, Python package kiwipiepy). Its tags follow the Sejong tag
set: EF sentence-final ending, EC connective ending, JX auxiliary particle, IC interjection, SF for . ! ? and so on. The first
use loads the model, which takes about a second and 450 MiB.
"""

from __future__ import annotations

import unicodedata
import warnings
from collections.abc import Iterator, Sequence
from functools import cache, lru_cache
from itertools import zip_longest
from typing import TYPE_CHECKING, Final, NamedTuple

import regex

if TYPE_CHECKING:
    from kiwipiepy import Kiwi, Sentence, Token

MAX_ANALYSED_CHARACTERS: Final = 200
"""Kiwi is slow on very long words, so longer text is truncated. The schema does not allow longer replies."""

# interjections that people send as whole messages; Kiwi's model tags some of them as nouns or single letters
_REACTIONS: Final = (
    "헐",
    "앗",
    "엥",
    "읏",
    "꺅",
    "꺄",
    "으악",
    "으아",
    "우와",
    "와아",
    "오예",
    "아싸",
    "얏호",
    "푸하하",
    "아오",
    "쳇",
    "에구",
    "아구",
    "어머",
)


@cache
def _kiwi() -> Kiwi:
    from kiwipiepy import Kiwi

    with warnings.catch_warnings():
        # 0 meant all cores before kiwipiepy 0.21, which it still warns of
        warnings.simplefilter("ignore", DeprecationWarning)
        # no threads: single short lines have no use for them, and `data.workers` forks
        kiwi = Kiwi(num_workers=0)
    for word in _REACTIONS:
        kiwi.add_user_word(word, "IC", 0)
    return kiwi


# --- sentences -----------------------------------------------------------------------------------------

# words that never form a sentence, even in a row
_INTERJECTION: Final = regex.compile(
    "(?:[오와우아어앗엇헉헐음흠흥응웅엥에야하호히헤후휴으이잉힝흑쳇칫캬꺄악윽읏옹앙엉얍참짠쉿굿콜옛크]|아이[고구쿠]|[에아][고구]|어머나?|세상에|맙소사"
    "|대박|진짜로?|정말|미쳤다|그래|그럼|그치|글쎄|아니|맞아|안녕|오케이|오키|[화파]이팅|[아앗]싸|저런|이런|있지|오예|오호|푸하하|예|그랬구나|그렇구나|그러게|그렇지|아하|하암|자자|에잇|헥헥|흐음|흐어|잠깐|어휴|ok(?:ay)?|wow|lol|yay|hi)+",
    regex.IGNORECASE,
)
# interjections when alone, but words of a sentence otherwise (왜 그래)
_ALONE: Final = frozenset(("뭐", "뭐야", "왜", "자"))
# letters except single jamo, as in ㅋㅋ and ㅠㅠ
_WORD: Final = regex.compile(r"[\p{L}--[ㄱ-ㅣ]]+", regex.VERSION1)
_LAUGH_OR_CRY: Final = regex.compile("[ㅋㅎㅠㅜ]{2,}")
# connective endings that also end messages in chat: they end a sentence only before punctuation
_GOES_ON: Final = ("데", "니까", "고", "지만", "면", "서", "려고")


def sentences(text: str) -> list[str]:
    """Return the sentences of `text`, in order, without bare interjections (`오!`, `ㅋㅋ`, `아 진짜?`).

    Kiwi splits the text, with four corrections. No sentence ends at a comma (`할 거야, 말 거야?` is one) or at a connective ending
    without punctuation (`땀이 얼만데 너무하네`). A choice is one question (`앞면이야 뒷면이야?`). Every line break ends a sentence.
    """
    return list(_sentences(unicodedata.normalize("NFC", text)[:MAX_ANALYSED_CHARACTERS]))


# cached, because the linter asks twice per reply: for the number of sentences and for a question
@lru_cache(maxsize=64)
def _sentences(text: str) -> tuple[str, ...]:
    found: list[str] = []
    for line in text.splitlines():
        pending = ""
        pieces = list(_pieces(line))
        for piece, following in zip_longest(pieces, pieces[1:]):
            pending = f"{pending} {piece.text}".strip()
            if not _goes_on(piece, following):
                found.append(pending)
                pending = ""
        found.append(pending)
    return tuple(sentence for sentence in found if _is_sentence(sentence))


def sentence_count(text: str) -> int:
    """Return the number of sentences in `text`; 0 for a bare interjection."""
    return len(sentences(text))


class _Piece(NamedTuple):
    text: str
    tokens: Sequence[Token]


# cached, because several rules look at the same reply, and the analysis costs more than all of them
@lru_cache(maxsize=64)
def _analysed(line: str) -> Sequence[Sentence]:
    found: Sequence[Sentence] = _kiwi().split_into_sents(line, return_tokens=True, return_sub_sents=False)
    return found


def morphemes(text: str) -> list[tuple[str, str]]:
    """Return the morphemes of `text` in order, as pairs of form and Sejong tag: [("밥", "NNG"), ("먹", "VV"), ("자", "EF")]."""
    lines = unicodedata.normalize("NFC", text)[:MAX_ANALYSED_CHARACTERS].splitlines()
    return [(token.form, str(token.tag)) for line in lines for part in _analysed(line) for token in part.tokens or []]


def _pieces(line: str) -> Iterator[_Piece]:
    """Yield Kiwi's sentences, split once more after ㅋㅋ or ㅠㅠ that follows an ending (배고프다ㅋㅋ 뭐 먹을래)."""
    has_laughter = _LAUGH_OR_CRY.search(line) is not None
    for sentence in _analysed(line):
        if not has_laughter:
            yield _Piece(sentence.text.strip(), sentence.tokens or [])
            continue
        begin, first = sentence.start, 0
        tokens = sentence.tokens or []
        for at in range(1, len(tokens) - 1):
            before = tokens[at - 1]
            is_ending = str(before.tag) in ("EF", "EC") and not before.form.endswith(_GOES_ON)
            if is_ending and _LAUGH_OR_CRY.fullmatch(tokens[at].form):
                end = tokens[at].start + tokens[at].len
                yield _Piece(line[begin:end].strip(), tokens[first : at + 1])
                begin, first = end, at + 1
        yield _Piece(line[begin : sentence.end].strip(), tokens[first:])


def _goes_on(piece: _Piece, following: _Piece | None) -> bool:
    """Return whether Kiwi split too early: the sentence in `piece` continues in `following`."""
    last = piece.tokens[-1] if piece.tokens else None
    if last is None or following is None:
        return False
    if last.form in (",", "，"):
        return True
    # NNB: Kiwi can mistake the ending -ㄴ데 for the noun 데
    if str(last.tag) not in ("EF", "EC", "NNB"):
        return False
    is_choice = following.text.endswith("?") and last.form in [token.form for token in following.tokens[-3:]]
    return is_choice or last.form.endswith(_GOES_ON)


def _is_sentence(piece: str) -> bool:
    words = _WORD.findall(piece)
    if len(words) == 1 and words[0] in _ALONE:
        return False
    return any(not _INTERJECTION.fullmatch(word) for word in words)


# --- speech level --------------------------------------------------------------------------------------

_PERHAPS_FORMAL: Final = regex.compile("[요욬욯욥욤용죠쇼뇨여염]|니다|니당|니닷|니까|시오|시다|네|넵|넹|옙")
_QUOTED: Final = regex.compile("[\"“'‘「『][^\"”'’」』]{0,80}[\"”'’」』](?=[가-힣])")
_LAUGHTER_IN_CODA: Final = regex.compile("[가-힣][ㄱ-ㅎ]")
# 마요 means mayonnaise after these words and "don't" elsewhere (걱정 마요)
_MAYONNAISE: Final = regex.compile("(참치|치킨|스팸|불닭|김치|명란|새우|와사비|콘) (마요)")
_FORMAL_ENDINGS: Final = (
    # (ending of the morpheme, name in messages)
    ("니다", "-ㅂ니다"),
    ("니까", "-ㅂ니까"),
    ("시오", "-시오"),
    ("ᆸ쇼", "-시오"),
    ("시다", "-ㅂ시다"),
    ("죠", "-죠"),
    ("요", "-요"),
    ("여", "-요"),
)
_POLITE_WORDS: Final = frozenset(("네", "네네", "넵", "넵넵", "넹", "옙", "아뇨", "아니요"))


def formal_endings(text: str) -> list[str]:
    """Return the polite endings (존댓말: 해요체 and 합쇼체) in `text`, in order, such as `-요` or `-ㅂ니다`.

    Words that only look polite (필요, 가요 as a song, 그러니까, 아니다) and quotations ("감사합니다"라고 해) don't count.
    """
    composed = unicodedata.normalize("NFC", text)[:MAX_ANALYSED_CHARACTERS]
    if not _PERHAPS_FORMAL.search(composed):
        return []
    tokens = _spoken_tokens(_MAYONNAISE.sub(r"\1\2", _QUOTED.sub("", composed)))
    found = (_formal_ending(tokens, index) for index in range(len(tokens)))
    return [ending for ending in found if ending]


def _spoken_tokens(text: str) -> Sequence[Token]:
    """Return the tokens of `text`, without letters that chat appends to a last syllable: 했어욬ㅋㅋ, 했어용."""
    if text.splitlines() == [text] and not _LAUGHTER_IN_CODA.search(text):
        # `sentences` has analysed this text, and only laughter makes a difference between the two analyses
        return [token for part in _analysed(text) for token in part.tokens or []]
    found: Sequence[Token] = _kiwi().tokenize(text, normalize_coda=True, z_coda=True)
    return found


def is_formal(text: str) -> bool:
    """Return whether `text` contains 존댓말 outside quotations."""
    return bool(formal_endings(text))


def _formal_ending(tokens: Sequence[Token], index: int) -> str | None:
    token = tokens[index]
    form, tag = token.form, str(token.tag)
    if form in _POLITE_WORDS and tag in ("IC", "NNG"):
        # 네 also means "your" and "four"; it means "yes" only before punctuation or at the end
        following = tokens[index + 1] if index + 1 < len(tokens) else None
        return "네" if following is None or str(following.tag).startswith(("SF", "SP", "SO", "SW", "W")) else None
    if form == "요" and index:
        # the polite particle is tagged JX or attached to another word (그건요, 운동요), unlike the 요 of `요 앞` and `요?`
        before = tokens[index - 1]
        is_attached = token.start == before.start + before.len and before.form != "요"
        return "-요" if tag == "JX" or is_attached else None
    if tag not in ("EF", "EC"):
        return None
    if form == "오" and index and tokens[index - 1].form == "시":
        return "-시오"
    if form in ("니까", "으니까", "ᆯ까"):
        return None
    for ending, name in _FORMAL_ENDINGS:
        if form.endswith(ending):
            # as an ending of its own, 여 is the informal 하여; merged with another ending, a playful 요 (했어여, 하세여)
            return None if form == "여" or (name == "-ㅂ니까" and not form.endswith(("ᆸ니까", "습니까"))) else name
    return None
