"""The two files of a schedule in a folder: scheduler_config.json, which diffusers loads, and the
exact noise_schedule.json.
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
    """Write JSON files by their names, each atomically; return the folder.

    >>> import tempfile
    >>> folder = write_configs(tempfile.mkdtemp(), {CONFIG_NAME: {"_class_name": "DDIMScheduler"}})
    >>> read_configs(folder)
    {'scheduler_config.json': {'_class_name': 'DDIMScheduler'}}
    """
    for name, content in configs.items():
        write_atomically(Path(folder, name), json.dumps(content, indent=2, sort_keys=True) + "\n")
    return Path(folder)


def read_configs(folder: Path) -> dict[str, Any]:
    """Read those of the two files that are there, by name; FileNotFoundError for none, ValueError
    for a corrupt one.
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
