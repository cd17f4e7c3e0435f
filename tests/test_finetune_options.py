"""The fine-tuning example's families, data, optimizer, trackers and hub, on tiny pipelines."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from PIL import Image

from alphabar.noising import NoiseSchedule
from test_examples import V_ZERO_SNR, load
from test_finetune import losses
from tiny_pipeline import make_images, make_pipeline, make_pipeline_sd3, make_pipeline_xl
from two_processes import last_words, run_two_ranks

SHORT = ["--resolution", "16", "--learning_rate", "1e-3", "--lr_warmup_steps", "0"]


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[str]]:
    """The flags that name a pipeline of each family, and the images."""
    folder = tmp_path_factory.mktemp("given")
    images = ["--train_data_dir", str(make_images(folder / "images")), *SHORT]
    makers = {"sd": make_pipeline, "xl": make_pipeline_xl, "sd3": make_pipeline_sd3}
    return {
        name: ["--pretrained_model_name_or_path", str(make(folder / name)), *images]
        for name, make in makers.items()
    }


@pytest.fixture(autouse=True)
def as_in_a_new_process() -> None:
    AcceleratorState._reset_state(reset_partial_state=True)


def run(*flags: Any) -> Path:
    AcceleratorState._reset_state(reset_partial_state=True)
    return load("finetune_text_to_image").main([str(flag) for flag in flags])


def printed_pipeline(out: str) -> Any:
    """What the call that is printed loads."""
    named: dict[str, Any] = {}
    exec(out[out.index("from diffusers import") :], named)
    return named["pipeline"]


def test_xl_from_epsilon_to_v(given: dict[str, list[str]], tmp_path: Path, capsys: Any) -> None:
    flags = ["--max_train_steps", "2", "--train_batch_size", "2", "--gradient_checkpointing"]
    flags += ["--use_ema"]
    run(*given["xl"], *V_ZERO_SNR, *flags, "--output_dir", tmp_path)
    pipeline = printed_pipeline(capsys.readouterr().out)
    assert isinstance(pipeline, diffusers.StableDiffusionXLPipeline)
    assert pipeline.scheduler.alphas_cumprod[-1] == 0
    before = diffusers.UNet2DConditionModel.from_pretrained(given["xl"][1], subfolder="unet")
    now = pipeline.unet.state_dict()
    # the text's time embedding too: the sizes and the pooled text reach the loss
    name = "add_embedding.linear_1.weight"
    assert not torch.equal(now[name], before.state_dict()[name])
    # the average is what is saved
    saved = torch.load(tmp_path / "checkpoint-0000002.pt", weights_only=True)
    name = "denoiser.network.conv_out.weight"
    assert torch.equal(
        now["conv_out.weight"], saved["state"]["average"]["averages"][0]["weights"][name]
    )
    assert not torch.equal(now["conv_out.weight"], saved["objective"][name])
    card = (tmp_path / "README.md").read_text()
    assert "| prediction type | v_prediction |" in card and "zsnr=True" in card
    assert "| diffusers | DDIMScheduler(" in card


def test_lora_of_a_flow_with_pictures_in_tensorboard_and_the_hub(
    given: dict[str, list[str]], tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: dict[str, dict[str, Any]] = {}
    example = load("finetune_text_to_image")

    def create_repo(name: str, **options: Any) -> Any:
        calls["create"] = {"name": name, **options}
        return SimpleNamespace(repo_id=f"me/{name}")

    def upload_folder(**options: Any) -> None:
        files = [path for path in Path(options["folder_path"]).rglob("*") if path.is_file()]
        calls["upload"] = {"files": {path.name for path in files}, **options}

    monkeypatch.setattr(example.huggingface_hub, "create_repo", create_repo)
    monkeypatch.setattr(example.huggingface_hub, "upload_folder", upload_folder)
    out = tmp_path / "mine"
    flags = ["--rank", "2", "--lora_alpha", "6", "--lora_layers", "attn.to_q,attn.to_k", "--max_train_steps", "2"]  # fmt: skip
    flags += ["--validation_prompts", "a red square", "--num_inference_steps", "2"]
    flags += ["--report_to", "tensorboard", "--push_to_hub", "--hub_token", "hf_secret"]
    run(*given["sd3"], *flags, "--hub_private_repo", "--output_dir", out)
    said = capsys.readouterr().out
    assert "a LoRA of rank 2 in the transformer" in said and "LogitNormalTimesteps" in said
    assert "uploaded to https://huggingface.co/me/mine" in said and "hf_secret" not in said
    pipeline = printed_pipeline(said)
    config = pipeline.transformer.peft_config["default_0"]
    assert config.lora_alpha == 6 and config.target_modules == {"attn.to_q", "attn.to_k"}
    assert NoiseSchedule.from_pretrained(out, subfolder="scheduler") == NoiseSchedule.flow(shift=3)

    assert calls["create"] == {"name": "mine", "exist_ok": True, "private": True, "token": "hf_secret"}  # fmt: skip
    upload = calls["upload"]
    assert upload["repo_id"] == "me/mine" and "checkpoint-*" in upload["ignore_patterns"]
    assert {"README.md", "pytorch_lora_weights.safetensors"} <= upload["files"]
    card = (out / "README.md").read_text()
    assert 'pipeline.load_lora_weights("me/mine")' in card and '"lora"' in card
    assert "ModelSamplingSD3(shift=3)" in card and "previews/step_00000002.png" in card

    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(out / "finetune_text_to_image"), {"images": 0})
    events.Reload()
    assert events.Tags()["images"] and "train_loss" in events.Tags()["scalars"]
    written = [path for path in out.rglob("*") if path.is_file()]
    assert not any(b"hf_secret" in path.read_bytes() for path in written)


def test_a_resumed_stream_goes_on_to_the_same_losses(
    given: dict[str, list[str]], tmp_path: Path
) -> None:
    flags = [*given["sd"], "--streaming", "--shuffle_buffer_size", "4", "--train_batch_size", "2"]
    flags += ["--max_train_samples", "7", "--rank", "2", "--lora_dropout", "0.2"]
    flags += ["--proportion_empty_prompts", "0.3", "--random_flip"]
    whole = run(*flags, "--max_train_steps", "5", "--output_dir", tmp_path / "whole")
    run(*flags, "--max_train_steps", "2", "--output_dir", tmp_path / "half")
    for name in ("pytorch_lora_weights.safetensors", "README.md"):
        (tmp_path / "half" / name).unlink()
    more = ["--max_train_steps", "5", "--resume_from_checkpoint", "latest"]
    half = run(*flags, *more, "--output_dir", tmp_path / "half")
    assert losses(half) == losses(whole) and len(losses(whole)) == 5


def test_accumulated_batches_train_as_one(given: dict[str, list[str]], tmp_path: Path) -> None:
    flags = [
        *given["sd"],
        "--rank",
        "1",
        "--max_train_steps",
        "2",
        "--timestep_density",
        "stratified",
    ]
    one = run(*flags, "--train_batch_size", "4", "--output_dir", tmp_path / "one")
    more = ["--train_batch_size", "2", "--gradient_accumulation_steps", "2"]
    accumulated = run(*flags, *more, "--output_dir", tmp_path / "more")
    assert losses(accumulated) == pytest.approx(losses(one), rel=1e-4)


def test_every_image_is_seen_once_an_epoch_and_samples_are_limited(
    given: dict[str, list[str]], tmp_path: Path
) -> None:
    example = load("finetune_text_to_image")
    args = example.parse([*given["sd"], "--max_train_samples", "7", "--output_dir", str(tmp_path)])
    data = example.Captioned(args)
    epochs = [[data.order[7 * epoch + i][1] for i in range(7)] for epoch in range(2)]
    assert [sorted(epoch) for epoch in epochs] == [list(range(7))] * 2 and epochs[0] != epochs[1]
    assert len({data.rows[i]["image"].tobytes() for i in range(7)}) == 7
    # two epochs of 7 images in steps of 4
    flags = ["--max_train_samples", "7", "--num_train_epochs", "2", "--train_batch_size", "4"]
    out = run(*given["sd"], *flags, "--rank", "1", "--output_dir", tmp_path)
    assert len(losses(out)) == 4


def test_one_of_several_captions_is_drawn_and_some_are_left_empty(
    given: dict[str, list[str]], tmp_path: Path
) -> None:
    example = load("finetune_text_to_image")
    flags = ["--proportion_empty_prompts", "0.25", "--output_dir", str(tmp_path)]
    data = example.Captioned(example.parse([*given["sd"], *flags]))
    row = dict(data.rows[0]) | {"text": ["one", "two"]}
    drawn = [data.prepared(position, row)["caption"] for position in range(200)]
    share = {caption: drawn.count(caption) / 200 for caption in ("", "one", "two")}
    assert share == pytest.approx({"": 0.25, "one": 0.375, "two": 0.375}, abs=0.1)
    assert drawn == [data.prepared(position, row)["caption"] for position in range(200)]


def test_adam_gets_its_options_and_eight_bits_need_bitsandbytes(
    given: dict[str, list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flags = ["--use_8bit_adam", "--adam_beta1", "0.8", "--adam_beta2", "0.95", "--adam_weight_decay", "0.3"]  # fmt: skip
    flags += ["--adam_epsilon", "1e-6", "--scale_lr", "--train_batch_size", "2"]
    flags += ["--max_train_steps", "1", "--rank", "1", "--output_dir", str(tmp_path)]
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with monkeypatch.context() as patch:
        example = load("finetune_text_to_image")
        patch.setattr(example, "TextToImage", None)  # before any model is loaded
        with pytest.raises(ImportError, match="--use_8bit_adam needs bitsandbytes: pip install"):
            example.main([*given["sd"], *flags])
    made: list[dict[str, Any]] = []

    class AdamW8bit(torch.optim.AdamW):
        def __init__(self, groups: Any, **options: Any) -> None:
            made.append(options)
            super().__init__(groups, **options)

    stand_in = SimpleNamespace(optim=SimpleNamespace(AdamW8bit=AdamW8bit))
    monkeypatch.setitem(sys.modules, "bitsandbytes", stand_in)
    run(*given["sd"], *flags)
    assert made == [{"lr": 2e-3, "betas": (0.8, 0.95), "weight_decay": 0.3, "eps": 1e-6}]


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--streaming"], "--streaming needs --max_train_steps"),
        (
            ["--streaming", "--max_train_steps", "2", "--dataloader_num_workers", "2"],
            "give --dataloader_num_workers 0 or 1",
        ),
        (["--lora_alpha", "4"], "need --rank"),
        (["--num_train_epochs", "0"], "--num_train_epochs must be at least 1, got 0"),
        (["--proportion_empty_prompts", "1.5"], "must lie in 0 ... 1"),
    ],
)
def test_contradictions_end_it_before_any_model_is_loaded(
    given: dict[str, list[str]], tmp_path: Path, flags: list[str], words: str
) -> None:
    example = load("finetune_text_to_image")
    example.TextToImage = example.Captioned = None
    with pytest.raises(ValueError, match=words):
        example.main([*given["sd"], *flags, "--output_dir", str(tmp_path)])


def test_a_batch_of_another_size_is_not_resumed(
    given: dict[str, list[str]], tmp_path: Path
) -> None:
    flags = [*given["sd"], "--rank", "1", "--max_train_steps", "1", "--output_dir", tmp_path]
    run(*flags, "--train_batch_size", "2")
    resumed = ["--train_batch_size", "4", "--resume_from_checkpoint", "latest"]
    with pytest.raises(ValueError, match=r"images in a step=2, and this run .* images in a step=4"):
        run(*flags, *resumed)
    with pytest.raises(ValueError, match=r"seeds=\[0, 0\].* and this run .*seeds=\[7, 7\]"):
        run(*flags, "--train_batch_size", "2", *resumed[2:], "--seed", "7")


@pytest.mark.slow
def test_two_processes_train_as_one(given: dict[str, list[str]], tmp_path: Path) -> None:
    flags = [*given["sd"], "--rank", "2", "--max_train_steps", "3", "--random_flip"]
    flags += ["--proportion_empty_prompts", "0.3", "--use_ema"]
    flags += ["--validation_prompts", "a red square", "a blue square", "--num_inference_steps", "2"]
    one = run(*flags, "--train_batch_size", "4", "--output_dir", tmp_path / "one")
    script = Path(__file__).with_name("finetune_two_ranks.py")
    codes = run_two_ranks(script, tmp_path, *flags, "--train_batch_size", "2")
    assert codes == [0, 0], last_words(tmp_path)
    assert losses(tmp_path / "two") == pytest.approx(losses(one), rel=1e-4)
    drawn = [
        np.asarray(Image.open(folder / "previews" / "step_00000003_ema.png"), dtype=int)
        for folder in (one, tmp_path / "two")
    ]
    assert np.abs(drawn[0] - drawn[1]).max() <= 2  # the same prompts from the same seeds
