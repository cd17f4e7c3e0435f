"""Previews during training: all ranks sample images on the training schedule, without side effects.

A preview restores all state that it may change, also when it fails: the random generators, the
train / eval flag of every submodule, the gradient mode, the weights, the compiled graphs. If only
one rank has an error, all ranks exchange it before their next collective. So training is
bit-identical with previews, without previews, and with previews that fail.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from datetime import timedelta
from functools import partial
from typing import Any, Literal, cast

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_info

from ...noising.utils.registry import lookup
from ...sampling import Method, Sampler
from ...training.loops.background import AFTER_AN_ERROR, AT_THE_END, BEFORE_A_CHECKPOINT
from ...training.loops.collectives import call_on_all_ranks
from ...training.loops.forward import ForwardMode, require_exit_after
from ...training.loops.loop import LiveModel
from ...training.media.options import Media
from ...training.previews.groups import PreviewConditions, grouped
from ...training.previews.preview import Moment, Previewer
from ...training.previews.recipe import recipe_of
from ...training.previews.run import PreviewRun
from ...training.previews.samplers import (
    fitting_for,
    name_of_sampler,
    require_drawable,
    require_refit_every,
    require_steps,
    sampler_for,
)
from ...training.publishing.publisher import Publisher
from ..support.live import live_module, loop_of_trainer
from ..support.module_api import (
    is_fast_dev_run,
    predict_of_module,
    schedule_of_module,
    shape_of_module,
)
from ..support.signals import terminate_together
from ..support.strategies import forward_mode_of
from .triggers import Triggers, is_last_epoch


class ValidationSampling(Callback):
    """Sample images during training, and show them as a grid in a PNG file and in loggers.

    Works with any LightningModule that has these attributes:

    - ``noising`` or ``schedule``.
    - ``predict(x, timesteps, **conditioning)``, which returns a tensor or an object with
      ``.sample``. The argument ``predict=`` replaces it.
    - ``sample_shape``. The argument ``shape=`` replaces it.

    Supports single-device, DDP, FSDP, ModelParallel (FSDP2) and DeepSpeed strategies. All ranks
    draw. An image depends on its seed and condition, not on the number of ranks.

    Trial: before training starts, the callback tries everything that a preview needs. On every rank
    this costs one sampling step of one image (a pipeline: two steps) and its decoding. An error in
    the trial is always raised, also with ``on_error='warn'``. If the shape of a sample is known
    only with the first batch, the trial waits for that batch. A preview at step 0 then needs
    ``shape`` or ``sample_shape``.

    Errors in a sharded model: an error inside a forward of a sharded model (FSDP, ZeRO-3) always
    ends training, also with ``on_error='warn'``. The other ranks wait in that forward until the
    process of this rank has ended or the process group's timeout has passed; see
    ``exit_after_error``.

    Publishing: a background thread of rank 0 writes files and calls loggers. Slow writes do not
    delay any rank, and each kind of failure warns once. Up to 8 previews wait in the queue. One
    more waits a minute for room; if there is none, it is dropped with a warning. Training waits for
    pending previews before a checkpoint that has this callback's state (up to one minute), at the
    end of fit (up to five minutes) and after an error or a signal (up to ten seconds). With
    ``on_error='raise'`` it waits after each preview.

    Timeouts: while one rank encodes or decodes alone, the others wait longer than the process
    group's timeout if needed. That timeout still limits a single forward of a sharded model, and
    the logging of numbers, which Lightning does on the training thread.

    NaN is not an error: it is shown as a checkerboard, with a warning. With ``fast_dev_run`` one
    image is drawn in two steps and nothing is written. With ``barebones`` nothing is drawn.

    Args:
        sampler: name ('dpmpp_2m', 'DPM++ 2M Karras', 'DPM adaptive') or object of any sampler. An
            object must have the training schedule.
            'fitted' fits a table of few steps to the network; see :class:`Fitting`.
        steps: sampling steps, 20 by default, 6 for 'fitted'. A Sampler object has its own number.
        refit_every: optimizer steps between two fits of 'fitted'; by default, when a check finds
            that the table is no better than a known method.
        num_images: images in a grid. Default: one for each of ``seeds``, else one for each prompt
            or class, else 16.
        every_n_train_steps, every_n_epochs, train_time_interval: interval between previews. Give at
            most one; the default is every epoch. Steps are optimizer steps. The time interval is a
            timedelta, measured on rank 0.
        extra_steps: additional steps with a preview, e.g. (0, 10, 100). 0 is before training.
        at_end: also draw a preview at the end of fit.
        seed, seeds: ``seed`` is the seed of the first image, and each next image adds 1. ``seeds``
            gives the seed of every image.
        batch_size: images that a rank draws at a time, and the unit in which images are assigned to
            ranks in turn. If a rank runs out of memory, it is halved on all ranks.
        shape: shape of one sample, (channels, height, width). One or three channels are shown
            unchanged. For other numbers (latents) the first three channels are shown, each scaled
            to its range. Videos: (channels, frames, height, width); sounds: (channels, length).
        prompts, negative_prompt, encode: texts, which images take in turn, the text for guidance,
            and a function that encodes them. ``encode`` maps a list of texts to a mapping of
            tensors with a row for each text: arguments of ``predict``. It is called once, before
            training. The last text is the negative prompt.
        classes, class_key, null_class: labels, which images take in turn, the argument of
            ``predict`` for them, and the label for "no class" in guidance.
        conditioning, unconditional: arguments of ``predict``. Tensors have a row for each image, or
            one for all.
        guidance_scale, guidance_rescale: classifier-free guidance, as in Sampler.
        weights: 'raw', 'ema' or 'both' (separate grids). See ``ema_weights`` for the averages that
            are found. While there is no average, the raw weights are used, and the preview says so.
        decode, decode_batch_size: function (or diffusers VAE) from latents to images, videos or
            sounds in [-1, 1], and its batch size.
        media: a :class:`Media`: how videos and sounds are shown, and their rates. Videos need
            nothing of it; sounds need ``Media(sample_rate=...)``.
        pipeline: a diffusers pipeline, or a function from the module to a pipeline. It draws
            instead of the network alone, with the training schedule as its scheduler. It must hold
            a network of the module.
        max_seconds: time limit of a preview. After it the preview stops, and finished images are
            shown.
        folder: folder for ``step_00000500.png``, by default ``previews`` in the log directory. The
            last part of its path is also the image's name in the loggers.
        predict: replaces the module's ``predict``.
        on_error: if a preview fails, warn and continue training ('warn'), or stop on all ranks
            ('raise').
        exit_after_error: seconds between an error inside a forward of a sharded model and the end
            of that rank's process (``os._exit``), even if the program handles the error. By default
            the process does not end.
        triggers: a :class:`Triggers`, instead of the five arguments from ``every_n_train_steps`` to
            ``at_end``.
        conditions: a :class:`PreviewConditions`, instead of the ten arguments from ``prompts`` to
            ``guidance_rescale``.

    Raises:
        ValueError: invalid names, numbers or conditioning. Raised at once, or before training
            starts if the check needs the module and the trainer.
        TypeError: before training, the module lacks a required attribute.
        OSError: before training, the folder cannot be written.
        Exception: before training, any error of ``encode`` or ``pipeline``.

    >>> previews = ValidationSampling("dpmpp_2m", steps=20, every_n_train_steps=500)
    >>> ValidationSampling("dpm2m")
    Traceback (most recent call last):
    ValueError: unknown method 'dpm2m'; did you mean 'DPM2', 'DPM++ 2M' or 'DPM2 a'?
    """

    def __init__(
        self,
        sampler: str | Method | Sampler | Any = "dpmpp_2m",
        steps: int | None = None,
        *,
        refit_every: int | None = None,
        num_images: int | None = None,
        every_n_train_steps: int | None = None,
        every_n_epochs: int | None = None,
        train_time_interval: timedelta | None = None,
        extra_steps: Sequence[int] = (),
        at_end: bool = False,
        seed: int = 0,
        seeds: Sequence[int] | None = None,
        batch_size: int = 4,
        shape: Sequence[int] | None = None,
        prompts: Sequence[str] = (),
        negative_prompt: str = "",
        encode: Callable[[list[str]], Mapping[str, Any]] | None = None,
        classes: Sequence[int] = (),
        class_key: str = "class_labels",
        null_class: int | None = None,
        conditioning: Mapping[str, Any] | None = None,
        unconditional: Mapping[str, Any] | None = None,
        guidance_scale: float = 1.0,
        guidance_rescale: float = 0.0,
        weights: Literal["raw", "ema", "both"] = "raw",
        decode: Callable[..., Any] | None = None,
        decode_batch_size: int = 1,
        media: Media | None = None,
        pipeline: Any = None,
        max_seconds: float | None = None,
        folder: str | os.PathLike[str] | None = None,
        predict: Callable[..., Any] | None = None,
        on_error: Literal["warn", "raise"] = "warn",
        exit_after_error: float | None = None,
        triggers: Triggers | None = None,
        conditions: PreviewConditions | None = None,
    ) -> None:
        super().__init__()
        self.sampler, self.steps = sampler, require_steps(sampler, steps)
        self.refit_every = require_refit_every(sampler, refit_every, pipeline)
        when = {
            "every_n_train_steps": every_n_train_steps,
            "every_n_epochs": every_n_epochs,
            "train_time_interval": train_time_interval,
            "extra_steps": tuple(extra_steps),
            "at_end": bool(at_end),
        }
        self.triggers = grouped("triggers", triggers, Triggers, when)
        what = {
            "prompts": prompts,
            "negative_prompt": negative_prompt,
            "encode": encode,
            "classes": classes,
            "class_key": class_key,
            "null_class": null_class,
            "conditioning": conditioning,
            "unconditional": unconditional,
            "guidance_scale": guidance_scale,
            "guidance_rescale": guidance_rescale,
        }
        given = grouped("conditions", conditions, PreviewConditions, what)
        self.recipe = recipe_of(
            given,
            num_images=num_images,
            seed=seed,
            seeds=seeds,
            batch_size=batch_size,
            weights=weights,
            predict=predict,
            decode=decode,
            decode_batch_size=decode_batch_size,
            media=media,
            pipeline=pipeline,
            max_seconds=max_seconds,
        )
        self.shape = tuple(shape) if shape is not None else None
        if self.shape is not None:
            require_drawable(self.shape, decode, self.recipe.media)
        self.folder = os.fspath(folder) if folder is not None else None
        self.exit_after_error = require_exit_after(exit_after_error)
        self.on_error = lookup("on_error", on_error, {mode: mode for mode in ("warn", "raise")})
        self._last_step = 0
        self._last_time = 0.0
        self._forward_mode: ForwardMode | None = None
        self._publisher: Publisher | None = None
        self._run: PreviewRun | None = None
        self._fitted: dict[str, Any] = {}
        self._untried = self._over = False

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {"_run": None, "_publisher": None}  # of one fit, with a thread

    # -- state: at most one preview per step, also with gradient accumulation and after a resume ---

    @property
    def state_key(self) -> str:
        return self._generate_state_key(
            sampler=name_of_sampler(self.sampler),
            steps=self.steps,
            triggers=repr(self.triggers),
            folder=_name(self.folder) if self.folder else None,
        )

    def state_dict(self) -> dict[str, Any]:
        fitting = None if self._run is None else self._run.previewer.fitting
        return {"last_step": self._last_step} | (
            {} if fitting is None else {"fitted": fitting.state()}
        )

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._last_step = int(state_dict["last_step"])
        self._fitted = state_dict.get("fitted", {})

    # -- before training ---------------------------------------------------------------------------

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage == "fit":
            # values of an earlier run; a resume restores its own step after this
            self._last_step, self._publisher, self._fitted = 0, None, {}
            self._untried = self._over = False

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._run = None
        if trainer.barebones:
            rank_zero_info(
                "no previews: Trainer(barebones=True) leaves out what could slow training down"
            )
            return
        self._forward_mode = replace(
            forward_mode_of(trainer.strategy), exit_after=self.exit_after_error
        )
        if self._forward_mode.sharded and self.recipe.pipeline is not None:
            raise ValueError(
                f"a pipeline calls its networks by itself, which {type(trainer.strategy).__name__} "
                "does not allow for a "
                "sharded model; draw with predict= and decode=, or train under 'ddp'"
            )
        sampler_for(schedule_of_module(pl_module), self.sampler, self.steps)
        if self.recipe.pipeline is None:
            if self.recipe.predict is None:
                predict_of_module(pl_module)
            shape = self._sample_shape(pl_module)
            if shape is not None:
                require_drawable(shape, self.recipe.decode, self.recipe.media)
        if not is_fast_dev_run(trainer):
            self._publisher = Publisher(
                self._choose_folder(trainer), loop_of_trainer(trainer), "ValidationSampling"
            )
            self._publisher.try_out()

    def _sample_shape(self, module: LightningModule) -> tuple[int, ...] | None:
        if self.shape is not None or self.recipe.pipeline is not None:  # a pipeline knows its shape
            return self.shape
        return shape_of_module(module)

    def _choose_folder(self, trainer: Trainer) -> str:
        # log_dir is a collective: every rank must read it
        log_dir = trainer.log_dir or trainer.default_root_dir
        instances = [c for c in cast(Any, trainer).callbacks if isinstance(c, ValidationSampling)]
        number = [c for c in instances if c.folder is None or c is self].index(self) + 1
        name = "previews" if number == 1 else f"previews_{number}"
        folder = (
            self.folder if self.folder is not None else f"{os.fspath(log_dir).rstrip('/')}/{name}"
        )
        taken = [_name(c._publisher.folder) for c in instances if c._publisher is not None]
        if _name(folder) in taken:
            raise ValueError(
                f"two ValidationSampling callbacks have folders named {_name(folder)!r}, which "
                "also names the picture in "
                "the loggers; give each a folder of another name"
            )
        return folder

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # not in on_fit_start: sharded strategies restore their weights after it, and encode may
        # need them
        self._last_time = time.monotonic()
        if trainer.barebones:
            return
        sampler = sampler_for(schedule_of_module(pl_module), self.sampler, self.steps)
        loop, model = loop_of_trainer(trainer), self._live(trainer, pl_module)
        scale = self.recipe.guidance["guidance_scale"]
        fitting = fitting_for(sampler.schedule, self.sampler, self.steps, self.refit_every, scale)
        if fitting is not None:
            fitting.load(self._fitted)
        previewer = call_on_all_ranks(
            lambda: Previewer.prepare(self.recipe, sampler, loop, model, fitting),
            trainer.world_size,
        )
        together = partial(terminate_together, trainer) if trainer.world_size > 1 else None
        self._run = PreviewRun(previewer, self._publisher, self.on_error, together)
        if is_fast_dev_run(trainer):  # it is a trial itself
            return
        at_once = trainer.global_step == 0 and self.triggers.at_step(0)
        self._try(trainer, pl_module, required=at_once)
        if at_once:
            self._preview(trainer, pl_module)

    def _live(self, trainer: Trainer, module: LightningModule) -> LiveModel:
        forward_mode = self._forward_mode
        assert forward_mode is not None  # since on_fit_start
        predict = self.recipe.predict
        if predict is None and self.recipe.pipeline is None:
            predict = predict_of_module(module)
        return live_module(trainer, module, forward_mode, predict)

    def _try(self, trainer: Trainer, module: LightningModule, required: bool = False) -> None:
        """Draw a trial image that is not shown, so that errors appear before a long run.

        If the shape of a sample is known only with the first batch, the trial waits for that batch.
        """
        shape = trainer.strategy.broadcast(self._sample_shape(module))
        self._untried = shape is None and self.recipe.pipeline is None
        if self._untried:
            if required:
                raise ValueError(
                    "a preview before training (extra_steps has 0) needs the shape of a sample, "
                    "which "
                    f"{type(module).__name__} does not know before its first batch; give "
                    "shape=(channels, height, width), or "
                    "set the module's sample_shape"
                )
            return
        if shape is not None and self.recipe.pipeline is None:
            require_drawable(shape, self.recipe.decode, self.recipe.media)
        assert self._run is not None  # since on_train_start
        self._run.trial(self._live(trainer, module), shape, trainer.global_step)

    # -- triggers ----------------------------------------------------------------------------------

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self._run is None or self._publisher is None:
            return
        self._publisher.complain()
        if self._untried:
            self._try(trainer, pl_module)
            # a module that still does not know its shape gets the error at its first preview
            self._untried = False
        if trainer.global_step in (0, self._last_step):
            return
        due = self.triggers.at_time(trainer, time.monotonic() - self._last_time)
        if due or self.triggers.at_step(trainer.global_step):
            self._preview_once(trainer, pl_module)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        due = is_fast_dev_run(trainer) or self.triggers.at_epoch(trainer.current_epoch)
        # not in on_train_end: other callbacks may have put averages into the model by then
        if due or (self.triggers.at_end and is_last_epoch(trainer)):
            self._preview_once(trainer, pl_module)

    def _preview_once(self, trainer: Trainer, module: LightningModule) -> None:
        if trainer.global_step not in (0, self._last_step):
            self._preview(trainer, module)

    # -- drawing and publishing --------------------------------------------------------------------

    def _preview(self, trainer: Trainer, module: LightningModule) -> None:
        if self._run is None:
            return
        before, self._last_step = self._last_step, trainer.global_step
        moment = Moment(trainer.global_step, trainer.current_epoch, is_fast_dev_run(trainer))
        try:
            # ranks may have different shapes (bucketed data), and gather needs equal shapes
            done = self._run.preview(
                self._live(trainer, module),
                moment,
                lambda: trainer.strategy.broadcast(self._sample_shape(module)),
            )
        finally:
            self._last_time = time.monotonic()
        if not done:
            self._last_step = before  # so that a resumed run draws this preview

    # -- pending previews --------------------------------------------------------------------------

    def on_save_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        if not self._over:  # a run that resumes from this checkpoint does not draw them again
            self._finish(BEFORE_A_CHECKPOINT)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._finish(AT_THE_END)
        if self._publisher is not None:
            self._publisher.sum_up()

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        self._over = True  # this rank has failed, others may not have: no collectives from here on
        if self._publisher is not None:
            self._publisher.abandon(AFTER_AN_ERROR)

    def _finish(self, seconds: float) -> None:
        if self._run is not None and self._publisher is not None:
            self._publisher.finish(seconds)


def _name(folder: str) -> str:
    return folder.rstrip("/").rsplit("/", 1)[-1]
