"""One of two processes (gloo) that validate 7 samples; run by test_validation.py. Writes JSON."""

import json
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from lightning.pytorch import Trainer
from lightning.pytorch.strategies import DDPStrategy

from alphabar.training.validation import errors_at_levels
from test_validation import FLOW, SAMPLES, loader, made

root, rank = Path(sys.argv[1]), int(os.environ["LOCAL_RANK"])
torch.set_num_threads(1)
trainer = Trainer(
    accelerator="cpu",
    devices=2,
    strategy=DDPStrategy(process_group_backend="gloo"),
    logger=False,
    enable_checkpointing=False,
    enable_progress_bar=False,
    default_root_dir=root,
)
module = made()
(metrics,) = trainer.validate(module, loader(batch_size=2), verbose=False)
own = [SAMPLES[i % len(SAMPLES)] for i in range(rank, 8, 2)]  # the last one is a repetition
plain = errors_at_levels(module.network, FLOW, [torch.stack(own)], 4, samples=len(SAMPLES))
(root / f"rank{rank}.json").write_text(
    json.dumps({"metrics": metrics, "plain": plain.metrics("val_loss_by_snr")})
)
dist.destroy_process_group()
