"""Read the header of safetensors files, and write metadata into them without loading weights.

A file has three parts: the length of a JSON header (8 bytes, little-endian), the header, and the
bytes of the tensors one after another.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import struct
import tempfile
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from ...noising import NoiseSchedule, Noising
from ...noising.utils.config_reading import mapping, parse_json, whole, word
from ...noising.utils.registry import shown
from .sd_scripts import KEYS, training_metadata

METADATA = "__metadata__"
OWN_KEY = "alphabar.noise_schedule"  # metadata key: the schedule, as JSON
NETWORK_KEY = "alphabar.network"  # metadata key: the config of a diffusers model, as JSON
SHAPE_KEY = "alphabar.sample_shape"
INTERFACE_PREFIX = (
    "model.diffusion_model."  # weight prefix in files that ComfyUI, Forge and A1111 load
)
PREDICTION_WORDS = {"epsilon": "epsilon", "v_prediction": "v"}  # modelspec's names
# bytes; the safetensors library accepts 100 MB, and the largest headers in use have a few MB
MAX_HEADER = 32 << 20
MAX_TENSORS = 100_000
_BITS = {
    "BOOL": 8,
    "U8": 8,
    "I8": 8,
    "I16": 16,
    "U16": 16,
    "F16": 16,
    "BF16": 16,
    "I32": 32,
    "U32": 32,
    "F32": 32,
    "F64": 64,
    "I64": 64,
    "U64": 64,
    "C64": 64,
    "F4": 4,
    "F6_E2M3": 6,
    "F6_E3M2": 6,
}


@dataclass(frozen=True)
class Header:
    """Header of a safetensors file: metadata, and tensors by name (dtype, shape, data_offsets)."""

    tensors: Mapping[str, Mapping[str, Any]]
    metadata: Mapping[str, str]
    start: int

    @property
    def for_interfaces(self) -> bool:
        """Whether the weight names are those of ComfyUI, Forge and A1111, not diffusers or PEFT."""
        return any(name.startswith(INTERFACE_PREFIX) for name in self.tensors)


def read_header(path: str | os.PathLike[str]) -> Header:
    """Read only the header of a safetensors file, not its weights.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: the file is not a safetensors file, or is truncated.

    >>> import torch
    >>> from safetensors.torch import save_file
    >>> path = Path(tempfile.mkdtemp(), "a.safetensors")
    >>> save_file({"w": torch.zeros(2, 3)}, path)
    >>> read_header(path).tensors["w"]["shape"]
    [2, 3]
    """
    try:
        with open(path, "rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(0)
            (length,) = struct.unpack("<Q", file.read(8))
            if length > min(MAX_HEADER, size - 8):
                raise ValueError(f"its header would have {length} bytes, of a file of {size}")
            header = mapping(
                "the header", parse_json(file.read(length), 4 * MAX_TENSORS, 8 * MAX_TENSORS)
            )
        metadata = {
            key: word(f"metadata {key}", value)
            for key, value in mapping("the metadata", header.pop(METADATA, {})).items()
        }
        _require_laid_out(header, size - 8 - length)
        tensors = header
    except (ValueError, struct.error) as error:
        raise ValueError(f"{str(path)!r} is damaged, or no safetensors file: {error}") from error
    return Header(tensors, metadata, 8 + length)


def read_tensors(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """Return the tensors of a safetensors file by name, on the CPU.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: the file is not a safetensors file, or is damaged.

    >>> read_tensors("nowhere.safetensors")
    Traceback (most recent call last):
    FileNotFoundError: [Errno 2] No such file or directory: 'nowhere.safetensors'
    """
    read_header(path)  # its error messages are better
    try:
        with safe_open(path, "pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118, no iter()
    except SafetensorError as error:
        raise ValueError(f"{str(path)!r} is damaged, or no safetensors file: {error}") from error


def _require_laid_out(tensors: Mapping[str, Any], size: int) -> None:
    """Raise ValueError unless the tensors fill ``size`` bytes without gaps or overlaps.

    Each tensor must have the number of bytes that its shape and dtype require.
    """
    spans = []
    for name, entry in tensors.items():
        entry = mapping(f"the entry of {shown(name)}", entry)
        shape: Any
        offsets: Any
        shape, offsets, dtype = (entry.get(key) for key in ("shape", "data_offsets", "dtype"))
        for numbers, most in ((shape, 64), (offsets, 2)):
            if (
                not isinstance(numbers, list)
                or len(numbers) > most
                or any(whole("a size", n) < 0 for n in numbers)
            ):
                raise ValueError(f"the entry of {shown(name)} has no shape and no place")
        if len(offsets) != 2 or not offsets[0] <= offsets[1]:
            raise ValueError(f"the entry of {shown(name)} has no place")
        if offsets[1] > size:
            raise ValueError(
                f"it has {size} bytes of tensors, and {shown(name)} ends at {offsets[1]}"
            )
        bits = (
            _BITS.get(dtype, 8 if str(dtype).startswith("F8") else None)
            if isinstance(dtype, str)
            else None
        )
        if bits is not None and 8 * (offsets[1] - offsets[0]) != math.prod(shape) * bits:
            raise ValueError(f"{shown(name)} of shape {shape} has {offsets[1] - offsets[0]} bytes")
        if bits is None:
            raise ValueError(f"{shown(name)} has the dtype {shown(dtype)}")
        spans.append((*offsets, name))
    end = 0
    for start, stop, name in sorted(spans):
        if start != end:
            raise ValueError(
                f"the tensor {shown(name)} begins at {start}, and what is before it ends at {end}"
            )
        end = stop


def write_markers(
    path: str | os.PathLike[str],
    schedule: NoiseSchedule,
    out: str | os.PathLike[str] | None = None,
    noising: Noising | None = None,
) -> Path:
    """Write the schedule into a safetensors file so that other tools can read it; return the path.

    - Empty tensors ``v_pred`` and ``ztsnr``: only if the weights have the names that ComfyUI, Forge
      and A1111 read. Readers of diffusers and PEFT files reject unknown tensors.
    - Metadata ``modelspec.prediction_type``, ``modelspec.predict_key``, ``ss_zero_terminal_snr``
      and the schedule itself: in every file.

    Markers of an earlier schedule are removed; everything else is kept. Weights are copied byte for
    byte and never loaded. The write is atomic: on failure the file is unchanged.

    Args:
        path: the safetensors file.
        schedule: the schedule to write.
        out: another file to write instead of ``path``.
        noising: the noising of the training; its weighting, noise and loss are written as the
            ``ss_...`` metadata of sd-scripts, where it has a key for them.

    Raises:
        FileNotFoundError: ``path`` does not exist.
        ValueError: ``path`` is not a safetensors file, is damaged, or has a marker with values.
        OSError: the file cannot be written.

    >>> import torch
    >>> from safetensors.torch import load_file, save_file
    >>> path = Path(tempfile.mkdtemp(), "a.safetensors")
    >>> save_file({"model.diffusion_model.out.weight": torch.ones(2)}, path)
    >>> schedule = NoiseSchedule.scaled_linear(prediction="v_prediction").zero_terminal_snr()
    >>> sorted(load_file(write_markers(path, schedule)))
    ['model.diffusion_model.out.weight', 'v_pred', 'ztsnr']
    """
    header = marked_header(path, schedule)
    metadata = dict(header.metadata)
    if noising is not None:
        kept = {key: value for key, value in metadata.items() if key not in KEYS}
        metadata = {**kept, **training_metadata(noising)}
    content = json.dumps({METADATA: metadata, **header.tensors}, separators=(",", ":")).encode()
    content += b" " * (-len(content) % 8)  # the format aligns the weights to 8 bytes
    _rewrite(
        Path(path),
        Path(out if out is not None else path),
        struct.pack("<Q", len(content)) + content,
        header.start,
    )
    return Path(out if out is not None else path)


def marked_header(path: str | os.PathLike[str], schedule: NoiseSchedule) -> Header:
    """Return the header that :func:`write_markers` writes; ``start`` is that of the old header.

    Raises:
        ValueError: as in :func:`write_markers`.
    """
    header = read_header(path)
    wanted = _markers(schedule) if header.for_interfaces else ()
    tensors = dict(header.tensors)
    for name in MARKERS:
        if name in tensors and tensors[name]["data_offsets"][0] != tensors[name]["data_offsets"][1]:
            if name not in wanted:
                raise ValueError(
                    f"{str(path)!r} has a tensor {name!r} with values: save it anew without that "
                    "tensor"
                )
        else:
            tensors.pop(name, None)
    end = max((entry["data_offsets"][1] for entry in tensors.values()), default=0)
    empty = {"dtype": "F32", "shape": [0], "data_offsets": [end, end]}
    tensors = {**tensors, **{name: empty for name in wanted if name not in tensors}}
    kept = {key: value for key, value in header.metadata.items() if key not in METADATA_KEYS}
    return Header(tensors, {**kept, **_metadata(schedule)}, header.start)


def is_safetensors(path: Path) -> bool:
    """Return whether a file is named as a safetensors file.

    >>> is_safetensors(Path("a.safetensors")), is_safetensors(Path("a.ckpt"))
    (True, False)
    """
    return path.suffix in (".safetensors", ".sft")


MARKERS = ("v_pred", "ztsnr")
METADATA_KEYS = (
    "modelspec.prediction_type",
    "modelspec.predict_key",
    "ss_zero_terminal_snr",
    OWN_KEY,
)


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
    target = target.resolve()  # keep a link (as in a hub cache) as a link
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
