"""Attributes that the callbacks read from a LightningModule and from a Trainer.

From the module: ``noising`` or ``schedule``, ``predict``, ``sample_shape``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

from lightning.pytorch import LightningModule, Trainer

from ...noising import NoiseSchedule


def schedule_of_module(module: LightningModule) -> NoiseSchedule:
    """Return ``module.noising.schedule``, or ``module.schedule``.

    Raises:
        TypeError: the module has neither.

    >>> class Own(LightningModule):
    ...     schedule = NoiseSchedule.flow()
    >>> schedule_of_module(Own()).prediction.name
    'flow_prediction'
    """
    holder = getattr(module, "noising", None)
    schedule = getattr(module if holder is None else holder, "schedule", None)
    if not isinstance(schedule, NoiseSchedule):
        raise TypeError(
            f"{type(module).__name__} has no noise schedule: give it an attribute noising (a "
            "Noising) or schedule "
            "(a NoiseSchedule), the one that it trains with"
        )
    return schedule


def predict_of_module(module: LightningModule) -> Callable[..., Any]:
    """Return ``module.predict``.

    Raises:
        TypeError: the module has no such method.

    >>> predict_of_module(LightningModule())
    Traceback (most recent call last):
    TypeError: LightningModule has no method predict(x, timesteps, **conditioning); give predict=
    """
    predict = getattr(module, "predict", None)
    if not callable(predict):
        raise TypeError(
            f"{type(module).__name__} has no method predict(x, timesteps, **conditioning); give "
            "predict="
        )
    return predict


def shape_of_module(module: LightningModule) -> tuple[int, ...] | None:
    """Return ``module.sample_shape``, the shape of one sample; None if it is not known yet.

    Raises:
        TypeError: the module has no such attribute.

    >>> class Own(LightningModule):
    ...     sample_shape = [3, 32, 32]
    >>> shape_of_module(Own())
    (3, 32, 32)
    """
    if not hasattr(module, "sample_shape"):
        raise TypeError(
            f"{type(module).__name__} has no attribute sample_shape; give it one (channels, "
            "height, width), "
            "or give the callback shape="
        )
    shape: Any = module.sample_shape
    return None if shape is None else tuple(int(n) for n in shape)


def is_fast_dev_run(trainer: Trainer) -> bool:
    """Return whether the Trainer has ``fast_dev_run``: everything runs once, nothing is written.

    >>> from types import SimpleNamespace
    >>> is_fast_dev_run(SimpleNamespace(fast_dev_run=1))
    True
    """
    return bool(cast(Any, trainer).fast_dev_run)  # Lightning sets it without declaring it
