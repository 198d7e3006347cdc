"""The story of a sweep: train the trials in turn on one loaded base, drop the worse ones early, and publish the best.

A trial is a run: it has the run's id, lease, checkpoints and progress file, and it is paused by stopping after a checkpoint. So the
winner's adapter is the one that `run` would publish with the winner's settings, and `run` finds it finished. `train/sweep.py` says
which trials are dropped. Those that reach the end of their schedule are evaluated in the order of their held-out loss, until one
passes all gates: no later one could rank above it, so usually a single trial is evaluated.

After each change the record is written to the output. An interrupted sweep reads it, and continues the trial it was in from its
checkpoint.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Final

import structlog

from lora_trainer.config import RunConfig
from lora_trainer.errors import ConfigError, DivergedError, HardwareError, InvariantError
from lora_trainer.evaluate.llm_judge import check_judge
from lora_trainer.evaluate.metrics import HeldOutLossMetrics, Verdict
from lora_trainer.report.sweep_page import sweep_page
from lora_trainer.run.bundle_files import read_training
from lora_trainer.run.identity import identify
from lora_trainer.run.inputs import fetch, fetch_prompts, read
from lora_trainer.run.job import Job, ProcessContext
from lora_trainer.run.pipeline import (
    Judged,
    Planned,
    Prepared,
    judge_published,
    plan,
    publish_judged,
    train_and_judge,
    train_and_publish,
)
from lora_trainer.run.preflight import check_output
from lora_trainer.run.publication import Outcome, find_finished, find_published, hold_lease
from lora_trainer.run.sweep_trials import TrialConfig
from lora_trainer.run.training import open_checkpoints, plan_recipe, stepping_down, train, train_until
from lora_trainer.store.documents import parse_object, validated
from lora_trainer.store.interface import Storage
from lora_trainer.store.latest import forget_start
from lora_trainer.store.lease import hold, is_left_over
from lora_trainer.store.prefixes import bundle_prefix, lease_key, sweep_prefix
from lora_trainer.train.requirements import require_stack
from lora_trainer.train.step_log import TrainingLog
from lora_trainer.train.sweep import RUNGS, Rung, SweepRecord, Trial, best_of, by_loss, dropped_at, pause_step, sweep_id
from lora_trainer.train.trackers import require_installed

RECORD_NAME: Final = "sweep.json"
PAGE_NAME: Final = "sweep.html"


@dataclass(frozen=True, slots=True)
class SweepResult:
    """A finished sweep."""

    record: SweepRecord
    page_uri: str
    config: RunConfig
    """The winner's settings."""
    outcome: Outcome
    """The winner's published run."""


@dataclass(frozen=True, slots=True)
class _TrialRun:
    """A trial's run with validated inputs and an identity."""

    tried: Mapping[str, Any]
    job: Job
    prepared: Prepared

    @property
    def run_id(self) -> str:
        return self.prepared.identity.run_id


class _RecordFile:
    """The sweep's record, in memory and in the output."""

    def __init__(self, output: Storage, prefix: str, record: SweepRecord) -> None:
        self._output = output
        self._prefix = prefix
        self.record = record

    def write(self, **changes: Any) -> None:
        """Change the record and write it."""
        self.record = self.record.model_copy(update=changes)
        document = json.dumps(self.record.as_json(), indent=2, ensure_ascii=False) + "\n"
        self._output.write_bytes(self._prefix + RECORD_NAME, document.encode())

    def write_trial(self, run: _TrialRun, **changes: Any) -> None:
        """Change the record of one trial and write it."""
        self.write(trials=self.record.with_trial(run.run_id, **changes).trials)
        trial = self.record.trial(run.run_id)
        loss = round(trial.loss, 4) if trial.loss is not None else None
        run.job.log.info("trial_recorded", state=trial.state, step=trial.steps, of=trial.planned_steps, held_out_loss=loss)

    def write_page(self) -> str:
        """Write the page with table and plot, and return its URI."""
        self._output.write_bytes(self._prefix + PAGE_NAME, sweep_page(self.record).encode())
        return f"{self._output.uri}{self._prefix}{PAGE_NAME}"

    def unfinished(self, runs: Sequence[_TrialRun]) -> list[_TrialRun]:
        """Return the trials that are neither dropped nor trained to the end."""
        return [run for run in runs if self.record.trial(run.run_id).state == "training"]


def sweep(trials: Sequence[TrialConfig], process: ProcessContext) -> SweepResult:
    """Run all `trials` and publish the best, or finish what an earlier attempt has begun.

    Missed gates are in the result. Raise `DivergedError` if every trial diverged, and otherwise what a run raises.
    """
    runs = _prepare(trials, process)
    first = runs[0]
    output, blood_type = first.job.output, first.job.config.blood_type
    gate_id = first.prepared.identity.gate_id
    identifier = sweep_id((run.run_id for run in runs), gate_id)
    prefix = sweep_prefix(blood_type, identifier)
    with (
        structlog.contextvars.bound_contextvars(sweep_id=identifier),
        hold(first.job.config.lease, output, f"{prefix}lease.json") as lease,
    ):
        guarded = output.adapted(guard=lease.check)
        found = _read_record(output, prefix)
        if found and (finished := _finished(runs, found, f"{output.uri}{prefix}{PAGE_NAME}")):
            return finished
        check_output(output, blood_type)
        works = _plan(runs)
        record = found or SweepRecord(
            sweep_id=identifier,
            blood_type=blood_type,
            gate_id=gate_id,
            trials=tuple(_new_trial(run, works[run.run_id]) for run in runs),
            started_at=first.job.started_at,
        )
        file = _RecordFile(guarded, prefix, record)
        file.write(trials=tuple(_with_published(record.trial(run.run_id), run) for run in runs))
        _train_and_drop(file, runs, works)
        judged = _judge(file, runs, works)
        winner = _run_of(runs, best_of(file.record.trials).run_id)
        outcome = _publish(winner, works[winner.run_id], judged.get(winner.run_id))
        for run in runs:
            if run is not winner and not run.prepared.published:
                _discard(run)
        finished_at = datetime.now(UTC).isoformat(timespec="seconds")
        file.record = file.record.model_copy(
            update={"winner": winner.run_id, "bundle": outcome.bundle_uri, "finished_at": finished_at}
        )
        page_uri = file.write_page()
        # last: a sweep whose record names a winner is finished
        file.write()
    return SweepResult(file.record, page_uri, winner.job.config, outcome)


def _prepare(trials: Sequence[TrialConfig], process: ProcessContext) -> list[_TrialRun]:
    """Fetch and check the inputs once, and identify each trial's run."""
    jobs = [Job(trial.config, process) for trial in trials]
    first, config = jobs[0], trials[0].config
    require_stack(config)
    require_installed(config.logging.report_to)
    process.models.require_base(config.base, process.retry_budget)
    data = fetch(first)
    records = read(first, data)
    prompts = fetch_prompts(first)
    check_judge(config.evaluation)
    runs = []
    for trial, job in zip(trials, jobs, strict=True):
        # `identify` binds the run's id to all later log lines
        with structlog.contextvars.bound_contextvars(run_id=""):
            identity = identify(job, data, prompts)
            progress = job.progress(job.run_dir(identity.run_id), identity.run_id)
            published = find_published(job, identity.run_id)
        runs.append(_TrialRun(trial.tried, job, Prepared(data, records, prompts, identity, progress, published)))
    return runs


def _read_record(output: Storage, prefix: str) -> SweepRecord | None:
    found = output.read_bytes(prefix + RECORD_NAME)
    if found is None:
        return None
    where = f"{output.uri}{prefix}{RECORD_NAME}"
    try:
        return validated(SweepRecord, parse_object(found.data, where), where)
    except ConfigError as error:
        raise ConfigError([*error.problems, f"{where}: this sweep can't be continued; remove the file to start it over"]) from None


def _finished(runs: Sequence[_TrialRun], record: SweepRecord, page_uri: str) -> SweepResult | None:
    """Return the result of a sweep that has published its winner."""
    if record.winner is None:
        return None
    winner = _run_of(runs, record.winner)
    outcome = find_finished(winner.job, winner.prepared.identity)
    return SweepResult(record, page_uri, winner.job.config, outcome) if outcome else None


def _run_of(runs: Sequence[_TrialRun], run_id: str) -> _TrialRun:
    return next(run for run in runs if run.run_id == run_id)


def _plan(runs: Sequence[_TrialRun]) -> dict[str, Planned]:
    """Plan every trial while the device is still empty. They share data and tokens, and differ in the steps."""
    first = runs[0]
    with structlog.contextvars.bound_contextvars(run_id=first.run_id):
        works = {first.run_id: plan(first.job, first.prepared)}
    backend, shared = works[first.run_id].backend, works[first.run_id].plan
    for run in runs[1:]:
        run.job.environment.update(first.job.environment)
        run.job.timings_s = {**first.job.timings_s, **run.job.timings_s}
        with structlog.contextvars.bound_contextvars(run_id=run.run_id):
            recipe = plan_recipe(run.job, backend, shared.base_folder, shared.data)
        works[run.run_id] = Planned(run.prepared, backend, recipe)
    return works


def _new_trial(run: _TrialRun, work: Planned) -> Trial:
    return Trial(run_id=run.run_id, settings=dict(run.tried), planned_steps=len(work.plan.steps))


def _with_published(trial: Trial, run: _TrialRun) -> Trial:
    """Return the trial with the measurements of its published bundle, if there is one: it is not trained again."""
    if not run.prepared.published or trial.state == "trained":
        return trial
    training, held_out = read_training(run.job.output, bundle_prefix(run.job.config.blood_type, run.run_id))
    changes = {
        "state": "trained",
        "was_published": True,
        "steps": training.steps,
        "loss": held_out.loss_adapter,
        "held_out_losses": training.held_out_losses,
        "train_s": training.train_s,
    }
    return trial.model_copy(update=changes)


def _train_and_drop(file: _RecordFile, runs: Sequence[_TrialRun], works: Mapping[str, Planned]) -> None:
    """Train all trials to the first rung and drop the worse half; the same for the second; then train the rest to the end."""
    # another shape or seed of the adapter needs the base loaded anew, so train those that share one after another
    starts = list(dict.fromkeys(_adapter_start(run) for run in runs))
    runs = sorted(runs, key=lambda run: starts.index(_adapter_start(run)))
    for share in RUNGS:
        for run in file.unfinished(runs):
            if file.record.trial(run.run_id).loss_at(share) is None:
                _train(file, run, works[run.run_id], share)
        for run_id in dropped_at(file.record.trials, share):
            file.write_trial(_run_of(runs, run_id), state="dropped")
            _discard(_run_of(runs, run_id))
    for run in file.unfinished(runs):
        _train(file, run, works[run.run_id], None)
    if not by_loss(file.record.trials):
        raise DivergedError(
            [
                f"of {len(runs)} trials, all that were not dropped diverged; try lower values of training.learning_rate",
                *dict.fromkeys(trial.problem for trial in file.record.trials if trial.problem),
            ]
        )


def _adapter_start(run: _TrialRun) -> str:
    config = run.job.config
    return f"{config.lora.model_dump_json()} {config.training.seed}"


def _train(file: _RecordFile, run: _TrialRun, work: Planned, share: float | None) -> None:
    """Train one trial up to the rung at `share`, or to the end, and record its loss. A trial that diverges has lost."""
    job, identity = run.job, run.prepared.identity
    with structlog.contextvars.bound_contextvars(run_id=run.run_id), hold_lease(job, run.run_id) as lease:
        checkpoints = open_checkpoints(job, run.run_id, lease)
        work.backend.configure(job.config)
        arguments = (job, work.backend, identity, work.plan, checkpoints, run.prepared.progress)
        try:
            with checkpoints, job.process.interruption.recognised(), stepping_down(job, work.backend, work.plan):
                if share is None:
                    trained = train(*arguments)
                    log, loss, loss_base = trained.log, trained.kept.loss, trained.loss_base
                else:
                    paused = train_until(*arguments, pause_step(share, len(work.plan.steps)))
                    log, loss, loss_base = paused.log, paused.loss, paused.loss_base
                # the next process continues from there
                checkpoints.finish()
        except DivergedError as error:
            # what it left on the device is no state to continue from
            job.process.models.release()
            job.log.warning("trial_diverged", problem=error.problems[0])
            file.write_trial(run, state="diverged", problem=error.problems[0])
            return
        except HardwareError as error:
            tried = ", ".join(f"{name}={value}" for name, value in run.tried.items())
            error.problems = (*error.problems, f"this was the trial of {tried}; leave it out, or change the settings of all trials")
            raise
        if file.record.loss_base is None:
            file.record = file.record.model_copy(update={"loss_base": loss_base})
        rungs = file.record.trial(run.run_id).rungs
        if share is not None:
            rungs += (Rung(share=share, step=len(log.steps), loss=loss),)
        file.write_trial(run, state="trained" if share is None else "training", rungs=rungs, loss=loss, **_totals(log))


def _totals(log: TrainingLog) -> dict[str, Any]:
    measured = tuple(HeldOutLossMetrics(step=each.step, loss=each.loss) for each in log.held_out)
    return {"steps": len(log.steps), "held_out_losses": measured, "train_s": round(log.train_s, 3)}


def _judge(file: _RecordFile, runs: Sequence[_TrialRun], works: Mapping[str, Planned]) -> dict[str, Judged]:
    """Evaluate the trained trials, lowest loss first, until one passes all gates. Return the bundles by run id."""
    judged: dict[str, Judged] = {}
    for trial in by_loss(file.record.trials):
        run = _run_of(runs, trial.run_id)
        verdict = trial.verdict
        if verdict is None:
            with structlog.contextvars.bound_contextvars(run_id=run.run_id):
                if run.prepared.published:
                    verdict = _published_verdict(run, run.prepared.published)
                else:
                    judged[run.run_id] = _judge_trained(run, works[run.run_id])
                    verdict = judged[run.run_id].verdict
                file.write_trial(run, verdict=verdict)
        if verdict.passed:
            break
    return judged


def _published_verdict(run: _TrialRun, manifest: dict[str, Any]) -> Verdict:
    job, prepared = run.job, run.prepared
    if finished := find_finished(job, prepared.identity):
        return finished.verdict
    # it is evaluated as a server loads it, by a backend of its own
    job.process.models.release()
    outcome = judge_published(job, prepared, manifest)
    job.process.models.release()
    return outcome.verdict


def _judge_trained(run: _TrialRun, work: Planned) -> Judged:
    """Evaluate a trial from its last checkpoint."""
    job = run.job
    with hold_lease(job, run.run_id) as lease:
        checkpoints = open_checkpoints(job, run.run_id, lease)
        work.backend.configure(job.config)
        with checkpoints, job.process.interruption.recognised():
            return train_and_judge(job, work, checkpoints, lease)


def _publish(run: _TrialRun, work: Planned, judged: Judged | None) -> Outcome:
    """Publish the winner. Without its bundle, which an interrupted attempt leaves behind, evaluate it again first."""
    job = run.job
    with structlog.contextvars.bound_contextvars(run_id=run.run_id):
        if run.prepared.published:
            finished = find_finished(job, run.prepared.identity)
            if finished is None:
                raise InvariantError(f"run {run.run_id}: the verdict that was just published is missing")
            return finished
        work.backend.configure(job.config)
        if judged is None:
            return train_and_publish(job, work)
        with hold_lease(job, run.run_id) as lease:
            checkpoints = open_checkpoints(job, run.run_id, lease)
            with checkpoints, job.process.interruption.recognised():
                return publish_judged(job, work, judged, checkpoints, lease)


def _discard(run: _TrialRun) -> None:
    """Remove what a trial that has lost leaves: its checkpoints, its start and its local folder."""
    job = run.job
    if not is_left_over(job.output, lease_key(job.config.blood_type, run.run_id)):
        # somebody runs these settings on their own
        return
    with structlog.contextvars.bound_contextvars(run_id=run.run_id), hold_lease(job, run.run_id) as lease:
        open_checkpoints(job, run.run_id, lease).clear()
        forget_start(job.output, job.config.blood_type, run.run_id)
    shutil.rmtree(job.run_dir(run.run_id), ignore_errors=True)
