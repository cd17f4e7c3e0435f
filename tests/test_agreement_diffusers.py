"""Agreement with diffusers 0.42.1 to 1e-5 on a nonlinear network: same start, same draws, same
grid, whole runs.

Every row of CASES is a class of diffusers with a config, and a method of ours on the grid that it
must agree on. The peers are run as they are, float32 tables and all. Where a peer lays its grid or
steps in another way than its own timesteps say, the row or the test repeats that, and says so;
where a peer is wrong, the test says what is right, and that the peer differs.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from fractions import Fraction
from itertools import product
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import schedulers as peers
from diffusers.schedulers.deprecated.scheduling_karras_ve import KarrasVeScheduler
from torch import Tensor

from alphabar.noising import NoiseSchedule
from alphabar.sampling import Knot, Sampler, make_knots
from alphabar.sampling.grids import grid_options
from alphabar.sampling.kernel import run
from oracles import DATA, moments, point_mass_defect

RELATIVE = 1e-5
T = 1000
STEPS = (7, 20)
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
DRAWS = [(normal(4, CHANNELS), normal(4, CHANNELS)) for _ in range(41)]
"""The draws of each step; a method with a point between the knots has two."""


def network(x: Tensor, t: Tensor | float, unit: float = T) -> Tensor:
    """A fixed tanh network over channels that depends on t smoothly; ``unit`` is the span of t."""
    time = float(t) / unit
    return torch.tanh(x.double() @ INWARD + PHASE * math.cos(3 * time) + time) @ OUTWARD


Network = Callable[..., Tensor]


def ours(sampler: Sampler, net: Network = network) -> Tensor:
    """Run ours; each step takes its own draws, as the peers do that draw where they need not."""
    drawn: list[int] = []
    step = 0

    def noise(start: float, end: float) -> Tensor:
        drawn.append(step)
        return DRAWS[step][drawn.count(step) - 1]

    x = START
    for progress in run(sampler.table, x, lambda x, knot: net(x, knot.timestep), noise):
        x, step = progress.x, progress.step
    return x


def theirs(
    scheduler: Any,
    steps: int,
    monkeypatch: pytest.MonkeyPatch,
    *,
    net: Network = network,
    evaluations: int = 1,
    before: Callable[[Any, Any], None] | None = None,
    setup: dict[str, Any] | None = None,
    quiet_end: bool = False,
    in_double: bool = False,
    **step_options: Any,
) -> Tensor:
    """Run a peer; ``evaluations`` are its steps for one of ours, ``before(scheduler, i)`` is called
    before each.

    ``quiet_end``: without the noise that it adds in its last step. ``in_double``: its coefficients
    in float64.
    """
    i = 0

    def draw(*_: Any, **__: Any) -> Tensor:
        return DRAWS[i // evaluations][0] * (not quiet_end or i < len(scheduler.timesteps) - 1)

    monkeypatch.setattr(
        sys.modules[type(scheduler).__module__], "randn_tensor", draw, raising=False
    )
    scheduler.set_timesteps(**(setup or {"num_inference_steps": steps}))
    if in_double:
        scheduler.sigmas = scheduler.sigmas.double()
    x = START * start_scale(scheduler)
    for i, t in enumerate(scheduler.timesteps):
        scaled = scheduler.scale_model_input(x, t) if hasattr(scheduler, "scale_model_input") else x
        out = net(scaled, t)
        if before:
            before(scheduler, i)
        x = scheduler.step(out, t, x, **step_options).prev_sample
    return x.double() / (
        math.hypot(float(scheduler.sigmas[-1]), 1.0) if isinstance(scheduler, EULER_FAMILY) else 1.0
    )


def start_scale(scheduler: Any) -> float:
    """The Euler family keeps x / α. Its init_noise_sigma is σ / α for linspace and trailing; the
    marginal has more.
    """
    if isinstance(scheduler, EULER_FAMILY):
        return math.hypot(float(scheduler.sigmas[0]), 1.0)
    return 1.0


EULER_FAMILY = (
    peers.EulerDiscreteScheduler,
    peers.EulerAncestralDiscreteScheduler,
    peers.HeunDiscreteScheduler,
    peers.KDPM2DiscreteScheduler,
    peers.KDPM2AncestralDiscreteScheduler,
    peers.LMSDiscreteScheduler,
    peers.DPMSolverSDEScheduler,
)


def difference(a: Tensor, b: Tensor) -> float:
    """How far a is from b, relative to the largest of b; not a number where b has such."""
    assert a.isfinite().all()
    return float((a - b).abs().max() / b.abs().max())


@dataclass(frozen=True)
class Case:
    """A class of diffusers with its config, and our method and grid that must agree with it."""

    peer: Any
    method: str
    grid: Any
    config: dict[str, Any] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)  # of our method and grid
    step: dict[str, Any] = field(default_factory=dict)  # of their step
    predictions: tuple[str, ...] = ("epsilon", "v_prediction", "sample")
    steps: tuple[int, ...] = STEPS
    evaluations: int = 1
    exact_table: bool = False  # at t = 0 their float32 table is off by 3e-5, which some divide by
    in_double: bool = False  # their closed forms cancel in float32
    quiet_end: bool = False  # they add noise to what they return
    their_times: bool = False  # they cut a network time of 998.9999 to 998
    before: Any = None
    fewer: int = 0  # steps of theirs that do nothing

    def __str__(self) -> str:
        words = [f"{k}={v}" for k, v in {**self.config, **self.step}.items() if k != "clip_sample"]
        return "-".join([self.peer.__name__.removesuffix("Scheduler"), self.method, *words])

    def schedules(self) -> Iterator[NoiseSchedule]:
        for prediction in self.predictions:
            schedule = NoiseSchedule.scaled_linear(prediction=prediction)
            yield (
                schedule.zero_terminal_snr()
                if self.config.get("rescale_betas_zero_snr")
                else schedule
            )

    def scheduler(self, schedule: NoiseSchedule) -> Any:
        scheduler = self.peer(
            **{"prediction_type": schedule.prediction.name, **BETAS, **self.config}
        )
        if self.exact_table:
            scheduler.alphas_cumprod = schedule.alphas_cumprod
            scheduler.initial_alpha_cumprod = scheduler.alphas_cumprod[0]
        return scheduler

    def sampler(self, schedule: NoiseSchedule, scheduler: Any, steps: int) -> Sampler:
        steps -= self.fewer
        if not self.their_times:
            return Sampler(schedule, self.method, steps, self.grid, **self.options)
        of_grid = {k: v for k, v in self.options.items() if k in grid_options(self.grid)}
        knots = make_knots(schedule, steps, self.grid, **of_grid)
        times = scheduler.timesteps.tolist()
        assert all(abs(k.timestep - t) <= 1 for k, t in zip(knots, times, strict=False))
        knots = (
            *(replace(k, timestep=float(t)) for k, t in zip(knots, times, strict=False)),
            *knots[len(times) :],
        )
        of_method = {k: v for k, v in self.options.items() if k not in of_grid}
        return Sampler(schedule, self.method, steps, lambda schedule, steps: knots, **of_method)

    def runs(self) -> Iterator[tuple[NoiseSchedule, int]]:
        """Every prediction and every number of steps, in turn, paired in one way or the other from
        case to case.
        """
        schedules, turn = list(self.schedules()), len(str(self))
        for k in range(max(len(schedules), len(self.steps))):
            yield schedules[k % len(schedules)], self.steps[(k + turn) % len(self.steps)]

    def differences(self, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[str, float]]:
        for schedule, steps in self.runs():
            scheduler = self.scheduler(schedule)
            their = theirs(
                scheduler,
                steps,
                monkeypatch,
                evaluations=self.evaluations,
                before=self.before,
                quiet_end=self.quiet_end,
                in_double=self.in_double,
                **self.step,
            )
            mine = ours(self.sampler(schedule, scheduler, steps))
            yield f"{schedule.prediction.name}, {steps} steps", difference(mine, their)


# how the families lay a spacing

WHOLE: dict[str, dict[str, Any]] = {"linspace": {"rounded": True}, "leading": {}, "trailing": {}}
BETWEEN: dict[str, dict[str, Any]] = {
    "linspace": {"interpolation": "sigma"},
    "leading": {},
    "trailing": {},
}
DROPPED: dict[str, dict[str, Any]] = {
    "linspace": {"rounded": True, "drop_last": True},
    "leading": {"drop_last": True},
    "trailing": {},
}


def spaced(
    case: Case, options: dict[str, dict[str, Any]], spacings: tuple[str, ...] = SPACINGS
) -> list[Case]:
    """The case on each spacing, and with an offset of 1 on leading."""
    rows = [
        replace(
            case,
            grid=s,
            config={"timestep_spacing": s, **case.config},
            options={**options[s], **case.options},
        )
        for s in spacings
    ]
    if "leading" in spacings:
        config = {"timestep_spacing": "leading", "steps_offset": 1, **case.config}
        offset = {**options["leading"], "steps_offset": 1, **case.options}
        rows.append(replace(case, grid="leading", config=config, options=offset))
    return rows


SIGMAS = {
    "karras": "use_karras_sigmas",
    "exponential": "use_exponential_sigmas",
    "beta": "use_beta_sigmas",
}


def euler_sigmas(case: Case, karras_rounding: str | None = None) -> list[Case]:
    """σ-spaced grids of the Euler family: the range is that of the spacing; only KDPM2 rounds the
    network's time.
    """
    rows = []
    for grid, s in product(SIGMAS, SPACINGS):
        options = {
            "range_from": s,
            "rounding": karras_rounding if grid == "karras" else None,
            **case.options,
        }
        rows.append(
            replace(
                case, grid=grid, config={SIGMAS[grid]: True, "timestep_spacing": s}, options=options
            )
        )
    return rows


def solver_sigmas(case: Case, **extra: str) -> list[Case]:
    """σ-spaced grids of the DPM-Solver family: the network's time is rounded for Karras (and lu),
    else cut to an integer.
    """
    rows = []
    for grid, flag in {**SIGMAS, **extra}.items():
        options = {"rounding": "nearest" if grid in ("karras", "lu") else "down", **case.options}
        cut = options["rounding"] == "down"
        rows.append(
            replace(
                case,
                grid=grid,
                config={flag: True, **case.config},
                options=options,
                their_times=cut,
            )
        )
    return rows


def true_gaps(scheduler: Any, i: int) -> None:
    """Classes that step to t - T // N, which is not the next timestep of their grid (linspace;
    trailing when N does not divide T): T // (T / gap) is the gap."""
    t = scheduler.timesteps.tolist()
    scheduler.num_inference_steps = Fraction(T, t[i] - ([*t, -1])[i + 1])


NO_CLIP = {"clip_sample": False}
EPS_V = ("epsilon", "v_prediction")
MULTI, SINGLE = peers.DPMSolverMultistepScheduler, peers.DPMSolverSinglestepScheduler

DDIM = [
    case
    for eta in (0.0, 0.5, 1.0)
    for case in spaced(
        Case(
            peers.DDIMScheduler, "ddim", None, NO_CLIP, {"eta": eta}, {"eta": eta}, before=true_gaps
        ),
        WHOLE,
    )
]
DDIM_INVERSE = [
    Case(
        peers.DDIMInverseScheduler,
        "ddim_inverse",
        "leading",
        NO_CLIP,
        predictions=EPS_V,
        steps=(8, 20),
    ),
    Case(
        peers.DDIMInverseScheduler,
        "ddim_inverse",
        "trailing",
        {**NO_CLIP, "timestep_spacing": "trailing"},
        predictions=EPS_V,
        steps=(8, 20),
    ),
    Case(
        peers.DDIMInverseScheduler,
        "ddim_inverse",
        "leading",
        {**NO_CLIP, "set_alpha_to_one": False, "steps_offset": 1},
        {"steps_offset": 1, "final": "sigma_min"},
        steps=(8, 20),
        exact_table=True,
    ),
]
DDPM = [
    case
    for kind in ("fixed_small", "fixed_small_log", "fixed_large")
    for case in spaced(
        Case(
            peers.DDPMScheduler,
            "ddpm",
            None,
            {**NO_CLIP, "variance_type": kind},
            {"variance_type": kind},
        ),
        WHOLE,
    )
]
DDPM = [replace(c, quiet_end=c.config["variance_type"] == "fixed_large") for c in DDPM]
EULER = Case(peers.EulerDiscreteScheduler, "euler", None)
ANCESTRAL = Case(peers.EulerAncestralDiscreteScheduler, "euler_ancestral", None, predictions=EPS_V)
HEUN = Case(peers.HeunDiscreteScheduler, "heun", None, evaluations=2, exact_table=True)
KDPM2 = Case(peers.KDPM2DiscreteScheduler, "dpm_2", None, predictions=EPS_V, evaluations=2)
KDPM2_ANCESTRAL = Case(
    peers.KDPM2AncestralDiscreteScheduler, "dpm_2_ancestral", None, predictions=EPS_V, evaluations=2
)
LMS = Case(peers.LMSDiscreteScheduler, "lms", None)
SDE = Case(peers.DPMSolverSDEScheduler, "dpmpp_sde", None, predictions=EPS_V, evaluations=2)
EULERS = [
    *spaced(EULER, BETWEEN),
    *euler_sigmas(EULER),
    *spaced(ANCESTRAL, BETWEEN),
    *spaced(HEUN, BETWEEN),
    *euler_sigmas(HEUN),
    *spaced(KDPM2, BETWEEN),
    *euler_sigmas(replace(KDPM2, steps=(7,)), "nearest"),
    *spaced(KDPM2_ANCESTRAL, BETWEEN),
    *euler_sigmas(replace(KDPM2_ANCESTRAL, steps=(7,)), "nearest"),
    *(
        case
        for order in (1, 2, 3, 4)
        for case in spaced(replace(LMS, options={"order": order}, step={"order": order}), BETWEEN)
    ),
    *euler_sigmas(LMS),
    *spaced(SDE, BETWEEN),
    *euler_sigmas(SDE),
]


def solver(peer: Any, method: str, ours: dict[str, Any] | None = None, **theirs: Any) -> Case:
    """A row of the DPM-Solver family; ``theirs`` is the config, of which ours has the same under
    shorter names.
    """
    names = {"solver_order": "order", "algorithm_type": "algorithm"}
    options = {names.get(k, k): v for k, v in theirs.items() if k != "final_sigmas_type"}
    if "final_sigmas_type" in theirs:
        options["final"] = theirs["final_sigmas_type"]
    return Case(peer, method, None, theirs, options if ours is None else ours)


def solver_rows(peer: Any, method: str, algorithms: tuple[str, ...]) -> Iterator[Case]:
    for order, algorithm, kind in product((1, 2, 3), algorithms, ("midpoint", "heun")):
        if (
            order == 3
            and algorithm.startswith("sde")
            and (method.endswith("multistep") or kind == "heun")
        ):
            continue  # see test_third_order_of_the_sde
        final = "zero" if algorithm.endswith("++") else "sigma_min"
        yield solver(
            peer,
            method,
            solver_order=order,
            algorithm_type=algorithm,
            solver_type=kind,
            final_sigmas_type=final,
        )


ALGORITHMS = ("dpmsolver++", "dpmsolver", "sde-dpmsolver++", "sde-dpmsolver")
MULTISTEP = [
    *(
        c
        for row in solver_rows(MULTI, "dpm_solver_multistep", ALGORITHMS)
        for c in spaced(row, DROPPED, ("linspace",))
    ),
    *(
        c
        for order in (2, 3)
        for c in spaced(solver(MULTI, "dpm_solver_multistep", solver_order=order), DROPPED)
    ),
    *(
        c
        for option in (
            {"lower_order_final": False},
            {"euler_at_final": True},
            {"final_sigmas_type": "sigma_min"},
        )
        for c in spaced(solver(MULTI, "dpm_solver_multistep", solver_order=3, **option), DROPPED)
    ),
    *solver_sigmas(solver(MULTI, "dpm_solver_multistep", solver_order=2), lu="use_lu_lambdas"),
    *solver_sigmas(
        solver(MULTI, "dpm_solver_multistep", solver_order=2, algorithm_type="sde-dpmsolver++")
    ),
    *spaced(Case(MULTI, "dpmpp_2m", None, {"lower_order_final": False}), DROPPED),
    *spaced(
        Case(
            MULTI,
            "dpmpp_2m_sde",
            None,
            {"lower_order_final": False, "algorithm_type": "sde-dpmsolver++"},
        ),
        DROPPED,
    ),
    *spaced(
        Case(
            MULTI,
            "dpmpp_3m",
            None,
            {"lower_order_final": False, "solver_order": 3, "solver_type": "heun"},
        ),
        DROPPED,
    ),
]
SINGLESTEP = [
    *(
        c
        for row in solver_rows(SINGLE, "dpm_solver_singlestep", ALGORITHMS[:3])
        for c in [
            replace(
                row,
                grid="linspace",
                options={**DROPPED["linspace"], **row.options},
                config={
                    "lower_order_final": row.config["final_sigmas_type"] == "zero",
                    **row.config,
                },
                steps=(6, 18) if row.config["final_sigmas_type"] != "zero" else (6, 7, 8, 20),
            )
        ]
    ),
    *solver_sigmas(solver(SINGLE, "dpm_solver_singlestep", solver_order=2)),
]
INVERSE = [
    solver(
        peers.DPMSolverMultistepInverseScheduler,
        "dpm_solver_inverse",
        solver_order=order,
        algorithm_type=algorithm,
        solver_type=kind,
    )
    for order, algorithm, kind in product((1, 2, 3), ALGORITHMS[:2], ("midpoint", "heun"))
]
INVERSE = [
    replace(c, grid="linspace", options={"rounded": True, **c.options}, exact_table=True)
    for c in INVERSE
]
DEIS = [
    c
    for order, lower in product((1, 2, 3), (True, False))
    for c in spaced(
        replace(
            solver(
                peers.DEISMultistepScheduler, "deis", solver_order=order, lower_order_final=lower
            ),
            in_double=True,
        ),
        {s: {**o, "final": "sigma_min"} for s, o in DROPPED.items()},
    )
]
UNIPC = [
    c
    for order, kind, x0 in product((1, 2, 3), ("bh1", "bh2"), (True, False))
    for c in spaced(
        solver(
            peers.UniPCMultistepScheduler,
            "unipc",
            solver_order=order,
            solver_type=kind,
            predict_x0=x0,
            final_sigmas_type="zero" if kind == "bh2" and x0 else "sigma_min",
        ),
        DROPPED,
        ("linspace",),
    )
]
UNIPC += [
    c
    for option in (
        {},
        {"lower_order_final": False, "final_sigmas_type": "sigma_min"},
        {"disable_corrector": (0, 1, 4)},
        {"final_sigmas_type": "sigma_min"},
    )
    for c in spaced(
        replace(
            solver(peers.UniPCMultistepScheduler, "unipc", solver_order=3, **option),
            exact_table=True,
        ),
        DROPPED,
    )
]
UNIPC += solver_sigmas(solver(peers.UniPCMultistepScheduler, "unipc", solver_order=2))


@dataclass(frozen=True)
class constant:  # a function whose printed form says its value
    tau: float

    def __call__(self, t: Any) -> float:
        return self.tau


SA = [
    c
    for (p, q), tau in product(
        ((1, 1), (2, 1), (1, 2), (2, 2), (3, 3), (3, 4)), (None, 0.0, 0.5, 1.0)
    )
    for c in spaced(
        Case(
            peers.SASolverScheduler,
            "sa_solver",
            None,
            {
                "predictor_order": p,
                "corrector_order": q,
                "tau_func": None if tau is None else constant(tau),
            },
            {"predictor_order": p, "corrector_order": q, "final": "sigma_min"}
            | ({} if tau is None else {"tau": tau, "tau_timesteps": (-math.inf, math.inf)}),
            in_double=True,
        ),
        DROPPED,
        SPACINGS if (p, q) == (2, 2) else ("linspace",),
    )
]
PNDM = [
    Case(
        peers.PNDMScheduler,
        "plms" if skip else "pndm",
        "leading",
        {"skip_prk_steps": skip, "set_alpha_to_one": one, "steps_offset": int(not one)},
        {"combine": "output"} | ({} if one else {"steps_offset": 1, "final": "sigma_min"}),
        predictions=EPS_V,
        steps=(10, 20),
    )
    for skip, one in product((True, False), (True, False))
]
FEW = [
    *(
        Case(peers.LCMScheduler, "lcm", "lcm", c, o, steps=(1, 4, 7))
        for c, o in (
            ({}, {}),
            ({"timestep_scaling": 5.0}, {"timestep_scaling": 5.0}),
            ({"timestep_scaling": 0.001}, {"timestep_scaling": 0.001}),  # where c_skip is seen
            ({"original_inference_steps": 25}, {"original_steps": 25}),
        )
    ),
    *(
        Case(peers.TCDScheduler, "tcd", "lcm", {}, {"eta": eta}, {"eta": eta}, steps=(1, 4, 7))
        for eta in (0.0, 0.3, 1.0)
    ),
]
REPEATED = [
    *solver_sigmas(
        solver(peers.DEISMultistepScheduler, "deis", solver_order=2, lower_order_final=False)
    ),
    *solver_sigmas(
        solver(peers.DEISMultistepScheduler, "deis", solver_order=1, lower_order_final=False)
    ),
    *solver_sigmas(
        solver(
            peers.UniPCMultistepScheduler,
            "unipc",
            solver_order=1,
            final_sigmas_type="sigma_min",
            disable_corrector=tuple(range(20)),
        )
    ),
]
REPEATED = [
    replace(c, options={**c.options, "final": "sigma_min"}, fewer=1, in_double=True)
    for c in REPEATED
]
"""They append their lowest σ once more: the last step goes nowhere, and costs an evaluation."""
ENDS = [
    *spaced(
        replace(EULER, config={"final_sigmas_type": "sigma_min"}, options={"final": "sigma_min"}),
        BETWEEN,
        ("trailing",),
    ),
    replace(
        DDIM[3],
        config={**DDIM[3].config, "set_alpha_to_one": False},
        options={**DDIM[3].options, "final": "sigma_min"},
    ),
    *(
        replace(
            EULER,
            grid=grid,
            config={SIGMAS[grid]: True, "sigma_min": 0.1, "sigma_max": 10.0},
            options={"sigma_min": 0.1, "sigma_max": 10.0},
        )
        for grid in SIGMAS
    ),
]
CASES = [
    *DDIM,
    *DDIM_INVERSE,
    *DDPM,
    *EULERS,
    *MULTISTEP,
    *SINGLESTEP,
    *INVERSE,
    *DEIS,
    *UNIPC,
    *SA,
    *PNDM,
    *FEW,
    *REPEATED,
    *ENDS,
]


class Path:
    """What DPMSolverSDEScheduler asks its Brownian tree for: our two draws of the step, the second
    part of the first way.
    """

    def __init__(self) -> None:
        self.calls: list[tuple[float, float]] = []

    def __call__(self, sigma: Any, sigma_next: Any) -> Tensor:
        start, end = float(sigma), float(sigma_next)
        step, second = divmod(len(self.calls), 2)
        self.calls.append((start, end))
        first, rest = DRAWS[step]
        if not second:
            return first
        middle = self.calls[-2][1]
        return (math.sqrt(start - middle) * first + math.sqrt(middle - end) * rest) / math.sqrt(
            start - end
        )


def quick(case: Case) -> Any:
    """Return the case, among the slow tests where the peer takes half a second to find its times."""
    slow = case.peer.__name__.startswith(("KDPM2", "LMS")) and any(
        key.endswith("_sigmas") for key in case.config
    )
    return pytest.param(case, marks=pytest.mark.slow) if slow and case.grid != "karras" else case


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("case", [quick(case) for case in CASES], ids=str)
def test_agreement(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "diffusers.schedulers.scheduling_dpmsolver_sde.BrownianTreeNoiseSampler", lambda *_: Path()
    )
    differences = dict(case.differences(monkeypatch))
    assert all(value < RELATIVE for value in differences.values()), differences


# zero terminal SNR


@dataclass(frozen=True)
class Clamped:
    """A grid with ᾱ = 2^-24 in the place of zero terminal SNR, where σ-spaced peers put it; ours is
    exact.
    """

    name: str
    options: tuple[tuple[str, Any], ...] = ()

    def __call__(self, schedule: NoiseSchedule, steps: int) -> tuple[Knot, ...]:
        first, *rest = make_knots(schedule, steps, self.name, **dict(self.options))
        assert first.alpha == 0.0
        return (Knot(first.timestep, 2.0**-12, math.sqrt(1 - 2.0**-24)), *rest)


ZERO_SNR = {"rescale_betas_zero_snr": True}
V_X0 = ("v_prediction", "sample")
AT_ALPHA_0 = [
    *(
        replace(c, config={**c.config, **ZERO_SNR}, predictions=V_X0)
        for c in [*DDIM, *DDPM]
        if c.grid != "leading" and c.options.get("eta") != 1.0
    ),
    *(
        replace(c, config={**c.config, **ZERO_SNR}, predictions=V_X0)
        for c in FEW
        if "original_steps" not in c.options
    ),
]
"""η = 1 is in test_ddim_of_eta_1_at_zero_terminal_snr."""


@pytest.mark.parametrize("case", AT_ALPHA_0, ids=str)
def test_zero_terminal_snr(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    differences = dict(case.differences(monkeypatch))
    assert all(value < RELATIVE for value in differences.values()), differences


NEAR_ALPHA_0 = [
    *(spaced(EULER, {s: {} for s in SPACINGS}, ("linspace", "trailing"))),
    *(spaced(ANCESTRAL, {s: {} for s in SPACINGS}, ("linspace", "trailing"))),
    *(
        spaced(
            solver(MULTI, "dpm_solver_multistep", solver_order=2), DROPPED, ("linspace", "trailing")
        )
    ),
    *(
        spaced(
            solver(MULTI, "dpm_solver_multistep", algorithm_type="sde-dpmsolver++"),
            DROPPED,
            ("linspace", "trailing"),
        )
    ),
    *(
        spaced(
            solver(peers.UniPCMultistepScheduler, "unipc", solver_order=2),
            DROPPED,
            ("linspace", "trailing"),
        )
    ),
]


@pytest.mark.parametrize("case", NEAR_ALPHA_0, ids=str)
def test_almost_zero_terminal_snr(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    of_grid = tuple((k, v) for k, v in case.options.items() if k in grid_options(case.grid))
    of_method = {k: v for k, v in case.options.items() if k not in dict(of_grid)}
    predictions = tuple(set(V_X0) & set(case.predictions))
    for exact in (False, True):
        row = replace(case, config={**case.config, **ZERO_SNR}, predictions=predictions)
        if not exact:
            row = replace(row, grid=Clamped(case.grid, of_grid), options=of_method)
        differences = dict(row.differences(monkeypatch))
        # what 2^-24 costs them, and a second order from there on
        limit = 1e-2 if exact else RELATIVE
        assert all(value < limit for value in differences.values()), (exact, differences)


NO_ZERO_SNR = {
    "heun": peers.HeunDiscreteScheduler,
    "lms": peers.LMSDiscreteScheduler,
    "dpm_2": peers.KDPM2DiscreteScheduler,
    "dpm_2_ancestral": peers.KDPM2AncestralDiscreteScheduler,
    "dpmpp_sde": peers.DPMSolverSDEScheduler,
    "deis": peers.DEISMultistepScheduler,
    "dpm_solver_singlestep": peers.DPMSolverSinglestepScheduler,
    "sa_solver": peers.SASolverScheduler,
    "plms": peers.PNDMScheduler,
}


@pytest.mark.parametrize("method", NO_ZERO_SNR)
def test_zero_terminal_snr_that_they_ignore(method: str) -> None:
    config = peers.DDPMScheduler(**BETAS, **ZERO_SNR, prediction_type="v_prediction").config
    peer = NO_ZERO_SNR[method].from_config(config)
    assert float(peer.alphas_cumprod[-1]) > 1e-3, "the key is kept, and ignored"
    schedule = NoiseSchedule.scaled_linear(prediction="v_prediction").zero_terminal_snr()
    sampler = Sampler(schedule, method, 10, "trailing")
    assert sampler.knots[0].alpha == 0.0
    assert point_mass_defect(sampler.table) < 1e-12


# other betas


@pytest.mark.parametrize(
    "case",
    [
        DDIM[1],
        DDPM[1],
        replace(EULER, grid="leading", config={"timestep_spacing": "leading"}),
        MULTISTEP[-3],
    ],
    ids=str,
)
@pytest.mark.parametrize("betas", ["linear", "squaredcos_cap_v2"])
def test_other_betas(case: Case, betas: str, monkeypatch: pytest.MonkeyPatch) -> None:
    schedule = getattr(NoiseSchedule, betas)(prediction="v_prediction")
    config = {**case.config, "beta_schedule": betas, "beta_start": 0.0001, "beta_end": 0.02}
    their = theirs(
        replace(case, config=config).scheduler(schedule),
        20,
        monkeypatch,
        before=case.before,
        **case.step,
    )
    assert (
        difference(ours(Sampler(schedule, case.method, 20, case.grid, **case.options)), their)
        < RELATIVE
    )


@pytest.mark.parametrize(
    ("peer", "method"), [(MULTI, "dpm_solver_multistep"), (SINGLE, "dpm_solver_singlestep")]
)
def test_lambda_min(peer: Any, method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    schedule = NoiseSchedule.squaredcos_cap_v2()
    scheduler = peer(
        beta_schedule="squaredcos_cap_v2", lambda_min_clipped=-5.1, lower_order_final=True
    )
    sampler = Sampler(
        schedule, method, 20, "linspace", rounded=True, drop_last=True, lambda_min=-5.1
    )
    assert difference(ours(sampler), theirs(scheduler, 20, monkeypatch)) < RELATIVE


# inversion on the spacings that are no grid of ours


@pytest.mark.parametrize("spacing", ["leading", "trailing"])
def test_inverse_spacings(spacing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Theirs jump from the last timestep to σ of t = 999: from leading's far, from trailing's not
    at all.
    """
    peer = peers.DPMSolverMultistepInverseScheduler(
        **BETAS, timestep_spacing=spacing, lower_order_final=False
    )
    their = theirs(peer, 20, monkeypatch)
    schedule = NoiseSchedule.scaled_linear()
    times = [*peer.timesteps.tolist(), 999]
    knots = tuple(make_knots(schedule, timesteps=sorted(set(times), reverse=True))[:-1])
    sampler = Sampler(
        schedule,
        "dpm_solver_inverse",
        len(knots) - 1,
        lambda schedule, steps: knots,
        lower_order_final=False,
    )
    assert difference(ours(sampler), their) < RELATIVE


# flow matching


def flow_theirs(
    scheduler: Any, setup: dict[str, Any], monkeypatch: pytest.MonkeyPatch, **options: Any
) -> Tensor:
    return theirs(scheduler, 0, monkeypatch, setup=setup, **options)


@pytest.mark.parametrize("shift", [1.0, 3.0])
@pytest.mark.parametrize("steps", STEPS)
def test_flow_euler_with_the_sigmas_of_pipelines(
    shift: float, steps: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    sampler = Sampler(NoiseSchedule.flow(shift=shift), "euler", steps, "trailing")
    scheduler: Any = peers.FlowMatchEulerDiscreteScheduler(shift=shift)
    their = flow_theirs(
        scheduler, {"sigmas": np.linspace(1.0, 1 / steps, steps).tolist()}, monkeypatch
    )
    assert sampler.timesteps == pytest.approx(scheduler.timesteps.tolist(), rel=1e-6)
    assert difference(ours(sampler), their) < RELATIVE


FLOWS = [
    ("euler", peers.FlowMatchEulerDiscreteScheduler, {}, {}),
    ("flow_heun", peers.FlowMatchHeunDiscreteScheduler, {}, {}),
    (
        "lcm",
        peers.FlowMatchEulerDiscreteScheduler,
        {"stochastic_sampling": True},
        {"timestep_scaling": 1e9},
    ),
    ("lcm", peers.FlowMatchLCMScheduler, {}, {"timestep_scaling": 1e9}),
]


@pytest.mark.parametrize(("method", "peer", "config", "options"), FLOWS)
@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_flow_shift(
    method: str,
    peer: Any,
    config: dict[str, Any],
    options: dict[str, Any],
    shift: float,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Theirs end at the shifted 1 / T and shift it again, which ours does when it is asked to."""
    for steps in STEPS:
        grid: dict[str, Any] = {"grid": "flow", "end": shift / (T + shift - 1)}
        sampler = Sampler(NoiseSchedule.flow(shift=shift), method, steps, **grid, **options)
        evaluations = 2 if method == "flow_heun" else 1
        their = flow_theirs(
            peer(shift=shift, **config),
            {"num_inference_steps": steps},
            monkeypatch,
            evaluations=evaluations,
        )
        assert difference(ours(sampler), their) < RELATIVE


@pytest.mark.parametrize("mu", [0.5, 1.15])
@pytest.mark.parametrize("terminal", [None, 0.1])
def test_flow_dynamic_shifting(
    mu: float, terminal: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    for steps in STEPS:
        scheduler = peers.FlowMatchEulerDiscreteScheduler(
            use_dynamic_shifting=True, shift_terminal=terminal
        )
        setup = {"sigmas": np.linspace(1.0, 1 / steps, steps).tolist(), "mu": mu}
        options: dict[str, Any] = {"mu": mu, "end": 1 / steps, "shift_terminal": terminal}
        sampler = Sampler(NoiseSchedule.flow(), "euler", steps, "flow", **options)
        assert difference(ours(sampler), flow_theirs(scheduler, setup, monkeypatch)) < RELATIVE
        lengths = {0.5: 256, 1.15: 4096}
        options = {"image_seq_len": lengths[mu], "end": 1 / steps, "shift_terminal": terminal}
        assert Sampler(
            NoiseSchedule.flow(), "euler", steps, "flow", **options
        ).sigmas == pytest.approx(sampler.sigmas)


@pytest.mark.parametrize("grid", SIGMAS)
def test_flow_sigmas(grid: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for steps in STEPS:
        scheduler = peers.FlowMatchEulerDiscreteScheduler(**{SIGMAS[grid]: True})
        sampler = Sampler(NoiseSchedule.flow(), "euler", steps, grid)
        their = flow_theirs(scheduler, {"num_inference_steps": steps}, monkeypatch)
        assert difference(ours(sampler), their) < RELATIVE


SOLVERS_ON_FLOW = {
    "dpm_solver_multistep": MULTI,
    "dpm_solver_singlestep": SINGLE,
    "unipc": peers.UniPCMultistepScheduler,
}


@pytest.mark.parametrize("method", SOLVERS_ON_FLOW)
@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_solvers_on_a_flow(method: str, shift: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Their network's times are cut to integers, and UniPC starts at σ = 1 - 1e-6: where they
    stand, we do.
    """
    schedule = NoiseSchedule.flow(shift=shift)
    ends = (
        {"drop_last": True}
        if method == "unipc"
        else {"start": 1 - 1 / T, "end": 0.0, "drop_last": True}
    )
    for steps in STEPS:
        options = {} if method == "unipc" else {"lower_order_final": True}
        scheduler: Any = SOLVERS_ON_FLOW[method](
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=shift, **options
        )
        their = theirs(scheduler, steps, monkeypatch)
        knots = list(make_knots(schedule, steps, "flow", **ends))
        for i, (t, sigma) in enumerate(
            zip(scheduler.timesteps.tolist(), scheduler.sigmas.tolist(), strict=False)
        ):
            assert abs(knots[i].timestep - t) <= 1 and knots[i].sigma == pytest.approx(
                sigma, abs=2e-6
            )
            level = 1 - 1e-6 if knots[i].alpha == 0 else knots[i].sigma
            knots[i] = Knot(float(t), 1 - level, level)
        laid = tuple(knots)
        sampler = Sampler(schedule, method, steps, lambda schedule, steps, laid=laid: laid)
        assert difference(ours(sampler), their) < 10 * RELATIVE, (
            "their α = 1 - σ keeps 2 digits at σ = 1 - 1e-6"
        )


# EDM, consistency and Karras VE: coordinates of their own


@pytest.mark.parametrize("grid", ["karras", "exponential"])
@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize(
    ("order", "algorithm", "kind"),
    [
        (0, "", ""),
        *product((1, 2, 3), ("dpmsolver++",), ("midpoint", "heun")),
        *product((1, 2), ("sde-dpmsolver++",), ("midpoint", "heun")),
    ],
)
def test_edm(
    grid: str, sign: int, order: int, algorithm: str, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Order 0 is EDMEulerScheduler; with 'v_prediction' theirs takes -F."""
    schedule = NoiseSchedule.karras()
    config = {"sigma_schedule": grid, "prediction_type": "epsilon" if sign > 0 else "v_prediction"}
    for steps in STEPS:

        def net(x: Tensor, t: Any) -> Tensor:
            return network(x, t, unit=2.0)

        options: dict[str, Any] = {}
        scheduler: Any = peers.EDMEulerScheduler(**config)
        if order:
            options = {"order": order, "algorithm": algorithm, "solver_type": kind}
            scheduler = peers.EDMDPMSolverMultistepScheduler(
                **config, solver_order=order, algorithm_type=algorithm, solver_type=kind
            )
        sampler = Sampler(
            schedule, "dpm_solver_multistep" if order else "euler", steps, grid, **options
        )
        mine = ours(sampler, lambda x, t: sign * net(x, t))
        assert difference(mine, theirs(scheduler, steps, monkeypatch, net=net)) < RELATIVE


@pytest.mark.parametrize("steps", [1, 2, 8, 40])
@pytest.mark.parametrize("s_noise", [1.0, 0.9])
def test_consistency(steps: int, s_noise: float, monkeypatch: pytest.MonkeyPatch) -> None:
    schedule = NoiseSchedule(
        replace(NoiseSchedule.karras().curve, num_train_timesteps=40), "consistency"
    )
    scheduler = peers.CMStochasticIterativeScheduler(clip_denoised=False, s_noise=s_noise)

    def net(x: Tensor, t: Any) -> Tensor:
        return network(x, t, unit=500.0)

    # their network is given 1000 log(σ + 1e-44) / 4
    their = theirs(scheduler, steps, monkeypatch, net=net)
    # with all 40 steps the last one goes from sigma_min to sigma_min, at which D = x: ours goes
    # into σ = 0, to the same D
    grid: dict[str, Any] = {"grid": "trailing", "whole_stride": True, "final": "sigma_min"}
    grid = grid if steps < 40 else {"grid": "karras"}
    sampler = Sampler(schedule, "consistency", steps, s_noise=s_noise, **grid)
    assert scheduler.sigmas.tolist()[:steps] == pytest.approx(sampler.sigmas[:steps], rel=1e-5)
    assert difference(ours(sampler, lambda x, t: net(x, 1000 * t)), their) < RELATIVE


def test_karras_ve(monkeypatch: pytest.MonkeyPatch) -> None:
    """Their schedule lists σ² and their pipeline takes it as σ: the steps agree on levels that we
    give to both.
    """
    levels = [80.0, 30.0, 9.0, 2.0, 0.5, 0.1, 0.02]
    schedule = NoiseSchedule.variance_exploding(
        sigma_min=0.001, sigma_max=200.0, prediction="epsilon"
    )
    sampler = Sampler(schedule, "stochastic_karras_ve", sigmas=levels)
    peer = KarrasVeScheduler()
    peer.set_timesteps(len(levels))
    assert float(peer.schedule[-1]) == pytest.approx(100.0**2)
    x = START
    for i, (s, n) in enumerate(zip(levels, [*levels[1:], 0.0], strict=True)):
        monkeypatch.setattr(
            sys.modules[KarrasVeScheduler.__module__],
            "randn_tensor",
            lambda *_, i=i, **__: DRAWS[i][0],
        )
        x_hat, s_hat = peer.add_noise_to_input(x, s)
        step: Any = peer.step(-network(x_hat, s_hat), s_hat, n, x_hat)
        if n:
            slope = step.derivative
            step = peer.step_correct(
                -network(step.prev_sample, n), s_hat, n, x_hat, step.prev_sample, slope
            )
        x = step.prev_sample
    assert difference(ours(sampler), x) < RELATIVE


def test_ipndm(monkeypatch: pytest.MonkeyPatch) -> None:
    """From α = 0 theirs divides by max(α, 1e-8) what rounding leaves of x - σ ε, and may find D =
    0; after that step the two agree."""
    schedule = NoiseSchedule.cosine()
    for steps in STEPS:
        knots = make_knots(schedule, steps, "sine_squared")
        scheduler = peers.IPNDMScheduler()
        scheduler.set_timesteps(steps)
        assert [k.timestep / T for k in knots[:-1]] == pytest.approx(
            scheduler.timesteps.tolist(), abs=1e-6
        )
        x = START
        scheduler.set_begin_index(1)
        for t in scheduler.timesteps[1:]:
            x = scheduler.step(network(x, t, unit=1.0), t, x).prev_sample
        rest = tuple(knots[1:])
        sampler = Sampler(schedule, "ipndm", steps - 1, lambda schedule, steps, rest=rest: rest)
        assert difference(ours(sampler), x.double()) < RELATIVE
        table = Sampler(schedule, "ipndm", steps, "sine_squared").table
        right = next(
            run(table, START, lambda x, k: network(x, k.timestep), lambda start, end: START)
        ).x
        D = -network(START, T)
        assert torch.allclose(right, knots[1].alpha * D + knots[1].sigma * START)


# where the peers are wrong


def agrees_where_finite(mine: Tensor, their: Tensor, limit: float = RELATIVE) -> None:
    """For a peer whose rounding may decide whether it is a number; what ours must be is said beside
    the call.
    """
    finite = their.isfinite()
    assert not finite.any() or difference(mine[finite], their[finite]) < limit


def last_output(
    scheduler: Any,
    schedule: NoiseSchedule,
    steps: int,
    monkeypatch: pytest.MonkeyPatch,
    **options: Any,
) -> Tensor:
    """The x_0 that a peer finds in its last evaluation, from which a step into σ = 0 must return
    it.
    """
    seen: list[tuple[Tensor, float]] = []

    def net(x: Tensor, t: Any) -> Tensor:
        seen.append((x, float(t)))
        return network(x, t)

    theirs(scheduler, steps, monkeypatch, net=net, **options)
    x, t = seen[-1]
    alpha, sigma = scheduler._sigma_to_alpha_sigma_t(scheduler.sigmas[-2].double())
    return schedule.prediction.to_x0(network(x, t), x, alpha, sigma)


def test_fixed_large_log_is_fixed_large(monkeypatch: pytest.MonkeyPatch) -> None:
    """Theirs takes the root of log β, which is negative."""
    schedule = NoiseSchedule.scaled_linear()
    mine = ours(Sampler(schedule, "ddpm", 20, "leading", variance_type="fixed_large_log"))
    peer = {
        kind: peers.DDPMScheduler(**BETAS, **NO_CLIP, variance_type=kind)
        for kind in ("fixed_large_log", "fixed_large")
    }
    assert difference(mine, theirs(peer["fixed_large"], 20, monkeypatch)) < RELATIVE
    agrees_where_finite(mine, theirs(peer["fixed_large_log"], 20, monkeypatch))


@pytest.mark.parametrize("spacing", ["trailing", "leading"])
def test_fixed_large_ends_without_noise(spacing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """2006.11239, algorithm 2: z = 0 in the last step. Theirs leaves it out at t = 0 only, where
    trailing never comes.
    """
    schedule = NoiseSchedule.scaled_linear()
    offset = int(spacing == "leading")
    peer = peers.DDPMScheduler(
        **BETAS,
        **NO_CLIP,
        variance_type="fixed_large",
        timestep_spacing=spacing,
        steps_offset=offset,
    )
    options = {"steps_offset": 1} if offset else {}
    mine = ours(Sampler(schedule, "ddpm", 20, spacing, variance_type="fixed_large", **options))
    assert difference(mine, theirs(peer, 20, monkeypatch)) > 100 * RELATIVE
    assert difference(mine, theirs(peer, 20, monkeypatch, quiet_end=True)) < RELATIVE


@pytest.mark.parametrize("peer", [MULTI, SINGLE])
def test_third_order_of_the_sde(peer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Their coefficient of D2 ends in - 1/2 for + 1/2 (k-diffusion has it right): with that mended
    the two agree.
    """
    multi = peer is MULTI
    name = (
        "multistep_dpm_solver_third_order_update"
        if multi
        else "singlestep_dpm_solver_third_order_update"
    )
    wrong = getattr(peer, name)

    def mended(self: Any, outputs: Any, *, sample: Tensor, noise: Tensor) -> Tensor:
        alpha, _ = self._sigma_to_alpha_sigma_t(self.sigmas[self.step_index + 1])
        levels = [
            self._sigma_to_alpha_sigma_t(self.sigmas[self.step_index + j]) for j in (1, 0, -1, -2)
        ]
        y = [float(torch.log(a) - torch.log(s)) for a, s in levels]
        m0, m1, m2 = outputs[-1], outputs[-2], outputs[-3]
        if multi:
            h = y[0] - y[1]
            r0, r1 = (y[1] - y[2]) / h, (y[2] - y[3]) / h
            D2 = ((m0 - m1) / r0 - (m1 - m2) / r1) / (r0 + r1)
        else:
            h = y[0] - y[3]
            r0, r1 = (y[1] - y[3]) / h, (y[2] - y[3]) / h
            D2 = 2 * ((m0 - m2) / r0 - (m1 - m2) / r1) / (r0 - r1)
        return wrong(self, outputs, sample=sample, noise=noise) + alpha * D2

    config = {
        "algorithm_type": "sde-dpmsolver++",
        "solver_order": 3,
        "solver_type": "heun",
        "lower_order_final": True,
    }
    method = "dpm_solver_multistep" if multi else "dpm_solver_singlestep"
    options = {
        "algorithm": "sde-dpmsolver++",
        "order": 3,
        "solver_type": "heun",
        **DROPPED["linspace"],
    }
    for schedule, steps in product(EULER.schedules(), STEPS):
        mine = ours(Sampler(schedule, method, steps, "linspace", **options))
        scheduler = peer(**BETAS, **config, prediction_type=schedule.prediction.name)
        assert difference(mine, theirs(scheduler, steps, monkeypatch)) > 10 * RELATIVE
        with monkeypatch.context() as patch:
            patch.setattr(peer, name, mended)
            assert difference(mine, theirs(scheduler, steps, monkeypatch)) < 3 * RELATIVE


LACKING: dict[str, tuple[Any, NoiseSchedule, dict[str, Any]]] = {
    "sde-dpmsolver": (
        MULTI,
        NoiseSchedule.scaled_linear(),
        {"algorithm": "sde-dpmsolver", "final": "sigma_min"},
    ),
    **{
        f"edm-{kind}": (
            peers.EDMDPMSolverMultistepScheduler,
            NoiseSchedule.karras(),
            {"grid": "karras", "algorithm": "sde-dpmsolver++", "solver_type": kind},
        )
        for kind in ("midpoint", "heun")
    },
}


@pytest.mark.parametrize("name", LACKING)
def test_third_order_of_the_sde_that_they_lack(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Their code has no such branch. Ours has the exact mean, and is nearer to the variance than
    the second order.
    """
    peer, schedule, options = LACKING[name]
    with pytest.raises(UnboundLocalError):
        theirs(
            peer(
                solver_order=3, algorithm_type=options["algorithm"], final_sigmas_type="sigma_min"
            ),
            20,
            monkeypatch,
        )
    errors = []
    for order in (2, 3):
        table = Sampler(schedule, "dpm_solver_multistep", 200, order=order, **options).table
        *_, (mean, variance) = moments(table, DATA)
        exact_mean, deviation = DATA.marginal(table.knots[-1])
        assert mean == pytest.approx(exact_mean)
        errors.append(abs(variance - deviation**2))
    assert errors[1] < min(errors[0] / 1.5, 1e-3), errors


@pytest.mark.parametrize(
    "options", [{"solver_type": "bh1"}, {"order": 3, "lower_order_final": False}], ids=str
)
@pytest.mark.parametrize("steps", STEPS)
def test_the_step_of_unipc_into_zero(
    options: dict[str, Any], steps: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From σ = 0 on h = ∞, and theirs multiply it by 0 or solve a system with it: an error, or no
    number. It returns x_0.
    """
    schedule = NoiseSchedule.scaled_linear()
    config = {"timestep_spacing": "trailing", "final_sigmas_type": "sigma_min"}
    config |= {{"order": "solver_order"}.get(k, k): v for k, v in options.items()}
    scheduler = peers.UniPCMultistepScheduler(**BETAS, **config)
    scheduler.alphas_cumprod = schedule.alphas_cumprod
    mine = ours(Sampler(schedule, "unipc", steps, "trailing", **options))
    assert difference(mine, last_output(scheduler, schedule, steps, monkeypatch)) < RELATIVE


def test_cosine_on_karras_sigmas(monkeypatch: pytest.MonkeyPatch) -> None:
    """Theirs cut the times to integers and look up the first of them, of which there may be
    several: told where they start, they agree."""
    schedule = NoiseSchedule.squaredcos_cap_v2()
    row = Case(MULTI, "dpm_solver_multistep", "karras", their_times=True)
    scheduler = MULTI(beta_schedule="squaredcos_cap_v2", use_karras_sigmas=True)
    their = theirs(
        scheduler, 20, monkeypatch, before=lambda scheduler, i: scheduler.set_begin_index(0)
    )
    assert difference(ours(row.sampler(schedule, scheduler, 20)), their) < RELATIVE


@pytest.mark.parametrize("case", [ANCESTRAL, KDPM2_ANCESTRAL], ids=str)
def test_ancestral_steps_from_far(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """From σ = 2e4 theirs take the root of σ_n² - σ_up² in float32, whose sign is that of its
    rounding: with their levels in float64 the two agree."""
    schedule = NoiseSchedule.squaredcos_cap_v2()
    mine = ours(Sampler(schedule, case.method, 4, "linspace"))
    their = theirs(
        case.peer(beta_schedule="squaredcos_cap_v2"), 4, monkeypatch, evaluations=case.evaluations
    )
    agrees_where_finite(mine, their, limit=1e-2)
    from_numpy = torch.from_numpy
    monkeypatch.setattr(torch, "from_numpy", lambda array: from_numpy(array).double())
    scheduler = case.peer(beta_schedule="squaredcos_cap_v2")
    scheduler.alphas_cumprod = schedule.alphas_cumprod
    assert (
        difference(mine, theirs(scheduler, 4, monkeypatch, evaluations=case.evaluations)) < RELATIVE
    )


def test_ddim_of_eta_1_at_zero_terminal_snr(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is DDPM. Theirs takes the root of 1 - ᾱ - σ² there, of which float32 leaves a rounding of
    either sign.
    """
    schedule = NoiseSchedule.scaled_linear(prediction="v_prediction").zero_terminal_snr()
    config = {
        **BETAS,
        **NO_CLIP,
        **ZERO_SNR,
        "prediction_type": "v_prediction",
        "timestep_spacing": "trailing",
    }
    mine = ours(Sampler(schedule, "ddim", 20, "trailing", eta=1.0))
    assert difference(mine, theirs(peers.DDPMScheduler(**config), 20, monkeypatch)) < RELATIVE
    agrees_where_finite(
        mine, theirs(peers.DDIMScheduler(**config), 20, monkeypatch, eta=1.0), limit=1e-2
    )


@pytest.mark.parametrize("spacing", ["linspace", "trailing"])
def test_ddim_steps_to_its_own_next_timestep(spacing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    scheduler = peers.DDIMScheduler(**BETAS, **NO_CLIP, timestep_spacing=spacing)
    mine = ours(Sampler(NoiseSchedule.scaled_linear(), "ddim", 7, spacing, **WHOLE[spacing]))
    assert difference(mine, theirs(scheduler, 7, monkeypatch)) > 10 * RELATIVE
    assert difference(mine, theirs(scheduler, 7, monkeypatch, before=true_gaps)) < RELATIVE


@pytest.mark.parametrize("peer", [peers.EulerDiscreteScheduler, peers.EDMEulerScheduler])
def test_churn_of_euler(peer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """2206.00364, algorithm 2, calls the network on the churned x̂ at σ̂; theirs calls it before on
    x at σ. With a network that looks ahead (its input is what the step will make of x) the two
    agree."""
    edm = peer is peers.EDMEulerScheduler
    schedule = NoiseSchedule.karras() if edm else NoiseSchedule.scaled_linear()
    churn = {"s_churn": 4.0, "s_tmin": 0.1, "s_tmax": 10.0, "s_noise": 1.01}
    steps = 20
    sampler = Sampler(schedule, "euler", steps, "karras" if edm else "trailing", **churn)
    scheduler = peer() if edm else peer(**BETAS, timestep_spacing="trailing")
    naive = theirs(scheduler, steps, monkeypatch, **churn)
    mine = ours(sampler)
    assert difference(mine, naive) > 100 * RELATIVE
    scheduler.set_timesteps(steps)
    x = START * start_scale(scheduler)
    for i, t in enumerate(scheduler.timesteps):
        s = float(scheduler.sigmas[i])
        gamma = (
            min(churn["s_churn"] / steps, math.sqrt(2) - 1)
            if churn["s_tmin"] <= s <= churn["s_tmax"]
            else 0.0
        )
        s_hat = s * (1 + gamma)
        x_hat = x + churn["s_noise"] * math.sqrt(s_hat**2 - s**2) * DRAWS[i][0]
        time = (
            schedule.time(-2 * torch.tensor([s_hat], dtype=torch.float64).log()).item()
            if gamma
            else float(t)
        )
        time = math.log(s_hat) / 4 if edm else time
        out = network(x_hat / math.hypot(s_hat, 0.5 if edm else 1), time)
        monkeypatch.setattr(
            sys.modules[peer.__module__], "randn_tensor", lambda *_, i=i, **__: DRAWS[i][0]
        )
        scheduler.is_scale_input_called = True
        x = scheduler.step(out, t, x, **churn).prev_sample
    assert difference(mine, x.double()) < RELATIVE


def test_a_difference_would_be_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """The yardstick itself: one step more, another eta, another grid or prediction are all far
    beyond the tolerance.
    """
    schedule = NoiseSchedule.scaled_linear(prediction="v_prediction")
    case = next(c for c in DDIM if c.grid == "trailing" and c.options["eta"] == 0.5)
    their = theirs(case.scheduler(schedule), 20, monkeypatch, eta=0.5)
    for wrong in (
        Sampler(schedule, "ddim", 20, "trailing", eta=0.51),
        Sampler(schedule, "ddim", 20, "leading", eta=0.5, steps_offset=1),
        Sampler(schedule.with_prediction("flow_prediction"), "ddim", 20, "trailing", eta=0.5),
        Sampler(schedule.zero_terminal_snr(), "ddim", 20, "trailing", eta=0.5),
    ):
        assert difference(ours(wrong), their) > 100 * RELATIVE
