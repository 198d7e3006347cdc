"""Plots as inline SVG: text stays text, so that the reader's browser draws Korean, and ink takes the page's own colour."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# stands for "the text's colour" until the SVG is written; no plot uses it otherwise
_INK: Final = "#010203"
ACCENT: Final = "#4f7cff"
"""Readable on light and on dark."""


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


def svg(draw: Callable[[Axes], None], *, label: str, width: float = 5.6, height: float = 2.8) -> str:
    """What `draw` puts on one pair of axes, as an `<svg>` element without a fixed size. `label` is its text for screen readers."""
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    with _style():
        figure = Figure(figsize=(width, height), layout="constrained")
        FigureCanvasSVG(figure)
        draw(figure.add_subplot())
        out = io.StringIO()
        figure.savefig(out, format="svg", metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
    element = out.getvalue()
    element = element[element.index("<svg") :].replace(_INK, "currentColor")
    head, rest = element.split(">", 1)
    # the size is the page's to say; the view box keeps the proportions
    kept = " ".join(part for part in head.split() if not part.startswith(("width=", "height=")))
    return f'{kept} role="img" aria-label="{label}">{rest}'


def bars(names: Sequence[str], values: Sequence[float], x_label: str, y_label: str) -> Callable[[Axes], None]:
    """Draws upright bars."""

    def draw(axes: Axes) -> None:
        axes.bar(range(len(names)), values, color=ACCENT)
        axes.set_xticks(range(len(names)), names)
        axes.set_xlabel(x_label)
        axes.set_ylabel(y_label)

    return draw


def lying_bars(names: Sequence[str], values: Sequence[float], x_label: str) -> Callable[[Axes], None]:
    """Draws bars that lie, the first on top, each with its value behind it."""

    def draw(axes: Axes) -> None:
        drawn = axes.barh(range(len(names)), values, color=ACCENT)
        axes.bar_label(drawn, padding=3)
        axes.set_yticks(range(len(names)), names)
        axes.invert_yaxis()
        axes.set_xlabel(x_label)

    return draw


def histogram(values: Sequence[int], x_label: str, y_label: str) -> Callable[[Axes], None]:
    """Draws how often values occur, in bins of 5."""

    def draw(axes: Axes) -> None:
        axes.hist(values, bins=range(0, max(values, default=0) + 6, 5), color=ACCENT)
        axes.set_xlabel(x_label)
        axes.set_ylabel(y_label)

    return draw
