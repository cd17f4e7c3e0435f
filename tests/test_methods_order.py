"""Every method does what it declares on an exact problem, and a wrong formula is noticed.

Four measurements (oracles.py): the point-mass defect, the global order, the local order on an
irregular grid, the exact weak order. None of them sees every mistake; MUTANTS below makes mistakes
on purpose and says which one must see each.
"""

from __future__ import annotations

import inspect
import math
import sys
from functools import cache
from types import ModuleType
from typing import Any, NamedTuple
from unittest.mock import patch

import pytest
import torch

import oracles
from all_pairs import all_pairs
from alphabar.noising import PREDICTIONS, NoiseSchedule
from alphabar.noising.utils.registry import Registry
from alphabar.sampling import CLEAN, GRIDS, METHODS, Knot, Method, Sampler, Table, make_knots
from alphabar.sampling.kernel import run
from alphabar.sampling.methods import adams, base, churn, dpm2, dpm_solver, exponential, heun, unipc
from alphabar.sampling.methods import steps as first_order_steps
from alphabar.sampling.methods.steps import posterior_std
from alphabar.sampling.table import compile_table
from alphabar.sampling.tracing import Trace
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

UPWARD = [method for method in METHODS.values() if method.inverse]
# of distilled models: they do not converge
FEW_STEPS = [m for m in METHODS.values() if m.order == 0 and not m.reaches]
CONVERGING = [method for method in METHODS.values() if method not in UPWARD + FEW_STEPS]
REACHING = [method for method in CONVERGING if method.reaches]
DETERMINISTIC = [method for method in CONVERGING if not method.stochastic]
STOCHASTIC = [method for method in CONVERGING if method.stochastic]
NEAR = 0.2
POINT_MASS = 1e-12


def name_of(method: Method) -> str:
    return method.name


def options_of(method: Method) -> dict[str, Any]:
    """The options under which a method is at its best: its defaults, but for what a higher order
    takes.
    """
    return default_options(method) | (method.reaches[1] if method.reaches else {})


def default_options(method: Method) -> dict[str, Any]:
    """The defaults; SA-Solver's noise, which it draws at some training timesteps alone, at all
    points of these grids.
    """
    everywhere = (
        {"tau_timesteps": (-math.inf, math.inf)} if "tau_timesteps" in method.options else {}
    )
    return dict(method.defaults) | everywhere


def order_of(method: Method) -> int:
    """The order of a method under ``options_of``."""
    return method.reaches[0] if method.reaches else method.order


# order


@pytest.mark.parametrize("method", DETERMINISTIC, ids=name_of)
def test_global_order_on_an_irregular_grid(method: Method) -> None:
    measured = oracles.global_order(method.formula, rewrites=method.rewrites, **method.defaults)
    assert measured == pytest.approx(method.order, abs=NEAR)


@pytest.mark.parametrize("method", [m for m in REACHING if not m.stochastic], ids=name_of)
def test_higher_orders_that_options_reach(method: Method) -> None:
    assert order_of(method) > method.order
    measured = oracles.global_order(method.formula, rewrites=method.rewrites, **options_of(method))
    assert measured == pytest.approx(order_of(method), abs=NEAR)


@pytest.mark.parametrize("method", DETERMINISTIC, ids=name_of)
@pytest.mark.parametrize("prediction", ["v_prediction", "epsilon", "sample", "flow_prediction"])
def test_local_order_on_an_irregular_grid(method: Method, prediction: str) -> None:
    kind = PREDICTIONS[prediction]()
    settings = {"prediction": kind, "rewrites": method.rewrites, "block": method.block}
    measured = oracles.local_order(method.formula, **settings, **options_of(method))
    assert measured == pytest.approx(order_of(method) + 1, abs=NEAR)


VARIANTS: list[tuple[str, int, dict[str, Any]]] = [
    ("dpm_solver_multistep", 1, {"order": 1}),
    ("dpm_solver_multistep", 2, {"solver_type": "heun"}),
    ("dpm_solver_multistep", 2, {"algorithm": "dpmsolver"}),
    ("dpm_solver_multistep", 2, {"algorithm": "dpmsolver", "solver_type": "heun"}),
    ("dpm_solver_multistep", 2, {"order": 3}),  # as published: see the head of dpm_solver.py
    ("dpm_solver_singlestep", 1, {"order": 1}),
    ("dpm_solver_singlestep", 2, {"algorithm": "dpmsolver"}),
    ("dpm_solver_singlestep", 2, {"solver_type": "heun"}),
    ("unipc", 3, {"solver_type": "bh1"}),
    ("unipc", 3, {"predict_x0": False}),
    ("unipc", 2, {"order": 1}),
    ("lms", 1, {"order": 1}),
    ("lms", 2, {"order": 2}),
    ("lms", 3, {"order": 3}),
    ("deis", 1, {"order": 1}),
    ("deis", 2, {"order": 2}),
    ("res_multistep", 1, {"order": 1}),
    ("res_multistep", 4, {"order": 4}),
    ("sa_solver", 2, {"tau": 0.0}),
    (
        "sa_solver",
        4,
        {"tau": 0.0, "predictor_order": 3, "corrector_order": 4, "lower_order_final": False},
    ),
]


@pytest.mark.parametrize(("name", "order", "options"), VARIANTS, ids=lambda value: str(value))
def test_order_of_every_variant(name: str, order: int, options: dict[str, Any]) -> None:
    method = METHODS[name]
    options = options_of(method) | options
    rewrites = method.rewrites
    block = options.get("order", method.block) if method.block > 1 else 1
    measured = oracles.local_order(method.formula, rewrites=rewrites, block=block, **options)
    assert measured == pytest.approx(order + 1, abs=NEAR)
    assert oracles.global_order(method.formula, rewrites=rewrites, **options) == pytest.approx(
        order, abs=NEAR
    )


def test_third_order_blocks_on_an_even_grid() -> None:
    """DPM-Solver-3 assumes its points at thirds of the step: it is of order 3 where they are, and
    of order 2 elsewhere.
    """
    formula, counts = METHODS["dpm_solver_singlestep"].formula, (96, 192)
    for options in ({}, {"algorithm": "dpmsolver"}, {"solver_type": "heun"}):
        assert oracles.global_order(
            formula, grid=even_grid, counts=counts, order=3, **options
        ) == pytest.approx(3, abs=NEAR)


@pytest.mark.parametrize("method", STOCHASTIC, ids=name_of)
@pytest.mark.parametrize("grid", [even_grid, zigzag_grid])
def test_weak_order(method: Method, grid: Any) -> None:
    measured = oracles.weak_order(method.formula, grid=grid, **default_options(method))
    assert measured == pytest.approx(method.order, abs=NEAR if method.order else 0.5)
    if method.reaches:
        measured = oracles.weak_order(method.formula, grid=grid, **options_of(method))
        assert measured == pytest.approx(order_of(method), abs=NEAR)


def test_one_brownian_path_is_what_makes_dpmpp_sde_second_order(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert oracles.weak_order(METHODS["dpmpp_sde"].formula) == pytest.approx(2, abs=NEAR)
    monkeypatch.setattr(Trace, "noise", lambda self, s, n: self._draw(s.sigma_ve, n.sigma_ve))
    assert oracles.weak_order(METHODS["dpmpp_sde"].formula) == pytest.approx(1, abs=NEAR)


ETA = [
    method for method in CONVERGING if "eta" in method.options and method.options["eta"] is not None
]


@pytest.mark.parametrize("method", ETA, ids=name_of)
@pytest.mark.parametrize("eta", [0.0, 0.3, 1.0])
def test_eta(method: Method, eta: float) -> None:
    options = options_of(method) | {"eta": eta}
    table = traced(method.formula, zigzag_grid(10), oracles.V, **options)
    assert (table.draws > 0) == (eta > 0)
    # between the ends the second-order ancestral methods are of order 1
    if order_of(method) == 1 or eta == 1.0:
        assert oracles.weak_order(method.formula, **options) > 0.8


@pytest.mark.parametrize("method", CONVERGING, ids=name_of)
def test_declared_draws_and_evaluations(method: Method) -> None:
    table = traced(
        method.formula, even_grid(10), PREDICTIONS["v_prediction"](), **options_of(method)
    )
    assert (table.draws > 0) == method.stochastic
    # of their starts; Heun++ ends with a step of two and one of one, and the first step of PECE
    # corrects nothing
    extra = {"plms": 1, "pndm": 9, "heunpp2": -3, "sa_solver_pece": -1}.get(method.name, 0)
    assert table.evaluations == 10 * method.evaluations + extra


@pytest.mark.parametrize("method", CONVERGING, ids=name_of)
@pytest.mark.parametrize("name", SCHEDULES)
def test_samples_have_the_spread_of_the_data(method: Method, name: str) -> None:
    """Whole runs, the last step into the clean end included, on every schedule: mean and variance
    come out.
    """
    schedule = SCHEDULES[name].with_prediction("v_prediction")
    data = Gaussian()
    options = options_of(method)
    if method.name == "pndm" and name == "squaredcos":
        return  # its first steps there are all rounding, see tolerance()
    errors = []
    for steps in (50, 200):
        knots = make_knots(schedule, steps, "trailing")
        table = compile_table(
            "traced", lambda *a: method.formula(*a, **options), knots, schedule, point_mass=False
        )
        *_, (mean, variance) = oracles.moments(table, data)
        errors.append(max(abs(mean - data.mean), abs(variance - data.spread**2)))
    assert errors[1] < max(errors[0], 1e-3)
    assert errors[1] < 0.03


@pytest.mark.parametrize("name", ["consistency", "lcm"])
def test_a_consistency_model_is_sampled_exactly(name: str) -> None:
    """With the exact consistency function, which carries x to the end of its trajectory, every
    number of steps gives the data.
    """
    curve = {
        "consistency": NoiseSchedule.karras(sigma_min=1e-6),
        "lcm": NoiseSchedule.scaled_linear(),
    }[name]
    schedule, data = curve.with_prediction("sample"), Gaussian()
    options = {"timestep_scaling": 1e9} if name == "lcm" else {}
    for steps in (1, 2, 5):
        knots = make_knots(schedule, steps, "karras" if name == "consistency" else "trailing")
        table = compile_table(
            name, lambda *a: METHODS[name].formula(*a, **options), knots, schedule, point_mass=False
        )
        mean, deviation = data.marginal(knots[0])
        # the map is affine: two points tell it
        points = torch.tensor([mean, mean + deviation], dtype=torch.float64)

        def consistency_function(x: torch.Tensor, knot: Any) -> torch.Tensor:
            return data.flow(x / knot.input_scale, knot, CLEAN)

        *_, last = run(
            table, points, consistency_function, lambda start, end, still=0 * points: still
        )
        noiseless = last.x
        assert float(noiseless[0]) == pytest.approx(data.mean, abs=1e-4)
        variance = float(noiseless[1] - noiseless[0]) ** 2
        for k in range(table.draws):
            draws = iter(
                [float(j == k) * torch.ones(2, dtype=torch.float64) for j in range(table.draws)]
            )
            *_, last = run(
                table, points, consistency_function, lambda start, end, draws=draws: next(draws)
            )
            variance += float(last.x[0] - noiseless[0]) ** 2
        assert math.sqrt(variance) == pytest.approx(data.spread, abs=1e-4)


def test_flow_heun_follows_the_straight_path_on_every_curve() -> None:
    """x / (α + σ) on a variance preserving path is x on the flow of the same SNRs."""
    preserving = zigzag_grid(10)
    straight = [
        Knot(k.timestep, k.alpha / (k.alpha + k.sigma), k.sigma / (k.alpha + k.sigma))
        for k in preserving
    ]
    ends = []
    for knots in (preserving, straight):
        table = traced(METHODS["flow_heun"].formula, knots, oracles.V)
        start = oracles.START * (knots[0].alpha + knots[0].sigma)
        *_, last = run(table, start, oracles.DATA.network(oracles.V), oracles.no_noise)
        ends.append(last.x / (knots[-1].alpha + knots[-1].sigma))
    assert torch.allclose(*ends, rtol=1e-12)


# the posterior, which the marginals do not see: they come out right for any amount of renewed noise


def test_posterior_spread_is_that_of_bayes() -> None:
    for s, n in zip(vp_knots([-2.0, -0.5, 0.3]), vp_knots([-1.5, 0.5, 3.0]), strict=True):
        # q(x_s | x_n) has gain α_s/α_n and variance σ_s² - gain² σ_n²; x_n given x_0 has variance
        # σ_n²
        gain = s.alpha / n.alpha
        forward = s.sigma**2 - gain**2 * n.sigma**2
        variance = 1 / (1 / n.sigma**2 + gain**2 / forward)
        assert posterior_std(s, n) == pytest.approx(math.sqrt(variance), rel=1e-12)
        assert posterior_std(s, CLEAN) == 0.0


def test_ddpm_variance_is_beta_tilde() -> None:
    schedule = NoiseSchedule.linear()
    for t in (1, 10, 500, 999):
        s, n = make_knots(schedule, 1000, "trailing")[999 - t : 1001 - t]
        beta = schedule.curve.betas()[t].item()
        bars = schedule.alphas_cumprod[t - 1 : t + 1].tolist()
        assert (s.timestep, n.timestep) == (t, t - 1)
        beta_tilde = (1 - bars[0]) / (1 - bars[1]) * beta  # Ho et al. 2006.11239, eq. 7
        assert posterior_std(s, n) == pytest.approx(math.sqrt(beta_tilde), rel=1e-9)


# the point mass

KEEPING = [method for method in CONVERGING if method.defaults.get("s_noise", 1.0) == 1.0]


SPACED = ["linspace", "leading", "trailing", "karras"]
POINT_MASSES = all_pairs(KEEPING, list(SCHEDULES), SPACED, (0, 1), (1, 2, 7, 20))


@pytest.mark.parametrize("method", KEEPING, ids=name_of)
def test_point_mass(method: Method) -> None:
    for _, name, grid, index, steps in (row for row in POINT_MASSES if row[0] is method):
        schedule = allowed(SCHEDULES[name])[index]
        table = Sampler(schedule, method, steps, grid).table
        if not table.point_mass:
            assert method.name in ("score_sde_vp", "flow_sde"), (
                "a formula that misses the marginals must be known here"
            )
            return
        assert point_mass_defect(table) <= tolerance(method, name, table), (schedule, grid, steps)


def tolerance(method: Method, name: str, table: Table) -> float:
    """1e-12; but going down from σ/α = 2e4 enlarges rounding errors by up to 1e11 (heun) and 1e20
    (pndm's four evaluations).
    """
    rounded = name == "squaredcos" or method.name == "pndm"
    return POINT_MASS + 1e-13 * amplification(table) if rounded else POINT_MASS


COMPILED = all_pairs(list(METHODS.values()), list(GRIDS), list(SCHEDULES.values()), (1, 2, 3, 14))


@pytest.mark.parametrize("method", METHODS.values(), ids=name_of)
def test_every_combination_compiles(method: Method) -> None:
    for _, grid, schedule, steps in (row for row in COMPILED if row[0] is method):
        table = Sampler(schedule, method, steps, grid).table  # it checks itself at birth
        assert table.evaluations >= 1


@pytest.mark.parametrize("prediction", ["v_prediction", "sample", "flow_prediction"])
@pytest.mark.parametrize("method", [m for m in METHODS.values() if not m.inverse], ids=name_of)
def test_zero_terminal_snr_is_finite_and_right(method: Method, prediction: str) -> None:
    """From α = 0 exactly every method takes the first-order step, x = α_n D + sqrt(σ_n² - r²) ε̂ +
    r z with ε̂ = x.
    """
    schedule = NoiseSchedule.scaled_linear(prediction=prediction).zero_terminal_snr()
    sampler = Sampler(schedule, method, 20, "trailing")
    assert sampler.knots[0].alpha == 0.0
    x = sampler(lambda x, t: torch.tanh(x), (2, 1, 4, 4), seeds=0)
    assert x.isfinite().all()
    assert float(x.abs().max()) < 50


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
    "2M: step ratio upside down": Mutant(dpm_solver, "dpmpp_2m", "r0 = (lambdas[0] - lambdas[1]) / h", "r0 = h / (lambdas[0] - lambdas[1])", "local order"),
    "2M: extrapolation weight 1/r for 1/(2r)": Mutant(dpm_solver, "dpmpp_2m", "m[0] + 0.5 * D1", "m[0] + D1", "local order"),
    "2M: sign of the correction": Mutant(dpm_solver, "dpmpp_2m", "first = (m[0] - m[1]) / r0", "first = (m[1] - m[0]) / r0", "local order"),
    "2M SDE: weight of the difference": Mutant(dpm_solver, "dpmpp_2m_sde", "m[0] + 0.5 * D1", "m[0] + D1", "weak order"),
    "3M: second difference": Mutant(dpm_solver, "dpmpp_3m", "second = (m[1] - m[2]) / r1", "second = (m[0] - m[2]) / r1", "local order"),
    "singlestep: the block's slope": Mutant(dpm_solver, "dpm_solver_singlestep", "(m[j] - m[0]) / r[j]", "(m[j] - m[0]) * r[j]", "local order"),
    "Heun: only the second slope": Mutant(heun, "heun", "0.5 * (e + e_n)", "e_n", "local order"),
    "Heun: weights that do not sum to one": Mutant(heun, "heun", "0.5 * (e + e_n)", "0.6 * (e + e_n)", "point mass"),
    "churn: the noise added": Mutant(churn, "heun", "(1 + gamma) ** 2 - 1", "(1 + gamma) - 1", "point mass", (("s_churn", 20.0),)),
    "dpm_2: the midpoint": Mutant(dpm2, "dpm_2", "ratio: float = 0.5", "ratio: float = 0.6", "local order"),
    "dpm_2: wrong sigma in the slope": Mutant(dpm2, "dpm_2", "along(x, D, e, e_m, s, d)", "along(x, D, e_m, e, s, d)", "local order"),
    "2S a: it goes to the knot, not below it": Mutant(dpm2, "dpmpp_2s_ancestral", "    d = ancestral_target(n, r)\n", "    d = n\n", "point mass"),
    "SDE: weight of the middle": Mutant(dpm2, "dpmpp_sde", "(D_m - D) / (2 * r)", "(D_m - D) / r", "weak order"),
    "LMS: the interval": Mutant(adams, "lms", "s.sigma_ve, n.sigma_ve)", "s.sigma_ve, 0.9 * "
                                                                         "n.sigma_ve)", "local order"),
    "DEIS: rate of the weight": Mutant(adams, "deis", "rate=1.0", "rate=-1.0", "local order"),
    "PLMS: Adams-Bashforth 3": Mutant(adams, "plms", "-16 / 12, 5 / 12", "-16 / 12, 4 / 12", "point mass"),
    "UniPC: the corrector's ratio": Mutant(unipc, "unipc", "[*ratios, 1.0]", "[*ratios, 0.9]", "local order"),
    "UniPC: factorial": Mutant(unipc, "unipc", "factorial *= k + 1", "factorial *= k", "local order"),
    "RES: nodes in the wrong order": Mutant(exponential, "res_multistep", "rate=H)]\n        E", "rate=H)][::-1]\n        E", "local order"),
    "SEEDS-2: weight of the middle": Mutant(exponential, "seeds_2", "(D_m - D) / (2 * r)", "(D_m - D) / r", "weak order"),
    "SEEDS: noise not carried on": Mutant(exponential, "seeds_2", "math.exp(-stretch) * "
                                                                  "self.gathered + fresh", "fresh", "point mass"),
    "DDIM: alpha of the wrong end": Mutant(first_order_steps, "ddim", "n.alpha - keep * s.alpha", "n.alpha - keep * n.alpha", "point mass"),
    "DDIM: sigma of the wrong end": Mutant(first_order_steps, "ddim", ") / s.sigma\n    y", ") / n.sigma\n    y", "point mass"),
    "ancestral: noise level squared": Mutant(first_order_steps, "euler_ancestral", "(s_noise * r) * trace", "(s_noise * r * r) * trace", "point mass"),
    "ancestral: variance not restored": Mutant(first_order_steps, "ddpm", KEEP, KEEP.replace("r**2", "2 * r**2"), "point mass"),
    "posterior: ratio not squared": Mutant(first_order_steps, "ddpm", "1 - ratio**2", "1 - ratio", "posterior"),
    "posterior: sigma of the wrong end": Mutant(first_order_steps, "ddpm", "return n.sigma * math.sqrt(max(1", "return s.sigma * math.sqrt(max(1", "posterior"),
}  # fmt: skip


class Mutated(NamedTuple):
    module: ModuleType
    method: Method


@cache
def mutated(mutant: Mutant) -> Mutated:
    """Run the module with one text replaced, and the module of the method on top of it, apart from
    the registry.
    """
    source = inspect.getsource(mutant.module)
    name = mutant.module.__name__
    assert source.count(mutant.right) == 1, (
        f"{mutant.right!r} stands {source.count(mutant.right)} times in {name}: word the mutant "
        "anew"
    )
    home = sys.modules[METHODS[mutant.method].formula.__module__]
    with patch.object(base, "METHODS", Registry[Method]("method")) as registry:
        copy = executed(mutant.module, source.replace(mutant.right, mutant.wrong))
        if home is not mutant.module:
            with patch.dict(sys.modules, {name: copy}):
                executed(home, inspect.getsource(home))
    return Mutated(copy, registry[mutant.method])


def executed(module: ModuleType, source: str) -> ModuleType:
    copy = ModuleType(module.__name__ + "_mutant")
    copy.__package__ = module.__package__
    exec(compile(source, copy.__name__, "exec"), copy.__dict__)
    return copy


def findings(module: ModuleType, method: Method, options: dict[str, Any]) -> set[str]:
    """The measurements that disagree with what the method declares."""
    options = options_of(method) | options
    table = traced(method.formula, zigzag_grid(20), oracles.V, **options)
    found = {"point mass"} if point_mass_defect(table) > POINT_MASS else set()
    if table.draws:
        measured = {"weak order": (oracles.weak_order(method.formula, **options), order_of(method))}
    else:
        order = oracles.local_order(
            method.formula, rewrites=method.rewrites, block=method.block, **options
        )
        measured = {"local order": (order, order_of(method) + 1)}
    found |= {
        what for what, (order, declared) in measured.items() if not abs(order - declared) <= NEAR
    }
    if hasattr(module, "posterior_std"):
        s, n = vp_knots([-0.5, 0.5])
        found |= (
            {"posterior"}
            if abs(module.posterior_std(s, n) / posterior_std(s, n) - 1) > 1e-9
            else set()
        )
    return found


@pytest.mark.parametrize("mistake", MUTANTS)
def test_mutants_are_noticed(mistake: str) -> None:
    mutant = MUTANTS[mistake]
    options = dict(mutant.options)
    # as it stands, nothing is found
    assert findings(mutant.module, METHODS[mutant.method], options) == set()
    assert mutant.seen_by in findings(*mutated(mutant), options)


def test_a_table_with_a_wrong_formula_is_refused_at_birth() -> None:
    wrong = mutated(MUTANTS["Heun: weights that do not sum to one"]).method
    with pytest.raises(
        ValueError,
        match=r"^heun: the table misses the marginals of its grid by .*; its formula is wrong$",
    ):
        Sampler(SCHEDULES["scaled_linear"], wrong, 10)


def test_a_table_that_is_not_finite_is_refused_at_birth() -> None:
    def blows_up(trace: Any, knots: Any, i: int, x: Any) -> list[Any]:
        return [math.nan * x + trace.denoise(x, knots[i])]

    with pytest.raises(
        ValueError,
        match=r"^blows_up: step 1 of 5 has a coefficient that is not finite; use another grid or fewer steps$",
    ):
        Sampler(
            SCHEDULES["scaled_linear"],
            Method("blows_up", blows_up, order=1, source="", point_mass=False),
            5,
        )


def test_the_oracle_is_right() -> None:
    """The closed forms against each other and against many samples: x at a knot has the marginal,
    and D is its regression.
    """
    data = Gaussian(mean=0.7, spread=0.4)
    (knot,) = vp_knots([0.4])
    generator = torch.Generator().manual_seed(0)
    x0 = data.mean + data.spread * torch.randn(400_000, generator=generator, dtype=torch.float64)
    x = knot.alpha * x0 + knot.sigma * torch.randn(
        x0.shape, generator=generator, dtype=torch.float64
    )
    mean, deviation = data.marginal(knot)
    assert float(x.mean()) == pytest.approx(mean, abs=5e-3)
    assert float(x.std()) == pytest.approx(deviation, abs=5e-3)
    a, b = data.denoiser(knot)
    residual = x0 - (a * x + b)
    assert abs(float(residual.mean())) < 5e-3
    assert abs(float((residual * x).mean())) < 5e-3
    # the flow solves dx/dλ of the probability flow ODE: x' = (α'/α) x + σ (σ'/σ - α'/α) ε̂, checked
    # by central differences
    h = 1e-4
    before, here, after = vp_knots([0.4 - h, 0.4, 0.4 + h])
    point = torch.tensor(1.3, dtype=torch.float64)
    slope = float(data.flow(point, here, after) - data.flow(point, here, before)) / (2 * h)
    d_alpha, d_sigma = (
        (after.alpha - before.alpha) / (2 * h),
        (after.sigma - before.sigma) / (2 * h),
    )
    denoised = a * float(point) + b
    epsilon = (float(point) - here.alpha * denoised) / here.sigma
    assert slope == pytest.approx(d_alpha * denoised + d_sigma * epsilon, rel=1e-6)
