"""Strata across optimizer steps: even times for batch size 1.

Stratified times put one sample of an optimizer step into each of its B strata. ``across=N`` cuts
each stratum into N parts, and N consecutive steps visit each part once. So N steps with B samples
cover N·B strata, and each single step still covers its B strata.

The order of the parts is a van der Corput sequence in base 2 with Owen's nested scrambling (Owen
1995, "Randomly permuted (t,m,s)-nets"): each aligned block of 2, 4, 8, ... steps covers 2, 4, 8,
... equal parts too, so the times are even over the few steps that an optimizer's momentum averages.
Every window of N steps is scrambled anew. An infinite sequence would give odd steps only one half
of the noise levels, and a logger that looks at every 50th step would see that half alone.

The scrambling is a function of (seed, window, stratum), and the part also of the step. So the times
of a step depend neither on the number of processes nor on earlier steps, and a resume continues
exactly. The times of each sample still have exactly the density.
"""

from __future__ import annotations

from torch import Tensor

from ..utils.rng import Draws, Stream
from ..utils.validation import whole_number

MOST_STEPS = 1 << 16
"""The largest N: a sample costs N / 64 random numbers at each step."""
_BITS = 64


def across_steps(u: Tensor, cells: Tensor, seed: int, step: int, across: int) -> Tensor:
    """Return ``u`` in the part of its stratum that this step visits.

    Args:
        u: position in the stratum, uniform in (0, 1], shape (batch,).
        cells: number of each sample's stratum, shape (batch,), int64.
        seed: seed of the scrambling.
        step: the optimizer step.
        across: N, a power of two.

    >>> import torch
    >>> u, cells = torch.ones(1), torch.zeros(1, dtype=torch.int64)
    >>> visited = [across_steps(u, cells, 0, step, 8).item() for step in range(8)]
    >>> sorted(visited) == [k / 8 for k in range(1, 9)]
    True
    """
    if across == 1:
        return u
    window, place = step // across, step % across
    flips = Draws(seed, cells, step=window, stream=Stream.STRATA_ACROSS_STEPS)
    words = flips.bits(-(-across // _BITS))
    part = cells * 0
    for level in range(int(across).bit_length() - 1):
        node = (1 << level) + place % (1 << level)  # the digits before this one
        flip = words[:, node // _BITS] >> (node % _BITS)
        part = 2 * part + ((place // (1 << level) + flip) & 1)
    return (part + u) / across


def require_across(across: int, stratified: bool) -> None:
    """Raise ValueError unless strata can be spread over ``across`` optimizer steps.

    >>> require_across(100, stratified=True)
    Traceback (most recent call last):
    ValueError: across must be a power of two in 1 ... 65536, got 100; write e.g. across=128
    """
    whole_number("across", across)
    if not 1 <= across <= MOST_STEPS or across & (across - 1):
        near = min(1 << max(across - 1, 1).bit_length(), MOST_STEPS)
        raise ValueError(
            f"across must be a power of two in 1 ... {MOST_STEPS}, got {across}; write e.g. "
            f"across={near}"
        )
    if across > 1 and not stratified:
        raise ValueError(
            f"across={across} spreads strata over optimizer steps, and these times are not "
            "stratified; take the stratified form, e.g. stratified_logit_normal:across=64"
        )
