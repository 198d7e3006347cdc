"""Terminal tables of a validated data file."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from lora_trainer.data.prompt_cost import PART_NAMES, PromptCost
from lora_trainer.data.validation import FileReport, plural
from lora_trainer.persona.vocabulary import Feeling, IntensityThird
from lora_trainer.report.data_notes import style_facts

if TYPE_CHECKING:
    from rich.console import RenderableType


def validation_table(report: FileReport) -> RenderableType:
    """Return the problems, coverage and token cost of a file."""
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    parts: list[RenderableType] = [
        # one line each, which a terminal folds by itself
        Text(line, no_wrap=True, overflow="ignore")
        for line in report.problem_lines()
    ]
    what = "evaluation prompt" if report.is_prompts else "record"
    codes = [(severity, code, count) for severity, found in report.counts.items() for code, count in sorted(found.items())]
    if codes:
        table = Table("severity", "code", title="Problems", title_justify="left")
        table.add_column("count", justify="right")
        for severity, code, count in codes:
            table.add_row(str(severity), code, f"{count:,}")
        parts.append(table)
    if not report.lines:
        # the problem concerns the whole file, of which no line was read
        return Group(*parts)
    parts.append(
        Text(
            f"{plural(report.records, what)} in {plural(report.lines, 'line')} ({report.blank_lines:,} blank)"
            + ("" if report.is_prompts else _persona_and_questions(report))
        )
    )
    if report.records:
        parts.append(_coverage_table(report))
        if not report.is_prompts:
            parts.append(_style_table(report))
    if report.cost:
        parts.extend(_cost_tables(report.cost))
    parts.extend(Text(f"note: {note.text}") for note in report.notes)
    return Group(*parts)


def _persona_and_questions(report: FileReport) -> str:
    return f"; persona {report.blood_type or 'unknown'}; {report.question_rate:.0%} of the replies ask a question"


def _coverage_table(report: FileReport) -> RenderableType:
    from rich.table import Table

    what = "Prompts" if report.is_prompts else "Records"
    table = Table("feeling", title=f"{what} by feeling and intensity", title_justify="left")
    for third in IntensityThird:
        table.add_column(str(third), justify="right")
    for feeling in Feeling:
        table.add_row(str(feeling), *(f"{report.coverage.get((feeling, third), 0):,}" for third in IntensityThird))
    if not report.is_prompts:
        table.add_section()
        table.add_row("emoji per reply", *(f"{report.emoji_mean[third]:.2f}" for third in IntensityThird))
    return table


def _style_table(report: FileReport) -> RenderableType:
    from rich.table import Table

    replies = report.style.replies
    which = "All replies" if replies == report.records else f"The first {replies:,} replies"
    table = Table(show_header=False, box=None, title=f"{which} together", title_justify="left")
    table.add_column()
    table.add_column(justify="right")
    for name, value in style_facts(report.style):
        table.add_row(name, value)
    return table


def _cost_tables(cost: PromptCost) -> Iterator[RenderableType]:
    from rich.table import Table
    from rich.text import Text

    table = Table("part", title="Tokens per record", title_justify="left")
    for name in ("mean", "p50", "p95", "max", "share"):
        table.add_column(name, justify="right")
    rows = [(name, cost.parts[name]) for name in PART_NAMES]
    for name, lengths in [*rows, ("whole", cost.whole)]:
        if name == "whole":
            table.add_section()
        table.add_row(
            name,
            f"{lengths.mean_tokens:.1f}",
            f"{lengths.p50_tokens:,}",
            f"{lengths.p95_tokens:,}",
            f"{lengths.max_tokens:,}",
            f"{lengths.share:.1%}",
        )
    yield table
    lines = ", ".join(map(str, cost.left_out_lines))
    more = ", …" if cost.left_out > len(cost.left_out_lines) else ""
    where = f": line {lines}{more}" if cost.left_out else ""
    yield Text(f"{plural(cost.left_out, 'record')} longer than {cost.max_length_tokens:,} tokens would be left out{where}")
