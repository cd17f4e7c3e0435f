"""Make an average of a given length from EMA snapshots (post-hoc EMA), for alphabar sample."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from ...noising.utils.atomic import require_writable
from ...noising.utils.config_reading import mapping
from ...noising.utils.registry import shown
from ..checkpoints.read import embedded_schedule, read_checkpoint, schedule_beside
from ..checkpoints.safetensors import NETWORK_KEY, OWN_KEY, SHAPE_KEY
from ..ema.posthoc import combine, plan_posthoc, save_tensors

POOR_FIT = 0.1  # share of the density's norm


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``alphabar ema``."""
    parser.add_argument(
        "folder", help="where EMA(..., snapshot_every_n_steps=...) wrote its snapshots"
    )
    parser.add_argument(
        "--sigma_rel",
        type=float,
        required=True,
        help="length of the average as a share of the training, e.g. 0.1",
    )
    parser.add_argument(
        "--step", type=int, default=None, help="time of the average (default: the last snapshot's)"
    )
    parser.add_argument(
        "--checkpoint",
        default=None,
        help="a checkpoint of the same training, for what is not averaged: the network's config, "
        "its schedule, buffers and frozen "
        "weights (default: the newest in the folder, in the one above it, or in checkpoints beside "
        "it)",
    )
    parser.add_argument(
        "--max_error",
        type=float,
        default=POOR_FIT,
        help="how far the average's profile may be from the wanted one, as a share of it (default: "
        "%(default)s)",
    )
    parser.add_argument(
        "--out", default="ema.safetensors", help="the file to write (default: %(default)s)"
    )


def run(args: argparse.Namespace) -> None:
    """Fit, sum and write the average; write nothing if the snapshots do not fit it well enough."""
    plan = plan_posthoc(args.folder, args.sigma_rel, args.step)
    if not plan.error <= args.max_error:
        raise ValueError(
            f"the snapshots do not give this average: the nearest one is off by {plan.error:.0%} "
            "of its profile, more than "
            f"--max_error {args.max_error:g}; take a larger sigma_rel, or snapshots more often, or "
            "accept it with "
            f"--max_error {plan.error + 0.01:.2f}"
        )
    require_writable(Path(args.out).parent)
    step = max(snapshot.step for snapshot in plan.snapshots) if args.step is None else args.step
    weights = combine(plan)
    base = base_of(args.folder, weights, args.checkpoint)
    metadata = {"step": str(step), "sigma_rel": repr(args.sigma_rel)}
    if base is not None:
        weights, metadata = (
            completed(weights, base[1], base[0]),
            metadata | metadata_of(base[1], base[0]),
        )
    save_tensors(args.out, weights, metadata)
    print(
        f"{args.out}: sigma_rel {args.sigma_rel:g} at step {step} from {len(plan.snapshots)} "
        f"snapshots, {in_words(plan.error)}"
    )
    if base is not None:
        print(
            f"all that is not averaged is from {base[0]}; alphabar sample {args.out} draws with it"
        )
    else:
        print(
            "weights alone, which a module loads with strict=False; give --checkpoint for a file "
            "that alphabar sample loads"
        )


def in_words(error: float) -> str:
    """Return the error of an average as text.

    >>> in_words(0.0), in_words(0.031)
    ('exactly the average that was asked for', 'off the profile that was asked for by 3.10% of it')
    """
    return (
        "exactly the average that was asked for"
        if error < 5e-5
        else f"off the profile that was asked for by {error:.2%} of it"
    )


def base_of(
    folder: str, weights: Mapping[str, Tensor], given: str | None
) -> tuple[Path, dict[str, Any]] | None:
    """Return the given checkpoint, or the newest near the snapshots that has all these weights."""
    if given is not None:
        return Path(given), read_checkpoint(given)
    place = Path(folder).resolve()
    near = [
        path
        for at in (place, place.parent, place.parent / "checkpoints")
        for path in at.glob("*.ckpt")
        if path.is_file()
    ]
    for path in sorted(near, key=lambda path: path.stat().st_mtime, reverse=True):
        try:
            checkpoint = read_checkpoint(path)
        except (ValueError, OSError):  # try the next one
            continue
        state = checkpoint.get("state_dict")
        if isinstance(state, Mapping) and set(weights) <= set(state):
            return path, checkpoint
    return None


def completed(
    weights: Mapping[str, Tensor], checkpoint: Mapping[str, Any], path: Path
) -> dict[str, Tensor]:
    """Return the averages, and all other tensors of the checkpoint's state_dict.

    Raises:
        ValueError: the checkpoint is from another model.

    >>> import torch
    >>> sorted(
    ...     completed(
    ...         {"a": torch.ones(1)},
    ...         {"state_dict": {"a": torch.zeros(1), "b": torch.zeros(1)}},
    ...         Path("a.ckpt"),
    ...     )
    ... )
    ['a', 'b']
    """
    state = mapping(f"the state_dict of {str(path)!r}", checkpoint.get("state_dict"))
    tensors = {name: value for name, value in state.items() if isinstance(value, Tensor)}
    other = [
        name
        for name in weights
        if name not in tensors or tensors[name].shape != weights[name].shape
    ]
    if other:
        raise ValueError(
            f"{str(path)!r} is of another model than the snapshots: it has no weight like "
            f"{shown(other[0])}"
        )
    return {name: weights.get(name, value).contiguous() for name, value in tensors.items()}


def metadata_of(checkpoint: Mapping[str, Any], path: Path) -> dict[str, str]:
    """Return the metadata that sampling from the file needs: schedule, network, sample shape.

    >>> metadata_of({"sample_shape": [1, 8, 8]}, Path("nowhere/a.ckpt"))
    {'alphabar.sample_shape': '[1, 8, 8]'}
    """
    schedule = embedded_schedule(checkpoint, path) or schedule_beside(path)
    said = {
        OWN_KEY: None if schedule is None else schedule.to_config(),
        NETWORK_KEY: checkpoint.get("network"),
        SHAPE_KEY: checkpoint.get("sample_shape"),
    }
    return {
        key: json.dumps(value, sort_keys=True) for key, value in said.items() if value is not None
    }
