"""Training noise: the kinds of noise that are added to the plain Gaussian ε.

    x_t = α x_0 + σ ε_x,    target = c0 x_0 + c1 ε_y,
    ε_y = ε with the kinds that change the target,    ε_x = ε_y with the kinds that do not.

A kind draws its parts for the whole batch from counters (utils/rng.py). The part of a sample
therefore depends on nothing else in the batch. The parts are applied to ε on the device of x_0, by
operations that round alike on every device.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
from torch import Tensor

from .utils.items import make_item
from .utils.registry import Registry
from .utils.rng import Draws, Stream, stream_of


@dataclass(frozen=True)
class Noise(ABC):
    """Base class of a kind of noise.

    A subclass has its own ``name``, draws the parts of a batch (:meth:`draw`) and applies them to
    the noise (:meth:`apply`). The name selects the random stream: kinds with different names are
    independent of each other.

    >>> class Flicker(Noise):  # one number for a sample
    ...     name = "flicker"
    ...
    ...     def draw(self, shape, draws):
    ...         return 0.1 * draws.normal(*(1 for _ in shape))
    ...
    ...     def apply(self, noise, part, x0):
    ...         return noise + part
    >>> parts = draw_kinds([Flicker()], (3, 8, 8), 0, [4, 5], step=7)
    >>> Flicker().apply(torch.zeros(2, 3, 8, 8), parts[0], torch.zeros(2, 3, 8, 8)).shape
    torch.Size([2, 3, 8, 8])
    """

    name: ClassVar[str]
    batch_wide: ClassVar[bool] = False
    """Whether a sample's noise depends on the other samples of its batch."""

    @property
    def changes_target(self) -> bool:
        """Whether the target contains this noise. If False, only x_t contains it."""
        return True

    @property
    def kinds(self) -> tuple[Noise, ...]:
        """The kinds in this object, in the order in which they are applied."""
        return (self,)

    @abstractmethod
    def draw(self, shape: tuple[int, ...], draws: Draws) -> Tensor:
        """Return this kind's parts of a batch, shape (batch, ...), float32.

        No row of the parts may depend on another row: no mean over the batch, no shape that depends
        on drawn values, and no operation (e.g. a matrix product) whose rounding depends on the
        position of the row in the batch.

        ``shape``: shape of a sample, without the batch axis. ``draws``: has the methods
        ``normal(*shape)`` and ``uniform(*shape)``, which add the batch axis first and continue
        where the previous call ended, and the optimizer ``step``.
        """

    @abstractmethod
    def apply(self, noise: Tensor, part: Tensor, x0: Tensor) -> Tensor:
        """Return ``noise``, shape (batch, ...), with the parts of this batch applied.

        ``x0`` is the clean batch. All tensors are on one device.
        """


NOISES: Registry[type[Noise]] = Registry("noise")
"""The kinds of noise by name; decorate a class with ``@NOISES.register`` to add one."""


@NOISES.register
@dataclass(frozen=True)
class Gaussian(Noise):
    """Independent standard normal noise: ε alone.

    >>> Gaussian().draw((3,), Draws(0, [4, 5], step=0, stream=0)).shape
    torch.Size([2, 0])
    """

    name: ClassVar[str] = "gaussian"

    def draw(self, shape: tuple[int, ...], draws: Draws) -> Tensor:
        return torch.empty(draws.batch, 0, dtype=torch.float32, device=draws.device)

    def apply(self, noise: Tensor, part: Tensor, x0: Tensor) -> Tensor:
        return noise


@NOISES.register
@dataclass(frozen=True)
class Offset(Noise):
    """Offset noise: ε + s · ξ with one ξ ~ N(0, 1) per channel (Guttenberg 2023).

    ξ is constant over the other axes, so the variance of a channel's mean increases by s². The
    target contains the offset noise too.

    Args:
        strength: s, at least 0 and finite.
        random_strength: draw s from U(0, strength) for each sample.
        probability: probability that a sample gets an offset.

    Raises:
        ValueError: for a negative or infinite strength, and for a probability outside 0 ... 1.

    >>> Offset(0.1).draw((3, 8, 8), Draws(0, [4, 5], step=0, stream=0)).shape
    torch.Size([2, 3, 1, 1])
    """

    name: ClassVar[str] = "offset"
    strength: float = 0.1
    random_strength: bool = False
    probability: float = 1.0

    def __post_init__(self) -> None:
        _require_strength("noise offset", self.strength, "0.05 to 0.1 are usual")
        _require_probability(self.probability)

    def draw(self, shape: tuple[int, ...], draws: Draws) -> Tensor:
        part, one = self.strength * _per_channel(shape, draws), [1] * len(shape)
        if self.random_strength:
            part *= draws.uniform(*one)
        if self.probability < 1:
            part *= draws.uniform(*one) < self.probability
        return part

    def apply(self, noise: Tensor, part: Tensor, x0: Tensor) -> Tensor:
        return noise + part


@NOISES.register
@dataclass(frozen=True)
class AdaptiveOffset(Noise):
    """Offset noise of strength s = max(0, strength + scale · |mean of the channel of x_0|).

    This is kohya's --noise_offset with --adaptive_noise_scale. The target contains the offset noise
    too.

    Args:
        strength: strength before the scale is added, at least 0 and finite.
        scale: factor of the channel's mean; may be negative.
        random_strength: draw the strength before the scale is added from U(0, strength).
        probability: probability that a sample gets an offset.

    Raises:
        ValueError: for a negative or infinite strength, an infinite scale, and a probability
            outside 0 ... 1.

    >>> kind = AdaptiveOffset(strength=0.0, scale=0.5)
    >>> kind.apply(torch.zeros(1, 1, 2), torch.ones(1, 1, 1), torch.tensor([[[-2.0, -1.0]]]))
    tensor([[[0.7500, 0.7500]]])
    """

    name: ClassVar[str] = "adaptive_offset"
    strength: float = 0.1
    scale: float = 0.1
    random_strength: bool = False
    probability: float = 1.0

    def __post_init__(self) -> None:
        _require_strength("noise offset", self.strength, "0.05 to 0.1 are usual")
        _require_probability(self.probability)
        if not abs(self.scale) < float("inf"):
            raise ValueError(
                f"the scale of an adaptive noise offset must be finite, got {self.scale}"
            )

    def draw(self, shape: tuple[int, ...], draws: Draws) -> Tensor:
        """Return ξ of each channel.

        If the strength is random, one more channel holds the drawn share of the strength.
        """
        part, one = _per_channel(shape, draws), [1] * len(shape)
        share = draws.uniform(*one) if self.random_strength else None
        if self.probability < 1:
            part *= draws.uniform(*one) < self.probability
        return part if share is None else torch.cat([part, share], dim=1)

    def apply(self, noise: Tensor, part: Tensor, x0: Tensor) -> Tensor:
        strength: Tensor | float = self.strength
        if self.random_strength:
            part, share = part[:, :-1], part[:, -1:]
            strength = self.strength * share
        mean = x0.to(noise.dtype).flatten(2).mean(2) if x0.ndim > 2 else x0.to(noise.dtype)
        return noise + (strength + self.scale * mean.abs().view(part.shape)).clamp(min=0.0) * part


@NOISES.register
@dataclass(frozen=True)
class Pyramid(Noise):
    """Pyramid (multi-resolution) noise: ε plus noise on coarser grids (Whitaker 2023).

    Grid i is r^i times coarser, r ~ U(2, 4), and its noise has the factor discount^i, as in
    kohya's --multires_noise_iterations and --multires_noise_discount. i starts from 0, so the first
    grid is another white noise. The grids are enlarged linearly, and the last one has one cell
    along an axis. Given the grids, each element is divided by its own exact standard deviation, so
    the variance is 1 everywhere (kohya divides by the measured one of the whole batch). The target
    contains the pyramid too.

    Raises ValueError for fewer than 1 iteration, for a discount outside 0 ... 1, and for samples
    whose only axis is the channels.

    >>> Pyramid(discount=0.3).draw((3, 8, 8), Draws(0, [5, 6], step=0, stream=0)).shape
    torch.Size([2, 4, 8, 8])
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

    def draw(self, shape: tuple[int, ...], draws: Draws) -> Tensor:
        """Return the noise that is added to ε, and one more channel with a factor.

        The factor makes the variance of the sum 1.
        """
        if len(shape) < 2:
            raise ValueError(
                f"pyramid noise needs samples with axes beside the channels, got shape {shape}"
            )
        if draws.has_loops and len(shape) <= 4:
            return draws.pyramid(shape, self.iterations, self.discount)
        batch, axes, device = draws.batch, len(shape) - 1, draws.device
        total = torch.zeros(batch, *shape, device=device, dtype=torch.float32)
        variance = torch.ones(batch, *shape[1:], device=device, dtype=torch.float32)
        unfinished = torch.ones(batch, dtype=torch.bool, device=device)
        for i in range(self.iterations):
            r, power = (
                2 + 2 * draws.uniform(),
                torch.ones(batch, device=device, dtype=torch.float32),
            )
            for _ in range(i):
                power = power * r  # rounding of pow() depends on the batch position
            # each sample has its own grid, inside the largest one; r >= 2 bounds the largest
            octave = draws.normal(shape[0], *(max(1, n >> i) for n in shape[1:]))
            spread, last = (
                torch.ones(batch, *[1] * axes, device=device, dtype=torch.float32),
                torch.zeros_like(unfinished),
            )
            for axis, n in enumerate(shape[1:]):
                grid = (n / power).long().clamp(min=1)
                below, above, part = _enlargement(grid, n)
                octave = _interpolate(octave, axis + 2, below, above, part)
                squares = torch.where(below == above, 1.0, (1 - part) ** 2 + part**2)
                spread = spread * squares.view(batch, *(n if k == axis else 1 for k in range(axes)))
                last = last | (grid == 1)
            counts = unfinished.view(batch, *[1] * axes)
            total = total + torch.where(counts.unsqueeze(1), self.discount**i * octave, 0.0)
            variance = variance + torch.where(counts, self.discount ** (2 * i) * spread, 0.0)
            unfinished = unfinished & ~last
        return torch.cat([total, variance.rsqrt().unsqueeze(1)], dim=1)

    def apply(self, noise: Tensor, part: Tensor, x0: Tensor) -> Tensor:
        return (noise + part[:, :-1]) * part[:, -1:]


@NOISES.register
@dataclass(frozen=True)
class InputPerturbation(Noise):
    """Input perturbation: x_t contains ε + γ ξ, the target contains ε alone.

    Source: Ning et al. 2301.11706, algorithm 1, with γ = 0.1.

    Args:
        strength: γ, at least 0 and finite.
        random_strength: draw γ from U(0, strength) for each sample.
        decay_steps: number of optimizer steps over which γ decreases linearly to 0; None: no decay.

    Raises:
        ValueError: for a negative or infinite strength, and for fewer than 1 step.

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
            raise ValueError(
                f"decay_steps of an input perturbation must be at least 1, got {self.decay_steps}"
            )

    @property
    def changes_target(self) -> bool:
        return False

    def draw(self, shape: tuple[int, ...], draws: Draws) -> Tensor:
        part = draws.normal(*shape)
        if self.random_strength:
            part *= draws.uniform(*[1] * len(shape))
        return part * self.strength_at(draws.step)

    def strength_at(self, step: int) -> float:
        """Return γ, without its random share, at an optimizer step."""
        left = 1.0 if self.decay_steps is None else max(0.0, 1 - step / self.decay_steps)
        return self.strength * left

    def apply(self, noise: Tensor, part: Tensor, x0: Tensor) -> Tensor:
        return noise + part


@NOISES.register
@dataclass(frozen=True)
class Immiscible(Noise):
    """Immiscible noise: assign the batch's noises to its samples with the least total distance.

    Source: Li et al. 2406.12303. The permutation is the exact solution of the linear assignment
    problem, and the target uses the same permutation. It is computed within the batch of one
    process. So the noises are the same for every number of processes and every accumulation, but
    their assignment to samples is not. Put this kind last in a chain. On a GPU the host waits for
    the distances once per batch.

    >>> noise, x0 = torch.tensor([[1.0], [-1.0]]), torch.tensor([[-3.0], [2.0]])
    >>> Immiscible().apply(noise, torch.empty(2, 0), x0)
    tensor([[-1.],
            [ 1.]])
    """

    name: ClassVar[str] = "immiscible"
    batch_wide: ClassVar[bool] = True

    def draw(self, shape: tuple[int, ...], draws: Draws) -> Tensor:
        return torch.empty(draws.batch, 0, dtype=torch.float32, device=draws.device)

    def apply(self, noise: Tensor, part: Tensor, x0: Tensor) -> Tensor:
        return noise[_assignment(_distances(x0, noise)).to(noise.device)]


@NOISES.register
@dataclass(frozen=True)
class OptimalTransport(Noise):
    """Couple the batch's noises with its samples by optimal transport of |x_0 - ε|².

    Source: Tong et al. 2302.00482, §4.2 (OT-CFM); Pooladian et al. 2304.14772. Without
    ``regularization`` the coupling is the exact assignment. With it, the plan is that of Sinkhorn's
    algorithm (the library POT), and each sample draws one noise of its row, so a noise may be used
    twice. As with :class:`Immiscible`, whose cost is the distance itself, a row depends on its
    batch: the micro-batch of one process. Put this kind last in a chain. On a GPU the host waits
    for the distances once per batch.

    Args:
        regularization: the entropic regularization, in units of the mean squared distance; 0: none.

    Raises:
        ValueError: for a negative or infinite regularization.
        ImportError: if POT is not installed and the regularization is not 0.

    >>> noise, x0 = torch.tensor([[1.0], [-1.0]]), torch.tensor([[-3.0], [2.0]])
    >>> OptimalTransport().apply(noise, torch.empty(2, 0), x0)
    tensor([[-1.],
            [ 1.]])
    """

    name: ClassVar[str] = "optimal_transport"
    batch_wide: ClassVar[bool] = True
    regularization: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.regularization < float("inf"):
            raise ValueError(
                "the regularization of optimal transport must be at least 0, got "
                f"{self.regularization}; 0 is the exact coupling"
            )
        if self.regularization:
            _pot()

    def draw(self, shape: tuple[int, ...], draws: Draws) -> Tensor:
        if self.regularization:
            return draws.uniform(1)
        return torch.empty(draws.batch, 0, dtype=torch.float32, device=draws.device)

    def apply(self, noise: Tensor, part: Tensor, x0: Tensor) -> Tensor:
        cost = _distances(x0, noise).double() ** 2
        if not self.regularization:
            return noise[_assignment(cost).to(noise.device)]
        cost, even = (cost / cost.mean()).cpu().numpy(), np.full(len(cost), 1 / len(cost))
        plan = torch.as_tensor(
            _pot().sinkhorn(even, even, cost, self.regularization, method="sinkhorn_log")
        )
        below = plan.cumsum(1)
        u = part.detach().cpu().double() * below[:, -1:]  # u lies in [0, 1)
        chosen = torch.searchsorted(below, u, right=True).flatten().clamp(max=len(plan) - 1)
        return noise[chosen.to(noise.device)]


def _pot() -> Any:
    try:
        import ot  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise ImportError(
            "the regularization of optimal transport needs POT; pip install 'alphabar[ot]', or "
            "leave the regularization out for the exact coupling"
        ) from error
    return ot


def _distances(x0: Tensor, noise: Tensor) -> Tensor:
    # by differences: in many dimensions the distances differ little, and products would lose these
    # digits
    exact = "donot_use_mm_for_euclid_dist"
    with torch.no_grad():
        return torch.cdist(x0.to(noise.dtype).flatten(1), noise.flatten(1), compute_mode=exact)


def _assignment(cost: Tensor) -> Tensor:
    """Return the noise of each sample, with the least total cost."""
    from scipy.optimize import linear_sum_assignment

    return torch.as_tensor(linear_sum_assignment(cost.cpu().numpy())[1])


@dataclass(frozen=True)
class Chain:
    """Several kinds of noise, applied in this order.

    Kinds that do not change the target always come last. Raises ValueError for an empty chain, and
    TypeError for an object that is not a kind of noise.

    >>> from alphabar.noising import InputPerturbation, Offset
    >>> Chain((InputPerturbation(0.1), Offset(0.05))).name
    'offset + input_perturbation'
    """

    kinds: tuple[Noise, ...]

    def __post_init__(self) -> None:
        wrong = [type(one).__name__ for one in self.kinds if not isinstance(one, Noise | Chain)]
        if wrong:
            raise TypeError(
                f"a chain of noises is of Noise objects, got {wrong[0]}; names go to "
                "Noising(noise=[...])"
            )
        kinds = [kind for one in self.kinds for kind in one.kinds]
        if not kinds:
            raise ValueError(
                "a chain of noises needs at least one kind; e.g. ['offset', 'input_perturbation']"
            )
        object.__setattr__(
            self, "kinds", tuple(sorted(kinds, key=lambda kind: not kind.changes_target))
        )

    @property
    def name(self) -> str:
        """The names of the kinds."""
        return " + ".join(kind.name for kind in self.kinds)

    @property
    def changes_target(self) -> bool:
        """Whether any of the kinds changes the target."""
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
    """Return the parts of each kind for the samples with these global indices.

    If two kinds have the same name, the second one gets a numbered random stream.

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


def apply_kinds(
    kinds: Sequence[Noise], noise: Tensor, parts: Sequence[Tensor], x0: Tensor
) -> tuple[Tensor, Tensor]:
    """Return (ε_y, ε_x), the noise of the target and the noise of x_t.

    ``noise`` is the plain ε, shape of ``x0``.

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


class Parts(NamedTuple):
    """The parts of the kinds of noise as one pass adds them; see :meth:`rng.Draws.noised`."""

    shift: Tensor | None = None
    grids: tuple[Any, ...] | None = None
    jitter: tuple[Any, ...] | None = None


_NO_PARTS = Parts()


def parts_of_one_pass(kinds: Sequence[Noise], shape: tuple[int, ...], draws: Draws) -> Parts | None:
    """Return the parts of a batch for one pass, or None if these kinds need a pass of their own.

    The pass then adds the bits of :func:`draw_kinds` and :func:`apply_kinds`. At most one kind may
    change the target, and one only x_t. ``draws``: those of the plain noise.

    >>> draws = Draws(0, [4, 5], step=7, stream=0)
    >>> parts_of_one_pass([Immiscible()], (3, 8, 8), draws) is None
    True
    >>> parts_of_one_pass([Offset()], (3, 8, 8), draws).shift.shape
    torch.Size([2, 3])
    """
    if len(kinds) == 1 and type(kinds[0]) is Gaussian:
        return _NO_PARTS
    parts: dict[str, Any] = {}
    for kind in kinds:
        make = _ONE_PASS.get(type(kind))
        if make is None:
            return None
        part = make(kind, shape, draws.of(stream_of(kind.name)))
        if (
            part is None
            or parts.keys() & part.keys()
            or {"shift", "grids"} <= parts.keys() | part.keys()
        ):
            return None
        parts |= part
    return Parts(**parts)


def _gaussian_part(kind: Noise, shape: tuple[int, ...], draws: Draws) -> dict[str, Any]:
    return {}


def _offset_part(kind: Noise, shape: tuple[int, ...], draws: Draws) -> dict[str, Any]:
    return {"shift": kind.draw(shape, draws).view(draws.batch, shape[0])}


def _pyramid_part(kind: Noise, shape: tuple[int, ...], draws: Draws) -> dict[str, Any] | None:
    assert isinstance(kind, Pyramid)
    if not 2 <= len(shape) <= 4:
        return None
    return {"grids": (draws.stream, kind.iterations, kind.discount)}


def _perturbation_part(kind: Noise, shape: tuple[int, ...], draws: Draws) -> dict[str, Any]:
    assert isinstance(kind, InputPerturbation)
    shares = None
    if kind.random_strength:
        draws.skip(math.prod(shape))
        shares = draws.uniform()
    return {"jitter": (draws.stream, shares, kind.strength_at(draws.step))}


# by the exact class: a subclass may draw or apply in another way
_ONE_PASS: dict[type[Noise], Callable[[Any, tuple[int, ...], Draws], dict[str, Any] | None]] = {
    Gaussian: _gaussian_part,
    Offset: _offset_part,
    Pyramid: _pyramid_part,
    InputPerturbation: _perturbation_part,
}


def target_noise(
    kinds: Sequence[Noise],
    shape: tuple[int, ...],
    seed: int,
    index: Sequence[int],
    step: int,
    device: torch.device,
) -> Tensor:
    """Return ε_y of a batch, shape (batch, ...), for kinds that do not look at x_0.

    >>> target_noise([Gaussian()], (3,), 0, [4, 5], 7, torch.device("cpu")).shape
    torch.Size([2, 3])
    """
    kinds = [kind for kind in kinds if kind.changes_target]
    parts = draw_kinds(kinds, shape, seed, index, step=step, device=device)
    draws = Draws(seed, index, step=step, stream=Stream.TRAINING_NOISE, device=device)
    noise = draws.normal(*shape)
    return apply_kinds(kinds, noise, parts, noise)[0]


def resolve_noise(noise: str | Noise | Chain | Sequence[str | Noise]) -> Noise | Chain:
    """Return the kind of noise for a name, an object, or a sequence of them.

    A name may carry options, e.g. ``offset:strength=0.05``. Raises ValueError for an unknown name
    or option.

    >>> resolve_noise("offset:strength=0.05")
    Offset(strength=0.05, random_strength=False, probability=1.0)
    >>> resolve_noise(["offset", "input_perturbation"]).name
    'offset + input_perturbation'
    """
    if isinstance(noise, Noise | Chain):
        return noise
    if isinstance(noise, Sequence) and not isinstance(noise, str):
        return Chain(tuple(kind for one in noise for kind in resolve_noise(one).kinds))
    return make_item(noise, NOISES)


def _require_strength(what: str, strength: float, usual: str) -> None:
    if not 0 <= strength < float("inf"):
        raise ValueError(f"{what} strength must be at least 0, got {strength}; {usual}")


def _per_channel(shape: tuple[int, ...], draws: Draws) -> Tensor:
    return draws.normal(shape[0], *[1] * (len(shape) - 1))


def _require_probability(probability: float) -> None:
    if not 0 <= probability <= 1:
        raise ValueError(
            f"the probability of a noise offset must lie in 0 ... 1, got {probability}"
        )


def _enlargement(grid: Tensor, fine: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return the two cells around each of ``fine`` points, and the share of the second cell.

    Each has shape (batch, fine). ``grid``: the number of cells of each sample, shape (batch,). This
    is the formula of torch's interpolate with mode "linear".
    """
    coarse = grid[:, None]
    centres = torch.arange(fine, device=grid.device, dtype=torch.float32) + 0.5
    at = (centres * (coarse.to(torch.float32) * (1.0 / fine)) - 0.5).clamp(min=0.0)
    below = torch.minimum(at.long(), coarse - 1)
    above = torch.minimum(below + 1, coarse - 1)
    return below, above, torch.where(above == below, 0.0, at - below)


def _interpolate(octave: Tensor, axis: int, below: Tensor, above: Tensor, part: Tensor) -> Tensor:
    """Return ``octave``, shape (batch, channels, ...), enlarged along an axis.

    It uses products and sums of elements, no matrix product.
    """
    shape = [n if k != axis else below.shape[1] for k, n in enumerate(octave.shape)]
    along = [below.shape[k > 0] if k in (0, axis) else 1 for k in range(octave.ndim)]
    low, high = (octave.gather(axis, cells.view(along).expand(shape)) for cells in (below, above))
    share = part.view(along)
    return (1 - share) * low + share * high
