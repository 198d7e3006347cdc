"""Statistics of a set of records, for the terminal table and the HTML report."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, repeat
from statistics import mean
from typing import TYPE_CHECKING

from lora_trainer.config import GatesConfig, TrainingConfig
from lora_trainer.data.duplicates import normalized
from lora_trainer.data.hard_topics import claims_presence, dangers, names_help
from lora_trainer.data.korean import sentence_count
from lora_trainer.data.lint import MAX_SENTENCES, choice, has_question, is_unanswered_choice
from lora_trainer.data.records import TrainingRecord
from lora_trainer.data.style import Style, StyleCounter, described, uses_summary
from lora_trainer.data.validation import Note
from lora_trainer.evaluate.intervals import spearman_of_counts
from lora_trainer.generator.collector import Cell, RepeatFinder, variant_count
from lora_trainer.messages import ENGLISH, Message, speaker
from lora_trainer.persona.emoji import emoji_count
from lora_trainer.persona.vocabulary import BloodType, Expression, Feeling, IntensityThird
from lora_trainer.report.data_notes import DataRates, data_notes, style_facts

if TYPE_CHECKING:
    from rich.console import RenderableType


@dataclass(slots=True)
class Grounding:
    """Counts of how replies take up what they answer, as far as the linter can tell."""

    choices: int = 0
    """Messages that ask to choose between two things."""
    answered_choices: int = 0
    dangers: int = 0
    """Exchanges in which somebody is in danger."""
    dangers_with_number: int = 0
    """Those whose reply names a number that helps."""
    dangers_with_question: int = 0
    dangers_with_presence: int = 0
    """Those whose reply claims a body, a place or an arrival."""
    summaries: int = 0
    used_summaries: int = 0
    """Summaries of which the reply has a word that the message has not."""

    def add(self, record: TrainingRecord) -> None:
        """Count one record."""
        summary, message, text = record.context.summary, record.input, record.reply.text
        if choice(message):
            self.choices += 1
            self.answered_choices += not is_unanswered_choice(message, text)
        if found := dangers(summary, message):
            self.dangers += 1
            self.dangers_with_number += names_help(text, found)
            self.dangers_with_question += has_question(text)
            self.dangers_with_presence += claims_presence(text)
        if summary:
            self.summaries += 1
            self.used_summaries += uses_summary(summary, message, text)


@dataclass(frozen=True, slots=True)
class DatasetSummary:
    """Counts and rates of one persona's records."""

    blood_type: BloodType
    records: int
    cells: Mapping[Cell, int]
    expressions: Mapping[Expression, int]
    sentences: Mapping[int, int]
    """Number of sentences -> number of replies."""
    reply_characters: Sequence[int]
    input_characters: Sequence[int]
    question_rate: float
    emoji_by_intensity: Mapping[float, tuple[int, float]]
    """Intensity, rounded to one decimal -> number of records and mean number of emoji."""
    emoji_by_third: Mapping[IntensityThird, float]
    unique_replies: int
    near_duplicate_replies: int
    """Replies similar to an earlier one (Jaccard index of character 5-grams of 0.7 or more)."""
    near_duplicate_dialogues: int
    """The same for input and reply together."""
    emoji_intensity: float
    """Spearman's rank correlation of intensity and number of emoji."""
    style: Style
    variants: int
    """Records that are variants of the same source as another one. They are no near-duplicates of each other."""
    grounding: Grounding

    @property
    def near_duplicate_rate(self) -> float:
        """Upper bound on the share of records that are near-duplicates by either measure."""
        return (self.near_duplicate_replies + self.near_duplicate_dialogues) / self.records if self.records else 0.0


def summarise(blood_type: BloodType, records: Iterable[TrainingRecord], sources: Sequence[int | None] = ()) -> DatasetSummary:
    """Summarise `records` in one pass. Detects near-duplicates anew instead of trusting the engine.

    `sources` has the source of each record, and None for one that is no variant; variants of one source are not near-duplicates.
    """
    cells: Counter[Cell] = Counter()
    expressions: Counter[Expression] = Counter()
    sentences: Counter[int] = Counter()
    emoji: dict[float, list[int]] = defaultdict(list)
    by_third: dict[IntensityThird, list[int]] = defaultdict(list)
    reply_characters, input_characters = [], []
    repeats = RepeatFinder()
    near_replies = near_dialogues = questions = 0
    unique: set[str] = set()
    emoji_counts: Counter[tuple[float, float]] = Counter()
    style = StyleCounter()
    grounding = Grounding()
    for record, source in zip(records, chain(sources, repeat(None)), strict=False):
        text, emotion = record.reply.text, record.context.current_emotion
        third = IntensityThird.of(emotion.intensity)
        cells[emotion.type, third] += 1
        expressions[record.reply.emotion] += 1
        sentences[sentence_count(text)] += 1
        questions += has_question(text)
        emoji[round(emotion.intensity, 1)].append(emoji_count(text))
        by_third[third].append(emoji_count(text))
        emoji_counts[emotion.intensity, emoji_count(text)] += 1
        grounding.add(record)
        if not style.is_full:
            style.add(described(text))
        reply_characters.append(len(text))
        input_characters.append(len(record.input))
        unique.add(normalized(text))
        near_replies += repeats.has_reply(record, source)
        near_dialogues += repeats.has_dialogue(record, source)
        repeats.add(record, source)
    count = len(reply_characters)
    return DatasetSummary(
        blood_type=blood_type,
        records=count,
        cells=cells,
        expressions=expressions,
        sentences=dict(sorted(sentences.items())),
        reply_characters=reply_characters,
        input_characters=input_characters,
        question_rate=questions / count if count else 0.0,
        emoji_by_intensity={intensity: (len(counts), mean(counts)) for intensity, counts in sorted(emoji.items())},
        emoji_by_third={third: mean(by_third[third]) if by_third[third] else 0.0 for third in IntensityThird},
        unique_replies=len(unique),
        near_duplicate_replies=near_replies,
        near_duplicate_dialogues=near_dialogues,
        emoji_intensity=spearman_of_counts(emoji_counts.items()),
        style=style.result(),
        variants=variant_count(sources),
        grounding=grounding,
    )


def dataset_table(summary: DatasetSummary, rejects: Mapping[str, int], language: str = ENGLISH) -> RenderableType:
    """Render the summary and the rejections for a terminal."""
    say = speaker(language)
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    table = Table(
        say(Message("feeling")),
        title=say(
            Message(
                "{blood_type}: {count:,} records by feeling and intensity", blood_type=summary.blood_type, count=summary.records
            )
        ),
        title_justify="left",
    )
    for third in IntensityThird:
        table.add_column(str(third), justify="right")
    for feeling in Feeling:
        table.add_row(str(feeling), *(f"{summary.cells.get((feeling, third), 0):,}" for third in IntensityThird))
    table.add_section()
    table.add_row(say(Message("emoji per reply")), *(f"{summary.emoji_by_third[third]:.2f}" for third in IntensityThird))
    facts = Table(show_header=False, box=None)
    facts.add_column()
    facts.add_column(justify="right")
    for name, value in facts_of(summary):
        facts.add_row(say(name), value)
    parts: list[RenderableType] = [table, facts]
    if rejects:
        rejected = Table(say(Message("reason")), title=say(Message("Rejected records")), title_justify="left")
        rejected.add_column(say(Message("count")), justify="right")
        for reason, times in sorted(rejects.items(), key=lambda item: -item[1]):
            rejected.add_row(reason, f"{times:,}")
        parts.append(rejected)
    else:
        parts.append(Text(say(Message("no rejected records"))))
    parts.extend(Text(say(Message("note: {note}", note=note.text))) for note in notes_of(summary))
    return Group(*parts)


def facts_of(summary: DatasetSummary) -> list[tuple[Message, str]]:
    """Return the scalar statistics as name and value."""
    count = max(1, summary.records)
    return [
        (Message("replies that ask a question"), f"{summary.question_rate:.1%}"),
        (
            Message("sentences per reply: {numbers}", numbers=", ".join(map(str, summary.sentences))),
            " / ".join(f"{times / count:.1%}" for times in summary.sentences.values()),
        ),
        (
            Message("characters per reply, mean and maximum"),
            f"{mean(summary.reply_characters or [0]):.1f}, {max(summary.reply_characters, default=0)}",
        ),
        (
            Message("characters per input, mean and maximum"),
            f"{mean(summary.input_characters or [0]):.1f}, {max(summary.input_characters, default=0)}",
        ),
        (Message("unique replies"), f"{summary.unique_replies / count:.2%}"),
        (Message("near-duplicates, by reply"), f"{summary.near_duplicate_replies / count:.2%}"),
        (Message("near-duplicates, by input and reply"), f"{summary.near_duplicate_dialogues / count:.2%}"),
        (Message("variants of the same exchange as another record"), f"{summary.variants:,}"),
        *style_facts(summary.style),
        *_grounding_facts(summary.grounding),
    ]


def _grounding_facts(found: Grounding) -> list[tuple[Message, str]]:
    return [
        (Message("replies that use a word of the summary"), _part(found.used_summaries, found.summaries)),
        (Message("questions with two options that the reply answers"), _part(found.answered_choices, found.choices)),
        (Message("replies in danger that name a number to call"), _part(found.dangers_with_number, found.dangers)),
        (Message("replies in danger that ask a question"), _part(found.dangers_with_question, found.dangers)),
        (Message("replies in danger that claim to be there"), _part(found.dangers_with_presence, found.dangers)),
    ]


def _part(count: int, of: int) -> str:
    return f"{count / of:.1%} ({count:,} / {of:,})" if of else "-"


def notes_of(summary: DatasetSummary, taken_for: Mapping[BloodType, int] | None = None) -> tuple[Note, ...]:
    """Return what to know before training on these records, by the default settings. `taken_for` adds the persona classifier."""
    count = max(1, summary.records)
    measured = {
        "one_or_two_sentences": sum(times for number, times in summary.sentences.items() if number <= MAX_SENTENCES) / count,
        "emoji_intensity": summary.emoji_intensity,
        "question_rate_min": summary.question_rate,
        "question_rate_max": summary.question_rate,
    }
    if taken_for:
        measured["persona"] = taken_for.get(summary.blood_type, 0) / count
    return data_notes(DataRates(summary.records, summary.cells, summary.blood_type, measured), TrainingConfig(), GatesConfig())
