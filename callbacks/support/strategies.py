"""Calling the model outside ``training_step``, per strategy.

- One device, DDP: call the bare module. DDP's wrapper would broadcast buffers in every forward.
- FSDP1, ZeRO-3: call through the wrapper. Only its forward gathers the parameters of the outermost
  unit.
- FSDP2: call the module, because the hooks are in the modules themselves.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.strategies import (
    DDPStrategy,
    DeepSpeedStrategy,
    FSDPStrategy,
    ModelParallelStrategy,
    SingleDeviceStrategy,
    SingleDeviceXLAStrategy,
    Strategy,
    XLAStrategy,
)
from torch import nn

from ...training.loops.forward import ForwardMode, guarded

# the first match counts: some of these classes inherit from others
_KINDS: tuple[tuple[type[Strategy], ForwardMode | None], ...] = (
    (SingleDeviceXLAStrategy, None),
    (XLAStrategy, None),
    (FSDPStrategy, ForwardMode(sharded=True, wrapped=True)),
    (ModelParallelStrategy, ForwardMode(sharded=True)),
    (DDPStrategy, ForwardMode()),
    (SingleDeviceStrategy, ForwardMode()),
)


def forward_mode_of(strategy: Strategy) -> ForwardMode:
    """Return how to call the model under this strategy.

    Raises:
        ValueError: the strategy is not supported.

    >>> forward_mode_of(FSDPStrategy())
    ForwardMode(sharded=True, wrapped=True, exit_after=None)
    """
    # ZeRO-1 and 2 keep whole parameters on each rank
    if isinstance(strategy, DeepSpeedStrategy):
        return ForwardMode(sharded=True, wrapped=True) if strategy.zero_stage_3 else ForwardMode()
    found = next(
        (forward_mode for kind, forward_mode in _KINDS if isinstance(strategy, kind)), None
    )
    if found is None:
        raise ValueError(
            "ValidationSampling draws under single-device, DDP, FSDP, ModelParallel (FSDP2) and "
            "DeepSpeed strategies, "
            f"got {type(strategy).__name__}; use one of these, or leave the callback out"
        )
    return found


def share_of(strategy: Strategy, world_size: int, rank: int) -> tuple[int, int]:
    """Return (number of shares, index of this rank's share) of the images.

    Ranks of one tensor-parallel group draw the same share.

    >>> share_of(DDPStrategy(), world_size=4, rank=3)
    (4, 3)
    """
    if isinstance(strategy, ModelParallelStrategy):
        mine = strategy.distributed_sampler_kwargs
        return mine["num_replicas"], mine["rank"]
    return world_size, rank


def root_of(trainer: Trainer, module: LightningModule) -> nn.Module:
    """Return the outermost module, such as FSDP's wrapper around the LightningModule.

    The LightningModule has no reference to its wrapper.
    """
    root = trainer.strategy.model
    return root if isinstance(root, nn.Module) else module


def wrap_forward(
    trainer: Trainer,
    module: LightningModule,
    forward_mode: ForwardMode,
    function: Callable[..., Any],
) -> Callable[..., Any]:
    """Wrap ``function``, which uses ``module`` or parts of it, for calls between training steps.

    See :func:`~alphabar.training.loops.forward.guarded` for errors inside a sharded model.
    """

    def through_wrapper(*args: Any, **kwargs: Any) -> Any:
        return _through_wrapper(trainer.strategy.model, module, lambda: function(*args, **kwargs))

    return guarded(through_wrapper if forward_mode.wrapped else function, forward_mode)


def _through_wrapper(wrapper: Any, module: LightningModule, call: Callable[[], Any]) -> Any:
    """Run ``call`` inside the forward of the wrapper around ``module``.

    ``module.forward`` is replaced for the wrapper's call and restored before ``call`` runs.
    """
    own = module.__dict__.get("forward")

    def restore() -> None:
        if own is None:
            module.__dict__.pop("forward", None)
        else:
            module.__dict__["forward"] = own

    def forward(_: Any) -> Any:
        restore()
        # arguments are in the closure: the wrapper would convert timesteps to half precision
        return call()

    module.__dict__["forward"] = forward
    try:
        return wrapper(0)
    finally:
        restore()
