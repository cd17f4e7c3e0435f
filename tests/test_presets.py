"""Presets: the timesteps and noise levels of the models' pipelines, and the training that is published."""

from __future__ import annotations

import argparse
import importlib.util
import inspect
import json
import math
import re
import warnings
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from diffusers.pipelines.flux.pipeline_flux import calculate_shift
from diffusers.pipelines.flux2.pipeline_flux2 import compute_empirical_mu

from alphabar.noising import (
    PRESETS,
    IndependentTimesteps,
    LogitNormalTimesteps,
    NoiseSchedule,
    Noising,
    UniformTimesteps,
    empirical_token_shift,
    token_shift,
)
from alphabar.sampling import Sampler
from alphabar.sampling.interop.presets import SUITABLE, kind_of
from alphabar.training.cli.command import main
from alphabar.training.flags.items import read_schedule
from alphabar.training.flags.parsing import add_noising_arguments, noising_from_arguments

ROOT = Path(__file__).resolve().parent.parent
CONFIGS: dict[str, dict[str, Any]] = json.loads(
    (ROOT / "tests" / "frozen" / "scheduler_configs.json").read_text(encoding="utf-8")
)
"""The scheduler_config.json of each model, as its repository or its conversion script has it."""
SAME = {  # models that have the config of another
    "sd3.5": "sd3",
    "flux2": "flux",
    "edm2": "edm",
    "wan2.2": "wan2.1",
    "wan2.2-i2v": "wan2.1",
    "ltx2": "ltx",
}
PIPELINES = {
    "sd15": "StableDiffusionPipeline",
    "sd21": "StableDiffusionPipeline",
    "sdxl": "StableDiffusionXLPipeline",
    "sd3": "StableDiffusion3Pipeline",
    "sd3.5": "StableDiffusion3Pipeline",
    "flux": "FluxPipeline",
    "flux2": "Flux2Pipeline",
    "qwen-image": "QwenImagePipeline",
    "sana": "SanaPipeline",
    "lumina2": "Lumina2Pipeline",
    "auraflow": "AuraFlowPipeline",
    "pixart": "PixArtSigmaPipeline",
    "dit": "DiTPipeline",
    "ddpm-cifar10": "DDPMPipeline",
    "svd": "StableVideoDiffusionPipeline",
    "wan2.1": "WanPipeline",
    "wan2.2": "WanPipeline",
    "wan2.2-i2v": "WanImageToVideoPipeline",
    "hunyuanvideo": "HunyuanVideoPipeline",
    "ltx": "LTXPipeline",
    "ltx2": "LTX2Pipeline",
    "cogvideox": "CogVideoXPipeline",
}
EVEN = {  # pipelines that give their scheduler sigmas
    *("flux", "flux-schnell", "flux2", "qwen-image", "lumina2", "z-image-turbo"),
    *("hunyuanvideo", "ltx", "ltx2"),
}
WHOLE = [name for name, preset in PRESETS.items() if preset.whole is None]
EXPERTS = [name for name, preset in PRESETS.items() if preset.whole is not None]


def quiet(make: Any, *args: Any, **options: Any) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return make(*args, **options)


def of_pipeline(name: str, steps: int, tokens: int | None) -> Any:
    """The scheduler of a model after its pipeline has set the timesteps."""
    config = CONFIGS[SAME.get(name, name)]
    scheduler = getattr(diffusers, config["_class_name"]).from_config(config)
    given: dict[str, Any] = {"num_inference_steps": steps}
    if name in EVEN:
        given = {"sigmas": np.linspace(1.0, 1 / steps, steps)}
    if config.get("use_dynamic_shifting"):
        keys = ("base_image_seq_len", "max_image_seq_len", "base_shift", "max_shift")
        given["mu"] = calculate_shift(tokens, *(config[key] for key in keys))
        if name == "flux2":
            given["mu"] = compute_empirical_mu(tokens, steps)
    scheduler.set_timesteps(**given)
    return scheduler


# what is sampled


@pytest.mark.parametrize("name", WHOLE)
def test_timesteps_and_noise_levels_of_the_pipeline(name: str) -> None:
    diffusers.logging.set_verbosity_error()
    tokens = PRESETS[name].pipeline.tokens
    for steps in (10, 28, 50):
        for size in (tokens, 1500) if tokens else (None,):
            theirs = of_pipeline(name, steps, size)
            sampler = quiet(Sampler.preset, name, steps, size)
            expected = theirs.timesteps.float()
            if name == "sd15":  # PLMS calls the network twice at its second timestep
                expected = expected.unique_consecutive()
            ours = torch.tensor(sampler.timesteps, dtype=torch.float32)
            # diffusers stretches to a last level in float32
            near = (
                5e-6 if "shift_terminal" in theirs.config and theirs.config.shift_terminal else 1e-6
            )
            assert torch.allclose(ours, expected, rtol=near, atol=1e-6)
            if hasattr(theirs, "sigmas"):  # of betas, diffusers interpolates in float32
                discrete = sampler.schedule.curve.is_discrete
                levels = torch.tensor(sampler.sigmas, dtype=torch.float32)
                assert torch.allclose(
                    levels, theirs.sigmas, rtol=2e-5 if discrete else 2e-6, atol=2e-7
                )
            else:
                at = ours.long()
                torch.testing.assert_close(
                    sampler.schedule.alphas_cumprod[at].float(),
                    theirs.alphas_cumprod[at].float(),
                    rtol=3e-4 if "cog" in name else 2e-5,
                    atol=1e-7,
                )


@pytest.mark.parametrize(("name", "pipeline"), PIPELINES.items())
def test_steps_and_guidance_are_the_defaults_of_the_pipeline(name: str, pipeline: str) -> None:
    defaults = inspect.signature(getattr(diffusers, pipeline).__call__).parameters
    told = PRESETS[name].pipeline
    assert told.steps == defaults["num_inference_steps"].default
    scales = ("max_guidance_scale", "guidance_scale", "true_cfg_scale")
    found = [defaults[key].default for key in scales if key in defaults]
    assert told.guidance_scale == next((scale for scale in found if scale is not None), 1.0)


def test_every_preset_is_told_apart_and_has_its_sources() -> None:
    assert {*CONFIGS, *SAME} == {*WHOLE}
    for name, preset in PRESETS.items():
        theirs = CONFIGS[SAME.get(preset.whole or name, preset.whole or name)]
        assert preset.pipeline.scheduler["_class_name"] == theirs["_class_name"]
        assert preset.pipeline.source and preset.training.source
        assert (
            (preset.training.timesteps is not None)
            or "not" in preset.training.source
            or ("without" in preset.training.source)
        )
        assert NoiseSchedule.preset(name) == read_schedule(name)


def test_a_shift_by_tokens_and_steps_is_that_of_flux_2() -> None:
    for tokens, steps in ((256, 28), (4096, 50), (4301, 10), (9000, 50)):
        expected = math.exp(compute_empirical_mu(tokens, steps))
        assert empirical_token_shift(tokens, steps) == pytest.approx(expected, rel=1e-12)
        schedule = NoiseSchedule.preset("flux2", tokens, steps)
        assert schedule.curve.shift == pytest.approx(expected, rel=1e-12)  # type: ignore[attr-defined]


def test_a_clamped_line_does_not_run_away() -> None:
    ltx = (1024, 4096, 0.95, 2.05)
    assert token_shift(15_004, *ltx) > 380
    assert token_shift(15_004, *ltx, clamped=True) == token_shift(4096, *ltx)
    assert token_shift(10, *ltx, clamped=True) == token_shift(1024, *ltx)
    assert token_shift(2000, *ltx, clamped=True) == token_shift(2000, *ltx)
    flow = NoiseSchedule.flow()
    assert flow.shifted_for_tokens(9999, clamped=True) == flow.shifted_for_tokens(4096)


# what was trained


@pytest.mark.parametrize(
    ("name", "tokens", "shift"),
    [
        ("sd3", None, 3.0),
        ("sana", None, 3.0),
        ("wan2.1", None, 2.0),
        ("flux", 256, math.exp(0.5)),
        ("flux", None, math.exp(1.15)),
        ("flux2", None, math.exp(1.15)),
        ("lumina2", 256, math.exp(0.5)),
        ("ltx", 4096, math.exp(2.05)),
        ("hunyuanvideo", None, 1.0),
    ],
)
def test_the_training_has_its_own_shift(name: str, tokens: int | None, shift: float) -> None:
    """logit σ ~ N(log shift, 1), whatever the pipeline samples with."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        noising = Noising.preset(name, tokens=tokens)
    u = torch.linspace(0.05, 0.95, 19, dtype=torch.float64)
    sigma = noising.schedule.sigma(noising.timesteps.times(u, noising.schedule.curve))
    expected = math.log(shift) + torch.special.ndtri(u)
    assert torch.allclose(torch.logit(sigma), expected, rtol=0, atol=1e-9)


@pytest.mark.parametrize(
    ("name", "mean", "std"), [("edm", -1.2, 1.2), ("edm2", -0.4, 1.0), ("svd", 0.7, 1.6)]
)
def test_the_noise_levels_of_edm(name: str, mean: float, std: float) -> None:
    noising = Noising.preset(name)
    u = torch.tensor([0.1, 0.5, 0.8], dtype=torch.float64)
    sigma = noising.timesteps.times(u, noising.schedule.curve)
    assert torch.allclose(sigma.log(), mean + std * torch.special.ndtri(u), atol=1e-9)


def test_what_is_not_published_is_said() -> None:
    with pytest.warns(UserWarning, match="qwen-image: the shift of its training"):
        noising = Noising.preset("qwen-image")
    assert noising.timesteps == LogitNormalTimesteps()  # on the pipeline's shift
    with pytest.warns(UserWarning, match="the density and the shift"):
        Noising.preset("wan2.2")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        noising = Noising.preset("qwen-image", shift=3.0)
        Noising.preset("wan2.2", timesteps="logit_normal")
    half = torch.tensor([0.5], dtype=torch.float64)
    curve = noising.schedule.curve
    assert float(curve.sigma(noising.timesteps.times(half, curve))) == pytest.approx(0.75)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: NoiseSchedule.preset("flx"), "unknown preset 'flx'; did you mean 'flux'?"),
        (lambda: NoiseSchedule.preset("sd3", tokens=1024), "tokens are for a config"),
        (lambda: Noising.preset("sd3", tokens=1024), "tokens are for a config"),
        (lambda: Noising.preset("sd15", shift=3.0), "a training shift is for flows"),
        (lambda: Noising.preset("sd3", shift=2.0, timesteps="uniform"), "leave it out with"),
        (lambda: Sampler.preset("wan2.2/high"), "make the sampler of 'wan2.2'"),
        (lambda: NoiseSchedule.flow().truncated(noise_level_min=1.5), "need 0 <= low < high"),
        (lambda: NoiseSchedule.flow().truncated(0.5, noise_level_min=0.5), "the same end"),
    ],
)
def test_errors_name_the_fix(make: Any, words: str) -> None:
    with pytest.raises(ValueError, match=re.escape(words)):
        make()


# boundaries


@pytest.mark.parametrize("name", EXPERTS)
@pytest.mark.parametrize("shift", [1.0, 12.0])
def test_an_expert_is_trained_on_its_noise_levels(name: str, shift: float) -> None:
    """Its density is that of the whole schedule, given that σ lies in its range."""
    low, high = PRESETS[name].noise_levels or (0.0, 0.0)
    noising = quiet(Noising.preset, name, shift=shift)
    u = torch.linspace(1e-9, 1, 101, dtype=torch.float64)
    sigma = noising.schedule.sigma(noising.timesteps.times(u, noising.schedule.curve))
    assert float(sigma[0]) == pytest.approx(low, abs=1e-6)
    assert float(sigma[-1]) == pytest.approx(high)
    # uniform times: t = σ / (s - (s - 1) σ) is uniform in the range
    first, last, t = (x / (shift - (shift - 1) * x) for x in (low, high, sigma))
    assert torch.allclose(t, first + u * (last - first), atol=1e-8)


def test_the_boundary_is_after_the_shift() -> None:
    """The two experts share the timesteps of the pipeline at 875, as WanPipeline does."""
    parts = [NoiseSchedule.preset(f"wan2.2/{part}").curve for part in ("high", "low")]
    whole = Sampler.preset("wan2.2", steps=40)
    for level in whole.sigmas[:-1]:
        t = float(whole.schedule.curve.time_at_noise_level(torch.tensor(level)))
        inside = [part.t_min <= t <= part.t_max for part in parts]
        assert inside == [1000 * level >= 875, 1000 * level < 875]
    flow = NoiseSchedule.flow(shift=12.0)
    u = torch.tensor([1e-12], dtype=torch.float64)
    before, after = (
        flow.sigma(density.times(u, flow.curve)).item()
        for density in (
            UniformTimesteps().within(0.875, 1.0),
            UniformTimesteps().within_noise_levels(0.875, 1.0),
        )
    )
    assert (before, after) == pytest.approx((12 * 0.875 / (1 + 11 * 0.875), 0.875), rel=1e-6)
    discrete = NoiseSchedule.scaled_linear()
    level = float(discrete.sigma_ve(torch.tensor(500)))
    part = discrete.truncated(noise_level_min=level * 1.0001).curve
    assert (part.t_min, part.t_max) == (501, 999)
    times = UniformTimesteps().within_noise_levels(level, 20.0 if level > 20 else 14.6)
    drawn = times.times(torch.tensor([1e-9, 1.0], dtype=torch.float64), discrete.curve)
    assert drawn.tolist() == [500, 998]


def test_an_experts_batch_has_its_noise_levels() -> None:
    noising = quiet(Noising.preset, "wan2.2-i2v/high", seed=3)
    noised = noising(torch.randn(64, 4, 2, 2), step=0)
    assert float(noised.timesteps.min()) >= 900 - 1e-3


def sigmas(noising: Noising, u: torch.Tensor) -> torch.Tensor:
    curve = noising.schedule.curve
    return curve.sigma(noising.timesteps.times(u, curve))


@pytest.mark.parametrize("name", EXPERTS)
@pytest.mark.parametrize(
    "given",
    ["logit_normal", "lognormal_sigma", "loss_second_moment", "independent:density=logit_normal"],
)
def test_a_given_density_is_that_of_the_whole_schedule(name: str, given: str) -> None:
    """An expert's share of u is that of the whole model with this density, in the same order."""
    low, high = PRESETS[name].noise_levels or (0.0, 0.0)
    whole = quiet(Noising.preset, PRESETS[name].whole, timesteps=given)
    expert = quiet(Noising.preset, name, timesteps=given)
    sigma = sigmas(whole, torch.linspace(2e-6, 1, 500_000, dtype=torch.float64))
    inside = sigma[(sigma >= low) & (sigma <= high)]
    u = torch.linspace(0.02, 0.98, 25, dtype=torch.float64)
    expected = inside.quantile(u)
    assert torch.allclose(sigmas(expert, u), expected, atol=1e-3)
    if "independent" in given:
        assert isinstance(expert.timesteps, IndependentTimesteps)
    else:
        drawn = expert(torch.zeros(2000, 1), step=0)
        at_the_boundary = (expert.schedule.sigma(drawn.t) - (low or high)).abs() < 1e-6
        assert float(at_the_boundary.float().mean()) < 0.005
    again = quiet(Noising.preset, name, timesteps=expert.timesteps)
    assert again.timesteps == expert.timesteps


# flags, YAML, the command line, the page


def flags(*words: str) -> Noising:
    parser = add_noising_arguments(argparse.ArgumentParser())
    return quiet(noising_from_arguments, parser.parse_args([*words]))


@pytest.mark.parametrize("name", ["sd15", "edm2", "flux2", "wan2.2/high", "cogvideox"])
def test_the_flag_is_the_preset(name: str) -> None:
    ours, expected = flags("--preset", name), quiet(Noising.preset, name)
    assert ours.schedule == expected.schedule
    assert ours.timesteps == expected.timesteps
    assert ours.weighting == expected.weighting


def test_flags_beside_a_preset() -> None:
    lumina = flags("--preset", "lumina2", "--image_tokens", "256")
    assert lumina.timesteps == Noising.preset("lumina2", tokens=256).timesteps
    other = flags("--preset", "edm2", "--loss_weighting", "edm", "--p_mean", "0.5")
    assert (other.weighting.name, other.timesteps.mean) == ("edm", 0.5)  # type: ignore[attr-defined]
    v = flags("--preset", "sd15", "--v_parameterization", "--zero_terminal_snr")
    assert v.schedule.has_zero_terminal_snr
    for more in (["--flow_shift", "3"], ["--noise_schedule", "flow"]):
        with pytest.raises(ValueError, match="--preset flux contradicts"):
            flags("--preset", "flux", *more)
    with pytest.raises(ValueError, match="--preset fluks: unknown preset"):
        flags("--preset", "fluks")
    item = read_schedule("flow:shift=12,noise_level_min=0.875")
    assert item == NoiseSchedule.flow(12.0).truncated(noise_level_min=0.875)
    assert read_schedule("flux:tokens=256") == NoiseSchedule.preset("flux", tokens=256)


@pytest.mark.parametrize(
    "words",
    [
        "--training_shift 3",
        "--training_shift 3 --weighting_scheme logit_normal",
        "--timestep_sampling sigmoid",
        "--timestep_density lognormal_sigma",
        "--timestep_density loss_second_moment",
        "--timestep_density logit_normal --reversed_timesteps",
        "--timestep_density logit_normal --min_timestep 900",
    ],
)
def test_flags_of_a_density_keep_the_range_of_an_expert(words: str) -> None:
    noising = flags("--preset", "wan2.2/high", *words.split())
    sigma = sigmas(noising, torch.linspace(1e-3, 1 - 1e-3, 999, dtype=torch.float64))
    assert float(sigma.min()) >= 0.875 - 1e-6
    assert float((sigma - 0.875).abs().lt(1e-6).double().mean()) < 0.005


def test_a_training_shift_keeps_the_published_density() -> None:
    for name in ("wan2.1", "sd3", "wan2.2/low"):
        ours = flags("--preset", name, "--training_shift", "5")
        assert ours.timesteps == quiet(Noising.preset, name, shift=5.0).timesteps
    with pytest.raises(ValueError, match=r"--training_shift 3\.0: a training shift is for flows"):
        flags("--preset", "sd15", "--training_shift", "3")


def test_a_default_of_the_script_does_not_replace_the_preset() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--training_shift", type=float, default=3.0)
    parser.add_argument("--weighting_scheme", default="logit_normal")
    parser.add_argument("--snr_gamma", type=float, default=5.0)
    parser.add_argument("--noise_offset", type=float, default=0.1)
    noising = noising_from_arguments(
        add_noising_arguments(parser).parse_args(["--preset", "lumina2"])
    )
    expected = Noising.preset("lumina2")
    assert (noising.timesteps, noising.weighting) == (expected.timesteps, expected.weighting)
    assert noising.noise.name == "offset"  # a preset says nothing of it


def test_yaml_takes_a_preset() -> None:
    jsonargparse = pytest.importorskip("jsonargparse")
    parser = jsonargparse.ArgumentParser()
    parser.add_argument("--noising", type=Noising)
    options = {"name": "lumina2", "tokens": 256, "seed": 3}
    config = {"class_path": "alphabar.noising.Noising.preset", "init_args": options}
    instantiate = getattr(parser, "instantiate", None) or parser.instantiate_classes
    made = instantiate(parser.parse_object({"noising": config})).noising
    assert made.timesteps == Noising.preset("lumina2", tokens=256).timesteps and made.seed == 3


def test_the_commands_know_presets(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    NoiseSchedule.preset("wan2.2-ti2v").save_pretrained(tmp_path)
    assert main(["inspect", str(tmp_path), "lumina2"]) == 0
    said = capsys.readouterr().out
    assert "the schedule of the presets: wan2.2-ti2v\n" in said
    assert "trained with  logit_normal, shift e^μ" in said
    assert "sampled with  euler, 30 steps, shift 6, guidance 4" in said
    assert main(["samplers", "--for", "wan2.2/low"]) == 0
    assert "Sampler.preset('wan2.2')" in capsys.readouterr().out
    assert main(["samplers", "--for", "flx"]) == 2
    assert main(["samplers", "euler", "--for", "flux"]) == 2


@pytest.mark.parametrize("kind", SUITABLE)
def test_what_suits_can_be_made(kind: str) -> None:
    names = [name for name in WHOLE if kind_of(name) == kind]
    assert names
    for one in SUITABLE[kind]:
        Sampler(NoiseSchedule.preset(names[0]), one.name, steps=6)


def test_the_page_is_current() -> None:
    spec = importlib.util.spec_from_file_location("presets_page", ROOT / "docs" / "presets.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert (ROOT / "docs" / "presets.md").read_text(encoding="utf-8") == module.page()
