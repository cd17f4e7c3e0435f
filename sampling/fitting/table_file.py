"""The steps of a table as JSON values. Numbers are written so that they are read back exactly."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from ...noising.utils.config_reading import mapping, number, whole
from ..knots import Knot
from ..tracing import Evaluation, Row, Step

TABLE_NAME = "fitted_table.json"
"""The file of a fitted table beside a checkpoint."""


def steps_to_config(knots: Sequence[Knot], steps: Sequence[Step]) -> dict[str, Any]:
    """Return the knots and steps of a table that draws no noise.

    Raises ValueError for other operations than evaluations.
    """
    rows = []
    for step in steps:
        if not all(isinstance(op, Evaluation) for op in step.ops):
            raise ValueError("only a table without noise can be saved, and this one draws noise")
        rows.append(
            {
                "evaluations": [
                    {"knot": asdict(op.knot), "row": _pairs(op.row), "p": op.p, "q": op.q}
                    for op in step.ops
                    if isinstance(op, Evaluation)
                ],
                "carry": [_pairs(row) for row in step.carry],
                "denoised": _pairs(step.denoised),
            }
        )
    return {"knots": [asdict(knot) for knot in knots], "steps": rows}


def steps_from_config(config: Mapping[str, Any]) -> tuple[tuple[Knot, ...], tuple[Step, ...]]:
    """Return the knots and steps of a config.

    Raises ValueError for a value of the wrong type, and for a row that names a vector that does not
    exist.

    >>> from alphabar.noising import NoiseSchedule
    >>> from alphabar.sampling import Sampler
    >>> import json
    >>> table = Sampler(NoiseSchedule.linear(), "dpmpp_2m", 4).table
    >>> written = json.dumps(steps_to_config(table.knots, table.steps))
    >>> steps_from_config(json.loads(written)) == (table.knots, table.steps)
    True
    """
    knots = tuple(_knot(value) for value in _list("knots", config.get("knots")))
    steps: list[Step] = []
    state = 1
    for value in _list("steps", config.get("steps")):
        step = mapping("a step", value)
        ops: list[Evaluation] = []
        for j, entry in enumerate(_list("evaluations", step.get("evaluations"))):
            op = mapping("an evaluation", entry)
            row = _row(op.get("row"), state + j)
            p, q = number("p", op.get("p")), number("q", op.get("q"))
            ops.append(Evaluation(_knot(op.get("knot")), row, p, q))
        size = state + len(ops)
        carry = tuple(_row(row, size) for row in _list("carry", step.get("carry")))
        if not ops or not carry:
            raise ValueError("a step must have an evaluation and a next state")
        steps.append(Step(tuple(ops), carry, _row(step.get("denoised"), size)))
        state = len(carry)
    if not steps or len(knots) != len(steps) + 1:
        raise ValueError(f"{len(steps)} steps need {len(steps) + 1} knots, got {len(knots)}")
    return knots, tuple(steps)


def _pairs(row: Row) -> list[list[float]]:
    return [list(pair) for pair in row]


def _list(what: str, value: Any) -> list[Any]:
    if not isinstance(value, list):
        raise ValueError(f"{what} must be a list, got {value!r}")
    return value


def _knot(value: Any) -> Knot:
    values = mapping("a knot", value)
    return Knot(**{name: number(name, values.get(name)) for name in Knot.__dataclass_fields__})


def _row(value: Any, size: int) -> Row:
    row: list[tuple[int, float]] = []
    for pair in _list("a row", value):
        if len(_list("a term", pair)) != 2 or not 0 <= whole("a term", pair[0]) < size:
            raise ValueError(f"a term must be a vector from 0 to {size - 1} and a number: {pair!r}")
        row.append((pair[0], number("a coefficient", pair[1])))
    return tuple(row)
