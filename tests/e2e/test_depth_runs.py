"""Test `evaluation.depth: full` in a whole run on the tiny base, evaluated in another precision than it was trained in.

One job serves all tests: what it writes, what a later run does with it, and which base the evaluation loads.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pytest
from jobs import BASE, SHORT, events, job, require_training_stack

from lora_trainer.config import EvaluationConfig, RunConfig, TrainingConfig
from lora_trainer.evaluate.depth_questions import TURNS, depth_questions
from lora_trainer.persona.vocabulary import BloodType
from lora_trainer.run.bundle_checks import check_bundle
from lora_trainer.train.backends import open_reference_backend

require_training_stack()
pytestmark = pytest.mark.e2e

FULL = (
    *SHORT, "--set", "evaluation.depth=full", "--set", "evaluation.precision=bfloat16", "--set", "evaluation.max_new_tokens=8",
)  # fmt: skip


@dataclass(frozen=True)
class Ran:
    """A finished run."""

    output: Path
    work_dir: Path
    log: dict[str, dict[str, Any]]

    @property
    def bundle(self) -> Path:
        """Folder of the published bundle."""
        (latest,) = self.output.glob("adapters/A/*/manifest.json")
        return latest.parent


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> Ran:
    folder = tmp_path_factory.mktemp("depth")
    done = job("run", "--blood-type", "A", *FULL, "--output", str(folder / "out"), work_dir=folder / "work")
    assert done.returncode == 0, done.stderr
    return Ran(folder / "out", folder / "work", events(done))


def test_everything_is_asked_of_both_models_and_recorded(ran: Ran) -> None:
    questions = depth_questions()
    asked = len(questions.conversations) * TURNS + len(questions.pressed) + len(questions.abilities)
    lines = [json.loads(line) for line in (ran.bundle / "depth_replies.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [line["model"] for line in lines] == ["adapter"] * asked + ["base"] * asked
    assert ran.log["depth_evaluated"]["replies"] == 2 * asked
    depth = json.loads((ran.bundle / "metrics.json").read_text(encoding="utf-8"))["evaluation"]["depth"]
    assert depth["adapter"]["pressure"]["holds"]["of"] == len(questions.pressed)
    assert depth["base"]["conversations"]["exact_json"]["of"] == len(questions.conversations) * TURNS


def test_the_progress_and_the_seconds_include_these_replies(ran: Ran) -> None:
    evaluation = json.loads((ran.bundle / "metrics.json").read_text(encoding="utf-8"))["evaluation"]
    assert evaluation["sampled"] is None
    told = ran.log["evaluation_progress"]
    assert told["replies"] == told["of"] == 2 * (evaluation["replies"] + depth_questions().count)
    timings_s = json.loads((ran.bundle / "manifest.json").read_text(encoding="utf-8"))["timings_s"]
    assert ran.log["evaluation_finished"]["evaluate_s"] >= round(timings_s["evaluate_depth"], 1)


def test_the_bundle_holds_together(ran: Ran) -> None:
    assert check_bundle(ran.bundle).metrics.evaluation.depth


def test_a_reply_that_was_begun_goes_on_from_there(ran: Ran) -> None:
    """The tiny base was trained to write JSON, so it ends the object that was begun, and not a second one inside it."""
    lines = [json.loads(line) for line in (ran.bundle / "depth_replies.jsonl").read_text(encoding="utf-8").splitlines()]
    begun = [line for line in lines if line["begun"].startswith("{")]
    assert begun
    assert not any(line["reply"].startswith('{"text"') for line in begun)


def test_other_thresholds_copy_the_deep_replies(ran: Ran) -> None:
    again = job(
        "run", "--blood-type", "A", *FULL, "--set", "gates.exact_json=0", "--output", str(ran.output), work_dir=ran.work_dir
    )
    assert again.returncode == 0, again.stderr
    assert "depth_evaluated" not in events(again)
    (later,) = ran.bundle.glob("evaluations/*/depth_replies.jsonl")
    assert later.read_bytes() == (ran.bundle / "depth_replies.jsonl").read_bytes()


def test_the_base_was_loaded_again_for_the_evaluation(ran: Ran) -> None:
    assert ran.log["evaluation_precision"]["precision"] == "bfloat16"


@pytest.mark.parametrize(("precision", "dtype"), [("training", "torch.float32"), ("bfloat16", "torch.bfloat16")])
def test_the_base_has_the_precision_that_was_asked_for(ran: Ran, precision: Literal["training", "bfloat16"], dtype: str) -> None:
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
    backend.load_adapter(BASE, ran.bundle)
    assert str(backend.model.get_base_model().get_input_embeddings().weight.dtype) == dtype
