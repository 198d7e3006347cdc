"""Test `logging.report_to`: the ways to set it, and the error for a tracker that is not installed."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

from entrypoint.cli import run_cli
from lora_trainer.config_sources import parse_override, settle
from lora_trainer.errors import ConfigError, ExitCode
from lora_trainer.train.trackers import require_installed

A = {"blood_type": "A"}
SETTING = "logging.report_to"
VARIABLE = "LORA_TRAINER_LOGGING__REPORT_TO"


def test_no_tracker_unless_asked_for() -> None:
    assert settle(A, {}).logging.report_to == ()


@pytest.mark.parametrize(
    ("text", "trackers"),
    [
        ("tensorboard", ("tensorboard",)),
        ("tensorboard,mlflow,wandb", ("tensorboard", "mlflow", "wandb")),
        (" wandb , mlflow ", ("wandb", "mlflow")),
        ("none", ()),
        ("", ()),
    ],
)
def test_one_text_from_each_source(text: str, trackers: tuple[str, ...], tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(f"logging: {{report_to: '{text}'}}", encoding="utf-8")
    assert settle(A, {}, file).logging.report_to == trackers
    assert settle({**A, SETTING: text}, {}).logging.report_to == trackers
    assert settle({**A, **dict([parse_override(f"{SETTING}={text}")])}, {}).logging.report_to == trackers
    if text:
        # an empty variable counts as unset
        assert settle(A, {VARIABLE: text}).logging.report_to == trackers


@pytest.mark.parametrize(
    ("yaml", "trackers"), [("[mlflow, wandb]", ("mlflow", "wandb")), ("tensorboard", ("tensorboard",)), ("", ()), ("[]", ())]
)
def test_yaml_takes_lists_too(yaml: str, trackers: tuple[str, ...], tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(f"logging:\n  report_to: {yaml}\n", encoding="utf-8")
    assert settle(A, {}, file).logging.report_to == trackers


def test_environment_takes_json() -> None:
    assert settle(A, {VARIABLE: '["wandb", "mlflow"]'}).logging.report_to == ("wandb", "mlflow")


def test_none_on_the_command_line_is_stronger_than_the_environment() -> None:
    assert settle({**A, SETTING: "none"}, {VARIABLE: "wandb"}).logging.report_to == ()


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("comet", "command line: logging.report_to: got 'comet'; input should be 'tensorboard', 'mlflow' or 'wandb'"),
        ("wandb,none", "command line: logging.report_to: got 'none'; input should be 'tensorboard', 'mlflow' or 'wandb'"),
        ("wandb,wandb", "command line: logging.report_to: got 'wandb,wandb'; expected each tracker once"),
    ],
)
def test_what_is_no_tracker(text: str, said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        settle({**A, SETTING: text}, {})
    assert caught.value.problems == (said,)


def test_every_missing_library_is_named_with_what_installs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("tensorboard", "sqlalchemy", "wandb"):
        monkeypatch.setitem(sys.modules, module, None)
    monkeypatch.setitem(sys.modules, "mlflow", _module("mlflow"))
    monkeypatch.setitem(sys.modules, "alembic", _module("alembic"))
    require_installed(())
    with pytest.raises(ConfigError) as caught:
        require_installed(("tensorboard", "mlflow", "wandb"))
    assert caught.value.exit_code == ExitCode.CONFIG
    assert caught.value.problems == (
        "logging.report_to: tensorboard is not installed (tensorboard missing): pip install 'lora-trainer[trackers]'",
        "logging.report_to: mlflow is not installed (sqlalchemy missing): pip install 'lora-trainer[trackers]'",
        "logging.report_to: wandb is not installed (wandb missing): pip install 'lora-trainer[trackers]'",
    )


def _module(name: str) -> Any:
    import importlib.util
    from importlib.machinery import ModuleSpec

    return importlib.util.module_from_spec(ModuleSpec(name, None, origin=f"{name}/__init__.py"))


def test_a_folder_of_runs_is_not_the_library(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "wandb").mkdir()
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    with pytest.raises(ConfigError, match="wandb is not installed"):
        require_installed(("wandb",))


def test_run_says_so_before_it_fetches_the_data(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    arguments = ["run", "--blood-type", "A", "--device", "cpu", "--report-to", "wandb", "--data", str(tmp_path / "none.jsonl")]
    assert run_cli([*arguments, "--work-dir", str(tmp_path / "work")]) == ExitCode.CONFIG
    said = capsys.readouterr().err
    assert "wandb is not installed (wandb missing): pip install 'lora-trainer[trackers]'" in said
    assert "none.jsonl: no such" not in said
    assert not (tmp_path / "work").exists()
