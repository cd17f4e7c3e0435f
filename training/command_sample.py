"""Sample images from a checkpoint, with the schedule it was trained with and nothing but its own files."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from tqdm import tqdm

from ..noising.files import require_writable
from ..sampling import GRIDS, make_sampler
from .images import save_grid
from .loading import load_checkpoint


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``alphabar sample``."""
    parser.add_argument("checkpoint", help="a checkpoint written by Lightning with ScheduleCheckpoint")
    parser.add_argument("--steps", type=int, default=20, help="sampling steps (default: %(default)s)")
    parser.add_argument(
        "--method",
        default="dpmpp_2m",
        help="sampler, by any of its names, e.g. 'DPM++ 2M Karras' (default: %(default)s)",
    )
    parser.add_argument(
        "--grid",
        default=None,
        help=f"spacing of the steps: {', '.join(GRIDS)} (default: what the name says, or trailing)",
    )
    parser.add_argument("--num_images", type=int, default=16, help="how many images (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="image i uses seed + i (default: %(default)s)")
    parser.add_argument("--batch_size", type=int, default=16, help="images sampled at a time (default: %(default)s)")
    parser.add_argument(
        "--network", default=None, help="'package.module:factory' for a network that is not a diffusers model"
    )
    parser.add_argument("--device", default=None, help="cpu, cuda, mps (default: cuda where there is one)")
    parser.add_argument("--out", default="samples.png", help="the PNG grid to write (default: %(default)s)")


def run(args: argparse.Namespace) -> None:
    """Load, sample, write the grid."""
    if args.num_images < 1 or args.batch_size < 1:
        raise ValueError(
            f"--num_images and --batch_size must be at least 1, got {args.num_images} and {args.batch_size}"
        )
    require_writable(Path(args.out).parent)
    loaded = load_checkpoint(args.checkpoint, network=args.network)
    sampler = make_sampler(loaded.schedule, args.method, args.steps, **({"grid": args.grid} if args.grid else {}))
    device = torch.device(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    network = loaded.network.to(device).eval()
    batches = []
    rounds = -(-args.num_images // args.batch_size)
    with tqdm(desc=f"{args.method}, {args.steps} steps", unit="step") as bar:
        for first in range(0, args.num_images, args.batch_size):
            count = min(args.batch_size, args.num_images - first)
            x = torch.empty(0)
            for progress in sampler.iterate(network, (count, *loaded.sample_shape), seeds=args.seed + first):
                x, bar.total = progress.x, rounds * progress.steps
                bar.update()
            batches.append(x.cpu())
    save_grid(torch.cat(batches), args.out)
    print(f"{args.out}: {args.num_images} images, {args.method}, {args.steps} steps on {loaded.schedule}")
