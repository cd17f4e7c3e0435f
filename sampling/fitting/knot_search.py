"""The choice of knots among the teacher's own, first without the network, then with it.

A student on the teacher's path has the teacher's estimates at its knots. How well they explain the
next state is known from products of the teacher's states and estimates alone: each choice costs a
few small linear systems and no network call.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np

from .trajectories import Teacher

Places = tuple[int, ...]

RIDGE = 1e-9
STRIDES = (8, 4, 2, 1)
TRIES = 2000
SPREADS = (1.0, 0.3, 0.1, 0.03)
"""The spreads of the data that are tried, in units of that of the teacher's results."""

POWERS = (0.5, 1.0, 2.0)
"""Powers of the spacing of the starts: even in the teacher's grid, and denser at either end."""


class PathCost:
    """The error of a choice of knots on the teacher's path.

    The error of a state at α and σ counts by what it makes at the end for Gaussian data of standard
    deviation s: by s / sqrt(α² s² + σ²). Where the flow goes to one of several clusters, s is the
    width of a cluster, which is not known.

    Args:
        teacher: The teacher's trajectories.
        spread: s.
    """

    def __init__(self, teacher: Teacher, spread: float) -> None:
        self.moments, self.knots = teacher.moments, teacher.knots
        self.last = len(teacher.knots) - 1
        self.seen: dict[tuple[int, ...], float] = {}
        self.weights = [spread**2 / ((k.alpha * spread) ** 2 + k.sigma**2) for k in teacher.knots]

    def __call__(self, places: Places) -> float:
        """Return the mean squared error, each step's added up."""
        return sum(self._step(places[: i + 2]) for i in range(len(places) - 1))

    def _step(self, places: Places) -> float:
        if places not in self.seen:
            *used, target = places
            columns = [used[-1], *(self.last + 1 + k for k in used)]
            matrix = self.moments[np.ix_(columns, columns)]
            right = self.moments[columns, target]
            scale = 1 / np.sqrt(np.maximum(matrix.diagonal(), 1e-300))
            matrix = matrix * scale[:, None] * scale + RIDGE * np.eye(len(columns))
            explained = scale * np.linalg.solve(matrix, scale * right)
            rest = self.moments[target, target] - 2 * explained @ right
            rest += explained @ self.moments[np.ix_(columns, columns)] @ explained
            self.seen[places] = max(float(rest), 0.0) * self.weights[target]
        return self.seen[places]


def starts(last: int, steps: int) -> list[Places]:
    """Return choices of ``steps`` steps over places 0 ... last to begin from."""
    even = np.linspace(0, 1, steps + 1)
    return [_distinct((last * even**power).round().astype(int), last) for power in POWERS]


def _distinct(places: np.ndarray, last: int) -> Places:
    """Return increasing places from 0 to ``last``, as near to the given ones as they can be."""
    steps = len(places) - 1
    low = np.maximum.accumulate(places - np.arange(steps + 1)) + np.arange(steps + 1)
    return tuple(int(min(k, last - steps + i)) for i, k in enumerate(low))


def neighbours(places: Places, strides: Sequence[int]) -> Iterator[Places]:
    """Yield the choices in which one inner place moves by a stride.

    >>> list(neighbours((0, 2, 4), (1,)))
    [(0, 1, 4), (0, 3, 4)]
    """
    for stride in strides:
        for i in range(1, len(places) - 1):
            for moved in (places[i] - stride, places[i] + stride):
                if places[i - 1] < moved < places[i + 1]:
                    yield (*places[:i], moved, *places[i + 1 :])


def descend(
    places: Places, cost: Callable[[Places], float], strides: Sequence[int], tries: int
) -> tuple[float, Places]:
    """Return the least cost of a coordinate search, and its choice; at most ``tries`` costs.

    >>> descend((0, 1, 9), lambda places: abs(places[1] - 6), (4, 1), tries=50)
    (0, (0, 6, 9))
    """
    best, tries = (cost(places), places), tries - 1
    tried = {places}
    better = True
    while better and tries > 0:
        better = False
        for other in neighbours(best[1], strides):
            if other in tried or tries <= 0:
                continue
            tried.add(other)
            tries -= 1
            found = cost(other), other
            if found < best:
                best, better = found, True
                break
    return best


def on_the_path(teacher: Teacher, steps: int) -> list[Places]:
    """Return choices of knots: the best on the teacher's path for each spread, then the starts."""
    plain = starts(len(teacher.knots) - 1, steps)
    found = []
    for share in SPREADS:
        cost = PathCost(teacher, share * teacher.spread)
        found.append(min(descend(start, cost, STRIDES, TRIES) for start in plain)[1])
    return list(dict.fromkeys([*found, *plain]))
