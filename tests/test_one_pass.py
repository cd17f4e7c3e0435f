"""Rows in one pass over the memory: the numbers of torch's operations, to the bit on the CPU."""

from __future__ import annotations

import importlib.util

import pytest
import torch
from torch import Tensor

from alphabar.noising import NoiseSchedule
from alphabar.sampling import METHODS, Sampler
from alphabar.sampling.kernel import OnePass, combine, final, one_pass, operations, run

CPU = torch.device("cpu")
V = NoiseSchedule.scaled_linear(prediction="v_prediction")
WITHOUT_NUMBA = importlib.util.find_spec("numba") is None


def network(x: Tensor, t: Tensor) -> Tensor:
    """Its output is in another memory format, as that of a network of convolutions may be."""
    out = torch.tanh(1.3 * x + 0.1) * (0.5 + t.view(-1, 1, 1, 1) / 2000)
    return out.contiguous(memory_format=torch.channels_last)


@pytest.mark.skipif(WITHOUT_NUMBA, reason="numba is not installed")
@pytest.mark.parametrize("name", METHODS)
def test_one_pass_changes_no_bit(name: str) -> None:
    sampler = Sampler(V, name, 5)
    steps, x, *others = sampler._begun(network, (2, 3, 5, 7), seeds=3)
    made = sum(isinstance(carry, OnePass) for _, carry, _ in steps)
    assert made > 0 or max(sum(map(operations, step.carry)) for step in sampler.table.steps) < 2
    fused = final(steps, [x], *others)
    again = sampler._begun(network, (2, 3, 5, 7), seeds=3)[1:]
    exact = [(step.x, step.denoised) for step in run(sampler._plan.steps, *again)]
    assert torch.equal(fused, exact[-1][0])
    stepped = sampler.iterate(network, (2, 3, 5, 7), seeds=3)
    for step, (x, denoised) in zip(stepped, exact, strict=True):
        assert torch.equal(step.x, x) and torch.equal(step.denoised, denoised)


@pytest.mark.skipif(WITHOUT_NUMBA, reason="numba is not installed")
@pytest.mark.parametrize("count", [1, 2048, 5000])
def test_rows_of_every_kind(count: int) -> None:
    passes = one_pass(CPU)
    assert passes is not None
    rows = ((2, 0.5), (4, 1.5)), ((1, 1.0),), (), ((0, 1.0), (1, -3.0), (4, 0.2)), ((4, 1.0),)
    then = (0, 1.0), (1, 2.0), (3, -0.1), (4, 0.7)
    basis = list(torch.randn(5, count, generator=torch.Generator().manual_seed(0)))
    exact = [combine(row, basis) for row in rows]
    exact.append(combine(then, exact))
    before = torch.stack(basis)
    made = OnePass(rows, then, passes, torch.float32)(basis)
    assert all(torch.equal(one, other) for one, other in zip(made, exact, strict=True))
    assert torch.equal(torch.stack(basis), before)
    assert made[1] is basis[1]  # a vector as it is is not copied


def test_where_one_pass_is_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    """In float64, on a device without kernels, and where several threads of torch add."""
    plan = Sampler(V, "unipc", 5)._plan
    large = torch.empty(1, 40000)
    assert plan.steps_for(large.double(), None) is plan.steps
    assert plan.steps_for(large.to("meta"), None) is plan.steps
    monkeypatch.setattr(torch, "get_num_threads", lambda: 8)
    assert plan.steps_for(large, None) is plan.steps
    if not WITHOUT_NUMBA:
        assert plan.steps_for(large[:, :100], None) is not plan.steps


def test_a_loop_that_rounds_otherwise_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled = pytest.importorskip("alphabar.noising.utils.compiled", exc_type=ImportError)
    exact = compiled.combine

    def rounded(given: list[Tensor], made: list[Tensor], rows: object) -> None:
        exact(given, made, rows)
        made[0].mul_(1 + 2.0**-23)

    assert one_pass(CPU) is not None
    one_pass.cache_clear()
    monkeypatch.setattr(compiled, "combine", rounded)
    try:
        assert one_pass(CPU) is None
    finally:
        one_pass.cache_clear()


@pytest.mark.skipif(WITHOUT_NUMBA, reason="numba is not installed")
def test_whether_one_pass_works_does_not_depend_on_the_moment(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    one_pass.cache_clear()
    torch.set_default_dtype(torch.bfloat16)
    try:
        assert one_pass(CPU) is not None
    finally:
        torch.set_default_dtype(torch.float32)
        one_pass.cache_clear()

    def full(*given: object) -> None:
        raise MemoryError

    with monkeypatch.context() as patch:
        patch.setattr("alphabar.noising.utils.compiled.combine", full)
        with pytest.raises(MemoryError):
            one_pass(CPU)
    assert one_pass(CPU) is not None


@pytest.mark.skipif(WITHOUT_NUMBA, reason="numba is not installed")
def test_tensors_without_memory_are_refused() -> None:
    passes = one_pass(CPU)
    assert passes is not None
    rows = (((0, 1.0), (1, 0.5)),)
    with pytest.raises(ValueError, match="a tensor without memory"):
        OnePass(rows, None, passes, torch.float32)([torch.empty(3, device="meta")] * 2)
