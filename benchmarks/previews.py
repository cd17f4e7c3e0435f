"""The time of one preview on one rank and on two, and whether the images are the same to the last
bit.

    python benchmarks/previews.py                 # one minute on two idle cores; prints the table, writes previews.md

Two processes on the CPU (gloo, DDP, one thread each) draw what one process draws alone, with a
network that is heavy enough to hide what the ranks say to each other. The time is that of the whole
preview on rank 0, apart from writing files: the least of several. Beside it the CPU time, which
tells how the work is split also where other programs keep the cores busy. The bar is a ratio of 0.6
of the wall-clock times.
"""

from __future__ import annotations

import argparse
import os
import socket
import subprocess
import sys
import tempfile
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer, seed_everything
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from alphabar.callbacks import ValidationSampling
from alphabar.noising import NoiseSchedule, Noising
from alphabar.training.publishing import publisher

BAR = 0.6
SHAPE = (3, 32, 32)
IMAGES: list[Tensor] = []


class Convolutions(LightningModule):
    """Nothing worth training, but as costly as a small U-Net."""

    def __init__(self, width: int, sleep: float = 0.0) -> None:
        super().__init__()
        self.sleep = sleep
        self.noising = Noising(NoiseSchedule.scaled_linear(), seed=0)
        self.sample_shape = SHAPE
        widths = [3, *[width] * 5, 3]
        layers = [nn.Conv2d(a, b, 3, padding=1) for a, b in pairwise(widths)]
        self.net = nn.Sequential(*[part for layer in layers for part in (layer, nn.SiLU())][:-1])

    def predict(self, x: Tensor, timesteps: Tensor) -> Tensor:
        if not self.sleep:
            return self.net(x)
        time.sleep(self.sleep / 1000 * len(x))
        return 0.1 * x

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        noised = self.noising(batch[0], step=self.trainer.global_step)
        return noised.loss(self.net(noised.x))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.0)  # the same weights at every preview


class Timed(ValidationSampling):
    """Notes (seconds, CPU seconds) of every preview."""

    def __init__(self, *arguments: Any, **settings: Any) -> None:
        super().__init__(*arguments, **settings)
        self.times: list[tuple[float, float]] = []

    def _preview(self, trainer: Trainer, module: LightningModule) -> None:
        start, cpu = time.perf_counter(), time.process_time()
        super()._preview(trainer, module)
        self.times.append((time.perf_counter() - start, time.process_time() - cpu))


def rank_main(arguments: argparse.Namespace) -> None:
    """One rank: train without learning, draw a preview after every step, and (on rank 0) write
    times and pixels.
    """
    torch.set_num_threads(1)
    seed_everything(0, verbose=False)
    publisher.publish = lambda preview, *_: IMAGES.append(preview.images) or []
    previews = Timed(
        "euler",
        arguments.steps,
        num_images=arguments.images,
        every_n_train_steps=1,
        batch_size=4,
        on_error="raise",
    )
    quiet: Any = {
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "logger": False,
        "enable_checkpointing": False,
    }
    strategy = DDPStrategy(process_group_backend="gloo") if arguments.world == 2 else "auto"
    data = DataLoader(TensorDataset(torch.zeros(64, *SHAPE)), batch_size=1)
    trainer = Trainer(
        max_steps=arguments.repeats,
        accelerator="cpu",
        devices=arguments.world,
        strategy=strategy,
        callbacks=[previews],
        default_root_dir=arguments.folder,
        **quiet,
    )
    trainer.fit(Convolutions(arguments.width, arguments.sleep), data)
    if IMAGES:
        torch.save(
            {"times": torch.tensor(previews.times), "images": IMAGES[-1]},
            arguments.folder / "seen.pt",
        )
    sys.stdout.flush()
    os._exit(0)


def measured(world: int, arguments: argparse.Namespace) -> dict[str, Any]:
    """Run ``world`` processes and return what rank 0 saw."""
    with tempfile.TemporaryDirectory() as folder, socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
        free.close()
        common = {
            **os.environ,
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "NODE_RANK": "0",
        }
        settings = [
            f"--{name}={getattr(arguments, name)}"
            for name in ("images", "steps", "repeats", "width", "sleep")
        ]
        command = [sys.executable, __file__, f"--world={world}", f"--folder={folder}", *settings]
        environments = [
            {**common, "LOCAL_RANK": str(rank), "OMP_NUM_THREADS": "1"} for rank in range(world)
        ]
        running = [
            subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL)
            for environment in environments
        ]
        codes = [process.wait() for process in running]
        if codes != [0] * world:
            raise SystemExit(f"the run with {world} processes ended with {codes}")
        return torch.load(Path(folder, "seen.pt"), weights_only=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--images", type=int, default=32)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument(
        "--repeats", type=int, default=4, help="previews, of which the quickest counts"
    )
    parser.add_argument("--width", type=int, default=224, help="channels of the network")
    parser.add_argument(
        "--sleep",
        type=float,
        default=0.0,
        help="milliseconds an image that the network sleeps, as if on a device, in place of a "
        "convolution on the cores",
    )
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".md"))
    parser.add_argument("--world", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.world is not None:
        rank_main(arguments)
        return
    one, two = measured(1, arguments), measured(2, arguments)
    same = torch.equal(one["images"], two["images"])
    least = [seen["times"].amin(0).tolist() for seen in (one, two)]
    median = [seen["times"][:, 0].median().item() for seen in (one, two)]
    rows = [
        f"| {n} | {least[n - 1][0]:.2f} | {median[n - 1]:.2f} | {least[n - 1][1]:.2f} |"
        for n in (1, 2)
    ]
    wall, cpu = (least[1][k] / least[0][k] for k in (0, 1))
    network = (
        f"a network that sleeps {arguments.sleep:g} ms an image"
        if arguments.sleep
        else "convolutions"
    )
    text = f"""# One preview on one rank and on two

{arguments.images} images of {SHAPE}, {arguments.steps} steps, {arguments.repeats} previews; {network}; CPU, gloo, DDP, one thread a
rank, {os.cpu_count()} cores with a load of {os.getloadavg()[0]:.1f}, torch {torch.__version__}. By `benchmarks/previews.py`.

| ranks | least seconds | median seconds | least CPU seconds of rank 0 |
|---|---|---|---|
{chr(10).join(rows)}

Ratio {wall:.2f} (the bar is {BAR}), of CPU time {cpu:.2f}; pixels {"identical" if same else "DIFFERENT"}.
"""
    print(text)
    arguments.out.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
