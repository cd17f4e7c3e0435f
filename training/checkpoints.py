"""Reading checkpoints without running code from them, and the schedule that a checkpoint was trained with."""

from __future__ import annotations

import os
import re
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from ..noising import NoiseSchedule

SCHEDULE_KEY = "noise_schedule"  # top level, so that it is readable without knowing the class that wrote it
SUBFOLDER = "scheduler"  # of the sidecar beside the checkpoints, as in a diffusers pipeline


def schedule_from_checkpoint(path: str | os.PathLike[str], subfolder: str = SUBFOLDER) -> NoiseSchedule:
    """Return the schedule that a checkpoint was trained with: the embedded one, else that in the folder beside it.

    ``subfolder``: where beside the checkpoint that folder lies, for files without the key (weights-only ones). Weights
    are mapped, not read, and no code of the file is run. Raises FileNotFoundError, and ValueError for a file that is
    no checkpoint, that is damaged, or that has no schedule.

    >>> import tempfile
    >>> path = Path(tempfile.mkdtemp(), "last.ckpt")
    >>> torch.save({"state_dict": {}, "noise_schedule": NoiseSchedule.flow(3.0).to_config()}, path)
    >>> schedule_from_checkpoint(path) == NoiseSchedule.flow(3.0)
    True
    """
    return schedule_of(read_checkpoint(path), path, subfolder)


def schedule_of(
    checkpoint: Mapping[str, Any], path: str | os.PathLike[str], subfolder: str = SUBFOLDER
) -> NoiseSchedule:
    """Return the schedule of a checkpoint that is already in memory; ``path`` is where it came from.

    Raises ValueError where the checkpoint has none, neither in itself nor beside ``path``.
    """
    embedded = embedded_schedule(checkpoint, path)
    if embedded is not None:
        return embedded
    beside = sidecar_folder(path, subfolder)
    try:
        return NoiseSchedule.from_pretrained(beside)
    except FileNotFoundError as error:
        raise ValueError(
            f"{str(path)!r} does not say its noise schedule: it has no key {SCHEDULE_KEY!r}, and there is no "
            f"{str(beside)!r}; train with ScheduleCheckpoint(), or, if you know the schedule, put it there: "
            f"schedule.save_pretrained({str(beside)!r})"
        ) from error


def embedded_schedule(
    checkpoint: Mapping[str, Any], path: str | os.PathLike[str] | None = None
) -> NoiseSchedule | None:
    """Return the schedule embedded in a checkpoint, None where there is none; a damaged one is a ValueError.

    >>> embedded_schedule({"state_dict": {}}) is None
    True
    """
    if SCHEDULE_KEY not in checkpoint:
        return None
    try:
        return NoiseSchedule.from_config(checkpoint[SCHEDULE_KEY])
    except (ValueError, TypeError) as error:
        where = f"of {str(path)!r} " if path is not None else ""
        raise ValueError(f"the checkpoint's {SCHEDULE_KEY!r} {where}cannot be read: {error}") from error


def sidecar_folder(path: str | os.PathLike[str], subfolder: str = SUBFOLDER) -> Path:
    """Return where the schedule of the checkpoint at ``path`` lies beside it (a link is followed).

    >>> sidecar_folder("/runs/a/last.ckpt").as_posix()
    '/runs/a/scheduler'
    """
    return Path(path).resolve().parent / subfolder


def read_checkpoint(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Read a checkpoint with ``weights_only=True``; tensors stay on disk, mapped, until they are used.

    Raises FileNotFoundError, and ValueError for a damaged file or one that holds other objects than plain values.

    >>> read_checkpoint("nowhere.ckpt")
    Traceback (most recent call last):
    FileNotFoundError: no checkpoint at 'nowhere.ckpt'
    """
    path = Path(path)
    if not path.is_file():
        what = "a folder, not a checkpoint file," if path.is_dir() else "no checkpoint"
        raise FileNotFoundError(f"{what} at {str(path)!r}")
    path.open("rb").close()  # a file that may not be read says so itself
    try:
        # files of the format before torch 1.6 cannot be mapped
        checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except Exception as error:  # damaged bytes fail in a dozen ways, IndexError and UnicodeDecodeError among them
        raise ValueError(f"{str(path)!r} {_reason(error)}") from error
    if not isinstance(checkpoint, dict):
        raise ValueError(f"{str(path)!r} is no checkpoint: it holds a {type(checkpoint).__name__}, not a dict")
    return checkpoint


def _reason(error: Exception) -> str:
    # torch's own words advise to load with weights_only=False, which would run whatever the file says
    found = re.search(r"GLOBAL (\S+)", str(error))
    if found:
        mend = "save hyperparameters as numbers, strings, lists and dicts"
        return f"holds a {found[1]}, and only plain values and tensors are loaded; {mend}"
    return "is damaged, or no checkpoint; take an older one, or the file that the training wrote"
