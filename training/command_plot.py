"""Draw grids and sampler tables as pictures (PNG, SVG or PDF); needs matplotlib."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from ..noising import NoiseSchedule
from ..noising.files import require_writable
from ..noising.registry import lookup
from ..sampling import GRIDS, Sampler
from ..sampling.plotting import plot_grids, plot_table

SCHEDULES: Mapping[str, Callable[[], NoiseSchedule]] = {
    "linear": NoiseSchedule.linear,
    "scaled_linear": NoiseSchedule.scaled_linear,
    "squaredcos_cap_v2": NoiseSchedule.squaredcos_cap_v2,
    "cosine": NoiseSchedule.cosine,
    "flow": NoiseSchedule.flow,
    "karras": NoiseSchedule.karras,
    "variance_preserving": NoiseSchedule.variance_preserving,
    "variance_exploding": NoiseSchedule.variance_exploding,
}
"""The schedules that have a name on the command line; others are read from a folder."""


@dataclass(frozen=True)
class Kind:
    """One kind of picture: ``add_arguments(parser)`` beside those that all have, and ``draw(schedule, args)``, which writes args.out."""

    help: str
    add_arguments: Callable[[argparse.ArgumentParser], None]
    draw: Callable[[NoiseSchedule, argparse.Namespace], object]


def _grid_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "grids",
        nargs="*",
        metavar="grid",
        default=["linspace", "trailing", "karras", "exponential", "beta", "align_your_steps"],
        help=f"grids, of {', '.join(GRIDS)} (default: six of them)",
    )
    parser.add_argument("--steps", type=int, default=20, help="sampling steps (default: %(default)s)")


def _draw_grids(schedule: NoiseSchedule, args: argparse.Namespace) -> object:
    return plot_grids(schedule, args.grids, args.steps, args.out)


def _table_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "method", nargs="?", default="dpmpp_2m", help="sampler, by any of its names (default: %(default)s)"
    )
    parser.add_argument("--steps", type=int, default=20, help="sampling steps (default: %(default)s)")
    parser.add_argument("--grid", default=None, help="spacing of the steps (default: what the name says, or trailing)")


def _draw_table(schedule: NoiseSchedule, args: argparse.Namespace) -> object:
    return plot_table(Sampler(schedule, args.method, args.steps, args.grid).table, args.out)


KINDS: Mapping[str, Kind] = {
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
            "--schedule",
            default="scaled_linear",
            help=f"{', '.join(SCHEDULES)}, or a folder with a scheduler_config.json (default: %(default)s)",
        )
        sub.add_argument("--zero_snr", action="store_true", help="rescale a discrete schedule to zero terminal SNR")
        sub.add_argument("--out", default=f"{name}.png", help="the picture to write (default: %(default)s)")


def run(args: argparse.Namespace) -> None:
    """Draw the picture that was asked for."""
    require_writable(Path(args.out).parent)
    KINDS[args.kind].draw(read_schedule(args.schedule, args.zero_snr), args)
    print(args.out)


def read_schedule(name: str, zero_snr: bool = False) -> NoiseSchedule:
    """Return the schedule of a name or a folder; raises ValueError or FileNotFoundError where there is none.

    >>> read_schedule("scaled_linear", zero_snr=True).has_zero_terminal_snr
    True
    """
    known = Path(name).exists() or "/" in name
    schedule = NoiseSchedule.from_pretrained(name) if known else lookup("schedule", name, SCHEDULES)()
    if not zero_snr:
        return schedule
    return schedule.with_prediction("v_prediction").zero_terminal_snr()
