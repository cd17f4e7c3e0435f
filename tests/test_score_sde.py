"""The score SDE paper's samplers: diffusers' results, exact Gaussians, and the corrector's
stationary state.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Any

import diffusers.schedulers.deprecated.scheduling_sde_vp as peer_vp
import diffusers.schedulers.scheduling_sde_ve as peer_ve
import pytest
import torch
from torch import Tensor

from alphabar.noising import NoiseSchedule, VarianceExploding
from alphabar.sampling import METHODS, Combination, Knot, Method, Sampler, Table, Trace
from alphabar.sampling.grids import make_knots
from alphabar.sampling.inference import Run
from alphabar.sampling.knots import knot_at_half_log_snr
from alphabar.sampling.methods.score_sde import score_sde_vp
from alphabar.sampling.standalone.langevin import PredictorCorrector
from alphabar.sampling.table import compile_table
from alphabar.sampling.tracing import Draw, Evaluation

VP_METHOD = METHODS["score_sde_vp"]
VP = NoiseSchedule.variance_preserving()
VE = NoiseSchedule.variance_exploding()
MEAN, SPREAD = 0.7, 0.4


def bumpy(x: Tensor, t: Tensor) -> Tensor:
    return torch.tanh(1.3 * x.roll(1, -1) + 0.2) + 0.1 * torch.cos(t.view(-1, *[1] * (x.ndim - 1)))


def noises(count: int, shape: tuple[int, ...], seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(count)]


def given(monkeypatch: pytest.MonkeyPatch, module: Any, draws: list[Tensor]) -> None:
    """Make a peer draw these."""
    left = iter(draws)
    monkeypatch.setattr(module, "randn_tensor", lambda *args, **kwargs: next(left))


def run_table_with(
    sampler: Sampler, x: Tensor, network: Callable[[Tensor, Tensor], Tensor], draws: list[Tensor]
) -> Tensor:
    """A table's result from x, in float64, with these draws."""
    from alphabar.sampling.kernel import run

    left = iter(draws)

    def evaluate(x: Tensor, knot: Knot) -> Tensor:
        return network(x, torch.full(x.shape[:1], knot.timestep, dtype=torch.float64))

    *_, last = run(sampler.table, x, evaluate, lambda start, end: next(left))
    return last.x


# the VP predictor


@pytest.mark.parametrize("steps", [1, 7, 50])
def test_agreement_with_the_vp_peer(steps: int, monkeypatch: pytest.MonkeyPatch) -> None:
    start, *draws = noises(steps + 1, (2, 3, 4))
    given(monkeypatch, peer_vp, draws)
    scheduler: Any = peer_vp.ScoreSdeVpScheduler()
    scheduler.set_timesteps(steps)
    scheduler.timesteps = scheduler.timesteps.double()
    x = mean = start
    for t in scheduler.timesteps:
        x, mean = scheduler.step_pred(bumpy(x, t * torch.ones(2)), x, t)
    sampler = Sampler(VP, VP_METHOD, steps, "score_sde", predictor="euler_maruyama")
    ours = run_table_with(sampler, start, lambda x, t: bumpy(x, t / 1000), draws)
    # the peer's times are float32: the network sees them, and the rate depends on them
    assert torch.allclose(ours, mean, rtol=1e-5, atol=1e-5)


def test_the_peer_s_name_stands_for_its_predictor_and_times() -> None:
    implied = VP_METHOD.aliases["ScoreSdeVpScheduler"]
    sampler = Sampler(VP, VP_METHOD, 20, **implied)
    assert sampler.timesteps == pytest.approx(
        [1000 * t for t in torch.linspace(1, 1e-3, 20, dtype=torch.float64).tolist()]
    )
    assert sampler.table.draws == 19  # the mean at the end


def score_gaussian(knot: Knot) -> tuple[float, float]:
    """(a, b) of the exact score a x + b for x_0 ~ N(MEAN, SPREAD²)."""
    variance = (knot.alpha * SPREAD) ** 2 + knot.sigma**2
    return -1 / variance, knot.alpha * MEAN / variance


def moments(table: Table, schedule: NoiseSchedule) -> tuple[float, float]:
    """Mean and variance at the end of a table from the exact marginal at its start, without
    sampling.
    """
    first = table.knots[0]
    # coordinates: 1, the start's noise, then each draw
    state = {0: first.alpha * MEAN, 1: math.hypot(first.alpha * SPREAD, first.sigma)}
    drawn = 1
    for step in table.steps:
        basis = [state]
        for op in step.ops:
            if isinstance(op, Draw):
                drawn += 1
                basis.append({drawn: 1.0})
                continue
            assert isinstance(op, Evaluation)
            a, b = score_gaussian(op.knot)
            alpha, sigma = op.knot.alpha, op.knot.sigma
            # ε = -σ score, x_0 = (x - σ ε) / α: the output is c0 x_0 + c1 ε, an affine function of
            # x
            c0, c1 = (float(c) for c in schedule.prediction.coefficients(alpha, sigma))
            slope = c0 * (1 + sigma**2 * a) / alpha - c1 * sigma * a
            offset = c0 * sigma**2 * b / alpha - c1 * sigma * b
            out = {k: slope * v for k, v in state.items()}
            out[0] = out.get(0, 0.0) + offset
            basis.append(out)
        state = {}
        for k, c in step.carry[0]:
            for j, v in basis[k].items():
                state[j] = state.get(j, 0.0) + c * v
    return state[0], sum(v**2 for j, v in state.items() if j)


def weak_error(steps: int, schedule: NoiseSchedule, predictor: str) -> float:
    def formula(*arguments: Any) -> list[Combination]:
        return score_sde_vp(*arguments, predictor=predictor)

    if predictor == "euler_maruyama":
        knots = make_knots(schedule, steps, "score_sde")
        last = Knot(0.0, 1.0, 0.0)
    else:
        knots = tuple(knot_at_half_log_snr(schedule, -2 + 4 * i / steps) for i in range(steps + 1))
        last = knots[-1]
    mean, variance = moments(compile_table("score_sde", formula, knots, schedule), schedule)
    return max(
        abs(mean - last.alpha * MEAN), abs(variance - (last.alpha * SPREAD) ** 2 - last.sigma**2)
    )


@pytest.mark.parametrize(
    ("schedule", "predictor"),
    [
        (VP, "reverse_diffusion"),
        (VE, "reverse_diffusion"),
        (NoiseSchedule.flow(), "reverse_diffusion"),
        (NoiseSchedule.scaled_linear(prediction="v_prediction"), "reverse_diffusion"),
        (VP, "euler_maruyama"),
        (VP.with_prediction("score"), "euler_maruyama"),
    ],
    ids=lambda value: (
        value if isinstance(value, str) else f"{value.curve.kind}-{value.prediction.name}"
    ),
)
def test_weak_order_one(schedule: NoiseSchedule, predictor: str) -> None:
    errors = [weak_error(steps, schedule, predictor) for steps in (200, 400, 800)]
    assert errors[0] < 0.05
    assert math.log2(errors[0] / errors[1]) == pytest.approx(1, abs=0.15)
    assert math.log2(errors[1] / errors[2]) == pytest.approx(1, abs=0.15)


@pytest.mark.parametrize("grid", ["trailing", "leading", "linspace", "karras"])
@pytest.mark.parametrize(
    "schedule",
    [
        VP,
        VE,
        NoiseSchedule.flow(3.0),
        NoiseSchedule.linear(prediction="sample").zero_terminal_snr(),
    ],
    ids=lambda schedule: schedule.curve.kind,
)
def test_the_table_is_finite_on_every_schedule_and_grid(schedule: NoiseSchedule, grid: str) -> None:
    table = Sampler(schedule, VP_METHOD, 10, grid).table  # it checks itself at birth
    assert table.evaluations == 10
    assert table.draws == 9


def test_from_zero_snr_the_predictor_takes_the_posterior() -> None:
    schedule = NoiseSchedule.linear(prediction="sample").zero_terminal_snr()
    trace, x = Trace(schedule, 1), Combination({0: 1.0})
    knots = [Knot(999.0, 0.0, 1.0), Knot(500.0, 0.6, 0.8)]
    (x_n,) = score_sde_vp(trace, knots, 0, x)
    # α_n D + σ_n z, nothing of x
    assert x_n.row == ((1, pytest.approx(0.6)), (2, pytest.approx(0.8)))


# predictor and corrector


def replayed(
    sampler: PredictorCorrector,
    x: Tensor,
    network: Callable[[Tensor, Knot], Tensor],
    draws: Iterator[Tensor],
) -> Tensor:
    *_, last = sampler.advance(Run(x, network, lambda: next(draws)), sampler.knots)
    return last.x


@pytest.mark.parametrize("correct_steps", [0, 1, 3])
def test_agreement_with_the_ve_peer(correct_steps: int, monkeypatch: pytest.MonkeyPatch) -> None:
    steps, shape = 12, (2, 3, 4)
    start, *draws = noises(1 + steps * (correct_steps + 1), shape)
    given(monkeypatch, peer_ve, draws)
    scheduler = peer_ve.ScoreSdeVeScheduler(sigma_max=50.0)
    scheduler.set_timesteps(steps)
    scheduler.set_sigmas(steps, 0.01, 50.0)
    scheduler.discrete_sigmas = torch.linspace(
        math.log(0.01), math.log(50.0), steps, dtype=torch.float64
    ).exp()
    sigmas = scheduler.discrete_sigmas.flip(0)

    def score(x: Tensor, sigma: float) -> Tensor:
        return bumpy(x / (1 + sigma), torch.tensor([sigma])) / sigma - x / (1 + sigma**2)

    x = mean = start * 50.0
    for i, sigma in enumerate(sigmas.tolist()):
        for _ in range(correct_steps):
            x = scheduler.step_correct(score(x, sigma), x).prev_sample
        # the middle of the interval that the peer's floor takes for this index
        output = scheduler.step_pred(score(x, sigma), (steps - 1 - i + 0.5) / (steps - 1), x)
        x, mean = output.prev_sample, output.prev_sample_mean
    schedule = NoiseSchedule.variance_exploding(sigma_max=50.0)
    sampler = PredictorCorrector(schedule, steps, correct_steps=correct_steps, norm="batch")
    assert [knot.sigma for knot in sampler.knots[:-1]] == pytest.approx(sigmas.tolist())
    ours = replayed(sampler, start * 50.0, lambda x, knot: score(x, knot.sigma), iter(draws))
    # the peer rounds the corrector's step size to float32
    assert torch.allclose(ours, mean, rtol=1e-6, atol=1e-6)


def test_the_noise_levels_are_geometric() -> None:
    # as algorithm 2 has them; the network is given exactly these, where the peer's are up to 1e-4
    # off its own steps
    knots = PredictorCorrector(
        NoiseSchedule(VarianceExploding(num_train_timesteps=2000), "score"), 2000
    ).knots
    ratios = [n.sigma / s.sigma for s, n in pairwise(knots[:-1])]
    assert max(ratios) - min(ratios) < 1e-12
    assert (knots[0].sigma, knots[-2].sigma, knots[-1].sigma) == pytest.approx((1348.0, 0.01, 0.0))
    scheduler = peer_ve.ScoreSdeVeScheduler()
    scheduler.set_timesteps(2000)
    scheduler.set_sigmas(2000)
    assert scheduler.discrete_sigmas.flip(0).tolist() == pytest.approx(
        [k.sigma for k in knots[:-1]], rel=1e-5
    )
    seen = (scheduler.sigmas / scheduler.discrete_sigmas.flip(0) - 1).abs().max()
    assert 5e-5 < float(seen) < 2e-4


@pytest.mark.parametrize(
    "schedule", [VE, VP, NoiseSchedule.flow(), NoiseSchedule.karras()], ids=lambda s: s.curve.kind
)
def test_without_a_corrector_it_is_the_table(schedule: NoiseSchedule) -> None:
    def network(x: Tensor, t: Tensor) -> Tensor:
        return torch.tanh(x / (1 + x.abs())) + 0 * t.view(-1, 1)

    loop = PredictorCorrector(schedule, 10, correct_steps=0)(network, (2, 3), seeds=3)
    assert torch.equal(loop, Sampler(schedule, VP_METHOD, 10, "linspace")(network, (2, 3), seeds=3))


@pytest.mark.parametrize(
    "schedule",
    [VE, VP, VP.with_prediction("v_prediction")],
    ids=lambda s: f"{s.curve.kind}-{s.prediction.name}",
)
def test_the_corrector_is_langevin_dynamics(schedule: NoiseSchedule) -> None:
    # algorithms 4 and 5: x + ε s + sqrt(2 ε) z, with ε = 2 α (r |z| / |s|)²; image by image
    sampler = PredictorCorrector(schedule, 10)
    s, n = sampler.knots[4:6]
    (x, z), a_b = noises(2, (2, 3)), score_gaussian(s)
    score = a_b[0] * x + a_b[1]
    out = schedule.prediction.combine(
        (x + s.sigma**2 * score) / s.alpha, -s.sigma * score, s.alpha, s.sigma
    )
    ours = sampler._corrected(Run(x, lambda x, knot: out, lambda: z), x, s, n)
    scale = (s.alpha / n.alpha) ** 2
    for image in range(2):
        epsilon = 2 * scale * (0.15 * z[image].norm() / score[image].norm()) ** 2
        expected = x[image] + epsilon * score[image] + (2 * epsilon).sqrt() * z[image]
        assert torch.allclose(ours[image], expected, rtol=0, atol=1e-12)
    if schedule is VP:
        assert 0.1 < scale < 0.9


@pytest.mark.parametrize("norm", ["image", "batch"])
def test_an_image_and_its_company(norm: str) -> None:
    def network(x: Tensor, sigma: Tensor) -> Tensor:
        return -x / (1 + sigma.view(-1, 1) ** 2)

    sampler = PredictorCorrector(VE, 20, norm=norm)
    alone, among = (
        sampler(network, (1, 3), seeds=[4])[0],
        sampler(network, (3, 3), seeds=[4, 5, 6])[0],
    )
    assert torch.allclose(alone, among, rtol=1e-5, atol=1e-6) == (norm == "image")


def test_samples_of_a_gaussian() -> None:
    # 100 predictor-corrector steps for 4000 independent "images" of one number have the data's mean
    # and spread
    schedule = NoiseSchedule.variance_exploding(sigma_max=20.0)

    def network(x: Tensor, sigma: Tensor) -> Tensor:
        return (MEAN - x) / (SPREAD**2 + sigma.view(-1, 1) ** 2)

    start = torch.randn(40, 100, generator=torch.Generator().manual_seed(0))
    x = PredictorCorrector(schedule, 100)(network, start, seeds=0)
    assert float(x.mean()) == pytest.approx(MEAN, abs=0.03)
    assert float(x.std()) == pytest.approx(SPREAD, rel=0.06)


def test_a_score_of_zero_is_no_reason_to_leave_the_numbers() -> None:
    x = PredictorCorrector(VE, 3)(lambda x, sigma: 0 * x, (2, 3), seeds=0)
    assert bool(x.isfinite().all())


# bad input


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"norm": "mean"}, "norm must be one of image, batch, got 'mean'"),
        (
            {"snr": 0.0},
            "snr must be positive, got 0.0; the paper uses 0.16 for VE, 0.15 is diffusers'",
        ),
        ({"correct_steps": -1}, "correct_steps must be an integer of at least 0, got -1"),
        ({"correct_steps": 1.5}, "correct_steps must be an integer of at least 0, got 1.5"),
        ({"steps": 0}, "steps must be between 1 and the 1000 training timesteps, got 0"),
        ({"grid": "linspac"}, "unknown grid 'linspac'; did you mean 'linspace'?"),
    ],
)
def test_bad_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError) as caught:
        PredictorCorrector(VE, **options)
    assert str(caught.value) == message


def test_euler_maruyama_needs_a_rate() -> None:
    message = (
        "predictor 'euler_maruyama' needs the rate β(t) of NoiseSchedule.variance_preserving(), "
        "got a flow schedule; "
        "use predictor='reverse_diffusion'"
    )
    with pytest.raises(ValueError) as caught:
        Sampler(NoiseSchedule.flow(), VP_METHOD, 5, predictor="euler_maruyama")
    assert str(caught.value) == message
    with pytest.raises(
        ValueError,
        match=r"^predictor must be one of reverse_diffusion, euler_maruyama, got 'heun'$",
    ):
        Sampler(VP, VP_METHOD, 5, predictor="heun")


def test_the_method_is_an_ordinary_one() -> None:
    assert isinstance(VP_METHOD, Method)
    assert (VP_METHOD.name, VP_METHOD.order, VP_METHOD.stochastic) == ("score_sde_vp", 1, True)
    assert VP_METHOD.options == {"predictor": "reverse_diffusion"}
