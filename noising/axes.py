"""Times along an axis: k times for a sample, one for each of its frames, chunks or tokens.

Times of shape (batch, k) belong to one axis of x. If the axis has more than k places, each time is
that of a chunk of places next to each other.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from .utils.registry import lookup
from .utils.validation import whole_number

Axis = int | str

AXES = {"frames": 2, "tokens": 1}
"""Axes by name: frames of (batch, channels, frames, height, width), tokens of (batch, tokens,
channels).
"""


def axis_of(axis: Axis, shape: Sequence[int]) -> int:
    """Return an axis of x as its number, counted from the front.

    Raises ValueError for an unknown name, for the batch axis, and for one that x does not have.

    >>> axis_of("frames", (2, 3, 8, 16, 16)), axis_of(-1, (2, 3, 8))
    (2, 2)
    >>> axis_of("frames", (2, 8))
    Traceback (most recent call last):
    ValueError: x of shape (2, 8) has no axis 2 after the batch; give axis=, the axis of the times
    """
    number = lookup("axis", axis, AXES) if isinstance(axis, str) else whole_number("axis", axis)
    counted = number + len(shape) if number < 0 else number
    if not 0 < counted < len(shape):
        raise ValueError(
            f"x of shape {tuple(shape)} has no axis {number} after the batch; give axis=, the axis "
            "of the times"
        )
    return counted


def require_chunks(k: int, axis: Axis, shape: Sequence[int]) -> int:
    """Return the axis as a number; raise ValueError unless it divides into ``k`` chunks.

    >>> require_chunks(3, "frames", (2, 3, 8, 16, 16))
    Traceback (most recent call last):
    ValueError: axis 2 of x, 8 long, does not divide into 3 chunks of one time each
    """
    number = axis_of(axis, shape)
    if k < 1 or shape[number] % k:
        raise ValueError(
            f"axis {number} of x, {shape[number]} long, does not divide into {k} chunks of one "
            "time each"
        )
    return number


def along(values: Tensor, shape: Sequence[int], axis: Axis | None) -> Tensor:
    """Return values of the times so that they broadcast to x of a shape.

    Args:
        values: shape (..., batch), or (..., batch, k) with an axis; in front, x has no axes.
        shape: shape of x, (batch, ...).
        axis: the axis of the k times.

    >>> import torch
    >>> along(torch.tensor([[1.0, 2.0]]), (1, 4, 3), "tokens").squeeze()
    tensor([1., 1., 2., 2.])
    """
    after = len(shape) - 1
    if axis is None:
        return values.view(*values.shape, *[1] * after)
    k = values.shape[-1]
    number = require_chunks(k, axis, shape)
    if k != shape[number]:
        values = values.repeat_interleave(shape[number] // k, dim=-1)
    return values.view(
        *values.shape[:-1], *[1] * (number - 1), shape[number], *[1] * (after - number)
    )


def means_along(values: Tensor, k: int, axis: Axis) -> Tensor:
    """Return the mean of each of the k chunks of an axis, shape (batch, k).

    >>> import torch
    >>> means_along(torch.tensor([[1.0, 3.0, 5.0, 7.0]]), 2, 1)
    tensor([[2., 6.]])
    """
    number = require_chunks(k, axis, values.shape)
    chunks = values.unflatten(number, (k, values.shape[number] // k))
    return chunks.movedim(number, 1).flatten(2).mean(2)


def weighted_mean(level: Tensor, parts: Tensor, whole: Tensor) -> Tensor:
    """Return the mean of level · part over the parts of each sample, shape (batch,).

    It is the least level times the mean of all, plus the mean of the rest: without cancellation,
    and with equal levels the number itself that one level for the sample gives.

    Args:
        level: weight of each part, shape (batch, k).
        parts: mean of each part, shape (batch, k).
        whole: mean of the sample, the mean of its parts, shape (batch,).

    >>> import torch
    >>> weighted_mean(torch.tensor([[1.0, 3.0]]), torch.tensor([[2.0, 4.0]]), torch.tensor([3.0]))
    tensor([7.])
    """
    least = level.detach().amin(1)
    return least * whole + ((level - least[:, None]) * parts).mean(1)
