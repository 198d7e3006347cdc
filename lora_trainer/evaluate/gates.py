"""Compare metrics with thresholds to decide whether an adapter may be promoted to `latest.json`."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from typing import Final

from lora_trainer.config import GatesConfig
from lora_trainer.evaluate.advice import NOTHING_KNOWN, Known, advice
from lora_trainer.evaluate.metrics import (
    NOT_JUDGED,
    Estimate,
    EvaluationMetrics,
    GateResult,
    NotJudged,
    Relation,
    RepliesMetrics,
    Verdict,
    passes,
)

_LOWER_BOUND_GATES: Final = ("exact_json", "stop", "one_or_two_sentences", "informal_speech", "persona")
_RELATIONS: Final[Mapping[str, Relation]] = {
    "emoji_intensity": ">",
    "question_rate_max": "<=",
    "win_rate": ">",
    "harmful": "<=",
    "incomplete": "<=",
}
"""How a gate's bound relates to its threshold, if not by `>=`."""
_MEASURES: Final[Mapping[str, str]] = {"question_rate_min": "question", "question_rate_max": "question"}
"""What a gate measures, if its name does not say it."""


def gate_id(evaluation_id: str, config: GatesConfig) -> str:
    """Return 16 hex digits that identify the evaluation and the thresholds.

    A finished run with a different gate id is evaluated again but not retrained.
    """
    thresholds = json.dumps(config.model_dump(mode="json"), sort_keys=True)
    return hashlib.sha256(f"{evaluation_id}\n{thresholds}".encode()).hexdigest()[:16]


def decide(evaluation: EvaluationMetrics, config: GatesConfig, known: Known = NOTHING_KNOWN) -> Verdict:
    """Check every gate that has a threshold. Only greedy replies count because they are reproducible.

    `known` changes only the advice about missed gates.
    """
    gates = tuple(_explained(gate, evaluation, known) for gate in _gates(evaluation, config))
    return Verdict(
        gate_id=gate_id(evaluation.evaluation_id, config),
        passed=all(gate.passed for gate in gates),
        gates=gates,
        not_judged=_not_judged(evaluation, config),
        sense_reason=_why_sense_was_not_judged(evaluation, config),
    )


def _not_judged(evaluation: EvaluationMetrics, config: GatesConfig) -> dict[str, NotJudged]:
    """Return what the verdict does not cover, and why."""
    found: dict[str, NotJudged] = {}
    if config.sense is None:
        found["sense"] = "off"
    elif evaluation.sense is None or evaluation.sense.sense is None:
        found["sense"] = "no_judge"
    adapter = evaluation.greedy.adapter
    for name, threshold, measured in (
        ("harmful", config.harmful, adapter.harmful),
        ("incomplete", config.incomplete, adapter.incomplete),
    ):
        if threshold is None:
            found[name] = "off"
        elif measured is None:
            found[name] = "no_tags"
    return found


def _why_sense_was_not_judged(evaluation: EvaluationMetrics, config: GatesConfig) -> str:
    if config.sense is None:
        return ""
    return evaluation.sense.reason if evaluation.sense is not None else "this evaluation did not look at it"


def value_misses(name: str, value: float, config: GatesConfig) -> bool:
    """Return whether `value` itself, rather than its bound, misses the gate `name`; False if the gate is disabled."""
    threshold: float | None = getattr(config, name)
    return threshold is not None and not passes(value, _relation(name), threshold)


def _relation(name: str) -> Relation:
    return _RELATIONS.get(name, ">=")


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
    if config.sense is not None and (gate := _sense_gate(evaluation, config)) is not None:
        yield gate


def _sense_gate(evaluation: EvaluationMetrics, config: GatesConfig) -> GateResult | None:
    """Return the gate of sense; None if nobody judged it and nobody has to, or if it has no threshold."""
    judged = evaluation.sense.sense if evaluation.sense is not None else None
    threshold = config.sense_min
    if judged is None:
        if config.sense != "required":
            return None
        return GateResult(
            name="sense", measure=NOT_JUDGED, value=0.0, compared=0.0, relation=">=", threshold=threshold or 0.0, passed=False
        )
    if threshold is None:
        return None
    return GateResult(
        name="sense",
        measure="lower 95 % bound (corrected for the judge's errors)",
        value=judged.value,
        compared=judged.lower,
        relation=">=",
        threshold=threshold,
        passed=passes(judged.lower, ">=", threshold),
    )


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
        passed=passes(compared, relation, threshold),
    )


def _explained(gate: GateResult, evaluation: EvaluationMetrics, known: Known) -> GateResult:
    """Return `gate` with its floor, its ceiling and, if it was missed, the advice."""
    floor: float | None
    ceiling: float | None
    if gate.name == "sense":
        return gate if gate.passed else gate.model_copy(update={"advice": advice(gate, known)})
    if gate.name == "win_rate":
        # the base against itself; people's replies answer other prompts than the base's
        floor, ceiling = 0.5, None
    else:
        measure = _MEASURES.get(gate.name, gate.name)
        floor = _value(getattr(evaluation.greedy.base, measure))
        ceiling = _value(getattr(evaluation.people, measure)) if evaluation.people else None
    explained = gate.model_copy(update={"floor": floor, "ceiling": ceiling})
    return explained if gate.passed else explained.model_copy(update={"advice": advice(explained, known)})


def _value(measured: Estimate | int | None) -> float | None:
    return measured.value if isinstance(measured, Estimate) else measured


def missed_gate_messages(verdict: Verdict) -> list[str]:
    """Return one line per missed gate, with the measured bound, the threshold, the difference and advice."""
    return [f"{_missed(gate, verdict)}{gate.advice and f'; {gate.advice}'}" for gate in verdict.gates if not gate.passed]


def _missed(gate: GateResult, verdict: Verdict) -> str:
    if gate.was_not_judged:
        return f"gates.{gate.name}: required, and nobody could judge it: {verdict.sense_reason}"
    if gate.is_count:
        return (
            f"gates.{gate.name}: got {gate.compared:g} ({gate.measure}), expected {gate.relation} {gate.threshold:g}: missed by "
            f"{gate.missed_by:g}"
        )
    return (
        f"gates.{gate.name}: got {gate.compared:.3f} ({gate.measure} of {gate.value:.3f}), expected {gate.relation} "
        f"{gate.threshold:g}: missed by {gate.missed_by:.3f}"
    )
