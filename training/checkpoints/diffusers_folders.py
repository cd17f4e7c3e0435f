"""Load models from the folder of a diffusers pipeline.

This gives the network, the schedule, the text encoder and the VAE of the pipeline.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ...noising import NoiseSchedule
from ...noising.utils.config_reading import mapping, read_json
from ...noising.utils.registry import shown, unknown
from ..diffusers_text_to_image import FAMILIES, Denoiser, encode_texts

INDEX_NAME = "model_index.json"
# a pipeline's parts must be from these libraries; others would be code from the folder
LIBRARIES = ("diffusers", "transformers")

Encoded = tuple[dict[str, Any], dict[str, Any] | None]
"""Conditioning, and unconditional conditioning for guidance; one row per text."""


UNCONDITIONAL = ("DDPMPipeline", "DDIMPipeline")
"""Supported pipelines without a text; those with one are in ``FAMILIES``."""


@dataclass(frozen=True)
class LoadedPipeline:
    """A diffusers pipeline with its network, schedule and the shape of one sample.

    ``takes_prompts`` is False for a pipeline without a text.
    """

    pipeline: Any
    takes_prompts: bool
    network: nn.Module
    schedule: NoiseSchedule
    sample_shape: tuple[int, ...]

    def encode(self, texts: Sequence[str], negative: str | None, guided: bool) -> Encoded:
        """Encode texts with the pipeline's own text encoders, one row per text.

        Raises:
            ValueError: the pipeline has no text encoder.
        """
        if not self.takes_prompts:
            raise ValueError(
                f"a {type(self.pipeline).__name__} takes no prompts; leave out --prompt"
            )
        side = self.sample_shape[-1] * self.pipeline.vae_scale_factor
        sizes = torch.tensor([[side, side, 0, 0, side, side]] * len(texts))
        given = encode_texts(self.pipeline, texts, sizes)
        if not guided:
            return given, None
        empty = [negative or ""] * len(texts)
        return given, encode_texts(self.pipeline, empty, sizes, zero_empty=negative is None)

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
        ValueError: the class is neither in ``UNCONDITIONAL`` nor in ``FAMILIES``, a part is neither
            from diffusers nor from transformers, or the scheduler config does not describe a
            schedule.

    >>> load_pipeline("nowhere", torch.device("cpu"))
    Traceback (most recent call last):
    FileNotFoundError: [Errno 2] No such file or directory: 'nowhere/model_index.json'
    """
    folder = Path(folder)
    index = mapping(INDEX_NAME, read_json(folder / INDEX_NAME))
    name = index.get("_class_name")
    known = (*UNCONDITIONAL, *FAMILIES)
    if not isinstance(name, str) or name not in known:
        raise ValueError(
            f"{unknown('kind of pipeline', name, known)}; sample from others in Python, with "
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
    family = FAMILIES.get(name)
    network = getattr(pipeline.to(device), family.network if family else "unet")
    shape = _sample_shape(network)
    if family is not None and family.inputs[0] != "sample":
        network = Denoiser(network, family.inputs)
    return LoadedPipeline(pipeline, family is not None, network, schedule, shape)


def _pipeline(folder: Path, index: Mapping[str, Any]) -> Any:
    import diffusers

    left_out = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    options: dict[str, Any] = left_out if "safety_checker" in index else {}
    if index["_class_name"] in FAMILIES:
        options |= FAMILIES[index["_class_name"]].absent(index)
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
