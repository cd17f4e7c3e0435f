"""Load models from the folder of a diffusers pipeline.

This gives the network, the schedule, the text encoder and the VAE of the pipeline.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ...noising import NoiseSchedule
from ...noising.utils.config_reading import mapping, read_json
from ...noising.utils.registry import shown, unknown

INDEX_NAME = "model_index.json"
# a pipeline's parts must be from these libraries; others would be code from the folder
LIBRARIES = ("diffusers", "transformers")

Encoded = tuple[dict[str, Any], dict[str, Any] | None]
"""Conditioning, and unconditional conditioning for guidance; one row per text."""


def _stable_diffusion(
    pipeline: Any, texts: list[str], negative: str | None, guided: bool, side: int
) -> Encoded:
    given = _encoded(pipeline, texts, negative, guided)
    return {"encoder_hidden_states": given[0]}, {
        "encoder_hidden_states": given[1]
    } if guided else None


def _stable_diffusion_xl(
    pipeline: Any, texts: list[str], negative: str | None, guided: bool, side: int
) -> Encoded:
    words, no_words, pooled, no_pooled = _encoded(pipeline, texts, negative, guided)
    pixels = float(side * pipeline.vae_scale_factor)
    sizes = torch.tensor(
        [[pixels, pixels, 0.0, 0.0, pixels, pixels]], dtype=words.dtype, device=words.device
    )

    def conditions(hidden: Tensor, pooled: Tensor) -> dict[str, Any]:
        added = {"text_embeds": pooled, "time_ids": sizes.repeat(len(texts), 1)}
        return {"encoder_hidden_states": hidden, "added_cond_kwargs": added}

    return conditions(words, pooled), conditions(no_words, no_pooled) if guided else None


def _encoded(pipeline: Any, texts: list[str], negative: str | None, guided: bool) -> Any:
    return pipeline.encode_prompt(
        texts,
        device=pipeline.device,
        num_images_per_prompt=1,
        do_classifier_free_guidance=guided,
        negative_prompt=None if negative is None else [negative] * len(texts),
    )


@dataclass(frozen=True)
class Kind:
    """A kind of pipeline: the name of its network and its text encoding function, if any."""

    network: str
    encode: Callable[[Any, list[str], str | None, bool, int], Encoded] | None = None


KINDS: Mapping[str, Kind] = {
    "DDPMPipeline": Kind("unet"),
    "DDIMPipeline": Kind("unet"),
    "StableDiffusionPipeline": Kind("unet", _stable_diffusion),
    "StableDiffusionXLPipeline": Kind("unet", _stable_diffusion_xl),
}
"""Supported pipelines by class name.

To add one, write an encoding function above (if it takes texts) and a line here.
"""


@dataclass(frozen=True)
class LoadedPipeline:
    """A diffusers pipeline with its kind, network, schedule and the shape of one sample."""

    pipeline: Any
    kind: Kind
    network: nn.Module
    schedule: NoiseSchedule
    sample_shape: tuple[int, ...]

    def encode(self, texts: Sequence[str], negative: str | None, guided: bool) -> Encoded:
        """Encode texts with the pipeline's own text encoders, one row per text.

        Raises:
            ValueError: the pipeline has no text encoder.
        """
        if self.kind.encode is None:
            raise ValueError(
                f"a {type(self.pipeline).__name__} takes no prompts; leave out --prompt"
            )
        with torch.no_grad():
            return self.kind.encode(
                self.pipeline, list(texts), negative, guided, self.sample_shape[-1]
            )

    @property
    def vae(self) -> nn.Module | None:
        """The VAE that decodes the samples; None if the samples are not latents."""
        return getattr(self.pipeline, "vae", None)


def is_pipeline(path: str | Path) -> bool:
    """Return whether a folder holds a diffusers pipeline.

    >>> is_pipeline("nowhere")
    False
    """
    return (Path(path) / INDEX_NAME).is_file()


def load_pipeline(folder: str | Path, device: torch.device) -> LoadedPipeline:
    """Load a diffusers pipeline from a folder, without its safety checker; nothing is downloaded.

    Raises:
        ValueError: the class is not in ``KINDS``, a part is neither from diffusers nor from
            transformers, or the scheduler config does not describe a schedule.

    >>> load_pipeline("nowhere", torch.device("cpu"))
    Traceback (most recent call last):
    FileNotFoundError: [Errno 2] No such file or directory: 'nowhere/model_index.json'
    """
    folder = Path(folder)
    index = mapping(INDEX_NAME, read_json(folder / INDEX_NAME))
    name = index.get("_class_name")
    if not isinstance(name, str) or name not in KINDS:
        raise ValueError(
            f"{unknown('kind of pipeline', name, KINDS)}; sample from others in Python, with "
            "Sampler and the pipeline's network"
        )
    for part, made in index.items():
        if (
            isinstance(made, list)
            and made
            and made[0] not in (*LIBRARIES, name, _module_of(name), None)
        ):
            raise ValueError(
                f"the part {part!r} of {str(folder)!r} is of {shown(made[0])}, and no code but "
                f"{LIBRARIES} is run"
            )
    schedule = NoiseSchedule.from_pretrained(folder, subfolder="scheduler")
    pipeline = _pipeline(folder, index)
    kind = KINDS[name]
    network = getattr(pipeline.to(device), kind.network)
    return LoadedPipeline(pipeline, kind, network, schedule, _sample_shape(network))


def _pipeline(folder: Path, index: Mapping[str, Any]) -> Any:
    import diffusers

    left_out = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    options = left_out if "safety_checker" in index else {}
    try:
        return getattr(diffusers, index["_class_name"]).from_pretrained(
            folder, local_files_only=True, **options
        )
    except (
        OSError,
        ValueError,
        RuntimeError,
        KeyError,
        TypeError,
        AttributeError,
    ) as error:  # the folder is damaged
        words = " ".join(str(error).split())[:300]
        raise ValueError(
            f"diffusers cannot load the pipeline {str(folder)!r}: {type(error).__name__}: {words}"
        ) from error


def _module_of(name: Any) -> str:
    """Return the module name that model_index.json has for a pipeline's own parts.

    Stable Diffusion's safety checker is such a part.
    """
    return {"StableDiffusionPipeline": "stable_diffusion"}.get(str(name), str(name))


def _sample_shape(network: Any) -> tuple[int, ...]:
    channels, side = network.config.in_channels, network.config.sample_size
    sides = (side, side) if isinstance(side, int) else tuple(side or ())
    if not sides:
        raise ValueError("the network's config says no sample_size; give --shape")
    return (channels, *sides)


def load_vae(folder: str | Path) -> nn.Module:
    """Load a VAE from a folder, or from the VAE subfolder of a pipeline.

    ``AutoencoderKL.save_pretrained`` writes such a folder.

    >>> load_vae("nowhere")
    Traceback (most recent call last):
    FileNotFoundError: no VAE in 'nowhere': neither config.json nor vae/config.json is there
    """
    import diffusers

    folder = Path(folder)
    place = next((f for f in (folder, folder / "vae") if (f / "config.json").is_file()), None)
    if place is None:
        raise FileNotFoundError(
            f"no VAE in {str(folder)!r}: neither config.json nor vae/config.json is there"
        )
    kinds = {name: getattr(diffusers, name) for name in ("AutoencoderKL", "AutoencoderTiny")}
    name = mapping("config.json", read_json(place / "config.json")).get("_class_name")
    if not isinstance(name, str) or name not in kinds:
        raise ValueError(unknown("kind of VAE", name, kinds))
    return kinds[name].from_pretrained(place, local_files_only=True)


def decode(vae: Any, latents: Tensor) -> Tensor:
    """Decode latents to images in [-1, 1].

    The latents are scaled as in training: the VAE decodes z / scaling_factor + shift_factor.
    """
    config = vae.config
    z = latents / getattr(config, "scaling_factor", 1.0) + (
        getattr(config, "shift_factor", None) or 0.0
    )
    with torch.no_grad():
        return vae.decode(z.to(vae.device, vae.dtype)).sample.float()
