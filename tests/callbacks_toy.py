"""A user's own LightningModule, as the callbacks meet it: dropout, a frozen part, shuffled data,
losses on record.
"""

import hashlib
import re
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from lightning.pytorch.strategies import DDPStrategy, FSDPStrategy, ModelParallelStrategy
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.utils.data import DataLoader, TensorDataset

from alphabar.callbacks.support.strategies import root_of
from alphabar.noising import NoiseSchedule, Noising
from alphabar.training.loops.sharding import local, reshard

SHAPE = (3, 8, 8)
SCHEDULE = NoiseSchedule.scaled_linear(prediction="v_prediction").zero_terminal_snr()


@contextmanager
def one_thread() -> Iterator[None]:
    """Threads would cost more than they bring on images this small: a hundred times, on a busy
    machine.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


class Toy(LightningModule):
    """No DiffusionModule: the contract alone. Dropout makes losses depend on the global generator
    and on train flags.
    """

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
        # part of the model, never to be trained
        self.frozen = nn.Sequential(nn.Dropout(0.5), nn.BatchNorm2d(8)).eval()
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


class Inner(nn.Conv2d):
    """What FSDP splits off as a unit of its own."""


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = Inner(3, 8, 3, padding=1), nn.Conv2d(8, 3, 3, padding=1)
        self.dropout = nn.Dropout(0.3)

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        return self.last(self.dropout(torch.tanh(self.first(x) + time)))


class Units(Toy):
    """A network in two units under FSDP, of which the outer has weights of its own."""

    def __init__(self, **arguments: Any) -> None:
        super().__init__(**arguments)
        del self.first, self.last, self.frozen, self.dropout
        self.net = Net()

    def configure_model(self) -> None:
        if (
            isinstance(self.trainer.strategy, ModelParallelStrategy)
            and self.device_mesh is not None
        ):
            mesh = self.device_mesh["data_parallel"]
            if mesh.size() > 1:
                fully_shard(self.net.first, mesh=mesh)
                fully_shard(self.net, mesh=mesh)

    def predict(self, x: Tensor, timesteps: Tensor, **conditioning: Any) -> Tensor:
        return self.net(x, torch.sin(timesteps.to(x.dtype) / 200).view(-1, 1, 1, 1))


class FSDP1OnCPU(FSDPStrategy):
    """Lightning refuses FSDPStrategy itself without a GPU, and names no device for a CPU."""

    def model_sharded_context(self) -> Any:
        return nullcontext()

    def _setup_model(self, model: nn.Module) -> nn.Module:
        return FullyShardedDataParallel(model, device_id=torch.device("cpu"), **self.kwargs)


def strategy(kind: str, timeout: int) -> Any:
    """A strategy for two processes (gloo): 'ddp', 'fsdp1', 'fsdp2', or 'tp', two ranks of one
    tensor-parallel group.
    """
    settings: Any = {"process_group_backend": "gloo", "timeout": timedelta(seconds=timeout)}
    if kind == "fsdp1":
        # a full one crashes torch here
        return FSDP1OnCPU(auto_wrap_policy={Inner}, state_dict_type="sharded", **settings)
    if kind in ("fsdp2", "tp"):
        sizes = {
            "data_parallel_size": 2 if kind == "fsdp2" else 1,
            "tensor_parallel_size": 1 if kind == "fsdp2" else 2,
        }
        return ModelParallelStrategy(save_distributed_checkpoint=False, **sizes, **settings)
    return DDPStrategy(**settings)


class Averages(Callback):
    """The mean of a rank's part of the weights now and before, and so on; may fail on one rank when
    it is asked for.
    """

    def __init__(self, fails: bool = False) -> None:
        self.averages: list[Tensor] = []
        self.fails = fails

    def on_train_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        reshard(root_of(trainer, pl_module))
        now = [local(weight).clone() for weight in pl_module.parameters()]
        self.averages = [(a + b) / 2 for a, b in zip(self.averages or now, now, strict=True)]

    def ema_pairs(self, trainer: Any, module: Any) -> Any:
        if self.fails and self.averages:
            raise RuntimeError("the averages are lost")
        return list(zip(module.parameters(), self.averages, strict=True)) if self.averages else []


class Held(Callback):
    """How many numbers this rank holds of the weights, after other callbacks."""

    def __init__(self) -> None:
        self.numbers: list[int] = []

    def on_train_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.numbers.append(sum(local(weight).numel() for weight in pl_module.parameters()))


def loader(samples: int = 24, shuffle: bool = True, batch_size: int = 4) -> DataLoader[Any]:
    data = torch.randn(samples, *SHAPE, generator=torch.Generator().manual_seed(1))
    return DataLoader(TensorDataset(data), batch_size=batch_size, shuffle=shuffle)


def trainer(root: Path, *callbacks: Any, **settings: Any) -> Trainer:
    quiet = {
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "logger": False,
        "accelerator": "cpu",
    }
    short = {"max_epochs": 2, "enable_checkpointing": False, "devices": 1}
    return Trainer(
        default_root_dir=root, callbacks=list(callbacks), **{**quiet, **short, **settings}
    )


def fresh(kind: type[Toy] = Toy, **arguments: Any) -> Toy:
    """A module with the same first weights every time."""
    seed_everything(0, verbose=False)
    return kind(**arguments)


def train(
    root: Path, *callbacks: Any, module: Toy | None = None, data: Any = None, **settings: Any
) -> Toy:
    """Train from a fixed seed: six steps an epoch, two epochs; ``settings`` go to the Trainer,
    ``ckpt_path`` to fit.
    """
    module = module if module is not None else fresh()
    seed_everything(1, verbose=False)
    path = settings.pop("ckpt_path", None)
    trainer(root, *callbacks, **settings).fit(
        module, data if data is not None else loader(), ckpt_path=path
    )
    return module


def weights(module: nn.Module) -> str:
    """A hash of every parameter's and buffer's bits."""
    parts = [
        t.detach().contiguous().view(torch.uint8).numpy().tobytes()
        for t in module.state_dict().values()
        if t.ndim
    ]
    return hashlib.sha256(b"".join(parts)).hexdigest()


def files(folder: Path) -> list[str]:
    return sorted(
        path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()
    )


def grids(folder: Path) -> list[str]:
    """The pictures of whole previews among the files."""
    return [
        name
        for name in files(folder)
        if re.fullmatch(r"step_\d{8}(_ema)?\.png", name.split("/")[-1])
    ]
