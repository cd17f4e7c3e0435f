"""Error against the number of network evaluations, alphabar beside diffusers, on a problem with an
exact answer.

    python benchmarks/accuracy.py                 # about half an hour; prints the table, writes accuracy.md and accuracy.png

The data are a mixture of Gaussians in 16 dimensions, so the exact denoiser, and with it the
probability flow, is known. The reference is that flow in float64 in 6000 Runge-Kutta steps. The
network is told the timestep and takes α and σ from the training schedule, as a trained one would.

Both sides are searched over their whole option space: every deterministic method or class, with
every order, algorithm, solver type and treatment of the last steps, on every grid, down to the
clean sample or to the least noise of training. The setting with the least median of |x - exact| /
|exact| over one half of the trajectories is chosen; the error in the table is that of the other
half. Options with a continuous range (rho of a grid, gamma) stay at their defaults on both sides.
"""

from __future__ import annotations

import argparse
import inspect
import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import diffusers
import torch
from torch import Tensor
from tqdm import tqdm

from alphabar.noising import NoiseSchedule
from alphabar.sampling import GRIDS, METHODS, Sampler
from alphabar.sampling.grids import grid_options
from alphabar.sampling.options import keyword_parameters

BUDGETS = (5, 8, 10, 20, 40, 100)
SCHEDULE = NoiseSchedule.scaled_linear()
DIMENSIONS, CENTRES, SPREAD, TRAJECTORIES = 16, 8, 0.25, 256
GENERATOR = torch.Generator().manual_seed(0)
MEANS = torch.randn(CENTRES, DIMENSIONS, generator=GENERATOR, dtype=torch.float64)
NOISE = torch.randn(TRAJECTORIES, DIMENSIONS, generator=GENERATOR, dtype=torch.float64)


class Result(NamedTuple):
    """One way to sample within a budget: its error over the trajectories that choose, its name, its
    error over the others.
    """

    chosen_by: float
    name: str
    error: float


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


def result(x: Tensor, exact: Tensor, name: str) -> Result:
    errors = (x - exact).norm(dim=1) / exact.norm(dim=1)
    return Result(errors[0::2].median().item(), name, errors[1::2].median().item())


METHOD_OPTIONS: dict[str, Sequence[Any]] = {
    "order": (1, 2, 3, 4),
    "algorithm": ("dpmsolver++", "dpmsolver"),
    "solver_type": ("midpoint", "heun", "bh1", "bh2"),
    "lower_order_final": (True, False),
    "euler_at_final": (False, True),
    "predict_x0": (True, False),
    "extrapolate": (True, False),
    "combine": ("epsilon", "output"),
}
"""The choices of every option of a method that has few; a method takes those it has, and refuses
values that it does not know.
"""

GRID_OPTIONS: dict[str, Sequence[Any]] = {"final": ("zero", "sigma_min")}


def choices(
    parameters: Iterable[str], options: Mapping[str, Sequence[Any]], fixed: Iterable[str] = ()
) -> Iterator[dict[str, Any]]:
    """Return every combination of the options that are among the parameters and not fixed."""
    names = [name for name in options if name in set(parameters) - set(fixed)]
    for values in product(*(options[name] for name in names)):
        yield dict(zip(names, values, strict=True))


def described(name: str, grid: str, options: Mapping[str, Any], usual: Mapping[str, Any]) -> str:
    said = [f"{key}={value}" for key, value in options.items() if usual.get(key) != value]
    return f"{name} on {grid}" + (f" ({', '.join(said)})" if said else "")


def ours(budget: int, exact: Tensor) -> Iterator[Result]:
    """Every deterministic method of alphabar with every option on every grid, with as many steps as
    the budget allows.
    """
    for method in METHODS.values():
        if (
            method.stochastic
            or method.inverse
            or method.order == 0
            or method.name.endswith("_cfg_pp")
        ):
            continue  # CFG++ is, without guidance, the method that its name begins with
        parameters = keyword_parameters(method.formula)
        usual = {key: p.default for key, p in parameters.items()}
        for of_method, grid in product(
            list(choices(parameters, METHOD_OPTIONS, dict(method.defaults))), GRIDS
        ):
            for of_grid in choices(grid_options(grid), GRID_OPTIONS):
                options = of_method | of_grid
                sampler = within(
                    budget, lambda n, m=method, g=grid, o=options: Sampler(SCHEDULE, m, n, g, **o)
                )
                if sampler is not None:
                    x = sampler(Network(), NOISE / sampler.init_noise_scale, seeds=0)
                    yield result(
                        x, exact, described(method.name, grid, options, usual | grid_options(grid))
                    )


def within(budget: int, make: Callable[[int], Sampler]) -> Sampler | None:
    """Return the sampler with the most steps whose table keeps to the budget, None where there is
    none.
    """
    for steps in range(budget, max(budget // 3 - 2, 0), -1):
        try:
            sampler = make(steps)
        except ValueError:  # this grid has no such number of steps, or the method no such option
            continue
        if sampler.table.evaluations <= budget:
            return sampler
    return None


SIGMAS: dict[str, dict[str, Any]] = {
    "linspace": {"timestep_spacing": "linspace"},
    "leading": {"timestep_spacing": "leading"},
    "trailing": {"timestep_spacing": "trailing"},
    "karras": {"use_karras_sigmas": True},
    "exponential": {"use_exponential_sigmas": True},
    "beta": {"use_beta_sigmas": True},
    "lu": {"use_lu_lambdas": True},
}
PEER_OPTIONS: dict[str, Sequence[Any]] = {
    "solver_order": (1, 2, 3),
    "algorithm_type": ("dpmsolver++", "dpmsolver"),
    "solver_type": ("midpoint", "heun", "logrho", "bh1", "bh2"),
    "lower_order_final": (True, False),
    "euler_at_final": (False, True),
    "predict_x0": (True, False),
    "final_sigmas_type": ("zero", "sigma_min"),
    "interpolation_type": ("linear", "log_linear"),
    "set_alpha_to_one": (True, False),
    "skip_prk_steps": (True, False),
}
PEERS: dict[str, type[Any]] = {
    name: getattr(diffusers, name)
    for name in (
        "DDIMScheduler",
        "EulerDiscreteScheduler",
        "HeunDiscreteScheduler",
        "KDPM2DiscreteScheduler",
        "LMSDiscreteScheduler",
        "PNDMScheduler",
        "DEISMultistepScheduler",
        "DPMSolverMultistepScheduler",
        "DPMSolverSinglestepScheduler",
        "UniPCMultistepScheduler",
    )
}
IN_SIGMA = ("EulerDiscrete", "HeunDiscrete", "KDPM2Discrete", "LMSDiscrete")  # their x is x / α
CANNOT = (
    AssertionError,
    ValueError,
    IndexError,
    ZeroDivisionError,
    UnboundLocalError,
    NotImplementedError,
    torch.linalg.LinAlgError,
)
"""What the classes raise for options that they have no formula for."""


def theirs(budget: int, exact: Tensor) -> Iterator[Result]:
    """Every deterministic solver of diffusers for this schedule with every option on every grid,
    with the steps of the budget.
    """
    betas = {
        "beta_schedule": "scaled_linear",
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "clip_sample": False,
    }
    for name, kind in PEERS.items():
        usual = {key: p.default for key, p in inspect.signature(kind.__init__).parameters.items()}
        shared = {key: value for key, value in betas.items() if key in usual}
        for grid, setting in SIGMAS.items():
            if not set(setting) <= set(usual):
                continue
            for options in choices(usual, PEER_OPTIONS):
                run = within_calls(
                    budget, kind, shared | options | setting, name.removesuffix("Scheduler")
                )
                if run is not None:
                    yield result(
                        run, exact, described(name.removesuffix("Scheduler"), grid, options, usual)
                    )


def within_calls(
    budget: int, kind: type[Any], config: Mapping[str, Any], name: str
) -> Tensor | None:
    """Return what the class draws with the most steps that keep to the budget, None where it cannot
    or is not finite.
    """
    for steps in range(budget, max(budget // 3 - 5, 0), -1):
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                scheduler = kind(**config)
                if changed(scheduler, config):
                    return None
                scheduler.set_timesteps(steps)
                if len(scheduler.timesteps) > budget:
                    continue
                x, calls = peer_run(scheduler, name)
        except CANNOT:
            continue
        if calls <= budget:
            return x if x.isfinite().all() else None
    return None


def changed(scheduler: Any, config: Mapping[str, Any]) -> bool:
    """Return whether the class replaced an option that it does not know by another one, which is
    then a run of its own.
    """
    return any(scheduler.config[key] != value for key, value in config.items())


def peer_run(scheduler: Any, name: str) -> tuple[Tensor, int]:
    network = Network()
    x = NOISE * (math.hypot(float(scheduler.sigmas[0]), 1.0) if name in IN_SIGMA else 1.0)
    for t in scheduler.timesteps:
        x = scheduler.step(network(scheduler.scale_model_input(x, t), t), t, x).prev_sample
    return x.double(), network.calls


def table(best: dict[int, tuple[list[Result], list[Result]]]) -> str:
    lines = [
        "| evaluations | best of alphabar | error | settings | best of diffusers | error | "
        "settings | ratio |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for budget, (mine, peers) in best.items():
        a, b = mine[0], peers[0]
        lines.append(
            f"| {budget} | {a.name} | {a.error:.1e} | {len(mine)} | {b.name} | {b.error:.1e} | "
            f"{len(peers)} | {b.error / a.error:.2f} |"
        )
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
    axis.set(
        xscale="log",
        yscale="log",
        xlabel="network evaluations",
        ylabel="median relative error",
        ylim=(1e-6, 1),
    )
    axis.set_xticks(BUDGETS, [str(b) for b in BUDGETS])
    axis.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--budgets", type=int, nargs="+", default=list(BUDGETS))
    parser.add_argument("--out", type=Path, default=Path(__file__).parent)
    args = parser.parse_args()
    torch.set_num_threads(1)
    exact = reference()
    best = {}
    for budget in tqdm(args.budgets, unit="budget"):
        best[budget] = (sorted(ours(budget, exact)), sorted(theirs(budget, exact)))
        write(best, args.out)  # as far as it is, so that a run that ends early loses one budget
    print(table(best))


def write(best: dict[int, tuple[list[Result], list[Result]]], folder: Path) -> None:
    head = f"# Accuracy\n\n{(__doc__ or '').strip()}\n"
    (folder / "accuracy.md").write_text(f"{head}\n{table(best)}\n\n![error](accuracy.png)\n")
    plot(best, folder / "accuracy.png")


if __name__ == "__main__":
    main()
