"""Noising: from a batch of clean samples to what a network is trained on.

noised = noising(x0, step=step)
loss = noised.loss(network(noised.x, noised.timesteps))
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .counter import seeded
from .curves import Curve
from .importance import Resampled
from .losses import L2, Loss, Over, mean_of_samples, resolve_loss
from .noise import resolve_noise
from .noise_base import Chain, Noise, apply_kinds
from .schedule import NoiseSchedule
from .shapes import require_same_shape
from .timesteps import resolve_timesteps
from .timesteps_base import Timesteps
from .weighting import Weighting, resolve_weighting

_SAMPLE, _STRATA = 0, 1  # the streams that a seed is split into


@dataclass(frozen=True)
class Noised:
    """A noised batch: what the network sees, what it should answer, and how much each sample counts.

    ``x``: x_t, shape (batch, ...), dtype of the clean batch. ``timesteps``: what the network is given as time, shape
    (batch,), int64 on discrete schedules. ``target``, ``noise`` (the one that the target is made of): shape of ``x``, float32
    or better. ``weight`` (importance weights of the times included), ``t``, ``log_snr``: shape (batch,). ``criterion``: the kind
    of loss, ``threshold``: its threshold, or None, shape (batch, 1, ...). ``log_variance``: the learned u of the loss
    weight / e^u · error + u, shape (batch,), or None.

    >>> noised = Noising(NoiseSchedule.flow())(torch.zeros(2, 3, 4, 4), step=0)
    >>> noised.loss(noised.target).item()
    0.0
    """

    x: Tensor
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

        ``prediction`` is the network's output, or an object that holds it as ``.sample``, as diffusers' models return.
        ``mask`` in [0, 1], e.g. of shape (batch, 1, height, width), says what counts; ``over="all"`` divides by the number of all
        elements, as sd-scripts does, ``over="mask"`` by the masked area. An empty mask gives 0.
        Raises ValueError where a shape is not the target's, or does not broadcast to it.

        >>> noised = Noising(NoiseSchedule.flow(), loss="l1")(torch.zeros(1, 2, 4, 4), step=0)
        >>> mask = torch.zeros(1, 1, 4, 4)
        >>> mask[..., :1] = 1.0
        >>> noised.losses(noised.target + 2, mask).item(), noised.losses(noised.target + 2, mask, over="mask").item()
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
        counted = (self.weight > 0).to(error.dtype)  # what does not count, or is masked, must not teach u
        counted = counted if covered is None else counted * covered
        return self.weight * torch.exp(-self.log_variance) * error + counted * self.log_variance

    def loss(self, prediction: Any, mask: Tensor | None = None, over: Over = "all") -> Tensor:
        """Return the mean of :meth:`losses`, a scalar to call ``backward`` on."""
        return self.losses(prediction, mask, over).mean()


class Drawn(NamedTuple):
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

    ``weighting``, ``timesteps``, ``noise`` and ``loss`` are names of their registries or objects; ``noise`` also a sequence of
    them. It is a module so that what is learned or measured (weights, loss history) travels with the checkpoint; it has no
    parameters unless a scheme has. Raises ValueError for unknown names and for times that do not fit the schedule; warns where
    the weight of a zero-SNR terminal step is 0.

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
                f"schedule must be a NoiseSchedule, got {type(schedule).__name__}; e.g. NoiseSchedule.scaled_linear()"
            )
        self.schedule = schedule
        self.weighting = resolve_weighting(weighting)
        self.log_variance = self.weighting.log_variance()
        self.loss = resolve_loss(loss)
        self.timesteps = resolve_timesteps(timesteps)
        self.timesteps.check(schedule.curve)
        self.loss_history = self.timesteps.history()
        self.noise = resolve_noise(noise)
        self.seed = int(seed)
        self._looked_at_gpu_batch = False
        self._listeners: list[Callable[[Noised, Tensor], None]] = []
        self._warn_of_dead_terminal_step()

    def __call__(self, *args: Any, **kwargs: Any) -> Noised:  # so that type checkers know what forward returns
        return super().__call__(*args, **kwargs)

    def forward(
        self,
        x0: Tensor,
        *,
        step: int,
        micro_batch: int = 0,
        accumulate: int = 1,
        rank: int | None = None,
        world_size: int | None = None,
        timesteps: Tensor | None = None,
        noise: Tensor | None = None,
    ) -> Noised:
        """Return the noised batch of this process at this optimizer step.

        ``x0``: floating point, shape (batch, ...). ``step`` counts optimizer steps; ``micro_batch`` counts the batches
        accumulated into one, of ``accumulate``. ``rank`` and ``world_size`` default to torch.distributed's. Sample k here has
        the global index (micro_batch · batch + k) · world_size + rank, the place that a DistributedSampler takes it from.
        ``timesteps`` (times of the curve, shape (batch,)) and ``noise`` (shape of x0) replace what would be drawn, and then
        neither importance weights nor kinds of noise act on them.
        Raises ValueError for integer, empty, mis-shaped or non-finite x0 (on a GPU the values of the first batch are
        checked, later ones would cost a host sync each), and for times outside the schedule.
        """
        self._check(x0)
        process_rank, process_count = _process()
        rank = process_rank if rank is None else rank
        world_size = process_count if world_size is None else world_size
        if not 0 <= rank < world_size or not 0 <= micro_batch < accumulate:
            raise ValueError(
                f"need 0 <= rank < world_size and 0 <= micro_batch < accumulate, got rank {rank} of {world_size} and "
                f"micro_batch {micro_batch} of {accumulate}; give the numbers of the whole optimizer step"
            )
        batch = x0.shape[0]
        index = [(micro_batch * batch + k) * world_size + rank for k in range(batch)]
        if self.loss_history is not None and self.training:
            self.loss_history.settle(step)
        drawn = self.draw(
            index, tuple(x0.shape[1:]), step=step, total=batch * world_size * accumulate, pin_memory=x0.is_cuda
        )
        if noise is not None:
            require_same_shape("noise", noise, "x0", x0)
            drawn = drawn._replace(noise=noise, parts=())
        if timesteps is not None:
            drawn = drawn._replace(t=timesteps, importance=None)
        noised = self.at(x0, drawn.t, drawn.noise, drawn.parts)
        return self._with_importance(noised, drawn.importance, step, index)

    def listen(self, listener: Callable[[Noised, Tensor], None]) -> Callable[[], None]:
        """Call ``listener(noised, errors)`` whenever a loss is computed; return the function that ends it.

        ``errors``: the unweighted error of each sample, shape (batch,), detached, on the device of the loss. Listeners do not
        travel with copies, pickles or checkpoints.

        >>> seen = []
        >>> noising = Noising(NoiseSchedule.flow())
        >>> stop = noising.listen(lambda noised, errors: seen.append(errors.tolist()))
        >>> noised = noising(torch.zeros(2, 3), step=0)
        >>> loss = noised.loss(noised.target)
        >>> stop()
        >>> seen
        [[0.0, 0.0]]
        """
        self._listeners.append(listener)
        return lambda: self._listeners.remove(listener)

    def __getstate__(self) -> dict[str, Any]:
        # a copy (an EMA's, say) must not report to those who listen here, nor copy them with it
        return self.__dict__ | {"_listeners": []}

    def draw(
        self, index: Sequence[int], shape: tuple[int, ...], *, step: int, total: int, pin_memory: bool = False
    ) -> Drawn:
        """Return times and noise of the samples with these global indices at this step, on the CPU.

        ``total`` is the number of samples in the whole optimizer step, over which stratified times are spread.
        ``pin_memory`` puts the noise where a copy to the GPU does not make the host wait.

        >>> drawn = Noising(NoiseSchedule.flow(), noise="offset", seed=1).draw([5, 6], (3, 2), step=2, total=8)
        >>> drawn.t.shape, drawn.noise.shape, [part.shape for part in drawn.parts]
        (torch.Size([2]), torch.Size([2, 3, 2]), [torch.Size([2, 3, 1])])
        """
        generator = torch.Generator()
        u = torch.empty(len(index), dtype=torch.float64)
        noise = torch.empty((len(index), *shape), pin_memory=pin_memory)
        parts: list[list[Tensor]] = []
        for k, i in enumerate(index):
            seeded(generator, self.seed, _SAMPLE, step, i)
            u[k : k + 1].uniform_(generator=generator)
            torch.randn(shape, generator=generator, out=noise[k])
            parts.append([kind.draw(shape, generator, step) for kind in self.noise.kinds])
        stacked = tuple(torch.stack(of_kind) for of_kind in zip(*parts, strict=True))
        strata = None
        if self.timesteps.stratified:
            strata = torch.randperm(total, generator=seeded(generator, self.seed, _STRATA, step))
        # 1 - u lies in (0, 1]: pure noise can be drawn, a clean sample cannot
        u = self.timesteps.spread(1 - u, torch.tensor(index), strata)
        importance = self.loss_history.resample(u) if self.loss_history is not None else None
        t = self.timesteps.times(u if importance is None else importance.u, self.schedule.curve)
        return Drawn(
            _float32_inside(t, self.schedule.curve) if t.is_floating_point() else t,
            noise,
            tuple(part.pin_memory() if pin_memory else part for part in stacked),
            importance,
        )

    def at(self, x0: Tensor, t: Tensor, noise: Tensor, parts: Sequence[Tensor] = ()) -> Noised:
        """Return the noised batch for given times of the curve, shape (batch,), and noise, shape of x0.

        ``parts``: what the kinds of noise drew for the batch; without them ``noise`` is taken as it is.
        """
        curve, prediction = self.schedule.curve, self.schedule.prediction
        if t.shape != x0.shape[:1]:
            raise ValueError(f"timesteps must have shape ({x0.shape[0]},), one for each sample, got {tuple(t.shape)}")
        if t.is_floating_point() and curve.is_discrete and t.dtype not in (torch.float32, torch.float64):
            raise ValueError(
                f"timesteps of dtype {t.dtype} cannot hold the integers up to {curve.t_max:g}; give int64 or float32"
            )
        alpha, sigma = self.schedule.levels(t, x0)
        clean, noise = x0.to(alpha.dtype), noise.to(x0.device, alpha.dtype, non_blocking=True)
        kinds = self.noise.kinds if parts else ()
        on_device = [part.to(x0.device, alpha.dtype, non_blocking=True) for part in parts]
        noise, perturbed = apply_kinds(kinds, noise, on_device, clean)
        det = prediction.determinant(alpha, sigma)
        t = t.to(x0.device)
        time = curve.timestep(t)
        fraction = curve.fraction(t.to(alpha.dtype)).view_as(alpha)
        return Noised(
            x=(alpha * clean + sigma * perturbed).to(x0.dtype),
            timesteps=time.float() if time.is_floating_point() else time.long(),
            target=prediction.combine(clean, noise, alpha, sigma),
            weight=self.weighting(alpha, sigma, det, fraction).flatten(),
            noise=noise,
            t=t,
            schedule=self.schedule,
            listeners=tuple(self._listeners),
            criterion=self.loss,
            threshold=self.loss.threshold(sigma / alpha, fraction),
            log_variance=None if self.log_variance is None else self.log_variance(alpha.flatten(), sigma.flatten()),
        )

    def _with_importance(self, noised: Noised, drawn: Resampled | None, step: int, index: Sequence[int]) -> Noised:
        """Return the batch with importance weights, whose losses the history hears."""
        if drawn is None or self.loss_history is None:
            return noised
        hear = partial(self.loss_history.hear, step, torch.tensor(index), drawn)
        weight = noised.weight * drawn.weight.to(noised.weight.device, noised.weight.dtype, non_blocking=True)
        return replace(noised, weight=weight, listeners=(*noised.listeners, hear))

    def _check(self, x0: Tensor) -> None:
        if not isinstance(x0, Tensor) or not x0.is_floating_point():
            got = x0.dtype if isinstance(x0, Tensor) else type(x0).__name__
            raise ValueError(
                f"x0 must be a floating point tensor, got {got}; scale images to [-1, 1], e.g. images / 127.5 - 1"
            )
        if x0.ndim < 2 or not x0.numel():
            raise ValueError(f"x0 must have shape (batch, ...) and hold something, got {tuple(x0.shape)}")
        if x0.device.type != "cpu":
            if self._looked_at_gpu_batch or torch.compiler.is_compiling():
                return
            self._looked_at_gpu_batch = True
        if not bool(x0.isfinite().all()):
            bad = (~x0.isfinite().flatten(1).all(1)).nonzero().flatten().tolist()
            raise ValueError(
                f"x0 holds NaN or infinity in samples {bad}; look at the data or the encoder that made them"
            )

    def _warn_of_dead_terminal_step(self) -> None:
        curve = self.schedule.curve
        end = torch.tensor([curve.t_max], dtype=torch.float64)
        alpha, sigma = curve.alpha(end), curve.sigma(end)
        weight = self.weighting(alpha, sigma, self.schedule.prediction.determinant(alpha, sigma), curve.fraction(end))
        if float(weight) == 0.0:
            why = ", where SNR is 0" if float(alpha) == 0.0 else ""
            warnings.warn(
                f"weighting {self.weighting.name!r} is 0 at t = {curve.t_max:g}{why}: the step that sampling starts from "
                "gets no gradient; give it a floor (e.g. floor=0.05), or use weighting='uniform'",
                stacklevel=3,
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
        f"the network must return a tensor or an object with a tensor .sample, got {type(prediction).__name__}"
    )


def _float32_inside(t: Tensor, curve: Curve) -> Tensor:
    """Return float64 times as float32 ones, which make no float64 batch, rounded into the curve's range."""
    low, high = torch.tensor([curve.t_min, curve.t_max], dtype=torch.float64), torch.tensor([torch.inf, -torch.inf])
    ends = low.float()
    outside = torch.stack([ends[0].double() < low[0], ends[1].double() > low[1]])
    ends = torch.where(outside, torch.nextafter(ends, high), ends)
    return t.float().clamp(float(ends[0]), float(ends[1]))


def _process() -> tuple[int, int]:
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_rank(), torch.distributed.get_world_size()
    return 0, 1
