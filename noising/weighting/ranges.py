"""Constant weights on ranges of training time."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import ClassVar

import torch
from torch import Tensor

from ..curves.base import Curve
from .base import Weighting, closed_form
from .schemes import Uniform


@dataclass(frozen=True)
class PerRange(Weighting):
    """A constant for each range of training time, times the weights of ``of`` (an object, or its name).

    ``ranges``: (min, max, weight) with 0 <= min < max <= 1 and weight >= 0. A time belongs to a range where
    min <= fraction < max, the fraction being ``curve.fraction(t)``: t / 1000 for 1000 timesteps, σ on a flow path; 1 belongs
    to the range that ends there. ``elsewhere`` is the constant of the gaps.
    Raises ValueError for ranges that are empty, overlap or leave [0, 1].

    >>> halves = PerRange(((0.0, 0.5, 2.0), (0.5, 1.0, 0.25)))
    >>> one = torch.ones(3)
    >>> halves(one, one, one, fraction=torch.tensor([0.0, 0.5, 1.0]))
    tensor([2.0000, 0.2500, 0.2500])
    >>> PerRange(((0.5, 0.2, 1.0),))
    Traceback (most recent call last):
    ValueError: a range needs 0 <= min < max <= 1, got (0.5, 0.2, 1.0); times are fractions of training time, e.g. (0.0, 0.2, 1.0)
    """

    name: ClassVar[str] = "per_range"
    ranges: tuple[tuple[float, float, float], ...] = ((0.0, 1.0, 1.0),)
    of: Weighting = field(default_factory=Uniform)
    elsewhere: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "of", closed_form(self.name, self.of))
        ranges = tuple(tuple(float(v) for v in entry) for entry in self.ranges)
        object.__setattr__(self, "ranges", ranges)  # lists, as YAML has them, would not hash
        for entry in ranges:
            if len(entry) != 3:
                raise ValueError(f"a range is (min, max, weight), got {entry}")
            low, high, weight = entry
            if not 0 <= low < high <= 1:
                raise ValueError(
                    f"a range needs 0 <= min < max <= 1, got {entry}; times are fractions of training time, e.g. (0.0, 0.2, 1.0)"
                )
            require_weight(f"the weight of range {entry}", weight)
        require_weight("elsewhere", self.elsewhere)
        for one, other in pairwise(sorted(ranges)):
            if other[0] < one[1]:
                raise ValueError(f"ranges overlap: {one} and {other}; end the first where the second begins")

    def on_curve(self, curve: Curve) -> Weighting:
        return replace(self, of=self.of.on_curve(curve))

    def on_target(self, alpha: Tensor, sigma: Tensor, det: Tensor, fraction: Tensor | None) -> Tensor:
        if fraction is None:
            raise ValueError(
                "weighting 'per_range' needs the fraction of training time; give fraction=curve.fraction(t)"
            )
        constant = torch.full_like(alpha, self.elsewhere)
        for low, high, weight in self.ranges:  # numbers, not a table: nothing is uploaded to a GPU
            inside = (fraction >= low) & ((fraction < high) if high < 1 else (fraction <= high))
            constant = constant.masked_fill(inside, weight)
        return constant * self.of(alpha, sigma, det, fraction)


def require_weight(name: str, weight: float) -> None:
    """Raise ValueError unless a weight is at least 0 and finite.

    >>> require_weight("elsewhere", -1.0)
    Traceback (most recent call last):
    ValueError: elsewhere must be at least 0 and finite, got -1.0
    """
    if not 0 <= weight < float("inf"):
        raise ValueError(f"{name} must be at least 0 and finite, got {weight}")
