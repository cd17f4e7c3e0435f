"""Callables that make the images of a preview: the live network, the decoder, or a pipeline."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.plugins import MixedPrecision
from torch import Tensor, nn

from ..support.strategies import ForwardMode, wrap_forward
from .diffusers_pipelines import components
from .render import in_slices


def network_of(
    trainer: Trainer,
    module: LightningModule,
    forward_mode: ForwardMode,
    predict: Callable[..., Any],
) -> Callable[..., Any]:
    """Wrap ``predict`` so that a sampler can call it between training steps.

    It runs in the precision of training.
    """
    precision = trainer.precision_plugin
    predict = wrap_forward(trainer, module, forward_mode, predict)

    def network(x: Tensor, timesteps: Tensor, **conditioning: Any) -> Any:
        # as in training: convert inputs but not timesteps. Not around the whole loop, because half
        # precision changes the default dtype, which would change the dtype of the noise
        with precision.forward_context():
            return predict(
                precision.convert_input(x), timesteps, **precision.convert_input(conditioning)
            )

    return network


def decoder_of(
    trainer: Trainer, module: LightningModule, forward_mode: ForwardMode, decode: Any, size: int
) -> Callable[[Tensor], Tensor] | None:
    """Return ``decode`` in slices of ``size``, or None if ``decode`` is None.

    It is called like a part of the model, unless it is a separate network.
    """
    if decode is None:
        return None
    sliced = in_slices(decode, size)
    return (
        wrap_forward(trainer, module, forward_mode, sliced) if may_use(module, decode) else sliced
    )


def may_use(module: nn.Module, function: object) -> bool:
    """Return whether ``function`` may call parts of ``module``.

    False for a separate network that is not part of ``module``, and for a method of one.

    >>> net = nn.Sequential(nn.Linear(1, 1))
    >>> may_use(net, net[0]), may_use(net, nn.Linear(1, 1).forward), may_use(net, lambda x: net(x))
    (True, False, True)
    """
    owner = function if isinstance(function, nn.Module) else getattr(function, "__self__", None)
    return owner in list(module.modules()) if isinstance(owner, nn.Module) else True


def pipeline_context(trainer: Trainer) -> AbstractContextManager[Any]:
    """Return the autocast context of training, or a null context if training has none.

    True half precision is not applied: it changes the default dtype and so the tables of
    schedulers.
    """
    plugin = trainer.precision_plugin
    return plugin.forward_context() if isinstance(plugin, MixedPrecision) else nullcontext()


def modules_of(*parts: Any, pipeline: Any = None) -> list[nn.Module]:
    """Return the modules used for sampling.

    These are the modules in ``parts``, the owners of methods in ``parts``, and the modules of the
    pipeline.

    >>> net = nn.Linear(1, 1)
    >>> modules_of(net.forward, None)
    [Linear(in_features=1, out_features=1, bias=True)]
    """
    owners = [getattr(part, "__self__", part) for part in parts]
    return [
        part
        for part in owners + (components(pipeline) if pipeline else [])
        if isinstance(part, nn.Module)
    ]
