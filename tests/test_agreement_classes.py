"""Agreement with diffusers in what every class has (betas, T, thresholds), and in the options that
few have.

The last test goes through the constructor of every class that a sampler is named after: each option
is in a case of agreement, in a test that is named, or has a reason here. An option that diffusers
adds fails it.
"""

from __future__ import annotations

import inspect
import math
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from fractions import Fraction
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers.schedulers.deprecated import KarrasVeScheduler, ScoreSdeVpScheduler
from torch import Tensor

import test_agreement_diffusers as agreement
from all_pairs import all_pairs
from alphabar.noising import Discrete, NoiseSchedule
from alphabar.sampling import Clip, DynamicThreshold, Knot, Sampler, make_knots
from alphabar.sampling.names import all_names
from oracles import DATA, moments, point_mass_defect
from test_agreement_diffusers import (
    BETAS,
    CASES,
    DRAWS,
    DROPPED,
    MULTI,
    RELATIVE,
    SIGMAS,
    SINGLE,
    START,
    STEPS,
    Case,
    constant,
    difference,
    network,
    ours,
    peers,
    theirs,
)
from test_agreement_options import EVERYWHERE, T, laid

SHORT = 100
"""T of the schedules with betas of their own."""


def of_each_class(*, has: str = "prediction_type") -> list[Case]:
    """The first case of every class on its leading grid, or its only one; without noise, where it
    can be.
    """
    found: dict[Any, Case] = {}
    for case in CASES:
        spacing = case.config.get("timestep_spacing")
        if (
            has in inspect.signature(case.peer).parameters
            and spacing in (None, "leading")
            and not set(case.config) & set(SIGMAS.values())
        ):
            better = found.get(case.peer) is None or (
                spacing and not found[case.peer].config.get("timestep_spacing")
            )
            found[case.peer] = case if better else found[case.peer]
    return list(found.values())


@pytest.mark.parametrize("case", of_each_class(has="trained_betas"), ids=str)
def test_betas_and_timesteps_of_ones_own(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "diffusers.schedulers.scheduling_dpmsolver_sde.BrownianTreeNoiseSampler",
        lambda *_: agreement.Path(),
    )
    betas = torch.linspace(0.001, 0.2, SHORT, dtype=torch.float64).square().tolist()
    options = case.options | ({"original_steps": 50} if case.grid == "lcm" else {})
    for prediction, steps in product(case.predictions, (5, 10)):
        schedule = NoiseSchedule.from_betas(betas, prediction=prediction)
        config = {
            **case.config,
            "num_train_timesteps": SHORT,
            "trained_betas": betas,
            "prediction_type": prediction,
        }
        scheduler = case.peer(**config)
        scheduler.alphas_cumprod = schedule.alphas_cumprod  # theirs is float32
        if case.config.get("set_alpha_to_one") is False:
            scheduler.initial_alpha_cumprod = scheduler.alphas_cumprod[0]
        their = theirs(
            scheduler,
            steps,
            monkeypatch,
            evaluations=case.evaluations,
            in_double=case.in_double,
            **case.step,
        )
        mine = ours(Sampler(schedule, case.method, steps, case.grid, **options))
        assert difference(mine, their) < RELATIVE


# thresholds and clipping


def without_noise(sampler: Sampler, start: Tensor, clip: Any) -> Tensor:
    x = start
    for progress in sampler.iterate(
        lambda x, t: network(x, t[0].double()), start, dtype=torch.float64, clip=clip
    ):
        x = progress.x
    return x


IMAGES = torch.randn(
    4, 2, agreement.CHANNELS, generator=torch.Generator().manual_seed(1), dtype=torch.float64
)
CLIPPING = {
    "thresholding": (
        {"thresholding": True, "dynamic_thresholding_ratio": 0.9, "sample_max_value": 4.0},
        DynamicThreshold(0.9, 4.0),
    ),
    "clip_sample": ({"clip_sample": True, "clip_sample_range": 0.7}, Clip(0.7)),
}
CLIPPED = [
    (option, case)
    for option in CLIPPING
    for case in of_each_class(has=option)
    if case.method
    not in ("ddpm", "ddim", "lcm", "tcd", "ddim_inverse")  # see the table at the end of this file
]
ONE_STEP = [
    (option, case)
    for option in CLIPPING
    for case in of_each_class(has=option)
    if case.method == "lcm"
]


@pytest.mark.parametrize(("option", "case"), [*CLIPPED, *ONE_STEP], ids=str)
def test_thresholds_in_every_class(
    option: str, case: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    start = IMAGES  # which their thresholds need
    monkeypatch.setattr(agreement, "START", start)
    monkeypatch.setattr(agreement, "DRAWS", [(torch.zeros_like(start),) * 2] * len(DRAWS))
    config, clip = CLIPPING[option]
    options = case.options | ({"tau": 0.0} if case.method == "sa_solver" else {})
    still = {"tau_func": constant(0.0)} if case.method == "sa_solver" else {}
    schedule = NoiseSchedule.scaled_linear()
    for steps in (1,) if (option, case) in ONE_STEP else (8, 20):
        case = replace(case, config={**case.config, **config, **still}, exact_table=True)
        their = theirs(
            case.scheduler(schedule),
            steps,
            monkeypatch,
            evaluations=case.evaluations,
            in_double=case.in_double,
            **case.step,
        )
        sampler = Sampler(schedule, case.method, steps, case.grid, **options)
        mine = without_noise(sampler, start, clip)
        assert difference(mine, their) < RELATIVE
        assert difference(without_noise(sampler, start, None), their) > 100 * RELATIVE


# SA-Solver in the noise prediction


@pytest.mark.parametrize(
    ("orders", "tau", "spacing"),
    all_pairs([(1, 1), (2, 1), (2, 2), (3, 3), (3, 4)], [None, 0.0, 0.5, 1.0], list(DROPPED)),
    ids=str,
)
def test_noise_prediction_of_sa_solver(
    orders: tuple[int, int], tau: float | None, spacing: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = dict(zip(("predictor_order", "corrector_order"), orders, strict=True))
    strength = {} if tau is None else {"tau": tau, "tau_timesteps": EVERYWHERE}
    for prediction, steps in zip(("epsilon", "v_prediction", "sample"), (*STEPS, 7), strict=True):
        schedule = NoiseSchedule.scaled_linear(prediction=prediction)
        case = Case(
            peers.SASolverScheduler,
            "sa_solver",
            spacing,
            {
                **own,
                "algorithm_type": "noise_prediction",
                "timestep_spacing": spacing,
                "tau_func": None if tau is None else constant(tau),
            },
            exact_table=True,
        )
        their = theirs(case.scheduler(schedule), steps, monkeypatch, in_double=True)
        options = {**own, **strength, **DROPPED[spacing], "final": "sigma_min", "predict_x0": False}
        assert (
            difference(ours(Sampler(schedule, "sa_solver", steps, spacing, **options)), their)
            < RELATIVE
        )


# inversion


def test_inversion_from_a_clipped_lambda(monkeypatch: pytest.MonkeyPatch) -> None:
    schedule = NoiseSchedule.squaredcos_cap_v2()
    scheduler = peers.DPMSolverMultistepInverseScheduler(
        beta_schedule="squaredcos_cap_v2", lambda_min_clipped=-5.1
    )
    scheduler.alphas_cumprod = schedule.alphas_cumprod
    sampler = Sampler(schedule, "dpm_solver_inverse", 20, "linspace", rounded=True, lambda_min=-5.1)
    assert difference(ours(sampler), theirs(scheduler, 20, monkeypatch)) < RELATIVE


@pytest.mark.parametrize("final", [{"euler_at_final": True}, {"lower_order_final": False}], ids=str)
@pytest.mark.parametrize("order", [2, 3])
def test_the_end_of_an_inversion(
    order: int, final: dict[str, bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    schedule = NoiseSchedule.scaled_linear()
    scheduler = peers.DPMSolverMultistepInverseScheduler(**BETAS, solver_order=order, **final)
    scheduler.alphas_cumprod = schedule.alphas_cumprod
    for steps in STEPS:
        sampler = Sampler(
            schedule, "dpm_solver_inverse", steps, "linspace", rounded=True, order=order, **final
        )
        assert difference(ours(sampler), theirs(scheduler, steps, monkeypatch)) < RELATIVE


@pytest.mark.parametrize("grid", SIGMAS)
def test_inversion_on_sigmas(grid: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Theirs go up to sigma_max and show it twice; where two of their times are one, theirs lose
    the steps between.
    """
    schedule = NoiseSchedule.scaled_linear()
    scheduler = peers.DPMSolverMultistepInverseScheduler(**BETAS, **{SIGMAS[grid]: True})
    scheduler.alphas_cumprod = schedule.alphas_cumprod
    compared = 0
    for steps in (5, 7, 20):
        scheduler.set_timesteps(steps)
        knots = make_knots(schedule, steps - 1, grid, final="sigma_min", ascending=True)
        assert [k.sigma_ve for k in knots] == pytest.approx(
            scheduler.sigmas[:-1].tolist(), rel=3e-7
        )
        times = scheduler.timesteps.tolist()
        if len({*times}) < steps:
            continue
        compared += 1
        assert all(abs(k.timestep - t) <= 1 for k, t in zip(knots, times, strict=True))
        last = knots[-1].sigma_ve * (1 + 1e-9)
        end = Knot(999.0, 1 / math.hypot(1, last), last / math.hypot(1, last))
        moved = [*(replace(k, timestep=float(t)) for k, t in zip(knots, times, strict=True)), end]
        their = theirs(scheduler, steps, monkeypatch)
        assert difference(ours(laid(schedule, "dpm_solver_inverse", moved[::-1])), their) < RELATIVE
    assert compared


def test_inversion_of_a_flow_goes_down_there() -> None:
    scheduler = peers.DPMSolverMultistepInverseScheduler(
        use_flow_sigmas=True, flow_shift=3.0, prediction_type="flow_prediction"
    )
    scheduler.set_timesteps(10)
    assert bool((scheduler.sigmas.diff() <= 0).all()), "from the noise to the image"
    sampler = Sampler(NoiseSchedule.flow(shift=3.0), "dpm_solver_inverse", 10)
    assert sampler.sigmas == sorted(sampler.sigmas)
    assert point_mass_defect(sampler.table) < 1e-12


@pytest.mark.parametrize("method", ["ddim_inverse", "dpm_solver_inverse"])
def test_inversion_needs_noise_that_the_network_can_tell(method: str) -> None:
    """Of a clean image a prediction of x_0 leaves (x - x_0) / σ = 0 / 0, which theirs go on with;
    from σ > 0 on it inverts.
    """
    schedule = NoiseSchedule.scaled_linear(prediction="sample")
    with pytest.raises(ValueError, match="sample predictions do not say the noise"):
        Sampler(schedule, method, 10, "trailing", final="zero")
    table = Sampler(schedule, method, 200, "trailing", final="sigma_min").table
    *_, (mean, variance) = moments(table, DATA)
    exact_mean, deviation = DATA.marginal(table.knots[-1])
    assert abs(mean - exact_mean) < 0.02 and abs(math.sqrt(variance) - deviation) < 0.02


@pytest.mark.parametrize("offset", [0, 1])
def test_inversion_from_an_offset(offset: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Their last step goes from leading's last time to σ of t = 999, far away."""
    peer = peers.DPMSolverMultistepInverseScheduler(
        **BETAS, timestep_spacing="leading", steps_offset=offset, lower_order_final=False
    )
    their = theirs(peer, 20, monkeypatch)
    schedule = NoiseSchedule.scaled_linear()
    knots = make_knots(schedule, timesteps=[999, *reversed(peer.timesteps.tolist())])[:-1]
    assert (
        difference(
            ours(laid(schedule, "dpm_solver_inverse", knots, lower_order_final=False)), their
        )
        < RELATIVE
    )


# PLMS and PNDM in few steps and on every spacing


def plms_gaps(scheduler: Any, i: int) -> None:
    """Theirs step by T // N, which is the gap of leading alone: T // (T / gap) is that of the grid.
    The first is taken twice.
    """
    t = scheduler.plms_timesteps.tolist()
    t = [t[0], *t[2:], -1] if len(t) > 2 else [*t, -1]
    j = max(i - 1, 0)
    scheduler.num_inference_steps = Fraction(T, t[j] - t[j + 1])


@pytest.mark.parametrize("spacing", ["linspace", "leading", "trailing"])
@pytest.mark.parametrize("final", ["zero", "sigma_min"])
def test_plms_in_few_steps(spacing: str, final: str, monkeypatch: pytest.MonkeyPatch) -> None:
    schedule = NoiseSchedule.scaled_linear()
    one = final == "zero"
    scheduler = peers.PNDMScheduler(
        **BETAS,
        skip_prk_steps=True,
        set_alpha_to_one=one,
        timestep_spacing=spacing,
        steps_offset=int(not one),
    )
    scheduler.alphas_cumprod = schedule.alphas_cumprod
    scheduler.final_alpha_cumprod = torch.tensor(1.0) if one else schedule.alphas_cumprod[0]
    options: dict[str, Any] = {"combine": "output", "final": final}
    options |= {
        "linspace": {"rounded": True},
        "leading": {"steps_offset": int(not one)},
        "trailing": {},
    }[spacing]
    for steps in (2, 3, 4, 7):
        if spacing == "linspace" and final == "sigma_min":
            # which lays its last time at sigma_min itself, and steps from there to sigma_min
            continue
        mine = ours(Sampler(schedule, "plms", steps, spacing, **options))
        assert difference(mine, theirs(scheduler, steps, monkeypatch, before=plms_gaps)) < RELATIVE
    whole = theirs(scheduler, 7, monkeypatch)
    sampler = Sampler(
        schedule, "plms", 7, spacing, **({} if spacing == "linspace" and not one else options)
    )
    assert (difference(ours(sampler), whole) > 10 * RELATIVE) == (spacing != "leading"), (
        "T // 7 is not every gap"
    )


@pytest.mark.parametrize("steps", [1, 2, 3])
def test_pndm_in_fewer_steps_than_it_warms_up_for(steps: int) -> None:
    scheduler = peers.PNDMScheduler(**BETAS)
    with pytest.raises(ValueError, match="broadcast"):
        scheduler.set_timesteps(steps)
    table = Sampler(NoiseSchedule.scaled_linear(), "pndm", steps).table
    assert point_mass_defect(table) < 1e-12


@pytest.mark.parametrize("skip", [True, False])
def test_pndm_on_trailing(skip: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    schedule = NoiseSchedule.scaled_linear()
    scheduler = peers.PNDMScheduler(
        **BETAS, skip_prk_steps=skip, set_alpha_to_one=True, timestep_spacing="trailing"
    )
    for steps in (4, 5, 10, 20):
        mine = ours(
            Sampler(schedule, "plms" if skip else "pndm", steps, "trailing", combine="output")
        )
        assert difference(mine, theirs(scheduler, steps, monkeypatch)) < RELATIVE


# CogVideoX


@pytest.mark.parametrize("spacing", ["leading", "trailing"])
@pytest.mark.parametrize("zero_snr", [False, True])
@pytest.mark.parametrize("one", [True, False])
@pytest.mark.parametrize("name", ["CogVideoXDDIMScheduler", "CogVideoXDPMScheduler"])
def test_cogvideox(
    name: str, one: bool, zero_snr: bool, spacing: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Their SNR is a third, before the rescaling. The DPM class is DPM++ 2M SDE whose two draws in
    a step are not both used.
    """
    schedule = NoiseSchedule(Discrete(snr_shift_scale=3.0), "v_prediction")
    schedule = schedule.zero_terminal_snr() if zero_snr else schedule
    offset = int(spacing == "leading")
    config = {
        "timestep_spacing": spacing,
        "steps_offset": offset,
        "set_alpha_to_one": one,
        "rescale_betas_zero_snr": zero_snr,
        "prediction_type": "v_prediction",
        "clip_sample": False,
    }
    options: dict[str, Any] = {"steps_offset": 1} if offset else {}
    options |= {} if one else {"final": "sigma_min"}
    for steps in (5, 20):
        scheduler = getattr(peers, name)(**config)
        assert scheduler.alphas_cumprod.tolist() == pytest.approx(
            schedule.alphas_cumprod.tolist(), rel=1e-6, abs=1e-9
        )
        if name == "CogVideoXDDIMScheduler":
            mine = ours(Sampler(schedule, "ddim", steps, spacing, **options))
            assert difference(mine, theirs(scheduler, steps, monkeypatch)) < RELATIVE
            continue
        scheduler.set_timesteps(steps)
        x, old, times = START, None, scheduler.timesteps
        for i, t in enumerate(times):
            draw = DRAWS[i][0]
            monkeypatch.setattr(
                sys.modules[type(scheduler).__module__],
                "randn_tensor",
                lambda *_, draw=draw, **__: draw,
            )
            x, old = scheduler.step(network(x, t), old, t, times[i - 1] if i else None, x)
        sampler = Sampler(schedule, "dpmpp_2m_sde", steps, spacing, **options)
        if not one:  # theirs takes its last step in the first order
            end: dict[str, Any] = {"lower_order_final": False, "euler_at_final": True}
            algorithm = "sde-dpmsolver++"
            sampler = Sampler(
                schedule,
                "dpm_solver_multistep",
                steps,
                spacing,
                algorithm=algorithm,
                **end,
                **options,
            )
        assert difference(ours(sampler), x) < RELATIVE


@pytest.mark.parametrize("one", [True, False])
def test_the_final_alpha_of_tcd(one: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its last step goes to x_0 whatever the final alpha is."""
    scheduler = peers.TCDScheduler(set_alpha_to_one=one)
    sampler = Sampler(NoiseSchedule.scaled_linear(), "tcd", 4, "lcm", eta=0.3)
    assert difference(ours(sampler), theirs(scheduler, 4, monkeypatch, eta=0.3)) < RELATIVE


# EDM


def edm(x: Tensor, t: Any) -> Tensor:
    return network(x, t, unit=2.0)


EDM = [
    {"lower_order_final": False},
    {"solver_order": 3},
    {"solver_order": 3, "lower_order_final": False},
    {"solver_order": 3, "euler_at_final": True},
    {"final_sigmas_type": "sigma_min"},
    {"sigma_min": 0.01, "sigma_max": 50.0},
    {"sigma_data": 1.0},
    {"rho": 5.0},
]


@pytest.mark.parametrize("config", EDM, ids=str)
@pytest.mark.parametrize("algorithm", ["", "dpmsolver++", "sde-dpmsolver++"])
@pytest.mark.parametrize("grid", ["karras", "exponential"])
def test_options_of_edm(
    grid: str, algorithm: str, config: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """No algorithm is EDMEulerScheduler."""
    known = {
        k: v
        for k, v in config.items()
        if algorithm or k in inspect.signature(peers.EDMEulerScheduler).parameters
    }
    if known != config or (algorithm.startswith("sde") and config.get("solver_order") == 3):
        return  # see test_edm for the order that theirs lack
    of_curve = {k: v for k, v in config.items() if k.startswith("sigma_")}
    schedule = NoiseSchedule.karras(**of_curve)
    names = {
        "solver_order": "order",
        "lower_order_final": "lower_order_final",
        "euler_at_final": "euler_at_final",
    }
    options = {names[k]: v for k, v in config.items() if k in names}
    scheduler: Any = (
        peers.EDMEulerScheduler(sigma_schedule=grid, **config) if not algorithm else None
    )
    if algorithm:
        options["algorithm"] = algorithm
        scheduler = peers.EDMDPMSolverMultistepScheduler(
            sigma_schedule=grid, algorithm_type=algorithm, **config
        )
    method = "dpm_solver_multistep" if algorithm else "euler"
    for steps in STEPS:
        their = theirs(scheduler, steps, monkeypatch, net=edm)
        if config.get("final_sigmas_type"):  # which is there twice
            knots = make_knots(schedule, steps - 1, grid, final="sigma_min")
            sampler = laid(
                schedule,
                method,
                [*knots, replace(knots[-1], sigma=knots[-1].sigma * (1 - 1e-9))],
                **options,
            )
        else:
            rho = {"rho": config["rho"]} if "rho" in config and grid == "karras" else {}
            sampler = Sampler(schedule, method, steps, grid, **options, **rho)
        assert difference(ours(sampler, edm), their) < RELATIVE


def test_churn_of_edm_euler_moves_a_point_mass(monkeypatch: pytest.MonkeyPatch) -> None:
    """2206.00364, algorithm 2, line 7: D is asked for at (x̂, σ̂). All data being one point, D is
    that point at every x and σ: theirs, whose network saw (x, σ) and is unfolded at (x̂, σ̂), finds
    another; with the network at (x̂, σ̂) they do not."""
    point, churn = 0.5, {"s_churn": 40.0}
    scheduler: Any = peers.EDMEulerScheduler()
    monkeypatch.setattr(
        sys.modules[type(scheduler).__module__], "randn_tensor", lambda *_, **__: DRAWS[0][0]
    )
    scheduler.set_timesteps(20)
    start = 5
    sigma = float(scheduler.sigmas[start])
    raised = sigma * math.sqrt(2)
    x = point + sigma * START
    x_hat = x + math.sqrt(raised**2 - sigma**2) * DRAWS[0][0]

    def found(seen: Tensor, level: float) -> Tensor:
        data = scheduler.config.sigma_data
        c_skip, c_out = data**2 / (level**2 + data**2), level * data / math.hypot(level, data)
        scheduler.set_timesteps(20)
        scheduler.set_begin_index(start)
        scheduler.is_scale_input_called = True
        output = (point - c_skip * seen) / c_out
        return scheduler.step(output, scheduler.timesteps[start], x, **churn).pred_original_sample

    assert torch.allclose(found(x_hat, raised), torch.tensor(point, dtype=torch.float64), atol=1e-4)
    assert float((found(x, sigma) - point).abs().max()) > 0.01


@pytest.mark.parametrize("grid", ["karras", "exponential"])
@pytest.mark.parametrize("kind", ["midpoint", "heun"])
@pytest.mark.parametrize("order", [1, 2])
def test_cosine_dpm_solver(
    order: int, kind: str, grid: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An EDM network that takes -F, with time 2 arctan(σ) / π, on the SDE."""

    class Draws:
        def __init__(self, *_: Any, **__: Any) -> None:
            self.calls = -1

        def __call__(self, start: Any, end: Any) -> Tensor:
            self.calls += 1
            return DRAWS[self.calls][0]

    def net(x: Tensor, t: Any) -> Tensor:
        return network(x, t, unit=1.0)

    monkeypatch.setattr(
        "diffusers.schedulers.scheduling_cosine_dpmsolver_multistep.BrownianTreeNoiseSampler", Draws
    )
    schedule = NoiseSchedule.karras(sigma_min=0.3, sigma_max=500.0, sigma_data=1.0)
    for steps in STEPS:
        scheduler = peers.CosineDPMSolverMultistepScheduler(
            sigma_schedule=grid, solver_order=order, solver_type=kind
        )
        options: dict[str, Any] = {
            "algorithm": "sde-dpmsolver++",
            "order": order,
            "solver_type": kind,
        }
        sampler = Sampler(schedule, "dpm_solver_multistep", steps, grid, **options)
        mine = ours(sampler, lambda x, t: -net(x, math.atan(math.exp(4 * t)) * 2 / math.pi))
        assert difference(mine, theirs(scheduler, steps, monkeypatch, net=net)) < RELATIVE


@pytest.mark.parametrize("steps", STEPS)
def test_continuous_timesteps_of_euler(steps: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stable Video Diffusion: σ from 0.002 to 700 with v at log(σ) / 4, an EDM network of σ_data =
    1 that takes -F.
    """
    monkeypatch.setattr(agreement, "EULER_FAMILY", ())  # both start and end with α = 1
    scheduler: Any = peers.EulerDiscreteScheduler(
        use_karras_sigmas=True,
        sigma_min=0.002,
        sigma_max=700.0,
        timestep_type="continuous",
        prediction_type="v_prediction",
    )
    schedule = NoiseSchedule.karras(sigma_min=0.002, sigma_max=700.0, sigma_data=1.0)
    sampler = Sampler(schedule, "euler", steps, "karras")
    assert sampler.timesteps == pytest.approx(scheduler_times(scheduler, steps), rel=1e-5)
    their = theirs(scheduler, steps, monkeypatch, net=edm)
    assert difference(ours(sampler, lambda x, t: -edm(x, t)), their) < RELATIVE


def scheduler_times(scheduler: Any, steps: int) -> list[float]:
    scheduler.set_timesteps(steps)
    return scheduler.timesteps.tolist()


# flows


def on_a_flow(
    method: str,
    scheduler: Any,
    setup: dict[str, Any],
    knots: Sequence[Knot],
    monkeypatch: pytest.MonkeyPatch,
    **options: Any,
) -> float:
    """How far ours is from theirs on our knots: theirs must lie there to 2e-6, and their times to
    1, to which they are cut.
    """
    twice = knots[-1] == knots[-2]
    set_timesteps = scheduler.set_timesteps
    placed = []

    def exactly(**arguments: Any) -> None:
        set_timesteps(**arguments)
        for k, t, s in zip(
            knots, scheduler.timesteps.tolist(), scheduler.sigmas.tolist(), strict=False
        ):
            assert abs(k.timestep - t) <= 1
            assert k.sigma == pytest.approx(s, abs=2e-6)
            level = 1 - 1e-6 if k.alpha == 0 else k.sigma  # UniPC's own
            placed.append(Knot(float(t), 1 - level, level))
        end = placed[-1].sigma if twice else knots[-1].sigma
        scheduler.sigmas = torch.tensor([*(k.sigma for k in placed), end], dtype=torch.float64)

    scheduler.set_timesteps = exactly
    their = theirs(scheduler, 0, monkeypatch, setup=setup)
    end = placed[-1].sigma * (1 - 1e-9) if twice else knots[-1].sigma
    return difference(
        ours(laid(NoiseSchedule.flow(), method, [*placed, Knot(0.0, 1 - end, end)], **options)),
        their,
    )


def doubled(knots: Sequence[Knot]) -> list[Knot]:
    return [*knots[:-1], knots[-2]]


DYNAMIC = [
    ("dpm_solver_multistep", MULTI, {}, {}),
    ("dpm_solver_singlestep", SINGLE, {"lower_order_final": True}, {}),
    ("deis", peers.DEISMultistepScheduler, {}, {"order": 2}),
]
FLOW = {"prediction_type": "flow_prediction", "use_flow_sigmas": True}


@pytest.mark.parametrize(("method", "peer", "config", "options"), DYNAMIC)
@pytest.mark.parametrize("kind", ["exponential", "linear"])
@pytest.mark.parametrize("mu", [0.5, 1.15])
def test_dynamic_shifting_of_the_solvers(
    mu: float,
    kind: str,
    method: str,
    peer: Any,
    config: dict[str, Any],
    options: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Theirs know the exponential kind alone; of the other they raise an AssertionError."""
    scheduler = peer(**FLOW, **config, use_dynamic_shifting=True, time_shift_type=kind)
    for steps in STEPS:
        setup = {"num_inference_steps": steps, "mu": mu}
        if kind == "linear":
            with pytest.raises(AssertionError):
                scheduler.set_timesteps(**setup)
            continue
        knots = make_knots(
            NoiseSchedule.flow(), steps, "flow", mu=mu, start=1 - 1 / T, end=0.0, drop_last=True
        )
        knots = doubled(knots) if method == "deis" else knots
        scheduler = peer(**FLOW, **config, use_dynamic_shifting=True)
        assert on_a_flow(method, scheduler, setup, knots, monkeypatch, **options) < RELATIVE


@pytest.mark.parametrize("method", ["dpm_solver_multistep", "dpm_solver_singlestep", "unipc"])
def test_flows_that_end_at_their_lowest_sigma(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    peer = {
        "dpm_solver_multistep": MULTI,
        "dpm_solver_singlestep": SINGLE,
        "unipc": peers.UniPCMultistepScheduler,
    }
    ends = {} if method == "unipc" else {"start": 1 - 1 / T, "end": 0.0}
    for steps in STEPS:
        scheduler = peer[method](**FLOW, final_sigmas_type="sigma_min")
        knots = doubled(make_knots(NoiseSchedule.flow(), steps, "flow", drop_last=True, **ends))
        assert (
            on_a_flow(method, scheduler, {"num_inference_steps": steps}, knots, monkeypatch)
            < RELATIVE
        )


def unipc_grids(steps: int) -> Iterator[tuple[dict[str, Any], dict[str, Any], Sequence[Knot]]]:
    flow, flow_3, last = (
        NoiseSchedule.flow(),
        NoiseSchedule.flow(shift=3.0),
        1 - (1 - 1 / T) * (steps - 1) / steps,
    )
    evenly = {"num_inference_steps": steps}
    linear = {"use_dynamic_shifting": True, "time_shift_type": "linear"}
    yield linear, {**evenly, "mu": 0.8}, make_knots(flow, steps, "flow", shift=0.8, drop_last=True)
    stretched = {"flow_shift": 3.0, "shift_terminal": 0.1}
    yield stretched, evenly, make_knots(flow_3, steps, "flow", end=last, shift_terminal=0.1)
    given = {"sigmas": np.linspace(1, 1 / steps, steps)}
    yield {"flow_shift": 3.0}, given, make_knots(flow_3, steps, "flow", end=1 / steps)
    for grid, flag in [("karras", "use_karras_sigmas")]:  # Cosmos
        ranged = {flag: True, "sigma_min": 0.01, "sigma_max": 200.0}
        yield (
            ranged,
            evenly,
            make_knots(flow, steps, grid, ratio=True, sigma_min=0.01, sigma_max=200.0),
        )


@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize("index", range(4))
def test_flow_grids_of_unipc(index: int, steps: int, monkeypatch: pytest.MonkeyPatch) -> None:
    config, setup, knots = list(unipc_grids(steps))[index]
    scheduler = peers.UniPCMultistepScheduler(**FLOW, **config)
    assert on_a_flow("unipc", scheduler, setup, knots, monkeypatch) < RELATIVE


@pytest.mark.parametrize("steps", STEPS)
def test_inverted_sigmas(steps: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Mochi counts its time from the noise, and its network predicts the way to the data: the same
    path under other names.
    """
    scheduler = peers.FlowMatchEulerDiscreteScheduler(invert_sigmas=True)
    setup = {"sigmas": np.linspace(1.0, 1 / steps, steps).tolist()}
    sampler = Sampler(NoiseSchedule.flow(), "euler", steps, "trailing")
    mine = ours(sampler, lambda x, t: -network(x, T - t))
    assert difference(mine, theirs(scheduler, 0, monkeypatch, setup=setup)) < RELATIVE


@pytest.mark.parametrize("s_churn", [4.0])
def test_churn_of_flow_heun_leaves_the_path(
    s_churn: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Theirs raise σ and leave α = 1 - σ where it was: of a point mass, the network sees another
    mixture than it is told.
    """
    scheduler = peers.FlowMatchHeunDiscreteScheduler()
    monkeypatch.setattr(
        sys.modules[type(scheduler).__module__], "randn_tensor", lambda *_, **__: DRAWS[0][0]
    )
    scheduler.set_timesteps(10)
    point = 3.0
    sigma, after = float(scheduler.sigmas[4]), float(scheduler.sigmas[6])
    scheduler.set_begin_index(4)
    x = (1 - sigma) * point + sigma * START
    velocity = START - point
    assert torch.allclose(
        scheduler.step(velocity, scheduler.timesteps[4], x).prev_sample,
        (1 - after) * point + after * START,
    )
    scheduler.set_timesteps(10)
    scheduler.set_begin_index(4)
    churned = scheduler.step(velocity, scheduler.timesteps[4], x, s_churn=s_churn).prev_sample
    assert not torch.allclose(churned, (1 - after) * point + after * START, rtol=0.1)


# every option of every class

ELSEWHERE: dict[str, str] = {
    "num_train_timesteps": "test_betas_and_timesteps_of_ones_own",
    "trained_betas": "test_betas_and_timesteps_of_ones_own",
    "beta_schedule": "test_other_betas",
    "beta_start": "test_other_betas",
    "beta_end": "test_other_betas",
    "prediction_type": "test_agreement",
    "thresholding": "test_thresholds_in_every_class",
    "dynamic_thresholding_ratio": "test_thresholds_in_every_class",
    "sample_max_value": "test_thresholds_in_every_class",
    "clip_sample": "test_thresholds_in_every_class",
    "clip_sample_range": "test_thresholds_in_every_class",
    "rescale_betas_zero_snr": "test_zero_terminal_snr",
    "use_flow_sigmas": "test_flow_sigmas_of_every_solver",
    "flow_shift": "test_flow_sigmas_of_every_solver",
    "use_dynamic_shifting": "test_dynamic_shifting_of_the_solvers",
    "time_shift_type": "test_dynamic_shifting_of_the_solvers",
    "lambda_min_clipped": "test_lambda_min",
    "variance_type": "the solvers drop the variance half of an output; here the network that is "
    "given does",
    "kwargs": "takes the old names of other options",
}
"""Options that mean the same in every class that has them; test_other_betas stands for the tables,
which are one here.
"""
OF_CLASSES: dict[str, dict[str, str]] = {
    "DDIMInverseScheduler": dict.fromkeys(
        ("clip_sample", "clip_sample_range"), "test_agreement_with_inverse_ddim"
    ),
    **dict.fromkeys(
        ("CogVideoXDDIMScheduler", "CogVideoXDPMScheduler"),
        dict.fromkeys(
            ("snr_shift_scale", "timestep_spacing", "steps_offset", "set_alpha_to_one"),
            "test_cogvideox",
        ),
    ),
    "PNDMScheduler": {"timestep_spacing": "test_plms_in_few_steps"},
    "FlowMatchLCMScheduler": dict.fromkeys(
        ("scale_factors", "upscale_mode"), "resize the images between the steps"
    ),
    "DDIMScheduler": {
        "thresholding": "test_agreement_with_ddim",
        **dict.fromkeys(
            ("clip_sample", "clip_sample_range"), "test_agreement_with_ddim_that_keeps_its_noise"
        ),
    },
    "DDPMScheduler": {
        "variance_type": "test_agreement_with_the_peer",
        "thresholding": "test_agreement_with_ddpm",
    },
    "UnCLIPScheduler": {
        "variance_type": "test_fixed_large_log_is_fixed_large",
        "beta_schedule": "test_unclip",
    },
    "DEISMultistepScheduler": {"algorithm_type": "has one value", "solver_type": "has one value"},
    "DPMSolverMultistepInverseScheduler": {
        **dict.fromkeys(SIGMAS.values(), "test_inversion_on_sigmas"),
        **dict.fromkeys(
            ("use_flow_sigmas", "flow_shift"), "test_inversion_of_a_flow_goes_down_there"
        ),
        "timestep_spacing": "test_inversion_from_an_offset",
        "steps_offset": "test_inversion_from_an_offset",
        "lower_order_final": "test_the_end_of_an_inversion",
        "euler_at_final": "test_the_end_of_an_inversion",
        "lambda_min_clipped": "test_inversion_from_a_clipped_lambda",
    },
    "SASolverScheduler": {
        "algorithm_type": "test_noise_prediction_of_sa_solver",
        "lower_order_final": "test_solver_spacings",
        **dict.fromkeys(SIGMAS.values(), "test_sa_solver_on_sigmas"),
        "lambda_min_clipped": "test_clipped_lambda",
    },
    "UniPCMultistepScheduler": {
        "solver_p": "is another scheduler that predicts in its place; here that is a method of its "
        "own",
        **dict.fromkeys(("sigma_min", "sigma_max", "shift_terminal"), "test_flow_grids_of_unipc"),
    },
    "EulerDiscreteScheduler": {
        "interpolation_type": "test_log_linear_interpolation_of_euler",
        "timestep_type": "test_continuous_timesteps_of_euler",
    },
    "DPMSolverSDEScheduler": {
        "noise_sampler_seed": "seeds their Brownian path; here a run is given seeds"
    },
    "IPNDMScheduler": {
        "num_train_timesteps": "test_ipndm",
        "trained_betas": "are no betas there but a table of sin: the schedule of test_ipndm",
    },
    "CMStochasticIterativeScheduler": {
        **dict.fromkeys(
            ("num_train_timesteps", "sigma_min", "sigma_max", "sigma_data", "s_noise", "rho"),
            "test_consistency",
        ),
        "clip_denoised": "is Clip(1.0), see test_a_run_is_the_table_on_a_clipped_network",
    },
    "EDMEulerScheduler": dict.fromkeys(
        ("sigma_min", "sigma_max", "sigma_data", "sigma_schedule", "rho", "final_sigmas_type"),
        "test_options_of_edm",
    )
    | {"num_train_timesteps": "is the default number of steps", "prediction_type": "test_edm"},
    "EDMDPMSolverMultistepScheduler": dict.fromkeys(
        (
            *(
                "sigma_min",
                "sigma_max",
                "sigma_data",
                "sigma_schedule",
                "rho",
                "final_sigmas_type",
                "solver_order",
            ),
            *("algorithm_type", "lower_order_final", "euler_at_final"),
        ),
        "test_options_of_edm",
    )
    | {
        "num_train_timesteps": "is the default number of steps",
        "prediction_type": "test_edm",
        "solver_type": "test_edm",
    },
    "FlowMatchEulerDiscreteScheduler": {
        "shift": "test_flow_shift",
        "num_train_timesteps": "scales the network's time alone",
        **dict.fromkeys(
            ("base_shift", "max_shift", "base_image_seq_len", "max_image_seq_len"),
            "test_resolution_dependent_shift",
        ),
        "invert_sigmas": "test_inverted_sigmas",
        "shift_terminal": "test_flow_dynamic_shifting",
        "use_dynamic_shifting": "test_flow_dynamic_shifting",
        "time_shift_type": "test_both_kinds_of_dynamic_shifting",
        "stochastic_sampling": "test_flow_shift",
        **dict.fromkeys(SIGMAS.values(), "test_flow_sigmas"),
    },
    "FlowMatchHeunDiscreteScheduler": {"shift": "test_flow_shift"},
    "KarrasVeScheduler": dict.fromkeys(
        ("sigma_min", "sigma_max", "s_noise", "s_churn", "s_min", "s_max"), "test_karras_ve"
    ),
    "RePaintScheduler": {
        "eta": "test_agreement_with_the_peer_on_a_coarser_grid",
        "clip_sample": "test_agreement_with_the_peer_that_clips",
    },
    "LCMScheduler": {
        "original_inference_steps": "test_lcm",
        "timestep_scaling": "test_agreement",
        **dict.fromkeys(
            ("timestep_spacing", "steps_offset"),
            "is read nowhere: the times are those of distillation",
        ),
        "set_alpha_to_one": "is of no effect: the last step ends in x_0 itself",
    },
    "TCDScheduler": {
        "original_inference_steps": "test_lcm",
        **dict.fromkeys(
            ("timestep_spacing", "steps_offset"),
            "is read nowhere: the times are those of distillation",
        ),
        **dict.fromkeys(
            (
                "thresholding",
                "dynamic_thresholding_ratio",
                "sample_max_value",
                "clip_sample",
                "clip_sample_range",
            ),
            "test_tcd_has_the_options_and_clips_nothing",
        ),
        "set_alpha_to_one": "test_the_final_alpha_of_tcd",
        "timestep_scaling": "is read nowhere: TCD has no boundary condition to scale",
    },
    "VQDiffusionScheduler": dict.fromkeys(
        ("num_vec_classes", "alpha_cum_start", "alpha_cum_end", "gamma_cum_start", "gamma_cum_end"),
        "test_agreement_with_the_peer_s_posterior",
    ),
    "ScoreSdeVeScheduler": dict.fromkeys(
        ("snr", "sigma_min", "sigma_max", "sampling_eps", "correct_steps"),
        "test_agreement_with_the_ve_peer",
    ),
    "ScoreSdeVpScheduler": dict.fromkeys(
        ("beta_min", "beta_max", "sampling_eps"), "test_agreement_with_the_vp_peer"
    ),
}
LIKE = {
    "DDIMParallelScheduler": "DDIMScheduler",
    "DDPMParallelScheduler": "DDPMScheduler",
    "FlowMatchLCMScheduler": "FlowMatchEulerDiscreteScheduler",
}
"""Classes that are another one with a change to what this table does not list."""


def peer_classes() -> dict[str, Any]:
    """Every class of diffusers that a sampler is named after."""
    old = {"KarrasVeScheduler": KarrasVeScheduler, "ScoreSdeVpScheduler": ScoreSdeVpScheduler}
    named = {name for names in all_names().values() for name in names if name.endswith("Scheduler")}
    return {name: old.get(name) or getattr(peers, name) for name in sorted(named)}


def test_every_option_of_every_class() -> None:
    tests = set(
        re.findall(
            r"^def (test_\w+)\(",
            "".join(p.read_text() for p in Path(__file__).parent.glob("test_*.py")),
            re.M,
        )
    )
    missing = []
    for name, peer in peer_classes().items():
        options = set(inspect.signature(peer).parameters)
        tested = {
            option
            for case in CASES
            if case.peer.__name__ in (name, LIKE.get(name))
            for option in case.config
        }
        said = {**ELSEWHERE, **OF_CLASSES.get(LIKE.get(name, ""), {}), **OF_CLASSES.get(name, {})}
        assert set(OF_CLASSES.get(name, {})) <= options, f"{name} has no such options"
        missing += [f"{name}({option})" for option in sorted(options - tested - set(said))]
        named = {said[option] for option in options & set(said) if said[option].startswith("test_")}
        assert named <= tests, f"no such tests: {named - tests}"
    assert not missing, missing
