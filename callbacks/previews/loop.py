"""A rank's batches, drawn step by step in step with the other ranks: after every step they tell
each other how it went.

So an error, an exhausted memory, a signal or the end of the time on one rank is the same decision
on all, at once.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch

from ..support.collectives import any_rank, raise_on_all_ranks
from ..support.strategies import ShardedForwardError
from .render import Painted

Start = Callable[[Sequence[int]], Iterator["Painted | None"]]
"""Images -> their steps: None after each but the last, which is what they look like."""


@dataclass
class Rounds:
    """What limits the drawing on this rank, and how it went.

    ``batch_size``: of a forward; halved when any rank is out of memory, also for what is drawn
    later. ``deadline``: of ``time.monotonic()``, rank 0's counts. ``interrupted()``: whether to
    stop at once. ``tick()`` is called after each step.

    >>> from alphabar.callbacks.previews.render import paint
    >>> rounds = Rounds(batch_size=2)
    >>> drawn = rounds.draw(
    ...     [[0, 1], [2, 2]], lambda images: iter([None, paint(torch.zeros(len(images), 1, 4, 4))])
    ... )
    >>> drawn.pixels.shape, rounds.stopped
    (torch.Size([2, 2, 1, 4, 4]), '')
    """

    batch_size: int
    world_size: int = 1
    rank: int = 0
    device: torch.device | str = "cpu"
    deadline: float = math.inf
    interrupted: Callable[[], bool] = lambda: False
    tick: Callable[[], object] = lambda: None
    stopped: str = field(default="", init=False)
    """Why not all batches were drawn: '', 'time' or 'signal'; the same on every rank."""
    out_of_memory: bool = field(default=False, init=False)
    """Whether ``batch_size`` had to be halved."""

    def draw(self, batches: Sequence[Sequence[int]], start: Start) -> Painted:
        """Return the batches that were finished, pixels (batches, images, ...); raises AgreedError
        for an error on any rank.
        """
        drawn: list[Painted] = []
        while len(drawn) < len(batches) and not self.stopped:
            done = self._batch(batches[len(drawn)], start)
            if done is not None:
                drawn.append(done)
        if not drawn:
            return Painted(torch.empty(0, dtype=torch.uint8), torch.empty(0))
        return Painted(
            torch.stack([part.pixels for part in drawn]), torch.stack([part.nan for part in drawn])
        )

    def _batch(self, images: Sequence[int], start: Start) -> Painted | None:
        """Return a batch, drawn ``batch_size`` at a time, or None where it was broken off."""
        parts: list[Painted] = []
        for first in range(0, len(images), self.batch_size):
            part = self._part(images[first : first + self.batch_size], start)
            if part is None:
                return None
            parts.append(part)
        return Painted(
            torch.cat([part.pixels for part in parts]), torch.cat([part.nan for part in parts])
        )

    def _part(self, images: Sequence[int], start: Start) -> Painted | None:
        steps: Iterator[Painted | None] | None = None
        part: Painted | None = None
        while part is None:
            error: Exception | None = None
            try:
                steps = start(images) if steps is None else steps
                part = next(steps)
            except ShardedForwardError:  # the others cannot be told
                raise
            except torch.OutOfMemoryError as raised:
                error = raised.with_traceback(None)  # whose frames would keep what fills the memory
            except Exception as raised:
                error = raised
            if self._to_be_broken_off(error, finished=part is not None):
                return None
            self.tick()
        return part

    def _to_be_broken_off(self, error: Exception | None, finished: bool) -> bool:
        """Hear all ranks, and decide."""
        out_of_memory = isinstance(error, torch.OutOfMemoryError)
        limited = self.rank == 0 and self.deadline < math.inf
        late = limited and time.monotonic() > self.deadline and not finished
        flags = [error is not None and not out_of_memory, out_of_memory, self.interrupted(), late]
        failed, out_of_memory, signal, late = any_rank(flags, self.world_size, self.device)
        if failed or (out_of_memory and self.batch_size == 1):
            raise_on_all_ranks(error, self.world_size)
        if signal or late:
            self.stopped = "signal" if signal else "time"
            return True
        if out_of_memory:
            self.batch_size, self.out_of_memory = math.ceil(self.batch_size / 2), True
            _free(torch.device(self.device))
        return out_of_memory


def _free(device: torch.device) -> None:
    """Give cached memory back, in whose pieces the smaller batch might not fit."""
    if device.type != "cpu":
        torch.get_device_module(device.type).empty_cache()
