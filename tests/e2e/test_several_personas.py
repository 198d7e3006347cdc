"""Train several personas in one process: each gets the same adapter as alone, byte for byte, and no failure affects another."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from conftest import REPOSITORY
from jobs import DEMO, NO_GATES, Log, Until, few_questions, left_over, require_training_stack, watched_job

from lora_trainer.persona.vocabulary import BloodType
from lora_trainer.store.interface import Storage
from lora_trainer.store.manifest import MANIFEST_NAME, verify_files
from lora_trainer.store.opening import open_storage
from lora_trainer.store.prefixes import bundle_prefix, latest_key

pytestmark = pytest.mark.e2e
require_training_stack()

STEPS = 4
RECORDS = 120
# These settings involve state that could leak into the next persona: random numbers (dropout), mixed precision, which
# accelerate applies to a model once, and checkpointing, which the evaluation switches off and on.
RUN = (
    "run", *DEMO, "--max-steps", str(STEPS), "--log-format", "json",
    "--set", "lora.dropout=0.1", "--set", "training.compute_dtype=bfloat16", "--set", "memory.gradient_checkpointing=on",
    "--set", "memory.micro_batch_tokens=512", "--set", "logging.log_every_steps=1", "--set", "checkpoints.every_steps=1",
    *few_questions(16, "0.9"), *NO_GATES,
)  # fmt: skip


def job(
    blood_types: str, data: Path, output: str, work_dir: Path, *more: str, until: Until | None = None
) -> tuple[int, list[str], Log]:
    """Run the job once, with SIGTERM at the event `until`. Return exit code, standard output and log."""
    return watched_job(
        *RUN, "--blood-type", blood_types, "--data", str(data), "--output", output, "--work-dir", str(work_dir), *more, until=until
    )


def events(log: Log, name: str, blood_type: str | None = None) -> Log:
    return [line for line in log if line["event"] == name and blood_type in (None, line.get("blood_type"))]


def adapter(output: Storage, blood_type: str) -> bytes:
    """Return the adapter that latest.json names. Checks that its bundle is complete."""
    pointer = output.read_bytes(latest_key(BloodType(blood_type)))
    assert pointer is not None
    prefix = bundle_prefix(BloodType(blood_type), json.loads(pointer.data)["run_id"])
    assert verify_files(output, prefix) == []
    found = output.read_bytes(prefix + "adapter_model.safetensors", max_bytes=2**28)
    assert found is not None
    return found.data


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Copy the beginning of each bundled file."""
    folder = tmp_path_factory.mktemp("data")
    for path in (REPOSITORY / "data").glob("train_data_type_*.jsonl"):
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True)[:RECORDS]
        (folder / path.name).write_text("".join(lines), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory, data: Path) -> bytes:
    """Train B alone and return its adapter."""
    folder = tmp_path_factory.mktemp("alone")
    code, _, log = job("B", data, str(folder / "out"), folder / "work")
    assert code == 0, log[-1]
    assert "personas" not in log[-1]
    return adapter(open_storage(f"file://{folder / 'out'}"), "B")


def test_each_gets_what_it_gets_alone_from_a_base_that_is_loaded_once(
    alone: bytes, data: Path, bucket: str, tmp_path: Path
) -> None:
    uri = f"s3://{bucket}/lora/"
    output = open_storage(uri)
    code, printed, log = job("A,B", data, uri, tmp_path / "work")
    assert code == 0, log[-1]
    assert adapter(output, "B") == alone
    assert adapter(output, "A") != alone
    # the process trained twice but loaded the base once
    assert [line["blood_type"] for line in events(log, "training_finished")] == ["A", "B"]
    assert [line["blood_type"] for line in events(log, "base_reused")] == ["B"]

    finished = log[-1]
    assert (finished["event"], finished["outcome"], finished["exit_code"]) == ("run_finished", "done", 0)
    run_ids = {persona["blood_type"]: persona["run_id"] for persona in finished["personas"]}
    assert printed == [uri + bundle_prefix(BloodType(name), run_ids[name]) for name in ("A", "B")]
    assert [persona["bundle"] for persona in finished["personas"]] == printed
    assert all(persona["passed"] and persona["exit_code"] == 0 for persona in finished["personas"])
    assert [line["run_id"] for line in events(log, "persona_finished")] == [run_ids["A"], run_ids["B"]]
    for line in log[:-1]:
        # Lines from before the run is identified have only the blood type.
        assert line["run_id" if "run_id" in line else "blood_type"] in (*run_ids, *run_ids.values()), line
    for name, run_id in run_ids.items():
        progress = json.loads((tmp_path / "work" / "runs" / name / run_id / "progress.json").read_text())
        assert (progress["blood_type"], progress["step"], progress["stage"]) == (name, STEPS, "done")
    assert left_over(output) == []

    # With other questions, the job evaluates again without training and loads the base once, too.
    code, printed_again, log = job("A,B", data, uri, tmp_path / "asked", "--set", "evaluation.intensities=0.5")
    assert (code, printed_again) == (0, printed)
    assert [line["blood_type"] for line in events(log, "evaluation_published")] == ["A", "B"]
    assert [line["blood_type"] for line in events(log, "base_reused")] == ["B"]
    assert not events(log, "training_finished")


def test_a_failure_is_its_own_and_bad_data_is_said_before_anyone_trains(alone: bytes, data: Path, tmp_path: Path) -> None:
    bad, out = tmp_path / "data", tmp_path / "out"
    shutil.copytree(data, bad)
    with (bad / "train_data_type_O.jsonl").open("a") as file:
        file.write("no JSON\n")
    # the job trains A, but cannot publish its bundle
    (out / "adapters").mkdir(parents=True)
    (out / "adapters" / "A").write_text("a file where the folder should be")
    code, printed, log = job("A,O,B", bad, str(out), tmp_path / "work")
    assert code == 3, log[-1]
    output = open_storage(f"file://{out}")
    assert adapter(output, "B") == alone
    assert printed == [persona["bundle"] for persona in log[-1]["personas"] if "bundle" in persona]
    assert [(persona["blood_type"], persona["exit_code"]) for persona in log[-1]["personas"]] == [("A", 2), ("O", 3), ("B", 0)]
    bad_data, _, _ = events(log, "persona_finished")
    assert bad_data["blood_type"] == "O"
    assert log.index(bad_data) < log.index(events(log, "backend_started")[0])
    # After A's failure, the job reloads the base. It keeps A's bundle.
    assert not events(log, "base_reused")
    assert [line["blood_type"] for line in events(log, "training_finished")] == ["A", "B"]
    assert (next((tmp_path / "work").glob("runs/A/*/bundle")) / MANIFEST_NAME).is_file()
    assert {problem.split(":")[0] for problem in log[-1]["problems"]} == {"A", "O"}


def test_sigterm_in_the_first_leaves_the_second_unbegun_and_the_same_command_does_both(
    alone: bytes, data: Path, tmp_path: Path
) -> None:
    out = str(tmp_path / "out")
    output = open_storage(f"file://{out}")

    def trained(line: dict[str, Any]) -> bool:
        return bool(line["event"] == "training_step" and line["step"] == 2)

    code, printed, log = job("A,B", data, out, tmp_path / "first", until=trained)
    assert (code, printed) == (143, []), log[-1]
    first, second = log[-1]["personas"]
    assert (first["blood_type"], first["outcome"], first["exit_code"]) == ("A", "interrupted", 143)
    assert (second["blood_type"], second["outcome"], second["exit_code"]) == ("B", "not_begun", None)
    assert log[-1]["problems"][1] == "B: not begun; run the same command again"
    kept = {item.key.split("/")[1] for item in output.list("runs/")}
    assert kept == {"A"}
    assert list(output.list("adapters/")) == []

    code, _, log = job("A,B", data, out, tmp_path / "second")
    assert code == 0, log[-1]
    assert events(log, "resumed", "A")
    assert not events(log, "resumed", "B")
    # B starts at step 1, although A resumed
    assert [line["step"] for line in events(log, "training_step", "B")] == list(range(1, STEPS + 1))
    assert adapter(output, "B") == alone
    assert [persona["run_id"] for persona in log[-1]["personas"]] == [first["run_id"], second["run_id"]]
