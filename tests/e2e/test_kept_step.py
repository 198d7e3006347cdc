"""Train the tiny base until it overfits: the step with the lowest held-out loss is published, whatever interrupts the run."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from conftest import REPOSITORY
from jobs import BASE, DEMO, NO_GATES, Log, Until, few_questions, require_training_stack, watched_job

from lora_trainer.config import RunConfig
from lora_trainer.config_sources import settle
from lora_trainer.data.jsonl import JsonlReader
from lora_trainer.data.split import split_held_out
from lora_trainer.errors import DivergedError, Interrupted
from lora_trainer.signals import Interruption
from lora_trainer.train.backends import Backend, open_backend, open_reference_backend
from lora_trainer.train.held_out import HeldOutLoss, HeldOutPlan, lowest
from lora_trainer.train.memory_plan import plan_memory
from lora_trainer.train.step_log import StepLog, TrainingLog
from lora_trainer.train.tokenization import TokenSequence, tokenize

pytestmark = pytest.mark.e2e
require_training_stack()

DATA = REPOSITORY / "data" / "train_data_type_A.jsonl"
RECORDS, HELD_OUT, STEPS = 8, 4, 10
"""Every step repeats the eight records at a high learning rate, so the model soon knows them by heart."""
EVERY_STEP = frozenset(range(1, STEPS + 1))

Interrupt = Callable[[str, int], bool]
"""Whether a signal arrives at this event (`stepped`, before the step is measured, or `measured`) of this step."""


def settings(work_dir: Path, **changes: Any) -> RunConfig:
    return settle(
        {
            "blood_type": "A",
            "device": "cpu",
            "work_dir": str(work_dir),
            "training.quantization": "none",
            "training.compute_dtype": "float32",
            "training.learning_rate": 0.01,
            "training.warmup_fraction": 0,
            # dropout makes the weights depend on the random numbers, which a measurement must leave alone
            "lora.dropout": 0.1,
            "memory.micro_batch_tokens": 512,
            **changes,
        },
        {},
    )


@dataclass(frozen=True, slots=True)
class Ended:
    """What a training process leaves."""

    log: TrainingLog | None
    """None if it was interrupted."""
    weights: dict[str, bytes]
    held_out_loss: float
    """Measured again after the training."""
    checkpoint: Path


def train(
    backend: Backend,
    work_dir: Path,
    *,
    at_steps: frozenset[int] | None = EVERY_STEP,
    keep_best: bool = True,
    early_stopping: int | None = None,
    resume_from: Path | None = None,
    interrupt: Interrupt = lambda event, step: False,
) -> Ended:
    """Train on `backend`. Write a checkpoint after the last step or an interruption."""
    config, checkpoint = backend.config, work_dir / "checkpoint"
    checkpoint.mkdir(parents=True)
    records = [line.record for line in JsonlReader(DATA) if line.record][: RECORDS + HELD_OUT]
    sequences: list[TokenSequence] = tokenize(records, backend.load_tokenizer(BASE))
    longest = max(map(len, sequences))
    plan = plan_memory(config.memory, config.training, backend.shape(BASE), None, longest, backend.name)
    backend.load(BASE, plan, longest)

    def write() -> None:
        if taken := backend.snapshot():
            taken[1](checkpoint)

    def on_step(step: StepLog, of: int) -> None:
        if interrupt("stepped", step.step):
            os.kill(os.getpid(), signal.SIGTERM)

    def on_measured(measured: HeldOutLoss, best: HeldOutLoss) -> None:
        assert best.loss <= measured.loss
        if interrupt("measured", measured.step):
            os.kill(os.getpid(), signal.SIGTERM)

    def after_step(step: int, is_last: bool) -> None:
        if is_last:
            write()

    held_out = None
    if at_steps is not None:
        held_out = HeldOutPlan(sequences[RECORDS:], at_steps, keep_best, early_stopping, on_measured)
    steps = [list(range(RECORDS))] * STEPS
    backend.prepare_training(sequences[:RECORDS], steps, plan, work_dir, on_step, after_step, held_out=held_out)
    if resume_from:
        backend.restore(resume_from)
    try:
        log: TrainingLog | None = backend.train()
    except Interrupted:
        write()
        return Ended(None, {}, 0.0, checkpoint)
    weights = {name: weight.detach().numpy().tobytes() for name, weight in backend.model.named_parameters() if weight.requires_grad}
    return Ended(log, weights, backend.mean_loss(sequences[RECORDS:]), checkpoint)


def started(work_dir: Path, **changes: Any) -> Backend:
    """Start a backend as a process of its own does."""
    interruption = Interruption()
    interruption.install()
    backend = open_backend(settings(work_dir, **changes), interruption)
    backend.start()
    return backend


@pytest.fixture(scope="module", autouse=True)
def _own_signal_handlers() -> Iterator[None]:
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Ended:
    folder = tmp_path_factory.mktemp("undisturbed")
    return train(started(folder), folder)


def measured(ended: Ended) -> list[HeldOutLoss]:
    assert ended.log is not None
    return ended.log.held_out


def test_training_ends_with_the_weights_of_the_best_step(undisturbed: Ended) -> None:
    losses = measured(undisturbed)
    assert [loss.step for loss in losses] == sorted(EVERY_STEP)
    best = lowest(losses)
    assert 1 < best.step < STEPS - 2, losses
    assert best.loss < losses[-1].loss - 0.1, losses
    assert undisturbed.held_out_loss == best.loss
    assert undisturbed.log is not None
    assert len(undisturbed.log.steps) == STEPS


def test_measuring_leaves_the_last_step_as_it_is_without(undisturbed: Ended, tmp_path: Path) -> None:
    last = train(started(tmp_path), tmp_path / "last", keep_best=False)
    unmeasured = train(started(tmp_path), tmp_path / "unmeasured", at_steps=None)
    assert last.weights == unmeasured.weights != undisturbed.weights
    assert measured(last) == measured(undisturbed)
    assert measured(unmeasured) == []
    assert last.held_out_loss == measured(last)[-1].loss


@pytest.mark.parametrize(("event", "after_best"), [("measured", -1), ("stepped", 0), ("measured", 3), ("stepped", STEPS)])
def test_an_interrupted_run_ends_with_the_same_bytes(event: str, after_best: int, undisturbed: Ended, tmp_path: Path) -> None:
    at = min(lowest(measured(undisturbed)).step + after_best, STEPS)
    first = train(started(tmp_path), tmp_path / "first", interrupt=lambda *now: now == (event, at))
    assert first.log is None
    state = json.loads((first.checkpoint / "state.json").read_text())
    assert state["step"] == at
    # a signal before the measurement leaves it to the next process
    assert [loss["step"] for loss in state["held_out"]] == list(range(1, at + (event == "measured")))

    second = train(started(tmp_path), tmp_path / "second", resume_from=first.checkpoint)
    assert second.weights == undisturbed.weights
    assert measured(second) == measured(undisturbed)
    assert second.held_out_loss == undisturbed.held_out_loss


def test_early_stopping(undisturbed: Ended, tmp_path: Path) -> None:
    best = lowest(measured(undisturbed))
    stopped = train(started(tmp_path), tmp_path / "stopped", early_stopping=3)
    assert [loss.step for loss in measured(stopped)] == list(range(1, best.step + 4))
    assert stopped.weights == undisturbed.weights
    # the checkpoint of the last step is written, and nothing is trained after it
    again = train(started(tmp_path), tmp_path / "again", early_stopping=3, resume_from=stopped.checkpoint)
    assert again.weights == undisturbed.weights
    assert measured(again) == measured(stopped)


def test_the_next_persona_starts_without_the_best_weights_of_the_one_before(undisturbed: Ended, tmp_path: Path) -> None:
    backend = started(tmp_path)
    train(backend, tmp_path / "first", at_steps=frozenset({1, STEPS}))
    assert train(backend, tmp_path / "second").weights == undisturbed.weights


def test_a_held_out_loss_that_is_no_number_is_divergence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from lora_trainer.train.backends import step_trainer

    monkeypatch.setattr(step_trainer.StepTrainer, "mean_loss", lambda *_: float("nan"))
    with pytest.raises(DivergedError, match=r"held-out loss after step 1 of 10 is nan; lower training\.learning_rate"):
        train(started(tmp_path), tmp_path / "diverged")


# --- the whole job -------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Published:
    """A published bundle and the log of the process that published it."""

    log: Log
    folder: Path

    def event(self, name: str) -> dict[str, Any]:
        return next(line for line in reversed(self.log) if line["event"] == name)

    @property
    def metrics(self) -> dict[str, Any]:
        metrics: dict[str, Any] = json.loads((self.folder / "metrics.json").read_text())
        return metrics

    @property
    def weights(self) -> bytes:
        return (self.folder / "adapter_model.safetensors").read_bytes()


@pytest.fixture(scope="module")
def few_records(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("data") / DATA.name
    file.write_text("".join(DATA.read_text(encoding="utf-8").splitlines(keepends=True)[:24]), encoding="utf-8")
    return file


def run(data: Path, folder: Path, work: str = "work", until: Until | None = None, kill: int = signal.SIGTERM) -> tuple[int, Log]:
    code, _, log = watched_job(
        "run", *DEMO, "--blood-type", "A", "--data", str(data), "--output", str(folder / "out"), "--work-dir", str(folder / work),
        "--log-format", "json", "--learning-rate", "0.01", "--set", "training.epochs=8", "--set", "training.held_out_fraction=0.3",
        "--set", "lora.dropout=0.1", "--set", "training.keep=best", "--set", "checkpoints.every_steps=1",
        *few_questions(8, "0.5"), *NO_GATES, until=until, kill=kill,
    )  # fmt: skip
    return code, log


def bundle(folder: Path, log: Log) -> Published:
    return Published(log, folder / "out" / "adapters" / "A" / str(log[-1]["run_id"]))


@pytest.fixture(scope="module")
def overfitted(few_records: Path, tmp_path_factory: pytest.TempPathFactory) -> Published:
    folder = tmp_path_factory.mktemp("overfitted")
    code, log = run(few_records, folder)
    assert code == 0, log[-1]
    return bundle(folder, log)


def test_an_adapter_that_overfits_in_the_end_is_published_as_it_was_before(
    overfitted: Published, few_records: Path, tmp_path: Path
) -> None:
    training, held_out = overfitted.metrics["training"], overfitted.metrics["held_out"]
    losses = {measured["step"]: measured["loss"] for measured in training["held_out_losses"]}
    kept = training["kept_step"]
    assert training["steps"] == training["planned_steps"] == max(losses)
    assert losses[kept] == min(losses.values()) == held_out["loss_adapter"]
    assert kept < training["steps"] - 3
    assert losses[training["steps"]] > losses[kept] + 0.1

    finished = overfitted.event("training_finished")
    assert (finished["kept_step"], finished["steps"]) == (kept, training["steps"])
    assert finished["held_out_loss_adapter"] == round(losses[kept], 4)
    assert [line["step"] for line in overfitted.log if line["event"] == "held_out_measured"] == list(losses)
    assert f"kept: step {kept}" in (overfitted.folder / "report.html").read_text(encoding="utf-8")
    assert f"weights of step {kept}" in (overfitted.folder / "README.md").read_text(encoding="utf-8")

    # load the published files as a server does, and measure their loss
    backend = open_reference_backend(settings(tmp_path))
    backend.start()
    records = [line.record for line in JsonlReader(few_records) if line.record]
    sequences = tokenize(records, backend.load_tokenizer(BASE))
    backend.load_adapter(BASE, overfitted.folder)
    measured = backend.mean_loss([sequences[index] for index in split_held_out(records, 0.3)[1]])
    assert measured == pytest.approx(losses[kept], abs=1e-4)


@pytest.mark.slow  # test_an_interrupted_run_ends_with_the_same_bytes covers it without the job around it
def test_a_job_that_is_interrupted_after_the_best_step_publishes_the_same_bytes(
    overfitted: Published, few_records: Path, tmp_path: Path
) -> None:
    kept = overfitted.metrics["training"]["kept_step"]
    code, log = run(few_records, tmp_path, "first", lambda line: line["event"] == "held_out_measured" and line["step"] > kept)
    assert code == 143, log[-1]
    (progress,) = (tmp_path / "first").glob("runs/A/*/progress.json")
    assert json.loads(progress.read_text())["best_step"] == kept

    # each attempt runs on another machine
    begun = next(line["step"] for line in log if line["event"] == "interrupted_safely")

    def uploaded(line: dict[str, Any]) -> bool:
        return bool(line["event"] == "checkpoint_uploaded" and line["step"] > begun)

    code, log = run(few_records, tmp_path, "second", uploaded, signal.SIGKILL)
    assert code == -signal.SIGKILL
    assert next(line["step"] for line in log if line["event"] == "resumed") == begun > kept

    code, log = run(few_records, tmp_path, "third")
    assert code == 0, log[-1]
    again = bundle(tmp_path, log)
    assert again.event("resumed")["step"] > begun
    assert again.weights == overfitted.weights
    assert again.metrics["training"]["held_out_losses"] == overfitted.metrics["training"]["held_out_losses"]
