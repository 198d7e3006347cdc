"""Numbers against thresholds: may this adapter become the newest accepted one?"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from typing import Literal

from lora_trainer.config import GatesConfig
from lora_trainer.evaluate.metrics import Estimate, EvaluationMetrics, GateResult, RepliesMetrics, Verdict

_LOWER_BOUND_GATES = ("exact_json", "stop", "one_or_two_sentences", "informal_speech", "persona")


def gate_id(evaluation_id: str, config: GatesConfig) -> str:
    """16 hex digits: the evaluation and the thresholds. Another one judges a finished run again, and never trains it again."""
    thresholds = json.dumps(config.model_dump(mode="json"), sort_keys=True)
    return hashlib.sha256(f"{evaluation_id}\n{thresholds}".encode()).hexdigest()[:16]


def decide(evaluation: EvaluationMetrics, config: GatesConfig) -> Verdict:
    """Every gate that has a threshold, on the greedy replies: those come out the same when they are generated again."""
    gates = tuple(_gates(evaluation, config))
    return Verdict(gate_id=gate_id(evaluation.evaluation_id, config), passed=all(gate.passed for gate in gates), gates=gates)


def _gates(evaluation: EvaluationMetrics, config: GatesConfig) -> Iterator[GateResult]:
    adapter: RepliesMetrics = evaluation.greedy.adapter
    for name in _LOWER_BOUND_GATES:
        threshold: float | None = getattr(config, name)
        if threshold is not None:
            yield _gate(name, getattr(adapter, name), "lower 95 % bound (Clopper-Pearson)", ">=", threshold)
    if config.emoji_intensity is not None:
        yield _gate(
            "emoji_intensity", adapter.emoji_intensity, "lower 95 % bound (bootstrap by prompt)", ">", config.emoji_intensity
        )
    if config.question_rate_min is not None:
        yield _gate("question_rate_min", adapter.question, "lower 95 % bound (Clopper-Pearson)", ">=", config.question_rate_min)
    if config.question_rate_max is not None:
        yield _gate("question_rate_max", adapter.question, "upper 95 % bound (Clopper-Pearson)", "<=", config.question_rate_max)
    if config.win_rate is not None:
        yield _gate("win_rate", evaluation.greedy.win_rate, "lower 95 % bound (bootstrap by prompt)", ">", config.win_rate)


def _gate(name: str, estimate: Estimate, measure: str, relation: Literal[">=", ">", "<="], threshold: float) -> GateResult:
    bound = estimate.upper if relation == "<=" else estimate.lower
    # nothing was readable, so nothing is known: the worst that it could be
    compared = bound if bound is not None else (1.0 if relation == "<=" else -1.0)
    passed = {">=": compared >= threshold, ">": compared > threshold, "<=": compared <= threshold}[relation]
    return GateResult(
        name=name, measure=measure, value=estimate.value, compared=compared, relation=relation, threshold=threshold, passed=passed
    )


def missed(verdict: Verdict) -> list[str]:
    """One line for each gate that was not passed: which number, which threshold, by how much, and what to do."""
    return [
        f"gates.{gate.name}: got {gate.compared:.3f} ({gate.measure} of {gate.value:.3f}), expected {gate.relation} "
        f"{gate.threshold:g}: missed by {gate.missed_by:.3f}; {_ADVICE[gate.name]}"
        for gate in verdict.gates
        if not gate.passed
    ]


_ADVICE = {
    "exact_json": "look at the worst replies in report.html; too few steps or too high a learning rate breaks the JSON",
    "stop": "replies run into evaluation.max_new_tokens: train longer, or raise it if the data's replies are long",
    "one_or_two_sentences": "shorten the data's replies (validate --strict names them), or train longer",
    "informal_speech": "look for 존댓말 in the data (validate --strict names it), or train longer",
    "persona": "check that the data is this persona's, or train longer",
    "emoji_intensity": "the data's emoji have to rise with the intensity (validate shows it); train longer if they do",
    "question_rate_min": "too few replies ask back: so does the data, or the adapter is not trained enough",
    "question_rate_max": "nearly every reply asks back: so does the data, or the adapter is overtrained",
    "win_rate": "the adapter is no better than the base by the rules: train longer, or look at the worst replies in report.html",
}
