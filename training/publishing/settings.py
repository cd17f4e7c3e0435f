"""The settings of a preview's images, in the text of their PNG files and in ``previews.jsonl``.

A PNG file has two texts. ``alphabar`` is JSON, from which :func:`sampler_from_settings` makes the
sampler again. ``parameters`` is the infotext of A1111, which UIs show and read.
"""

from __future__ import annotations

import io
import json
import math
import os
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from ...noising import NoiseSchedule
from ...sampling import Sampler
from ...sampling.methods import METHODS
from ..checkpoints.storage import Folder

SETTINGS_KEY = "alphabar"
INFOTEXT_KEY = "parameters"
SCHEDULE_TYPES = {
    "karras": "Karras",
    "exponential": "Exponential",
    "polyexponential": "Polyexponential",
    "sgm_uniform": "SGM Uniform",
    "simple": "Simple",
    "normal": "Normal",
    "ddim_uniform": "DDIM",
    "beta": "Beta",
    "align_your_steps": "Align Your Steps",
    "kl_optimal": "KL Optimal",
}
"""Grids that A1111 has, with its names."""


def settings_of_sampler(sampler: Any) -> dict[str, Any]:
    """Return the settings of a sampler as JSON values.

    ``unsaved`` names those that JSON cannot hold, such as functions.

    >>> from alphabar.noising import NoiseSchedule
    >>> sampler = Sampler(NoiseSchedule.scaled_linear(), "DPM++ 2M Karras", steps=20, rho=5.0)
    >>> settings = settings_of_sampler(sampler)
    >>> settings["sampler"], settings["steps"], settings["grid"], settings["options"]
    ('dpmpp_2m', 20, 'karras', {'rho': 5.0})
    >>> settings["prediction_type"]
    'epsilon'
    """
    own = dict(sampler.options) if isinstance(sampler, Sampler) else dict(vars(sampler))
    values = {
        name: value for name, value in own.items() if name not in ("schedule", "steps", "grid")
    }
    values["grid"] = getattr(sampler, "grid", None)
    saved, unsaved = {}, []
    for name, value in values.items():
        try:
            saved[name] = _plain(value)
        except TypeError:
            unsaved.append(name)
    return {
        "sampler": sampler.name,
        "steps": sampler.steps,
        "grid": saved.pop("grid", None),
        "options": saved,
        "unsaved": unsaved,
        "prediction_type": sampler.schedule.prediction.name,
        "schedule": sampler.schedule.fingerprint,
    }


def sampler_from_settings(settings: Mapping[str, Any], schedule: NoiseSchedule) -> Any:
    """Return the sampler that drew an image, from its settings and the schedule of its training.

    Args:
        settings: result of :func:`read_settings`, or ``settings`` of a line in ``previews.jsonl``.
        schedule: the schedule; ``schedule_from_checkpoint`` reads it.

    Raises:
        ValueError: the schedule is another one, or the settings do not hold the whole sampler, as
            of a fitted table, which has a file of its own.

    >>> from alphabar.noising import NoiseSchedule
    >>> schedule = NoiseSchedule.scaled_linear()
    >>> sampler = Sampler(schedule, "DPM++ 2M Karras", steps=20, rho=5.0)
    >>> sampler_from_settings(settings_of_sampler(sampler), schedule) == sampler
    True
    """
    if settings["schedule"] != schedule.fingerprint:
        raise ValueError(
            f"the image was drawn on the schedule with fingerprint {settings['schedule'][:12]}, "
            f"got {schedule} with {schedule.fingerprint[:12]}; schedule_from_checkpoint reads the "
            "schedule of its training"
        )
    if settings["sampler"] == "fitted":
        weights, steps = settings.get("weights", "raw"), settings["steps"]
        raise ValueError(
            f"the image was drawn with a fitted table, the file 'fitted_{weights}_{steps}.json' in "
            "the folder of the previews: Sampler.from_table(Table.load(path)) makes the sampler; a "
            "later fit replaces the file, and the table's provenance.training_step is the fit's"
        )
    if settings["unsaved"]:
        raise ValueError(
            f"the file does not hold {' and '.join(settings['unsaved'])} of {settings['sampler']}, "
            "which JSON cannot express; make the sampler in Python"
        )
    return Sampler(
        schedule, settings["sampler"], settings["steps"], settings["grid"], **settings["options"]
    )


def infotext(settings: Mapping[str, Any], width: int, height: int) -> str:
    """Return the settings of one image as the infotext of A1111.

    >>> from alphabar.noising import NoiseSchedule
    >>> sampler = Sampler(NoiseSchedule.scaled_linear(), "DPM++ 2M Karras", steps=20)
    >>> one = {"prompt": "a cat", "negative_prompt": "", "seed": 7, "guidance_scale": 7.0}
    >>> print(infotext(settings_of_sampler(sampler) | one, 64, 64))
    a cat
    Steps: 20, Sampler: DPM++ 2M, Schedule type: Karras, CFG scale: 7, Seed: 7, Size: 64x64
    """
    grid, scale = settings.get("grid"), settings.get("guidance_scale")
    values = {
        "Steps": settings.get("steps"),
        "Sampler": settings.get("scheduler") or _name_of_a1111(settings.get("sampler")),
        "Schedule type": SCHEDULE_TYPES.get(grid, grid) if isinstance(grid, str) else None,
        "CFG scale": None if scale is None else f"{scale:g}",
        "Seed": settings.get("seed"),
        "Size": f"{width}x{height}",
        "Training step": settings.get("step"),
        "Weights": settings.get("weights"),
    }
    line = ", ".join(f"{name}: {v}" for name, v in values.items() if v is not None)
    negative = settings.get("negative_prompt")
    lines = [settings.get("prompt"), f"Negative prompt: {negative}" if negative else None, line]
    return "\n".join(text for text in lines if text)


def png_texts(settings: Mapping[str, Any], image: Tensor) -> dict[str, str]:
    """Return the texts for the PNG file of ``image``, shape (..., height, width, channels)."""
    if not settings:
        return {}
    return {
        INFOTEXT_KEY: infotext(settings, image.shape[-2], image.shape[-3]),
        SETTINGS_KEY: json.dumps(settings, sort_keys=True),
    }


def read_settings(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Return the settings of a preview's PNG file.

    Of the grid of all images they hold ``seeds`` and ``prompts`` instead of ``seed`` and
    ``prompt``.

    Args:
        path: a file, or a URL that fsspec supports.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file holds no settings.

    >>> import tempfile, torch
    >>> from pathlib import Path
    >>> from alphabar.training.images import png_bytes
    >>> path = Path(tempfile.mkdtemp(), "step_00000500.png")
    >>> image = torch.zeros(8, 8, 3, dtype=torch.uint8)
    >>> _ = path.write_bytes(png_bytes(image, png_texts({"steps": 20, "seed": 7}, image)))
    >>> read_settings(path)
    {'seed': 7, 'steps': 20}
    """
    folder, _, name = os.fspath(path).rpartition("/")
    content = Folder(folder or ".").read(name)
    if content is None:
        raise FileNotFoundError(f"no file at {os.fspath(path)!r}")
    try:
        from PIL import Image

        with Image.open(io.BytesIO(content)) as image:
            text = getattr(image, "text", {}).get(SETTINGS_KEY)
        settings = json.loads(text) if text is not None else None
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{os.fspath(path)!r} cannot be read as an image: {error}") from error
    if not isinstance(settings, dict):
        raise ValueError(
            f"{os.fspath(path)!r} holds no settings of alphabar; previews and their single images "
            "hold them"
        )
    return settings


def _name_of_a1111(name: Any) -> Any:
    """Return the name that UIs show for a method of ours, if there is one."""
    aliases = getattr(METHODS.get(name), "aliases", {}) if isinstance(name, str) else {}
    return next((alias for alias, implied in aliases.items() if not implied), name)


def _plain(value: Any) -> Any:
    """Return a value as JSON holds it. Raises TypeError for other values."""
    if isinstance(value, Tensor) or hasattr(value, "tolist"):
        value = value.tolist()
    if isinstance(value, list | tuple):
        return [_plain(part) for part in value]
    if isinstance(value, Mapping):
        return {str(key): _plain(part) for key, part in value.items()}
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float) and math.isfinite(value):
        return value
    raise TypeError(f"JSON cannot hold {value!r}")
