"""Atomic writes: write a temporary file next to the target, then rename it."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path


def write_atomically(path: str | os.PathLike[str], content: str | bytes) -> Path:
    """Write ``content`` to ``path``; a reader sees the old file or the new one, never a part.

    Creates parent folders. Raises OSError if the path cannot be written; the old file is then
    unchanged.

    >>> folder = tempfile.mkdtemp()
    >>> write_atomically(Path(folder, "a.txt"), "whole").read_text()
    'whole'
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    data = content.encode() if isinstance(content, str) else content
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o666 & ~_umask())  # only the owner can read a file of mkstemp
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    return path


def require_writable(folder: str | os.PathLike[str]) -> Path:
    """Create ``folder`` and check that it is writable, so that a long run fails at its start.

    Raises OSError that names the folder and the cause.

    >>> require_writable(tempfile.mkdtemp()).is_dir()
    True
    """
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise OSError(
            f"cannot write to the output folder {str(folder)!r} ({error}); name a folder that can "
            "be written"
        ) from error
    return folder


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
