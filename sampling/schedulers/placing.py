"""The table of a class: its own grid, or what ``set_timesteps`` is given, and its method."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise
from typing import Any

import numpy as np

from ...noising import Flow, NoiseSchedule
from ...noising.curves.shifts import shift_noise_level
from ...noising.utils.validation import real_number, whole_number
from ..grids.base import final_knot
from ..grids.given import at_sigmas, at_timesteps, given_points
from ..grids.sigmas import beta, exponential, karras
from ..interop.diffusers_classes import Reading
from ..interop.diffusers_configs import compiled_reading
from ..knots import CLEAN, Knot, knots_at
from ..table import Table

STRIDING = ("ddim", "ddim_inverse")
"""The methods whose classes step by T // N from the timestep, whatever the next one is."""

FORMULAS = {
    "use_karras_sigmas": karras,
    "use_exponential_sigmas": exponential,
    "use_beta_sigmas": beta,
}


@dataclass(frozen=True)
class Wanted:
    """The arguments of ``set_timesteps``."""

    steps: int | None = None
    timesteps: tuple[float, ...] | None = None
    sigmas: tuple[float, ...] | None = None
    mu: float | None = None
    original_inference_steps: int | None = None
    strength: float = 1.0


@dataclass(frozen=True)
class ReadRun:
    """The table of a class on its knots.

    ``given``: the arguments of its step that are options of the method. ``stride``: the gap by
    which a class steps that does not look at its next timestep.
    """

    reading: Reading
    schedule: NoiseSchedule
    knots: tuple[Knot, ...]
    given: tuple[tuple[str, Any], ...] = ()
    stride: int | None = None

    @cached_property
    def table(self) -> Table:
        """The table of the whole run."""
        return self.table_from(0)

    def table_from(self, step: int, /) -> Table:
        """Return the table from a later step on, with nothing remembered."""
        given = dict(self.given)
        if self.stride is None:
            return compiled_reading(self.reading, self.schedule, self.knots, given, step)
        steps = [
            compiled_reading(self.reading, self.schedule, pair, given).steps[0]
            for pair in self._strides()
        ]
        return Table(self.reading.method, self.knots, tuple(steps), self.schedule.prediction, False)

    def _strides(self) -> list[tuple[Knot, Knot]]:
        """Return the points between which each step of a striding class goes."""
        assert self.stride is not None
        inverse = self.reading.method == "ddim_inverse"
        own = self.knots[1:] if inverse else self.knots[:-1]
        before = [knot.timestep - self.stride for knot in own]
        inside = iter(knots_at(self.schedule, [t for t in before if t >= 0]))
        end = self.knots[0 if inverse else -1]
        others = [next(inside) if t >= 0 else end for t in before]
        pairs = zip(others, own, strict=True) if inverse else zip(own, others, strict=True)
        return list(pairs)

    @property
    def steps(self) -> int:
        """The number of steps."""
        return len(self.knots) - 1

    @property
    def sigmas(self) -> list[float]:
        """The noise level at every knot: σ / α, or σ on a flow path."""
        flow = self.schedule.curve.is_flow
        return [knot.sigma if flow else knot.sigma_ve for knot in self.knots]

    @property
    def init_noise_scale(self) -> float:
        """The factor of the first noise, in the units of the class."""
        if self.schedule.curve.is_flow:
            return 1.0
        first = self.knots[0]
        scale = self.reading.start_scale(first)
        return scale / first.alpha if self.reading.kind.in_sigma else scale


def place(
    reading: Reading, schedule: NoiseSchedule, config: Mapping[str, Any], wanted: Wanted
) -> ReadRun:
    """Return the run of a class for arguments of its ``set_timesteps``.

    Raises:
        ValueError: for arguments that contradict each other or the config.
    """
    custom = wanted.timesteps if wanted.timesteps is not None else wanted.sigmas
    if wanted.steps is None and custom is None:
        raise ValueError("give num_inference_steps, or timesteps or sigmas of your own")
    if reading.kind.predictions == ("flow_prediction",):
        return ReadRun(reading, schedule, _flow_knots(schedule, config, wanted))
    if wanted.steps is not None and custom is not None:
        raise ValueError("give num_inference_steps, or timesteps or sigmas of your own, not both")
    if wanted.timesteps is not None and wanted.sigmas is not None:
        raise ValueError("give timesteps or sigmas, not both")
    if reading.flow and config.get("use_dynamic_shifting"):
        if wanted.mu is None:
            raise ValueError("the config says use_dynamic_shifting: give mu to set_timesteps")
        count = schedule.num_train_timesteps
        curve = Flow(shift=math.exp(wanted.mu), num_train_timesteps=count)
        schedule = NoiseSchedule(curve, schedule.prediction)
    final = reading.options.get("final", "zero")
    if wanted.timesteps is not None:
        points = given_points("timesteps", wanted.timesteps)
        knots = at_timesteps(
            schedule,
            len(points),
            timesteps=points,
            interpolation="sigma" if reading.kind.in_sigma else "log_snr",
            final=final,
        )
        return ReadRun(reading, schedule, knots)
    if wanted.sigmas is not None:
        points = given_points("sigmas", wanted.sigmas)
        return ReadRun(reading, schedule, at_sigmas(schedule, len(points), sigmas=points))
    steps = _checked_steps(wanted.steps, schedule)
    if reading.method in ("lcm", "tcd"):
        times = _distilled_timesteps(reading, schedule, wanted, steps)
        return ReadRun(reading, schedule, at_timesteps(schedule, steps, timesteps=times))
    stride = None
    if reading.method in STRIDING and reading.kind.strides:
        stride = schedule.num_train_timesteps // steps
    if reading.method == "ddim_inverse" and final != "zero":
        lowest = final_knot(schedule, "sigma_min")
        options = {name: v for name, v in reading.options.items() if name != "final"}
        reading = replace(reading, options=options)
        knots = (lowest, *reading.lay(schedule, steps)[1:])
    else:
        knots = reading.lay(schedule, steps)
    return ReadRun(reading, schedule, knots, stride=stride)


def training_run(reading: Reading, schedule: NoiseSchedule) -> ReadRun:
    """Return the run through every training timestep, for a step without ``set_timesteps``."""
    count = schedule.num_train_timesteps
    if schedule.curve.is_flow:
        levels = [(i + 1) / count for i in range(count)][::-1]
        return ReadRun(reading, schedule, _knots_of_levels(schedule, levels))
    knots = (*knots_at(schedule, list(range(count - 1, -1, -1))), CLEAN)
    return ReadRun(reading, schedule, knots)


def _checked_steps(steps: Any, schedule: NoiseSchedule) -> int:
    steps, count = whole_number("num_inference_steps", steps, 1), schedule.num_train_timesteps
    if steps > count:
        raise ValueError(f"num_inference_steps must be at most {count}, got {steps}")
    return steps


def _distilled_timesteps(
    reading: Reading, schedule: NoiseSchedule, wanted: Wanted, steps: int
) -> list[float]:
    """Return some of the timesteps of the distillation, evenly, below a strength."""
    own = reading.options["original_steps"]
    count, original = schedule.num_train_timesteps, wanted.original_inference_steps
    if reading.method == "tcd" and original is not None:
        times = np.arange(int(count * wanted.strength))
    else:
        original = own if original is None else original
        times = np.arange(1, int(original * wanted.strength) + 1) * (count // original) - 1
    if not steps <= len(times):
        raise ValueError(
            f"num_inference_steps must be at most {len(times)}, the steps of the distillation "
            f"times the strength, got {steps}"
        )
    places = np.floor(np.linspace(0, len(times), num=steps, endpoint=False)).astype(int)
    return times[::-1][places].tolist()


def _flow_knots(
    schedule: NoiseSchedule, config: Mapping[str, Any], wanted: Wanted
) -> tuple[Knot, ...]:
    """Return the knots of a flow class: levels, shift, stretched end, spacing."""
    count = schedule.num_train_timesteps
    dynamic = bool(config.get("use_dynamic_shifting"))
    if dynamic and wanted.mu is None:
        raise ValueError("the config says use_dynamic_shifting: give mu to set_timesteps")
    shift = float(config.get("shift", 1.0))
    if dynamic:
        mu = real_number("mu", wanted.mu)
        shift = mu if config.get("time_shift_type") == "linear" else math.exp(mu)
    lengths = {len(v) for v in (wanted.timesteps, wanted.sigmas) if v is not None}
    lengths |= {wanted.steps} if wanted.steps is not None else set()
    if len(lengths) != 1:
        raise ValueError("timesteps, sigmas and num_inference_steps must agree in length")
    if wanted.sigmas is not None:
        levels = np.array([float(s) for s in wanted.sigmas])
    elif wanted.timesteps is not None:
        levels = np.array([float(t) for t in wanted.timesteps]) / count
    else:
        steps = _checked_steps(wanted.steps, schedule)
        low = 1 / count if dynamic else shift_noise_level(1 / count, config["own_shift"])
        levels = np.linspace(1.0, low, steps)
    levels = np.array([shift_noise_level(float(level), shift) for level in levels])
    if config.get("shift_terminal"):
        levels = 1 - (1 - levels) * (1 - config["shift_terminal"]) / (1 - levels[-1])
    for key, formula in FORMULAS.items():
        if config.get(key):
            levels = formula(len(levels), float(levels[-1]), float(levels[0])).numpy()
    knots = _knots_of_levels(schedule, levels.tolist())
    if wanted.timesteps is not None:
        given = zip(knots, wanted.timesteps, strict=False)
        knots = (*(replace(k, timestep=float(t)) for k, t in given), knots[-1])
    return knots


def _knots_of_levels(schedule: NoiseSchedule, levels: Sequence[float]) -> tuple[Knot, ...]:
    if not all(a > b for a, b in pairwise((*levels, 0.0))) or not levels[0] <= 1:
        raise ValueError(f"sigmas must fall from at most 1 to above 0, got {list(levels)}")
    count = schedule.num_train_timesteps
    return (*(Knot(count * s, 1 - s, s) for s in levels), CLEAN)
