"""Prediction types: formulas derived by hand, every conversion, zero SNR, and what is refused."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import product
from typing import Any

import pytest
import torch

from alphabar.noising import EDM, PREDICTIONS, NoiseSchedule, Noising, Prediction
from alphabar.noising.prediction import KarrasF, resolve_prediction
from oracles import ALL_PREDICTIONS, EVERY_SCHEDULE, allowed

TOLERANCE = 1e-12
LEVELS = {  # (α, σ) on variance preserving, flow and variance exploding paths
    "vp": [(math.cos(a), math.sin(a)) for a in (0.01, 0.3, math.pi / 4, 1.2, 1.5)],
    "flow": [(1 - s, s) for s in (0.01, 0.25, 0.5, 0.9, 0.99)],
    "ve": [(1.0, s) for s in (0.01, 1.0, 14.6)],
}
POINTS = [point for points in LEVELS.values() for point in points]
AT_ZERO_SNR = [kind() for name, kind in PREDICTIONS.items() if name not in ("epsilon", "score")]


def name_of(prediction: Prediction) -> str:
    return prediction.name


def draw(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    x0, epsilon = torch.randn(
        2, 64, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
    )
    return x0, epsilon


def worst(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).abs().max() / b.abs().max())


# formulas, derived by hand from the papers that define them

BY_HAND: dict[str, Callable[..., Any]] = {
    "epsilon": lambda a, s, x0, e: e,
    "sample": lambda a, s, x0, e: x0,
    "v_prediction": lambda a, s, x0, e: a * e - s * x0,
    "flow_prediction": lambda a, s, x0, e: e - x0,
    "score": lambda a, s, x0, e: -(a * x0 + s * e - a * x0) / s**2,  # ∇ log N(x_t; α x_0, σ²)
    "karras": lambda a, s, x0, e: karras_f(x0, x0 + (s / a) * e, s / a),
    "consistency": lambda a, s, x0, e: consistency_f(x0, x0 + (s / a) * e, s / a),
}


def karras_f(x0: Any, y: Any, s: float, d: float = 0.5) -> Any:
    c_skip, c_out = d**2 / (s**2 + d**2), s * d / math.sqrt(s**2 + d**2)
    return (x0 - c_skip * y) / c_out


def consistency_f(x0: Any, y: Any, s: float, d: float = 0.5, low: float = 0.002) -> Any:
    c_skip, c_out = d**2 / ((s - low) ** 2 + d**2), (s - low) * d / math.sqrt(s**2 + d**2)
    return (x0 - c_skip * y) / c_out


def test_every_prediction_has_a_formula_by_hand() -> None:
    assert set(BY_HAND) == set(PREDICTIONS), "write the new type's definition into BY_HAND"


@pytest.mark.parametrize("name", BY_HAND)
@pytest.mark.parametrize("path", LEVELS)
def test_target_is_the_formula(name: str, path: str) -> None:
    x0, epsilon = draw()
    for alpha, sigma in LEVELS[path]:
        target = PREDICTIONS[name]().combine(x0, epsilon, alpha, sigma)
        expected = BY_HAND[name](alpha, sigma, x0, epsilon)
        assert torch.allclose(
            target, expected, rtol=0, atol=TOLERANCE * float(expected.abs().max())
        )


def test_karras_with_unit_data_is_minus_v_on_a_variance_preserving_path() -> None:
    x0, epsilon = draw()
    for alpha, sigma in LEVELS["vp"]:
        v = PREDICTIONS["v_prediction"]().combine(x0, epsilon, alpha, sigma)
        assert worst(KarrasF(sigma_data=1.0).combine(x0, epsilon, alpha, sigma), -v) < TOLERANCE


# conversions


@pytest.mark.parametrize(
    ("source", "to"), list(product(ALL_PREDICTIONS, repeat=2)), ids=lambda p: p.name
)
def test_every_conversion(source: Prediction, to: Prediction) -> None:
    x0, epsilon = draw()
    for alpha, sigma in POINTS:
        x_t = alpha * x0 + sigma * epsilon
        out = source.combine(x0, epsilon, alpha, sigma)
        x0_back, epsilon_back = (
            source.to_x0(out, x_t, alpha, sigma),
            source.to_epsilon(out, x_t, alpha, sigma),
        )
        assert worst(x0_back, x0) < TOLERANCE
        assert worst(epsilon_back, epsilon) < TOLERANCE
        converted = to.combine(x0_back, epsilon_back, alpha, sigma)
        assert worst(converted, to.combine(x0, epsilon, alpha, sigma)) < TOLERANCE


@pytest.mark.parametrize(
    ("source", "to"), list(product(AT_ZERO_SNR, ALL_PREDICTIONS)), ids=lambda p: p.name
)
def test_every_conversion_at_zero_snr(source: Prediction, to: Prediction) -> None:
    x0, epsilon = draw()
    alpha, sigma = 0.0, 1.0
    out = source.combine(x0, epsilon, alpha, sigma)
    x0_back, epsilon_back = (
        source.to_x0(out, epsilon, alpha, sigma),
        source.to_epsilon(out, epsilon, alpha, sigma),
    )
    assert worst(x0_back, x0) < TOLERANCE
    assert worst(epsilon_back, epsilon) < TOLERANCE
    assert (
        worst(
            to.combine(x0_back, epsilon_back, alpha, sigma), to.combine(x0, epsilon, alpha, sigma)
        )
        < TOLERANCE
    )


@pytest.mark.parametrize(
    ("source", "to"),
    list(
        product([p for p in ALL_PREDICTIONS if p.name not in ("epsilon", "score")], ALL_PREDICTIONS)
    ),
)
def test_the_schedule_converts_between_all(source: Prediction, to: Prediction) -> None:
    """There and back through the public face, on a path that is neither variance preserving nor
    exploding.
    """
    schedule = NoiseSchedule.flow(shift=3.0, prediction=source)
    t = torch.tensor([0.1, 0.4, 0.95], dtype=torch.float64)
    x0, noise = torch.randn(
        2, 3, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(4)
    )
    x_t, out = schedule.add_noise(x0, noise, t), schedule.target(x0, noise, t)
    converted = schedule.convert(out, x_t, t, to)
    alpha, sigma = schedule.alpha(t)[:, None], schedule.sigma(t)[:, None]
    expected = to.combine(x0, noise, alpha, sigma)
    assert worst(converted, expected) < TOLERANCE
    back = source.combine(
        to.to_x0(converted, x_t, alpha, sigma),
        to.to_epsilon(converted, x_t, alpha, sigma),
        alpha,
        sigma,
    )
    assert worst(back, out) < TOLERANCE


@pytest.mark.parametrize("sigma_data", [0.5, 1.0])
@pytest.mark.parametrize("path", ["edm", "vp", "flow"])
def test_the_weighted_loss_of_edm_is_the_plain_loss_of_f(sigma_data: float, path: str) -> None:
    """Karras et al. 2206.00364, eq. 8: λ(σ) ||D - y||² = ||F - target||², on any path."""
    curve = {
        "edm": NoiseSchedule.karras(sigma_data=sigma_data),
        "vp": NoiseSchedule.scaled_linear(prediction="sample"),
        "flow": NoiseSchedule.flow(),
    }[path]
    on_f = Noising(curve.with_prediction(KarrasF(sigma_data)), "uniform", seed=3)
    on_d = Noising(curve.with_prediction("sample"), EDM(sigma_data=sigma_data), seed=3)
    x0, out = torch.randn(
        2, 64, 3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(5)
    )
    noised, denoised = on_f(x0, step=0), on_d(x0, step=0)
    assert torch.equal(noised.x, denoised.x)
    losses = noised.losses(out)
    same = denoised.losses(on_f.schedule.to_x0(out, noised.x_t, noised.t))
    assert float(((same - losses).abs() / losses).max()) < TOLERANCE


@pytest.mark.parametrize("prediction", ALL_PREDICTIONS, ids=name_of)
def test_x0_coefficients_are_the_same_solve(prediction: Prediction) -> None:
    x0, epsilon = draw()
    for alpha, sigma in POINTS:
        p, q = prediction.x0_coefficients(alpha, sigma)
        x_t, out = alpha * x0 + sigma * epsilon, prediction.combine(x0, epsilon, alpha, sigma)
        assert worst(p * x_t + q * out, x0) < TOLERANCE
        assert q == pytest.approx(sigma / prediction.determinant(alpha, sigma), rel=TOLERANCE)


@pytest.mark.parametrize(
    "schedule",
    [s for base in EVERY_SCHEDULE.values() for s in allowed(base)],
    ids=lambda s: f"{s.curve.kind}-{s.prediction.name}",
)
def test_the_schedule_converts_batches(schedule: NoiseSchedule) -> None:
    x0, noise = torch.randn(
        2, 4, 3, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1)
    )
    first, last = schedule.curve.t_min, schedule.curve.t_max
    t = first + torch.tensor([0.3, 0.5, 0.9, 1.0], dtype=torch.float64) * (last - first)
    well_posed = slice(0, 3) if schedule.prediction.name in ("epsilon", "score") else slice(0, 4)
    alpha, sigma = schedule.alpha(t)[:, None, None], schedule.sigma(t)[:, None, None]
    x_t, out = schedule.add_noise(x0, noise, t), schedule.target(x0, noise, t)
    assert worst(x_t, alpha * x0 + sigma * noise) < 1e-15
    if schedule.prediction.name not in ("karras", "consistency"):  # by hand these divide by α
        assert worst(out, BY_HAND[schedule.prediction.name](alpha, sigma, x0, noise)) < TOLERANCE
    assert worst(schedule.to_x0(out, x_t, t)[well_posed], x0[well_posed]) < TOLERANCE
    assert worst(schedule.to_epsilon(out, x_t, t), noise) < TOLERANCE
    for to in ("sample", "v_prediction", "flow_prediction"):
        expected = schedule.with_prediction(to).target(x0, noise, t)
        assert (
            worst(schedule.convert(out, x_t, t, to)[well_posed], expected[well_posed]) < TOLERANCE
        )


def test_half_precision_is_computed_in_float32() -> None:
    schedule = NoiseSchedule.scaled_linear(prediction="v_prediction")
    x0, noise = torch.randn(2, 3, 8, generator=torch.Generator().manual_seed(2)).bfloat16()
    t = torch.tensor([0, 500, 999])
    assert schedule.add_noise(x0, noise, t).dtype == torch.bfloat16
    target = schedule.target(x0, noise, t)
    assert target.dtype == torch.float32
    assert worst(target, schedule.target(x0.double(), noise.double(), t)) < 1e-6


# what is refused

MEND = r"alpha is 0, .* use with_prediction\('v_prediction'\) \(or 'sample', 'flow_prediction'\) before zero_terminal_snr\(\)$"


@pytest.mark.parametrize("name", ["epsilon", "score"])
def test_ill_posed_predictions_are_refused_with_the_mend(name: str) -> None:
    plain = NoiseSchedule.scaled_linear(prediction=name)
    message = rf"^prediction '{name}' is ill-posed on a schedule with zero terminal SNR: at t = 999 {MEND}"
    with pytest.raises(ValueError, match=message):
        plain.zero_terminal_snr()
    with pytest.raises(ValueError, match=message):
        plain.with_prediction("v_prediction").zero_terminal_snr().with_prediction(name)
    with pytest.raises(ValueError, match=rf"^prediction '{name}' is ill-posed .* at t = 1 "):
        NoiseSchedule.flow(prediction=name)
    mended = plain.with_prediction("v_prediction").zero_terminal_snr()  # the mend, as it is worded
    assert mended.has_zero_terminal_snr


@pytest.mark.parametrize("prediction", AT_ZERO_SNR, ids=name_of)
def test_the_others_are_well_posed_at_zero_snr(prediction: Prediction) -> None:
    assert NoiseSchedule.linear(prediction=prediction).zero_terminal_snr().has_zero_terminal_snr
    assert abs(prediction.determinant(0.0, 1.0)) > 0.5


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("v_predicton", "unknown prediction type 'v_predicton'; did you mean 'v_prediction'?"),
        ("Epsilon", "unknown prediction type 'Epsilon'; did you mean 'epsilon'?"),
        ("xyz", "unknown prediction type 'xyz'; known: " + ", ".join(sorted(PREDICTIONS))),
        (None, "unknown prediction type None; known: " + ", ".join(sorted(PREDICTIONS))),
        (
            {"sigma_data": 1.0},
            "unknown prediction type None; known: " + ", ".join(sorted(PREDICTIONS)),
        ),
    ],
)
def test_unknown_names(name: Any, message: str) -> None:
    for make in (
        resolve_prediction,
        lambda n: NoiseSchedule.linear(prediction=n),
        NoiseSchedule.linear().with_prediction,
    ):
        with pytest.raises(ValueError) as caught:
            make(name)
        assert str(caught.value) == message


@pytest.mark.parametrize("sigma_data", [0.0, -1.0, float("nan")])
def test_sigma_data_must_be_positive(sigma_data: float) -> None:
    with pytest.raises(ValueError, match=r"^sigma_data must be positive, got .*; EDM uses 0.5"):
        KarrasF(sigma_data=sigma_data)


@pytest.mark.parametrize("prediction", [*ALL_PREDICTIONS, KarrasF(sigma_data=1.0)], ids=repr)
def test_config_round_trip(prediction: Prediction) -> None:
    assert resolve_prediction(prediction.to_config()) == prediction
    assert resolve_prediction(prediction) is prediction


def test_shapes_that_do_not_fit_are_refused() -> None:
    schedule, x0 = NoiseSchedule.linear(), torch.zeros(2, 3)
    with pytest.raises(
        ValueError, match=r"^noise must have the shape of x0, \(2, 3\), got \(1, 3\)$"
    ):
        schedule.add_noise(x0, x0[:1], torch.tensor([1, 2]))
    with pytest.raises(ValueError, match=r"^noise must have the shape of x0"):
        schedule.target(x0, x0[:1], torch.tensor([1, 2]))
    for t in (torch.zeros(3, dtype=torch.int64), torch.zeros(2, 1, dtype=torch.int64)):
        with pytest.raises(
            ValueError, match=r"^timesteps must be a scalar or have shape \(2,\), got "
        ):
            schedule.add_noise(x0, x0, t)
