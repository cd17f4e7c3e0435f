"""What a rank holds of a parameter, under strategies that copy the model (one device, DDP) and that
shard it (FSDP).

Averages are kept of what a rank holds, so they cost a rank's share of memory and no communication;
they are put together only for a file. After a forward without gradients FSDP leaves its outermost
unit unsharded: its parameters are then not what the optimizer steps, so :func:`reshard` comes
before every reading and writing.
"""

from __future__ import annotations

from collections.abc import Generator, Iterable, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel
from torch.distributed.tensor import DTensor, distribute_tensor

_WRAPPERS = ("_fsdp_wrapped_module.", "_checkpoint_wrapped_module.", "_orig_mod.")


def root_of(trainer: Trainer, module: LightningModule) -> nn.Module:
    """Return the outermost module: FSDP's wrapper is around the LightningModule, which does not
    know it.
    """
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

            # else there was no forward yet, and nothing to undo
            if hasattr(unit._handle.flat_param, "_local_shard"):
                _reshard(unit, unit._handle, True)


def local(tensor: Tensor) -> Tensor:
    """Return this rank's part of a tensor, sharing its memory: the whole of it where it is not
    sharded.

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
def values_swapped(
    root: nn.Module, pairs: Sequence[tuple[Tensor, Tensor]]
) -> Generator[None, None, None]:
    """Copy values into parameters, and put the parameters' own back at the end, to the last bit,
    also after an error.

    ``pairs``: (parameter, this rank's part of other values for it, of any floating dtype and
    device); the latter is only read. ``root``: the outermost module.

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
        # else the first training step would still see what was swapped in, in the outermost unit
        reshard(root)
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


# -- whole tensors, for files ----------------------------------------------------------------------


class Layout:
    """Where the parts of each parameter lie: puts parts together and takes whole tensors apart.
    Every rank must call it.

    The parts are any tensors of the parameters' local shapes, float32 averages of bfloat16
    parameters say.

    >>> net = nn.Linear(2, 2)
    >>> Layout(net).assemble(net.weight, torch.ones(2, 2)).shape
    torch.Size([2, 2])
    """

    def __init__(self, root: nn.Module) -> None:
        reshard(root)
        # of FSDP1: a rank holds a run of the flattened parameter, in the order of the ranks
        self._flattened: dict[int, tuple[torch.Size, Any]] = {}
        for unit in root.modules():
            if isinstance(unit, FullyShardedDataParallel) and unit._handle is not None:
                flat: Any = unit._handle.flat_param
                if unit._handle.uses_sharded_strategy:
                    found = zip(flat._params, flat._shapes, strict=True)
                    self._flattened |= {
                        id(own): (shape, unit.process_group) for own, shape in found
                    }

    def assemble(self, parameter: Tensor, part: Tensor) -> Tensor:
        """Return the whole tensor of which this rank has ``part``; of sharded parameters on the
        CPU.
        """
        if isinstance(parameter, DTensor):
            mesh, placements = parameter.device_mesh, parameter.placements
            whole = DTensor.from_local(
                part,
                mesh,
                placements,
                run_check=False,
                shape=parameter.shape,
                stride=parameter.stride(),
            )
            return whole.full_tensor().cpu()
        if id(parameter) not in self._flattened:
            return part
        shape, group = self._flattened[id(parameter)]
        lengths = _lengths(part, group)
        padded = part.new_zeros(max(lengths))
        padded[: part.numel()] = part.flatten()
        runs = [torch.empty_like(padded) for _ in lengths]
        dist.all_gather(runs, padded, group=group)
        return (
            torch.cat([run[:length] for run, length in zip(runs, lengths, strict=True)])
            .view(shape)
            .cpu()
        )

    def part(self, parameter: Tensor, whole: Tensor) -> Tensor:
        """Return this rank's part of a whole tensor, on the parameter's device, in the dtype of
        ``whole``.
        """
        whole = whole.detach().to(parameter.device)
        if isinstance(parameter, DTensor):
            return distribute_tensor(whole, parameter.device_mesh, parameter.placements).to_local()
        if id(parameter) not in self._flattened:
            return whole
        _, group = self._flattened[id(parameter)]
        first = sum(_lengths(parameter, group)[: dist.get_rank(group)])
        return whole.flatten()[first : first + parameter.numel()]


def _lengths(part: Tensor, group: Any) -> list[int]:
    own = torch.tensor([part.numel()], device=part.device)
    found = [torch.empty_like(own) for _ in range(dist.get_world_size(group))]
    dist.all_gather(found, own, group=group)
    return [int(length) for length in found]


def is_sharded_state(state: Mapping[str, Any]) -> bool:
    """Return whether a state dict holds shards, to be written by each rank, rather than whole
    tensors.

    >>> is_sharded_state({"w": torch.ones(1)})
    False
    """
    return any(
        isinstance(value, DTensor) or type(value).__name__ == "ShardedTensor"
        for value in state.values()
    )


def require_parameters(root: nn.Module) -> None:
    """Raise ValueError where parameters are not to be had: FSDP with flat parameters, DeepSpeed's
    stage 3.

    >>> require_parameters(nn.Linear(2, 2))
    """
    for unit in root.modules():
        if (
            isinstance(unit, FullyShardedDataParallel)
            and unit._handle is not None
            and not unit._use_orig_params
        ):
            raise ValueError(
                "averages need FSDP with use_orig_params=True, Lightning's default; leave out the "
                "False"
            )
    if any(hasattr(parameter, "ds_id") for parameter in root.parameters()):
        raise ValueError(
            "averages are not possible under DeepSpeed's stage 3; use stage 2, FSDP or DDP"
        )
