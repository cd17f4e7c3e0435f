"""This rank's part of a parameter, when the model is copied (one device, DDP) or sharded (FSDP).

Each rank averages its own part, so an average costs only that rank's share of memory and no
communication. Whole averages are assembled only for a file. After a forward without gradients, FSDP
leaves its outermost unit unsharded. The parameters of that unit are then not the ones that the
optimizer updates. So call :func:`reshard` before every read and write.
"""

from __future__ import annotations

from collections.abc import Generator, Iterable, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel
from torch.distributed.tensor import DTensor, distribute_tensor

_WRAPPERS = ("_fsdp_wrapped_module.", "_checkpoint_wrapped_module.", "_orig_mod.")


def reshard(root: nn.Module) -> None:
    """Reshard every FSDP unit; do nothing if no unit is unsharded or the model is not sharded.

    >>> reshard(nn.Linear(2, 2))
    """
    for unit in root.modules():
        if isinstance(unit, FSDPModule):
            unit.reshard()
        elif isinstance(unit, FullyShardedDataParallel) and unit._handle is not None:
            from torch.distributed.fsdp._runtime_utils import _reshard  # FSDP1 has no public call

            # without _local_shard there was no forward yet, so there is nothing to undo
            if hasattr(unit._handle.flat_param, "_local_shard"):
                _reshard(unit, unit._handle, True)


def local(tensor: Tensor) -> Tensor:
    """Return this rank's part of a tensor, sharing its memory; all of it if it is not sharded.

    >>> weight = torch.ones(2)
    >>> local(weight).data_ptr() == weight.data_ptr()
    True
    """
    tensor = tensor.detach()
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def clean_name(name: str) -> str:
    """Return a parameter's name without the prefixes of wrappers, as checkpoints store it.

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
    """Copy values into parameters inside the block, then restore the parameters' own values.

    The values are restored bit for bit, also after an error. ``root`` is the outermost module.
    ``pairs`` are (parameter, this rank's part of the new values, of any floating dtype and device).
    The new values are only read.

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
        # otherwise the first training step would use the swapped values in the outermost unit
        reshard(root)
        copy_values(zip([parameter for parameter, _ in pairs], kept, strict=True))


@torch.no_grad()
def copy_values(pairs: Iterable[tuple[Tensor, Tensor]]) -> None:
    """Copy this rank's part of each value into its parameter, converted to the parameter's dtype.

    >>> weight = torch.zeros(1, dtype=torch.bfloat16)
    >>> copy_values([(weight, torch.ones(1))])
    >>> weight.item()
    1.0
    """
    for parameter, values in pairs:
        local(parameter).copy_(values)


# -- whole tensors, for files ----------------------------------------------------------------------


class Layout:
    """Assemble whole tensors from the parts of all ranks, and split whole tensors into parts.

    Every rank must call it. A part is any tensor with the local shape of its parameter, for example
    the float32 average of a bfloat16 parameter.

    >>> net = nn.Linear(2, 2)
    >>> Layout(net).assemble(net.weight, torch.ones(2, 2)).shape
    torch.Size([2, 2])
    """

    def __init__(self, root: nn.Module) -> None:
        reshard(root)
        # FSDP1: each rank holds a contiguous run of the flattened parameter, in rank order
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
        """Assemble the whole tensor from each rank's ``part``.

        The result is on the CPU if the parameter is sharded.
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
        """Return this rank's part of a whole tensor.

        It is on the parameter's device and has the dtype of ``whole``.
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
    """Return whether a state dict holds shards, which each rank writes, and not whole tensors.

    >>> is_sharded_state({"w": torch.ones(1)})
    False
    """
    return any(
        isinstance(value, DTensor) or type(value).__name__ == "ShardedTensor"
        for value in state.values()
    )


def require_parameters(root: nn.Module) -> None:
    """Raise ValueError if parameters are not accessible.

    This is the case for FSDP with flat parameters and for DeepSpeed stage 3.

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
