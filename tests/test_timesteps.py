"""Densities of training timesteps: exact quantiles, one direction, and never a time outside the
schedule.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from scipy import integrate, stats
from torch import Tensor

from alphabar.noising import (
    TIMESTEPS,
    BetaTimesteps,
    CosMapTimesteps,
    CustomTimesteps,
    ListedTimesteps,
    LogitNormalTimesteps,
    LogNormalSigmaTimesteps,
    LossSecondMoment,
    ModeTimesteps,
    NoiseLevelTimesteps,
    NoiseSchedule,
    Noising,
    ReversedTimesteps,
    Timesteps,
    UniformTimesteps,
    WeightedTimesteps,
    WithinTimesteps,
)
from oracles import SCHEDULES

FLOW = NoiseSchedule.flow()
ZTSNR = SCHEDULES["ztsnr"]
EVERY = {
    **SCHEDULES,
    "karras": NoiseSchedule.karras(0.0064, 157.3),  # ends that float32 rounds outwards
    "vp": NoiseSchedule.variance_preserving(),
    "ve": NoiseSchedule.variance_exploding(),
    "cosine": NoiseSchedule.cosine(log_snr_shift=-2.0),
}
DENSITIES: dict[str, Timesteps] = {
    **{name: make() for name, make in TIMESTEPS.items()},
    "logit_normal(2, 0.5)": LogitNormalTimesteps(mean=2.0, std=0.5),
    "logit_normal(-1, 40)": LogitNormalTimesteps(mean=-1.0, std=40.0),
    "mode(-1)": ModeTimesteps(scale=-1.0),
    "beta(0.3, 5)": BetaTimesteps(a=0.3, b=5.0),
    "edm2": LogNormalSigmaTimesteps(mean=-0.4, std=1.0),
    "reversed": LogitNormalTimesteps(mean=1.0).reversed(),
    "noise level": NoiseLevelTimesteps(
        density=LogitNormalTimesteps(mean=0.5), shift=2.0, low=0.1, high=0.9
    ),
    "weighted": WeightedTimesteps(weights=(0.0, 1.0, 0.0, 2.0, 0.0)),
    "custom": CustomTimesteps(function=torch.sqrt),
    "around": LossSecondMoment(density=LogitNormalTimesteps(stratified=True), bins=7),
}
U = torch.linspace(0, 1, 4001, dtype=torch.float64)[1:]
INSIDE = U[:-1]
EXTREMES = torch.tensor([2.0**-53, 1e-9, 1 - 2.0**-53, 1.0], dtype=torch.float64)


# direction


@pytest.mark.parametrize("schedule", EVERY)
@pytest.mark.parametrize("density", DENSITIES)
def test_a_larger_u_is_more_noise(density: str, schedule: str) -> None:
    curve = EVERY[schedule].curve
    t = DENSITIES[density].times(torch.cat([EXTREMES[:2], U]), curve)
    t = t if curve.is_discrete else t.double()
    alpha, sigma = curve.alpha(t).double(), curve.sigma(t).double()
    assert bool((t.diff() >= 0).all()) and t[-1] > t[0]
    assert bool((sigma.diff() >= 0).all() & (alpha.diff() <= 0).all()) and sigma[-1] > sigma[0]


def test_reversed_is_the_density_of_trainers_that_index_a_descending_array() -> None:
    density, n = LogitNormalTimesteps(mean=1.0), 1000
    descending = torch.arange(n - 1, -1, -1)
    v = density.quantile(1 - INSIDE)
    theirs = descending[(v * n).long()]
    assert torch.equal(density.reversed().times(INSIDE, ZTSNR.curve), theirs)
    for one, mean in ((density, 0.696), (density.reversed(), 0.304)):
        assert float(FLOW.sigma(one.times(INSIDE, FLOW.curve)).mean()) == pytest.approx(
            mean, abs=1e-3
        )
    assert torch.allclose(
        density.reversed().reversed().quantile(INSIDE), density.quantile(INSIDE), atol=1e-15
    )


# exact quantiles


def close(a: Tensor, b: Any, tolerance: float = 1e-11) -> None:
    assert float((a - torch.as_tensor(b, dtype=torch.float64)).abs().max()) < tolerance


@pytest.mark.parametrize(("mean", "std"), [(0.0, 1.0), (1.0, 0.5), (-0.8, 1.6)])
def test_logit_normal(mean: float, std: float) -> None:
    t = LogitNormalTimesteps(mean=mean, std=std).times(INSIDE, FLOW.curve)
    close(INSIDE, stats.norm.cdf((t.log() - (1 - t).log()).numpy(), mean, std))


@pytest.mark.parametrize("scale", [-1.0, 0.0, 0.81, 1.29, 1.75])
def test_mode(scale: float) -> None:
    v = 1 - U  # eq. 20 runs from noise to data
    expected = 1 - v - scale * (torch.cos(math.pi / 2 * v) ** 2 - 1 + v)
    close(ModeTimesteps(scale=scale).quantile(U), expected)


def test_cosmap() -> None:
    t = CosMapTimesteps().quantile(U)
    for share, end in zip(U[::500].tolist(), t[::500].tolist(), strict=True):
        assert integrate.quad(
            lambda s: 2 / (math.pi - 2 * math.pi * s + 2 * math.pi * s**2), 0, end
        )[0] == (pytest.approx(share, abs=1e-10))


@pytest.mark.parametrize(("a", "b"), [(2.0, 2.0), (0.6, 0.6), (1.5, 1.0), (0.3, 5.0), (20.0, 3.0)])
def test_beta(a: float, b: float) -> None:
    close(INSIDE, stats.beta.cdf(BetaTimesteps(a=a, b=b).quantile(INSIDE).numpy(), a, b))


@pytest.mark.parametrize("schedule", EVERY)
@pytest.mark.parametrize(("mean", "std"), [(-1.2, 1.2), (-0.4, 1.0)])
def test_lognormal_sigma(schedule: str, mean: float, std: float) -> None:
    curve = EVERY[schedule].curve
    t = LogNormalSigmaTimesteps(mean=mean, std=std).times(INSIDE, curve)
    level = torch.tensor(stats.norm.ppf(INSIDE.numpy(), mean, std)).exp()
    ends = curve.sigma_ve(torch.tensor([curve.t_min, curve.t_max], dtype=torch.float64))
    inside = (level > ends[0]) & (level < ends[1])
    assert float(inside.double().mean()) > 0.7
    if not curve.is_discrete:
        assert float((curve.sigma_ve(t)[inside] / level[inside] - 1).abs().max()) < 1e-9
    else:
        assert t.dtype == torch.int64
        fraction = curve.time(-2 * level.log())  # the nearest timestep, and the ends beyond them
        assert float((t - fraction)[inside].abs().max()) <= 0.5
    for beyond, end in ((level <= ends[0], curve.t_min), (level >= ends[1], curve.t_max)):
        assert bool(((t - end).abs()[beyond] < 1e-12 * max(end, 1)).all())


# the ends


@pytest.mark.parametrize("schedule", EVERY)
@pytest.mark.parametrize("density", DENSITIES)
def test_extreme_draws_stay_inside(
    density: str, schedule: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen = EVERY[schedule]
    noising = Noising(chosen, timesteps=DENSITIES[density])
    for u in (0.0, 1 - 2.0**-53, 0.5):
        monkeypatch.setattr(Tensor, "uniform_", lambda self, u=u, **_: self.fill_(u))
        noised = noising(torch.zeros(2, 2), step=0)  # raises for times outside
        assert bool(chosen.sigma(noised.t).gt(0).all()) and bool(noised.target.isfinite().all())
        assert bool((noised.t >= chosen.curve.t_min).all() & (noised.t <= chosen.curve.t_max).all())
    if isinstance(chosen.curve.t_max, float) and density in (
        "logit_normal",
        "cosmap",
        "mode",
        "beta",
    ):
        assert float(DENSITIES[density].times(EXTREMES, chosen.curve)[-1]) == chosen.curve.t_max


def test_a_saturated_logit_normal_is_the_last_timestep() -> None:
    density = LogitNormalTimesteps(mean=50.0)
    assert float(density.quantile(U).min()) == 1.0  # the sigmoid has saturated
    assert bool((density.times(U, ZTSNR.curve) == 999).all())
    assert bool((LogitNormalTimesteps(mean=-800.0).times(U, FLOW.curve) > 0).all())


@pytest.mark.parametrize("density", DENSITIES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_latents_change_no_time(density: str, dtype: torch.dtype) -> None:
    for schedule in (ZTSNR, FLOW):
        noising = Noising(schedule, timesteps=DENSITIES[density], seed=4)
        half, full = (
            noising(torch.zeros(64, 2, dtype=d), step=0, index=range(64))
            for d in (dtype, torch.float32)
        )
        assert torch.equal(half.timesteps, full.timesteps) and torch.equal(half.t, full.t)


# strata


@pytest.mark.parametrize("density", [name for name, one in DENSITIES.items() if not one.stratified])
@pytest.mark.parametrize(("batch", "world_size", "accumulate"), [(12, 1, 1), (2, 3, 2)])
def test_every_density_can_be_stratified(
    density: str, batch: int, world_size: int, accumulate: int
) -> None:
    one = DENSITIES[density]
    stratified = type(one)(**{**vars(one), "stratified": True})
    noising, n = Noising(FLOW, timesteps=stratified, seed=9), 12
    for step in range(3):
        t = torch.cat([
            noising.draw([(m * batch + k) * world_size + r for k in range(batch)], (1,), step=step, total=n).t
            for r in range(world_size)
            for m in range(accumulate)
        ])  # fmt: skip
        edges = one.times(torch.arange(1, n, dtype=torch.float64) / n, FLOW.curve)
        ordered = t.double().sort().values
        assert bool((ordered[:-1] <= edges + 1e-7).all()) and bool(
            (ordered[1:] >= edges - 1e-7).all()
        )


def test_stratified_names() -> None:
    for name, density in DENSITIES.items():
        assert density.stratified is (name.startswith("stratified") or name == "around")
    assert UniformTimesteps(stratified=True).within(0, 0.5).stratified
    assert LogitNormalTimesteps(stratified=True).reversed().stratified


# ranges


def test_a_range_of_timesteps_includes_both_ends() -> None:
    low, high = 300, 307
    u = (torch.arange(800, dtype=torch.float64) + 0.5) / 800
    t = UniformTimesteps().within(low, high).times(u, ZTSNR.curve)
    assert torch.bincount(t - low).tolist() == [100] * 8


@pytest.mark.parametrize("schedule", ["ztsnr", "flow", "karras"])
@pytest.mark.parametrize(
    "density", [k for k, one in DENSITIES.items() if not one.measures_losses | one.stratified]
)
def test_a_range_cuts_the_density(density: str, schedule: str) -> None:
    curve, one = EVERY[schedule].curve, DENSITIES[density]
    low, high = one.times(torch.tensor([0.3, 0.7], dtype=torch.float64), curve).tolist()
    if density == "weighted":
        low, high = curve.time_at_quantile(torch.tensor([0.3, 0.9], dtype=torch.float64)).tolist()
    limited = one.within(low, high)
    limited.check(curve)
    t = limited.times(torch.cat([EXTREMES, U]), curve)
    assert float(t.min()) >= low and float(t.max()) <= high and t.dtype == one.times(U, curve).dtype
    fine = torch.linspace(0, 1, 10_001, dtype=torch.float64)[1:]
    kept = one.times(fine, curve)
    kept = kept[(kept >= low) & (kept <= high)].double()  # rejection, on a fine grid
    ours = limited.times((torch.arange(len(kept)) + 0.5) / len(kept), curve).double()
    gap = (ours - kept).abs() / (high - low)
    # one place of the grid may lie on the other side of a jump
    assert float(gap.mean()) < 2e-3 and float(gap.quantile(0.99)) < 2e-2


def test_a_range_is_exact() -> None:
    t = LogitNormalTimesteps(mean=0.5).within(0.25, 0.75).times(INSIDE, FLOW.curve)
    ends = stats.norm.cdf([math.log(1 / 3), math.log(3)], 0.5, 1)
    close(
        INSIDE,
        (stats.norm.cdf((t.log() - (1 - t).log()).numpy(), 0.5, 1) - ends[0]) / (ends[1] - ends[0]),
    )


# one's own


def test_weights_of_timesteps_are_exact() -> None:
    weights = torch.tensor([3.0, 0.0, 1.0, 0.0, 0.0, 2.0, 2.0, 0.0])
    schedule = NoiseSchedule.from_betas([0.1] * 8)
    u = (torch.arange(800, dtype=torch.float64) + 0.5) / 800
    density = WeightedTimesteps(weights=weights)
    t = density.times(u, schedule.curve)
    assert torch.equal(torch.bincount(t, minlength=8), (weights * 100).long())
    edges = torch.tensor([0.0, 3, 4, 6, 8], dtype=torch.float64) / 8
    for t in (
        density.times(e.clamp(2.0**-53, 1), schedule.curve)
        for e in (edges, edges + 1e-16, edges - 1e-16)
    ):
        assert bool((weights[t] > 0).all())


def test_weights_of_a_thousand_timesteps_never_miss_their_bin() -> None:
    weights = torch.arange(1000) % 2
    t = WeightedTimesteps(weights=weights).times(torch.cat([EXTREMES, U]), ZTSNR.curve)
    assert bool((t % 2 == 1).all()) and len(t.unique()) == 500


@pytest.mark.parametrize(
    "schedule", [ZTSNR, NoiseSchedule.flow(num_train_timesteps=1000)], ids=["discrete", "flow"]
)
def test_listed_timesteps(schedule: NoiseSchedule) -> None:
    listed = torch.tensor([999.0, 249, 749]) / (1 if schedule.curve.is_discrete else 1000)
    density = ListedTimesteps(listed=listed, weights=torch.tensor([1.0, 2, 1]))
    u = (torch.arange(400, dtype=torch.float64) + 0.5) / 400
    t = density.times(u, schedule.curve)
    assert t.unique().tolist() == listed.double().sort().values.tolist()
    assert [int((t == v).sum()) for v in listed.double()] == [100, 200, 100]
    noised = Noising(schedule, timesteps=density)(torch.zeros(50, 1), step=0)
    assert set(noised.t.tolist()) == set(listed.tolist())


def test_what_is_drawn_is_the_density_of_u() -> None:
    """The generators' u, through the quantile: nothing is lost on the way."""
    u = Noising(FLOW, seed=3).draw(range(64), (1,), step=2, total=64).t.double()
    for name, density in DENSITIES.items():
        if not density.stratified and not density.measures_losses:
            t = Noising(FLOW, timesteps=density, seed=3).draw(range(64), (1,), step=2, total=64).t
            assert torch.allclose(t.double(), density.times(u, FLOW.curve), rtol=1e-4, atol=1e-5), (
                name
            )


# bad input

BAD = {
    "std": (lambda: LogitNormalTimesteps(std=0.0), r"^logit-normal timesteps need a finite .* std, got 0\.0 and 0\.0; SD3"),
    "mean": (lambda: LogNormalSigmaTimesteps(mean=math.inf), r"^lognormal noise levels need a finite mean .* EDM uses"),
    "mode high": (lambda: ModeTimesteps(scale=1.76), r"^the scale of mode timesteps must lie in -1 \.\.\. 1\.7519"),
    "mode low": (lambda: ModeTimesteps(scale=-1.01), "^the scale of mode timesteps"),
    "mode nan": (lambda: ModeTimesteps(scale=math.nan), "^the scale of mode timesteps"),
    "beta": (lambda: BetaTimesteps(a=0.0), r"^a and b of beta timesteps must be positive and finite, got 0\.0 and 2\.0$"),
    "range": (lambda: UniformTimesteps().within(5, 5), "^a range of timesteps needs low < high, "
                                                       "got 5 and 5$"),
    "range nan": (lambda: UniformTimesteps().within(math.nan, 5), "^a range of timesteps needs low "
                                                                  "< high"),
    "all 0": (lambda: WeightedTimesteps(weights=(0.0, 0.0)), "^the weights of weighted timesteps "
                                                             "must be finite, .* not all 0"),
    "negative": (lambda: WeightedTimesteps(weights=(1.0, -1.0)), "^the weights of weighted "
                                                                 "timesteps"),
    "none": (lambda: ListedTimesteps(listed=()), "^the weights of listed timesteps"),
    "count": (lambda: ListedTimesteps(listed=(1, 2), weights=(1.0,)), "^listed timesteps need one "
                                                                      "weight for each, got 1 for "
                                                                      "2$"),
    "repeat": (lambda: ListedTimesteps(listed=(1, 1)), "^listed timesteps repeat"),
    "reverse": (lambda: ReversedTimesteps(density=LogNormalSigmaTimesteps()), "^lognormal_sigma timesteps have no direction to reverse"),
    "reverse range": (lambda: UniformTimesteps().within(0, 1).reversed(), "^within timesteps have no direction"),
    "around": (lambda: LossSecondMoment().within(0, 1), "^loss_second_moment timesteps go around "
                                                        "other densities, not into them"),
    "twice": (lambda: LossSecondMoment(density=LossSecondMoment()), "^loss_second_moment timesteps "
                                                                    "do not go around"),
    "bins": (lambda: LossSecondMoment(bins=0), "^bins of loss_second_moment timesteps must be an "
                                               "integer of at least 1, got 0$"),
    "history": (lambda: LossSecondMoment(history_per_term=1.5), "^history_per_term of "
                                                                "loss_second_moment"),
    "uniform_prob": (lambda: LossSecondMoment(uniform_prob=0.0), r"^uniform_prob must lie in \(0, 1\], got 0\.0"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_numbers_are_refused(name: str) -> None:
    make, message = BAD[name]
    with pytest.raises(ValueError, match=message):
        make()


MISFITS = {
    "range too high": (ZTSNR, UniformTimesteps().within(10, 1000), r"^high must be an integer timestep in 0 \.\.\. 999 .*, got 1000$"),
    "range too low": (FLOW, UniformTimesteps().within(-0.1, 1), r"^low must be a time in 0 \.\.\. 1 of this flow schedule, got -0\.1$"),
    "fraction": (ZTSNR, UniformTimesteps().within(0.5, 10), r"^low must be an integer timestep"),
    "nothing there": (FLOW, WeightedTimesteps(weights=(1.0, 0.0)).within(0.6, 0.9), r"^weighted timesteps have none within 0\.6"),
    "listed": (ZTSNR, ListedTimesteps(listed=(0, 1000)), r"^a listed timestep must be an integer timestep"),
    "inside a range": (ZTSNR, LossSecondMoment(density=ListedTimesteps(listed=(0, 1000))), "^a listed timestep"),
    "decreases": (FLOW, CustomTimesteps(function=lambda u: 1 - u), r"^the quantile function .* decreases; u -> 1 must be noise"),
    "timesteps": (ZTSNR, CustomTimesteps(function=lambda u: 1000 * u), r"^the quantile function of custom .* a value in \[0, 1\]"),
    "nan": (ZTSNR, CustomTimesteps(function=lambda u: u / 0 * 0), "^the quantile function of "
                                                                  "custom timesteps must return"),
}  # fmt: skip


@pytest.mark.parametrize("name", MISFITS)
def test_what_does_not_fit_the_schedule_is_refused_at_once(name: str) -> None:
    schedule, density, message = MISFITS[name]
    with pytest.raises(ValueError, match=message):
        Noising(schedule, timesteps=density)


def test_densities_compare_and_print_by_their_numbers() -> None:
    assert WithinTimesteps(density=UniformTimesteps(), low=1, high=2) == UniformTimesteps().within(
        1, 2
    )
    assert len({LossSecondMoment(), LossSecondMoment(bins=100), LossSecondMoment(bins=10)}) == 2
    assert repr(ModeTimesteps(scale=0.5)) == "ModeTimesteps(stratified=False, across=1, scale=0.5)"


@pytest.mark.parametrize("name", [name for name in TIMESTEPS if "loss_second_moment" not in name])
def test_a_part_of_discrete_timesteps_is_drawn_within_it(name: str) -> None:
    curve = NoiseSchedule.linear().truncated(300, 499).curve
    t = TIMESTEPS[name]().times(torch.linspace(1e-9, 1, 4001, dtype=torch.float64), curve)
    assert t.dtype == torch.int64 and int(t.min()) >= 300 and int(t.max()) == 499
    assert bool((t.diff() >= 0).all())
