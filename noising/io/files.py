"""Schedules on disk: the scheduler_config.json that diffusers loads, beside an exact noise_schedule.json.

What the JSON says of the curve is in ``diffusers_config.py``.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..utils.atomic import write_atomically
from ..utils.config_reading import read_json
from .diffusers import from_diffusers, to_diffusers

if TYPE_CHECKING:
    from ..schedule import NoiseSchedule

CONFIG_NAME = "scheduler_config.json"
EXACT_NAME = "noise_schedule.json"


def save_schedule(
    schedule: NoiseSchedule, folder: str | os.PathLike[str], sampler: Any = None, nearest: bool = False
) -> Path:
    """Write both files atomically; see :meth:`NoiseSchedule.save_pretrained`."""
    sampling = None if sampler is None else _sampling_of(schedule, sampler, nearest)
    files = {CONFIG_NAME: to_diffusers(schedule, sampling), EXACT_NAME: schedule.to_config()}
    for name, content in files.items():
        write_atomically(Path(folder, name), json.dumps(content, indent=2, sort_keys=True) + "\n")
    return Path(folder)


def _sampling_of(schedule: NoiseSchedule, sampler: Any, nearest: bool) -> Any:
    if not hasattr(sampler, "to_diffusers"):
        raise ValueError(
            f"sampler must be a Sampler, got {type(sampler).__name__}, which diffusers has no config for; save the schedule alone"
        )
    if sampler.schedule.fingerprint != schedule.fingerprint:
        raise ValueError(
            f"the sampler is made for {sampler.schedule}, and the schedule to save is {schedule}; make it for this one"
        )
    return sampler.to_diffusers(nearest=nearest)


def load_schedule(folder: Path, tokens: int | None = None) -> NoiseSchedule:
    """Read the files of a folder; see :meth:`NoiseSchedule.from_pretrained`."""
    from ..schedule import NoiseSchedule

    found = {name: read_json(folder / name) for name in (EXACT_NAME, CONFIG_NAME) if (folder / name).is_file()}
    if not found:
        raise FileNotFoundError(f"no schedule in {str(folder)!r}: neither {EXACT_NAME} nor {CONFIG_NAME} is there")
    loaded = {}
    for name, config in found.items():
        try:
            loaded[name] = NoiseSchedule.from_config(config) if name == EXACT_NAME else from_diffusers(config, tokens)
        except ValueError as error:
            raise ValueError(f"{str(folder / name)!r}: {error}") from error
    if len(loaded) == 2 and not _mean_the_same(*loaded.values()):
        raise ValueError(
            f"the two files in {str(folder)!r} contradict each other: {EXACT_NAME} says {loaded[EXACT_NAME]}, "
            f"{CONFIG_NAME} says {loaded[CONFIG_NAME]}; remove the wrong one"
        )
    return next(iter(loaded.values()))


def _mean_the_same(a: NoiseSchedule, b: NoiseSchedule) -> bool:
    """Compare as the fingerprints do, but for the last digits: betas of a shifted curve are written as numbers."""
    if a.fingerprint == b.fingerprint:
        return True
    alike = (a.prediction, a.curve.is_discrete, a.num_train_timesteps) == (
        b.prediction,
        b.curve.is_discrete,
        b.num_train_timesteps,
    )
    return alike and torch.allclose(a.alphas_cumprod, b.alphas_cumprod, rtol=1e-9, atol=1e-15)
