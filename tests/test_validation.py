"""Validation at fixed noise levels: exact means in any split, and a training that does not notice."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.loggers.logger import DummyLogger
from torch import Tensor, nn
from torch.utils.data import DataLoader

from alphabar.noising import PRESETS, NoiseSchedule, Noising
from alphabar.training import DiffusionModule
from alphabar.training.validation import (
    VALIDATION_SEED,
    ErrorsAtLevels,
    LevelErrors,
    errors_at_levels,
    plot_validations,
    validation_times,
)
from two_processes import last_words, run_two_ranks

pytestmark = pytest.mark.filterwarnings("ignore::Warning:lightning", "ignore::UserWarning:alphabar")
FLOW = NoiseSchedule.flow()
SCHEDULES = {
    "discrete": NoiseSchedule.scaled_linear(),
    "zero terminal SNR": NoiseSchedule.scaled_linear(prediction="v_prediction").zero_terminal_snr(),
    "flow": FLOW,
    "shifted flow": NoiseSchedule.flow(3.0),
    "cosine": NoiseSchedule.cosine(),
    "karras": NoiseSchedule.karras(),
}
SAMPLES = torch.randn(7, 3, 4, generator=torch.Generator().manual_seed(1))


class Net(nn.Module):
    """Dropout, which validation must turn off, and a label."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.dropout = nn.Linear(4, 4), nn.Dropout(0.5)
        with torch.no_grad():
            self.linear.weight.copy_(torch.linspace(-1, 1, 16).view(4, 4))

    def forward(self, x: Tensor, t: Tensor, shift: Tensor | None = None) -> Tensor:
        out = self.dropout(self.linear(x)) + t.view(-1, 1, 1).to(x.dtype) / 1000
        return out if shift is None else out + shift.view(-1, 1, 1)


def made(levels: int = 4) -> DiffusionModule:
    torch.manual_seed(0)
    return DiffusionModule(
        Net(), Noising(FLOW, seed=2), learning_rate=1e-2, validation_levels=levels
    )


def loader(batch_size: int = 3, data: Any = SAMPLES) -> Any:
    # a generator of its own: otherwise each epoch of a DataLoader draws from the global one
    return DataLoader(data, batch_size=batch_size, generator=torch.Generator())


def trainer(tmp_path: Path, **options: Any) -> Trainer:
    quiet: dict[str, Any] = {
        "accelerator": "cpu",
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "default_root_dir": tmp_path,
    }
    return Trainer(**quiet | options)


# -- levels and errors -----------------------------------------------------------------------------


def test_levels_stay_inside_every_preset_and_part() -> None:
    """Times at the ends of a curve, rounded to float32, must not leave it."""
    schedules = [NoiseSchedule.preset(name) for name in PRESETS]
    schedules += [
        NoiseSchedule.flow(shift=shift).truncated(noise_level_min=low)
        for low in (0.358, 0.417, 0.5, 0.875, 0.9)
        for shift in (1.0, 3.0, 5.0, 12.0)
    ]
    for schedule in schedules:
        found = errors_at_levels(lambda x, t: -x, schedule, [torch.randn(4, 3)])
        assert all(math.isfinite(error) for error in found.errors)


@pytest.mark.parametrize("name", SCHEDULES)
def test_levels_are_even_in_log_snr_and_begin_at_the_terminal_time(name: str) -> None:
    curve = SCHEDULES[name].curve
    for levels in (3, 8):
        t = validation_times(SCHEDULES[name], levels)
        assert len(t) == levels and float(t[0]) == curve.t_max
        assert bool((t.diff() < 0).all()) and float(t[-1]) >= curve.t_min
        log_snr = curve.log_snr(t.double())
        inner = log_snr[1:] if log_snr[0] < -10 else log_snr
        # a discrete schedule has the nearest timestep, which is coarse at the terminal one
        torch.testing.assert_close(
            inner,
            torch.linspace(float(inner[0]), float(inner[-1]), len(inner), dtype=torch.float64),
            rtol=0,
            atol=0.15 if curve.is_discrete else 1e-3,
        )
        low, high = curve.log_snr(torch.tensor([curve.t_max, curve.t_min], dtype=torch.float64))
        assert float(inner[-1]) == pytest.approx(min(float(high), 10), abs=1e-3)
        assert float(inner[0]) == pytest.approx(max(float(low), -10), abs=0.15)


def test_few_timesteps_are_given_once() -> None:
    schedule = NoiseSchedule.scaled_linear(num_train_timesteps=5)
    assert validation_times(schedule, 8).tolist() == [4, 3, 2, 1, 0]
    with pytest.raises(ValueError, match="levels of validation must be an integer of at least 3"):
        validation_times(schedule, 1)


@pytest.mark.parametrize("name", SCHEDULES)
def test_errors_are_plain_means(name: str) -> None:
    schedule = SCHEDULES[name]
    network = Net().eval()
    found = errors_at_levels(network, schedule, [SAMPLES], 4, seed=9)
    for k, t in enumerate(validation_times(schedule, 4)):
        noised = Noising(schedule, seed=9)(
            SAMPLES, step=k, index=range(7), total=7, timesteps=t.expand(7)
        )
        error = (network(noised.x, noised.timesteps) - noised.target).square().mean()
        assert found.errors[k] == pytest.approx(error.item(), rel=1e-5)
    assert found.samples == 7 and found.mean == pytest.approx(sum(found.errors) / 4)


def test_the_error_of_the_best_network() -> None:
    """Of data N(0, 1): 1 / (α² + σ²) at each level of a flow, also at t = 1."""

    def best(x: Tensor, t: Tensor) -> Tensor:
        sigma = t.view(-1, 1) / 1000
        return (2 * sigma - 1) / ((1 - sigma) ** 2 + sigma**2) * x

    x0 = torch.randn(200, 256, generator=torch.Generator().manual_seed(0))
    found = errors_at_levels(best, FLOW, [x0])
    t = validation_times(FLOW).double()
    exact = 1 / ((1 - t) ** 2 + t**2)
    assert found.errors == pytest.approx(exact.tolist(), rel=0.03)


@pytest.mark.parametrize("size", [1, 2, 5])
def test_means_are_exact_in_any_split(size: int) -> None:
    network = Net()
    whole = errors_at_levels(network, FLOW, [SAMPLES])
    split = errors_at_levels(network, FLOW, SAMPLES.split(size))
    assert split.errors == pytest.approx(whole.errors, rel=1e-6) and split.samples == 7
    assert network.training and network.dropout.training


def test_repeated_samples_of_two_ranks_are_left_out() -> None:
    network = Net().eval()
    whole = errors_at_levels(network, FLOW, [SAMPLES], 4)
    sums = ErrorsAtLevels(Noising(FLOW, seed=VALIDATION_SEED), 4)
    for rank in range(2):
        index = list(range(rank, 8, 2))
        x0 = SAMPLES[[i % 7 for i in index]]
        sums.add(network, x0, index, kept=[i < 7 for i in index])
    assert sums.reduced().errors == pytest.approx(whole.errors, rel=1e-6)
    assert sums.reduced().samples == 7


def test_conditioning_reaches_the_network() -> None:
    network, shift = Net().eval(), torch.full((7,), 5.0)
    with_shift = errors_at_levels(network, FLOW, [(SAMPLES, {"shift": shift})], 3)
    sums = ErrorsAtLevels(Noising(FLOW, seed=VALIDATION_SEED), 3)
    sums.add(lambda x, t: network(x, t) + 5, SAMPLES, range(7))
    assert with_shift.errors == pytest.approx(sums.reduced().errors, rel=1e-6)


def test_nothing_to_validate_is_nan() -> None:
    assert all(math.isnan(error) for error in errors_at_levels(Net(), FLOW, [], 3).errors)


def test_names_sort_and_say_the_level() -> None:
    found = LevelErrors((-math.inf, *map(float, range(-10, 1))), (1.0,) * 12, samples=1)
    names = list(found.metrics("val"))
    assert names == sorted(names) and names[0] == "val/00_zero_SNR" and names[11] == "val/11_0.0"


def test_plots() -> None:
    steps = {k: LevelErrors((-math.inf, 0.0, 3.0), (1.0, 0.5, k / 9), 4) for k in range(9)}
    assert plot_validations(steps).startswith(b"\x89PNG")
    assert plot_validations({0: LevelErrors((-1.0, 1.0), (math.nan,) * 2, 0)})[:4] == b"\x89PNG"


# -- the module ------------------------------------------------------------------------------------


class Album(DummyLogger):
    """Keeps what it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.metrics: list[str] = []
        self.images: list[tuple[str, int]] = []

    def log_metrics(self, metrics: Any, step: Any = None, **rest: Any) -> None:
        self.metrics += list(metrics)

    def log_image(self, key: str, images: list[Any], step: int) -> None:
        self.images.append((key, step))


@pytest.mark.parametrize("batch_size", [2, 3, 7])
def test_the_module_logs_the_errors_at_levels(tmp_path: Path, batch_size: int) -> None:
    module, album = made(), Album()
    (found,) = trainer(tmp_path, logger=album).validate(module, loader(batch_size), verbose=False)
    expected = errors_at_levels(module.network, FLOW, [SAMPLES], 4).metrics("val_loss_by_snr")
    assert found.keys() == {"val_loss", *expected}
    assert {name: found[name] for name in expected} == pytest.approx(expected, rel=1e-5)
    assert set(expected) <= set(album.metrics) and album.images == [("val_loss_by_snr", 0)]


def test_two_dataloaders_and_zero_levels(tmp_path: Path) -> None:
    loaders = [loader(), loader(data=SAMPLES[:2])]
    found = trainer(tmp_path).validate(made(), loaders, verbose=False)
    names = {name for part in found for name in part}
    network = made().network
    for data, prefix in (
        (SAMPLES, "val_loss_by_snr"),
        (SAMPLES[:2], "val_loss_by_snr/dataloader_1"),
    ):
        expected = errors_at_levels(network, FLOW, [data], 4).metrics(prefix)
        merged = {k: v for part in found for k, v in part.items() if k in expected}
        assert merged == pytest.approx(expected, rel=1e-5)
    assert len(names) == 12  # val_loss of each loader too
    (alone,) = trainer(tmp_path).validate(made(0), loader(), verbose=False)
    assert set(alone) == {"val_loss"}
    with pytest.raises(ValueError, match="levels of validation"):
        made(1)


def test_training_is_bit_identical_with_and_without(tmp_path: Path) -> None:
    """Also where the picture fails: that is one warning."""

    class Broken(Album):
        def log_image(self, key: str, images: list[Any], step: int) -> None:
            raise OSError("full")

    ended = []
    for logger, validation in ((Album(), loader()), (Broken(), loader()), (Album(), None)):
        module = made()
        fit = trainer(tmp_path, logger=logger, max_epochs=3, num_sanity_val_steps=1)
        if isinstance(logger, Broken):
            with pytest.warns(UserWarning, match="the plot of the validation: OSError: full"):
                fit.fit(module, loader(), validation)
        else:
            fit.fit(module, loader(), validation)
        if validation is not None and type(logger) is Album:
            assert logger.images == [("val_loss_by_snr", step) for step in (3, 6, 9)]
        ended.append([p.tolist() for p in module.parameters()])
    assert ended[0] == ended[1] == ended[2]


@pytest.mark.slow
def test_two_processes_have_the_values_of_one(tmp_path: Path) -> None:
    script = Path(__file__).parent / "validation_two_ranks.py"
    assert run_two_ranks(script, tmp_path) == [0, 0], last_words(tmp_path)
    expected = errors_at_levels(made().network, FLOW, [SAMPLES], 4).metrics("val_loss_by_snr")
    for rank in range(2):
        found = json.loads((tmp_path / f"rank{rank}.json").read_text())
        assert found["plain"] == pytest.approx(expected, rel=1e-6)
        del found["metrics"]["val_loss"]
        assert found["metrics"] == pytest.approx(expected, rel=1e-6)
