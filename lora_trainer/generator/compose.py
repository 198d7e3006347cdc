"""The offline engine: dialogues built from the grammar, the same ones for the same seed."""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from typing import Final

from lora_trainer.data.records import TrainingRecord
from lora_trainer.generator.grammar import Scene, Take, fill, load_reactions, load_scenes
from lora_trainer.generator.intake import INTENSITIES, QUESTION_RATE, Cell, Intake
from lora_trainer.persona.specs import persona_spec
from lora_trainer.persona.vocabulary import BloodType, Expression, Feeling, IntensityThird

GRAMMAR_ATTEMPTS: Final = 200
"""Drafts for one record before the grammar counts as used up for its feeling and intensity."""

_REACTION_RATE: Final = {IntensityThird.LOW: 0.1, IntensityThird.MIDDLE: 0.35, IntensityThird.HIGH: 0.6}
_HUSHED: Final = frozenset((Feeling.SAD, Feeling.WORRIED))
# how a sentence ends: by persona, mild or strong, and lower for what weighs
_CLOSINGS: Final[dict[BloodType, dict[IntensityThird, tuple[str, ...]]]] = {
    BloodType.A: {IntensityThird.LOW: (".",), IntensityThird.MIDDLE: (".", ".", "~"), IntensityThird.HIGH: (".", "~", "!")},
    BloodType.B: dict.fromkeys(IntensityThird, (".",)),
    BloodType.O: dict.fromkeys(IntensityThird, ("!",)),
    BloodType.AB: dict.fromkeys(IntensityThird, (".",)),
}
_HUSHED_CLOSINGS: Final[dict[BloodType, tuple[str, ...]]] = {
    BloodType.A: (".", "..."),
    BloodType.B: (".",),
    BloodType.O: (".", "!"),
    BloodType.AB: (".", "..."),
}
# AB ends in a full stop what goes on, and in a bare emoji what does not: where no full stop ends anything, a model that takes
# the likeliest next token asks something behind each one
_STOP_BEFORE_EMOJI_RATE: Final = {BloodType.AB: 0.4}
_ASKS_RATE: Final = {BloodType.AB: 0.6}
# O ends nearly everything in "!", so a model that takes the likeliest next token would end there each time, where the
# ends are few and the questions many: what ends with it is louder from the middle on, and some questions begin in one way
_LAST_CLOSING: Final = {BloodType.O: {IntensityThird.MIDDLE: "!!", IntensityThird.HIGH: "!!"}}
_QUESTION_LEADS: Final = {BloodType.O: ("야,", "근데")}
_LEAD_RATE: Final = 0.4
_NO_SPACES_RATE: Final = 0.04
_TYPO_RATE: Final = 0.06
_BARE_RATE: Final = 0.3

OnRecord = Callable[[TrainingRecord], None]


def compose(intake: Intake, wanted: Sequence[Cell], seed: int, on_record: OnRecord | None = None) -> None:
    """Compose a record of `intake.blood_type` for each of `wanted` cells, in an order of their own, and have `intake` take them.

    Deterministic: the same cells, seed, and texts that the intake holds against them give the same records with the same
    version of Kiwi, whose judgement of a sentence decides what is refused. `on_record` is called for each as it is taken.
    Where the grammar has nothing left for a cell that differs enough from what is there, another cell has its place; when it
    has nothing left at all, fewer records are taken.
    """
    rng = random.Random(f"{seed}:{intake.blood_type}")
    order = list(wanted)
    rng.shuffle(order)
    decks = _Decks(intake.blood_type, rng)
    open_cells = sorted(set(order))
    for planned in order:
        cell = planned
        while open_cells:
            if cell not in open_cells:
                cell = rng.choice(open_cells)
            if record := _draft(intake, cell, decks, rng):
                if on_record:
                    on_record(record)
                break
            open_cells.remove(cell)


class _Decks:
    """For each cell the takes that serve it, dealt like cards: all once before any a second time."""

    def __init__(self, blood_type: BloodType, rng: random.Random) -> None:
        self._rng = rng
        self._serving: dict[Cell, list[tuple[Scene, Take]]] = defaultdict(list)
        for scene in load_scenes():
            for take in scene.takes[blood_type]:
                for feeling in take.feelings:
                    for third in take.at:
                        self._serving[feeling, third].append((scene, take))
        self._dealt: dict[Cell, Iterator[tuple[Scene, Take]]] = {}

    def deal(self, cell: Cell) -> tuple[Scene, Take] | None:
        """The next take that serves `cell`; `None` when none does."""
        for _ in range(2):
            for card in self._dealt.setdefault(cell, iter(())):
                return card
            cards = list(self._serving[cell])
            self._rng.shuffle(cards)
            self._dealt[cell] = iter(cards)
        return None


def _draft(intake: Intake, cell: Cell, decks: _Decks, rng: random.Random) -> TrainingRecord | None:
    """One record of `cell` that is taken; `None` when `GRAMMAR_ATTEMPTS` drafts were not."""
    for _ in range(GRAMMAR_ATTEMPTS):
        card = decks.deal(cell)
        if card is None:
            break
        record = _compose_one(intake.blood_type, cell, *card, rng)
        if intake.take(record):
            return record
    return None


def _compose_one(blood_type: BloodType, cell: Cell, scene: Scene, take: Take, rng: random.Random) -> TrainingRecord:
    feeling, third = cell
    values = {slot: rng.choice(choices) for slot, choices in scene.slots.items()}
    intensity = rng.choice(INTENSITIES[third])
    asks = rng.random() < _ASKS_RATE.get(blood_type, QUESTION_RATE)
    sentences = [fill(rng.choice(take.say), values) + _closing(blood_type, cell, scene, rng, is_last=not asks)]
    if rng.random() < _REACTION_RATE[third] and (reactions := load_reactions()[blood_type][feeling][third]):
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
    if feeling in _HUSHED:
        return rng.choice(_HUSHED_CLOSINGS[blood_type])
    last = _LAST_CLOSING.get(blood_type, {}).get(third) if is_last else None
    return last or rng.choice(_CLOSINGS[blood_type][third])


def _question_lead(blood_type: BloodType, rng: random.Random) -> str:
    leads = _QUESTION_LEADS.get(blood_type)
    return f"{rng.choice(leads)} " if leads and rng.random() < _LEAD_RATE else ""


def _with_emoji(sentences: list[str], blood_type: BloodType, cell: Cell, scene: Scene, rng: random.Random) -> str:
    """The sentences as one text, with as many emoji as the persona uses at this intensity."""
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
    # behind the last sentence. Were they behind the first of two, a model that takes the likeliest next token would write them
    # there each time, and end without its question: a reply of one sentence has them in the same place
    stop_rate = _STOP_BEFORE_EMOJI_RATE.get(blood_type)
    keeps_stop = sentences[-1].endswith("..") or (stop_rate is not None and rng.random() < stop_rate)
    last = sentences[-1] if keeps_stop else sentences[-1].removesuffix(".")
    return " ".join((*sentences[:-1], last, "".join(signs)))


# --- how people type ------------------------------------------------------------------------------------

_FINALS: Final = 28
_DOUBLE_SIOT: Final = 20
_SIOT: Final = 19


def _typed(text: str, rng: random.Random) -> str:
    """`text` as somebody might type it: sometimes without its last sign, its spaces, or with the commonest slip (햇어)."""
    if rng.random() < _BARE_RATE:
        text = text.rstrip(".!")
    if rng.random() < _NO_SPACES_RATE and len(text) < 20:
        return text.replace(" ", "")
    if rng.random() < _TYPO_RATE:
        return "".join(_slipped(sign) for sign in text)
    return text


def _slipped(sign: str) -> str:
    is_slip = "가" <= sign <= "힣" and (ord(sign) - 0xAC00) % _FINALS == _DOUBLE_SIOT
    return chr(ord(sign) - _DOUBLE_SIOT + _SIOT) if is_slip else sign
