"""Registry of samplers that a table cannot express, and the base class of those with a grid.

The base class is for samplers that visit each knot of a grid once.
"""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, TypeVar

from torch import Tensor

from ...noising import NoiseSchedule
from ...noising.utils.registry import Registry
from ..grids import Grid, make_knots
from ..guidance import Network
from ..inference import Run, last, prepare_run, without_gradients
from ..kernel import Progress
from ..knots import Knot

T = TypeVar("T")


@dataclass(frozen=True)
class StandaloneEntry:
    """A standalone sampler, without a table: ``factory(schedule, **options)`` returns one.

    The other fields are those of a ``Method``. ``evaluations`` is None if their number is not known
    before the run. ``aliases`` maps names of other software to the options that they imply.

    >>> STANDALONE["repaint"].factory.__name__
    'RePaint'
    """

    name: str
    factory: Callable[..., Any]
    order: int
    source: str
    evaluations: int | None = 1
    stochastic: bool = True
    aliases: Mapping[str, Mapping[str, Any]] = field(default_factory=dict, hash=False)

    @property
    def options(self) -> dict[str, Any]:
        """The options of the sampler, with their defaults."""
        parameters = list(inspect.signature(self.factory).parameters.values())[1:]
        return {p.name: p.default for p in parameters}

    @property
    def documentation(self) -> str:
        """The docstring of the sampler."""
        return inspect.getdoc(self.factory) or ""


STANDALONE: Registry[StandaloneEntry] = Registry("sampler")
"""All standalone samplers by name; ``@register_standalone(...)`` above a class adds one."""


def register_standalone(
    name: str, *, order: int, source: str, **facts: Any
) -> Callable[[type[T]], type[T]]:
    """Register a class of samplers; the facts are the fields of :class:`StandaloneEntry`.

    Its objects are called like a ``Sampler`` and have ``schedule``, ``steps`` (None if there is no
    number of steps) and ``iterate``. The class gets the name as its attribute ``name``.

    >>> @register_standalone("constant_zero", order=0, source="an example")
    ... class Zero:
    ...     def __init__(self, schedule, steps=1):
    ...         self.schedule, self.steps = schedule, steps
    >>> STANDALONE["constant_zero"].factory.name
    'constant_zero'
    """

    def add(kind: type[T]) -> type[T]:
        kind.name = name  # type: ignore[attr-defined]
        STANDALONE.add(name, StandaloneEntry(name, kind, order=order, source=source, **facts))
        return kind

    return add


class GridSampler(ABC):
    """Base class of standalone samplers that visit the knots of a grid.

    Subclasses are dataclasses with these fields and define :meth:`advance`.

    >>> from alphabar.sampling import LearnedVariance
    >>> isinstance(LearnedVariance(NoiseSchedule.linear(), steps=5), GridSampler)
    True
    """

    output_multiple: ClassVar[int] = 1
    """The number of output channels of the network, in multiples of the channels of x."""
    name: ClassVar[str]
    schedule: NoiseSchedule
    steps: int
    grid: str | Grid

    @abstractmethod
    def advance(self, run: Run, knots: Sequence[Knot]) -> Iterator[Progress]:
        """Run from ``run.x`` at the first of ``knots``; yield after each step."""

    @property
    def knots(self) -> tuple[Knot, ...]:
        """The steps + 1 visited points, the last one clean."""
        return make_knots(self.schedule, self.steps, self.grid)

    def __call__(
        self, network: Network, shape_or_noise: Sequence[int] | Tensor, **arguments: Any
    ) -> Tensor:
        """Return samples, shape (batch, ...), float32 or better.

        Arguments as in ``Sampler.iterate``.
        """
        return last(self.iterate(network, shape_or_noise, **arguments)).x

    def iterate(
        self, network: Network, shape_or_noise: Sequence[int] | Tensor, **arguments: Any
    ) -> Iterator[Progress]:
        """Sample step by step. Arguments as in ``Sampler.iterate``."""
        knots = self.knots
        multiple = self.output_multiple
        run = run_over(
            self.schedule, knots, network, shape_or_noise, output_multiple=multiple, **arguments
        )
        return without_gradients(self.advance(run, knots))


def run_over(
    schedule: NoiseSchedule,
    knots: Sequence[Knot],
    network: Network,
    shape_or_noise: Sequence[int] | Tensor,
    **arguments: Any,
) -> Run:
    """Return the run that visits these knots; other arguments as in ``prepare_run``.

    >>> knots = make_knots(NoiseSchedule.flow(), 2)
    >>> run_over(NoiseSchedule.flow(), knots, lambda x, t: -x, (2, 3), seeds=0).x.shape
    torch.Size([2, 3])
    """
    integer = schedule.curve.is_discrete and all(knot.timestep.is_integer() for knot in knots)
    return prepare_run(
        schedule, knots[0], network, shape_or_noise, integer_timesteps=integer, **arguments
    )
