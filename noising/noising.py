"""Noising: from a batch of clean samples to what a network is trained on.

noised = noising(x0, step=step)
loss = noised.loss(network(noised.x, noised.timesteps))
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields
from functools import wraps
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from .curves.base import Curve, may_look_at
from .losses import L2, Loss, Over, mean_of_samples, resolve_loss
from .micro_batches import MicroBatches, Step
from .noise import Chain, Noise, apply_kinds, draw_kinds, resolve_noise
from .schedule import NoiseSchedule
from .timesteps import resolve_timesteps
from .timesteps.base import Resampled, Timesteps
from .utils.rng import Draws, Stream, permutation, whole_seed
from .utils.validation import require_same_shape
from .weighting import Weighting, resolve_weighting
from .weighting.checks import warn_of_weights


@dataclass(eq=False)
class Noised:
    """A noised batch: what the network sees, what it should answer, and how much each sample
    counts.

    ``x`` and ``timesteps`` are what the network is given, as a sampler gives it: ``x`` is x_t, on
    EDM's curve c_in · x_t, shape (batch, ...), dtype of the clean batch; ``timesteps``: shape
    (batch,), int64 on discrete schedules. ``x_t``: the noised batch without that scale, shape and
    dtype of ``x``, for conversions such as ``schedule.to_x0(out, noised.x_t, noised.t)``.
    ``target``, ``noise`` (the one that the target is made of): shape of ``x``, float32 or better.
    ``weight`` (importance weights of the times included), ``t`` (times of the curve), ``log_snr``:
    shape (batch,). ``criterion``: the kind of loss, ``threshold``: its threshold, or None, shape
    (batch, 1, ...). ``log_variance``: the learned u of the loss weight / e^u · error + u, shape
    (batch,), or None. Lightning and Fabric hand it on as it is, in the precision that it has.

    >>> noised = Noising(NoiseSchedule.flow())(torch.zeros(2, 3, 4, 4), step=0)
    >>> noised.loss(noised.target).item()
    0.0
    """

    x: Tensor
    x_t: Tensor
    timesteps: Tensor
    target: Tensor
    weight: Tensor
    noise: Tensor
    t: Tensor
    schedule: NoiseSchedule = field(repr=False)
    listeners: tuple[Callable[[Noised, Tensor], None], ...] = field(default=(), repr=False)
    criterion: Loss = field(default_factory=L2, repr=False)
    threshold: Tensor | None = field(default=None, repr=False)
    log_variance: Tensor | None = field(default=None, repr=False)

    @property
    def log_snr(self) -> Tensor:
        """log SNR of each sample, shape (batch,)."""
        return self.schedule.log_snr(self.t)

    def losses(self, prediction: Any, mask: Tensor | None = None, over: Over = "all") -> Tensor:
        """Return the weighted mean error of each sample, shape (batch,), float32 or better.

        ``prediction`` is the network's output, or an object that holds it as ``.sample``, as
        diffusers' models return. ``mask`` in [0, 1], e.g. of shape (batch, 1, height, width), says
        what counts; ``over="all"`` divides by the number of all elements, as sd-scripts does,
        ``over="mask"`` by the masked area. An empty mask gives 0. Raises ValueError where a shape
        is not the target's, or does not broadcast to it.

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
        errors = self.criterion(out.to(self.target.dtype) - self.target, self.threshold)
        error, covered = mean_of_samples(errors, mask, over)
        for listener in self.listeners:
            listener(self, error.detach())
        if self.log_variance is None:
            return self.weight * error
        # what does not count, or is masked, must not teach u
        counted = (self.weight > 0).to(error.dtype)
        counted = counted if covered is None else counted * covered
        return self.weight * torch.exp(-self.log_variance) * error + counted * self.log_variance

    def loss(self, prediction: Any, mask: Tensor | None = None, over: Over = "all") -> Tensor:
        """Return the mean of :meth:`losses`, a scalar to call ``backward`` on."""
        return self.losses(prediction, mask, over).mean()

    def replaced(self, **values: Any) -> Noised:
        """Return this batch with other values in some of its fields.

        >>> noised = Noising(NoiseSchedule.flow())(torch.zeros(2, 3), step=0)
        >>> noised.replaced(weight=2 * noised.weight).weight
        tensor([2., 2.])
        """
        return Noised(**({one.name: getattr(self, one.name) for one in fields(self)} | values))

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Noised:
        """Return this batch on a device, every dtype as it is.

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


# Lightning maps a function over the fields that a dataclass is made of, e.g. a cast to the
# precision of the network, and fails where it meets a frozen one, as a schedule is. Fields without
# init it takes over as they are.
for _field in fields(Noised):
    _field.init = False


class NoiseDraw(NamedTuple):
    """What is drawn for a batch, on the CPU: see :meth:`Noising.draw`.

    >>> Noising(NoiseSchedule.flow()).draw([0], (3,), step=0, total=1).noise.shape
    torch.Size([1, 3])
    """

    t: Tensor
    """Times of the curve, shape (batch,)."""
    noise: Tensor
    """The plain Gaussian noise, shape (batch, ...)."""
    parts: tuple[Tensor, ...]
    """What each kind of noise adds to it, with the batch first."""
    importance: Resampled | None
    """Bins and weights, where the density follows losses."""


class Noising(nn.Module):
    """Draw noise and times for a batch, and state the target and the weight of the loss.

    ``weighting``, ``timesteps``, ``noise`` and ``loss`` are names of their registries or objects;
    ``noise`` also a sequence of them. It is a module so that what is learned or measured (weights,
    loss history) travels with the checkpoint; it has no parameters unless a scheme has.
    torch.compile takes a whole step, fullgraph too, but for beta densities, importance sampling and
    immiscible noise: there compile what follows :meth:`draw`, that is :meth:`at` and the loss.
    Raises ValueError for unknown names and for times that do not fit the schedule; warns where the
    weight of a zero-SNR terminal step is 0.

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
        self.timesteps = resolve_timesteps(timesteps)
        self.timesteps.check(schedule.curve)
        self.loss_history = self.timesteps.history()
        self.noise = resolve_noise(noise)
        self.seed = whole_seed(seed)
        self._looked_at_gpu_batch = False
        self._listeners: list[Callable[[Noised, Tensor], None]] = []
        self._micro_batches = MicroBatches()
        warn_of_weights(self.weighting, self.timesteps, schedule)

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

        Noise and times are a function of (seed, step, global index), and of nothing else; no two
        samples of an optimizer step share an index, so gradient accumulation needs nothing but the
        same ``step`` for its micro-batches:

            for i, x0 in enumerate(data):
                noised = noising(x0, step=i // 4)

        In training mode calls at the same step count on by themselves. In eval mode nothing is
        counted, nor where the call itself is compiled (torch.compile): equal arguments give equal
        noise, and micro-batches need ``micro_batch``. So does, or ``index``, what computes a
        forward twice: LBFGS, or activation checkpointing with the Noising inside.

        Args:
            x0: the clean batch, floating point, shape (batch, ...).
            step: counts optimizer steps.
            micro_batch: which of the batches of this step it is, from 0; by default the next one.
                In training, one that was noised already is refused.
            accumulate: how many there are in a step. Stratified times are then spread over all of
                them; without it over each micro-batch by itself, which is as right and a little
                less even.
            rank, world_size: of the processes that see different data, by default
                torch.distributed's. Sample k of a batch has the global index (samples before it at
                this step on this rank + k) · world_size + rank, the place that a DistributedSampler
                takes it from.
            index: the global indices themselves, shape (batch,), inside the optimizer step, for
                other layouts: with a contiguous batch for each rank ``range(rank * batch, (rank +
                1) * batch)``. Nothing is counted then, equal indices get equal noise, e.g. the two
                of a pair.
            total: the samples of the whole optimizer step, over which stratified times are spread;
                by default batch · world_size · accumulate, with the batch of the step's first call.
                Give it, the same everywhere, where ranks have unequal batches.
            timesteps: times of the curve, shape (batch,), in place of drawn ones; importance
                weights do not act on them.
            noise: shape of x0, in place of drawn noise; kinds of noise do not act on it.

        Raises:
            ValueError: for integer, empty, mis-shaped or non-finite x0 (on a GPU the values of the
                first batch are checked, later ones would cost a host sync each), for times outside
                the schedule, for a place outside the optimizer step, and for a micro-batch that was
                noised already.
            TypeError: for counters that are no integers.
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
        drawn = self.draw(index, tuple(x0.shape[1:]), step=step, total=total, device=x0.device)
        if noise is not None:
            require_same_shape("noise", noise, "x0", x0)
            drawn = drawn._replace(noise=noise, parts=())
        if timesteps is not None:
            drawn = drawn._replace(t=timesteps, importance=None)
        noised = self.at(x0, drawn.t, drawn.noise, drawn.parts)
        return self._with_importance(noised, drawn.importance, step, index)

    if TYPE_CHECKING:
        __call__ = forward
    else:

        @wraps(forward, assigned=("__doc__", "__annotations__"))
        def __call__(self, *args: Any, **kwargs: Any) -> Noised:
            return super().__call__(*args, **kwargs)

    def register_loss_hook(self, listener: Callable[[Noised, Tensor], None]) -> Callable[[], None]:
        """Call ``listener(noised, errors)`` whenever a loss is computed; return the function that
        ends it.

        ``errors``: the unweighted error of each sample, shape (batch,), detached, on the device of
        the loss. Listeners do not travel with copies, pickles or checkpoints.

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
        # a copy (an EMA's, say) must not report to those who listen here, nor copy them with it,
        # and counts for itself
        return self.__dict__ | {"_listeners": [], "_micro_batches": MicroBatches()}

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self._micro_batches = MicroBatches()  # a resume begins its step anew

    def draw(
        self,
        index: Sequence[int] | Tensor,
        shape: tuple[int, ...],
        *,
        step: int,
        total: int,
        pin_memory: bool = False,
        device: torch.device | str = "cpu",
    ) -> NoiseDraw:
        """Return times and noise of the samples with these global indices at this step.

        ``total`` is the number of samples in the whole optimizer step, over which stratified times
        are spread. Every ``total`` consecutive indices are spread by themselves, so that there may
        be more of them. ``device``: where the noise is made, the same everywhere; times are made on
        the CPU. On the CPU ``pin_memory`` puts the noise where a copy to the GPU does not make the
        host wait.

        >>> drawn = Noising(NoiseSchedule.flow(), noise="offset", seed=1).draw(
        ...     [5, 6], (3, 2), step=2, total=8
        ... )
        >>> drawn.t.shape, drawn.noise.shape, [part.shape for part in drawn.parts]
        (torch.Size([2]), torch.Size([2, 3, 2]), [torch.Size([2, 3, 1])])
        """
        listed = index.tolist() if isinstance(index, Tensor) else [*index]
        index = torch.as_tensor(index, dtype=torch.int64)
        draws = Draws(self.seed, index, step=step, stream=Stream.TRAINING_NOISE, device=device)
        # not the default dtype, which is the network's inside of a Lightning step in half precision
        out = torch.empty(
            len(listed), *shape, dtype=torch.float32, device=device, pin_memory=pin_memory
        )
        noise = draws.normal(*shape, out=out)
        parts = draw_kinds(self.noise.kinds, shape, self.seed, index, step=step, device=device)
        index = index.cpu()
        # 1 - u lies in (0, 1]: pure noise can be drawn, a clean sample cannot
        u = 1 - Draws(self.seed, index, step=step, stream=Stream.TRAINING_TIME).uniform(
            dtype=torch.float64
        )
        if self.timesteps.stratified:
            for group in sorted({i // total for i in listed}):
                spread = self.timesteps.stratify(
                    u, index, permutation(self.seed, total, step=step, group=group)
                )
                u = torch.where(index // total == group, spread, u)
        importance = self.loss_history.resample(u) if self.loss_history is not None else None
        t = self.timesteps.times(u if importance is None else importance.u, self.schedule.curve)
        return NoiseDraw(
            _float32_inside(t, self.schedule.curve) if t.is_floating_point() else t,
            noise,
            tuple(part.pin_memory() if pin_memory else part for part in parts),
            importance,
        )

    def at(self, x0: Tensor, t: Tensor, noise: Tensor, parts: Sequence[Tensor] = ()) -> Noised:
        """Return the noised batch for given times of the curve, shape (batch,), and noise, shape of
        x0.

        ``parts``: what the kinds of noise drew for the batch; without them ``noise`` is taken as it
        is.
        """
        curve, prediction = self.schedule.curve, self.schedule.prediction
        if t.shape != x0.shape[:1]:
            raise ValueError(
                f"timesteps must have shape ({x0.shape[0]},), one for each sample, got "
                f"{tuple(t.shape)}"
            )
        if (
            t.is_floating_point()
            and curve.is_discrete
            and t.dtype not in (torch.float32, torch.float64)
        ):
            raise ValueError(
                f"timesteps of dtype {t.dtype} cannot hold the integers up to {curve.t_max:g}; "
                "give int64 or float32"
            )
        alpha, sigma = self.schedule.alpha_sigma(t, x0)
        clean, noise = x0.to(alpha.dtype), noise.to(x0.device, alpha.dtype, non_blocking=True)
        kinds = self.noise.kinds if parts else ()
        on_device = [part.to(x0.device, alpha.dtype, non_blocking=True) for part in parts]
        noise, perturbed = apply_kinds(kinds, noise, on_device, clean)
        det = prediction.determinant(alpha, sigma)
        t = t.to(
            x0.device, torch.promote_types(t.dtype, x0.dtype) if t.is_floating_point() else None
        )
        fraction = curve.fraction(t.to(alpha.dtype)).view_as(alpha)
        x_t = alpha * clean + sigma * perturbed
        x = self.schedule.scale_model_input(x_t, t).to(x0.dtype)
        return Noised(
            x=x,
            x_t=x_t.to(x0.dtype) if curve.scales_input else x,
            timesteps=self.schedule.model_timesteps(
                t, torch.promote_types(x0.dtype, torch.float32)
            ),
            target=prediction.combine(clean, noise, alpha, sigma),
            weight=self.weighting(alpha, sigma, det, fraction).flatten(),
            noise=noise,
            t=t,
            schedule=self.schedule,
            listeners=tuple(self._listeners),
            criterion=self.loss,
            threshold=self.loss.threshold(sigma / alpha, fraction),
            log_variance=None
            if self.log_variance is None
            else self.log_variance(alpha.flatten(), sigma.flatten()),
        )

    def _with_importance(
        self, noised: Noised, drawn: Resampled | None, step: int, index: Sequence[int]
    ) -> Noised:
        """Return the batch with importance weights, whose losses the history records."""
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
        if not bool(x0.isfinite().all()):
            bad = (~x0.isfinite().flatten(1).all(1)).nonzero().flatten().tolist()
            raise ValueError(
                f"x0 holds NaN or infinity in samples {bad}; look at the data or the encoder that "
                "made them"
            )

    def extra_repr(self) -> str:
        words = ("weighting", "timesteps", "noise", "seed", "loss")
        return f"{self.schedule}, " + ", ".join(f"{word}={getattr(self, word)}" for word in words)


def prediction_tensor(prediction: Any) -> Tensor:
    """Return the tensor of a network's output: itself, its ``.sample``, or the first of a tuple.

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


def _float32_inside(t: Tensor, curve: Curve) -> Tensor:
    """Return float64 times as float32 ones, which make no float64 batch, rounded into the curve's
    range.
    """
    exact, inward = (
        torch.tensor([curve.t_min, curve.t_max], dtype=torch.float64),
        torch.tensor([torch.inf, -torch.inf]),
    )
    ends = exact.float()
    outside = (ends.double() - exact) * inward < 0
    low, high = torch.where(outside, torch.nextafter(ends, inward), ends)
    return t.float().clamp(low, high)


def _process() -> tuple[int, int]:
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_rank(), torch.distributed.get_world_size()
    return 0, 1
