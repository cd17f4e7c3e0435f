"""DPM fast on every grid: the budget is the number of evaluations, and the blocks keep their
orders.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

import oracles
from alphabar.noising import NoiseSchedule
from alphabar.sampling import GRIDS, METHODS, Method, Sampler, Table, make_knots
from alphabar.sampling.methods.dpm_singlestep import block_orders
from alphabar.sampling.tracing import Evaluation

SCALED = NoiseSchedule.scaled_linear()
VE = NoiseSchedule.variance_exploding(0.02, 20.0, prediction="epsilon")
ENDS = {
    "scaled_linear": SCALED,
    "ztsnr": SCALED.with_prediction("v_prediction").zero_terminal_snr(),
    "flow": NoiseSchedule.flow(shift=3.0),
    "ve": VE,
}
GEOMETRIC = [*torch.logspace(1.2, -1.3, 60).tolist(), 0.0]


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("name", ENDS)
def test_the_budget_is_the_number_of_evaluations(name: str, grid: str) -> None:
    for steps, final in (
        (1, "zero"),
        (2, "sigma_min"),
        (3, "zero"),
        (5, "sigma_min"),
        (20, "zero"),
        (21, "sigma_min"),
    ):
        table = Sampler(ENDS[name], "dpm_fast", steps, grid, final=final).table
        assert table.evaluations == steps, (steps, final)


def test_names_and_given_points_have_their_budget() -> None:
    for sampler, budget in (
        (Sampler(SCALED, "DPM fast", 20), 20),
        (Sampler(SCALED, "DPM fast Karras", 20), 20),
        (Sampler(SCALED, "DPM fast Karras", 20, eta=1.0), 20),
        (Sampler(SCALED, "dpm_fast", sigmas=[*torch.linspace(14, 0.1, 19).tolist(), 0.0]), 19),
        (Sampler(SCALED, "dpm_fast", timesteps=list(range(999, 0, -50))), 20),
        (Sampler(SCALED, "dpm_fast", 20, _halves), 20),
    ):
        assert sampler.table.evaluations == sampler.steps == budget
        assert orders_of(sampler.table)[:6] == [3] * 6


def _halves(schedule: NoiseSchedule, steps: int) -> Any:
    """A grid of one's own."""
    return make_knots(schedule, steps, "exponential", final="zero")


def orders_of(table: Table) -> list[int]:
    return [sum(isinstance(op, Evaluation) for op in step.ops) for step in table.steps]


@pytest.mark.parametrize("final", ["zero", "sigma_min"])
def test_blocks_go_between_knots_of_the_grid(final: str) -> None:
    sampler = Sampler(SCALED, "dpm_fast", 20, "karras", final=final)
    grid = make_knots(SCALED, 20, "karras", final=final)
    assert orders_of(sampler.table) == [3] * 6 + ([1, 1] if final == "zero" else [2])
    assert sampler.knots == (
        *(grid[i] for i in range(0, 19, 3)),
        *(grid[19:] if final == "zero" else grid[20:]),
    )


@pytest.mark.parametrize("nfe", range(1, 30))
def test_block_orders_add_up(nfe: int) -> None:
    for from_noise in (False, True):
        for to_clean in (False, True):
            orders = block_orders(nfe, from_noise, to_clean)
            assert sum(orders) == nfe
            assert {*orders} <= {1, 2, 3}
            assert not from_noise or orders[0] == 1
            assert not to_clean or orders[-1] == 1
    assert len(block_orders(nfe)) == nfe // 3 + 1  # as k-diffusion and the paper lay them


def end_error(sampler: Sampler) -> float:
    """The error at the last knot with noise, in units of its σ."""
    table, state = sampler.table, [oracles.START]
    count = len(table.steps) - (table.knots[-1].sigma == 0)
    evaluate = oracles.DATA.network(table.prediction)
    for step in table.steps[:count]:
        state = oracles.advance(step, state, evaluate)
    exact = oracles.DATA.flow(oracles.START, table.knots[0], table.knots[count])
    return float((state[0] - exact).abs().max()) / table.knots[count].sigma


MEASURED: dict[str, dict[str, Any]] = {
    "karras": {"grid": "karras", "final": "sigma_min"},
    "exponential": {"grid": "exponential", "final": "sigma_min"},
    "exponential to the clean end": {"grid": "exponential"},
    "polyexponential": {"grid": "polyexponential", "rho": 1.3, "final": "sigma_min"},
    "trailing": {"grid": "trailing", "final": "sigma_min"},
    "dpm_fast": {"grid": "dpm_fast"},
}


@pytest.mark.parametrize("name", MEASURED)
def test_order_on_every_kind_of_grid(name: str) -> None:
    """Budgets whose blocks are of order 3, or of order 2 once at the end, which costs no order."""
    options = dict(MEASURED[name])
    grid, rest = options.pop("grid"), 1 if name.endswith("clean end") else 2
    errors = [
        end_error(Sampler(VE, "dpm_fast", n + rest, grid, **options)) for n in (180, 360, 720)
    ]
    assert oracles.slope(errors) > 2.9
    assert errors[-1] < 1e-6


def test_order_on_given_sigmas() -> None:
    errors = []
    for n in (180, 360, 720):
        sigmas = torch.logspace(math.log10(18), math.log10(0.05), n, dtype=torch.float64).tolist()
        errors.append(end_error(Sampler(VE, "dpm_fast", sigmas=[*sigmas, 0.0])))
    assert oracles.slope(errors) == pytest.approx(3, abs=0.2)


def test_a_grid_that_does_not_fit_the_budget_is_refused() -> None:
    fast = METHODS["dpm_fast"]
    astray = Method("astray", fast.formula, order=3, source="", steps_option="nfe", grid="karras")
    with pytest.raises(
        ValueError, match=r"^20 evaluations make 8 steps between these ends, got a grid of 20$"
    ):
        Sampler(SCALED, astray, 20)
