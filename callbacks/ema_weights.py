"""Context manager that samples with EMA weights, for every common EMA implementation.

The averages are copied into the live module, and the live weights are restored afterwards. So the
network that samples is the network that trains, with its hooks, wrappers and shards. The averages
are only read. Training continues bit-identically.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, Protocol, cast, runtime_checkable

from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from ..training.ema.averages import Pairs
from ..training.loops.sharding import reshard, values_swapped
from .support.strategies import root_of


@runtime_checkable
class KeepsEMA(Protocol):
    """Protocol of a callback that keeps averaged weights.

    ``ema_pairs`` returns pairs (live tensor, average). It is empty before the first update.
    """

    def ema_pairs(self, trainer: Trainer, module: LightningModule) -> Pairs: ...


@contextmanager
def ema_weights(trainer: Trainer, module: LightningModule) -> Generator[bool, None, None]:
    """Use the EMA weights in ``module`` inside the block; yield whether EMA weights were found.

    Searches in this order:

    1. a callback with ``ema_pairs``, such as :class:`EMA`;
    2. Lightning's ``WeightAveraging``;
    3. the module's own ``ema_scope()`` (sgm);
    4. attributes that are a diffusers ``EMAModel`` or a torch ``AveragedModel``.

    If there is no average, or it has not been updated yet, yields False and changes nothing. The
    weights are restored bit for bit, also after an error. Under FSDP every rank must enter. Do not
    use it between ``on_validation_epoch_start`` and ``on_validation_epoch_end`` of Lightning's
    ``WeightAveraging``: that callback has already swapped the weights there.

    Raises:
        ValueError: the live part of the module for an average cannot be found.

    >>> class Own(LightningModule):
    ...     def __init__(self):
    ...         super().__init__()
    ...         self.net = nn.Linear(1, 1)
    ...         self.average = AveragedModel(self.net)
    >>> module = Own()
    >>> with ema_weights(
    ...     Trainer(logger=False, accelerator="cpu", enable_checkpointing=False), module
    ... ) as used:
    ...     used
    False
    """
    root = root_of(trainer, module)
    reshard(root)  # the averages belong to the sharded parameters
    callbacks: list[Any] = cast(Any, trainer).callbacks
    for callback in callbacks:
        if isinstance(callback, KeepsEMA):
            pairs = callback.ema_pairs(trainer, module)
            break
        if isinstance(getattr(callback, "_average_model", None), AveragedModel):
            pairs = _of_averaged_model(
                callback._average_model, module, buffers=callback._use_buffers
            )
            break
    else:
        if callable(getattr(module, "ema_scope", None)):
            with _own_scope(root, module) as used:
                yield used
            return
        pairs = _of_attributes(module)
    with values_swapped(root, pairs) if pairs else nullcontext():
        yield bool(pairs)


@contextmanager
def _own_scope(root: nn.Module, module: Any) -> Generator[bool, None, None]:
    """Enter the module's ``ema_scope``, unless sgm's flags say that there is no average."""
    # sgm sets num_updates to -1 when it does not count updates
    updates = getattr(getattr(module, "model_ema", None), "num_updates", 1)
    if not getattr(module, "use_ema", True) or int(updates) == 0:
        yield False
        return
    with module.ema_scope():
        try:
            yield True
        finally:
            reshard(root)  # must run before the scope restores the live weights


def _of_attributes(module: LightningModule) -> Pairs:
    """Return the averages that are attributes of the module (diffusers or torch classes)."""
    found: list[tuple[Tensor, Tensor]] = []
    attributes: dict[str, Any] = {**vars(module), **module._modules}
    for name, value in attributes.items():
        if isinstance(value, AveragedModel):
            found += _of_averaged_model(
                value, _live_part(module, name, list(value.module.parameters()))
            )
        elif (
            isinstance(getattr(value, "shadow_params", None), list)
            and getattr(value, "optimization_step", 0) > 0
        ):
            found += zip(
                _live_part(module, name, value.shadow_params).parameters(),
                value.shadow_params,
                strict=True,
            )
    return found


def _of_averaged_model(
    average: AveragedModel, live: nn.Module, buffers: bool | None = None
) -> Pairs:
    if int(average.n_averaged) == 0:  # not updated yet: it holds the initial weights
        return []
    pairs: list[tuple[Tensor, Tensor]] = list(
        zip(live.parameters(), average.module.parameters(), strict=True)
    )
    if average.use_buffers if buffers is None else buffers:
        pairs += zip(live.buffers(), average.module.buffers(), strict=True)
    return [(weight, value.detach()) for weight, value in pairs]


def _live_part(module: LightningModule, name: str, averages: Sequence[Tensor]) -> nn.Module:
    """Return the submodule whose parameter shapes match ``averages``.

    If several submodules match, the attribute name ``name`` decides (``ema_student`` selects
    ``student``).

    >>> class Own(LightningModule):
    ...     def __init__(self):
    ...         super().__init__()
    ...         self.teacher, self.student = nn.Linear(1, 1), nn.Linear(1, 1)
    >>> module = Own()
    >>> _live_part(module, "ema_student", list(module.teacher.parameters())) is module.student
    True
    """
    shapes = [tensor.shape for tensor in averages]
    averaged = {
        id(part)
        for own in module.modules()
        if isinstance(own, AveragedModel)
        for part in own.modules()
    }
    parts: dict[tuple[int, ...], tuple[str, nn.Module]] = {}
    for path, part in module.named_modules():
        weights = list(part.parameters())
        if id(part) not in averaged and [weight.shape for weight in weights] == shapes:
            # a wrapper and its wrapped module share the same weights: count them once
            parts.setdefault(tuple(map(id, weights)), (path, part))
    named = [
        part
        for path, part in parts.values()
        if path and path.split(".")[-1] in name.split("_ema")[0].split("ema_")
    ]
    candidates = named if len(parts) > 1 else [part for _, part in parts.values()]
    if len(candidates) == 1:
        return candidates[0]
    raise ValueError(
        f"{type(module).__name__}.{name} averages {len(shapes)} parameters, and "
        f"{len(parts) or 'no'} parts of the module have "
        "such: name it ema_<the part>, e.g. ema_unet for unet"
    )
