"""Noising: what a batch becomes, and that its randomness depends on (seed, step, global index) and
on nothing else.
"""

from __future__ import annotations

import copy
import json
import math
import os
import random
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from counting import CountOperations
from torch import Tensor

from alphabar.noising import (
    NOISES,
    TIMESTEPS,
    Discrete,
    Huber,
    InputPerturbation,
    MinSNR,
    Noised,
    NoiseSchedule,
    Noising,
    Offset,
    UniformTimesteps,
)
from alphabar.noising.utils import rng
from alphabar.noising.utils.rng import Draws, Stream
from oracles import EVERY_SCHEDULE, SCHEDULES, allowed
from two_processes import last_words, run_two_ranks

FLOW, ZTSNR = SCHEDULES["flow"], SCHEDULES["ztsnr"]
DENSITIES = list(TIMESTEPS)


def batch_of(count: int, seed: int = 0) -> Tensor:
    return torch.randn(count, 3, 4, 5, generator=torch.Generator().manual_seed(seed))


def equal(a: Noised, b: Noised) -> bool:
    names = ("x", "timesteps", "target", "weight", "noise", "t")
    return all(torch.equal(getattr(a, name), getattr(b, name)) for name in names)


# contents


@pytest.mark.parametrize("size", [(3, 4, 5), (300,)], ids=str)
@pytest.mark.parametrize(
    "schedule",
    [s for base in EVERY_SCHEDULE.values() for s in allowed(base)],
    ids=lambda s: f"{s.curve.kind}-{s.prediction.name}",
)
def test_the_compiled_pass_gives_the_same_bits(
    schedule: NoiseSchedule, size: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    noising, x0 = Noising(schedule, weighting="min_snr").eval(), torch.randn(5, *size)
    once = noising(x0, step=3)
    monkeypatch.setattr(rng, "loops", lambda: None)
    assert equal(once, noising(x0, step=3))


KINDS_OF_ONE_PASS: list[Any] = [
    "offset",
    Offset(0.3, random_strength=True, probability=0.5),
    "pyramid",
    "input_perturbation",
    InputPerturbation(0.2, random_strength=True, decay_steps=9),
    ["input_perturbation", "offset"],
    ["pyramid", "input_perturbation", "gaussian"],
    ["offset", "pyramid"],  # not in one pass
    ["offset", "offset"],
]


@pytest.mark.parametrize("size", [(3, 8, 8), (4, 33, 40), (2, 5, 7, 9), (3, 17)], ids=str)
@pytest.mark.parametrize("kinds", KINDS_OF_ONE_PASS, ids=str)
def test_kinds_of_noise_in_one_pass_have_the_same_bits(
    kinds: Any, size: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    noising, x0 = Noising(ZTSNR, noise=kinds, seed=2**40 + 1).eval(), torch.randn(5, *size)
    once = noising(x0, step=3)
    again = once.replaced(weight=2 * once.weight)  # does not read the noise
    monkeypatch.setattr(rng, "loops", lambda: None)
    plain = noising(x0, step=3)
    assert equal(once, plain)
    assert torch.equal(again.noise, plain.noise) and torch.equal(again.weight, 2 * plain.weight)


@pytest.mark.parametrize("count", [2, 3, 1000, 1_000_000])
def test_uniform_timesteps_of_one_loop(count: int) -> None:
    curve = Discrete(num_train_timesteps=count)
    table = torch.arange(5)[:, None] + torch.arange(count).float()
    draws = Draws(5, range(20_000), step=4, stream=Stream.TRAINING_NOISE)
    t, levels, *_ = draws.noised_at_uniform_times(torch.zeros(20_000, 1), table, None, None, None)
    u = 1 - draws.of(Stream.TRAINING_TIME).uniform(dtype=torch.float64)
    assert torch.equal(t, UniformTimesteps().times(u, curve)) and t.dtype == torch.int64
    assert torch.equal(levels, table[:, t])


def test_the_noise_is_made_when_it_is_read() -> None:
    noising, x0 = Noising(FLOW, timesteps="loss_second_moment"), batch_of(3)
    noised = noising(x0, step=2)
    assert "noise" not in vars(noised) and "noise" not in vars(copy.copy(noised))
    expected = noising.draw(range(3), (3, 4, 5), step=2, total=3).noise
    for one in (noised, noised.to("cpu"), copy.deepcopy(noised).replaced(), noised.replaced()):
        assert torch.equal(one.noise, expected) and "noise" in vars(one)
    assert noised.noise is noised.noise
    with pytest.raises(AttributeError, match="'Noised' object has no attribute 'noises'"):
        noised.noises  # noqa: B018


def in_threads(call: Callable[[], Any], count: int) -> Any:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        return call()
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("kinds", ["gaussian", "offset", "pyramid"])
def test_threads_change_no_bit(kinds: str, monkeypatch: pytest.MonkeyPatch) -> None:
    noising, x0 = Noising(ZTSNR, noise=kinds).eval(), batch_of(7)
    expected = noising(x0, step=3)
    expected.noise  # noqa: B018
    used: list[str] = []
    loops, thread = rng.loops(), threading.current_thread().name

    class Watched:
        def __getattr__(self, name: str) -> Any:
            def loop(*arguments: Any) -> Any:
                used.append(threading.current_thread().name)
                return getattr(loops, name)(*arguments)

            return loop

    watched = Watched()
    monkeypatch.setattr(rng, "loops", lambda: watched)
    monkeypatch.setattr(rng, "_PART", 60)
    for count in (2, 3, 16):
        used.clear()
        assert equal(in_threads(lambda: noising(x0, step=3), count), expected)
        assert set(used) > {thread}


def test_a_fork_starts_threads_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rng, "_PART", 60)
    noising, x0 = Noising(ZTSNR).eval(), batch_of(7)
    expected = in_threads(lambda: noising(x0, step=3), 2)
    reader, writer = os.pipe()
    child = os.fork()
    if not child:
        try:
            signal.alarm(20)
            same = equal(in_threads(lambda: noising(x0, step=3), 2), expected)
            os.write(writer, b"same" if same else b"different")
        finally:
            os._exit(0)
    os.waitpid(child, 0)
    os.close(writer)
    assert os.read(reader, 9) == b"same"
    os.close(reader)


def test_batches_that_the_compiled_pass_does_not_take() -> None:
    noising, x0 = Noising(ZTSNR).eval(), batch_of(6)
    expected = noising(x0, step=1)
    strided = torch.stack([x0, x0], dim=-1)[..., 0]
    assert equal(noising(strided, step=1), expected)
    leaf = x0.clone().requires_grad_()
    noised = noising(leaf, step=1)
    assert equal(noised, expected)
    noised.x.sum().backward()
    assert leaf.grad is not None and bool((leaf.grad != 0).any())
    assert Noising(FLOW)(x0, step=1, timesteps=torch.rand(6, requires_grad=True)).x.requires_grad
    half = noising(x0.bfloat16(), step=1)
    assert half.x.dtype == torch.bfloat16 and torch.equal(half.noise, expected.noise)
    exact = noising(x0.double(), step=1)
    assert exact.target.dtype == torch.float64
    assert torch.allclose(exact.target.float(), expected.target, atol=1e-6)


@pytest.mark.parametrize("batch", [1, 64])
def test_a_step_of_few_operations(batch: int) -> None:
    """diffusers takes 49 of them: noise, times, add_noise, get_velocity, compute_snr, the loss."""
    noising, x0 = Noising(ZTSNR, weighting="min_snr").eval(), batch_of(batch)
    noising(x0, step=0)  # tables of the curve
    with CountOperations() as counted:
        noised = noising(x0, step=1)
        noised.loss(noised.x)
    assert counted.operations <= 25


def test_levels_follow_what_is_replaced() -> None:
    noising, x0 = Noising(FLOW).eval(), batch_of(4)
    made = {"weighting": MinSNR(gamma=2.0), "loss": Huber(c=0.5), "schedule": ZTSNR}
    for name, value in made.items():
        noising(x0, step=0)
        setattr(noising, name, value)
        now = {one: getattr(noising, one) for one in made}
        noised, expected = noising(x0, step=0), Noising(**now)(x0, step=0)
        assert equal(noised, expected)
        assert noised.loss(torch.zeros_like(x0)) == expected.loss(torch.zeros_like(x0))


@pytest.mark.parametrize(
    "schedule",
    [s for base in EVERY_SCHEDULE.values() for s in allowed(base)],
    ids=lambda s: f"{s.curve.kind}-{s.prediction.name}",
)
def test_contents(schedule: NoiseSchedule) -> None:
    x0 = batch_of(16)
    noised = Noising(schedule, seed=3)(x0, step=7)
    t = noised.t.double()
    alpha, sigma = (level.view(-1, 1, 1, 1) for level in (schedule.alpha(t), schedule.sigma(t)))
    noise = noised.noise.double()
    loudest = max(1.0, float(sigma.max()))
    assert torch.allclose(
        noised.x_t.double(), alpha * x0 + sigma * noise, rtol=0, atol=2e-6 * loudest
    )
    scale = schedule.curve.input_scale(t).view_as(alpha)
    assert torch.allclose(noised.x.double(), scale * noised.x_t.double(), rtol=1e-6, atol=1e-6)
    c0, c1 = schedule.prediction.coefficients(alpha, sigma)
    expected = c0 * x0 + c1 * noise
    assert float((noised.target - expected).abs().max() / expected.abs().max()) < 1e-6
    assert torch.equal(noised.weight, torch.ones(16))
    assert torch.allclose(noised.log_snr.double(), schedule.log_snr(t), rtol=1e-5, atol=1e-5)
    assert noised.x.shape == noised.target.shape == noised.noise.shape == x0.shape
    assert noised.timesteps.shape == noised.t.shape == noised.weight.shape == (16,)


def test_time_that_the_network_is_given() -> None:
    x0 = batch_of(8)
    discrete = Noising(ZTSNR)(x0, step=0)
    assert discrete.timesteps.dtype == torch.int64
    assert torch.equal(discrete.timesteps, discrete.t)
    flow = Noising(FLOW)(x0, step=0)
    assert flow.timesteps.dtype == torch.float32
    assert torch.allclose(flow.timesteps, 1000 * FLOW.sigma(flow.t))


@pytest.mark.parametrize("schedule", [ZTSNR, FLOW], ids=["discrete", "flow"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_dtypes(schedule: NoiseSchedule, dtype: torch.dtype) -> None:
    x0 = batch_of(4).to(dtype)
    noised = Noising(schedule)(x0, step=0)
    better = torch.promote_types(dtype, torch.float32)
    assert noised.x.dtype == dtype
    assert noised.target.dtype == noised.noise.dtype == noised.weight.dtype == better
    assert noised.losses(x0).dtype == better
    full = Noising(schedule)(x0.double(), step=0)
    assert float((noised.x.double() - full.x).abs().max()) < 4 * torch.finfo(dtype).eps + 1e-6


def test_the_weight_is_the_scheme_s() -> None:
    noising = Noising(
        SCHEDULES["scaled_linear"].with_prediction("v_prediction"), weighting=MinSNR(gamma=5.0)
    )
    noised = noising(batch_of(64), step=0)
    snr = noising.schedule.snr(noised.t.double())
    assert torch.allclose(noised.weight.double(), snr.clamp(max=5.0) / (snr + 1), rtol=1e-5, atol=0)


def test_the_batch_is_left_alone() -> None:
    x0 = batch_of(4)
    before = x0.clone()
    Noising(ZTSNR)(x0, step=0)
    assert torch.equal(x0, before)


def test_given_noise_and_timesteps_are_used() -> None:
    x0, noise, t = batch_of(2), batch_of(2, seed=1), torch.tensor([5, 999])
    noised = Noising(ZTSNR)(x0, step=0, noise=noise, timesteps=t)
    assert torch.equal(noised.noise, noise)
    assert torch.equal(noised.timesteps, t)
    assert torch.equal(noised.x, ZTSNR.add_noise(x0, noise, t))
    assert torch.equal(noised.target, ZTSNR.target(x0, noise, t))
    drawn = Noising(ZTSNR)(x0, step=0)
    half = Noising(ZTSNR)(x0, step=0, timesteps=t)  # what is not given is drawn as ever
    assert torch.equal(half.noise, drawn.noise)


# randomness


@pytest.mark.parametrize("timesteps", DENSITIES)
@pytest.mark.parametrize("noise", NOISES)
def test_deterministic(timesteps: str, noise: str) -> None:
    x0 = batch_of(8)
    one = Noising(ZTSNR, timesteps=timesteps, noise=noise, seed=5)(x0, step=3)
    again = Noising(ZTSNR, timesteps=timesteps, noise=noise, seed=5)
    for step in (0, 9):
        again(x0, step=step)  # what happened before does not matter: this is a resume
    assert equal(one, again(x0, step=3))


def test_every_counter_counts() -> None:
    x0 = batch_of(8)
    seen = [
        Noising(ZTSNR, seed=seed)(x0, step=step)
        for seed in (0, 1, -1, 2**40)
        for step in (0, 1, 2**32 - 1)
    ]
    samples = [noise for noised in seen for noise in noised.noise]
    assert len({noise.numpy().tobytes() for noise in samples}) == len(samples) == 96


@pytest.mark.parametrize("timesteps", DENSITIES)
@pytest.mark.parametrize(
    ("world_size", "accumulate"), [(1, 1), (2, 1), (4, 1), (1, 2), (2, 2), (1, 8), (8, 1)]
)
def test_samples_do_not_depend_on_how_the_step_is_split(
    timesteps: str, world_size: int, accumulate: int
) -> None:
    x0 = batch_of(8)
    noising = Noising(FLOW, timesteps=timesteps, noise="offset", seed=11)
    whole = copy.deepcopy(noising)(x0, step=4)
    batch = 8 // (world_size * accumulate)
    seen = []
    for rank in range(world_size):
        for micro_batch in range(accumulate):
            index = [(micro_batch * batch + k) * world_size + rank for k in range(batch)]
            part = noising(
                x0[index],
                step=4,
                micro_batch=micro_batch,
                accumulate=accumulate,
                rank=rank,
                world_size=world_size,
            )
            for name in ("x", "timesteps", "target", "weight", "noise", "t"):
                assert torch.equal(getattr(part, name), getattr(whole, name)[index])
            seen += index
    assert sorted(seen) == list(range(8))


WORKER = """
import json, os, sys, torch
import torch.distributed as dist
from alphabar.noising import NoiseSchedule, Noising

rank, root = int(os.environ["LOCAL_RANK"]), sys.argv[1]
os.environ["GLOO_SOCKET_IFNAME"] = "lo"
dist.init_process_group("gloo", init_method=f"file://{root}/store", rank=rank, world_size=2)
torch.manual_seed(100 + rank)
schedule = NoiseSchedule.scaled_linear(prediction="v_prediction").zero_terminal_snr()
results = []
for timesteps in ("uniform", "stratified"):
    noising = Noising(schedule, timesteps=timesteps, noise="offset", seed=7)
    for step in (0, 5):
        for micro_batch in range(2):
            noised = noising(torch.zeros(3, 2, 4), step=step, micro_batch=micro_batch, accumulate=2)
            results.append((noised.timesteps.tolist(), noised.noise.tolist()))
dist.barrier()
dist.destroy_process_group()
with open(f"{root}/{rank}.json", "w") as out:
    json.dump(results, out)
"""


def test_two_processes_draw_what_one_draws(tmp_path: Path) -> None:
    (tmp_path / "worker.py").write_text(WORKER)
    assert run_two_ranks(tmp_path / "worker.py", tmp_path) == [0, 0], last_words(tmp_path)
    ranks = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2)]
    place = 0
    for timesteps in ("uniform", "stratified"):
        noising = Noising(ZTSNR, timesteps=timesteps, noise="offset", seed=7)
        for step in (0, 5):
            whole = noising(torch.zeros(12, 2, 4), step=step)
            for micro_batch in range(2):
                for rank in range(2):
                    index = [(micro_batch * 3 + k) * 2 + rank for k in range(3)]
                    times, noise = ranks[rank][place]
                    assert times == whole.timesteps[index].tolist()
                    assert torch.equal(torch.tensor(noise), whole.noise[index])
                place += 1
    assert place == len(ranks[0]) == 8


@pytest.mark.parametrize("timesteps", DENSITIES)
@pytest.mark.parametrize("noise", NOISES)
def test_global_generators_are_neither_used_nor_touched(timesteps: str, noise: str) -> None:
    def state() -> list[bytes]:
        return [
            torch.get_rng_state().numpy().tobytes(),
            np.random.get_state()[1].tobytes(),
            repr(random.getstate()).encode(),
        ]

    noising, x0 = Noising(ZTSNR, timesteps=timesteps, noise=noise).eval(), batch_of(4)
    torch.manual_seed(0)
    before = state()
    first = noising(x0, step=0)
    assert state() == before
    torch.manual_seed(1)
    assert equal(noising(x0, step=0), first)


# times


def strata_seen(
    noising: Noising, step: int, batch: int, world_size: int, accumulate: int
) -> list[int]:
    total = batch * world_size * accumulate
    t = [
        noising.draw(
            [(micro * batch + k) * world_size + rank for k in range(batch)],
            (1,),
            step=step,
            total=total,
        )[0]
        for rank in range(world_size)
        for micro in range(accumulate)
    ]
    return (torch.cat(t).double() * total).ceil().sub(1).int().tolist()


@pytest.mark.parametrize(
    ("batch", "world_size", "accumulate"), [(16, 1, 1), (4, 2, 2), (3, 2, 5), (1, 4, 2), (1, 1, 1)]
)
def test_stratified_times_fall_once_into_every_stratum(
    batch: int, world_size: int, accumulate: int
) -> None:
    noising = Noising(NoiseSchedule.flow(), timesteps="stratified", seed=2)
    total = batch * world_size * accumulate
    orders = [strata_seen(noising, step, batch, world_size, accumulate) for step in range(20)]
    for order in orders:
        assert sorted(order) == list(range(total))
    # and not always in the same place
    assert len({tuple(order) for order in orders}) > (1 if total > 1 else 0)
    independent = Noising(NoiseSchedule.flow(), timesteps="uniform", seed=2)
    if total > 2:
        assert any(
            sorted(strata_seen(independent, s, batch, world_size, accumulate)) != list(range(total))
            for s in range(20)
        )


@pytest.mark.parametrize("stratified", [False, True])
@pytest.mark.parametrize("index", [0, 5])
def test_times_are_uniform(stratified: bool, index: int) -> None:
    """Kolmogorov-Smirnov of one sample's times over many steps: also where each step is stratified."""
    noising = Noising(
        NoiseSchedule.flow(), timesteps=UniformTimesteps(stratified=stratified), seed=1
    )
    n = 2000
    t = (
        torch.cat([noising.draw([index], (1,), step=step, total=8)[0] for step in range(n)])
        .double()
        .sort()
        .values
    )
    distance = max(
        float((t - torch.arange(n) / n).abs().max()),
        float((t - torch.arange(1, n + 1) / n).abs().max()),
    )
    assert distance * math.sqrt(n) < 1.95  # p = 0.001
    assert abs(float(t.mean()) - 0.5) < 4 * math.sqrt(1 / 12 / n)
    assert abs(float((t**2).mean()) - 1 / 3) < 4 * math.sqrt((1 / 5 - 1 / 9) / n)


def test_times_of_different_samples_are_independent() -> None:
    noising, n = Noising(NoiseSchedule.flow(), seed=1), 2000
    t = (
        torch.stack(
            [noising.draw([0, 1], (1,), step=step, total=2)[0] for step in range(n)]
        ).double()
        - 0.5
    )
    pairs = {"samples": t[:, 0] * t[:, 1], "steps": t[1:, 0] * t[:-1, 0]}
    for name, products in pairs.items():
        assert abs(float(products.mean())) < 4 / 12 / math.sqrt(n), name


def test_every_timestep_is_reached_equally_often() -> None:
    schedule = NoiseSchedule.from_betas(
        [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7], "v_prediction"
    ).zero_terminal_snr()
    n = 7 * 300
    for timesteps in DENSITIES:
        t = Noising(schedule, timesteps=timesteps)(torch.zeros(n, 1), step=0).timesteps
        counts = torch.bincount(t, minlength=7)
        assert len(counts) == 7
        if timesteps == "stratified":
            assert counts.tolist() == [300] * 7
        elif timesteps == "uniform":
            chi_square = float(((counts - 300.0) ** 2 / 300).sum())
            assert chi_square < 22.5  # 6 degrees of freedom, p = 0.001
        else:
            assert bool((counts > 0).all())


def test_pure_noise_is_reached_and_a_clean_sample_is_not() -> None:
    noising = Noising(NoiseSchedule.flow(), timesteps="stratified")
    t = noising.draw(range(4000), (1,), step=0, total=4000).t
    assert 0.0 < float(t.min()) < 1 / 4000
    assert 1 - 1 / 4000 < float(t.max()) <= 1.0


@pytest.mark.parametrize("schedule", [FLOW, ZTSNR], ids=["flow", "discrete"])
def test_the_extreme_draws(schedule: NoiseSchedule, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is drawn lies in [0, 1): its 0 must be pure noise, which a model has to learn, and not a
    clean sample.
    """
    monkeypatch.setattr(rng, "loops", lambda: None)
    for u, expected in ((0.0, schedule.curve.t_max), (1 - 2**-53, 0.0)):
        monkeypatch.setattr(
            Draws, "uniform", lambda self, u=u, dtype=None: torch.full((1,), u, dtype=dtype)
        )
        t = Noising(schedule)(torch.zeros(1, 2), step=0).t
        assert float(t) == pytest.approx(expected, abs=1e-9)
        assert schedule.curve.is_discrete or float(t) > 0


# noise


def test_gaussian_noise_is_standard_normal() -> None:
    noise = Noising(ZTSNR)(torch.zeros(2000, 3), step=0).noise.double().flatten()
    n = noise.numel()
    # sd of z, z², z⁴
    for power, moment, spread in ((1, 0.0, 1.0), (2, 1.0, math.sqrt(2)), (4, 3.0, math.sqrt(96))):
        assert abs(float((noise**power).mean()) - moment) < 4 * spread / math.sqrt(n)


# loss


def test_loss_is_the_weighted_mean() -> None:
    noised = Noising(ZTSNR, weighting=MinSNR(floor=0.1))(batch_of(6), step=0)
    prediction = batch_of(6, seed=9)
    by_hand = [
        float(noised.weight[i])
        * sum(
            (float(p) - float(y)) ** 2
            for p, y in zip(prediction[i].flatten(), noised.target[i].flatten(), strict=True)
        )
        / 60
        for i in range(6)
    ]
    assert noised.losses(prediction).tolist() == pytest.approx(by_hand, rel=1e-5)
    assert noised.loss(prediction).item() == pytest.approx(sum(by_hand) / 6, rel=1e-5)
    assert noised.loss(noised.target).item() == 0.0


def test_loss_carries_the_gradient() -> None:
    noised = Noising(ZTSNR)(batch_of(2), step=0)
    prediction = noised.target.clone().add_(0.5).requires_grad_()
    noised.loss(prediction).backward()
    assert prediction.grad is not None
    assert torch.allclose(
        prediction.grad, torch.full_like(prediction, 2 * 0.5 / prediction.numel())
    )


def test_loss_takes_what_networks_return() -> None:
    noised = Noising(ZTSNR)(batch_of(2), step=0)
    out = batch_of(2, seed=4)
    expected = noised.loss(out)
    for returned in (SimpleNamespace(sample=out), (out,), (SimpleNamespace(sample=out), 1)):
        assert torch.equal(noised.loss(returned), expected)
    assert noised.loss(out.bfloat16()).dtype == torch.float32


@pytest.mark.parametrize(
    "returned", [None, {"sample": torch.zeros(1)}, SimpleNamespace(sample=3), 0.0]
)
def test_loss_refuses_what_is_no_output(returned: Any) -> None:
    noised = Noising(ZTSNR)(batch_of(2), step=0)
    with pytest.raises(
        ValueError,
        match=r"^the network must return a tensor or an object with a tensor \.sample, got ",
    ):
        noised.loss(returned)


@pytest.mark.parametrize("shape", [(2, 3, 4, 1), (2, 6, 4, 5), (1, 3, 4, 5), (2, 1, 4, 5), ()])
def test_loss_refuses_another_shape(shape: tuple[int, ...]) -> None:
    noised = Noising(ZTSNR)(batch_of(2), step=0)
    with pytest.raises(
        ValueError,
        match=r"^the network's output must have the shape of the target, \(2, 3, 4, 5\), got ",
    ):
        noised.loss(torch.zeros(shape))


# bad input


def with_value(value: float) -> Tensor:
    x0 = batch_of(3)
    x0[1, 0, 0, 0] = value
    return x0


BAD_BATCHES = {
    "nan": (with_value(float("nan")), r"^x0 holds NaN or infinity in samples \[1\]; look at the data"),
    "inf": (with_value(float("-inf")), r"^x0 holds NaN or infinity in samples \[1\]"),
    "uint8": (torch.zeros(2, 3, dtype=torch.uint8), r"^x0 must be a floating point tensor, got torch.uint8; scale images to \[-1, 1\]"),
    "int64": (torch.zeros(2, 3, dtype=torch.int64), r"^x0 must be a floating point tensor, got torch.int64"),
    "list": ([[0.0]], r"^x0 must be a floating point tensor, got list"),
    "1-D": (torch.zeros(3), r"^x0 must have shape \(batch, \.\.\.\) and hold something, got \(3,\)$"),
    "empty": (torch.zeros(0, 3, 4, 4), r"^x0 must have shape \(batch, \.\.\.\) and hold something, got \(0, 3, 4, 4\)$"),
    "no pixels": (torch.zeros(2, 3, 0, 4), "^x0 must have shape"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD_BATCHES)
def test_bad_batches_are_refused(name: str) -> None:
    x0, message = BAD_BATCHES[name]
    with pytest.raises(ValueError, match=message):
        Noising(ZTSNR)(x0, step=0)


BAD_ARGUMENTS = {
    "noise shape": ({"noise": torch.zeros(2, 3, 4, 1)}, r"^noise must have the shape of x0, \(2, 3, 4, 5\), got \(2, 3, 4, 1\)$"),
    "timesteps shape": ({"timesteps": torch.tensor([1])}, r"^timesteps must have shape \(2,\), one for each sample, got \(1,\)$"),
    "timesteps scalar": ({"timesteps": torch.tensor(1)}, r"^timesteps must have shape \(2,\)"),
    "too late": ({"timesteps": torch.tensor([0, 1000])}, r"^time 1000\.0 is outside 0\.0 \.\.\. 999\.0 of this discrete schedule$"),
    "negative": ({"timesteps": torch.tensor([-1, 0])}, r"^time -1\.0 is outside"),
    "nan": ({"timesteps": torch.tensor([0.0, float("nan")])}, "^time nan is outside"),
    "bfloat16": (
        {"timesteps": torch.tensor([1.0, 999.0], dtype=torch.bfloat16)},
        r"^timesteps of dtype torch\.bfloat16 cannot hold the integers up to 999; give int64 or float32$",
    ),
    "float16": ({"timesteps": torch.tensor([1.0, 999.0], dtype=torch.float16)}, r"^timesteps of dtype torch\.float16"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD_ARGUMENTS)
def test_bad_arguments_are_refused(name: str) -> None:
    arguments, message = BAD_ARGUMENTS[name]
    with pytest.raises(ValueError, match=message):
        Noising(ZTSNR)(batch_of(2), step=0, **arguments)


BAD_SETTINGS = {
    "weighting": (
        {"weighting": "unifrom"},
        r"^unknown weighting 'unifrom'; did you mean 'uniform'\?$",
    ),
    "timesteps": (
        {"timesteps": "stratifed"},
        r"^unknown timestep density 'stratifed'; did you mean 'stratified'\?$",
    ),
    "noise": ({"noise": "gausian"}, r"^unknown noise 'gausian'; did you mean 'gaussian'\?$"),
}


@pytest.mark.parametrize("name", BAD_SETTINGS)
def test_bad_settings_are_refused(name: str) -> None:
    settings, message = BAD_SETTINGS[name]
    with pytest.raises(ValueError, match=message):
        Noising(ZTSNR, **settings)


@pytest.mark.parametrize("strength", [-0.1, float("nan"), float("inf")])
def test_bad_offset_strength(strength: float) -> None:
    with pytest.raises(ValueError, match=r"^noise offset strength must be at least 0, got "):
        Offset(strength)


def test_a_curve_is_no_schedule() -> None:
    with pytest.raises(
        TypeError,
        match=r"^schedule must be a NoiseSchedule, got Discrete; e\.g\. NoiseSchedule\.scaled_linear\(\)$",
    ):
        Noising(ZTSNR.curve)


def test_nothing_to_checkpoint() -> None:
    noising = Noising(ZTSNR)
    noising(batch_of(2), step=0)
    assert noising.state_dict() == {}
    assert list(noising.parameters()) == []


@pytest.mark.parametrize(
    "place",
    [
        {"rank": 2, "world_size": 2},
        {"rank": -1},
        {"micro_batch": 1},
        {"micro_batch": 4, "accumulate": 4},
    ],
    ids=str,
)
def test_a_place_outside_the_optimizer_step_is_refused(place: dict[str, int]) -> None:
    with pytest.raises(
        ValueError, match="need 0 <= rank < world_size and 0 <= micro_batch < accumulate, got rank"
    ):
        Noising(NoiseSchedule.flow())(torch.zeros(2, 3), step=0, **place)


def test_listeners_hear_unweighted_errors_and_do_not_travel_with_copies() -> None:
    noising = Noising(
        NoiseSchedule.scaled_linear(prediction="v_prediction"), weighting=MinSNR(gamma=5.0)
    )
    heard: list[Tensor] = []
    stop = noising.register_loss_hook(lambda noised, errors: heard.append(errors))
    noised = noising(torch.zeros(4, 2, 3), step=0)
    losses = noised.losses((noised.target + 1).requires_grad_())
    assert torch.allclose(heard[0], torch.ones(4)) and not heard[0].requires_grad
    assert torch.allclose(losses, noised.weight)
    again = copy.deepcopy(noising)(torch.zeros(4, 2, 3), step=0)
    again.loss(again.target)
    stop()
    noised = noising(torch.zeros(4, 2, 3), step=0)
    noised.loss(noised.target)
    assert len(heard) == 1
