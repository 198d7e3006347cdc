"""The offline engine: compose dialogues from the grammar, deterministically for a seed."""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from typing import Final

from lora_trainer.data.records import TrainingRecord
from lora_trainer.generator.collector import INTENSITIES, QUESTION_RATE, Cell, RecordCollector
from lora_trainer.generator.grammar import Scene, Take, fill, load_reactions, load_scenes
from lora_trainer.persona.specs import persona_spec
from lora_trainer.persona.vocabulary import BloodType, Expression, Feeling, IntensityThird

GRAMMAR_ATTEMPTS: Final = 200
"""Rejected drafts for one record after which its cell of the grammar counts as exhausted."""

_REACTION_RATE: Final = {IntensityThird.LOW: 0.1, IntensityThird.MIDDLE: 0.35, IntensityThird.HIGH: 0.6}
_SUBDUED: Final = frozenset((Feeling.SAD, Feeling.WORRIED))
# closing punctuation by persona and intensity; subdued feelings have their own
_CLOSINGS: Final[dict[BloodType, dict[IntensityThird, tuple[str, ...]]]] = {
    BloodType.A: {IntensityThird.LOW: (".",), IntensityThird.MIDDLE: (".", ".", "~"), IntensityThird.HIGH: (".", "~", "!")},
    BloodType.B: dict.fromkeys(IntensityThird, (".",)),
    BloodType.O: dict.fromkeys(IntensityThird, ("!",)),
    BloodType.AB: dict.fromkeys(IntensityThird, (".",)),
}
_SUBDUED_CLOSINGS: Final[dict[BloodType, tuple[str, ...]]] = {
    BloodType.A: (".", "..."),
    BloodType.B: (".",),
    BloodType.O: (".", "!"),
    BloodType.AB: (".", "..."),
}
# AB keeps the full stop before an emoji in some replies. If a full stop only ever preceded a question, greedy decoding would
# add a question after every full stop
_STOP_BEFORE_EMOJI_RATE: Final = {BloodType.AB: 0.4}
_ASKS_RATE: Final = {BloodType.AB: 0.6}
# O ends nearly every sentence with "!", so greedy decoding cannot tell a final sentence from one before a question. A distinct
# final "!!" and typical first words of a question separate the two
_LAST_CLOSING: Final = {BloodType.O: {IntensityThird.MIDDLE: "!!", IntensityThird.HIGH: "!!"}}
_QUESTION_LEADS: Final = {BloodType.O: ("야,", "근데")}
_LEAD_RATE: Final = 0.4
_NO_SPACES_RATE: Final = 0.04
_TYPO_RATE: Final = 0.06
_BARE_RATE: Final = 0.3

OnRecord = Callable[[TrainingRecord], None]


def compose(collector: RecordCollector, wanted: Sequence[Cell], seed: int, on_record: OnRecord | None = None) -> None:
    """Compose one record per wanted cell, in shuffled order, until `collector` accepts it.

    Deterministic for the same cells, seed, exclusions and version of Kiwi, whose sentence analysis decides rejections.
    `on_record` is called with each accepted record. If the grammar is exhausted for a cell, another cell replaces it; if it is
    exhausted for all cells, `collector` gets fewer records.
    """
    rng = random.Random(f"{seed}:{collector.blood_type}")
    order = list(wanted)
    rng.shuffle(order)
    sampler = _TakeSampler(collector.blood_type, rng)
    open_cells = sorted(set(order))
    for planned in order:
        cell = planned
        while open_cells:
            if cell not in open_cells:
                cell = rng.choice(open_cells)
            if record := _draft(collector, cell, sampler, rng):
                if on_record:
                    on_record(record)
                break
            open_cells.remove(cell)


class _TakeSampler:
    """Draws the takes of each cell in random order without replacement, then starts over."""

    def __init__(self, blood_type: BloodType, rng: random.Random) -> None:
        self._rng = rng
        self._takes: dict[Cell, list[tuple[Scene, Take]]] = defaultdict(list)
        for scene in load_scenes():
            for take in scene.takes[blood_type]:
                for feeling in take.feelings:
                    for third in take.at:
                        self._takes[feeling, third].append((scene, take))
        self._remaining: dict[Cell, Iterator[tuple[Scene, Take]]] = {}

    def draw(self, cell: Cell) -> tuple[Scene, Take] | None:
        """Return the next scene and take for `cell`, or None if the grammar has none."""
        for _ in range(2):
            for scene_and_take in self._remaining.setdefault(cell, iter(())):
                return scene_and_take
            shuffled = list(self._takes[cell])
            self._rng.shuffle(shuffled)
            self._remaining[cell] = iter(shuffled)
        return None


def _draft(collector: RecordCollector, cell: Cell, sampler: _TakeSampler, rng: random.Random) -> TrainingRecord | None:
    """Return an accepted record for `cell`, or None after `GRAMMAR_ATTEMPTS` rejected drafts."""
    for _ in range(GRAMMAR_ATTEMPTS):
        scene_and_take = sampler.draw(cell)
        if scene_and_take is None:
            break
        record = _compose_one(collector.blood_type, cell, *scene_and_take, rng)
        if collector.accept(record):
            return record
    return None


def _compose_one(blood_type: BloodType, cell: Cell, scene: Scene, take: Take, rng: random.Random) -> TrainingRecord:
    feeling, third = cell
    values = {slot: rng.choice(choices) for slot, choices in scene.slots.items()}
    intensity = rng.choice(INTENSITIES[third])
    asks = rng.random() < _ASKS_RATE.get(blood_type, QUESTION_RATE)
    sentences = [fill(rng.choice(take.say), values) + _closing(blood_type, cell, scene, rng, is_last=not asks)]
    if rng.random() < _REACTION_RATE[third] and (reactions := load_reactions()[blood_type].get(feeling, {}).get(third)):
        sentences[0] = f"{rng.choice(reactions)} {sentences[0]}"
    if asks:
        sentences.append(_question_lead(blood_type, rng) + fill(rng.choice(take.ask), values))
    return TrainingRecord.model_validate(
        {
            "instruction": persona_spec(blood_type).instruction,
            "context": {
                "summary": fill(rng.choice(scene.summaries), values),
                "current_emotion": {"type": feeling, "intensity": intensity},
            },
            "input": _typed(fill(rng.choice(scene.inputs), values), rng),
            "output": {"text": _with_emoji(sentences, blood_type, cell, scene, rng), "emotion": Expression(take.feelings[feeling])},
        }
    )


def _closing(blood_type: BloodType, cell: Cell, scene: Scene, rng: random.Random, *, is_last: bool) -> str:
    feeling, third = cell
    if scene.is_grave:
        return "."
    if feeling in _SUBDUED:
        return rng.choice(_SUBDUED_CLOSINGS[blood_type])
    last = _LAST_CLOSING.get(blood_type, {}).get(third) if is_last else None
    return last or rng.choice(_CLOSINGS[blood_type][third])


def _question_lead(blood_type: BloodType, rng: random.Random) -> str:
    leads = _QUESTION_LEADS.get(blood_type)
    return f"{rng.choice(leads)} " if leads and rng.random() < _LEAD_RATE else ""


def _with_emoji(sentences: list[str], blood_type: BloodType, cell: Cell, scene: Scene, rng: random.Random) -> str:
    """Join the sentences and append as many emoji as the persona uses at this intensity."""
    feeling, third = cell
    rule = persona_spec(blood_type).emoji
    fewest, most = rule.usual[third]
    count = rng.randint(fewest, most)
    if scene.is_grave:
        count = min(count, 1)
    own, topic = list(rule.by_feeling[feeling]), [] if scene.is_grave else list(scene.emoji)
    signs: list[str] = []
    while len(signs) < count and (left := [sign for sign in (topic if topic and rng.random() < 0.5 else own) if sign not in signs]):
        signs.append(rng.choice(left))
    if not signs:
        return " ".join(sentences)
    # emoji follow the last sentence. After the first of two, they would look like the end of a one-sentence reply, and greedy
    # decoding would stop there without its question
    stop_rate = _STOP_BEFORE_EMOJI_RATE.get(blood_type)
    keeps_stop = sentences[-1].endswith("..") or (stop_rate is not None and rng.random() < stop_rate)
    last = sentences[-1] if keeps_stop else sentences[-1].removesuffix(".")
    return " ".join((*sentences[:-1], last, "".join(signs)))


# --- typing habits of users ------------------------------------------------------------------------------

# number of final consonants in a Hangul syllable block, and the indices of two of them
_FINALS: Final = 28
_DOUBLE_SIOT: Final = 20
_SIOT: Final = 19


def _typed(text: str, rng: random.Random) -> str:
    """Imitate typing: sometimes drop the final punctuation or all spaces, or add the most common typo (햇어 for 했어)."""
    if rng.random() < _BARE_RATE:
        text = text.rstrip(".!")
    if rng.random() < _NO_SPACES_RATE and len(text) < 20:
        return text.replace(" ", "")
    if rng.random() < _TYPO_RATE:
        return "".join(_with_typo(sign) for sign in text)
    return text


def _with_typo(sign: str) -> str:
    has_double_siot = "가" <= sign <= "힣" and (ord(sign) - 0xAC00) % _FINALS == _DOUBLE_SIOT
    return chr(ord(sign) - _DOUBLE_SIOT + _SIOT) if has_double_siot else sign
