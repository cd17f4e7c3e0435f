"""Disks that fill up, loggers that hang, models that cannot be drawn: training goes on the same, or
does not begin.
"""

import errno
import json
import os
import threading
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import pytest
import safetensors
import torch
from diffusers import StableDiffusionPipeline
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers.logger import DummyLogger
from PIL import Image
from torch import Tensor

from alphabar.callbacks import EMA, LossBySNR, ScheduleCheckpoint, ValidationSampling
from alphabar.noising import NoiseSchedule
from alphabar.noising.utils import atomic as files
from alphabar.training import PowerFunction
from alphabar.training.checkpoints import storage
from alphabar.training.ema import posthoc
from alphabar.training.loops import background
from alphabar.training.loops.background import Background
from alphabar.training.loops.isolation import buffers_restored
from callbacks_toy import SHAPE, Toy, fresh, grids, one_thread, train, weights
from tiny_pipeline import make_pipeline
from two_processes import last_words, run_two_ranks

pytestmark = pytest.mark.filterwarnings("ignore::Warning:lightning", "ignore::Warning:tensorboard")
SCRIPT = Path(__file__).parent / "bad_weather_two_ranks.py"


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    with one_thread():
        yield


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Toy:
    return train(tmp_path_factory.mktemp("reference"))


def previews(**settings: Any) -> ValidationSampling:
    return ValidationSampling(
        "euler", **{"steps": 2, "num_images": 2, "every_n_train_steps": 2, **settings}
    )


def of_ours() -> list[threading.Thread]:
    """The threads that write and log; those that noise batches wait for the next batch."""
    named = [thread for thread in threading.enumerate() if thread.name.startswith("alphabar")]
    return [thread for thread in named if not thread.name.startswith("alphabar-noise")]


# A disk that is full, at the lowest level of every write


class FillsUp(Callback):
    """From the second step on nothing can be written any more."""

    def __init__(self, patch: pytest.MonkeyPatch, where: str) -> None:
        self.patch, self.where = patch, where

    def on_train_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.global_step == 1:
            FULL[self.where](self.patch)


def full(*_: Any, **__: Any) -> Any:
    raise OSError(errno.ENOSPC, "No space left on device")


def full_safetensors(*_: Any, **__: Any) -> Any:
    raise safetensors.SafetensorError("I/O error: No space left on device (os error 28)")


FULL: dict[str, Any] = {
    "temporary files": lambda patch: patch.setattr(files.tempfile, "mkstemp", full),
    "syncing": lambda patch: patch.setattr(os, "fsync", full),
    "renaming": lambda patch: patch.setattr(os, "replace", full),
    "safetensors": lambda patch: patch.setattr(posthoc, "save_file", full_safetensors),
    "stores": lambda patch: patch.setattr(storage.Folder, "write", full),
    "lines": lambda patch: patch.setattr(storage.Folder, "append", full),
}


@pytest.mark.parametrize(
    "where",
    [
        pytest.param(w, marks=[pytest.mark.slow] if w in ("syncing", "temporary files") else [])
        for w in FULL
    ],
)
def test_a_full_disk_is_said_once_and_training_is_the_same(
    tmp_path: Path, reference: Toy, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    ours = [
        previews(weights="both"),
        EMA(PowerFunction(sigma_rel=0.1), snapshot_every_n_steps=2, validate=False),
        LossBySNR(every_n_train_steps=2, buckets=3),
        ScheduleCheckpoint(),
    ]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        module = train(tmp_path, FillsUp(monkeypatch, where), *ours)
    assert module.losses == reference.losses and weights(module) == weights(reference)
    told = [str(w.message) for w in caught if "; training goes on (" in str(w.message)]
    # by ValidationSampling, LossBySNR and EMA, those that write so; once each and not at all six
    # steps. How many have written before the disk is full depends on the threads that write
    most = {"safetensors": 1, "stores": 1, "lines": 1}
    assert 1 <= len(told) <= most.get(where, 3) and len(set(told)) == len(told), told
    sums = [str(w.message) for w in caught if "times in this run at" in str(w.message)]
    assert len(sums) == len(told) and not of_ours()


def test_the_folders_of_checkpoints_are_worth_a_warning_and_the_checkpoint_is_not(
    tmp_path: Path, reference: Toy, monkeypatch: pytest.MonkeyPatch
) -> None:
    save = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=3, save_top_k=-1)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        module = train(
            tmp_path,
            FillsUp(monkeypatch, "stores"),
            ScheduleCheckpoint(per_checkpoint=True),
            save,
            enable_checkpointing=True,
        )
    told = [
        str(w.message)
        for w in caught
        if "the noise schedule could not be written" in str(w.message)
    ]
    assert (
        len(told) == 1
        and "No space left" in told[0]
        and "ScheduleCheckpoint: 4 times" in str(caught[-1].message)
    )
    assert module.losses == reference.losses and len(list(tmp_path.glob("*.ckpt"))) == 4
    monkeypatch.setattr(torch, "save", full)  # what Lightning's own checkpoint needs
    with pytest.raises(OSError, match="No space left"):
        train(
            tmp_path / "b",
            ModelCheckpoint(tmp_path / "b", every_n_train_steps=3),
            enable_checkpointing=True,
        )


def test_a_snapshot_that_is_not_written_is_an_os_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(posthoc, "save_file", full_safetensors)
    with pytest.raises(
        OSError, match=r"cannot write '.*ema_00000001_0\.1.safetensors': .*No space left"
    ):
        posthoc.save_snapshot(tmp_path, {"w": torch.ones(1)}, step=1, sigma_rel=0.1)
    assert list(tmp_path.iterdir()) == []


# Loggers and disks that are slow


class Slow(DummyLogger):
    def __init__(self, seconds: float = 0.3) -> None:
        super().__init__()
        self.seconds, self.threads, self.steps, self.hold = (
            seconds,
            set[str](),
            list[int](),
            threading.Event(),
        )

    def log_image(self, key: str, images: list[Any], step: int) -> None:
        self.threads.add(threading.current_thread().name)
        self.hold.wait(self.seconds)
        self.steps.append(step)


def test_a_slow_logger_does_not_hold_training_up_and_misses_nothing(
    tmp_path: Path, reference: Toy
) -> None:
    logger = Slow()
    waited: list[int] = []

    class Look(Callback):
        def on_train_end(self, trainer: Any, pl_module: Any) -> None:
            waited.append(len(logger.steps))

    module = train(tmp_path, Look(), previews(), logger=logger)
    assert waited[0] < 6 and logger.steps == [2, 4, 6, 8, 10, 12]
    assert logger.threads == {"alphabar-background"} and not of_ours()
    assert module.losses == reference.losses and weights(module) == weights(reference)


def test_what_was_drawn_is_shown_before_a_checkpoint_says_so(tmp_path: Path) -> None:
    logger = Slow()
    shown: list[tuple[int, list[int]]] = []

    class Look(Callback):
        def on_save_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: Any) -> None:
            shown.append((trainer.global_step, list(logger.steps)))

    save = ModelCheckpoint(tmp_path, every_n_train_steps=4)
    train(tmp_path, previews(), Look(), save, logger=logger, enable_checkpointing=True)
    assert shown[0] == (4, [2, 4]) and shown[1] == (8, [2, 4, 6, 8])


def test_a_logger_that_hangs_costs_what_does_not_fit_and_says_so(
    tmp_path: Path, reference: Toy, monkeypatch: pytest.MonkeyPatch
) -> None:
    logger = Slow(seconds=1000)
    for name in ("AT_THE_END", "FOR_ROOM"):
        monkeypatch.setattr(background, name, 0.5)
    monkeypatch.setattr("alphabar.callbacks.previews.callback.AT_THE_END", 0.5)
    monkeypatch.setattr("alphabar.training.publishing.publisher.AT_THE_END", 0.5)
    monkeypatch.setattr(Background.wait_for_room, "__defaults__", (0.5,))
    lane = Background(room=2)
    monkeypatch.setattr("alphabar.training.publishing.publisher.pictures_of", lambda owner: lane)
    start = time.monotonic()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        module = train(tmp_path, previews(), logger=logger)
    told = [
        str(w.message) for w in caught if w.category is UserWarning and "preview" in str(w.message)
    ]
    assert (
        "step 6 failed: its publication: TimeoutError: 2 others are still being published"
        in told[0]
    )
    assert any("2 previews are still being published after 0.5 seconds" in text for text in told)
    assert module.losses == reference.losses and time.monotonic() - start < 20
    logger.hold.set()
    assert lane.wait(10)


def test_no_thread_is_left_after_a_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    def slow_to_end(lane: Background, work: Any = Background._work) -> None:
        work(lane)
        time.sleep(0.05)

    monkeypatch.setattr(Background, "_work", slow_to_end)
    lane = Background()
    lane.submit(lambda: None)
    assert lane.wait(10) and not of_ours()


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_an_error_in_training_waits_for_what_was_drawn(
    tmp_path: Path, error: type[BaseException]
) -> None:
    class Fails(Callback):
        def on_train_batch_end(
            self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
        ) -> None:
            if trainer.global_step == 3:
                raise error("of the user's own")

    logger = Slow()
    with pytest.raises((RuntimeError, SystemExit, KeyboardInterrupt)):
        train(tmp_path, previews(), Fails(), logger=logger)
    assert logger.steps == [2] and not of_ours()


def test_workers_that_are_forked_while_pictures_are_published(
    tmp_path: Path, reference: Toy
) -> None:
    from torch.utils.data import DataLoader

    from callbacks_toy import loader

    data = DataLoader(loader().dataset, batch_size=4, num_workers=1, multiprocessing_context="fork")
    module = train(
        tmp_path, previews(every_n_train_steps=1), logger=Slow(0.1), data=data, max_epochs=2
    )
    assert len(module.losses) == 12 and len(grids(tmp_path)) == 12


def test_the_thread_ends_and_begins_with_the_work() -> None:
    lane, seen = Background(room=1), []
    hold = threading.Event()
    lane.submit(hold.wait)
    lane.submit(lambda: 1 / 0, seen.append)
    assert lane.pending == 2 and not lane.wait(0.05) and not lane.wait_for_room(0.05)
    start = time.monotonic()
    assert not lane.wait_for_room(60) and time.monotonic() - start < 5  # nothing moved since
    hold.set()
    assert lane.wait(10) and lane.wait_for_room(10) and isinstance(seen[0], ZeroDivisionError)
    deadline = time.monotonic() + 10
    while of_ours() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not of_ours()


# Two ranks, and a process group that waits for five seconds


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    root = tmp_path_factory.mktemp("ranks")
    assert run_two_ranks(SCRIPT, root, timeout=600) == [0, 0], last_words(root)
    return [json.loads((root / f"rank{rank}.json").read_text()) for rank in range(2)]


@pytest.mark.slow
@pytest.mark.parametrize("scenario", ["logger", "raising", "disk", "encode", "decode"])
def test_a_rank_that_works_alone_beyond_the_timeout_ends_nothing(
    ranks: list[dict[str, Any]], scenario: str
) -> None:
    for report in ranks:
        assert report[scenario]["error"] is None and len(report["none"]["losses"]) == 6
        assert report[scenario]["losses"] == report["none"]["losses"]
    assert ranks[0][scenario]["seconds"] > ranks[0]["timeout"]
    assert ranks[0][scenario]["shown"] == [2, 4, 6]


# What a preview needs is tried before training


def fails(module: Toy, tmp_path: Path, words: str, *, losses: int = 0, **settings: Any) -> None:
    with pytest.raises((RuntimeError, ValueError), match=words):
        train(
            tmp_path,
            ValidationSampling(**{"sampler": "euler", "steps": 2, **settings}),
            module=module,
        )
    assert len(module.losses) == losses


def test_what_cannot_be_drawn_is_known_before_training(tmp_path: Path) -> None:
    def broken(x: Tensor, t: Tensor) -> Tensor:
        raise KeyError("no such layer")

    for on_error in ("warn", "raise"):
        fails(
            fresh(),
            tmp_path,
            "previews cannot be drawn; .* KeyError: 'no such layer'",
            predict=broken,
            on_error=on_error,
        )
    fails(
        fresh(),
        tmp_path,
        "unexpected keyword",
        predict=lambda x, t: x,
        conditioning={"y": torch.zeros(16)},
    )
    fails(
        fresh(),
        tmp_path,
        r"decode= must return images .*, got \(1, 192\)",
        decode=lambda z: z.flatten(1),
    )


@pytest.mark.parametrize(
    ("shape", "words"), [((2, 3, 4, 8, 8), "decode="), ((2, 16000), "sample_rate=.* or decode=")]
)
def test_what_has_no_picture_needs_a_decoder(
    tmp_path: Path, shape: tuple[int, ...], words: str
) -> None:
    with pytest.raises(ValueError, match=words):
        ValidationSampling(shape=shape)
    fails(Toy(sample_shape=shape), tmp_path, words)
    for decode, frames in ((lambda x: x[:, :, 0], 1), (None, 4)):
        drawn = ValidationSampling(
            "euler",
            steps=2,
            shape=(3, 4, 8, 8),
            predict=lambda x, t: -x,
            decode=decode,
            num_images=2,
            on_error="raise",
        )
        train(tmp_path / str(frames), drawn, max_epochs=1)
        (grid,) = grids(tmp_path / str(frames))
        with Image.open(tmp_path / str(frames) / grid) as image:
            assert (grid, getattr(image, "n_frames", 1)) == ("previews/step_00000006.png", frames)


class Recording(Toy):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.sample_shape = tuple(batch[0].shape[1:])
        return super().training_step(batch, batch_idx)


def test_a_preview_before_training_needs_the_shape(tmp_path: Path) -> None:
    unknown = fresh(Recording, sample_shape=None)
    fails(
        unknown,
        tmp_path,
        r"extra_steps has 0.*give shape=\(channels, height, width\)",
        extra_steps=(0,),
    )
    known = ValidationSampling(
        "euler", steps=2, num_images=2, extra_steps=(0,), shape=SHAPE, on_error="raise"
    )
    train(tmp_path, known, module=fresh(Recording, sample_shape=None), max_epochs=1)
    assert grids(tmp_path) == ["previews/step_00000000.png", "previews/step_00000006.png"]


def test_where_the_shape_comes_with_the_first_batch_so_does_the_trial(tmp_path: Path) -> None:
    def broken(x: Tensor, t: Tensor) -> Tensor:
        raise RuntimeError("no")

    fails(
        fresh(Recording, sample_shape=None),
        tmp_path,
        "was tried, at step 1: RuntimeError: no",
        losses=1,
        predict=broken,
    )


def test_the_trial_gives_buffers_and_generators_back(tmp_path: Path, reference: Toy) -> None:
    class Counting(Toy):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("calls", torch.zeros(2))

        def predict(self, x: Tensor, timesteps: Tensor, **conditioning: Any) -> Tensor:
            if not torch.is_grad_enabled():
                self.calls.add_(torch.rand(2))
            return super().predict(x, timesteps) * (1 + cast(Tensor, self.calls)[0])

    module = train(tmp_path, previews(), module=fresh(Counting))
    assert module.losses == reference.losses and not module.calls.any()


def test_buffers_that_are_replaced_come_back() -> None:
    net = torch.nn.Module()
    net.register_buffer("cache", torch.ones(2))
    before = net.cache
    with pytest.raises(RuntimeError), buffers_restored(net):
        net.cache.mul_(3)
        net.cache = torch.zeros(5)
        raise RuntimeError
    assert net.cache is before and net.cache.tolist() == [1, 1]


def test_a_pipeline_of_a_flow_draws(tmp_path: Path) -> None:
    """One that was made for noise schedules too, which asks its scheduler for more than diffusers'
    flow schedulers have.
    """

    class Holds(Toy):
        def __init__(self) -> None:
            super().__init__(schedule=NoiseSchedule.flow(shift=3.0))
            self.pipe = [StableDiffusionPipeline.from_pretrained(make_pipeline(tmp_path / "made"))]
            self.unet = self.pipe[0].unet

    made = ValidationSampling(
        "euler",
        steps=3,
        pipeline=lambda module: module.pipe[0],
        prompts=("a red square", "a blue square"),
        shape=(3, 16, 16),
        guidance_scale=2.0,
        on_error="raise",
    )
    train(tmp_path, made, module=fresh(Holds), max_epochs=1)
    assert grids(tmp_path) == ["previews/step_00000006.png"]


def test_a_pipeline_that_cannot_draw_the_schedule_is_known_before_training(tmp_path: Path) -> None:
    from diffusers import DDIMPipeline, DDIMScheduler

    from test_callbacks_previewing import WithUNet

    module = fresh(WithUNet)
    module.noising = type(module.noising)(NoiseSchedule.flow(), seed=3)
    fails(
        module,
        tmp_path,
        "previews cannot be drawn; .*eta",
        pipeline=lambda own: DDIMPipeline(own.unet, DDIMScheduler()),
    )
