"""What a kind of training noise is: what it adds to the plain Gaussian ε, and whether the target sees it.

    x_t = α x_0 + σ ε_x,    target = c0 x_0 + c1 ε_y,    where ε_y = ε with the kinds that change the target,
                                                         and   ε_x = ε_y with the kinds that do not.

A kind draws its part of one sample on the CPU from that sample's own generator, so that it depends on nothing else in
the batch; on the device of x_0 the parts of a batch are put onto ε, by operations that round alike on every device.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor


@dataclass(frozen=True)
class Noise(ABC):
    """A kind of noise; subclasses draw the part of one sample and put the parts of a batch onto the noise.

    >>> from alphabar.noising import Offset
    >>> kind = Offset(0.1)
    >>> part = kind.draw((3, 8, 8), torch.Generator().manual_seed(0), step=0)
    >>> kind.apply(torch.zeros(1, 3, 8, 8), part[None], torch.zeros(1, 3, 8, 8)).shape
    torch.Size([1, 3, 8, 8])
    """

    name: ClassVar[str]

    @property
    def changes_target(self) -> bool:
        """Whether the target is made of this noise too. Where False, the target keeps the noise without it."""
        return True

    @property
    def kinds(self) -> tuple[Noise, ...]:
        """The kinds that this consists of, in the order in which they are applied."""
        return (self,)

    @abstractmethod
    def draw(self, shape: tuple[int, ...], generator: torch.Generator, step: int) -> Tensor:
        """Return this kind's part of one sample of shape ``shape`` (no batch axis) at an optimizer step.

        Float32 on the CPU, of a shape that depends on ``shape`` alone.
        """

    @abstractmethod
    def apply(self, noise: Tensor, part: Tensor, x0: Tensor) -> Tensor:
        """Return ``noise``, shape (batch, ...), with the parts of this batch; ``x0`` is the clean batch. All on one device."""


@dataclass(frozen=True)
class Chain:
    """Several kinds, applied in this order; those that do not change the target come last in any case.

    ValueError for an empty chain; TypeError for what is no kind of noise.

    >>> from alphabar.noising import InputPerturbation, Offset
    >>> Chain((InputPerturbation(0.1), Offset(0.05))).name
    'offset + input_perturbation'
    """

    kinds: tuple[Noise, ...]

    def __post_init__(self) -> None:
        wrong = [type(one).__name__ for one in self.kinds if not isinstance(one, Noise | Chain)]
        if wrong:
            raise TypeError(f"a chain of noises is of Noise objects, got {wrong[0]}; names go to Noising(noise=[...])")
        kinds = [kind for one in self.kinds for kind in one.kinds]
        if not kinds:
            raise ValueError("a chain of noises needs at least one kind; e.g. ['offset', 'input_perturbation']")
        object.__setattr__(self, "kinds", tuple(sorted(kinds, key=lambda kind: not kind.changes_target)))

    @property
    def name(self) -> str:
        """The names of the kinds."""
        return " + ".join(kind.name for kind in self.kinds)

    @property
    def changes_target(self) -> bool:
        """Whether any of the kinds does."""
        return any(kind.changes_target for kind in self.kinds)


def apply_kinds(kinds: Sequence[Noise], noise: Tensor, parts: Sequence[Tensor], x0: Tensor) -> tuple[Tensor, Tensor]:
    """Return (ε_y, ε_x), the noise of the target and the noise of x_t; ``noise`` is the plain ε, shape of ``x0``.

    >>> from alphabar.noising import InputPerturbation
    >>> zero, part = torch.zeros(1, 2), torch.full((1, 2), 0.5)
    >>> apply_kinds([InputPerturbation()], zero, [part], zero)
    (tensor([[0., 0.]]), tensor([[0.5000, 0.5000]]))
    """
    for kind, part in zip(kinds, parts, strict=True):
        if kind.changes_target:
            noise = kind.apply(noise, part, x0)
    perturbed = noise
    for kind, part in zip(kinds, parts, strict=True):
        if not kind.changes_target:
            perturbed = kind.apply(perturbed, part, x0)
    return noise, perturbed
