"""The time and the operations of a noised batch with its loss, beside diffusers.

Both make noise, times, noisy input, v target, min-SNR weight and loss of the same batch, in turns
in one process. The network costs nothing: its output is the noisy input.

    python benchmarks/noising.py > benchmarks/noising.md
"""

from __future__ import annotations

import platform
import statistics
import time
from collections.abc import Callable, Sequence

import diffusers
import torch
from counting import CountOperations
from diffusers.training_utils import compute_snr
from torch import Tensor
from torch.nn.functional import mse_loss

from alphabar.noising import NoiseSchedule, Noising
from alphabar.noising.utils import rng

BATCHES = 1, 4, 16, 64, 256
SIZES = (4, 8, 8), (4, 64, 64)
KINDS = "gaussian", "offset", "input_perturbation", "pyramid"
SCHEDULE = NoiseSchedule.scaled_linear(prediction="v_prediction")
PEER = diffusers.DDPMScheduler(
    beta_schedule="scaled_linear",
    beta_start=0.00085,
    beta_end=0.012,
    prediction_type="v_prediction",
)


def ours(noise: str) -> Callable[[Tensor, int], Tensor]:
    """Return alphabar's step for a kind of noise."""
    noising = Noising(SCHEDULE, weighting="min_snr", noise=noise)

    def step(x0: Tensor, number: int) -> Tensor:
        noised = noising(x0, step=number)
        return noised.loss(noised.x)

    return step


def theirs(x0: Tensor, number: int) -> Tensor:
    """Return the loss as diffusers' text-to-image script computes it (--snr_gamma 5)."""
    noise = torch.randn_like(x0)
    t = torch.randint(0, 1000, (len(x0),), device=x0.device)
    noisy, target = PEER.add_noise(x0, noise, t), PEER.get_velocity(x0, noise, t)
    snr = compute_snr(PEER, t)
    weight = torch.stack([snr, 5.0 * torch.ones_like(t)], dim=1).min(dim=1)[0] / (snr + 1)
    errors = mse_loss(noisy.float(), target.float(), reduction="none")
    return (errors.mean(dim=list(range(1, errors.ndim))) * weight).mean()


def seconds(
    steps: Sequence[Callable[[Tensor, int], Tensor]], x0: Tensor, budget: float = 2.0
) -> list[list[float]]:
    """Return the seconds of each step, row by row, in turns for about ``budget`` seconds."""
    rows: list[list[float]] = []
    for number in range(3):
        for step in steps:
            step(x0, number)
    end = time.perf_counter() + budget
    while time.perf_counter() < end or len(rows) < 9:
        row = []
        for step in steps:
            start = time.perf_counter()
            step(x0, 3 + len(rows))
            if x0.device.type == "cuda":
                torch.cuda.synchronize()
            row.append(time.perf_counter() - start)
        rows.append(row)
    return rows


def operations(step: Callable[[Tensor, int], Tensor], x0: Tensor) -> int:
    """Return the operations of torch in one step."""
    step(x0, 10**6)
    with CountOperations() as counted:
        step(x0, 10**6 + 1)
    return counted.operations


def table(steps: Sequence[Callable[[Tensor, int], Tensor]], device: str) -> None:
    """Print a row for each batch: operations, medians, and the ratio to the first step."""
    for size in SIZES:
        for batch in BATCHES:
            x0 = torch.randn(batch, *size, device=device)
            rows = seconds(steps, x0)
            counts = " / ".join(str(operations(step, x0)) for step in steps)
            times = " / ".join(
                f"{1e6 * statistics.median(column):,.0f}" for column in zip(*rows, strict=True)
            )
            ratios = " / ".join(
                f"{statistics.median(row[k] / row[0] for row in rows):.2f}"
                for k in range(1, len(steps))
            )
            print(f"| {batch} x {'x'.join(map(str, size))} | {counts} | {times} | {ratios} |")


def main() -> None:
    """Print the page."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    # a process that trains has freed large blocks, after which the C library returns fewer pages
    torch.zeros(31 << 20, dtype=torch.uint8)
    where = torch.cuda.get_device_name() if device == "cuda" else f"CPU, {platform.machine()}"
    loops = "with" if rng.loops() else "without"
    print("# The time of noising a batch\n")
    print(
        f"Noise, times, noisy input, v target, min-SNR weight and loss; {where}, "
        f"{torch.get_num_threads()} threads, torch {torch.__version__}, diffusers "
        f"{diffusers.__version__}, {loops} the compiled loops of `alphabar[fast]`. Medians of runs "
        "in turns in one process. Written by `benchmarks/noising.py`.\n"
    )
    print("| batch | operations: diffusers / alphabar | µs | ratio |\n| --- | --- | --- | --- |")
    table([theirs, ours("gaussian")], device)
    print("\nKinds of noise, each beside plain Gaussian noise:\n")
    print(f"| batch | operations: {' / '.join(KINDS)} | µs | ratio to {KINDS[0]} |")
    print("| --- | --- | --- | --- |")
    table([ours(kind) for kind in KINDS], device)


if __name__ == "__main__":
    main()
