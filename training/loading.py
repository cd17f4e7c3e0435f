"""Load a trained network with its schedule from a checkpoint, with nothing but the checkpoint's own files."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from torch import nn

from ..noising import NoiseSchedule
from .checkpoints import read_checkpoint, schedule_of
from .networks import build_network, import_network

PREFIX = "network."  # where DiffusionModule keeps its network


@dataclass(frozen=True)
class Loaded:
    """A network in eval mode, the schedule it was trained on, and the shape of one sample."""

    network: nn.Module
    schedule: NoiseSchedule
    sample_shape: tuple[int, ...]


def load_checkpoint(path: str | Path, network: str | nn.Module | None = None) -> Loaded:
    """Load what a DiffusionModule's checkpoint holds: the network (EMA weights, where they were averaged) and its schedule.

    ``network``: for one that is not a diffusers model, the module to load into, or 'package.module:factory'.
    Raises FileNotFoundError, and ValueError for a file that is no checkpoint or that lacks a schedule or a network config.

    >>> load_checkpoint("nowhere.ckpt")
    Traceback (most recent call last):
    FileNotFoundError: no checkpoint at 'nowhere.ckpt'
    """
    checkpoint = read_checkpoint(path)
    schedule = schedule_of(checkpoint, path)
    weights = {k.removeprefix(PREFIX): v for k, v in checkpoint["state_dict"].items() if k.startswith(PREFIX)}
    shape, config = checkpoint.get("sample_shape"), checkpoint.get("network")
    if not weights or not shape:
        raise ValueError(
            f"{str(path)!r} was not written by a DiffusionModule (no network weights or no sample_shape in it); "
            "sample from it in Python, with Sampler"
        )
    if isinstance(network, str):
        network = import_network(network)
    if network is None:
        if config is None:
            raise ValueError(
                f"{str(path)!r} holds a network that is not a diffusers model; name what makes it with --network package.module:factory"
            )
        network = build_network(config)
    network.load_state_dict(weights)
    return Loaded(network.eval(), schedule, tuple(shape))
