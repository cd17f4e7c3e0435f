"""A part of a curve, for an expert or a refiner that is trained on some of the times only."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from .base import Curve, check_times
from .continuous import Karras

SHORTEST = 1e-6  # share of the whole curve: float32 cannot distinguish the times of a shorter part


@dataclass(frozen=True, kw_only=True)
class Truncated(Curve):
    """The part of ``curve`` from time ``first`` (least noise) to ``last`` (most noise), inclusive.

    Every time has the same α, σ and network time as on the whole curve. Relative quantities refer
    to the part: densities and training indices run over the part, and ``num_train_timesteps`` of a
    discrete curve counts the timesteps inside. On discrete curves ``first`` and ``last`` are whole
    numbers.

    Raises ValueError for times outside the curve, for a part without length, and for an EDM curve
    (change its sigma_min and sigma_max instead).

    >>> import torch
    >>> from alphabar.noising import Discrete
    >>> refiner = Truncated(Discrete(), 0, 199)
    >>> (
    ...     refiner.num_train_timesteps,
    ...     refiner.t_max,
    ...     refiner.sigma(torch.tensor(199)) == Discrete().sigma(torch.tensor(199)),
    ... )
    (200, 199.0, tensor(True))
    """

    kind: ClassVar[str] = "truncated"
    curve: Curve
    first: float
    last: float

    def __init__(self, curve: Curve, first: float, last: float) -> None:
        if isinstance(curve, Karras):
            raise ValueError(
                "a karras curve has no part but another range of its own: give it sigma_min and "
                "sigma_max"
            )
        if isinstance(curve, Truncated):  # flatten a part of a part
            _require_inside(curve, first, last)
            curve = curve.curve
        _require_inside(curve, first, last)
        count = round(last - first) + 1 if curve.is_discrete else curve.num_train_timesteps
        values = {
            "curve": curve,
            "first": float(first),
            "last": float(last),
            "num_train_timesteps": count,
        }
        for name, value in values.items():
            object.__setattr__(self, name, value)

    @property
    def is_discrete(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.curve.is_discrete

    @property
    def is_flow(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.curve.is_flow

    @property
    def t_min(self) -> float:
        return self.first

    @property
    def t_max(self) -> float:
        return self.last

    def alpha(self, t: Tensor) -> Tensor:
        check_times(self, t)
        return self.curve.alpha(t)

    def sigma(self, t: Tensor) -> Tensor:
        check_times(self, t)
        return self.curve.sigma(t)

    def alpha_sigma(self, t: Tensor) -> tuple[Tensor, Tensor]:
        check_times(self, t)
        return self.curve.alpha_sigma(t)

    def time(self, log_snr: Tensor) -> Tensor:
        return self.curve.time(log_snr).clamp(self.first, self.last)

    def grid_coordinate(self, alpha: Tensor, sigma: Tensor) -> Tensor:
        return self.curve.grid_coordinate(alpha, sigma)

    def time_at_noise_level(self, level: Tensor) -> Tensor:
        return self.curve.time_at_noise_level(level).clamp(self.first, self.last)

    def timestep(self, t: Tensor) -> Tensor:
        return self.curve.timestep(t)

    def alpha_sigma_at(self, log_snr: Tensor) -> tuple[Tensor, Tensor]:
        return self.curve.alpha_sigma_at(log_snr)

    def fraction(self, t: Tensor) -> Tensor:
        return self.curve.fraction(t)

    def input_scale(self, t: Tensor) -> Tensor:
        return self.curve.input_scale(t)

    @property
    def scales_input(self) -> bool:
        return self.curve.scales_input

    def time_at_index(self, index: Tensor) -> Tensor:
        return (
            index + int(self.first)
            if self.is_discrete
            else self._part(self.curve.time_at_index(index))
        )

    def time_at_quantile(self, u: Tensor) -> Tensor:
        if self.is_discrete:
            count = self.num_train_timesteps
            return (u * count).ceil().long().sub(1).clamp(0, count - 1) + int(self.first)
        return self._part(self.curve.time_at_quantile(u))

    def _part(self, t: Tensor) -> Tensor:
        """Map times of the whole curve linearly to the part."""
        low, high = self.curve.t_min, self.curve.t_max
        u = (t - low) / (high - low)
        return ((1 - u) * self.first + u * self.last).clamp(self.first, self.last)

    def zero_terminal_snr(self) -> Curve:
        if self.last < self.curve.t_max:
            raise ValueError(
                f"this curve was truncated at t = {self.last:g}, before the end at "
                f"{self.curve.t_max:g}, and has no terminal time "
                "to rescale; call zero_terminal_snr() before truncated()"
            )
        return Truncated(self.curve.zero_terminal_snr(), self.first, self.last)

    def shifted(self, factor: float) -> Curve:
        return Truncated(self.curve.shifted(factor), self.first, self.last)

    def to_config(self) -> dict[str, Any]:
        return {
            "kind": self.kind,
            "curve": self.curve.to_config(),
            "first": self.first,
            "last": self.last,
        }


def _require_inside(curve: Curve, first: float, last: float) -> None:
    if not curve.t_min <= first < last <= curve.t_max:  # also catches NaN
        raise ValueError(
            f"a part of this {curve.kind} schedule needs {curve.t_min:g} <= first < last <= "
            f"{curve.t_max:g}, got {first:g} and {last:g}"
        )
    if last - first < SHORTEST * (curve.t_max - curve.t_min):
        raise ValueError(
            f"a part of this {curve.kind} schedule from {first} to {last} is too short for any step"
        )
    if curve.is_discrete and (math.floor(first) != first or math.floor(last) != last):
        raise ValueError(
            f"a part of a discrete schedule begins and ends at whole timesteps, got {first:g} and "
            f"{last:g}"
        )


def inward_time(curve: Curve, time: Tensor, least: bool) -> float:
    """Return a time as an end of a part: on a discrete curve the next timestep inside the part.

    ``least``: it is the end with the least noise.

    >>> import torch
    >>> from alphabar.noising import Discrete
    >>> [inward_time(Discrete(), torch.tensor(9.5), least) for least in (True, False)]
    [10.0, 9.0]
    """
    value = float(time)
    if not curve.is_discrete:
        return value
    # a level of the table maps to its own timestep
    near = abs(value - round(value)) < 1e-9
    return float(round(value) if near else math.ceil(value) if least else math.floor(value))


def times_at_levels(
    curve: Curve, low: float | None = None, high: float | None = None
) -> tuple[float, float]:
    """Return the times at which a curve has the noise levels ``low`` and ``high``.

    A noise level is σ after any shift on a flow, σ / α on other curves; None is the curve's own
    end. Raises ValueError for levels that the curve does not have.

    >>> from alphabar.noising import Flow
    >>> times_at_levels(Flow(shift=3.0), 0.75, 1.0)
    (0.5, 1.0)
    """
    ends = curve.noise_level(torch.tensor([curve.t_min, curve.t_max], dtype=torch.float64)).tolist()
    low, high = ends[0] if low is None else low, ends[1] if high is None else high
    slack = 1e-6 * ends[1] if math.isfinite(ends[1]) else 0.0
    if not ends[0] - slack <= low < high <= ends[1] + slack:  # also catches NaN
        raise ValueError(
            f"noise levels of this {curve.kind} schedule need {ends[0]:g} <= low < high <= "
            f"{ends[1]:g}, got {low:g} and {high:g}; they are σ after the shift on a flow (a "
            "timestep of the network over 1000), σ / α on other curves"
        )
    levels = torch.tensor([low, high], dtype=torch.float64).clamp(*ends)
    first, last = curve.time_at_noise_level(levels).clamp(curve.t_min, curve.t_max)
    return inward_time(curve, first, True), inward_time(curve, last, False)


def truncate(curve: Curve, first: float, last: float) -> Curve:
    """Return the part of a curve from the time ``first`` to ``last``.

    For an EDM curve, whose time is σ, return an EDM curve with another range of σ.

    >>> from alphabar.noising import Flow, Karras
    >>> truncate(Karras(), 0.5, 80.0).sigma_min, truncate(Flow(), 0.0, 1.0)
    (0.5, Flow(num_train_timesteps=1000, shift=1.0))
    """
    if (first, last) == (curve.t_min, curve.t_max):
        return curve
    if isinstance(curve, Karras):
        _require_inside(curve, first, last)
        return replace(curve, sigma_min=first, sigma_max=last)
    return Truncated(curve, first, last)
