"""Sample images from a checkpoint or a diffusers pipeline, with the schedule of its training.

Only the model's own files are needed.
"""

from __future__ import annotations

import argparse
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ...noising import NoiseSchedule
from ...noising.utils.atomic import require_writable
from ...sampling import GRIDS, make_sampler
from ..checkpoints.diffusers_folders import (
    Encoded,
    LoadedPipeline,
    is_pipeline,
    load_pipeline,
    load_vae,
)
from ..checkpoints.loading import WEIGHTS, load_checkpoint, sample_shape
from ..diffusers_text_to_image import decode_images

GUIDANCE_OF_PROMPTS = 7.5  # default of diffusers' Stable Diffusion


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``alphabar sample``."""
    parser.add_argument(
        "checkpoint",
        help="a checkpoint written by Lightning with ScheduleCheckpoint, a file of alphabar ema, "
        "or the folder of a diffusers pipeline",
    )
    parser.add_argument(
        "--steps", type=int, default=20, help="sampling steps (default: %(default)s)"
    )
    parser.add_argument(
        "--method",
        default="dpmpp_2m",
        help="sampler, by any of its names, e.g. 'DPM++ 2M Karras' (default: %(default)s)",
    )
    parser.add_argument(
        "--grid",
        default=None,
        help=f"spacing of the steps: {', '.join(GRIDS)} (default: what the name says, or trailing)",
    )
    parser.add_argument(
        "--num_images", type=int, default=16, help="how many images (default: %(default)s)"
    )
    parser.add_argument(
        "--seed", type=int, default=0, help="image i uses seed + i (default: %(default)s)"
    )
    parser.add_argument(
        "--batch_size", type=int, default=16, help="images sampled at a time (default: %(default)s)"
    )
    parser.add_argument(
        "--classes",
        type=int,
        nargs="+",
        default=None,
        help="classes, which the images take in turn, for a network of classes",
    )
    parser.add_argument(
        "--null_class", type=int, default=None, help="the class that stands for none, for guidance"
    )
    parser.add_argument(
        "--class_key",
        default="class_labels",
        help="the network's argument for classes (default: %(default)s)",
    )
    parser.add_argument(
        "--prompt",
        nargs="+",
        default=None,
        help="prompts, which the images take in turn, for the folder of a pipeline",
    )
    parser.add_argument(
        "--negative_prompt", default=None, help="the text of guidance's other half (default: none)"
    )
    parser.add_argument(
        "--guidance_scale",
        type=float,
        default=None,
        help=f"classifier-free guidance (default: {GUIDANCE_OF_PROMPTS} with prompts, else 1, "
        "which is none)",
    )
    parser.add_argument(
        "--guidance_rescale",
        type=float,
        default=0.0,
        help="of 2305.08891, 0 to 1 (default: %(default)s)",
    )
    parser.add_argument(
        "--weights",
        choices=list(WEIGHTS),
        default=None,
        help="of a checkpoint that holds both (default: ema, where it does)",
    )
    parser.add_argument(
        "--vae",
        default=None,
        help="folder of the VAE that decodes the samples (default: the pipeline's)",
    )
    parser.add_argument(
        "--shape",
        type=int,
        nargs="+",
        default=None,
        help="of one sample (default: what the file says)",
    )
    parser.add_argument(
        "--network",
        default=None,
        help="'package.module:factory' for a network that is not a diffusers model",
    )
    parser.add_argument(
        "--device", default=None, help="cpu, cuda, mps (default: cuda where there is one)"
    )
    parser.add_argument(
        "--out", default="samples.png", help="the PNG grid to write (default: %(default)s)"
    )


@dataclass(frozen=True)
class Model:
    """The model to sample from: network, schedule, sample shape, conditioning, guidance and VAE.

    ``conditions(images)`` returns the conditioning of these images, and the unconditional
    conditioning for guidance.
    """

    network: nn.Module
    schedule: NoiseSchedule
    shape: tuple[int, ...]
    conditions: Callable[[Sequence[int]], Encoded]
    guidance_scale: float
    vae: nn.Module | None


def run(args: argparse.Namespace) -> None:
    """Load the model, sample, and write the grid."""
    from ..images import save_grid

    if args.num_images < 1 or args.batch_size < 1:
        raise ValueError(
            f"--num_images and --batch_size must be at least 1, got {args.num_images} and "
            f"{args.batch_size}"
        )
    require_writable(Path(args.out).parent)
    device = torch.device(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    model = load_model(args, device)
    save_grid(draw(args, model, device), args.out)
    print(
        f"{args.out}: {args.num_images} images, {args.method}, {args.steps} steps on "
        f"{model.schedule}"
    )


def draw(args: argparse.Namespace, model: Model, device: torch.device) -> Tensor:
    """Return the images, shape (num_images, channels, height, width), on the CPU.

    Raises:
        ValueError: the images are not finite.
    """
    from tqdm import tqdm

    sampler = make_sampler(
        model.schedule, args.method, args.steps, **({"grid": args.grid} if args.grid else {})
    )
    dtype = next((p.dtype for p in model.network.parameters() if p.is_floating_point()), None)
    batches = []
    rounds = -(-args.num_images // args.batch_size)
    with tqdm(desc=f"{args.method}, {args.steps} steps", unit="step") as bar:
        for first in range(0, args.num_images, args.batch_size):
            images = range(first, min(first + args.batch_size, args.num_images))
            conditioning, unconditional = model.conditions(images)
            x = torch.empty(0)
            for progress in sampler.iterate(
                _answering(model.network, conditioning),
                (len(images), *model.shape),
                seeds=args.seed + first,
                conditioning=_on(conditioning, device),
                unconditional=None if unconditional is None else _on(unconditional, device),
                guidance_scale=model.guidance_scale,
                guidance_rescale=args.guidance_rescale,
                device=device,
                dtype=dtype,
            ):
                x, bar.total = progress.x, rounds * progress.steps
                bar.update()
            if not bool(x.isfinite().all()):
                raise ValueError(
                    "the samples hold NaN or infinity: look at the weights, or take a smaller "
                    "--guidance_scale"
                )
            batches.append((x if model.vae is None else decode_images(model.vae, x)).cpu())
    return torch.cat(batches)


def load_model(args: argparse.Namespace, device: torch.device) -> Model:
    """Return the model that the arguments name.

    Raises:
        ValueError: arguments contradict each other or the model.

    >>> from alphabar.training.cli.command import parser_of_all
    >>> load_model(
    ...     parser_of_all().parse_args(["sample", "a.ckpt", "--prompt", "a", "--classes", "1"]),
    ...     torch.device("cpu"),
    ... )
    Traceback (most recent call last):
    ValueError: a network takes prompts or classes, not both; leave out --prompt or --classes
    """
    if args.prompt and args.classes:
        raise ValueError(
            "a network takes prompts or classes, not both; leave out --prompt or --classes"
        )
    if args.negative_prompt is not None and not args.prompt:
        raise ValueError("--negative_prompt is for guidance away from a text; give --prompt too")
    if not 0 <= args.guidance_rescale <= 1:
        raise ValueError(
            f"--guidance_rescale must lie between 0 and 1, got {args.guidance_rescale}; the paper "
            "uses 0.7"
        )
    scale = args.guidance_scale
    if scale is None:
        scale = GUIDANCE_OF_PROMPTS if args.prompt else 1.0
    vae = load_vae(args.vae).to(device).eval() if args.vae else None
    if is_pipeline(args.checkpoint):
        return _of_pipeline(args, load_pipeline(args.checkpoint, device), scale, vae)
    if args.prompt:
        raise ValueError(
            f"{args.checkpoint!r} has no text encoder; --prompt is for the folder of a diffusers "
            "pipeline, which has its own"
        )
    loaded = load_checkpoint(args.checkpoint, args.network, args.weights, args.shape)
    network = loaded.network.to(device)
    conditions = _of_classes(args, network, scale)
    return Model(network, loaded.schedule, loaded.sample_shape, conditions, scale, vae)


def _of_pipeline(
    args: argparse.Namespace, loaded: LoadedPipeline, scale: float, vae: nn.Module | None
) -> Model:
    for option, value in (("--network", args.network), ("--weights", args.weights)):
        if value is not None:
            raise ValueError(
                f"{option} is for a checkpoint, and {args.checkpoint!r} is a pipeline, which has "
                "its own network"
            )
    shape = loaded.sample_shape if args.shape is None else sample_shape(args.shape)
    vae = vae if vae is not None else loaded.vae
    if args.prompt:
        given, empty = loaded.encode(args.prompt, args.negative_prompt, scale != 1.0)

        def conditions(images: Sequence[int]) -> Encoded:
            each = [i % len(args.prompt) for i in images]
            return _rows(given, each), None if empty is None else _rows(empty, each)

        return Model(loaded.network, loaded.schedule, shape, conditions, scale, vae)
    if loaded.takes_prompts:
        raise ValueError(
            f"a {type(loaded.pipeline).__name__} draws what a text says; give --prompt (an empty "
            "one for none)"
        )
    return Model(
        loaded.network, loaded.schedule, shape, _of_classes(args, loaded.network, scale), scale, vae
    )


def _of_classes(
    args: argparse.Namespace, network: nn.Module, scale: float
) -> Callable[[Sequence[int]], Encoded]:
    if not args.classes:
        if scale != 1.0:
            raise ValueError(
                f"--guidance_scale {scale:g} guides towards a class or a prompt; give --classes "
                "and --null_class"
            )
        return lambda images: ({}, None)
    if scale != 1.0 and args.null_class is None:
        raise ValueError(
            f"--guidance_scale {scale:g} needs --null_class, the class that stood for none in "
            "training"
        )
    _require_classes(
        network, [*args.classes, *([] if args.null_class is None else [args.null_class])]
    )

    def conditions(images: Sequence[int]) -> Encoded:
        labels = torch.tensor([args.classes[i % len(args.classes)] for i in images])
        empty = None if scale == 1.0 else {args.class_key: torch.full_like(labels, args.null_class)}
        return {args.class_key: labels}, empty

    return conditions


def _require_classes(network: nn.Module, classes: Sequence[int]) -> None:
    config = getattr(network, "config", None)
    if not isinstance(config, Mapping) or not {"class_embed_type", "num_class_embeds"} <= set(
        config
    ):
        return
    count = config["num_class_embeds"]
    if count is None and config["class_embed_type"] is None:
        raise ValueError(
            f"this {type(network).__name__} was trained without classes; leave out --classes"
        )
    outside = [label for label in classes if label < 0 or (count is not None and label >= count)]
    if outside:
        raise ValueError(
            f"the network knows the classes 0 to {count - 1 if count else '...'}, got {outside[0]}"
        )


FLAGS: Mapping[str, str] = {
    "encoder_hidden_states": "--prompt, with the folder of its diffusers pipeline",
    "class_labels": "--classes",
    "y": "--classes with --class_key y",
}
"""The flag that provides each argument of a network."""


def _answering(network: nn.Module, conditioning: Mapping[str, Any]) -> Callable[..., Any]:
    """Wrap the network in a function that raises all failures as ValueError.

    Its inputs are from a file and from flags, so failures are errors of the user.
    """
    parameters = list(inspect.signature(network.forward).parameters.values())
    missing = [
        p.name for p in parameters[2:] if p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD
    ]
    missing = [name for name in missing if name not in conditioning]
    if missing:
        ways = " and ".join(
            FLAGS.get(name, f"a function of your own that gives {name!r}, in Python")
            for name in missing
        )
        raise ValueError(
            f"{type(network).__name__} also asks for {', '.join(missing)}; give {ways}"
        )

    def call(x: Tensor, t: Tensor, **given: Any) -> Any:
        try:
            return network(x, t, **given)
        except Exception as error:
            words = " ".join(str(error).split())[:300]
            raise ValueError(
                f"{type(network).__name__} fails on samples of shape {tuple(x.shape[1:])} with "
                f"{sorted(given) or 'no conditioning'}: "
                f"{type(error).__name__}: {words}"
            ) from error

    return call


def _rows(values: Mapping[str, Any], rows: Sequence[int]) -> dict[str, Any]:
    return {
        k: _rows(v, rows) if isinstance(v, Mapping) else v[list(rows)] for k, v in values.items()
    }


def _on(values: Mapping[str, Any], device: torch.device) -> dict[str, Any]:
    return {
        k: _on(v, device) if isinstance(v, Mapping) else v.to(device) for k, v in values.items()
    }
