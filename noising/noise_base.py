"""What a kind of training noise is: what it adds to the plain Gaussian ε, and whether the target sees it.

    x_t = α x_0 + σ ε_x,    target = c0 x_0 + c1 ε_y,    where ε_y = ε with the kinds that change the target,
                                                         and   ε_x = ε_y with the kinds that do not.

A kind draws its parts for the whole batch from counters (counter.py), so that the part of a sample depends on nothing else
in the batch; on the device of x_0 the parts are put onto ε, by operations that round alike on every device.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from .utils.rng import Draws, stream_of


@dataclass(frozen=True)
class Noise(ABC):
    """A kind of noise; subclasses have a ``name`` of their own, draw the parts of a batch and put them onto the noise.

    The name is the stream that a kind draws from: kinds of different names are independent of each other.

    >>> class Flicker(Noise):  # one number for a sample
    ...     name = "flicker"
    ...     def draw(self, shape, draws):
    ...         return 0.1 * draws.normal(*(1 for _ in shape))
    ...     def apply(self, noise, part, x0):
    ...         return noise + part
    >>> parts = draw_kinds([Flicker()], (3, 8, 8), 0, [4, 5], step=7)
    >>> Flicker().apply(torch.zeros(2, 3, 8, 8), parts[0], torch.zeros(2, 3, 8, 8)).shape
    torch.Size([2, 3, 8, 8])
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
    def draw(self, shape: tuple[int, ...], draws: Draws) -> Tensor:
        """Return this kind's parts of a batch of samples of shape ``shape`` (no batch axis): shape (batch, ...), float32.

        ``draws`` has ``normal(*shape)`` and ``uniform(*shape)``, which put the batch first and go on where the call before
        ended, and the optimizer ``step``. No row of the parts may depend on another: no mean over the batch, no shape that
        follows from what was drawn, and no operation (a matrix product, say) that rounds by a row's place in the batch.
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


def draw_kinds(
    kinds: Sequence[Noise],
    shape: tuple[int, ...],
    seed: int,
    index: Sequence[int] | Tensor,
    *,
    step: int,
    device: torch.device | str = "cpu",
) -> tuple[Tensor, ...]:
    """Return the parts of each kind for the samples with these global indices; of two kinds of one name the second is numbered.

    >>> from alphabar.noising import Offset
    >>> one, two = draw_kinds([Offset(1.0), Offset(1.0)], (3, 8, 8), 0, [4, 5], step=7)
    >>> one.shape, torch.equal(one, two)
    (torch.Size([2, 3, 1, 1]), False)
    """
    names = [kind.name for kind in kinds]
    streams = [stream_of(name, names[:k].count(name)) for k, name in enumerate(names)]
    return tuple(
        kind.draw(shape, Draws(seed, index, step=step, stream=stream, device=device))
        for kind, stream in zip(kinds, streams, strict=True)
    )


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
