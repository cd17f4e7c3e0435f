"""Timestep-spaced grids: formulas for the training indices of the network calls, falling.

Every grid here has these options in addition to its own:

``rounded``: integer indices, as the DDIM, DDPM and DPM-Solver classes of diffusers.

``drop_last``: compute one point more and remove the lowest, as the DPM-Solver classes.

``final``: the end of sampling. "zero": the clean sample. "sigma_min": the least noise of training;
if the grid itself reaches this level, it is computed with one point more, and its last point is
the end. "stay": as "sigma_min", but if the grid itself reaches this level, the last step does not
move, as diffusers appends its sigma_min to any grid. "repeat": the last step does not move,
wherever the grid ends.

``rounding``: "nearest" or "down" gives the network integer timesteps and does not change the noise
levels, as the DPM-Solver classes of diffusers on flows.

``interpolation``: see ``knots_at_indices``.

With zero terminal SNR the last index is the knot with α = 0.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ...noising import NoiseSchedule, token_shift
from ...noising.curves.shifts import shift_noise_level
from ...noising.timesteps.densities import beta_quantile
from ...noising.utils.validation import require
from ..knots import Knot
from .base import F, final_knot, knots_at_indices, register_grid, standing_still, with_rounded_times

Indices = Callable[[NoiseSchedule, int], Tensor]


def place_timesteps(
    formula: Indices,
    schedule: NoiseSchedule,
    steps: int,
    *,
    rounded: bool = False,
    drop_last: bool = False,
    interpolation: str = "log_snr",
    rounding: str | None = None,
    final: str = "zero",
) -> tuple[Knot, ...]:
    def index(points: int) -> Tensor:
        values = formula(schedule, points)[:steps]
        return values.round() if rounded else values

    laid = index(steps + drop_last)
    if final == "sigma_min" and float(laid[-1]) <= 0:
        if steps == schedule.num_train_timesteps:
            raise ValueError(
                f"{steps} steps visit the least noise already; with final='sigma_min' take one "
                "fewer"
            )
        laid = index(steps + 1)
    knots = knots_at_indices(schedule, laid, interpolation)
    knots = with_rounded_times(schedule, knots, rounding)
    stays = final == "repeat" or (final == "stay" and float(laid[-1]) <= 0)
    return (*knots, standing_still(knots[-1]) if stays else final_knot(schedule, final))


def register_timestep_grid(**defaults: Any) -> Callable[[F], F]:
    """Register a formula: from (schedule, points, options) to training indices, shape (points,).

    The indices fall. ``defaults`` replace the defaults of the shared options.

    >>> @register_timestep_grid()
    ... def halves(schedule, points):
    ...     return 999 * 0.5 ** torch.arange(points)
    >>> from alphabar.sampling import make_knots
    >>> [knot.timestep for knot in make_knots(NoiseSchedule.linear(), 2, "halves")]
    [999.0, 499.5, -1.0]
    """
    return register_grid(place_timesteps, **defaults)


def _from_the_top(points: int) -> Tensor:
    return torch.arange(points - 1, -1, -1, dtype=torch.float64)


def _even(points: int, last: int) -> Tensor:
    # counted up from 0 like numpy, so that rounding ties are as in diffusers
    index = _from_the_top(points) * (last / max(points - 1, 1))
    index[0] = last
    return index


def _usable(schedule: NoiseSchedule, lambda_min: float) -> int:
    """Return how many indices, from 0 on, have log(α / σ) of at least ``lambda_min``."""
    count = schedule.num_train_timesteps
    if lambda_min == -math.inf:
        return count
    times = schedule.curve.time_at_index(torch.arange(count, dtype=torch.float64))
    usable = int((schedule.curve.log_snr(times) >= 2 * lambda_min).sum())
    if not usable:
        raise ValueError(
            f"no timestep has log(α / σ) of at least lambda_min = {lambda_min:g}; lower it (-5.1 "
            "is usual)"
        )
    return usable


@register_timestep_grid()
def linspace(schedule: NoiseSchedule, points: int, *, lambda_min: float = -math.inf) -> Tensor:
    """Space timesteps evenly from the last to the first (2305.08891, table 2).

    ``lambda_min``: start at the last timestep with log(α / σ) of at least this value (2211.01095,
    appendix; -5.1 with the cosine betas); 'lambda_min_clipped' in diffusers.

    >>> from alphabar.sampling import make_knots
    >>> [k.timestep for k in make_knots(NoiseSchedule.linear(), 3, "linspace")]
    [999.0, 499.5, 0.0, -1.0]
    >>> [
    ...     k.timestep
    ...     for k in make_knots(
    ...         NoiseSchedule.linear(), 3, "linspace", drop_last=True, final="sigma_min"
    ...     )
    ... ]
    [999.0, 666.0, 333.0, 0.0]
    """
    return _even(points, _usable(schedule, lambda_min) - 1)


@register_timestep_grid()
def score_sde(schedule: NoiseSchedule, points: int) -> Tensor:
    """Space training times evenly from the curve's last to its first, as Song et al. 2011.13456.

    This follows their code. On discrete schedules, and if the first time is the clean sample, it is
    equal to ``linspace``.

    >>> from alphabar.sampling import make_knots
    >>> [
    ...     round(k.timestep, 1)
    ...     for k in make_knots(NoiseSchedule.variance_preserving(), 4, "score_sde")
    ... ]
    [1000.0, 667.0, 334.0, 1.0, -1.0]
    """
    curve, top = schedule.curve, schedule.num_train_timesteps - 1
    start = torch.tensor(curve.t_min, dtype=torch.float64)
    is_index = bool(curve.time_at_index(torch.zeros((), dtype=torch.float64)) == start)
    first = 0 if is_index or float(curve.sigma(start)) == 0 else -1  # the index of the first time
    return _even(points, top - first) + first


@register_timestep_grid()
def leading(
    schedule: NoiseSchedule, points: int, *, steps_offset: int = 0, lambda_min: float = -math.inf
) -> Tensor:
    """Take every (T // points)-th timestep from the first on (2305.08891, table 2).

    It never visits the last timestep. ``steps_offset`` is added to each; Stable Diffusion uses 1.
    ``lambda_min`` as in :func:`linspace`.

    >>> from alphabar.sampling import make_knots
    >>> [k.timestep for k in make_knots(NoiseSchedule.linear(), 4, "leading", steps_offset=1)]
    [751.0, 501.0, 251.0, 1.0, -1.0]
    """
    return _strided(schedule, points, _usable(schedule, lambda_min) // points, steps_offset)


def _strided(schedule: NoiseSchedule, points: int, stride: int, offset: int) -> Tensor:
    last = schedule.num_train_timesteps - 1
    index = stride * _from_the_top(points) + offset
    if float(index[0]) > last:
        raise ValueError(
            f"{points} points from timestep {offset} on, {stride} apart, go past the last timestep "
            f"{last}; "
            "lower steps_offset or the number of steps, or use 'trailing'"
        )
    require(offset >= 0, "steps_offset", "be at least 0", offset)
    return index


@register_timestep_grid()
def trailing(
    schedule: NoiseSchedule,
    points: int,
    *,
    whole_stride: bool = False,
    lambda_min: float = -math.inf,
) -> Tensor:
    """Count down from the last timestep in even strides (2305.08891, table 2).

    Sampling starts where training ends. Timesteps are integers on discrete schedules.
    ``whole_stride``: strides of T // points, as CMStochasticIterativeScheduler. ``lambda_min`` as
    in :func:`linspace`.

    >>> from alphabar.sampling import make_knots
    >>> [k.timestep for k in make_knots(NoiseSchedule.linear(), 4, "trailing")]
    [999.0, 749.0, 499.0, 249.0, -1.0]
    """
    count = schedule.num_train_timesteps
    # the stride is rounded like numpy.arange, so that rounding ties are as in diffusers
    stride = float(count // points) if whole_stride else count - (count - count / points)
    position = _usable(schedule, lambda_min) - torch.arange(points, dtype=torch.float64) * stride
    return (position.round() if schedule.curve.is_discrete else position) - 1


@register_timestep_grid()
def simple(schedule: NoiseSchedule, points: int) -> Tensor:
    """Count down from the last timestep in even strides, rounded down: ComfyUI's 'simple'.

    >>> from alphabar.sampling import make_knots
    >>> [k.timestep for k in make_knots(NoiseSchedule.linear(), 3, "simple")]
    [999.0, 666.0, 333.0, -1.0]
    """
    count = schedule.num_train_timesteps
    return count - 1 - (torch.arange(points, dtype=torch.float64) * (count / points)).floor()


@register_timestep_grid()
def normal(schedule: NoiseSchedule, points: int) -> Tensor:
    """The name of ComfyUI and A1111 for :func:`linspace`.

    On a flow path ComfyUI and A1111 shift the lower end twice; to get this, use
    ``flow(end=shift / (T + shift - 1))``.

    >>> from alphabar.sampling import make_knots
    >>> [k.timestep for k in make_knots(NoiseSchedule.linear(), 3, "normal")]
    [999.0, 499.5, 0.0, -1.0]
    """
    return _even(points, schedule.num_train_timesteps - 1)


@register_timestep_grid(drop_last=True)
def sgm_uniform(schedule: NoiseSchedule, points: int) -> Tensor:
    """Space timesteps evenly and remove the lowest (ComfyUI, A1111).

    Also in the sgm code of SDXL and SVD.

    >>> from alphabar.sampling import make_knots
    >>> [k.timestep for k in make_knots(NoiseSchedule.linear(), 3, "sgm_uniform")]
    [999.0, 666.0, 333.0, -1.0]
    """
    return _even(points, schedule.num_train_timesteps - 1)


@register_timestep_grid()
def ddim_uniform(schedule: NoiseSchedule, points: int, *, stride: int | None = None) -> Tensor:
    """Take every (T // points)-th timestep from 1 on (ComfyUI, A1111): ``leading`` with offset 1.

    If the steps do not divide T, ComfyUI takes as many as fit, more than requested. To get these,
    pass the number that fits and ``stride`` = T // the requested number.

    >>> from alphabar.sampling import make_knots
    >>> [k.timestep for k in make_knots(NoiseSchedule.linear(), 4, "ddim_uniform")]
    [751.0, 501.0, 251.0, 1.0, -1.0]
    """
    return _strided(
        schedule, points, schedule.num_train_timesteps // points if stride is None else stride, 1
    )


@register_timestep_grid()
def beta_timesteps(
    schedule: NoiseSchedule, points: int, *, alpha: float = 0.6, beta: float = 0.6
) -> Tensor:
    """Take quantiles of a Beta distribution over the timesteps, dense at both ends.

    Source: Lee et al. 2407.12173. With ``rounded=True`` it is ComfyUI's scheduler 'beta'; that of
    diffusers and A1111 is the grid ``beta``.

    >>> from alphabar.sampling import make_knots
    >>> [round(k.timestep) for k in make_knots(NoiseSchedule.linear(), 4, "beta_timesteps")]
    [999, 823, 500, 176, -1]
    """
    u = 1 - torch.arange(points, dtype=torch.float64) / points
    return (schedule.num_train_timesteps - 1) * beta_quantile(u, alpha, beta)


@register_timestep_grid()
def flow(
    schedule: NoiseSchedule,
    points: int,
    *,
    shift: float | None = None,
    mu: float | None = None,
    image_seq_len: int | None = None,
    shift_terminal: float | None = None,
    start: float = 1.0,
    end: float | None = None,
    end_shifted: bool = False,
    largest: float = 1.0,
) -> Tensor:
    """Space time evenly and shift it towards the noise: σ = s t / (1 + (s - 1) t).

    Source: Esser et al. 2403.03206, eq. 23. On a flow path σ is the noise level; on other paths it
    is the fraction of the training time.

    Args:
        shift: s, by default the schedule's own.
        mu: s = e^μ.
        image_seq_len: s = e^μ with the μ of Flux for this number of tokens, linear from 0.5 at 256
            to 1.15 at 4096.
        shift_terminal: The last σ; σ is stretched to reach it (LTX-Video).
        start, end: Time runs from ``start`` to ``end``, by default 1 / T.
        end_shifted: End at the shifted 1 / T and shift it again, as FlowMatchEuler and
            FlowMatchHeun of diffusers with a static shift. Equal to
            ``end=shift / (T + shift - 1)``.
        largest: The largest σ; α is not 0 below 1.

    Other classes of diffusers: UniPC is ``drop_last=True, largest=1 - 1e-6``. The other DPM-Solver
    classes are ``start=1 - 1 / T, end=0.0, drop_last=True``, and their times are cut:
    ``rounding="down"``.

    >>> from alphabar.sampling import make_knots
    >>> [round(k.timestep, 1) for k in make_knots(NoiseSchedule.flow(shift=3.0), 4, "flow")]
    [1000.0, 857.3, 600.7, 3.0, -1.0]
    """
    count, curve = schedule.num_train_timesteps, schedule.curve
    s = shift_of(schedule, shift, mu, image_seq_len)
    if end_shifted and end is not None:
        raise ValueError(f"end_shifted stands for an end of its own; leave out end={end:g}")
    last = s / (count + s - 1) if end_shifted else 1 / count if end is None else end
    t = torch.linspace(start, last, points, dtype=torch.float64)
    sigma = shift_noise_level(t, s)
    if shift_terminal is not None:
        fits, advice = 0 < shift_terminal < 1, "LTX-Video uses 0.1"
        require(fits, "shift_terminal", "be between 0 and 1", shift_terminal, advice)
        sigma = 1 - (1 - sigma) * (1 - shift_terminal) / (1 - sigma[-1]) if points > 1 else sigma
    sigma = sigma.clamp(max=largest)
    time = curve.time_at_noise_level(sigma) if curve.kind == "flow" else sigma
    return count * time - 1


def shift_of(
    schedule: NoiseSchedule,
    shift: float | None = None,
    mu: float | None = None,
    image_seq_len: int | None = None,
) -> float:
    """Return the shift s from at most one of the three arguments, or the schedule's own.

    It is 1 if the schedule has none.

    >>> round(math.log(shift_of(NoiseSchedule.flow(), image_seq_len=4096)), 6)
    1.15
    """
    given = [
        name
        for name, value in (("shift", shift), ("mu", mu), ("image_seq_len", image_seq_len))
        if value is not None
    ]
    if len(given) > 1:
        raise ValueError(f"give one of shift, mu and image_seq_len, got {' and '.join(given)}")
    if image_seq_len is not None:
        return token_shift(image_seq_len)
    if mu is not None:
        return math.exp(mu)
    s = float(getattr(schedule.curve, "shift", 1.0)) if shift is None else float(shift)
    require(s > 0, "shift", "be positive", f"{s:g}", "1 is no shift, SD3 uses 3")
    return s


@register_timestep_grid()
def lcm(schedule: NoiseSchedule, points: int, *, original_steps: int = 50) -> Tensor:
    """Take some of the ``original_steps`` timesteps used to distil latent consistency models.

    Source: Luo et al. 2310.04378, §4.3. LCMScheduler and TCDScheduler in diffusers.

    >>> from alphabar.sampling import make_knots
    >>> [k.timestep for k in make_knots(NoiseSchedule.scaled_linear(), 4, "lcm")]
    [999.0, 759.0, 499.0, 259.0, -1.0]
    """
    count = schedule.num_train_timesteps
    if not points <= original_steps <= count:
        raise ValueError(
            f"need steps <= original_steps <= {count}, got {points} and {original_steps}; take "
            "fewer steps or another grid"
        )
    taught = (
        torch.arange(original_steps, 0, -1, dtype=torch.float64) * (count // original_steps) - 1
    )
    return taught[
        (torch.arange(points, dtype=torch.float64) * (original_steps / points)).floor().long()
    ]


@register_timestep_grid()
def sine_squared(schedule: NoiseSchedule, points: int) -> Tensor:
    """Set σ = sin²(π u / 2) with even u on a variance preserving path.

    v-diffusion; IPNDMScheduler in diffusers. It is made for the cosine schedule, with σ = sin(π t /
    2). On others the fraction t of the time is the same.

    >>> from alphabar.sampling import make_knots
    >>> [round(k.sigma, 4) for k in make_knots(NoiseSchedule.cosine(), 3, "sine_squared")]
    [1.0, 0.75, 0.25, 0.0]
    """
    u = torch.arange(points, 0, -1, dtype=torch.float64) / points
    t = torch.asin(torch.sin(0.5 * math.pi * u) ** 2) * (2 / math.pi)
    first = schedule.curve.sigma(torch.tensor(schedule.curve.t_min, dtype=torch.float64))
    low = -1 if float(first) == 0 else 0  # the index of t = 0
    return low + (schedule.num_train_timesteps - 1 - low) * t
