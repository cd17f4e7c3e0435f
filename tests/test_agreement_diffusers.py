"""Agreement with diffusers 0.42.1 to 1e-5 on a nonlinear network: same start, same draws, same grid, whole runs.

The peers are run as they are, float32 tables and all. Where a peer lays its grid or steps in another way than its own
timesteps say, the case below repeats that, and says so.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from diffusers.schedulers.scheduling_ddim import DDIMScheduler
from diffusers.schedulers.scheduling_ddpm import DDPMScheduler
from diffusers.schedulers.scheduling_dpmsolver_multistep import DPMSolverMultistepScheduler
from diffusers.schedulers.scheduling_euler_ancestral_discrete import EulerAncestralDiscreteScheduler
from diffusers.schedulers.scheduling_euler_discrete import EulerDiscreteScheduler
from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteScheduler
from diffusers.schedulers.scheduling_heun_discrete import HeunDiscreteScheduler
from torch import Tensor

from alphabar.noising import NoiseSchedule
from alphabar.sampling import Knot, Sampler, make_knots
from alphabar.sampling.kernel import run
from alphabar.sampling.knots import CLEAN

RELATIVE = 1e-5
T = 1000
STEPS = (10, 20, 25)
SPACINGS = ("linspace", "leading", "trailing")
BETAS: dict[str, Any] = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
GENERATOR = torch.Generator().manual_seed(0)
CHANNELS, HIDDEN = 8, 16


def normal(*shape: int) -> Tensor:
    return torch.randn(shape, generator=GENERATOR, dtype=torch.float64)


INWARD, OUTWARD, PHASE = (
    normal(CHANNELS, HIDDEN) / CHANNELS**0.5,
    normal(HIDDEN, CHANNELS) / HIDDEN**0.5,
    normal(HIDDEN),
)
START = normal(4, CHANNELS)
DRAWS = [normal(4, CHANNELS) for _ in range(30)]


def network(x: Tensor, t: Tensor | float) -> Tensor:
    """A fixed tanh network over channels that depends on t smoothly."""
    time = float(t) / T
    return torch.tanh(x.double() @ INWARD + PHASE * math.cos(3 * time) + time) @ OUTWARD


# ours


def ours(sampler: Sampler) -> Tensor:
    draws = iter(DRAWS)
    *_, last = run(sampler.table, START, lambda x, knot: network(x, knot.timestep), lambda start, end: next(draws))
    return last.x


# theirs


def theirs(
    scheduler: Any, steps: int, monkeypatch: pytest.MonkeyPatch, true_gaps: bool = False, **step_options: Any
) -> Tensor:
    draws = iter(DRAWS)
    monkeypatch.setattr(
        sys.modules[type(scheduler).__module__], "randn_tensor", lambda *_, **__: next(draws), raising=False
    )
    scheduler.set_timesteps(steps)
    x = START * start_scale(scheduler)
    gaps = gaps_of(scheduler.timesteps.tolist())
    for t, gap in zip(scheduler.timesteps, gaps, strict=True):
        out = network(scheduler.scale_model_input(x, t), t)
        if true_gaps:
            # DDIMScheduler steps to t - T // N, which is not the next timestep of its grid (linspace; trailing when N does not
            # divide T): T // (T / gap) is the gap
            scheduler.num_inference_steps = Fraction(T, gap)
        x = scheduler.step(out, t, x, **step_options).prev_sample
    return x.double()


def gaps_of(timesteps: list[float]) -> list[int]:
    return [int(t - n) for t, n in zip(timesteps, [*timesteps[1:], -1], strict=True)]


def start_scale(scheduler: Any) -> float:
    """The Euler family keeps x / α. Its init_noise_sigma is σ / α for linspace and trailing; the marginal has more."""
    if isinstance(scheduler, (EulerDiscreteScheduler, EulerAncestralDiscreteScheduler, HeunDiscreteScheduler)):
        return math.hypot(float(scheduler.sigmas[0]), 1.0)
    return 1.0


def difference(a: Tensor, b: Tensor) -> float:
    assert float(b.abs().max()) > 0.1
    return float((a - b).abs().max() / b.abs().max())


# grids that are laid as the peer lays them


def linear_in_sigma(schedule: NoiseSchedule, steps: int) -> tuple[Knot, ...]:
    """The Euler family's linspace has fractional timesteps, between which it draws σ / α linearly; ours draws log SNR so."""
    times = [knot.timestep for knot in make_knots(schedule, steps, "linspace")[:-1]]
    table = ((1 - schedule.alphas_cumprod) / schedule.alphas_cumprod).sqrt().numpy()
    sigmas = np.interp(times, np.arange(T), table).tolist()
    return (*(Knot(t, 1 / math.hypot(1, s), s / math.hypot(1, s)) for t, s in zip(times, sigmas, strict=True)), CLEAN)


def karras_with_rounded_times(schedule: NoiseSchedule, steps: int) -> tuple[Knot, ...]:
    """DPMSolverMultistepScheduler gives the network the nearest integer timestep of a Karras σ."""
    return tuple(Knot(float(round(k.timestep)), k.alpha, k.sigma) for k in make_knots(schedule, steps, "karras"))


def clamped(grid: str, **options: Any) -> Callable[[NoiseSchedule, int], tuple[Knot, ...]]:
    """σ-spaced peers put ᾱ = 2^-24 in the place of zero terminal SNR; ours is exact."""

    def lay(schedule: NoiseSchedule, steps: int) -> tuple[Knot, ...]:
        first, *rest = make_knots(schedule, steps, grid, **options)
        assert first.alpha == 0.0
        return (Knot(first.timestep, 2.0**-12, math.sqrt(1 - 2.0**-24)), *rest)

    return lay


# the cases


@dataclass(frozen=True)
class Peer:
    """A method of ours and the class that it must agree with."""

    method: str
    scheduler: type[Any]
    predictions: tuple[str, ...] = ("epsilon", "v_prediction", "sample")
    ours: dict[str, Any] = field(default_factory=dict)
    step: dict[str, Any] = field(default_factory=dict)
    options: dict[str, dict[str, Any]] = field(default_factory=dict)  # of our grid, by spacing
    config: dict[str, Any] = field(default_factory=dict)
    true_gaps: bool = False

    def __str__(self) -> str:
        return "-".join([self.method, *(f"{k}{v:g}" for k, v in self.ours.items())])

    def make(self, schedule: NoiseSchedule, **config: Any) -> Any:
        rescaled = {"rescale_betas_zero_snr": True} if schedule.has_zero_terminal_snr else {}
        return self.scheduler(prediction_type=schedule.prediction.name, **BETAS, **self.config, **rescaled, **config)

    def agreement(self, scheduler: Any, sampler: Sampler, monkeypatch: pytest.MonkeyPatch) -> float:
        return difference(ours(sampler), theirs(scheduler, sampler.steps, monkeypatch, self.true_gaps, **self.step))


ROUNDED = {"linspace": {"rounded": True}}
DROPPED = {"linspace": {"rounded": True, "drop_last": True}, "leading": {"drop_last": True}}
NO_CLIP = {"clip_sample": False}


def ddim(eta: float) -> Peer:
    return Peer(
        "ddim", DDIMScheduler, ours={"eta": eta}, step={"eta": eta}, options=ROUNDED, config=NO_CLIP, true_gaps=True
    )


DDIM = [ddim(0.0), ddim(0.5), ddim(1.0)]
DDPM = Peer("ddpm", DDPMScheduler, options=ROUNDED, config=NO_CLIP)
EULER = Peer("euler", EulerDiscreteScheduler)
ANCESTRAL = Peer("euler_ancestral", EulerAncestralDiscreteScheduler, predictions=("epsilon", "v_prediction"))
HEUN = Peer("heun", HeunDiscreteScheduler)
MULTISTEP = Peer("dpmpp_2m", DPMSolverMultistepScheduler, options=DROPPED)
PEERS = [*DDIM, DDPM, EULER, ANCESTRAL, HEUN, MULTISTEP]


def schedules(peer: Peer) -> Iterator[NoiseSchedule]:
    for prediction in peer.predictions:
        yield NoiseSchedule.scaled_linear(prediction=prediction)


@pytest.mark.parametrize("peer", PEERS, ids=str)
@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("steps", STEPS)
def test_spacings(peer: Peer, spacing: str, steps: int, monkeypatch: pytest.MonkeyPatch) -> None:
    for schedule in schedules(peer):
        scheduler = peer.make(schedule, timestep_spacing=spacing)
        grid: Any = spacing
        if peer is HEUN and schedule.prediction.name == "sample":
            # the last slope, (x - α D) / σ at t = 0, enlarges what their float32 table (3e-5 at t = 0, by 1 - ᾱ) and their σ / α
            # between timesteps lack; with our table and their interpolation the two agree again
            scheduler.alphas_cumprod = schedule.alphas_cumprod
            grid = linear_in_sigma if spacing == "linspace" else spacing
        sampler = Sampler(schedule, peer.method, steps, grid, **peer.ours, **peer.options.get(spacing, {}))
        assert peer.agreement(scheduler, sampler, monkeypatch) < RELATIVE, schedule.prediction.name


@pytest.mark.parametrize("peer", [EULER, HEUN], ids=str)
@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("steps", STEPS)
def test_karras_of_the_euler_family(peer: Peer, spacing: str, steps: int, monkeypatch: pytest.MonkeyPatch) -> None:
    for schedule in schedules(peer):
        scheduler = peer.make(schedule, timestep_spacing=spacing, use_karras_sigmas=True)
        scheduler.set_timesteps(steps)
        # they take the range of σ from the grid that they have thinned out already
        high, low = float(scheduler.sigmas[0]), float(scheduler.sigmas[-2])
        sampler = Sampler(schedule, peer.method, steps, "karras", sigma_min=low, sigma_max=high)
        assert peer.agreement(scheduler, sampler, monkeypatch) < RELATIVE, schedule.prediction.name


@pytest.mark.parametrize("steps", STEPS)
def test_karras_of_the_dpm_solver(steps: int, monkeypatch: pytest.MonkeyPatch) -> None:
    for schedule in schedules(MULTISTEP):
        scheduler = MULTISTEP.make(schedule, use_karras_sigmas=True)
        sampler = Sampler(schedule, "dpmpp_2m", steps, karras_with_rounded_times)
        assert MULTISTEP.agreement(scheduler, sampler, monkeypatch) < RELATIVE, schedule.prediction.name
        unrounded = MULTISTEP.agreement(scheduler, Sampler(schedule, "DPM++ 2M Karras", steps), monkeypatch)
        assert unrounded < 1e-3, "rounding the network's time is all that differs"


ZERO_SNR = [(ddim(0.0), True), (ddim(0.5), True), (DDPM, True), (EULER, False), (ANCESTRAL, False), (MULTISTEP, False)]
"""With whether the peer's ᾱ is exactly 0. At η = 1 DDIMScheduler takes the root of -6e-8 there, which is not a number."""


@pytest.mark.parametrize(("peer", "exact"), ZERO_SNR, ids=lambda value: str(value) if isinstance(value, Peer) else "")
@pytest.mark.parametrize("spacing", ["linspace", "trailing"])
@pytest.mark.parametrize("steps", STEPS)
def test_zero_terminal_snr(peer: Peer, exact: bool, spacing: str, steps: int, monkeypatch: pytest.MonkeyPatch) -> None:
    for prediction in set(peer.predictions) - {"epsilon"}:
        schedule = NoiseSchedule.scaled_linear(prediction=prediction).zero_terminal_snr()
        scheduler = peer.make(schedule, timestep_spacing=spacing)
        options = peer.options.get(spacing, {})
        if exact:
            sampler = Sampler(schedule, peer.method, steps, spacing, **peer.ours, **options)
        else:
            sampler = Sampler(schedule, peer.method, steps, clamped(spacing, **options))
            exactly = Sampler(schedule, peer.method, steps, spacing, **options)
            assert 1e-6 < peer.agreement(scheduler, exactly, monkeypatch) < 1e-3  # what 2^-24 costs them
        assert peer.agreement(scheduler, sampler, monkeypatch) < RELATIVE, prediction


@pytest.mark.parametrize("peer", [ddim(0.0), DDPM, EULER, MULTISTEP], ids=str)
@pytest.mark.parametrize("betas", ["linear", "squaredcos_cap_v2"])
def test_other_betas(peer: Peer, betas: str, monkeypatch: pytest.MonkeyPatch) -> None:
    make = {"linear": NoiseSchedule.linear, "squaredcos_cap_v2": NoiseSchedule.squaredcos_cap_v2}[betas]
    schedule = make(prediction="v_prediction")
    scheduler = peer.scheduler(
        prediction_type="v_prediction",
        timestep_spacing="leading",
        beta_schedule=betas,
        beta_start=0.0001,
        beta_end=0.02,
        **peer.config,
    )
    sampler = Sampler(schedule, peer.method, 20, "leading", **peer.ours, **peer.options.get("leading", {}))
    assert peer.agreement(scheduler, sampler, monkeypatch) < RELATIVE


@pytest.mark.parametrize("shift", [1.0, 3.0])
@pytest.mark.parametrize("steps", STEPS)
def test_flow_matching(shift: float, steps: int) -> None:
    """Euler on a flow, against FlowMatchEulerDiscreteScheduler with the linear sigmas that pipelines hand to it."""
    sampler = Sampler(NoiseSchedule.flow(shift=shift), "euler", steps, "trailing")
    scheduler: Any = FlowMatchEulerDiscreteScheduler(shift=shift)
    scheduler.set_timesteps(sigmas=np.linspace(1.0, 1 / steps, steps).tolist())
    assert sampler.timesteps == pytest.approx(scheduler.timesteps.tolist(), rel=1e-6)
    x = START
    for t in scheduler.timesteps:
        x = scheduler.step(network(x, t), t, x).prev_sample
    assert difference(ours(sampler), x.double()) < RELATIVE


def test_a_difference_would_be_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """The yardstick itself: one step more, another eta, another grid or prediction are all far beyond the tolerance."""
    schedule = NoiseSchedule.scaled_linear(prediction="v_prediction")
    peer = ddim(0.5)
    scheduler = peer.make(schedule, timestep_spacing="trailing")
    for wrong in (
        Sampler(schedule, "ddim", 20, "trailing", eta=0.51),
        Sampler(schedule, "ddim", 20, "leading", eta=0.5, steps_offset=1),
        Sampler(schedule.with_prediction("flow_prediction"), "ddim", 20, "trailing", eta=0.5),
        Sampler(schedule.zero_terminal_snr(), "ddim", 20, "trailing", eta=0.5),
    ):
        assert peer.agreement(scheduler, wrong, monkeypatch) > 100 * RELATIVE
