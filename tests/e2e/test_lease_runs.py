"""Run two real processes with the same run id at the same time on a real store."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import load_tool
from jobs import left_over, require_training_stack

from lora_trainer.store.interface import Storage
from lora_trainer.store.manifest import verify_files
from lora_trainer.store.opening import open_storage

pytestmark = pytest.mark.e2e
require_training_stack()

chaos: Any = load_tool("chaos", "benchmarks")
Start = Callable[..., Any]


@pytest.fixture
def start(s3_server: Any, bucket: str, tmp_path: Path) -> Iterator[Start]:
    """Return a function that starts the same run with a new work folder, as if on another machine."""
    chaos.make_bucket(s3_server, chaos.Settings(), bucket)
    started: list[Any] = []

    def begin(**settings: object) -> Any:
        command = chaos.Settings(steps=8).command(bucket, tmp_path / f"work{len(started)}", **settings)
        started.append(chaos.Process(command, chaos.environment_for(s3_server, s3_server.endpoint_url)))
        return started[-1]

    yield begin
    for process in started:
        process.send("SIGKILL")


def until(process: Any, event: str, limit_s: float = 300) -> dict[str, Any]:
    deadline_s = time.monotonic() + limit_s
    while time.monotonic() < deadline_s:
        if found := process.event(event):
            line: dict[str, Any] = found
            return line
        time.sleep(0.02)
    pytest.fail(f"{event} never came: {process.log[-3:]} {process.noise}")


def ended(process: Any, limit_s: float = 600) -> int:
    deadline_s = time.monotonic() + limit_s
    while time.monotonic() < deadline_s:
        if (code := process.wait(chaos.threading.Event())) is not None:
            result: int = code
            return result
    pytest.fail(f"did not end: {process.log[-3:]}")


def objects(storage: Storage) -> dict[str, str]:
    return {item.key: item.etag for item in storage.list("")}


def test_the_second_one_waits_and_finds_the_work_done(start: Start, bucket: str) -> None:
    first = start()
    until(first, "checkpoint_uploaded")
    first.send("SIGSTOP")
    second = start()
    waiting = until(second, "lease_waiting")
    assert (waiting["attempt"], waiting["expires_without_renewal_s"]) == (1, 60)
    first.send("SIGCONT")
    assert ended(first) == 0
    assert ended(second) == 0
    assert second.event("already_done")
    assert not second.event("training_step")
    assert left_over(open_storage(f"s3://{bucket}/lora/")) == []


def test_a_paused_one_finds_itself_replaced_and_writes_nothing_more(start: Start, bucket: str) -> None:
    storage = open_storage(f"s3://{bucket}/lora/")
    first = start(lease__duration_s=3)
    until(first, "checkpoint_uploaded")
    first.send("SIGSTOP")
    second = start(lease__duration_s=3)
    assert ended(second) == 0
    assert until(second, "lease_taken")["because"] == "expired"
    # resumed from the first run's checkpoint
    assert until(second, "resumed")["step"] >= 1
    before = objects(storage)

    first.send("SIGCONT")
    assert ended(first) == 6
    assert "has lost its lease: it was deleted" in until(first, "run_finished")["problems"][0]
    assert not first.event("bundle_published")
    assert objects(storage) == before
    assert left_over(storage) == []
    run_id = until(second, "run_finished")["run_id"]
    assert verify_files(storage, f"adapters/A/{run_id}/") == []


def test_a_killed_one_is_not_waited_for_and_a_signal_ends_the_wait(start: Start, bucket: str) -> None:
    first = start()
    until(first, "checkpoint_uploaded")
    first.send("SIGSTOP")
    second = start()
    until(second, "lease_waiting")
    second.send("SIGTERM")
    assert ended(second) == 143

    first.send("SIGKILL")
    assert ended(first) == -signal.SIGKILL
    # the killed run did not release its lease
    assert any(name.endswith("/lease.json") for name in objects(open_storage(f"s3://{bucket}/lora/")))
    third = start()
    assert ended(third) == 0
    taken = until(third, "lease_taken")
    assert (taken["because"], taken["attempt"]) == ("its process is gone", 2)
    assert until(third, "resumed")["step"] >= 1
    assert left_over(open_storage(f"s3://{bucket}/lora/")) == []
