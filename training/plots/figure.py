"""Shared parts of all plots: colours, axes, and marks for infinite values at the edge.

matplotlib (extra "matplotlib") is imported only when a plot is drawn.
"""

from __future__ import annotations

import io
import math
import os
import textwrap
from collections.abc import Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#8C6D31")
"""Okabe and Ito's colours, which colour-blind people can distinguish."""
MARKS = "osD^vPX<>*h"
INK, FAINT = "#333333", "#DDDDDD"
LOG_SNR = "log SNR   (noise → data)"


def new_figure(width: float, height: float) -> Figure:
    """Return an empty white figure; the size is in inches. Raises ImportError without matplotlib.

    >>> new_figure(8, 4).get_size_inches().tolist()
    [8.0, 4.0]
    """
    try:  # not pyplot: the user owns its figures and backend
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(
            "pictures need matplotlib, which is not installed: pip install 'alphabar[matplotlib]'"
        ) from error
    return Figure(figsize=(width, height), layout="constrained", facecolor="white")


def png_of(figure: Figure) -> bytes:
    """Return a figure as a PNG file; safe on any thread.

    >>> png_of(new_figure(2, 1))[:4]
    b'\\x89PNG'
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    file = io.BytesIO()
    FigureCanvasAgg(figure).print_png(file)
    return file.getvalue()


def dress(axes: Axes, title: str, x: str, y: str) -> None:
    """Give axes a title, labels and a faint grid; use integer ticks if x is 'step'."""
    from matplotlib.ticker import MaxNLocator

    axes.set_title(title, loc="left", fontsize=10, color=INK)
    axes.set_xlabel(x, color=INK, fontsize=9)
    axes.set_ylabel(y, color=INK, fontsize=9)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(colors=INK, labelsize=9)
    axes.grid(axis="y" if y else "x", color=FAINT, lw=0.6)
    axes.set_axisbelow(True)
    if x == "step":
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))


def edges(values: Iterable[float]) -> tuple[float, float]:
    """Return the two values at which infinite values are drawn.

    They lie outside all finite values, by a tenth of the range of the finite values.

    >>> edges([0.0, 10.0, math.inf])
    (-1.0, 11.0)
    """
    finite = [value for value in values if math.isfinite(value)] or [0.0]
    margin = 0.1 * (max(finite) - min(finite)) or 1.0
    return min(finite) - margin, max(finite) + margin


def mark_infinity(axis: Axis, low: float, high: float, values: Iterable[float]) -> None:
    """Label the edges at which infinite values are drawn, if there are any."""
    there = set(values)
    ends = {
        at: name
        for at, name, value in ((low, "−∞", -math.inf), (high, "∞", math.inf))
        if value in there
    }
    inside = [tick for tick in axis.get_majorticklocs() if 0.1 < (tick - low) / (high - low) < 0.9]
    ticks = sorted(({tick: f"{tick:g}".replace("-", "−") for tick in inside} | ends).items())
    axis.set_ticks([at for at, _ in ticks], [name for _, name in ticks])


def title(figure: Figure, words: str) -> None:
    """Write the title of the whole figure, in as many lines as needed."""
    size = 9.5 if len(words) < 100 else 8
    # DejaVu Sans: about 0.6 em per letter
    lines = textwrap.fill(words, int(115 * figure.get_size_inches()[0] / size))
    figure.suptitle(lines, x=0.01, ha="left", fontsize=size, color=INK)


def written(figure: Figure, path: str | os.PathLike[str] | None) -> Figure:
    """Return the figure; write it to ``path`` if given (PNG, SVG or PDF, by the file name)."""
    if path is not None:
        figure.savefig(path, dpi=150)
    return figure
