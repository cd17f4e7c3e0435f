"""What samplers that are no table have in common: a grid that they walk once, called and iterated over as a ``Sampler`` is."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import Any, ClassVar

from torch import Tensor

from ...noising import NoiseSchedule
from ..grids import Grid, make_knots
from ..guidance import Network
from ..inference import Run, last, start_run, without_gradients
from ..kernel import Progress
from ..knots import Knot


class Walk(ABC):
    """A sampler by the knots of its grid; subclasses are dataclasses with these fields, and state :meth:`advance`.

    >>> from alphabar.sampling import LearnedVariance
    >>> isinstance(LearnedVariance(NoiseSchedule.linear(), steps=5), Walk)
    True
    """

    heads: ClassVar[int] = 1
    """How many times the channels of x the network puts out."""
    schedule: NoiseSchedule
    steps: int
    grid: str | Grid

    @abstractmethod
    def advance(self, run: Run, knots: Sequence[Knot]) -> Iterator[Progress]:
        """Run from ``run.x`` at the first of ``knots``, yielding after each step."""

    @property
    def knots(self) -> tuple[Knot, ...]:
        """The steps + 1 points that are visited, the last one clean."""
        return make_knots(self.schedule, self.steps, self.grid)

    def __call__(self, network: Network, shape_or_noise: Sequence[int] | Tensor, **arguments: Any) -> Tensor:
        """Return samples, shape (batch, ...), float32 or better. Arguments as in ``Sampler.iterate``."""
        return last(self.iterate(network, shape_or_noise, **arguments)).x

    def iterate(self, network: Network, shape_or_noise: Sequence[int] | Tensor, **arguments: Any) -> Iterator[Progress]:
        """Sample step by step. Arguments as in ``Sampler.iterate``."""
        knots = self.knots
        whole = self.schedule.curve.is_discrete and all(knot.timestep.is_integer() for knot in knots)
        run = start_run(self.schedule, knots[0], network, shape_or_noise, whole=whole, heads=self.heads, **arguments)
        return without_gradients(self.advance(run, knots))
