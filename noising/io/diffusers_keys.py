"""The keys of a scheduler_config.json that describe a schedule.

This module says how each key is read, and which keys each class of diffusers knows. diffusers
ignores a key that its class does not know: HeunDiscreteScheduler samples without
``rescale_betas_zero_snr``, whatever the file contains. Such a key is ignored here too, and a
warning names it. A warning also names keys that no class knows.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from typing import Any

from ..utils.config_reading import flag, mapping, number, numbers, whole, word
from ..utils.registry import shown, unknown

READERS: Mapping[str, Callable[[str, Any], Any]] = {
    "_class_name": word,
    "num_train_timesteps": whole,
    "beta_schedule": word,
    "beta_start": number,
    "beta_end": number,
    "trained_betas": numbers,
    "prediction_type": word,
    "rescale_betas_zero_snr": flag,
    "snr_shift_scale": number,
    "timestep_spacing": word,
    "use_flow_sigmas": flag,
    "flow_shift": number,
    "shift": number,
    "invert_sigmas": flag,
    "use_dynamic_shifting": flag,
    "base_image_seq_len": whole,
    "max_image_seq_len": whole,
    "base_shift": number,
    "max_shift": number,
    "time_shift_type": word,
    "timestep_type": word,
    "sigma_schedule": word,
    "sigma_min": number,
    "sigma_max": number,
    "sigma_data": number,
    "rho": number,
}
"""The reader of each key that describes a schedule."""

MAY_BE_NULL = (
    "base_image_seq_len",
    "max_image_seq_len",
    "base_shift",
    "max_shift",
    "time_shift_type",
    "timestep_spacing",
    "sigma_min",
    "sigma_max",
)

_BETAS = frozenset(
    {
        "num_train_timesteps",
        "beta_schedule",
        "beta_start",
        "beta_end",
        "trained_betas",
        "prediction_type",
    }
)
_ZERO = _BETAS | {"rescale_betas_zero_snr"}
_FLOW = {"use_flow_sigmas", "flow_shift"}
_SHIFT = frozenset({"num_train_timesteps", "shift"})
_DYNAMIC = {"use_dynamic_shifting", "time_shift_type"}
_TOKENS = _DYNAMIC | {
    "base_image_seq_len",
    "max_image_seq_len",
    "base_shift",
    "max_shift",
    "invert_sigmas",
}
_COUNT = frozenset({"num_train_timesteps"})
_RANGE = frozenset({"sigma_min", "sigma_max"})
_EDM = _COUNT | _RANGE | {"sigma_data", "sigma_schedule", "rho", "prediction_type"}

KNOWN_TO_CLASS: Mapping[str, frozenset[str]] = {
    "CogVideoXDDIMScheduler": _ZERO | {"snr_shift_scale"},
    "CogVideoXDPMScheduler": _ZERO | {"snr_shift_scale"},
    "DDIMInverseScheduler": _ZERO,
    "DDIMParallelScheduler": _ZERO,
    "DDIMScheduler": _ZERO,
    "DDPMParallelScheduler": _ZERO,
    "DDPMScheduler": _ZERO,
    "DEISMultistepScheduler": _BETAS | _FLOW | _DYNAMIC,
    "DPMSolverMultistepInverseScheduler": _BETAS | _FLOW,
    "DPMSolverMultistepScheduler": _ZERO | _FLOW | _DYNAMIC,
    "DPMSolverSDEScheduler": _BETAS,
    "DPMSolverSinglestepScheduler": _BETAS | _FLOW | _DYNAMIC,
    "EulerAncestralDiscreteScheduler": _ZERO,
    "EulerDiscreteScheduler": _ZERO | _RANGE | {"timestep_type"},
    "FlowMatchEulerDiscreteScheduler": _SHIFT | _TOKENS,
    "FlowMatchHeunDiscreteScheduler": _SHIFT,
    "FlowMatchLCMScheduler": _SHIFT | _TOKENS,
    "HeunDiscreteScheduler": _BETAS,
    "KDPM2AncestralDiscreteScheduler": _BETAS,
    "KDPM2DiscreteScheduler": _BETAS,
    "LCMScheduler": _ZERO,
    "LMSDiscreteScheduler": _BETAS,
    "PNDMScheduler": _BETAS,
    "RePaintScheduler": _BETAS - {"prediction_type"},
    "SASolverScheduler": _BETAS | _FLOW,
    "TCDScheduler": _ZERO,
    "UnCLIPScheduler": _COUNT | {"beta_schedule", "prediction_type"},
    "UniPCMultistepScheduler": _ZERO | _FLOW | _DYNAMIC | _RANGE,
    # classes whose schedule is neither betas nor a flow: they do not read betas
    "CMStochasticIterativeScheduler": _COUNT | _RANGE | {"sigma_data", "rho"},
    "CosineDPMSolverMultistepScheduler": _EDM,
    "EDMDPMSolverMultistepScheduler": _EDM,
    "EDMEulerScheduler": _EDM,
    "IPNDMScheduler": _COUNT | {"trained_betas"},
    "KarrasVeScheduler": _RANGE,
    "SCMScheduler": _COUNT | {"prediction_type", "sigma_data"},
    "ScoreSdeVeScheduler": _COUNT | _RANGE,
}
"""The keys of ``READERS`` that a class of diffusers reads (diffusers 0.42.1).

Other classes are unknown.
"""

FOR_PIPELINES = {
    "base_image_seq_len",
    "max_image_seq_len",
    "base_shift",
    "max_shift",
    "timestep_spacing",
    "_class_name",
}
"""Keys that pipelines and samplers read, not the class."""

OTHERS = frozenset(
    {
        "algorithm_type",
        "clip_denoised",
        "clip_sample",
        "clip_sample_range",
        "correct_steps",
        "corrector_order",
        "disable_corrector",
        "dynamic_thresholding_ratio",
        "editing_threshold",
        "eps",
        "eta",
        "euler_at_final",
        "final_sigmas_type",
        "interpolation_type",
        "lambda_min_clipped",
        "lower_order_final",
        "noise_sampler_seed",
        "num_inference_steps",
        "original_inference_steps",
        "predict_x0",
        "predictor_order",
        "s_churn",
        "s_max",
        "s_min",
        "s_noise",
        "sample_max_value",
        "sampling_eps",
        "scale_factors",
        "set_alpha_to_one",
        "shift_terminal",
        "skip_prk_steps",
        "snr",
        "solver_order",
        "solver_p",
        "solver_type",
        "steps_offset",
        "stochastic_sampling",
        "t_max",
        "t_min",
        "tau_func",
        "tensor_format",
        "thresholding",
        "timestep_scaling",
        "upscale_mode",
        "use_beta_sigmas",
        "use_exponential_sigmas",
        "use_karras_sigmas",
        "use_lu_lambdas",
        "variance_type",
    }
)
"""Keys that configure how a class samples; they do not describe the schedule."""

_NEUTRAL = {
    "prediction_type": ("epsilon", "flow_prediction"),
    "snr_shift_scale": (1,),
    "shift": (1,),
    "flow_shift": (1,),
    "timestep_type": ("discrete",),
    "sigma_schedule": ("karras",),
    "time_shift_type": ("exponential",),
}


def plain_config(config: Any) -> dict[str, Any]:
    """Return a scheduler config as a dict: of a mapping, or of a scheduler object of diffusers.

    >>> plain_config({"_class_name": "DDIMScheduler"})
    {'_class_name': 'DDIMScheduler'}
    """
    if not isinstance(config, Mapping):
        own = getattr(config, "config", None)
        if not isinstance(own, Mapping):
            raise ValueError(
                "not a diffusers scheduler config: a scheduler of diffusers or its config is "
                f"needed, got {shown(config)}"
            )
        config = {**own, "_class_name": type(config).__name__}
    return mapping("a scheduler config", config)


def checked_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return a scheduler config of diffusers with checked values, without keys its class ignores.

    Raises ValueError for values of another type, and for numbers that are not finite. Warns of keys
    that describe the schedule but that the class ignores, and of keys that no class knows.

    >>> checked_config({"_class_name": "DDIMScheduler", "beta_end": "0.02"})
    Traceback (most recent call last):
    ValueError: beta_end must be a finite number, got '0.02'
    """
    values = mapping("a scheduler config", config)
    for key in values.keys() & READERS.keys():
        if values[key] is not None or key not in MAY_BE_NULL:
            values[key] = READERS[key](key, values[key])
    betas, count = values.get("trained_betas"), values.get("num_train_timesteps")
    if betas is not None and count not in (None, len(betas)):
        raise ValueError(
            f"num_train_timesteps says {count}, but there are {len(betas)} trained_betas; remove "
            "one of the two"
        )
    name = values.get("_class_name", "")
    known = KNOWN_TO_CLASS.get(name)
    if known is None:
        return values
    ignored = [
        key for key in values if key in READERS and key not in known and key not in FOR_PIPELINES
    ]
    told = [key for key in ignored if values[key] and values[key] not in _NEUTRAL.get(key, ())]
    if told:
        words = ", ".join(f"{key}={shown(values[key])}" for key in told)
        warnings.warn(
            f"{name} does not know {words}: diffusers samples without, and it is left out here "
            "too; name a class that reads it, "
            "if the model was trained so",
            stacklevel=3,
        )
    strange = [
        key
        for key in values
        if not key.startswith("_") and key not in READERS and key not in OTHERS
    ]
    for key in strange:
        warnings.warn(
            f"{unknown(f'key of a {name} config', key, READERS)}; it is left out", stacklevel=3
        )
    return {key: value for key, value in values.items() if key not in ignored}
