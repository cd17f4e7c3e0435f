"""What ValidationSampling can be asked for: triggers, prompts, classes, seeds, averages, decoders,
pipelines, time, memory.
"""

import json
import math
import os
import resource
import signal
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, DDPMPipeline, UNet2DModel
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint, WeightAveraging
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_avg_fn

from alphabar.callbacks import ValidationSampling
from alphabar.callbacks.previews import callback as validation_sampling
from alphabar.noising import NoiseSchedule
from alphabar.sampling import Sampler
from alphabar.sampling.inference import SeededNoise
from alphabar.training.images import to_pixels
from alphabar.training.previews import preview as previewing
from alphabar.training.previews import rounds
from alphabar.training.previews.diffusers_pipelines import pipeline_steps, scheduler_of
from alphabar.training.previews.render import Drawing, in_slices
from alphabar.training.previews.rounds import Rounds
from alphabar.training.publishing import publisher
from callbacks_toy import (
    SCHEDULE,
    SHAPE,
    Averages,
    Toy,
    fresh,
    grids,
    loader,
    one_thread,
    train,
    trainer,
    weights,
)

pytestmark = pytest.mark.filterwarnings("ignore::Warning:lightning", "ignore::Warning:tensorboard")


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    with one_thread():
        yield


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Toy:
    return train(tmp_path_factory.mktemp("reference"))


@pytest.fixture
def published(monkeypatch: Any) -> list[Any]:
    """Every preview that is published."""
    seen: list[Any] = []
    publish = publisher.publish

    def record(preview: Any, *arguments: Any) -> list[Any]:
        seen.append(preview)
        return publish(preview, *arguments)

    monkeypatch.setattr(publisher, "publish", record)
    return seen


def previews(**settings: Any) -> ValidationSampling:
    common: Any = {"steps": 2, "num_images": 3, "batch_size": 2, "on_error": "raise"}
    return ValidationSampling("euler", **{**common, **settings})


def steps_of(published: list[Any]) -> list[int]:
    return [preview.step for preview in published]


# When


@pytest.mark.parametrize(
    ("settings", "fit", "steps"),
    [
        ({"every_n_train_steps": 5, "extra_steps": (0, 1, 7)}, {}, [0, 1, 5, 7, 10]),
        ({"every_n_train_steps": 5, "at_end": True}, {}, [5, 10, 12]),
        ({"every_n_train_steps": 6, "at_end": True}, {}, [6, 12]),
        ({"every_n_train_steps": 100, "at_end": True}, {"max_steps": 8}, [8]),
        ({"every_n_train_steps": 100, "at_end": True}, {"limit_train_batches": 2}, [4]),
        ({}, {"limit_train_batches": 0}, []),
        ({}, {"barebones": True, "logger": None, "enable_checkpointing": None}, []),
        ({"train_time_interval": timedelta(seconds=2.5)}, {}, [3, 6, 9, 12]),
        (
            {"train_time_interval": timedelta(hours=1), "extra_steps": [2]},
            {"accumulate_grad_batches": 2},
            [2],
        ),
    ],
)
def test_when(
    tmp_path: Path,
    published: list[Any],
    reference: Toy,
    monkeypatch: Any,
    settings: Any,
    fit: Any,
    steps: Any,
) -> None:
    # a second passes at each look, and one look is for the start and for each preview
    seconds = iter(range(1000))
    monkeypatch.setattr(
        validation_sampling, "time", SimpleNamespace(monotonic=lambda: float(next(seconds)))
    )
    module = train(tmp_path, previews(**settings), **fit)
    assert steps_of(published) == steps
    if fit == {}:
        assert module.losses == reference.losses and weights(module) == weights(reference)


def test_an_early_stop_is_an_end(tmp_path: Path, published: list[Any]) -> None:
    class Stop(Callback):
        def on_train_batch_end(
            self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
        ) -> None:
            trainer.should_stop = trainer.global_step == 4

    train(tmp_path, previews(every_n_train_steps=100, at_end=True), Stop())
    assert steps_of(published) == [4]


def test_a_resumed_run_does_not_repeat_the_last_preview(
    tmp_path: Path, published: list[Any]
) -> None:
    save = ModelCheckpoint(tmp_path, filename="{step}", save_top_k=-1)
    settings: Any = {"every_n_train_steps": 4, "at_end": True, "extra_steps": (0,)}
    train(tmp_path, previews(**settings), save, enable_checkpointing=True)
    assert steps_of(published) == [0, 4, 8, 12]
    train(
        tmp_path,
        previews(**settings),
        enable_checkpointing=True,
        ckpt_path=tmp_path / "step=12.ckpt",
        max_epochs=3,
    )
    assert steps_of(published) == [0, 4, 8, 12, 16, 18]


# What


def test_seeds_of_each_image(tmp_path: Path, published: list[Any]) -> None:
    module = train(tmp_path, previews(num_images=None, seeds=[7, 1, 7]), max_epochs=1).eval()
    expected = to_pixels(
        Sampler(SCHEDULE, "euler", 2)(module.predict, (3, *SHAPE), seeds=[7, 1, 7])
    )
    assert torch.equal(published[0].images, expected) and published[0].seeds == (7, 1, 7)
    assert torch.equal(published[0].images[0], published[0].images[2])


class Encoder(nn.Module):
    """Texts to numbers; careless with the global generator, and in eval mode when it is used."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[list[str]] = []

    def forward(self, texts: list[str]) -> dict[str, Any]:
        assert not self.training and not torch.is_grad_enabled()
        torch.rand(3)
        self.calls.append(texts)
        return {"label": torch.tensor([float(len(text)) for text in texts])}


def test_prompts_are_encoded_once_and_taken_in_turn(
    tmp_path: Path, published: list[Any], reference: Toy
) -> None:
    encode = Encoder()
    settings: Any = {
        "prompts": ["a", "bcd"],
        "negative_prompt": "efghi",
        "guidance_scale": 2.0,
        "encode": encode,
    }
    module = train(tmp_path, previews(num_images=4, **settings))
    assert encode.calls == [["a", "bcd", "efghi"]] and encode.training
    assert module.losses == reference.losses
    drawn = []
    for images in ([0, 1], [2, 3]):
        conditioning, empty = (
            {"label": torch.tensor([1.0, 3.0])},
            {"label": torch.tensor([5.0, 5.0])},
        )
        arguments: Any = {
            "conditioning": conditioning,
            "unconditional": empty,
            "guidance_scale": 2.0,
        }
        drawn.append(
            Sampler(SCHEDULE, "euler", 2)(
                module.eval().predict, (2, *SHAPE), seeds=images, **arguments
            )
        )
    assert torch.equal(published[-1].images, to_pixels(torch.cat(drawn)))
    assert (
        published[-1].captions == ("a", "bcd", "a", "bcd") and published[-1].guidance_scale == 2.0
    )


def test_classes_go_to_the_argument_named(tmp_path: Path, published: list[Any]) -> None:
    settings: Any = {
        "classes": [2, 0],
        "class_key": "label",
        "null_class": 9,
        "guidance_scale": 3.0,
    }
    module = train(tmp_path, previews(num_images=2, **settings), max_epochs=1).eval()
    conditioning, empty = {"label": torch.tensor([2, 0])}, {"label": torch.tensor([9, 9])}
    arguments: Any = {"conditioning": conditioning, "unconditional": empty, "guidance_scale": 3.0}
    drawn = Sampler(SCHEDULE, "euler", 2)(module.predict, (2, *SHAPE), seeds=[0, 1], **arguments)
    assert torch.equal(published[0].images, to_pixels(drawn))
    assert published[0].captions == ("label 2", "label 0")


def test_what_encode_raises_is_raised_before_training(tmp_path: Path) -> None:
    def broken(texts: list[str]) -> dict[str, Any]:
        raise KeyError("no tokenizer")

    module = fresh()
    for on_error in ("warn", "raise"):
        with pytest.raises(KeyError, match="no tokenizer"):
            train(
                tmp_path, previews(prompts=["a"], encode=broken, on_error=on_error), module=module
            )
    with pytest.raises(ValueError, match=r"a row for each of 2 texts .*, got shape .7, 1."):
        train(
            tmp_path,
            previews(prompts=["a"], encode=lambda texts: {"y": torch.zeros(7, 1)}),
            module=module,
        )
    assert module.losses == []


def test_the_label_says_what_was_drawn(tmp_path: Path, published: list[Any]) -> None:
    train(tmp_path, previews(), max_epochs=1)
    shown = published[0]
    assert (shown.step, shown.epoch, shown.weights, shown.sampler, shown.steps) == (
        6,
        0,
        "raw",
        "euler",
        2,
    )
    assert shown.fingerprint == SCHEDULE.fingerprint and 0 < shown.seconds < 60 and shown.note == ""
    assert (
        shown.images.dtype == torch.uint8
        and shown.images.shape == (3, *SHAPE)
        and shown.captions == ("", "", "")
    )


# Averaged weights


@pytest.mark.parametrize("weights_of", ["ema", "both"])
def test_averages_draw_and_training_does_not_notice(
    tmp_path: Path, published: list[Any], reference: Toy, weights_of: str
) -> None:
    averages = Averages()
    module = train(tmp_path, averages, previews(weights=weights_of, every_n_train_steps=4))
    assert module.losses == reference.losses and weights(module) == weights(reference)
    kinds = ["ema"] if weights_of == "ema" else ["raw", "ema"]
    assert [(p.step, p.weights) for p in published] == [
        (step, kind) for step in (4, 8, 12) for kind in kinds
    ]
    with torch.no_grad():
        for weight, average in zip(module.parameters(), averages.averages, strict=True):
            weight.copy_(average)
    drawn = [
        Sampler(SCHEDULE, "euler", 2)(module.eval().predict, (2, *SHAPE), seeds=seeds)
        for seeds in ([0, 1], [2, 2])
    ]
    assert torch.equal(published[-1].images, to_pixels(torch.cat(drawn)[:3]))


def test_averages_of_lightning_and_none_yet(tmp_path: Path, published: list[Any]) -> None:
    class Late(WeightAveraging):
        def should_update(self, step_idx: Any = None, epoch_idx: Any = None) -> bool:
            return step_idx is not None and step_idx >= 6

    both = previews(weights="both", every_n_train_steps=4, folder=tmp_path / "b")
    ema = previews(weights="ema", every_n_train_steps=4, folder=tmp_path / "a")
    train(tmp_path, Late(avg_fn=get_ema_avg_fn(0.9)), ema, both)
    note = "there are no EMA weights yet: drawn with the raw ones"
    of_ema, of_both = [p for p in published if p.note], [p for p in published if not p.note]
    assert [(p.step, p.weights, p.note) for p in of_ema] == [(4, "raw", note)]
    assert sorted((p.step, p.weights) for p in of_both) == sorted(
        [(4, "raw"), *[(step, kind) for step in (8, 12) for kind in ("ema", "ema", "raw")]]
    )


def test_averages_are_given_back_when_a_preview_fails(tmp_path: Path, reference: Toy) -> None:
    def broken(x: Tensor, t: Tensor) -> Tensor:
        if len(x) > 1:  # and not in the trial
            raise RuntimeError("no")
        return x

    with pytest.warns(UserWarning, match="RuntimeError: no"):
        module = train(
            tmp_path, Averages(), previews(weights="ema", predict=broken, on_error="warn")
        )
    assert module.losses == reference.losses and weights(module) == weights(reference)


# Latents


def test_latents_are_decoded_in_slices(tmp_path: Path, published: list[Any]) -> None:
    sizes: list[int] = []

    def decode(z: Tensor) -> Tensor:
        sizes.append(len(z))
        return z.repeat_interleave(2, -1).repeat_interleave(2, -2)

    module = train(
        tmp_path, previews(decode=decode, batch_size=3, decode_batch_size=2), max_epochs=1
    ).eval()
    assert sizes == [1, 2, 1]  # the trial, and slices of two
    drawn = Sampler(SCHEDULE, "euler", 2)(module.predict, (3, *SHAPE), seeds=[0, 1, 2])
    assert torch.equal(
        published[0].images, to_pixels(drawn).repeat_interleave(2, -1).repeat_interleave(2, -2)
    )


def test_a_diffusers_vae_is_scaled_as_in_its_pipelines() -> None:
    torch.manual_seed(0)
    vae = AutoencoderKL(
        block_out_channels=(4,), norm_num_groups=2, latent_channels=4, scaling_factor=0.2
    )
    vae.register_to_config(shift_factor=0.5)
    z = torch.randn(2, 4, 4, 4)
    with torch.no_grad():
        expected = torch.cat([vae.decode(part / 0.2 + 0.5).sample for part in z.split(1)])
        torch.testing.assert_close(in_slices(vae, 1)(z), expected, rtol=0, atol=0)


SMALL: dict[str, Any] = {"dim_mult": [1, 1], "num_res_blocks": 1, "temperal_downsample": [False]}


@pytest.mark.parametrize("name", ["Wan", "QwenImage", "LTXVideo"])
def test_latents_of_a_vae_with_means_are_those_of_its_pipeline(name: str) -> None:
    torch.manual_seed(0)
    made: Any = getattr(diffusers, f"AutoencoderKL{name}")
    if name == "LTXVideo":
        widths, layers = (8, 8, 8, 8), (1, 1, 1, 1, 1)
        vae = made(
            latent_channels=8, block_out_channels=widths, decoder_block_out_channels=widths,
            layers_per_block=layers, decoder_layers_per_block=layers, patch_size=1, scaling_factor=0.5,
        )  # fmt: skip
        vae.latents_mean.copy_(torch.randn(8))
        vae.latents_std.copy_(torch.rand(8) + 1)
    else:
        vae = made(base_dim=4, **SMALL)
    z = torch.randn(2, vae.config.get("z_dim", 8), 2, 4, 4)
    if name == "LTXVideo":
        scaled = diffusers.LTXPipeline._denormalize_latents(
            z, vae.latents_mean, vae.latents_std, 0.5
        )
    else:  # as in pipeline_wan.py and pipeline_qwenimage.py
        mean, std = (
            torch.tensor(vae.config[key]).view(1, -1, 1, 1, 1)
            for key in ("latents_mean", "latents_std")
        )
        scaled = z * std + mean
    with torch.no_grad():
        expected = vae.decode(scaled).sample
        torch.testing.assert_close(in_slices(vae.eval(), 1)(z), expected, rtol=1e-4, atol=1e-5)


# Pipelines


class WithUNet(Toy):
    def __init__(self) -> None:
        super().__init__()
        blocks: Any = {"down_block_types": ("DownBlock2D",), "up_block_types": ("UpBlock2D",)}
        self.unet = UNet2DModel(
            sample_size=8,
            block_out_channels=(8,),
            norm_num_groups=2,
            layers_per_block=1,
            dropout=0.3,
            **blocks,
        )

    def predict(self, x: Tensor, timesteps: Tensor, **conditioning: Any) -> Tensor:
        return self.unet(x, timesteps).sample


def test_a_pipeline_draws_what_the_sampler_does(
    tmp_path: Path, published: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both on the training schedule, though the pipeline's own scheduler says otherwise; from the
    same noise, which a pipeline draws from torch's generators."""

    def noise_of_seeds(shape: Any, generator: Any = None, **_: Any) -> Tensor:
        return SeededNoise(
            tuple(shape), [g.initial_seed() for g in generator], torch.device("cpu")
        )()

    monkeypatch.setattr("diffusers.pipelines.ddpm.pipeline_ddpm.randn_tensor", noise_of_seeds)
    theirs = DDIMScheduler(prediction_type="epsilon", clip_sample=True)
    before = dict(vars(theirs))
    made: list[Any] = []

    def pipeline(module: Any) -> Any:
        made.append(DDPMPipeline(module.unet, theirs))
        return made[0]

    common: Any = {
        "steps": 4,
        "num_images": 3,
        "batch_size": 2,
        "every_n_train_steps": 3,
        "on_error": "raise",
    }
    whole = ValidationSampling("ddim", pipeline=pipeline, folder=tmp_path / "whole", **common)
    network = ValidationSampling("ddim", folder=tmp_path / "network", **common)
    plain = train(tmp_path / "none", module=fresh(WithUNet), max_epochs=1)
    module = train(tmp_path, whole, network, module=fresh(WithUNet), max_epochs=1)
    assert module.losses == plain.losses and weights(module) == weights(plain)
    assert [p.sampler for p in published] == ["DDIMScheduler", "ddim"] * 2
    for a, b in zip(published[::2], published[1::2], strict=True):
        assert (a.images.int() - b.images.int()).abs().max() <= 1  # diffusers' own arithmetic
        assert a.images.float().std() > 10
    assert len(made) == 1 and made[0].scheduler is theirs and vars(theirs) == before
    assert not hasattr(made[0], "_progress_bar_config")


def test_a_pipeline_takes_conditioning_and_guidance() -> None:
    calls: list[Any] = []

    class Pipeline:
        scheduler = None

        def __call__(
            self,
            prompt: Any,
            generator: Any,
            num_inference_steps: int,
            guidance_scale: float,
            output_type: str,
            **rest: Any,
        ) -> Any:
            calls.append(
                (
                    prompt,
                    [g.initial_seed() for g in generator],
                    num_inference_steps,
                    guidance_scale,
                    rest,
                )
            )
            assert type(self.scheduler).__name__ == "UniPCMultistepScheduler"
            assert dict(self.scheduler.config)["prediction_type"] == "v_prediction"
            return SimpleNamespace(images=np.full((2, 4, 4, 3), 0.25))

    drawing = Drawing(
        4, seed=3, conditioning={"size": torch.arange(4)}, unconditional={"size": torch.zeros(1)}
    )
    arguments: Any = {"prompts": ("a", "b", "c"), "negative_prompt": "n", "guidance_scale": 5.0}
    pipeline = Pipeline()
    (painted,) = pipeline_steps(
        pipeline,
        drawing,
        Sampler(SCHEDULE, "unipc", 7),
        [2, 3],
        context=lambda: torch.no_grad(),
        **arguments,
    )
    assert painted is not None and painted.pixels.unique().tolist() == [64]
    ((prompt, seeds, steps, guidance, rest),) = calls
    assert (prompt, seeds, steps, guidance) == (
        ["c", "a"],
        [5, 6],
        7,
        5.0,
    ) and pipeline.scheduler is None
    assert rest["size"].tolist() == [2, 3] and rest["negative_size"].tolist() == [0, 0]


def test_pipelines_that_do_not_show_the_model_are_refused(tmp_path: Path) -> None:
    stranger = DDPMPipeline(WithUNet().unet, DDIMScheduler())
    with pytest.raises(ValueError, match="holds none of the networks of WithUNet"):
        train(tmp_path, previews(pipeline=stranger), module=fresh(WithUNet))
    with pytest.raises(
        TypeError, match=r"must be .or return. a diffusers pipeline with a scheduler, got int"
    ):
        train(tmp_path, previews(pipeline=lambda module: 3), module=fresh(WithUNet))
    with pytest.raises(
        ValueError, match="diffusers has no scheduler for 'res_multistep', which pipeline= needs"
    ):
        scheduler_of(Sampler(SCHEDULE, "res_multistep"))
    with pytest.raises(ValueError, match="for 'dpmpp_2m' of a flow"):
        scheduler_of(Sampler(NoiseSchedule.flow()))
    flow = scheduler_of(Sampler(NoiseSchedule.flow(shift=3.0), "euler"))
    assert type(flow).__name__ == "FlowMatchEulerDiscreteScheduler" and flow.config["shift"] == 3.0


# Limits


def test_memory_that_runs_out_halves_the_batch_until_it_fits(
    tmp_path: Path, published: list[Any]
) -> None:
    sizes: list[int] = []

    class Small(Toy):
        room = 1

        def predict(self, x: Tensor, timesteps: Tensor, **conditioning: Any) -> Tensor:
            if not torch.is_grad_enabled():
                sizes.append(len(x))
                if len(x) > self.room:
                    raise torch.OutOfMemoryError("out of memory")
            return super().predict(x, timesteps)

    settings: Any = {"num_images": 5, "batch_size": 5}
    with pytest.warns(UserWarning, match="drawn 1 at a time from now on, and batch_size=1 would"):
        train(tmp_path, previews(**settings), module=fresh(Small))
    assert sizes == [1] + [5, 3, 2] + [1] * 20  # the trial; twice five images, of two steps
    train(tmp_path / "b", previews(**settings))
    assert [
        torch.equal(p.images, q.images) for p, q in zip(published[:2], published[2:], strict=True)
    ] == [True] * 2
    Small.room = 0
    module = fresh(Small)
    with pytest.raises(
        RuntimeError,
        match=r"previews cannot be drawn; .* at step 0: OutOfMemoryError: out of memory",
    ):
        train(tmp_path, previews(**settings), module=module)
    assert module.losses == []


def test_exhausted_memory_is_free_before_the_next_try() -> None:
    """The failed batch must not be kept by its traceback."""
    import gc
    import weakref

    alive: list[Any] = []

    def start(images: Any) -> Iterator[Any]:
        big = torch.zeros(1000)
        assert all(reference() is None for reference in alive)
        alive.append(weakref.ref(big))
        if len(images) > 1:
            raise torch.OutOfMemoryError("full")
        yield previewing_paint()

    def previewing_paint() -> Any:
        from alphabar.training.previews.render import paint

        return paint(torch.zeros(1, 1, 4, 4))

    gc.disable()
    try:
        drawn = Rounds(batch_size=4).draw([[0, 1, 2, 3]], start)
    finally:
        gc.enable()
    assert len(alive) == 6 and drawn.pixels.shape == (1, 4, 1, 4, 4)


def test_time_that_is_over_ends_a_preview_after_what_is_finished(
    tmp_path: Path, published: list[Any], monkeypatch: Any
) -> None:
    looks = iter([0.0] * 4 + [math.inf] * 100)
    monkeypatch.setattr(rounds, "time", SimpleNamespace(monotonic=lambda: next(looks)))
    with pytest.warns(UserWarning, match="step 12 finished no image in max_seconds=5"):
        train(tmp_path, previews(max_seconds=5))
    assert [(p.step, len(p.images), p.note) for p in published] == [
        (6, 2, "2 of 3 images: max_seconds=5 had passed")
    ]
    assert published[0].seeds == (0, 1)


def test_sigterm_breaks_a_preview_off_and_training_stops(
    tmp_path: Path, published: list[Any], reference: Toy
) -> None:
    calls: list[int] = []

    class Killed(Toy):
        def predict(self, x: Tensor, timesteps: Tensor, **conditioning: Any) -> Tensor:
            if not torch.is_grad_enabled():
                calls.append(len(x))
                if len(calls) == 6:
                    os.kill(os.getpid(), signal.SIGTERM)
            return super().predict(x, timesteps)

    before = signal.getsignal(signal.SIGTERM)
    module, own = fresh(Killed), previews(every_n_train_steps=4)
    save = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=4, save_top_k=-1)
    with pytest.raises(SystemExit):
        train(tmp_path, own, save, module=module, enable_checkpointing=True)
    assert len(calls) == 6 and steps_of(published) == [4] and module.losses == reference.losses[:8]
    assert own.state_dict() == {"last_step": 4}  # so that a resumed run may draw it
    assert signal.getsignal(signal.SIGTERM) == before
    train(
        tmp_path,
        previews(),
        module=fresh(),
        enable_checkpointing=True,
        ckpt_path=tmp_path / "step=8.ckpt",
    )


def test_a_full_disk_costs_a_warning(tmp_path: Path, reference: Toy) -> None:
    class Full(Callback):
        """No file can grow any more."""

        def on_train_start(self, trainer: Any, pl_module: Any) -> None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (0, limits[1]))

    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        with pytest.warns(UserWarning, match="the preview at step 6 failed: .*File too large"):
            module = train(tmp_path, Full(), previews(on_error="warn"))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert module.losses == reference.losses and grids(tmp_path) == []


def test_a_long_preview_has_a_progress_bar(tmp_path: Path, monkeypatch: Any) -> None:
    made: list[Any] = []

    class Bar:
        def __init__(self, total: int, disable: bool, **rest: Any) -> None:
            self.total, self.disable, self.count = total, disable, 0
            made.append(self)

        def __enter__(self) -> Any:
            return self

        def __exit__(self, *_: Any) -> None: ...

        def update(self) -> None:
            self.count += 1

    monkeypatch.setattr(previewing, "tqdm", Bar)
    train(tmp_path, previews(), max_epochs=1)
    train(tmp_path, previews(), max_epochs=1, enable_progress_bar=True)
    assert [(bar.disable, bar.total, bar.count) for bar in made] == [(True, 6, 6), (False, 6, 6)]


def test_validation_alone_draws_nothing(tmp_path: Path, published: list[Any]) -> None:
    trainer(tmp_path, previews(extra_steps=(0,), at_end=True)).validate(
        Toy(), loader(4), verbose=False
    )
    assert published == []


# Bad input


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"train_time_interval": timedelta(0)}, "train_time_interval must be a timedelta above 0"),
        ({"train_time_interval": 60}, "train_time_interval must be a timedelta above 0, .* got 60"),
        (
            {"train_time_interval": timedelta(1), "every_n_epochs": 2},
            "time, steps or epochs, not both; got every_n_epochs=2",
        ),
        ({"extra_steps": [-1]}, "extra_steps must be optimizer steps"),
        ({"seeds": [1, 2], "num_images": 3}, "seeds must name one for each of 3 images, got 2"),
        ({"prompts": ["a"]}, "prompts need encode="),
        ({"prompts": ["a"], "classes": [1], "encode": len}, "prompts or classes, not both"),
        ({"encode": len}, "encode= has nothing to encode"),
        ({"classes": [1, 2, 3], "num_images": 2}, "3 classes need as many images at least"),
        (
            {"classes": [1], "conditioning": {"class_labels": 1}},
            "conditioning has 'class_labels' already",
        ),
        ({"classes": [1], "guidance_scale": 2.0}, "needs unconditional="),
        ({"weights": "emma"}, "unknown weights 'emma'; did you mean 'ema'"),
        ({"max_seconds": 0}, "max_seconds must be above 0, got 0"),
        ({"decode_batch_size": 0}, "decode_batch_size must be"),
        ({"pipeline": len, "decode": len}, "leave predict and decode out, or pipeline"),
    ],
)
def test_bad_arguments_fail_at_construction(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ValidationSampling(**arguments)


# Samplers that have no table


@pytest.mark.parametrize(
    ("name", "own", "steps"),
    [("DPM adaptive", "dpm_adaptive", None), ("score_sde_ve", "score_sde_ve", 2)],
)
def test_a_sampler_without_a_table_draws(
    name: str, own: str, steps: int | None, tmp_path: Path
) -> None:
    train(tmp_path, ValidationSampling(name, steps=steps, num_images=2, every_n_train_steps=6))
    lines = (tmp_path / "previews" / "previews.jsonl").read_text(encoding="utf-8").splitlines()
    shown = [json.loads(line) for line in lines]
    assert [(one["sampler"], one["steps"]) for one in shown] == [(own, steps)] * 4
    assert len(grids(tmp_path)) == 2


def test_a_sampler_that_needs_more_than_a_preview_has_is_refused_before_training(
    tmp_path: Path,
) -> None:
    message = r"repaint needs known= and mask=, which a preview does not have; take another sampler"
    with pytest.raises(ValueError, match=message):
        train(tmp_path, ValidationSampling("RePaint", steps=20, every_n_train_steps=3))
