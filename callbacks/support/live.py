"""A Trainer and its module, as previews see them."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.plugins import MixedPrecision

from ...training.loops.forward import ForwardMode
from ...training.loops.loop import LiveModel, Loop
from ..ema_weights import ema_weights
from .strategies import root_of, share_of, wrap_forward


def loop_of_trainer(trainer: Trainer) -> Loop:
    """Return a Trainer as the loop that previews interrupt."""
    return Loop(
        trainer.global_rank,
        trainer.world_size,
        trainer.strategy.root_device,
        owner=trainer,
        trackers=lambda: trainer.loggers,
        share=share_of(trainer.strategy, trainer.world_size, trainer.global_rank),
        shows_progress=trainer.progress_bar_callback is not None,
    )


def live_module(
    trainer: Trainer,
    module: LightningModule,
    forward_mode: ForwardMode,
    predict: Callable[..., Any] | None,
) -> LiveModel:
    """Return how to call a module between training steps, in the precision of the Trainer.

    ``predict`` is None if a pipeline calls the networks.
    """
    precision = trainer.precision_plugin
    return LiveModel(
        root=root_of(trainer, module),
        module=module,
        predict=predict if predict is not None else module,
        device=trainer.strategy.root_device,
        forward_mode=forward_mode,
        call=partial(wrap_forward, trainer, module, forward_mode),
        forward_context=precision.forward_context,
        convert_input=precision.convert_input,
        average=partial(ema_weights, trainer, module),
        # true half precision is not applied to a pipeline: it changes the default dtype and so the
        # tables of schedulers
        pipeline_context=(
            precision.forward_context if isinstance(precision, MixedPrecision) else nullcontext
        ),
    )
