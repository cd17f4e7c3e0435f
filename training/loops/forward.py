"""Forwards between training steps: which of them are collectives, and what their errors mean.

If the model is sharded, every forward is a collective, so all ranks must make the same number of
forwards. If a forward fails on one rank, the ranks cannot vote on it, because the other ranks wait
in that forward.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist


class ShardedForwardError(RuntimeError):
    """A forward of a sharded model failed.

    It ends training on every rank, because the ranks can no longer exchange errors.
    """


@dataclass(frozen=True)
class ForwardMode:
    """How to call the model outside the training step.

    Args:
        sharded: a forward is a collective.
        wrapped: a forward must go through the wrapper of the strategy.
        exit_after: seconds between an error in a sharded forward and the end of the process. None:
            the process does not end.
    """

    sharded: bool = False
    wrapped: bool = False
    exit_after: float | None = None


def guarded(function: Callable[..., Any], mode: ForwardMode) -> Callable[..., Any]:
    """Return ``function``; for a sharded model its errors are raised as ShardedForwardError.

    The other ranks wait in that forward until this process ends or the process group's timeout has
    passed. With ``mode.exit_after`` this process ends in any case.

    >>> guarded(abs, ForwardMode()) is abs
    True
    >>> guarded(abs, ForwardMode(sharded=True))("a")
    Traceback (most recent call last):
    alphabar.training.loops.forward.ShardedForwardError: TypeError: bad operand type for abs...
    """
    if not mode.sharded:
        return function

    def call(*args: Any, **kwargs: Any) -> Any:
        try:
            return function(*args, **kwargs)
        except Exception as error:
            if mode.exit_after is not None:
                _end_soon(mode.exit_after)
            raise ShardedForwardError(
                f"{type(error).__name__}: {error} (inside a forward of the sharded model: training "
                "ends on all ranks; "
                "where this speaks of a lost connection, another rank failed first)"
            ) from error

    return call


def require_exit_after(seconds: float | None) -> float | None:
    """Return ``exit_after_error``, or raise ValueError unless it is a number of seconds or None.

    >>> require_exit_after(-1.0)
    Traceback (most recent call last):
    ValueError: exit_after_error must be seconds, at least 0, or None, got -1.0
    """
    if seconds is not None and not seconds >= 0:
        raise ValueError(f"exit_after_error must be seconds, at least 0, or None, got {seconds}")
    return seconds


def _end_soon(seconds: float) -> None:
    """End this process after ``seconds``, so that loggers can finish in this time.

    Aborting the process group instead would not reach the other ranks.
    """
    if dist.is_initialized() and dist.get_world_size() > 1:
        timer = threading.Timer(seconds, os._exit, [1])
        timer.daemon = True  # does not delay a normal exit
        timer.start()
