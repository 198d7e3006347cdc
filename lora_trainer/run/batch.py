"""One persona's run in a batch. Each has its own log context, and its failure does not affect the others."""

from __future__ import annotations

import contextvars
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Concatenate, ParamSpec, TypeVar

import structlog

from lora_trainer.errors import ExitCode, GateError, worst
from lora_trainer.evaluate.gates import missed_gate_messages
from lora_trainer.logs import get_logger
from lora_trainer.persona.vocabulary import BloodType
from lora_trainer.run.bug_report import report_bug
from lora_trainer.run.failure_report import FailureReport, failure_report
from lora_trainer.run.job import Job
from lora_trainer.run.next_command import next_command
from lora_trainer.run.publication import Outcome

_P = ParamSpec("_P")
_T = TypeVar("_T")


class BatchStoppedError(Exception):
    """An interruption or a lost device stops all personas. The failure report of the persona that raised this has the cause."""


class PersonaRun:
    """A persona's run: waiting, in progress or ended."""

    def __init__(self, job: Job, on_end: Callable[[PersonaRun], None]) -> None:
        self.blood_type: BloodType = job.config.blood_type
        self.outcome: Outcome | None = None
        self.report: FailureReport | None = None
        """Outcome of the run; None until it has ended."""
        self._job = job
        self._on_end = on_end
        self._spent_s = 0.0
        # use a separate context, so that fields bound by this run do not appear in other personas' log lines
        self._context = contextvars.copy_context()
        self._context.run(structlog.contextvars.bind_contextvars, blood_type=str(self.blood_type))

    def attempt(self, phase: Callable[Concatenate[Job, _P], _T | Outcome], *arguments: _P.args, **options: _P.kwargs) -> _T | None:
        """Run `phase` and return its result for the next phase, or None if the run has ended, in success or failure.

        Raise `BatchStoppedError` if an interruption or a lost device ended it.
        """
        started_s = time.monotonic()
        try:
            result = self._context.run(phase, self._job, *arguments, **options)
        except BaseException as error:
            report = failure_report(error, self._job.process.interruption, self._job.config.work_dir)
            if report is None:
                # SystemExit or StepDown: the process is about to exit or to re-exec
                raise
            # a LoraTrainerError explains itself
            self.report = self._context.run(report_bug, self._job, error, report) if report.outcome == "bug" else report
        else:
            if not isinstance(result, Outcome):
                return result
            self.outcome = result
            self.report = _report_on(result)
        finally:
            self._spent_s += time.monotonic() - started_s
        self._on_end(self)
        self._check_batch()
        return None

    def _check_batch(self) -> None:
        models = self._job.process.models
        if self.report and self.report.exit_code is ExitCode.INTERRUPTED:
            raise BatchStoppedError
        if self.outcome is None:
            if not models.device_answers():
                raise BatchStoppedError
            # the phase may have failed anywhere, so don't reuse what it left on the device
            models.release()

    @property
    def log(self) -> structlog.stdlib.BoundLogger:
        """The project's logger, with everything that this run binds to its lines."""
        return get_logger().bind(**self.bound)

    @property
    def bound(self) -> dict[str, object]:
        """Fields bound to the run's log lines: `blood_type`, and `run_id` once it is known."""
        return self._context.run(structlog.contextvars.get_contextvars)

    @property
    def ending(self) -> dict[str, object]:
        """Fields of the event `persona_finished`."""
        report = self.report or FailureReport()
        fields: dict[str, object] = {"outcome": report.outcome, "exit_code": int(report.exit_code), **self.result}
        if report.frames:
            fields["frames"] = list(report.frames)
        return {**fields, "duration_s": round(self._spent_s, 1)}

    @property
    def next_command(self) -> tuple[str, str]:
        """The command to type after a run that has a verdict, and what it is for."""
        if self.outcome is None:
            raise RuntimeError("the run has no verdict")
        return next_command(self._job.config, self.outcome)

    @property
    def result(self) -> dict[str, object]:
        """The published bundle and its verdict; empty without a verdict."""
        if self.outcome is None:
            return {}
        return {
            "bundle": self.outcome.bundle_uri,
            "report": self.outcome.report_uri,
            "already_done": self.outcome.already_done,
            "passed": self.outcome.verdict.passed,
            "sense": self.outcome.verdict.sense,
            "not_judged": dict(self.outcome.verdict.not_judged),
        }

    @property
    def summary(self) -> dict[str, object]:
        """The run's entry in `run_finished` when the process runs several personas."""
        fields: dict[str, object] = {
            "blood_type": str(self.blood_type),
            "run_id": self.bound.get("run_id"),
            "outcome": self.report.outcome if self.report else "not_begun",
            "exit_code": int(self.report.exit_code) if self.report else None,
        }
        verdict = ("bundle", "passed", "sense", "not_judged")
        return fields | {name: value for name, value in self.result.items() if name in verdict}


def _report_on(outcome: Outcome) -> FailureReport:
    if outcome.verdict.passed:
        return FailureReport()
    error = GateError(missed_gate_messages(outcome.verdict))
    return FailureReport(error.exit_code, type(error).__name__, error.problems)


def combined_report(own: FailureReport, personas: Sequence[PersonaRun]) -> FailureReport:
    """Return the report on the whole process: the worst exit code, and every problem with the personas that it affects."""
    reports = [own, *(persona.report for persona in personas if persona.report)]
    code = worst(report.exit_code for report in reports)
    ended = next(report for report in reports if report.exit_code is code)
    if len(personas) == 1:
        return ended
    return FailureReport(code, ended.outcome, (*own.problems, *_problems(personas)), own.frames)


def _problems(personas: Iterable[PersonaRun]) -> list[str]:
    """List each problem once, with its personas: a wrong setting or a broken base affects all of them."""
    names: dict[str, list[str]] = {}
    for persona in personas:
        found = persona.report.problems if persona.report else ("not begun; run the same command again",)
        for problem in found:
            names.setdefault(problem, []).append(persona.blood_type)
    return [f"{', '.join(blood_types)}: {problem}" for problem, blood_types in names.items()]
