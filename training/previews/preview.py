"""One preview, from the live model to images: fallible preparation, then sampling, then gather."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from ...sampling import Sampler
from ..fitting.ranks import FittingRanks
from ..fitting.tables import Fitting
from ..loops.collectives import gather, raise_on_all_ranks
from ..loops.complaints import warn_on_rank_zero
from ..loops.forward import ForwardMode
from ..loops.isolation import Termination, randomness_restored
from ..loops.loop import LiveModel, Loop
from ..loops.sharding import reshard
from ..publishing.publish import Preview
from ..publishing.settings import settings_of_sampler
from .batches import Plan
from .diffusers_pipelines import (
    components,
    differences_of,
    pipeline_of,
    pipeline_steps,
    scheduler_of,
)
from .recipe import Recipe
from .render import Drawing, in_slices, without_a_trace
from .rounds import Rounds, Start

REHEARSAL_STEPS = 2  # sampling steps of the one image that fast_dev_run draws
BAR_AFTER = 3.0  # seconds until the progress bar appears


# steps in the progress bar for a sampler without a fixed number of steps
USUAL_STEPS = 20


@dataclass(frozen=True)
class Moment:
    """The place of a preview in the training.

    Args:
        step: optimizer step.
        epoch: training epoch, None if it is not known.
        rehearsal: draw one image in two steps.
    """

    step: int
    epoch: int | None = None
    rehearsal: bool = False


@dataclass
class Previewer:
    """A recipe for one model during one training run.

    ``batch_size`` is the size that fits in memory, as far as known: it is reduced after an
    out-of-memory error.
    """

    recipe: Recipe
    sampler: Any
    loop: Loop
    drawing: Drawing
    batch_size: int
    pipeline: Any = None
    fitting: Fitting | None = None
    _connected: nn.Module | None = None  # the module that the pipeline was made for

    @classmethod
    def prepare(
        cls,
        recipe: Recipe,
        sampler: Any,
        loop: Loop,
        model: LiveModel | None = None,
        fitting: Fitting | None = None,
    ) -> Previewer:
        """Encode the prompts; with a model, also make the pipeline.

        With ``fitting``, the sampler draws until a table is fitted. Errors of the user's functions
        are raised unchanged.
        """
        if recipe.pipeline is not None and not isinstance(sampler, Sampler):
            raise ValueError(
                f"no scheduler of diffusers is {sampler.name}, which a pipeline would need; "
                "take another sampler"
            )
        previewer = cls(recipe, sampler, loop, recipe.drawing, recipe.batch_size, fitting=fitting)
        if model is not None:
            previewer.connect(model)
        previewer.drawing = previewer._conditioned(model)
        return previewer

    def connect(self, model: LiveModel) -> None:
        """Make the pipeline for this model, and check that the model allows the sampler.

        Raises:
            ValueError: the model cannot be drawn like this.
            TypeError: ``pipeline`` is no pipeline.
        """
        require_equal_work(self.sampler, model.forward_mode)
        if self.recipe.pipeline is None or self._connected is model.module:
            return
        if model.forward_mode.sharded:
            raise ValueError(
                "a pipeline calls its networks by itself, which a sharded model does not allow; "
                "draw with predict= and decode=, or train with a whole copy on every rank (DDP)"
            )
        with randomness_restored(model.device):  # the function may initialize modules
            self.pipeline = pipeline_of(self.recipe.pipeline, model.module)
        self._connected = model.module
        differences = differences_of(self.sampler, self.pipeline)
        if differences:
            name = type(scheduler_of(self.sampler, self.pipeline)).__name__
            warn_on_rank_zero(
                f"the pipeline draws with {name}, which is not the sampler: "
                f"{'; '.join(differences)}"
            )

    def _conditioned(self, model: LiveModel | None) -> Drawing:
        recipe, encode = self.recipe, self.recipe.conditions.encode
        if encode is None:
            return recipe.conditioned()
        modules = modules_of(encode) + ([model.module] if model is not None else [])
        if model is not None and may_use(model.module, encode):
            encode = model.call(encode)
        device = model.device if model is not None else self.loop.device or default_device()
        try:
            with without_a_trace(device, modules):
                return replace(
                    recipe, conditions=replace(recipe.conditions, encode=encode)
                ).conditioned()
        finally:
            if model is not None:
                reshard(model.root)

    def preview(
        self,
        model: LiveModel,
        moment: Moment,
        weights: str,
        shape: tuple[int, ...] | None,
        termination: Termination,
    ) -> Preview | None:
        """Draw a preview with these weights; return it, or None if there is nothing to show.

        The result is the same on every rank. Sets ``termination.agreed`` if a rank was told to
        stop.

        Args:
            model: the live model.
            moment: the place of the preview in the training.
            weights: 'raw' or 'ema'.
            shape: shape of one sample.
            termination: state of a deferred SIGTERM.

        Raises:
            AgreedError: on every rank, if any rank has an error.
        """
        started, loop = time.monotonic(), self.loop
        size, share = loop.share_of_rank
        plan = (
            Plan(1, 1, size)
            if moment.rehearsal
            else Plan(self.drawing.num_images, self.recipe.batch_size, size)
        )
        stop = REHEARSAL_STEPS if moment.rehearsal else None
        rounds = Rounds(
            min(self.batch_size, plan.batch_size),
            loop.world_size,
            loop.rank,
            model.device,
            started + (self.recipe.seconds or math.inf),
            lambda: termination.arrived,
        )
        with ExitStack() as stack:
            # otherwise the next training step would use the preview's values in the outermost unit
            stack.callback(reshard, model.root)
            start, averaged = self._ready(model, weights == "ema", shape, stop, stack)
            if weights == "ema" and not averaged and self.recipe.weights == "both":
                return None  # the raw weights have their own preview
            notes = self._fit(model, moment, "ema" if averaged else "raw", shape, rounds)
            bar = _bar(
                loop,
                weights,
                plan.rounds
                * -(-plan.batch_size // rounds.batch_size)
                * ((self.sampler.steps or USUAL_STEPS) + 1),
            )
            rounds.tick = stack.enter_context(bar).update
            drawn = rounds.draw(plan.batches(share), start)
        self._remember(rounds)
        termination.agreed = rounds.stopped == "signal"
        if termination.agreed:
            return None
        if drawn.pixels.numel() == 0:
            mend = "raise it, or draw fewer images or steps"
            limit = f"in max_seconds={self.recipe.max_seconds}"
            warn_on_rank_zero(
                f"the preview at step {moment.step} finished no image {limit}; {mend}"
            )
            return None
        if weights == "ema" and not averaged:
            notes.append("there are no EMA weights yet: drawn with the raw ones")
        pixels, nan = (self._in_order(model, plan, part) for part in drawn)
        if rounds.stopped:
            notes.append(
                f"{len(pixels)} of {plan.num_images} images: max_seconds={self.recipe.max_seconds} "
                "had passed"
            )
        if nan.any():
            notes.append(
                f"NaN in {int((nan > 0).sum())} of {len(nan)} images, {float(nan.mean()):.1%} of "
                f"the {'sound' if pixels.ndim == 3 else 'pixels'}"
            )
            shown = "silent" if pixels.ndim == 3 else "chequered in the picture"
            mend = f"{shown}; look at the loss and at the dtype that is sampled in"
            warn_on_rank_zero(f"the preview at step {moment.step} has {notes[-1]} ({mend})")
        return Preview(
            step=moment.step,
            epoch=moment.epoch,
            weights="ema" if averaged else "raw",
            images=pixels,
            seeds=tuple(self.drawing.seeds_of(range(len(pixels)))),
            captions=self.recipe.conditions.captions[: len(pixels)],
            sampler=self.sampler.name
            if self.pipeline is None
            else type(scheduler_of(self.sampler, self.pipeline)).__name__,
            steps=self.sampler.steps,
            guidance_scale=self.recipe.guidance["guidance_scale"],
            fingerprint=self.sampler.schedule.fingerprint,
            seconds=time.monotonic() - started,
            note="; ".join(notes),
            settings=self._settings(shape),
            media=self.recipe.media,
        )

    def _fit(
        self,
        model: LiveModel,
        moment: Moment,
        weights: str,
        shape: tuple[int, ...] | None,
        rounds: Rounds,
    ) -> list[str]:
        """Choose the fitted table for this preview, and return what is to be said of it."""
        if self.fitting is None or moment.rehearsal or shape is None:
            return []
        limit, begun = self.recipe.seconds or math.inf, time.monotonic()
        self.sampler = self.fitting.sampler(
            weights,
            moment.step,
            network_of(model),
            shape,
            self.drawing,
            device=model.device,
            ranks=FittingRanks(self.loop.world_size, *self.loop.share_of_rank, device=model.device),
            batch_size=self.batch_size,
            stop=lambda: rounds.interrupted() or time.monotonic() - begun > limit,
        )
        rounds.deadline += time.monotonic() - begun  # a fit has a limit of its own
        return [self.fitting.note]

    def new_tables(self) -> dict[str, str]:
        """Return the files of tables that were fitted since the last call, by name."""
        return {} if self.fitting is None else self.fitting.new_files()

    def _settings(self, shape: tuple[int, ...] | None) -> dict[str, Any]:
        """Return what reproduces the images, without seeds and prompts, as JSON values."""
        settings = settings_of_sampler(self.sampler) | self.recipe.guidance
        settings |= {
            "negative_prompt": self.recipe.conditions.negative_prompt,
            "shape": None if shape is None else list(shape),
            "batch_size": self.recipe.batch_size,
        }
        if self.pipeline is not None:
            scheduler = scheduler_of(self.sampler, self.pipeline)
            settings |= {
                "pipeline": type(self.pipeline).__name__,
                "scheduler": type(scheduler).__name__,
            }
        return settings

    def trial(
        self, model: LiveModel, shape: tuple[int, ...] | None, termination: Termination
    ) -> None:
        """Draw one image in one step (a pipeline: two steps) on every rank, decode it, discard it.

        The trial uses everything that a preview uses: the averages, the network with its
        conditions, the decoder, the gather.

        Raises:
            AgreedError: on every rank, if any rank has an error.
        """
        loop = self.loop
        size, share = loop.share_of_rank
        plan = Plan(1, 1, size)
        stop = REHEARSAL_STEPS if self.recipe.pipeline is not None else 1
        rounds = Rounds(
            1, loop.world_size, loop.rank, model.device, interrupted=lambda: termination.arrived
        )
        with ExitStack() as stack:
            stack.callback(reshard, model.root)
            start, _ = self._ready(model, self.recipe.weights != "raw", shape, stop, stack)
            drawn = rounds.draw(plan.batches(share), start)
        termination.agreed = rounds.stopped == "signal"
        if not termination.agreed:
            self._in_order(model, plan, drawn.pixels)

    def _in_order(self, model: LiveModel, plan: Plan, own: Tensor) -> Tensor:
        """Gather (rounds, batch, ...) of all ranks as (num_images, ...) on the CPU."""
        world_size = self.loop.world_size
        gathered = gather(own.to(model.device), world_size).cpu()
        if plan.world_size < world_size:  # ranks of a tensor-parallel group draw the same share
            share = torch.tensor([self.loop.share_of_rank[1]], device=model.device)
            shares = gather(share, world_size).flatten().tolist()
            gathered = gathered[[shares.index(k) for k in range(plan.world_size)]]
        return plan.in_order(gathered)

    def _ready(
        self,
        model: LiveModel,
        average: bool,
        shape: tuple[int, ...] | None,
        stop: int | None,
        stack: ExitStack,
    ) -> tuple[Start, bool]:
        """Do everything that may fail before the first forward, and exchange errors between ranks.

        After the first forward of a sharded model, ranks can no longer exchange such errors.
        """
        error, start, averaged = None, None, False
        try:
            self.connect(model)
            start = self._start(model, shape, stop)
            # a context that yields nothing has an average; one that yields False has none yet
            averaged = average and stack.enter_context(model.average()) is not False
        except Exception as raised:
            error = raised
        raise_on_all_ranks(error, self.loop.world_size)
        assert start is not None  # otherwise an error was raised above
        modules = modules_of(
            model.module, self.recipe.predict, self.recipe.decode, pipeline=self.pipeline
        )
        stack.enter_context(without_a_trace(model.device, modules))
        return start, averaged

    def _start(self, model: LiveModel, shape: tuple[int, ...] | None, stop: int | None) -> Start:
        recipe = self.recipe
        if self.pipeline is not None:
            return lambda images: pipeline_steps(
                self.pipeline,
                self.drawing,
                self.sampler,
                images,
                prompts=recipe.conditions.prompts if recipe.conditions.encode is None else (),
                negative_prompt=recipe.conditions.negative_prompt,
                shape=shape,
                stop=stop,
                context=model.pipeline_context,
                **recipe.guidance,
            )
        if shape is None:
            raise ValueError(
                "the shape of a sample is not known; set the module's sample_shape, or give shape="
            )
        network = network_of(model)
        decode = decoder_of(
            model, recipe.decode, recipe.decode_batch_size, recipe.media.decode_frames
        )
        return lambda images: self.drawing.steps(
            network, self.sampler, shape, images, model.device, decode=decode, stop=stop
        )

    def _remember(self, rounds: Rounds) -> None:
        if rounds.out_of_memory:
            self.batch_size = rounds.batch_size
            warn_on_rank_zero(
                f"a preview ran out of memory; it is drawn {self.batch_size} at a time from now "
                "on, and "
                f"batch_size={self.batch_size} would do so at once"
            )


def _bar(loop: Loop, weights: str, total: int) -> Any:
    """Return a progress bar that appears for a long preview, if the loop shows progress bars."""
    shown = loop.is_global_zero and loop.shows_progress
    return tqdm(
        total=total, desc=f"preview ({weights})", delay=BAR_AFTER, leave=False, disable=not shown
    )


def default_device() -> torch.device:
    """Return the current accelerator of this process, or the CPU.

    >>> default_device().type in ("cpu", "cuda", "mps", "xpu")
    True
    """
    return (
        torch.accelerator.is_available() and torch.accelerator.current_accelerator()
    ) or torch.device("cpu")


def require_equal_work(sampler: Any, forward_mode: ForwardMode) -> None:
    """Reject a sampler with an adaptive number of steps if every forward needs all ranks.

    >>> from alphabar.noising import NoiseSchedule
    >>> require_equal_work(Sampler(NoiseSchedule.flow(), "euler"), ForwardMode(sharded=True))
    """
    if sampler.steps is None and forward_mode.sharded:
        raise ValueError(
            f"{sampler.name} chooses its number of steps on every rank by itself, and a sharded "
            "model needs all ranks in every forward; take a sampler with a number of steps"
        )


def network_of(model: LiveModel) -> Callable[..., Any]:
    """Return the model's ``predict`` as a sampler calls it between training steps.

    It runs in the precision of training.
    """
    predict = model.call(model.predict)

    def network(x: Tensor, timesteps: Tensor, **conditioning: Any) -> Any:
        # as in training: convert inputs but not timesteps. Not around the whole loop, because half
        # precision changes the default dtype, which would change the dtype of the noise
        with model.forward_context():
            return predict(model.convert_input(x), timesteps, **model.convert_input(conditioning))

    return network


def decoder_of(
    model: LiveModel, decode: Any, size: int, frames: int | None = None
) -> Callable[[Tensor], Tensor] | None:
    """Return ``decode`` in slices of ``size`` and ``frames``, or None if ``decode`` is None.

    It is called like a part of the model, unless it is a separate network.
    """
    if decode is None:
        return None
    sliced = in_slices(decode, size, frames)
    return model.call(sliced) if may_use(model.module, decode) else sliced


def may_use(module: nn.Module, function: object) -> bool:
    """Return whether ``function`` may call parts of ``module``.

    False for a separate network that is not part of ``module``, and for a method of one.

    >>> net = nn.Sequential(nn.Linear(1, 1))
    >>> may_use(net, net[0]), may_use(net, nn.Linear(1, 1).forward), may_use(net, lambda x: net(x))
    (True, False, True)
    """
    owner = function if isinstance(function, nn.Module) else getattr(function, "__self__", None)
    return owner in list(module.modules()) if isinstance(owner, nn.Module) else True


def modules_of(*parts: Any, pipeline: Any = None) -> list[nn.Module]:
    """Return the modules used for sampling.

    These are the modules in ``parts``, the owners of methods in ``parts``, and the modules of the
    pipeline.

    >>> net = nn.Linear(1, 1)
    >>> modules_of(net.forward, None)
    [Linear(in_features=1, out_features=1, bias=True)]
    """
    owners = [getattr(part, "__self__", part) for part in parts]
    return [
        part
        for part in owners + (components(pipeline) if pipeline else [])
        if isinstance(part, nn.Module)
    ]
