"""Every method on every schedule in few steps: a right table or an error in words, and the same
numbers however they are said.
"""

from __future__ import annotations

import math
import pickle
import sys
from dataclasses import replace
from typing import Any

import diffusers
import numpy as np
import pytest
import torch

from alphabar.noising import NoiseSchedule, resolution_shift
from alphabar.noising.utils.validation import real_number, whole_number
from alphabar.sampling import CLEAN, METHODS, RePaint, Sampler, VQDiffusion, make_knots
from alphabar.sampling import knots as knots_module
from alphabar.sampling import sampler as sampler_module
from alphabar.sampling import table as table_module
from alphabar.sampling.standalone.vq_diffusion import TokenSchedule
from alphabar.sampling.table import ROUNDINGS, PackedSteps, Table, point_mass_defects
from oracles import Gaussian, moments

SCALED = NoiseSchedule.scaled_linear()
SCHEDULES = {
    "linear": NoiseSchedule.linear(),
    "scaled_linear": SCALED,
    "squaredcos_cap_v2": NoiseSchedule.squaredcos_cap_v2(),
    "sigmoid": NoiseSchedule.sigmoid(),
    "laplace": NoiseSchedule.laplace(),
    "exp": NoiseSchedule.exp(),
    "zero_snr": NoiseSchedule.scaled_linear(prediction="v_prediction").zero_terminal_snr(),
    "variance_preserving": NoiseSchedule.variance_preserving(),
    "variance_exploding": NoiseSchedule.variance_exploding(),
    "sub_variance_preserving": NoiseSchedule.sub_variance_preserving(),
    "cosine": NoiseSchedule.cosine(),
    "flow": NoiseSchedule.flow(),
    "flow_shifted": NoiseSchedule.flow(shift=3.0),
    "karras": NoiseSchedule.karras(),
}
REFUSED = {("ddim_inverse", "variance_exploding")}
"""A score says nothing of the noise of an image that has none."""


@pytest.mark.parametrize("method", METHODS)
def test_every_method_on_every_schedule(method: str) -> None:
    for name, schedule in SCHEDULES.items():
        for steps in (1, 2, 3, 10):
            if (method, name) in REFUSED:
                with pytest.raises(
                    ValueError,
                    match="do not say the noise of an image that has none; start at the least",
                ):
                    Sampler(schedule, method, steps)
                continue
            # checks itself: finite, and right for data of one point
            table = Sampler(schedule, method, steps).table
            assert all(math.isfinite(knot.timestep) for knot in table.knots), (name, steps)
            assert table.steps[-1].carry[0], (name, steps)
            if (
                steps == 10
                and name in TAME
                and METHODS[method].order
                and not METHODS[method].inverse
            ):
                *_, (mean, variance) = moments(table, Gaussian(0.0, 0.5))
                assert abs(mean) < 1e-6, name
                assert abs(variance - 0.25) < 0.4, name


TAME = ("scaled_linear", "zero_snr", "flow_shifted")
"""Schedules on which ten steps are no longer than formulas of high order can bear."""


@pytest.mark.parametrize(
    "options", [{}, {"tau": 0.0}, {"predictor_order": 3, "corrector_order": 4, "tau": 0.0}], ids=str
)
@pytest.mark.parametrize("sigma_max", [50.0, 1348.0, 1e5])
@pytest.mark.parametrize("grid", ["trailing", "karras"])
def test_rounding_is_no_wrong_formula(options: dict[str, Any], sigma_max: float, grid: str) -> None:
    """Down from a σ of thousands in few steps the rounding of that σ is seen in x, times what the
    formula makes of it.
    """
    schedule = NoiseSchedule.variance_exploding(sigma_max=sigma_max)
    for steps in (2, 3, 4, 5, 8, 20):
        for by_data in (False, True):
            Sampler(schedule, "sa_solver", steps, grid, predict_x0=by_data, **options)


def test_a_wrong_formula_is_seen_in_well_conditioned_tables() -> None:
    """The bound is a few thousand roundings of the numbers that went in, not a fixed distance."""
    for schedule in (SCALED, SCHEDULES["flow_shifted"]):
        bounds = [
            ROUNDINGS * rounding
            for _, rounding in point_mass_defects(Sampler(schedule, "dpmpp_2m", 20).table)
        ]
        assert max(bounds) < 1e-6


# one step


@pytest.mark.parametrize(
    "grid", ["karras", "exponential", "beta", "lu", "kl_optimal", "polyexponential"]
)
@pytest.mark.parametrize("spacing", ["trailing", "leading", "linspace"])
def test_one_step_from_the_range_of_a_timestep_grid(grid: str, spacing: str) -> None:
    """The range is one point: the peer goes from it to the clean sample, and so does this."""
    flags = {
        "karras": "use_karras_sigmas",
        "exponential": "use_exponential_sigmas",
        "beta": "use_beta_sigmas",
    }
    schedule = NoiseSchedule.linear()
    first, last = Sampler(schedule, "euler", 1, grid, range_from=spacing).knots
    (expected, _) = make_knots(schedule, 1, spacing)
    assert first.sigma_ve == pytest.approx(expected.sigma_ve, rel=1e-9)
    assert last == CLEAN
    # theirs starts at the least noise, where one step does nothing
    if grid in flags and spacing != "linspace":
        scheduler = diffusers.EulerDiscreteScheduler(
            timestep_spacing=spacing, **{flags[grid]: True}
        )
        scheduler.set_timesteps(1)
        assert scheduler.sigmas.tolist() == pytest.approx([first.sigma_ve, 0.0], rel=1e-3)


def test_a_range_of_one_point_is_refused_for_more_steps() -> None:
    with pytest.raises(ValueError, match=r"^need 0 < sigma_min < sigma_max, got 2 and 2$"):
        Sampler(SCALED, "euler", 2, "karras", sigma_min=2.0, sigma_max=2.0)
    assert Sampler(
        SCALED, "euler", 1, "karras", sigma_min=2.0, sigma_max=2.0
    ).sigmas == pytest.approx([2.0, 0.0])


# numbers of other libraries


def still(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    return -x


@pytest.mark.parametrize(
    "kind",
    [int, np.int64, np.int32, np.uint8, np.array, torch.tensor],
    ids=lambda kind: kind.__name__,
)
def test_integers_of_any_kind(kind: Any) -> None:
    schedule = SCALED.with_prediction("v_prediction")
    sampler = Sampler(schedule, "dpmpp_2m", kind(4), "leading", steps_offset=kind(1))
    plain = Sampler(schedule, "dpmpp_2m", 4, "leading", steps_offset=1)
    assert sampler == plain
    assert type(sampler.steps) is int
    expected = plain(still, (2, 1, 3), seeds=[5, 6])
    shape = (kind(2), kind(1), kind(3))
    for seeds in (kind(5), [kind(5), kind(6)], np.array([5, 6]), torch.tensor([5, 6]), range(5, 7)):
        assert torch.equal(sampler(still, shape, seeds=seeds), expected)
    assert torch.equal(sampler(still, torch.Size([2, 1, 3]), seeds=5), expected)
    assert Sampler(schedule, "unipc", 4, order=kind(3)) == Sampler(schedule, "unipc", 4, order=3)
    assert RePaint(schedule, kind(8), kind(2), kind(2)) == RePaint(schedule, 8, 2, 2)
    assert VQDiffusion(TokenSchedule(5, 10), kind(4)) == VQDiffusion(TokenSchedule(5, 10), 4)
    assert resolution_shift(kind(128), 64) == 2.0


@pytest.mark.parametrize(
    "kind", [float, np.float64, np.float32, np.array, torch.tensor], ids=lambda kind: kind.__name__
)
def test_floats_of_any_kind(kind: Any) -> None:
    sampler = Sampler(SCALED, "ddim", 4, "karras", eta=kind(0.5), rho=kind(6))
    assert sampler == Sampler(SCALED, "ddim", 4, "karras", eta=0.5, rho=6)
    assert [type(value) for _, value in sampler.options] == [float, float]


BOOLS = [True, np.bool_(True), torch.tensor(True), np.array(True)]


@pytest.mark.parametrize(
    "value",
    [*BOOLS, 20.0, np.float64(20), torch.tensor(20.0), "20", None, [20], np.array([20])],
    ids=repr,
)
def test_what_is_no_integer(value: Any) -> None:
    for make in (
        lambda: whole_number("steps", value),
        lambda: Sampler(SCALED, "unipc", 4, order=value),
        *([lambda: Sampler(SCALED, "ddim", value)] if value is not None else []),
    ):
        with pytest.raises(ValueError, match="must be an integer, got "):
            make()
    if value is not None and not isinstance(value, list | np.ndarray):
        for seeds in (value, [value, value]):
            with pytest.raises(ValueError, match="must be an integer, got "):
                Sampler(SCALED, "ddim", 2)(still, (2, 3), seeds=seeds)
    with pytest.raises(ValueError, match=r"^the shape must be \(batch, ...\) of positive integers"):
        Sampler(SCALED, "ddim", 2)(still, (2, value))


@pytest.mark.parametrize("value", [*BOOLS, "0.5", b"1", [0.5], 1j, torch.ones(2)], ids=repr)
def test_what_is_no_number(value: Any) -> None:
    for make in (lambda: real_number("eta", value), lambda: Sampler(SCALED, "ddim", 4, eta=value)):
        with pytest.raises(ValueError, match=r"^eta must be a number, got "):
            make()


# arguments


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        (("ddim", 20.0), {}, r"^steps must be an integer, got 20\.0$"),
        (("ddim", 4, 7), {}, r"^grid must be a name or a function, got 7; points of one's own are timesteps"),
        (("ddim", 4, [999, 500]), {}, r"^grid must be a name or a function, got \[999, 500\]; points"),
        (("ddim", 4, np.linspace(14, 0, 5)), {}, "^grid must be a name or a function, got "),
        (("ddim", 4, ""), {}, "^unknown grid ''; known: "),
        (("ddim", 4, "kerras"), {}, "^unknown grid 'kerras'; did you mean 'karras'"),
        (("ddim", 4), {"etha": 0.5}, "^unknown option of ddim on the trailing grid 'etha'; did you "
                                     "mean 'eta'"),
        (("unipc", 4), {"solver_typ": "bh1"}, "did you mean 'solver_type'"),
        (("unipc", 4), {"solver_type": 1}, "^solver_type must be a name, got 1$"),
        (("unipc", 4), {"predict_x0": 1}, "^predict_x0 must be True or False, got 1$"),
        (("unipc", 4), {"disable_corrector": 1}, "^disable_corrector must be a sequence, got 1$"),
        (("unipc", 4), {"disable_corrector": [0.5]}, r"^disable_corrector\[0\] must be an integer, got 0.5$"),
        (("sa_solver", 4), {"tau_timesteps": [1]}, r"^tau_timesteps must hold 2 values, got \[1\]$"),
        (("ddim",), {"timesteps": [True, False]}, r"^timesteps must be a sequence of numbers, got \[True, False\]$"),
    ],
)  # fmt: skip
def test_bad_arguments_are_named(
    arguments: tuple[Any, ...], options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        Sampler(SCALED, *arguments, **options)


@pytest.mark.parametrize("name", [n for n, method in METHODS.items() if method.stochastic])
def test_the_check_of_marginals_may_join_noises(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The check is linear in the steps, since it keeps few independent noises apart."""
    table = Sampler(NoiseSchedule.linear(), name, 30).table
    kept = list(point_mass_defects(table))
    monkeypatch.setattr(table_module, "MAX_DIRECTIONS", 1)
    for (ours, rounding), (theirs, _) in zip(point_mass_defects(table), kept, strict=True):
        assert abs(ours - theirs) <= 4 * rounding


# long tables and construction


@pytest.mark.parametrize("method", METHODS)
def test_packed_steps_are_the_steps(method: str) -> None:
    options = {"lcm": {"original_steps": 100}}.get(method, {})
    schedule = SCHEDULES["zero_snr" if METHODS[method].order != 0 else "scaled_linear"]
    if method == "ddim_inverse":
        schedule = SCALED
    steps = Sampler(schedule, method, 30, **options).table.steps
    packed = PackedSteps.of(steps)
    assert tuple(packed) == steps and packed[-1] == steps[-1] and packed[1:3] == steps[1:3]
    assert packed == PackedSteps.of(packed) and hash(packed) == hash(PackedSteps.of(steps))
    assert len(packed.patterns) < 30  # so that a long table is small


def test_packed_steps_keep_the_bounds_of_rounding() -> None:
    """They are followed only where the rows alone explain too little of the rounding."""
    schedule = SCHEDULES["squaredcos_cap_v2"].with_prediction("flow_prediction")
    table = Sampler(schedule, "unipc", 2, predict_x0=False).table
    assert table.steps[0].sizes and not Sampler(schedule, "unipc", 2).table.steps[0].sizes
    packed = PackedSteps.of(table.steps)
    for step, kept in zip(table.steps, packed, strict=True):
        assert [step.sizes, step.ops[0].sizes] == [kept.sizes, kept.ops[0].sizes]
    assert list(point_mass_defects(replace(table, steps=packed))) == list(point_mass_defects(table))


@pytest.mark.parametrize("method", ["sa_solver_pece", "seeds_3", "dpmpp_2m_sde"])
def test_a_table_of_a_thousand_steps_is_at_most_a_megabyte(method: str) -> None:
    table = Sampler(SCALED, method, 1000, "karras").table
    assert isinstance(table.steps, PackedSteps) and len(table.steps) == 1000
    assert memory(table.steps, set()) + memory(table.knots, set()) < 1e6
    assert len(pickle.dumps(table)) < 1e6


def memory(value: Any, seen: set[int]) -> int:
    """Return the bytes of a value and of all that it refers to, each object counted once."""
    if id(value) in seen or isinstance(value, type):
        return 0
    seen.add(id(value))
    parts = (
        value
        if isinstance(value, tuple | list)
        else vars(value)
        if hasattr(value, "__dict__")
        else ()
    )
    slots = [getattr(value, name) for name in getattr(value, "__slots__", ())]
    return sys.getsizeof(value) + sum(memory(part, seen) for part in (*parts, *slots))


def test_a_packed_table_gives_the_same_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    def sample() -> torch.Tensor:
        sampler_module._compile.cache_clear()
        sampler = Sampler(SCALED, "dpmpp_2m_sde", 40, "karras")
        kinds.append(type(sampler.table.steps))
        return sampler(lambda x, t: torch.tanh(x), (1, 4), seeds=0)

    kinds: list[type] = []
    plain = sample()
    monkeypatch.setattr(table_module, "MOST_UNPACKED", 39)
    assert torch.equal(sample(), plain) and kinds == [tuple, PackedSteps]


@pytest.mark.parametrize(
    "method, options, most",
    [
        ("seeds_3", {}, 1),
        ("dpmpp_2s_ancestral", {"eta": 0.5}, 1),
        ("dpm_2", {"s_churn": 8.0}, 2),  # the middle of a step that starts at a raised knot
        ("tcd", {}, 1),
        ("pndm", {}, 1),
        ("dpmpp_2m", {}, 0),
    ],
)
def test_points_between_the_knots_are_looked_up_together(
    method: str, options: dict[str, Any], most: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The look-ups of a table do not grow with its steps, and their points are the right ones."""
    calls: list[int] = []
    for name in ("knots_at_half_log_snr", "knots_at"):
        function = getattr(knots_module, name)

        def counted(schedule: NoiseSchedule, at: Any, function: Any = function) -> Any:
            calls.append(len(at))
            return function(schedule, at)

        monkeypatch.setattr(knots_module, name, counted)
    alone = Sampler(SCALED, method, 20, **options).table
    for steps in (10, 40):
        calls.clear()
        Sampler(SCALED, method, steps, **options)
        assert len(calls) == most, calls
    monkeypatch.setattr(knots_module, "MAX_FORECASTS", 0)
    sampler_module._compile.cache_clear()
    calls.clear()
    each = Sampler(SCALED, method, 20, **options).table
    assert len(calls) >= 3 * most and rows_of(each) == pytest.approx(rows_of(alone))


def rows_of(table: Table) -> list[float]:
    rows = [dict(row) for step in table.steps for row in step.carry]
    return [row.get(k, 0.0) for row in rows for k in range(9)]
