"""The command ``alphabar``: one small module a subcommand."""

from __future__ import annotations

import argparse
import os
import sys
import warnings
from collections.abc import Mapping, Sequence
from types import ModuleType
from typing import Any

from . import ema, inspect, plot, sample, samplers

COMMANDS: Mapping[str, ModuleType] = {
    "sample": sample,
    "samplers": samplers,
    "plot": plot,
    "ema": ema,
    "inspect": inspect,
}
"""Every subcommand: a module with a docstring, ``add_arguments(parser)`` and ``run(args)``."""

BROKEN_PIPE = 141  # what a shell reports of a program whose reader has gone: 128 + SIGPIPE


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a subcommand; what the user can mend is told in one line on stderr, with exit status 2.

    What is wrong with files and flags is a ValueError, an OSError or an ImportError; any other
    error is one of alphabar, and keeps its traceback. A reader of the output that goes away, as
    ``head`` does, ends the command without a word.

    >>> main(["sample", "nowhere.ckpt"])
    2
    """
    try:
        try:
            return _run(parser_of_all().parse_args(arguments))
        finally:
            # here, and not at the interpreter's end, where nothing can catch what it raises
            sys.stdout.flush()
    except BrokenPipeError:
        # for the last flush of the interpreter
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return BROKEN_PIPE


def parser_of_all() -> argparse.ArgumentParser:
    """Return the parser of the command with all its subcommands.

    >>> parser_of_all().parse_args(["samplers", "euler"]).name
    'euler'
    """
    parser = argparse.ArgumentParser(
        prog="alphabar",
        description="One noise schedule, from the first training step to the last sampled image.",
    )
    subparsers = parser.add_subparsers(dest="command", required=True)
    for name, command in COMMANDS.items():
        doc = command.__doc__ or ""
        command.add_arguments(
            subparsers.add_parser(name, help=doc.strip().splitlines()[0], description=doc)
        )
    return parser


def _run(args: argparse.Namespace) -> int:
    def tell(words: object, *_: Any) -> None:
        print(f"alphabar {args.command}: {' '.join(str(words).split())}", file=sys.stderr)

    with warnings.catch_warnings():
        warnings.showwarning = tell
        try:
            COMMANDS[args.command].run(args)
        except BrokenPipeError:
            raise
        except (ValueError, OSError, ImportError) as error:
            tell(error)
            return 2
    return 0
