"""Times with a shape: densities of k times for a sample, for its frames, chunks or tokens.

Each wraps a density of one time, which says how much noise there is, and says itself how the k
times of a sample go together:

    independent   each its own (Diffusion Forcing, Chen et al. 2407.01392, algorithm 1)
    shared        one for all: the times of the density itself
    staircase     more noise the later, as in a roll-out (Ruhe et al. 2402.09470)

Elements that a sampler never updates at such times do not count in the loss: the context, and the
finished and waiting steps of a staircase.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from ..axes import Axis, axis_of, require_chunks
from ..curves.base import Curve
from ..utils.items import make_item, parse_item
from ..utils.registry import Registry
from ..utils.rng import Draws, Stream, stream_of
from ..utils.validation import require, whole_number
from .base import LEAST, Around, Timesteps, resolve_timesteps
from .densities import UniformTimesteps


class ShapedDraw(NamedTuple):
    """The times of a batch, and which of them count in the loss: shape (batch, k) each."""

    t: Tensor
    counted: Tensor | None
    """Bool; None if all count."""


@dataclass(frozen=True, kw_only=True)
class ShapedTimesteps(Around):
    """Base class of k times for a sample; subclasses define :meth:`shares`.

    ``times(u, curve)`` is that of one element, ``density``'s.

    Args:
        density: density of one time, or its name. A stratified one is spread over all elements of
            the optimizer step, or over its samples if a sample draws one number.
        axis: the axis of x that the times run along, or its name in ``AXES``.
        chunks: k, which divides the axis; by default one time for each place.
        context: number of elements at the front that are given: they stand at the least time and
            do not count in the loss.
        context_probability: share of the samples that have this context.

    Raises:
        ValueError: for a density that follows losses, and for numbers out of range.

    >>> from alphabar.noising import NoiseSchedule, Noising
    >>> density = IndependentTimesteps(density="logit_normal", context=1)
    >>> noised = Noising(NoiseSchedule.flow(), timesteps=density)(
    ...     torch.zeros(2, 1, 4, 3, 3), step=0
    ... )
    >>> noised.timesteps.shape, noised.counted[0].tolist()
    (torch.Size([2, 4]), [False, True, True, True])
    """

    each_its_own: ClassVar[bool] = False
    """Whether each element draws a number; otherwise each sample draws one."""
    density: Timesteps = field(default_factory=UniformTimesteps)
    axis: Axis = "frames"
    chunks: int | None = None
    context: int = 0
    context_probability: float = 1.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "density", resolve_timesteps(self.density))
        super().__post_init__()
        if isinstance(self.density, ShapedTimesteps):
            raise ValueError(
                f"{self.name} timesteps go around a density of one time, not around "
                f"{self.density.name}"
            )
        axis_of(self.axis, range(64))  # an unknown name fails here
        if self.chunks is not None:
            whole_number("chunks", self.chunks, least=1)
        whole_number("context", self.context, least=0)
        share = self.context_probability
        require(0 <= share <= 1, "context_probability", "lie in 0 ... 1", share)

    @abstractmethod
    def shares(self, u: Tensor, k: int) -> Tensor:
        """Return the share of training time of each element, shape (batch, k).

        Elements with a share of at most 0 are finished, those above 1 are waiting.

        Args:
            u: uniform in (0, 1], shape (batch, k), or (batch, 1) if a sample draws one number.
            k: number of elements.
        """

    def times(self, u: Tensor, curve: Curve) -> Tensor:
        return self.density.times(u, curve)

    def count(self, shape: Sequence[int]) -> int:
        """Return k for x of a shape (batch, ...).

        Raises ValueError if the axis does not divide into ``chunks``, or is all context.

        >>> SharedTimesteps(axis="tokens", chunks=4).count((2, 16, 8))
        4
        """
        k = shape[axis_of(self.axis, shape)] if self.chunks is None else self.chunks
        require_chunks(k, self.axis, shape)
        fits, advice = self.context < k, "the rest is what the network learns"
        require(fits, "context", f"be less than the {k} elements", self.context, advice)
        return k

    def draw(
        self, draws: Draws, seed: int, groups: Sequence[int], total: int, curve: Curve, k: int
    ) -> ShapedDraw:
        """Return the times of these samples, which depend on (seed, step, global index) alone.

        Args:
            draws: the random numbers of the samples.
            seed: seed of the strata.
            groups: numbers of the groups of ``total`` indices that hold the samples.
            total: number of samples of the optimizer step.
            curve: the curve of the times.
            k: number of elements of a sample.
        """
        count = k if self.each_its_own else 1
        u = 1 - draws.of(Stream.TRAINING_TIME, device="cpu").uniform(count, dtype=torch.float64)
        if self.density.stratified:
            elements = (draws.index.cpu()[:, None] * count + torch.arange(count)).flatten()
            u = self.density.spread(u.flatten(), elements, groups, total * count, seed, draws.step)
            u = u.view(-1, count)
        shares = self.shares(u, k)
        t = self.density.times(shares.clamp(LEAST, 1.0), curve)
        finished, waiting = shares <= 0, shares > 1
        if self.context:
            chance = draws.of(stream_of("context"), device="cpu").uniform(1, dtype=torch.float64)
            given = torch.arange(k) < self.context
            finished = finished | (given & (chance < self.context_probability))
        counted = ~(finished | waiting)
        t = torch.where(finished, torch.as_tensor(curve.t_min, dtype=t.dtype), t)
        t = torch.where(waiting, torch.as_tensor(curve.t_max, dtype=t.dtype), t)
        return ShapedDraw(t, counted if self.context or self.may_rest else None)

    @property
    def may_rest(self) -> bool:
        """Whether elements can be finished or waiting."""
        return False

    def evenly(self) -> ShapedTimesteps:
        """Return the same with stratified uniform times, for a validation loss of low variance.

        >>> IndependentTimesteps(density="logit_normal").evenly().density
        UniformTimesteps(stratified=True)
        """
        return replace(self, density=UniformTimesteps(stratified=True))


SHAPED_TIMESTEPS: Registry[type[ShapedTimesteps]] = Registry("shaped timestep density")
"""The densities of k times by name; decorate a class with ``@SHAPED_TIMESTEPS.register``."""


@SHAPED_TIMESTEPS.register
@dataclass(frozen=True, kw_only=True)
class IndependentTimesteps(ShapedTimesteps):
    """Each element has its own time: Diffusion Forcing (Chen et al. 2407.01392, algorithm 1).

    >>> u = torch.tensor([[0.25, 0.75]])
    >>> torch.equal(IndependentTimesteps().shares(u, 2), u)
    True
    """

    name: ClassVar[str] = "independent"
    each_its_own: ClassVar[bool] = True

    def shares(self, u: Tensor, k: int) -> Tensor:
        return u


@SHAPED_TIMESTEPS.register
@dataclass(frozen=True, kw_only=True)
class SharedTimesteps(ShapedTimesteps):
    """All elements have one time, that of ``density`` with the same seed.

    Without ``context`` it is ordinary training for a network that takes k times.

    >>> SharedTimesteps().shares(torch.tensor([[0.5]]), 3)
    tensor([[0.5000, 0.5000, 0.5000]])
    """

    name: ClassVar[str] = "shared"

    def shares(self, u: Tensor, k: int) -> Tensor:
        return u.expand(-1, k)


@SHAPED_TIMESTEPS.register
@dataclass(frozen=True, kw_only=True)
class StaircaseTimesteps(ShapedTimesteps):
    """More noise the later the element: the times that a roll-out visits, at a random moment.

    Source: Ruhe et al. 2402.09470, eq. 8 to 10, with a free height of a stair. The times of a
    :func:`staggered` sampling matrix have ``lag`` = rows between two chunks / steps. Elements that
    the roll-out has finished, or not begun, do not count in the loss; of those that count, each has
    the times of ``density``.

    Args:
        lag: height of a stair, in (0, 1], as a share of training time; 1 is one element after the
            other, None is 1 / k, where at most k elements are under way.

    >>> StaircaseTimesteps(lag=0.5).shares(torch.tensor([[0.25], [1.0]]), 3)
    tensor([[-0.5000,  0.0000,  0.5000],
            [ 1.0000,  1.5000,  2.0000]])
    """

    name: ClassVar[str] = "staircase"
    lag: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        fits = self.lag is None or 0 < self.lag <= 1
        require(fits, "lag", "lie in (0, 1]", self.lag, "a share of training time")

    def shares(self, u: Tensor, k: int) -> Tensor:
        lag = 1 / k if self.lag is None else self.lag
        later = torch.arange(k - 1, -1, -1, dtype=u.dtype)
        return u * (1 + (k - 1) * lag) - later * lag

    @property
    def may_rest(self) -> bool:
        return True


def resolve_times(timesteps: str | Timesteps) -> Timesteps:
    """Return the density for a name of ``TIMESTEPS`` or ``SHAPED_TIMESTEPS``, or an object.

    Raises ValueError for an unknown name or option.

    >>> resolve_times("independent:density=logit_normal,axis=tokens").density
    LogitNormalTimesteps(stratified=False, across=1, mean=0.0, std=1.0)
    """
    if isinstance(timesteps, str) and parse_item(timesteps)[0] in SHAPED_TIMESTEPS:
        return make_item(timesteps, SHAPED_TIMESTEPS)
    return resolve_timesteps(timesteps)
