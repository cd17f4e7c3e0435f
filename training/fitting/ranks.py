"""The ranks that fit a table together."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..loops.collectives import any_rank, errors_of_all_ranks, sum_of_ranks
from ..loops.forward import ShardedForwardError


class StoppedFit(RuntimeError):
    """A fit that was stopped, by a signal or by the time limit."""


class StoppedElsewhere(RuntimeError):
    """A fit that another rank stopped."""


@dataclass
class FittingRanks:
    """The ranks that fit a table together: seeds of each, sums over all, and errors that agree.

    Every sum is also a vote: if a rank has failed, all others raise there instead of waiting.

    Args:
        world_size: number of ranks.
        shares: number of shares of the seeds. Ranks of a tensor-parallel group have the same share.
        share: this rank's share.
        device: device of the votes where there is no gloo.
    """

    world_size: int = 1
    shares: int = 1
    share: int = 0
    device: torch.device | str = "cpu"
    _stop: Callable[[], bool] = lambda: False
    _voted: bool = False

    def together(self, stop: Callable[[], bool]) -> FittingRanks:
        """Return a context for one fit; at its end all ranks learn whether one of them failed."""
        self._stop, self._voted = stop, False
        return self

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: type[BaseException] | None, error: Any, _: object) -> None:
        if self._voted or (kind is not None and issubclass(kind, ShardedForwardError)):
            return
        (failed,) = any_rank([error is not None], self.world_size, self.device)
        if failed and error is None:
            raise StoppedElsewhere("another rank stopped it")

    def reasons(self, error: Exception) -> str:
        """Return the errors of all ranks after a fit that ended on every one, in words."""
        own = None if isinstance(error, StoppedElsewhere) else error
        return errors_of_all_ranks(own, self.world_size) or str(error)

    def look(self) -> None:
        """Raise StoppedFit if this rank is told to stop."""
        if self._stop():
            raise StoppedFit("it was told to stop")

    def sum(self, values: Tensor) -> Tensor:
        """Return the sum of a CPU tensor over the shares, the same bits on every rank."""
        self.look()
        (failed,) = any_rank([False], self.world_size, self.device)
        if failed:
            self._voted = True
            raise StoppedElsewhere("another rank stopped it")
        return sum_of_ranks(values, self.world_size, self.shares, self.share, self.device)

    def own_seeds(self, first: int, count: int) -> list[int]:
        """Return this rank's part of at least ``count`` seeds: as many on every rank.

        >>> FittingRanks(4, shares=4, share=1).own_seeds(100, 6)
        [101, 105]
        """
        each = -(-count // self.shares)
        return [first + self.share + k * self.shares for k in range(each)]
