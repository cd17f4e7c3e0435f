"""Grids: the numbers of the tutorial, their shape on every schedule, closed forms, how they end,
and what is refused.
"""

from __future__ import annotations

import math
import pickle
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from scipy import stats

from all_pairs import all_pairs
from alphabar.noising import NoiseSchedule
from alphabar.noising.timesteps.densities import beta_quantile
from alphabar.sampling import CLEAN, GRIDS, METHODS, Knot, Method, Sampler, knots_at, make_knots
from alphabar.sampling.grids import TERMINAL_SIGMA, grid_options, number_of_knots
from alphabar.sampling.grids.base import final_knot, lowest_time
from laying import (
    FLOW,
    FLOW_3,
    SCALED,
    SCHEDULES,
    SD,
    ZTSNR,
    Array,
    flow_sigmas,
    karras,
    low_and_high,
    ramp,
    ratios,
    times,
)

STARTS_LOWER = {"leading", "ddim_uniform", "align_your_steps"}


def number_of_calls(grid: str, steps: int) -> int:
    return number_of_knots(grid, steps) - 1


# the tutorial of the seeds

TUTORIAL_TIMESTEPS = [
    "999.0000", "927.6429", "856.2857", "784.9286", "713.5714", "642.2143", "570.8571", "499.5000", "428.1429", "356.7857",
    "285.4286", "214.0714", "142.7143", "71.3571", "0.0000",
]  # fmt: skip
TUTORIAL_SIGMAS = [
    "14.6146", "9.6826", "6.6780", "4.7746", "3.5221", "2.6666", "2.0606", "1.6156", "1.2768", "1.0097", "0.7913", "0.6056",
    "0.4397", "0.2780", "0.0292", "0.0000",
]  # fmt: skip


def printed(values: Sequence[float]) -> list[str]:
    return [f"{value:.4f}" for value in values]


def test_the_numbers_of_the_tutorial() -> None:
    sampler = Sampler(SCALED, "LMS", steps=15, grid="linspace", interpolation="sigma")
    assert printed(sampler.timesteps) == TUTORIAL_TIMESTEPS
    # exactly, the second is 9.6825498 and the twelfth 0.6055498: two of the sixteen round down
    # where the float32 tables of the tutorial round up, and are 5.02e-5 from what it prints
    assert sampler.sigmas == pytest.approx([float(s) for s in TUTORIAL_SIGMAS], abs=6e-5)
    assert [i for i, s in enumerate(printed(sampler.sigmas)) if s != TUTORIAL_SIGMAS[i]] == [1, 11]
    # log SNR between the timesteps, which is our own, moves σ by 1e-5 of itself at most
    ours = Sampler(SCALED, "LMS", steps=15, grid="linspace")
    assert printed(ours.timesteps) == TUTORIAL_TIMESTEPS
    assert ours.sigmas == pytest.approx([float(s) for s in TUTORIAL_SIGMAS], abs=1e-4)


def test_the_tutorials_digits_come_out_of_its_float32_table() -> None:
    alphas_cumprod = diffusers.LMSDiscreteScheduler(**SD).alphas_cumprod.double()
    before = torch.cat([torch.ones(1, dtype=torch.float64), alphas_cumprod[:-1]])
    theirs = NoiseSchedule.from_betas(1 - alphas_cumprod / before)
    assert (
        printed(Sampler(theirs, "LMS", 15, "linspace", interpolation="sigma").sigmas)
        == TUTORIAL_SIGMAS
    )


# shape


@pytest.mark.parametrize(
    ("grid", "name", "final"),
    all_pairs(list(GRIDS), list(SCHEDULES), ["zero", "sigma_min"]),
    ids=str,
)
def test_shape(grid: str, name: str, final: str) -> None:
    schedule = SCHEDULES[name]
    curve = schedule.curve
    for steps in (1, 2, 7, 20, 50):
        knots = make_knots(schedule, steps, grid, final=final)
        assert len(knots) == number_of_knots(grid, steps, schedule, final=final)
        assert grid == "dpm_fast" or len(knots) == steps + 1
        assert knots[-1] == (
            CLEAN if final == "zero" else knots_at(schedule, [lowest_time(curve)])[0]
        )
        assert all(n.sigma_ve < s.sigma_ve for s, n in pairwise(knots))
        # every knot is on the schedule, at the time that the network is given
        first, called = knots[0], [k for k in knots if k.alpha > 0.0 and k.sigma > 0.0]
        assert first in called or first == knots_at(schedule, [curve.t_max])[0]
        if not called:
            continue
        log_snr = torch.tensor([2 * k.half_log_snr for k in called], dtype=torch.float64)
        t = curve.time(log_snr)
        alpha, sigma, timestep, scale = (
            column.numpy()
            for column in (*curve.alpha_sigma_at(log_snr), curve.timestep(t), curve.input_scale(t))
        )
        assert [k.alpha for k in called] == pytest.approx(alpha, rel=1e-9)
        assert [k.sigma for k in called] == pytest.approx(sigma, rel=1e-9)
        assert [k.timestep for k in called] == pytest.approx(timestep, rel=1e-6, abs=1e-6)
        assert [k.input_scale for k in called] == pytest.approx(scale, rel=1e-9)


@pytest.mark.parametrize("grid", [grid for grid in GRIDS if grid not in STARTS_LOWER])
@pytest.mark.parametrize("name", SCHEDULES)
def test_sampling_starts_at_the_most_noise(grid: str, name: str) -> None:
    schedule = SCHEDULES[name]
    first = make_knots(schedule, 5, grid)[0]
    assert first == knots_at(schedule, [schedule.curve.t_max])[0]
    assert (first.alpha == 0.0) == schedule.has_zero_terminal_snr


@pytest.mark.parametrize("grid", sorted({*GRIDS} - {"ddim_uniform", "lcm", "dpm_fast"}))
def test_as_many_steps_as_timesteps(grid: str) -> None:
    assert len(make_knots(SCALED, 1000, grid)) == 1001
    if grid in ("linspace", "leading", "trailing", "simple", "normal"):
        assert times(SCALED, 1000, grid) == pytest.approx(list(range(999, -1, -1)), abs=1e-9)


def test_linear_quarters() -> None:
    assert times(SCALED, 5, "linspace") == [999.0, 749.25, 499.5, 249.75, 0.0]
    assert times(SCALED, 5, "linspace", rounded=True) == [999.0, 749.0, 500.0, 250.0, 0.0]
    assert (
        times(SCALED, 3, "linspace", drop_last=True)
        == times(SCALED, 3, "sgm_uniform")
        == [999.0, 666.0, 333.0]
    )
    assert times(SCALED, 4, "leading") == [750.0, 500.0, 250.0, 0.0]
    assert times(SCALED, 3, "leading", drop_last=True, steps_offset=1) == [751.0, 501.0, 251.0]
    assert times(SCALED, 3, "trailing") == [999.0, 666.0, 332.0]
    assert times(FLOW, 4, "trailing") == [1000.0, 750.0, 500.0, 250.0]


@pytest.mark.parametrize("grid", GRIDS)
def test_grids_pickle_and_document_their_options(grid: str) -> None:
    function = GRIDS[grid]
    assert pickle.loads(pickle.dumps(function)) == function
    assert function.name == grid
    assert ">>>" in function.documentation
    assert "final" in grid_options(grid)
    assert function(SCALED, 10) == make_knots(SCALED, 10, grid)


def test_no_option_belongs_to_a_method_and_to_a_grid() -> None:
    of_grids = {option for grid in GRIDS for option in grid_options(grid)} | {"timesteps", "sigmas"}
    assert {
        (m.name, option) for m in METHODS.values() for option in m.options if option in of_grids
    } == set()


# how a grid ends


@pytest.mark.parametrize(
    "grid", ["karras", "exponential", "polyexponential", "beta", "lu", "vp", "kl_optimal"]
)
def test_sigma_min_ends_a_grid_where_its_own_lowest_point_is(grid: str) -> None:
    """No step of zero length: diffusers repeats the last sigma, and so evaluates the network once
    for nothing.
    """
    whole = make_knots(SCALED, 9, grid)
    ended = make_knots(SCALED, 8, grid, final="sigma_min")
    assert ended[:-1] == whole[:-2]
    assert ratios(ended)[-1] == pytest.approx(ratios(whole)[-2], rel=1e-12)
    assert make_knots(SCALED, 8, grid, drop_last=True) == (*whole[:-2], CLEAN)


def test_linspace_with_drop_last_goes_on_to_sigma_min() -> None:
    assert [
        k.timestep for k in make_knots(SCALED, 3, "linspace", drop_last=True, final="sigma_min")
    ] == [999, 666, 333, 0]
    assert make_knots(SCALED, 3, "linspace", final="sigma_min") == make_knots(
        SCALED, 3, "linspace", drop_last=True, final="sigma_min"
    )


def test_a_range_of_ones_own_ends_at_its_own_sigma_min() -> None:
    knots = make_knots(SCALED, 5, "karras", sigma_min=0.5, final="sigma_min")
    assert ratios(knots)[-1] == pytest.approx(0.5, rel=1e-12)
    assert ratios(knots)[:-1] == pytest.approx(
        ratios(make_knots(SCALED, 6, "karras", sigma_min=0.5))[:5], rel=1e-12
    )


def test_the_least_noise_of_training() -> None:
    assert final_knot(SCALED, "sigma_min").timestep == 0.0
    # t = 1 / T, shifted
    assert final_knot(FLOW_3, "sigma_min").sigma == pytest.approx(3e-3 / 1.002, rel=1e-12)
    assert final_knot(NoiseSchedule.karras(), "sigma_min").sigma == 0.002
    assert final_knot(NoiseSchedule.variance_exploding(), "sigma_min").sigma == pytest.approx(
        0.01, rel=1e-12
    )
    assert final_knot(NoiseSchedule.variance_preserving(), "sigma_min").timestep == pytest.approx(
        1.0, rel=1e-12
    )
    assert final_knot(NoiseSchedule.cosine(), "sigma_min").sigma == pytest.approx(
        math.sin(math.pi / 2000), rel=1e-12
    )


# σ-spaced grids in closed form


def k_diffusion_vp(steps: int, beta_d: float, beta_min: float, eps_s: float = 1e-3) -> Array:
    t = np.linspace(1, eps_s, steps)
    return np.sqrt(np.exp(beta_d * t**2 / 2 + beta_min * t) - 1)


CLOSED_FORMS: list[tuple[str, dict[str, Any], Callable[[int, float, float], Array]]] = [
    ("karras", {}, karras),
    ("karras", {"rho": 3.0}, lambda n, low, high: karras(n, low, high, 3.0)),
    ("exponential", {}, lambda n, low, high: np.geomspace(high, low, n)),
    ("polyexponential", {}, lambda n, low, high: np.geomspace(high, low, n)),
    (
        "polyexponential",
        {"rho": 2.0},
        lambda n, low, high: low * (high / low) ** (ramp(n)[::-1] ** 2),
    ),
    ("beta", {}, lambda n, low, high: low + stats.beta.ppf(1 - ramp(n), 0.6, 0.6) * (high - low)),
    (
        "beta",
        {"alpha": 2.0, "beta": 1.0},
        lambda n, low, high: low + stats.beta.ppf(1 - ramp(n), 2, 1) * (high - low),
    ),
    ("lu", {}, lambda n, low, high: np.exp(np.linspace(np.log(high), np.log(low), n))),
    (
        "kl_optimal",
        {},
        lambda n, low, high: np.tan(ramp(n) * np.arctan(low) + (1 - ramp(n)) * np.arctan(high)),
    ),
]


@pytest.mark.parametrize("number", range(len(CLOSED_FORMS)))
@pytest.mark.parametrize("steps", [2, 7, 20, 100])
def test_closed_forms(number: int, steps: int) -> None:
    grid, options, formula = CLOSED_FORMS[number]
    for given in ({}, {"sigma_min": 0.1, "sigma_max": 10.0}):
        low, high = (given["sigma_min"], given["sigma_max"]) if given else low_and_high()
        sigmas = Sampler(SCALED, "euler", steps, grid, **options, **given).sigmas
        assert sigmas == pytest.approx([*formula(steps, low, high), 0.0], rel=1e-9)


def test_vp_is_that_of_k_diffusion_and_of_the_schedules_own_range() -> None:
    schedule = NoiseSchedule.variance_preserving()
    for options in ({}, {"beta_d": 19.9, "beta_min": 0.1}):
        sigmas = ratios(make_knots(schedule, 20, "vp", **options))
        assert sigmas[:-1] == pytest.approx(k_diffusion_vp(20, 19.9, 0.1), rel=1e-9)
    # its own time, evenly
    assert times(schedule, 20, "vp") == pytest.approx(np.linspace(1000, 1, 20), rel=1e-9)
    low, high = low_and_high()  # elsewhere the betas that EDM's generate.py solves for
    beta_d = 2 * (np.log(low**2 + 1) / 1e-3 - np.log(high**2 + 1)) / (1e-3 - 1)
    beta_min = np.log(high**2 + 1) - 0.5 * beta_d
    assert ratios(make_knots(SCALED, 20, "vp"))[:-1] == pytest.approx(
        k_diffusion_vp(20, beta_d, beta_min), rel=1e-9
    )
    with pytest.raises(
        ValueError,
        match=r"^noise level 152\.1\d* is outside 0\.0291672 \.\.\. 14\.6146, which this schedule",
    ):
        make_knots(SCALED, 20, "vp", beta_d=19.9, beta_min=0.1)


@pytest.mark.parametrize("grid", ["karras", "exponential", "beta", "lu", "kl_optimal"])
def test_zero_terminal_snr_starts_at_the_terminal_step_and_goes_on_as_from_terminal_sigma(
    grid: str,
) -> None:
    formula = next(
        formula for name, options, formula in CLOSED_FORMS if name == grid and not options
    )
    # the latter: diffusers
    for options, terminal_sigma in (({}, TERMINAL_SIGMA), ({"terminal_sigma": 4096.0}, 4096.0)):
        knots = make_knots(ZTSNR, 10, grid, **options)
        assert (knots[0].timestep, knots[0].alpha, knots[0].sigma) == (999.0, 0.0, 1.0)
        assert ratios(knots)[1:-1] == pytest.approx(
            formula(10, ratios(knots)[-2], terminal_sigma)[1:], rel=1e-9
        )


@pytest.mark.parametrize("terminal_sigma", [0.01, 0.0, math.inf, math.nan])
def test_a_terminal_sigma_below_the_range_or_not_finite_is_refused(terminal_sigma: float) -> None:
    with pytest.raises(ValueError, match="terminal_sigma"):
        make_knots(ZTSNR, 10, "karras", terminal_sigma=terminal_sigma)


def test_steps_on_zero_terminal_snr_are_spent_where_a_wide_component_of_the_data_shows() -> None:
    """Of 20 Karras steps at most a quarter lie above sigma / alpha = 100; spaced from 4096 half of
    them do.
    """

    def above(**options: float) -> int:
        return sum(sigma > 100 for sigma in ratios(make_knots(ZTSNR, 20, "karras", **options))[:-1])

    assert above() <= 5
    assert above(terminal_sigma=4096.0) == 10


def test_a_large_but_finite_noise_is_not_capped() -> None:
    schedule = SCHEDULES["squaredcos"]
    low, high = low_and_high(schedule)
    assert high > 20_000
    assert ratios(make_knots(schedule, 10, "karras"))[:-1] == pytest.approx(
        karras(10, low, high), rel=1e-9
    )


def test_a_flow_is_spaced_in_sigma_or_in_its_ratio() -> None:
    assert flow_sigmas(make_knots(FLOW, 6, "karras"))[:-1] == pytest.approx(
        karras(6, 0.001, 1.0), rel=1e-9
    )
    ratio = ratios(make_knots(FLOW, 6, "karras", ratio=True))
    assert ratio[0] == math.inf
    assert ratio[1:-1] == pytest.approx(karras(6, 0.001 / 0.999, TERMINAL_SIGMA)[1:], rel=1e-9)
    assert make_knots(FLOW, 6, "lu") == make_knots(FLOW, 6, "exponential", ratio=True)
    assert make_knots(SCALED, 6, "lu") == make_knots(SCALED, 6, "exponential")


def test_beta_quantiles_have_the_closed_forms() -> None:
    u = torch.linspace(0, 1, 501, dtype=torch.float64)
    forms = {
        (1, 1): u,
        (0.5, 0.5): (u * math.pi / 2).sin() ** 2,
        (3, 1): u ** (1 / 3),
        (1, 4): 1 - (1 - u) ** 0.25,
    }
    for (a, b), quantile in forms.items():
        assert float((beta_quantile(u, a, b) - quantile).abs().max()) < 1e-12, (a, b)


# DPM fast


@pytest.mark.parametrize("evaluations", [1, 2, 3, 4, 5, 6, 20, 21])
def test_dpm_fast_is_laid_for_a_number_of_evaluations(evaluations: int) -> None:
    low, high = low_and_high()
    m = evaluations // 3 + 1
    theirs = np.exp(-np.linspace(-math.log(high), -math.log(low), m + 1))
    knots = make_knots(SCALED, evaluations, "dpm_fast")
    assert ratios(knots) == pytest.approx(theirs, rel=1e-9)
    assert number_of_knots("dpm_fast", evaluations) == m + 1


def test_a_method_can_ask_for_the_number_of_evaluations() -> None:
    asked: list[int] = []

    def formula(
        trace: Any, knots: Sequence[Knot], i: int, x: Any, *, evaluations: int = 0
    ) -> list[Any]:
        asked.append(evaluations)
        return [METHODS["euler"].formula(trace, knots, i, x)[0]]

    method = Method(
        "fast", formula, order=1, source="", grid="dpm_fast", steps_option="evaluations"
    )
    sampler = Sampler(SCALED, method, steps=20)
    assert (sampler.steps, len(sampler.table.steps), set(asked)) == (20, 7, {20})
    assert sampler.knots[-1].timestep == 0.0


# bad input

BAD_STEPS = {
    0: r"^steps must be between 1 and the 1000 training timesteps, got 0$",
    -1: r"^steps must be between 1 and the 1000 training timesteps, got -1$",
    1001: r"^steps must be between 1 and the 1000 training timesteps, got 1001$",
    2.5: r"^steps must be an integer, got 2\.5$",
    "20": r"^steps must be an integer, got '20'$",
}


@pytest.mark.parametrize("steps", [*BAD_STEPS, True])
def test_bad_steps(steps: Any) -> None:
    message = r"^steps must be an integer, got True$" if steps is True else BAD_STEPS[steps]
    for make in (
        lambda: make_knots(SCALED, steps, "trailing"),
        lambda: Sampler(SCALED, "euler", steps),
    ):
        with pytest.raises(ValueError, match=message):
            make()


def test_steps_left_out() -> None:
    with pytest.raises(ValueError, match=r"^steps must be an integer, got None$"):
        make_knots(SCALED, None, "trailing")
    assert Sampler(SCALED, "euler").steps == 20


BAD_OPTIONS: list[tuple[str, int, dict[str, Any], str]] = [
    ("karas", 5, {}, r"^unknown grid 'karas'; did you mean 'karras'\?$"),
    ("qqq", 5, {}, "^unknown grid 'qqq'; known: " + ", ".join(sorted(GRIDS)) + "$"),
    ("karras", 5, {"roh": 5.0}, r"^unknown option of grid 'karras' 'roh'; did you mean 'rho'\?$"),
    ("trailing", 5, {"sigma_min": 5.0}, "^unknown option of grid 'trailing' 'sigma_min'"),
    ("karras", 5, {"sigma_min": 20.0}, r"^need 0 < sigma_min < sigma_max, got 20 and 14\.6146$"),
    ("karras", 5, {"sigma_min": 0.0}, "^need 0 < sigma_min < sigma_max, got 0 and"),
    ("karras", 5, {"sigma_max": float("nan")}, "^need 0 < sigma_min < sigma_max, got .* and nan$"),
    ("karras", 5, {"sigma_max": 20.0}, r"^noise level 20 is outside 0\.0291672 \.\.\. 14\.6146"),
    ("karras", 5, {"sigma_max": "10"}, "^sigma_max must be a number, got '10'$"),
    ("karras", 5, {"rho": 0.0}, r"^rho must be positive, got 0\.0; Karras et al\. use 7$"),
    ("karras", 5, {"rho": float("nan")}, "^rho must be positive, got nan"),
    ("karras", 5, {"rho": True}, "^rho must be a number, got True$"),
    ("karras", 5, {"rounding": "up"}, "^rounding must be one of None, nearest, down, got 'up'$"),
    ("karras", 5, {"range_from": "simple"}, "^unknown timestep grid 'simple'; known: flow, "
                                            "leading, linspace, trailing$"),
    ("polyexponential", 5, {"rho": -1.0}, r"^rho must be positive, got -1\.0; 1 is the exponential grid$"),
    ("beta", 5, {"alpha": 0.0}, r"^alpha and beta must be positive, got 0\.0 and 0\.6; the published schedule has 0\.6 for both$"),
    ("vp", 5, {"eps_s": 0.0}, r"^eps_s must be between 0 and 1, got 0\.0; Karras et al\. use 1e-3$"),
    ("linear_quadratic", 5, {"linear_steps": 5}, r"^need 1 <= linear_steps < steps and .*, got 5 of 5 and 0\.025; Mochi uses"),
    ("linear_quadratic", 5, {"threshold_noise": 0.9}, r"^need 1 <= linear_steps .* got 2 of 5 and 0\.9; Mochi uses"),
    ("linspace", 5, {"final": "clean"}, "^final must be one of zero, sigma_min, stay, repeat, got 'clean'$"),
    ("linspace", 5, {"rounded": "yes"}, "^rounded must be True or False, got 'yes'$"),
    ("linspace", 5, {"interpolation": "linear"}, "^interpolation must be one of log_snr, sigma, "
                                                 "got 'linear'$"),
    ("linspace", 5, {"lambda_min": 9.0}, r"^no timestep has log\(α / σ\) of at least lambda_min = 9; lower it \(-5\.1 is usual\)$"),
    ("linspace", 1000, {"final": "sigma_min"}, "^1000 steps visit the least noise already; with "
                                               "final='sigma_min' take one fewer$"),
    ("linspace", 1000, {"drop_last": True, "rounded": True}, "^noise must fall at every step, but "
                                                             ".*; use fewer steps or another grid$"),
    ("leading", 1, {"steps_offset": 1000}, "^1 points from timestep 1000 on, 1000 apart, go past "
                                           "the last timestep 999; lower"),
    ("leading", 1000, {"steps_offset": 1}, "^1000 points from timestep 1 on, 1 apart, go past the "
                                           "last timestep 999"),
    ("leading", 4, {"steps_offset": -1}, "^steps_offset must be at least 0, got -1$"),
    ("leading", 4, {"steps_offset": 1.5}, r"^steps_offset must be an integer, got 1\.5$"),
    ("leading", 1000, {"drop_last": True}, "^noise must fall at every step, but .* in step 1 of "
                                           "1000; use fewer steps or another grid$"),
    ("ddim_uniform", 1000, {}, "^1000 points from timestep 1 on, 1 apart, go past"),
    ("lcm", 60, {}, "^need steps <= original_steps <= 1000, got 60 and 50; take fewer steps or "
                    "another grid$"),
    ("flow", 4, {"shift": 0.0}, "^shift must be positive, got 0; 1 is no shift, SD3 uses 3$"),
    ("flow", 4, {"shift": 2.0, "mu": 1.0}, "^give one of shift, mu and image_seq_len, got shift "
                                           "and mu$"),
    ("flow", 4, {"shift_terminal": 1.0}, r"^shift_terminal must be between 0 and 1, got 1\.0; LTX-Video uses 0\.1$"),
]  # fmt: skip


@pytest.mark.parametrize("number", range(len(BAD_OPTIONS)))
def test_bad_options(number: int) -> None:
    grid, steps, options, message = BAD_OPTIONS[number]
    with pytest.raises(ValueError, match=message):
        make_knots(SCALED, steps, grid, **options)


@pytest.mark.parametrize("name", ["flow", "cosine", "karras"])
def test_what_only_discrete_schedules_have(name: str) -> None:
    schedule = SCHEDULES[name]
    with pytest.raises(
        ValueError,
        match=f"^interpolation='sigma' is for discrete schedules; a {schedule.curve.kind} curve is "
        "exact",
    ):
        make_knots(schedule, 5, "linspace", interpolation="sigma")
    if name == "flow":  # the DPM-Solver classes of diffusers cut the times of flows
        times = [knot.timestep for knot in make_knots(schedule, 6, "flow", rounding="down")]
        assert times[:-1] == [1000.0, 800.0, 600.0, 400.0, 200.0, 1.0]
        return
    with pytest.raises(
        ValueError,
        match=f"^rounding='nearest' is for discrete schedules; a {schedule.curve.kind} network "
        "takes any",
    ):
        make_knots(schedule, 5, "karras", rounding="nearest")


def test_a_function_is_a_grid_and_is_checked_too() -> None:
    def two(schedule: NoiseSchedule, steps: int, *, first: float = 800.0) -> tuple[Knot, ...]:
        return (*knots_at(schedule, [first, 100.0]), CLEAN)

    assert [knot.timestep for knot in make_knots(SCALED, 2, two, first=900.0)] == [
        900.0,
        100.0,
        -1.0,
    ]
    assert Sampler(SCALED, "euler", 2, two, first=700.0).timesteps == [700.0, 100.0]
    with pytest.raises(ValueError, match=r"^a grid of 3 steps must have 4 knots, got 3$"):
        make_knots(SCALED, 3, two)
    with pytest.raises(
        ValueError, match=r"^noise must fall at every step, but σ/α goes from .* in step 1 of 2"
    ):
        make_knots(SCALED, 2, two, first=100.0)
    with pytest.raises(ValueError, match=r"did you mean 'first'"):
        make_knots(SCALED, 2, two, frist=100.0)
    with pytest.raises(ValueError, match=r"^first must be a number, got 'a'$"):
        make_knots(SCALED, 2, two, first="a")
