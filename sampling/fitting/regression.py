"""Robust regression from sums of products, one small matrix for each seed.

For the vectors v_1 ... v_p of a seed and the rest r to be explained, the matrix of all scalar
products gives |r - Σ c_j v_j|² for any c. So weights, shrinkage and errors need these matrices
alone, and the vectors are never held together.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .trajectories import Total

SHRINKAGES = (1e-9, 1e-6, 1e-4, 1e-3, 1e-2, 1e-1, 1.0)
"""The strengths that held-out seeds choose from: a multiple of the products of each vector."""

ITERATIONS = 8
"""Iterations of the weights."""


def products(vectors: Sequence[Tensor]) -> Tensor:
    """Return all scalar products of vectors (batch, values), in float64, shape (batch, p, p).

    >>> products([torch.ones(1, 2), 2 * torch.ones(1, 2)]).tolist()
    [[[2.0, 4.0], [4.0, 8.0]]]
    """
    rows = torch.stack([v.double() for v in vectors], 1)
    return (rows @ rows.mT).cpu()


def residuals(grams: Tensor, coefficients: Tensor) -> Tensor:
    """Return |r - Σ c_j v_j| for each seed, from products (seeds, p + 1, p + 1) with r last.

    Shapes of c (..., p) and of the result (..., seeds).
    """
    c = torch.cat([-coefficients, coefficients.new_ones(*coefficients.shape[:-1], 1)], -1)
    pairs = (c[..., :, None] * c[..., None, :]).flatten(-2)
    return (pairs @ grams.flatten(1).mT).clamp(min=0).sqrt()


def mean_logs(errors: Tensor, total: Total) -> Tensor:
    """Return the mean logarithm of errors (..., seeds) over all ranks, not below log(1e-12)."""
    logs = errors.clamp(min=1e-12).log().sum(-1)
    summed = total(torch.stack([logs, torch.full_like(logs, errors.shape[-1])]))
    return summed[0] / summed[1]


def mean_log(errors: Tensor, total: Total) -> float:
    """Return the mean logarithm of errors (seeds,) over all ranks."""
    return float(mean_logs(errors, total))


def robust_solutions(
    grams: Tensor,
    norms: Tensor,
    shrinkages: Sequence[float],
    total: Total,
    iterations: int = ITERATIONS,
) -> Tensor:
    """Return c with the least mean logarithm of |r - Σ c_j v_j| / |y| over seeds.

    Iteratively reweighted least squares: the weight of a seed is 1 / residual², but not more than
    that of the geometric mean. So a few seeds with large errors do not decide. All sums are over
    all ranks.

    Args:
        grams: Products (seeds, p + 1, p + 1) of v_1 ... v_p and r.
        norms: |y| of each seed.
        shrinkages: Penalties on c_j² in units of the weighted product of v_j with itself.
        total: Adds over ranks.
        iterations: Iterations of the weights.

    Returns:
        One c for each shrinkage, shape (shrinkages, p).
    """
    size = grams.shape[1]
    penalties = torch.tensor(shrinkages, dtype=grams.dtype)[:, None, None] * torch.eye(
        size - 1, dtype=grams.dtype
    )
    c = grams.new_zeros(len(shrinkages), size - 1)
    errors = residuals(grams, c) / norms
    for _ in range(iterations):
        least = mean_logs(errors, total).exp()[:, None]
        weights = 1 / (norms * torch.maximum(errors, least.clamp(min=1e-12))) ** 2
        moments = total(weights @ grams.flatten(1)).view(-1, size, size)
        scale = moments.diagonal(dim1=1, dim2=2)[:, :-1].clamp(min=1e-300).rsqrt()
        matrix = moments[:, :-1, :-1] * scale[:, :, None] * scale[:, None] + penalties
        c = scale * torch.linalg.solve(matrix, scale * moments[:, :-1, -1])
        errors = residuals(grams, c) / norms
    return c


def chosen_solution(grams: Tensor, norms: Tensor, fitted: int, total: Total) -> Tensor:
    """Return the solution on the first ``fitted`` seeds whose error on the others is least.

    No correction at all, c = 0, is among the choices.
    """
    choices = robust_solutions(grams[:fitted], norms[:fitted], SHRINKAGES, total)
    choices = torch.cat([torch.zeros_like(choices[:1]), choices])
    errors = mean_logs(residuals(grams[fitted:], choices) / norms[fitted:], total)
    return choices[int(errors.argmin())]
