"""Draw the pictures of the pages: each is a function that returns a figure of matplotlib."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from alphabar.noising import TIMESTEPS, Karras, NoiseSchedule
from alphabar.noising.curves.base import Curve
from alphabar.noising.prediction import PREDICTIONS
from alphabar.sampling import Sampler, make_knots
from alphabar.training.plots.figure import new_figure
from alphabar.training.plots.tables import plot_table

from .gallery import svg
from .reference import write_text

PICTURES: dict[str, Callable[[], Any]] = {}


def picture(name: str) -> Callable[[Callable[[], Any]], Callable[[], Any]]:
    """Register a function that draws ``docs/pictures/<name>``, an SVG file."""
    if not name.endswith(".svg") or name in PICTURES:
        raise ValueError(f"a picture needs a name of its own that ends in .svg, got {name!r}")

    def register(draw: Callable[[], Any]) -> Callable[[], Any]:
        PICTURES[name] = draw
        return draw

    return register


def files() -> list[str]:
    """Return the files that ``write`` makes, below docs/."""
    return [f"pictures/{name}" for name in PICTURES]


def write(folder: Path) -> None:
    """Draw all pictures."""
    for name, draw in PICTURES.items():
        write_text(folder / name, svg(draw()))


SCHEDULE = NoiseSchedule.scaled_linear(prediction="v_prediction").zero_terminal_snr()


@picture("five-times.svg")
def five_times() -> Any:
    """Draw the five numbers of the point where SNR is 1, on three curves."""
    schedules = {
        "betas of Stable Diffusion": NoiseSchedule.scaled_linear(),
        "flow, shift 3": NoiseSchedule.flow(shift=3.0),
        "EDM": NoiseSchedule(Karras(), "sample"),
    }
    figure = new_figure(9, 3.6)
    for axes, (label, schedule) in zip(figure.subplots(1, 3), schedules.items(), strict=True):
        lines = _times_of(schedule.curve)
        for row, (name, (low, at, high)) in enumerate(lines.items()):
            place = (at - low) / (high - low)
            axes.plot([0, 1], [-row, -row], color="0.75", lw=3, solid_capstyle="round")
            axes.plot(place, -row, "o", color="C3")
            axes.text(place, 0.18 - row, f"{at:.4g}", ha="center", va="bottom", fontsize=9)
            for x, end in ((0, low), (1, high)):
                label = f"{round(end, 3):g}"
                axes.text(x, -0.14 - row, label, ha="center", va="top", fontsize=8, color="0.35")
            axes.text(-0.1, -row, name, ha="right", va="center", fontsize=9)
        axes.set(xlim=(-0.45, 1.1), ylim=(-len(lines) + 0.4, 0.8))
        axes.set_title(label, fontsize=10)
        axes.axis("off")
    return figure


def _times_of(curve: Curve) -> dict[str, tuple[float, float, float]]:
    """Return each number at the clean end, where SNR is 1, and at the noisy end."""
    points = torch.tensor([curve.t_min, float(curve.time(torch.zeros(1).double())), curve.t_max])
    t, last = points.double(), curve.num_train_timesteps - 1
    every = torch.arange(last + 1, dtype=torch.float64)
    index = np.interp(t, curve.time_at_index(every).double(), every)
    quantile = (index + 1) / (last + 1) if curve.is_discrete else _share(curve, t)
    rows = {
        "t": t,
        "timestep": curve.timestep(t),
        "index": index,
        "quantile": quantile,
        "fraction": curve.fraction(t),
    }
    return {name: (float(a), float(b), float(c)) for name, (a, b, c) in rows.items()}


def _share(curve: Curve, t: Any) -> Any:
    u = torch.linspace(0, 1, 2001, dtype=torch.float64)
    return np.interp(t, curve.time_at_quantile(u), u)


@picture("three-things.svg")
def three_things() -> Any:
    """Draw a curve, two densities and two grids over one axis of time."""
    schedule = NoiseSchedule.flow()
    figure = new_figure(7.5, 5.6)
    curve, density, grid = figure.subplots(3, 1, sharex=True, height_ratios=(1.2, 1.2, 0.8))
    t = torch.linspace(0, 1, 201, dtype=torch.float64)
    curve.plot(t, schedule.alpha(t), label="α(t), signal")
    curve.plot(t, schedule.sigma(t), label="σ(t), noise")
    curve.set_title("curve: how much noise at each time", loc="left", fontsize=10)
    u = (torch.arange(200_000, dtype=torch.float64) + 0.5) / 200_000
    for name in ("uniform", "logit_normal"):
        times = TIMESTEPS[name]().quantile(u)
        density.hist(times, bins=80, density=True, histtype="step", label=name, range=(0, 1))
    density.set_title("density: how often each time is trained", loc="left", fontsize=10)
    for row, (name, options) in enumerate({"trailing": {}, "flow": {"shift": 3.0}}.items()):
        knots = make_knots(schedule, 8, grid=name, **options)
        at = [float(knot.sigma / (knot.alpha + knot.sigma)) for knot in knots]
        grid.plot(at, [row] * len(at), "|", ms=18, mew=2)
        grid.text(1.03, row, name, va="center", fontsize=9)
    grid.set(ylim=(-0.6, 1.6), yticks=[], xlabel="time, 0 clean, 1 noise")
    grid.set_title("grid: the points that a sampler of 8 steps visits", loc="left", fontsize=10)
    for axes in (curve, density):
        axes.legend(frameon=False, fontsize=9)
    for axes in (curve, density, grid):
        axes.spines[["top", "right"]].set_visible(False)
    return figure


@picture("predictions.svg")
def predictions() -> Any:
    """Draw the two numbers of four prediction types on a variance-preserving path."""
    figure = new_figure(8.5, 3)
    angle = torch.linspace(0, 0.5 * math.pi, 101, dtype=torch.float64)
    panels = figure.subplots(1, 2, sharey=True)
    for name in ("epsilon", "sample", "v_prediction", "flow_prediction"):
        numbers = PREDICTIONS[name]().coefficients(angle.cos(), angle.sin())
        for axes, values in zip(panels, numbers, strict=True):
            values = torch.as_tensor(values, dtype=torch.float64).expand_as(angle)
            axes.plot(angle.sin() ** 2, values, label=name)
    for axes, number in zip(panels, ("c0, factor of x_0", "c1, factor of ε"), strict=True):
        axes.set_title(number, loc="left", fontsize=10)
        axes.set_xlabel("σ²")
        axes.spines[["top", "right"]].set_visible(False)
    panels[1].legend(frameon=False, fontsize=8, loc="lower left")
    return figure


@picture("table-dpmpp-2m.svg")
def table_dpmpp_2m() -> Any:
    """Draw the table of a sampler."""
    return plot_table(Sampler(SCHEDULE, "dpmpp_2m", steps=8).table)
