"""Command-line flags for noising, for any argparse script, named as in diffusers and kohya."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Collection, Mapping
from dataclasses import fields, replace
from typing import Any

import torch

from ...noising import (
    BETA_SCHEDULES,
    PREDICTIONS,
    Chain,
    Curve,
    Discrete,
    ListedTimesteps,
    LogitNormalTimesteps,
    LossSecondMoment,
    ModeTimesteps,
    NoiseLevelTimesteps,
    NoiseSchedule,
    Noising,
    ReversedTimesteps,
    Timesteps,
    UniformTimesteps,
    WithinTimesteps,
)
from ...noising.utils.items import parse_item
from .base_model import schedule_of_base_model
from .items import SCHEDULES, read_schedule
from .options import Option, Said, add_options, read_options
from .table import KINDS, LOSS, NOISE, TIMESTEP, WEIGHTING

_BETAS = ("beta_schedule", "beta_start", "beta_end", "num_train_timesteps")

SCHEDULE_OPTIONS = (
    Option(
        ("--noise_schedule",),
        metavar="ITEM",
        help="a schedule by its name, flow:shift=3, karras:sigma_data=1, "
        "or a folder with a scheduler_config.json (default: the base model's, or scaled_linear)",
    ),
    Option(("--beta_schedule",), choices=BETA_SCHEDULES, help="shape of the betas"),
    Option(("--beta_start",), float, "first beta"),
    Option(("--beta_end",), float, "last beta"),
    Option(("--num_train_timesteps",), int, "number of training timesteps"),
    Option(
        ("--flow_shift", "--discrete_flow_shift"),
        float,
        "train a rectified flow with this shift (SD3: 3)",
    ),
    Option(
        ("--schedule_shift",),
        float,
        "multiply sigma / alpha by this, e.g. size / 64 (2301.11093, eq. 4)",
    ),
    Option(
        ("--prediction_type",),
        choices=PREDICTIONS,
        help="what the network predicts (default: as the base model, or epsilon; on a flow "
        "flow_prediction)",
    ),
    Option(("--v_parameterization",), bool, "--prediction_type v_prediction"),
    Option(
        ("--sigma_data",),
        float,
        "spread of the data, for prediction karras and weighting edm (EDM: 0.5)",
    ),
    Option(
        ("--rescale_betas_zero_snr", "--zero_terminal_snr"),
        bool,
        "rescale the betas so that the last timestep is pure noise (2305.08891)",
    ),
)
# --weighting_scheme: (weight of the flow loss, weight of the x_0 loss, timestep density)
_SCHEMES = {
    "none": ("uniform", "x0", "uniform"),
    "uniform": ("uniform", "x0", "uniform"),
    "sigma_sqrt": ("sigma_sqrt", "flow", "uniform"),
    "cosmap": ("cosmap", "diffusers_cosmap_x0", "uniform"),
    "logit_normal": ("uniform", "x0", "logit_normal"),
    "mode": ("uniform", "x0", "mode"),
}
# choices of kohya's --timestep_sampling
_SAMPLINGS = ("sigma", "uniform", "sigmoid", "shift", "flux_shift")
TRAINING_OPTIONS = (
    Option(
        ("--weighting_scheme",),
        choices=tuple(_SCHEMES),
        help="as in diffusers' scripts for SD3 and Flux: a weight of the flow loss (sigma_sqrt, "
        "cosmap), or a density of "
        "timesteps (logit_normal, mode)",
    ),
    Option(
        ("--logit_mean",),
        float,
        "of --weighting_scheme logit_normal, as in diffusers' scripts: a larger one is LESS noise; "
        "alphabar's own, "
        "--timestep_density logit_normal:mean=..., has it the other way round, as the paper",
    ),
    Option(("--logit_std",), float, "of --weighting_scheme logit_normal"),
    Option(("--mode_scale",), float, "of --weighting_scheme mode (2403.03206, eq. 20)"),
    Option(
        ("--precondition_outputs",),
        int,
        "1, as in diffusers' SD3 script: the loss is that of the x_0 which a flow's output "
        "implies, i.e. sigma^2 times that of "
        "the output, and --weighting_scheme weighs it; 0: the loss of the output",
    ),
    Option(
        ("--timestep_sampling",),
        choices=_SAMPLINGS,
        help="as in kohya's Flux script: sigma (by --weighting_scheme), uniform (sigma uniform, "
        "whatever the shift), sigmoid "
        "(the same, sigmoid of a normal), shift (sigmoid, with the flow's shift); alphabar's own "
        "are --timestep_density",
    ),
    Option(
        ("--sigmoid_scale",), float, "spread of the normal of --timestep_sampling sigmoid and shift"
    ),
    Option(
        ("--training_shift",),
        float,
        "as in kohya's SD3 script: the shift of the sigmas that are trained, whatever the flow's; "
        "with it a larger --logit_mean "
        "is more noise, as in that script",
    ),
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
OPTIONS = (
    *SCHEDULE_OPTIONS,
    *(option for kind in KINDS for option in kind.options),
    *TRAINING_OPTIONS,
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
    return _schedule(read_options(args, OPTIONS), args, base)


def _schedule(said: Said, args: argparse.Namespace, base: NoiseSchedule | None) -> NoiseSchedule:
    _refuse_said_twice(said)
    schedule = _with_prediction(_on_curve(said, args, base), said, base is not None)
    if "rescale_betas_zero_snr" in said.given:
        if schedule.prediction.name in ("epsilon", "score"):
            raise ValueError(
                f"{said.written('rescale_betas_zero_snr')} makes the last timestep pure noise, on "
                "which prediction "
                f"{schedule.prediction.name} is ill-posed; give --prediction_type v_prediction (or "
                "sample) as well"
            )
        schedule = _said_by(said, "rescale_betas_zero_snr", schedule.zero_terminal_snr)
    shift = said.value("schedule_shift")
    return (
        schedule
        if shift is None
        else _said_by(said, "schedule_shift", lambda: schedule.shifted(shift))
    )


def _said_by(said: Said, key: str, make: Callable[[], NoiseSchedule]) -> NoiseSchedule:
    try:
        return make()
    except ValueError as error:
        raise ValueError(f"{said.written(key)}: {error}") from error


_IN_ITEM = {  # options of a --noise_schedule item that also have a flag
    **{name: name for name in (*_BETAS, "sigma_data")},
    "shift": "flow_shift",
    "prediction": "prediction_type",
    "shifted": "schedule_shift",
    "zero_snr": "rescale_betas_zero_snr",
}


def _refuse_said_twice(said: Said) -> None:
    """Raise ValueError if a flag and the --noise_schedule item set an option differently."""
    _, options = parse_item(said.given.get("noise_schedule", ""))
    for option, key in _IN_ITEM.items():
        if option in options and said.given.get(key, options[option]) != options[option]:
            raise ValueError(
                f"{said.written(key)} and {said.written('noise_schedule')} say the same option "
                "differently; give one of the two"
            )


def _on_curve(said: Said, args: argparse.Namespace, base: NoiseSchedule | None) -> NoiseSchedule:
    betas = {name: said.given[name] for name in _BETAS if name in said.given}
    if "flow_shift" in said.given:
        refused = [f"{said.written(name)}" for name in betas if name.startswith("beta_")]
        refused += [said.written("rescale_betas_zero_snr")] * (
            "rescale_betas_zero_snr" in said.given
        )
        if "noise_schedule" in said.given and parse_item(said.given["noise_schedule"])[0] != "flow":
            refused.insert(0, said.written("noise_schedule"))
        if refused:
            raise ValueError(
                f"{refused[0]} does not go with {said.written('flow_shift')}: a flow has no betas "
                "and ends in pure noise already; "
                "leave it out"
            )
        return _flow(said, betas)
    if "noise_schedule" in said.given:
        base = read_schedule(said.given["noise_schedule"])
    schedule = base or _schedule_of_script(said, args, betas)
    if not betas:
        return schedule
    changed = _with_betas(schedule.curve, betas, said)
    return replace(schedule, curve=changed)


def _flow(said: Said, betas: Mapping[str, Any]) -> NoiseSchedule:
    return _said_by(
        said,
        "flow_shift",
        lambda: NoiseSchedule.flow(
            said.value("flow_shift"), betas.get("num_train_timesteps", 1000)
        ),
    )


def _schedule_of_script(
    said: Said, args: argparse.Namespace, betas: Mapping[str, Any]
) -> NoiseSchedule:
    """Return the script's own schedule, or a default, if no alphabar flag and no base sets one."""
    try:
        found = schedule_of_base_model(args)
    except ValueError:
        # scripts for flows have --flow_shift: their models are single files
        if "flow_shift" not in said.weak:
            raise
        found = None
    if found is not None:
        return found
    if "flow_shift" in said.weak:
        return _flow(said, betas)
    return SCHEDULES.get(betas.get("beta_schedule", ""), NoiseSchedule.scaled_linear)()


def _with_betas(curve: Curve, betas: Mapping[str, Any], said: Said) -> Discrete:
    flag = said.written(next(iter(betas)))
    if not isinstance(curve, Discrete):
        raise ValueError(
            f"{flag} does not go with a {curve.kind} schedule, which has no betas; leave it out"
        )
    if curve.trained_betas is not None and "beta_schedule" not in betas:
        raise ValueError(
            f"the base model's betas are given one by one; give --beta_schedule with {flag}"
        )
    return replace(curve, trained_betas=None, **betas)


def _with_prediction(schedule: NoiseSchedule, said: Said, has_base: bool) -> NoiseSchedule:
    name = said.given.get("prediction_type")
    if "v_parameterization" in said.given:
        if name not in (None, "v_prediction"):
            raise ValueError(
                f"{said.written('v_parameterization')} contradicts "
                f"{said.written('prediction_type')}; give one of the two"
            )
        name = "v_prediction"
    if name is None and not has_base and "noise_schedule" not in said.given:
        name = said.weak.get("prediction_type")
    kind = PREDICTIONS[name] if name is not None else type(schedule.prediction)
    sigma_data = said.value("sigma_data")
    if "sigma_data" not in (field.name for field in fields(kind)):
        return schedule if name is None else _predicting(schedule, name)
    if sigma_data is not None:
        return NoiseSchedule(schedule.curve, {"name": kind.name, "sigma_data": sigma_data})
    if isinstance(schedule.prediction, kind):
        return schedule
    raise ValueError(
        f"--prediction_type {name} needs --sigma_data, the standard deviation of the data; EDM "
        "uses 0.5 for images in [-1, 1]"
    )


def _predicting(schedule: NoiseSchedule, name: str) -> NoiseSchedule:
    try:
        return schedule.with_prediction(name)
    except ValueError as error:
        raise ValueError(
            f"--prediction_type {name} is ill-posed on this schedule, {schedule}, which ends in "
            "pure noise: the output would say "
            "nothing of x_0 there; give --prediction_type v_prediction (or sample; on a flow "
            "flow_prediction)"
        ) from error


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
    schedule = _schedule(said, args, base)
    weighting, timesteps = _weighting(said, schedule), _timesteps(said, schedule.curve)
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


def _refuse_what_is_not_here(args: argparse.Namespace) -> None:
    for name, (neutral, mend) in _NOT_HERE.items():
        value = getattr(args, name, None)
        if value not in (None, neutral):
            raise ValueError(
                f"--{name}{'' if value is True else f' {value}'} is not implemented by alphabar; "
                f"{mend}"
            )


def _weighting(said: Said, schedule: NoiseSchedule) -> Any:
    prediction = schedule.prediction.name
    _require_prediction(
        said, "scale_v_pred_loss_like_noise_pred", prediction == "v_prediction", prediction
    )
    _require_prediction(said, "v_pred_like_loss", prediction != "v_prediction", prediction)
    _require_prediction(said, "precondition_outputs", prediction == "flow_prediction", prediction)
    said = _with_scheme(said, prediction)
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
            "contradicts prediction "
            f"{prediction} with weighting {weighting.name}; leave it out"
        )
    return weighting


def _require_prediction(said: Said, key: str, fits: bool, prediction: str) -> None:
    if not fits and said.given.get(key):
        raise ValueError(
            f"{said.written(key)} does not go with --prediction_type {prediction}, as in the "
            "trainers that have it; leave it out"
        )


def _with_scheme(said: Said, prediction: str) -> Said:
    """Translate --weighting_scheme and --precondition_outputs to --loss_weighting."""
    on_x0 = bool(said.value("precondition_outputs")) and prediction == "flow_prediction"
    scheme = said.value("weighting_scheme")
    if scheme is None and not on_x0:
        return said
    weight = _SCHEMES[_scheme(said)][int(on_x0)]
    if weight == "uniform":
        return said
    by_scheme = _SCHEMES[_scheme(said)][0] != "uniform"
    key = "weighting_scheme" if by_scheme else "precondition_outputs"
    if key not in said.given:  # made from a weak value, so it is weak
        return Said(said.given, {"loss_weighting": weight, **said.weak}, said.names)
    if by_scheme and said.given.get("loss_weighting", weight) != weight:
        raise ValueError(
            f"{said.written(key)} contradicts {said.written('loss_weighting')}; give one of the two"
        )
    name = f"{said.written(key)}, which is --loss_weighting"
    return Said(
        {"loss_weighting": weight, **said.given}, said.weak, {"loss_weighting": name, **said.names}
    )


def _scheme(said: Said) -> str:
    scheme = said.value("weighting_scheme", "none")
    if scheme not in _SCHEMES:
        raise ValueError(f"unknown --weighting_scheme {scheme}; known: {', '.join(_SCHEMES)}")
    return scheme


def _timesteps(said: Said, curve: Curve) -> Timesteps:
    density = _density_of_peers(said, curve)
    if isinstance(density, NoiseLevelTimesteps) and "training_shift" in {**said.given, **said.weak}:
        return density  # it already has the timestep range
    density = density or TIMESTEP.chosen(said)[0]
    if isinstance(density, LossSecondMoment):  # must be outermost: limit its inner density
        return replace(density, density=_within(said, density.density, curve))
    return _within(said, density, curve)


def _density_of_peers(said: Said, curve: Curve) -> Timesteps | None:
    """Return the density of --timestep_sampling or --weighting_scheme.

    Return None if alphabar's own flags set the density.
    """
    own = [
        said.written(key) for key in ("timestep_density", "p_mean", "p_std") if key in said.given
    ]
    scheme, sampling = _scheme(said), said.value("timestep_sampling", "sigma")
    theirs = [said.written("timestep_sampling")] * (
        "timestep_sampling" in said.given and sampling != "sigma"
    )
    of_scheme = _SCHEMES[scheme][2] != "uniform"
    theirs += [said.written("weighting_scheme")] * ("weighting_scheme" in said.given and of_scheme)
    if len(theirs) > 1 or (theirs and own):
        other = theirs[1] if len(theirs) > 1 else own[0]
        raise ValueError(f"{theirs[0]} contradicts {other}; give one of the two")
    if sampling not in _SAMPLINGS:
        raise ValueError(f"unknown --timestep_sampling {sampling}; known: {', '.join(_SAMPLINGS)}")
    by_sampling = (
        sampling != "sigma" and not own and not (of_scheme and "weighting_scheme" in said.given)
    )
    by_scheme = not by_sampling and not own
    used = {
        "logit_mean": by_scheme and scheme == "logit_normal",
        "logit_std": by_scheme and scheme == "logit_normal",
        "mode_scale": by_scheme and scheme == "mode",
        "sigmoid_scale": by_sampling and sampling in ("sigmoid", "shift", "flux_shift"),
        "training_shift": by_scheme,
    }
    for key, is_used in used.items():
        if key in said.given and not is_used:
            _refuse_unused(said, key, own)
    if by_sampling:
        return _of_sampling(said, sampling, curve)
    return _of_scheme(said, scheme, curve) if by_scheme else None


_OF = {
    "logit_mean": "--weighting_scheme logit_normal",
    "logit_std": "--weighting_scheme logit_normal",
    "mode_scale": "--weighting_scheme mode",
    "sigmoid_scale": "--timestep_sampling sigmoid or shift",
    "training_shift": "--weighting_scheme",
}


def _refuse_unused(said: Said, key: str, own: list[str]) -> None:
    instead = f"contradicts {own[0]}" if own else "says nothing alone"
    item = ""
    if key.startswith("logit"):
        sign = "-" if key == "logit_mean" else ""
        item = (
            f", or --timestep_density logit_normal:{key[6:]}={sign}... , "
            "whose larger mean is more noise"
        )
    raise ValueError(
        f"{said.written(key)} is an option of {_OF[key]} and {instead}; give {_OF[key]}{item}"
    )


def _of_sampling(said: Said, sampling: str, curve: Curve) -> Timesteps:
    """Return the density of kohya's flux_train_utils.get_noisy_model_input_and_timesteps."""
    if not curve.is_flow:
        raise ValueError(
            f"--timestep_sampling {sampling} draws the sigmas of a flow, and this schedule is "
            f"{curve.kind}; give --timestep_density"
        )
    if sampling == "flux_shift":
        raise ValueError(
            "--timestep_sampling flux_shift takes another shift for each size of image, and a "
            "schedule has one; give "
            "--timestep_sampling shift --discrete_flow_shift 3.16, which is that of 1024 x 1024 "
            "(1.88 of 512 x 512)"
        )
    normal = _made(
        said, "sigmoid_scale", lambda: LogitNormalTimesteps(std=said.value("sigmoid_scale", 1.0))
    )
    if sampling == "shift":
        return normal  # the schedule has the shift
    return NoiseLevelTimesteps(density=UniformTimesteps() if sampling == "uniform" else normal)


def _of_scheme(said: Said, scheme: str, curve: Curve) -> Timesteps | None:
    """Return the density of diffusers' compute_density_for_timestep_sampling.

    There, u indexes timesteps in descending order. With --training_shift, it is the density of
    kohya's sd3_train_utils.get_noisy_model_input_and_timesteps, where u is σ itself.
    """
    shift = said.value("training_shift")
    name = _SCHEMES[scheme][2]
    mean = said.value("logit_mean", 0.0) * (1 if shift is not None else -1)
    density: Timesteps | None = None
    if name == "logit_normal":
        std = said.value("logit_std", 1.0)
        density = _made(said, "logit_std", lambda: LogitNormalTimesteps(mean=mean, std=std))
    elif name == "mode":  # symmetric
        density = _made(
            said, "mode_scale", lambda: ModeTimesteps(scale=said.value("mode_scale", 1.29))
        )
    if shift is None:
        return density
    if not curve.is_flow:
        raise ValueError(
            f"{said.written('training_shift')} is for flows, and this schedule is {curve.kind}; "
            "leave it out"
        )
    low, high = _range(said, float(curve.num_train_timesteps))
    count = curve.num_train_timesteps
    return _made(
        said,
        "training_shift",
        lambda: NoiseLevelTimesteps(
            density=density or UniformTimesteps(), shift=shift, low=low / count, high=high / count
        ),
    )


def _made(said: Said, key: str, make: Callable[[], Timesteps]) -> Timesteps:
    try:
        return make()
    except ValueError as error:
        raise ValueError(f"{said.written(key)}: {error}") from error


def _range(said: Said, end: float) -> tuple[float, float]:
    low, high = said.value("min_timestep", 0.0), said.value("max_timestep", end)
    if not 0 <= low < high <= end:
        raise ValueError(
            f"--min_timestep must be below --max_timestep, got {low:g} and {high:g}; this schedule "
            f"has {end:g} timesteps, "
            f"0 ... {end - 1:g}"
        )
    return float(low), float(high)


def _within(said: Said, density: Timesteps, curve: Curve) -> Timesteps:
    if "reversed_timesteps" in said.given:
        keys = ("weighting_scheme", "timestep_sampling")
        theirs = [
            said.written(key)
            for key in keys
            if said.given.get(key) not in (None, "none", "sigma", "uniform")
        ]
        if theirs:
            raise ValueError(
                f"{said.written('reversed_timesteps')} is for --timestep_density; {theirs[0]} has "
                "the direction of the trainer that "
                "it is from; leave it out"
            )
        try:
            density = ReversedTimesteps(density=density)
        except ValueError as error:
            raise ValueError(
                f"{said.written('reversed_timesteps')}: {density.name} timesteps have no direction "
                "to reverse; leave it out"
            ) from error
    if said.value("min_timestep") is None and said.value("max_timestep") is None:
        return density
    low, high = _range(said, float(curve.num_train_timesteps))
    if curve.is_discrete:
        if low != int(low) or high != int(high):
            raise ValueError(
                f"--min_timestep and --max_timestep must be integers on this schedule, got {low} "
                f"and {high}"
            )
        if low == high - 1:
            return ListedTimesteps(listed=(low,))
        return _made(
            said, "max_timestep", lambda: WithinTimesteps(density=density, low=low, high=high - 1)
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
