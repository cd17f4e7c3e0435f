"""The time that a step of a scheduler object takes on the host, beside diffusers' class.

Both classes run the same loop, as a pipeline does, with a network that costs nothing, in turns in
one process; the table gives the medians of the time per network call.

    python benchmarks/schedulers.py > benchmarks/schedulers.md
"""

from __future__ import annotations

import inspect
import platform
import statistics
import time
import warnings
from typing import Any

import diffusers
import torch

from alphabar.sampling import schedulers

NAMES = (
    *("DDPMScheduler", "DDIMScheduler", "PNDMScheduler", "EulerDiscreteScheduler"),
    *("EulerAncestralDiscreteScheduler", "HeunDiscreteScheduler", "DPMSolverMultistepScheduler"),
    *("UniPCMultistepScheduler", "LCMScheduler", "FlowMatchEulerDiscreteScheduler"),
)
SHAPE = (1, 4, 8, 8)  # small, so that the time is that of the host
STEPS, ROUNDS = 25, 41


def seconds_per_call(scheduler: Any, x: torch.Tensor, out: torch.Tensor) -> float:
    """Run a pipeline's loop; return the seconds of the scheduler per network call."""
    generator = torch.Generator(x.device).manual_seed(0)
    takes = inspect.signature(scheduler.step).parameters
    given = {"generator": generator} if "generator" in takes else {}
    scale = getattr(scheduler, "scale_model_input", lambda x, t: x)
    scheduler.set_timesteps(STEPS, device=x.device)
    if hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(0)
    times = scheduler.timesteps
    if x.device.type == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    for t in times:
        scale(x, t)
        x = scheduler.step(out, t, x, **given, return_dict=False)[0]
    return (time.perf_counter() - start) / len(times)


def main() -> None:
    """Print the page."""
    warnings.simplefilter("ignore")
    diffusers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    x, out = (torch.randn(SHAPE, device=device) for _ in range(2))
    where = torch.cuda.get_device_name() if device == "cuda" else f"CPU, {platform.machine()}"
    print("# The time of a scheduler's step\n")
    print(
        f"Host time per network call (`scale_model_input` and `step`), {STEPS} steps, latents {SHAPE}, {where}, torch "
        f"{torch.__version__}, diffusers {diffusers.__version__}; medians of {ROUNDS} runs in turns. Written by "
        "`benchmarks/schedulers.py`.\n"
    )
    print("| class | diffusers, µs | drop-in, µs | ratio |\n| --- | --- | --- | --- |")
    with torch.no_grad():
        for name in NAMES:
            pair = [getattr(home, name)() for home in (diffusers, schedulers)]
            runs = [[seconds_per_call(s, x, out) for s in pair] for _ in range(ROUNDS)]
            theirs, ours = (1e6 * statistics.median(column) for column in zip(*runs, strict=True))
            ratio = statistics.median(own / their for their, own in runs)
            print(f"| {name} | {theirs:.0f} | {ours:.0f} | {ratio:.2f} |")


if __name__ == "__main__":
    main()
