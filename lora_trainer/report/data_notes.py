"""Say how a file's replies read together, whether its records are enough, and which gates an adapter would miss by learning them.

Notes are neither errors nor warnings: a file with notes trains, under `--strict`, too. Every sentence that a user reads is in
`NOTES` or `STYLE_FACTS`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from lora_trainer.config import GatesConfig, TrainingConfig
from lora_trainer.data.lint import MIN_RECORDS_FOR_RATES
from lora_trainer.data.problems import Severity
from lora_trainer.data.style import SHORT_REPLY_CHARACTERS, Style
from lora_trainer.data.validation import FileReport, Note
from lora_trainer.evaluate.gates import value_misses
from lora_trainer.evaluate.intervals import spearman_of_counts
from lora_trainer.evaluate.persona_classifier import bundled_classifier
from lora_trainer.messages import Message
from lora_trainer.persona.vocabulary import BloodType, Feeling, IntensityThird

RECORDS_PER_CELL: Final = 10
"""Records that each feeling needs at each third of intensity: fewer are learned as single sentences, not as a way to answer."""
CELLS: Final = len(Feeling) * len(IntensityThird)
ENOUGH_RECORDS: Final = RECORDS_PER_CELL * CELLS
MAX_CLASSIFIED_REPLIES: Final = 1000
"""The persona's share is measured on so many replies. It is within 3 percentage points of the whole file's."""

NOTES: Final[Mapping[str, Message]] = {
    "too_few_records": Message(
        "{records:,} records are too few to train on: have at least {enough:,}, which is {per_cell} for each of the "
        "{feelings} feelings at low, middle and high intensity ({thin} of the {cells} combinations have fewer). About"
        " {held_out:,} would be held out, too few to measure a loss."
    ),
    "empty_cells": Message(
        "{empty} of the {cells} combinations of a feeling and low, middle or high intensity have no record: the "
        "adapter does not learn to answer them; {per_cell} records for each are a good start."
    ),
    "one_or_two_sentences": Message(
        "{value:.1%} of the replies have one or two sentences, but gates.one_or_two_sentences expects at least "
        "{threshold:.0%} of an adapter's: it learns the long replies, so shorten them."
    ),
    "informal_speech": Message(
        "{value:.1%} of the replies are in 반말 throughout, but gates.informal_speech expects at least {threshold:.0%} "
        "of an adapter's: it learns the 존댓말, so rewrite those replies."
    ),
    "persona": Message(
        "The persona classifier recognises {persona} in {value:.1%} of the replies, but gates.persona expects at "
        "least {threshold:.0%} of an adapter's: give the replies more of this persona's voice, or lower the gate for "
        "a persona of your own."
    ),
    "emoji_intensity": Message(
        "Emoji hardly increase with intensity (rank correlation {value:.2f}), but gates.emoji_intensity expects more "
        "than {threshold:.2f} of an adapter: use fewer emoji at low and more at high intensity."
    ),
    "question_rate_min": Message(
        "{value:.1%} of the replies ask a question, but gates.question_rate_min expects at least {threshold:.0%} of "
        "an adapter's: it learns to ask as rarely, so add questions."
    ),
    "question_rate_max": Message(
        "{value:.1%} of the replies ask a question, but gates.question_rate_max accepts at most {threshold:.0%} of an"
        " adapter's: it learns to ask as often, so remove some questions."
    ),
}
"""The sentence of each note, by its code. Those about a gate have the gate's name."""

STYLE_FACTS: Final[Mapping[str, Message]] = {
    "median_characters": Message("median characters per reply"),
    "short": Message("replies of at most {short_characters} characters"),
    "comma": Message("replies with a comma"),
    "spliced": Message("replies with a comma between two sentences"),
    "laughter": Message("replies with ㅋ or ㅎ"),
    "alike": Message("replies that are another reply with other nouns"),
    "phrase_share": Message("replies that share the most frequent phrase"),
}
"""The label of each value of `Style`, by the name of its field."""


def style_facts(style: Style) -> list[tuple[Message, str]]:
    """Return the values of `style` as label and value. The most frequent phrase is training text, so only its share is shown."""
    values = {
        "median_characters": f"{style.median_characters:g}",
        "short": f"{style.short:.1%}",
        "comma": f"{style.comma:.1%}",
        "spliced": f"{style.spliced:.1%}",
        "laughter": f"{style.laughter:.1%}",
        "alike": f"{style.alike:.1%}",
        "phrase_share": f"{style.phrase_share:.1%}",
    }
    return [(Message(STYLE_FACTS[name].template, short_characters=SHORT_REPLY_CHARACTERS), value) for name, value in values.items()]


@dataclass(frozen=True, slots=True)
class DataRates:
    """What notes are about, of a file or of generated records."""

    records: int
    cells: Mapping[tuple[Feeling, IntensityThird], int]
    persona: BloodType | None
    measured: Mapping[str, float]
    """Values by the name of the gate that would measure an adapter by them."""


def rates_of_report(report: FileReport, replies: Sequence[str]) -> DataRates:
    """Return the rates of a validated file. `replies` are its first ones, to classify by persona."""
    warnings = report.counts[Severity.WARNING]
    measured = {
        "one_or_two_sentences": 1 - warnings.get("too_many_sentences", 0) / max(1, report.records),
        "informal_speech": 1 - warnings.get("formal_speech", 0) / max(1, report.records),
        "emoji_intensity": spearman_of_counts(report.emoji_by_intensity.items()),
        "question_rate_min": report.question_rate,
        "question_rate_max": report.question_rate,
    }
    # the classifier's library takes a second to load
    if report.blood_type and report.records >= MIN_RECORDS_FOR_RATES:
        found = bundled_classifier().predict(replies[:MAX_CLASSIFIED_REPLIES])
        measured["persona"] = found.count(report.blood_type) / len(found)
    return DataRates(report.records, report.coverage, report.blood_type, measured)


def data_notes(rates: DataRates, training: TrainingConfig, gates: GatesConfig) -> tuple[Note, ...]:
    """Return what a user should know before training on these records; empty if there is nothing, or no record."""
    return tuple(_notes(rates, training, gates)) if rates.records else ()


def _notes(rates: DataRates, training: TrainingConfig, gates: GatesConfig) -> Iterator[Note]:
    counts = [rates.cells.get((feeling, third), 0) for feeling in Feeling for third in IntensityThird]
    if rates.records < ENOUGH_RECORDS:
        yield _note(
            "too_few_records",
            records=rates.records,
            enough=ENOUGH_RECORDS,
            per_cell=RECORDS_PER_CELL,
            feelings=len(Feeling),
            thin=sum(count < RECORDS_PER_CELL for count in counts),
            cells=CELLS,
            held_out=max(1, round(training.held_out_fraction * rates.records)),
        )
    elif 0 in counts:
        yield _note("empty_cells", empty=counts.count(0), cells=CELLS, per_cell=RECORDS_PER_CELL)
    if rates.records < MIN_RECORDS_FOR_RATES:
        return
    thresholds = gates.model_dump()
    for name, value in rates.measured.items():
        if value_misses(name, value, gates):
            yield _note(name, value=value, threshold=thresholds[name], persona=rates.persona)


def _note(code: str, **values: object) -> Note:
    return Note(code, Message(NOTES[code].template, **values))
