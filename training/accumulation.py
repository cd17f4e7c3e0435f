"""Where a batch lies in the optimizer step that a Lightning Trainer is about to make.

Lightning repeats ``global_step`` for the batches that it accumulates, and steps early at the end of
an epoch; the last batch of an epoch may be smaller, on one rank and not on another; a closure may
ask for the same batch again (LBFGS); under tensor parallelism several ranks see the same data. So
the batches of a step are told apart by their numbers, and their samples are counted.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from lightning.pytorch import Trainer


class Batch(NamedTuple):
    """``start``: the samples before this batch in its optimizer step on this rank, ``full``: the
    size of a full batch.
    """

    start: int
    full: int


class Accumulation:
    """Counts the samples of the optimizer step that is under way.

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
        """Return the place of the batch with this ``number``, (epoch, batch); the same one for the
        same number.

        ``micro_batch``: how many batches of the step went before it, which counts where they were
        not seen, after a resume.
        """
        if step != self._step:
            self._step, self._starts, self._full = step, {}, max(samples, full)
            self._next = micro_batch * self._full
        if number not in self._starts:
            self._starts[number] = self._next
            self._next += samples
        return Batch(self._starts[number], self._full)


def replicas(trainer: Trainer) -> tuple[int, int]:
    """Return (rank, number) of the replicas of the model that see different data: what Lightning
    gives the sampler.
    """
    kwargs = trainer.distributed_sampler_kwargs or {}
    return kwargs.get("rank", 0), kwargs.get("num_replicas", 1)


def full_batch(loader: Any) -> int:
    """Return the number of samples in a full batch of a dataloader, 0 where it does not say.

    >>> from torch.utils.data import DataLoader
    >>> full_batch(DataLoader(range(10), batch_size=4)), full_batch([])
    (4, 0)
    """
    for holder in (loader, getattr(loader, "batch_sampler", None)):
        size = getattr(holder, "batch_size", None)
        if isinstance(size, int):
            return size
    return 0
