"""Train on images of every brightness, and see whether the samples reach black and white.

    python examples/train_brightness.py --prediction_type v_prediction --rescale_betas_zero_snr

The experiment of "Common Diffusion Noise Schedules and Sample Steps are Flawed" (Lin et al.
2305.08891) at desk size: with the ordinary schedule the last training step still shows the mean
brightness through the noise, sampling starts from noise that does not, and the samples come out
grey. With zero terminal SNR and v-prediction they have the brightness of the data. Expect in about
3 minutes on 2 CPU cores: a ratio of the spreads of 0.85 or more (``--compare``: 0.75 or less
without). Run again with the same flags it goes on from its last checkpoint; a folder that was
trained with others is refused.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

try:
    import datasets
    import matplotlib
except ImportError as error:
    raise ImportError("this example needs more: pip install 'alphabar[demo]'") from error
import numpy as np
import torch
from diffusers import UNet2DModel
from lightning.pytorch import Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import TensorBoardLogger
from torch import Tensor
from torch.utils.data import DataLoader

from alphabar.callbacks import EMA, ScheduleCheckpoint, ValidationSampling
from alphabar.noising import NoiseSchedule, Noising
from alphabar.noising.utils.atomic import require_writable, write_atomically
from alphabar.sampling import Sampler
from alphabar.training import (
    Constant,
    DiffusionModule,
    add_noising_arguments,
    load_checkpoint,
    noising_from_arguments,
)

matplotlib.use("Agg")
import matplotlib.pyplot as plt


@dataclass(frozen=True)
class Setting:
    """One way to train and sample: what is compared."""

    name: str
    noising: Noising
    spacing: str


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_noising_arguments(parser)
    parser.add_argument(
        "--data",
        default=None,
        help="a folder of images to train on instead of the discs (no plot of the latter's "
        "brightness)",
    )
    parser.add_argument(
        "--channels", type=int, default=1, choices=[1, 3], help="grey or RGB (default: grey)"
    )
    parser.add_argument(
        "--out",
        default="runs/brightness",
        help="where everything is written (default: %(default)s)",
    )
    parser.add_argument(
        "--max_steps", type=int, default=500, help="optimizer steps (default: %(default)s)"
    )
    parser.add_argument(
        "--batch_size", type=int, default=32, help="images in a step (default: %(default)s)"
    )
    parser.add_argument(
        "--num_samples",
        type=int,
        default=256,
        help="samples whose brightness is measured (default: %(default)s)",
    )
    parser.add_argument(
        "--sampling_steps", type=int, default=20, help="steps of the sampler (default: %(default)s)"
    )
    parser.add_argument(
        "--preview_every",
        type=int,
        default=100,
        help="optimizer steps between previews (default: %(default)s)",
    )
    parser.add_argument(
        "--spacing",
        default="trailing",
        choices=["trailing", "leading", "linspace"],
        help="grid of the sampler (default: %(default)s)",
    )
    parser.add_argument(
        "--compare",
        action="store_true",
        help="also train the ordinary setting: epsilon, no rescale, leading spacing",
    )
    parser.add_argument(
        "--seed", type=int, default=0, help="seed of data, weights and noise (default: %(default)s)"
    )
    return parser.parse_args(arguments)


# -- data ------------------------------------------------------------------------------------------


def discs(count: int, seed: int, channels: int, size: int = 32) -> datasets.Dataset:
    """Make images in [-1, 1]: a background of any brightness from black to white, and on it a
    contrasting disc.
    """
    rng = np.random.default_rng(seed)
    ground = rng.uniform(-1, 1, (count, 1, 1))
    disc = np.where(ground > 0, ground - 1, ground + 1)
    radius = rng.uniform(4, 8, (count, 1, 1))
    centre = rng.uniform(9, size - 9, (2, count, 1, 1))
    y, x = np.mgrid[:size, :size]
    inside = (x - centre[0]) ** 2 + (y - centre[1]) ** 2 < radius**2
    images = np.where(inside, disc, ground).astype(np.float32)[:, None].repeat(channels, 1)
    shape = datasets.Array3D(images.shape[1:], "float32")
    return datasets.Dataset.from_dict(
        {"images": images}, features=datasets.Features({"images": shape})
    ).with_format("torch")


def folder_images(folder: str, channels: int, cache: Path, size: int = 32) -> datasets.Dataset:
    """Read any folder of images, resized to size x size, in [-1, 1]."""
    if not Path(folder).is_dir():
        raise FileNotFoundError(f"no folder of images at {folder!r}")
    found = datasets.load_dataset(
        "imagefolder", data_dir=folder, split="train", cache_dir=str(cache)
    )

    def prepare(batch: dict[str, list[Any]]) -> dict[str, list[Tensor]]:
        pixels = [
            np.array(
                image.convert("L" if channels == 1 else "RGB").resize((size, size)),
                dtype=np.float32,
            )
            for image in batch["image"]
        ]
        return {
            "images": [
                torch.from_numpy(p / 127.5 - 1).reshape(size, size, channels).permute(2, 0, 1)
                for p in pixels
            ]
        }

    return found.with_transform(prepare)


def load_data(args: argparse.Namespace) -> tuple[datasets.Dataset, datasets.Dataset]:
    """Return training and validation images."""
    if args.data is None:
        return discs(4096, args.seed, args.channels), discs(128, args.seed + 1, args.channels)
    split = folder_images(args.data, args.channels, Path(args.out, "cache")).train_test_split(
        test_size=0.05, seed=args.seed
    )
    return split["train"], split["test"]


# -- one folder, one run ---------------------------------------------------------------------------

FLAGS = "flags.json"  # what the folder was trained with
NOT_TRAINING = {
    "out",
    "max_steps",
    "num_samples",
    "sampling_steps",
    "preview_every",
    "spacing",
    "compare",
}


def require_same_run(args: argparse.Namespace, out: Path) -> None:
    """Refuse to go on, in a folder that holds a run, with flags that would have trained another;
    remember those of a new one.
    """
    own = {name: value for name, value in vars(args).items() if name not in NOT_TRAINING}
    own = json.loads(json.dumps(own, default=str))
    if (out / FLAGS).is_file():
        before = json.loads((out / FLAGS).read_text(encoding="utf-8"))
        names = sorted(
            name for name in own.keys() | before.keys() if own.get(name) != before.get(name)
        )
        if names:
            then, now = (
                ", ".join(f"{name}={run.get(name)}" for name in names) for run in (before, own)
            )
            raise ValueError(
                f"{str(out)!r} was trained with {then}, and this run has {now}; give another --out"
            )
    elif (out / "brightness.ckpt").is_file():
        raise ValueError(
            f"{str(out)!r} holds a checkpoint and no {FLAGS} that says its flags; give another "
            "--out"
        )
    write_atomically(out / FLAGS, json.dumps(own, indent=2) + "\n")


# -- train, load, sample ---------------------------------------------------------------------------


def make_network(channels: int) -> UNet2DModel:
    return UNet2DModel(
        sample_size=32,
        in_channels=channels,
        out_channels=channels,
        layers_per_block=1,
        block_out_channels=(32, 64, 64),
        down_block_types=("DownBlock2D", "DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D", "UpBlock2D"),
        norm_num_groups=8,
        attention_head_dim=16,
    )


def train(setting: Setting, args: argparse.Namespace, out: Path) -> Path:
    """Train with previews and checkpoints; goes on from an interrupted run's last checkpoint.
    Return the checkpoint.
    """
    seed_everything(args.seed)
    training, validation = load_data(args)
    previews = ValidationSampling(
        Sampler(setting.noising.schedule, "dpmpp_2m", 20, setting.spacing),
        num_images=16,
        batch_size=16,
        every_n_train_steps=args.preview_every,
        folder=out / "previews",
    )
    checkpoints = ModelCheckpoint(
        out,
        filename="brightness",
        every_n_train_steps=min(100, args.max_steps),
        enable_version_counter=False,
    )
    trainer = Trainer(
        accelerator="cpu",
        max_steps=args.max_steps,
        logger=TensorBoardLogger(out, name="tensorboard", version=""),
        callbacks=[EMA(Constant(decay=0.99)), previews, ScheduleCheckpoint(), checkpoints],
        check_val_every_n_epoch=None,
        val_check_interval=min(args.preview_every, args.max_steps),
        log_every_n_steps=10,
        num_sanity_val_steps=0,
    )
    checkpoint = out / "brightness.ckpt"
    trainer.fit(
        DiffusionModule(make_network(args.channels), setting.noising, learning_rate=5e-4),
        DataLoader(
            cast(Any, training),
            args.batch_size,
            shuffle=True,
            drop_last=len(training) > args.batch_size,
        ),
        DataLoader(cast(Any, validation), args.batch_size),
        ckpt_path=checkpoint if checkpoint.exists() else None,
    )
    return checkpoint


def draw(checkpoint: Path, setting: Setting, args: argparse.Namespace) -> Tensor:
    """Load the checkpoint afresh, with nothing but its own files, and sample from it."""
    loaded = load_checkpoint(checkpoint)
    sampler = Sampler(loaded.schedule, "dpmpp_2m", args.sampling_steps, setting.spacing)
    seeds = range(10_000, 10_000 + args.num_samples)
    batches = [
        sampler(loaded.network, (len(part), *loaded.sample_shape), seeds=part)
        for part in (seeds[i : i + 64] for i in range(0, len(seeds), 64))
    ]
    return torch.cat(batches).clamp(-1, 1)


# -- brightness ------------------------------------------------------------------------------------


def brightness(images: Tensor) -> Tensor:
    """Return the mean brightness of each image, -1 black to 1 white."""
    return images.flatten(1).mean(1)


def data_images(args: argparse.Namespace) -> Tensor:
    data, _ = load_data(args)
    return torch.stack([data[i]["images"] for i in range(min(len(data), 1024))])


def report(data: Tensor, samples: dict[str, Tensor], out: Path) -> dict[str, float]:
    """Print the table, draw the plot, and return the ratio of the spreads for each setting."""
    spread = brightness(data).std().item()
    rows = {"data": brightness(data)} | {
        name: brightness(images) for name, images in samples.items()
    }
    print(
        f"\nmean brightness of an image   {'spread':>8} {'/ data':>8} {'darkest':>8} "
        f"{'lightest':>8}"
    )
    for name, values in rows.items():
        print(
            f"{name:<29} {values.std():8.3f} {values.std() / spread:8.2f} {values.min():8.2f} "
            f"{values.max():8.2f}"
        )
    figure, axes = plt.subplots(
        1, len(rows), figsize=(4 * len(rows), 3), sharey=True, squeeze=False
    )
    for axis, (name, values) in zip(axes[0], rows.items(), strict=True):
        axis.hist(values.numpy(), bins=24, range=(-1, 1), density=True, color="0.3")
        axis.set(title=name, xlabel="mean brightness (-1 black, 1 white)")
    axes[0][0].set_ylabel("density")
    figure.tight_layout()
    figure.savefig(out / "brightness.png", dpi=120)
    plt.close(figure)
    return {name: (values.std() / spread).item() for name, values in rows.items() if name != "data"}


def settings(args: argparse.Namespace) -> list[Setting]:
    """Return what to train: the setting of the flags and, to compare, the ordinary one."""
    noising = noising_from_arguments(args)
    rescaled = " + zero terminal SNR" if args.rescale_betas_zero_snr else ""
    chosen = [Setting(noising.schedule.prediction.name + rescaled, noising, args.spacing)]
    if args.compare:
        ordinary = NoiseSchedule.scaled_linear(prediction="epsilon")
        chosen.append(Setting("epsilon, ordinary", Noising(ordinary, seed=noising.seed), "leading"))
    return chosen


def main(arguments: list[str] | None = None) -> dict[str, float]:
    args = parse(arguments)
    chosen = settings(args)  # contradictory flags fail here, before anything is made
    out = require_writable(args.out)
    require_same_run(args, out)
    samples = {}
    for i, setting in enumerate(chosen):
        folder = out if i == 0 else out / "ordinary"
        samples[setting.name] = draw(train(setting, args, folder), setting, args)
    ratios = report(data_images(args), samples, out)
    write_atomically(out / "brightness.json", json.dumps(ratios, indent=2) + "\n")
    print(
        f"\nIn {out}: previews/, brightness.ckpt, scheduler/scheduler_config.json, brightness.png, "
        "tensorboard/"
    )
    return ratios


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:
        sys.exit(f"train_brightness: {error}")
