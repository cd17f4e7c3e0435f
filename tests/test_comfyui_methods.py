"""The methods that ComfyUI has beyond k-diffusion, against plain loops over their published
formulas.

The loops speak ComfyUI's language: x̄ = x / α and σ̄ = σ / α, two denoised results for each
evaluation (guided D, unconditional U), and Gaussian draws from a list. The tables run on the same
nonlinear network, in float64, on a variance preserving and a variance exploding path, whose knots
have the same σ̄.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from itertools import combinations, pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

import oracles
from alphabar.noising import NoiseSchedule
from alphabar.sampling import CLEAN, METHODS, Knot, Sampler, knots_at, resolve_method
from alphabar.sampling.kernel import run
from alphabar.sampling.knots import knot_at_half_log_snr
from alphabar.sampling.methods.integrals import lagrange_integrals
from alphabar.sampling.table import compile_table
from alphabar.sampling.tracing import Unconditional

SCHEDULES = {
    "vp": NoiseSchedule.scaled_linear(prediction="v_prediction"),
    "ve": NoiseSchedule.karras(prediction="epsilon"),
}
ZTSNR = NoiseSchedule.scaled_linear(prediction="v_prediction").zero_terminal_snr()
FLOW = NoiseSchedule.flow(shift=3.0)
SIGMAS = [14.0, 9.1, 4.7, 3.2, 1.9, 0.8, 0.45, 0.12, 0.05, 0.0]
"""Irregular on purpose: σ̄ of the knots, the last one clean."""
UNTIL = [*SIGMAS[:-1]]
"""A grid that does not end clean."""
SCALE = 1.7
"""Of guidance."""
AGREE = 1e-10

Both = Callable[[Tensor, float], tuple[Tensor, Tensor]]
Loop = Callable[..., Tensor]


def conditional(y: Tensor, c: float) -> Tensor:
    return (0.5 + 0.4 * c) * torch.tanh(y.roll(1, -1) + 0.2) + 0.1 * torch.cos(2 * y + c)


def empty(y: Tensor, c: float) -> Tensor:
    return (0.6 - 0.3 * c) * torch.tanh(y) - 0.2 * torch.sin(y - c)


def guided(scale: float) -> Both:
    """Return the denoiser that a loop calls: (x̄, σ̄) -> (D, U)."""
    return lambda x, sigma: halves_at(
        x / math.sqrt(1 + sigma**2), 1 / math.sqrt(1 + sigma**2), scale
    )


def halves_at(y: Tensor, c: float, scale: float) -> tuple[Tensor, Tensor]:
    """(D, U) of x in units of sqrt(α² + σ²), and α in these units: finite at α = 0 too."""
    U = empty(y, c)
    return U + scale * (conditional(y, c) - U), U


def start() -> Tensor:
    return SIGMAS[0] * torch.randn(
        3, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64
    )


def draws() -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(3, 5, generator=generator, dtype=torch.float64) for _ in range(40)]


def knots_of(schedule: NoiseSchedule, sigmas: list[float]) -> tuple[Knot, ...]:
    return tuple(knot_at_half_log_snr(schedule, -math.log(s)) if s else CLEAN for s in sigmas)


def by_table(
    name: str,
    schedule: NoiseSchedule,
    knots: Sequence[Knot],
    x: Tensor,
    scale: float,
    **options: Any,
) -> list[Tensor]:
    """Return x after every step of the table of this name, in the path's own units."""
    method, implied = resolve_method(name)
    options = dict(method.defaults) | implied | options
    table = compile_table(name, lambda *a: method.formula(*a, **options), knots, schedule)
    half: list[Tensor] = []

    def evaluate(x: Tensor, knot: Knot) -> Tensor:
        x, unit = x / knot.input_scale, math.hypot(knot.alpha, knot.sigma)
        D, U = halves_at(x / unit, knot.alpha / unit, scale)
        outputs = [
            schedule.prediction.combine(
                v, (x - knot.alpha * v) / knot.sigma, knot.alpha, knot.sigma
            )
            for v in (D, U)
        ]
        half[:] = outputs[1:]
        return outputs[0]

    noise = iter(draws())
    return [
        progress.x
        for progress in run(
            table, x, evaluate, lambda a, b: next(noise), {Unconditional: lambda: half[0]}
        )
    ]


# the published formulas as loops


def ancestral(a: float, b: float, eta: float) -> tuple[float, float]:
    """(sigma_down, sigma_up) of k-diffusion."""
    up = min(b, eta * math.sqrt(b**2 * (a**2 - b**2) / a**2))
    return math.sqrt(b**2 - up**2), up


def heunpp2(both: Both, x: Tensor, sigmas: list[float], z: Iterator[Tensor]) -> Tensor:
    def slope(x: Tensor, sigma: float) -> Tensor:
        return (x - both(x, sigma)[0]) / sigma

    for i in range(len(sigmas) - 1):
        a, b = sigmas[i : i + 2]
        d = slope(x, a)
        if i == len(sigmas) - 2:
            mean = d
        elif i == len(sigmas) - 3:
            w = b / (2 * sigmas[0])
            mean = (1 - w) * d + w * slope(x + (b - a) * d, b)
        else:
            c = sigmas[i + 2]
            x_2 = x + (b - a) * d
            d_2 = slope(x_2, b)
            d_3 = slope(x_2 + (c - b) * d_2, c)
            w_2, w_3 = b / (3 * sigmas[0]), c / (3 * sigmas[0])
            mean = (1 - w_2 - w_3) * d + w_2 * d_2 + w_3 * d_3
        x = x + (b - a) * mean
    return x


def exp_heun(
    both: Both, x: Tensor, sigmas: list[float], z: Iterator[Tensor], eta: float = 0.0
) -> Tensor:
    for a, b in pairwise(sigmas):
        D = both(x, a)[0]
        if b == 0:
            return D
        h = math.log(a / b)
        H = (1 + eta) * h
        noise = b * math.sqrt(1 - math.exp(-2 * eta * h)) * next(z) if eta else 0.0
        D_2 = both(math.exp(-H) * x + (1 - math.exp(-H)) * D + noise, b)[0]
        b_2 = (math.exp(-H) - 1 + H) / H  # -h φ_2(-h) of the published sign
        x = math.exp(-H) * x + (1 - math.exp(-H) - b_2) * D + b_2 * D_2 + noise
    return x


def seeds_2(
    both: Both, x: Tensor, sigmas: list[float], z: Iterator[Tensor], eta: float = 1.0
) -> Tensor:
    for a, b in pairwise(sigmas):
        D = both(x, a)[0]
        if b == 0:
            return D
        h = math.log(a / b)
        m, half, whole = math.sqrt(a * b), math.exp(-(1 + eta) * h / 2), math.exp(-(1 + eta) * h)
        z_1, z_2 = next(z), next(z)
        spread, carried = math.sqrt(1 - math.exp(-h * eta)), math.exp(-h * eta / 2)
        D_2 = both(half * x + (1 - half) * D + m * spread * z_1, m)[0]
        x = whole * x + (1 - whole) * D_2 + b * spread * (carried * z_1 + z_2)
    return x


def seeds_3(both: Both, x: Tensor, sigmas: list[float], z: Iterator[Tensor]) -> Tensor:
    def phi(H: float) -> float:  # -H φ_2(-H) of the published sign
        return (math.exp(-H) - 1 + H) / H

    for a, b in pairwise(sigmas):
        D = both(x, a)[0]
        if b == 0:
            return D
        h = math.log(a / b)
        keep = [math.exp(-2 * h * r) for r in (1 / 3, 2 / 3, 1)]
        spread, fade = math.sqrt(1 - math.exp(-2 * h / 3)), math.exp(-h / 3)
        noise = spread * next(z)
        m_1, m_2 = a * math.exp(-h / 3), a * math.exp(-2 * h / 3)
        D_2 = both(keep[0] * x + (1 - keep[0]) * D + m_1 * noise, m_1)[0]
        noise = fade * noise + spread * next(z)
        w = 2 * phi(4 * h / 3)
        D_3 = both(keep[1] * x + (1 - keep[1] - w) * D + w * D_2 + m_2 * noise, m_2)[0]
        noise = fade * noise + spread * next(z)
        w = 1.5 * phi(2 * h)
        x = keep[2] * x + (1 - keep[2] - w) * D + w * D_3 + b * noise
    return x


def ipndm_v(
    both: Both, x: Tensor, sigmas: list[float], z: Iterator[Tensor], slips: bool = False
) -> Tensor:
    """Variable-step Adams-Bashforth as diff-sampler expands it, with or without the three slips of
    the published code.
    """
    past: list[Tensor] = []
    for i in range(len(sigmas) - 1):
        D = both(x, sigmas[i])[0]
        if sigmas[i + 1] == 0:
            return D
        past = [(x - D) / sigmas[i], *past][:4]
        weights = v_weights(sigmas[max(i - 3, 0) : i + 2][::-1], slips)
        x = x + (sigmas[i + 1] - sigmas[i]) * sum(w * d for w, d in zip(weights, past, strict=True))
    return x


def v_weights(sigmas: list[float], slips: bool) -> list[float]:
    """The weights of the slopes at sigmas[1:], from the newest, for the step to sigmas[0]."""
    order = len(sigmas) - 1
    h, h1, h2, h3 = ([a - b for a, b in pairwise(sigmas)] + [math.inf] * 3)[:4]
    first = h / (2 * h1) if order > 1 else 0.0
    ratio = h * (h + h1) / (h1 * (h1 + h2)) if order > 2 else 0.0
    lead = h / (3 * (h + h1))
    second = ((1 - lead * ratio) / 2 if slips else (1 - lead) / 2 * ratio) if order > 2 else 0.0
    third = b = 0.0
    if order > 3:
        sign = 1 if slips else -1
        third = (1 - lead) / 2 + sign * (1 - h / (2 * (h + h1))) * h / (6 * (h + h1 + h2))
        third *= h * (h + h1) * (h + h1 + h2) / (h1 * (h1 + h2) * (h1 + h2 + h3))
        b = h1 * (h1 + h2) / (h2 * (h2 + h3))
    a = h1 / h2 if order > 2 else 0.0
    oldest = (h1 / h2 if slips else h2 / h3) if order > 3 else 0.0
    weights = [
        1 + first + second + third,
        -first - (1 + a) * second - (1 + a + b) * third,
        a * second + (a + b * (1 + (h2 / h3 if order > 3 else 0.0))) * third,
        -b * oldest * third,
    ]
    return weights[:order]


def dpmpp_2m_cfg_pp(both: Both, x: Tensor, sigmas: list[float], z: Iterator[Tensor]) -> Tensor:
    U_last = None
    for i in range(len(sigmas) - 1):
        D, U = both(x, sigmas[i])
        e = sigmas[i + 1] / sigmas[i]  # exp(-h)
        mixed = -e * U
        if U_last is not None and e > 0:
            r = math.log(sigmas[i - 1] / sigmas[i]) / math.log(1 / e)
            mixed = mixed + (1 - e) / (2 * r) * (D - U_last)
        x, U_last = D + mixed + e * x, U
    return x


def dpmpp_2s_cfg_pp(
    both: Both, x: Tensor, sigmas: list[float], z: Iterator[Tensor], eta: float = 1.0
) -> Tensor:
    for a, b in pairwise(sigmas):
        D, U = both(x, a)
        down, up = ancestral(a, b, eta)
        guidance, E = D - U, U
        if down > 0:
            m = math.sqrt(a * down)
            E = both(m / a * x + (1 - m / a) * U, m)[1]
        x = down / a * x + (1 - down / a) * E
        x = (x + up * next(z) if up else x) + guidance
    return x


def res_multistep(
    both: Both,
    x: Tensor,
    sigmas: list[float],
    z: Iterator[Tensor],
    eta: float = 0.0,
    cfg_pp: bool = True,
) -> Tensor:
    last, down_last = None, 0.0
    for i in range(len(sigmas) - 1):
        a, b = sigmas[i : i + 2]
        D, U = both(x, a)
        U = U if cfg_pp else D
        down, up = ancestral(a, b, eta)
        if down == 0 or last is None:
            x = D + down * (x - U) / a
        else:
            h = math.log(a / down)
            c_2 = math.log(down_last / sigmas[i - 1]) / h
            phi_1 = (1 - math.exp(-h)) / h
            phi_2 = (1 - phi_1) / h
            x = math.exp(-h) * (x + D - U) + h * ((phi_1 - phi_2 / c_2) * U + phi_2 / c_2 * last)
        x = x + up * next(z) if up else x
        last, down_last = U, down
    return x


def gradient_estimation(
    both: Both,
    x: Tensor,
    sigmas: list[float],
    z: Iterator[Tensor],
    gamma: float = 2.0,
    cfg_pp: bool = True,
) -> Tensor:
    last = None
    for a, b in pairwise(sigmas):
        D, U = both(x, a)
        if b == 0:
            return D
        d = (x - (U if cfg_pp else D)) / a
        x = D + b * d
        x = x if last is None else x + (gamma - 1) * (b - a) * (d - last)
        last = d
    return x


def ud10_ab(both: Both, x: Tensor, sigmas: list[float], z: Iterator[Tensor]) -> Tensor:
    v_last = d_last = D_last = torch.zeros_like(x)
    ratio = 0.0
    for i in range(len(sigmas) - 1):
        a, b = sigmas[i : i + 2]
        D, U = both(x, a)
        d = along = (x - U) / a
        if i:
            ratio = (b - a) / (a - sigmas[i - 1])
            along = d + 0.1 * ratio * (d - d_last)
        euler = D + b * along - x
        v, step = euler / (b - a), euler
        if i:  # Adams-Bashforth 2 with the integrals of the two Lagrange polynomials
            history = (b - a) * ((1 + ratio / 2) * v - ratio / 2 * v_last)
            step = 0.75 * euler + 0.25 * history
        x = x + step
        if b == 0 and i:
            x = D - a * (D - D_last) / (a - sigmas[i - 1])
        v_last, d_last, D_last = v, d, D
    return x


def sa_pece(
    both: Both, x: Tensor, sigmas: list[float], z: Iterator[Tensor], tau: float = 1.0
) -> Tensor:
    """2309.05019, algorithm 1 in PECE mode: predictor 3, corrector 4, order 2 by the simplified
    weights of its appendix D, and orders that fall towards the end as in diffusers'
    SASolverScheduler."""
    steps, T = len(sigmas) - 1, 1 + tau**2
    lam = [-math.log(s) if s else math.inf for s in sigmas]
    values: list[Tensor] = []
    start, noise = x, torch.zeros_like(x)
    for i in range(steps):
        D = both(x, sigmas[i])[0]
        if i:
            order = min(4, i + 1, steps - i + 2)
            weights = sa_weights(
                [lam[i - j] for j in range(order)], lam[i - 1], lam[i], T, corrector=True
            )
            known = [D, *values]
            h = lam[i] - lam[i - 1]
            x = sigmas[i] / sigmas[i - 1] * math.exp(-(tau**2) * h) * start + noise
            x = x + sum(w * v for w, v in zip(weights, known, strict=False))
            D = both(x, sigmas[i])[0]
        if sigmas[i + 1] == 0:
            return D
        values, start = [D, *values][:4], x
        h = lam[i + 1] - lam[i]
        order = min(3, i + 1, steps - i)
        weights = sa_weights(
            [lam[i - j] for j in range(order)], lam[i], lam[i + 1], T, corrector=False
        )
        noise = (
            sigmas[i + 1] * math.sqrt(1 - math.exp(-2 * tau**2 * h)) * next(z)
            if tau
            else torch.zeros_like(x)
        )
        x = sigmas[i + 1] / sigmas[i] * math.exp(-(tau**2) * h) * x + noise
        x = x + sum(w * v for w, v in zip(weights, values, strict=False))
    return x


def sa_weights(nodes: list[float], s: float, t: float, T: float, corrector: bool) -> list[float]:
    """∫_s^t T e^(T (u - t)) l_j(u) du for the Lagrange polynomials, by moments and a Vandermonde
    system (eq. 15, 18).
    """
    h, n = t - s, len(nodes)
    if n == 2:
        whole = 1 - math.exp(-T * h)
        new = T * h / 2 if corrector else whole + T * h**2 / 2 / (nodes[0] - nodes[1])
        return [new, whole - new]
    # of v = u - t, by parts: M_p = -(s - t)^p e^(-T h) [+ 1 for p = 0] - p / T M_(p-1)
    moments = []
    for p in range(n):
        moments.append(
            (p == 0) - (-h) ** p * math.exp(-T * h) - (p / T * moments[-1] if p else 0.0)
        )
    system = torch.tensor([[(y - t) ** p for y in nodes] for p in range(n)], dtype=torch.float64)
    return torch.linalg.solve(system, torch.tensor(moments, dtype=torch.float64)).tolist()


EVERYWHERE = {"tau_timesteps": (-math.inf, math.inf)}
CASES: list[tuple[str, Loop, dict[str, Any], dict[str, Any]]] = [
    ("heunpp2", heunpp2, {}, {}),
    ("exp_heun_2_x0", exp_heun, {}, {}),
    ("exp_heun_2_x0_sde", exp_heun, {}, {"eta": 1.0}),
    ("exp_heun_2_x0_sde", exp_heun, {"eta": 0.4}, {"eta": 0.4}),
    ("ipndm_v", ipndm_v, {}, {}),
    ("sa_solver_pece", sa_pece, EVERYWHERE, {}),
    ("sa_solver_pece", sa_pece, {"tau": 0.0}, {"tau": 0.0}),
    ("dpmpp_2m_cfg_pp", dpmpp_2m_cfg_pp, {}, {}),
    ("dpmpp_2s_ancestral_cfg_pp", dpmpp_2s_cfg_pp, {}, {}),
    ("dpmpp_2s_ancestral_cfg_pp", dpmpp_2s_cfg_pp, {"eta": 0.4}, {"eta": 0.4}),
    ("res_multistep_cfg_pp", res_multistep, {}, {}),
    ("res_multistep_ancestral_cfg_pp", res_multistep, {}, {"eta": 1.0}),
    ("res_multistep_ancestral", res_multistep, {}, {"eta": 1.0, "cfg_pp": False}),
    ("gradient_estimation_cfg_pp", gradient_estimation, {}, {}),
    ("gradient_estimation_cfg_pp", gradient_estimation, {"gamma": 1.3}, {"gamma": 1.3}),
    ("gradient_estimation", gradient_estimation, {}, {"cfg_pp": False}),
    ("res_multistep", res_multistep, {}, {"cfg_pp": False}),
    ("seeds_2", seeds_2, {}, {}),
    ("seeds_2", seeds_2, {"eta": 0.4}, {"eta": 0.4}),
    ("seeds_3", seeds_3, {}, {}),
    ("cfgpp_ud10_ab", ud10_ab, {}, {}),
]


def difference(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max() / b.abs().max())


def named(value: Any) -> str:
    return getattr(value, "__name__", str(value))


@pytest.mark.parametrize(("name", "loop", "options", "settings"), CASES, ids=named)
@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)
@pytest.mark.parametrize("scale", [1.0, SCALE])
def test_agreement(
    name: str,
    loop: Loop,
    options: dict[str, Any],
    settings: dict[str, Any],
    schedule: NoiseSchedule,
    scale: float,
) -> None:
    """On grids that end clean and that do not, of many steps and of one."""
    for sigmas in (SIGMAS, UNTIL, UNTIL[:5], SIGMAS[:1] + SIGMAS[-1:], SIGMAS[:2] + SIGMAS[-1:]):
        expected = loop(guided(scale), start(), sigmas, iter(draws()), **settings)
        knots = knots_of(schedule, sigmas)
        ours = (
            by_table(name, schedule, knots, start() * knots[0].alpha, scale, **options)[-1]
            / knots[-1].alpha
        )
        assert difference(ours, expected) < AGREE, len(sigmas)


def test_a_difference_would_be_seen() -> None:
    """The loops differ from one another, and with the guidance, by far more than they may."""
    schedule, everything = SCHEDULES["vp"], dict[str, Tensor]()
    knots = knots_of(schedule, UNTIL)
    for name, _, options, _ in CASES:
        key = f"{name} {options}"
        everything[key] = by_table(
            name, schedule, knots, start() * knots[0].alpha, SCALE, **options
        )[-1]
        plain = by_table(name, schedule, knots, start() * knots[0].alpha, 1.0, **options)[-1]
        assert difference(plain, everything[key]) > 1e-2
    for a, b in combinations(everything, 2):
        assert difference(everything[a], everything[b]) > 1e-4, (a, b)


# the ends


@pytest.mark.parametrize(("name", "loop", "options", "settings"), CASES, ids=named)
def test_from_zero_terminal_snr(
    name: str, loop: Loop, options: dict[str, Any], settings: dict[str, Any]
) -> None:
    """From α = 0, where the published loops divide by infinity: one first-order step to the guided
    D along x itself, which is all noise, and from there on as if the run had started at the second
    knot."""
    schedule = ZTSNR
    x = start() / SIGMAS[0]
    knots = (knots_at(schedule, [999.0])[0], *knots_of(schedule, SIGMAS))
    assert knots[0].alpha == 0.0
    steps = by_table(name, schedule, knots, x, SCALE, **options)
    n = knots[1]
    D = halves_at(x, 0.0, SCALE)[0]
    noise = iter(draws())
    stochastic = resolve_method(name)[0].stochastic or "eta" in settings
    # what is renewed of the noise: all of it, as η of the SDE or the posterior has it at α = 0; of
    # an ancestral step η
    fresh = (
        settings.get("tau", 1.0) * (settings.get("eta", 1.0) if "ancestral" in name else 1.0)
        if stochastic
        else 0.0
    )
    kept = math.sqrt(1 - fresh**2) * x
    expected = n.alpha * D + n.sigma * (kept + fresh * next(noise) if fresh else kept)
    assert difference(steps[0], expected) < AGREE
    expected = loop(guided(SCALE), steps[0] / n.alpha, SIGMAS, noise, **settings)
    assert difference(steps[-1], expected) < AGREE


@pytest.mark.parametrize(
    "name", [name for name in METHODS if name.endswith("cfg_pp") or name.startswith("cfgpp")]
)
def test_cfg_plus_plus_of_a_network(name: str) -> None:
    """Through the public face: the unconditional half is that of the network, in one call for both,
    and the run ends at D.
    """
    calls: list[int] = []

    def network(x: Tensor, t: Tensor, shift: Tensor) -> Tensor:
        calls.append(len(x))
        return torch.tanh(x.roll(1, -1) + shift + t.view(-1, 1, 1, 1) / 1000)

    sampler = Sampler(ZTSNR, name, 6)
    both = {
        "conditioning": {"shift": torch.full((2, 1, 1, 1), 0.3)},
        "unconditional": {"shift": torch.full((2, 1, 1, 1), -0.2)},
    }
    steps = list(sampler.iterate(network, (2, 1, 4, 4), seeds=0, guidance_scale=SCALE, **both))
    assert calls == [4] * sampler.table.evaluations
    assert all(bool(progress.x.isfinite().all()) for progress in steps)
    if name != "cfgpp_ud10_ab":  # it goes on to where D tends
        assert torch.allclose(steps[-1].x, steps[-1].denoised, rtol=0, atol=1e-6)
    alike = {key: {"shift": torch.full((2, 1, 1, 1), 0.3)} for key in both}
    plain = sampler(network, (2, 1, 4, 4), seeds=0, conditioning=alike["conditioning"])
    assert torch.allclose(
        sampler(network, (2, 1, 4, 4), seeds=0, guidance_scale=SCALE, **alike),
        plain,
        rtol=0,
        atol=1e-5,
    )
    assert not torch.allclose(steps[-1].x, plain, atol=1e-2)


UNGUIDED = {
    "dpmpp_2m_cfg_pp": "dpmpp_2m",
    "dpmpp_2s_ancestral_cfg_pp": "dpmpp_2s_ancestral",
    "res_multistep_cfg_pp": "res_multistep",
    "res_multistep_ancestral_cfg_pp": "res_multistep_ancestral",
    "gradient_estimation_cfg_pp": "gradient_estimation",
}


@pytest.mark.parametrize(("name", "plain"), UNGUIDED.items())
@pytest.mark.parametrize(
    "schedule", [*SCHEDULES.values(), ZTSNR, FLOW], ids=[*SCHEDULES, "ztsnr", "flow"]
)
def test_without_guidance_it_is_the_method_of_its_name(
    name: str, plain: str, schedule: NoiseSchedule
) -> None:
    def network(x: Tensor, t: Tensor) -> Tensor:
        return torch.tanh(x.roll(1, -1) + t[:, None] / 1000)

    ours, theirs = (
        Sampler(schedule, which, 12)(network, start() / SIGMAS[0], seeds=0)
        for which in (name, plain)
    )
    assert difference(ours, theirs) < 1e-9


# where the published code is wrong


def test_the_published_weights_of_ipndm_v_do_not_sum_to_one() -> None:
    sigmas = [3.0, 4.5, 5.0, 7.0, 8.5]
    exact = [
        w / (sigmas[0] - sigmas[1]) for w in lagrange_integrals(sigmas[1:], sigmas[1], sigmas[0])
    ]
    assert v_weights(sigmas, slips=False) == pytest.approx(exact, rel=1e-12)
    assert sum(v_weights(sigmas, slips=True)) == pytest.approx(1.1922433, abs=1e-6)
    assert sum(exact) == pytest.approx(1.0, abs=1e-12)
    even = [3.0, 4.0, 5.0, 6.0, 7.0]
    assert v_weights(even, slips=False) == pytest.approx(
        [55 / 24, -59 / 24, 37 / 24, -9 / 24], rel=1e-12
    )
    assert v_weights(even[:-1], slips=True) == pytest.approx([23 / 12, -16 / 12, 5 / 12], rel=1e-12)
    # the sign: not Adams-Bashforth even here
    assert v_weights(even, slips=True)[0] == pytest.approx(2.375)


def test_the_slips_of_ipndm_v_make_it_second_order() -> None:
    def at_the_end(steps: int, slips: bool) -> Tensor:
        sigmas = [
            (14.6 ** (1 / 7) + i / steps * (0.03 ** (1 / 7) - 14.6 ** (1 / 7))) ** 7
            for i in range(steps + 1)
        ]
        return ipndm_v(guided(1.0), start(), sigmas, iter(()), slips)

    reference = at_the_end(4000, False)
    for slips, order in ((False, 4), (True, 2)):
        errors = [difference(at_the_end(steps, slips), reference) for steps in (240, 480)]
        assert oracles.slope(errors) == pytest.approx(order, abs=0.2)


def test_the_history_of_ud10_keeps_it_from_converging() -> None:
    formula = METHODS["cfgpp_ud10_ab"].formula
    assert abs(oracles.global_order(formula)) < 0.1
    assert oracles.global_order(formula, unconditional_history=0.0) == pytest.approx(1, abs=0.1)
    assert oracles.global_order(formula, unconditional_history=0.0, history=1.0) == pytest.approx(
        2, abs=0.1
    )


def test_pece_with_its_own_orders() -> None:
    method = METHODS["sa_solver_pece"]
    options = dict(method.defaults) | EVERYWHERE | {"lower_order_final": False}
    deterministic = options | {"tau": 0.0}
    assert oracles.global_order(method.formula, rewrites=(1,), **deterministic) == pytest.approx(
        4, abs=0.2
    )
    pec = deterministic | {"pece": False}
    counts = [
        oracles.traced(
            METHODS["sa_solver"].formula, oracles.even_grid(10), oracles.V, **o
        ).evaluations
        for o in (deterministic, pec)
    ]
    assert counts == [19, 10]  # nothing is corrected in the first step
