"""Command-line flags of the noising side, for any argparse script, under the names that diffusers and kohya users know."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from dataclasses import fields, replace
from typing import Any

from ..noising import (
    BETA_SCHEDULES,
    PREDICTIONS,
    Chain,
    Curve,
    Discrete,
    LossSecondMoment,
    NoiseSchedule,
    Noising,
    ReversedTimesteps,
    Timesteps,
    WithinTimesteps,
)
from .flags import KINDS, LOSS, NOISE, TIMESTEP, WEIGHTING
from .items import read_schedule

_BETAS = ("beta_schedule", "beta_start", "beta_end", "num_train_timesteps")
_SD3 = {  # what --weighting_scheme of the diffusers scripts for SD3 and Flux says: a weight, or a density
    "none": (TIMESTEP, "uniform"),
    "sigma_sqrt": (WEIGHTING, "sigma_sqrt"),
    "cosmap": (WEIGHTING, "cosmap"),
    "logit_normal": (TIMESTEP, "logit_normal"),
    "mode": (TIMESTEP, "mode"),
}


def add_noising_arguments(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Add the flags from which :func:`noising_from_arguments` makes a Noising; return the parser.

    What has many options is named by an item, ``--loss_weighting soft_min_snr:gamma=5,floor=0.05``; the options that
    other trainers have a flag for have it here as well. A flag of one kind alone says the kind: ``--snr_gamma 5``.

    >>> args = add_noising_arguments(argparse.ArgumentParser()).parse_args(
    ...     ["--v_parameterization", "--zero_terminal_snr", "--noise_offset", "0.1"])
    >>> noising = noising_from_arguments(args)
    >>> noising.schedule.has_zero_terminal_snr, noising.noise.name
    (True, 'offset')
    """
    add = parser.add_argument_group("noise schedule (alphabar)").add_argument
    add("--noise_schedule", default=None, metavar="ITEM", help="a schedule by its name, flow:shift=3, karras:sigma_data=1, "
        "or a folder with a scheduler_config.json (default: the base model's, or scaled_linear)")  # fmt: skip
    add("--beta_schedule", default=None, choices=sorted(BETA_SCHEDULES), help="shape of the betas")
    add("--beta_start", type=float, default=None, help="first beta")
    add("--beta_end", type=float, default=None, help="last beta")
    add("--num_train_timesteps", type=int, default=None, help="number of training timesteps")
    add(
        "--flow_shift",
        "--discrete_flow_shift",
        type=float,
        default=None,
        help="train a rectified flow with this shift (SD3: 3)",
    )
    add(
        "--schedule_shift",
        type=float,
        default=None,
        help="multiply sigma / alpha by this, e.g. size / 64 (2301.11093, eq. 4)",
    )
    add("--prediction_type", default=None, choices=sorted(PREDICTIONS),
        help="what the network predicts (default: as the base model, or epsilon; on a flow flow_prediction)")  # fmt: skip
    add(
        "--v_parameterization",
        action="store_true",
        help="--prediction_type v_prediction",
    )
    add(
        "--sigma_data",
        type=float,
        default=None,
        help="spread of the data, for prediction karras and weighting edm (EDM: 0.5)",
    )
    add("--rescale_betas_zero_snr", "--zero_terminal_snr", action="store_true",
        help="rescale the betas so that the last timestep is pure noise (2305.08891)")  # fmt: skip
    group = parser.add_argument_group("training noise, timesteps and loss (alphabar)")
    for kind in KINDS:
        kind.add_to(group)
    add = group.add_argument
    add(
        "--weighting_scheme",
        default=None,
        choices=list(_SD3),
        help="as in diffusers' scripts for SD3: a weighting or a density",
    )
    add(
        "--loss_weight_floor",
        type=float,
        default=0.0,
        help="lower bound of the weight, for schemes that are 0 at zero SNR",
    )
    add("--min_timestep", type=float, default=None, help="first timestep that is trained")
    add(
        "--max_timestep",
        type=float,
        default=None,
        help="timestep before which training ends, e.g. 1000 for all of 0 ... 999",
    )
    add("--reversed_timesteps", action="store_true",
        help="exchange data and noise in the density, as diffusers' SD3 and kohya's Flux scripts have it")  # fmt: skip
    add("--noise_seed", type=int, default=None, help="seed of training noise and timesteps (default: --seed, or 0)")
    return parser


def schedule_from_arguments(args: argparse.Namespace, base: NoiseSchedule | None = None) -> NoiseSchedule:
    """Return the schedule that the flags describe, where they are silent that of ``base``, the model that is fine-tuned.

    Contradictions are a ValueError, before any model is loaded.

    >>> parser = add_noising_arguments(argparse.ArgumentParser())
    >>> schedule_from_arguments(parser.parse_args([])).prediction.name
    'epsilon'
    >>> base = NoiseSchedule.linear(prediction="v_prediction")
    >>> schedule_from_arguments(parser.parse_args(["--beta_end", "0.01"]), base).curve.beta_schedule
    'linear'
    """
    schedule = _with_prediction(_on_curve(args, base), args)
    if args.rescale_betas_zero_snr:
        schedule = schedule.zero_terminal_snr()
    return schedule if args.schedule_shift is None else schedule.shifted(args.schedule_shift)


def _on_curve(args: argparse.Namespace, base: NoiseSchedule | None) -> NoiseSchedule:
    betas = {name: getattr(args, name) for name in _BETAS if getattr(args, name) is not None}
    if args.flow_shift is not None:
        refused = ["noise_schedule"] * (args.noise_schedule is not None)
        refused += ["rescale_betas_zero_snr"] * args.rescale_betas_zero_snr + [
            n for n in betas if n.startswith("beta_")
        ]
        if refused:
            raise ValueError(
                f"--{refused[0]} does not go with --flow_shift: a flow has no betas and ends in pure noise already; leave it out"
            )
        return NoiseSchedule.flow(args.flow_shift, betas.get("num_train_timesteps", 1000))
    if args.noise_schedule is not None:
        base = read_schedule(args.noise_schedule)
    schedule = NoiseSchedule.scaled_linear() if base is None else base
    return replace(schedule, curve=_with_betas(schedule.curve, betas)) if betas else schedule


def _with_betas(curve: Curve, betas: Mapping[str, Any]) -> Discrete:
    flag = next(iter(betas))
    if not isinstance(curve, Discrete):
        raise ValueError(f"--{flag} does not go with a {curve.kind} schedule, which has no betas; leave it out")
    if curve.trained_betas is not None and "beta_schedule" not in betas:
        raise ValueError(f"the base model's betas are given one by one; give --beta_schedule with --{flag}")
    return replace(curve, trained_betas=None, **betas)


def _with_prediction(schedule: NoiseSchedule, args: argparse.Namespace) -> NoiseSchedule:
    name = "v_prediction" if args.v_parameterization else args.prediction_type
    if args.prediction_type not in (None, name):
        raise ValueError(
            f"--v_parameterization contradicts --prediction_type {args.prediction_type}; give one of the two"
        )
    kind = PREDICTIONS[name] if name is not None else type(schedule.prediction)
    if "sigma_data" not in (field.name for field in fields(kind)):
        return schedule if name is None else schedule.with_prediction(name)
    if args.sigma_data is not None:
        return NoiseSchedule(schedule.curve, {"name": kind.name, "sigma_data": args.sigma_data})
    if isinstance(schedule.prediction, kind):
        return schedule
    raise ValueError(
        f"--prediction_type {name} needs --sigma_data, the standard deviation of the data; EDM uses 0.5 for images in [-1, 1]"
    )


def noising_from_arguments(args: argparse.Namespace, base: NoiseSchedule | None = None) -> Noising:
    """Return the Noising that the flags of :func:`add_noising_arguments` describe; ``base`` as in :func:`schedule_from_arguments`.

    Raises ValueError for flags that contradict each other, naming both.

    >>> parser = add_noising_arguments(argparse.ArgumentParser())
    >>> noising_from_arguments(parser.parse_args(["--snr_gamma", "5"])).weighting
    MinSNR(floor=0.0, gamma=5.0)
    """
    args = _with_weighting_scheme(args)
    schedule = schedule_from_arguments(args, base)
    noises = NOISE.chosen(args)
    return Noising(
        schedule,
        _weighting(args, schedule),
        _timesteps(args, schedule.curve),
        noises[0] if len(noises) == 1 else Chain(tuple(noises)),
        seed=next(seed for seed in (args.noise_seed, getattr(args, "seed", None), 0) if seed is not None),
        loss=LOSS.chosen(args)[0],
    )


def _with_weighting_scheme(args: argparse.Namespace) -> argparse.Namespace:
    """Return the flags with --weighting_scheme said in alphabar's."""
    if args.weighting_scheme is None:
        return args
    kind, name = _SD3[args.weighting_scheme]
    if getattr(args, kind.key) not in (None, name):
        raise ValueError(
            f"--weighting_scheme {args.weighting_scheme} contradicts {kind.flag} {getattr(args, kind.key)}; give one of the two"
        )
    return argparse.Namespace(**vars(args) | {kind.key: name})


def _weighting(args: argparse.Namespace, schedule: NoiseSchedule) -> Any:
    weighting = WEIGHTING.chosen(args, **{"floor": args.loss_weight_floor} if args.loss_weight_floor else {})[0]
    if args.sigma_data is None:
        return weighting
    if hasattr(weighting, "sigma_data"):
        return replace(weighting, sigma_data=args.sigma_data)
    if not hasattr(schedule.prediction, "sigma_data"):
        raise ValueError(
            f"--sigma_data {args.sigma_data} is for prediction karras and weighting edm, and contradicts prediction "
            f"{schedule.prediction.name} with weighting {weighting.name}; leave it out"
        )
    return weighting


def _timesteps(args: argparse.Namespace, curve: Curve) -> Timesteps:
    density = TIMESTEP.chosen(args)[0]
    if isinstance(density, LossSecondMoment):  # importance goes around the density, not into it
        return replace(density, density=_within(args, density.density, curve))
    return _within(args, density, curve)


def _within(args: argparse.Namespace, density: Timesteps, curve: Curve) -> Timesteps:
    if args.reversed_timesteps:
        density = ReversedTimesteps(density=density)
    low, high = args.min_timestep, args.max_timestep
    if low is None and high is None:
        return density
    low, high = 0.0 if low is None else low, float(curve.num_train_timesteps) if high is None else high
    if not low < high:
        raise ValueError(f"--min_timestep must be below --max_timestep, got {low:g} and {high:g}")
    if curve.is_discrete:
        return WithinTimesteps(density=density, low=low, high=high - 1)
    share = (curve.t_max - curve.t_min) / curve.num_train_timesteps
    return WithinTimesteps(density=density, low=curve.t_min + low * share, high=curve.t_min + high * share)
