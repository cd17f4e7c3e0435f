"""Strata across optimizer steps at batch size 1: the variance of the loss estimate, and exactness.

    python benchmarks/strata.py > benchmarks/strata.md        # a minute

Data is Gaussian, N(0, I) of d dimensions, and the network is the best one, so the loss of a sample
has a closed form: with x_t = α x_0 + σ ε and the prediction c x_t, error = |c x_t - target|² / d.
The estimate is the mean loss of n consecutive steps with one sample each. Its variance over many
starts and seeds is compared with that of independent times.

The times explain a part of the variance, x_0 and ε the rest: the part of the times is all of it as
d → ∞, as for images. So the table has d = 64 (8 x 8), d = 4096 (4 x 32 x 32) and d → ∞.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
from functools import lru_cache
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
import torch.distributed as dist
from torch import Tensor, nn

from alphabar.noising import NoiseSchedule, Noising
from alphabar.noising.utils.atomic import write_atomically

FLOW = NoiseSchedule.flow()
DENSITIES = ("stratified", "stratified_logit_normal")
SEEDS, LONGEST = 64, 256
WINDOWS = (4, 10, 16, 64, 100, 256)
DIMENSIONS = (64, 4096, None)


# -- the variance ----------------------------------------------------------------------------------


@lru_cache(maxsize=4 * SEEDS)
def times_of(density: str, seed: int) -> Tensor:
    """Return the times of consecutive steps with one sample each, shape (2 * LONGEST,)."""
    noising = Noising(FLOW, timesteps=density, seed=seed)
    return torch.cat(
        [noising.draw([0], (1,), step=step, total=1).t for step in range(2 * LONGEST)]
    ).double()


def losses(t: Tensor, dimensions: int | None, seed: int) -> Tensor:
    """Return the loss of the best network for data N(0, I), one sample for each time.

    The target is ε - x_0 and the prediction E[target | x_t] = c x_t, c = (σ - α) / (α² + σ²). The
    error of a coordinate is N(0, v) with v = 1 / (α² + σ²), hence v χ²_d / d in d dimensions.
    """
    variance = 1 / ((1 - t) ** 2 + t**2)
    if dimensions is None:
        return variance
    generator = torch.Generator().manual_seed(seed)
    chi2 = torch.distributions.Chi2(torch.tensor(float(dimensions)))
    with torch.random.fork_rng():
        torch.manual_seed(int(torch.randint(1 << 31, (), generator=generator)))
        return variance * chi2.sample(t.shape).double() / dimensions


def variances(density: str, dimensions: int | None) -> dict[int, float]:
    """Return for each n the variance of the mean loss of n steps, from every start."""
    of_all = [losses(times_of(density, seed), dimensions, seed) for seed in range(SEEDS)]
    sums = torch.stack(of_all).cumsum(1)
    sums = torch.cat([sums.new_zeros(SEEDS, 1), sums], 1)
    # every start of a window, also those that are not aligned
    return {n: ((sums[:, n : n + LONGEST] - sums[:, :LONGEST]) / n).var().item() for n in WINDOWS}


def table() -> None:
    print("| times | d | " + " | ".join(f"n = {n}" for n in WINDOWS) + " |")
    print("| --- " * (2 + len(WINDOWS)) + "|")
    for density in DENSITIES:
        for dimensions in DIMENSIONS:
            alone = variances(density, dimensions)
            together = variances(f"{density}:across=64", dimensions)
            ratios = " | ".join(f"{together[n] / alone[n]:.3f}" for n in WINDOWS)
            print(f"| `{density}:across=64` | {dimensions or '∞'} | {ratios} |")


# -- the same on one and two processes, and after kill -9 ------------------------------------------


def train(folder: Path, world_size: int, rank: int, steps: int, kill_at: int | None) -> None:
    """Train a linear network with two samples in a step; a checkpoint is written at each step.

    It goes on from its checkpoint, and ends itself with SIGKILL at step ``kill_at``.
    """
    if world_size > 1:
        meet = f"file://{folder / 'rendezvous'}"
        dist.init_process_group("gloo", init_method=meet, rank=rank, world_size=world_size)
    torch.manual_seed(0)
    data, network = torch.randn(64, 8, dtype=torch.float64), nn.Linear(8, 8).double()
    noising = Noising(FLOW, timesteps="stratified_logit_normal:across=16", seed=5)
    times: list[list[float]] = []
    file = folder / "last.json"
    if file.exists():
        saved = json.loads(file.read_text())
        times = saved["times"]
        weights = saved["weights"].items()
        network.load_state_dict({k: torch.tensor(v, dtype=torch.float64) for k, v in weights})
    for step in range(len(times), steps):
        drawn = torch.zeros(2, dtype=torch.float64)
        for micro_batch in range(2 // world_size):  # one sample in each
            place = micro_batch * world_size + rank
            x0 = data[(2 * step + place) % 64][None]
            noised = noising(x0, step=step, micro_batch=micro_batch, accumulate=2 // world_size)
            drawn[place] = noised.t.double()[0]
            (noised.loss(network(noised.x)) / 2).backward()
        for tensor in (drawn, *(p.grad for p in network.parameters())):
            assert tensor is not None
            if world_size > 1:
                dist.all_reduce(tensor)
        with torch.no_grad():
            for p in network.parameters():
                p -= 0.1 * p.grad
                p.grad = None
        times.append(drawn.tolist())
        weights = {k: v.tolist() for k, v in network.state_dict().items()}
        if step == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)
        if rank == 0:
            write_atomically(file, json.dumps({"times": times, "weights": weights}))
        if world_size > 1:
            dist.barrier()


def run(folder: Path, world_size: int, steps: int = 40, kill_at: int | None = None) -> str:
    """Train in processes of their own; return the last checkpoint."""
    folder.mkdir(exist_ok=True)
    (folder / "rendezvous").unlink(missing_ok=True)
    command = [sys.executable, __file__, "--train", str(folder), str(world_size)]
    rest = [str(steps), str(-1 if kill_at is None else kill_at)]
    ranks = [subprocess.Popen([*command, str(rank), *rest]) for rank in range(world_size)]
    codes = [rank.wait(timeout=120) for rank in ranks]
    assert codes == [0 if kill_at is None else -signal.SIGKILL] * world_size, codes
    return (folder / "last.json").read_text()


def exactness(root: Path) -> dict[str, bool]:
    """Return which runs end with the times and the weights of one process, bit by bit."""
    one, two = run(root / "one", 1), run(root / "two", 2)
    assert len(json.loads(run(root / "killed", 2, kill_at=21))["times"]) == 21
    return {"2 processes": two == one, "2 processes after kill -9": run(root / "killed", 2) == one}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--train", nargs=5)
    args = parser.parse_args()
    if args.train:
        folder, world_size, rank, steps, kill_at = args.train
        train(Path(folder), int(world_size), int(rank), int(steps), int(kill_at))
        return
    print("# Strata across optimizer steps\n")
    print(
        "The variance of the mean loss of n steps with one sample each, as a share of the variance "
        "with independent times (`uniform`, `logit_normal`). Flow schedule, Gaussian data of d "
        f"dimensions, the best network; {SEEDS} seeds, windows from {LONGEST} starts each, also "
        "those that are not aligned. Written by `benchmarks/strata.py`.\n"
    )
    table()
    with TemporaryDirectory() as root:
        found = exactness(Path(root))
    print("\nThe same times and weights as on one process, bit by bit, after 40 steps:\n")
    for name, same in found.items():
        print(f"- {name}: {'yes' if same else 'NO'}")


if __name__ == "__main__":
    main()
