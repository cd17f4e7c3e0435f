"""One of two processes (gloo) that train with averages and losses by SNR; run by
test_ema_two_ranks.py. Writes JSON.
"""

import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers.logger import DummyLogger
from lightning.pytorch.strategies import DDPStrategy, FSDPStrategy, ModelParallelStrategy
from torch import Tensor, nn
from torch.distributed.fsdp import (
    FullStateDictConfig,
    FullyShardedDataParallel,
    StateDictType,
    fully_shard,
)
from torch.distributed.fsdp.wrap import ModuleWrapPolicy

from alphabar.callbacks import EMA, LossBySNR, ema_weights
from alphabar.callbacks.support.strategies import root_of
from alphabar.training import Constant, PowerFunction
from alphabar.training.loops.sharding import clean_name, local, reshard
from callbacks_toy import SCHEDULE, Toy, fresh, loader, train

ROOT = Path(sys.argv[1])
RANK = int(os.environ["LOCAL_RANK"])
PROFILES = [Constant(decay=0.7), PowerFunction(sigma_rel=0.2)]
torch.set_num_threads(1)


class OnCPU(FSDPStrategy):
    """Lightning wants a GPU for FSDPStrategy itself, and not for a subclass."""

    def _setup_model(self, model: nn.Module) -> nn.Module:
        kind: Any = {
            "cpu_offload": self.cpu_offload,
            "mixed_precision": self.mixed_precision_config,
        }
        return FullyShardedDataParallel(model, device_id=torch.device("cpu"), **kind, **self.kwargs)

    def lightning_module_state_dict(self) -> dict[str, Any]:
        if self._state_dict_type == "sharded":
            return super().lightning_module_state_dict()
        # offloading, Lightning's setting, reads freed memory where the CPU is also what computes
        config = FullStateDictConfig(offload_to_cpu=False, rank0_only=True)
        with FullyShardedDataParallel.state_dict_type(
            self.model, StateDictType.FULL_STATE_DICT, config
        ):
            model: Any = self.model
            return model.state_dict()

    @contextmanager
    def model_sharded_context(self) -> Iterator[None]:
        yield


class Blocks(Toy):
    """Odd sizes, so that shards are uneven, and a unit inside the outermost one."""

    def __init__(self, sharded: bool = False) -> None:
        super().__init__(SCHEDULE, dropout=0.0)
        del self.first, self.last, self.frozen
        self.sharded = sharded
        self.embed, self.block = (
            nn.Linear(192, 7),
            nn.Sequential(nn.Linear(7, 11), nn.Tanh(), nn.Linear(11, 7)),
        )
        self.out = nn.Linear(7, 192)
        self.register_buffer("scale", torch.ones(3))

    def configure_model(self) -> None:
        if self.sharded and not hasattr(self.block, "reshard"):
            meshes: Any = self.device_mesh
            fully_shard(self.block, mesh=meshes["data_parallel"])
            fully_shard(self, mesh=meshes["data_parallel"])

    def forward(self, x: Tensor, timesteps: Tensor) -> Tensor:
        h = self.embed(x.flatten(1)) + timesteps.to(x.dtype).view(-1, 1) / 1000
        return self.out(self.block(h)).view_as(x)

    def predict(self, x: Tensor, timesteps: Tensor, **conditioning: Any) -> Tensor:
        return self(x, timesteps)


class Spy(Callback):
    """Keep the average by its definition, of this rank's parts, and draw with it."""

    def __init__(self, draw: bool) -> None:
        self.draw, self.average, self.seen = draw, {}, 0
        self.worst = 0.0

    def on_train_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        reshard(root_of(trainer, pl_module))
        parts = {name: local(p).double().clone() for name, p in pl_module.named_parameters()}
        self.average = {
            name: torch.lerp(self.average.get(name, p), p, 0.3) for name, p in parts.items()
        }
        if not self.draw:
            return
        x, t = torch.ones(2, 3, 8, 8, dtype=pl_module.dtype), torch.tensor([5, 900])
        with torch.no_grad():
            call = (
                trainer.strategy.model if isinstance(trainer.strategy, FSDPStrategy) else pl_module
            )
            raw = self.forward(trainer, call, x, t)
            with ema_weights(trainer, pl_module) as used:
                assert used
                self.seen += 1
                for name, p in pl_module.named_parameters():
                    error = (local(p).double() - self.average[name]).abs()
                    self.worst = max(self.worst, float(error.max()) if error.numel() else 0.0)
                smooth = self.forward(trainer, call, x, t)
            assert trainer.global_step == 1 or not torch.equal(raw, smooth)
            assert torch.equal(raw, self.forward(trainer, call, x, t))
        reshard(root_of(trainer, pl_module))

    def forward(self, trainer: Any, call: Any, x: Tensor, t: Tensor) -> Any:
        if isinstance(trainer.strategy, FSDPStrategy):
            strategy = trainer.strategy
            return strategy._forward_redirection(call, trainer.lightning_module, "predict", x, t)
        return call(x, t)


class Log(DummyLogger):
    """Keeps what rank 0 logs."""

    def __init__(self) -> None:
        super().__init__()
        self.metrics: dict[int, Any] = {}

    def log_metrics(self, metrics: Any, step: Any = None, **rest: Any) -> None:
        if RANK == 0 and any(name.startswith("loss_by_snr") for name in metrics):
            self.metrics[step] = dict(metrics)


class Own(Callback):
    """Keep this rank's errors of the last two steps."""

    def __init__(self) -> None:
        self.seen: list[Any] = []

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        pl_module.noising.register_loss_hook(
            lambda noised, errors: self.seen.append((noised.log_snr, errors, noised.weight))
        )

    def sums(self, buckets: Any) -> Any:
        sums = buckets.zeros(torch.device("cpu"))
        for log_snr, errors, weight in self.seen[-2:]:
            buckets.add(sums, log_snr, errors, weight)
        return sums.tolist()


def strategy(kind: str) -> Any:
    if kind == "ddp":
        return DDPStrategy(process_group_backend="gloo")
    if kind.startswith("fsdp1"):
        state: Any = "sharded" if kind.endswith("sharded") else "full"
        policy = ModuleWrapPolicy({nn.Sequential})
        return OnCPU(auto_wrap_policy=policy, state_dict_type=state, process_group_backend="gloo")
    return ModelParallelStrategy(
        2, 1, save_distributed_checkpoint=kind.endswith("sharded"), process_group_backend="gloo"
    )


def run(kind: str, *callbacks: Any, precision: str = "32-true", **settings: Any) -> Toy:
    module = fresh(Blocks, sharded=kind.startswith("fsdp2"))
    data = loader(8, shuffle=False)
    common: Any = {
        "strategy": strategy(kind),
        "devices": 2,
        "max_epochs": 4,
        "data": data,
        "precision": precision,
    }
    return train(ROOT / kind, *callbacks, module=module, **common, **settings)


def scenario(kind: str, precision: str) -> dict[str, Any]:
    name = f"{kind}_{precision}"
    plain = run(kind, precision=precision)
    ema, spy = (
        EMA(PROFILES, snapshot_every_n_steps=2, folder=ROOT / name / "snapshots"),
        Spy(draw=True),
    )
    keep = ModelCheckpoint(
        ROOT / name, filename="{step}", auto_insert_metric_name=False, save_top_k=-1
    )
    log, own, by_snr = Log(), Own(), LossBySNR(2, buckets=4)
    averaged = run(
        kind,
        spy,
        ema,
        own,
        by_snr,
        keep,
        precision=precision,
        enable_checkpointing=True,
        logger=log,
    )
    again = EMA(PROFILES)
    resumed = run(
        kind,
        again,
        precision=precision,
        enable_checkpointing=True,
        ckpt_path=str(ROOT / name / "2.ckpt"),
    )
    pairs = list(zip(ema._averages.each, again._averages.each, strict=True))
    return {
        "losses": [plain.losses, averaged.losses, resumed.losses],
        "metrics": log.metrics,
        "own": own.sums(by_snr._buckets),
        "drawn": sum(by_snr._drawn),
        "seen": spy.seen,
        "worst": spy.worst,
        "error": max(
            [
                float((ema._averages.each[0].weights[clean_name(n)].double() - p).abs().max())
                for n, p in spy.average.items()
                if p.numel()
            ]
        ),
        "dtypes": sorted(
            {str(p.dtype) for average in ema._averages.each for p in average.weights.values()}
        ),
        "numel": sum(p.numel() for p in ema._averages.each[0].weights.values()),
        "resumed": all(
            one.updates == two.updates
            and one.weights.keys() == two.weights.keys()
            and all(torch.equal(p, two.weights[n]) for n, p in one.weights.items())
            for one, two in pairs
        ),
    }


if __name__ == "__main__":
    report = {}
    for word in sys.argv[2:]:
        kind, precision = word.split(":")
        report[f"{kind}_{precision}"] = scenario(kind, precision)
    (ROOT / f"rank{RANK}.json").write_text(json.dumps(report))
    if dist.is_initialized():
        dist.destroy_process_group()
    sys.stdout.flush()
    os._exit(0)
