"""Pipelines with the drop-ins draw the images of diffusers' schedulers, and with our samplers those of our own loop."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from alphabar.noising import NoiseSchedule
from alphabar.sampling import Sampler, schedulers
from alphabar.sampling.kernel import run
from test_as_scheduler import flux, sd3, vae
from tiny_pipeline import make_pipeline, make_pipeline_xl

IMAGE = Image.fromarray(np.full((16, 16, 3), 90, dtype=np.uint8))
MASK = Image.fromarray(np.eye(16, dtype=np.uint8) * 255)
LATENT = {"output_type": "latent"}
WORDS = {"prompt": "a red square", "guidance_scale": 3.0}
Made = tuple[Any, dict[str, Any]]


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = make_pipeline(tmp_path_factory.mktemp("pipeline"))
    return diffusers.StableDiffusionPipeline.from_pretrained(folder).components


@pytest.fixture(scope="module")
def parts_xl(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = make_pipeline_xl(tmp_path_factory.mktemp("pipeline_xl"))
    return diffusers.StableDiffusionXLPipeline.from_pretrained(folder).components


def text_to_image(request: Any) -> Made:
    make: Any = diffusers.StableDiffusionPipeline
    return make(**request.getfixturevalue("parts")), {**WORDS, **LATENT}


def image_to_image(request: Any) -> Made:
    make: Any = diffusers.StableDiffusionImg2ImgPipeline
    more = {"image": IMAGE, "strength": 0.6, **LATENT}
    return make(**request.getfixturevalue("parts")), {**WORDS, **more}


def inpainting(request: Any) -> Made:
    make: Any = diffusers.StableDiffusionInpaintPipeline
    more = {"image": IMAGE, "mask_image": MASK, "strength": 0.8, "height": 16, "width": 16}
    return make(**request.getfixturevalue("parts")), {**WORDS, **more, **LATENT}


def control_net(request: Any) -> Made:
    parts = request.getfixturevalue("parts")
    torch.manual_seed(0)
    net = diffusers.ControlNetModel.from_unet(
        parts["unet"], conditioning_embedding_out_channels=(16, 16)
    )
    make: Any = diffusers.StableDiffusionControlNetPipeline
    return make(**parts, controlnet=net), {
        **WORDS,
        "image": IMAGE,
        "height": 16,
        "width": 16,
        **LATENT,
    }


def stable_diffusion_xl(request: Any) -> Made:
    make: Any = diffusers.StableDiffusionXLPipeline
    return make(**request.getfixturevalue("parts_xl"), add_watermarker=False), {**WORDS, **LATENT}


def stable_diffusion_3(request: Any) -> Made:
    pipeline, given, *_ = sd3()
    return pipeline, {**given, **LATENT}


def flux_dev(request: Any) -> Made:
    pipeline, given, *_ = flux()
    return pipeline, {**given, **LATENT}


def dit(request: Any) -> Made:
    transformer = diffusers.DiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=4,
        out_channels=8,
        num_layers=1,
        sample_size=8,
        num_embeds_ada_norm=1000,
        patch_size=2,
    )
    transformer.eval()
    make: Any = diffusers.DiTPipeline
    return make(transformer, vae(4), diffusers.DDIMScheduler()), {
        "class_labels": [1],
        "output_type": "np",
    }


def pixels(request: Any) -> Made:
    unet = diffusers.UNet2DModel(
        sample_size=8,
        in_channels=3,
        out_channels=3,
        layers_per_block=1,
        block_out_channels=(8, 8),
        norm_num_groups=4,
        down_block_types=("DownBlock2D",) * 2,
        up_block_types=("UpBlock2D",) * 2,
    )
    return diffusers.DDPMPipeline(unet, diffusers.DDPMScheduler()), {"output_type": "np"}


def video(request: Any) -> Made:
    transformer = diffusers.WanTransformer3DModel(
        patch_size=(1, 2, 2),
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=4,
        out_channels=4,
        text_dim=16,
        freq_dim=16,
        ffn_dim=16,
        num_layers=1,
        rope_max_seq_len=32,
    )
    make: Any = diffusers.WanPipeline
    scheduler = diffusers.UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
    )
    pipeline = make(None, None, None, scheduler, transformer)
    embeds = {key: torch.randn(1, 5, 16) for key in ("prompt_embeds", "negative_prompt_embeds")}
    size = {"height": 16, "width": 16, "num_frames": 5}
    return pipeline, {**embeds, **size, **LATENT}


DISCRETE = (
    *("DDIMScheduler", "DDPMScheduler", "DPMSolverMultistepScheduler", "EulerDiscreteScheduler"),
    *("EulerAncestralDiscreteScheduler", "HeunDiscreteScheduler", "PNDMScheduler", "LCMScheduler"),
    *("UniPCMultistepScheduler", "TCDScheduler", "KDPM2DiscreteScheduler"),
)
FLOW = ("FlowMatchEulerDiscreteScheduler",)
CASES: dict[Callable[[Any], Made], tuple[str, ...]] = {
    text_to_image: (
        *DISCRETE,
        "SASolverScheduler",
        "DEISMultistepScheduler",
        "LMSDiscreteScheduler",
    ),
    image_to_image: tuple(n for n in DISCRETE if n not in ("PNDMScheduler",)),
    inpainting: DISCRETE[:6],
    control_net: DISCRETE[2:5],
    stable_diffusion_xl: DISCRETE[2:6],
    stable_diffusion_3: (*FLOW, "UniPCMultistepScheduler", "DPMSolverMultistepScheduler"),
    flux_dev: FLOW,
    dit: DISCRETE[:3],
    pixels: DISCRETE[:2],
    video: ("UniPCMultistepScheduler", *FLOW),
}


def same(mine: Tensor, their: Tensor) -> bool:
    return float((mine - their).abs().max()) <= 1e-5 * float(their.abs().max())


def draw(pipeline: Any, scheduler: Any, given: dict[str, Any], steps: int = 5) -> Tensor:
    pipeline.scheduler = scheduler
    pipeline.set_progress_bar_config(disable=True)
    torch.manual_seed(0)  # DiT gives its scheduler no generator
    generator = torch.Generator().manual_seed(0)
    out = pipeline(num_inference_steps=steps, generator=generator, **given)
    return torch.as_tensor(out[0])


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize(("make", "names"), CASES.items(), ids=[make.__name__ for make in CASES])
def test_a_drop_in_draws_the_images_of_its_class(make: Any, names: Any, request: Any) -> None:
    diffusers.logging.set_verbosity_error()
    torch.manual_seed(0)
    pipeline, given = make(request)
    config = {**pipeline.scheduler.config}
    for name in names:
        theirs, mine = (
            draw(
                pipeline, getattr(home, name).from_config(config, clip_sample=make is pixels), given
            )
            for home in (diffusers, schedulers)
        )
        assert bool(theirs.isfinite().all())
        assert same(mine, theirs), name


class Recorded:
    """A scheduler whose steps are kept: what the pipeline hands over, and the draws."""

    def __init__(self, sampler: Sampler, monkeypatch: pytest.MonkeyPatch) -> None:
        self.scheduler = sampler.as_scheduler()
        self.calls: list[tuple[Tensor, Tensor]] = []
        self.draws: list[Tensor] = []
        step, draw = self.scheduler.step, self.scheduler._draw

        def kept_step(output: Tensor, timestep: Any, sample: Tensor, **more: Any) -> Any:
            self.calls.append((output, sample))
            return step(output, timestep, sample, **more)

        def kept_draw(*arguments: Any) -> Tensor:
            self.draws.append(draw(*arguments))
            return self.draws[-1]

        monkeypatch.setattr(self.scheduler, "step", kept_step)
        monkeypatch.setattr(self.scheduler, "_draw", kept_draw)


def replayed(table: Any, kept: Recorded, exact: bool) -> Tensor:
    """Run a table with the outputs and draws of a pipeline; with ``exact`` on the same samples."""
    outputs, draws = iter(kept.calls), iter(kept.draws)

    def network(x: Tensor, knot: Any) -> Tensor:
        output, sample = next(outputs)
        assert same(x, sample) or not exact
        return output

    x = kept.calls[0][1].float()
    for progress in run(table, x, network, lambda *_: next(draws)):
        x = progress.x
    assert next(outputs, None) is None and next(draws, None) is None
    return x


OURS = ("dpmpp_2m", "res_multistep", "euler_ancestral", "heun", "dpmpp_sde", "unipc", "er_sde")


@pytest.mark.parametrize("make", CASES, ids=[make.__name__ for make in CASES])
def test_a_sampler_of_ours_draws_the_images_of_our_loop(
    make: Any, request: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The pipeline's own outputs and draws, given to the kernel, lead to every sample it had."""
    torch.manual_seed(0)
    pipeline, given = make(request)
    if make is dit:
        given["guidance_scale"] = 1.0  # its guidance makes both halves of the sample equal
    flow = make in (stable_diffusion_3, flux_dev, video)
    schedule = (
        NoiseSchedule.flow()
        if flow
        else NoiseSchedule.from_diffusers(dict(pipeline.scheduler.config))
    )
    for name in OURS:
        sampler = Sampler(schedule, name, 5)
        kept = Recorded(sampler, monkeypatch)
        draw(pipeline, kept.scheduler, given)
        plan = kept.scheduler._plan
        first = len(plan.calls) - len(kept.calls)
        table = plan.run.table_from(plan.calls[first].step)
        x = replayed(table, kept, exact=make is not inpainting)  # which changes the sample
        final = kept.scheduler._given
        assert make is inpainting or same(x, final), name
