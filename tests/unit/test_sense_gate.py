"""The gate of sense: it counts where a judge passed its examination, and what keeps a judge from judging is said, never hidden."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from made_metrics import FORM_GATES, made_run
from structlog.testing import capture_logs

from lora_trainer.config import EvaluationConfig, GatesConfig
from lora_trainer.config_sources import settle
from lora_trainer.errors import DataError, DeviceLostError, HardwareError, Interrupted
from lora_trainer.evaluate.gates import decide, missed_gate_messages
from lora_trainer.evaluate.metrics import EvaluationMetrics, RunMetrics, Verdict
from lora_trainer.evaluate.scope import scope
from lora_trainer.evaluate.sense import SenseJudge
from lora_trainer.evaluate.sense_examination import examine
from lora_trainer.evaluate.sense_examples import SenseSet, bundled_examples
from lora_trainer.evaluate.sense_metrics import CorrectedRate, SenseMetrics
from lora_trainer.evaluate.sense_question import AmbiguousAnswersError
from lora_trainer.persona.vocabulary import BloodType
from lora_trainer.report.metrics_table import verdict_table
from lora_trainer.report.model_card import model_card
from lora_trainer.report.run_page import run_page
from lora_trainer.run.job import Job
from lora_trainer.run.sense import judge_sense

SENSE_ONLY = {**dict.fromkeys(FORM_GATES), "sense": "if_judged"}


def rate(value: float, lower: float) -> CorrectedRate:
    return CorrectedRate(value=value, lower=lower, upper=min(2 * value - lower, 1.0), accepted=300, of=480, effective=360.0)


@cache
def examined(knows: bool) -> Any:
    """Return the examination of a judge that knows the labels, or nothing."""
    generator = np.random.default_rng(3)
    examples = bundled_examples()
    scores = [float(generator.normal() + (4 * example.is_good if knows else 0)) for example in examples.examples]
    return examine("probe", "Qwen/Qwen2.5-7B-Instruct", examples, scores)


def judged(value: float = 0.9, lower: float = 0.85) -> SenseMetrics:
    return SenseMetrics(status="judged", reason="", judged_by="probe", sense=rate(value, lower), examinations=(examined(True),))


def unjudged(reason: str = "no judge passed its examination: probe (misses, salad)") -> SenseMetrics:
    return SenseMetrics(status="not_judged", reason=reason, judged_by=None, sense=None, examinations=(examined(False),))


def evaluation(sense: SenseMetrics | None) -> EvaluationMetrics:
    measured: EvaluationMetrics = made_run(prompts=6, sampled=False, steps=3).metrics.evaluation
    return measured.model_copy(update={"sense": sense})


def gates(**settings: object) -> GatesConfig:
    return GatesConfig.model_validate({**SENSE_ONLY, **settings})


# -- the verdict ----------------------------------------------------------------------------------------


def test_the_lower_bound_decides() -> None:
    for lower, passes in ((0.6, True), (0.5999, False)):
        verdict = decide(evaluation(judged(0.9, lower)), gates())
        (gate,) = verdict.gates
        assert (gate.name, gate.value, gate.compared, gate.threshold, gate.passed) == ("sense", 0.9, lower, 0.6, passes)
        assert verdict.passed is passes
        assert verdict.sense == "judged"
    (line,) = missed_gate_messages(verdict)
    assert line.startswith("gates.sense: got 0.600 (lower 95 % bound (corrected for the judge's errors) of 0.900), expected >= 0.6")
    assert "replies.jsonl" in line
    assert decide(evaluation(judged(0.5, 0.4)), gates(sense_min=0.4)).passed


@pytest.mark.parametrize("sense", [unjudged(), None])
def test_without_a_judge_the_other_gates_decide_and_the_verdict_says_so(sense: SenseMetrics | None) -> None:
    verdict = decide(evaluation(sense), gates())
    assert (verdict.passed, verdict.gates, verdict.sense) == (True, (), "not_judged")
    assert verdict.not_judged["sense"] == "no_judge"
    said = scope(verdict).not_judged
    assert "whether the replies make sense" in said
    assert ("no judge passed its examination: probe (misses, salad)" in said) is (sense is not None)


def test_required_and_not_judged_is_a_missed_gate_that_says_why() -> None:
    verdict = decide(evaluation(unjudged()), gates(sense="required"))
    assert (verdict.passed, verdict.sense) == (False, "not_judged")
    (line,) = missed_gate_messages(verdict)
    assert line.startswith(
        "gates.sense: required, and nobody could judge it: no judge passed its examination: probe (misses, salad); "
    )
    assert "evaluation.judge_model" in line
    assert "if_judged" in line
    # with a judge, required is no stricter
    assert decide(evaluation(judged()), gates(sense="required")).passed


def test_none_looks_at_nothing() -> None:
    verdict = decide(evaluation(judged(0.1, 0.0)), gates(sense=None))
    assert (verdict.passed, verdict.gates, verdict.not_judged["sense"]) == (True, (), "off")
    assert "gates.sense is off" in scope(verdict).not_judged
    # no threshold: the number is shown, and no more
    shown = decide(evaluation(judged(0.1, 0.0)), gates(sense_min=None))
    assert (shown.passed, shown.gates, shown.sense) == (True, (), "judged")
    assert "sense" in scope(shown).judged


@pytest.mark.parametrize(("text", "value"), [("none", None), ("required", "required"), ("if_judged", "if_judged")])
def test_settings_as_text(text: str, value: str | None) -> None:
    assert settle({"blood_type": "A"}, {"LORA_TRAINER_GATES__SENSE": text}).gates.sense == value


def test_a_verdict_survives_its_manifest() -> None:
    for sense in (judged(), unjudged()):
        verdict = decide(evaluation(sense), gates(sense="required"))
        assert Verdict.model_validate(json.loads(verdict.model_dump_json())) == verdict


# -- what people see ------------------------------------------------------------------------------------


def run_with(found: SenseMetrics, **settings: object) -> RunMetrics:
    metrics: RunMetrics = made_run(prompts=6, sampled=False, steps=3).metrics
    measured = metrics.evaluation.model_copy(update={"sense": found})
    verdict = decide(measured, GatesConfig.model_validate(settings))
    return metrics.model_copy(update={"evaluation": measured, "verdict": verdict})


def shown(metrics: RunMetrics) -> tuple[str, str, str]:
    """Return the page, the model card and the terminal's table."""
    from rich.console import Console

    made = made_run(prompts=6, sampled=False, steps=3)
    console = Console(width=300, record=True, file=io.StringIO())
    console.print(verdict_table(metrics.blood_type, metrics.run_id, metrics.verdict))
    page = run_page(metrics, made.facts, made.steps, made.replies)
    return page, model_card(made.config, _base(), metrics), console.export_text()


def _base() -> Any:
    from lora_trainer.base_model import Base

    return Base("Qwen/Qwen2.5-7B-Instruct", "a" * 40, "Qwen/Qwen2.5-7B-Instruct@" + "a" * 40, None)


def test_a_judged_run_shows_the_rate_its_bounds_and_the_examination() -> None:
    page, card, table = shown(run_with(judged(0.82, 0.74)))
    assert '<section id="sense">' in page
    assert "82.0\u00a0%" in page
    assert "74.0\u00a0% to 90.0\u00a0%" in page
    assert page.count("fit for use") >= 4
    assert "finds sense in 82% of the readable replies (95 % bounds 74% and 90%" in card
    assert "sense, by a judge that passed its examination" in table


def test_a_run_that_nobody_could_judge_says_so_everywhere() -> None:
    reason = "endpoint: 16 requests failed (APITimeoutError)"
    for text in shown(run_with(unjudged(reason), sense="required")):
        assert reason in text
    page = shown(run_with(unjudged("<script>alert(1)</script>")))[0]
    assert "<script>alert(1)" not in page


# -- what keeps a judge from judging --------------------------------------------------------------------


class Base:
    """A base that fails as `fail` says, or reads features that tell nothing."""

    def __init__(self, fail: Callable[[int], None] = lambda _: None) -> None:
        self.fail = fail
        self.read = 0

    def base_reply_features(self, conversations: Sequence[Any], replies: Sequence[str], batch_size: int) -> Any:
        self.fail(self.read)
        self.read += len(replies)
        return np.random.default_rng(self.read).normal(size=(len(replies), 8)).astype(np.float32)

    def base_word_logits(self, conversations: Sequence[Any], words: Sequence[str], batch_size: int) -> Any:
        self.fail(-1)
        return np.zeros((len(conversations), 2), dtype=np.float32)


def raising(error: BaseException, after: int = 0) -> Callable[[int], None]:
    def fail(read: int) -> None:
        if read < 0 or read >= after:
            raise error

    return fail


def judge_of(base: Base, folder: Path, examples: SenseSet | None = None) -> SenseJudge:
    return SenseJudge(examples or bundled_examples(), base, EvaluationConfig(), "tiny", "sha256:1", folder)


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (HardwareError("GPU memory ran out while the base read 120 replies at once: lower evaluation.batch_size"), "batch_size"),
        (DataError("prompt 3: its text would become a control token"), "control token"),
        (AmbiguousAnswersError("same"), "begin with the same token"),
    ],
)
def test_a_base_that_cannot_be_read_leaves_sense_unjudged(error: Exception, said: str, tmp_path: Path) -> None:
    judge = judge_of(Base(raising(error)), tmp_path)
    with capture_logs() as log:
        judges = judge.examine()
    found = judge.judge(judges, made_run(prompts=6, sampled=False, steps=3).replies, BloodType.A).metrics
    assert (found.status, set(found.unexamined)) == ("not_judged", {"probe", "question"})
    assert said in found.reason
    assert [(line["event"], line["judge"], line["log_level"]) for line in log] == [
        ("sense_judge_not_examined", name, "warning") for name in ("probe", "question")
    ]
    # another attempt asks again
    assert judge_of(Base(), tmp_path).examine().examinations


def test_hidden_states_that_are_no_numbers_leave_sense_unjudged(tmp_path: Path) -> None:
    class Overflowing(Base):
        def base_reply_features(self, conversations: Sequence[Any], replies: Sequence[str], batch_size: int) -> Any:
            return np.full((len(replies), 8), np.inf, dtype=np.float32)

    assert "not finite" in judge_of(Overflowing(), tmp_path).examine().unexamined["probe"]


def test_a_lost_device_still_ends_the_run(tmp_path: Path) -> None:
    with pytest.raises(DeviceLostError):
        judge_of(Base(raising(DeviceLostError("the GPU fell off the bus"))), tmp_path).examine()


def test_an_interrupted_examination_resumes(tmp_path: Path) -> None:
    whole = len(bundled_examples().examples)
    first = Base(raising(Interrupted("SIGTERM"), after=600))
    with pytest.raises(Interrupted):
        judge_of(first, tmp_path).examine()
    assert first.read == 768
    second = Base()
    resumed = judge_of(second, tmp_path).examine()
    assert second.read == whole - 768
    third = Base()
    assert judge_of(third, tmp_path).examine().examinations == resumed.examinations
    assert third.read == 0


def test_the_job_judges_with_the_base_that_it_has_loaded(tmp_path: Path) -> None:
    class Backend(Base):
        name = "transformers"

    made = made_run(prompts=6, sampled=False, steps=3)
    seen = []
    for gate in ("if_judged", None):
        job = Job(settle({"blood_type": "A", "device": "cpu", "work_dir": str(tmp_path / "work"), "gates.sense": gate}, {}))
        backend: Any = Backend()
        with capture_logs() as log:
            found, replies = judge_sense(job, backend, _base(), made.replies, job.progress(tmp_path, "0123"))
        seen.append((found and found.status, backend.read > 0, [line["event"] for line in log][-1:], set(job.timings_s)))
        assert replies == list(made.replies)
    assert seen == [
        ("not_judged", True, ["sense_judged"], {"examine_sense", "judge_sense"}),
        (None, False, [], set()),
    ]
    assert json.loads((tmp_path / "progress.json").read_bytes())["stage"] == "judge"
    assert list((tmp_path / "work" / "sense").rglob("probe.json"))
