"""Sampling loop of one rank: after every sampling step the ranks exchange their state.

So all ranks make the same decision at once if one rank has an error, runs out of memory, receives a
signal or reaches the time limit.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch

from ..loops.collectives import any_rank, raise_on_all_ranks
from ..loops.forward import ShardedForwardError
from .render import Painted

Start = Callable[[Sequence[int]], Iterator["Painted | None"]]
"""Function from image indices to an iterator: None after each step, and the images at the end."""


@dataclass
class Rounds:
    """Limits of the sampling loop on this rank, and its outcome.

    Args:
        batch_size: batch size of a forward. It is halved when any rank runs out of memory, and
            stays halved for later batches.
        world_size: number of ranks.
        rank: index of this rank.
        device: device of the flags that ranks exchange, and of the memory that is freed.
        deadline: time limit on the clock ``time.monotonic()``. Only rank 0's value counts.
        interrupted: returns whether to stop at once.
        tick: called after each step.

    >>> from alphabar.training.previews.render import paint
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
    """Why the loop stopped early: '' (it did not), 'time' or 'signal'; the same on every rank."""
    out_of_memory: bool = field(default=False, init=False)
    """Whether ``batch_size`` was halved."""

    def draw(self, batches: Sequence[Sequence[int]], start: Start) -> Painted:
        """Draw batches and return the finished ones, with pixels of shape (batches, images, ...).

        Raises:
            AgreedError: any rank had an error.
        """
        drawn: list[Painted] = []
        while len(drawn) < len(batches) and not self.stopped:
            done = self._batch(batches[len(drawn)], start)
            if done is not None:
                drawn.append(done)
        self._wait_for_others()
        if self.stopped == "time":
            del drawn[self._drawn_everywhere(len(drawn), len(batches)) :]
        if not drawn:
            return Painted(torch.empty(0, dtype=torch.uint8), torch.empty(0))
        return Painted(
            torch.stack([part.pixels for part in drawn]), torch.stack([part.nan for part in drawn])
        )

    def _batch(self, images: Sequence[int], start: Start) -> Painted | None:
        """Return a batch, drawn ``batch_size`` images at a time, or None if it was stopped."""
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
            except ShardedForwardError:  # other ranks wait in the forward and cannot vote
                raise
            except torch.OutOfMemoryError as raised:
                error = raised.with_traceback(None)  # its frames would keep the memory in use
            except Exception as raised:
                error = raised
            if self._vote(error, finished=part is not None)[0]:
                return None
            self.tick()
        return part

    def _wait_for_others(self) -> None:
        """Vote until every rank has drawn its batches.

        A sampler with an adaptive number of steps needs more votes on one rank than on another.
        """
        busy, watching = True, False
        while busy and not self.stopped:
            _, busy = self._vote(None, finished=False, busy=False, watching=watching)
            watching = True

    def _drawn_everywhere(self, drawn: int, batches: int) -> int:
        """Return the number of batches that every rank has finished."""
        lacking = any_rank([drawn <= k for k in range(batches)], self.world_size, self.device)
        return [*lacking, True].index(True)

    def _vote(
        self, error: Exception | None, finished: bool, busy: bool = True, watching: bool = True
    ) -> tuple[bool, bool]:
        """Exchange flags with all ranks.

        Halves ``batch_size`` if any rank ran out of memory.

        Args:
            error: error of this rank.
            finished: the current part is finished, so the time limit does not stop it.
            busy: this rank has not drawn all of its batches.
            watching: look at the clock.

        Returns:
            Whether to stop the current part, and whether any rank is busy.

        Raises:
            AgreedError: any rank failed, or ran out of memory with ``batch_size`` 1.
        """
        out_of_memory = isinstance(error, torch.OutOfMemoryError)
        limited = self.rank == 0 and watching and self.deadline < math.inf
        late = limited and time.monotonic() > self.deadline and not finished
        flags = [
            error is not None and not out_of_memory,
            out_of_memory,
            self.interrupted(),
            late,
            busy,
        ]
        failed, out_of_memory, signal, late, busy = any_rank(flags, self.world_size, self.device)
        if failed or (out_of_memory and self.batch_size == 1):
            raise_on_all_ranks(error, self.world_size)
        if signal or late:
            self.stopped = "signal" if signal else "time"
            return True, busy
        if out_of_memory:
            self.batch_size, self.out_of_memory = math.ceil(self.batch_size / 2), True
            _free(torch.device(self.device))
        return out_of_memory, busy


def _free(device: torch.device) -> None:
    """Free cached memory: it is fragmented, and the smaller batch might not fit into its blocks."""
    if device.type != "cpu":
        torch.get_device_module(device.type).empty_cache()
