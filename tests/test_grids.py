"""Grids: their shape on every schedule, the timesteps and sigmas that diffusers lays, and what is refused."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from diffusers.schedulers.scheduling_ddim import DDIMScheduler
from diffusers.schedulers.scheduling_dpmsolver_multistep import DPMSolverMultistepScheduler
from diffusers.schedulers.scheduling_euler_discrete import EulerDiscreteScheduler

from alphabar.noising import NoiseSchedule
from alphabar.sampling import CLEAN, GRIDS, Knot, Sampler, knots_at, make_knots
from alphabar.sampling.grids import SIGMA_CAP
from oracles import SCHEDULES

SD: dict[str, Any] = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
SCALED = SCHEDULES["scaled_linear"]


def times(schedule: NoiseSchedule, steps: int, grid: str, **options: Any) -> list[float]:
    return [knot.timestep for knot in make_knots(schedule, steps, grid, **options)[:-1]]


# shape


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("steps", [1, 2, 7, 20, 50])
def test_shape(grid: str, name: str, steps: int) -> None:
    schedule = SCHEDULES[name]
    knots = make_knots(schedule, steps, grid)
    assert len(knots) == steps + 1
    assert knots[-1] == CLEAN == Knot(-1.0, 1.0, 0.0)
    noise = [knot.sigma_ve for knot in knots]
    assert all(later < earlier for earlier, later in pairwise(noise))
    assert all(0 <= knot.alpha < 1 and 0 < knot.sigma <= 1 for knot in knots[:-1])
    for knot in knots[:-1]:  # every knot lies on the schedule, at the time that the network is given
        t = torch.tensor(knot.timestep, dtype=torch.float64)
        if not schedule.curve.is_discrete:
            assert knot.timestep == pytest.approx(1000 * knot.sigma, abs=1e-9)
            continue
        assert knot.alpha == pytest.approx(schedule.alpha(t).item(), rel=1e-12, abs=0)
        assert knot.sigma == pytest.approx(schedule.sigma(t).item(), rel=1e-12, abs=0)


@pytest.mark.parametrize("grid", [grid for grid in GRIDS if grid != "leading"])
@pytest.mark.parametrize("name", SCHEDULES)
def test_sampling_starts_at_the_most_noise(grid: str, name: str) -> None:
    schedule = SCHEDULES[name]
    first = make_knots(schedule, 5, grid)[0]
    assert first == knots_at(schedule, [schedule.curve.t_max])[0]
    assert (first.alpha == 0.0) == schedule.has_zero_terminal_snr


@pytest.mark.parametrize("grid", GRIDS)
def test_all_timesteps_can_be_visited(grid: str) -> None:
    if grid == "karras":
        assert len(make_knots(SCALED, 1000, grid)) == 1001
    else:
        assert times(SCALED, 1000, grid) == pytest.approx(list(range(999, -1, -1)), abs=1e-9)


def test_linear_quarters() -> None:
    assert times(SCALED, 5, "linspace") == [999.0, 749.25, 499.5, 249.75, 0.0]
    assert times(SCALED, 5, "linspace", rounded=True) == [999.0, 749.0, 500.0, 250.0, 0.0]
    assert times(SCALED, 3, "linspace", drop_last=True) == [999.0, 666.0, 333.0]
    assert times(SCALED, 4, "leading") == [750.0, 500.0, 250.0, 0.0]
    assert times(SCALED, 3, "leading", drop_last=True, steps_offset=1) == [751.0, 501.0, 251.0]
    assert times(SCALED, 3, "trailing") == [999.0, 666.0, 332.0]
    assert times(SCHEDULES["flow"].from_config(NoiseSchedule.flow().to_config()), 4, "trailing") == [
        1000.0,
        750.0,
        500.0,
        250.0,
    ]


TUTORIAL_TIMES = [999.0000, 927.6429, 856.2857, 784.9286, 713.5714, 642.2143, 570.8571, 499.5000, 428.1429, 356.7857, 285.4286,
                  214.0714, 142.7143, 71.3571, 0.0000]  # fmt: skip
TUTORIAL_SIGMAS = [14.6146, 9.6826, 6.6780, 4.7746, 3.5221, 2.6666, 2.0606, 1.6156, 1.2768, 1.0097, 0.7913, 0.6056, 0.4397, 0.2780,
                   0.0292, 0.0000]  # fmt: skip
"""What the Stable Diffusion tutorial prints for LMS with 15 steps."""


def test_the_tutorial_s_numbers() -> None:
    sampler = Sampler(SCALED, "euler", 15, "linspace")
    assert sampler.timesteps == pytest.approx(TUTORIAL_TIMES, abs=5.1e-5)
    assert sampler.sigmas == pytest.approx(
        TUTORIAL_SIGMAS, abs=5.1e-5, rel=1e-5
    )  # theirs are linear in σ between timesteps
    assert Sampler(SCHEDULES["ztsnr"], "euler", 4).sigmas[0] == float("inf")


# karras


def test_karras_formula() -> None:
    low, high = 0.1, 10.0
    sigmas = Sampler(SCALED, "euler", 8, "karras", rho=5.0, sigma_min=low, sigma_max=high).sigmas
    expected = [(high**0.2 + i / 7 * (low**0.2 - high**0.2)) ** 5 for i in range(8)]
    assert sigmas == pytest.approx([*expected, 0.0], rel=1e-9)


def test_karras_spans_the_schedule() -> None:
    ends = SCALED.sigma_ve(torch.tensor([0.0, 999.0], dtype=torch.float64)).tolist()
    sigmas = Sampler(SCALED, "euler", 10, "karras").sigmas
    assert sigmas[-2] == pytest.approx(ends[0], rel=1e-12)
    assert sigmas[0] == pytest.approx(ends[1], rel=1e-12)


def test_karras_on_zero_terminal_snr_starts_at_the_terminal_step_and_goes_on_below_the_cap() -> None:
    knots = make_knots(SCHEDULES["ztsnr"], 10, "karras")
    low = knots[-2].sigma_ve
    assert (knots[0].timestep, knots[0].alpha, knots[0].sigma) == (999.0, 0.0, 1.0)
    assert SIGMA_CAP == 4096.0
    ramp = [(SIGMA_CAP ** (1 / 7) + i / 9 * (low ** (1 / 7) - SIGMA_CAP ** (1 / 7))) ** 7 for i in range(10)]
    assert [knot.sigma_ve for knot in knots[1:-1]] == pytest.approx(ramp[1:], rel=1e-9)


def test_karras_on_a_flow_spaces_sigma_itself() -> None:
    knots = make_knots(NoiseSchedule.flow(), 6, "karras")
    ramp = [(1 + i / 5 * (0.001 ** (1 / 7) - 1)) ** 7 for i in range(6)]
    assert [knot.sigma for knot in knots[:-1]] == pytest.approx(ramp, rel=1e-9)


# the timesteps of diffusers

COUNTS = [*range(2, 201), 250, 333, 500, 777, 999, 1000]
"""One step is left out: there numpy's linspace(0, 999, 1) starts sampling at the clean end; ours starts at 999."""


def arange_overshoots() -> list[int]:
    """The step counts for which numpy.arange(T, 0, -T / N) has N + 1 entries: 'trailing' in diffusers then ends in -1."""
    return [n for n in range(1, 1001) if len(np.arange(1000, 0, -1000 / n)) == n + 1]


@pytest.mark.parametrize("offset", [0, 1])
def test_ddim_leading(offset: int) -> None:
    peer = DDIMScheduler(timestep_spacing="leading", steps_offset=offset)
    for steps in [1, *COUNTS]:
        if steps == 1000 and offset:
            continue  # theirs then starts at 1000, past the end
        peer.set_timesteps(steps)
        assert times(SCALED, steps, "leading", steps_offset=offset) == peer.timesteps.tolist()


def test_ddim_linspace() -> None:
    peer = DDIMScheduler(timestep_spacing="linspace")
    for steps in COUNTS:
        peer.set_timesteps(steps)
        assert times(SCALED, steps, "linspace", rounded=True) == peer.timesteps.tolist()


def test_ddim_trailing() -> None:
    peer = DDIMScheduler(timestep_spacing="trailing")
    for steps in sorted({1, *COUNTS} - set(arange_overshoots())):
        peer.set_timesteps(steps)
        assert times(SCALED, steps, "trailing") == peer.timesteps.tolist()


def test_trailing_where_numpy_arange_has_one_too_many() -> None:
    counts = arange_overshoots()
    assert len(counts) == 62
    assert counts[:5] == [61, 103, 121, 122, 201]
    for steps in counts:
        ours = times(SCALED, steps, "trailing")
        theirs = (np.arange(1000, 0, -1000 / steps).round() - 1).tolist()
        assert len(ours) == steps
        assert theirs[-1] == -1
        assert ours == theirs[:-1]


@pytest.mark.parametrize("spacing", ["linspace", "leading", "trailing"])
def test_euler(spacing: str) -> None:
    peer = EulerDiscreteScheduler(timestep_spacing=spacing, **SD)
    for steps in (2, 10, 13, 20, 25, 50):
        peer.set_timesteps(steps)
        assert times(SCALED, steps, spacing) == pytest.approx(peer.timesteps.tolist(), abs=1e-4)  # theirs are float32


@pytest.mark.parametrize("spacing", ["linspace", "leading", "trailing"])
def test_dpm_solver_multistep(spacing: str) -> None:
    options = {"linspace": {"rounded": True, "drop_last": True}, "leading": {"drop_last": True}, "trailing": {}}[
        spacing
    ]
    peer = DPMSolverMultistepScheduler(timestep_spacing=spacing, **SD)
    for steps in (1, 2, 10, 13, 20, 25, 50, 100):
        peer.set_timesteps(steps)
        assert times(SCALED, steps, spacing, **options) == peer.timesteps.tolist()
        sigmas = [knot.sigma_ve for knot in make_knots(SCALED, steps, spacing, **options)]
        assert sigmas == pytest.approx(peer.sigmas.tolist(), rel=4e-5)


@pytest.mark.parametrize("steps", [2, 10, 20, 25, 50])
def test_dpm_solver_multistep_karras(steps: int) -> None:
    peer = DPMSolverMultistepScheduler(use_karras_sigmas=True, **SD)
    peer.set_timesteps(steps)
    knots = make_knots(SCALED, steps, "karras")
    # their float32 table has σ / α of the first timestep wrong by 3e-5
    assert [knot.sigma_ve for knot in knots] == pytest.approx(peer.sigmas.tolist(), rel=4e-5)
    peer.alphas_cumprod = SCALED.alphas_cumprod
    peer.set_timesteps(steps)
    assert [knot.sigma_ve for knot in knots] == pytest.approx(peer.sigmas.tolist(), rel=1e-7)
    # the time of a sigma is found in the same way, log-linearly; they round it afterwards
    assert [round(knot.timestep) for knot in knots[:-1]] == peer.timesteps.tolist()


@pytest.mark.parametrize("spacing", ["linspace", "leading", "trailing"])
def test_euler_karras_takes_its_range_from_the_subsampled_grid(spacing: str) -> None:
    peer = EulerDiscreteScheduler(use_karras_sigmas=True, timestep_spacing=spacing, **SD)
    peer.alphas_cumprod = SCALED.alphas_cumprod
    peer.set_timesteps(10)
    high, low = peer.sigmas[0].item(), peer.sigmas[-2].item()
    knots = make_knots(SCALED, 10, "karras", sigma_min=low, sigma_max=high)
    assert [knot.sigma_ve for knot in knots] == pytest.approx(peer.sigmas.tolist(), rel=1e-6)
    assert [knot.timestep for knot in knots[:-1]] == pytest.approx(peer.timesteps.tolist(), abs=1e-3)


# bad input

BAD_STEPS = {
    True: r"^steps must be an integer, got True$",
    0: r"^steps must be between 1 and the 1000 training timesteps, got 0$",
    -1: r"^steps must be between 1 and the 1000 training timesteps, got -1$",
    1001: r"^steps must be between 1 and the 1000 training timesteps, got 1001$",
    2.5: r"^steps must be an integer, got 2\.5$",
    "20": r"^steps must be an integer, got '20'$",
    None: r"^steps must be an integer, got None$",
}


@pytest.mark.parametrize(("steps", "message"), list(BAD_STEPS.items()))
def test_bad_steps(steps: Any, message: str) -> None:
    for make in (lambda: make_knots(SCALED, steps, "trailing"), lambda: Sampler(SCALED, "euler", steps)):
        with pytest.raises(ValueError, match=message):
            make()


BAD_OPTIONS: list[tuple[str, int, dict[str, Any], str]] = [
    ("karas", 5, {}, r"^unknown grid 'karas'; did you mean 'karras'\?$"),
    ("xyz", 5, {}, "^unknown grid 'xyz'; known: " + ", ".join(sorted(GRIDS)) + "$"),
    ("karras", 5, {"roh": 5.0}, r"^unknown option of grid 'karras' 'roh'; did you mean 'rho'\?$"),
    ("trailing", 5, {"rho": 5.0}, "^unknown option of grid 'trailing' 'rho'; known: none$"),
    ("karras", 5, {"sigma_min": 20.0}, r"^need 0 < sigma_min < sigma_max, got 20 and 14\.6146$"),
    ("karras", 5, {"sigma_min": 0.0}, "^need 0 < sigma_min < sigma_max, got 0 and"),
    ("karras", 5, {"sigma_max": float("nan")}, "^need 0 < sigma_min < sigma_max, got .* and nan$"),
    ("karras", 5, {"rho": 0.0}, r"^rho must be positive, got 0\.0; Karras et al\. use 7$"),
    ("karras", 5, {"rho": float("nan")}, "^rho must be positive, got nan"),
    (
        "leading",
        1,
        {"steps_offset": 1000},
        "^steps_offset 1000 puts the first of 1 steps past the last timestep; lower it, or use 'trailing'$",
    ),
    ("leading", 1000, {"steps_offset": 1}, "^steps_offset 1 puts the first of 1000 steps past"),
    ("leading", 4, {"steps_offset": -1}, r"^time -1\.0 is outside 0\.0 \.\.\. 999\.0 of this discrete schedule$"),
    (
        "leading",
        1000,
        {"drop_last": True},
        "^noise must fall at every step, but .* in step 1 of 1000; use fewer steps or another grid$",
    ),
    ("linspace", 1000, {"drop_last": True, "rounded": True}, "^noise must fall at every step"),
]


@pytest.mark.parametrize("number", range(len(BAD_OPTIONS)))
def test_bad_options(number: int) -> None:
    grid, steps, options, message = BAD_OPTIONS[number]
    with pytest.raises(ValueError, match=message):
        make_knots(SCALED, steps, grid, **options)


def test_a_function_is_a_grid_and_is_checked_too() -> None:
    def two(schedule: NoiseSchedule, steps: int, *, first: float = 800.0) -> tuple[Knot, ...]:
        return (*knots_at(schedule, [first, 100.0]), CLEAN)

    assert [knot.timestep for knot in make_knots(SCALED, 2, two, first=900.0)] == [900.0, 100.0, -1.0]
    with pytest.raises(ValueError, match=r"^a grid of 3 steps must have 4 knots, got 3$"):
        make_knots(SCALED, 3, two)
    with pytest.raises(ValueError, match=r"^noise must fall at every step, but σ/α goes from .* in step 1 of 2"):
        make_knots(SCALED, 2, two, first=100.0)
    with pytest.raises(ValueError, match=r"did you mean 'first'\?$"):
        make_knots(SCALED, 2, two, frist=100.0)
