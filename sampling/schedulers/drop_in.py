"""The scheduler classes of diffusers over tables, generated from ``CLASSES``.

A drop-in is a subclass of the class whose name it has, so pipelines that ask for a class find it.
The constructor of the class checks its arguments and registers the config; everything that samples
or noises is that of :class:`TableScheduler`.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, cached_property, wraps
from typing import Any, ClassVar

import diffusers
import torch
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from ...noising import NoiseSchedule
from ...noising.io.diffusers_keys import KNOWN_TO_CLASS
from ...noising.utils.registry import shown
from ..clipping import Change, Clip, DynamicThreshold
from ..grids.given import at_sigmas, at_timesteps, given_points
from ..interop.diffusers_classes import CLASSES, FLAGS, Reading, SchedulerClass, read_config
from ..interop.diffusers_configs import compiled_reading
from ..interop.scheduler import TableScheduler, calls_of
from ..knots import Knot
from ..table import Table

LEFT_OUT: Mapping[str, str] = {
    "CogVideoXDPMScheduler": "its caller keeps the outputs of earlier steps; take the sampler "
    "'dpmpp_2m_sde' (as_scheduler) with a pipeline that calls step() as others do",
    "EDMEulerScheduler": "its config does not say its noise schedule; take "
    "Sampler(NoiseSchedule.karras(), 'euler').as_scheduler()",
    "EDMDPMSolverMultistepScheduler": "its config does not say its noise schedule; take "
    "Sampler(NoiseSchedule.karras(), 'dpmpp_2m').as_scheduler()",
    "CMStochasticIterativeScheduler": "its config does not say its noise schedule; take "
    "Sampler(NoiseSchedule.karras(), 'consistency').as_scheduler()",
}
"""The classes of ``CLASSES`` without a drop-in, and why."""

NAMES = tuple(name for name in CLASSES if name not in LEFT_OUT)
"""The names of the drop-ins."""

_CLIPPING = {
    *("clip_sample", "clip_sample_range", "thresholding"),
    *("dynamic_thresholding_ratio", "sample_max_value"),
}


@dataclass(frozen=True)
class ReadRun:
    """The table of a class on its knots, with the arguments of its step that are options."""

    reading: Reading
    schedule: NoiseSchedule
    knots: tuple[Knot, ...]
    given: tuple[tuple[str, Any], ...] = ()

    @cached_property
    def table(self) -> Table:
        """The table of the whole run."""
        return self.table_from(0)

    def table_from(self, step: int, /) -> Table:
        """Return the table from a later step on, with nothing remembered."""
        return compiled_reading(self.reading, self.schedule, self.knots, dict(self.given), step)

    @property
    def steps(self) -> int:
        """The number of steps."""
        return len(self.knots) - 1

    @property
    def sigmas(self) -> list[float]:
        """The noise level at every knot: σ / α, or σ on a flow path."""
        alpha, sigma = (
            torch.tensor([getattr(k, n) for k in self.knots], dtype=torch.float64)
            for n in ("alpha", "sigma")
        )
        return self.schedule.curve.grid_coordinate(alpha, sigma).tolist()

    @property
    def init_noise_scale(self) -> float:
        """The factor of the first noise, in the units of the class."""
        first = self.knots[0]
        scale = self.reading.start_scale(first)
        return scale / first.alpha if self.reading.kind.in_sigma else scale


class DropIn(TableScheduler):
    """What the drop-ins share: the table of a config, and the signatures of diffusers."""

    _kind: ClassVar[SchedulerClass]
    _peer: ClassVar[Any]
    _result: ClassVar[type[Any]]
    _second: ClassVar[str | None]

    def __len__(self) -> int:
        return int(self.config["num_train_timesteps"])

    # -- config ----------------------------------------------------------------------------------

    def register_to_config(self, **values: Any) -> None:
        """Register values in the config; what is sampled or noised from now on follows them."""
        super().register_to_config(**values)
        if "_reading" in vars(self):
            self._read()

    def _read(self) -> None:
        """Derive the schedule and the sampler from the config, and check both."""
        name = type(self).__name__
        config = {**self.config, "_class_name": name}
        _require_honoured(name, config, self._peer)
        reading = read_config(config)
        schedule = NoiseSchedule.from_diffusers(_without_dynamic_shift(config))
        words = reading.fails(schedule, 20)
        if words is not None:
            raise ValueError(f"{name}: {words}")
        self._reading, self.schedule, self._clip = reading, schedule, _clip_of(config)
        self.num_inference_steps: int | None = None
        self._begin_index: int | None = None
        self._index: int | None = None
        self._off_schedule = False
        self._variants: dict[tuple[tuple[str, Any], ...], ReadRun] = {}
        vars(self).pop("_whole", None)

    # -- timesteps -------------------------------------------------------------------------------

    def _set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: Any = None,
        timesteps: Any = None,
        sigmas: Any = None,
        mu: float | None = None,
        **others: Any,
    ) -> None:
        if timesteps is not None and sigmas is not None:
            raise ValueError("give timesteps or sigmas, not both")
        custom = timesteps if timesteps is not None else sigmas
        if (num_inference_steps is None) == (custom is None):
            raise ValueError("give num_inference_steps, or timesteps or sigmas of your own")
        final = self._reading.options.get("final", "zero")
        if timesteps is not None:
            points = given_points("timesteps", timesteps)
            knots = at_timesteps(self.schedule, len(points), timesteps=points, final=final)
        elif sigmas is not None:
            points = given_points("sigmas", sigmas)
            knots = at_sigmas(self.schedule, len(points), sigmas=points, final=final)
        else:
            assert num_inference_steps is not None
            knots = self._reading.lay(self.schedule, num_inference_steps)
        self._place(ReadRun(self._reading, self.schedule, knots), device)
        self.num_inference_steps = len(knots) - 1

    def _place(self, run: Any, device: Any) -> None:
        super()._place(run, device)
        self.order = getattr(self._peer, "order", 1)
        self._variants = {run.given: run}

    def _dtype_of_times(self) -> torch.dtype:
        floating = self._kind.in_sigma or not self.schedule.curve.is_discrete
        return torch.float32 if floating else torch.int64

    def _place_training_grid(self) -> None:
        """Place a run through every training timestep, for a step without ``set_timesteps``."""
        times = range(self.schedule.num_train_timesteps - 1, -1, -1)
        knots = at_timesteps(self.schedule, len(times), timesteps=tuple(times))
        self._place(ReadRun(self._reading, self.schedule, knots), self.timesteps.device)

    # -- running ---------------------------------------------------------------------------------

    def scale_model_input(self, sample: Tensor, timestep: Any = None) -> Tensor:
        """Return the network's input: ``sample``, or α times it where the sample is x / α."""
        if not self._in_sigma:
            return sample
        if "_whole" not in vars(self):
            self._place_training_grid()
        return super().scale_model_input(sample, timestep)

    def _step(
        self,
        model_output: Tensor,
        timestep: Any,
        sample: Tensor,
        generator: Any = None,
        variance_noise: Tensor | None = None,
        return_dict: bool = True,
        **options: Any,
    ) -> Any:
        if "_whole" not in vars(self):
            self._place_training_grid()
        if options:
            self._choose(options)
        self._noise_given = variance_noise
        following, estimate = self._advance(model_output, timestep, sample, generator)
        values = (following,) if self._second is None else (following, estimate)
        return self._result(*values) if return_dict else values

    def _choose(self, options: Mapping[str, Any]) -> None:
        """Switch to the table of these arguments of step."""
        run: ReadRun = self._placed
        given = {}
        for name, value in options.items():
            default = self._defaults_of_step[name]
            if name in run.reading.options:
                given[name] = value
            elif value is not None and value != default:
                raise ValueError(
                    f"{type(self).__name__}.step: {name}={shown(value)} is not possible here; "
                    f"leave it at {default!r}"
                )
        wanted = tuple(sorted((k, v) for k, v in given.items() if v != run.reading.options[k]))
        if wanted == run.given:
            return
        if self._index is not None and not self._is_memoryless:
            raise ValueError(
                f"{type(self).__name__}.step: {shown(given)} is not what the run started with; "
                "call set_timesteps first"
            )
        if wanted not in self._variants:
            self._variants[wanted] = ReadRun(run.reading, run.schedule, run.knots, wanted)
        self._placed = self._variants[wanted]
        self._whole = self._calls = calls_of(self._placed.table, self._in_sigma)

    def _draw(self, like: Tensor, generator: Any) -> Tensor:
        if self._noise_given is not None:
            return self._noise_given.to(self._basis[0].dtype)
        noise = randn_tensor(like.shape, generator=generator, device=like.device, dtype=like.dtype)
        return noise.to(self._basis[0].dtype)

    _noise_given: Tensor | None = None
    _defaults_of_step: ClassVar[Mapping[str, Any]]


def _require_honoured(name: str, config: Mapping[str, Any], peer: Any) -> None:
    """Refuse values of the config that the class reads and its drop-in does not."""
    kind = CLASSES[name]
    honoured = {
        *KNOWN_TO_CLASS.get(name, ()),
        *kind.keys,
        *(FLAGS[grid] for grid in kind.lays if grid in FLAGS),
        *_CLIPPING,
        *("timestep_spacing", "steps_offset"),
        *([kind.switch[0]] if kind.switch else []),
        *_ALSO.get(name, ()),
    }
    for key, parameter in inspect.signature(peer.__init__).parameters.items():
        value = config.get(key, parameter.default)
        if key not in honoured and key != "self" and not _same(value, parameter.default):
            raise ValueError(
                f"{name}: {key}={shown(value)} is not supported here; leave it at "
                f"{parameter.default!r}, or take the class of diffusers"
            )


_ALSO: Mapping[str, tuple[str, ...]] = {}
"""Further keys of a class that its drop-in honours."""


def _same(value: Any, default: Any) -> bool:
    return value is default or value == default


def _without_dynamic_shift(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return a config without the shift that ``set_timesteps(mu=...)`` gives."""
    if not config.get("use_dynamic_shifting"):
        return dict(config)
    return {**config, "use_dynamic_shifting": False, "shift": 1.0, "flow_shift": 1.0}


def _clip_of(config: Mapping[str, Any]) -> Change | None:
    if config.get("thresholding"):
        return DynamicThreshold(config["dynamic_thresholding_ratio"], config["sample_max_value"])
    if config.get("clip_sample"):
        return Clip(config.get("clip_sample_range", 1.0))
    return None


# -- classes ---------------------------------------------------------------------------------------


@cache
def drop_in(name: str) -> type[Any]:
    """Return the drop-in of a scheduler class of diffusers.

    >>> drop_in("DDPMScheduler")().config.beta_schedule
    'linear'
    """
    peer: Any = getattr(diffusers, name)
    result = _result_class(peer)
    fields = [key for key in inspect.signature(result).parameters if key != "prev_sample"]
    of_step = inspect.signature(peer.step).parameters
    namespace = {
        "__module__": __package__,
        "__doc__": f"``diffusers.{name}`` over tables of alphabar; same arguments, same config.",
        "__init__": _constructor(peer),
        "set_timesteps": _with_signature(peer.set_timesteps, _setter(peer)),
        "step": _with_signature(peer.step, _stepper(list(of_step)[4:])),
        "_compatibles": peer._compatibles,
        "_kind": CLASSES[name],
        "_peer": peer,
        "_result": result,
        "_second": fields[0] if fields else None,
        "_in_sigma": CLASSES[name].in_sigma,
        "_defaults_of_step": {key: p.default for key, p in of_step.items()},
        "order": getattr(peer, "order", 1),
        "init_noise_sigma": 1.0,
        "begin_index": TableScheduler.begin_index,
        "step_index": TableScheduler.step_index,
    }
    return type(name, (DropIn, peer), namespace)


def _constructor(peer: Any) -> Callable[..., None]:
    @wraps(peer.__init__)
    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        peer.__init__(self, *args, **kwargs)
        # a pipeline that is saved names the class of diffusers, which loads everywhere
        self.__module__ = peer.__module__
        of_peer = getattr(peer, "init_noise_sigma", None)
        if isinstance(of_peer, property):
            self.init_noise_sigma = float(of_peer.__get__(self))
        self._read()

    return __init__


def _setter(peer: Any) -> Callable[..., None]:
    names = list(inspect.signature(peer.set_timesteps).parameters)[1:]

    def set_timesteps(self: Any, *args: Any, **kwargs: Any) -> None:
        if "_reading" not in vars(self):  # the constructor of the class
            peer.set_timesteps(self, *args, **kwargs)
            return
        self._set_timesteps(**dict(zip(names, args, strict=False)), **kwargs)

    return set_timesteps


def _stepper(names: Sequence[str]) -> Callable[..., Any]:
    def step(
        self: Any, model_output: Tensor, timestep: Any, sample: Tensor, *args: Any, **kwargs: Any
    ) -> Any:
        if args:
            kwargs |= dict(zip(names, args, strict=False))
        return self._step(model_output, timestep, sample, **kwargs)

    return step


def _with_signature(theirs: Callable[..., Any], ours: Callable[..., Any]) -> Callable[..., Any]:
    return wraps(theirs)(ours)


def _result_class(peer: Any) -> type[Any]:
    """Return the class of the result of a scheduler's step."""
    words = str(inspect.signature(peer.step).return_annotation)
    module = inspect.getmodule(peer)
    return next(
        kind
        for name, kind in vars(module).items()
        if name.endswith("SchedulerOutput") and f"{name}" in words
    )
