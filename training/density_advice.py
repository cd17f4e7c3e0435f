"""Advice on the density of training times, from the losses by noise level of a training.

A heuristic for a question that the papers leave open (NVlabs/edm2#2). EDM2 says what the density is
for: P_mean and P_std focus the training on the noise levels that matter (Karras et al. 2312.02696,
appendix B.2). EDM looks at where training lowers the loss: little at the ends, most in the middle
(2206.00364, section 5, figure 5a).

Model: the loss of bucket i is L_i = l_i + c_i / n_i after n_i samples of its noise levels. 1 / n is
the rate of stochastic gradients on a convex problem, and c_i grows with their variance (Bottou,
Curtis & Nocedal 1606.04838, theorem 4.7). Two things follow:

- The relative excess is a slope that can be measured: -d log L_i / d log n = (c_i / n_i) / L_i.
- n_i = p_i n samples lower the sum of the relative excesses the most if p_i ∝ sqrt(c_i / l_i), as
  in Neyman's allocation. With the present density p and the slopes s this is sqrt(p_i s_i).

So the advice is the geometric mean of what was drawn and of where the loss still falls; where both
are proportional, it keeps the density. It assumes that the buckets learn separately and that a
relative excess matters equally at every noise level. It does not know what images look like.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from ..noising import NoiseSchedule
from ..noising.curves.base import Curve
from ..noising.timesteps.base import Timesteps
from ..noising.timesteps.shaped import ShapedTimesteps
from .plots.figure import COLOURS, LOG_SNR, dress, new_figure, png_of
from .snr_buckets import Buckets

MOST_WINDOWS = 64
LEAST_WINDOWS, LEAST_SAMPLES = 6, 8  # of a bucket, and of a window in it
SIGNIFICANT = 3.0  # standard errors of a slope: above chance over many buckets
LEAST_BUCKETS = 3
_TRIED = torch.tensor([0.1, 0.3, 0.5, 0.9], dtype=torch.float64)

Window = tuple[Sequence[float], Sequence[float]]
"""Samples and summed errors of each bucket in a part of the training."""


@dataclass(frozen=True)
class Advice:
    """The advised density, or why there is none.

    Args:
        text: what to tell the user.
        flags: flags of the density, or None.
        mean: mean of log(σ / α) under the density.
        std: its spread.
        slopes: relative excess of each bucket, NaN where it is not known.
        errors: standard errors of the slopes.
        drawn: share of the samples of each bucket.
        wanted: advised share of each bucket.
    """

    text: str
    flags: str | None = None
    mean: float = math.nan
    std: float = math.nan
    slopes: tuple[float, ...] = ()
    errors: tuple[float, ...] = ()
    drawn: tuple[float, ...] = ()
    wanted: tuple[float, ...] = ()


def advise_density(
    buckets: Buckets, windows: Sequence[Window], schedule: NoiseSchedule, current: Timesteps
) -> Advice:
    """Return a density of training times from the losses of a training.

    The slopes are measured over the samples after the first quarter. A bucket counts if its slope
    is more than three standard errors above 0.

    Args:
        buckets: the buckets of log SNR.
        windows: samples and summed unweighted errors of each bucket, in the order of the training.
        schedule: the schedule of the training.
        current: the density of the training; the advice is stratified as it is. Of k times for a
            sample, the advice is of the density inside.

    >>> from alphabar.noising import UniformTimesteps
    >>> flow = NoiseSchedule.flow()
    >>> buckets = Buckets.of(flow, 15)
    >>> advise_density(buckets, [([9] * 17, [1] * 17)] * 3, flow, UniformTimesteps()).text
    'no advice on the density of timesteps: 3 reports, and at least 8 are needed'
    """
    if len(windows) < LEAST_WINDOWS + 2:
        return _none(f"{len(windows)} reports, and at least {LEAST_WINDOWS + 2} are needed")
    counts, sums = np.array(windows, dtype=np.float64).transpose(1, 0, 2)[..., 1:-1]
    seen = counts.sum(1).cumsum()
    late = seen > seen[-1] / 4
    slopes, errors = _slopes(np.log(seen - counts.sum(1) / 2)[late], counts[late], sums[late])
    falls = np.nan_to_num(slopes) > SIGNIFICANT * np.nan_to_num(errors, nan=math.inf)
    if falls.sum() < LEAST_BUCKETS:
        return _none(
            f"the loss falls measurably in {falls.sum()} buckets of log SNR, and in at least "
            f"{LEAST_BUCKETS} it must; train longer, or take fewer buckets"
        )
    drawn = counts.sum(0) / counts.sum()
    wanted = np.sqrt(drawn * np.where(falls, slopes, 0.0))
    wanted /= wanted.sum()
    mean, std = _normal(buckets, wanted)
    flags = flags_of(mean, std, schedule.curve, current)
    was, spread = _normal(buckets, drawn)
    inner = isinstance(current, ShapedTimesteps)
    place = f", as density= of the {current.name} timesteps" if inner else ""
    text = (
        f"the loss still falls at {_where(buckets, falls)}; a density for it{place}: {flags} "
        f"(log(σ/α) of "
        f"mean {mean:.2f} and std {std:.2f}; drawn were {was:.2f} and {spread:.2f}). A heuristic, "
        "see alphabar/training/density_advice.py: compare the validation losses of a short run"
    )
    rows = (slopes, errors, drawn, wanted)
    return Advice(text, flags, mean, std, *(tuple(row.tolist()) for row in rows))


def flags_of(mean: float, std: float, curve: Curve, current: Timesteps) -> str:
    """Return the flags of log(σ / α) ~ N(mean, std²) on a curve.

    On a flow this is logit-normal in the time before the shift; elsewhere the density of EDM.

    >>> from alphabar.noising import Flow, UniformTimesteps
    >>> flags_of(0.5, 1.0, Flow(), UniformTimesteps(stratified=True))
    '--timestep_density stratified_logit_normal:mean=0.5,std=1.0'
    """
    prefix = "stratified_" if current.stratified else ""
    across = f"across={current.across}" if current.across > 1 else ""
    shift = -curve.log_snr(curve.time_at_quantile(_TRIED)).double() / 2 - torch.logit(_TRIED)
    if bool((shift - shift[0]).abs().max() < 1e-3):
        options = [f"mean={mean - float(shift[0]):.3g}", f"std={std:.3g}"]
        options = [f"{one}.0" if "." not in one else one for one in options]
        options += [across] if across else []
        return f"--timestep_density {prefix}logit_normal:{','.join(options)}"
    name = f"{prefix}lognormal_sigma" + (f":{across}" if across else "")
    return f"--timestep_density {name} --p_mean {mean:.3g} --p_std {std:.3g}"


def merged(windows: list[Window]) -> list[Window]:
    """Return at most ``MOST_WINDOWS`` windows: beyond it, pairs become one.

    >>> merged([([1], [2])] * 65)[0], len(merged([([1], [2])] * 65))
    (([2], [4]), 33)
    """
    if len(windows) <= MOST_WINDOWS:
        return windows
    whole = len(windows) // 2 * 2
    pairs = [
        tuple([a + b for a, b in zip(*rows, strict=True)] for rows in zip(*pair, strict=True))
        for pair in zip(windows[:whole:2], windows[1:whole:2], strict=True)
    ]
    return [(counts, sums) for counts, sums in pairs] + windows[whole:]


def plot_advice(buckets: Buckets, advice: Advice) -> bytes:
    """Return a PNG: where the loss falls, and the density that was drawn beside the advised one.

    Raises ImportError without matplotlib.
    """
    figure = new_figure(8, 6)
    above, below = figure.subplots(2, 1, sharex=True)
    edges = np.asarray(buckets.edges)
    middle, width = (edges[:-1] + edges[1:]) / 2, edges[1] - edges[0]
    slopes, errors = np.array(advice.slopes), np.array(advice.errors)
    above.errorbar(middle, slopes, SIGNIFICANT * errors, fmt="o", color=COLOURS[0], capsize=3)
    above.axhline(0, color="#333333", lw=0.8)
    dress(above, "where the loss still falls", "", "−d log loss / d log samples")
    below.bar(middle, np.array(advice.drawn) / width, width, color="#BBBBBB", label="drawn")
    wanted = np.array(advice.wanted) / width
    below.step(middle, wanted, where="mid", color=COLOURS[1], label="√(drawn · fall)")
    x = np.linspace(edges[0], edges[-1], 400)
    z = (-x / 2 - advice.mean) / advice.std
    density = np.exp(-(z**2) / 2) / (2 * advice.std * math.sqrt(2 * math.pi))
    below.plot(x, density, color=COLOURS[0], label=advice.flags)
    dress(below, "density over log SNR", LOG_SNR, "probability per unit")
    figure.legend(loc="outside lower left", ncols=3, frameon=False, fontsize=8)
    return png_of(figure)


def _none(why: str) -> Advice:
    return Advice(f"no advice on the density of timesteps: {why}")


def _slopes(x: np.ndarray, counts: np.ndarray, sums: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return -d log(mean error) / dx of each bucket with its standard error; NaN if unknown.

    Weighted least squares; the error is that of the residuals, i.e. of the noise of the losses.
    """
    slopes, errors = (np.full(counts.shape[1], math.nan) for _ in range(2))
    for i in range(counts.shape[1]):
        used = (counts[:, i] >= LEAST_SAMPLES) & np.isfinite(sums[:, i]) & (sums[:, i] > 0)
        if used.sum() < LEAST_WINDOWS:
            continue
        w, at = counts[used, i], x[used]
        y = np.log(sums[used, i] / w)
        at = at - np.average(at, weights=w)
        spread = (w * at**2).sum()
        slope = (w * at * y).sum() / spread
        rest = y - np.average(y, weights=w) - slope * at
        slopes[i] = -slope
        errors[i] = math.sqrt((w * rest**2).sum() / (used.sum() - 2) / spread)
    return slopes, errors


def _normal(buckets: Buckets, shares: np.ndarray) -> tuple[float, float]:
    """Return mean and spread of log(σ / α) = -log SNR / 2 under shares of the buckets."""
    edges = np.asarray(buckets.edges)
    middle, width = (edges[:-1] + edges[1:]) / 2, edges[1] - edges[0]
    mean = float((shares * middle).sum() / shares.sum())
    variance = float((shares * (middle - mean) ** 2).sum() / shares.sum()) + width**2 / 12
    return -mean / 2, math.sqrt(variance) / 2


def _where(buckets: Buckets, falls: np.ndarray) -> str:
    at = np.flatnonzero(falls)
    return f"log SNR {buckets.edges[at[0]]:.1f} to {buckets.edges[at[-1] + 1]:.1f}"
