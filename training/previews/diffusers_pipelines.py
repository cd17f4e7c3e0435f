"""Previews with a diffusers pipeline whose scheduler is replaced by the training schedule.

This is for models that sample with more than their network: text encoders, a VAE, a refiner. The
user provides the pipeline, and it holds the live network. Only its scheduler is replaced while it
samples, so it cannot sample on another schedule than the one of the training.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Generator as Random
from torch import Tensor, nn

from ...noising.curves.continuous import Flow
from ...sampling import Sampler
from ...sampling.interop.diffusers_configs import nearest_config
from .render import Drawing, Painted, paint


def pipeline_of(given: Any, module: nn.Module) -> Any:
    """Return the pipeline ``given``, or ``given(module)`` if ``given`` is a function.

    Raises:
        TypeError: the result is not a pipeline.
        ValueError: the pipeline shares no network with the module, so it would not show the model
            that is trained.
    """
    pipeline = given if hasattr(given, "scheduler") else given(module)
    if not callable(pipeline) or not hasattr(pipeline, "scheduler"):
        raise TypeError(
            "pipeline= must be (or return) a diffusers pipeline with a scheduler, got "
            f"{type(pipeline).__name__}"
        )
    own = {id(part) for part in module.modules()}
    if not any(id(part) in own for part in components(pipeline) if isinstance(part, nn.Module)):
        raise ValueError(
            f"the {type(pipeline).__name__} holds none of the networks of {type(module).__name__}, "
            "so it would not show what "
            "is trained; make it from the module's own: pipeline=lambda module: "
            "DDPMPipeline(module.network, scheduler)"
        )
    return pipeline


def components(pipeline: Any) -> list[Any]:
    """Return the parts of a pipeline."""
    return list(getattr(pipeline, "components", vars(pipeline)).values())


def scheduler_of(sampler: Sampler, pipeline: Any = None) -> Any:
    """Return the diffusers scheduler for ``sampler``, on the sampler's schedule.

    ``differences_of`` lists the differences between the scheduler and the sampler.

    Raises:
        ValueError: diffusers has no such scheduler.

    >>> from alphabar.noising import NoiseSchedule
    >>> type(scheduler_of(Sampler(NoiseSchedule.scaled_linear(), "dpmpp_2m"))).__name__
    'DPMSolverMultistepScheduler'
    """
    import diffusers

    config = sampler.schedule.scheduler_config(_nearest(sampler, pipeline)[0])
    return _complete(getattr(diffusers, config["_class_name"]).from_config(config))


def differences_of(sampler: Sampler, pipeline: Any = None) -> tuple[str, ...]:
    """Return the differences between ``sampler`` and its diffusers scheduler, as texts.

    The result is empty if they are the same.

    >>> from alphabar.noising import NoiseSchedule
    >>> differences_of(Sampler(NoiseSchedule.scaled_linear(), "dpmpp_2m"))
    ()
    """
    return _nearest(sampler, pipeline)[1]


def _nearest(sampler: Sampler, pipeline: Any) -> tuple[dict[str, Any], tuple[str, ...]]:
    is_flow = isinstance(sampler.schedule.curve, Flow)
    passed = (
        ("eta",)
        if pipeline is not None and "eta" in inspect.signature(pipeline.__call__).parameters
        else ()
    )
    try:
        config, differences = nearest_config(sampler, passed, stand_ins=False)
    except ValueError:
        config, differences = {"_class_name": ""}, ()
    # pipelines for flows support only FlowMatch schedulers
    if not config["_class_name"].startswith("FlowMatch" if is_flow else ""):
        config = {"_class_name": ""}
    if not config["_class_name"]:
        of_flows = " of a flow" if is_flow else ""
        raise ValueError(
            f"diffusers has no scheduler for {sampler.method.name!r}{of_flows}, which pipeline= "
            "needs; use 'euler', or draw with the "
            "network itself (predict=, decode=)"
        )
    return config, differences


def _complete(scheduler: Any) -> Any:
    """Add the attributes that other schedulers have and pipelines read to a flow scheduler.

    These are ``init_noise_sigma`` (1) and ``scale_model_input`` (returns the sample unchanged).
    """
    if not hasattr(scheduler, "init_noise_sigma"):
        scheduler.init_noise_sigma = 1.0
    if not hasattr(scheduler, "scale_model_input"):
        scheduler.scale_model_input = _as_it_is
    return scheduler


def _as_it_is(sample: Tensor, timestep: Any = None) -> Tensor:
    return sample


@contextmanager
def on_training_schedule(pipeline: Any, scheduler: Any) -> Generator[None, None, None]:
    """Replace a pipeline's scheduler and hide its progress bar inside the block.

    The pipeline's own scheduler is not changed.
    """
    before, bar = pipeline.scheduler, getattr(pipeline, "_progress_bar_config", None)
    try:
        pipeline.scheduler = scheduler
        pipeline._progress_bar_config = {**(bar or {}), "disable": True}
        yield
    finally:
        pipeline.scheduler = before
        if bar is None:
            del pipeline._progress_bar_config
        else:
            pipeline._progress_bar_config = bar


def pipeline_steps(
    pipeline: Any,
    drawing: Drawing,
    sampler: Sampler,
    images: Sequence[int],
    *,
    prompts: Sequence[str] = (),
    negative_prompt: str = "",
    shape: tuple[int, ...] | None = None,
    stop: int | None = None,
    guidance_scale: float = 1.0,
    guidance_rescale: float = 0.0,
    context: Callable[[], AbstractContextManager[Any]],
) -> Iterator[Painted | None]:
    """Draw images with one call of the pipeline; yield once.

    Each image has its own CPU generator. Arguments that the pipeline does not take are omitted,
    except conditioning.

    Args:
        pipeline: a diffusers pipeline.
        drawing: seeds and conditioning of the images.
        sampler: the sampler whose diffusers scheduler is used.
        images: indices of the images.
        prompts: texts, which images take in turn.
        negative_prompt: the negative prompt of every image.
        shape: shape of one sample; its last two sizes are passed as height and width.
        stop: number of steps, instead of ``sampler.steps``.
        guidance_scale: passed to the pipeline.
        guidance_rescale: passed to the pipeline.
        context: returns a context manager that is entered around the call.

    Raises:
        ValueError: the pipeline returns no images.
    """
    conditions = drawing.arguments(images, torch.device(getattr(pipeline, "device", "cpu")))
    wanted: dict[str, Any] = {
        "guidance_scale": guidance_scale,
        "guidance_rescale": guidance_rescale,
        "height": shape[-2] if shape else None,
        "width": shape[-1] if shape else None,
        "batch_size": len(images),
        "eta": dict(sampler.options).get("eta"),
    }
    if prompts:
        wanted |= {"prompt": [prompts[i % len(prompts)] for i in images]}
        wanted |= {"negative_prompt": [negative_prompt] * len(images)}
    taken = inspect.signature(pipeline.__call__).parameters
    optional = {key: value for key, value in wanted.items() if key in taken and value is not None}
    generators = [Random().manual_seed(seed) for seed in drawing.seeds_of(images)]
    with on_training_schedule(pipeline, scheduler_of(sampler, pipeline)), context():
        output = pipeline(
            generator=generators,
            num_inference_steps=stop or sampler.steps,
            output_type="np",
            **{**optional, **conditions["conditioning"], **_negative(conditions["unconditional"])},
        )
    drawn = getattr(output, "images", None)
    if drawn is None or getattr(drawn, "ndim", 0) != 4:
        got = (
            f"{type(output).__name__} with {sorted(vars(output))}"
            if drawn is None
            else tuple(drawn.shape)
        )
        raise ValueError(
            f"a {type(pipeline).__name__} draws no images that can be shown, got {got}; use "
            "predict= and decode="
        )
    # (n, height, width, channels) in [0, 1]
    samples = torch.as_tensor(drawn).movedim(-1, 1).float()
    yield paint(samples * 2 - 1)


def _negative(unconditional: Mapping[str, Any] | None) -> dict[str, Any]:
    """Rename encoded negative prompts for diffusers: prompt_embeds -> negative_prompt_embeds."""
    return {f"negative_{key}": value for key, value in (unconditional or {}).items()}
