"""The schedule beside every checkpoint: what is written, who can read it, and what is refused."""

import json
import logging
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import Checkpoint, ModelCheckpoint, OnExceptionCheckpoint

from alphabar.callbacks import ScheduleCheckpoint
from alphabar.noising import NoiseSchedule
from alphabar.noising.io.files import CONFIG_NAME, EXACT_NAME
from alphabar.training import schedule_from_checkpoint
from alphabar.training.checkpoints.read import read_checkpoint
from callbacks_toy import SCHEDULE, Toy, files, fresh, loader, one_thread, train, trainer

PLAIN = NoiseSchedule.scaled_linear(prediction="v_prediction")
OTHERS = {
    "beta_end": NoiseSchedule.scaled_linear(
        beta_end=0.02, prediction="v_prediction"
    ).zero_terminal_snr(),
    "prediction": SCHEDULE.with_prediction("sample"),
    "zero_terminal_snr": PLAIN,
    "flow": NoiseSchedule.flow(shift=3.0),
}


pytestmark = pytest.mark.filterwarnings("ignore::Warning:lightning", "ignore::Warning:tensorboard")


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    with one_thread():
        yield


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of checkpoints of SCHEDULE, of two epochs."""
    root = tmp_path_factory.mktemp("saved")
    save(root)
    return root


@pytest.fixture
def copy(saved: Path, tmp_path: Path) -> Path:
    """The same, to be damaged."""
    shutil.copytree(saved, tmp_path / "copy")
    return tmp_path / "copy"


def save(root: Path, schedule: NoiseSchedule = SCHEDULE, *callbacks: Any, **settings: Any) -> Toy:
    keep = ModelCheckpoint(root, filename="{step}", save_top_k=-1)
    module = settings.pop("module", None) or fresh(schedule=schedule)
    callbacks = callbacks or (ScheduleCheckpoint(),)
    return train(root, keep, *callbacks, module=module, enable_checkpointing=True, **settings)


def resume(path: Path, root: Path, schedule: NoiseSchedule, **arguments: Any) -> Toy:
    module = fresh(schedule=schedule)
    callbacks = (ScheduleCheckpoint(**arguments),)
    try:
        train(root, *callbacks, module=module, max_epochs=3, ckpt_path=path)
    except ValueError:
        assert module.losses == []
        raise
    return module


# What is written


def test_what_lies_on_disk(saved: Path) -> None:
    assert files(saved) == [
        "scheduler/noise_schedule.json",
        f"scheduler/{CONFIG_NAME}",
        "step=12.ckpt",
        "step=6.ckpt",
    ]


def test_the_checkpoint_holds_plain_values(saved: Path) -> None:
    checkpoint = torch.load(saved / "step=12.ckpt", weights_only=True)
    config = checkpoint["noise_schedule"]
    assert json.loads(json.dumps(config)) == config == SCHEDULE.to_config()
    assert NoiseSchedule.from_config(config) == SCHEDULE
    assert schedule_from_checkpoint(saved / "step=6.ckpt") == SCHEDULE


def test_diffusers_loads_the_folder(saved: Path) -> None:
    for kind in (diffusers.DDIMScheduler, diffusers.EulerDiscreteScheduler):
        scheduler: Any = kind.from_pretrained(str(saved), subfolder="scheduler")
        config = scheduler.config
        assert config.prediction_type == "v_prediction" and config.timestep_spacing == "trailing"
        assert (config.beta_schedule, config.beta_start, config.beta_end) == (
            "scaled_linear",
            0.00085,
            0.012,
        )
        assert config.rescale_betas_zero_snr is True and config.clip_sample is False
    scheduler = diffusers.DDIMScheduler.from_pretrained(str(saved), subfolder="scheduler")
    ours = SCHEDULE.alphas_cumprod.numpy()
    np.testing.assert_allclose(scheduler.alphas_cumprod.numpy(), ours, rtol=1e-5, atol=1e-7)
    # diffusers' float32 leaves a trace
    assert ours[-1] == 0 and float(scheduler.alphas_cumprod[-1]) < 1e-14
    scheduler.set_timesteps(4)
    assert scheduler.timesteps.tolist() == [999, 749, 499, 249]


def test_every_checkpoint_folder_is_served_and_default_checkpoints_stay(tmp_path: Path) -> None:
    assert not issubclass(ScheduleCheckpoint, Checkpoint)
    plain = trainer(tmp_path, ScheduleCheckpoint(), enable_checkpointing=True, max_epochs=1)
    assert [type(callback) for callback in plain.checkpoint_callbacks] == [ModelCheckpoint]
    assert type(plain.checkpoint_callback) is ModelCheckpoint
    plain.fit(fresh(), loader())
    assert f"checkpoints/scheduler/{CONFIG_NAME}" in files(tmp_path)
    more = [
        ModelCheckpoint(tmp_path / "a", every_n_train_steps=3),
        OnExceptionCheckpoint(str(tmp_path / "b")),
    ]
    save(tmp_path / "c", SCHEDULE, ScheduleCheckpoint(subfolder="noise"), *more, max_epochs=1)
    for folder in ("a", "b", "c"):
        assert NoiseSchedule.from_pretrained(tmp_path / folder, subfolder="noise") == SCHEDULE


def test_the_folder_is_written_before_the_first_step_and_again_when_lost(tmp_path: Path) -> None:
    class Losing(Toy):
        def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
            seen.append((tmp_path / "scheduler" / CONFIG_NAME).is_file())
            shutil.rmtree(tmp_path / "scheduler", ignore_errors=True)

    seen: list[bool] = []
    save(tmp_path, module=fresh(Losing), max_epochs=1)
    assert seen[0] is True and seen[1] is False
    assert NoiseSchedule.from_pretrained(tmp_path, subfolder="scheduler") == SCHEDULE


def test_a_folder_lost_for_good_does_not_cost_the_checkpoint(tmp_path: Path) -> None:
    class Blocked(Toy):
        def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
            shutil.rmtree(tmp_path / "scheduler", ignore_errors=True)
            (tmp_path / "scheduler").touch()

    with pytest.warns(UserWarning, match="noise schedule could not be written to .*scheduler"):
        module = save(tmp_path, module=fresh(Blocked), max_epochs=1)
    assert len(module.losses) == 6
    assert schedule_from_checkpoint(tmp_path / "step=6.ckpt") == SCHEDULE


def test_a_folder_changed_by_another_run_is_told_and_mended(tmp_path: Path) -> None:
    class Visited(Toy):
        def on_train_epoch_end(self) -> None:
            if self.current_epoch == 0:
                OTHERS["prediction"].save_pretrained(tmp_path / "scheduler")

    keep = ModelCheckpoint(tmp_path, every_n_train_steps=5)
    with pytest.warns(
        UserWarning, match="had come to say .* with sample .* it says .* with v_prediction"
    ):
        train(
            tmp_path, keep, ScheduleCheckpoint(), module=fresh(Visited), enable_checkpointing=True
        )
    assert NoiseSchedule.from_pretrained(tmp_path, subfolder="scheduler") == SCHEDULE


def test_a_schedule_that_diffusers_cannot_say_is_saved_exactly(tmp_path: Path) -> None:
    score = PLAIN.with_prediction("score")
    save(tmp_path, score, max_epochs=1)
    assert files(tmp_path) == ["scheduler/noise_schedule.json", "step=6.ckpt"]
    assert schedule_from_checkpoint(tmp_path / "step=6.ckpt") == score
    assert NoiseSchedule.from_pretrained(tmp_path, subfolder="scheduler") == score


def test_top_k_and_links_leave_the_folder(tmp_path: Path) -> None:
    keep = ModelCheckpoint(
        tmp_path / "runs", filename="{step}", every_n_train_steps=3, save_last="link"
    )
    train(tmp_path, keep, ScheduleCheckpoint(), enable_checkpointing=True)
    names = files(tmp_path / "runs")
    assert f"scheduler/{CONFIG_NAME}" in names and "step=3.ckpt" not in names
    assert schedule_from_checkpoint(tmp_path / "runs/last.ckpt") == SCHEDULE


def test_remote_folders_are_left_to_the_checkpoint_itself(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    keep = ModelCheckpoint("memory://bucket/run")
    train(tmp_path, keep, ScheduleCheckpoint(), enable_checkpointing=True, max_epochs=1)
    assert files(tmp_path) == []


# What is refused on load


@pytest.mark.parametrize("other", OTHERS.values(), ids=OTHERS)
def test_resuming_under_another_schedule_is_refused_naming_both(
    saved: Path, tmp_path: Path, other: Any
) -> None:
    with pytest.raises(ValueError) as refusal:
        resume(saved / "step=12.ckpt", tmp_path, other)
    for part in (
        str(SCHEDULE),
        str(other),
        "step=12.ckpt",
        "give the module the schedule",
        "on_mismatch='warn'",
    ):
        assert part in str(refusal.value)


def test_the_same_schedule_goes_on_whatever_config_it_came_from(tmp_path: Path) -> None:
    save(tmp_path / "a", PLAIN)
    same = NoiseSchedule.from_betas(PLAIN.curve.betas(), "v_prediction")  # pyright: ignore
    assert same != PLAIN
    assert len(resume(tmp_path / "a/step=12.ckpt", tmp_path, same).losses) == 6
    save(tmp_path / "a", same)  # into the same folder, too
    assert NoiseSchedule.from_pretrained(tmp_path / "a", subfolder="scheduler") == PLAIN


@pytest.mark.parametrize(("mode", "warned"), [("warn", 1), ("ignore", 0)])
def test_warn_and_ignore_go_on(
    saved: Path, tmp_path: Path, mode: Any, warned: int, recwarn: Any
) -> None:
    other = OTHERS["beta_end"]
    assert len(resume(saved / "step=12.ckpt", tmp_path, other, on_mismatch=mode).losses) == 6
    told = [str(w.message) for w in recwarn if "of the noise schedule" in str(w.message)]
    assert len(told) == warned and all(
        str(other) in text and str(SCHEDULE) in text for text in told
    )


@pytest.mark.parametrize("verb", ["validate", "test", "predict"])
@pytest.mark.parametrize("embedded", [True, False])
def test_evaluating_under_another_schedule_is_refused(
    copy: Path, verb: str, embedded: bool
) -> None:
    path = copy / "step=12.ckpt"
    if not embedded:
        _strip(path, "noise_schedule", "callbacks")
    module = fresh(schedule=OTHERS["beta_end"])
    evaluating = trainer(copy, ScheduleCheckpoint(), inference_mode=False)
    with pytest.raises(
        ValueError, match=r"step=12.ckpt' is of the noise schedule .* but this module has"
    ):
        getattr(evaluating, verb)(module, loader(), ckpt_path=path)
    assert module.losses == []
    same = fresh()
    getattr(trainer(copy, ScheduleCheckpoint(), inference_mode=False), verb)(
        same, loader(), ckpt_path=path
    )
    assert len(same.losses) == 6


def _strip(path: Path, *keys: str) -> None:
    checkpoint = torch.load(path, weights_only=True)
    torch.save({k: v for k, v in checkpoint.items() if k not in keys}, path)


def test_weights_only_files_are_known_by_their_folder(tmp_path: Path) -> None:
    keep = ModelCheckpoint(tmp_path, filename="{step}", save_weights_only=True)
    train(tmp_path, keep, ScheduleCheckpoint(), enable_checkpointing=True, max_epochs=1)
    path = tmp_path / "step=6.ckpt"
    assert "noise_schedule" not in read_checkpoint(path)
    assert schedule_from_checkpoint(path) == SCHEDULE
    with pytest.raises(ValueError, match=r"step=6.ckpt' is of the noise schedule"):
        trainer(tmp_path, ScheduleCheckpoint()).validate(
            fresh(schedule=PLAIN), loader(), ckpt_path=path
        )


def test_a_checkpoint_without_a_schedule_is_told_of_and_goes_on(copy: Path, caplog: Any) -> None:
    path = copy / "step=12.ckpt"
    _strip(path, "noise_schedule")
    shutil.rmtree(copy / "scheduler")
    with caplog.at_level(logging.INFO, logger="lightning.pytorch"):
        assert len(resume(path, copy, PLAIN).losses) == 6
    assert [
        r.levelname
        for r in caplog.records
        if "does not say its noise schedule; going on with" in r.message
    ] == ["INFO"]


def test_an_old_checkpoint_is_judged_by_the_folder_beside_it(copy: Path, tmp_path: Path) -> None:
    _strip(copy / "step=12.ckpt", "noise_schedule")
    (tmp_path / "link.ckpt").symlink_to(copy / "step=12.ckpt")
    with pytest.raises(ValueError, match=r"link.ckpt' is of the noise schedule"):
        resume(tmp_path / "link.ckpt", tmp_path, PLAIN)


def test_a_damaged_embedded_schedule_is_an_error(copy: Path, tmp_path: Path) -> None:
    path = copy / "step=12.ckpt"
    checkpoint = torch.load(path, weights_only=True)
    checkpoint["noise_schedule"]["curve"]["beta_end"] = 0.5
    torch.save(checkpoint, path)
    with pytest.raises(
        ValueError,
        match=r"the checkpoint's 'noise_schedule' .*step=12.ckpt' cannot be read.*damaged",
    ):
        resume(path, tmp_path, SCHEDULE)
    with pytest.raises(ValueError, match="cannot be read"):
        schedule_from_checkpoint(path)
    with pytest.warns(UserWarning, match="cannot be read"):
        resume(path, tmp_path, SCHEDULE, on_mismatch="warn")


# What is refused before training


def test_a_folder_of_another_schedule_is_not_overwritten(copy: Path) -> None:
    before = (copy / "scheduler" / EXACT_NAME).read_bytes()
    module = fresh(schedule=PLAIN)
    with pytest.raises(ValueError, match=r"scheduler' is of the noise schedule .*another dirpath"):
        save(copy, module=module)
    assert module.losses == [] and (copy / "scheduler" / EXACT_NAME).read_bytes() == before
    with pytest.warns(UserWarning, match=r"scheduler' is of the noise schedule"):
        save(copy, PLAIN, ScheduleCheckpoint(on_mismatch="warn"))
    assert NoiseSchedule.from_pretrained(copy, subfolder="scheduler") == PLAIN
    save(copy, SCHEDULE, ScheduleCheckpoint(on_mismatch="ignore"))
    assert NoiseSchedule.from_pretrained(copy, subfolder="scheduler") == SCHEDULE


@pytest.mark.parametrize("content", ["", "{", "\x00\xff", "[]", '{"beta_end": 1}'])
@pytest.mark.parametrize("name", [CONFIG_NAME, EXACT_NAME])
def test_a_corrupt_folder_is_an_error_before_training(copy: Path, name: str, content: str) -> None:
    (copy / "scheduler" / name).write_text(content, encoding="latin-1")
    module = fresh()
    with pytest.raises(ValueError):
        save(copy, module=module)
    assert module.losses == []
    with pytest.warns(UserWarning, match="on_mismatch='warn': going on"):
        save(copy, SCHEDULE, ScheduleCheckpoint(on_mismatch="warn"), max_epochs=1)
    assert NoiseSchedule.from_pretrained(copy, subfolder="scheduler") == SCHEDULE


def test_an_unwritable_folder_fails_before_training(tmp_path: Path) -> None:
    (tmp_path / "scheduler").write_text("in the way")
    module = fresh()
    with pytest.raises(OSError, match="scheduler"):
        save(tmp_path, module=module)
    assert module.losses == []


def test_a_module_without_a_schedule_fails_before_training(tmp_path: Path) -> None:
    module = fresh()
    module.noising = None  # pyright: ignore
    with pytest.raises(TypeError, match="Toy has no noise schedule: give it an attribute noising"):
        save(tmp_path, module=module)
    assert module.losses == []


@pytest.mark.parametrize("subfolder", ["", "/abs", "../up"])
def test_bad_arguments(subfolder: str) -> None:
    with pytest.raises(ValueError, match="subfolder must name a folder beside the checkpoints"):
        ScheduleCheckpoint(subfolder)
    with pytest.raises(ValueError, match="unknown on_mismatch 'eror'; did you mean 'error'"):
        ScheduleCheckpoint(on_mismatch="eror")  # pyright: ignore


# Reading


class Custom:
    """What pickle could run."""


def write(path: Path, content: Any) -> Path:
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        torch.save(content, path)
    return path


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"state_dict": {}}, "does not say its noise schedule: .* schedule.save_pretrained"),
        (b"", "is damaged, or no checkpoint"),
        (b"PK\x03\x04 no zip", "is damaged, or no checkpoint"),
        (b"{}" * 50, "is damaged, or no checkpoint"),
        ([1, 2], "it holds a list, not a dict"),
        ({"hyper_parameters": Path("x")}, r"holds a pathlib.*; save hyperparameters as numbers"),
        (
            {"noise_schedule": None},
            "'noise_schedule' of .* cannot be read: not a noise schedule config",
        ),
        (
            {"noise_schedule": {"curve": {"kind": "disc"}, "prediction": "epsilon"}},
            "did you mean 'discrete'",
        ),
    ],
)
def test_unreadable_checkpoints_say_why(tmp_path: Path, content: Any, message: str) -> None:
    path = write(tmp_path / "model.ckpt", content)
    with pytest.raises(ValueError, match=f"model.ckpt.*{message}|{message}"):
        schedule_from_checkpoint(path)


def test_a_cut_off_checkpoint_says_so(copy: Path) -> None:
    path = copy / "step=12.ckpt"
    path.write_bytes(path.read_bytes()[:-2000])
    with pytest.raises(ValueError, match=r"step=12.ckpt' is damaged, or no checkpoint"):
        schedule_from_checkpoint(path)


def test_missing_files_and_folders(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no checkpoint at .*nowhere.ckpt"):
        schedule_from_checkpoint(tmp_path / "nowhere.ckpt")
    with pytest.raises(FileNotFoundError, match="a folder, not a checkpoint file"):
        schedule_from_checkpoint(tmp_path)


def test_files_of_the_old_format_are_read(tmp_path: Path) -> None:
    old = {"noise_schedule": SCHEDULE.to_config(), "state_dict": {"w": torch.ones(3)}}
    torch.save(old, tmp_path / "old.ckpt", _use_new_zipfile_serialization=False)
    assert schedule_from_checkpoint(tmp_path / "old.ckpt") == SCHEDULE


def test_nothing_in_a_checkpoint_is_run(tmp_path: Path) -> None:
    code = f"""
import os, pickle, torch
class Bomb:
    def __reduce__(self):
        return os.mkdir, ({str(tmp_path / "boom")!r},)
torch.save({{"noise_schedule": Bomb()}}, {str(tmp_path / "bomb.ckpt")!r})
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
    with pytest.raises(ValueError, match=r"holds a posix.mkdir, and only"):
        schedule_from_checkpoint(tmp_path / "bomb.ckpt")
    assert not (tmp_path / "boom").exists()
