"""The sampler of previews: made from a name, and checked against the training and the pictures."""

from __future__ import annotations

from typing import Any

from ...noising import NoiseSchedule
from ...noising.utils.validation import whole_number
from ...sampling import Method, Sampler
from ...sampling.names import resolve
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
    return DEFAULT_STEPS if steps is None else whole_number("steps", steps, least=1)


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
