"""Agreement with k-diffusion's samplers: frozen results, replayed on the same network, start, grid
and noise.

tests/frozen/make_k_diffusion.py made the numbers and says what they are. DPM adaptive, which is no
table, is in test_adaptive.py.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from alphabar.noising import NoiseSchedule
from alphabar.sampling import METHODS, Knot
from alphabar.sampling.kernel import run
from alphabar.sampling.knots import CLEAN, knot_at_half_log_snr
from alphabar.sampling.table import Table, compile_table

FROZEN = json.loads((Path(__file__).parent / "frozen" / "k_diffusion.json").read_text())
CASES = {case["name"]: case for case in FROZEN["cases"] if case["sampler"] != "sample_dpm_adaptive"}
MATRIX = torch.tensor(FROZEN["matrix"], dtype=torch.float64)
SCHEDULES = {
    "scaled_linear": NoiseSchedule.scaled_linear(),
    "karras": NoiseSchedule.karras(),
    "flow": NoiseSchedule.flow(shift=3.0),
}


def denoiser(x: Tensor, sigma: float) -> Tensor:
    s = math.sqrt(1 + sigma**2)
    return 0.8 * torch.tanh(x @ MATRIX.T / s) + 0.1 * torch.cos(x / s)


def knots_of(schedule: NoiseSchedule, sigmas: list[float]) -> tuple[Knot, ...]:
    return tuple(knot_at_half_log_snr(schedule, -math.log(s)) if s else CLEAN for s in sigmas)


def table_of(schedule: NoiseSchedule, case: dict[str, Any]) -> Table:
    options = dict(case["options"])
    name = case["sampler"].removeprefix("sample_")
    sigmas = FROZEN["sigmas"]
    if name == "dpm_fast":
        options["nfe"] = options.pop("n")
        steps = options["nfe"] // 3 + 1
        low, high = math.log(FROZEN["sigma_min"]), math.log(FROZEN["sigma_max"])
        sigmas = [math.exp(high + (low - high) * i / steps) for i in range(steps + 1)]
    formula = METHODS[name].formula
    return compile_table(
        name, lambda *a: formula(*a, **options), knots_of(schedule, sigmas), schedule
    )


def replay(table: Table, schedule: NoiseSchedule, case: dict[str, Any]) -> Tensor:
    path: Any = case.get("path")
    recorded = iter(n for n in case["noise"])

    def w(sigma: float) -> Tensor:
        k = min(range(len(path["sigma"])), key=lambda j: abs(path["sigma"][j] - sigma))
        assert path["sigma"][k] == pytest.approx(sigma, rel=1e-9)
        return torch.tensor(path["w"][k], dtype=torch.float64)

    def noise(start: float, end: float) -> Tensor:
        if path:
            return (w(end) - w(start)) / abs(end - start) ** 0.5
        # churn: drawn at every step there, and here where it is used
        draw = next(n for n in recorded if _same(n, start, end))
        return torch.tensor(draw["z"], dtype=torch.float64)

    def evaluate(x: Tensor, knot: Knot) -> Tensor:
        x = x / knot.input_scale
        D = denoiser(x / knot.alpha, knot.sigma_ve)
        return schedule.prediction.combine(
            D, (x - knot.alpha * D) / knot.sigma, knot.alpha, knot.sigma
        )

    start = torch.tensor(FROZEN["x"], dtype=torch.float64) * table.knots[0].alpha
    *_, last = run(table, start, evaluate, noise)
    return last.x / table.knots[-1].alpha


def _same(draw: dict[str, Any], start: float, end: float) -> bool:
    return math.isclose(
        min(draw["from"], draw["to"]), min(start, end), rel_tol=1e-9
    ) and math.isclose(max(draw["from"], draw["to"]), max(start, end), rel_tol=1e-9)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)
def test_agreement(name: str, schedule: NoiseSchedule) -> None:
    """The same numbers in any coordinates: k-diffusion's x is x / α, and its D does not know of a
    schedule.
    """
    case = CASES[name]
    expected = torch.tensor(case["x"], dtype=torch.float64)
    difference = float(
        (replay(table_of(schedule, case), schedule, case) - expected).abs().max()
        / expected.abs().max()
    )
    # its LMS integrates to 1e-4 of each coefficient
    assert difference < 1e-6 if "lms" in name else difference < 1e-9


def test_a_difference_would_be_seen() -> None:
    case = CASES["dpmpp_2m"]
    wrong = case | {"sampler": "sample_euler"}
    expected = torch.tensor(case["x"], dtype=torch.float64)
    schedule = SCHEDULES["karras"]
    assert float((replay(table_of(schedule, wrong), schedule, wrong) - expected).abs().max()) > 1e-3
