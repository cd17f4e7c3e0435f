"""DiffusionModule, checkpoints that can be sampled from, and the command alphabar sample."""

from pathlib import Path

import pytest
import torch
from diffusers import UNet2DModel
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader

from alphabar.callbacks import ScheduleCheckpoint
from alphabar.noising import NoiseSchedule, Noising
from alphabar.sampling import Sampler
from alphabar.training import DiffusionModule, load_checkpoint
from alphabar.training.cli import main
from alphabar.training.networks import build_network, network_config

SCHEDULE = NoiseSchedule.scaled_linear(prediction="v_prediction").zero_terminal_snr()


def tiny_unet() -> UNet2DModel:
    return UNet2DModel(
        sample_size=8, in_channels=1, out_channels=1, layers_per_block=1, block_out_channels=(8,), norm_num_groups=4,
        down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",), add_attention=False,
    )  # fmt: skip


class Scale(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.zeros(1))

    def forward(
        self, x: torch.Tensor, t: torch.Tensor, **conditioning: torch.Tensor
    ) -> torch.Tensor:
        return self.scale * x + sum(c.mean() for c in conditioning.values())


def fit(
    folder: Path, network: nn.Module, *callbacks: object, steps: int = 4, **options: object
) -> Trainer:
    torch.manual_seed(0)
    data = DataLoader(torch.randn(16, 1, 8, 8), batch_size=4)  # type: ignore[arg-type]
    trainer = Trainer(
        accelerator="cpu", max_steps=steps, logger=False, enable_progress_bar=False, enable_model_summary=False,
        callbacks=[ModelCheckpoint(folder, save_last=True), *callbacks], default_root_dir=folder, **options,
    )  # type: ignore[arg-type]  # fmt: skip
    trainer.fit(
        DiffusionModule(network, Noising(SCHEDULE, timesteps="stratified"), learning_rate=0.1), data
    )
    return trainer


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    fit(folder, tiny_unet(), ScheduleCheckpoint())
    return folder / "last.ckpt"


def test_loss_is_the_noised_loss_of_this_step(tmp_path: Path) -> None:
    losses = []

    class Recording(DiffusionModule):
        def training_step(self, batch, batch_idx):
            step, micro = self.trainer.global_step, batch_idx % 2
            noised = self.noising(batch, step=step, micro_batch=micro, accumulate=2)
            expected = ((self.network(noised.x, noised.timesteps) - noised.target) ** 2).mean()
            loss = super().training_step(batch, batch_idx)
            losses.append((loss.item(), expected.item()))
            return loss

    data = DataLoader(torch.randn(8, 1, 4, 4), batch_size=2)  # type: ignore[arg-type]
    trainer = Trainer(
        accelerator="cpu",
        max_steps=2,
        accumulate_grad_batches=2,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
    )
    trainer.fit(Recording(Scale(), Noising(SCHEDULE, timesteps="stratified")), data)
    assert len(losses) == 4
    assert [a for a, _ in losses] == pytest.approx([b for _, b in losses], rel=1e-6)
    assert len({a for a, _ in losses}) == 4


def test_learns(tmp_path: Path) -> None:
    """For standard normal data v is best predicted as (αε - σx_0 | x_t), a multiple of x_t near 0:
    the scale finds the optimum.
    """
    network = Scale()
    torch.nn.init.constant_(network.scale, 2.0)
    fit(tmp_path, network, steps=200)
    # E[v | x_t] = (ασ - σα) x_t = 0 for unit-variance data
    assert abs(network.scale.item()) < 0.2


def test_validation_loss_is_the_same_each_time(tmp_path: Path) -> None:
    data = DataLoader(torch.randn(8, 1, 4, 4), batch_size=4)  # type: ignore[arg-type]
    module = DiffusionModule(Scale(), Noising(SCHEDULE))
    trainer = Trainer(
        accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False
    )
    first, second = (trainer.validate(module, data, verbose=False)[0]["val_loss"] for _ in range(2))
    torch.manual_seed(123)
    assert first == second == trainer.validate(module, data, verbose=False)[0]["val_loss"]


@pytest.mark.parametrize(
    "batch", [torch.ones(2, 1), (torch.ones(2, 1),), {"images": torch.ones(2, 1)}]
)
def test_unpack(batch: object) -> None:
    x0, conditioning = DiffusionModule(Scale(), Noising(SCHEDULE)).unpack(batch)
    assert x0.shape == (2, 1)
    assert conditioning == {}


def test_unpack_conditioning_and_wrong_key() -> None:
    module = DiffusionModule(Scale(), Noising(SCHEDULE))
    _, conditioning = module.unpack({"images": torch.ones(2, 1), "labels": torch.zeros(2)})
    assert set(conditioning) == {"labels"}
    with pytest.raises(ValueError, match=r"keys \['pixels'\], not 'images'.*input_key"):
        module.unpack({"pixels": torch.ones(2, 1)})


def test_noising_of_wrong_type_is_refused() -> None:
    with pytest.raises(TypeError, match="must be a Noising, got NoiseSchedule"):
        DiffusionModule(Scale(), SCHEDULE)  # type: ignore[arg-type]


def test_network_config_round_trip() -> None:
    network = tiny_unet()
    config = network_config(network)
    assert config is not None
    rebuilt = build_network(config)
    rebuilt.load_state_dict(network.state_dict())
    x, t = torch.randn(1, 1, 8, 8), torch.tensor([3])
    assert torch.equal(network(x, t).sample, rebuilt(x, t).sample)


@pytest.mark.parametrize("name", ["Popen", "os", "DDIMScheduler", "UNet2DModl"])
def test_only_diffusers_models_are_built(name: str) -> None:
    with pytest.raises(ValueError, match="unknown diffusers model"):
        build_network({"_class_name": name})


def test_checkpoint_loads_with_nothing_but_its_own_files(checkpoint: Path) -> None:
    loaded = load_checkpoint(checkpoint)
    assert loaded.schedule == SCHEDULE
    assert loaded.sample_shape == (1, 8, 8)
    assert not loaded.network.training
    weights = torch.load(checkpoint, weights_only=True)["state_dict"]
    assert all(
        torch.equal(v, weights[f"network.{k}"]) for k, v in loaded.network.state_dict().items()
    )


def test_command_samples_the_checkpoint(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "new" / "grid.png"
    assert (
        main(
            [
                "sample",
                str(checkpoint),
                "--steps",
                "3",
                "--method",
                "dpmpp_2m",
                "--num_images",
                "5",
                "--batch_size",
                "2",
                "--out",
                str(out),
            ]
        )
        == 0
    )
    assert "5 images" in capsys.readouterr().out
    assert Image.open(out).width >= 16
    # image 4 does not depend on the batch it was sampled in
    loaded = load_checkpoint(checkpoint)
    sampler = Sampler(loaded.schedule, "dpmpp_2m", 3)
    whole = sampler(loaded.network, (5, 1, 8, 8), seeds=0)
    assert torch.allclose(sampler(loaded.network, (1, 1, 8, 8), seeds=[4])[0], whole[4], atol=1e-5)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (
            ["--method", "dpm2m"],
            "unknown method 'dpm2m'; did you mean 'DPM2', 'DPM++ 2M' or 'DPM2 a'?",
        ),
        (["--grid", "karass"], "unknown grid 'karass'; did you mean 'karras'?"),
        (["--steps", "0"], "steps must be between 1 and the 1000 training timesteps, got 0"),
        (["--num_images", "0"], "must be at least 1, got 0"),
    ],
)
def test_command_says_what_is_wrong(
    checkpoint: Path,
    tmp_path: Path,
    flags: list[str],
    words: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["sample", str(checkpoint), *flags, "--out", str(tmp_path / "grid.png")]) == 2
    assert words in capsys.readouterr().err
    assert not (tmp_path / "grid.png").exists()


def test_command_on_a_checkpoint_without_schedule(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fit(tmp_path, tiny_unet())
    assert main(["sample", str(tmp_path / "last.ckpt")]) == 2
    assert "ScheduleCheckpoint" in capsys.readouterr().err


def test_own_network_needs_a_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fit(tmp_path, Scale(), ScheduleCheckpoint())
    assert main(["sample", str(tmp_path / "last.ckpt")]) == 2
    assert "--network package.module:factory" in capsys.readouterr().err
    assert load_checkpoint(tmp_path / "last.ckpt", network=Scale()).schedule == SCHEDULE


def test_file_that_is_no_checkpoint(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a.ckpt").write_bytes(b"not a checkpoint")
    assert main(["sample", str(tmp_path / "a.ckpt")]) == 2
    assert "a.ckpt" in capsys.readouterr().err


def test_unwritable_output(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("in the way")
    assert main(["sample", str(checkpoint), "--out", str(tmp_path / "file" / "grid.png")]) == 2
    assert "cannot write to the output folder" in capsys.readouterr().err
