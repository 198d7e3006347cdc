"""Generate persona-neutral Korean dialogues in the project's record format. The same seed gives the same records.

    python -m tools.tiny_base.corpus --records 5

The grammar draws from the hand-written lines of `frames/*.yaml`. Three choices are deliberate:

- Replies under a persona's instruction are as plain as any others (mostly polite, few emoji), so an adapter learns its
  persona from its own data alone.
- Replies obey an explicit request for a manner (반말, 존댓말, emoji by the intensity of the feeling, no emoji), like those
  of an instruction-tuned base. An adapter can rely on that and need not teach the base what an intensity is.
- Inputs are much wilder than most replies (typos, unknown words, 300 characters of rambling), so the reply format
  holds on any input. A seventh of the replies ramble too, so it also holds around words that only an adapter writes.

This module imports no torch and reads none of the bundled persona data.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import sys
from collections.abc import Iterator
from functools import cache
from typing import Final, NamedTuple, TypedDict

from lora_trainer.persona.specs import persona_spec
from lora_trainer.persona.vocabulary import BloodType, Expression, Feeling, IntensityThird
from tools.tiny_base.frames import CHOICE, SLOT, Exchange, families, phrases

MAX_INPUT_CHARACTERS: Final = 320

# Particles that depend on the word's last letter: the forms after a consonant and after a vowel. 로 also follows ㄹ.
PARTICLES: Final[dict[str, tuple[str, str]]] = {
    "은": ("은", "는"),
    "이": ("이", "가"),
    "을": ("을", "를"),
    "과": ("과", "와"),
    "으로": ("으로", "로"),
    "이다": ("이", ""),
}

_LAST_COPULA: Final = re.compile(r"(?<=([가-힣]))야(?=[.?!]|$)")
_FIRST_SYLLABLE: Final = 0xAC00
_LAST_SYLLABLE: Final = 0xD7A3
_FINALS: Final = 28
_RIEUL: Final = 8

# Frequent medial and final letters, by their index in Unicode's order, for made-up words.
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
    """Return `word` with `particle` in the form that its last letter requires; particles with one form are appended as they are.

    Raises IndexError if `word` is empty.
    """
    forms = PARTICLES.get(particle)
    if forms is None:
        return word + particle
    code = ord(word[-1])
    # non-Hangul takes the form after a vowel: most Latin words here end in one when read aloud
    final = (code - _FIRST_SYLLABLE) % _FINALS if _FIRST_SYLLABLE <= code <= _LAST_SYLLABLE else 0
    after_consonant = final != 0 and not (particle == "으로" and final == _RIEUL)
    return word + forms[0 if after_consonant else 1]


def realise(frame: str, words: dict[str, str], *, polite: bool) -> str:
    """Return `frame` (notation: `frames/README.md`) with its slots filled, in casual or polite speech."""
    text = CHOICE.sub(lambda match: match[2 if polite else 1], frame).replace("~", "요" if polite else "")
    if polite:
        text = _LAST_COPULA.sub(lambda match: "에요" if match[1] in "이니" else "예요", text)
        text = re.sub(r"(?<![가-힣])나(?=도 |는 )", "저", text)
        text = re.sub(r"(?<![가-힣])내가(?= )", "제가", text)
    return SLOT.sub(lambda match: with_particle(words[match[1]], match[2]) if match[2] else words[match[1]], text)


def syllable(initial: int, medial: int, final: int) -> str:
    """Return the Hangul syllable of three letters, each given by its index in Unicode's order."""
    return chr(_FIRST_SYLLABLE + (initial * 21 + medial) * _FINALS + final)


def _odd_word(rng: random.Random) -> str:
    return "".join(syllable(rng.randrange(19), rng.choice(_MEDIALS), rng.choice(_WORD_FINALS)) for _ in range(rng.randint(2, 4)))


@cache
def _nouns() -> tuple[str, ...]:
    return tuple(sorted({word for family in families() for values in family.slots.values() for word in values}))


def _ramble(rng: random.Random, clauses: int, *, polite: bool) -> tuple[str, str]:
    """Return loosely connected clauses and a word that occurs in them."""
    lines, nouns = phrases(), _nouns()
    parts, said = [], ""
    for _ in range(clauses):
        words = {
            "noun": rng.choice(nouns) if rng.random() < 0.65 else _odd_word(rng),
            "noun2": rng.choice(nouns),
            "odd": _odd_word(rng),
            "eng": rng.choice(lines.english),
            "num": str(rng.choice((rng.randint(1, 12), rng.randint(1, 99), rng.randint(100, 9999)))),
        }
        frame = rng.choice(lines.rambles)
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
    """Return `text` as a user might type it into a chat."""
    lines = phrases()
    if rng.random() < 0.12:
        text = f"{rng.choice(lines.prefixes)}{rng.choice((' ', ', ', '... '))}{text}"
    if rng.random() < 0.4:
        text = text.rstrip(".!,")
    if rng.random() < 0.25:
        text = f"{text}{rng.choice(('', ' '))}{rng.choice(lines.tails)}"
    if rng.random() < 0.1:
        text = _typo(rng, text)
    if rng.random() < 0.05:
        text = text.replace(" ", "")
    if rng.random() < 0.08:
        emoji = rng.choice(lines.emoji)
        text = f"{text}{rng.choice(('', ' '))}{emoji * rng.choice((1, 1, 1, 2, 3))}"
    return text[:MAX_INPUT_CHARACTERS].strip() or "응"


class Manner(NamedTuple):
    """How the reply should be written."""

    instruction: str
    polite: bool
    emoji: bool | None
    """True requests emoji by the intensity of the feeling, False requests no emoji, and None requests nothing."""


def _manner(rng: random.Random) -> Manner:
    if rng.random() < 0.35:
        # obey the 반말 of a persona's instruction in most records, as a small model does
        return Manner(persona_spec(rng.choice(list(BloodType))).instruction, rng.random() < 0.35, None)
    lines = phrases()
    polite, emoji = rng.random() < 0.6, None
    instruction = rng.choice(lines.instructions)
    if rng.random() < 0.35:
        polite = rng.random() < 0.5
        instruction += " " + rng.choice(lines.polite_requests if polite else lines.casual_requests)
    if rng.random() < 0.6:
        emoji = rng.random() < 0.8
        instruction += " " + rng.choice(lines.emoji_requests if emoji else lines.no_emoji_requests)
    return Manner(instruction, polite, emoji)


def _with_emoji(rng: random.Random, sentences: list[str], face: Expression, intensity: float) -> list[str]:
    """Add emoji: none at low intensity, one or two at middle, up to three at high."""
    third = IntensityThird.of(intensity)
    if third is IntensityThird.LOW:
        return sentences
    counts = (1, 1, 1, 2) if third is IntensityThird.MIDDLE else (1, 2, 2, 3)
    chosen = [rng.choice(phrases().face_emoji[face] if rng.random() < 0.7 else phrases().emoji) for _ in range(rng.choice(counts))]
    at = len(sentences) - 1 if rng.random() < 0.6 else rng.randrange(len(sentences))
    return [*sentences[:at], f"{sentences[at]} {''.join(chosen)}", *sentences[at + 1 :]]


def _with_intensity(rng: random.Random, sentences: list[str], intensity: float) -> list[str]:
    """Show the intensity in the words as well as in the emoji: a strong feeling exclaims, a weak one trails off."""
    third = IntensityThird.of(intensity)
    if third is IntensityThird.MIDDLE:
        return sentences
    end = "!" if third is IntensityThird.HIGH else rng.choice((".", ".."))
    said = [f"{sentence[:-1]}{end}" if sentence.endswith((".", "!")) else sentence for sentence in sentences]
    word = rng.choice(phrases().strong if third is IntensityThird.HIGH else phrases().weak)
    return [f"{word} {said[0]}", *said[1:]]


def _reply(rng: random.Random, sentences: list[str], face: Expression, intensity: float, emoji: bool | None) -> str:
    if emoji:
        sentences = _with_emoji(rng, _with_intensity(rng, sentences, intensity), face, intensity)
    # emoji follow the intensity even if not requested: an adapter that writes more of them inherits that from the base
    elif emoji is None and rng.random() < 0.4:
        sentences = _with_emoji(rng, sentences, face, intensity)
    text = " ".join(sentences)
    # vary how replies end, so that the base doesn't learn to close the JSON only after a full stop
    end = rng.random()
    if end < 0.1:
        text = text.rstrip(".")
    elif end < 0.14 and text.endswith("."):
        text = f"{text[:-1]}{rng.choice(('!', '~', '...', ' ㅎㅎ'))}"
    # a typo can produce two spaces in a row, which the prompt structure collapses
    return " ".join(text.split())


def make_record(rng: random.Random) -> Record:
    """Return one dialogue. All randomness comes from `rng`."""
    lines = phrases()
    family = rng.choice(families())
    words = {slot: rng.choice(values) for slot, values in family.slots.items()}
    mood = rng.choice(("good", "bad", "plain"))
    exchanges: tuple[Exchange, ...] = getattr(family, mood)
    remarks: tuple[str, ...] = getattr(lines.remarks, mood)
    feelings: tuple[Feeling, ...] = getattr(lines.feelings, mood)
    # usually pick one of the three most likely feelings
    feeling = rng.choice(feelings[:3] if mood != "plain" and rng.random() < 0.6 else feelings)
    intensity = round(rng.random(), rng.choice((1, 1, 2)))
    faces = lines.faces[feeling]
    face = rng.choice(faces.strong if intensity >= 0.5 else faces.weak)
    user_polite, manner = rng.random() < 0.15, _manner(rng)
    polite = manner.polite

    opener = realise(rng.choice(lines.openers[feeling]), {}, polite=polite)
    kind, clauses = rng.random(), 1
    if kind < 0.62:
        at = rng.randrange(len(exchanges))
        said = realise(exchanges[at].input, words, polite=user_polite)
        answered = at if rng.random() < 0.93 else rng.randrange(len(exchanges))
        answer = realise(exchanges[answered].reply, words, polite=polite)
        if rng.random() < 0.2:
            around, _ = _ramble(rng, rng.randint(1, 3), polite=user_polite)
            said = f"{said} {around}" if rng.random() < 0.6 else f"{around} {said}"
    elif kind < 0.95:
        said, word = _ramble(rng, rng.choice((1, 1, 1, 1, 2, 2, 3, 4, 9)), polite=user_polite)
        chosen = rng.random()
        frames = lines.echoes if chosen < 0.3 else lines.quoted if chosen < 0.35 else lines.anything if chosen < 0.5 else remarks
        answer = realise(rng.choice(frames), {"word": word}, polite=polite)
        if rng.random() < 0.45:
            # ramble, because adapters write words that the grammar lacks and the JSON around them must stay valid
            clauses = rng.choice((1, 1, 2))
            answer, _ = _ramble(rng, clauses, polite=polite)
            if rng.random() < 0.3:
                answer = _typo(rng, answer)
    else:
        one_of = (_nouns(), lines.tails, lines.prefixes, lines.emoji)
        said = rng.choice((_odd_word(rng), *(rng.choice(texts) for texts in one_of), opener))
        answer = realise(rng.choice(lines.anything), {}, polite=polite)

    more = realise(rng.choice(family.questions if kind < 0.62 else lines.anything), words, polite=polite)
    if rng.random() < 0.15:
        more = realise(rng.choice(remarks), words, polite=polite)
    # never write three sentences: a persona's reply has one or two, and adapters inherit the length of the base's replies
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
    """Yield `count` records. For one `seed`, a longer corpus begins with the shorter one."""
    rng = random.Random(seed)
    for _ in range(count):
        yield make_record(rng)


def alphabet() -> Iterator[str]:
    """Yield frequent syllables, chat letters and emoji, one at a time, so that each gets its own token even if it is rare."""
    for medial in range(21):
        for initial in range(19):
            yield syllable(initial, medial, 0)
    for final in (4, 8, 16, 21, 1, 17, 20, 19):
        for medial in (0, 4, 8, 13, 18, 20, 1, 5, 6):
            for initial in range(19):
                yield syllable(initial, medial, final)
    yield from "ㄱㄴㄷㄹㅁㅂㅅㅇㅈㅊㅋㅌㅍㅎㄲㄸㅃㅆㅉㅏㅑㅓㅕㅗㅛㅜㅠㅡㅣㅔㅐ"
    yield from phrases().emoji
    yield from "".join(phrases().face_emoji.values())


def main() -> None:
    parser = argparse.ArgumentParser(description="Print records of the tiny base's corpus as JSONL.")
    parser.add_argument("--records", type=int, default=10, help="how many (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=20, help="default: %(default)s")
    arguments = parser.parse_args()
    for record in records(arguments.records, arguments.seed):
        sys.stdout.write(json.dumps(record, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
