"""Text-to-image pipelines of diffusers by family: texts to conditioning, images to latents.

A new family is one entry of ``FAMILIES``. Training, previews and ``alphabar sample`` read it.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..noising import NoiseSchedule
from ..noising.utils.registry import unknown
from .checkpoints.safetensors import write_markers

LORA_NAME = "pytorch_lora_weights.safetensors"
"""File of a LoRA in diffusers."""


@dataclass(frozen=True)
class Family:
    """The network of a pipeline, and how the text enters it.

    Args:
        network: the pipeline's part that predicts.
        inputs: the network's names for its noisy input and for the time.
        encoders: the text encoders that the pipeline must have.
        optional: parts that may be missing, but which diffusers asks for.
        conditioning: makes the network's other arguments from the text's tokens, its pooled
            embedding and the sizes of the images.
        lora_layers: the attention layers that a LoRA changes.
        flags: noising flags of the family's own training.
    """

    network: str
    inputs: tuple[str, str]
    encoders: tuple[str, ...]
    conditioning: Callable[[Tensor, Any, Tensor], dict[str, Any]]
    lora_layers: tuple[str, ...] = ("to_k", "to_q", "to_v", "to_out.0")
    flags: tuple[tuple[str, str], ...] = ()
    optional: tuple[str, ...] = ()

    def absent(self, index: Mapping[str, Any]) -> dict[str, None]:
        """Return None for each optional part that is not in a model_index.json.

        >>> family_of("StableDiffusion3Pipeline").absent({"tokenizer_3": [None, None]})
        {'text_encoder_3': None, 'tokenizer_3': None}
        """
        return {name: None for name in self.optional if not any(index.get(name) or ())}


_UNET = ("unet", ("sample", "timestep"))
_MMDIT_LAYERS = ("to_k", "to_q", "to_v", "to_out.0", "add_k_proj", "add_q_proj", "add_v_proj")
FAMILIES: Mapping[str, Family] = {
    "StableDiffusionPipeline": Family(
        *_UNET, ("text_encoder",), lambda text, *_: {"encoder_hidden_states": text}
    ),
    "StableDiffusionXLPipeline": Family(
        *_UNET,
        ("text_encoder_2",),
        lambda text, pooled, sizes: {
            "encoder_hidden_states": text,
            "added_cond_kwargs": {"text_embeds": pooled, "time_ids": sizes.to(text.dtype)},
        },
    ),
    "StableDiffusion3Pipeline": Family(
        "transformer",
        ("hidden_states", "timestep"),
        ("text_encoder", "text_encoder_2"),
        lambda text, pooled, _: {"encoder_hidden_states": text, "pooled_projections": pooled},
        tuple(f"attn.{layer}" for layer in (*_MMDIT_LAYERS, "to_add_out")),
        (("weighting_scheme", "logit_normal"),),  # 2403.03206, section 3.1
        ("text_encoder_3", "tokenizer_3"),  # T5
    ),
}
"""The families by the class of their pipeline."""


def family_of(pipeline: str) -> Family:
    """Return the family of a pipeline's class.

    Raises:
        ValueError: the class is not in ``FAMILIES``.

    >>> family_of("StableDiffusion3Pipeline").network
    'transformer'
    """
    if pipeline not in FAMILIES:
        raise ValueError(unknown("text-to-image pipeline", pipeline, FAMILIES))
    return FAMILIES[pipeline]


def index_of(source: str, variant: str | None = None, **options: Any) -> dict[str, Any]:
    """Return the model_index.json of a pipeline in a folder or on the hub.

    >>> import json, tempfile
    >>> folder = Path(tempfile.mkdtemp())
    >>> _ = (folder / "model_index.json").write_text(json.dumps({"_class_name": "FluxPipeline"}))
    >>> index_of(str(folder))["_class_name"]
    'FluxPipeline'
    """
    import diffusers

    config: Any = diffusers.DiffusionPipeline.load_config(source, **options)
    return dict(config)


class Denoiser(nn.Module):
    """The network of a pipeline, called as ``denoiser(x, timesteps, **conditioning)``.

    Args:
        network: the network.
        inputs: its names for the noisy input and for the time.

    >>> class Net(nn.Module):
    ...     def forward(self, hidden_states, text=None, timestep=None):
    ...         return hidden_states * timestep
    >>> Denoiser(Net(), ("hidden_states", "timestep"))(torch.ones(1), torch.tensor([3])).item()
    3.0
    """

    def __init__(self, network: nn.Module, inputs: tuple[str, str]) -> None:
        super().__init__()
        self.network, self.inputs = network, inputs

    def forward(self, x: Tensor, timesteps: Tensor, **conditioning: Any) -> Any:
        return self.network(**dict(zip(self.inputs, (x, timesteps), strict=True)), **conditioning)


@torch.no_grad()
def encode_texts(
    pipeline: Any, texts: Sequence[str], sizes: Tensor, zero_empty: bool = False
) -> dict[str, Any]:
    """Return the network's conditioning of texts, a row for each, by the pipeline's own encoders.

    Args:
        pipeline: the pipeline.
        texts: the texts.
        sizes: (height, width, top, left, height, width) of each image: of the original, of the
            crop's corner and of the target, shape (texts, 6). Only SDXL uses it.
        zero_empty: encode an empty text to zeros where the pipeline samples with zeros for "no
            text" (``force_zeros_for_empty_prompt``, SDXL).

    >>> class StableDiffusionPipeline:  # what of a pipeline is called
    ...     device, config = "cpu", {}
    ...
    ...     def encode_prompt(self, prompt, **options):
    ...         return torch.ones(len(prompt), 2, 3), None
    >>> conditioning = encode_texts(StableDiffusionPipeline(), ["a", "b"], torch.zeros(2, 6))
    >>> {name: value.shape for name, value in conditioning.items()}
    {'encoder_hidden_states': torch.Size([2, 2, 3])}
    """
    family = family_of(type(pipeline).__name__)
    more = [f"prompt_{n}" for n in (2, 3) if hasattr(pipeline, f"tokenizer_{n}")]
    text, _, *rest = pipeline.encode_prompt(
        prompt=list(texts),
        **dict.fromkeys(more),
        device=pipeline.device,
        num_images_per_prompt=1,
        do_classifier_free_guidance=False,
    )
    pooled = rest[0] if rest else None
    if zero_empty and pipeline.config.get("force_zeros_for_empty_prompt"):
        empty = torch.tensor([one == "" for one in texts], device=text.device)[:, None]
        text = text.masked_fill(empty[..., None], 0)
        pooled = None if pooled is None else pooled.masked_fill(empty, 0)
    return family.conditioning(text, pooled, sizes.to(text.device))


def encode_images(vae: Any, pixels: Tensor, noise: Callable[..., Tensor]) -> Tensor:
    """Return latents of images in [-1, 1], drawn from the VAE's posterior, scaled for the network.

    Args:
        vae: the VAE.
        pixels: the images, (batch, channels, height, width).
        noise: ``noise(*shape)`` returns the posterior's noise, (batch, *shape).

    >>> from diffusers import AutoencoderKL
    >>> pixels = torch.zeros(1, 3, 8, 8)
    >>> encode_images(AutoencoderKL(), pixels, lambda *shape: torch.zeros(1, *shape)).shape
    torch.Size([1, 4, 8, 8])
    """
    with torch.no_grad():
        posterior = vae.encode(pixels.to(vae.device, vae.dtype)).latent_dist
        latents = (posterior.mean + posterior.std * noise(*posterior.mean.shape[1:])).float()
        mean, scale = latent_scaling(vae, latents)
        return (latents - mean) * scale


def decode_images(vae: Any, latents: Tensor) -> Tensor:
    """Decode latents to images in [-1, 1], in the VAE's own precision.

    >>> from diffusers import AutoencoderKL
    >>> decode_images(AutoencoderKL(), torch.zeros(1, 4, 8, 8)).shape
    torch.Size([1, 3, 8, 8])
    """
    latents = latents.to(vae.device, torch.float32)
    mean, scale = latent_scaling(vae, latents)
    with torch.no_grad(), torch.autocast(vae.device.type, enabled=False):
        return vae.decode((latents / scale + mean).to(vae.dtype)).sample.float()


def latent_scaling(vae: Any, latents: Tensor) -> tuple[Tensor | float, Tensor | float]:
    """Return mean and scale of the VAE's latents z: the network sees (z - mean) · scale.

    In diffusers' pipelines the mean is ``latents_mean`` and the scale is ``scaling_factor`` /
    ``latents_std``, of each channel, if the VAE has these; otherwise ``shift_factor`` and
    ``scaling_factor``.

    Args:
        vae: a VAE of diffusers.
        latents: the latents, (batch, channels, ...), for device and dtype.

    >>> from diffusers import AutoencoderKL
    >>> latent_scaling(AutoencoderKL(shift_factor=0.5), torch.zeros(1, 4, 8, 8))
    (0.5, 0.18215)
    """
    config = getattr(vae, "config", None)
    scale = getattr(config, "scaling_factor", None) or 1.0
    values: list[Tensor] = []
    for name in ("latents_mean", "latents_std"):
        # LTX has buffers instead; diffusers warns if a setting is read as an attribute
        value = getattr(config if hasattr(config, name) else vae, name, None)
        if value is None:
            return getattr(config, "shift_factor", None) or 0.0, scale
        column = torch.as_tensor(value, device=latents.device, dtype=latents.dtype)
        values.append(column.view(1, -1, *(1,) * (latents.ndim - 2)))
    mean, std = values
    return mean, scale / std


class TextToImage:
    """A text-to-image pipeline for training: frozen encoders and VAE, and the network that learns.

    The network's weights that are trained stay in float32, and so does the VAE, since SDXL's
    overflows in float16. The other parts are in ``dtype``.

    Args:
        source: a diffusers pipeline: a folder or a name on the hub.
        resolution: height and width of the images.
        device: where the parts are.
        dtype: precision of the frozen parts.
        lora: the settings of a ``peft.LoraConfig``, e.g. ``{"r": 16}``; the default layers are the
            family's attention. Without it the whole network is trained.
        options: options of ``DiffusionPipeline.from_pretrained``, e.g. ``revision``.

    Raises:
        ValueError: the pipeline is of no family, or lacks a part.
        ImportError: a LoRA is asked for and peft is not installed.
    """

    def __init__(
        self,
        source: str,
        resolution: int,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        lora: Mapping[str, Any] | None = None,
        **options: Any,
    ) -> None:
        if lora and find_spec("peft") is None:
            raise ImportError(
                "a LoRA needs peft, which is not installed: pip install 'alphabar[lora]'"
            )
        self.source, self.resolution, self.options = source, resolution, options
        index = index_of(source, **options)
        self.family = family_of(index["_class_name"])
        self.absent = self.family.absent(index)
        name = self.family.network
        trained = dtype if lora else torch.float32
        dtypes = {name: trained, "vae": torch.float32, "default": dtype}
        self.pipeline: Any = self._load(torch_dtype=dtypes)
        # it warns of every batch with a caption that is too long
        logging.getLogger(type(self.pipeline).__module__).setLevel(logging.ERROR)
        parts = self.pipeline.components
        lacking = [part for part in (name, "vae", *self.family.encoders) if parts.get(part) is None]
        if lacking:
            raise ValueError(f"{source!r} cannot be trained: it lacks {', '.join(lacking)}")
        self.vae, self.network = parts["vae"], parts[name]
        if self.network.config.in_channels != self.vae.config.latent_channels:
            raise ValueError(
                f"the network of {source!r} takes more than noisy latents, e.g. a mask of "
                "inpainting; take a pipeline for text to image"
            )
        for key, part in parts.items():
            if key in (name, "vae") or (key.startswith("text_encoder") and part is not None):
                part.requires_grad_(False).eval().to(device)
        self.network.train().requires_grad_(not lora)
        self.lora = bool(lora)
        if lora:
            self._add_lora(lora)
        self.denoiser = Denoiser(self.network, self.family.inputs)

    def _load(self, **parts: Any) -> Any:
        import diffusers

        options = {**self.options, **self.absent, **parts}
        return diffusers.DiffusionPipeline.from_pretrained(self.source, **options)

    def _add_lora(self, settings: Mapping[str, Any]) -> None:
        from diffusers.training_utils import cast_training_params
        from peft import LoraConfig

        usual = {"lora_alpha": settings["r"], "init_lora_weights": "gaussian"}
        usual["target_modules"] = list(self.family.lora_layers)
        self.network.add_adapter(LoraConfig(**{**usual, **settings}))
        cast_training_params(self.network, torch.float32)

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """Shape of the latents of one image."""
        side = self.resolution // self.pipeline.vae_scale_factor
        return self.vae.config.latent_channels, side, side

    def conditioning(self, texts: Sequence[str], sizes: Tensor | None = None) -> dict[str, Any]:
        """Return the conditioning of texts; see :func:`encode_texts`.

        Without ``sizes``, that of images which are not cropped.
        """
        side = self.resolution
        whole = torch.tensor([[side, side, 0, 0, side, side]] * len(texts))
        return encode_texts(self.pipeline, texts, whole if sizes is None else sizes, True)

    def latents(self, pixels: Tensor, noise: Callable[..., Tensor]) -> Tensor:
        """Return the latents of images; see :func:`encode_images`."""
        return encode_images(self.vae, pixels, noise)

    def decode(self, latents: Tensor) -> Tensor:
        """Return the images of latents, in [-1, 1]."""
        return decode_images(self.vae, latents)

    def save(self, folder: str | os.PathLike[str], schedule: NoiseSchedule) -> Path:
        """Write what diffusers loads, and return its main file: the pipeline, or the LoRA.

        The scheduler is part of the pipeline, and in ``scheduler/`` beside a LoRA. The file of a
        LoRA says its schedule. All parts are written in float32: a pipeline of several precisions
        does not run.
        """
        import diffusers

        folder, name = Path(folder), self.family.network
        scheduler = schedule.save_pretrained(folder / "scheduler")
        if not self.lora:
            kind = getattr(diffusers, schedule.scheduler_config()["_class_name"])
            parts = {name: self.network, "scheduler": kind.from_pretrained(scheduler)}
            self._load(torch_dtype=torch.float32, **parts).save_pretrained(folder)
            return folder / "model_index.json"
        from peft.utils import get_peft_model_state_dict

        self.pipeline.save_lora_weights(
            folder,
            **{
                f"{name}_lora_layers": get_peft_model_state_dict(self.network),
                f"{name}_lora_adapter_metadata": self.network.peft_config["default"].to_dict(),
            },
        )
        return write_markers(folder / LORA_NAME, schedule)
