"""One run of one persona, top to bottom. Each step is a function below, in the same order."""

from __future__ import annotations

import math
import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import structlog
from rich.console import Console

from lora_trainer import __version__, bundle
from lora_trainer.backends import Backend, open_backend
from lora_trainer.bases import Base, fetch_base, identify_base
from lora_trainer.config import RunConfig
from lora_trainer.errors import DataError
from lora_trainer.identity import run_id, run_ingredients
from lora_trainer.logs import get_logger
from lora_trainer.packing import plan_steps
from lora_trainer.planning import MemoryPlan, plan_memory
from lora_trainer.progress import RunProgress
from lora_trainer.records import Severity, TrainingRecord
from lora_trainer.storage import Fetched, Storage, open_storage, split_uri
from lora_trainer.tokenization import TokenSequence, tokenize
from lora_trainer.training import StepLog, TrainingLog, split_held_out
from lora_trainer.validation import read_records


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a run ended."""

    run_id: str
    bundle_uri: str
    already_done: bool
    moved_latest: bool


def run(config: RunConfig, console: Console | None = None) -> Outcome:
    """Do the job that `config` describes. `console` is a terminal to show progress on.

    Raises a `LoraTrainerError`, whose class owns the exit code.
    """
    job = Job(config)
    data = fetch(job)
    records = read(job, data)
    identity = identify(job, data)
    if finished := find_finished(job, identity):
        return finished
    progress = RunProgress(job.run_dir(identity) / "progress.json", identity.run_id, config.blood_type, console)
    backend = start(job, progress)
    prepared = format_and_split(job, backend, identity, records, progress)
    plan = plan_work(job, backend, prepared)
    trained = train(job, backend, identity, prepared, plan, progress)
    folder = assemble(job, backend, identity, data, prepared, plan, trained, progress)
    return publish(job, identity, folder, progress)


@dataclass(slots=True)
class Job:
    """What every step needs: the settings, the output, the clock."""

    config: RunConfig
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


@dataclass(frozen=True, slots=True)
class Prepared:
    """Token sequences, split and put into steps."""

    base_folder: Path
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


def fetch(job: Job) -> DataFile:
    """Step 2: the persona's JSONL, streamed to the working folder."""
    uri = job.config.data
    if uri.endswith(".jsonl"):
        folder, key = split_uri(uri)
    else:
        folder, key = uri, f"train_data_type_{job.config.blood_type}.jsonl"
    storage = open_storage(folder)
    target = job.config.work_dir / "data" / key
    with job.timed("fetch"):
        fetched = storage.download(key, target)
    job.log.info("data_fetched", uri=storage.uri + key, size_bytes=fetched.size_bytes, sha256=fetched.sha256)
    return DataFile(storage.uri + key, target, fetched)


def read(job: Job, data: DataFile) -> list[TrainingRecord]:
    """Step 3: schema and lint. Raises `DataError` with every bad line before anything costs money."""
    with job.timed("read"):
        records, report = read_records(data.path, job.config.blood_type, strict=job.config.strict)
    job.log.info(
        "data_read", records=len(records), warnings=report.warnings, warnings_by_code=dict(report.counts[Severity.WARNING])
    )
    return records


def identify(job: Job, data: DataFile) -> Identity:
    """Step 4: the base, and the hash of all that decides the weights."""
    with job.timed("identify"):
        base = identify_base(job.config.base)
        ingredients = run_ingredients(job.config, data.fetched.sha256, base.identity)
        identity = Identity(run_id(ingredients), base, ingredients)
    structlog.contextvars.bind_contextvars(run_id=identity.run_id)
    job.log.info("run_identified", base=base.canonical_id, base_identity=base.identity, backend=job.config.resolved_backend)
    return identity


def find_finished(job: Job, identity: Identity) -> Outcome | None:
    """End of step 4: a finished run with this id is not repeated; a pointer that a crash left behind is moved."""
    output = job.output
    prefix = bundle.bundle_prefix(job.config.blood_type, identity.run_id)
    manifest = bundle.read_manifest(output, prefix)
    if manifest is None:
        return None
    moved = _accept(job, output, manifest)
    job.log.info("already_done", bundle=output.uri + prefix, finished_at=manifest["finished_at"], latest_moved=moved)
    return Outcome(identity.run_id, output.uri + prefix, already_done=True, moved_latest=moved)


def start(job: Job, progress: RunProgress) -> Backend:
    """Import the training stack and check the device; no data or base problem has to wait for it."""
    progress.stage("start")
    backend = open_backend(job.config)
    with job.timed("import"):
        job.environment.update(backend.start())
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
        train_sequences = [sequences[index] for index in train_indices if fits[index]]
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
    return Prepared(base_folder, train_sequences, held_out, steps, left_out)


def plan_work(job: Job, backend: Backend, prepared: Prepared) -> MemoryPlan:
    """Step 6: checkpointing and micro-batch size from the device's memory."""
    plan = plan_memory(
        job.config.memory,
        job.config.training,
        backend.shape(prepared.base_folder),
        backend.free_bytes(),
        prepared.longest_tokens,
        backend.name,
    )
    job.log.info(
        "plan_chosen",
        gradient_checkpointing=plan.gradient_checkpointing,
        micro_batch_tokens=plan.micro_batch_tokens,
        estimated_peak_gib=plan.estimated_peak_gib,
        reason=plan.reason,
    )
    return plan


def train(job: Job, backend: Backend, identity: Identity, prepared: Prepared, plan: MemoryPlan, progress: RunProgress) -> Trained:
    """Step 7: the adapter."""
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

    progress.stage("load")
    with job.timed("load"):
        backend.load(prepared.base_folder, plan, prepared.longest_tokens)
        backend.prepare_training(prepared.train, prepared.steps, plan, job.run_dir(identity), on_step)
    if len(prepared.train) > 1:
        difference = backend.check_isolation(prepared.train[0], prepared.train[1])
        job.log.info("packing_checked", relative_difference=difference)
    with job.timed("held_out_base"):
        loss_base = backend.mean_loss(prepared.held_out)
    with job.timed("train"), progress.training(len(prepared.steps)):
        log = backend.train()
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


def assemble(
    job: Job,
    backend: Backend,
    identity: Identity,
    data: DataFile,
    prepared: Prepared,
    plan: MemoryPlan,
    trained: Trained,
    progress: RunProgress,
) -> Path:
    """The bundle's folder: saved, read back against the base, documented, hashed."""
    progress.stage("save")
    folder = bundle.fresh_folder(job.run_dir(identity) / "bundle")
    with job.timed("save"):
        backend.save(folder, identity.base.canonical_id, identity.base.revision)
        bundle.check_complete(folder)
    with job.timed("read_back"):
        # the shortest held-out record will do: any one shows whether the logits moved
        read_back = backend.read_back(folder, min(prepared.held_out, key=len))
    job.log.info("adapter_read_back", base_difference=read_back.base_difference, memory_difference=read_back.memory_difference)
    metrics = measure(backend, prepared, trained)
    bundle.write_documents(folder, job.config, identity.base, identity.run_id, metrics, trained.log)
    bundle.write_manifest(
        folder,
        {
            "run_id": identity.run_id,
            "blood_type": str(job.config.blood_type),
            "started_at": job.started_at,
            "finished_at": datetime.now(UTC).isoformat(timespec="seconds"),
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
        },
    )
    return folder


def measure(backend: Backend, prepared: Prepared, trained: Trained) -> dict[str, Any]:
    """`metrics.json`: losses in nats a reply token, real tokens, seconds, GiB."""
    log = trained.log
    rows = sum(step.rows for step in log.steps)
    return {
        "schema": 1,
        "training": {
            "records": len(prepared.train),
            "steps": len(log.steps),
            "loss_first": log.steps[0].loss,
            "loss_last": log.steps[-1].loss,
            "tokens": log.tokens,
            "loss_tokens": sum(step.loss_tokens for step in log.steps),
            "rows": rows,
            "packed_rows": log.packed_rows,
            "train_s": round(log.train_s, 3),
            "tokens_per_s": round(log.tokens_per_s, 1),
        },
        "held_out": {
            "records": len(prepared.held_out),
            "loss_base": trained.loss_base,
            "loss_adapter": trained.loss_adapter,
            "perplexity_base": math.exp(trained.loss_base),
            "perplexity_adapter": math.exp(trained.loss_adapter),
        },
        "peak_memory_gib": round(backend.peak_memory_gib(), 3),
    }


def publish(job: Job, identity: Identity, folder: Path, progress: RunProgress) -> Outcome:
    """Step 10: the bundle, its manifest last, then the pointer. The local copy goes only after that."""
    progress.stage("publish")
    output = job.output
    prefix = bundle.bundle_prefix(job.config.blood_type, identity.run_id)
    with job.timed("publish"):
        bundle.publish(folder, output, prefix)
    manifest = bundle.read_manifest(output, prefix)
    if manifest is None:
        raise RuntimeError(f"{output.uri}{prefix}: the manifest that was just written is not there")
    moved = _accept(job, output, manifest)
    shutil.rmtree(folder)
    progress.stage("done")
    job.log.info("bundle_published", bundle=output.uri + prefix, latest_moved=moved, publish_s=job.timings_s["publish"])
    return Outcome(identity.run_id, output.uri + prefix, already_done=False, moved_latest=moved)


def _accept(job: Job, output: Storage, manifest: dict[str, Any]) -> bool:
    """Make a finished run the newest accepted one, unless a later one is."""
    move = bundle.move_latest(output, job.config.blood_type, manifest)
    job.log.info("latest_checked", moved=move.moved, reason=move.reason)
    if move.names_this_run:
        bundle.link_newest(output, job.config.blood_type, manifest["run_id"])
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
