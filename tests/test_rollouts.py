"""Rollouts: the density of every stochastic step of every table, under the weights that drew it and
under others.
"""

import math
import re
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributions import Normal, kl_divergence

from alphabar.noising import NoiseSchedule
from alphabar.sampling import METHODS, Method, Sampler, Transition
from alphabar.sampling.inference import SeededNoise
from alphabar.sampling.kernel import run
from alphabar.sampling.rollouts.actions import actions_of, segments
from alphabar.sampling.table import compile_table

FLOW = NoiseSchedule.flow().with_prediction("sample")
NOISY: dict[str, dict[str, Any]] = {
    name: {option: value}
    for name, method in METHODS.items()
    for option, value in (("eta", 1.0), ("s_churn", 5.0), ("tau_timesteps", (-1e9, 1e9)))
    if option in method.options
} | {name: {} for name, method in METHODS.items() if method.stochastic}
NOISY["sa_solver"] = NOISY["sa_solver_pece"] = {"tau_timesteps": (-1e9, 1e9)}
KINDS = {  # one of each kind of table: memoryless, inner draws, churn, past outputs, past draws
    "ddim": {"eta": 1.0},
    "flow_sde": {},
    "flow_cps": {},
    "seeds_3": {},
    "euler": {"s_churn": 5.0},
    "dpmpp_2m_sde": {},
    "sa_solver": NOISY["sa_solver"],
}


def denoiser(mean: Tensor, spread: Tensor) -> Callable[..., Tensor]:
    """The best D of data N(mean, spread²) on the flow path, differentiable in both."""

    def network(x: Tensor, timesteps: Tensor) -> Tensor:
        t = timesteps.to(x.dtype).view(-1, *[1] * (x.ndim - 1)) / 1000
        alpha = 1 - t
        gain = alpha * spread**2 / (alpha**2 * spread**2 + t**2)
        return mean + gain * (x - alpha * mean)

    return network


def weights(*values: float) -> tuple[Tensor, ...]:
    return tuple(torch.tensor(v, dtype=torch.float64, requires_grad=True) for v in values)


def noise(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("name", NOISY)
def test_every_stochastic_method_has_a_density(name: str) -> None:
    sampler = Sampler(NoiseSchedule.scaled_linear(), name, 5, **NOISY[name])
    half = {"unconditional": {}, "guidance_scale": 1.5}

    def network(x: Tensor, t: Tensor) -> Tensor:
        return 0.5 * x

    rollout = sampler.rollout(network, (3, 2, 4), seeds=3, **half)
    assert torch.equal(rollout.samples, sampler(network, (3, 2, 4), seeds=3, **half))
    assert len(rollout) == sampler.table.draws > 0
    draws = SeededNoise((3, 2, 4), 3, torch.device("cpu"))
    draws()  # the start
    for transition in rollout:
        z = (transition.sample - transition.mean) / transition.std
        assert torch.allclose(z.abs(), draws().abs(), atol=2e-4)
        normal = Normal(transition.mean.double(), transition.std)
        expected = normal.log_prob(transition.sample.double()).flatten(1).sum(1)
        assert torch.allclose(transition.log_prob, expected, rtol=1e-6, atol=1e-6)
        assert torch.equal(transition.mean_log_prob, transition.log_prob / 8)
    again = list(rollout.replay(network))
    assert [t.index for t in again] == list(range(len(rollout)))
    total = torch.stack([t.log_prob for t in again]).sum(0)
    assert torch.allclose(total, rollout.log_prob, rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize("name", KINDS)
def test_weights_of_ten_thousand_runs_average_one(name: str) -> None:
    """And they move an average from the old weights to the new ones."""
    sampler = Sampler(FLOW, name, 4, **KINDS[name])
    old = denoiser(torch.tensor(0.7), torch.tensor(0.4))
    new = denoiser(torch.tensor(0.74), torch.tensor(0.43))
    rollout = sampler.rollout(old, (10_000, 1), seeds=0)
    with torch.no_grad():
        log_probs = torch.stack([t.log_prob for t in rollout.replay(new)])
    w = (log_probs.sum(0) - rollout.log_prob).exp()
    error = w.std() / 100
    assert 1e-4 < error < 0.03
    assert abs(w.mean() - 1) < 3 * error
    moved = w * rollout.transitions[-1].sample.squeeze(1)
    direct = sampler.rollout(new, (10_000, 1), seeds=10_000).transitions[-1].sample
    tolerance = 4 * math.hypot(moved.std(), direct.std()) / 100
    assert abs(moved.mean() - direct.mean()) < tolerance


@pytest.mark.parametrize("name", KINDS)
def test_gradients_are_those_of_finite_differences(name: str) -> None:
    sampler = Sampler(FLOW, name, 5, **KINDS[name])
    values, step = (0.6, 0.5), 1e-5
    rollout = sampler.rollout(denoiser(*weights(0.7, 0.4)), noise(2, 3), seeds=1)

    def log_prob(*theta: Tensor) -> Tensor:
        return torch.stack([t.log_prob for t in rollout.replay(denoiser(*theta))]).sum()

    theta = weights(*values)
    found = torch.autograd.grad(log_prob(*theta), theta)
    for k, gradient in enumerate(found):
        shifts = [[v + sign * step * (j == k) for j, v in enumerate(values)] for sign in (1, -1)]
        high, low = (log_prob(*weights(*shifted)).item() for shifted in shifts)
        assert gradient.item() == pytest.approx((high - low) / (2 * step), rel=1e-6)


def test_a_step_alone_costs_one_call_and_holds_one_graph() -> None:
    sampler = Sampler(FLOW, "euler_ancestral", 6)
    theta = weights(0.6, 0.5)
    calls = 0

    def counted(x: Tensor, t: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        return denoiser(*theta)(x, t)

    rollout = sampler.rollout(counted, noise(2, 3), seeds=1)
    assert (calls, len(rollout)) == (6, 5)
    calls = 0
    chosen = list(rollout.replay(counted, indices=[3, 1]))
    assert calls == 2 and [t.index for t in chosen] == [1, 3]
    for transition, k in zip(chosen, (1, 3), strict=True):
        assert torch.equal(transition.mean.detach(), rollout.transitions[k].mean)
        assert not transition.sample.requires_grad
    calls = 0
    for k, transition in enumerate(rollout.replay(counted)):
        assert calls == k + 1
        transition.log_prob.sum().backward()  # frees the graph; a shared one would fail
    assert calls == 5  # the last step has no density
    whole = torch.stack([t.log_prob for t in rollout.replay(counted)]).sum()
    assert theta[0].grad is not None
    assert torch.allclose(theta[0].grad, torch.autograd.grad(whole, theta[0])[0])
    with pytest.raises(IndexError, match=r"indices must be in 0 ... 4, .* got \[1, 5\]"):
        rollout.replay(counted, indices=[1, 5])


def test_tables_with_memory_are_one_segment() -> None:
    tables = {name: Sampler(FLOW, name, 4, **KINDS[name]).table for name in KINDS}
    assert segments(tables["ddim"]) == [(0, 1), (1, 2), (2, 3), (3, 4)]
    assert segments(tables["seeds_3"]) == segments(tables["ddim"])
    for name in ("dpmpp_2m_sde", "euler", "sa_solver"):
        assert segments(tables[name]) == [(0, 4)]


def test_two_draws_in_one_vector_are_one_transition() -> None:
    def twice(trace: Any, knots: Any, i: int, x: Any, *past: Any) -> Any:
        s = knots[i]
        raised = x + 0.3 * trace._draw(0.0, 1.0) + 0.4 * trace._draw(1.0, 2.0)
        D = trace.denoise(raised, s)
        ends = 0.3 * trace._draw(2.0, 3.0) + 0.4 * trace._draw(3.0, 4.0)
        return [0.5 * D + sum(past, start=x) + ends, D]

    method = Method("twice", twice, order=0, source="", point_mass=False)
    sampler = Sampler(FLOW, method, 3)
    rollout = sampler.rollout(lambda x, t: torch.sin(x), noise(2, 3), seeds=0)
    assert (len(rollout), sampler.table.draws) == (6, 12)
    for old, new in zip(rollout, rollout.replay(lambda x, t: torch.sin(x)), strict=True):
        assert old.std == pytest.approx(0.5)
        assert torch.equal(old.mean, new.mean)


def test_kl() -> None:
    a, b = (Transition(0, 0, 1.0, noise(2, 3) * k, 0.4, noise(2, 3)) for k in (1, 2))
    expected = kl_divergence(Normal(a.mean, 0.4), Normal(b.mean, 0.4)).sum(1)
    assert torch.allclose(a.kl(b), expected)


def test_conditions_are_those_of_the_rollout() -> None:
    sampler = Sampler(FLOW, "ddim", 4, eta=1.0)
    given = {"conditioning": {"y": torch.ones(2, 1)}, "unconditional": {"y": torch.zeros(2, 1)}}

    def network(x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        return 0.3 * x + y

    rollout = sampler.rollout(
        network, (2, 3), seeds=0, guidance_scale=3.0, guidance_rescale=0.5, clip=1.5, **given
    )
    for old, new in zip(rollout, rollout.replay(network), strict=True):
        assert torch.equal(old.mean, new.mean)


def test_what_has_no_density_is_refused() -> None:
    def network(x: Tensor, t: Tensor) -> Tensor:
        raise AssertionError("no network call before the refusal")

    for name, fix in (("ddim", "give eta=1.0, or a stochastic method"), ("dpmpp_2m", "give a sto")):
        with pytest.raises(ValueError, match=f"{name} draws no noise in its 20 steps.*{fix}"):
            Sampler(FLOW, name).rollout(network, (1, 2))
    with pytest.raises(ValueError, match="needs independent draws, got noise='brownian'"):
        Sampler(FLOW, "flow_sde").rollout(network, (1, 2), noise="brownian")


def test_draws_that_the_samples_do_not_tell_are_refused() -> None:
    knots = Sampler(NoiseSchedule.linear(), "euler", 3).knots

    def two_at_once(trace: Any, _: Any, i: int, x: Any, *past: Any) -> Any:
        a, b = trace.noise(*knots[:2]), trace.noise(*knots[1:3])
        return [trace.denoise(x, knots[i]) + a + b, a]

    def too_late(trace: Any, _: Any, i: int, x: Any, *past: Any) -> Any:
        return [trace.denoise(x, knots[i]), trace.noise(*knots[:2])]

    for formula, words in ((two_at_once, "two draws in one vector"), (too_late, "keeps a draw")):
        table = compile_table("mine", formula, knots, NoiseSchedule.linear(), point_mass=False)
        with pytest.raises(ValueError, match=f"mine .*{words}"):
            actions_of(table)


def test_flow_sde_is_the_step_of_flow_grpo() -> None:
    """2505.05470, eq. 9, with the choice of its code in the first step, whose t is 1."""
    schedule, a = NoiseSchedule.flow(shift=3.0), 0.7
    table = Sampler(schedule, "Flow-GRPO", 6).table
    draws = list(noise(6, 2, 3))
    rest = iter(draws)
    states = [
        p.x for p in run(table, noise(2, 3), lambda x, k: torch.sin(x), lambda s, e: next(rest))
    ]
    x, ts = noise(2, 3), [knot.sigma for knot in table.knots]
    assert ts[0] == 1.0
    for i, (t, t_next) in enumerate(pairwise(ts)):
        v, dt = torch.sin(x), t_next - t
        sigma = a * math.sqrt(t / (1 - (ts[1] if t == 1 else t)))
        if t_next > 0:
            drift = v + sigma**2 / (2 * t) * (x + (1 - t) * v)
            x = x + drift * dt + sigma * math.sqrt(-dt) * draws[i]
        else:  # the last step only removes noise
            x = x + v * dt
        assert torch.allclose(states[i], x, rtol=1e-10, atol=1e-12)


def test_flow_cps_is_ddim_with_a_share_of_the_noise() -> None:
    table = Sampler(NoiseSchedule.flow(), "flow_cps", 5, noise_level=0.5).table
    x, z = noise(2, 3), torch.ones(2, 3, dtype=torch.float64)
    progress = next(iter(run(table, x, lambda x, k: torch.sin(x), lambda s, e: z)))
    t, n = table.knots[0].sigma, table.knots[1].sigma
    D, e = x - t * torch.sin(x), x + (1 - t) * torch.sin(x)
    std = n * math.sin(0.25 * math.pi)
    expected = (1 - n) * D + math.sqrt(n**2 - std**2) * e + std * z
    assert torch.allclose(progress.x, expected)
    with pytest.raises(ValueError, match=r"noise_level must be between 0 and 1, got 1\.5"):
        Sampler(NoiseSchedule.flow(), "flow_cps", noise_level=1.5)


def test_the_example_of_the_docs_learns() -> None:
    text = (Path(__file__).parent.parent / "docs" / "rollouts.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
    exec(compile(code, "docs/rollouts.md", "exec"), {})  # asserts that the reward is learned
