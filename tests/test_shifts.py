"""Shifted and truncated schedules: what they promise of their numbers, and agreement with the peers
that shift.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers.schedulers.scheduling_ddim_cogvideox import CogVideoXDDIMScheduler
from diffusers.schedulers.scheduling_flow_match_euler_discrete import (
    FlowMatchEulerDiscreteScheduler,
)

from alphabar.noising import (
    CURVES,
    Discrete,
    Flow,
    Karras,
    NoiseSchedule,
    Noising,
    Truncated,
    resolution_shift,
    token_shift,
)
from alphabar.noising.curves.truncated import truncate
from alphabar.sampling import GRIDS, Sampler, make_knots

SD = NoiseSchedule.scaled_linear(prediction="v_prediction")
SCHEDULES = {name: NoiseSchedule(kind(), "v_prediction") for name, kind in CURVES.items()} | {
    "ztsnr": SD.zero_terminal_snr(),
    "part": NoiseSchedule.flow().truncated(0.25, 0.75),
}
schedules = pytest.mark.parametrize("name", SCHEDULES)


def times(schedule: NoiseSchedule, count: int = 501) -> torch.Tensor:
    return torch.linspace(schedule.curve.t_min, schedule.curve.t_max, count, dtype=torch.float64)


# shifts


@schedules
@pytest.mark.parametrize("factor", [0.25, 1.7, 12.0])
def test_a_shift_multiplies_the_ratio_of_noise_and_signal(name: str, factor: float) -> None:
    """At the same place of the range; and the path is the same: α and σ are those of its log SNR."""
    schedule = SCHEDULES[name]
    shifted = schedule.shifted(factor)
    t, moved = times(schedule), times(shifted)
    if name == "karras":
        assert torch.allclose(moved, factor * t, rtol=1e-12)
        moved = factor * t.clamp(max=schedule.curve.t_max)
    else:
        assert torch.equal(moved, t)
    before, after = schedule.log_snr(t[1:-1]), shifted.log_snr(moved[1:-1])
    assert float((after - before + 2 * math.log(factor)).abs().max()) < 1e-11
    alpha, sigma = shifted.curve.alpha_sigma_at(after)
    assert torch.allclose(alpha, shifted.alpha(moved[1:-1]), rtol=1e-12)
    assert torch.allclose(sigma, shifted.sigma(moved[1:-1]), rtol=1e-12)
    if schedule.has_zero_terminal_snr:
        assert shifted.alpha(moved[-1:]).item() == 0.0
        assert shifted.has_zero_terminal_snr


@schedules
def test_shifts_multiply_and_are_stored(name: str) -> None:
    schedule = SCHEDULES[name]
    twice, once = schedule.shifted(2.0).shifted(1.5), schedule.shifted(3.0)
    assert torch.allclose(twice.sigma(times(twice)), once.sigma(times(once)), rtol=1e-12)
    assert once.fingerprint != schedule.fingerprint
    assert once.prediction == schedule.prediction
    again = NoiseSchedule.from_config(json.loads(json.dumps(twice.to_config())))
    assert again == twice
    assert again.fingerprint == twice.fingerprint
    assert schedule.shifted(1.0).fingerprint == schedule.fingerprint


def test_the_static_shift_of_a_flow() -> None:
    s, sigma = 2.5, torch.linspace(0, 1, 101, dtype=torch.float64)
    ours = NoiseSchedule.flow().shifted(s)
    assert ours == NoiseSchedule.flow(shift=2.5)
    assert torch.allclose(ours.sigma(sigma), s * sigma / (1 + (s - 1) * sigma), rtol=0, atol=1e-15)


def test_shift_and_zero_terminal_snr_act_in_the_order_of_the_calls() -> None:
    """Each on the schedule as it is: algorithm 1 keeps the first α of what it is given, a shift the
    SNR but for the factor.
    """
    scale, t = 3.0, torch.arange(1000, dtype=torch.float64)
    shift_first = SD.shifted(scale**0.5).zero_terminal_snr()
    rescale_first = SD.zero_terminal_snr().shifted(scale**0.5)
    assert shift_first.has_zero_terminal_snr
    assert rescale_first.has_zero_terminal_snr
    assert float((shift_first.alpha(t) - rescale_first.alpha(t)).abs().max()) > 0.003
    alpha = SD.shifted(scale**0.5).alpha(t)
    expected = (alpha - alpha[-1]) * alpha[0] / (alpha[0] - alpha[-1])
    assert torch.allclose(shift_first.alpha(t), expected, rtol=0, atol=1e-14)
    snr = SD.zero_terminal_snr().snr(t) / scale
    assert torch.allclose(rescale_first.snr(t), snr, rtol=1e-11, atol=0)
    # a shift after the rescaling, and another rescaling, which finds nothing to do
    assert rescale_first.zero_terminal_snr() == rescale_first
    late = Discrete(rescaled_snr_shift_scale=3.0)
    assert torch.allclose(
        late.zero_terminal_snr().alpha(t), shift_first.alpha(t), rtol=0, atol=1e-14
    )


@pytest.mark.parametrize("zero_snr", [False, True])
@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_cogvideox(scale: float, zero_snr: bool) -> None:
    peer = CogVideoXDDIMScheduler(snr_shift_scale=scale, rescale_betas_zero_snr=zero_snr)
    ours = NoiseSchedule.scaled_linear(prediction="v_prediction").shifted(scale**0.5)
    ours = ours.zero_terminal_snr() if zero_snr else ours
    assert float((ours.alphas_cumprod - peer.alphas_cumprod.double()).abs().max()) < 1e-14


def test_resolution() -> None:
    # 2301.11093, eq. 4: logsnr_shift_cosine(t, d, 64) = logsnr_cosine(t) + 2 log(64 / d)
    t = torch.linspace(0.01, 0.99, 99, dtype=torch.float64)
    shifted = NoiseSchedule.cosine().shifted_for_resolution(256, 64)
    assert torch.allclose(
        shifted.log_snr(t),
        -2 * torch.tan(math.pi * t / 2).log() + 2 * math.log(64 / 256),
        atol=1e-12,
    )
    # 2403.03206, eq. 23: t_m = sqrt(m / n) t_n / (1 + (sqrt(m / n) - 1) t_n)
    root = math.sqrt(1024 * 1536 / (512 * 512))
    assert resolution_shift((1024, 1536), 512) == resolution_shift((128, 192), 64) == root
    sigma = NoiseSchedule.flow().shifted_for_resolution((1024, 1536), 512).sigma(t)
    assert torch.allclose(sigma, root * t / (1 + (root - 1) * t), rtol=0, atol=1e-15)


@pytest.mark.parametrize("kind", ["exponential", "linear"])
@pytest.mark.parametrize("tokens", [256, 1000, 4096, 8192])
def test_dynamic_shifting_is_that_of_diffusers(tokens: int, kind: str) -> None:
    peer: Any = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, time_shift_type=kind)
    slope = (1.15 - 0.5) / (4096 - 256)  # calculate_shift of its Flux pipeline
    peer.set_timesteps(
        sigmas=np.linspace(1, 1 / 20, 20).tolist(), mu=tokens * slope + 0.5 - slope * 256
    )
    ours = NoiseSchedule.flow().shifted_for_tokens(tokens, kind=kind)
    t = torch.linspace(1, 1 / 20, 20, dtype=torch.float64)
    assert float((ours.sigma(t) - peer.sigmas[:-1].double()).abs().max()) < 1e-6
    assert float((ours.curve.timestep(t) - peer.timesteps.double()).abs().max()) < 1e-3
    assert ours.curve == Flow(shift=token_shift(tokens, kind=kind))


BAD: list[tuple[Any, str]] = [
    (lambda: SD.shifted(0.0), "^factor must be positive and finite, got 0.0; 1 changes nothing$"),
    (lambda: SD.shifted(float("nan")), "^factor must be positive and finite, got nan"),
    (
        lambda: resolution_shift(0, 64),
        r"^size must be a positive side or \(height, width\), got 0; e\.g\. 1024",
    ),
    (
        lambda: resolution_shift(64, (64, 64, 3)),
        r"^base_size must be a positive side or \(height, width\), got \(64, 64, 3\)",
    ),
    (
        lambda: token_shift(0),
        "^need tokens >= 1 and 0 < base_tokens < max_tokens, got 0, 256 and 4096; ",
    ),
    (
        lambda: token_shift(9, 256, 256),
        "^need tokens >= 1 and 0 < base_tokens < max_tokens, got 9, 256 and 256; ",
    ),
    (lambda: token_shift(9, kind="cubic"), "^unknown kind of shift 'cubic'; 'exponential' takes"),
    (
        lambda: token_shift(1, base_shift=-1.0, kind="linear"),
        "^the shift must be positive and finite, got -",
    ),
    (
        lambda: SD.truncated(t_max=5, log_snr_min=0.0),
        "^t_max and log_snr_min are the same end of the schedule; give one",
    ),
    (
        lambda: SD.truncated(t_min=500, log_snr_min=8.0),
        "^a part of this discrete schedule needs 0 <= first < last",
    ),
    (lambda: SD.zero_terminal_snr().with_prediction("epsilon"), "ill-posed"),
]


@pytest.mark.parametrize("number", range(len(BAD)))
def test_bad_input(number: int) -> None:
    call, message = BAD[number]
    with pytest.raises(ValueError, match=message):
        call()


# parts

WHOLE = {
    "ztsnr": (SD.zero_terminal_snr(), 300.0, 999.0),
    "discrete": (SD, 0.0, 199.0),
    "flow": (NoiseSchedule.flow(shift=3.0), 0.4, 1.0),
    "flow_low": (NoiseSchedule.flow(shift=3.0), 0.0, 0.4),
    "variance_preserving": (NoiseSchedule.variance_preserving(), 0.3, 0.9),
    "sub_variance_preserving": (NoiseSchedule.sub_variance_preserving(), 0.3, 0.9),
    "cosine": (NoiseSchedule.cosine(), 0.1, 0.8),
    "variance_exploding": (NoiseSchedule.variance_exploding(), 0.1, 0.8),
    "karras": (NoiseSchedule.karras(), 0.5, 10.0),
}
parts = pytest.mark.parametrize("name", WHOLE)


@parts
def test_a_time_of_a_part_means_what_it_meant(name: str) -> None:
    whole, first, last = WHOLE[name]
    part = whole.truncated(first, last)
    t = torch.linspace(first, last, 201, dtype=torch.float64)
    assert (part.curve.t_min, part.curve.t_max) == (first, last)
    for value in ("alpha", "sigma", "log_snr", "noise_level", "timestep", "input_scale"):
        assert torch.equal(getattr(part.curve, value)(t), getattr(whole.curve, value)(t)), value
    beyond = torch.tensor([-50.0, 50.0], dtype=torch.float64)
    assert part.time(beyond).tolist() == pytest.approx([last, first], abs=1e-7)
    with pytest.raises(ValueError, match="is outside"):
        part.alpha(torch.tensor([first - 0.01]))
    assert NoiseSchedule.from_config(json.loads(json.dumps(part.to_config()))) == part
    assert part.fingerprint != whole.fingerprint
    assert whole.truncated() == whole == whole.truncated(whole.curve.t_min, whole.curve.t_max)
    assert part.with_prediction("sample").curve == part.curve


@parts
def test_training_stays_inside_and_sees_both_ends(name: str) -> None:
    whole, first, last = WHOLE[name]
    part = whole.truncated(first, last)
    noised = Noising(part, timesteps="stratified", seed=3)(torch.zeros(4000, 1), step=0)
    assert noised.t.dtype == (torch.int64 if part.curve.is_discrete else torch.float32)
    near = 1.0 if part.curve.is_discrete else 2e-3 * (last - first)
    assert first <= float(noised.t.min()) <= first + near
    assert last - near <= float(noised.t.max()) <= last + 1e-6
    index = torch.arange(part.num_train_timesteps, dtype=torch.float64)
    assert part.curve.time_at_index(index)[-1].item() == last
    if part.curve.is_discrete:
        assert part.num_train_timesteps == last - first + 1
        assert torch.equal(part.curve.time_at_index(index), index + first)
        assert part.curve.time_at_index(torch.arange(2)).dtype == torch.int64


FIXED_RANGE = ("align_your_steps", "vp", "linear_quadratic")  # which lay noise levels of their own


@parts
@pytest.mark.parametrize("grid", [grid for grid in GRIDS if grid not in FIXED_RANGE])
def test_grids_stay_inside(name: str, grid: str) -> None:
    whole, first, last = WHOLE[name]
    part = whole.truncated(first, last)
    knots = make_knots(part, 6, grid, final="sigma_min")
    low, high = part.curve.timestep(torch.tensor([first, last], dtype=torch.float64)).tolist()
    slack = 1e-9 * high
    assert all(low - slack <= knot.timestep <= high + slack for knot in knots)


class Scaled(Flow):
    def input_scale(self, t: torch.Tensor) -> torch.Tensor:
        return 1 + t


def test_a_part_of_any_curve_is_fed_as_the_whole() -> None:
    t = torch.tensor([0.25, 0.5], dtype=torch.float64)
    assert torch.equal(Truncated(Scaled(), 0.25, 1.0).input_scale(t), 1 + t)


def test_levels_of_a_part_of_a_flow_are_sigmas() -> None:
    part = NoiseSchedule.flow().truncated(0.4, 0.9)
    knots = make_knots(part, 5, "karras", range_from="trailing")
    assert part.curve.is_flow
    assert [knots[0].sigma, knots[-2].sigma] == pytest.approx([0.9, 0.5])


def test_the_rate_of_a_shifted_sde_is_not_taken_for_the_plain_one() -> None:
    shifted = NoiseSchedule.variance_preserving(prediction="score").shifted(2.0)
    with pytest.raises(
        ValueError,
        match="got a shifted variance_preserving schedule; use predictor='reverse_diffusion'",
    ):
        Sampler(shifted, "score_sde_vp", steps=10, predictor="euler_maruyama")


def test_timesteps_given_by_hand_are_times_of_the_part() -> None:
    part = SD.truncated(300, 999)
    knots = make_knots(part, 3, timesteps=[999, 600, 300])
    whole = make_knots(SD, 3, timesteps=[999, 600, 300])
    assert knots == whole
    between = make_knots(part, 3, "linspace", interpolation="sigma")
    assert [k.timestep for k in between[:-1]] == [999.0, 649.5, 300.0]
    low, high = (float(SD.sigma_ve(torch.tensor([t], dtype=torch.float64))) for t in (649, 650))
    assert between[1].sigma_ve == pytest.approx((low + high) / 2, rel=1e-12)


def test_two_experts_sample_as_one() -> None:
    """What an expert hands over, the refiner takes up: with a deterministic first-order method, the
    whole run.
    """
    x, network = torch.linspace(-2, 2, 6, dtype=torch.float64).view(2, 3), lambda x, t: 0.3 * x
    knots = [999, 800, 600, 400, 200, 100]
    whole = Sampler(SD, "ddim", 6, timesteps=knots)(network, x)
    expert, refiner = SD.truncated(t_min=400), SD.truncated(t_max=400)
    middle = Sampler(expert, "ddim", 3, timesteps=knots[:3], final="sigma_min")(network, x)
    assert torch.allclose(
        Sampler(refiner, "ddim", 3, timesteps=knots[3:])(network, middle), whole, rtol=1e-12
    )


def test_ends_by_log_snr() -> None:
    flow = NoiseSchedule.flow().truncated(log_snr_min=0.0, log_snr_max=2 * math.log(4))
    assert (flow.curve.t_min, flow.curve.t_max) == pytest.approx((0.2, 0.5))
    log_snr = SD.log_snr(torch.tensor([250.0, 700.0], dtype=torch.float64)).tolist()
    exact = SD.truncated(log_snr_max=log_snr[0], log_snr_min=log_snr[1])
    assert (exact.curve.t_min, exact.curve.t_max) == (250, 700)
    inside = SD.truncated(log_snr_max=log_snr[0] - 1e-4, log_snr_min=log_snr[1] + 1e-4)
    assert (inside.curve.t_min, inside.curve.t_max) == (251, 699)


def test_transformations_of_a_part() -> None:
    part = NoiseSchedule.flow().truncated(0.25, 0.75)
    assert part.shifted(3.0) == NoiseSchedule.flow(shift=3.0).truncated(0.25, 0.75)
    assert part.truncated(0.5, 0.75) == NoiseSchedule.flow().truncated(0.5, 0.75)
    assert SD.truncated(500, 999).zero_terminal_snr() == SD.zero_terminal_snr().truncated(500, 999)
    assert NoiseSchedule.karras().truncated(0.5, 10.0).curve == Karras(
        sigma_min=0.5, sigma_max=10.0
    )
    # epsilon is ill-posed at zero SNR, and not on a part without it
    zero = NoiseSchedule(truncate(SD.zero_terminal_snr().curve, 0, 998), "epsilon")
    assert zero.prediction.name == "epsilon"
    assert isinstance(zero.curve, Truncated)


def test_what_a_part_is_is_said(tmp_path: Path) -> None:
    part = SD.shifted(3**0.5).truncated(0, 199)
    assert str(part).startswith(
        "truncated(curve=discrete(num_train_timesteps=1000, beta_schedule=scaled_linear, "
    )
    assert "snr_shift_scale=" in str(part)
    assert "first=0.0, last=199.0) with v_prediction [" in str(part)
    assert "snr_shift_scale" not in str(SD)
    with pytest.raises(
        ValueError, match=r"^diffusers has no scheduler config for a truncated curve$"
    ):
        part.save_pretrained(tmp_path)
