"""Report how a model file or folder was trained, what is missing in it and what contradicts.

The name of a preset (flux, wan2.2/high) reports a published model. The exit status is 1 if
something contradicts.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from ...noising import PRESETS
from ..checkpoints.inspect import Inspection, inspect_path
from .presets import preset_report, presets_of


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``alphabar inspect``."""
    parser.add_argument(
        "paths",
        nargs="+",
        metavar="path",
        help="a .safetensors file, a checkpoint, a folder with a scheduler_config.json, a "
        "diffusers pipeline, or a preset",
    )


def run(args: argparse.Namespace) -> None:
    """Print a report for every path."""
    reports = [
        preset_report(path) if path in PRESETS and not Path(path).exists() else inspect_path(path)
        for path in args.paths
    ]
    print("\n\n".join(map(_with_presets, reports)))
    if any(isinstance(report, Inspection) and report.contradictions for report in reports):
        raise SystemExit(1)


def _with_presets(report: Inspection | str) -> str:
    schedule = report.schedule if isinstance(report, Inspection) else None
    names = [] if schedule is None else presets_of(schedule)
    return f"{report}\nthe schedule of the presets: {', '.join(names)}" if names else str(report)
