"""DiffusionModule's batches: encoders, labels, and labels dropped for guidance."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import UNet2DModel
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from alphabar.callbacks import ValidationSampling
from alphabar.noising import NoiseSchedule, Noising
from alphabar.sampling import Sampler
from alphabar.training import DiffusionModule
from alphabar.training.images import image_grid, to_pixels

FLOW = NoiseSchedule.flow()
NULL = 10
QUIET: dict[str, Any] = {
    "accelerator": "cpu", "logger": False, "enable_progress_bar": False, "enable_model_summary": False, "max_epochs": 1,
    "num_sanity_val_steps": 0,
}  # fmt: skip


class Net(nn.Module):
    """Notes the labels that it sees."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1))
        self.labels: list[Tensor] = []

    def forward(self, x: Tensor, t: Tensor, y: Tensor | None = None) -> Tensor:
        if y is not None:
            self.labels.append(y)
        return self.scale * x


def module(network: nn.Module | None = None, **options: Any) -> DiffusionModule:
    settings = {"label_key": "y", "label_dropout": 0.4, "null_label": NULL} | options
    return DiffusionModule(
        network or Net(), Noising(FLOW, seed=4), **{"validation_levels": 0, **settings}
    )


def pairs(count: int = 24, batch: int = 8) -> Any:
    return DataLoader(TensorDataset(torch.zeros(count, 2), torch.arange(count) % 10), batch)


def fit(one: DiffusionModule, loader: Any, folder: Path, *callbacks: Any, **options: Any) -> Tensor:
    """Train, and return the labels that the network saw."""
    path = options.pop("ckpt_path", None)
    settings = QUIET | {"enable_checkpointing": bool(callbacks)} | options
    trainer = Trainer(callbacks=list(callbacks), default_root_dir=folder, **settings)
    trainer.fit(one, loader, ckpt_path=path)
    return torch.cat(one.network.labels)


@pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before")
def test_dropped_labels_do_not_depend_on_micro_batches_ranks_or_a_resume(tmp_path: Path) -> None:
    given = torch.arange(24) % 10
    saves = ModelCheckpoint(tmp_path, save_top_k=-1, every_n_train_steps=1, filename="{step}")
    whole = fit(module(), pairs(), tmp_path, saves)
    dropped = whole == NULL
    assert torch.equal(whole[~dropped], given[~dropped]) and int(dropped.sum()) == 6
    assert not torch.equal(dropped[:8], dropped[16:])  # another step, other labels
    assert torch.equal(fit(module(), pairs(batch=2), tmp_path, accumulate_grad_batches=4), whole)
    # two ranks, each of which has every second sample
    steps = []
    for rank in range(2):
        one = module()
        one._trainer = SimpleNamespace(  # type: ignore[assignment]
            distributed_sampler_kwargs={"rank": rank, "num_replicas": 2}
        )
        index = one.global_index(0, 4)
        steps.append(one._with_dropped_labels({"y": given[index]}, 0, index)["y"])
    assert torch.equal(torch.stack(steps, 1).flatten(), whole[:8])
    resumed = fit(module(), pairs(), tmp_path, ckpt_path=tmp_path / "step=1.ckpt", max_epochs=1)
    assert torch.equal(resumed == NULL, dropped[8:])  # the data begins anew, the steps go on


def test_dropped_rows_of_an_embedding() -> None:
    rows, empty = torch.randn(64, 3, 2), torch.full((3, 2), 7.0)
    one = module(null_label=empty)
    out = one._with_dropped_labels({"y": rows, "z": rows}, 5, range(64))
    dropped = (out["y"] == 7).flatten(1).all(1)
    assert out["z"] is rows and 12 <= int(dropped.sum()) <= 40
    assert torch.equal(out["y"][~dropped], rows[~dropped])
    with pytest.raises(ValueError, match=r"needs 'y' with a label for each of 2 samples; .* has z"):
        one._with_dropped_labels({"z": rows}, 0, [0, 1])


class Encoder(nn.Module):
    """Halves the images; its weight must not be trained."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.full((1,), 0.5))

    def forward(self, batch: Any) -> Any:
        assert not torch.is_grad_enabled()
        images, labels = batch
        return self.weight * images[:, :1], labels


def test_encode_makes_the_batch_and_stays_out_of_the_training(tmp_path: Path) -> None:
    encoder, network = Encoder(), Net()
    one = module(network, encode=encoder)
    seen: list[Tensor] = []
    one.noising.register_loss_hook(lambda noised, errors: seen.append(noised.x_t))
    data = TensorDataset(torch.ones(8, 2, 4), torch.arange(8))
    trainer = Trainer(**QUIET, default_root_dir=tmp_path)
    trainer.fit(one, DataLoader(data, 4), DataLoader(data, 4))
    assert one.sample_shape == (1, 4) and seen[0].shape == (4, 1, 4)
    assert list(one.state_dict()) == ["network.scale"]
    saved = torch.load(next(tmp_path.rglob("*.ckpt")), weights_only=True)
    assert list(saved["state_dict"]) == ["network.scale"]
    optimizer: Any = trainer.optimizers[0]
    assert [p for g in optimizer.param_groups for p in g["params"]] == [network.scale]
    assert encoder.weight.grad is None and encoder.weight.item() == 0.5
    training, validation = torch.cat(network.labels[:2]), torch.cat(network.labels[2:])
    assert NULL in training and torch.equal(validation, torch.arange(8))  # never dropped there
    # the noising saw the encoder's latents: the same noise on them by hand
    place = {"step": 0, "index": range(4), "total": 4}
    assert torch.equal(seen[0], Noising(FLOW, seed=4)(torch.full((4, 1, 4), 0.5), **place).x_t)


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"label_dropout": 1.5}, ValueError, r"must lie in 0 ... 1, got 1.5"),
        ({"null_label": None}, ValueError, "label_dropout needs label_key=.*null_label="),
        ({"label_key": None}, ValueError, "label_dropout needs label_key=.*null_label="),
        (
            {"encode": "vae"},
            TypeError,
            "encode must be a function from batches to batches, got str",
        ),
    ],
)
def test_contradictions_are_refused(
    options: dict[str, Any], error: type[Exception], words: str
) -> None:
    with pytest.raises(error, match=words):
        module(**options)


def test_previews_of_classes_with_guidance(tmp_path: Path) -> None:
    network = UNet2DModel(
        sample_size=8, in_channels=1, out_channels=1, layers_per_block=1, block_out_channels=(8,), norm_num_groups=4,
        down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",), add_attention=False, num_class_embeds=NULL + 1,
    )  # fmt: skip
    one = module(network, label_key="class_labels")
    previews = ValidationSampling(
        "euler", steps=2, every_n_train_steps=2, classes=[3, 7], null_class=NULL, guidance_scale=3.0,
        folder=tmp_path / "previews", on_error="raise",
    )  # fmt: skip
    data = TensorDataset(torch.randn(8, 1, 8, 8), torch.arange(8))
    trainer = Trainer(
        **QUIET, default_root_dir=tmp_path, callbacks=[previews], enable_checkpointing=False
    )
    trainer.fit(one, DataLoader(data, 4))
    expected = Sampler(FLOW, "euler", 2)(
        network.eval(), (2, 1, 8, 8), seeds=range(2), conditioning={"class_labels": torch.tensor([3, 7])},
        unconditional={"class_labels": torch.tensor([NULL, NULL])}, guidance_scale=3.0,
    )  # fmt: skip
    drawn = np.asarray(Image.open(tmp_path / "previews" / "step_00000002.png"))
    assert np.array_equal(drawn, image_grid(to_pixels(expected))[..., 0])
    unguided = Sampler(FLOW, "euler", 2)(
        network, (2, 1, 8, 8), seeds=range(2), conditioning={"class_labels": torch.tensor([3, 7])}
    )
    assert not np.array_equal(drawn, image_grid(to_pixels(unguided))[..., 0])


def test_a_subclass_may_have_a_method_of_this_name() -> None:
    class Own(DiffusionModule):
        def encode(self, x: Tensor) -> Tensor:  # pyright: ignore
            return 0.5 * x

        def unpack(self, batch: Tensor) -> tuple[Tensor, dict[str, Any]]:
            return self.encode(batch), {}

    module = Own(nn.Identity(), Noising(NoiseSchedule.flow()))
    assert float(module._encoded(torch.ones(1, 1))[0]) == 0.5
