"""Train a class-conditional flow on handwritten digits, with guidance in its previews.

    python examples/train_flow.py
    alphabar sample runs/flow/flow.ckpt --classes 0 1 2 3 4 5 6 7 8 9 --null_class 10 --guidance_scale 2 --num_images 100

The data are the 1797 digits that scikit-learn brings along, 8 x 8 pixels each. Flow matching
with logit-normal times (Esser et al. 2403.03206): x_t = (1 - t) x_0 + t ε, the network predicts
ε - x_0. A tenth of the labels is dropped during training, so that sampling can use classifier-free
guidance (Ho & Salimans 2207.12598). Expect about 4 minutes on 2 CPU cores. Run again it goes on
from its last checkpoint.

In runs/flow: previews, one column for each class; in TensorBoard the validation error at each noise
level; at the end an advice on the density of times, with its plot in loss_by_snr.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any, cast

try:
    from sklearn.datasets import load_digits
except ImportError as error:
    raise ImportError("this example needs more: pip install 'alphabar[demo]'") from error
import torch
from diffusers import UNet2DModel
from lightning.pytorch import Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import TensorBoardLogger
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset, random_split

from alphabar.callbacks import EMA, LossBySNR, ScheduleCheckpoint, ValidationSampling
from alphabar.noising import NoiseSchedule, Noising
from alphabar.training import DiffusionModule, PowerFunction

NO_CLASS = 10


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for name, value, words in (
        ("--max_steps", 2000, "optimizer steps"),
        ("--batch_size", 64, "images in a step"),
        ("--preview_every", 500, "optimizer steps between previews, validations and checkpoints"),
        ("--seed", 0, "seed of weights, order and noise"),
        ("--guidance_scale", 2.0, "guidance of the previews"),
        ("--out", Path("runs/flow"), "where everything is written"),
    ):
        words += " (default: %(default)s)"
        parser.add_argument(name, type=type(value), default=value, help=words)
    return parser.parse_args(arguments)


def digits() -> TensorDataset:
    """Return images in [-1, 1], shape (1797, 1, 8, 8), and their labels."""
    data = cast(Any, load_digits())
    images = torch.from_numpy(data.images).float()[:, None] / 8 - 1
    return TensorDataset(images, torch.from_numpy(data.target))


def enlarged(images: Tensor) -> Tensor:
    """Return images large enough to look at."""
    return torch.nn.functional.interpolate(images, scale_factor=4)


def make_network() -> UNet2DModel:
    return UNet2DModel(
        sample_size=8,
        in_channels=1,
        out_channels=1,
        layers_per_block=1,
        block_out_channels=(32, 64),
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        norm_num_groups=8,
        attention_head_dim=16,
        num_class_embeds=NO_CLASS + 1,
    )


def main(arguments: list[str] | None = None) -> Path:
    args = parse(arguments)
    seed_everything(args.seed)
    schedule = NoiseSchedule.flow()
    module = DiffusionModule(
        make_network(),
        Noising(schedule, timesteps="stratified_logit_normal", seed=args.seed),
        learning_rate=1e-3,
        sample_shape=(1, 8, 8),
        label_key="class_labels",
        label_dropout=0.1,
        null_label=NO_CLASS,
    )
    previews = ValidationSampling(
        "dpmpp_2m",
        num_images=100,
        classes=list(range(10)),
        class_key="class_labels",
        null_class=NO_CLASS,
        guidance_scale=args.guidance_scale,
        every_n_train_steps=args.preview_every,
        batch_size=100,
        weights="ema",
        decode=enlarged,
        folder=args.out / "previews",
    )
    trainer = Trainer(
        accelerator="cpu",
        max_steps=args.max_steps,
        logger=TensorBoardLogger(args.out, name="tensorboard", version=""),
        callbacks=[
            EMA(PowerFunction(sigma_rel=0.1)),
            previews,
            LossBySNR(max(1, args.preview_every // 10), folder=args.out / "loss_by_snr"),
            ScheduleCheckpoint(),
            ModelCheckpoint(
                args.out,
                filename="flow",
                every_n_train_steps=args.preview_every,
                enable_version_counter=False,
            ),
        ],
        check_val_every_n_epoch=None,
        val_check_interval=args.preview_every,
        num_sanity_val_steps=0,
    )
    split = torch.Generator().manual_seed(0)
    training, validation = random_split(digits(), [1669, 128], generator=split)
    checkpoint = args.out / "flow.ckpt"
    trainer.fit(
        module,
        DataLoader(training, args.batch_size, shuffle=True, drop_last=True),
        DataLoader(validation, 64),
        ckpt_path=checkpoint if checkpoint.exists() else None,
    )
    print(f"\nIn {args.out}: previews/, loss_by_snr/, flow.ckpt, tensorboard/")
    return checkpoint


if __name__ == "__main__":
    main()
