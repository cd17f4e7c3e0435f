"""Validation that tells: the error at fixed noise levels, each apart, on fixed noise.

The levels are the same times in every run on a schedule, equally spaced in log SNR, and the noise
of a sample follows from its position in the validation set. So two values of a level differ because
the network differs. The mean over samples is exact: it depends neither on the number of processes
nor on the batch size.

The error is the unweighted mean squared error of the network's output, in the units of the target.
The weight of a level is a constant factor, and is left out.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

from ..noising import NoiseSchedule, Noising, Uniform
from ..noising.curves.base import float32_range
from ..noising.timesteps.base import nearest_time
from ..noising.timesteps.shaped import ShapedTimesteps
from ..noising.utils.validation import whole_number
from .loops.collectives import patient_group
from .loops.isolation import evaluating
from .plots.figure import COLOURS, LOG_SNR, dress, edges, mark_infinity, new_figure, png_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes

VALIDATION_SEED = 20_240_229  # any fixed number: same validation noise in every run and epoch
OUTERMOST = 10.0  # |log SNR| beyond it: x is all noise or all data
MOST_CURVES = 6  # validations in one plot


def validation_times(schedule: NoiseSchedule, levels: int = 8) -> Tensor:
    """Return the times of validation, from the terminal one to the least noise, shape (levels,).

    They are equally spaced in log SNR between the ends of the schedule, or ±10 where an end is
    further. A terminal time below -10 (zero terminal SNR, t = 1 of a flow) is a level of its own.
    int64 on discrete schedules, where equal timesteps are given once.

    Raises:
        ValueError: fewer than three levels.

    >>> validation_times(NoiseSchedule.flow(), 4)
    tensor([1.0000, 0.9933, 0.5000, 0.0067])
    >>> validation_times(NoiseSchedule.scaled_linear(), 4)
    tensor([999, 538,  52,   0])
    """
    levels, curve = whole_number("levels of validation", levels, least=3), schedule.curve
    ends = torch.tensor([curve.t_max, curve.t_min], dtype=torch.float64)
    low, high = curve.log_snr(ends).clamp(-OUTERMOST, OUTERMOST).tolist()
    terminal = ends[:1].long() if curve.is_discrete else ends[:1]
    apart = float(curve.log_snr(ends[:1])) < -OUTERMOST
    between = torch.linspace(low, high, levels - apart, dtype=torch.float64)
    t = torch.cat([terminal, nearest_time(between if apart else between[1:], curve)])
    if curve.is_discrete:
        return t.unique().flip(0)
    return t.float().clamp(*float32_range(curve))  # rounding must not leave the schedule


@dataclass(frozen=True)
class LevelErrors:
    """The mean error at each level, with the most noise first.

    Args:
        log_snr: log SNR of each level.
        errors: mean unweighted squared error of each level.
        samples: number of samples.

    >>> found = LevelErrors((-torch.inf, -10.0, 4.5), (1.0, 0.75, 0.5), samples=128)
    >>> found.metrics("val")
    {'val/0_zero_SNR': 1.0, 'val/1_-10.0': 0.75, 'val/2_4.5': 0.5, 'val/mean': 0.75}
    """

    log_snr: tuple[float, ...]
    errors: tuple[float, ...]
    samples: int

    @property
    def mean(self) -> float:
        """The mean over the levels."""
        return sum(self.errors) / len(self.errors)

    def metrics(self, prefix: str) -> dict[str, float]:
        """Return the errors and their mean by names for loggers, which sort by name."""
        digits = len(str(len(self.errors) - 1))
        each = {
            f"{prefix}/{k:0{digits}d}_{_tag(level)}": error
            for k, (level, error) in enumerate(zip(self.log_snr, self.errors, strict=True))
        }
        return each | {f"{prefix}/mean": self.mean}


def _tag(log_snr: float) -> str:
    return f"{log_snr:.1f}" if math.isfinite(log_snr) else "zero_SNR"


class ErrorsAtLevels:
    """Sums of errors at fixed noise levels, batch by batch; the sums stay on the device.

    Args:
        noising: makes the noise, with a seed of its own; unweighted, of the training's schedule. If
            it draws times of shape (batch, k), all k of a sample are those of the level.
        levels: number of noise levels.

    >>> sums = ErrorsAtLevels(Noising(NoiseSchedule.flow(), seed=1), levels=3)
    >>> sums.add(lambda x, t: x, torch.zeros(4, 2), index=range(4))
    >>> sums.reduced().samples
    4
    """

    def __init__(self, noising: Noising, levels: int = 8) -> None:
        self.times = validation_times(noising.schedule, levels)
        self.log_snr = tuple(noising.schedule.log_snr(self.times.double()).tolist())
        self._noising = noising
        self._sums: Tensor | None = None
        self._samples = 0

    @torch.no_grad()
    def add(
        self,
        predict: Any,
        x0: Tensor,
        index: Sequence[int],
        conditioning: Mapping[str, Any] | None = None,
        kept: Sequence[bool] | None = None,
    ) -> None:
        """Add the errors of a batch at every level: one call of the network for each.

        Args:
            predict: ``predict(x, timesteps, **conditioning)``, or the network.
            x0: clean samples, shape (batch, ...).
            index: position of each sample in the validation set. It selects the noise.
            conditioning: further arguments of ``predict``.
            kept: which samples count; by default all.
        """
        rows, density = [], self._noising.timesteps
        elements = (density.count(x0.shape),) if isinstance(density, ShapedTimesteps) else ()
        for number, t in enumerate(self.times):
            # the number as step: each level has noise of its own
            noised = self._noising(
                x0,
                step=number,
                index=list(index),
                total=len(x0),
                timesteps=t.expand(len(x0), *elements),
            )
            out = predict(noised.x, noised.timesteps, **dict(conditioning or {}))
            rows.append(noised.losses(out))
        errors = torch.stack(rows)
        if kept is not None and not all(kept):
            errors = errors[:, [k for k, one in enumerate(kept) if one]]
        dtype = torch.float32 if errors.device.type == "mps" else torch.float64
        total = errors.to(dtype).sum(1)
        self._sums = total if self._sums is None else self._sums + total
        self._samples += errors.shape[1]

    def reduced(self) -> LevelErrors:
        """Return the means over the samples of all ranks. Every rank must call it."""
        none = torch.zeros(len(self.times), dtype=torch.float64)
        sums = none if self._sums is None else self._sums.cpu().double()
        row = torch.cat([sums, torch.tensor([self._samples], dtype=torch.float64)])
        if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            dist.all_reduce(row, group=patient_group())
        *errors, samples = row.tolist()
        return LevelErrors(
            self.log_snr,
            tuple(error / samples if samples else math.nan for error in errors),
            int(samples),
        )


def errors_at_levels(
    network: Any,
    schedule: NoiseSchedule | Noising,
    batches: Iterable[Any],
    levels: int = 8,
    *,
    samples: int | None = None,
    seed: int = VALIDATION_SEED,
) -> LevelErrors:
    """Return the network's error at fixed noise levels, in any training loop.

    Every process of torch.distributed must call it. Sample k of a process is the sample ``k ·
    world_size + rank`` of the validation set, as with a DistributedSampler that does not shuffle.
    The result does not depend on the number of processes. The network runs in eval mode without
    gradients, and its ``training`` flags are restored. No global random number is drawn.

    Args:
        network: ``network(x, timesteps, **conditioning)``; returns a tensor or an object with
            ``.sample``.
        schedule: the schedule of the training, or its Noising, which a network with times of shape
            (batch, k) needs.
        batches: clean samples on the network's device, or pairs (samples, conditioning).
        levels: number of noise levels, the terminal one among them.
        samples: size of the validation set. A DistributedSampler repeats samples until every
            process has equally many; those are left out.
        seed: seed of the noise.

    Returns:
        The mean error of each level.

    >>> found = errors_at_levels(lambda x, t: x, NoiseSchedule.flow(), [torch.zeros(64, 3)], 4)
    >>> found.samples, found.errors[0]  # x is the noise, and the target too
    (64, 0.0)
    """
    distributed = dist.is_available() and dist.is_initialized()
    rank, world_size = (dist.get_rank(), dist.get_world_size()) if distributed else (0, 1)
    noising = schedule if isinstance(schedule, Noising) else Noising(schedule)
    sums, start = ErrorsAtLevels(validation_noising(noising, seed), levels), 0
    with evaluating(network):
        for batch in batches:
            x0, conditioning = (batch, {}) if isinstance(batch, Tensor) else batch
            index = [(start + k) * world_size + rank for k in range(len(x0))]
            kept = None if samples is None else [i < samples for i in index]
            sums.add(network, x0, index, conditioning, kept)
            start += len(x0)
    return sums.reduced()


def validation_noising(noising: Noising, seed: int = VALIDATION_SEED) -> Noising:
    """Return the noising of a validation: unweighted, with even times and noise of its own.

    >>> validation_noising(Noising(NoiseSchedule.flow(), "snr", "logit_normal")).timesteps
    UniformTimesteps(stratified=True, across=1)
    """
    times = noising.timesteps
    even = times.evenly() if isinstance(times, ShapedTimesteps) else "stratified"
    return Noising(noising.schedule, Uniform(), even, seed=seed)


def plot_validations(validations: Mapping[int, LevelErrors]) -> bytes:
    """Return a PNG: error against log SNR, a curve for each validation by its step.

    With many validations the first, the last and some between are drawn. Raises ImportError without
    matplotlib.

    >>> found = LevelErrors((-torch.inf, 0.0, 4.5), (1.0, 0.75, 0.5), samples=128)
    >>> plot_validations({100: found})[:4]
    b'\\x89PNG'
    """
    figure = new_figure(8, 4.5)
    axes: Axes = figure.subplots()
    every = [level for found in validations.values() for level in found.log_snr]
    low, high = edges(every)
    steps = sorted(validations)
    places = torch.linspace(0, len(steps) - 1, min(len(steps), MOST_CURVES)).round().long()
    shown = [steps[i] for i in places.unique().tolist()]
    positive = True
    for number, step in enumerate(shown):
        found = validations[step]
        at = [min(max(level, low), high) for level in found.log_snr]
        share = (number + 1) / len(shown)
        last = step == shown[-1]
        axes.plot(
            at,
            found.errors,
            "o-",
            color=COLOURS[0],
            alpha=share,
            lw=2 if last else 1.2,
            label=f"step {step}",
        )
        positive = positive and all(error > 0 for error in found.errors)
    if positive:
        axes.set_yscale("log")
    dress(axes, "validation error at fixed noise levels", LOG_SNR, "mean squared error")
    mark_infinity(axes.xaxis, low, high, every)
    axes.legend(frameon=False, fontsize=9)
    return png_of(figure)
