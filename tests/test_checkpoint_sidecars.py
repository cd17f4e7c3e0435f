"""A folder of its own for every checkpoint, and checkpoints of every form: weights-only, linked,
remote, written late.
"""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import diffusers
import fsspec
import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins.io import AsyncCheckpointIO

from alphabar.callbacks import ScheduleCheckpoint
from alphabar.noising import NoiseSchedule
from alphabar.noising.io.files import CONFIG_NAME, EXACT_NAME
from alphabar.sampling import Sampler
from alphabar.training import schedule_from_checkpoint
from alphabar.training.checkpoints.read import read_checkpoint
from alphabar.training.checkpoints.sidecars import (
    own_sidecar,
    read_sidecar,
    sidecar_folder,
    write_sidecar,
)
from alphabar.training.checkpoints.storage import Folder
from callbacks_toy import SCHEDULE, Toy, files, fresh, loader, one_thread, train, trainer

OTHER = {
    "beta_end": NoiseSchedule.scaled_linear(
        beta_end=0.02, prediction="v_prediction"
    ).zero_terminal_snr(),
    "prediction": SCHEDULE.with_prediction("sample"),
    "shift": NoiseSchedule.flow(shift=3.0),
}
TRAINED = {"beta_end": SCHEDULE, "prediction": SCHEDULE, "shift": NoiseSchedule.flow(shift=2.0)}
VERBS = ("fit", "validate", "test", "predict")

pytestmark = pytest.mark.filterwarnings("ignore::Warning:lightning", "ignore::Warning:tensorboard")


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    with one_thread():
        yield


def save(
    root: Path,
    schedule: NoiseSchedule = SCHEDULE,
    own: bool = True,
    plugins: Any = None,
    **keep: Any,
) -> Toy:
    """Train two epochs of six steps with a checkpoint every three steps, the last of which is kept."""
    checkpoints = ModelCheckpoint(
        keep.pop("dirpath", root), filename="{step}", every_n_train_steps=3, **keep
    )
    callbacks = ScheduleCheckpoint(per_checkpoint=own), checkpoints
    return train(
        root,
        *callbacks,
        module=fresh(schedule=schedule),
        enable_checkpointing=True,
        plugins=plugins,
    )


def use(verb: str, path: Any, root: Path, schedule: NoiseSchedule, **arguments: Any) -> Toy:
    module = fresh(schedule=schedule)
    ready = trainer(root, ScheduleCheckpoint(**arguments), max_epochs=3, inference_mode=False)
    getattr(ready, verb)(module, loader(), ckpt_path=path)
    return module


FOLDER = [EXACT_NAME, CONFIG_NAME]


def test_each_checkpoint_has_a_folder_that_goes_with_it(tmp_path: Path) -> None:
    seen: list[list[str]] = []

    class Watching(Callback):
        def on_train_batch_end(
            self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
        ) -> None:
            seen.append(files(tmp_path))

    checkpoints = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=3)
    callbacks = ScheduleCheckpoint(per_checkpoint=True), checkpoints, Watching()
    train(tmp_path, *callbacks, module=fresh(), enable_checkpointing=True)
    shared = [f"scheduler/{name}" for name in FOLDER]
    assert files(tmp_path) == sorted(
        [*shared, "step=12.ckpt", *(f"step=12.scheduler/{name}" for name in FOLDER)]
    )
    assert not (tmp_path / "step=9.scheduler").exists()
    assert any("step=9.scheduler/scheduler_config.json" in names for names in seen)
    scheduler = diffusers.DDIMScheduler.from_pretrained(
        str(tmp_path), subfolder="step=12.scheduler"
    )
    assert scheduler.config["prediction_type"] == "v_prediction"


def test_a_link_is_followed_and_its_target_keeps_its_folder(tmp_path: Path) -> None:
    save(tmp_path, save_last="link")
    assert (tmp_path / "last.ckpt").is_symlink()
    assert [path.name for path in sorted(tmp_path.glob("*.scheduler"))] == ["step=12.scheduler"]
    shutil.rmtree(tmp_path / "scheduler")
    assert own_sidecar(tmp_path / "last.ckpt").local == tmp_path / "step=12.scheduler"
    assert read_sidecar(own_sidecar(tmp_path / "last.ckpt")) == SCHEDULE


def test_a_link_that_is_removed_leaves_the_folder_of_its_target(tmp_path: Path) -> None:
    class Linking(Toy):
        def on_train_epoch_end(self) -> None:
            self.trainer.save_checkpoint(tmp_path / "whole.ckpt")
            (tmp_path / "link.ckpt").symlink_to("whole.ckpt")
            self.trainer.strategy.remove_checkpoint(tmp_path / "link.ckpt")

    train(tmp_path, ScheduleCheckpoint(per_checkpoint=True), module=fresh(Linking), max_epochs=1)
    assert files(tmp_path) == ["whole.ckpt", *(f"whole.scheduler/{name}" for name in FOLDER)]


def test_a_second_copy_as_last_has_its_own(tmp_path: Path) -> None:
    save(tmp_path, save_last=True)
    assert [path.name for path in sorted(tmp_path.glob("*.scheduler"))] == [
        "last.scheduler",
        "step=12.scheduler",
    ]


@pytest.mark.parametrize("own", [True, False])
@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize("change", OTHER)
def test_weights_only_files_are_compared_everywhere(
    tmp_path: Path, own: bool, verb: str, change: str
) -> None:
    save(tmp_path, TRAINED[change], own, save_weights_only=True)
    path = tmp_path / "step=12.ckpt"
    assert (
        "noise_schedule" in read_checkpoint(path)
    ) is own and "callbacks" not in read_checkpoint(path)
    assert schedule_from_checkpoint(path) == TRAINED[change]
    with pytest.raises(
        ValueError, match=r"step=12.ckpt' is of the noise schedule .* but this module has"
    ):
        use(verb, path, tmp_path / "x", OTHER[change])
    if verb != "fit":  # Lightning resumes no training from weights alone
        assert len(use(verb, path, tmp_path / "x", TRAINED[change]).losses) == 6
    if own and verb == "test":
        alone = shutil.copy(path, tmp_path / "x")  # away from all that lies beside it
        with pytest.raises(ValueError, match="is of the noise schedule"):
            use(verb, alone, tmp_path / "x", OTHER[change])


@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize("change", OTHER)
def test_whole_files_are_compared_everywhere(tmp_path: Path, verb: str, change: str) -> None:
    save(tmp_path, TRAINED[change], own=False)
    with pytest.raises(
        ValueError, match=r"step=12.ckpt' is of the noise schedule .* but this module has"
    ):
        use(verb, tmp_path / "step=12.ckpt", tmp_path / "x", OTHER[change])
    assert len(use(verb, tmp_path / "step=12.ckpt", tmp_path / "x", TRAINED[change]).losses) == 6


def test_the_folder_of_a_checkpoint_comes_before_the_shared_one(tmp_path: Path) -> None:
    save(tmp_path, own=False, save_weights_only=True)
    path = tmp_path / "step=12.ckpt"
    write_sidecar(OTHER["prediction"], Folder(str(tmp_path / "step=12.scheduler")))
    assert schedule_from_checkpoint(path) == OTHER["prediction"]
    with pytest.raises(ValueError, match=r"is of the noise schedule .* with sample"):
        use("validate", path, tmp_path / "x", SCHEDULE)
    use("validate", path, tmp_path / "x", SCHEDULE, on_mismatch="ignore")
    with pytest.warns(UserWarning, match="on_mismatch='warn': going on"):
        use("validate", path, tmp_path / "x", SCHEDULE, on_mismatch="warn")


@pytest.mark.parametrize("own", [True, False])
@pytest.mark.parametrize("weights_only", [True, False])
def test_remote_folders(tmp_path: Path, own: bool, weights_only: bool) -> None:
    place = f"memory://{tmp_path}/run"
    save(tmp_path, own=own, dirpath=place, save_weights_only=weights_only)
    store = fsspec.filesystem("memory")
    names = [path.removeprefix(f"{tmp_path}/run/") for path in store.find(f"{tmp_path}/run")]
    folders = ["scheduler", *(["step=12.scheduler"] if own else [])]
    assert names == sorted(
        [*(f"{folder}/{name}" for folder in folders for name in FOLDER), "step=12.ckpt"]
    )
    assert files(tmp_path) == []
    path = f"{place}/step=12.ckpt"
    assert schedule_from_checkpoint(path) == SCHEDULE == read_sidecar(sidecar_folder(path))
    with pytest.raises(ValueError, match=r"step=12.ckpt' is of the noise schedule"):
        use("validate", path, tmp_path, OTHER["beta_end"])
    assert len(use("validate", path, tmp_path, SCHEDULE).losses) == 6
    with pytest.raises(ValueError, match=r"scheduler' is of the noise schedule .*another dirpath"):
        save(tmp_path, OTHER["beta_end"], dirpath=place)
    with pytest.raises(FileNotFoundError, match="no checkpoint at 'memory://"):
        schedule_from_checkpoint(f"{place}/gone.ckpt")


def test_a_damaged_remote_folder_names_its_place(tmp_path: Path) -> None:
    folder = Folder(f"memory://{tmp_path}/scheduler")
    folder.write(EXACT_NAME, "{")
    with pytest.raises(
        ValueError, match=rf"'memory://{tmp_path}/scheduler/{EXACT_NAME}' is not valid JSON"
    ):
        read_sidecar(folder)
    assert write_sidecar(SCHEDULE, folder) is None and read_sidecar(folder) == SCHEDULE


def test_a_schedule_that_diffusers_cannot_say_leaves_no_config_of_another(tmp_path: Path) -> None:
    folder, score = Folder(str(tmp_path)), NoiseSchedule.scaled_linear(prediction="score")
    assert write_sidecar(SCHEDULE, folder) is None
    assert write_sidecar(score, folder) == SCHEDULE
    assert files(tmp_path) == [EXACT_NAME] and read_sidecar(folder) == score


def test_checkpoints_that_are_written_later(tmp_path: Path) -> None:
    save(tmp_path, plugins=[AsyncCheckpointIO()], save_top_k=-1)
    for step in (3, 6, 9, 12):
        path = tmp_path / f"step={step}.ckpt"
        assert schedule_from_checkpoint(path) == SCHEDULE == read_sidecar(own_sidecar(path))


def test_a_save_by_hand_is_followed_and_the_strategy_gets_its_methods_back(tmp_path: Path) -> None:
    class Saving(Toy):
        def on_train_epoch_end(self) -> None:
            self.trainer.save_checkpoint(tmp_path / "mine.ckpt", weights_only=True)
            self.trainer.strategy.remove_checkpoint(tmp_path / "other.ckpt")

    (tmp_path / "other.scheduler").mkdir()
    (tmp_path / "other.scheduler/notes.txt").touch()  # somebody else's
    ready = trainer(tmp_path, ScheduleCheckpoint(per_checkpoint=True), max_epochs=1)
    for _ in range(2):
        ready.fit_loop.epoch_progress.reset()
        ready.fit(fresh(Saving), loader())
        assert read_sidecar(own_sidecar(tmp_path / "mine.ckpt")) == SCHEDULE
        assert not {"save_checkpoint", "remove_checkpoint"} & set(ready.strategy.__dict__)
    assert (tmp_path / "other.scheduler/notes.txt").is_file()


def test_a_fit_that_failed_is_not_followed_twice(tmp_path: Path, monkeypatch: Any) -> None:
    class Failing(Toy):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            raise RuntimeError("broken")

    class Saving(Toy):
        def on_train_end(self) -> None:
            self.trainer.save_checkpoint(tmp_path / "mine.ckpt")

    callback = ScheduleCheckpoint(per_checkpoint=True)
    ready = trainer(tmp_path, callback, max_epochs=1)
    with pytest.raises(RuntimeError, match="broken"):
        ready.fit(fresh(Failing), loader())
    written: list[str] = []
    monkeypatch.setattr(callback, "_write", lambda schedule, folder: written.append(folder.url))
    ready.fit(fresh(Saving), loader())
    assert written == [str(tmp_path / "mine.scheduler")]
    ready.save_checkpoint(tmp_path / "after.ckpt")  # fit is over
    assert written == [str(tmp_path / "mine.scheduler")]


def test_nothing_is_written_in_a_rehearsal(tmp_path: Path) -> None:
    ready = trainer(tmp_path, ScheduleCheckpoint(per_checkpoint=True), fast_dev_run=True)
    ready.fit(fresh(), loader())
    assert files(tmp_path) == []


# Samplers of other callbacks


class Pictures(Callback):
    """One that draws, and is no ValidationSampling."""

    def __init__(self, schedule: NoiseSchedule) -> None:
        self.sampler = Sampler(schedule, "euler", 3)


@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize("change", OTHER)
def test_a_sampler_of_another_schedule_is_refused(tmp_path: Path, verb: str, change: str) -> None:
    module = fresh(schedule=TRAINED[change])
    ready = trainer(tmp_path, ScheduleCheckpoint(), Pictures(OTHER[change]), inference_mode=False)
    with pytest.raises(
        ValueError,
        match=r"the sampler of Pictures' is of the noise schedule .* what the model learned",
    ):
        getattr(ready, verb)(module, loader())
    assert module.losses == []


def test_a_sampler_of_the_same_schedule_goes_on_and_another_is_warned_of_once(
    tmp_path: Path,
) -> None:
    same = NoiseSchedule.from_config(json.loads(json.dumps(SCHEDULE.to_config())))
    assert len(train(tmp_path, ScheduleCheckpoint(), Pictures(same)).losses) == 12
    other = Pictures(OTHER["prediction"])
    with pytest.warns(UserWarning, match="the sampler of Pictures") as caught:
        train(tmp_path, ScheduleCheckpoint(on_mismatch="warn"), other)
    assert len([w for w in caught if "the sampler of" in str(w.message)]) == 1


@pytest.mark.parametrize("grid", ["leading", "ddim_uniform", "trailing", "karras"])
def test_a_sampler_that_leaves_out_the_terminal_timestep_is_refused(
    tmp_path: Path, grid: str
) -> None:
    pictures = Pictures(SCHEDULE)
    pictures.sampler = Sampler(SCHEDULE, "euler", 10, grid)
    module = fresh()
    if grid in ("trailing", "karras"):
        train(tmp_path, ScheduleCheckpoint(), pictures, module=module, max_epochs=1)
        return
    with pytest.raises(
        ValueError,
        match=r"the sampler of Pictures starts at timestep 9\d\d, .* use grid='trailing'",
    ):
        train(tmp_path, ScheduleCheckpoint(), pictures, module=module)
    assert module.losses == []
    train(tmp_path, ScheduleCheckpoint(on_mismatch="ignore"), pictures, module=module, max_epochs=1)
    plain = Pictures(NoiseSchedule.scaled_linear(prediction="v_prediction"))
    plain.sampler = Sampler(plain.sampler.schedule, "euler", 10, grid)
    train(
        tmp_path,
        ScheduleCheckpoint(),
        plain,
        module=fresh(schedule=plain.sampler.schedule),
        max_epochs=1,
    )


def test_plain_values_alone_are_in_a_checkpoint(tmp_path: Path) -> None:
    save(tmp_path)
    assert (
        torch.load(tmp_path / "step=12.ckpt", weights_only=True)["noise_schedule"]
        == SCHEDULE.to_config()
    )
