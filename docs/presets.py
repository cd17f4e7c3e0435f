"""Write presets.md: the published models whose noise schedules are known by name.

Run ``python docs/presets.py`` after a change of ``noising/presets.py``; a test compares.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from alphabar.noising import PRESETS
from alphabar.training.cli.presets import sampling_words, training_words

PAGE = Path(__file__).with_suffix(".md")
HEAD = """\
# Presets

The noise schedule of a published model is one word:

```python
from alphabar.noising import NoiseSchedule, Noising
from alphabar.sampling import Sampler

schedule = NoiseSchedule.preset("flux", tokens=4096)  # what its pipeline samples with
noising = Noising.preset("flux", tokens=4096)  # with the density and weighting of its training
sampler = Sampler.preset("flux", steps=28, tokens=4096)  # the sampler of its pipeline
```

`--preset flux` in a script with alphabar's flags, `--noise_schedule flux:tokens=4096` for the
schedule alone, in YAML `class_path: alphabar.noising.Noising.preset` with
`init_args: {name: flux}`. `alphabar inspect flux` shows an entry, `alphabar samplers --for flux`
the samplers that suit it.

This page is made by `docs/presets.py` from `noising/presets.py`, where each model is one entry. The
tests compare the timesteps and noise levels of every entry with the scheduler class of diffusers
(0.42) and the arguments that its pipeline gives it, at 10, 28 and 50 steps.

The shift of the training and that of the pipeline may rightly differ: the first says how often a
noise level is trained, the second how many steps are spent on it. A shift of 1 in the training is a
published one: there is none. Where the density is not published, the times are uniform; where the
shift is not published, it is the pipeline's. `Noising.preset` warns of both, and takes `shift=`.

The density of an expert is that of the whole schedule, cut to its range of noise levels; so is a
density that is given in its place, as `timesteps=` or by a flag.

A range of noise levels is given before or after the shift. `t_min`, `t_max` and
`density.within(low, high)` are times, before it; `noise_level_min`, `noise_level_max` and
`density.within_noise_levels(low, high)` are σ, after it, as the boundary of Wan 2.2. With a shift
of 12 the time 0.875 is σ = 0.988.

Flux's line of the shift by tokens has no upper end. On videos it runs away: the line of LTX-Video
gives 7.8 at 4096 tokens and 386 at 15,004, ten seconds of 704 x 704 (Lightricks/LTX-2, issue 291).
`token_shift(tokens, ..., clamped=True)` and `shifted_for_tokens(tokens, clamped=True, ...)` stay at
the ends of the line.

Not here: Mochi, whose scheduler gives its network 1 - σ as the time; CogView 4, whose line is in
the root of the tokens; Chroma and HiDream, whose scheduler configs no public code states.
"""


def page() -> str:
    """Return the page.

    >>> page().splitlines()[0]
    '# Presets'
    """
    return "\n".join([HEAD, *_table(), "", *_sources(), ""])


def _table() -> Iterator[str]:
    yield "| preset | model | trained with | its pipeline samples with |"
    yield "|---|---|---|---|"
    for name, preset in PRESETS.items():
        cells = [f"`{name}`", preset.model, training_words(preset), sampling_words(name)]
        yield "| " + " | ".join(cells) + " |"


def _sources() -> Iterator[str]:
    yield "## Sources"
    yield ""
    for name, preset in PRESETS.items():
        note = f" {preset.note}" if preset.note else ""
        yield (
            f"- `{name}`: training: {preset.training.source}; pipeline: "
            f"{preset.pipeline.source}.{note}"
        )


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
