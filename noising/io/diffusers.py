"""Convert between schedules and the scheduler_config.json of diffusers.

diffusers is imported for a scheduler object only: its config is a JSON file. Every key that
describes the curve is written, because a missing key gets the default of whichever class reads the
file. A class is named only if it reads everything in the schedule. Betas that a class does not know
by name are written as numbers, in ``trained_betas``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..curves.base import Curve
from ..curves.continuous import Flow, Karras
from ..curves.discrete import Discrete
from ..curves.shifts import token_shift
from ..prediction import KarrasF, Prediction
from ..utils.registry import lookup
from .diffusers_keys import checked_config, plain_config

# defaults of diffusers' classes for missing keys (diffusers 0.42.1)
_DISCRETE_DEFAULTS: dict[str, Any] = {
    "beta_schedule": "linear",
    "beta_start": 0.0001,
    "beta_end": 0.02,
    "num_train_timesteps": 1000,
    "trained_betas": None,
    "rescale_betas_zero_snr": False,
}
_PLAIN = (
    "DDIMInverseScheduler",
    "DDIMParallelScheduler",
    "DDIMScheduler",
    "DDPMParallelScheduler",
    "DDPMScheduler",
    "DEISMultistepScheduler",
    "DPMSolverMultistepInverseScheduler",
    "DPMSolverMultistepScheduler",
    "DPMSolverSinglestepScheduler",
    "EulerAncestralDiscreteScheduler",
    "EulerDiscreteScheduler",
    "LMSDiscreteScheduler",
    "PNDMScheduler",
    "RePaintScheduler",
    "SASolverScheduler",
    "UniPCMultistepScheduler",
)
_SD_BETAS: dict[str, Any] = {"beta_start": 0.00085, "beta_end": 0.012}
_SCALED: dict[str, Any] = {"beta_schedule": "scaled_linear"} | _SD_BETAS
_DEFAULTS: dict[str, dict[str, Any]] = {  # every class that reads betas, with its own defaults
    **{name: {} for name in _PLAIN},
    "UnCLIPScheduler": {"beta_schedule": "squaredcos_cap_v2"},
    "HeunDiscreteScheduler": _SD_BETAS,
    "KDPM2DiscreteScheduler": _SD_BETAS,
    "KDPM2AncestralDiscreteScheduler": _SD_BETAS,
    "DPMSolverSDEScheduler": _SD_BETAS,
    "LCMScheduler": _SCALED,
    "TCDScheduler": _SCALED,
    "CogVideoXDDIMScheduler": _SCALED | {"snr_shift_scale": 3.0},
    "CogVideoXDPMScheduler": _SCALED | {"snr_shift_scale": 3.0},
}
_READ_SNR_SHIFT = {name for name, defaults in _DEFAULTS.items() if "snr_shift_scale" in defaults}
# classes that know rescale_betas_zero_snr; the others silently sample with the original betas
_READ_ZERO_SNR = {
    *_READ_SNR_SHIFT,
    "DDIMInverseScheduler",
    "DDIMParallelScheduler",
    "DDIMScheduler",
    "DDPMParallelScheduler",
    "DDPMScheduler",
    "DPMSolverMultistepScheduler",
    "EulerAncestralDiscreteScheduler",
    "EulerDiscreteScheduler",
    "LCMScheduler",
    "TCDScheduler",
    "UniPCMultistepScheduler",
}
_READ_SHIFT = {
    "FlowMatchEulerDiscreteScheduler",
    "FlowMatchHeunDiscreteScheduler",
    "FlowMatchLCMScheduler",
}
_READ_FLOW_SHIFT = {  # classes of betas that sample a flow if use_flow_sigmas is set
    "DEISMultistepScheduler",
    "DPMSolverMultistepInverseScheduler",
    "DPMSolverMultistepScheduler",
    "DPMSolverSinglestepScheduler",
    "SASolverScheduler",
    "UniPCMultistepScheduler",
}
_READ_DYNAMIC_SHIFT = {
    "FlowMatchEulerDiscreteScheduler",
    "FlowMatchLCMScheduler",
    *(_READ_FLOW_SHIFT - {"DPMSolverMultistepInverseScheduler", "SASolverScheduler"}),
}
_BEFORE_FLOW_SIGMAS = (
    "use_karras_sigmas",
    "use_exponential_sigmas",
    "use_beta_sigmas",
    "use_lu_lambdas",
)
# beta schedules that every class knows by name
_KNOWN_TO_ALL = ("linear", "scaled_linear", "squaredcos_cap_v2")
_OTHER_NAMES = {"laplace": "laplace_diffusers"}  # name in diffusers -> name here
_DDIM_LIKE = {
    *_READ_SNR_SHIFT,
    "DDIMInverseScheduler",
    "DDIMParallelScheduler",
    "DDIMScheduler",
    "LCMScheduler",
    "TCDScheduler",
}
_DDPM_LIKE = {"DDPMParallelScheduler", "DDPMScheduler"}
_NO_SPACING = {"DPMSolverSinglestepScheduler", "RePaintScheduler", "UnCLIPScheduler"}
_ELSE: dict[
    str, tuple[Any, set[str]]
] = {  # defaults without a sampler: the value, and the classes that read it
    "timestep_spacing": ("trailing", _DEFAULTS.keys() - _NO_SPACING),
    "steps_offset": (
        1,
        _DEFAULTS.keys() - _NO_SPACING,
    ),  # for leading only; Stable Diffusion's pipelines warn of other values
    "set_alpha_to_one": (True, _DDIM_LIKE | {"PNDMScheduler"}),
    "clip_sample": (
        False,
        _DDIM_LIKE | _DDPM_LIKE | {"HeunDiscreteScheduler", "RePaintScheduler", "UnCLIPScheduler"},
    ),
    "thresholding": (
        False,
        (_DDIM_LIKE | _DDPM_LIKE | _READ_FLOW_SHIFT) - _READ_SNR_SHIFT - {"DDIMInverseScheduler"},
    ),
}


def to_diffusers(
    curve: Curve, prediction: Prediction, sampling: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """Return the scheduler_config.json of a curve and a prediction type as a dict of plain values.

    ``sampling`` holds the keys of a sampler: ``_class_name``, ``timestep_spacing``, solver options.
    A class that would ignore a part of the schedule is replaced by DDIMScheduler, on a flow by
    FlowMatchEulerDiscreteScheduler. Raises ValueError for a curve or a prediction that diffusers
    has no config for.

    >>> from alphabar.noising import NoiseSchedule
    >>> schedule = NoiseSchedule.linear(prediction="v_prediction").zero_terminal_snr()
    >>> config = to_diffusers(schedule.curve, schedule.prediction)
    >>> (
    ...     config["_class_name"],
    ...     config["prediction_type"],
    ...     config["rescale_betas_zero_snr"],
    ...     config["timestep_spacing"],
    ... )
    ('DDIMScheduler', 'v_prediction', True, 'trailing')
    """
    if isinstance(curve, Flow):
        return _flow_config(curve, prediction.name, dict(sampling or {}))
    if isinstance(curve, Discrete):
        return _discrete_config(curve, prediction.name, dict(sampling or {}))
    raise ValueError(f"diffusers has no scheduler config for a {curve.kind} curve")


_OF_SCHEDULE = {  # config keys of the schedule; the others are sampling options
    *("num_train_timesteps", "beta_schedule", "beta_start", "beta_end", "trained_betas"),
    *("rescale_betas_zero_snr", "prediction_type", "shift", "use_dynamic_shifting"),
    *("use_flow_sigmas", "flow_shift", "snr_shift_scale"),
    *("timestep_type", "sigma_min", "sigma_max"),  # of EDM's curve
}
_SPACING = {"timestep_spacing", "steps_offset"}  # decide where sampling starts


def updated_config(
    curve: Curve, prediction: Prediction, config: Mapping[str, Any]
) -> dict[str, Any]:
    """Return a scheduler config with this schedule in the place of its own.

    If its class supports the schedule, the class and its sampling options are kept. If the schedule
    ends in pure noise, the options that decide where sampling starts are not kept, so that sampling
    starts from pure noise.

    Raises:
        ValueError: diffusers has no config for the schedule.

    >>> from alphabar.noising import NoiseSchedule
    >>> zero = NoiseSchedule.linear(prediction="v_prediction").zero_terminal_snr()
    >>> old = {"_class_name": "EulerDiscreteScheduler", "timestep_spacing": "leading"}
    >>> updated_config(zero.curve, zero.prediction, old)["timestep_spacing"]
    'trailing'
    """
    name = config.get("_class_name")
    new = to_diffusers(curve, prediction, {"_class_name": name} if name else None)
    if new["_class_name"] != name:
        return new
    t = torch.tensor(curve.t_max, dtype=torch.float64)
    ends_in_noise = curve.is_discrete and float(curve.alpha(t)) == 0.0
    written = _OF_SCHEDULE | (_SPACING if ends_in_noise else set())
    return new | {
        key: value
        for key, value in config.items()
        if key not in written and not key.startswith("_")
    }


def scheduler_of(curve: Curve, prediction: Prediction, like: Any = None) -> Any:
    """Return a scheduler object of diffusers with this schedule; see :func:`updated_config`.

    Args:
        curve, prediction: the schedule.
        like: a scheduler whose class and options are kept, if its class supports the schedule.

    Raises:
        ValueError: diffusers has no config for the schedule, or ``like`` is no scheduler.

    >>> from alphabar.noising import NoiseSchedule
    >>> flow = NoiseSchedule.flow(3.0)
    >>> scheduler_of(flow.curve, flow.prediction).shift
    3.0
    """
    import diffusers

    config = updated_config(curve, prediction, {} if like is None else plain_config(like))
    return getattr(diffusers, config["_class_name"]).from_config(config)


def _flow_config(curve: Flow, prediction: str, sampling: dict[str, Any]) -> dict[str, Any]:
    if prediction != "flow_prediction":
        raise ValueError(
            f"diffusers samples a flow with flow_prediction only, got {prediction!r}; convert the "
            "prediction or sample with alphabar"
        )
    name, count = sampling.get("_class_name"), {"num_train_timesteps": curve.num_train_timesteps}
    if name in _READ_FLOW_SHIFT and not any(sampling.get(key) for key in _BEFORE_FLOW_SIGMAS):
        flow = {"use_flow_sigmas": True, "flow_shift": curve.shift, "prediction_type": prediction}
        still = {"use_dynamic_shifting": False} if name in _READ_DYNAMIC_SHIFT else {}
        return sampling | count | flow | still | {"thresholding": False}
    if name not in _READ_SHIFT:
        name, sampling = "FlowMatchEulerDiscreteScheduler", {}
    still = {"use_dynamic_shifting": False} if name in _READ_DYNAMIC_SHIFT else {}
    return sampling | count | still | {"_class_name": name, "shift": curve.shift}


def _discrete_config(curve: Discrete, prediction: str, sampling: dict[str, Any]) -> dict[str, Any]:
    if prediction not in ("epsilon", "v_prediction", "sample"):
        raise ValueError(
            f"diffusers has no prediction_type {prediction!r} for discrete schedules; use epsilon, "
            "v_prediction or sample"
        )
    zero = float(curve.alpha(torch.tensor(curve.t_max, dtype=torch.float64))) == 0.0
    name = sampling.get("_class_name", "DDIMScheduler")
    if zero and name not in _READ_ZERO_SNR:
        name, sampling = "DDIMScheduler", {}
    config = {
        key: value
        for key, (value, classes) in _ELSE.items()
        if name in classes or name not in _DEFAULTS
    }
    config |= sampling | {"_class_name": name, "prediction_type": prediction}
    if name in _READ_ZERO_SNR:
        config["rescale_betas_zero_snr"] = zero
    if config["_class_name"] in _READ_SNR_SHIFT:
        before = curve.rescaled_snr_shift_scale == 1  # these classes shift before they rescale
        config["snr_shift_scale"] = curve.snr_shift_scale if before else 1.0
        curve = replace(curve, snr_shift_scale=1.0) if before else curve
    return config | _beta_keys(curve)


def _beta_keys(curve: Discrete) -> dict[str, Any]:
    plain = curve.snr_shift_scale == curve.rescaled_snr_shift_scale == 1
    by_name = plain and curve.beta_schedule in _KNOWN_TO_ALL
    return {
        "num_train_timesteps": curve.num_train_timesteps,
        "beta_schedule": curve.beta_schedule if by_name else "linear",
        "beta_start": curve.beta_start,
        "beta_end": curve.beta_end,
        "trained_betas": None
        if by_name
        else (curve.betas() if plain else _shifted_betas(curve)).tolist(),
    }


def _shifted_betas(curve: Discrete) -> Tensor:
    """Return the betas of a shifted curve, without the rescaling if no shift follows it."""
    if curve.rescaled_snr_shift_scale == 1:
        curve = replace(curve, rescale_betas_zero_snr=False)
    index = torch.arange(curve.num_train_timesteps, dtype=torch.float64)
    alpha, sigma = curve.alpha(index), curve.sigma(index)
    # no cancellation at either end
    log_alpha_bar = torch.where(sigma < 0.5, torch.log1p(-(sigma**2)), 2 * alpha.log())
    return -torch.expm1(log_alpha_bar.diff(prepend=torch.zeros(1, dtype=torch.float64)))


_EDM: dict[str, Any] = {"sigma_min": 0.002, "sigma_max": 80.0, "sigma_data": 0.5, "rho": 7.0}
_READ_EDM = {"EDMEulerScheduler", "EDMDPMSolverMultistepScheduler"}
_EDM_SIGNS = {"epsilon": False, "v_prediction": True}


def _edm_schedule(config: Mapping[str, Any]) -> tuple[Curve, Prediction] | None:
    """Return EDM's curve and prediction, or None for a config of another schedule.

    EulerDiscreteScheduler is EDM with σ_data = 1 where its times are 0.25 log σ (Stable Video
    Diffusion); its betas then have no effect.
    """
    if config.get("_class_name") in _READ_EDM:
        values = _EDM | {key: config[key] for key in _EDM if config.get(key) is not None}
        count = config.get("num_train_timesteps", 1000)
    elif (
        continuous_times(config)
        and config.get("use_karras_sigmas")
        and None not in (config.get("sigma_min"), config.get("sigma_max"))
    ):
        values = {"sigma_min": config["sigma_min"], "sigma_max": config["sigma_max"]}
        values, count = values | {"sigma_data": 1.0}, config.get("num_train_timesteps", 1000)
    else:
        return None
    negative = lookup(
        "prediction_type of an EDM network", config.get("prediction_type", "epsilon"), _EDM_SIGNS
    )
    return Karras(**values, num_train_timesteps=count), KarrasF(values["sigma_data"], negative)


def continuous_times(config: Mapping[str, Any]) -> bool:
    """Return whether EulerDiscreteScheduler gives its network 0.25 log σ as the time.

    >>> continuous_times({"_class_name": "EulerDiscreteScheduler", "timestep_type": "continuous"})
    False
    """
    return (
        config.get("_class_name") == "EulerDiscreteScheduler"
        and config.get("timestep_type") == "continuous"
        and config.get("prediction_type") == "v_prediction"
    )


def from_diffusers(config: Any, tokens: int | None = None) -> tuple[Curve, str | Prediction]:
    """Return the curve and the prediction type of a diffusers scheduler config.

    Missing keys have the defaults of the config's class.

    Args:
        config: a scheduler object, or the content of scheduler_config.json.
        tokens: the number of image tokens, for a config with ``use_dynamic_shifting`` (Flux), whose
            shift depends on the image.

    Raises:
        ValueError: if ``config`` is not a scheduler config, if it needs tokens and has none, if
            tokens are given that it does not use, and for a class whose config does not define its
            curve.

    >>> from_diffusers({"_class_name": "LCMScheduler"})[0].beta_start
    0.00085
    >>> flux = {
    ...     "_class_name": "FlowMatchEulerDiscreteScheduler",
    ...     "shift": 3.0,
    ...     "use_dynamic_shifting": True,
    ... }
    >>> round(from_diffusers(flux, tokens=4096)[0].shift, 4)
    3.1582
    """
    config = plain_config(config)
    if not {"_class_name", "beta_schedule", "trained_betas", "prediction_type"} & set(config):
        raise ValueError(
            "not a diffusers scheduler config: missing all of _class_name, beta_schedule, "
            "prediction_type"
        )
    config = checked_config(config)
    name = str(config.get("_class_name", ""))
    flow_sigmas = name in _READ_FLOW_SHIFT and config.get("use_flow_sigmas", False)
    if name in _READ_SHIFT or flow_sigmas:
        shift = _shift_of(config, "flow_shift" if flow_sigmas else "shift", tokens)
        prediction = config.get("prediction_type", "epsilon") if flow_sigmas else "flow_prediction"
        return Flow(
            shift=shift, num_train_timesteps=config.get("num_train_timesteps", 1000)
        ), prediction
    if tokens is not None:
        unread = ", or its class does not read it here" if config.get(_DYNAMIC_KEY) else ""
        raise ValueError(
            f"tokens are for a config that says {_DYNAMIC_KEY}; this one of "
            f"{name or 'no class'} does not{unread}; leave tokens out"
        )
    edm = _edm_schedule(config)
    if edm is not None:
        return edm
    said = {key: value for key, value in config.items() if key in _DISCRETE_DEFAULTS}
    if (
        name
        and name not in _DEFAULTS
        and not (said.get("beta_schedule") or said.get("trained_betas"))
    ):
        raise ValueError(
            f"a config of {name} does not say its noise schedule in a form that is known here; "
            "make it, e.g. with "
            "NoiseSchedule.flow() or NoiseSchedule.karras()"
        )
    values = _DISCRETE_DEFAULTS | _DEFAULTS.get(name, {}) | said
    if name in _READ_SNR_SHIFT or not name:  # other classes do not read it
        values |= {key: config[key] for key in ("snr_shift_scale",) if key in config}
    values["beta_schedule"] = _OTHER_NAMES.get(values["beta_schedule"], values["beta_schedule"])
    return Discrete(**values), config.get("prediction_type", "epsilon")


_DYNAMIC_KEY = "use_dynamic_shifting"
_TOKEN_SHIFT_KEYS = {
    "base_image_seq_len": "base_tokens",
    "max_image_seq_len": "max_tokens",
    "base_shift": "base_shift",
    "max_shift": "max_shift",
    "time_shift_type": "kind",
}


def _shift_of(config: Mapping[str, Any], key: str, tokens: int | None) -> float:
    if config.get("invert_sigmas"):
        raise ValueError(
            "invert_sigmas runs time from noise to data with the network given 1 - σ; no schedule "
            "here does"
        )
    if not config.get("use_dynamic_shifting"):
        if tokens is not None:
            raise ValueError(
                f"tokens are for a config that says use_dynamic_shifting; this one has {key} "
                f"{config.get(key, 1.0)}"
            )
        return config.get(key, 1.0)
    if tokens is None:
        raise ValueError(
            "the config says use_dynamic_shifting: its shift depends on the size of the image; "
            "give tokens=, the number of image "
            "tokens that the network sees (Flux at 1024 x 1024: 4096)"
        )
    line = {
        ours: config[theirs]
        for theirs, ours in _TOKEN_SHIFT_KEYS.items()
        if config.get(theirs) is not None
    }
    return token_shift(tokens, **line)
