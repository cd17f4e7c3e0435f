"""Strata across optimizer steps: each part once in a window, exact marginals, and the same on two
processes and after kill -9.
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from scipy import stats
from torch import Tensor

from alphabar.noising import LogitNormalTimesteps, LossSecondMoment, NoiseSchedule, Noising
from alphabar.noising.timesteps import LogNormalSigmaTimesteps, resolve_timesteps
from alphabar.training import add_noising_arguments, noising_from_arguments

FLOW = NoiseSchedule.flow()


def shares(noising: Noising, steps: range, batch: int) -> Tensor:
    """The times of these steps, shape (steps, batch); on this flow they are u itself."""
    return torch.stack(
        [noising.draw(range(batch), (1,), step=s, total=batch).t for s in steps]
    ).double()


@pytest.mark.parametrize(("across", "batch"), [(8, 1), (64, 1), (128, 1), (16, 3), (2, 5)])
def test_every_part_of_every_stratum_once_in_a_window(across: int, batch: int) -> None:
    noising = Noising(FLOW, timesteps=f"stratified:across={across}", seed=3)
    for window in (0, 5):
        first = window * across
        t = shares(noising, range(first, first + across), batch)
        block = 1
        while block <= across:  # aligned blocks of 1, 2, 4, ... steps are even too
            parts = (t.view(-1, block * batch) * block * batch).ceil().long() - 1
            assert torch.equal(
                parts.sort(1).values, torch.arange(block * batch).expand_as(parts)
            ), block
            block *= 2


def test_each_step_alone_has_the_density() -> None:
    """Also the steps that a logger looks at, every eighth: each window is scrambled anew."""
    for residue in (0, 3):
        for seed in (0, 1):
            noising = Noising(FLOW, timesteps="stratified:across=8", seed=seed)
            t = torch.cat(
                [noising.draw([0], (1,), step=s, total=1).t for s in range(residue, 6400, 8)]
            )
            assert stats.kstest(t.numpy(), "uniform").pvalue > 1e-3


def test_densities_that_go_around_keep_the_strata() -> None:
    inner = resolve_timesteps("stratified_logit_normal:across=32")
    for density in (inner.within(0.1, 0.9), inner.reversed(), LossSecondMoment(density=inner)):
        assert density.stratified and density.across == 32
    noising = Noising(FLOW, timesteps=inner, seed=1)
    u = torch.special.ndtr(torch.logit(shares(noising, range(32), 1))) * 32
    assert (u.ceil().flatten() - 1).sort().values.tolist() == list(range(32))


@pytest.mark.parametrize("total", [6, 7])
def test_groups_of_an_unknown_total_have_strata_of_their_own(total: int) -> None:
    noising = Noising(FLOW, timesteps="stratified:across=4", seed=2)
    t = torch.stack(
        [noising.draw(range(2 * total), (1,), step=s, total=total).t for s in range(4)]
    ).double()
    for group in t.split(total, 1):
        parts = (group * 4 * total).ceil().long().flatten() - 1
        assert parts.sort().values.tolist() == list(range(4 * total))
    assert not torch.equal(*t.split(total, 1))


@pytest.mark.parametrize(
    ("timesteps", "words"),
    [
        ("stratified:across=100", r"a power of two in 1 \.\.\. 65536, got 100.*across=128"),
        ("stratified:across=0", "a power of two"),
        ("stratified:across=1.5", "must be an integer"),
        ("uniform:across=8", "not stratified; take the stratified form"),
        (LogitNormalTimesteps(across=4), "not stratified"),
    ],
)
def test_what_is_wrong_is_named(timesteps: str | LogitNormalTimesteps, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        Noising(FLOW, timesteps=timesteps)


@pytest.fixture(scope="module")
def benchmark() -> ModuleType:
    path = Path(__file__).parent.parent / "benchmarks" / "strata.py"
    spec = importlib.util.spec_from_file_location("strata", path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules["strata"] = module
    spec.loader.exec_module(module)
    return module


def test_the_variance_is_lower(benchmark: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without x_0 and noise: by 5 over any 16 steps, by 10 over any 64."""
    monkeypatch.setattr(benchmark, "SEEDS", 20)
    monkeypatch.setattr(benchmark, "LONGEST", 64)
    monkeypatch.setattr(benchmark, "WINDOWS", (16, 64))
    alone = benchmark.variances("stratified", None)
    together = benchmark.variances("stratified:across=64", None)
    assert together[16] < alone[16] / 5 and together[64] < alone[64] / 10


def test_ranks_micro_batches_and_a_resume_have_the_times_of_one_process() -> None:
    whole = Noising(FLOW, timesteps="stratified_logit_normal:across=16", seed=4)
    one = [whole(torch.zeros(4, 1), step=s).t for s in range(20, 40)]
    for s, t in zip(range(20, 40), one, strict=True):  # as after a resume at step 20
        parts = torch.empty(4)
        for rank in range(2):
            noising = Noising(FLOW, timesteps="stratified_logit_normal:across=16", seed=4)
            for micro_batch in range(2):
                place = {"micro_batch": micro_batch, "accumulate": 2, "rank": rank}
                noised = noising(torch.zeros(1, 1), step=s, world_size=2, **place)
                parts[2 * micro_batch + rank] = noised.t[0]
        assert torch.equal(parts, t)


def test_the_flag() -> None:
    parser = argparse.ArgumentParser()
    add_noising_arguments(parser)
    flags = ["--timestep_density", "stratified_lognormal_sigma:across=64", "--p_mean", "-0.4"]
    density = noising_from_arguments(parser.parse_args(flags)).timesteps
    assert density == LogNormalSigmaTimesteps(stratified=True, across=64, mean=-0.4)


@pytest.mark.slow
def test_two_processes_and_kill_9(benchmark: ModuleType, tmp_path: Path) -> None:
    assert all(benchmark.exactness(tmp_path).values())
