"""Command-line flags: every value arrives, and contradictions fail before any model exists."""

import argparse
import inspect

import pytest

from alphabar.noising import (
    EDM,
    L1,
    P2,
    SNR,
    AdaptiveOffset,
    BetaTimesteps,
    Chain,
    CosMap,
    Debiased,
    Gaussian,
    Huber,
    Immiscible,
    InputPerturbation,
    ListedTimesteps,
    LogitNormalTimesteps,
    LogNormalSigmaTimesteps,
    Loss,
    LossSecondMoment,
    MinSNR,
    ModeTimesteps,
    Noise,
    NoiseLevelTimesteps,
    NoiseSchedule,
    Offset,
    PerRange,
    PseudoHuber,
    Pyramid,
    SigmaSqrt,
    Sigmoid,
    SmoothL1,
    SoftMinSNR,
    Timesteps,
    Uniform,
    UniformTimesteps,
    VLike,
    Weighting,
)
from alphabar.noising.weighting.trainer_compat import (
    KohyaDebiasedEpsilon,
    KohyaDebiasedV,
    KohyaScaleVPred,
    KohyaVPredLike,
)
from alphabar.training import add_noising_arguments, noising_from_arguments, schedule_from_arguments
from alphabar.training.flags.options import read_options
from alphabar.training.flags.table import KINDS, Kind

BASE = NoiseSchedule.scaled_linear()


def parse(*flags: str) -> argparse.Namespace:
    return add_noising_arguments(argparse.ArgumentParser()).parse_args(flags)


def test_defaults_are_stable_diffusion_with_the_plain_loss() -> None:
    noising = noising_from_arguments(parse())
    assert noising.schedule == NoiseSchedule.scaled_linear()
    assert noising.weighting == Uniform()
    assert noising.noise.name == "gaussian"
    assert not noising.timesteps.stratified


def test_every_flag_arrives() -> None:
    flags = "--beta_schedule linear --beta_start 0.001 --beta_end 0.03 --num_train_timesteps 500 --prediction_type sample"
    flags += " --rescale_betas_zero_snr --snr_gamma 3 --loss_weight_floor 0.1 --timestep_density stratified --noise_offset 0.05"
    noising = noising_from_arguments(parse(*flags.split(), "--noise_seed", "7"))
    assert noising.schedule == NoiseSchedule.linear(0.001, 0.03, 500, "sample").zero_terminal_snr()
    assert noising.weighting == MinSNR(gamma=3.0, floor=0.1)
    assert noising.timesteps.stratified
    assert noising.noise == Offset(0.05)
    assert noising.seed == 7


@pytest.mark.parametrize(
    ("flags", "weighting"),
    [
        ("--min_snr_gamma 3", MinSNR(gamma=3.0)),
        ("--loss_weighting soft_min_snr --snr_gamma 3", SoftMinSNR(gamma=3.0)),
        ("--loss_weighting soft_min_snr:gamma=4,floor=0.1", SoftMinSNR(gamma=4, floor=0.1)),
        ("--p2_gamma 0.5", P2(gamma=0.5)),
        ("--p2_gamma 0.5 --p2_k 2", P2(gamma=0.5, k=2.0)),
        ("--sigmoid_bias -3", Sigmoid(bias=-3.0)),
        ("--debiased_estimation_loss", KohyaDebiasedEpsilon()),
        ("--debiased_estimation_loss --v_parameterization", KohyaDebiasedV()),
        ("--loss_weighting debiased", Debiased()),
        ("--scale_v_pred_loss_like_noise_pred --v_parameterization", KohyaScaleVPred()),
        ("--loss_weighting snr", SNR()),
        ("--v_pred_like_loss 0.5", KohyaVPredLike(strength=0.5)),
        ("--loss_weighting v_like:strength=0.5", VLike(strength=0.5)),
        ("--weighting_scheme cosmap", CosMap()),
        ("--weighting_scheme sigma_sqrt", SigmaSqrt()),
        ("--weighting_scheme mode", Uniform()),
        ("--loss_weighting kohya_debiased_v", KohyaDebiasedV()),
        ("--loss_weighting edm --sigma_data 0.7", EDM(sigma_data=0.7)),
        ("--loss_weighting edm --prediction_type karras --sigma_data 0.7", EDM(sigma_data=0.7)),
        (
            "--loss_weighting per_range:ranges=((0.0,0.5,2.0),(0.5,1.0,1.0))",
            PerRange(((0.0, 0.5, 2.0), (0.5, 1.0, 1.0))),
        ),
    ],
)
def test_weightings(flags: str, weighting: Weighting) -> None:
    assert noising_from_arguments(parse(*flags.split())).weighting == weighting


@pytest.mark.parametrize(
    ("flags", "density"),
    [
        ("--timestep_density logit_normal", LogitNormalTimesteps()),
        (
            "--timestep_sampling shift --sigmoid_scale 2 --flow_shift 3",
            LogitNormalTimesteps(std=2.0),
        ),
        (
            "--timestep_sampling sigmoid --sigmoid_scale 2 --flow_shift 3",
            NoiseLevelTimesteps(density=LogitNormalTimesteps(std=2.0)),
        ),
        (
            "--timestep_sampling uniform --flow_shift 3",
            NoiseLevelTimesteps(density=UniformTimesteps()),
        ),
        (
            "--training_shift 2 --flow_shift 3 --weighting_scheme logit_normal --logit_mean 1 "
            "--max_timestep 500",
            NoiseLevelTimesteps(density=LogitNormalTimesteps(mean=1.0), shift=2.0, high=0.5),
        ),
        ("--timestep_sampling shift --discrete_flow_shift 3", LogitNormalTimesteps()),
        (
            "--weighting_scheme logit_normal --logit_mean 0.5 --logit_std 0.8",
            LogitNormalTimesteps(mean=-0.5, std=0.8),
        ),
        (
            "--timestep_density stratified_logit_normal:mean=1.0",
            LogitNormalTimesteps(mean=1.0, stratified=True),
        ),
        ("--weighting_scheme mode --mode_scale 0.8", ModeTimesteps(scale=0.8)),
        ("--weighting_scheme none", UniformTimesteps()),
        ("--p_mean -0.4 --p_std 1", LogNormalSigmaTimesteps(mean=-0.4, std=1.0)),
        ("--timestep_density beta:a=2,b=3", BetaTimesteps(a=2, b=3)),
        ("--min_timestep 200 --max_timestep 800", UniformTimesteps().within(200, 799)),
        ("--min_timestep 200", UniformTimesteps().within(200, 999)),
        (
            "--flow_shift 3 --max_timestep 500",
            UniformTimesteps().within(0.0, 0.25),
        ),  # where sigma is 0.5
        ("--min_timestep 200 --max_timestep 201", ListedTimesteps(listed=(200,))),
        (
            "--reversed_timesteps --timestep_density logit_normal:mean=1.0",
            LogitNormalTimesteps(mean=1.0).reversed(),
        ),
        (
            "--timestep_density loss_second_moment:bins=10 --min_timestep 200 --max_timestep 800",
            LossSecondMoment(bins=10, density=UniformTimesteps().within(200, 799)),
        ),
    ],
)
def test_densities(flags: str, density: Timesteps) -> None:
    assert noising_from_arguments(parse(*flags.split())).timesteps == density


def test_a_range_of_timesteps_is_that_of_sd_scripts() -> None:
    noising = noising_from_arguments(parse("--min_timestep", "200", "--max_timestep", "203"))
    t = noising.draw(range(200), (1,), step=0, total=200).t
    assert set(t.tolist()) == {200, 201, 202}  # randint(200, 203)


@pytest.mark.parametrize(
    ("flags", "noise"),
    [
        ("--noise_offset 0", Gaussian()),
        ("--noise_offset 0.05 --noise_offset_random_strength", Offset(0.05, random_strength=True)),
        ("--noise_offset 0.05 --noise_offset_probability 0.5", Offset(0.05, probability=0.5)),
        ("--noise_offset 0.05 --adaptive_noise_scale 0.01", AdaptiveOffset(0.05, 0.01)),
        ("--multires_noise_iterations 8 --multires_noise_discount 0.4", Pyramid(8, 0.4)),
        (
            "--ip_noise_gamma 0.05 --ip_noise_gamma_random_strength",
            InputPerturbation(0.05, random_strength=True),
        ),
        (
            "--input_perturbation 0.1 --input_perturbation_steps 100",
            InputPerturbation(0.1, decay_steps=100),
        ),
        ("--immiscible", Immiscible()),
        ("--noise offset:strength=0.2 immiscible", Chain((Offset(0.2), Immiscible()))),
        (
            "--noise_offset 0.05 --input_perturbation 0.1",
            Chain((Offset(0.05), InputPerturbation(0.1))),
        ),
        ("--noise pyramid --noise_offset 0.05", Chain((Pyramid(), Offset(0.05)))),
    ],
)
def test_noises(flags: str, noise: Noise) -> None:
    assert noising_from_arguments(parse(*flags.split())).noise == noise


@pytest.mark.parametrize(
    ("flags", "loss"),
    [
        ("--loss_type l1", L1()),
        (
            "--loss_type huber --huber_c 0.2 --huber_schedule exponential",
            PseudoHuber(c=0.2, schedule="exponential"),
        ),
        ("--loss_type smooth_l1 --huber_schedule snr", SmoothL1(schedule="snr")),
        ("--loss_type torch_huber", Huber()),
        ("--loss_type huber --huber_c 0.2", PseudoHuber(c=0.2)),
        (
            "--loss_type huber --huber_schedule constant --huber_scale 2",
            PseudoHuber(schedule="constant", scale=2.0),
        ),
    ],
)
def test_losses(flags: str, loss: Loss) -> None:
    assert noising_from_arguments(parse(*flags.split())).loss == loss


@pytest.mark.parametrize(
    ("flags", "schedule"),
    [
        (
            "--v_parameterization --zero_terminal_snr",
            BASE.with_prediction("v_prediction").zero_terminal_snr(),
        ),
        ("--noise_schedule karras:sigma_max=90", NoiseSchedule.karras(sigma_max=90)),
        ("--noise_schedule flow:shift=2", NoiseSchedule.flow(2.0)),
        ("--discrete_flow_shift 2", NoiseSchedule.flow(2.0)),
        ("--schedule_shift 2", BASE.shifted(2.0)),
        (
            "--prediction_type karras --sigma_data 0.7",
            BASE.with_prediction({"name": "karras", "sigma_data": 0.7}),
        ),
        (
            "--noise_schedule scaled_linear --beta_end 0.013",
            NoiseSchedule.scaled_linear(beta_end=0.013),
        ),
    ],
)
def test_schedules(flags: str, schedule: NoiseSchedule) -> None:
    assert schedule_from_arguments(parse(*flags.split())) == schedule


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.what)
def test_every_name_and_every_flag_is_known_to_the_registry(kind: Kind) -> None:
    by_name = {kind.flag, *(name for flag in kind.flags for name in flag.names)}
    for name in kind.registry:
        needs = [
            p
            for p in inspect.signature(kind.registry[name]).parameters.values()
            if p.default is p.empty
        ]
        if not needs:
            meant = (kind.also or {}).get(name, name)
            said = read_options(parse(kind.flag, name), kind.options)
            assert kind.chosen(said) == [kind.registry[meant]()]
    for flag in kind.flags:
        assert (
            flag.help and set(flag.schemes) <= set(kind.registry) and flag.needs in (None, *by_name)
        )
        for scheme in flag.schemes:
            assert (
                flag.field is None
                or flag.field in inspect.signature(kind.registry[scheme]).parameters
            )
    assert set((kind.also or {}).values()) <= set(kind.registry)


def test_the_base_models_schedule_is_kept_where_flags_are_silent() -> None:
    base = NoiseSchedule.linear(beta_end=0.03, prediction="v_prediction")
    assert schedule_from_arguments(parse(), base) == base
    assert schedule_from_arguments(parse("--beta_end", "0.01"), base) == NoiseSchedule.linear(
        beta_end=0.01, prediction="v_prediction"
    )
    assert (
        schedule_from_arguments(parse("--rescale_betas_zero_snr"), base) == base.zero_terminal_snr()
    )
    assert schedule_from_arguments(parse("--flow_shift", "3"), base) == NoiseSchedule.flow(3.0)
    karras = NoiseSchedule.karras(sigma_data=0.7)
    assert schedule_from_arguments(parse("--prediction_type", "karras"), karras) == karras


def test_flow() -> None:
    assert schedule_from_arguments(parse("--flow_shift", "3")) == NoiseSchedule.flow(3.0)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--rescale_betas_zero_snr"], ["epsilon", "ill-posed", "--prediction_type v_prediction"]),
        (
            ["--zero_terminal_snr"],
            ["--zero_terminal_snr", "ill-posed", "--prediction_type v_prediction"],
        ),
        (
            ["--rescale_betas_zero_snr", "--flow_shift", "3"],
            ["--rescale_betas_zero_snr", "--flow_shift", "leave it out"],
        ),
        (["--snr_gamma", "0"], ["gamma must be positive", "0.0"]),
        (["--snr_gamma", "-1"], ["gamma must be positive", "-1.0"]),
        (["--snr_gamma", "5", "--loss_weighting", "snr"], ["--snr_gamma", "--loss_weighting snr"]),
        (["--noise_offset", "-0.1"], ["noise offset", "-0.1"]),
        (["--noise_offset", "0.1", "--noise", "gaussian"], ["--noise_offset", "--noise gaussian"]),
        (["--beta_end", "2"], ["betas must lie in (0, 1]", "beta_end"]),
        (["--num_train_timesteps", "1"], ["num_train_timesteps", "at least 2"]),
        (["--flow_shift", "0"], ["shift must be positive"]),
        (["--flow_shift", "3", "--beta_end", "0.1"], ["--beta_end", "--flow_shift"]),
        (["--prediction_type", "karras"], ["karras needs --sigma_data", "0.5"]),
        (["--sigma_data", "0.5"], ["--sigma_data 0.5", "epsilon", "uniform", "leave it out"]),
        (
            ["--min_timestep", "500", "--max_timestep", "500"],
            ["--min_timestep must be below", "500 and 500"],
        ),
        (["--min_timestep", "900", "--max_timestep", "2000"], ["900 and 2000", "0 ... 999"]),
        (["--loss_weighting", "min_snrr"], ["min_snrr", "did you mean 'min_snr'"]),
        (["--loss_weighting", "min_snr:gama=5"], ["gama", "gamma"]),
        (["--timestep_density", "logitnormal"], ["logitnormal", "logit_normal"]),
        (["--noise", "piramid"], ["piramid", "pyramid"]),
        (["--loss_type", "hubber"], ["hubber", "huber"]),
        (
            ["--snr_gamma", "5", "--p2_gamma", "1"],
            ["--snr_gamma", "--p2_gamma", "give one of the two"],
        ),
        (
            ["--weighting_scheme", "mode", "--timestep_density", "beta"],
            ["--weighting_scheme mode", "--timestep_density beta"],
        ),
        (
            ["--logit_mean", "0", "--timestep_density", "mode"],
            ["--logit_mean", "--timestep_density mode"],
        ),
        (["--huber_c", "0.1", "--loss_type", "l2"], ["--huber_c", "--loss_type l2"]),
        (["--schedule_shift", "-1"], ["-1"]),
        (
            ["--v_parameterization", "--prediction_type", "epsilon"],
            ["--v_parameterization", "--prediction_type epsilon"],
        ),
    ],
)
def test_contradictions_name_what_got_and_mend(flags: list[str], words: list[str]) -> None:
    with pytest.raises(ValueError) as error:
        noising_from_arguments(parse(*flags))
    assert all(word in str(error.value) for word in words), str(error.value)


def test_unknown_choice_is_argparse_error(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse("--prediction_type", "velocity")
    assert "v_prediction" in capsys.readouterr().err
