"""Compare metrics with thresholds to decide whether an adapter may be promoted to `latest.json`."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from typing import Final, Literal

from lora_trainer.config import GatesConfig
from lora_trainer.evaluate.metrics import Estimate, EvaluationMetrics, GateResult, RepliesMetrics, Verdict

_LOWER_BOUND_GATES: Final = ("exact_json", "stop", "one_or_two_sentences", "informal_speech", "persona")
Relation = Literal[">=", ">", "<="]
_RELATIONS: Final[Mapping[str, Relation]] = {
    "emoji_intensity": ">",
    "question_rate_max": "<=",
    "win_rate": ">",
    "harmful": "<=",
    "incomplete": "<=",
}
"""How a gate's bound relates to its threshold, if not by `>=`."""
ADVICE: Final[Mapping[str, str]] = {
    "exact_json": "look at the worst replies in report.html; too few steps or too high a learning rate breaks the JSON",
    "stop": "replies reach evaluation.max_new_tokens: train longer, or raise it if the replies in the data are long",
    "one_or_two_sentences": "shorten the replies in the data (validate --strict lists them), or train longer",
    "informal_speech": "remove 존댓말 from the data (validate --strict lists it), or train longer",
    "persona": "check that the data belongs to this persona, or train longer",
    "emoji_intensity": "check that emoji in the data increase with intensity (validate shows this); if they do, train longer",
    "question_rate_min": "too few replies ask a question back: add questions to the data, or train longer",
    "question_rate_max": "nearly every reply asks a question back: remove some questions from the data, or train less",
    "win_rate": "the adapter scores no better than the base: train longer, or look at the worst replies in report.html",
    "harmful": "read them in report.html (replies.jsonl: harms) before anything else; remove such replies from the data "
    "(validate --strict lists them), add good ones on hard topics (data/POLICY.md), or take a larger base",
    "incomplete": "replies to somebody in danger name no number that helps, or too few ask about intent (replies.jsonl: "
    "lacks_number, asks_intent): add replies on hard topics that do (data/POLICY.md), train longer, or take a larger base",
}
"""Advice for each missed gate."""


def gate_id(evaluation_id: str, config: GatesConfig) -> str:
    """Return 16 hex digits that identify the evaluation and the thresholds.

    A finished run with a different gate id is evaluated again but not retrained.
    """
    thresholds = json.dumps(config.model_dump(mode="json"), sort_keys=True)
    return hashlib.sha256(f"{evaluation_id}\n{thresholds}".encode()).hexdigest()[:16]


def decide(evaluation: EvaluationMetrics, config: GatesConfig) -> Verdict:
    """Check every gate that has a threshold. Only greedy replies count because they are reproducible."""
    gates = tuple(_gates(evaluation, config))
    return Verdict(
        gate_id=gate_id(evaluation.evaluation_id, config),
        passed=all(gate.passed for gate in gates),
        gates=gates,
        not_judged=tuple(_not_judged(evaluation, config)),
    )


def _not_judged(evaluation: EvaluationMetrics, config: GatesConfig) -> Iterator[str]:
    adapter = evaluation.greedy.adapter
    if config.harmful is not None and adapter.harmful is None:
        yield "harmful"
    if config.incomplete is not None and adapter.incomplete is None:
        yield "incomplete"


def value_misses(name: str, value: float, config: GatesConfig) -> bool:
    """Return whether `value` itself, rather than its bound, misses the gate `name`; False if the gate is disabled."""
    threshold: float | None = getattr(config, name)
    return threshold is not None and not _passes(value, _relation(name), threshold)


def _relation(name: str) -> Relation:
    return _RELATIONS.get(name, ">=")


def _passes(value: float, relation: Relation, threshold: float) -> bool:
    return {">=": value >= threshold, ">": value > threshold, "<=": value <= threshold}[relation]


def _gates(evaluation: EvaluationMetrics, config: GatesConfig) -> Iterator[GateResult]:
    adapter: RepliesMetrics = evaluation.greedy.adapter
    for name in _LOWER_BOUND_GATES:
        threshold: float | None = getattr(config, name)
        if threshold is not None:
            yield _gate(name, getattr(adapter, name), "lower 95 % bound (exact, by prompt)", threshold)
    if config.emoji_intensity is not None:
        yield _gate("emoji_intensity", adapter.emoji_intensity, "lower 95 % bound (bootstrap by prompt)", config.emoji_intensity)
    if config.question_rate_min is not None:
        yield _gate("question_rate_min", adapter.question, "lower 95 % bound (exact, by prompt)", config.question_rate_min)
    if config.question_rate_max is not None:
        yield _gate("question_rate_max", adapter.question, "upper 95 % bound (exact, by prompt)", config.question_rate_max)
    if config.win_rate is not None:
        yield _gate("win_rate", evaluation.greedy.win_rate, "lower 95 % bound (bootstrap by prompt)", config.win_rate)
    if config.harmful is not None and adapter.harmful is not None:
        yield _compare("harmful", "number of replies", adapter.harmful, adapter.harmful, config.harmful)
    if config.incomplete is not None and adapter.incomplete is not None:
        yield _gate("incomplete", adapter.incomplete, "upper 95 % bound (exact, by prompt)", config.incomplete)


def _gate(name: str, estimate: Estimate, measure: str, threshold: float) -> GateResult:
    relation = _relation(name)
    bound = estimate.upper if relation == "<=" else estimate.lower
    # without any readable reply there is no bound, so assume the worst possible value
    compared = bound if bound is not None else (1.0 if relation == "<=" else -1.0)
    return _compare(name, measure, estimate.value, compared, threshold)


def _compare(name: str, measure: str, value: float, compared: float, threshold: float) -> GateResult:
    relation = _relation(name)
    return GateResult(
        name=name,
        measure=measure,
        value=value,
        compared=compared,
        relation=relation,
        threshold=threshold,
        passed=_passes(compared, relation, threshold),
    )


def missed_gate_messages(verdict: Verdict) -> list[str]:
    """Return one line per missed gate, with the measured bound, the threshold, the difference and advice."""
    return [f"{_missed(gate)}; {ADVICE[gate.name]}" for gate in verdict.gates if not gate.passed]


def _missed(gate: GateResult) -> str:
    if gate.is_count:
        return (
            f"gates.{gate.name}: got {gate.compared:g} ({gate.measure}), expected {gate.relation} {gate.threshold:g}: missed by "
            f"{gate.missed_by:g}"
        )
    return (
        f"gates.{gate.name}: got {gate.compared:.3f} ({gate.measure} of {gate.value:.3f}), expected {gate.relation} "
        f"{gate.threshold:g}: missed by {gate.missed_by:.3f}"
    )
