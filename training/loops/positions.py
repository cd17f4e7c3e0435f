"""The position of each sample in a run: which process sees it, at which optimizer step.

With it, the data of a training step depends on nothing but (seed, step): not on the number of
processes, nor on a resume, which needs only the number of the step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import count
from typing import Any

from torch import Tensor

from ...noising.utils.rng import permutation, stream_of


@dataclass(frozen=True)
class Positions:
    """The positions of one process's batches; step s has s · total to (s + 1) · total - 1.

    ``position - step * total`` is the index that a Noising takes, with ``total``.

    Args:
        batch: samples in a batch.
        accumulate: batches of a process in an optimizer step.
        world_size: number of processes.
        rank: this process.

    >>> both = [Positions(2, accumulate=2, world_size=2, rank=rank) for rank in (0, 1)]
    >>> both[0].total, [list(one.batches(1, 2)) for one in both]
    (8, [[[8, 9], [12, 13]], [[10, 11], [14, 15]]])
    """

    batch: int
    accumulate: int = 1
    world_size: int = 1
    rank: int = 0

    @property
    def total(self) -> int:
        """Number of samples in an optimizer step, on all processes."""
        return self.batch * self.accumulate * self.world_size

    def batches(self, start: int, stop: int) -> Iterator[list[int]]:
        """Yield the positions of this process's batches from step ``start`` to before ``stop``.

        A DataLoader takes it as ``batch_sampler``.
        """
        for number in range(start * self.accumulate, stop * self.accumulate):
            first = (number * self.world_size + self.rank) * self.batch
            yield list(range(first, first + self.batch))


class Shuffled:
    """The order of a dataset: (epoch, index) of each position, another permutation each epoch.

    Args:
        samples: number of samples in the dataset.
        seed: seed of the order.

    >>> order = Shuffled(3, seed=0)
    >>> [order[position][0] for position in range(7)]
    [0, 0, 0, 1, 1, 1, 2]
    >>> sorted(order[position][1] for position in range(3, 6))
    [0, 1, 2]
    """

    def __init__(self, samples: int, seed: int) -> None:
        self.samples, self.seed = samples, seed
        self._kept: dict[int, Tensor] = {}

    def __getitem__(self, position: int) -> tuple[int, int]:
        epoch, place = divmod(position, self.samples)
        if epoch not in self._kept:
            order = permutation(self.seed, self.samples, step=epoch, group=stream_of("data order"))
            # of two epochs, since a batch may lie in both
            self._kept = {**dict([*self._kept.items()][-1:]), epoch: order}
        return epoch, int(self._kept[epoch][place])


def at_positions(
    rows: Callable[[int], Iterable[Any]], wanted: Iterable[int]
) -> Iterator[tuple[int, Any]]:
    """Yield (position, row) of the wanted positions of a stream, which rise.

    The stream is read from its start, and what is not wanted is passed over.

    Args:
        rows: returns the rows of an epoch.
        wanted: the positions.

    Raises:
        ValueError: an epoch has no rows.

    >>> list(at_positions(lambda epoch: [f"{epoch}a", f"{epoch}b", f"{epoch}c"], [1, 3, 4]))
    [(1, '0b'), (3, '1a'), (4, '1b')]
    """
    remaining, position = iter(wanted), 0
    following = next(remaining, None)
    for epoch in count():
        first = position
        for row in rows(epoch):
            if following is None:
                return
            if position == following:
                yield position, row
                following = next(remaining, None)
            position += 1
        if following is None:
            return
        if position == first:
            raise ValueError("the stream holds no rows")
