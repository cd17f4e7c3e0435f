"""The command ``alphabar``: one small module a subcommand."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from types import ModuleType

from . import command_ema, command_inspect, command_plot, command_sample, command_samplers

COMMANDS: Mapping[str, ModuleType] = {
    "sample": command_sample,
    "samplers": command_samplers,
    "plot": command_plot,
    "ema": command_ema,
    "inspect": command_inspect,
}
"""Every subcommand: a module with a docstring, ``add_arguments(parser)`` and ``run(args)``."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a subcommand; what the user can mend is told in one line on stderr, with exit status 2.

    >>> main(["sample", "nowhere.ckpt"])
    2
    """
    parser = argparse.ArgumentParser(
        prog="alphabar", description="One noise schedule, from the first training step to the last sampled image."
    )
    subparsers = parser.add_subparsers(dest="command", required=True)
    for name, command in COMMANDS.items():
        doc = command.__doc__ or ""
        command.add_arguments(subparsers.add_parser(name, help=doc.strip().splitlines()[0], description=doc))
    args = parser.parse_args(arguments)
    try:
        COMMANDS[args.command].run(args)
    except (ValueError, OSError, ImportError) as error:
        print(f"alphabar {args.command}: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
