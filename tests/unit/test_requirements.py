"""Test the check of the libraries that a configuration needs: it names the setting to change and imports nothing."""

from __future__ import annotations

import subprocess
import sys
from importlib import metadata
from typing import Any

import pytest
from conftest import REPOSITORY

from lora_trainer.config_sources import settle
from lora_trainer.errors import ConfigError, HardwareError
from lora_trainer.run.identity import run_id, run_ingredients
from lora_trainer.train import requirements
from lora_trainer.train.requirements import require_stack

ALL = {"torch", "transformers", "trl", "peft", "datasets", "accelerate", "safetensors", "unsloth", "unsloth_zoo", "bitsandbytes"}
CPU_SET = ALL - {"unsloth", "unsloth_zoo", "bitsandbytes"}


def problems(monkeypatch: pytest.MonkeyPatch, installed: set[str], *, reference: bool = False, **settings: Any) -> str:
    """Return the problems of a configuration where only `installed` is."""

    def version(name: str) -> str:
        if name not in installed:
            raise metadata.PackageNotFoundError(name)
        return "1"

    monkeypatch.setattr(metadata, "version", version)
    monkeypatch.setattr(requirements, "has_driver", lambda: True)
    try:
        require_stack(settle({"blood_type": "A", **settings}, {}), reference=reference)
    except ConfigError as error:
        return str(error)
    return ""


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"device": "cpu"}, []),
        ({"device": "cpu", "backend": "transformers", "training.quantization": "none"}, []),
        (
            {"device": "cpu", "training.quantization": "nf4"},
            ["training.quantization: got nf4, which needs bitsandbytes", "set training.quantization=none"],
        ),
        (
            {"device": "cpu", "backend": "unsloth"},
            ["backend: got unsloth and unsloth, unsloth_zoo", "set backend=transformers"],
        ),
        ({"device": "cuda"}, ["backend: got auto, which is unsloth on CUDA", "training.quantization: got nf4"]),
        ({"backend": "transformers"}, ["set training.quantization=none, or pip install 'lora-trainer[cpu,gpu]'"]),
        ({"backend": "transformers", "training.quantization": "none"}, []),
        (
            {"device": "cpu", "evaluation.precision": "nf4"},
            ["evaluation.precision: got nf4, which needs bitsandbytes", "set evaluation.precision=training"],
        ),
        ({"device": "cpu", "evaluation.precision": "bfloat16"}, []),
        # it is trained in nf4, whatever it is evaluated in
        ({"backend": "transformers", "evaluation.precision": "bfloat16"}, ["training.quantization: got nf4"]),
    ],
)
def test_what_the_cpu_set_cannot_do(monkeypatch: pytest.MonkeyPatch, settings: dict[str, Any], said: list[str]) -> None:
    found = problems(monkeypatch, CPU_SET, **settings)
    assert bool(found) == bool(said)
    for part in said:
        assert part in found


def test_a_machine_without_a_driver_lacks_a_gpu_and_not_libraries(monkeypatch: pytest.MonkeyPatch) -> None:
    assert problems(monkeypatch, CPU_SET, device="cuda")
    monkeypatch.setattr(requirements, "has_driver", lambda: False)
    with pytest.raises(HardwareError, match="or pass --device cpu"):
        require_stack(settle({"blood_type": "A", "device": "cuda"}, {}))
    # without torch, the installation is the first thing to mend
    assert "the training stack is not installed" in problems(monkeypatch, CPU_SET - {"torch"}, device="cuda")


def test_the_full_set_can_do_everything(monkeypatch: pytest.MonkeyPatch) -> None:
    for device in ("cpu", "cuda"):
        for backend in ("auto", "unsloth", "transformers"):
            for quantization in ("auto", "nf4", "none"):
                settings = {"device": device, "backend": backend, "training.quantization": quantization}
                assert problems(monkeypatch, ALL, **settings) == ""


def test_evaluation_and_chat_need_no_unsloth(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = {"backend": "unsloth", "training.quantization": "none"}
    assert problems(monkeypatch, CPU_SET, reference=True, **settings) == ""


@pytest.mark.parametrize(
    ("precision", "said"),
    [("bfloat16", ""), ("training", "training.quantization: got nf4"), ("nf4", "training.quantization: got nf4")],
)
def test_evaluation_and_chat_load_no_base_for_training(monkeypatch: pytest.MonkeyPatch, precision: str, said: str) -> None:
    settings = {"training.quantization": "nf4", "evaluation.precision": precision}
    found = problems(monkeypatch, CPU_SET, reference=True, **settings)
    assert bool(found) == bool(said)
    assert said in found


@pytest.mark.parametrize("missing", ["torch", "peft", "accelerate"])
def test_a_library_of_the_set_is_missing(monkeypatch: pytest.MonkeyPatch, missing: str) -> None:
    found = problems(monkeypatch, CPU_SET - {missing}, device="cpu")
    assert found == f"the training stack is not installed ({missing} missing): pip install 'lora-trainer[cpu]'"


def test_the_check_imports_nothing() -> None:
    code = (
        "import sys\nfrom lora_trainer.config_sources import settle\nfrom lora_trainer.train.requirements import require_stack\n"
        "try:\n    require_stack(settle({'blood_type': 'A'}, {}))\nexcept Exception:\n    pass\n"
        "print([name for name in ('torch', 'transformers', 'unsloth', 'peft') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize(("device", "value"), [("cpu", "none"), ("cuda", "nf4")])
def test_the_default_is_the_run_that_its_value_would_be(device: str, value: str) -> None:
    """`auto` is resolved before anything hashes it, so run ids are those of the explicit value."""
    configs = [
        settle({"blood_type": "A", "device": device, **given}, {})
        for given in ({}, {"training.quantization": "auto"}, {"training.quantization": value}, {"training.epochs": 4})
    ]
    assert [config.training.quantization for config in configs] == [value] * 4
    assert len({run_id(run_ingredients(config, "d" * 64, "base")) for config in configs}) == 1
