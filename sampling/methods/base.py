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
    """A sampler's formula for one step and its facts.

    Two methods are equal if all facts are equal, including the values of their options.

    Args:
        name: The name in METHODS.
        formula: The formula of one step.
        order: The order of convergence (weak order if the method draws noise). It holds with
            default options on any grid, with exact starting values for multistep methods. 0 is for
            samplers that do not converge with the number of steps, mainly those of distilled
            models.
        source: The paper or software of the formula.
        evaluations: Network evaluations per step.
        stochastic: Whether it draws noise.
        point_mass: Whether the table's marginals are checked, see ``Table``.
        inverse: It runs upwards, from the least noise.
        reaches: A higher order and the options that give it.
        block: The number of steps after which a method that raises its order in blocks has that
            order.
        rewrites: Positions of the memory that hold an earlier x.
        defaults: New defaults for options of the formula.
        grid, grid_options: The default grid and its options.
        steps_option: The formula's option that gets the requested number of steps, if this is not
            the number of knots minus one.
        blocks: ``blocks(steps, from_noise, to_clean)`` returns how many grid steps each step of the
            method covers, if not one.
        aliases: Names of other software, with the grid and options that they imply.

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
        """Return the knots of a grid at which the method's own steps start and end.

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
        """The options of the formula, with their defaults."""
        return {name: p.default for name, p in self.parameters.items()} | dict(self.defaults)

    @property
    def parameters(self) -> dict[str, inspect.Parameter]:
        """The parameters of the formula that are its options, by name."""
        return keyword_parameters(self.formula)

    @property
    def documentation(self) -> str:
        """The docstring of the formula."""
        return inspect.getdoc(self.formula) or ""


METHODS: Registry[Method] = Registry("method")
"""All methods by name; ``@register_method(...)`` above a formula adds one."""


def register_method(
    name: str | None = None, *, order: int, source: str, **facts: Any
) -> Callable[[F], F]:
    """Register a formula as a method, under its own name or another one.

    The facts are the fields of :class:`Method`. A formula is one step. It gets the trace, all
    knots, the index of the step, x at ``knots[i]``, and the memory: what the step before returned
    after x, nothing at the first step. It returns x at ``knots[i + 1]`` and the new memory. Its
    keyword arguments are options of the sampler.

    >>> @register_method("two_steps", order=0, source="an example")
    ... def two_steps(trace, knots, i, x, *past, share=0.5):
    ...     s, n = knots[i], knots[i + 1]
    ...     D, e = trace.evaluate(x, s)  # estimates of x_0 and ε
    ...     mean = D + share * (D - past[0]) if past else D
    ...     return [n.alpha * mean + n.sigma * e, D]
    >>> METHODS["two_steps"].options
    {'share': 0.5}
    """

    def add(formula: F) -> F:
        method = Method(name or formula.__name__, formula, order=order, source=source, **facts)
        METHODS.add(method.name, method)
        return formula

    return add
