"""Plots as inline SVG. Text is not converted to paths, so the browser renders Korean. Axes use the page's text colour."""

from __future__ import annotations

import html
import io
import math
import re
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# placeholder that svg() replaces with currentColor; plots must not use it as a real colour
_INK: Final = "#010203"
ACCENT: Final = "#4f7cff"
"""This colour and the two below have enough contrast on light and dark backgrounds."""
QUIET: Final = "#7d8796"
WARM: Final = "#c2761b"
_END_POINTS: Final = 10
"""Font size of the texts at the ends of lines."""
# matplotlib numbers the groups of each figure from 1, so ids would clash between the figures of a page
_NUMBERED_ID: Final = re.compile(r' id="[A-Za-z][\w.]*_\d+"')


@contextmanager
def _style() -> Iterator[None]:
    import matplotlib as mpl

    ink = dict.fromkeys(("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color"), _INK)
    style: dict[str, Any] = {
        **ink,
        "svg.fonttype": "none",
        "svg.hashsalt": "lora-trainer",
        "font.family": "sans-serif",
        "font.size": 11,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "figure.facecolor": "none",
        "axes.facecolor": "none",
        "savefig.transparent": True,
    }
    with mpl.rc_context(style):
        yield


def svg(*draws: Callable[[Axes], None], label: str, width: float = 5.6, height: float = 2.8) -> str:
    """Return an `<svg>` element without a fixed size, with one panel per function of `draws`, stacked on a shared x-axis.

    `label` is the text for screen readers.
    """
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    with _style():
        figure = Figure(figsize=(width, height), layout="constrained")
        FigureCanvasSVG(figure)
        panels = figure.subplots(len(draws), sharex=True, squeeze=False)[:, 0]
        for draw, axes in zip(draws, panels, strict=True):
            draw(axes)
            axes.label_outer()
        figure.align_ylabels()
        out = io.StringIO()
        with warnings.catch_warnings():
            # the text stays text, and the browser's font has the glyphs
            warnings.filterwarnings("ignore", "Glyph .* missing from font")
            figure.savefig(out, format="svg", metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
    element = out.getvalue()
    element = _NUMBERED_ID.sub("", element[element.index("<svg") :]).replace(_INK, "currentColor")
    head, rest = element.split(">", 1)
    # the page sets the size; the view box keeps the proportions
    kept = " ".join(part for part in head.split() if not part.startswith(("width=", "height=")))
    return f'{kept} role="img" aria-label="{html.escape(label)}">{rest}'


@dataclass(frozen=True, slots=True)
class Line:
    """Data and style of one line of a plot."""

    name: str
    """Legend entry; empty for none."""
    x: Sequence[float]
    y: Sequence[float]
    color: str = ACCENT
    style: str = "-"
    """matplotlib format string, such as `--` or `o-`."""
    band: tuple[Sequence[float], Sequence[float]] | None = None
    """Minimum and maximum of a shaded band around the line."""
    end: str = ""
    """Text beside the last point."""


def lines(
    drawn: Sequence[Line], x_label: str, y_label: str, *, from_zero: bool = False, plain: bool = True
) -> Callable[[Axes], None]:
    """Draw lines with the legend above. `from_zero` starts the y-axis at 0; `plain=False` labels it in powers of ten."""

    def draw(axes: Axes) -> None:
        for line in drawn:
            if line.band:
                axes.fill_between(line.x, *line.band, color=line.color, alpha=0.25, linewidth=0)
            axes.plot(line.x, line.y, line.style, color=line.color, label=line.name or "_", linewidth=1.6, markersize=5)
        axes.set_xlabel(x_label)
        axes.set_ylabel(y_label)
        axes.margins(x=0.02)
        if from_zero:
            axes.set_ylim(bottom=0)
        _label_ends(axes, [line for line in drawn if line.end])
        if not plain:
            axes.ticklabel_format(axis="y", style="sci", scilimits=(0, 0))
        if any(line.name for line in drawn):
            axes.legend(
                frameon=False,
                loc="lower left",
                bbox_to_anchor=(0, 1),
                ncols=len(drawn),
                borderpad=0,
                handlelength=1.4,
                columnspacing=1.2,
            )

    return draw


def _label_ends(axes: Axes, drawn: Sequence[Line]) -> None:
    """Write each line's text beside its last point, moved up where two would overlap."""
    low, high = axes.get_ylim()
    # the layout is not computed yet, so estimate the height that the panel gets
    points_per_unit = 0.7 * 72 * axes.figure.get_figheight() / (high - low)
    tops: dict[float, float] = {}
    for line in sorted(drawn, key=lambda line: line.y[-1]):
        x, y = line.x[-1], line.y[-1]
        text_y = max(y * points_per_unit, tops.get(x, -math.inf) + _END_POINTS)
        tops[x] = text_y
        offset = (5, text_y - y * points_per_unit)
        axes.annotate(line.end, (x, y), xytext=offset, textcoords="offset points", va="center", fontsize=_END_POINTS)


def grouped_horizontal_bars(
    names: Sequence[str], groups: Mapping[str, tuple[Sequence[float], str]], x_label: str
) -> Callable[[Axes], None]:
    """Draw horizontal bars, grouped by name, the first on top. `groups` maps each label to values and a colour."""

    def draw(axes: Axes) -> None:
        bar_height = 0.8 / len(groups)
        for number, (group, (values, color)) in enumerate(groups.items()):
            places = [at - 0.4 + bar_height * (number + 0.5) for at in range(len(names))]
            axes.barh(places, values, height=bar_height, color=color, label=group)
        axes.set_yticks(range(len(names)), names)
        axes.set_ylim(len(names) - 0.4, -0.6)
        axes.set_xlabel(x_label)
        axes.legend(frameon=False, loc="lower left", bbox_to_anchor=(0, 1), ncols=len(groups), borderpad=0, handlelength=1)

    return draw


def bars(names: Sequence[str], values: Sequence[float], x_label: str, y_label: str) -> Callable[[Axes], None]:
    """Draw vertical bars."""

    def draw(axes: Axes) -> None:
        axes.bar(range(len(names)), values, color=ACCENT)
        axes.set_xticks(range(len(names)), names)
        axes.set_xlabel(x_label)
        axes.set_ylabel(y_label)

    return draw


def horizontal_bars(names: Sequence[str], values: Sequence[float], x_label: str) -> Callable[[Axes], None]:
    """Draw horizontal bars, the first on top, each with its value at the end."""

    def draw(axes: Axes) -> None:
        drawn = axes.barh(range(len(names)), values, color=ACCENT)
        axes.bar_label(drawn, padding=3)
        axes.set_yticks(range(len(names)), names)
        axes.invert_yaxis()
        axes.set_xlabel(x_label)

    return draw


def histogram(values: Sequence[int], x_label: str, y_label: str) -> Callable[[Axes], None]:
    """Draw a histogram in bins of 5."""

    def draw(axes: Axes) -> None:
        axes.hist(values, bins=range(0, max(values, default=0) + 6, 5), color=ACCENT)
        axes.set_xlabel(x_label)
        axes.set_ylabel(y_label)

    return draw
