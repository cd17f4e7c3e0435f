"""Training with a time for each frame: the module, a resume, the losses by noise level, previews of
roll-outs, and the example.
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from alphabar.callbacks import LossBySNR, ValidationSampling
from alphabar.noising import Noised, NoiseSchedule, Noising, StaircaseTimesteps
from alphabar.sampling import RollingSampler, Sampler
from alphabar.training import DiffusionModule
from alphabar.training.images import to_pixels
from alphabar.training.snr_buckets import COUNT, ERROR, LOSS, WEIGHT, Buckets

pytestmark = pytest.mark.filterwarnings("ignore::Warning:lightning", "ignore::UserWarning:alphabar")
FRAMES, SIZE = 4, (1, 4, 6, 6)
QUIET: dict[str, Any] = {"accelerator": "cpu", "enable_progress_bar": False, "logger": False, "enable_model_summary": False}  # fmt: skip


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv3d(1, 1, 3, padding=1)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        assert t.shape == (len(x), FRAMES)
        return self.conv(x) * (0.5 + t[:, None, :, None, None] / 1000)


class Recorded(DiffusionModule):
    """Keeps what it trains on, by step: the batch and the error of each element."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        density = StaircaseTimesteps(density="stratified", context=1, context_probability=0.5)
        super().__init__(Net(), Noising(NoiseSchedule.flow(), "min_snr:floor=0.1", density))
        self.seen: list[tuple[int, Noised, Tensor]] = []
        self.noising.register_loss_hook(
            lambda noised, errors: self.seen.append((self.trainer.global_step, noised, errors))
        )


def videos() -> Any:
    x = torch.randn(12, *SIZE, generator=torch.Generator().manual_seed(0)).clamp(-1, 1)
    return DataLoader(TensorDataset(x), batch_size=4)


def fit(folder: Path, steps: int, *callbacks: Any, **options: Any) -> Recorded:
    module = Recorded()
    trainer = Trainer(
        default_root_dir=folder, max_steps=steps, callbacks=list(callbacks), **QUIET, **options
    )
    ckpt = folder / "last.ckpt"
    trainer.fit(module, videos(), videos(), ckpt_path=ckpt if ckpt.exists() else None)
    return module


def test_training_resumes_and_losses_count_by_element(tmp_path: Path) -> None:
    losses = LossBySNR(every_n_train_steps=100, buckets=5, folder=tmp_path / "losses")
    whole = fit(tmp_path / "a", 5, losses)
    checkpoint = ModelCheckpoint(tmp_path / "b", save_last=True, every_n_train_steps=3)
    fit(tmp_path / "b", 3, checkpoint)
    resumed = fit(tmp_path / "b", 5)
    trained = {step: noised for step, noised, _ in whole.seen}
    again = {step: noised for step, noised, _ in resumed.seen}
    assert sorted(trained) == [0, 1, 2, 3, 4] and sorted(again) == [3, 4]
    for step, noised in again.items():
        for name in ("x", "timesteps", "weight", "counted"):
            assert torch.equal(getattr(noised, name), getattr(trained[step], name)), name
    assert torch.equal(resumed.network.conv.weight, whole.network.conv.weight)

    buckets = Buckets.of(NoiseSchedule.flow(), 5)
    right = torch.zeros(4, len(buckets), dtype=torch.float64)
    for _, noised, errors in whole.seen:
        assert noised.counted is not None
        level = buckets.index(noised.log_snr)
        for i, counts, error, weight in zip(
            *(one.flatten().tolist() for one in (level, noised.counted, errors, noised.weight)),
            strict=True,
        ):
            if counts:
                right[[COUNT, ERROR, LOSS, WEIGHT], i] += torch.tensor(
                    [1, error, error * weight, weight], dtype=torch.float64
                )
    torch.testing.assert_close(losses._sums.double(), right, rtol=1e-5, atol=1e-6)
    assert 0 < right[COUNT].sum() < 5 * 4 * FRAMES


def test_validation_has_the_shape_of_training_and_the_same_noise_each_time(tmp_path: Path) -> None:
    module = Recorded()
    assert module.validation_noising.timesteps == StaircaseTimesteps(
        density="stratified", context=1, context_probability=0.5
    )
    trainer = Trainer(default_root_dir=tmp_path, **QUIET)
    first, second = (trainer.validate(module, videos(), verbose=False) for _ in range(2))
    assert first == second and first[0]["val_loss"] > 0


def in_a_row(x: Tensor) -> Tensor:
    return x.movedim(2, 3).flatten(3)


def test_previews_draw_roll_outs(tmp_path: Path) -> None:
    """Their pixels are those of the sampler, called by hand."""
    from PIL import Image

    sampler = Sampler(NoiseSchedule.flow(), "ddpm", steps=3)
    rolling = RollingSampler(sampler, "pyramid", chunks=FRAMES)
    previews = ValidationSampling(
        rolling,
        num_images=2,
        batch_size=2,
        decode=in_a_row,
        every_n_train_steps=2,
        folder=tmp_path / "previews",
    )
    module = fit(tmp_path, 2, previews)
    samples = rolling(module.network, (2, *SIZE), seeds=[0, 1])
    expected = to_pixels(in_a_row(samples))
    files = sorted((tmp_path / "previews" / "images").rglob("*.png"))
    assert len(files) == 2
    for path, pixels in zip(files, expected, strict=True):
        with Image.open(path) as image:
            assert list(image.convert("L").getdata()) == pixels.flatten().tolist()


def test_the_example(tmp_path: Path) -> None:
    path = Path(__file__).parent.parent / "examples" / "train_video.py"
    spec = importlib.util.spec_from_file_location("train_video", path)
    assert spec and spec.loader
    example = importlib.util.module_from_spec(spec)
    sys.modules["train_video"] = example
    spec.loader.exec_module(example)

    discs = example.moving_discs(64, 0)
    move = example.centres(discs).diff(dim=1)
    assert discs.shape == (64, 1, 8, 16, 16) and discs.min() == -1 and discs.max() == 1
    assert float(move.norm(dim=-1).max()) < 2.4 and float(move.norm(dim=-1).median()) > 1
    short = "--max_steps 2 --batch_size 2 --videos 4 --num_samples 4 --sampling_steps 2"
    flags = [*short.split(), "--preview_every", "1", "--out", str(tmp_path)]
    distances = example.main(flags)
    assert set(distances) == set(example.MATRICES)
    for name in ("rollouts.png", "video.ckpt", "scheduler/noise_schedule.json"):
        assert (tmp_path / name).is_file(), name
    assert len(list((tmp_path / "previews").glob("*.png"))) == 2
    assert example.main(flags) == distances  # goes on from the checkpoint: nothing is left to train
