"""Integrals of the formulas: Lagrange polynomials times 1 or an exponential, and φ functions."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

_POINTS, _WEIGHTS = np.polynomial.legendre.leggauss(48)


def lagrange_integrals(
    nodes: Sequence[float], a: float, b: float, rate: float = 0.0
) -> list[float]:
    """Return ∫_a^b l_j(y) exp(rate (y - b)) dy for each Lagrange polynomial l_j over ``nodes``.

    Gauss-Legendre with 48 points: exact for rate 0, and exact up to rounding for usual step sizes.

    >>> [round(w, 12) for w in lagrange_integrals([0.0, -1.0], 0.0, 1.0)]  # Adams-Bashforth 2
    [1.5, -0.5]
    """
    half = 0.5 * (b - a)
    y = 0.5 * (a + b) + half * _POINTS
    scale = half * _WEIGHTS
    if rate:
        scale = scale * np.exp(rate * (y - b))
    distances = [y - yk for yk in nodes]
    totals: list[float] = []
    for j, yj in enumerate(nodes):
        values = scale
        for k, yk in enumerate(nodes):
            if k != j:
                values = values * (distances[k] / (yj - yk))
        totals.append(float(np.add.reduce(values)))
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
