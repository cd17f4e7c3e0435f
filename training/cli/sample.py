"""Sample images from a checkpoint or a diffusers pipeline, with the schedule of its training.

Only the model's own files are needed.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...noising.utils.atomic import require_writable
from ...sampling import GRIDS, Sampler, make_sampler
from ...sampling.fitting.provenance import FITTED
from ...sampling.table import Table
from ..checkpoints.diffusers_folders import load_vae
from ..diffusers_text_to_image import decode_images
from ..fitting.files import read_table
from ..fitting.tables import DEFAULT_STEPS as FITTED_STEPS
from .models import Model, add_model_arguments, answering, device_of, load_model, on_device

DEFAULT_STEPS = 20


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``alphabar sample``."""
    add_model_arguments(parser)
    parser.add_argument(
        "--steps",
        type=int,
        default=None,
        help=f"sampling steps (default: {DEFAULT_STEPS}, for fitted {FITTED_STEPS})",
    )
    parser.add_argument(
        "--method",
        default="dpmpp_2m",
        help="sampler, by any of its names, e.g. 'DPM++ 2M Karras', or fitted, for the table of "
        "alphabar fit beside the checkpoint (default: %(default)s)",
    )
    parser.add_argument(
        "--table", default=None, help="file of another table of alphabar fit, for --method fitted"
    )
    parser.add_argument(
        "--grid",
        default=None,
        help=f"spacing of the steps: {', '.join(GRIDS)} (default: what the name says, or trailing)",
    )
    parser.add_argument(
        "--num_images", type=int, default=16, help="how many images (default: %(default)s)"
    )
    parser.add_argument(
        "--seed", type=int, default=0, help="image i uses seed + i (default: %(default)s)"
    )
    parser.add_argument(
        "--vae",
        default=None,
        help="folder of the VAE that decodes the samples (default: the pipeline's)",
    )
    parser.add_argument(
        "--out", default="samples.png", help="the PNG grid to write (default: %(default)s)"
    )


def run(args: argparse.Namespace) -> None:
    """Load the model, sample, and write the grid."""
    from ..images import save_grid

    if args.num_images < 1 or args.batch_size < 1:
        raise ValueError(
            f"--num_images and --batch_size must be at least 1, got {args.num_images} and "
            f"{args.batch_size}"
        )
    require_writable(Path(args.out).parent)
    device = device_of(args)
    vae = load_vae(args.vae).to(device).eval() if args.vae else None
    table = fitted_table(args)
    model = load_model(args, device)
    model = model if vae is None else replace(model, vae=vae)
    sampler = sampler_of(args, model, table)
    save_grid(draw(args, model, sampler, device), args.out)
    print(
        f"{args.out}: {args.num_images} images, {sampler.name}, {sampler.steps or 'its own'} steps "
        f"on {model.schedule}"
    )


def fitted_table(args: argparse.Namespace) -> Table | None:
    """Return the table that ``--method fitted`` asks for; None for other methods.

    Raises:
        ValueError: ``--table`` or ``--grid`` contradicts the method.
        FileNotFoundError: there is no table of this number of steps.
    """
    if args.method != FITTED:
        if args.table is not None:
            raise ValueError(f"--table is for --method fitted, got --method {args.method}")
        return None
    if args.grid is not None:
        raise ValueError("a fitted table has its own points; leave out --grid")
    if args.table is not None:
        table = Table.load(args.table)
        if args.steps not in (None, len(table.steps)):
            raise ValueError(
                f"{args.table!r} has {len(table.steps)} steps, got --steps {args.steps}"
            )
        return table
    return read_table(args.checkpoint, FITTED_STEPS if args.steps is None else args.steps)


def sampler_of(args: argparse.Namespace, model: Model, table: Table | None) -> Any:
    """Return the sampler of the arguments.

    Raises:
        ValueError: the method or the grid is unknown, or the table is of another schedule.
    """
    if table is not None:
        return Sampler.from_table(table, model.schedule)
    steps = DEFAULT_STEPS if args.steps is None else args.steps
    grid = {"grid": args.grid} if args.grid else {}
    return make_sampler(model.schedule, args.method, steps, **grid)


def draw(args: argparse.Namespace, model: Model, sampler: Any, device: torch.device) -> Tensor:
    """Return the images, shape (num_images, channels, height, width), on the CPU.

    Raises:
        ValueError: the images are not finite.
    """
    from tqdm import tqdm

    dtype = next((p.dtype for p in model.network.parameters() if p.is_floating_point()), None)
    batches = []
    rounds = -(-args.num_images // args.batch_size)
    with tqdm(desc=f"{sampler.name}, {sampler.steps or 'its own'} steps", unit="step") as bar:
        for first in range(0, args.num_images, args.batch_size):
            images = range(first, min(first + args.batch_size, args.num_images))
            conditioning, unconditional = model.conditions(images)
            x = torch.empty(0)
            for progress in sampler.iterate(
                answering(model.network, conditioning),
                (len(images), *model.shape),
                seeds=args.seed + first,
                conditioning=on_device(conditioning, device),
                unconditional=None if unconditional is None else on_device(unconditional, device),
                guidance_scale=model.guidance_scale,
                guidance_rescale=args.guidance_rescale,
                device=device,
                dtype=dtype,
            ):
                x, bar.total = progress.x, rounds * progress.steps
                bar.update()
            if not bool(x.isfinite().all()):
                raise ValueError(
                    "the samples hold NaN or infinity: look at the weights, or take a smaller "
                    "--guidance_scale"
                )
            batches.append((x if model.vae is None else decode_images(model.vae, x)).cpu())
    return torch.cat(batches)
