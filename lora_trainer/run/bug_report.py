"""Report a bug where somebody can read it: in the log without its message, and in the output with it.

A pod's `work_dir` is usually an emptyDir, which nobody can read once the pod has failed.
"""

from __future__ import annotations

import contextvars
import dataclasses
import json
import secrets
import threading
import traceback
from collections.abc import Iterator
from typing import Final

import structlog

from lora_trainer import __version__
from lora_trainer.redaction import redacted
from lora_trainer.run.failure_report import FailureReport
from lora_trainer.run.identity import library_versions
from lora_trainer.run.job import Job
from lora_trainer.store.prefixes import bug_key
from lora_trainer.store.retry import RetryBudget

_MAX_UPLOAD_S: Final = 10.0
_MAX_FRAMES: Final = 60
_MAX_BYTES: Final = 2**20


def report_bug(job: Job, error: BaseException, report: FailureReport) -> FailureReport:
    """Log everything about a bug that cannot hold training text, and upload its traceback, which can, beside the run's checkpoints.

    Return the report, which then names the upload. Never raises, and takes at most a few seconds: the exit code stays the bug's.
    """
    errors = list(_chain(error))
    facts: dict[str, object] = {
        "errors": [f"{type(each).__module__}.{type(each).__name__}" for each in errors],
        "frames": [frame for each in errors for frame in _frames(each)][-_MAX_FRAMES:],
        "libraries": library_versions(job.config),
        "lora_trainer": __version__,
        "environment": dict(job.environment),
        "timings_s": dict(job.timings_s),
    }
    job.log.error("bug_found", **facts)
    run_id = structlog.contextvars.get_contextvars().get("run_id")
    key = bug_key(job.config.blood_type, str(run_id) if run_id else None, secrets.token_hex(4))
    text = redacted(
        json.dumps(facts, indent=2, ensure_ascii=False, default=str) + "\n\n" + "".join(traceback.format_exception(error))
    )
    if not _uploaded(job, key, text.encode(errors="backslashreplace")[:_MAX_BYTES]):
        return report
    problems = [f"{problem}; {job.output.uri}{key} has its traceback, too" for problem in report.problems]
    return dataclasses.replace(report, problems=tuple(problems))


def _chain(error: BaseException) -> Iterator[BaseException]:
    """Yield the error that caused everything first, and `error` last."""
    seen: list[BaseException] = []
    found: BaseException | None = error
    while found is not None and found not in seen:
        seen.append(found)
        found = found.__cause__ or (None if found.__suppress_context__ else found.__context__)
    yield from reversed(seen)


def _frames(error: BaseException) -> list[str]:
    # no source lines and no locals: only where it happened
    return [f"{frame.filename}:{frame.lineno} {frame.name}" for frame in traceback.extract_tb(error.__traceback__)]


def _uploaded(job: Job, key: str, data: bytes) -> bool:
    """Write `data` to the output within a short budget. Return whether it is there."""
    done = threading.Event()

    def write() -> None:
        try:
            limits = {"object_budget_s": _MAX_UPLOAD_S / 2, "total_budget_s": _MAX_UPLOAD_S / 2}
            budget = RetryBudget(job.config.storage.model_copy(update=limits))
            job.output.adapted(retry_budget=budget).write_bytes(key, data)
            done.set()
        except Exception as error:  # a second failure must not hide the first
            job.log.warning("bug_not_uploaded", where=key, reason=type(error).__name__)

    # a daemon thread, so that a store that hangs cannot keep the process
    context = contextvars.copy_context()
    thread = threading.Thread(target=context.run, args=(write,), name="bug-report", daemon=True)
    thread.start()
    thread.join(_MAX_UPLOAD_S)
    return done.is_set()
