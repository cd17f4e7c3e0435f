"""Make whatever sampler a name stands for: a table, or one of those that are none."""

from __future__ import annotations

from typing import Any

from ..noising.utils.registry import lookup
from .names import resolve
from .sampler import Sampler
from .standalone import Outside


def make_sampler(schedule: Any, name: str = "dpmpp_2m", steps: int | None = None, **options: Any) -> Any:
    """Return the sampler of a name: a ``Sampler``, or the object of a sampler that is no table, called in the same way.

    ``steps`` and further options as in ``Sampler``, or as that class has them; DPM adaptive has no number of steps and
    ignores it. ``schedule`` is a NoiseSchedule (VQ diffusion: a TokenSchedule). Raises ValueError for unknown names and options.

    >>> from alphabar.noising import NoiseSchedule
    >>> make_sampler(NoiseSchedule.linear(), "DPM adaptive", steps=20).order
    3
    >>> make_sampler(NoiseSchedule.linear(), "Euler a", steps=20).method.name
    'euler_ancestral'
    """
    entry, implied = resolve(name)
    if not isinstance(entry, Outside):
        return Sampler(schedule, name, steps, **options)
    for option in options:
        lookup(f"option of {entry.name}", option, entry.options)
    counted = {"steps": steps} if steps is not None and "steps" in entry.options else {}
    implied = {option: value for option, value in implied.items() if option in entry.options}
    return entry.made_by(schedule, **(implied | counted | options))
