"""One of two processes (gloo) that train together; run by test_callbacks_two_ranks.py. Writes what it saw as JSON."""

import json
import os
import sys
import time
import warnings
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers.logger import DummyLogger
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor

from alphabar.callbacks import ScheduleCheckpoint, ValidationSampling
from alphabar.noising import NoiseSchedule
from callbacks_toy import SHAPE, Toy, fresh, train, weights

RANK = int(os.environ["LOCAL_RANK"])
ROOT = Path(sys.argv[1])
TIMEOUT = 60  # of a collective: what waits this long hangs
torch.set_num_threads(1)


def run(name: str, *callbacks: Any, **settings: Any) -> dict[str, Any]:
    """Train on both ranks, and return what this one saw."""
    module = settings.pop("module", None) or fresh()
    strategy = DDPStrategy(process_group_backend="gloo", timeout=timedelta(seconds=TIMEOUT))
    seen: dict[str, Any] = {"error": None}
    start = time.monotonic()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            train(ROOT / name, *callbacks, module=module, strategy=strategy, **{"devices": 2, **settings})
        except Exception as error:
            seen["error"] = f"{type(error).__name__}: {error}"
    seen |= {"losses": module.losses, "weights": weights(module), "seconds": time.monotonic() - start}
    seen["warnings"] = [str(w.message) for w in caught if "preview at step" in str(w.message)]
    return seen


def previews(**settings: Any) -> ValidationSampling:
    common: dict[str, Any] = {"steps": 2, "every_n_train_steps": 2, "num_images": 5, "batch_size": 2}
    return ValidationSampling("euler_ancestral", **{**common, **settings})


class Failing:
    """Fails on one rank alone, in the middle of its second preview, having drawn from the global generator."""

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


SCENARIOS: dict[str, Any] = {
    "none": lambda name: run(name),
    "previews": lambda name: run(name, previews()),
    "failing": lambda name: run(name, previews(predict=Failing(1))),
    "failing_zero": lambda name: run(name, previews(predict=Failing(0))),
    "nan": lambda name: run(name, previews(predict=Failing(1, nan=True))),
    "raise": lambda name: run(name, previews(predict=Failing(1), on_error="raise")),
    "logger": lambda name: run(name, previews(), logger=Broken()),
    "logger_raise": lambda name: run(name, previews(on_error="raise"), logger=Broken()),
    "buckets": lambda name: run(name, previews(on_error="raise"), module=fresh(Buckets, sample_shape=None)),
    "still": lambda name: run(name, previews(), module=fresh(learning_rate=0.0)),
    "rehearsal": lambda name: run(name, previews(on_error="raise"), fast_dev_run=True),
    "unwritable": lambda name: run(name, previews(folder=ROOT / "file" / "previews")),
    "saved": lambda name: run(name, _keep(name), ScheduleCheckpoint(), previews(), enable_checkpointing=True),
    "refused": lambda name: run(
        name,
        _keep("saved"),
        ScheduleCheckpoint(),
        module=fresh(schedule=NoiseSchedule.flow()),
        enable_checkpointing=True,
    ),
    "last": lambda name: run(name, previews()),
}


def _keep(name: str) -> ModelCheckpoint:
    return ModelCheckpoint(ROOT / name, filename="{step}", save_top_k=-1)


if __name__ == "__main__":
    report = {name: scenario(name) for name, scenario in SCENARIOS.items()}
    assert SHAPE == (3, 8, 8)
    (ROOT / f"rank{RANK}.json").write_text(json.dumps(report))
    if dist.is_initialized():
        dist.destroy_process_group()
    sys.stdout.flush()
    os._exit(
        0
    )  # the scenarios are over; gloo's threads of a run that was made to fail can abort the interpreter's own exit
