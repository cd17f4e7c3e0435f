"""Families of pipelines: what our network is called with is what the pipeline itself calls it with."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from alphabar.noising import NoiseSchedule, Noising
from alphabar.sampling import Sampler
from alphabar.training import DiffusionModule
from alphabar.training.cli import main
from alphabar.training.diffusers_text_to_image import FAMILIES, TextToImage, family_of
from alphabar.training.images import cropped, to_pixels
from tiny_pipeline import make_pipeline, make_pipeline_sd3, make_pipeline_xl

MAKERS: dict[str, Callable[[Path], Path]] = {
    "sd": make_pipeline,
    "xl": make_pipeline_xl,
    "sd3": make_pipeline_sd3,
}
SIDE = 16


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return {name: str(make(tmp_path_factory.mktemp(name))) for name, make in MAKERS.items()}


def leaves(value: Any) -> list[Tensor]:
    if isinstance(value, dict):
        return [leaf for key in sorted(value) for leaf in leaves(value[key])]
    return [value] if isinstance(value, Tensor) else []


@pytest.mark.parametrize("name", MAKERS)
def test_the_network_gets_what_the_pipeline_gives_it(name: str, folders: dict[str, str]) -> None:
    model = TextToImage(folders[name], SIDE)
    if name == "xl":  # as Playground's VAE has them
        model.vae.register_to_config(
            latents_mean=[0.1, 0.2, 0.3, 0.4], latents_std=[1.0, 2.0, 3.0, 4.0]
        )
    calls: list[dict[str, Any]] = []
    handle = model.network.register_forward_pre_hook(
        lambda module, args, kwargs: calls.append({"args": args, **kwargs}), with_kwargs=True
    )
    options = {
        "num_inference_steps": 2, "guidance_scale": 3.0, "height": SIDE, "width": SIDE, "generator": torch.Generator(),
    }  # fmt: skip
    latents = model.pipeline("a red square", **options, output_type="latent").images
    options["generator"] = torch.Generator()
    pixels = model.pipeline("a red square", **options, output_type="pt").images
    handle.remove()
    # both halves of guidance: the empty text is what the pipeline takes for none
    expected = leaves(
        {k: v for k, v in calls[0].items() if k not in ("args", *model.family.inputs)}
    )
    ours = leaves(model.conditioning(["", "a red square"]))
    assert len(expected) == len(ours) == {"sd": 1, "xl": 3, "sd3": 2}[name]
    for theirs, own in zip(expected, ours, strict=True):
        assert torch.allclose(theirs, own, atol=1e-5)  # there, each row was encoded alone
    assert torch.allclose((model.decode(latents) / 2 + 0.5).clamp(0, 1), pixels, atol=1e-6)
    if name == "sd3":  # a flow's time is 1000 where the pipeline begins
        assert float(calls[0]["timestep"][0]) == 1000.0
        t = torch.ones(1)
        noised = Noising(NoiseSchedule.flow(shift=3.0)).at(latents[:1], t, torch.zeros(1, 4, 8, 8))
        assert noised.timesteps.item() == 1000.0


@pytest.mark.parametrize("name", MAKERS)
def test_latents_are_scaled_for_the_network_and_back(name: str, folders: dict[str, str]) -> None:
    model = TextToImage(folders[name], SIDE)
    pixels = torch.rand(2, 3, SIDE, SIDE) * 2 - 1
    latents = model.latents(pixels, lambda *shape: torch.zeros(2, *shape))
    with torch.no_grad():
        mode = model.vae.encode(pixels).latent_dist.mode()
        config = model.vae.config
        shift = config.shift_factor or 0.0
        assert torch.allclose(latents, (mode - shift) * config.scaling_factor, atol=1e-6)
        assert torch.allclose(model.decode(latents), model.vae.decode(mode).sample, atol=1e-5)
    assert latents.shape[1:] == model.latent_shape == (4, SIDE // 2, SIDE // 2)
    assert [p for p in model.pipeline.vae.parameters() if p.requires_grad] == []
    assert all(p.requires_grad for p in model.network.parameters())


def test_latents_and_texts_of_a_pipeline_train_in_lightning(folders: dict[str, str]) -> None:
    """encode= of DiffusionModule takes what TextToImage gives."""
    model = TextToImage(folders["sd3"], SIDE)

    def encode(batch: Any) -> Any:
        pixels, captions = batch
        latents = model.latents(pixels, lambda *shape: torch.zeros(len(pixels), *shape))
        return latents, model.conditioning(captions)

    schedule = NoiseSchedule.from_pretrained(folders["sd3"], subfolder="scheduler")
    module = DiffusionModule(model.denoiser, Noising(schedule), encode=encode, validation_levels=0)
    loss = module.validation_step
    module._trainer = type("T", (), {"distributed_sampler_kwargs": None})()  # type: ignore[assignment]
    module.log = lambda *args, **kwargs: None  # type: ignore[method-assign]
    value = loss((torch.zeros(2, 3, SIDE, SIDE), ["a red square", ""]), 0)
    value.backward()
    assert all(p.grad is None for p in model.pipeline.text_encoder.parameters())
    assert any(p.grad is not None for p in model.network.parameters())
    drawn = Sampler(schedule, "euler", 2)(
        module.predict, (1, *model.latent_shape), seeds=0, conditioning=model.conditioning(["a"])
    )
    assert to_pixels(model.decode(drawn)).shape == (1, 3, SIDE, SIDE)


def test_alphabar_sample_draws_with_sd3(folders: dict[str, str], tmp_path: Path) -> None:
    out = tmp_path / "grid.png"
    flags = ["--prompt", "a red square", "--steps", "2", "--method", "euler", "--num_images", "1"]
    assert main(["sample", folders["sd3"], *flags, "--out", str(out)]) == 0
    assert out.is_file()


def test_a_square_of_an_image_is_where_the_sizes_say() -> None:
    from PIL import Image

    columns = torch.arange(40).repeat(20, 1)
    image = Image.fromarray((columns * 6).to(torch.uint8).numpy())
    pixels, sizes = cropped(image, 20, left=0.25)
    assert sizes == [20, 40, 0, 5, 20, 20]
    assert torch.equal(((pixels[0, 0] + 1) * 127.5 / 6).round(), columns[0, 5:25].float())
    mirrored, flipped = cropped(image, 20, left=0.25, flip=True)
    assert torch.equal(mirrored, pixels.flip(2)) and flipped == [20, 40, 0, 15, 20, 20]


def test_other_pipelines_are_refused(folders: dict[str, str]) -> None:
    with pytest.raises(ValueError, match="unknown text-to-image pipeline 'FluxPipeline'"):
        family_of("FluxPipeline")
    assert all(name.endswith("Pipeline") for name in FAMILIES)
