"""Densities over training time: which noise levels a batch sees.

A density is a quantile function from u in (0, 1] to (0, 1]; the curve turns that into its own times. u -> 1 is noise,
always. How u is drawn is the other half: independently for each sample, or ``stratified`` over the whole optimizer step
(batch x ranks x accumulation), one sample to each of its equal strata, which keeps the expectation and lowers the variance.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

from torch import Tensor

from .registry import lookup


@dataclass(frozen=True, kw_only=True)
class Timesteps(ABC):
    """A density over training time; subclasses state its quantile function.

    >>> import torch
    >>> UniformTimesteps().quantile(torch.tensor([0.25, 1.0]))
    tensor([0.2500, 1.0000])
    """

    name: ClassVar[str]
    stratified: bool = False

    @abstractmethod
    def quantile(self, u: Tensor) -> Tensor:
        """Return the time in (0, 1] below which a share u of the samples lies; float64, any shape."""

    def __call__(self, u: Tensor, index: Tensor, strata: Tensor | None) -> Tensor:
        """Return times in (0, 1] for uniform ``u``; ``strata`` is this step's permutation of the strata."""
        if self.stratified and strata is not None:
            u = (strata[index % len(strata)] + u) / len(strata)
        return self.quantile(u)


@dataclass(frozen=True, kw_only=True)
class UniformTimesteps(Timesteps):
    """Every time equally often.

    >>> import torch
    >>> UniformTimesteps(stratified=True)(torch.tensor([0.5, 0.5]), torch.arange(2), torch.tensor([1, 0]))
    tensor([0.7500, 0.2500])
    """

    name: ClassVar[str] = "uniform"

    def quantile(self, u: Tensor) -> Tensor:
        return u


TIMESTEPS: Mapping[str, Callable[[], Timesteps]] = {
    "uniform": UniformTimesteps,
    "stratified": partial(UniformTimesteps, stratified=True),
}
"""Every density by its name; a new one is a class above and a line here."""


def resolve_timesteps(timesteps: str | Timesteps) -> Timesteps:
    """Return the density for a name or an object; an unknown name is a ValueError that offers the nearest one.

    >>> resolve_timesteps("stratified")
    UniformTimesteps(stratified=True)
    """
    return timesteps if isinstance(timesteps, Timesteps) else lookup("timestep density", timesteps, TIMESTEPS)()
