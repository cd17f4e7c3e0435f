"""Find the files of a schedule: a local folder, or a repository of the Hugging Face hub."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..utils.registry import lookup, shown
from .files import CONFIG_NAME, EXACT_NAME

PIPELINE_SUBFOLDER = "scheduler"  # of a diffusers pipeline
HUB_OPTIONS = ("revision", "token", "cache_dir", "local_files_only", "force_download")
"""The options of ``from_pretrained`` for the hub, as in diffusers."""
_REPOSITORY = re.compile(r"[\w][\w.-]*/[\w][\w.-]*")


def schedule_folder(
    place: str | os.PathLike[str], subfolder: str | None = None, **hub_options: Any
) -> Path:
    """Return the local folder with the schedule files of a folder or a hub repository.

    Args:
        place: a folder, or the name of a repository ('owner/name'), if there is no such folder.
        subfolder: the folder inside it; by default the folder itself, else its 'scheduler'.
        hub_options: options of the hub, see ``HUB_OPTIONS``. Only the schedule files are
            downloaded.

    Raises:
        FileNotFoundError: there are no such files.
        ValueError: an option is unknown.

    >>> schedule_folder("nowhere")  # doctest: +ELLIPSIS
    Traceback (most recent call last):
    FileNotFoundError: no schedule in 'nowhere': neither a folder nor the name of a hub ...
    """
    for option in hub_options:
        lookup("option of the hub", option, dict.fromkeys(HUB_OPTIONS))
    folders = (subfolder,) if subfolder else ("", PIPELINE_SUBFOLDER)
    if Path(place).exists():
        return _in_folder(Path(place), folders)
    name = os.fspath(place)
    if not _REPOSITORY.fullmatch(name):
        raise FileNotFoundError(
            f"no schedule in {shown(str(Path(place)))}: neither a folder nor the name of a hub "
            "repository (owner/name)"
        )
    return _of_repository(name, folders, hub_options)


def _in_folder(place: Path, folders: Sequence[str]) -> Path:
    for folder in folders:
        if any((place / folder / name).is_file() for name in (EXACT_NAME, CONFIG_NAME)):
            return place / folder
    tried = " nor in ".join(repr(str(place / folder)) for folder in folders)
    raise FileNotFoundError(
        f"no schedule in {tried}: neither {EXACT_NAME} nor {CONFIG_NAME} is there"
    )


def _of_repository(name: str, folders: Sequence[str], options: dict[str, Any]) -> Path:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    options = dict(options)
    reason = ""
    for folder in folders:
        found = None
        for file in (CONFIG_NAME, EXACT_NAME):
            try:
                found = hf_hub_download(name, file, subfolder=folder or None, **options)
            except LocalEntryNotFoundError as error:  # offline: the cache is asked for the rest
                reason = reason or _one_line(error)
                options["local_files_only"] = True
            except EntryNotFoundError:
                continue
            except Exception as error:  # the hub's client has its own types, and those of httpx
                raise FileNotFoundError(
                    f"no folder {name!r}, and no files of a repository {name!r}"
                    f"{_at(options)} on the hub: {_one_line(error)}"
                ) from error
        if found is not None:
            return Path(found).parent
    tried = " or ".join(f"{folder}/{CONFIG_NAME}".lstrip("/") for folder in folders)
    why = f"; the hub was not asked or did not answer ({reason}): download it first, or go online"
    raise FileNotFoundError(
        f"no folder {name!r}, and no {tried} in the hub repository {name!r}{_at(options)}"
        + (f", of what is in the cache{why}" if reason else "")
    )


def _at(options: dict[str, Any]) -> str:
    return f" at revision {options['revision']!r}" if options.get("revision") else ""


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
