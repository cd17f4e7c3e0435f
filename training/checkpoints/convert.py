"""Apply the fixes that :mod:`inspect` names: say a schedule where tools look for it.

- A safetensors file gets marker tensors, metadata and a schedule folder beside it.
- A folder with a scheduler_config.json, or a diffusers pipeline, gets a config that names the whole
  schedule, in a class that reads it, and the exact file beside it.
- A checkpoint (``.ckpt``) gets a schedule folder beside it; the file itself is not changed.

Every file is written to a temporary one and renamed, in an order that leaves a readable schedule
at every moment. Weights are copied byte for byte, and no code of a file is run.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...noising import NoiseSchedule
from ...noising.io.diffusers import updated_config
from ...noising.io.files import CONFIG_NAME, EXACT_NAME, write_configs
from ...noising.utils.config_reading import mapping, read_json
from ...noising.utils.registry import shown
from .diffusers_folders import INDEX_NAME
from .inspect import Inspection, inspect_path
from .read import SHARDED_NAME
from .safetensors import is_safetensors, marked_header, read_header, write_markers
from .sidecars import own_sidecar, read_sidecar, write_sidecar


@dataclass(frozen=True)
class Conversion:
    """Result of :func:`convert_path`; ``str()`` is what ``alphabar convert`` prints.

    Args:
        path: the path that was converted.
        target: where the result is.
        changes: what was changed, in words; empty if there was nothing to do.
        written: False for a dry run.
    """

    path: str
    target: str
    changes: tuple[str, ...]
    written: bool = True

    def __str__(self) -> str:
        verb = "written to" if self.written else "would be written to"
        head = f"{self.path}: {verb} {self.target}" if self.changes else f"{self.path}: "
        if not self.changes:
            return f"{head}nothing to convert, it says all"
        return "\n".join([head, *(f"  {change}" for change in self.changes)])


def convert_path(
    path: str | os.PathLike[str],
    out: str | os.PathLike[str] | None = None,
    *,
    in_place: bool = False,
    schedule: NoiseSchedule | None = None,
    dry_run: bool = False,
) -> Conversion:
    """Write a model file or folder that says its schedule to all tools; see the module.

    Args:
        path: as in :func:`inspect_path`.
        out: the file or folder to write; it must not exist.
        in_place: change ``path`` itself instead.
        schedule: the schedule of the training; by default what the model's own data say.
        dry_run: write nothing.

    Raises:
        FileNotFoundError: the path does not exist.
        ValueError: the schedule is not said, or contradicts itself, and none is given; ``out``
            exists; neither ``out`` nor ``in_place`` is given.
        OSError: the target cannot be written; the source is unchanged.

    >>> folder = NoiseSchedule.flow(3.0).save_pretrained(tempfile.mkdtemp())
    >>> convert_path(folder, in_place=True).changes
    ()
    """
    source = Path(path)
    inspection = inspect_path(source)
    if (out is not None) == in_place and not (dry_run and out is None):
        raise ValueError("say where to write: --out PATH, or --in-place to change the model itself")
    if out is not None and os.path.lexists(out):
        raise ValueError(f"{str(out)!r} exists, and nothing is overwritten; name another --out")
    if out is not None and source.is_dir() and source.resolve() in Path(out).resolve().parents:
        raise ValueError(f"{str(out)!r} is inside {str(source)!r}; name a folder beside it")
    schedule = schedule or _schedule_of(inspection)
    if source.is_file() and is_safetensors(source):
        convert = _safetensors
    elif source.is_dir() and not (source / SHARDED_NAME).is_file():
        convert = _folder
    else:
        convert = _checkpoint
    return convert(source, None if out is None else Path(out), schedule, dry_run)


def _schedule_of(inspection: Inspection) -> NoiseSchedule:
    """Return the schedule that a model's data say, if they agree on it."""
    said = {s.schedule.fingerprint: s.schedule for s in inspection.statements if s.schedule}
    against = [note for note in inspection.contradictions if "timestep_spacing" not in note]
    if against:
        raise ValueError(
            f"{inspection.path!r} contradicts itself ({'; '.join(against)}); say which is right "
            "with --schedule"
        )
    if not said:
        raise ValueError(
            f"{inspection.path!r} does not say its noise schedule; say it with --schedule, e.g. "
            "--schedule scaled_linear:prediction=v_prediction --zero_snr"
        )
    return next(iter(said.values()))


# -- safetensors -----------------------------------------------------------------------------------


def _safetensors(
    source: Path, out: Path | None, schedule: NoiseSchedule, dry_run: bool
) -> Conversion:
    target = source if out is None else out
    if not is_safetensors(target):
        raise ValueError(f"{str(target)!r} must end in .safetensors, as {source.name!r} does")
    before, after = read_header(source), marked_header(source, schedule)
    changes = [
        *_differences(
            "tensor", dict.fromkeys(before.tensors, ""), dict.fromkeys(after.tensors, "")
        ),
        *_differences("metadata", before.metadata, after.metadata),
        *_beside(target, schedule),
    ]
    if changes and not dry_run:
        if before != after or out is not None:
            write_markers(source, schedule, out)
        write_sidecar(schedule, own_sidecar(target))
    return Conversion(str(source), str(target), tuple(changes), not dry_run)


def _beside(target: Path, schedule: NoiseSchedule) -> Iterator[str]:
    folder = own_sidecar(target)
    try:
        there = read_sidecar(folder).fingerprint == schedule.fingerprint
    except (FileNotFoundError, ValueError):
        there = False
    if not there:
        yield f"folder {folder.name}: {EXACT_NAME} and {CONFIG_NAME} of {schedule}"


def _checkpoint(
    source: Path, out: Path | None, schedule: NoiseSchedule, dry_run: bool
) -> Conversion:
    if out is not None:
        raise ValueError(
            f"{str(source)!r} is a checkpoint: the schedule is written into the folder "
            f"{own_sidecar(source).name!r} beside it and the file is not changed; take --in-place"
        )
    changes = tuple(_beside(source, schedule))
    if changes and not dry_run:
        write_sidecar(schedule, own_sidecar(source))
    return Conversion(str(source), own_sidecar(source).url, changes, not dry_run)


# -- folders ---------------------------------------------------------------------------------------


def _folder(source: Path, out: Path | None, schedule: NoiseSchedule, dry_run: bool) -> Conversion:
    inner = Path("scheduler") if (source / "scheduler").is_dir() else Path()
    place = source / inner
    old = read_json(place / CONFIG_NAME) if (place / CONFIG_NAME).is_file() else {}
    new = updated_config(schedule.curve, schedule.prediction, old)
    exact = schedule.to_config()
    had = read_json(place / EXACT_NAME) if (place / EXACT_NAME).is_file() else {}
    index = _index_of(source, inner, new)
    changes = [
        *_differences(CONFIG_NAME, old, new),
        *([] if had == exact else [f"{EXACT_NAME}: {schedule}"]),
        *([f"{INDEX_NAME}: scheduler is {new['_class_name']}"] if index else []),
    ]
    target = source if out is None else out
    if out is not None and not dry_run:
        _copy(source, out, inner, new, exact, index)
    elif changes and not dry_run:
        _replace(place, new, exact, same=had == exact)
        write_configs(source, index)
    return Conversion(str(source), str(target), tuple(changes), not dry_run)


def _index_of(source: Path, inner: Path, config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the file of a pipeline that names its scheduler's class, if it names another one."""
    path = source / INDEX_NAME
    if inner == Path() or not path.is_file():
        return {}
    index = mapping(INDEX_NAME, read_json(path))
    named = index.get("scheduler")
    if not isinstance(named, list) or named[-1:] == [config["_class_name"]]:
        return {}
    return {INDEX_NAME: {**index, "scheduler": ["diffusers", config["_class_name"]]}}


def _replace(place: Path, config: Mapping[str, Any], exact: Mapping[str, Any], same: bool) -> None:
    """Replace both files; between two writes the folder has one of the schedules, never two."""
    if not same:
        (place / EXACT_NAME).unlink(missing_ok=True)
    write_configs(place, {CONFIG_NAME: config})
    write_configs(place, {EXACT_NAME: exact})


def _copy(
    source: Path,
    out: Path,
    inner: Path,
    config: Mapping[str, Any],
    exact: Mapping[str, Any],
    index: Mapping[str, Any],
) -> None:
    """Copy a folder with the new files under a temporary name, then rename it."""
    out.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=out.parent, prefix=f".{out.name}."))
    try:
        copy = temporary / "copy"
        shutil.copytree(source, copy)
        write_configs(copy / inner, {CONFIG_NAME: config, EXACT_NAME: exact})
        write_configs(copy, index)
        os.rename(copy, out)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _differences(what: str, old: Mapping[str, Any], new: Mapping[str, Any]) -> Iterator[str]:
    """Yield the keys that differ, in words."""
    for key in sorted({*old, *new}):
        before, after = old.get(key), new.get(key)
        if key not in new:
            yield f"{what}: {key} removed"
        elif key not in old:
            yield f"{what}: {key} added" + (f", {_short(after)}" if after != "" else "")
        elif before != after:
            yield f"{what}: {key} {_short(before)} -> {_short(after)}"


def _short(value: Any) -> str:
    if isinstance(value, str) and value.startswith("{"):
        return f"JSON of {len(json.loads(value))} keys"
    return shown(value)
