"""The offline engine: vary whole hand-written exchanges, deterministically for a seed.

Summary, input and reply were written for each other and stay together; only the words in their slots change, in all three alike.
Nothing else is generated.
"""

from __future__ import annotations

import random
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

from lora_trainer.data.duplicates import normalized
from lora_trainer.data.records import TrainingRecord
from lora_trainer.generator.collector import Cell, RecordCollector
from lora_trainer.generator.exchanges import Exchange, load_exchanges, record_of
from lora_trainer.persona.vocabulary import BloodType, IntensityThird

OnRecord = Callable[[TrainingRecord], None]


class Variant(NamedTuple):
    """One record that `compose` can make."""

    source: int
    """Position of its exchange."""
    number: int
    """Number of the values in its slots."""
    record: TrainingRecord

    @property
    def cell(self) -> Cell:
        """The cell of the reply, which was written for its feeling and intensity."""
        emotion = self.record.context.current_emotion
        return emotion.type, IntensityThird.of(emotion.intensity)


def variants(blood_type: BloodType, exchanges: Sequence[Exchange]) -> Iterator[Variant]:
    """Yield every variant of every exchange as one persona's record.

    Leaves out those that change nothing but the summary, because input and reply would repeat a bundled record or another variant.
    """
    for source, exchange in enumerate(exchanges):
        for reply in exchange.replies.get(blood_type, ()):
            seen = {normalized(f"{exchange.input}\n{reply.text}")}
            for number in exchange.variants:
                summary, message, text = (
                    exchange.varied(written, number) for written in (exchange.summary, exchange.input, reply.text)
                )
                if (dialogue := normalized(f"{message}\n{text}")) not in seen:
                    seen.add(dialogue)
                    yield Variant(source, number, record_of(blood_type, summary, message, text, reply))


def compose(collector: RecordCollector, wanted: Sequence[Cell], seed: int, on_record: OnRecord | None = None) -> None:
    """Add one record per wanted cell to `collector`, as far as the exchanges have them, then others in their place.

    Uses the words of a variant once: an exchange with replies at several intensities gives no more records than one with a single
    reply. Prefers replies that differ from the bundled one and from each other, because many replies don't repeat the words that
    change. Deterministic for the same cells, seed, exclusions and version of Kiwi, whose sentence analysis decides rejections.
    `on_record` is called with each accepted record. `collector` gets fewer records than wanted if the exchanges are exhausted.
    """
    rng = random.Random(f"{seed}:{collector.blood_type}")
    stock = _stock(collector.blood_type, rng)
    used: set[tuple[int, int]] = set()

    def take(cell: Cell) -> bool:
        while stock[cell]:
            variant = stock[cell].pop().variant
            if (variant.source, variant.number) not in used and collector.accept(variant.record, variant.source):
                used.add((variant.source, variant.number))
                if on_record:
                    on_record(variant.record)
                return True
        return False

    order = list(wanted)
    rng.shuffle(order)
    missing = sum(not take(cell) for cell in order)
    while missing and (left := {cell: drafts[-1].repeats for cell, drafts in sorted(stock.items()) if drafts}):
        fewest = min(left.values())
        missing -= take(rng.choice([cell for cell, repeats in left.items() if repeats == fewest]))


class _Draft(NamedTuple):
    variant: Variant
    repeats: int
    """How many bundled records and drafts before this one have the same reply to the same exchange."""


def _stock(blood_type: BloodType, rng: random.Random) -> dict[Cell, list[_Draft]]:
    """Return the drafts of each cell in random order, those that repeat no reply last, where they are taken from."""
    exchanges = load_exchanges()
    every = list(variants(blood_type, exchanges))
    rng.shuffle(every)
    replies = Counter(
        (source, reply.text) for source, exchange in enumerate(exchanges) for reply in exchange.replies.get(blood_type, ())
    )
    stock: dict[Cell, list[_Draft]] = defaultdict(list)
    for variant in every:
        reply = (variant.source, variant.record.reply.text)
        stock[variant.cell].append(_Draft(variant, replies[reply]))
        replies[reply] += 1
    for drafts in stock.values():
        drafts.sort(key=lambda draft: -draft.repeats)
    return stock
