"""Losses by noise level: buckets of log SNR on the device, findings as text, and a plot.

The buckets divide the range of the schedule into equal parts; the first and the last one are open.
Infinite log SNR at either end (a zero-SNR terminal step, a clean sample) has its own bucket.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..noising import NoiseSchedule
from .plots.figure import COLOURS, LOG_SNR, new_figure, png_of

FURTHEST = 15.0  # largest |log SNR| of an edge: beyond it, float32 sees only noise or only data
COUNT, ERROR, LOSS, WEIGHT = range(4)  # rows of the sums
ENOUGH = 20  # minimum expected samples (with uniform times) before a warning about an empty bucket
DOMINATES = 0.5  # share of the loss in one bucket for a finding


@dataclass(frozen=True)
class Buckets:
    """Buckets of log SNR: 0 is -∞, 1 ... n lie between the ``edges``, n + 1 is +∞.

    Args:
        edges: the n + 1 edges, ascending.
        reach: share of each bucket if the times of the curve are uniform, shape (n + 2,).

    >>> buckets = Buckets.of(NoiseSchedule.scaled_linear(), 10)
    >>> len(buckets), buckets.name(0), buckets.name(3)
    (12, 'zero SNR', 'log SNR -2.9 to -1.6')
    """

    edges: tuple[float, ...]
    reach: tuple[float, ...]

    def __len__(self) -> int:
        return len(self.edges) + 1

    @staticmethod
    def of(schedule: NoiseSchedule, number: int) -> Buckets:
        """Return ``number`` equal buckets over the finite log SNR of a schedule."""
        curve = schedule.curve
        count = curve.num_train_timesteps if curve.is_discrete else 10_000
        u = (torch.arange(count, dtype=torch.float64) + 0.5) / count
        log_snr = curve.log_snr(curve.time_at_quantile(u))
        finite = log_snr[log_snr.isfinite()].clamp(-FURTHEST, FURTHEST)
        edges = tuple(np.linspace(float(finite.min()), float(finite.max()), number + 1).tolist())
        share = torch.bincount(_index(log_snr, edges), minlength=number + 2) / count
        return Buckets(edges, tuple(share.tolist()))

    def index(self, log_snr: Tensor) -> Tensor:
        """Return the bucket number of each log SNR, on its device, without a sync."""
        return _index(log_snr, self.edges)

    def name(self, i: int) -> str:
        """Return the bucket's name for messages."""
        if i in (0, len(self) - 1):
            return "zero SNR" if i == 0 else "infinite SNR"
        return f"log SNR {self.edges[i - 1]:.1f} to {self.edges[i]:.1f}"

    def tag(self, i: int) -> str:
        """Return the bucket's name for loggers, which sort by name."""
        if i in (0, len(self) - 1):
            return f"{i:02d}_{self.name(i).replace(' ', '_')}"
        return f"{i:02d}_{self.edges[i - 1]:.1f}_to_{self.edges[i]:.1f}"

    def zeros(self, device: torch.device) -> Tensor:
        """Return empty sums, shape (4, number of buckets), float32.

        The rows are samples, errors, weighted errors and weights.
        """
        return torch.zeros(4, len(self), device=device)

    def add(
        self,
        sums: Tensor,
        log_snr: Tensor,
        errors: Tensor,
        weight: Tensor,
        counted: Tensor | None = None,
    ) -> None:
        """Add samples to ``sums``, in place and without a sync of the device.

        ``log_snr``, ``errors`` and ``weight`` have shape (batch,), or (batch, k) for k elements of
        each sample. ``counted`` is True for those to add; None adds all.

        >>> buckets = Buckets.of(NoiseSchedule.flow(), 2)
        >>> sums = buckets.zeros(torch.device("cpu"))
        >>> buckets.add(
        ...     sums,
        ...     torch.tensor([-1.0, 2.0, 3.0]),
        ...     torch.tensor([4.0, 1.0, 2.0]),
        ...     torch.tensor([1.0, 1.0, 0.5]),
        ... )
        >>> sums[ERROR].tolist(), sums[LOSS].tolist()
        ([0.0, 4.0, 3.0, 0.0], [0.0, 4.0, 2.0, 0.0])
        """
        rows = torch.stack([torch.ones_like(errors), errors, weight * errors, weight]).float()
        if counted is not None:
            rows = torch.where(counted, rows, 0.0)
        sums.index_add_(1, self.index(log_snr).flatten(), rows.flatten(1))


def _index(log_snr: Tensor, edges: tuple[float, ...]) -> Tensor:
    inner = _inner(edges, log_snr.dtype, log_snr.device)
    index = torch.bucketize(log_snr, inner, right=True) + 1
    index = torch.where(log_snr == -math.inf, 0, index)
    return torch.where(log_snr == math.inf, len(edges), index)


@lru_cache(maxsize=8)
def _inner(edges: tuple[float, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    # cached: the copy is a sync
    return torch.tensor(edges[1:-1], dtype=dtype, device=device)


@dataclass(frozen=True)
class Finding:
    """One finding about the sums.

    Args:
        key: identifies the finding, so that it is reported only once.
        warning: whether the finding is a warning.
        text: the message.
    """

    key: str
    warning: bool
    text: str


def findings(buckets: Buckets, sums: Tensor, drawn: Tensor) -> list[Finding]:
    """Return what is unusual in the sums.

    The findings are: buckets of the schedule that no sample has, samples of weight zero (e.g. a
    terminal step of zero SNR), errors that are not finite, and a bucket with most of the loss.

    Args:
        buckets: the buckets.
        sums: sums of the most recent steps.
        drawn: samples per bucket since the start.

    >>> buckets = Buckets.of(NoiseSchedule.scaled_linear(), 4)
    >>> sums = torch.tensor(
    ...     [
    ...         [0.0, 50, 50, 50, 0, 0],
    ...         [0.0, 5, 5, 5, 0, 0],
    ...         [0.0, 5, 5, 5, 0, 0],
    ...         [0.0, 50, 50, 50, 0, 0],
    ...     ]
    ... )
    >>> for found in findings(buckets, sums, sums[COUNT] * 10):
    ...     print(found.text)
    of 1500 samples none had log SNR 4.0 to 7.1, which is 2 % of the schedule's times: ...
    """
    found = [*_never(buckets, drawn), *_weightless(buckets, sums), *_not_finite(buckets, sums)]
    return found + _dominating(buckets, sums)


def _never(buckets: Buckets, drawn: Tensor) -> list[Finding]:
    total = float(drawn.sum())
    empty = [i for i in range(len(buckets)) if drawn[i] == 0 and buckets.reach[i] * total >= ENOUGH]
    return [
        Finding(
            f"never {i}",
            True,
            f"of {total:.0f} samples none had {buckets.name(i)}, which is "
            f"{_percent(buckets.reach[i])} of the schedule's "
            "times: the network does not learn what sampling will ask of it there; look at the "
            "density of timesteps",
        )
        for i in empty
    ]


def _weightless(buckets: Buckets, sums: Tensor) -> list[Finding]:
    found = []
    for i in range(len(buckets)):
        if sums[COUNT, i] > 0 and sums[WEIGHT, i] == 0:
            text = (
                f"all {sums[COUNT, i]:.0f} samples of {buckets.name(i)} had weight 0, "
                "and taught the network nothing"
            )
            if i == 0:
                text += (
                    ": sampling starts from there; give the weighting a floor (e.g. floor=0.05), "
                    "or use 'uniform'"
                )
            found.append(Finding(f"weightless {i}", True, text))
    return found


def _not_finite(buckets: Buckets, sums: Tensor) -> list[Finding]:
    return [
        Finding(f"not finite {i}", True, f"the loss of {buckets.name(i)} is not finite")
        for i in range(len(buckets))
        if not bool(sums[:, i].isfinite().all())
    ]


def _dominating(buckets: Buckets, sums: Tensor) -> list[Finding]:
    share, samples = _shares(sums[LOSS]), _shares(sums[COUNT])
    i = int(share.nan_to_num().argmax())
    # no finding if the bucket also has a large share of the samples
    if not share[i] > DOMINATES or not share[i] > 2 * samples[i]:
        return []
    of_loss, of_samples = _percent(float(share[i])), _percent(float(samples[i]))
    text = f"{buckets.name(i)} makes {of_loss} of the loss with {of_samples} of the samples"
    return [
        Finding(
            f"dominates {i}",
            False,
            f"{text}; other noise levels are hardly trained: look at the weighting",
        )
    ]


def _shares(row: Tensor) -> Tensor:
    return row.double() / row.double().sum().clamp(min=1e-30)


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %" if share >= 0.01 else f"{100 * share:.1g} %"


def means(buckets: Buckets, sums: Tensor) -> dict[str, float]:
    """Return the mean error and the mean loss of each bucket that has samples, by logger name.

    >>> buckets = Buckets.of(NoiseSchedule.flow(), 1)
    >>> means(buckets, torch.tensor([[0.0, 2, 0], [0.0, 6, 0], [0.0, 3, 0], [0.0, 1, 0]]))
    {'loss_by_snr/error/01_-15.0_to_15.0': 3.0, 'loss_by_snr/loss/01_-15.0_to_15.0': 1.5}
    """
    filled = [i for i in range(len(buckets)) if sums[COUNT, i] > 0]
    rows = (("error", ERROR), ("loss", LOSS))
    return {
        f"loss_by_snr/{word}/{buckets.tag(i)}": float(sums[row, i] / sums[COUNT, i])
        for word, row in rows
        for i in filled
    }


def plot(buckets: Buckets, sums: Tensor, title: str) -> bytes:
    """Return a PNG: mean error and mean loss against log SNR, and the shares of samples and loss.

    The shares are in the lower panel. Raises ImportError without matplotlib.

    >>> schedule = NoiseSchedule.scaled_linear()
    >>> plot(Buckets.of(schedule, 4), torch.ones(4, 6), "step 500")[:4]
    b'\\x89PNG'
    """
    figure = new_figure(8, 6)
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=(2, 1))
    x, ticks = _positions(buckets)
    table = sums.double().numpy()
    with np.errstate(divide="ignore", invalid="ignore"):
        mean = np.where(table[COUNT] > 0, table[[ERROR, LOSS]] / table[COUNT], np.nan)
    above.plot(x, mean[0], "o-", color=COLOURS[0], label="error, unweighted")
    above.plot(x, mean[1], "s--", color=COLOURS[1], label="loss, weighted")
    if np.nanmin(np.where(mean > 0, mean, np.inf), initial=np.inf) < math.inf:
        above.set_yscale("log")  # omits zeros
    above.set_title(title, loc="left")
    above.set_ylabel("mean of a bucket")
    above.legend(frameon=False)
    _bars(below, x, _shares(sums[COUNT]).numpy(), _shares(sums[LOSS]).numpy())
    below.set_xticks(*ticks)
    below.set_xlabel(LOG_SNR)
    return png_of(figure)


def _positions(buckets: Buckets) -> tuple[np.ndarray[Any, Any], tuple[list[float], list[str]]]:
    """Return the x position of each bucket, and the ticks with their labels.

    The infinite buckets are one bucket width outside.
    """
    edges = np.asarray(buckets.edges)
    width = edges[1] - edges[0]
    middle = (edges[:-1] + edges[1:]) / 2
    x = np.concatenate([[edges[0] - width], middle, [edges[-1] + width]])
    shown = edges[:: max(1, len(edges) // 8)]
    return x, ([x[0], *shown, x[-1]], ["-∞", *(f"{edge:.1f}" for edge in shown), "∞"])


def _bars(
    axes: Any, x: np.ndarray[Any, Any], samples: np.ndarray[Any, Any], loss: np.ndarray[Any, Any]
) -> None:
    width = 0.4 * (x[2] - x[1] if len(x) > 3 else x[1] - x[0])
    axes.bar(x - width / 2, samples, width, color="#999999", label="samples")
    axes.bar(x + width / 2, np.nan_to_num(loss), width, color=COLOURS[1], label="loss")
    axes.set_ylabel("share")
    axes.legend(frameon=False)
