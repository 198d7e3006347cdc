"""Run a short `benchmarks/chaos.py`: kill runs at random moments while a fifth of all S3 requests fail."""

from __future__ import annotations

import random
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from conftest import load_tool
from jobs import require_training_stack

pytestmark = pytest.mark.e2e
require_training_stack()

chaos: Any = load_tool("chaos", "benchmarks")


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Any]:
    """Start an S3 server without buckets, because `chaos` chooses its own bucket names."""
    dev_s3 = load_tool("dev_s3")
    if missing := dev_s3.why_not():
        pytest.skip(missing)
    with dev_s3.serve(tmp_path / "s3") as started:
        yield started


@pytest.mark.parametrize("runs", [1, pytest.param(8, marks=pytest.mark.slow)])
def test_what_is_killed_again_and_again_ends_as_if_nothing_was(server: Any, tmp_path: Path, runs: int) -> None:
    settings = chaos.Settings(steps=6, every_steps=1)
    stop = threading.Event()
    reference = chaos.undisturbed(server, settings, tmp_path, stop)
    draw = random.Random()

    def one(number: int) -> dict[str, Any]:
        # Kill the first process once it has a checkpoint to resume from, early enough even if the machine has become faster
        # since the undisturbed run. Kill the second one at any moment.
        kills = [chaos.Kill("SIGKILL", "resumable", draw.uniform(0, 0.2)), chaos.Kill("SIGTERM", "any", draw.uniform(0.2, 1.2))]
        run: dict[str, Any] = chaos.run_one(server, settings, number, reference, tmp_path, stop, kills)
        return run

    with ThreadPoolExecutor(2) as pool:
        done = list(pool.map(one, range(1, runs + 1)))
    for run in done:
        assert run["wrong"] == [], run
        assert run["attempts"][0]["killed_by"] == "SIGKILL", run
        assert run["looks"] > 5
        assert run["manifests_seen"] > 0
    assert sum(sum(run["faults"].values()) for run in done) > 5 * runs
    summary = chaos.summarise(settings, [{**run, "revision": ""} for run in done], reference, "")
    assert (summary["runs"], summary["good"], summary["kills"]["SIGKILL"]) == (runs, runs, runs)
