"""Example scripts of diffusers run unchanged with alphabar's DDPMScheduler, and with alphabar's edits: with the same losses.

Needs the folder ``examples`` of a checkout of diffusers, named by ``ALPHABAR_DIFFUSERS_EXAMPLES``.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DiffusionPipeline, UNet2DModel

from alphabar.noising import NoiseSchedule
from tiny_pipeline import make_images, make_pipeline

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        "ALPHABAR_DIFFUSERS_EXAMPLES" not in os.environ, reason="no checkout of diffusers is named"
    ),
]

HERE = Path(__file__).parent
EDIT = HERE.parent / "examples" / "diffusers_scripts" / "edit.py"
RUN = HERE / "diffusers_examples" / "run_example.py"
EXAMPLES = Path(os.environ.get("ALPHABAR_DIFFUSERS_EXAMPLES", "."))
UNCONDITIONAL = "unconditional_image_generation/train_unconditional.py"
TEXT_TO_IMAGE = "text_to_image/train_text_to_image.py"
LORA = "text_to_image/train_text_to_image_lora.py"


@dataclass(frozen=True)
class Case:
    """A script with flags, and the modes of run_example.py.

    ``zero``: from a v model of zero SNR. ``within``: the relative difference of the losses.
    """

    script: str
    flags: Sequence[str] = ()
    zero: bool = False
    modes: Sequence[str] = ("diffusers", "alphabar", "edited")
    within: float = 1e-6


V = ("--prediction_type", "v_prediction")
KINDS = ("--noise_offset", "0.1", "--input_perturbation", "0.1")
PROMPT = ("--validation_prompts", "a red square", "--validation_epochs", "1")
CASES = {
    # the previews between the epochs use the scheduler object of the training
    "unconditional": Case(
        UNCONDITIONAL, ("--use_ema", "--num_epochs", "2", "--save_images_epochs", "1")
    ),
    "unconditional, x_0": Case(
        UNCONDITIONAL,
        (
            "--prediction_type",
            "sample",
            "--ddpm_num_steps",
            "500",
            "--gradient_accumulation_steps",
            "2",
        ),
    ),
    "unconditional, cosine": Case(UNCONDITIONAL, ("--ddpm_beta_schedule", "squaredcos_cap_v2")),
    "text to image": Case(TEXT_TO_IMAGE, ("--use_ema", *PROMPT)),
    "text to image, v, min-SNR": Case(TEXT_TO_IMAGE, (*V, "--snr_gamma", "5", *PROMPT)),
    # diffusers rounds the table of ᾱ to bfloat16 too
    "text to image, bfloat16": Case(TEXT_TO_IMAGE, ("--mixed_precision", "bf16"), within=2e-3),
    "text to image, zero SNR": Case(TEXT_TO_IMAGE, ("--snr_gamma", "5", *PROMPT), zero=True),
    "text to image, noise": Case(TEXT_TO_IMAGE, (*KINDS, "--gradient_accumulation_steps", "2")),
    "text to image, DREAM": Case(
        TEXT_TO_IMAGE, ("--dream_training",), modes=("diffusers", "alphabar")
    ),
    "LoRA": Case(LORA, ("--snr_gamma", "5")),
    "LoRA, zero SNR": Case(LORA, ("--validation_prompt", "a red square"), zero=True),
}


@dataclass(frozen=True)
class Run:
    """A run of a script: what it logged, and the folder that it wrote."""

    losses: np.ndarray
    images: list[np.ndarray]
    noised: int
    output: Path

    @property
    def scheduler(self) -> dict[str, Any]:
        """The scheduler config that it saved."""
        return json.loads((self.output / "scheduler" / "scheduler_config.json").read_text())


def zero_snr_model(base: Path, folder: Path) -> Path:
    """Write the pipeline with a scheduler of v-prediction and zero terminal SNR."""
    pipeline = DiffusionPipeline.from_pretrained(base, safety_checker=None)
    zero = {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True}
    pipeline.scheduler = DDIMScheduler.from_config(
        pipeline.scheduler.config, **zero, timestep_spacing="trailing", clip_sample=False
    )
    pipeline.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Run]]:
    """Run every case in every of its modes, all in one process."""
    folder = tmp_path_factory.mktemp("examples")
    base = make_pipeline(folder / "sd")
    models = {False: base, True: zero_snr_model(base, folder / "zero")}
    images = make_images(folder / "images")
    UNet2DModel(
        sample_size=16,
        block_out_channels=(8, 16),
        layers_per_block=1,
        down_block_types=("DownBlock2D",) * 2,
        up_block_types=("UpBlock2D",) * 2,
        norm_num_groups=4,
    ).save_config(folder / "unet")
    data = ["--train_data_dir", str(images), "--cache_dir", str(folder / "cache")]
    size = ["--resolution", "16", "--train_batch_size", "2", "--random_flip"]
    steps = ["--max_train_steps", "6", "--seed", "0"]
    epochs = ["--num_epochs", "1", "--lr_warmup_steps", "0", "--eval_batch_size", "2"]
    tiny = ["--model_config_name_or_path", str(folder / "unet"), "--ddpm_num_inference_steps", "5"]
    edited: dict[str, Path] = {}
    for script in (UNCONDITIONAL, TEXT_TO_IMAGE, LORA):
        edited[script] = folder / Path(script).name
        edited[script].write_bytes((EXAMPLES / script).read_bytes())
        diff = subprocess.run(
            [sys.executable, str(EDIT), str(edited[script])],
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        subprocess.run(["patch", str(edited[script])], input=diff, text=True, check=True)
    plan, outputs = [], []
    for number, case in enumerate(CASES.values()):
        unconditional = case.script == UNCONDITIONAL
        model = ["--pretrained_model_name_or_path", str(models[case.zero])]
        rest = [*epochs, *tiny] if unconditional else [*steps, *model]
        for mode in case.modes:
            outputs.append(folder / f"{number}-{mode}")
            script = edited[case.script] if mode == "edited" else EXAMPLES / case.script
            flags = [*data, *size, *rest, *case.flags, "--output_dir", str(outputs[-1])]
            plan.append({"mode": mode, "script": str(script), "arguments": flags})
    (folder / "plan.json").write_text(json.dumps(plan))
    result = folder / "result.json"
    subprocess.run(
        [sys.executable, str(RUN), str(folder / "plan.json"), str(result)],
        env={**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(folder / "hub")},
        check=True,
    )
    found = iter(zip(json.loads(result.read_text()), outputs, strict=True))
    return {name: {mode: read(*next(found)) for mode in case.modes} for name, case in CASES.items()}


def read(result: dict[str, Any], output: Path) -> Run:
    assert result["error"] is None, result["error"]
    images = [np.array(values) for values in result["images"]]
    return Run(np.array(result["losses"]), images, result["noised"], output)


@pytest.mark.parametrize("name", CASES)
def test_the_losses_and_the_previews_are_those_of_diffusers(
    name: str, runs: dict[str, dict[str, Run]]
) -> None:
    theirs = runs[name]["diffusers"]
    assert len(theirs.losses) in (6, 12) and theirs.noised >= 6 and theirs.losses.std() > 0
    for mode in CASES[name].modes[1:]:
        ours = runs[name][mode]
        assert ours.noised == theirs.noised
        difference = np.abs(ours.losses / theirs.losses - 1).max()
        print(f"{name}, {mode}: losses differ by {difference:.1e}")
        # the SNR of the loss weights, of float32 products in diffusers, is off by up to 3e-5
        within = CASES[name].within
        assert difference < (max(within, 3e-5) if mode == "edited" else within)
        for one, other in zip(ours.images, theirs.images, strict=True):
            apart = np.abs(one - other)  # of 255; the previews of Stable Diffusion are in bfloat16
            print(f"{name}, {mode}: previews differ by {apart.mean():.3f}, at most {apart.max()}")
            if mode == "edited" and set(V) < set(CASES[name].flags):
                assert apart.mean() > 5  # the script of diffusers previews a v model as epsilon
            else:
                assert apart.mean() < (0.01 if CASES[name].script == UNCONDITIONAL else 2)


@pytest.mark.parametrize("name", CASES)
def test_what_is_saved_loads_in_diffusers(name: str, runs: dict[str, dict[str, Run]]) -> None:
    for mode, one in runs[name].items():
        if CASES[name].script == LORA:
            assert (one.output / "pytorch_lora_weights.safetensors").is_file()
            continue
        pipeline: Any = DiffusionPipeline.from_pretrained(
            one.output, safety_checker=None, torch_dtype=torch.float32
        )
        assert type(pipeline.scheduler).__module__.startswith("diffusers.schedulers.")
        index = json.loads((one.output / "model_index.json").read_text())
        assert index["scheduler"] == ["diffusers", type(pipeline.scheduler).__name__]
        assert index["scheduler"] == ["diffusers", one.scheduler["_class_name"]]
        torch.manual_seed(0)
        prompt = {} if CASES[name].script == UNCONDITIONAL else {"prompt": "a red square"}
        pipeline.set_progress_bar_config(disable=True)
        assert pipeline(**prompt, num_inference_steps=2, output_type="np").images.std() > 0
        if mode == "alphabar":
            assert one.scheduler == runs[name]["diffusers"].scheduler


def test_the_schedule_of_the_training_is_saved(runs: dict[str, dict[str, Run]]) -> None:
    sample = runs["unconditional, x_0"]
    for one in sample.values():
        assert one.scheduler["prediction_type"] == "sample"
        assert one.scheduler["num_train_timesteps"] == 500
    # the script of diffusers saves the scheduler of the base model, whatever it trains
    of_v = runs["text to image, v, min-SNR"]
    assert of_v["diffusers"].scheduler.get("prediction_type", "epsilon") == "epsilon"
    assert of_v["edited"].scheduler["prediction_type"] == "v_prediction"
    for name in ("text to image, zero SNR", "LoRA, zero SNR"):
        for mode, one in runs[name].items():
            if mode == "edited" or CASES[name].script != LORA:
                assert one.scheduler["prediction_type"] == "v_prediction"
                assert one.scheduler["rescale_betas_zero_snr"] is True
                assert one.scheduler["timestep_spacing"] == "trailing"
                schedule = NoiseSchedule.from_pretrained(one.output, subfolder="scheduler")
                assert schedule.has_zero_terminal_snr
