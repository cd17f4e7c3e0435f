"""DPM adaptive: k-diffusion's results, exact flows, both ends of the schedule, and what it says
when it cannot go on.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from alphabar.noising import NoiseSchedule, Prediction
from alphabar.sampling import Combination, Knot, Trace
from alphabar.sampling.inference import Run
from alphabar.sampling.kernel import run as run_table
from alphabar.sampling.knots import knot_at_half_log_snr
from alphabar.sampling.standalone.adaptive import (
    AdaptiveProgress,
    DPMAdaptive,
    dpm_solver_2,
    dpm_solver_3,
)
from alphabar.sampling.table import compile_table

FROZEN = json.loads((Path(__file__).parent / "frozen" / "k_diffusion.json").read_text())
CASES = [case for case in FROZEN["cases"] if case["sampler"] == "sample_dpm_adaptive"]
MATRIX = torch.tensor(FROZEN["matrix"], dtype=torch.float64)
SCHEDULES = {
    "scaled_linear": NoiseSchedule.scaled_linear(),
    "karras": NoiseSchedule.karras(),
    "flow": NoiseSchedule.flow(shift=3.0),
    "vp": NoiseSchedule.variance_preserving(prediction="score"),
}
ZTSNR = NoiseSchedule.scaled_linear(prediction="v_prediction").zero_terminal_snr()
MEAN, SPREAD = 0.7, 0.4


def vector(values: Any) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def evaluation(
    schedule: NoiseSchedule, denoiser: Callable[[Tensor, float], Tensor]
) -> Callable[[Tensor, Knot], Tensor]:
    """The network, as runs call it, of a denoiser D(x / α, σ / α)."""

    def evaluate(x: Tensor, knot: Knot) -> Tensor:
        x = x / knot.input_scale
        D = denoiser(x / knot.alpha, knot.sigma_ve) if knot.alpha else torch.full_like(x, MEAN)
        return schedule.prediction.combine(
            D, (x - knot.alpha * D) / knot.sigma, knot.alpha, knot.sigma
        )

    return evaluate


def frozen_denoiser(x: Tensor, sigma: float) -> Tensor:
    s = math.sqrt(1 + sigma**2)
    return 0.8 * torch.tanh(x @ MATRIX.T / s) + 0.1 * torch.cos(x / s)


def gaussian_denoiser(x: Tensor, sigma: float) -> Tensor:
    """E[x_0 | x] for x_0 ~ N(MEAN, SPREAD²)."""
    return MEAN + SPREAD**2 / (SPREAD**2 + sigma**2) * (x - MEAN)


def exact_flow(x: Tensor, start: float, end: float) -> Tensor:
    """x / α at the noise level ``end``, along the exact probability flow."""
    return MEAN + (x - MEAN) * math.hypot(SPREAD, end) / math.hypot(SPREAD, start)


def advanced(
    sampler: DPMAdaptive,
    x: Tensor,
    denoiser: Any,
    noise: Iterator[Tensor] = iter(()),  # noqa: B008
) -> AdaptiveProgress:
    run = Run(x, evaluation(sampler.schedule, denoiser), lambda: next(noise))
    *_, progress = sampler.advance(run)
    return progress


# k-diffusion


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case["name"])
def test_agreement_with_k_diffusion(case: dict[str, Any], name: str) -> None:
    sampler = DPMAdaptive(
        SCHEDULES[name],
        sigma_min=FROZEN["sigma_min"],
        sigma_max=FROZEN["sigma_max"],
        final="sigma_min",
        **case["options"],
    )
    first, end = sampler.ends
    noise = iter([vector(draw["z"]) for draw in case["noise"]])
    progress = advanced(sampler, first.alpha * vector(FROZEN["x"]), frozen_denoiser, noise)
    assert torch.allclose(progress.x / end.alpha, vector(case["x"]), rtol=0, atol=1e-9)
    info = case["info"]
    assert (progress.step, progress.accepted, progress.rejected) == (
        info["n_accept"],
        info["n_accept"],
        info["n_reject"],
    )
    # a rejected step's first evaluation is used again
    assert progress.evaluations == info["nfe"] - info["n_reject"]


def test_the_cases_are_many_sided() -> None:
    assert {case["options"].get("order", 3) for case in CASES} == {2, 3}
    assert all(case["info"]["n_reject"] > 0 for case in CASES)
    assert sum("eta" in case["options"] for case in CASES) == 2


# exact answers


@pytest.mark.parametrize("order", [2, 3])
@pytest.mark.parametrize("name", SCHEDULES)
def test_the_exact_flow_is_followed_within_the_tolerance(name: str, order: int) -> None:
    calls = []
    for tolerance in (1e-2, 1e-4, 1e-6 if order == 3 else 1e-5):
        options = {"rtol": tolerance, "atol": tolerance, "sigma_max": 50.0, "max_evaluations": 5000}
        sampler = DPMAdaptive(SCHEDULES[name], order=order, final="sigma_min", **options)
        first, end = sampler.ends
        x = first.sigma * vector([[-1.3], [0.2], [2.1]])
        progress = advanced(sampler, x, gaussian_denoiser)
        exact = exact_flow(x / first.alpha, first.sigma_ve, end.sigma_ve)
        assert float((progress.x / end.alpha - exact).abs().max()) < 4 * tolerance
        calls.append(progress.evaluations)
    assert calls == sorted(calls)


@pytest.mark.parametrize("order", [2, 3])
def test_order_of_the_formulas(order: int) -> None:
    schedule = SCHEDULES["scaled_linear"]

    def formula(trace: Trace, knots: Sequence[Knot], i: int, x: Combination) -> list[Combination]:
        s, n = knots[i], knots[i + 1]
        _, e = trace.evaluate(x, s)
        low, e1 = dpm_solver_2(trace, s, n, x, e, r1=1 / 3 if order == 3 else 1 / 2)
        return [low if order == 2 else dpm_solver_3(trace, s, n, x, e, e1)]

    def error(steps: int) -> float:
        knots = [knot_at_half_log_snr(schedule, -2 + 4 * i / steps) for i in range(steps + 1)]
        table = compile_table("adaptive", formula, knots, schedule)  # checks the point mass, too
        x = knots[0].sigma * vector([[-1.3], [0.2], [2.1]])
        *_, last = run_table(
            table, x, evaluation(schedule, gaussian_denoiser), lambda a, b: torch.zeros(1)
        )
        exact = exact_flow(x / knots[0].alpha, knots[0].sigma_ve, knots[-1].sigma_ve)
        return float((last.x / knots[-1].alpha - exact).abs().max())

    assert math.log2(error(40) / error(80)) == pytest.approx(order, abs=0.15)


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("eta", [0.4, 1.0])
def test_noise_is_renewed_without_leaving_the_marginals(name: str, eta: float) -> None:
    # data of one point: every image is x_0 + σ times a unit combination of the draws, which are
    # unit vectors here
    unit = torch.eye(60, dtype=torch.float64)
    sampler = DPMAdaptive(SCHEDULES[name], eta=eta, sigma_max=50.0, final="sigma_min")
    first, end = sampler.ends
    x0 = vector([0.5]).expand(1, 60)
    draws = iter(unit[1:].unsqueeze(1))
    progress = advanced(
        sampler, first.alpha * x0 + first.sigma * unit[:1], lambda x, sigma: x0, draws
    )
    spread = float((progress.x / end.alpha - x0).norm())
    assert spread == pytest.approx(end.sigma_ve, rel=1e-9)
    assert 3 < progress.accepted < 59


# the ends


@pytest.mark.parametrize("prediction", ["v_prediction", "sample", "flow_prediction", "karras"])
@pytest.mark.parametrize(
    "schedule",
    [ZTSNR, NoiseSchedule.flow(), NoiseSchedule.cosine()],
    ids=["ztsnr", "flow", "cosine"],
)
def test_zero_terminal_snr(schedule: NoiseSchedule, prediction: str | Prediction) -> None:
    sampler = DPMAdaptive(schedule.with_prediction(prediction), rtol=1e-5, atol=1e-5)
    first, end = sampler.ends
    assert first.alpha == 0
    x = first.sigma * vector([[-1.3], [0.2], [2.1]])
    run = Run(x, evaluation(sampler.schedule, gaussian_denoiser), lambda: torch.zeros(1))
    steps = list(sampler.advance(run))
    assert steps[0].evaluations == 1
    assert steps[0].knot.timestep in (998.0, 999.0)
    # from pure noise the flow keeps its place in units of the deviation; then the last step is to
    # the mean of x_0
    at_end = MEAN + x * math.hypot(SPREAD, end.sigma_ve)
    assert torch.allclose(steps[-2].x / end.alpha, at_end, rtol=0, atol=2e-4)
    assert torch.allclose(steps[-1].x, gaussian_denoiser(at_end, end.sigma_ve), rtol=0, atol=2e-4)


@pytest.mark.parametrize("schedule", [*SCHEDULES.values(), ZTSNR], ids=[*SCHEDULES, "ztsnr"])
def test_the_final_step_is_to_the_clean_estimate(schedule: NoiseSchedule) -> None:
    def last_of(final: str) -> AdaptiveProgress:
        sampler = DPMAdaptive(schedule, final=final)
        x = math.hypot(sampler.ends[0].alpha, sampler.ends[0].sigma) * vector(
            [[-1.3], [0.2], [2.1]]
        )
        return advanced(sampler, x, gaussian_denoiser)

    short, whole = last_of("sigma_min"), last_of("zero")
    assert short.knot.sigma > 0
    assert (whole.knot.alpha, whole.knot.sigma) == (1.0, 0.0)
    assert torch.allclose(
        whole.x,
        gaussian_denoiser(short.x / short.knot.alpha, short.knot.sigma_ve),
        rtol=0,
        atol=1e-9,
    )
    assert torch.allclose(whole.x, whole.denoised, rtol=0, atol=1e-12)
    assert (whole.step, whole.evaluations) == (short.step + 1, short.evaluations + 1)


# a run


def network(x: Tensor, t: Tensor, shift: float | Tensor = 0.0) -> Tensor:
    return torch.tanh(1.3 * x + 0.1 + shift) * (0.5 + t.view(-1, 1) / 2000)


def test_progress_counts_what_happens() -> None:
    calls = 0

    def counted(x: Tensor, t: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        assert t.is_floating_point()
        assert not torch.is_grad_enabled()
        return network(x, t)

    steps = list(DPMAdaptive(ZTSNR, eta=0.5).iterate(counted, (2, 3), seeds=0))
    assert torch.is_grad_enabled()
    assert [progress.step for progress in steps] == list(range(1, len(steps) + 1))
    assert all(progress.steps > progress.step for progress in steps[:-1])
    assert steps[-1].steps == len(steps) == steps[-1].accepted + 2
    assert steps[-1].evaluations == calls
    assert steps[-1].x.dtype == steps[-1].denoised.dtype == torch.float32
    assert [p.knot.half_log_snr for p in steps] == sorted(p.knot.half_log_snr for p in steps)


def test_seeds_and_guidance() -> None:
    sampler = DPMAdaptive(SCHEDULES["flow"], eta=0.3)
    a, b, c = (sampler(network, (2, 3), seeds=seeds) for seeds in (5, [5, 6], 6))
    assert torch.equal(a, b)
    assert not torch.equal(a, c)
    arguments = {
        "conditioning": {"shift": torch.tensor([[0.2]])},
        "unconditional": {"shift": torch.tensor([[-0.1]])},
    }

    def mixed(x: Tensor, t: Tensor) -> Tensor:
        return torch.lerp(network(x, t, -0.1), network(x, t, 0.2), 3.0)

    guided = sampler(network, (1, 3), seeds=5, guidance_scale=3.0, **arguments)
    assert torch.allclose(guided, sampler(mixed, (1, 3), seeds=5), rtol=0, atol=1e-6)


def test_one_step_size_for_the_whole_batch() -> None:
    # what the head of the module says: the error is the batch's, so an image changes with its
    # company, within the tolerance
    schedule = NoiseSchedule.karras(sigma_max=20.0)

    def drawn(rtol: float, seeds: list[int]) -> Tensor:
        def smooth(x: Tensor, t: Tensor) -> Tensor:
            return torch.tanh(3 * x)

        return DPMAdaptive(schedule, rtol=rtol, atol=rtol / 6)(
            smooth, (len(seeds), 3), seeds=seeds
        )[0]

    differences = [
        float((drawn(rtol, [1]) - drawn(rtol, [1, 2, 3])).abs().max()) for rtol in (0.05, 0.001)
    ]
    assert differences[0] > 1e-5
    assert differences[1] < 0.1 * differences[0]


def test_a_sampler_is_a_value() -> None:
    assert DPMAdaptive(ZTSNR, order=2) == DPMAdaptive(ZTSNR, order=2) != DPMAdaptive(ZTSNR)
    assert len({DPMAdaptive(ZTSNR), DPMAdaptive(ZTSNR)}) == 1


# what cannot be done


def test_too_many_evaluations() -> None:
    message = (
        r"^DPM adaptive needs more than max_evaluations = 20 calls of the network: after \d+ accepted and \d+ rejected steps it "
        r"stands at σ/α = [\d.]+; raise max_evaluations, or rtol = 1e-06 and atol = 1e-06$"
    )
    calls = 0

    def counted(x: Tensor, t: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        return network(x, t)

    with pytest.raises(RuntimeError, match=message):
        DPMAdaptive(ZTSNR, rtol=1e-6, atol=1e-6, max_evaluations=20)(counted, (1, 3), seeds=0)
    assert calls <= 20


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_network_that_is_not_finite(bad: float) -> None:
    def broken(x: Tensor, t: Tensor) -> Tensor:
        return torch.full_like(x, bad)

    with pytest.raises(RuntimeError, match="look for NaN or infinity in what the network puts out"):
        DPMAdaptive(SCHEDULES["scaled_linear"])(broken, (1, 3), seeds=0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"order": 4}, "order must be one of 2, 3, got 4"),
        ({"rtol": 0.0}, "rtol must be positive, got 0.0"),
        ({"atol": -1.0}, "atol must be positive, got -1.0"),
        ({"h_init": math.nan}, "h_init must be positive, got nan"),
        ({"accept_safety": 0.0}, "accept_safety must be positive, got 0.0"),
        ({"max_evaluations": 0}, "max_evaluations must be positive, got 0"),
        ({"eta": 1.5}, "eta must be between 0 (deterministic) and 1 (ancestral), got 1.5"),
        ({"final": "mean"}, "final must be one of zero, sigma_min, got 'mean'"),
        ({"sigma_min": 0.0}, "sigma_min must be positive and finite (it is σ / α), got 0.0"),
        ({"sigma_max": math.inf}, "sigma_max must be positive and finite (it is σ / α), got inf"),
        ({"sigma_min": 20.0}, "need sigma_min < sigma_max, got 20 and 14.6146"),
    ],
)
def test_bad_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError) as caught:
        DPMAdaptive(SCHEDULES["scaled_linear"], **options)
    assert str(caught.value) == message
