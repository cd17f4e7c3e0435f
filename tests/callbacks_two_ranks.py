"""One of two processes (gloo) that train together; run by test_callbacks_two_ranks.py. Writes what
it saw as JSON.

python callbacks_two_ranks.py FOLDER SUITE        # LOCAL_RANK and NODE_RANK in the environment
"""

import json
import os
import signal
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers.logger import DummyLogger
from torch import Tensor, nn

from alphabar.callbacks import ScheduleCheckpoint, ValidationSampling
from alphabar.noising import NoiseSchedule
from alphabar.training.previews import rounds
from alphabar.training.publishing import publisher
from callbacks_toy import Averages, Held, Toy, Units, fresh, strategy, train, weights

RANK = int(os.environ["LOCAL_RANK"]) + int(os.environ["NODE_RANK"])
ROOT, SUITE = Path(sys.argv[1]), sys.argv[2]
# step, weights, number of images and note of the pictures that this rank wrote
PUBLISHED: list[Any] = []
TIMEOUT = 90  # of a collective: what waits this long hangs
torch.set_num_threads(1)


def run(name: str, *callbacks: Any, **settings: Any) -> dict[str, Any]:
    """Train on both ranks, and return what this one saw."""
    module = settings.pop("module", None) or fresh()
    size = {"devices": 1, "num_nodes": 2} if SUITE == "nodes" else {"devices": 2}
    settings = {"strategy": strategy(SUITE, TIMEOUT), **size, **settings}
    seen: dict[str, Any] = {"error": None}
    start = time.monotonic()
    held = Held()
    PUBLISHED.clear()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            train(ROOT / name, *callbacks, held, module=module, **settings)
        except (Exception, SystemExit) as error:
            seen["error"] = f"{type(error).__name__}: {error}"
    seen |= {
        "losses": module.losses,
        "seconds": time.monotonic() - start,
        "published": list(PUBLISHED),
    }
    seen["held"] = held.numbers
    # or what a rank has of them
    seen["weights"] = weights(module) if SUITE in ("ddp", "nodes") else None
    seen["warnings"] = [str(w.message) for w in caught if "preview" in str(w.message)]
    return seen


def publish(preview: Any, *arguments: Any) -> list[Any]:
    PUBLISHED.append((preview.step, preview.weights, len(preview.images), preview.note))
    return PUBLISH(preview, *arguments)


PUBLISH, publisher.publish = publisher.publish, publish


def previews(**settings: Any) -> ValidationSampling:
    common: dict[str, Any] = {
        "steps": 2,
        "every_n_train_steps": 2,
        "num_images": 5,
        "batch_size": 2,
    }
    return ValidationSampling("euler_ancestral", **{**common, **settings})


class Failing:
    """Fails on one rank alone, in the middle of its second preview, having drawn from the global
    generator.
    """

    def __init__(self, rank: int, calls: int = 3, nan: bool = False) -> None:
        self.rank, self.left, self.nan = rank, calls, nan

    def __call__(self, x: Tensor, timesteps: Tensor) -> Tensor:
        torch.rand(1)
        self.left -= 1
        if self.rank == RANK and self.left < 0:
            if self.nan:
                return x * torch.nan
            raise RuntimeError("no memory left")
        return -x


class Buckets(Toy):
    """Records the shape of its own batches, which another rank does not share."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.sample_shape = (3, 8, 8 + 4 * RANK)
        return super().training_step(batch, batch_idx)


class Broken(DummyLogger):
    def log_image(self, **given: Any) -> None:
        raise ConnectionError("no network")


def units(**arguments: Any) -> Toy:
    return fresh(Units, **arguments)


class Own:
    """Calls the module that trains, and does something else before: on one rank, from a number of
    calls on.
    """

    def __init__(self, module: Toy, rank: int, calls: int) -> None:
        self.module, self.rank, self.left = module, rank, calls

    def __call__(self, x: Tensor, timesteps: Tensor) -> Tensor:
        self.left -= 1
        if self.rank in (RANK, -1) and self.left < 0:
            x = self.act(x)
        return self.module.predict(x, timesteps)

    def act(self, x: Tensor) -> Tensor:
        raise RuntimeError("a bug on this rank")


class Terminated(Own):
    def act(self, x: Tensor) -> Tensor:
        os.kill(os.getpid(), signal.SIGTERM)
        return x


class NotANumber(Own):
    def act(self, x: Tensor) -> Tensor:
        return x * torch.nan


class Memory(Own):
    """Room for two images."""

    def act(self, x: Tensor) -> Tensor:
        if len(x) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
        return x


class Decoder(nn.Module):
    """A network of its own, that fails on one rank."""

    def __init__(self, rank: int | None = None) -> None:
        super().__init__()
        self.rank, self.calls = rank, 0

    def forward(self, z: Tensor) -> Tensor:
        self.calls += 1
        if self.rank == RANK and self.calls > 1:  # the first is the trial
            raise RuntimeError("the decoder is broken")
        return z


class Clock:
    """A time that has run out after so many looks; on one rank alone, which must be rank 0 for it
    to count.
    """

    def __init__(self, looks: int, rank: int = 0) -> None:
        self.left = looks if rank == RANK else 1_000_000

    def monotonic(self) -> float:
        self.left -= 1
        return 0.0 if self.left >= 0 else float("inf")


def timed(name: str, clock: Clock) -> dict[str, Any]:
    real, rounds.time = rounds.time, clock  # pyright: ignore
    try:
        return run(name, previews(max_seconds=1000.0), module=units())
    finally:
        rounds.time = real


def with_own(
    name: str, make: Any, rank: int, calls: int, *callbacks: Any, **settings: Any
) -> dict[str, Any]:
    module = units()
    return run(
        name, *callbacks, previews(predict=make(module, rank, calls), **settings), module=module
    )


def terminated(name: str) -> dict[str, Any]:
    """SIGTERM on rank 1 alone, in the middle of the second preview; the checkpoint of that step,
    and what follows from it.
    """
    module = units()
    save = ModelCheckpoint(ROOT / name, filename="{step}", every_n_train_steps=2, save_top_k=-1)
    own = previews(predict=Terminated(module, 1, 6))
    seen = run(name, own, save, module=module, enable_checkpointing=True)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    save = ModelCheckpoint(
        ROOT / name / "again", filename="{step}", every_n_train_steps=2, save_top_k=-1
    )
    path = ROOT / name / "step=4.ckpt"
    again = run(name, previews(), save, module=units(), enable_checkpointing=True, ckpt_path=path)
    return seen | {"again": again}


def severed(name: str) -> dict[str, Any]:
    """An error inside a sharded forward, on one rank."""
    return with_own(name, Own, 1, 3, exit_after_error=1.0)


EVERYWHERE: dict[str, Any] = {
    "units_none": lambda name: run(name, module=units()),
    "units_raw": lambda name: run(name, previews(extra_steps=(0,)), module=units()),
    "units_both": lambda name: run(name, Averages(), previews(weights="both"), module=units()),
    "units_lost": lambda name: run(
        name, Averages(RANK == 1), previews(weights="ema"), module=units()
    ),
    "units_decoder": lambda name: run(name, previews(decode=Decoder(1)), module=units()),
    "units_nan": lambda name: with_own(name, NotANumber, 1, 3),
    "units_late": lambda name: timed(name, Clock(4)),
    "units_other_clock": lambda name: timed(name, Clock(4, rank=1)),
    "units_still": lambda name: run(name, previews(), module=units(learning_rate=0.0)),
    "units_terminated": terminated,
}
SHARDED = {**EVERYWHERE, "units_severed": severed}
DDP: dict[str, Any] = {
    "none": lambda name: run(name),
    "previews": lambda name: run(name, previews()),
    "failing": lambda name: run(name, previews(predict=Failing(1))),
    "failing_zero": lambda name: run(name, previews(predict=Failing(0))),
    "nan": lambda name: run(name, previews(predict=Failing(1, nan=True))),
    "raise": lambda name: run(name, previews(predict=Failing(1), on_error="raise")),
    "logger": lambda name: run(name, previews(), logger=Broken()),
    "logger_raise": lambda name: run(name, previews(on_error="raise"), logger=Broken()),
    "buckets": lambda name: run(
        name, previews(on_error="raise"), module=fresh(Buckets, sample_shape=None)
    ),
    "still": lambda name: run(name, previews(), module=fresh(learning_rate=0.0)),
    "rehearsal": lambda name: run(name, previews(on_error="raise"), fast_dev_run=True),
    "unwritable": lambda name: run(name, previews(folder=ROOT / "file" / "previews")),
    "saved": lambda name: run(
        name, _keep(name), ScheduleCheckpoint(), previews(), enable_checkpointing=True
    ),
    "refused": lambda name: run(
        name,
        _keep("saved"),
        ScheduleCheckpoint(),
        module=fresh(schedule=NoiseSchedule.flow()),
        enable_checkpointing=True,
    ),
    "memory": lambda name: with_own(name, Memory, 1, 0, batch_size=4),
    "memory_all": lambda name: with_own(name, Memory, -1, 0, batch_size=4),
    "enough": lambda name: run(name, previews(batch_size=4), module=units()),
    "last": lambda name: run(name, previews()),
}
SUITES = {
    "ddp": {**DDP, **EVERYWHERE},
    "nodes": EVERYWHERE,
    "fsdp1": SHARDED,
    "fsdp2": SHARDED,
    "tp": {"units_still": EVERYWHERE["units_still"]},
}


def _keep(name: str) -> ModelCheckpoint:
    return ModelCheckpoint(ROOT / name, filename="{step}", save_top_k=-1)


if __name__ == "__main__":
    report = {name: scenario(name) for name, scenario in SUITES[SUITE].items()}
    (ROOT / f"rank{RANK}.json").write_text(json.dumps(report))
    sys.stdout.flush()
    if "units_severed" in report:
        if RANK == 1:
            # stays alive, as in a notebook, and must be ended for the other's sake
            time.sleep(TIMEOUT)
    elif dist.is_initialized():
        dist.destroy_process_group()
    # gloo's threads of a run that was made to fail can abort the interpreter's own exit
    os._exit(0)
