"""`lora-trainer generate`: collect records from an engine, then write, summarise and report them."""

from __future__ import annotations

import random
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from lora_trainer import __version__, logs
from lora_trainer.data.evaluation_prompts import evaluation_prompts
from lora_trainer.data.jsonl import JsonlReader
from lora_trainer.data.problems import Severity
from lora_trainer.data.records import TrainingRecord
from lora_trainer.errors import ConfigError, DataError
from lora_trainer.evaluate.persona_classifier import bundled_classifier
from lora_trainer.generator.collector import RecordCollector, wanted_cells
from lora_trainer.generator.compose import compose
from lora_trainer.generator.dataset_summary import DatasetSummary, summarise
from lora_trainer.generator.html_report import PersonaSection, dataset_page, evenly_spaced
from lora_trainer.generator.teacher import Checkpoint, PassUsage, Teacher, TeacherUsage
from lora_trainer.generator.teacher_client import TeacherSettings
from lora_trainer.messages import ENGLISH, Message
from lora_trainer.persona.vocabulary import BloodType
from lora_trainer.store.interface import Storage
from lora_trainer.store.keys import local_file, split_uri
from lora_trainer.store.local import sha256_of
from lora_trainer.store.opening import open_storage
from lora_trainer.store.retry import RetryBudget

if TYPE_CHECKING:
    from rich.progress import Progress

Engine = Literal["compose", "teacher"]


@dataclass(frozen=True, slots=True)
class GenerateSettings:
    """Settings of one `generate` command."""

    blood_types: tuple[BloodType, ...]
    count: int
    """Records per persona."""
    output: str
    """A folder, or a `.jsonl` file for a single persona: a path, `file://` or `s3://`."""
    seed: int = 1
    engine: Engine = "compose"
    against: tuple[str, ...] = ()
    """JSONL files whose records the output must not resemble."""
    report: Path | None = None
    work_dir: Path = Path(".lora-trainer")
    overwrite: bool = False
    teacher: TeacherSettings | None = None
    """Required by `engine="teacher"`."""
    language: str = ENGLISH
    """Language of the report."""


@dataclass(frozen=True, slots=True)
class Generated:
    """The generated file of one persona."""

    blood_type: BloodType
    uri: str
    is_new: bool
    """False if a file with the same content already existed."""
    summary: DatasetSummary
    rejects: dict[str, int]
    notes: list[tuple[str, str]]
    duration_s: float


@dataclass(frozen=True, slots=True)
class _Filled:
    """The records that an engine made for one persona."""

    collector: RecordCollector
    duration_s: float
    notes: list[tuple[str, str]] = field(default_factory=list)
    checkpoint: Checkpoint | None = None


def generate(
    settings: GenerateSettings, progress: Progress | None = None, retry_budget: RetryBudget | None = None
) -> Iterator[Generated]:
    """Generate and write one file per persona, then the report.

    Raises `ConfigError` if a target exists with other content, `DataError` if the engine has too few records or `against` has
    errors, and `StorageError` if a store or the teacher fails permanently.
    """
    targets = {blood_type: _target(settings, blood_type, retry_budget) for blood_type in settings.blood_types}
    if settings.engine == "teacher":
        for storage, key, uri in targets.values():
            # fail before the first request: requests cost money
            if not settings.overwrite and storage.exists(key):
                raise _already_exists(uri)
    excluded = [record for uri in settings.against for record in _read(uri, retry_budget)]
    composed = _composed(settings, excluded, progress) if settings.engine == "compose" else {}
    sections = []
    for blood_type, (storage, key, uri) in targets.items():
        filled = composed.get(blood_type) or _ask_teacher(settings, blood_type, excluded, progress)
        collector = filled.collector
        is_new = _write(collector.accepted, storage, key, uri, overwrite=settings.overwrite)
        if filled.checkpoint:
            filled.checkpoint.remove()
        summary = summarise(blood_type, collector.accepted, collector.sources)
        done = Generated(blood_type, uri, is_new, summary, dict(collector.rejects), filled.notes, filled.duration_s)
        logs.get_logger().info(
            "data_generated",
            blood_type=str(blood_type),
            uri=uri,
            records=len(collector.accepted),
            variants=collector.variants,
            rejected=sum(collector.rejects.values()),
            rejected_by_reason=dict(collector.rejects),
            duration_s=done.duration_s,
        )
        if settings.report:
            taken_for = Counter(bundled_classifier().predict(record.reply.text for record in collector.accepted))
            sections.append(
                PersonaSection(summary, taken_for, collector.rejects, uri, evenly_spaced(collector.accepted), filled.notes)
            )
        yield done
    if settings.report:
        settings.report.parent.mkdir(parents=True, exist_ok=True)
        settings.report.write_text(
            dataset_page(Message("Generated persona data"), _facts(settings), sections, settings.language), encoding="utf-8"
        )


def _collector(blood_type: BloodType, excluded: Sequence[TrainingRecord]) -> RecordCollector:
    collector = RecordCollector(blood_type)
    collector.exclude_inputs(prompt.input for prompt in evaluation_prompts())
    collector.exclude_similar(excluded)
    return collector


def _composed(
    settings: GenerateSettings, excluded: Sequence[TrainingRecord], progress: Progress | None
) -> dict[BloodType, _Filled]:
    """Return each persona's records. Raises `DataError`, before anything is written, if one of them has too few."""
    filled = {}
    for blood_type in settings.blood_types:
        started_s = time.monotonic()
        collector = _collector(blood_type, excluded)
        cells = wanted_cells(settings.count, random.Random(settings.seed))
        compose(collector, cells, settings.seed, _bar(progress, blood_type, settings.count))
        filled[blood_type] = _Filled(collector, round(time.monotonic() - started_s, 1))
    problems = [
        Message(
            "{blood_type}: --engine compose can make {count:,} records from its exchanges, expected {expected:,}; "
            "lower --count, or use --engine teacher",
            blood_type=blood_type,
            count=len(made.collector.accepted),
            expected=settings.count,
        )
        for blood_type, made in filled.items()
        if len(made.collector.accepted) < settings.count
    ]
    if problems and settings.against:
        reasons = ("near_duplicate_reply", "near_duplicate_dialogue")
        rejected = sum(made.collector.rejects[reason] for made in filled.values() for reason in reasons)
        problems.append(
            Message(
                "--against: {rejected:,} variants nearly repeat another record; leave out the bundled data, whose exchanges "
                "compose varies",
                rejected=rejected,
            )
        )
    if problems:
        raise DataError(problems)
    return filled


def _ask_teacher(
    settings: GenerateSettings, blood_type: BloodType, excluded: Sequence[TrainingRecord], progress: Progress | None
) -> _Filled:
    started_s = time.monotonic()
    collector = _collector(blood_type, excluded)
    if settings.teacher is None:
        raise ConfigError(
            Message("--engine teacher: got no --model, expected the name of the teacher model; see 'lora-trainer generate --help'")
        )
    checkpoint = Checkpoint.of(settings.work_dir, blood_type, settings.count, settings.seed, settings.teacher)
    teacher = Teacher(settings.teacher, collector, checkpoint, settings.seed)
    teacher.generate(settings.count, _bar(progress, blood_type, settings.count))
    notes = _teacher_notes(teacher.usage, has_critic=settings.teacher.critic_model is not None)
    return _Filled(collector, round(time.monotonic() - started_s, 1), notes, checkpoint)


def _teacher_notes(usage: TeacherUsage, *, has_critic: bool) -> list[tuple[str, str]]:
    """Return the costs of both passes, and what the critic did."""
    notes = _costs(Message("drafts"), usage.drafting)
    if has_critic:
        notes += _costs(Message("critique"), usage.critique)
        notes += [
            (Message("critique, drafts with a fault: {fault}", fault=fault), f"{n:,}") for fault, n in usage.faults.most_common()
        ]
        notes.append((Message("critique, repaired records"), f"{usage.repaired:,}"))
    return [*notes, (Message("records resumed from an interrupted run"), f"{usage.resumed_records:,}")]


def _costs(name: Message, usage: PassUsage) -> list[tuple[str, str]]:
    return [
        (Message("{name}, requests, including retries", name=name), f"{usage.requests:,}"),
        (Message("{name}, prompt tokens", name=name), f"{usage.prompt_tokens:,}"),
        (Message("{name}, completion tokens", name=name), f"{usage.completion_tokens:,}"),
        *(
            (Message("{name}, failed requests: {kind}", name=name, kind=kind), f"{times:,}")
            for kind, times in usage.failures.most_common()
        ),
    ]


def _target(settings: GenerateSettings, blood_type: BloodType, retry_budget: RetryBudget | None) -> tuple[Storage, str, str]:
    output = settings.output
    if output.endswith(".jsonl"):
        folder, key = split_uri(output)
        if len(settings.blood_types) > 1:
            raise ConfigError(
                Message(
                    "--output: got one file ({file}) for {count} personas, expected a folder",
                    file=output,
                    count=len(settings.blood_types),
                )
            )
    else:
        folder, key = output, f"train_data_type_{blood_type}.jsonl"
    storage = open_storage(folder, retry_budget)
    return storage, key, storage.uri + key


def _write(records: Sequence[TrainingRecord], storage: Storage, key: str, uri: str, *, overwrite: bool) -> bool:
    """Write the records atomically. Return False if the same content already existed."""
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / "new.jsonl"
        with path.open("w", encoding="utf-8", newline="\n") as file:
            file.writelines(record.to_json() + "\n" for record in records)
        if storage.exists(key):
            if storage.download(key, Path(scratch) / "old.jsonl").sha256 == sha256_of(path):
                return False
            if not overwrite:
                raise _already_exists(uri)
        storage.upload(path, key)
    return True


def _already_exists(uri: str) -> ConfigError:
    return ConfigError(
        Message("{file}: got an existing file, expected none; choose another --output or pass --overwrite", file=uri)
    )


def _read(uri: str, retry_budget: RetryBudget | None) -> list[TrainingRecord]:
    with tempfile.TemporaryDirectory() as scratch:
        path = local_file(uri)
        if path is None:
            folder, key = split_uri(uri)
            # keep the name: its suffix selects the decompression
            path = Path(scratch) / Path(key).name
            open_storage(folder, retry_budget).download(key, path)
        elif not path.is_file():
            raise ConfigError(Message("--against: {file}: no such file; expected a JSONL file of training data", file=uri))
        lines = list(JsonlReader(path))
        problems = [problem.render(uri) for line in lines for problem in line.problems if problem.severity is Severity.ERROR]
        if problems:
            raise DataError(problems[:50])
        return [line.record for line in lines if line.record]


def _bar(progress: Progress | None, blood_type: BloodType, count: int) -> Callable[[TrainingRecord], None]:
    if progress is None:
        return lambda _: None
    task = progress.add_task(f"persona {blood_type}", total=count)
    return lambda _: progress.advance(task)


def _facts(settings: GenerateSettings) -> list[tuple[str, str]]:
    facts = [
        (Message("engine"), settings.engine),
        (Message("seed"), str(settings.seed)),
        (Message("records per persona"), f"{settings.count:,}"),
        ("lora-trainer", __version__),
    ]
    if settings.teacher and settings.engine == "teacher":
        facts += [(Message("model"), settings.teacher.model), (Message("server"), settings.teacher.base_url)]
        if settings.teacher.critic_model:
            facts.append((Message("model of the critique"), settings.teacher.critic_model))
    return facts
