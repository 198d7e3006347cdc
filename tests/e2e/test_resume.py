"""Interrupt runs: checkpoints survive, the next attempt resumes, and the adapter equals an undisturbed run's byte for byte."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from conftest import REPOSITORY
from jobs import DEMO, NO_GATES, Log, Until, few_questions, require_training_stack, watched_job

from lora_trainer.store.interface import Storage
from lora_trainer.store.manifest import MANIFEST_NAME
from lora_trainer.store.opening import open_storage

pytestmark = pytest.mark.e2e
require_training_stack()

STEPS = 12
# Dropout makes the result depend on the random number generators, so resuming must restore them, too.
RUN = (
    "run", *DEMO, "--blood-type", "A", "--data", str(REPOSITORY / "data"),
    "--max-steps", str(STEPS), "--log-format", "json", "--set", "lora.dropout=0.1", "--set", "memory.micro_batch_tokens=512",
    "--set", "logging.log_every_steps=1", "--set", "checkpoints.every_steps=2",
    *few_questions(), *NO_GATES,
)  # fmt: skip


def attempt(output: str, work_dir: Path, *more: str, until: Until | None = None, kill: int = signal.SIGTERM) -> tuple[int, Log]:
    """Run the job once. Return its exit code and log."""
    code, _, log = watched_job(*RUN, "--output", output, "--work-dir", str(work_dir), *more, until=until, kill=kill)
    return code, log


def event(log: Log, name: str) -> dict[str, Any]:
    """Return the last event with this name."""
    return next(line for line in reversed(log) if line["event"] == name)


def trained(step: int) -> Until:
    """Match the log line of this step; by then the trainer has begun the next one."""
    return lambda line: line["event"] == "training_step" and line["step"] == step


def uploaded(step: int) -> Until:
    return lambda line: line["event"] == "checkpoint_uploaded" and line["step"] >= step


def read_back(line: dict[str, Any]) -> bool:
    """Match the last event before the evaluation."""
    return bool(line["event"] == "adapter_read_back")


def adapter(output: Storage, log: Log) -> bytes:
    """Return the published weights."""
    found = output.read_bytes(f"adapters/A/{event(log, 'run_finished')['run_id']}/adapter_model.safetensors", max_bytes=2**28)
    assert found is not None
    return found.data


def checkpoints(output: Storage) -> dict[str, list[str]]:
    """Return the file names of each checkpoint folder."""
    found: dict[str, list[str]] = {}
    for item in output.list("runs/"):
        if item.key.endswith(("/lease.json", "/start.json", "/starts.json")):
            continue
        _, _, _, _, folder, name = item.key.split("/")
        found.setdefault(folder, []).append(name)
    return found


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    folder = tmp_path_factory.mktemp("undisturbed")
    code, log = attempt(str(folder / "out"), folder / "work")
    assert code == 0, log[-1]
    output = open_storage(f"file://{folder / 'out'}")
    # publishing removes the checkpoints
    assert checkpoints(output) == {}
    return adapter(output, log)


def test_sigterm_keeps_the_last_whole_step_and_another_machine_goes_on_from_it(
    undisturbed: bytes, bucket: str, tmp_path: Path
) -> None:
    uri = f"s3://{bucket}/lora/"
    output = open_storage(uri)
    code, log = attempt(uri, tmp_path / "first", until=trained(5), kill=signal.SIGTERM)

    assert code == 143, log[-1]
    finished = event(log, "run_finished")
    assert (finished["outcome"], finished["exit_code"]) == ("interrupted", 143)
    step = event(log, "interrupted_safely")["step"]
    assert step >= 5
    assert finished["problems"] == [f"interrupted: the checkpoint of step {step} is safe; run the same command again"]
    kept = checkpoints(output)
    complete = {folder for folder, names in kept.items() if MANIFEST_NAME in names}
    assert f"step-{step:06d}" in complete
    # the job keeps at most two checkpoints
    assert len(complete) <= 2
    # The signal may have come while one before the last was being sent: it was left for the last one, and counts for nothing.
    assert all(folder < f"step-{step:06d}" for folder in kept.keys() - complete)
    assert len(kept) <= 3
    assert list(output.list("adapters/")) == []

    code, log = attempt(uri, tmp_path / "second")
    assert code == 0, log[-1]
    assert event(log, "resumed")["step"] == step
    assert [line["step"] for line in log if line["event"] == "training_step"] == list(range(step + 1, STEPS + 1))
    assert adapter(output, log) == undisturbed
    assert checkpoints(output) == {}
    folder = f"adapters/A/{event(log, 'run_finished')['run_id']}/"
    lines = output.read_bytes(folder + "train_log.jsonl")
    assert lines is not None
    # the log includes the first attempt's steps
    assert [json.loads(line)["step"] for line in lines.data.splitlines()] == list(range(1, STEPS + 1))


@pytest.mark.slow  # test_chaos.py kills a run at a random moment after its first checkpoint
def test_sigkill_again_and_again_costs_the_steps_since_the_last_checkpoint(undisturbed: bytes, tmp_path: Path) -> None:
    out = tmp_path / "out"
    output = open_storage(f"file://{out}")
    behind = 0
    for number in range(1, 4):
        code, log = attempt(str(out), tmp_path / f"work{number}", until=uploaded(behind + 2), kill=signal.SIGKILL)
        assert code == -signal.SIGKILL
        if behind:
            assert event(log, "resumed")["step"] >= behind
        behind = max(int(folder.removeprefix("step-")) for folder, names in checkpoints(output).items() if MANIFEST_NAME in names)
    code, log = attempt(str(out), tmp_path / "last")
    assert code == 0, log[-1]
    assert event(log, "resumed")["step"] >= behind
    assert adapter(output, log) == undisturbed


def test_a_damaged_checkpoint_is_passed_over_for_the_one_before(undisturbed: bytes, tmp_path: Path) -> None:
    out = tmp_path / "out"
    output = open_storage(f"file://{out}")
    code, log = attempt(str(out), tmp_path / "first", until=uploaded(6), kill=signal.SIGTERM)
    assert code == 143, log[-1]
    newest, before = sorted((path.parent for path in out.glob(f"runs/A/*/checkpoints/step-*/{MANIFEST_NAME}")), reverse=True)
    weights = newest / "adapter.safetensors"
    torn = bytearray(weights.read_bytes())
    torn[-1] ^= 1
    weights.write_bytes(torn)

    code, log = attempt(str(out), tmp_path / "second")
    assert code == 0, log[-1]
    assert newest.name in event(log, "checkpoint_damaged")["where"]
    assert event(log, "resumed")["step"] == int(before.name.removeprefix("step-"))
    assert adapter(output, log) == undisturbed


def test_an_interrupted_evaluation_does_not_cost_the_training_and_fresh_forgets_it(undisturbed: bytes, tmp_path: Path) -> None:
    out = tmp_path / "out"
    output = open_storage(f"file://{out}")
    code, log = attempt(str(out), tmp_path / "work", until=read_back, kill=signal.SIGTERM)
    assert code == 143, log[-1]
    assert event(log, "interrupted_safely")["step"] == STEPS
    assert list(output.list("adapters/")) == []

    # the work folder of the first attempt still exists
    code, log = attempt(str(out), tmp_path / "work", until=read_back, kill=signal.SIGTERM)
    assert code == 143, log[-1]
    assert event(log, "resumed")["step"] == STEPS
    assert not any(line["event"] == "training_step" for line in log)

    code, log = attempt(str(out), tmp_path / "work", "--fresh")
    assert code == 0, log[-1]
    assert not any(line["event"] == "resumed" for line in log)
    assert adapter(output, log) == undisturbed


def test_a_bundle_that_the_output_does_not_take_is_kept_and_published_later(undisturbed: bytes, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    in_the_way = out / "adapters"
    in_the_way.write_text("a file where the folder should be")
    code, log = attempt(str(out), tmp_path / "work")
    # The storage reports a configuration error. The job keeps the bundle whatever the reason.
    assert code == 2, log[-1]
    *_, kept = event(log, "run_finished")["problems"]
    folder = next((tmp_path / "work").glob("runs/A/*/bundle"))
    assert kept.startswith(
        f"{folder}: the finished bundle is kept here; run 'lora-trainer publish {folder}' to finish once the store recovers"
    )

    in_the_way.unlink()
    done = subprocess.run(
        [sys.executable, "-m", "entrypoint", "publish", str(folder)],
        cwd=REPOSITORY, env={**os.environ, "PYTHONPATH": str(REPOSITORY)}, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert adapter(open_storage(f"file://{out}"), log) == undisturbed
    assert not folder.exists()
