"""Write schedulers.md: what each scheduler class of diffusers can say, and what is read from it.

Run ``python docs/schedulers.py`` after a change of the tables that it reads; a test compares.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from alphabar.sampling.interop.diffusers_classes import CLASSES, FAILURES, FLAGS
from alphabar.sampling.interop.diffusers_reading import (
    NO_EFFECT,
    NO_SAMPLER,
    REFUSED,
    STANDALONE_CLASSES,
    options_of_class,
)

PAGE = Path(__file__).with_suffix(".md")
HEAD = """\
# Scheduler classes of diffusers

What `Sampler.from_diffusers`, `Sampler.from_pretrained` and `NoiseSchedule.from_pretrained` read
from a scheduler config, and what `save_pretrained` writes. This page is made by
`docs/schedulers.py` from the tables that the code reads; the tests compare every option of every
class (diffusers 0.42) with the class itself: timesteps, noise levels and samples.

A key that a config leaves out has the default of its class. A key that the class does not read is
reported and left out. A value that no sampler here does is refused, with the reason.

No config says: the number of steps, the seeds, the arguments of `step()` (`eta`, `s_churn`), a
guidance scale. `clip_sample` and `thresholding` are `clip=` of the call here; reading tells so.
"""


def page() -> str:
    """Return the page.

    >>> page().splitlines()[0]
    '# Scheduler classes of diffusers'
    """
    return "\n".join([HEAD, *_classes(), "", *_refused(), "", *_no_effect(), "", *_not_read(), ""])


def _classes() -> Iterator[str]:
    yield "## Classes that are read"
    yield ""
    yield "| class | sampler | grids | of the schedule | of the sampler | told | written |"
    yield "|---|---|---|---|---|---|---|"
    for name in sorted([*CLASSES, *STANDALONE_CLASSES]):
        if name in NO_SAMPLER:
            continue
        kind, options = CLASSES.get(name), options_of_class(name)
        grids = [*kind.lays] if kind is not None else []
        grids += ["flow"] if kind is not None and kind.flow else []
        methods = " or ".join(dict.fromkeys(kind.methods)) if kind is not None else "its own"
        cells = [
            f"`{name}`",
            methods,
            ", ".join(dict.fromkeys(grids)) or "its own",
            *(_keys(options, outcome) for outcome in ("schedule", "sampler", "told")),
            "yes" if kind is not None and kind.written else "read only",
        ]
        yield "| " + " | ".join(cells) + " |"


def _keys(options: dict[str, str], outcome: str) -> str:
    return ", ".join(f"`{key}`" for key, said in sorted(options.items()) if said == outcome) or "–"


def _refused() -> Iterator[str]:
    yield "## Values that are refused"
    yield ""
    for name, keys in sorted(REFUSED.items()):
        for key, (_, words) in keys.items():
            yield f"- `{name}`, `{key}`: {words}."
    yield (
        "- `DPMSolverMultistepInverseScheduler`, "
        + ", ".join(f"`{FLAGS[grid]}`" for grid in ("karras", "exponential", "beta"))
        + ": its largest noise level is there twice, so the last step does not move, and its times "
        "are rounded: 3e-2 from the sampler on that grid."
    )
    yield (
        "- the solvers with `use_flow_sigmas` and a σ-spaced grid (but UniPC with "
        "`use_karras_sigmas`): they take σ / α of their betas for σ of the flow."
    )
    yield "- `invert_sigmas`: the network is given 1 - σ as the time."
    yield ""
    yield "Where a class itself fails, the sampler is made and a warning says so:"
    yield ""
    yield from (f"- {words}." for _, words in FAILURES)


def _no_effect() -> Iterator[str]:
    yield "## Options without effect"
    yield ""
    for name, keys in sorted(NO_EFFECT.items()):
        for key, (default, words) in keys.items():
            yield f"- `{name}`, `{key}` (default `{default!r}`): {words}."


def _not_read() -> Iterator[str]:
    yield "## Classes that are not read"
    yield ""
    yield from (f"- `{name}`: {words}." for name, words in sorted(NO_SAMPLER.items()))


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
