"""Fitted tables beside a checkpoint: ``fitted_table_6.json`` in its own schedule folder."""

from __future__ import annotations

import json
import os
from pathlib import Path

from ...sampling.table import Table
from ..checkpoints.diffusers_folders import is_pipeline
from ..checkpoints.sidecars import SUBFOLDER, own_sidecar
from ..checkpoints.storage import Folder

Location = str | os.PathLike[str]


def tables_folder(model: Location) -> Folder:
    """Return the folder of the tables of a model: a checkpoint or the folder of a pipeline.

    >>> tables_folder("/runs/a/step=6.ckpt").url
    '/runs/a/step=6.scheduler'
    """
    return Folder.of(model) / SUBFOLDER if is_pipeline(os.fspath(model)) else own_sidecar(model)


def table_name(steps: int) -> str:
    """Return the file name of a table with this number of steps.

    >>> table_name(6)
    'fitted_table_6.json'
    """
    return f"fitted_table_{steps}.json"


def write_table(table: Table, model: Location) -> Folder:
    """Write a table beside its model; return the folder.

    Raises:
        OSError: the folder cannot be written.
    """
    folder = tables_folder(model)
    folder.write(table_name(len(table.steps)), table.to_json())
    return folder


def read_table(model: Location, steps: int) -> Table:
    """Return the table with this number of steps beside a model.

    Raises:
        FileNotFoundError: there is none.
        ValueError: the file is damaged.

    >>> read_table("nowhere/a.ckpt", 6)
    Traceback (most recent call last):
    FileNotFoundError: no fitted table of 6 steps beside 'nowhere/a.ckpt'; make it with alphabar ...
    """
    folder, name = tables_folder(model), table_name(steps)
    text = folder.read(name)
    if text is None:
        there = (
            sorted(Path(folder.local).glob(table_name(0).replace("0", "*"))) if folder.local else []
        )
        known = f" (there are {', '.join(path.name for path in there)})" if there else ""
        raise FileNotFoundError(
            f"no fitted table of {steps} steps beside {os.fspath(model)!r}{known}; make it with "
            f"alphabar fit {os.fspath(model)} --evaluations {steps}"
        )
    try:
        return Table.from_config(json.loads(text))
    except ValueError as error:
        raise ValueError(f"{str(folder / name)!r} is no fitted table: {error}") from error
