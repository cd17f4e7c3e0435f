"""torch.compile without a break of the graph and torch.func.vmap: schedules, conversions, and a
whole training step.
"""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.utils import counters

from alphabar.noising import (
    LOSSES,
    NOISES,
    WEIGHTINGS,
    Curve,
    InputPerturbation,
    LogitNormalTimesteps,
    NoiseSchedule,
    Noising,
    Offset,
    UniformTimesteps,
    WeightedTimesteps,
)
from alphabar.noising.curves.base import may_look_at
from alphabar.noising.utils.rng import Draws
from oracles import SCHEDULES

EVERY = {
    **SCHEDULES,
    "karras": NoiseSchedule.karras(),
    "vp": NoiseSchedule.variance_preserving(),
    "sub_vp": NoiseSchedule.sub_variance_preserving(),
    "ve": NoiseSchedule.variance_exploding(),
    "cosine": NoiseSchedule.cosine(),
    "part": NoiseSchedule.flow().truncated(t_max=0.5),
    "discrete part": NoiseSchedule.scaled_linear().truncated(t_max=199),
}
ZTSNR, FLOW = SCHEDULES["ztsnr"], SCHEDULES["flow"]
each_schedule = pytest.mark.parametrize("name", EVERY)


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def compiled(function: Callable[..., Any], backend: str = "eager") -> Callable[..., Any]:
    return torch.compile(function, fullgraph=True, backend=backend)


def batch(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape or (4, 3, 4, 5), generator=torch.Generator().manual_seed(seed))


def times(curve: Curve) -> Tensor:
    t = curve.t_min + (curve.t_max - curve.t_min) * torch.tensor([0.05, 0.3, 0.6, 1.0])
    return t.floor().long() if curve.is_discrete else t


@each_schedule
def test_every_function_of_a_schedule_compiles(name: str) -> None:
    schedule = EVERY[name]
    x0, noise, t = batch(0), batch(1), times(schedule.curve)

    def everything(x0: Tensor, noise: Tensor, t: Tensor) -> list[Tensor]:
        x_t, out = schedule.add_noise(x0, noise, t), schedule.target(x0, noise, t)
        back = [
            schedule.to_x0(out, x_t, t),
            schedule.to_epsilon(out, x_t, t),
            schedule.convert(out, x_t, t, "sample"),
        ]
        log_snr = schedule.log_snr(t).clamp(-20, 20)
        return [
            x_t,
            out,
            *back,
            log_snr,
            schedule.snr(t),
            schedule.sigma_ve(t),
            schedule.time(log_snr),
        ]

    torch.testing.assert_close(compiled(everything)(x0, noise, t), everything(x0, noise, t))
    assert counters["stats"]["unique_graphs"] == 1


@each_schedule
def test_vmap_over_times(name: str) -> None:
    schedule = EVERY[name]
    t = times(schedule.curve)
    for function in (
        schedule.alpha,
        schedule.sigma,
        schedule.log_snr,
        schedule.snr,
        schedule.curve.timestep,
    ):
        torch.testing.assert_close(torch.vmap(function)(t), function(t))
    log_snr = schedule.log_snr(t).clamp(-20, 20)
    torch.testing.assert_close(torch.vmap(schedule.time)(log_snr), schedule.time(log_snr))
    if not schedule.curve.is_discrete:
        slope = torch.vmap(torch.func.grad(schedule.alpha))(t[:-1])
        assert bool(slope.isfinite().all())


@each_schedule
def test_eager_times_on_the_cpu_are_still_checked(name: str) -> None:
    schedule = EVERY[name]
    t = times(schedule.curve)
    compiled(schedule.alpha)(t)
    t[0] = int(schedule.curve.t_max) + 1
    for function in (schedule.alpha, schedule.sigma):
        with pytest.raises(ValueError, match="is outside"):
            function(t)


def test_a_compiled_function_takes_another_schedule() -> None:
    """The tables of a discrete curve are inputs of the graph: no other curve's, and no constants."""
    others = [
        NoiseSchedule.linear(),
        NoiseSchedule.scaled_linear(),
        NoiseSchedule.linear(0.001, 0.03),
    ]
    x0, noise, t = batch(0), batch(1), times(others[0].curve)
    function = compiled(lambda schedule, *rest: schedule.add_noise(*rest))
    for schedule in [*others, *others]:
        assert torch.equal(function(schedule, x0, noise, t), schedule.add_noise(x0, noise, t))


def test_tables_do_not_travel_with_a_curve() -> None:
    curve = ZTSNR.curve
    curve.alpha(torch.tensor(3))
    assert len(pickle.dumps(curve)) < 1000
    for other in (copy.deepcopy(curve), pickle.loads(pickle.dumps(curve))):
        assert other == curve and hash(other) == hash(curve)
        assert torch.equal(other.alpha(torch.arange(1000)), curve.alpha(torch.arange(1000)))


def test_what_may_be_looked_at() -> None:
    assert may_look_at(torch.zeros(1)) and not may_look_at(torch.zeros(1, device="meta"))
    seen: list[bool] = []
    torch.vmap(lambda t: (seen.append(may_look_at(t)), t)[1])(torch.zeros(2))
    assert seen == [False]
    assert compiled(lambda t: t + may_look_at(t))(torch.zeros(1)) == 0


# a training step


def training_step(noising: Noising, network: torch.nn.Module) -> Callable[[Tensor, int], Tensor]:
    def step(x0: Tensor, step: int) -> Tensor:
        noised = noising(x0, step=step)
        return noised.loss(network(noised.x))

    return step


@pytest.mark.slow
@pytest.mark.parametrize("name", ["ztsnr", "flow", "scaled_linear", "karras"])
def test_a_whole_training_step_compiles_once_for_all_steps(name: str) -> None:
    network = torch.nn.Conv2d(3, 3, 1)
    step = training_step(
        Noising(EVERY[name], noise="offset", timesteps="stratified", weighting="min_snr"), network
    )
    fast = compiled(step)
    for k in (0, 1, 2, 3, 1000, 2**31):
        ours, theirs = fast(batch(k), k), step(batch(k), k)
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=0)
        (grad,) = torch.autograd.grad(ours, [network.weight])
        torch.testing.assert_close(
            grad, torch.autograd.grad(theirs, [network.weight])[0], rtol=1e-4, atol=1e-6
        )
    assert counters["stats"]["unique_graphs"] == 2  # the first step as a constant, then any
    with pytest.raises(ValueError, match=r"^the step must lie in 0 \.\.\. 2\^32 - 1"):
        step(batch(0), 2**32)


def test_a_training_step_is_one_graph_for_all_batches_sizes_and_steps() -> None:
    """With ``dynamic=True``; also where the same step runs without the compiler in between, which
    makes tables.
    """
    network = torch.nn.Conv2d(3, 3, 1)
    noising = Noising(NoiseSchedule.linear(), weighting="min_snr")

    def step(x0: Tensor, step: int) -> tuple[Tensor, Tensor, Tensor]:
        noised = noising(x0, step=step)
        return noised.loss(network(noised.x)), noised.noise, noised.t

    fast = torch.compile(step, fullgraph=True, backend="eager", dynamic=True)
    for k, shape in (
        (0, (4, 3, 6, 10)),
        (1, (6, 3, 8, 8)),
        (7, (2, 3, 4, 6)),
        (2**31, (5, 3, 8, 4)),
    ):
        x0 = batch(k % 97, *shape)
        (ours, noise, t), (theirs, *exact) = fast(x0, k), step(x0, k)
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=0)
        torch.testing.assert_close(noise, exact[0], rtol=3e-7, atol=0)
        assert torch.equal(t, exact[1])
        (grad,) = torch.autograd.grad(ours, [network.weight])
        expected = torch.autograd.grad(theirs, [network.weight])[0]
        torch.testing.assert_close(grad, expected, rtol=1e-4, atol=1e-6)
    assert counters["stats"]["unique_graphs"] == 1


@pytest.mark.slow
def test_a_whole_training_step_by_aot_autograd() -> None:
    step = training_step(Noising(FLOW), torch.nn.Conv2d(3, 3, 1))
    torch.testing.assert_close(
        compiled(step, "aot_eager")(batch(0), 3), step(batch(0), 3), rtol=1e-5, atol=0
    )


DENSITIES = {
    "logit_normal": LogitNormalTimesteps(),
    "within": LogitNormalTimesteps().within(10, 500),
    "weighted": WeightedTimesteps(weights=(1.0, 2.0, 0.0)),
    "reversed": LogitNormalTimesteps(mean=1.0).reversed(),
    "uniform within": UniformTimesteps().within(10, 500),
}


@pytest.mark.parametrize("name", DENSITIES)
def test_densities_compile(name: str) -> None:
    """Beta densities and importance sampling do not: their quantiles are found by iteration, and by
    what was measured.
    """
    density, u = DENSITIES[name], Draws(0, range(8), step=0, stream=0).uniform(dtype=torch.float64)
    density.check(ZTSNR.curve)  # as Noising does
    torch.testing.assert_close(
        compiled(density.times)(u, ZTSNR.curve), density.times(u, ZTSNR.curve)
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    "kind",
    [
        *(make() for name, make in NOISES.items() if name != "gaussian" and not make.batch_wide),
        Offset(0.1, random_strength=True, probability=0.5),
        InputPerturbation(decay_steps=3),
    ],
    ids=str,
)
def test_kinds_of_noise_compile(kind: Any) -> None:
    def draw(index: Tensor, step: int) -> Tensor:
        return kind.draw((3, 8, 6), Draws(3, index, step=step, stream=9))

    torch.testing.assert_close(compiled(draw)(torch.arange(4), 1), draw(torch.arange(4), 1))


SETTINGS = [*({"weighting": name} for name in WEIGHTINGS), *({"loss": name} for name in LOSSES)]
OFTEN = [
    {"weighting": "min_snr"},
    {"weighting": "per_range"},
    {"weighting": "learned_uncertainty"},
    {"loss": "pseudo_huber"},
]


@pytest.mark.filterwarnings("ignore:weighting .* is 0 at t")
@pytest.mark.parametrize(
    "settings",
    [*OFTEN, *(pytest.param(one, marks=pytest.mark.slow) for one in SETTINGS if one not in OFTEN)],
    ids=str,
)
def test_weights_and_losses_compile(settings: dict[str, Any]) -> None:
    """With a mask, whose values an eager call checks; also how to compile what is drawn outside:
    ``noising.at``.
    """
    noising, mask = (
        Noising(ZTSNR.with_prediction("v_prediction"), **settings),
        torch.ones(4, 1, 4, 5),
    )

    def losses(x0: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        return noising.at(x0, t, noise).losses(x0, mask, over="mask")

    arguments = batch(0), torch.tensor([1, 500, 900, 998]), batch(1)
    torch.testing.assert_close(compiled(losses)(*arguments), losses(*arguments))
