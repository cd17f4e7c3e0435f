"""Base classes and registry of weightings; the schemes are in the files next to this one.

A loss is one function w_x0(SNR) >= 0 on ||Δx_0||². An output error Δout is an x_0 error (σ / det)
Δout (see prediction.py), so the equivalent weight on ||Δout||² is w_x0 σ² / det². A scheme defines
W = w_x0 σ² in α² and σ², and never divides by SNR. The weight is W / det²: finite at both ends of
the schedule, and the same objective for every target.

A scheme that is published as a weight on the error of one target is converted with that target's
det²:

    epsilon: W = w_ε α²               v:   W = w_v (α² + σ²)
    flow velocity: W = w_u (α + σ)²   x_0: W = w_x0 σ²

The determinant of v is α² + σ², which is 1 on a variance preserving path. On other paths its square
would make w_x0 depend on more than SNR. A scheme must be a function of SNR alone, so the formula
has α² + σ² once, not squared.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor, nn

from ..curves.base import Curve
from ..utils.items import make_item
from ..utils.registry import Registry
from ..utils.validation import require


@dataclass(frozen=True, kw_only=True)
class Weighting(ABC):
    """Base class of the weights on the error of a target; subclasses define ``on_target``.

    Most subclasses do so through :class:`Scheme`. ``floor`` is a lower bound of the weight on the
    target, for schemes that are 0 at a zero-SNR terminal step.

    >>> from alphabar.noising import MinSNR
    >>> one = torch.tensor([1.0])
    >>> MinSNR(gamma=5.0)(alpha=0.8 * one, sigma=0.6 * one, det=-one)  # v: min(SNR, 5) / (SNR + 1)
    tensor([0.6400])
    """

    name: ClassVar[str]
    floor: float = 0.0

    def __post_init__(self) -> None:
        require(0 <= self.floor < math.inf, "floor", "be at least 0", self.floor)

    @abstractmethod
    def on_target(
        self, alpha: Tensor, sigma: Tensor, det: Tensor, fraction: Tensor | None
    ) -> Tensor:
        """Return the weight before the floor; see :meth:`__call__`."""

    def __call__(
        self, alpha: Tensor, sigma: Tensor, det: Tensor | float, fraction: Tensor | None = None
    ) -> Tensor:
        """Return the weight on the squared error of the target; shape of ``alpha``.

        Args:
            alpha: signal level.
            sigma: noise level.
            det: determinant of the target.
            fraction: fraction of training time, ``curve.fraction(t)``, shape of ``alpha``; for
                schemes that need it.
        """
        det = torch.as_tensor(det, dtype=alpha.dtype, device=alpha.device)
        weight = self.on_target(alpha, sigma, det, fraction)
        return weight.clamp(min=self.floor) if self.floor else weight

    def on_curve(self, curve: Curve) -> Weighting:
        """Return this weighting with the bounds of a curve; by default itself."""
        return self

    def log_variance(self) -> nn.Module | None:
        """Return a new module that learns u(α, σ) of the loss w / e^u · error + u.

        Returns None for a weighting without learned parts.
        """
        return None


@dataclass(frozen=True, kw_only=True)
class Scheme(Weighting):
    """A weighting in closed form; subclasses define W(α², σ²) = w_x0 σ².

    >>> class Half(Scheme):
    ...     name = "half"
    ...
    ...     def numerator(self, alpha2, sigma2, det2):
    ...         return 0.5 * det2
    >>> one = torch.ones(1)
    >>> Half()(alpha=one, sigma=one, det=one)
    tensor([0.5000])
    """

    @abstractmethod
    def numerator(self, alpha2: Tensor, sigma2: Tensor, det2: Tensor) -> Tensor:
        """Return W = w_x0 σ², given α², σ² and det²."""

    def on_target(
        self, alpha: Tensor, sigma: Tensor, det: Tensor, fraction: Tensor | None
    ) -> Tensor:
        return self.numerator(alpha**2, sigma**2, det**2) / det**2


WEIGHTINGS: Registry[type[Weighting]] = Registry("weighting")
"""The weightings by name; decorate a class with ``@WEIGHTINGS.register`` to add one."""


def resolve_weighting(weighting: str | Weighting) -> Weighting:
    """Return the weighting for a name, with or without options, or an object.

    Raises ValueError for an unknown name or option.

    >>> resolve_weighting("min_snr"), resolve_weighting("min_snr:gamma=3,floor=0.05")
    (MinSNR(floor=0.0, gamma=5.0), MinSNR(floor=0.05, gamma=3))
    """
    return weighting if isinstance(weighting, Weighting) else make_item(weighting, WEIGHTINGS)


def require_positive(owner: str, **values: float) -> None:
    """Raise ValueError unless all values are positive and finite.

    >>> require_positive("p2", k=0.0)
    Traceback (most recent call last):
    ValueError: k of weighting 'p2' must be positive and finite, got 0.0
    """
    for name, value in values.items():
        name = f"{name} of weighting {owner!r}"
        require(0 < value < math.inf, name, "be positive and finite", value)


class Around(Weighting):
    """A weighting that uses another one, given by its name or as an object; not a learned one.

    A subclass is a dataclass with the field ``weighting``.

    >>> from alphabar.noising import PerRange
    >>> PerRange(weighting="snr").weighting
    SNR(floor=0.0)
    """

    weighting: Weighting

    def __post_init__(self) -> None:
        super().__post_init__()
        inner = resolve_weighting(self.weighting)
        if type(inner).log_variance is not Weighting.log_variance:
            raise ValueError(
                f"weighting {self.name!r} cannot be made of {inner.name!r}, which is learned; give "
                "it a closed form"
            )
        object.__setattr__(self, "weighting", inner)

    def on_curve(self, curve: Curve) -> Weighting:
        return replace(self, weighting=self.weighting.on_curve(curve))
