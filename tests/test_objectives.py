"""Objectives of flows: Diff2Flow, contrastive flow matching, optimal-transport couplings."""

from __future__ import annotations

import itertools
import re
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from alphabar.noising import (
    Contrastive,
    Immiscible,
    IndependentTimesteps,
    NoiseSchedule,
    Noising,
    OptimalTransport,
    StaircaseTimesteps,
    losses,
)
from alphabar.noising.timesteps import Timesteps
from alphabar.sampling import Sampler
from alphabar.training import Diff2Flow

FLOW = NoiseSchedule.flow()
BASES = {
    "sd15": NoiseSchedule.preset("sd15"),
    "v, zero terminal SNR": NoiseSchedule.scaled_linear(
        prediction="v_prediction"
    ).zero_terminal_snr(),
    "sample": NoiseSchedule.linear(prediction="sample"),
    "VP": NoiseSchedule.variance_preserving(),
}


class Gaussian(nn.Module):
    """The exact network of data from N(0.7, 0.3) on a schedule, at the network's timesteps."""

    def __init__(self, schedule: NoiseSchedule, seen: list[Tensor] | None = None) -> None:
        super().__init__()
        self.schedule, self.seen = schedule, seen

    def forward(self, x: Tensor, timesteps: Tensor) -> Tensor:
        if self.seen is not None:
            self.seen.append(timesteps)
        discrete = self.schedule.curve.is_discrete
        alpha, sigma = self.schedule.alpha_sigma(timesteps if discrete else timesteps / 1000, x)
        off = (x - 0.7 * alpha) / (0.3 * alpha**2 + sigma**2)
        x0, epsilon = 0.7 + 0.3 * alpha * off, sigma * off
        return self.schedule.prediction.combine(x0, epsilon, alpha, sigma)


def ends(base: NoiseSchedule) -> tuple[float, float]:
    """The noise levels of the flow with the first and the last SNR of a schedule."""
    t = torch.tensor([base.curve.t_min, base.curve.t_max], dtype=torch.float64)
    low, high = FLOW.time(base.log_snr(t)).tolist()
    return low, high


# Diff2Flow


@pytest.mark.parametrize("name", BASES)
def test_the_velocity_of_an_exact_network_is_exact(name: str) -> None:
    base = BASES[name]
    low, high = ends(base)
    sigma = torch.linspace(low + 1e-3, high, 9, dtype=torch.float64)
    x = torch.randn(9, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    got = Diff2Flow(Gaussian(base), base)(x, 1000 * sigma)
    torch.testing.assert_close(got, Gaussian(FLOW)(x, 1000 * sigma), rtol=0, atol=1e-12)
    one = Diff2Flow(Gaussian(base), base)(x, 1000 * sigma[4])  # as samplers call it
    torch.testing.assert_close(one[4], got[4], rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", BASES)
def test_the_flow_samples_what_the_diffusion_does(name: str) -> None:
    """Euler's method on the flow is DDIM at the same SNRs."""
    base = BASES[name]
    low, high = ends(base)
    levels = torch.linspace(high, low + 0.02, 6, dtype=torch.float64).tolist()
    ratios = [s / (1 - s) if s < 1 else float("inf") for s in levels]
    first = base.curve.alpha_sigma_at(FLOW.log_snr(torch.tensor(levels[0], dtype=torch.float64)))
    z = torch.randn(3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    run: dict[str, Any] = {"dtype": torch.float64}
    flow = Sampler(FLOW, "euler", sigmas=levels, init_noise="unit")
    diffusion = Sampler(base, "ddim", sigmas=ratios, init_noise="unit")
    got = flow(Diff2Flow(Gaussian(base), base), z / sum(first), **run)
    torch.testing.assert_close(got, diffusion(Gaussian(base), z, **run), rtol=0, atol=1e-10)


def test_the_network_trains_on_flow_targets() -> None:
    """At a timestep of the table the network sees that timestep and the noised batch of its betas."""
    base = BASES["sd15"]
    seen: list[Tensor] = []
    t = torch.tensor([10, 500, 999])
    sigma = FLOW.time(base.log_snr(t.double()))
    noised = Noising(FLOW)(torch.randn(3, 2, dtype=torch.float64), step=0, timesteps=sigma)
    network = Diff2Flow(Gaussian(base, seen), base)
    noised.loss(network(noised.x, noised.timesteps))
    torch.testing.assert_close(seen[-1], t.double(), rtol=0, atol=1e-6)
    half = network(noised.x.bfloat16(), noised.timesteps.float())
    assert half.dtype == torch.bfloat16 and bool(half.isfinite().all())
    beyond = network(noised.x, torch.tensor([1000.0, 1000.0, 0.0], dtype=torch.float64))
    assert bool(beyond.isfinite().all()) and seen[-1].tolist() == [999, 999, 0]


@pytest.mark.parametrize("schedule", [FLOW, NoiseSchedule.karras()], ids=["flow", "karras"])
def test_other_schedules_need_no_bridge(schedule: NoiseSchedule) -> None:
    with pytest.raises(ValueError, match="Diff2Flow is for a network of betas"):
        Diff2Flow(nn.Identity(), schedule)


# the contrastive loss


def test_the_contrastive_loss_is_the_papers() -> None:
    noised = Noising(FLOW, loss="contrastive:strength=0.2", weighting="snr")(
        torch.randn(4, 3, 2), step=0
    )
    out, u = torch.randn(4, 3, 2), noised.target
    other = u[[1, 2, 3, 0]]
    expected = ((out - u) ** 2 - 0.2 * (out - other) ** 2).flatten(1).mean(1)
    torch.testing.assert_close(noised.losses(out), noised.weight * expected)
    best = (u - 0.2 * other) / 0.8
    torch.testing.assert_close(
        torch.func.grad(lambda o: noised.loss(o))(best), torch.zeros_like(best), atol=1e-6, rtol=0
    )


def test_one_sample_has_no_negative_and_one_warning() -> None:
    losses._warn_of_one_sample.cache_clear()
    noised = Noising(FLOW, loss="contrastive")(torch.randn(1, 3), step=0)
    with pytest.warns(UserWarning, match="at least 2 samples") as told:
        for _ in range(2):
            assert float(noised.loss(noised.target + 2)) == pytest.approx(4.0)
    assert len(told) == 1


@pytest.mark.parametrize("timesteps", ["uniform", "independent:axis=1"])
def test_listeners_hear_the_squared_error(timesteps: str) -> None:
    """It is what loss by SNR shows and importance sampling follows: a loss below 0 tells neither."""
    noising = Noising(FLOW, timesteps=timesteps, loss="contrastive:strength=0.9")
    seen: list[Tensor] = []
    noising.register_loss_hook(lambda noised, errors: seen.append(errors))
    noised = noising(torch.randn(4, 3), step=0)
    assert float(noised.loss(noised.target)) < 0
    noised.loss(noised.target + 0.5)
    assert torch.equal(seen[0], torch.zeros_like(noised.t))
    torch.testing.assert_close(seen[1], torch.full_like(noised.t, 0.25))


@pytest.mark.parametrize(
    "timesteps",
    [IndependentTimesteps(context=1, context_probability=0.5), StaircaseTimesteps(lag=1.0)],
)
def test_a_negative_may_be_an_element_that_does_not_count(timesteps: Timesteps) -> None:
    noised = Noising(FLOW, timesteps=timesteps, loss="contrastive:strength=0.5")(
        torch.randn(8, 1, 4, 3, 3), step=0
    )
    assert noised.counted is not None
    counted = noised.counted.float()
    assert bool((counted != counted.roll(-1, 0)).any())
    out, u = torch.ones_like(noised.target), noised.target
    errors = ((out - u) ** 2 - 0.5 * (out - u.roll(-1, 0)) ** 2).mean((1, 3, 4))
    torch.testing.assert_close(noised.losses(out), (errors * counted).sum(1) / counted.sum(1))


def test_a_learned_variance_needs_a_loss_with_a_bound() -> None:
    with pytest.raises(ValueError, match="'contrastive' may be negative: together they have no"):
        Noising(FLOW, weighting="learned_uncertainty", loss="contrastive")
    Noising(FLOW, weighting="learned_uncertainty", loss="contrastive:strength=0.0")


def test_what_a_contrastive_loss_needs() -> None:
    for strength in (-0.1, 1.0, float("nan")):
        with pytest.raises(ValueError, match="0 <= strength < 1"):
            Contrastive(strength)


# optimal transport


@pytest.mark.parametrize("seed", range(3))
def test_the_coupling_has_the_least_squared_distance(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    noise, x0 = torch.randn(5, 3, generator=generator), 3 * torch.randn(5, 3, generator=generator)
    coupled = OptimalTransport().apply(noise, torch.empty(5, 0), x0)
    costs = [
        float(((x0 - noise[list(order)]) ** 2).sum()) for order in itertools.permutations(range(5))
    ]
    assert float(((x0 - coupled) ** 2).sum()) == pytest.approx(min(costs), rel=1e-6)


def test_the_cost_is_not_that_of_immiscible_noise() -> None:
    # distances prefer one long way and none, squares two of half the length
    noise, x0 = torch.tensor([[0.0, 0.5], [1.0, 0.0]]), torch.tensor([[1.0, 0.0], [2.0, 0.5]])
    empty = torch.empty(2, 0)
    squared, plain = (
        OptimalTransport().apply(noise, empty, x0),
        Immiscible().apply(noise, empty, x0),
    )
    assert squared.tolist() == noise.tolist() and plain.tolist() == noise.flip(0).tolist()


def test_the_target_has_the_coupled_noise() -> None:
    x0 = torch.randn(8, 3)
    noised, plain = (
        Noising(FLOW, noise=kind, seed=5)(x0, step=0) for kind in ("optimal_transport", "gaussian")
    )
    torch.testing.assert_close(noised.target, noised.noise - x0)
    torch.testing.assert_close(noised.noise.sort(0)[0], plain.noise.sort(0)[0])
    assert float((noised.noise - x0).square().sum()) < float((plain.noise - x0).square().sum())


def sinkhorn(a: Any, b: Any, cost: Any, reg: float, method: str) -> Any:
    """The plan of POT's function of this name, in its log domain."""
    assert method == "sinkhorn_log" and cost.mean() == pytest.approx(1.0)
    f, g = np.zeros(len(a)), np.zeros(len(b))
    for _ in range(200):
        f = reg * (np.log(a) - np.logaddexp.reduce((g - cost) / reg, axis=1))
        g = reg * (np.log(b) - np.logaddexp.reduce((f[:, None] - cost) / reg, axis=0))
    return np.exp((f[:, None] + g - cost) / reg)


@pytest.mark.parametrize("real", [False, True])
def test_noises_are_drawn_from_the_plan_of_sinkhorn(
    real: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if real:
        pytest.importorskip("ot", reason="POT is not installed")
    else:
        monkeypatch.setitem(sys.modules, "ot", types.SimpleNamespace(sinkhorn=sinkhorn))
    generator = torch.Generator().manual_seed(0)
    noise, x0 = torch.randn(4, 2, generator=generator), torch.randn(4, 2, generator=generator)
    cost = torch.cdist(x0, noise).double().square()
    plan = torch.as_tensor(
        sinkhorn([0.25] * 4, [0.25] * 4, (cost / cost.mean()).numpy(), 0.5, "sinkhorn_log")
    )
    kind, counts = OptimalTransport(regularization=0.5), torch.zeros(4, 4, dtype=torch.float64)
    grid = (torch.arange(100) + 0.5) / 100
    for u in grid:
        drawn = kind.apply(noise, u.expand(4, 1), x0)
        counts += (drawn[:, None] == noise[None]).all(-1)
    torch.testing.assert_close(counts / 100, 4 * plan, rtol=0, atol=0.011)
    noised = Noising(FLOW, noise="optimal_transport:regularization=0.5", seed=1)(x0, step=0)
    again = Noising(FLOW, noise="optimal_transport:regularization=0.5", seed=1)(x0, step=0)
    assert torch.equal(noised.x, again.x)


def test_without_pot_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ot", None)
    with pytest.raises(ImportError, match=re.escape("pip install 'alphabar[ot]'")):
        Noising(FLOW, noise="optimal_transport:regularization=0.1")
    with pytest.raises(ValueError, match="at least 0"):
        OptimalTransport(regularization=-1.0)


def test_the_page_runs() -> None:
    page = (Path(__file__).parent.parent / "docs" / "objectives.md").read_text(encoding="utf-8")
    names: dict[str, Any] = {}
    blocks = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    assert len(blocks) == 4
    for block in blocks:
        exec(block, names)
    assert names["images"].shape == (2, 4, 8, 8)
