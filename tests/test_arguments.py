"""Command-line flags: every value arrives, and contradictions fail before any model exists."""

import argparse

import pytest

from alphabar.noising import MinSNR, NoiseSchedule, Offset, Uniform
from alphabar.training import add_noising_arguments, noising_from_arguments, schedule_from_arguments


def parse(*flags: str) -> argparse.Namespace:
    return add_noising_arguments(argparse.ArgumentParser()).parse_args(flags)


def test_defaults_are_stable_diffusion_with_the_plain_loss() -> None:
    noising = noising_from_arguments(parse())
    assert noising.schedule == NoiseSchedule.scaled_linear()
    assert noising.weighting == Uniform()
    assert noising.noise.name == "gaussian"
    assert not noising.timesteps.stratified


def test_every_flag_arrives() -> None:
    flags = (
        "--beta_schedule linear --beta_start 0.001 --beta_end 0.03 --num_train_timesteps 500 --prediction_type sample"
    )
    flags += " --rescale_betas_zero_snr --snr_gamma 3 --loss_weight_floor 0.1 --timestep_sampling stratified --noise_offset 0.05"
    noising = noising_from_arguments(parse(*flags.split(), "--noise_seed", "7"))
    assert noising.schedule == NoiseSchedule.linear(0.001, 0.03, 500, "sample").zero_terminal_snr()
    assert noising.weighting == MinSNR(gamma=3.0, floor=0.1)
    assert noising.timesteps.stratified
    assert noising.noise == Offset(0.05)
    assert noising.seed == 7


def test_flow() -> None:
    assert schedule_from_arguments(parse("--flow_shift", "3")) == NoiseSchedule.flow(3.0)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--rescale_betas_zero_snr"], ["epsilon", "ill-posed", "with_prediction('v_prediction')"]),
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
