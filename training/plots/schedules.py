"""Plots of training settings: schedules, loss weights and timestep densities, several side by side.

They need matplotlib, which is imported only when a plot is drawn. Infinite values are drawn at the
edge of the plot.
"""

from __future__ import annotations

import math
import os
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ...noising import Karras, NoiseSchedule, Timesteps, Truncated, Weighting
from ...noising.curves.base import Curve
from ...noising.utils.bisection import bisect
from .figure import COLOURS, LOG_SNR, dress, edges, mark_infinity, new_figure, title, written

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

POINTS = 600
STYLES = ("-", (0, (5, 1.6)), (0, (1.2, 1.4)), (0, (6, 1.5, 1.2, 1.5)))
TIME = "share of training time   (data → noise)"
DECADES = 6  # of weights to show
DENSEST = 8.0  # times the uniform density; higher values are cut off


def plot_schedules(
    schedules: Mapping[str, NoiseSchedule], path: str | os.PathLike[str] | None = None
) -> Figure:
    """Plot α, σ and log SNR of several schedules over the share of training time.

    A truncated schedule is drawn over its part of the whole schedule. Where SNR is 0, a hollow mark
    is drawn at the edge.

    Args:
        schedules: the schedules by their labels.
        path: file to write the figure to.

    Returns:
        The Figure.

    Raises:
        ValueError: there are no schedules.
        ImportError: matplotlib is not installed.

    >>> plain = NoiseSchedule.scaled_linear(prediction="v_prediction")
    >>> figure = plot_schedules({"plain": plain, "zero SNR": plain.zero_terminal_snr()})
    >>> [axes.get_title(loc="left") for axes in figure.axes]
    ['signal level α', 'noise level σ', 'log SNR']
    """
    _require("schedule", schedules)
    figure = new_figure(12.5, 4.2)
    panels = figure.subplots(1, 3)
    values = {label: (*_along(s.curve), s) for label, s in schedules.items()}
    log_snr = {label: s.log_snr(t).tolist() for label, (_, t, s) in values.items()}
    everywhere = [value for listed in log_snr.values() for value in listed]
    low, high = edges(everywhere)
    rings: Counter[tuple[float, float]] = Counter()
    for (label, (x, t, schedule)), style in zip(values.items(), _styles(len(values)), strict=True):
        for axes, level in zip(panels[:2], (schedule.alpha, schedule.sigma), strict=True):
            axes.plot(x.tolist(), level(t).tolist(), label=label, **style)
        drawn = [value if math.isfinite(value) else math.nan for value in log_snr[label]]
        panels[2].plot(x.tolist(), drawn, label=label, **style)
        for at, value in zip(x.tolist(), log_snr[label], strict=True):
            # concentric rings, because several schedules may share an end
            if math.isinf(value):
                ring = {
                    "marker": "o",
                    "ms": 4 + 4 * rings[at, value],
                    "mfc": "none",
                    "mec": style["color"],
                }
                panels[2].plot(at, max(low, min(high, value)), clip_on=False, zorder=3, **ring)
                rings[at, value] += 1
    for axes, name in zip(panels, ("signal level α", "noise level σ", "log SNR"), strict=True):
        dress(axes, name, TIME, " ")
        axes.set_xlim(-0.02, 1.02)
    loudest = max(float(s.sigma(t).max()) for _, t, s in values.values())
    panels[0].set_ylim(-0.03, 1.05)
    if loudest > 2:  # variance exploding: σ covers several decades
        panels[1].set_yscale("log")
        panels[1].set_ylim(1e-3, 1.5 * loudest)
    else:
        panels[1].set_ylim(-0.03, 1.05)
    panels[2].set_ylim(low, high)
    mark_infinity(panels[2].yaxis, low, high, everywhere)
    _legend_below(figure, panels[0], len(values))
    title(figure, "noise schedules: x_t = α x_0 + σ ε")
    return written(figure, path)


def plot_weights(
    schedule: NoiseSchedule,
    weightings: Mapping[str, Weighting],
    predictions: Sequence[str] = (),
    path: str | os.PathLike[str] | None = None,
) -> Figure:
    """Plot the weight on the target's error over log SNR.

    There is one panel per prediction type, and one line per weighting. A line ends where its weight
    is 0.

    Args:
        schedule: the schedule.
        weightings: the weightings by their labels.
        predictions: names of prediction types; default: the schedule's own.
        path: file to write the figure to.

    Raises:
        ValueError: there are no weightings, a weighting is learned, or a prediction type is
            ill-posed on the schedule.

    >>> from alphabar.noising import MinSNR
    >>> figure = plot_weights(
    ...     NoiseSchedule.scaled_linear(), {"min-SNR": MinSNR()}, ["epsilon", "v_prediction"]
    ... )
    >>> [axes.get_title(loc="left") for axes in figure.axes]
    ['weight on the error of epsilon', 'weight on the error of v_prediction']
    """
    _require("weighting", weightings)
    names = list(predictions) or [schedule.prediction.name]
    figure = new_figure(max(7.5, 4.4 * len(names) + 0.6), 4.6)
    panels: Sequence[Axes] = figure.subplots(1, len(names), squeeze=False)[0]
    _, t = _along(schedule.curve)
    log_snr = schedule.log_snr(t)
    inside = log_snr.isfinite()
    for name, axes in zip(names, panels, strict=True):
        own = schedule if name == schedule.prediction.name else schedule.with_prediction(name)
        drawn = {
            label: _weights(label, weighting, own, t) for label, weighting in weightings.items()
        }
        for (label, weight), style in zip(drawn.items(), _styles(len(drawn)), strict=True):
            shown = weight.where(weight > 0, math.nan)[inside]
            axes.plot(log_snr[inside].tolist(), shown.tolist(), label=label, **style)
        dress(
            axes, f"weight on the error of {name}", LOG_SNR, "weight" if axes is panels[0] else " "
        )
        axes.set_yscale("log")
        positive = torch.cat(
            [weight[inside & (weight > 0) & weight.isfinite()] for weight in drawn.values()]
        )
        if positive.numel():
            top = float(positive.max())
            axes.set_ylim(max(float(positive.min()) / 1.6, top / 10**DECADES), top * 1.6)
    _legend_below(figure, panels[0], len(weightings))
    title(figure, f"loss weights on {str(schedule).split(' with ')[0]}")
    return written(figure, path)


def _weights(label: str, weighting: Weighting, schedule: NoiseSchedule, t: Tensor) -> Tensor:
    if is_learned(weighting):
        raise ValueError(
            f"weighting {label!r} is learned: what its weights are, only training says"
        )
    alpha, sigma = schedule.alpha(t), schedule.sigma(t)
    return weighting(
        alpha, sigma, schedule.prediction.determinant(alpha, sigma), schedule.curve.fraction(t)
    )


def is_learned(entry: object) -> bool:
    """Return whether a weighting or a density has parameters or a history.

    If so, it is unknown before training.

    >>> from alphabar.noising import MinSNR
    >>> is_learned(MinSNR())
    False
    """
    if isinstance(entry, nn.Module):
        return True
    return any(
        callable(make := getattr(entry, name, None)) and make() is not None
        for name in ("log_variance", "history")
    )


def plot_timesteps(
    schedule: NoiseSchedule,
    densities: Mapping[str, Timesteps],
    path: str | os.PathLike[str] | None = None,
) -> Figure:
    """Plot densities of training times over the share of training time and over log SNR.

    The density between two times is the share of samples between them, divided by their distance.
    The share is found by bisection of the quantile function, to the last bit: there is no random
    sampling and no smoothing. On a discrete schedule, the plot shows the probability of each
    timestep.

    Args:
        schedule: the schedule.
        densities: the timestep densities by their labels.
        path: file to write the figure to.

    Raises:
        ValueError: there are no densities, or a density depends on measured losses.

    >>> from alphabar.noising import UniformTimesteps
    >>> figure = plot_timesteps(NoiseSchedule.flow(), {"uniform": UniformTimesteps()})
    >>> [axes.get_title(loc="left") for axes in figure.axes]
    ['density over training time', 'density over log SNR']
    """
    _require("timestep density", densities)
    figure = new_figure(11, 4.6)
    over_time, over_log_snr = figure.subplots(1, 2)
    for (label, density), style in zip(densities.items(), _styles(len(densities)), strict=True):
        if is_learned(density):
            raise ValueError(
                f"timestep density {label!r} follows measured losses: what it is, only training "
                "says"
            )
        for axes, (x, y) in zip(
            (over_time, over_log_snr), densities_of(density, schedule.curve), strict=True
        ):
            axes.plot(x.tolist(), y.tolist(), label=label, **style)
    dress(over_time, "density over training time", TIME, "times the uniform density")
    dress(over_log_snr, "density over log SNR", LOG_SNR, "probability per unit of log SNR")
    over_time.set_xlim(-0.02, 1.02)
    top = max(float(line.get_ydata().max()) for line in over_time.lines)
    over_time.set_ylim(0, min(1.08 * top, DENSEST))
    over_log_snr.set_ylim(bottom=0)
    _legend_below(figure, over_time, len(densities))
    title(figure, f"training times on {str(schedule).split(' with ')[0]}")
    return written(figure, path)


def densities_of(
    density: Timesteps, curve: Curve
) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Return (share of training time, density) and (log SNR, density) as float64.

    Each density is exact on its interval.

    >>> from alphabar.noising import Flow, UniformTimesteps
    >>> (x, p), _ = densities_of(UniformTimesteps(), Flow())
    >>> round(p.min().item(), 9), round(p.max().item(), 9)
    (1.0, 1.0)
    """
    if curve.is_discrete:
        t = curve.time_at_index(torch.arange(curve.num_train_timesteps, dtype=torch.float64))
        mass = _share_until(density, curve, t).diff(prepend=torch.zeros(1, dtype=torch.float64))
        x = (torch.arange(len(t), dtype=torch.float64) + 0.5) / len(t)
        log_snr = curve.log_snr(t)
        between = torch.cat([log_snr[:1], (log_snr[1:] + log_snr[:-1]) / 2, log_snr[-1:]])
        width = -between.diff()
        width[0], width[-1] = 2 * width[0], 2 * width[-1]
        inside = width.isfinite()  # zero SNR has no position on the log SNR axis
        return (x, mass * len(t)), (log_snr[inside], (mass / width)[inside])
    x = torch.linspace(0, 1, POINTS + 1, dtype=torch.float64)
    shares = _share_until(density, curve, curve.time_at_quantile(x))
    shares[0] = 0  # samples at the first time belong to the first interval
    over_time = shares.diff() * POINTS
    ends = (
        curve.log_snr(torch.tensor([curve.t_max, curve.t_min], dtype=torch.float64))
        .clamp(-14, 14)
        .tolist()
    )
    log_snr = torch.linspace(ends[1], ends[0], POINTS + 1, dtype=torch.float64)
    over_log_snr = _share_until(density, curve, curve.time(log_snr)).diff() / -log_snr.diff()
    middle = (log_snr[1:] + log_snr[:-1]) / 2
    return ((x[1:] + x[:-1]) / 2, over_time), (middle, over_log_snr)


def _share_until(density: Timesteps, curve: Curve, t: Tensor) -> Tensor:
    """Return the share of samples at or before each time: the largest u whose time is not later."""
    return bisect(lambda u: density.times(u, curve) <= t, torch.zeros_like(t), torch.ones_like(t))[
        0
    ]


def _along(curve: Curve) -> tuple[Tensor, Tensor]:
    """Return shares of the training time, and the times there.

    A truncated curve keeps its position on the whole curve.
    """
    whole = curve.curve if isinstance(curve, Truncated) else curve
    x = torch.linspace(0, 1, POINTS + 1, dtype=torch.float64)
    t = (
        whole.time_at_quantile(x)
        if isinstance(whole, Karras)
        else whole.t_min + (whole.t_max - whole.t_min) * x
    )
    inside = (t >= curve.t_min) & (t <= curve.t_max)
    return x[inside], t[inside]


def _styles(count: int) -> Iterable[dict[str, Any]]:
    """Yield the style of each line: all colours, then all colours again with another line style.

    Later lines are thinner, so that the lines below remain visible.
    """
    for i in range(count):
        style = STYLES[i // len(COLOURS) % len(STYLES)]
        yield {
            "color": COLOURS[i % len(COLOURS)],
            "ls": style,
            "lw": max(1.3, 2.5 - 0.25 * (i % len(COLOURS))),
        }


def _legend_below(figure: Figure, axes: Axes, count: int) -> None:
    handles, labels = axes.get_legend_handles_labels()
    columns = max(
        1, min(count, int(figure.get_size_inches()[0] * 12 / (max(map(len, labels)) + 6)))
    )
    figure.legend(
        handles,
        labels,
        loc="outside lower left",
        ncols=columns,
        fontsize=9,
        frameon=False,
        handlelength=2.4,
    )


def _require(kind: str, given: Mapping[str, object]) -> None:
    if not given:
        raise ValueError(f"name at least one {kind}")
