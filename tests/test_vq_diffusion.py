"""VQ-Diffusion: the chain against matrix products, the posterior against Bayes and diffusers, the
bound, exact sampling.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from diffusers import VQDiffusionScheduler
from torch import Tensor
from torch.nn.functional import one_hot

from alphabar.sampling.inference import SeededNoise
from alphabar.sampling.standalone.vq_diffusion import TokenSchedule, VQDiffusion

K, T = 4, 6
SMALL = TokenSchedule(K + 1, T, 0.9, 0.05, 0.05, 0.6)  # every probability is large enough to see
PAPER = TokenSchedule(K + 1)
EVERY = torch.arange(K + 1)


def matrices(schedule: TokenSchedule) -> list[Tensor]:
    """Q_t of eq. 7, one for each t, with [column of x_t-1, row of x_t], from the levels alone."""
    count, tokens = schedule.num_train_timesteps, schedule.num_vec_classes - 1
    alpha_bar = [
        1.0,
        *torch.linspace(
            schedule.alpha_cum_start, schedule.alpha_cum_end, count, dtype=torch.float64
        ).tolist(),
    ]
    gamma_bar = [
        0.0,
        *torch.linspace(
            schedule.gamma_cum_start, schedule.gamma_cum_end, count, dtype=torch.float64
        ).tolist(),
    ]
    found = []
    for t in range(1, count + 1):
        alpha, gamma = (
            alpha_bar[t] / alpha_bar[t - 1],
            1 - (1 - gamma_bar[t]) / (1 - gamma_bar[t - 1]),
        )
        beta = (1 - alpha - gamma) / tokens
        Q = torch.full((tokens + 1, tokens + 1), beta, dtype=torch.float64) + alpha * torch.eye(
            tokens + 1, dtype=torch.float64
        )
        Q[tokens, :], Q[:, tokens] = gamma, 0.0
        Q[tokens, tokens] = 1.0
        found.append(Q)
    return found


def chain(schedule: TokenSchedule, n: int, s: int) -> Tensor:
    """Q_s ... Q_(n+1)."""
    total = torch.eye(schedule.num_vec_classes, dtype=torch.float64)
    for Q in matrices(schedule)[n + 1 : s + 1]:
        total = Q @ total
    return total


def times(t: int, batch: int) -> Tensor:
    return torch.full((batch,), t)


# the forward chain


@pytest.mark.parametrize("schedule", [SMALL, PAPER], ids=["small", "paper"])
def test_the_transitions_are_probabilities(schedule: TokenSchedule) -> None:
    for Q in matrices(schedule):
        assert torch.allclose(Q.sum(0), torch.ones(K + 1, dtype=torch.float64), rtol=0, atol=1e-12)
        assert bool((Q >= 0).all())


@pytest.mark.parametrize("schedule", [SMALL, PAPER], ids=["small", "paper"])
def test_the_marginals_of_the_chain_are_products_of_its_matrices(schedule: TokenSchedule) -> None:
    # noise at the middle of many equal parts of [0, 1): the histogram of add_noise is the
    # probability, to 1 / parts
    parts = 40_000
    noise = ((torch.arange(parts, dtype=torch.float64) + 0.5) / parts).expand(K, parts)
    x0 = torch.arange(K).unsqueeze(1).expand(K, parts)
    for t in (0, 1, schedule.num_train_timesteps // 2, schedule.num_train_timesteps - 1):
        x = schedule.add_noise(x0.contiguous(), noise, times(t, K))
        histogram = one_hot(x, K + 1).double().mean(1).T
        assert torch.allclose(histogram, chain(schedule, -1, t)[:, :K], rtol=0, atol=1.5 / parts)


def test_levels_between_times() -> None:
    for n, s in [(-1, 0), (0, 1), (1, 4), (-1, 5)]:
        a, b, c = (
            level.exp().item()
            for level in SMALL.between(times(n, 1), times(s, 1), torch.zeros(1, K).double())
        )
        Q = chain(SMALL, n, s)
        assert (a + b, b, c) == pytest.approx(
            (Q[0, 0].item(), Q[1, 0].item(), Q[K, 0].item()), rel=1e-12
        )


def test_add_noise_takes_a_time_for_each_sample() -> None:
    x0, noise = torch.zeros(2, 3, dtype=torch.int64), torch.full((2, 3), 0.999, dtype=torch.float64)
    assert PAPER.add_noise(x0, noise, torch.tensor([0, 99])).tolist() == [[0, 0, 0], [K, K, K]]
    assert torch.equal(
        PAPER.add_noise(x0.unsqueeze(2), noise.unsqueeze(2), torch.tensor([0, 99])).squeeze(2),
        torch.tensor([[0] * 3, [K] * 3]),
    )


# the posterior


@pytest.mark.parametrize("schedule", [SMALL, PAPER], ids=["small", "paper"])
@pytest.mark.parametrize(("s", "n"), [(5, 4), (3, 2), (1, 0), (0, -1), (5, 2), (4, -1)])
def test_the_posterior_is_bayes_rule(schedule: TokenSchedule, s: int, n: int) -> None:
    to_s, to_n, between = chain(schedule, -1, s), chain(schedule, -1, n), chain(schedule, n, s)
    for x0 in range(K):
        known = torch.full((1, K, K + 1), -torch.inf, dtype=torch.float64)
        known[:, x0] = 0.0
        ours = schedule.posterior(known, EVERY.unsqueeze(0), times(s, 1), times(n, 1))[0].exp()
        bayes = (between * to_n[:, x0]).T / to_s[:, x0]  # [x_n, x_s]
        # β of the paper's schedule is a difference near 1e-8
        assert torch.allclose(ours, bayes, rtol=1e-6, atol=1e-12)
        assert torch.allclose(
            ours.sum(0), torch.ones(K + 1, dtype=torch.float64), rtol=0, atol=1e-9
        )


@pytest.mark.parametrize("s", [5, 3, 0])
def test_a_doubtful_network_mixes_the_posteriors(s: int) -> None:
    p = torch.softmax(
        torch.randn(1, K, K + 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64), 1
    )
    mixed = torch.zeros(K + 1, K + 1, dtype=torch.float64)
    for x0 in range(K):
        bayes = (chain(SMALL, s - 1, s) * chain(SMALL, -1, s - 1)[:, x0]).T / chain(SMALL, -1, s)[
            :, x0
        ]
        mixed += bayes * p[0, x0]
    ours = SMALL.posterior(p.log(), EVERY.unsqueeze(0), times(s, 1))[0].exp()
    assert torch.allclose(ours, mixed, rtol=0, atol=1e-12)


@pytest.mark.parametrize("t", [1, 2, 50, 99])
@pytest.mark.parametrize("classes", [5, 100])
def test_agreement_with_the_peer_s_posterior(classes: int, t: int) -> None:
    schedule, scheduler = TokenSchedule(classes), VQDiffusionScheduler(classes)
    scheduler.set_timesteps(100)
    generator = torch.Generator().manual_seed(t)
    log_p = torch.log_softmax(3 * torch.randn(2, classes - 1, 40, generator=generator), 1)
    x_t = torch.randint(classes, (2, 40), generator=generator)
    x_t[:, ::3] = classes - 1
    ours, theirs = schedule.posterior(log_p, x_t, times(t, 2)), scheduler.q_posterior(log_p, x_t, t)
    likely = theirs > -40  # log 1e-30 stands for log 0 there
    assert torch.allclose(ours[likely], theirs[likely], rtol=1e-5, atol=1e-5)
    assert torch.allclose(ours.exp(), theirs.exp(), rtol=0, atol=1e-5)
    assert bool((ours[~likely] < -40).all())


def test_the_last_step_takes_the_network_s_word() -> None:
    log_p = torch.log_softmax(torch.randn(1, K, 3, generator=torch.Generator().manual_seed(0)), 1)
    x_t = torch.tensor([[0, 3, K]])
    ours = PAPER.posterior(log_p, x_t, times(0, 1))
    assert torch.allclose(ours[:, :K], log_p, rtol=0, atol=2e-6)
    assert bool((ours[:, K] == -torch.inf).all())


# the loss


def test_the_loss_of_a_network_that_knows_x_0_is_zero() -> None:
    x0 = torch.arange(K).repeat(3, 2)
    noise = torch.rand(x0.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    timesteps = torch.tensor([0, 40, 99])
    x_t = PAPER.add_noise(x0, noise, timesteps)
    sure = 1e4 * one_hot(x0, K).double().mT
    assert torch.allclose(
        PAPER.losses(sure, x0, x_t, timesteps),
        torch.zeros(3, dtype=torch.float64),
        rtol=0,
        atol=1e-12,
    )
    unsure = PAPER.losses(0 * sure, x0, x_t, timesteps)
    assert bool((unsure > 1e-4).all())


@pytest.mark.parametrize("auxiliary_weight", [0.0, 5e-4, 0.1])
@pytest.mark.parametrize("t", [0, 1, 4])
def test_the_loss_term_by_term(t: int, auxiliary_weight: float) -> None:
    x0, x_t = torch.tensor([[0, 1, 2, 3, 0]]), torch.tensor([[0, K, 2, 1, 3]])
    logits = torch.randn(1, K, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    p = torch.softmax(logits, 1)[0]
    total = 0.0
    for token in range(5):
        a, b = int(x0[0, token]), int(x_t[0, token])
        L_x0 = -math.log(p[a, token])  # eq. 12
        if t == 0:
            total += L_x0
            continue
        to_s, to_n, step = chain(SMALL, -1, t), chain(SMALL, -1, t - 1), chain(SMALL, t - 1, t)
        posteriors = (step[b].unsqueeze(1) * to_n / to_s[b])[:, :K]  # [x_t-1, x_0], eq. 5
        true, model = posteriors[:, a], posteriors @ p[:, token]  # eq. 11
        total += (
            float(torch.special.xlogy(true, true / model).nan_to_num().sum())
            + auxiliary_weight * L_x0
        )
    ours = SMALL.losses(logits, x0, x_t, times(t, 1), auxiliary_weight)
    assert float(ours) == pytest.approx(total / 5, rel=1e-9)


def test_the_bound_is_the_likelihood_for_the_best_network() -> None:
    # one token with a known distribution: with the exact p(x_0 | x_t) the bound is the entropy of
    # the data, and with any other network it is larger
    data = torch.tensor([0.5, 0.3, 0.15, 0.05], dtype=torch.float64)
    entropy = -float((data * data.log()).sum())

    def bound(sharpness: float) -> float:
        prior = chain(SMALL, -1, T - 1)
        marginal = prior[:, :K] @ data
        # L_T: the KL from q(x_T | x_0) to the marginal of x_T, from which the best sampler starts
        total = float(
            (
                data
                * torch.special.xlogy(prior[:, :K], prior[:, :K] / marginal.unsqueeze(1)).sum(0)
            ).sum()
        )
        for t in range(T):
            q = chain(SMALL, -1, t)[:, :K] * data  # [x_t, x_0]
            pairs = [(a, b) for a in range(K) for b in range(K + 1)]
            x0, x_t = (torch.tensor([[pair[i]] for pair in pairs]) for i in (0, 1))
            logits = sharpness * torch.stack([q[b].log() for _, b in pairs]).unsqueeze(2)
            losses = SMALL.losses(logits, x0, x_t, times(t, len(pairs)), auxiliary_weight=0.0)
            total += sum(float(loss * q[b, a]) for loss, (a, b) in zip(losses, pairs, strict=True))
        return total

    assert bound(1.0) == pytest.approx(entropy, rel=1e-9)
    assert bound(0.8) > entropy + 1e-3
    assert bound(1.2) > entropy + 1e-3


def test_gradients_are_finite_and_fall_to_the_truth() -> None:
    x0 = torch.arange(K).repeat(4, 3)
    timesteps = torch.tensor([0, 1, 50, 99])
    noise = torch.rand(x0.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x_t = PAPER.add_noise(x0, noise, timesteps)
    logits = torch.zeros(4, K, 12, requires_grad=True)
    optimizer = torch.optim.Adam([logits], lr=0.1)
    first = PAPER.losses(logits, x0, x_t, timesteps)
    for _ in range(60):
        optimizer.zero_grad()
        loss = PAPER.losses(logits, x0, x_t, timesteps).sum()
        loss.backward()
        assert logits.grad is not None
        assert bool(logits.grad.isfinite().all())
        optimizer.step()
    last = PAPER.losses(logits, x0, x_t, timesteps)
    assert bool((last < 0.2 * first).all())
    assert torch.equal(logits.argmax(1), x0)


# sampling


def knowing(data: Tensor, schedule: TokenSchedule) -> Any:
    """The exact p(x_0 | x_t) for tokens that are independent and have these probabilities."""

    def network(x: Tensor, t: Tensor) -> Tensor:
        q = chain(schedule, -1, int(t[0]))[:, : data.numel()] * data
        return q[x].log().movedim(-1, 1)

    return network


@pytest.mark.parametrize("steps", [None, 3, 1])
def test_samples_have_the_distribution_of_the_data(steps: int | None) -> None:
    # independent tokens: the exact network gives the exact distribution, at any number of steps
    # (eq. 13)
    data = torch.tensor([0.5, 0.3, 0.15, 0.05], dtype=torch.float64)
    tokens = VQDiffusion(SMALL, steps)(knowing(data, SMALL), (2, 10_000), seeds=1)
    start = chain(SMALL, -1, T - 1)[:, :K] @ data
    frequency = one_hot(tokens.flatten(), K).double().mean(0)
    # p(x_T) of eq. 10 is the chain's end but for ᾱ_T, 0.05 here: as much of the prior is wrong
    assert float((frequency - data).abs().max()) < 0.02
    assert float(start[K]) == pytest.approx(0.6)


def test_the_paper_s_schedule_starts_from_masks() -> None:
    tokens = []

    def network(x: Tensor, t: Tensor) -> Tensor:
        tokens.append(x)
        return torch.zeros(x.shape[0], K, *x.shape[1:])

    VQDiffusion(PAPER, 2)(network, (2, 50), seeds=0)
    assert float((tokens[0] == K).double().mean()) > 0.95
    assert tokens[0].dtype == torch.int64


@pytest.mark.parametrize("shape", [(2, 6), (2, 3, 5)])
def test_a_network_that_knows_gets_its_tokens(shape: tuple[int, ...]) -> None:
    x0 = torch.randint(K, shape, generator=torch.Generator().manual_seed(3))
    logits = 100.0 * one_hot(x0, K).movedim(-1, 1)
    steps = list(VQDiffusion(PAPER, 10).iterate(lambda x, t: logits, shape, seeds=0))
    assert torch.equal(steps[-1].x, x0)
    assert torch.equal(steps[0].denoised, x0)
    assert [(p.step, p.steps) for p in steps] == [(i, 10) for i in range(1, 11)]
    masked = [int((p.x == K).sum()) for p in steps]
    assert masked == sorted(masked, reverse=True)
    assert masked[-1] == 0


def test_agreement_with_the_peer_s_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    # the same Gumbel noise: the same tokens
    import diffusers.schedulers.scheduling_vq_diffusion as module

    def network(x: Tensor, t: Tensor) -> Tensor:
        position = torch.arange(8.0).view(1, 1, -1)
        return torch.sin(position + torch.arange(K).view(1, -1, 1) + (x == K).sum(1).view(-1, 1, 1))

    noise = SeededNoise((1, 8), 4, torch.device("cpu"))

    def gumbel_noised(logits: Tensor, _: Any) -> Tensor:
        # what seeds=4 draws, also where the peer has no logit for [MASK]
        u = noise.uniform(K + 1, 8)
        return logits - (-u.log()).log()[:, : logits.shape[1]]

    monkeypatch.setattr(module, "gumbel_noised", gumbel_noised)
    scheduler = VQDiffusionScheduler(K + 1)
    scheduler.set_timesteps(100)
    x = start = torch.full((1, 8), K)
    for t in scheduler.timesteps.tolist():
        x = scheduler.step(torch.log_softmax(network(x, times(t, 1)), 1), t, x).prev_sample
    assert torch.equal(VQDiffusion(PAPER)(network, start, seeds=4), x)


def test_fewer_steps_start_where_training_ended_and_the_peer_s_do_not() -> None:
    assert VQDiffusion(PAPER, 10).timesteps == [99, 89, 79, 69, 59, 49, 39, 29, 19, 9]
    assert VQDiffusion(PAPER).timesteps == list(range(99, -1, -1))
    scheduler = VQDiffusionScheduler(K + 1)
    scheduler.set_timesteps(10)
    # all masked tokens, at a time when 1 in 10 is
    assert scheduler.timesteps.tolist() == list(range(9, -1, -1))


def test_seeds_and_guidance() -> None:
    def network(x: Tensor, t: Tensor, shift: float | Tensor = 0.0) -> Tensor:
        wave = torch.sin(torch.arange(8.0).view(1, 1, -1) * torch.arange(1.0, K + 1).view(1, -1, 1))
        return wave.expand(x.shape[0], K, 8) * (1 + shift)

    sampler = VQDiffusion(PAPER, 20)
    batch = sampler(network, (3, 8), seeds=[7, 8, 9])
    assert torch.equal(batch[1:2], sampler(network, (1, 8), seeds=8))
    assert not torch.equal(batch[0], batch[1])
    arguments = {
        "conditioning": {"shift": torch.ones(3, 1, 1)},
        "unconditional": {"shift": torch.full((3, 1, 1), -0.5)},
    }
    guided = sampler(network, (3, 8), seeds=1, guidance_scale=4.0, **arguments)
    assert torch.equal(guided, sampler(lambda x, t: network(x, t, -0.5 + 4 * 1.5), (3, 8), seeds=1))


# bad input


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_vec_classes": 1}, "num_vec_classes must be at least 2, got 1"),
        ({"num_train_timesteps": 1}, "num_train_timesteps must be at least 2, got 1"),
        (
            {"alpha_cum_start": 1.0},
            "need 1 > alpha_cum_start > alpha_cum_end > 0 and the reverse for gamma_cum, got ",
        ),
        (
            {"gamma_cum_end": 0.0},
            "need 1 > alpha_cum_start > alpha_cum_end > 0 and the reverse for gamma_cum, got ",
        ),
        (
            {"gamma_cum_start": 0.5},
            "alpha_cum + gamma_cum must be below 1, to leave a chance for a replaced token, got ",
        ),
        (
            {"alpha_cum_end": 0.00001},
            "alpha_cum + gamma_cum must be below 1, to leave a chance for a replaced token, got ",
        ),
    ],
)
def test_bad_schedules(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError) as caught:
        TokenSchedule(**({"num_vec_classes": 5} | options))
    assert str(caught.value).startswith(message)


@pytest.mark.parametrize("steps", [0, 101, 2.5, True])
def test_bad_steps(steps: Any) -> None:
    with pytest.raises(
        ValueError, match=rf"^steps must be an integer between 1 and 100, got {steps}$"
    ):
        VQDiffusion(PAPER, steps)


def test_bad_tokens_noise_and_times() -> None:
    x0, noise, t = (
        torch.zeros(2, 3, dtype=torch.int64),
        torch.zeros(2, 3, dtype=torch.float64),
        torch.tensor([0, 1]),
    )
    with pytest.raises(
        ValueError,
        match=r"^tokens must be int64 of shape \(batch, ...\), got torch.float32 of shape \(2, 3\)$",
    ):
        PAPER.add_noise(x0.float(), noise, t)
    with pytest.raises(ValueError, match=r"^tokens must lie in 0 ... 4, got 0 ... 9$"):
        PAPER.add_noise(torch.tensor([[0, 9, 0], [0, 0, 0]]), noise, t)
    with pytest.raises(
        ValueError, match=r"^noise must have the shape of x0, \(2, 3\), got \(2, 2\)$"
    ):
        PAPER.add_noise(x0, noise[:, :2], t)
    with pytest.raises(ValueError, match=r"^noise must be float64, got torch.float32: "):
        PAPER.add_noise(x0, noise.float(), t)
    with pytest.raises(
        ValueError, match=r"^timesteps must have shape \(2,\), one for each sample, got \(3,\)$"
    ):
        PAPER.add_noise(x0, noise, torch.tensor([0, 1, 2]))
    with pytest.raises(ValueError, match=r"^timesteps must lie in 0 ... 99, got 0 ... 100$"):
        PAPER.add_noise(x0, noise, torch.tensor([0, 100]))


def test_a_network_of_the_wrong_shape() -> None:
    with pytest.raises(
        ValueError, match=r"^the network must return logits of shape \(2, 4, 3\), got \(2, 5, 3\)$"
    ):
        VQDiffusion(PAPER)(lambda x, t: torch.zeros(2, 5, 3), (2, 3), seeds=0)


@pytest.mark.parametrize(("name", "value"), [("clip", 1.0), ("guidance_rescale", 0.7)])
def test_what_is_made_for_numbers(name: str, value: float) -> None:
    with pytest.raises(
        ValueError,
        match=rf"^{name} is for images of numbers, got {value} for tokens; leave it out$",
    ):
        VQDiffusion(PAPER)(lambda x, t: torch.zeros(2, K, 3), (2, 3), seeds=0, **{name: value})
