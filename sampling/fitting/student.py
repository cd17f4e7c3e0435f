"""The student: a table of coefficients over the state and all estimates so far.

Step i takes x_i to x_{i+1} = c_0 x_i + c_1 D_i + c_2 D_{i-1} + ... + c_{i+1} D_0, with D_j the
clean estimate at knot j. Every method with one network call a step and no noise has this form.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...noising import NoiseSchedule
from ..inference import Run
from ..knots import Knot
from ..methods.base import Method
from ..tracing import Combination, Evaluation, Row, Step, Trace
from .regression import chosen_solution, products
from .trajectories import Model, Scratch, Teacher, require_finite


@dataclass(frozen=True)
class Student:
    """Knots and, for each step, coefficients over (x_i, D_i, D_{i-1}, ..., D_0).

    A knot's timestep is what the network gets.
    """

    knots: tuple[Knot, ...]
    rows: tuple[tuple[float, ...], ...]

    def steps(self, schedule: NoiseSchedule) -> tuple[Step, ...]:
        """Return the steps of the table; the memory is the estimates so far, the newest first."""
        steps: list[Step] = []
        for i, (knot, c) in enumerate(zip(self.knots, self.rows, strict=False)):
            p, q = (float(v) for v in schedule.prediction.x0_coefficients(knot.alpha, knot.sigma))
            out = i + 1
            estimate = _row({0: p, out: q})
            past = {1 + k: value for k, value in enumerate(c[2:])}
            memory = [((1 + k, 1.0),) for k in range(i)] if i < len(self.rows) - 1 else []
            x = _row({0: c[0] + c[1] * p, **past, out: c[1] * q})
            evaluation = Evaluation(knot, _row({0: knot.input_scale}), p, q)
            carry = (x, estimate, *memory) if i < len(self.rows) - 1 else (x,)
            steps.append(Step((evaluation,), carry, estimate))
        return tuple(steps)


def _row(terms: dict[int, float]) -> Row:
    return tuple(sorted((k, float(c)) for k, c in terms.items() if c))


class Start:
    """A known method along a student's own states: where the coefficients are shrunk to.

    Combinations are over the first state and the estimates D_0, D_1, ...; a prediction of the
    sample makes the output of an evaluation the estimate itself.
    """

    def __init__(self, method: Method, schedule: NoiseSchedule, knots: Sequence[Knot]) -> None:
        self.method, self.knots = method, knots
        self.schedule = schedule.with_prediction("sample")
        self.states: list[np.ndarray[Any, Any]] = [np.ones(1)]
        self.memory: list[Combination] = []

    def row(self) -> np.ndarray[Any, Any]:
        """Return the method's coefficients of the next step, over (x_i, D_i, ..., D_0)."""
        i, own = len(self.states) - 1, self.states[-1]
        trace = Trace(self.schedule, i + 1)
        x = Combination({k: float(c) for k, c in enumerate(own)})
        carry = self.method.formula(trace, self.knots, i, x, *self.memory, **self.method.options)
        if len(trace.ops) != 1 or not isinstance(trace.ops[0], Evaluation):
            raise ValueError(
                f"start={self.method.name!r} must call the network once in each step and draw no "
                "noise; take e.g. 'ipndm', 'dpmpp_2m' or 'unipc'"
            )
        self.memory = carry[1:]
        full = np.array([carry[0].terms.get(k, 0.0) for k in range(i + 2)])
        share = full[0] / own[0]
        rest = full[1:] - share * np.append(own[1:], 0.0)
        return np.concatenate([[share], rest[::-1]])

    def went(self, row: np.ndarray[Any, Any]) -> None:
        """Take the step with these coefficients, over (x_i, D_i, ..., D_0)."""
        own = self.states[-1]
        self.states.append(np.append(row[0] * own, 0.0) + np.append(0.0, row[:0:-1]))


def directions(knot: Knot, i: int) -> np.ndarray[Any, Any]:
    """Return the corrections of step i, each as coefficients over (x_i, D_i, ..., D_0).

    They are ε̂, D_i, and the differences of successive estimates.
    """
    rows = np.zeros((i + 2, i + 2))
    rows[0, :2] = 1 / knot.sigma, -knot.alpha / knot.sigma
    rows[1, 1] = 1
    for k in range(2, i + 2):
        rows[k, k - 1], rows[k, k] = 1, -1
    return rows


Kept = dict[tuple[int, ...], np.memmap[Any, Any]]
"""Estimates of students by the places of their knots so far."""


def fit_student(
    model: Model,
    teacher: Teacher,
    places: Sequence[int],
    method: Method,
    fitted: int,
    scratch: Scratch,
    part: slice = slice(None),
    kept: Kept | None = None,
) -> tuple[Student, Tensor]:
    """Fit the coefficients step by step, along the student's own states.

    Args:
        model: The network and the seeds.
        teacher: The teacher's states.
        places: The student's knots, as places among those of the teacher, first and last included.
        method: The known method to shrink towards.
        fitted: The number of seeds of ``part`` that are fitted; the others choose the shrinkage.
        scratch: Where to keep the student's states.
        part: The seeds to take.
        kept: Estimates of earlier calls with the same other arguments; new ones are added.

    Returns:
        The student, and the relative error of its result for each seed of ``part``.
    """
    knots = tuple(teacher.knots[k] for k in places)
    steps, device = len(knots) - 1, model.torch_device
    first, last, _ = part.indices(len(model.seeds))
    kept = {} if kept is None else kept
    start = Start(method, model.schedule, knots)
    states = scratch.array((last - first, teacher.states.shape[2]), _dtype(teacher))
    rows: list[tuple[float, ...]] = []
    estimates: list[np.memmap[Any, Any]] = []
    norms, errors = torch.ones(0), torch.ones(0)

    def here(batch: slice) -> slice:
        return slice(batch.start - first, batch.stop - first)

    def vectors(batch: slice) -> list[Tensor]:
        past = [Scratch.read(array, here(batch), device) for array in estimates[::-1]]
        return [Scratch.read(states, here(batch), device), *past]

    for batch in model.batches(part):
        Scratch.write(states, here(batch), teacher.at(batch, places[0], device))
    for i in range(steps):
        base = start.row()
        basis = directions(knots[i], i)
        mix = torch.zeros(i + 3, i + 3, dtype=torch.float64)  # corrections, then the rest
        mix[:-1, :-1] = torch.from_numpy(basis)
        mix[-1, :-1], mix[-1, -1] = torch.from_numpy(-base), 1.0
        key = tuple(places[: i + 1])
        new = key not in kept
        if new:
            kept[key] = scratch.array(states.shape, _dtype(teacher))
        estimates.append(kept[key])
        grams, sizes = [], []
        for batch in model.batches(part):
            if new:
                x = Scratch.read(states, here(batch), device)
                estimate = evaluate(model, model.run(batch, knots, x), knots[i], x)
                Scratch.write(kept[key], here(batch), estimate)
            target = teacher.at(batch, places[i + 1], device)
            grams.append(mix @ products([*vectors(batch), target]) @ mix.T)
            sizes.append(target.double().norm(dim=1).clamp(min=1e-30).cpu())
        norms = torch.cat(sizes)
        correction = chosen_solution(torch.cat(grams), norms, fitted, model.total)
        row = base + correction.numpy() @ basis
        start.went(row)
        rows.append(tuple(row.tolist()))
        found = []
        for batch in model.batches(part):
            x, *past = vectors(batch)
            x = next_state(row, x, past)
            Scratch.write(states, here(batch), x)
            found.append((x - teacher.at(batch, places[i + 1], device)).double().norm(dim=1).cpu())
        errors = torch.cat(found) / norms
    return Student(knots, tuple(rows)), errors


def next_state(row: Sequence[float], x: Tensor, estimates: Sequence[Tensor]) -> Tensor:
    """Return c_0 x + c_1 D_i + ... + c_{i+1} D_0; ``estimates`` has the newest first."""
    total = float(row[0]) * x
    for c, estimate in zip(row[1:], estimates, strict=True):
        total = total.add(estimate, alpha=float(c))
    return total


def evaluate(model: Model, run: Run, knot: Knot, x: Tensor) -> Tensor:
    """Return the clean estimate at a knot for states (batch, values)."""
    x = x.view(run.x.shape)
    shown = x if knot.input_scale == 1 else x * knot.input_scale
    p, q = model.schedule.prediction.x0_coefficients(knot.alpha, knot.sigma)
    with torch.no_grad():
        estimate = float(p) * x + float(q) * run.evaluate(shown, knot).to(x.dtype)
    return require_finite(estimate, "the student's estimate", knot).flatten(1)


def _dtype(teacher: Teacher) -> torch.dtype:
    return torch.float64 if teacher.states.dtype == np.float64 else torch.float32
