"""Train with every tracker and read the records back with the tracker's own library."""

from __future__ import annotations

import json
import os
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import structlog
from conftest import REPOSITORY
from jobs import BASE, require_training_stack

from lora_trainer.config_sources import settle
from lora_trainer.data.jsonl import JsonlReader
from lora_trainer.data.records import TrainingRecord
from lora_trainer.errors import ConfigError, Interrupted
from lora_trainer.train.backends import open_backend
from lora_trainer.train.held_out import HeldOutPlan
from lora_trainer.train.memory_plan import plan_memory
from lora_trainer.train.step_log import OnStep, StepLog, TrainingLog
from lora_trainer.train.tokenization import tokenize

pytestmark = pytest.mark.e2e
require_training_stack()
for needed in ("tensorboard", "mlflow", "sqlalchemy", "alembic", "wandb"):
    pytest.importorskip(needed, reason=f"{needed} is not installed: pip install '.[trackers]'")

STEPS = 3
RECORDS_PER_STEP = 4
SECRET = "0123456789abcdef" * 2 + "5ec2e700"
"""As long as a W&B key."""
TRACKERS = "tensorboard,mlflow,wandb"


def records(blood_type: str) -> list[TrainingRecord]:
    data = REPOSITORY / "data" / f"train_data_type_{blood_type}.jsonl"
    return [line.record for line in JsonlReader(data) if line.record][: STEPS * RECORDS_PER_STEP]


def train(run_dir: Path, blood_type: str, report_to: str, on_step: OnStep = lambda step, of: None) -> TrainingLog:
    """Train the tiny base for three steps, without the other phases of a run."""
    config = settle(
        {
            "blood_type": blood_type,
            "device": "cpu",
            "work_dir": str(run_dir),
            "training.quantization": "none",
            "training.compute_dtype": "float32",
            "training.learning_rate": 0.002,
            "training.warmup_fraction": 0,
            "logging.report_to": report_to,
        },
        {},
    )
    backend = open_backend(config)
    backend.start()
    sequences = tokenize(records(blood_type), backend.load_tokenizer(BASE))
    longest = max(map(len, sequences))
    plan = plan_memory(config.memory, config.training, backend.shape(BASE), None, longest, backend.name)
    backend.load(BASE, plan, longest)
    steps = [list(range(step * RECORDS_PER_STEP, (step + 1) * RECORDS_PER_STEP)) for step in range(STEPS)]
    held_out = HeldOutPlan(sequences[:2], frozenset({STEPS}), keep_best=True, early_stopping=None, on_measured=lambda *_: None)
    backend.prepare_training(sequences, steps, plan, run_dir, on_step, held_out=held_out)
    return backend.train()


@contextmanager
def listener() -> Iterator[tuple[int, list[object]]]:
    """Listen on loopback. Yield the port and the list of callers."""
    callers: list[object] = []
    with socket.create_server(("127.0.0.1", 0)) as server:

        def answer() -> None:
            while True:
                try:
                    connection, address = server.accept()
                except OSError:
                    return
                callers.append(address)
                connection.close()

        threading.Thread(target=answer, daemon=True).start()
        yield server.getsockname()[1], callers


def own_environment(patch: pytest.MonkeyPatch, home: Path) -> None:
    """Remove the machine's tracker settings and set a W&B key."""
    for variable in os.environ:
        if variable.startswith(("WANDB_", "MLFLOW_", "TENSORBOARD_", "HF_MLFLOW_")) or variable.lower().endswith("_proxy"):
            patch.delenv(variable)
    patch.setenv("HOME", str(home))
    patch.setenv("WANDB_API_KEY", SECRET)
    patch.setenv("HF_TOKEN", f"hf_{SECRET}")
    # Turn off TRL's telemetry, which is unrelated to trackers.
    patch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_TELEMETRY", True)


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> pytest.MonkeyPatch:
    own_environment(monkeypatch, tmp_path / "home")
    return monkeypatch


@dataclass(frozen=True, slots=True)
class Tracked:
    """Two personas trained in one process with all trackers."""

    folders: dict[str, Path]
    logs: dict[str, TrainingLog]
    cwd: Path
    home: Path
    environment_before: dict[str, str]
    environment_after: dict[str, str]
    callers: list[object]


@pytest.fixture(scope="module")
def tracked(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Tracked]:
    cwd, home = tmp_path_factory.mktemp("cwd"), tmp_path_factory.mktemp("home")
    with pytest.MonkeyPatch.context() as patch, listener() as (port, callers):
        own_environment(patch, home)
        patch.chdir(cwd)
        # Send all traffic, including that of W&B's service process, to the listener.
        for variable in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "http_proxy", "https_proxy", "WANDB_BASE_URL"):
            patch.setenv(variable, f"http://127.0.0.1:{port}")
        for variable in ("NO_PROXY", "no_proxy"):
            patch.setenv(variable, "")
        before = dict(os.environ)
        folders = {blood_type: cwd / "work" / f"run-of-{blood_type}" for blood_type in ("A", "B")}
        logs = {blood_type: train(folder, blood_type, TRACKERS) for blood_type, folder in folders.items()}
        yield Tracked(folders, logs, cwd, home, before, dict(os.environ), callers)


def expected(log: TrainingLog) -> dict[str, list[tuple[int, float]]]:
    """Return the numbers that a tracker should have recorded, by name."""
    return {
        "loss": [(step.step, step.loss) for step in log.steps],
        "eval_loss": [(measured.step, measured.loss) for measured in log.held_out],
        "grad_norm": [(step.step, step.grad_norm) for step in log.steps],
        "learning_rate": [(step.step, step.learning_rate) for step in log.steps],
        "tokens_per_s": [(step.step, step.tokens / step.step_s) for step in log.steps],
    }


def tensorboard_numbers(folder: Path) -> dict[str, list[tuple[int, float]]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder))
    events.Reload()
    return {
        name.removeprefix("train/").replace("eval/", "eval_"): [(event.step, event.value) for event in events.Scalars(name)]
        for name in events.Tags()["scalars"]
    }


def mlflow_runs(store: str) -> list[Any]:
    from mlflow.tracking import MlflowClient

    client = MlflowClient(store)
    return list(client.search_runs([experiment.experiment_id for experiment in client.search_experiments()]))


def wandb_records(path: Path) -> list[Any]:
    """Read a `.wandb` file: a header of seven bytes, then LevelDB's log format with one `Record` per entry.

    https://github.com/google/leveldb/blob/main/doc/log_format.md

    """
    from wandb.proto import wandb_internal_pb2

    data, block, position = path.read_bytes(), 32768, 7
    assert data[:4] == b":W&B"
    found, entry = [], b""
    while position + 7 <= len(data):
        left = block - position % block
        length, kind = int.from_bytes(data[position + 4 : position + 6], "little"), data[position + 6]
        if left < 7 or kind == 0:
            position += left
            continue
        entry += data[position + 7 : position + 7 + length]
        position += 7 + length
        # a complete entry, or its last fragment
        if kind in (1, 4):
            record = wandb_internal_pb2.Record()
            record.ParseFromString(entry)
            found.append(record)
            entry = b""
    return found


def wandb_file(folder: Path) -> Path:
    (path,) = folder.glob("wandb/offline-run-*/run-*.wandb")
    return path


@pytest.mark.parametrize("blood_type", ["A", "B"])
def test_tensorboard(tracked: Tracked, blood_type: str) -> None:
    folder = tracked.folders[blood_type] / "trackers" / "tensorboard"
    assert len(list(folder.iterdir())) == 1
    numbers = tensorboard_numbers(folder)
    wanted = expected(tracked.logs[blood_type])
    assert numbers.keys() == wanted.keys()
    for name, values in wanted.items():
        # TensorBoard stores numbers in single precision
        assert numbers[name] == [(step, pytest.approx(value, rel=1e-6)) for step, value in values]


@pytest.mark.parametrize("blood_type", ["A", "B"])
def test_mlflow(tracked: Tracked, blood_type: str) -> None:
    from mlflow.tracking import MlflowClient

    store = f"sqlite:///{tracked.folders[blood_type]}/trackers/mlflow/mlflow.db"
    (run,) = mlflow_runs(store)
    assert run.info.run_name == f"{blood_type}-run-of-{blood_type}"
    assert run.info.status == "FINISHED"
    assert run.info.artifact_uri.startswith((tracked.folders[blood_type] / "trackers" / "mlflow").as_uri())
    wanted = expected(tracked.logs[blood_type])
    assert run.data.metrics.keys() == wanted.keys()
    client = MlflowClient(store)
    for name, values in wanted.items():
        assert [(metric.step, metric.value) for metric in client.get_metric_history(run.info.run_id, name)] == values
    assert run.data.params["learning_rate"] == "0.002"
    assert run.data.params["lr_scheduler_type"] == "cosine"


@pytest.mark.parametrize("blood_type", ["A", "B"])
def test_wandb(tracked: Tracked, blood_type: str) -> None:
    found = wandb_records(wandb_file(tracked.folders[blood_type] / "trackers" / "wandb"))
    (run,) = [record.run for record in found if record.WhichOneof("record_type") == "run"]
    assert (run.display_name, run.project) == (f"{blood_type}-run-of-{blood_type}", "lora-trainer")
    assert not run.git.remote_url
    (end,) = [record.exit for record in found if record.WhichOneof("record_type") == "exit"]
    assert end.exit_code == 0
    rows = []
    for record in found:
        if record.WhichOneof("record_type") == "history":
            rows.append({item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in record.history.item})
    for name, values in expected(tracked.logs[blood_type]).items():
        key = "eval/loss" if name == "eval_loss" else f"train/{name}"
        assert [(row["train/global_step"], row[key]) for row in rows if key in row] == values
    kinds = {record.WhichOneof("record_type") for record in found}
    assert not kinds & {"output", "output_raw", "files", "stats", "artifact", "environment"}


def test_each_run_has_its_own_folder_and_nothing_lies_elsewhere(tracked: Tracked) -> None:
    for folder in tracked.folders.values():
        assert {path.name for path in (folder / "trackers").iterdir()} == {"tensorboard", "mlflow", "wandb"}
    assert {path.name for path in tracked.cwd.iterdir()} == {"work"}
    assert not list(tracked.home.iterdir())


def test_nothing_was_sent(tracked: Tracked) -> None:
    assert tracked.callers == []


def test_what_they_wrote_holds_no_secret_and_no_text(tracked: Tracked) -> None:
    for blood_type, folder in tracked.folders.items():
        texts = {SECRET}
        for record in records(blood_type):
            texts |= {record.instruction, record.input, record.reply.text}
        needles = [form for text in texts for form in (text.encode(), json.dumps(text)[1:-1].encode())]
        for path in (folder / "trackers").rglob("*"):
            if path.is_file():
                content = path.read_bytes()
                assert not [needle for needle in needles if needle in content], path


def test_environment_is_left_as_it_was_but_for_two_switches(tracked: Tracked) -> None:
    changed = dict(tracked.environment_after.items() - tracked.environment_before.items())
    ours = {name: value for name, value in changed.items() if name.startswith(("MLFLOW", "WANDB", "TENSORBOARD", "GIT"))}
    assert ours == {"MLFLOW_DISABLE_TELEMETRY": "true", "WANDB_ERROR_REPORTING": "false", "GIT_PYTHON_REFRESH": "quiet"}
    assert not tracked.environment_before.keys() - tracked.environment_after.keys()


def test_no_process_of_theirs_is_left(tracked: Tracked) -> None:
    children = Path(f"/proc/{os.getpid()}/task").glob("*/children")
    names = [Path(f"/proc/{child}/comm").read_text() for path in children for child in path.read_text().split()]
    assert not [name for name in names if "wandb" in name]


def test_without_a_tracker_a_step_is_still_reported_one_late(
    tracked: Tracked, environment: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Training without trackers produces the same numbers."""
    from lora_trainer.train.backends import step_trainer

    reported: list[tuple[int, int]] = []
    at = 0
    true_end = step_trainer.StepTrainer.end_step

    def end_step(self: Any, number: int) -> None:
        nonlocal at
        at = number
        true_end(self, number)

    environment.setattr(step_trainer.StepTrainer, "end_step", end_step)
    log = train(tmp_path / "run", "A", "none", lambda step, of: reported.append((step.step, at)))
    assert reported == [(1, 2), (2, 3), (3, 3)]
    assert not (tmp_path / "run" / "trackers").exists()
    plain = [(step.loss, step.grad_norm, step.learning_rate) for step in log.steps]
    assert plain == [(step.loss, step.grad_norm, step.learning_rate) for step in tracked.logs["A"].steps]


def test_a_run_that_is_interrupted_is_closed_and_can_begin_again(environment: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Here the trackers write to the locations that the user's variables name."""
    import mlflow

    store = f"sqlite:///{tmp_path}/users.db"
    environment.setenv("MLFLOW_TRACKING_URI", store)
    environment.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "users"))
    environment.setenv("WANDB_DIR", str(tmp_path))
    environment.chdir(tmp_path)

    def stop(step: StepLog, of: int) -> None:
        if step.step == 2:
            raise Interrupted("SIGTERM")

    with pytest.raises(Interrupted):
        train(tmp_path / "run", "A", TRACKERS, stop)
    assert mlflow.active_run() is None
    assert os.environ["MLFLOW_TRACKING_URI"] == store
    log = train(tmp_path / "run", "A", TRACKERS)
    assert sorted(run.info.status for run in mlflow_runs(store)) == ["FINISHED", "KILLED"]
    # TensorBoard hides the first attempt's step
    numbers = tensorboard_numbers(tmp_path / "users" / "A-run")
    assert numbers["loss"] == [(step, pytest.approx(value, rel=1e-6)) for step, value in expected(log)["loss"]]
    assert not list((tmp_path / "run" / "trackers").rglob("*.db"))
    files = sorted(tmp_path.glob("wandb/offline-run-*/run-*.wandb"))
    ends = [record.exit.exit_code for file in files for record in wandb_records(file) if record.WhichOneof("record_type") == "exit"]
    assert sorted(ends) == [0, 1]


def test_online_without_a_key_is_a_mistake_of_the_settings(environment: pytest.MonkeyPatch, tmp_path: Path) -> None:
    environment.setenv("WANDB_MODE", "online")
    environment.delenv("WANDB_API_KEY")
    with pytest.raises(ConfigError, match="report_to: wandb: No API key"):
        train(tmp_path / "run", "A", "wandb")


def test_a_server_that_is_down_costs_the_record_and_not_the_run(environment: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    environment.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{port}")
    environment.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with structlog.testing.capture_logs() as said:
        log = train(tmp_path / "run", "A", "mlflow")
    assert len(log.steps) == STEPS
    assert [(event["event"], event["tracker"]) for event in said if event["log_level"] == "warning"] == [
        ("tracker_unavailable", "mlflow")
    ]


def test_a_store_that_is_lost_during_training_costs_the_record_and_not_the_run(
    environment: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    import sqlite3

    database = tmp_path / "users.db"
    environment.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{database}")

    def lose(step: StepLog, of: int) -> None:
        if step.step == 2:
            with sqlite3.connect(database) as connection:
                # a migration of the server, or somebody's clean-up
                connection.executescript(
                    "PRAGMA foreign_keys = OFF; DROP TABLE runs; DROP TABLE metrics; DROP TABLE latest_metrics;"
                )

    with structlog.testing.capture_logs() as said:
        log = train(tmp_path / "run", "A", "mlflow", lose)
    assert len(log.steps) == STEPS
    assert "tracker_lost" in [event["event"] for event in said]
