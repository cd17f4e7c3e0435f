"""The model of a command: network, schedule, conditions and guidance, from file and flags."""

from __future__ import annotations

import argparse
import inspect
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ...noising import NoiseSchedule
from ..checkpoints.diffusers_folders import Encoded, LoadedPipeline, is_pipeline, load_pipeline
from ..checkpoints.loading import WEIGHTS, load_checkpoint, sample_shape

GUIDANCE_OF_PROMPTS = 7.5  # default of diffusers' Stable Diffusion


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments that say a model, its conditions and its guidance."""
    parser.add_argument(
        "checkpoint",
        help="a checkpoint written by Lightning with ScheduleCheckpoint, a file of alphabar ema, "
        "or the folder of a diffusers pipeline",
    )
    parser.add_argument(
        "--batch_size",
        type=int,
        default=16,
        help="samples in a network call (default: %(default)s)",
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
        "--shape",
        type=int,
        nargs="+",
        default=None,
        help="of one sample (default: what the file says)",
    )
    parser.add_argument(
        "--network",
        default=None,
        help="'package.module:factory' for a network that is not a diffusers model; "
        "'train:Net' is the class Net of train.py in this folder",
    )
    parser.add_argument(
        "--device", default=None, help="cpu, cuda, mps (default: cuda where there is one)"
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


def device_of(args: argparse.Namespace) -> torch.device:
    """Return the device of the arguments: by default the GPU, where there is one.

    >>> device_of(argparse.Namespace(device="cpu"))
    device(type='cpu')
    """
    return torch.device(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))


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
    if is_pipeline(args.checkpoint):
        return _of_pipeline(args, load_pipeline(args.checkpoint, device), scale)
    if args.prompt:
        raise ValueError(
            f"{args.checkpoint!r} has no text encoder; --prompt is for the folder of a diffusers "
            "pipeline, which has its own"
        )
    if args.network is not None and os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())  # as `python -m` does: a console script has its own folder
    loaded = load_checkpoint(args.checkpoint, args.network, args.weights, args.shape)
    network = loaded.network.to(device)
    conditions = _of_classes(args, network, scale)
    return Model(network, loaded.schedule, loaded.sample_shape, conditions, scale, None)


def _of_pipeline(args: argparse.Namespace, loaded: LoadedPipeline, scale: float) -> Model:
    for option, value in (("--network", args.network), ("--weights", args.weights)):
        if value is not None:
            raise ValueError(
                f"{option} is for a checkpoint, and {args.checkpoint!r} is a pipeline, which has "
                "its own network"
            )
    shape = loaded.sample_shape if args.shape is None else sample_shape(args.shape)
    vae = loaded.vae
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


def answering(network: nn.Module, conditioning: Mapping[str, Any]) -> Callable[..., Any]:
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


def on_device(values: Mapping[str, Any], device: torch.device) -> dict[str, Any]:
    return {
        k: on_device(v, device) if isinstance(v, Mapping) else v.to(device)
        for k, v in values.items()
    }
