"""Add options to a parser, adopt those that the script already has, and read their values.

Scripts of diffusers or kohya already have some of the options. An option with the same name and
meaning is adopted: its dest, type and default are kept. An option that takes something else is
rejected with an error when the parser is built.

A value of an adopted option that differs from its default counts as given by the user. The default
itself is weak: it applies only if nothing else was given (for a loss, a density, a schedule), and
it never causes a contradiction. The defaults are stored in the namespace, as JSON in one attribute.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

ADOPTED = "noising_options_of_the_script"

SAYING_THE_SAME = "and {} say the same option differently"
Made = TypeVar("Made")


@dataclass(frozen=True)
class Option:
    """One option, possibly with several names.

    Each name has its own dest, so that the values of two names can be compared.

    Args:
        names: all names; the first one is alphabar's.
        type: type of the value; bool for a switch.
        help: help text.
        choices: allowed values.
        names_of: names that the help lists; read when the help is shown.
        zero_is_none: 0 means "not set", as in diffusers' scripts.
        several: takes several items, which are stored as one string, separated by spaces.
        metavar: metavar in the help.

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
        """The key of the value in :class:`Said`."""
        return dest_of(self.names[0])

    def add_to(self, parser: argparse.ArgumentParser, group: Any) -> dict[str, tuple[str, Any]]:
        """Add the names that the parser lacks to one of its groups.

        Returns:
            Dest and default of each name that the parser already has, by name.
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
        """Convert a value to the option's type; None means that the option is not set.

        Raises:
            ValueError: the value cannot be converted; the message names the flag.
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
    """Store several items as one string: hyperparameter loggers reject lists."""

    def __call__(
        self, parser: Any, namespace: argparse.Namespace, values: Any, option_string: Any = None
    ) -> None:
        setattr(namespace, self.dest, " ".join(values))


def dest_of(name: str) -> str:
    """Return the dest that argparse derives from an option name.

    >>> dest_of("--snr_gamma")
    'snr_gamma'
    """
    return name.lstrip("-").replace("-", "_")


_READ_AS = {  # what alphabar's option takes: what the script's option may take
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
    """Add options to a group of the parser; adopt the options that the parser already has.

    ``without``: names that are not added.

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
    """The options of a command line, by the key of each option.

    Args:
        given: values that the user gave.
        weak: defaults of adopted options.
        names: the name under which each option was written.

    >>> said = Said({"snr_gamma": 5.0}, {"noise_offset": 0.1}, {"snr_gamma": "--min_snr_gamma"})
    >>> said.value("noise_offset"), said.written("snr_gamma")
    (0.1, '--min_snr_gamma 5.0')
    """

    given: Mapping[str, Any]
    weak: Mapping[str, Any] = field(default_factory=dict)
    names: Mapping[str, str] = field(default_factory=dict)

    def value(self, key: str, default: Any = None) -> Any:
        """Return the given value, else the weak value, else ``default``."""
        return self.given.get(key, self.weak.get(key, default))

    def written(self, key: str) -> str:
        """Return the flag as the user wrote it: its name, and its value unless it is a switch."""
        name, value = self.names.get(key, f"--{key}"), self.value(key)
        return name if value is True or value is None else f"{name} {value}"

    def made(self, key: str, make: Callable[[], Made]) -> Made:
        """Return ``make()``; a ValueError of it names the flag."""
        try:
            return make()
        except ValueError as error:
            raise ValueError(f"{self.written(key)}: {error}") from error


def contradiction(one: str, other: str, how: str = "contradicts {}") -> ValueError:
    """Return the error for two flags that cannot both be given.

    >>> contradiction("--v_parameterization", "--prediction_type epsilon")
    ValueError('--v_parameterization contradicts --prediction_type epsilon; give one of the two')
    """
    return ValueError(f"{one} {how.format(other)}; give one of the two")


def read_options(args: argparse.Namespace, options: Sequence[Option]) -> Said:
    """Return the options in a namespace.

    Raises:
        ValueError: two names of one option have different values.

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
                first = f"{names[option.key]} {given[option.key]}"
                raise contradiction(first, f"{name} {value}", SAYING_THE_SAME)
            names.setdefault(option.key, name)
            given.setdefault(option.key, value)
    return Said(given, weak, names)
