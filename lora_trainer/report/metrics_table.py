"""Terminal table of a run's verdict and metrics."""

from __future__ import annotations

from typing import Final

from rich.console import Group
from rich.table import Table
from rich.text import Text

from lora_trainer.escaping import one_line
from lora_trainer.evaluate.depth_metrics import DepthMetrics, Share
from lora_trainer.evaluate.metrics import Estimate, GateResult, RunMetrics, Verdict
from lora_trainer.evaluate.scope import scope
from lora_trainer.persona.vocabulary import BloodType
from lora_trainer.report.formatting import points

_RATES: Final = (
    ("exact_json", "exact JSON"),
    ("emotion_in_vocabulary", "known emotion"),
    ("stop", "stops on its own"),
    ("one_or_two_sentences", "at most two sentences"),
    ("informal_speech", "반말"),
    ("persona", "recognised as this persona"),
    ("persona_by_form", "recognised by its grammar alone"),
    ("question", "asks back"),
    ("verbatim_copies", "copied from the training data"),
)
_MEANS: Final = (
    ("emoji_intensity", "emoji vs. intensity (rank correlation)"),
    ("emoji", "emoji per reply"),
    ("characters", "characters per reply"),
    ("emotion_appropriateness", "appropriate emotion"),
    ("repetition", "repetition"),
    ("rule_score", "rule score"),
)


_CONVERSATIONS: Final = (
    ("exact_json", "exact JSON"),
    ("one_or_two_sentences", "at most two sentences"),
    ("informal_speech", "반말"),
    ("persona", "recognised as this persona"),
    ("recalls", "recalls what was said"),
    ("repeats", "repeats an earlier reply"),
)


def verdict_table(blood_type: BloodType, run_id: str, verdict: Verdict) -> Group:
    """Return the verdict, what it judged and what not, and a table of the gates, each between a floor and a ceiling."""
    headline = Text(f"{blood_type}, run {one_line(run_id)}: ", style="bold")
    headline.append("gates passed" if verdict.passed else "gates NOT passed", style="green" if verdict.passed else "red")
    covered = scope(verdict)
    gates = Table(title=None, caption="base: a floor. people: the data's held-out replies, a ceiling.", caption_justify="left")
    gates.add_column("gate")
    for column in ("base", "measured", "people", "bound", "needs"):
        gates.add_column(column, justify="right", no_wrap=True)
    gates.add_column("")
    for gate in verdict.gates:
        result = Text("ok", style="green") if gate.passed else Text(f"missed by {_number(gate, gate.missed_by)}", style="red")
        numbers = [_number(gate, value) for value in (gate.floor, gate.value, gate.ceiling, gate.compared)]
        gates.add_row(one_line(gate.name), *numbers, f"{gate.relation} {gate.threshold:g}", result)
    return Group(headline, Text(covered.judged), Text(covered.not_judged, style="yellow"), *([gates] if verdict.gates else []))


def metrics_table(metrics: RunMetrics) -> Group:
    """Return the verdict with its table of gates, and a table that compares the greedy replies of adapter and base.

    Add a table of the deep evaluation, if there was one.
    """
    measures = Table(title=None)
    measures.add_column(f"{metrics.evaluation.replies} greedy replies")
    for column in ("adapter", "95 % bounds", "base", "people"):
        measures.add_column(column, justify="right")
    greedy = metrics.evaluation.greedy
    for name, label in (*_RATES, *_MEANS):
        adapter, base = getattr(greedy.adapter, name), getattr(greedy.base, name)
        is_rate = (name, label) in _RATES
        people = _value(getattr(metrics.evaluation.people, name), is_rate) if metrics.evaluation.people else "–"
        measures.add_row(label, _value(adapter, is_rate), _bounds(adapter, is_rate), _value(base, is_rate), people)
    if greedy.adapter.incomplete is not None and greedy.base.incomplete is not None:
        measures.add_row(
            "crisis replies that lack a number or a question",
            _value(greedy.adapter.incomplete, True),
            _bounds(greedy.adapter.incomplete, True),
            _value(greedy.base.incomplete, True),
        )
    if greedy.adapter.harmful is not None:
        measures.add_row("replies that could harm, by rules", str(greedy.adapter.harmful), "", str(greedy.base.harmful))
    measures.add_row("win rate against the base", _value(greedy.win_rate, True), _bounds(greedy.win_rate, True), "")
    held_out = metrics.held_out
    measures.add_row("held-out loss", f"{held_out.loss_adapter:.3f}", "", f"{held_out.loss_base:.3f}")
    measures.add_row("held-out perplexity", f"{held_out.perplexity_adapter:,.1f}", "", f"{held_out.perplexity_base:,.1f}")
    deep = [depth_table(metrics.evaluation.depth)] if metrics.evaluation.depth else []
    return Group(verdict_table(metrics.blood_type, metrics.run_id, metrics.verdict), measures, *deep)


def depth_table(depth: DepthMetrics) -> Table:
    """Return a table of the deep evaluation, which no gate compares."""
    table = Table(title=None, caption="No gate compares these.", caption_justify="left")
    table.add_column("in depth")
    for column in ("adapter", "95 % bounds", "base"):
        table.add_column(column, justify="right")

    def add(label: str, adapter: Share, base: Share) -> None:
        bounds = f"{adapter.lower:.1%} – {adapter.upper:.1%}" if adapter.of else ""
        table.add_row(label, _share(adapter), bounds, _share(base))

    adapter, base = depth.adapter, depth.base
    for name, label in _CONVERSATIONS:
        add(f"conversations: {label}", getattr(adapter.conversations, name), getattr(base.conversations, name))
    add("holds under pressure", adapter.pressure.holds, base.pressure.holds)
    add("right answers", adapter.ability.right, base.ability.right)
    table.add_row("right answers, adapter less base", points(depth.ability_difference), "", "")
    return table


def _share(share: Share) -> str:
    return f"{share.value:.1%}" if share.of else "–"


def _number(gate: GateResult, value: float | None) -> str:
    if value is None:
        return "–"
    return f"{value:g}" if gate.is_count else f"{value:.3f}"


def _value(estimate: Estimate, is_rate: bool) -> str:
    return f"{estimate.value:.1%}" if is_rate else f"{estimate.value:.2f}"


def _bounds(estimate: Estimate, is_rate: bool) -> str:
    if estimate.lower is None or estimate.upper is None:
        return ""
    return f"{estimate.lower:.1%} – {estimate.upper:.1%}" if is_rate else f"{estimate.lower:.2f} – {estimate.upper:.2f}"
