"""Options of a command line: added to a parser, adopted where the script has them already, and read
back as what was said.

A script of diffusers or kohya has some of the options itself. One of the same name and meaning is
adopted, with its dest, its type and its default; one that takes something else is refused when the
parser is made. Of an adopted option a value that differs from its default was said; the default
itself is weak: it holds where nothing else was said (of a loss, a density, a schedule), and never
contradicts what was. The defaults travel in the namespace, as JSON in one attribute.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

ADOPTED = "noising_options_of_the_script"


@dataclass(frozen=True)
class Option:
    """An option: its ``names``, the first one ours; each is kept under its own dest, so that two of
    them can be compared.

    ``type``: of its value; bool for a switch. ``names_of``: names that the help lists, read when it
    is shown. ``zero_is_none``: 0 says that there is none, as in diffusers' scripts. ``several``:
    items that are kept as one text, with spaces.

    >>> Option(("--snr_gamma", "--min_snr_gamma"), float).key
    'snr_gamma'
    """

    names: tuple[str, ...]
    type: Callable[[str], Any] = str
    help: str = ""
    choices: Collection[str] | None = None
    names_of: Collection[str] = ()
    zero_is_none: bool = False
    several: bool = False
    metavar: str | None = None

    @property
    def key(self) -> str:
        """The name under which the value is read back."""
        return dest_of(self.names[0])

    def add_to(self, parser: argparse.ArgumentParser, group: Any) -> dict[str, tuple[str, Any]]:
        """Add what the parser lacks to one of its groups; return the dest and the default of what
        it had, by name.
        """
        adopted: dict[str, tuple[str, Any]] = {}
        for name in self.names:
            existing = next(
                (action for action in parser._actions if name in action.option_strings), None
            )
            if existing is None:
                group.add_argument(
                    name, dest=dest_of(name), default=None, help=self._help(name), **self._how()
                )
            else:
                self._require_same(name, existing)
                adopted[name] = (existing.dest, existing.default)
        return adopted

    def _help(self, name: str) -> str:
        if name != self.names[0]:
            return f"{self.names[0]} under its name in other trainers"
        return self.help.format(names=", ".join(self.names_of)) if self.names_of else self.help

    def _how(self) -> dict[str, Any]:
        if self.type is bool:
            return {"action": "store_const", "const": True}
        joined = {"nargs": "+", "action": _Joined} if self.several else {}
        shown = {"metavar": self.metavar} if self.metavar else {}
        choices = None if self.choices is None else sorted(self.choices)
        return {"type": self.type, "choices": choices, **joined, **shown}

    def _require_same(self, name: str, existing: argparse.Action) -> None:
        takes, own = (
            _takes(existing.nargs, existing.type),
            "several" if self.several else _takes(self._nargs, self.type),
        )
        same = takes in _READ_AS[own]
        if same and self.choices and existing.choices is not None:
            same = bool(set(self.choices) & set(map(str, existing.choices)))
            takes, own = (
                f"one of {', '.join(map(str, existing.choices))}",
                f"one of {', '.join(sorted(self.choices))}",
            )
        if not same:
            raise ValueError(
                f"the parser's {name} takes {takes}, alphabar's {name} takes {own} "
                f"({self._help(name)}): they do not mean the same; "
                "rename the parser's, or leave alphabar's out with add_noising_arguments(parser, "
                f"without=[{name!r}])"
            )

    @property
    def _nargs(self) -> int | None:
        return 0 if self.type is bool else None

    def convert(self, name: str, value: Any) -> Any:
        """Return a value as the option's type, None for one that says nothing; ValueError, naming
        the flag, for another.
        """
        if value is None or (self.type is bool and not value):
            return None
        if self.several and not isinstance(value, str):
            return " ".join(value)
        try:
            value = self.type(value) if isinstance(value, str) and self.type is not bool else value
        except (TypeError, ValueError) as error:
            raise ValueError(f"{name} does not take {value!r}: {error}") from error
        return None if self.zero_is_none and value == 0 else value


class _Joined(argparse.Action):
    """Keeps several items as one text: loggers of hyperparameters refuse lists."""

    def __call__(
        self, parser: Any, namespace: argparse.Namespace, values: Any, option_string: Any = None
    ) -> None:
        setattr(namespace, self.dest, " ".join(values))


def dest_of(name: str) -> str:
    """Return the dest that argparse gives a name.

    >>> dest_of("--snr_gamma")
    'snr_gamma'
    """
    return name.lstrip("-").replace("-", "_")


_READ_AS = {  # what an option that takes this is read from
    "no value": {"no value"},
    "a number": {"a number", "text", "a value"},
    "text": {"text", "a value"},
    "several": {"several", "text", "a value"},
}


def _takes(nargs: Any, kind: Any) -> str:
    if nargs == 0:
        return "no value"
    if nargs not in (None, 1, "?"):
        return "several"
    return {None: "text", str: "text", int: "a number", float: "a number"}.get(kind, "a value")


def add_options(
    options: Iterable[Option],
    parser: argparse.ArgumentParser,
    group: Any,
    without: Collection[str] = (),
) -> None:
    """Add options to a group of the parser, adopting those that it has; ``without``: names that are
    left out.

    >>> parser = argparse.ArgumentParser()
    >>> _ = parser.add_argument("--snr_gamma", type=float, default=5.0)
    >>> add_options([Option(("--snr_gamma",), float)], parser, parser)
    >>> read_options(parser.parse_args([]), [Option(("--snr_gamma",), float)]).weak
    {'snr_gamma': 5.0}
    """
    adopted: dict[str, tuple[str, Any]] = json.loads(parser.get_default(ADOPTED) or "{}")
    for option in options:
        for name in option.names:
            if name in without:
                adopted[name] = ("", None)
        kept = tuple(name for name in option.names if name not in without)
        if kept:
            for name, (dest, default) in _only(option, kept).add_to(parser, group).items():
                adopted[name] = (dest, default if isinstance(default, str | int | float) else None)
    parser.set_defaults(**{ADOPTED: json.dumps(adopted)})


def _only(option: Option, names: tuple[str, ...]) -> Option:
    return replace(option, names=names)


@dataclass(frozen=True)
class Said:
    """What a command line says: values that were ``given``, and ``weak`` ones, the defaults of
    options that were adopted.

    Both by the key of their option. ``names``: how each was written.

    >>> said = Said({"snr_gamma": 5.0}, {"noise_offset": 0.1}, {"snr_gamma": "--min_snr_gamma"})
    >>> said.value("noise_offset"), said.written("snr_gamma")
    (0.1, '--min_snr_gamma 5.0')
    """

    given: Mapping[str, Any]
    weak: Mapping[str, Any] = field(default_factory=dict)
    names: Mapping[str, str] = field(default_factory=dict)

    def value(self, key: str, default: Any = None) -> Any:
        """Return what was given, else what is weak, else ``default``."""
        return self.given.get(key, self.weak.get(key, default))

    def written(self, key: str) -> str:
        """Return the flag as it was written: its name and, unless it is a switch, its value."""
        name, value = self.names.get(key, f"--{key}"), self.value(key)
        return name if value is True or value is None else f"{name} {value}"


def read_options(args: argparse.Namespace, options: Sequence[Option]) -> Said:
    """Return what a namespace says; two names of one option with different values are a ValueError.

    >>> option = Option(("--snr_gamma", "--min_snr_gamma"), float)
    >>> read_options(argparse.Namespace(snr_gamma=5.0, min_snr_gamma=3.0), [option])
    Traceback (most recent call last):
    ValueError: --snr_gamma 5.0 and --min_snr_gamma 3.0 say the same option differently; give ...
    """
    adopted: dict[str, tuple[str, Any]] = json.loads(getattr(args, ADOPTED, None) or "{}")
    given: dict[str, Any] = {}
    weak: dict[str, Any] = {}
    names: dict[str, str] = {}
    for option in options:
        for name in option.names:
            dest, default = adopted.get(name, (dest_of(name), None))
            raw = getattr(args, dest, None) if dest else None
            value = option.convert(name, raw)
            if value is None:
                continue
            if name in adopted and value == option.convert(name, default):
                weak.setdefault(option.key, value)
                continue
            if given.get(option.key, value) != value:
                raise ValueError(
                    f"{names[option.key]} {given[option.key]} and {name} {value} say the same "
                    "option differently; "
                    "give one of the two"
                )
            names.setdefault(option.key, name)
            given.setdefault(option.key, value)
    return Said(given, weak, names)
