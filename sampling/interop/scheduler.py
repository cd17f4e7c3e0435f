"""A sampler as a scheduler object of diffusers: pipelines run any table, one network call a step.

A pipeline calls the network itself and gives the output to ``step``, which performs the operations
of the table up to its next evaluation. The latents are those of the variance preserving path, x_t =
α x_0 + σ ε, whatever the method, so ``scale_model_input`` is 1 but for EDM's c_in.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from typing import Any, ClassVar

import torch
from diffusers.configuration_utils import ConfigMixin
from diffusers.schedulers.scheduling_utils import SchedulerMixin, SchedulerOutput
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from ...noising import NoiseSchedule
from ...noising.curves.shifts import shift_noise_level
from ..grids import split_options
from ..grids.given import time_at_timestep
from ..kernel import combine
from ..knots import Knot
from ..table import Table
from ..tracing import Draw, Evaluation, Step, Unconditional


@dataclass
class TableSchedulerOutput(SchedulerOutput):
    """The next sample, and the clean estimate of the step where it is known."""

    prev_sample: Tensor
    pred_original_sample: Tensor | None = None


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

    def __init__(self, sampler: Any) -> None:
        self.sampler = sampler
        self.schedule: NoiseSchedule = sampler.schedule
        self.num_inference_steps: int | None = None
        self.register_to_config(**_config_of(sampler))
        self._place(sampler, "cpu")

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
        self._place(sampler, device)

    def _place(self, sampler: Any, device: Any) -> None:
        self._placed = sampler
        table: Table = sampler.table
        _require_steppable(table)
        knots = [_evaluated(step) for step in table.steps]
        self._first_of_step = list(accumulate(map(len, knots), initial=0))[:-1]
        self.order = _order(self._first_of_step)
        times = [knot.timestep for of_step in knots for knot in of_step]
        whole = self.schedule.curve.is_discrete and all(t.is_integer() for t in times)
        self.timesteps = torch.tensor(times, dtype=torch.int64 if whole else torch.float32)
        if device is not None:
            self.timesteps = self.timesteps.to(device)
        self.sigmas = torch.tensor(sampler.sigmas, dtype=torch.float32)
        self._scales = [knot.input_scale for of_step in knots for knot in of_step]
        self._times = times
        self._begin_index: int | None = None
        self._forget()

    def _forget(self) -> None:
        self._index: int | None = None
        self._table: Table = self._placed.table
        self._state: list[Tensor] = []
        self._basis: list[Tensor] = []
        self._at = 0, 0
        self._given: Tensor | None = None

    @property
    def init_noise_sigma(self) -> float:
        """The factor of the initial standard normal noise."""
        return self._placed.init_noise_scale

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

    def index_for_timestep(self, timestep: Any) -> int:
        """Return the index of the nearest of ``timesteps``, the first of equal ones."""
        t = float(timestep)
        return min(range(len(self._times)), key=lambda i: abs(self._times[i] - t))

    # -- running ---------------------------------------------------------------------------------

    def scale_model_input(self, sample: Tensor, timestep: Any = None) -> Tensor:
        """Return the network's input: ``sample``, times c_in on EDM's path."""
        i = self._index
        if i is None:
            i = self._begin_index if self._begin_index is not None else 0
        scale = self._scales[min(i, len(self._scales) - 1)]
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
        """Return the sample for the next network call.

        Args:
            model_output: the network's output at ``timestep``, after guidance.
            timestep: used to find the place of the first call, where no ``begin_index`` is set.
            sample: the current sample. A pipeline may change it between steps (inpainting).
            generator: torch generator, or one for each image.
            return_dict: return an object instead of a tuple.
        """
        if self._index is None:
            self._start(timestep)
        assert self._index is not None
        i, j = self._at
        step = self._table.steps[i]
        dtype = torch.promote_types(sample.dtype, torch.float32)
        if j == 0:
            x = self._state[0] if self._state and sample is self._given else sample.to(dtype)
            self._basis = [x, *self._state[1:]]
        self._basis.append(model_output.to(dtype))
        estimate = None
        j = self._perform(step, j + 1, generator)
        if j == len(step.ops):
            estimate = combine(step.denoised, self._basis)
            self._state = [combine(row, self._basis) for row in step.carry]
            i, j = i + 1, 0
            following = self._state[0]
        else:
            op = step.ops[j]
            assert isinstance(op, Evaluation)
            following = combine(op.row, self._basis) / op.knot.input_scale
        self._at = i, j
        self._index += 1
        self._given = following.to(sample.dtype)
        if not return_dict:
            return (self._given,)
        return TableSchedulerOutput(
            prev_sample=self._given,
            pred_original_sample=None if estimate is None else estimate.to(sample.dtype),
        )

    def _start(self, timestep: Any) -> None:
        first = self._begin_index
        first = self.index_for_timestep(timestep) if first is None else first
        place = sum(start <= first for start in self._first_of_step) - 1
        if place > 0:
            # later steps of a multistep method need outputs that were never computed
            self._table = self._placed.table_from(place)
            left = len(self._times) - self._first_of_step[place]
            if self._table.evaluations != left:
                raise ValueError(
                    f"{self._table.name} starts with steps of more network calls and cannot start "
                    f"at timestep {self._times[first]:g}; take a method without them, e.g. 'ipndm'"
                )
        self._index = first
        self._at = 0, 0

    def _perform(self, step: Step, j: int, generator: Any) -> int:
        """Perform operations up to the next evaluation; return its place, or that of the end."""
        output = self._basis[-1]
        while j < len(step.ops) and not isinstance(step.ops[j], Evaluation):
            if isinstance(step.ops[j], Draw):
                x = self._basis[0]
                noise = randn_tensor(x.shape, generator=generator, device=x.device, dtype=x.dtype)
                self._basis.append(noise)
            else:
                self._basis.append(output)
            j += 1
        return j

    # -- training --------------------------------------------------------------------------------

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """Return α x_0 + σ ε at the network's times ``timesteps``, of training or of sampling."""
        return self.schedule.add_noise(original_samples, noise, self._curve_times(timesteps))

    def scale_noise(self, sample: Tensor, timestep: Tensor, noise: Tensor) -> Tensor:
        """Return :meth:`add_noise` with the arguments of diffusers' flow schedulers."""
        return self.add_noise(sample, noise, timestep)

    def get_velocity(self, sample: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """Return v = α ε - σ x_0 at the network's times ``timesteps``."""
        return (
            self.schedule.with_prediction("v_prediction")
            .target(sample, noise, self._curve_times(timesteps))
            .to(sample.dtype)
        )

    def _curve_times(self, timesteps: Tensor) -> Tensor:
        timesteps = torch.atleast_1d(timesteps)
        curve = self.schedule.curve
        if curve.is_discrete:
            return timesteps
        return time_at_timestep(curve, timesteps.double())


def _evaluated(step: Step) -> list[Knot]:
    return [op.knot for op in step.ops if isinstance(op, Evaluation)]


def _order(first_of_step: Sequence[int]) -> int:
    """Return the network calls of a step, by which pipelines count steps; 1 where steps differ."""
    order = first_of_step[1] if len(first_of_step) > 1 else 1
    same = all(first == order * i for i, first in enumerate(first_of_step))
    return order if same else 1


def _require_steppable(table: Table) -> None:
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
        config = dict(schedule.to_diffusers(sampler.nearest_config()))
    except ValueError:
        config = {
            "num_train_timesteps": schedule.num_train_timesteps,
            "prediction_type": schedule.prediction.name,
        }
    return {key: value for key, value in config.items() if key != "_class_name"}
