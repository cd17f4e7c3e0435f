"""The fine-tuning example, end to end on a tiny pipeline with random weights."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from accelerate.state import AcceleratorState
from torch.nn.attention import SDPBackend, sdpa_kernel

from alphabar.noising import NoiseSchedule
from alphabar.training.checkpoints.safetensors import read_header
from test_examples import EXAMPLES, V_ZERO_SNR, load
from tiny_pipeline import make_images, make_pipeline

SHORT = [
    "--resolution",
    "16",
    "--train_batch_size",
    "2",
    "--gradient_accumulation_steps",
    "2",
    "--learning_rate",
    "1e-3",
]


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("given")
    pipeline, images = make_pipeline(folder), make_images(folder / "images")
    return ["--pretrained_model_name_or_path", str(pipeline), "--train_data_dir", str(images)]


@pytest.fixture(autouse=True)
def as_in_a_new_process() -> None:
    # accelerate keeps one precision for the whole process
    AcceleratorState._reset_state(reset_partial_state=True)


def names_of(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob("checkpoint-*"))


def losses(folder: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (folder / "losses.jsonl").read_text().splitlines()]


def test_epsilon_becomes_v_with_zero_terminal_snr(given: list[str], tmp_path: Path) -> None:
    flags = [
        "--max_train_steps",
        "2",
        "--validation_prompts",
        "a red square",
        "a blue square",
        "--num_inference_steps",
        "2",
    ]
    load("finetune_text_to_image").main(
        [*given, *V_ZERO_SNR, *SHORT, *flags, "--output_dir", str(tmp_path)]
    )
    config = json.loads((tmp_path / "scheduler" / "scheduler_config.json").read_text())
    assert config["prediction_type"] == "v_prediction" and config["rescale_betas_zero_snr"] is True
    assert config["timestep_spacing"] == "trailing"
    assert NoiseSchedule.from_pretrained(tmp_path, subfolder="scheduler").has_zero_terminal_snr
    with warnings.catch_warnings():
        warnings.simplefilter("error", FutureWarning)  # such as of a steps_offset that is not 1
        pipeline = diffusers.DiffusionPipeline.from_pretrained(tmp_path)
    assert (
        pipeline.scheduler.alphas_cumprod[-1] == 0
        and pipeline.scheduler.config.prediction_type == "v_prediction"
    )
    image = pipeline(
        "a red square", num_inference_steps=2, height=16, width=16, output_type="pt"
    ).images
    assert image.shape == (1, 3, 16, 16) and bool(torch.as_tensor(image).isfinite().all())
    assert (tmp_path / "previews" / "step_00000002.png").is_file()
    before = diffusers.UNet2DConditionModel.from_pretrained(given[1], subfolder="unet").state_dict()
    assert any(
        not torch.equal(value, before[name]) for name, value in pipeline.unet.state_dict().items()
    )


@pytest.mark.slow  # a resume without a kill, and a kill of previews, are with the fast tests
def test_killed_and_resumed_it_learns_the_same(given: list[str], tmp_path: Path) -> None:
    flags = [
        *given,
        *V_ZERO_SNR,
        *SHORT,
        "--max_train_steps",
        "7",
        "--checkpointing_steps",
        "2",
        "--random_flip",
        "--use_ema",
    ]
    flags += ["--lr_warmup_steps", "3", "--proportion_empty_prompts", "0.3"]
    example = load("finetune_text_to_image")
    example.main([*flags, "--output_dir", str(tmp_path / "whole")])
    command = [
        sys.executable,
        str(EXAMPLES / "finetune_text_to_image.py"),
        *flags,
        "--output_dir",
        str(tmp_path / "killed"),
    ]
    process = subprocess.Popen(
        command, env=os.environ | {"OMP_NUM_THREADS": "1"}, stderr=subprocess.DEVNULL
    )
    deadline = time.monotonic() + 120
    # an epoch has three steps: it is inside one
    while not (tmp_path / "killed" / "checkpoint-0000004.pt").is_file():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "killed" / "unet").exists(), "it had finished before it was killed"
    example.main(
        [*flags, "--output_dir", str(tmp_path / "killed"), "--resume_from_checkpoint", "latest"]
    )
    assert losses(tmp_path / "killed") == losses(tmp_path / "whole")
    rates = [
        json.loads(line)["lr"]
        for line in (tmp_path / "killed" / "losses.jsonl").read_text().splitlines()
    ]
    # three steps of warm-up
    assert rates == pytest.approx([0.0, 1e-3 / 3, 2e-3 / 3, 1e-3, 1e-3, 1e-3, 1e-3])
    assert len(losses(tmp_path / "whole")) == 7
    unets = [
        diffusers.UNet2DConditionModel.from_pretrained(
            tmp_path / name, subfolder="unet"
        ).state_dict()
        for name in ("whole", "killed")
    ]
    assert all(torch.equal(value, unets[1][name]) for name, value in unets[0].items())
    kept = sorted(path.name for path in (tmp_path / "killed").glob("checkpoint-*"))
    assert kept == ["checkpoint-0000006.pt", "checkpoint-0000007.pt"]


def test_lora_loads_into_the_pipeline_with_its_scheduler(
    given: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("peft")
    flags = [
        "--max_train_steps",
        "2",
        "--rank",
        "2",
        "--snr_gamma",
        "5",
        "--loss_weight_floor",
        "0.05",
    ]
    flags += ["--mixed_precision", "bf16", "--gradient_checkpointing"]
    # torch's own attention on the CPU asks for AVX-512 in bf16 where ATEN_CPU_CAPABILITY forbids it
    with sdpa_kernel(SDPBackend.MATH):
        load("finetune_text_to_image").main(
            [*given, *V_ZERO_SNR, *SHORT, *flags, "--output_dir", str(tmp_path)]
        )
    pipeline = diffusers.DiffusionPipeline.from_pretrained(given[1])
    before = pipeline.unet(torch.ones(1, 4, 8, 8), 5, torch.ones(1, 16, 32)).sample
    named: dict[str, Any] = {}
    # the call that is printed, as it stands
    exec(capsys.readouterr().out.split("beside it.\n")[1], named)
    pipeline = named["pipeline"]
    after = pipeline.unet(torch.ones(1, 4, 8, 8), 5, torch.ones(1, 16, 32)).sample
    assert not torch.equal(before, after)
    assert pipeline.scheduler.alphas_cumprod[-1] == 0
    assert pipeline.scheduler.config["prediction_type"] == "v_prediction"
    assert not (tmp_path / "unet").exists()


def test_a_lora_file_says_its_schedule_and_keeps_its_weights(
    given: list[str], tmp_path: Path
) -> None:
    pytest.importorskip("peft")
    flags = ["--max_train_steps", "1", "--rank", "2", "--output_dir", str(tmp_path)]
    load("finetune_text_to_image").main([*given, *V_ZERO_SNR, *SHORT, *flags])
    header = read_header(tmp_path / "pytorch_lora_weights.safetensors")
    assert (
        header.metadata["modelspec.prediction_type"] == "v"
        and header.metadata["ss_zero_terminal_snr"] == "True"
    )
    schedule = NoiseSchedule.from_config(json.loads(header.metadata["alphabar.noise_schedule"]))
    assert schedule == NoiseSchedule.from_pretrained(tmp_path, subfolder="scheduler")
    # no tensor that a loader of LoRA would not know
    assert all(".lora" in name for name in header.tensors)


def test_a_folder_that_holds_a_run_is_refused(
    given: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    example = load("finetune_text_to_image")
    flags = [*given, *SHORT, "--checkpointing_steps", "2", "--output_dir", str(tmp_path)]
    example.main([*flags, *V_ZERO_SNR, "--max_train_steps", "6"])
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with monkeypatch.context() as patch:
        patch.setattr(example, "TextToImage", None)  # before any model is loaded
        for more, words in [
            (
                [],
                "holds a run already .checkpoint-0000004.pt, .*--resume_from_checkpoint latest, "
                ".*--overwrite_output_dir",
            ),
            (["--resume_from_checkpoint", given[1] + "/model_index.json"], "holds a run already"),
            (["--overwrite_output_dir", "--resume_from_checkpoint", "latest"], "give one of them"),
        ]:
            with pytest.raises(ValueError, match=words):
                example.main([*flags, "--max_train_steps", "4", *more])
        with pytest.raises(ValueError, match="is the pipeline that is trained from"):
            example.main([*given, *SHORT, "--output_dir", given[1], "--overwrite_output_dir"])
    assert before == {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    # to be replaced: the run's own checkpoints are kept, though the old ones had higher numbers
    AcceleratorState._reset_state(reset_partial_state=True)
    example.main([*flags, "--max_train_steps", "4", "--overwrite_output_dir"])
    assert (
        names_of(tmp_path) == ["checkpoint-0000002.pt", "checkpoint-0000004.pt"]
        and len(losses(tmp_path)) == 4
    )
    assert (
        NoiseSchedule.from_pretrained(tmp_path, subfolder="scheduler").prediction.name == "epsilon"
    )
    # gone on with, from its last checkpoint and from an earlier one
    first = losses(tmp_path)
    capsys.readouterr()
    AcceleratorState._reset_state(reset_partial_state=True)
    example.main([*flags, "--max_train_steps", "6", "--resume_from_checkpoint", "latest"])
    assert losses(tmp_path)[:4] == first and len(losses(tmp_path)) == 6
    assert "checkpoint-0000004.pt' at step 4" in capsys.readouterr().out
    whole = losses(tmp_path)
    AcceleratorState._reset_state(reset_partial_state=True)
    earlier = str(tmp_path / "checkpoint-0000004.pt")
    example.main([*flags, "--max_train_steps", "5", "--resume_from_checkpoint", earlier])
    assert losses(tmp_path) == whole[:5]
    assert names_of(tmp_path) == ["checkpoint-0000004.pt", "checkpoint-0000005.pt"]
    assert (tmp_path / "replaced-0000006.pt").is_file()  # of the run that was left
    assert "set aside: replaced-0000006.pt" in capsys.readouterr().out


def test_latest_says_when_it_finds_nothing(
    given: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    example = load("finetune_text_to_image")
    # killed before its first checkpoint
    (tmp_path / "losses.jsonl").write_text('{"step": 1, "loss": 9.0, "lr": 0.0}\n{"st')
    flags = [*given, *SHORT, "--max_train_steps", "1", "--resume_from_checkpoint", "latest"]
    example.main([*flags, "--output_dir", str(tmp_path)])
    assert (
        f"no checkpoint in {str(tmp_path)!r}: training begins at step 0" in capsys.readouterr().out
    )
    assert len(losses(tmp_path)) == 1 and losses(tmp_path) != [9.0]
    (tmp_path / "checkpoint-0000001.pt").unlink()
    # its result, and nothing to go on from
    with pytest.raises(ValueError, match="holds a run already"):
        example.main([*flags, "--output_dir", str(tmp_path)])


def test_another_schedule_is_not_resumed(given: list[str], tmp_path: Path) -> None:
    example = load("finetune_text_to_image")
    flags = [*given, *SHORT, "--max_train_steps", "1", "--output_dir", str(tmp_path)]
    example.main([*flags, *V_ZERO_SNR])
    with pytest.raises(ValueError, match="give the flags of that run"):
        example.main([*flags, "--resume_from_checkpoint", "latest"])


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--rescale_betas_zero_snr"], "ill-posed"),  # the pipeline predicts epsilon
        (["--snr_gamma", "0"], "snr gamma must be positive"),
        (["--validation_sampler", "dpm2m"], "did you mean"),
        (["--flow_shift", "3", "--rescale_betas_zero_snr"], "does not go with --flow_shift"),
        (["--resume_from_checkpoint", "nowhere.pt"], "no checkpoint at 'nowhere.pt'"),
        (["--train_batch_size", "0"], "--train_batch_size must be at least 1, got 0"),
        (["--dataset_name", "twice"], "give one of"),
    ],
)
def test_bad_flags_end_it_before_any_model_is_loaded(
    given: list[str], tmp_path: Path, flags: list[str], words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    example = load("finetune_text_to_image")
    monkeypatch.setattr(example, "TextToImage", None)
    monkeypatch.setattr(example, "Captioned", None)
    with pytest.raises((ValueError, OSError), match=words):
        example.main([*given, *flags, "--output_dir", str(tmp_path)])
