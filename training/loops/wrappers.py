"""Wrappers around a network in a training loop: copies of data parallelism, shards, compilation."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel
from torch.nn.parallel import DataParallel, DistributedDataParallel

from .forward import ForwardMode

COPIES = (DistributedDataParallel, DataParallel)
"""Wrappers of networks that every rank holds whole."""


def unwrapped(network: nn.Module) -> nn.Module:
    """Return the network inside DDP, DataParallel, FSDP, DeepSpeed or the wrapper of Fabric.

    A compiled network stays compiled.

    >>> net = nn.Linear(1, 1)
    >>> unwrapped(net) is net
    True
    >>> unwrapped(DataParallel(net)) is net
    True
    """
    inner: Any = getattr(network, "_orig_mod", network)
    if isinstance(inner, COPIES) or is_of_fabric(inner) or _is_sharding(inner):
        return unwrapped(inner.module)
    return network


def is_of_fabric(network: nn.Module) -> bool:
    """Return whether the network is wrapped by Lightning Fabric.

    >>> is_of_fabric(nn.Linear(1, 1))
    False
    """
    return _has_class(network, "_FabricModule")  # by name: Lightning takes seconds to import


def forward_mode_of_wrappers(network: nn.Module) -> ForwardMode:
    """Return how to call a network, by its wrappers.

    - FSDP, ZeRO-3: through the wrapper, which gathers the parameters.
    - FSDP2: the hooks are in the modules themselves.

    >>> forward_mode_of_wrappers(nn.Linear(1, 1))
    ForwardMode(sharded=False, wrapped=False, exit_after=None)
    """
    parts = list(network.modules())
    if any(isinstance(part, FullyShardedDataParallel) for part in parts) or any(
        hasattr(parameter, "ds_id") for parameter in network.parameters()
    ):
        return ForwardMode(sharded=True, wrapped=True)
    return ForwardMode(sharded=any(isinstance(part, FSDPModule) for part in parts))


def _is_sharding(network: nn.Module) -> bool:
    return isinstance(network, FullyShardedDataParallel) or _has_class(network, "DeepSpeedEngine")


def _has_class(network: nn.Module, name: str) -> bool:
    return any(kind.__name__ == name for kind in type(network).__mro__)
