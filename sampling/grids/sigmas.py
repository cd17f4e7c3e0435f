"""σ-spaced grids: formulas for the noise levels of the network calls, from high to low.

Every grid here has these options in addition to its own:

``sigma_min``, ``sigma_max``: the range, by default from the schedule's last training time to its
first.

``range_from``: take the range of the timestep-spaced grid with this name (with ``steps_offset``),
as the Euler, Heun, LMS and KDPM2 classes of diffusers; "flow": as its FlowMatch classes.

``ratio``: space σ / α on a flow path too, instead of σ.

``rounding``: "nearest" or "down", see ``knots_at_levels``.

``drop_last``: compute one point more and remove the lowest ("discard next-to-last sigma" in A1111).

``final``: the end of sampling. "zero": the clean sample. "sigma_min": ``sigma_min``, or else the
least noise of training; if the grid itself reaches this level, it is computed with one point more,
and its last point is the end. "stay": the least noise of training; if the grid itself reaches this
level, the last step does not move, as diffusers appends its sigma_min to any grid. "repeat": the
last step does not move, wherever the grid ends.

With zero terminal SNR σ / α is infinite at the terminal time. Then the first knot is exactly that
terminal step, and the others are spaced as if it were at ``terminal_sigma``, by default 200.
Diffusers clamps ᾱ to 2^-24 and so spaces from 4096: half of 20 Karras steps are above 100, where
little happens. A lower value reduces the amplitude where the data are widest: the first step loses
the fraction (S / σ)² / 2 of a component of standard deviation S at the second knot σ. Latents of 64
x 64 have S near 30 in their mean, those of 128 x 128 near 60. ``benchmarks/terminal_sigma.py``
measures both.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ...noising import NoiseSchedule
from ...noising.timesteps.densities import beta_quantile
from ...noising.utils.registry import lookup
from ...noising.utils.validation import require
from ..knots import Knot
from ..methods.dpm_singlestep import block_orders
from .base import (
    GRIDS,
    F,
    final_knot,
    knots_at_levels,
    level_at,
    lowest_time,
    register_grid,
    standing_still,
)

TERMINAL_SIGMA = 200.0
"""The value used for an infinite σ / α when σ-spaced grids space the other knots."""

RANGES: dict[str, dict[str, Any]] = {
    "linspace": {},
    "leading": {},
    "trailing": {},
    "flow": {"end_shifted": True},
}
"""The timestep-spaced grids whose range a σ-spaced grid may use, with their options."""


def place_sigmas(
    formula: Callable[[int, float, float], Tensor],
    schedule: NoiseSchedule,
    steps: int,
    *,
    sigma_min: float | None = None,
    sigma_max: float | None = None,
    range_from: str | None = None,
    steps_offset: int = 0,
    ratio: bool = False,
    rounding: str | None = None,
    drop_last: bool = False,
    final: str = "zero",
    terminal_sigma: float = TERMINAL_SIGMA,
) -> tuple[Knot, ...]:
    lowest, most = _training_range(schedule, ratio)
    if range_from is not None:
        lowest, most = _subsampled_range(schedule, steps, range_from, steps_offset, ratio)
    low = lowest if sigma_min is None else float(sigma_min)
    top = most if sigma_max is None else float(sigma_max)
    high = terminal_sigma if math.isinf(top) else top
    if math.isinf(top) and not low < terminal_sigma < math.inf:
        raise ValueError(
            f"terminal_sigma must be finite and above sigma_min {low:g}, got {terminal_sigma}; "
            f"{TERMINAL_SIGMA:g} is usual, "
            "diffusers spaces from 4096"
        )
    if not (0 < low < high or (steps == 1 and 0 < low == high)):
        raise ValueError(f"need 0 < sigma_min < sigma_max, got {low:g} and {high:g}")

    def levels(points: int) -> Tensor:
        laid = formula(points, low, high)[:steps]
        laid[0] = top if math.isclose(float(laid[0]), high, rel_tol=1e-12) else laid[0]
        return laid

    end = final_knot(schedule, final)
    if final == "sigma_min" and sigma_min is not None:
        end = knots_at_levels(schedule, torch.tensor([low], dtype=torch.float64), ratio, rounding)[
            0
        ]
    laid = knots_at_levels(schedule, levels(steps + drop_last), ratio, rounding)
    there = bool(end.sigma) and not laid[-1].sigma_ve > end.sigma_ve * (1 + 1e-9)
    if final == "repeat" or (there and final == "stay"):
        return (*laid, standing_still(laid[-1]))
    if there:
        laid = knots_at_levels(schedule, levels(steps + 1), ratio, rounding)
    return (*laid, end)


def register_sigma_grid(
    count: Callable[..., int] | None = None, **defaults: Any
) -> Callable[[F], F]:
    """Register a formula: from (points, low, high, options) to noise levels, shape (points,).

    The levels fall. ``defaults`` replace the defaults of the shared options. ``count``: the grid's
    number of steps, if the requested number is a number of evaluations.

    >>> @register_sigma_grid()
    ... def even(points, low, high):
    ...     return torch.linspace(high, low, points, dtype=torch.float64)
    >>> from alphabar.sampling import make_knots
    >>> [round(knot.sigma_ve, 2) for knot in make_knots(NoiseSchedule.scaled_linear(), 3, "even")]
    [14.61, 7.32, 0.03, 0.0]
    """
    return register_grid(place_sigmas, count, **defaults)


def _training_range(schedule: NoiseSchedule, ratio: bool) -> tuple[float, float]:
    curve = schedule.curve
    return level_at(curve, lowest_time(curve), ratio), level_at(curve, curve.t_max, ratio)


def _subsampled_range(
    schedule: NoiseSchedule, steps: int, name: str, steps_offset: int, ratio: bool
) -> tuple[float, float]:
    options = lookup("timestep grid", name, RANGES)
    if name == "leading":
        options = {"steps_offset": steps_offset}
    knots = GRIDS[name](schedule, steps, **options)
    in_sigma = schedule.curve.is_flow and not ratio
    first, last = (k.sigma if in_sigma else k.sigma_ve for k in (knots[0], knots[-2]))
    return last, first


def _ramp(points: int) -> Tensor:
    return torch.linspace(0, 1, points, dtype=torch.float64)


def _log_linear(points: int, low: float, high: float) -> Tensor:
    return torch.linspace(math.log(high), math.log(low), points, dtype=torch.float64).exp()


@register_sigma_grid()
def karras(points: int, low: float, high: float, *, rho: float = 7.0) -> Tensor:
    """Space σ^(1/ρ) evenly (Karras et al. 2206.00364, eq. 5).

    >>> from alphabar.sampling import make_knots
    >>> [round(k.sigma_ve, 3) for k in make_knots(NoiseSchedule.scaled_linear(), 3, "karras")]
    [14.615, 1.274, 0.029, 0.0]
    """
    require(rho > 0, "rho", "be positive", rho, "Karras et al. use 7")
    return (high ** (1 / rho) + _ramp(points) * (low ** (1 / rho) - high ** (1 / rho))) ** rho


@register_sigma_grid()
def exponential(points: int, low: float, high: float) -> Tensor:
    """Space log σ evenly (k-diffusion's get_sigmas_exponential).

    >>> from alphabar.sampling import make_knots
    >>> [round(k.sigma_ve, 3) for k in make_knots(NoiseSchedule.scaled_linear(), 3, "exponential")]
    [14.615, 0.653, 0.029, 0.0]
    """
    return _log_linear(points, low, high)


@register_sigma_grid()
def polyexponential(points: int, low: float, high: float, *, rho: float = 1.0) -> Tensor:
    """Let log σ fall as u^ρ, with u even from 1 to 0; ρ = 1 is ``exponential``.

    k-diffusion's get_sigmas_polyexponential.

    >>> from alphabar.sampling import make_knots
    >>> [
    ...     round(k.sigma_ve, 3)
    ...     for k in make_knots(NoiseSchedule.scaled_linear(), 3, "polyexponential", rho=0.5)
    ... ]
    [14.615, 2.366, 0.029, 0.0]
    """
    require(rho > 0, "rho", "be positive", rho, "1 is the exponential grid")
    u = _ramp(points).flip(0) ** rho if points > 1 else torch.ones(1, dtype=torch.float64)
    return torch.exp(math.log(low) + u * math.log(high / low))


@register_sigma_grid()
def beta(points: int, low: float, high: float, *, alpha: float = 0.6, beta: float = 0.6) -> Tensor:
    """Take quantiles of a Beta distribution over σ, dense at both ends.

    diffusers' use_beta_sigmas and A1111's Beta. The paper (Lee et al. 2407.12173) and ComfyUI take
    them over the timesteps: that is the grid ``beta_timesteps``.

    >>> from alphabar.sampling import make_knots
    >>> [round(k.sigma_ve, 3) for k in make_knots(NoiseSchedule.scaled_linear(), 3, "beta")]
    [14.615, 7.322, 0.029, 0.0]
    """
    return low + beta_quantile(1 - _ramp(points), alpha, beta) * (high - low)


@register_sigma_grid(ratio=True)
def lu(points: int, low: float, high: float) -> Tensor:
    """Space λ = log(α / σ) evenly (Lu et al. 2206.00927, 'logSNR' steps).

    diffusers' use_lu_lambdas.

    >>> from alphabar.sampling import make_knots
    >>> [round(k.half_log_snr, 3) for k in make_knots(NoiseSchedule.scaled_linear(), 3, "lu")]
    [-2.682, 0.426, 3.535, inf]
    """
    return _log_linear(points, low, high)


@register_sigma_grid(ratio=True)
def vp(
    points: int,
    low: float,
    high: float,
    *,
    beta_d: float | None = None,
    beta_min: float | None = None,
    eps_s: float = 1e-3,
) -> Tensor:
    """Space the time t of a VP SDE evenly from 1 to ε_s (2206.00364, table 1).

    σ = sqrt(exp(β_d t² / 2 + β_min t) - 1). By default β_d and β_min are those whose σ cover the
    range (as in EDM's generate.py). On a VP schedule these are its own values, so its time is
    spaced evenly. k-diffusion's get_sigmas_vp has 19.9 and 0.1.

    >>> from alphabar.sampling import make_knots
    >>> [round(k.timestep) for k in make_knots(NoiseSchedule.variance_preserving(), 3, "vp")]
    [1000, 500, 1, -1]
    """
    require(0 < eps_s < 1, "eps_s", "be between 0 and 1", eps_s, "Karras et al. use 1e-3")
    log_low, log_high = math.log1p(low**2), math.log1p(high**2)
    beta_d = 2 * (log_low / eps_s - log_high) / (eps_s - 1) if beta_d is None else beta_d
    beta_min = log_high - 0.5 * beta_d if beta_min is None else beta_min
    t = torch.linspace(1, eps_s, points, dtype=torch.float64)
    return torch.expm1(0.5 * beta_d * t**2 + beta_min * t).sqrt()


@register_sigma_grid(ratio=True)
def kl_optimal(points: int, low: float, high: float) -> Tensor:
    """Space arctan σ evenly: optimal in KL divergence for Gaussian data.

    Source: Sabour et al. 2404.14507; ComfyUI. A1111 computes n + 1 points and ends at the last:
    ``final="sigma_min"``. ComfyUI's grid on a flow path: ``ratio=False``.

    >>> from alphabar.sampling import make_knots
    >>> [round(k.sigma_ve, 3) for k in make_knots(NoiseSchedule.scaled_linear(), 3, "kl_optimal")]
    [14.615, 0.962, 0.029, 0.0]
    """
    u = _ramp(points)
    return torch.tan(u * math.atan(low) + (1 - u) * math.atan(high))


@register_sigma_grid()
def linear_quadratic(
    points: int,
    low: float,
    high: float,
    *,
    threshold_noise: float = 0.025,
    linear_steps: int | None = None,
) -> Tensor:
    """Fall linearly by ``threshold_noise`` in the first half, then quadratically to 0.

    Source: Mochi; ComfyUI. This is a noise schedule of flow models; on others σ / α takes the same
    fractions of its range, as in ComfyUI. ``linear_steps`` defaults to half of the steps. The
    lowest level of the range is not used.

    >>> from alphabar.sampling import make_knots
    >>> [round(k.sigma, 4) for k in make_knots(NoiseSchedule.flow(), 4, "linear_quadratic")]
    [1.0, 0.9875, 0.975, 0.725, 0.0]
    """
    if points == 1:
        return torch.tensor([high], dtype=torch.float64)
    m = points // 2 if linear_steps is None else linear_steps
    if not 1 <= m < points or not 0 < threshold_noise < m / points:
        raise ValueError(
            "need 1 <= linear_steps < steps and 0 < threshold_noise < linear_steps / steps, got "
            f"{m} of {points} and "
            f"{threshold_noise}; Mochi uses half of the steps and 0.025"
        )
    i = torch.arange(points, dtype=torch.float64)
    # the parabola equals the line in value and slope at i = m, and 1 at i = points
    slope, excess = threshold_noise / m, 1 - threshold_noise * points / m
    gone = slope * i + excess * ((i - m).clamp(min=0) / (points - m)) ** 2
    return high * (1 - gone)


def _fast_steps(
    evaluations: int,
    schedule: NoiseSchedule | None = None,
    *,
    sigma_max: float | None = None,
    range_from: str | None = None,
    steps_offset: int = 0,
    ratio: bool = True,
    final: str = "sigma_min",
    **unread: Any,
) -> int:
    top = 1.0 if sigma_max is None else sigma_max
    if schedule is not None and sigma_max is None:
        _, top = _training_range(schedule, ratio)
        if range_from is not None:
            top = _subsampled_range(
                schedule, evaluations // 3 + 1, range_from, steps_offset, ratio
            )[1]
    return len(block_orders(evaluations, from_noise=math.isinf(top), to_clean=final == "zero"))


@register_sigma_grid(count=_fast_steps, ratio=True, final="sigma_min")
def dpm_fast(points: int, low: float, high: float) -> Tensor:
    """Space log(σ / α) evenly for steps of three evaluations each.

    k-diffusion's sample_dpm_fast; 2206.00927, DPM-Solver-fast. The requested number n is the number
    of evaluations: there are n // 3 + 1 steps, and the last one or two use the remaining
    evaluations. The end is the least noise. A first step from α = 0 and a last one to σ = 0 have
    one evaluation, see ``dpm_singlestep.block_orders``.

    >>> from alphabar.sampling import make_knots
    >>> len(make_knots(NoiseSchedule.scaled_linear(), 20, "dpm_fast")) - 1
    7
    """
    return _log_linear(points, low, high)
