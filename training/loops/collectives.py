"""Collective errors: if one rank fails, all ranks raise.

If only one rank raises, the others wait in their next collective until the process group times out
(30 minutes in Lightning). So the ranks exchange errors first, and then all raise or all continue.

Ranks may reach this exchange at very different times, for example when one rank encodes, decodes or
reads a slow disk. So they wait in a separate group with the timeout ``PATIENCE``. The next
collective in the group of the training then starts on all ranks at the same time.
"""

from __future__ import annotations

import traceback
from collections.abc import Callable, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any, Protocol, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")

# timeout for ranks that wait for one rank; a rank that dies is noticed at once
PATIENCE = timedelta(hours=6)
# at most one entry: (current world group, its patient group)
_patient: list[tuple[Any, Any]] = []


class Ranks(Protocol):
    """The ranks of a run: a :class:`~alphabar.training.loops.loop.Loop`, or a Trainer."""

    @property
    def is_global_zero(self) -> bool: ...

    @property
    def world_size(self) -> int: ...


class AgreedError(RuntimeError):
    """An error of one or more ranks, raised on every rank so that no rank waits for another."""


def patient_group() -> Any:
    """Return a gloo group of all ranks with the timeout ``PATIENCE``.

    The first call creates the group, so every rank must make it. Returns None, which means the
    default group, if torch has no gloo.
    """
    world = dist.group.WORLD
    if not _patient or _patient[0][0] is not world:
        made = (
            dist.new_group(backend="gloo", timeout=PATIENCE) if dist.is_gloo_available() else None
        )
        _patient[:] = [(world, made)]
    return _patient[0][1]


def any_rank(
    flags: Sequence[bool], world_size: int = 1, device: torch.device | str = "cpu"
) -> list[bool]:
    """Return for each flag whether any rank has set it.

    Every rank must call it, and every rank gets the same result.

    >>> any_rank([False, True])
    [False, True]
    """
    if world_size == 1:
        return list(flags)
    group = patient_group()
    votes = torch.tensor(flags, dtype=torch.int32, device=device if group is None else "cpu")
    dist.all_reduce(votes, dist.ReduceOp.MAX, group=group)
    return votes.bool().tolist()


def raise_on_all_ranks(error: BaseException | None, world_size: int = 1) -> None:
    """Raise AgreedError on every rank if any rank has an error. Every rank must call it.

    >>> raise_on_all_ranks(None)
    """
    words = errors_of_all_ranks(error, world_size)
    if words is not None:
        raise AgreedError(words) from error


def call_on_all_ranks(act: Callable[[], T], world_size: int = 1) -> T:
    """Call ``act()`` on every rank and return its result; if one rank fails, all ranks raise.

    A rank that fails raises its own error. The other ranks raise AgreedError.

    >>> call_on_all_ranks(lambda: 3)
    3
    """
    error: Exception | None = None
    result: Any = None
    try:
        result = act()
    except Exception as raised:
        error = raised
    words = errors_of_all_ranks(error, world_size)
    if words is None:
        return result
    raise error if error is not None else AgreedError(words)


def errors_of_all_ranks(error: BaseException | None, world_size: int = 1) -> str | None:
    """Return the errors of all ranks as text, or None if there is no error.

    Every rank must call it, and every rank gets the same result.

    >>> errors_of_all_ranks(None) is None
    True
    >>> errors_of_all_ranks(ValueError("no such colour"))
    'ValueError: no such colour'
    """
    own = _in_words(error) if error is not None else None
    if world_size == 1:
        return own
    words: list[str | None] = [None] * world_size
    dist.all_gather_object(words, own, group=patient_group())
    failed = [f"rank {rank}: {text}" for rank, text in enumerate(words) if text is not None]
    return "; ".join(failed) or None


def gather(own: Tensor, world_size: int = 1) -> Tensor:
    """Gather the tensors of all ranks: shape (world_size, ...), on the device of ``own``.

    Raises:
        AgreedError: on every rank, if the shapes differ. Such a gather would not end.

    >>> gather(torch.zeros(3)).shape
    torch.Size([1, 3])
    """
    if world_size == 1:
        return own[None]
    shapes: list[tuple[int, ...]] = [()] * world_size
    dist.all_gather_object(shapes, tuple(own.shape), group=patient_group())
    if len(set(shapes)) > 1:
        raise AgreedError(
            f"ranks have images of different shapes, {sorted(set(shapes))}; all must draw the same "
            "shape"
        )
    parts = [torch.empty_like(own) for _ in range(world_size)]
    dist.all_gather(parts, own.contiguous())
    return torch.stack(parts)


def sum_of_ranks(
    own: Tensor,
    world_size: int = 1,
    shares: int = 1,
    share: int = 0,
    device: torch.device | str = "cpu",
) -> Tensor:
    """Sum CPU tensors of equal shape over the shares, in their order: the same bits on every rank.

    Ranks with the same share have the same tensor, which counts once. Every rank must call it.

    Args:
        own: the tensor of this rank.
        world_size: number of ranks.
        shares: number of shares.
        share: the share of this rank.
        device: device of the exchange if torch has no gloo.

    >>> sum_of_ranks(torch.ones(2))
    tensor([1., 1.])
    """
    if world_size == 1:
        return own
    group = patient_group()
    sent = own.contiguous() if group is not None else own.to(device)
    parts = [torch.empty_like(sent) for _ in range(world_size)]
    dist.all_gather(parts, sent, group=group)
    owners: list[int] = [0] * world_size
    dist.all_gather_object(owners, share, group=group)
    total = torch.zeros_like(own)
    for k in range(shares):
        total += parts[owners.index(k)].to(own.device)
    return total


def on_rank_zero(ranks: Ranks, act: Callable[[], object]) -> None:
    """Call ``act`` on rank 0 only; if it raises, every rank raises. Every rank must call it.

    Rank 0 raises the original error. The other ranks raise OSError for an OSError and ValueError
    for any other error.
    """
    error: Exception | None = None
    if ranks.is_global_zero:
        try:
            act()
        except Exception as raised:
            error = raised
    told = _from_rank_zero(
        ranks, (isinstance(error, OSError), str(error)) if error is not None else None
    )
    if error is not None:
        raise error
    if told is not None:
        is_os_error, text = told
        raise (OSError if is_os_error else ValueError)(text)


def _from_rank_zero(ranks: Ranks, value: T) -> T:
    if ranks.world_size == 1:
        return value
    if not dist.is_initialized():  # a Trainer whose strategy does not use torch.distributed
        return cast(Any, ranks).strategy.broadcast(value)
    held: list[Any] = [value]
    dist.broadcast_object_list(held, src=0, group=patient_group())
    return held[0]


def _in_words(error: BaseException) -> str:
    """Return type, message and place of an error as text.

    The text does not hold the traceback, which would keep tensors alive.

    >>> try:
    ...     1 / 0
    ... except ZeroDivisionError as error:
    ...     _in_words(error).startswith("ZeroDivisionError: division by zero (")
    True
    """
    frames = traceback.extract_tb(error.__traceback__)
    # the innermost line of user code is more useful than the line in torch that raised
    own = [frame for frame in frames if "site-packages" not in Path(frame.filename).parts]
    place = "".join(
        f" ({Path(frame.filename).name}:{frame.lineno})" for frame in (own or frames)[-1:]
    )
    return f"{type(error).__name__}: {error}{place}"
