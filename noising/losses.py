"""Kinds of loss: the loss of each output element, before any weight.

With d the error and c > 0 the threshold between quadratic and linear:

    l2            d²
    l1            |d|
    huber         d² / 2 where |d| <= c, else c (|d| - c / 2): torch's huber_loss
    pseudo_huber  2c (√(d² + c²) - c): d² for small d, 2c |d| for large; "huber" of
                  sd-scripts and diffusers
    smooth_l1     2 (√(d² + c²) - c): d² / c for small d, 2 |d| for large; "smooth_l1" of
                  sd-scripts, not torch's
    contrastive   d² less a share of the distance from the target of another sample

The threshold may depend on the noise level. It is large where the sample is clean, i.e. the loss is
more quadratic there:

    constant      c
    exponential   c^fraction, the fraction of training time (0 clean, 1 noise)
    snr           (1 - c) / (1 + s)² + c, s = σ / α: 1 where the sample is clean, c at pure noise

With the squared error, a weighting gives the same objective for every target. With the other losses
the objective depends on the target.
"""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import ClassVar, Literal

import torch
from torch import Tensor

from .axes import Axis, means_along, weighted_mean
from .curves.base import may_look_at
from .utils.items import make_item
from .utils.registry import Registry, lookup

Over = Literal["all", "mask"]

Threshold = Callable[[float, Tensor, Tensor], Tensor]

THRESHOLDS: Mapping[str, Threshold] = {
    "constant": lambda c, s, fraction: torch.full_like(s, c),
    "exponential": lambda c, s, fraction: c**fraction,
    "snr": lambda c, s, fraction: (1 - c) / (1 + s) ** 2 + c,
}
"""The threshold schedules by name: (c, s = σ / α, fraction of training time) -> c at that level."""


@dataclass(frozen=True)
class Loss(ABC):
    """Base class of a kind of loss; a subclass computes the loss of one element.

    >>> L1()(torch.tensor([-2.0, 0.5]), None)
    tensor([2.0000, 0.5000])
    """

    name: ClassVar[str]
    batch_wide: ClassVar[bool] = False
    """Whether a sample's loss depends on the other samples of its batch."""

    @property
    def may_be_negative(self) -> bool:
        """Whether the loss can be below 0; a learned variance of it has no minimum then."""
        return False

    @abstractmethod
    def __call__(self, error: Tensor, threshold: Tensor | None) -> Tensor:
        """Return the loss of each element of ``error``.

        ``threshold`` is the result of :meth:`threshold`.
        """

    def between(self, out: Tensor, target: Tensor, threshold: Tensor | None) -> Tensor:
        """Return the loss of each element of ``out``, the network's output."""
        return self(out - target, threshold)

    def threshold(self, sigma_ve: Tensor, fraction: Tensor) -> Tensor | None:
        """Return the threshold at noise levels σ / α and fractions of training time.

        The result is None for a loss without a threshold.
        """
        return None


LOSSES: Registry[type[Loss]] = Registry("loss")
"""The kinds of loss by name; decorate a class with ``@LOSSES.register`` to add one."""


@LOSSES.register
@dataclass(frozen=True)
class L2(Loss):
    """d², the squared error.

    >>> L2()(torch.tensor([-2.0]), None)
    tensor([4.])
    """

    name: ClassVar[str] = "l2"

    def __call__(self, error: Tensor, threshold: Tensor | None) -> Tensor:
        return error**2

    def between(self, out: Tensor, target: Tensor, threshold: Tensor | None) -> Tensor:
        return torch.ops.aten.mse_loss(out, target, 0)  # one pass; the shapes are known to agree


@LOSSES.register
@dataclass(frozen=True)
class L1(Loss):
    """|d|, the absolute error.

    >>> L1()(torch.tensor([-2.0]), None)
    tensor([2.])
    """

    name: ClassVar[str] = "l1"

    def __call__(self, error: Tensor, threshold: Tensor | None) -> Tensor:
        return error.abs()


@LOSSES.register
@dataclass(frozen=True)
class Contrastive(Loss):
    """Contrastive flow matching: d² - λ |out - ũ|², ũ the target of the next sample in the batch.

    Source: Stoica et al. 2506.05350, eq. 4, with λ = 0.05. It keeps the velocities of different
    classes or prompts apart. Its minimum is (u - λ E[ũ]) / (1 - λ), not u: with guidance, the paper
    samples with (1 - λ) out + λ E[ũ] (its §5.4). The batch is the micro-batch of one process, so
    the loss depends on how a step is split; a sample's negative is any other sample, as in the
    paper's code, also one of its own class. A batch of one sample has no negative: its loss is d²,
    with a warning.

    Args:
        strength: λ, in 0 ... 1; 0 is the squared error.

    Raises:
        ValueError: for λ outside 0 <= λ < 1, beyond which the loss has no minimum.

    >>> loss = Contrastive(strength=0.5)
    >>> loss.between(torch.tensor([[1.0], [3.0]]), torch.tensor([[1.0], [2.0]]), None)
    tensor([[-0.5000],
            [-1.0000]])
    """

    name: ClassVar[str] = "contrastive"
    batch_wide: ClassVar[bool] = True
    strength: float = 0.05

    def __post_init__(self) -> None:
        if not 0 <= self.strength < 1:
            raise ValueError(
                f"the strength of loss 'contrastive' must lie in 0 <= strength < 1, got "
                f"{self.strength}; the paper uses 0.05"
            )

    @property
    def may_be_negative(self) -> bool:
        return self.strength > 0

    def __call__(self, error: Tensor, threshold: Tensor | None) -> Tensor:
        """Return d², the part of each sample's own target."""
        return error**2

    def between(self, out: Tensor, target: Tensor, threshold: Tensor | None) -> Tensor:
        if len(out) < 2:
            if not torch.compiler.is_compiling():
                _warn_of_one_sample()
            return self(out - target, threshold)
        return (out - target) ** 2 - self.strength * (out - target.roll(-1, 0)) ** 2


@cache
def _warn_of_one_sample() -> None:
    warnings.warn(
        "loss 'contrastive' compares a sample with another of its batch, and a batch has one: its "
        "loss is the squared error; train with at least 2 samples in a micro-batch, and drop_last "
        "in the DataLoader",
        stacklevel=2,
    )


@dataclass(frozen=True)
class ThresholdLoss(Loss):
    """A loss that is quadratic below a threshold and linear above it.

    The arguments correspond to ``--huber_c``, ``--huber_schedule`` and ``--huber_scale`` of
    sd-scripts. sd-scripts ignores the scale under "snr"; here it raises ValueError.

    Args:
        c: parameter of the threshold.
        schedule: a name of ``THRESHOLDS``.
        scale: factor of the threshold.

    Raises:
        ValueError: if c or scale is not positive, if c is above 1 under a schedule that starts from
            1, and for a scale under "snr".

    >>> PseudoHuber(c=0.1, schedule="exponential").threshold(
    ...     torch.tensor([1.0]), fraction=torch.tensor([0.5])
    ... )
    tensor([0.3162])
    """

    c: float = 0.1
    schedule: str = "snr"
    scale: float = 1.0

    def __post_init__(self) -> None:
        lookup("threshold schedule", self.schedule, THRESHOLDS)
        if not 0 < self.c < float("inf") or not 0 < self.scale < float("inf"):
            raise ValueError(
                f"c and scale of loss {self.name!r} must be positive and finite, got {self.c} and "
                f"{self.scale}"
            )
        if self.schedule != "constant" and self.c > 1:
            raise ValueError(
                f"c of loss {self.name!r} must be at most 1 under schedule {self.schedule!r}, "
                f"which runs from 1 to c, got {self.c}"
            )
        if self.schedule == "snr" and self.scale != 1:
            raise ValueError(
                f"scale of loss {self.name!r} is for the schedules 'constant' and 'exponential', "
                f"got {self.scale} with 'snr'; "
                "sd-scripts ignores it there: leave it out"
            )

    def threshold(self, sigma_ve: Tensor, fraction: Tensor) -> Tensor:
        return self.scale * THRESHOLDS[self.schedule](self.c, sigma_ve, fraction)


def _given(threshold: Tensor | None) -> Tensor:
    if threshold is None:
        raise ValueError(
            "this loss needs a threshold; give what its threshold(sigma_ve, fraction) returns"
        )
    return threshold


@LOSSES.register
@dataclass(frozen=True)
class Huber(ThresholdLoss):
    """torch's Huber loss: d² / 2 where |d| <= c, else c (|d| - c / 2).

    The default is c = 1, constant, as torch's delta.

    >>> Huber()(torch.tensor([0.5, 3.0]), torch.tensor(1.0))
    tensor([0.1250, 2.5000])
    """

    name: ClassVar[str] = "huber"
    c: float = 1.0
    schedule: str = "constant"

    def __call__(self, error: Tensor, threshold: Tensor | None) -> Tensor:
        c, d = _given(threshold), error.abs()
        within = torch.minimum(d, c)
        # d²/2 where d <= c, c (d - c/2) above, in one formula without a branch
        return within * (d - 0.5 * within)


@LOSSES.register
@dataclass(frozen=True)
class PseudoHuber(ThresholdLoss):
    """2c (√(d² + c²) - c): the squared error for small d (2403.16728).

    sd-scripts and diffusers call it "huber".

    >>> PseudoHuber(schedule="constant")(torch.tensor([0.0, 3.0]), torch.tensor(4.0))
    tensor([0., 8.])
    """

    name: ClassVar[str] = "pseudo_huber"

    def __call__(self, error: Tensor, threshold: Tensor | None) -> Tensor:
        return 2 * _given(threshold) * _above(error, _given(threshold))


@LOSSES.register
@dataclass(frozen=True)
class SmoothL1(ThresholdLoss):
    """2 (√(d² + c²) - c): twice the absolute error for large d.

    sd-scripts calls it "smooth_l1". It is not torch's smooth_l1_loss.

    >>> SmoothL1(schedule="constant")(torch.tensor([0.0, 3.0]), torch.tensor(4.0))
    tensor([0., 2.])
    """

    name: ClassVar[str] = "smooth_l1"

    def __call__(self, error: Tensor, threshold: Tensor | None) -> Tensor:
        return 2 * _above(error, _given(threshold))


def _above(d: Tensor, c: Tensor) -> Tensor:
    # √(d² + c²) - c without cancellation for small d, which in float32 would round errors below
    # c · 1e-4 to 0
    return d**2 / ((d**2 + c**2).sqrt() + c)


def resolve_loss(loss: str | Loss) -> Loss:
    """Return the kind of loss for a name, with or without options, or an object.

    Raises ValueError for an unknown name or option.

    >>> resolve_loss("huber:c=0.5")
    Huber(c=0.5, schedule='constant', scale=1.0)
    """
    return loss if isinstance(loss, Loss) else make_item(loss, LOSSES)


def mean_of_samples(
    errors: Tensor, mask: Tensor | None, over: Over = "all"
) -> tuple[Tensor, Tensor | None]:
    """Return each sample's mean of masked ``errors``, and the share of the sample it covers.

    The share is None if there is no mask (the mean covers the whole sample).

    Args:
        errors: shape (batch, ...).
        mask: weights in [0, 1] (or bool) that broadcast to ``errors``, e.g. (batch, 1, h, w), with
            the same number of axes. An empty mask gives 0.
        over: ``"all"`` averages mask · error over all elements, as sd-scripts does, so a small mask
            has little weight; ``"mask"`` averages over the masked area.

    Raises:
        ValueError: for other shapes, for integer masks, and for values outside [0, 1] (checked on
            the CPU, where reading the values costs no sync).

    >>> errors, mask = (
    ...     torch.tensor([[[2.0, 4.0]], [[6.0, 8.0]]]),
    ...     torch.tensor([[[True, False]], [[False, False]]]),
    ... )
    >>> [mean_of_samples(errors, mask, over)[0].tolist() for over in ("all", "mask")]
    [[1.0, 0.0], [2.0, 0.0]]
    """
    _check_over(over)
    if mask is None:
        return errors.flatten(1).mean(1), None
    _check_mask(mask, errors)
    mask = mask.to(errors.device, errors.dtype).expand_as(errors)
    mean, covered = (mask * errors).flatten(1).mean(1), mask.flatten(1).mean(1)
    if over == "all":
        return mean, covered
    return mean / _or_one(covered), (covered > 0).to(errors.dtype)


def losses_of_elements(
    errors: Tensor,
    weight: Tensor,
    axis: Axis,
    counted: Tensor | None = None,
    mask: Tensor | None = None,
    over: Over = "all",
    log_variance: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Return the loss of each sample, shape (batch,), and the error of each element.

    A sample's loss is the mean over its elements that count, 0 if none does. With equal weights of
    its elements it is the number itself that one weight for the sample gives.

    Args:
        errors: shape (batch, ...), 0 in elements that do not count.
        weight: weight of each element, shape (batch, k), 0 where it does not count.
        axis: the axis of the k elements.
        counted: which elements count, bool, shape (batch, k); None: all.
        mask, over: as in :func:`mean_of_samples`; ``"mask"`` averages over the masked area of the
            elements that count.
        log_variance: u of the loss weight / e^u · error + u, shape (batch, k), or None.

    >>> errors, weight = torch.tensor([[2.0, 4.0, 0.0]]), torch.tensor([[1.0, 3.0, 0.0]])
    >>> losses_of_elements(errors, weight, 1, counted=weight > 0)
    (tensor([7.]), tensor([[2., 4., 0.]]))
    """
    _check_over(over)
    k = weight.shape[1]
    whole, covering = mean_of_samples(errors, mask)
    if mask is not None:
        mask = mask.to(errors.device, errors.dtype).expand_as(errors)
        errors = mask * errors
    parts = means_along(errors, k, axis)
    covered = torch.ones_like(parts) if mask is None else means_along(mask, k, axis)
    covering = torch.ones_like(whole) if covering is None else covering
    counts = None if counted is None else counted.to(errors.dtype)
    area, shown = None, parts
    if over == "mask" and mask is not None:
        area = covering if counts is None else (counts * covered).mean(1)
        shown = parts / _or_one(covered)
    elif counts is not None:
        area = counts.mean(1)
    if area is not None:
        area = _or_one(area)
        whole, covering = whole / area, covering / area
        parts, covered = parts / area[:, None], covered / area[:, None]
    if log_variance is None:
        return weighted_mean(weight, parts, whole), shown
    level = weight * torch.exp(-log_variance)
    learned = (weight > 0).to(errors.dtype) * log_variance
    return weighted_mean(level, parts, whole) + weighted_mean(learned, covered, covering), shown


def _check_over(over: str) -> None:
    if over not in ("all", "mask"):
        raise ValueError(f"over must be 'all' or 'mask', got {over!r}")


def _or_one(area: Tensor) -> Tensor:
    return torch.where(area > 0, area, torch.ones_like(area))


def _check_mask(mask: Tensor, like: Tensor) -> None:
    fits = mask.ndim == like.ndim and all(
        m in (1, n) for m, n in zip(mask.shape, like.shape, strict=True)
    )
    if not fits:
        raise ValueError(
            f"the mask must broadcast to the target, {tuple(like.shape)}, with as many axes, got "
            f"{tuple(mask.shape)}; "
            "for images give (batch, 1, height, width) at the size of the latents"
        )
    if mask.dtype != torch.bool and not mask.is_floating_point():
        raise ValueError(
            f"the mask must be bool, or floating point in [0, 1], got {mask.dtype}; divide 0 ... "
            "255 by 255"
        )
    if mask.is_floating_point() and may_look_at(mask):
        low, high = float(mask.min()), float(mask.max())
        if not (low >= 0 and high <= 1):  # also catches NaN
            raise ValueError(f"the mask must lie in [0, 1], got values from {low:g} to {high:g}")
