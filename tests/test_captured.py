"""A captured loop, with a graph that runs the loop again: what changes from call to call is read
from fixed memory. tests/test_gpu_kernels.py captures on a GPU.
"""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from alphabar.noising import NoiseSchedule
from alphabar.sampling import CapturedSampler, DPMAdaptive, Sampler
from alphabar.sampling.inference import Times
from alphabar.sampling.serving import captured

V = NoiseSchedule.scaled_linear(prediction="v_prediction")
SHAPE = (2, 3, 4, 4)


def network(x: Tensor, t: Tensor, shift: Tensor, names: str = "") -> Tensor:
    return torch.tanh(1.3 * x + shift) * (0.5 + t.view(-1, 1, 1, 1) / 2000)


@pytest.fixture(autouse=True)
def graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    def fake(body: Callable[[], Tensor]) -> tuple[Callable[[], Any], Tensor]:
        samples = body()
        assert torch.equal(body(), samples)  # a graph holds the run after those that warm up
        return lambda: samples.copy_(body()), samples

    monkeypatch.setattr(captured, "_captured", fake)
    monkeypatch.setattr(captured, "_require_graphs", lambda device: None)


def inputs(value: float) -> dict[str, Any]:
    rows = torch.tensor([value, -value]).view(2, 1, 1, 1)
    return {"conditioning": {"shift": rows}, "unconditional": {"shift": 0 * rows}}


@pytest.mark.parametrize("given", [False, True], ids=["drawn", "given"])
@pytest.mark.parametrize("name", ["euler_ancestral", "sa_solver", "dpmpp_2m"])
def test_the_samples_are_those_of_the_sampler(name: str, given: bool) -> None:
    sampler, starts = Sampler(V, name, 4), [torch.randn(SHAPE) for _ in range(3)]
    first = starts[0] if given else SHAPE
    loop = CapturedSampler(sampler, network, first, guidance_scale=2.0, **inputs(0.0))
    for k, seeds in enumerate((3, [2**64 - 1, 5], 3)):
        ours = loop(*([starts[k]] if given else []), seeds=seeds, **inputs(0.1 * k))
        shape_or_noise = starts[k] if given else SHAPE
        arguments = inputs(0.1 * k) | {"guidance_scale": 2.0}
        assert torch.equal(ours, sampler(network, shape_or_noise, seeds=seeds, **arguments))
        again = loop(*([starts[k]] if given else []), seeds=seeds)  # the inputs of the last call
        assert torch.equal(again, ours)


def test_the_inputs_of_the_caller_are_not_written_to() -> None:
    sampler, kept, start = Sampler(V, "ddim", 2), inputs(0.3), torch.ones(SHAPE)
    loop = CapturedSampler(sampler, network, start, **kept)
    loop(torch.zeros(SHAPE), **inputs(0.7))
    assert torch.equal(start, torch.ones(SHAPE))
    assert torch.equal(kept["conditioning"]["shift"], inputs(0.3)["conditioning"]["shift"])


def test_what_does_not_fit_is_refused() -> None:
    sampler, shift = Sampler(V, "ddim", 2), torch.zeros(2, 1, 1, 1)
    with pytest.raises(TypeError, match="can be captured, got DPMAdaptive"):
        CapturedSampler(DPMAdaptive(V), network, SHAPE)  # type: ignore[arg-type]
    drawn = CapturedSampler(sampler, network, SHAPE, conditioning={"shift": shift, "names": "a"})
    given = CapturedSampler(sampler, network, torch.ones(SHAPE), conditioning={"shift": shift})
    for act, message in (
        (lambda: drawn(torch.ones(SHAPE)), "captured for a drawn start"),
        (lambda: given(), "captured for a given start"),
        (lambda: given(torch.ones(1, 3, 4, 4)), "noise must have the shape of the captured start"),
        (lambda: drawn(seeds=[1]), "need one seed for each of 2 images, got 1"),
        (lambda: drawn(conditioning={"shift": shift}), "conditioning is not what was captured"),
        (
            lambda: drawn(conditioning={"shift": shift, "names": "b"}),
            r"conditioning\['names'\] is not what was captured",
        ),
        (
            lambda: drawn(conditioning={"shift": shift[:1], "names": "a"}),
            r"conditioning\['shift'\] must have the shape of the captured one",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            act()


def test_what_a_graph_reads_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    """A call of the caller's sampler with another batch replaces the times that it keeps."""

    def once(body: Callable[[], Tensor]) -> tuple[Callable[[], Any], Tensor]:
        return lambda: None, body()  # as a graph: the function itself is dropped

    monkeypatch.setattr(captured, "_captured", once)
    read: list[weakref.ref[Tensor]] = []
    tensors = Times.tensors

    def watched(self: Times, *kind: Any) -> Any:
        made = tensors(self, *kind)
        assert self._kept is not None
        read.append(weakref.ref(self._kept.memory))
        return made

    monkeypatch.setattr(Times, "tensors", watched)
    sampler = Sampler(V, "ddim", 2)
    loop = CapturedSampler(sampler, network, SHAPE, **inputs(0.3))
    sampler(network, (3, 3, 4, 4), conditioning={"shift": 0.0})
    del sampler
    gc.collect()
    assert len(read) == 2 and read[0]() is not None
    assert loop().shape == SHAPE
