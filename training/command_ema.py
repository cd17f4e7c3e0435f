"""Make the average of a wanted length from a folder of snapshots (post-hoc EMA)."""

from __future__ import annotations

import argparse
from pathlib import Path

from ..noising.files import require_writable
from .posthoc import combine, plan_posthoc, save_tensors

POOR_FIT = 0.1  # of the density's norm


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``alphabar ema``."""
    parser.add_argument("folder", help="where EMA(..., snapshot_every_n_steps=...) wrote its snapshots")
    parser.add_argument(
        "--sigma_rel", type=float, required=True, help="length of the average as a share of the training, e.g. 0.1"
    )
    parser.add_argument("--step", type=int, default=None, help="time of the average (default: the last snapshot's)")
    parser.add_argument("--out", default="ema.safetensors", help="the file to write (default: %(default)s)")


def run(args: argparse.Namespace) -> None:
    """Fit, sum, write."""
    plan = plan_posthoc(args.folder, args.sigma_rel, args.step)
    require_writable(Path(args.out).parent)
    step = max(snapshot.step for snapshot in plan.snapshots) if args.step is None else args.step
    metadata = {"step": str(step), "sigma_rel": repr(args.sigma_rel)}
    save_tensors(args.out, combine(plan), metadata)
    print(f"{args.out}: sigma_rel {args.sigma_rel:g} at step {step} from {len(plan.snapshots)} snapshots, ", end="")
    print(f"profile matched to {plan.error:.2%}")
    if plan.error > POOR_FIT:
        print("the snapshots are too far apart for this average: take a larger sigma_rel, or snapshots more often")
