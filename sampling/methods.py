"""The registry of methods: each a formula with what is known of it."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from .table import Combination

Formula = Callable[..., list[Combination]]


@dataclass(frozen=True)
class Method:
    """A sampler's formula and its facts: ``order`` of convergence (weak order where it draws noise), ``evaluations`` of the
    network per step, what it is ``called`` elsewhere, and its ``source``.

    ``called`` maps names of other software to the grid and options that they stand for there.

    >>> from alphabar.sampling import METHODS
    >>> METHODS["heun"].order, METHODS["heun"].evaluations
    (2, 2)
    """

    name: str
    formula: Formula
    order: int
    source: str
    evaluations: int = 1
    stochastic: bool = False
    point_mass: bool = True
    called: dict[str, dict[str, Any]] = field(default_factory=dict, compare=False)
    diffusers: dict[str, Any] = field(default_factory=dict, compare=False)

    @property
    def options(self) -> dict[str, Any]:
        """The options that the formula has, with their defaults."""
        parameters = inspect.signature(self.formula).parameters.values()
        return {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY}
