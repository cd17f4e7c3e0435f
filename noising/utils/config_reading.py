"""Read configs: size-limited JSON, and values of the right type, finite and in range.

A config comes from a file that a person may have written, edited or damaged. Every mistake is a
ValueError that names the mistake, the value found and the value expected. It is raised before
anything is computed from the config.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn, cast, get_type_hints

from ..curves.base import MAX_TIMESTEPS
from .registry import lookup, shown

MAX_BYTES = 64 << 20  # limit of a config file; with the maximum number of betas it has about 30 MB
MAX_BRACKETS = 10_000  # limit of objects and lists in a config; schedules have fewer than ten
MAX_VALUES = MAX_TIMESTEPS + 10_000


def read_json(path: Path) -> Any:
    """Read a JSON file.

    Raises a ValueError that names the file if it is corrupt, or too large to be a config.

    >>> import tempfile
    >>> path = Path(tempfile.mkdtemp(), "a.json")
    >>> _ = path.write_text("{")
    >>> read_json(path)  # doctest: +ELLIPSIS
    Traceback (most recent call last):
    ValueError: ...a.json' is not valid JSON (...); restore it from a checkpoint, or write it ...
    """
    size = os.path.getsize(path)
    if size > MAX_BYTES:
        raise ValueError(
            f"{str(path)!r} has {size} bytes, and no config has more than {MAX_BYTES}; name "
            "another file"
        )
    try:
        return parse_json(path.read_bytes())
    except ValueError as error:
        advice = "restore it from a checkpoint, or write it anew with save_pretrained"
        raise ValueError(f"{str(path)!r} is not valid JSON ({error}); {advice}") from error


def parse_json(
    content: str | bytes, max_brackets: int = MAX_BRACKETS, max_values: int = MAX_VALUES
) -> Any:
    """Return the value of a JSON text.

    Raises ValueError for NaN and Infinity, which JSON does not have, for a key that is given twice,
    and for more brackets or commas than the limits, which are counted before the text is parsed. A
    byte order mark is skipped.

    >>> parse_json('{"a": NaN}')
    Traceback (most recent call last):
    ValueError: NaN is no JSON; write a finite number
    """
    text = content.decode("utf-8-sig") if isinstance(content, bytes) else content
    brackets, values = text.count("{") + text.count("["), text.count(",")
    if brackets > max_brackets or values > max_values:
        raise ValueError(
            f"{brackets} brackets and {values} commas, at most {max_brackets} and {max_values} are "
            "read: no such config"
        )
    try:
        return json.loads(text, object_pairs_hook=_each_once, parse_constant=_no_constant)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def _each_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for i, name in enumerate(names) if name in names[:i])
        raise ValueError(f"the key {shown(twice)} is given twice; remove one of the two")
    return found


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON; write a finite number")


# -- values ----------------------------------------------------------------------------------------


def mapping(what: str, value: Any) -> dict[str, Any]:
    """Return a mapping with text keys as a dict; raise ValueError for any other value.

    >>> mapping("the curve", {1: 2})
    Traceback (most recent call last):
    ValueError: the curve must have keys of text, got the key 1
    """
    if not isinstance(value, Mapping):
        raise ValueError(f"{what} must be a mapping of settings, got {shown(value)}")
    for key in value:
        if not isinstance(key, str):
            raise ValueError(f"{what} must have keys of text, got the key {shown(key)}")
    return dict(value)


def number(what: str, value: Any) -> float:
    """Return a finite number as a float.

    Raises ValueError for any other value, including bools and texts.

    >>> number("beta_end", "0.012")
    Traceback (most recent call last):
    ValueError: beta_end must be a finite number, got '0.012'
    """
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"{what} must be a finite number, got {shown(value)}")
    if not -1e300 < value < 1e300:  # also excludes NaN, and integers too large for a float
        raise ValueError(f"{what} must be a finite number, got {shown(value)}")
    return float(value)


def whole(what: str, value: Any) -> int:
    """Return a whole number; raise ValueError for any other value.

    >>> whole("num_train_timesteps", 1000.5)
    Traceback (most recent call last):
    ValueError: num_train_timesteps must be a whole number, got 1000.5
    """
    if isinstance(value, bool) or not isinstance(value, int):
        raise ValueError(f"{what} must be a whole number, got {shown(value)}")
    return value


def flag(what: str, value: Any) -> bool:
    """Return a bool, null as false; raise ValueError for any other value.

    >>> flag("rescale_betas_zero_snr", "false")
    Traceback (most recent call last):
    ValueError: rescale_betas_zero_snr must be true or false, got 'false'
    """
    if value is not None and not isinstance(value, bool):
        raise ValueError(f"{what} must be true or false, got {shown(value)}")
    return bool(value)


def word(what: str, value: Any) -> str:
    """Return a text; raise ValueError for any other value.

    >>> word("prediction_type", None)
    Traceback (most recent call last):
    ValueError: prediction_type must be a word, got None
    """
    if not isinstance(value, str):
        raise ValueError(f"{what} must be a word, got {shown(value)}")
    return value


def numbers(what: str, value: Any) -> tuple[float, ...] | None:
    """Return a tuple of finite numbers, or None for null; raise ValueError for any other value.

    >>> numbers("trained_betas", [0.1, None])
    Traceback (most recent call last):
    ValueError: trained_betas[1] must be a finite number, got None
    """
    if value is None:
        return None
    array = getattr(value, "ndim", None) == 1 and hasattr(value, "tolist")  # of torch or numpy
    if not (isinstance(value, Sequence) or array) or isinstance(value, str | bytes):
        raise ValueError(f"{what} must be a list of numbers, got {shown(value)}")
    # before tolist: an expanded array of one number may have any length
    if len(value) > MAX_TIMESTEPS:
        raise ValueError(f"{what} must have at most {MAX_TIMESTEPS} numbers, got {len(value)}")
    value = cast(Any, value).tolist() if array else value
    return tuple(
        entry if type(entry) is float and math.isfinite(entry) else number(f"{what}[{i}]", entry)
        for i, entry in enumerate(value)
    )


KINDS: Mapping[Any, Callable[[str, Any], Any]] = {
    int: whole,
    float: number,
    bool: flag,
    str: word,
    Sequence[float] | None: numbers,
}
"""The reader of a value, by the type of its field."""


def settings(
    what: str, kind: type, values: Mapping[str, Any], known: Mapping[str, Any]
) -> dict[str, Any]:
    """Return the settings of a dataclass ``kind``, each with the type of its field.

    Raises ValueError for settings that are not ``known``.

    >>> from alphabar.noising import Flow
    >>> settings("a flow curve", Flow, {"shift": "3"}, {"shift": 1.0})
    Traceback (most recent call last):
    ValueError: shift of a flow curve must be a finite number, got '3'
    """
    types = get_type_hints(kind)
    read = {}
    for name, value in values.items():
        lookup(f"setting of {what}", name, known)
        reader = KINDS.get(types.get(name))
        read[name] = reader(f"{name} of {what}", value) if reader is not None else value
    return read
