"""Samplers in pipelines: the scheduler object runs every table as the kernel does, and trains as diffusers' own."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from alphabar.noising import NoiseSchedule
from alphabar.sampling import METHODS, Sampler
from alphabar.sampling.kernel import run
from alphabar.sampling.tracing import Evaluation, Unconditional
from tiny_pipeline import make_pipeline

SCHEDULES = {
    "epsilon": NoiseSchedule.scaled_linear(),
    "zero_snr": NoiseSchedule.scaled_linear(prediction="v_prediction").zero_terminal_snr(),
    "flow": NoiseSchedule.flow(shift=3.0),
    "karras": NoiseSchedule.karras(),
}
SHAPE = (2, 4, 4, 4)
START = torch.randn(SHAPE, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def network(x: Tensor, t: Any) -> Tensor:
    return torch.tanh(0.5 * x + 0.001 * float(t)) - 0.1 * x


def in_a_pipeline(scheduler: Any, x: Tensor, generator: Any, first: int = 0) -> Tensor:
    """The loop that the pipelines of diffusers have."""
    for t in scheduler.timesteps[first:]:
        scaled = scheduler.scale_model_input(x, t) if hasattr(scheduler, "scale_model_input") else x
        out = network(scaled, t)
        x = scheduler.step(out, t, x, generator=generator).prev_sample
    return x


def by_the_kernel(table: Any, x: Tensor) -> Tensor:
    generator = torch.Generator().manual_seed(7)

    def noise(start: float, end: float) -> Tensor:
        return torch.randn(SHAPE, generator=generator, dtype=torch.float64)

    for progress in run(table, x, lambda x, knot: network(x, knot.timestep), noise):
        x = progress.x
    return x


def runs_in_pipelines(sampler: Sampler) -> bool:
    ops = [op for step in sampler.table.steps for op in step.ops]
    starts = [step.ops[0] for step in sampler.table.steps]
    return not any(isinstance(op, Unconditional) for op in ops) and all(
        isinstance(op, Evaluation) for op in starts
    )


@pytest.mark.parametrize("name", METHODS)
def test_every_table_is_run_as_the_kernel_runs_it(name: str) -> None:
    for schedule in SCHEDULES.values():
        try:
            sampler = Sampler(schedule, name, 6)
        except ValueError:  # no such combination
            continue
        if not runs_in_pipelines(sampler):
            with pytest.raises(ValueError, match=r"\(churn\)|\(CFG\+\+\)"):
                sampler.as_scheduler()
            continue
        scheduler = sampler.as_scheduler()
        start = START * sampler.init_noise_scale
        ours = by_the_kernel(sampler.table, start)
        theirs = in_a_pipeline(scheduler, start, torch.Generator().manual_seed(7))
        assert float((ours - theirs).abs().max()) <= 1e-6 * float(ours.abs().max()), schedule
        assert scheduler.step_index == len(scheduler.timesteps) == sampler.table.evaluations


@pytest.mark.parametrize("name", ["dpmpp_2m", "heun", "unipc", "lms", "sa_solver", "ipndm"])
def test_a_later_start_remembers_nothing(name: str) -> None:
    sampler = Sampler(SCHEDULES["epsilon"], name, 8)
    scheduler = sampler.as_scheduler()
    evaluations = [sum(isinstance(op, Evaluation) for op in s.ops) for s in sampler.table.steps]
    first = sum(evaluations[:3])
    scheduler.set_begin_index(first)
    ours = by_the_kernel(sampler.table_from(3), START)
    theirs = in_a_pipeline(scheduler, START, torch.Generator().manual_seed(7), first)
    assert float((ours - theirs).abs().max()) <= 1e-6 * float(ours.abs().max())


def test_a_method_that_starts_with_more_calls_cannot_start_late() -> None:
    scheduler = Sampler(SCHEDULES["epsilon"], "pndm", 8).as_scheduler()
    scheduler.set_begin_index(14)
    with pytest.raises(
        ValueError, match=r"^pndm starts with steps of more network calls and cannot"
    ):
        in_a_pipeline(scheduler, START, None, 14)


def test_a_sample_that_the_pipeline_changes_is_taken() -> None:
    scheduler = Sampler(SCHEDULES["epsilon"], "euler", 3).as_scheduler()
    t = scheduler.timesteps[0]
    x = scheduler.step(network(START, t), t, START).prev_sample
    plain = scheduler.step(0 * x, scheduler.timesteps[1], x).prev_sample
    scheduler.set_timesteps(3)
    scheduler.step(network(START, t), t, START)
    changed = scheduler.step(0 * x, scheduler.timesteps[1], 2 * x).prev_sample
    assert torch.allclose(changed, 2 * plain)


def test_half_precision_keeps_its_state_in_float32() -> None:
    sampler = Sampler(SCHEDULES["epsilon"], "dpmpp_2m", 20)
    exact = in_a_pipeline(sampler.as_scheduler(), START.float(), None)
    half = in_a_pipeline(sampler.as_scheduler(), START.to(torch.bfloat16), None)
    assert half.dtype == torch.bfloat16
    assert float((half.float() - exact).abs().max()) < 0.02 * float(exact.abs().max())


def test_generators_for_each_image() -> None:
    sampler = Sampler(SCHEDULES["epsilon"], "euler_ancestral", 5)
    both = in_a_pipeline(
        sampler.as_scheduler(), START, [torch.Generator().manual_seed(s) for s in (3, 4)]
    )
    for i, seed in enumerate((3, 4)):
        alone = in_a_pipeline(
            sampler.as_scheduler(), START[i : i + 1], torch.Generator().manual_seed(seed)
        )
        assert torch.allclose(both[i], alone[0], rtol=1e-12)


# timesteps, noise levels and shifts that a pipeline gives


def test_given_timesteps_and_sigmas() -> None:
    scheduler = Sampler(SCHEDULES["epsilon"], "DPM++ 2M Karras", 5).as_scheduler()
    scheduler.set_timesteps(timesteps=[900, 500, 100])
    assert scheduler.timesteps.tolist() == [900, 500, 100] and scheduler.num_inference_steps == 3
    scheduler.set_timesteps(sigmas=[10.0, 1.0, 0.1, 0.0])
    assert scheduler.sigmas.tolist() == pytest.approx([10.0, 1.0, 0.1, 0.0])
    scheduler.set_timesteps(7)
    assert len(scheduler.timesteps) == 7
    with pytest.raises(ValueError, match="give timesteps or sigmas, not both"):
        scheduler.set_timesteps(timesteps=[1], sigmas=[1])


def test_given_noise_levels_keep_the_start_of_the_sampler() -> None:
    sampler = Sampler(SCHEDULES["epsilon"], "EulerDiscreteScheduler", 5)
    scheduler = sampler.as_scheduler()
    assert scheduler.init_noise_sigma == sampler.knots[0].sigma < 1
    scheduler.set_timesteps(sigmas=sampler.sigmas)
    assert scheduler.init_noise_sigma == pytest.approx(sampler.init_noise_scale, rel=1e-12)


def test_flux_shifts_by_the_image() -> None:
    flux = diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, shift=3.0)
    sigmas = np.linspace(1.0, 1 / 6, 6)
    flux.set_timesteps(sigmas=sigmas.tolist(), mu=0.8)
    scheduler = Sampler(NoiseSchedule.flow(), "euler", 6).as_scheduler()
    scheduler.set_timesteps(sigmas=sigmas.tolist(), mu=0.8)
    assert torch.allclose(scheduler.timesteps, flux.timesteps, rtol=1e-5)
    ours, theirs = in_a_pipeline(scheduler, START, None), in_a_pipeline(flux, START.float(), None)
    assert torch.allclose(ours.float(), theirs, atol=1e-5)


# training


def test_noise_and_velocity_are_those_of_diffusers_at_every_timestep() -> None:
    schedule = NoiseSchedule.scaled_linear(prediction="v_prediction")
    scheduler: Any = Sampler(schedule, "euler", 5).as_scheduler()
    peer: Any = diffusers.DDPMScheduler(
        beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012
    )
    x0 = torch.randn(1000, 3, generator=torch.Generator().manual_seed(1))
    noise = torch.randn(1000, 3, generator=torch.Generator().manual_seed(2))
    t = torch.arange(1000)
    for _ in range(2):  # before and after sampling
        for name in ("add_noise", "get_velocity"):
            mine, their = (getattr(s, name)(x0, noise, t) for s in (scheduler, peer))
            assert torch.allclose(mine, their, atol=2e-6), name
        scheduler.set_timesteps(4)


def test_flow_noise_is_that_of_diffusers() -> None:
    scheduler: Any = Sampler(NoiseSchedule.flow(), "euler", 5).as_scheduler()
    peer: Any = diffusers.FlowMatchEulerDiscreteScheduler()
    peer.set_timesteps(5)
    for t in peer.timesteps:
        mine = scheduler.scale_noise(START, t[None], 0 * START + 1)
        assert torch.allclose(mine, peer.scale_noise(START, t[None], 0 * START + 1), atol=1e-6)


# whole pipelines


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_pipeline(tmp_path_factory.mktemp("pipeline"))


@pytest.mark.parametrize("name", ["DPM++ 2M Karras", "UniPC", "Heun", "res_multistep", "Euler a"])
def test_text_to_image(name: str, folder: Path) -> None:
    pipeline: Any = diffusers.StableDiffusionPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    sampler = Sampler(NoiseSchedule.from_pretrained(folder, "scheduler"), name, 4)
    pipeline.scheduler = sampler.as_scheduler()
    latents = START[:1].float()
    arguments = {"num_inference_steps": 4, "guidance_scale": 3.0, "output_type": "latent"}
    images = pipeline(
        "a red square", latents=latents, generator=torch.Generator().manual_seed(7), **arguments
    ).images
    embeds, negative = pipeline.encode_prompt("a red square", "cpu", 1, True)

    def guided(x: Tensor, knot: Any) -> Tensor:
        t = torch.tensor(knot.timestep)
        low, high = pipeline.unet(
            torch.cat([x, x]), t, encoder_hidden_states=torch.cat([negative, embeds])
        ).sample.chunk(2)
        return low + 3.0 * (high - low)

    generator = torch.Generator().manual_seed(7)
    x = latents * sampler.init_noise_scale
    with torch.no_grad():
        for progress in run(
            sampler.table, x, guided, lambda *_: torch.randn(latents.shape, generator=generator)
        ):
            x = progress.x
    assert torch.allclose(images, x, atol=1e-4 * float(x.abs().max()))


@pytest.mark.parametrize("name", ["DPM++ 2M Karras", "heun", "euler_ancestral"])
def test_image_to_image_and_inpainting(name: str, folder: Path) -> None:
    plain: Any = diffusers.StableDiffusionPipeline.from_pretrained(folder)
    parts = plain.components
    scheduler = Sampler(NoiseSchedule.from_pretrained(folder, "scheduler"), name, 5).as_scheduler()
    image = Image.fromarray(np.full((16, 16, 3), 90, dtype=np.uint8))
    mask = Image.fromarray(np.eye(16, dtype=np.uint8) * 255)
    from_image: Any = diffusers.StableDiffusionImg2ImgPipeline(**{**parts, "scheduler": scheduler})
    fill: Any = diffusers.StableDiffusionInpaintPipeline(**{**parts, "scheduler": scheduler})
    for pipeline, more in ((from_image, {}), (fill, {"mask_image": mask})):
        pipeline.set_progress_bar_config(disable=True)
        for strength in (0.3, 0.7, 1.0):
            out = pipeline(
                "a red square",
                image=image,
                strength=strength,
                num_inference_steps=5,
                output_type="np",
                generator=torch.Generator().manual_seed(0),
                **more,
            ).images
            assert np.isfinite(out).all() and scheduler.step_index == len(scheduler.timesteps)


@pytest.mark.parametrize("name", ["euler", "heun", "dpm_2"])
def test_a_strength_counts_steps_and_not_network_calls(name: str, folder: Path) -> None:
    plain: Any = diffusers.StableDiffusionPipeline.from_pretrained(folder)
    sampler = Sampler(NoiseSchedule.from_pretrained(folder, "scheduler"), name, 6)
    scheduler = sampler.as_scheduler()
    assert scheduler.order == METHODS[name].evaluations
    make: Any = diffusers.StableDiffusionImg2ImgPipeline
    pipeline = make(**{**plain.components, "scheduler": scheduler})
    pipeline.set_progress_bar_config(disable=True)
    times: list[float] = []
    pipeline.unet.register_forward_pre_hook(lambda _, given: times.append(float(given[1])))
    image = Image.fromarray(np.full((16, 16, 3), 90, dtype=np.uint8))
    pipeline("a red square", image=image, strength=0.5, num_inference_steps=6, output_type="np")
    assert times[0] == pytest.approx(sampler.timesteps[3], abs=1e-3)


def test_ddpm_and_dit() -> None:
    torch.manual_seed(0)
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
    schedule = NoiseSchedule.linear()
    pixels: Any = diffusers.DDPMPipeline(unet, diffusers.DDPMScheduler())
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
    classes: Any = diffusers.DiTPipeline(transformer, vae(4), diffusers.DDIMScheduler())
    for pipeline, more in ((pixels, {}), (classes, {"class_labels": [1]})):
        pipeline.set_progress_bar_config(disable=True)
        for name in ("dpmpp_2m", "euler_ancestral", "heun"):
            pipeline.scheduler = Sampler(schedule, name, 5).as_scheduler()
            images = pipeline(
                num_inference_steps=5,
                output_type="np",
                generator=torch.Generator().manual_seed(0),
                **more,
            ).images
            assert np.isfinite(images).all()


def vae(channels: int) -> Any:
    return diffusers.AutoencoderKL(
        block_out_channels=(8,),
        latent_channels=channels,
        norm_num_groups=4,
        sample_size=16,
        shift_factor=0.06,
        scaling_factor=1.3,
    )


def sd3() -> tuple[Any, dict[str, Any], NoiseSchedule, str]:
    transformer = diffusers.SD3Transformer2DModel(
        sample_size=8,
        patch_size=1,
        in_channels=4,
        num_layers=1,
        attention_head_dim=8,
        num_attention_heads=4,
        joint_attention_dim=32,
        caption_projection_dim=32,
        pooled_projection_dim=64,
        out_channels=4,
    )
    none = [f"{part}{i}" for part in ("text_encoder", "tokenizer") for i in ("", "_2", "_3")]
    make: Any = diffusers.StableDiffusion3Pipeline
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    pipeline = make(transformer=transformer, scheduler=scheduler, vae=vae(4), **dict.fromkeys(none))
    given = {
        "prompt_embeds": torch.randn(1, 5, 32),
        "negative_prompt_embeds": torch.randn(1, 5, 32),
        "pooled_prompt_embeds": torch.randn(1, 64),
        "negative_pooled_prompt_embeds": torch.randn(1, 64),
        "height": 8,
        "width": 8,
    }
    return pipeline, given, NoiseSchedule.flow(3.0), "FlowMatchEulerDiscreteScheduler"


def flux() -> tuple[Any, dict[str, Any], NoiseSchedule, str]:
    transformer = diffusers.FluxTransformer2DModel(
        patch_size=1,
        in_channels=4,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        pooled_projection_dim=32,
        axes_dims_rope=(4, 4, 8),
    )
    none = [f"{part}{i}" for part in ("text_encoder", "tokenizer") for i in ("", "_2")]
    make: Any = diffusers.FluxPipeline
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, shift=3.0)
    pipeline = make(transformer=transformer, scheduler=scheduler, vae=vae(1), **dict.fromkeys(none))
    given = {
        "prompt_embeds": torch.randn(1, 5, 32),
        "pooled_prompt_embeds": torch.randn(1, 32),
        "height": 16,
        "width": 16,
    }
    return pipeline, given, NoiseSchedule.flow(), "euler"


@pytest.mark.parametrize("make", [sd3, flux])
def test_flow_pipelines_draw_the_images_of_their_own_scheduler(make: Any) -> None:
    torch.manual_seed(0)
    pipeline, given, schedule, name = make()
    pipeline.set_progress_bar_config(disable=True)

    def draw() -> Tensor:
        generator = torch.Generator().manual_seed(0)
        return pipeline(
            num_inference_steps=4, output_type="latent", generator=generator, **given
        ).images

    theirs = draw()
    pipeline.scheduler = Sampler(schedule, name, 4).as_scheduler()
    assert torch.allclose(draw(), theirs, atol=1e-5 * float(theirs.abs().max()))
    for other in ("dpmpp_2m", "heun", "unipc"):
        pipeline.scheduler = Sampler(schedule, other, 4).as_scheduler()
        assert bool(draw().isfinite().all())


# the classes that draw as often as ours. TCD: a pipeline passes eta=0 to a step that takes it; SA-Solver draws at
# other places; PNDM with an odd T // N is 1.5e-4 off (its midpoints are rounded); IPNDM has a schedule of its own
CLASSES = (
    *("DDIM", "DDPM", "DPMSolverMultistep", "DPMSolverSinglestep", "EulerDiscrete"),
    *("EulerAncestralDiscrete", "HeunDiscrete", "KDPM2Discrete", "KDPM2AncestralDiscrete"),
    *("LMSDiscrete", "UniPCMultistep", "DEISMultistep", "LCM"),
)


@pytest.mark.parametrize("name", CLASSES)
def test_a_class_by_name_draws_the_images_of_the_class(name: str, folder: Path) -> None:
    pipeline: Any = diffusers.StableDiffusionPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    schedule = NoiseSchedule.from_pretrained(folder, "scheduler")
    kind = getattr(diffusers, f"{name}Scheduler")
    betas = {
        key: pipeline.scheduler.config[key] for key in ("beta_start", "beta_end", "beta_schedule")
    }
    if "clip_sample" in inspect.signature(kind).parameters:
        betas["clip_sample"] = False

    def draw(scheduler: Any) -> Tensor:
        pipeline.scheduler = scheduler
        return pipeline(
            "a red square",
            num_inference_steps=8,
            guidance_scale=3.0,
            output_type="latent",
            generator=torch.Generator().manual_seed(3),
        ).images

    theirs = draw(kind(**betas))
    ours = draw(Sampler(schedule, f"{name}Scheduler", 8).as_scheduler())
    assert float((ours - theirs).abs().max()) < 1e-5 * float(theirs.abs().max())
