"""Schedules in folders beside checkpoints, on a local disk or in a remote store: where they lie,
reading, writing.

A checkpoint ``runs/step=6.ckpt`` may have a folder of its own, ``runs/step=6.scheduler`` (one that
is a folder itself, as sharded ones are, has it inside: ``runs/step=6.ckpt/scheduler``), and shares
``runs/scheduler`` with its neighbours.
"""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path

from ...noising import NoiseSchedule
from ...noising.io.files import CONFIG_NAME, EXACT_NAME
from ...noising.utils.atomic import write_atomically
from .storage import Folder

SUBFOLDER = "scheduler"  # of the folder beside the checkpoints, as in a diffusers pipeline


def sidecar_folder(path: str | os.PathLike[str], subfolder: str = SUBFOLDER) -> Folder:
    """Return the folder that the checkpoint at ``path`` shares with its neighbours (a link is
    followed).

    >>> sidecar_folder("/runs/a/last.ckpt").url, sidecar_folder("s3://bucket/a/last.ckpt").url
    ('/runs/a/scheduler', 's3://bucket/a/scheduler')
    """
    return _split(path)[0] / subfolder


def own_sidecar(path: str | os.PathLike[str], subfolder: str = SUBFOLDER) -> Folder:
    """Return the folder that belongs to the checkpoint at ``path`` alone (a link is followed).

    >>> own_sidecar("/runs/a/step=6.ckpt").url
    '/runs/a/step=6.scheduler'
    """
    parent, name = _split(path)
    whole = parent / name
    if whole.local is not None and whole.local.is_dir():
        return whole / subfolder
    return parent / f"{Path(name).stem}.{subfolder}"


def holds_schedule(folder: Folder) -> bool:
    """Return whether one of the two files is there.

    >>> holds_schedule(Folder("nowhere"))
    False
    """
    return any(folder.has(name) for name in (EXACT_NAME, CONFIG_NAME))


def read_sidecar(folder: Folder) -> NoiseSchedule:
    """Return the schedule of a folder, as ``NoiseSchedule.from_pretrained`` does of a local one.

    Raises FileNotFoundError where there is none, and ValueError for a damaged one.

    >>> folder = Folder("memory://alphabar-example/scheduler")
    >>> write_sidecar(NoiseSchedule.flow(3.0), folder)
    >>> read_sidecar(folder) == NoiseSchedule.flow(3.0)
    True
    """
    if folder.local is not None:
        return NoiseSchedule.from_pretrained(folder.local)
    with tempfile.TemporaryDirectory() as copy:
        for name in (EXACT_NAME, CONFIG_NAME):
            content = folder.read(name)
            if content is not None:
                write_atomically(Path(copy, name), content)
        try:
            return NoiseSchedule.from_pretrained(copy)
        except (ValueError, FileNotFoundError) as error:
            raise type(error)(str(error).replace(copy, folder.url)) from error


def write_sidecar(schedule: NoiseSchedule, folder: Folder) -> NoiseSchedule | None:
    """Write both files unless they say this already; return the other schedule that they said, if
    they did.

    A schedule for which diffusers has no config is written exactly, alone. Raises OSError.
    """
    try:
        before = read_sidecar(folder) if holds_schedule(folder) else None
    except ValueError:  # damaged: written anew
        before = None
    same = before is not None and before.fingerprint == schedule.fingerprint
    try:
        config = schedule.to_diffusers()
    except ValueError:  # e.g. one with the score as prediction
        config = None
    if same and folder.has(EXACT_NAME) and folder.has(CONFIG_NAME) == (config is not None):
        return None
    if config is None:
        folder.remove(CONFIG_NAME)
    else:
        folder.write(CONFIG_NAME, _json(config))
    folder.write(EXACT_NAME, _json(schedule.to_config()))
    return None if same else before


def _json(value: object) -> str:
    return json.dumps(value, indent=2, sort_keys=True) + "\n"


def _split(path: str | os.PathLike[str]) -> tuple[Folder, str]:
    path = os.fspath(path)
    local = Folder(path).local
    if local is not None:
        path = str(local.resolve())
        return Folder(os.path.dirname(path)), os.path.basename(path)
    parent, _, name = path.rstrip("/").rpartition("/")
    return Folder(parent), name
