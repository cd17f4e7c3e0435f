"""Global indices: the index of each sample within its optimizer step.

The noise and the time of a sample are drawn from its global index. Let ``start`` be the number of
samples before this batch, in this step on this process. Sample k of the batch has the index

    (start + k) · world_size + rank,

which is its position in a DistributedSampler. So no two samples of a step share an index, even if
the batches of micro-batches and ranks are unequal. The same step has the same indices on one
process and on several.

``start`` is counted with two integers on the host per step. Copies and checkpoints do not contain
them. With equal batches ``start`` is a function of the micro-batch alone, start = micro_batch ·
batch; this value is used where nothing was counted.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from .utils.rng import SymbolicRange
from .utils.validation import require_integer


@dataclass(frozen=True)
class Place:
    """The global indices of a batch, and the number of samples that stratified times cover.

    >>> MicroBatches().take(2, Step(step=0, rank=1, world_size=2), counted=True)
    Place(index=range(1, 5, 2), total=4)
    """

    index: Sequence[int] | SymbolicRange
    total: int


@dataclass(frozen=True)
class Step:
    """The optimizer step of a call and the place of its batch: arguments of ``Noising.forward``.

    >>> Step(step=0, rank=2, world_size=2)
    Traceback (most recent call last):
    ValueError: need 0 <= rank < world_size and 0 <= micro_batch < accumulate, got rank 2 of 2 ...
    """

    step: int
    micro_batch: int | None = None
    accumulate: int | None = None
    rank: int = 0
    world_size: int = 1
    index: Sequence[int] | Tensor | None = None
    total: int | None = None

    def __post_init__(self) -> None:
        for name in ("step", "micro_batch", "accumulate", "rank", "world_size", "total"):
            value = getattr(self, name)
            if value is not None and type(value) is not int:
                object.__setattr__(
                    self, name, require_integer(name, value, f"write int({name}) where it is whole")
                )
        micro_batch, accumulate = (
            self.micro_batch or 0,
            1 if self.accumulate is None else self.accumulate,
        )
        if not 0 <= self.rank < self.world_size or not 0 <= micro_batch < accumulate:
            raise ValueError(
                "need 0 <= rank < world_size and 0 <= micro_batch < accumulate, got rank "
                f"{self.rank} of {self.world_size} and "
                f"micro_batch {micro_batch} of {accumulate}; give the numbers of the whole "
                "optimizer step"
            )
        if self.total is not None and self.total < 1:
            raise ValueError(
                "total must be at least 1, the samples of the whole optimizer step, got "
                f"{self.total}"
            )
        if self.index is not None and self.micro_batch is not None:
            raise ValueError(
                "index already says where each sample lies in the optimizer step; leave "
                "micro_batch out"
            )


class _Done(NamedTuple):
    """Counts of the calls and samples that one process has noised at a step."""

    calls: int = 0
    samples: int = 0
    first: int = 0  # number of samples of the first micro-batch


class MicroBatches:
    """Counts the micro-batches of the current optimizer step, on the host.

    >>> counted = MicroBatches()
    >>> for batch in (3, 2):  # a smaller last batch
    ...     print(counted.take(batch, Step(step=7), counted=True).index)
    range(0, 3)
    range(3, 5)
    """

    def __init__(self) -> None:
        self._step: int | None = None
        # by (rank, world_size): one process may compute several ranks
        self._done: dict[tuple[int, int], _Done] = {}

    def take(self, batch: int, step: Step, *, counted: bool) -> Place:
        """Return the place of the next ``batch`` samples, and count them if ``counted``.

        Raises ValueError for a micro-batch that was counted before, and for more micro-batches than
        ``accumulate``.
        """
        if step.index is not None:
            return Place(_given(step.index, batch), _total(step, batch))
        # a count in the graph would recompile for each number
        if torch.compiler.is_compiling():
            if step.micro_batch is None and step.accumulate not in (None, 1):
                raise ValueError(
                    "a compiled call cannot count micro-batches; give micro_batch with accumulate"
                )
            counted = False
        if not counted:
            return _strided((step.micro_batch or 0) * batch, batch, step, batch)
        if step.step != self._step:
            self._step, self._done = step.step, {}
        who = (step.rank, step.world_size)
        done = self._done.get(who, _Done())
        micro_batch = _next(done.calls, step)
        first = done.first or batch
        # after a resume inside a step, assume that skipped micro-batches have the size of the first
        start = done.samples + (micro_batch - done.calls) * first
        self._done[who] = _Done(micro_batch + 1, start + batch, first)
        return _strided(start, batch, step, first)


def _next(calls: int, step: Step) -> int:
    """Return the number of this micro-batch; ``calls`` micro-batches were counted before."""
    if step.micro_batch is None:
        if step.accumulate is not None and calls >= step.accumulate:
            raise ValueError(
                f"step {step.step} has had its {step.accumulate} micro-batches already; count step "
                "up after each optimizer step, "
                "or leave accumulate out"
            )
        return calls
    if step.micro_batch < calls:
        raise ValueError(
            f"micro-batch {step.micro_batch} of step {step.step} was noised already, and would get "
            "the same noise and times again; "
            "count micro_batch up, or leave it out to have it counted; for the same noise on "
            "purpose give index=, or call eval()"
        )
    return step.micro_batch


def _strided(start: int, batch: int, step: Step, size: int) -> Place:
    """Return the place of the samples after ``start``; a rank takes every world_size-th index."""
    count = step.world_size
    kind = SymbolicRange if torch.compiler.is_compiling() else range
    index = kind(start * count + step.rank, (start + batch) * count + step.rank, count)
    return Place(index, _total(step, size))


def _total(step: Step, size: int) -> int:
    if step.total is not None:
        return step.total
    return size * step.world_size * (1 if step.accumulate is None else step.accumulate)


def _given(index: Sequence[int] | Tensor, batch: int) -> list[int]:
    # a tensor or a numpy array
    values: Any = cast(Any, index).tolist() if hasattr(index, "tolist") else list(index)
    if not isinstance(values, list) or len(values) != batch:
        raise ValueError(
            f"index must have shape ({batch},), a global index for each sample, got {index!r}"
        )
    values = [
        require_integer("an index", value, "count the samples of the whole optimizer step")
        for value in values
    ]
    if min(values) < 0:
        raise ValueError(
            f"a global index must be at least 0, got {min(values)}; count the samples of the "
            "optimizer step"
        )
    return values
