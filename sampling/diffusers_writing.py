"""Say a sampler as a diffusers scheduler config, or say why none is it.

A config is a candidate first: ``diffusers_classes`` reads it back, and the reading, laid in as many steps, must give the network
the same times and levels, start and end alike, and carry a test network to the same samples. What differs is put in words.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..noising import NoiseSchedule
from ..noising.diffusers_config import to_diffusers
from .custom_grids import CUSTOM
from .diffusers_classes import CLASSES, FLAGS, SPACINGS, Reading, config_of_class, read_config
from .grids import grid_options
from .kernel import run
from .knots import Knot
from .methods import Method
from .table import Table, compile_table

if TYPE_CHECKING:
    from .sampler import Sampler

logger = logging.getLogger(__name__)

LEVELS = 1e-5
"""How far apart two noise levels may lie, relatively: their tables are in float32."""
TIMES = 1e-2
SAMPLES = 2e-5

SAME: Mapping[str, Sequence[tuple[str, Mapping[str, Any]]]] = {
    "dpmpp_2m": [("dpm_solver_multistep", {"lower_order_final": False})],
    "dpmpp_3m": [("dpm_solver_multistep", {"order": 3, "solver_type": "heun", "lower_order_final": False})],
    "dpmpp_2m_sde": [("dpm_solver_multistep", {"algorithm": "sde-dpmsolver++", "lower_order_final": False})],
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
"""Methods that can be another one with the right options: those to try after the method itself."""

NEAREST: Mapping[tuple[bool, bool], Sequence[tuple[str, Mapping[str, Any]]]] = {
    (False, False): [("dpm_solver_multistep", {"order": 1}), ("euler", {})],
    (False, True): [("dpm_solver_multistep", {"order": 2}), ("euler", {})],
    (True, False): [("ddpm", {}), ("euler_ancestral", {}), ("lcm", {})],
    (True, True): [("dpm_solver_multistep", {"order": 2, "algorithm": "sde-dpmsolver++"}), ("ddpm", {}), ("lcm", {})],
}
"""What stands in for a method that no class has, by whether it draws noise and whether it is of a higher order."""


@dataclass(frozen=True)
class Candidate:
    """A config of what a sampler adds to its schedule's, how far its samples are, and in words what differs."""

    config: dict[str, Any]
    distance: float
    differences: tuple[str, ...]
    draws: bool = False

    @property
    def name(self) -> str:
        """The class that it names."""
        return str(self.config["_class_name"])


def sampler_config(sampler: Sampler, nearest: bool = False, passed: Collection[str] = ()) -> dict[str, Any]:
    """Return what scheduler_config.json says of a sampler; see :meth:`Sampler.to_diffusers`.

    ``passed``: arguments of ``step()`` (eta) that whoever runs the scheduler passes on from the sampler's options.
    """
    found = nearest_config(sampler, passed)
    if found.differences and not nearest:
        raise ValueError(
            f"no scheduler class of diffusers is this sampler ({described(sampler)}): the nearest, {found.name}, differs: "
            f"{'; '.join(found.differences)}. Change the sampler, or write that one with nearest=True"
        )
    if found.differences:
        logger.warning(
            "scheduler config: %s stands for %s and differs: %s", found.name, described(sampler), "; ".join(found.differences)
        )
    return found.config


def nearest_config(sampler: Sampler, passed: Collection[str] = ()) -> Candidate:
    """Return the config that is the sampler (its ``differences`` are empty) or comes nearest; ValueError where none does.

    >>> from .sampler import Sampler
    >>> nearest_config(Sampler(NoiseSchedule.scaled_linear(), "dpmpp_2m")).differences
    ()
    """
    best: Candidate | None = None
    for again in (False, True):
        for candidate in _candidates(sampler, again, passed):
            if not candidate.differences:
                return candidate
            if candidate.draws == (sampler.table.draws > 0) and (best is None or candidate.distance < best.distance):
                best = candidate
        if best is not None:
            return best
    raise ValueError(
        f"no scheduler class of diffusers is near this sampler ({described(sampler)}); save the schedule without it, and make "
        "the sampler again with alphabar"
    )


def described(sampler: Sampler) -> str:
    """Return a sampler in words.

    >>> from .sampler import Sampler
    >>> described(Sampler(NoiseSchedule.linear(), "ddim", 10, eta=0.5))
    'ddim, 10 steps on the trailing grid, eta=0.5'
    """
    grid = sampler.grid if isinstance(sampler.grid, str) else "own"
    options = [f"{name}={value!r}" for name, value in sampler.options if name not in CUSTOM]
    return ", ".join([f"{sampler.method.name}, {sampler.steps} steps on the {grid} grid", *options])


def _candidates(sampler: Sampler, again: bool, passed: Collection[str]) -> Iterator[Candidate]:
    options = sampler.method_options
    own, method = sampler.method.name, sampler.method
    if again:
        tried = NEAREST[sampler.table.draws > 0, method.order > 1] if not method.inverse else []
        relatives = [(name, {**more}) for name, more in tried]
    else:
        relatives = [(own, options), *((name, {**options, **more}) for name, more in SAME.get(own, ()))]
    for method_name, wanted in relatives:
        for name, kind in CLASSES.items():
            if not kind.written or method_name not in kind.methods:
                continue
            for grid, of_grid in _grids(sampler, name):
                said = {**wanted, **of_grid, "method": method_name}
                yield from _checked(sampler, name, grid, said, passed, own if again else method_name)


def _grids(sampler: Sampler, name: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the grids of a class that may be the sampler's, with their options: its own first."""
    kind, options = CLASSES[name], dict(sampler.options)
    finals = {"final": options.get("final", grid_options(sampler.grid).get("final", "zero"))}
    named = {k: v for k, v in options.items() if k in ("sigma_min", "sigma_max", "lambda_min", "original_steps")}
    if sampler.grid in kind.lays and sampler.grid in FLAGS:
        spacings = [s for s in (options.get("range_from"), kind.spacing) if s] if not kind.ranged else SPACINGS
        first = options.get("range_from")
        for spacing in sorted(spacings, key=lambda s: s != first):
            yield str(sampler.grid), {**finals, **named, "range_from": spacing, **_offset(options, spacing)}
        return
    plain = [grid for grid in kind.lays if grid not in FLAGS]
    for grid in sorted(plain, key=lambda grid: grid != sampler.grid):
        yield grid, {**finals, **named, **_offset(options, grid)}


def _offset(options: Mapping[str, Any], spacing: str) -> dict[str, Any]:
    return {"steps_offset": options.get("steps_offset", 0)} if spacing == "leading" else {}


def _checked(
    sampler: Sampler, name: str, grid: str, said: dict[str, Any], passed: Collection[str], as_method: str
) -> Iterator[Candidate]:
    """Yield the candidate of a class on a grid with what differs, unless the class cannot hold the schedule or run."""
    schedule = sampler.schedule
    config, missing = config_of_class(name, grid, said)
    if schedule.curve.is_flow and CLASSES[name].flow:
        config["use_flow_sigmas"] = True
    whole = to_diffusers(schedule, config)
    if whole["_class_name"] != name or schedule.curve.is_flow != (grid == "flow" or bool(config.get("use_flow_sigmas"))):
        if not (schedule.curve.is_flow and grid in FLAGS and whole["_class_name"] == name):
            return
    try:
        reading = read_config(config)
        given = {k: v for k, v in missing.items() if k in passed}
        knots = reading.lay(schedule, sampler.steps)
        slips = tuple(reading.slips(schedule, sampler.steps))
        close = not slips and _close(sampler.knots, knots)
        table = compiled_reading(reading, schedule, sampler.steps, knots, given)
    except ValueError:  # the class has no such grid in so many steps
        return
    unsaid = tuple(
        f"{option}={value!r} is {'an argument of its step()' if option in CLASSES[name].step else 'no option of it'}"
        for option, value in missing.items()
        if option not in passed
    )
    distance = sample_distance(sampler.table, table)
    differences = (*slips, *_between(sampler.knots, knots, sampler, reading))
    if not close or distance > SAMPLES:
        other = (f"its method is {reading.method}",) if as_method != reading.method else ()
        differences += (*other, *unsaid, f"samples of a test network differ by {distance:.1e}")
    if sampler.grid in CUSTOM or not isinstance(sampler.grid, str):
        what = sampler.grid if isinstance(sampler.grid, str) else "a grid of one's own"
        differences = (f"a config does not hold {what}", *differences)
    yield Candidate(config, distance, differences, table.draws > 0)


def compiled_reading(
    reading: Reading, schedule: NoiseSchedule, steps: int, knots: Sequence[Knot], given: Mapping[str, Any] | None = None
) -> Table:
    """Return the table of a class on its own knots; ``given`` replaces options that are arguments of its step."""
    from .names import METHODS

    method: Method = METHODS[reading.method]
    known = method.options
    options = {k: v for k, v in {**reading.of_method, **(given or {})}.items() if k in known}

    def formula(*arguments: Any) -> Any:
        return method.formula(*arguments, **{**method.defaults, **options})

    return compile_table(method.name, formula, knots, schedule, point_mass=False)


def _close(ours: Sequence[Knot], theirs: Sequence[Knot]) -> bool:
    return len(ours) == len(theirs) and not any(_apart(a, b) for a, b in zip(ours, theirs, strict=True))


def _apart(a: Knot, b: Knot) -> bool:
    return max(abs(a.alpha - b.alpha), abs(a.sigma - b.sigma) / max(a.sigma, b.sigma, 1e-12)) > LEVELS


def _between(ours: Sequence[Knot], theirs: Sequence[Knot], sampler: Sampler, reading: Reading) -> Iterator[str]:
    """Yield in words how the knots, the start and the end of a class differ from the sampler's."""
    if len(ours) != len(theirs):
        yield f"it takes {len(theirs) - 1} steps"
        return
    time = max(abs(a.timestep - b.timestep) for a, b in zip(ours[:-1], theirs, strict=False))
    levels = [(a.sigma, b.sigma) for a, b in zip(ours, theirs, strict=True) if _apart(a, b)]
    if levels and ours[0].alpha == 0 < theirs[0].alpha and len(levels) == 0 + sum(map(_apart, ours, theirs)):
        yield f"it starts at alpha = {theirs[0].alpha:.2g} in the place of zero terminal SNR"
    inner = list(zip(ours[1:], theirs[1:], strict=True))
    if any(_apart(a, b) for a, b in inner) or (levels and ours[0].alpha > 0):
        worst = max(levels, key=lambda pair: abs(pair[0] - pair[1]))
        yield f"on {_grid_of(reading)} its noise levels are others (sigma {worst[1]:.4g} for {worst[0]:.4g})"
    if time > TIMES:
        yield f"it gives the network times up to {time:.3g} away" + _mend_of_times(sampler, reading)
    start = reading.start_scale(theirs[0])
    if not math.isclose(start, sampler.init_noise_scale, rel_tol=LEVELS):
        mend = " (start='noise' does so too)" if reading.start == "noise" else ""
        yield f"a pipeline starts it from {start / sampler.init_noise_scale:.5f} of the noise{mend}"
    if not math.isclose(reading.end_scale(theirs[-1]), 1.0, rel_tol=LEVELS):
        yield f"it ends in x / alpha, {reading.end_scale(theirs[-1]):.5f} times the sample"


def _mend_of_times(sampler: Sampler, reading: Reading) -> str:
    rounding = reading.options.get("rounding")
    same_grid = reading.grid == sampler.grid and dict(sampler.options).get("rounding") != rounding
    return f" (rounding={rounding!r} is what it does)" if same_grid and rounding == "nearest" else ""


def _grid_of(reading: Reading) -> str:
    options = {k: v for k, v in reading.of_grid.items() if v != grid_options(reading.grid)[k]}
    return f"{reading.grid!r}" + (f" with {', '.join(f'{k}={v!r}' for k, v in options.items())}" if options else "")


def sample_distance(ours: Table, theirs: Table) -> float:
    """Return how far apart two tables carry the same start and draws through a nonlinear network, relatively.

    >>> from .sampler import Sampler
    >>> schedule = NoiseSchedule.scaled_linear()
    >>> sample_distance(Sampler(schedule, "ddim", 10).table, Sampler(schedule, "euler", 10).table) < 1e-12
    True
    """
    a, b = _samples(ours), _samples(theirs)
    distance = float((a - b).abs().max() / b.abs().max())
    return distance if math.isfinite(distance) else math.inf


_CHANNELS, _HIDDEN = 8, 16


def _fixed(rows: int, columns: int, phase: float) -> Tensor:
    """Return numbers that look random, are the same on every machine and take nothing from a generator."""
    index = torch.arange(rows * columns, dtype=torch.float64).view(rows, columns)
    return 1.7 * torch.sin(12.9898 * index + phase + torch.sin(78.233 * index))


def _samples(table: Table) -> Tensor:
    inward, outward = _fixed(_CHANNELS, _HIDDEN, 0.0) / _CHANNELS**0.5, _fixed(_HIDDEN, _CHANNELS, 1.0) / _HIDDEN**0.5
    phase, step, drawn = _fixed(1, _HIDDEN, 2.0), 0, 0

    def network(x: Tensor, knot: Knot) -> Tensor:
        t = knot.timestep / 1000
        return torch.tanh(x @ inward + phase * math.cos(3 * t) + t) @ outward

    def noise(start: float, end: float) -> Tensor:
        nonlocal drawn
        drawn += 1
        return _fixed(4, _CHANNELS, 4.0 + step + 0.37 * drawn)

    x = _fixed(4, _CHANNELS, 3.0)
    for progress in run(table, x, network, noise):
        x, step, drawn = progress.x, progress.step, 0
    return x
