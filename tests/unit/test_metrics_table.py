"""Test the table that `evaluate` and the demo print: it shows the numbers of metrics.json and how far each gate was missed."""

from __future__ import annotations

import io

import pytest
from made_depth import all_replies, measured
from made_metrics import made_run
from rich.console import Console

from lora_trainer.evaluate.metrics import RunMetrics
from lora_trainer.evaluate.scope import scope
from lora_trainer.report import metrics_table


def shown(metrics: RunMetrics) -> str:
    out = io.StringIO()
    Console(file=out, width=120).print(metrics_table.metrics_table(metrics))
    return out.getvalue()


@pytest.mark.parametrize("flaws", [0.004, 0.3])
def test_the_table_has_the_metrics_numbers(flaws: float) -> None:
    metrics = made_run(flaws=flaws).metrics
    text = shown(metrics)
    assert ("gates passed" in text) is metrics.verdict.passed
    assert ("gates NOT passed" in text) is not metrics.verdict.passed
    lines = {line.split("│")[1].strip(): line for line in text.splitlines() if line.startswith("│")}
    for gate in metrics.verdict.gates:
        digits = "g" if gate.is_count else ".3f"
        assert f"{gate.compared:{digits}}" in lines[gate.name]
        for number in (gate.floor, gate.ceiling):
            assert ("–" if number is None else f"{number:{digits}}") in lines[gate.name]
        assert ("ok" if gate.passed else f"missed by {gate.missed_by:{digits}}") in lines[gate.name]
    # beside the verdict, before its numbers
    covered = scope(metrics.verdict)
    assert covered.judged in text.partition("exact_json")[0]
    assert covered.not_judged in text.partition("exact_json")[0]
    greedy = metrics.evaluation.greedy
    assert f"{greedy.adapter.exact_json.value:.1%}" in lines["exact JSON"]
    assert f"{greedy.base.informal_speech.value:.1%}" in lines["반말"]
    assert metrics.evaluation.people is not None
    assert f"{metrics.evaluation.people.persona.value:.1%}" in lines["recognised as this persona"]
    assert f"{metrics.held_out.loss_adapter:.3f}" in lines["held-out loss"]


def test_both_verdicts_were_shown() -> None:
    assert made_run(flaws=0.004).metrics.verdict.passed
    assert not made_run(flaws=0.3).metrics.verdict.passed


def test_a_deep_evaluation_has_a_table_of_its_own() -> None:
    metrics = made_run(prompts=30).metrics
    assert "in depth" not in shown(metrics)
    depth = measured(all_replies("adapter", good=True), all_replies("base", good=False))
    text = shown(metrics.model_copy(update={"evaluation": metrics.evaluation.model_copy(update={"depth": depth})}))
    lines = {line.split("│")[1].strip(): line for line in text.splitlines() if line.startswith("│")}
    holds = depth.adapter.pressure.holds
    assert [cell.strip() for cell in lines["holds under pressure"].split("│")[2:5]] == [
        "100.0%",
        f"{holds.lower:.1%} – 100.0%",
        "0.0%",
    ]
    assert "+100 points" in lines["right answers, adapter less base"]
    # the base wrote nothing readable that could repeat
    assert lines["conversations: repeats an earlier reply"].split("│")[4].strip() == "–"
    assert "No gate compares these." in text
