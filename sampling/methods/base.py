"""Methods: the formula of one step with its facts, and the registry of all methods."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any, TypeVar

from ...noising.utils.identity import exact
from ...noising.utils.registry import Registry
from ..knots import Knot
from ..options import keyword_parameters
from ..tracing import Combination

Formula = Callable[..., list[Combination]]
F = TypeVar("F", bound=Formula)


@dataclass(frozen=True, eq=False)
class Method:
    """A sampler's formula and its facts: ``order`` of convergence (weak order where it draws
    noise), ``evaluations`` of the network per step, what , and its ``source``.

    ``order`` holds with default options on any grid, with exact starting values for methods that
    remember; 0 is for samplers that do not converge with the number of steps, those of distilled
    models above all. ``reaches`` is a higher order with the options that it takes. ``block``: steps
    after which a method that climbs in blocks has that order. ``rewrites``: places of the memory
    that hold an earlier x.

    ``inverse``: it runs upwards, from the least noise. ``grid``, with ``grid_options``: where it
    runs unless told otherwise. ``steps_option``: the option of the formula that is given the number
    of steps that was asked for, where that is not the number of knots but one. ``blocks(steps,
    from_noise, to_clean)``: over how many steps of a grid each of its own goes, where that is not
    one. ``aliases`` maps names of other software to the grid and options that they stand for there.
    Equal methods are equal in every fact, the values of their options included.

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
    inverse: bool = False
    reaches: tuple[int, dict[str, Any]] | None = None
    block: int = 1
    rewrites: tuple[int, ...] = ()
    defaults: dict[str, Any] = field(default_factory=dict)
    grid: str = "trailing"
    grid_options: dict[str, Any] = field(default_factory=dict)
    steps_option: str | None = None
    blocks: Callable[[int, bool, bool], list[int]] | None = None
    aliases: dict[str, dict[str, Any]] = field(default_factory=dict)

    def boundaries(self, knots: Sequence[Knot]) -> tuple[Knot, ...]:
        """Return those knots of a grid that the method's own steps go between.

        >>> from alphabar.noising import NoiseSchedule
        >>> from alphabar.sampling import METHODS, make_knots
        >>> [
        ...     knot.timestep
        ...     for knot in METHODS["dpm_fast"].boundaries(make_knots(NoiseSchedule.linear(), 8))
        ... ]
        [999.0, 624.0, 249.0, 124.0, -1.0]
        """
        if self.blocks is None:
            return tuple(knots)
        orders = self.blocks(len(knots) - 1, knots[0].alpha == 0, knots[-1].sigma == 0)
        return tuple(knots[place] for place in accumulate(orders, initial=0))

    def __eq__(self, other: object) -> bool:
        return exact(self) == exact(other) if isinstance(other, Method) else NotImplemented

    def __hash__(self) -> int:
        return hash(self.name)

    @property
    def options(self) -> dict[str, Any]:
        """The options that the formula has, with their defaults."""
        return {name: p.default for name, p in self.parameters.items()} | dict(self.defaults)

    @property
    def parameters(self) -> dict[str, inspect.Parameter]:
        """The parameters of the formula that are its options, by their names."""
        return keyword_parameters(self.formula)

    @property
    def documentation(self) -> str:
        """What it does, in words: the formula's docstring."""
        return inspect.getdoc(self.formula) or ""


METHODS: Registry[Method] = Registry("method")
"""Every method by its name; ``@register_method(...)`` above a formula adds one."""


def register_method(
    name: str | None = None, *, order: int, source: str, **facts: Any
) -> Callable[[F], F]:
    """Register a formula as a method, under its own name or another one; the facts are those of
    :class:`Method`.

    >>> @register_method("half_euler", order=0, source="an example")
    ... def half_euler(trace, knots, i, x):
    ...     s, n = knots[i], knots[i + 1]
    ...     return [n.alpha * trace.denoise(x, s)]
    >>> METHODS["half_euler"].order
    0
    """

    def add(formula: F) -> F:
        method = Method(name or formula.__name__, formula, order=order, source=source, **facts)
        METHODS.add(method.name, method)
        return formula

    return add
