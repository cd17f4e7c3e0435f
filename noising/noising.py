"""Noising: make the network's training inputs and targets from a batch of clean samples.

noised = noising(x0, step=step)
loss = noised.loss(network(noised.x, noised.timesteps))
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields
from functools import partial, wraps
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from .axes import Axis, along, require_chunks
from .curves.base import Curve, float32_range, is_traced, may_look_at
from .curves.discrete import Discrete
from .levels import THRESHOLD, WEIGHT, LevelTable
from .losses import L2, Loss, Over, losses_of_elements, mean_of_samples, resolve_loss
from .micro_batches import MicroBatches, Step
from .noise import (
    Chain,
    Gaussian,
    Noise,
    Parts,
    apply_kinds,
    draw_kinds,
    parts_of_one_pass,
    resolve_noise,
    target_noise,
)
from .presets import PRESETS
from .schedule import NoiseSchedule
from .timesteps.base import Resampled, Timesteps
from .timesteps.densities import UniformTimesteps
from .timesteps.shaped import ShapedTimesteps, resolve_times
from .utils.registry import lookup
from .utils.rng import Draws, Stream, SymbolicRange, whole_seed
from .utils.validation import require_same_shape
from .weighting import Weighting, resolve_weighting
from .weighting.checks import warn_of_weights


@dataclass(eq=False)
class Noised:
    """A noised batch: network input, target and weight of each sample.

    ``x`` and ``timesteps`` are the network inputs, the same as a sampler passes. Lightning and
    Fabric hand the batch on unchanged, in the precision that it has.

    Args:
        x: network input: x_t, or c_in · x_t on EDM's curve. Shape (batch, ...), dtype of the clean
            batch.
        x_t: noised batch without that scale, shape and dtype of ``x``, for conversions such as
            ``schedule.to_x0(out, noised.x_t, noised.t)``.
        timesteps: time input of the network, shape (batch,), int64 on discrete schedules.
        target: training target, shape of ``x``, float32 or better.
        weight: weight of each sample, importance weights of the times included, shape (batch,).
        noise: the noise that the target is computed from, shape of ``x``, float32 or better; or a
            function that makes it when it is first read, so that a step that does not use it does
            not store it.
        t: times of the curve, shape (batch,).
        schedule: the schedule that the times belong to.
        listeners: functions that every computed loss calls; see :meth:`Noising.register_loss_hook`.
        criterion: kind of loss.
        threshold: threshold of the loss, shape (batch, 1, ...), or None.
        log_variance: the learned u of the loss weight / e^u · error + u, shape (batch,), or None.
        axis: the axis of k times for each sample; ``timesteps``, ``weight``, ``t`` and
            ``log_variance`` then have shape (batch, k), and ``threshold`` broadcasts to ``x``.
        counted: which of the k elements count in the loss, bool, shape (batch, k); None: all.

    >>> noised = Noising(NoiseSchedule.flow())(torch.zeros(2, 3, 4, 4), step=0)
    >>> noised.loss(noised.target).item()
    0.0
    """

    x: Tensor
    x_t: Tensor
    timesteps: Tensor
    target: Tensor
    weight: Tensor
    noise: Tensor = field(repr=False)
    t: Tensor
    schedule: NoiseSchedule = field(repr=False)
    listeners: tuple[Callable[[Noised, Tensor], None], ...] = field(default=(), repr=False)
    criterion: Loss = field(default_factory=L2, repr=False)
    threshold: Tensor | None = field(default=None, repr=False)
    log_variance: Tensor | None = field(default=None, repr=False)
    axis: Axis | None = field(default=None, repr=False)
    counted: Tensor | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        if not isinstance(self.noise, Tensor):
            vars(self)["_draw_noise"] = vars(self).pop("noise")

    def __getattr__(self, name: str) -> Any:
        draw = vars(self).get("_draw_noise") if name == "noise" else None
        if draw is None:
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        self.noise = draw()
        return self.noise

    @property
    def log_snr(self) -> Tensor:
        """log SNR of each sample, shape of ``t``."""
        return self.schedule.log_snr(self.t)

    def losses(self, prediction: Any, mask: Tensor | None = None, over: Over = "all") -> Tensor:
        """Return the weighted mean error of each sample, shape (batch,), float32 or better.

        Args:
            prediction: the network's output, or an object that holds it as ``.sample``, as the
                models of diffusers return.
            mask: values in [0, 1] that weight the elements, e.g. of shape (batch, 1, height,
                width). An empty mask gives 0.
            over: ``"all"`` divides by the number of all elements, as sd-scripts does; ``"mask"``
                divides by the masked area.

        Raises:
            ValueError: if the output does not have the shape of the target, or the mask does not
                broadcast to it.

        >>> noised = Noising(NoiseSchedule.flow(), loss="l1")(torch.zeros(1, 2, 4, 4), step=0)
        >>> mask = torch.zeros(1, 1, 4, 4)
        >>> mask[..., :1] = 1.0
        >>> (
        ...     noised.losses(noised.target + 2, mask).item(),
        ...     noised.losses(noised.target + 2, mask, over="mask").item(),
        ... )
        (0.5, 2.0)
        """
        out = prediction_tensor(prediction)
        require_same_shape("the network's output", out, "the target", self.target)
        if self.axis is not None:
            return self._losses_of_elements(out, self.axis, mask, over)
        out = out.to(self.target.dtype)
        errors = self.criterion.between(out, self.target, self.threshold)
        error, covered = mean_of_samples(errors, mask, over)
        if self.listeners:
            own = self._own_errors(out, self.target, errors)
            heard = error if own is errors else mean_of_samples(own, mask, over)[0]
            self._tell(heard)
        if self.log_variance is None:
            return self.weight * error
        # samples of weight 0 and masked elements must not train u
        counted = (self.weight > 0).to(error.dtype)
        counted = counted if covered is None else counted * covered
        return self.weight * torch.exp(-self.log_variance) * error + counted * self.log_variance

    def _losses_of_elements(
        self, out: Tensor, axis: Axis, mask: Tensor | None, over: Over
    ) -> Tensor:
        out, target = out.to(self.target.dtype), self.target
        counts = None if self.counted is None else along(self.counted, out.shape, axis)
        if counts is not None:
            # the target of a clean element may be infinite; a finite one may be another's negative
            out = torch.where(counts, out, 0.0)
            target = torch.where(counts | target.isfinite(), target, 0.0)

        def means(errors: Tensor) -> tuple[Tensor, Tensor]:
            errors = errors if counts is None else torch.where(counts, errors, 0.0)
            rest = (self.weight, axis, self.counted, mask, over, self.log_variance)
            return losses_of_elements(errors, *rest)

        errors = self.criterion.between(out, target, self.threshold)
        losses, heard = means(errors)
        if self.listeners:
            own = self._own_errors(out, target, errors)
            self._tell(heard if own is errors else means(own)[1])
        return losses

    def _own_errors(self, out: Tensor, target: Tensor, errors: Tensor) -> Tensor:
        """Return the part of the errors that is of each sample's own target."""
        if not self.criterion.batch_wide:
            return errors
        return self.criterion(out.detach() - target, self.threshold)

    def _tell(self, errors: Tensor) -> None:
        for listener in self.listeners:
            listener(self, errors.detach())

    def loss(self, prediction: Any, mask: Tensor | None = None, over: Over = "all") -> Tensor:
        """Return the mean of :meth:`losses`, a scalar to call ``backward`` on."""
        return self.losses(prediction, mask, over).mean()

    def replaced(self, **values: Any) -> Noised:
        """Return this batch with some fields replaced.

        >>> noised = Noising(NoiseSchedule.flow())(torch.zeros(2, 3), step=0)
        >>> noised.replaced(weight=2 * noised.weight).weight
        tensor([2., 2.])
        """
        own: dict[str, Any] = {one.name: vars(self).get(one.name) for one in fields(self)}
        if "noise" not in vars(self):  # not read so far
            own["noise"] = vars(self)["_draw_noise"]
        return Noised(**(own | values))

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Noised:
        """Return this batch on a device; every dtype stays the same.

        >>> Noising(NoiseSchedule.flow())(torch.zeros(2, 3), step=0).to("meta").x.device.type
        'meta'
        """
        tensors = {one.name: getattr(self, one.name) for one in fields(self)}
        moved = {
            k: v.to(device, non_blocking=non_blocking)
            for k, v in tensors.items()
            if isinstance(v, Tensor)
        }
        return self.replaced(**moved)


# Lightning maps a function (e.g. a cast) over the init fields of a dataclass, and fails on a frozen
# one such as a schedule. It copies fields with init=False unchanged.
for _field in fields(Noised):
    _field.init = False


class NoiseDraw(NamedTuple):
    """The random values of a batch, on the CPU: see :meth:`Noising.draw`.

    >>> Noising(NoiseSchedule.flow()).draw([0], (3,), step=0, total=1).noise.shape
    torch.Size([1, 3])
    """

    t: Tensor
    """Times of the curve, shape (batch,)."""
    noise: Tensor
    """The plain Gaussian noise, shape (batch, ...)."""
    parts: tuple[Tensor, ...]
    """The parts that each kind of noise adds to it, batch axis first."""
    importance: Resampled | None
    """Bins and weights if the density follows losses, else None."""
    counted: Tensor | None = None
    """Which of k times for each sample count in the loss, shape (batch, k); None: all."""


class Noising(nn.Module):
    """Draw noise and times for a batch; compute the target and the loss weight.

    This is a module, so that the checkpoint holds what it learns or measures (weights, loss
    history). It has parameters only if the weighting scheme has parameters. torch.compile compiles
    a whole step, also with fullgraph, and with dynamic=True once for all batches. It does not for
    beta densities, importance sampling and noise that depends on its batch (immiscible, optimal
    transport). For these, compile only the part after :meth:`draw`, i.e. :meth:`at` and the loss.
    Warns if the weight of a zero-SNR terminal step is 0.

    Args:
        schedule: the noise schedule.
        weighting: a name of ``WEIGHTINGS`` or an object.
        timesteps: a name of ``TIMESTEPS`` or an object. A name of ``SHAPED_TIMESTEPS`` gives each
            sample k times along an axis, e.g. 'independent:axis=frames'.
        noise: a name of ``NOISES`` or an object, or a sequence of them.
        seed: seed of noise and times.
        loss: a name of ``LOSSES`` or an object.

    Raises:
        TypeError: if ``schedule`` is not a NoiseSchedule.
        ValueError: for unknown names, for times that do not fit the schedule, and for a learned
            variance of a loss that may be negative.

    >>> schedule = NoiseSchedule.scaled_linear(prediction="v_prediction").zero_terminal_snr()
    >>> noising = Noising(schedule, weighting="uniform", timesteps="stratified", seed=0)
    >>> noised = noising(torch.randn(4, 4, 8, 8), step=0)
    >>> noised.x.shape, noised.timesteps.dtype
    (torch.Size([4, 4, 8, 8]), torch.int64)
    """

    def __init__(
        self,
        schedule: NoiseSchedule,
        weighting: str | Weighting = "uniform",
        timesteps: str | Timesteps = "uniform",
        noise: str | Noise | Chain | Sequence[str | Noise] = "gaussian",
        seed: int = 0,
        loss: str | Loss = "l2",
    ) -> None:
        super().__init__()
        if not isinstance(schedule, NoiseSchedule):
            raise TypeError(
                f"schedule must be a NoiseSchedule, got {type(schedule).__name__}; e.g. "
                "NoiseSchedule.scaled_linear()"
            )
        self.schedule = schedule
        self.weighting = resolve_weighting(weighting).on_curve(schedule.curve)
        self.log_variance = self.weighting.log_variance()
        self.loss = resolve_loss(loss)
        if self.log_variance is not None and self.loss.may_be_negative:
            raise ValueError(
                f"weighting {self.weighting.name!r} learns the variance of a loss, and loss "
                f"{self.loss.name!r} may be negative: together they have no minimum; give another "
                "weighting or another loss"
            )
        self.timesteps = resolve_times(timesteps)
        self.timesteps.check(schedule.curve)
        self.loss_history = self.timesteps.history()
        self.noise = resolve_noise(noise)
        self.seed = whole_seed(seed)
        self._looked_at_gpu_batch = False
        self._listeners: list[Callable[[Noised, Tensor], None]] = []
        self._micro_batches = MicroBatches()
        self._level_table = LevelTable(schedule, self.weighting, self.loss)
        warn_of_weights(self.weighting, self.timesteps, schedule)

    @classmethod
    def preset(
        cls,
        name: str,
        *,
        tokens: int | None = None,
        shift: float | None = None,
        weighting: str | Weighting | None = None,
        timesteps: str | Timesteps | None = None,
        noise: str | Noise | Chain | Sequence[str | Noise] = "gaussian",
        seed: int = 0,
        loss: str | Loss = "l2",
    ) -> Noising:
        """Return the noising that a published model was trained with.

        The schedule is that of :meth:`NoiseSchedule.preset`, the one that the model's pipeline
        samples with, so previews and saved configs are right. The density and the weighting are
        those of the training, with its own shift. Warns where these are not published, and then
        trains on the schedule as it is sampled.

        Args:
            name: a name of ``PRESETS``.
            tokens: image tokens, for a shift that depends on them.
            shift: another shift of the density, on a flow.
            weighting, timesteps: in place of the preset's; see :class:`Noising`. The density is
                that of the whole schedule: an expert's range of noise levels stays.
            noise, seed, loss: as for :class:`Noising`.

        Raises:
            ValueError: as for :meth:`NoiseSchedule.preset`.

        >>> noising = Noising.preset("lumina2")  # sampled with 6, trained with Flux's line
        >>> noising.schedule.curve.shift, round(noising.timesteps.shift, 4)
        (6.0, 3.1582)
        >>> Noising.preset("edm2").weighting.name, Noising.preset("edm2", weighting="edm").seed
        ('learned_uncertainty', 0)
        """
        preset = lookup("preset", name, PRESETS)
        sampled_at = None if preset.only_training_takes_tokens else tokens
        schedule = NoiseSchedule.preset(name, sampled_at)
        if timesteps is None:
            timesteps = preset.density(name, schedule.curve, tokens, shift)
        elif shift is not None:
            raise ValueError("shift is that of the preset's density; leave it out with timesteps=")
        else:
            timesteps = preset.limited(resolve_times(timesteps))
        weighting = preset.training.weighting if weighting is None else weighting
        return cls(schedule, weighting, timesteps, noise, seed, loss)

    def forward(
        self,
        x0: Tensor,
        *,
        step: int,
        micro_batch: int | None = None,
        accumulate: int | None = None,
        rank: int | None = None,
        world_size: int | None = None,
        index: Sequence[int] | Tensor | None = None,
        total: int | None = None,
        timesteps: Tensor | None = None,
        noise: Tensor | None = None,
    ) -> Noised:
        """Return the noised batch of this process at this optimizer step.

        Noise and times depend only on (seed, step, global index). No two samples of an optimizer
        step share an index. For gradient accumulation, pass the same ``step`` for all micro-batches
        of a step:

            for i, x0 in enumerate(data):
                noised = noising(x0, step=i // 4)

        In training mode, calls at the same step count the micro-batches automatically. In eval
        mode, and where the call itself is compiled (torch.compile), nothing is counted: equal
        arguments give equal noise, and micro-batches need ``micro_batch``. Code that runs a forward
        twice needs ``micro_batch`` or ``index`` too: LBFGS, or activation checkpointing with the
        Noising inside.

        Args:
            x0: the clean batch, floating point, shape (batch, ...).
            step: number of the optimizer step.
            micro_batch: number of this micro-batch within the step, from 0; by default the next
                one. In training mode, a micro-batch that was already noised raises ValueError.
            accumulate: number of micro-batches in a step. Stratified times are then spread over all
                of them. Without it they are spread over each micro-batch separately, which is
                equally correct and slightly less even.
            rank, world_size: those of the processes that see different data; by default
                torch.distributed's. Sample k of a batch has the global index (samples before it at
                this step on this rank + k) · world_size + rank, its position in a
                DistributedSampler.
            index: the global indices themselves, shape (batch,), within the optimizer step, for
                other layouts: with a contiguous batch for each rank ``range(rank * batch, (rank +
                1) * batch)``. Nothing is counted then. Equal indices get equal noise, e.g. the two
                samples of a pair.
            total: number of samples of the whole optimizer step, over which stratified times are
                spread; by default batch · world_size · accumulate, with the batch of the step's
                first call. If ranks have unequal batches, give the same number on every rank.
            timesteps: times of the curve, shape (batch,), in place of drawn ones; importance
                weights do not apply to them. Shape (batch, k) if the density draws k times; all of
                them count in the loss.
            noise: shape of x0, in place of drawn noise; kinds of noise do not apply to it.

        Raises:
            ValueError: for integer, empty, mis-shaped or non-finite x0 (on a GPU only the values of
                the first batch are checked, as each check costs a host sync); for times outside the
                schedule; for a sample position outside the optimizer step; for a micro-batch that
                was already noised.
            TypeError: for counters that are not integers.
        """
        self._check(x0)
        process_rank, process_count = _process()
        place = Step(
            step,
            micro_batch,
            accumulate,
            process_rank if rank is None else rank,
            process_count if world_size is None else world_size,
            index,
            total,
        )
        step = place.step
        taken = self._micro_batches.take(x0.shape[0], place, counted=self.training)
        index, total = taken.index, taken.total
        if self.loss_history is not None and self.training:
            self.loss_history.commit(step)
        draws = Draws(self.seed, index, step=step, stream=Stream.TRAINING_NOISE, device=x0.device)
        size = tuple(x0.shape[1:])
        if noise is None and (parts := self._parts_of_one_pass(x0, draws)) is not None:
            made = partial(target_noise, self.noise.kinds, size, self.seed, index, step, x0.device)
            if timesteps is None and self._picks_timesteps(draws):
                table = self._table().of(x0.device, torch.float32)
                if not table.requires_grad:
                    t, levels, *mixed = draws.noised_at_uniform_times(x0, table, *parts)
                    return self._batch(x0, t, levels, made, *mixed)
        else:
            parts, made = None, None
        importance = counted = None
        if timesteps is None:
            timesteps, importance, counted = self._draw_times(draws, index, total, x0.shape)
            levels, t = self._levels(x0, timesteps, checked=True)
        else:
            levels, t = self._levels(x0, timesteps)
        if noise is not None:
            require_same_shape("noise", noise, "x0", x0)
            noised = self._noised(x0, t, levels, noise, ())
        elif parts is not None and levels.dtype == torch.float32 and not levels.requires_grad:
            exact = torch.float32 if self.schedule.curve.scales_input else x0.dtype
            noised = self._batch(x0, t, levels, made, *draws.noised(x0, levels, exact, *parts))
        else:
            noised = self._noised(x0, t, levels, *self._draw_noise(draws, index, size))
        noised = counting(noised, counted)
        return self._with_importance(noised, importance, step, index)

    if TYPE_CHECKING:
        __call__ = forward
    else:

        @wraps(forward, assigned=("__doc__", "__annotations__"))
        def __call__(self, *args: Any, **kwargs: Any) -> Noised:
            return super().__call__(*args, **kwargs)

    def register_loss_hook(self, listener: Callable[[Noised, Tensor], None]) -> Callable[[], None]:
        """Call ``listener(noised, errors)`` on every loss; return a function that removes it.

        ``errors``: the unweighted error of each sample, shape of ``noised.t``, detached, on the
        device of the loss; of the contrastive loss the squared error of its own target. Copies,
        pickles and checkpoints do not contain the listeners.

        >>> seen = []
        >>> noising = Noising(NoiseSchedule.flow())
        >>> stop = noising.register_loss_hook(lambda noised, errors: seen.append(errors.tolist()))
        >>> noised = noising(torch.zeros(2, 3), step=0)
        >>> loss = noised.loss(noised.target)
        >>> stop()
        >>> seen
        [[0.0, 0.0]]
        """
        self._listeners.append(listener)
        return lambda: self._listeners.remove(listener)

    def __getstate__(self) -> dict[str, Any]:
        # a copy (e.g. of an EMA) must not call these listeners, and has a counter of its own
        table = LevelTable(self.schedule, self.weighting, self.loss)
        return self.__dict__ | {
            "_listeners": [],
            "_micro_batches": MicroBatches(),
            "_level_table": table,
        }

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self._micro_batches = MicroBatches()  # a resume restarts the count

    def draw(
        self,
        index: Sequence[int] | Tensor,
        shape: tuple[int, ...],
        *,
        step: int,
        total: int,
        device: torch.device | str = "cpu",
    ) -> NoiseDraw:
        """Return times and noise of the samples with these global indices at this step.

        Times are always made on the CPU.

        Args:
            index: global indices of the samples, shape (batch,).
            shape: shape of a sample, without the batch axis.
            step: number of the optimizer step.
            total: number of samples in the whole optimizer step, over which stratified times are
                spread. Each group of ``total`` consecutive indices is stratified separately, so
                there may be more indices than ``total``.
            device: where the noise is made; the values are the same on every device.

        >>> drawn = Noising(NoiseSchedule.flow(), noise="offset", seed=1).draw(
        ...     [5, 6], (3, 2), step=2, total=8
        ... )
        >>> drawn.t.shape, drawn.noise.shape, [part.shape for part in drawn.parts]
        (torch.Size([2]), torch.Size([2, 3, 2]), [torch.Size([2, 3, 1])])
        """
        draws = Draws(self.seed, index, step=step, stream=Stream.TRAINING_NOISE, device=device)
        index = index.tolist() if isinstance(index, Tensor) else index
        x_shape = (len(index), *shape)
        t, importance, counted = self._draw_times(draws, index, total, x_shape)
        return NoiseDraw(t, *self._draw_noise(draws, index, shape), importance, counted)

    def _draw_times(
        self, draws: Draws, index: Sequence[int], total: int, shape: Sequence[int]
    ) -> tuple[Tensor, Resampled | None, Tensor | None]:
        """Return times of the curve, how importance sampling chose them, and which count."""
        curve, shaped = self.schedule.curve, self._shaped
        if shaped is not None:
            groups, k = _groups(index, total), shaped.count(shape)
            t, counted = shaped.draw(draws, self.seed, groups, total, curve, k)
            return _as_drawn(t, curve), None, counted
        # 1 - u lies in (0, 1]: this includes pure noise and excludes a clean sample
        u = 1 - draws.of(Stream.TRAINING_TIME, device="cpu").uniform(dtype=torch.float64)
        if self.timesteps.stratified:
            at, groups = draws.index.cpu(), _groups(index, total)
            u = self.timesteps.spread(u, at, groups, total, self.seed, draws.step)
        importance = self.loss_history.resample(u) if self.loss_history is not None else None
        t = self.timesteps.times(u if importance is None else importance.u, curve)
        return _as_drawn(t, curve), importance, None

    @property
    def _shaped(self) -> ShapedTimesteps | None:
        return self.timesteps if isinstance(self.timesteps, ShapedTimesteps) else None

    @property
    def _axis(self) -> Axis | None:
        return None if self._shaped is None else self._shaped.axis

    def _draw_noise(
        self, draws: Draws, index: Sequence[int], shape: Sequence[int]
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Return the plain Gaussian noise and the parts of the kinds of noise."""
        parts = draw_kinds(
            self.noise.kinds, tuple(shape), self.seed, index, step=draws.step, device=draws.device
        )
        return draws.normal(*shape), parts

    def at(
        self,
        x0: Tensor,
        t: Tensor,
        noise: Tensor,
        parts: Sequence[Tensor] = (),
        counted: Tensor | None = None,
    ) -> Noised:
        """Return the noised batch for given times and noise.

        Args:
            x0: the clean batch, shape (batch, ...).
            t: times of the curve, shape (batch,), or (batch, k) if the density draws k times.
            noise: shape of x0.
            parts: the parts that the kinds of noise drew for the batch; without them ``noise`` is
                used unchanged.
            counted: which of the k times count in the loss.

        Raises:
            ValueError: for times that are not of shape (batch,), and for timesteps of a discrete
                schedule in a dtype that cannot hold them.
        """
        levels, t = self._levels(x0, t)
        return counting(self._noised(x0, t, levels, noise, parts), counted)

    def _levels(self, x0: Tensor, t: Tensor, checked: bool = False) -> tuple[Tensor, Tensor]:
        """Return the levels at times ``t``, and these times on the device of ``x0``."""
        curve = self.schedule.curve
        if self._axis is not None:
            _require_shaped(t, x0, self._axis)
        elif t.shape != x0.shape[:1]:
            raise ValueError(
                f"timesteps must have shape ({x0.shape[0]},), one for each sample, got "
                f"{tuple(t.shape)}"
            )
        floating = t.is_floating_point()
        if floating and curve.is_discrete and t.dtype not in (torch.float32, torch.float64):
            raise ValueError(
                f"timesteps of dtype {t.dtype} cannot hold the integers up to {curve.t_max:g}; "
                "give int64 or float32"
            )
        dtype = torch.promote_types(t.dtype, x0.dtype) if floating else t.dtype
        t = t.to(x0.device, dtype, non_blocking=True)
        exact = torch.float64 in (x0.dtype, t.dtype)
        return self._table().at(t, torch.float64 if exact else torch.float32, checked=checked), t

    def _table(self) -> LevelTable:
        table = self._level_table
        if not table.is_of(self.schedule, self.weighting, self.loss):  # they were replaced
            table = self._level_table = LevelTable(self.schedule, self.weighting, self.loss)
        return table

    def _picks_timesteps(self, draws: Draws) -> bool:
        """Return whether one loop draws the times and looks their levels up, too."""
        return (
            draws.has_loops
            and type(self.timesteps) is UniformTimesteps
            and not self.timesteps.stratified
            and type(self.schedule.curve) is Discrete
        )

    def _noised(
        self, x0: Tensor, t: Tensor, levels: Tensor, noise: Tensor, parts: Sequence[Tensor]
    ) -> Noised:
        """Return the batch of :meth:`at`."""
        alpha, sigma, c0, c1 = along(levels[:4], x0.shape, self._axis).unbind()
        clean = x0.to(levels.dtype)
        noise, *on_device = (
            one.to(x0.device, levels.dtype, non_blocking=True) for one in (noise, *parts)
        )
        noise, perturbed = apply_kinds(self.noise.kinds if parts else (), noise, on_device, clean)
        x_t, target = alpha * clean + sigma * perturbed, c0 * clean + c1 * noise
        return self._batch(x0, t, levels, noise, x_t, target)

    def _parts_of_one_pass(self, x0: Tensor, draws: Draws) -> Parts | None:
        """Return what one loop or kernel needs to make this batch with the bits of :meth:`_noised`.

        It is None where none can. The levels must be float32 that need no gradient, too.
        """
        if (
            type(x0) is not Tensor
            or self._axis is not None
            or is_traced(x0)
            or (x0.dtype != torch.float32 and x0.device.type == "cpu")
            or not x0.is_contiguous()
            or (x0.requires_grad and torch.is_grad_enabled())
            or not draws.has_one_pass
        ):
            return None
        kinds = self.noise.kinds
        if not draws.has_loops and any(type(kind) is not Gaussian for kind in kinds):
            return None  # a GPU's kernel makes plain noise
        return parts_of_one_pass(kinds, tuple(x0.shape[1:]), draws)

    def _batch(
        self, x0: Tensor, t: Tensor, levels: Tensor, noise: Any, x_t: Tensor, target: Tensor
    ) -> Noised:
        schedule = self.schedule
        axis = self._axis
        x = schedule.scale_model_input(x_t, t, axis).to(x0.dtype)
        threshold = (
            along(levels[THRESHOLD], x0.shape, axis) if levels.shape[0] > THRESHOLD else None
        )
        learned = self.log_variance
        return Noised(
            x=x,
            x_t=x_t.to(x0.dtype) if schedule.curve.scales_input else x,
            timesteps=schedule.model_timesteps(t, torch.promote_types(x0.dtype, torch.float32)),
            target=target,
            weight=levels[WEIGHT],
            noise=noise,
            t=t,
            schedule=schedule,
            listeners=tuple(self._listeners),
            criterion=self.loss,
            threshold=threshold,
            log_variance=None if learned is None else learned(levels[0], levels[1]),
            axis=axis,
        )

    def _with_importance(
        self, noised: Noised, drawn: Resampled | None, step: int, index: Sequence[int]
    ) -> Noised:
        """Return the batch with importance weights and a listener that records its losses."""
        if drawn is None or self.loss_history is None:
            return noised
        observe, global_index = self.loss_history.observe, torch.tensor(index)

        def listener(noised: Noised, errors: Tensor) -> None:
            observe(step, global_index, drawn, noised.weight, errors)

        weight = noised.weight * drawn.weight.to(
            noised.weight.device, noised.weight.dtype, non_blocking=True
        )
        return noised.replaced(weight=weight, listeners=(*noised.listeners, listener))

    def _check(self, x0: Tensor) -> None:
        if not isinstance(x0, Tensor) or not x0.is_floating_point():
            got = x0.dtype if isinstance(x0, Tensor) else type(x0).__name__
            raise ValueError(
                f"x0 must be a floating point tensor, got {got}; scale images to [-1, 1], e.g. "
                "images / 127.5 - 1"
            )
        if x0.ndim < 2 or not x0.numel():
            raise ValueError(
                f"x0 must have shape (batch, ...) and hold something, got {tuple(x0.shape)}"
            )
        if x0.device.type != "cpu" and not torch.compiler.is_compiling():
            if self._looked_at_gpu_batch:
                return
            self._looked_at_gpu_batch = True
        elif not may_look_at(x0):
            return
        # a finite sum has finite terms; only where it is not, each element is looked at
        if not math.isfinite(float(x0.detach().sum(dtype=torch.float32))) and not bool(
            x0.isfinite().all()
        ):
            bad = (~x0.isfinite().flatten(1).all(1)).nonzero().flatten().tolist()
            raise ValueError(
                f"x0 holds NaN or infinity in samples {bad}; look at the data or the encoder that "
                "made them"
            )

    def extra_repr(self) -> str:
        words = ("weighting", "timesteps", "noise", "seed", "loss")
        return f"{self.schedule}, " + ", ".join(f"{word}={getattr(self, word)}" for word in words)


def prediction_tensor(prediction: Any) -> Tensor:
    """Return the tensor of a network's output.

    It is the output itself, its ``.sample``, or the first element of a tuple. Raises ValueError for
    any other output.

    >>> prediction_tensor((torch.zeros(2), "more")).shape
    torch.Size([2])
    """
    if isinstance(prediction, Tensor):
        return prediction
    if isinstance(prediction, tuple):
        return prediction_tensor(prediction[0])
    sample = getattr(prediction, "sample", None)
    if isinstance(sample, Tensor):
        return sample
    raise ValueError(
        "the network must return a tensor or an object with a tensor .sample, got "
        f"{type(prediction).__name__}"
    )


def _as_drawn(t: Tensor, curve: Curve) -> Tensor:
    # float64 times would make the batch float64
    return t.float().clamp(*float32_range(curve)) if t.is_floating_point() else t


def _require_shaped(t: Tensor, x0: Tensor, axis: Axis) -> None:
    if t.ndim != 2 or len(t) != len(x0):
        raise ValueError(
            f"timesteps must have shape ({len(x0)}, k), k times for each sample, got "
            f"{tuple(t.shape)}"
        )
    require_chunks(t.shape[1], axis, x0.shape)


def counting(noised: Noised, counted: Tensor | None) -> Noised:
    """Return the batch without weight on the elements that do not count in its loss.

    >>> noised = Noising(NoiseSchedule.flow(), timesteps="independent:axis=1")(
    ...     torch.zeros(1, 2), step=0
    ... )
    >>> counting(noised, torch.tensor([[True, False]])).weight
    tensor([[1., 0.]])
    """
    if counted is None:
        return noised
    counted = counted.to(noised.weight.device, non_blocking=True)
    return noised.replaced(counted=counted, weight=torch.where(counted, noised.weight, 0.0))


def _groups(index: Sequence[int] | SymbolicRange, total: int) -> Sequence[int]:
    """Return the numbers of the groups of ``total`` indices that hold these indices."""
    if isinstance(index, range | SymbolicRange):
        return range(index.start // total, (index.stop - index.step) // total + 1)
    return sorted({i // total for i in index})


def _process() -> tuple[int, int]:
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_rank(), torch.distributed.get_world_size()
    return 0, 1
