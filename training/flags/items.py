"""Schedules on the command line: an item (a name with options, as ``flow:shift=3``) or a folder."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from ...noising import BETA_SCHEDULES, CURVES, PRESETS, Curve, Discrete, NoiseSchedule
from ...noising.utils.items import call_with_options, parse_item
from ...noising.utils.registry import lookup, unknown

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
"""Constructors of schedules; other registered beta schedules and curves use their own names."""


def schedule_makers() -> dict[str, Callable[..., Any]]:
    """Return the constructors of schedules and curves by their command-line names.

    Folders are read separately.

    >>> "scaled_linear" in schedule_makers(), "laplace_diffusers" in schedule_makers()
    (True, True)
    """
    betas = {name: partial(Discrete, name) for name in BETA_SCHEDULES}
    curves = {name: kind for name, kind in CURVES.items() if kind is not Discrete}
    return {**SCHEDULES, **{k: v for k, v in {**betas, **curves}.items() if k not in SCHEDULES}}


TRANSFORMATIONS: Mapping[str, Callable[[NoiseSchedule, Any], NoiseSchedule]] = {
    "zero_snr": lambda schedule, yes: _zero_snr(schedule) if yes else schedule,
    "shifted": lambda schedule, factor: schedule.shifted(factor),
    "t_min": lambda schedule, t: schedule.truncated(t_min=t),
    "t_max": lambda schedule, t: schedule.truncated(t_max=t),
    "noise_level_min": lambda schedule, level: schedule.truncated(noise_level_min=level),
    "noise_level_max": lambda schedule, level: schedule.truncated(noise_level_max=level),
}
"""Options of every schedule item, in addition to its constructor's; applied in written order."""


def read_schedule(item: str, zero_snr: bool = False) -> NoiseSchedule:
    """Return the schedule for an item or a folder.

    An item takes the options of its constructor, and the transformations ``zero_snr=true``,
    ``shifted=2.0``, ``t_min=``, ``t_max=``, ``noise_level_min=`` and ``noise_level_max=`` (σ after
    the shift), which are applied in their written order. A preset takes the transformations,
    ``tokens`` and ``steps``; a folder (with a noise_schedule.json or a scheduler_config.json) takes
    the transformations and ``tokens``.

    Args:
        item: the item, the preset ('wan2.2/high') or the folder; './flux' is a folder.
        zero_snr: rescale the result to zero terminal SNR.

    Raises:
        ValueError: the item is not valid.
        FileNotFoundError: the folder has no schedule.

    >>> read_schedule(
    ...     "scaled_linear:beta_end=0.02,shifted=2.0", zero_snr=True
    ... ).has_zero_terminal_snr
    True
    """
    name, options = parse_item(item)
    if name not in PRESETS and Path(item).exists():
        name, options = item, {}
    own = {option: value for option, value in options.items() if option not in TRANSFORMATIONS}
    if name in PRESETS:
        schedule = call_with_options(f"preset {name}", partial(_preset, name), own)
    elif Path(name).exists() or "/" in name:
        schedule = call_with_options(
            f"a folder {name}",
            lambda tokens=None: NoiseSchedule.from_pretrained(name, tokens=tokens),
            own,
        )
    else:
        make = _maker(name)
        known = {**inspect.signature(make).parameters, "prediction": None, **TRANSFORMATIONS}
        for option in own:
            lookup(f"option of schedule {name}", option, known)
        prediction = None if name in SCHEDULES else own.pop("prediction", None)
        schedule = call_with_options(f"schedule {name}", make, own)
        if isinstance(schedule, Curve):
            usual = "flow_prediction" if schedule.is_flow else "epsilon"
            schedule = NoiseSchedule(schedule, prediction or usual)
    for option, value in options.items():
        if option in TRANSFORMATIONS:
            schedule = TRANSFORMATIONS[option](schedule, value)
    return _zero_snr(schedule) if zero_snr else schedule


def _preset(name: str, tokens: int | None = None, steps: int | None = None) -> NoiseSchedule:
    return NoiseSchedule.preset(name, tokens, steps)


def _maker(name: str) -> Callable[..., Any]:
    makers = schedule_makers()
    if name not in makers:
        raise ValueError(unknown("schedule", name, [*makers, *PRESETS]))
    return makers[name]


def _zero_snr(schedule: NoiseSchedule) -> NoiseSchedule:
    # epsilon, the default of a curve that is not a flow, is ill-posed at zero SNR
    well_posed = schedule.prediction.name not in ("epsilon", "score")
    return (
        schedule if well_posed else schedule.with_prediction("v_prediction")
    ).zero_terminal_snr()
