"""Test what `benchmarks/persona_table.py` trains and shows. The jobs themselves are those of `lora-trainer run`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from conftest import REPOSITORY, load_tool
from made_metrics import MadeRun, made_run

from lora_trainer.config_sources import settle
from lora_trainer.errors import ConfigError

table: Any = load_tool("persona_table", "benchmarks")
TINY_BASE = REPOSITORY / "examples" / "tiny-base"
BUNDLED = REPOSITORY / "benchmarks" / "recipes.yaml"


def recipes(tmp_path: Path, text: str) -> list[Any]:
    path = tmp_path / "recipes.yaml"
    path.write_text(text, encoding="utf-8")
    found: list[Any] = table.read_recipes(path)
    return found


def trainer(tmp_path: Path, **overrides: Any) -> Any:
    return table.Trainer(tmp_path, {"base.model": str(TINY_BASE), "data": "data/"}, overrides, 1, 1.0)


@pytest.fixture(scope="module")
def made() -> MadeRun:
    return made_run(prompts=6, sampled=False, steps=8)


@pytest.fixture(scope="module")
def row(made: MadeRun) -> dict[str, Any]:
    found: dict[str, Any] = table.measured_row(made.metrics.as_json(), made.facts)
    return found | {"recipe": "default", "prompt_version": 3, "seed": 1, "blood_type": "A", "seconds": 12.0}


def test_every_bundled_recipe_is_valid_and_another_one(tmp_path: Path) -> None:
    found = table.read_recipes(BUNDLED)
    trained = [trainer(tmp_path).settings_of(table.Case(recipe, 3, 1, "A"), 50) for recipe in found]
    settled = [settle(settings, {}).training for settings in trained]
    assert len({training.model_dump_json() for training in settled}) == len(found) == 9


def test_a_shortened_recipe_ends_at_the_kept_step_of_another(tmp_path: Path) -> None:
    lines = (
        "long: {training.learning_rate: 5.0e-4, training.epochs: 4}",
        "short: {ends_at_kept_step_of: long, training.schedule: linear}",
    )
    long, short = recipes(tmp_path, "\n".join(lines))
    (chain,) = table.chains([long, short], [3], [1], ["A"])
    assert [case.name for case in chain] == ["long-p3-s1-A", "short-p3-s1-A"]
    settings = trainer(tmp_path).settings_of(chain[1], 120)
    wanted = {"training.max_steps": 120, "training.epochs": 4, "training.learning_rate": 5e-4, "training.schedule": "linear"}
    assert wanted.items() <= settings.items()
    assert "training.max_steps" not in trainer(tmp_path).settings_of(chain[0])


@pytest.mark.parametrize(
    ("text", "got"),
    [
        ("short: {ends_at_kept_step_of: long}\n", "short: ends_at_kept_step_of: got long, expected a recipe above it: none"),
        (
            "a: {}\nb: {ends_at_kept_step_of: a}\nc: {ends_at_kept_step_of: b}\n",
            "c: ends_at_kept_step_of: got b, expected a recipe",
        ),
        ("a/b: {}\n", "a/b: expected a name of letters"),
        ("a: 5.0e-4\n", "a: got 0.0005, expected settings"),
        ("- a\n", "got no recipes, expected names with settings"),
        ("a: {\n", "cannot read the recipes"),
    ],
)
def test_recipes_that_nobody_can_train(tmp_path: Path, text: str, got: str) -> None:
    with pytest.raises(ConfigError, match=got):
        recipes(tmp_path, text)


def test_a_missing_file_of_recipes(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot read the recipes"):
        table.read_recipes(tmp_path / "missing.yaml")


def test_the_rate_by_width_is_that_of_the_base_and_the_step(tmp_path: Path) -> None:
    (recipe,) = recipes(tmp_path, "w: {training.learning_rate: by width}\n")
    width = json.loads((TINY_BASE / "config.json").read_text(encoding="utf-8"))["hidden_size"]
    settings = trainer(tmp_path, **{"training.sequences_per_step": "16"}).settings_of(table.Case(recipe, 3, 1, "A"))
    expected = table.learning_rate_for_width(width, 16)
    assert settings["training.learning_rate"] == pytest.approx(expected, rel=0.005)


def test_a_case_for_each_recipe_version_seed_and_persona() -> None:
    chained = table.chains([table.Recipe("default", {})], [2, 3], [1, 2, 3], ["A", "B", "O", "AB"])
    assert len({case.name for (case,) in chained}) == len(chained) == 24


def test_a_job_that_fails_keeps_its_exit_code_and_message(tmp_path: Path) -> None:
    failing = table.Trainer(tmp_path, {"base.model": str(TINY_BASE), "data": str(tmp_path / "none")}, {"device": "cpu"}, 1, 300)
    found: list[Any] = []
    failing.train_all([[table.Case(table.Recipe("default", {}), 3, 1, "A")]], lambda case, row: found.append((case.name, row)))
    ((name, failed),) = found
    assert (name, failed["exit_code"], failed["attempts"]) == ("default-p3-s1-A", 3, 1)
    assert "train_data_type_A.jsonl" in failed["said"]


def test_nothing_begins_after_an_interruption(tmp_path: Path) -> None:
    stopped = trainer(tmp_path)
    stopped.stop.set()
    found: list[Any] = []
    stopped.train_all([[table.Case(table.Recipe("default", {}), 3, 1, "A")]], lambda case, row: found.append(row))
    assert [row["exit_code"] for row in found] == [143]
    assert list(tmp_path.iterdir()) == []


def test_the_row_has_the_numbers_of_the_metrics(made: MadeRun, row: dict[str, Any]) -> None:
    metrics = made.metrics
    adapter = metrics.evaluation.greedy.adapter
    assert row["loss_best"] == min(row["losses"].values()) == metrics.held_out.loss_adapter
    assert row["loss_last"] == metrics.training.held_out_losses[-1].loss
    assert (row["kept_step"], row["steps"]) == (metrics.training.kept_step, 8)
    assert row["exact_json"]["value"] == adapter.exact_json.value
    assert row["harmful"] == adapter.harmful
    assert row["missed"] == [gate.name for gate in metrics.verdict.gates if not gate.passed]


def test_the_tables_show_means_and_every_adapter(row: dict[str, Any]) -> None:
    other = row | {"seed": 2, "seconds": 14.0, "emoji_intensity": {"value": 0.5, "lower": 0.4, "upper": 0.6}}
    judge = {"fit": True, "auc": {"salad": {"value": 0.94, "lower": 0.9}}, "sensitivity": 0.8, "specificity": 0.9}
    first = row | {"emoji_intensity": {"value": 0.7, "lower": 0.6, "upper": 0.8}, "judges": {"probe": judge}}
    text = table.tables([first, other])
    lines = text.splitlines()
    means = next(line for line in lines if line.startswith("| default | 3 | A | 2 |"))
    assert "| 0.60 (0.50 to 0.70) |" in means
    assert means.endswith(" | 13 |")
    assert sum(line.startswith("| default | 3 | A | ") for line in lines) == 3
    assert "| probe | yes | salad 0.94 (0.90) | 0.80 | 0.90 |" in lines
    # every table has as many cells in each row as in its head
    for number, line in enumerate(lines):
        if line.startswith("|---"):
            assert line.count("|") == lines[number - 1].count("|") == lines[number + 1].count("|")


def test_the_replies_to_read_are_the_adapters_own_and_always_the_same(made: MadeRun) -> None:
    lines = [reply.model_dump_json() for reply in made.replies]
    text = table.random_replies(lines, "default-p3-s1-A")
    assert text == table.random_replies(lines, "default-p3-s1-A")
    own = [reply for reply in made.replies if reply.model == "adapter"]
    # 12 replies are fewer than 40
    assert text.count("\n> ") == len(own) == 12
    assert all(reply.reply in text for reply in own)
