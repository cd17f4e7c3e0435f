"""A sampler as a scheduler object of diffusers: pipelines run any table, one network call a step.

A pipeline calls the network itself and gives the output to ``step``, which performs the operations
of the table up to its next evaluation. The latents are those of the variance preserving path, x_t =
α x_0 + σ ε, whatever the method, so ``scale_model_input`` is 1 but for EDM's c_in. Only faces of
classes that have x / α there (``in_sigma``) differ.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any, ClassVar, Protocol

import torch
from diffusers.configuration_utils import ConfigMixin
from diffusers.schedulers.scheduling_utils import SchedulerMixin, SchedulerOutput
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from ...noising import Flow, NoiseSchedule
from ...noising.curves.shifts import shift_noise_level
from ..clipping import Change
from ..grids import split_options
from ..grids.given import time_at_timestep
from ..kernel import combine
from ..knots import Knot
from ..table import Table
from ..tracing import Draw, Evaluation, Operation, Row, Unconditional


@dataclass
class TableSchedulerOutput(SchedulerOutput):
    """The next sample, and the clean estimate of the network call."""

    prev_sample: Tensor
    pred_original_sample: Tensor | None = None


class Run(Protocol):
    """The part of :class:`Sampler` that a scheduler object uses."""

    @property
    def table(self) -> Table: ...
    @property
    def steps(self) -> int: ...
    @property
    def sigmas(self) -> list[float]: ...
    @property
    def init_noise_scale(self) -> float: ...
    def table_from(self, step: int, /) -> Table: ...


@dataclass(frozen=True)
class Call:
    """One network call of a table, and what follows it up to the next one.

    Rows are over the basis of the step, with the pipeline's sample at 0.

    Args:
        step: the step of the table.
        opens: whether the step starts with this call.
        knot: where the network is called.
        scale: the network's input is the sample times this.
        p, q: the clean estimate is p sample + q output.
        appended: the operations after the call.
        row: the sample of the next call, or the result.
        memory: what later steps use; None inside a step.
        over_estimate: whether the rows have the clean estimate in the place of the output.
    """

    step: int
    opens: bool
    knot: Knot
    scale: float
    p: float
    q: float
    appended: tuple[Operation, ...]
    row: Row
    memory: tuple[Row, ...] | None
    over_estimate: bool = False


def calls_of(table: Table, in_sigma: bool = False, clips: bool = False) -> tuple[Call, ...]:
    """Return the network calls of a table.

    Args:
        table: the table.
        in_sigma: whether the pipeline's sample is x / α.
        clips: whether the clean estimate is clipped. Rows are then over the estimate in the place
            of the output, where the step has one call: to convert it back would lose digits.

    >>> from alphabar.sampling import Sampler
    >>> calls = calls_of(Sampler(NoiseSchedule.linear(), "heun", 2).table)
    >>> [(call.step, call.opens, call.knot.timestep) for call in calls]
    [(0, True, 999.0), (0, False, 499.0), (1, True, 499.0)]
    """

    def unit(knot: Knot) -> float:
        return knot.alpha if in_sigma else 1.0

    calls: list[Call] = []
    states = 1
    for i, step in enumerate(table.steps):
        places = [j for j, op in enumerate(step.ops) if isinstance(op, Evaluation)]
        evaluations = [op for op in step.ops if isinstance(op, Evaluation)]
        first = unit(evaluations[0].knot)
        memory = tuple(_in_units(row, first, 1.0) for row in step.carry[1:])
        for n, (op, start) in enumerate(zip(evaluations, places, strict=True)):
            inside = n + 1 < len(places)
            stop = places[n + 1] if inside else len(step.ops)
            if inside:
                row, after = evaluations[n + 1].row, evaluations[n + 1].knot
                out = unit(after) * after.input_scale
            else:
                row, after = step.carry[0], table.knots[-1]
                following = table.steps[i + 1].ops[0] if i + 1 < len(table.steps) else None
                out = unit(following.knot if isinstance(following, Evaluation) else after)
            calls.append(
                Call(
                    step=i,
                    opens=n == 0,
                    knot=op.knot,
                    scale=unit(op.knot) * op.knot.input_scale,
                    p=op.p * unit(op.knot),
                    q=op.q,
                    appended=step.ops[start + 1 : stop],
                    row=_in_units(row, first, out),
                    memory=None if inside else memory,
                )
            )
        if clips and len(places) == 1 and calls[-1].q:
            calls[-1] = _over_estimate(calls[-1], states)
        states = len(step.carry)
    return tuple(calls)


def _over_estimate(call: Call, place: int) -> Call:
    """Return a call whose rows have the clean estimate in the place of the network's output."""

    def converted(row: Row) -> Row:
        terms = dict(row)
        c = terms.pop(place, 0.0) / call.q
        terms[0] = terms.get(0, 0.0) - c * call.p
        return tuple(sorted((k, v) for k, v in {**terms, place: c}.items() if v))

    memory = None if call.memory is None else tuple(map(converted, call.memory))
    return replace(call, row=converted(call.row), memory=memory, over_estimate=True)


class Plan:
    """A run as a scheduler object performs it: its network calls, and what is known of them.

    Args:
        run: a sampler, or the reading of a class.
        in_sigma, clips: as in :func:`calls_of`.

    >>> from alphabar.sampling import Sampler
    >>> Plan(Sampler(NoiseSchedule.linear(), "heun", 3)).order
    2
    """

    def __init__(self, run: Any, in_sigma: bool = False, clips: bool = False) -> None:
        require_steppable(run.table)
        self.run, self.form = run, (in_sigma, clips)
        self.variants: dict[tuple[str, Any], Plan] = {}
        self.calls = calls_of(run.table, *self.form)
        self.times = [call.knot.timestep for call in self.calls]
        self.index_of_time = {t: i for i, t in reversed(list(enumerate(self.times)))}
        self.first_of_step = [i for i, call in enumerate(self.calls) if call.opens]
        self.memoryless = all(call.opens and not call.memory for call in self.calls)

    @property
    def order(self) -> int:
        """The network calls of a step, by which pipelines count steps; 1 where steps differ."""
        first = self.first_of_step
        order = first[1] if len(first) > 1 else 1
        return order if all(i == order * n for n, i in enumerate(first)) else 1

    @cached_property
    def off_schedule(self) -> bool:
        """Whether a knot has other noise levels than the schedule has at its time."""
        knots = torch.tensor(self.levels, dtype=torch.float64)
        like = torch.zeros(len(self.calls), 1, dtype=torch.float64)
        levels = schedule_levels(self.run.schedule, knots[0], like)
        return bool(((torch.cat(levels, 1).T - knots[1:]).abs() > 1e-7).any())

    @property
    def levels(self) -> list[list[float]]:
        """The network's times, α and σ of the calls."""
        knots = [call.knot for call in self.calls]
        return [[getattr(k, name) for k in knots] for name in ("timestep", "alpha", "sigma")]

    @cached_property
    def sigmas(self) -> list[float]:
        """The noise level at each call and at the end: σ / α, or σ on a flow path."""
        _, alpha, sigma = torch.tensor(self.levels, dtype=torch.float64)
        at_calls = self.run.schedule.curve.grid_coordinate(alpha, sigma).tolist()
        return [*at_calls, self.run.sigmas[-1]]

    def calls_from(self, index: int) -> tuple[Call, ...]:
        """Return the calls of a run that starts at a later call, with nothing remembered.

        Raises:
            ValueError: for a method whose first steps have more calls.
        """
        place = sum(start <= index for start in self.first_of_step) - 1
        if place == 0:
            return self.calls
        table = self.run.table_from(place)
        if table.evaluations != len(self.calls) - self.first_of_step[place]:
            raise ValueError(
                f"{table.name} starts with steps of more network calls and cannot start "
                f"at timestep {self.times[index]:g}; take a method without them, e.g. 'ipndm'"
            )
        return calls_of(table, *self.form)


def schedule_levels(schedule: NoiseSchedule, times: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
    """Return α and σ of a schedule at the network's times, in a shape that broadcasts."""
    curve = schedule.curve
    if curve.is_discrete:
        return schedule.alpha_sigma(times, like)
    if isinstance(curve, Flow):
        dtype = torch.promote_types(like.dtype, torch.float32)
        sigma = times.to(dtype).view(-1, *[1] * (like.ndim - 1)) / curve.num_train_timesteps
        return 1 - sigma, sigma
    return schedule.alpha_sigma(time_at_timestep(curve, times.double()), like)


def _in_units(row: Row, first: float, out: float) -> Row:
    """Return a row whose sample is in units of ``first`` and its result in units of ``out``."""
    return tuple((k, (c * first if k == 0 else c) / out) for k, c in row)


class TableScheduler(SchedulerMixin, ConfigMixin):
    """A sampler with the interface of diffusers' schedulers; made by ``Sampler.as_scheduler()``.

    ``config`` is that of the nearest scheduler class, for pipelines that read it. To save a
    pipeline, give it a scheduler of diffusers first (``schedule.save_pretrained``).

    Args:
        sampler: the sampler; its number of steps holds until ``set_timesteps`` is called.

    Raises:
        ValueError: for methods that need the unconditional half (CFG++), which a pipeline does not
            pass, and for noise before the first network call (churn).

    >>> from alphabar.sampling import Sampler
    >>> sampler = Sampler(NoiseSchedule.scaled_linear(), "DPM++ 2M Karras", steps=4)
    >>> scheduler = sampler.as_scheduler()
    >>> scheduler.set_timesteps(3)
    >>> [round(t) for t in scheduler.timesteps.tolist()]
    [999, 427, 0]
    """

    config_name = "scheduler_config.json"
    _compatibles: ClassVar[list[str]] = []
    order = 1
    init_noise_sigma: float = 1.0
    """The factor of the initial standard normal noise."""

    _in_sigma: ClassVar[bool] = False
    _stateless: ClassVar[bool] = False
    _clip: Change | None = None

    def __init__(self, sampler: Any) -> None:
        self.sampler = sampler
        self.schedule: NoiseSchedule = sampler.schedule
        self.num_inference_steps: int | None = None
        self.register_to_config(**_config_of(sampler))
        self._place(Plan(sampler), "cpu")

    def __len__(self) -> int:
        return self.schedule.num_train_timesteps

    # -- timesteps -------------------------------------------------------------------------------

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: Any = None,
        *,
        timesteps: Sequence[float] | None = None,
        sigmas: Sequence[float] | None = None,
        mu: float | None = None,
    ) -> None:
        """Set the number of steps, or the timesteps or noise levels themselves.

        Args:
            num_inference_steps: number of steps on the sampler's grid.
            device: device of ``timesteps``.
            timesteps: the network's times, falling, in place of the grid.
            sigmas: noise levels, falling, in place of the grid: σ / α, or σ on a flow path.
            mu: log of a shift of the noise levels, for flow models with a shift by image size.

        Raises:
            ValueError: for both ``timesteps`` and ``sigmas``, and for values that the sampler does
                not take.
        """
        if timesteps is not None and sigmas is not None:
            raise ValueError("give timesteps or sigmas, not both")
        own = self.sampler
        made: Any = type(own)
        steps = own.steps if num_inference_steps is None else num_inference_steps
        on_grid = partial(made, own.schedule, own.method, steps, own.grid, **dict(own.options))
        if sigmas is None and timesteps is None and mu is not None:
            sigmas = on_grid().sigmas
        _, kept = split_options(own.grid, dict(own.options))
        if sigmas is not None:
            levels = _shifted([float(s) for s in sigmas], mu)
            sampler = made(own.schedule, own.method, sigmas=levels, **kept)
        elif timesteps is not None:
            sampler = made(own.schedule, own.method, timesteps=list(timesteps), **kept)
        else:
            sampler = on_grid()
        self.num_inference_steps = sampler.steps
        self._place(Plan(sampler), device)

    def _place(self, plan: Plan, device: Any) -> None:
        self._plan = plan
        self._level_tables: dict[torch.device, Tensor] = {}
        self.order = plan.order
        self.init_noise_sigma = plan.run.init_noise_scale
        self.timesteps = torch.tensor(plan.times, dtype=self._dtype_of_times())
        if device is not None:
            self.timesteps = self.timesteps.to(device)
        self._own_timesteps = self.timesteps
        self.sigmas = torch.tensor(self._shown_sigmas(), dtype=torch.float32)
        self._begin_index: int | None = None
        self._forget()

    def _dtype_of_times(self) -> torch.dtype:
        discrete = self.schedule.curve.is_discrete
        whole = discrete and all(t.is_integer() for t in self._plan.times)
        return torch.int64 if whole else torch.float32

    def _shown_sigmas(self) -> list[float]:
        return self._plan.sigmas

    def _forget(self) -> None:
        self._index: int | None = None
        self._calls: Sequence[Call] = self._plan.calls
        self._offset = 0
        self._basis: list[Tensor] = []
        self._memory: list[Tensor] = []
        self._given: Tensor | None = None
        self._exact: Tensor | None = None

    @property
    def begin_index(self) -> int | None:
        """The index of the first timestep, where a pipeline starts later (image to image)."""
        return self._begin_index

    @property
    def step_index(self) -> int | None:
        """The index of the next timestep; None before the first step."""
        return self._index

    def set_begin_index(self, begin_index: int = 0) -> None:
        """Set the index of the first timestep of the run.

        A run that starts inside a step of several evaluations starts at the step's first one.
        """
        self._forget()
        self._begin_index = begin_index

    def index_for_timestep(self, timestep: Any, schedule_timesteps: Any = None) -> int:
        """Return the index of the nearest of ``timesteps``, the first of equal ones.

        One of the scheduler's own ``timesteps`` is known by its memory, so its value is not read
        from the device.
        """
        own = self._index_in_memory(timestep)
        if own is not None:
            return own
        t = float(timestep)
        times, exact = self._plan.times, self._plan.index_of_time.get(t)
        if exact is not None:
            return exact
        return min(range(len(times)), key=lambda i: abs(times[i] - t))

    def _index_in_memory(self, timestep: Any) -> int | None:
        """Return the index of a view of the scheduler's own ``timesteps``, else None."""
        own = self._own_timesteps
        if (
            isinstance(timestep, Tensor)
            and own is self.timesteps
            and timestep.device == own.device
            and timestep.untyped_storage().data_ptr() == own.untyped_storage().data_ptr()
        ):
            return int(timestep.storage_offset() - own.storage_offset())
        return None

    # -- running ---------------------------------------------------------------------------------

    def scale_model_input(self, sample: Tensor, timestep: Any = None) -> Tensor:
        """Return the network's input: ``sample``, times c_in on EDM's path and α for x / α."""
        i = self._index
        if i is None or self._finds_each_call():
            i = self._first_index(timestep)
        scale = self._plan.calls[min(i, len(self._plan.calls) - 1)].scale
        return sample if scale == 1.0 else sample * scale

    def step(
        self,
        model_output: Tensor,
        timestep: Any,
        sample: Tensor,
        generator: Any = None,
        return_dict: bool = True,
        **unused: Any,
    ) -> Any:
        """Return the sample for the next network call, and the clean estimate.

        Args:
            model_output: the network's output at ``timestep``, after guidance.
            timestep: used to find the place of the first call, where no ``begin_index`` is set, and
                of every call of a method without memory.
            sample: the current sample. A pipeline may change it between steps (inpainting).
            generator: torch generator, or one for each image.
            return_dict: return an object instead of a tuple.
        """
        following, estimate = self._advance(model_output, timestep, sample, generator)
        if not return_dict:
            return (following, estimate)
        return TableSchedulerOutput(prev_sample=following, pred_original_sample=estimate)

    def _advance(
        self,
        model_output: Tensor,
        timestep: Any,
        sample: Tensor,
        generator: Any,
        estimated: bool = True,
    ) -> tuple[Tensor, Tensor | None]:
        """Return the sample of the next call and, if ``estimated``, the clean estimate."""
        if self._index is None or self._finds_each_call():
            self._start(timestep)
        assert self._index is not None
        self._last = call = self._calls[self._index - self._offset]
        given = sample if sample.dtype == torch.float64 else sample.float()
        out = model_output.to(given.dtype)
        if call.opens:
            exact = self._exact if sample is self._given and self._exact is not None else given
            self._basis = basis = [exact, *self._memory]
        else:
            basis = self._basis
        estimate = None
        if estimated or self._clip is not None:
            estimate = (given * call.p).add_(out, alpha=call.q)
        raw = out
        if self._clip is not None and estimate is not None:
            clipped = self._clip(estimate)
            if call.over_estimate:
                out = clipped
            elif call.q:
                out = out + (clipped - estimate) / call.q
            else:  # the sample is clean, and the output has no part in the estimate
                basis[0] = clipped / call.p
            estimate = clipped
        basis.append(out)
        for op in call.appended:
            drawn = isinstance(op, Draw)
            basis.append(self._draw(op, model_output, generator) if drawn else raw)
        exact = combine(call.row, basis)
        if call.memory is not None:
            self._memory = [combine(row, basis) for row in call.memory]
        self._index += 1
        self._exact, self._given = exact, exact.to(sample.dtype)
        return self._given, estimate.to(
            sample.dtype
        ) if estimated and estimate is not None else None

    def _draw(self, op: Draw, like: Tensor, generator: Any) -> Tensor:
        x = self._basis[0]
        return randn_tensor(x.shape, generator=generator, device=x.device, dtype=x.dtype)

    def _finds_each_call(self) -> bool:
        """Return whether the timestep of every call says which call it is."""
        return self._plan.memoryless and (self._stateless or self._begin_index is None)

    def _first_index(self, timestep: Any) -> int:
        if self._begin_index is not None and not self._finds_each_call():
            return self._begin_index
        return self.index_for_timestep(timestep)

    def _start(self, timestep: Any) -> None:
        self._index = self._first_index(timestep)
        if not self._plan.memoryless and self._index > 0:
            self._calls = self._plan.calls_from(self._index)
            self._offset = self._index if self._calls is not self._plan.calls else 0

    # -- training --------------------------------------------------------------------------------

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """Return α x_0 + σ ε at the network's times ``timesteps``, of training or of sampling.

        The face of a class that has x / α returns x_0 + (σ / α) ε.
        """
        alpha, sigma = self._levels(timesteps, original_samples)
        if self._in_sigma:
            alpha, sigma = torch.ones_like(alpha), sigma / alpha
        return torch.addcmul(alpha * original_samples, sigma, noise).to(original_samples.dtype)

    def scale_noise(self, sample: Tensor, timestep: Tensor, noise: Tensor) -> Tensor:
        """Return :meth:`add_noise` with the arguments of diffusers' flow schedulers."""
        return self.add_noise(sample, noise, timestep)

    def get_velocity(self, sample: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """Return v = α ε - σ x_0 at the network's times ``timesteps``."""
        alpha, sigma = self._levels(timesteps, sample)
        return torch.addcmul(alpha * noise, sigma, sample, value=-1).to(sample.dtype)

    def _levels(self, timesteps: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        """Return α and σ at the network's times; those of the knot where one is meant."""
        times = (timesteps if timesteps.ndim else timesteps[None]).to(like.device)
        alpha, sigma = schedule_levels(self.schedule, times, like)
        table = self._level_table(like.device, times.is_floating_point())
        if table is None:
            return alpha, sigma
        hits = times[:, None] == table[0]
        place, hit = hits.int().argmax(dim=1), hits.any(dim=1).view(alpha.shape)
        knots = table[1:, place].to(alpha.dtype).view(2, *alpha.shape)
        return torch.where(hit, knots[0], alpha), torch.where(hit, knots[1], sigma)

    def _level_table(self, device: torch.device, floating: bool) -> Tensor | None:
        """Return the times, α and σ of the knots that ``add_noise`` may mean, else None.

        A fraction is a time of sampling. A whole number may be a time of training, so it means a
        knot only where a run is at this knot: some grids give the network rounded times.
        """
        run = self._index if self._index is not None else self._begin_index
        plan: Plan | None = vars(self).get("_plan")
        if plan is None or not plan.off_schedule:
            return None
        in_run = self._begin_index is not None and run is not None and run < len(plan.times)
        if not (floating or in_run):
            return None
        if device not in self._level_tables:
            self._level_tables[device] = torch.tensor(plan.levels).to(device)
        table = self._level_tables[device]
        return table if floating or run is None else table[:, run : run + 1]


def require_steppable(table: Table) -> None:
    """Refuse what a pipeline cannot run: it calls the network on the sample as it is."""
    for step in table.steps:
        if not isinstance(step.ops[0], Evaluation) or step.ops[0].row[0][0] != 0:
            raise ValueError(
                f"{table.name} changes the sample before it calls the network (churn); "
                "a pipeline cannot do that: set s_churn=0"
            )
        if any(isinstance(op, Unconditional) for op in step.ops):
            raise ValueError(
                f"{table.name} needs the unconditional output (CFG++), which a pipeline does not "
                "pass to its scheduler; take the method without CFG++"
            )


def _shifted(sigmas: list[float], mu: float | None) -> list[float]:
    """Return the noise levels after a shift of e^μ."""
    if mu is None:
        return sigmas
    s = math.exp(mu)
    return [shift_noise_level(sigma, s) for sigma in sigmas]


def _config_of(sampler: Any) -> dict[str, Any]:
    """Return the config that pipelines read: of the nearest class, or of the schedule alone."""
    schedule = sampler.schedule
    try:
        config = dict(schedule.scheduler_config(sampler.nearest_config()))
    except ValueError:
        config = {
            "num_train_timesteps": schedule.num_train_timesteps,
            "prediction_type": schedule.prediction.name,
        }
    return {key: value for key, value in config.items() if key != "_class_name"}
