"""Loss weights: one objective for every target, closed forms, the formulas of other trainers, and
both ends of the schedule.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from all_pairs import all_pairs
from alphabar.noising import (
    CURVES,
    EDM,
    PREDICTIONS,
    SNR,
    WEIGHTINGS,
    Debiased,
    LearnedUncertainty,
    MinSNR,
    NoiseSchedule,
    Noising,
    PerRange,
    PlainX0,
    Prediction,
    SigmaSqrt,
    Sigmoid,
    SoftMinSNR,
    Uniform,
    VLike,
    Weighting,
)
from alphabar.noising.prediction import KarrasF
from alphabar.noising.weighting import resolve_weighting
from alphabar.noising.weighting.base import Scheme
from alphabar.noising.weighting.schemes import P2
from alphabar.noising.weighting.trainer_compat import Peer
from oracles import ALL_PREDICTIONS, EVERY_SCHEDULE, SCHEDULES, allowed

TOLERANCE = 1e-12
OTHERS: Sequence[Weighting] = [  # beside the defaults
    *(
        MinSNR(gamma=1.0),
        MinSNR(gamma=20.0),
        SoftMinSNR(gamma=1.0),
        Sigmoid(bias=-3.0),
        P2(k=0.5, gamma=0.5),
    ),
    *(
        EDM(sigma_data=1.0),
        VLike(strength=0.3),
        PerRange(((0.0, 0.3, 2.0), (0.6, 0.8, 0.0)), "min_snr", 0.5),
    ),
    LearnedUncertainty(weighting="snr"),
]
SCHEMES = [scheme() for scheme in WEIGHTINGS.values()] + list(OTHERS)
# PerRange() is of uniform
INVARIANT = [s for s in SCHEMES if not isinstance(s, Uniform) and s != PerRange()]
PEERS = [scheme for scheme in SCHEMES if isinstance(scheme, Peer)]
GAMMAS = [0.5, 1.0, 5.0, 20.0]
VP = ("scaled_linear", "ztsnr", "squaredcos")


def times(schedule: NoiseSchedule, count: int = 200) -> Tensor:
    """Times inside the schedule."""
    return torch.linspace(schedule.curve.t_min, schedule.curve.t_max, count, dtype=torch.float64)[
        1:-1
    ]


def levels(schedule: NoiseSchedule, count: int = 200) -> tuple[Tensor, Tensor]:
    t = times(schedule, count)
    return schedule.alpha(t), schedule.sigma(t)


def weights(scheme: Weighting, prediction: Prediction, alpha: Tensor, sigma: Tensor) -> Tensor:
    fraction = torch.linspace(0.0, 1.0, alpha.numel(), dtype=alpha.dtype)
    return scheme(alpha, sigma, prediction.determinant(alpha, sigma), fraction)


def target_error(prediction: Prediction, alpha: Tensor, sigma: Tensor) -> Tensor:
    """How much the target moves when x_0 is wrong by 1 and x_t stays: ε is then wrong by -α / σ."""
    x0, epsilon = torch.tensor(0.3, dtype=torch.float64), torch.tensor(-1.1, dtype=torch.float64)
    moved = prediction.combine(x0 + 1, epsilon - alpha / sigma, alpha, sigma)
    return moved - prediction.combine(x0, epsilon, alpha, sigma)


def worst(a: Tensor, b: Tensor) -> float:
    return float(((a - b).abs() / b.abs()).max())


TARGETS = all_pairs(INVARIANT, list(EVERY_SCHEDULE), ALL_PREDICTIONS)


@pytest.mark.parametrize("scheme", INVARIANT, ids=repr)
def test_the_objective_does_not_depend_on_the_target(scheme: Weighting) -> None:
    for _, name, prediction in (row for row in TARGETS if row[0] is scheme):
        alpha, sigma = levels(EVERY_SCHEDULE[name])
        # times an error of 1, squared
        on_x0 = weights(scheme, PREDICTIONS["sample"](), alpha, sigma)
        on_target = (
            weights(scheme, prediction, alpha, sigma) * target_error(prediction, alpha, sigma) ** 2
        )
        counted = on_x0 > 0  # all, but for ranges that are told not to
        assert int(counted.sum()) > 100, (name, prediction)
        assert torch.equal(on_target > 0, counted), (name, prediction)
        assert worst(on_target[counted], on_x0[counted]) < TOLERANCE, (name, prediction)


@pytest.mark.parametrize("scheme", [s for s in INVARIANT if isinstance(s, Scheme)], ids=repr)
@pytest.mark.parametrize("name", SCHEDULES)
def test_a_scheme_is_a_function_of_snr_alone(scheme: Weighting, name: str) -> None:
    """w_x0 does not change when a path is multiplied by a number: a variance exploding path is
    trained as the preserving one.
    """
    alpha, sigma = levels(SCHEDULES[name])
    sample = PREDICTIONS["sample"]()
    assert (
        worst(
            weights(scheme, sample, 3.7 * alpha, 3.7 * sigma), weights(scheme, sample, alpha, sigma)
        )
        < TOLERANCE
    )


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
    closed_forms = {
        "epsilon": clipped / snr,
        "v_prediction": clipped / (snr + 1),
        "sample": clipped,
    }
    for prediction, expected in closed_forms.items():
        assert (
            worst(weights(MinSNR(gamma=gamma), PREDICTIONS[prediction](), alpha, sigma), expected)
            < TOLERANCE
        )


def test_min_snr_on_a_flow() -> None:
    schedule = NoiseSchedule.flow()
    alpha, sigma = levels(schedule)
    expected = torch.minimum((1 - sigma) ** 2, 5 * sigma**2)  # training.md: min((1-σ)², γσ²)
    assert worst(weights(MinSNR(), schedule.prediction, alpha, sigma), expected) < TOLERANCE


# every scheme as the literature writes it, in SNR

W_X0: dict[str, Callable[[Tensor], Tensor]] = {
    "snr": lambda snr: snr,
    "v": lambda snr: snr + 1,
    "x0": torch.ones_like,
    "flow": lambda snr: (1 + snr.sqrt()) ** 2,
    "min_snr": lambda snr: snr.clamp(max=5.0),
    "soft_min_snr": lambda snr: snr * 5 / (snr + 5),
    "sigmoid": lambda snr: snr * torch.sigmoid(0.0 - snr.log()),
    "p2": lambda snr: snr / (1 + snr),
    "debiased": torch.sqrt,
    "edm": lambda snr: (1 / snr + 0.25) / (0.25 / snr),  # (s² + σ_d²) / (s σ_d)²
    "cosmap": lambda snr: (
        2 / (math.pi * (1 - 2 * flow_sigma(snr) + 2 * flow_sigma(snr) ** 2)) / flow_sigma(snr) ** 2
    ),
    "sigma_sqrt": lambda snr: flow_sigma(snr) ** -4,
    "v_like": lambda snr: snr + 1.0 * (snr + 1),
}
BY_PEERS: dict[str, Callable[[Tensor], Tensor]] = {  # on their target, as their code has it
    "diffusers_cosmap_x0": lambda snr: (
        2 / (math.pi * (1 - 2 * flow_sigma(snr) + 2 * flow_sigma(snr) ** 2))
    ),
    "diffusers_min_snr_plus_one_v": lambda snr: snr.clamp(max=5.0) / snr + 1,
    "diffusers_pixart_min_snr_v": lambda snr: (snr + 1).clamp(max=5.0) / (snr + 1),
    "kohya_debiased_epsilon": lambda snr: 1 / snr.clamp(max=1000.0).sqrt(),
    "kohya_debiased_v": lambda snr: 1 / (snr.clamp(max=1000.0) + 1),
    "kohya_scale_v_pred": lambda snr: snr.clamp(max=1000.0) / (snr.clamp(max=1000.0) + 1),
    "kohya_v_pred_like": lambda snr: (
        1 + 1.0 / (snr.clamp(max=1000.0) / (snr.clamp(max=1000.0) + 1))
    ),
    "onetrainer_debiased_v": lambda snr: (snr.clamp(max=1000.0) + 1).rsqrt(),
    "onetrainer_p2_v": lambda snr: (1 + (snr + 1)) ** -1.0,
    "onetrainer_sigma": lambda snr: flow_sigma(snr),
}
TRULY: dict[str, Callable[[Tensor], Tensor]] = {  # w_x0 that they amount to, below their cap
    "diffusers_cosmap_x0": lambda snr: W_X0["cosmap"](snr) * flow_sigma(snr) ** 2,
    "diffusers_min_snr_plus_one_v": lambda snr: (snr + 1) * (1 + (5 / snr).clamp(max=1)),
    "diffusers_pixart_min_snr_v": lambda snr: (snr + 1).clamp(max=5.0),
    "kohya_debiased_epsilon": W_X0["debiased"],
    "kohya_debiased_v": W_X0["x0"],
    "kohya_scale_v_pred": W_X0["snr"],
    "kohya_v_pred_like": W_X0["v_like"],
    "onetrainer_debiased_v": lambda snr: (snr + 1).sqrt(),
    "onetrainer_p2_v": lambda snr: (snr + 1) / (snr + 2),
    "onetrainer_sigma": lambda snr: 1 / flow_sigma(snr),
}


def flow_sigma(snr: Tensor) -> Tensor:
    """σ of the flow path at this SNR: ((1 - σ) / σ)² = SNR."""
    return 1 / (1 + snr.sqrt())


def test_every_scheme_has_a_formula() -> None:
    composed = {"uniform", "per_range", "learned_uncertainty"}
    assert set(W_X0) | set(BY_PEERS) | composed == set(WEIGHTINGS), (
        "write the new scheme's formula into W_X0 or BY_PEERS"
    )
    assert set(BY_PEERS) == set(TRULY) == {scheme.name for scheme in PEERS}


@pytest.mark.parametrize("scheme", W_X0)
@pytest.mark.parametrize("name", VP)
def test_weights_of_every_target(scheme: str, name: str) -> None:
    alpha, sigma = levels(SCHEDULES[name])
    snr = (alpha / sigma) ** 2
    w = W_X0[scheme](snr)
    for prediction, expected in {
        "sample": w,
        "epsilon": w / snr,
        "v_prediction": w / (snr + 1),
    }.items():
        assert (
            worst(weights(WEIGHTINGS[scheme](), PREDICTIONS[prediction](), alpha, sigma), expected)
            < TOLERANCE
        )


OF_PARAMETERS: dict[
    Weighting, Callable[[Tensor], Tensor]
] = {  # w_x0 of other parameters than the defaults
    MinSNR(gamma=20.0): lambda snr: snr.clamp(max=20.0),
    SoftMinSNR(gamma=1.0): lambda snr: snr / (snr + 1),
    Sigmoid(bias=-3.0): lambda snr: snr * torch.sigmoid(-3.0 - snr.log()),
    P2(k=0.5, gamma=0.7): lambda snr: snr / (0.5 + snr) ** 0.7,
    EDM(sigma_data=1.0): lambda snr: snr + 1,
    VLike(strength=0.3): lambda snr: snr + 0.3 * (snr + 1),
}


@pytest.mark.parametrize("scheme", OF_PARAMETERS, ids=repr)
def test_parameters_of_the_schemes(scheme: Weighting) -> None:
    alpha, sigma = levels(SCHEDULES["scaled_linear"])
    expected = OF_PARAMETERS[scheme]((alpha / sigma) ** 2)
    assert worst(weights(scheme, PREDICTIONS["sample"](), alpha, sigma), expected) < TOLERANCE


@pytest.mark.parametrize("scheme", W_X0)
def test_weights_of_the_flow_velocity(scheme: str) -> None:
    schedule = SCHEDULES["flow"]
    alpha, sigma = levels(schedule)
    expected = W_X0[scheme]((alpha / sigma) ** 2) * sigma**2
    assert (
        worst(weights(WEIGHTINGS[scheme](), schedule.prediction, alpha, sigma), expected)
        < TOLERANCE
    )


@pytest.mark.parametrize(
    ("scheme", "prediction"), [("snr", "epsilon"), ("v", "v_prediction"), ("x0", "sample")]
)
def test_plain_losses_weigh_their_own_target_by_one(scheme: str, prediction: str) -> None:
    alpha, sigma = levels(SCHEDULES["scaled_linear"])
    weight = weights(WEIGHTINGS[scheme](), PREDICTIONS[prediction](), alpha, sigma)
    assert worst(weight, torch.ones_like(alpha)) < TOLERANCE


@pytest.mark.parametrize(
    ("scheme", "name"),
    [(s.name, name) for s in PEERS for name in (["flow"] if s.target == "flow_prediction" else VP)],
)
def test_peers_weigh_as_their_code_does(scheme: str, name: str) -> None:
    schedule = SCHEDULES[name]
    t = torch.linspace(0.0, schedule.curve.t_max, 1000, dtype=torch.float64)[
        int(name == "flow") : 999
    ]
    alpha, sigma = schedule.alpha(t), schedule.sigma(t)
    snr = (alpha / sigma) ** 2
    assert float(snr.max()) > 1000  # the cap is seen
    target = PREDICTIONS[WEIGHTINGS[scheme].target]()
    assert (
        worst(weights(WEIGHTINGS[scheme](), target, alpha, sigma), BY_PEERS[scheme](snr))
        < TOLERANCE
    )


@pytest.mark.parametrize("scheme", TRULY)
def test_what_peers_truly_compute(scheme: str) -> None:
    alpha, sigma = levels(SCHEDULES["scaled_linear"])
    below = (alpha / sigma) ** 2 < 1000
    alpha, sigma = alpha[below], sigma[below]
    weight = weights(WEIGHTINGS[scheme](), PREDICTIONS["sample"](), alpha, sigma)
    assert worst(weight, TRULY[scheme]((alpha / sigma) ** 2)) < TOLERANCE


@pytest.mark.parametrize("scheme", ["cosmap", "sigma_sqrt"])
def test_weights_of_diffusers_for_flows(scheme: str) -> None:
    from diffusers.training_utils import compute_loss_weighting_for_sd3

    schedule = SCHEDULES["flow"]
    alpha, sigma = levels(schedule)
    expected = compute_loss_weighting_for_sd3(scheme, sigma).double()
    # theirs is float32
    assert worst(weights(WEIGHTINGS[scheme](), schedule.prediction, alpha, sigma), expected) < 1e-6


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_min_snr_of_diffusers(prediction: str) -> None:
    from diffusers import DDPMScheduler
    from diffusers.training_utils import compute_snr

    t = torch.arange(1000)
    snr = compute_snr(DDPMScheduler(1000, 0.00085, 0.012, "scaled_linear"), t)
    expected = snr.clamp(max=5.0) / (snr + (prediction == "v_prediction"))
    schedule = SCHEDULES["scaled_linear"]
    weight = weights(MinSNR(), PREDICTIONS[prediction](), schedule.alpha(t), schedule.sigma(t))
    assert worst(weight, expected) < 1e-4  # their 1 - ᾱ cancels in float32


@pytest.mark.parametrize("sigma_data", [0.5, 1.0])
def test_weights_of_k_diffusion_and_edm(sigma_data: float) -> None:
    """k-diffusion weighs the error of EDM's F, EDM and sgm that of the denoiser D."""
    s = torch.logspace(-2, 2, 100, dtype=torch.float64)
    one, f, d = torch.ones_like(s), KarrasF(sigma_data), PREDICTIONS["sample"]()
    on_f = {
        Uniform(): one,
        EDM(sigma_data=sigma_data): one,
        SoftMinSNR(gamma=1 / sigma_data**2): (s * sigma_data) ** 2 / (s**2 + sigma_data**2) ** 2,
        SNR(): sigma_data**2 / (s**2 + sigma_data**2),
    }
    on_d = {
        EDM(sigma_data=sigma_data): (s**2 + sigma_data**2) / (s * sigma_data) ** 2,
        resolve_weighting("v"): (s**2 + 1) / s**2,
        SNR(): s**-2,
        PlainX0(): one,
    }
    for prediction, expected in ((f, on_f), (d, on_d)):
        for scheme, weight in expected.items():
            assert worst(weights(scheme, prediction, one, s), weight) < TOLERANCE, scheme


@pytest.mark.parametrize("bias", [-3.0, 0.0, 2.0])
def test_sigmoid_is_soft_min_snr(bias: float) -> None:
    alpha, sigma = levels(SCHEDULES["ztsnr"])
    v = PREDICTIONS["v_prediction"]()
    soft = weights(SoftMinSNR(gamma=math.exp(bias)), v, alpha, sigma)
    assert worst(weights(Sigmoid(bias=bias), v, alpha, sigma), soft) < TOLERANCE
    on_epsilon = weights(Sigmoid(bias=bias), PREDICTIONS["epsilon"](), alpha, sigma)
    assert worst(on_epsilon, torch.sigmoid(bias - ((alpha / sigma) ** 2).log())) < TOLERANCE


# numbers at t = 500 and at the end of Stable Diffusion's schedule with zero terminal SNR, on v

MEASURED = {
    "debiased": (0.428, 0.0),
    "kohya_debiased_v": (0.759, 1.0),
    "onetrainer_debiased_v": (0.871, 1.0),
    "p2": (0.1829, 0.0),
    "onetrainer_p2_v": (0.4315, 0.5),
    "diffusers_pixart_min_snr_v": (1.0, 1.0),
    "diffusers_min_snr_plus_one_v": (2.0, 2.0),
}


@pytest.mark.parametrize("scheme", MEASURED)
def test_numbers(scheme: str) -> None:
    schedule = SCHEDULES["ztsnr"]
    t = torch.tensor([500, 999], dtype=torch.float64)
    middle, last = weights(
        WEIGHTINGS[scheme](), schedule.prediction, schedule.alpha(t), schedule.sigma(t)
    ).tolist()
    assert middle == pytest.approx(MEASURED[scheme][0], abs=6e-4)
    assert last == MEASURED[scheme][1]


def test_how_many_steps_min_snr_leaves_out() -> None:
    v, t = PREDICTIONS["v_prediction"](), torch.arange(1000)
    plain, zero = (
        weights(MinSNR(), v, s.alpha(t), s.sigma(t))
        for s in (SCHEDULES["scaled_linear"], SCHEDULES["ztsnr"])
    )
    assert torch.nonzero(zero < 1e-3).flatten().tolist() == list(range(937, 1000))
    assert float(plain.min()) > 1e-3
    assert float(plain[-1]) == pytest.approx(0.00466, abs=1e-5)


# both ends

AT_THE_END = {  # exactly, on v, where SNR is 0
    **dict.fromkeys(("snr", "min_snr", "soft_min_snr", "sigmoid", "p2", "debiased"), 0.0),
    **dict.fromkeys(("kohya_debiased_epsilon", "kohya_scale_v_pred"), 0.0),
    **dict.fromkeys(
        (
            "uniform",
            "v",
            "x0",
            "flow",
            "sigma_sqrt",
            "v_like",
            "kohya_debiased_v",
            "kohya_v_pred_like",
        ),
        1.0,
    ),
    **dict.fromkeys(
        ("onetrainer_debiased_v", "onetrainer_sigma", "diffusers_pixart_min_snr_v", "per_range"),
        1.0,
    ),
    "edm": 4.0,
    "learned_uncertainty": 4.0,
    "cosmap": 2 / math.pi,
    "diffusers_cosmap_x0": 2 / math.pi,
    "onetrainer_p2_v": 0.5,
    "diffusers_min_snr_plus_one_v": 2.0,
}
DEAD_AT_THE_END = [name for name, weight in AT_THE_END.items() if weight == 0]


@pytest.mark.parametrize("scheme", SCHEMES, ids=repr)
def test_weights_are_finite_at_both_ends(scheme: Weighting) -> None:
    for schedule, dtype in product(allowed(SCHEDULES["ztsnr"]), (torch.float32, torch.float64)):
        t = torch.tensor([0, 999]).to(dtype)
        first, last = weights(
            scheme, schedule.prediction, schedule.alpha(t), schedule.sigma(t)
        ).tolist()
        assert 0 < first < math.inf, (schedule.prediction, dtype)
        assert 0 <= last < math.inf, (schedule.prediction, dtype)


@pytest.mark.parametrize("name", WEIGHTINGS)
def test_weights_where_snr_is_zero(name: str) -> None:
    last = weights(
        WEIGHTINGS[name](),
        PREDICTIONS["v_prediction"](),
        *torch.tensor([[0.0], [1.0]], dtype=torch.float64),
    )
    assert float(last) == pytest.approx(AT_THE_END[name], rel=1e-15, abs=0)


@pytest.mark.parametrize("scheme", SCHEMES, ids=repr)
def test_weights_at_both_ends_of_a_flow(scheme: Weighting) -> None:
    """At σ = 0 a sample prediction has det = 0: there, and for σ^-2, the weight is infinite or
    undefined, and nowhere else.
    """
    for schedule, dtype in product(allowed(SCHEDULES["flow"]), (torch.float32, torch.float64)):
        t = torch.tensor([0.0, 1e-3, 1.0], dtype=dtype)
        alpha, sigma = schedule.alpha(t), schedule.sigma(t)
        weight = weights(scheme, schedule.prediction, alpha, sigma)
        det = torch.as_tensor(schedule.prediction.determinant(alpha, sigma))
        may_be_infinite = (det == 0) | (sigma == 0) & isinstance(scheme, SigmaSqrt)
        assert bool((weight.isfinite() | may_be_infinite).all()), (schedule.prediction, dtype)
        assert float(weight[1]) > 0, (schedule.prediction, dtype)


def test_the_first_weight_is_not_lost_in_float32() -> None:
    schedule, t = SCHEDULES["ztsnr"], torch.arange(1000)
    in_float32 = weights(MinSNR(), schedule.prediction, schedule.alpha(t), schedule.sigma(t))
    in_float64 = weights(
        MinSNR(), schedule.prediction, schedule.alpha(t.double()), schedule.sigma(t.double())
    )
    assert worst(in_float32[:-1].double(), in_float64[:-1]) < 1e-5


# the dead terminal step

DEAD = (
    r"^weighting '{name}' is 0 at t = {end}, where SNR is 0: the step that sampling starts from gets no gradient; "
    r"give it a floor \(floor=0.05, as a flag --loss_weight_floor 0.05\), or use weighting 'uniform'$"
)


@pytest.mark.parametrize("name", DEAD_AT_THE_END)
@pytest.mark.parametrize(
    ("schedule", "end"), [(SCHEDULES["ztsnr"], "999"), (SCHEDULES["flow"], "1")]
)
def test_a_dead_terminal_step_is_warned_of(name: str, schedule: NoiseSchedule, end: str) -> None:
    with pytest.warns(UserWarning, match=DEAD.format(name=name, end=end)) as caught:
        Noising(schedule, weighting=name)
    assert len(caught) == 1
    assert caught[0].filename == __file__  # it points at the line that made the Noising


@pytest.mark.parametrize(
    ("schedule", "scheme"),
    [
        (SCHEDULES[name], WEIGHTINGS[w](floor=f))
        for name in ("ztsnr", "flow")
        for w in DEAD_AT_THE_END
        for f in (0.05,)
    ]
    + [
        (SCHEDULES[name], w)
        for name in ("ztsnr", "flow")
        for w in WEIGHTINGS
        if w not in DEAD_AT_THE_END
    ]
    + [(SCHEDULES["scaled_linear"], name) for name in WEIGHTINGS],
    ids=repr,
)
def test_no_warning_without_cause(schedule: NoiseSchedule, scheme: Weighting | str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Noising(schedule, weighting=scheme)


def test_a_range_that_leaves_the_last_step_out_is_warned_of() -> None:
    with pytest.warns(
        UserWarning,
        match=r"^weighting 'per_range' is 0 at t = 999: the step that sampling starts from gets no",
    ):
        Noising(SCHEDULES["scaled_linear"], weighting=PerRange(((0.5, 1.0, 0.0),)))


def test_floor_lifts_what_is_below_it_and_nothing_else() -> None:
    schedule, t = SCHEDULES["ztsnr"], torch.arange(1000, dtype=torch.float64)
    alpha, sigma = schedule.alpha(t), schedule.sigma(t)
    bare, floored = (
        weights(MinSNR(floor=f), schedule.prediction, alpha, sigma) for f in (0.0, 0.05)
    )
    assert float(floored[-1]) == 0.05
    assert torch.equal(floored, torch.where(bare < 0.05, torch.full_like(bare, 0.05), bare))
    assert 50 < int((bare < 0.05).sum()) < 500


# constant by range


def test_ranges_are_half_open_in_timesteps() -> None:
    schedule = SCHEDULES["scaled_linear"]
    noising = Noising(schedule, PerRange(((0.7, 1.0, 3.0), (0.1, 0.2, 5.0)), elsewhere=0.5))
    t = torch.tensor([0, 99, 100, 199, 200, 699, 700, 999])
    for dtype in (torch.float32, torch.float64):
        noised = noising(torch.zeros(8, 2, dtype=dtype), step=0, timesteps=t)
        assert noised.weight.tolist() == [0.5, 0.5, 5.0, 5.0, 0.5, 0.5, 3.0, 3.0]


def test_every_boundary_of_a_thousand_steps_is_exact() -> None:
    fraction = SCHEDULES["ztsnr"].curve.fraction(torch.arange(1000.0))
    one = torch.ones(1000)
    for k in range(1, 1000):
        weight = PerRange(((k / 1000, 1.0, 2.0),))(one, one, one, fraction)
        assert int((weight == 1.0).sum()) == k


def test_ranges_of_a_flow_are_of_its_noise_level() -> None:
    schedule = NoiseSchedule.flow(shift=3.0)
    t = torch.tensor([0.1, 0.2, 0.5, 1.0])
    noised = Noising(schedule, PerRange(((0.5, 1.0, 2.0),)))(torch.zeros(4, 2), step=0, timesteps=t)
    assert schedule.sigma(t)[:2].tolist() == pytest.approx([0.25, 3 / 7])
    assert noised.weight.tolist() == [1.0, 1.0, 2.0, 2.0]


def test_ranges_multiply_the_weights_of_a_scheme() -> None:
    schedule = SCHEDULES["ztsnr"]
    alpha, sigma = levels(schedule)
    fraction = schedule.curve.fraction(times(schedule))
    weight = PerRange(((0.0, 0.5, 3.0),), weighting=Debiased())(alpha, sigma, 1.0, fraction)
    expected = Debiased()(alpha, sigma, 1.0) * torch.where(fraction < 0.5, 3.0, 1.0)
    assert torch.equal(weight, expected)
    assert PerRange(weighting="debiased") == PerRange(weighting=Debiased())
    floored = PerRange(((0.5, 1.0, 0.0),), floor=0.25)(alpha, sigma, 1.0, fraction)
    assert torch.equal(floored, torch.where(fraction < 0.5, 1.0, 0.25))


def test_ranges_as_yaml_has_them() -> None:
    scheme = PerRange([[0, 0.5, 2]])
    assert scheme == PerRange(((0.0, 0.5, 2.0),))
    assert hash(scheme) == hash(PerRange(((0.0, 0.5, 2.0),)))


@pytest.mark.parametrize("kind", CURVES)
def test_fraction_of_training_time_runs_from_data_to_noise(kind: str) -> None:
    curve = CURVES[kind]()
    t = torch.linspace(curve.t_min, curve.t_max, 500, dtype=torch.float64)
    fraction = curve.fraction(t)
    assert bool((fraction.diff() > 0).all())
    assert 0 <= float(fraction[0]) < 2e-3
    assert 1 - 1 / curve.num_train_timesteps - 1e-12 <= float(fraction[-1]) <= 1


def test_fraction_of_edm_is_evenly_spaced_on_its_grid() -> None:
    curve = NoiseSchedule.karras().curve
    u = torch.linspace(0, 1, 11, dtype=torch.float64)
    assert torch.allclose(curve.fraction(curve.time_at_quantile(u)), u, rtol=0, atol=1e-12)


BAD_RANGES: list[tuple[Any, str]] = [
    (((0.5, 0.2, 1.0),), r"^a range needs 0 <= min < max <= 1, got \(0.5, 0.2, 1.0\); "),
    (((0.5, 0.5, 1.0),), r"^a range needs 0 <= min < max <= 1, got \(0.5, 0.5, 1.0\); "),
    (((-0.1, 0.5, 1.0),), r"^a range needs 0 <= min < max <= 1, got \(-0.1, 0.5, 1.0\); "),
    (
        ((200, 400, 1.0),),
        r"^a range needs 0 <= min < max <= 1, got \(200.0, 400.0, 1.0\); times are fractions of training time",
    ),
    (((math.nan, 0.5, 1.0),), r"^a range needs 0 <= min < max <= 1, got \(nan, 0.5, 1.0\); "),
    (
        ((0.6, 1.0, 1.0), (0.0, 0.7, 1.0)),
        r"^ranges overlap: \(0.0, 0.7, 1.0\) and \(0.6, 1.0, 1.0\); end the first",
    ),
    (
        ((0.0, 0.5, -1.0),),
        r"^the weight of range \(0.0, 0.5, -1.0\) must be at least 0 and finite, got -1.0$",
    ),
    (((0.0, 0.5, math.inf),), r"^the weight of range .* must be at least 0 and finite, got inf$"),
    (((0.0, 0.5),), r"^a range is \(min, max, weight\), got \(0.0, 0.5\)$"),
]


@pytest.mark.parametrize(("ranges", "message"), BAD_RANGES)
def test_bad_ranges(ranges: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PerRange(ranges)


def test_bad_weight_elsewhere_and_missing_time() -> None:
    with pytest.raises(ValueError, match=r"^elsewhere must be at least 0 and finite, got nan$"):
        PerRange(elsewhere=math.nan)
    one = torch.ones(1)
    with pytest.raises(
        ValueError,
        match=r"^weighting 'per_range' needs the fraction of training time; give fraction=",
    ):
        PerRange()(one, one, one)
    for make in (lambda of: PerRange(weighting=of), lambda of: LearnedUncertainty(weighting=of)):
        with pytest.raises(
            ValueError,
            match=r"cannot be made of 'learned_uncertainty', which is learned; give it a closed form$",
        ):
            make("learned_uncertainty")


# bad input


@pytest.mark.parametrize("gamma", [0.0, -1.0, float("nan"), float("inf")])
def test_bad_gamma(gamma: float) -> None:
    with pytest.raises(
        ValueError, match=rf"^snr gamma must be positive and finite, got {gamma}; the paper uses 5$"
    ):
        MinSNR(gamma=gamma)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: SoftMinSNR(gamma=0.0),
            "gamma of weighting 'soft_min_snr' must be positive and finite, got 0.0",
        ),
        (lambda: P2(k=0.0), "k of weighting 'p2' must be positive and finite, got 0.0"),
        (
            lambda: P2(gamma=-1.0),
            "gamma of weighting 'p2' must be at least 0 and finite, got -1.0; the paper uses 1",
        ),
        (
            lambda: EDM(sigma_data=-1.0),
            "sigma_data of weighting 'edm' must be positive and finite, got -1.0",
        ),
        (
            lambda: VLike(strength=math.nan),
            "strength of weighting 'v_like' must be positive and finite, got nan",
        ),
        (
            lambda: Sigmoid(bias=math.nan),
            "bias of weighting 'sigmoid' must lie in -80 ... 80, got nan; it is a log SNR",
        ),
        (
            lambda: WEIGHTINGS["onetrainer_p2_v"](gamma=0.0),
            "gamma of weighting 'onetrainer_p2_v' must be positive and finite, got 0.0",
        ),
        (
            lambda: WEIGHTINGS["kohya_v_pred_like"](strength=0.0),
            "strength of weighting 'kohya_v_pred_like' must be positive and finite, got 0.0",
        ),
    ],
)
def test_bad_parameters(make: Callable[[], Weighting], message: str) -> None:
    with pytest.raises(ValueError) as caught:
        make()
    assert str(caught.value) == message


@pytest.mark.parametrize("scheme", WEIGHTINGS.values())
@pytest.mark.parametrize("floor", [-0.1, float("nan"), float("inf")])
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


class Trained(nn.Module, Weighting):
    """A weighting with a parameter."""

    name = "trained"

    def __init__(self) -> None:
        nn.Module.__init__(self)
        self.power = nn.Parameter(torch.tensor(0.5))

    __call__ = Weighting.__call__

    def on_target(self, alpha: Tensor, sigma: Tensor, det: Tensor, fraction: Any) -> Tensor:
        return 1 + alpha**self.power


@pytest.mark.parametrize("timesteps", ["uniform", "stratified"])
@pytest.mark.parametrize("schedule", [NoiseSchedule.scaled_linear(), NoiseSchedule.flow()])
def test_a_weighting_with_a_parameter_trains(schedule: NoiseSchedule, timesteps: str) -> None:
    weighting = Trained()
    noising = Noising(schedule, weighting=weighting, timesteps=timesteps)
    x0 = torch.randn(4, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        noising.eval()(x0, step=0)  # a validation before training leaves nothing behind
    noising.train()
    for step in range(2):
        noised = noising(x0, step=step)
        noised.loss(0 * x0).backward()
        power = weighting.power.detach().clone().requires_grad_()
        with torch.no_grad():
            errors = noised.target.square().flatten(1).mean(1)
        alpha = schedule.alpha(noised.t).float()
        ((1 + alpha**power) * errors).mean().backward()
        assert weighting.power.grad is not None and power.grad is not None
        assert torch.allclose(weighting.power.grad, power.grad, rtol=1e-4)
        with torch.no_grad():
            weighting.power -= 0.1 * weighting.power.grad
        weighting.power.grad = None
