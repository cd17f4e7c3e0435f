"""Load a trained network and its schedule from a checkpoint, using only the checkpoint's own files.

All values of a checkpoint are checked before memory is allocated for them: the file can be damaged,
hostile, or from another tool.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ...noising import NoiseSchedule
from ...noising.utils.config_reading import mapping, parse_json, whole
from ...noising.utils.registry import lookup, shown
from ..networks import build_network, import_network, load_weights
from .read import read_checkpoint, schedule_beside, schedule_of
from .safetensors import NETWORK_KEY, OWN_KEY, SHAPE_KEY, read_header, read_tensors
from .sidecars import sidecar_folder

PREFIX = "network."  # DiffusionModule's key prefix for its network
LARGEST_SAMPLE = 1 << 24  # numbers in one sample: 4096 x 4096
# dimensions of one sample, by the prefix of a class name
DIMENSIONS: Mapping[str, int] = {"UNet1D": 2, "UNet2D": 3, "UNet3D": 4}
LARGEST_SIDES = 8  # times the side that a network was built for
WEIGHTS: Mapping[str, str] = {"raw": "current_model_state", "ema": "state_dict"}


@dataclass(frozen=True)
class Loaded:
    """A network in eval mode, the schedule it was trained on, and the shape of one sample."""

    network: nn.Module
    schedule: NoiseSchedule
    sample_shape: tuple[int, ...]


def load_checkpoint(
    path: str | Path,
    network: str | nn.Module | None = None,
    weights: str | None = None,
    shape: Any = None,
) -> Loaded:
    """Load the network and its schedule from a DiffusionModule's checkpoint.

    EMA weights are loaded if the checkpoint has them.

    Args:
        path: a checkpoint, or a ``.safetensors`` file that ``alphabar ema`` wrote.
        network: needed if the network is not a diffusers model: the module to load the weights
            into, or 'package.module:factory'.
        weights: 'ema' or 'raw', for a checkpoint that has both.
        shape: shape of one sample, for a file that does not store it.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: the file is not a checkpoint, has no schedule or no network config, or its parts
            do not match each other.

    >>> load_checkpoint("nowhere.ckpt")
    Traceback (most recent call last):
    FileNotFoundError: no checkpoint at 'nowhere.ckpt'
    """
    read = _of_safetensors if Path(path).suffix in (".safetensors", ".sft") else _of_checkpoint
    content = read(path, weights)
    said = content.sample_shape if shape is None else shape
    if not content.weights or said is None:
        raise ValueError(
            f"{str(path)!r} was not written by a DiffusionModule (no network weights or no "
            "sample_shape in it); "
            "sample from it in Python, with Sampler, or from the folder of its diffusers pipeline"
        )
    of_sample = sample_shape(said)
    if isinstance(network, str):
        network = import_network(network)
    if network is None:
        if content.network is None:
            raise ValueError(
                f"{str(path)!r} holds a network that is not a diffusers model; name what makes it "
                "with --network package.module:factory"
            )
        network = build_network(content.network, content.weights)
    load_weights(network, content.weights, repr(str(path)))
    _require_fit(network, of_sample)
    return Loaded(network.eval(), content.schedule, of_sample)


def sample_shape(value: Any) -> tuple[int, ...]:
    """Return ``value`` as the shape of one sample.

    Raises:
        ValueError: it is not a shape, or the sample would be too large.

    >>> sample_shape([3, 32, -1])
    Traceback (most recent call last):
    ValueError: a sample_shape has one to four positive sizes, at most 16777216 numbers in all, ...
    """
    few = isinstance(value, list | tuple) and 1 <= len(value) <= 4
    sizes = tuple(whole("a size of sample_shape", size) for size in value) if few else ()
    if not sizes or min(sizes) < 1 or math.prod(sizes) > LARGEST_SAMPLE:
        got = f"[{', '.join(map(shown, sizes))}]" if sizes else shown(value)
        raise ValueError(
            f"a sample_shape has one to four positive sizes, at most {LARGEST_SAMPLE} numbers in "
            f"all, got {got}"
        )
    return sizes


@dataclass(frozen=True)
class _Content:
    weights: dict[str, Tensor]
    schedule: NoiseSchedule
    network: Mapping[str, Any] | None
    sample_shape: Any


def _of_checkpoint(path: str | Path, which: str | None) -> _Content:
    checkpoint = read_checkpoint(path)
    schedule = schedule_of(checkpoint, path)
    has_both = isinstance(checkpoint.get(WEIGHTS["raw"]), Mapping)
    if which is not None:
        lookup("weights", which, WEIGHTS)
    if which == "ema" and not has_both:
        raise ValueError(
            f"{str(path)!r} holds no EMA weights, train with EMA(); or take --weights raw"
        )
    key = WEIGHTS["raw"] if which == "raw" and has_both else WEIGHTS["ema"]
    config = checkpoint.get("network")
    if config is not None and not isinstance(config, Mapping):
        raise ValueError(
            f"the network config of {str(path)!r} must be a mapping of settings, got "
            f"{shown(config)}"
        )
    return _Content(
        weights_of(checkpoint.get(key), f"{key} of {str(path)!r}"),
        schedule,
        config,
        checkpoint.get("sample_shape"),
    )


def _of_safetensors(path: str | Path, which: str | None) -> _Content:
    if which == "raw":
        raise ValueError(f"{str(path)!r} holds one set of weights; leave out --weights")
    header = read_header(path)
    text = header.metadata.get(OWN_KEY)
    beside = (
        NoiseSchedule.from_config(parse_json(text)) if text is not None else schedule_beside(path)
    )
    if beside is None:
        shared = sidecar_folder(path).url
        raise ValueError(
            f"{str(path)!r} does not say its noise schedule; if you know it, put it there: "
            f"schedule.save_pretrained({shared!r})"
        )
    said = {
        key: parse_json(header.metadata[key])
        for key in (NETWORK_KEY, SHAPE_KEY)
        if key in header.metadata
    }
    config = said.get(NETWORK_KEY)
    return _Content(
        weights_of(read_tensors(path), repr(str(path))),
        beside,
        None if config is None else mapping("the network config", config),
        said.get(SHAPE_KEY),
    )


def weights_of(state: Any, source: str) -> dict[str, Tensor]:
    """Return the network's weights from a state dict, by their names in the network.

    Raises:
        ValueError: the state dict is not a mapping of tensors by name.

    >>> weights_of({"network.w": torch.ones(1), "other": 1}, "a.ckpt")
    {'w': tensor([1.])}
    """
    if not isinstance(state, Mapping):
        raise ValueError(
            f"{source} must be a mapping of weights by name, got {shown(state)}; no "
            "DiffusionModule wrote it"
        )
    found: dict[str, Tensor] = {}
    for name, value in mapping(source, state).items():
        if name.startswith(PREFIX):
            found[name.removeprefix(PREFIX)] = _whole_tensor(f"{name} in {source}", value)
    return found


def _whole_tensor(what: str, value: Any) -> Tensor:
    if (
        not isinstance(value, Tensor)
        or value.layout != torch.strided
        or value.device.type == "meta"
    ):
        raise ValueError(
            f"{what} must be a tensor of numbers, got {shown(value)}; the file is damaged"
        )
    many = value.numel() > LARGEST_SAMPLE  # small tensors may be expanded views
    if many and value.numel() * value.element_size() > value.untyped_storage().nbytes():
        raise ValueError(
            f"{what} shows {value.numel()} numbers of {value.untyped_storage().nbytes()} bytes; "
            "save it with contiguous()"
        )
    return value


def _require_fit(network: nn.Module, shape: tuple[int, ...]) -> None:
    """Raise ValueError for a sample shape that a diffusers model was not built for."""
    config = getattr(network, "config", None)
    config = config if isinstance(config, Mapping) else {}
    channels, side = config.get("in_channels"), config.get("sample_size")
    name = type(network).__name__
    count = next(
        (dimensions for start, dimensions in DIMENSIONS.items() if name.startswith(start)),
        len(shape),
    )
    if len(shape) != count:
        raise ValueError(
            f"a sample of {name} has {count} dimensions, and the sample_shape is {shape}; give "
            "--shape"
        )
    if isinstance(channels, int) and channels != shape[0]:
        raise ValueError(
            f"the network takes {channels} channels, and the sample_shape is {shape}; one of the "
            "two is wrong"
        )
    sides: list[Any] = []
    if side is not None:
        many = isinstance(side, list | tuple)
        sides = list(side) if many else [side] * (len(shape) - 1)
    if not all(isinstance(length, int) and length > 0 for length in sides):
        raise ValueError(
            f"sample_size of the network's config must be whole numbers above 0, got {shown(side)}"
        )
    made_for = math.prod(sides) * LARGEST_SIDES ** len(sides)
    if sides and math.prod(shape[1:]) > made_for:
        raise ValueError(
            f"the sample_shape is {shape}, and the network was made for sides of {side}; no more "
            f"than {LARGEST_SIDES} times as long "
            "ones are drawn from a file, give --shape"
        )
