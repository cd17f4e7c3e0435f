"""Items of the command line: a name with options, ``min_snr:gamma=5``, and what a registry makes of them."""

from __future__ import annotations

import inspect
import re
from ast import literal_eval
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from ..noising import NoiseSchedule
from ..noising.registry import lookup

T = TypeVar("T")

SCHEDULES: Mapping[str, Callable[..., NoiseSchedule]] = {
    "linear": NoiseSchedule.linear,
    "scaled_linear": NoiseSchedule.scaled_linear,
    "squaredcos_cap_v2": NoiseSchedule.squaredcos_cap_v2,
    "sigmoid": NoiseSchedule.sigmoid,
    "laplace": NoiseSchedule.laplace,
    "exp": NoiseSchedule.exp,
    "cosine": NoiseSchedule.cosine,
    "flow": NoiseSchedule.flow,
    "karras": NoiseSchedule.karras,
    "variance_preserving": NoiseSchedule.variance_preserving,
    "sub_variance_preserving": NoiseSchedule.sub_variance_preserving,
    "variance_exploding": NoiseSchedule.variance_exploding,
}
"""The schedules that have a name on the command line; others are read from a folder."""

TRANSFORMATIONS: Mapping[str, Callable[[NoiseSchedule, Any], NoiseSchedule]] = {
    "zero_snr": lambda schedule, yes: _zero_snr(schedule) if yes else schedule,
    "shifted": lambda schedule, factor: schedule.shifted(factor),
    "t_min": lambda schedule, t: schedule.truncated(t_min=t),
    "t_max": lambda schedule, t: schedule.truncated(t_max=t),
}
"""Options of any schedule's item, beside those of its constructor; they act in the order in which they are written."""


def parse_item(text: str) -> tuple[str, dict[str, Any]]:
    """Return the name and the options of an item ``name`` or ``name:option=value,option=value``.

    Values are numbers, true, false, none, or words. A name may hold colons where no option follows. Raises ValueError for
    an option without a value or named twice.

    >>> parse_item("min_snr:gamma=5,floor=0.1"), parse_item("flow")
    (('min_snr', {'gamma': 5, 'floor': 0.1}), ('flow', {}))
    """
    found = re.fullmatch(r"([^=]*?):(\w+=.*|)", text)
    if not found:
        return text, {}
    options: dict[str, Any] = {}
    for part in filter(None, _parts(found[2])):
        name, equals, value = (word.strip() for word in part.partition("="))
        if not equals or not value or name in options:
            what = "is given twice" if name in options else "has no value"
            raise ValueError(f"option {name!r} of {text!r} {what}; write name:option=value,option=value")
        options[name] = _value(value)
    return found[1], options


def _parts(text: str) -> list[str]:
    """Split at the commas that stand in no brackets."""
    parts, depth = [""], 0
    for letter in text:
        depth += (letter in "([{") - (letter in ")]}")
        if letter == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += letter
    return parts


def _value(text: str) -> Any:
    words = {"true": True, "false": False, "none": None}
    if text.lower() in words:
        return words[text.lower()]
    try:
        return literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def made(kind: str, text: str, registry: Mapping[str, Callable[..., T]]) -> T:
    """Return what the registry's entry makes of an item; an unknown name or option is a ValueError that offers the nearest.

    >>> from alphabar.noising import WEIGHTINGS
    >>> made("weighting", "min_snr:gamma=2", WEIGHTINGS)
    MinSNR(floor=0.0, gamma=2)
    """
    return make(kind, *parse_item(text), registry)


def make(kind: str, name: str, options: Mapping[str, Any], registry: Mapping[str, Callable[..., T]]) -> T:
    """Return what the registry's entry of this name makes of the options; errors as in :func:`made`.

    >>> from alphabar.noising import WEIGHTINGS
    >>> make("weighting", "min_snr", {"gamma": 2.0}, WEIGHTINGS)
    MinSNR(floor=0.0, gamma=2.0)
    """
    return _called(f"{kind} {name}", lookup(kind, name, registry), options)


def _called(what: str, make: Callable[..., T], options: Mapping[str, Any]) -> T:
    known = inspect.signature(make).parameters
    for option in options:
        lookup(f"option of {what}", option, known)
    missing = [p.name for p in known.values() if p.default is p.empty and p.name not in options]
    if missing:
        raise ValueError(f"{what} needs {', '.join(missing)}; write e.g. {what.split()[-1]}:{missing[0]}=...")
    try:
        return make(**options)
    except TypeError as error:  # a word where a number belongs
        raise ValueError(
            f"{what} does not take {', '.join(f'{k}={v!r}' for k, v in options.items())}: {error}"
        ) from error


def read_schedule(item: str, zero_snr: bool = False) -> NoiseSchedule:
    """Return the schedule of an item or a folder; raises ValueError or FileNotFoundError where there is none.

    The options of an item are those of its constructor, and the transformations ``zero_snr=true``, ``shifted=2.0``, ``t_min=``
    and ``t_max=``, which act in their order; a folder, with a noise_schedule.json or a scheduler_config.json, has these and
    ``tokens``. ``zero_snr``: rescale what the item says.

    >>> read_schedule("scaled_linear:beta_end=0.02,shifted=2.0", zero_snr=True).has_zero_terminal_snr
    True
    """
    name, options = (item, {}) if Path(item).exists() else parse_item(item)
    own = {option: value for option, value in options.items() if option not in TRANSFORMATIONS}
    if Path(name).exists() or "/" in name:
        schedule = _called(
            f"a folder {name}", lambda tokens=None: NoiseSchedule.from_pretrained(name, tokens=tokens), own
        )
    else:
        make = lookup("schedule", name, SCHEDULES)
        for option in own:
            lookup(f"option of schedule {name}", option, {**inspect.signature(make).parameters, **TRANSFORMATIONS})
        schedule = _called(f"schedule {name}", make, own)
    for option, value in options.items():
        if option in TRANSFORMATIONS:
            schedule = TRANSFORMATIONS[option](schedule, value)
    return _zero_snr(schedule) if zero_snr else schedule


def _zero_snr(schedule: NoiseSchedule) -> NoiseSchedule:
    # epsilon, the usual one of a curve by its name, would be ill-posed
    well_posed = schedule.prediction.name not in ("epsilon", "score")
    return (schedule if well_posed else schedule.with_prediction("v_prediction")).zero_terminal_snr()
