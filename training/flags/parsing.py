"""Command-line flags for noising, for any argparse script, named as in diffusers and kohya."""

from __future__ import annotations

import argparse
from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import Any

import torch

from ...noising import (
    PRESETS,
    Chain,
    Curve,
    ListedTimesteps,
    LossSecondMoment,
    NoiseSchedule,
    Noising,
    Preset,
    ReversedTimesteps,
    Timesteps,
    WithinTimesteps,
)
from .flows import FLOW_OPTIONS, density_of_trainer, with_scheme
from .options import Option, Said, add_options, read_options
from .schedules import SCHEDULE_OPTIONS, read_schedule_flags
from .table import KINDS, LOSS, NOISE, TIMESTEP, WEIGHTING

OPTIONS = (
    *SCHEDULE_OPTIONS,
    *(option for kind in KINDS for option in kind.options),
    *FLOW_OPTIONS,
    Option(
        ("--loss_weight_floor",),
        float,
        "lower bound of the weight, for schemes that are 0 at zero SNR",
    ),
    Option(("--min_timestep",), float, "first timestep that is trained"),
    Option(
        ("--max_timestep",),
        float,
        "timestep before which training ends, e.g. 1000 for all of 0 ... 999",
    ),
    Option(("--reversed_timesteps",), bool, "exchange data and noise in --timestep_density"),
    Option(("--noise_seed",), int, "seed of training noise and timesteps (default: --seed, or 0)"),
)
"""Every option that :func:`add_noising_arguments` adds."""

_NOT_HERE: Mapping[
    str, tuple[Any, str]
] = {  # unsupported flags of other trainers: (neutral value, advice for any other value)
    "model_prediction_type": (
        "raw",
        "give --model_prediction_type raw, as sd-scripts' documentation advises",
    ),
    "timestep_bias_strategy": (
        "none",
        "leave it out; --timestep_density and --min_timestep say what is trained",
    ),
    "dream_training": (False, "leave it out"),
    "do_edm_style_training": (
        False,
        "leave it out; --prediction_type karras --sigma_data 0.5 trains as EDM does",
    ),
}


def add_noising_arguments(
    parser: argparse.ArgumentParser, without: Collection[str] = ()
) -> argparse.ArgumentParser:
    """Add the flags that :func:`noising_from_arguments` reads; return the parser.

    A weighting, density, noise or loss is named by an item, e.g. ``--loss_weighting
    soft_min_snr:gamma=5,floor=0.05``. If other trainers have a flag for one of its options, that
    flag exists here too, with the same meaning.

    Call this after the script has added its own options. If the script already has an option that
    takes the same values, it is adopted with its default.

    Args:
        parser: the parser to extend.
        without: names of flags that are not added.

    Raises:
        ValueError: the script has an option of the same name that takes something else; the message
            names both.

    >>> args = add_noising_arguments(argparse.ArgumentParser()).parse_args(
    ...     ["--v_parameterization", "--zero_terminal_snr", "--noise_offset", "0.1"]
    ... )
    >>> noising = noising_from_arguments(args)
    >>> noising.schedule.has_zero_terminal_snr, noising.noise.name
    (True, 'offset')
    """
    group = parser.add_argument_group("noise schedule (alphabar)")
    add_options(SCHEDULE_OPTIONS, parser, group, without)
    group = parser.add_argument_group("training noise, timesteps and loss (alphabar)")
    add_options(OPTIONS[len(SCHEDULE_OPTIONS) :], parser, group, without)
    return parser


def schedule_from_arguments(
    args: argparse.Namespace, base: NoiseSchedule | None = None
) -> NoiseSchedule:
    """Return the schedule that the flags describe; ``base`` fills in what the flags do not set.

    Contradictions are found before any model is loaded.

    Args:
        args: the parsed flags.
        base: schedule of the model that is fine-tuned. Default: the scheduler config of
            ``--pretrained_model_name_or_path``, if the script has that flag, read from a folder or
            the hub's cache.

    Raises:
        ValueError: flags contradict each other.

    >>> parser = add_noising_arguments(argparse.ArgumentParser())
    >>> schedule_from_arguments(parser.parse_args([])).prediction.name
    'epsilon'
    >>> base = NoiseSchedule.linear(prediction="v_prediction")
    >>> schedule_from_arguments(parser.parse_args(["--beta_end", "0.01"]), base).curve.beta_schedule
    'linear'
    """
    return read_schedule_flags(read_options(args, OPTIONS), args, base)


def noising_from_arguments(args: argparse.Namespace, base: NoiseSchedule | None = None) -> Noising:
    """Return the Noising that the flags of :func:`add_noising_arguments` describe.

    ``base`` is as in :func:`schedule_from_arguments`.

    Raises:
        ValueError: flags contradict each other; the message names both.

    >>> parser = add_noising_arguments(argparse.ArgumentParser())
    >>> noising_from_arguments(parser.parse_args(["--snr_gamma", "5"])).weighting
    MinSNR(floor=0.0, gamma=5.0)
    """
    said = read_options(args, OPTIONS)
    _refuse_what_is_not_here(args)
    schedule = read_schedule_flags(said, args, base)
    preset = PRESETS[said.given["preset"]] if "preset" in said.given else None
    said, preset_density = _of_preset(said, schedule.curve)
    weighting = _weighting(said, schedule)
    resolution = getattr(args, "resolution", None)
    timesteps = _timesteps(said, schedule.curve, resolution, preset, preset_density)
    noises, (loss, *_) = NOISE.chosen(said), LOSS.chosen(said)
    seeds = (said.value("noise_seed"), getattr(args, "seed", None), 0)
    return Noising(
        schedule,
        weighting,
        timesteps,
        noises[0] if len(noises) == 1 else Chain(tuple(noises)),
        seed=next(seed for seed in seeds if seed is not None),
        loss=loss,
    )


_DENSITIES = ("timestep_density", "p_mean", "p_std", "timestep_sampling", "weighting_scheme")


def _of_preset(said: Said, curve: Curve) -> tuple[Said, Timesteps | None]:
    """Return the flags with the weighting of --preset as a weak one, and the preset's density.

    The density is None without a preset, and if other flags say one. --training_shift is then the
    shift of the preset's.
    """
    if "preset" not in said.given:
        return said, None
    name, tokens = said.given["preset"], said.given.get("image_tokens")
    weak = {key: value for key, value in said.weak.items() if key not in _DENSITIES}
    weak["loss_weighting"] = PRESETS[name].training.weighting
    if any(key in said.given for key in _DENSITIES):
        return Said(said.given, weak, said.names), None
    density = said.made(
        "training_shift" if "training_shift" in said.given else "preset",
        lambda: PRESETS[name].density(name, curve, tokens, said.given.get("training_shift")),
    )
    used = ("image_tokens", "training_shift")
    given, weak = (
        {k: v for k, v in values.items() if k not in used} for values in (said.given, weak)
    )
    return Said(given, weak, said.names), density


def _refuse_what_is_not_here(args: argparse.Namespace) -> None:
    for name, (neutral, advice) in _NOT_HERE.items():
        value = getattr(args, name, None)
        if value not in (None, neutral):
            raise ValueError(
                f"--{name}{'' if value is True else f' {value}'} is not implemented by alphabar; "
                f"{advice}"
            )


def _weighting(said: Said, schedule: NoiseSchedule) -> Any:
    prediction = schedule.prediction.name
    fits = {
        "scale_v_pred_loss_like_noise_pred": prediction == "v_prediction",
        "v_pred_like_loss": prediction != "v_prediction",
        "precondition_outputs": prediction == "flow_prediction",
    }
    for key in fits:
        if said.given.get(key) and not fits[key]:
            raise ValueError(
                f"{said.written(key)} does not go with --prediction_type {prediction}, as in the "
                "trainers that have it; leave it out"
            )
    said = with_scheme(said, prediction)
    weighting = WEIGHTING.chosen(said, prediction, {"loss_weight_floor": "floor"})[0]
    if "sigma_data" not in said.given:
        return weighting
    if hasattr(weighting, "sigma_data"):
        (named,) = WEIGHTING.named(said, prediction)
        named.take("sigma_data", said.given["sigma_data"], said.written("sigma_data"))
        return replace(weighting, sigma_data=said.given["sigma_data"])
    if not hasattr(schedule.prediction, "sigma_data"):
        raise ValueError(
            f"{said.written('sigma_data')} is for prediction karras and weighting edm, and "
            f"contradicts prediction {prediction} with weighting {weighting.name}; leave it out"
        )
    return weighting


def _timesteps(
    said: Said,
    curve: Curve,
    resolution: Any,
    preset: Preset | None,
    preset_density: Timesteps | None,
) -> Timesteps:
    span = _range(said, float(curve.num_train_timesteps))
    density, covers_range = density_of_trainer(said, curve, span, resolution)
    density = density or preset_density
    if "reversed_timesteps" in said.given:
        for key in ("weighting_scheme", "timestep_sampling"):
            if said.given.get(key) not in (None, "none", "sigma", "uniform"):
                raise _not_reversible(said, key)
        if covers_range:
            shifts = ("timestep_sampling", "training_shift")
            key = next((key for key in shifts if key in said.given), shifts[0])
            raise _not_reversible(said, key)
    if density is not None and covers_range:
        return density if preset is None else preset.limited(density)
    density = density or TIMESTEP.chosen(said)[0]
    if isinstance(density, LossSecondMoment):  # must be outermost: limit its inner density
        return replace(density, density=_within(said, density.density, curve, span, preset))
    return _within(said, density, curve, span, preset)


def _range(said: Said, end: float) -> tuple[float, float]:
    low, high = said.value("min_timestep", 0.0), said.value("max_timestep", end)
    if not 0 <= low < high <= end:
        raise ValueError(
            f"--min_timestep must be below --max_timestep, got {low:g} and {high:g}; this schedule "
            f"has {end:g} timesteps, 0 ... {end - 1:g}"
        )
    return float(low), float(high)


def _not_reversible(said: Said, key: str) -> ValueError:
    return ValueError(
        f"{said.written('reversed_timesteps')} is for --timestep_density; {said.written(key)} has "
        "the direction of the trainer that it is from; leave it out"
    )


def _within(
    said: Said,
    density: Timesteps,
    curve: Curve,
    timestep_range: tuple[float, float],
    preset: Preset | None,
) -> Timesteps:
    if "reversed_timesteps" in said.given:
        try:
            density = ReversedTimesteps(density=density)
        except ValueError as error:
            raise ValueError(
                f"{said.written('reversed_timesteps')}: {density.name} timesteps have no direction "
                "to reverse; leave it out"
            ) from error
    density = density if preset is None else preset.limited(density)
    if said.value("min_timestep") is None and said.value("max_timestep") is None:
        return density
    low, high = timestep_range
    if curve.is_discrete:
        if low != int(low) or high != int(high):
            raise ValueError(
                f"--min_timestep and --max_timestep must be integers on this schedule, got {low} "
                f"and {high}"
            )
        if low == high - 1:
            return ListedTimesteps(listed=(low,))
        return said.made(
            "max_timestep", lambda: WithinTimesteps(density=density, low=low, high=high - 1)
        )
    first, last = _times(curve, low), _times(curve, high)
    return WithinTimesteps(density=density, low=first, high=last)


def _times(curve: Curve, timestep: float) -> float:
    """Return the time at which the network receives this timestep.

    If the curve is not a flow, it is the same share of the training time.
    """
    share = timestep / curve.num_train_timesteps
    if not curve.is_flow:
        return curve.t_min + share * (curve.t_max - curve.t_min)
    log_snr = (
        2 * torch.tensor([(1 - share) / share if share else torch.inf], dtype=torch.float64).log()
    )
    return float(curve.time(log_snr).clamp(curve.t_min, curve.t_max))
