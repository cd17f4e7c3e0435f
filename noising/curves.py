"""Curves: how signal and noise mix along time, x_t = α(t) x_0 + σ(t) ε.

A curve is neither a grid, nor a density, nor a state: it is the two functions α and σ, with what follows from them,

    SNR = α² / σ²,    λ = log SNR,    σ_ve = σ / α,    and the inverse t(λ).

Curves are frozen values of plain floats: they have no device and no dtype, and compare and hash by their numbers.
Evaluation follows ``t``: its device, and its dtype where that is float32 or float64; integers and half precision are
evaluated in float32, so σ is never rounded to 0. Tables are computed once in float64 and cached per device and dtype,
so that an evaluation makes no host sync after the first.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from functools import lru_cache
from typing import Any, ClassVar

import torch
from torch import Tensor

from .registry import lookup


@dataclass(frozen=True)
class Curve(ABC):
    """The path x_t = α(t) x_0 + σ(t) ε, with time running from data (``t_min``) to noise (``t_max``).

    >>> curve = Flow()
    >>> t = torch.tensor([0.25, 0.5])
    >>> curve.alpha(t), curve.sigma(t)
    (tensor([0.7500, 0.5000]), tensor([0.2500, 0.5000]))
    """

    kind: ClassVar[str]
    is_discrete: ClassVar[bool] = False
    num_train_timesteps: int = 1000

    @property
    def t_min(self) -> float:
        """The time of the least noise."""
        return 0.0

    @property
    def t_max(self) -> float:
        """The time of the most noise."""
        return 1.0

    @abstractmethod
    def alpha(self, t: Tensor) -> Tensor:
        """Return the signal level α(t)."""

    @abstractmethod
    def sigma(self, t: Tensor) -> Tensor:
        """Return the noise level σ(t)."""

    @abstractmethod
    def time(self, log_snr: Tensor) -> Tensor:
        """Return the time at which log SNR has this value: the inverse of :meth:`log_snr`."""

    def log_snr(self, t: Tensor) -> Tensor:
        """Return λ(t) = log(α² / σ²), infinite where one of them is 0."""
        return 2 * (self.alpha(t).log() - self.sigma(t).log())

    def snr(self, t: Tensor) -> Tensor:
        """Return the signal-to-noise ratio α² / σ²."""
        return (self.alpha(t) / self.sigma(t)) ** 2

    def sigma_ve(self, t: Tensor) -> Tensor:
        """Return σ / α, the noise level in variance exploding coordinates; infinite where α is 0."""
        return self.sigma(t) / self.alpha(t)

    def noise_level(self, t: Tensor) -> Tensor:
        """Return the noise level in which σ-spaced grids (karras, exponential, ...) are spaced: σ / α, or σ on a flow path."""
        return self.sigma_ve(t)

    def time_at_noise_level(self, level: Tensor) -> Tensor:
        """Return the inverse of :meth:`noise_level`."""
        return self.time(-2 * level.log())

    def timestep(self, t: Tensor) -> Tensor:
        """Return what the network is given as time: an index for discrete curves, 0 ... num_train_timesteps otherwise."""
        return self.num_train_timesteps * t

    def time_at_index(self, index: Tensor) -> Tensor:
        """Return the time of a (fractional) training index 0 ... num_train_timesteps - 1; the last is ``t_max``."""
        return self.t_min + (self.t_max - self.t_min) * (index + 1) / self.num_train_timesteps

    def time_at_quantile(self, u: Tensor) -> Tensor:
        """Return the training time of u in (0, 1]; u -> 1 is noise, always."""
        return self.t_min + (self.t_max - self.t_min) * u

    def zero_terminal_snr(self) -> Curve:
        """Return this curve with α(t_max) = 0 exactly."""
        if float(self.alpha(torch.tensor(self.t_max, dtype=torch.float64))) == 0.0:
            return self
        raise ValueError(
            f"a {self.kind} curve cannot be rescaled to zero terminal SNR; rescale a discrete one, or use a flow"
        )

    def to_config(self) -> dict[str, Any]:
        """Return plain JSON from which :func:`curve_from_config` makes an equal curve."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return {"kind": self.kind} | {k: list(v) if isinstance(v, tuple) else v for k, v in values.items()}


def evaluation_dtype(t: Tensor) -> torch.dtype:
    """Return the dtype in which a curve is evaluated at ``t``.

    >>> evaluation_dtype(torch.zeros(1, dtype=torch.bfloat16)), evaluation_dtype(torch.zeros(1, dtype=torch.float64))
    (torch.float32, torch.float64)
    """
    return torch.float64 if t.dtype == torch.float64 else torch.float32


# -- discrete curves: T betas --------------------------------------------------------------------------------------------


def _linear(n: int, start: float, end: float) -> Tensor:
    return torch.linspace(start, end, n, dtype=torch.float64)


def _scaled_linear(n: int, start: float, end: float) -> Tensor:
    return torch.linspace(start**0.5, end**0.5, n, dtype=torch.float64) ** 2


def _squaredcos_cap_v2(n: int, start: float, end: float) -> Tensor:
    # Nichol & Dhariwal 2102.09672, eq. 17: ᾱ(t) = cos²((t + 0.008) / 1.008 π/2), with betas capped at 0.999
    t = torch.arange(n + 1, dtype=torch.float64) / n
    alpha_bar = torch.cos((t + 0.008) / 1.008 * math.pi / 2) ** 2
    return (1 - alpha_bar[1:] / alpha_bar[:-1]).clamp(max=0.999)


BETA_SCHEDULES: Mapping[str, Callable[[int, float, float], Tensor]] = {
    "linear": _linear,
    "scaled_linear": _scaled_linear,
    "squaredcos_cap_v2": _squaredcos_cap_v2,
}
"""Every beta schedule by the name that diffusers gives it: (T, beta_start, beta_end) -> T betas in float64."""

TRAINED = "trained_betas"  # the name of a schedule whose betas are given one by one


@dataclass(frozen=True)
class Discrete(Curve):
    """T training timesteps with betas: α_t² = ᾱ_t = Π (1 - β_i), σ_t² = 1 - ᾱ_t (Ho et al. 2006.11239, eq. 4).

    Times are indices 0 ... T - 1. Between them log SNR is piecewise linear; in an interval that ends in zero SNR, α is.
    With ``rescale_betas_zero_snr`` α is shifted and scaled so that α at T - 1 is exactly 0 and the first is kept
    (Lin et al. 2305.08891, algorithm 1).

    >>> curve = Discrete("scaled_linear", 0.00085, 0.012)
    >>> curve.sigma_ve(torch.tensor([0, 999]))
    tensor([ 0.0292, 14.6146])
    >>> curve.zero_terminal_snr().alpha(torch.tensor(999)).item()
    0.0
    """

    kind: ClassVar[str] = "discrete"
    is_discrete: ClassVar[bool] = True
    # the fields stand in the order in which people write them; the base class's comes by keyword
    beta_schedule: str = "scaled_linear"
    beta_start: float = 0.00085
    beta_end: float = 0.012
    num_train_timesteps: int = 1000
    trained_betas: tuple[float, ...] | None = None
    rescale_betas_zero_snr: bool = False

    def __init__(
        self,
        beta_schedule: str = "scaled_linear",
        beta_start: float = 0.00085,
        beta_end: float = 0.012,
        num_train_timesteps: int = 1000,
        trained_betas: Any = None,
        rescale_betas_zero_snr: bool = False,
    ) -> None:
        if trained_betas is not None:
            trained_betas = tuple(float(b) for b in trained_betas)
            beta_schedule, num_train_timesteps = TRAINED, len(trained_betas)
            beta_start, beta_end = (trained_betas[0], trained_betas[-1]) if trained_betas else (0.0, 0.0)
        else:
            lookup("beta schedule", beta_schedule, BETA_SCHEDULES)
        values = {
            "beta_schedule": beta_schedule,
            "beta_start": float(beta_start),
            "beta_end": float(beta_end),
            "num_train_timesteps": int(num_train_timesteps),
            "trained_betas": trained_betas,
            "rescale_betas_zero_snr": bool(rescale_betas_zero_snr),
        }
        for name, value in values.items():
            object.__setattr__(self, name, value)
        if self.num_train_timesteps < 2:
            raise ValueError(f"num_train_timesteps must be at least 2, got {num_train_timesteps}")
        bad = [(i, b) for i, b in enumerate(self.betas().tolist()) if not 0 < b <= 1]
        if bad:
            raise ValueError(
                f"betas must lie in (0, 1], got {bad[0][1]} at index {bad[0][0]}; check beta_start and beta_end"
            )
        if 1.0 in self.betas()[:-1].tolist():
            raise ValueError(
                "only the last beta may be 1 (zero terminal SNR); an earlier one leaves pure noise ever after"
            )

    def betas(self) -> Tensor:
        """Return the T betas as given, before any rescaling (float64, on the CPU)."""
        if self.trained_betas is not None:
            return torch.tensor(self.trained_betas, dtype=torch.float64)
        return BETA_SCHEDULES[self.beta_schedule](self.num_train_timesteps, self.beta_start, self.beta_end)

    @property
    def t_max(self) -> float:
        return float(self.num_train_timesteps - 1)

    def alpha(self, t: Tensor) -> Tensor:
        return self._evaluate(t)[0]

    def sigma(self, t: Tensor) -> Tensor:
        return self._evaluate(t)[1]

    def _evaluate(self, t: Tensor) -> tuple[Tensor, Tensor]:
        check_times(self, t)
        table = _table(self, t.device, evaluation_dtype(t))
        if not t.is_floating_point():
            index = t.long()
            return table.alpha[index], table.sigma[index]
        t = t.to(table.alpha.dtype)
        k = t.floor().clamp(0, self.num_train_timesteps - 2).long()
        f = t - k
        # λ is linear inside an interval; the substitute for an infinite λ keeps the branch that is not taken finite
        half = 0.5 * (table.log_snr[k] + f * (table.log_snr[k + 1] - table.log_snr[k]))
        alpha, sigma = torch.rsqrt(1 + torch.exp(-2 * half)), torch.rsqrt(1 + torch.exp(2 * half))
        to_zero = table.alpha[k + 1] == 0
        alpha = torch.where(to_zero, (1 - f) * table.alpha[k], alpha)
        sigma = torch.where(to_zero, (1 - alpha**2).sqrt(), sigma)
        nearest = t.round().long().clamp(0, self.num_train_timesteps - 1)
        on_table = t == nearest
        return torch.where(on_table, table.alpha[nearest], alpha), torch.where(on_table, table.sigma[nearest], sigma)

    def time(self, log_snr: Tensor) -> Tensor:
        table = _table(self, log_snr.device, evaluation_dtype(log_snr))
        value = log_snr.to(table.alpha.dtype)
        descending = table.log_snr
        k = (torch.searchsorted(-descending, -value.contiguous(), right=True) - 1).clamp(
            0, self.num_train_timesteps - 2
        )
        f = ((descending[k] - value) / (descending[k] - descending[k + 1])).clamp(0, 1)
        to_zero = table.alpha[k + 1] == 0
        alpha = torch.rsqrt(1 + torch.exp(-value))
        f = torch.where(to_zero, (1 - alpha / table.alpha[k]).clamp(0, 1), f)
        return k + f

    def timestep(self, t: Tensor) -> Tensor:
        return t

    def time_at_index(self, index: Tensor) -> Tensor:
        return index

    def time_at_quantile(self, u: Tensor) -> Tensor:
        return (u * self.num_train_timesteps).ceil().long().sub(1).clamp(0, self.num_train_timesteps - 1)

    def zero_terminal_snr(self) -> Discrete:
        return replace(self, rescale_betas_zero_snr=True) if float(_table_f64(self).alpha[-1]) else self


@dataclass(frozen=True)
class _Table:
    alpha: Tensor
    sigma: Tensor
    log_snr: Tensor  # finite: an infinite last value is replaced by a finite one below all others


@lru_cache(maxsize=64)
def _table_f64(curve: Discrete) -> _Table:
    log_alpha_bar = torch.cumsum(torch.log1p(-curve.betas()), 0)  # never 1 - ᾱ, which cancels near t = 0
    alpha, sigma = torch.exp(0.5 * log_alpha_bar), torch.sqrt(-torch.expm1(log_alpha_bar))
    if curve.rescale_betas_zero_snr and float(alpha[-1]) > 0:
        # algorithm 1: α' = (α - α_T) α_0 / (α_0 - α_T); 1 - α'² is formed from 1 - α', again without cancellation
        scale = alpha[0] / (alpha[0] - alpha[-1])
        rescaled = (alpha - alpha[-1]) * scale
        one_minus = sigma[0] ** 2 / (1 + alpha[0]) + (alpha[0] - alpha) * scale
        alpha, sigma = rescaled, torch.sqrt(one_minus * (1 + rescaled))
    log_snr = 2 * (alpha.log() - sigma.log())
    if float(alpha[-1]) == 0:
        sigma[-1] = 1.0  # where rounding had left 1 - 1e-16
        log_snr[-1] = log_snr[-2] - 2 * math.log(2) - 60.0
    return _Table(alpha, sigma, log_snr)


@lru_cache(maxsize=64)
def _table(curve: Discrete, device: torch.device, dtype: torch.dtype) -> _Table:
    master = _table_f64(curve)
    return _Table(*(column.to(device, dtype) for column in (master.alpha, master.sigma, master.log_snr)))


def check_times(curve: Curve, t: Tensor) -> None:
    """Refuse times outside the curve. Only times on the CPU are looked at: on a GPU the look would be a host sync.

    >>> check_times(Flow(), torch.tensor([1.5]))
    Traceback (most recent call last):
    ValueError: time 1.5 is outside 0.0 ... 1.0 of this flow schedule
    """
    if t.device.type != "cpu" or not t.numel():
        return
    low, high = float(t.min()), float(t.max())
    if not (low >= curve.t_min and high <= curve.t_max):  # also catches NaN
        bad = low if not low >= curve.t_min else high
        raise ValueError(f"time {bad} is outside {curve.t_min} ... {curve.t_max} of this {curve.kind} schedule")


# -- continuous curves ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Flow(Curve):
    """Rectified flow: x_t = (1 - σ) x_0 + σ ε with σ = s t / (1 + (s - 1) t) and t in [0, 1] (Esser et al. 2403.03206, §5.3).

    The network is given num_train_timesteps · σ, as diffusers does for SD3 and Flux.

    >>> Flow(shift=3.0).sigma(torch.tensor([0.0, 0.5, 1.0]))
    tensor([0.0000, 0.7500, 1.0000])
    """

    kind: ClassVar[str] = "flow"
    shift: float = 1.0

    def __post_init__(self) -> None:
        if not self.shift > 0:
            raise ValueError(f"shift must be positive, got {self.shift}; 1 is no shift, SD3 uses 3")

    def alpha(self, t: Tensor) -> Tensor:
        check_times(self, t)
        t = t.to(evaluation_dtype(t))
        return (1 - t) / (1 + (self.shift - 1) * t)

    def sigma(self, t: Tensor) -> Tensor:
        check_times(self, t)
        t = t.to(evaluation_dtype(t))
        return self.shift * t / (1 + (self.shift - 1) * t)

    def time(self, log_snr: Tensor) -> Tensor:
        return self.time_at_noise_level(torch.sigmoid(-0.5 * log_snr.to(evaluation_dtype(log_snr))))

    def noise_level(self, t: Tensor) -> Tensor:
        return self.sigma(t)

    def time_at_noise_level(self, level: Tensor) -> Tensor:
        return level / (self.shift - (self.shift - 1) * level)

    def timestep(self, t: Tensor) -> Tensor:
        return self.num_train_timesteps * self.sigma(t)


CURVES: Mapping[str, type[Curve]] = {kind.kind: kind for kind in (Discrete, Flow)}
"""Every kind of curve by its name; a new one is a class above and a word in this line."""


def curve_from_config(config: Mapping[str, Any]) -> Curve:
    """Return the curve of a config made by :meth:`Curve.to_config`.

    Raises ValueError for an unknown kind or key.

    >>> curve_from_config({"kind": "flow", "shift": 3.0})
    Flow(num_train_timesteps=1000, shift=3.0)
    """
    values = dict(config)
    kind = lookup("curve", values.pop("kind", None), CURVES)
    for key in values:
        lookup(f"setting of a {kind.kind} curve", key, {field.name: field for field in fields(kind)})
    return kind(**values)
