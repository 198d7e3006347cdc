"""Test what is reported about a bug: everything in the log that cannot hold training text, and the rest in the output."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
from conftest import REPOSITORY
from structlog.testing import capture_logs

from lora_trainer.config_sources import settle
from lora_trainer.run.batch import PersonaRun
from lora_trainer.run.job import Job

RECORD_TEXT = "아무도보면안되는말"


def failed(job: Job) -> Any:
    try:
        raise KeyError(RECORD_TEXT)
    except KeyError as cause:
        raise RuntimeError(f"cannot read {RECORD_TEXT}") from cause


def job(tmp_path: Path, output: str) -> Job:
    return Job(
        settle({"blood_type": "A", "device": "cpu", "output": output, "work_dir": str(tmp_path / "work"),
                "base.model": str(REPOSITORY / "examples" / "tiny-base"), "training.quantization": "none"}, {})
    )  # fmt: skip


def test_a_bug_is_found_in_the_log_without_text_and_in_the_output_with_it(tmp_path: Path) -> None:
    run = PersonaRun(job(tmp_path, str(tmp_path / "out")), lambda _: None)
    with capture_logs() as log:
        run.attempt(failed)
    (found,) = (line for line in log if line["event"] == "bug_found")
    assert found["errors"] == ["builtins.KeyError", "builtins.RuntimeError"]
    assert all(frame.rpartition(" ")[2] in ("failed", "attempt") for frame in found["frames"])
    assert found["libraries"]["torch"]
    assert RECORD_TEXT not in str(log)
    (uploaded,) = (tmp_path / "out" / "runs" / "A").glob("bug-*.txt")
    text = uploaded.read_text(encoding="utf-8")
    assert text.count(RECORD_TEXT) >= 2
    assert '"builtins.KeyError"' in text
    assert run.report is not None
    (problem,) = run.report.problems
    assert f"file://{uploaded} has its traceback, too" in problem
    assert RECORD_TEXT not in problem
    assert (run.report.exit_code, len(list((tmp_path / "work").glob("bug-*.txt")))) == (1, 1)


@pytest.mark.parametrize("output", ["file", "s3://no-such-bucket-anywhere/lora/"])
def test_an_output_that_takes_nothing_changes_neither_the_code_nor_the_reason(
    aws_environment: pytest.MonkeyPatch, tmp_path: Path, output: str
) -> None:
    aws_environment.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    aws_environment.setenv("AWS_ACCESS_KEY_ID", "key-id-of-nobody")
    aws_environment.setenv("AWS_SECRET_ACCESS_KEY", "secret-of-nobody")
    aws_environment.setenv("AWS_REGION", "us-east-1")
    (tmp_path / "file").touch()
    run = PersonaRun(job(tmp_path, str(tmp_path / "file") if output == "file" else output), lambda _: None)
    started_s = time.monotonic()
    with capture_logs() as log:
        run.attempt(failed)
    assert time.monotonic() - started_s < 12
    assert run.report is not None
    assert (run.report.exit_code, run.report.outcome) == (1, "bug")
    assert run.report.problems[0].startswith("builtins.RuntimeError (its message is left out")
    assert "too" not in run.report.problems[0]
    assert any(line["event"] in ("bug_not_uploaded", "storage_retry") for line in log)
