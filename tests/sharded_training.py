"""One of two processes (gloo) that train a model that is sharded between them; run by
test_sharded_checkpoints.py.
"""

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import ModelParallelStrategy
from torch.distributed.fsdp import fully_shard

from alphabar.callbacks import ScheduleCheckpoint
from alphabar.noising import NoiseSchedule
from callbacks_toy import SCHEDULE, Toy, fresh, loader, train, trainer

RANK = int(os.environ["LOCAL_RANK"])
ROOT = Path(sys.argv[1])
torch.set_num_threads(1)


class Sharded(Toy):
    def configure_model(self) -> None:
        assert self.device_mesh is not None
        for part in (self.first, self.last):
            fully_shard(part, mesh=self.device_mesh["data_parallel"])


def run(
    name: str, schedule: NoiseSchedule = SCHEDULE, verb: str = "fit", **settings: Any
) -> str | None:
    module = fresh(Sharded, schedule=schedule)
    keep = ModelCheckpoint(ROOT / name, filename="{step}", save_top_k=1, monitor=None)
    common: dict[str, Any] = {
        "strategy": ModelParallelStrategy(2, 1, process_group_backend="gloo"),
        "devices": 2,
        "enable_checkpointing": True,
    }
    callbacks = ScheduleCheckpoint(per_checkpoint=True), keep
    try:
        if verb == "fit":
            train(ROOT / name, *callbacks, module=module, **common, **settings)
        else:
            path = settings.pop("ckpt_path")
            getattr(trainer(ROOT, *callbacks, **common, **settings), verb)(
                module, loader(), ckpt_path=path
            )
    except ValueError as error:
        return str(error)
    return None


if __name__ == "__main__":
    other = SCHEDULE.with_prediction("sample")
    last = ROOT / "saved/step=6.ckpt"
    report = {"saved": run("saved")}
    report["same"] = run("again", max_epochs=3, ckpt_path=last)
    report["fit"] = run("other", other, max_epochs=3, ckpt_path=last)
    report["validate"] = run("other", other, verb="validate", ckpt_path=last)
    (ROOT / f"rank{RANK}.json").write_text(json.dumps(report))
    sys.stdout.flush()
    os._exit(0)
