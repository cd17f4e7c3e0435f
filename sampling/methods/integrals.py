"""Integrals of the formulas: Lagrange polynomials times 1 or an exponential, and φ functions."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache

import numpy as np


@lru_cache(maxsize=1)
def _gauss_legendre() -> tuple[list[float], list[float]]:
    nodes, weights = np.polynomial.legendre.leggauss(48)
    return nodes.tolist(), weights.tolist()


def lagrange_integrals(
    nodes: Sequence[float], a: float, b: float, rate: float = 0.0
) -> list[float]:
    """Return ∫_a^b l_j(y) exp(rate (y - b)) dy for each Lagrange polynomial l_j over ``nodes``.

    Gauss-Legendre with 48 points: exact for rate 0, and exact up to rounding for usual step sizes.

    >>> [round(w, 12) for w in lagrange_integrals([0.0, -1.0], 0.0, 1.0)]  # Adams-Bashforth 2
    [1.5, -0.5]
    """
    half, middle = 0.5 * (b - a), 0.5 * (a + b)
    totals = [0.0] * len(nodes)
    for x, w in zip(*_gauss_legendre(), strict=True):
        y = middle + half * x
        scale = w * half * math.exp(rate * (y - b))
        for j, yj in enumerate(nodes):
            totals[j] += scale * math.prod(
                (y - yk) / (yj - yk) for k, yk in enumerate(nodes) if k != j
            )
    return totals


def phi_2(h: float) -> float:
    """Return 1 - (1 - e^-h) / h = ∫_0^1 (1 - e^-(hu)) du, without cancellation at small h.

    >>> round(phi_2(2.0), 12) == round(1 - (1 - math.exp(-2.0)) / 2.0, 12)
    True
    """
    if abs(h) < 0.05:
        return h / 2 - h**2 / 6 + h**3 / 24 - h**4 / 120 + h**5 / 720 - h**6 / 5040
    return 1 + math.expm1(-h) / h


def phi_3(h: float) -> float:
    """Return 1/2 - φ_2(h) / h, without cancellation at small h.

    >>> round(phi_3(2.0), 12) == round(0.5 - phi_2(2.0) / 2.0, 12)
    True
    """
    if abs(h) < 0.1:
        return h / 6 - h**2 / 24 + h**3 / 120 - h**4 / 720 + h**5 / 5040 - h**6 / 40320
    return 0.5 - phi_2(h) / h
