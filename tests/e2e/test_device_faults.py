"""Test GPU faults during a run: out of memory, a lost device, a NaN loss.

No GPU is needed: the tests raise torch's own exception in the forward pass, where a driver's error would surface. Everything
else is the real job.

"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from conftest import REPOSITORY
from jobs import DEMO, NO_GATES, few_questions, require_training_stack

pytestmark = pytest.mark.e2e
require_training_stack()

STEPS = 6

JOB = """
import os, signal, sys
import torch
from entrypoint.__main__ import main
from lora_trainer.run import pipeline
from lora_trainer.train.backends import base_loading
from lora_trainer.train.backends.step_trainer import StepTrainer

fault, true_step = os.environ.get("FAULT"), StepTrainer.training_step

def training_step(self, model, inputs, num_items_in_batch=None):
    longest = max(row["input_ids"].shape[1] for row in inputs.rows)
    if fault == "memory" and not (self.is_gradient_checkpointing_on() and longest <= 256):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
    if fault == "nan" and self.state.global_step == 4:
        next(weight for weight in model.parameters() if weight.requires_grad).data.fill_(float("nan"))
    loss = true_step(self, model, inputs, num_items_in_batch)
    if fault == "lost" and self.state.global_step == 4:
        raise torch.AcceleratorError("CUDA error: unspecified launch failure")
    return loss

StepTrainer.is_gradient_checkpointing_on = lambda self: any(
    getattr(module, "gradient_checkpointing", False) for module in self.model.modules()
)
def no_room(*_, **__):
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

def swallow(*_):
    try:
        os.kill(os.getpid(), signal.SIGTERM)
    except BaseException as error:
        # as an import that C code asks for does
        raise ImportError("numpy failed to import") from error

StepTrainer.training_step = training_step
if fault == "swallowed":
    pipeline.save = swallow
if fault == "base":
    base_loading.load_base = no_room
main()
"""


def run(folder: Path, *more: str, fault: str = "") -> tuple[int, list[dict[str, Any]]]:
    """Run the job on a faulty device. Return its exit code and log."""
    (folder / "job.py").write_text(JOB)
    command = [
        sys.executable, str(folder / "job.py"), "run", *DEMO, "--blood-type", "A",
        "--data", str(REPOSITORY / "data"), "--output", str(folder / "out"), "--work-dir", str(folder / "work"),
        "--max-steps", str(STEPS), "--sequences-per-step", "24", "--log-format", "json", "--set", "checkpoints.every_steps=2",
        *few_questions(16, "0.5"), *NO_GATES, *more,
    ]  # fmt: skip
    done = subprocess.run(
        command,
        cwd=REPOSITORY,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY), "FAULT": fault},
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
    )
    return done.returncode, [json.loads(line) for line in done.stderr.splitlines()]


def events(log: list[dict[str, Any]], name: str) -> list[dict[str, Any]]:
    return [line for line in log if line["event"] == name]


def test_memory_that_runs_out_steps_the_plan_down_and_the_optimizer_batch_stays(tmp_path: Path) -> None:
    code, log = run(tmp_path, fault="memory")
    assert code == 0, log[-1]
    plans = [(plan["gradient_checkpointing"], plan["micro_batch_tokens"]) for plan in events(log, "plan_chosen")]
    assert plans == [("off", 512), ("on", 512), ("on", 256)]
    assert len(events(log, "memory_stepped_down")) == 2
    assert all("ran out" in line["problem"] for line in events(log, "memory_stepped_down"))
    # The three attempts look like one job: one run id, one final line.
    assert len(events(log, "run_finished")) == 1
    assert len({line["run_id"] for line in events(log, "run_identified")}) == 1
    assert events(log, "training_finished")[0]["steps"] == STEPS


def test_a_base_that_does_not_fit_is_said_at_once(tmp_path: Path) -> None:
    code, log = run(tmp_path, fault="base")
    assert code == 5, log[-1]
    # A smaller plan would not help.
    assert not events(log, "memory_stepped_down")
    (problem,) = log[-1]["problems"]
    assert "while the base was loaded" in problem


def test_what_was_set_by_hand_is_not_stepped_down(tmp_path: Path) -> None:
    by_hand = ("--set", "memory.gradient_checkpointing=off", "--set", "memory.micro_batch_tokens=2048")
    code, log = run(tmp_path, *by_hand, fault="memory")
    assert code == 5
    assert not events(log, "memory_stepped_down")
    (problem,) = log[-1]["problems"]
    assert "memory.micro_batch_tokens" in problem
    assert "2048 tokens" in problem


@pytest.mark.parametrize(
    ("fault", "code", "said"),
    [
        ("lost", 1, "the device failed"),
        # slow, because test_run.py also covers a run that diverges
        pytest.param("nan", 7, "training diverged at step 5", marks=pytest.mark.slow),
    ],
)
def test_the_last_good_checkpoint_is_named_and_gone_on_from(tmp_path: Path, fault: str, code: int, said: str) -> None:
    found, log = run(tmp_path, fault=fault)
    assert found == code, log[-1]
    problem, kept = log[-1]["problems"]
    assert said in problem
    assert "of step 4, is kept" in kept
    assert (Path(kept.split("file://")[-1].split(": ")[-1]) / "manifest.json").is_file()
    assert "frames" not in log[-1]

    found, log = run(tmp_path)
    assert found == 0, log[-1]
    assert events(log, "resumed")[0]["step"] == 4


def test_a_signal_that_a_library_makes_another_error_of_is_an_interruption_all_the_same(tmp_path: Path) -> None:
    code, log = run(tmp_path, fault="swallowed")
    assert code == 143, log[-1]
    assert log[-1]["outcome"] == "interrupted"
    assert f"the checkpoint of step {STEPS} is safe" in log[-1]["problems"][0]
