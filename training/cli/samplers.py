"""List all samplers and grids, or describe one of them.

Without a name: list every sampler with its order of convergence, the network calls per step,
whether it draws noise, its source (paper or code) and its other names; then list every grid. With a
name (any of them): show its documentation and options. With ``--for MODEL``: show what the pipeline
of a published model samples with, and what else suits it.
"""

from __future__ import annotations

import argparse
import inspect
import shutil
import textwrap
from collections.abc import Sequence
from typing import Any

from ...sampling import GRIDS, METHODS, Method
from ...sampling.grids import grid_options
from ...sampling.names import all_names, key_of, resolve
from ...sampling.standalone import STANDALONE, StandaloneEntry
from .presets import suitable_samplers

HEADINGS = ("name", "order", "calls", "noise", "source", "also called")
LEGEND = (
    "order: of convergence with default options and exact starting values, weak where it draws "
    "noise (-: does not converge "
    "with the steps, as those for distilled models); "
    "calls: of the network per step (?: it decides); noise: whether it draws any on the way. "
    "A name may end in a grid, as in 'DPM++ 2M Karras'; alphabar samplers NAME says more of one."
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``alphabar samplers``."""
    parser.add_argument("name", nargs="?", help="a sampler or a grid, by any of its names")
    parser.add_argument(
        "--for", dest="preset", metavar="MODEL", help="a preset: flux, sdxl, wan2.2, ..."
    )


def run(args: argparse.Namespace) -> None:
    """Print the table, one entry, or the samplers of a preset."""
    if args.name and args.preset:
        raise ValueError(f"{args.name} and --for {args.preset}: give one of the two")
    if args.preset:
        print(suitable_samplers(args.preset))
    elif args.name:
        print(described(args.name))
    else:
        print(listing(shutil.get_terminal_size((120, 24)).columns))


def listing(width: int = 120) -> str:
    """Return the table of all samplers and grids, at most ``width`` columns wide (but at least 60).

    >>> print(listing().splitlines()[0])
    name                    order  calls  noise  source                    also called
    """
    names = all_names()
    rows = [_row(entry, names[entry.name]) for entry in (*METHODS.values(), *STANDALONE.values())]
    text = columns(HEADINGS, rows, max(width, 60))
    grids = textwrap.fill(
        ", ".join(GRIDS), max(width, 60), initial_indent="grids: ", subsequent_indent="       "
    )
    return "\n\n".join([text, grids, textwrap.fill(LEGEND, max(width, 60))])


def described(name: str) -> str:
    """Return the documentation and the options of a sampler or a grid.

    Raises:
        ValueError: the name is unknown.

    >>> print(described("Euler a").splitlines()[0])
    euler_ancestral: order 1, 1 call of the network per step, draws noise; k-diffusion
    """
    grid = key_of(name)
    if grid not in GRIDS:
        return _described_sampler(name)
    lines = [
        f"grid {grid}",
        "",
        _without_examples(GRIDS[grid].documentation),
        "",
        *_options(grid_options(grid)),
    ]
    return "\n".join(lines) + (f"\n\n{_described_sampler(name)}" if grid in METHODS else "")


def _described_sampler(name: str) -> str:
    entry, implied = resolve(name)
    calls = (
        "the network as often as it needs"
        if entry.evaluations is None
        else _calls(entry.evaluations)
    )
    order = f"order {entry.order}" if entry.order else "does not converge with the steps"
    if isinstance(entry, Method) and entry.reaches:
        best, options = entry.reaches
        order += f" (order {best} with {', '.join(f'{k}={v!r}' for k, v in options.items())})"
    noise = "draws noise" if entry.stochastic else "draws no noise"
    head = f"{entry.name}: {order}, {calls}, {noise}; {entry.source}"
    lines = [head, "", _without_examples(entry.documentation), "", *_options(entry.options)]
    lines += (
        ["also called: " + ", ".join(all_names()[entry.name])] if all_names()[entry.name] else []
    )
    lines += (
        [f"{name!r} implies: " + ", ".join(f"{k}={v!r}" for k, v in implied.items())]
        if implied
        else []
    )
    return "\n".join(lines)


def columns(headings: Sequence[str], rows: Sequence[Sequence[str]], width: int) -> str:
    """Return rows as aligned columns.

    The last column is wrapped at spaces to ``width``; longer words are not split.

    >>> print(columns(("a", "b"), [("1", "one two three")], 10))
    a  b
    1  one two
       three
    """
    lines = [headings, *rows]
    widths = [max(len(line[i]) for line in lines) for i in range(len(headings) - 1)]
    indent = sum(widths) + 2 * len(widths)
    out = []
    for *cells, last in lines:
        start = "  ".join(cell.ljust(w) for cell, w in zip(cells, widths, strict=True))
        wrapped = textwrap.wrap(
            last, max(width - indent, 20), break_long_words=False, break_on_hyphens=False
        ) or [""]
        out += [f"{start}  {wrapped[0]}".rstrip(), *(" " * indent + line for line in wrapped[1:])]
    return "\n".join(out)


def _row(entry: Method | StandaloneEntry, names: Sequence[str]) -> tuple[str, ...]:
    calls = "?" if entry.evaluations is None else str(entry.evaluations)
    noise = "yes" if entry.stochastic else ""
    return entry.name, str(entry.order or "-"), calls, noise, entry.source, ", ".join(names)


def _calls(number: int) -> str:
    return f"{number} call{'s' if number > 1 else ''} of the network per step"


def _options(options: dict[str, Any]) -> list[str]:
    words = ", ".join(f"{name}={value!r}" for name, value in options.items())
    whole = {"subsequent_indent": "         ", "break_on_hyphens": False, "break_long_words": False}
    return textwrap.wrap(f"options: {words}", 120, **whole) if options else []


def _without_examples(text: str) -> str:
    lines = inspect.cleandoc(text).splitlines()
    first = next((i for i, line in enumerate(lines) if line.lstrip().startswith(">>>")), len(lines))
    return "\n".join(lines[:first]).strip()
