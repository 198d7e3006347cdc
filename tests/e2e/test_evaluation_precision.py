"""Test that an adapter trained on a base in one precision is evaluated on the base in another one."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Literal

import pytest
from jobs import BASE, SHORT, events, job, require_training_stack

from lora_trainer.config import EvaluationConfig, RunConfig, TrainingConfig
from lora_trainer.persona.vocabulary import BloodType
from lora_trainer.train.backends import open_reference_backend

require_training_stack()
pytestmark = pytest.mark.e2e


def run_with(folder: Path, precision: str) -> subprocess.CompletedProcess[str]:
    return job(
        "run", "--blood-type", "A", *SHORT, "--set", f"evaluation.precision={precision}", "--output", str(folder / "out"),
        work_dir=folder / "work",
    )  # fmt: skip


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle whose adapter was trained in float32 and evaluated in bfloat16."""
    folder = tmp_path_factory.mktemp("precision")
    done = run_with(folder, "bfloat16")
    assert done.returncode == 0, done.stderr
    seen = events(done)
    assert seen["evaluation_precision"]["precision"] == "bfloat16"
    assert "evaluation_finished" in seen
    (manifest,) = folder.glob("out/adapters/A/*/manifest.json")
    return manifest.parent


@pytest.mark.parametrize(("precision", "dtype"), [("training", "torch.float32"), ("bfloat16", "torch.bfloat16")])
def test_the_base_has_the_asked_precision(served: Path, precision: Literal["training", "bfloat16"], dtype: str) -> None:
    config = RunConfig(
        blood_type=BloodType.A,
        device="cpu",
        backend="transformers",
        training=TrainingConfig(quantization="none", compute_dtype="float32"),
        evaluation=EvaluationConfig(precision=precision),
    )
    backend = open_reference_backend(config)
    backend.start()
    backend.load_tokenizer(BASE)
    backend.load_adapter(BASE, served)
    assert str(backend.model.get_base_model().get_input_embeddings().weight.dtype) == dtype


def test_nf4_needs_its_library_before_anything_is_trained(tmp_path: Path) -> None:
    done = run_with(tmp_path, "nf4")
    try:
        import bitsandbytes  # noqa: F401
    except ImportError:
        assert done.returncode == 2
        assert "evaluation.precision: got nf4" in done.stderr
        assert "bitsandbytes" in done.stderr
    else:
        assert done.returncode == 0, done.stderr
        assert events(done)["evaluation_precision"]["precision"] == "nf4"
