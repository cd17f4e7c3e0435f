"""The integrals that formulas share, against adaptive quadrature."""

import math

import pytest
from scipy.integrate import quad

from alphabar.sampling.methods.integrals import lagrange_integrals, phi_2, phi_3

STEPS = [
    -9.0,
    -2.0,
    -0.3,
    -0.1,
    -0.06,
    -0.04,
    -1e-3,
    1e-6,
    0.04,
    0.06,
    0.099,
    0.101,
    0.5,
    3.0,
    12.0,
]


@pytest.mark.parametrize("h", STEPS)
def test_phi_functions(h: float) -> None:
    # ∫_0^1 h e^(-h (1 - v)) v^k dv = 1 - (1 - e^-h) / h, 1 - 2 φ_2 / h
    first = quad(lambda v: h * math.exp(-h * (1 - v)) * v, 0, 1, epsabs=0, epsrel=1e-13)[0]
    second = quad(lambda v: h * math.exp(-h * (1 - v)) * v**2, 0, 1, epsabs=0, epsrel=1e-13)[0]
    assert phi_2(h) == pytest.approx(first, rel=1e-11)
    assert 2 * phi_3(h) == pytest.approx(second, rel=1e-10)


@pytest.mark.parametrize("rate", [0.0, 1.0, 2.0, -1.0])
@pytest.mark.parametrize("nodes", [[0.3], [0.3, -0.1], [0.3, -0.1, -0.9], [0.3, -0.1, -0.9, -1.0]])
@pytest.mark.parametrize("b", [0.31, 1.0, 4.0])
def test_lagrange_integrals(nodes: list[float], b: float, rate: float) -> None:
    a = nodes[0]

    def polynomial(j: int, y: float) -> float:
        return math.prod((y - z) / (nodes[j] - z) for k, z in enumerate(nodes) if k != j)

    for j, weight in enumerate(lagrange_integrals(nodes, a, b, rate)):
        exact = quad(
            lambda y, j=j: polynomial(j, y) * math.exp(rate * (y - b)),
            a,
            b,
            epsabs=1e-14,
            epsrel=1e-13,
        )[0]
        assert weight == pytest.approx(exact, rel=1e-10, abs=1e-13)
