"""A scheduler of diffusers as the arguments of a sampler, option by option.

``diffusers_classes`` says what method, grid and options a class is. This module adds what depends
on the schedule (flows with a shift by image size, EDM), and what each option outside that table
does: nothing, something that the caller is told, or something that no sampler here does, which is
refused. Every option of every class is in one of the tables; a test compares them with the classes'
constructors. diffusers is not imported.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from ...noising import Discrete, NoiseSchedule
from ...noising.curves.shifts import shift_noise_level
from ...noising.io.diffusers import continuous_times
from ...noising.io.diffusers_keys import KNOWN_TO_CLASS, OTHERS, plain_config
from ...noising.utils.config_reading import flag, number, word
from ...noising.utils.registry import shown, unknown
from ..grids.timesteps import shift_of
from .diffusers_classes import CLASSES, FAILURES, FLAGS, Reading, read_config


@dataclass(frozen=True)
class SamplerArguments:
    """A scheduler config as the arguments of ``Sampler``.

    Args:
        schedule: The schedule.
        method: A name of a sampler.
        steps: The number of steps.
        grid: The grid; None if the sampler has its own.
        options: The options of both.
        remarks: What the class does and the sampler does not, in words.
    """

    schedule: NoiseSchedule
    method: str
    steps: int
    grid: str | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    remarks: tuple[str, ...] = ()


# -- options outside the table of classes ----------------------------------------------------------

_THRESHOLDS = ("thresholding", "dynamic_thresholding_ratio", "sample_max_value")
_CLIPS = ("clip_sample", "clip_sample_range")
_DDIM = (*_CLIPS, *_THRESHOLDS)
TOLD: Mapping[str, tuple[str, ...]] = {
    **dict.fromkeys(
        ("DDIMScheduler", "DDIMParallelScheduler", "DDPMScheduler", "DDPMParallelScheduler"), _DDIM
    ),
    **dict.fromkeys(("DDIMInverseScheduler", "UnCLIPScheduler", "HeunDiscreteScheduler"), _CLIPS),
    "LCMScheduler": _DDIM,
    "DEISMultistepScheduler": _THRESHOLDS,
    "DPMSolverMultistepInverseScheduler": _THRESHOLDS,
    "DPMSolverMultistepScheduler": _THRESHOLDS,
    "DPMSolverSinglestepScheduler": _THRESHOLDS,
    "EDMDPMSolverMultistepScheduler": _THRESHOLDS,
    "SASolverScheduler": _THRESHOLDS,
    "UniPCMultistepScheduler": _THRESHOLDS,
    "RePaintScheduler": ("clip_sample",),
}
"""Options of a call here (``clip=``) that a class has in its config: the caller is told."""

_LEARNED = {"variance_type": (None, "its network has no second half for the variance here")}
_TIMES = "its times are those of distillation"
_ENDS_CLEAN = {"set_alpha_to_one": (True, "it ends in x_0 in any case")}
_CLIPS_NOTHING = "its code clips nothing"
_OWN_TIMES = {"timestep_spacing": ("leading", _TIMES), "steps_offset": (0, _TIMES), **_ENDS_CLEAN}
_COGVIDEOX = {
    "clip_sample": (True, _CLIPS_NOTHING),
    "clip_sample_range": (1.0, _CLIPS_NOTHING),
    "sample_max_value": (1.0, _CLIPS_NOTHING),
}
NO_EFFECT: Mapping[str, Mapping[str, tuple[Any, str]]] = {
    "CogVideoXDDIMScheduler": _COGVIDEOX,
    "CogVideoXDPMScheduler": _COGVIDEOX,
    "DEISMultistepScheduler": {
        "algorithm_type": ("deis", "it has one algorithm"),
        "solver_type": ("logrho", "it has one solver"),
    },
    "DPMSolverMultistepScheduler": _LEARNED,
    "DPMSolverMultistepInverseScheduler": _LEARNED,
    "DPMSolverSinglestepScheduler": _LEARNED,
    "SASolverScheduler": _LEARNED,
    "DPMSolverSDEScheduler": {"noise_sampler_seed": (None, "a call takes seeds=")},
    "LCMScheduler": _OWN_TIMES,
    "TCDScheduler": {
        **_OWN_TIMES,
        "timestep_scaling": (10.0, "it has no boundary condition to scale"),
        "clip_sample": (False, _CLIPS_NOTHING),
        "clip_sample_range": (1.0, _CLIPS_NOTHING),
        "thresholding": (False, _CLIPS_NOTHING),
        "dynamic_thresholding_ratio": (0.995, _CLIPS_NOTHING),
        "sample_max_value": (1.0, _CLIPS_NOTHING),
    },
    "FlowMatchLCMScheduler": {"upscale_mode": ("bicubic", "it is read with scale_factors only")},
    "ScoreSdeVeScheduler": {"sampling_eps": (1e-5, "its noise levels do not depend on it")},
}
"""Options that a class has and that do nothing here: the class's default, and why."""

_Refused = tuple[Callable[[Any, Mapping[str, Any]], bool], str]


def _is_set(value: Any, config: Mapping[str, Any]) -> bool:
    return value is not None


def _on_betas(value: Any, config: Mapping[str, Any]) -> bool:
    return value == "log_linear" and not any(config.get(key) for key in FLAGS.values())


def _without_flow(value: Any, config: Mapping[str, Any]) -> bool:
    return not config.get("use_flow_sigmas")


def _ends_at_betas(value: Any, config: Mapping[str, Any]) -> bool:
    return value == "sigma_min" and bool(config.get("use_flow_sigmas"))


def _lowers_its_order(value: Any, config: Mapping[str, Any]) -> bool:
    return bool(value) and config.get("final_sigmas_type", "zero") != "zero"


_FLOW_END = (_ends_at_betas, "on a flow it ends at the lowest noise level of its betas")
REFUSED: Mapping[str, Mapping[str, _Refused]] = {
    "EulerDiscreteScheduler": {
        "interpolation_type": (
            _on_betas,
            "it gives the network the times of another grid than its noise levels; "
            "grid='exponential' has these levels and their times",
        )
    },
    "UniPCMultistepScheduler": {
        "solver_p": (_is_set, "another scheduler predicts in its place"),
        "shift_terminal": (_without_flow, "it is for use_flow_sigmas"),
    },
    "SASolverScheduler": {
        "tau_func": (_is_set, "a function is no setting; make the sampler with tau=...")
    },
    "FlowMatchLCMScheduler": {"scale_factors": (_is_set, "it resizes the image between the steps")},
    "DPMSolverMultistepScheduler": {"final_sigmas_type": _FLOW_END},
    "DPMSolverSinglestepScheduler": {
        "final_sigmas_type": _FLOW_END,
        "lower_order_final": (_lowers_its_order, "it lowers its order before final sigma_min"),
    },
}
"""Options with values that no sampler here does: (a test of the value and the config, why)."""

_ENDS = ("sigma_min", "sigma_max")
_SIGMAS = tuple(FLAGS[grid] for grid in ("karras", "exponential", "beta"))
READ_HERE: Mapping[str, tuple[str, ...]] = {
    "EDMEulerScheduler": (),
    "EDMDPMSolverMultistepScheduler": (),
    "UniPCMultistepScheduler": ("shift_terminal",),
    "FlowMatchEulerDiscreteScheduler": ("shift_terminal",),
    "FlowMatchLCMScheduler": ("shift_terminal",),
    "DPMSolverMultistepInverseScheduler": _SIGMAS,
    "RePaintScheduler": ("eta",),
    "ScoreSdeVeScheduler": ("snr", "correct_steps"),
}
"""Options that are read or refused by the functions below."""

NO_SAMPLER: Mapping[str, str] = {
    "CMStochasticIterativeScheduler": (
        "its network is given 1000 times the time of EDM; make it with NoiseSchedule.karras("
        "prediction='consistency'), 'consistency', and a network that multiplies its time by 1000"
    ),
    "IPNDMScheduler": (
        "its network is given times from 1 to 0; make it with NoiseSchedule.cosine(prediction="
        "'epsilon'), 'IPNDMScheduler', and a network that divides its time by 1000"
    ),
    "CosineDPMSolverMultistepScheduler": (
        "its network is given 2 arctan(σ) / π as the time; make it with NoiseSchedule.karras("
        "sigma_min=0.3, sigma_max=500, sigma_data=1.0), 'DPM++ 2M SDE exponential', and a network "
        "that converts its time"
    ),
    "KarrasVeScheduler": "it takes the squares of noise levels for noise levels",
    "ScoreSdeVpScheduler": (
        "it leaves the network's times to its caller; make it with NoiseSchedule."
        "variance_preserving(beta_min, beta_max), 'ScoreSdeVpScheduler'"
    ),
    "VQDiffusionScheduler": "it samples tokens; make it with TokenSchedule and 'vq_diffusion'",
    "AmusedScheduler": "it unmasks tokens; it has no noise schedule",
    "BlockRefinementScheduler": "it unmasks tokens of text; it has no noise schedule",
    "DiscreteDDIMScheduler": "it samples tokens; it has no Gaussian noise",
    "EntropyBoundScheduler": "it unmasks tokens of text; it has no noise schedule",
    "ConsistencyDecoderScheduler": "it is the decoder of one model, with times of its own",
    "DDPMWuerstchenScheduler": "it has a cosine of its own, and times from 1 to 0",
    "SCMScheduler": "it samples trigonometric flows, whose network is given an angle",
    "FlowMapEulerDiscreteScheduler": "its network is given two times, the start and the end",
    "LTXEulerAncestralRFScheduler": "no sampler here has its step, ancestral on a flow",
    "MiniMaxH3Scheduler": "no sampler here has its step",
    "HeliosScheduler": "it samples a pyramid of resolutions in stages",
    "HeliosDMDScheduler": "it samples a pyramid of resolutions in stages",
    "PiflowScheduler": "its network returns a policy, not a prediction",
    "RFD4ProteinaScheduler": "it samples the coordinates of proteins in a way of its own",
}
"""Classes that are no sampler here, and why."""

STANDALONE_CLASSES = ("RePaintScheduler", "ScoreSdeVeScheduler")
"""Classes that are a sampler without a table."""


def options_of_class(name: str) -> dict[str, str]:
    """Return every option of a class that is read, and what becomes of it.

    The words are 'schedule', 'sampler', 'told', 'no effect' and 'refused' (for some values).

    >>> options_of_class("LCMScheduler")["timestep_spacing"]
    'no effect'
    """
    kind = CLASSES.get(name)
    found = dict.fromkeys(KNOWN_TO_CLASS.get(name, ()), "schedule")
    of_sampler = {*READ_HERE.get(name, ())}
    if kind is not None:
        of_sampler |= {*kind.keys}
        if "EDM" not in name:
            of_sampler |= {key for grid, key in FLAGS.items() if grid in kind.lays}
        if kind.spaced:
            of_sampler |= {"timestep_spacing", "steps_offset"}
        if kind.switch:
            of_sampler.add(kind.switch[0])
    found |= dict.fromkeys(of_sampler, "sampler")
    found |= dict.fromkeys(TOLD.get(name, ()), "told")
    found |= dict.fromkeys(NO_EFFECT.get(name, {}), "no effect")
    return found | dict.fromkeys(REFUSED.get(name, {}), "refused")


# -- reading ---------------------------------------------------------------------------------------


def sampler_arguments(config: Any, steps: int, tokens: int | None = None) -> SamplerArguments:
    """Return the sampler of a scheduler of diffusers, or of its config; see ``from_diffusers``.

    Args:
        config: A scheduler object or the content of scheduler_config.json.
        steps: The number of steps.
        tokens: The number of image tokens, for a shift that depends on it.

    Raises:
        ValueError: The config is damaged, or no sampler does what it says.

    >>> sampler_arguments({"_class_name": "EDMEulerScheduler", "rho": 5.0}, 10).options["rho"]
    5.0
    """
    config = {key: value for key, value in plain_config(config).items() if value is not None}
    name = word("_class_name", config.get("_class_name", ""))
    if not name:
        raise ValueError(
            "not a diffusers scheduler config of a sampler: it has no _class_name; add it"
        )
    if name in NO_SAMPLER:
        raise ValueError(f"{name} is not read as a sampler: {NO_SAMPLER[name]}")
    if name not in CLASSES and name not in STANDALONE_CLASSES:
        raise ValueError(unknown("scheduler class", name, [*CLASSES, *STANDALONE_CLASSES]))
    known = options_of_class(name)
    _require_values(name, config, known)
    try:
        schedule = _schedule(name, config, tokens)
        made = _standalone(name, config, schedule, steps)
        read = {k: v for k, v in config.items() if k in known or k == "_class_name"}
        made = made or _of_class(name, read, schedule, steps)
    except ValueError as error:
        raise ValueError(f"{name}: {str(error).removeprefix(name).lstrip(': ')}") from error
    remarks = (*made.remarks, *_without_effect(name, config, known))
    return replace(made, remarks=tuple(f"{name}: {words}" for words in remarks))


def _require_values(name: str, config: Mapping[str, Any], known: Mapping[str, str]) -> None:
    for key in ("use_flow_sigmas", "clip_sample", "thresholding", *FLAGS.values()):
        if key in config and key in known:
            flag(key, config[key])
    if sum(bool(config.get(key)) for key in _SIGMAS if key in known) > 1:
        raise ValueError(f"{name} takes one of {', '.join(_SIGMAS)}; remove the others")
    for key, (applies, words) in REFUSED.get(name, {}).items():
        if key in config and applies(config[key], config):
            raise ValueError(
                f"{name} with {key}={shown(config[key])} is no sampler here: {words}; leave it out"
            )


def _schedule(name: str, config: Mapping[str, Any], tokens: int | None) -> NoiseSchedule:
    if name == "ScoreSdeVeScheduler":
        given: dict[str, Any] = {k: number(k, config[k]) for k in _ENDS if k in config}
        return NoiseSchedule.variance_exploding(**given)
    return NoiseSchedule.from_diffusers(config, tokens)


def _standalone(
    name: str, config: Mapping[str, Any], schedule: NoiseSchedule, steps: int
) -> SamplerArguments | None:
    if name not in STANDALONE_CLASSES:
        return None
    options = {key: config[key] for key in READ_HERE[name] if key in config}
    clips = name == "RePaintScheduler" and config.get("clip_sample", True)
    words = ("it clips the clean sample; for the same give clip=1.0 to the sampler's call",)
    return SamplerArguments(schedule, name, steps, None, options, words if clips else ())


def _of_class(
    name: str, config: dict[str, Any], schedule: NoiseSchedule, steps: int
) -> SamplerArguments:
    reading = read_config(config)
    if reading.method == "dpm_solver_inverse":
        _require_plain_inverse(config)
    _require_prediction(reading, schedule)
    if reading.flow and reading.grid in FLAGS:
        reading = _flow_on_flagged(name, config, reading)
    reading = next(
        (
            read(config, reading, schedule, steps)
            for is_so, read in _READERS
            if is_so(config, reading)
        ),
        reading,
    )
    ignored = NO_EFFECT.get(name, {})
    remarks = reading.left_out(
        {key: value for key, value in config.items() if key not in ignored}
        | {key: False for key in ignored if key in ("clip_sample", "thresholding")},
        schedule,
        steps,
    )
    words = tuple(
        f"it cannot run {steps} steps so, and the sampler can: {failing}"
        for applies, failing in FAILURES
        if applies(reading, reading.options, steps)
    )
    if reading.flow and _cuts_at_whole_times(reading, schedule, steps):
        words += ("some of its times are whole before they are cut; rounding errors decide there",)
    if reading.kind.in_sigma and reading.options.get("final", "zero") != "zero":
        words += ("it ends in x / alpha, and the sampler in x",)
    return SamplerArguments(
        schedule,
        reading.method,
        steps,
        reading.grid,
        reading.arguments(schedule),
        (*remarks, *words),
    )


def _cuts_at_whole_times(reading: Reading, schedule: NoiseSchedule, steps: int) -> bool:
    """Return whether a time of a flow, after the first, is a whole number before it is cut."""
    uncut = replace(reading, options={**reading.options, "rounding": None})
    times = [knot.timestep for knot in uncut.lay(schedule, steps)[1:-1]]
    return any(abs(t - round(t)) < 1e-6 for t in times)


def _require_prediction(reading: Reading, schedule: NoiseSchedule) -> None:
    name = schedule.prediction.name
    allowed = ("flow_prediction", "sample") if schedule.curve.is_flow else reading.kind.predictions
    if schedule.curve.is_flow and not reading.flow:
        allowed = reading.kind.predictions
    if name not in allowed and name != "karras":
        raise ValueError(
            f"prediction_type {name!r} is not read with this "
            f"{'flow' if schedule.curve.is_flow else 'schedule of betas'}; it can be "
            f"{' or '.join(allowed)}"
        )


def _require_plain_inverse(config: Mapping[str, Any]) -> None:
    if config.get("use_flow_sigmas"):
        raise ValueError(
            "with use_flow_sigmas it runs from the noise to the image, not up to the noise; leave "
            "use_flow_sigmas out"
        )
    for key in _SIGMAS:
        if config.get(key):
            raise ValueError(
                f"{key} is no sampler here: its largest noise level is there twice, so the last "
                "step does not move, and its times are rounded; leave it out, or take one step "
                "less on that grid with final='sigma_min'"
            )


def _flow_on_flagged(name: str, config: Mapping[str, Any], reading: Reading) -> Reading:
    """Return UniPC on Karras levels of σ / α (Cosmos); the others take σ / α for σ of a flow."""
    if name != "UniPCMultistepScheduler" or reading.grid != "karras":
        raise ValueError(
            f"{FLAGS[reading.grid]} with use_flow_sigmas takes the noise levels of its betas, "
            "σ / α, for σ of the flow; leave one of the two out"
        )
    ends = {key: config[key] for key in _ENDS if key in config}
    if len(ends) < 2:
        betas: dict[str, Any] = {"beta_start": 0.0001, "beta_end": 0.02}
        curve = Discrete(**(betas | {k: config[k] for k in _BETAS if k in config}))
        times = torch.tensor([0, curve.num_train_timesteps - 1], dtype=torch.float64)
        ends = dict(zip(_ENDS, curve.sigma_ve(times).tolist(), strict=True)) | ends
    final = "repeat" if config.get("final_sigmas_type") == "sigma_min" else "zero"
    laid = {"ratio": True, "rounding": "down", "final": final, **ends}
    return replace(reading, options={**reading.of_method, **laid})


_BETAS = ("beta_schedule", "beta_start", "beta_end", "trained_betas", "num_train_timesteps")


def _is_edm(config: Mapping[str, Any], reading: Reading) -> bool:
    return str(config["_class_name"]).startswith("EDM")


def _edm(
    config: Mapping[str, Any], reading: Reading, schedule: NoiseSchedule, steps: int
) -> Reading:
    grid = str(config.get("sigma_schedule", "karras"))
    if grid not in ("karras", "exponential"):
        raise ValueError(f"sigma_schedule must be 'karras' or 'exponential', got {shown(grid)}")
    options = {**reading.options, "final": "zero"}
    if grid == "karras":
        options["rho"] = config.get("rho", 7.0)
    if config.get("final_sigmas_type") == "sigma_min":
        options["final"] = "repeat"
    return replace(reading, grid=grid, options=options)


def _is_continuous(config: Mapping[str, Any], reading: Reading) -> bool:
    return continuous_times(config)


def _continuous(
    config: Mapping[str, Any], reading: Reading, schedule: NoiseSchedule, steps: int
) -> Reading:
    if schedule.curve.kind != "karras":
        raise ValueError(
            "timestep_type 'continuous' is read with use_karras_sigmas, sigma_min and sigma_max, "
            "as of Stable Video Diffusion; add them"
        )
    final = "repeat" if config.get("final_sigmas_type") == "sigma_min" else "zero"
    return replace(reading, options={**reading.of_method, "final": final})


def _is_flow(config: Mapping[str, Any], reading: Reading) -> bool:
    own_flow = reading.kind.predictions == ("flow_prediction",)
    return own_flow or (reading.grid == "flow" and reading.kind.flow == "top")


def _flow(
    config: Mapping[str, Any], reading: Reading, schedule: NoiseSchedule, steps: int
) -> Reading:
    """Return the reading with the last noise level of a flow, shifted once or twice, stretched."""
    terminal = config.get("shift_terminal") or None
    dynamic = bool(config.get("use_dynamic_shifting"))
    options = dict(reading.options)
    if reading.kind.flow == "top":
        if terminal is not None:  # stretched after the last of N + 1 levels is dropped
            last = 1 - (1 - 1 / schedule.num_train_timesteps) * (steps - 1) / steps
            options |= {"drop_last": False, "end": last, "shift_terminal": terminal}
        return replace(reading, options=options)
    if not dynamic and terminal is None:
        return reading
    if reading.grid == "flow":
        options["end_shifted"] = not dynamic
        if terminal is not None:
            options["shift_terminal"] = terminal
        return replace(reading, options=options)
    del options["range_from"]
    shift = shift_of(schedule)
    lowest = shift_noise_level(1 / schedule.num_train_timesteps, shift)
    lowest = lowest if dynamic else shift_noise_level(lowest, shift)
    low = lowest if terminal is None else terminal
    return replace(reading, options={**options, "sigma_min": low, "sigma_max": 1.0})


def _is_ranged(config: Mapping[str, Any], reading: Reading) -> bool:
    of_unipc = config["_class_name"] == "UniPCMultistepScheduler" and not reading.flow
    return of_unipc and reading.grid in FLAGS and bool({*_ENDS} & set(config))


def _ranged(
    config: Mapping[str, Any], reading: Reading, schedule: NoiseSchedule, steps: int
) -> Reading:
    ends = {key: config[key] for key in _ENDS if key in config}
    final = "repeat" if config.get("final_sigmas_type") == "sigma_min" else "zero"
    return replace(reading, options={**reading.options, "final": final, **ends})


_Reader = Callable[[Mapping[str, Any], Reading, NoiseSchedule, int], Reading]
_READERS: tuple[tuple[Callable[[Mapping[str, Any], Reading], bool], _Reader], ...] = (
    (_is_edm, _edm),
    (_is_continuous, _continuous),
    (_is_flow, _flow),
    (_is_ranged, _ranged),
)
"""Readings that depend on more than one key, or on the schedule."""


# -- what has no effect ----------------------------------------------------------------------------

_OFF: Mapping[str, tuple[Any, ...]] = {
    "interpolation_type": ("linear",),
    "final_sigmas_type": ("zero",),
    "solver_type": ("midpoint", "bh2", "logrho"),
    "solver_order": (2,),
    "lower_order_final": (True,),
    "variance_type": ("fixed_small",),
    "clip_sample_range": (1.0,),
    "sample_max_value": (1.0,),
    "dynamic_thresholding_ratio": (0.995,),
    "set_alpha_to_one": (True,),
    "steps_offset": (1,),
    "timestep_spacing": ("leading", "linspace"),
    "tensor_format": ("pt", "np"),
}
"""Usual values of options, which nobody misses in a class without the option."""


def _without_effect(
    name: str, config: Mapping[str, Any], known: Mapping[str, str]
) -> Iterator[str]:
    """Yield, in words, the keys of a config that its class does not read or that do nothing."""
    asked = {*OTHERS, "timestep_spacing"}
    unread = [
        f"{key}={shown(value)}"
        for key, value in config.items()
        if key in asked and key not in known and value and value not in _OFF.get(key, ())
    ]
    if unread:
        yield f"it does not read {', '.join(unread)}, and the sampler is made without"
    idle = [
        f"{key}={shown(config[key])} ({why})"
        for key, (default, why) in NO_EFFECT.get(name, {}).items()
        if key in config and config[key] != default
    ]
    if idle:
        yield f"without effect: {', '.join(idle)}"
