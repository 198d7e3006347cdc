"""Terminal tables of a validated data file."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from lora_trainer.data.prompt_cost import PART_NAMES, PromptCost
from lora_trainer.data.records import PromptTag
from lora_trainer.data.validation import FileReport
from lora_trainer.messages import ENGLISH, Message, Say, counted, speaker
from lora_trainer.persona.vocabulary import Feeling, IntensityThird
from lora_trainer.report.data_notes import style_facts

if TYPE_CHECKING:
    from rich.console import RenderableType


def validation_table(report: FileReport, language: str = ENGLISH) -> RenderableType:
    """Return the problems, coverage and token cost of a file."""
    say = speaker(language)
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    parts: list[RenderableType] = [
        # one line each, which a terminal folds by itself
        Text(say(line), no_wrap=True, overflow="ignore")
        for line in report.problem_lines()
    ]
    codes = [(severity, code, count) for severity, found in report.counts.items() for code, count in sorted(found.items())]
    if codes:
        table = Table(say(Message("severity")), say(Message("code")), title=say(Message("Problems")), title_justify="left")
        table.add_column(say(Message("count")), justify="right")
        for severity, code, count in codes:
            table.add_row(str(severity), code, f"{count:,}")
        parts.append(table)
    if not report.lines:
        # the problem concerns the whole file, of which no line was read
        return Group(*parts)
    parts.append(Text(say(_totals(report))))
    if report.records:
        parts.append(_coverage_table(report, say))
        if report.tags:
            parts.append(_tags_table(report, say))
        if not report.is_prompts:
            parts.append(_style_table(report, say))
    if report.cost:
        parts.extend(_cost_tables(report.cost, say))
    parts.extend(Text(say(Message("note: {note}", note=note.text))) for note in report.notes)
    return Group(*parts)


def _totals(report: FileReport) -> Message:
    if report.is_prompts:
        records = counted(report.records, "{count:,} evaluation prompt", "{count:,} evaluation prompts")
    else:
        records = counted(report.records, "{count:,} record", "{count:,} records")
    lines = counted(report.lines, "{count:,} line", "{count:,} lines")
    totals = Message("{records} in {lines} ({blank:,} blank)", records=records, lines=lines, blank=report.blank_lines)
    if report.is_prompts:
        return totals
    return Message(
        "{totals}; persona {persona}; {rate:.0%} of the replies ask a question",
        totals=totals,
        persona=report.blood_type or Message("unknown"),
        rate=report.question_rate,
    )


def _coverage_table(report: FileReport, say: Say) -> RenderableType:
    from rich.table import Table

    title = Message("Prompts by feeling and intensity") if report.is_prompts else Message("Records by feeling and intensity")
    table = Table(say(Message("feeling")), title=say(title), title_justify="left")
    for third in IntensityThird:
        table.add_column(str(third), justify="right")
    for feeling in Feeling:
        table.add_row(str(feeling), *(f"{report.coverage.get((feeling, third), 0):,}" for third in IntensityThird))
    if not report.is_prompts:
        table.add_section()
        table.add_row(say(Message("emoji per reply")), *(f"{report.emoji_mean[third]:.2f}" for third in IntensityThird))
    return table


def _tags_table(report: FileReport, say: Say) -> RenderableType:
    from rich.table import Table

    table = Table(say(Message("tag")), title=say(Message("Prompts by tag")), title_justify="left")
    table.add_column(say(Message("count")), justify="right")
    for tag in PromptTag:
        table.add_row(str(tag), f"{report.tags.get(tag, 0):,}")
    return table


def _style_table(report: FileReport, say: Say) -> RenderableType:
    from rich.table import Table

    replies = report.style.replies
    title = (
        Message("All replies together")
        if replies == report.records
        else Message("The first {replies:,} replies together", replies=replies)
    )
    table = Table(show_header=False, box=None, title=say(title), title_justify="left")
    table.add_column()
    table.add_column(justify="right")
    for name, value in style_facts(report.style):
        table.add_row(say(name), value)
    return table


def _cost_tables(cost: PromptCost, say: Say) -> Iterator[RenderableType]:
    from rich.table import Table
    from rich.text import Text

    table = Table(say(Message("part")), title=say(Message("Tokens per record")), title_justify="left")
    for heading in (Message("mean"), Message("p50"), Message("p95"), Message("max"), Message("share")):
        table.add_column(say(heading), justify="right")
    rows = [(name, cost.parts[name]) for name in PART_NAMES]
    for name, lengths in [*rows, (say(Message("whole")), cost.whole)]:
        if lengths is cost.whole:
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
    left_out = counted(
        cost.left_out,
        "{count:,} record longer than {most:,} tokens would be left out",
        "{count:,} records longer than {most:,} tokens would be left out",
        most=cost.max_length_tokens,
    )
    if cost.left_out:
        left_out = Message("{records}: line {lines}", records=left_out, lines=f"{lines}{more}")
    yield Text(say(left_out))
