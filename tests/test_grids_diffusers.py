"""The grids of every diffusers class, and the option that makes ours theirs."""

from __future__ import annotations

import math
from typing import Any

import diffusers
import numpy as np
import pytest
from diffusers.schedulers.deprecated import KarrasVeScheduler, ScoreSdeVpScheduler

from alphabar.noising import Karras, NoiseSchedule
from alphabar.sampling import make_knots
from alphabar.sampling.grids.timesteps import shift_of
from laying import (
    CONVERSIONS,
    FLOW,
    FLOW_3,
    SCALED,
    SCHEDULES,
    SD,
    check,
    flow_sigmas,
    peer,
    ratios,
    times,
)

pytestmark = pytest.mark.filterwarnings("ignore:__array_wrap__")  # of diffusers, with NumPy 2

# diffusers. Its tables are float32; given our float64 ᾱ it lays the same numbers, up to the float32
# that it returns.


STEPS = (2, 10, 13, 20, 25, 50)
SPACINGS = ("linspace", "leading", "trailing")
OFFSET = {"linspace": {}, "leading": {"steps_offset": 1}, "trailing": {}}
SOLVER_SPACING: dict[str, dict[str, Any]] = {
    "linspace": {"rounded": True, "drop_last": True},
    "leading": {"drop_last": True, "steps_offset": 1},
    "trailing": {},
}


@pytest.mark.parametrize(
    "name", ["EulerDiscreteScheduler", "EulerAncestralDiscreteScheduler", "LMSDiscreteScheduler"]
)
@pytest.mark.parametrize("spacing", SPACINGS)
def test_euler_spacings(name: str, spacing: str) -> None:
    for steps in STEPS:
        knots = make_knots(SCALED, steps, spacing, interpolation="sigma", **OFFSET[spacing])
        check(peer(name, steps, timestep_spacing=spacing, steps_offset=1), knots)


@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("grid", CONVERSIONS)
def test_euler_conversions_take_their_range_from_the_subsampled_grid(
    spacing: str, grid: str
) -> None:
    for name in ("EulerDiscreteScheduler", "LMSDiscreteScheduler"):
        for steps in STEPS:
            config = {"timestep_spacing": spacing, "steps_offset": 1, CONVERSIONS[grid]: True}
            check(
                peer(name, steps, **config),
                make_knots(SCALED, steps, grid, range_from=spacing, steps_offset=1),
            )


@pytest.mark.parametrize(
    "name", ["HeunDiscreteScheduler", "KDPM2DiscreteScheduler", "KDPM2AncestralDiscreteScheduler"]
)
@pytest.mark.parametrize("spacing", SPACINGS)
def test_classes_of_two_evaluations(name: str, spacing: str) -> None:
    for steps in (10,):  # KDPM2 takes 0.15 s to lay one
        for grid in (None, "karras", "beta" if name == "HeunDiscreteScheduler" else "exponential"):
            config = {CONVERSIONS[grid]: True} if grid else {}
            scheduler = peer(name, steps, timestep_spacing=spacing, steps_offset=1, **config)
            knots = (
                make_knots(SCALED, steps, grid, range_from=spacing, steps_offset=1)
                if grid
                else make_knots(SCALED, steps, spacing, interpolation="sigma", **OFFSET[spacing])
            )
            # they list the points of two evaluations twice; where the second one is, is the
            # methods' business
            sigmas = sorted({*scheduler.sigmas.tolist()}, reverse=True)
            assert ratios(knots) == pytest.approx(sigmas, rel=3e-7, abs=1e-12)
            called = [scheduler.timesteps[0].item(), *scheduler.timesteps[2::2].tolist()]
            whole = grid == "karras" and name != "HeunDiscreteScheduler"  # rounded there
            assert [k.timestep for k in knots[:-1]] == pytest.approx(
                called, abs=0.5001 if whole else 5e-5
            )


@pytest.mark.parametrize(
    "name",
    [
        "DPMSolverMultistepScheduler",
        "UniPCMultistepScheduler",
        "DEISMultistepScheduler",
        "SASolverScheduler",
    ],
)
@pytest.mark.parametrize("spacing", SPACINGS)
def test_solver_spacings(name: str, spacing: str) -> None:
    # DEIS and SA-Solver always end at sigma_min
    selects = "final_sigmas_type" in getattr(diffusers, name)().config
    for final in ("zero", "sigma_min") if selects else ("sigma_min",):
        config = {"timestep_spacing": spacing, "steps_offset": 1} | (
            {"final_sigmas_type": final} if selects else {}
        )
        for steps in (1, *STEPS, 100):
            knots = make_knots(SCALED, steps, spacing, final=final, **SOLVER_SPACING[spacing])
            check(peer(name, steps, **config), knots)


@pytest.mark.parametrize(
    "name",
    ["DPMSolverMultistepScheduler", "UniPCMultistepScheduler", "DPMSolverSinglestepScheduler"],
)
@pytest.mark.parametrize("grid", CONVERSIONS)
def test_solver_conversions_take_their_range_from_the_schedule(name: str, grid: str) -> None:
    for steps in STEPS:
        knots = make_knots(SCALED, steps, grid, rounding="nearest" if grid == "karras" else "down")
        check(peer(name, steps, **{CONVERSIONS[grid]: True}), knots)


@pytest.mark.parametrize(
    "name", ["DEISMultistepScheduler", "SASolverScheduler", "UniPCMultistepScheduler"]
)
@pytest.mark.parametrize("grid", CONVERSIONS)
def test_solvers_that_repeat_their_last_sigma(name: str, grid: str) -> None:
    """Their last step has no length: it is ours with one step fewer."""
    final = {"final_sigmas_type": "sigma_min"} if name == "UniPCMultistepScheduler" else {}
    for steps in STEPS:
        scheduler = peer(name, steps, **{CONVERSIONS[grid]: True}, **final)
        assert scheduler.sigmas[-1] == scheduler.sigmas[-2]
        knots = make_knots(
            SCALED,
            steps - 1,
            grid,
            final="sigma_min",
            rounding="nearest" if grid == "karras" else "down",
        )
        assert ratios(knots) == pytest.approx(scheduler.sigmas[:-1].tolist(), rel=3e-7)
        assert [k.timestep for k in knots[:-1]] == scheduler.timesteps[:-1].tolist()


def test_lu() -> None:
    for steps in STEPS:
        scheduler = peer("DPMSolverMultistepScheduler", steps, use_lu_lambdas=True)
        check(scheduler, make_knots(SCALED, steps, "lu", rounding="nearest"))


@pytest.mark.parametrize(
    "name", ["DPMSolverMultistepScheduler", "SASolverScheduler", "DPMSolverSinglestepScheduler"]
)
def test_clipped_lambda(name: str) -> None:
    cosine = SCHEDULES["squaredcos"]
    spacings = ("linspace",) if name == "DPMSolverSinglestepScheduler" else SPACINGS
    final = "sigma_min" if name == "SASolverScheduler" else "zero"
    for spacing in spacings:
        for steps in (10, 20):
            config = {"timestep_spacing": spacing, "steps_offset": 1} if len(spacings) > 1 else {}
            scheduler = peer(
                name,
                steps,
                cosine,
                beta_schedule="squaredcos_cap_v2",
                lambda_min_clipped=-5.1,
                **config,
            )
            check(
                scheduler,
                make_knots(
                    cosine, steps, spacing, lambda_min=-5.1, final=final, **SOLVER_SPACING[spacing]
                ),
            )
    assert make_knots(cosine, 10, "linspace", lambda_min=-5.1)[0].half_log_snr >= -5.1


def test_the_peers_own_float32_table_is_near() -> None:
    scheduler = diffusers.DPMSolverMultistepScheduler(use_karras_sigmas=True, **SD)
    scheduler.set_timesteps(20)
    # σ / α of its first timestep is wrong by 3e-5
    assert ratios(make_knots(SCALED, 20, "karras")) == pytest.approx(
        scheduler.sigmas.tolist(), rel=4e-5
    )


COUNTS = [*range(2, 201), 250, 333, 500, 777, 999, 1000]
"""One step is left out: there numpy's linspace(0, 999, 1) starts sampling at the clean end; ours
starts at 999.
"""


def arange_overshoots() -> list[int]:
    """The step counts for which numpy.arange(T, 0, -T / N) has N + 1 entries: 'trailing' in
    diffusers then ends in -1.
    """
    return [n for n in range(1, 1001) if len(np.arange(1000, 0, -1000 / n)) == n + 1]


@pytest.mark.parametrize("name", ["DDIMScheduler", "DDPMScheduler", "PNDMScheduler"])
@pytest.mark.parametrize("spacing", SPACINGS)
def test_whole_timesteps(name: str, spacing: str) -> None:
    pndm = {"skip_prk_steps": True} if name == "PNDMScheduler" else {}
    scheduler = getattr(diffusers, name)(timestep_spacing=spacing, **pndm)
    options = {"rounded": True} if spacing == "linspace" else {}
    for steps in sorted({*COUNTS} - ({*arange_overshoots()} if spacing == "trailing" else set())):
        scheduler.set_timesteps(steps)
        # PLMS visits one twice
        theirs = sorted({int(t) for t in scheduler.timesteps}, reverse=True)
        assert times(SCALED, steps, spacing, **options) == theirs


def test_ddim_leading_with_an_offset() -> None:
    scheduler = diffusers.DDIMScheduler(timestep_spacing="leading", steps_offset=1)
    for steps in [1, *COUNTS[:-1]]:  # with 1000 theirs starts at 1000, past the end
        scheduler.set_timesteps(steps)
        assert times(SCALED, steps, "leading", steps_offset=1) == scheduler.timesteps.tolist()


def test_trailing_where_numpy_arange_has_one_too_many() -> None:
    counts = arange_overshoots()
    assert len(counts) == 62
    assert counts[:5] == [61, 103, 121, 122, 201]
    for steps in counts:
        ours = times(SCALED, steps, "trailing")
        theirs = (np.arange(1000, 0, -1000 / steps).round() - 1).tolist()
        assert len(ours) == steps
        assert theirs[-1] == -1
        assert ours == theirs[:-1]


@pytest.mark.parametrize("name", ["LCMScheduler", "TCDScheduler"])
def test_lcm(name: str) -> None:
    scheduler = getattr(diffusers, name)()
    for steps in range(1, 51):
        scheduler.set_timesteps(steps)
        assert times(SCALED, steps, "lcm") == scheduler.timesteps.tolist()
    scheduler.set_timesteps(4, original_inference_steps=100)
    assert times(SCALED, 4, "lcm", original_steps=100) == scheduler.timesteps.tolist()


def test_unclip() -> None:
    for steps in (2, 10, 25, 64):
        scheduler = diffusers.UnCLIPScheduler()
        scheduler.set_timesteps(steps)
        assert (
            times(SCHEDULES["squaredcos"], steps, "linspace", rounded=True)
            == scheduler.timesteps.tolist()
        )


def test_ipndm() -> None:
    for steps in (1, 2, 10, 50):
        scheduler = diffusers.IPNDMScheduler()
        scheduler.set_timesteps(steps)
        ours = times(NoiseSchedule.cosine(), steps, "sine_squared")
        assert ours == pytest.approx(1000 * scheduler.timesteps.double().numpy(), abs=2e-3)


@pytest.mark.parametrize("steps", [1, 2, 3, 7, 20, 39])
def test_consistency_models(steps: int) -> None:
    scheduler = diffusers.CMStochasticIterativeScheduler()  # 40 timesteps, σ from 0.002 to 80
    scheduler.set_timesteps(steps)
    schedule = NoiseSchedule(Karras(num_train_timesteps=40), "sample")
    check(
        scheduler,
        make_knots(schedule, steps, "trailing", whole_stride=True, final="sigma_min"),
        call_scale=1000.0,
    )


@pytest.mark.parametrize("name", ["EDMEulerScheduler", "EDMDPMSolverMultistepScheduler"])
@pytest.mark.parametrize("grid", ["karras", "exponential"])
def test_edm(name: str, grid: str) -> None:
    for steps in (2, 18, 50):
        scheduler = getattr(diffusers, name)(sigma_schedule=grid)
        scheduler.set_timesteps(steps)
        # one of them in float32
        check(scheduler, make_knots(NoiseSchedule.karras(), steps, grid), rel=2e-6)


def test_karras_ve_squares_its_sigmas() -> None:
    scheduler = KarrasVeScheduler()
    scheduler.set_timesteps(10)
    schedule = NoiseSchedule.karras(sigma_min=0.02**2, sigma_max=100.0**2)
    knots = make_knots(schedule, 10, "exponential")
    assert flow_sigmas(knots)[:-1] == pytest.approx(
        [scheduler.schedule[int(t)].item() for t in scheduler.timesteps], rel=1e-6
    )


def test_score_sde() -> None:
    vp, ve = ScoreSdeVpScheduler(), diffusers.ScoreSdeVeScheduler(sampling_eps=0.0)
    vp.set_timesteps(10)
    ours = times(NoiseSchedule.variance_preserving(), 10, "vp")
    assert ours == pytest.approx(1000 * np.asarray(vp.timesteps, dtype=float), rel=1e-6)
    ve.set_timesteps(10)
    ve.set_sigmas(10)
    ours = flow_sigmas(make_knots(NoiseSchedule.variance_exploding(), 10, "linspace"))[:-1]
    assert ours == pytest.approx(ve.sigmas.tolist(), rel=1e-5)


# flow

FLOW_STEPS = (1, 4, 13, 28, 50)


def flow_peer(name: str, steps: int, mu: float | None = None, **config: Any) -> Any:
    scheduler = getattr(diffusers, name)(**config)
    scheduler.set_timesteps(steps, **({} if mu is None else {"mu": mu}))
    return scheduler


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_flow_match_with_a_static_shift_shifts_its_end_twice(shift: float) -> None:
    schedule, end = NoiseSchedule.flow(shift=shift), shift / (1000 + shift - 1)
    for steps in FLOW_STEPS:
        euler = flow_peer("FlowMatchEulerDiscreteScheduler", steps, shift=shift)
        knots = make_knots(schedule, steps, "flow", end=end)
        assert flow_sigmas(knots) == pytest.approx(euler.sigmas.tolist(), abs=5e-8)
        assert [k.timestep for k in knots[:-1]] == pytest.approx(euler.timesteps.tolist(), abs=1e-4)
        heun = flow_peer("FlowMatchHeunDiscreteScheduler", steps, shift=shift)
        assert flow_sigmas(knots) == pytest.approx(
            sorted({*heun.sigmas.tolist()}, reverse=True), abs=5e-8
        )
        once = make_knots(schedule, steps, "flow")
        assert steps == 1 or once[-2].sigma == pytest.approx(end, rel=1e-9)


@pytest.mark.parametrize("grid", CONVERSIONS)
def test_flow_match_conversions(grid: str) -> None:
    schedule, end = FLOW_3, 3.0 / 1002.0
    for steps in FLOW_STEPS:
        theirs = flow_peer(
            "FlowMatchEulerDiscreteScheduler", steps, shift=3.0, **{CONVERSIONS[grid]: True}
        )
        knots = make_knots(schedule, steps, grid, sigma_min=3 * end / (1 + 2 * end))
        assert flow_sigmas(knots) == pytest.approx(theirs.sigmas.tolist(), abs=5e-8)


@pytest.mark.parametrize("mu", [0.5, 0.8, 1.15])
def test_flow_match_with_a_dynamic_shift(mu: float) -> None:
    name = "FlowMatchEulerDiscreteScheduler"
    for steps in FLOW_STEPS[1:]:
        for terminal in (None, 0.1):
            theirs = flow_peer(name, steps, mu, use_dynamic_shifting=True, shift_terminal=terminal)
            knots = make_knots(FLOW_3, steps, "flow", mu=mu, shift_terminal=terminal)
            assert flow_sigmas(knots) == pytest.approx(theirs.sigmas.tolist(), abs=8e-8)
        linear = flow_peer(name, steps, mu, use_dynamic_shifting=True, time_shift_type="linear")
        assert flow_sigmas(make_knots(FLOW, steps, "flow", shift=mu)) == pytest.approx(
            linear.sigmas.tolist(), abs=8e-8
        )


def test_solvers_on_a_flow() -> None:
    config = {"use_flow_sigmas": True, "flow_shift": 3.0, "prediction_type": "flow_prediction"}
    for steps in FLOW_STEPS:
        # its first sigma is 1 - 1e-6; the ratio at 1 is infinite
        unipc = flow_peer("UniPCMultistepScheduler", steps, **config)
        knots = make_knots(FLOW_3, steps, "flow", drop_last=True)
        assert flow_sigmas(knots)[1:] == pytest.approx(unipc.sigmas.tolist()[1:], abs=5e-8)
        assert (knots[0].sigma, unipc.sigmas[0].item()) == (1.0, pytest.approx(1 - 1e-6, abs=5e-8))
        for name in ("DPMSolverMultistepScheduler", "DPMSolverSinglestepScheduler"):
            theirs = flow_peer(name, steps, **config)
            knots = make_knots(FLOW_3, steps, "flow", start=1 - 1 / 1000, end=0.0, drop_last=True)
            assert flow_sigmas(knots) == pytest.approx(theirs.sigmas.tolist(), abs=5e-8)


def test_resolution_dependent_shift() -> None:
    assert math.log(shift_of(FLOW, image_seq_len=256)) == pytest.approx(0.5)
    assert math.log(shift_of(FLOW, image_seq_len=4096)) == pytest.approx(1.15)
    for length in (256, 1024, 4096, 9216):
        by_length = flow_sigmas(make_knots(FLOW, 8, "flow", image_seq_len=length))
        assert by_length == pytest.approx(
            flow_sigmas(make_knots(FLOW, 8, "flow", mu=flux_mu(length))), rel=1e-12
        )
    by_mu = flow_sigmas(make_knots(FLOW, 8, "flow", mu=math.log(3.0)))
    assert flow_sigmas(make_knots(FLOW, 8, "flow", shift=3.0)) == pytest.approx(by_mu, rel=1e-12)
    assert flow_sigmas(make_knots(FLOW_3, 8, "flow")) == pytest.approx(
        flow_sigmas(make_knots(FLOW, 8, "flow", shift=3.0))
    )
    assert flow_sigmas(make_knots(FLOW_3, 8, "flow", shift=1.0)) == pytest.approx(
        flow_sigmas(make_knots(FLOW, 8, "linspace"))
    )


def flux_mu(length: int) -> float:
    """Flux's calculate_shift."""
    slope = (1.15 - 0.5) / (4096 - 256)
    return length * slope + 0.5 - slope * 256


def test_flow_elsewhere_shifts_the_training_time() -> None:
    assert times(SCALED, 4, "flow") == pytest.approx(times(SCALED, 4, "linspace"), abs=1e-9)
    t = np.linspace(1, 1 / 1000, 4)
    assert times(SCALED, 4, "flow", shift=3.0) == pytest.approx(
        1000 * 3 * t / (1 + 2 * t) - 1, abs=1e-9
    )
