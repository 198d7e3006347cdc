"""Test what `benchmarks/preference_training.py` trains on, compares and shows. TRL trains, and `evaluate` evaluates."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import pytest
from conftest import REPOSITORY, load_tool
from made_metrics import made_run

from lora_trainer.config_sources import settle
from lora_trainer.data.jsonl import JsonlReader
from lora_trainer.data.split import split_held_out
from lora_trainer.errors import ConfigError
from lora_trainer.run.training import TokenizedData
from lora_trainer.train.tokenization import TokenSequence

benchmark: Any = load_tool("preference_training", "benchmarks")


def settings(only: list[str] | None = None) -> list[Any]:
    found: list[Any] = benchmark.settings_of(
        argparse.Namespace(betas=[0.1, 0.3], rates=[5e-6, 2e-5], control_rates=[2e-5], sft_weight=1.0, only=only)
    )
    return found


def test_every_control_has_the_sft_term_alone() -> None:
    found = {setting.name: setting for setting in settings()}
    assert list(found) == ["dpo-b0.1-lr5e-06", "dpo-b0.1-lr2e-05", "sft-lr2e-05", "dpo-b0.3-lr5e-06", "dpo-b0.3-lr2e-05"]
    assert found["dpo-b0.3-lr2e-05"].losses == {"sigmoid": 1.0, "sft": 1.0}
    assert found["sft-lr2e-05"].losses == {"sft": 1.0}
    assert [setting.name for setting in settings(["sft-lr2e-05"])] == ["sft-lr2e-05"]
    with pytest.raises(ConfigError, match=r"got dpo, expected some of dpo-b0\.1-lr5e-06"):
        settings(["dpo"])


def test_no_pair_of_a_held_out_situation_trains() -> None:
    records = [line.record for line in JsonlReader(REPOSITORY / "data" / "train_data_type_A.jsonl") if line.record]
    train, held_out = split_held_out(records, 0.1)
    # the first id tells the record
    sequences = [TokenSequence((at, 1), 1) for at in range(len(records))]
    data = TokenizedData(
        [records[at] for at in train], [sequences[at] for at in train],
        [records[at] for at in held_out], [sequences[at] for at in held_out], 0,
    )  # fmt: skip
    path = REPOSITORY / "data" / "preferences" / "preferences_type_A.jsonl"
    trained, aside = benchmark.read_pairs(path, data)
    assert len(trained) + len(aside) == len(path.read_text(encoding="utf-8").splitlines())
    assert {pair.sequence.input_ids[0] for pair in trained} <= set(train)
    assert {pair.sequence.input_ids[0] for pair in aside} <= set(held_out)
    for pair in (trained[0], aside[0]):
        record = records[pair.sequence.input_ids[0]]
        assert json.loads(pair.chosen)["text"] == record.reply.text != json.loads(pair.rejected)["text"]


def test_differences_are_paired_by_question() -> None:
    run = made_run(prompts=6, sampled=False, steps=2)
    config = settle({"blood_type": "A"}, {}).evaluation
    before = [reply for reply in run.replies if (reply.model, reply.decoding) == ("adapter", "greedy")]
    worse = [reply.model_copy(update={"exact_json": False, "question": None}) for reply in before]
    same = benchmark.differences(before, before, "A", config)
    assert same["persona"] == {"value": 0.0, "lower": 0.0, "upper": 0.0}
    change = benchmark.differences(before, worse, "A", config)
    assert "question" not in change
    assert change["exact_json"]["value"] == -sum(reply.exact_json for reply in before) / len(before) < 0
    assert benchmark.changed({"difference": change}) == ([], [f"exact_json {change['exact_json']['value']:+.3f}"])


def test_joined_results_have_means_over_the_bundles(tmp_path: Path) -> None:
    rate = {"value": 0.9, "lower": 0.8, "upper": 1.0}
    row = {
        **dict.fromkeys((*benchmark.RATES, "win_rate"), rate), "setting": "before", "seed": 1, "loss_held_out": 1.5, "harmful": 0,
        "incomplete": None, "sense": None, "rule_score": 0.8, "missed": ["persona"], "evaluate_s": 3.0, "peak_memory_gib": 2.0,
    }  # fmt: skip
    trained = {
        "setting": "dpo", "pairs_held_out": {"margin": 0.25, "accuracy": 0.75},
        "difference": {"persona": {"value": 0.04, "lower": 0.01, "upper": 0.07}},
    }  # fmt: skip
    paths = []
    for name in ("A", "B"):
        named = {"blood_type": name, "run_id": name}
        failed = {**named, "setting": "sft", "seed": 1, "failed": ["no memory"]}
        document = {
            **dict.fromkeys(("what", "command", "environment", "base", "training", "pairs")),
            "rows": [row | named, row | named | trained, failed],
        }
        paths.append(tmp_path / f"{name}.json")
        paths[-1].write_text(json.dumps(document), encoding="utf-8")
    benchmark.join(argparse.Namespace(join=paths, out=tmp_path / "all.json"))
    lines = (tmp_path / "all.md").read_text(encoding="utf-8").splitlines()
    assert any(line.startswith("| dpo | 2 | 1.500 |") and line.endswith("| 2 | 0 |") for line in lines)
    assert any("| B 1 | dpo |" in line and "0.250, 0.75 | persona +0.040 | – | persona |" in line for line in lines)
    assert any("failed: no memory" in line for line in lines)
    assert len(json.loads((tmp_path / "all.json").read_text(encoding="utf-8"))["rows"]) == 6
