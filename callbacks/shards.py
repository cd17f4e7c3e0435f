"""What a rank holds of a parameter, under strategies that copy the model (one device, DDP) and that shard it (FSDP).

Averages are kept of what a rank holds, so they cost a rank's share of memory and no communication; they are put together
only for a file. After a forward without gradients FSDP leaves its outermost unit unsharded: its parameters are then not
what the optimizer steps, so :func:`reshard` comes before every reading and writing.
"""

from __future__ import annotations

from collections.abc import Generator, Iterable, Sequence
from contextlib import contextmanager

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel
from torch.distributed.tensor import DTensor

_WRAPPERS = ("_fsdp_wrapped_module.", "_checkpoint_wrapped_module.", "_orig_mod.")


def root_of(trainer: Trainer, module: LightningModule) -> nn.Module:
    """Return the outermost module: FSDP's wrapper is around the LightningModule, which does not know it."""
    root = trainer.strategy.model
    return root if isinstance(root, nn.Module) else module


def reshard(root: nn.Module) -> None:
    """Give every FSDP unit its shards back; nothing where none is unsharded, or nothing is sharded.

    >>> reshard(nn.Linear(2, 2))
    """
    for unit in root.modules():
        if isinstance(unit, FSDPModule):
            unit.reshard()
        elif isinstance(unit, FullyShardedDataParallel) and unit._handle is not None:
            from torch.distributed.fsdp._runtime_utils import _reshard  # FSDP1 has no public call

            _reshard(unit, unit._handle, True)


def local(tensor: Tensor) -> Tensor:
    """Return this rank's part of a tensor, sharing its memory: the whole of it where it is not sharded.

    >>> weight = torch.ones(2)
    >>> local(weight).data_ptr() == weight.data_ptr()
    True
    """
    tensor = tensor.detach()
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def clean_name(name: str) -> str:
    """Return a parameter's name without what wrappers put into it, as it stands in checkpoints.

    >>> clean_name("_orig_mod.network._fsdp_wrapped_module.weight")
    'network.weight'
    """
    for wrapper in _WRAPPERS:
        name = name.replace(wrapper, "")
    return name


@contextmanager
def values_swapped(root: nn.Module, pairs: Sequence[tuple[Tensor, Tensor]]) -> Generator[None, None, None]:
    """Copy values into parameters, and put the parameters' own back at the end, to the last bit, also after an error.

    ``pairs``: (parameter, this rank's part of other values for it, of any floating dtype and device); the latter is only
    read. ``root``: the outermost module.

    >>> net = nn.Linear(1, 1, bias=False)
    >>> before = net.weight.item()
    >>> with values_swapped(net, [(net.weight, torch.full((1, 1), 7.0))]):
    ...     print(net.weight.item())
    7.0
    >>> net.weight.item() == before
    True
    """
    reshard(root)
    kept = [local(parameter).clone() for parameter, _ in pairs]
    try:
        copy_values(pairs)
        yield
    finally:
        reshard(root)  # else the first training step would still see what was swapped in, in the outermost unit
        copy_values(zip([parameter for parameter, _ in pairs], kept, strict=True))


@torch.no_grad()
def copy_values(pairs: Iterable[tuple[Tensor, Tensor]]) -> None:
    """Copy values into parameters, each this rank's part, converted to the parameter's dtype.

    >>> weight = torch.zeros(1, dtype=torch.bfloat16)
    >>> copy_values([(weight, torch.ones(1))])
    >>> weight.item()
    1.0
    """
    for parameter, values in pairs:
        local(parameter).copy_(values)
