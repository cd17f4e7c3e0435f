"""A model card that says how to sample: the schedule, the call of diffusers, settings of the UIs.

A model is sampled wrongly without an error if the schedule is not the one of its training, so the
card names it in the words of each tool.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping, Sequence

from ..noising import NoiseSchedule
from .interfaces import interface_settings


def loading_code(
    schedule: NoiseSchedule,
    source: str | os.PathLike[str],
    base_model: str | None = None,
    absent: Iterable[str] = (),
) -> str:
    """Return the Python code that loads a pipeline, or a LoRA with its scheduler.

    Args:
        schedule: the schedule of the training.
        source: the folder or hub repository of the pipeline or of the LoRA.
        base_model: of a LoRA: the pipeline that it was trained on.
        absent: parts that the pipeline does without, e.g. the T5 of Stable Diffusion 3, and that
            diffusers must be told of.

    >>> print(loading_code(NoiseSchedule.flow(shift=3.0), "me/lora", "me/base"))
    from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler
    <BLANKLINE>
    scheduler = FlowMatchEulerDiscreteScheduler.from_pretrained("me/lora", subfolder="scheduler")
    pipeline = DiffusionPipeline.from_pretrained("me/base", scheduler=scheduler)
    pipeline.load_lora_weights("me/lora")
    """
    name, folder = schedule.scheduler_config()["_class_name"], json.dumps(os.fspath(source))
    without = "".join(f", {part}=None" for part in absent)
    if base_model is None:
        return (
            "from diffusers import DiffusionPipeline\n\n"
            f"pipeline = DiffusionPipeline.from_pretrained({folder}{without})"
        )
    return (
        f"from diffusers import DiffusionPipeline, {name}\n\n"
        f'scheduler = {name}.from_pretrained({folder}, subfolder="scheduler")\n'
        f"pipeline = DiffusionPipeline.from_pretrained({json.dumps(base_model)}, "
        f"scheduler=scheduler{without})\n"
        f"pipeline.load_lora_weights({folder})"
    )


def model_card(
    schedule: NoiseSchedule,
    name: str,
    code: str,
    *,
    base_model: str | None = None,
    tags: Sequence[str] = (),
    facts: Mapping[str, str] | None = None,
    images: Sequence[str] = (),
) -> str:
    """Return the README.md of a model: what it was trained with, and how to sample from it.

    Args:
        schedule: the schedule of the training.
        name: title of the card.
        code: Python code that loads the model, see :func:`loading_code`.
        base_model: hub name of the model that it was trained from, if any.
        tags: more tags for the hub, e.g. "lora".
        facts: other facts of the training, by their names.
        images: paths of images relative to the card.

    >>> card = model_card(NoiseSchedule.flow(), "mine", "pipeline = ...", facts={"steps": "100"})
    >>> print(card[card.index("# mine") :][:41])
    # mine
    <BLANKLINE>
    | | |
    |---|---|
    | prediction type
    """
    head = {
        "library_name": "diffusers",
        "pipeline_tag": "text-to-image",
        "tags": ["diffusers", "alphabar", *tags],
    } | ({"base_model": base_model} if base_model else {})
    rows = {
        "prediction type": schedule.prediction.name,
        "zero terminal SNR": "yes" if schedule.has_zero_terminal_snr else "no",
        "schedule": str(schedule),
        **interface_settings(schedule),
        **(facts or {}),
    }
    # JSON is YAML, and quotes what a name may hold
    front = "\n".join(f"{key}: {json.dumps(value)}" for key, value in head.items())
    table = "\n".join(f"| {key} | {value} |" for key, value in rows.items())
    shown = "".join(f"![sample]({path})\n" for path in images)
    return (
        f"---\n{front}\n---\n\n# {name}\n\n| | |\n|---|---|\n{table}\n\n"
        f"```python\n{code}\n```\n" + (f"\n{shown}" if shown else "")
    )
