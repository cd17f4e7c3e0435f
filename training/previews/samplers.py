"""The sampler of previews: made from a name, and checked against the training and the pictures."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ...noising import NoiseSchedule
from ...noising.utils.validation import whole_number
from ...sampling import Method, Sampler
from ...sampling.fitting.provenance import FITTED
from ...sampling.names import resolve
from ..fitting.tables import DEFAULT_STEPS as FITTED_STEPS
from ..fitting.tables import FALLBACK, Fitting
from ..images import require_image_shape
from ..media.options import Media

DEFAULT_STEPS = 20


def require_drawable(shape: tuple[int, ...], decode: object, media: Media) -> None:
    """Raise ValueError if ``decode`` is None and samples are no images, videos or sounds.

    Sounds need ``media.sample_rate``.

    >>> require_drawable((3, 16, 32, 32), None, Media())
    >>> require_drawable((1, 16000), None, Media())
    Traceback (most recent call last):
    ValueError: a picture needs samples of shape (channels, height, width), got (1, 16000); ...
    """
    if decode is not None or len(shape) == 4:
        return
    if len(shape) == 2 and media.sample_rate is not None:
        return
    try:
        require_image_shape(shape)
    except ValueError as error:
        sounds = "media=Media(sample_rate=...) if they are sounds, or " if len(shape) == 2 else ""
        raise ValueError(
            f"{error}; give {sounds}decode=, a function from samples to images in [-1, 1], e.g. a "
            "plot of it"
        ) from None


def require_steps(sampler: Any, steps: int | None) -> int | None:
    """Return the number of steps, 20 by default; None for a sampler without a fixed number.

    A fitted table has 6 steps by default.

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
    if sampler == FITTED:
        return FITTED_STEPS if steps is None else whole_number("steps", steps, least=2)
    resolve(sampler)
    return DEFAULT_STEPS if steps is None else whole_number("steps", steps, least=1)


def sampler_for(schedule: NoiseSchedule, sampler: Any, steps: int | None) -> Any:
    """Return the sampler object; a name or Method gives a sampler for ``schedule``.

    The result is a ``Sampler``, or a sampler that a table cannot express. For 'fitted' it is the
    method that draws until a table is fitted.

    Raises:
        ValueError: the sampler is for another schedule, or needs inputs that a preview does not
            have.

    >>> sampler_for(NoiseSchedule.flow(), "euler", 4).steps
    4
    >>> sampler_for(NoiseSchedule.flow(), "DPM adaptive", None).name
    'dpm_adaptive'
    """
    if isinstance(sampler, str | Method):
        sampler = Sampler(schedule, FALLBACK if sampler == FITTED else sampler, steps)
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


def require_refit_every(sampler: Any, refit_every: int | None, pipeline: object) -> int | None:
    """Return the steps between two fits of a table.

    Raises:
        ValueError: the sampler is not 'fitted', or a pipeline draws.

    >>> require_refit_every("fitted", 1000, None)
    1000
    """
    if sampler != FITTED:
        if refit_every is not None:
            raise ValueError(
                f"refit_every={refit_every} is for sampler='fitted', got "
                f"{name_of_sampler(sampler)!r}; leave it out"
            )
    elif pipeline is not None:
        raise ValueError(
            "a table is fitted to a network, and a pipeline calls its network by itself; fit it "
            "with alphabar fit, and give Sampler.from_table(Table.load(path)) as the sampler"
        )
    return None if refit_every is None else whole_number("refit_every", refit_every, least=1)


def fitting_for(
    schedule: NoiseSchedule,
    sampler: Any,
    steps: int | None,
    refit_every: int | None,
    guidance: Mapping[str, float],
) -> Fitting | None:
    """Return the fitting of tables for the sampler 'fitted', None for others.

    >>> fitting_for(NoiseSchedule.flow(), "euler", 4, None, {}) is None
    True
    """
    if sampler != FITTED:
        return None
    scale, rescale = guidance["guidance_scale"], guidance["guidance_rescale"]
    return Fitting(schedule, steps or FITTED_STEPS, refit_every, scale, rescale)


def name_of_sampler(sampler: Any) -> str:
    """Return the name of a sampler, given as a name, a Method or an object.

    >>> name_of_sampler("DPM++ 2M"), name_of_sampler(Sampler(NoiseSchedule.flow(), "euler"))
    ('DPM++ 2M', 'euler')
    """
    return sampler if isinstance(sampler, str) else sampler.name
