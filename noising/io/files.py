"""The two files of a schedule in a folder.

diffusers loads scheduler_config.json; noise_schedule.json is exact.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..utils.atomic import write_atomically
from ..utils.config_reading import read_json

CONFIG_NAME = "scheduler_config.json"
EXACT_NAME = "noise_schedule.json"


def write_configs(folder: str | os.PathLike[str], configs: Mapping[str, Mapping[str, Any]]) -> Path:
    """Write JSON files by name, each atomically; return the folder.

    >>> import tempfile
    >>> folder = write_configs(tempfile.mkdtemp(), {CONFIG_NAME: {"_class_name": "DDIMScheduler"}})
    >>> read_configs(folder)
    {'scheduler_config.json': {'_class_name': 'DDIMScheduler'}}
    """
    for name, content in configs.items():
        write_atomically(Path(folder, name), json.dumps(content, indent=2, sort_keys=True) + "\n")
    return Path(folder)


def read_configs(folder: Path) -> dict[str, Any]:
    """Return the contents of the existing files of the two, by name.

    Raises FileNotFoundError if there is none, and ValueError for a corrupt one.
    """
    found = {
        name: read_json(folder / name)
        for name in (EXACT_NAME, CONFIG_NAME)
        if (folder / name).is_file()
    }
    if not found:
        raise FileNotFoundError(
            f"no schedule in {str(folder)!r}: neither {EXACT_NAME} nor {CONFIG_NAME} is there"
        )
    return found
