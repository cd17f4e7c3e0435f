"""Write a model so that other tools read the noise schedule that it was trained with.

A .safetensors file gets the marker tensors v_pred and ztsnr (ComfyUI, Forge, A1111), metadata, and
a schedule folder beside it. A diffusers pipeline gets a scheduler_config.json that says the whole
schedule, in a class that reads it. Weights are copied byte for byte; an interrupted run leaves the
source whole. See alphabar inspect for what is missing.
"""

from __future__ import annotations

import argparse

from ..checkpoints.convert import convert_path
from ..flags.items import read_schedule


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``alphabar convert``."""
    parser.add_argument("path", help="a .safetensors file, a checkpoint, or a folder")
    where = parser.add_mutually_exclusive_group()
    where.add_argument("--out", metavar="PATH", help="the file or folder to write; must not exist")
    where.add_argument(
        "--in-place", "--in_place", action="store_true", help="change the model itself"
    )
    parser.add_argument("--dry-run", "--dry_run", action="store_true", help="write nothing")
    parser.add_argument(
        "--schedule",
        metavar="ITEM",
        help="the schedule of the training, where the model does not say it: a name with options "
        "(scaled_linear:prediction=v_prediction) or a folder",
    )
    parser.add_argument(
        "--zero_snr", action="store_true", help="rescale --schedule to zero terminal SNR"
    )


def run(args: argparse.Namespace) -> None:
    """Convert, and print what was changed."""
    if args.zero_snr and args.schedule is None:
        raise ValueError("--zero_snr is for --schedule; give it too")
    schedule = None if args.schedule is None else read_schedule(args.schedule, args.zero_snr)
    print(
        convert_path(
            args.path, args.out, in_place=args.in_place, schedule=schedule, dry_run=args.dry_run
        )
    )
