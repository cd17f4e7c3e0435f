"""Agreement with diffusers in the options that move its knots: sigma-spaced grids and flows in
every solver, T steps.

Some classes repeat their last knot, some round the network's time, some leave the grid that they
name. A sampler of ours is laid where theirs stand, after it was checked that ours stand there too,
or that theirs cannot be meant.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from itertools import product
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from all_pairs import all_pairs
from alphabar.noising import NoiseSchedule
from alphabar.sampling import Sampler
from alphabar.sampling.grids import make_knots
from alphabar.sampling.knots import Knot
from test_agreement_diffusers import (
    BETAS,
    MULTI,
    RELATIVE,
    SIGMAS,
    SPACINGS,
    START,
    STEPS,
    constant,
    difference,
    last_output,
    network,
    ours,
    peers,
    theirs,
)

PREDICTIONS = ("epsilon", "v_prediction")
T = 1000
EVERYWHERE = (-math.inf, math.inf)


def laid(schedule: NoiseSchedule, method: str, knots: Sequence[Knot], **options: Any) -> Sampler:
    return Sampler(schedule, method, len(knots) - 1, lambda *_: tuple(knots), **options)


def repeated(knots: Sequence[Knot], times: Sequence[float]) -> list[Knot]:
    """Ours at their times, with the last knot twice, as far apart as a step must be."""
    for knot, t in zip(knots, times, strict=True):
        assert abs(knot.timestep - t) <= 1
    last = knots[-1].sigma_ve * (1 - 1e-9)
    norm = math.hypot(1.0, last)
    end = replace(knots[-1], alpha=1 / norm, sigma=last / norm)
    return [replace(knot, timestep=float(t)) for knot, t in zip(knots, times, strict=True)] + [end]


# sigma-spaced grids that end at sigma_min, which is there twice


def on_sigmas(
    method: str,
    scheduler: Any,
    grid: str,
    steps: int,
    options: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
) -> float:
    schedule = NoiseSchedule.scaled_linear(prediction=scheduler.config.prediction_type)
    knots = make_knots(schedule, steps - 1, grid, final="sigma_min")
    scheduler.set_timesteps(steps)
    # float32
    assert scheduler.sigmas[:-1].tolist() == pytest.approx(
        [knot.sigma_ve for knot in knots], rel=3e-5
    )
    set_timesteps = scheduler.set_timesteps

    def exactly(*arguments: Any, **more: Any) -> None:
        set_timesteps(*arguments, **more)
        scheduler.sigmas = torch.tensor(
            [knot.sigma_ve for knot in [*knots, knots[-1]]], dtype=torch.float64
        )

    scheduler.set_timesteps = exactly  # their float32 levels alone would differ by up to 1.4e-5
    their = theirs(scheduler, steps, monkeypatch)
    return difference(
        ours(laid(schedule, method, repeated(knots, scheduler.timesteps.tolist()), **options)),
        their,
    )


@pytest.mark.parametrize(
    ("orders", "tau", "grid"),
    all_pairs([(1, 1), (2, 2), (3, 4), (1, 4)], [None, 0.5, 1.0], list(SIGMAS)),
    ids=str,
)
def test_sa_solver_on_sigmas(
    orders: tuple[int, int], tau: float | None, grid: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for steps, prediction in product(STEPS, PREDICTIONS):
        own: dict[str, Any] = {"predictor_order": orders[0], "corrector_order": orders[1]}
        scheduler = peers.SASolverScheduler(
            **BETAS,
            **own,
            **{SIGMAS[grid]: True},
            prediction_type=prediction,
            tau_func=tau and constant(tau),
        )
        options = own | ({} if tau is None else {"tau": tau, "tau_timesteps": EVERYWHERE})
        assert on_sigmas("sa_solver", scheduler, grid, steps, options, monkeypatch) < RELATIVE


@pytest.mark.parametrize(
    ("order", "lower_order_final", "grid"),
    all_pairs([1, 2, 3], [True, False], list(SIGMAS)),
    ids=str,
)
def test_deis_on_sigmas(
    order: int, lower_order_final: bool, grid: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for steps, prediction in product(STEPS, PREDICTIONS):
        scheduler = peers.DEISMultistepScheduler(
            **BETAS,
            solver_order=order,
            lower_order_final=lower_order_final,
            prediction_type=prediction,
            **{SIGMAS[grid]: True},
        )
        options = {"order": order, "lower_order_final": lower_order_final}
        assert on_sigmas("deis", scheduler, grid, steps, options, monkeypatch) < RELATIVE


def test_sa_solver_without_a_corrector_is_an_assertion_there(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    scheduler = peers.SASolverScheduler(**BETAS, predictor_order=2, corrector_order=0)
    with pytest.raises(AssertionError):
        theirs(scheduler, 7, monkeypatch)
    sampler = Sampler(
        NoiseSchedule.scaled_linear(), "sa_solver", 7, predictor_order=2, corrector_order=0
    )
    corrected = Sampler(
        NoiseSchedule.scaled_linear(), "sa_solver", 7, predictor_order=2, corrector_order=2
    )
    assert 0 < difference(ours(sampler), ours(corrected)) < 0.2


# flows


def where_theirs_stand(scheduler: Any) -> list[Knot]:
    """Their knots on a flow; where the last one is repeated, a hair below."""
    times, levels = scheduler.timesteps.tolist(), scheduler.sigmas.tolist()
    end = levels[-1] * (1 - 1e-9) if levels[-1] == levels[-2] else levels[-1]
    return [Knot(float(t), 1 - s, s) for t, s in zip(times, levels, strict=False)] + [
        Knot(0.0, 1 - end, end)
    ]


FLOW_SOLVERS = [
    *(("deis", peers.DEISMultistepScheduler, {"solver_order": o}, {"order": o}) for o in (1, 2, 3)),
    (
        "sa_solver",
        peers.SASolverScheduler,
        {"tau_func": constant(0.0)},
        {"tau": 0.0, "tau_timesteps": EVERYWHERE},
    ),
    (
        "sa_solver",
        peers.SASolverScheduler,
        {"tau_func": constant(0.5)},
        {"tau": 0.5, "tau_timesteps": EVERYWHERE},
    ),
    ("unipc", peers.UniPCMultistepScheduler, {}, {}),
]


@pytest.mark.parametrize(("method", "peer", "config", "options"), FLOW_SOLVERS)
@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_flow_sigmas_of_every_solver(
    method: str,
    peer: Any,
    config: dict[str, Any],
    options: dict[str, Any],
    shift: float,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    schedule = NoiseSchedule.flow(shift=shift)
    for steps in STEPS:
        scheduler = peer(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=shift, **config
        )
        their = theirs(scheduler, steps, monkeypatch, in_double=True)
        ends = {} if method == "unipc" else {"start": 1 - 1 / T, "end": 0.0}
        laid_by_us = make_knots(schedule, steps, "flow", drop_last=True, **ends)
        assert [k.sigma for k in laid_by_us[:-1]] == pytest.approx(
            scheduler.sigmas[:-1].tolist(), abs=3e-3
        )
        assert (
            difference(
                ours(laid(schedule, method, where_theirs_stand(scheduler), **options)), their
            )
            < RELATIVE
        )


def test_bh1_of_unipc_on_a_flow(monkeypatch: pytest.MonkeyPatch) -> None:
    """Into σ = 0 theirs multiply h = ∞ by 0; what it must return is the x_0 of the last evaluation."""
    schedule = NoiseSchedule.flow()
    config = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "solver_type": "bh1"}
    for steps in STEPS:
        scheduler = peers.UniPCMultistepScheduler(**config)
        scheduler.set_timesteps(steps)
        mine = ours(laid(schedule, "unipc", where_theirs_stand(scheduler), solver_type="bh1"))
        scheduler = peers.UniPCMultistepScheduler(**config, final_sigmas_type="sigma_min")
        assert (
            difference(mine, last_output(scheduler, schedule, steps, monkeypatch, in_double=True))
            < RELATIVE
        )


@pytest.mark.parametrize("mu", [0.5, 1.15])
@pytest.mark.parametrize("terminal", [None, 0.1])
def test_dynamic_shifting_of_unipc(
    mu: float, terminal: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    schedule = NoiseSchedule.flow()
    for steps in STEPS:
        scheduler: Any = peers.UniPCMultistepScheduler(
            prediction_type="flow_prediction",
            use_flow_sigmas=True,
            use_dynamic_shifting=True,
            shift_terminal=terminal,
        )
        setup = {"sigmas": np.linspace(1.0, 1 / steps, steps), "mu": mu}
        their = theirs(scheduler, steps, monkeypatch, setup=setup, in_double=True)
        levels = make_knots(schedule, steps, "flow", mu=mu, end=1 / steps, shift_terminal=terminal)
        assert [k.sigma for k in levels] == pytest.approx(scheduler.sigmas.tolist(), abs=2e-6)
        assert (
            difference(ours(laid(schedule, "unipc", where_theirs_stand(scheduler))), their)
            < RELATIVE
        )


@pytest.mark.parametrize("kind", ["exponential", "linear"])
@pytest.mark.parametrize("tokens", [256, 1024, 4096])
def test_both_kinds_of_dynamic_shifting(
    kind: str, tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    mu = 0.5 + (1.15 - 0.5) * (tokens - 256) / (4096 - 256)
    schedule = NoiseSchedule.flow().shifted_for_tokens(tokens, kind=kind)
    for steps in STEPS:
        scheduler: Any = peers.FlowMatchEulerDiscreteScheduler(
            use_dynamic_shifting=True, time_shift_type=kind
        )
        setup = {"sigmas": np.linspace(1.0, 1 / steps, steps).tolist(), "mu": mu}
        their = theirs(scheduler, 0, monkeypatch, setup=setup)
        assert difference(ours(Sampler(schedule, "euler", steps, "trailing")), their) < RELATIVE


# Euler between log sigmas, Heun on its "exp" betas


def rescaled_end(their: Tensor, scheduler: Any) -> Tensor:
    return (
        their
        * math.hypot(float(scheduler.sigmas[-1]), 1)
        / math.hypot(float(scheduler.sigmas[-2]), 1)
    )


@pytest.mark.parametrize("prediction", [*PREDICTIONS, "sample"])
@pytest.mark.parametrize("spacing", SPACINGS)
def test_log_linear_interpolation_of_euler(
    spacing: str, prediction: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Theirs are the exponential grid, whatever the spacing, shown at the spacing's times; they lay
    a knot too many.
    """
    schedule = NoiseSchedule.scaled_linear(prediction=prediction)
    for steps in STEPS:
        scheduler: Any = peers.EulerDiscreteScheduler(
            **BETAS,
            interpolation_type="log_linear",
            prediction_type=prediction,
            timestep_spacing=spacing,
        )
        their = rescaled_end(theirs(scheduler, steps, monkeypatch), scheduler)
        assert len(scheduler.sigmas) == steps + 2
        knots = make_knots(schedule, steps, "exponential", final="sigma_min")
        assert [k.sigma_ve for k in knots] == pytest.approx(
            scheduler.sigmas[:-1].tolist(), rel=3e-5
        )
        moved = [
            replace(k, timestep=float(t))
            for k, t in zip(knots, scheduler.timesteps.tolist(), strict=False)
        ]
        assert difference(ours(laid(schedule, "euler", [*moved, knots[-1]])), their) < RELATIVE


@pytest.mark.parametrize("grid", SIGMAS)
def test_log_linear_interpolation_does_nothing_on_sigmas(
    grid: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for steps in STEPS:
        scheduler = peers.EulerDiscreteScheduler(
            **BETAS, interpolation_type="log_linear", **{SIGMAS[grid]: True}
        )
        their = theirs(scheduler, steps, monkeypatch)
        assert (
            difference(ours(Sampler(NoiseSchedule.scaled_linear(), "euler", steps, grid)), their)
            < RELATIVE
        )


@pytest.mark.parametrize("prediction", [*PREDICTIONS, "sample"])
@pytest.mark.parametrize("spacing", SPACINGS)
def test_heun_on_its_exp_betas(
    spacing: str, prediction: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its table is in float32: with the exact one, the two agree; without, to 1.4e-5, the
    difference of the tables.
    """
    schedule = NoiseSchedule.exp(prediction=prediction)
    between = {"interpolation": "sigma"} if spacing != "trailing" else {}
    for steps in STEPS:
        scheduler: Any = peers.HeunDiscreteScheduler(
            beta_schedule="exp", prediction_type=prediction, timestep_spacing=spacing
        )
        sampler = Sampler(schedule, "heun", steps, spacing, **between)
        untouched = theirs(scheduler, steps, monkeypatch, evaluations=2)
        assert difference(ours(sampler), untouched) < 2 * RELATIVE
        scheduler.alphas_cumprod = schedule.alphas_cumprod
        assert (
            difference(ours(sampler), theirs(scheduler, steps, monkeypatch, evaluations=2))
            < RELATIVE
        )


# as many steps as there are timesteps


def deterministic(sampler: Sampler) -> Tensor:
    x = START
    for progress in sampler.iterate(lambda x, t: network(x, t[0].double()), x, dtype=torch.float64):
        x = progress.x
    return x


@pytest.mark.parametrize(
    ("method", "peer"),
    [
        ("dpm_solver_multistep", MULTI),
        ("unipc", peers.UniPCMultistepScheduler),
        ("deis", peers.DEISMultistepScheduler),
    ],
)
def test_t_steps(method: str, peer: Any) -> None:
    """Theirs show one time twice on linspace, and on leading stand still at 0; ours are the T
    timesteps on every spacing.
    """
    schedule = NoiseSchedule.scaled_linear()
    for spacing in SPACINGS:
        scheduler = peer(**BETAS, timestep_spacing=spacing)
        scheduler.set_timesteps(T)
        distinct = len(set(scheduler.timesteps.tolist()))
        assert distinct == {"linspace": T - 1, "leading": 1, "trailing": T}[spacing]
        times = Sampler(schedule, method, T, spacing).timesteps
        assert times == pytest.approx(list(range(T - 1, -1, -1)), abs=1e-9)
