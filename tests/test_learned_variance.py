"""Learned variances: diffusers' results, the two ends of the range, guidance, and networks that
learned none.
"""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import diffusers.schedulers.scheduling_ddpm as peer
import pytest
import torch
from torch import Tensor

from alphabar.noising import NoiseSchedule
from alphabar.sampling import Knot, Sampler
from alphabar.sampling.inference import Run
from alphabar.sampling.methods.steps import posterior_std
from alphabar.sampling.standalone.learned_variance import LearnedVariance

LINEAR = NoiseSchedule.linear()
ZTSNR = NoiseSchedule.linear(prediction="v_prediction").zero_terminal_snr()
SHAPE = (2, 3, 4, 4)


def drawn(count: int, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(SHAPE, generator=generator, dtype=torch.float64) for _ in range(count)]


def both(x: Tensor, t: Tensor, shift: float | Tensor = 0.0) -> Tensor:
    """A prediction, and a variance that is another for every number and also leaves -1 ... 1."""
    out = torch.tanh(1.3 * x.roll(1, -1) + 0.2 + shift) * (0.5 + t.view(-1, 1, 1, 1) / 2000)
    return torch.cat([out, 1.2 * torch.cos(3 * x + shift)], 1)


def positive(x: Tensor, t: Tensor) -> Tensor:
    out, v = both(x, t).chunk(2, 1)
    return torch.cat([out, 0.02 * (1.5 + v)], 1)


def walked(sampler: LearnedVariance, x: Tensor, network: Any, draws: list[Tensor]) -> Tensor:
    """The result from x, in float64, with these draws."""
    left, parts = iter(draws), []

    def evaluate(x: Tensor, knot: Knot) -> Tensor:
        parts[:] = network(x, torch.full(x.shape[:1], knot.timestep, dtype=torch.float64)).chunk(
            2, 1
        )
        return parts[0]

    *_, last = sampler.advance(
        Run(x, evaluate, lambda: next(left), head=lambda k: parts[k]), sampler.knots
    )
    return last.x


@pytest.mark.parametrize("grid", ["leading", "trailing"])
@pytest.mark.parametrize("variance_type", ["learned_range", "learned"])
@pytest.mark.parametrize(
    ("prediction", "zero_snr"),
    [
        ("epsilon", False),
        ("sample", False),
        ("v_prediction", False),
        ("sample", True),
        ("v_prediction", True),
    ],
)
def test_agreement_with_the_peer(
    variance_type: str, grid: str, prediction: str, zero_snr: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    schedule = LINEAR.with_prediction(prediction)
    sampler = LearnedVariance(
        schedule.zero_terminal_snr() if zero_snr else schedule, 20, variance_type, grid
    )
    scheduler = peer.DDPMScheduler(
        variance_type=variance_type,
        clip_sample=False,
        timestep_spacing=grid,
        prediction_type=prediction,
    )
    scheduler.set_timesteps(20)
    scheduler.alphas_cumprod = sampler.schedule.alphas_cumprod  # its own are float32
    start, *draws = drawn(20)
    # where its last timestep is not 0 (trailing) the peer adds noise to the clean image: none, here
    left = iter([*draws, torch.zeros_like(start)])
    monkeypatch.setattr(peer, "randn_tensor", lambda *args, **kwargs: next(left))
    network = both if variance_type == "learned_range" else positive
    x = start
    for t in scheduler.timesteps.tolist():
        x = scheduler.step(network(x, torch.full((2,), t, dtype=torch.float64)), t, x).prev_sample
    assert torch.allclose(walked(sampler, start, network, draws), x, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    "schedule",
    [LINEAR, ZTSNR, NoiseSchedule.squaredcos_cap_v2(), NoiseSchedule.flow()],
    ids=lambda s: s.curve.kind,
)
def test_the_range_is_from_the_posterior_to_the_forward_chain(schedule: NoiseSchedule) -> None:
    sampler = LearnedVariance(schedule, 50)
    for s, n in list(pairwise(sampler.knots))[:-1]:
        low, middle, high = (
            float(sampler.spread(torch.tensor(v, dtype=torch.float64), s, n)) for v in (-1, 0, 1)
        )
        beta = s.sigma**2 - (s.alpha / n.alpha * n.sigma) ** 2
        assert low == pytest.approx(posterior_std(s, n), rel=1e-12)
        assert high == pytest.approx(math.sqrt(beta), rel=1e-12)
        # half way in the logarithm
        assert middle == pytest.approx(math.sqrt(low * high), rel=1e-12)
        if schedule.curve.is_discrete and s.alpha:
            assert beta == pytest.approx(1 - (s.alpha / n.alpha) ** 2, rel=1e-9)
        assert low <= high * (1 + 1e-12)


@pytest.mark.parametrize("schedule", [LINEAR, ZTSNR], ids=["linear", "ztsnr"])
@pytest.mark.parametrize(("v", "variance_type"), [(-1.0, "fixed_small"), (1.0, "fixed_large")])
def test_the_ends_of_the_range_are_ddpm(
    schedule: NoiseSchedule, v: float, variance_type: str
) -> None:
    def single(x: Tensor, t: Tensor) -> Tensor:
        return both(x, t)[:, :3]

    def double(x: Tensor, t: Tensor) -> Tensor:
        return torch.cat([single(x, t), torch.full_like(x, v)], 1)

    fixed = Sampler(schedule, "ddpm", 10, variance_type=variance_type)(single, SHAPE, seeds=4)
    assert torch.allclose(
        LearnedVariance(schedule, 10)(double, SHAPE, seeds=4), fixed, rtol=1e-5, atol=1e-5
    )


def test_a_learned_logarithm() -> None:
    sampler = LearnedVariance(LINEAR, 10, "learned_log")
    s, n = sampler.knots[3:5]
    variance = torch.tensor([0.04, 0.25])
    assert torch.allclose(sampler.spread(variance.log(), s, n), torch.tensor([0.2, 0.5]))
    assert torch.allclose(
        LearnedVariance(LINEAR, 10, "learned").spread(variance, s, n), torch.tensor([0.2, 0.5])
    )


def test_guidance_leaves_the_conditional_variance_alone() -> None:
    arguments = {
        "conditioning": {"shift": torch.full((2, 1, 1, 1), 0.3)},
        "unconditional": {"shift": torch.full((2, 1, 1, 1), -0.2)},
    }

    def mixed(x: Tensor, t: Tensor) -> Tensor:
        (with_, v), (without, _) = both(x, t, 0.3).chunk(2, 1), both(x, t, -0.2).chunk(2, 1)
        return torch.cat([torch.lerp(without, with_, 3.0), v], 1)

    sampler = LearnedVariance(LINEAR, 8)
    guided = sampler(both, SHAPE, seeds=1, guidance_scale=3.0, **arguments)
    assert torch.allclose(guided, sampler(mixed, SHAPE, seeds=1), rtol=1e-5, atol=1e-5)


def test_progress_seeds_and_dtype() -> None:
    sampler = LearnedVariance(ZTSNR, 6)
    steps = list(sampler.iterate(both, SHAPE, seeds=[7, 8]))
    assert [(p.step, p.steps) for p in steps] == [(i, 6) for i in range(1, 7)]
    assert torch.allclose(steps[-1].x, steps[-1].denoised, atol=1e-5)
    assert torch.equal(sampler(both, (1, *SHAPE[1:]), seeds=8)[0], steps[-1].x[1])

    def half(x: Tensor, t: Tensor) -> Tensor:
        assert x.dtype == torch.bfloat16
        assert t.dtype == torch.int64
        return both(x, t).to(torch.bfloat16)

    assert sampler(half, SHAPE, seeds=7, dtype=torch.bfloat16).dtype == torch.float32
    assert LearnedVariance(ZTSNR) == LearnedVariance(ZTSNR) != LearnedVariance(ZTSNR, 10)


# bad input


def test_a_network_without_a_variance() -> None:
    message = r"^the network's output must have 2 times the 3 channels of its input, got shape \(2, 3, 4, 4\)$"
    with pytest.raises(ValueError, match=message):
        LearnedVariance(LINEAR, 5)(lambda x, t: x, SHAPE, seeds=0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"variance_type": "fixed"},
            "variance_type must be one of learned_range, learned, learned_log, got 'fixed'",
        ),
        ({"steps": 0}, "steps must be between 1 and the 1000 training timesteps, got 0"),
        ({"grid": "leeding"}, "unknown grid 'leeding'; did you mean 'leading'?"),
    ],
)
def test_bad_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError) as caught:
        LearnedVariance(LINEAR, **options)
    assert str(caught.value) == message
