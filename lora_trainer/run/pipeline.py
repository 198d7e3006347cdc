"""The story of a run, top to bottom: prepare every persona, plan the training of each, then execute one after another.

All data is validated before any training starts, memory is planned while the device is still empty, and the base is loaded
once. A failure does not affect the other personas; an interruption or a lost device stops them all.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lora_trainer.config import RunConfig
from lora_trainer.data.records import EvaluationPrompt, TrainingRecord
from lora_trainer.evaluate.llm_judge import check_judge
from lora_trainer.evaluate.metrics import Verdict
from lora_trainer.run.batch import BatchStoppedError, PersonaRun
from lora_trainer.run.evaluation import decide, evaluate, evaluation_backend, known_of, require_room_for_replies
from lora_trainer.run.identity import Identity, identify
from lora_trainer.run.inputs import DataFile, fetch, fetch_prompts, read, require_data_folder
from lora_trainer.run.job import Job, ProcessContext
from lora_trainer.run.preflight import check_output
from lora_trainer.run.progress import RunProgress
from lora_trainer.run.publication import Outcome, assemble, find_finished, find_published, hold_lease, publish, training_metrics
from lora_trainer.run.reevaluation import publish_new_verdict
from lora_trainer.run.training import TrainingPlan, open_checkpoints, plan_training, save, stepping_down, train
from lora_trainer.store.checkpoints import Checkpoints
from lora_trainer.store.latest import count_start, forget_start
from lora_trainer.store.lease import Lease
from lora_trainer.train.backends import Backend
from lora_trainer.train.requirements import require_stack
from lora_trainer.train.trackers import require_installed


@dataclass(frozen=True, slots=True)
class Prepared:
    """A run with validated inputs and an identity."""

    data: DataFile
    records: list[TrainingRecord]
    prompts: tuple[EvaluationPrompt, ...]
    identity: Identity
    progress: RunProgress
    published: dict[str, Any] | None
    """Manifest of the bundle, if an earlier attempt published it and only the verdict under these gates is missing."""


@dataclass(frozen=True, slots=True)
class Planned:
    """A prepared run with a training plan."""

    prepared: Prepared
    backend: Backend
    plan: TrainingPlan


@dataclass(frozen=True, slots=True)
class Judged:
    """A bundle that is complete except for its publication."""

    folder: Path
    verdict: Verdict


def run(personas: Sequence[PersonaRun], process: ProcessContext) -> None:
    """Run every persona until it has a published verdict or a failure report. Failures are recorded, not raised.

    Raise `StepDown` to restart this process with a smaller memory plan.
    """
    try:
        prepared = [(persona, found) for persona in personas if (found := persona.attempt(prepare))]
        planned = [(persona, work) for persona, ready in prepared if not ready.published and (work := persona.attempt(plan, ready))]
        for persona, ready in prepared:
            if ready.published:
                persona.attempt(judge_published, ready, ready.published)
        # free the memory of re-evaluations for training
        process.models.release()
        for persona, work in planned:
            persona.attempt(train_and_publish, work)
    except BatchStoppedError:
        return


def persona_runs(
    configs: Sequence[RunConfig], process: ProcessContext, on_end: Callable[[PersonaRun], None] = lambda persona: None
) -> list[PersonaRun]:
    """Return a run for each of `configs`, which differ only in the persona. Each run calls `on_end` when it ends.

    Raise `ConfigError` if several personas would read the same data file.
    """
    require_data_folder(configs)
    return [PersonaRun(Job(config, process), on_end) for config in configs]


def prepare(job: Job) -> Prepared | Outcome:
    """Phase 1: fetch and check the inputs, and identify the run. A run that already has its verdict ends here."""
    require_stack(job.config)
    require_installed(job.config.logging.report_to)
    # a broken base is found in a second, and reading the data takes longer
    job.process.models.require_base(job.config.base, job.process.retry_budget)
    data = fetch(job)
    records = read(job, data)
    prompts = fetch_prompts(job)
    identity = identify(job, data, prompts)
    if finished := find_finished(job, identity):
        return finished
    check_output(job.output, job.config.blood_type)
    check_judge(job.config.evaluation)
    progress = job.progress(job.run_dir(identity.run_id), identity.run_id)
    return Prepared(data, records, prompts, identity, progress, find_published(job, identity.run_id))


def plan(job: Job, prepared: Prepared) -> Planned:
    """Phase 2: import the training stack, tokenize the data, and plan steps and memory."""
    backend = job.start(prepared.progress)
    planned = plan_training(job, backend, prepared.identity.base, prepared.records, prepared.progress)
    require_room_for_replies(job, backend, prepared.prompts, planned.base_folder)
    return Planned(prepared, backend, planned)


def judge_published(job: Job, prepared: Prepared, manifest: dict[str, Any]) -> Outcome:
    """Phase 3 for a published adapter that has no verdict under these prompts and thresholds: judge it without training."""
    identity = prepared.identity
    with hold_lease(job, identity.run_id) as lease:
        # the previous holder may have finished the work
        if finished := find_finished(job, identity, lease):
            return finished
        return publish_new_verdict(job, identity, manifest, prepared.records, prepared.prompts, prepared.progress, lease)


def train_and_publish(job: Job, work: Planned) -> Outcome:
    """Phase 3: train, evaluate, decide, publish."""
    identity = work.prepared.identity
    with hold_lease(job, identity.run_id) as lease:
        if finished := find_finished(job, identity, lease):
            return finished
        checkpoints = open_checkpoints(job, identity.run_id, lease)
        if job.process.fresh:
            checkpoints.clear()
        with checkpoints, job.process.interruption.recognised():
            return publish_judged(job, work, train_and_judge(job, work, checkpoints, lease), checkpoints, lease)


def train_and_judge(job: Job, work: Planned, checkpoints: Checkpoints, lease: Lease) -> Judged:
    """Train, evaluate and decide, and assemble the bundle in the run's folder."""
    prepared, backend, plan = work.prepared, work.backend, work.plan
    identity, progress = prepared.identity, prepared.progress
    job.counter = count_start(job.output.adapted(guard=lease.check), job.config.blood_type, identity.run_id, anew=job.process.fresh)
    with stepping_down(job, backend, plan):
        trained = train(job, backend, identity, plan, checkpoints, progress)
    folder = save(job, backend, identity, plan, progress)
    with evaluation_backend(job, backend, plan.base_folder, folder, progress) as evaluating:
        evaluated = evaluate(job, evaluating, identity.base, prepared.prompts, plan.data, progress, job.process.prompt_version)
    verdict = decide(job, evaluated.metrics, known_of(training_metrics(plan, trained), trained.loss_base, trained.kept.loss))
    assemble(job, backend, folder, identity, prepared.data, plan, trained, evaluated, verdict)
    return Judged(folder, verdict)


def publish_judged(job: Job, work: Planned, judged: Judged, checkpoints: Checkpoints, lease: Lease) -> Outcome:
    """Publish the bundle, unless another attempt has, and remove what only an unfinished run needs."""
    identity, progress = work.prepared.identity, work.prepared.progress
    outcome = find_finished(job, identity, lease) or publish(job, identity.run_id, judged.folder, judged.verdict, progress, lease)
    checkpoints.clear()
    forget_start(job.output, job.config.blood_type, identity.run_id)
    return outcome
