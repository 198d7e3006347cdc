"""Evaluate a published adapter again, without training and without rewriting its bundle.

`run` does this for a bundle that has no verdict under the current prompts and thresholds, `evaluate` for any bundle. Both copy
the training metrics. They measure everything that needs the loaded adapter again (replies, held-out loss, peak memory,
environment), or copy all of it if only the thresholds changed.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import structlog

from lora_trainer import __version__
from lora_trainer.base_model import Base, fetch_base
from lora_trainer.config import RunConfig
from lora_trainer.data.records import EvaluationPrompt, TrainingRecord
from lora_trainer.errors import ConfigError
from lora_trainer.evaluate.gates import gate_id
from lora_trainer.evaluate.llm_judge import check_judge
from lora_trainer.evaluate.metrics import HeldOutMetrics, RunMetrics
from lora_trainer.evaluate.questions import evaluation_id, prompts_digest
from lora_trainer.run.adapter import Adapter, base_of, check_adapter, training_data_of
from lora_trainer.run.bundle_files import Published, read_published, write_evaluation
from lora_trainer.run.evaluation import Evaluated, decide, evaluate, held_out_metrics, known_of
from lora_trainer.run.identity import Identity
from lora_trainer.run.inputs import fetch_prompts, read
from lora_trainer.run.job import Job, ProcessContext
from lora_trainer.run.progress import RunProgress
from lora_trainer.run.publication import Outcome, accept
from lora_trainer.run.training import tokenize_and_split
from lora_trainer.store.bundle import publish_bundle
from lora_trainer.store.lease import Lease
from lora_trainer.store.local import fresh_folder
from lora_trainer.store.manifest import MANIFEST_NAME, write_manifest
from lora_trainer.store.prefixes import bundle_prefix, evaluation_prefix
from lora_trainer.train.backends import open_reference_backend
from lora_trainer.train.requirements import require_stack


@dataclass(frozen=True, slots=True)
class Measured:
    """All measurements that need the loaded adapter."""

    evaluated: Evaluated
    held_out: HeldOutMetrics
    peak_memory_gib: float
    environment: Mapping[str, object]


@dataclass(frozen=True, slots=True)
class Reevaluation:
    """Result of `evaluate`."""

    metrics: RunMetrics
    folder: Path
    """Folder with metrics.json, replies.jsonl and report.html."""


def publish_new_verdict(
    job: Job,
    identity: Identity,
    manifest: dict[str, Any],
    records: Sequence[TrainingRecord],
    prompts: Sequence[EvaluationPrompt],
    progress: RunProgress,
    lease: Lease,
) -> Outcome:
    """Judge the run's published bundle under new prompts or thresholds, and publish the verdict in a folder of the bundle."""
    output, run_dir = job.output, job.run_dir(identity.run_id)
    prefix = bundle_prefix(job.config.blood_type, identity.run_id)
    job.log.info("evaluating_again", bundle=output.uri + prefix, gate_id=identity.gate_id)
    published = read_published(output, prefix, manifest, fresh_folder(run_dir / "published"))
    measured = _copied(job, published, manifest, identity.evaluation_id) or _measure(
        job, published, identity.base, records, prompts, progress
    )
    folder = fresh_folder(run_dir / "evaluation")
    metrics, facts = _write(job, folder, manifest, published, measured)
    write_manifest(folder, facts)
    progress.stage("publish")
    target = evaluation_prefix(prefix, metrics.verdict.gate_id)
    publish_bundle(folder, output, target, lease)
    moved = accept(job.config.blood_type, output, manifest, metrics.verdict)
    for done in (folder, published.folder):
        shutil.rmtree(done)
    progress.stage("done")
    verdict = metrics.verdict
    job.log.info(
        "evaluation_published", evaluation=output.uri + target, passed=verdict.passed, sense=verdict.sense, latest_moved=moved
    )
    return Outcome(
        identity.run_id,
        output.uri + prefix,
        f"{output.uri}{target}report.html",
        metrics.verdict,
        already_done=False,
        moved_latest=moved,
    )


def evaluate_adapter(adapter: Adapter, config: RunConfig, folder: Path | None, process: ProcessContext) -> Reevaluation:
    """Fetch the adapter, its base and its data, evaluate it, and write the result to `folder`.

    `metrics.verdict` reports missed gates; every other failure raises a `LoraTrainerError`.
    """
    if "adapter_config.json" not in adapter.manifest["files"]:
        raise ConfigError(
            f"{adapter.storage.uri}: holds an evaluation and no adapter; expected a bundle, such as <output>/adapters/A/<run id>/"
        )
    require_stack(config, reference=True)
    _require_prompts(adapter, config)
    if folder is not None:
        _make_report_folder(folder)
    job = Job(config, process)
    structlog.contextvars.bind_contextvars(run_id=adapter.run_id)
    data = training_data_of(adapter, job)
    if config.evaluation.judge_model is None and adapter.setting("evaluation.judge_model"):
        job.log.warning("judge_left_out", reason="the run had one: a judge is asked only where one is named here")
    check_judge(config.evaluation)
    base = base_of(adapter, config, process)
    scratch = config.work_dir / "evaluations" / str(config.blood_type) / adapter.run_id
    progress = job.progress(scratch, adapter.run_id)
    published = read_published(adapter.storage, "", adapter.manifest, fresh_folder(scratch / "published"))
    check_adapter(adapter, published.folder, base)
    records = read(job, data)
    prompts = fetch_prompts(job)
    measured = _measure(job, published, base, records, prompts, progress)
    asked = evaluation_id(config.evaluation, prompts_digest(prompts), published.prompt_version)
    target = folder or scratch / gate_id(asked, config.gates)
    target.mkdir(parents=True, exist_ok=True)
    metrics, _ = _write(job, target, adapter.manifest, published, measured)
    return Reevaluation(metrics, target)


def _copied(job: Job, published: Published, manifest: Mapping[str, Any], asked: str) -> Measured | None:
    """Return the bundle's own measurements if only the thresholds have changed since and nothing is missing, else None."""
    if published.evaluation is None or published.evaluation.evaluation_id != asked:
        return None
    sense = published.evaluation.sense
    if job.config.gates.sense is not None and (sense is None or sense.unexamined):
        # nobody looked at sense, or a judge failed that may not fail again
        return None
    return Measured(
        Evaluated(published.evaluation, published.replies, published.depth_replies),
        published.held_out,
        published.peak_memory_gib,
        manifest.get("environment", {}),
    )


def _measure(
    job: Job,
    published: Published,
    base: Base,
    records: Sequence[TrainingRecord],
    prompts: Sequence[EvaluationPrompt],
    progress: RunProgress,
) -> Measured:
    """Load the adapter as a server would, and measure everything that needs it, with the prompt that it was trained on.

    Raise `DataError` without held-out records.
    """
    backend = job.start(progress, open_reference_backend)
    base_folder = fetch_base(base, job.config.base)
    data = tokenize_and_split(job, records, backend.load_tokenizer(base_folder), published.prompt_version)
    with job.timed("load"):
        is_reused = backend.load_adapter(base_folder, published.folder)
    if is_reused:
        job.log.info("base_reused", load_s=job.timings_s["load"])
    with job.timed("held_out"):
        held_out = held_out_metrics(len(data.held_out), backend.base_mean_loss(data.held_out), backend.mean_loss(data.held_out))
    evaluated = evaluate(job, backend, base, prompts, data, progress, published.prompt_version)
    environment = {**job.environment, "lora_trainer": __version__}
    return Measured(evaluated, held_out, round(backend.peak_memory_gib(), 3), environment)


def _write(
    job: Job, folder: Path, manifest: Mapping[str, Any], published: Published, measured: Measured
) -> tuple[RunMetrics, dict[str, Any]]:
    """Decide the gates and write metrics, replies and report to `folder`. Return the metrics and facts for a manifest."""
    evaluation = measured.evaluated.metrics
    held_out = measured.held_out
    verdict = decide(job, evaluation, known_of(published.training, held_out.loss_base, held_out.loss_adapter))
    metrics = RunMetrics(
        run_id=str(manifest["run_id"]),
        blood_type=job.config.blood_type,
        training=published.training,
        held_out=held_out,
        evaluation=evaluation,
        verdict=verdict,
        peak_memory_gib=measured.peak_memory_gib,
    )
    facts = {
        **{name: value for name, value in manifest.items() if name not in ("schema", "files")},
        "evaluation_id": evaluation.evaluation_id,
        "gate_id": verdict.gate_id,
        "verdict": verdict.model_dump(mode="json"),
        "evaluated_at": datetime.now(UTC).isoformat(timespec="seconds"),
        "config": job.config.model_dump(mode="json"),
        "environment": measured.environment,
        "timings_s": dict(job.timings_s),
    }
    write_evaluation(folder, metrics, published.steps, measured.evaluated.replies, facts, measured.evaluated.depth_replies)
    return metrics, facts


def _require_prompts(adapter: Adapter, config: RunConfig) -> None:
    """Raise `ConfigError` if the run had custom prompts and the user names none: other prompts would change the verdict."""
    if "prompts" not in config.evaluation.model_fields_set and (named := adapter.setting("evaluation.prompts")):
        raise ConfigError(
            "evaluation.prompts: not given: pass its prompts with --prompts, or --set evaluation.prompts=none "
            f"for the bundled ones{named}"
        )


def _make_report_folder(folder: Path) -> None:
    """Create the report's folder before any slow work. Refuse a bundle's folder: new files would contradict its manifest."""
    if (folder / MANIFEST_NAME).exists():
        raise ConfigError(f"--report-dir {folder}: holds a published bundle, which stays as it is; name another folder")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"--report-dir {folder}: cannot be made: {error.strerror}; name another folder") from None
