"""Shapes that must agree: torch would broadcast the others silently."""

from __future__ import annotations

from torch import Tensor


def require_same_shape(name: str, value: Tensor, like_name: str, like: Tensor) -> None:
    """Raise ValueError unless two tensors have the same shape.

    >>> import torch
    >>> require_same_shape("noise", torch.zeros(2), "x0", torch.zeros(3))
    Traceback (most recent call last):
    ValueError: noise must have the shape of x0, (3,), got (2,)
    """
    if value.shape != like.shape:
        raise ValueError(f"{name} must have the shape of {like_name}, {tuple(like.shape)}, got {tuple(value.shape)}")
