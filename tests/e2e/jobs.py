"""Run the command line in a separate process, with settings that keep a run on the tiny base short."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import REPOSITORY

from lora_trainer.config import GatesConfig
from lora_trainer.store.interface import Storage

Log = list[dict[str, Any]]
Until = Callable[[dict[str, Any]], bool]

BASE = REPOSITORY / "examples" / "tiny-base"
FEW_PROMPTS = REPOSITORY / "tests" / "assets" / "few_prompts.jsonl"
DEMO = ("--config", str(REPOSITORY / "examples" / "demo.yaml"))
# a few steps do not teach a persona
NO_GATES = tuple(argument for name in GatesConfig.model_fields for argument in ("--set", f"gates.{name}=none"))


def few_questions(max_new_tokens: int = 32, intensities: str = "0.2,0.9") -> tuple[str, ...]:
    """Return settings that ask six prompts per intensity, greedily, and limit the length of replies."""
    return (
        "--set", f"evaluation.prompts={FEW_PROMPTS}", "--set", "evaluation.temperature=0",
        "--set", f"evaluation.max_new_tokens={max_new_tokens}", "--set", f"evaluation.intensities={intensities}",
    )  # fmt: skip


# a short demo with enough steps to change every weight, several records per row and several rows per step
SHORT = (*DEMO, "--max-steps", "6", "--set", "memory.micro_batch_tokens=512", *few_questions(), *NO_GATES)


def require_training_stack() -> None:
    """Skip the calling module where the `cpu` extra is not installed."""
    for name in ("torch", "transformers", "trl", "peft", "datasets"):
        pytest.importorskip(name, reason=f"{name} is not installed: pip install '.[cpu]'")


def job(*arguments: str, work_dir: Path, cwd: Path = REPOSITORY, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run `python -m entrypoint` to its end, as the container does."""
    return subprocess.run(
        [sys.executable, "-m", "entrypoint", *arguments, "--work-dir", str(work_dir)],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY), **environment},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def events(done: subprocess.CompletedProcess[str]) -> dict[str, dict[str, Any]]:
    """Return the log's events by name. Fails on a line that is not JSON."""
    lines = [json.loads(line) for line in done.stderr.splitlines()]
    return {line["event"]: line for line in lines}


def left_over(storage: Storage) -> list[str]:
    """Return what runs left in `runs/`, except the counter of starts, which stays."""
    return [item.key for item in storage.list("runs/") if not item.key.endswith("/starts.json")]


def watched_job(*arguments: str, until: Until | None = None, kill: int = signal.SIGTERM) -> tuple[int, list[str], Log]:
    """Run `python -m entrypoint` and send it `kill` at the first event for which `until` is true.

    Return the exit code, the lines of standard output, and the log.
    """
    process = subprocess.Popen(
        [sys.executable, "-m", "entrypoint", *arguments],
        cwd=REPOSITORY,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stderr is not None
    log: Log = []
    for line in process.stderr:
        assert line.startswith("{"), line
        log.append(json.loads(line))
        if until is not None and until(log[-1]):
            process.send_signal(kill)
            until = None
    assert until is None, "the event never came"
    return process.wait(300), process.stdout.read().splitlines(), log
