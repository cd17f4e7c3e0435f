"""Refinement: all coefficients and network times together, on the final states.

Gauss-Newton with Levenberg's damping. The derivatives of the final states are differences of runs
of the student: a run with one coefficient changed goes on from that step, so an iteration costs
about N²/3 + N runs' network calls for N steps, and the memory of inference. No backward pass.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .regression import mean_log, products, robust_solutions
from .student import Student, directions, evaluate, next_state
from .trajectories import Model, Teacher

DAMPINGS = (1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0)
"""The strengths of damping, of which each iteration takes the best, in units of the diagonal."""

DIFFERENCE = {torch.float32: 2e-3, torch.float64: 1e-5}
"""The change of a state in a difference, in units of its size."""

TIME_DIFFERENCE = 0.02
"""The change of a network time in a difference, in units of the distance to the next knot."""


@dataclass(frozen=True)
class Refinement:
    """A refined student, its relative errors for each seed, and the iterations that were kept."""

    student: Student
    errors: Tensor
    iterations: int


def refine(
    student: Student,
    model: Model,
    teacher: Teacher,
    places: Sequence[int],
    fitted: int,
    iterations: int,
    told: Callable[[int], object],
    patience: int = 2,
) -> Refinement:
    """Refine a student on the first ``fitted`` seeds; the others decide what is kept and when to
    end.
    """
    best = Refinement(student, run_errors(student, model, teacher, places), 0)
    least = mean_log(best.errors[fitted:], model.total)
    current, waited = best, 0
    for k in range(iterations):
        grams, norms, basis = _derivatives(current.student, model, teacher, places, fitted)
        trials = []
        for change in robust_solutions(grams, norms, DAMPINGS, model.total, iterations=3):
            moved = _moved(current.student, basis, change, model)
            errors = run_errors(moved, model, teacher, places)
            loss = mean_log(errors[:fitted], model.total)
            if np.isfinite(loss):
                trials.append((loss, len(trials), moved, errors))
        told(k + 1)
        if not trials:
            break
        _, _, moved, errors = min(trials, key=lambda trial: trial[:2])
        current = Refinement(moved, errors, k + 1)
        held = mean_log(errors[fitted:], model.total)
        if held < least - 1e-3:
            best, least, waited = current, held, 0
        else:
            waited += 1
            if waited >= patience:
                break
    return best


def run_errors(student: Student, model: Model, teacher: Teacher, places: Sequence[int]) -> Tensor:
    """Return the relative error of a student's result for each seed; infinite if not finite."""
    found = []
    for batch in model.batches():
        start = teacher.at(batch, places[0], model.torch_device)
        target = teacher.at(batch, places[-1], model.torch_device).double()
        try:
            x = _trajectory(student, model, model.run(batch, student.knots, start), start)[0][-1]
            error = (x.double() - target).norm(dim=1) / target.norm(dim=1).clamp(min=1e-30)
        except ValueError:
            error = torch.full((len(start),), float("inf"), dtype=torch.float64)
        found.append(error.cpu())
    return torch.cat(found).nan_to_num(nan=float("inf"))


def _trajectory(
    student: Student, model: Model, run: Any, x: Tensor, estimates: Sequence[Tensor] = ()
) -> tuple[list[Tensor], list[Tensor]]:
    """Return the states and estimates of a run that goes on from ``x`` after these estimates."""
    states, known = [x], list(estimates)
    for i in range(len(known), len(student.rows)):
        known.append(evaluate(model, run, student.knots[i], states[-1]))
        states.append(next_state(student.rows[i], states[-1], known[::-1]))
    return states, known


def _derivatives(
    student: Student, model: Model, teacher: Teacher, places: Sequence[int], fitted: int
) -> tuple[Tensor, Tensor, list[np.ndarray[Any, Any]]]:
    """Return products of the derivatives and the rest for each seed, |target|, and directions.

    The derivatives are those by the corrections of each step, in order, then by each network time.
    Each row of a step's directions is scaled so that 1 is the size of the step's state.
    """
    steps, device = len(student.rows), model.torch_device
    basis: list[np.ndarray[Any, Any]] = []
    grams, norms = [], []
    for batch in model.batches(slice(0, fitted)):
        x = teacher.at(batch, places[0], device)
        target = teacher.at(batch, places[-1], device)
        run = model.run(batch, student.knots, x)
        states, known = _trajectory(student, model, run, x)
        if not basis:
            basis = [_scaled(student, model, i, states, known) for i in range(steps)]
        size = DIFFERENCE[x.dtype]
        columns = []
        for i in range(steps):
            vectors = [states[i], *known[i::-1]]
            for row in basis[i]:
                moved = next_state(size * row, vectors[0], vectors[1:]) + states[i + 1]
                end = _trajectory(student, model, run, moved, known[: i + 1])[0][-1]
                columns.append((end.double() - states[-1].double()) / size)
        for i in range(steps):
            shifted = replace(student.knots[i], timestep=_time(student, i) + _span(student, i))
            estimate = evaluate(model, run, shifted, states[i])
            moved = next_state(student.rows[i], states[i], [estimate, *known[:i][::-1]])
            end = _trajectory(student, model, run, moved, [*known[:i], estimate])[0][-1]
            columns.append((end.double() - states[-1].double()) / TIME_DIFFERENCE)
        grams.append(products([*columns, target.double() - states[-1].double()]))
        norms.append(target.double().norm(dim=1).clamp(min=1e-30).cpu())
    return torch.cat(grams), torch.cat(norms), basis


def _scaled(
    student: Student, model: Model, i: int, states: Sequence[Tensor], known: Sequence[Tensor]
) -> np.ndarray[Any, Any]:
    rows = directions(student.knots[i], i)
    vectors = [states[i], *known[i::-1]]
    sizes = [next_state(row, vectors[0], vectors[1:]).double().norm() for row in rows]
    both = torch.stack([*sizes, states[i + 1].double().norm()]).cpu()
    both = model.total(both)  # the same on every rank
    return (
        rows * (both[-1] / both[:-1].clamp(min=1e-12 * float(both[-1]) + 1e-300)).numpy()[:, None]
    )


def _time(student: Student, i: int) -> float:
    return student.knots[i].timestep


def _span(student: Student, i: int) -> float:
    """Return the change of the i-th network time in a difference: towards a neighbour."""
    other = i + 1 if i + 1 < len(student.rows) else i - 1
    return TIME_DIFFERENCE * (_time(student, other) - _time(student, i))


def _moved(
    student: Student, basis: Sequence[np.ndarray[Any, Any]], change: Tensor, model: Model
) -> Student:
    rows, knots, k = [], list(student.knots), 0
    for i, row in enumerate(student.rows):
        own = change[k : k + len(row)].numpy()
        rows.append(tuple((np.array(row) + own @ basis[i]).tolist()))
        k += len(row)
    curve = model.schedule.curve
    ends = curve.timestep(torch.tensor([curve.t_min, curve.t_max], dtype=torch.float64)).tolist()
    for i in range(len(rows)):
        time = _time(student, i) + float(change[k + i]) * _span(student, i) / TIME_DIFFERENCE
        knots[i] = replace(knots[i], timestep=min(max(time, min(ends)), max(ends)))
    return Student(tuple(knots), tuple(rows))
