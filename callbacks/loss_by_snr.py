"""Loss by log SNR: scalars, a plot and text findings, without any effect on training."""

from __future__ import annotations

import importlib.util
import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn
from torch import Tensor

from ..noising import Noising
from ..noising.noising import Noised
from ..noising.utils.atomic import require_writable
from ..noising.utils.validation import whole_number
from ..training.density_advice import Window, advise_density, merged, plot_advice
from ..training.loops.background import AFTER_AN_ERROR, AT_THE_END, finish, pictures_of
from ..training.loops.collectives import on_rank_zero
from ..training.loops.complaints import Complaints, Failure
from ..training.publishing.figures import publish_figure
from ..training.snr_buckets import COUNT, ERROR, Buckets, findings, means, plot
from .support.module_api import is_fast_dev_run


class LossBySNR(Callback):
    """Log the loss by noise level: scalars for each log SNR bucket, a plot, and text findings.

    Works with any LightningModule that has an attribute ``noising`` (a Noising) and computes its
    losses with it. The device counts every training loss. Every ``every_n_train_steps`` optimizer
    steps the callback sums over ranks and copies the sums to the host once.

    With k times for each sample, each of its elements counts in the bucket of its own time. Scalars
    are named ``loss_by_snr/error/...`` (unweighted) and ``loss_by_snr/loss/...``
    (weighted). They are means over the steps since the last report. Each of these findings is
    reported once: a bucket without samples, a terminal step of weight zero, a loss that is not
    finite, a bucket that contributes most of the loss.

    At the end of training it advises a density of timesteps: where the loss still falls, as text
    with the flags to type and as the plot ``advice.png``. It says so if there are too few reports
    or too much noise for an advice. The method is a heuristic, see
    :mod:`alphabar.training.density_advice`.

    An error in this callback is a warning, and training continues bit-identically. With
    ``fast_dev_run`` nothing is written.

    Args:
        every_n_train_steps: optimizer steps between two reports.
        buckets: number of buckets between the ends of the schedule. Infinite log SNR has a bucket
            of its own.
        folder: folder of the plots (``step_00000500.png``), by default ``loss_by_snr`` in the log
            directory. Plots need matplotlib; without it the callback warns and draws none. A
            background thread of rank 0 writes the files and sends the images to loggers.

    Raises:
        ValueError: invalid numbers.
        TypeError: before training, the module has no Noising.
        OSError: before training, the folder cannot be written.

    >>> LossBySNR(every_n_train_steps=500).buckets
    20
    >>> LossBySNR(buckets=0)
    Traceback (most recent call last):
    ValueError: buckets must be an integer of at least 1, got 0
    """

    def __init__(
        self,
        every_n_train_steps: int = 500,
        buckets: int = 20,
        folder: str | os.PathLike[str] | None = None,
    ) -> None:
        super().__init__()
        self.every_n_train_steps = _at_least_one("every_n_train_steps", every_n_train_steps)
        self.buckets = _at_least_one("buckets", buckets)
        self.folder = Path(folder) if folder is not None else None
        self._stop: Callable[[], None] | None = None
        self._folder: Path | None = None
        self._failed: list[tuple[str, Exception]] = []  # filled by the publishing thread
        self._complaints = Complaints("LossBySNR")
        self._reset()

    def _reset(self) -> None:
        self._last_step = 0
        self._drawn: list[float] = []  # samples per bucket in all reports, summed over ranks
        self._told: list[str] = []
        self._windows: list[Window] = []  # samples and errors per bucket in each report

    # -- state: counts survive a resume, sums since the last report do not -------------------------

    def state_dict(self) -> dict[str, Any]:
        return {
            "last_step": self._last_step,
            "drawn": self._drawn,
            "told": self._told,
            "windows": self._windows,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._last_step = int(state_dict["last_step"])
        self._drawn, self._told = list(state_dict["drawn"]), list(state_dict["told"])
        self._windows = list(state_dict.get("windows", []))  # older checkpoints have none

    # -- before training ---------------------------------------------------------------------------

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage == "fit":
            self._reset()

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        _noising_of(pl_module)
        if is_fast_dev_run(trainer):
            return
        # log_dir is a collective: every rank must read it
        log_dir = trainer.log_dir or trainer.default_root_dir
        folder = self._folder = (
            self.folder if self.folder is not None else Path(log_dir, "loss_by_snr")
        )
        if importlib.util.find_spec("matplotlib") is None:
            self._folder = None
            rank_zero_warn(
                "LossBySNR logs numbers alone: its plots need matplotlib, pip install "
                "'alphabar[matplotlib]'"
            )
        else:
            on_rank_zero(trainer, lambda: require_writable(folder))

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        noising = _noising_of(pl_module)
        buckets = self._buckets = Buckets.of(noising.schedule, self.buckets)
        if len(self._drawn) != len(buckets):
            self._drawn = [0.0] * len(buckets)  # first run, or other buckets than the checkpoint
            self._windows = []
        self._sums = buckets.zeros(pl_module.device)

        def listener(noised: Noised, errors: Tensor) -> None:
            if trainer.training:  # not during validation
                self._count(noised, errors)

        self._end()
        self._stop = noising.register_loss_hook(listener)

    def _end(self) -> None:
        if self._stop is not None:
            stop, self._stop = self._stop, None
            stop()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._end()
        if not is_fast_dev_run(trainer):
            if trainer.is_global_zero:
                self._attempt("the advice", lambda: self._advise(trainer, _noising_of(pl_module)))
            finish(trainer, pictures_of(trainer), AT_THE_END)
            self._complain()
            self._complaints.sum_up()

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        self._end()
        pictures_of(trainer).wait(AFTER_AN_ERROR)
        self._complain()

    # -- counting ----------------------------------------------------------------------------------

    @torch.no_grad()
    def _count(self, noised: Noised, errors: Tensor) -> None:
        try:
            self._buckets.add(self._sums, noised.log_snr, errors, noised.weight, noised.counted)
        except Exception as error:
            self._give_up(error)

    def _give_up(self, error: Exception) -> None:
        self._end()  # on_train_batch_end still sums the counts so far over all ranks
        # not rank_zero_warn: only the rank that failed knows of the error
        warnings.warn(
            f"LossBySNR counts no further: {type(error).__name__}: {error}; training goes on",
            stacklevel=2,
        )

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        step = trainer.global_step
        self._complain()
        if step in (0, self._last_step) or step % self.every_n_train_steps:
            return
        self._last_step = step
        sums = self._sums.clone()
        self._sums.zero_()
        if trainer.world_size > 1:
            dist.all_reduce(sums)
        sums = sums.cpu()  # the only point where the host waits for the device
        self._drawn = [
            before + more for before, more in zip(self._drawn, sums[COUNT].tolist(), strict=True)
        ]
        self._windows = merged([*self._windows, (sums[COUNT].tolist(), sums[ERROR].tolist())])
        if trainer.is_global_zero:
            self._report(trainer, sums)

    # -- reporting: on rank 0 only, without collectives afterwards ---------------------------------

    def _report(self, trainer: Trainer, sums: Tensor) -> None:
        step = trainer.global_step
        self._attempt("logging", lambda: self._log(trainer, sums, step))
        self._attempt("words", lambda: self._tell(sums, step))
        if self._folder is not None:
            self._attempt("the plot", lambda: self._plot(trainer, sums, step))

    def _attempt(self, what: str, act: Callable[[], None]) -> None:
        try:
            act()
        except Exception as error:
            self._failed.append((what, error))
            self._complain()

    def _complain(self) -> None:
        while self._failed:
            what, error = self._failed.pop(0)
            failure = Failure(what, error)
            self._complaints.tell(
                f"LossBySNR: {what} failed: {type(error).__name__}: {error}", failure.kind
            )

    def _log(self, trainer: Trainer, sums: Tensor, step: int) -> None:
        metrics = means(self._buckets, sums)
        for logger in trainer.loggers:
            if metrics:
                logger.log_metrics(metrics, step=step)

    def _tell(self, sums: Tensor, step: int) -> None:
        if not float(sums[COUNT].sum()):
            self._once(
                "silent",
                True,
                f"step {step}: no loss was computed by module.noising; LossBySNR has nothing to "
                "show",
            )
        for found in findings(self._buckets, sums, torch.tensor(self._drawn)):
            self._once(found.key, found.warning, f"step {step}: {found.text}")

    def _once(self, key: str, warning: bool, text: str) -> None:
        if key not in self._told:
            self._told.append(key)
            (rank_zero_warn if warning else rank_zero_info)(text)

    def _plot(self, trainer: Trainer, sums: Tensor, step: int) -> None:
        png = plot(self._buckets, sums, f"loss by log SNR, step {step}")
        self._publish(trainer, png, "loss_by_snr", f"step_{step:08d}.png")

    def _publish(self, trainer: Trainer, png: bytes, tag: str, name: str) -> None:
        assert self._folder is not None
        publish_figure(
            pictures_of(trainer),
            png,
            tag,
            trainer.global_step,
            trainer.loggers,
            lambda error: self._failed.append(("the plot", error)),
            self._folder / name,
        )

    def _advise(self, trainer: Trainer, noising: Noising) -> None:
        if not self._windows:
            return
        advice = advise_density(self._buckets, self._windows, noising.schedule, noising.timesteps)
        rank_zero_info(f"LossBySNR: {advice.text}")
        if advice.flags is not None and self._folder is not None:
            png = plot_advice(self._buckets, advice)
            self._publish(trainer, png, "loss_by_snr_advice", "advice.png")


def _noising_of(module: LightningModule) -> Noising:
    noising = getattr(module, "noising", None)
    if not isinstance(noising, Noising):
        raise TypeError(
            f"{type(module).__name__} has no attribute noising (a Noising), whose losses are to be "
            "told apart"
        )
    return noising


def _at_least_one(name: str, value: Any) -> int:
    return whole_number(name, value, least=1)
