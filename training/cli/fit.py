"""Fit tables of few steps to the network of a checkpoint or of a diffusers pipeline.

Writes one table for each number of network calls beside the checkpoint, and a plot of their errors
beside those of known methods. ``alphabar sample --method fitted --steps 6`` draws with one.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from ...noising.utils.atomic import require_writable
from ...sampling import Sampler, fit_table
from ...sampling.fitting.fit import TEACHER, TEACHER_GRID, TEACHER_STEPS
from ...sampling.fitting.provenance import Provenance
from ...sampling.table import Table
from ..fitting.files import table_name, tables_folder, write_table
from ..fitting.tables import DEFAULT_STEPS, FIT_SEEDS, HELD_OUT_SEEDS
from .models import Model, add_model_arguments, answering, device_of, load_model, on_device


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``alphabar fit``."""
    add_model_arguments(parser)
    parser.add_argument(
        "--evaluations",
        type=int,
        nargs="+",
        default=[DEFAULT_STEPS],
        help=f"network calls of each table (default: {DEFAULT_STEPS})",
    )
    parser.add_argument(
        "--refine",
        type=int,
        default=0,
        help="iterations of refinement through the network, minutes each (default: none)",
    )
    parser.add_argument(
        "--teacher_steps",
        type=int,
        default=TEACHER_STEPS,
        help=f"steps of {TEACHER}, whose results are approximated (default: %(default)s)",
    )
    parser.add_argument(
        "--seeds", type=int, default=FIT_SEEDS, help="seeds that are fitted (default: %(default)s)"
    )
    parser.add_argument(
        "--held_out",
        type=int,
        default=HELD_OUT_SEEDS,
        help="more seeds, which measure the error (default: %(default)s)",
    )
    parser.add_argument(
        "--plot", default=None, help="file of the plot (default: beside the tables)"
    )


def run(args: argparse.Namespace) -> None:
    """Fit every table, write it, and plot the errors."""
    from ..plots.tables import plot_fits

    place = tables_folder(args.checkpoint)
    if place.local is not None:
        require_writable(place.local.parent)
    device = device_of(args)
    model = load_model(args, device)
    teacher = Sampler(model.schedule, TEACHER, args.teacher_steps, TEACHER_GRID)
    found: list[Provenance] = []
    for evaluations in sorted(set(args.evaluations)):
        table = fitted(args, model, teacher, evaluations, device)
        assert table.provenance is not None  # made by fit_table
        write_table(table, args.checkpoint)
        found.append(table.provenance)
        print(f"{place / table_name(evaluations)}: {in_words(table.provenance)}")
    picture = args.plot or (os.fspath(place.local / "fitted_tables.png") if place.local else None)
    if picture is not None:
        plot_fits(found, picture)
        print(f"{picture}: error against network calls, known methods beside")


def fitted(
    args: argparse.Namespace, model: Model, teacher: Sampler, evaluations: int, device: torch.device
) -> Table:
    """Return the table with this number of network calls, with a progress bar.

    Raises:
        ValueError: as in ``fit_table``.
    """
    from tqdm import tqdm

    conditioning, unconditional = model.conditions(range(1))
    with tqdm(unit="", leave=False) as bar:

        def show(done: int, total: int, what: str) -> None:
            bar.total, bar.n = total, done
            bar.set_description(f"{evaluations} calls, {what}")

        return fit_table(
            answering(model.network, conditioning),
            model.schedule,
            evaluations,
            shape=model.shape,
            teacher=teacher,
            seeds=args.seeds,
            held_out=args.held_out,
            conditioning=_rows(model, 0, device),
            unconditional=None if unconditional is None else _rows(model, 1, device),
            guidance_scale=model.guidance_scale,
            guidance_rescale=args.guidance_rescale,
            refine=args.refine,
            batch_size=args.batch_size,
            device=device,
            dtype=next(
                (p.dtype for p in model.network.parameters() if p.is_floating_point()), None
            ),
            progress=show,
        )


def _rows(
    model: Model, half: int, device: torch.device
) -> Callable[[Sequence[int]], Mapping[str, Any]]:
    """Return the conditions as a function of seeds, which take classes and prompts in turn."""
    return lambda seeds: on_device(model.conditions(seeds)[half] or {}, device)


def in_words(made: Provenance) -> str:
    """Return the errors of a fit in words.

    >>> from alphabar.noising import NoiseSchedule
    >>> made = Provenance(
    ...     NoiseSchedule.linear(),
    ...     1.0,
    ...     0.0,
    ...     "dpmpp_2m, 80 steps",
    ...     5,
    ...     24,
    ...     8,
    ...     "ipndm",
    ...     0,
    ...     0.02,
    ...     (("unipc, karras", 0.08),),
    ...     0.02,
    ... )
    >>> in_words(made)
    'error 0.02 on 8 seeds held out; the best known method, unipc, karras, has 0.08'
    """
    name, error = made.best_known
    if made.helps:
        return (
            f"error {made.error:.2g} on {made.held_out} seeds held out; the best known method, "
            f"{name}, has {error:.2g}"
        )
    return (
        f"no fit is better than {name} with error {error:.2g} on {made.held_out} seeds held out, "
        "so the table is this method's"
    )
