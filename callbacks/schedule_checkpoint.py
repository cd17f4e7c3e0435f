"""Save the noise schedule with every checkpoint, in a diffusers folder too, and compare it on load.

``ScheduleCheckpoint`` is not a subclass of Lightning's ``Checkpoint``, because such a subclass
replaces the default ModelCheckpoint.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Literal, cast

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn

from ..noising import NoiseSchedule
from ..noising.io.files import CONFIG_NAME, EXACT_NAME
from ..noising.utils.registry import lookup
from ..sampling import Sampler
from ..training.checkpoints.read import SCHEDULE_KEY, embedded_schedule, read_checkpoint
from ..training.checkpoints.sidecars import (
    SUBFOLDER,
    holds_schedule,
    own_sidecar,
    read_sidecar,
    sidecar_folder,
    write_sidecar,
)
from ..training.checkpoints.storage import Folder
from ..training.loops.collectives import on_rank_zero
from ..training.loops.complaints import Complaints, Failure
from .checkpoint_hooks import SavesFollowed
from .support.module_api import is_fast_dev_run, schedule_of_module


class ScheduleCheckpoint(Callback):
    """Save the module's noise schedule with every checkpoint, and reject another schedule on load.

    The schedule is saved in three places:

    - ``checkpoint["noise_schedule"]``: plain values that load with ``weights_only=True``.
    - ``<dirpath>/scheduler/scheduler_config.json``, which
      ``diffusers.DDIMScheduler.from_pretrained(dirpath, subfolder="scheduler")`` loads.
    - ``<dirpath>/scheduler/noise_schedule.json``: the exact schedule.

    The folder is written for every checkpoint callback, on a local disk or in a remote store. It
    also gives the schedule of weights-only files, which hold no values of callbacks.
    ``schedule_from_checkpoint`` reads all of these.

    Loaded checkpoints are compared with the module in fit, validate, test and predict. Schedules
    are compared by fingerprint: the same numbers from another config are the same schedule. A
    checkpoint without a schedule gives an info message and no error. The folder is checked and
    written before training starts.

    Args:
        subfolder: name of the folder next to the checkpoints.
        on_mismatch: what to do on a mismatch: raise a ValueError ('error'), warn and continue
            ('warn'), or 'ignore' it. A mismatch is one of these: a loaded checkpoint, the folder
            next to future checkpoints, or the Sampler of another callback has another schedule than
            the module; or that Sampler omits the terminal timestep of a zero-terminal-SNR schedule.
            If training continues, the folder is rewritten with the module's schedule.
            (ValidationSampling always rejects another schedule.)
        per_checkpoint: also write a folder for each checkpoint saved in ``fit``, and remove it with
            the checkpoint: ``step=6.scheduler`` for ``step=6.ckpt``. In a sharded checkpoint, which
            is a folder, it is the subfolder ``scheduler``. The schedule is then embedded in
            weights-only files too.

    Raises:
        ValueError: invalid arguments, or a mismatch with ``on_mismatch='error'``.
        OSError: before training, the folder cannot be written.

    >>> ScheduleCheckpoint().subfolder
    'scheduler'
    >>> ScheduleCheckpoint(on_mismatch="wran")
    Traceback (most recent call last):
    ValueError: unknown on_mismatch 'wran'; did you mean 'warn'?
    """

    def __init__(
        self,
        subfolder: str = SUBFOLDER,
        on_mismatch: Literal["error", "warn", "ignore"] = "error",
        per_checkpoint: bool = False,
    ) -> None:
        super().__init__()
        if not subfolder or Path(subfolder).is_absolute() or ".." in Path(subfolder).parts:
            raise ValueError(
                f"subfolder must name a folder beside the checkpoints, got {subfolder!r}; "
                "'scheduler' is usual"
            )
        self.subfolder = subfolder
        self.on_mismatch = lookup(
            "on_mismatch", on_mismatch, {mode: mode for mode in ("error", "warn", "ignore")}
        )
        self.per_checkpoint = per_checkpoint
        self._compared = False
        self._compared_samplers: object = None
        self._followed: SavesFollowed | None = None
        self._over = False
        self._complaints = Complaints("ScheduleCheckpoint")

    # -- loading -----------------------------------------------------------------------------------

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._compared, self._compared_samplers, self._over = False, None, False
        if stage == "fit" and self.per_checkpoint and not is_fast_dev_run(trainer):
            self._follow(trainer, pl_module)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if self._followed is not None:
            self._followed.undo()
            self._followed = None

    def on_load_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        if SCHEDULE_KEY in checkpoint:
            self._compared = True  # the same on every rank: all ranks load the same file
            load = partial(embedded_schedule, checkpoint, trainer.ckpt_path)
            self._compare(pl_module, str(trainer.ckpt_path), load, _MEND_CHECKPOINT)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # a module without a schedule fails here, not at its first checkpoint
        schedule_of_module(pl_module)
        self._compare_at_start(trainer, pl_module)
        on_rank_zero(trainer, lambda: self._compare_folders(trainer, pl_module))

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._compare_at_start(trainer, pl_module)

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._compare_at_start(trainer, pl_module)

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._compare_at_start(trainer, pl_module)

    def _compare_at_start(self, trainer: Trainer, module: LightningModule) -> None:
        """Compare once with samplers, and with the folder of a checkpoint without a schedule."""
        if self._compared_samplers is not trainer.state.fn:
            self._compared_samplers = trainer.state.fn
            self._compare_samplers(trainer, module)
        if self._compared or not trainer.ckpt_path:
            return
        self._compared = True
        path = os.fspath(trainer.ckpt_path)

        def act() -> None:
            load = self._schedule_around(path)
            if load is not None:
                self._compare(module, path, load, _MEND_CHECKPOINT)
            else:
                rank_zero_info(
                    f"{path!r} does not say its noise schedule; going on with "
                    f"{schedule_of_module(module)}"
                )

        on_rank_zero(trainer, act)  # other nodes may not have the folder

    def _schedule_around(self, path: str) -> Callable[[], NoiseSchedule | None] | None:
        """Return a function that reads the schedule of a checkpoint at ``path``, or None.

        For checkpoints that do not call ``on_load_checkpoint``, such as weights-only files.
        """
        own, shared = own_sidecar(path, self.subfolder), sidecar_folder(path, self.subfolder)
        if holds_schedule(own):
            return lambda: read_sidecar(own)
        if Folder(path).local is not None:  # a remote file would be fetched a second time
            try:
                checkpoint = read_checkpoint(path)
            except (ValueError, OSError):
                # Lightning has loaded it, so it is a format that alphabar does not read
                checkpoint = {}
            if SCHEDULE_KEY in checkpoint:
                return lambda: embedded_schedule(checkpoint, path)
        return (lambda: read_sidecar(shared)) if holds_schedule(shared) else None

    def _compare_samplers(self, trainer: Trainer, module: LightningModule) -> None:
        for callback in cast(Any, trainer).callbacks:
            sampler = getattr(callback, "sampler", None)
            if isinstance(sampler, Sampler):
                what = f"the sampler of {type(callback).__name__}"
                self._compare(module, what, lambda sampler=sampler: sampler.schedule, _MEND_SAMPLER)
                self._require_start_in_noise(what, sampler)

    def _require_start_in_noise(self, what: str, sampler: Sampler) -> None:
        # sampling starts with pure noise, which such a schedule has only at its last timestep
        # (2305.08891, section 3.3)
        schedule, start = sampler.schedule, sampler.knots[0]
        skipped = schedule.curve.is_discrete and schedule.has_zero_terminal_snr and start.alpha > 0
        if skipped and self.on_mismatch != "ignore":
            self._object(
                f"{what} starts at timestep {start.timestep:g}, where {schedule} still has a "
                f"signal of {start.alpha:.3f}, "
                "and it is given pure noise: its pictures would not show what the model learned; "
                "use grid='trailing'"
            )

    def _compare_folders(self, trainer: Trainer, module: LightningModule) -> None:
        for folder in self._folders(trainer):
            if holds_schedule(folder):
                self._compare(module, str(folder), partial(read_sidecar, folder), _MEND_FOLDER)

    def _compare(
        self,
        module: LightningModule,
        what: str,
        load: Callable[[], NoiseSchedule | None],
        mend: str,
    ) -> None:
        if self.on_mismatch == "ignore":
            return
        schedule = schedule_of_module(module)
        try:
            found = load()
        except ValueError as error:  # damaged: the schedule of its training is not known
            self._object(str(error), error)
            return
        if found is not None and found.fingerprint != schedule.fingerprint:
            self._object(
                f"{what!r} is of the noise schedule {found}, but this module has {schedule}; {mend}"
            )

    def _object(self, message: str, cause: Exception | None = None) -> None:
        if self.on_mismatch == "error":
            raise ValueError(message) from cause
        rank_zero_warn(f"{message} (on_mismatch='warn': going on)")

    # -- saving ------------------------------------------------------------------------------------

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        schedule = schedule_of_module(pl_module)

        def act() -> None:
            for folder in self._folders(trainer):
                folder.require_writable()
                write_sidecar(schedule, folder)

        on_rank_zero(trainer, act)

    def on_save_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        schedule = schedule_of_module(pl_module)
        checkpoint[SCHEDULE_KEY] = schedule.to_config()

        def act() -> None:
            for folder in self._folders(trainer):
                self._write(schedule, folder)

        # not in the background: the checkpoint goes to the same place next, and ranks wait for it
        if not self._over:
            on_rank_zero(trainer, act)
        elif trainer.is_global_zero:
            act()

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        self._over = True  # this rank has failed; other ranks may not have

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._complaints.sum_up()

    def _write(self, schedule: NoiseSchedule, folder: Folder) -> None:
        try:
            other = write_sidecar(schedule, folder)
            if other is not None:
                rank_zero_warn(f"{str(folder)!r} had come to say {other}; it says {schedule} again")
        except Exception as error:
            # the checkpoint embeds the schedule, so a folder that fails must not stop the save
            self._complain(f"the noise schedule could not be written to {str(folder)!r}", error)

    def _complain(self, what: str, error: Exception) -> None:
        # checkpoint folders have different names but one disk, so all count as one kind of failure
        failure = Failure("the folders of the noise schedule", error)
        self._complaints.tell(f"{what}: {failure}", failure.kind)

    def _folders(self, trainer: Trainer) -> list[Folder]:
        """Return the schedule folders, one next to the files of each checkpoint callback."""
        if is_fast_dev_run(trainer):
            return []
        paths = [getattr(callback, "dirpath", None) for callback in trainer.checkpoint_callbacks]
        return [
            Folder(path) / self.subfolder
            for path in dict.fromkeys(os.fspath(path) for path in paths if path)
        ]

    # -- one folder per checkpoint -----------------------------------------------------------------

    def _follow(self, trainer: Trainer, module: LightningModule) -> None:
        if self._followed is not None:  # after a failed fit, teardown did not run
            self._followed.undo()

        def saving(checkpoint: dict[str, Any]) -> None:
            checkpoint.setdefault(SCHEDULE_KEY, schedule_of_module(module).to_config())

        def saved(path: str) -> None:
            def act() -> None:
                self._write(schedule_of_module(module), own_sidecar(path, self.subfolder))

            if not self._over:
                on_rank_zero(trainer, act)
            elif trainer.is_global_zero:
                act()

        def removed(path: str) -> Callable[[], object]:
            folder = own_sidecar(path, self.subfolder)
            # removing a link does not remove its target
            if not trainer.is_global_zero or os.path.islink(path):
                return lambda: None
            return lambda: self._remove(folder)

        self._followed = SavesFollowed(trainer.strategy, saving, saved, removed)

    def _remove(self, folder: Folder) -> None:
        try:
            for name in (EXACT_NAME, CONFIG_NAME):
                folder.remove(name)
            if (
                folder.local is not None
                and folder.local.is_dir()
                and not any(folder.local.iterdir())
            ):
                folder.local.rmdir()
        except Exception as error:
            self._complain(f"the noise schedule in {str(folder)!r} outlived its checkpoint", error)


_MEND_CHECKPOINT = (
    "give the module the schedule that the checkpoint was trained with (schedule_from_checkpoint "
    "reads it), or, if the "
    "change is meant, use ScheduleCheckpoint(on_mismatch='warn')"
)
_MEND_FOLDER = (
    "give this run's checkpoints another dirpath, or the module that schedule, or, if the change "
    "is meant, use "
    "ScheduleCheckpoint(on_mismatch='warn'), which rewrites the folder"
)

_MEND_SAMPLER = (
    "its pictures would not show what the model learned; "
    "make it as Sampler(module.noising.schedule, ...)"
)
