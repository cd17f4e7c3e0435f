"""Groups of arguments that can be passed as one object."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, TypeVar

G = TypeVar("G")


@dataclass(frozen=True)
class PreviewConditions:
    """What the images of a preview are conditioned on, and the guidance.

    Several previews can share one object. The fields are the arguments of
    :class:`~alphabar.training.Previews` and ``ValidationSampling`` with these names.

    >>> PreviewConditions(classes=range(10), null_class=10, guidance_scale=3.0).class_key
    'class_labels'
    """

    prompts: Sequence[str] = ()
    negative_prompt: str = ""
    encode: Callable[[list[str]], Mapping[str, Any]] | None = None
    classes: Sequence[int] = ()
    class_key: str = "class_labels"
    null_class: int | None = None
    conditioning: Mapping[str, Any] | None = None
    unconditional: Mapping[str, Any] | None = None
    guidance_scale: float = 1.0
    guidance_rescale: float = 0.0


def grouped(name: str, group: G | None, kind: type[G], keywords: Mapping[str, Any]) -> G:
    """Return the group that is passed as ``name=``, or the one that the keywords make.

    Raises ValueError if both are given.

    >>> grouped("conditions", None, PreviewConditions, {"guidance_scale": 2.0}).guidance_scale
    2.0
    >>> grouped("conditions", PreviewConditions(), PreviewConditions, {"class_key": "label"})
    Traceback (most recent call last):
    ValueError: conditions= and class_key= are given; pass class_key in conditions
    """
    if group is None:
        return kind(**keywords)
    if not isinstance(group, kind):
        got = type(group).__name__
        raise ValueError(f"{name} must be {kind.__name__}(...), got {got}")
    defaults = {field.name: field.default for field in fields(kind)}  # type: ignore[arg-type]
    given = [
        key
        for key, value in keywords.items()
        if value is not defaults[key] and value != defaults[key]
    ]
    if given:
        names = ", ".join(given)
        raise ValueError(
            f"{name}= and {', '.join(f'{key}=' for key in given)} are given; pass {names} in {name}"
        )
    return group
