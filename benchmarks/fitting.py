"""Few-step tables fitted to a network, beside the known methods of alphabar and of diffusers.

    python benchmarks/fitting.py                  # an hour on 2 cores; writes fitting.md and fitting.png

Four networks: the exact denoiser of a mixture of Gaussians in 16 dimensions (benchmarks/accuracy.py),
the UNet of examples/train_brightness.py (v-prediction, zero terminal SNR), a class-conditional
network on the digits of scikit-learn with guidance 2, and a flow-matching one on the same digits.
They are trained once and kept in ``--cache``, with the results so far.

The error is the geometric mean over seeds of |x - teacher| / |teacher|, from the same noise, on
seeds that no fit has seen; the teacher is fit_table's own, 80 steps. "alphabar" is the best of all
deterministic methods with one call a step, with default options, on all grids of a few; "diffusers"
the best of its DDIM, DPM++ 2M and 3M, DEIS and UniPC on linspace, trailing and karras grids. (Its
iPNDM has one grid and no prediction type; the method is among those of alphabar.) Both are chosen on
the very seeds of the table, in their favour.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import accuracy
import diffusers
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

from alphabar.noising import NoiseSchedule, Noising
from alphabar.noising.io.files import CONFIG_NAME
from alphabar.noising.noising import prediction_tensor
from alphabar.noising.utils.atomic import write_atomically
from alphabar.sampling import METHODS, Sampler, default_teacher, fit_table
from alphabar.training import load_checkpoint

HERE = Path(__file__).parent
UNUSED = 100_000
GRIDS = ("linspace", "trailing", "karras", "polyexponential", "kl_optimal")
PEER_METHODS = ("ddim", "dpmpp_2m", "dpmpp_3m", "deis", "unipc")
PEER_GRIDS = ("linspace", "trailing", "karras")


@dataclass(frozen=True)
class Problem:
    """A network and how it is measured; ``conditioning`` and ``unconditional`` of seeds."""

    name: str
    network: Any
    schedule: NoiseSchedule
    shape: tuple[int, ...]
    budgets: tuple[int, ...]
    seeds: int
    measured: int
    searches: int
    refine: int
    arguments: dict[str, Any] = field(default_factory=dict)
    labels: Callable[[Any], dict[str, Any]] | None = None
    no_labels: Callable[[Any], dict[str, Any]] | None = None

    def call(self, seeds: range) -> dict[str, Any]:
        """Arguments of a sampler's call."""
        if self.labels is None or self.no_labels is None:
            return dict(self.arguments)
        return self.arguments | {
            "conditioning": self.labels(seeds),
            "unconditional": self.no_labels(seeds),
        }


class Digits(nn.Module):
    """A residual network on 8 x 8 images with an embedding of time and class (10 is none)."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.first = nn.Conv2d(1, width, 3, padding=1)
        self.time = nn.Sequential(nn.Linear(32, width), nn.SiLU(), nn.Linear(width, width))
        self.label = nn.Embedding(11, width)
        self.blocks = nn.ModuleList(
            nn.Sequential(
                nn.GroupNorm(8, width),
                nn.SiLU(),
                nn.Conv2d(width, width, 3, padding=1),
                nn.GroupNorm(8, width),
                nn.SiLU(),
                nn.Conv2d(width, width, 3, padding=1),
            )
            for _ in range(3)
        )
        self.last = nn.Conv2d(width, 1, 3, padding=1)

    def forward(self, x: Tensor, t: Tensor, y: Tensor | None = None) -> Tensor:
        angle = t.float()[:, None] * torch.exp(-torch.arange(16) * (math.log(1e4) / 16))
        y = torch.full((len(x),), 10) if y is None else y
        e = self.time(torch.cat([angle.sin(), angle.cos()], 1)) + self.label(y)
        x = self.first(x)
        for block in self.blocks:
            x = x + block(x + e[:, :, None, None])
        return self.last(x)


def digits(schedule: NoiseSchedule, path: Path, conditional: bool, steps: int = 600) -> nn.Module:
    """Return a network trained on the digits, from ``path`` if it is there."""
    torch.manual_seed(0)
    network = Digits()
    if not path.is_file():
        data = load_digits()
        images = torch.from_numpy(data.images).float()[:, None] / 8 - 1
        classes = torch.from_numpy(data.target).long()
        noising = Noising(schedule, timesteps="stratified", seed=0)
        optimizer = torch.optim.AdamW(network.parameters(), lr=2e-3)
        decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        generator = torch.Generator().manual_seed(0)
        for step in range(steps):
            chosen = torch.randint(len(images), (32,), generator=generator)
            y = classes[chosen].clone()
            y[torch.rand(32, generator=generator) < (0.15 if conditional else 1.0)] = 10
            noised = noising(images[chosen], step=step)
            loss = noised.loss(network(noised.x, noised.timesteps, y))
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            decay.step()
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save(network.state_dict(), path)
    network.load_state_dict(torch.load(path, weights_only=True))
    return network.eval().requires_grad_(False)


def mixture(cache: Path) -> Problem:
    common = {"dtype": torch.float64}
    return Problem("exact mixture", accuracy.Network(), accuracy.SCHEDULE, (16,), (5, 6, 8, 10), 128, 256, 40, 12, common)  # fmt: skip


def demo(cache: Path) -> Problem:
    folder = cache / "brightness"
    if not (folder / "brightness.ckpt").is_file():
        script = HERE.parent / "examples" / "train_brightness.py"
        flags = ["--prediction_type", "v_prediction", "--rescale_betas_zero_snr"]
        more = ["--max_steps", "1000", "--num_samples", "16", "--preview_every", "1000"]
        subprocess.run([sys.executable, script, *flags, *more, "--out", folder], check=True)
    loaded = load_checkpoint(folder / "brightness.ckpt")
    return Problem("demo UNet", loaded.network.eval(), loaded.schedule, tuple(loaded.sample_shape), (4, 5, 6, 8), 16, 6, 12, 6)  # fmt: skip


def conditional(cache: Path) -> Problem:
    schedule = NoiseSchedule.scaled_linear(prediction="v_prediction").zero_terminal_snr()

    def labels(seeds: Any) -> dict[str, Any]:
        return {"y": torch.tensor([seed % 10 for seed in seeds])}

    def none(seeds: Any) -> dict[str, Any]:
        return {"y": torch.full((len(seeds),), 10)}

    network = digits(schedule, cache / "digits_v.pt", conditional=True)
    return Problem("digits, guidance 2", network, schedule, (1, 8, 8), (4, 5, 6, 8), 32, 32, 24, 6, {"guidance_scale": 2.0}, labels, none)  # fmt: skip


def flow(cache: Path) -> Problem:
    schedule = NoiseSchedule.flow()
    network = digits(schedule, cache / "digits_flow.pt", conditional=False)
    return Problem("digits, flow", network, schedule, (1, 8, 8), (4, 5, 6, 8), 32, 32, 24, 6)


PROBLEMS = {"mixture": mixture, "demo": demo, "conditional": conditional, "flow": flow}


def error(x: Tensor, target: Tensor) -> float:
    """The geometric mean of the relative errors; infinite if one is not finite."""
    relative = (x - target).flatten(1).norm(dim=1) / target.flatten(1).norm(dim=1)
    return (
        math.exp(relative.double().clamp(min=1e-12).log().mean())
        if x.isfinite().all()
        else math.inf
    )


def ours(problem: Problem, budget: int) -> Iterator[Sampler]:
    for method in METHODS.values():
        plain = not (method.stochastic or method.inverse or method.order == 0)
        if not plain or method.evaluations != 1 or method.name.endswith("_cfg_pp"):
            continue
        for grid in GRIDS:
            try:
                sampler = Sampler(problem.schedule, method, budget, grid)
            except ValueError:  # the method or the grid is not for this schedule
                continue
            if sampler.table.evaluations == budget:
                yield sampler


def peer(problem: Problem, sampler: Sampler, noise: Tensor, call: dict[str, Any]) -> Tensor | None:
    """Run the class of diffusers that is nearest to the sampler; None where there is none."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            with tempfile.TemporaryDirectory() as folder:
                sampler.save_pretrained(folder, nearest=True)
                config = json.loads(Path(folder, CONFIG_NAME).read_text())
            scheduler = getattr(diffusers, config["_class_name"]).from_config(config)
            scheduler.set_timesteps(sampler.steps)
        except (ValueError, TypeError, AssertionError, AttributeError):
            return None
        scale, x = call.get("guidance_scale", 1.0), noise * sampler.init_noise_scale
        try:
            for t in scheduler.timesteps:
                given, times = scheduler.scale_model_input(x, t), t.expand(len(x))
                out = prediction_tensor(
                    problem.network(given, times, **call.get("conditioning", {}))
                )
                if scale != 1:
                    empty = problem.network(given, times, **call["unconditional"])
                    out = empty + scale * (out - empty)
                x = scheduler.step(out, t, x).prev_sample
        except (ValueError, AttributeError, IndexError, ZeroDivisionError):
            return None
        return x


def measure(problem: Problem, budget: int, refine: bool) -> dict[str, Any]:
    """The errors of one budget: the best known ones, and of the fits."""
    seeds = range(UNUSED, UNUSED + problem.measured)
    generator = torch.Generator().manual_seed(UNUSED)
    noise = torch.randn(problem.measured, *problem.shape, generator=generator)
    call = problem.call(seeds)
    with torch.no_grad():
        target = default_teacher(problem.schedule)(problem.network, noise, **call)
        known = min(
            (
                error(sampler(problem.network, noise, **call), target),
                f"{sampler.name}, {sampler.grid}",
            )
            for sampler in ours(problem, budget)
        )
        theirs = []
        for method in PEER_METHODS:
            for grid in PEER_GRIDS:
                x = peer(problem, Sampler(problem.schedule, method, budget, grid), noise, call)
                if x is not None:
                    theirs.append((error(x.double(), target), f"{method}, {grid}"))
    result: dict[str, Any] = {"known": known, "diffusers": min(theirs)}
    for name, iterations in (("stage 1", 0), *((("refined", problem.refine),) if refine else ())):
        begun = time.monotonic()
        table = fit_table(
            problem.network,
            problem.schedule,
            budget,
            shape=problem.shape,
            seeds=problem.seeds,
            searches=problem.searches,
            refine=iterations,
            batch_size=16 if math.prod(problem.shape) > 100 else 64,
            conditioning=problem.labels,
            unconditional=problem.no_labels,
            **problem.arguments,
        )
        seconds = time.monotonic() - begun
        x = Sampler.from_table(table)(problem.network, noise, **call)
        result[name] = [error(x, target), seconds, table.name]
    return result


def page(results: dict[str, dict[str, Any]]) -> str:
    lines = [
        "| network | evaluations | diffusers | alphabar | fitted | fitted / best | refined | refined / best | seconds |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for name, budgets in results.items():
        for budget, r in budgets.items():
            best = min(r["known"][0], r["diffusers"][0])
            fitted, fine = r["stage 1"], r.get("refined")
            lines.append(
                f"| {name} | {budget} | {r['diffusers'][0]:.2g} ({r['diffusers'][1]}) | "
                f"{r['known'][0]:.2g} ({r['known'][1]}) | {fitted[0]:.2g} | {fitted[0] / best:.2f} | "
                + (f"{fine[0]:.2g} | {fine[0] / best:.2f} | " if fine else "| | ")
                + f"{fitted[1]:.0f}{f' / {fine[1]:.0f}' if fine else ''} |"
            )
    return "\n".join(lines)


def plot(results: dict[str, dict[str, Any]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, len(results), figsize=(3.4 * len(results), 3.2), squeeze=False)
    for axis, (name, budgets) in zip(axes[0], results.items(), strict=True):
        for key, label in (("diffusers", "diffusers"), ("known", "alphabar"), ("stage 1", "fitted"), ("refined", "refined")):  # fmt: skip
            points = [(int(b), r[key][0]) for b, r in budgets.items() if key in r]
            if points:
                axis.plot(*zip(*points, strict=True), "o-", label=label)
        axis.set(yscale="log", title=name, xlabel="network evaluations")
    axes[0][0].set_ylabel("error")
    axes[0][0].legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--problems", nargs="+", choices=list(PROBLEMS), default=list(PROBLEMS))
    parser.add_argument("--cache", type=Path, default=Path.home() / ".cache" / "alphabar_fitting")
    parser.add_argument("--out", type=Path, default=HERE)
    parser.add_argument("--no_refine", action="store_true")
    args = parser.parse_args()
    logging.getLogger("alphabar").setLevel(logging.ERROR)  # what the nearest class does not do
    for key in args.problems:
        problem = PROBLEMS[key](args.cache)
        kept = args.cache / f"{key}.json"
        found = json.loads(kept.read_text()) if kept.is_file() else {}
        for budget in problem.budgets:
            if str(budget) not in found:
                found[str(budget)] = measure(problem, budget, not args.no_refine)
                print(problem.name, budget, found[str(budget)], flush=True)
                write_atomically(kept, json.dumps(found))
    write(args.cache, args.out)


def write(cache: Path, out: Path) -> None:
    """Write the page of all results so far."""
    names = {"mixture": "exact mixture", "demo": "demo UNet", "conditional": "digits, guidance 2", "flow": "digits, flow"}  # fmt: skip
    results = {
        name: json.loads((cache / f"{key}.json").read_text())
        for key, name in names.items()
        if (cache / f"{key}.json").is_file()
    }
    head = f"# Fitted tables\n\n{(__doc__ or '').strip()}\n"
    text = f"{head}\n{page(results)}\n\n![error](fitting.png)\n"
    (out / "fitting.md").write_text(text)
    plot(results, out / "fitting.png")


if __name__ == "__main__":
    main()
