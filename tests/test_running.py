"""What all samplers share: their arguments, seeds, the times that a network is given, and the
halves of guidance.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode

from alphabar.noising import NoiseSchedule
from alphabar.sampling import Sampler
from alphabar.sampling.inference import SeededNoise, checked_shape
from alphabar.sampling.standalone.adaptive import DPMAdaptive
from alphabar.sampling.standalone.langevin import PredictorCorrector
from alphabar.sampling.standalone.learned_variance import LearnedVariance
from alphabar.sampling.standalone.repaint import RePaint
from alphabar.sampling.tracing import Evaluation

V = NoiseSchedule.scaled_linear(prediction="v_prediction")
SHAPE = (2, 3, 4, 4)
REPAINT = {"known": torch.zeros(1, 3, 4, 4), "mask": torch.zeros(1, 1, 1, 1)}
SAMPLERS: dict[str, tuple[Any, dict[str, Any]]] = {
    "table": (Sampler(V, "euler_ancestral", 5), {}),
    "adaptive": (DPMAdaptive(V, eta=0.5), {}),
    "predictor_corrector": (PredictorCorrector(V, 5), {}),
    "repaint": (RePaint(V, 5, 1, 2), REPAINT),
    "learned_variance": (LearnedVariance(V, 5), {}),
}


def smooth(x: Tensor, t: Tensor, shift: float | Tensor = 0.0) -> Tensor:
    return torch.tanh(1.3 * x + 0.1 + shift) * (0.5 + t.view(-1, 1, 1, 1) / 2000)


def network_for(name: str, network: Any = smooth) -> Any:
    """The network, with a second half where a sampler wants one."""
    if name != "learned_variance":
        return network

    def double(x: Tensor, t: Tensor, **conditioning: Any) -> Tensor:
        out = network(x, t, **conditioning)
        return torch.cat([out, torch.cos(out)], 1)

    return double


def drawn(
    name: str, shape: tuple[int, ...] = SHAPE, network: Any = smooth, **arguments: Any
) -> Tensor:
    sampler, further = SAMPLERS[name]
    further = {key: value.expand(shape[0], *value.shape[1:]) for key, value in further.items()}
    return sampler(network_for(name, network), shape, **further, **arguments)


@pytest.mark.parametrize("name", SAMPLERS)
def test_the_same_seeds_give_the_same_images(name: str) -> None:
    torch.manual_seed(0)
    before = torch.get_rng_state()
    a, b, c = (drawn(name, seeds=seeds) for seeds in (3, [3, 4], [3, 5]))
    assert torch.equal(a, b)
    assert not torch.equal(a[1], c[1])
    assert not torch.equal(drawn(name), drawn(name))
    assert torch.equal(torch.get_rng_state(), before)
    assert a.dtype == torch.float32


@pytest.mark.parametrize("name", [name for name in SAMPLERS if name != "adaptive"])
def test_an_image_does_not_depend_on_its_batch(name: str) -> None:
    assert torch.allclose(
        drawn(name, (1, 3, 4, 4), seeds=4)[0], drawn(name, seeds=3)[1], rtol=0, atol=1e-6
    )


@pytest.mark.parametrize("name", SAMPLERS)
def test_no_gradients_and_no_leak_of_that_mode(name: str) -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.ones(1, dtype=torch.bfloat16))
            self.seen: set[Any] = set()

        def forward(self, x: Tensor, t: Tensor) -> Tensor:
            self.seen |= {x.dtype, torch.is_grad_enabled()}
            return network_for(name)(self.scale * x, t)

    sampler, further = SAMPLERS[name]
    network = Scaled()
    further = {key: value.expand(2, *value.shape[1:]) for key, value in further.items()}
    start = torch.randn(SHAPE, generator=torch.Generator().manual_seed(0), requires_grad=True)
    steps = sampler.iterate(network, start, seeds=0, **further)
    assert not next(steps).x.requires_grad
    assert torch.is_grad_enabled()
    steps.close()
    assert torch.is_grad_enabled()
    assert network.seen == {torch.bfloat16, False}


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize(
    ("shape", "arguments", "message"),
    [
        ((2,), {}, r"^the shape must be \(batch, ...\) of positive integers, got \(2,\)$"),
        (
            (2, 0, 3, 3),
            {},
            r"^the shape must be \(batch, ...\) of positive integers, got \(2, 0, 3, 3\)$",
        ),
        (SHAPE, {"seeds": [1, 2, 3]}, r"^need one seed for each of 2 images, got 3$"),
        (SHAPE, {"guidance_scale": 3.0}, r"^guidance_scale=3.0 needs unconditional=..., "),
        (SHAPE, {"clip": -1.0}, r"^clip must be a positive limit of \|x_0\|, got -1.0; "),
    ],
)
def test_bad_arguments_fail_at_the_call(
    name: str, shape: Any, arguments: dict[str, Any], message: str
) -> None:
    sampler, further = SAMPLERS[name]
    with pytest.raises(ValueError, match=message):
        sampler.iterate(network_for(name), shape, **further, **arguments)  # not even begun


# see its own tests
@pytest.mark.parametrize("name", [name for name in SAMPLERS if name != "learned_variance"])
def test_guidance_is_sampling_with_the_guided_network(name: str) -> None:
    def mixed(x: Tensor, t: Tensor) -> Tensor:
        return torch.lerp(smooth(x, t, -0.2), smooth(x, t, 0.3), 3.0)

    arguments = {
        "conditioning": {"shift": torch.full((2, 1, 1, 1), 0.3)},
        "unconditional": {"shift": torch.full((2, 1, 1, 1), -0.2)},
    }
    guided = drawn(name, seeds=1, guidance_scale=3.0, **arguments)
    assert torch.allclose(guided, drawn(name, network=mixed, seeds=1), rtol=1e-4, atol=1e-5)


# what the network is given


@pytest.mark.parametrize("method", ["dpm_2", "dpmpp_sde"])
def test_times_between_timesteps_are_not_cut_off(method: str) -> None:
    seen: list[float] = []

    def network(x: Tensor, t: Tensor) -> Tensor:
        assert t.dtype == torch.float32
        seen.append(float(t[0]))
        return smooth(x, t)

    sampler = Sampler(V, method, 5)
    sampler(network, SHAPE, seeds=0)
    knots = [
        op.knot for step in sampler.table.steps for op in step.ops if isinstance(op, Evaluation)
    ]
    assert seen == pytest.approx([knot.timestep for knot in knots], rel=1e-6)
    assert any(time % 1 for time in seen)


def test_whole_times_stay_whole() -> None:
    def network(x: Tensor, t: Tensor) -> Tensor:
        assert t.dtype == torch.int64
        return smooth(x, t)

    Sampler(V, "dpmpp_2m", 5)(network, SHAPE, seeds=0)


# CFG++


def test_cfg_plus_plus_goes_along_the_unconditional_noise() -> None:
    arguments = {
        "conditioning": {"shift": torch.full((2, 1, 1, 1), 0.3)},
        "unconditional": {"shift": torch.full((2, 1, 1, 1), -0.2)},
    }
    start = torch.randn(SHAPE, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    sampler = Sampler(V, "ddim_cfg_pp", 4)
    ours = sampler(smooth, start, guidance_scale=0.6, **arguments)
    x = start
    for s, n in zip(sampler.knots, sampler.knots[1:], strict=False):  # 2406.08070, algorithm 2
        t = torch.full((2,), int(s.timestep))
        with_, without = smooth(x, t, 0.3), smooth(x, t, -0.2)
        D = V.prediction.to_x0(torch.lerp(without, with_, 0.6), x, s.alpha, s.sigma)
        x = n.alpha * D + n.sigma * V.prediction.to_epsilon(without, x, s.alpha, s.sigma)
    assert torch.allclose(ours, x, rtol=0, atol=1e-6)
    plain = Sampler(V, "ddim", 4)(smooth, start, guidance_scale=0.6, **arguments)
    assert not torch.allclose(ours, plain, atol=1e-2)


@pytest.mark.parametrize("clip", [None, 0.5])
def test_cfg_plus_plus_without_guidance_is_ddim(clip: float | None) -> None:
    ours, ddim = (
        Sampler(V, method, 4)(smooth, SHAPE, seeds=0, clip=clip)
        for method in ("ddim_cfg_pp", "ddim")
    )
    assert torch.allclose(ours, ddim, rtol=0, atol=1e-5)


# noise


def draws_of(shape: tuple[int, ...], seeds: Any) -> list[Tensor]:
    noise = SeededNoise(shape, seeds, torch.device("cpu"))
    return [noise(), noise.uniform(4, 2), noise()]


def test_an_image_is_told_by_its_seed_alone() -> None:
    batch = draws_of((3, 2, 5), [5, 6, 7])
    for i, seed in enumerate((5, 6, 7)):
        for drawn, alone in zip(batch, draws_of((1, 2, 5), seed), strict=True):
            assert torch.equal(drawn[i], alone[0])
    assert not torch.equal(batch[0], batch[2])  # another draw
    # counted up
    assert all(torch.equal(a, b) for a, b in zip(batch, draws_of((3, 2, 5), 5), strict=True))


SEEDS = {
    "numpy": (np.int64(5), 5),
    "numpy array": (np.array([5, 6, 7], dtype=np.uint8), 5),
    "tensor": (torch.tensor([5, 6, 7]), 5),
    "scalar tensor": (torch.tensor(5), 5),
    "negative": (-1, [2**64 - 1, 0, 1]),  # as torch has it, and counted up over the end
    "tuple": ((2**64 - 1, -(2**63), 0), [2**64 - 1, 2**63, 0]),
}


@pytest.mark.parametrize("name", SEEDS)
def test_what_is_an_integer_is_a_seed(name: str) -> None:
    given, same = SEEDS[name]
    assert all(
        torch.equal(a, b)
        for a, b in zip(draws_of((3, 2), given), draws_of((3, 2), same), strict=True)
    )


@pytest.mark.parametrize("seed", [True, np.True_, 1.0, "1", [1, 2.5, 3], [True, 1, 2]])
def test_what_is_no_integer_is_no_seed(seed: Any) -> None:
    with pytest.raises(
        (TypeError, ValueError), match=r"^a seed must be an integer, got |^need one seed for each"
    ):
        draws_of((3, 2), seed)


@pytest.mark.parametrize("seed", [2**64, -(2**63) - 1, [0, 1, 2**64]])
def test_seeds_of_more_than_64_bits(seed: Any) -> None:
    with pytest.raises(ValueError, match=r"^a seed has 64 bits, -2\^63 \.\.\. 2\^64 - 1, got "):
        draws_of((3, 2), seed)


def test_all_64_bits_of_a_seed_count() -> None:
    seen = [draws_of((1, 8), 5 + (1 << bit)) for bit in range(64)] + [draws_of((1, 8), 5)]
    for drawn in zip(*seen, strict=True):
        assert len({values.numpy().tobytes() for values in drawn}) == 65


def test_shapes_of_numpy_integers() -> None:
    assert checked_shape(np.array([2, 3])) == checked_shape((np.int32(2), 3)) == (2, 3)
    for shape in ((2, True), (2, np.int64(0)), (2, 3.0)):
        with pytest.raises(
            ValueError, match=r"^the shape must be \(batch, \.\.\.\) of positive integers, got "
        ):
            checked_shape(shape)


def test_a_network_may_change_its_time() -> None:
    """Heun's method calls the network twice at most timesteps."""
    sampler, seen = Sampler(NoiseSchedule.linear(), "heun", 4), list[float]()

    def network(x: Tensor, t: Tensor) -> Tensor:
        seen.append(float(t[0]))
        t.mul_(0)
        return 0.1 * x

    sampler(network, (2, 3), seeds=0)
    assert len(seen) == 7 and 0.0 not in seen[:-1]
    with torch.inference_mode():
        sampler(network, (2, 3), seeds=0)
    sampler(network, (2, 3), seeds=0)
    assert seen == 3 * seen[:7]  # tensors that are kept for the next run are not those


def test_runs_of_one_sampler_may_be_interleaved() -> None:
    """They share the kept times, of which a network may change one."""
    sampler, seen = Sampler(NoiseSchedule.linear(), "ddim", 3), list[float]()

    def network(x: Tensor, t: Tensor) -> Tensor:
        seen.append(float(t[0]))
        t.add_(1000)
        return 0.1 * x

    runs = [sampler.iterate(network, (2, 3), seeds=0) for _ in range(2)]
    for _ in zip(*runs, strict=True):
        pass
    assert seen[::2] == seen[1::2] == sampler.timesteps


@pytest.mark.parametrize("write", ["data", "numpy"])
def test_times_written_past_autograd_do_not_reach_the_next_run(write: str) -> None:
    sampler, seen = Sampler(V, "heun", 3), list[float]()

    def network(x: Tensor, t: Tensor) -> Tensor:
        seen.append(float(t[0]))
        if write == "data":
            t.data.zero_()
        else:
            t.numpy()[:] = 0
        return 0.1 * x

    for _ in range(2):
        sampler(network, (2, 3), seeds=0)
    assert seen[:5] == seen[5:] and 0.0 not in seen[:4]


@pytest.mark.parametrize("name", ["table", "adaptive", "predictor_corrector"])
def test_a_network_that_changes_its_input_is_refused(name: str) -> None:
    def network(x: Tensor, t: Tensor) -> Tensor:
        x.mul_(0.5)
        return x.tanh()

    with pytest.raises(ValueError, match=r"^the network changes its input in place, .*clone\(\)$"):
        drawn(name, network=network, seeds=0)


def test_a_network_may_change_a_copy_of_its_input() -> None:
    """In half precision it gets one; so it does with guidance."""

    def network(x: Tensor, t: Tensor, shift: Any = 0.0) -> Tensor:
        return x.mul_(0.5) + shift

    def clean(x: Tensor, t: Tensor, shift: Any = 0.0) -> Tensor:
        return network(x.clone(), t, shift)

    half: dict[str, Any] = {"dtype": torch.bfloat16}
    rows = {"shift": torch.ones(2, 1, 1, 1)}
    guided = {"conditioning": rows, "unconditional": rows, "guidance_scale": 2.0}
    for arguments in (half, guided):
        one, other = (drawn("table", network=n, seeds=0, **arguments) for n in (network, clean))
        assert torch.equal(one, other)
    with torch.inference_mode():
        drawn("table", network=clean, seeds=0)


@pytest.mark.parametrize("warm", [False, True])
def test_fake_tensors_and_vmap(warm: bool) -> None:
    """They have no address to read, and what a run with them makes is not kept."""
    sampler, exact = Sampler(V, "dpmpp_2m", 3), Sampler(V, "dpmpp_2m", 3)
    start = torch.randn(3, *SHAPE, generator=torch.Generator().manual_seed(0))
    if warm:
        sampler(smooth, start[0])
    with FakeTensorMode():
        made = sampler(smooth, torch.empty(SHAPE))
    assert made.shape == SHAPE and type(made) is not Tensor
    each = [exact(smooth, one) for one in start]
    assert torch.equal(sampler(smooth, start[0]), each[0])
    mapped = torch.vmap(lambda z: sampler(smooth, z))(start)
    assert torch.allclose(mapped, torch.stack(each), rtol=0, atol=1e-5)
    assert torch.equal(sampler(smooth, start[1]), each[1])


def test_a_compiled_run_is_the_run() -> None:
    sampler, start = Sampler(V, "dpmpp_2m", 3), torch.randn(SHAPE)
    torch.compiler.reset()
    compiled = torch.compile(lambda z: sampler(smooth, z), backend="eager")
    assert torch.allclose(compiled(start), sampler(smooth, start), rtol=0, atol=1e-6)


def test_a_default_device_changes_nothing() -> None:
    expected = Sampler(V, "dpmpp_2m", 3)(smooth, SHAPE, seeds=0)
    with torch.device("meta"):
        assert torch.equal(Sampler(V, "dpmpp_2m", 3)(smooth, SHAPE, seeds=0), expected)
