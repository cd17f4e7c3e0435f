"""Every method does what it declares on an exact problem, and a wrong formula is noticed.

Four measurements (oracles.py): the point-mass defect, the global order, the local order on an irregular grid, the exact
weak order. None of them sees every mistake; MUTANTS below makes mistakes on purpose and says which one must see each.
"""

from __future__ import annotations

import inspect
import math
from functools import cache
from types import ModuleType
from typing import Any, NamedTuple

import pytest
import torch

import oracles
from alphabar.noising import PREDICTIONS, NoiseSchedule
from alphabar.sampling import CLEAN, GRIDS, METHODS, Method, Sampler, Table, dpmpp, first_order, heun, make_knots
from alphabar.sampling.first_order import posterior_spread
from oracles import (
    SCHEDULES,
    Gaussian,
    allowed,
    amplification,
    even_grid,
    point_mass_defect,
    traced,
    vp_knots,
    zigzag_grid,
)

DETERMINISTIC = [method for method in METHODS.values() if not method.stochastic]
STOCHASTIC = [method for method in METHODS.values() if method.stochastic]
NEAR = 0.2
POINT_MASS = 1e-12


def name_of(method: Method) -> str:
    return method.name


# order


@pytest.mark.parametrize("method", DETERMINISTIC, ids=name_of)
def test_global_order(method: Method) -> None:
    assert oracles.global_order(method.formula) == pytest.approx(method.order, abs=NEAR)


@pytest.mark.parametrize("method", DETERMINISTIC, ids=name_of)
def test_local_order_on_an_irregular_grid(method: Method) -> None:
    assert oracles.local_order(method.formula) == pytest.approx(method.order + 1, abs=NEAR)


@pytest.mark.parametrize("method", DETERMINISTIC, ids=name_of)
@pytest.mark.parametrize("prediction", ["epsilon", "sample", "flow_prediction"])
def test_order_does_not_depend_on_the_prediction(method: Method, prediction: str) -> None:
    kind = PREDICTIONS[prediction]()
    assert oracles.local_order(method.formula, prediction=kind) == pytest.approx(method.order + 1, abs=NEAR)


@pytest.mark.parametrize("method", METHODS.values(), ids=name_of)
def test_weak_order(method: Method) -> None:
    assert oracles.weak_order(method.formula) == pytest.approx(method.order, abs=NEAR)


@pytest.mark.parametrize("method", STOCHASTIC, ids=name_of)
def test_weak_order_on_an_irregular_grid(method: Method) -> None:
    assert oracles.weak_order(method.formula, grid=zigzag_grid) == pytest.approx(method.order, abs=NEAR)


ETA = [method for method in METHODS.values() if "eta" in method.options]


@pytest.mark.parametrize("method", ETA, ids=name_of)
@pytest.mark.parametrize("eta", [0.0, 0.3, 1.0])
def test_weak_order_at_every_eta(method: Method, eta: float) -> None:
    assert oracles.weak_order(method.formula, eta=eta) == pytest.approx(method.order, abs=NEAR)


@pytest.mark.parametrize("method", METHODS.values(), ids=name_of)
def test_declared_draws_and_evaluations(method: Method) -> None:
    table = traced(method.formula, even_grid(10), PREDICTIONS["v_prediction"]())
    assert (table.draws > 0) == method.stochastic
    assert table.evaluations == 10 * method.evaluations


@pytest.mark.parametrize("method", METHODS.values(), ids=name_of)
@pytest.mark.parametrize("name", SCHEDULES)
def test_samples_have_the_spread_of_the_data(method: Method, name: str) -> None:
    """Whole runs, the last step into the clean end included, on every schedule: mean and variance come out."""
    schedule = SCHEDULES[name].with_prediction("v_prediction")
    data = Gaussian()
    errors = []
    for steps in (50, 100, 200):
        table = traced(method.formula, make_knots(schedule, steps, "trailing"), schedule.prediction)
        *_, (mean, variance) = oracles.moments(table, data)
        errors.append(max(abs(mean - data.mean), abs(variance - data.spread**2)))
    assert errors[2] < errors[1] < errors[0]
    assert errors[2] < 0.02


# the posterior, which the marginals do not see: they come out right for any amount of renewed noise


def test_posterior_spread_is_that_of_bayes() -> None:
    for s, n in zip(vp_knots([-2.0, -0.5, 0.3]), vp_knots([-1.5, 0.5, 3.0]), strict=True):
        # q(x_s | x_n) has gain α_s/α_n and variance σ_s² - gain² σ_n²; x_n given x_0 has variance σ_n²
        gain = s.alpha / n.alpha
        forward = s.sigma**2 - gain**2 * n.sigma**2
        variance = 1 / (1 / n.sigma**2 + gain**2 / forward)
        assert posterior_spread(s, n) == pytest.approx(math.sqrt(variance), rel=1e-12)
        assert posterior_spread(s, CLEAN) == 0.0


def test_ddpm_variance_is_beta_tilde() -> None:
    schedule = NoiseSchedule.linear()
    for t in (1, 10, 500, 999):
        s, n = make_knots(schedule, 1000, "trailing")[999 - t : 1001 - t]
        beta = schedule.curve.betas()[t].item()
        bars = schedule.alphas_cumprod[t - 1 : t + 1].tolist()
        assert (s.timestep, n.timestep) == (t, t - 1)
        beta_tilde = (1 - bars[0]) / (1 - bars[1]) * beta  # Ho et al. 2006.11239, eq. 7
        assert posterior_spread(s, n) == pytest.approx(math.sqrt(beta_tilde), rel=1e-9)


# the point mass


@pytest.mark.parametrize("method", METHODS.values(), ids=name_of)
@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("name", SCHEDULES)
def test_point_mass(method: Method, grid: str, name: str) -> None:
    assert method.point_mass, "declare and test in another way how far it misses the marginals"
    for schedule in allowed(SCHEDULES[name]):
        for steps in (1, 2, 7, 20, 50):
            table = traced(method.formula, make_knots(schedule, steps, grid), schedule.prediction)
            assert point_mass_defect(table) <= tolerance(method, name, table), (schedule.prediction.name, steps)


def tolerance(method: Method, name: str, table: Table) -> float:
    """1e-12; but a second evaluation on the way down from σ/α = 2e4 enlarges a rounding error by up to 1e11."""
    return 1e-14 * amplification(table) if name == "squaredcos" and method.evaluations > 1 else POINT_MASS


@pytest.mark.parametrize("method", METHODS.values(), ids=name_of)
@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("name", SCHEDULES)
def test_every_combination_compiles(method: Method, grid: str, name: str) -> None:
    for schedule in allowed(SCHEDULES[name]):
        for steps in (1, 2, 3, 8, 14, 50):
            table = Sampler(schedule, method, steps, grid).table  # it checks itself at birth
            assert table.evaluations >= steps
            assert name == "squaredcos" or table.point_mass_defect() <= POINT_MASS


@pytest.mark.parametrize("method", ETA, ids=name_of)
@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_point_mass_at_every_eta(method: Method, eta: float) -> None:
    for name, schedule in SCHEDULES.items():
        table = traced(method.formula, make_knots(schedule, 10, "trailing"), schedule.prediction, eta=eta)
        assert point_mass_defect(table) <= POINT_MASS, name


@pytest.mark.parametrize("method", ETA, ids=name_of)
@pytest.mark.parametrize("eta", [-0.1, 1.1, float("nan")])
def test_bad_eta(method: Method, eta: float) -> None:
    with pytest.raises(ValueError, match=rf"^eta must be between 0 \(deterministic\) and 1 \(ancestral\), got {eta}$"):
        Sampler(SCHEDULES["scaled_linear"], method, 5, eta=eta)


# mutants: one edit in the source of a formula


class Mutant(NamedTuple):
    module: ModuleType
    method: str
    right: str
    wrong: str
    seen_by: str
    options: tuple[tuple[str, float], ...] = ()


KEEP = "math.sqrt(max(n.sigma**2 - r**2, 0.0)) / s.sigma"
MUTANTS = {
    "2M: extrapolation weight 1/r for 1/(2r)": Mutant(dpmpp, "dpmpp_2m", "h / (2 * h_last)", "h / h_last", "local order"),
    "2M: one of its two weights": Mutant(dpmpp, "dpmpp_2m", "(D - past[0])", "(1.1 * D - past[0])", "point mass"),
    "2M: step ratio upside down": Mutant(dpmpp, "dpmpp_2m", "h / (2 * h_last)", "h_last / (2 * h)", "local order"),
    "2M: sign of the correction": Mutant(dpmpp, "dpmpp_2m", "D + (h", "D - (h", "local order"),
    "2M: the extrapolation forgotten": Mutant(dpmpp, "dpmpp_2m", "E = D + ", "E = D + 0 * ", "local order"),
    "2M: log-SNR for half of it in one step": Mutant(dpmpp, "dpmpp_2m", "n.half_log_snr - s", "2 * n.half_log_snr - s", "local order"),
    "2M: it remembers the extrapolated estimate": Mutant(dpmpp, "dpmpp_2m", "s, n), D]", "s, n), E]", "local order"),
    "Heun: only the second slope": Mutant(
        heun, "heun", "0.5 * ((x - s.alpha * D) / s.sigma + (", "((x - s.alpha * D) * 0.0 + (", "local order"
    ),
    "Heun: weights that do not sum to one": Mutant(heun, "heun", "0.5 * ((x", "0.6 * ((x", "point mass"),
    "Heun: the wrong sigma in a slope": Mutant(heun, "heun", "D_n) / n.sigma)", "D_n) / s.sigma)", "point mass"),
    "Heun: the first slope twice": Mutant(heun, "heun", "(x_n - n.alpha * D_n) / n.sigma", "(x - s.alpha * D) / s.sigma", "local order"),
    "Heun: the second evaluation at the first knot": Mutant(heun, "heun", "trace.denoise(x_n, n)", "trace.denoise(x_n, s)", "local order"),
    "Heun: alpha of the wrong end": Mutant(heun, "heun", "return [n.alpha * (x", "return [s.alpha * (x", "point mass"),
    "DDIM: alpha of the wrong end": Mutant(first_order, "ddim", "n.alpha - keep * s.alpha", "n.alpha - keep * n.alpha", "point mass"),
    "DDIM: sigma of the wrong end": Mutant(first_order, "ddim", ") / s.sigma\n", ") / n.sigma\n", "point mass"),
    "ancestral: noise level squared": Mutant(first_order, "euler_ancestral", "y + r * z", "y + r * r * z", "point mass"),
    "ancestral: old noise is not lowered": Mutant(first_order, "ddpm", KEEP, "n.sigma / s.sigma", "point mass"),
    "ancestral: variance not restored": Mutant(first_order, "ddpm", "n.sigma**2 - r**2", "n.sigma**2 - 2 * r**2", "point mass"),
    "DDIM: eta forgotten once": Mutant(first_order, "ddim", KEEP, KEEP.replace("r**2", "r"), "point mass", (("eta", 0.5),)),
    "posterior: ratio not squared": Mutant(first_order, "ddpm", "1 - ratio**2", "1 - ratio", "posterior"),
    "posterior: no square root": Mutant(first_order, "ddpm", "math.sqrt(max(1 - ratio**2, 0.0))", "(1 - ratio**2)", "posterior"),
    "posterior: sigma of the wrong end": Mutant(first_order, "ddpm", "return n.sigma * math", "return s.sigma * math", "posterior"),
}  # fmt: skip


@cache
def mutated(module: ModuleType, right: str, wrong: str) -> ModuleType:
    source = inspect.getsource(module)
    assert source.count(right) == 1, (
        f"{right!r} stands {source.count(right)} times in {module.__name__}: word the mutant anew"
    )
    copy = ModuleType(module.__name__ + "_mutant")
    copy.__package__ = module.__package__
    exec(compile(source.replace(right, wrong), copy.__name__, "exec"), copy.__dict__)
    return copy


def findings(module: ModuleType, name: str, options: dict[str, float]) -> set[str]:
    """The measurements that disagree with what the method of this name declares."""
    method = next(m for m in module.METHODS if m.name == name)
    table = traced(method.formula, zigzag_grid(20), oracles.V, **options)
    found = {"point mass"} if point_mass_defect(table) > POINT_MASS else set()
    if table.draws:
        measured = {"weak order": (oracles.weak_order(method.formula, **options), method.order)}
    else:
        measured = {
            "global order": (oracles.global_order(method.formula, **options), method.order),
            "local order": (oracles.local_order(method.formula, **options), method.order + 1),
        }
    found |= {what for what, (order, declared) in measured.items() if not abs(order - declared) <= NEAR}
    if hasattr(module, "posterior_spread"):
        s, n = vp_knots([-0.5, 0.5])
        found |= {"posterior"} if abs(module.posterior_spread(s, n) / posterior_spread(s, n) - 1) > 1e-9 else set()
    return found


@pytest.mark.parametrize("mistake", MUTANTS)
def test_mutants_are_noticed(mistake: str) -> None:
    mutant = MUTANTS[mistake]
    options = dict(mutant.options)
    assert findings(mutant.module, mutant.method, options) == set()  # as it stands, nothing is found
    assert mutant.seen_by in findings(mutated(mutant.module, mutant.right, mutant.wrong), mutant.method, options)


def test_the_irregular_grid_is_needed() -> None:
    """2M with its step ratio upside down: on an even grid nothing at all is wrong with it."""
    mutant = MUTANTS["2M: step ratio upside down"]
    formula = mutated(mutant.module, mutant.right, mutant.wrong).dpmpp_2m
    assert oracles.global_order(formula) == pytest.approx(2, abs=NEAR)
    assert point_mass_defect(traced(formula, even_grid(20), oracles.V)) <= POINT_MASS
    assert oracles.local_order(formula) == pytest.approx(2, abs=NEAR)  # where 3 is declared


def test_a_table_with_a_wrong_formula_is_refused_at_birth() -> None:
    mutant = MUTANTS["Heun: weights that do not sum to one"]
    wrong = next(m for m in mutated(mutant.module, mutant.right, mutant.wrong).METHODS if m.name == "heun")
    with pytest.raises(
        ValueError, match=r"^heun: the table misses the marginals of its grid by .*; its formula is wrong$"
    ):
        Sampler(SCHEDULES["scaled_linear"], wrong, 10)


def test_a_table_that_is_not_finite_is_refused_at_birth() -> None:
    def blows_up(trace: Any, knots: Any, i: int, x: Any) -> list[Any]:
        return [math.nan * x]

    with pytest.raises(
        ValueError,
        match=r"^blows_up: step 1 of 5 has a coefficient that is not finite; use another grid or fewer steps$",
    ):
        Sampler(SCHEDULES["scaled_linear"], Method("blows_up", blows_up, order=1, source="", point_mass=False), 5)


def test_the_oracle_is_right() -> None:
    """The closed forms against each other and against many samples: x at a knot has the marginal, and D is its regression."""
    data = Gaussian(mean=0.7, spread=0.4)
    (knot,) = vp_knots([0.4])
    generator = torch.Generator().manual_seed(0)
    x0 = data.mean + data.spread * torch.randn(400_000, generator=generator, dtype=torch.float64)
    x = knot.alpha * x0 + knot.sigma * torch.randn(x0.shape, generator=generator, dtype=torch.float64)
    mean, deviation = data.marginal(knot)
    assert float(x.mean()) == pytest.approx(mean, abs=5e-3)
    assert float(x.std()) == pytest.approx(deviation, abs=5e-3)
    a, b = data.denoiser(knot)
    residual = x0 - (a * x + b)
    assert abs(float(residual.mean())) < 5e-3
    assert abs(float((residual * x).mean())) < 5e-3
    # the flow solves dx/dλ of the probability flow ODE: x' = (α'/α) x + σ (σ'/σ - α'/α) ε̂, checked by central differences
    h = 1e-4
    before, here, after = vp_knots([0.4 - h, 0.4, 0.4 + h])
    point = torch.tensor(1.3, dtype=torch.float64)
    slope = float(data.flow(point, here, after) - data.flow(point, here, before)) / (2 * h)
    d_alpha, d_sigma = (after.alpha - before.alpha) / (2 * h), (after.sigma - before.sigma) / (2 * h)
    denoised = a * float(point) + b
    epsilon = (float(point) - here.alpha * denoised) / here.sigma
    assert slope == pytest.approx(d_alpha * denoised + d_sigma * epsilon, rel=1e-6)
