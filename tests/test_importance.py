"""Importance sampling of timesteps: unbiased, the same on all ranks, and in the checkpoint."""

from __future__ import annotations

import copy
import io
import json
import math
import pickle
from collections import deque
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from alphabar.noising import (
    LogitNormalTimesteps,
    LossSecondMoment,
    MinSNR,
    Noised,
    NoiseSchedule,
    Noising,
    Timesteps,
    UniformTimesteps,
)
from alphabar.noising.timesteps.importance import SecondMoments
from oracles import SCHEDULES
from two_processes import last_words, run_two_ranks

ZTSNR, FLOW = SCHEDULES["ztsnr"], NoiseSchedule.flow()
FOUR = NoiseSchedule.from_betas([0.1, 0.2, 0.3, 0.4])
SMALL = LossSecondMoment(bins=4, history_per_term=3, uniform_prob=0.1)


def history(losses: list[float], uniform_prob: float = 0.5) -> SecondMoments:
    """A history of one loss in each bin."""
    one = SecondMoments(len(losses), 1, uniform_prob)
    one.record(
        0, torch.tensor([[i, i, loss] for i, loss in enumerate(losses)], dtype=torch.float64)
    )
    one.commit(1)
    return one


def error_of(noised: Noised) -> Tensor:
    """A prediction whose error is larger for more noise: errors (1 + t / t_max)²."""
    off = 1 + noised.t / noised.schedule.curve.t_max
    return noised.target + off.view(-1, *[1] * (noised.target.ndim - 1))


def train(
    noising: Noising, steps: range, batch: int = 8, world_size: int = 1, accumulate: int = 1
) -> list[Any]:
    """Train on x_0 = 0 as if on several ranks; return the times and weights of each step by global
    index.
    """
    seen, n = [], batch // world_size // accumulate
    for step in steps:
        times, weights = torch.zeros(batch), torch.zeros(batch)
        for micro in range(accumulate):
            for rank in range(world_size):
                index = [(micro * n + k) * world_size + rank for k in range(n)]
                place = {
                    "rank": rank,
                    "world_size": world_size,
                    "micro_batch": micro,
                    "accumulate": accumulate,
                }
                noised = noising(torch.zeros(n, 2), step=step, **place)
                noised.loss(error_of(noised).requires_grad_())
                times[index], weights[index] = noised.t.float(), noised.weight
        seen.append((times.tolist(), weights.tolist()))
    return seen


def state_of(noising: Noising) -> list[Any]:
    assert noising.loss_history is not None
    noising.loss_history.commit(-1)
    state = noising.loss_history.get_extra_state()
    assert not len(state["pending"])
    return [state["losses"].tolist(), state["counts"].tolist()]


# unbiased


@pytest.mark.parametrize(
    "base", [UniformTimesteps(), LogitNormalTimesteps(mean=0.5)], ids=lambda d: d.name
)
@pytest.mark.parametrize("schedule", [FOUR, FLOW, ZTSNR], ids=["four", "flow", "discrete"])
def test_the_expectation_is_that_of_the_density(schedule: NoiseSchedule, base: Timesteps) -> None:
    """By exact sums: p are multiples of 1/8, so that u at the middles of 2^15 cells fill every bin
    evenly.
    """
    drawing, density = history([2.0, 1.0, 1.0, 0.0]), LossSecondMoment(density=base, bins=4)
    assert drawing.probabilities().tolist() == [0.375, 0.25, 0.25, 0.125]
    u = (torch.arange(2**15, dtype=torch.float64) + 0.5) / 2**15
    drawn = drawing.resample(u)
    for k in range(4):
        share = (drawn.bins == k).double()
        assert float(share.mean()) == drawing.probabilities()[k]
        assert float((share * drawn.weight).mean()) == pytest.approx(0.25, rel=1e-7)
    curve = schedule.curve
    for f in (torch.ones_like, lambda t: t / curve.t_max, lambda t: (t / curve.t_max) ** 2):
        ours = float((drawn.weight * f(density.times(drawn.u, curve).double())).mean())
        assert ours == pytest.approx(float(f(base.times(u, curve).double()).mean()), rel=2e-4)
    if schedule is FOUR and base.name == "uniform":
        t = density.times(drawn.u, curve)
        assert torch.equal(t, drawn.bins)
        assert [float((drawn.weight * (t == k)).mean()) for k in range(4)] == pytest.approx(
            [0.25] * 4, rel=1e-7
        )


def test_it_has_less_variance_where_losses_differ() -> None:
    losses = torch.tensor([10.0, 1.0, 0.1, 0.1], dtype=torch.float64)
    u = (torch.arange(2**15, dtype=torch.float64) + 0.5) / 2**15
    drawn = history(losses.tolist(), 0.01).resample(u)
    weighted = drawn.weight * losses[drawn.bins]
    assert float(weighted.mean()) == pytest.approx(float(losses.mean()), rel=1e-3)
    assert float(weighted.var()) < 0.01 * float(losses.var(unbiased=False))


def test_noised_weights_are_the_scheme_s_over_n_p() -> None:
    noising = Noising(ZTSNR, weighting=MinSNR(floor=0.1), timesteps=SMALL, seed=1)
    train(noising, range(30))
    assert noising.loss_history is not None
    noising.loss_history.commit(30)
    p = noising.loss_history.probabilities()
    assert float(p.max() / p.min()) > 1.5
    noised = noising(torch.zeros(64, 2), step=30)
    plain = Noising(ZTSNR, weighting=MinSNR(floor=0.1))(
        torch.zeros(64, 2), step=30, timesteps=noised.t
    )
    bins = noised.t // 250
    assert torch.allclose(noised.weight, plain.weight * (1 / (4 * p[bins])).float())
    assert len(bins.unique()) == 4


def test_times_follow_the_losses() -> None:
    noising = Noising(FLOW, timesteps=LossSecondMoment(bins=10, history_per_term=2), seed=0)
    seen = train(noising, range(200), batch=16)
    late = torch.tensor([times for times, _ in seen[50:]]).flatten()
    # errors are (1 + t)², so p ∝ (1 + t)² up to the width of the bins
    expected = torch.tensor([(1 + (k + 0.5) / 10) ** 2 for k in range(10)])
    shares = torch.bincount((late * 10).long().clamp(max=9), minlength=10) / len(late)
    assert torch.allclose(
        shares, expected / expected.sum(), atol=4 * math.sqrt(0.1 / len(late)) + 0.005
    )


# the history


def test_probabilities_are_those_of_the_last_losses() -> None:
    bins, per_term, eps = 5, 4, 0.01
    ours, theirs = (
        SecondMoments(bins, per_term, eps),
        [deque[float](maxlen=per_term) for _ in range(bins)],
    )
    generator = torch.Generator().manual_seed(0)
    warmed = 0
    for step in range(40):
        count = int(torch.randint(1, 30, (1,), generator=generator))
        where = torch.randint(bins, (count,), generator=generator)
        values = torch.rand(count, generator=generator, dtype=torch.float64)
        for k, value in zip(where.tolist(), values.tolist(), strict=True):
            theirs[k].append(value)
        rows = torch.stack(
            [torch.arange(count, dtype=torch.float64), where.double(), values], dim=1
        )
        ours.record(step, rows[torch.randperm(count, generator=generator)])
        ours.commit(step + 1)
        if all(len(losses) == per_term for losses in theirs):
            warmed += 1
            root = torch.tensor(
                [math.sqrt(sum(v * v for v in d) / per_term) for d in theirs], dtype=torch.float64
            )
            expected = root / root.sum() * (1 - eps) + eps / bins
        else:
            expected = torch.full((bins,), 1 / bins, dtype=torch.float64)
        assert torch.allclose(ours.probabilities(), expected, rtol=1e-12)
    assert 30 < warmed < 40


def test_it_hears_the_weighted_loss_without_1_over_n_p() -> None:
    noising = Noising(
        ZTSNR,
        weighting=MinSNR(floor=0.1),
        timesteps=LossSecondMoment(bins=2, history_per_term=1),
        seed=1,
    )
    train(noising, range(10))
    state_of(noising)
    noised = noising(torch.zeros(4, 2), step=50)
    assert not torch.allclose(
        noised.weight, Noising(ZTSNR, MinSNR(floor=0.1)).at(noised.x, noised.t, noised.noise).weight
    )
    errors = torch.tensor([1.0, 4.0, 9.0, 16.0])
    noised.loss(noised.target + errors.sqrt().view(-1, 1))
    plain = Noising(ZTSNR, MinSNR(floor=0.1)).at(noised.x, noised.t, noised.noise).weight
    losses = (errors * plain).tolist()
    bins = (noised.t // 500).tolist()
    heard = state_of(noising)[0]
    for k in set(bins):  # the last one of each bin, in the order of the global index
        assert heard[k] == [
            pytest.approx([v for b, v in zip(bins, losses, strict=True) if b == k][-1], rel=1e-6)
        ]


def test_p_does_not_change_within_an_optimizer_step() -> None:
    noising = Noising(FLOW, timesteps=LossSecondMoment(bins=2, history_per_term=1), seed=0)
    train(noising, range(5))
    assert noising.loss_history is not None
    noising.loss_history.commit(5)
    before = noising.loss_history.probabilities()
    for micro in range(3):
        noised = noising(torch.zeros(4, 2), step=5, micro_batch=micro, accumulate=3)
        assert torch.equal(noising.loss_history.probabilities(), before)
        noised.loss(noised.target + 10)
    noising(torch.zeros(4, 2), step=6)
    assert not torch.equal(noising.loss_history.probabilities(), before)


@pytest.mark.parametrize(("world_size", "accumulate"), [(1, 4), (2, 2), (4, 1), (8, 1), (1, 8)])
@pytest.mark.parametrize("stratified", [False, True])
def test_it_does_not_depend_on_how_the_step_is_split(
    world_size: int, accumulate: int, stratified: bool
) -> None:
    density = LossSecondMoment(bins=4, history_per_term=3, stratified=stratified)
    one, other = (Noising(ZTSNR, timesteps=density, seed=2) for _ in range(2))
    whole = train(one, range(12))
    assert train(other, range(12), world_size=world_size, accumulate=accumulate) == whole
    assert state_of(other) == state_of(one)
    assert whole[-1][1] != [1.0] * 8


def test_validation_does_not_contribute() -> None:
    noising, alone = (Noising(FLOW, timesteps=SMALL, seed=3) for _ in range(2))
    for step in range(10):
        train(noising, range(step, step + 1))
        noising.eval()
        noised = noising(torch.zeros(8, 2), step=0)
        noised.loss(noised.target + 100)
        noising.train()
        with torch.no_grad():
            noised = noising(torch.zeros(8, 2), step=1000 + step)
            noised.loss(noised.target + 100)
    train(alone, range(10))
    assert state_of(noising) == state_of(alone)


def test_given_times_are_neither_weighted_nor_heard() -> None:
    noising = Noising(FLOW, timesteps=SMALL)
    noised = noising(torch.zeros(4, 2), step=0, timesteps=torch.full((4,), 0.5))
    noised.loss(noised.target + 1)
    assert noised.weight.tolist() == [1.0] * 4 and state_of(noising)[1] == [0] * 4


def test_a_loss_that_is_computed_twice_counts_once() -> None:
    noising = Noising(FLOW, timesteps=SMALL)
    noised = noising(torch.zeros(4, 2), step=0)
    for _ in range(2):
        noised.loss(noised.target + 1)
    assert sum(state_of(noising)[1]) == 4


def test_losses_that_went_wrong_are_passed_over() -> None:
    noising = Noising(FLOW, timesteps=SMALL)
    noised = noising(torch.zeros(4, 2), step=0)
    noised.loss(noised.target + torch.tensor([1.0, math.nan, math.inf, 1.0]).view(-1, 1))
    losses, counts = state_of(noising)
    assert sum(counts) == 2 and all(math.isfinite(v) for row in losses for v in row)


def test_losses_of_nothing_leave_p_even() -> None:
    assert history([0.0, 0.0]).probabilities().tolist() == [0.5, 0.5]


# the checkpoint


@pytest.mark.parametrize("stopped_after", [1, 4, 9])
def test_a_run_that_is_killed_and_resumed_is_the_same(stopped_after: int) -> None:
    whole = train(Noising(ZTSNR, timesteps=SMALL, seed=6), range(14))
    first = Noising(ZTSNR, timesteps=SMALL, seed=6)
    train(first, range(stopped_after))
    file = io.BytesIO()
    torch.save(nn.ModuleDict({"noising": first}).state_dict(), file)
    file.seek(0)
    state = torch.load(file, weights_only=True)
    again = Noising(ZTSNR, timesteps=SMALL, seed=6)
    nn.ModuleDict({"noising": again}).load_state_dict(state)
    assert train(again, range(stopped_after, 14)) == whole[stopped_after:]
    if stopped_after > 4:  # without the history it would not be
        assert (
            train(Noising(ZTSNR, timesteps=SMALL, seed=6), range(stopped_after, 14))
            != whole[stopped_after:]
        )


def test_copies_take_the_history_with_them() -> None:
    noising = Noising(ZTSNR, timesteps=SMALL, seed=6)
    train(noising, range(8))
    for again in (copy.deepcopy(noising), pickle.loads(pickle.dumps(noising))):
        assert train(again, range(8, 12)) == train(copy.deepcopy(noising), range(8, 12))
    before = state_of(copy.deepcopy(noising))
    other = copy.deepcopy(noising)
    train(other, range(8, 12))
    assert state_of(noising) == before  # and go their own way


def test_precision_and_device_of_the_model_do_not_reach_it() -> None:
    noising = Noising(ZTSNR, timesteps=SMALL, seed=6)
    train(noising, range(8))
    before = state_of(copy.deepcopy(noising))
    assert state_of(noising.half().to("meta")) == before
    assert list(noising.parameters()) == list(noising.buffers()) == []


def test_another_number_of_bins_is_refused() -> None:
    state = Noising(FLOW, timesteps=SMALL).state_dict()
    with pytest.raises(
        ValueError,
        match=r"^the checkpoint holds losses of 4 bins with 3 each, the density has 5 with 3",
    ):
        Noising(FLOW, timesteps=LossSecondMoment(bins=5, history_per_term=3)).load_state_dict(state)


# two processes

WORKER = """
import json, os, sys, torch
import torch.distributed as dist
from alphabar.noising import LossSecondMoment, NoiseSchedule, Noising

rank, root = int(os.environ["LOCAL_RANK"]), sys.argv[1]
os.environ["GLOO_SOCKET_IFNAME"] = "lo"
state = f"{root}/state.pt"
dist.init_process_group("gloo", init_method=f"file://{root}/store", rank=rank, world_size=2)
schedule = NoiseSchedule.scaled_linear(prediction="v_prediction").zero_terminal_snr()

def noising():
    return Noising(schedule, timesteps=LossSecondMoment(bins=4, history_per_term=3, uniform_prob=0.1), seed=6)

def train(noising, steps):
    seen = []
    for step in steps:
        for micro_batch in range(2):
            noised = noising(torch.zeros(2, 2), step=step, micro_batch=micro_batch, accumulate=2)
            noised.loss((noised.target + (1 + noised.t / 999).view(-1, 1)).requires_grad_())
            seen.append((noised.t.tolist(), noised.weight.tolist()))
    return seen

run = noising()
seen = train(run, range(9))
if rank == 0:  # as a plain script does, and no collective may wait for the others here
    torch.save(run.state_dict(), state)
seen += train(run, range(9, 14))
dist.barrier()
again = noising()
again.load_state_dict(torch.load(state, weights_only=True))
resumed = train(again, range(9, 14))
again.loss_history.commit(-1)
state = again.loss_history.get_extra_state()
with open(f"{root}/{rank}.json", "w") as out:
    json.dump([seen, resumed, state["losses"].tolist(), state["counts"].tolist()], out)
dist.barrier()
sys.stdout.flush()
os._exit(0)
"""


def test_two_processes_share_one_history(tmp_path: Path) -> None:
    (tmp_path / "worker.py").write_text(WORKER)
    assert run_two_ranks(tmp_path / "worker.py", tmp_path) == [0, 0], last_words(tmp_path)
    ranks = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2)]
    alone = Noising(ZTSNR, timesteps=SMALL, seed=6)
    whole = train(alone, range(14))
    losses, counts = state_of(alone)
    for rank, (seen, resumed, their_losses, their_counts) in enumerate(ranks):
        assert their_losses == losses and their_counts == counts
        assert resumed == seen[18:]
        for place, (times, weights) in enumerate(seen):
            step, micro = divmod(place, 2)
            index = [(micro * 2 + k) * 2 + rank for k in range(2)]
            assert times == [whole[step][0][i] for i in index]
            assert weights == [whole[step][1][i] for i in index]
    assert whole[-1][1] != [1.0] * 8
