"""Few-step tables fitted to one network: the user's own model, schedule, guidance and budget.

A step of a sampler is linear in the state and the network's outputs, so the best coefficients for
one network are found by regression on trajectories of the same network with many steps. Knots are
chosen among the teacher's own (as GITS 2405.20326, by coordinate search), coefficients are fitted
along the student's own states (as S4S 2502.17423, without gradients), and all coefficients and
network times can be refined on the final states (as GS 2510.17699, by Gauss-Newton).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

import torch
from torch import Tensor

from ...noising import NoiseSchedule
from ...noising.utils.registry import lookup
from ...noising.utils.validation import whole_number
from ..guidance import Network
from ..inference import checked_seeds
from ..methods import METHODS, Method
from ..sampler import Sampler
from ..table import Table
from .knot_search import STRIDES, Places, descend, on_the_path
from .provenance import FITTED, Provenance
from .refine import refine as refined
from .regression import mean_log
from .student import Kept, fit_student
from .trajectories import Conditioning, Model, Scratch, Teacher, Total, teacher_trajectories

TEACHER, TEACHER_STEPS, TEACHER_GRID = "exponential_adams_4", 80, "karras"
"""The teacher by default."""

KNOWN_METHODS = ("ddim", "dpmpp_2m", "dpmpp_3m", "deis", "ipndm", "unipc")
KNOWN_GRIDS = ("linspace", "trailing", "karras", "polyexponential")
"""The known methods that a fitted table is compared with, and falls back to: each on each grid."""

SEARCH_SEEDS = 16
"""The number of seeds that choose the knots, half of them held out if there are as many."""

SEARCHES = 30
"""The choices of knots that are tried with the network."""

Told = Callable[[int, int, str], object]


def fit_table(
    network: Network,
    schedule: NoiseSchedule,
    evaluations: int,
    *,
    shape: Sequence[int],
    teacher: Sampler | None = None,
    seeds: int | Sequence[int] = 32,
    held_out: int | Sequence[int] | None = None,
    conditioning: Conditioning = None,
    unconditional: Conditioning = None,
    guidance_scale: float = 1.0,
    guidance_rescale: float = 0.0,
    start: str = "ipndm",
    refine: int = 0,
    searches: int = SEARCHES,
    batch_size: int = 16,
    training_step: int | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    sum_over_ranks: Total | None = None,
    progress: Told | None = None,
) -> Table:
    """Return the table with the least error for this network and number of network calls.

    If no fitted coefficients are better than the known methods on the seeds held out, the best
    known method's table is returned; ``table.provenance.helps`` tells. Run it with
    ``Sampler.from_table``.

    Args:
        network: As in :meth:`Sampler.iterate`.
        schedule: The NoiseSchedule of training.
        evaluations: The number of network calls of the table, 2 ... the teacher's.
        shape: The shape of one sample, without a batch.
        teacher: The sampler whose results are approximated, without noise; by default 80 steps of a
            method of order 4.
        seeds: The seeds of the fit, or their number; the noise of each is that of
            ``Sampler(...)(..., seeds=...)``. The last quarter is held out.
        held_out: More seeds that are held out in place of the last quarter, or their number.
        conditioning: Values for the network: a function of a tuple of seeds, or a mapping whose
            tensors have a row for each seed (``seeds``, then ``held_out``) or are for all.
        unconditional: The same keys, for guidance.
        guidance_scale, guidance_rescale: As in :meth:`Sampler.iterate`; the table holds for these.
        start: The known method that coefficients are shrunk towards, one network call a step.
        refine: Iterations of refinement of all coefficients and network times on the final states;
            each costs about 10 runs of the table on every seed at 5 evaluations and 30 at 10. The
            network must take times between those of training.
        searches: The choices of knots to try with the network.
        batch_size: Seeds in a network call.
        training_step: The optimizer step of the network, for the record.
        device, dtype: As in :meth:`Sampler.iterate`.
        sum_over_ranks: Adds a CPU tensor of float64 over ranks that fit together, each with its
            own seeds; all get the same table.
        progress: Called with (done, total, what) as the fit goes on.

    Raises:
        ValueError: The number of evaluations does not fit the teacher, the teacher has another
            schedule or draws noise, there are no seeds, or the network's output is not finite.

    >>> schedule = NoiseSchedule.flow()
    >>> table = fit_table(lambda x, t: torch.tanh(x), schedule, 4, shape=(8,), seeds=16)
    >>> table.evaluations, table.provenance.helps
    (4, True)
    """
    teacher = _checked_teacher(schedule, teacher, evaluations)
    fit_seeds, rest = _split(seeds, held_out)
    told: Told = progress or (lambda done, total, what: None)
    method = lookup("method", start, METHODS)
    model = Model(
        network,
        schedule,
        tuple(whole_number("a size of shape", n, 1) for n in shape),
        (*fit_seeds, *rest),
        conditioning,
        unconditional,
        guidance_scale,
        whole_number("batch_size", batch_size, 1),
        device,
        dtype,
        sum_over_ranks or (lambda tensor: tensor),
        guidance_rescale,
    )
    fitted, count = len(fit_seeds), len(model.seeds)
    with Scratch() as scratch:
        trajectories = teacher_trajectories(
            teacher, model, fitted, scratch, lambda done: told(done, count, "teacher")
        )
        known = _known(model, trajectories, evaluations, fitted, told)
        places = _knots(model, trajectories, evaluations, method, fitted, searches, told)
        student, errors = fit_student(model, trajectories, places, method, fitted, scratch)
        kept = 0
        if refine:
            better = refined(
                student,
                model,
                trajectories,
                places,
                fitted,
                whole_number("refine", refine, 0),
                lambda done: told(done, refine, "refinement"),
            )
            student, errors, kept = better.student, better.errors, better.iterations
    best, own = known[0], errors[fitted:]
    fitted_error = math.exp(mean_log(own, model.total))
    helps = _is_less(own, best.errors, model.total)
    provenance = Provenance(
        schedule,
        float(guidance_scale),
        float(guidance_rescale),
        described(teacher),
        evaluations,
        *(int(n) for n in model.total(torch.tensor([fitted, len(rest)], dtype=torch.float64))),
        start,
        kept,
        fitted_error if helps else best.error,
        tuple((result.name, result.error) for result in known),
        fitted_error,
        training_step,
    )
    steps, prediction = student.steps(schedule), schedule.prediction
    made = Table(FITTED, student.knots, steps, prediction, point_mass=False)
    return replace(made if helps else best.table, point_mass=False, provenance=provenance)


def sampler_errors(
    samplers: Sequence[Sampler | Table],
    network: Network,
    teacher: Sampler,
    *,
    shape: Sequence[int],
    seeds: int | Sequence[int],
    conditioning: Conditioning = None,
    unconditional: Conditioning = None,
    guidance_scale: float = 1.0,
    guidance_rescale: float = 0.0,
    batch_size: int = 16,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    sum_over_ranks: Total | None = None,
) -> list[float]:
    """Return for each sampler the geometric mean over seeds of |x - teacher| / |teacher|.

    All start from the same noise. Arguments as in :func:`fit_table`. With a fitted table and the
    network of a later training step it tells whether the table still fits.

    >>> schedule, network = NoiseSchedule.flow(), lambda x, t: torch.tanh(x)
    >>> teacher = Sampler(schedule, "heun", 100)
    >>> euler = [Sampler(schedule, "euler", n) for n in (5, 20)]
    >>> errors = sampler_errors(euler, network, teacher, shape=(4,), seeds=4)
    >>> errors[1] < errors[0] / 2
    True
    """
    runs = [
        Sampler.from_table(sampler, teacher.schedule) if isinstance(sampler, Table) else sampler
        for sampler in samplers
    ]
    model = Model(
        network,
        teacher.schedule,
        tuple(shape),
        tuple(_listed("seeds", seeds)),
        conditioning,
        unconditional,
        guidance_scale,
        batch_size,
        device,
        dtype,
        sum_over_ranks or (lambda tensor: tensor),
        guidance_rescale,
    )
    found: list[list[Tensor]] = [[] for _ in runs]
    for batch in model.batches():
        arguments, size = model.arguments(batch), model.size(batch)
        target = teacher(network, size, **arguments)
        for errors, run in zip(found, runs, strict=True):
            errors.append(_relative(run(network, size, **arguments), target))
    return [math.exp(mean_log(torch.cat(errors), model.total)) for errors in found]


def table_error(
    sampler: Sampler | Table, network: Network, teacher: Sampler, **arguments: Any
) -> float:
    """Return the error of one sampler, as :func:`sampler_errors` with the same arguments.

    >>> schedule, network = NoiseSchedule.flow(), lambda x, t: torch.tanh(x)
    >>> table = fit_table(network, schedule, 4, shape=(8,), seeds=16)
    >>> table_error(table, network, default_teacher(schedule), shape=(8,), seeds=[99]) < 0.05
    True
    """
    return sampler_errors([sampler], network, teacher, **arguments)[0]


def default_teacher(schedule: NoiseSchedule) -> Sampler:
    """Return the teacher that ``fit_table`` takes by default.

    >>> default_teacher(NoiseSchedule.linear()).steps
    80
    """
    return Sampler(schedule, TEACHER, TEACHER_STEPS, TEACHER_GRID)


def described(sampler: Sampler) -> str:
    """Return the method, steps and grid of a sampler, in words.

    >>> described(Sampler(NoiseSchedule.linear(), "DPM++ 2M Karras", 20))
    'dpmpp_2m, 20 steps, karras'
    """
    grid = sampler.grid if isinstance(sampler.grid, str) else "own grid"
    return f"{sampler.name}, {sampler.steps} steps, {grid}"


@dataclass(frozen=True)
class Known:
    """A known method at the budget, with its errors on the seeds held out."""

    error: float
    name: str
    table: Table
    errors: Tensor


def _known(
    model: Model, teacher: Teacher, evaluations: int, fitted: int, told: Told
) -> list[Known]:
    """Return the known methods with this many calls, the best on the seeds held out first."""
    found: list[Known] = []
    choices = list(product(KNOWN_METHODS, KNOWN_GRIDS))
    for done, (method, grid) in enumerate(choices):
        sampler = Sampler(model.schedule, method, evaluations, grid)
        parts = []
        for batch in model.batches(slice(fitted, None)):
            x = sampler(model.network, model.size(batch), **model.arguments(batch))
            last = len(teacher.knots) - 1
            parts.append(_relative(x.flatten(1), teacher.at(batch, last, x.device)))
        errors = torch.cat(parts).nan_to_num(nan=math.inf).clamp(max=1e6)
        error = math.exp(mean_log(errors, model.total))
        found.append(Known(error, f"{method}, {grid}", sampler.table, errors))
        told(done + 1, len(choices), "known methods")
    return sorted(found, key=lambda known: known.error)


def _relative(x: Tensor, target: Tensor) -> Tensor:
    """Return |x - target| / |target| for each row, on the CPU."""
    x, target = x.flatten(1).double(), target.flatten(1).double()
    return ((x - target).norm(dim=1) / target.norm(dim=1).clamp(min=1e-30)).cpu()


def _knots(
    model: Model,
    teacher: Teacher,
    evaluations: int,
    method: Method,
    fitted: int,
    searches: int,
    told: Told,
) -> Places:
    """Return the knots with the least error on a few seeds, as places among the teacher's."""
    rest = min(len(model.seeds) - fitted, SEARCH_SEEDS // 2)
    used = min(fitted, SEARCH_SEEDS - rest)
    part = slice(fitted - used, fitted + rest)
    tried, kept = 0, Kept()

    def cost(places: Places) -> float:
        nonlocal tried
        tried += 1
        _, errors = fit_student(model, teacher, places, method, used, scratch, part, kept)
        told(min(tried, searches), searches, "knots")
        return mean_log(errors, model.total)

    choices = on_the_path(teacher, evaluations)[: max(searches, 1)]
    with Scratch() as scratch:
        found = min((cost(places), places) for places in choices)
        if searches > len(choices):
            found = min(found, descend(found[1], cost, STRIDES, searches - len(choices)))
    return found[1]


def _is_less(errors: Tensor, others: Tensor, total: Total) -> bool:
    """Return whether ``errors`` are less than ``others`` beyond what few seeds can pretend.

    The mean of log(error / other) must be below minus its standard error. One more observation of
    a factor 2 is added to the variance, so that a single seed must show a factor 2.
    """
    ratio = errors.clamp(min=1e-12).log() - others.clamp(min=1e-12).log()
    n, summed, squares = total(
        torch.stack([ratio.new_tensor(float(len(ratio))), ratio.sum(), (ratio**2).sum()])
    ).tolist()
    mean = summed / n
    variance = max(squares / n - mean**2, 0.0) + math.log(2) ** 2 / n
    return mean < -math.sqrt(variance / n)


def _checked_teacher(schedule: NoiseSchedule, teacher: Sampler | None, evaluations: int) -> Sampler:
    if not isinstance(schedule, NoiseSchedule):
        raise TypeError(f"schedule must be a NoiseSchedule, got {type(schedule).__name__}")
    teacher = default_teacher(schedule) if teacher is None else teacher
    if not isinstance(teacher, Sampler):
        raise TypeError(f"teacher must be a Sampler with a table, got {type(teacher).__name__}")
    if teacher.schedule.fingerprint != schedule.fingerprint:
        raise ValueError(
            f"the teacher samples on {teacher.schedule} and the fit is for {schedule}; make the "
            "teacher with the schedule of the fit"
        )
    if teacher.table.draws:
        raise ValueError(
            f"the teacher {teacher.name!r} draws noise, so its results are not a function of the "
            f"start; take a deterministic one, e.g. Sampler(schedule, {TEACHER!r}, "
            f"{TEACHER_STEPS}, {TEACHER_GRID!r})"
        )
    if dict(teacher.options).get("init_noise", "marginal") != "marginal":
        raise ValueError("the teacher has init_noise of its own; leave init_noise out")
    evaluations = whole_number("evaluations", evaluations)
    most = len(teacher.knots) - 1
    if not 2 <= evaluations <= most:
        raise ValueError(
            f"evaluations must be between 2 and the {most} steps of the teacher "
            f"({described(teacher)}), got {evaluations}"
        )
    return teacher


def _split(
    seeds: int | Sequence[int], held_out: int | Sequence[int] | None
) -> tuple[list[int], list[int]]:
    """Return the seeds of the fit and those held out."""
    listed = _listed("seeds", seeds)
    if held_out is None:
        rest = max(len(listed) // 4, 1)
        if len(listed) < 2:
            raise ValueError(
                f"a fit needs at least 2 seeds, one of them held out, got {len(listed)}; 32 are "
                "usual"
            )
        return listed[:-rest], listed[-rest:]
    first = max(listed, default=-1) + 1
    rest_seeds = (
        [first + k for k in range(whole_number("held_out", held_out, 0))]
        if isinstance(held_out, int)
        else _listed("held_out", held_out)
    )
    if not listed or not rest_seeds:
        raise ValueError(
            f"a fit needs seeds and seeds held out, got {len(listed)} and {len(rest_seeds)}; 24 "
            "and 8 are usual"
        )
    shared = sorted(set(listed) & set(rest_seeds))
    if shared:
        raise ValueError(f"seeds held out must not be fitted, and {shared[:5]} are in both")
    return listed, rest_seeds


def _listed(name: str, seeds: int | Sequence[int]) -> list[int]:
    checked = checked_seeds(seeds)
    if checked is None:
        raise ValueError(f"{name} must be numbers, or how many; got None")
    return checked if isinstance(checked, list) else list(range(checked))
