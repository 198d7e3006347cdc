"""Which trials a sweep makes, drops and ranks first, and how it shows them."""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from pathlib import Path

import pytest
from made_sweep import sweep_record, trial, verdict
from rich.console import Console

from lora_trainer.errors import ConfigError
from lora_trainer.report.sweep_page import sweep_page, sweep_table
from lora_trainer.run.sweep_trials import TRIED, trial_configs
from lora_trainer.store.documents import parse_object, validated
from lora_trainer.train.sweep import RUNGS, SweepRecord, best_of, dropped_at, pause_step, places, sweep_id

GIVEN = {"blood_type": "A", "device": "cpu"}


# -- the trials ----------------------------------------------------------------------------------------


def test_every_combination_is_a_trial(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("training: {epochs: 9, learning_rate: 0.5, seed: 3}\n")
    trials = trial_configs(["training.learning_rate=1e-4,2e-4", "training.max_steps=5,none"], GIVEN, file)
    assert [dict(trial.tried) for trial in trials] == [
        {"training.learning_rate": rate, "training.max_steps": steps} for rate in (1e-4, 2e-4) for steps in (5, None)
    ]
    assert [trial.config.training.learning_rate for trial in trials] == [1e-4, 1e-4, 2e-4, 2e-4]
    # the rest comes from where it always comes from
    assert {(trial.config.training.epochs, trial.config.training.seed) for trial in trials} == {(9.0, 3)}


@pytest.mark.parametrize(
    ("tries", "said"),
    [
        (["training.learning_rate=1e-4"], ["got 1 combination (", "expected 2 to 32", "'lora-trainer run'"]),
        ([], ["no --try", "expected 2 to 32"]),
        (["training.epochs=1,2,3,4,5,6", "lora.r=1,2,3,4,5,6"], ["36 combinations", "6 of training.epochs", "expected 2 to 32"]),
        (["training.epochs=1,2", "training.epochs=3"], ["--try training.epochs", "twice"]),
        (["training.learning_rate=1e-4,0.0001"], ["--try training.learning_rate", "same value twice"]),
        (["training.epochs=1,,2"], ["--try training.epochs", "empty value"]),
        (["training.epochs="], ["--try training.epochs", "empty value"]),
        (["training.seed=1,2"], ["training.seed", "setting of its own"]),
        (["training.epoch=1,2"], ["--try training.epoch=…", "SETTING=VALUE,VALUE", "training.epochs"]),
        (["training.epochs"], ["--try training.epochs", "SETTING=VALUE,VALUE"]),
        (["training.epochs=1,-2", "lora.r=many,4"], ["training.epochs: got '-2'", "lora.r: got 'many'"]),
    ],
)
def test_what_is_no_sweep_is_refused(tries: Sequence[str], said: Sequence[str]) -> None:
    with pytest.raises(ConfigError) as refused:
        trial_configs(tries, {**GIVEN, "training.seed": 4}, None)
    assert [text for text in said if text not in str(refused.value)] == []


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("training.held_out_fraction", "which records are held out"),
        ("training.max_length_tokens", "which records are held out"),
        ("training.held_out_measurements_per_epoch", "how the held-out loss is used"),
        ("training.keep", "how the held-out loss is used"),
        ("training.early_stopping", "how the held-out loss is used"),
        ("training.quantization", "base"),
        ("training.compute_dtype", "base"),
        ("lora.target_modules", "lists"),
        ("base.model", "no part of the recipe"),
        ("data", "no part of the recipe"),
        ("gates.persona", "no part of the recipe"),
    ],
)
def test_settings_that_change_base_or_held_out_records_are_refused_with_the_reason(name: str, reason: str) -> None:
    with pytest.raises(ConfigError) as refused:
        trial_configs([f"{name}=1,2", "training.epochs=1,2"], GIVEN, None)
    (problem,) = refused.value.problems
    assert problem.startswith(f"--try {name}: can't be tried: ")
    assert reason in problem
    assert f"--set {name}=" in problem
    assert all(tried in problem for tried in TRIED)


# -- dropping and ranking ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("count", "after"), [(2, (2, 2)), (3, (2, 2)), (4, (2, 2)), (5, (3, 2)), (6, (3, 2)), (8, (4, 2)), (9, (5, 3)), (32, (16, 8))]
)
def test_the_better_half_goes_on_rounded_up_and_at_least_two(count: int, after: tuple[int, int]) -> None:
    trials = [trial(str(number)) for number in range(count)]
    assert tuple(places(trials, share) for share in RUNGS) == after


def test_the_highest_losses_are_dropped_at_each_rung() -> None:
    trials = [trial("a", 2.0), trial("b", 1.0), trial("c", 3.0), trial("d", 1.5), trial("e", 2.5)]
    assert dropped_at(trials, RUNGS[0]) == ["e", "c"]
    left = [each.model_copy(update={"state": "dropped"}) if each.run_id in "ce" else each for each in trials]
    # deciding again, after an interruption, drops nobody else
    assert dropped_at(left, RUNGS[0]) == []
    # what counts is the loss at this rung, not at the one before
    later = [trial("a", 2.0, 0.5), trial("b", 1.0, 0.9), trial("d", 1.5, 0.8), *left[2:3], *left[4:]]
    assert dropped_at(later, RUNGS[1]) == ["b"]


def test_of_equal_losses_the_first_trial_goes_on() -> None:
    assert dropped_at([trial("a", 1.0), trial("b", 1.0), trial("c", 1.0)], RUNGS[0]) == ["c"]


def test_a_diverged_trial_is_among_the_dropped() -> None:
    trials = [trial("a", 2.0), trial("b", 1.0), trial("c", state="diverged"), trial("d", 1.5)]
    assert dropped_at(trials, RUNGS[0]) == ["a"]


def test_a_published_trial_takes_nobodys_place() -> None:
    published = trial("p", state="trained", was_published=True, loss=0.1)
    assert dropped_at([published, trial("a", 2.0), trial("b", 1.0)], RUNGS[0]) == []


@pytest.mark.parametrize(("planned", "steps"), [(100, (25, 50)), (6, (2, 3)), (3, (1, 2)), (2, (1, 1)), (1, (1, 1))])
def test_rungs_are_whole_steps(planned: int, steps: tuple[int, int]) -> None:
    assert tuple(pause_step(share, planned) for share in RUNGS) == steps


def test_gates_rank_before_losses() -> None:
    trials = [
        trial("misses two", loss=1.0, state="trained", verdict=verdict("persona", "stop")),
        trial("misses one", loss=2.0, state="trained", verdict=verdict("persona")),
        trial("misses one, later", loss=3.0, state="trained", verdict=verdict("stop")),
        trial("not evaluated", loss=4.0, state="trained"),
    ]
    assert best_of(trials).run_id == "misses one"
    assert best_of([*trials, trial("passes", loss=9.0, state="trained", verdict=verdict())]).run_id == "passes"


def test_the_id_depends_on_trials_and_gates_and_not_on_the_order() -> None:
    assert sweep_id(["a", "b"], "g") == sweep_id(["b", "a"], "g")
    assert len({sweep_id(["a", "b"], "g"), sweep_id(["a", "b"], "h"), sweep_id(["a", "c"], "g")}) == 3


# -- showing -------------------------------------------------------------------------------------------


def test_the_record_is_read_as_it_was_written() -> None:
    written = json.dumps(sweep_record().as_json()).encode()
    assert validated(SweepRecord, parse_object(written, "sweep.json"), "sweep.json") == sweep_record()
    assert json.loads(written)["schema"] == 1


def test_the_table_has_settings_steps_loss_gates_seconds_and_result() -> None:
    out = io.StringIO()
    Console(file=out, width=160).print(sweep_table(sweep_record()))
    lines = out.getvalue().splitlines()
    assert "learning_rate" in "".join(lines[:3])
    row = {line.split()[0]: line for line in lines if line.split()[:1] and line.split()[0] in "12345"}
    assert [text for text in ("0.0002", "100 of 100", "2.100", "passed", "12.5", "winner") if text not in row["2"]] == []
    assert "1 missed: Recognised as this persona" in row["1"]
    assert [text for text in ("dropped at 25", "25 of 100", "not evaluated") if text not in row["3"]] == []
    assert "diverged" in row["4"]
    assert "trained, published" in row["5"]
    assert "4.500" in out.getvalue()


def test_on_a_narrow_terminal_a_result_stays_on_one_line() -> None:
    out = io.StringIO()
    Console(file=out, width=80).print(sweep_table(sweep_record()))
    assert "dropped at 25" in out.getvalue()


def test_the_page_is_self_contained_and_escapes_what_others_named() -> None:
    html = sweep_page(sweep_record())
    assert html.count("<svg") == 1
    assert "http" not in html.replace("http://www.w3.org", "")
    assert "<lora>" not in html
    assert "&lt;lora&gt;" in html
    assert "The winner passed its gates" in html
    assert "0.0002" in html
    for name in ("winner", "trained to the end", "dropped"):
        assert f">{name}</text>" in html


def test_an_unfinished_record_has_a_page_too() -> None:
    trials = (trial("a"), trial("b"))
    begun = sweep_record().model_copy(update={"winner": None, "bundle": None, "finished_at": None, "trials": trials})
    assert "gates</strong>" not in sweep_page(begun)
