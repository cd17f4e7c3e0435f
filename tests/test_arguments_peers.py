"""Flags with the name of another trainer's mean what that trainer computes, alone and in a parser
that has them already.
"""

from __future__ import annotations

import argparse
import math
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDPMScheduler, FlowMatchEulerDiscreteScheduler
from diffusers.training_utils import (
    compute_density_for_timestep_sampling,
    compute_loss_weighting_for_sd3,
    compute_snr,
)
from torch import Tensor

from alphabar.noising import AdaptiveOffset, NoiseSchedule, Noising
from alphabar.training import add_noising_arguments, noising_from_arguments
from peer_parsers import DIFFUSERS, KOHYA, PARSERS, parser_of

SD = NoiseSchedule.scaled_linear()
V = NoiseSchedule.scaled_linear(prediction="v_prediction")
DDPM = DDPMScheduler(1000, 0.00085, 0.012, "scaled_linear")
SNR = compute_snr(DDPM, torch.arange(1000)).double()
N = 40_000


def ours(flags: str, base: NoiseSchedule | None = None) -> Noising:
    args = add_noising_arguments(argparse.ArgumentParser()).parse_args(flags.split())
    return noising_from_arguments(args, base)


def of_script(script: str, flags: str, base: NoiseSchedule | None = None) -> Noising:
    return noising_from_arguments(
        add_noising_arguments(parser_of(script)).parse_args(flags.split()), base
    )


def weight_at(noising: Noising, t: Tensor) -> Tensor:
    """The weight on the squared error of the network's output."""
    curve, t = noising.schedule.curve, t.double()
    alpha, sigma = curve.alpha(t), curve.sigma(t)
    return noising.weighting(
        alpha, sigma, noising.schedule.prediction.determinant(alpha, sigma), curve.fraction(t)
    )


# weights, against the formulas of diffusers' training_utils and of sd-scripts'
# library/custom_train_functions.py

CAPPED = SNR.clamp(max=1000)
WEIGHTS: dict[str, tuple[str, NoiseSchedule, Tensor]] = {
    "diffusers, epsilon": ("--snr_gamma 3", SD, SNR.clamp(max=3) / SNR),
    "diffusers, v": ("--snr_gamma 3", V, SNR.clamp(max=3) / (SNR + 1)),
    "apply_snr_weight": ("--min_snr_gamma 5", SD, torch.minimum(SNR, torch.tensor(5.0)) / SNR),
    "apply_snr_weight, v": (
        "--min_snr_gamma 5 --v_parameterization",
        SD,
        SNR.clamp(max=5) / (SNR + 1),
    ),
    "scale_v_prediction_loss_like_noise_prediction": (
        "--scale_v_pred_loss_like_noise_pred --v_parameterization",
        SD,
        CAPPED / (CAPPED + 1),
    ),
    "add_v_prediction_like_loss": ("--v_pred_like_loss 0.3", SD, 1 + 0.3 / (CAPPED / (CAPPED + 1))),
    "apply_debiased_estimation": ("--debiased_estimation_loss", SD, 1 / CAPPED.sqrt()),
    "apply_debiased_estimation, v": ("--debiased_estimation_loss", V, 1 / (CAPPED + 1)),
    "p2": ("--p2_gamma 0.5 --p2_k 2", SD, 1 / (2 + SNR) ** 0.5),  # jychoi118/P2-weighting
}


@pytest.mark.parametrize("name", WEIGHTS)
def test_weights(name: str) -> None:
    flags, base, expected = WEIGHTS[name]
    weight = weight_at(ours(flags, base), torch.arange(1000))
    assert torch.allclose(weight, expected, rtol=2e-4, atol=0)  # their 1 - ᾱ cancels in float32


@pytest.mark.parametrize("precondition", [0, 1])
@pytest.mark.parametrize("scheme", ["none", "sigma_sqrt", "cosmap", "logit_normal", "mode"])
def test_losses_of_the_sd3_script(scheme: str, precondition: int) -> None:
    """With the same x_0, noise and sigmas the loss is that of train_dreambooth_sd3.py,
    preconditioned or not.
    """
    generator = torch.Generator().manual_seed(0)
    x0, noise, output = (torch.randn(50, 2, 3, 3, generator=generator) for _ in range(3))
    noising = ours(
        f"--weighting_scheme {scheme} --precondition_outputs {precondition}",
        NoiseSchedule.flow(3.0),
    )
    t = torch.linspace(0.02, 1, 50)
    noised = noising(x0, step=0, timesteps=t, noise=noise)
    sigmas = noising.schedule.sigma(t).view(-1, 1, 1, 1)
    assert torch.allclose(noised.x, (1.0 - sigmas) * x0 + sigmas * noise, atol=1e-6)
    model_pred, target = output, noise - x0
    if precondition:
        model_pred, target = output * (-sigmas) + noised.x, x0
    weighting = compute_loss_weighting_for_sd3(scheme, sigmas)
    theirs = (weighting.float() * (model_pred - target) ** 2).reshape(50, -1).mean(1)
    assert torch.allclose(noised.losses(output), theirs, rtol=1e-4, atol=1e-7)


# densities

Density = Callable[[torch.Generator], Tensor]


def flow_sigmas(shift: float) -> tuple[Tensor, Tensor]:
    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    return torch.as_tensor(scheduler.timesteps), torch.as_tensor(scheduler.sigmas)


def diffusers_sigmas(scheme: str, shift: float, **options: float) -> Density:
    """train_dreambooth_sd3.py: u is an index into timesteps that descend."""

    def draw(generator: torch.Generator) -> Tensor:
        u = compute_density_for_timestep_sampling(scheme, N, generator=generator, **options)
        indices = (u * 1000).long().clamp(max=999)
        return flow_sigmas(shift)[1][indices]

    return draw


def kohya_sd3_sigmas(shift: float, low: int, high: int, **options: float) -> Density:
    """sd3_train_utils.get_noisy_model_input_and_timesteps."""

    def draw(generator: torch.Generator) -> Tensor:
        u = compute_density_for_timestep_sampling("logit_normal", N, generator=generator, **options)
        u = (u * shift) / (1 + (shift - 1) * u)
        return (u * (high - low) + low).long() / 1000

    return draw


def normal(generator: torch.Generator) -> Tensor:
    return torch.randn(N, generator=generator)


def shifted(sigmas: Tensor, shift: float) -> Tensor:
    return sigmas * shift / (1 + (shift - 1) * sigmas)


def shifted_by_tokens(sigmas: Tensor, tokens: int, x2: int = 4096, y2: float = 1.15) -> Tensor:
    """get_lin_function and time_shift of flux_train_utils, musubi-tuner's train_utils the same."""
    mu = (y2 - 0.5) / (x2 - 256) * (tokens - 256) + 0.5
    return math.exp(mu) / (math.exp(mu) + (1 / sigmas - 1))


def within(sigmas: Tensor, low: float, high: float) -> Tensor:
    return sigmas[(sigmas >= low) & (sigmas <= high)]


DENSITIES: dict[
    str, tuple[str, float, Density]
] = {  # flags, the base model's shift, sigmas as the peer draws them
    "a larger mean is less noise": (
        "--weighting_scheme logit_normal --logit_mean 1",
        1.0,
        diffusers_sigmas("logit_normal", 1.0, logit_mean=1.0, logit_std=1.0),
    ),
    "diffusers logit_normal": (
        "--weighting_scheme logit_normal --logit_mean -0.5 --logit_std 0.7",
        3.0,
        diffusers_sigmas("logit_normal", 3.0, logit_mean=-0.5, logit_std=0.7),
    ),
    "diffusers mode": (
        "--weighting_scheme mode --mode_scale 0.9",
        3.0,
        diffusers_sigmas("mode", 3.0, mode_scale=0.9),
    ),
    "diffusers cosmap": ("--weighting_scheme cosmap", 3.0, diffusers_sigmas("cosmap", 3.0)),
    "kohya sigma": (
        "--timestep_sampling sigma --weighting_scheme logit_normal --logit_mean 1",
        3.0,
        diffusers_sigmas("logit_normal", 3.0, logit_mean=1.0, logit_std=1.0),
    ),
    "kohya uniform": ("--timestep_sampling uniform", 3.0, lambda g: torch.rand(N, generator=g)),
    "kohya sigmoid": (
        "--timestep_sampling sigmoid --sigmoid_scale 1.5",
        3.0,
        lambda g: torch.sigmoid(1.5 * normal(g)),
    ),
    "kohya shift": (
        "--timestep_sampling shift --discrete_flow_shift 2.5 --sigmoid_scale 0.8",
        3.0,
        lambda g: shifted((0.8 * normal(g)).sigmoid(), 2.5),
    ),
    "kohya flux_shift": (
        "--timestep_sampling flux_shift --sigmoid_scale 0.8 --image_tokens 1024",
        3.0,
        lambda g: shifted_by_tokens((0.8 * normal(g)).sigmoid(), (64 // 2) * (64 // 2)),
    ),
    "musubi flux2_shift": (
        "--timestep_sampling flux2_shift --image_tokens 4096",
        1.0,
        lambda g: shifted_by_tokens(normal(g).sigmoid(), 64 * 64),
    ),
    "musubi qwen_shift": (
        "--timestep_sampling qwen_shift --image_tokens 3600 --discrete_flow_shift 2.2",
        1.0,
        lambda g: shifted_by_tokens(normal(g).sigmoid(), 3600, 8192, 0.9),
    ),
    "musubi krea2_shift": (
        "--timestep_sampling krea2_shift --image_tokens 6400",
        1.0,
        lambda g: shifted_by_tokens(normal(g).sigmoid(), 6400, 6400, 1.15),
    ),
    "musubi logsnr": (
        "--timestep_sampling logsnr --logit_mean -6 --logit_std 2",
        2.0,
        lambda g: torch.sigmoid(-(2 * normal(g) - 6) / 2),
    ),
    "musubi range": (
        "--timestep_sampling shift --flow_shift 2.5 --min_timestep 100 --max_timestep 700",
        1.0,
        lambda g: shifted(normal(g).sigmoid(), 2.5) * (0.7 - 0.1) + 0.1,
    ),
    "musubi range, shape preserved": (
        "--timestep_sampling qwen_shift --image_tokens 3600 --min_timestep 100 "
        "--max_timestep 700 --preserve_distribution_shape",
        1.0,
        lambda g: within(shifted_by_tokens(normal(g).sigmoid(), 3600, 8192, 0.9), 0.1, 0.7),
    ),
    "kohya sd3": (
        "--weighting_scheme logit_normal --logit_mean 1 --training_shift 2 --min_timestep 100 "
        "--max_timestep 700",
        3.0,
        kohya_sd3_sigmas(2.0, 100, 700, logit_mean=1.0, logit_std=1.0),
    ),
}
SHARES = torch.tensor([0.02, 0.1, 0.3, 0.5, 0.7, 0.9, 0.98], dtype=torch.float64)


@pytest.mark.parametrize("name", DENSITIES)
def test_densities(name: str) -> None:
    flags, shift, draw = DENSITIES[name]
    noising = ours(flags, NoiseSchedule.flow(shift))
    sigmas = noising.schedule.sigma(
        noising.timesteps.times(SHARES, noising.schedule.curve)
    ).double()
    theirs = draw(torch.Generator().manual_seed(0)).double()
    for share, sigma in zip(SHARES.tolist(), sigmas.tolist(), strict=True):
        # the share of their sigmas below our quantile: 5 deviations of a binomial, and one step of
        # their table
        below, at_most = (
            float((theirs < sigma - 2e-3).double().mean()),
            float((theirs <= sigma + 2e-3).double().mean()),
        )
        slack = 5 * math.sqrt(share * (1 - share) / N)
        assert below - slack <= share <= at_most + slack, (share, sigma)


@pytest.mark.parametrize(
    ("how", "resolution", "tokens"),
    [
        ({"type": str}, "1024,768", 64 * 48),
        ({"type": str}, "512", 32 * 32),
        ({"type": int}, "1000", 62 * 62),  # the latents have 125 rows, the last one is not packed
    ],
)
def test_the_tokens_of_a_resolution(how: dict[str, Any], resolution: str, tokens: int) -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--resolution", **how)
    read = add_noising_arguments(parser).parse_args
    flags = ["--timestep_sampling", "flux_shift", "--resolution", resolution]
    flow = NoiseSchedule.flow()
    density = noising_from_arguments(read(flags), flow).timesteps
    said = "--timestep_sampling flux_shift --image_tokens"
    assert density == ours(f"{said} {tokens}", flow).timesteps
    assert noising_from_arguments(read([*flags, "--image_tokens", "9"]), flow).timesteps == (
        ours(f"{said} 9", flow).timesteps
    )


def test_the_direction_of_logit_mean() -> None:
    means = {}
    for name, flags in {
        "diffusers": "--weighting_scheme logit_normal --logit_mean 1",
        "paper": "--timestep_density logit_normal:mean=1",
    }.items():
        noising = ours(flags, NoiseSchedule.flow())
        u = (torch.arange(2000, dtype=torch.float64) + 0.5) / 2000
        means[name] = float(
            noising.schedule.sigma(noising.timesteps.times(u, noising.schedule.curve)).mean()
        )
    assert means == {
        "diffusers": pytest.approx(0.304, abs=2e-3),
        "paper": pytest.approx(0.696, abs=2e-3),
    }


@pytest.mark.parametrize(("low", "high"), [(0, 1000), (200, 203), (0, 500)])
def test_range_of_timesteps(low: int, high: int) -> None:
    """train_util.get_timesteps: torch.randint(min_timestep, max_timestep)."""
    noising = ours(f"--min_timestep {low} --max_timestep {high}")
    t = noising.draw(range(2000), (1,), step=0, total=2000).t
    expected = torch.randint(low, high, (2000,), generator=torch.Generator().manual_seed(0))
    assert (int(t.min()) < low + max(2, (high - low) // 100)) and int(t.max()) >= high - max(
        1, (high - low) // 100
    )
    assert abs(float(t.double().mean() - expected.double().mean())) < 6 * (high - low) / math.sqrt(
        12 * 1000
    )
    assert low <= int(t.min()) and int(t.max()) < high


# losses: train_util.get_huber_threshold_if_needed and conditional_loss


def huber_c(schedule: str, c: float, scale: float, t: Tensor) -> Tensor:
    if schedule == "exponential":
        return torch.exp(math.log(c) / 1000 * t) * scale
    if schedule == "snr":
        sigmas = ((1.0 - DDPM.alphas_cumprod[t]) / DDPM.alphas_cumprod[t]) ** 0.5
        return (1 - c) / (1 + sigmas) ** 2 + c
    return torch.full(t.shape, c * scale)


@pytest.mark.parametrize(
    ("schedule", "scale"), [("constant", 2.0), ("exponential", 2.0), ("snr", 1.0)]
)
@pytest.mark.parametrize("loss_type", ["l1", "l2", "huber", "smooth_l1"])
def test_loss_types(loss_type: str, schedule: str, scale: float) -> None:
    of_huber = f" --huber_c 0.2 --huber_schedule {schedule} --huber_scale {scale}" * (
        loss_type in ("huber", "smooth_l1")
    )
    noising = ours(f"--loss_type {loss_type}{of_huber}")
    generator = torch.Generator().manual_seed(0)
    x0, noise, output = (torch.randn(9, 1, 4, 4, generator=generator) for _ in range(3))
    t = torch.arange(0, 1000, 120)
    d, c = output - noise, huber_c(schedule, 0.2, scale, t).view(-1, 1, 1, 1)
    theirs = {
        "l1": d.abs(),
        "l2": d**2,
        "huber": 2 * c * (torch.sqrt(d**2 + c**2) - c),
        "smooth_l1": 2 * (torch.sqrt(d**2 + c**2) - c),
    }[loss_type]
    noised = noising(x0, step=0, timesteps=t, noise=noise)
    assert torch.allclose(noised.losses(output), theirs.flatten(1).mean(1), rtol=1e-4, atol=1e-6)


# noise: the scripts of diffusers, and custom_train_functions.apply_noise_offset and
# pyramid_noise_like

NOISES: dict[str, tuple[str, Callable[[Tensor, torch.Generator], Tensor]]] = {
    "offset": (
        "--noise_offset 0.5",
        lambda x0, g: 0.5 * torch.randn(*x0.shape[:2], 1, 1, generator=g),
    ),
    "random": (
        "--noise_offset 0.5 --noise_offset_random_strength",
        lambda x0, g: (
            0.5
            * torch.rand(len(x0), 1, 1, 1, generator=g)
            * torch.randn(*x0.shape[:2], 1, 1, generator=g)
        ),
    ),
    "adaptive": (
        "--noise_offset 0.3 --adaptive_noise_scale -0.2",
        lambda x0, g: (
            (0.3 - 0.2 * x0.mean((2, 3), keepdim=True).abs()).clamp(min=0)
            * torch.randn(*x0.shape[:2], 1, 1, generator=g)
        ),
    ),
    "adaptive, random": (
        "--noise_offset 0.5 --adaptive_noise_scale 0.4 --noise_offset_random_strength",
        lambda x0, g: (
            (
                0.5 * torch.rand(len(x0), 1, 1, 1, generator=g)
                + 0.4 * x0.mean((2, 3), keepdim=True).abs()
            ).clamp(min=0)
            * torch.randn(*x0.shape[:2], 1, 1, generator=g)
        ),
    ),
}


@pytest.mark.parametrize("name", NOISES)
def test_offsets(name: str) -> None:
    """The offsets are one random number for each channel, distributed as the peer's: compared by
    their moments.
    """
    flags, draw = NOISES[name]
    x0 = torch.full((2000, 2, 4, 4), 0.7)
    noising = ours(flags)
    offset = noising(x0, step=0).noise - ours("")(x0, step=0).noise
    assert torch.allclose(offset, offset[..., :1, :1].expand_as(offset), atol=1e-6)
    ours_, theirs = (
        offset[..., 0, 0].double(),
        draw(x0, torch.Generator().manual_seed(0))[..., 0, 0].double(),
    )
    for power in (1, 2, 4):
        a, b = ours_**power, theirs**power
        assert abs(float(a.mean() - b.mean())) < 6 * float((a.var() / 2000 + b.var() / 2000).sqrt())


@pytest.mark.parametrize("flag", ["--input_perturbation", "--ip_noise_gamma"])
def test_input_perturbation(flag: str) -> None:
    """x_t is made of noise + gamma * randn, the target of the noise."""
    x0, noising = torch.zeros(500, 1, 8, 8), ours(f"{flag} 0.3")
    noised, plain = noising(x0, step=0), ours("")(x0, step=0)
    assert torch.equal(noised.target, plain.target)
    xi = (noised.x - plain.x) / noising.schedule.sigma(noised.t).view(-1, 1, 1, 1)
    assert float(xi.std()) == pytest.approx(0.3, rel=0.02)


def test_multires_noise() -> None:
    """pyramid_noise_like: iterations and discount, and unit variance."""
    noise = ours("--multires_noise_iterations 4 --multires_noise_discount 0.9")(
        torch.zeros(400, 1, 16, 16), step=0
    ).noise
    generator = torch.Generator().manual_seed(0)
    total = torch.randn(400, 1, 16, 16, generator=generator)
    for k in range(400):
        for i in range(4):
            r = 2 + 2 * float(torch.rand((), generator=generator))
            size = max(1, int(16 / r**i))
            octave = torch.randn(1, 1, size, size, generator=generator)
            total[k] += (
                torch.nn.functional.interpolate(octave, size=16, mode="bilinear")[0] * 0.9**i
            )
            if size == 1:
                break
    theirs = total / total.std()
    assert float(noise.std()) == pytest.approx(1.0, abs=0.02)
    for lag in (1, 4):
        correlation = [
            float((n[..., lag:] * n[..., :-lag]).mean() / n.var()) for n in (noise, theirs)
        ]
        assert correlation[0] == pytest.approx(correlation[1], abs=0.05)


def test_kohyas_order_of_noises() -> None:
    noise = ours("--ip_noise_gamma 0.1 --multires_noise_iterations 4 --noise_offset 0.1").noise
    assert [kind.name for kind in noise.kinds] == ["offset", "pyramid", "input_perturbation"]


# schedules


def test_zero_terminal_snr_and_v() -> None:
    """custom_train_functions.fix_noise_scheduler_betas_for_zero_terminal_snr."""
    peer = DDPMScheduler(1000, 0.00085, 0.012, "scaled_linear", rescale_betas_zero_snr=True)
    for flags in (
        "--zero_terminal_snr --v_parameterization",
        "--rescale_betas_zero_snr --prediction_type v_prediction",
    ):
        schedule = ours(flags).schedule
        assert schedule.prediction.name == "v_prediction"
        assert torch.allclose(
            schedule.alphas_cumprod, peer.alphas_cumprod.double(), rtol=1e-4, atol=1e-9
        )


@pytest.mark.parametrize("flag", ["--flow_shift", "--discrete_flow_shift"])
def test_flow_shift(flag: str) -> None:
    timesteps, sigmas = flow_sigmas(2.5)
    schedule = ours(f"{flag} 2.5").schedule
    t = torch.linspace(1, 0.001, 1000, dtype=torch.float64)
    assert torch.allclose(schedule.sigma(t), sigmas[: len(t)].double(), atol=1e-6)
    assert torch.allclose(schedule.curve.timestep(t), timesteps.double(), atol=1e-3)


# parsers that have some of the flags


@pytest.mark.parametrize("script", PARSERS)
def test_every_script_takes_our_flags(script: str) -> None:
    base = NoiseSchedule.flow(3.0) if any(word in script for word in ("sd3", "flux")) else SD
    raw = " --model_prediction_type raw" * ("flux_train" in script)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        noising = of_script(script, raw, base)
    assert noising.schedule == base
    assert noising.noise.name == "gaussian" and noising.loss.name == "l2"
    for option in add_noising_arguments(parser_of(script))._actions:
        assert not isinstance(option.default, list)


def test_defaults_of_a_script_hold() -> None:
    noising = of_script("train_dreambooth_sd3.py", "", NoiseSchedule.flow(3.0))
    # --precondition_outputs 1
    assert noising.timesteps.name == "logit_normal" and noising.weighting.name == "x0"
    plain = of_script(
        "train_dreambooth_sd3.py", "--precondition_outputs 0", NoiseSchedule.flow(3.0)
    )
    assert plain.weighting.name == "uniform"
    assert of_script("flux_train.py", "--model_prediction_type raw").schedule == NoiseSchedule.flow(
        3.0
    )
    assert of_script("train_unconditional.py", "").schedule == NoiseSchedule.linear()
    assert of_script(
        "train_unconditional.py", "--ddpm_num_steps 500"
    ).schedule == NoiseSchedule.linear(num_train_timesteps=500)
    assert of_script("sdxl_train.py", "--loss_type huber").loss == ours("--loss_type huber").loss
    pyramid = of_script("sdxl_train.py", "--multires_noise_iterations 6").noise
    assert pyramid == ours("--multires_noise_iterations 6 --multires_noise_discount 0.3").noise


def test_what_is_said_wins_over_a_scripts_default() -> None:
    flow = NoiseSchedule.flow(3.0)
    noising = of_script(
        "train_dreambooth_sd3.py", "--timestep_density uniform --loss_weighting v", flow
    )
    assert noising.timesteps.name == "uniform" and noising.weighting.name == "v"
    assert of_script(
        "flux_train.py", "--model_prediction_type raw --flow_shift 5"
    ).schedule == NoiseSchedule.flow(5.0)
    parser = argparse.ArgumentParser()
    parser.add_argument("--noise_offset", type=float, default=0.0357)
    parser.add_argument("--snr_gamma", type=float, default=5.0)
    read = add_noising_arguments(parser).parse_args
    assert noising_from_arguments(read([])).noise == ours("--noise_offset 0.0357").noise
    assert noising_from_arguments(read([])).weighting == ours("--snr_gamma 5").weighting
    assert noising_from_arguments(read(["--noise_offset", "0"])).noise.name == "gaussian"
    assert noising_from_arguments(read(["--loss_weighting", "x0"])).weighting.name == "x0"


@pytest.mark.parametrize("script", KOHYA)
@pytest.mark.parametrize(
    "flags", ["--noise_offset 0.05 --adaptive_noise_scale 0.01 --noise_offset_random_strength"]
)
def test_one_offset(script: str, flags: str) -> None:
    raw = " --model_prediction_type raw" * ("flux" in script)
    noise = of_script(script, flags + raw, NoiseSchedule.flow(3.0)).noise
    assert noise == ours(flags).noise
    assert noise == AdaptiveOffset(0.05, 0.01, random_strength=True)


def test_an_own_dest_and_type_are_respected() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--snr_gamma", dest="gamma", default=None)
    parser.add_argument("--seed", type=int, default=None)
    args = add_noising_arguments(parser).parse_args(["--snr_gamma", "3", "--seed", "4"])
    assert args.gamma == "3"
    assert noising_from_arguments(args).weighting == ours("--snr_gamma 3").weighting
    assert noising_from_arguments(args).seed == 4


def test_arguments_are_plain_values_for_a_tracker() -> None:
    """accelerate's tensorboard tracker takes numbers, text and switches as hyperparameters, and no
    lists.
    """
    flags = ["--noise", "offset", "pyramid", "--snr_gamma", "5"]
    args = add_noising_arguments(parser_of("sdxl_train.py")).parse_args(flags)
    assert all(
        value is None or isinstance(value, str | int | float) for value in vars(args).values()
    )
    assert [kind.name for kind in noising_from_arguments(args).noise.kinds] == ["offset", "pyramid"]
    again = noising_from_arguments(argparse.Namespace(**vars(args)))
    assert again.weighting == noising_from_arguments(args).weighting


@pytest.mark.parametrize(
    ("name", "how", "words"),
    [
        (
            "--noise",
            {"type": float, "default": 0.1},
            ["--noise takes a number", "alphabar's --noise takes several"],
        ),
        ("--snr_gamma", {"action": "store_true"}, ["--snr_gamma takes no value", "takes a number"]),
        (
            "--v_parameterization",
            {"type": int},
            ["--v_parameterization takes a number", "takes no value"],
        ),
        (
            "--prediction_type",
            {"choices": ["mean", "median"]},
            ["one of mean, median", "one of consistency, epsilon"],
        ),
        (
            "--noise_offset",
            {"type": float, "nargs": 2},
            ["--noise_offset takes several", "takes a number"],
        ),
    ],
)
def test_options_that_differ_are_refused(name: str, how: dict[str, Any], words: list[str]) -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument(name, **how)
    with pytest.raises(ValueError) as error:
        add_noising_arguments(parser)
    assert all(word in str(error.value) for word in [*words, f"without=['{name}']"]), str(
        error.value
    )
    kept = argparse.ArgumentParser()
    kept.add_argument(name, **how)
    assert (
        noising_from_arguments(
            add_noising_arguments(kept, without=[name]).parse_args([])
        ).noise.name
        == "gaussian"
    )


# contradictions


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--snr_gamma 5 --loss_weighting min_snr:gamma=3", ["--snr_gamma 5.0", "--loss_weighting min_snr:gamma=3"]),
        ("--snr_gamma 5 --min_snr_gamma 3", ["--snr_gamma 5.0", "--min_snr_gamma 3.0"]),
        ("--loss_type huber:c=0.2 --huber_c 0.3", ["--huber_c 0.3", "--loss_type huber:c=0.2"]),
        ("--noise offset:strength=0.1 --noise_offset 0.2", ["--noise_offset 0.2", "--noise offset:strength=0.1"]),
        ("--input_perturbation 0.1 --ip_noise_gamma 0.2", ["--input_perturbation 0.1", "--ip_noise_gamma 0.2"]),
        ("--timestep_density lognormal_sigma:mean=0 --p_mean 1", ["--p_mean 1.0", "lognormal_sigma:mean=0"]),
        ("--timestep_density logit_normal:mean=1 --logit_mean 1", ["--logit_mean 1.0", "logit_normal:mean=1", "more noise"]),
        ("--loss_weighting min_snr:floor=0.2 --loss_weight_floor 0.1", ["--loss_weight_floor 0.1", "floor=0.2"]),
        ("--loss_weighting edm:sigma_data=1.0 --sigma_data 0.5", ["--sigma_data 0.5", "edm:sigma_data=1.0"]),
        ("--flow_shift 3 --discrete_flow_shift 2", ["--flow_shift 3.0", "--discrete_flow_shift 2.0"]),
        ("--noise_schedule flow:shift=2 --flow_shift 3", ["--flow_shift 3.0", "flow:shift=2"]),
        ("--noise_schedule linear:beta_end=0.01 --beta_end 0.02", ["--beta_end 0.02", "linear:beta_end=0.01"]),
        ("--noise_schedule linear:prediction=sample --prediction_type epsilon", ["--prediction_type epsilon", "prediction=sample"]),
        ("--adaptive_noise_scale 0.01", ["--adaptive_noise_scale 0.01", "--noise_offset"]),
        ("--noise_offset_random_strength", ["--noise_offset_random_strength", "--noise_offset as well"]),
        ("--ip_noise_gamma_random_strength", ["--ip_noise_gamma_random_strength", "--input_perturbation"]),
        ("--multires_noise_discount 0.3", ["--multires_noise_discount", "--multires_noise_iterations"]),
        ("--noise offset --noise_offset 0.1 --adaptive_noise_scale 0.1", ["--adaptive_noise_scale", "--noise offset"]),
        ("--huber_c 0.1", ["--huber_c 0.1", "--loss_type"]),
        ("--mode_scale 1", ["--mode_scale 1.0", "--weighting_scheme mode"]),
        ("--logit_mean 1", ["--logit_mean 1.0", "--weighting_scheme logit_normal", "--timestep_density logit_normal:mean=-"]),
        ("--sigmoid_scale 1", ["--sigmoid_scale", "--timestep_sampling sigmoid"]),
        ("--weighting_scheme sigma_sqrt --loss_weighting snr", ["--weighting_scheme sigma_sqrt", "--loss_weighting snr"]),
        ("--weighting_scheme sigma_sqrt --snr_gamma 5", ["--weighting_scheme sigma_sqrt", "--snr_gamma"]),
        ("--weighting_scheme mode --timestep_sampling uniform --flow_shift 3", ["--weighting_scheme mode", "--timestep_sampling uniform"]),
        ("--timestep_sampling sigmoid", ["--timestep_sampling sigmoid", "discrete", "--timestep_density"]),
        ("--timestep_sampling flux_shift --flow_shift 3", ["--timestep_sampling flux_shift", "--image_tokens", "--resolution"]),
        ("--timestep_sampling flux_shift --image_tokens 0 --flow_shift 3", ["tokens >= 1"]),
        ("--image_tokens 4096", ["--image_tokens 4096", "--timestep_sampling flux_shift or flux2_shift"]),
        ("--logit_mean 1 --timestep_sampling shift --flow_shift 3", ["--logit_mean 1.0", "--timestep_sampling logsnr"]),
        ("--preserve_distribution_shape", ["--preserve_distribution_shape", "--timestep_sampling uniform"]),
        ("--reversed_timesteps --weighting_scheme mode", ["--reversed_timesteps", "--weighting_scheme mode"]),
        ("--flow_shift 3 --reversed_timesteps --timestep_sampling sigmoid", ["--reversed_timesteps", "--timestep_sampling sigmoid"]),
        ("--flow_shift 3 --reversed_timesteps --timestep_sampling uniform", ["--reversed_timesteps", "--timestep_sampling uniform"]),
        ("--flow_shift 3 --reversed_timesteps --weighting_scheme none --training_shift 2", ["--reversed_timesteps", "--training_shift 2"]),
        ("--reversed_timesteps --p_mean 0", ["--reversed_timesteps", "lognormal_sigma", "leave it out"]),
        ("--scale_v_pred_loss_like_noise_pred", ["--scale_v_pred_loss_like_noise_pred", "--prediction_type epsilon"]),
        ("--v_pred_like_loss 1 --v_parameterization", ["--v_pred_like_loss 1.0", "v_prediction"]),
        ("--precondition_outputs 1", ["--precondition_outputs 1", "epsilon"]),
        ("--flow_shift 3 --prediction_type epsilon", ["--prediction_type epsilon", "--prediction_type v_prediction"]),
        ("--flow_shift 3 --weighting_scheme logit_normal --logit_std 0", ["--logit_std 0.0", "positive"]),
        ("--flow_shift 3 --weighting_scheme mode --mode_scale 5", ["--mode_scale 5.0", "1.7519"]),
    ],
)  # fmt: skip
def test_contradictions_name_both_and_advise_flags(flags: str, words: list[str]) -> None:
    with pytest.raises(ValueError) as error:
        ours(flags)
    message = str(error.value)
    assert all(word in message for word in words), message
    assert not any(
        word in message
        for word in ("with_prediction(", "zero_terminal_snr()", ".reversed()", "density=")
    ), message


@pytest.mark.parametrize(
    ("script", "flags", "words"),
    [
        (
            "flux_train.py",
            "",
            ["--model_prediction_type sigma_scaled", "--model_prediction_type raw"],
        ),
        (
            "train_text_to_image_sdxl.py",
            "--timestep_bias_strategy later",
            ["--timestep_bias_strategy later"],
        ),
        ("train_text_to_image.py", "--dream_training", ["--dream_training"]),
        (
            "train_dreambooth_lora_sdxl.py",
            "--do_edm_style_training",
            ["--do_edm_style_training", "karras"],
        ),
        ("sdxl_train.py", "--adaptive_noise_scale 0.1", ["--noise_offset"]),
    ],
)
def test_flags_of_a_script_that_are_not_here_are_refused(
    script: str, flags: str, words: list[str]
) -> None:
    with pytest.raises(ValueError) as error:
        of_script(script, flags, SD)
    assert all(word in str(error.value) for word in words), str(error.value)


def test_equal_values_are_no_contradiction() -> None:
    assert (
        ours("--snr_gamma 5 --min_snr_gamma 5 --loss_weighting min_snr:gamma=5").weighting.name
        == "min_snr"
    )
    assert ours("--noise_schedule flow:shift=3 --flow_shift 3").schedule == NoiseSchedule.flow(3.0)


# the base model


def pretrained(folder: Path, **config: Any) -> Path:
    DDPMScheduler(**config).save_pretrained(folder / "scheduler")
    return folder


def test_the_pretrained_model_is_the_base(tmp_path: Path) -> None:
    config = {
        "prediction_type": "v_prediction",
        "rescale_betas_zero_snr": True,
        "beta_schedule": "linear",
    }
    folder = pretrained(tmp_path, **config)
    expected = NoiseSchedule.linear(prediction="v_prediction").zero_terminal_snr()
    flags = f"--pretrained_model_name_or_path {folder}"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert of_script("train_text_to_image.py", flags).schedule == expected
        assert of_script("sdxl_train.py", flags).schedule == expected
    assert (
        of_script(
            "train_text_to_image.py", f"{flags} --prediction_type sample"
        ).schedule.prediction.name
        == "sample"
    )
    assert (
        of_script("train_text_to_image.py", f"{flags} --noise_schedule scaled_linear").schedule
        == SD
    )
    assert of_script("train_text_to_image.py", flags, SD).schedule == SD
    assert of_script(
        "train_dreambooth_sd3.py", f"{flags} --flow_shift 2"
    ).schedule == NoiseSchedule.flow(2.0)


def test_a_model_in_the_hubs_cache_is_the_base(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import constants

    cache = tmp_path / "hub"
    commit = cache / "models--someone--model" / "snapshots" / ("0" * 40)
    pretrained(
        commit,
        prediction_type="v_prediction",
        beta_schedule="scaled_linear",
        beta_start=0.00085,
        beta_end=0.012,
    )
    (cache / "models--someone--model" / "refs").mkdir()
    (cache / "models--someone--model" / "refs" / "main").write_text("0" * 40)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert (
        of_script(
            "train_text_to_image.py", "--pretrained_model_name_or_path someone/model"
        ).schedule
        == V
    )
    with pytest.raises(ValueError, match=r"someone/other .*base=.*--noise_schedule"):
        of_script("train_text_to_image.py", "--pretrained_model_name_or_path someone/other")


def test_a_base_model_that_cannot_be_read_says_what_to_pass(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    file.write_bytes(b"")
    for source in (file, tmp_path):
        with pytest.raises(ValueError) as error:
            of_script("sdxl_train.py", f"--pretrained_model_name_or_path {source}")
        assert all(
            word in str(error.value) for word in (str(source), "base=", "--noise_schedule")
        ), str(error.value)
        assert of_script(
            "sdxl_train.py", f"--pretrained_model_name_or_path {source} --noise_schedule linear"
        )
    flags = f"--pretrained_model_name_or_path {file} --model_prediction_type raw"
    assert of_script("flux_train.py", flags).schedule == NoiseSchedule.flow(3.0)


def test_the_parsers_hold_what_they_stand_for() -> None:
    assert len({name for flags in KOHYA.values() for name in flags}) >= 26 and len(DIFFUSERS) >= 6
