"""Sweep on the tiny base: kill it, continue it, and compare its winner with a run of the same settings."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from conftest import REPOSITORY
from jobs import BASE, DEMO, NO_GATES, Log, few_questions, left_over, require_training_stack, watched_job

from lora_trainer.config_sources import settle
from lora_trainer.persona.vocabulary import BloodType
from lora_trainer.signals import Interruption
from lora_trainer.store.interface import Storage
from lora_trainer.store.manifest import verify_files
from lora_trainer.store.opening import open_storage
from lora_trainer.store.prefixes import bundle_prefix, latest_key
from lora_trainer.train.backends import open_backend
from lora_trainer.train.memory_plan import plan_memory

pytestmark = pytest.mark.e2e
require_training_stack()

STEPS, FIRST_RUNG = 8, 2
RECORDS = 64
RATES = "1e-7,1e-4,2e-4"
SETTINGS = (
    *DEMO, "--blood-type", "A", "--max-steps", str(STEPS), "--sequences-per-step", "4", "--log-format", "json",
    # dropout makes the weights depend on the random numbers, which a pause must leave alone
    "--set", "lora.dropout=0.1",
    # at this upper limit, the gradient of a trial overflows in the third step if its learning rate is at its upper limit, too
    "--set", "lora.alpha=1024",
    "--set", "memory.micro_batch_tokens=512", "--set", "logging.log_every_steps=1",
    *few_questions(16, "0.9"), *NO_GATES,
)  # fmt: skip


def events(log: Log, name: str) -> Log:
    return [line for line in log if line["event"] == name]


def record_of(output: Storage) -> tuple[str, dict[str, Any]]:
    """Return key and content of the only sweep's record."""
    (key,) = [item.key for item in output.list("runs/A/sweeps/") if item.key.endswith("/sweep.json")]
    found = output.read_bytes(key)
    assert found is not None
    return key, json.loads(found.data)


def adapter(output: Storage, run_id: str) -> bytes:
    prefix = bundle_prefix(BloodType.A, run_id)
    assert verify_files(output, prefix) == []
    found = output.read_bytes(prefix + "adapter_model.safetensors", max_bytes=2**28)
    assert found is not None
    return found.data


@dataclass(frozen=True, slots=True)
class Swept:
    """A sweep that was killed after the first rung and then finished."""

    folder: Path
    arguments: tuple[str, ...]
    output: Storage
    killed: tuple[int, list[str], Log]
    record_when_killed: dict[str, Any]
    published_when_killed: list[str]
    finished: tuple[int, list[str], Log]
    record: dict[str, Any]

    @property
    def winner(self) -> dict[str, Any]:
        return next(trial for trial in self.record["trials"] if trial["run_id"] == self.record["winner"])


@pytest.fixture(scope="module")
def swept(tmp_path_factory: pytest.TempPathFactory) -> Swept:
    folder = tmp_path_factory.mktemp("sweep")
    lines = (REPOSITORY / "data" / "train_data_type_A.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)[:RECORDS]
    (folder / "train_data_type_A.jsonl").write_text("".join(lines), encoding="utf-8")
    output = open_storage(str(folder / "out"))
    arguments = (*SETTINGS, "--data", str(folder), "--output", str(folder / "out"))
    sweep = ("sweep", *arguments, "--try", f"training.learning_rate={RATES}")
    # at the beginning of the second leg of the first trial that goes on; another machine continues
    killed = watched_job(
        *sweep, "--work-dir", str(folder / "work"),
        until=lambda line: line["event"] == "resumed",
    )  # fmt: skip
    record_when_killed, published = record_of(output)[1], [item.key for item in output.list("adapters/")]
    finished = watched_job(*sweep, "--work-dir", str(folder / "work-2"))
    assert finished[0] == 0, finished[2][-1]
    return Swept(folder, arguments, output, killed, record_when_killed, published, finished, record_of(output)[1])


def test_a_killed_sweep_has_recorded_what_is_done(swept: Swept) -> None:
    code, printed, log = swept.killed
    assert (code, printed) == (143, [])
    assert log[-1]["outcome"] == "interrupted"
    assert swept.published_when_killed == []
    dropped, *others = swept.record_when_killed["trials"]
    assert (dropped["state"], len(dropped["rungs"])) == ("dropped", 1)
    assert {trial["state"] for trial in others} == {"training"}
    assert [trial["rungs"][0]["step"] for trial in (dropped, *others)] == [FIRST_RUNG] * 3


def test_it_goes_on_where_it_stopped_and_repeats_no_step(swept: Swept) -> None:
    before, after = swept.killed[2], swept.finished[2]
    steps = [(line["run_id"], line["step"]) for line in (*events(before, "training_step"), *events(after, "training_step"))]
    assert len(steps) == len(set(steps)) == FIRST_RUNG + 2 * STEPS
    assert min(step for run_id, step in steps[len(events(before, "training_step")) :]) > FIRST_RUNG
    # one loading of the base, for all legs and the evaluation
    assert len(events(after, "packing_checked")) - len(events(after, "base_reused")) == 1


def test_the_lowest_loss_wins_and_only_the_winner_is_evaluated_and_published(swept: Swept) -> None:
    dropped, *trained = swept.record["trials"]
    assert (dropped["state"], dropped["steps"], dropped["verdict"]) == ("dropped", FIRST_RUNG, None)
    assert [(trial["state"], trial["steps"]) for trial in trained] == [("trained", STEPS)] * 2
    assert swept.winner["loss"] == min(trial["loss"] for trial in trained)
    assert [trial["verdict"] is not None for trial in trained] == [trial is swept.winner for trial in trained]
    assert swept.record["loss_base"] > swept.winner["loss"]
    assert all(trial["held_out_losses"] and trial["train_s"] > 0 for trial in trained)
    # nothing is left of the others but the record and the page
    published = {item.key.split("/")[2] for item in swept.output.list("adapters/A/")}
    assert published == {swept.record["winner"], "latest.json"}
    key, _ = record_of(swept.output)
    assert left_over(swept.output) == [key.replace(".json", ".html"), key]
    pointer = swept.output.read_bytes(latest_key(BloodType.A))
    assert pointer is not None
    assert json.loads(pointer.data)["run_id"] == swept.record["winner"]


def test_it_ends_with_table_page_and_bundle(swept: Swept) -> None:
    _, printed, log = swept.finished
    text = "\n".join(printed)
    assert printed[-1] == f"bundle: {swept.output.uri}{bundle_prefix(BloodType.A, swept.record['winner'])}"
    assert f"--set training.learning_rate={swept.winner['settings']['training.learning_rate']:g}" in printed[-2]
    assert "dropped at 25" in text
    assert f"{swept.winner['loss']:.3f}" in text
    last = log[-1]
    assert (last["event"], last["outcome"], last["trials"], last["run_id"]) == ("run_finished", "done", 3, swept.record["winner"])
    page = swept.output.read_bytes(record_of(swept.output)[0].replace(".json", ".html"))
    assert page is not None
    assert b"<svg" in page.data


def test_the_winner_is_what_run_makes_of_its_settings(swept: Swept, tmp_path: Path) -> None:
    setting = ("--learning-rate", str(swept.winner["settings"]["training.learning_rate"]))
    alone = tmp_path / "out"
    code, _, log = watched_job("run", *swept.arguments, *setting, "--output", str(alone), "--work-dir", str(tmp_path / "work"))
    assert code == 0, log[-1]
    assert log[-1]["run_id"] == swept.record["winner"]
    assert adapter(open_storage(str(alone)), swept.record["winner"]) == adapter(swept.output, swept.record["winner"])


def test_a_finished_sweep_prints_its_result_again(swept: Swept, tmp_path: Path) -> None:
    sweep = ("sweep", *swept.arguments, "--try", f"training.learning_rate={RATES}", "--work-dir", str(tmp_path), "--json")
    code, printed, log = watched_job(*sweep)
    assert code == 0, log[-1]
    assert json.loads("\n".join(printed)) == swept.record
    assert not events(log, "backend_started")


def test_gates_rank_first_a_published_run_is_not_repeated_and_a_diverged_trial_has_lost(swept: Swept, tmp_path: Path) -> None:
    rate = swept.winner["settings"]["training.learning_rate"]
    output = open_storage(str(shutil.copytree(swept.folder / "out", tmp_path / "out")))
    code, printed, log = watched_job(
        "sweep", *swept.arguments, "--try", f"training.learning_rate={rate},{rate / 2},1",
        "--set", "gates.persona=1", "--output", str(tmp_path / "out"), "--work-dir", str(tmp_path / "work"),
    )  # fmt: skip
    assert code == 4, log[-1]
    (sweep_id,) = {line["sweep_id"] for line in log if "sweep_id" in line}
    found = output.read_bytes(f"runs/A/sweeps/{sweep_id}/sweep.json")
    assert found is not None
    record = json.loads(found.data)
    published, trained, diverged = record["trials"]

    assert [trial["was_published"] for trial in record["trials"]] == [True, False, False]
    assert published["run_id"] == swept.record["winner"]
    assert published["loss"] == swept.winner["loss"]
    assert not [line for line in events(log, "training_step") if line["run_id"] == published["run_id"]]

    assert (diverged["state"], diverged["verdict"]) == ("diverged", None)
    assert [line["problem"] for line in events(log, "trial_diverged")] == [diverged["problem"]]
    assert "training diverged" in diverged["problem"]

    # nobody passes, so every trial that was trained to its end is judged
    assert {trial["state"] for trial in (published, trained)} == {"trained"}
    assert {line["run_id"] for line in events(log, "gates_decided")} == {trial["run_id"] for trial in (published, trained)}
    assert printed[-1] == f"bundle: {record['bundle']}"
    assert any("gates.persona" in problem for problem in log[-1]["problems"])
    # the pointer stays with the adapter that passed its gates
    pointer = output.read_bytes(latest_key(BloodType.A))
    assert pointer is not None
    assert json.loads(pointer.data)["run_id"] == swept.record["winner"]


def test_another_adapter_shape_or_seed_loads_the_base_again(tmp_path: Path) -> None:
    given = {"blood_type": "A", "device": "cpu", "work_dir": str(tmp_path), "training.quantization": "none"}
    backend = open_backend(settle(given, {}), Interruption())
    backend.start()
    backend.load_tokenizer(BASE)
    config = backend.config
    plan = plan_memory(config.memory, config.training, backend.shape(BASE), None, 64, backend.name)
    changes = ({}, {"training.learning_rate": 0.1}, {"lora.r": 4}, {"lora.r": 4, "training.epochs": 2}, {"training.seed": 1})
    reused = []
    for changed in changes:
        backend.configure(settle({**given, **changed}, {}))
        reused.append(backend.load(BASE, plan, 64))
    assert reused == [False, True, False, True, False]
