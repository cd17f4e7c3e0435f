"""Read checkpoints without running code from them, and find the schedule of the training."""

from __future__ import annotations

import io
import os
import re
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

import torch

from ...noising import NoiseSchedule
from .sidecars import SUBFOLDER, holds_schedule, own_sidecar, read_sidecar, sidecar_folder
from .storage import Folder

SCHEDULE_KEY = "noise_schedule"  # top-level key: readable without the class that wrote it
OLD_SCHEDULE_KEY = "schedule"  # used by examples/finetune_text_to_image.py before the key above
# bytes of a checkpoint that are not tensors: hyperparameters, states of loaders and loops
MAX_PICKLE = 256 << 20
SHARDED_NAME = "meta.pt"  # in a sharded checkpoint's folder: everything except the sharded tensors


def schedule_from_checkpoint(
    path: str | os.PathLike[str], subfolder: str = SUBFOLDER
) -> NoiseSchedule:
    """Return the schedule of a checkpoint: the embedded one, else one from a folder beside it.

    Weights on a local disk are memory-mapped, not read. No code of the file is run.

    Args:
        path: a file, the folder of a sharded checkpoint or of a state of accelerate, a link, or a
            URL that fsspec supports.
        subfolder: name of the folders beside files without an embedded schedule (weights-only
            files). The checkpoint's own folder is read first, then the shared one.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: the file is not a checkpoint, is damaged, or has no schedule.

    >>> import tempfile
    >>> path = Path(tempfile.mkdtemp(), "last.ckpt")
    >>> torch.save({"state_dict": {}, "noise_schedule": NoiseSchedule.flow(3.0).to_config()}, path)
    >>> schedule_from_checkpoint(path) == NoiseSchedule.flow(3.0)
    True
    """
    own = own_sidecar(path, subfolder)
    if _is_state(path) and holds_schedule(own):
        return read_sidecar(own)
    return schedule_of(read_checkpoint(path), path, subfolder)


def _is_state(path: str | os.PathLike[str]) -> bool:
    """Return whether ``path`` is a local folder, and not that of a sharded checkpoint."""
    local = Folder.of(path).local
    return local is not None and local.is_dir() and not (local / SHARDED_NAME).is_file()


def schedule_of(
    checkpoint: Mapping[str, Any], path: str | os.PathLike[str], subfolder: str = SUBFOLDER
) -> NoiseSchedule:
    """Return the schedule of a checkpoint that is already in memory.

    ``path`` is the file that the checkpoint was read from.

    Raises:
        ValueError: there is no schedule in the checkpoint or beside ``path``.
    """
    embedded = embedded_schedule(checkpoint, path)
    if embedded is not None:
        return embedded
    beside = schedule_beside(path, subfolder)
    if beside is not None:
        return beside
    shared = sidecar_folder(path, subfolder).url
    raise ValueError(
        f"{str(path)!r} does not say its noise schedule: it has no key {SCHEDULE_KEY!r}, and there "
        "is no "
        f"{shared!r}; train with ScheduleCheckpoint(), or, if you know the schedule, put it there: "
        f"schedule.save_pretrained({shared!r})"
    )


def schedule_beside(
    path: str | os.PathLike[str], subfolder: str = SUBFOLDER
) -> NoiseSchedule | None:
    """Return the schedule from the checkpoint's own folder, else from the shared folder, else None.

    Raises:
        ValueError: the schedule is damaged.

    >>> schedule_beside("nowhere/last.ckpt") is None
    True
    """
    for folder in (own_sidecar(path, subfolder), sidecar_folder(path, subfolder)):
        if holds_schedule(folder):
            return read_sidecar(folder)
    return None


def embedded_schedule(
    checkpoint: Mapping[str, Any], path: str | os.PathLike[str] | None = None
) -> NoiseSchedule | None:
    """Return the schedule embedded in a checkpoint, or None if there is none.

    Raises:
        ValueError: the schedule is damaged.

    >>> embedded_schedule({"state_dict": {}}) is None
    True
    """
    key = schedule_key(checkpoint)
    if key is None:
        return None
    try:
        return NoiseSchedule.from_config(checkpoint[key])
    except ValueError as error:
        where = f"of {str(path)!r} " if path is not None else ""
        raise ValueError(f"the checkpoint's {key!r} {where}cannot be read: {error}") from error


def schedule_key(checkpoint: Mapping[str, Any]) -> str | None:
    """Return the key under which a checkpoint stores its schedule, or None if it has no schedule.

    >>> (
    ...     schedule_key({"schedule": NoiseSchedule.flow().to_config()}),
    ...     schedule_key({"schedule": "cosine"}),
    ... )
    ('schedule', None)
    """
    if SCHEDULE_KEY in checkpoint:
        return SCHEDULE_KEY
    old = checkpoint.get(OLD_SCHEDULE_KEY)  # other tools use this key for other values
    return (
        OLD_SCHEDULE_KEY
        if isinstance(old, Mapping) and {"curve", "prediction"} <= set(old)
        else None
    )


def read_checkpoint(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Read a checkpoint with ``weights_only=True``.

    Tensors on a local disk are memory-mapped and read when they are used. Of a sharded checkpoint
    (a folder), everything except the sharded tensors is read.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: the file is damaged, or has objects other than plain values.

    >>> read_checkpoint("nowhere.ckpt")
    Traceback (most recent call last):
    FileNotFoundError: no checkpoint at 'nowhere.ckpt'
    """
    local = Folder.of(path).local
    if local is None:
        parent, _, name = os.fspath(path).rstrip("/").rpartition("/")
        return _loaded_from(Folder(parent), name, path)
    if local.is_dir() and (local / SHARDED_NAME).is_file():
        local = local / SHARDED_NAME
    if not local.is_file():
        what = "a folder, not a checkpoint file," if local.is_dir() else "no checkpoint"
        raise FileNotFoundError(f"{what} at {str(path)!r}")
    with local.open("rb") as file:  # raises OSError if not readable
        # files in the format before torch 1.6 cannot be memory-mapped
        mmap = _require_honest(file, path)
    return _loaded(local, path, mmap)


def _loaded_from(folder: Folder, name: str, path: str | os.PathLike[str]) -> dict[str, Any]:
    content = folder.read(name) if folder.has(name) else folder.read(f"{name}/{SHARDED_NAME}")
    if content is None:
        raise FileNotFoundError(f"no checkpoint at {str(path)!r}")
    _require_honest(io.BytesIO(content), path)
    return _loaded(io.BytesIO(content), path, mmap=False)


def _require_honest(file: IO[bytes], path: str | os.PathLike[str]) -> bool:
    """Raise ValueError if a file needs more memory than its size; return if it is a zip archive.

    torch writes zip archives without compression. So an archive whose content is larger than the
    file is not from torch. A bytearray is the only plain value for which a few bytes can request
    any amount of memory.
    """
    size = file.seek(0, os.SEEK_END)
    try:
        if not zipfile.is_zipfile(file):
            file.seek(0)
            head = file.read(MAX_PICKLE)
            _require_no_bytearray(head, path)
            return False
        with zipfile.ZipFile(file) as archive:
            entries = archive.infolist()
            packed = [entry for entry in entries if entry.compress_type != zipfile.ZIP_STORED]
            if packed or sum(entry.file_size for entry in entries) > size:
                raise ValueError(
                    f"{str(path)!r} is an archive that unpacks to more than its {size} bytes, "
                    "which torch.save never writes; "
                    "take the file that the training wrote"
                )
            for entry in entries:
                if entry.filename.endswith(".pkl"):
                    if entry.file_size > MAX_PICKLE:
                        raise ValueError(
                            f"{str(path)!r} has {entry.file_size} bytes of values beside its "
                            f"tensors; at most {MAX_PICKLE}"
                        )
                    _require_no_bytearray(archive.read(entry), path)
    except (zipfile.BadZipFile, EOFError, NotImplementedError, UnicodeDecodeError) as error:
        raise ValueError(f"{str(path)!r} {_reason(error)}") from error
    return True


def _require_no_bytearray(pickled: bytes, path: str | os.PathLike[str]) -> None:
    if b"bytearray\n" in pickled or b"\x09bytearray" in pickled:
        raise ValueError(f"{str(path)!r} {_reason(ValueError('GLOBAL bytearray'))}")


def _loaded(file: Path | io.BytesIO, path: str | os.PathLike[str], mmap: bool) -> dict[str, Any]:
    try:
        checkpoint = torch.load(file, map_location="cpu", weights_only=True, mmap=mmap)
    except (
        Exception
    ) as error:  # damaged bytes raise many types of error, e.g. IndexError, UnicodeDecodeError
        raise ValueError(f"{str(path)!r} {_reason(error)}") from error
    if not isinstance(checkpoint, dict):
        raise ValueError(
            f"{str(path)!r} is no checkpoint: it holds a {type(checkpoint).__name__}, not a dict"
        )
    return checkpoint


def _reason(error: Exception) -> str:
    # torch's message advises weights_only=False, which would run code from the file
    found = re.search(r"GLOBAL (\S+)", str(error))
    if found:
        mend = "save hyperparameters as numbers, strings, lists and dicts"
        return f"holds a {found[1]}, and only plain values and tensors are loaded; {mend}"
    return "is damaged, or no checkpoint; take an older one, or the file that the training wrote"
