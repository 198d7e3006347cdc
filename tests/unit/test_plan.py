"""Plan runs on the tiny base and on the measured 7B shape. tests/e2e/test_plan_runs.py compares a plan with its run."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import pytest
from conftest import REPOSITORY

from entrypoint.cli import run_cli
from lora_trainer.config import MemoryConfig, TrainingConfig
from lora_trainer.data.records import TrainingRecord
from lora_trainer.data.validation import read_records
from lora_trainer.errors import ExitCode
from lora_trainer.persona.vocabulary import BloodType
from lora_trainer.store.opening import open_storage
from lora_trainer.train.file_tokenizer import FileTokenizer
from lora_trainer.train.memory_plan import GIB, MemoryPlan, ModelShape, plan_memory
from lora_trainer.train.time_estimate import (
    REFERENCE,
    SOURCES,
    Backend,
    Seconds,
    evaluation_seconds,
    start_seconds,
    training_seconds,
    work_share,
)
from lora_trainer.train.tokenization import tokenize

BASE = REPOSITORY / "examples" / "tiny-base"
BUNDLED = REPOSITORY / "data"
RECORDS = 60
RESULTS: dict[str, Any] = {
    name: json.loads((REPOSITORY / "benchmarks" / "results" / name).read_text(encoding="utf-8")) for name in SOURCES
}
TRAIN_SPEED, RUN_7B, EVALUATION_SPEED = (RESULTS[name] for name in SOURCES)


def memory(checkpointing: Literal["off", "on", "unsloth"], tokens: int) -> MemoryPlan:
    return MemoryPlan(checkpointing, tokens, None, "")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Return a folder with the first bundled records of each persona."""
    folder = tmp_path_factory.mktemp("data")
    for path in BUNDLED.glob("train_data_type_*.jsonl"):
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
        (folder / path.name).write_text("".join(lines[:RECORDS]), encoding="utf-8")
    return str(folder)


def planned(capsys: pytest.CaptureFixture[str], data: str, *arguments: str) -> dict[str, Any]:
    """Run `plan --json` on `data` and the tiny base, and return its document."""
    options = ("--data", data, "--base-model", str(BASE), "--gpu-memory-gib", "79")
    assert run_cli(["plan", "--blood-type", "A", *options, "--json", *arguments]) == ExitCode.DONE
    document: dict[str, Any] = json.loads(capsys.readouterr().out)
    return document


# --- seconds ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("case", "checkpointing", "row_tokens", "backend"),
    [
        ("unsloth-8192-off", "off", 8192, "unsloth"),
        ("unsloth-4096-unsloth", "unsloth", 4096, "unsloth"),
        ("transformers-4096-on", "on", 4096, "transformers"),
    ],
)
def test_the_range_contains_the_measured_training(
    case: str, checkpointing: Literal["off", "on", "unsloth"], row_tokens: int, backend: Backend
) -> None:
    measured = TRAIN_SPEED["cases"][case]
    steps = 50
    rows = [int(measured["tokens_per_step"] / measured["rows_per_step"])] * int(measured["rows_per_step"] * steps)
    estimated = training_seconds(rows, 0, 0, REFERENCE, memory(checkpointing, row_tokens), backend)
    expected_s = measured["first_step_s"] + (steps - 1) * measured["step_ms"] / 1000
    # saving takes 2 s on top
    assert expected_s * 0.99 < estimated.low <= estimated.high < expected_s * 1.01 + 3


def test_small_rows_take_no_less_than_the_measured_ones_at_the_high_end() -> None:
    steps = RUN_7B["steps"]
    estimated = training_seconds([step["tokens"] for step in steps], 0, 0, REFERENCE, memory("off", 8192), "unsloth")
    spent_s = RUN_7B["metrics"]["training"]["train_s"] + RUN_7B["timings_s"]["save"] + RUN_7B["timings_s"]["read_back"]
    # one of its seven steps waited 0.3 s
    assert estimated.low < spent_s < estimated.high + 0.5
    assert estimated.high - estimated.low > 0.2


def test_recomputation_takes_longer_and_half_the_layers_take_less() -> None:
    rows = [8000] * 100
    full = training_seconds(rows, 5000, 4, REFERENCE, memory("off", 8192), "unsloth")
    recomputed = training_seconds(rows, 5000, 4, REFERENCE, memory("unsloth", 8192), "unsloth")
    half = training_seconds(rows, 5000, 4, replace(REFERENCE, layers=14), memory("off", 8192), "unsloth")
    assert full.high < recomputed.low
    assert half.high < full.low
    assert work_share(REFERENCE) == 1


def test_the_transformers_backend_without_recomputation_is_bounded_by_its_flop() -> None:
    rows = [4000] * 100
    on = training_seconds(rows, 0, 0, REFERENCE, memory("on", 4096), "transformers")
    off = training_seconds(rows, 0, 0, REFERENCE, memory("off", 4096), "transformers")
    assert off.low < on.low
    assert off.high == on.high


def test_the_range_contains_the_measured_evaluation() -> None:
    cases: dict[str, Backend] = {"unsloth": "unsloth", "reference": "transformers"}
    for case, backend in cases.items():
        found = EVALUATION_SPEED["cases"][case]["replies"]["120"]
        expected_s = found["adapter_generate_s"] + found["base_generate_s"]
        estimated = evaluation_seconds(120, 1, 64, 64, 120, REFERENCE, backend)
        assert estimated.low == pytest.approx(expected_s, rel=0.01)
        assert estimated.high == pytest.approx(expected_s, rel=0.01)
    wide = evaluation_seconds(480, 2, 40, 128, 1024, REFERENCE, "unsloth")
    assert wide.high / wide.low == pytest.approx(4 * 128 / 40)


def test_the_start_is_scaled_by_the_size_of_the_base() -> None:
    whole = start_seconds(REFERENCE, "unsloth", hashes=True, loads=["unsloth"])
    spent = RUN_7B["timings_s"]
    assert whole.low < spent["import"] + spent["identify"] + spent["load"] < whole.high
    hub = start_seconds(REFERENCE, "unsloth", hashes=False, loads=["unsloth"])
    assert whole.high - hub.high == pytest.approx(spent["identify"], abs=0.01)
    small = start_seconds(replace(REFERENCE, layers=2), "unsloth", hashes=True, loads=["unsloth"])
    assert small.low < whole.low
    assert small.high == whole.high


def test_money_is_hours_times_price() -> None:
    assert (Seconds(1800, 3000) + Seconds(0, 600)).money(3) == (1.5, 3.0)


# --- the command -----------------------------------------------------------------------------------------


def test_the_layout_is_the_memory_rules(capsys: pytest.CaptureFixture[str], data: str) -> None:
    (persona,) = planned(capsys, data, "--max-steps", "5")["personas"]
    expected = plan_memory(MemoryConfig(), TrainingConfig(), ModelShape.of(BASE), 79 * GIB, persona["longest_tokens"], "unsloth")
    assert persona["memory_plan"]["micro_batch_tokens"] == expected.micro_batch_tokens
    assert persona["memory_plan"]["estimated_peak_gib"] == expected.estimated_peak_gib
    assert persona["steps"] == 5
    assert persona["rows"] >= 5


def test_price_and_seconds_add_up(capsys: pytest.CaptureFixture[str], data: str) -> None:
    document = planned(capsys, data, "--blood-type", "A,B", "--price-per-hour", "3.6", "--max-steps", "5")
    parts = [document["seconds"]["start"]]
    for persona in document["personas"]:
        parts += persona["seconds"].values()
    for end in (0, 1):
        total = document["seconds"]["total"][end]
        assert total == pytest.approx(sum(part[end] for part in parts), abs=0.3)
        assert document["money"][end] == pytest.approx(total / 1000, abs=0.001)
    assert document["estimated_from"] == list(SOURCES)
    assert document["no_estimate"] is None


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [(("--device", "cpu"), "CPU"), (("--set", "training.quantization=none", "--set", "training.compute_dtype=float32"), "float32")],
)
def test_what_was_not_measured_has_no_seconds(
    capsys: pytest.CaptureFixture[str], data: str, arguments: tuple[str, ...], reason: str
) -> None:
    document = planned(capsys, data, *arguments, "--price-per-hour", "2")
    assert document["seconds"] == {"start": None, "total": None}
    assert document["money"] is None
    assert reason in document["no_estimate"]
    assert document["personas"][0]["steps"] > 0


def test_the_table_fits_a_narrow_terminal(capsys: pytest.CaptureFixture[str], data: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    options = ("--data", data, "--base-model", str(BASE), "--gpu-memory-gib", "79", "--price-per-hour", "2.5")
    assert run_cli(["plan", "--blood-type", "all", *options]) == ExitCode.DONE
    out = capsys.readouterr().out
    assert "price at 2.5 an hour: " in out
    table = out.partition("base:")[0].splitlines()
    assert max(map(len, table)) <= 80
    assert any(line.split()[:2] == ["persona", "A"] for line in table)
    assert "estimate" in out


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("--data", "{tmp}/"), ExitCode.DATA, "not found"),
        (("--base-model", "{tmp}/nowhere"), ExitCode.CONFIG, "no such folder"),
        (("--base-model", "{tmp}"), ExitCode.CONFIG, "config.json, tokenizer.json missing"),
        (("--base-model", "some/model", "--set", "base.revision=none"), ExitCode.CONFIG, "base.revision: not given"),
        (("--set", "training.max_length_tokens=16"), ExitCode.DATA, "left to train on"),
        (("--set", "evaluation.max_new_tokens=2048"), ExitCode.DATA, "the base has 2,048 positions"),
        (("--gpu-memory-gib", "nan"), ExitCode.CONFIG, "not a finite number"),
        (("--price-per-hour", "-1"), ExitCode.CONFIG, "-1"),
    ],
)
def test_mistakes_end_as_the_runs_do(
    capsys: pytest.CaptureFixture[str], data: str, tmp_path: Path, arguments: tuple[str, ...], code: ExitCode, message: str
) -> None:
    options = ("--blood-type", "A", "--data", data, "--base-model", str(BASE), "--gpu-memory-gib", "79")
    given = [argument.replace("{tmp}", str(tmp_path)) for argument in arguments]
    assert run_cli(["plan", *options, *given]) == code
    printed = capsys.readouterr()
    assert message in printed.err
    assert "Traceback" not in printed.err
    assert not printed.out


def test_bad_lines_of_every_persona_are_reported(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    for persona in ("A", "B"):
        (tmp_path / f"train_data_type_{persona}.jsonl").write_text("no json\n", encoding="utf-8")
    options = ("--blood-type", "A,B", "--data", str(tmp_path), "--base-model", str(BASE), "--gpu-memory-gib", "79")
    assert run_cli(["plan", *options]) == ExitCode.DATA
    err = capsys.readouterr().err
    assert "train_data_type_A.jsonl:1" in err
    assert "train_data_type_B.jsonl:1" in err


def test_neither_weights_nor_torch_nor_a_gpu_are_needed(data: str, tmp_path: Path) -> None:
    base = tmp_path / "base"
    shutil.copytree(BASE, base, ignore=shutil.ignore_patterns("*.safetensors"))
    code = (
        "import sys\n"
        "from entrypoint.cli import run_cli\n"
        f"code = run_cli(['plan', '--blood-type', 'A', '--data', {data!r}, '--base-model', {str(base)!r}, *sys.argv[1:]])\n"
        "print({'torch', 'transformers', 'trl', 'peft', 'datasets', 'unsloth'} & set(sys.modules), code)\n"
    )
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(REPOSITORY)}

    def said(*arguments: str) -> tuple[str, str]:
        command = [sys.executable, "-c", code, *arguments]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=True)
        return done.stdout.splitlines()[-1], done.stderr

    assert said("--gpu-memory-gib", "23") == ("set() 0", "")
    without, err = said()
    assert without == f"set() {int(ExitCode.CONFIG)}"
    assert "--gpu-memory-gib: not given, and there is no GPU here" in err


@pytest.mark.integration
def test_a_base_in_a_bucket_is_planned_without_its_weights(
    bucket: str, data: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    storage = open_storage(f"s3://{bucket}/base/")
    for path in BASE.iterdir():
        if path.suffix == ".json":
            storage.upload(path, path.name)
    cache = ("--set", f"base.cache_dir={tmp_path / 'cache'}")
    from_bucket = planned(capsys, data, "--base-model", f"s3://{bucket}/base/", *cache)
    assert from_bucket["personas"] == planned(capsys, data)["personas"]
    storage.delete("tokenizer.json")
    options = ("--data", data, "--base-model", f"s3://{bucket}/base/", "--gpu-memory-gib", "79", *cache)
    assert run_cli(["plan", "--blood-type", "A", *options]) == ExitCode.CONFIG
    assert f"s3://{bucket}/base/: not a model: tokenizer.json missing" in capsys.readouterr().err


# --- the tokenizer ---------------------------------------------------------------------------------------


def records() -> list[TrainingRecord]:
    return read_records(BUNDLED / "train_data_type_A.jsonl", BloodType.A)[0][:200]


def test_the_tokens_are_those_of_transformers() -> None:
    transformers = pytest.importorskip("transformers", reason="transformers is not installed: pip install '.[cpu]'")
    theirs = transformers.AutoTokenizer.from_pretrained(str(BASE), local_files_only=True)
    assert tokenize(records(), FileTokenizer(BASE)) == tokenize(records(), theirs)
