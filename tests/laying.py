"""Schedules, and what grids are compared by; shared by the tests of the grids."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from alphabar.noising import NoiseSchedule
from alphabar.sampling import Knot, make_knots

logging.getLogger("diffusers").setLevel(logging.ERROR)

SD: dict[str, Any] = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
SCALED = NoiseSchedule.scaled_linear()
ZTSNR = NoiseSchedule.scaled_linear(prediction="v_prediction").zero_terminal_snr()
FLOW, FLOW_3 = NoiseSchedule.flow(), NoiseSchedule.flow(shift=3.0)
SCHEDULES = {
    "scaled_linear": SCALED,
    "linear": NoiseSchedule.linear(),
    "ztsnr": ZTSNR,
    "squaredcos": NoiseSchedule.squaredcos_cap_v2(),
    "flow": FLOW,
    "flow_3": FLOW_3,
    "karras": NoiseSchedule.karras(),
    "variance_preserving": NoiseSchedule.variance_preserving(),
    "variance_exploding": NoiseSchedule.variance_exploding(),
    "cosine": NoiseSchedule.cosine(),
}
Array = NDArray[np.float64]


def times(schedule: NoiseSchedule, steps: int, grid: str, **options: Any) -> list[float]:
    return [knot.timestep for knot in make_knots(schedule, steps, grid, **options)[:-1]]


def ratios(knots: Sequence[Knot]) -> list[float]:
    return [knot.sigma_ve for knot in knots]


def flow_sigmas(knots: Sequence[Knot]) -> list[float]:
    return [knot.sigma for knot in knots]


def low_and_high(schedule: NoiseSchedule = SCALED) -> tuple[float, float]:
    low, high = schedule.sigma_ve(torch.tensor([0.0, 999.0], dtype=torch.float64)).tolist()
    return low, high


def ramp(steps: int) -> Array:
    return np.linspace(0, 1, steps)


def karras(steps: int, low: float, high: float, rho: float = 7.0) -> Array:
    return (high ** (1 / rho) + ramp(steps) * (low ** (1 / rho) - high ** (1 / rho))) ** rho


CONVERSIONS = {
    "karras": "use_karras_sigmas",
    "exponential": "use_exponential_sigmas",
    "beta": "use_beta_sigmas",
}


def peer(name: str, steps: int, schedule: NoiseSchedule = SCALED, **config: Any) -> Any:
    scheduler = getattr(diffusers, name)(
        **({**SD, **config} if "beta_schedule" not in config else config)
    )
    scheduler.alphas_cumprod = schedule.alphas_cumprod
    scheduler.set_timesteps(steps)
    return scheduler


def check(
    scheduler: Any, knots: Sequence[Knot], call_scale: float = 1.0, rel: float = 3e-7
) -> None:
    """Compare what a scheduler of one evaluation per step has laid with knots."""
    called = np.asarray(scheduler.timesteps, dtype=float)
    sigmas = np.asarray(scheduler.sigmas, dtype=float)
    assert [k.timestep * call_scale for k in knots[:-1]] == pytest.approx(called, abs=5e-5)
    assert ratios(knots) == pytest.approx(sigmas, rel=rel, abs=1e-12)
