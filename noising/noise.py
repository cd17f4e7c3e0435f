"""Kinds of training noise. Each says whether the target sees what it adds, or only x_t does.

A kind draws the noise of one sample from that sample's own generator, so that it depends on nothing else in the batch.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from .registry import lookup


@dataclass(frozen=True)
class Noise(ABC):
    """A kind of noise; subclasses draw one sample's.

    >>> Gaussian().draw((1, 2, 2), torch.Generator().manual_seed(0)).shape
    torch.Size([1, 2, 2])
    """

    name: ClassVar[str]
    changes_target: ClassVar[bool] = True
    """Whether the target is made of this noise too. Where False, the target keeps the plain Gaussian part."""

    @abstractmethod
    def draw(self, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
        """Return the noise of one sample, float32 on the CPU, shape ``shape`` (no batch axis)."""


@dataclass(frozen=True)
class Gaussian(Noise):
    """Independent standard normal noise.

    >>> Gaussian().draw((3,), torch.Generator().manual_seed(0)).shape
    torch.Size([3])
    """

    name: ClassVar[str] = "gaussian"

    def draw(self, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
        return torch.randn(shape, generator=generator)


@dataclass(frozen=True)
class Offset(Noise):
    """Offset noise: ε + strength · ξ with one ξ per channel, constant over the other axes (Guttenberg 2023).

    The mean of a channel then has variance strength² more. The target is made of the offset noise as well.

    >>> Offset(0.1).draw((3, 8, 8), torch.Generator().manual_seed(0)).shape
    torch.Size([3, 8, 8])
    """

    name: ClassVar[str] = "offset"
    strength: float = 0.1

    def __post_init__(self) -> None:
        if not 0 <= self.strength < float("inf"):
            raise ValueError(f"noise offset strength must be at least 0, got {self.strength}; 0.05 to 0.1 are usual")

    def draw(self, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
        noise = torch.randn(shape, generator=generator)
        per_channel = torch.randn((shape[0],) + (1,) * (len(shape) - 1), generator=generator)
        return noise.add_(per_channel, alpha=self.strength)


NOISES: Mapping[str, type[Noise]] = {kind.name: kind for kind in (Gaussian, Offset)}
"""Every kind of noise by its name; a new one is a class above and a word in this line."""


def resolve_noise(noise: str | Noise) -> Noise:
    """Return the kind of noise for a name or an object; an unknown name is a ValueError that offers the nearest one.

    >>> resolve_noise("offset")
    Offset(strength=0.1)
    """
    return noise if isinstance(noise, Noise) else lookup("noise", noise, NOISES)()
