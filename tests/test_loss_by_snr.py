"""Losses by noise level: exact sums, words for what stands out, and a training that does not
notice.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers.logger import DummyLogger
from PIL import Image
from torch import Tensor

from alphabar.callbacks import LossBySNR
from alphabar.noising import NoiseSchedule, Noising
from alphabar.training.snr_buckets import COUNT, ERROR, LOSS, Buckets, findings, means, plot
from callbacks_toy import SCHEDULE, Toy, files, fresh, loader, one_thread, train, weights

pytestmark = pytest.mark.filterwarnings("ignore::Warning:lightning", "ignore::UserWarning:alphabar")
CPU = torch.device("cpu")
SCHEDULES = {
    "discrete": NoiseSchedule.scaled_linear(),
    "zero terminal SNR": SCHEDULE,
    "flow": NoiseSchedule.flow(3.0),
    "cosine": NoiseSchedule.cosine(),
    "variance exploding": NoiseSchedule.karras(),
}


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    with one_thread():
        yield


# -- arithmetic ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("number", [1, 2, 20])
def test_sums_are_exact(name: str, number: int) -> None:
    schedule = SCHEDULES[name]
    buckets = Buckets.of(schedule, number)
    generator = torch.Generator().manual_seed(0)
    t = schedule.curve.time_at_quantile(torch.rand(500, dtype=torch.float64, generator=generator))
    log_snr = torch.cat(
        [
            schedule.log_snr(t).double(),
            torch.tensor([-math.inf, math.inf, -99.0, 99.0, *buckets.edges], dtype=torch.float64),
        ]
    )
    errors, weight = torch.rand(2, len(log_snr), generator=generator, dtype=torch.float64)
    sums = buckets.zeros(CPU)
    for part in range(0, len(log_snr), 100):
        rows = [values[part : part + 100] for values in (log_snr, errors, weight)]
        buckets.add(sums, *rows)
    right = torch.zeros(4, number + 2, dtype=torch.float64)
    for value, error, w in zip(log_snr.tolist(), errors.tolist(), weight.tolist(), strict=True):
        i = 1 + sum(value >= edge for edge in buckets.edges[1:-1])
        i = {-math.inf: 0, math.inf: number + 1}.get(value, i)
        right[:, i] += torch.tensor([1, error, w * error, w], dtype=torch.float64)
    torch.testing.assert_close(sums.double(), right, rtol=1e-5, atol=1e-5)
    found = means(buckets, sums)
    assert len(found) == 2 * int((right[COUNT] > 0).sum())
    assert found[f"loss_by_snr/loss/{buckets.tag(1)}"] == pytest.approx(
        float(right[LOSS, 1] / right[COUNT, 1]), rel=1e-5
    )
    assert found[f"loss_by_snr/error/{buckets.tag(1)}"] == pytest.approx(
        float(right[ERROR, 1] / right[COUNT, 1]), rel=1e-5
    )
    assert sum(buckets.reach) == pytest.approx(1)


def test_tags_are_names_that_loggers_take() -> None:
    buckets = Buckets.of(SCHEDULE, 12)
    tags = [buckets.tag(i) for i in range(len(buckets))]
    assert len(set(tags)) == 14 and sorted(tags) == tags
    assert all(c.isalnum() or c in "-_." for tag in tags for c in tag)
    assert tags[0] == "00_zero_SNR" and tags[-1] == "13_infinite_SNR"


def sums_of(counts: list[float], errors: list[float], weight: list[float]) -> Tensor:
    rows = torch.tensor([counts, errors, errors, weight])
    rows[LOSS] = torch.tensor(
        [e * w / max(c, 1) for c, e, w in zip(counts, errors, weight, strict=True)]
    )
    return rows


def test_words() -> None:
    buckets = Buckets.of(SCHEDULE, 2)
    assert buckets.reach[0] == pytest.approx(1 / 1000) and buckets.reach[3] == 0

    def said(
        counts: list[float],
        errors: list[float],
        weight: list[float],
        drawn: list[float] | None = None,
    ) -> list[str]:
        found = findings(buckets, sums_of(counts, errors, weight), torch.tensor(drawn or counts))
        return [f"{'warning' if one.warning else 'info'}: {one.text}" for one in found]

    fine = [10.0, 5000, 5000, 0], [10.0, 900, 800, 0], [10.0, 5000, 5000, 0]
    assert said(*fine) == []
    (never,) = said([0.0, 50, 50, 0], [0.0, 9, 8, 0], [0.0, 50, 50, 0], [0.0, 20_000, 20_000, 0])
    assert never.startswith(
        "warning: of 40000 samples none had zero SNR, which is 0.1 % of the schedule's times"
    )
    assert said([0.0, 50, 50, 0], [0.0, 9, 8, 0], [0.0, 50, 50, 0]) == []  # too few to tell
    (dead,) = said([10.0, 5000, 5000, 0], [10.0, 900, 800, 0], [0.0, 5000, 5000, 0])
    assert (
        dead.startswith("warning: all 10 samples of zero SNR had weight 0, and taught")
        and "floor=0.05" in dead
    )
    (dead,) = said([10.0, 5000, 50, 0], [10.0, 900, 80, 0], [10.0, 5000, 0, 0])
    assert "all 50 samples of log SNR" in dead and "floor" not in dead
    (most,) = said([10.0, 500, 9490, 0], [10.0, 900, 80, 0], [10.0, 500, 9490, 0])
    assert (
        most.startswith("info: log SNR ")
        and "makes 91 % of the loss with 5 % of the samples" in most
    )
    (bad,) = [
        text
        for text in said([10.0, 500, 9490, 0], [10.0, math.nan, 80, 0], [10.0, 500, 9490, 0])
        if "finite" in text
    ]
    assert bad.startswith("warning: the loss of log SNR")


@pytest.mark.parametrize("name", SCHEDULES)
def test_plots(name: str) -> None:
    buckets = Buckets.of(SCHEDULES[name], 20)
    for sums in (buckets.zeros(CPU), torch.rand(4, 22), torch.full((4, 22), math.nan)):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert plot(buckets, sums, "step 1").startswith(b"\x89PNG")


# -- the callback ----------------------------------------------------------------------------------


class Log(DummyLogger):
    """Keeps what it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.metrics: dict[int, dict[str, float]] = {}
        self.images: list[tuple[str, int]] = []

    def log_metrics(self, metrics: Any, step: Any = None, **rest: Any) -> None:
        if any(name.startswith("loss_by_snr") for name in metrics):
            self.metrics[step] = dict(metrics)

    def log_image(self, key: str, images: list[Any], step: int) -> None:
        self.images.append((key, step))


class Seen(Toy):
    """Records every loss that it trains on, sample by sample."""

    def __init__(self, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.seen: list[tuple[int, Tensor, Tensor, Tensor]] = []

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        noised = self.noising(batch[0], step=self.trainer.global_step)
        prediction = self.predict(noised.x, noised.timesteps)
        error = ((prediction - noised.target) ** 2).flatten(1).mean(1).detach()
        self.seen.append((self.trainer.global_step, noised.log_snr, error, noised.weight))
        loss = noised.loss(prediction)
        self.losses.append(loss.item())
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.noising(batch[0], step=0).losses(batch[0])

    def val_dataloader(self) -> Any:
        return loader(8, shuffle=False)


def expected(seen: list[Any], first: int, last: int, number: int = 6) -> dict[str, float]:
    buckets = Buckets.of(SCHEDULE, number)
    sums = torch.zeros(4, len(buckets), dtype=torch.float64)
    for step, log_snr, error, weight in seen:
        if first <= step < last:
            index = buckets.index(log_snr)
            for i, e, w in zip(index.tolist(), error.tolist(), weight.tolist(), strict=True):
                sums[:, i] += torch.tensor([1, e, e * w, w], dtype=torch.float64)
    return means(buckets, sums)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_scalars_are_means_over_the_steps_between(tmp_path: Path, accumulate: int) -> None:
    log = Log()
    module = fresh(Seen)
    callback = LossBySNR(every_n_train_steps=3, buckets=6)
    train(tmp_path, callback, module=module, logger=log, accumulate_grad_batches=accumulate)
    assert list(log.metrics) == list(range(3, 12 // accumulate + 1, 3))
    for step, found in log.metrics.items():
        assert found == pytest.approx(expected(module.seen, step - 3, step), rel=1e-5)
    assert sum(callback._drawn) == 48
    names = [f"step_{step:08d}.png" for step in log.metrics]
    assert [name.split("/")[-1] for name in files(tmp_path)] == names
    assert log.images == [("loss_by_snr", step) for step in log.metrics]
    with Image.open(tmp_path / files(tmp_path)[0]) as image:
        assert image.size[0] > 400


@pytest.mark.parametrize("accumulate", [1, 2])
def test_training_is_bit_identical(tmp_path: Path, accumulate: int) -> None:
    plain = train(tmp_path / "a", module=fresh(Seen), accumulate_grad_batches=accumulate)
    counted = train(
        tmp_path / "b", LossBySNR(6), module=fresh(Seen), accumulate_grad_batches=accumulate
    )
    assert counted.losses == plain.losses and weights(counted) == weights(plain)
    assert not counted.noising._listeners


def test_a_failure_is_a_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = train(tmp_path / "a")
    for place, words in [
        ("add", "counts no further: RuntimeError: full"),
        ("index", "counts no further"),
    ]:
        with monkeypatch.context() as patch:
            patch.setattr(Buckets, place, _fail)
            with pytest.warns(UserWarning, match=words) as told:
                failed = train(tmp_path / "b", LossBySNR(6))
        assert len([one for one in told if "counts no further" in str(one.message)]) == 1
        assert failed.losses == plain.losses and weights(failed) == weights(plain)
    for place, words in [
        ("plot", "the plot failed"),
        ("means", "logging failed"),
        ("findings", "words failed"),
    ]:
        with monkeypatch.context() as patch:
            patch.setattr(f"alphabar.callbacks.loss_by_snr.{place}", _fail)
            with pytest.warns(
                UserWarning, match=f"LossBySNR: {words}: RuntimeError: full; training goes on"
            ):
                failed = train(tmp_path / "b", LossBySNR(6))
        assert failed.losses == plain.losses and weights(failed) == weights(plain)


def _fail(*given: Any, **named: Any) -> None:
    raise RuntimeError("full")


def test_errors_of_the_training_itself_end_the_listening(tmp_path: Path) -> None:
    class Broken(Seen):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            if batch_idx == 2:
                raise KeyError("broken")
            return super().training_step(batch, batch_idx)

    module = fresh(Broken)
    with pytest.raises(KeyError):
        train(tmp_path, LossBySNR(2), module=module)
    assert not module.noising._listeners


class Dead(Toy):
    """Every sample at the terminal step, whose weight is 0."""

    def __init__(self) -> None:
        super().__init__(SCHEDULE)
        self.noising = Noising(SCHEDULE, weighting="min_snr")

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        t = torch.full((len(batch[0]),), 999 if batch_idx % 2 else 400)
        noised = self.noising(batch[0], step=self.trainer.global_step, timesteps=t)
        return noised.loss(self.predict(noised.x, noised.timesteps))


@pytest.mark.filterwarnings("always")
def test_what_stands_out_is_said_once(tmp_path: Path) -> None:
    with pytest.warns(UserWarning) as told:
        train(
            tmp_path, LossBySNR(32, buckets=4), module=fresh(Dead), max_epochs=4, data=loader(128)
        )
    words = [str(one.message) for one in told]
    assert (
        len(
            [
                text
                for text in words
                if text.startswith("step 32: all 64 samples of zero SNR had weight 0")
            ]
        )
        == 1
    )
    never = [text for text in words if "samples none had log SNR" in text]
    assert len(never) == len({text.split("none had")[1] for text in never}) >= 1


class Silent(Toy):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.predict(batch[0], torch.zeros(len(batch[0]))).mean()


@pytest.mark.filterwarnings("always")
def test_losses_that_pass_it_by_are_named(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="step 2: no loss was computed by module.noising"):
        train(tmp_path, LossBySNR(2), module=fresh(Silent), max_epochs=1)


def test_resume_goes_on_counting(tmp_path: Path) -> None:
    keep = ModelCheckpoint(
        tmp_path, filename="{step}", auto_insert_metric_name=False, save_top_k=-1
    )
    train(tmp_path, LossBySNR(3), keep, max_epochs=1, enable_checkpointing=True)
    again, log = LossBySNR(3), Log()
    train(tmp_path, again, ckpt_path=tmp_path / "6.ckpt", logger=log)
    assert list(log.metrics) == [9, 12] and sum(again._drawn) == 48
    other = LossBySNR(3, buckets=5)
    train(tmp_path, other, ckpt_path=tmp_path / "6.ckpt")
    assert sum(other._drawn) == 24
    train(tmp_path, again, max_epochs=1)
    assert sum(again._drawn) == 24  # another run


def test_rehearsal_and_missing_matplotlib_write_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train(tmp_path, LossBySNR(1), fast_dev_run=True)
    assert files(tmp_path) == []
    monkeypatch.setattr(
        "alphabar.callbacks.loss_by_snr.importlib.util.find_spec", lambda name: None
    )
    log = Log()
    with pytest.warns(
        UserWarning, match=r"its plots need matplotlib, pip install 'alphabar\[matplotlib\]'"
    ):
        train(tmp_path, LossBySNR(6), logger=log)
    assert list(log.metrics) == [6, 12] and not list(tmp_path.rglob("*.png"))


def test_what_does_not_fit_is_named(tmp_path: Path) -> None:
    for arguments, words in [
        ({"every_n_train_steps": 0}, "every_n_train_steps must"),
        ({"buckets": True}, "buckets must"),
    ]:
        with pytest.raises(ValueError, match=words):
            LossBySNR(**arguments)

    class Bare(LightningModule):
        def training_step(self, batch: Any, batch_idx: int) -> None: ...

        def configure_optimizers(self) -> None: ...

    with pytest.raises(TypeError, match="Bare has no attribute noising"):
        train(tmp_path, LossBySNR(), module=Bare())
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="cannot write to the output folder"):
        train(tmp_path, LossBySNR(folder=tmp_path / "file" / "x"))
