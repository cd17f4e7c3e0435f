"""Draw the pictures of the guides: what there is to choose from, beside each other."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch

from alphabar.noising import (
    EDM,
    BetaTimesteps,
    LogitNormalTimesteps,
    LogNormalSigmaTimesteps,
    MinSNR,
    ModeTimesteps,
    NoiseSchedule,
    Noising,
    Sigmoid,
    Uniform,
    UniformTimesteps,
)
from alphabar.training.plots.figure import COLOURS, dress, new_figure
from alphabar.training.plots.schedules import plot_schedules, plot_timesteps, plot_weights
from alphabar.training.plots.tables import plot_grids

from .pictures import picture

ROOT = Path(__file__).parents[2]


@picture("guide-schedules.svg")
def schedules() -> Any:
    """Draw the schedules that the guide compares."""
    scaled = NoiseSchedule.scaled_linear(prediction="v_prediction")
    return plot_schedules(
        {
            "scaled_linear (Stable Diffusion)": scaled,
            "the same, zero terminal SNR": scaled.zero_terminal_snr(),
            "flow": NoiseSchedule.flow(),
            "flow, shift 3": NoiseSchedule.flow(shift=3.0),
            "cosine": NoiseSchedule.cosine(),
        }
    )


@picture("guide-weightings.svg")
def weightings() -> Any:
    """Draw the weights on the network's own target."""
    return plot_weights(
        NoiseSchedule.scaled_linear(),
        {
            "uniform": Uniform(),
            "min_snr:gamma=5": MinSNR(gamma=5.0),
            "sigmoid:bias=-1": Sigmoid(bias=-1.0),
            "edm": EDM(),
        },
        ["epsilon", "v_prediction"],
    )


@picture("guide-densities.svg")
def densities() -> Any:
    """Draw the densities over the times of a flow."""
    return plot_timesteps(
        NoiseSchedule.flow(),
        {
            "uniform": UniformTimesteps(),
            "logit_normal": LogitNormalTimesteps(),
            "logit_normal:mean=1": LogitNormalTimesteps(mean=1.0),
            "mode": ModeTimesteps(),
            "beta:a=2,b=2": BetaTimesteps(),
            "lognormal_sigma": LogNormalSigmaTimesteps(),
        },
    )


@picture("guide-noise.svg")
def noise() -> Any:
    """Draw one sample of each kind of noise, with the same seed."""
    kinds = {
        "gaussian": "gaussian",
        "offset:strength=0.5": "offset:strength=0.5",
        "pyramid:discount=0.8": "pyramid:discount=0.8",
        "input_perturbation": "input_perturbation",
    }
    figure = new_figure(9, 2.6)
    flow = NoiseSchedule.flow()
    for axes, (label, kind) in zip(figure.subplots(1, len(kinds)), kinds.items(), strict=True):
        noising = Noising(flow, noise=kind, seed=1)
        noised = noising(torch.zeros(1, 1, 48, 48), step=0, timesteps=torch.ones(1))
        axes.imshow(noised.x_t[0, 0].numpy(), cmap="gray", vmin=-3, vmax=3)
        axes.set_title(label, fontsize=9)
        axes.set_axis_off()
    return figure


@picture("guide-grids.svg")
def grids() -> Any:
    """Draw the grids on a schedule with zero terminal SNR."""
    schedule = NoiseSchedule.scaled_linear(prediction="v_prediction").zero_terminal_snr()
    names = ["trailing", "leading", "karras", "exponential", "beta", "align_your_steps"]
    return plot_grids(schedule, names, steps=10)


@picture("guide-samplers.svg")
def samplers() -> Any:
    """Draw the errors of benchmarks/accuracy.md."""
    text = (ROOT / "benchmarks/accuracy.md").read_text(encoding="utf-8")
    found = [[cell.strip() for cell in row.strip("|").split("|")] for row in text.splitlines()]
    rows = [row for row in found if len(row) == 8 and re.fullmatch(r"\d+", row[0])]
    calls = [int(row[0]) for row in rows]
    figure = new_figure(8, 4)
    axes = figure.subplots()
    for name, column, colour in (("alphabar", 1, COLOURS[0]), ("diffusers", 4, COLOURS[1])):
        axes.loglog(calls, [float(row[column + 1]) for row in rows], "o-", color=colour, label=name)
    axes.set_xticks(calls, [str(number) for number in calls])
    axes.minorticks_off()
    dress(axes, "the best sampler for each number of calls", "network calls", "relative error")
    axes.legend(frameon=False, fontsize=9)
    return figure


@picture("guide-times.svg")
def times() -> Any:
    """Draw the times of eight frames in training, a row for each sample."""
    kinds = ["shared", "independent", "staircase", "independent:context=2"]
    figure = new_figure(9, 3)
    flow = NoiseSchedule.flow()
    for axes, kind in zip(figure.subplots(1, len(kinds)), kinds, strict=True):
        noised = Noising(flow, timesteps=kind, seed=1)(torch.zeros(12, 3, 8, 2, 2), step=0)
        axes.imshow(noised.timesteps.numpy(), cmap="viridis", aspect="auto")
        axes.set_title(kind, fontsize=9)
        axes.set_xlabel("frame")
        axes.set_yticks([])
    return figure
