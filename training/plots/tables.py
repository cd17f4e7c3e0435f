"""Plots of grids and of sampler tables.

They need matplotlib (extra "matplotlib"), which is imported only when a plot is drawn. Log SNR is
infinite where α = 0 and where x is clean. Such a knot is drawn at the edge of the plot, as a hollow
mark.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from itertools import cycle
from typing import TYPE_CHECKING, Any

from ...noising import NoiseSchedule
from ...sampling.fitting.provenance import Provenance
from ...sampling.grids import make_knots
from ...sampling.knots import Knot
from ...sampling.table import Table
from ...sampling.tracing import Draw, Evaluation, Step
from .figure import (
    COLOURS,
    FAINT,
    INK,
    LOG_SNR,
    MARKS,
    dress,
    edges,
    mark_infinity,
    new_figure,
    title,
    written,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def plot_grids(
    schedule: NoiseSchedule,
    grids: Sequence[str | Mapping[str, Any]] = ("linspace", "trailing", "karras"),
    steps: int = 20,
    path: str | os.PathLike[str] | None = None,
) -> Figure:
    """Plot log SNR against the step, and the log SNR of every network call, for several grids.

    In the second panel, each grid has its own line.

    Args:
        schedule: the schedule.
        grids: names, or mappings with the grid's name under 'grid' and its options.
        steps: number of steps.
        path: file to write the figure to (PNG, SVG or PDF, by its name).

    Returns:
        The Figure.

    Raises:
        ValueError: a grid is unknown.
        ImportError: matplotlib is not installed.

    >>> figure = plot_grids(
    ...     NoiseSchedule.scaled_linear(), ["trailing", {"grid": "karras", "rho": 5.0}], steps=8
    ... )
    >>> [axes.get_title(loc="left") for axes in figure.axes]
    ['log SNR after each step', 'where the network is called']
    """
    laid = {_label(grid): make_knots(schedule, steps, **_asked(grid)) for grid in grids}
    if not laid:
        raise ValueError("name at least one grid")
    figure = new_figure(11, max(4.2, 0.32 * len(laid) + 1.6))
    curves, calls = figure.subplots(1, 2, width_ratios=(1.25, 1), sharey=False)
    low, high = edges(_log_snr(k) for knots in laid.values() for k in knots)
    styles = list(zip(laid.items(), cycle(COLOURS), cycle(MARKS)))
    for (name, knots), colour, mark in styles:
        _curve(curves, knots, low, high, colour, mark, name)
    for line, ((_, knots), colour, mark) in enumerate(styles):
        _calls(calls, knots[:-1], line, low, high, colour, mark)
    dress(curves, "log SNR after each step", "step", LOG_SNR)
    dress(calls, "where the network is called", LOG_SNR, "")
    mark_infinity(curves.yaxis, low, high, [_log_snr(k) for knots in laid.values() for k in knots])
    mark_infinity(
        calls.xaxis, low, high, [_log_snr(k) for knots in laid.values() for k in knots[:-1]]
    )
    if len(laid) <= 10:  # the other panel has the names too
        curves.legend(loc="upper left", fontsize=8, frameon=False, handlelength=1.6)
    calls.set_yticks(range(len(laid)), [name.replace(" (", "\n(") for name in laid])
    calls.tick_params(axis="y", length=0)
    calls.set_ylim(len(laid) - 0.5, -0.5)
    title(figure, f"{steps} steps on {str(schedule).split(' [')[0]}")
    return written(figure, path)


def plot_table(table: Table, path: str | os.PathLike[str] | None = None) -> Figure:
    """Plot a table: log SNR against the step, and the coefficients of each step.

    The coefficients are those of the row that makes the next x: for x itself, the network outputs
    in the order of the calls, the memory of earlier steps, and the noise. Returns the Figure, and
    writes it to ``path``.

    >>> from alphabar.sampling import Sampler
    >>> figure = plot_table(Sampler(NoiseSchedule.scaled_linear(), "dpmpp_2m", steps=8).table)
    >>> [line.get_label() for line in figure.axes[1].lines if not line.get_label().startswith("_")]
    ['x', 'network', 'memory 1']
    """
    figure = new_figure(8.5, 6.6)
    curve, weights = figure.subplots(2, 1, height_ratios=(1, 1.5), sharex=True)
    low, high = edges(_log_snr(k) for k in table.knots)
    _curve(curve, table.knots, low, high, COLOURS[0], "o", table.name)
    series = coefficients(table)
    for (name, values), colour, mark in zip(series.items(), cycle(COLOURS), cycle(MARKS)):
        at = [i + 1 for i, v in enumerate(values) if v is not None]
        weights.plot(
            at,
            [v for v in values if v is not None],
            color=colour,
            marker=mark,
            ms=4.5,
            lw=1.4,
            label=name,
        )
    weights.axhline(0, color=INK, lw=0.8, zorder=0)
    largest = max(abs(v) for values in series.values() for v in values if v is not None)
    if largest > 20:
        weights.set_yscale("symlog", linthresh=1.0)
    dress(curve, "log SNR after each step", "", LOG_SNR)
    dress(
        weights,
        "what the next x is made of",
        "step",
        f"coefficient{', symmetric log scale' if largest > 20 else ''}",
    )
    mark_infinity(curve.yaxis, low, high, [_log_snr(k) for k in table.knots])
    weights.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), fontsize=9, frameon=False)
    title(
        figure,
        f"{table.name}: {len(table.steps)} steps, {table.evaluations} evaluations, {table.draws} "
        "draws",
    )
    return written(figure, path)


def plot_fits(fits: Sequence[Provenance], path: str | os.PathLike[str] | None = None) -> Figure:
    """Plot the error against the number of network calls, of fitted tables and of known methods.

    Each known method is shown on its best grid.

    Args:
        fits: the records of tables that were fitted to one network.
        path: file to write the figure to.

    Returns:
        The Figure.

    Raises:
        ValueError: there are no fits.
        ImportError: matplotlib is not installed.

    >>> from alphabar.sampling import fit_table
    >>> table = fit_table(lambda x, t: x.tanh(), NoiseSchedule.flow(), 4, shape=(8,), seeds=16)
    >>> plot_fits([table.provenance]).axes[0].get_ylabel()
    'error on seeds held out'
    """
    if not fits:
        raise ValueError("a plot of fits needs at least one fit")
    figure = new_figure(7.5, 4.6)
    axes = figure.subplots()
    known: dict[str, dict[int, float]] = {}
    for fit in fits:
        for name, error in fit.known:
            best = known.setdefault(name.partition(",")[0], {})
            best[fit.evaluations] = min(error, best.get(fit.evaluations, math.inf))
    for name, errors in known.items():
        axes.plot(list(errors), list(errors.values()), marker=".", linewidth=1, label=name)
    own = {fit.evaluations: fit.fitted_error for fit in fits}
    axes.plot(list(own), list(own.values()), color="black", marker="o", label="fitted")
    axes.set_yscale("log")
    axes.set_xticks(list(own))
    dress(axes, "distance to the teacher", "network calls", "error on seeds held out")
    axes.legend(fontsize=8, ncols=2)
    title(figure, f"tables fitted to {fits[0].teacher}")
    return written(figure, path)


def coefficients(table: Table) -> dict[str, list[float | None]]:
    """Return the coefficients of the row that makes the next x.

    For each vector of the basis, there is one number per step, or None if the step has no such
    vector.

    >>> from alphabar.sampling import Sampler
    >>> rows = coefficients(Sampler(NoiseSchedule.scaled_linear(), "ddim", steps=3).table)
    >>> {name: len(values) for name, values in rows.items()}
    {'x': 3, 'network': 3}
    """
    memory, rows = 0, []
    for step in table.steps:
        row = dict(step.carry[0])
        rows.append(
            {name: row.get(place, 0.0) for place, name in enumerate(_vectors(step, memory))}
        )
        memory = len(step.carry) - 1
    names = sorted({name for row in rows for name in row}, key=_in_order)
    return {name: [row.get(name) for row in rows] for name in names}


ORDER = ("x", "network", "unconditional", "memory", "noise")


def _vectors(step: Step, memory: int) -> list[str]:
    names = ["x", *(f"memory {j + 1}" for j in range(memory))]
    for op in step.ops:
        kind = (
            "network"
            if isinstance(op, Evaluation)
            else "noise"
            if isinstance(op, Draw)
            else "unconditional"
        )
        earlier = sum(name.split()[0] == kind for name in names)
        names.append(f"{kind} {earlier + 1}" if earlier else kind)
    return names


def _in_order(name: str) -> tuple[int, str]:
    return ORDER.index(name.split()[0]), name


def _asked(grid: str | Mapping[str, Any]) -> dict[str, Any]:
    return {"grid": grid} if isinstance(grid, str) else dict(grid)


def _label(grid: str | Mapping[str, Any]) -> str:
    asked = _asked(grid)
    options = ", ".join(f"{name}={value}" for name, value in asked.items() if name != "grid")
    return f"{asked.get('grid', '')} ({options})".strip() if options else str(asked.get("grid", ""))


def _log_snr(knot: Knot) -> float:
    return 2 * knot.half_log_snr


def _curve(
    axes: Axes, knots: Sequence[Knot], low: float, high: float, colour: str, mark: str, name: str
) -> None:
    values = [_log_snr(knot) for knot in knots]
    drawn = [min(max(value, low), high) for value in values]
    solid = [value if math.isfinite(value) else math.nan for value in values]
    # dashed line to the infinite ends
    axes.plot(range(len(drawn)), drawn, color=colour, lw=1.0, ls=(0, (2, 2)), alpha=0.7)
    axes.plot(range(len(solid)), solid, color=colour, marker=mark, ms=4, lw=1.5, label=name)
    for i, value in enumerate(values):
        if not math.isfinite(value):
            axes.plot(i, drawn[i], marker=mark, ms=6, mfc="white", mec=colour, zorder=3)


def _calls(
    axes: Axes, knots: Sequence[Knot], line: int, low: float, high: float, colour: str, mark: str
) -> None:
    axes.axhline(line, color=FAINT, lw=1, zorder=0)
    for knot in knots:
        value = _log_snr(knot)
        inside = math.isfinite(value)
        axes.plot(
            min(max(value, low), high),
            line,
            marker=mark,
            ms=5,
            mec=colour,
            mfc=colour if inside else "white",
            ls="",
        )
