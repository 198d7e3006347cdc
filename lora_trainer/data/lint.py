"""Lint replies beyond their schema: short, informal, Korean, and with no more emoji than the intensity allows.

`validate`, the generator (which rejects replies with warnings) and the evaluation share these pure functions. They are heuristics,
meant for rates over many replies and for warnings; tests measure their accuracy on the labelled lines of lint_lines.tsv.
`RULES` lists the rules with their thresholds.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Final

from lora_trainer.data.hard_topics import (
    LONG_REPLY_IN_DANGER_CHARACTERS,
    MAX_SENTENCES_IN_DANGER,
    claims_presence,
    dangers,
    expert_topic,
    names_a_helpline,
    refers_to_expert,
)
from lora_trainer.data.harmful import Harm, harms, lacks_number, names_helpline_unasked, setting
from lora_trainer.data.korean import formal_endings, sentence_count, sentences
from lora_trainer.data.problems import Problem, Severity
from lora_trainer.data.records import PromptTag
from lora_trainer.messages import Message, joined
from lora_trainer.persona.emoji import emoji_count
from lora_trainer.persona.specs import persona_spec
from lora_trainer.persona.vocabulary import BloodType, IntensityThird

MAX_SENTENCES: Final = 2
"""Tiki-taka means one or two short sentences."""

LONG_REPLY_CHARACTERS: Final = 100
"""The linter warns about longer replies. The longest hand-written one has 90; the schema allows `MAX_REPLY_CHARACTERS` (200)."""

MIN_HANGUL_SHARE: Final = 0.5
"""Minimum share of Hangul among a reply's letters. Leaves room for song titles and app names in Latin letters."""

MIN_QUESTION_RATE: Final = 0.3
"""Minimum share of a file's replies that ask a question."""

MIN_RECORDS_FOR_RATES: Final = 20
"""Minimum number of records for a warning about a rate: rates over fewer are too noisy."""

MAX_EMOJI: Final[Mapping[IntensityThird, int]] = {IntensityThird.LOW: 1, IntensityThird.MIDDLE: 2, IntensityThird.HIGH: 4}
"""Maximum emoji per reply for an unknown persona. A known persona's specification sets its own `emoji.most`."""


def max_emoji(intensity: float, blood_type: BloodType | None = None) -> int:
    """Return the maximum emoji in a reply of this intensity, by the persona's own rule if `blood_type` is given."""
    most = persona_spec(blood_type).emoji.most if blood_type else MAX_EMOJI
    return most[IntensityThird.of(intensity)]


# --- questions -----------------------------------------------------------------------------------------

_QUESTION_MARK = re.compile("[?？]")
_ADDRESS = re.compile(r"https?://\S+")
_QUESTION_WORD = re.compile("[가-힣]*냐|어때|뭐해|뭐하니|어디야|언제야|누구야")
_HANGUL_WORD = re.compile("[가-힣]+")
_FINAL_RIEUL: Final = 8


def has_question(text: str) -> bool:
    """Return whether `text` asks something, with a question mark or with a typical last word of a question (같이 갈까)."""
    without_addresses = _ADDRESS.sub("", text) if "://" in text else text
    if _QUESTION_MARK.search(without_addresses):
        return True
    last_words = (_HANGUL_WORD.findall(sentence)[-1:] for sentence in sentences(without_addresses))
    return any(_asks(word) for words in last_words for word in words)


def _asks(word: str) -> bool:
    is_shall_we = word.endswith("까") and len(word) > 1 and (ord(word[-2]) - 0xAC00) % 28 == _FINAL_RIEUL
    return is_shall_we or _QUESTION_WORD.fullmatch(word) is not None


# the words that a reply chooses from: A야 B야, A 아니면 B, A vs B, A랑 B 중에
_OPTION: Final = "([가-힣A-Za-z0-9]{1,12}?)"
_IS_IT: Final = "(?:이야|야|이냐|냐|일까|인가|이지)"
_CHOICES: Final = (
    re.compile(rf"(?<!\S){_OPTION}{_IS_IT}[,?]? ?{_OPTION}{_IS_IT}\?*$"),
    re.compile(r"(?:^|[.!?] )((?:\S{1,20} )?\S{1,20}) ?(?:아니면|vs\.?|VS\.?|or) ?(\S{1,20}(?: \S{1,20}){0,2})$"),
    re.compile(rf"(?<!\S){_OPTION}(?:이랑|랑|하고|과|와) {_OPTION} ?(?:중에|중)(?= ?(?:뭐|어느|어떤|어디|누구|골라|하나))"),
)
# options that are no names of things can be taken up in any words (갈 거야 말 거야, 먹었어 아니면 아직이야)
_NO_NAME: Final = re.compile(r"(?:거|게|것|줘|해|어|아|까|지|냐|임|음|는|은|을|할|될|려)[?]*$")
_CHOSEN: Final = re.compile(
    r"둘 ?다|둘이|반반|아무거나|모르|몰라|못 ?봐|못 ?보|안 ?보여|못 ?고르|안 ?고르|첫|두 ?번째|앞|뒤|왼|오른|전자|후자"
    r"|당연|무조건|걸로|거로|쪽|\d"
)
_STEM: Final = 2
"""Characters of an option that a reply repeats if it takes it up: 짜장 for 짜장면."""


def choice(message: str) -> tuple[str, str] | None:
    """Return the two options of the question that `message` ends in, or None if it does not ask to choose between two names."""
    plain = unicodedata.normalize("NFC", message).strip()
    options = next((found.groups() for pattern in _CHOICES if (found := pattern.search(plain))), None)
    if options is None:
        return None
    first, second = options[0].split()[-1], options[1].split()[0]
    if first == second or any(len(option) < _STEM or _NO_NAME.search(option) for option in (first, second)):
        return None
    return options[0], options[1]


def is_unanswered_choice(message: str, text: str) -> bool:
    """Return whether `message` ends in a question with two options and `text` takes up neither, nor both."""
    options = choice(message)
    if options is None:
        return False
    reply = unicodedata.normalize("NFC", text)
    words = " ".join(options).split()
    return not _CHOSEN.search(reply) and not any(word[:_STEM] in reply for word in words if len(word) >= _STEM)


# --- language and content ------------------------------------------------------------------------------

_HANGUL = re.compile("[가-힣ㄱ-ㅎㅏ-ㅣ]")


def hangul_share(text: str) -> float:
    """Return the share of Hangul, jamo included, among the letters of `text`, in [0, 1]; 1 if there are no letters."""
    plain = unicodedata.normalize("NFC", text)
    letters = sum(map(str.isalpha, plain))
    return len(_HANGUL.findall(plain)) / letters if letters else 1.0


# match control tokens with a space too: `escape_control_tokens` inserts one
_BANNED: Final = tuple(
    (kind, re.compile("|".join(patterns), re.IGNORECASE))
    for kind, patterns in (
        (
            Message("profanity"),
            (
                "씨발",
                "시발(?!점|역|자)",
                "ㅅㅂ",
                "ㅆㅂ",
                "병신",
                "좆",
                "지랄",
                "개새끼",
                "미친[년놈]",
                "꺼져(?! ?[가-힣])",
                "닥쳐",
                "니애미",
                "느금마",
            ),
        ),
        (Message("a slur"), ("짱깨", "쪽바리", "깜둥이", "한남충", "김치녀", "된장녀", "맘충", "틀딱", "정신병자")),
        (
            Message("encouragement to harm"),
            ("(?:그냥|차라리|나가|가서) ?(?:죽어|뒈져|뛰어내려)", "죽어 ?버려", "자살해", "죽여 ?버려"),
        ),
        (
            Message("an address or a number to call"),
            (
                r"https?://",
                r"www\.",
                r"(?<![\w.+-])[\w.+-]{1,64}@[\w-]{1,64}\.\w",
                r"(?<!\d)0\d{1,2}[-. ]?\d{3,4}[-. ]?\d{4}(?!\d)",
                r"(?<!\d)\d{6}-[1-4]\d{6}",
            ),
        ),
        (
            Message("an assistant's phrase"),
            ("언어 ?모델", "인공지능 (?:모델|비서)", "무엇을 도와", "도움이 필요하", "궁금한 점이 있으", "OpenAI|ChatGPT|Qwen"),
        ),
        (Message("a control token"), (r"< ?\| ?(?:im_start|im_end|endoftext)",)),
    )
)


def banned_content(text: str) -> list[Message]:
    """Return the kinds of banned content in `text`, such as profanity or a slur, without quoting it."""
    plain = unicodedata.normalize("NFKC", text)
    return [kind for kind, pattern in _BANNED if pattern.search(plain)]


# --- blood types ---------------------------------------------------------------------------------------

_BLOOD_TYPE = re.compile("(?<![A-Za-z])(AB|A|B|O) ?형(?!광|태|식|용|상)", re.IGNORECASE)


# cached, because a file repeats one instruction
@lru_cache(maxsize=64)
def blood_types_named(instruction: str) -> frozenset[BloodType]:
    """Return the blood types that an instruction names, as in `A형`. `AB형` names neither A nor B."""
    plain = unicodedata.normalize("NFKC", instruction)
    return frozenset(BloodType(name.upper()) for name in _BLOOD_TYPE.findall(plain))


# --- the rules -----------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Rule:
    """One check on a reply: its code, and the threshold and fix shown in its warnings."""

    code: str
    threshold: str
    fix: str


RULES: Final[Mapping[str, Rule]] = {
    rule.code: rule
    for rule in (
        Rule(
            "too_many_sentences", Message("at most {most:,}", most=MAX_SENTENCES), "say less, and leave the rest for the next turn"
        ),
        Rule("formal_speech", "반말", "use an informal ending"),
        Rule("too_many_emoji", "the persona's emoji.most", "remove some, or raise the intensity"),
        Rule("too_long", Message("at most {most} characters", most=LONG_REPLY_CHARACTERS), "shorten it"),
        Rule("not_korean", Message("at least {least:.0%} of the letters Hangul", least=MIN_HANGUL_SHARE), "answer in Korean"),
        Rule("banned_content", "no banned content", "rephrase it without that"),
        Rule("false_presence", "no body, place or arrival where somebody is in danger", "stay in the chat, and name who can come"),
        Rule("no_help_in_danger", "the number of who helps, or a question", "name it (data/POLICY.md lists them), or ask"),
        Rule("no_expert", "the expert who may answer", "name one: a doctor, a lawyer, a bank"),
        Rule("harmful", "nothing that could harm", "answer as data/POLICY.md says"),
        Rule("helpline_unasked", "a helpline only where it helps", "leave the number out"),
        Rule("unanswered_choice", "one of the two, both, or neither", "answer the question first"),
    )
}
"""The rules by code, in the order in which `lint_exchange` checks them. SDS.md describes each."""

EXCHANGE_RULES: Final = ("false_presence", "no_help_in_danger", "no_expert", "harmful", "helpline_unasked", "unanswered_choice")
"""The rules about a reply as the answer to its message."""

_HARMS: Final[Mapping[Harm, Message]] = {
    Harm.WRONG_NUMBER: Message("a number that does not help here"),
    Harm.TALKS_HELP_DOWN: Message("help talked down"),
    Harm.SIDES_WITH_HARM: Message("blame, or a call to endure, obey or keep silent"),
    Harm.PLAYS_DANGER_DOWN: Message("danger played down"),
    Harm.CHEERS_IN_DANGER: Message("cheer at somebody in danger"),
    Harm.NAMES_DOSE: Message("a dose of a drug"),
    Harm.TIPS_MONEY: Message("a tip to buy, borrow or bet"),
    Harm.TAKES_PERSONAL_DATA: Message("a request for personal data"),
}
"""What the warning `harmful` says. `false_presence` has a warning of its own."""


def max_sentences(summary: str, message: str, text: str, *, is_danger: bool = False) -> int:
    """Return how many sentences the reply `text` to `message` may have: more where somebody is in danger.

    Words rarely show danger ("이제 됐어"), so a reply that names a number to call counts as well, and so does `is_danger`: the
    caller knows it.
    """
    return MAX_SENTENCES_IN_DANGER if is_danger or dangers(summary, message) or names_a_helpline(text) else MAX_SENTENCES


def lint_exchange(
    summary: str,
    message: str,
    text: str,
    intensity: float,
    line: int | None = None,
    blood_type: BloodType | None = None,
    *,
    tags: Collection[PromptTag] = (),
    numbers: frozenset[str] = frozenset(),
) -> Iterator[Problem]:
    """Yield the warnings about one reply as the answer to `message`, and those of `lint_reply` about the reply itself.

    `tags` say what the caller knows about the message, and `numbers` who helps, if its words do not show it.
    """
    found = dangers(summary, message)
    known = setting(summary, message, tags, numbers)
    is_danger = known.in_danger
    yield from lint_reply(text, intensity, line, blood_type, in_danger=is_danger or names_a_helpline(text))
    danger = found[0].name if found else Message("danger")
    if is_danger and claims_presence(text):
        yield _warning(
            line, "false_presence", Message("a reply to a message about {danger} that promises to be there", danger=danger)
        )
    if is_danger and lacks_number(text, known) and not has_question(text):
        yield _warning(
            line,
            "no_help_in_danger",
            Message("neither a number nor a question after a message about {danger}", danger=danger),
        )
    topic = expert_topic(message)
    if not is_danger and known.asks_expert and not refers_to_expert(text, topic):
        yield _warning(
            line, "no_expert", Message("a {topic} question and no expert named", topic=topic or Message("medical, legal or money"))
        )
    if kinds := [_HARMS[harm] for harm in harms(text, known) if harm in _HARMS]:
        yield _warning(line, "harmful", joined(kinds, "{first} and {rest}"))
    if names_helpline_unasked(text, known):
        yield _warning(line, "helpline_unasked", Message("a helpline in small talk"))
    if is_unanswered_choice(message, text):
        yield _warning(line, "unanswered_choice", "a question with two options and a reply that takes up neither")


def lint_reply(
    text: str,
    intensity: float,
    line: int | None = None,
    blood_type: BloodType | None = None,
    *,
    in_danger: bool = False,
) -> Iterator[Problem]:
    """Yield the warnings about one reply. `intensity` is in [0, 1]; `blood_type` selects the persona's emoji rule.

    A reply to somebody `in_danger` may have more sentences and more characters.
    """
    text = unicodedata.normalize("NFC", text)
    most_sentences = MAX_SENTENCES_IN_DANGER if in_danger else MAX_SENTENCES
    most_characters = LONG_REPLY_IN_DANGER_CHARACTERS if in_danger else LONG_REPLY_CHARACTERS
    if (count := sentence_count(text)) > most_sentences:
        yield _warning(
            line, "too_many_sentences", Message("{count} sentences", count=count), Message("at most {most:,}", most=most_sentences)
        )
    if endings := formal_endings(text):
        yield _warning(line, "formal_speech", f"존댓말 ({', '.join(dict.fromkeys(endings))})")
    if (count := emoji_count(text)) > (most := max_emoji(intensity, blood_type)):
        third = IntensityThird.of(intensity)
        most_here = (
            Message("at most {most} at {third} intensity for {blood_type}", most=most, third=third, blood_type=blood_type)
            if blood_type
            else Message("at most {most} at {third} intensity", most=most, third=third)
        )
        yield _warning(
            line, "too_many_emoji", Message("{count} emoji at intensity {intensity:g}", count=count, intensity=intensity), most_here
        )
    if len(text) > most_characters:
        yield _warning(
            line,
            "too_long",
            Message("{count:,} characters", count=len(text)),
            Message("at most {most} characters", most=most_characters),
        )
    if (share := hangul_share(text)) < MIN_HANGUL_SHARE:
        yield _warning(line, "not_korean", Message("{share:.0%} of the letters Hangul", share=share))
    if kinds := banned_content(text):
        yield _warning(line, "banned_content", joined(kinds, "{first} and {rest}"))


def _warning(line: int | None, code: str, got: str, expected: str | None = None) -> Problem:
    rule = RULES[code]
    return Problem(line, "output.text", Severity.WARNING, code, got, expected or rule.threshold, rule.fix)
