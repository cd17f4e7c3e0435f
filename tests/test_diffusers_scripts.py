"""Training scripts of diffusers and kohya with alphabar put in by examples/diffusers_scripts/edit.py: the diff is small, and right."""

from __future__ import annotations

import argparse
import importlib.util
import os
import runpy
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import diffusers
import pytest
import torch
from accelerate.state import AcceleratorState
from diffusers import (
    AutoencoderKL,
    DDPMScheduler,
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
)
from diffusers.training_utils import compute_loss_weighting_for_sd3, compute_snr
from safetensors import safe_open
from torch import Tensor

from alphabar.noising import (
    LogitNormalTimesteps,
    Noised,
    NoiseLevelTimesteps,
    NoiseSchedule,
    Noising,
    token_shift,
)
from alphabar.training import inspect_path
from tiny_pipeline import make_pipeline

ROOT = Path(__file__).parent.parent
SCRIPTS = Path(__file__).parent / "diffusers_scripts"
EDIT = ROOT / "examples" / "diffusers_scripts" / "edit.py"
OF_DIFFUSERS = [
    "train_dreambooth_sd3.py",
    "train_text_to_image.py",
    "train_text_to_image_lora.py",
    "train_unconditional.py",
]
SHORT = ["--resolution", "16", "--train_batch_size", "2", "--gradient_accumulation_steps", "3"]


def edits() -> Any:
    spec = importlib.util.spec_from_file_location("edit", EDIT)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def script_of_diffusers(name: str) -> Path:
    examples = Path(os.environ["ALPHABAR_DIFFUSERS_EXAMPLES"])
    (path,) = (p for p in examples.rglob(name) if "research_projects" not in p.parts)
    return path


class Batch(NamedTuple):
    """A call of the edited script."""

    x0: Tensor
    noised: Noised
    where: dict[str, Any]


class Loss(NamedTuple):
    noised: Noised
    output: Tensor
    losses: Tensor


def patched(name: str, folder: Path) -> Path:
    """Return a copy of the script with the diff applied by patch, as the README says."""
    script = folder / name
    script.write_bytes((SCRIPTS / name).read_bytes())
    diff = subprocess.run(
        [sys.executable, str(EDIT), str(script)], capture_output=True, text=True, check=True
    ).stdout
    subprocess.run(
        ["patch", "-p1"], input=diff, text=True, check=True, capture_output=True, cwd=folder
    )
    return script


def run(
    name: str, flags: list[str], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> tuple[list[Batch], list[Loss], Path]:
    """Run the edited script, and return what it noised, the losses that it took, and the folder that it wrote."""
    batches: list[Batch] = []
    losses: list[Loss] = []
    forward, loss_of = Noising.forward, Noised.losses

    def seen(self: Noising, x0: Tensor, **where: Any) -> Noised:
        noised = forward(self, x0, **where)
        batches.append(Batch(x0, noised, where))
        return noised

    def heard(self: Noised, prediction: Any, *more: Any) -> Tensor:
        result = loss_of(self, prediction, *more)
        output = prediction if isinstance(prediction, Tensor) else prediction.sample
        losses.append(Loss(self, output.detach(), result.detach()))
        return result

    monkeypatch.setattr(Noising, "forward", seen)
    monkeypatch.setattr(Noised, "losses", heard)
    out = folder / "out"
    script = patched(name, folder)
    monkeypatch.setattr("sys.argv", [name, *SHORT, "--output_dir", str(out), *flags])
    AcceleratorState._reset_state(reset_partial_state=True)
    runpy.run_path(str(script), run_name="__main__")
    return batches, losses, out


def assert_distinct(batches: list[Batch]) -> None:
    """Every sample of an optimizer step, over its three micro-batches and over the steps, has noise of its own."""
    noises = torch.cat([batch.noised.noise.flatten(1) for batch in batches])
    distances = torch.cdist(noises, noises) + 1e9 * torch.eye(len(noises))
    assert float(distances.min()) > 1.0
    assert len(batches) == 5 and len({batch.where["step"] for batch in batches}) == 2


@pytest.fixture(scope="module")
def stable_diffusion(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_pipeline(tmp_path_factory.mktemp("sd"))


@pytest.fixture(scope="module")
def stable_diffusion_3(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sd3") / "pipeline"
    torch.manual_seed(0)
    transformer = diffusers.SD3Transformer2DModel(
        sample_size=8,
        patch_size=1,
        in_channels=4,
        num_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=16,
        caption_projection_dim=16,
        pooled_projection_dim=16,
        out_channels=4,
        pos_embed_max_size=16,
    )
    vae = AutoencoderKL(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=4,
        norm_num_groups=4,
        sample_size=16,
        shift_factor=0.06,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )
    nothing = dict.fromkeys(
        f"{part}{end}" for part in ("text_encoder", "tokenizer") for end in ("", "_2", "_3")
    )
    pipeline = diffusers.StableDiffusion3Pipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=vae,
        **nothing,
    )
    pipeline.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("name", OF_DIFFUSERS)
def test_the_diff_is_at_most_8_edits_and_runs_through_patch(name: str, tmp_path: Path) -> None:
    module = edits()
    assert len(module.EDITS[name]) <= 8
    text = patched(name, tmp_path).read_text()
    assert (
        "noising(" in text
        and "add_noising_arguments(parser)" in text
        and "diffusers_scheduler(" in text
    )
    assert text == module.edited((SCRIPTS / name).read_text(), module.EDITS[name])


@pytest.mark.skipif(
    "ALPHABAR_DIFFUSERS_EXAMPLES" not in os.environ, reason="no checkout of diffusers is named"
)
@pytest.mark.parametrize("name", OF_DIFFUSERS)
def test_the_edits_find_their_places_in_diffusers(name: str) -> None:
    module = edits()
    path = script_of_diffusers(name)
    after = module.edited(path.read_text(encoding="utf-8"), module.EDITS[name])
    compile(after, name, "exec")
    for gone in ("add_noise(", "compute_density_for_timestep_sampling(\n", "F.mse_loss("):
        assert gone not in after
    for edit in module.EDITS[name]:
        assert edit.instead or edit.text.strip().splitlines()[0].strip() in after


def test_a_script_without_the_places_is_refused(tmp_path: Path) -> None:
    other = tmp_path / "train_text_to_image.py"
    other.write_text("print()\n")
    for path, words in (
        (other, "check_min_version("),
        (tmp_path / "train_other.py", "train_text_to_image.py"),
    ):
        result = subprocess.run(
            [sys.executable, str(EDIT), str(path)], capture_output=True, text=True
        )
        assert result.returncode == 1 and words in result.stderr and not result.stdout


@pytest.mark.parametrize(
    "flags",
    [
        pytest.param([], marks=pytest.mark.slow),
        pytest.param(["--snr_gamma", "5"], marks=pytest.mark.slow),
        [
            "--prediction_type",
            "v_prediction",
            "--rescale_betas_zero_snr",
            "--validation_prompts",
            "a red square",
        ],
        pytest.param(
            [
                "--prediction_type",
                "v_prediction",
                "--snr_gamma",
                "5",
                "--noise_offset",
                "0.1",
                "--input_perturbation",
                "0.1",
            ],
            marks=pytest.mark.slow,
        ),
    ],
    ids=["epsilon", "min-SNR", "v, zero SNR", "v, min-SNR, noise"],
)
def test_text_to_image(
    flags: list[str], stable_diffusion: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = ["--pretrained_model_name_or_path", str(stable_diffusion)]
    batches, losses, out = run("train_text_to_image.py", [*base, *flags], tmp_path, monkeypatch)
    assert_distinct(batches)
    v, zero = "v_prediction" in flags, "--rescale_betas_zero_snr" in flags
    peer = DDPMScheduler(1000, 0.00085, 0.012, "scaled_linear", rescale_betas_zero_snr=zero)
    for (x0, noised, _), (same, output, loss) in zip(batches, losses, strict=True):
        assert same is noised
        if "--input_perturbation" not in flags:
            assert torch.allclose(
                noised.x, peer.add_noise(x0, noised.noise, noised.timesteps), atol=2e-4
            )
        target = peer.get_velocity(x0, noised.noise, noised.timesteps) if v else noised.noise
        theirs = ((output - target) ** 2).mean((1, 2, 3))
        if "--snr_gamma" in flags:
            snr = compute_snr(peer, noised.timesteps)
            theirs = theirs * snr.clamp(max=5.0) / (snr + v)
        assert torch.allclose(loss, theirs, rtol=2e-3, atol=1e-5)
    schedule = NoiseSchedule.from_pretrained(out, subfolder="scheduler")
    expected = NoiseSchedule.scaled_linear(prediction="v_prediction" if v else "epsilon")
    assert schedule == (expected.zero_terminal_snr() if zero else expected)
    pipeline = DiffusionPipeline.from_pretrained(out, safety_checker=None)
    assert type(pipeline.scheduler).__name__ == ("DDIMScheduler" if zero else "PNDMScheduler")
    assert pipeline.scheduler.config.get("timestep_spacing") == ("trailing" if zero else "leading")


def test_text_to_image_lora(
    stable_diffusion: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flags = [
        *("--pretrained_model_name_or_path", str(stable_diffusion), "--noise_offset", "0.1"),
        *("--prediction_type", "v_prediction", "--rescale_betas_zero_snr"),
        *("--validation_prompt", "a red square"),
    ]
    batches, losses, out = run("train_text_to_image_lora.py", flags, tmp_path, monkeypatch)
    assert_distinct(batches)
    peer = DDPMScheduler(1000, 0.00085, 0.012, "scaled_linear", rescale_betas_zero_snr=True)
    for (x0, noised, _), (_, output, loss) in zip(batches, losses, strict=True):
        target = peer.get_velocity(x0, noised.noise, noised.timesteps)
        assert torch.allclose(loss, ((output - target) ** 2).mean((1, 2, 3)), rtol=2e-3)
    expected = NoiseSchedule.scaled_linear(prediction="v_prediction").zero_terminal_snr()
    assert NoiseSchedule.from_pretrained(out, subfolder="scheduler") == expected
    assert (out / "pytorch_lora_weights.safetensors").is_file()
    scheduler = diffusers.DDIMScheduler.from_pretrained(out, subfolder="scheduler")
    assert scheduler.config.prediction_type == "v_prediction" and scheduler.alphas_cumprod[-1] == 0


@pytest.mark.parametrize("prediction", ["epsilon", "sample"])
def test_unconditional(prediction: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flags = ["--prediction_type", prediction, "--ddpm_num_steps", "500"]
    batches, losses, out = run("train_unconditional.py", flags, tmp_path, monkeypatch)
    assert_distinct(batches)
    peer = DDPMScheduler(500, beta_schedule="linear")
    for (x0, noised, _), (_, output, loss) in zip(batches, losses, strict=True):
        assert torch.allclose(
            noised.x, peer.add_noise(x0, noised.noise, noised.timesteps), atol=1e-5
        )
        alpha_t = peer.alphas_cumprod[noised.timesteps].view(-1, 1, 1, 1)
        weighted = (
            (output - noised.noise) ** 2
            if prediction == "epsilon"
            else alpha_t / (1 - alpha_t) * (output - x0) ** 2
        )
        assert torch.allclose(loss, weighted.mean((1, 2, 3)), rtol=2e-3)
    pipeline = DiffusionPipeline.from_pretrained(out)
    assert type(pipeline.scheduler).__name__ == "DDPMScheduler"
    assert pipeline.scheduler.config.prediction_type == prediction
    assert torch.allclose(pipeline.scheduler.alphas_cumprod, peer.alphas_cumprod, rtol=1e-5)


@pytest.mark.parametrize(
    "flags",
    [
        [],
        pytest.param(
            ["--precondition_outputs", "0", "--weighting_scheme", "sigma_sqrt"],
            marks=pytest.mark.slow,
        ),
        ["--weighting_scheme", "cosmap", "--with_prior_preservation", "--prior_loss_weight", "0.5"],
        pytest.param(["--logit_mean", "1", "--flow_shift", "2"], marks=pytest.mark.slow),
    ],
    ids=["defaults", "output", "prior", "shift"],
)
def test_sd3(
    flags: list[str], stable_diffusion_3: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = ["--pretrained_model_name_or_path", str(stable_diffusion_3)]
    batches, losses, out = run("train_dreambooth_sd3.py", [*base, *flags], tmp_path, monkeypatch)
    assert_distinct(batches)
    scheme = (
        flags[flags.index("--weighting_scheme") + 1]
        if "--weighting_scheme" in flags
        else "logit_normal"
    )
    for (x0, noised, _), (_, output, loss) in zip(batches, losses, strict=True):
        sigmas = (noised.timesteps / 1000).view(-1, 1, 1, 1)
        assert torch.allclose(noised.x, (1.0 - sigmas) * x0 + sigmas * noised.noise, atol=1e-5)
        model_pred, target = output, noised.noise - x0
        if "--precondition_outputs" not in flags:
            model_pred, target = output * (-sigmas) + noised.x, x0
        weighting = compute_loss_weighting_for_sd3(scheme, sigmas)
        theirs = (weighting * (model_pred - target) ** 2).reshape(len(x0), -1).mean(1)
        assert torch.allclose(loss, theirs, rtol=1e-3, atol=1e-6)
    shift = 2.0 if "--flow_shift" in flags else 3.0
    assert NoiseSchedule.from_pretrained(out, subfolder="scheduler") == NoiseSchedule.flow(shift)
    assert (
        FlowMatchEulerDiscreteScheduler.from_pretrained(out, subfolder="scheduler").config.shift
        == shift
    )


# kohya's scripts

KOHYA = ["train_network.py", "sdxl_train_network.py", "flux_train_network.py"]


@pytest.fixture
def beside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder that scripts import each other from, with the edited train_network.py in it."""
    monkeypatch.syspath_prepend(tmp_path)
    patched("train_network.py", tmp_path)
    yield tmp_path
    sys.modules.pop("train_network", None)


@pytest.mark.parametrize("name", KOHYA)
def test_the_diff_of_kohyas_scripts(name: str, tmp_path: Path) -> None:
    text = patched(name, tmp_path).read_text()
    assert text == edits().edited((SCRIPTS / name).read_text(), edits().EDITS[name])
    assert "parser = add_noising_arguments(setup_parser())" in text
    for gone in ("args, noise_scheduler, latents\n", "conditional_loss(noise_pred", "rand(bsz)"):
        assert gone not in text


@pytest.mark.skipif("ALPHABAR_SD_SCRIPTS" not in os.environ, reason="no checkout is named")
@pytest.mark.parametrize("name", KOHYA)
def test_the_edits_find_their_places_in_sd_scripts(name: str) -> None:
    source = Path(os.environ["ALPHABAR_SD_SCRIPTS"], name).read_text(encoding="utf-8")
    after = edits().edited(source, edits().EDITS[name])
    compile(after, name, "exec")
    for gone in ("conditional_loss(noise_pred", "_timesteps(args, noise_scheduler", "e - latents"):
        assert gone not in after


@pytest.mark.parametrize(
    ("name", "flags"),
    [
        ("train_network.py", ["--gradient_checkpointing"]),
        (
            "sdxl_train_network.py",
            ["--v_parameterization", "--zero_terminal_snr", "--min_snr_gamma", "5"],
        ),
        (
            "train_network.py",
            [
                "--prediction_type",
                "v_prediction",
                "--rescale_betas_zero_snr",
                "--noise_offset",
                "0.1",
            ],
        ),
        ("train_network.py", ["--debiased_estimation_loss", "--loss_type", "l1"]),
        (
            "train_network.py",
            ["--v_parameterization", "--zero_terminal_snr", "--loss_weighting", "min_snr:gamma=5"],
        ),
    ],
    ids=[
        "epsilon",
        "v, zero SNR, min-SNR",
        "alphabar's flags",
        "debiased L1",
        "a weighting of ours",
    ],
)
def test_kohyas_network(
    name: str, flags: list[str], beside: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    batches, losses, out = run(name, flags, beside, monkeypatch)
    assert_distinct(batches)
    v = "--v_parameterization" in flags or "v_prediction" in flags
    peer = DDPMScheduler(1000, 0.00085, 0.012, "scaled_linear", rescale_betas_zero_snr=v)
    *trained, validated = losses
    assert validated.noised.t.tolist() == [400, 400]
    for (x0, noised, _), (same, output, loss) in zip(batches, trained, strict=True):
        assert same is noised
        assert torch.allclose(
            noised.x, peer.add_noise(x0, noised.noise, noised.timesteps), atol=2e-4
        )
        target = peer.get_velocity(x0, noised.noise, noised.timesteps) if v else noised.noise
        error = (output - target).abs() if "l1" in flags else (output - target) ** 2
        theirs, snr = error.mean((1, 2, 3)), compute_snr(peer, noised.timesteps)
        if "--debiased_estimation_loss" in flags:
            theirs = theirs / snr.clamp(max=1000).sqrt()
        if {"--min_snr_gamma", "min_snr:gamma=5"} & {*flags}:  # apply_snr_weight
            theirs = theirs * snr.clamp(max=5) / (snr + 1)
        assert torch.allclose(loss, theirs, rtol=2e-3, atol=1e-5)
    expected = NoiseSchedule.scaled_linear(prediction="v_prediction" if v else "epsilon")
    expected = expected.zero_terminal_snr() if v else expected
    assert NoiseSchedule.from_pretrained(out / "last.scheduler") == expected
    with safe_open(out / "last.safetensors", "pt") as file:
        metadata = file.metadata()
    assert metadata["ss_v_parameterization"] == metadata["ss_zero_terminal_snr"] == str(v)
    assert "alphabar.noise_schedule" in metadata
    if "min_snr:gamma=5" in flags:  # a flag that the script does not know
        assert metadata["ss_min_snr_gamma"] == "5"
    report = inspect_path(out / "last.safetensors")
    assert report.schedule == expected, str(report)


def test_kohyas_masks_weights_and_targets_of_samples(tmp_path: Path) -> None:
    """process_batch returns the mean of mask times error, each sample times its loss_weights."""
    path = patched("train_network.py", tmp_path)
    trainer = runpy.run_path(str(path), run_name="train_network")["NetworkTrainer"]()
    noising = trainer.noising = Noising(NoiseSchedule.scaled_linear())
    trainer.position = {"step": 0, "index": range(2)}
    network = torch.nn.Conv2d(4, 4, 1)
    batch = {
        "latents": torch.randn(2, 4, 8, 8),
        "loss_weights": torch.tensor([1.0, 3.0]),
        "alpha_masks": torch.rand(2, 16, 16),
    }
    args = argparse.Namespace(gradient_checkpointing=False, masked_loss=True)
    loss = trainer.process_batch(batch, lambda x, t: network(x), None, args)
    noised = noising(batch["latents"], step=0, index=range(2))
    mask = torch.nn.functional.avg_pool2d(batch["alpha_masks"], 2).unsqueeze(1)
    errors = (mask * (network(noised.x) - noised.noise) ** 2).mean((1, 2, 3))
    assert torch.allclose(loss, (errors * batch["loss_weights"]).mean(), rtol=1e-5)
    batch["preserved"] = [1]  # the target of this sample is the network's own output
    loss = trainer.process_batch(batch, lambda x, t: network(x), None, args)
    assert torch.allclose(loss, errors[0] * batch["loss_weights"][0] / 2, rtol=1e-5)


@pytest.mark.parametrize(
    ("sampling", "shift"), [("sigmoid", 1.0), ("flux_shift", token_shift(4 * 4))]
)
def test_kohyas_flux(
    sampling: str, shift: float, beside: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The sigmas are those of the density, at the shift of the 16 tokens of 8 x 8 latents."""
    flags = ["--model_prediction_type", "raw", "--discrete_flow_shift", "2"]
    flags += ["--timestep_sampling", sampling]
    batches, losses, out = run("flux_train_network.py", flags, beside, monkeypatch)
    assert_distinct(batches)
    density = NoiseLevelTimesteps(density=LogitNormalTimesteps(), shift=shift)
    drawn = Noising(NoiseSchedule.flow(2.0), timesteps=density).draw(
        range(6), (4, 8, 8), step=0, total=6
    )
    assert torch.equal(torch.cat([batch.noised.t for batch in batches[:3]]), drawn.t)
    *trained, validated = losses
    assert validated.noised.timesteps.tolist() == pytest.approx([400, 400], abs=1e-3)
    for (x0, noised, _), (_, output, loss) in zip(batches, trained, strict=True):
        sigmas = (noised.timesteps / 1000).view(-1, 1, 1, 1)
        assert torch.allclose(noised.x, (1 - sigmas) * x0 + sigmas * noised.noise, atol=1e-5)
        theirs = ((output - (noised.noise - x0)) ** 2).mean((1, 2, 3))
        assert torch.allclose(loss, theirs, rtol=1e-4)
    assert NoiseSchedule.from_pretrained(out / "last.scheduler") == NoiseSchedule.flow(2.0)


def test_a_script_of_kohya_that_is_not_edited_is_refused(
    beside: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = beside / "flux_train_network.py"
    text = (SCRIPTS / script.name).read_text()
    flags = edits().EDITS[script.name][:2]
    script.write_text(edits().edited(text, flags))
    raw = ["--model_prediction_type", "raw", "--output_dir", str(beside)]
    monkeypatch.setattr("sys.argv", [script.name, *SHORT, *raw])
    with pytest.raises(TypeError, match="FluxNetworkTrainer draws its own noise"):
        runpy.run_path(str(script), run_name="__main__")
