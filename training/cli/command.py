"""The command ``alphabar``; each subcommand is one small module."""

from __future__ import annotations

import argparse
import ast
import os
import pkgutil
import sys
import warnings
from collections.abc import Sequence
from importlib import import_module
from typing import Any

COMMANDS = ("sample", "fit", "samplers", "plot", "ema", "inspect", "convert")
"""Every subcommand: a module with a docstring, ``add_arguments(parser)`` and ``run(args)``.

A module is imported when its command is called: torch takes seconds.
"""

BROKEN_PIPE = 141  # exit status in a shell when the reader of a pipe has closed: 128 + SIGPIPE


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a subcommand; errors that the user can fix print one line on stderr and exit with 2.

    Errors in files and flags are ValueError, OSError or ImportError. Any other error is a bug in
    alphabar and keeps its traceback. If the reader of the output closes the pipe, as ``head`` does,
    the command ends silently.

    >>> main(["sample", "nowhere.ckpt"])
    2
    """
    given = sys.argv[1:] if arguments is None else arguments
    try:
        try:
            return _run(parser_of_all(given).parse_args(given))
        finally:
            # flush here: an error at interpreter exit cannot be caught
            sys.stdout.flush()
    except BrokenPipeError:
        # so that the interpreter's last flush does not fail
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return BROKEN_PIPE


def parser_of_all(arguments: Sequence[str] = COMMANDS) -> argparse.ArgumentParser:
    """Return the parser of the command with all subcommands.

    Those that ``arguments`` do not name get no arguments of their own.

    >>> parser_of_all().parse_args(["samplers", "euler"]).name
    'euler'
    """
    parser = argparse.ArgumentParser(
        prog="alphabar",
        description="One noise schedule, from the first training step to the last sampled image.",
    )
    subparsers = parser.add_subparsers(dest="command", required=True)
    for name in COMMANDS:
        doc = _documentation(name)
        subparser = subparsers.add_parser(name, help=doc.splitlines()[0], description=doc)
        if name in arguments:
            _module(name).add_arguments(subparser)
    return parser


def _module(name: str) -> Any:
    return import_module(f".{name}", __package__)


def _documentation(name: str) -> str:
    """Return the docstring of a subcommand's module without importing it."""
    source = pkgutil.get_data(__package__ or "", f"{name}.py")
    return ast.get_docstring(ast.parse(source or b"")) or name


def _run(args: argparse.Namespace) -> int:
    def tell(words: object, *_: Any) -> None:
        print(f"alphabar {args.command}: {' '.join(str(words).split())}", file=sys.stderr)

    with warnings.catch_warnings():
        warnings.showwarning = tell
        try:
            _module(args.command).run(args)
        except BrokenPipeError:
            raise
        except (ValueError, OSError, ImportError) as error:
            tell(error)
            return 2
    return 0
