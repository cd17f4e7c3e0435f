"""A user's own LightningModule, as the callbacks meet it: dropout, a frozen part, shuffled data, losses on record."""

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer, seed_everything
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from alphabar.noising import NoiseSchedule, Noising

SHAPE = (3, 8, 8)
SCHEDULE = NoiseSchedule.scaled_linear(prediction="v_prediction").zero_terminal_snr()


@contextmanager
def one_thread() -> Iterator[None]:
    """Threads would cost more than they bring on images this small: a hundred times, on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


class Toy(LightningModule):
    """No DiffusionModule: the contract alone. Dropout makes losses depend on the global generator and on train flags."""

    def __init__(
        self,
        schedule: NoiseSchedule = SCHEDULE,
        sample_shape: tuple[int, ...] | None = SHAPE,
        dropout: float = 0.3,
        learning_rate: float = 0.05,
    ) -> None:
        super().__init__()
        self.noising = Noising(schedule, seed=3)
        self.sample_shape = sample_shape
        self.learning_rate = learning_rate
        self.first, self.last = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 3, 3, padding=1)
        self.dropout = nn.Dropout(dropout)
        self.frozen = nn.Sequential(nn.Dropout(0.5), nn.BatchNorm2d(8)).eval()  # part of the model, never to be trained
        self.losses: list[float] = []

    def predict(self, x: Tensor, timesteps: Tensor, **conditioning: Any) -> Tensor:
        time = torch.sin(timesteps.to(x.dtype) / 200).view(-1, 1, 1, 1)
        h = self.frozen(self.dropout(torch.tanh(self.first(x) + time)))
        h = self.last(h)
        label = conditioning.get("label")
        return h if label is None else h + label.view(-1, 1, 1, 1).to(h.dtype)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        (x0,) = batch
        noised = self.noising(x0, step=self.trainer.global_step)
        loss = noised.loss(self.predict(noised.x, noised.timesteps))
        self.losses.append(loss.item())
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.training_step(batch, batch_idx)

    test_step = predict_step = validation_step

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=self.learning_rate, momentum=0.9)


def loader(samples: int = 24, shuffle: bool = True, batch_size: int = 4) -> DataLoader[Any]:
    data = torch.randn(samples, *SHAPE, generator=torch.Generator().manual_seed(1))
    return DataLoader(TensorDataset(data), batch_size=batch_size, shuffle=shuffle)


def trainer(root: Path, *callbacks: Any, **settings: Any) -> Trainer:
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "logger": False, "accelerator": "cpu"}
    short = {"max_epochs": 2, "enable_checkpointing": False, "devices": 1}
    return Trainer(default_root_dir=root, callbacks=list(callbacks), **{**quiet, **short, **settings})


def fresh(kind: type[Toy] = Toy, **arguments: Any) -> Toy:
    """A module with the same first weights every time."""
    seed_everything(0, verbose=False)
    return kind(**arguments)


def train(root: Path, *callbacks: Any, module: Toy | None = None, data: Any = None, **settings: Any) -> Toy:
    """Train from a fixed seed: six steps an epoch, two epochs; ``settings`` go to the Trainer, ``ckpt_path`` to fit."""
    module = module if module is not None else fresh()
    seed_everything(1, verbose=False)
    path = settings.pop("ckpt_path", None)
    trainer(root, *callbacks, **settings).fit(module, data if data is not None else loader(), ckpt_path=path)
    return module


def weights(module: nn.Module) -> str:
    """A hash of every parameter's and buffer's bits."""
    parts = [
        t.detach().contiguous().view(torch.uint8).numpy().tobytes() for t in module.state_dict().values() if t.ndim
    ]
    return hashlib.sha256(b"".join(parts)).hexdigest()


def files(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
