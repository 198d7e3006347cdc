"""Check lines in batches: parse them, lint them, count them. A batch depends on no other, so any process may check it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from lora_trainer.config import LimitsConfig
from lora_trainer.data.duplicates import Fingerprints, fingerprints
from lora_trainer.data.jsonl import Line, RawLine, parse_line
from lora_trainer.data.lint import blood_types_named, has_question, lint_exchange
from lora_trainer.data.problems import Problem
from lora_trainer.data.prompt_cost import SHOWN_LINES, CostMeter, CountsTokens, TokenLengths
from lora_trainer.data.records import TrainingRecord, texts_of
from lora_trainer.data.style import ReplyStyle, described
from lora_trainer.data.text_damage import LostText
from lora_trainer.persona.emoji import emoji_count
from lora_trainer.persona.vocabulary import BloodType, Feeling, IntensityThird

INTENSITY_STEPS = 100
"""Intensities are counted in hundredths, so that the counts do not grow with the file."""


@dataclass(frozen=True, slots=True)
class CheckSettings:
    """What to check lines against."""

    blood_type: BloodType | None
    """Persona whose rules apply; None: the one that each instruction names."""
    limits: LimitsConfig
    tokenizer: CountsTokens | None
    max_length_tokens: int
    template_overhead_tokens: int
    keeps_records: bool
    """Whether to return the records, too."""


class LineBatch(NamedTuple):
    """Consecutive lines of a file."""

    lines: Sequence[RawLine | Line[TrainingRecord]]
    with_style: bool
    """Whether to describe the style of the replies."""


class CheckedLine(NamedTuple):
    """What the lines before it decide about: the order of problems, and duplicates."""

    number: int
    problems: Sequence[Problem]
    fingerprints: Fingerprints | None
    """None if the line holds no valid record."""
    record: TrainingRecord | None
    """None unless `CheckSettings.keeps_records`."""
    style: ReplyStyle | None
    """None unless `LineBatch.with_style`."""
    text: str
    """The reply's text; empty unless `LineBatch.with_style`."""


@dataclass(slots=True)
class Counts:
    """Counts over records that add up, whichever process made them."""

    records: int = 0
    questions: int = 0
    coverage: Counter[tuple[Feeling, IntensityThird]] = field(default_factory=Counter)
    emoji: Counter[IntensityThird] = field(default_factory=Counter)
    emoji_by_intensity: Counter[tuple[int, int]] = field(default_factory=Counter)
    """Number of replies by intensity, in hundredths, and number of emoji."""
    by_type: Counter[BloodType] = field(default_factory=Counter)
    named_elsewhere: Counter[frozenset[BloodType]] = field(default_factory=Counter)
    lines_naming: dict[frozenset[BloodType], list[int]] = field(default_factory=dict)
    lost_text: LostText = field(default_factory=LostText)
    lengths: TokenLengths = field(default_factory=TokenLengths)

    def add(self, line: int, record: TrainingRecord) -> None:
        """Count the record on line `line`."""
        text, emotion = record.reply.text, record.context.current_emotion
        third, emoji = IntensityThird.of(emotion.intensity), emoji_count(text)
        self.records += 1
        self.coverage[emotion.type, third] += 1
        self.emoji[third] += emoji
        self.emoji_by_intensity[round(emotion.intensity * INTENSITY_STEPS), emoji] += 1
        self.questions += has_question(text)
        if named := blood_types_named(record.instruction):
            self.by_type.update(name for name in BloodType if name in named)
            self.named_elsewhere[named] += 1
            self._name(named, [line])
        for name, text in texts_of(record):
            self.lost_text.add(line, name, text)

    def merge(self, later: Counts) -> None:
        """Add the counts of later lines."""
        self.records += later.records
        self.questions += later.questions
        self.coverage.update(later.coverage)
        self.emoji.update(later.emoji)
        self.emoji_by_intensity.update(later.emoji_by_intensity)
        self.by_type.update(later.by_type)
        self.named_elsewhere.update(later.named_elsewhere)
        for named, lines in later.lines_naming.items():
            self._name(named, lines)
        self.lost_text.merge(later.lost_text)
        self.lengths.merge(later.lengths)

    def _name(self, named: frozenset[BloodType], lines: Sequence[int]) -> None:
        known = self.lines_naming.setdefault(named, [])
        known.extend(lines[: SHOWN_LINES - len(known)])


class CheckedBatch(NamedTuple):
    """The result of one batch."""

    lines: Sequence[CheckedLine]
    counts: Counts


class BatchChecker:
    """Checks batches, one after another. Caches token counts from batch to batch."""

    def __init__(self, settings: CheckSettings) -> None:
        self._settings = settings
        tokenizer = settings.tokenizer
        self._meter = CostMeter(tokenizer, settings.max_length_tokens, settings.template_overhead_tokens) if tokenizer else None

    def check(self, batch: LineBatch) -> CheckedBatch:
        """Return what a batch holds. Raises `ConfigError` if the tokenizer fails on a text."""
        counts = Counts()
        checked = [self._check_line(line, batch.with_style, counts) for line in batch.lines]
        if self._meter:
            counts.lengths = self._meter.taken()
        return CheckedBatch(checked, counts)

    def _check_line(self, raw: RawLine | Line[TrainingRecord], with_style: bool, counts: Counts) -> CheckedLine:
        settings = self._settings
        number, record, problems = parse_line(raw, TrainingRecord, settings.limits)
        if record is None:
            return CheckedLine(number, problems, None, None, None, "")
        text, emotion = record.reply.text, record.context.current_emotion
        named = blood_types_named(record.instruction)
        persona = settings.blood_type or (next(iter(named)) if len(named) == 1 else None)
        found = lint_exchange(record.context.summary, record.input, text, emotion.intensity, number, persona)
        counts.add(number, record)
        if self._meter:
            self._meter.add(number, record)
        return CheckedLine(
            number,
            (*problems, *found),
            fingerprints(record),
            record if settings.keeps_records else None,
            described(text) if with_style else None,
            text if with_style else "",
        )
