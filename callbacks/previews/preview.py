"""One preview, from the live model to images: fallible preparation, then sampling, then gather."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.plugins import MixedPrecision
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor, nn
from tqdm import tqdm

from ...sampling import Sampler
from ..ema_weights import ema_weights
from ..support.collectives import gather, raise_on_all_ranks
from ..support.isolation import Termination
from ..support.module_api import is_fast_dev_run, predict_of_module
from ..support.sharding import reshard, root_of
from ..support.strategies import ForwardMode, share_of, wrap_forward
from .batches import Plan
from .conditioning import Conditions
from .diffusers_pipelines import (
    components,
    differences_of,
    pipeline_of,
    pipeline_steps,
    scheduler_of,
)
from .loop import Rounds, Start
from .publish import Preview
from .render import Drawing, in_slices, without_a_trace

REHEARSAL_STEPS = 2  # sampling steps of the one image that fast_dev_run draws
WEIGHTS: dict[str, tuple[str, ...]] = {"raw": ("raw",), "ema": ("ema",), "both": ("raw", "ema")}
BAR_AFTER = 3.0  # seconds until the progress bar appears


# steps in the progress bar for a sampler without a fixed number of steps
USUAL_STEPS = 20


@dataclass(frozen=True)
class Recipe:
    """The arguments of ValidationSampling that say what to draw and how, without the model."""

    drawing: Drawing
    conditions: Conditions
    guidance: dict[str, float]
    batch_size: int
    predict: Callable[..., Any] | None = None
    decode: Any = None
    decode_batch_size: int = 1
    pipeline: Any = None
    max_seconds: float | None = None
    weights: str = "raw"

    @property
    def kinds(self) -> tuple[str, ...]:
        """The kinds of weights to draw with, in order."""
        return WEIGHTS[self.weights]

    @property
    def seconds(self) -> float | None:
        """The time limit for each kind of weights, in seconds."""
        return None if self.max_seconds is None else self.max_seconds / len(self.kinds)

    def conditioned(self) -> Drawing:
        """Return the drawing with encoded conditions.

        Raises:
            ValueError: the conditions contradict each other or the guidance.
        """
        conditioning, unconditional = self.conditions.encoded()
        # a pipeline applies guidance itself
        guidance: dict[str, Any] = {} if self.pipeline is not None else self.guidance
        return replace(
            self.drawing, conditioning=conditioning, unconditional=unconditional, **guidance
        )


@dataclass
class Previewer:
    """A recipe for one model during one fit.

    ``batch_size`` is the size that fits in memory, as far as known: it is reduced after an
    out-of-memory error.
    """

    recipe: Recipe
    sampler: Any
    forward_mode: ForwardMode
    drawing: Drawing
    pipeline: Any
    batch_size: int

    @classmethod
    def prepare(
        cls,
        recipe: Recipe,
        sampler: Any,
        forward_mode: ForwardMode,
        trainer: Trainer,
        module: LightningModule,
    ) -> Previewer:
        """Encode the prompts and make the pipeline.

        Errors of the user's functions are raised unchanged.
        """
        pipeline = None
        require_equal_work(sampler, forward_mode)
        if recipe.pipeline is not None:
            if not isinstance(sampler, Sampler):
                raise ValueError(
                    f"no scheduler of diffusers is {sampler.name}, which a pipeline would need; "
                    "take another sampler"
                )
            pipeline = pipeline_of(recipe.pipeline, module)
            name, differences = (
                type(scheduler_of(sampler, pipeline)).__name__,
                differences_of(sampler, pipeline),
            )
            if differences:
                rank_zero_warn(
                    f"the pipeline draws with {name}, which is not the sampler: "
                    f"{'; '.join(differences)}"
                )
        encode = recipe.conditions.encode
        if encode is None:
            return cls(
                recipe, sampler, forward_mode, recipe.conditioned(), pipeline, recipe.batch_size
            )
        entering = (
            wrap_forward(trainer, module, forward_mode, encode)
            if may_use(module, encode)
            else encode
        )
        try:
            with without_a_trace(trainer.strategy.root_device, modules_of(module, encode)):
                drawing = replace(
                    recipe, conditions=replace(recipe.conditions, encode=entering)
                ).conditioned()
        finally:
            reshard(root_of(trainer, module))
        return cls(recipe, sampler, forward_mode, drawing, pipeline, recipe.batch_size)

    def preview(
        self,
        trainer: Trainer,
        module: LightningModule,
        weights: str,
        shape: tuple[int, ...] | None,
        termination: Termination,
    ) -> Preview | None:
        """Draw a preview with these weights; return it, or None if there is nothing to show.

        The result is the same on every rank. Sets ``termination.agreed`` if a rank was told to
        stop.

        Args:
            trainer: the Trainer.
            module: the live module.
            weights: 'raw' or 'ema'.
            shape: shape of one sample.
            termination: state of a deferred SIGTERM.

        Raises:
            AgreedError: on every rank, if any rank has an error.
        """
        started, rehearsal = time.monotonic(), is_fast_dev_run(trainer)
        size, share = share_of(trainer.strategy, trainer.world_size, trainer.global_rank)
        plan = (
            Plan(1, 1, size)
            if rehearsal
            else Plan(self.drawing.num_images, self.recipe.batch_size, size)
        )
        stop = REHEARSAL_STEPS if rehearsal else None
        rounds = Rounds(
            min(self.batch_size, plan.batch_size),
            trainer.world_size,
            trainer.global_rank,
            trainer.strategy.root_device,
            started + (self.recipe.seconds or math.inf),
            lambda: termination.arrived,
        )
        with ExitStack() as stack:
            # otherwise the next training step would use the preview's values in the outermost unit
            stack.callback(reshard, root_of(trainer, module))
            start, averaged = self._ready(trainer, module, weights == "ema", shape, stop, stack)
            if weights == "ema" and not averaged and self.recipe.weights == "both":
                return None  # the raw weights have their own preview
            bar = _bar(
                trainer,
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
            rank_zero_warn(
                f"the preview at step {trainer.global_step} finished no image {limit}; {mend}"
            )
            return None
        notes = []
        if weights == "ema" and not averaged:
            notes.append("there are no EMA weights yet: drawn with the raw ones")
        pixels, nan = (_in_order(trainer, plan, share, part) for part in drawn)
        if rounds.stopped:
            notes.append(
                f"{len(pixels)} of {plan.num_images} images: max_seconds={self.recipe.max_seconds} "
                "had passed"
            )
        if nan.any():
            notes.append(
                f"NaN in {int((nan > 0).sum())} of {len(nan)} images, {float(nan.mean()):.1%} of "
                "the pixels"
            )
            mend = "chequered in the picture; look at the loss and at the dtype that is sampled in"
            rank_zero_warn(f"the preview at step {trainer.global_step} has {notes[-1]} ({mend})")
        return Preview(
            step=trainer.global_step,
            epoch=trainer.current_epoch,
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
        )

    def trial(
        self,
        trainer: Trainer,
        module: LightningModule,
        shape: tuple[int, ...] | None,
        termination: Termination,
    ) -> None:
        """Draw one image in one step (a pipeline: two steps) on every rank, decode it, discard it.

        The trial uses everything that a preview uses: the averages, the network with its
        conditions, the decoder, the gather.

        Raises:
            AgreedError: on every rank, if any rank has an error.
        """
        size, share = share_of(trainer.strategy, trainer.world_size, trainer.global_rank)
        plan, device = Plan(1, 1, size), trainer.strategy.root_device
        stop = REHEARSAL_STEPS if self.pipeline is not None else 1
        rounds = Rounds(
            1,
            trainer.world_size,
            trainer.global_rank,
            device,
            interrupted=lambda: termination.arrived,
        )
        with ExitStack() as stack:
            stack.callback(reshard, root_of(trainer, module))
            start, _ = self._ready(
                trainer, module, self.recipe.weights != "raw", shape, stop, stack
            )
            drawn = rounds.draw(plan.batches(share), start)
        termination.agreed = rounds.stopped == "signal"
        if not termination.agreed:
            _in_order(trainer, plan, share, drawn.pixels)

    def _ready(
        self,
        trainer: Trainer,
        module: LightningModule,
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
            start = self._start(trainer, module, shape, stop)
            averaged = average and stack.enter_context(ema_weights(trainer, module))
        except Exception as raised:
            error = raised
        raise_on_all_ranks(error, trainer.world_size)
        assert start is not None  # otherwise an error was raised above
        modules = modules_of(
            module, self.recipe.predict, self.recipe.decode, pipeline=self.pipeline
        )
        stack.enter_context(without_a_trace(trainer.strategy.root_device, modules))
        return start, averaged

    def _start(
        self,
        trainer: Trainer,
        module: LightningModule,
        shape: tuple[int, ...] | None,
        stop: int | None,
    ) -> Start:
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
                context=partial(pipeline_context, trainer),
                **recipe.guidance,
            )
        if shape is None:
            raise ValueError(
                "the shape of a sample is not known; set the module's sample_shape, or give shape="
            )
        predict = recipe.predict if recipe.predict is not None else predict_of_module(module)
        network = network_of(trainer, module, self.forward_mode, predict)
        decode = decoder_of(
            trainer, module, self.forward_mode, recipe.decode, recipe.decode_batch_size
        )
        device = trainer.strategy.root_device
        return lambda images: self.drawing.steps(
            network, self.sampler, shape, images, device, decode=decode, stop=stop
        )

    def _remember(self, rounds: Rounds) -> None:
        if rounds.out_of_memory:
            self.batch_size = rounds.batch_size
            rank_zero_warn(
                f"a preview ran out of memory; it is drawn {self.batch_size} at a time from now "
                "on, and "
                f"batch_size={self.batch_size} would do so at once"
            )


def _bar(trainer: Trainer, weights: str, total: int) -> Any:
    """Return a progress bar that appears for a long preview, if the trainer shows progress bars."""
    shown = trainer.is_global_zero and trainer.progress_bar_callback is not None
    return tqdm(
        total=total, desc=f"preview ({weights})", delay=BAR_AFTER, leave=False, disable=not shown
    )


def _in_order(trainer: Trainer, plan: Plan, share: int, own: Tensor) -> Tensor:
    """Gather (rounds, batch, ...) of all ranks as (num_images, ...) on the CPU."""
    device = trainer.strategy.root_device
    gathered = gather(own.to(device), trainer.world_size).cpu()
    if plan.world_size < trainer.world_size:  # ranks of a tensor-parallel group draw the same share
        shares = gather(torch.tensor([share], device=device), trainer.world_size).flatten().tolist()
        gathered = gathered[[shares.index(k) for k in range(plan.world_size)]]
    return plan.in_order(gathered)


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


def network_of(
    trainer: Trainer,
    module: LightningModule,
    forward_mode: ForwardMode,
    predict: Callable[..., Any],
) -> Callable[..., Any]:
    """Wrap ``predict`` so that a sampler can call it between training steps.

    It runs in the precision of training.
    """
    precision = trainer.precision_plugin
    predict = wrap_forward(trainer, module, forward_mode, predict)

    def network(x: Tensor, timesteps: Tensor, **conditioning: Any) -> Any:
        # as in training: convert inputs but not timesteps. Not around the whole loop, because half
        # precision changes the default dtype, which would change the dtype of the noise
        with precision.forward_context():
            return predict(
                precision.convert_input(x), timesteps, **precision.convert_input(conditioning)
            )

    return network


def decoder_of(
    trainer: Trainer, module: LightningModule, forward_mode: ForwardMode, decode: Any, size: int
) -> Callable[[Tensor], Tensor] | None:
    """Return ``decode`` in slices of ``size``, or None if ``decode`` is None.

    It is called like a part of the model, unless it is a separate network.
    """
    if decode is None:
        return None
    sliced = in_slices(decode, size)
    return (
        wrap_forward(trainer, module, forward_mode, sliced) if may_use(module, decode) else sliced
    )


def may_use(module: nn.Module, function: object) -> bool:
    """Return whether ``function`` may call parts of ``module``.

    False for a separate network that is not part of ``module``, and for a method of one.

    >>> net = nn.Sequential(nn.Linear(1, 1))
    >>> may_use(net, net[0]), may_use(net, nn.Linear(1, 1).forward), may_use(net, lambda x: net(x))
    (True, False, True)
    """
    owner = function if isinstance(function, nn.Module) else getattr(function, "__self__", None)
    return owner in list(module.modules()) if isinstance(owner, nn.Module) else True


def pipeline_context(trainer: Trainer) -> AbstractContextManager[Any]:
    """Return the autocast context of training, or a null context if training has none.

    True half precision is not applied: it changes the default dtype and so the tables of
    schedulers.
    """
    plugin = trainer.precision_plugin
    return plugin.forward_context() if isinstance(plugin, MixedPrecision) else nullcontext()


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
