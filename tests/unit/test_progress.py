"""Test `progress.json` and the progress bar."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from structlog.testing import capture_logs

from lora_trainer.run import progress
from lora_trainer.run.progress import RunProgress
from lora_trainer.train.step_log import StepLog


def log(step: int, loss: float = 1.23456, step_s: float = 0.5) -> StepLog:
    return StepLog(step, loss, 1e-4, 0.7, tokens=1000, loss_tokens=300, rows=2, step_s=step_s)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "runs" / "A" / "0123" / "progress.json"


def read(path: Path) -> dict[str, Any]:
    state: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    assert state.pop("updated_unix_s") > 1.7e9
    assert [file.name for file in path.parent.iterdir()] == ["progress.json"]
    return state


def test_stages_before_training(path: Path) -> None:
    run = RunProgress(path, "0123", "A", None)
    assert not path.exists()
    run.stage("load")
    assert read(path) == {"run_id": "0123", "blood_type": "A", "stage": "load", "step": 0, "of": None}


def test_steps_are_told_while_they_come(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "WRITE_EVERY_S", 0.0)
    run = RunProgress(path, "0123", "A", None)
    with run.training(4):
        assert (read(path)["stage"], read(path)["of"]) == ("train", 4)
        for step in (1, 2, 3):
            run.step(log(step), 4)
            state = read(path)
            assert (state["step"], state["of"], state["loss"], state["tokens_per_s"]) == (step, 4, 1.2346, 2000.0)
            assert state["eta_s"] >= 0
        run.step(log(4, step_s=0.0), 4)
    assert (read(path)["eta_s"], read(path)["tokens_per_s"]) == (0.0, 0.0)
    run.stage("publish")
    assert (read(path)["stage"], read(path)["step"]) == ("publish", 4)


def test_not_every_step_is_a_write_but_the_last_one_is(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "WRITE_EVERY_S", 3600.0)
    run = RunProgress(path, "0123", "A", None)
    with run.training(3):
        run.step(log(1), 3)
        run.step(log(2), 3)
        assert read(path)["step"] == 0
        run.step(log(3), 3)
        assert read(path)["step"] == 3


def test_a_bar_on_a_terminal_only(path: Path) -> None:
    for terminal in (True, False):
        stream = io.StringIO()
        run = RunProgress(path, "0123", "A", Console(file=stream, force_terminal=terminal, width=100))
        with run.training(2):
            run.step(log(1), 2)
            run.step(log(2), 2)
        assert ("2/2" in stream.getvalue()) is terminal
        assert ("loss 1.235  2,000 tok/s" in stream.getvalue()) is terminal


def reply_in_fours(run: RunProgress, batches: int) -> None:
    for _ in range(batches):
        run.replied(4, model="adapter", decoding="greedy")


def test_replies_are_told_while_they_come(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "WRITE_EVERY_S", 0.0)
    monkeypatch.setattr(progress, "LOG_EVERY_S", 0.0)
    run = RunProgress(path, "0123", "A", None)
    with run.training(2):
        run.step(log(1), 2)
        run.step(log(2), 2)
    with capture_logs() as events, run.evaluating(12):
        assert read(path) == {"run_id": "0123", "blood_type": "A", "stage": "evaluate", "step": 0, "of": 12}
        reply_in_fours(run, 3)
    assert (read(path)["step"], read(path)["of"], read(path)["eta_s"]) == (12, 12, 0.0)
    assert [(event["event"], event["replies"], event["of"]) for event in events] == [
        ("evaluation_progress", number, 12) for number in (4, 8, 12)
    ]
    assert all((event["model"], event["decoding"], event["eta_s"] >= 0) == ("adapter", "greedy", True) for event in events)


def test_the_time_left_follows_from_the_replies_so_far(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "WRITE_EVERY_S", 0.0)
    now_s = [100.0]
    monkeypatch.setattr("lora_trainer.run.progress.time.monotonic", lambda: now_s[0])
    run = RunProgress(path, "0123", "A", None)
    with run.evaluating(1920):
        now_s[0] += 30
        run.replied(480, model="adapter", decoding="greedy")
        assert read(path)["eta_s"] == 90.0


def test_not_every_batch_is_a_line(path: Path) -> None:
    run = RunProgress(path, "0123", "A", None)
    with capture_logs() as events, run.evaluating(400):
        reply_in_fours(run, 100)
    # all of them within the first ten seconds, so only the end is told
    assert [(event["replies"], event["of"], event["eta_s"]) for event in events] == [(400, 400, 0.0)]


def test_a_bar_for_replies_on_a_terminal_only(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "LOG_EVERY_S", 0.0)
    for terminal in (True, False):
        stream = io.StringIO()
        run = RunProgress(path, "0123", "A", Console(file=stream, force_terminal=terminal, width=100))
        # the bar of the training must not come back
        with run.training(3):
            run.step(log(1), 3)
            run.step(log(2), 3)
        before = len(stream.getvalue())
        with capture_logs() as events, run.evaluating(8):
            reply_in_fours(run, 2)
        drawn = stream.getvalue()[before:]
        assert ("8/8" in drawn and "adapter, greedy" in drawn) is terminal
        assert "2/3" not in drawn
        assert bool(events) is not terminal


def test_a_failure_in_training_passes_through(path: Path) -> None:
    run = RunProgress(path, "0123", "A", Console(file=io.StringIO(), force_terminal=True))
    with pytest.raises(KeyError, match="x"), run.training(2):
        raise KeyError("x")
    assert read(path)["stage"] == "train"
