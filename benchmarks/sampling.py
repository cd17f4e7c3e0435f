"""The host time of a sampling step, beside diffusers and a plain loop, and of making a sampler.

The network costs nothing. All three run in turns in one process: diffusers' class in a pipeline's
loop with ``set_timesteps``, alphabar's sampler of the class's name in one call, and a loop over the
coefficients of its table, which checks nothing and draws its noise with ``torch.randn``.

    python benchmarks/sampling.py > benchmarks/sampling.md
"""

from __future__ import annotations

import platform
import statistics
import time
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import diffusers
import torch
from torch import Tensor

from alphabar.noising import NoiseSchedule
from alphabar.sampling import METHODS, Sampler
from alphabar.sampling import sampler as sampler_module
from alphabar.sampling.kernel import combine
from alphabar.sampling.tracing import Draw, Evaluation

CLASSES = (
    *("DDPMScheduler", "DDIMScheduler", "PNDMScheduler", "EulerDiscreteScheduler"),
    *("EulerAncestralDiscreteScheduler", "HeunDiscreteScheduler", "DPMSolverMultistepScheduler"),
    *("DEISMultistepScheduler", "UniPCMultistepScheduler", "SASolverScheduler"),
    *("LMSDiscreteScheduler", "FlowMatchEulerDiscreteScheduler"),
)
SHAPES = (1, 4, 8, 8), (4, 4, 64, 64)
STEPS, ROUNDS = 20, 31


Network = Callable[[Tensor, Any], Tensor]
Loop = Callable[[Tensor], Tensor]


def in_a_pipeline(scheduler: Any, network: Network) -> Loop:
    """Return diffusers' loop."""
    scale = getattr(scheduler, "scale_model_input", lambda x, t: x)

    def loop(x: Tensor) -> Tensor:
        scheduler.set_timesteps(STEPS, device=x.device)
        for t in scheduler.timesteps:
            out = network(scale(x, t), t)
            x = scheduler.step(out, t, x, return_dict=False)[0]
        return x

    return loop


def plain(sampler: Sampler, network: Network) -> Loop:
    """Return a loop over the coefficients of a table, for a network without guidance."""
    steps = sampler.table.steps

    def loop(x: Tensor) -> Tensor:
        state, out = [x], x
        for step in steps:
            basis = list(state)
            for op in step.ops:
                if isinstance(op, Evaluation):
                    out = network(combine(op.row, basis), op.knot.timestep)
                basis.append(torch.randn_like(x) if isinstance(op, Draw) else out)
            state = [combine(row, basis) for row in step.carry]
        return state[0]

    return loop


def typical(loops: Sequence[Loop], x: Tensor) -> list[float]:
    """Return the microseconds per step of each loop, of runs in turns: a fifth of them take less.

    Not the median: other processes of the machine make some runs longer, none shorter.
    In its turn a loop runs twice and the second run counts: the code of another loop, of scipy's
    for one, has put its own out of the processor's caches.
    """
    runs: list[list[float]] = []
    for _ in range(ROUNDS + 3):
        runs.append([])
        for loop in loops:
            loop(x)
            synchronize(x)
            start = time.perf_counter()
            loop(x)
            synchronize(x)
            runs[-1].append(1e6 * (time.perf_counter() - start) / STEPS)
    return [statistics.quantiles(column, n=5)[0] for column in zip(*runs[3:], strict=True)]


def synchronize(x: Tensor) -> None:
    """Wait for the device of ``x``."""
    if x.device.type == "cuda":
        torch.cuda.synchronize()


def seconds(
    act: Callable[[], Any], repeats: int, clock: Callable[[], float] = time.perf_counter
) -> float:
    """Return the least time of several calls."""
    times: list[float] = []
    for _ in range(repeats):
        start = clock()
        act()
        times.append(clock() - start)
    return min(times)


def main() -> None:
    """Print the page."""
    warnings.simplefilter("ignore")
    diffusers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    where = torch.cuda.get_device_name() if device == "cuda" else f"CPU, {platform.machine()}"
    print("# The time of sampling without a network\n")
    print(
        f"{where}, 1 thread, torch {torch.__version__}, diffusers {diffusers.__version__}. Written "
        "by `benchmarks/sampling.py`.\n"
    )
    schedule, flow = NoiseSchedule.linear(), NoiseSchedule.flow()
    for shape in SHAPES:
        x, out = (torch.randn(shape, device=device) for _ in range(2))

        def network(x: Tensor, t: Any, out: Tensor = out) -> Tensor:
            return out

        print(f"Microseconds per step, {STEPS} steps, latents {shape}:\n")
        print("| class | diffusers | alphabar | plain loop | ratio to diffusers | to the loop |")
        print("| --- | --- | --- | --- | --- | --- |")
        with torch.no_grad():
            for name in CLASSES:
                sampler = Sampler(flow if name.startswith("Flow") else schedule, name, STEPS)
                loops = [
                    in_a_pipeline(getattr(diffusers, name)(), network),
                    lambda x, s=sampler, network=network: s(network, x, seeds=0),
                    plain(sampler, network),
                ]
                peer, own, bare = typical(loops, x)
                times = f"{peer:.1f} | {own:.1f} | {bare:.1f}"
                print(f"| {name} | {times} | {own / peer:.2f} | {own / bare:.1f} |")
        print()
    heading = f"Making `Sampler(schedule, name, {STEPS})` on a schedule that is in use"
    print(f"{heading}, milliseconds of CPU time:\n")
    print("| method | first time | again | 200 steps, first time |\n| --- | --- | --- | --- |")
    for name in METHODS:

        def cold(steps: int = STEPS, name: str = name) -> None:
            sampler_module._compile.cache_clear()
            Sampler(schedule, name, steps)

        try:
            first = 1e3 * seconds(cold, 25, time.thread_time)
            again = 1e3 * seconds(
                lambda name=name: Sampler(schedule, name, STEPS), 50, time.thread_time
            )
        except ValueError:  # a method of another schedule
            continue
        longer = "-"
        if name not in ("lcm", "tcd"):
            longer = f"{1e3 * seconds(lambda: cold(200), 2, time.thread_time):.0f}"
        print(f"| {name} | {first:.1f} | {again:.3f} | {longer} |")


if __name__ == "__main__":
    main()
