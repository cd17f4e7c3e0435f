"""Previews in any training loop: plain torch, torch.distributed, accelerate, Lightning Fabric."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import nn

from ...noising import NoiseSchedule
from ...noising.utils.registry import lookup
from ...sampling import Method, Sampler
from ..loops.background import AFTER_AN_ERROR, AT_THE_END
from ..loops.collectives import call_on_all_ranks
from ..loops.forward import require_exit_after
from ..loops.loop import LiveModel, loop_of
from ..loops.objective import schedule_in
from ..media.options import Media
from ..publishing.publisher import Publisher
from .groups import PreviewConditions, grouped
from .preview import Moment, Previewer
from .recipe import recipe_of
from .run import PreviewRun
from .samplers import fitting_for, require_drawable, require_refit_every, require_steps, sampler_for

Average = Callable[[], AbstractContextManager[Any]]


class Previews:
    """Sample images in any training loop, and show them in files, on a page and in trackers.

    Every rank makes the same object and makes the same calls, between two training steps. All ranks
    draw. An image depends on its seed and condition, not on the number of ranks.

    A preview restores all state that it may change, also when it fails: random generators, the
    train / eval flag of every submodule, buffers, the gradient mode, the weights, the compiled
    graphs. If one rank fails, all ranks exchange the error and skip the preview. So training is
    bit-identical with previews, without previews, and with previews that fail.

    The network runs as in training: with the autocast of the loop, without the wrapper of
    data-parallel copies, through the wrapper of a sharded model (FSDP, ZeRO-3). An error inside a
    forward of a sharded model ends training on all ranks.

    Files and trackers are written by a background thread of rank 0. A place that fails warns once.

    Args:
        sampler: name ('dpmpp_2m', 'DPM++ 2M Karras') or object of any sampler. An object brings its
            own schedule.
            'fitted' fits a table of few steps to the network; see :class:`Fitting`.
        steps: sampling steps, 20 by default, 6 for 'fitted'. A Sampler object has its own number.
        refit_every: optimizer steps between two fits of 'fitted'; by default, when a check finds
            that the table is no better than a known method.
        schedule: the schedule of the training, or an object with one, such as a Noising. Needed for
            the name of a sampler; with an object, it is compared with the sampler's schedule.
        shape: shape of one sample, (channels, height, width), of videos (channels, frames, height,
            width), of sounds (channels, length); not needed with a pipeline.
        loop: the ``Accelerator`` or ``Fabric`` of the training. None: torch.distributed if it is
            initialized, else a single process.
        num_images: images in a grid. Default: one for each of ``seeds``, else one for each prompt
            or class, else 16.
        seed, seeds: ``seed`` is the seed of the first image, and each next image adds 1. ``seeds``
            gives the seed of every image.
        batch_size: images that a rank draws at a time. If a rank runs out of memory, it is halved
            on all ranks.
        prompts, negative_prompt, encode: texts, which images take in turn, the text for guidance,
            and a function that encodes them. ``encode`` maps a list of texts to a mapping of
            tensors with a row for each text: arguments of ``predict``. It is called once, here. The
            last text is the negative prompt.
        classes, class_key, null_class: labels, which images take in turn, the argument of
            ``predict`` for them, and the label for "no class" in guidance.
        conditioning, unconditional: arguments of ``predict``. Tensors have a row for each image, or
            one for all.
        guidance_scale, guidance_rescale: classifier-free guidance, as in Sampler.
        weights: 'raw', 'ema' or 'both' (separate grids). Default: 'ema' in calls with ``ema=``,
            else 'raw'.
        predict: ``predict(x, timesteps, **conditioning)``, which returns a tensor or an object with
            ``.sample``. Default: the network itself.
        decode, decode_batch_size: function (or diffusers VAE) from latents to images, videos or
            sounds in [-1, 1], and its batch size.
        media: a :class:`Media`: how videos and sounds are shown, and their rates. Videos need
            nothing of it; sounds need ``Media(sample_rate=...)``.
        pipeline: a diffusers pipeline, or a function from the network (without wrapper) to a
            pipeline. It draws instead of the network alone, with the schedule of the training.
        max_seconds: time limit of a preview. After it the preview stops, and finished images are
            shown.
        folder: folder for ``step_00000500.png``, single images, ``previews.jsonl`` and the page
            ``index.html``. The last part of its path is also the image's name in the trackers.
        trackers: loggers of Lightning, trackers of accelerate or SummaryWriters. Default: those of
            the Accelerator or Fabric.
        on_error: if a preview fails, warn and continue training ('warn'), or raise on all ranks
            ('raise').
        exit_after_error: seconds between an error inside a forward of a sharded model and the end
            of that rank's process (``os._exit``). By default the process does not end.
        conditions: a :class:`PreviewConditions`, instead of the ten arguments from ``prompts`` to
            ``guidance_rescale``.

    Raises:
        ValueError: invalid names, numbers or conditioning.
        TypeError: ``loop`` or ``schedule`` is of another type.
        OSError: the folder cannot be written.
        Exception: any error of ``encode``.

    >>> import tempfile
    >>> network = nn.Conv2d(3, 3, 1)
    >>> schedule = NoiseSchedule.scaled_linear()
    >>> folder = tempfile.mkdtemp()
    >>> with Previews(
    ...     "dpmpp_2m",
    ...     steps=4,
    ...     schedule=schedule,
    ...     shape=(3, 8, 8),
    ...     num_images=2,
    ...     predict=lambda x, timesteps: network(x),
    ...     folder=folder,
    ... ) as previews:
    ...     previews.try_out(network)
    ...     previews(network, step=500)
    True
    >>> sorted(os.listdir(folder))
    ['images', 'index.html', 'previews.jsonl', 'step_00000500.png']
    """

    def __init__(
        self,
        sampler: str | Method | Sampler | Any = "dpmpp_2m",
        steps: int | None = None,
        *,
        refit_every: int | None = None,
        schedule: NoiseSchedule | Any = None,
        shape: Sequence[int] | None = None,
        loop: Any = None,
        num_images: int | None = None,
        seed: int = 0,
        seeds: Sequence[int] | None = None,
        batch_size: int = 4,
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
        weights: Literal["raw", "ema", "both"] | None = None,
        predict: Callable[..., Any] | None = None,
        decode: Callable[..., Any] | None = None,
        decode_batch_size: int = 1,
        media: Media | None = None,
        pipeline: Any = None,
        max_seconds: float | None = None,
        folder: str | os.PathLike[str] = "previews",
        trackers: Sequence[Any] | None = None,
        on_error: Literal["warn", "raise"] = "warn",
        exit_after_error: float | None = None,
        conditions: PreviewConditions | None = None,
    ) -> None:
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
        recipe = recipe_of(
            grouped("conditions", conditions, PreviewConditions, what),
            num_images=num_images,
            seed=seed,
            seeds=seeds,
            batch_size=batch_size,
            weights=weights or "raw",
            predict=predict,
            decode=decode,
            decode_batch_size=decode_batch_size,
            media=media,
            pipeline=pipeline,
            max_seconds=max_seconds,
        )
        steps = require_steps(sampler, steps)
        refit_every = require_refit_every(sampler, refit_every, pipeline)
        own = _schedule_of(sampler, schedule)
        made = sampler_for(own, sampler, steps)
        scale = recipe.guidance["guidance_scale"]
        fitting = fitting_for(own, sampler, steps, refit_every, scale)
        self.shape = tuple(int(n) for n in shape) if shape is not None else None
        if self.shape is None and pipeline is None:
            raise ValueError(
                "previews need the shape of a sample; give shape=(channels, height, width)"
            )
        if self.shape is not None and pipeline is None:
            require_drawable(self.shape, decode, recipe.media)
        lookup("on_error", on_error, {mode: mode for mode in ("warn", "raise")})
        self.weights, self.exit_after_error = weights, require_exit_after(exit_after_error)
        self.loop = loop_of(loop)
        if trackers is not None:
            given = list(trackers)
            self.loop = replace(self.loop, trackers=lambda: given)
        publisher = Publisher(os.fspath(folder), self.loop)
        publisher.try_out()
        previewer = call_on_all_ranks(
            lambda: Previewer.prepare(recipe, made, self.loop, fitting=fitting),
            self.loop.world_size,
        )
        self._publisher, self._run = publisher, PreviewRun(previewer, publisher, on_error)

    def __call__(
        self, network: nn.Module, *, step: int, epoch: int | None = None, ema: Average | None = None
    ) -> bool:
        """Draw and publish a preview. Every rank must call it.

        Args:
            network: the network that trains, wrapped or not.
            step: number of optimizer steps so far.
            epoch: training epoch, for the page.
            ema: function without arguments that returns a context in which ``network`` has its
                averaged weights, such as ``ModelEMA.average``. The context may yield False: there
                is no average yet.

        Returns:
            False if a SIGTERM stopped it; otherwise True.

        Raises:
            RuntimeError: on every rank, if any rank failed and ``on_error`` is 'raise'.
        """
        model = self._live(network, ema)
        self._publisher.complain()
        with _no_autocast(model):
            return self._run.preview(model, Moment(int(step), epoch), lambda: self.shape)

    def try_out(self, network: nn.Module, *, ema: Average | None = None) -> None:
        """Draw a trial image that is not shown, so that errors appear before a long run.

        It uses everything that a preview uses, for one sampling step (a pipeline: two steps). Every
        rank must call it.

        Raises:
            RuntimeError: on every rank, if any rank failed, also with ``on_error='warn'``.
        """
        model = self._live(network, ema)
        with _no_autocast(model):
            self._run.trial(model, self.shape, 0)

    def _live(self, network: nn.Module, ema: Average | None) -> LiveModel:
        weights = self.weights or ("ema" if ema is not None else "raw")
        if weights != "raw" and ema is None:
            raise ValueError(
                f"weights={weights!r} needs ema=, a function that returns a context with the "
                "averaged weights, in every call"
            )
        previewer = self._run.previewer
        previewer.recipe = replace(previewer.recipe, weights=weights)
        return self.loop.live(network, previewer.recipe.predict, ema, self.exit_after_error)

    def state_dict(self) -> dict[str, Any]:
        """Return the fitted tables as plain JSON, for a checkpoint."""
        fitting = self._run.previewer.fitting
        return {} if fitting is None else {"fitted": fitting.state()}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Take the tables of :meth:`state_dict`; the next preview checks them."""
        fitting = self._run.previewer.fitting
        if fitting is not None:
            fitting.load(state_dict.get("fitted", {}))

    def close(self) -> None:
        """Wait until all previews are published, up to five minutes. Every rank must call it."""
        self._publisher.finish(AT_THE_END)
        self._publisher.sum_up()

    def __enter__(self) -> Previews:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self.close()
        else:  # other ranks may not have failed: no collectives
            self._publisher.abandon(AFTER_AN_ERROR)


def _no_autocast(model: LiveModel) -> AbstractContextManager[Any]:
    """Return a context without the autocast around a call: it is for forwards, not for samplers."""
    return torch.autocast(model.device.type, enabled=False)


def _schedule_of(sampler: Any, given: Any) -> NoiseSchedule:
    if given is None and not isinstance(sampler, str | Method):
        given = sampler.schedule
    return schedule_in(given)
