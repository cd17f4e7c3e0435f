"""EMA profiles: the share of the old average that each optimizer step keeps.

An exponential moving average is \\hat θ(t) = β(t) \\hat θ(t-1) + (1 - β(t)) θ(t), with optimizer
steps t = 1, 2, ... A profile is the function β. The profile of a power function (Karras et al.
2312.02696, "EDM2", eq. 1 to 3) weights the weights at time τ by τ^γ:

    \\hat θ_γ(t) = (γ + 1) / t^(γ+1) ∫_0^t τ^γ θ(τ) dτ,
    β_γ(t) = (1 - 1/t)^(γ+1),    σ_rel = ((γ+1) / ((γ+2)² (γ+3)))^½.

Its length σ_rel is the standard deviation of that density, as a share of the training. So the
length does not depend on the number of training steps, and the first weights are forgotten.
Snapshots of such averages can be combined to other averages: see posthoc.py.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from numbers import Real
from typing import Any, ClassVar

import numpy as np

from ...noising.utils.items import make_item
from ...noising.utils.registry import Registry, lookup

MAX_SIGMA_REL = 0.300283  # maximum of eq. 3, at γ = (√5 - 3) / 2; equal weights (γ = 0) have 0.2887


@dataclass(frozen=True, kw_only=True)
class EMAProfile(ABC):
    """Base class of EMA profiles: β(t) is the share of the old average that step t keeps.

    Subclasses implement :meth:`beta`.

    >>> (
    ...     Constant(decay=0.99)(1),
    ...     Constant(decay=0.99)(2),
    ... )  # the first update takes the weights as they are
    (0.0, 0.99)
    """

    name: ClassVar[str]

    @abstractmethod
    def beta(self, t: int) -> float:
        """Return β at optimizer step t = 2, 3, ..."""

    def __call__(self, t: int, steps: int = 1) -> float:
        """Return the share kept by one update at step t that covers the last ``steps`` steps.

        It is the product of their β.
        """
        if steps >= t:
            return 0.0
        return math.prod(self.beta(s) for s in range(t - steps + 1, t + 1))

    @property
    def label(self) -> str:
        """Name and numbers, for file names and logs.

        >>> Constant(decay=0.99).label
        'constant_0.99'
        """
        values = [getattr(self, entry.name) for entry in fields(self)]
        return "_".join([self.name, *(f"{value:g}" for value in values if value is not None)])

    def to_config(self) -> dict[str, Any]:
        """Return plain values from which :func:`resolve_ema_profile` builds the profile again."""
        return {"name": self.name, **asdict(self)}


EMA_PROFILES: Registry[type[EMAProfile]] = Registry("EMA profile")
"""Every profile by name; ``@EMA_PROFILES.register`` above a class adds one."""


@EMA_PROFILES.register
@dataclass(frozen=True, kw_only=True)
class Constant(EMAProfile):
    """β = decay: the plain exponential average.

    >>> Constant()(100)
    0.999
    """

    name: ClassVar[str] = "constant"
    decay: float = 0.999

    def __post_init__(self) -> None:
        _require_share("decay", self.decay)

    def beta(self, t: int) -> float:
        return self.decay


@EMA_PROFILES.register
@dataclass(frozen=True, kw_only=True)
class Warmup(EMAProfile):
    """β = min(decay, (1 + n) / (10 + n)) after n updates, as in TensorFlow, LDM and diffusers.

    >>> round(Warmup()(11), 3), Warmup()(1_000_000)
    (0.55, 0.9999)
    """

    name: ClassVar[str] = "warmup"
    decay: float = 0.9999

    def __post_init__(self) -> None:
        _require_share("decay", self.decay)

    def beta(self, t: int) -> float:
        n = t - 1
        return min(self.decay, (1 + n) / (10 + n))


@EMA_PROFILES.register
@dataclass(frozen=True, kw_only=True)
class InverseGamma(EMAProfile):
    """β = 1 - (1 + n / inverse_gamma)^-power after n updates (k-diffusion, diffusers).

    β is limited to min_decay ... decay. k-diffusion recommends power 2/3 for a million training
    steps or more, and 3/4 for fewer.

    >>> round(InverseGamma()(8), 12)
    0.75
    """

    name: ClassVar[str] = "inverse_gamma"
    inverse_gamma: float = 1.0
    power: float = 2 / 3
    decay: float = 0.9999
    min_decay: float = 0.0

    def __post_init__(self) -> None:
        _require_positive("inverse_gamma", self.inverse_gamma)
        _require_positive("power", self.power)
        _require_share("decay", self.decay)
        _require_share("min_decay", self.min_decay)
        if self.min_decay > self.decay:
            raise ValueError(
                f"min_decay must not exceed decay, got {self.min_decay} and {self.decay}; swap them"
            )

    def beta(self, t: int) -> float:
        n = t - 1
        return max(self.min_decay, min(self.decay, 1 - (1 + n / self.inverse_gamma) ** -self.power))


@EMA_PROFILES.register
@dataclass(frozen=True, kw_only=True)
class PowerFunction(EMAProfile):
    """β = (1 - 1/t)^(γ+1), with the γ of ``sigma_rel`` (EDM2, eq. 1 to 3).

    EDM2 stores snapshots of 0.05 and 0.10, and combines them to other lengths.

    Args:
        sigma_rel: length of the average, as a share of the training; must be below 0.3, because no
            γ gives more.

    >>> round(PowerFunction(sigma_rel=0.1).gamma, 2)
    6.94
    """

    name: ClassVar[str] = "power_function"
    sigma_rel: float = 0.1

    def __post_init__(self) -> None:
        gamma_of_sigma_rel(self.sigma_rel)

    @property
    def gamma(self) -> float:
        """The exponent γ."""
        return gamma_of_sigma_rel(self.sigma_rel)

    def beta(self, t: int) -> float:
        return (1 - 1 / t) ** (self.gamma + 1)  # eq. 2

    def __call__(self, t: int, steps: int = 1) -> float:
        # eq. 127; the product telescopes
        return (1 - steps / t) ** (self.gamma + 1) if steps < t else 0.0


@EMA_PROFILES.register
@dataclass(frozen=True, kw_only=True)
class HalfLife(EMAProfile):
    """β = ½^(1 / min(half_life, rampup t)) (EDM 2206.00364, appendix F).

    Old weights lose half of their share in ``half_life`` steps. EDM counts images: divide its
    half-life by the number of images per step.

    Args:
        half_life: half-life in optimizer steps.
        rampup: upper bound of the half-life, as a share of the training so far, so that the first
            weights are forgotten (EDM 0.05, EDM2's baseline 0.09; None for no bound).

    >>> HalfLife(half_life=10.0)(1000), HalfLife(half_life=10.0)(20)
    (0.93303..., 0.5)
    """

    name: ClassVar[str] = "half_life"
    half_life: float = 2000.0
    rampup: float | None = 0.05

    def __post_init__(self) -> None:
        _require_positive("half_life", self.half_life)
        if self.rampup is not None:
            _require_positive("rampup", self.rampup)

    def beta(self, t: int) -> float:
        bound = math.inf if self.rampup is None else self.rampup * t
        return 0.5 ** (1 / min(self.half_life, bound))


def resolve_ema_profile(profile: str | float | Mapping[str, Any] | EMAProfile) -> EMAProfile:
    """Return the profile for a name, a mapping, a decay (constant profile), or a profile itself.

    A name may have options: ``"power_function:sigma_rel=0.05"``. A mapping has ``name`` and the
    profile's numbers.

    Raises:
        ValueError: the name is unknown, the profile has no such number, or a value is out of range.

    >>> resolve_ema_profile({"name": "power_function", "sigma_rel": 0.05})
    PowerFunction(sigma_rel=0.05)
    >>> resolve_ema_profile(0.999)
    Constant(decay=0.999)
    >>> resolve_ema_profile("powerfunction")
    Traceback (most recent call last):
    ValueError: unknown EMA profile 'powerfunction'; did you mean 'power_function'?
    """
    if isinstance(profile, EMAProfile):
        return profile
    if isinstance(profile, Real) and not isinstance(profile, bool):
        return Constant(decay=float(profile))
    if not isinstance(profile, Mapping):
        return make_item(profile, EMA_PROFILES)
    numbers = dict(profile)
    kind = lookup("EMA profile", numbers.pop("name", None), EMA_PROFILES)
    known = [entry.name for entry in fields(kind)]
    if not set(numbers) <= set(known):
        raise ValueError(
            f"the EMA profile {kind.name!r} has {', '.join(known)}, got "
            f"{', '.join(map(repr, numbers))}"
        )
    return kind(**numbers)


def gamma_of_sigma_rel(sigma_rel: float) -> float:
    """Return the exponent γ of a power-function average of length σ_rel (EDM2, eq. 126, alg. 2).

    Raises:
        ValueError: unless 0 < sigma_rel < 0.3.

    >>> round(gamma_of_sigma_rel(0.28867513459481287), 9)  # 1/√12: equal weights
    0.0
    """
    if not 0 < sigma_rel < MAX_SIGMA_REL:
        raise ValueError(
            f"sigma_rel must lie between 0 and 0.3, got {sigma_rel}; EDM2's averages have 0.05 to "
            "0.1"
        )
    s = float(sigma_rel) ** -2
    # (γ+2)² (γ+3) = s (γ+1); the largest of the three real roots
    gamma = float(np.roots([1.0, 7.0, 16.0 - s, 12.0 - s]).real.max())
    for _ in range(2):  # Newton: the companion matrix has an error of a few ulps of s
        value = ((gamma + 7) * gamma + 16 - s) * gamma + 12 - s
        gamma -= value / ((3 * gamma + 14) * gamma + 16 - s)
    return gamma


def sigma_rel_of_gamma(gamma: float) -> float:
    """Return the length σ_rel of a power-function average with exponent γ > -1 (EDM2, eq. 3).

    >>> sigma_rel_of_gamma(0.0)  # equal weights: that of a uniform density, 1/√12
    0.288675...
    """
    if not -1 < gamma < math.inf:
        raise ValueError(
            f"gamma must be above -1 and finite, got {gamma}; EDM2's sigma_rel of 0.1 has 6.94"
        )
    return math.sqrt((gamma + 1) / ((gamma + 2) ** 2 * (gamma + 3)))


def _require_share(name: str, value: float) -> None:
    if not 0 <= value < 1:
        raise ValueError(
            f"{name} must be at least 0 and below 1, got {value}; 0.999 and 0.9999 are usual"
        )


def _require_positive(name: str, value: float) -> None:
    if not 0 < value < math.inf:
        raise ValueError(f"{name} must be positive and finite, got {value}")
