"""Tiny checkpoints of a UNet, as Lightning and ScheduleCheckpoint write them."""

from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DModel
from torch import nn

from alphabar.noising import NoiseSchedule
from alphabar.training.networks import network_config

SCHEDULE = NoiseSchedule.scaled_linear(prediction="v_prediction").zero_terminal_snr()


def unet(channels: int = 1, **options: Any) -> UNet2DModel:
    torch.manual_seed(0)
    return UNet2DModel(
        sample_size=8, in_channels=channels, out_channels=channels, layers_per_block=1, block_out_channels=(8,), norm_num_groups=4,
        down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",), add_attention=False, **options,
    )  # fmt: skip


def checkpoint_of(
    network: nn.Module, shape: tuple[int, ...] = (1, 8, 8), **more: Any
) -> dict[str, Any]:
    state = {f"network.{name}": value for name, value in network.state_dict().items()}
    config = network_config(network)
    return {
        "state_dict": state,
        "noise_schedule": SCHEDULE.to_config(),
        "network": config,
        "sample_shape": list(shape),
        **more,
    }


def written(folder: Path, checkpoint: Any, name: str = "a.ckpt") -> Path:
    torch.save(checkpoint, folder / name)
    return folder / name
