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
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn

from ...noising.utils.registry import lookup
from ...sampling import Method, Sampler
from ..support.background import (
    AFTER_AN_ERROR,
    AT_THE_END,
    BEFORE_A_CHECKPOINT,
    finish,
    pictures_of,
)
from ..support.collectives import (
    AgreedError,
    any_rank,
    call_on_all_ranks,
    on_rank_zero,
    raise_on_all_ranks,
)
from ..support.complaints import Complaints, Failure
from ..support.isolation import sigterm_deferred
from ..support.module_api import (
    is_fast_dev_run,
    name_of_sampler,
    predict_of_module,
    require_drawable,
    require_steps,
    sampler_for,
    schedule_of_module,
    shape_of_module,
)
from ..support.strategies import ForwardMode, forward_mode_of
from .conditioning import Conditions
from .groups import PreviewConditions, grouped
from .preview import WEIGHTS, Previewer, Recipe
from .publish import Preview, publish, try_out
from .render import Drawing
from .triggers import Triggers, at_least_one, is_last_epoch

DEFAULT_IMAGES = 16


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
        steps: sampling steps, 20 by default. A Sampler object has its own number.
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
            to its range. Videos and sounds need ``decode``.
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
        decode, decode_batch_size: function (or diffusers VAE) from latents to images in [-1, 1],
            and its batch size.
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
        seeds = () if seeds is None else tuple(int(s) for s in seeds)
        if num_images is None:
            num_images = len(seeds or given.prompts or given.classes) or DEFAULT_IMAGES
        num_images = at_least_one("num_images", num_images)
        self.recipe = Recipe(
            drawing=Drawing(num_images, int(seed), seeds=seeds),
            conditions=Conditions(
                num_images,
                tuple(given.prompts),
                given.negative_prompt,
                given.encode,
                tuple(given.classes),
                given.class_key,
                given.null_class,
                dict(given.conditioning or {}),
                given.unconditional,
            ),
            guidance={
                "guidance_scale": float(given.guidance_scale),
                "guidance_rescale": float(given.guidance_rescale),
            },
            batch_size=min(at_least_one("batch_size", batch_size), num_images),
            predict=predict,
            decode=decode,
            decode_batch_size=at_least_one("decode_batch_size", decode_batch_size),
            pipeline=pipeline,
            max_seconds=max_seconds,
            weights=lookup("weights", weights, {kind: kind for kind in WEIGHTS}),
        )
        _require_fit(self.recipe)
        self.shape = tuple(shape) if shape is not None else None
        if self.shape is not None:
            require_drawable(self.shape, decode)
        self.folder = os.fspath(folder) if folder is not None else None
        if exit_after_error is not None and not exit_after_error >= 0:
            raise ValueError(
                f"exit_after_error must be seconds, at least 0, or None, got {exit_after_error}"
            )
        self.exit_after_error = exit_after_error
        self.on_error = lookup("on_error", on_error, {mode: mode for mode in ("warn", "raise")})
        self._last_step = 0
        self._last_time = 0.0
        self._forward_mode: ForwardMode | None = None
        self._previewer: Previewer | None = None
        self._folder: str | None = None
        self._loggers_told: set[str] = set()
        # filled by the publishing thread: (step, failure)
        self._failed: list[tuple[int, Failure]] = []
        self._complaints = Complaints("ValidationSampling")
        self._untried = self._over = False

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
        return {"last_step": self._last_step}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._last_step = int(state_dict["last_step"])

    # -- before training ---------------------------------------------------------------------------

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage == "fit":
            # values of an earlier run; a resume restores its own step after this
            self._last_step, self._folder = 0, None
            self._untried = self._over = False

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._previewer = None
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
                require_drawable(shape, self.recipe.decode)
        if not is_fast_dev_run(trainer):
            folder = self._folder = self._choose_folder(trainer)
            on_rank_zero(
                trainer, lambda: self._note(0, try_out(folder, trainer.loggers, self._loggers_told))
            )
            self._complain("showing previews")

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
        if _name(folder) in [_name(c._folder) for c in instances if c._folder is not None]:
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
        forward_mode = self._forward_mode
        assert forward_mode is not None  # since on_fit_start
        sampler = sampler_for(schedule_of_module(pl_module), self.sampler, self.steps)
        self._previewer = call_on_all_ranks(
            lambda: Previewer.prepare(self.recipe, sampler, forward_mode, trainer, pl_module),
            trainer.world_size,
        )
        if is_fast_dev_run(trainer):  # it is a trial itself
            return
        at_once = trainer.global_step == 0 and self.triggers.at_step(0)
        self._try(trainer, pl_module, required=at_once)
        if at_once:
            self._preview(trainer, pl_module)

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
            require_drawable(shape, self.recipe.decode)
        assert self._previewer is not None  # since on_train_start
        failure: AgreedError | None = None
        with sigterm_deferred(trainer) as termination:
            try:
                self._previewer.trial(trainer, module, shape, termination)
            except AgreedError as error:
                failure = error
        if failure is not None:
            raise RuntimeError(
                f"previews cannot be drawn; one image was tried, at step {trainer.global_step}: "
                f"{failure}"
            ) from failure

    # -- triggers ----------------------------------------------------------------------------------

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self._previewer is None or is_fast_dev_run(trainer):
            return
        self._complain()
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
        if self._previewer is None:
            return
        before, self._last_step = self._last_step, trainer.global_step
        failure: AgreedError | None = None
        with sigterm_deferred(trainer) as termination:
            try:
                # ranks may have different shapes (bucketed data), and gather needs equal shapes
                shape = trainer.strategy.broadcast(self._sample_shape(module))
                shown: list[Preview] = []
                for weights in self.recipe.kinds:
                    drawn = self._previewer.preview(trainer, module, weights, shape, termination)
                    shown += [drawn] if drawn is not None else []
                    if termination.agreed:
                        break
                else:
                    self._publish(trainer, shown)
                    if self.on_error == "raise":
                        self._require_published(trainer)
            except AgreedError as error:
                failure = error
            # includes a signal during publishing, so that all ranks stop at the same place
            (termination.agreed,) = any_rank(
                [termination.arrived], trainer.world_size, trainer.strategy.root_device
            )
        self._last_time = time.monotonic()
        if termination.agreed:
            self._last_step = before  # so that a resumed run draws this preview
        if failure is not None:
            self._react(f"the preview at step {trainer.global_step} failed: {failure}", failure)

    def _publish(self, trainer: Trainer, previews: Sequence[Preview]) -> None:
        """Queue previews for publishing by rank 0 in the background.

        If one place fails, the callback warns and still publishes to the other places.
        """
        if not is_fast_dev_run(trainer):
            on_rank_zero(trainer, lambda: self._hand_over(trainer, previews))

    def _hand_over(self, trainer: Trainer, previews: Sequence[Preview]) -> None:
        lane, loggers = pictures_of(trainer), list(trainer.loggers)
        for preview in previews:
            if lane.wait_for_room():
                lane.submit(
                    partial(self._show, preview, loggers), partial(self._lost, preview.step)
                )
            else:
                words = (
                    f"{lane.pending} others are still being published, "
                    "and none was finished for long"
                )
                self._lost(preview.step, TimeoutError(words))

    def _show(self, preview: Preview, loggers: Sequence[Any]) -> None:
        assert self._folder is not None  # since on_fit_start
        self._note(preview.step, publish(preview, self._folder, loggers, self._loggers_told))

    def _lost(self, step: int, error: Exception) -> None:
        self._note(step, [Failure("its publication", error)])

    def _note(self, step: int, failures: Sequence[Failure]) -> None:
        self._failed += [(step, failure) for failure in failures]

    def _complain(self, what: str | None = None) -> None:
        """Warn about background failures, on the training thread."""
        while self._failed:
            step, failure = self._failed.pop(0)
            self._complaints.tell(
                f"{what or f'publishing the preview at step {step}'} failed: {failure}",
                failure.kind,
            )

    def _require_published(self, trainer: Trainer) -> None:
        """Raise AgreedError on every rank if rank 0 could not publish. Every rank must call it."""
        finish(trainer, pictures_of(trainer), AT_THE_END)
        failed, self._failed = self._failed, []
        error = RuntimeError("; ".join(str(failure) for _, failure in failed)) if failed else None
        raise_on_all_ranks(error, trainer.world_size)

    # -- pending previews --------------------------------------------------------------------------

    def on_save_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        if not self._over:  # a run that resumes from this checkpoint does not draw them again
            self._finish(trainer, BEFORE_A_CHECKPOINT)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._finish(trainer, AT_THE_END)
        self._complaints.sum_up()

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        self._over = True  # this rank has failed, others may not have: no collectives from here on
        pictures_of(trainer).wait(AFTER_AN_ERROR)
        self._complain()

    def _finish(self, trainer: Trainer, seconds: float) -> None:
        if self._previewer is None or is_fast_dev_run(trainer):
            return
        lane = pictures_of(trainer)
        finish(trainer, lane, seconds)
        self._complain()
        if lane.pending:
            rank_zero_warn(
                f"{lane.pending} previews are still being published after {seconds:g} seconds; "
                "going on meanwhile"
            )

    def _react(self, message: str, error: AgreedError) -> None:
        if self.on_error == "raise":
            raise RuntimeError(message) from error
        rank_zero_warn(f"{message}; training goes on as if there had been none")


def _require_fit(recipe: Recipe) -> None:
    """Raise ValueError for contradicting arguments that are known before prompts are encoded."""
    encode, pipeline = recipe.conditions.encode, recipe.pipeline
    if recipe.conditions.prompts and encode is None and pipeline is None:
        raise ValueError(
            "prompts need encode=, a function from a list of texts to arguments of the network"
        )
    if pipeline is not None and (recipe.predict is not None or recipe.decode is not None):
        raise ValueError(
            "a pipeline brings its own network and decoder; leave predict and decode out, or "
            "pipeline"
        )
    if recipe.max_seconds is not None and not recipe.max_seconds > 0:
        raise ValueError(
            f"max_seconds must be above 0, got {recipe.max_seconds}; leave it out for no limit"
        )
    if encode is None:
        recipe.conditioned()


def _name(folder: str) -> str:
    return folder.rstrip("/").rsplit("/", 1)[-1]
