"""``alphabar sample`` on every kind of model: classes, prompts, latents, averages, pipelines; and
what it says where one does not fit.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DDPMPipeline,
    DDPMScheduler,
    DiffusionPipeline,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from PIL import Image
from safetensors import safe_open

from alphabar.noising import NoiseSchedule
from alphabar.sampling import Sampler
from alphabar.sampling.inference import SeededNoise
from alphabar.training import load_checkpoint
from alphabar.training.cli import main
from alphabar.training.ema.posthoc import save_snapshot
from alphabar.training.images import save_grid
from tiny_checkpoint import SCHEDULE, checkpoint_of, unet, written
from tiny_pipeline import make_pipeline, make_pipeline_xl

FAST = ["--steps", "2", "--num_images", "3", "--batch_size", "2"]


def pixels(path: Path) -> torch.Tensor:
    image = Image.open(path)
    return torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)


def drawn(samples: torch.Tensor, folder: Path) -> torch.Tensor:
    return pixels(save_grid(samples, folder / "expected.png"))


def sampled(folder: Path, *arguments: object) -> torch.Tensor:
    out = folder / "out.png"
    assert main(["sample", *map(str, arguments), *FAST, "--out", str(out)]) == 0
    return pixels(out)


def refused(capsys: pytest.CaptureFixture[str], folder: Path, *arguments: object) -> str:
    out = folder / "out.png"
    assert main(["sample", *map(str, arguments), *FAST, "--out", str(out)]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("alphabar sample: ") and not out.exists()
    return error


# classes


@pytest.fixture(scope="module")
def of_classes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return written(tmp_path_factory.mktemp("classes"), checkpoint_of(unet(num_class_embeds=4)))


@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_classes_and_guidance(of_classes: Path, tmp_path: Path, scale: float) -> None:
    network = load_checkpoint(of_classes).network
    labels = torch.tensor([2, 0, 2])
    expected = Sampler(SCHEDULE, "dpmpp_2m", 2)(
        network,
        (3, 1, 8, 8),
        seeds=0,
        conditioning={"class_labels": labels},
        unconditional={"class_labels": torch.full_like(labels, 3)},
        guidance_scale=scale,
        guidance_rescale=0.5 if scale > 1 else 0.0,
    )
    guidance = (
        ["--guidance_scale", scale, "--null_class", 3, "--guidance_rescale", 0.5]
        if scale > 1
        else []
    )
    got = sampled(tmp_path, of_classes, "--classes", 2, 0, *guidance)
    assert (got.int() - drawn(expected, tmp_path).int()).abs().max() <= 1
    assert not torch.equal(got, sampled(tmp_path, of_classes, "--classes", 1))


WRONG: dict[str, tuple[list[Any], str]] = {
    "none": ([], "class_labels should be provided"),
    "outside": (["--classes", 4], "the network knows the classes 0 to 3, got 4"),
    "negative": (["--classes", -1], "the network knows the classes 0 to 3, got -1"),
    "no null class": (["--classes", 1, "--guidance_scale", 2], "needs --null_class"),
    "guidance alone": (["--guidance_scale", 2], "give --classes and --null_class"),
    "another key": (["--classes", 1, "--class_key", "y"], "UNet2DModel fails on samples of shape "
                                                          "(1, 8, 8) with ['y']"),
    "a prompt": (["--prompt", "a cat"], "has no text encoder; --prompt is for the folder of a "
                                        "diffusers pipeline"),
    "both": (["--prompt", "a", "--classes", 1], "prompts or classes, not both"),
    "a negative prompt": (["--negative_prompt", "a"], "give --prompt too"),
    "rescale": (["--classes", 1, "--guidance_rescale", 2], "--guidance_rescale must lie between 0 "
                                                           "and 1"),
    "EMA": (["--classes", 1, "--weights", "ema"], "holds no EMA weights"),
    "a shape": (["--classes", 1, "--shape", 3, 8, 8], "the network takes 1 channels, and the "
                                                      "sample_shape is (3, 8, 8)"),
    "no factory": (["--network", "torch.nn:Identitty"], "unknown factory of torch.nn 'Identitty'; "
                                                        "did you mean 'Identity'"),
    "no module": (["--network", "nowhere_at_all:Net"], "No module named 'nowhere_at_all'"),
    "another network": (["--network", "torch.nn:Identity"], "do not fit Identity: "
                                                            "['conv_in.weight', "),
    "no VAE": (["--classes", 1, "--vae", "nowhere"], "no VAE in 'nowhere'"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_what_does_not_fit_is_told(
    of_classes: Path, tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments, words = WRONG[name]
    assert words in refused(capsys, tmp_path, of_classes, *arguments)


SCRIPT = """
from diffusers import UNet2DModel

def network():
    return UNet2DModel(**{config!r})
"""


def test_a_network_of_a_script_in_this_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.delitem(sys.modules, "its_training_script", raising=False)
    path = written(tmp_path, checkpoint_of(unet()))
    script = SCRIPT.format(config=dict(unet().config))
    (tmp_path / "its_training_script.py").write_text(script, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    named = sampled(tmp_path, path, "--network", "its_training_script:network")
    assert torch.equal(named, sampled(tmp_path, path))


def test_a_network_without_classes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = written(tmp_path, checkpoint_of(unet()))
    assert "was trained without classes" in refused(capsys, tmp_path, path, "--classes", 1)


def test_a_network_of_texts_asks_for_its_pipeline(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    network = UNet2DConditionModel(
        sample_size=8, in_channels=1, out_channels=1, layers_per_block=1, block_out_channels=(8,), norm_num_groups=4,
        down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",), mid_block_type=None, cross_attention_dim=8,
    )  # fmt: skip
    error = refused(capsys, tmp_path, written(tmp_path, checkpoint_of(network)))
    assert (
        "also asks for encoder_hidden_states; give --prompt, with the folder of its diffusers "
        "pipeline" in error
    )


# weights


def test_raw_and_ema_weights_of_one_checkpoint(tmp_path: Path) -> None:
    network = unet()
    raw = {f"network.{name}": value + 0.1 for name, value in network.state_dict().items()}
    path = written(tmp_path, checkpoint_of(network, current_model_state=raw))
    name = next(iter(network.state_dict()))
    for weights, shift in ((None, 0.0), ("ema", 0.0), ("raw", 0.1)):
        loaded = load_checkpoint(path, weights=weights)
        assert torch.equal(loaded.network.state_dict()[name], network.state_dict()[name] + shift)
    assert not torch.equal(
        sampled(tmp_path, path, "--weights", "raw"), sampled(tmp_path, path, "--weights", "ema")
    )
    with pytest.raises(ValueError, match="unknown weights 'rwa'; did you mean 'raw'"):
        load_checkpoint(path, weights="rwa")


def test_what_alphabar_ema_writes_is_sampled(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    network, run = unet(), tmp_path / "run"
    (run / "checkpoints").mkdir(parents=True)
    written(run / "checkpoints", checkpoint_of(network), "last.ckpt")
    trained = {f"network.{name}": value for name, value in network.named_parameters()}
    frozen = next(iter(trained))
    for step in (100, 200):
        moved = {name: value + 0.1 for name, value in trained.items() if name != frozen}
        save_snapshot(run / "ema", moved, step=step, sigma_rel=0.1)
    out = tmp_path / "average.safetensors"
    assert main(["ema", str(run / "ema"), "--sigma_rel", "0.1", "--out", str(out)]) == 0
    said = capsys.readouterr().out
    assert "exactly the average" in said and f"alphabar sample {out} draws with it" in said
    loaded = load_checkpoint(out)
    assert loaded.schedule == SCHEDULE and loaded.sample_shape == (1, 8, 8)
    for name, value in loaded.network.state_dict().items():
        expected = network.state_dict()[name] + (0.0 if f"network.{name}" == frozen else 0.1)
        assert torch.allclose(value, expected, atol=1e-6)
    assert len(sampled(tmp_path, out)) > 0
    assert main(["inspect", str(out)]) == 0
    assert f"trained with: {SCHEDULE}" in capsys.readouterr().out


def test_an_average_without_a_checkpoint_says_what_it_lacks(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_snapshot(tmp_path / "ema", {"network.w": torch.ones(1)}, step=100, sigma_rel=0.1)
    out = tmp_path / "x.safetensors"
    command = ["ema", str(tmp_path / "ema"), "--sigma_rel", "0.1", "--out", str(out)]
    assert main(command) == 0
    assert "weights alone" in capsys.readouterr().out
    assert "does not say its noise schedule" in refused(capsys, tmp_path, out)
    SCHEDULE.save_pretrained(tmp_path / "scheduler")  # as the message advises
    assert "no sample_shape in it" in refused(capsys, tmp_path, out)
    assert "--network package.module:factory" in refused(capsys, tmp_path, out, "--shape", 1, 8, 8)
    other = written(tmp_path, checkpoint_of(unet()), "other.ckpt")
    assert main([*command, "--checkpoint", str(other)]) == 2
    assert (
        "is of another model than the snapshots: it has no weight like 'network.w'"
        in capsys.readouterr().err
    )


def test_a_weights_only_file_is_no_key_error(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    SCHEDULE.save_pretrained(tmp_path / "scheduler")
    error = refused(capsys, tmp_path, written(tmp_path, {"network.w": torch.ones(1)}))
    assert "state_dict of" in error and "must be a mapping of weights by name, got None" in error


# pipelines


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_pipeline(tmp_path_factory.mktemp("pipeline"))


@pytest.mark.parametrize("scale", [1.0, 4.0])
def test_a_pipeline_draws_prompts_with_our_sampler(
    pipeline: Path, tmp_path: Path, scale: float
) -> None:
    """As the pipeline itself does with the same noise: DDIM, its text encoder, its guidance, its
    VAE.
    """
    got = sampled(
        tmp_path, pipeline, "--prompt", "a red square", "a blue square", "--negative_prompt", "green", "--method", "ddim",
        "--guidance_scale", scale,
    )  # fmt: skip
    theirs = StableDiffusionPipeline.from_pretrained(
        pipeline, safety_checker=None, requires_safety_checker=False
    )
    schedule = NoiseSchedule.from_pretrained(pipeline, subfolder="scheduler")
    texts = ["a red square", "a blue square", "a red square"]
    given, empty = theirs.encode_prompt(texts, "cpu", 1, True, ["green"] * 3)
    key = "encoder_hidden_states"
    latents = Sampler(schedule, "ddim", 2)(
        theirs.unet,
        (3, 4, 8, 8),
        seeds=0,
        conditioning={key: given},
        unconditional={key: empty},
        guidance_scale=scale,
    )
    with torch.no_grad():
        images = theirs.vae.decode(latents / theirs.vae.config.scaling_factor).sample
    assert (got.int() - drawn(images, tmp_path).int()).abs().max() <= 2


@pytest.mark.parametrize("make", [make_pipeline, make_pipeline_xl])
def test_a_pipeline_as_diffusers_itself_draws_it(make: Any, tmp_path: Path) -> None:
    """From the same noise, by DDIM, whose steps are the same there."""
    folder = make(tmp_path)
    theirs = DiffusionPipeline.from_pretrained(folder)
    theirs.scheduler = DDIMScheduler.from_config(
        theirs.scheduler.config, timestep_spacing="trailing", clip_sample=False
    )
    theirs.set_progress_bar_config(disable=True)
    noise = SeededNoise((3, 4, 8, 8), 0, torch.device("cpu"))()
    options: dict[str, Any] = {
        "num_inference_steps": 2,
        "guidance_scale": 7.5,
        "output_type": "pt",
        "height": 16,
        "width": 16,
    }
    out = theirs(["a red square"] * 3, latents=noise, **options).images.float()
    got = sampled(
        tmp_path, folder, "--prompt", "a red square", "--method", "ddim", "--grid", "trailing"
    )
    assert (got.int() - drawn(out * 2 - 1, tmp_path).int()).abs().max() <= 3


def test_what_a_pipeline_refuses(
    pipeline: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "draws what a text says; give --prompt" in refused(capsys, tmp_path, pipeline)
    assert "--weights is for a checkpoint" in refused(
        capsys, tmp_path, pipeline, "--prompt", "a", "--weights", "raw"
    )
    index = json.loads((pipeline / "model_index.json").read_text())
    for changes, words in (
        ({"_class_name": "FluxPipeline"}, "unknown kind of pipeline 'FluxPipeline'"),
        ({"_class_name": ["x"]}, "unknown kind of pipeline a list of 1"),
        ({"unet": ["os", "system"]}, "the part 'unet' of"),
        ({"unet": ["diffusers", "NoSuchModel"]}, "diffusers cannot load the pipeline"),
    ):
        folder = tmp_path / "changed"
        folder.mkdir(exist_ok=True)
        (folder / "model_index.json").write_text(json.dumps({**index, **changes}))
        if not (folder / "scheduler").exists():
            (folder / "scheduler").symlink_to(pipeline / "scheduler")
        assert words in refused(capsys, tmp_path, folder, "--prompt", "a")


def test_an_unconditional_pipeline(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    network = unet(3)
    DDPMPipeline(network, DDPMScheduler()).save_pretrained(tmp_path / "ddpm")
    expected = Sampler(NoiseSchedule.linear(), "dpmpp_2m", 2)(network.eval(), (3, 3, 8, 8), seeds=0)
    assert (
        sampled(tmp_path, tmp_path / "ddpm").int() - drawn(expected, tmp_path).int()
    ).abs().max() <= 1
    (tmp_path / "out.png").unlink()
    assert "takes no prompts" in refused(capsys, tmp_path, tmp_path / "ddpm", "--prompt", "a")


def test_latents_of_a_checkpoint_are_decoded(pipeline: Path, tmp_path: Path) -> None:
    path = written(tmp_path, checkpoint_of(unet(4), (4, 8, 8)))
    vae = AutoencoderKL.from_pretrained(pipeline / "vae")
    latents = Sampler(SCHEDULE, "dpmpp_2m", 2)(load_checkpoint(path).network, (3, 4, 8, 8), seeds=0)
    with torch.no_grad():
        images = vae.decode(latents / vae.config.scaling_factor).sample
    for folder in (pipeline, pipeline / "vae"):
        got = sampled(tmp_path, path, "--vae", folder)
        assert (got.int() - drawn(images, tmp_path).int()).abs().max() <= 2


def test_the_metadata_of_an_average_is_plain(tmp_path: Path) -> None:
    save_snapshot(tmp_path / "ema", {"network.w": torch.ones(1)}, step=1, sigma_rel=0.1)
    written(
        tmp_path / "ema",
        {"state_dict": {"network.w": torch.zeros(1), "b": torch.ones(2)}, "sample_shape": [1]},
        "a.ckpt",
    )
    out = tmp_path / "x.safetensors"
    assert main(["ema", str(tmp_path / "ema"), "--sigma_rel", "0.1", "--out", str(out)]) == 0
    with safe_open(out, "pt") as file:
        assert (
            sorted(file.keys()) == ["b", "network.w"] and file.get_tensor("network.w").item() == 1.0
        )
        assert file.metadata()["alphabar.sample_shape"] == "[1]"
