"""The command ``alphabar``; each subcommand is one small module."""

from __future__ import annotations

import argparse
import os
import sys
import warnings
from collections.abc import Mapping, Sequence
from types import ModuleType
from typing import Any

from . import convert, ema, fit, inspect, plot, sample, samplers

COMMANDS: Mapping[str, ModuleType] = {
    "sample": sample,
    "fit": fit,
    "samplers": samplers,
    "plot": plot,
    "ema": ema,
    "inspect": inspect,
    "convert": convert,
}
"""Every subcommand: a module with a docstring, ``add_arguments(parser)`` and ``run(args)``."""

BROKEN_PIPE = 141  # exit status in a shell when the reader of a pipe has closed: 128 + SIGPIPE


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a subcommand; errors that the user can fix print one line on stderr and exit with 2.

    Errors in files and flags are ValueError, OSError or ImportError. Any other error is a bug in
    alphabar and keeps its traceback. If the reader of the output closes the pipe, as ``head`` does,
    the command ends silently.

    >>> main(["sample", "nowhere.ckpt"])
    2
    """
    try:
        try:
            return _run(parser_of_all().parse_args(arguments))
        finally:
            # flush here: an error at interpreter exit cannot be caught
            sys.stdout.flush()
    except BrokenPipeError:
        # so that the interpreter's last flush does not fail
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return BROKEN_PIPE


def parser_of_all() -> argparse.ArgumentParser:
    """Return the parser of the command with all subcommands.

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
