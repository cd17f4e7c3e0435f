"""Weights without a mean are warned of where, and only where, the mean over the times does not
exist; sigma_sqrt is bounded.
"""

from __future__ import annotations

import warnings

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers.training_utils import compute_loss_weighting_for_sd3

from alphabar.noising import (
    TIMESTEPS,
    WEIGHTINGS,
    BetaTimesteps,
    LearnedUncertainty,
    LogitNormalTimesteps,
    NoiseSchedule,
    Noising,
    PerRange,
    SigmaSqrt,
    Timesteps,
    UniformTimesteps,
    VariancePreserving,
)
from alphabar.noising.weighting import resolve_weighting
from alphabar.noising.weighting.checks import end_without_mean
from oracles import allowed

FLOW = NoiseSchedule.flow()
# those that reach σ = 0 and α = 0, and those that end before
OPEN = {"flow": NoiseSchedule.flow(3.0), "cosine": NoiseSchedule.cosine(-2.0)}
CLOSED = {
    "variance_preserving": NoiseSchedule.variance_preserving(),
    "sub_variance_preserving": NoiseSchedule.sub_variance_preserving(),
    "variance_exploding": NoiseSchedule.variance_exploding(),
    "karras": NoiseSchedule.karras(),
    "part of a flow": FLOW.truncated(t_min=0.01),
    "discrete": NoiseSchedule.linear(),
}
DENSITIES = {name: make() for name, make in TIMESTEPS.items() if not name.startswith("stratified")}

# With prediction "sample" the weight on the target grows as σ^-p towards the data; with the others,
# whose determinant is not 0 there, no scheme grows but sigma_sqrt, which a Noising bounds. σ is
# proportional to t on these curves.
POWER_ON_SAMPLE = {
    "uniform": 0, "x0": 0, "min_snr": 0, "soft_min_snr": 0, "sigmoid": 0, "p2": 0, "onetrainer_p2_v": 0,
    "diffusers_pixart_min_snr_v": 0, "per_range": 0, "debiased": 1, "onetrainer_sigma": 1, "diffusers_cosmap_x0": 0,
}  # fmt: skip
# and the density of times falls as t^q towards the data, where it falls at all; faster than any
# power is 99
POWER_OF_DENSITY = {"beta": 1, "logit_normal": 99, "lognormal_sigma": 99}


@pytest.mark.parametrize("density", DENSITIES)
@pytest.mark.parametrize("weighting", WEIGHTINGS)
def test_every_weighting_on_every_density(weighting: str, density: str) -> None:
    scheme, times = resolve_weighting(weighting), DENSITIES[density]
    infinite = POWER_ON_SAMPLE.get(weighting, 2) - POWER_OF_DENSITY.get(density, 0) >= 1
    for schedule in OPEN.values():
        own = scheme.on_curve(schedule.curve)
        assert end_without_mean(own, times, schedule.with_prediction("v_prediction")) is None
        assert end_without_mean(own, times, schedule.with_prediction("sample")) == (
            0.0 if infinite else None
        )


@pytest.mark.parametrize("base", CLOSED)
def test_no_weight_grows_on_a_curve_that_ends(base: str) -> None:
    for schedule in allowed(CLOSED[base]):
        for weighting in WEIGHTINGS:
            scheme = resolve_weighting(weighting).on_curve(schedule.curve)
            assert end_without_mean(scheme, UniformTimesteps(), schedule) is None


@pytest.mark.parametrize(
    ("times", "infinite"),
    [
        (UniformTimesteps(), True),
        (BetaTimesteps(a=2.0, b=1.0), True),  # ∫ t · t^-2 dt, a logarithm
        (BetaTimesteps(a=2.2, b=1.0), False),
        (LogitNormalTimesteps(std=3.0), False),
        (UniformTimesteps().within(0.001, 1.0), False),
        (UniformTimesteps().within(0.0, 0.5), True),
        (LogitNormalTimesteps().reversed(), False),
    ],
    ids=lambda v: getattr(v, "name", str(v)),
)
def test_densities_that_do_and_do_not_reach_the_end(times: Timesteps, infinite: bool) -> None:
    end = end_without_mean(resolve_weighting("snr"), times, FLOW.with_prediction("sample"))
    assert (end == 0.0) is infinite


def test_a_curve_from_a_clean_sample_on() -> None:
    schedule = NoiseSchedule(VariancePreserving(eps=0.0), "sample")
    assert end_without_mean(resolve_weighting("snr"), UniformTimesteps(), schedule) == 0.0
    assert end_without_mean(resolve_weighting("x0"), UniformTimesteps(), schedule) is None


def warned(**settings: object) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        Noising(**settings)  # type: ignore[arg-type]
    return [str(w.message) for w in caught if "no finite mean" in str(w.message)]


def test_the_warning() -> None:
    (message,) = warned(schedule=FLOW.with_prediction("sample"), weighting="v")
    assert message.startswith(
        "weighting 'v' on prediction 'sample' has no finite mean under 'uniform' timesteps: it "
        "grows without bound towards t = 0"
    )
    assert (
        warned(schedule=FLOW.with_prediction("sample"), weighting="v", timesteps="logit_normal")
        == []
    )
    bounded = PerRange(weighting="sigma_sqrt"), LearnedUncertainty(weighting="sigma_sqrt")
    for weighting in ("min_snr:floor=0.1", "uniform", "cosmap", "sigma_sqrt", *bounded):
        assert warned(schedule=FLOW, weighting=weighting) == []
    # the bound taken away
    assert len(warned(schedule=FLOW, weighting=SigmaSqrt(sigma_min=0.0))) == 1


# sigma_sqrt


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_sigma_sqrt_is_bounded_as_the_peer_s(shift: float) -> None:
    peer = FlowMatchEulerDiscreteScheduler(shift=shift)
    theirs = compute_loss_weighting_for_sd3(
        "sigma_sqrt", torch.as_tensor(peer.sigmas)[: peer.config.num_train_timesteps]
    ).double()
    noising = Noising(NoiseSchedule.flow(shift), weighting="sigma_sqrt")
    schedule, weighting = noising.schedule, noising.weighting
    index = torch.arange(1000, dtype=torch.float64)
    t = schedule.curve.time_at_index(index)
    ours = weighting(schedule.alpha(t), schedule.sigma(t), 1.0)
    assert torch.allclose(ours.flip(0), theirs, rtol=1e-4)
    every = (torch.arange(400_000, dtype=torch.float64) + 0.5) / 400_000
    drawn = weighting(schedule.alpha(every), schedule.sigma(every), 1.0)
    assert float(drawn.max()) == pytest.approx(float(theirs.max()), rel=1e-4)
    assert 0.5 < float(drawn.mean() / theirs.mean()) < 1.5
    assert float(weighting(torch.ones(1), torch.zeros(1), 1.0)) == pytest.approx(
        float(theirs.max()), rel=1e-4
    )


def test_the_bound_reaches_the_scheme_inside_of_another() -> None:
    for weighting in (PerRange(weighting="sigma_sqrt"), LearnedUncertainty(weighting="sigma_sqrt")):
        inner = Noising(FLOW, weighting=weighting).weighting.weighting
        assert inner == SigmaSqrt(sigma_min=0.001)
    assert Noising(FLOW, weighting=SigmaSqrt(sigma_min=0.05)).weighting == SigmaSqrt(sigma_min=0.05)
    assert Noising(NoiseSchedule.linear(), weighting="sigma_sqrt").weighting == SigmaSqrt()


@pytest.mark.parametrize("sigma_min", [-0.1, 1.5, float("nan")])
def test_a_bound_is_a_level_of_the_flow(sigma_min: float) -> None:
    with pytest.raises(ValueError, match=r"^sigma_min of weighting 'sigma_sqrt' must lie in 0"):
        SigmaSqrt(sigma_min=sigma_min)


# items with options


def test_items_with_options() -> None:
    noising = Noising(
        FLOW,
        weighting="min_snr:gamma=3,floor=0.05",
        timesteps="logit_normal:mean=1",
        noise="offset:strength=0.05",
        loss="huber:c=0.2",
    )
    assert (noising.weighting.gamma, noising.weighting.floor) == (3, 0.05)
    assert noising.timesteps == LogitNormalTimesteps(mean=1)
    assert noising.noise.strength == 0.05 and noising.loss.c == 0.2
    chain = Noising(FLOW, noise=["offset:strength=0.05", "input_perturbation"]).noise
    assert chain.name == "offset + input_perturbation" and chain.kinds[0].strength == 0.05


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"weighting": "min_snr:gama=3"},
            r"^unknown option of weighting min_snr 'gama'; did you mean 'gamma'\?$",
        ),
        (
            {"weighting": "min_snr:gamma"},
            r"^unknown weighting 'min_snr:gamma'; did you mean 'min_snr'",
        ),
        ({"weighting": "min_snr:gamma=much"}, "^weighting min_snr does not take gamma='much'"),
        (
            {"timesteps": "logit_norm:mean=1"},
            "^unknown timestep density 'logit_norm'; did you mean 'logit_normal'",
        ),
        ({"noise": "offset:strength=-1"}, "^noise offset strength must be at least 0, got -1"),
        ({"loss": "huber:c=0"}, "^c and scale of loss 'huber' must be positive"),
    ],
    ids=str,
)
def test_bad_items_are_refused(settings: dict[str, str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Noising(FLOW, **settings)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            "scaled_linear",
            r"^a NoiseSchedule is made by name as a call, not from 'scaled_linear'; write NoiseSchedule\.scaled_linear\(\)$",
        ),
        ("scaledlinear", r"; write NoiseSchedule\.scaled_linear\(\)$"),
        ("xyz", r"; the schedules are NoiseSchedule\.cosine, "),
        (None, r"^curve must be a Curve, got NoneType; e\.g\. NoiseSchedule\.scaled_linear\(\)$"),
    ],
)
def test_a_schedule_is_not_its_name(given: object, message: str) -> None:
    with pytest.raises(TypeError, match=message):
        NoiseSchedule(given)
