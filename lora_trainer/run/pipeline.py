"""One run of one persona, top to bottom: `story`. Each step is a function below, in the same order."""

from __future__ import annotations

import math
import os
import shutil
import subprocess
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from enum import Enum
from pathlib import Path
from typing import Any

import structlog
from rich.console import Console

from lora_trainer import __version__
from lora_trainer.base_model import Base, fetch_base, identify_base
from lora_trainer.config import BaseModelConfig, LeaseConfig, RunConfig
from lora_trainer.data.compression import SUFFIXES, is_jsonl
from lora_trainer.data.evaluation_prompts import evaluation_prompts
from lora_trainer.data.jsonl import JsonlReader
from lora_trainer.data.problems import Severity
from lora_trainer.data.records import EvaluationPrompt, TrainingRecord
from lora_trainer.data.split import split_held_out
from lora_trainer.data.validation import read_records
from lora_trainer.errors import ConfigError, DataError, Interrupted, LoraTrainerError, OutOfMemoryError, StorageError
from lora_trainer.evaluate import gates
from lora_trainer.evaluate.decoding import decodings
from lora_trainer.evaluate.llm_judge import check_judge, judge_replies
from lora_trainer.evaluate.measures import decoding_metrics, evaluation_metrics
from lora_trainer.evaluate.metrics import DecodingMetrics, EvaluationMetrics, HeldOutMetrics, RunMetrics, TrainingMetrics, Verdict
from lora_trainer.evaluate.questions import evaluation_id, instruction_of, prompts_digest, questions
from lora_trainer.evaluate.rules import MODELS, ScoredReply, TrainingData, score_by_rules
from lora_trainer.logs import get_logger
from lora_trainer.persona.vocabulary import BloodType
from lora_trainer.run.bundle_files import open_local, read_published, read_verdict, write_documents, write_evaluation
from lora_trainer.run.identity import run_id, run_ingredients
from lora_trainer.run.progress import RunProgress
from lora_trainer.run.reexec import StepDown, memory_limit
from lora_trainer.signals import INTERRUPTION
from lora_trainer.store.bundle import check_complete, fresh_folder, publish_bundle
from lora_trainer.store.checkpoints import Checkpoints
from lora_trainer.store.interface import Fetched, Storage
from lora_trainer.store.keys import split_uri
from lora_trainer.store.latest import link_newest, move_latest
from lora_trainer.store.lease import Lease, LeaseLostError, hold, is_left_over
from lora_trainer.store.manifest import read_manifest, write_manifest
from lora_trainer.store.opening import open_storage
from lora_trainer.store.prefixes import bundle_prefix, evaluation_prefix, lease_key, run_prefix
from lora_trainer.store.retry import RETRY_BUDGET
from lora_trainer.train.backends import Backend, open_backend, open_reference_backend
from lora_trainer.train.memory_plan import MemoryPlan, plan_memory, step_down
from lora_trainer.train.packing import plan_steps
from lora_trainer.train.step_log import StepLog, TrainingLog
from lora_trainer.train.tokenization import TokenSequence, tokenize
from lora_trainer.train.trackers import require_installed


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a run ended."""

    run_id: str
    bundle_uri: str
    report_uri: str
    verdict: Verdict
    already_done: bool
    moved_latest: bool


class Turn(Enum):
    """Where a story waits, so that several personas in one process can each come to that point; in the order they are given."""

    PLAN = "plan"
    """No persona's data has anything wrong that could be known before a GPU is touched."""
    EVALUATE = "evaluate"
    """All that will be trained is planned, by the memory of a GPU that holds nothing yet."""
    TRAIN = "train"
    """The base is loaded for the longest record of all personas."""


def run(config: RunConfig, console: Console | None = None, *, fresh: bool = False) -> Outcome:
    """Do the job that `config` describes. `console` is a terminal to show progress on; `fresh` forgets checkpoints.

    Raises a `LoraTrainerError`, whose class owns the exit code. `several.go_through` does it for several personas.
    """
    whole = story(Job(config), console, fresh=fresh)
    while True:
        try:
            # alone, there is nobody to wait for
            next(whole)
        except StopIteration as end:
            outcome: Outcome = end.value
            return outcome


def story(job: Job, console: Console | None, *, fresh: bool) -> Generator[Turn, None, Outcome]:
    """One persona's run; it waits for its turn at each `yield`, where it holds nothing."""
    config = job.config
    require_installed(config.logging.report_to)
    RETRY_BUDGET.begin(config.storage)
    data = fetch(job)
    records = read(job, data)
    prompts = fetch_prompts(job)
    identity = identify(job, data, prompts)
    if finished := find_finished(job, identity):
        return finished
    check_judge(config.evaluation)
    progress = RunProgress(job.run_dir(identity) / "progress.json", identity.run_id, config.blood_type, console)
    if published := find_published(job, identity):
        yield Turn.EVALUATE
        with hold_lease(job, identity) as lease:
            # whoever had it before may have ended the work
            return find_finished(job, identity, lease) or evaluate_again(
                job, identity, published, records, prompts, progress, lease
            )
    yield Turn.PLAN
    backend = start(job, progress)
    prepared = format_and_split(job, backend, identity, records, progress)
    plan = plan_work(job, backend, prepared)
    yield Turn.TRAIN
    with hold_lease(job, identity) as lease:
        if finished := find_finished(job, identity, lease):
            return finished
        with open_checkpoints(job, identity, lease, fresh=fresh) as checkpoints, INTERRUPTION.recognised():
            with stepping_down(job, backend, prepared, plan):
                trained = train(job, backend, identity, prepared, plan, checkpoints, progress)
            folder = save(job, backend, identity, prepared, progress)
            evaluated = evaluate(job, backend, prompts, prepared.train_records, progress)
            verdict = decide(job, evaluated.metrics)
            metrics = summarise(job, backend, identity, prepared, trained, evaluated, verdict)
            assemble(job, folder, identity, data, prepared, plan, trained, evaluated, metrics)
            outcome = find_finished(job, identity, lease) or publish(job, identity, folder, verdict, progress, lease)
            checkpoints.clear()
    return outcome


class Shared:
    """What personas of one process have in common: the base, hashed once, and each training stack, started and loaded once."""

    def __init__(self) -> None:
        self._bases: dict[BaseModelConfig, Base] = {}
        self._started: dict[Callable[[RunConfig], Backend], tuple[Backend, dict[str, object]]] = {}
        self._refused: dict[Callable[[RunConfig], Backend], LoraTrainerError] = {}

    def base(self, config: BaseModelConfig) -> Base:
        """As `identify_base`."""
        if config not in self._bases:
            self._bases[config] = identify_base(config)
        return self._bases[config]

    def start(self, open_one: Callable[[RunConfig], Backend], config: RunConfig) -> tuple[Backend, dict[str, object]]:
        """The backend that `open_one` opens, started, and what that gave. All personas' settings differ in the persona alone."""
        if (refusal := self._refused.get(open_one)) is not None:
            # what is half imported is not imported again
            raise refusal
        if open_one not in self._started:
            backend = open_one(config)
            try:
                self._started[open_one] = (backend, backend.start())
            except LoraTrainerError as error:
                self._refused[open_one] = error
                raise
        return self._started[open_one]

    def release(self) -> None:
        """Let go of every loaded base: the next persona that needs one loads it."""
        for backend, _ in self._started.values():
            backend.release()

    def device_answers(self) -> bool:
        """Whether the device that was started still works."""
        return all(backend.answers() for backend, _ in self._started.values())


@dataclass(slots=True)
class Job:
    """What every step needs: the settings, the output, the clock."""

    config: RunConfig
    shared: Shared = field(default_factory=Shared)
    started_at: str = field(default_factory=lambda: datetime.now(UTC).isoformat(timespec="seconds"))
    timings_s: dict[str, float] = field(default_factory=dict)
    environment: dict[str, object] = field(default_factory=dict)

    @property
    def log(self) -> structlog.stdlib.BoundLogger:
        """The project's logger."""
        return get_logger()

    @property
    def output(self) -> Storage:
        """Where adapters are published."""
        return open_storage(self.config.output)

    def run_dir(self, identity: Identity) -> Path:
        """Local folder of one run."""
        return self.config.work_dir / "runs" / self.config.blood_type / identity.run_id

    @contextmanager
    def timed(self, name: str) -> Iterator[None]:
        """Add the seconds that the block takes to the manifest's timings."""
        started_s = time.perf_counter()
        yield
        self.timings_s[name] = round(self.timings_s.get(name, 0.0) + time.perf_counter() - started_s, 3)


@dataclass(frozen=True, slots=True)
class DataFile:
    """The persona's JSONL as fetched."""

    uri: str
    path: Path
    fetched: Fetched


@dataclass(frozen=True, slots=True)
class Identity:
    """Which run this is, and why."""

    run_id: str
    base: Base
    ingredients: dict[str, object]
    evaluation_id: str
    """What is asked of the adapter, and how it is judged."""
    gate_id: str
    """That, and the thresholds."""


@dataclass(frozen=True, slots=True)
class Prepared:
    """Token sequences, split and put into steps."""

    base_folder: Path
    train_records: list[TrainingRecord]
    train: list[TokenSequence]
    held_out: list[TokenSequence]
    steps: list[list[int]]
    left_out: int
    """Records longer than `training.max_length_tokens`."""

    @property
    def longest_tokens(self) -> int:
        """Length of the longest sequence."""
        return max(len(sequence) for sequence in (*self.train, *self.held_out))


@dataclass(frozen=True, slots=True)
class Trained:
    """What training measured."""

    log: TrainingLog
    loss_base: float
    loss_adapter: float


@dataclass(frozen=True, slots=True)
class Evaluated:
    """What the evaluation measured, and all replies."""

    metrics: EvaluationMetrics
    replies: list[ScoredReply]


def fetch(job: Job) -> DataFile:
    """Step 2: the persona's JSONL, streamed to the working folder."""
    uri = job.config.data
    if is_jsonl(uri):
        folder, key = split_uri(uri)
        storage = open_storage(folder)
    else:
        storage = open_storage(uri)
        key = data_key(storage, job.config.blood_type)
    target = job.config.work_dir / "data" / key
    with job.timed("fetch"):
        fetched = storage.download(key, target)
    job.log.info("data_fetched", uri=storage.uri + key, size_bytes=fetched.size_bytes, sha256=fetched.sha256)
    return DataFile(storage.uri + key, target, fetched)


def data_key(storage: Storage, blood_type: BloodType) -> str:
    """The name of the persona's file in a data folder, compressed or not. Raises `ConfigError` when there are several."""
    plain, *compressed = (f"train_data_type_{blood_type}.jsonl{suffix}" for suffix in SUFFIXES)
    found = [plain] if storage.exists(plain) else []
    for key in compressed:
        try:
            found += [key] if storage.exists(key) else []
        except StorageError:
            # without s3:ListBucket a key that is not there is refused; that must not stop who needs none of these
            if not found:
                raise
    if len(found) > 1:
        raise ConfigError(
            f"{storage.uri}: got {' and '.join(found)}, expected one of them; remove the other, or name the file with --data"
        )
    # what is not there is said by the download, which knows the nearest names
    return found[0] if found else plain


def read(job: Job, data: DataFile) -> list[TrainingRecord]:
    """Step 3: schema and lint. Raises `DataError` with every bad line before anything costs money."""
    with job.timed("read"):
        records, report = read_records(
            data.path,
            job.config.blood_type,
            limits=job.config.limits,
            strict=job.config.strict,
            # the copy that is read is nobody's to mend
            name=data.uri.removeprefix("file://"),
        )
    job.log.info(
        "data_read", records=len(records), warnings=report.warnings, warnings_by_code=dict(report.counts[Severity.WARNING])
    )
    return records


def fetch_prompts(job: Job) -> tuple[EvaluationPrompt, ...]:
    """The evaluation's prompts: those that ship, or the user's. Raises `DataError` with every bad line."""
    if (uri := job.config.evaluation.prompts) is None:
        return evaluation_prompts()
    folder, key = split_uri(uri)
    storage = open_storage(folder)
    path = job.config.work_dir / "data" / key
    fetched = storage.download(key, path)
    lines = list(JsonlReader(path, EvaluationPrompt, limits=job.config.limits))
    problems = [problem for line in lines for problem in line.problems if problem.severity is Severity.ERROR]
    if problems:
        raise DataError([problem.render(storage.uri + key) for problem in problems])
    prompts = tuple(line.record for line in lines if line.record)
    job.log.info("prompts_fetched", uri=storage.uri + key, prompts=len(prompts), sha256=fetched.sha256)
    return prompts


def identify(job: Job, data: DataFile, prompts: Sequence[EvaluationPrompt]) -> Identity:
    """Step 4: the base, the hash of all that decides the weights, and the hash of all that decides the verdict."""
    asked = evaluation_id(job.config.evaluation, prompts_digest(prompts))
    verdict = gates.gate_id(asked, job.config.gates)
    with job.timed("identify"):
        base = job.shared.base(job.config.base)
        ingredients = run_ingredients(job.config, data.fetched.sha256, base.identity)
        identity = Identity(run_id(ingredients), base, ingredients, asked, verdict)
    structlog.contextvars.bind_contextvars(run_id=identity.run_id)
    job.log.info(
        "run_identified",
        base=base.canonical_id,
        base_identity=base.identity,
        backend=job.config.resolved_backend,
        gate_id=identity.gate_id,
    )
    return identity


def find_finished(job: Job, identity: Identity, lease: Lease | None = None) -> Outcome | None:
    """End of step 4: a run that has its verdict is not repeated; a pointer that a crash left behind is moved."""
    output = job.output
    prefix = bundle_prefix(job.config.blood_type, identity.run_id)
    manifest = read_manifest(output, prefix)
    found = manifest and read_verdict(output, prefix, manifest, identity.gate_id)
    if not manifest or not found:
        return None
    verdict, folder = found
    moved = _accept(job.config.blood_type, output, manifest, verdict)
    job.log.info(
        "already_done", bundle=output.uri + prefix, finished_at=manifest["finished_at"], passed=verdict.passed, latest_moved=moved
    )
    remove_leftovers(job, identity, lease)
    return Outcome(
        identity.run_id, output.uri + prefix, f"{output.uri}{folder}report.html", verdict, already_done=True, moved_latest=moved
    )


def remove_leftovers(job: Job, identity: Identity, lease: Lease | None) -> None:
    """What an attempt left that ended between its publication and its own clearing away; nothing of one that is at work."""
    output, blood_type = job.output, job.config.blood_type
    key = lease_key(blood_type, identity.run_id)
    try:
        if next(output.list(run_prefix(blood_type, identity.run_id)), None) is None:
            return
        if lease is None and not is_left_over(output, key):
            return
        checkpoints_of(job, identity).clear()
        if lease is None:
            output.delete(key)
    except StorageError as error:
        # they cost space and nothing else
        job.log.warning("leftovers_not_removed", problem=str(error))


def hold_lease(job: Job, identity: Identity) -> AbstractContextManager[Lease]:
    """From here on no other attempt at this run is at work."""
    return hold(job.config.lease, job.output, lease_key(job.config.blood_type, identity.run_id))


def find_published(job: Job, identity: Identity) -> dict[str, Any] | None:
    """The manifest of a bundle that has no verdict by these prompts and thresholds yet."""
    return read_manifest(job.output, bundle_prefix(job.config.blood_type, identity.run_id))


def evaluate_again(
    job: Job,
    identity: Identity,
    manifest: dict[str, Any],
    records: list[TrainingRecord],
    prompts: Sequence[EvaluationPrompt],
    progress: RunProgress,
    lease: Lease,
) -> Outcome:
    """Other thresholds or prompts: the published adapter is judged by them, and not trained again.

    The bundle stays as it is; the new verdict lies in a folder of its own beneath it.
    """
    output = job.output
    prefix = bundle_prefix(job.config.blood_type, identity.run_id)
    job.log.info("evaluating_again", bundle=output.uri + prefix, gate_id=identity.gate_id)
    published = read_published(output, prefix, manifest, fresh_folder(job.run_dir(identity) / "published"))
    if published.evaluation and published.evaluation.evaluation_id == identity.evaluation_id:
        # only the thresholds are others: what was measured holds
        evaluated = Evaluated(published.evaluation, published.replies)
    else:
        # as a server would load it; nothing is trained
        backend = start(job, progress, open_reference_backend)
        with job.timed("load"):
            base_folder = fetch_base(identity.base, job.config.base)
            tokenizer = backend.load_tokenizer(base_folder)
            is_reused = backend.load_adapter(base_folder, published.folder)
        if is_reused:
            job.log.info("base_reused", load_s=job.timings_s["load"])
        evaluated = evaluate(job, backend, prompts, trained_records(job, records, tokenizer), progress)
    verdict = decide(job, evaluated.metrics)
    metrics = RunMetrics(
        run_id=identity.run_id,
        blood_type=job.config.blood_type,
        training=published.training,
        held_out=published.held_out,
        evaluation=evaluated.metrics,
        verdict=verdict,
        peak_memory_gib=published.peak_memory_gib,
    )
    facts = {
        **{name: value for name, value in manifest.items() if name not in ("schema", "files")},
        "evaluation_id": evaluated.metrics.evaluation_id,
        "gate_id": verdict.gate_id,
        "verdict": verdict.model_dump(mode="json"),
        "evaluated_at": datetime.now(UTC).isoformat(timespec="seconds"),
        "config": job.config.model_dump(mode="json"),
        "timings_s": dict(job.timings_s),
    }
    folder = fresh_folder(job.run_dir(identity) / "evaluation")
    write_evaluation(folder, metrics, published.steps, evaluated.replies, facts)
    write_manifest(folder, facts)
    progress.stage("publish")
    target = evaluation_prefix(prefix, verdict.gate_id)
    publish_bundle(folder, output, target, lease)
    moved = _accept(job.config.blood_type, output, manifest, verdict)
    for done in (folder, published.folder):
        shutil.rmtree(done)
    progress.stage("done")
    job.log.info("evaluation_published", evaluation=output.uri + target, passed=verdict.passed, latest_moved=moved)
    return Outcome(
        identity.run_id, output.uri + prefix, f"{output.uri}{target}report.html", verdict, already_done=False, moved_latest=moved
    )


def start(job: Job, progress: RunProgress, open_one: Callable[[RunConfig], Backend] = open_backend) -> Backend:
    """Import the training stack and check the device; no data or base problem has to wait for it."""
    progress.stage("start")
    with job.timed("import"):
        backend, environment = job.shared.start(open_one, job.config)
    job.environment.update(environment)
    job.log.info("backend_started", backend=backend.name, **job.environment)
    return backend


def format_and_split(
    job: Job, backend: Backend, identity: Identity, records: list[TrainingRecord], progress: RunProgress
) -> Prepared:
    """Step 5: messages, chat template, tokens, held-out split, optimizer steps."""
    progress.stage("format")
    training = job.config.training
    with job.timed("fetch_base"):
        base_folder = fetch_base(identity.base, job.config.base)
    with job.timed("format"):
        sequences = tokenize(records, backend.load_tokenizer(base_folder))
        train_indices, held_out_indices = split_held_out(records, training.held_out_fraction)
        fits = [len(sequence) <= training.max_length_tokens for sequence in sequences]
        kept = [index for index in train_indices if fits[index]]
        train_sequences = [sequences[index] for index in kept]
        held_out = [sequences[index] for index in held_out_indices if fits[index]]
    left_out = len(records) - len(train_sequences) - len(held_out)
    if left_out:
        job.log.warning("records_left_out", records=left_out, max_length_tokens=training.max_length_tokens)
    if not train_sequences or not held_out:
        raise DataError(
            f"{job.config.data}: {len(train_sequences)} records left to train on and {len(held_out)} held out, "
            f"expected at least one of each; {left_out} are longer than training.max_length_tokens ({training.max_length_tokens}): "
            "add records or raise it"
        )
    steps = plan_steps(len(train_sequences), training.sequences_per_step, training.epochs, training.seed, training.max_steps)
    job.log.info(
        "data_formatted",
        train_records=len(train_sequences),
        held_out_records=len(held_out),
        tokens=sum(map(len, train_sequences)),
        longest_tokens=max(map(len, train_sequences)),
        steps=len(steps),
    )
    return Prepared(base_folder, [records[index] for index in kept], train_sequences, held_out, steps, left_out)


def trained_records(job: Job, records: Sequence[TrainingRecord], tokenizer: Any) -> list[TrainingRecord]:
    """The records that step 5 takes for training: not held out, and not too long."""
    indices, _ = split_held_out(records, job.config.training.held_out_fraction)
    side = [records[index] for index in indices]
    lengths = map(len, tokenize(side, tokenizer))
    return [record for record, length in zip(side, lengths, strict=True) if length <= job.config.training.max_length_tokens]


def plan_work(job: Job, backend: Backend, prepared: Prepared) -> MemoryPlan:
    """Step 6: checkpointing and micro-batch size from the device's memory."""
    plan = plan_memory(
        job.config.memory,
        job.config.training,
        backend.shape(prepared.base_folder),
        backend.free_bytes(),
        prepared.longest_tokens,
        backend.name,
        memory_limit(),
    )
    job.log.info(
        "plan_chosen",
        gradient_checkpointing=plan.gradient_checkpointing,
        micro_batch_tokens=plan.micro_batch_tokens,
        estimated_peak_gib=plan.estimated_peak_gib,
        reason=plan.reason,
    )
    backend.reserve(max(plan.micro_batch_tokens, prepared.longest_tokens))
    return plan


def open_checkpoints(job: Job, identity: Identity, lease: Lease, *, fresh: bool) -> Checkpoints:
    """What an earlier attempt at this run left, and where this one leaves what a later one may need."""
    checkpoints = checkpoints_of(job, identity, lease)
    if fresh:
        checkpoints.clear()
    return checkpoints


def checkpoints_of(job: Job, identity: Identity, lease: Lease | None = None) -> Checkpoints:
    """Those of this run; without its lease they are only looked at, or cleared away."""
    folder, prefix = job.run_dir(identity) / "checkpoints", run_prefix(job.config.blood_type, identity.run_id)
    return Checkpoints(job.config.checkpoints, folder, job.config.output, prefix, identity.run_id, lease)


def train(
    job: Job,
    backend: Backend,
    identity: Identity,
    prepared: Prepared,
    plan: MemoryPlan,
    checkpoints: Checkpoints,
    progress: RunProgress,
) -> Trained:
    """Step 7: the adapter, from the newest checkpoint on if an earlier attempt left one."""
    every = job.config.logging.log_every_steps

    def on_step(step: StepLog, of: int) -> None:
        progress.step(step, of)
        if not progress.is_drawn and (step.step % every == 0 or step.step in (1, of)):
            job.log.info(
                "training_step",
                step=step.step,
                of=of,
                loss=round(step.loss, 4),
                grad_norm=round(step.grad_norm, 4),
                learning_rate=step.learning_rate,
                tokens_per_s=round(step.tokens / step.step_s, 1),
            )

    def after_step(step: int) -> None:
        checkpoints.stop_if_lost()
        # the last one, too: whoever interrupts the evaluation must not cost the training
        if checkpoints.is_due(step) or step == len(prepared.steps):
            checkpoint(backend, checkpoints)

    progress.stage("load")
    with job.timed("load"):
        is_reused = backend.load(prepared.base_folder, plan, prepared.longest_tokens)
        name = f"{job.config.blood_type}-{identity.run_id}"
        backend.prepare_training(prepared.train, prepared.steps, plan, job.run_dir(identity), on_step, after_step, name)
    if is_reused:
        job.log.info("base_reused", load_s=job.timings_s["load"])
    if len(prepared.train) > 1:
        difference = backend.check_isolation(prepared.train[0], prepared.train[1])
        job.log.info("packing_checked", relative_difference=difference)
    with job.timed("held_out_base"):
        loss_base = backend.mean_loss(prepared.held_out)
    done = resume(job, backend, checkpoints)
    try:
        with job.timed("train"), progress.training(len(prepared.steps), done):
            log = backend.train()
    except Interrupted:
        # the step that was broken off is dropped
        checkpoint(backend, checkpoints)
        raise
    with job.timed("held_out_adapter"):
        loss_adapter = backend.mean_loss(prepared.held_out)
    job.log.info(
        "training_finished",
        steps=len(log.steps),
        loss=round(log.steps[-1].loss, 4),
        held_out_loss_base=round(loss_base, 4),
        held_out_loss_adapter=round(loss_adapter, 4),
        tokens_per_s=round(log.tokens_per_s, 1),
        peak_memory_gib=round(backend.peak_memory_gib(), 2),
        train_s=round(log.train_s, 1),
    )
    return Trained(log, loss_base, loss_adapter)


@contextmanager
def stepping_down(job: Job, backend: Backend, prepared: Prepared, plan: MemoryPlan) -> Iterator[None]:
    """Memory that runs out in the block is met by a smaller plan in a clean process, until none is left. Raises `StepDown`."""
    try:
        with backend.device_faults():
            yield
    except OutOfMemoryError as error:
        limit = step_down(plan, job.config.memory, prepared.longest_tokens)
        if limit is None:
            raise
        job.log.warning(
            "memory_stepped_down",
            problem=error.problems[0],
            recompute=limit.recompute,
            micro_batch_tokens=limit.row_tokens,
            sequences_per_step=job.config.training.sequences_per_step,
        )
        raise StepDown(limit) from error


def resume(job: Job, backend: Backend, checkpoints: Checkpoints) -> int:
    """Give the backend the newest checkpoint; gives the steps that are behind it, 0 if there is none."""
    with job.timed("resume"):
        found = checkpoints.newest()
        done = backend.restore(found) if found else 0
    if found:
        checkpoints.continue_from(done)
        job.log.info("resumed", step=done, resume_s=job.timings_s["resume"])
    return done


def checkpoint(backend: Backend, checkpoints: Checkpoints) -> None:
    """Hand over the state as of the last whole step, if there is one that is not kept yet."""
    if (taken := backend.snapshot()) and taken[0] != checkpoints.last_step:
        checkpoints.write(*taken)


def save(job: Job, backend: Backend, identity: Identity, prepared: Prepared, progress: RunProgress) -> Path:
    """The adapter in the bundle's folder, read back against the base."""
    progress.stage("save")
    folder = fresh_folder(job.run_dir(identity) / "bundle")
    with job.timed("save"):
        backend.save(folder, identity.base.canonical_id, identity.base.revision)
        check_complete(folder)
    with job.timed("read_back"):
        # the shortest held-out record will do: any one shows whether the logits moved
        read_back = backend.read_back(folder, min(prepared.held_out, key=len))
    job.log.info("adapter_read_back", base_difference=read_back.base_difference, memory_difference=read_back.memory_difference)
    return folder


def evaluate(
    job: Job,
    backend: Backend,
    prompts: Sequence[EvaluationPrompt],
    train_records: Sequence[TrainingRecord],
    progress: RunProgress,
) -> Evaluated:
    """Step 8: what adapter and base answer to prompts that nobody was trained on, judged by the rules."""
    progress.stage("evaluate")
    config, blood_type = job.config.evaluation, job.config.blood_type
    asked = questions(prompts, config.intensities, instruction_of(blood_type))
    conversations = [question.messages for question in asked]
    data = TrainingData(train_records)
    measured: dict[str, DecodingMetrics] = {}
    replies: list[ScoredReply] = []
    for decoding in decodings(config):
        judged: dict[str, list[ScoredReply]] = {}
        generate_s = 0.0
        for model in MODELS:
            started_s = time.perf_counter()
            with job.timed("evaluate_generate"):
                generations = backend.generate(conversations, decoding, adapter=model == "adapter", batch_size=config.batch_size)
            generate_s += time.perf_counter() - started_s
            with job.timed("evaluate_judge"):
                judged[model] = score_by_rules(
                    asked, generations, model=model, decoding=decoding.name, blood_type=blood_type, data=data
                )
            replies.extend(judged[model])
        with job.timed("evaluate_judge"):
            measured[decoding.name] = decoding_metrics(decoding, judged["adapter"], judged["base"], blood_type, config, generate_s)
    metrics = evaluation_metrics(config, prompts, measured, data)
    with job.timed("evaluate_model_judge"):
        metrics = metrics.model_copy(update={"judge": judge_replies(config, blood_type, replies)})
    adapter = metrics.greedy.adapter
    job.log.info(
        "evaluation_finished",
        replies=metrics.replies,
        exact_json=round(adapter.exact_json.value, 4),
        stop=round(adapter.stop.value, 4),
        informal_speech=round(adapter.informal_speech.value, 4),
        persona=round(adapter.persona.value, 4),
        emoji_intensity=round(adapter.emoji_intensity.value, 4),
        win_rate=round(metrics.greedy.win_rate.value, 4),
        evaluate_s=round(job.timings_s["evaluate_generate"] + job.timings_s["evaluate_judge"], 1),
    )
    return Evaluated(metrics, replies)


def decide(job: Job, metrics: EvaluationMetrics) -> Verdict:
    """Step 9: every gate, a number against a threshold."""
    verdict = gates.decide(metrics, job.config.gates)
    job.log.info("gates_decided", passed=verdict.passed, gate_id=verdict.gate_id, missed=gates.missed_gate_messages(verdict))
    return verdict


def summarise(
    job: Job, backend: Backend, identity: Identity, prepared: Prepared, trained: Trained, evaluated: Evaluated, verdict: Verdict
) -> RunMetrics:
    """`metrics.json`: losses in nats a reply token, real tokens, seconds, GiB."""
    log = trained.log
    return RunMetrics(
        run_id=identity.run_id,
        blood_type=job.config.blood_type,
        training=TrainingMetrics(
            records=len(prepared.train),
            steps=len(log.steps),
            loss_first=log.steps[0].loss,
            loss_last=log.steps[-1].loss,
            tokens=log.tokens,
            loss_tokens=sum(step.loss_tokens for step in log.steps),
            rows=sum(step.rows for step in log.steps),
            packed_rows=log.packed_rows,
            train_s=round(log.train_s, 3),
            tokens_per_s=round(log.tokens_per_s, 1),
        ),
        held_out=held_out_metrics(len(prepared.held_out), trained.loss_base, trained.loss_adapter),
        evaluation=evaluated.metrics,
        verdict=verdict,
        peak_memory_gib=round(backend.peak_memory_gib(), 3),
    )


def held_out_metrics(records: int, loss_base: float, loss_adapter: float) -> HeldOutMetrics:
    """Losses and the perplexities that they are."""
    return HeldOutMetrics(
        records=records,
        loss_base=loss_base,
        loss_adapter=loss_adapter,
        perplexity_base=math.exp(loss_base),
        perplexity_adapter=math.exp(loss_adapter),
    )


def assemble(
    job: Job,
    folder: Path,
    identity: Identity,
    data: DataFile,
    prepared: Prepared,
    plan: MemoryPlan,
    trained: Trained,
    evaluated: Evaluated,
    metrics: RunMetrics,
) -> None:
    """The rest of the bundle's folder: documented, hashed."""
    facts = {
        "run_id": identity.run_id,
        "blood_type": str(job.config.blood_type),
        "started_at": job.started_at,
        "finished_at": datetime.now(UTC).isoformat(timespec="seconds"),
        "evaluation_id": identity.evaluation_id,
        "gate_id": identity.gate_id,
        "verdict": metrics.verdict.model_dump(mode="json"),
        "ingredients": identity.ingredients,
        "base": {"id": identity.base.canonical_id, "revision": identity.base.revision, "identity": identity.base.identity},
        "data": {
            "uri": data.uri,
            "sha256": data.fetched.sha256,
            "size_bytes": data.fetched.size_bytes,
            "train_records": len(prepared.train),
            "held_out_records": len(prepared.held_out),
            "left_out_records": prepared.left_out,
        },
        "config": job.config.model_dump(mode="json"),
        "memory_plan": {
            "gradient_checkpointing": plan.gradient_checkpointing,
            "micro_batch_tokens": plan.micro_batch_tokens,
            "reason": plan.reason,
        },
        "environment": {
            **job.environment,
            "lora_trainer": __version__,
            "git_revision": _git_revision(),
            "image_digest": _image_digest(),
        },
        "timings_s": dict(job.timings_s),
    }
    write_documents(folder, job.config, identity.base, metrics)
    write_evaluation(folder, metrics, trained.log.steps, evaluated.replies, facts)
    write_manifest(folder, facts)


def publish(
    job: Job, identity: Identity, folder: Path, verdict: Verdict, progress: RunProgress, lease: Lease | None = None
) -> Outcome:
    """Step 10: the bundle, its manifest last, then the pointer if the gates let it. The local copy goes only after that."""
    progress.stage("publish")
    output = job.output
    prefix = bundle_prefix(job.config.blood_type, identity.run_id)
    try:
        with job.timed("publish"):
            publish_bundle(folder, output, prefix, lease)
    except LeaseLostError:
        # the other attempt ends the job
        raise
    except LoraTrainerError as error:
        kept = f"the finished bundle is kept here; 'lora-trainer publish {folder}' ends the job when the storage is well again"
        error.problems = (*error.problems, f"{folder}: {kept}")
        raise
    manifest = read_manifest(output, prefix)
    if manifest is None:
        raise RuntimeError(f"{output.uri}{prefix}: the manifest that was just written is not there")
    moved = _accept(job.config.blood_type, output, manifest, verdict)
    shutil.rmtree(folder)
    progress.stage("done")
    job.log.info(
        "bundle_published",
        bundle=output.uri + prefix,
        passed=verdict.passed,
        latest_moved=moved,
        publish_s=job.timings_s["publish"],
    )
    return Outcome(
        identity.run_id, output.uri + prefix, f"{output.uri}{prefix}report.html", verdict, already_done=False, moved_latest=moved
    )


def publish_folder(folder: Path, output_uri: str | None) -> Outcome:
    """What a run could not publish itself: its finished bundle, and the pointer if the gates let it.

    `folder` is the run's `bundle` below its `work_dir`; `output_uri` another output than the run's own. Raises `ConfigError` if
    it is no finished bundle, `DamagedError` if its files are not what its manifest says, `StorageError`.
    """
    manifest = open_local(folder)
    blood_type, identifier = BloodType(manifest["blood_type"]), str(manifest["run_id"])
    structlog.contextvars.bind_contextvars(run_id=identifier, blood_type=str(blood_type))
    if output_uri is None and folder.resolve().parts[-4:] != ("runs", str(blood_type), identifier, "bundle"):
        # a bundle that came from somebody else would say by itself where it is published, and whose pointer it moves
        raise ConfigError(
            f"{folder}: got a bundle that is not where its run left it, <work_dir>/runs/{blood_type}/{identifier}/bundle; "
            "expected --output: a copy's own word is not taken for it"
        )
    output = open_storage(output_uri or manifest["config"]["output"])
    prefix = bundle_prefix(blood_type, identifier)
    verdict = Verdict.model_validate(manifest["verdict"])
    already_done = read_manifest(output, prefix) is not None
    if not already_done:
        with hold(LeaseConfig(), output, lease_key(blood_type, identifier)) as lease:
            # another attempt may have been faster, and a bundle is never rewritten
            already_done = read_manifest(output, prefix) is not None
            if not already_done:
                publish_bundle(folder, output, prefix, lease)
    moved = _accept(blood_type, output, manifest, verdict)
    shutil.rmtree(folder)
    get_logger().info("bundle_published", bundle=output.uri + prefix, passed=verdict.passed, latest_moved=moved)
    return Outcome(identifier, output.uri + prefix, f"{output.uri}{prefix}report.html", verdict, already_done, moved)


def _accept(blood_type: BloodType, output: Storage, manifest: dict[str, Any], verdict: Verdict) -> bool:
    """Make a finished run that passed its gates the newest accepted one, unless a later one is."""
    log = get_logger()
    if not verdict.passed:
        log.info("latest_checked", moved=False, reason="the gates were not passed")
        return False
    move = move_latest(output, blood_type, manifest)
    log.info("latest_checked", moved=move.moved, reason=move.reason)
    if move.names_this_run:
        link_newest(output, blood_type, manifest["run_id"])
    return move.moved


def _git_revision() -> str | None:
    """The source's commit: from the image, or from the checkout this runs in."""
    if revision := os.environ.get("GIT_REVISION"):
        return revision
    checkout = Path(__file__).resolve().parent.parent
    if not (checkout / ".git").exists() or not (git := shutil.which("git")):
        return None
    done = subprocess.run([git, "-C", str(checkout), "rev-parse", "--verify", "HEAD"], capture_output=True, text=True, check=False)  # noqa: S603
    # without a commit git answers with the name it was asked for, and fails
    return done.stdout.strip() if done.returncode == 0 else None


def _image_digest() -> str | None:
    return os.environ.get("IMAGE_DIGEST") or None
