"""Check a whole data file: report its problems, coverage and prompt cost.

One pass reads one record at a time. Only the duplicate finder grows with the file, by about 225 MiB per million records.
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
from lora_trainer.data.lint import MIN_QUESTION_RATE, MIN_RECORDS_FOR_RATES, blood_types_named, has_question, lint_exchange
from lora_trainer.data.problems import Problem, Severity
from lora_trainer.data.prompt_cost import SHOWN_LINES, CostMeter, CountsTokens, PromptCost
from lora_trainer.data.records import EvaluationPrompt, StrictModel, TrainingRecord, texts_of
from lora_trainer.data.text_damage import LostText
from lora_trainer.errors import DataError
from lora_trainer.persona.emoji import emoji_count
from lora_trainer.persona.vocabulary import BloodType, Feeling, IntensityThird

SHOWN_PROBLEMS: Final = 50
"""Maximum number of problems that a report lists. Counts include all of them."""
OnProblem = Callable[[Problem], None]

_NAMED_FILE: Final = re.compile(r"train_data_type_(AB|A|B|O)(\.\w+)*", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class FileReport:
    """The result of one pass over one data file."""

    file: str
    blood_type: BloodType | None
    """Persona that instructions were checked against; None if neither caller, file name nor content determines it."""
    lines: int
    blank_lines: int
    records: int
    """Number of valid records."""
    counts: Mapping[Severity, Mapping[str, int]]
    """Number of problems per severity and code."""
    problems: tuple[Problem, ...]
    """At most `SHOWN_PROBLEMS`, sorted by line. Errors take precedence over warnings."""
    coverage: Mapping[tuple[Feeling, IntensityThird], int]
    """Number of records per feeling and third of intensity."""
    question_rate: float
    """Share of replies that ask something, in [0, 1]; 0 if there are no records."""
    emoji_mean: Mapping[IntensityThird, float]
    """Mean number of emoji per reply; 0 for a third without records."""
    cost: PromptCost | None
    """None if no tokenizer was given."""
    is_prompts: bool = False
    """Whether the file contains evaluation prompts. They have no replies, so questions and emoji are 0."""

    @property
    def errors(self) -> int:
        """Number of problems that stop a run."""
        return sum(self.counts[Severity.ERROR].values())

    @property
    def warnings(self) -> int:
        """Number of problems that stop a run only under `--strict`."""
        return sum(self.counts[Severity.WARNING].values())

    def is_accepted(self, *, strict: bool = False) -> bool:
        """Return whether a run would train on this file."""
        return not self.errors and not (strict and self.warnings)

    def problem_lines(self, severities: Container[Severity] = tuple(Severity), name: str = "") -> list[str]:
        """Return one line per listed problem of `severities`, and a last line with the total.

        `name` replaces the path of the file if the user knows it by another name.
        """
        name = name or str(self.file)
        shown = [problem.render(name) for problem in self.problems if problem.severity in severities]
        hidden = self.errors + self.warnings - len(shown)
        more = f" ({hidden:,} not shown; 'validate --json' lists all)" if hidden else ""
        return [*shown, f"{name}: {plural(self.errors, 'error')}, {plural(self.warnings, 'warning')}{more}"]

    def as_json(self, *, with_problems: bool = True) -> dict[str, object]:
        """Return JSON-compatible values. `with_problems` includes the listed problems; `write_json` streams all of them instead."""
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
    """Running counts of one pass over a file."""

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
    lost_text: LostText = field(default_factory=LostText)

    def add_problem(self, problem: Problem) -> None:
        self.counts[problem.severity][problem.code] += 1
        first = self.first[problem.severity]
        if len(first) < SHOWN_PROBLEMS:
            first.append(problem)
        if self.on_problem:
            self.on_problem(problem)

    def add_texts(self, line: int, record: StrictModel) -> None:
        for name, text in texts_of(record):
            self.lost_text.add(line, name, text)

    def add_record(self, line: int, record: TrainingRecord) -> None:
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
            if len(lines) < SHOWN_LINES:
                lines.append(line)

    def first_problems(self) -> tuple[Problem, ...]:
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
    """Read `path` once and report on it. Never raises for bad content, and keeps no records.

    `blood_type` is the persona that the instructions should name and whose emoji rule applies. It defaults to the one in the
    file's name (`train_data_type_A.jsonl`), else to the one that most records name. With `tokenizer`, the report includes the
    cost of the prompts; `template_overhead_tokens` is what the base's chat template adds to each record (constant for ChatML).
    `on_problem` and `on_record` receive every problem and record in file order; problems of the whole file come last.
    """
    reader = JsonlReader(path, limits=limits)
    tally = _Tally(on_problem)
    duplicates = DuplicateFinder()
    meter = CostMeter(tokenizer, max_length_tokens, template_overhead_tokens) if tokenizer else None
    known_type = blood_type or type_in_name(path)
    for number, record, problems in reader:
        for problem in problems:
            tally.add_problem(problem)
        if record is None:
            continue
        tally.add_record(number, record)
        tally.add_texts(number, record)
        persona = known_type or _single(blood_types_named(record.instruction))
        for problem in lint_exchange(
            record.context.summary, record.input, record.reply.text, record.context.current_emotion.intensity, number, persona
        ):
            tally.add_problem(problem)
        if earlier := duplicates.first_line(record, number):
            tally.add_problem(_duplicate(number, *earlier))
        if meter:
            meter.add(number, record)
        if on_record:
            on_record(record)
    expected_type = known_type or _most_named(tally.by_type)
    for problem in (*tally.lost_text.problems(), *_file_problems(tally, expected_type)):
        tally.add_problem(problem)
    per_third = {third: sum(tally.coverage[feeling, third] for feeling in Feeling) for third in IntensityThird}
    return FileReport(
        file=str(path),
        blood_type=expected_type,
        lines=reader.lines_read,
        blank_lines=reader.blank_lines,
        records=tally.records,
        counts={severity: dict(codes) for severity, codes in tally.counts.items()},
        problems=tally.first_problems(),
        coverage=dict(tally.coverage),
        question_rate=tally.questions / tally.records if tally.records else 0.0,
        emoji_mean={third: tally.emoji[third] / count if count else 0.0 for third, count in per_third.items()},
        cost=meter.result() if meter else None,
    )


def check_prompts(
    path: Path,
    *,
    limits: LimitsConfig = DEFAULT_LIMITS,
    on_problem: OnProblem | None = None,
    on_prompt: Callable[[EvaluationPrompt], None] | None = None,
) -> FileReport:
    """Read a file of evaluation prompts once and report on its schema, texts, coverage and repeated inputs."""
    reader = JsonlReader(path, EvaluationPrompt, limits=limits)
    tally = _Tally(on_problem)
    seen: dict[str, int] = {}
    for number, prompt, problems in reader:
        for problem in problems:
            tally.add_problem(problem)
        if prompt is None:
            continue
        emotion = prompt.context.current_emotion
        tally.records += 1
        tally.coverage[emotion.type, IntensityThird.of(emotion.intensity)] += 1
        first = seen.setdefault(normalized(prompt.input), number)
        if first != number:
            tally.add_problem(_duplicate(number, first, is_exact=False))
        tally.add_texts(number, prompt)
        if on_prompt:
            on_prompt(prompt)
    for problem in tally.lost_text.problems():
        tally.add_problem(problem)
    return FileReport(
        file=str(path),
        blood_type=None,
        lines=reader.lines_read,
        blank_lines=reader.blank_lines,
        records=tally.records,
        counts={severity: dict(codes) for severity, codes in tally.counts.items()},
        problems=tally.first_problems(),
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
    """Return all records of `path`, in file order, and the report on it.

    `name` replaces the path in messages if the user knows the file by another name. Raises `DataError` with the lines of
    `FileReport.problem_lines` if there are errors, or warnings under `strict`.
    """
    records: list[TrainingRecord] = []
    report = check_file(path, blood_type, limits=limits, on_record=records.append)
    if not report.is_accepted(strict=strict):
        # without `strict`, warnings don't stop the run, and listing them would bury the errors
        raise DataError(report.problem_lines(tuple(Severity) if strict else (Severity.ERROR,), name))
    return records, report


def read_prompts(
    path: Path, *, limits: LimitsConfig = DEFAULT_LIMITS, strict: bool = False, name: str = ""
) -> tuple[tuple[EvaluationPrompt, ...], FileReport]:
    """Return all evaluation prompts of `path`, in file order, and the report on it. Raises `DataError` as `read_records` does."""
    prompts: list[EvaluationPrompt] = []
    report = check_prompts(path, limits=limits, on_prompt=prompts.append)
    if not report.is_accepted(strict=strict):
        raise DataError(report.problem_lines(tuple(Severity) if strict else (Severity.ERROR,), name))
    return tuple(prompts), report


def write_json(out: TextIO, paths: Iterable[Path], check: Callable[[Path, OnProblem], FileReport]) -> list[FileReport]:
    """Check `paths`, write one JSON document `{"files": [{"problems": [...], ...}, ...]}` and return the reports.

    `check` takes a path and `on_problem`, and is usually a partial `check_file`. Each problem is written as soon as it is found,
    so memory does not grow with their number. The output is ASCII, so it does not depend on the encoding of `out`.
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
        f"the same record as line {first_line}" if is_exact else f"nearly the same input and reply as line {first_line}",
        "distinct records",
        "remove one of the two" if is_exact else "vary the wording, or remove one of the two",
    )


def type_in_name(path: Path) -> BloodType | None:
    """Return the persona that a name such as `train_data_type_A.jsonl` tells, in upper or lower case and with any suffix."""
    found = _NAMED_FILE.fullmatch(path.name)
    return BloodType(found[1].upper()) if found else None


def _single(named: frozenset[BloodType]) -> BloodType | None:
    return next(iter(named)) if len(named) == 1 else None


def _most_named(by_type: Counter[BloodType]) -> BloodType | None:
    return by_type.most_common(1)[0][0] if by_type else None


def _file_problems(tally: _Tally, expected_type: BloodType | None) -> Iterator[Problem]:
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
    """Return `count` and `word`, with an `s` unless the count is 1."""
    return f"{count:,} {word}" if count == 1 else f"{count:,} {word}s"
