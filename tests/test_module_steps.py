"""DiffusionModule in Lightning's loop: the noise of each sample is that of its place in the
optimizer step, in every case.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import UNet2DModel
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import GradientAccumulationScheduler, ModelCheckpoint
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from alphabar.callbacks import EMA
from alphabar.noising import Noised, NoiseSchedule, Noising
from alphabar.training import Constant, DiffusionModule, PowerFunction
from alphabar.training.validation import ErrorsAtLevels

FLOW = NoiseSchedule.flow()
QUIET: dict[str, Any] = {
    "accelerator": "cpu", "logger": False, "enable_progress_bar": False, "enable_model_summary": False, "max_epochs": 2,
}  # fmt: skip


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1))

    def forward(self, x: Tensor, t: Tensor, **conditioning: Tensor) -> Tensor:
        return self.scale * x


class Recorded(DiffusionModule):
    """Writes down (step, batch) of what is noised while training."""

    def __init__(self, timesteps: str = "stratified", **options: Any) -> None:
        super().__init__(Net(), Noising(FLOW, timesteps=timesteps, seed=4), **options)
        self.seen: list[tuple[int, Noised]] = []
        self.noising.register_loss_hook(
            lambda noised, errors: self.seen.append((self.trainer.global_step, noised))
        )

    def by_step(self) -> dict[int, list[Noised]]:
        steps: dict[int, list[Noised]] = {}
        for step, noised in self.seen:
            steps.setdefault(step, []).append(noised)
        return steps


def data(count: int, batch: int, **options: Any) -> Any:
    return DataLoader(torch.zeros(count, 2), batch_size=batch, **options)  # type: ignore[arg-type]


def fit(
    module: Recorded,
    loader: Any,
    tmp_path: Path,
    *callbacks: Callback,
    ckpt_path: Any = None,
    **options: Any,
) -> Trainer:
    settings = (
        QUIET
        | {"enable_checkpointing": any(isinstance(c, ModelCheckpoint) for c in callbacks)}
        | options
    )
    trainer = Trainer(callbacks=list(callbacks), default_root_dir=tmp_path, **settings)
    trainer.fit(module, loader, ckpt_path=ckpt_path)
    return trainer


def noise_of(parts: Sequence[Noised]) -> Tensor:
    return torch.cat([part.noise for part in parts])


def assert_right(module: Recorded, total: int, sizes: dict[int, list[int]]) -> None:
    """Each step's samples are those of one call, whatever their batches are; and fall into
    different strata of the step.
    """
    steps = module.by_step()
    assert {step: [len(part.t) for part in parts] for step, parts in steps.items()} == sizes
    for step, parts in steps.items():
        n = sum(len(part.t) for part in parts)
        expected = module.noising.draw(range(n), (2,), step=step, total=total)
        assert torch.equal(noise_of(parts), expected.noise)
        t = torch.cat([part.t for part in parts])
        assert torch.equal(t, expected.t)
        assert len((t.double() * total).ceil().unique()) == n
    every = [
        sample.numpy().tobytes()
        for parts in steps.values()
        for part in parts
        for sample in part.noise
    ]
    assert len(set(every)) == len(every)


class Stream(IterableDataset[Tensor]):
    def __iter__(self) -> Any:
        return iter(torch.zeros(11, 2))


CASES: dict[str, tuple[Callable[[], Any], dict[str, Any], int, dict[int, list[int]]]] = {
    # 11 samples in batches of 4: 4, 4, 3; Lightning steps early at the end of an epoch
    "accumulation": (lambda: data(11, 4), {"accumulate_grad_batches": 2}, 8, {0: [4, 4], 1: [3], 2: [4, 4], 3: [3]}),
    "smaller last micro-batch": (lambda: data(11, 4), {"accumulate_grad_batches": 3}, 12, {0: [4, 4, 3], 1: [4, 4, 3]}),
    "more than an epoch": (lambda: data(11, 4), {"accumulate_grad_batches": 5}, 20, {0: [4, 4, 3], 1: [4, 4, 3]}),
    "none": (lambda: data(11, 4), {}, 4, {0: [4], 1: [4], 2: [3], 3: [4], 4: [4], 5: [3]}),
    "iterable": (lambda: DataLoader(Stream(), batch_size=4), {"accumulate_grad_batches": 3}, 12, {0: [4, 4, 3], 1: [4, 4, 3]}),
    "batch sampler": (
        lambda: DataLoader(torch.zeros(11, 2), batch_sampler=[[0, 1, 2], [3], [4, 5]]),  # type: ignore[arg-type]
        {"accumulate_grad_batches": 3}, 9, {0: [3, 1, 2], 1: [3, 1, 2]},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_samples_of_a_step(name: str, tmp_path: Path) -> None:
    loader, options, total, sizes = CASES[name]
    module = Recorded()
    fit(module, loader(), tmp_path, **options)
    assert_right(module, total, sizes)


def test_an_accumulation_that_changes(tmp_path: Path) -> None:
    module = Recorded("uniform")
    fit(module, data(12, 4), tmp_path, GradientAccumulationScheduler({0: 1, 1: 3}))
    steps = module.by_step()
    assert [len(parts) for parts in steps.values()] == [1, 1, 1, 3]
    for step, parts in steps.items():
        assert torch.equal(
            noise_of(parts),
            module.noising.draw(range(4 * len(parts)), (2,), step=step, total=4).noise,
        )


def test_manual_optimization(tmp_path: Path) -> None:
    class Manual(Recorded):
        def __init__(self) -> None:
            super().__init__("uniform")
            self.automatic_optimization = False

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            loss = super().training_step(batch, batch_idx)
            self.manual_backward(loss)
            if batch_idx % 3 == 2:  # accumulates by itself, which the Trainer does not know
                optimizer: Any = self.optimizers()
                optimizer.step()
            return loss

    module = Manual()
    fit(module, data(12, 2), tmp_path, max_epochs=1)
    steps = module.by_step()
    assert [len(parts) for parts in steps.values()] == [3, 3]
    for step, parts in steps.items():
        assert torch.equal(
            noise_of(parts), module.noising.draw(range(6), (2,), step=step, total=6).noise
        )


def test_a_closure_that_is_called_again_sees_the_same_noise(tmp_path: Path) -> None:
    class Newton(Recorded):
        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.LBFGS(self.parameters(), max_iter=4)

    module = Newton()
    fit(module, data(8, 4), tmp_path, max_epochs=1)
    for parts in module.by_step().values():
        assert len(parts) > 1
        assert all(
            torch.equal(part.noise, parts[0].noise) and torch.equal(part.t, parts[0].t)
            for part in parts
        )


def test_two_loaders(tmp_path: Path) -> None:
    class Two(Recorded):
        def unpack(self, batch: Any) -> tuple[Tensor, dict[str, Any]]:
            return torch.cat(list(batch.values())), {}

    module = Two("uniform")
    fit(
        module,
        {"a": data(8, 2), "b": data(12, 3)},
        tmp_path,
        accumulate_grad_batches=2,
        max_epochs=1,
    )
    for step, parts in module.by_step().items():
        assert torch.equal(
            noise_of(parts), module.noising.draw(range(10), (2,), step=step, total=10).noise
        )


@pytest.mark.filterwarnings(
    "ignore:You're resuming from a checkpoint that ended before the epoch ended"
)
def test_a_resume_within_an_epoch_goes_on_to_the_same_noise(tmp_path: Path) -> None:
    options: dict[str, Any] = {"accumulate_grad_batches": 2}
    saves = ModelCheckpoint(
        tmp_path, save_top_k=-1, every_n_train_steps=1, filename="{step}", save_weights_only=False
    )
    first = Recorded()
    fit(first, data(12, 2), tmp_path, saves, **options)
    again = Recorded()
    fit(again, data(12, 2), tmp_path, ckpt_path=tmp_path / "step=2.ckpt", **options)
    expected = {step: parts for step, parts in first.by_step().items() if step >= 2}
    resumed = again.by_step()
    assert list(resumed) == list(expected) == [2, 3, 4, 5]
    for step, parts in expected.items():
        assert torch.equal(noise_of(resumed[step]), noise_of(parts))
        assert torch.equal(torch.cat([p.t for p in resumed[step]]), torch.cat([p.t for p in parts]))


def as_rank(rank: int, replicas: int, loader: Any, **state: Any) -> Any:
    """What of a Trainer a step looks at."""
    return SimpleNamespace(
        distributed_sampler_kwargs={"rank": rank, "num_replicas": replicas}
        if replicas > 1
        else None,
        train_dataloader=loader,
        **({"global_step": 3, "current_epoch": 0, "accumulate_grad_batches": 2} | state),
    )


def noised_on(module: DiffusionModule, trainer: Any, sizes: Sequence[int]) -> list[Noised]:
    module._trainer = trainer
    return [
        module.noising(torch.zeros(n, 2), **module._place(n, batch_idx))
        for batch_idx, n in enumerate(sizes)
    ]


def test_unequal_last_batches_on_two_ranks() -> None:
    loader, parts = data(100, 4), []
    for rank, sizes in enumerate([(4, 4), (4, 1)]):
        parts += noised_on(Recorded(), as_rank(rank, 2, loader), sizes)
    expected = Recorded().noising.draw(range(16), (2,), step=3, total=16)
    index = [0, 2, 4, 6, 8, 10, 12, 14, 1, 3, 5, 7, 9]
    assert torch.equal(noise_of(parts), expected.noise[index])
    assert torch.equal(torch.cat([part.t for part in parts]), expected.t[index])


def test_both_smaller_on_two_ranks_keep_their_strata() -> None:
    loader, parts = data(100, 4), []
    for rank, n in enumerate((3, 1)):
        parts += noised_on(Recorded(), as_rank(rank, 2, loader, accumulate_grad_batches=1), [n])
    t = torch.cat([part.t for part in parts]).double()
    assert len((t * 8).ceil().unique()) == 4


def test_ranks_that_share_their_data_share_their_noise() -> None:
    """Tensor parallelism: four processes, two replicas; Lightning's sampler has the two."""
    parts = [noised_on(Recorded(), as_rank(rank // 2, 2, data(8, 4)), [4])[0] for rank in range(4)]
    assert torch.equal(parts[0].noise, parts[1].noise) and torch.equal(
        parts[2].noise, parts[3].noise
    )
    assert not torch.equal(parts[0].noise, parts[2].noise)


def test_another_layout_is_one_method() -> None:
    class Contiguous(Recorded):
        def global_index(self, start: int, batch: int) -> Sequence[int]:
            rank, replicas = self.trainer.distributed_sampler_kwargs.values()  # type: ignore[union-attr]
            return range(start * replicas + rank * batch, start * replicas + (rank + 1) * batch)

    parts = [noised_on(Contiguous(), as_rank(rank, 2, data(8, 4)), [4, 4]) for rank in range(2)]
    expected = Recorded().noising.draw(range(16), (2,), step=3, total=16).noise
    assert torch.equal(noise_of([parts[0][0], parts[1][0], parts[0][1], parts[1][1]]), expected)


def test_several_validation_loaders(tmp_path: Path) -> None:
    module = Recorded()
    trainer = Trainer(**QUIET, default_root_dir=tmp_path, enable_checkpointing=False)
    results = [trainer.validate(module, [data(8, 4), data(4, 2)], verbose=False) for _ in range(2)]
    assert results[0] == results[1]
    for number, one in enumerate(results[0]):
        assert next(iter(one)) == f"val_loss/dataloader_idx_{number}"
    levels = [name for name in trainer.callback_metrics if name.startswith("val_loss_by_snr")]
    for prefix in ("val_loss_by_snr/", "val_loss_by_snr/dataloader_1/"):
        own = [name for name in levels if name.rpartition("/")[0] + "/" == prefix]
        assert len(own) == 9 and f"{prefix}mean" in own


def test_a_rank_without_a_batch_of_a_loader_reduces_its_errors_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each loader has one reduction on every rank, whichever batches the rank has."""

    class Empty(IterableDataset[Tensor]):
        def __iter__(self) -> Iterator[Tensor]:
            return iter(())

    reduced: list[int] = []
    own = ErrorsAtLevels.reduced

    def counted(self: ErrorsAtLevels) -> Any:
        found = own(self)
        reduced.append(found.samples)
        return found

    monkeypatch.setattr(ErrorsAtLevels, "reduced", counted)
    trainer = Trainer(**QUIET, default_root_dir=tmp_path, enable_checkpointing=False)
    loaders = [DataLoader(Empty()), data(8, 4), DataLoader(Empty())]
    trainer.validate(Recorded(), loaders, verbose=False)
    assert reduced == [0, 8, 0]
    levels = [name for name in trainer.callback_metrics if name.startswith("val_loss_by_snr")]
    assert len(levels) == 9 and all("dataloader_1/" in name for name in levels)


# labels


def class_network() -> UNet2DModel:
    return UNet2DModel(
        sample_size=8, in_channels=1, out_channels=1, layers_per_block=1, block_out_channels=(8,), norm_num_groups=4,
        down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",), add_attention=False, num_class_embeds=10,
    )  # fmt: skip


def test_tensor_dataset_with_a_class_network(tmp_path: Path) -> None:
    images, labels = torch.randn(4, 1, 8, 8), torch.tensor([1, 2, 3, 4])
    loader = DataLoader(TensorDataset(images, labels), batch_size=2)
    network, seen = class_network(), []
    network.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["class_labels"].tolist()), with_kwargs=True
    )
    module = DiffusionModule(network, Noising(FLOW), label_key="class_labels", validation_levels=0)
    Trainer(**QUIET | {"max_epochs": 1}, default_root_dir=tmp_path, enable_checkpointing=False).fit(
        module, loader, loader
    )
    assert seen == [[1, 2], [3, 4]] * 3  # the sanity check, training, validation


@pytest.mark.parametrize("label_key", [None, "class_labels"])
def test_entries_without_a_name_are_refused(label_key: str | None) -> None:
    module = DiffusionModule(Net(), Noising(FLOW), label_key=label_key)
    x = torch.zeros(2, 1)
    with pytest.raises(
        ValueError,
        match=r"entries beside the samples: a tensor of shape \(2,\), a str, .*label_key='class_labels'",
    ):
        module.unpack([x, torch.zeros(2), "more"])
    if label_key is None:
        with pytest.raises(
            ValueError,
            match=r"entries beside the samples: a tensor of shape \(2,\), of which the network would see",
        ):
            module.unpack([x, torch.zeros(2)])
    else:
        assert list(module.unpack([x, torch.zeros(2)])[1]) == ["class_labels"]
    assert list(module.unpack([x, {"text": torch.zeros(2)}])[1]) == ["text"]


# averages


def test_an_average_by_its_decay() -> None:
    assert EMA(0.999).profiles == (Constant(decay=0.999),)
    assert EMA([0.9, "power_function:sigma_rel=0.05"]).profiles == (
        Constant(decay=0.9),
        PowerFunction(sigma_rel=0.05),
    )


@pytest.mark.parametrize(
    ("profiles", "message"),
    [
        (1.5, "^decay must be at least 0 and below 1, got 1.5"),
        (True, "^unknown EMA profile True; known: "),
        (
            "constant:decy=0.9",
            "^unknown option of EMA profile constant 'decy'; did you mean 'decay'",
        ),
    ],
)
def test_other_averages_are_refused(profiles: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        EMA(profiles)
