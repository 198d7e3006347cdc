"""Run the whole job with the gate of sense on the tiny base, which knows too little Korean to be a judge, and says so."""

from __future__ import annotations

import json
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any, NamedTuple

import pytest
from jobs import SHORT, events, job, require_training_stack

from lora_trainer.store.manifest import MANIFEST_NAME

# tests/e2e/test_reply_features.py examines the same base on fewer replies
pytestmark = [pytest.mark.e2e, pytest.mark.slow]
require_training_stack()


class Runs(NamedTuple):
    first: CompletedProcess[str]
    again: CompletedProcess[str]
    output: Path
    work: Path


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    """Train with `if_judged`, then ask for the same run with `required`."""
    folder = tmp_path_factory.mktemp("sense")
    arguments = ("run", "--blood-type", "A", *SHORT, "--output", str(folder / "out"))
    first = job(*arguments, "--set", "gates.sense=if_judged", work_dir=folder / "work")
    again = job(*arguments, "--set", "gates.sense=required", work_dir=folder / "work")
    return Runs(first, again, folder / "out", folder / "work")


def test_a_judge_that_fails_its_examination_decides_nothing(runs: Runs) -> None:
    assert runs.first.returncode == 0, runs.first.stderr
    log = events(runs.first)
    assert log["sense_judged"]["status"] == "not_judged"
    assert log["sense_judged"]["reason"].startswith("no judge passed its examination: probe (")
    assert log["gates_decided"]["not_judged"]["sense"] == "no_judge"
    assert log["run_finished"]["sense"] == "not_judged"
    latest = json.loads((runs.output / "adapters" / "A" / "latest.json").read_bytes())
    assert latest["sense"] == "not_judged"
    metrics = json.loads((runs.output / latest["bundle"] / "metrics.json").read_bytes())
    found: dict[str, Any] = metrics["evaluation"]["sense"]
    assert [judge["judge"] for judge in found["examinations"]] == ["probe", "question"]
    assert all(judge["shortfalls"] for judge in found["examinations"])
    assert found["unexamined"] == {}
    assert {"examine_sense", "judge_sense"} <= json.loads((runs.output / latest["bundle"] / MANIFEST_NAME).read_bytes())[
        "timings_s"
    ].keys()
    page = (runs.output / latest["bundle"] / "report.html").read_text(encoding="utf-8")
    assert "no judge passed its examination" in page


def test_required_is_a_missed_gate_that_says_why_and_costs_no_second_examination(runs: Runs) -> None:
    assert runs.again.returncode == 4, runs.again.stderr
    log = events(runs.again)
    assert "evaluating_again" in log
    assert "sense_judge_examined" not in log
    (line,) = log["gates_decided"]["missed"]
    assert line.startswith("gates.sense: required, and nobody could judge it: no judge passed its examination: probe (")
    assert log["run_finished"]["sense"] == "not_judged"
    # what the base computed is gone, what it was good for stays
    assert {path.suffix for path in (runs.work / "sense").rglob("*") if path.is_file()} == {".json", ".npz"}
