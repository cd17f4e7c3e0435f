"""A training loop without a Trainer, for every kind of loop: plain torch, accelerate, Fabric."""

import hashlib
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.fsdp.wrap import ModuleWrapPolicy

from alphabar.noising import NoiseSchedule, Noising
from alphabar.sampling import Sampler, fit_table
from alphabar.training import ModelEMA, Previews
from alphabar.training.fitting import tables

SHAPE = (3, 8, 8)
SCHEDULE = NoiseSchedule.scaled_linear(prediction="v_prediction").zero_terminal_snr()
STEPS = 6


class First(nn.Conv2d):
    """What FSDP splits off as a unit of its own."""


class Net(nn.Module):
    """Dropout makes losses depend on the global generator and on train flags; parts are frozen in
    eval mode; the same first weights every time.
    """

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.first, self.last = First(3, 8, 3, padding=1), nn.Conv2d(8, 3, 3, padding=1)
        self.norm, self.dropout = nn.BatchNorm2d(8).eval(), nn.Dropout(0.3)
        self.frozen = nn.Dropout(0.5).eval()
        self.dtypes: set[torch.dtype] = set()

    def forward(self, x: Tensor, timesteps: Tensor) -> Tensor:
        time = torch.sin(timesteps / 200).view(-1, 1, 1, 1).to(x.dtype)
        h = self.first(x)
        self.dtypes.add(h.dtype)
        return self.last(self.frozen(self.dropout(self.norm(torch.tanh(h + time)))))


def prepared(loop: Any, net: nn.Module, optimizer: Any) -> tuple[Any, Any, Callable[[Tensor], Any]]:
    """The network as a loop wraps it, the optimizer, and the call for the backward pass."""
    if loop in ("fsdp1", "fsdp2"):
        return sharded(loop, net), optimizer, lambda loss: loss.backward()
    if loop is None:
        if torch.distributed.is_initialized():
            net = nn.parallel.DistributedDataParallel(net)
        return net, optimizer, lambda loss: loss.backward()
    wrap = loop.setup if hasattr(loop, "setup") else loop.prepare
    return *wrap(net, optimizer), loop.backward


def sharded(kind: str, net: Any) -> Any:
    """In two units, of which the outer has weights of its own."""
    if kind == "fsdp1":
        device = torch.device("cpu")
        return FullyShardedDataParallel(
            net, device_id=device, use_orig_params=True, auto_wrap_policy=ModuleWrapPolicy({First})
        )
    fully_shard(net.first)
    return fully_shard(net)


def train(
    net: nn.Module,
    loop: Any = None,
    rank: int = 0,
    draw: Callable[[Any, int, ModelEMA], object] | None = None,
    rate: float = 0.05,
) -> list[float]:
    """Train for six steps, and call ``draw(network, step, ema)`` before the first and after each."""
    if loop in ("fsdp1", "fsdp2"):  # the optimizer updates shards
        network, _, backward = prepared(loop, net, None)
        optimizer: Any = torch.optim.SGD(network.parameters(), lr=rate, momentum=0.9)
    else:
        optimizer = torch.optim.SGD(net.parameters(), lr=rate, momentum=0.9)
        network, optimizer, backward = prepared(loop, net, optimizer)
    noising, ema = Noising(SCHEDULE, seed=3), ModelEMA(network, 0.5)
    data = torch.randn(STEPS, 2, 4, *SHAPE, generator=torch.Generator().manual_seed(1))
    torch.manual_seed(rank)
    losses = []
    if draw is not None:
        draw(network, 0, ema)
    for step in range(1, STEPS + 1):
        noised = noising(data[step - 1, rank], step=step)
        loss = noised.loss(network(noised.x, noised.timesteps))
        backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        ema.update(step)
        losses.append(loss.item())
        if draw is not None:
            draw(network, step, ema)
    return losses


def previews(folder: Path, loop: Any = None, **settings: Any) -> Previews:
    common: dict[str, Any] = {"steps": 2, "num_images": 3, "batch_size": 2, "loop": loop}
    common |= {"schedule": SCHEDULE, "shape": SHAPE, "folder": folder}
    return Previews(**{"sampler": "euler_ancestral", **common, **settings})


def uneven(x: Tensor, timesteps: Tensor, label: Tensor) -> Tensor:
    """A network for which some labels need more steps of an adaptive sampler than others."""
    return torch.tanh(x * (1 + 9 * label.view(-1, 1, 1, 1)))


ADAPTIVE: dict[str, Any] = {
    "sampler": "DPM adaptive",
    "steps": None,
    "classes": (0, 3),
    "class_key": "label",
    "predict": uneven,
    "num_images": 5,
    "batch_size": 1,
    # at a zero terminal SNR the sampler would begin at an infinite noise level
    "schedule": NoiseSchedule.scaled_linear(),
}
"""Settings with which two ranks make different numbers of steps."""


FITTED: dict[str, Any] = {"sampler": "fitted", "steps": 3, "num_images": 5}
"""Settings that fit a table at the first preview."""


def fit_little() -> None:
    """Make fits short: few seeds, few choices of knots, a teacher of few steps."""
    teacher = Sampler(SCHEDULE, "dpmpp_2m", 12)
    tables.FIT_SEEDS, tables.HELD_OUT_SEEDS = 4, 4
    tables.fit_table = partial(fit_table, searches=2, teacher=teacher)


def weights(net: nn.Module) -> str:
    """A hash of every parameter's and buffer's bits."""
    parts = [t.detach().contiguous().numpy().tobytes() for t in net.state_dict().values()]
    return hashlib.sha256(b"".join(parts)).hexdigest()
