"""Where sigma-spaced grids on a zero-terminal-SNR schedule are spaced from: a measurement.

    python benchmarks/terminal_sigma.py                                    # seconds; prints and writes terminal_sigma.md
    python benchmarks/terminal_sigma.py --checkpoint runs/demo/brightness.ckpt    # and a trained network, minutes

With zero terminal SNR the first knot of a grid has sigma / alpha = infinity. A grid that spaces
powers or logarithms of sigma needs a finite value in its place (``terminal_sigma``). A high one
spends steps where nothing happens; a low one makes the first step, which is of first order, so long
that wide components of the data lose amplitude: the grey images that zero terminal SNR cures.

Exact problem: components of the data are Gaussians of spread S, in units of the noise. Latents of
64 x 64 have S near 30 in their mean value, those of 128 x 128 near 60; details have S below 1. The
error is | x / exact x - 1 |. A row of the first table is, for one value, the largest error over all
S up to a bound, in units of the least that any value in the list reaches, as the geometric mean
(and the worst) over 2M, UniPC, DEIS, Heun and DDIM on three grids in 5, 8, 10, 20 and 40 steps.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Iterator
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from alphabar.noising import NoiseSchedule
from alphabar.sampling import Sampler

ZERO = NoiseSchedule.scaled_linear(prediction="v_prediction").zero_terminal_snr()
PLAIN = NoiseSchedule.scaled_linear(prediction="v_prediction")
VALUES = (4096, 1000, 500, 200, 100, 50, 30, 15)
METHODS = ("dpmpp_2m", "unipc", "deis", "heun", "ddim")
GRIDS = ("karras", "exponential", "kl_optimal")
STEPS = (5, 8, 10, 20, 40)
SPREADS = torch.tensor([0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 60.0], dtype=torch.float64)
BOUNDS = (10, 30, 60)


def exact_network(schedule: NoiseSchedule) -> Callable[[Tensor, Tensor], Tensor]:
    """The v of data N(0, S^2), one S a column: v = alpha eps - sigma D with D = alpha S^2 x /
    (alpha^2 S^2 + sigma^2).
    """

    def v(x: Tensor, t: Tensor) -> Tensor:
        alpha, sigma = schedule.alpha(t.double()[:1]), schedule.sigma(t.double()[:1])
        D = alpha * SPREADS**2 / ((alpha * SPREADS) ** 2 + sigma**2) * x
        return alpha * (x - alpha * D) / sigma - sigma * D

    return v


def errors(schedule: NoiseSchedule, method: str, grid: str, steps: int, **options: Any) -> Tensor:
    """The relative error of every component, after a start on its own marginal."""
    sampler = Sampler(schedule, method, steps, grid, **options)
    first = sampler.knots[0]
    z = torch.ones(1, len(SPREADS), dtype=torch.float64)
    start = z / sampler.init_noise_scale  # the sampler multiplies by this
    spread = ((first.alpha * SPREADS) ** 2 + first.sigma**2).sqrt()
    x = sampler(exact_network(schedule), start * spread if first.alpha else z)
    return (x[0] / SPREADS - 1).abs()


def summary() -> Iterator[str]:
    yield "| terminal_sigma | " + " | ".join(f"S <= {bound} (worst)" for bound in BOUNDS) + " |"
    yield "|---|" + "---|" * len(BOUNDS)
    cases = list(product(METHODS, GRIDS, STEPS))
    # value, case, spread
    found = torch.stack(
        [torch.stack([errors(ZERO, *case, terminal_sigma=v) for case in cases]) for v in VALUES]
    )
    for i, value in enumerate(VALUES):
        cells = []
        for bound in BOUNDS:
            worst = found[..., bound >= SPREADS].amax(-1)
            ratio = worst[i] / worst.amin(0)
            cells.append(f"{ratio.log().mean().exp():.2f} ({ratio.max():.0f})")
        yield f"| {value} | {' | '.join(cells)} |"


def example() -> Iterator[str]:
    yield (
        "| DPM++ 2M Karras, 20 steps | " + " | ".join(f"S = {s:g}" for s in SPREADS.tolist()) + " |"
    )
    yield "|---|" + "---|" * len(SPREADS)
    rows = [(f"zero terminal SNR, {v}", ZERO, {"terminal_sigma": v}) for v in VALUES] + [
        ("plain schedule", PLAIN, {})
    ]
    for name, schedule, options in rows:
        found = errors(schedule, "dpmpp_2m", "karras", 20, **options)
        yield f"| {name} | " + " | ".join(f"{e:.1e}" for e in found.tolist()) + " |"


def trained(path: Path) -> Iterator[str]:
    """The distance of 16 images to those of 200 steps from the same noise, of a network that was
    trained on zero terminal SNR.
    """
    from alphabar.training import load_checkpoint

    loaded = load_checkpoint(path)

    def draw(method: str, grid: str, steps: int, value: float) -> Tensor:
        sampler = Sampler(loaded.schedule, method, steps, grid, terminal_sigma=value)
        return sampler(loaded.network, (16, *loaded.sample_shape), seeds=0)

    reference = draw("dpmpp_2m", "exponential", 200, 1000.0)
    spread = reference.mean((1, 2, 3)).std().item() * math.prod(loaded.sample_shape) ** 0.5
    yield f"A trained network (samples of shape {loaded.sample_shape}, S of the mean value {spread:.0f}): median relative distance"
    yield ""
    yield "| | " + " | ".join(str(v) for v in VALUES) + " |"
    yield "|---|" + "---|" * len(VALUES)
    for steps, grid, method in tqdm(
        list(product((8, 12, 20), ("karras", "exponential"), ("dpmpp_2m", "unipc")))
    ):
        away = [draw(method, grid, steps, float(v)) - reference for v in VALUES]
        found = [
            (a.flatten(1).norm(dim=1) / reference.flatten(1).norm(dim=1)).median().item()
            for a in away
        ]
        yield f"| {method} on {grid}, {steps} | " + " | ".join(f"{e:.3f}" for e in found) + " |"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--checkpoint", type=Path, help="a checkpoint of a network trained on zero terminal SNR"
    )
    parser.add_argument("--out", type=Path, default=Path(__file__).parent)
    args = parser.parse_args()
    parts = [list(summary()), list(example())] + (
        [list(trained(args.checkpoint))] if args.checkpoint else []
    )
    text = "\n\n".join("\n".join(part) for part in parts)
    print(text)
    (args.out / "terminal_sigma.md").write_text(
        f"# Terminal sigma\n\n{(__doc__ or '').strip()}\n\n{text}\n"
    )


if __name__ == "__main__":
    main()
