"""Command-line flags of the noising side, for any argparse script, under the names that diffusers and kohya users know."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from ..noising import (
    BETA_SCHEDULES,
    NOISES,
    PREDICTIONS,
    TIMESTEPS,
    WEIGHTINGS,
    Curve,
    Discrete,
    MinSNR,
    NoiseSchedule,
    Noising,
    Offset,
)
from ..noising.noise import resolve_noise
from ..noising.weighting import resolve_weighting

_BETA_FLAGS = ("beta_schedule", "beta_start", "beta_end", "num_train_timesteps")


def add_noising_arguments(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Add the flags from which :func:`noising_from_arguments` makes a Noising; return the parser.

    >>> args = add_noising_arguments(argparse.ArgumentParser()).parse_args(
    ...     ["--prediction_type", "v_prediction", "--rescale_betas_zero_snr", "--noise_offset", "0.1"])
    >>> noising = noising_from_arguments(args)
    >>> noising.schedule.has_zero_terminal_snr, noising.noise.name
    (True, 'offset')
    """
    group = parser.add_argument_group("noise schedule (alphabar)")
    add = group.add_argument
    add(
        "--beta_schedule",
        default=None,
        choices=sorted(BETA_SCHEDULES),
        help="shape of the betas (default: the base model's, or scaled_linear)",
    )
    add("--beta_start", type=float, default=None, help="first beta (default: the base model's, or 0.00085)")
    add("--beta_end", type=float, default=None, help="last beta (default: the base model's, or 0.012)")
    add("--num_train_timesteps", type=int, default=None, help="training timesteps (default: the base model's, or 1000)")
    add(
        "--flow_shift",
        type=float,
        default=None,
        help="train a rectified flow with this shift instead of betas (SD3 uses 3)",
    )
    add(
        "--prediction_type",
        default=None,
        choices=sorted(PREDICTIONS),
        help="what the network predicts (default: the base model's, or epsilon; on a flow flow_prediction)",
    )
    add(
        "--rescale_betas_zero_snr",
        action="store_true",
        help="rescale the betas so that the last timestep is pure noise (2305.08891)",
    )
    add("--loss_weighting", default=None, choices=sorted(WEIGHTINGS), help="weight of the loss (default: uniform)")
    add(
        "--snr_gamma", type=float, default=None, help="min-SNR weighting with this gamma (2303.09556; the paper uses 5)"
    )
    add(
        "--loss_weight_floor",
        type=float,
        default=0.0,
        help="lower bound of the weight, for schemes that are 0 at zero SNR",
    )
    add(
        "--timestep_sampling",
        default="uniform",
        choices=sorted(TIMESTEPS),
        help="density of training timesteps (default: %(default)s)",
    )
    add("--noise", default=None, choices=sorted(NOISES), help="kind of noise (default: gaussian)")
    add("--noise_offset", type=float, default=0.0, help="strength of offset noise (0: none)")
    add("--noise_seed", type=int, default=0, help="seed of training noise and timesteps (default: %(default)s)")
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
    betas = {name: getattr(args, name) for name in _BETA_FLAGS if getattr(args, name) is not None}
    if args.flow_shift is not None:
        refused = ["rescale_betas_zero_snr"] * args.rescale_betas_zero_snr + [n for n in betas if n.startswith("beta_")]
        if refused:
            raise ValueError(
                f"--{refused[0]} does not go with --flow_shift: a flow has no betas and ends in pure noise already; leave it out"
            )
        return NoiseSchedule.flow(
            args.flow_shift, betas.get("num_train_timesteps", 1000), args.prediction_type or "flow_prediction"
        )
    schedule = NoiseSchedule.scaled_linear() if base is None else base
    if betas:
        schedule = replace(schedule, curve=_with_betas(schedule.curve, betas))
    if args.prediction_type is not None:
        schedule = schedule.with_prediction(args.prediction_type)
    return schedule.zero_terminal_snr() if args.rescale_betas_zero_snr else schedule


def _with_betas(curve: Curve, betas: Mapping[str, Any]) -> Discrete:
    if not isinstance(curve, Discrete):
        raise ValueError(
            f"--{next(iter(betas))} does not go with a base model on a {curve.kind} schedule, which has no betas; leave it out"
        )
    if curve.trained_betas is not None and "beta_schedule" not in betas:
        raise ValueError(
            f"the base model's betas are given one by one; give --beta_schedule with --{next(iter(betas))}"
        )
    return replace(curve, trained_betas=None, **betas)


def noising_from_arguments(args: argparse.Namespace, base: NoiseSchedule | None = None) -> Noising:
    """Return the Noising that the flags of :func:`add_noising_arguments` describe; ``base`` as in :func:`schedule_from_arguments`.

    Raises ValueError for flags that contradict each other, naming both.

    >>> parser = add_noising_arguments(argparse.ArgumentParser())
    >>> noising_from_arguments(parser.parse_args(["--snr_gamma", "5"])).weighting
    MinSNR(floor=0.0, gamma=5.0)
    """
    schedule = schedule_from_arguments(args, base)
    return Noising(schedule, _weighting(args), args.timestep_sampling, _noise(args), seed=args.noise_seed)


def _weighting(args: argparse.Namespace) -> Any:
    floor = {"floor": args.loss_weight_floor} if args.loss_weight_floor else {}
    if args.snr_gamma is None:
        return type(resolve_weighting(args.loss_weighting or "uniform"))(**floor)
    if args.loss_weighting not in (None, MinSNR.name):
        raise ValueError(
            f"--snr_gamma is min-SNR weighting and contradicts --loss_weighting {args.loss_weighting}; give one of the two"
        )
    return MinSNR(gamma=args.snr_gamma, **floor)


def _noise(args: argparse.Namespace) -> Any:
    if not args.noise_offset:
        return resolve_noise(args.noise or "gaussian")
    if args.noise not in (None, Offset.name):
        raise ValueError(f"--noise_offset is offset noise and contradicts --noise {args.noise}; give one of the two")
    return Offset(args.noise_offset)
