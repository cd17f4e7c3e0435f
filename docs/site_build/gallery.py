"""Generate the gallery: a page with facts, formula and picture for every registered name."""

from __future__ import annotations

import inspect
import io
import re
import textwrap
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import matplotlib

from alphabar.noising import BETA_SCHEDULES, CURVES, TIMESTEPS, WEIGHTINGS, NoiseSchedule
from alphabar.sampling import GRIDS, METHODS, STANDALONE, Method, Sampler
from alphabar.sampling.grids import grid_options
from alphabar.sampling.names import all_names
from alphabar.training.plots.schedules import (
    is_learned,
    plot_schedules,
    plot_timesteps,
    plot_weights,
)
from alphabar.training.plots.tables import plot_grids, plot_table

from .reference import write_text

matplotlib.use("agg")
matplotlib.rcParams["svg.hashsalt"] = "alphabar"  # equal files from equal pictures

PLAIN = NoiseSchedule.scaled_linear()
LOW, HIGH = "the linear betas of Stable Diffusion", "zero terminal SNR"


@dataclass(frozen=True)
class Entry:
    """One page: a name, its facts, its text, its code and its picture."""

    name: str
    facts: Mapping[str, str]
    text: str
    code: object
    picture: Callable[[], Any] | None
    line: str
    image: str = ""


@dataclass(frozen=True)
class Kind:
    """One folder of pages."""

    folder: str
    title: str
    about: str
    entries: Callable[[], Iterable[Entry]]


def _options(values: Mapping[str, Any]) -> str:
    return ", ".join(f"`{name}={value!r}`" for name, value in values.items()) or "none"


def _linked(source: str) -> str:
    """Return a source with its arXiv numbers as links."""
    return re.sub(r"\b(\d{4}\.\d{4,5})\b", r"[\1](https://arxiv.org/abs/\1)", source)


def _prose(documentation: str) -> str:
    """Return a docstring as Markdown: without its examples, its Args as a list."""
    text = re.split(r"^>>>", documentation, maxsplit=1, flags=re.MULTILINE)[0].strip()
    text = re.sub(r":(?:func|class|meth|mod):`~?([^`]*)`", r"`\1`", text).replace("``", "`")
    out, inside = [], False
    for line in text.splitlines():
        section = re.fullmatch(r"(Args|Returns|Raises):", line)
        if section:
            out += ["", f"**{section[1]}**", ""]
            inside = True
        elif inside and re.match(r"    \S", line):
            name, _, rest = line.strip().partition(": ")
            out.append(f"- `{name}`: {rest}" if rest else f"- {line.strip()}")
        else:
            out.append(line if not inside else f"  {line.strip()}" if line.strip() else "")
            inside = inside and (not line or line.startswith(" "))
    return "\n".join(out)


def suits(method: Method) -> str:
    """Return what a method suits, from its facts.

    >>> suits(METHODS["lcm"])
    'models distilled to few steps'
    """
    if method.inverse:
        return "inversion of images"
    if "cfg_pp" in method.name or method.name == "cfgpp_ud10_ab":
        return "guidance with CFG++, at scales between 0 and 1"
    if method.order == 0:
        return "models distilled to few steps"
    if method.stochastic:
        return "many steps, where noise mends the errors of the network"
    if method.evaluations > 1:
        return "accurate reference images, from about 30 calls of the network"
    return "20 to 50 steps" if method.order == 1 else "5 to 30 steps"


def _methods() -> Iterator[Entry]:
    names = all_names()
    for name, method in METHODS.items():
        best = f"; {method.reaches[0]} with {_options(method.reaches[1])}" if method.reaches else ""
        facts = {
            "order": (str(method.order) if method.order else "does not converge") + best,
            "calls of the network per step": str(method.evaluations),
            "draws noise": "yes" if method.stochastic else "no",
            "suits": suits(method),
            "default grid": f"`{method.grid}`",
            "options": _options(method.options),
            "also called": ", ".join(f"`{n}`" for n in names[name]) or "none",
            "source": _linked(method.source),
        }
        yield Entry(
            name, facts, method.documentation, method.formula, _table_of(name), suits(method)
        )


def _table_of(name: str) -> Callable[[], Any]:
    def draw() -> Any:
        for steps in (8, 4, 2):  # some few-step samplers take few
            try:
                return plot_table(Sampler(PLAIN, name, steps).table)
            except ValueError:
                continue
        return plot_table(Sampler(PLAIN, name, 1).table)

    return draw


def _standalone() -> Iterator[Entry]:
    names = all_names()
    for name, entry in STANDALONE.items():
        facts = {
            "calls of the network per step": str(entry.evaluations or "it decides"),
            "draws noise": "yes" if entry.stochastic else "no",
            "also called": ", ".join(f"`{n}`" for n in names[name]) or "none",
            "source": _linked(entry.source),
        }
        yield Entry(name, facts, entry.documentation, None, None, "samplers without a table")


def _grids() -> Iterator[Entry]:
    for name, grid in GRIDS.items():
        facts = {"options": _options(grid_options(name))}
        yield Entry(name, facts, grid.documentation, grid.formula, _grid_of(name), _first(grid))


def _grid_of(name: str) -> Callable[[], Any] | None:
    def draw() -> Any:
        others = [other for other in ("trailing",) if other != name]
        return plot_grids(PLAIN, [name, *others], steps=10)

    return draw


def _first(entry: Any) -> str:
    text = getattr(entry, "documentation", None) or inspect.getdoc(entry) or ""
    return text.splitlines()[0] if text else ""


def _entries_of(
    registry: Mapping[str, Any], draw: Callable[[str, Any], Any] | None
) -> Iterator[Entry]:
    for name, make in registry.items():
        required = any(p.default is p.empty for p in inspect.signature(make).parameters.values())
        drawn = None
        if draw is not None and not required and not is_learned(make()):
            drawn = _partial(draw, name, make)
        code = getattr(make, "func", make)  # a partial of a class
        fields = {
            n: p.default
            for n, p in inspect.signature(make).parameters.items()
            if p.default is not p.empty
        }
        text = inspect.getdoc(code) or ""
        yield Entry(name, {"options": _options(fields)}, text, code, drawn, _first(code))


def _partial(draw: Callable[[str, Any], Any], name: str, make: Any) -> Callable[[], Any]:
    return lambda: draw(name, make)


def _weights(name: str, make: Any) -> Any:
    predictions = ["epsilon", "v_prediction"]
    return plot_weights(PLAIN, {name: make()}, predictions)


def _times(name: str, make: Any) -> Any:
    return plot_timesteps(NoiseSchedule.flow(), {name: make()})


def _curve(name: str, make: Any) -> Any:
    return plot_schedules({name: NoiseSchedule(make(), "v_prediction")})


def _betas() -> Iterator[Entry]:
    for name, formula in BETA_SCHEDULES.items():
        yield Entry(
            name,
            {},
            inspect.getdoc(formula) or "",
            formula,
            _partial(_curve, name, partial(CURVES["discrete"], name)),
            _first(formula),
        )


KINDS = (
    Kind(
        "methods", "Methods", "The formula of one step; `Sampler(schedule, name, steps)`.", _methods
    ),
    Kind(
        "standalone",
        "Samplers without a table",
        "Samplers whose steps depend on what the network says.",
        _standalone,
    ),
    Kind("grids", "Grids", "The points that a sampler visits; `grid=name`.", _grids),
    Kind("curves", "Curves", "α(t) and σ(t) of a schedule.", lambda: _entries_of(CURVES, _curve)),
    Kind("beta_schedules", "Beta schedules", "β of discrete schedules.", _betas),
    Kind(
        "weightings",
        "Weightings",
        "The weight of the loss; `Noising(schedule, weighting=name)`.",
        lambda: _entries_of(WEIGHTINGS, _weights),
    ),
    Kind(
        "densities",
        "Timestep densities",
        "How often each time is trained; `Noising(schedule, timesteps=name)`.",
        lambda: _entries_of(TIMESTEPS, _times),
    ),
)


def _source(code: object) -> str:
    source = textwrap.dedent(inspect.getsource(code))  # type: ignore[arg-type]
    return re.sub(r'("""|\'\'\').*?\1\n', "", source, count=1, flags=re.DOTALL)


def svg(figure: Any) -> str:
    """Return a figure as the text of an SVG file, equal for equal figures."""
    from matplotlib import pyplot

    text = io.StringIO()
    figure.savefig(text, format="svg", metadata={"Date": None})
    pyplot.close(figure)
    return text.getvalue()


def page(entry: Entry) -> str:
    """Return the page of an entry as Markdown."""
    lines = [f"# {entry.name}", "", _prose(entry.text), ""]
    if entry.facts:
        lines += ["| | |", "|---|---|", *(f"| {k} | {v} |" for k, v in entry.facts.items()), ""]
    if entry.picture is not None:
        lines += [f"![{entry.name}]({entry.image})", ""]
    if entry.code is not None:
        lines += ["## Formula", "", "```python", _source(entry.code).rstrip(), "```", ""]
    return "\n".join(lines)


def files() -> list[str]:
    """Return the pages that ``write`` makes, below docs/."""
    pages = [f"{kind.folder}/{entry.name}" for kind in KINDS for entry in kind.entries()]
    pages += ["index", *(f"{kind.folder}/index" for kind in KINDS)]
    return [f"gallery/{page}.md" for page in pages]


def write(folder: Path) -> None:
    """Write the pages, their pictures, and the gallery."""
    gallery = ["# Gallery", "", "Everything that has a name, drawn by `alphabar plot`.", ""]
    for kind in KINDS:
        # Sphinx puts the images of all folders into one
        entries = [replace(e, image=f"{kind.folder}-{e.name}.svg") for e in kind.entries()]
        cards = [_card(folder, kind, entry) for entry in entries]
        gallery += [f"## {kind.title}", "", kind.about, "", '<div class="cards">', *cards, "</div>"]
        gallery += ["", "```{toctree}", ":hidden:", "", f"{kind.folder}/index", "```", ""]
        names = [entry.name for entry in entries]
        lines = [f"# {kind.title}", "", kind.about, "", "| name | |", "|---|---|"]
        lines += [f"| [{entry.name}]({entry.name}.md) | {entry.line} |" for entry in entries]
        lines += ["", "```{toctree}", ":hidden:", "", *names, "```"]
        write_text(folder / kind.folder / "index.md", "\n".join(lines))
    write_text(folder / "index.md", "\n".join(gallery))


def _card(folder: Path, kind: Kind, entry: Entry) -> str:
    """Write the page and the picture of an entry; return its card in the gallery."""
    path = f"{kind.folder}/{entry.name}"
    write_text(folder / f"{path}.md", page(entry))
    image = ""
    if entry.picture is not None:
        write_text(folder / kind.folder / entry.image, svg(entry.picture()))
        image = f'<img loading="lazy" src="../_images/{entry.image}" alt="">'
    return f'<a class="card" href="{path}.html">{image}<span>{entry.name}</span></a>'
