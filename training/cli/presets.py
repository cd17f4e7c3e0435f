"""Presets in words, for the commands ``inspect`` and ``samplers``."""

from __future__ import annotations

from ...noising import PRESETS, NoiseSchedule, Preset, TokenLine
from ...noising.utils.registry import lookup
from ...sampling.interop.presets import SUITABLE, kind_of, preset_arguments
from ..interfaces import described, interface_settings

NOT_PUBLISHED = "not published"


def training_words(preset: Preset) -> str:
    """Return what a preset was trained with.

    >>> training_words(PRESETS["sd3"])
    'logit_normal, shift 3; weighting uniform'
    """
    told = preset.training
    density = told.timesteps or f"density {NOT_PUBLISHED}"
    shift = ""
    if preset.path()[0].is_flow:
        own = told.shift
        value = str(own) if isinstance(own, TokenLine) else own and f"{own:g}"
        shift = f", shift {value or NOT_PUBLISHED}"
    return f"{density}{shift}; weighting {told.weighting}"


def sampling_words(name: str) -> str:
    """Return what the pipeline of a preset samples with.

    >>> sampling_words("sd3")
    'euler, 28 steps, shift 3, guidance 7'
    """
    preset = PRESETS[name]
    made, pipeline = preset_arguments(preset.whole or name), preset.pipeline
    shift = getattr(made.schedule.curve, "shift", None)
    words = [made.method, f"{made.steps} steps"]
    words += [] if shift is None else [f"shift {shift:.4g}"]
    words[-1] += f" (at {pipeline.tokens} tokens)" if pipeline.tokens else ""
    return ", ".join([*words, f"guidance {pipeline.guidance_scale:g}"])


def preset_report(name: str) -> str:
    """Return what is known of a preset, as ``alphabar inspect`` prints it.

    >>> print(preset_report("sd3").splitlines()[0])
    sd3: Stable Diffusion 3
    """
    preset, schedule = lookup("preset", name, PRESETS), NoiseSchedule.preset(name)
    rows = {
        "schedule": str(schedule),
        "trained with": training_words(preset),
        "source": preset.training.source,
        "sampled with": sampling_words(name),
        "source of it": preset.pipeline.source,
        **({"note": preset.note} if preset.note else {}),
    }
    lines = [f"{name}: {preset.model}", *(f"  {line}" for line in described(rows))]
    if preset.whole is None:
        lines += ["sample with:", *(f"  {it}" for it in described(interface_settings(schedule)))]
    return "\n".join(lines)


def suitable_samplers(name: str) -> str:
    """Return the pipeline's sampler of a preset and the others that suit its schedule.

    Raises:
        ValueError: the name is unknown.

    >>> print(suitable_samplers("flux").splitlines()[1])
    its pipeline: euler, 28 steps, shift 3.158 (at 4096 tokens), guidance 3.5
    """
    preset = lookup("preset", name, PRESETS)
    kind = kind_of(name)
    head = [f"{name}: {preset.model}", f"its pipeline: {sampling_words(name)}"]
    head += [f"  make it: Sampler.preset({preset.whole or name!r})", f"note: {preset.note}"]
    head = head if preset.note else head[:-1]
    wide = max(len(one.name) for one in SUITABLE[kind])
    rows = [f"  {one.name:<{wide}}  {one.when}: {one.why}" for one in SUITABLE[kind]]
    return "\n".join([*head, f"also suit it (a schedule of kind {kind}):", *rows])


def presets_of(schedule: NoiseSchedule) -> list[str]:
    """Return the names of the presets with this schedule.

    >>> presets_of(NoiseSchedule.flow(shift=5.0))
    ['wan2.2-ti2v']
    """
    return [name for name in PRESETS if NoiseSchedule.preset(name) == schedule]
