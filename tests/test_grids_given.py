"""Timesteps and sigmas given in place of a grid, and grids that run upwards."""

from __future__ import annotations

import math
import pickle
from typing import Any

import diffusers
import numpy as np
import pytest
import torch

from alphabar.sampling import CLEAN, GRIDS, Sampler, make_knots
from laying import (
    FLOW,
    FLOW_3,
    SCALED,
    SCHEDULES,
    SD,
    ZTSNR,
    check,
    flow_sigmas,
    low_and_high,
    peer,
    ratios,
)

pytestmark = pytest.mark.filterwarnings("ignore:__array_wrap__")  # of diffusers, with NumPy 2

# given points


@pytest.mark.parametrize("name", SCHEDULES)
def test_given_timesteps_are_the_timesteps(name: str) -> None:
    schedule = SCHEDULES[name]
    for grid in sorted({*GRIDS} - {"dpm_fast"}):
        sampler = Sampler(schedule, "euler", 7, grid)
        again = Sampler(schedule, "euler", timesteps=sampler.timesteps)
        assert (again.steps, again.timesteps) == (7, sampler.timesteps)
        for ours, theirs in zip(again.knots, sampler.knots, strict=True):
            assert (ours.alpha, ours.sigma) == pytest.approx(
                (theirs.alpha, theirs.sigma), rel=1e-7, abs=1e-9
            )


@pytest.mark.parametrize("name", SCHEDULES)
def test_the_sigmas_of_a_sampler_can_be_given_again(name: str) -> None:
    schedule = SCHEDULES[name]
    sampler = Sampler(schedule, "euler", 7, "trailing")
    again = Sampler(schedule, "euler", sigmas=sampler.sigmas)
    for ours, theirs in zip(again.knots, sampler.knots, strict=True):
        assert (ours.alpha, ours.sigma) == pytest.approx(
            (theirs.alpha, theirs.sigma), rel=1e-9, abs=1e-12
        )


def test_given_sigmas_are_the_sigmas() -> None:
    sampler = Sampler(SCALED, "dpmpp_2m", 7, "karras")
    for sigmas in (
        sampler.sigmas,
        sampler.sigmas[:-1],
        np.array(sampler.sigmas),
        torch.tensor(sampler.sigmas, dtype=torch.float64),
    ):
        again = Sampler(SCALED, "dpmpp_2m", sigmas=sigmas)
        assert again.steps == 7
        assert again.sigmas == pytest.approx(sampler.sigmas, rel=1e-12)
        assert again.timesteps == pytest.approx(sampler.timesteps, abs=1e-9)
    assert Sampler(ZTSNR, "euler", sigmas=[math.inf, 5.0, 1.0]).timesteps[0] == 999.0
    assert flow_sigmas(make_knots(FLOW_3, sigmas=[1.0, 0.8, 0.3])) == pytest.approx(
        [1.0, 0.8, 0.3, 0.0], rel=1e-12
    )
    ended = make_knots(SCALED, sigmas=[10.0, 1.0], final="sigma_min")
    assert ratios(ended) == pytest.approx([10.0, 1.0, low_and_high()[0]], rel=1e-12)


def test_given_points_agree_with_diffusers() -> None:
    theirs = diffusers.EulerDiscreteScheduler(**SD)
    theirs.alphas_cumprod = SCALED.alphas_cumprod
    theirs.set_timesteps(timesteps=[999, 850, 736, 24])
    check(theirs, make_knots(SCALED, timesteps=[999, 850, 736, 24]))
    theirs.set_timesteps(sigmas=[14.6, 5.0, 0.5, 0.0])
    check(theirs, make_knots(SCALED, sigmas=[14.6, 5.0, 0.5, 0.0]))
    flow = diffusers.FlowMatchEulerDiscreteScheduler()
    flow.set_timesteps(sigmas=[1.0, 0.7, 0.1])
    assert flow_sigmas(make_knots(FLOW, sigmas=[1.0, 0.7, 0.1])) == pytest.approx(
        np.asarray(flow.sigmas), rel=1e-6
    )


def test_a_sampler_of_given_points_is_a_value() -> None:
    a, b = (
        Sampler(SCALED, "euler", timesteps=[900, 500]),
        Sampler(SCALED, "euler", timesteps=torch.tensor([900.0, 500.0])),
    )
    assert a == b
    assert hash(a) == hash(b)
    assert pickle.loads(pickle.dumps(a)) == a
    assert (a.grid, a.steps) == ("timesteps", 2)


GIVEN: list[tuple[dict[str, Any], str]] = [
    ({"timesteps": [1, 2]}, r"^timesteps must fall at every step, but timesteps\[1\] = 2 comes after timesteps\[0\] = 1$"),
    ({"timesteps": [900, 400, 400]}, r"timesteps\[2\] = 400 comes after timesteps\[1\] = 400$"),
    ({"sigmas": [3, 1, 2]}, r"^sigmas must fall at every step, but sigmas\[2\] = 2 comes after sigmas\[1\] = 1$"),
    ({"timesteps": [1000, 5]}, r"^timesteps\[0\] = 1000 is outside 0 \.\.\. 999 of this discrete schedule$"),
    ({"timesteps": [5, -1]}, r"^timesteps\[1\] = -1 is outside 0 \.\.\. 999 of this discrete schedule$"),
    ({"timesteps": []}, "^timesteps must hold at least one timestep$"),
    ({"sigmas": [0.0]}, "^sigmas must hold at least one noise level above 0$"),
    ({"sigmas": [3, -1]}, r"^sigmas must be numbers of at least 0, got sigmas\[1\] = -1$"),
    ({"sigmas": [float("nan")]}, r"^sigmas must be numbers of at least 0, got sigmas\[0\] = nan$"),
    ({"sigmas": [100, 1]}, r"^noise level 100 is outside 0\.0291672 \.\.\. 14\.6146, which this schedule was trained on; lay the"),
    ({"sigmas": [1, 0.02]}, r"^noise level 0\.02 is outside"),
    ({"sigmas": "abc"}, "^sigmas must be a sequence of numbers, got 'abc'$"),
    ({"sigmas": 5}, "^sigmas must be a sequence of numbers, got 5$"),
    ({"timesteps": ["a", "b"]}, r"^timesteps must be a sequence of numbers, got \['a', 'b'\]$"),
    ({"timesteps": [[1, 2]]}, r"^timesteps must be a sequence of numbers, got \[\[1, 2\]\]$"),
    ({"sigmas": [3, 1], "timesteps": [5]}, "^timesteps stand in place of a grid; leave out sigmas$"),
    ({"sigmas": [3, 1], "grid": "karras"}, "^sigmas stand in place of a grid; leave out grid "
                                           "'karras'$"),
    ({"sigmas": [3, 1], "steps": 20}, "^2 sigmas make 2 steps, got steps=20; leave steps out$"),
    ({"sigmas": [3, 1, 0], "steps": 3}, "^3 sigmas make 2 steps, got steps=3; leave steps out$"),
    ({"sigmas": [3, 1], "rho": 7.0}, "unknown option .* 'rho'"),
]  # fmt: skip


@pytest.mark.parametrize("number", range(len(GIVEN)))
def test_bad_points(number: int) -> None:
    options, message = GIVEN[number]
    for make in (
        lambda: make_knots(SCALED, **options),
        lambda: Sampler(SCALED, "euler", **options),
    ):
        with pytest.raises(ValueError, match=message):
            make()


# upwards


@pytest.mark.parametrize("grid", GRIDS)
def test_ascending_is_the_grid_from_its_end(grid: str) -> None:
    for final in ("zero", "sigma_min"):
        down = make_knots(SCALED, 8, grid, final=final)
        assert make_knots(SCALED, 8, grid, ascending=True, final=final) == down[::-1]


@pytest.mark.parametrize("spacing", ["leading", "trailing"])
def test_ddim_inverse_lays_its_grid_upwards(spacing: str) -> None:
    for steps in (5, 20, 50):
        scheduler = diffusers.DDIMInverseScheduler(timestep_spacing=spacing)
        scheduler.set_timesteps(steps)
        knots = Sampler(SCALED, "ddim_inverse", steps, spacing).knots
        assert knots[0] == CLEAN
        assert [k.timestep for k in knots[1:]] == scheduler.timesteps.tolist()


def test_dpm_solver_inverse_goes_from_the_least_noise_to_the_most() -> None:
    scheduler = peer("DPMSolverMultistepInverseScheduler", 10, timestep_spacing="linspace")
    knots = make_knots(SCALED, 10, "linspace", rounded=True, final="sigma_min", ascending=True)
    check(scheduler, knots)


def test_given_points_upwards() -> None:
    assert [k.timestep for k in Sampler(SCALED, "ddim_inverse", timesteps=[0, 250, 500]).knots] == [
        -1,
        0,
        250,
        500,
    ]
    assert ratios(Sampler(SCALED, "ddim_inverse", sigmas=[0, 1, 10]).knots) == pytest.approx(
        [0, 1, 10], rel=1e-12
    )
    with pytest.raises(
        ValueError,
        match=r"^timesteps must rise at every step, but timesteps\[1\] = 5 comes after timesteps\[0\] = 9$",
    ):
        Sampler(SCALED, "ddim_inverse", timesteps=[9, 5])
