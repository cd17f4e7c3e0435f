"""The advised density on synthetic losses whose answer is known."""

from __future__ import annotations

import argparse
import logging
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from alphabar.callbacks import LossBySNR
from alphabar.noising import (
    IndependentTimesteps,
    LogitNormalTimesteps,
    LogNormalSigmaTimesteps,
    NoiseSchedule,
    UniformTimesteps,
)
from alphabar.noising.timesteps import Timesteps
from alphabar.training import add_noising_arguments, noising_from_arguments
from alphabar.training.density_advice import Advice, Window, advise_density, merged, plot_advice
from alphabar.training.snr_buckets import Buckets
from callbacks_toy import train

FLOW = NoiseSchedule.flow()
BUCKETS = Buckets.of(FLOW, 30)
EDGES = np.array(BUCKETS.edges)
MIDDLE = (EDGES[:-1] + EDGES[1:]) / 2


def normal(mean: float, std: float) -> np.ndarray:
    density = np.exp(-(((MIDDLE - mean) / std) ** 2) / 2)
    return density / density.sum()


def windows_of(
    drawn: np.ndarray, gain: np.ndarray, noise: float = 0.0, number: int = 40, samples: int = 10_000
) -> list[tuple[list[float], list[float]]]:
    """A training whose loss is 1 + gain / (samples of the bucket), with relative noise."""
    rng = np.random.default_rng(0)
    seen, windows = np.zeros(len(drawn)), []
    for _ in range(number):
        counts = drawn * samples
        seen += counts
        with np.errstate(divide="ignore", invalid="ignore"):
            loss = 1 + np.where(gain > 0, gain / (seen - counts / 2), 0.0)
        loss = loss * (1 + noise * rng.standard_normal(len(loss)))
        windows.append(([0.0, *counts, 0.0], [0.0, *(loss * counts), 0.0]))
    return windows


@pytest.mark.parametrize(("mean", "std"), [(0.0, 3.0), (-3.0, 2.0)])
def test_samples_go_where_the_gain_is(mean: float, std: float) -> None:
    """The best shares are sqrt(gain): a normal gain has √2 of its spread."""
    flat = np.full(30, 1 / 30)
    advice = advise_density(
        BUCKETS, windows_of(flat, 200 * normal(mean, std)), FLOW, UniformTimesteps()
    )
    assert advice.mean == pytest.approx(-mean / 2, abs=0.05)
    assert advice.std == pytest.approx(math.sqrt(2) * std / 2, rel=0.05)


def test_the_best_density_is_kept() -> None:
    """Drawn as sqrt(gain), the advice is what was drawn; other densities come closer to it."""
    best = normal(1.0, 3.0)
    for drawn in (best, normal(-2.0, 3.0), normal(1.0, 5.0)):
        windows = windows_of(drawn, 2000 * best**2)
        advice = advise_density(BUCKETS, windows, FLOW, UniformTimesteps())
        assert advice.mean == pytest.approx(-0.5, abs=0.06)
        assert advice.std == pytest.approx(1.5, rel=0.06)


def test_noise_and_too_little_of_it_give_no_advice() -> None:
    flat = np.full(30, 1 / 30)
    still = advise_density(BUCKETS, windows_of(flat, 0 * flat, 0.05), FLOW, UniformTimesteps())
    few = advise_density(BUCKETS, windows_of(flat, flat, number=5), FLOW, UniformTimesteps())
    thin = advise_density(BUCKETS, windows_of(flat, flat, samples=60), FLOW, UniformTimesteps())
    for advice, words in ((still, "measurably in"), (few, "5 reports"), (thin, "measurably in 0")):
        assert advice.flags is None and words in advice.text
        assert advice.text.startswith("no advice on the density of timesteps: ")


def test_noise_moves_the_advice_little() -> None:
    flat = np.full(30, 1 / 30)
    windows = windows_of(flat, 8000 * normal(-2.0, 3.0), noise=0.01)
    advice = advise_density(BUCKETS, windows, FLOW, UniformTimesteps())
    assert advice.mean == pytest.approx(1.0, abs=0.4)
    assert 1.2 < advice.std < 2.7
    assert plot_advice(BUCKETS, advice).startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("schedule", "flags", "current", "expected"),
    [
        (FLOW, "--flow_shift 1", UniformTimesteps(), LogitNormalTimesteps()),
        (
            NoiseSchedule.flow(3.0),
            "--flow_shift 3",
            UniformTimesteps(stratified=True, across=8),
            LogitNormalTimesteps(stratified=True, across=8),
        ),
        (
            NoiseSchedule.scaled_linear(),
            "",
            UniformTimesteps(stratified=True),
            LogNormalSigmaTimesteps(stratified=True),
        ),
    ],
)
def test_the_flags_give_the_density(
    schedule: NoiseSchedule, flags: str, current: Timesteps, expected: Timesteps
) -> None:
    """The flags are read back, and the log SNR of the density is the advised one."""
    buckets = Buckets.of(schedule, 30)
    edges = np.array(buckets.edges)
    gain = np.exp(-((((edges[:-1] + edges[1:]) / 2 - 1) / 1.5) ** 2) / 2)
    windows = windows_of(np.full(30, 1 / 30), 200 * gain)
    advice = advise_density(buckets, windows, schedule, current)
    assert advice.flags is not None and advice.flags in advice.text
    parser = argparse.ArgumentParser()
    add_noising_arguments(parser)
    density = noising_from_arguments(parser.parse_args(f"{flags} {advice.flags}".split())).timesteps
    assert type(density) is type(expected)
    assert (density.stratified, density.across) == (expected.stratified, expected.across)
    u = np.linspace(0.2, 0.8, 13)
    t = density.times(torch.from_numpy(u), schedule.curve)
    z = -schedule.curve.log_snr(t.double()).numpy() / 2
    exact = advice.mean + advice.std * torch.special.ndtri(torch.from_numpy(u)).numpy()
    assert np.abs(z - exact).max() < 0.02


def test_the_advice_for_k_times_is_of_the_density_inside() -> None:
    windows = windows_of(np.full(30, 1 / 30), 200 * normal(0.0, 3.0))
    alone, inside = (
        advise_density(BUCKETS, windows, FLOW, density)
        for density in (UniformTimesteps(), IndependentTimesteps(context=1))
    )
    assert alone.flags == inside.flags and "density=" not in alone.text
    assert f"as density= of the independent timesteps: {inside.flags}" in inside.text


def test_windows_are_merged_in_order() -> None:
    windows = [([float(k)], [2.0 * k]) for k in range(65)]
    found = merged(windows)
    assert len(found) == 33 and found[0] == ([1.0], [2.0]) and found[-1] == ([64.0], [128.0])
    assert sum(counts[0] for counts, _ in found) == sum(range(65))


@pytest.mark.filterwarnings("ignore::Warning:lightning", "ignore::UserWarning:alphabar")
def test_the_callback_advises_at_the_end(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    logging.getLogger("lightning.pytorch").propagate = True
    with caplog.at_level(logging.INFO):
        train(tmp_path / "short", LossBySNR(4))
    assert "LossBySNR: no advice on the density of timesteps: 3 reports" in caplog.text
    seen = []

    def advised(buckets: Buckets, windows: list[Window], *rest: Any) -> Advice:
        """On losses that fall, in place of those of 12 steps."""
        seen.append(list(windows))
        flat = np.full(30, 1 / 30)
        return advise_density(buckets, windows_of(flat, 200 * normal(0, 3.0)), *rest)

    monkeypatch.setattr("alphabar.callbacks.loss_by_snr.advise_density", advised)
    callback, again = LossBySNR(1, buckets=30), LossBySNR(1, buckets=30)
    with caplog.at_level(logging.INFO):
        train(tmp_path / "long", callback)
    again.load_state_dict(callback.state_dict())
    assert again._windows == callback._windows == seen[0] and len(seen[0]) == 12
    assert sum(sum(counts) for counts, _ in seen[0]) == sum(callback._drawn) == 48
    assert list(tmp_path.rglob("advice.png"))
    assert "--timestep_density lognormal_sigma --p_mean" in caplog.text
