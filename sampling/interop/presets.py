"""The pipeline of a preset as the arguments of a sampler, and the samplers that suit it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from ...noising import PRESETS, NoiseSchedule
from ...noising.utils.registry import lookup
from .diffusers_reading import SamplerArguments, sampler_arguments


def preset_arguments(
    name: str, steps: int | None = None, tokens: int | None = None
) -> SamplerArguments:
    """Return the sampler of a preset's pipeline.

    Args:
        name: A name of ``PRESETS``.
        steps: The number of steps, by default the pipeline's.
        tokens: Image tokens, for a shift that depends on them.

    Raises:
        ValueError: The name is unknown, or it is an expert, which samples a part of the way.

    >>> preset_arguments("flux").options["end"] == 1 / 28
    True
    """
    preset = lookup("preset", name, PRESETS)
    pipeline = preset.pipeline
    if preset.whole is not None:
        low, high = preset.noise_levels or (0.0, 1.0)
        raise ValueError(
            f"{name} is an expert for σ from {low:g} to {high:g} and samples a part of the way; "
            f"make the sampler of {preset.whole!r}, and a network that calls the expert of its time"
        )
    steps = pipeline.steps if steps is None else steps
    tokens = pipeline.tokens if tokens is None else tokens
    made = sampler_arguments(pipeline.scheduler, steps, tokens)
    made = replace(made, schedule=NoiseSchedule.preset(name, tokens, steps))
    if pipeline.even:
        options = {key: value for key, value in made.options.items() if key != "end_shifted"}
        made = replace(made, options={**options, "end": 1 / steps})
    return made if pipeline.method is None else replace(made, method=pipeline.method)


@dataclass(frozen=True)
class Suitable:
    """A sampler for a kind of schedule: its name, when to take it, and why.

    >>> Suitable("euler", "many steps", "what the model is published with").name
    'euler'
    """

    name: str
    when: str
    why: str


SUITABLE: Mapping[str, tuple[Suitable, ...]] = {
    "flow": (
        Suitable("euler", "28 steps and more", "straight paths: one call, no memory of steps"),
        Suitable("dpmpp_2m", "10 to 30 steps", "order 2 for one call; deterministic"),
        Suitable("unipc", "5 to 20 steps", "order 2 and a corrector for one call; deterministic"),
        Suitable("heun", "a reference", "order 2 without memory of steps; two calls"),
    ),
    "distilled flow": (
        Suitable("euler", "the pipeline's steps", "what the model is distilled for"),
        Suitable("lcm", "the pipeline's steps", "new noise at every step, if details are lacking"),
    ),
    "discrete": (
        Suitable("DPM++ 2M Karras", "20 to 30 steps", "order 2 for one call; deterministic"),
        Suitable("unipc", "5 to 20 steps", "order 2 and a corrector for one call; deterministic"),
        Suitable("DPM++ 2M SDE Karras", "30 steps and more", "noise corrects earlier errors"),
        Suitable("ddim", "50 steps and more", "order 1; what inversion and editing are made for"),
    ),
    "zero terminal SNR": (
        Suitable("ddim", "50 steps and more", "begins at pure noise; trailing timesteps"),
        Suitable("dpmpp_2m", "20 to 30 steps", "order 2 for one call; trailing timesteps"),
        Suitable("unipc", "5 to 20 steps", "order 2 and a corrector for one call"),
    ),
    "karras": (
        Suitable("heun", "18 steps and more", "EDM's own: order 2, Karras levels"),
        Suitable("DPM++ 2M Karras", "15 to 30 steps", "order 2 for one call; deterministic"),
    ),
}
"""The samplers that suit each kind of schedule."""


def kind_of(name: str) -> str:
    """Return the key of ``SUITABLE`` for a preset.

    >>> kind_of("sd3"), kind_of("flux-schnell"), kind_of("cogvideox")
    ('flow', 'distilled flow', 'zero terminal SNR')
    """
    schedule = NoiseSchedule.preset(name)
    curve = schedule.curve
    if curve.is_flow:
        return "distilled flow" if PRESETS[name].distilled else "flow"
    if not curve.is_discrete:
        return "karras"
    return "zero terminal SNR" if schedule.has_zero_terminal_snr else "discrete"
