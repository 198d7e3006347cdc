"""Render `report.html`: a self-contained page about one run, with the numbers in `metrics.json`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Final

from lora_trainer.evaluate.metrics import (
    DecodingMetrics,
    Estimate,
    EvaluationMetrics,
    GateResult,
    GroupMetrics,
    HeldOutMetrics,
    RepliesMetrics,
    RunMetrics,
    TrainingMetrics,
)
from lora_trainer.evaluate.scope import scope
from lora_trainer.persona.specs import persona_spec
from lora_trainer.persona.vocabulary import HIGH_INTENSITY_FROM, LOW_INTENSITY_BELOW, BloodType, Expression
from lora_trainer.report import plots
from lora_trainer.report.depth_section import depth_section
from lora_trainer.report.formatting import (
    CORRELATIONS,
    COUNTS,
    LABELS,
    MAX_CHARACTERS,
    SPACE,
    duration,
    flattened,
    number_text,
    percent,
    settings_table,
    timestamp_text,
    value_text,
)
from lora_trainer.report.html import display_text, render_page
from lora_trainer.report.reply_cards import best_and_worst, drawn_cards, harmful_cards
from lora_trainer.train.step_log import StepLog

if TYPE_CHECKING:
    from lora_trainer.evaluate.depth_rules import DepthReply
    from lora_trainer.evaluate.rules import ScoredReply

_MAX_POINTS: Final = 300
"""Maximum points per curve. Longer runs are averaged in bins."""
_GROUPS: Final[tuple[tuple[str, tuple[str, ...]], ...]] = (
    ("Can the app parse it?", ("exact_json", "emotion_in_vocabulary", "stop")),
    ("Does it talk like the persona?", ("one_or_two_sentences", "informal_speech", "persona", "persona_by_form")),
    ("Does it keep the conversation going?", ("question", "characters")),
    ("Do emotion and emoji fit?", ("emotion_appropriateness", "emoji_intensity", "emoji")),
    ("Is it original?", ("repetition", "copied_words", "verbatim_copies")),
    ("Does it do what a crisis calls for?", ("incomplete",)),
    ("Overall", ("rule_score", "win_rate")),
)
_GROUP_MEASURES: Final = ("exact_json", "one_or_two_sentences", "informal_speech", "persona", "question", "fits_message")
_RELATIONS: Final = {">=": "≥", ">": ">", "<=": "≤"}


def run_page(
    metrics: RunMetrics,
    facts: Mapping[str, Any],
    steps: Sequence[StepLog],
    replies: Sequence[ScoredReply],
    depth_replies: Sequence[DepthReply] = (),
) -> str:
    """Render the page. `facts` is the manifest without its list of files."""
    evaluation, spec = metrics.evaluation, persona_spec(metrics.blood_type)
    return render_page(
        "run_page.html.jinja",
        metrics=metrics,
        evaluation=evaluation,
        facts=facts,
        spec=spec,
        verdict=_verdict(metrics),
        about=_about(metrics, facts),
        decodings=[name for name, _ in _decodings(evaluation)],
        groups=[
            (title, [_metric(name, evaluation, metrics.verdict.gates) for name in names]) for title, names in _groups(evaluation)
        ],
        all_estimates=list(_all_estimates(evaluation)),
        emoji_plot=_emoji_plot(evaluation),
        personas=[(str(name), persona_spec(name).name) for name in BloodType],
        taken_for=[taken_for_row(f"{model}, {decoding}", replied) for model, decoding, replied in _models(evaluation)],
        emotions_plot=_emotions_plot(evaluation),
        warnings=list(_warnings(evaluation)),
        asked_at=_asked_at(evaluation),
        group_measures=[LABELS[name] for name in _GROUP_MEASURES],
        feelings=list(_feelings(evaluation)),
        tags=list(_tags(evaluation)),
        harms=list(_harms(evaluation)),
        loss_plot=_loss_plot(steps, metrics.training),
        speed_plot=_speed_plot(steps),
        training=_training(metrics),
        held_out=_held_out(metrics.held_out),
        drawn=drawn_cards(replies, metrics),
        harmful=harmful_cards(replies, metrics),
        **best_and_worst(replies, metrics),
        judge=evaluation.judge,
        sense=_sense(evaluation),
        judge_track=_judge_track(evaluation),
        depth=depth_section(evaluation.depth, depth_replies) if evaluation.depth else "",
        data=_data(metrics, facts),
        settings=settings_table(facts["config"]),
        timings=_timings(facts["timings_s"]),
        environment=[
            (name.replace("_", " ").replace(".", ": "), value_text(value))
            for name, value in flattened(
                {**facts["environment"], "memory_plan": facts["memory_plan"], "evaluation": evaluation.versions}
            ).items()
        ],
        display_text=display_text,
        percent=percent,
    )


# --- verdict and gates -----------------------------------------------------------------------------------------------


def _verdict(metrics: RunMetrics) -> dict[str, Any]:
    verdict = metrics.verdict
    rows = []
    for gate in verdict.gates:
        low, high = _gate_scale(gate)
        place = _places(low, high)
        at, bound, value = place(gate.threshold), place(gate.compared), place(gate.value)
        rows.append(
            {
                "gate": gate,
                "label": LABELS.get(gate.name, gate.name),
                "needs": _threshold(gate),
                "bound": _gate_number(gate, gate.compared),
                "measured_text": _gate_number(gate, gate.value),
                "missed_by": _gate_difference(gate),
                "advice": gate.advice.replace(" %", f"{SPACE}%"),
                "floor": _reference(gate, gate.floor),
                "ceiling": _reference(gate, gate.ceiling),
                "low": _scale_end(gate.name, low),
                "high": _scale_end(gate.name, high),
                "good": (0.0, at) if gate.relation == "<=" else (at, round(100 - at, 2)),
                "threshold": at,
                "dot": bound,
                "measured": value,
                "interval": (min(bound, value), round(abs(bound - value), 2)),
            }
        )
    missed = [row for row, gate in zip(rows, verdict.gates, strict=True) if not gate.passed]
    return {"passed": verdict.passed, "rows": rows, "missed": missed, "gate_id": verdict.gate_id, "scope": scope(verdict)}


def _gate_number(gate: GateResult, value: float) -> str:
    if gate.was_not_judged:
        return gate.measure
    if gate.is_count:
        return f"{value:g}"
    if gate.name in CORRELATIONS:
        return f"{value:.3f}"
    # -1 is the assumed bound if no reply was readable
    return "unknown" if value < 0 else f"{100 * value:.2f}{SPACE}%"


def _reference(gate: GateResult, value: float | None) -> str:
    if value is None:
        return "–"
    if gate.is_count:
        return f"{value:g}"
    return f"{value:.2f}" if gate.name in CORRELATIONS else percent(value)


def _threshold(gate: GateResult) -> str:
    number = f"{gate.threshold:g}" if gate.is_count or gate.name in CORRELATIONS else f"{100 * gate.threshold:g}{SPACE}%"
    return f"{_RELATIONS[gate.relation]} {number}"


def _gate_difference(gate: GateResult) -> str:
    if gate.is_count:
        return f"{gate.missed_by:g}"
    return f"{gate.missed_by:.3f}" if gate.name in CORRELATIONS else f"{100 * gate.missed_by:.2f} points"


def _gate_scale(gate: GateResult) -> tuple[float, float]:
    """Return round axis limits that keep the bound and the threshold visibly apart."""
    values = (gate.value, gate.compared, gate.threshold)
    if gate.is_count:
        return 0.0, _count_end(max(values))
    if gate.name in CORRELATIONS:
        return (0.0, 1.0) if min(values) >= 0 else (-1.0, 1.0)
    return max(start for start in (0.0, 0.5, 0.8, 0.9) if start == 0 or min(values) >= start + (1 - start) * 0.15), 1.0


def _scale_end(name: str, value: float) -> str:
    return f"{value:g}" if name in CORRELATIONS | COUNTS else f"{100 * value:g}{SPACE}%"


def _places(low: float, high: float) -> Callable[[float], float]:
    """Return a function that maps a value to its position on the axis from `low` to `high`, in percent."""
    return lambda value: round(100 * min(1.0, max(0.0, (value - low) / (high - low))), 2)


# --- overview --------------------------------------------------------------------------------------------------------


def _about(metrics: RunMetrics, facts: Mapping[str, Any]) -> list[tuple[str, str, bool]]:
    """Return rows of name, value, and whether the value is an identifier."""
    base = facts["base"]
    rows = [
        ("Run", metrics.run_id, True),
        ("Base model", base["id"], False),
        ("Base revision", base["revision"] or base["identity"], True),
        ("Data", facts["data"]["uri"], False),
        ("Started", timestamp_text(facts["started_at"]), False),
        ("Finished", timestamp_text(facts["finished_at"]), False),
    ]
    if "evaluated_at" in facts:
        rows.append(("Re-evaluated", timestamp_text(facts["evaluated_at"]), False))
    return [(name, display_text(str(value), MAX_CHARACTERS), is_id) for name, value, is_id in rows]


# --- adapter and base ------------------------------------------------------------------------------------------------


def _decodings(evaluation: EvaluationMetrics) -> Iterator[tuple[str, DecodingMetrics]]:
    yield "greedy", evaluation.greedy
    if evaluation.sampled is not None:
        yield "sampled", evaluation.sampled


def _models(evaluation: EvaluationMetrics) -> Iterator[tuple[str, str, RepliesMetrics]]:
    for decoding, measured in _decodings(evaluation):
        yield "adapter", decoding, measured.adapter
        yield "base", decoding, measured.base


def _groups(evaluation: EvaluationMetrics) -> Iterator[tuple[str, tuple[str, ...]]]:
    for title, names in _GROUPS:
        # measured only if prompts have the tag
        if names != ("incomplete",) or evaluation.greedy.adapter.incomplete is not None:
            yield title, names


def _estimates(name: str, evaluation: EvaluationMetrics) -> Iterator[tuple[str, str, Estimate]]:
    for decoding, measured in _decodings(evaluation):
        if name == "win_rate":
            yield decoding, "adapter", measured.win_rate
        else:
            yield decoding, "adapter", getattr(measured.adapter, name)
            yield decoding, "base", getattr(measured.base, name)
    # people's replies have no tags, and nobody compared them with the base's
    if name != "win_rate" and evaluation.people is not None and (written := getattr(evaluation.people, name)) is not None:
        yield "written", "people", written


def _metric(name: str, evaluation: EvaluationMetrics, results: Sequence[GateResult]) -> dict[str, Any]:
    """Return the card of one metric, with a track per model and decoding on a shared axis."""
    estimates = list(_estimates(name, evaluation))
    low, high = _metric_scale(name, [estimate for _, _, estimate in estimates])
    place = _places(low, high)
    owner = DecodingMetrics if name == "win_rate" else RepliesMetrics
    gates_of = {"question": ("question_rate_min", "question_rate_max")}.get(name, (name,))
    thresholds = [result for result in results if result.name in gates_of]
    rows = []
    for decoding, model, estimate in estimates:
        lower, upper = estimate.lower, estimate.upper
        rows.append(
            {
                "decoding": decoding,
                "model": model,
                "value": number_text(name, estimate.value),
                "interval": "" if lower is None or upper is None else f"{number_text(name, lower)} to {number_text(name, upper)}",
                "dot": place(estimate.value),
                "whisker": None if lower is None or upper is None else (place(lower), round(place(upper) - place(lower), 2)),
                # gates apply only to the greedy replies of the adapter
                "thresholds": [place(result.threshold) for result in thresholds]
                if (decoding, model) == ("greedy", "adapter")
                else [],
            }
        )
    return {
        "name": name,
        "label": LABELS[name],
        "meaning": owner.model_fields[name].description,
        "rows": rows,
        "low": _scale_end(name, low),
        "high": _scale_end(name, high),
        "gates": " and ".join(_threshold(result) for result in thresholds),
    }


def _metric_scale(name: str, estimates: Sequence[Estimate]) -> tuple[float, float]:
    seen = [value for estimate in estimates for value in (estimate.value, estimate.lower, estimate.upper) if value is not None]
    if name in CORRELATIONS:
        return (0.0, 1.0) if min(seen) >= 0 else (-1.0, 1.0)
    if name in COUNTS:
        return 0.0, _count_end(max(seen))
    return 0.0, 1.0


def _count_end(value: float) -> float:
    """Return a round end of an axis that starts at 0."""
    return next((end for end in (1, 2, 3, 5, 10, 20, 50, 100, 200, 500, 1000) if end >= value), value)


def _all_estimates(evaluation: EvaluationMetrics) -> Iterator[tuple[str, str, str, list[str]]]:
    """Yield every estimate of `metrics.json` as metric, decoding, model and its numbers."""
    for name in (name for _, names in _groups(evaluation) for name in names):
        for decoding, model, estimate in _estimates(name, evaluation):
            numbers = (estimate.value, estimate.lower, estimate.upper, estimate.bootstrap_lower, estimate.bootstrap_upper)
            replies = f"{estimate.of:,}" if estimate.successes is None else f"{estimate.successes:,} of {estimate.of:,}"
            texts = ["–" if number is None else number_text(name, number, 2) for number in numbers]
            yield LABELS[name], decoding, model, [*texts, replies]
    for model, decoding, replied in _models(evaluation):
        yield "Distinct texts", decoding, model, [percent(replied.unique_replies, 2), *("–",) * 4, f"{replied.rule_score.of:,}"]
        longest = f"{replied.longest_copied_words} words"
        yield "Longest copied run of any reply", decoding, model, [longest, *("–",) * 4, f"{replied.rule_score.of:,}"]


def _emoji_plot(evaluation: EvaluationMetrics) -> str:
    drawn = []
    for name, replied, color, style in (
        ("adapter", evaluation.greedy.adapter, plots.ACCENT, "o-"),
        ("base", evaluation.greedy.base, plots.QUIET, "s-"),
    ):
        at = {float(intensity): mean for intensity, mean in replied.emoji_by_intensity.items()}
        drawn.append(plots.Line(name, list(at), list(at.values()), color, style))
    ends = {
        "low": (0.0, LOW_INTENSITY_BELOW),
        "middle": (LOW_INTENSITY_BELOW, HIGH_INTENSITY_FROM),
        "high": (HIGH_INTENSITY_FROM, 1.0),
    }
    label = "training data"
    for third, mean in evaluation.data_emoji_by_third.items():
        drawn.append(plots.Line(label, ends[third], (mean, mean), plots.WARM, "--"))
        label = ""
    return plots.svg(
        plots.lines(drawn, "intensity", "mean emoji per reply", from_zero=True),
        label="Mean number of emoji per reply at each intensity: adapter, base, and the training data by third of intensity",
        width=4.8,
    )


def taken_for_row(name: str, replied: RepliesMetrics) -> dict[str, Any]:
    """Return a row of the confusion matrix: count and share per predicted persona, and the number of unreadable replies."""
    readable = sum(replied.taken_for.values())
    counts = [replied.taken_for.get(persona, 0) for persona in BloodType]
    return {
        "name": name,
        "cells": [(count, count / readable if readable else 0.0) for count in counts],
        "readable": readable,
        "unreadable": replied.rule_score.of - readable,
    }


def _emotions_plot(evaluation: EvaluationMetrics) -> str:
    models = {"adapter": (evaluation.greedy.adapter, plots.ACCENT), "base": (evaluation.greedy.base, plots.QUIET)}
    used = [str(face) for face in Expression if any(replied.emotions.get(face) for replied, _ in models.values())]
    used.sort(key=lambda face: -evaluation.greedy.adapter.emotions.get(face, 0))
    groups = {
        name: ([100 * replied.emotions.get(face, 0) / (sum(replied.emotions.values()) or 1) for face in used], color)
        for name, (replied, color) in models.items()
    }
    return plots.svg(
        plots.grouped_horizontal_bars(used, groups, "% of readable greedy replies"),
        label="Frequency of each emotion, adapter and base",
        width=4.8,
        height=1.1 + 0.27 * max(1, len(used)),
    )


def _warnings(evaluation: EvaluationMetrics) -> Iterator[tuple[str, list[int]]]:
    models = [replied for _, _, replied in _models(evaluation)]
    codes = {code: sum(replied.warnings.get(code, 0) for replied in models) for replied in models for code in replied.warnings}
    for code in sorted(codes, key=lambda code: (-codes[code], code)):
        yield code.replace("_", " "), [replied.warnings.get(code, 0) for replied in models]


def _harms(evaluation: EvaluationMetrics) -> Iterator[str]:
    """Yield for each model how many of its greedy replies could harm, and what the rules found; nothing if no prompt has a tag."""
    for model, replied in (("adapter", evaluation.greedy.adapter), ("base", evaluation.greedy.base)):
        if replied.harmful is not None:
            found = ", ".join(f"{harm.replace('_', ' ')} {count:,}" for harm, count in replied.harms.items())
            yield f"{model} {replied.harmful:,}" + (f" ({found})" if found else "")


def _tags(evaluation: EvaluationMetrics) -> Iterator[dict[str, Any]]:
    """Yield a row per tag and model. People's replies have no tags."""
    greedy = evaluation.greedy
    for tag in greedy.adapter.by_tag:
        yield from _breakdown(tag, {"adapter": greedy.adapter.by_tag.get(tag), "base": greedy.base.by_tag.get(tag)})


def _feelings(evaluation: EvaluationMetrics) -> Iterator[dict[str, Any]]:
    """Yield a row per feeling for the adapter, the base, and the people who wrote the held-out records."""
    greedy, people = evaluation.greedy, evaluation.people
    for feeling in greedy.adapter.by_feeling:
        models = {"adapter": greedy.adapter, "base": greedy.base, "people": people}
        by_model = {model: replied.by_feeling.get(feeling) for model, replied in models.items() if replied is not None}
        yield from _breakdown(feeling, by_model)


def _breakdown(name: str, by_model: Mapping[str, GroupMetrics | None]) -> Iterator[dict[str, Any]]:
    """Yield a row per model: the rates of its replies with their bounds, and the linter's findings."""
    measured_models = [(model, measured) for model, measured in by_model.items() if measured is not None]
    for number, (model, measured) in enumerate(measured_models):
        rates = [getattr(measured, measure) for measure in _GROUP_MEASURES]
        yield {
            "name": name.replace("_", " "),
            # one name stands beside all rows of its group
            "span": 0 if number else len(measured_models),
            "model": model,
            "prompts": measured.prompts,
            "replies": measured.replies,
            "rates": [(percent(rate.value), f"{100 * rate.lower:.0f} – {percent(rate.upper, 0)}") for rate in rates],
            "findings": ", ".join(f"{code.replace('_', ' ')} {count:,}" for code, count in measured.findings.items()),
        }


# --- training --------------------------------------------------------------------------------------------------------


def binned(steps: Sequence[StepLog], at_most: int = _MAX_POINTS) -> list[Sequence[StepLog]]:
    """Split `steps` into at most `at_most` bins of consecutive steps, as even as possible."""
    count = min(len(steps), at_most)
    edges = [len(steps) * number // count for number in range(count + 1)] if count else [0]
    return [steps[start:end] for start, end in pairwise(edges)]


def _loss_plot(steps: Sequence[StepLog], training: TrainingMetrics) -> str:
    bins = binned(steps)
    x = [chunk[-1].step for chunk in bins]
    loss = [sum(step.loss for step in chunk) / len(chunk) for chunk in bins]
    band = ([min(step.loss for step in chunk) for chunk in bins], [max(step.loss for step in chunk) for chunk in bins])
    is_averaged = len(bins) < len(steps)
    drawn = [plots.Line("training", x, loss, band=band if is_averaged else None)]
    measured = {point.step: point.loss for point in training.held_out_losses}
    if measured:
        drawn.append(plots.Line("held out", list(measured), list(measured.values()), plots.WARM, "o-"))
    kept = training.kept_step
    if kept in measured:
        drawn.append(plots.Line(f"kept: step {kept:,}", (kept, kept), (0, measured[kept]), plots.QUIET, "--"))
    return plots.svg(
        plots.lines(drawn, "optimizer step", "loss, nats per token", from_zero=True),
        label="Training loss at each optimizer step, held-out loss where it was measured, and the published step",
        width=4.8,
        height=3.4,
    )


def _speed_plot(steps: Sequence[StepLog]) -> str:
    bins = binned(steps)
    x = [chunk[-1].step for chunk in bins]
    rate = [chunk[-1].learning_rate for chunk in bins]
    speed = [sum(step.tokens for step in chunk) / (sum(step.step_s for step in chunk) or 1) for chunk in bins]
    return plots.svg(
        plots.lines([plots.Line("", x, rate, plots.WARM)], "", "learning rate", from_zero=True, plain=False),
        plots.lines([plots.Line("", x, speed, plots.QUIET)], "optimizer step", "tokens/s", from_zero=True),
        label="Learning rate and tokens per second at each optimizer step",
        width=4.8,
        height=3.4,
    )


def _training(metrics: RunMetrics) -> list[tuple[str, str]]:
    training = metrics.training
    return [
        ("Records", f"{training.records:,}"),
        ("Optimizer steps", _steps_text(training)),
        *([("Published step", f"{training.kept_step:,}")] if training.kept_step is not None else []),
        ("Loss, first to last step", f"{training.loss_first:.3f} → {training.loss_last:.3f}"),
        ("Tokens", f"{training.tokens:,}"),
        ("Tokens in the loss", f"{training.loss_tokens:,}"),
        ("Rows, packed rows", f"{training.rows:,}, {training.packed_rows:,}"),
        ("Tokens/s", f"{training.tokens_per_s:,.1f}"),
        ("Training time", duration(training.train_s)),
        ("Peak memory", f"{metrics.peak_memory_gib:.2f} GiB"),
    ]


def _steps_text(training: TrainingMetrics) -> str:
    if training.planned_steps is None or training.planned_steps == training.steps:
        return f"{training.steps:,}"
    return f"{training.steps:,} of {training.planned_steps:,}, stopped early"


def _held_out(held_out: HeldOutMetrics) -> list[dict[str, Any]]:
    most = max(held_out.loss_adapter, held_out.loss_base) or 1.0
    return [
        {"name": name, "loss": f"{loss:.3f}", "perplexity": f"{perplexity:,.2f}", "share": round(100 * loss / most, 2)}
        for name, loss, perplexity in (
            ("adapter", held_out.loss_adapter, held_out.perplexity_adapter),
            ("base", held_out.loss_base, held_out.perplexity_base),
        )
    ]


# --- judge, data, timings --------------------------------------------------------------------------------------------


def _sense(evaluation: EvaluationMetrics) -> dict[str, Any] | None:
    """Return what the judge of sense found, and a row per examined judge and kind of bad reply."""
    if evaluation.sense is None:
        return None
    judged, rate = evaluation.sense, evaluation.sense.sense
    rows = [
        {
            "judge": found.judge,
            "model": display_text(found.model, MAX_CHARACTERS),
            "result": "fit for use" if found.fit else "unfit",
            "kind": str(kind),
            "replies": f"{part.good:,} and {part.bad:,}",
            "auc": f"{part.auc:.2f}",
            "lower": f"{part.lower:.2f}",
            "required": "–" if part.required is None else f"{part.required:.2f}",
            "rejected": percent(found.rejected[kind]) if kind in found.rejected else "–",
            "accepted": percent(found.specificity.value),
        }
        for found in judged.examinations
        for kind, part in found.separation.items()
    ]
    return {
        "judged_by": judged.judged_by,
        "reason": display_text(judged.reason, 4 * MAX_CHARACTERS),
        "rows": rows,
        "rate": None
        if rate is None
        else {
            "value": percent(rate.value),
            "interval": f"{percent(rate.lower)} to {percent(rate.upper)}",
            "accepted": f"{rate.accepted:,} of {rate.of:,}",
        },
    }


def _judge_track(evaluation: EvaluationMetrics) -> dict[str, Any] | None:
    if evaluation.judge is None:
        return None
    estimate = evaluation.judge.win_rate
    place, lower, upper = _places(0, 1), estimate.lower, estimate.upper
    return {
        "value": percent(estimate.value),
        "interval": "" if lower is None or upper is None else f"{percent(lower)} to {percent(upper)}",
        "dot": place(estimate.value),
        "whisker": None if lower is None or upper is None else (place(lower), round(place(upper) - place(lower), 2)),
    }


def _data(metrics: RunMetrics, facts: Mapping[str, Any]) -> list[tuple[str, str]]:
    data, evaluation = facts["data"], metrics.evaluation
    rows = [
        ("Trained on", f"{data['train_records']:,} records"),
        ("Held out", f"{data['held_out_records']:,} records"),
        ("Left out as too long", f"{data['left_out_records']:,} records"),
        ("File", display_text(str(data["uri"]), MAX_CHARACTERS)),
        ("Size", f"{data['size_bytes']:,} bytes"),
        ("SHA-256", str(data["sha256"])),
    ]
    if evaluation.data_emoji_by_third:
        by_third = ", ".join(f"{third} {mean:.2f}" for third, mean in evaluation.data_emoji_by_third.items())
        rows.append(("Emoji per reply, by intensity", by_third))
    return [
        *rows,
        ("Evaluation prompts", f"{evaluation.prompts:,}, each at {_asked_at(evaluation)}"),
        ("Replies", f"{evaluation.replies:,} per model and decoding, at most {evaluation.max_new_tokens} tokens each"),
        ("SHA-256 of the prompts", evaluation.prompts_sha256),
    ]


def _asked_at(evaluation: EvaluationMetrics) -> str:
    """Return at which intensities each prompt is asked."""
    intensities, per_prompt = evaluation.intensities, evaluation.intensities_per_prompt
    number = f"{per_prompt} of the " if per_prompt < len(intensities) else ""
    return f"{number}{'intensities' if len(intensities) > 1 else 'intensity'} {', '.join(f'{i:g}' for i in intensities)}"


def _timings(timings_s: Mapping[str, float]) -> dict[str, Any]:
    total = sum(timings_s.values())
    longest = max(timings_s.values(), default=0.0) or 1.0
    return {
        "total": duration(total),
        "rows": [
            {
                "name": name.replace("_", " "),
                "took": duration(seconds),
                "part": percent(seconds / total if total else 0.0),
                "share": round(100 * seconds / longest, 2),
            }
            for name, seconds in timings_s.items()
        ],
    }
