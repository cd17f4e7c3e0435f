"""Attributes that the callbacks read from a LightningModule and from a Trainer.

From the module: ``noising`` or ``schedule``, ``predict``, ``sample_shape``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

from lightning.pytorch import LightningModule, Trainer

from ...noising import NoiseSchedule
from ...sampling import Method, Sampler
from ...sampling.names import resolve
from ...training.images import require_image_shape
from ..previews.triggers import at_least_one

DEFAULT_STEPS = 20


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


def require_drawable(shape: tuple[int, ...], decode: object) -> None:
    """Raise ValueError if samples are not images (but videos or sounds) and ``decode`` is None.

    >>> require_drawable((3, 16, 32, 32), decode=None)
    Traceback (most recent call last):
    ValueError: a picture needs samples of shape (channels, height, width), got (3, 16, 32, ...
    """
    if decode is not None:
        return
    try:
        require_image_shape(shape)
    except ValueError as error:
        example = "of a video its first frame: decode=lambda x: x[:, :, 0]"
        if len(shape) != 4:
            example = "a plot of it"
        raise ValueError(
            f"{error}; give decode=, a function from samples to images in [-1, 1], e.g. {example}"
        ) from None


def is_fast_dev_run(trainer: Trainer) -> bool:
    """Return whether the Trainer has ``fast_dev_run``: everything runs once, nothing is written.

    >>> from types import SimpleNamespace
    >>> is_fast_dev_run(SimpleNamespace(fast_dev_run=1))
    True
    """
    return bool(cast(Any, trainer).fast_dev_run)  # Lightning sets it without declaring it


def require_steps(sampler: Any, steps: int | None) -> int | None:
    """Return the number of steps, 20 by default; None for a sampler without a fixed number.

    Raises:
        ValueError: an unknown sampler, or ``steps`` that contradicts the sampler.

    >>> require_steps("euler", None)
    20
    """
    if not isinstance(sampler, str | Method):
        own = getattr(sampler, "steps", None)
        if steps not in (None, own):
            raise ValueError(
                f"the sampler has {own} steps, and steps={steps} contradicts it; leave it out"
            )
        return own
    resolve(sampler)
    return DEFAULT_STEPS if steps is None else at_least_one("steps", steps)


def sampler_for(schedule: NoiseSchedule, sampler: Any, steps: int | None) -> Any:
    """Return the sampler object; a name or Method gives a sampler for ``schedule``.

    The result is a ``Sampler``, or a sampler that a table cannot express.

    Raises:
        ValueError: the sampler is for another schedule, or needs inputs that a preview does not
            have.

    >>> sampler_for(NoiseSchedule.flow(), "euler", 4).steps
    4
    >>> sampler_for(NoiseSchedule.flow(), "DPM adaptive", None).name
    'dpm_adaptive'
    """
    if isinstance(sampler, str | Method):
        sampler = Sampler(schedule, sampler, steps)
    if sampler.schedule.fingerprint != schedule.fingerprint:
        raise ValueError(
            f"the sampler is made for {sampler.schedule}, but the model trains on {schedule}: its "
            "previews would not show "
            "what the model learned; make it as Sampler(module.noising.schedule, ...)"
        )
    needs = getattr(sampler, "needs", ())
    if needs:
        raise ValueError(
            f"{sampler.name} needs {' and '.join(needs)}, which a preview does not have; take "
            "another sampler"
        )
    return sampler


def name_of_sampler(sampler: Any) -> str:
    """Return the name of a sampler, given as a name, a Method or an object.

    >>> name_of_sampler("DPM++ 2M"), name_of_sampler(Sampler(NoiseSchedule.flow(), "euler"))
    ('DPM++ 2M', 'euler')
    """
    return sampler if isinstance(sampler, str) else sampler.name
