"""Previews while a model trains: images drawn on all ranks, from the schedule that is trained on, without a trace.

What a preview must leave as it was is restored also when it fails: the random generators, the train / eval flag of
every submodule, the gradient mode, the compiled graphs. What only one rank notices is told to all before they meet
again. So training with previews, without them, and with previews that fail, is the same to the last bit.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, cast

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.strategies import (
    DDPStrategy,
    DeepSpeedStrategy,
    SingleDeviceStrategy,
    SingleDeviceXLAStrategy,
    Strategy,
    XLAStrategy,
)
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor

from ..noising import NoiseSchedule
from ..noising.files import require_writable, write_atomically
from ..noising.registry import lookup
from ..sampling import Method, Sampler, resolve_method
from ..training.images import image_grid, png_bytes, require_image_shape
from .agreement import errors_of_all_ranks, gather, on_rank_zero
from .contract import is_rehearsal, predict_of_module, schedule_of_module, shape_of_module
from .drawing import Drawing
from .image_logging import log_image
from .plan import Plan

DEFAULT_STEPS = 20
REHEARSAL_STEPS = 2  # of the one image that fast_dev_run draws


class ValidationSampling(Callback):
    """Draw images with the model while it trains, and show them as a grid: a PNG file, and in loggers that take images.

    The LightningModule (any) has ``noising`` or ``schedule``, a method ``predict(x, timesteps, **conditioning)`` that
    returns a tensor or an object with ``.sample``, and ``sample_shape``; ``predict=`` and ``shape=`` here stand in for
    the latter two. All ranks draw; image i starts from ``seed + i`` and does not depend on the number of ranks.

    Args:
        sampler: a name ('dpmpp_2m', 'DPM++ 2M Karras') or a Sampler, which must be of the schedule that is trained on.
        steps: sampling steps, 20 by default; a Sampler brings its own.
        num_images: images in a grid.
        every_n_train_steps, every_n_epochs: when; one of the two, by default every epoch. Steps are optimizer steps.
        seed: of the first image.
        batch_size: images that a rank draws at a time, and the share that ranks take in turn.
        shape: of one sample, (channels, height, width). One or three channels are shown as they are, other numbers
            (latents) by their first three, each stretched to its range.
        conditioning, unconditional: arguments of ``predict``; tensors have a row for each image, or one for all.
        guidance_scale, guidance_rescale: classifier-free guidance, as in Sampler.
        folder: where ``step_00000500.png`` goes, by default ``previews`` in the log directory. Its last part is also
            the picture's name in the loggers.
        predict: called in place of the module's ``predict``.
        on_error: a preview that fails is a warning and training goes on ('warn'), or stops on all ranks ('raise').

    Raises ValueError for names, numbers and conditioning that do not fit: at once, or, where module and trainer must be
    known, before training starts; then also TypeError for a module that lacks what is named above, and OSError for a
    folder that cannot be written. For single-device and DDP strategies. With ``fast_dev_run`` one image is drawn in two
    steps and nothing is written.

    >>> previews = ValidationSampling("dpmpp_2m", steps=20, every_n_train_steps=500)
    >>> ValidationSampling("dpm2m")
    Traceback (most recent call last):
    ValueError: unknown method 'dpm2m'; did you mean 'DPM2', 'DPM++ 2M' or 'DPM2 a'?
    """

    def __init__(
        self,
        sampler: str | Method | Sampler = "dpmpp_2m",
        steps: int | None = None,
        *,
        num_images: int = 16,
        every_n_train_steps: int | None = None,
        every_n_epochs: int | None = None,
        seed: int = 0,
        batch_size: int = 4,
        shape: Sequence[int] | None = None,
        conditioning: Mapping[str, Any] | None = None,
        unconditional: Mapping[str, Any] | None = None,
        guidance_scale: float = 1.0,
        guidance_rescale: float = 0.0,
        folder: str | os.PathLike[str] | None = None,
        predict: Callable[..., Any] | None = None,
        on_error: Literal["warn", "raise"] = "warn",
    ) -> None:
        super().__init__()
        self.sampler = sampler
        self.steps = _steps(sampler, steps)
        self.every_n_train_steps, self.every_n_epochs = _triggers(every_n_train_steps, every_n_epochs)
        self.batch_size = min(_at_least_one("batch_size", batch_size), _at_least_one("num_images", num_images))
        self.drawing = Drawing(
            num_images,
            int(seed),
            dict(conditioning or {}),
            unconditional,
            float(guidance_scale),
            float(guidance_rescale),
        )
        self.shape = tuple(shape) if shape is not None else None
        if self.shape is not None:
            require_image_shape(self.shape)
        self.folder = Path(_local(folder)) if folder is not None else None
        self.predict = predict
        self.on_error = lookup("on_error", on_error, {mode: mode for mode in ("warn", "raise")})
        self._last_step = 0
        self._resolved: Sampler | None = None
        self._folder: Path | None = None
        self._loggers_told: set[str] = set()

    # -- state: no preview twice at one step, neither under accumulation nor after a resume ----------------------------

    @property
    def state_key(self) -> str:
        method = self.sampler.method if isinstance(self.sampler, Sampler) else self.sampler
        return self._generate_state_key(
            sampler=method if isinstance(method, str) else method.name,
            steps=self.steps,
            every_n_train_steps=self.every_n_train_steps,
            every_n_epochs=self.every_n_epochs,
            folder=self.folder.name if self.folder else None,
        )

    def state_dict(self) -> dict[str, Any]:
        return {"last_step": self._last_step}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._last_step = int(state_dict["last_step"])

    # -- before training -----------------------------------------------------------------------------------------------

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage == "fit":
            self._last_step, self._folder = 0, None  # an earlier run's; a resume restores its own step after this

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        _require_whole_model_on_each_rank(trainer.strategy)
        self._resolved = self._sampler_for(schedule_of_module(pl_module))
        if self.predict is None:
            predict_of_module(pl_module)
        shape = self._sample_shape(pl_module)
        if shape is not None:
            require_image_shape(shape)
        if not is_rehearsal(trainer):
            folder = self._folder = self._choose_folder(trainer)
            on_rank_zero(trainer, lambda: require_writable(folder))

    def _sampler_for(self, schedule: NoiseSchedule) -> Sampler:
        if not isinstance(self.sampler, Sampler):
            return Sampler(schedule, self.sampler, self.steps)
        if self.sampler.schedule.fingerprint != schedule.fingerprint:
            raise ValueError(
                f"the sampler is made for {self.sampler.schedule}, but the model trains on {schedule}: its previews "
                "would not show what the model learned; make it as Sampler(module.noising.schedule, ...)"
            )
        return self.sampler

    def _sample_shape(self, module: LightningModule) -> tuple[int, ...] | None:
        return self.shape if self.shape is not None else shape_of_module(module)

    def _choose_folder(self, trainer: Trainer) -> Path:
        log_dir = trainer.log_dir or trainer.default_root_dir  # log_dir is a collective: every rank asks for it
        instances = [c for c in cast(Any, trainer).callbacks if isinstance(c, ValidationSampling)]
        number = [c for c in instances if c.folder is None or c is self].index(self) + 1
        name = "previews" if number == 1 else f"previews_{number}"
        folder = self.folder if self.folder is not None else Path(_local(log_dir), name)
        if folder.name in [c._folder.name for c in instances if c._folder is not None]:
            raise ValueError(
                f"two ValidationSampling callbacks have folders named {folder.name!r}, which also names the picture in "
                "the loggers; give each a folder of another name"
            )
        return folder

    # -- when ----------------------------------------------------------------------------------------------------------

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        n = self.every_n_train_steps
        if n is not None and trainer.global_step % n == 0 and not is_rehearsal(trainer):
            self._preview_once(trainer, pl_module)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        n = 1 if is_rehearsal(trainer) else self.every_n_epochs
        if n is not None and (trainer.current_epoch + 1) % n == 0:
            self._preview_once(trainer, pl_module)

    def _preview_once(self, trainer: Trainer, module: LightningModule) -> None:
        if trainer.global_step not in (0, self._last_step):
            self._last_step = trainer.global_step
            self._preview(trainer, module)

    # -- what ----------------------------------------------------------------------------------------------------------

    def _preview(self, trainer: Trainer, module: LightningModule) -> None:
        rehearsal = is_rehearsal(trainer)
        plan = Plan(self.drawing.num_images, self.batch_size, trainer.world_size)
        if rehearsal:
            plan = Plan(1, 1, trainer.world_size)
        # ranks may have recorded different shapes (bucketed data), and only equal ones can be gathered
        shape = trainer.strategy.broadcast(self._sample_shape(module))
        own, error = None, None
        try:
            own = self._draw(trainer, module, plan, shape, stop=REHEARSAL_STEPS if rehearsal else None)
        except Exception as raised:
            error = raised
        if self._failed(trainer, error) or own is None:
            return
        pixels = gather(own, trainer.world_size)
        error = None
        if trainer.is_global_zero and not rehearsal:
            try:
                self._publish(trainer, image_grid(plan.in_order(pixels).cpu()))
            except Exception as raised:
                error = raised
        self._failed(trainer, error)

    def _draw(
        self, trainer: Trainer, module: LightningModule, plan: Plan, shape: tuple[int, ...] | None, stop: int | None
    ) -> Tensor:
        """Return this rank's images, uint8 (rounds, batch, channels, height, width)."""
        if shape is None:
            raise ValueError("the shape of a sample is not known; set the module's sample_shape, or give shape=")
        assert self._resolved is not None  # since on_fit_start
        return self.drawing.pixels(
            self._network(trainer, module),
            self._resolved,
            shape,
            plan.batches(trainer.global_rank),
            modules=(module, self.predict),
            device=module.device,
            stop=stop,
        )

    def _network(self, trainer: Trainer, module: LightningModule) -> Callable[..., Any]:
        precision = trainer.precision_plugin
        predict = self.predict if self.predict is not None else predict_of_module(module)

        def network(x: Tensor, timesteps: Tensor, **conditioning: Any) -> Any:
            # as in training: inputs are converted, times are not. Around the call and not around the loop, because half
            # precision changes the default dtype, in which the noise would then be drawn
            with precision.forward_context():
                return predict(precision.convert_input(x), timesteps, **precision.convert_input(conditioning))

        return network

    # -- afterwards ----------------------------------------------------------------------------------------------------

    def _publish(self, trainer: Trainer, grid: Tensor) -> None:
        """Write and log a grid; a place that fails does not keep the picture from the others."""
        assert self._folder is not None  # since on_fit_start
        step, failed = trainer.global_step, []
        try:
            write_atomically(self._folder / f"step_{step:08d}.png", png_bytes(grid))
        except OSError as error:
            failed.append(f"cannot write to {str(self._folder)!r}: {error}")
        for logger in trainer.loggers:
            name = type(logger).__name__
            try:
                if not log_image(logger, self._folder.name, grid, step):
                    self._tell_once(name)
            except Exception as error:
                failed.append(f"{name}: {type(error).__name__}: {error}")
        if failed:
            raise RuntimeError("; ".join(failed))

    def _tell_once(self, logger: str) -> None:
        if logger not in self._loggers_told:
            self._loggers_told.add(logger)
            rank_zero_warn(f"{logger} takes no images; previews are in {str(self._folder)!r} alone")

    def _failed(self, trainer: Trainer, error: Exception | None) -> bool:
        """Tell all ranks of an error on any, and do on all what ``on_error`` says; return whether there was one."""
        words = errors_of_all_ranks(error, trainer.world_size)
        if words is None:
            return False
        message = f"the preview at step {trainer.global_step} failed: {words}"
        if self.on_error == "raise":
            raise RuntimeError(message) from error
        rank_zero_warn(f"{message}; training goes on as if there had been none")
        return True


def _steps(sampler: str | Method | Sampler, steps: int | None) -> int:
    if isinstance(sampler, Sampler):
        if steps not in (None, sampler.steps):
            raise ValueError(f"the sampler has {sampler.steps} steps, and steps={steps} contradicts it; leave it out")
        return sampler.steps
    resolve_method(sampler)
    return DEFAULT_STEPS if steps is None else _at_least_one("steps", steps)


def _triggers(every_n_train_steps: int | None, every_n_epochs: int | None) -> tuple[int | None, int | None]:
    if every_n_train_steps is None:
        return None, _at_least_one("every_n_epochs", 1 if every_n_epochs is None else every_n_epochs)
    if every_n_epochs is not None:
        given = f"every_n_train_steps={every_n_train_steps} and every_n_epochs={every_n_epochs}"
        raise ValueError(f"previews follow steps or epochs, not both; got {given}, leave one out")
    return _at_least_one("every_n_train_steps", every_n_train_steps), None


def _at_least_one(name: str, value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{name} must be an integer of at least 1, got {value!r}")
    return value


def _local(folder: str | os.PathLike[str]) -> str:
    folder = os.fspath(folder)
    if "://" in folder:
        raise ValueError(f"previews are written to a local folder, got {folder!r}; give folder= one")
    return folder


def _require_whole_model_on_each_rank(strategy: Strategy) -> None:
    others = DeepSpeedStrategy, XLAStrategy, SingleDeviceXLAStrategy  # of the two kinds by inheritance alone
    if not isinstance(strategy, SingleDeviceStrategy | DDPStrategy) or isinstance(strategy, others):
        raise ValueError(
            "ValidationSampling draws where each rank holds the whole model, under single-device and DDP strategies, "
            f"got {type(strategy).__name__}; use strategy='ddp', or leave the callback out"
        )
