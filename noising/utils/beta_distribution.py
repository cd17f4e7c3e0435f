"""The quantiles of the Beta distribution, of which densities of timesteps and some grids are made, to 1e-12 and without scipy."""

from __future__ import annotations

import math

import torch
from torch import Tensor

TINY, EPS = 1e-300, 2.0**-52


def beta_quantile(u: Tensor, a: float, b: float) -> Tensor:
    """Return x with I_x(a, b) = u: scipy.stats.beta.ppf. Shape and device of ``u``; float64.

    Raises ValueError unless a and b are positive and u lies in [0, 1].

    >>> beta_quantile(torch.tensor([0.0, 0.5, 0.75, 1.0]), 0.5, 0.5)  # the arcsine law: sin²(π u / 2)
    tensor([0.0000, 0.5000, 0.8536, 1.0000], dtype=torch.float64)
    """
    if not (a > 0 and b > 0):
        raise ValueError(f"alpha and beta must be positive, got {a} and {b}; the published schedule has 0.6 for both")
    u = u.double()
    if not bool(((u >= 0) & (u <= 1)).all()):
        raise ValueError("quantiles are of probabilities in [0, 1]")
    ends, u = u, torch.where((u > 0) & (u < 1), u, 0.5)
    low, high, x = torch.zeros_like(u), torch.ones_like(u), torch.full_like(u, 0.5)
    for _ in range(64):  # Newton's method, and bisection where it would leave the bracket
        value = beta_cdf(x, a, b)
        low, high = torch.where(value < u, x, low), torch.where(value < u, high, x)
        step = x - (value - u) / beta_pdf(x, a, b)
        last, x = x, torch.where((step >= low) & (step <= high), step, 0.5 * (low + high))
        if float((x - last).abs().max()) < 4 * EPS:
            break
    return torch.where((ends > 0) & (ends < 1), x, ends)


def beta_pdf(x: Tensor, a: float, b: float) -> Tensor:
    """Return the density x^(a - 1) (1 - x)^(b - 1) / B(a, b) for x in (0, 1).

    >>> beta_pdf(torch.tensor([0.25], dtype=torch.float64), 2.0, 1.0)  # 2 x
    tensor([0.5000], dtype=torch.float64)
    """
    return torch.exp((a - 1) * x.log() + (b - 1) * torch.log1p(-x) - _log_beta(a, b))


def _log_beta(a: float, b: float) -> float:
    return math.lgamma(a) + math.lgamma(b) - math.lgamma(a + b)


def beta_cdf(x: Tensor, a: float, b: float) -> Tensor:
    """Return the regularised incomplete beta function I_x(a, b) for x in (0, 1).

    The continued fraction DLMF 8.17.22 on the side where it converges fast, and I_x(a, b) = 1 - I_(1-x)(b, a) on the other.

    >>> beta_cdf(torch.tensor([0.25], dtype=torch.float64), 2.0, 1.0)  # x²
    tensor([0.0625], dtype=torch.float64)
    """
    swapped = x > (a + 1) / (a + b + 2)
    y = torch.where(swapped, 1 - x, x)
    first, second = torch.full_like(x, a), torch.full_like(x, b)
    p, q = torch.where(swapped, second, first), torch.where(swapped, first, second)
    value = torch.exp(p * y.log() + q * torch.log1p(-y) - _log_beta(a, b)) / p * _fraction(y, p, q)
    return torch.where(swapped, 1 - value, value)


def _fraction(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """Return 1 / (1 + d_1 / (1 + d_2 / ...)) of DLMF 8.17.22, by Lentz's method."""
    c, d = torch.ones_like(x), 1 / (1 - (a + b) * x / (a + 1))  # d_1 is in already
    value = d.clone()
    for m in range(1, 1000):
        even = m * (b - m) * x / ((a + 2 * m - 1) * (a + 2 * m))
        odd = -(a + m) * (a + b + m) * x / ((a + 2 * m) * (a + 2 * m + 1))
        for term in (even, odd):
            d = 1 / _nonzero(1 + term * d)
            c = _nonzero(1 + term / c)
            value = value * c * d
        if float((c * d - 1).abs().max()) < 4 * EPS:
            break
    return value


def _nonzero(x: Tensor) -> Tensor:
    return torch.where(x.abs() < TINY, TINY, x)
