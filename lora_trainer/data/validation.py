"""Check a whole data file: report its problems, coverage and prompt cost.

One pass reads one record at a time. Only the duplicate finder grows with the file, by about 225 MiB per million records.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Container, Iterable, Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, NamedTuple, TextIO

from lora_trainer.config import DEFAULT_LIMITS, LimitsConfig
from lora_trainer.data.checking import CheckSettings, Counts, LineBatch
from lora_trainer.data.duplicates import DuplicateFinder, normalized
from lora_trainer.data.jsonl import JsonlReader, Line, RawLine
from lora_trainer.data.lint import MIN_QUESTION_RATE, MIN_RECORDS_FOR_RATES
from lora_trainer.data.problems import Problem, Severity
from lora_trainer.data.prompt_cost import CountsTokens, PromptCost
from lora_trainer.data.records import EvaluationPrompt, PromptTag, TrainingRecord, texts_of
from lora_trainer.data.style import EMPTY_STYLE, Style, StyleCounter
from lora_trainer.data.text_damage import LostText
from lora_trainer.data.workers import BATCH_BYTES, BATCH_LINES, checked_batches
from lora_trainer.errors import DataError
from lora_trainer.messages import Message, counted, joined
from lora_trainer.persona.specs import persona_spec
from lora_trainer.persona.vocabulary import BloodType, Feeling, IntensityThird

SHOWN_PROBLEMS: Final = 50
"""Maximum number of problems that a report lists. Counts include all of them."""
OnProblem = Callable[[Problem], None]

_NAMED_FILE: Final = re.compile(r"train_data_type_(AB|A|B|O)(\.\w+)*", re.IGNORECASE)


class Note(NamedTuple):
    """Something to know before training that is neither an error nor a warning."""

    code: str
    text: Message


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
    style: Style = EMPTY_STYLE
    """How the first `MAX_STYLE_REPLIES` replies read together."""
    emoji_by_intensity: Mapping[tuple[int, int], int] = field(default_factory=dict)
    """Number of replies by intensity, in hundredths, and number of emoji."""
    notes: tuple[Note, ...] = ()
    """Empty unless the caller adds them; `report.data_notes` writes them."""
    is_prompts: bool = False
    """Whether the file contains evaluation prompts. They have no replies, so questions and emoji are 0."""
    tags: Mapping[PromptTag, int] = field(default_factory=dict)
    """Number of evaluation prompts with each tag."""

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
        errors = counted(self.errors, "{count:,} error", "{count:,} errors")
        warnings = counted(self.warnings, "{count:,} warning", "{count:,} warnings")
        total = Message("{file}: {errors}, {warnings}", file=name, errors=errors, warnings=warnings)
        if hidden:
            total = Message("{total} ({hidden:,} not shown; 'validate --json' lists all)", total=total, hidden=hidden)
        return [*shown, total]

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
            "style": None if self.is_prompts else self.style.as_json(),
            "notes": [note._asdict() for note in self.notes],
        }
        if self.is_prompts:
            document["tags"] = {str(tag): self.tags.get(tag, 0) for tag in PromptTag}
        if with_problems:
            document["problems"] = [problem.as_json() for problem in self.problems]
        return document


@dataclass(slots=True)
class _Problems:
    """The problems of one pass over a file: all are counted, the first ones kept."""

    on_problem: OnProblem | None
    counts: dict[Severity, Counter[str]] = field(default_factory=lambda: {severity: Counter() for severity in Severity})
    first: dict[Severity, list[Problem]] = field(default_factory=lambda: {severity: [] for severity in Severity})

    def add(self, problem: Problem) -> None:
        self.counts[problem.severity][problem.code] += 1
        first = self.first[problem.severity]
        if len(first) < SHOWN_PROBLEMS:
            first.append(problem)
        if self.on_problem:
            self.on_problem(problem)

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
    workers: int | None = None,
    on_problem: OnProblem | None = None,
    on_record: Callable[[TrainingRecord], None] | None = None,
    on_reply: Callable[[str], None] | None = None,
) -> FileReport:
    """Read `path` once and report on it. Never raises for bad content, and keeps no records.

    `blood_type` is the persona that the instructions should name and whose emoji rule applies. It defaults to the one in the
    file's name (`train_data_type_A.jsonl`), else to the one that most records name. With `tokenizer`, the report includes the
    cost of the prompts; `template_overhead_tokens` is what the base's chat template adds to each record (constant for ChatML).
    `on_problem` and `on_record` receive every problem and record in file order; problems of the whole file come last.
    `on_reply` receives the texts of the first `MAX_STYLE_REPLIES` replies.

    `workers` is the number of processes that check lines; the report is the same for any number. None decides by the file's size
    and the machine. Raises `HardwareError` if one is killed, and `ConfigError` if a persona's specification is incomplete.
    """
    reader = JsonlReader(path, limits=limits)
    known_type = blood_type or type_in_name(path)
    for each in [known_type] if known_type else BloodType:
        # an incomplete specification ends the check here, before any worker starts
        persona_spec(each)
    settings = CheckSettings(known_type, limits, tokenizer, max_length_tokens, template_overhead_tokens, on_record is not None)
    found, counts, duplicates, style = _Problems(on_problem), Counts(), DuplicateFinder(), StyleCounter()
    # lazily, so that replies are described only until there are enough
    batches = (LineBatch(lines, not style.is_full) for lines in _in_batches(reader.raw_lines()))
    with closing(checked_batches(batches, settings, workers)) as results:
        for result in results:
            counts.merge(result.counts)
            for line in result.lines:
                for problem in line.problems:
                    found.add(problem)
                if line.fingerprints and (earlier := duplicates.first_line(line.fingerprints, line.number)):
                    found.add(_duplicate(line.number, *earlier))
                if line.record and on_record:
                    on_record(line.record)
                if line.style and not style.is_full:
                    style.add(line.style)
                    if on_reply:
                        on_reply(line.text)
    expected_type = known_type or _most_named(counts.by_type)
    for problem in (*counts.lost_text.problems(), *_file_problems(counts, expected_type)):
        found.add(problem)
    per_third = {third: sum(counts.coverage[feeling, third] for feeling in Feeling) for third in IntensityThird}
    return FileReport(
        file=str(path),
        blood_type=expected_type,
        lines=reader.lines_read,
        blank_lines=reader.blank_lines,
        records=counts.records,
        counts={severity: dict(codes) for severity, codes in found.counts.items()},
        problems=found.shown(),
        coverage=dict(counts.coverage),
        question_rate=counts.questions / counts.records if counts.records else 0.0,
        emoji_mean={third: counts.emoji[third] / count if count else 0.0 for third, count in per_third.items()},
        cost=counts.lengths.result(max_length_tokens) if tokenizer else None,
        style=style.result(),
        emoji_by_intensity=dict(counts.emoji_by_intensity),
    )


def _in_batches(lines: Iterable[RawLine | Line[TrainingRecord]]) -> Iterator[list[RawLine | Line[TrainingRecord]]]:
    batch: list[RawLine | Line[TrainingRecord]] = []
    size_bytes = 0
    for line in lines:
        batch.append(line)
        size_bytes += len(line.raw) if isinstance(line, RawLine) else 0
        if len(batch) == BATCH_LINES or size_bytes >= BATCH_BYTES:
            yield batch
            batch, size_bytes = [], 0
    if batch:
        yield batch


def check_prompts(
    path: Path,
    *,
    limits: LimitsConfig = DEFAULT_LIMITS,
    on_problem: OnProblem | None = None,
    on_prompt: Callable[[EvaluationPrompt], None] | None = None,
) -> FileReport:
    """Read a file of evaluation prompts once and report on its schema, texts, coverage and repeated inputs."""
    reader = JsonlReader(path, EvaluationPrompt, limits=limits)
    found, lost_text = _Problems(on_problem), LostText()
    coverage: Counter[tuple[Feeling, IntensityThird]] = Counter()
    tags: Counter[PromptTag] = Counter()
    seen: dict[str, int] = {}
    for number, prompt, problems in reader:
        for problem in problems:
            found.add(problem)
        if prompt is None:
            continue
        emotion = prompt.context.current_emotion
        coverage[emotion.type, IntensityThird.of(emotion.intensity)] += 1
        tags.update(set(prompt.tags))
        first = seen.setdefault(normalized(prompt.input), number)
        if first != number:
            found.add(_duplicate(number, first, is_exact=False))
        for name, text in texts_of(prompt):
            lost_text.add(number, name, text)
        if on_prompt:
            on_prompt(prompt)
    for problem in lost_text.problems():
        found.add(problem)
    return FileReport(
        file=str(path),
        blood_type=None,
        lines=reader.lines_read,
        blank_lines=reader.blank_lines,
        records=coverage.total(),
        counts={severity: dict(codes) for severity, codes in found.counts.items()},
        problems=found.shown(),
        coverage=dict(coverage),
        question_rate=0.0,
        emoji_mean=dict.fromkeys(IntensityThird, 0.0),
        cost=None,
        is_prompts=True,
        tags=tags,
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
        Message("the same record as line {first_line}", first_line=first_line)
        if is_exact
        else Message("nearly the same input and reply as line {first_line}", first_line=first_line),
        "distinct records",
        "remove one of the two" if is_exact else "vary the wording, or remove one of the two",
    )


def type_in_name(path: Path) -> BloodType | None:
    """Return the persona that a name such as `train_data_type_A.jsonl` tells, in upper or lower case and with any suffix."""
    found = _NAMED_FILE.fullmatch(path.name)
    return BloodType(found[1].upper()) if found else None


def _most_named(by_type: Counter[BloodType]) -> BloodType | None:
    return by_type.most_common(1)[0][0] if by_type else None


def _file_problems(counts: Counts, expected_type: BloodType | None) -> Iterator[Problem]:
    for named, count in counts.named_elsewhere.items():
        if expected_type is None or expected_type in named:
            continue
        lines = counts.lines_naming[named]
        more = ", …" if count > len(lines) else ""
        yield Problem(
            None,
            "instruction",
            Severity.WARNING,
            "other_blood_type",
            counted(
                count,
                "{names} in {count:,} record (line {lines})",
                "{names} in {count:,} records (line {lines})",
                names=joined([f"{name}형" for name in BloodType if name in named], "{first} and {rest}"),
                lines=f"{', '.join(map(str, lines))}{more}",
            ),
            f"{expected_type}형",
            "check that this is the right persona's file",
        )
    if counts.records >= MIN_RECORDS_FOR_RATES and counts.questions < MIN_QUESTION_RATE * counts.records:
        yield Problem(
            None,
            "output.text",
            Severity.WARNING,
            "few_questions",
            Message(
                "a question in {rate:.0%} of {records:,} replies", rate=counts.questions / counts.records, records=counts.records
            ),
            Message("at least {rate:.0%}", rate=MIN_QUESTION_RATE),
            "ask something back more often",
        )
