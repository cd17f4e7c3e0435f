"""Continuous batching: an image is the one of its own run, whatever else is in the batch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from counting import CountOperations
from torch import Tensor

from alphabar.noising import NoiseSchedule
from alphabar.sampling import METHODS, ContinuousBatch, DPMAdaptive, Sampler, fit_table

V = NoiseSchedule.scaled_linear(prediction="v_prediction")
SHAPE = (2, 3, 3)


def network(x: Tensor, t: Tensor, shift: Tensor | float = 0.0, scale: float = 1.3) -> Tensor:
    return torch.tanh(scale * x + 0.1 + shift) * (0.5 + t.view(-1, 1, 1, 1) / 2000)


def served(
    sampler: Any, requests: list[dict[str, Any]], slots: int = 3, **arguments: Any
) -> tuple[list[Tensor], list[int]]:
    """Return each request's sample, one added before every step, and the sizes of the batches."""
    sizes: list[int] = []

    def counted(x: Tensor, t: Tensor, **conditioning: Any) -> Tensor:
        sizes.append(len(x))
        return network(x, t, **conditioning)

    batch = ContinuousBatch(sampler, counted, slots, SHAPE, **arguments)
    waiting, names, done = list(requests), [], dict[int, Tensor]()
    while waiting or len(batch):
        if waiting and len(batch) < slots:
            names.append(batch.add(**waiting.pop(0)))
        done |= batch.step()
    assert batch.step() == {}
    return [done[name] for name in names], sizes


def near(ours: Tensor, alone: Tensor) -> bool:
    return bool((ours - alone).abs().max() <= 1e-6 * max(1.0, float(alone.abs().max())))


@pytest.mark.parametrize("name", METHODS)
def test_an_image_is_that_of_its_own_run(name: str) -> None:
    sampler = Sampler(V, name, 4)
    samples, sizes = served(sampler, [{"seed": seed} for seed in (5, 9, 2**64 - 1, 6)])
    for seed, ours in zip((5, 9, 2**64 - 1, 6), samples, strict=True):
        assert near(ours, sampler(network, (1, *SHAPE), seeds=[seed])[0]), seed
    evaluations = sampler.table.evaluations
    assert sum(sizes) == 4 * evaluations  # no call for an empty slot
    assert max(sizes) == min(3, evaluations)


@pytest.mark.parametrize("clip", [None, 0.3], ids=str)
@pytest.mark.parametrize("name", ["dpmpp_2s_ancestral_cfg_pp", "sa_solver", "ddim"])
def test_each_image_has_its_conditioning_guidance_and_clipping(
    name: str, clip: float | None
) -> None:
    sampler = Sampler(V, name, 4, **({"use_clipped_model_output": False} if name == "ddim" else {}))
    requests = [
        {
            "seed": seed,
            "conditioning": {"shift": torch.full((1, 1, 1, 1), 0.1 * seed), "scale": 1.1},
            "unconditional": {"shift": torch.full((1, 1, 1, 1), -0.2), "scale": 1.1},
        }
        for seed in range(4)
    ]
    arguments: dict[str, Any] = {"guidance_scale": 2.0, "guidance_rescale": 0.3, "clip": clip}
    samples, _ = served(sampler, requests, **arguments)
    for request, ours in zip(requests, samples, strict=True):
        given = {k: v for k, v in request.items() if k != "seed"} | arguments
        assert near(ours, sampler(network, (1, *SHAPE), seeds=[request["seed"]], **given)[0])


def test_brownian_paths_and_networks_in_half_precision() -> None:
    sampler = Sampler(V, "dpmpp_sde", 4)
    for arguments in ({"noise": "brownian"}, {"dtype": torch.bfloat16}):
        samples, _ = served(sampler, [{"seed": 0}, {"seed": 1}], **arguments)
        for seed, ours in enumerate(samples):
            alone = sampler(network, (1, *SHAPE), seeds=[seed], **arguments)[0]
            assert torch.allclose(ours, alone, rtol=0, atol=1e-6 if "noise" in arguments else 1e-2)


def test_an_image_that_diverges_leaves_the_others_alone() -> None:
    """Its slot is used again, and its numbers are gone."""

    def bursting(x: Tensor, t: Tensor, shift: Tensor) -> Tensor:
        return network(x, t) / shift

    sampler, one = Sampler(V, "dpmpp_2m", 3), torch.ones(1, 1, 1, 1)
    batch = ContinuousBatch(sampler, bursting, 1, SHAPE)
    for shift, finite in ((0.0, False), (1.0, True)):
        name = batch.add(3, {"shift": shift * one})
        done = batch.step() | batch.step() | batch.step()
        assert bool(done[name].isfinite().all()) == finite
    assert near(done[name], sampler(network, (1, *SHAPE), seeds=[3])[0])


def test_a_step_reads_nothing_and_costs_the_same_for_every_stand() -> None:
    batch = ContinuousBatch(Sampler(V, "unipc", 6), lambda x, t: x * 0.5, 4, SHAPE, device="meta")
    batch.add(0)
    batch.step()
    batch.add(1)
    with CountOperations() as counted:
        batch.step()
    assert counted.reads == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"seed": [1, 2]}, r"^seed must be an integer, got \[1, 2\]$"),
        ({"conditioning": {"shift": 1.0}}, "keys .* for one image"),
        ({"conditioning": {"scale": 1.1}}, r"^conditioning\['scale'\] cannot be joined: give"),
        ({"conditioning": {"scale": torch.ones(2)}}, r"^conditioning\['scale'\] cannot be joined"),
    ],
)
def test_a_bad_request_changes_nothing(arguments: dict[str, Any], message: str) -> None:
    sampler = Sampler(V, "euler_ancestral", 3)
    batch = ContinuousBatch(sampler, network, 2, SHAPE)
    name = batch.add(7, {"scale": 1.3})
    with pytest.raises(ValueError, match=message):
        batch.add(**arguments)
    done = batch.step() | batch.step() | batch.step()
    assert near(done[name], sampler(network, (1, *SHAPE), seeds=[7])[0])


def test_what_cannot_be_served() -> None:
    with pytest.raises(TypeError, match="needs a Sampler with a table, got DPMAdaptive"):
        ContinuousBatch(DPMAdaptive(V), network, 2, SHAPE)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"^slots must be an integer of at least 1, got 0$"):
        ContinuousBatch(Sampler(V, "ddim", 2), network, 0, SHAPE)
    batch = ContinuousBatch(Sampler(V, "ddim", 2), network, 1, SHAPE)
    batch.add()
    with pytest.raises(ValueError, match=r"^the batch is full: its 1 slots hold an image each$"):
        batch.add()
    guided = ContinuousBatch(Sampler(V, "ddim", 2), network, 1, SHAPE, guidance_scale=3.0)
    with pytest.raises(ValueError, match=r"^guidance_scale=3.0 needs unconditional=\.\.\., "):
        guided.add()
    wrong = ContinuousBatch(Sampler(V, "ddim", 2), lambda x, t: x[:, :1], 1, SHAPE)
    wrong.add()
    with pytest.raises(ValueError, match=r"^the network's output must have the shape of its input"):
        wrong.step()


def test_a_fitted_table_keeps_its_guidance() -> None:
    table = fit_table(lambda x, t: torch.tanh(x), V, 2, shape=(8,), seeds=16)
    with pytest.raises(ValueError, match="the table was fitted with"):
        ContinuousBatch(Sampler.from_table(table), network, 1, (8,), guidance_scale=3.0)
