"""Names of samplers: ours, those of A1111, k-diffusion and ComfyUI, and diffusers' classes.

A name resolves to a method and its implied settings: a grid, and options of the grid and the
method. The last words of a name can be the grid, as in 'DPM++ 2M Karras'. A diffusers class implies
its default options: method, spacing, order. Explicit values override them. Case, the kind of
separator, and 'k_', 'sample_' and 'gpu' are ignored.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from difflib import get_close_matches
from functools import lru_cache
from inspect import Parameter
from typing import Any, NamedTuple

from ..noising.utils.registry import lookup
from ..noising.utils.validation import one_of
from .grids import GRIDS, Grid, choose_grid, grid_parameters
from .interop.diffusers_classes import CLASSES, class_named, settings_of_class
from .methods import METHODS, Method
from .options import check_option
from .standalone import STANDALONE, StandaloneEntry

ALIASES: Mapping[str, tuple[str, dict[str, Any]]] = {
    # A1111's and k-diffusion's short forms
    "dpm_2_a": ("dpm_2_ancestral", {}),
    "dpm_ad": ("dpm_adaptive", {"final": "sigma_min"}),
    # ComfyUI
    "uni_pc": ("unipc", {"order": 3, "solver_type": "bh1"}),
    "uni_pc_bh2": ("unipc", {"order": 3}),
    "res_multistep_ancestral": ("res_multistep", {"eta": 1.0}),
    # diffusers: classes equal to another class, for other models
    "DDIMParallelScheduler": ("ddim", {}),
    "CogVideoXDDIMScheduler": ("ddim", {}),
    "CogVideoXDPMScheduler": ("dpmpp_2m_sde", {}),
    "DDPMParallelScheduler": ("ddpm", {}),
    "UnCLIPScheduler": ("ddpm", {}),
    "EDMDPMSolverMultistepScheduler": ("dpm_solver_multistep", {}),
    "FlowMatchEulerDiscreteScheduler": ("euler", {}),
    "FlowMatchHeunDiscreteScheduler": ("flow_heun", {}),
    "FlowMatchLCMScheduler": ("lcm", {}),
}
"""Other names that are not in a method's ``aliases``: the method and the implied options.

The options of diffusers classes are in ``diffusers_classes``.
"""

INIT_NOISES = ("marginal", "sigma", "unit")
RUN_OPTIONS = {
    "init_noise": Parameter(
        "init_noise", Parameter.KEYWORD_ONLY, default=INIT_NOISES[0], annotation=str
    )
}
"""Options of every sampler, in addition to those of its method and its grid."""

SUFFIXES: Mapping[str, dict[str, Any]] = {
    "ka": {"grid": "karras"},
    "uniform": {"grid": "linspace"},
    "ddim": {"grid": "ddim_uniform"},
    "ays": {"grid": "align_your_steps"},
    "ays_sdxl": {"grid": "align_your_steps", "variant": "sdxl"},
    "ays_svd": {"grid": "align_your_steps", "variant": "svd"},
    "gpu": {},
}
"""Last words of a name that select a grid, in addition to the names of the grids.

Example: 'DPM++ 2M SDE Karras'.
"""

PREFIXES = ("sample_", "k_")

Known = tuple[Method | StandaloneEntry, dict[str, Any]]


def resolve(name: str | Method | StandaloneEntry) -> Known:
    """Return the entry of a name, method or standalone sampler, and its implied options.

    The options include ``grid``.

    Raises:
        ValueError: The name is unknown; the error lists the nearest names.

    >>> entry, implied = resolve("DPM++ 2M SDE Karras")
    >>> entry.name, implied
    ('dpmpp_2m_sde', {'grid': 'karras'})
    >>> resolve("DPM adaptive")[0].factory.__name__
    'DPMAdaptive'
    """
    if isinstance(name, Method | StandaloneEntry):
        return name, {}
    found = _found(key_of(name))
    if found is None:
        raise ValueError(f"unknown method {name!r}; {_nearest(key_of(name))}")
    return found[0], dict(found[1])


def resolve_method(name: str | Method) -> tuple[Method, dict[str, Any]]:
    """Return the method of a name and the options that the name implies, including ``grid``.

    Raises:
        ValueError: The name is unknown (the error lists the nearest names), or it is a standalone
            sampler, which has no table.

    >>> method, implied = resolve_method("DPM++ 2M Karras")
    >>> method.name, implied
    ('dpmpp_2m', {'grid': 'karras'})
    >>> resolve_method("dpm2m")
    Traceback (most recent call last):
    ValueError: unknown method 'dpm2m'; did you mean 'DPM2', 'DPM++ 2M' or 'DPM2 a'?
    """
    entry, implied = resolve(name)
    if isinstance(entry, StandaloneEntry):
        raise ValueError(
            f"{name!r} has no table of fixed steps; make it with Sampler(schedule, {name!r})"
        )
    return entry, implied


class Settings(NamedTuple):
    """The settings of a sampler: its method, steps and grid, and the options of both."""

    method: Method
    steps: int | None
    grid: str | Grid
    options: dict[str, Any]


def resolve_settings(
    name: str | Method,
    steps: int | None = None,
    grid: str | Grid | None = None,
    options: Mapping[str, Any] | None = None,
) -> Settings:
    """Resolve arguments: explicit value, then the name's implied value, then the method's default.

    ``steps`` is None if neither the arguments nor the name set it. If the grid is replaced, the
    implied options that the new grid also has are kept.

    Raises:
        ValueError: A name or an option is unknown.

    >>> settings = resolve_settings("DPM++ 2M Karras", 20, options={"rho": 5.0})
    >>> settings.grid, settings.options
    ('karras', {'rho': 5.0})
    """
    method, implied = resolve_method(name)
    kind = None if isinstance(name, Method) else class_named(name)
    if kind is not None:
        asked = grid if grid is not None else implied["grid"]
        implied = settings_of_class(kind, asked if isinstance(asked, str) else None)
    own_grid = implied.pop("grid", None)
    if own_grid is None:
        own_grid, implied = method.grid, dict(method.grid_options) | implied
    custom = any(name in (options or {}) for name in ("timesteps", "sigmas"))
    steps, grid, said = choose_grid(
        steps, own_grid if grid is None and not custom else grid, options or {}, method.inverse
    )
    known = RUN_OPTIONS | method.parameters | grid_parameters(grid)
    for option in said:
        lookup(f"option of {method.name} on the {grid} grid", option, known)
    if kind is not None:  # of a class, keep only values that differ from our defaults
        usual = {name: parameter.default for name, parameter in known.items()} | dict(
            method.defaults
        )
        implied = {name: value for name, value in implied.items() if value != usual.get(name)}
    merged = {name: value for name, value in implied.items() if name in known} | said
    one_of("init_noise", merged.get("init_noise", INIT_NOISES[0]), INIT_NOISES)
    return Settings(
        method,
        steps,
        grid,
        {name: check_option(known[name], value) for name, value in merged.items()},
    )


def all_names() -> dict[str, list[str]]:
    """Return the other names of each entry, by the entry's own name.

    >>> all_names()["euler"][:2]
    ['Euler', 'EulerDiscreteScheduler']
    """
    entries = {**METHODS, **STANDALONE}
    names = {name: list(entry.aliases) for name, entry in entries.items()}
    for alias, (name, _) in ALIASES.items():
        names[name].append(alias)
    return names


def key_of(name: object) -> str:
    """Return the normalised form of a name, for comparison.

    >>> key_of("DPM++ 2S a"), key_of("dpmpp-2s_A")
    ('dpmpp_2s_a', 'dpmpp_2s_a')
    """
    return re.sub(r"[\s_-]+", "_", str(name).strip().casefold().replace("++", "pp"))


def _known_names() -> dict[str, Known]:
    return _names_at(METHODS.changes + STANDALONE.changes)


@lru_cache(maxsize=1)
def _names_at(changes: int) -> dict[str, Known]:
    """Return the entry of every name; ``changes`` of the registries is the cache key."""
    entries: dict[str, Method | StandaloneEntry] = {**METHODS, **STANDALONE}
    known: dict[str, Known] = {}
    for entry in entries.values():
        known[key_of(entry.name)] = (entry, {})
        known |= {
            key_of(called): (entry, dict(implied)) for called, implied in entry.aliases.items()
        }
    known |= {key_of(alias): (entries[name], implied) for alias, (name, implied) in ALIASES.items()}
    return known | {
        key_of(name): (known[key_of(name)][0], settings_of_class(name)) for name in CLASSES
    }


def _found(key: str) -> Known | None:
    known = _known_names()
    if key in known:
        return known[key]
    for prefix in PREFIXES:
        if key.startswith(prefix):
            return _found(key.removeprefix(prefix))
    for suffix in _suffixes(key):
        found = _found(key[: -len(suffix) - 1])
        if found is not None:
            return found[0], found[1] | SUFFIXES.get(suffix, {"grid": suffix})
    return None


def _suffixes(key: str) -> list[str]:
    return sorted(
        (suffix for suffix in {**SUFFIXES, **GRIDS} if key.endswith(f"_{suffix}")),
        key=len,
        reverse=True,
    )


def _nearest(key: str) -> str:
    """Return the error text with the nearest known names.

    One name for each entry, with the grid that the name ends in.
    """
    ending = next(iter(_suffixes(key)), "")
    known, spelled = (
        _known_names(),
        {key_of(name): name for names in all_names().values() for name in names},
    )
    best: dict[str, str] = {}
    for near in get_close_matches(
        key.removesuffix(f"_{ending}") if ending else key, list(known), n=9, cutoff=0.6
    ):
        best.setdefault(known[near][0].name, spelled.get(near, near))
    if not best:
        return "known: " + ", ".join(sorted({**METHODS, **STANDALONE}))
    near = [repr(f"{name} {ending}" if ending else name) for name in list(best.values())[:3]]
    return (
        f"did you mean {' or '.join([', '.join(near[:-1]), near[-1]] if len(near) > 1 else near)}?"
    )
