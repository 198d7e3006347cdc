"""Publish a finished run and move its persona's `latest.json`; recognise a run that is already finished."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import structlog

from lora_trainer import __version__
from lora_trainer.config import LeaseConfig
from lora_trainer.config_sources import settle
from lora_trainer.errors import ConfigError, LoraTrainerError, StorageError
from lora_trainer.evaluate.metrics import HeldOutLossMetrics, RunMetrics, TrainingMetrics, Verdict
from lora_trainer.logs import get_logger
from lora_trainer.persona.vocabulary import BloodType
from lora_trainer.run.bundle_checks import CheckedBundle, check_base, check_bundle, unproven
from lora_trainer.run.bundle_files import read_verdict, write_documents, write_evaluation
from lora_trainer.run.evaluation import Evaluated, held_out_metrics
from lora_trainer.run.identity import Identity
from lora_trainer.run.inputs import DataFile
from lora_trainer.run.job import Job, ProcessContext
from lora_trainer.run.progress import RunProgress
from lora_trainer.run.training import Trained, TrainingPlan, open_checkpoints
from lora_trainer.store.bundle import publish_bundle
from lora_trainer.store.interface import Storage
from lora_trainer.store.latest import forget_start, link_newest, move_latest, promote_latest, take_count
from lora_trainer.store.lease import Lease, LeaseLostError, hold, is_left_over
from lora_trainer.store.manifest import MANIFEST_NAME, check_run_manifest, read_manifest, write_manifest
from lora_trainer.store.opening import open_storage
from lora_trainer.store.prefixes import bundle_prefix, latest_key, lease_key, run_prefix
from lora_trainer.train.backends import Backend
from lora_trainer.uris import local_path


@dataclass(frozen=True, slots=True)
class Outcome:
    """Result of a run that has a verdict."""

    run_id: str
    bundle_uri: str
    report_uri: str
    verdict: Verdict
    already_done: bool
    moved_latest: bool


def hold_lease(job: Job, run_id: str) -> AbstractContextManager[Lease]:
    """Hold the run's lease during the block, so that no other attempt works on the run."""
    return hold(job.config.lease, job.output, lease_key(job.config.blood_type, run_id))


def find_published(job: Job, run_id: str) -> dict[str, Any] | None:
    """Return the manifest of the run's published bundle, or None."""
    return read_manifest(job.output, bundle_prefix(job.config.blood_type, run_id))


def find_finished(job: Job, identity: Identity, lease: Lease | None = None) -> Outcome | None:
    """Return the recorded outcome of a run that has a verdict under these gates, or None.

    Move `latest.json` if an earlier attempt died after publishing and before the move.
    """
    output = job.output
    prefix = bundle_prefix(job.config.blood_type, identity.run_id)
    manifest = read_manifest(output, prefix)
    found = manifest and read_verdict(output, prefix, manifest, identity.gate_id)
    if not manifest or not found:
        return None
    verdict, folder = found
    check_run_manifest(manifest, f"{output.uri}{prefix}{MANIFEST_NAME}")
    moved = accept(job.config.blood_type, output, manifest, verdict)
    job.log.info(
        "already_done",
        bundle=output.uri + prefix,
        finished_at=manifest.get("finished_at"),
        passed=verdict.passed,
        sense=verdict.sense,
        latest_moved=moved,
    )
    remove_leftovers(job, identity.run_id, lease)
    return Outcome(
        identity.run_id, output.uri + prefix, f"{output.uri}{folder}report.html", verdict, already_done=True, moved_latest=moved
    )


def remove_leftovers(job: Job, run_id: str, lease: Lease | None) -> None:
    """Remove the checkpoints and lease of an attempt that died after publishing. Those of a running attempt are kept."""
    output, blood_type = job.output, job.config.blood_type
    key = lease_key(blood_type, run_id)
    try:
        if next(output.list(run_prefix(blood_type, run_id)), None) is None:
            return
        if lease is None and not is_left_over(output, key):
            return
        open_checkpoints(job, run_id).clear()
        forget_start(output, blood_type, run_id)
        if lease is None:
            output.delete(key)
    except StorageError as error:
        # leftovers only cost space
        job.log.warning("leftovers_not_removed", problem=str(error))


def assemble(
    job: Job,
    backend: Backend,
    folder: Path,
    identity: Identity,
    data: DataFile,
    plan: TrainingPlan,
    trained: Trained,
    evaluated: Evaluated,
    verdict: Verdict,
) -> None:
    """Complete the bundle in `folder` with metrics, report, model card, and the manifest of all files."""
    metrics = RunMetrics(
        run_id=identity.run_id,
        blood_type=job.config.blood_type,
        training=training_metrics(plan, trained),
        held_out=held_out_metrics(len(plan.data.held_out), trained.loss_base, trained.kept.loss),
        evaluation=evaluated.metrics,
        verdict=verdict,
        peak_memory_gib=round(backend.peak_memory_gib(), 3),
    )
    facts = {
        "run_id": identity.run_id,
        "blood_type": str(job.config.blood_type),
        "started_at": job.started_at,
        "counter": job.counter,
        "finished_at": datetime.now(UTC).isoformat(timespec="seconds"),
        "evaluation_id": identity.evaluation_id,
        "gate_id": identity.gate_id,
        "verdict": verdict.model_dump(mode="json"),
        "ingredients": identity.ingredients,
        "base": {"id": identity.base.canonical_id, "revision": identity.base.revision, "identity": identity.base.identity},
        "data": {
            "uri": data.uri,
            "sha256": data.fetched.sha256,
            "size_bytes": data.fetched.size_bytes,
            "train_records": len(plan.data.train),
            "held_out_records": len(plan.data.held_out),
            "left_out_records": plan.data.left_out,
        },
        "config": job.config.model_dump(mode="json"),
        "memory_plan": {
            "gradient_checkpointing": plan.memory.gradient_checkpointing,
            "micro_batch_tokens": plan.memory.micro_batch_tokens,
            "reason": plan.memory.reason,
        },
        "environment": {
            **job.environment,
            "lora_trainer": __version__,
            "git_revision": git_revision(),
            "image_digest": image_digest(),
        },
        "timings_s": dict(job.timings_s),
    }
    write_documents(folder, job.config, identity.base, metrics, job.process.prompt_version)
    write_evaluation(folder, metrics, trained.log.steps, evaluated.replies, facts, evaluated.depth_replies)
    write_manifest(folder, facts)


def training_metrics(plan: TrainingPlan, trained: Trained) -> TrainingMetrics:
    """Summarise the step log: losses in nats per reply token, tokens without padding, and seconds."""
    log = trained.log
    return TrainingMetrics(
        records=len(plan.data.train),
        steps=len(log.steps),
        planned_steps=len(plan.steps),
        kept_step=trained.kept.step,
        held_out_losses=tuple(HeldOutLossMetrics(step=measured.step, loss=measured.loss) for measured in log.held_out),
        loss_first=log.steps[0].loss,
        loss_last=log.steps[-1].loss,
        tokens=log.tokens,
        loss_tokens=sum(step.loss_tokens for step in log.steps),
        rows=sum(step.rows for step in log.steps),
        packed_rows=log.packed_rows,
        train_s=round(log.train_s, 3),
        tokens_per_s=round(log.tokens_per_s, 1),
    )


def publish(job: Job, run_id: str, folder: Path, verdict: Verdict, progress: RunProgress, lease: Lease | None = None) -> Outcome:
    """Upload the bundle, its manifest last, move `latest.json` if the gates passed, and then delete the local copy."""
    progress.stage("publish")
    output = job.output
    prefix = bundle_prefix(job.config.blood_type, run_id)
    try:
        with job.timed("publish"):
            publish_bundle(folder, output, prefix, lease)
    except LeaseLostError:
        # the attempt that took over finishes the job
        raise
    except LoraTrainerError as error:
        kept = f"the finished bundle is kept here; run 'lora-trainer publish {folder}' to finish once the store recovers"
        error.problems = (*error.problems, f"{folder}: {kept}")
        raise
    manifest = read_manifest(output, prefix)
    if manifest is None:
        raise RuntimeError(f"{output.uri}{prefix}: the manifest that was just written is missing")
    moved = accept(job.config.blood_type, output, manifest, verdict)
    shutil.rmtree(folder)
    progress.stage("done")
    job.log.info(
        "bundle_published",
        bundle=output.uri + prefix,
        passed=verdict.passed,
        sense=verdict.sense,
        latest_moved=moved,
        publish_s=job.timings_s["publish"],
    )
    return Outcome(run_id, output.uri + prefix, f"{output.uri}{prefix}report.html", verdict, already_done=False, moved_latest=moved)


def publish_folder(
    folder: Path, output_uri: str | None, process: ProcessContext, *, base_model: str | None = None, accepted: bool = False
) -> Outcome:
    """Check and publish the finished bundle in `folder`, and move `latest.json` if it passed its gates and can prove it.

    `output_uri` overrides the run's own output. With `base_model`, compare the adapter with that base. `accepted` says that the
    user trusts a bundle whose run id or verdict cannot be computed again. Delete the folder only if it is the run's own.

    Raise `ConfigError` if the folder holds something else than a run's bundle, `StorageError` if the upload fails.
    """
    bundle = check_bundle(folder)
    manifest, blood_type, run_id = bundle.manifest, bundle.blood_type, bundle.metrics.run_id
    structlog.contextvars.bind_contextvars(run_id=run_id, blood_type=str(blood_type))
    if base_model is not None:
        config = settle({"blood_type": str(blood_type), "base.model": base_model})
        check_base(bundle, process.base(config), base_model)
    is_own = _is_left_over(folder, manifest)
    if output_uri is None and not is_own:
        # do not let a bundle of unknown origin choose the output or the pointer to move
        raise ConfigError(
            f"{folder}: got a bundle outside its run's folder, <work_dir>/runs/{blood_type}/{run_id}/bundle; "
            "expected --output: a copied bundle does not decide where it is published"
        )
    named = str(manifest["config"].get("output", ""))
    output = process.storage(output_uri or named)
    if not is_own or output.uri != _uri_of(named):
        # its place in the order is of another output, or anybody's claim
        manifest = {name: value for name, value in manifest.items() if name != "counter"}
        if not output.exists(latest_key(blood_type)):
            # nothing to be earlier than
            manifest["counter"] = take_count(output, blood_type)
    prefix = bundle_prefix(blood_type, run_id)
    already_done = _is_published(output, prefix, folder)
    if not already_done:
        with hold(LeaseConfig(), output, lease_key(blood_type, run_id)) as lease:
            # another attempt may have published during the wait for the lease, and bundles are never rewritten
            already_done = _is_published(output, prefix, folder)
            if not already_done:
                publish_bundle(folder, output, prefix, lease)
    moved = _accept_folder(output, bundle, manifest, accepted=accepted)
    if is_own:
        shutil.rmtree(folder)
    get_logger().info(
        "bundle_published",
        bundle=output.uri + prefix,
        passed=bundle.verdict.passed,
        sense=bundle.verdict.sense,
        latest_moved=moved,
        folder_deleted=is_own,
    )
    return Outcome(run_id, output.uri + prefix, f"{output.uri}{prefix}report.html", bundle.verdict, already_done, moved)


def _accept_folder(output: Storage, bundle: CheckedBundle, manifest: dict[str, Any], *, accepted: bool) -> bool:
    """Move `latest.json` to a bundle that passed its gates, if it can prove that or the user trusts it. Return whether it moved."""
    if not bundle.verdict.passed:
        return accept(bundle.blood_type, output, manifest, bundle.verdict)
    doubts = unproven(bundle)
    if not doubts:
        return accept(bundle.blood_type, output, manifest, bundle.verdict)
    if not accepted:
        get_logger().warning(
            "latest_not_moved",
            problems=doubts,
            advice="the bundle is published; if you trust it, 'publish --accept' or 'promote' moves latest.json",
        )
        return False
    before = promote_latest(output, bundle.blood_type, manifest, bundle.verdict.sense, accepted_by_hand=True)
    link_newest(output, bundle.blood_type, manifest["run_id"])
    get_logger().warning("latest_checked", moved=True, reason="accepted by hand (--accept)", before=before, problems=doubts)
    return True


def _is_left_over(folder: Path, manifest: Mapping[str, Any]) -> bool:
    """Return whether `folder` is where the manifest's run, on this machine, leaves a bundle that it could not publish."""
    work_dir = manifest["config"].get("work_dir")
    if not isinstance(work_dir, str):
        return False
    try:
        own = local_path(work_dir) / "runs" / str(manifest["blood_type"]) / str(manifest["run_id"]) / "bundle"
    except ValueError:
        return False
    return folder.resolve() == own.resolve()


def _uri_of(named: str) -> str | None:
    try:
        return open_storage(named).uri
    except LoraTrainerError:
        return None


def _is_published(output: Storage, prefix: str, folder: Path) -> bool:
    """Return whether the run's bundle is already there. Raise `ConfigError` if that one is another than the one in `folder`."""
    published = output.read_bytes(prefix + MANIFEST_NAME)
    if published is None:
        return False
    if published.data != (folder / MANIFEST_NAME).read_bytes():
        raise ConfigError(
            f"{folder}: got another bundle than the one that is published at {output.uri}{prefix}; a published bundle stays as it "
            "is: name another output, or remove the folder"
        )
    return True


def accept(blood_type: BloodType, output: Storage, manifest: dict[str, Any], verdict: Verdict) -> bool:
    """Point `latest.json` at a run that passed its gates, unless it names a later run. Return whether it moved."""
    log = get_logger()
    if not verdict.passed:
        log.info("latest_checked", moved=False, reason="the gates were not passed")
        return False
    move = move_latest(output, blood_type, manifest, verdict.sense)
    if move.warning:
        log.warning("latest_in_future", problem=move.warning)
    log.info("latest_checked", moved=move.moved, reason=move.reason)
    if move.names_this_run:
        link_newest(output, blood_type, manifest["run_id"])
    return move.moved


def git_revision() -> str | None:
    """Return the commit of this program, from the image or the checkout that it runs from."""
    if revision := os.environ.get("GIT_REVISION"):
        return revision
    checkout = Path(__file__).resolve().parents[2]
    if not (checkout / ".git").exists() or not (git := shutil.which("git")):
        return None
    done = subprocess.run([git, "-C", str(checkout), "rev-parse", "--verify", "HEAD"], capture_output=True, text=True, check=False)  # noqa: S603
    # in a repository without commits git prints "HEAD" and fails
    return done.stdout.strip() if done.returncode == 0 else None


def image_digest() -> str | None:
    """Return the image's digest, if the deployment passed it in."""
    return os.environ.get("IMAGE_DIGEST") or None
