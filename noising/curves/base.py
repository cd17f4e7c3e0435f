"""Curves: signal level and noise level over time, x_t = α(t) x_0 + σ(t) ε.

A curve is neither a grid nor a density nor a state. It is the two functions α and σ, and the
functions that follow from them,

    SNR = α² / σ²,    λ = log SNR,    σ_ve = σ / α,    and the inverse t(λ).

Curves are frozen values of plain floats: they have no device and no dtype, and compare and hash by
their numbers. Evaluation uses the device of ``t``, and its dtype if that is float32 or float64.
Integers and half precision are evaluated in float32, so σ is never rounded to 0. Tables are
computed once in float64 and cached per device and dtype, so evaluations make no host sync after the
first.

Terms for time and noise, used throughout:

    t            time of a curve: timestep 0 ... T - 1 (discrete), 0 ... 1 (flow), σ (EDM)
    timestep     time input of the network
    index        position 0 ... T - 1 among the training timesteps, fractions allowed
    quantile     share of the training samples with less noise, under uniform times
    fraction     share of training time, 0 clean, 1 noise: t / T, σ on a flow path
    alpha, sigma factors of signal and noise, x_t = α x_0 + σ ε
    sigma_ve     σ / α, the noise level of the Euler family and of k-diffusion
    log_snr      λ = log(α² / σ²)
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, field, fields
from functools import lru_cache
from typing import Any, ClassVar, cast

import numpy as np
import torch
from torch import Tensor

from ..utils.registry import Registry, shown

MAX_TIMESTEPS = 1_000_000  # limit of training timesteps; tables have one entry for each
MAX_LEVEL = 1e12  # limit of σ and of a shift: float32 holds its square, and the remaining α
LEAST_ALPHA = 1e-30  # float32 holds it; only 0 (pure noise at the last time) is smaller


@dataclass(frozen=True)
class Curve(ABC):
    """The path x_t = α(t) x_0 + σ(t) ε; time runs from data (``t_min``) to noise (``t_max``).

    >>> from alphabar.noising import Flow
    >>> curve = Flow()
    >>> t = torch.tensor([0.25, 0.5])
    >>> curve.alpha(t), curve.sigma(t)
    (tensor([0.7500, 0.5000]), tensor([0.2500, 0.5000]))
    """

    kind: ClassVar[str]
    is_discrete: ClassVar[bool] = False
    is_flow: ClassVar[bool] = False  # a straight path, α + σ = 1, whose noise level is σ itself
    num_train_timesteps: int = field(default=1000, kw_only=True)

    @property
    def t_min(self) -> float:
        """The time with the least noise."""
        return 0.0

    @property
    def t_max(self) -> float:
        """The time with the most noise."""
        return 1.0

    @abstractmethod
    def alpha(self, t: Tensor) -> Tensor:
        """Return the signal level α(t)."""

    @abstractmethod
    def sigma(self, t: Tensor) -> Tensor:
        """Return the noise level σ(t)."""

    def alpha_sigma(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """Return (α(t), σ(t)); in one evaluation, where they share one."""
        return self.alpha(t), self.sigma(t)

    @abstractmethod
    def time(self, log_snr: Tensor) -> Tensor:
        """Return the time of this log SNR: the inverse of :meth:`log_snr`."""

    def log_snr(self, t: Tensor) -> Tensor:
        """Return λ(t) = log(α² / σ²), infinite if α or σ is 0."""
        return 2 * (self.alpha(t).log() - self.sigma(t).log())

    def snr(self, t: Tensor) -> Tensor:
        """Return the signal-to-noise ratio α² / σ²."""
        return (self.alpha(t) / self.sigma(t)) ** 2

    def sigma_ve(self, t: Tensor) -> Tensor:
        """Return σ / α, the variance exploding noise level; infinite if α is 0."""
        alpha, sigma = self.alpha_sigma(t)
        return sigma / alpha

    def grid_coordinate(self, alpha: Tensor, sigma: Tensor) -> Tensor:
        """Return the noise level that σ-spaced grids (karras, exponential, ...) use.

        It is σ / α, or σ on a flow path.
        """
        return sigma / alpha

    def noise_level(self, t: Tensor) -> Tensor:
        """Return the level of :meth:`grid_coordinate` at a time."""
        return self.grid_coordinate(*self.alpha_sigma(t))

    def time_at_noise_level(self, level: Tensor) -> Tensor:
        """Return the inverse of :meth:`noise_level`."""
        return self.time(-2 * level.log())

    def timestep(self, t: Tensor) -> Tensor:
        """Return the time input of the network.

        It is an index for discrete curves, 0 ... num_train_timesteps otherwise.
        """
        return self.num_train_timesteps * t

    def fraction(self, t: Tensor) -> Tensor:
        """Return the fraction of training time, 0 (data) ... 1 (noise).

        It is the network's time over num_train_timesteps.
        """
        return self.timestep(t) / self.num_train_timesteps

    def alpha_sigma_at(self, log_snr: Tensor) -> tuple[Tensor, Tensor]:
        """Return (α, σ) of the path at a log SNR, also past the ends of its time.

        The path is variance preserving unless overridden.
        """
        return torch.sigmoid(log_snr).sqrt(), torch.sigmoid(-log_snr).sqrt()

    def input_scale(self, t: Tensor) -> Tensor:
        """Return the factor of x_t in the network's input: 1, except for EDM's c_in."""
        return torch.ones_like(t, dtype=evaluation_dtype(t))

    @property
    def scales_input(self) -> bool:
        """Whether the network input is x_t times a factor, not x_t itself."""
        return type(self).input_scale is not Curve.input_scale

    def time_at_index(self, index: Tensor) -> Tensor:
        """Return the time of a (fractional) training index 0 ... num_train_timesteps - 1.

        The last index gives ``t_max``.
        """
        return self.t_min + (self.t_max - self.t_min) * (index + 1) / self.num_train_timesteps

    def time_at_quantile(self, u: Tensor) -> Tensor:
        """Return the training time of u in (0, 1]; on every curve u -> 1 is noise."""
        return self.t_min + (self.t_max - self.t_min) * u

    def zero_terminal_snr(self) -> Curve:
        """Return this curve with α(t_max) = 0 exactly."""
        if float(self.alpha(torch.tensor(self.t_max, dtype=torch.float64))) == 0.0:
            return self
        raise ValueError(
            f"a {self.kind} curve cannot be rescaled to zero terminal SNR; rescale a discrete one, "
            "or use a flow"
        )

    @abstractmethod
    def shifted(self, factor: float) -> Curve:
        """Return this curve with σ / α multiplied by ``factor`` at every time, on the same path.

        λ decreases by 2 log factor.
        """

    def to_config(self) -> dict[str, Any]:
        """Return plain JSON; ``curves.curve_from_config`` makes an equal curve from it."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return {"kind": self.kind} | {
            k: list(v) if isinstance(v, tuple) else v for k, v in values.items()
        }


CURVES: Registry[type[Curve]] = Registry("curve", attribute="kind")
"""The kinds of curve by name; decorate a class with ``@CURVES.register`` to add one."""


@lru_cache(maxsize=64)
def float32_range(curve: Curve) -> tuple[float, float]:
    """Return the least and the largest float32 inside the range of a curve.

    >>> from alphabar.noising import Flow
    >>> float32_range(Flow())
    (0.0, 1.0)
    """
    exact, inward = (curve.t_min, curve.t_max), (math.inf, -math.inf)
    low, high = (np.float32(end) for end in exact)
    if float(low) < exact[0]:
        low = np.nextafter(low, np.float32(inward[0]))
    if float(high) > exact[1]:
        high = np.nextafter(high, np.float32(inward[1]))
    return float(low), float(high)


def evaluation_dtype(t: Tensor) -> torch.dtype:
    """Return the dtype in which a curve is evaluated at ``t``.

    >>> (
    ...     evaluation_dtype(torch.zeros(1, dtype=torch.bfloat16)),
    ...     evaluation_dtype(torch.zeros(1, dtype=torch.float64)),
    ... )
    (torch.float32, torch.float64)
    """
    return torch.float64 if t.dtype == torch.float64 else torch.float32


def require_factor(name: str, value: float, advice: str = "1 changes nothing") -> float:
    """Return a factor as a float; it must be positive and finite, in 1e-12 ... 1e12.

    Raises ValueError for any other value.

    >>> require_factor("factor", 0)
    Traceback (most recent call last):
    ValueError: factor must be positive and finite, got 0; 1 changes nothing
    """
    if not 0 < value < math.inf:
        raise ValueError(f"{name} must be positive and finite, got {shown(value)}; {advice}")
    if not 1 / MAX_LEVEL <= value <= MAX_LEVEL:
        raise ValueError(
            f"{name} must lie between {1 / MAX_LEVEL:g} and {MAX_LEVEL:g}, got {shown(value)}: "
            "float32 holds no such levels"
        )
    return float(value)


def may_look_at(values: Tensor) -> bool:
    """Return whether a check may read these values.

    It may on the CPU, outside torch.compile, torch.export and the transforms of torch.func. On a
    GPU the read would be a host sync, in a traced function it would break the graph, and under vmap
    it is an error. False for an empty tensor.

    >>> may_look_at(torch.zeros(1)), may_look_at(torch.zeros(0))
    (True, False)
    """
    return values.device.type == "cpu" and bool(values.numel()) and not is_traced(values)


def is_traced(values: Tensor) -> bool:
    """Return whether torch.compile, torch.export or a transform of torch.func sees this tensor.

    >>> is_traced(torch.zeros(1)), torch.vmap(lambda x: x + is_traced(x))(torch.zeros(1))
    (False, tensor([1.]))
    """
    compiling = torch.compiler.is_compiling()
    return compiling or cast(Any, torch._C)._functorch.is_functorch_wrapped_tensor(values)


def require_range(sigma_min: float, sigma_max: float) -> None:
    """Raise ValueError for an empty range of σ, and for σ whose squares float32 cannot hold.

    >>> require_range(0.002, 1e30)
    Traceback (most recent call last):
    ValueError: need 1e-12 <= sigma_min < sigma_max <= 1e+12, got 0.002 and 1e+30
    """
    if not 1 / MAX_LEVEL <= sigma_min < sigma_max * (1 - 1e-6) or not sigma_max <= MAX_LEVEL:
        raise ValueError(
            f"need {1 / MAX_LEVEL:g} <= sigma_min < sigma_max <= {MAX_LEVEL:g}, got "
            f"{shown(sigma_min)} and {shown(sigma_max)}"
        )


def require_count(count: int, least: int = 1) -> int:
    """Return a number of training timesteps; raise ValueError for an invalid one.

    >>> require_count(10**12)
    Traceback (most recent call last):
    ValueError: num_train_timesteps must be at most 1000000, got 1000000000000; 1000 is usual
    """
    if isinstance(count, float) and not math.isfinite(count):
        raise ValueError(f"num_train_timesteps must be a whole number, got {count}; 1000 is usual")
    if int(count) < least:
        raise ValueError(f"num_train_timesteps must be at least {least}, got {shown(count)}")
    if int(count) > MAX_TIMESTEPS:
        raise ValueError(
            f"num_train_timesteps must be at most {MAX_TIMESTEPS}, got {shown(count)}; 1000 is "
            "usual"
        )
    return int(count)


def check_times(curve: Curve, t: Tensor) -> None:
    """Raise ValueError for times outside the curve, if :func:`may_look_at` permits a check.

    >>> from alphabar.noising import Flow
    >>> check_times(Flow(), torch.tensor([1.5]))
    Traceback (most recent call last):
    ValueError: time 1.5 is outside 0.0 ... 1.0 of this flow schedule
    """
    if not may_look_at(t):
        return
    low, high = float(t.min()), float(t.max())
    if not (low >= curve.t_min and high <= curve.t_max):  # also catches NaN
        bad = low if not low >= curve.t_min else high
        raise ValueError(
            f"time {bad} is outside {curve.t_min} ... {curve.t_max} of this {curve.kind} schedule"
        )
