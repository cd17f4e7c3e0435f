"""Write the tables of the pages in docs/from, from the registries and flags that the code reads.

``python docs/site_build/tables.py`` rewrites the pages; a test compares them with the code. A table
stands between ``<!-- table: NAME -->`` and ``<!-- end -->``.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

from alphabar.noising import WEIGHTINGS
from alphabar.noising.weighting.trainer_compat import Peer
from alphabar.sampling import GRIDS
from alphabar.sampling.interop.diffusers_classes import CLASSES, settings_of_class
from alphabar.sampling.names import ALIASES, SUFFIXES, all_names, resolve
from alphabar.sampling.standalone import STANDALONE
from alphabar.training.flags.options import Option
from alphabar.training.flags.parsing import _NOT_HERE, OPTIONS
from alphabar.training.flags.table import KINDS
from alphabar.training.publishing.settings import SCHEDULE_TYPES

FOLDER = Path(__file__).parent.parent / "from"


def _table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    columns = list(head)
    lines = [columns, ["---"] * len(columns), *map(list, rows)]
    return "\n".join("| " + " | ".join(cell or "–" for cell in line) + " |" for line in lines)


def _code(names: Iterable[str]) -> str:
    return ", ".join(f"`{name}`" for name in names)


def _options(values: Mapping[str, object]) -> str:
    return _code(f"{name}={value!r}" for name, value in values.items())


def _linked(folder: str, name: str) -> str:
    return f"[`{name}`](../gallery/{folder}/{name}.md)"


def _sampler(name: str) -> str:
    return _linked("standalone" if name in STANDALONE else "methods", name)


def _text(words: str) -> str:
    """Return a help text as a cell: without the list of names, and with flags as code."""
    words = re.sub(r"(; names)?: ?\{names\}|, NAME or NAME:option=value,\.\.\.", "", words)
    return re.sub(r"(?<!`)(--\w+)", r"`\1`", words.replace("|", r"\|").strip())


def flags() -> str:
    """Return every flag, its help, and the scheme of Noising whose option it sets."""
    sets = {
        flag.key: " or ".join(f"`{scheme}`" for scheme in flag.schemes[:2])
        + (f", `{flag.field}`" if flag.field else "")
        for kind in KINDS
        for flag in kind.flags
    }

    def row(option: Option) -> list[str]:
        what = sets.get(option.key)
        return [_code(option.names), _text(option.help) + (f" ({what})" if what else "")]

    return _table(["flag", "what it says (scheme, option)"], map(row, OPTIONS))


def refused() -> str:
    """Return the flags of other trainers that have no counterpart, with the advice."""
    rows = (
        [f"`--{name}`", f"`{neutral}`", _text(advice)]
        for name, (neutral, advice) in _NOT_HERE.items()
    )
    return _table(["flag", "accepted value", "instead"], rows)


def weightings() -> str:
    """Return the weights of other trainers that differ from the scheme of their name."""
    rows = []
    for name, kind in WEIGHTINGS.items():
        if isinstance(kind, type) and issubclass(kind, Peer):
            text = (kind.__doc__ or "").split(">>>")[0]
            says = " ".join(text.split()).replace("``", "`").replace("|", r"\|")
            rows.append([_linked("weightings", name), kind.target, says])
    return _table(["name", "of the error of", "what it is"], rows)


def _of_class(name: str) -> list[str]:
    implied = dict(resolve(name)[1])
    if name in CLASSES:
        implied = settings_of_class(name)
    return [_sampler(resolve(name)[0].name), _options(implied)]


def classes() -> str:
    """Return the classes of diffusers, their samplers and what their defaults imply."""
    names = {n for called in all_names().values() for n in called if n.endswith("Scheduler")}
    return _table(
        ["class", "sampler", "its default options"],
        ([f"`{name}`", *_of_class(name)] for name in sorted(names)),
    )


def samplers() -> str:
    """Return the samplers by the names of user interfaces and k-diffusion."""
    rows = []
    for name, called in all_names().items():
        others = [n for n in called if not n.endswith("Scheduler")]
        if name in STANDALONE and not others:
            continue
        kinds = [[n for n in others if (n in ALIASES) is told] for told in (False, True)]
        rows.append([_sampler(name), *map(_code, kinds)])
    return _table(["name", "shown as", "other names"], rows)


def schedulers() -> str:
    """Return the grids by the names of user interfaces."""
    words: dict[str, list[str]] = {grid: [] for grid in GRIDS}
    for suffix, implied in SUFFIXES.items():
        if "grid" in implied:
            words[implied["grid"]].append(suffix.replace("_", " "))
    rows = (
        [_linked("grids", name), SCHEDULE_TYPES.get(name, ""), _code(words[name])] for name in GRIDS
    )
    return _table(["grid", "schedule type of A1111", "last words of a name"], rows)


TABLES: Mapping[str, Callable[[], str]] = {
    make.__name__: make for make in (flags, refused, weightings, classes, samplers, schedulers)
}


def current(page: str) -> str:
    """Return the text of a page with its tables made anew.

    >>> current("<!-- table: refused -->\\n<!-- end -->").count("dream_training")
    1
    """

    def made(found: re.Match[str]) -> str:
        return f"{found[1]}\n\n{TABLES[found[2]]()}\n\n<!-- end -->"

    return re.sub(r"(<!-- table: (\w+) -->).*?<!-- end -->", made, page, flags=re.DOTALL)


if __name__ == "__main__":
    for path in sorted(FOLDER.glob("*.md")):
        path.write_text(current(path.read_text(encoding="utf-8")), encoding="utf-8")
