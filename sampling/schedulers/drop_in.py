"""The scheduler classes of diffusers over tables, generated from ``CLASSES``.

A drop-in is a subclass of the class whose name it has, so pipelines that ask for a class find it.
The constructor of the class checks its arguments and registers the config; everything that samples
or noises is that of :class:`TableScheduler`.
"""

from __future__ import annotations

import inspect
import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cache, wraps
from typing import Any, ClassVar

import diffusers
import torch
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from ...noising import Discrete, Karras, NoiseSchedule
from ...noising.io.diffusers_keys import KNOWN_TO_CLASS
from ...noising.utils.registry import shown, unknown
from ..clipping import Change, Clip, DynamicThreshold
from ..interop.diffusers_classes import CLASSES, FLAGS, Reading, SchedulerClass, read_config
from ..interop.scheduler import Call, Plan, TableScheduler
from ..kernel import combine
from ..tracing import Draw
from .placing import ReadRun, Wanted, place, training_run

DRAWS_IN_EVERY_STEP = {
    *("EulerAncestralDiscreteScheduler", "SASolverScheduler", "FlowMatchLCMScheduler")
}
"""The classes that take noise from the generator where they do not use it, in the last step too."""

NEVER_CLIPS = {"TCDScheduler", "CogVideoXDDIMScheduler"}
"""The classes that do not read their keys for clipping."""

UNUSED: Mapping[str, tuple[str, ...]] = {
    "LCMScheduler": ("set_alpha_to_one",),
    "TCDScheduler": ("set_alpha_to_one",),
    "DPMSolverSDEScheduler": ("noise_sampler_seed",),
    "FlowMatchEulerDiscreteScheduler": ("shift_terminal",),
    "FlowMatchLCMScheduler": ("shift_terminal",),
}
"""Keys that a drop-in takes beside those in ``CLASSES``: read elsewhere, or read by nothing."""

KEPT_PLANS = 16
"""The number of tables that a scheduler keeps, so that the next image does not compile its own."""

_CLIPPING = {
    *("clip_sample", "clip_sample_range", "thresholding"),
    *("dynamic_thresholding_ratio", "sample_max_value"),
}


class DropIn(TableScheduler):
    """What the drop-ins share: the table of a config, and the results of diffusers' steps."""

    _kind: ClassVar[SchedulerClass]
    _peer: ClassVar[Any]
    _result: ClassVar[type[Any]]
    _second: ClassVar[str | None]
    _defaults_of_step: ClassVar[Mapping[str, Any]]
    _noise_given: Tensor | None = None
    _path: Any = None
    _predicted: Tensor | None = None

    def __len__(self) -> int:
        return int(self.config["num_train_timesteps"])

    # -- config ----------------------------------------------------------------------------------

    @classmethod
    def from_config(cls, config: Any = None, *args: Any, **kwargs: Any) -> Any:
        """Return a scheduler of a config, as the class of diffusers does.

        Raises:
            ValueError: for a config that is no mapping.
        """
        if not isinstance(config, dict):
            raise ValueError(
                f"the config of {cls.__name__} must be a mapping of its arguments, the object in "
                f"scheduler_config.json, got {shown(config)}"
            )
        return super().from_config(config, *args, **kwargs)

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
        self._splits = str(config.get("variance_type")).startswith("learned")
        if self._splits and "variance_type" in reading.options:
            reading = replace(reading, options={**reading.options, "variance_type": "fixed_small"})
        schedule, self._ill_posed = _schedule_of(config)
        for words in _refusals(name, config, reading, schedule):
            raise ValueError(f"{name}: {words}")
        before = vars(self).get("_curve_read")
        self._reading, self.schedule, self._clip = reading, schedule, _clip_of(name, config)
        self._curve_read = curve = schedule.curve
        if before is not None and curve != before and isinstance(curve, Discrete):
            # the tables of the class, which scripts read; those that a script has set go
            exact = schedule.alphas_cumprod
            self.betas = (1 - exact / _shifted_by_one(exact)).to(self.alphas_cumprod)
            self.alphas_cumprod = exact.to(self.alphas_cumprod)
            self.alphas = 1 - self.betas
        self._may_draw_unused = (
            name in DRAWS_IN_EVERY_STEP
            or reading.method == "ddpm"
            or str(config.get("algorithm_type", "")).startswith("sde")
            or bool(config.get("stochastic_sampling"))
        )
        self.num_inference_steps: int | None = None
        self._begin_index: int | None = None
        self._index: int | None = None
        self._plans: dict[tuple[Wanted, float], Plan] = {}
        self._seen: tuple[Any, int] | None = None
        self._as_read = self._internal_dict
        vars(self).pop("_plan", None)

    def _follow_changes(self) -> None:
        """Read the config again where a pipeline has replaced it, and take the noise levels from
        ``alphas_cumprod`` where a script has replaced its values.
        """
        if self._internal_dict is not self._as_read:
            self._read()
        table = vars(self).get("alphas_cumprod")
        version = getattr(table, "_version", 0)
        if not isinstance(self.schedule.curve, Discrete):
            return
        if self._seen is not None and self._seen[0] is table and self._seen[1] == version:
            return
        self._seen = table, version
        given = torch.as_tensor(table).detach().double().cpu()
        if torch.allclose(given, self.schedule.alphas_cumprod, rtol=1e-4, atol=1e-7):
            return
        betas = 1 - given / _shifted_by_one(given)
        curve = Discrete(trained_betas=tuple(betas.tolist()), num_train_timesteps=len(betas))
        self.schedule = NoiseSchedule(curve, self.schedule.prediction)
        self._plans.clear()
        vars(self).pop("_plan", None)

    # -- timesteps -------------------------------------------------------------------------------

    def _set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: Any = None,
        num_train_timesteps: int | None = None,
        **others: Any,
    ) -> None:
        self._follow_changes()
        self._require_well_posed()
        own = self.config["num_train_timesteps"]
        if num_train_timesteps not in (None, own):
            raise ValueError(
                f"{type(self).__name__}: num_train_timesteps={num_train_timesteps} of "
                f"set_timesteps is not that of the config, {own}; leave it out"
            )
        if getattr(self, "_scale_factors", None):
            raise ValueError(
                f"{type(self).__name__}: scale factors are not possible here; take the class of "
                "diffusers"
            )
        shift = getattr(self, "_shift", self.config.get("shift", 1.0))
        given = {key: _numbers(key, value) for key, value in others.items()}
        wanted = Wanted(steps=num_inference_steps, **given)
        plan = self._plans.get((wanted, shift))
        if plan is None:
            # the lowest level is that of the constructor's shift, also after set_shift
            config = {**self.config, "shift": shift, "own_shift": self.config.get("shift", 1.0)}
            run = place(self._reading, self.schedule, config, wanted)
            for words in self._slips(run, wanted):
                warnings.warn(f"{type(self).__name__} of diffusers: {words}", stacklevel=3)
            if len(self._plans) == KEPT_PLANS:
                self._plans.clear()
            plan = self._plans[wanted, shift] = self._plan_of(run)
        self._place(plan, device)
        self.num_inference_steps = plan.run.steps

    def _plan_of(self, run: ReadRun) -> Plan:
        return Plan(run, self._in_sigma, self._clip is not None)

    def _require_well_posed(self) -> None:
        if self._ill_posed is not None:
            raise ValueError(self._ill_posed)

    def _slips(self, run: ReadRun, wanted: Wanted) -> Iterator[str]:
        """Yield what diffusers does with these steps and the drop-in does not."""
        if wanted.steps is None or self.schedule.curve.is_flow:
            return
        for words in self._reading.slips(self.schedule, run.steps):
            harmless = ("its x / alpha", "it ends with the noise", "its times are cut")
            if not (run.stride and "T // N" in words) and not words.startswith(harmless):
                yield words

    def _place(self, plan: Plan, device: Any) -> None:
        super()._place(plan, device)
        self.order = getattr(self._peer, "order", 1)
        self._path = None

    def _dtype_of_times(self) -> torch.dtype:
        floating = self._kind.in_sigma or self._kind.predictions == ("flow_prediction",)
        return torch.float32 if floating else torch.int64

    def _shown_sigmas(self) -> list[float]:
        if not self._kind.method.startswith(("dpm_2", "dpmpp_sde")):
            return super()._shown_sigmas()
        # those of the steps, although the network is also called between them
        sigmas = self._plan.run.sigmas
        ends = 3 if self._kind.method.startswith("dpm_2") else 1
        return [sigmas[0], *(s for s in sigmas[1:-1] for _ in "12"), *sigmas[-1:] * ends]

    def index_for_timestep(self, timestep: Any, schedule_timesteps: Any = None) -> int:
        """Return the index of one of ``timesteps``, the first of equal ones.

        Raises:
            ValueError: for another timestep.
        """
        index = super().index_for_timestep(timestep)
        if self._index_in_memory(timestep) is None:
            t = float(timestep)
            times = self._plan.times
            if abs(t - times[index]) > 0.5:
                raise ValueError(
                    f"timestep {t:g} is none of this scheduler's {len(times)} timesteps, the "
                    f"nearest is {times[index]:g}; set_timesteps says which there are"
                )
        return index

    def _levels(self, timesteps: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        self._follow_changes()
        return super()._levels(timesteps, like)

    def _require_placed(self) -> None:
        """Run through every training timestep where ``set_timesteps`` was not called."""
        if "_plan" not in vars(self):
            self._require_well_posed()
            shown_before = {k: v for k, v in vars(self).items() if k in ("timesteps", "sigmas")}
            plan = self._plan_of(training_run(self._reading, self.schedule))
            self._place(plan, self.timesteps.device)
            vars(self).update(shown_before)

    # -- running ---------------------------------------------------------------------------------

    def scale_model_input(self, sample: Tensor, timestep: Any = None) -> Tensor:
        """Return the network's input: ``sample``, or α times it where the sample is x / α."""
        if not self._in_sigma:
            return sample
        self._require_placed()
        return super().scale_model_input(sample, timestep)

    def _step(
        self,
        model_output: Tensor,
        timestep: Any,
        sample: Tensor,
        generator: Any = None,
        return_dict: bool = True,
        **options: Any,
    ) -> Any:
        self._require_placed()
        if "prev_timestep" in self._defaults_of_step:
            self._go_to(options.pop("prev_timestep", None), timestep)
        self._noise_given = None
        if options:
            self._choose(options)
        self._predicted = None
        if self._splits and model_output.shape[1] == 2 * sample.shape[1]:
            model_output, self._predicted = model_output.split(sample.shape[1], dim=1)
        following, second = self._advance(
            model_output, timestep, sample, generator, self._second is not None
        )
        if self._may_draw_unused or (self._kind.method == "ddim" and options.get("eta")):
            self._draw_unused(model_output, generator)
        if second is None:
            return self._result(following) if return_dict else (following,)
        if self._kind.method in ("lcm", "tcd"):
            second = _before_noise(self._last, self._basis).to(sample.dtype)
        return self._result(following, second) if return_dict else (following, second)

    def _draw_unused(self, like: Tensor, generator: Any) -> None:
        """Take noise from the generator where the class takes it and does not use it."""
        call = self._last
        if not any(isinstance(op, Draw) for op in call.appended) and (
            self._kind.method != "ddpm" or call.knot.timestep > 0
        ):
            self._draw(None, like, generator)

    def _choose(self, options: dict[str, Any]) -> None:
        """Switch to the table of these arguments of step."""
        self._noise_given = options.pop("variance_noise", None)
        given = {}
        for name, value in options.items():
            if name not in self._defaults_of_step:
                raise TypeError(unknown("argument of step", name, self._defaults_of_step))
            default = self._defaults_of_step[name]
            if name in self._reading.options:
                given[name] = value
            elif value is not None and value != default:
                raise ValueError(
                    f"{type(self).__name__}.step: {name}={shown(value)} is not possible here; "
                    f"leave it at {default!r}"
                )
        own = self._reading.options
        wanted = tuple(sorted((k, v) for k, v in given.items() if v != own[k]))
        run = self._plan.run
        if wanted == run.given:
            return
        if self._index is not None and not self._plan.memoryless:
            raise ValueError(
                f"{type(self).__name__}.step: {shown(given)} is not what the run started with; "
                "call set_timesteps first"
            )
        self._plan = self._variant("given", wanted)
        self._calls = self._plan.calls

    def _variant(self, field: str, value: Any) -> Plan:
        """Return the plan with another value of a field of its run."""
        known = self._plan.variants
        if (field, value) not in known:
            plan = self._plan_of(replace(self._plan.run, **{field: value}))
            plan.variants = known
            known[field, value] = plan
        return known[field, value]

    def _go_to(self, end: Any, timestep: Any) -> None:
        """Choose the end of a step: the next timestep, or, where none is given, one below."""
        index = self.index_for_timestep(timestep)
        if end is None and index < len(self._plan.calls) - 1:
            self._calls = self._variant("stride", 1).calls
            return
        if end is not None and self.index_for_timestep(end) != index + 1:
            raise ValueError(
                f"{type(self).__name__}.step: prev_timestep must be the next of timesteps, or None"
            )
        self._calls = self._plan.calls

    def _draw(self, op: Draw | None, like: Tensor, generator: Any) -> Tensor:
        dtype = self._basis[0].dtype
        if self._noise_given is not None:
            return self._noise_given.to(dtype)
        if self._kind.method == "dpmpp_sde" and op is not None:
            return self._brownian(op, like).to(dtype)
        noise = randn_tensor(like.shape, generator=generator, device=like.device, dtype=like.dtype)
        if self._predicted is not None and self._kind.method == "ddpm" and op is not None:
            return noise.to(dtype) * self._learned_ratio(self._predicted.to(dtype))
        return noise.to(dtype)

    def _learned_ratio(self, predicted: Tensor) -> Tensor:
        """Return the learned standard deviation of the step over that of its table (fixed_small).

        Source: Nichol and Dhariwal 2102.09672, eq. 15.
        """
        call = self._last
        std = dict(call.row)[len(self._basis)]
        if self.config["variance_type"] == "learned":
            return predicted.sqrt() / std
        if self._calls is not self._plan.calls:
            raise ValueError("a learned variance needs the next timestep: give prev_timestep")
        end = self._plan.calls[self._calls.index(call) + 1].knot
        high = math.log(1 - (call.knot.alpha / end.alpha) ** 2)
        low = 2 * math.log(std)
        return ((predicted + 1) * ((high - low) / 4)).exp()

    def _brownian(self, op: Draw, like: Tensor) -> Tensor:
        """Return the increment of the Brownian path that the class makes for a run."""
        if self._path is None:
            make = inspect.getmodule(self._peer).BrownianTreeNoiseSampler  # pyright: ignore[reportOptionalMemberAccess]
            sigmas = [knot.sigma_ve for knot in self._plan.run.knots if knot.sigma > 0]
            seed = self.config["noise_sampler_seed"]
            self._path = make(like, min(sigmas), max(sigmas), seed)
        return self._path(torch.tensor(op.start), torch.tensor(op.end))


def _numbers(name: str, value: Any) -> Any:
    """Return a list, an array or a tensor as a tuple of floats, other values as they are."""
    if name not in ("timesteps", "sigmas") or value is None:
        return value
    return tuple(float(v) for v in value)


def _before_noise(call: Call, basis: Sequence[Tensor]) -> Tensor:
    """Return the estimate that a consistency step adds noise to."""
    first = len(basis) - len(call.appended)
    draws = [first + i for i, op in enumerate(call.appended) if isinstance(op, Draw)]
    c = sum(value for k, value in call.row if k in draws)
    kept = tuple((k, v / math.sqrt(1 - c * c)) for k, v in call.row if k not in draws)
    return combine(kept, basis)


def _shifted_by_one(alphas_cumprod: Tensor) -> Tensor:
    return torch.cat([torch.ones_like(alphas_cumprod[:1]), alphas_cumprod[:-1]])


# -- what is honoured ------------------------------------------------------------------------------


def _require_honoured(name: str, config: Mapping[str, Any], peer: Any) -> None:
    """Refuse values of the config that the class reads and its drop-in does not."""
    kind = CLASSES[name]
    honoured = {
        *KNOWN_TO_CLASS.get(name, ()),
        *kind.keys,
        *(FLAGS[grid] for grid in kind.lays if grid in FLAGS),
        *_CLIPPING,
        *("self", "timestep_spacing", "steps_offset", "variance_type"),
        *([kind.switch[0]] if kind.switch else []),
        *UNUSED.get(name, ()),
    }
    for key, parameter in inspect.signature(peer.__init__).parameters.items():
        value = config.get(key, parameter.default)
        if key not in honoured and value != parameter.default:
            raise ValueError(
                f"{name}: {key}={shown(value)} is not supported here; leave it at "
                f"{parameter.default!r}, or take the class of diffusers"
            )


def _refusals(
    name: str, config: Mapping[str, Any], reading: Reading, schedule: NoiseSchedule
) -> Iterator[str]:
    """Yield, in words, what a config says that no table of the class is."""
    if isinstance(schedule.curve, Karras):
        yield (
            "this config (of Stable Video Diffusion) is a schedule of EDM: take "
            "Sampler.from_diffusers(config).as_scheduler()"
        )
        return
    words = reading.fails(schedule, 20)
    if words is not None:
        yield words
    flags = [flag for flag in FLAGS.values() if config.get(flag)]
    if flags and (reading.flow or reading.method.endswith("_inverse")):
        yield f"{flags[0]} is not supported here with use_flow_sigmas or for an inverse"


def _schedule_of(config: dict[str, Any]) -> tuple[NoiseSchedule, str | None]:
    """Return the schedule of a config, and why it cannot be sampled, where it cannot.

    Scripts register the prediction type after the constructor, so the noise of a config that cannot
    be sampled must be there. The shift of ``set_timesteps(mu=...)`` is left out.
    """
    if config.get("use_dynamic_shifting"):
        config = {**config, "use_dynamic_shifting": False, "shift": 1.0, "flow_shift": 1.0}
    try:
        return NoiseSchedule.from_diffusers(config), None
    except ValueError as error:
        if not (config.get("rescale_betas_zero_snr") and config["prediction_type"] == "epsilon"):
            raise
        return NoiseSchedule.from_diffusers({**config, "prediction_type": "v_prediction"}), str(
            error
        )


def _clip_of(name: str, config: Mapping[str, Any]) -> Change | None:
    if name in NEVER_CLIPS:
        return None
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
        "__doc__": f"``diffusers.{name}`` over tables of alphabar: same arguments, same config.",
        "__init__": _constructor(peer),
        "set_timesteps": _setter(peer),
        "step": _stepper(peer),
        "_compatibles": peer._compatibles,
        "_kind": CLASSES[name],
        "_peer": peer,
        "_result": result,
        "_second": fields[0] if fields else None,
        "_in_sigma": CLASSES[name].in_sigma,
        "_defaults_of_step": {key: p.default for key, p in list(of_step.items())[4:]},
        "_stateless": not hasattr(peer, "set_begin_index"),
        "order": getattr(peer, "order", 1),
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

    @wraps(peer.set_timesteps)
    def set_timesteps(self: Any, *args: Any, **kwargs: Any) -> None:
        if "_reading" in vars(self):
            self._set_timesteps(**dict(zip(names, args, strict=False)), **kwargs)
        else:  # the constructor of the class
            peer.set_timesteps(self, *args, **kwargs)

    return set_timesteps


def _stepper(peer: Any) -> Callable[..., Any]:
    names = list(inspect.signature(peer.step).parameters)[4:]

    @wraps(peer.step)
    def step(
        self: Any, model_output: Tensor, timestep: Any, sample: Tensor, *args: Any, **kwargs: Any
    ) -> Any:
        if args:
            kwargs |= dict(zip(names, args, strict=False))
        return self._step(model_output, timestep, sample, **kwargs)

    return step


def _result_class(peer: Any) -> type[Any]:
    """Return the class of the result of a scheduler's step."""
    words = str(inspect.signature(peer.step).return_annotation)
    kinds = vars(inspect.getmodule(peer)).items()
    return next(kind for name, kind in kinds if name.endswith("SchedulerOutput") and name in words)
