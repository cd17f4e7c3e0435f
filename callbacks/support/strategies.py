"""How a strategy's model is entered outside a training step: which callable, whether ranks must
keep step, who shares.

Under one device and DDP the bare module is called: DDP's wrapper would broadcast buffers in every
forward. FSDP1 and ZeRO-3 gather the parameters of their outermost unit in the wrapper's forward
alone, so all calls go through it. FSDP2 has its hooks in the modules themselves. Where the model is
sharded every forward is a collective: ranks make as many of them, and what fails inside one on one
rank cannot be voted on, because the others are waiting in that forward.
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
    """A forward of a sharded model failed; it ends training on every rank, since ranks can no
    longer agree on anything.
    """


@dataclass(frozen=True)
class ForwardMode:
    """How the model is called outside ``training_step``.

    ``sharded``: a forward is a collective. ``wrapped``: it must go through the strategy's wrapper.
    ``exit_after``: seconds after an error in a sharded forward, after which the process ends; None:
    it does not.
    """

    sharded: bool = False
    wrapped: bool = False
    exit_after: float | None = None


_KINDS: tuple[
    tuple[type[Strategy], ForwardMode | None], ...
] = (  # the first that fits: some inherit from others
    (SingleDeviceXLAStrategy, None),
    (XLAStrategy, None),
    (FSDPStrategy, ForwardMode(sharded=True, wrapped=True)),
    (ModelParallelStrategy, ForwardMode(sharded=True)),
    (DDPStrategy, ForwardMode()),
    (SingleDeviceStrategy, ForwardMode()),
)


def forward_mode_of(strategy: Strategy) -> ForwardMode:
    """Return how this strategy's model is entered; raises ValueError for a strategy that is not
    supported.

    >>> forward_mode_of(FSDPStrategy())
    ForwardMode(sharded=True, wrapped=True, exit_after=None)
    """
    # ZeRO-1 and 2 leave the parameters whole on each rank
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
    """Return (number of shares, this rank's share) of the images: ranks of one tensor-parallel
    group draw the same.

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
    """Return ``function`` as it may be called between training steps; it uses (parts of)
    ``module``.

    Where the model is sharded, an error inside it is raised as ShardedForwardError. The other ranks
    wait in that forward until this process ends or the process group's timeout has passed;
    ``forward_mode.exit_after`` ends it for certain.
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
    """Call within the forward of the wrapper around ``module``, whose own forward is what was there
    again by then.
    """
    own = module.__dict__.get("forward")

    def restore() -> None:
        if own is None:
            module.__dict__.pop("forward", None)
        else:
            module.__dict__["forward"] = own

    def forward(_: Any) -> Any:
        restore()
        # takes its arguments along: the wrapper would convert times to half precision
        return call()

    module.__dict__["forward"] = forward
    try:
        return wrapper(0)
    finally:
        restore()


def _end_soon(seconds: float) -> None:
    """End this process after so many seconds, which loggers may use; aborting the process group
    would not reach other ranks.
    """
    if dist.is_initialized() and dist.get_world_size() > 1:
        timer = threading.Timer(seconds, os._exit, [1])
        timer.daemon = True  # an orderly exit before that is as good
        timer.start()
