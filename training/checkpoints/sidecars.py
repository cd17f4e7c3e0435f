"""Read and write schedules in folders beside checkpoints, on a local disk or in a remote store.

A checkpoint ``runs/step=6.ckpt`` may have its own folder ``runs/step=6.scheduler``. It shares
``runs/scheduler`` with the other checkpoints in ``runs``. A checkpoint that is itself a folder (a
sharded one) has its own folder inside: ``runs/step=6.ckpt/scheduler``.
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

SUBFOLDER = "scheduler"  # name of the folder beside the checkpoints, as in a diffusers pipeline


def sidecar_folder(path: str | os.PathLike[str], subfolder: str = SUBFOLDER) -> Folder:
    """Return the schedule folder that all checkpoints in the folder of ``path`` share.

    Links are followed.

    >>> sidecar_folder("/runs/a/last.ckpt").url, sidecar_folder("s3://bucket/a/last.ckpt").url
    ('/runs/a/scheduler', 's3://bucket/a/scheduler')
    """
    return _split(path)[0] / subfolder


def own_sidecar(path: str | os.PathLike[str], subfolder: str = SUBFOLDER) -> Folder:
    """Return the schedule folder that belongs only to the checkpoint at ``path``.

    Links are followed.

    >>> own_sidecar("/runs/a/step=6.ckpt").url
    '/runs/a/step=6.scheduler'
    """
    parent, name = _split(path)
    whole = parent / name
    if whole.local is not None and whole.local.is_dir():
        return whole / subfolder
    return parent / f"{Path(name).stem}.{subfolder}"


def holds_schedule(folder: Folder) -> bool:
    """Return whether a folder has at least one of the two schedule files.

    >>> holds_schedule(Folder("nowhere"))
    False
    """
    return any(folder.has(name) for name in (EXACT_NAME, CONFIG_NAME))


def read_sidecar(folder: Folder) -> NoiseSchedule:
    """Return the schedule of a local or remote folder, as ``NoiseSchedule.from_pretrained`` does.

    Raises:
        FileNotFoundError: the folder has no schedule.
        ValueError: the schedule is damaged.

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
    """Write both schedule files, unless they already contain this schedule.

    If diffusers has no config for the schedule, only the exact file is written.

    Returns:
        The different schedule that the folder had before, or None.

    Raises:
        OSError: the folder cannot be written.
    """
    try:
        before = read_sidecar(folder) if holds_schedule(folder) else None
    except ValueError:  # damaged: overwrite it
        before = None
    same = before is not None and before.fingerprint == schedule.fingerprint
    try:
        config = schedule.scheduler_config()
    except ValueError:  # e.g. prediction type "score"
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
