"""A data file as a whole: every problem, what its records cover, and what its prompts cost.

One pass, one record at a time. What grows with the file is the table that finds duplicates and nothing
else, so that a million lines are checked in the memory of a thousand and some tens of MiB.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Container, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, TextIO

from lora_trainer.config import DEFAULT_LIMITS, LimitsConfig
from lora_trainer.data.duplicates import DuplicateFinder, normalized
from lora_trainer.data.jsonl import JsonlReader
from lora_trainer.data.lint import MIN_QUESTION_RATE, MIN_RECORDS_FOR_RATES, blood_types_named, has_question, lint_reply
from lora_trainer.data.problems import Problem, Severity
from lora_trainer.data.prompt_cost import _SHOWN_LINES, CostMeter, CountsTokens, PromptCost
from lora_trainer.data.records import EvaluationPrompt, TrainingRecord
from lora_trainer.errors import DataError
from lora_trainer.persona.emoji import emoji_count
from lora_trainer.persona.vocabulary import BloodType, Feeling, IntensityThird

SHOWN_PROBLEMS: Final = 50
"""Problems that a report holds in full; all are counted."""
OnProblem = Callable[[Problem], None]


@dataclass(frozen=True, slots=True)
class FileReport:
    """All that is known of one data file after one pass over it."""

    file: str
    blood_type: BloodType | None
    """The persona that its instructions were held against; `None`: neither given nor told by name or content."""
    lines: int
    blank_lines: int
    records: int
    """Lines that are records."""
    counts: Mapping[Severity, Mapping[str, int]]
    """How often each code occurred."""
    problems: tuple[Problem, ...]
    """The first 50, by line; errors come before warnings when there is no room for both."""
    coverage: Mapping[tuple[Feeling, IntensityThird], int]
    """Records by what the AI feels and how strongly."""
    question_rate: float
    """Share of replies that ask something, in [0, 1]; 0 without records."""
    emoji_mean: Mapping[IntensityThird, float]
    """Emoji in a reply, on average; 0 for a third without records."""
    cost: PromptCost | None
    """`None` without a tokenizer."""
    is_prompts: bool = False
    """Evaluation prompts, which have no reply: nothing is said of questions and emoji."""

    @property
    def errors(self) -> int:
        """Problems that stop a run."""
        return sum(self.counts[Severity.ERROR].values())

    @property
    def warnings(self) -> int:
        """Problems that stop a run only under `--strict`."""
        return sum(self.counts[Severity.WARNING].values())

    def is_accepted(self, *, strict: bool = False) -> bool:
        """Whether a run would train on this file."""
        return not self.errors and not (strict and self.warnings)

    def lines_of_problems(self, severities: Container[Severity] = tuple(Severity), name: str = "") -> list[str]:
        """The problems held, one a line, and a last line that counts all there are. Only those of `severities` are shown.

        `name` is what the user calls the file, if that is not its path.
        """
        name = name or str(self.file)
        shown = [problem.render(name) for problem in self.problems if problem.severity in severities]
        hidden = self.errors + self.warnings - len(shown)
        more = f" ({hidden:,} of them not shown here; 'validate --json' lists all)" if hidden else ""
        return [*shown, f"{name}: {plural(self.errors, 'error')}, {plural(self.warnings, 'warning')}{more}"]

    def as_json(self, *, with_problems: bool = True) -> dict[str, object]:
        """Plain values. `with_problems` adds those held in full; `write_json` streams all of them instead."""
        document: dict[str, object] = {
            "file": self.file,
            "kind": "evaluation_prompts" if self.is_prompts else "training_records",
            "blood_type": self.blood_type and str(self.blood_type),
            "lines": self.lines,
            "blank_lines": self.blank_lines,
            "records": self.records,
            "errors": self.errors,
            "warnings": self.warnings,
            "counts": {str(severity): dict(sorted(codes.items())) for severity, codes in self.counts.items()},
            "coverage": {
                str(feeling): {str(third): self.coverage.get((feeling, third), 0) for third in IntensityThird}
                for feeling in Feeling
            },
            "question_rate": round(self.question_rate, 4),
            "emoji_mean": {str(third): round(self.emoji_mean[third], 4) for third in IntensityThird},
            "prompt_cost": self.cost and self.cost.as_json(),
        }
        if with_problems:
            document["problems"] = [problem.as_json() for problem in self.problems]
        return document


@dataclass(slots=True)
class _Tally:
    """What a pass over one file adds up."""

    on_problem: OnProblem | None
    counts: dict[Severity, Counter[str]] = field(default_factory=lambda: {severity: Counter() for severity in Severity})
    first: dict[Severity, list[Problem]] = field(default_factory=lambda: {severity: [] for severity in Severity})
    records: int = 0
    questions: int = 0
    coverage: Counter[tuple[Feeling, IntensityThird]] = field(default_factory=Counter)
    emoji: Counter[IntensityThird] = field(default_factory=Counter)
    by_type: Counter[BloodType] = field(default_factory=Counter)
    named_elsewhere: Counter[frozenset[BloodType]] = field(default_factory=Counter)
    lines_naming: dict[frozenset[BloodType], list[int]] = field(default_factory=dict)

    def problem(self, problem: Problem) -> None:
        self.counts[problem.severity][problem.code] += 1
        first = self.first[problem.severity]
        if len(first) < SHOWN_PROBLEMS:
            first.append(problem)
        if self.on_problem:
            self.on_problem(problem)

    def record(self, line: int, record: TrainingRecord) -> None:
        text, emotion = record.reply.text, record.context.current_emotion
        third = IntensityThird.of(emotion.intensity)
        self.records += 1
        self.coverage[emotion.type, third] += 1
        self.emoji[third] += emoji_count(text)
        self.questions += has_question(text)
        if named := blood_types_named(record.instruction):
            self.by_type.update(named)
            self.named_elsewhere[named] += 1
            lines = self.lines_naming.setdefault(named, [])
            if len(lines) < _SHOWN_LINES:
                lines.append(line)

    def shown(self) -> tuple[Problem, ...]:
        errors = self.first[Severity.ERROR]
        kept = [*errors, *self.first[Severity.WARNING]][:SHOWN_PROBLEMS]
        return tuple(sorted(kept, key=lambda problem: problem.line or 0))


def check_file(
    path: Path,
    blood_type: BloodType | None = None,
    tokenizer: CountsTokens | None = None,
    *,
    max_length_tokens: int = 1024,
    template_overhead_tokens: int = 0,
    limits: LimitsConfig = DEFAULT_LIMITS,
    on_problem: OnProblem | None = None,
    on_record: Callable[[TrainingRecord], None] | None = None,
) -> FileReport:
    """Read `path` once and report on it. Nothing in the file raises; the records are not kept.

    `blood_type` is the persona that the instructions should name, and whose emoji rule holds. Without it: the one in the file's
    name (`train_data_type_A.jsonl`), or else the one that most records name. `tokenizer` makes the report tell
    what the prompts cost; `template_overhead_tokens` is what the base's chat template adds to a record
    (constant for ChatML). `limits` are those of `JsonlReader`. `on_problem` is called with every problem, `on_record` with
    every record, in the order of the file; problems of the file as a whole come last.
    """
    reader = JsonlReader(path, limits=limits)
    tally = _Tally(on_problem)
    duplicates = DuplicateFinder()
    meter = CostMeter(tokenizer, max_length_tokens, template_overhead_tokens) if tokenizer else None
    known_type = blood_type or _type_in_name(path)
    for number, record, problems in reader:
        for problem in problems:
            tally.problem(problem)
        if record is None:
            continue
        tally.record(number, record)
        persona = known_type or _only_one(blood_types_named(record.instruction))
        for problem in lint_reply(record.reply.text, record.context.current_emotion.intensity, number, persona):
            tally.problem(problem)
        if earlier := duplicates.first_line(record, number):
            tally.problem(_duplicate(number, *earlier))
        if meter:
            meter.add(number, record)
        if on_record:
            on_record(record)
    expected_type = known_type or _most_named(tally.by_type)
    for problem in _about_file(tally, expected_type):
        tally.problem(problem)
    per_third = {third: sum(tally.coverage[feeling, third] for feeling in Feeling) for third in IntensityThird}
    return FileReport(
        file=str(path),
        blood_type=expected_type,
        lines=reader.lines_read,
        blank_lines=reader.blank_lines,
        records=tally.records,
        counts={severity: dict(codes) for severity, codes in tally.counts.items()},
        problems=tally.shown(),
        coverage=dict(tally.coverage),
        question_rate=tally.questions / tally.records if tally.records else 0.0,
        emoji_mean={third: tally.emoji[third] / count if count else 0.0 for third, count in per_third.items()},
        cost=meter.result() if meter else None,
    )


def check_prompts(path: Path, *, limits: LimitsConfig = DEFAULT_LIMITS, on_problem: OnProblem | None = None) -> FileReport:
    """Read a file of evaluation prompts once and report on it: their schema, what they cover, and inputs that come again."""
    reader = JsonlReader(path, EvaluationPrompt, limits=limits)
    tally = _Tally(on_problem)
    seen: dict[str, int] = {}
    for number, prompt, problems in reader:
        for problem in problems:
            tally.problem(problem)
        if prompt is None:
            continue
        emotion = prompt.context.current_emotion
        tally.records += 1
        tally.coverage[emotion.type, IntensityThird.of(emotion.intensity)] += 1
        first = seen.setdefault(normalized(prompt.input), number)
        if first != number:
            tally.problem(_duplicate(number, first, is_exact=False))
    return FileReport(
        file=str(path),
        blood_type=None,
        lines=reader.lines_read,
        blank_lines=reader.blank_lines,
        records=tally.records,
        counts={severity: dict(codes) for severity, codes in tally.counts.items()},
        problems=tally.shown(),
        coverage=dict(tally.coverage),
        question_rate=0.0,
        emoji_mean=dict.fromkeys(IntensityThird, 0.0),
        cost=None,
        is_prompts=True,
    )


def read_records(
    path: Path,
    blood_type: BloodType | None = None,
    *,
    limits: LimitsConfig = DEFAULT_LIMITS,
    strict: bool = False,
    name: str = "",
) -> tuple[list[TrainingRecord], FileReport]:
    """All records of `path`, in order, for training; `name` is what the user calls the file, if that is not its path.

    Raises `DataError` when there are errors, or warnings under `strict`: its problems are the first 50,
    one `file:line: field: got ..., expected ...; fix` each, and a last line that counts all of them.
    """
    records: list[TrainingRecord] = []
    report = check_file(path, blood_type, limits=limits, on_record=records.append)
    if not report.is_accepted(strict=strict):
        # warnings stop nothing unless strict, and would hide among them what does
        raise DataError(report.lines_of_problems(tuple(Severity) if strict else (Severity.ERROR,), name))
    return records, report


def write_json(out: TextIO, paths: Iterable[Path], check: Callable[[Path, OnProblem], FileReport]) -> list[FileReport]:
    """Check `paths` and write one JSON document: `{"files": [{"problems": [all of them], ...}, ...]}`.

    `check` is `check_file` with everything but the path and `on_problem` given. Problems are written as
    they are found, so their number costs no memory. What is written is ASCII, whatever `out` is encoded in.
    """
    reports: list[FileReport] = []
    out.write('{"files": [')
    for path in paths:
        out.write(("," if reports else "") + '\n{"problems": [')
        separator = "\n"

        def write_problem(problem: Problem) -> None:
            nonlocal separator
            out.write(separator + json.dumps(problem.as_json()))
            separator = ",\n"

        report = check(path, write_problem)
        out.write("],\n" + json.dumps(report.as_json(with_problems=False))[1:])
        reports.append(report)
    out.write("\n]}\n")
    return reports


def _duplicate(line: int, first_line: int, is_exact: bool) -> Problem:
    return Problem(
        line,
        "",
        Severity.WARNING,
        "duplicate" if is_exact else "near_duplicate",
        f"the record of line {first_line} again" if is_exact else f"nearly the input and the reply of line {first_line}",
        "records that differ",
        "remove one of the two" if is_exact else "vary the wording, or remove one of the two",
    )


_NAMED_FILE = re.compile(r"train_data_type_(AB|A|B|O)\.jsonl(\.gz|\.zst)?")


def _type_in_name(path: Path) -> BloodType | None:
    found = _NAMED_FILE.fullmatch(path.name)
    return BloodType(found[1]) if found else None


def _only_one(named: frozenset[BloodType]) -> BloodType | None:
    return next(iter(named)) if len(named) == 1 else None


def _most_named(by_type: Counter[BloodType]) -> BloodType | None:
    return by_type.most_common(1)[0][0] if by_type else None


def _about_file(tally: _Tally, expected_type: BloodType | None) -> Iterator[Problem]:
    for named, count in tally.named_elsewhere.items():
        if expected_type is None or expected_type in named:
            continue
        lines = tally.lines_naming[named]
        more = ", …" if count > len(lines) else ""
        yield Problem(
            None,
            "instruction",
            Severity.WARNING,
            "other_blood_type",
            f"{' and '.join(f'{name}형' for name in BloodType if name in named)} in {plural(count, 'record')} "
            f"(line {', '.join(map(str, lines))}{more})",
            f"{expected_type}형",
            "check that this is the right persona's file",
        )
    if tally.records >= MIN_RECORDS_FOR_RATES and tally.questions < MIN_QUESTION_RATE * tally.records:
        yield Problem(
            None,
            "output.text",
            Severity.WARNING,
            "few_questions",
            f"a question in {tally.questions / tally.records:.0%} of {tally.records:,} replies",
            f"at least {MIN_QUESTION_RATE:.0%}",
            "ask something back more often",
        )


def plural(count: int, word: str) -> str:
    return f"{count:,} {word}" if count == 1 else f"{count:,} {word}s"
