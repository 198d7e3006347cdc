"""Run `benchmarks/persona_table.py` on the tiny base, interrupt it, and run it again."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from conftest import REPOSITORY
from jobs import BASE, NO_GATES, few_questions, require_training_stack

# tests/unit/test_persona_table.py covers the parts, test_pipeline.py and test_bundle.py an earlier prompt
pytestmark = [pytest.mark.e2e, pytest.mark.slow]
require_training_stack()

RECIPES = """
long: {training.learning_rate: 2.0e-3, training.sequences_per_step: 4, training.epochs: 4}
short: {ends_at_kept_step_of: long}
"""


@pytest.fixture(scope="module")
def command(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Return the command that trains two adapters on prompt version 2. The second's schedule ends at the first's best step."""
    folder = tmp_path_factory.mktemp("table")
    (folder / "recipes.yaml").write_text(RECIPES, encoding="utf-8")
    (folder / "data").mkdir()
    records = (REPOSITORY / "data" / "train_data_type_B.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    (folder / "data" / "train_data_type_B.jsonl").write_text("".join(records[:64]), encoding="utf-8")
    return [
        sys.executable, str(REPOSITORY / "benchmarks" / "persona_table.py"), "--base", str(BASE), "--data", str(folder / "data"),
        "--out", str(folder / "table.json"), "--scratch", str(folder / "scratch"), "--recipes", str(folder / "recipes.yaml"),
        "--personas", "B", "--seeds", "7", "--prompt-versions", "2", "--jobs", "2", "--timeout-s", "300",
        "--set", "device=cpu", "--set", "training.quantization=none", "--set", "training.compute_dtype=float32",
        *few_questions(), *NO_GATES,
    ]  # fmt: skip


def start(command: list[str]) -> subprocess.Popen[str]:
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def test_an_interrupted_table_goes_on_and_a_finished_one_trains_nothing(command: list[str]) -> None:
    folder = Path(command[command.index("--out") + 1]).parent
    first = start(command)
    while first.poll() is None and not any(b"training_step" in log.read_bytes() for log in folder.glob("scratch/long-*/log")):
        time.sleep(0.05)
    first.send_signal(signal.SIGTERM)
    said, _ = first.communicate(timeout=300)
    assert first.returncode == 143, said
    before = json.loads((folder / "table.json").read_text(encoding="utf-8"))
    assert (before["adapters"], list(before["unfinished"])) == ([], ["long-p2-s7-B", "short-p2-s7-B"])

    again = start(command)
    said, _ = again.communicate(timeout=300)
    assert again.returncode == 0, said
    result = json.loads((folder / "table.json").read_text(encoding="utf-8"))
    assert result["unfinished"] == {}
    long, short = result["adapters"]
    assert (long["recipe"], long["prompt_version"], long["seed"], long["blood_type"]) == ("long", 2, 7, "B")
    assert (long["attempts"], short["attempts"]) == (2, 1)
    assert '"resumed"' in next(folder.glob("scratch/long-*/log")).read_text(encoding="utf-8")
    assert short["steps"] == long["kept_step"] <= long["steps"]
    assert result["environments"][0]["device"] == "cpu"
    assert str(folder) not in json.dumps({name: value for name, value in result.items() if name != "command"})
    (bundle,) = (path.parent for path in folder.glob("scratch/long-*/out/adapters/B/*/manifest.json"))
    assert json.loads((bundle / "prompt.json").read_text(encoding="utf-8"))["version"] == 2
    manifest: dict[str, Any] = json.loads((bundle / "manifest.json").read_text(encoding="utf-8"))
    assert manifest["ingredients"]["prompt_version"] == 2
    assert "| long | 2 | B | 7 |" in (folder / "table.md").read_text(encoding="utf-8")
    replies = (folder / "table-replies.txt").read_text(encoding="utf-8")
    assert replies.count("\n> ") == 2 * 12
    assert [line for line in replies.splitlines() if line.startswith("=")] == [
        "===== long-p2-s7-B =====", "===== short-p2-s7-B =====",
    ]  # fmt: skip

    third = start(command)
    said, _ = third.communicate(timeout=300)
    assert third.returncode == 0, said
    assert json.loads((folder / "table.json").read_text(encoding="utf-8"))["adapters"] == result["adapters"]
