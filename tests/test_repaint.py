"""RePaint: the walk through time, the known part, diffusers' results, and schedules that the peer
does not have.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import diffusers.schedulers.scheduling_repaint as peer
import pytest
import torch
from torch import Tensor

from alphabar.noising import NoiseSchedule
from alphabar.sampling import Knot, Sampler
from alphabar.sampling.inference import Run, SeededNoise
from alphabar.sampling.standalone.repaint import RePaint, time_travel

LINEAR = NoiseSchedule.linear()
ZTSNR = NoiseSchedule.scaled_linear(prediction="v_prediction").zero_terminal_snr()
SHAPE = (2, 3, 4, 4)
MEAN, SPREAD, MIXED = 0.7, 0.4, 0.8


def drawn(count: int, shape: tuple[int, ...] = SHAPE, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(count)]


def half_known() -> Tensor:
    mask = torch.zeros(SHAPE, dtype=torch.float64)
    mask[..., :2] = 1
    return mask


def bumpy(x: Tensor, t: Tensor) -> Tensor:
    return torch.tanh(1.3 * x.roll(1, -1) + 0.2) * (0.5 + t.view(-1, 1, 1, 1) / 2000) + 0.3 * x


def walked(
    sampler: RePaint, x: Tensor, network: Any, known: Tensor, mask: Tensor, draws: Iterator[Tensor]
) -> list[Tensor]:
    """x after every step, in float64, with these draws."""

    def evaluate(x: Tensor, knot: Knot) -> Tensor:
        return network(x, torch.full(x.shape[:1], knot.timestep, dtype=torch.float64))

    run = Run(x, evaluate, lambda: next(draws))
    return [progress.x for progress in sampler.advance(run, sampler.visits, known, mask)]


# the walk


def reference_walk(t_T: int, jump_length: int, jump_n_sample: int) -> list[int]:
    """The times of the paper's figure 9, written down as its appendix describes them: -1 is clean."""
    times, t = [t_T - 1], t_T - 1
    visits: Counter[int] = Counter()
    while t >= 0:
        t -= 1
        times.append(t)
        resampled = t >= 0 and t % jump_length == 0 and t < t_T - jump_length
        if resampled and visits[t] < jump_n_sample - 1:
            visits[t] += 1
            times += list(range(t + 1, t + jump_length + 1))
            t += jump_length
    return times


@pytest.mark.parametrize(
    ("steps", "jump_length", "jump_n_sample"),
    [(250, 10, 10), (20, 5, 3), (7, 1, 2), (11, 4, 4), (5, 9, 1)],
)
def test_the_walk_of_the_paper(steps: int, jump_length: int, jump_n_sample: int) -> None:
    places = time_travel(steps, jump_length, jump_n_sample)
    assert [steps - 1 - place for place in places] == reference_walk(
        steps, jump_length, jump_n_sample
    )
    assert all(abs(a - b) == 1 for a, b in pairwise(places))
    assert (places[0], places[-1]) == (0, steps)
    # the clean image is reached once: algorithm 1 jumps back for t > 1 alone
    assert places.count(steps) == 1


def test_how_much_the_paper_s_walk_costs() -> None:
    places = time_travel(250, 10, 10)
    down = sum(b > a for a, b in pairwise(places))
    assert down == 250 + 9 * 24 * 10
    assert len(places) - 1 == down + 9 * 24 * 10
    calls = []

    def network(x: Tensor, t: Tensor) -> Tensor:
        calls.append(int(t[0]))
        return 0 * x

    sampler = RePaint(LINEAR, steps=12, jump_length=3, jump_n_sample=2)
    sampler(network, SHAPE, seeds=0, known=torch.zeros(SHAPE), mask=torch.zeros(SHAPE))
    assert len(calls) == 12 + 3 * 3
    assert calls == [
        int(s.timestep) for s, n in pairwise(sampler.visits) if n.sigma_ve < s.sigma_ve
    ]


@pytest.mark.parametrize(
    ("steps", "jump_length", "jump_n_sample"), [(250, 10, 10), (20, 5, 3), (7, 1, 2), (11, 4, 4)]
)
def test_the_walk_of_the_peer(steps: int, jump_length: int, jump_n_sample: int) -> None:
    scheduler = peer.RePaintScheduler(num_train_timesteps=steps)
    scheduler.set_timesteps(steps, jump_length, jump_n_sample)
    # it lists the level where a step down begins, and one more than that where a step up ends
    places = time_travel(steps, jump_length, jump_n_sample, resample_clean=True)
    assert [
        steps - (a + 1 if b > a else b) for a, b in pairwise(places)
    ] == scheduler.timesteps.tolist()


# diffusers


def peer_run(scheduler: Any, x: Tensor, known: Tensor, mask: Tensor) -> Iterator[Tensor]:
    """RePaintPipeline's loop."""
    t_last = int(scheduler.timesteps[0]) + 1
    for t in scheduler.timesteps.tolist():
        if t < t_last:
            out = bumpy(x, torch.full((2,), t, dtype=torch.float64))
            x = scheduler.step(out, t, x, known, mask).prev_sample
        else:
            x = scheduler.undo_step(x, t_last)
        t_last = t
        yield x


def exact_peer(
    steps: int,
    jump_length: int,
    jump_n_sample: int,
    eta: float,
    trained: int,
    clip_sample: bool = False,
) -> Any:
    """The peer with its tables in float64."""
    scheduler = peer.RePaintScheduler(num_train_timesteps=trained, clip_sample=clip_sample, eta=eta)
    scheduler.set_timesteps(steps, jump_length, jump_n_sample)
    scheduler.betas = torch.linspace(1e-4, 2e-2, trained, dtype=torch.float64)
    scheduler.alphas_cumprod = torch.cumprod(1 - scheduler.betas, 0)
    return scheduler


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize(("jump_length", "jump_n_sample"), [(1, 1), (1, 3), (5, 2), (4, 4)])
def test_agreement_with_the_peer(
    jump_length: int, jump_n_sample: int, eta: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps, known, mask = 20, *(drawn(1, seed=9)), half_known()
    schedule = NoiseSchedule.linear(num_train_timesteps=steps)
    sampler = RePaint(schedule, steps, jump_length, jump_n_sample, eta, resample_clean=True)
    start, *draws = drawn(len(sampler.visits))
    ours = walked(sampler, start, bumpy, known, mask, iter(draws))
    # the peer draws for a step into the clean image as well, without using it
    left = iter(draws)
    into_clean = iter([n.sigma == 0 for n in sampler.visits[1:]])
    monkeypatch.setattr(
        peer, "randn_tensor", lambda *a, **k: torch.zeros(SHAPE) if next(into_clean) else next(left)
    )
    theirs = list(
        peer_run(exact_peer(steps, jump_length, jump_n_sample, eta, steps), start, known, mask)
    )
    assert len(ours) == len(theirs)
    for a, b in zip(ours, theirs, strict=True):
        assert torch.allclose(a, b, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("eta", [0.0, 0.5])
def test_agreement_with_the_peer_that_clips(eta: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its default: x_0 is clipped to -1 ... 1, and ε stays the network's own."""
    known, mask = *drawn(1, seed=9), half_known()
    schedule = NoiseSchedule.linear(num_train_timesteps=1000)
    draws = drawn(22)
    start = draws.pop(0)
    left = iter(draws)
    monkeypatch.setattr(peer, "randn_tensor", lambda *a, **k: next(left))
    *_, theirs = peer_run(exact_peer(20, 5, 1, eta, 1000, clip_sample=True), start, known, mask)
    noises = iter(draws)
    monkeypatch.setattr(SeededNoise, "__call__", lambda self: next(noises))
    sampler = RePaint(schedule, 20, 5, 1, eta, "leading", use_clipped_model_output=False)
    ours = sampler(lambda x, t: bumpy(x, t.double()), start, known=known, mask=mask, clip=1.0)
    assert torch.allclose(ours, theirs, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_agreement_with_the_peer_on_a_coarser_grid(
    eta: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    known, mask = *drawn(1, seed=9), half_known()
    sampler = RePaint(LINEAR, 20, 5, 1, eta, grid="leading")
    start, *draws = drawn(21)
    left = iter(draws)
    monkeypatch.setattr(peer, "randn_tensor", lambda *a, **k: next(left))
    *_, theirs = peer_run(exact_peer(20, 5, 1, eta, 1000), start, known, mask)
    *_, ours = walked(sampler, start, bumpy, known, mask, iter(draws))
    assert torch.allclose(ours, theirs, rtol=1e-9, atol=1e-9)


def test_the_way_up_ends_in_the_marginal_and_the_peer_s_does_not(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # with 20 of 1000 timesteps: from the level of t to that of t + 50
    sampler = RePaint(LINEAR, 20, 5, 2, grid="leading")
    s, n = sampler.knots[15], sampler.knots[14]
    unit = torch.eye(60, dtype=torch.float64)
    x = s.sigma * unit[:1]
    up = sampler._up(Run(x, lambda x, knot: x, lambda: unit[1:2]), x, s, n)
    assert float(up.norm()) == pytest.approx(n.sigma, rel=1e-12)
    assert n.alpha == pytest.approx(s.alpha * n.alpha / s.alpha)
    draws = iter(unit[1:].unsqueeze(1))
    monkeypatch.setattr(peer, "randn_tensor", lambda *a, **k: next(draws))
    # the peer's loop says undo_step(image, t_last), t_last being the time of the last step, whose
    # result is one level lower
    theirs = exact_peer(20, 5, 2, 1.0, 1000).undo_step(x, int(n.timestep))
    assert abs(float(theirs.norm()) - n.sigma) > 0.01


# exact answers


def test_the_known_part_comes_out_as_it_was() -> None:
    known, mask = (
        torch.randn(SHAPE, generator=torch.Generator().manual_seed(1)),
        half_known().bool(),
    )
    for schedule in (LINEAR, ZTSNR, NoiseSchedule.flow(3.0)):
        sampler = RePaint(schedule, steps=6, jump_length=2, jump_n_sample=2)
        x = sampler(lambda x, t: -x, SHAPE, seeds=0, known=known, mask=mask)
        assert torch.equal(x[mask], known[mask])
        assert not torch.allclose(x[~mask], known[~mask])


@pytest.mark.parametrize("eta", [0.0, 1.0])
@pytest.mark.parametrize(
    "schedule",
    [LINEAR, ZTSNR, NoiseSchedule.flow(), NoiseSchedule.karras()],
    ids=lambda s: s.curve.kind,
)
def test_without_a_mask_and_jumps_it_is_ddim(schedule: NoiseSchedule, eta: float) -> None:
    def network(x: Tensor, t: Tensor) -> Tensor:
        return torch.tanh(x.roll(1, -1)) + t.view(-1, 1, 1, 1) / 2000

    sampler = RePaint(schedule, 10, jump_n_sample=1, eta=eta)
    # RePaint draws at eta = 0 too, for the known part: give both the same start
    start = torch.randn(SHAPE, generator=torch.Generator().manual_seed(3))
    x = sampler(network, start, seeds=0, known=torch.zeros(SHAPE), mask=torch.zeros(1, 1, 1, 1))
    assert torch.allclose(
        x, Sampler(schedule, "ddim", 10, eta=eta)(network, start, seeds=0), rtol=1e-5, atol=1e-6
    )


@pytest.mark.parametrize("eta", [0.3, 1.0])
@pytest.mark.parametrize(
    "schedule", [LINEAR, ZTSNR, NoiseSchedule.flow()], ids=lambda s: s.curve.kind
)
def test_every_step_of_the_walk_is_at_its_marginal(schedule: NoiseSchedule, eta: float) -> None:
    # data of one point, draws that are unit vectors: x - α x_0 is a combination of them whose
    # length is σ, known or not
    sampler = RePaint(schedule, 8, 3, 3, eta)
    visits = sampler.visits
    unit = torch.eye(len(visits) + 1, dtype=torch.float64).unsqueeze(1)
    x0 = torch.full_like(unit[0], 0.5)
    for mask in (torch.zeros_like(x0), torch.ones_like(x0)):
        draws = iter(unit[1:])

        def evaluate(x: Tensor, knot: Knot) -> Tensor:
            return schedule.prediction.combine(
                x0, (x - knot.alpha * x0) / knot.sigma, knot.alpha, knot.sigma
            )

        first = visits[0]
        run = Run(
            first.alpha * x0 + first.sigma * unit[0], evaluate, lambda draws=draws: next(draws)
        )
        for progress, n in zip(sampler.advance(run, visits, x0, mask), visits[1:], strict=True):
            assert float((progress.x - n.alpha * x0).norm()) == pytest.approx(
                n.sigma, rel=1e-9, abs=1e-9
            )


def test_resampling_brings_the_parts_into_agreement() -> None:
    # two numbers with correlation 0.8, of which the first is known: the second must come out as its
    # conditional mean says. Without time travel the network learns of the first too late; with it,
    # the regression is nearly right
    schedule = NoiseSchedule.linear(num_train_timesteps=60).with_prediction("sample")
    covariance = torch.tensor([[1.0, MIXED], [MIXED, 1.0]], dtype=torch.float64)

    def network(x: Tensor, t: Tensor) -> Tensor:
        alpha, sigma = float(schedule.alpha(t[:1].double())), float(schedule.sigma(t[:1].double()))
        gain = (
            alpha
            * covariance
            @ torch.linalg.inv(alpha**2 * covariance + sigma**2 * torch.eye(2, dtype=torch.float64))
        )
        return (x.double() @ gain.T).to(x)

    known = torch.zeros(4, 1000, 2)
    known[..., 0] = 1.5
    mask = torch.tensor([[[1.0, 0.0]]])

    def mean_of_second(jump_n_sample: int) -> float:
        sampler = RePaint(schedule, 60, jump_length=5, jump_n_sample=jump_n_sample)
        return float(sampler(network, known.shape, seeds=0, known=known, mask=mask)[..., 1].mean())

    exact, one_pass, resampled = MIXED * 1.5, mean_of_second(1), mean_of_second(10)
    assert one_pass < 0.6 * exact
    assert abs(resampled - exact) < 0.08


def test_progress_and_seeds() -> None:
    sampler = RePaint(ZTSNR, steps=6, jump_length=2, jump_n_sample=2)
    known, mask = torch.ones(SHAPE), half_known()
    steps = list(sampler.iterate(lambda x, t: -x, SHAPE, seeds=[3, 4], known=known, mask=mask))
    assert [(p.step, p.steps) for p in steps] == [
        (i, len(sampler.visits) - 1) for i in range(1, len(sampler.visits))
    ]
    assert torch.allclose(steps[-1].denoised[..., 2:], steps[-1].x[..., 2:])
    alone = sampler(lambda x, t: -x, (1, *SHAPE[1:]), seeds=4, known=known[:1], mask=mask[:1])
    assert torch.equal(alone[0], steps[-1].x[1])
    assert RePaint(ZTSNR) == RePaint(ZTSNR) != RePaint(ZTSNR, eta=0.0)


@pytest.mark.parametrize("mask_shape", [SHAPE, (2, 1, 4, 4), (1, 1, 4, 4), (1, 3, 1, 1)])
def test_masks_that_are_the_same_for_all(mask_shape: tuple[int, ...]) -> None:
    mask = (torch.rand(mask_shape, generator=torch.Generator().manual_seed(2)) > 0.5).float()
    known = torch.full(SHAPE, 7.0)
    x = RePaint(ZTSNR, steps=4, jump_n_sample=1)(
        lambda x, t: -x, SHAPE, seeds=0, known=known, mask=mask
    )
    assert torch.equal(x == 7.0, mask.bool().expand(SHAPE))


# bad input


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (torch.zeros(3, 3, 4, 4), r"^mask must have the shape of the samples, \(2, 3, 4, 4\), or 1 in place of some of its "),
        (torch.zeros(3, 3, 4, 4), r"numbers, got \(3, 3, 4, 4\)$"),
        (torch.zeros(4, 4), r"numbers, got \(4, 4\)$"),
        (torch.zeros(2, 3, 4, 5), r"numbers, got \(2, 3, 4, 5\)$"),
        (torch.zeros(2, 3, 4), r"numbers, got \(2, 3, 4\)$"),
        (torch.full(SHAPE, 255.0), r"^mask must be 1 where the image is known and 0 where it is not, got values from 255 to 255$"),
        (torch.full(SHAPE, -0.5), r"got values from -0.5 to -0.5$"),
        (torch.full(SHAPE, math.nan), r"got values from nan to nan$"),
    ],
)  # fmt: skip
def test_bad_masks(mask: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RePaint(ZTSNR, steps=20)(
            lambda x, t: x, SHAPE, seeds=0, known=torch.zeros(SHAPE), mask=mask
        )


def test_bad_known_images() -> None:
    with pytest.raises(
        ValueError,
        match=r"^known must have the shape of the samples, \(2, 3, 4, 4\), got \(1, 3, 4, 4\)$",
    ):
        RePaint(ZTSNR)(
            lambda x, t: x, SHAPE, seeds=0, known=torch.zeros(1, 3, 4, 4), mask=half_known()
        )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"jump_length": 0}, "jump_length must be an integer of at least 1, got 0"),
        ({"jump_n_sample": 2.0}, "jump_n_sample must be an integer of at least 1, got 2.0"),
        ({"eta": 2.0}, "eta must be between 0 (deterministic) and 1 (ancestral), got 2.0"),
        (
            {"steps": 10},
            "jump_length must be less than the 10 steps, got 10; use more steps, or "
            "jump_n_sample=1 for no jumps",
        ),
        ({"steps": 2000}, "steps must be between 1 and the 1000 training timesteps, got 2000"),
        ({"grid": "trialing"}, "unknown grid 'trialing'; did you mean 'trailing'?"),
    ],
)
def test_bad_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError) as caught:
        RePaint(LINEAR, **options)
    assert str(caught.value) == message
