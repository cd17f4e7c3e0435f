"""Previews: what they show, when, where they go, and that training does not notice them."""

import json
import pickle
import random
import subprocess
import sys
import warnings
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.loggers.logger import DummyLogger
from lightning.pytorch.strategies import (
    DDPStrategy,
    DeepSpeedStrategy,
    FSDPStrategy,
    ModelParallelStrategy,
    SingleDeviceStrategy,
    SingleDeviceXLAStrategy,
)
from PIL import Image
from torch import Tensor
from torch.utils.data import DistributedSampler

from alphabar.callbacks import ScheduleCheckpoint, ValidationSampling
from alphabar.callbacks.support.strategies import forward_mode_of
from alphabar.noising import NoiseSchedule
from alphabar.sampling import Sampler
from alphabar.sampling.inference import SeededNoise
from alphabar.training.images import image_grid, to_pixels
from alphabar.training.loops.forward import ForwardMode
from alphabar.training.previews import render as drawing
from callbacks_toy import (
    SCHEDULE,
    SHAPE,
    Toy,
    files,
    fresh,
    grids,
    loader,
    one_thread,
    train,
    trainer,
    weights,
)

pytestmark = pytest.mark.filterwarnings("ignore::Warning:lightning", "ignore::Warning:tensorboard")


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    with one_thread():
        yield


class Calls:
    """Stands in for a module's predict: counts, and does to the process what careless models do."""

    def __init__(self, fail_at: int | None = None, careless: bool = False) -> None:
        self.seen: list[tuple[Tensor, Tensor, dict[str, Any]]] = []
        self.fail_at, self.careless = fail_at, careless
        self.module: Toy | None = None

    def __call__(self, x: Tensor, timesteps: Tensor, **conditioning: Any) -> Tensor:
        self.seen.append((x, timesteps, conditioning))
        if self.careless:
            x = x + torch.rand_like(x) + random.random() + np.random.rand()
        if self.careless and self.module is not None:
            self.module.train()
        if self.fail_at is not None and len(self.seen) >= self.fail_at:
            raise RuntimeError("no memory left")
        return -x


def picture(path: Path) -> np.ndarray[Any, Any]:
    return np.asarray(Image.open(path))


def expected(
    module: Any, images: int, batch: int, method: str = "dpmpp_2m", steps: int = 4, **arguments: Any
) -> Any:
    """The grid that the sampler alone draws with a module's weights."""
    module.eval()
    sampler = Sampler(SCHEDULE, method, steps)
    padded = -(-images // batch) * batch
    seeds = [min(i, images - 1) for i in range(padded)]
    drawn = [
        sampler(module.predict, (batch, *SHAPE), seeds=seeds[i : i + batch], **arguments)
        for i in range(0, padded, batch)
    ]
    return image_grid(to_pixels(torch.cat(drawn)[:images])).numpy()


# Training does not notice


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Toy:
    return train(tmp_path_factory.mktemp("reference"))


def test_training_is_bit_identical_with_previews(tmp_path: Path, reference: Toy) -> None:
    previews = ValidationSampling(
        "euler_ancestral", steps=3, every_n_train_steps=2, num_images=3, batch_size=2
    )
    module = train(tmp_path, previews)
    assert module.losses == reference.losses and len(module.losses) == 12
    assert weights(module) == weights(reference)
    assert grids(tmp_path) == [f"previews/step_{step:08d}.png" for step in (2, 4, 6, 8, 10, 12)]


@pytest.mark.parametrize("fail_at", [2, 3, 1000])  # the first call is the trial before training
def test_training_is_bit_identical_with_careless_and_failing_previews(
    tmp_path: Path, reference: Toy, fail_at: int
) -> None:
    predict = Calls(fail_at, careless=True)
    predict.module = module = fresh()
    previews = ValidationSampling(steps=3, every_n_train_steps=3, num_images=2, predict=predict)
    if fail_at == 1000:
        train(tmp_path, previews, module=module)
    else:
        with pytest.warns(
            UserWarning,
            match="preview at step 12 failed: RuntimeError: no memory left .test_validation",
        ):
            train(tmp_path, previews, module=module)
    assert len(predict.seen) > 3
    assert module.losses == reference.losses and weights(module) == weights(reference)


def test_the_losses_notice_what_the_guards_prevent(
    tmp_path: Path, reference: Toy, monkeypatch: Any
) -> None:
    """The tests above can fail: without either guard the losses differ."""
    for guard in ("randomness_restored", "evaluating"):
        with monkeypatch.context() as patch:
            patch.setattr(drawing, guard, lambda *_: nullcontext())
            predict = Calls(careless=True)
            predict.module = module = fresh()
            train(
                tmp_path,
                ValidationSampling(steps=2, every_n_train_steps=2, predict=predict, num_images=1),
                module=module,
            )
        assert module.losses != reference.losses, guard


def test_flags_of_frozen_parts_are_restored_after_an_exception(tmp_path: Path) -> None:
    predict = Calls(fail_at=2, careless=True)
    predict.module = module = Toy()
    seen: list[dict[str, bool]] = []

    class Look(ValidationSampling):
        def on_train_batch_end(
            self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
        ) -> None:
            super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
            seen.append({name: m.training for name, m in pl_module.named_modules()})

    with pytest.warns(UserWarning, match="no memory left"):
        train(
            tmp_path,
            Look(steps=2, every_n_train_steps=1, predict=predict),
            module=module,
            max_steps=2,
        )
    for flags in seen:
        assert {name for name, training in flags.items() if not training} == {
            "frozen",
            "frozen.0",
            "frozen.1",
        }


def test_accumulation_neither_doubles_previews_nor_notices_them(tmp_path: Path) -> None:
    plain = train(tmp_path / "plain", accumulate_grad_batches=3, max_epochs=3)
    predict = Calls()
    previews = ValidationSampling(
        "euler", steps=2, every_n_train_steps=2, num_images=1, predict=predict
    )
    module = train(tmp_path / "seen", previews, accumulate_grad_batches=3, max_epochs=3)
    # the trial; at the optimizer steps 2, 4, 6, two evaluations each
    assert len(predict.seen) == 1 + 3 * 2
    assert grids(tmp_path / "seen") == [f"previews/step_{step:08d}.png" for step in (2, 4, 6)]
    assert module.losses == plain.losses and len(plain.losses) == 18


def test_tensors_cached_during_a_preview_stay_usable_in_training(tmp_path: Path) -> None:
    class Caching(Toy):
        def __init__(self) -> None:
            super().__init__()
            self.cache: dict[int, Tensor] = {}

        def predict(self, x: Tensor, timesteps: Tensor, **conditioning: Any) -> Tensor:
            scale = self.cache.setdefault(len(x), torch.ones_like(x) * 2)
            return super().predict(x, timesteps) * scale

    previews = ValidationSampling(
        "euler", steps=1, every_n_train_steps=1, num_images=3, batch_size=3, on_error="raise"
    )
    # the last batch is of 3, as the preview's
    module = train(tmp_path, previews, module=Caching(), data=loader(23))
    assert len(module.losses) == 12


def test_compiled_networks_get_no_graph_for_previews(tmp_path: Path) -> None:
    from torch._dynamo.utils import counters

    def graphs(*callbacks: Any) -> int:
        torch.compiler.reset()
        counters.clear()
        module = fresh()
        module.first = torch.compile(module.first, backend="eager")  # pyright: ignore
        train(tmp_path, *callbacks, module=module, max_steps=3)
        return counters["stats"]["unique_graphs"]

    alone = graphs()
    assert alone >= 1
    assert (
        graphs(
            ValidationSampling(
                "euler", steps=2, every_n_train_steps=1, batch_size=3, on_error="raise"
            )
        )
        == alone
    )
    torch.compiler.reset()


# What is shown


@pytest.mark.parametrize("method", ["dpmpp_2m", "euler_ancestral"])
def test_preview_shows_what_the_sampler_draws(tmp_path: Path, method: str) -> None:
    previews = ValidationSampling(method, steps=4, num_images=5, batch_size=2, on_error="raise")
    module = train(tmp_path, previews, max_epochs=1)
    assert grids(tmp_path) == ["previews/step_00000006.png"]
    shown = picture(tmp_path / "previews/step_00000006.png")
    np.testing.assert_array_equal(shown, expected(module, 5, 2, method))


def test_seed_shape_and_a_sampler_object(tmp_path: Path) -> None:
    sampler = Sampler(SCHEDULE, "ddim", 4, "leading", eta=0.5)
    previews = ValidationSampling(sampler, num_images=2, seed=5, shape=[3, 4, 12], on_error="raise")
    module = train(tmp_path, previews, module=Toy(sample_shape=None), max_epochs=1).eval()
    drawn = sampler(module.predict, (2, 3, 4, 12), seeds=[5, 6])
    shown = picture(tmp_path / "previews/step_00000006.png")
    np.testing.assert_array_equal(shown, image_grid(to_pixels(drawn)).numpy())
    again = pickle.loads(pickle.dumps(previews))  # also after a fit, which held a thread
    assert again.state_key == previews.state_key and again.state_dict() == {"last_step": 6}


def test_conditioning_rows_and_guidance(tmp_path: Path) -> None:
    label, empty = torch.linspace(-1, 1, 5), torch.zeros(1)
    previews = ValidationSampling(
        steps=4,
        num_images=5,
        batch_size=2,
        conditioning={"label": label},
        unconditional={"label": empty},
        guidance_scale=3.0,
        guidance_rescale=0.7,
        on_error="raise",
    )
    module = train(tmp_path, previews, max_epochs=1).eval()
    sampler, drawn = Sampler(SCHEDULE, "dpmpp_2m", 4), []
    for rows in ([0, 1], [2, 3], [4, 4]):
        arguments: Any = {
            "guidance_scale": 3.0,
            "guidance_rescale": 0.7,
            "unconditional": {"label": empty[[0, 0]]},
        }
        drawn.append(
            sampler(
                module.predict,
                (2, *SHAPE),
                seeds=rows,
                conditioning={"label": label[rows]},
                **arguments,
            )
        )
    shown = picture(tmp_path / "previews/step_00000006.png")
    np.testing.assert_array_equal(shown, image_grid(to_pixels(torch.cat(drawn)[:5])).numpy())


@pytest.mark.parametrize(
    ("precision", "dtype"),
    [("bf16-true", torch.bfloat16), ("bf16-mixed", torch.float32), ("64-true", torch.float64)],
)
def test_precision_is_that_of_training(tmp_path: Path, precision: Any, dtype: torch.dtype) -> None:
    class Seen(Toy):
        def predict(self, x: Tensor, timesteps: Tensor, **conditioning: Any) -> Tensor:
            if not torch.is_grad_enabled():
                label = conditioning["label"]
                seen.append(
                    (x.dtype, timesteps.dtype, label.dtype, torch.is_autocast_enabled("cpu"))
                )
                starts.append(x)
            return super().predict(x, timesteps)

    seen: list[Any] = []
    starts: list[Tensor] = []
    label = {"label": torch.zeros(2)}
    previews = ValidationSampling(
        "euler", steps=2, num_images=2, conditioning=label, on_error="raise"
    )
    train(tmp_path, previews, module=Seen(), max_epochs=1, precision=precision)
    assert set(seen) == {(dtype, torch.int64, dtype, precision == "bf16-mixed")}
    noise = SeededNoise((2, *SHAPE), 0, torch.device("cpu"))()
    torch.testing.assert_close(starts[0], noise[:1].to(dtype), rtol=0, atol=0)  # the trial
    # drawn in float32, whatever the precision
    torch.testing.assert_close(starts[1], noise.to(dtype), rtol=0, atol=0)


def test_shape_recorded_from_the_first_batch(tmp_path: Path) -> None:
    class Recording(Toy):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            self.sample_shape = tuple(batch[0].shape[1:])
            return super().training_step(batch, batch_idx)

    train(
        tmp_path,
        ValidationSampling("euler", steps=1, on_error="raise"),
        module=Recording(sample_shape=None),
    )
    assert len(grids(tmp_path)) == 2


# When


@pytest.mark.parametrize(
    ("trigger", "steps"),
    [({}, [6, 12, 18]), ({"every_n_epochs": 2}, [12]), ({"every_n_train_steps": 5}, [5, 10, 15])],
)
def test_triggers(tmp_path: Path, trigger: dict[str, int], steps: list[int]) -> None:
    train(tmp_path, ValidationSampling("euler", steps=1, num_images=1, **trigger), max_epochs=3)
    assert grids(tmp_path) == [f"previews/step_{step:08d}.png" for step in steps]


def test_sanity_check_and_validation_draw_nothing(tmp_path: Path) -> None:
    predict = Calls()
    previews = ValidationSampling(
        "euler", steps=1, num_images=1, predict=predict, every_n_train_steps=4
    )

    class Validate(Toy):
        def on_validation_epoch_end(self) -> None:
            validations.append((self.trainer.sanity_checking, len(predict.seen)))

    validations: list[tuple[bool, int]] = []
    module = Validate()
    validating = trainer(tmp_path, previews, num_sanity_val_steps=1, max_epochs=1)
    validating.fit(module, loader(), loader(4))
    assert validations == [(True, 0), (False, 2)]  # the trial and the preview at step 4
    validating.validate(module, loader(4), verbose=False)
    assert len(predict.seen) == 2


def test_fast_dev_run_rehearses_one_preview_and_writes_nothing(
    tmp_path: Path, monkeypatch: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    predict = Calls()
    previews = ValidationSampling(
        "heun", steps=20, every_n_train_steps=500, predict=predict, on_error="raise"
    )
    train(
        tmp_path,
        previews,
        ScheduleCheckpoint(),
        fast_dev_run=True,
        enable_checkpointing=True,
        logger=True,
    )
    # two steps: one from zero SNR, one of two evaluations
    assert [tuple(x.shape) for x, *_ in predict.seen] == [(1, *SHAPE)] * 3
    assert files(tmp_path) == []
    with pytest.raises(
        RuntimeError, match="preview at step 1 failed: RuntimeError: no memory left"
    ):
        train(
            tmp_path,
            ValidationSampling(predict=Calls(fail_at=2), on_error="raise"),
            fast_dev_run=True,
        )


# Resume


def _resumable(root: Path, *callbacks: Any, **settings: Any) -> Toy:
    """A run whose data order and losses are a function of epoch and step alone, so that a resumed
    one can equal it.
    """
    data: Any = loader()
    order = DistributedSampler(data.dataset, num_replicas=1, rank=0, shuffle=True)
    data = torch.utils.data.DataLoader(data.dataset, batch_size=4, sampler=order)
    checkpoints = ModelCheckpoint(
        root / "checkpoints", filename="{step}", every_n_train_steps=6, save_top_k=-1
    )
    module = fresh(dropout=0.0)
    callbacks = (checkpoints, ScheduleCheckpoint(), *callbacks)
    return train(root, *callbacks, module=module, data=data, enable_checkpointing=True, **settings)


def test_resume_repeats_no_preview_and_goes_on_as_if_uninterrupted(tmp_path: Path) -> None:
    def previews(predict: Any = None) -> ValidationSampling:
        return ValidationSampling(
            "euler_ancestral", steps=2, every_n_train_steps=3, num_images=2, predict=predict
        )

    whole = _resumable(tmp_path / "whole", previews(), max_epochs=4)
    _resumable(tmp_path / "parts", previews(), max_epochs=2)
    half = tmp_path / "parts/checkpoints/step=12.ckpt"
    state = torch.load(half, weights_only=True)["callbacks"]
    assert [v for k, v in state.items() if k.startswith("ValidationSampling")] == [
        {"last_step": 12}
    ]
    first = (tmp_path / "parts/previews/step_00000012.png").stat().st_mtime_ns
    rest = _resumable(tmp_path / "parts", previews(), max_epochs=4, ckpt_path=half)
    assert rest.losses == whole.losses[12:] and weights(rest) == weights(whole)
    assert (tmp_path / "parts/previews/step_00000012.png").stat().st_mtime_ns == first
    pngs = grids(tmp_path / "whole")
    assert len(pngs) == 8 and pngs == grids(tmp_path / "parts")
    for name in pngs:
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "parts" / name).read_bytes()


def test_resume_between_micro_batches_repeats_no_preview(tmp_path: Path) -> None:
    """With accumulation a resumed run passes the step of the checkpoint again."""
    settings: Any = {"accumulate_grad_batches": 2, "enable_checkpointing": True}
    save = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=2, save_top_k=-1)
    train(
        tmp_path,
        ValidationSampling("euler", steps=1, every_n_train_steps=2),
        save,
        max_steps=2,
        **settings,
    )
    predict = Calls()
    again = ValidationSampling(
        "euler", steps=1, every_n_train_steps=2, predict=predict, num_images=1
    )
    again_state = ValidationSampling("euler", steps=1, every_n_train_steps=2)
    assert again.state_key == again_state.state_key
    train(tmp_path, again, max_steps=3, ckpt_path=tmp_path / "step=2.ckpt", **settings)
    assert [tuple(x.shape) for x, *_ in predict.seen] == [(1, *SHAPE)]  # the trial


KILLED = """
import os, signal, sys
from pathlib import Path
sys.path.insert(0, sys.argv[2])
import torch
from test_validation_sampling import _resumable, ValidationSampling
from alphabar.training.loops.background import pictures_of

torch.set_num_threads(1)

class Killed(ValidationSampling):
    def _preview(self, trainer, module):
        super()._preview(trainer, module)
        if trainer.global_step == 9:
            assert pictures_of(trainer).wait(60)
            os.kill(os.getpid(), signal.SIGKILL)

Killed.__qualname__ = "ValidationSampling"
_resumable(Path(sys.argv[1]), Killed("euler_ancestral", steps=2, every_n_train_steps=3, num_images=2), max_epochs=3)
"""


def test_kill_and_resume(tmp_path: Path) -> None:
    run = [sys.executable, "-c", KILLED, str(tmp_path / "parts"), str(Path(__file__).parent)]
    assert subprocess.run(run, capture_output=True, timeout=120).returncode == -9
    assert grids(tmp_path / "parts/previews") == [
        "step_00000003.png",
        "step_00000006.png",
        "step_00000009.png",
    ]
    killed = (tmp_path / "parts/previews/step_00000009.png").read_bytes()
    last = tmp_path / "parts/checkpoints/step=6.ckpt"
    previews = ValidationSampling("euler_ancestral", steps=2, every_n_train_steps=3, num_images=2)
    rest = _resumable(tmp_path / "parts", previews, max_epochs=3, ckpt_path=last)
    whole = _resumable(tmp_path / "whole", max_epochs=3)
    assert rest.losses == whole.losses[6:] and weights(rest) == weights(whole)
    assert (tmp_path / "parts/previews/step_00000009.png").read_bytes() == killed
    assert len(grids(tmp_path / "parts/previews")) == 6


# Where


def test_tensorboard_holds_the_same_picture(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    logger = TensorBoardLogger(tmp_path, name="run", version="a")
    train(tmp_path, ValidationSampling("euler", steps=1, num_images=3), logger=logger, max_epochs=2)
    events = EventAccumulator(str(tmp_path / "run/a"), size_guidance={"images": 0})
    events.Reload()
    assert events.Tags()["images"] == ["previews"]
    shown = events.Images("previews")
    assert [event.step for event in shown] == [6, 12]
    for event in shown:
        (tmp_path / "event.png").write_bytes(event.encoded_image_string)
        file = tmp_path / f"run/a/previews/step_{event.step:08d}.png"
        np.testing.assert_array_equal(picture(tmp_path / "event.png"), picture(file))


class Album(DummyLogger):
    """A logger with log_image, as Weights & Biases has it, that may be out of order."""

    def __init__(self, broken: bool = False) -> None:
        super().__init__()
        self.shown: list[Any] = []
        self.broken = broken

    def log_image(self, key: str, images: list[Any], step: int) -> None:
        if self.broken:
            raise ConnectionError("no network")
        self.shown.append((key, images[0].size, step))


def test_loggers_of_every_kind(tmp_path: Path) -> None:
    album, csv = Album(), CSVLogger(tmp_path, name="csv")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        train(tmp_path, ValidationSampling("euler", steps=1, num_images=2), logger=[csv, album])
    told = [str(w.message) for w in caught if "takes no images" in str(w.message)]
    assert told == [
        f"CSVLogger takes no images; previews are in {str(Path(csv.log_dir) / 'previews')!r} alone"
    ]
    assert album.shown == [("previews", (22, 12), 6), ("previews", (22, 12), 12)]


def test_a_broken_logger_costs_neither_training_nor_the_file_nor_other_loggers(
    tmp_path: Path, reference: Toy
) -> None:
    broken, album = Album(broken=True), Album()
    folder = tmp_path / "pictures"
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        module = train(
            tmp_path, ValidationSampling("euler", steps=1, folder=folder), logger=[broken, album]
        )
    told = [str(w.message) for w in caught if "Album" in str(w.message)]  # once, and the sum of it
    assert (
        len(told) == 2
        and "the preview at step 6 failed: Album: ConnectionError: no network; training" in told[0]
    )
    assert told[1] == "ValidationSampling: 2 times in this run at Album: ConnectionError"
    assert grids(folder) == ["step_00000006.png", "step_00000012.png"]
    assert [step for *_, step in album.shown] == [6, 12] and album.shown[0][0] == "pictures"
    assert module.losses == reference.losses
    with pytest.raises(RuntimeError, match="no network"):
        train(
            tmp_path,
            ValidationSampling("euler", steps=1, folder=folder, on_error="raise"),
            logger=broken,
        )


def test_a_folder_that_vanishes_or_fills_up_costs_a_warning(tmp_path: Path, reference: Toy) -> None:
    class Blocked(ValidationSampling):
        def on_train_start(self, trainer: Any, pl_module: Any) -> None:
            super().on_train_start(trainer, pl_module)
            (tmp_path / "previews").rmdir()
            (tmp_path / "previews").write_text("in the way")

    with pytest.warns(
        UserWarning, match="the preview at step 6 failed: cannot write to .*previews"
    ):
        module = train(tmp_path, Blocked("euler", steps=1))
    assert module.losses == reference.losses and files(tmp_path) == ["previews"]


@pytest.mark.parametrize("given", [True, False])
def test_unwritable_folder_fails_before_training(tmp_path: Path, given: bool) -> None:
    (tmp_path / "previews").write_text("a file where the folder should be")
    module = Toy()
    previews = ValidationSampling(folder=tmp_path / "previews/deep" if given else None)
    with pytest.raises(
        OSError, match=r"cannot write to the output folder '.*previews.*; name a folder"
    ):
        train(tmp_path, previews, module=module)
    assert module.losses == []


def test_two_instances_side_by_side(tmp_path: Path, reference: Toy) -> None:
    logger = TensorBoardLogger(tmp_path, name=None, version="")
    pair = [ValidationSampling("euler", steps=steps, num_images=2) for steps in (1, 4)]
    save = ModelCheckpoint(tmp_path, filename="{step}")
    module = train(tmp_path, *pair, save, logger=logger, enable_checkpointing=True)
    assert module.losses == reference.losses
    names = grids(tmp_path)
    assert names == [
        f"{folder}/step_{step:08d}.png" for folder in ("previews", "previews_2") for step in (6, 12)
    ]
    for folder, steps in (("previews", 1), ("previews_2", 4)):
        shown = picture(tmp_path / folder / "step_00000012.png")
        np.testing.assert_array_equal(shown, expected(module, 2, 2, "euler", steps))
    saved = torch.load(tmp_path / "step=12.ckpt", weights_only=True)["callbacks"]
    assert len([key for key in saved if key.startswith("ValidationSampling")]) == 2


def test_two_instances_in_one_place_are_refused(tmp_path: Path) -> None:
    pair = [ValidationSampling(steps=i, folder=tmp_path / str(i) / "same") for i in (1, 2)]
    with pytest.raises(
        ValueError, match="two ValidationSampling callbacks have folders named 'same'"
    ):
        train(tmp_path, *pair)


# Bad input fails at once, or before training


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"sampler": "dpm2m"}, "unknown method 'dpm2m'; did you mean 'DPM2', "),
        ({"steps": 0}, "steps must be an integer of at least 1, got 0"),
        ({"steps": 2.5}, "steps must be an integer"),
        ({"num_images": 0}, "num_images must be"),
        ({"batch_size": True}, "batch_size must be"),
        ({"every_n_train_steps": 0}, "every_n_train_steps must be"),
        ({"every_n_epochs": -1}, "every_n_epochs must be"),
        (
            {"every_n_train_steps": 5, "every_n_epochs": 1},
            "steps or epochs, not both; got every_n_train_steps=5",
        ),
        ({"on_error": "rais"}, "unknown on_error 'rais'; did you mean 'raise'"),
        ({"shape": (16000,)}, r"shape \(channels, height, width\), got \(16000,\)"),
        (
            {"conditioning": {"y": torch.zeros(3)}},
            "conditioning 'y' must have a row for each of 16 images",
        ),
        ({"conditioning": {"a": {"b": torch.zeros(3)}}}, "conditioning 'a' 'b' must have"),
        ({"guidance_scale": 7.0}, "needs unconditional="),
        (
            {"guidance_scale": 7.0, "conditioning": {"a": 1}, "unconditional": {"b": 1}},
            "give both the same",
        ),
        ({"sampler": Sampler(SCHEDULE, steps=5), "steps": 6}, "5 steps, and steps=6 contradicts"),
    ],
)
def test_bad_arguments_fail_at_construction(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ValidationSampling(**arguments)


class NoSchedule(Toy):
    def __init__(self) -> None:
        super().__init__()
        del self.noising


class NoShape(Toy):
    def __init__(self) -> None:
        super().__init__()
        del self.sample_shape


class NoPredict(Toy):
    predict: Any = None


@pytest.mark.parametrize(
    ("make", "arguments", "message"),
    [
        (Toy, {"steps": 1001}, "between 1 and the 1000 training timesteps, got 1001"),
        (
            Toy,
            {"sampler": Sampler(NoiseSchedule.flow(), steps=3)},
            r"made for flow\(.*trains on discrete\(",
        ),
        (NoSchedule, {}, "NoSchedule has no noise schedule"),
        (NoShape, {}, "NoShape has no attribute sample_shape"),
        (NoPredict, {}, "NoPredict has no method predict"),
        (lambda: Toy(sample_shape=(16000,)), {}, r"got \(16000,\)"),
    ],
)
def test_what_does_not_fit_the_module_fails_before_training(
    tmp_path: Path, make: Any, arguments: dict[str, Any], message: str
) -> None:
    module = make()
    with pytest.raises((ValueError, TypeError), match=message):
        train(tmp_path, ValidationSampling(**arguments), module=module)
    assert module.losses == [] and files(tmp_path) == []


def test_a_schedule_alone_and_functions_given_are_enough(tmp_path: Path) -> None:
    class Bare(Toy):
        def __init__(self) -> None:
            super().__init__()
            self._noising, self.schedule = self.noising, SCHEDULE
            del self.noising, self.sample_shape

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            noised = self._noising(batch[0], step=self.trainer.global_step)
            return noised.loss(Toy.predict(self, noised.x, noised.timesteps))

        predict: Any = None

    predict = Calls()
    previews = ValidationSampling(
        "euler", steps=2, shape=SHAPE, num_images=2, predict=predict, on_error="raise"
    )
    train(tmp_path, previews, module=Bare(), max_epochs=1)
    assert len(predict.seen) == 1 + 2 and grids(tmp_path) == ["previews/step_00000006.png"]


def test_nan_and_an_unknown_shape_are_told(tmp_path: Path) -> None:
    def broken(x: Tensor, t: Tensor) -> Tensor:
        return torch.where(torch.arange(len(x)).view(-1, 1, 1, 1) == 1, torch.nan, -x)

    previews = ValidationSampling("euler", steps=2, num_images=2, predict=broken, on_error="raise")
    with pytest.warns(
        UserWarning, match=r"preview at step 6 has NaN in 1 of 2 images, 50.0% of the pixels"
    ):
        train(tmp_path, previews, max_epochs=1)
    shown = picture(tmp_path / "previews/step_00000006.png")
    # the other image is as it was
    assert (shown[2:6, 12:16] == 0).all() and (shown[2:6, 16:20] == 255).all()
    whole = ValidationSampling(
        "euler", steps=2, num_images=2, predict=lambda x, t: -x, folder=tmp_path / "whole"
    )
    train(tmp_path, whole, max_epochs=1)
    np.testing.assert_array_equal(
        shown[:, :12], picture(tmp_path / "whole/step_00000006.png")[:, :12]
    )
    with pytest.warns(UserWarning, match="the shape of a sample is not known"):
        train(
            tmp_path / "none",
            ValidationSampling(steps=2),
            module=Toy(sample_shape=None),
            max_epochs=1,
        )
    assert files(tmp_path / "none") == []


def test_objects_with_sample_and_raise(tmp_path: Path) -> None:
    class Output:
        def __init__(self, x: Tensor) -> None:
            self.sample = torch.zeros_like(x)

    previews = ValidationSampling(
        "euler", steps=1, num_images=2, predict=lambda x, t: Output(x), on_error="raise"
    )
    train(tmp_path, previews, max_epochs=1)
    with pytest.raises(
        RuntimeError, match="preview at step 6 failed: RuntimeError: no memory left"
    ):
        train(tmp_path, ValidationSampling(steps=1, predict=Calls(fail_at=2), on_error="raise"))


def test_how_each_strategy_is_entered() -> None:
    def deepspeed(stage: int) -> Any:
        strategy = DeepSpeedStrategy.__new__(DeepSpeedStrategy)
        strategy.config = {"zero_optimization": {"stage": stage}}
        return strategy

    plain, wrapped = ForwardMode(), ForwardMode(sharded=True, wrapped=True)
    assert (
        forward_mode_of(SingleDeviceStrategy(torch.device("cpu")))
        == forward_mode_of(DDPStrategy())
        == plain
    )
    assert forward_mode_of(deepspeed(2)) == plain and forward_mode_of(deepspeed(3)) == wrapped
    assert forward_mode_of(FSDPStrategy()) == wrapped
    assert forward_mode_of(ModelParallelStrategy()) == ForwardMode(sharded=True)
    with pytest.raises(ValueError, match="got SingleDeviceXLAStrategy; use one of these"):
        forward_mode_of(SingleDeviceXLAStrategy.__new__(SingleDeviceXLAStrategy))


def test_callback_is_picklable_and_its_state_is_plain() -> None:
    previews = ValidationSampling(
        Sampler(SCHEDULE, "DPM++ 2M Karras", 7), conditioning={"y": torch.zeros(16)}
    )
    again = pickle.loads(pickle.dumps(previews))
    assert again.state_key == previews.state_key and again.steps == 7
    assert json.loads(json.dumps(previews.state_dict())) == {"last_step": 0}
