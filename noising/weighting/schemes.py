"""The published weighting schemes, and a weighting by ranges of time.

Each scheme is a W = w_x0 σ² (see base.py), correct for every target.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import ClassVar

import torch
from torch import Tensor, minimum

from ..curves.base import Curve
from ..utils.validation import require
from .base import WEIGHTINGS, Around, Scheme, Weighting, require_positive


def flow_determinant2(alpha2: Tensor, sigma2: Tensor) -> Tensor:
    """Return (α + σ)², the square of the flow velocity's determinant; 1 on a flow path.

    >>> import torch
    >>> flow_determinant2(torch.tensor([0.25]), torch.tensor([0.25]))
    tensor([1.])
    """
    return (alpha2.sqrt() + sigma2.sqrt()) ** 2


@WEIGHTINGS.register
@dataclass(frozen=True, kw_only=True)
class Uniform(Scheme):
    """1 on the target: the unweighted loss of the network's own prediction type.

    This is the only scheme that depends on the target.

    >>> import torch
    >>> Uniform()(torch.tensor([0.6]), torch.tensor([0.8]), torch.tensor([-0.6]))
    tensor([1.])
    """

    name: ClassVar[str] = "uniform"

    def numerator(self, alpha2: Tensor, sigma2: Tensor, det2: Tensor) -> Tensor:
        return det2


@WEIGHTINGS.register
@dataclass(frozen=True, kw_only=True)
class SNR(Scheme):
    """w_x0 = SNR: the plain epsilon loss, for every prediction type.

    Source: Salimans & Ho 2202.00512, §4. On x_0 at α = 1 it is σ^-2: sgm's EpsWeighting, the weight
    of EDM's VP and VE losses, and k-diffusion's "snr".

    >>> import torch
    >>> SNR()(torch.tensor([0.6]), torch.tensor([0.8]), torch.tensor([-0.6]))
    tensor([1.])
    """

    name: ClassVar[str] = "snr"

    def numerator(self, alpha2: Tensor, sigma2: Tensor, det2: Tensor) -> Tensor:
        return alpha2


@WEIGHTINGS.register
@dataclass(frozen=True, kw_only=True)
class PlainV(Scheme):
    """w_x0 = SNR + 1: the plain v loss, for every prediction type.

    Source: Salimans & Ho 2202.00512, §4, "SNR+1". It is sgm's VWeighting.

    >>> import torch
    >>> PlainV()(torch.tensor([0.6]), torch.tensor([0.8]), 1.0)
    tensor([1.])
    """

    name: ClassVar[str] = "v"

    def numerator(self, alpha2: Tensor, sigma2: Tensor, det2: Tensor) -> Tensor:
        return alpha2 + sigma2


@WEIGHTINGS.register
@dataclass(frozen=True, kw_only=True)
class PlainX0(Scheme):
    """w_x0 = 1: the plain loss of the clean sample, for every prediction type.

    It is sgm's UnitWeighting. For v this is 1 / (SNR + 1), which sd-scripts calls debiased (but see
    :class:`Debiased`).

    >>> import torch
    >>> PlainX0()(torch.tensor([0.6]), torch.tensor([0.8]), 0.8)
    tensor([1.])
    """

    name: ClassVar[str] = "x0"

    def numerator(self, alpha2: Tensor, sigma2: Tensor, det2: Tensor) -> Tensor:
        return sigma2


@WEIGHTINGS.register
@dataclass(frozen=True, kw_only=True)
class PlainFlow(Scheme):
    """w_x0 = (1 + √SNR)²: the plain loss of the flow velocity ε - x_0, for every prediction type.

    >>> import torch
    >>> PlainFlow()(torch.tensor([0.75]), torch.tensor([0.25]), -1.0)
    tensor([1.])
    """

    name: ClassVar[str] = "flow"

    def numerator(self, alpha2: Tensor, sigma2: Tensor, det2: Tensor) -> Tensor:
        return flow_determinant2(alpha2, sigma2)


@WEIGHTINGS.register
@dataclass(frozen=True, kw_only=True)
class MinSNR(Scheme):
    """w_x0 = min(SNR, γ) (Hang et al. 2303.09556, eq. 7 and 8); γ > 0.

    For epsilon this is min(SNR, γ) / SNR, for v min(SNR, γ) / (SNR + 1).

    >>> MinSNR(gamma=0.0)
    Traceback (most recent call last):
    ValueError: snr gamma must be positive and finite, got 0.0; the paper uses 5
    """

    name: ClassVar[str] = "min_snr"
    gamma: float = 5.0

    def __post_init__(self) -> None:
        super().__post_init__()
        fits = 0 < self.gamma < math.inf
        require(fits, "snr gamma", "be positive and finite", self.gamma, "the paper uses 5")

    def numerator(self, alpha2: Tensor, sigma2: Tensor, det2: Tensor) -> Tensor:
        return minimum(alpha2, self.gamma * sigma2)


@WEIGHTINGS.register
@dataclass(frozen=True, kw_only=True)
class SoftMinSNR(Scheme):
    """w_x0 = SNR γ / (SNR + γ), a smooth min(SNR, γ) (Crowson et al. 2401.11605); γ > 0.

    With γ = 1 / σ_d² it is w_x0 = 1 / (s² + σ_d²) at s = σ / α, as k-diffusion writes it.

    >>> import torch
    >>> SoftMinSNR(gamma=1.0)(torch.tensor([0.6]), torch.tensor([0.8]), 0.8)  # on x_0, SNR = 0.5625
    tensor([0.3600])
    """

    name: ClassVar[str] = "soft_min_snr"
    gamma: float = 5.0

    def __post_init__(self) -> None:
        super().__post_init__()
        require_positive(self.name, gamma=self.gamma)

    def numerator(self, alpha2: Tensor, sigma2: Tensor, det2: Tensor) -> Tensor:
        return alpha2 * sigma2 * self.gamma / (alpha2 + self.gamma * sigma2)


@WEIGHTINGS.register
@dataclass(frozen=True, kw_only=True)
class Sigmoid(Scheme):
    """w_ε = sigmoid(b - λ), λ = log SNR (Kingma & Gao 2303.00848; Hoogeboom et al. 2410.19324).

    This is soft-min-SNR with γ = e^b. The papers integrate over λ, i.e. they divide by the density
    that λ is drawn with. Here the density of the times is not changed.

    >>> import torch
    >>> Sigmoid(bias=0.0)(torch.tensor([0.6]), torch.tensor([0.8]), -0.6)  # on ε: 1 / (1 + SNR)
    tensor([0.6400])
    """

    name: ClassVar[str] = "sigmoid"
    bias: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        fits = abs(self.bias) <= 80  # beyond this, e^-b leaves the range of float32
        name = "bias of weighting 'sigmoid'"
        require(fits, name, "lie in -80 ... 80", self.bias, "it is a log SNR")

    def numerator(self, alpha2: Tensor, sigma2: Tensor, det2: Tensor) -> Tensor:
        return alpha2 * sigma2 / (sigma2 + alpha2 * math.exp(-self.bias))


@WEIGHTINGS.register
@dataclass(frozen=True, kw_only=True)
class P2(Scheme):
    """w_ε = 1 / (k + SNR)^γ (Choi et al. 2204.00227); k > 0, γ >= 0.

    The paper uses k = 1 and γ of 0.5 or 1.

    >>> import torch
    >>> P2()(torch.tensor([0.6]), torch.tensor([0.8]), -0.6)
    tensor([0.6400])
    """

    name: ClassVar[str] = "p2"
    k: float = 1.0
    gamma: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        require_positive(self.name, k=self.k)
        require_weight("gamma of weighting 'p2'", self.gamma, "the paper uses 1")

    def numerator(self, alpha2: Tensor, sigma2: Tensor, det2: Tensor) -> Tensor:
        return alpha2 * (sigma2 / (self.k * sigma2 + alpha2)) ** self.gamma


@WEIGHTINGS.register
@dataclass(frozen=True, kw_only=True)
class Debiased(Scheme):
    """w_ε = 1 / √SNR (Yu et al. 2310.08442), so √SNR / (SNR + 1) for v.

    For v, other trainers compute different weights under this name: see ``kohya_debiased_v`` and
    ``onetrainer_debiased_v``.

    >>> import torch
    >>> Debiased()(torch.tensor([0.6]), torch.tensor([0.8]), 1.0)  # on v
    tensor([0.4800])
    """

    name: ClassVar[str] = "debiased"

    def numerator(self, alpha2: Tensor, sigma2: Tensor, det2: Tensor) -> Tensor:
        return alpha2.sqrt() * sigma2.sqrt()


@WEIGHTINGS.register
@dataclass(frozen=True, kw_only=True)
class EDM(Scheme):
    """w_x0 = SNR + 1 / σ_d², i.e. (s² + σ_d²) / (s σ_d)² at s = σ / α.

    Source: Karras et al. 2206.00364, table 1. On EDM's own network F (prediction "karras" with the
    same σ_d) this is 1; with σ_d = 1 it is the plain v loss.

    >>> import torch
    >>> EDM(sigma_data=1.0)(torch.tensor([0.6]), torch.tensor([0.8]), 1.0)
    tensor([1.])
    """

    name: ClassVar[str] = "edm"
    sigma_data: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        require_positive(self.name, sigma_data=self.sigma_data)

    def numerator(self, alpha2: Tensor, sigma2: Tensor, det2: Tensor) -> Tensor:
        return alpha2 + sigma2 / self.sigma_data**2


@WEIGHTINGS.register
@dataclass(frozen=True, kw_only=True)
class CosMap(Scheme):
    """w_u = 2 / (π (1 - 2σ + 2σ²)) on the flow loss, σ of the flow path.

    Source: Esser et al. 2403.03206, §3.1. This is the density of the noise levels of a cosine
    schedule, as a weight over uniform noise levels. Use either it or the density, not both.

    >>> import torch
    >>> CosMap()(torch.tensor([0.5]), torch.tensor([0.5]), -1.0) * torch.pi
    tensor([4.])
    """

    name: ClassVar[str] = "cosmap"

    def numerator(self, alpha2: Tensor, sigma2: Tensor, det2: Tensor) -> Tensor:
        # with the flow's σ = σ / (α + σ): 1 - 2σ + 2σ² = (α² + σ²) / (α + σ)²
        return (2 / math.pi) * flow_determinant2(alpha2, sigma2) ** 2 / (alpha2 + sigma2)


@WEIGHTINGS.register
@dataclass(frozen=True, kw_only=True)
class SigmaSqrt(Scheme):
    """w_u = max(σ, sigma_min)^-2 on the flow loss, σ of the flow path; so w_x0 = σ^-4.

    The name comes from ``weighting_scheme`` of diffusers and sd-scripts, and it is wrong: the
    weight is the inverse square, not a root. σ^-2 has no mean over the times of a continuous flow.
    diffusers takes σ from a table of 1000 timesteps, so no weight is above 10^6.

    ``sigma_min``: the least σ of that table. A Noising sets it: σ at the first of the schedule's
    training timesteps, shift included. None: no bound, infinite where σ = 0.

    >>> import torch
    >>> SigmaSqrt()(torch.tensor([0.5]), torch.tensor([0.5]), -1.0)
    tensor([4.])
    >>> from alphabar.noising import NoiseSchedule
    >>> round(SigmaSqrt().on_curve(NoiseSchedule.flow(shift=3.0).curve).sigma_min, 6)  # 3 / 1002
    0.002994
    """

    name: ClassVar[str] = "sigma_sqrt"
    sigma_min: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        fits = self.sigma_min is None or 0 <= self.sigma_min <= 1
        name = "sigma_min of weighting 'sigma_sqrt'"
        require(fits, name, "lie in 0 ... 1", self.sigma_min, "it is a σ of the flow path")

    def on_curve(self, curve: Curve) -> SigmaSqrt:
        if self.sigma_min is not None or curve.is_discrete:  # no time before its first
            return self
        first = curve.time_at_index(torch.zeros(1, dtype=torch.float64))
        alpha, sigma = curve.alpha(first), curve.sigma(first)
        return replace(self, sigma_min=float(sigma / (alpha + sigma)))

    def numerator(self, alpha2: Tensor, sigma2: Tensor, det2: Tensor) -> Tensor:
        flow = flow_determinant2(alpha2, sigma2)
        return flow**2 / (
            sigma2 if self.sigma_min is None else torch.maximum(sigma2, self.sigma_min**2 * flow)
        )


@WEIGHTINGS.register
@dataclass(frozen=True, kw_only=True)
class VLike(Scheme):
    """w_x0 = SNR + k (SNR + 1): the plain epsilon loss plus k times the plain v loss; k > 0.

    This is the loss of an epsilon model with ``--v_pred_like_loss k`` of sd-scripts, without its
    cap of SNR at 1000. Unlike the epsilon loss alone, it is not 0 where SNR is 0.

    >>> import torch
    >>> VLike(strength=1.0)(torch.tensor([0.6]), torch.tensor([0.8]), 1.0)  # on v
    tensor([1.3600])
    """

    name: ClassVar[str] = "v_like"
    strength: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        require_positive(self.name, strength=self.strength)

    def numerator(self, alpha2: Tensor, sigma2: Tensor, det2: Tensor) -> Tensor:
        return alpha2 + self.strength * (alpha2 + sigma2)


@WEIGHTINGS.register
@dataclass(frozen=True)
class PerRange(Around):
    """A constant for each range of training time, times the weights of ``weighting``.

    A time belongs to a range if min <= fraction < max, with the fraction ``curve.fraction(t)``: t /
    1000 for 1000 timesteps, σ on a flow path. 1 belongs to the range that ends there.

    Args:
        ranges: (min, max, weight) with 0 <= min < max <= 1 and weight >= 0.
        weighting: a weighting, or its name.
        elsewhere: the constant outside all ranges.

    Raises:
        ValueError: for ranges that are empty, overlap or leave [0, 1].

    >>> halves = PerRange(((0.0, 0.5, 2.0), (0.5, 1.0, 0.25)))
    >>> one = torch.ones(3)
    >>> halves(one, one, one, fraction=torch.tensor([0.0, 0.5, 1.0]))
    tensor([2.0000, 0.2500, 0.2500])
    >>> PerRange(((0.5, 0.2, 1.0),))
    Traceback (most recent call last):
    ValueError: a range needs 0 <= min < max <= 1, got (0.5, 0.2, 1.0); times are fractions of ...
    """

    name: ClassVar[str] = "per_range"
    ranges: tuple[tuple[float, float, float], ...] = ((0.0, 1.0, 1.0),)
    weighting: Weighting = field(default_factory=Uniform)
    elsewhere: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        ranges = tuple(tuple(float(v) for v in entry) for entry in self.ranges)
        object.__setattr__(self, "ranges", ranges)  # lists (from YAML) would not hash
        for entry in ranges:
            if len(entry) != 3:
                raise ValueError(f"a range is (min, max, weight), got {entry}")
            low, high, weight = entry
            if not 0 <= low < high <= 1:
                raise ValueError(
                    f"a range needs 0 <= min < max <= 1, got {entry}; times are fractions of "
                    "training time, e.g. (0.0, 0.2, 1.0)"
                )
            require_weight(f"the weight of range {entry}", weight)
        require_weight("elsewhere", self.elsewhere)
        for one, other in pairwise(sorted(ranges)):
            if other[0] < one[1]:
                raise ValueError(
                    f"ranges overlap: {one} and {other}; end the first where the second begins"
                )

    def on_target(
        self, alpha: Tensor, sigma: Tensor, det: Tensor, fraction: Tensor | None
    ) -> Tensor:
        if fraction is None:
            raise ValueError(
                "weighting 'per_range' needs the fraction of training time; give "
                "fraction=curve.fraction(t)"
            )
        constant = torch.full_like(alpha, self.elsewhere)
        for low, high, weight in self.ranges:  # numbers, not a tensor: no upload to a GPU
            inside = (fraction >= low) & ((fraction < high) if high < 1 else (fraction <= high))
            constant = constant.masked_fill(inside, weight)
        return constant * self.weighting(alpha, sigma, det, fraction)


def require_weight(name: str, weight: float, advice: str = "") -> None:
    """Raise ValueError unless a weight is at least 0 and finite.

    >>> require_weight("elsewhere", -1.0)
    Traceback (most recent call last):
    ValueError: elsewhere must be at least 0 and finite, got -1.0
    """
    require(0 <= weight < math.inf, name, "be at least 0 and finite", weight, advice)
