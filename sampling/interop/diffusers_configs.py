"""Convert a sampler to a diffusers scheduler config, or explain why no config is equal to it.

A config is first a candidate. ``diffusers_classes`` reads it back. With the sampler's number of
steps, this reading must give the network the same timesteps and noise levels, including start and
end, and must give the same samples for a test network. All differences are described in words.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Protocol

import torch
from torch import Tensor

from ...noising import NoiseSchedule
from ..grids import grid_options
from ..grids.given import CUSTOM
from ..kernel import Beside, run
from ..knots import Knot
from ..methods import METHODS, Method
from ..table import Table, compile_table
from ..tracing import Unconditional
from .diffusers_classes import CLASSES, FLAGS, SPACINGS, Reading, config_of_class, read_config


class TableSampler(Protocol):
    """The part of :class:`Sampler` that this module uses."""

    @property
    def schedule(self) -> NoiseSchedule: ...
    @property
    def method(self) -> Method: ...
    @property
    def steps(self) -> int: ...
    @property
    def grid(self) -> Any: ...
    @property
    def options(self) -> tuple[tuple[str, Any], ...]: ...
    @property
    def method_options(self) -> dict[str, Any]: ...
    @property
    def init_noise_scale(self) -> float: ...
    @property
    def knots(self) -> tuple[Knot, ...]: ...
    @property
    def table(self) -> Table: ...


logger = logging.getLogger(__name__)

LEVELS = 1e-5
"""The largest relative difference of equal noise levels: their tables are in float32."""
TIMES = 1e-2
SAMPLES = 2e-5

SAME: Mapping[str, Sequence[tuple[str, Mapping[str, Any]]]] = {
    "dpmpp_2m": [("dpm_solver_multistep", {"lower_order_final": False})],
    "dpmpp_3m": [
        ("dpm_solver_multistep", {"order": 3, "solver_type": "heun", "lower_order_final": False})
    ],
    "dpmpp_2m_sde": [
        ("dpm_solver_multistep", {"algorithm": "sde-dpmsolver++", "lower_order_final": False})
    ],
    "unipc_3": [("unipc", {"order": 3})],
    "ddim": [
        ("ddpm", {}),
        ("euler_ancestral", {}),
        ("dpm_solver_multistep", {"order": 1}),
        ("euler", {}),
    ],
    "euler": [("dpm_solver_multistep", {"order": 1}), ("ddim", {})],
    "ddpm": [("euler_ancestral", {})],
    "euler_ancestral": [("ddpm", {}), ("ddim", {"eta": 0.0})],
    "dpm_solver_multistep": [("ddim", {}), ("euler", {})],
}
"""Methods that can equal another method with the right options.

These are tried after the method itself.
"""

NEAREST: Mapping[tuple[bool, bool], Sequence[tuple[str, Mapping[str, Any]]]] = {
    (False, False): [("dpm_solver_multistep", {"order": 1}), ("euler", {})],
    (False, True): [("dpm_solver_multistep", {"order": 2}), ("euler", {})],
    (True, False): [("ddpm", {}), ("euler_ancestral", {}), ("lcm", {})],
    (True, True): [
        ("dpm_solver_multistep", {"order": 2, "algorithm": "sde-dpmsolver++"}),
        ("ddpm", {}),
        ("lcm", {}),
    ],
}
"""Replacements for a method that no class has.

The keys: whether it draws noise, and whether it is of a higher order.
"""


@dataclass(frozen=True)
class Candidate:
    """A config for a sampler, read back, with its knots and the options that it cannot express.

    The config does not contain the keys of the schedule.
    """

    config: dict[str, Any]
    reading: Reading
    knots: tuple[Knot, ...]
    slips: tuple[str, ...]
    unsaid: Mapping[str, Any]
    given: Mapping[str, Any]
    rank: int

    @property
    def name(self) -> str:
        """The class that the config names."""
        return str(self.config["_class_name"])

    def table(self, sampler: TableSampler) -> Table:
        """Return the table of the class on its own knots; raise ValueError if there is none."""
        return compiled_reading(self.reading, sampler.schedule, self.knots, self.given)


def sampler_config(
    sampler: TableSampler, nearest: bool = False, passed: Collection[str] = ()
) -> dict[str, Any]:
    """Return the scheduler_config.json of a sampler; see :meth:`Sampler.to_diffusers`.

    ``passed``: arguments of ``step()`` (eta) that the user of the scheduler passes from the
    sampler's options.
    """
    config, differences = nearest_config(sampler, passed)
    name, what = config["_class_name"], "; ".join(differences)
    if differences and not nearest:
        raise ValueError(
            f"no scheduler class of diffusers is this sampler ({described(sampler)}): the nearest, "
            f"{name}, differs: {what}. "
            "Change the sampler, or write that one with nearest=True"
        )
    if differences:
        logger.warning(
            "the scheduler config names %s, which is not %s: %s", name, described(sampler), what
        )
    return config


def nearest_config(
    sampler: TableSampler, passed: Collection[str] = (), stand_ins: bool = True
) -> tuple[dict[str, Any], tuple[str, ...]]:
    """Return the config that equals the sampler or is nearest, and the differences in words.

    ``stand_ins``: if no class has the method, a class of another method may replace it.

    Raises:
        ValueError: No class is near.

    >>> from alphabar.sampling import Sampler
    >>> nearest_config(Sampler(NoiseSchedule.scaled_linear(), "dpmpp_2m"))[1]
    ()
    """
    found = list(_candidates(sampler, _relatives(sampler), passed))
    for candidate in found:
        differences = _differences(sampler, candidate)
        if not differences:
            return candidate.config, ()
    near = _nearest(sampler, found)
    if near is None and stand_ins:
        near = _nearest(sampler, list(_candidates(sampler, _stand_ins(sampler), passed)))
    if near is None:
        raise ValueError(
            f"no scheduler class of diffusers is near this sampler ({described(sampler)}); save "
            "the schedule without it, and make "
            "the sampler again with alphabar"
        )
    return near


def described(sampler: TableSampler) -> str:
    """Return a sampler in words.

    >>> from alphabar.sampling import Sampler
    >>> described(Sampler(NoiseSchedule.linear(), "ddim", 10, eta=0.5))
    'ddim, 10 steps on the trailing grid, eta=0.5'
    """
    grid = sampler.grid if isinstance(sampler.grid, str) else "own"
    options = [f"{name}={value!r}" for name, value in sampler.options if name not in CUSTOM]
    return ", ".join([f"{sampler.method.name}, {sampler.steps} steps on the {grid} grid", *options])


Relatives = Sequence[tuple[str, Mapping[str, Any]]]


def _relatives(sampler: TableSampler) -> Relatives:
    """Return the methods that can equal the sampler's, with their options: its own method first."""
    own, options = sampler.method.name, sampler.method_options
    return [(own, options), *((name, {**options, **more}) for name, more in SAME.get(own, ()))]


def _stand_ins(sampler: TableSampler) -> Relatives:
    return (
        [] if sampler.method.inverse else NEAREST[sampler.table.draws > 0, sampler.method.order > 1]
    )


def _candidates(
    sampler: TableSampler, relatives: Relatives, passed: Collection[str]
) -> Iterator[Candidate]:
    for rank, (method, wanted) in enumerate(relatives):
        for name, kind in CLASSES.items():
            if kind.written and method in kind.methods and _holds(sampler.schedule, name):
                for grid, of_grid in _grids(sampler, name):
                    said = {**wanted, **of_grid, "method": method}
                    yield from _laid(sampler, name, grid, said, passed, rank)


@lru_cache(maxsize=256)
def _holds(schedule: NoiseSchedule, name: str) -> bool:
    """Return whether a config of this class can express the whole schedule."""
    return schedule.to_diffusers({"_class_name": name})["_class_name"] == name


def _laid(
    sampler: TableSampler,
    name: str,
    grid: str,
    said: Mapping[str, Any],
    passed: Collection[str],
    rank: int,
) -> Iterator[Candidate]:
    """Yield the candidate of a class on a grid, if there is one with this number of steps."""
    schedule, steps = sampler.schedule, sampler.steps
    config, missing = config_of_class(name, grid, said)
    if schedule.curve.is_flow and CLASSES[name].predictions != ("flow_prediction",):
        if CLASSES[name].flow is None or grid in FLAGS:
            return  # use_flow_sigmas is not read, or the flag has priority
        config["use_flow_sigmas"] = True
    reading = read_config(config)
    if reading.fails(schedule, steps):
        return
    try:
        knots, slips = reading.lay(schedule, steps), tuple(reading.slips(schedule, steps))
    except ValueError:
        return
    given = {option: value for option, value in missing.items() if option in passed}
    unsaid = {option: value for option, value in missing.items() if option not in passed}
    yield Candidate(config, reading, knots, slips, unsaid, given, rank)


def _grids(sampler: TableSampler, name: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the grids of a class that can equal the sampler's, with options.

    The sampler's own grid is first.
    """
    kind, options = CLASSES[name], dict(sampler.options)
    finals = {"final": options.get("final", grid_options(sampler.grid).get("final", "zero"))}
    named = {
        k: v
        for k, v in options.items()
        if k in ("sigma_min", "sigma_max", "lambda_min", "original_steps")
    }
    if sampler.grid in kind.lays and sampler.grid in FLAGS:
        spacings = (
            [s for s in (options.get("range_from"), kind.spacing) if s]
            if not kind.ranged
            else SPACINGS
        )
        first = options.get("range_from")
        for spacing in sorted(spacings, key=lambda s: s != first):
            yield (
                str(sampler.grid),
                {**finals, **named, "range_from": spacing, **_offset(options, spacing)},
            )
        return
    plain = [grid for grid in kind.lays if grid not in FLAGS]
    for grid in sorted(plain, key=lambda grid: grid != sampler.grid):
        yield grid, {**finals, **named, **_offset(options, grid)}


def _offset(options: Mapping[str, Any], spacing: str) -> dict[str, Any]:
    return {"steps_offset": options.get("steps_offset", 0)} if spacing == "leading" else {}


def _differences(sampler: TableSampler, candidate: Candidate) -> tuple[str, ...]:
    """Return the differences between a candidate and the sampler in words.

    If the knots differ, samples are not compared.
    """
    custom = sampler.grid if sampler.grid in CUSTOM else "a grid of one's own"
    words = (
        ()
        if isinstance(sampler.grid, str) and sampler.grid not in CUSTOM
        else (f"a config does not hold {custom}",)
    )
    words += (*candidate.slips, *_between(sampler, candidate))
    if words:
        return words
    try:
        distance = sample_distance(sampler.table, candidate.table(sampler))
    except ValueError as error:
        return (str(error),)
    return () if distance <= SAMPLES else _of_the_method(sampler, candidate, distance)


def _of_the_method(sampler: TableSampler, candidate: Candidate, distance: float) -> tuple[str, ...]:
    step, method, ours = (
        candidate.reading.kind.step,
        candidate.reading.method,
        sampler.method_options,
    )
    other: tuple[str, ...] = (
        () if method in dict(_relatives(sampler)) else (f"its method is {method}",)
    )
    if method == sampler.method.name:
        said = [
            (k, v)
            for k, v in candidate.reading.of_method.items()
            if k in ours and k not in candidate.unsaid
        ]
        other += tuple(
            f"{option}={value!r} for {ours[option]!r}"
            for option, value in said
            if value != ours[option]
        )
    elsewhere = (
        {k: v for k, v in sampler.options if k in ours and k not in candidate.reading.options}
        if not other
        else {}
    )
    lost = {k: v for k, v in {**elsewhere, **candidate.unsaid}.items() if k not in candidate.given}
    unsaid = (
        f"{option}={value!r} is {_whose(option, sampler.method.name, step)}"
        for option, value in lost.items()
    )
    return (*other, *unsaid, f"samples of a test network differ by {distance:.1e}")


def _whose(option: str, method: str, step: Mapping[str, Any]) -> str:
    if option in step:
        return "an argument of its step()"
    takers = [
        name
        for name, kind in CLASSES.items()
        if kind.written and method in kind.methods and option in kind.step
    ]
    return f"an argument of step() in {takers[0]}" if takers else "no option of it"


TRIED = 4
"""The number of candidates that are run to find the nearest one."""


def _nearest(
    sampler: TableSampler, candidates: Sequence[Candidate]
) -> tuple[dict[str, Any], tuple[str, ...]] | None:
    """Return the nearest candidate and its differences.

    Candidates on the sampler's own grid come first, then those of its own method, then the order by
    samples. A candidate that draws noise is only used for a sampler that draws noise, and the
    reverse.
    """

    def kinship(candidate: Candidate) -> tuple[bool, int]:
        return candidate.reading.grid != sampler.grid, candidate.rank

    best: tuple[tuple[bool, int], float, Candidate] | None = None
    for candidate in sorted(candidates, key=lambda c: (kinship(c), _way(sampler.knots, c.knots)))[
        :TRIED
    ]:
        try:
            table = candidate.table(sampler)
        except ValueError:
            continue
        distance = sample_distance(sampler.table, table)
        kept = (table.draws > 0) == (sampler.table.draws > 0) and math.isfinite(distance)
        if kept and (best is None or (kinship(candidate), distance) < best[:2]):
            best = kinship(candidate), distance, candidate
    if best is None:
        return None
    _, distance, candidate = best
    differences = _differences(sampler, candidate)
    of_method = _of_the_method(sampler, candidate, distance) if distance > SAMPLES else ()
    return candidate.config, tuple(dict.fromkeys([*differences, *of_method]))


def _way(ours: Sequence[Knot], theirs: Sequence[Knot]) -> float:
    """Return the distance between the knots of two grids."""
    if len(ours) != len(theirs):
        return math.inf
    pairs = list(zip(ours, theirs, strict=True))
    return max(
        abs(a.sigma - b.sigma) + abs(a.alpha - b.alpha) + 1e-3 * abs(a.timestep - b.timestep)
        for a, b in pairs
    )


def compiled_reading(
    reading: Reading,
    schedule: NoiseSchedule,
    knots: Sequence[Knot],
    given: Mapping[str, Any] | None = None,
    start: int = 0,
) -> Table:
    """Return the table of a class on its own knots, from the knot ``start``.

    ``given`` replaces options that are arguments of its step.
    """
    method: Method = METHODS[reading.method]
    known = method.options
    options = {k: v for k, v in {**reading.of_method, **(given or {})}.items() if k in known}

    def formula(*arguments: Any) -> Any:
        return method.formula(*arguments, **{**method.defaults, **options})

    return compile_table(method.name, formula, knots, schedule, point_mass=False, start=start)


def _apart(a: Knot, b: Knot) -> bool:
    return (
        max(abs(a.alpha - b.alpha), abs(a.sigma - b.sigma) / max(a.sigma, b.sigma, 1e-12)) > LEVELS
    )


def _between(sampler: TableSampler, candidate: Candidate) -> Iterator[str]:
    """Yield in words how the knots, the start and the end of a class differ from the sampler's."""
    ours, theirs, reading = sampler.knots, candidate.knots, candidate.reading
    if len(ours) != len(theirs):
        yield f"it takes {len(theirs) - 1} steps"
        return
    apart = [(a, b) for a, b in zip(ours, theirs, strict=True) if _apart(a, b)]
    if apart and apart[0] == (ours[0], theirs[0]) and ours[0].alpha == 0:
        yield f"it starts at alpha = {theirs[0].alpha:.2g} in the place of 0"
        apart = apart[1:]
    if apart:
        a, b = max(apart, key=lambda pair: abs(pair[0].sigma - pair[1].sigma))
        yield (
            f"on {_grid_of(reading)} its noise levels are others "
            f"(sigma {b.sigma:.4g} for {a.sigma:.4g})"
        )
    time = max(abs(a.timestep - b.timestep) for a, b in zip(ours[:-1], theirs, strict=False))
    if time > TIMES:
        yield f"it gives the network times up to {time:.3g} away{_mend_of_times(sampler, reading)}"
    start = reading.start_scale(theirs[0]) / sampler.init_noise_scale
    if not math.isclose(start, 1.0, rel_tol=LEVELS):
        mend = (
            " (init_noise='sigma' does so too)"
            if reading.init_noise == "sigma" and not apart
            else ""
        )
        yield f"a pipeline starts it from {start:.5f} of the noise{mend}"
    end = reading.end_scale(theirs[-1])
    if not math.isclose(end, 1.0, rel_tol=LEVELS):
        yield f"it ends in x / alpha, {end:.5f} times the sample"


def _mend_of_times(sampler: TableSampler, reading: Reading) -> str:
    rounding = reading.options.get("rounding")
    same_grid = reading.grid == sampler.grid and dict(sampler.options).get("rounding") != rounding
    return (
        f" (rounding={rounding!r} is what it does)" if same_grid and rounding == "nearest" else ""
    )


def _grid_of(reading: Reading) -> str:
    options = {k: v for k, v in reading.of_grid.items() if v != grid_options(reading.grid)[k]}
    return f"{reading.grid!r}" + (
        f" with {', '.join(f'{k}={v!r}' for k, v in options.items())}" if options else ""
    )


def sample_distance(ours: Table, theirs: Table) -> float:
    """Return the relative distance of the samples of two tables for a nonlinear test network.

    Both have the same start and the same draws.

    >>> from alphabar.sampling import Sampler
    >>> schedule = NoiseSchedule.scaled_linear()
    >>> sample_distance(
    ...     Sampler(schedule, "ddim", 10).table, Sampler(schedule, "euler", 10).table
    ... ) < 1e-12
    True
    """
    a, b = _samples(ours), _samples(theirs)
    distance = float((a - b).abs().max() / b.abs().max())
    return distance if math.isfinite(distance) else math.inf


_CHANNELS, _HIDDEN = 8, 16


def _fixed(rows: int, columns: int, phase: float) -> Tensor:
    """Return numbers that look random and are the same on every machine, without a generator."""
    index = torch.arange(rows * columns, dtype=torch.float64).view(rows, columns)
    return 1.7 * torch.sin(12.9898 * index + phase + torch.sin(78.233 * index))


def _samples(table: Table) -> Tensor:
    inward, outward = (
        _fixed(_CHANNELS, _HIDDEN, 0.0) / _CHANNELS**0.5,
        _fixed(_HIDDEN, _CHANNELS, 1.0) / _HIDDEN**0.5,
    )
    phase, step, drawn = _fixed(1, _HIDDEN, 2.0), 0, 0
    out = torch.zeros(())

    def network(x: Tensor, knot: Knot) -> Tensor:
        nonlocal out
        t = knot.timestep / 1000
        out = torch.tanh(x @ inward + phase * math.cos(3 * t) + t) @ outward
        return out

    def noise(start: float, end: float) -> Tensor:
        nonlocal drawn
        drawn += 1
        return _fixed(4, _CHANNELS, 4.0 + step + 0.37 * drawn)

    x = _fixed(4, _CHANNELS, 3.0)
    # no class uses the unconditional half of CFG++, so it must differ here
    beside: Beside = {Unconditional: lambda: 0.7 * out}
    for progress in run(table, x, network, noise, beside):
        x, step, drawn = progress.x, progress.step, 0
    return x
