"""Plot schedules, weights, timestep densities, grids or sampler tables as PNG, SVG or PDF.

This needs matplotlib.
"""

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
from ...noising.utils.registry import Registry
from ...sampling import GRIDS, Sampler
from ..flags.items import TRANSFORMATIONS, read_schedule, schedule_makers
from ..plots import is_learned, plot_schedules, plot_timesteps, plot_weights
from ..plots.tables import plot_grids, plot_table

F = TypeVar("F", bound=Callable[[argparse.Namespace], object])


@dataclass(frozen=True)
class Picture:
    """A picture of ``alphabar plot``.

    Args:
        name: name of the picture.
        help: help text.
        add_arguments: adds the picture's own arguments to a parser.
        draw: draws the picture and writes it to ``args.out``.
    """

    name: str
    help: str
    add_arguments: Callable[[argparse.ArgumentParser], None]
    draw: Callable[[argparse.Namespace], object]


PICTURES: Registry[Picture] = Registry("picture")
"""Every picture of ``alphabar plot`` by name; ``@register_picture(...)`` adds one."""


def register_picture(
    name: str, help: str, add_arguments: Callable[[argparse.ArgumentParser], None]
) -> Callable[[F], F]:
    """Register a function ``draw(args)`` as a picture; it must write to ``args.out``.

    >>> @register_picture("nothing", "an example", lambda parser: None)
    ... def draw(args): ...
    >>> PICTURES["nothing"].help
    'an example'
    """

    def add(draw: F) -> F:
        PICTURES.add(name, Picture(name, help, add_arguments, draw))
        return draw

    return add


def item_help() -> str:
    """Return the help text for a schedule argument.

    >>> "scaled_linear" in item_help()
    True
    """
    return (
        f"{', '.join(schedule_makers())}, with options as in scaled_linear:beta_end=0.02 and "
        f"{', '.join(TRANSFORMATIONS)} as in flow:shifted=2,t_max=0.5; or a folder with a "
        "scheduler_config.json"
    )


def _schedule_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--schedule", default="scaled_linear", help=f"{item_help()} (default: %(default)s)"
    )
    parser.add_argument(
        "--zero_snr", action="store_true", help="rescale a discrete schedule to zero terminal SNR"
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
        help=f"{item_help()} (default: five of them)",
    )


@register_picture("schedule", "α, σ and log SNR of several schedules", _schedule_arguments)
def _draw_schedules(args: argparse.Namespace) -> object:
    return plot_schedules({item: read_schedule(item) for item in args.schedules}, args.out)


def drawable(registry: Mapping[str, Callable[..., Any]]) -> list[str]:
    """Return the names of entries that can be drawn: not learned, and with no required option.

    Stratified entries are left out, because they look the same as the others.

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


# more lines would hide each other
USUAL_WEIGHTINGS = ("uniform", "snr", "v", "min_snr", "soft_min_snr", "p2", "debiased", "edm")


def _weight_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "weightings",
        nargs="*",
        metavar="weighting",
        help=f"weightings, of {', '.join(WEIGHTINGS)}, with options as in min_snr:gamma=5 "
        f"(default: {', '.join(USUAL_WEIGHTINGS)})",
    )
    parser.add_argument(
        "--prediction",
        nargs="+",
        choices=sorted(PREDICTIONS),
        default=[],
        metavar="type",
        help=f"prediction types, a panel each, of {', '.join(PREDICTIONS)} (default: the "
        "schedule's own)",
    )
    _schedule_argument(parser)


@register_picture(
    "weights",
    "loss weights over log SNR, for several weightings and prediction types",
    _weight_arguments,
)
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
        help=f"densities, of {', '.join(TIMESTEPS)}, with options after a colon (default: all that "
        "do not follow losses)",
    )
    _schedule_argument(parser)


@register_picture(
    "timesteps", "densities of training times over time and log SNR", _timestep_arguments
)
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


@register_picture("grids", "log SNR against the step for several grids", _grid_arguments)
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


@register_picture("table", "the coefficients of a sampler, step by step", _table_arguments)
def _draw_table(args: argparse.Namespace) -> object:
    schedule = read_schedule(args.schedule, args.zero_snr)
    return plot_table(Sampler(schedule, args.method, args.steps, args.grid).table, args.out)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``alphabar plot``: one subcommand per picture."""
    subparsers = parser.add_subparsers(dest="kind", required=True)
    for name, picture in PICTURES.items():
        sub = subparsers.add_parser(name, help=picture.help, description=picture.help)
        picture.add_arguments(sub)
        sub.add_argument(
            "--out", default=f"{name}.png", help="the picture to write (default: %(default)s)"
        )


def run(args: argparse.Namespace) -> None:
    """Draw the requested picture."""
    require_writable(Path(args.out).parent)
    PICTURES[args.kind].draw(args)
    print(args.out)
