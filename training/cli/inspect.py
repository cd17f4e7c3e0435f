"""Report how a model file or folder was trained, what is missing in it and what contradicts.

The exit status is 1 if something contradicts.
"""

from __future__ import annotations

import argparse

from ..checkpoints.inspect import inspect_path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``alphabar inspect``."""
    parser.add_argument(
        "paths",
        nargs="+",
        metavar="path",
        help="a .safetensors file, a checkpoint, a folder with a scheduler_config.json, or a "
        "diffusers pipeline",
    )


def run(args: argparse.Namespace) -> None:
    """Print a report for every path."""
    reports = [inspect_path(path) for path in args.paths]
    print("\n\n".join(map(str, reports)))
    if any(report.contradictions for report in reports):
        raise SystemExit(1)
