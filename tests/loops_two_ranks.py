"""One of two processes (gloo) that train in loops of their own: plain torch.distributed, accelerate
and Fabric, one after another; run by test_previews_in_loops.py. Writes what it saw as JSON.

python loops_two_ranks.py FOLDER        # LOCAL_RANK and NODE_RANK in the environment
"""

import json
import os
import shutil
import sys
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from alphabar.noising import NoiseSchedule
from alphabar.training import ModelEMA, Previews, save_schedule_with
from alphabar.training.fitting.ranks import FittingRanks
from alphabar.training.fitting.tables import Fitting
from alphabar.training.loops.sharding import local
from alphabar.training.loops.wrappers import unwrapped
from alphabar.training.previews import rounds
from alphabar.training.previews.render import Drawing
from loops_toy import (
    ADAPTIVE,
    FITTED,
    SCHEDULE,
    SHAPE,
    STEPS,
    Net,
    fit_little,
    previews,
    train,
    weights,
)

RANK = int(os.environ["LOCAL_RANK"])
ROOT = Path(sys.argv[1])
TIMEOUT = 60  # of a collective: what waits this long hangs
os.environ |= {"RANK": str(RANK), "WORLD_SIZE": "2"}
torch.set_num_threads(1)


def loops() -> dict[str, Any]:
    """The object of each kind of loop. Each finds the process group of the first."""
    from accelerate import Accelerator
    from lightning.fabric import Fabric
    from lightning.fabric.strategies import DDPStrategy

    dist.init_process_group("gloo", timeout=timedelta(seconds=TIMEOUT))
    settings: Any = {"process_group_backend": "gloo"}
    fabric = Fabric(accelerator="cpu", devices=2, strategy=DDPStrategy(**settings))
    fabric.launch()
    whole = {"torch": None, "accelerate": Accelerator(cpu=True), "fabric": fabric}
    return {**whole, "fsdp1": "fsdp1", "fsdp2": "fsdp2"}


class Failing:
    """Fails on one rank alone, from its second preview on, having drawn from the global generator."""

    def __init__(self, rank: int, calls: int = 3) -> None:
        self.rank, self.left = rank, calls

    def __call__(self, x: Tensor, timesteps: Tensor) -> Tensor:
        torch.rand(1)
        self.left -= 1
        if self.rank == RANK and self.left < 0:
            raise RuntimeError("no memory left")
        return -x


class Memory:
    """Room for two images on rank 1."""

    def __call__(self, x: Tensor, timesteps: Tensor) -> Tensor:
        if RANK == 1 and len(x) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
        return -x


@contextmanager
def missing() -> Iterator[bool]:
    raise RuntimeError("the averages are lost")
    yield True


def run(loop: Any, root: Path, lost: bool = False, rate: float = 0.05, **settings: Any) -> Any:
    """Train on both ranks, with previews if there are settings; return what this rank saw."""
    seen: dict[str, Any] = {"error": None, "losses": [], "copied": None}
    net, made, start = Net(), list[Previews](), time.monotonic()

    def draw(network: Any, step: int, ema: ModelEMA) -> None:
        if step == 0:
            own = None if isinstance(loop, str) else loop
            made.append(previews(**{"folder": root, "loop": own, **settings}))
        elif step % 2 == 0:
            average = missing if lost and RANK == 1 else ema.average
            made[0](network, step=step, ema=average if "weights" in settings else None)
        if step == STEPS:
            made[0].close()
            if isinstance(loop, str):  # the last weights are those of the average
                ema.copy_to(network)
                pairs = ema._averages.pairs(unwrapped(network))
                seen["copied"] = all(torch.equal(local(a), b.to(a.dtype)) for a, b in pairs)

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            seen["losses"] = train(net, loop, RANK, draw if settings else None, rate)
        except Exception as error:
            seen["error"] = f"{type(error).__name__}: {error}"
    seen["warnings"] = [str(w.message) for w in caught if "preview" in str(w.message)]
    seen["weights"] = None if isinstance(loop, str) else weights(net)  # or what a rank has of them
    return seen | {"seconds": time.monotonic() - start}


class Clock:
    """A time that has run out on rank 0 after so many looks."""

    def __init__(self, looks: int) -> None:
        self.left = looks if RANK == 0 else 1_000_000

    def monotonic(self) -> float:
        self.left -= 1
        return 0.0 if self.left >= 0 else float("inf")


def late(loop: Any, root: Path) -> Any:
    """The time is up when rank 0 has drawn its images, and rank 1 has not."""
    real, rounds.time = rounds.time, Clock(100)  # pyright: ignore
    try:
        return run(loop, root, **ADAPTIVE, max_seconds=1000.0)
    finally:
        rounds.time = real


def scenarios() -> dict[str, Any]:
    return {
        "none": {},
        "raw": {"num_images": 5},
        "both": {"weights": "both"},
        "still": {"num_images": 5, "rate": 0.0},
        "failing": {"predict": Failing(1)},
        "failing_zero": {"predict": Failing(0)},
        "raise": {"predict": Failing(1), "on_error": "raise"},
        "lost": {"weights": "ema", "lost": True},
        "memory": {"predict": Memory(), "batch_size": 4, "num_images": 5},
        "enough": {"predict": Memory(), "batch_size": 2, "num_images": 5},
        "unwritable": {"folder": ROOT / "file" / "previews"},
        "adaptive": ADAPTIVE,
        "fitted": FITTED,
        "fitted_still": {**FITTED, "rate": 0.0},
        "fitted_failing": {**FITTED, "predict": Failing(1, calls=20)},
    }


def sharded_fit_that_fails_on_one_rank() -> dict[str, Any]:
    """A forward that needs all ranks, and a rank that stops between two forwards."""

    def together(x: Tensor, timesteps: Tensor) -> Tensor:
        dist.all_reduce(torch.zeros(1))
        return -x

    started, calls = time.monotonic(), [0]

    def stop() -> bool:
        calls[0] += RANK
        return calls[0] > 5

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fitting = Fitting(SCHEDULE, 3)
        ranks = FittingRanks(2, 2, RANK, sharded=True)
        sampler = fitting.sampler("raw", 1, together, SHAPE, Drawing(2), ranks=ranks, stop=stop)
    words = [str(warning.message) for warning in caught]
    return {"sampler": sampler.name, "words": words, "seconds": time.monotonic() - started}


def states(accelerator: Any) -> dict[str, Any]:
    """Save a state with the schedule and the averages, and load it into others."""
    net = Net()
    network = accelerator.prepare(net)
    ema = ModelEMA(network, 0.5)
    accelerator.register_for_checkpointing(ema)
    save_schedule_with(accelerator, SCHEDULE)
    for step in (1, 2):
        net.first.weight.data += step
        ema.update(step)
    accelerator.save_state(str(ROOT / "state"))
    if RANK == 0:
        shutil.copytree(ROOT / "state", ROOT / "kept")
    before = {name: value.clone() for name, value in ema.weights().items()}
    net.first.weight.data.zero_()
    ema.update(3)
    accelerator.load_state(str(ROOT / "state"))
    same = all(torch.equal(before[name], value) for name, value in ema.weights().items())
    if RANK == 0:
        NoiseSchedule.flow().save_pretrained(ROOT / "state" / "scheduler")
    accelerator.wait_for_everyone()
    try:
        accelerator.load_state(str(ROOT / "state"))
    except ValueError as error:
        return {"same": same, "step": ema.step, "error": str(error)}
    return {"same": same, "step": ema.step, "error": None}


SHARDED = ("none", "raw", "both", "still", "lost", "fitted")

if __name__ == "__main__":
    fit_little()
    report: dict[str, Any] = {}
    for kind, loop in loops().items():
        report[kind] = {
            name: run(loop, ROOT / kind / name, **settings)
            for name, settings in scenarios().items()
            if (
                name in SHARDED
                if isinstance(loop, str)
                else kind == "torch" or not name.startswith("fitted")
            )
        }
        if kind == "torch":
            report["stopped_fit"] = sharded_fit_that_fails_on_one_rank()
            report[kind]["late"] = late(loop, ROOT / kind / "late")
        if kind == "accelerate":
            report["states"] = states(loop)
    (ROOT / f"rank{RANK}.json").write_text(json.dumps(report))
    sys.stdout.flush()
    dist.destroy_process_group()
    os._exit(0)
