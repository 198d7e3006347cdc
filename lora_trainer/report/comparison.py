"""`lora-trainer compare`: compare the numbers of several runs on the terminal and as an HTML page."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from lora_trainer.errors import ConfigError, LoraTrainerError
from lora_trainer.escaping import one_line
from lora_trainer.evaluate.depth_metrics import Share
from lora_trainer.evaluate.metrics import METRICS_SCHEMA, Estimate, RunMetrics
from lora_trainer.evaluate.scope import scope
from lora_trainer.persona.specs import persona_spec
from lora_trainer.persona.vocabulary import BloodType
from lora_trainer.report.formatting import (
    CONVERSATION_LABELS,
    LABELS,
    MAX_CHARACTERS,
    duration,
    flattened,
    number_text,
    percent,
    points,
    value_text,
)
from lora_trainer.report.html import render_page
from lora_trainer.report.run_page import taken_for_row
from lora_trainer.store.documents import parse_object, validated
from lora_trainer.store.manifest import MANIFEST_NAME, check_run_manifest, read_manifest
from lora_trainer.store.opening import open_storage
from lora_trainer.store.retry import RetryBudget
from lora_trainer.train.adapter_format import check_published_adapter

if TYPE_CHECKING:
    from rich.console import RenderableType

_METRICS: Final = (
    "rule_score",
    "win_rate",
    "exact_json",
    "emotion_in_vocabulary",
    "stop",
    "one_or_two_sentences",
    "informal_speech",
    "persona",
    "persona_by_form",
    "question",
    "characters",
    "emotion_appropriateness",
    "emoji_intensity",
    "emoji",
    "repetition",
    "copied_words",
    "verbatim_copies",
)
_MISSING: Final = "–"
_CAPTION: Final = "Replies: greedy decoding, with 95 % bounds. Settings: only those that differ."


@dataclass(frozen=True, slots=True)
class ComparedRun:
    """The parts of one bundle that a comparison needs."""

    uri: str
    manifest: Mapping[str, Any]
    metrics: RunMetrics

    @property
    def name(self) -> str:
        """Column heading: persona and the first half of the run id."""
        return f"{self.metrics.blood_type} {one_line(self.metrics.run_id[:8])}"


@dataclass(frozen=True, slots=True)
class Row:
    """One row of the comparison, with a cell per run."""

    label: str
    cells: tuple[str, ...]
    good: tuple[bool | None, ...] = ()
    """Whether each cell is a good result; empty for a row without colours."""


@dataclass(frozen=True, slots=True)
class Comparison:
    """Rows, settings and notes of several runs."""

    runs: tuple[ComparedRun, ...]
    sections: tuple[tuple[str, tuple[Row, ...]], ...]
    settings: Mapping[str, tuple[Any, ...]]
    """Dotted names of the settings that differ, with their value in each run."""
    notes: tuple[str, ...]
    """Reasons why the numbers are not directly comparable."""

    @property
    def personas(self) -> int:
        """Number of distinct personas."""
        return len({run.metrics.blood_type for run in self.runs})

    def as_json(self) -> dict[str, Any]:
        """Return the comparison for `--json`, with unrounded values."""
        return {
            "runs": [
                {
                    "uri": run.uri,
                    "base": run.manifest["base"],
                    "data": run.manifest["data"],
                    "metrics": run.metrics.as_json(),
                }
                for run in self.runs
            ],
            "settings": {name: list(values) for name, values in self.settings.items()},
            "notes": list(self.notes),
        }


def read_run(uri: str, retry_budget: RetryBudget | None = None) -> ComparedRun:
    """Read the bundle or re-evaluation at `uri`, an `s3://` or `file://` URI or a folder.

    Raises `ConfigError` if there is no bundle, or a damaged one, and `StorageError` if it cannot be read.
    """
    storage = open_storage(uri, retry_budget)
    manifest = read_manifest(storage, "")
    if manifest is None:
        raise ConfigError(
            f"{storage.uri}: got no manifest.json, expected a finished bundle, such as <output>/adapters/A/<run id>/; "
            "check the path"
        )
    check_run_manifest(manifest, f"{storage.uri}{MANIFEST_NAME}", required=("base", "data", "config"))
    check_published_adapter(storage, manifest)
    where = f"{storage.uri}metrics.json"
    found = storage.read_bytes("metrics.json")
    if found is None:
        raise ConfigError(f"{where}: missing, although manifest.json exists; the bundle is damaged: move it away and run again")
    try:
        metrics = validated(RunMetrics, parse_object(found.data, where), where)
    except ConfigError as error:
        raise ConfigError(
            [
                *error.problems,
                (
                    f"{where}: expected metrics of schema {METRICS_SCHEMA}; the file was modified or written by another version: "
                    "evaluate that run again"
                ),
            ]
        ) from None
    return ComparedRun(storage.uri, manifest, metrics)


def compare(uris: Sequence[str], retry_budget: RetryBudget | None = None) -> Comparison:
    """Compare the bundles at `uris`. Raises one `ConfigError` or `StorageError` that lists the problems of all bundles."""
    if len(uris) < 2:
        raise ConfigError(f"compare: got {len(uris)} run, expected at least two: lora-trainer compare RUN RUN...")
    runs: list[ComparedRun] = []
    failures: list[LoraTrainerError] = []
    for uri in uris:
        try:
            runs.append(read_run(uri, retry_budget))
        except LoraTrainerError as error:
            failures.append(error)
    if failures:
        # prefer ConfigError: a retry cannot fix the command
        kind = next((type(failure) for failure in failures if isinstance(failure, ConfigError)), type(failures[0]))
        raise kind([problem for failure in failures for problem in failure.problems])
    settings = _differing_settings(runs)
    return Comparison(tuple(runs), tuple(_sections(runs)), settings, tuple(_notes(runs)))


def _differing_settings(runs: Sequence[ComparedRun]) -> dict[str, tuple[Any, ...]]:
    configs = [flattened(run.manifest["config"]) for run in runs]
    names = dict.fromkeys(name for config in configs for name in config)
    found = {name: tuple(config.get(name) for config in configs) for name in names}
    # leave out blood_type, which the column heading shows
    return {name: values for name, values in found.items() if name != "blood_type" and any(value != values[0] for value in values)}


def _bases(runs: Sequence[ComparedRun]) -> int:
    return len({run.manifest["base"]["identity"] for run in runs})


def _notes(runs: Sequence[ComparedRun]) -> Iterator[str]:
    if len({run.metrics.evaluation.evaluation_id for run in runs}) > 1:
        yield "The runs differ in questions or evaluation settings (evaluation_id): compare their replies with care."
    if _bases(runs) > 1:
        yield "The runs differ in base model: losses and win rates refer to each run's own base."
    by_persona: dict[BloodType, set[str]] = {}
    for run in runs:
        by_persona.setdefault(run.metrics.blood_type, set()).add(run.manifest["data"]["sha256"])
    if any(len(data) > 1 for data in by_persona.values()):
        yield "Runs of the same persona differ in training data, so their held-out records differ, too."


def _sections(runs: Sequence[ComparedRun]) -> Iterator[tuple[str, tuple[Row, ...]]]:
    all_metrics = [run.metrics for run in runs]

    def row(label: str, cells: Sequence[str]) -> Row:
        return Row(label, tuple(cells))

    held_out = [metrics.held_out for metrics in all_metrics]
    all_missed = [
        [
            f"{LABELS.get(gate.name, one_line(gate.name, MAX_CHARACTERS))} by "
            + (f"{gate.missed_by:g}" if gate.is_count else f"{gate.missed_by:.3f}")
            for gate in metrics.verdict.gates
            if not gate.passed
        ]
        for metrics in all_metrics
    ]
    yield (
        "Verdict",
        (
            Row(
                "verdict",
                tuple("✓ passed" if metrics.verdict.passed else "✗ not passed" for metrics in all_metrics),
                tuple(metrics.verdict.passed for metrics in all_metrics),
            ),
            row("gates missed", ["\n".join(missed) or "none" for missed in all_missed]),
            row("judged, and what not", [scope(metrics.verdict).text for metrics in all_metrics]),
        ),
    )
    yield (
        "Run",
        (
            row("persona", [f"{metrics.blood_type} {persona_spec(metrics.blood_type).name}" for metrics in all_metrics]),
            row("run", [one_line(metrics.run_id, MAX_CHARACTERS) for metrics in all_metrics]),
            row("started", [one_line(str(run.manifest["started_at"])[:16].replace("T", " ")) for run in runs]),
            *(
                [row("base model", [one_line(str(run.manifest["base"].get("id")), MAX_CHARACTERS) for run in runs])]
                if _bases(runs) > 1
                else []
            ),
        ),
    )
    yield (
        "Held out",
        (
            row("loss (base)", [f"{held.loss_adapter:.3f} ({held.loss_base:.3f})" for held in held_out]),
            row(
                "perplexity (base)",
                [f"{held.perplexity_adapter:,.2f} ({held.perplexity_base:,.2f})" for held in held_out],
            ),
        ),
    )
    yield "Replies", tuple(_metric_rows(all_metrics))
    if any(metrics.evaluation.depth for metrics in all_metrics):
        yield "In depth", tuple(_depth_rows(all_metrics))
    yield (
        "Training",
        (
            row("records", [f"{m.training.records:,}" for m in all_metrics]),
            row("steps", [f"{m.training.steps:,}" for m in all_metrics]),
            row("published step", ["–" if m.training.kept_step is None else f"{m.training.kept_step:,}" for m in all_metrics]),
            row("loss of last step", [f"{m.training.loss_last:.3f}" for m in all_metrics]),
            row("tokens/s", [f"{m.training.tokens_per_s:,.1f}" for m in all_metrics]),
            row("training time", [duration(m.training.train_s) for m in all_metrics]),
            row("peak memory", [f"{m.peak_memory_gib:.2f} GiB" for m in all_metrics]),
        ),
    )


def _metric_rows(all_metrics: Sequence[RunMetrics]) -> Iterator[Row]:
    for name in _METRICS:
        estimates = [
            m.evaluation.greedy.win_rate if name == "win_rate" else getattr(m.evaluation.greedy.adapter, name) for m in all_metrics
        ]
        yield Row(LABELS[name], tuple(_cell(name, estimate) for estimate in estimates))
    judges = [m.evaluation.judge for m in all_metrics]
    if any(judges):
        yield Row("Judge's preference", tuple(_cell("win_rate", judge.win_rate) if judge else _MISSING for judge in judges))


def _depth_rows(all_metrics: Sequence[RunMetrics]) -> Iterator[Row]:
    """Yield what the deep evaluations measured; a run without one has dashes."""
    deep = [metrics.evaluation.depth for metrics in all_metrics]

    def row(label: str, name: str, shares: Sequence[Share | None]) -> Row:
        return Row(label, tuple(_cell(name, share) if share and share.of else _MISSING for share in shares))

    for name, label in CONVERSATION_LABELS.items():
        shares = [getattr(depth.adapter.conversations, name) if depth else None for depth in deep]
        yield row(f"Conversations: {label[0].lower()}{label[1:]}", name, shares)
    yield row("Holds under pressure", "holds", [depth.adapter.pressure.holds if depth else None for depth in deep])
    yield row("Right answers", "right", [depth.adapter.ability.right if depth else None for depth in deep])
    yield Row("Right answers, less the base's", tuple(points(depth.ability_difference) if depth else _MISSING for depth in deep))


def _cell(name: str, estimate: Estimate | Share) -> str:
    value = number_text(name, estimate.value)
    if estimate.lower is None or estimate.upper is None:
        return value
    # use no space inside the interval, so that a narrow column breaks before it
    lower = number_text(name, estimate.lower).partition("\u00a0")[0]
    return f"{value} ({lower}–{number_text(name, estimate.upper)})"


def setting_rows(comparison: Comparison) -> list[Row]:
    """Return a row per setting that differs."""
    return [
        Row(one_line(name, MAX_CHARACTERS), tuple(_MISSING if value is None else value_text(value) for value in values))
        for name, values in comparison.settings.items()
    ]


# --- rendering -------------------------------------------------------------------------------------------------------


def comparison_table(comparison: Comparison) -> RenderableType:
    """Render the comparison for a terminal."""
    from rich import box
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    table = Table(
        "", *(run.name for run in comparison.runs), box=box.SIMPLE_HEAD, pad_edge=False, caption=_CAPTION, caption_justify="left"
    )
    for column in table.columns:
        column.overflow = "fold"
    sections = [*comparison.sections, ("Settings", tuple(setting_rows(comparison)))]
    for title, rows in sections:
        table.add_row(Text(title, style="bold"))
        for number, row in enumerate(rows):
            # rich breaks lines at the non-breaking space between number and unit, so remove it
            cells = [Text(cell.replace("\u00a0", ""), style=_style(row, at)) for at, cell in enumerate(row.cells)]
            table.add_row(Text(row.label), *cells, end_section=number == len(rows) - 1)
        if not rows:
            table.add_row(Text("none", style="dim"))
    parts: list[RenderableType] = [table]
    if comparison.personas > 1:
        matrix = Table(
            "replies of",
            title="Predicted persona, readable replies",
            title_justify="left",
            box=box.SIMPLE_HEAD,
            pad_edge=False,
        )
        for persona in BloodType:
            matrix.add_column(str(persona), justify="right")
        for run in comparison.runs:
            shares = [share for _, share in taken_for_row(run.name, run.metrics.evaluation.greedy.adapter)["cells"]]
            own = list(BloodType).index(run.metrics.blood_type)
            matrix.add_row(run.name, *(Text(f"{share:.1%}", style="bold" if at == own else "") for at, share in enumerate(shares)))
        parts.append(matrix)
    parts += [Text(note, style="yellow") for note in comparison.notes]
    return Group(*parts)


def _style(row: Row, at: int) -> str:
    return "" if not row.good else "green" if row.good[at] else "red"


def comparison_page(comparison: Comparison) -> str:
    """Render the comparison as one self-contained HTML page."""
    return render_page(
        "comparison.html.jinja",
        runs=comparison.runs,
        sections=comparison.sections,
        settings=setting_rows(comparison),
        notes=comparison.notes,
        caption=_CAPTION,
        personas=[(str(name), persona_spec(name).name) for name in BloodType],
        matrix=[taken_for_row(run.name, run.metrics.evaluation.greedy.adapter) for run in comparison.runs]
        if comparison.personas > 1
        else [],
        percent=percent,
    )
