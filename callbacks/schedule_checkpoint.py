"""The noise schedule beside every checkpoint: embedded in the file, in a folder that diffusers loads, compared on load.

Not a subclass of Lightning's Checkpoint, which would take the place of the default ModelCheckpoint.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Literal

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn

from ..noising import NoiseSchedule
from ..noising.files import write_atomically
from ..noising.pretrained import CONFIG_NAME, EXACT_NAME
from ..noising.registry import lookup
from ..training.checkpoints import SCHEDULE_KEY, SUBFOLDER, embedded_schedule, sidecar_folder
from .agreement import on_rank_zero
from .contract import is_rehearsal, schedule_of_module


class ScheduleCheckpoint(Callback):
    """Save the module's noise schedule with every checkpoint, and refuse to go on under another one.

    The schedule goes into the checkpoint as ``checkpoint["noise_schedule"]``, plain values that load with
    ``weights_only=True``, and beside it: ``<dirpath>/scheduler/scheduler_config.json``, which
    ``diffusers.DDIMScheduler.from_pretrained(dirpath, subfolder="scheduler")`` loads, and an exact
    ``noise_schedule.json``, for the folder of every checkpoint callback. ``schedule_from_checkpoint`` reads both.

    Args:
        subfolder: name of the folder beside the checkpoints.
        on_mismatch: what to do where a checkpoint that is loaded, or the folder beside which checkpoints will go, is of
            another schedule than the module: raise a ValueError that names both ('error'), 'warn' and go on, or
            'ignore' it. Where training goes on, the folder is rewritten with the module's schedule.

    Schedules are compared by fingerprint: the same numbers from another config are the same schedule. A checkpoint
    without a schedule is told of, not refused. The folder is checked and written, or an OSError raised, before training
    starts.

    >>> ScheduleCheckpoint().subfolder
    'scheduler'
    >>> ScheduleCheckpoint(on_mismatch="wran")
    Traceback (most recent call last):
    ValueError: unknown on_mismatch 'wran'; did you mean 'warn'?
    """

    def __init__(self, subfolder: str = SUBFOLDER, on_mismatch: Literal["error", "warn", "ignore"] = "error") -> None:
        super().__init__()
        if not subfolder or Path(subfolder).is_absolute() or ".." in Path(subfolder).parts:
            raise ValueError(
                f"subfolder must name a folder beside the checkpoints, got {subfolder!r}; 'scheduler' is usual"
            )
        self.subfolder = subfolder
        self.on_mismatch = lookup("on_mismatch", on_mismatch, {mode: mode for mode in ("error", "warn", "ignore")})
        self._compared = False

    # -- loading -------------------------------------------------------------------------------------------------------

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._compared = False

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        if SCHEDULE_KEY in checkpoint:
            self._compared = True  # on every rank alike: all have loaded the same file
            load = partial(embedded_schedule, checkpoint, trainer.ckpt_path)
            self._compare(pl_module, str(trainer.ckpt_path), load, _MEND_CHECKPOINT)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        schedule_of_module(pl_module)  # a module without one fails here, not at its first checkpoint
        self._compare_beside_checkpoint(trainer, pl_module)
        on_rank_zero(trainer, lambda: self._compare_folders(trainer, pl_module))

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._compare_beside_checkpoint(trainer, pl_module)

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._compare_beside_checkpoint(trainer, pl_module)

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._compare_beside_checkpoint(trainer, pl_module)

    def _compare_beside_checkpoint(self, trainer: Trainer, module: LightningModule) -> None:
        """Compare with the folder beside a checkpoint that does not hold its schedule, as weights-only files do not."""
        if self._compared or not trainer.ckpt_path:
            return
        self._compared = True
        path = os.fspath(trainer.ckpt_path)

        def act() -> None:
            beside = sidecar_folder(path, self.subfolder)
            if _holds_schedule(beside):
                self._compare(module, path, lambda: NoiseSchedule.from_pretrained(beside), _MEND_CHECKPOINT)
            else:
                rank_zero_info(f"{path!r} does not say its noise schedule; going on with {schedule_of_module(module)}")

        on_rank_zero(trainer, act)  # other nodes may not have the folder

    def _compare_folders(self, trainer: Trainer, module: LightningModule) -> None:
        for folder in self._folders(trainer):
            if _holds_schedule(folder):
                self._compare(module, str(folder), partial(NoiseSchedule.from_pretrained, folder), _MEND_FOLDER)

    def _compare(self, module: LightningModule, what: str, load: Callable[[], NoiseSchedule | None], mend: str) -> None:
        if self.on_mismatch == "ignore":
            return
        schedule = schedule_of_module(module)
        try:
            found = load()
        except ValueError as error:  # damaged: what it was trained with is not known
            self._object(str(error), error)
            return
        if found is not None and found.fingerprint != schedule.fingerprint:
            self._object(f"{what!r} is of the noise schedule {found}, but this module has {schedule}; {mend}")

    def _object(self, message: str, cause: Exception | None = None) -> None:
        if self.on_mismatch == "error":
            raise ValueError(message) from cause
        rank_zero_warn(f"{message} (on_mismatch='warn': going on)")

    # -- saving --------------------------------------------------------------------------------------------------------

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        schedule = schedule_of_module(pl_module)
        on_rank_zero(trainer, lambda: [_write(schedule, folder) for folder in self._folders(trainer)])

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        schedule = schedule_of_module(pl_module)
        checkpoint[SCHEDULE_KEY] = schedule.to_config()
        if trainer.is_global_zero:
            for folder in self._folders(trainer):
                try:
                    other = _write(schedule, folder)
                    if other is not None:
                        rank_zero_warn(f"{str(folder)!r} had come to say {other}; it says {schedule} again")
                except OSError as error:  # the checkpoint, which holds its schedule, is worth more than the folder
                    rank_zero_warn(f"the noise schedule could not be written to {str(folder)!r}: {error}")

    def _folders(self, trainer: Trainer) -> list[Path]:
        """Return where the schedule belongs: beside every checkpoint callback's files on a local disk."""
        if is_rehearsal(trainer):
            return []
        paths = [getattr(callback, "dirpath", None) for callback in trainer.checkpoint_callbacks]
        local = dict.fromkeys(os.fspath(path) for path in paths if path is not None and "://" not in os.fspath(path))
        return [Path(path, self.subfolder) for path in local]


_MEND_CHECKPOINT = (
    "give the module the schedule that the checkpoint was trained with (schedule_from_checkpoint reads it), or, if the "
    "change is meant, use ScheduleCheckpoint(on_mismatch='warn')"
)
_MEND_FOLDER = (
    "give this run's checkpoints another dirpath, or the module that schedule, or, if the change is meant, use "
    "ScheduleCheckpoint(on_mismatch='warn'), which rewrites the folder"
)


def _holds_schedule(folder: Path) -> bool:
    return any((folder / name).is_file() for name in (EXACT_NAME, CONFIG_NAME))


def _write(schedule: NoiseSchedule, folder: Path) -> NoiseSchedule | None:
    """Write both files unless they say this already; return the other schedule that they said, if they did."""
    try:
        before = NoiseSchedule.from_pretrained(folder) if _holds_schedule(folder) else None
    except ValueError:  # damaged: written anew
        before = None
    same = before is not None and before.fingerprint == schedule.fingerprint
    if same and (folder / EXACT_NAME).is_file() and (folder / CONFIG_NAME).is_file():
        return None
    try:
        schedule.save_pretrained(folder)
    except ValueError:  # diffusers has no config for this schedule, e.g. one with the score as prediction
        (folder / CONFIG_NAME).unlink(missing_ok=True)
        write_atomically(folder / EXACT_NAME, json.dumps(schedule.to_config(), indent=2, sort_keys=True) + "\n")
    return None if same else before
