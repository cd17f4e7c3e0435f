"""Draw schedules, weights, timestep densities, grids and sampler tables as pictures (PNG, SVG or PDF); needs matplotlib."""

from __future__ import annotations

import argparse
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from ...noising import PREDICTIONS, TIMESTEPS, WEIGHTINGS
from ...noising.utils.atomic import require_writable
from ...noising.utils.items import make_item
from ...sampling import GRIDS, Sampler
from ..flags.items import SCHEDULES, TRANSFORMATIONS, read_schedule
from ..plots import is_learned, plot_schedules, plot_timesteps, plot_weights
from ..plots.tables import plot_grids, plot_table

T = TypeVar("T")


@dataclass(frozen=True)
class Kind:
    """One kind of picture: ``add_arguments(parser)`` beside those that all have, and ``draw(args)``, which writes args.out."""

    help: str
    add_arguments: Callable[[argparse.ArgumentParser], None]
    draw: Callable[[argparse.Namespace], object]


def _schedule_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--schedule", default="scaled_linear", help=f"{ITEM} (default: %(default)s)"
    )
    parser.add_argument(
        "--zero_snr", action="store_true", help="rescale a discrete schedule to zero terminal SNR"
    )


ITEM = (
    f"{', '.join(SCHEDULES)}, with options as in scaled_linear:beta_end=0.02 and {', '.join(TRANSFORMATIONS)} as in "
    "flow:shifted=2,t_max=0.5; or a folder with a scheduler_config.json"
)


def _schedule_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "schedules",
        nargs="*",
        metavar="schedule",
        default=[
            "scaled_linear",
            "scaled_linear:zero_snr=true",
            "squaredcos_cap_v2",
            "flow",
            "flow:shift=3",
        ],
        help=f"{ITEM} (default: five of them)",
    )


def _draw_schedules(args: argparse.Namespace) -> object:
    return plot_schedules({item: read_schedule(item) for item in args.schedules}, args.out)


def drawable(registry: Mapping[str, Callable[..., Any]]) -> list[str]:
    """Return the names of what can be drawn as it is: not learned, with no option missing, and once (stratified ones look the same).

    >>> drawable(TIMESTEPS)[0]
    'uniform'
    """
    whole = {name: make for name, make in registry.items() if not _missing(make)}
    entries = {name: make() for name, make in whole.items()}
    return [
        name
        for name, entry in entries.items()
        if not is_learned(entry) and not getattr(entry, "stratified", False)
    ]


def _missing(make: Callable[..., Any]) -> bool:
    return any(p.default is p.empty for p in inspect.signature(make).parameters.values())


# more would hide each other
USUAL_WEIGHTINGS = (
    "uniform",
    "snr",
    "v",
    "min_snr",
    "soft_min_snr",
    "p2",
    "debiased",
    "edm",
)


def _weight_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "weightings",
        nargs="*",
        metavar="weighting",
        help=f"weightings, of {', '.join(WEIGHTINGS)}, with options as in min_snr:gamma=5 (default: {', '.join(USUAL_WEIGHTINGS)})",
    )
    parser.add_argument(
        "--prediction",
        nargs="+",
        choices=sorted(PREDICTIONS),
        default=[],
        metavar="type",
        help=f"prediction types, a panel each, of {', '.join(PREDICTIONS)} (default: the schedule's own)",
    )
    _schedule_argument(parser)


def _draw_weights(args: argparse.Namespace) -> object:
    chosen = {item: make_item(item, WEIGHTINGS) for item in args.weightings or USUAL_WEIGHTINGS}
    return plot_weights(
        read_schedule(args.schedule, args.zero_snr), chosen, args.prediction, args.out
    )


def _timestep_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "densities",
        nargs="*",
        metavar="density",
        help=f"densities, of {', '.join(TIMESTEPS)}, with options after a colon (default: all that do not follow losses)",
    )
    _schedule_argument(parser)


def _draw_timesteps(args: argparse.Namespace) -> object:
    chosen = {item: make_item(item, TIMESTEPS) for item in args.densities or drawable(TIMESTEPS)}
    return plot_timesteps(read_schedule(args.schedule, args.zero_snr), chosen, args.out)


def _grid_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "grids",
        nargs="*",
        metavar="grid",
        default=["linspace", "trailing", "karras", "exponential", "beta", "align_your_steps"],
        help=f"grids, of {', '.join(GRIDS)} (default: six of them)",
    )
    parser.add_argument(
        "--steps", type=int, default=20, help="sampling steps (default: %(default)s)"
    )
    _schedule_argument(parser)


def _draw_grids(args: argparse.Namespace) -> object:
    return plot_grids(read_schedule(args.schedule, args.zero_snr), args.grids, args.steps, args.out)


def _table_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "method",
        nargs="?",
        default="dpmpp_2m",
        help="sampler, by any of its names (default: %(default)s)",
    )
    parser.add_argument(
        "--steps", type=int, default=20, help="sampling steps (default: %(default)s)"
    )
    parser.add_argument(
        "--grid",
        default=None,
        help="spacing of the steps (default: what the name says, or trailing)",
    )
    _schedule_argument(parser)


def _draw_table(args: argparse.Namespace) -> object:
    schedule = read_schedule(args.schedule, args.zero_snr)
    return plot_table(Sampler(schedule, args.method, args.steps, args.grid).table, args.out)


KINDS: Mapping[str, Kind] = {
    "schedule": Kind("α, σ and log SNR of several schedules", _schedule_arguments, _draw_schedules),
    "weights": Kind(
        "loss weights over log SNR, for several weightings and prediction types",
        _weight_arguments,
        _draw_weights,
    ),
    "timesteps": Kind(
        "densities of training times over time and log SNR", _timestep_arguments, _draw_timesteps
    ),
    "grids": Kind("log SNR against the step for several grids", _grid_arguments, _draw_grids),
    "table": Kind("the coefficients of a sampler, step by step", _table_arguments, _draw_table),
}
"""Every kind of picture; a new one is two functions and a line here."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``alphabar plot``: a subcommand for each kind."""
    subparsers = parser.add_subparsers(dest="kind", required=True)
    for name, kind in KINDS.items():
        sub = subparsers.add_parser(name, help=kind.help, description=kind.help)
        kind.add_arguments(sub)
        sub.add_argument(
            "--out", default=f"{name}.png", help="the picture to write (default: %(default)s)"
        )


def run(args: argparse.Namespace) -> None:
    """Draw the picture that was asked for."""
    require_writable(Path(args.out).parent)
    KINDS[args.kind].draw(args)
    print(args.out)
