"""What a safetensors file says beside its weights: read from its header, written without loading a weight.

A file is the length of a JSON header (8 bytes, little-endian), the header, and the tensors' bytes one after another.
"""

from __future__ import annotations

import json
import os
import shutil
import struct
import tempfile
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..noising import NoiseSchedule

METADATA = "__metadata__"
OWN_KEY = "alphabar.noise_schedule"  # of the metadata: the schedule itself, as JSON
INTERFACE_PREFIX = "model.diffusion_model."  # of the weights in files that ComfyUI, Forge and A1111 load
PREDICTION_WORDS = {"epsilon": "epsilon", "v_prediction": "v"}  # what modelspec calls them
_MAX_HEADER = 100_000_000  # what the safetensors library itself accepts


@dataclass(frozen=True)
class Header:
    """The header of a safetensors file: its tensors by name (dtype, shape, data_offsets), and its metadata."""

    tensors: Mapping[str, Mapping[str, Any]]
    metadata: Mapping[str, str]
    start: int

    @property
    def for_interfaces(self) -> bool:
        """Whether the weights are named as ComfyUI, Forge and A1111 read them, and not as diffusers or PEFT do."""
        return any(name.startswith(INTERFACE_PREFIX) for name in self.tensors)


def read_header(path: str | os.PathLike[str]) -> Header:
    """Read the header of a safetensors file, and nothing of its weights.

    Raises FileNotFoundError, and ValueError for a file that is none or that is cut off.

    >>> import torch
    >>> from safetensors.torch import save_file
    >>> path = Path(tempfile.mkdtemp(), "a.safetensors")
    >>> save_file({"w": torch.zeros(2, 3)}, path)
    >>> read_header(path).tensors["w"]["shape"]
    [2, 3]
    """
    try:
        with open(path, "rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            if length > _MAX_HEADER:
                raise ValueError(f"its header would have {length} bytes")
            header = json.loads(file.read(length))
            size = file.seek(0, os.SEEK_END)
        tensors = {name: entry for name, entry in header.items() if name != METADATA}
        end = 8 + length + max((int(entry["data_offsets"][1]) for entry in tensors.values()), default=0)
        if size < end:
            raise ValueError(f"it has {size} bytes of {end}")
        metadata = {str(key): str(value) for key, value in header.get(METADATA, {}).items()}
    except (ValueError, struct.error, AttributeError, TypeError, KeyError, IndexError) as error:
        raise ValueError(f"{str(path)!r} is damaged, or no safetensors file: {error}") from error
    return Header(tensors, metadata, 8 + length)


def write_markers(
    path: str | os.PathLike[str], schedule: NoiseSchedule, out: str | os.PathLike[str] | None = None
) -> Path:
    """Write into a safetensors file what its readers look for to know the schedule; return its path.

    The tensors ``v_pred`` and ``ztsnr``, empty, go into files whose weights are named as ComfyUI, Forge and A1111 read
    them (those of diffusers and PEFT refuse tensors that they do not know); ``modelspec.prediction_type``,
    ``modelspec.predict_key``, ``ss_zero_terminal_snr`` and the schedule itself go into the metadata of every file. What an
    earlier schedule left is removed, all else is kept: weights are copied byte for byte and never loaded. ``out``: another
    file to write, instead of ``path``; either is whole or as it was. Raises FileNotFoundError, ValueError and OSError.

    >>> import torch
    >>> from safetensors.torch import load_file, save_file
    >>> path = Path(tempfile.mkdtemp(), "a.safetensors")
    >>> save_file({"model.diffusion_model.out.weight": torch.ones(2)}, path)
    >>> schedule = NoiseSchedule.scaled_linear(prediction="v_prediction").zero_terminal_snr()
    >>> sorted(load_file(write_markers(path, schedule)))
    ['model.diffusion_model.out.weight', 'v_pred', 'ztsnr']
    """
    header = read_header(path)
    wanted = _markers(schedule) if header.for_interfaces else ()
    tensors = dict(header.tensors)
    for name in MARKERS:
        if name in tensors and tensors[name]["data_offsets"][0] != tensors[name]["data_offsets"][1]:
            if name not in wanted:
                raise ValueError(f"{str(path)!r} has a tensor {name!r} with values: save it anew without that tensor")
        else:
            tensors.pop(name, None)
    end = max((entry["data_offsets"][1] for entry in tensors.values()), default=0)
    empty = {"dtype": "F32", "shape": [0], "data_offsets": [end, end]}
    tensors = {**tensors, **{name: empty for name in wanted if name not in tensors}}
    kept = {key: value for key, value in header.metadata.items() if key not in METADATA_KEYS}
    content = json.dumps({METADATA: {**kept, **_metadata(schedule)}, **tensors}, separators=(",", ":")).encode()
    content += b" " * (-len(content) % 8)  # the format aligns the weights so
    _rewrite(
        Path(path), Path(out if out is not None else path), struct.pack("<Q", len(content)) + content, header.start
    )
    return Path(out if out is not None else path)


MARKERS = ("v_pred", "ztsnr")
METADATA_KEYS = ("modelspec.prediction_type", "modelspec.predict_key", "ss_zero_terminal_snr", OWN_KEY)


def _markers(schedule: NoiseSchedule) -> Collection[str]:
    if schedule.prediction.name != "v_prediction" or not schedule.curve.is_discrete:
        return ()
    return MARKERS if schedule.has_zero_terminal_snr else MARKERS[:1]


def _metadata(schedule: NoiseSchedule) -> dict[str, str]:
    said = {OWN_KEY: json.dumps(schedule.to_config(), sort_keys=True)}
    word = PREDICTION_WORDS.get(schedule.prediction.name)
    if word is not None:
        said |= {"modelspec.prediction_type": word, "modelspec.predict_key": word}
    if schedule.curve.is_discrete:
        said["ss_zero_terminal_snr"] = str(schedule.has_zero_terminal_snr)
    return said


def _rewrite(source: Path, target: Path, head: bytes, start: int) -> None:
    target = target.resolve()  # a link, as in the cache of a hub, stays one
    target.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.")
    try:
        with os.fdopen(handle, "wb") as new, source.open("rb") as old:
            new.write(head)
            old.seek(start)
            shutil.copyfileobj(old, new, 1 << 22)
            new.flush()
            os.fsync(new.fileno())
        shutil.copymode(source, temporary)
        os.replace(temporary, target)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
