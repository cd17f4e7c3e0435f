"""The position of a batch in the current optimizer step of a Lightning Trainer.

``global_step`` is not enough to find this position:

- Lightning repeats ``global_step`` for all batches that it accumulates, and makes an optimizer step
  early at the end of an epoch.
- The last batch of an epoch may be smaller, on one rank and not on another.
- A closure may request the same batch again (LBFGS).
- Under tensor parallelism, several ranks see the same data.

So the batches of a step are identified by their numbers, and their samples are counted.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from lightning.pytorch import Trainer
from torch.utils.data import DistributedSampler


class Batch(NamedTuple):
    """Position of a batch in its optimizer step.

    Args:
        start: number of samples before this batch in the step, on this rank.
        full: size of a full batch.
    """

    start: int
    full: int


class Accumulation:
    """Count the samples of the current optimizer step.

    >>> counted = Accumulation()
    >>> [
    ...     counted.batch(step, (0, i), i % 2, samples, 4).start
    ...     for step, i, samples in [(0, 0, 4), (0, 1, 4), (1, 2, 4), (1, 3, 1)]
    ... ]
    [0, 4, 0, 4]
    """

    def __init__(self) -> None:
        self._step: int | None = None
        self._starts: dict[tuple[int, int], int] = {}
        self._next = self._full = 0

    def batch(
        self, step: int, number: tuple[int, int], micro_batch: int, samples: int, full: int
    ) -> Batch:
        """Return the position of a batch; the same ``number`` always gets the same position.

        Args:
            step: the optimizer step.
            number: (epoch, batch).
            micro_batch: number of batches of the step before this one. It is used if this object
                has not seen them, i.e. after a resume.
            samples: number of samples in the batch.
            full: size of a full batch, 0 if unknown.
        """
        if step != self._step:
            self._step, self._starts, self._full = step, {}, max(samples, full)
            self._next = micro_batch * self._full
        if number not in self._starts:
            self._starts[number] = self._next
            self._next += samples
        return Batch(self._starts[number], self._full)


def replicas(trainer: Trainer) -> tuple[int, int]:
    """Return (rank, number) of the model replicas that see different data.

    These are the values that Lightning passes to the sampler of the data.
    """
    kwargs = trainer.distributed_sampler_kwargs or {}
    return kwargs.get("rank", 0), kwargs.get("num_replicas", 1)


def full_batch(loader: Any) -> int:
    """Return the number of samples in a full batch of a dataloader, or 0 if it is unknown.

    >>> from torch.utils.data import DataLoader
    >>> full_batch(DataLoader(range(10), batch_size=4)), full_batch([])
    (4, 0)
    """
    for holder in (loader, getattr(loader, "batch_sampler", None)):
        size = getattr(holder, "batch_size", None)
        if isinstance(size, int):
            return size
    return 0


def samples_of(loaders: Any, number: int) -> int | None:
    """Return the size of the data that a DistributedSampler splits with repetitions, or None.

    Args:
        loaders: a dataloader, or a sequence or mapping of them.
        number: number of the dataloader.

    >>> from torch.utils.data import DataLoader, DistributedSampler
    >>> sampler = DistributedSampler(range(5), num_replicas=2, rank=0, shuffle=False)
    >>> samples_of([DataLoader(range(5), sampler=sampler)], 0), samples_of(DataLoader([1]), 0)
    (5, None)
    """
    if isinstance(loaders, Mapping):
        loaders = list(loaders.values())
    loader = loaders[number] if isinstance(loaders, Sequence) else loaders
    sampler = getattr(loader, "sampler", None)
    if not isinstance(sampler, DistributedSampler) or sampler.drop_last:
        return None
    dataset: Any = sampler.dataset
    return len(dataset)
