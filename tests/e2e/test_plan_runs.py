"""Compare what `plan` says with what the run then does."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from jobs import SHORT, events, job, require_training_stack

pytestmark = pytest.mark.e2e
require_training_stack()


def test_the_run_takes_what_was_planned(tmp_path: Path) -> None:
    settings = (*SHORT, "--blood-type", "A", "--data", "data/", "--output", str(tmp_path / "out"))
    planned = job("plan", *settings, "--json", work_dir=tmp_path / "plan")
    assert planned.returncode == 0, planned.stderr
    (plan,) = json.loads(planned.stdout)["personas"]
    assert not (tmp_path / "plan").exists()

    done = job("run", *settings, "--log-format", "json", work_dir=tmp_path / "run")
    assert done.returncode == 0, done.stderr[-2000:]
    log = events(done)
    formatted, chosen, ended = log["data_formatted"], log["plan_chosen"], log["training_finished"]
    for name in ("train_records", "held_out_records", "tokens", "longest_tokens", "steps"):
        assert plan[name] == formatted[name], name
    for name in ("gradient_checkpointing", "micro_batch_tokens", "estimated_peak_gib", "reason"):
        assert plan["memory_plan"][name] == chosen[name], name
    assert plan["steps"] == ended["steps"] == 6

    bundle = Path(done.stdout.strip().removeprefix("file://"))
    manifest = json.loads((bundle / "manifest.json").read_text(encoding="utf-8"))
    assert plan["replies"] == len((bundle / "replies.jsonl").read_text(encoding="utf-8").splitlines())
    layout = {name: value for name, value in plan["memory_plan"].items() if name != "estimated_peak_gib"}
    assert manifest["memory_plan"] == layout
    training = json.loads((bundle / "metrics.json").read_text(encoding="utf-8"))["training"]
    assert (plan["step_tokens"], plan["rows"]) == (training["tokens"], training["rows"])
