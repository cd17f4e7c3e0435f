"""The kinds of training noise by their names; what a kind is, noise_base.py says."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from importlib.util import find_spec
from typing import ClassVar

import torch
from torch import Tensor

from .items import made
from .noise_base import Chain, Noise


@dataclass(frozen=True)
class Gaussian(Noise):
    """Independent standard normal noise: nothing beside ε.

    >>> Gaussian().draw((3,), torch.Generator(), step=0)
    tensor([])
    """

    name: ClassVar[str] = "gaussian"

    def draw(self, shape: tuple[int, ...], generator: torch.Generator, step: int) -> Tensor:
        return torch.empty(0, dtype=torch.float32)

    def apply(self, noise: Tensor, part: Tensor, x0: Tensor) -> Tensor:
        return noise


@dataclass(frozen=True)
class Offset(Noise):
    """Offset noise: ε + s · ξ with one ξ ~ N(0, 1) per channel, constant over the other axes (Guttenberg 2023).

    The mean of a channel then has variance s² more. The target is made of the offset noise as well. ``random_strength``: s is
    drawn from U(0, strength), for each sample. ``probability``: of a sample to get an offset at all.
    ValueError for a negative or infinite strength, and for a probability outside 0 ... 1.

    >>> Offset(0.1).draw((3, 8, 8), torch.Generator().manual_seed(0), step=0).shape
    torch.Size([3, 1, 1])
    """

    name: ClassVar[str] = "offset"
    strength: float = 0.1
    random_strength: bool = False
    probability: float = 1.0

    def __post_init__(self) -> None:
        _require_strength("noise offset", self.strength, "0.05 to 0.1 are usual")
        if not 0 <= self.probability <= 1:
            raise ValueError(f"the probability of a noise offset must lie in 0 ... 1, got {self.probability}")

    def draw(self, shape: tuple[int, ...], generator: torch.Generator, step: int) -> Tensor:
        part = self.strength * _per_channel(shape, generator)
        if self.random_strength:
            part *= torch.rand(1, generator=generator, dtype=torch.float32)
        if self.probability < 1:
            part *= torch.rand(1, generator=generator, dtype=torch.float32) < self.probability
        return part

    def apply(self, noise: Tensor, part: Tensor, x0: Tensor) -> Tensor:
        return noise + part


@dataclass(frozen=True)
class AdaptiveOffset(Noise):
    """Offset noise whose strength follows the sample: s = max(0, strength + scale · |mean of the channel of x_0|).

    kohya's --noise_offset with --adaptive_noise_scale. The target is made of the offset noise as well. ``scale`` may be
    negative. ValueError for a negative or infinite strength and an infinite scale.

    >>> kind = AdaptiveOffset(strength=0.0, scale=0.5)
    >>> kind.apply(torch.zeros(1, 1, 2), torch.ones(1, 1, 1), torch.tensor([[[-2.0, -1.0]]]))
    tensor([[[0.7500, 0.7500]]])
    """

    name: ClassVar[str] = "adaptive_offset"
    strength: float = 0.1
    scale: float = 0.1

    def __post_init__(self) -> None:
        _require_strength("noise offset", self.strength, "0.05 to 0.1 are usual")
        if not abs(self.scale) < float("inf"):
            raise ValueError(f"the scale of an adaptive noise offset must be finite, got {self.scale}")

    def draw(self, shape: tuple[int, ...], generator: torch.Generator, step: int) -> Tensor:
        return _per_channel(shape, generator)

    def apply(self, noise: Tensor, part: Tensor, x0: Tensor) -> Tensor:
        mean = x0.to(noise.dtype).flatten(2).mean(2) if x0.ndim > 2 else x0.to(noise.dtype)
        strength = (self.strength + self.scale * mean.abs()).clamp(min=0.0)
        return noise + strength.view(part.shape) * part


@dataclass(frozen=True)
class Pyramid(Noise):
    """Pyramid (multi-resolution) noise: ε plus ``discount``^i times noise on grids r^i coarser, r ~ U(2, 4) (Whitaker 2023).

    As in kohya's --multires_noise_iterations and --multires_noise_discount: i from 0, so that the first is another white noise;
    the grids are enlarged linearly, and the last has one cell along an axis. Given the grids, each element is divided by its own
    exact standard deviation, so the variance is 1 everywhere (kohya divides by the measured one of the whole batch). The target
    is made of the pyramid as well. ValueError for fewer than 1 iteration, for a discount outside 0 ... 1, and for samples
    without an axis beside the channels.

    >>> Pyramid(discount=0.3).draw((3, 8, 8), torch.Generator().manual_seed(0), step=0).shape
    torch.Size([4, 8, 8])
    """

    name: ClassVar[str] = "pyramid"
    iterations: int = 6
    discount: float = 0.3

    def __post_init__(self) -> None:
        if self.iterations < 1 or not 0 <= self.discount <= 1:
            raise ValueError(
                "pyramid noise needs at least 1 iteration and a discount in 0 ... 1, "
                f"got {self.iterations} and {self.discount}; 6 and 0.3 are usual"
            )

    def draw(self, shape: tuple[int, ...], generator: torch.Generator, step: int) -> Tensor:
        """Return what is added to ε, and below its channels the factor that makes the variance of the sum 1."""
        if len(shape) < 2:
            raise ValueError(f"pyramid noise needs samples with axes beside the channels, got shape {shape}")
        total, variance = torch.zeros(shape, dtype=torch.float32), torch.ones(shape[1:], dtype=torch.float64)
        for i in range(self.iterations):
            r = 2 + 2 * float(torch.rand((), generator=generator, dtype=torch.float64))
            grid = tuple(max(1, int(n / r**i)) for n in shape[1:])
            octave = torch.randn((shape[0], *grid), generator=generator, dtype=torch.float32)
            spread = torch.ones((), dtype=torch.float64)
            for axis, (coarse, fine) in enumerate(zip(grid, shape[1:], strict=True), start=1):
                enlarge = _linear_enlargement(coarse, fine)
                octave = (octave.movedim(axis, -1) @ enlarge.T.float()).movedim(-1, axis)
                spread = spread[..., None] * enlarge.square().sum(1)
            total += self.discount**i * octave
            variance += self.discount ** (2 * i) * spread
            if 1 in grid:
                break
        return torch.cat([total, variance.rsqrt().float()[None]])

    def apply(self, noise: Tensor, part: Tensor, x0: Tensor) -> Tensor:
        return (noise + part[:, :-1]) * part[:, -1:]


@dataclass(frozen=True)
class InputPerturbation(Noise):
    """Input perturbation: x_t is made of ε + γ ξ, the target of ε alone (Ning et al. 2301.11706, algorithm 1; γ = 0.1).

    ``random_strength``: γ is drawn from U(0, strength), for each sample. ``decay_steps``: γ falls linearly to 0 over so many
    optimizer steps. ValueError for a negative or infinite strength, and for fewer than 1 step.

    >>> InputPerturbation(0.1).changes_target
    False
    """

    name: ClassVar[str] = "input_perturbation"
    strength: float = 0.1
    random_strength: bool = False
    decay_steps: int | None = None

    def __post_init__(self) -> None:
        _require_strength("input perturbation", self.strength, "the paper uses 0.1")
        if self.decay_steps is not None and self.decay_steps < 1:
            raise ValueError(f"decay_steps of an input perturbation must be at least 1, got {self.decay_steps}")

    @property
    def changes_target(self) -> bool:
        return False

    def draw(self, shape: tuple[int, ...], generator: torch.Generator, step: int) -> Tensor:
        part = torch.randn(shape, generator=generator, dtype=torch.float32)
        if self.random_strength:
            part *= torch.rand(1, generator=generator, dtype=torch.float32)
        left = 1.0 if self.decay_steps is None else max(0.0, 1 - step / self.decay_steps)
        return part * (self.strength * left)

    def apply(self, noise: Tensor, part: Tensor, x0: Tensor) -> Tensor:
        return noise + part


@dataclass(frozen=True)
class Immiscible(Noise):
    """Immiscible noise: the batch's noises are given to its samples with the least total distance (Li et al. 2406.12303).

    The permutation is the exact solution of the linear assignment, and the target follows it. It is found within the batch of one
    process: the noises are the same for every number of processes and every accumulation, which sample gets which is not. Put it
    last in a chain. On a GPU the host waits for the distances, once a batch. ImportError without scipy (alphabar[immiscible]).

    >>> noise, x0 = torch.tensor([[1.0], [-1.0]]), torch.tensor([[-3.0], [2.0]])
    >>> Immiscible().apply(noise, torch.empty(2, 0), x0)
    tensor([[-1.],
            [ 1.]])
    """

    name: ClassVar[str] = "immiscible"

    def __post_init__(self) -> None:
        if find_spec("scipy") is None:
            raise ImportError(
                "immiscible noise needs scipy for its linear assignment; pip install 'alphabar[immiscible]'"
            )

    def draw(self, shape: tuple[int, ...], generator: torch.Generator, step: int) -> Tensor:
        return torch.empty(0, dtype=torch.float32)

    def apply(self, noise: Tensor, part: Tensor, x0: Tensor) -> Tensor:
        from scipy.optimize import linear_sum_assignment

        # by differences: by products the distances, which differ little in many dimensions, would lose their digits
        exact = "donot_use_mm_for_euclid_dist"
        with torch.no_grad():
            distance = torch.cdist(x0.to(noise.dtype).flatten(1), noise.flatten(1), compute_mode=exact)
        _, chosen = linear_sum_assignment(distance.cpu().numpy())
        return noise[torch.as_tensor(chosen).to(noise.device)]


NOISES: Mapping[str, Callable[[], Noise]] = {
    kind.name: kind for kind in (Gaussian, Offset, AdaptiveOffset, Pyramid, InputPerturbation, Immiscible)
}
"""Every kind of noise by its name; a new one is a class above and a word in this line."""


def resolve_noise(noise: str | Noise | Chain | Sequence[str | Noise]) -> Noise | Chain:
    """Return the kind of noise for a name, with options or without, an object, or a sequence of them.

    An unknown name or option is a ValueError.

    >>> resolve_noise("offset:strength=0.05")
    Offset(strength=0.05, random_strength=False, probability=1.0)
    >>> resolve_noise(["offset", "input_perturbation"]).name
    'offset + input_perturbation'
    """
    if isinstance(noise, Noise | Chain):
        return noise
    if isinstance(noise, Sequence) and not isinstance(noise, str):
        return Chain(tuple(kind for one in noise for kind in resolve_noise(one).kinds))
    return made("noise", noise, NOISES)


def _require_strength(what: str, strength: float, usual: str) -> None:
    if not 0 <= strength < float("inf"):
        raise ValueError(f"{what} strength must be at least 0, got {strength}; {usual}")


def _per_channel(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    return torch.randn((shape[0],) + (1,) * (len(shape) - 1), generator=generator, dtype=torch.float32)


@lru_cache(maxsize=256)
def _linear_enlargement(coarse: int, fine: int) -> Tensor:
    """Return the matrix of linear interpolation from ``coarse`` cells to ``fine``, shape (fine, coarse), float64."""
    one_hot = torch.eye(coarse, dtype=torch.float64)[None]
    return torch.nn.functional.interpolate(one_hot, size=fine, mode="linear", align_corners=False)[0].T
