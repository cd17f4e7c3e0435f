"""Robust regression from sums of products, one small matrix for each seed.

For the vectors v_1 ... v_p of a seed and the rest r to be explained, the matrix of all scalar
products gives |r - Σ c_j v_j|² for any c. So weights, shrinkage and errors need these matrices
alone, and the vectors are never held together.
"""

from __future__ import annotations

import math
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
    """Return |r - Σ c_j v_j| for each seed, from products (seeds, p + 1, p + 1) with r last."""
    c = torch.cat([-coefficients, coefficients.new_ones(1)])
    return torch.einsum("i,sij,j->s", c, grams, c).clamp(min=0).sqrt()


def mean(values: Tensor, total: Total) -> float:
    """Return the mean over the seeds of all ranks."""
    summed = total(torch.stack([values.sum(), values.new_tensor(float(len(values)))]))
    return float(summed[0] / summed[1])


def mean_log(errors: Tensor, total: Total) -> float:
    """Return the mean logarithm of errors over all ranks, not below log(1e-12)."""
    return mean(errors.clamp(min=1e-12).log(), total)


def ridge_solution(moments: Tensor, shrinkage: float) -> Tensor:
    """Return c of least squares from products (p + 1, p + 1), with a penalty on c_j².

    The penalty is ``shrinkage`` in units of the product of v_j with itself.
    """
    q = len(moments) - 1
    scale = moments.diagonal()[:q].clamp(min=1e-300).rsqrt()
    matrix = moments[:q, :q] * scale[:, None] * scale
    matrix = matrix + shrinkage * torch.eye(q, dtype=matrix.dtype)
    right = (scale * moments[:q, q])[:, None]
    return scale * torch.linalg.lstsq(matrix, right, driver="gelsd")[0][:, 0]


def robust_solution(
    grams: Tensor, norms: Tensor, shrinkage: float, total: Total, iterations: int = ITERATIONS
) -> Tensor:
    """Return c with the least mean logarithm of |r - Σ c_j v_j| / |y| over seeds.

    Iteratively reweighted least squares: the weight of a seed is 1 / residual², but not more than
    that of the geometric mean. So a few seeds with large errors do not decide. All sums are over
    all ranks.

    Args:
        grams: Products (seeds, p + 1, p + 1) of v_1 ... v_p and r.
        norms: |y| of each seed.
        shrinkage: The penalty on c_j² in units of the weighted products of v_j.
        total: Adds over ranks.
        iterations: Iterations of the weights.
    """
    c = grams.new_zeros(grams.shape[1] - 1)
    errors = residuals(grams, c) / norms
    for _ in range(iterations):
        least = max(math.exp(mean_log(errors, total)), 1e-12)
        weights = 1 / (norms * errors.clamp(min=least)) ** 2
        c = ridge_solution(total((weights[:, None, None] * grams).sum(0)), shrinkage)
        errors = residuals(grams, c) / norms
    return c


def chosen_solution(grams: Tensor, norms: Tensor, fitted: int, total: Total) -> Tensor:
    """Return the solution on the first ``fitted`` seeds whose error on the others is least.

    No correction at all, c = 0, is among the choices.
    """
    choices = [grams.new_zeros(grams.shape[1] - 1)]
    choices += [robust_solution(grams[:fitted], norms[:fitted], s, total) for s in SHRINKAGES]
    rest = grams[fitted:], norms[fitted:]
    errors = [mean_log(residuals(rest[0], c) / rest[1], total) for c in choices]
    return choices[errors.index(min(errors))]
