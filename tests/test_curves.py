"""Curves: exact values from 50-digit arithmetic, the inverse, dtypes, identity, and agreement with
diffusers' tables.
"""

from __future__ import annotations

import copy
import json
import math
import pickle
from dataclasses import FrozenInstanceError, fields, replace
from decimal import Decimal, localcontext
from typing import Any

import pytest
import torch
from diffusers.schedulers.scheduling_ddim import DDIMScheduler, rescale_zero_terminal_snr
from diffusers.schedulers.scheduling_ddpm import DDPMScheduler
from diffusers.schedulers.scheduling_heun_discrete import HeunDiscreteScheduler
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor

from alphabar.noising import (
    BETA_SCHEDULES,
    CURVES,
    Curve,
    Discrete,
    Flow,
    Karras,
    NoiseSchedule,
    Truncated,
)
from alphabar.noising.curves import curve_from_config

PLAIN = [Discrete(name) for name in BETA_SCHEDULES]
RESCALED = [curve.zero_terminal_snr() for curve in PLAIN]
FLOWS = [Flow(shift=shift) for shift in (0.5, 1.0, 3.0)]
GIVEN = Discrete(trained_betas=[0.1, 0.2, 0.05, 0.9])
SHIFT = 1.7
SHIFTED = [
    *(
        curve.shifted(SHIFT)
        for curve in [PLAIN[1], RESCALED[1], PLAIN[1].shifted(0.6).zero_terminal_snr()]
    ),
    *(kind().shifted(SHIFT) for kind in CURVES.values()),
]
PARTS = [
    Truncated(PLAIN[1], 0, 199),
    Truncated(RESCALED[1], 300, 999),
    Truncated(Flow(shift=3.0), 0.25, 1.0),
    *(
        Truncated(kind(), 0.125, 0.75)
        for name, kind in CURVES.items()
        if name not in ("discrete", "karras")
    ),
]
CURVE_LIST: list[Curve] = list(
    dict.fromkeys(
        [*PLAIN, *RESCALED, GIVEN, *FLOWS, *(kind() for kind in CURVES.values()), *SHIFTED, *PARTS]
    )
)
DISCRETE = [curve for curve in CURVE_LIST if isinstance(curve, Discrete)]


def name_of(curve: Curve) -> str:
    if isinstance(curve, Discrete) and curve.snr_shift_scale == curve.rescaled_snr_shift_scale == 1:
        return curve.beta_schedule + "-ztsnr" * curve.rescale_betas_zero_snr
    return f"{curve.kind}-{CURVE_LIST.index(curve)}"


curves = pytest.mark.parametrize("curve", CURVE_LIST, ids=name_of)
discrete = pytest.mark.parametrize("curve", DISCRETE, ids=name_of)


def many_times(curve: Curve, count: int = 4001) -> Tensor:
    """Times from one end to the other that are not all indices."""
    return torch.linspace(curve.t_min, curve.t_max, count, dtype=torch.float64)


def exact_table(curve: Discrete) -> tuple[list[float], list[float]]:
    """α and σ from the betas in 50-digit arithmetic: Ho et al. eq. 4, Lin et al. algorithm 1, and
    SNR / scale before and after.
    """
    with localcontext() as context:
        context.prec = 50
        alpha_bar, product = [], Decimal(1)
        for beta in curve.betas().tolist():
            product *= 1 - Decimal(beta)
            alpha_bar.append(product)
        alpha = [(a / (a + Decimal(curve.snr_shift_scale) * (1 - a))).sqrt() for a in alpha_bar]
        if curve.rescale_betas_zero_snr:
            first, last = alpha[0], alpha[-1]
            alpha = [(a - last) * first / (first - last) for a in alpha]
        scale = Decimal(curve.rescaled_snr_shift_scale)
        alpha = [(a * a / (a * a + scale * (1 - a * a))).sqrt() for a in alpha]
        return [float(a) for a in alpha], [float((1 - a * a).sqrt()) for a in alpha]


def relative(a: Tensor, b: Tensor) -> float:
    return float(((a - b).abs() / b.abs().clamp(min=1e-300)).max())


# values


@discrete
def test_table_is_exact(curve: Discrete) -> None:
    index = torch.arange(curve.num_train_timesteps)
    alpha, sigma = (torch.tensor(column, dtype=torch.float64) for column in exact_table(curve))
    assert relative(curve.alpha(index.double()), alpha) < 1e-12
    assert relative(curve.sigma(index.double()), sigma) < 1e-12


@pytest.mark.parametrize("curve", RESCALED, ids=name_of)
def test_zero_terminal_snr_is_exactly_zero_and_keeps_the_first(curve: Discrete) -> None:
    plain, last = (
        replace(curve, rescale_betas_zero_snr=False),
        torch.tensor(curve.num_train_timesteps - 1),
    )
    for t in (last, last.float(), last.double()):
        assert curve.alpha(t).item() == 0.0
        assert curve.sigma(t).item() == 1.0
        assert curve.snr(t).item() == 0.0
    assert plain.alpha(last).item() > 0.0
    first = torch.zeros(1, dtype=torch.float64)
    assert curve.alpha(first).item() == pytest.approx(plain.alpha(first).item(), rel=4e-16)
    assert curve.sigma(first).item() == pytest.approx(plain.sigma(first).item(), rel=1e-14)


def test_zero_terminal_snr_twice_is_once() -> None:
    once = Discrete("linear", 0.0001, 0.02).zero_terminal_snr()
    assert once.zero_terminal_snr() is once
    assert Flow().zero_terminal_snr() == Flow()
    ends_in_one = Discrete(trained_betas=[0.1, 1.0])
    assert ends_in_one.zero_terminal_snr() is ends_in_one


@discrete
def test_discrete_curves_preserve_variance(curve: Discrete) -> None:
    t = many_times(curve)
    assert float((curve.alpha(t) ** 2 + curve.sigma(t) ** 2 - 1).abs().max()) < 1e-15 * 4


@pytest.mark.parametrize("shift", [0.25, 1.0, 3.0, 12.0])
def test_flow_is_straight_and_shifted(shift: float) -> None:
    curve, t = Flow(shift=shift), torch.linspace(0, 1, 101, dtype=torch.float64)
    sigma = shift * t / (1 + (shift - 1) * t)
    assert torch.allclose(curve.sigma(t), sigma, rtol=0, atol=1e-15)
    assert torch.allclose(curve.alpha(t), 1 - sigma, rtol=0, atol=1e-15)
    assert torch.equal(curve.timestep(t), 1000 * curve.sigma(t))
    assert (curve.alpha(t)[-1], curve.sigma(t)[-1], curve.sigma(t)[0]) == (0, 1, 0)


def test_flow_shifts_compose() -> None:
    t = torch.linspace(0, 1, 101, dtype=torch.float64)
    twice = Flow(shift=2.0).sigma(Flow(shift=3.0).sigma(t))
    assert torch.allclose(twice, Flow(shift=6.0).sigma(t), rtol=0, atol=1e-15)


@curves
def test_derived_quantities(curve: Curve) -> None:
    t = many_times(curve, 301)[1:-1]
    alpha, sigma = curve.alpha(t), curve.sigma(t)
    assert relative(curve.snr(t), alpha**2 / sigma**2) < 1e-14
    assert relative(curve.sigma_ve(t), sigma / alpha) < 1e-14
    assert float((curve.log_snr(t) - (alpha**2 / sigma**2).log()).abs().max()) < 1e-12


@curves
def test_noise_strictly_rises(curve: Curve) -> None:
    t = many_times(curve)
    log_snr = curve.log_snr(t)
    assert bool((log_snr.diff() < 0).all())
    assert bool((curve.alpha(t).diff() <= 0).all())  # constant where variance explodes
    assert bool((curve.sigma(t).diff() > 0).all())


@discrete
def test_log_snr_is_linear_between_timesteps(curve: Discrete) -> None:
    whole = torch.arange(curve.num_train_timesteps, dtype=torch.float64)
    log_snr = curve.log_snr(whole)
    f = 0.3
    between = curve.log_snr(whole[:-1] + f)
    expected = (1 - f) * log_snr[:-1] + f * log_snr[1:]
    usual = log_snr[1:].isfinite()
    assert float((between - expected)[usual].abs().max()) < 1e-11
    if not bool(usual.all()):  # into zero SNR, log SNR has no line: there α has
        assert curve.alpha(whole[-2:-1] + f).item() == pytest.approx(
            (1 - f) * curve.alpha(whole[-2]).item(), rel=1e-12
        )


# the inverse


@curves
def test_time_inverts_log_snr(curve: Curve) -> None:
    t = many_times(curve)
    back = curve.time(curve.log_snr(t))
    assert back.dtype == torch.float64
    assert float((back - t).abs().max()) <= 1e-9


@pytest.mark.parametrize("curve", RESCALED, ids=name_of)
def test_time_inverts_log_snr_in_the_interval_that_ends_in_zero_snr(curve: Discrete) -> None:
    t = curve.t_max - torch.cat([torch.tensor([0.0]), torch.logspace(-6, 0, 200)]).double()
    assert float((curve.time(curve.log_snr(t)) - t).abs().max()) <= 1e-9


@curves
def test_time_at_noise_level_inverts_noise_level(curve: Curve) -> None:
    t = many_times(curve)[:-1]
    assert float((curve.time_at_noise_level(curve.noise_level(t)) - t).abs().max()) <= 1e-9


@curves
def test_index_and_quantile_end_at_the_most_noise(curve: Curve) -> None:
    last = torch.tensor([curve.num_train_timesteps - 1.0], dtype=torch.float64)
    assert curve.time_at_index(last).item() == curve.t_max
    assert curve.time_at_quantile(torch.ones(1, dtype=torch.float64)).item() == curve.t_max
    u = torch.linspace(1e-6, 1, 999, dtype=torch.float64)
    assert bool((curve.time_at_quantile(u).double().diff() >= 0).all())


# dtypes


@discrete
@pytest.mark.parametrize(
    "dtype", [torch.int64, torch.int32, torch.uint8, torch.float32, torch.bfloat16, torch.float16]
)
def test_evaluation_is_float32_unless_float64_is_given(curve: Discrete, dtype: torch.dtype) -> None:
    t = torch.arange(min(200, curve.num_train_timesteps))
    exact_alpha, exact_sigma = curve.alpha(t.double()), curve.sigma(t.double())
    assert exact_alpha.dtype == exact_sigma.dtype == torch.float64
    assert torch.equal(curve.alpha(t.to(dtype)), exact_alpha.float())
    assert torch.equal(curve.sigma(t.to(dtype)), exact_sigma.float())


@curves
def test_float32_times_between_timesteps(curve: Curve) -> None:
    t = many_times(curve, 777).float()
    assert curve.alpha(t).dtype == curve.sigma(t).dtype == torch.float32
    # σ itself is steep where t is a large float32: one rounding of t, no more
    sigma = curve.sigma(t.double())
    assert float(((curve.sigma(t).double() - sigma) / sigma.clamp(min=1)).abs().max()) < 2e-6
    assert float((curve.alpha(t).double() - curve.alpha(t.double())).abs().max()) < 2e-6


@discrete
def test_sigma_is_never_zero_in_half_precision(curve: Discrete) -> None:
    t = torch.arange(min(256, curve.num_train_timesteps), dtype=torch.bfloat16)
    assert bool((curve.sigma(t).bfloat16() > 0).all())
    assert (
        float((curve.sigma(t).bfloat16().double() / curve.sigma(t.double()) - 1).abs().max())
        < 2**-8
    )


def test_bfloat16_batches_get_noise_at_the_first_timestep() -> None:
    one, t = torch.ones(1, 1, dtype=torch.bfloat16), torch.tensor([0])
    ours = NoiseSchedule.scaled_linear().add_noise(0 * one, one, t)
    assert ours.dtype == torch.bfloat16
    # and not 0, the root of 1 - ᾱ with an ᾱ in bfloat16
    assert ours.item() == pytest.approx(0.02915, rel=2**-8)


@curves
def test_shape_follows_t(curve: Curve) -> None:
    for shape in ((), (3,), (2, 5)):
        t = torch.full(shape, curve.t_max)
        assert (
            curve.alpha(t).shape
            == curve.sigma(t).shape
            == curve.log_snr(t).shape
            == torch.Size(shape)
        )


def test_training_indices_of_edm_are_spaced_as_its_sampler_s_grid() -> None:
    curve, i = Karras(num_train_timesteps=18), torch.arange(18, dtype=torch.float64)
    # 2206.00364, eq. 5
    expected = (80.0 ** (1 / 7) + i / 17 * (0.002 ** (1 / 7) - 80.0 ** (1 / 7))) ** 7
    assert torch.allclose(curve.sigma(curve.time_at_index(i)).flip(0), expected, rtol=1e-12)


# agreement with diffusers


PEERS = {"exp": (HeunDiscreteScheduler, "exp"), "laplace_diffusers": (DDPMScheduler, "laplace")}


@pytest.mark.parametrize("name", [name for name in BETA_SCHEDULES if name != "laplace"])
def test_betas_are_those_of_diffusers(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    curve, (kind, called) = Discrete(name, 0.0001, 0.02), PEERS.get(name, (DDPMScheduler, name))
    peer = kind(beta_schedule=called, beta_start=0.0001, beta_end=0.02)
    assert relative(curve.betas(), peer.betas.double()) < 1e-6  # their table is float32
    alpha_bar = curve.alpha(torch.arange(1000.0, dtype=torch.float64)) ** 2
    assert relative(alpha_bar, peer.alphas_cumprod.double()) < 3e-5
    monkeypatch.setattr(torch, "float32", torch.float64)  # and theirs in float64
    try:
        torch.set_default_dtype(torch.float64)
        betas = kind(beta_schedule=called, beta_start=0.0001, beta_end=0.02).betas
    finally:
        torch.set_default_dtype(torch.float)
    assert betas.dtype == torch.float64
    assert relative(curve.betas(), betas) < 1e-11


def test_laplace_is_that_of_the_paper() -> None:
    """Hang et al. 2407.03297: λ = μ - b sgn(0.5 - t) log(1 - 2 |t - 0.5|), where the peer's numbers
    have half of that and more.
    """
    curve, index = (
        Discrete("laplace"),
        torch.tensor([99.0, 249, 499, 749, 899], dtype=torch.float64),
    )
    exact = [
        -0.5 * math.copysign(1, 0.5 - t) * math.log(1 - 2 * abs(0.5 - t) + 1e-6)
        for t in (0.1, 0.25, 0.5, 0.75, 0.9)
    ]
    assert curve.log_snr(index).tolist() == pytest.approx(exact, abs=1e-12)
    assert Discrete("laplace_diffusers").log_snr(index)[1:3].tolist() == pytest.approx(
        [1.18, 0.88], abs=0.01
    )


@pytest.mark.parametrize("curve", RESCALED, ids=name_of)
def test_rescaling_is_that_of_diffusers(curve: Discrete) -> None:
    alpha_bar = curve.alpha(torch.arange(1000.0, dtype=torch.float64)) ** 2
    in_float64 = torch.cumprod(1 - rescale_zero_terminal_snr(curve.betas()), 0)
    assert float((alpha_bar - in_float64).abs().max()) < 1e-13
    peer = DDIMScheduler(trained_betas=curve.betas().tolist(), rescale_betas_zero_snr=True)
    assert float((alpha_bar - peer.alphas_cumprod.double()).abs().max()) < 2e-6


@given(
    name=st.sampled_from(["linear", "scaled_linear"]),
    start=st.floats(1e-6, 0.01),
    factor=st.floats(1.0, 50.0),
    count=st.integers(2, 1200),
    position=st.floats(0, 1),
)
def test_any_betas(name: str, start: float, factor: float, count: int, position: float) -> None:
    curve = Discrete(name, start, min(start * factor, 0.3), num_train_timesteps=count)
    end = torch.tensor(curve.t_max, dtype=torch.float64)
    assume(float(curve.alpha(end)) > 1e-12)
    for c in (curve, curve.zero_terminal_snr()):
        t = many_times(c, 503)
        assert bool((c.log_snr(t).diff() < 0).all())
        assert float((c.alpha(t) ** 2 + c.sigma(t) ** 2 - 1).abs().max()) < 4e-15
        inside = torch.tensor([position * c.t_max], dtype=torch.float64)
        assert float((c.time(c.log_snr(inside)) - inside).abs()) <= 1e-9 * max(1.0, c.t_max)
        assert float(c.alpha(end * 0)) == pytest.approx(
            (1 - float(curve.betas()[0])) ** 0.5, rel=1e-15
        )
    assert float(curve.zero_terminal_snr().alpha(end)) == 0.0


# identity


@curves
def test_a_curve_is_a_frozen_value(curve: Curve) -> None:
    name = fields(curve)[0].name
    with pytest.raises(FrozenInstanceError):
        setattr(curve, name, None)
    # evaluation leaves nothing behind that would break the next lines
    curve.alpha(many_times(curve, 3))
    for twin in (
        pickle.loads(pickle.dumps(curve)),
        copy.deepcopy(curve),
        curve_from_config(json.loads(json.dumps(curve.to_config()))),
    ):
        assert twin == curve
        assert hash(twin) == hash(curve)
        assert type(twin) is type(curve)


CHANGES: dict[str, dict[str, Any]] = {
    "discrete": {"beta_schedule": "linear", "beta_start": 0.001, "beta_end": 0.013, "num_train_timesteps": 10,
                 "trained_betas": (0.1, 0.2), "rescale_betas_zero_snr": True, "snr_shift_scale": 3.0,
                 "rescaled_snr_shift_scale": 3.0},
    "flow": {"shift": 2.0, "num_train_timesteps": 10},
    "variance_preserving": {"beta_min": 0.2, "beta_max": 19.0, "eps": 1e-2, "snr_shift_scale": 2.0, "num_train_timesteps": 10},
    "sub_variance_preserving": {"beta_min": 0.2, "beta_max": 19.0, "eps": 1e-2, "snr_shift_scale": 2.0, "num_train_timesteps": 10},
    "variance_exploding": {"sigma_min": 0.02, "sigma_max": 50.0, "num_train_timesteps": 10},
    "karras": {"sigma_min": 0.02, "sigma_max": 50.0, "sigma_data": 1.0, "rho": 5.0, "num_train_timesteps": 10},
    "cosine": {"log_snr_shift": 1.0, "num_train_timesteps": 10},
}  # fmt: skip


@pytest.mark.parametrize("kind", CURVES)
def test_every_field_counts(kind: str) -> None:
    curve = CURVES[kind]()
    assert set(CHANGES[kind]) == {field.name for field in fields(curve)}
    for name, value in CHANGES[kind].items():
        changed = replace(curve, **{name: value})
        assert changed != curve
        assert hash(changed) != hash(curve)
        assert (
            NoiseSchedule(changed, "sample").fingerprint
            != NoiseSchedule(curve, "sample").fingerprint
        )


def test_betas_may_be_any_sequence() -> None:
    betas = [0.1, 0.25, 0.5]
    same = {
        Discrete(trained_betas=b)
        for b in (betas, tuple(betas), torch.tensor(betas, dtype=torch.float64))
    }
    assert len(same) == 1
    assert same.pop().num_train_timesteps == 3


def test_fingerprint_is_of_the_values_not_of_the_words() -> None:
    named = NoiseSchedule.scaled_linear(prediction="v_prediction")
    listed = NoiseSchedule.from_betas(named.curve.betas(), "v_prediction")
    assert named != listed
    assert named.fingerprint == listed.fingerprint == pickle.loads(pickle.dumps(named)).fingerprint
    assert named.fingerprint != named.with_prediction("epsilon").fingerprint
    assert named.fingerprint != named.zero_terminal_snr().fingerprint


# bad input

UNKNOWN = r"^unknown beta schedule 'scaled_liner'; did you mean 'scaled_linear'\?$"
BAD_CURVES = [
    (lambda: Discrete("scaled_liner"), UNKNOWN),
    (
        lambda: Discrete("linear", 0.0, 0.02),
        r"^betas must lie in \(0, 1\], got 0.0 at index 0; check beta_start and beta_end$",
    ),
    (lambda: Discrete("linear", 0.1, 1.5), r"^betas must lie in \(0, 1\]"),
    (lambda: Discrete("linear", float("nan"), 0.1), r"^betas must lie in \(0, 1\], got nan"),
    (
        lambda: Discrete("linear", num_train_timesteps=1),
        "^num_train_timesteps must be at least 2, got 1$",
    ),
    (lambda: Discrete(trained_betas=[]), "^num_train_timesteps must be at least 2"),
    (lambda: Discrete(trained_betas=[0.1, 1.0, 0.1]), "^only the last beta may be 1"),
    (
        lambda: Flow(shift=0.0),
        "^shift must be positive and finite, got 0.0; 1 is no shift, SD3 uses 3$",
    ),
    (
        lambda: Flow().shifted(-2.0),
        "^factor must be positive and finite, got -2.0; 1 changes nothing$",
    ),
    (
        lambda: Discrete(snr_shift_scale=float("inf")),
        "^snr_shift_scale must be positive and finite, got inf; ",
    ),
    (
        lambda: Truncated(Discrete(), 0, 1000),
        "^a part of this discrete schedule needs 0 <= first < last <= 999, got 0 and 1000$",
    ),
    (
        lambda: Truncated(Discrete(), 0.5, 10),
        "^a part of a discrete schedule begins and ends at whole timesteps, got 0.5 and 10$",
    ),
    (
        lambda: Truncated(Flow(), 0.5, 0.5),
        r"^a part of this flow schedule needs 0 <= first < last <= 1, got 0\.5 and 0\.5$",
    ),
    (lambda: Truncated(Flow(), float("nan"), 0.5), "^a part of this flow schedule needs"),
    (
        lambda: Truncated(Truncated(Flow(), 0.25, 0.5), 0.0, 0.5),
        "^a part of this truncated schedule needs 0.25 <= first",
    ),
    (
        lambda: Truncated(Karras(), 1.0, 2.0),
        "^a karras curve has no part but another range of its own",
    ),
    (
        lambda: Truncated(RESCALED[0], 0, 500).zero_terminal_snr(),
        r"call zero_terminal_snr\(\) before truncated\(\)$",
    ),
    (
        lambda: curve_from_config({"kind": "truncated"}),
        r"^a truncated curve needs the config of what it is a part of under 'curve'",
    ),
    (lambda: Flow(shift=-1.0), "^shift must be positive"),
    (lambda: Flow(shift=float("nan")), "^shift must be positive"),
    (lambda: curve_from_config({"kind": "flw"}), r"^unknown curve 'flw'; did you mean 'flow'\?$"),
    (lambda: curve_from_config({}), "^unknown curve None; known: cosine, discrete, flow, karras, "),
    (
        lambda: curve_from_config({"kind": "flow", "shfit": 1.0}),
        r"^unknown setting of a flow curve 'shfit'; did you mean 'shift'\?$",
    ),
]


@pytest.mark.parametrize("number", range(len(BAD_CURVES)))
def test_bad_curves_are_refused(number: int) -> None:
    make, message = BAD_CURVES[number]
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("curve", [Discrete(), Flow()], ids=str)
@pytest.mark.parametrize("beyond", [-0.01, 1.001, float("nan"), float("inf")])
def test_times_out_of_range_are_refused(curve: Curve, beyond: float) -> None:
    t = torch.tensor([0.5, beyond]) * curve.t_max
    message = f"is outside {curve.t_min} ... {curve.t_max} of this {curve.kind} schedule$"
    for evaluate in (curve.alpha, curve.sigma, curve.snr, curve.log_snr, curve.sigma_ve):
        with pytest.raises(ValueError, match=message):
            evaluate(t)


@pytest.mark.parametrize("index", [-1, 1000])
def test_integer_timesteps_out_of_range_are_refused(index: int) -> None:
    with pytest.raises(
        ValueError,
        match=rf"^time {index}\.0 is outside 0\.0 \.\.\. 999\.0 of this discrete schedule$",
    ):
        Discrete().alpha(torch.tensor([3, index]))


def test_an_empty_batch_of_times_is_an_empty_answer() -> None:
    assert Discrete().alpha(torch.zeros(0, dtype=torch.int64)).shape == (0,)
