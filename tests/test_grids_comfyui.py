"""The schedulers of ComfyUI and A1111, and the published tables of Align Your Steps."""

from __future__ import annotations

from collections.abc import Sequence

import diffusers
import numpy as np
import pytest
import torch
from scipy import stats

from alphabar.noising import NoiseSchedule
from alphabar.sampling import make_knots
from alphabar.sampling.grids.align_your_steps import SIGMAS, STABLE_DIFFUSION_TIMESTEPS
from laying import (
    FLOW,
    FLOW_3,
    SCALED,
    ZTSNR,
    Array,
    flow_sigmas,
    karras,
    low_and_high,
    ramp,
    ratios,
)

# ComfyUI and A1111, from the formulas of comfy/samplers.py and modules/sd_schedulers.py. Their
# tables: σ / α of the discrete timesteps, log-linear between them; of a flow, its sigmas at t = 1/T
# ... 1.

TABLE = SCALED.sigma_ve(torch.arange(1000, dtype=torch.float64)).numpy()
FLOW_TABLE = np.array([3 * t / (1 + 2 * t) for t in np.arange(1, 1001) / 1000])


def comfy_sigma(t: Array) -> Array:
    return np.exp(np.interp(t, np.arange(1000), np.log(TABLE)))


def comfy_simple(table: Array, steps: int) -> list[float]:
    return [float(table[-(1 + int(x * (len(table) / steps)))]) for x in range(steps)] + [0.0]


def comfy_ddim_uniform(table: Array, steps: int) -> list[float]:
    stride = max(len(table) // steps, 1)
    return [*table[1::stride][::-1], 0.0]


def comfy_normal(steps: int, sgm: bool) -> list[float]:
    t = np.linspace(999, 0, steps + 1)[:-1] if sgm else np.linspace(999, 0, steps)
    return [*comfy_sigma(t), 0.0]


def comfy_beta(table: Array, steps: int) -> list[float]:
    u = 1 - np.linspace(0, 1, steps, endpoint=False)
    at = np.rint(stats.beta.ppf(u, 0.6, 0.6) * (len(table) - 1)).astype(int)
    return [*table[list(dict.fromkeys(at))], 0.0]


def mochi_linear_quadratic(steps: int, threshold: float = 0.025) -> list[float]:
    if steps == 1:
        return [1.0, 0.0]
    m, q = steps // 2, steps - steps // 2
    linear = [i * threshold / m for i in range(m)]
    difference = m - threshold * steps
    a, b = difference / (m * q**2), threshold / m - 2 * difference / q**2
    quadratic = [a * i**2 + b * i + a * m**2 for i in range(m, steps)]
    return [1 - x for x in linear + quadratic + [1.0]]


COMFY_STEPS = (1, 2, 3, 8, 13, 20, 30, 50)


@pytest.mark.parametrize("steps", COMFY_STEPS)
def test_comfyui(steps: int) -> None:
    low, high = low_and_high()
    expected = {
        ("simple", ()): comfy_simple(TABLE, steps),
        ("normal", ()): comfy_normal(steps, sgm=False),
        ("sgm_uniform", ()): comfy_normal(steps, sgm=True),
        ("beta_timesteps", (("rounded", True),)): comfy_beta(TABLE, steps),
        ("linear_quadratic", ()): [high * s for s in mochi_linear_quadratic(steps)],
        ("exponential", ()): [*np.geomspace(high, low, steps), 0.0],
        ("karras", ()): [*karras(steps, low, high), 0.0],
    }
    for (grid, options), sigmas in expected.items():
        assert ratios(make_knots(SCALED, steps, grid, **dict(options))) == pytest.approx(
            sigmas, rel=1e-9
        ), grid


@pytest.mark.parametrize("steps", COMFY_STEPS)
def test_comfyui_ddim_uniform_takes_as_many_as_fit(steps: int) -> None:
    theirs = comfy_ddim_uniform(TABLE, steps)
    ours = make_knots(SCALED, len(theirs) - 1, "ddim_uniform", stride=1000 // steps)
    assert ratios(ours) == pytest.approx(theirs, rel=1e-9)
    if 1000 % steps == 0:
        assert len(theirs) == steps + 1
        assert (
            make_knots(SCALED, steps, "ddim_uniform")
            == ours
            == make_knots(SCALED, steps, "leading", steps_offset=1)
        )


@pytest.mark.parametrize("steps", COMFY_STEPS)
def test_comfyui_on_a_flow(steps: int) -> None:
    low, high = float(FLOW_TABLE[0]), 1.0
    # 'normal' takes the shifted ends for times, and shifts them again
    t = np.linspace(high, low, steps)
    t_sgm = np.linspace(high, low, steps + 1)[:-1]
    twice = low
    expected = [
        ("simple", {}, comfy_simple(FLOW_TABLE, steps)),
        ("beta_timesteps", {"rounded": True}, comfy_beta(FLOW_TABLE, steps)),
        ("linear_quadratic", {}, mochi_linear_quadratic(steps)),
        ("flow", {"end": twice}, [*(3 * t / (1 + 2 * t)), 0.0]),
        ("flow", {"end": twice, "drop_last": True}, [*(3 * t_sgm / (1 + 2 * t_sgm)), 0.0]),
        (
            "kl_optimal",
            {"ratio": False},
            [*np.tan(ramp(steps) * np.arctan(low) + (1 - ramp(steps)) * np.arctan(high)), 0.0],
        ),
    ]
    for grid, options, sigmas in expected:
        assert flow_sigmas(make_knots(FLOW_3, steps, grid, **options)) == pytest.approx(
            sigmas, rel=1e-9
        ), grid


@pytest.mark.parametrize("steps", [2, 8, 20])
def test_a1111_differs_in_the_end_of_kl_optimal_and_in_beta(steps: int) -> None:
    low, high = low_and_high()
    i = np.arange(steps + 1) / steps
    theirs = np.tan(i * np.arctan(low) + (1 - i) * np.arctan(high))
    assert ratios(make_knots(SCALED, steps, "kl_optimal", final="sigma_min")) == pytest.approx(
        theirs, rel=1e-9
    )
    sigmas = [
        low + stats.beta.ppf(x, 0.6, 0.6) * (high - low) for x in 1 - np.linspace(0, 1, steps)
    ]
    assert ratios(make_knots(SCALED, steps, "beta"))[:-1] == pytest.approx(sigmas, rel=1e-9)


def test_discard_next_to_last_sigma_is_drop_last() -> None:
    theirs = [*karras(21, *low_and_high()), 0.0]
    assert ratios(make_knots(SCALED, 20, "karras", drop_last=True)) == pytest.approx(
        theirs[:-2] + theirs[-1:], rel=1e-9
    )


# align your steps

COMFY_LEVELS = {  # comfy_extras/nodes_align_your_steps.py
    "sd15": [14.6146412293, 6.4745760956, 3.8636745985, 2.6946151520, 1.8841921177, 1.3943805092, 0.9642583904, 0.6523686016,
             0.3977456272, 0.1515232662, 0.0291671582],
    "sdxl": [14.6146412293, 6.3184485287, 3.7681790315, 2.1811480769, 1.3405244945, 0.8620721141, 0.5550693289, 0.3798540708,
             0.2332364134, 0.1114188177, 0.0291671582],
    "svd": [700.00, 54.5, 15.886, 7.977, 4.248, 1.789, 0.981, 0.403, 0.173, 0.034, 0.002],
}  # fmt: skip
SVD = NoiseSchedule.karras(sigma_min=0.002, sigma_max=700.0)
AYS_SCHEDULES = {"sd15": SCALED, "sdxl": SCALED, "svd": SVD}


def loglinear(levels: Sequence[float], count: int) -> Array:
    """The interpolation of the authors' quickstart guide."""
    new = np.interp(np.linspace(0, 1, count), np.linspace(0, 1, len(levels)), np.log(levels[::-1]))
    return np.exp(new)[::-1]


def test_align_your_steps_holds_the_published_tables() -> None:
    published = diffusers.schedulers.AysSchedules
    assert list(STABLE_DIFFUSION_TIMESTEPS["sd15"][:-1]) == published["StableDiffusionTimesteps"]
    assert list(STABLE_DIFFUSION_TIMESTEPS["sdxl"][:-1]) == published["StableDiffusionXLTimesteps"]
    assert list(SIGMAS["svd"][:-1]) == published["StableDiffusionVideoSigmas"][:-1]
    for variant, key in (
        ("sd15", "StableDiffusion"),
        ("sdxl", "StableDiffusionXL"),
        ("svd", "StableDiffusionVideo"),
    ):
        knots = make_knots(AYS_SCHEDULES[variant], 10, "align_your_steps", variant=variant)
        # the published sigmas are those of the timesteps, rounded to about three figures
        assert ratios(knots) == pytest.approx(published[f"{key}Sigmas"], rel=0.015)
        if variant != "svd":
            assert [k.timestep for k in knots[:-1]] == published[f"{key}Timesteps"]


@pytest.mark.parametrize("variant", COMFY_LEVELS)
@pytest.mark.parametrize("steps", [1, 4, 7, 10, 11, 20, 32])
def test_align_your_steps_interpolates_log_linearly(variant: str, steps: int) -> None:
    levels, schedule = COMFY_LEVELS[variant], AYS_SCHEDULES[variant]
    comfy = [*loglinear(levels, steps + 1)[:-1], 0.0]
    a1111 = [*loglinear(levels, steps), 0.0]
    ours = make_knots(schedule, steps, "align_your_steps", variant=variant)
    assert ratios(ours) == pytest.approx(comfy, rel=1e-8)  # they print ten decimals
    kept = make_knots(schedule, steps, "align_your_steps", variant=variant, drop_last=False)
    # one number is interpolated at the lowest end there, and at the highest here
    assert steps == 1 or ratios(kept) == pytest.approx(a1111, rel=1e-8)


def test_align_your_steps_elsewhere() -> None:
    knots = make_knots(ZTSNR, 10, "align_your_steps")
    assert knots[0].alpha == 0.0
    assert ratios(knots)[1:-1] == pytest.approx(COMFY_LEVELS["sd15"][1:-1], rel=1e-9)
    assert ratios(make_knots(FLOW, 10, "align_your_steps"))[1:-1] == pytest.approx(
        COMFY_LEVELS["sd15"][1:-1], rel=1e-9
    )
    with pytest.raises(
        ValueError,
        match=r"^noise level 700 is outside 0\.002 \.\.\. 80, which this schedule was trained on",
    ):
        make_knots(NoiseSchedule.karras(), 10, "align_your_steps", variant="svd")
    with pytest.raises(ValueError, match=r"^unknown variant 'sd3'; did you mean 'svd'\?$"):
        make_knots(SCALED, 10, "align_your_steps", variant="sd3")
