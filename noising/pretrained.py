"""Schedules on disk: the scheduler_config.json that diffusers loads, beside an exact noise_schedule.json.

diffusers is not imported: its config is a JSON file, and every key that describes the curve is written out, because a
key left at its default would be replaced by another class's own default when that class reads the file.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .continuous import Flow
from .discrete import Discrete
from .files import write_atomically

if TYPE_CHECKING:
    from .schedule import NoiseSchedule

CONFIG_NAME = "scheduler_config.json"
EXACT_NAME = "noise_schedule.json"

# what diffusers' classes assume where a file leaves a key out (diffusers 0.42.1)
_DISCRETE_DEFAULTS = {
    "beta_schedule": "linear",
    "beta_start": 0.0001,
    "beta_end": 0.02,
    "num_train_timesteps": 1000,
    "trained_betas": None,
    "rescale_betas_zero_snr": False,
}
_OTHER_BETAS = {  # classes whose own defaults differ
    "HeunDiscreteScheduler": {"beta_start": 0.00085, "beta_end": 0.012},
    "KDPM2DiscreteScheduler": {"beta_start": 0.00085, "beta_end": 0.012},
    "KDPM2AncestralDiscreteScheduler": {"beta_start": 0.00085, "beta_end": 0.012},
    "DPMSolverSDEScheduler": {"beta_start": 0.00085, "beta_end": 0.012},
    "LCMScheduler": {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012},
    "TCDScheduler": {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012},
}
_READ_ZERO_SNR = {  # classes that know rescale_betas_zero_snr; the others would silently sample on the betas as they were
    "DDIMScheduler",
    "DDPMScheduler",
    "DPMSolverMultistepScheduler",
    "EulerAncestralDiscreteScheduler",
    "EulerDiscreteScheduler",
    "LCMScheduler",
    "TCDScheduler",
    "UniPCMultistepScheduler",
}
_NO_CLIPPING = {"clip_sample": False, "thresholding": False}


def to_diffusers(schedule: NoiseSchedule, sampling: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Return the scheduler_config.json of this schedule as a dict of plain values.

    ``sampling`` holds what a sampler adds: ``_class_name``, ``timestep_spacing``, solver options. Raises ValueError for a
    curve or a prediction that diffusers has no config for.

    >>> from .schedule import NoiseSchedule
    >>> config = to_diffusers(NoiseSchedule.linear(prediction="v_prediction").zero_terminal_snr())
    >>> config["_class_name"], config["prediction_type"], config["rescale_betas_zero_snr"], config["timestep_spacing"]
    ('DDIMScheduler', 'v_prediction', True, 'trailing')
    """
    curve, prediction = schedule.curve, schedule.prediction.name
    if isinstance(curve, Flow):
        if prediction != "flow_prediction":
            raise ValueError(
                f"diffusers samples a flow with flow_prediction only, got {prediction!r}; convert the prediction or sample with alphabar"
            )
        shared: dict[str, Any] = {"num_train_timesteps": curve.num_train_timesteps, "shift": curve.shift}
        return {"_class_name": "FlowMatchEulerDiscreteScheduler"} | shared | dict(sampling or {})
    if not isinstance(curve, Discrete):
        raise ValueError(f"diffusers has no scheduler config for a {curve.kind} curve")
    if prediction not in ("epsilon", "v_prediction", "sample", "flow_prediction"):
        raise ValueError(
            f"diffusers has no prediction_type {prediction!r} for discrete schedules; use epsilon, v_prediction or sample"
        )
    given = curve.trained_betas
    curve_keys = {
        "num_train_timesteps": curve.num_train_timesteps,
        "beta_schedule": "linear" if given else curve.beta_schedule,
        "beta_start": curve.beta_start,
        "beta_end": curve.beta_end,
        "trained_betas": list(given) if given else None,
        "rescale_betas_zero_snr": curve.rescale_betas_zero_snr,
        "prediction_type": prediction,
    }
    defaults = {
        "_class_name": "DDIMScheduler",
        "timestep_spacing": "trailing",
        "steps_offset": 0,
        "set_alpha_to_one": True,
    }
    config = defaults | _NO_CLIPPING | curve_keys | dict(sampling or {})
    if curve.rescale_betas_zero_snr and config["_class_name"] not in _READ_ZERO_SNR:
        config["_class_name"] = "DDIMScheduler"
    return config


def from_diffusers(config: Mapping[str, Any]) -> NoiseSchedule:
    """Return the schedule that a diffusers scheduler config describes, keys left out filled with that class's defaults.

    ``config`` is the content of scheduler_config.json, or ``dict(scheduler.config)``.
    Raises ValueError for a config that is none.

    >>> from_diffusers({"_class_name": "LCMScheduler"}).curve.beta_start
    0.00085
    """
    from .schedule import NoiseSchedule

    if not isinstance(config, Mapping) or not (
        {"_class_name", "beta_schedule", "trained_betas", "prediction_type"} & set(config)
    ):
        raise ValueError(
            "not a diffusers scheduler config: none of _class_name, beta_schedule, prediction_type stands in it"
        )
    name = str(config.get("_class_name", ""))
    if name.startswith("FlowMatch"):
        return NoiseSchedule.flow(
            shift=config.get("shift", 1.0), num_train_timesteps=config.get("num_train_timesteps", 1000)
        )
    values = (
        _DISCRETE_DEFAULTS | _OTHER_BETAS.get(name, {}) | {k: v for k, v in config.items() if k in _DISCRETE_DEFAULTS}
    )
    return NoiseSchedule(Discrete(**values), config.get("prediction_type", "epsilon"))


def save_schedule(schedule: NoiseSchedule, folder: str | os.PathLike[str], sampler: Any = None) -> Path:
    """Write both files atomically; see :meth:`NoiseSchedule.save_pretrained`."""
    sampling = sampler.to_diffusers() if sampler is not None else None
    files = {CONFIG_NAME: to_diffusers(schedule, sampling), EXACT_NAME: schedule.to_config()}
    for name, content in files.items():
        write_atomically(Path(folder, name), json.dumps(content, indent=2, sort_keys=True) + "\n")
    return Path(folder)


def load_schedule(folder: Path) -> NoiseSchedule:
    """Read the files of a folder; see :meth:`NoiseSchedule.from_pretrained`."""
    from .schedule import NoiseSchedule

    found = {name: read_json(folder / name) for name in (EXACT_NAME, CONFIG_NAME) if (folder / name).is_file()}
    if not found:
        raise FileNotFoundError(f"no schedule in {str(folder)!r}: neither {EXACT_NAME} nor {CONFIG_NAME} is there")
    loaded = {
        name: NoiseSchedule.from_config(config) if name == EXACT_NAME else from_diffusers(config)
        for name, config in found.items()
    }
    if len({schedule.fingerprint for schedule in loaded.values()}) > 1:
        raise ValueError(
            f"the two files in {str(folder)!r} contradict each other: {EXACT_NAME} says {loaded[EXACT_NAME]}, "
            f"{CONFIG_NAME} says {loaded[CONFIG_NAME]}; remove the wrong one"
        )
    return next(iter(loaded.values()))


def read_json(path: Path) -> Any:
    """Read a JSON file; a corrupt one is a ValueError that names it.

    >>> import tempfile
    >>> path = write_atomically(Path(tempfile.mkdtemp(), "a.json"), "{")
    >>> read_json(path)  # doctest: +ELLIPSIS
    Traceback (most recent call last):
    ValueError: ...a.json' is not valid JSON (...); restore it from a checkpoint, or write it anew with save_pretrained
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(
            f"{str(path)!r} is not valid JSON ({error}); restore it from a checkpoint, or write it anew with save_pretrained"
        ) from error
