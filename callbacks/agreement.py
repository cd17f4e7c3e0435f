"""Ranks that agree before they meet: an error on one rank becomes the same decision on all.

An exception that only one rank notices leaves the others waiting in their next collective until the process group times
out (30 minutes in Lightning). So errors are exchanged first, and raised or passed over on all ranks together.
"""

from __future__ import annotations

import traceback
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
from lightning.pytorch import Trainer
from torch import Tensor


def errors_of_all_ranks(error: BaseException | None, world_size: int = 1) -> str | None:
    """Return what went wrong on any rank in words, or None; every rank must call it, and every rank gets the same.

    >>> errors_of_all_ranks(None) is None
    True
    >>> errors_of_all_ranks(ValueError("no such colour"))
    'ValueError: no such colour'
    """
    own = _in_words(error) if error is not None else None
    if world_size == 1:
        return own
    words: list[str | None] = [None] * world_size
    dist.all_gather_object(words, own)
    failed = [f"rank {rank}: {text}" for rank, text in enumerate(words) if text is not None]
    return "; ".join(failed) or None


def gather(own: Tensor, world_size: int = 1) -> Tensor:
    """Return the tensors of all ranks, which must have equal shapes and devices, as one of shape (world_size, ...).

    >>> gather(torch.zeros(3)).shape
    torch.Size([1, 3])
    """
    if world_size == 1:
        return own[None]
    parts = [torch.empty_like(own) for _ in range(world_size)]
    dist.all_gather(parts, own.contiguous())
    return torch.stack(parts)


def on_rank_zero(trainer: Trainer, act: Callable[[], object]) -> None:
    """Call ``act`` on rank 0 alone; what it raises is raised on every rank, an OSError as such, others as ValueError.

    Every rank must call it.
    """
    error: Exception | None = None
    if trainer.is_global_zero:
        try:
            act()
        except Exception as raised:
            error = raised
    told = trainer.strategy.broadcast((isinstance(error, OSError), str(error)) if error is not None else None)
    if error is not None:
        raise error
    if told is not None:
        is_os_error, text = told
        raise (OSError if is_os_error else ValueError)(text)


def _in_words(error: BaseException) -> str:
    """Return type, message and place of an error, without its traceback, which would keep tensors alive.

    >>> try:
    ...     1 / 0
    ... except ZeroDivisionError as error:
    ...     _in_words(error).startswith("ZeroDivisionError: division by zero (")
    True
    """
    frames = traceback.extract_tb(error.__traceback__)
    # the innermost line of the user's own code says more than the line of torch that raised
    own = [frame for frame in frames if "site-packages" not in Path(frame.filename).parts]
    place = "".join(f" ({Path(frame.filename).name}:{frame.lineno})" for frame in (own or frames)[-1:])
    return f"{type(error).__name__}: {error}{place}"
