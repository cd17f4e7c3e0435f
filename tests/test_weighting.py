"""Loss weights: one objective for every target, the closed forms of min-SNR, and both ends of the schedule."""

from __future__ import annotations

import math
import warnings

import pytest
import torch
from torch import Tensor

from alphabar.noising import (
    PREDICTIONS,
    SNR,
    WEIGHTINGS,
    MinSNR,
    NoiseSchedule,
    Noising,
    Prediction,
    Uniform,
    Weighting,
)
from alphabar.noising.weighting import resolve_weighting
from oracles import ALL_PREDICTIONS, EVERY_SCHEDULE, SCHEDULES, allowed

TOLERANCE = 1e-12
SCHEMES = [scheme() for scheme in WEIGHTINGS.values()] + [MinSNR(gamma=1.0), MinSNR(gamma=20.0)]
INVARIANT = [scheme for scheme in SCHEMES if not isinstance(scheme, Uniform)]
AT_THE_END = {"uniform": 1.0, "snr": 0.0, "min_snr": 0.0}  # exactly, where SNR is 0
GAMMAS = [0.5, 1.0, 5.0, 20.0]


def levels(schedule: NoiseSchedule, count: int = 200) -> tuple[Tensor, Tensor]:
    """α and σ inside the schedule."""
    t = torch.linspace(schedule.curve.t_min, schedule.curve.t_max, count, dtype=torch.float64)[1:-1]
    return schedule.alpha(t), schedule.sigma(t)


def weights(scheme: Weighting, prediction: Prediction, alpha: Tensor, sigma: Tensor) -> Tensor:
    return scheme(alpha, sigma, prediction.determinant(alpha, sigma))


def target_error(prediction: Prediction, alpha: Tensor, sigma: Tensor) -> Tensor:
    """How much the target moves when x_0 is wrong by 1 and x_t stays: ε is then wrong by -α / σ."""
    x0, epsilon = torch.tensor(0.3, dtype=torch.float64), torch.tensor(-1.1, dtype=torch.float64)
    moved = prediction.combine(x0 + 1, epsilon - alpha / sigma, alpha, sigma)
    return moved - prediction.combine(x0, epsilon, alpha, sigma)


def worst(a: Tensor, b: Tensor) -> float:
    return float(((a - b).abs() / b.abs()).max())


@pytest.mark.parametrize("scheme", INVARIANT, ids=repr)
@pytest.mark.parametrize("prediction", ALL_PREDICTIONS, ids=lambda p: p.name)
@pytest.mark.parametrize("name", EVERY_SCHEDULE)
def test_the_objective_does_not_depend_on_the_target(scheme: Weighting, prediction: Prediction, name: str) -> None:
    alpha, sigma = levels(EVERY_SCHEDULE[name])
    on_x0 = weights(scheme, PREDICTIONS["sample"](), alpha, sigma)  # times an error of 1, squared
    on_target = weights(scheme, prediction, alpha, sigma) * target_error(prediction, alpha, sigma) ** 2
    assert float(on_x0.min()) > 0
    assert worst(on_target, on_x0) < TOLERANCE


@pytest.mark.parametrize("prediction", ALL_PREDICTIONS, ids=lambda p: p.name)
def test_uniform_is_one_on_every_target(prediction: Prediction) -> None:
    alpha, sigma = levels(SCHEDULES["scaled_linear"])
    assert torch.equal(weights(Uniform(), prediction, alpha, sigma), torch.ones_like(alpha))


@pytest.mark.parametrize("gamma", GAMMAS)
@pytest.mark.parametrize("name", ["scaled_linear", "ztsnr", "squaredcos"])
def test_min_snr_closed_forms(gamma: float, name: str) -> None:
    alpha, sigma = levels(SCHEDULES[name])
    snr = (alpha / sigma) ** 2
    clipped = snr.clamp(max=gamma)
    assert bool((snr < gamma).any())
    assert bool((snr > gamma).any())
    closed_forms = {"epsilon": clipped / snr, "v_prediction": clipped / (snr + 1), "sample": clipped}
    for prediction, expected in closed_forms.items():
        assert worst(weights(MinSNR(gamma=gamma), PREDICTIONS[prediction](), alpha, sigma), expected) < TOLERANCE


def test_min_snr_on_a_flow() -> None:
    schedule = NoiseSchedule.flow()
    alpha, sigma = levels(schedule)
    expected = torch.minimum((1 - sigma) ** 2, 5 * sigma**2)  # training.md: min((1-σ)², γσ²)
    assert worst(weights(MinSNR(), schedule.prediction, alpha, sigma), expected) < TOLERANCE


def test_snr_is_the_plain_epsilon_loss() -> None:
    alpha, sigma = levels(SCHEDULES["scaled_linear"])
    snr = (alpha / sigma) ** 2
    for prediction, expected in {
        "epsilon": torch.ones_like(snr),
        "v_prediction": snr / (snr + 1),
        "sample": snr,
    }.items():
        assert worst(weights(SNR(), PREDICTIONS[prediction](), alpha, sigma), expected) < TOLERANCE


# both ends


@pytest.mark.parametrize("schedule", allowed(SCHEDULES["ztsnr"]), ids=lambda s: s.prediction.name)
@pytest.mark.parametrize("scheme", SCHEMES, ids=repr)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_weights_are_finite_at_both_ends(schedule: NoiseSchedule, scheme: Weighting, dtype: torch.dtype) -> None:
    t = torch.tensor([0, 999]).to(dtype)
    first, last = weights(scheme, schedule.prediction, schedule.alpha(t), schedule.sigma(t)).tolist()
    assert 0 < first < math.inf
    assert 0 <= last < math.inf
    if scheme.name in AT_THE_END:
        assert last == AT_THE_END[scheme.name]


def test_the_first_weight_is_not_lost_in_float32() -> None:
    schedule, t = SCHEDULES["ztsnr"], torch.arange(1000)
    in_float32 = weights(MinSNR(), schedule.prediction, schedule.alpha(t), schedule.sigma(t))
    in_float64 = weights(MinSNR(), schedule.prediction, schedule.alpha(t.double()), schedule.sigma(t.double()))
    assert worst(in_float32[:-1].double(), in_float64[:-1]) < 1e-5


# the dead terminal step

DEAD = (
    r"^weighting '{name}' is 0 at t = {end}, where SNR is 0: the step that sampling starts from gets no gradient; "
    r"give it a floor \(e.g. floor=0.05\), or use weighting='uniform'$"
)


@pytest.mark.parametrize("name", ["snr", "min_snr"])
@pytest.mark.parametrize(("schedule", "end"), [(SCHEDULES["ztsnr"], "999"), (SCHEDULES["flow"], "1")])
def test_a_dead_terminal_step_is_warned_of(name: str, schedule: NoiseSchedule, end: str) -> None:
    with pytest.warns(UserWarning, match=DEAD.format(name=name, end=end)) as caught:
        Noising(schedule, weighting=name)
    assert len(caught) == 1
    assert caught[0].filename == __file__  # it points at the line that made the Noising


@pytest.mark.parametrize(
    ("schedule", "scheme"),
    [
        (SCHEDULES["ztsnr"], Uniform()),
        (SCHEDULES["flow"], Uniform()),
        (SCHEDULES["ztsnr"], MinSNR(floor=0.05)),
        (SCHEDULES["scaled_linear"], MinSNR()),
        (SCHEDULES["scaled_linear"], SNR()),
    ],
    ids=repr,
)
def test_no_warning_without_cause(schedule: NoiseSchedule, scheme: Weighting) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Noising(schedule, weighting=scheme)


def test_floor_lifts_what_is_below_it_and_nothing_else() -> None:
    schedule, t = SCHEDULES["ztsnr"], torch.arange(1000, dtype=torch.float64)
    alpha, sigma = schedule.alpha(t), schedule.sigma(t)
    bare, floored = (weights(MinSNR(floor=f), schedule.prediction, alpha, sigma) for f in (0.0, 0.05))
    assert float(floored[-1]) == 0.05
    assert torch.equal(floored, torch.where(bare < 0.05, torch.full_like(bare, 0.05), bare))
    assert 50 < int((bare < 0.05).sum()) < 500


# bad input


@pytest.mark.parametrize("gamma", [0.0, -1.0, float("nan"), float("inf")])
def test_bad_gamma(gamma: float) -> None:
    with pytest.raises(ValueError, match=rf"^snr gamma must be positive and finite, got {gamma}; the paper uses 5$"):
        MinSNR(gamma=gamma)


@pytest.mark.parametrize("scheme", WEIGHTINGS.values())
@pytest.mark.parametrize("floor", [-0.1, float("nan")])
def test_bad_floor(scheme: type[Weighting], floor: float) -> None:
    with pytest.raises(ValueError, match=rf"^floor must be at least 0, got {floor}$"):
        scheme(floor=floor)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("minsnr", "unknown weighting 'minsnr'; did you mean 'min_snr'?"),
        ("xyz", "unknown weighting 'xyz'; known: " + ", ".join(sorted(WEIGHTINGS))),
        (5, "unknown weighting 5; known: " + ", ".join(sorted(WEIGHTINGS))),
    ],
)
def test_unknown_names(name: str, message: str) -> None:
    with pytest.raises(ValueError) as caught:
        Noising(NoiseSchedule.linear(), weighting=name)
    assert str(caught.value) == message


@pytest.mark.parametrize("name", WEIGHTINGS)
def test_names_and_objects_resolve(name: str) -> None:
    scheme = resolve_weighting(name)
    assert scheme.name == name
    assert resolve_weighting(scheme) is scheme
