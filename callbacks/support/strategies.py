"""Calling the model outside ``training_step``, per strategy.

- One device, DDP: call the bare module. DDP's wrapper would broadcast buffers in every forward.
- FSDP1, ZeRO-3: call through the wrapper. Only its forward gathers the parameters of the outermost
  unit.
- FSDP2: call the module, because the hooks are in the modules themselves.

If the model is sharded, every forward is a collective, so all ranks must make the same number of
forwards. If a forward fails on one rank, the ranks cannot vote on it, because the other ranks wait
in that forward.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist
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


class ShardedForwardError(RuntimeError):
    """A forward of a sharded model failed.

    It ends training on every rank, because the ranks can no longer exchange errors.
    """


@dataclass(frozen=True)
class ForwardMode:
    """How to call the model outside ``training_step``.

    Args:
        sharded: a forward is a collective.
        wrapped: a forward must go through the strategy's wrapper.
        exit_after: seconds between an error in a sharded forward and the end of the process. None:
            the process does not end.
    """

    sharded: bool = False
    wrapped: bool = False
    exit_after: float | None = None


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


def wrap_forward(
    trainer: Trainer,
    module: LightningModule,
    forward_mode: ForwardMode,
    function: Callable[..., Any],
) -> Callable[..., Any]:
    """Wrap ``function``, which uses ``module`` or parts of it, for calls between training steps.

    If the model is sharded, an error inside ``function`` is raised as ShardedForwardError. The
    other ranks wait in that forward until this process ends or the process group's timeout has
    passed. With ``forward_mode.exit_after`` this process ends in any case.
    """
    if not forward_mode.sharded:
        return function

    def call(*args: Any, **kwargs: Any) -> Any:
        try:
            if forward_mode.wrapped:
                return _through_wrapper(
                    trainer.strategy.model, module, lambda: function(*args, **kwargs)
                )
            return function(*args, **kwargs)
        except Exception as error:
            if forward_mode.exit_after is not None:
                _end_soon(forward_mode.exit_after)
            raise ShardedForwardError(
                f"{type(error).__name__}: {error} (inside a forward of the sharded model: training "
                "ends on all ranks; "
                "where this speaks of a lost connection, another rank failed first)"
            ) from error

    return call


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


def _end_soon(seconds: float) -> None:
    """End this process after ``seconds``, so that loggers can finish in this time.

    Aborting the process group instead would not reach the other ranks.
    """
    if dist.is_initialized() and dist.get_world_size() > 1:
        timer = threading.Timer(seconds, os._exit, [1])
        timer.daemon = True  # does not delay a normal exit
        timer.start()
