"""Folders on a local disk or in any fsspec store, with one interface to read, write and append.

Local files are written to a temporary file and then renamed (noising/utils/atomic.py). An object
store shows a file only when the upload is complete. On other remote stores the data is written to a
temporary file beside the target and then moved.
"""

from __future__ import annotations

import os
import posixpath
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import fsspec
from fsspec.core import url_to_fs
from fsspec.implementations.local import LocalFileSystem

from ...noising.utils.atomic import require_writable, write_atomically

# stores with atomic uploads: a move would only be a second copy
WHOLE_UPLOADS = {
    "memory",
    "s3",
    "s3a",
    "gs",
    "gcs",
    "abfs",
    "abfss",
    "az",
    "adl",
    "oci",
    "ocilake",
    "oss",
    "hf",
    "r2",
}


@dataclass(frozen=True)
class Folder:
    """A folder by its path or URL ('runs/a', 'file:///runs/a', 's3://bucket/runs/a').

    File names may contain slashes. Every failure of the store is raised as an OSError with the URL.

    >>> folder = Folder("memory://alphabar-example/run")
    >>> folder.write("notes/a.txt", "whole")
    >>> folder.read("notes/a.txt"), folder.read("b.txt")
    (b'whole', None)
    """

    url: str

    @classmethod
    def of(cls, path: str | os.PathLike[str]) -> Folder:
        """Return the Folder for a path, a URL or a ``pathlib`` path.

        >>> Folder.of(Path("runs") / "a").url
        'runs/a'
        """
        return cls(os.fspath(path))

    @property
    def local(self) -> Path | None:
        """The path on the local disk, or None for a remote store.

        >>> Folder("file:///runs/a").local.as_posix(), Folder("memory://a").local
        ('/runs/a', None)
        """
        if "://" not in self.url:
            return Path(self.url)
        if self.url.split("://")[0] in LocalFileSystem.protocol:
            return Path(str(LocalFileSystem._strip_protocol(self.url)))
        return None

    @property
    def name(self) -> str:
        """The last part of the path.

        >>> Folder("s3://bucket/run/previews/").name
        'previews'
        """
        return posixpath.basename(self.url.replace(os.sep, "/").rstrip("/"))

    def __str__(self) -> str:
        return self.url

    def __truediv__(self, name: str) -> Folder:
        """Return the subfolder with this name.

        >>> (Folder("memory://run") / "scheduler").url
        'memory://run/scheduler'
        """
        return Folder(
            str(Path(self.url, name)) if "://" not in self.url else posixpath.join(self.url, name)
        )

    def read(self, name: str) -> bytes | None:
        """Return the content of a file, or None if it does not exist."""
        with self._told("read", name):
            try:
                if self.local is not None:
                    return (self.local / name).read_bytes()
                filesystem, root = self._store
                return filesystem.cat_file(posixpath.join(root, name))
            except (FileNotFoundError, NotADirectoryError):
                return None

    def has(self, name: str) -> bool:
        """Return whether a file with this name exists."""
        with self._told("read", name):
            if self.local is not None:
                return (self.local / name).is_file()
            filesystem, root = self._store
            return filesystem.isfile(posixpath.join(root, name))

    def write(self, name: str, content: str | bytes) -> None:
        """Write a file atomically: readers see the old or the new one. Create parent folders."""
        with self._told("write to", name):
            if self.local is not None:
                write_atomically(self.local / name, content)
            else:
                self._upload(name, content.encode() if isinstance(content, str) else content)

    def append(self, name: str, lines: str) -> None:
        """Append whole lines to a file; first end an incomplete last line (of a killed writer).

        A remote file is written again in full: object stores cannot append.

        >>> folder = Folder("memory://alphabar-example/lines")
        >>> folder.write("a.jsonl", "1\\n2\\ntor")
        >>> folder.append("a.jsonl", "3\\n")
        >>> folder.read("a.jsonl").split()
        [b'1', b'2', b'tor', b'3']
        """
        data = lines.encode()
        if self.local is None:
            before = self.read(name) or b""
            return self.write(name, before + _ended(before) + data)
        with self._told("write to", name):
            path = self.local / name
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("a+b") as file:
                if file.tell():
                    file.seek(-1, os.SEEK_END)
                    data = _ended(file.read()) + data
                file.write(data)
                file.flush()
                os.fsync(file.fileno())

    def remove(self, name: str = "") -> None:
        """Remove a file, or a folder with its content. Do nothing if it does not exist."""
        with self._told("remove from", name):
            filesystem, root = self._store
            path = posixpath.join(root, name) if name else root
            if filesystem.exists(path):
                filesystem.rm(path, recursive=True)

    def require_writable(self) -> None:
        """Write and remove a test file, so that a long run fails at its start and not at its end.

        Raises:
            OSError: the folder cannot be written; the message contains its URL.

        >>> Folder("memory://alphabar-example").require_writable()
        """
        if self.local is not None:
            require_writable(self.local)
            return
        trial = f".alphabar-{uuid.uuid4().hex}"
        self.write(trial, b"trial")
        self.remove(trial)

    # -- the store ---------------------------------------------------------------------------------

    @cached_property
    def _store(self) -> tuple[Any, str]:
        try:
            filesystem, root = url_to_fs(self.url)
        except (
            ValueError,
            ImportError,
        ) as error:  # fsspec does not support the store, or its package is missing
            raise OSError(f"cannot reach {self.url!r}: {error}") from error
        return filesystem, root

    def _upload(self, name: str, data: bytes) -> None:
        filesystem, root = self._store
        path = posixpath.join(root, name)
        protocols = (
            {filesystem.protocol}
            if isinstance(filesystem.protocol, str)
            else set(filesystem.protocol)
        )
        if protocols & WHOLE_UPLOADS:
            return self._put(filesystem, path, data)
        beside = posixpath.join(
            posixpath.dirname(path), f".{posixpath.basename(path)}.{uuid.uuid4().hex[:8]}"
        )
        self._put(filesystem, beside, data)
        try:
            filesystem.mv(beside, path)
        # the store cannot move onto an existing file: readers may see an incomplete file
        except Exception:
            self._put(filesystem, path, data)
            filesystem.rm_file(beside)

    @staticmethod
    def _put(filesystem: fsspec.AbstractFileSystem, path: str, data: bytes) -> None:
        filesystem.makedirs(posixpath.dirname(path), exist_ok=True)
        filesystem.pipe_file(path, data)

    @contextmanager
    def _told(self, verb: str, name: str) -> Iterator[None]:
        _ = self._store  # raises its own error if the store is unreachable
        try:
            yield
        except OSError as error:
            raise OSError(f"cannot {verb} {self.url!r}: {error}") from error
        except Exception as error:  # remote stores have their own error types
            raise OSError(
                f"cannot {verb} {self.url!r}: {type(error).__name__}: {error} ({name})"
            ) from error


def _ended(content: bytes) -> bytes:
    return b"" if not content or content.endswith(b"\n") else b"\n"
