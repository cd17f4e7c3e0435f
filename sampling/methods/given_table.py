"""A given table as a method and a grid: its steps are replayed, whatever made them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ...noising import NoiseSchedule
from ..knots import Knot
from ..table import Table
from ..tracing import Combination, Trace
from .base import Method
from .steps import first_order_update


@dataclass(frozen=True)
class Replay:
    """The formula of a given table.

    A run that starts at a later knot has no memory. Its steps are of first order up to the first
    one that reads no memory in the table; in a multistep table, all of them are.
    """

    table: Table

    def __call__(
        self, trace: Trace, knots: Sequence[Knot], i: int, x: Combination, *past: Combination
    ) -> list[Combination]:
        """Return the next state; the last of ``knots`` is the table's last knot."""
        place = len(self.table.steps) - (len(knots) - 1) + i
        memory = len(self.table.steps[place - 1].carry) - 1 if place else 0
        if len(past) != memory:
            s, n = knots[i], knots[i + 1]
            return [first_order_update(x, trace.denoise(x, s), s, n)]
        step = self.table.steps[place]
        trace.ops.extend(step.ops)
        trace.denoised = Combination(dict(step.denoised))
        return [Combination(dict(row)) for row in step.carry]


@dataclass(frozen=True)
class OwnKnots:
    """The grid of a given table."""

    table: Table

    def __call__(self, schedule: NoiseSchedule, steps: int) -> tuple[Knot, ...]:
        """Return the knots; raise ValueError for another number of steps."""
        own = len(self.table.steps)
        if steps != own:
            raise ValueError(
                f"the table {self.table.name!r} has {own} steps and no others, got {steps}; fit "
                "one for this number"
            )
        return self.table.knots


def table_method(table: Table) -> Method:
    """Return the method that replays a table.

    >>> from alphabar.sampling import Sampler
    >>> table = Sampler(NoiseSchedule.linear(), "unipc", 5).table
    >>> given = Sampler(NoiseSchedule.linear(), table_method(table), 5, OwnKnots(table)).table
    >>> given.steps == table.steps
    True
    """
    return Method(
        table.name, Replay(table), order=0, source="fitted to a network", point_mass=False
    )
