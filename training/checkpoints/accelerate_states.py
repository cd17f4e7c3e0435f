"""The noise schedule in the states that accelerate saves, and a comparison when they are loaded."""

from __future__ import annotations

import os
from typing import Any, Literal

from ...noising import NoiseSchedule
from ...noising.utils.registry import lookup
from ..loops.collectives import on_rank_zero
from ..loops.complaints import Complaints, Failure, warn_on_rank_zero
from ..loops.loop import loop_of
from ..loops.objective import schedule_in
from .sidecars import SUBFOLDER, holds_schedule, read_sidecar, write_sidecar
from .storage import Folder


def save_schedule_with(
    accelerator: Any,
    schedule: NoiseSchedule | Any,
    subfolder: str = SUBFOLDER,
    on_mismatch: Literal["error", "warn", "ignore"] = "error",
) -> None:
    """Save the schedule with every ``accelerator.save_state``, and compare it in ``load_state``.

    The main process writes ``scheduler/noise_schedule.json`` and the ``scheduler_config.json`` that
    diffusers loads into the folder of the state. ``schedule_from_checkpoint`` reads them. If they
    cannot be written, it warns, and the state is saved without them.

    Args:
        accelerator: the ``Accelerator`` of the training.
        schedule: the schedule of the training, or an object with one, such as a Noising.
        subfolder: name of the folder in the folder of a state.
        on_mismatch: if a loaded state has another schedule, raise a ValueError on all ranks
            ('error'), warn and continue ('warn'), or 'ignore' it. A state without a schedule is a
            warning.

    Raises:
        TypeError: there is no schedule.
        ValueError: an unknown ``on_mismatch``.

    >>> from accelerate import Accelerator
    >>> save_schedule_with(Accelerator(cpu=True), NoiseSchedule.flow())
    """
    own = schedule_in(schedule)
    lookup("on_mismatch", on_mismatch, {mode: mode for mode in ("error", "warn", "ignore")})
    loop, complaints = loop_of(accelerator), Complaints("save_schedule_with")

    def write(folder: Folder) -> None:
        try:
            write_sidecar(own, folder)
        except Exception as error:  # the weights of the state are worth more than its schedule
            failure = Failure("the folders of the noise schedule", error)
            complaints.tell(
                f"the noise schedule could not be written to {str(folder)!r}: {failure}",
                failure.kind,
            )

    def compare(folder: Folder) -> None:
        if not holds_schedule(folder):
            warn_on_rank_zero(
                f"{str(folder)!r} does not say the noise schedule of the state; going on with {own}"
            )
            return
        found = read_sidecar(folder)
        if found.fingerprint == own.fingerprint:
            return
        message = (
            f"{str(folder)!r} is of the noise schedule {found}, but this training has {own}; give "
            "the training the schedule of the state (schedule_from_checkpoint reads it), or, if "
            "the change is meant, use save_schedule_with(on_mismatch='warn')"
        )
        if on_mismatch == "error":
            raise ValueError(message)
        warn_on_rank_zero(message)

    def saving(models: Any, weights: Any, output_dir: str) -> None:
        on_rank_zero(loop, lambda: write(_folder_in(output_dir, subfolder)))

    def loading(models: Any, input_dir: str) -> None:
        if on_mismatch != "ignore":
            on_rank_zero(loop, lambda: compare(_folder_in(input_dir, subfolder)))

    accelerator.register_save_state_pre_hook(saving)
    accelerator.register_load_state_pre_hook(loading)


def _folder_in(state: str | os.PathLike[str], subfolder: str) -> Folder:
    return Folder(os.fspath(state)) / subfolder
