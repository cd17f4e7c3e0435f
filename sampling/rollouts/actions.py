"""The Gaussian transitions of a table: where its draws become known from a run's states."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from ..table import Table
from ..tracing import Draw, Evaluation, Row, Step


class Action(NamedTuple):
    """A transition of a step: where its sample is used, and which draws it has.

    Args:
        place: Index of the evaluation that takes the sample, or the number of operations: x.
        draws: Indices of its draws in the basis.
    """

    place: int
    draws: tuple[int, ...]


NOISE_OPTIONS = {"eta": 1.0, "tau": 1.0, "noise_level": 0.7, "s_churn": 10.0}
"""Options of methods that make a step stochastic, and a value that does."""


def require_stochastic(table: Table, options: Mapping[str, Any]) -> None:
    """Raise ValueError unless a table has a transition; ``options`` are those of its method."""
    if not any(actions_of(table)):
        said = [f"{name}={value}, or " for name, value in NOISE_OPTIONS.items() if name in options]
        raise ValueError(
            f"{table.name} draws no noise in its {len(table.steps)} steps, so samples have no "
            f"density; give {''.join(said[:1])}a stochastic method such as 'euler_ancestral' or "
            "'flow_sde'"
        )


def actions_of(table: Table) -> list[list[Action]]:
    """Return the transitions of each step of a table, in order.

    A draw belongs to the first row that has it. Later rows may use it too, because it is known from
    that row's sample, unless the row has several.

    Raises:
        ValueError: A draw is used later than its transition tells it.

    >>> from alphabar.noising import NoiseSchedule
    >>> from alphabar.sampling import Sampler
    >>> actions_of(Sampler(NoiseSchedule.flow(), "euler_ancestral", steps=3).table)
    [[Action(place=2, draws=(2,))], [Action(place=2, draws=(2,))], []]
    """
    sizes = [1, *(len(step.carry) for step in table.steps)]
    return [_actions(table.name, step, n) for step, n in zip(table.steps, sizes, strict=False)]


def _actions(name: str, step: Step, state: int) -> list[Action]:
    open_draws: set[int] = set()
    actions: list[Action] = []
    for place in range(len(step.ops) + 1):
        op = step.ops[place] if place < len(step.ops) else None
        if isinstance(op, Draw):
            open_draws.add(state + place)
        elif op is None or isinstance(op, Evaluation):
            draws = tuple(k for k, _ in row_at(step, place) if k in open_draws)
            if not draws:
                continue
            actions.append(Action(place, draws))
            if len(draws) > 1 and _later_rows(step, place) & set(draws):
                raise ValueError(
                    f"{name} has a step with two draws in one vector, one of which it uses again: "
                    "its transitions are not Gaussian in x; take another stochastic method"
                )
            open_draws -= set(draws)
    if open_draws & _later_rows(step, len(step.ops)):
        raise ValueError(
            f"{name} keeps a draw for a later step: its transitions are not Gaussian in x; take "
            "another stochastic method"
        )
    return actions


def row_at(step: Step, place: int) -> Row:
    """Return the row of a transition at this place of a step, see :class:`Action`."""
    op = step.ops[place] if place < len(step.ops) else None
    return op.row if isinstance(op, Evaluation) else step.carry[0]


def _later_rows(step: Step, place: int) -> set[int]:
    """Return the basis indices that are used after ``place``."""
    ops = [op.row for op in step.ops[place + 1 :] if isinstance(op, Evaluation)]
    carry = step.carry if place < len(step.ops) else step.carry[1:]
    return {k for row in (*ops, *carry) for k, _ in row}


def segments(table: Table) -> list[tuple[int, int]]:
    """Return the (first, last + 1) steps between which a run depends on its weights.

    A segment begins at the start, and after every step that keeps only x and draws it.
    """
    starts = [0]
    for i, (step, actions) in enumerate(zip(table.steps, actions_of(table), strict=True)):
        if len(step.carry) == 1 and any(action.place == len(step.ops) for action in actions):
            starts.append(i + 1)
    return [(a, b) for a, b in zip(starts, [*starts[1:], len(table.steps)], strict=True) if a < b]
