"""Error against the number of network evaluations, alphabar beside diffusers, on a problem with an exact answer.

    python benchmarks/accuracy.py                 # a few minutes; prints the table, writes accuracy.md and accuracy.png

The data are a mixture of Gaussians in 16 dimensions, so the exact denoiser, and with it the probability flow, is known. The
reference is that flow in float64 in 6000 Runge-Kutta steps. Every deterministic method runs on every grid that keeps to the
budget of evaluations; the error is the median over trajectories of |x - exact| / |exact|. The network is told the timestep and
takes α and σ from the training schedule, as a trained one would.
"""

from __future__ import annotations

import argparse
import inspect
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import diffusers
import torch
from torch import Tensor
from tqdm import tqdm

from alphabar.noising import NoiseSchedule
from alphabar.sampling import GRIDS, METHODS, Sampler

BUDGETS = (5, 10, 20, 40, 100)
SCHEDULE = NoiseSchedule.scaled_linear()
DIMENSIONS, CENTRES, SPREAD, TRAJECTORIES = 16, 8, 0.25, 128
GENERATOR = torch.Generator().manual_seed(0)
MEANS = torch.randn(CENTRES, DIMENSIONS, generator=GENERATOR, dtype=torch.float64)
NOISE = torch.randn(TRAJECTORIES, DIMENSIONS, generator=GENERATOR, dtype=torch.float64)


class Result(NamedTuple):
    """The error of one way to sample within a budget."""

    error: float
    name: str


def denoiser(x: Tensor, alpha: float, sigma: float) -> Tensor:
    """E[x_0 | x_t = x] of the mixture."""
    variance = (alpha * SPREAD) ** 2 + sigma**2
    away = x[:, None] - alpha * MEANS
    share = torch.softmax(-(away**2).sum(-1) / (2 * variance), -1)
    return (share[..., None] * (MEANS + (alpha * SPREAD**2 / variance) * away)).sum(1)


class Network:
    """The exact epsilon at a timestep; counts its calls."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, x: Tensor, t: Tensor | float) -> Tensor:
        self.calls += 1
        time = torch.as_tensor(t, dtype=torch.float64).flatten()[:1]
        alpha, sigma = SCHEDULE.alpha(time).item(), SCHEDULE.sigma(time).item()
        return (x - alpha * denoiser(x, alpha, sigma)) / sigma


def reference(steps: int = 6000, lowest: float = 1e-6) -> Tensor:
    """Carry the noise along the exact flow: x̄ = x / α obeys dx̄/du = x̄ - D with u = log(σ / α)."""
    last = torch.tensor([SCHEDULE.curve.t_max], dtype=torch.float64)
    x, start = NOISE / SCHEDULE.alpha(last).item(), math.log(SCHEDULE.sigma_ve(last).item())
    h = (math.log(lowest) - start) / steps

    def slope(u: float, x: Tensor) -> Tensor:
        alpha = 1 / math.hypot(1, math.exp(u))
        return x - denoiser(alpha * x, alpha, alpha * math.exp(u))

    for i in range(steps):
        u = start + i * h
        k1 = slope(u, x)
        k2 = slope(u + h / 2, x + h / 2 * k1)
        k3 = slope(u + h / 2, x + h / 2 * k2)
        k4 = slope(u + h, x + h * k3)
        x = x + h / 6 * (k1 + 2 * k2 + 2 * k3 + k4)
    return x


def error_of(x: Tensor, exact: Tensor) -> float:
    return ((x - exact).norm(dim=1) / exact.norm(dim=1)).median().item()


def ours(budget: int, exact: Tensor) -> Iterator[Result]:
    """Every deterministic method of alphabar on every grid, with as many steps as the budget allows."""
    for method in METHODS.values():
        if method.stochastic or method.inverse or method.order == 0 or method.name.endswith("_cfg_pp"):
            continue  # CFG++ is, without guidance, the method that its name begins with
        for grid in GRIDS:
            sampler = within(budget, lambda steps, m=method, g=grid: Sampler(SCHEDULE, m, steps, g))
            if sampler is not None:
                x = sampler(Network(), NOISE / sampler.init_noise_scale, seeds=0)
                yield Result(error_of(x, exact), f"{method.name} on {grid}")


def within(budget: int, make: Callable[[int], Sampler]) -> Sampler | None:
    """Return the sampler with the most steps whose table keeps to the budget, None where there is none."""
    for steps in range(budget, 0, -1):
        try:
            sampler = make(steps)
        except ValueError:  # this grid has no such number of steps
            continue
        if sampler.table.evaluations <= budget:
            return sampler
    return None


SIGMAS: dict[str, dict[str, Any]] = {
    "linspace": {"timestep_spacing": "linspace"},
    "trailing": {"timestep_spacing": "trailing"},
    "karras": {"use_karras_sigmas": True},
    "exponential": {"use_exponential_sigmas": True},
}
PEERS: dict[str, tuple[type[Any], dict[str, Any], int]] = {
    "DDIM": (diffusers.DDIMScheduler, {"clip_sample": False, "set_alpha_to_one": True}, 1),
    "Euler": (diffusers.EulerDiscreteScheduler, {}, 1),
    "Heun": (diffusers.HeunDiscreteScheduler, {}, 2),
    "KDPM2": (diffusers.KDPM2DiscreteScheduler, {}, 2),
    "LMS": (diffusers.LMSDiscreteScheduler, {}, 1),
    "PNDM": (diffusers.PNDMScheduler, {"skip_prk_steps": True, "set_alpha_to_one": True}, 1),
    "DEIS 2": (diffusers.DEISMultistepScheduler, {"solver_order": 2}, 1),
    "DEIS 3": (diffusers.DEISMultistepScheduler, {"solver_order": 3}, 1),
    "DPM++ 2M": (diffusers.DPMSolverMultistepScheduler, {"solver_order": 2}, 1),
    "DPM++ 3M": (diffusers.DPMSolverMultistepScheduler, {"solver_order": 3}, 1),
    "DPM singlestep 2": (diffusers.DPMSolverSinglestepScheduler, {"solver_order": 2}, 1),
    "DPM singlestep 3": (diffusers.DPMSolverSinglestepScheduler, {"solver_order": 3}, 1),
    "UniPC 2": (diffusers.UniPCMultistepScheduler, {"solver_order": 2}, 1),
    "UniPC 3": (diffusers.UniPCMultistepScheduler, {"solver_order": 3}, 1),
}
IN_SIGMA = ("Euler", "Heun", "KDPM2", "LMS")  # their x is x / α


def theirs(budget: int, exact: Tensor) -> Iterator[Result]:
    """Every deterministic solver of diffusers for this schedule on every grid that it has."""
    betas = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
    for name, (kind, config, evaluations) in PEERS.items():
        for grid, setting in SIGMAS.items():
            if not set(setting) <= set(inspect.signature(kind.__init__).parameters):
                continue
            try:
                scheduler = kind(**betas, **config, **setting)
                scheduler.set_timesteps((budget + 1) // 2 if evaluations == 2 else budget - (name == "PNDM"))
                x, calls = peer_run(scheduler, name)
            except (ValueError, IndexError, ZeroDivisionError):
                continue
            if calls <= budget and x.isfinite().all():
                yield Result(error_of(x, exact), f"{name} on {grid}")


def peer_run(scheduler: Any, name: str) -> tuple[Tensor, int]:
    network = Network()
    x = NOISE * (math.hypot(float(scheduler.sigmas[0]), 1.0) if name in IN_SIGMA else 1.0)
    for t in scheduler.timesteps:
        x = scheduler.step(network(scheduler.scale_model_input(x, t), t), t, x).prev_sample
    return x.double(), network.calls


def table(best: dict[int, tuple[list[Result], list[Result]]]) -> str:
    lines = [
        "| evaluations | best of alphabar | error | best of diffusers | error | ratio |",
        "|---|---|---|---|---|---|",
    ]
    for budget, (mine, peers) in best.items():
        a, b = mine[0], peers[0]
        lines.append(f"| {budget} | {a.name} | {a.error:.1e} | {b.name} | {b.error:.1e} | {b.error / a.error:.1f} |")
    return "\n".join(lines)


def plot(best: dict[int, tuple[list[Result], list[Result]]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(6, 4.5))
    for which, label, colour in ((0, "alphabar", "tab:blue"), (1, "diffusers", "tab:orange")):
        for budget, results in best.items():
            errors = [r.error for r in results[which]]
            axis.scatter([budget] * len(errors), errors, s=6, color=colour, alpha=0.25)
        axis.plot(
            list(best),
            [results[which][0].error for results in best.values()],
            "o-",
            color=colour,
            label=f"best of {label}",
        )
    axis.set(xscale="log", yscale="log", xlabel="network evaluations", ylabel="median relative error", ylim=(1e-6, 1))
    axis.set_xticks(BUDGETS, [str(b) for b in BUDGETS])
    axis.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--budgets", type=int, nargs="+", default=list(BUDGETS))
    parser.add_argument("--out", type=Path, default=Path(__file__).parent)
    args = parser.parse_args()
    torch.set_num_threads(1)
    exact = reference()
    best = {}
    for budget in tqdm(args.budgets, unit="budget"):
        best[budget] = (sorted(ours(budget, exact)), sorted(theirs(budget, exact)))
    text = table(best)
    print(text)
    (args.out / "accuracy.md").write_text(
        f"# Accuracy\n\n{(__doc__ or '').strip()}\n\n{text}\n\n![error](accuracy.png)\n"
    )
    plot(best, args.out / "accuracy.png")


if __name__ == "__main__":
    main()
