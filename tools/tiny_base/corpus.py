"""Persona-neutral Korean dialogues in the project's record format, as many as asked for, the same for the same seed.

    python -m tools.tiny_base.corpus --records 5

A grammar over the hand-written lines of `frames.py`. Three things are deliberate. A persona's instruction line is
answered as plainly as any other (polite speech in most replies, emoji seldom), so that whatever an adapter shows of
a persona it has learned itself. A manner that is asked for in plain words is obeyed
(반말, 존댓말, emoji by the intensity of the feeling, no emoji), as an instruction-tuned base would: an adapter can
then call on what the base knows, and needn't teach it what an intensity is. And the inputs are much wilder than most
replies (typos, unknown words, 300 characters of rambling), so that the reply format holds on any input; a seventh of
the replies ramble too, so that it also holds around words that only an adapter would write.

No torch here, and none of the bundled persona data.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import sys
from collections.abc import Iterator
from typing import Final, NamedTuple, TypedDict

from lora_trainer.persona.specs import persona_spec
from lora_trainer.persona.vocabulary import BloodType, Expression, Feeling, IntensityThird
from tools.tiny_base import frames, frames_heart, frames_home, frames_leisure, frames_school
from tools.tiny_base.frames import (
    ANYTHING,
    CASUAL_REQUESTS,
    ECHOES,
    EMOJI,
    EMOJI_REQUESTS,
    ENGLISH,
    INSTRUCTIONS,
    NO_EMOJI_REQUESTS,
    OPENERS,
    PARTICLES,
    POLITE_REQUESTS,
    PREFIXES,
    QUOTED,
    RAMBLES,
    REMARKS,
    STRONG,
    TAILS,
    WEAK,
    Family,
    Turns,
)

FAMILIES: Final[tuple[Family, ...]] = (
    *frames.FAMILIES,
    *frames_heart.FAMILIES,
    *frames_home.FAMILIES,
    *frames_leisure.FAMILIES,
    *frames_school.FAMILIES,
)
"""Every kind of situation."""

MAX_INPUT_CHARACTERS: Final = 320

# Which of the AI's feelings go with what the user reports, most likely first.
MOOD_FEELINGS: Final[dict[str, tuple[Feeling, ...]]] = {
    "good": (Feeling.HAPPY, Feeling.EXCITED, Feeling.LOVE, Feeling.SURPRISED, Feeling.NEUTRAL, Feeling.EMBARRASSED, Feeling.TIRED),
    "bad": (Feeling.WORRIED, Feeling.SAD, Feeling.ANGRY, Feeling.TIRED, Feeling.NEUTRAL, Feeling.SURPRISED, Feeling.LOVE),
    "plain": tuple(Feeling),
}

# The face that goes with a feeling: when it is weak, and when it is strong.
FACES: Final[dict[Feeling, tuple[tuple[Expression, ...], tuple[Expression, ...]]]] = {
    Feeling.NEUTRAL: ((Expression.NEUTRAL, Expression.THINK), (Expression.NEUTRAL, Expression.SMILE)),
    Feeling.HAPPY: ((Expression.SMILE, Expression.WINK), (Expression.LAUGH, Expression.SMILE)),
    Feeling.EXCITED: ((Expression.SMILE, Expression.PROUD), (Expression.LAUGH, Expression.PROUD)),
    Feeling.LOVE: ((Expression.SHY, Expression.SMILE), (Expression.LOVE, Expression.WINK)),
    Feeling.SURPRISED: ((Expression.THINK, Expression.SURPRISE), (Expression.SURPRISE,)),
    Feeling.WORRIED: ((Expression.THINK, Expression.WORRY), (Expression.WORRY,)),
    Feeling.SAD: ((Expression.SAD, Expression.WORRY), (Expression.CRY, Expression.SAD)),
    Feeling.ANGRY: ((Expression.POUT,), (Expression.ANGRY, Expression.POUT)),
    Feeling.EMBARRASSED: ((Expression.SHY, Expression.THINK), (Expression.SHY, Expression.POUT)),
    Feeling.TIRED: ((Expression.SLEEPY, Expression.NEUTRAL), (Expression.SLEEPY,)),
}

FACE_EMOJI: Final[dict[Expression, str]] = {
    Expression.NEUTRAL: "🙂😌",
    Expression.SMILE: "😊😄🙂☕🌸🍀",
    Expression.LAUGH: "😂🤣😆🎉🔥",
    Expression.LOVE: "🥰😍💕💖💛",
    Expression.WINK: "😉👍✨😜",
    Expression.PROUD: "😎💪🏆👏",
    Expression.SURPRISE: "😮😲😳👀",
    Expression.THINK: "🤔💭💡",
    Expression.WORRY: "😟🥺😥🙏",
    Expression.SAD: "😢😔😞🌧",
    Expression.CRY: "😭😢💔",
    Expression.ANGRY: "😡😠💢🔥",
    Expression.POUT: "😤🙄😑",
    Expression.SHY: "☺🙈🤭😳",
    Expression.SLEEPY: "😴🥱😪🌙",
}

_SLOT: Final = re.compile(r"\{(\w+)(?::(\w+))?\}")
_CHOICE: Final = re.compile(r"\[([^|\]]*)\|([^|\]]*)\]")
_LAST_COPULA: Final = re.compile(r"(?<=([가-힣]))야(?=[.?!]|$)")
_FIRST_SYLLABLE: Final = 0xAC00
_LAST_SYLLABLE: Final = 0xD7A3
_FINALS: Final = 28
_RIEUL: Final = 8

# initial, medial and final letters (as Unicode orders them) that made-up words are built from: the frequent ones
_MEDIALS: Final = (0, 1, 4, 5, 6, 8, 13, 18, 20)
_WORD_FINALS: Final = (0, 0, 0, 0, 4, 8, 16, 21, 1, 17, 19)


class Emotion(TypedDict):
    type: str
    intensity: float


class Context(TypedDict):
    summary: str
    current_emotion: Emotion


class Output(TypedDict):
    text: str
    emotion: str


class Record(TypedDict):
    """A training record, with `output` as an object."""

    instruction: str
    context: Context
    input: str
    output: Output


def with_particle(word: str, particle: str) -> str:
    """`word` with the form of `particle` that its last letter asks for; particles with one form are appended.

    Raises IndexError for an empty word.
    """
    forms = PARTICLES.get(particle)
    if forms is None:
        return word + particle
    code = ord(word[-1])
    # anything but Hangul takes the form after a vowel: most of the Latin words here end in one when read out
    final = (code - _FIRST_SYLLABLE) % _FINALS if _FIRST_SYLLABLE <= code <= _LAST_SYLLABLE else 0
    after_consonant = final != 0 and not (particle == "으로" and final == _RIEUL)
    return word + forms[0 if after_consonant else 1]


def realise(frame: str, words: dict[str, str], *, polite: bool) -> str:
    """`frame` (see `frames.py`) with its slots filled, in casual or polite speech."""
    text = _CHOICE.sub(lambda match: match[2 if polite else 1], frame).replace("~", "요" if polite else "")
    if polite:
        text = _LAST_COPULA.sub(lambda match: "에요" if match[1] in "이니" else "예요", text)
        text = re.sub(r"(?<![가-힣])나(?=도 |는 )", "저", text)
        text = re.sub(r"(?<![가-힣])내가(?= )", "제가", text)
    return _SLOT.sub(lambda match: with_particle(words[match[1]], match[2]) if match[2] else words[match[1]], text)


def syllable(initial: int, medial: int, final: int) -> str:
    """The Hangul syllable of three letters, each by its place in Unicode's order."""
    return chr(_FIRST_SYLLABLE + (initial * 21 + medial) * _FINALS + final)


def _odd_word(rng: random.Random) -> str:
    return "".join(syllable(rng.randrange(19), rng.choice(_MEDIALS), rng.choice(_WORD_FINALS)) for _ in range(rng.randint(2, 4)))


_NOUNS: Final = tuple(sorted({word for family in FAMILIES for values in family.slots.values() for word in values}))


def _ramble(rng: random.Random, clauses: int, *, polite: bool) -> tuple[str, str]:
    """Loosely connected clauses, and a word that occurs in them."""
    parts, said = [], ""
    for _ in range(clauses):
        words = {
            "noun": rng.choice(_NOUNS) if rng.random() < 0.65 else _odd_word(rng),
            "noun2": rng.choice(_NOUNS),
            "odd": _odd_word(rng),
            "eng": rng.choice(ENGLISH),
            "num": str(rng.choice((rng.randint(1, 12), rng.randint(1, 99), rng.randint(100, 9999)))),
        }
        frame = rng.choice(RAMBLES)
        parts.append(realise(frame, words, polite=polite))
        word = next((key for key in ("odd", "eng", "noun") if "{" + key in frame), "noun")
        if not said or rng.random() < 0.5:
            said = words[word]
    return " ".join(parts), said


def _typo(rng: random.Random, text: str) -> str:
    letters = list(text)
    for _ in range(rng.randint(1, 3)):
        if len(letters) < 3:
            break
        at = rng.randrange(len(letters) - 1)
        kind = rng.random()
        if kind < 0.35:
            letters[at], letters[at + 1] = letters[at + 1], letters[at]
        elif kind < 0.6:
            del letters[at]
        elif kind < 0.8:
            letters.insert(at, letters[at])
        else:
            letters[at] = rng.choice("ㅇㄴㅋㅎㄱㅏㅓㅜ뭐이가는도")
    return "".join(letters)


def _as_typed(rng: random.Random, text: str) -> str:
    """`text` as somebody types it into a chat."""
    if rng.random() < 0.12:
        text = f"{rng.choice(PREFIXES)}{rng.choice((' ', ', ', '... '))}{text}"
    if rng.random() < 0.4:
        text = text.rstrip(".!,")
    if rng.random() < 0.25:
        text = f"{text}{rng.choice(('', ' '))}{rng.choice(TAILS)}"
    if rng.random() < 0.1:
        text = _typo(rng, text)
    if rng.random() < 0.05:
        text = text.replace(" ", "")
    if rng.random() < 0.08:
        emoji = rng.choice(EMOJI)
        text = f"{text}{rng.choice(('', ' '))}{emoji * rng.choice((1, 1, 1, 2, 3))}"
    return text[:MAX_INPUT_CHARACTERS].strip() or "응"


class Manner(NamedTuple):
    """How a reply is to be written."""

    instruction: str
    polite: bool
    emoji: bool | None
    """By the intensity, or none; None: as it happens."""


def _manner(rng: random.Random) -> Manner:
    if rng.random() < 0.35:
        # its 반말 is obeyed as a small model would: more often than not
        return Manner(persona_spec(rng.choice(list(BloodType))).instruction, rng.random() < 0.35, None)
    polite, emoji = rng.random() < 0.6, None
    instruction = rng.choice(INSTRUCTIONS)
    if rng.random() < 0.35:
        polite = rng.random() < 0.5
        instruction += " " + rng.choice(POLITE_REQUESTS if polite else CASUAL_REQUESTS)
    if rng.random() < 0.6:
        emoji = rng.random() < 0.8
        instruction += " " + rng.choice(EMOJI_REQUESTS if emoji else NO_EMOJI_REQUESTS)
    return Manner(instruction, polite, emoji)


def _with_emoji(rng: random.Random, sentences: list[str], face: Expression, intensity: float) -> list[str]:
    """None when the feeling is weak, one or two in between, and up to four when it is strong."""
    third = IntensityThird.of(intensity)
    if third is IntensityThird.LOW:
        return sentences
    counts = (1, 1, 1, 2) if third is IntensityThird.MIDDLE else (1, 2, 2, 3)
    chosen = [rng.choice(FACE_EMOJI[face] if rng.random() < 0.7 else EMOJI) for _ in range(rng.choice(counts))]
    at = len(sentences) - 1 if rng.random() < 0.6 else rng.randrange(len(sentences))
    return [*sentences[:at], f"{sentences[at]} {''.join(chosen)}", *sentences[at + 1 :]]


def _with_intensity(rng: random.Random, sentences: list[str], intensity: float) -> list[str]:
    """A strong feeling exclaims and a weak one trails off: the intensity is felt in more than the emoji."""
    third = IntensityThird.of(intensity)
    if third is IntensityThird.MIDDLE:
        return sentences
    end = "!" if third is IntensityThird.HIGH else rng.choice((".", ".."))
    said = [f"{sentence[:-1]}{end}" if sentence.endswith((".", "!")) else sentence for sentence in sentences]
    word = rng.choice(STRONG if third is IntensityThird.HIGH else WEAK)
    return [f"{word} {said[0]}", *said[1:]]


def _reply(rng: random.Random, sentences: list[str], face: Expression, intensity: float, emoji: bool | None) -> str:
    if emoji:
        sentences = _with_emoji(rng, _with_intensity(rng, sentences, intensity), face, intensity)
    # not always, but never against the intensity: whoever writes more of them has that from the base
    elif emoji is None and rng.random() < 0.4:
        sentences = _with_emoji(rng, sentences, face, intensity)
    text = " ".join(sentences)
    # and the ends that a reply may have, so that closing the JSON doesn't hang on a full stop
    end = rng.random()
    if end < 0.1:
        text = text.rstrip(".")
    elif end < 0.14 and text.endswith("."):
        text = f"{text[:-1]}{rng.choice(('!', '~', '...', ' ㅎㅎ'))}"
    # a mistyped reply can hold two spaces in a row, which the prompt structure writes as one
    return " ".join(text.split())


def make_record(rng: random.Random) -> Record:
    """One dialogue. All of its randomness comes from `rng`."""
    family = rng.choice(FAMILIES)
    words = {slot: rng.choice(values) for slot, values in family.slots.items()}
    mood = rng.choice(("good", "bad", "plain"))
    turns: Turns = getattr(family, mood)
    feelings = MOOD_FEELINGS[mood]
    # the first feelings are the natural ones, the others happen
    feeling = rng.choice(feelings[:3] if mood != "plain" and rng.random() < 0.6 else feelings)
    intensity = round(rng.random(), rng.choice((1, 1, 2)))
    weak, strong = FACES[feeling]
    face = rng.choice(strong if intensity >= 0.5 else weak)
    user_polite, manner = rng.random() < 0.15, _manner(rng)
    polite = manner.polite

    opener = realise(rng.choice(OPENERS[feeling]), {}, polite=polite)
    kind, clauses = rng.random(), 1
    if kind < 0.62:
        at = rng.randrange(len(turns.inputs))
        said = realise(turns.inputs[at], words, polite=user_polite)
        answered = at if rng.random() < 0.93 else rng.randrange(len(turns.replies))
        answer = realise(turns.replies[answered], words, polite=polite)
        if rng.random() < 0.2:
            around, _ = _ramble(rng, rng.randint(1, 3), polite=user_polite)
            said = f"{said} {around}" if rng.random() < 0.6 else f"{around} {said}"
    elif kind < 0.95:
        said, word = _ramble(rng, rng.choice((1, 1, 1, 1, 2, 2, 3, 4, 9)), polite=user_polite)
        chosen = rng.random()
        frames = ECHOES if chosen < 0.3 else QUOTED if chosen < 0.35 else ANYTHING if chosen < 0.5 else REMARKS[mood]
        answer = realise(rng.choice(frames), {"word": word}, polite=polite)
        if rng.random() < 0.45:
            # replies of any words whatever: an adapter writes what the grammar never does, and the JSON around
            # it has to hold
            clauses = rng.choice((1, 1, 2))
            answer, _ = _ramble(rng, clauses, polite=polite)
            if rng.random() < 0.3:
                answer = _typo(rng, answer)
    else:
        said = rng.choice((_odd_word(rng), rng.choice(_NOUNS), rng.choice(TAILS), rng.choice(PREFIXES), rng.choice(EMOJI), opener))
        answer = realise(rng.choice(ANYTHING), {}, polite=polite)

    more = realise(rng.choice(family.questions if kind < 0.62 else ANYTHING), words, polite=polite)
    if rng.random() < 0.15:
        more = realise(rng.choice(REMARKS[mood]), words, polite=polite)
    # never three: a persona's reply is one or two sentences, and an adapter keeps the base's habit of going on
    shape = rng.random()
    if clauses > 1 or 0.42 <= shape < 0.72:
        sentences = [answer]
    elif shape < 0.42:
        sentences = [opener, answer]
    else:
        sentences = [answer] if answer.endswith("?") else [answer, more]

    about = rng.random()
    if about < 0.15:
        summary = ""
    elif about < 0.85:
        summary = realise(rng.choice(family.summaries), words, polite=False)
    else:
        summary, _ = _ramble(rng, rng.randint(1, 2), polite=False)
    return {
        "instruction": manner.instruction,
        "context": {"summary": summary, "current_emotion": {"type": feeling.value, "intensity": intensity}},
        "input": _as_typed(rng, said),
        "output": {"text": _reply(rng, sentences, face, intensity, manner.emoji), "emotion": face.value},
    }


def records(count: int, seed: int) -> Iterator[Record]:
    """`count` records, always the same for a `seed`; a longer corpus begins with the shorter one."""
    rng = random.Random(seed)
    for _ in range(count):
        yield make_record(rng)


def alphabet() -> Iterator[str]:
    """Frequent syllables, letters of chats and emoji, one a line: they get tokens of their own even where rare."""
    for medial in range(21):
        for initial in range(19):
            yield syllable(initial, medial, 0)
    for final in (4, 8, 16, 21, 1, 17, 20, 19):
        for medial in (0, 4, 8, 13, 18, 20, 1, 5, 6):
            for initial in range(19):
                yield syllable(initial, medial, final)
    yield from "ㄱㄴㄷㄹㅁㅂㅅㅇㅈㅊㅋㅌㅍㅎㄲㄸㅃㅆㅉㅏㅑㅓㅕㅗㅛㅜㅠㅡㅣㅔㅐ"
    yield from EMOJI
    yield from "".join(FACE_EMOJI.values())


def main() -> None:
    parser = argparse.ArgumentParser(description="Print records of the tiny base's corpus as JSONL.")
    parser.add_argument("--records", type=int, default=10, help="how many (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=20, help="default: %(default)s")
    arguments = parser.parse_args()
    for record in records(arguments.records, arguments.seed):
        sys.stdout.write(json.dumps(record, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
