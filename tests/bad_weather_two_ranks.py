"""One of two processes (gloo) whose process group waits for a few seconds; run by
test_bad_weather.py. Writes JSON.

python bad_weather_two_ranks.py FOLDER
"""

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch.loggers.logger import DummyLogger
from torch import Tensor

from alphabar.callbacks import EMA, ValidationSampling
from alphabar.callbacks import ema as ema_module
from alphabar.training import PowerFunction
from callbacks_toy import fresh, strategy, train

RANK = int(os.environ["LOCAL_RANK"])
ROOT = Path(sys.argv[1])
TIMEOUT, LONG = 10, 14.0
torch.set_num_threads(1)


class Logger(DummyLogger):
    def __init__(self, seconds: float = 0.0) -> None:
        super().__init__()
        self.seconds, self.steps = seconds, list[int]()

    def log_image(self, key: str, images: list[Any], step: int) -> None:
        time.sleep(self.seconds)
        self.seconds = 0.0
        self.steps.append(step)


class Late:
    """Takes long, once, on one rank."""

    def __init__(self, rank: int, call: int) -> None:
        self.rank, self.left = rank, call

    def wait(self) -> None:
        self.left -= 1
        if self.rank == RANK and self.left == 0:
            time.sleep(LONG)

    def encode(self, texts: list[str]) -> dict[str, Any]:
        self.wait()
        return {"label": torch.zeros(len(texts))}

    def decode(self, z: Tensor) -> Tensor:
        self.wait()
        return z


def run(name: str, *callbacks: Any, seconds: float = 0.0, **settings: Any) -> dict[str, Any]:
    module, logger, start = fresh(), Logger(seconds), time.monotonic()
    common: Any = {"steps": 2, "num_images": 2, "batch_size": 1, "every_n_train_steps": 2}
    own = [ValidationSampling("euler", **common, **settings)] if name != "none" else []
    error = None
    try:
        train(
            ROOT / name,
            *own,
            *callbacks,
            module=module,
            logger=logger,
            devices=2,
            strategy=strategy("ddp", TIMEOUT),
        )
    except Exception as raised:
        error = f"{type(raised).__name__}: {raised}"
    return {
        "error": error,
        "losses": module.losses,
        "shown": logger.steps,
        "seconds": time.monotonic() - start,
    }


def meet() -> None:
    """Wait until both have imported everything: the timeout limits how far apart they may come to
    their first meeting.
    """
    (ROOT / f"ready{RANK}").touch()
    while not (ROOT / f"ready{1 - RANK}").exists():
        time.sleep(0.05)


def slow_disk() -> dict[str, Any]:
    save = ema_module.save_snapshot

    def slow(*given: Any, **named: Any) -> Any:
        time.sleep(LONG)
        return save(*given, **named)

    ema_module.save_snapshot = slow
    return run(
        "disk", EMA(PowerFunction(sigma_rel=0.1), snapshot_every_n_steps=3, folder=ROOT / "ema")
    )


if __name__ == "__main__":
    meet()
    report: dict[str, Any] = {
        "timeout": TIMEOUT,
        "none": run("none"),
        "logger": run("logger", seconds=LONG),
        "raising": run("raising", seconds=LONG, on_error="raise"),
        "encode": run("encode", prompts=["a"], encode=Late(1, 1).encode),
        "decode": run("decode", decode=Late(0, 2).decode),
        "disk": slow_disk(),
    }
    (ROOT / f"rank{RANK}.json").write_text(json.dumps(report))
    sys.stdout.flush()
    if dist.is_initialized():
        dist.destroy_process_group()
    os._exit(0)
