"""Assignment of images to batches and ranks.

Every rank has the same number of equal batches. The batches do not depend on the number of ranks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Plan:
    """``num_images`` in batches of ``batch_size``, assigned to ``world_size`` ranks in turn.

    Batch g starts at image g · batch_size, for any number of ranks. So an image always has the same
    place in a batch of the same size with the same other images. This matters because matrix
    products may round differently when these change. The last batch is padded with the last image,
    and a rank without a batch draws only that image. So every rank makes the same number of
    forwards.

    >>> Plan(num_images=5, batch_size=2, world_size=2).batches(rank=1)
    [[2, 3], [4, 4]]
    """

    num_images: int
    batch_size: int
    world_size: int = 1

    @property
    def rounds(self) -> int:
        """The number of batches per rank."""
        return -(-self.num_images // (self.batch_size * self.world_size))

    def batches(self, rank: int) -> list[list[int]]:
        """Return the image indices of each batch of ``rank``."""
        last = self.num_images - 1
        starts = [(k * self.world_size + rank) * self.batch_size for k in range(self.rounds)]
        return [[min(i, last) for i in range(start, start + self.batch_size)] for start in starts]

    def in_order(self, gathered: Tensor) -> Tensor:
        """Reshape (world_size, rounds, batch_size, ...) to (num_images, ...), image i at index i.

        >>> plan = Plan(num_images=5, batch_size=2, world_size=2)
        >>> plan.in_order(torch.tensor([plan.batches(rank) for rank in range(2)])).tolist()
        [0, 1, 2, 3, 4]
        """
        return gathered.transpose(0, 1).flatten(0, 2)[: self.num_images]


def take_rows(
    values: Mapping[str, Any], indices: Sequence[int], device: torch.device | str | None = "cpu"
) -> dict[str, Any]:
    """Select rows of every tensor in a (nested) mapping, list or tuple.

    A tensor with a single row gives that row to every image. The rows are moved to ``device``; with
    None they stay on their device. Other values are passed on unchanged.

    >>> take_rows({"y": torch.arange(4), "deep": {"z": torch.ones(1, 2)}, "scale": 0.5}, [1, 3])
    {'y': tensor([1, 3]), 'deep': {'z': tensor([[1., 1.],
            [1., 1.]])}, 'scale': 0.5}
    """

    def taken(value: Any) -> Any:
        if isinstance(value, Mapping):
            return take_rows(value, indices, device)
        if type(value) in (list, tuple):
            return type(value)(taken(part) for part in value)
        if not isinstance(value, Tensor):
            return value
        rows = [0] * len(indices) if value.shape[0] == 1 else list(indices)
        return value[rows].to(device=device)

    return {key: taken(value) for key, value in values.items()}


def require_rows(name: str, values: Mapping[Any, Any], num_images: int) -> None:
    """Raise ValueError unless every tensor in a (nested) mapping has a row per image or one row.

    Lists and tuples are searched too.

    >>> require_rows("conditioning", {"y": torch.zeros(3, 2)}, 4)
    Traceback (most recent call last):
    ValueError: conditioning 'y' must have a row for each of 4 images (or one for all), got ...
    """
    for key, value in values.items():
        if isinstance(value, Mapping):
            require_rows(f"{name} {key!r}", value, num_images)
        elif type(value) in (list, tuple):
            require_rows(f"{name} {key!r}", dict(enumerate(value)), num_images)
        elif isinstance(value, Tensor) and (
            value.ndim == 0 or value.shape[0] not in (1, num_images)
        ):
            rows = f"a row for each of {num_images} images (or one for all)"
            raise ValueError(f"{name} {key!r} must have {rows}, got shape {tuple(value.shape)}")
