"""Show the plan of a run on a terminal of 80 columns."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Final

from lora_trainer.report.formatting import duration
from lora_trainer.train.run_plan import PersonaPlan, RunPlan
from lora_trainer.train.time_estimate import SOURCES, Seconds

if TYPE_CHECKING:
    from rich.console import RenderableType

_MISSING: Final = "–"
_ROWS: Final[tuple[tuple[str, Callable[[PersonaPlan], str]], ...]] = (
    ("records to train on", lambda plan: f"{plan.train_records:,}"),
    ("records held out", lambda plan: f"{plan.held_out_records:,}"),
    ("records too long", lambda plan: f"{plan.left_out:,}"),
    ("tokens to train on", lambda plan: f"{plan.tokens:,}"),
    ("tokens held out", lambda plan: f"{plan.held_out_tokens:,}"),
    ("optimizer steps", lambda plan: f"{plan.steps:,}"),
    ("tokens of all steps", lambda plan: f"{plan.step_tokens:,}"),
    ("micro batch, tokens", lambda plan: f"{plan.memory.micro_batch_tokens:,}"),
    ("checkpointing", lambda plan: plan.memory.gradient_checkpointing),
    ("GPU memory, GiB", lambda plan: _MISSING if plan.memory.estimated_peak_gib is None else f"{plan.memory.estimated_peak_gib}"),
    ("replies to evaluate", lambda plan: f"{plan.replies:,}"),
    ("training, s", lambda plan: _range(plan.training)),
    ("evaluation, s", lambda plan: _range(plan.evaluation)),
)


def plan_table(plan: RunPlan, price_per_hour: float | None) -> RenderableType:
    """Return a table with a column for each persona, then what the whole run takes and where its estimate comes from."""
    from rich import box
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("persona", no_wrap=True)
    for persona in plan.personas:
        table.add_column(str(persona.blood_type), justify="right")
    for name, value in _ROWS:
        table.add_row(name, *map(value, plan.personas))
    return Group(table, *map(Text, _lines(plan, price_per_hour)))


def _range(seconds: Seconds | None) -> str:
    return _MISSING if seconds is None else f"{seconds.low:.0f}–{seconds.high:.0f}"


def _lines(plan: RunPlan, price_per_hour: float | None) -> Iterator[str]:
    yield f"base: {plan.base}, backend {plan.backend}"
    if plan.free_gib is None:
        yield "device: the CPU"
    else:
        yield f"device: {plan.gpu or 'a GPU that is not here'}, {plan.free_gib:.1f} GiB free"
    if plan.start is None or (total := plan.total) is None:
        yield f"no estimate of seconds: {plan.no_estimate}"
        return
    yield f"start: {_range(plan.start)} s, once: imports, hashing and loading the base"
    yield f"whole run: {duration(total.low)} to {duration(total.high)}"
    if price_per_hour is not None:
        low, high = total.money(price_per_hour)
        yield f"price at {price_per_hour:g} an hour: {low:.2f} to {high:.2f}"
    yield (
        "The seconds are an estimate, scaled from measurements of a 7B base in NF4 on one H200 or H100; a slower GPU takes longer. "
        "They leave out downloads, uploads, evaluation.depth=full and the examination of the judge."
    )
    yield f"measured: benchmarks/results/: {', '.join(SOURCES)}"
