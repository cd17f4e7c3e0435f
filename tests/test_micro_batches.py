"""Where a batch lies in its optimizer step: no two samples share noise, however the step is split,
and nothing else counts.
"""

from __future__ import annotations

import copy
import inspect
import math
import pickle
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from lightning.fabric import Fabric
from torch import Tensor, nn

from alphabar.noising import (
    LearnedUncertainty,
    LossSecondMoment,
    Noised,
    NoiseSchedule,
    Noising,
    UniformTimesteps,
)
from alphabar.noising.micro_batches import MicroBatches, Step
from alphabar.noising.utils.validation import require_integer

FLOW = NoiseSchedule.flow()


def zeros(count: int) -> Tensor:
    return torch.zeros(count, 2, 3)


def whole(noising: Noising, count: int, step: int) -> Noised:
    return copy.deepcopy(noising).eval()(zeros(count), step=step)


def distinct(parts: Sequence[Noised]) -> bool:
    samples = [one.numpy().tobytes() for part in parts for one in part.noise]
    return len(set(samples)) == len(samples)


# counting


@pytest.mark.parametrize("sizes", [(8, 5), (8, 8, 3), (3, 8), (1, 1, 1, 7)], ids=str)
@pytest.mark.parametrize("explicit", [False, True])
def test_unequal_micro_batches_share_no_noise(sizes: tuple[int, ...], explicit: bool) -> None:
    noising = Noising(FLOW, seed=1)
    for step in (4, 5):
        place = [
            {"micro_batch": i, "accumulate": len(sizes)} if explicit else {}
            for i in range(len(sizes))
        ]
        parts = [noising(zeros(n), step=step, **p) for n, p in zip(sizes, place, strict=True)]
        assert distinct(parts)
        # nothing depends on the split, nor on what happened before
        one = whole(noising, sum(sizes), step)
        assert torch.equal(torch.cat([part.noise for part in parts]), one.noise)
        assert torch.equal(torch.cat([part.t for part in parts]), one.t)


def test_the_loop_that_accumulates_without_saying_so() -> None:
    noising = Noising(FLOW, timesteps="stratified", seed=2)
    seen: dict[int, list[Noised]] = {}
    for i in range(9):
        seen.setdefault(i // 3, []).append(noising(zeros(4), step=i // 3))
    for parts in seen.values():
        assert distinct(parts) and len({tuple(part.t.tolist()) for part in parts}) == 3
    assert distinct([part for parts in seen.values() for part in parts])


def test_counting_is_what_the_numbers_say() -> None:
    counted, said = (Noising(FLOW, timesteps="stratified", seed=3) for _ in range(2))
    for step in range(2):
        for micro in range(3):
            one = counted(zeros(4), step=step, accumulate=3)
            other = said(zeros(4), step=step, micro_batch=micro, accumulate=3)
            assert torch.equal(one.noise, other.noise) and torch.equal(one.t, other.t)


def test_a_run_that_begins_inside_of_a_step() -> None:
    noising = Noising(FLOW, seed=3)
    parts = [noising(zeros(4), step=1, micro_batch=m, accumulate=3) for m in range(3)]
    again = Noising(FLOW, seed=3)
    resumed = [again(zeros(4), step=1, micro_batch=m, accumulate=3) for m in (1, 2)]
    assert all(torch.equal(a.noise, b.noise) for a, b in zip(parts[1:], resumed, strict=True))


def test_a_micro_batch_twice_is_refused() -> None:
    noising = Noising(FLOW)
    noising(zeros(2), step=3, micro_batch=0, accumulate=2)
    with pytest.raises(
        ValueError,
        match=r"^micro-batch 0 of step 3 was noised already, .*; count micro_batch up, or leave it out",
    ):
        noising(zeros(2), step=3, micro_batch=0, accumulate=2)
    noising(zeros(2), step=3, micro_batch=1, accumulate=2)
    noising(zeros(2), step=4, micro_batch=0, accumulate=2)
    noising(zeros(2), step=3, micro_batch=0, accumulate=2)  # a step begun anew


def test_more_micro_batches_than_there_are_is_refused() -> None:
    noising = Noising(FLOW)
    for _ in range(2):
        noising(zeros(2), step=0, accumulate=2)
    with pytest.raises(
        ValueError,
        match=r"^step 0 has had its 2 micro-batches already; count step up after each optimizer step",
    ):
        noising(zeros(2), step=0, accumulate=2)


RENEWED: dict[str, Callable[[Noising], Noising]] = {
    "deep copy": copy.deepcopy,
    "pickle": lambda noising: pickle.loads(pickle.dumps(noising)),
    "checkpoint": lambda noising: (nn.ModuleList([noising]).load_state_dict({}), noising)[1],
}


@pytest.mark.parametrize("how", RENEWED)
def test_copies_and_resumes_begin_the_step_anew(how: str) -> None:
    noising = Noising(FLOW, seed=5)
    first = noising(zeros(4), step=2)
    again = RENEWED[how](noising)
    assert torch.equal(again(zeros(4), step=2).noise, first.noise)


def test_two_noisings_do_not_count_together() -> None:
    one, other = (Noising(FLOW, seed=5) for _ in range(2))
    assert torch.equal(one(zeros(4), step=2).noise, other(zeros(4), step=2).noise)


def test_nothing_is_counted_in_eval_mode() -> None:
    noising = Noising(FLOW, seed=5)
    first = noising(zeros(4), step=2)
    noising.eval()  # a validation between two micro-batches
    assert torch.equal(noising(zeros(4), step=2).noise, first.noise)
    assert torch.equal(noising(zeros(4), step=2, micro_batch=0, accumulate=2).noise, first.noise)
    noising(zeros(4), step=7)
    noising.train()
    assert distinct([first, noising(zeros(4), step=2)])


# ranks


def test_unequal_ranks_share_neither_noise_nor_strata() -> None:
    """Two ranks, of which the second has a smaller last batch: with the total said, strata are
    those of one process.
    """
    parts, one = [], Noising(FLOW, timesteps="stratified", seed=7)
    for rank, sizes in enumerate([(4, 4), (4, 1)]):
        noising = Noising(FLOW, timesteps="stratified", seed=7)
        parts += [noising(zeros(n), step=3, rank=rank, world_size=2, total=16) for n in sizes]
    assert distinct(parts)
    t = torch.cat([part.t for part in parts]).double()
    assert len((t * 16).ceil().unique()) == len(t) == 13
    full = one(zeros(16), step=3)
    index = [0, 2, 4, 6, 8, 10, 12, 14, 1, 3, 5, 7, 9]
    assert torch.equal(torch.cat([part.t for part in parts]), full.t[index])
    assert torch.equal(torch.cat([part.noise for part in parts]), full.noise[index])


def test_several_ranks_are_counted_apart() -> None:
    noising = Noising(FLOW, seed=7)
    parts = [noising(zeros(n), step=0, rank=r, world_size=2) for n in (3, 2) for r in range(2)]
    assert distinct(parts)


@pytest.mark.parametrize("timesteps", ["uniform", "stratified"])
def test_contiguous_batches(timesteps: str) -> None:
    """Where each rank has a whole batch, its indices are given, and the noise is that of one
    process.
    """
    noising = Noising(FLOW, timesteps=timesteps, noise="offset", seed=9)
    one = whole(noising, 8, step=1)
    for rank in range(2):
        index = range(rank * 4, rank * 4 + 4)
        for given in (index, list(index), torch.tensor(index), np.arange(rank * 4, rank * 4 + 4)):
            part = noising(zeros(4), step=1, rank=rank, world_size=2, index=given)
            assert torch.equal(part.noise, one.noise[list(index)]) and torch.equal(
                part.t, one.t[list(index)]
            )


def test_equal_indices_are_pairs() -> None:
    noised = Noising(FLOW)(zeros(4), step=0, index=[0, 1, 0, 1])
    assert torch.equal(noised.noise[:2], noised.noise[2:]) and torch.equal(
        noised.t[:2], noised.t[2:]
    )
    assert distinct([Noising(FLOW)(zeros(2), step=0)])


@pytest.mark.parametrize(
    ("index", "message"),
    [
        (
            [0, 1, 2],
            r"^index must have shape \(2,\), a global index for each sample, got \[0, 1, 2\]$",
        ),
        (torch.tensor([[0], [1]]), "^an index must be an integer"),
        (torch.tensor(0), r"^index must have shape \(2,\)"),
        ([0.0, 1.0], r"^an index must be an integer, got 0\.0 \(float\)"),
        ([True, False], "^an index must be an integer, got True"),
        ([0, -1], "^a global index must be at least 0, got -1"),
    ],
    ids=str,
)
def test_bad_indices_are_refused(index: Any, message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        Noising(FLOW)(zeros(2), step=0, index=index)


def test_index_and_micro_batch_are_one_too_many() -> None:
    with pytest.raises(
        ValueError,
        match=r"^index already says where each sample lies in the optimizer step; leave micro_batch out",
    ):
        Noising(FLOW)(zeros(2), step=0, index=[0, 1], micro_batch=0)


# stratified times


def strata(part: Noised, total: int) -> list[int]:
    return (part.t.double() * total).ceil().sub(1).int().tolist()


def test_strata_of_each_micro_batch_where_their_number_is_not_known() -> None:
    noising = Noising(FLOW, timesteps="stratified", seed=2)
    orders = [strata(noising(zeros(6), step=0), 6) for _ in range(4)]
    assert all(sorted(order) == list(range(6)) for order in orders)
    assert len({tuple(order) for order in orders}) == 4  # each by a permutation of its own


def test_strata_of_the_whole_step_where_it_is() -> None:
    noising = Noising(FLOW, timesteps="stratified", seed=2)
    parts = [noising(zeros(6), step=0, accumulate=4) for _ in range(3)] + [
        noising(zeros(2), step=0, accumulate=4)
    ]
    seen = [k for part in parts for k in strata(part, 24)]
    # the smaller last batch leaves some empty, and fills none twice
    assert len(set(seen)) == len(seen) == 20


@pytest.mark.parametrize("index", [3, 9, 17])
def test_times_beyond_the_total_are_uniform(index: int) -> None:
    noising, n = Noising(FLOW, timesteps=UniformTimesteps(stratified=True), seed=1), 1000
    t = (
        torch.cat([noising.draw([index], (1,), step=step, total=8).t for step in range(n)])
        .double()
        .sort()
        .values
    )
    distance = max(
        float((t - torch.arange(n) / n).abs().max()),
        float((t - torch.arange(1, n + 1) / n).abs().max()),
    )
    assert distance * math.sqrt(n) < 1.95  # Kolmogorov-Smirnov, p = 0.001


def test_importance_hears_every_sample_of_unequal_micro_batches() -> None:
    noising = Noising(FLOW, timesteps=LossSecondMoment(bins=2, history_per_term=100), seed=1)
    for n in (8, 5):
        noised = noising(zeros(n), step=0)
        noised.loss((noised.target + 1).requires_grad_())
    assert noising.loss_history is not None
    noising.loss_history.commit(1)
    assert int(noising.loss_history.get_extra_state()["counts"].sum()) == 13


# numbers


@pytest.mark.parametrize(
    "kind", [np.int64, np.int32, np.uint8, torch.tensor, lambda v: np.array(v)]
)
def test_integers_of_other_libraries(kind: Callable[[int], Any]) -> None:
    place = {"step": 3, "micro_batch": 1, "accumulate": 2, "rank": 1, "world_size": 2, "total": 9}
    one = Noising(FLOW, seed=4, timesteps="stratified")(zeros(2), **place)
    other = Noising(FLOW, seed=kind(4), timesteps="stratified")(
        zeros(2), **{k: kind(v) for k, v in place.items()}
    )
    assert torch.equal(one.noise, other.noise) and torch.equal(one.t, other.t)


@pytest.mark.parametrize(
    "name", ["step", "micro_batch", "accumulate", "rank", "world_size", "total"]
)
@pytest.mark.parametrize(
    "value",
    [True, np.True_, torch.tensor(True), 1.0, np.float64(1), torch.tensor(1.0), "1", [1]],
    ids=repr,
)
def test_other_numbers_are_refused(name: str, value: Any) -> None:
    with pytest.raises(TypeError, match=f"^{name} must be an integer, got .*; write int"):
        Noising(FLOW)(zeros(2), **{"step": 0, name: value})


@pytest.mark.parametrize("seed", [True, 1.5, "0", None])
def test_a_seed_is_an_integer(seed: Any) -> None:
    with pytest.raises(TypeError, match=r"^a seed must be an integer, got "):
        Noising(FLOW, seed=seed)


def test_whole_numbers_pass_as_they_are() -> None:
    assert (
        require_integer("step", 2**70) == 2**70 and type(require_integer("step", np.int8(3))) is int
    )


def test_a_total_of_nothing_is_refused() -> None:
    with pytest.raises(
        ValueError,
        match=r"^total must be at least 1, the samples of the whole optimizer step, got 0$",
    ):
        Noising(FLOW)(zeros(2), step=0, total=0)


# help, compilation, Fabric


def test_help_says_what_forward_says() -> None:
    assert inspect.signature(Noising.__call__) == inspect.signature(Noising.forward)
    assert inspect.getdoc(Noising.__call__) == inspect.getdoc(Noising.forward)
    assert Noising.__call__.__name__ == "__call__"


def test_a_compiled_step_is_compiled_once() -> None:
    counted = MicroBatches()

    def first(x: Tensor, step: int) -> Tensor:
        return x + counted.take(x.shape[0], Step(step), counted=True).index[0]

    compiled = torch.compile(first, fullgraph=True, backend="eager")
    for step in range(20):  # more than the number of graphs after which torch gives up
        compiled(torch.ones(2), step)
    with pytest.raises(Exception, match="a compiled call cannot count micro-batches"):
        torch.compile(
            lambda x: x + counted.take(2, Step(0, accumulate=2), counted=True).index[0],
            fullgraph=True,
            backend="eager",
        )(torch.ones(2))


@pytest.mark.parametrize("precision", ["32-true", "bf16-true", "bf16-mixed", "64-true"])
@pytest.mark.parametrize(
    "schedule", [FLOW, NoiseSchedule.linear(), NoiseSchedule.karras()], ids=lambda s: s.curve.kind
)
def test_fabric_hands_the_batch_on_as_it_is(schedule: NoiseSchedule, precision: Any) -> None:
    fabric = Fabric(accelerator="cpu", devices=1, precision=precision)
    noising = Noising(schedule, LearnedUncertainty(channels=4), seed=3)
    plain = copy.deepcopy(noising)
    wrapped, network = fabric.setup_module(noising), fabric.setup_module(nn.Linear(3, 3))
    # which every precision holds
    x0 = torch.randn(4, 3, generator=torch.Generator().manual_seed(0)).bfloat16().float()
    noised = wrapped(x0, step=0)
    expected = plain(x0, step=0)
    assert isinstance(noised, Noised) and noised.schedule is schedule
    assert torch.equal(noised.t.double(), expected.t.double())
    # the network's own precision for x; everything else in float32 or better
    assert (
        noised.x.dtype
        == {"32": torch.float32, "bf": torch.bfloat16, "64": torch.float64}[precision[:2]]
    )
    assert noised.timesteps.dtype == (
        torch.int64
        if schedule.curve.is_discrete
        else torch.promote_types(noised.x.dtype, torch.float32)
    )
    assert (
        noised.target.dtype
        == noised.weight.dtype
        == torch.promote_types(noised.x.dtype, torch.float32)
    )
    assert torch.allclose(noised.target.float(), expected.target, rtol=1e-5, atol=1e-6)
    loss = noised.loss(network(noised.x))
    fabric.backward(loss)
    assert noising.log_variance is not None and all(
        p.grad is not None for p in noising.log_variance.parameters()
    )


def test_lightning_moves_a_batch_without_touching_its_precision() -> None:
    noised = Noising(FLOW)(zeros(2).double(), step=0)
    moved = Fabric(accelerator="cpu", devices=1).to_device({"noised": noised})["noised"]
    assert moved.x.dtype == moved.target.dtype == torch.float64
    on_meta = noised.to("meta")
    assert {on_meta.x.device.type, on_meta.x_t.device.type, on_meta.weight.device.type} == {"meta"}
    assert on_meta.schedule is noised.schedule and noised.x.device.type == "cpu"
