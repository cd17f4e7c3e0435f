"""The sampler: names, seeds, what the network is given, guidance, and that it leaves its
surroundings alone.
"""

from __future__ import annotations

import math
import pickle
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import diffusers
import pytest
import torch
from torch import Tensor, nn

from all_pairs import all_pairs
from alphabar.noising import NoiseSchedule
from alphabar.sampling import METHODS, Knot, Method, Sampler, guide, resolve_method
from alphabar.sampling.inference import SeededNoise
from alphabar.sampling.interop.diffusers_classes import CLASSES
from alphabar.sampling.kernel import combine, run
from oracles import SCHEDULES, allowed

SHAPE = (3, 2, 4)
V = SCHEDULES["scaled_linear"].with_prediction("v_prediction")
ZTSNR, FLOW = SCHEDULES["ztsnr"], SCHEDULES["flow"]
# one of each kind: test_methods_order.py and the agreement tests run over the whole registry
KINDS = [
    "ddim",
    "ddpm",
    "euler",
    "euler_ancestral",
    "heun",
    "dpmpp_2m",
    "dpmpp_2m_sde",
    "unipc",
    "lms",
    "deis",
    "res_multistep",
]
each_method = pytest.mark.parametrize("method", KINDS)


def smooth(x: Tensor, t: Tensor, **_: Any) -> Tensor:
    """A network that works element by element, so that a batch is exactly its images."""
    return torch.tanh(1.3 * x + 0.1) * (0.5 + t.view(-1, *[1] * (x.ndim - 1)) / 2000)


def perfect(schedule: NoiseSchedule, x0: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
    """The network that knows x_0, and of the noise level only the time that it is given."""

    def network(x: Tensor, timesteps: Tensor) -> Tensor:
        if schedule.curve.is_discrete:
            alpha, sigma = schedule.alpha(timesteps.double()), schedule.sigma(timesteps.double())
        else:  # a flow's network is given 1000 σ
            sigma = timesteps.double() / 1000
            alpha = 1 - sigma
        alpha, sigma = (level.view(-1, *[1] * (x.ndim - 1)) for level in (alpha, sigma))
        return schedule.prediction.combine(x0, (x - alpha * x0) / sigma, alpha, sigma)

    return network


def noise_of(*seeds: int) -> Tensor:
    return SeededNoise((len(seeds), *SHAPE[1:]), seeds, torch.device("cpu"))()


# names


@pytest.mark.parametrize(
    ("name", "method", "grid"),
    [
        ("DPM++ 2M Karras", "dpmpp_2m", "karras"),
        ("dpmpp_2m", "dpmpp_2m", "trailing"),
        ("dpmpp_2m_karras", "dpmpp_2m", "karras"),
        ("DPM++ 2M", "dpmpp_2m", "trailing"),
        ("DPMSolverMultistepScheduler", "dpm_solver_multistep", "linspace"),
        ("Euler a", "euler_ancestral", "trailing"),
        ("EULER A KARRAS", "euler_ancestral", "karras"),
        ("euler-ancestral", "euler_ancestral", "trailing"),
        ("EulerAncestralDiscreteScheduler", "euler_ancestral", "linspace"),
        ("Euler", "euler", "trailing"),
        ("Heun Karras", "heun", "karras"),
        ("DDIM", "ddim", "trailing"),
        (" ddpm ", "ddpm", "trailing"),
    ],
)
def test_names_of_the_field(name: str, method: str, grid: str) -> None:
    sampler = Sampler(V, name, 5)
    assert sampler.method is METHODS[method]
    assert sampler.grid == grid
    of_class = {
        "DPMSolverMultistepScheduler": {"rounded": True, "drop_last": True},
        "EulerAncestralDiscreteScheduler": {"interpolation": "sigma", "init_noise": "sigma"},
    }
    assert sampler == Sampler(V, METHODS[method], 5, grid, **of_class.get(name, {}))


def test_every_name_is_one_method_s() -> None:
    names = [
        (name, method) for method in METHODS.values() for name in (method.name, *method.aliases)
    ]
    for name, method in names:
        assert resolve_method(name)[0] is method
    for name, method in METHODS.items():
        assert method.name == name
        assert resolve_method(method) == (method, {})


def test_a_grid_that_is_said_outranks_the_name_s() -> None:
    assert (
        Sampler(V, "DPM++ 2M Karras", 5, "leading").timesteps
        == Sampler(V, "dpmpp_2m", 5, "leading").timesteps
    )


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        (("dpm2m",), {}, "unknown method 'dpm2m'; did you mean 'DPM2', 'DPM++ 2M' or 'DPM2 a'?"),
        (
            ("Eular a",),
            {},
            "unknown method 'Eular a'; did you mean 'Euler a', 'Euler' or 'Euler a CFG++'?",
        ),
        (
            ("EulerDiscreteSheduler",),
            {},
            "unknown method 'EulerDiscreteSheduler'; did you mean 'EulerDiscreteScheduler', "
            "'HeunDiscreteScheduler' "
            "or 'LMSDiscreteScheduler'?",
        ),
        (("ddim", 20, "trialing"), {}, "unknown grid 'trialing'; did you mean 'trailing'?"),
        (
            ("ddim", 20),
            {"etta": 1.0},
            "unknown option of ddim on the trailing grid 'etta'; did you mean 'eta'?",
        ),
        (("heun", 0), {}, "steps must be between 1 and the 1000 training timesteps, got 0"),
    ],
)
def test_what_is_unknown_is_refused(
    arguments: tuple[Any, ...], options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError) as caught:
        Sampler(V, *arguments, **options)
    assert str(caught.value) == message


def test_unknown_method_without_a_near_one() -> None:
    with pytest.raises(ValueError, match=r"^unknown method 7; known: .*dpmpp_2m"):
        Sampler(V, 7)


def test_a_curve_is_no_schedule() -> None:
    with pytest.raises(
        TypeError,
        match=r"^schedule must be a NoiseSchedule, got Discrete; e\.g\. NoiseSchedule\.scaled_linear\(\)$",
    ):
        Sampler(V.curve)


# what comes out


# tcd and lcm end with c_skip x, or the first timestep's noise; the weights of an even grid make
# rounding of a steep one
LEFT_OUT = ("tcd", "lcm", "plms", "ipndm")


ENDING = [m.name for m in METHODS.values() if not m.inverse and m.name not in LEFT_OUT]
FROM_NOISE = [
    schedule
    for name in ("ztsnr", "shifted_ztsnr", "flow")
    for schedule in allowed(SCHEDULES[name])
    if schedule.prediction.name
    != "consistency"  # of EDM's σ; its D is x itself at the least noise, and not defined below
]
ENDS = all_pairs(ENDING, FROM_NOISE, ["linspace", "leading", "trailing", "karras"])


@pytest.mark.parametrize("method", ENDING)
def test_a_network_that_knows_the_data_ends_there(method: str) -> None:
    """Finite, and right, from α = 0 on: through the public face, in float32, for every prediction
    that is well-posed.
    """
    x0 = torch.linspace(-1, 1, math.prod(SHAPE)).view(SHAPE)
    for _, schedule, grid in (row for row in ENDS if row[0] == method):
        sampler = Sampler(schedule, method, 8, grid)
        if grid != "leading":
            assert sampler.knots[0].alpha == 0.0
        out = sampler(perfect(schedule, x0), SHAPE, seeds=0)
        assert torch.allclose(out, x0, rtol=0, atol=2e-4), (schedule, grid)


@each_method
def test_denoised_is_the_estimate_of_the_step(method: str) -> None:
    x0 = torch.linspace(-1, 1, math.prod(SHAPE), dtype=torch.float64).view(SHAPE)
    start = noise_of(0, 1, 2).double()
    for schedule in (V, SCHEDULES["scaled_linear"], FLOW):
        steps = list(Sampler(schedule, method, 6).iterate(perfect(schedule, x0), start, seeds=0))
        for progress in steps:
            assert torch.allclose(progress.denoised, x0, rtol=0, atol=1e-9)
        assert not torch.allclose(steps[2].x, x0, atol=1e-2)
        assert torch.allclose(steps[-1].x, x0, rtol=0, atol=1e-9)
    sampler = Sampler(V.with_prediction("sample"), method, 4)
    estimates: list[Tensor] = []

    def network(x: Tensor, t: Tensor) -> Tensor:
        estimates.append(smooth(x, t))
        return estimates[-1]

    for progress in sampler.iterate(network, start, seeds=0):
        # made of the x that the step started from
        assert torch.equal(progress.denoised, estimates[0])
        estimates.clear()


@each_method
def test_iterate_counts_and_ends_where_the_call_does(method: str) -> None:
    sampler = Sampler(V, method, 5)
    steps = list(sampler.iterate(smooth, SHAPE, seeds=1))
    assert [(progress.step, progress.steps) for progress in steps] == [(i, 5) for i in range(1, 6)]
    assert torch.equal(steps[-1].x, sampler(smooth, SHAPE, seeds=1))


@each_method
def test_evaluations_are_those_of_the_table(method: str) -> None:
    for steps in (1, 2, 7):
        for schedule in (V, ZTSNR):
            sampler, times = Sampler(schedule, method, steps), []

            def network(x: Tensor, t: Tensor, times: list[float] = times) -> Tensor:
                times.append(float(t[0]))
                return smooth(x, t)

            sampler(network, SHAPE, seeds=0)
            assert len(times) == sampler.table.evaluations
            assert sorted(set(times), reverse=True) == sampler.timesteps
            assert steps <= len(times) <= steps * sampler.method.evaluations


def test_heun_evaluates_twice_but_for_the_last_step() -> None:
    assert Sampler(V, "heun", 10).table.evaluations == 19
    assert Sampler(ZTSNR, "heun", 10).table.evaluations == 18  # nor the first from α = 0


def test_start_has_the_spread_of_the_first_knot() -> None:
    """Data of unit variance have sqrt(α² + σ²) there, less than 1 on a flow that does not start at
    pure noise.
    """
    assert Sampler(V, "euler", 5).init_noise_scale == pytest.approx(1.0, rel=1e-12)
    sampler = Sampler(NoiseSchedule.flow(), "euler", 4, "leading")
    first = sampler.knots[0]
    assert (first.alpha, first.sigma) == (pytest.approx(0.249), pytest.approx(0.751))
    assert sampler.init_noise_scale == pytest.approx(math.hypot(0.249, 0.751))
    seen: list[Tensor] = []

    def network(x: Tensor, t: Tensor) -> Tensor:
        seen.append(x)
        return x

    noise = noise_of(0, 1, 2)
    sampler(network, noise)
    assert torch.allclose(seen[0], noise * math.hypot(0.249, 0.751))


# seeds


@each_method
def test_an_image_depends_on_its_seed_alone(method: str) -> None:
    sampler = Sampler(V, method, 6)
    batch = sampler(smooth, SHAPE, seeds=[3, 5, 9])
    for place, seed in enumerate((3, 5, 9)):
        assert torch.equal(sampler(smooth, (1, *SHAPE[1:]), seeds=[seed])[0], batch[place])
    assert not torch.allclose(batch[0], batch[1], atol=1e-2)
    assert torch.equal(sampler(smooth, SHAPE, seeds=4), sampler(smooth, SHAPE, seeds=[4, 5, 6]))
    assert torch.equal(
        sampler(smooth, SHAPE, seeds=range(4, 7)), sampler(smooth, SHAPE, seeds=[4, 5, 6])
    )


def test_the_first_noise_is_the_seed_s() -> None:
    sampler = Sampler(V, "ddim", 3)
    assert torch.equal(sampler(smooth, SHAPE, seeds=[0, 1, 2]), sampler(smooth, noise_of(0, 1, 2)))


@pytest.mark.parametrize("method", ["ddpm", "euler_ancestral", "dpmpp_2m_sde"])
def test_draws_differ_from_step_to_step(method: str) -> None:
    sampler, inputs = Sampler(ZTSNR, method, 4), []

    def network(x: Tensor, t: Tensor) -> Tensor:
        inputs.append(x)
        return torch.zeros_like(x)

    sampler(network, SHAPE, seeds=[0, 0, 1])
    assert sampler.table.draws == 3
    for x in inputs:
        assert torch.equal(x[0], x[1])  # the same seed
        assert not torch.allclose(x[0], x[2], atol=1e-2)
    # with v = 0 x_0 = α x; what is left after the known part is fresh noise each time
    step = sampler.table.steps[1]
    residue = inputs[2] - combine(step.carry[0][:1], [inputs[1]])
    assert not torch.allclose(residue / residue.std(), inputs[1] / inputs[1].std(), atol=0.1)


@each_method
@pytest.mark.parametrize("seeds", [None, 0])
def test_global_generators_are_neither_used_nor_touched(method: str, seeds: int | None) -> None:
    sampler = Sampler(V, method, 3)
    torch.manual_seed(0)
    before = torch.get_rng_state()
    first = sampler(smooth, SHAPE, seeds=seeds)
    assert torch.equal(torch.get_rng_state(), before)
    second = sampler(smooth, SHAPE, seeds=seeds)
    assert torch.equal(first, second) == (seeds is not None)


@pytest.mark.parametrize("seeds", [[1], [1, 2, 3, 4], []])
def test_one_seed_for_each_image(seeds: list[int]) -> None:
    with pytest.raises(ValueError, match=f"^need one seed for each of 3 images, got {len(seeds)}$"):
        Sampler(V)(smooth, SHAPE, seeds=seeds)


@pytest.mark.parametrize("shape", [(3,), (), (0, 2), (3, -1), (3, 2.5)])
def test_bad_shapes(shape: Any) -> None:
    with pytest.raises(
        ValueError, match=r"^the shape must be \(batch, \.\.\.\) of positive integers, got "
    ):
        Sampler(V)(smooth, shape, seeds=0)


# what the network is given


def times_given(sampler: Sampler) -> list[Tensor]:
    seen: list[Tensor] = []

    def network(x: Tensor, t: Tensor) -> Tensor:
        seen.append(t)
        return smooth(x, t)

    sampler(network, SHAPE, seeds=0)
    return seen


@pytest.mark.parametrize(
    ("grid", "options"), [("trailing", {}), ("leading", {}), ("linspace", {"rounded": True})]
)
def test_whole_timesteps_are_integers(grid: str, options: dict[str, Any]) -> None:
    sampler = Sampler(V, "euler", 7, grid, **options)
    seen = times_given(sampler)
    assert all(t.dtype == torch.int64 and t.shape == (3,) for t in seen)
    assert [int(t[0]) for t in seen] == sampler.timesteps
    assert all(bool((t == t[0]).all()) for t in seen)


@pytest.mark.parametrize(
    ("schedule", "steps", "grid"),
    [(V, 6, "linspace"), (V, 7, "karras"), (FLOW, 7, "trailing"), (FLOW, 4, "trailing")],
)
def test_other_times_are_floats(schedule: NoiseSchedule, steps: int, grid: str) -> None:
    sampler = Sampler(schedule, "euler", steps, grid)
    seen = times_given(sampler)
    assert all(t.dtype == torch.float32 for t in seen)
    assert [float(t[0]) for t in seen] == pytest.approx(sampler.timesteps, rel=1e-6)
    # four steps of a flow with shift 3 are at whole times, which change nothing: a flow's time is a
    # float
    assert all(time.is_integer() for time in sampler.timesteps) == (steps == 4)


class Small(nn.Module):
    """A network with parameters, which remembers what it was given."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(1.3, dtype=dtype))
        self.inputs: list[torch.dtype] = []
        self.gradients: list[bool] = []

    def forward(self, x: Tensor, t: Tensor, **_: Any) -> Any:
        self.inputs.append(x.dtype)
        self.gradients.append(torch.is_grad_enabled())
        return SimpleNamespace(sample=torch.tanh(self.scale * x))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@each_method
def test_a_half_precision_network_keeps_a_float32_state(method: str, dtype: torch.dtype) -> None:
    network = Small(dtype)
    steps = list(Sampler(V, method, 10).iterate(network, SHAPE, seeds=0))
    assert set(network.inputs) == {dtype}
    for progress in steps[:-1]:
        assert progress.x.dtype == progress.denoised.dtype == torch.float32
        assert not torch.equal(progress.x, progress.x.to(dtype).float())
    full = Sampler(V, method, 10)(Small(), SHAPE, seeds=0)
    assert float((steps[-1].x - full).abs().max()) < 0.05


def test_dtype_may_be_given() -> None:
    seen: list[torch.dtype] = []

    def network(x: Tensor, t: Tensor) -> Tensor:
        seen.append(x.dtype)
        return x

    out = Sampler(V, "euler", 2)(network, SHAPE, seeds=0, dtype=torch.bfloat16)
    assert set(seen) == {torch.bfloat16}
    assert out.dtype == torch.float32
    assert Sampler(V, "euler", 2)(smooth, noise_of(0, 1, 2).double()).dtype == torch.float64
    assert Sampler(V, "euler", 2)(smooth, noise_of(0, 1, 2).bfloat16()).dtype == torch.float32


def test_networks_may_return_a_tensor_an_object_or_a_tuple() -> None:
    sampler = Sampler(V, "heun", 4)
    expected = sampler(smooth, SHAPE, seeds=0)
    for wrap in (lambda out: SimpleNamespace(sample=out), lambda out: (out, None)):
        assert torch.equal(
            sampler(lambda x, t, wrap=wrap: wrap(smooth(x, t)), SHAPE, seeds=0), expected
        )
    with pytest.raises(
        ValueError,
        match=r"^the network must return a tensor or an object with a tensor \.sample, got dict$",
    ):
        sampler(lambda x, t: {}, SHAPE, seeds=0)


@pytest.mark.parametrize("shape", [(1, 2, 4), (3, 1, 4), (3, 4, 4)])
def test_networks_must_return_the_shape_that_they_are_given(shape: tuple[int, ...]) -> None:
    with pytest.raises(
        ValueError,
        match=r"^the network's output must have the shape of its input, \(3, 2, 4\), got ",
    ):
        Sampler(V, "euler", 2)(lambda x, t: torch.zeros(shape), SHAPE, seeds=0)


# surroundings


@pytest.mark.parametrize("training", [True, False])
def test_no_gradients_and_no_leak_of_that_mode(training: bool) -> None:
    network = Small().train(training)
    iterator = Sampler(V, "heun", 4).iterate(network, SHAPE, seeds=0)
    for progress in iterator:
        assert torch.is_grad_enabled()
        assert not progress.x.requires_grad
        if progress.step == 2:
            break
    assert torch.is_grad_enabled()
    iterator.close()
    assert torch.is_grad_enabled()
    assert not any(network.gradients)
    assert network.training is training
    assert network.scale.grad is None
    with torch.no_grad():
        for _ in Sampler(V, "heun", 2).iterate(network, SHAPE, seeds=0):
            assert not torch.is_grad_enabled()


def test_a_failing_network_does_not_leak_the_mode_either() -> None:
    def network(x: Tensor, t: Tensor) -> Tensor:
        raise RuntimeError("boom")

    with pytest.raises(RuntimeError, match="boom"):
        Sampler(V)(network, SHAPE, seeds=0)
    assert torch.is_grad_enabled()


def test_the_given_noise_is_left_alone() -> None:
    noise = noise_of(0, 1, 2)
    for method in METHODS:
        before = noise.clone()
        Sampler(V, method, 3)(smooth, noise)
        assert torch.equal(noise, before)


def test_what_was_yielded_stays_as_it_was() -> None:
    for method in METHODS:
        kept = [
            (progress.x, progress.x.clone())
            for progress in Sampler(V, method, 5).iterate(smooth, SHAPE, seeds=0)
        ]
        assert all(torch.equal(x, copy) for x, copy in kept), method


@each_method
def test_a_sampler_is_a_value(method: str) -> None:
    sampler = Sampler(V, method, 4, "karras", rho=5.0)
    twin = pickle.loads(pickle.dumps(sampler))
    assert twin == sampler
    assert hash(twin) == hash(sampler)
    assert twin != Sampler(V, method, 4, "karras", rho=6.0)
    assert twin != Sampler(V.zero_terminal_snr(), method, 4, "karras", rho=5.0)
    assert torch.equal(twin(smooth, SHAPE, seeds=0), sampler(smooth, SHAPE, seeds=0))
    assert twin.table is sampler.table  # compiled once per value
    with pytest.raises(AttributeError):
        sampler.steps = 5


# guidance


def test_guide_is_the_formula() -> None:
    c, u = torch.randn(2, 4, 3, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    w, phi = 7.5, 0.7
    guided = u + w * (c - u)  # Ho & Salimans, eq. 6
    assert torch.allclose(guide(c, u, w), guided, rtol=0, atol=1e-12)
    expected = torch.empty_like(c)
    for i in range(4):  # Lin et al., eq. 15 and 16, image by image
        rescaled = guided[i] * (c[i].std() / guided[i].std())
        expected[i] = phi * rescaled + (1 - phi) * guided[i]
    assert torch.allclose(guide(c, u, w, phi), expected, rtol=0, atol=1e-12)
    assert float(guide(c, u, w, 1.0)[0].std()) == pytest.approx(float(c[0].std()), rel=1e-12)
    assert guide(c.bfloat16(), u.bfloat16(), w).dtype == torch.float32


def conditioned(x: Tensor, t: Tensor, y: Tensor, more: Any = None) -> Tensor:
    return smooth(x, t) + y + (more["z"] if more else 0)


C, U = torch.full(SHAPE, 0.3), torch.linspace(-1, 1, math.prod(SHAPE)).view(SHAPE)


@each_method
@pytest.mark.parametrize("rescale", [0.0, 0.7])
def test_guided_sampling_is_sampling_with_the_guided_network(method: str, rescale: float) -> None:
    sampler = Sampler(V, method, 5)
    more = {"z": torch.full(SHAPE, 0.1)}
    got = sampler(
        conditioned, SHAPE, seeds=0, guidance_scale=3.0, guidance_rescale=rescale,
        conditioning={"y": C, "more": more}, unconditional={"y": U, "more": {"z": -more["z"]}},
    )  # fmt: skip

    def by_hand(x: Tensor, t: Tensor) -> Tensor:
        c, u = conditioned(x, t, C, more), conditioned(x, t, U, {"z": -more["z"]})
        guided = u + 3.0 * (c - u)
        spread = c.std((1, 2), keepdim=True) / guided.std((1, 2), keepdim=True)
        return guided * (rescale * spread + 1 - rescale)

    expected = sampler(by_hand, SHAPE, seeds=0)
    assert torch.allclose(got, expected, rtol=1e-4, atol=1e-4)
    unguided = sampler(conditioned, SHAPE, seeds=0, conditioning={"y": C, "more": more})
    assert float((got - unguided).abs().max()) > 0.1


def test_guidance_doubles_the_batch_and_not_the_calls() -> None:
    batches: list[int] = []

    def network(x: Tensor, t: Tensor, y: Tensor, flag: str) -> Tensor:
        batches.append(len(x))
        assert len(x) == len(t) == len(y)
        assert flag == "as it is"
        return smooth(x, t)

    both = {
        "conditioning": {"y": C, "flag": "as it is"},
        "unconditional": {"y": U, "flag": "as it is"},
    }
    Sampler(V, "heun", 3)(network, SHAPE, seeds=0, guidance_scale=2.0, **both)
    assert batches == [6] * 5
    batches.clear()
    Sampler(V, "heun", 3)(network, SHAPE, seeds=0, guidance_scale=1.0, **both)
    assert batches == [3] * 5


BOTH = {"conditioning": {"y": C}, "unconditional": {"y": U}}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"conditioning": {"y": C}},
            r"^guidance_scale=3\.0 needs unconditional=.*\(keys \['y'\]\); or use guidance_scale=1$",
        ),
        (
            {"conditioning": {"y": C}, "unconditional": {"z": U}},
            r"^conditioning has the keys \['y'\] and unconditional \['z'\]; give both the same$",
        ),
        (
            {"conditioning": {"y": C}, "unconditional": {"y": U[:1]}},
            r"^conditioning 'y' has shape \(3, 2, 4\) and its unconditional one \(1, 2, 4\)",
        ),
        (
            {**BOTH, "guidance_rescale": 1.5},
            r"^guidance_rescale must be between 0 and 1, got 1\.5; the paper uses 0\.7$",
        ),
        ({**BOTH, "guidance_rescale": -0.1}, "^guidance_rescale must be between 0 and 1"),
    ],
)
def test_guidance_errors(arguments: dict[str, Any], message: str) -> None:
    def never(x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        raise AssertionError("the network was called before the arguments were checked")

    with pytest.raises(ValueError, match=message):
        Sampler(V, "euler", 2)(never, SHAPE, seeds=0, guidance_scale=3.0, **arguments)


# tables


EULER_A_ON_A_FLOW = """\
euler_ancestral: 3 steps, 3 evaluations, 2 draws
step 1  t = 1000   sigma/alpha = inf
  out0 = network(x)
  z0   = noise
  x    = +0.333333 x -0.333333 out0 +0.666667 z0
step 2  t = 666.667 sigma/alpha = 2
  out1 = network(x)
  z1   = noise
  x    = +0.75 x -0.416667 out1 +0.322749 z1
step 3  t = 333.333 sigma/alpha = 0.5
  out2 = network(x)
  x    = +1 x -0.333333 out2"""
"""By hand: from α = 0, r = σ = 2/3 and x = D/3 + r z with D = x - out. Then sqrt(SNR ratio) = 1/4,
so r = sqrt(15/16)/3 and keep = sqrt(1/9 - 15/144) / (2/3) = 1/8; D = x - 2/3 out has 2/3 - 1/24 =
15/24."""

TWO_M = """\
dpmpp_2m: 3 steps, 3 evaluations, 0 draws
step 1  t = 999    sigma/alpha = 14.6146
  out0 = network(x)
  x    = +4.74858 x -3.7915 out0
  m0   = +14.6488 x -14.6146 out0
step 2  t = 666    sigma/alpha = 2.91831
  out1 = network(x)
  x    = +2.80695 x -0.177346 m0 -1.97468 out1
  m0   = +3.08489 x -2.91831 out1
step 3  t = 332    sigma/alpha = 0.929214
  out2 = network(x)
  x    = +1.36508 x -0.929214 out2"""

HEUN = """\
heun: 2 steps, 3 evaluations, 0 draws
step 1  t = 999    sigma/alpha = 14.6146
  out0 = network(x)
  out0' = network(+7.7191 x -6.85119 out0)
  x    = +7.7191 x -3.4256 out0 -3.4256 out0'
step 2  t = 499    sigma/alpha = 1.61289
  out1 = network(x)
  x    = +1.89774 x -1.61289 out1"""
"""In x̄ = x / α a step adds (σ̄_n - σ̄_s) times the slope, which is the output: α_n/α_s = 7.7191,
α_n (1.61289 - 14.6146) = -6.85119.
"""


def test_printed_tableaus() -> None:
    epsilon = SCHEDULES["scaled_linear"]
    assert str(Sampler(NoiseSchedule.flow(), "euler_ancestral", 3).table) == EULER_A_ON_A_FLOW
    assert str(Sampler(epsilon, "dpmpp_2m", 3).table) == TWO_M
    assert str(Sampler(epsilon, "heun", 2).table) == HEUN


def test_the_printed_coefficients_of_2m_follow_from_its_paper() -> None:
    """Lu et al. 2211.01095, algorithm 2, on the knots of TWO_M, with D = x / α - σ / α out."""
    s0, s1, s2, _ = Sampler(SCHEDULES["scaled_linear"], "dpmpp_2m", 3).knots
    lam = [math.log(k.alpha / k.sigma) for k in (s0, s1, s2)]
    h, h_last = lam[2] - lam[1], lam[1] - lam[0]
    r = h_last / h
    of_d = -s2.alpha * math.expm1(-h)
    on_d, on_memory = of_d * (1 + 1 / (2 * r)), -of_d / (2 * r)
    expected = (s2.sigma / s1.sigma + on_d / s1.alpha, on_memory, -on_d * s1.sigma / s1.alpha)
    assert expected == pytest.approx((2.80695, -0.177346, -1.97468), rel=1e-5)


def test_a_method_of_one_s_own_is_one_function() -> None:
    def straight(
        trace: Any, knots: tuple[Knot, ...], i: int, x: Any, *, gain: float = 1.0
    ) -> list[Any]:
        s, n = knots[i], knots[i + 1]
        D = gain * trace.denoise(x, s)
        keep = n.sigma / s.sigma
        return [keep * x + (n.alpha - keep * s.alpha) * D]

    own = Method("straight", straight, order=1, source="here")
    assert torch.allclose(
        Sampler(V, own, 5)(smooth, SHAPE, seeds=0),
        Sampler(V, "euler", 5)(smooth, SHAPE, seeds=0),
        atol=1e-5,
    )
    assert Sampler(V, own, 5, gain=1.0).options == (("gain", 1.0),)
    with pytest.raises(ValueError, match=r"its formula is wrong$"):
        Sampler(V, own, 5, gain=1.1)


def test_the_kernel_runs_a_table_alone() -> None:
    table = Sampler(V, "euler_ancestral", 3).table
    intervals: list[tuple[float, float]] = []

    def noise(start: float, end: float) -> Tensor:
        intervals.append((start, end))
        return torch.ones(SHAPE)

    *_, last = run(table, torch.zeros(SHAPE), lambda x, knot: 0 * x, noise)
    sigmas = [knot.sigma_ve for knot in table.knots]
    # and no draw into the clean end
    assert intervals == [(sigmas[0], sigmas[1]), (sigmas[1], sigmas[2])]
    assert last.step == 3


def test_to_diffusers_names_the_class_that_names_the_method() -> None:
    for name in CLASSES:
        if not CLASSES[name].written or name.startswith("FlowMatch"):
            continue
        config = Sampler(
            NoiseSchedule.scaled_linear(prediction="v_prediction"), name, 10
        ).to_diffusers()
        assert config["_class_name"] == name and hasattr(diffusers, name)
        assert not config.get("use_karras_sigmas")
        assert ("use_karras_sigmas" in config) == ("karras" in CLASSES[name].lays)
