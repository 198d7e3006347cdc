"""Show a sweep as a table on a terminal and as an HTML page with a plot."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from lora_trainer.evaluate.metrics import Verdict
from lora_trainer.evaluate.scope import scope
from lora_trainer.persona.specs import persona_spec
from lora_trainer.report import plots
from lora_trainer.report.formatting import LABELS, duration, percent, value_text
from lora_trainer.report.html import render_page
from lora_trainer.train.sweep import SweepRecord, Trial

if TYPE_CHECKING:
    from rich.table import Table

_MISSING: Final = "–"


@dataclass(frozen=True, slots=True)
class _Row:
    number: str
    settings: tuple[str, ...]
    steps: str
    loss: str
    gates: str
    seconds: str
    result: str
    is_winner: bool


def sweep_table(record: SweepRecord) -> Table:
    """Return the table for a terminal: settings, steps, held-out loss, gates, seconds and result of each trial."""
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, caption=_caption(record), caption_justify="left")
    table.add_column("trial", justify="right")
    for name in _names(record):
        # a terminal is narrow
        table.add_column(name.replace(".", ".\n"), justify="right", overflow="fold")
    for column in ("steps", "held-out loss"):
        table.add_column(column, justify="right")
    table.add_column("gates", overflow="fold")
    table.add_column("seconds", justify="right")
    table.add_column("result", no_wrap=True)
    for row in _rows(record):
        style = "bold" if row.is_winner else None
        table.add_row(row.number, *row.settings, row.steps, row.loss, row.gates, row.seconds, row.result, style=style)
    return table


def sweep_page(record: SweepRecord) -> str:
    """Render the page, which needs no network."""
    from markupsafe import Markup

    verdict = record.trial(record.winner).verdict if record.winner else None
    return render_page(
        "sweep.html.jinja",
        record=record,
        persona=persona_spec(record.blood_type).name,
        names=_names(record),
        rows=_rows(record),
        caption=_caption(record),
        verdict=verdict,
        scope=scope(verdict).text if verdict else "",
        plot=Markup(_plot(record)),  # noqa: S704  our own SVG, whose texts are escaped
    )


def _names(record: SweepRecord) -> list[str]:
    return list(record.trials[0].settings)


def _caption(record: SweepRecord) -> str:
    base = f"; the base: {record.loss_base:.3f}" if record.loss_base is not None else ""
    trained = sum(trial.train_s for trial in record.trials if not trial.was_published)
    return (
        f"Held-out loss in nats per reply token, lower is better{base}. A dropped trial's is of the step where it was dropped. "
        f"Trials were evaluated from the lowest loss up, until one passed its gates. Trained for {duration(trained)} in all."
    )


def _rows(record: SweepRecord) -> list[_Row]:
    return [
        _Row(
            number=str(number),
            settings=tuple(value_text(value) for value in trial.settings.values()),
            steps=f"{trial.steps:,} of {trial.planned_steps:,}",
            loss=f"{trial.loss:.3f}" if trial.loss is not None else _MISSING,
            gates=_gates(trial.verdict),
            seconds=f"{trial.train_s:,.1f}",
            result=_result(trial, record),
            is_winner=trial.run_id == record.winner,
        )
        for number, trial in enumerate(record.trials, start=1)
    ]


def _gates(verdict: Verdict | None) -> str:
    if verdict is None:
        return "not evaluated"
    missed = [LABELS.get(gate.name, gate.name) for gate in verdict.gates if not gate.passed]
    return f"{len(missed)} missed: {', '.join(missed)}" if missed else "passed"


def _result(trial: Trial, record: SweepRecord) -> str:
    published = ", published\nby an earlier run" if trial.was_published else ""
    if trial.run_id == record.winner:
        return f"winner{published}"
    if trial.state == "dropped":
        return f"dropped at {percent(trial.rungs[-1].share, 0)}"
    return f"trained{published}" if trial.state == "trained" else trial.state


def _plot(record: SweepRecord) -> str:
    return plots.svg(
        plots.lines(list(_lines(record)), "share of the trial's schedule, %", "held-out loss, nats per token"),
        label="Held-out loss of each trial over the share of its schedule",
        height=3.4,
    )


def _lines(record: SweepRecord) -> Iterator[plots.Line]:
    """Yield a line per trial, numbered at its end, and the winner's last, on top. Only one line of each colour has a name."""
    named: set[str] = set()
    numbered = list(enumerate(record.trials, start=1))
    for number, trial in sorted(numbered, key=lambda pair: (pair[1].run_id == record.winner, pair[1].state == "trained")):
        points = {measured.step: measured.loss for measured in trial.held_out_losses}
        points |= {rung.step: rung.loss for rung in trial.rungs if rung.step not in points}
        if not points:
            continue
        name, color = _look(trial, record)
        x, y = zip(*((100 * step / trial.planned_steps, loss) for step, loss in sorted(points.items())), strict=True)
        yield plots.Line("" if name in named else name, x, y, color, "o-", end=str(number))
        named.add(name)


def _look(trial: Trial, record: SweepRecord) -> tuple[str, str]:
    if trial.run_id == record.winner:
        return "winner", plots.ACCENT
    return ("trained to the end", plots.WARM) if trial.state == "trained" else ("dropped", plots.QUIET)
