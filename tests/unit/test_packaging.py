"""Test which packages pip, uv and poetry install, and the commands for it in messages and documents."""

from __future__ import annotations

import importlib
import re
import sys
import tomllib
from pathlib import Path
from typing import Any, Final, Literal

import click
import pytest
from conftest import REPOSITORY
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from lora_trainer.config import RunConfig
from lora_trainer.errors import ConfigError
from lora_trainer.persona.vocabulary import BloodType
from lora_trainer.train.backends import open_backend

PYPROJECT: Final[dict[str, Any]] = tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))
PURE: Final[list[str]] = PYPROJECT["project"]["dependencies"]
EXTRAS: Final[dict[str, list[str]]] = PYPROJECT["project"]["optional-dependencies"]
GROUPS: Final[dict[str, list[str]]] = PYPROJECT["dependency-groups"]


def names(requirements: list[str]) -> set[str]:
    return {canonicalize_name(Requirement(line).name) for line in requirements}


def test_extras_are_the_documented_three_and_share_no_package() -> None:
    """Each package that two extras share would double Poetry's search."""
    assert set(EXTRAS) == {"cpu", "gpu", "trackers"}
    assert sum(map(len, EXTRAS.values())) == len(set().union(*map(names, EXTRAS.values())))


def test_trackers_are_in_the_dev_group_for_their_tests() -> None:
    assert set(EXTRAS["trackers"]) <= set(GROUPS["dev"])


def test_group_train_is_both_extras() -> None:
    assert sorted(GROUPS["train"]) == sorted(EXTRAS["cpu"] + EXTRAS["gpu"])


def test_plain_poetry_install_brings_the_training_stack() -> None:
    assert {"torch", "transformers", "trl", "peft", "datasets", "accelerate", "bitsandbytes", "unsloth"} <= names(GROUPS["train"])
    poetry = PYPROJECT["tool"]["poetry"]
    # This table must not mark a group as optional, and must require a Poetry version that reads [dependency-groups].
    assert poetry == {"requires-poetry": ">=2.2"}


def test_pip_and_uv_stay_without_it() -> None:
    training = names(GROUPS["train"])
    assert not names(PURE) & training
    # uv installs the group `dev` by default unless this table says otherwise
    assert "default-groups" not in PYPROJECT["tool"].get("uv", {})
    assert not names(GROUPS["dev"]) & training


def test_console_script() -> None:
    assert PYPROJECT["project"]["scripts"].keys() == {"lora-trainer"}
    module, _, function = PYPROJECT["project"]["scripts"]["lora-trainer"].partition(":")
    assert callable(getattr(importlib.import_module(module), function))
    assert isinstance(importlib.import_module("entrypoint.cli").cli, click.Group)


@pytest.mark.parametrize("name", ["README.md", "README.ko.md"])
def test_documented_installs(name: str) -> None:
    text = (REPOSITORY / name).read_text(encoding="utf-8")
    (gpu,) = [line for line in text.splitlines() if "'.[cpu,gpu]'" in line]
    assert "`poetry install`" in gpu
    assert "`uv sync --extra cpu --extra gpu`" in gpu
    assert "poetry run lora-trainer run --blood_type A" in text
    assert set(re.findall(r"(?:--extra|-E) (\w+)", text)) <= EXTRAS.keys()
    assert set(re.findall(r"--without (\w+)", text)) <= GROUPS.keys()


def sources() -> list[Path]:
    return [path for package in ("entrypoint", "lora_trainer") for path in (REPOSITORY / package).rglob("*.py")]


def test_messages_name_the_extras_as_the_documents_do() -> None:
    named = {extras for path in sources() for extras in re.findall(r"lora-trainer\[([^]]*)\]", path.read_text(encoding="utf-8"))}
    assert named == {"cpu", "cpu,gpu", "trackers"}


@pytest.mark.parametrize(
    ("backend", "device", "extras"),
    [
        ("unsloth", "cuda", "cpu,gpu"),
        ("transformers", "cuda", "cpu,gpu"),  # because of bitsandbytes
        ("unsloth", "cpu", "cpu,gpu"),
        ("transformers", "cpu", "cpu"),
    ],
)
def test_without_torch_the_message_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, backend: Literal["transformers", "unsloth"], device: Literal["cuda", "cpu"], extras: str
) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    config = RunConfig(blood_type=BloodType.A, backend=backend, device=device)
    with pytest.raises(ConfigError) as caught:
        open_backend(config).start()
    assert str(caught.value) == f"the training stack is not installed (torch is missing): pip install 'lora-trainer[{extras}]'"
