"""Common parts of every sampling run: device and dtype, noise, and the network call.

The table sampler and the standalone samplers take the same arguments and use this module.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Generator, Tensor, nn

from ..noising import NoiseSchedule
from ..noising.noising import prediction_tensor
from ..noising.utils.rng import Draws, Stream, whole_seed
from ..noising.utils.validation import require_same_shape, whole_number
from .clipping import Change, clipped, resolve_clip
from .guidance import Network, Unguided, guided_network
from .kernel import Beside, Evaluate, is_plain
from .knots import Knot
from .tracing import Unclipped, Unconditional

T = TypeVar("T")
_DRAWN_AT_ONCE = 16384
"""Numbers of noise that are drawn at once, if they are for several steps."""


@dataclass(frozen=True)
class Run:
    """One run: start ``x``, ``evaluate(x, knot)`` and the noise source.

    Args:
        x: The state at the first knot.
        evaluate: ``evaluate(x, knot)`` returns the guided, clipped output.
        noise: ``noise()`` returns standard normal noise.
        beside: Other results of the last evaluation, as ``kernel.perform`` takes them: its
            unconditional half, if there is one, and its value before clipping.
        input_dtype: Of the network's input, if it is only cast to it: not clipped.
        head: ``head(k)`` returns the k-th part of the channels of the last output, for networks
            with more outputs than their prediction.
    """

    x: Tensor
    evaluate: Evaluate
    noise: SeededNoise
    beside: Beside = field(default_factory=dict)
    head: Callable[[int], Tensor] | None = None
    input_dtype: torch.dtype | None = None


def prepare_run(
    schedule: NoiseSchedule,
    first: Knot,
    network: Network,
    shape_or_noise: Sequence[int] | Tensor,
    *,
    scale: float | None = None,
    times: Times | None = None,
    draws: int = 0,
    integer_timesteps: bool = False,
    output_multiple: int = 1,
    halves: bool = False,
    seeds: int | Sequence[int] | SeededNoise | None = None,
    conditioning: Mapping[str, Any] | None = None,
    unconditional: Mapping[str, Any] | None = None,
    guidance_scale: float = 1.0,
    guidance_rescale: float = 0.0,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    clip: float | Change | None = None,
) -> Run:
    """Return the run that starts at ``first``.

    The start noise is multiplied by ``scale``, by default sqrt(α² + σ²) at ``first``. The arguments
    from ``seeds`` on are common to the calls of all samplers; see ``Sampler.iterate``.

    Args:
        times: The times of all calls of the network, in their order, if they are known.
        draws: The draws of noise after the start, as far as they are known.
        integer_timesteps: Give the network integer timesteps.
        output_multiple: The output has this many times the channels of the input; the first part is
            the prediction.
        halves: The unconditional half is used without guidance too.

    Raises:
        ValueError: The shape is invalid.

    >>> run = prepare_run(
    ...     NoiseSchedule.flow(), Knot(1000.0, 0.0, 1.0), lambda x, t: -x, (2, 3), seeds=0
    ... )
    >>> run.evaluate(run.x, Knot(1000.0, 0.0, 1.0)).shape
    torch.Size([2, 3])
    """
    shape = checked_shape(shape_or_noise)
    device, dtype = place(network, shape_or_noise, device, dtype)
    drawn = draws if isinstance(shape_or_noise, Tensor) else 1 + draws
    if isinstance(seeds, SeededNoise):
        noise = seeds
    else:
        noise = SeededNoise(shape, checked_seeds(seeds), device, drawn)
    outputs = _Outputs(network, output_multiple) if output_multiple > 1 else None
    guided = guided_network(
        network if outputs is None else outputs,
        conditioning or {},
        unconditional,
        guidance_scale,
        guidance_rescale,
        shape[0],
        halves,
    )
    start = shape_or_noise.detach() if isinstance(shape_or_noise, Tensor) else noise()
    spread = (first.alpha**2 + first.sigma**2) ** 0.5 if scale is None else scale
    # a copy: the caller's noise stays as it is
    x = start.to(device, torch.promote_types(start.dtype, torch.float32), copy=True)
    if spread != 1.0:
        x *= spread
    time_dtype = torch.int64 if integer_timesteps else torch.promote_types(x.dtype, torch.float32)

    dtype = x.dtype if dtype is None else dtype
    call = guided.call if isinstance(guided, Unguided) else guided
    expected, rows, cast = x.shape, guided.rows, x.dtype != dtype
    plain = is_plain(x)
    ready = iter(
        zip(times.timesteps, times.tensors(rows, time_dtype, device), strict=True)
        if times is not None and plain
        else ()
    )

    def evaluate(x: Tensor, knot: Knot) -> Tensor:
        time, t = next(ready, (None, None))
        if t is None or time != knot.timestep or t._version:  # a network has changed it
            t = torch.full((rows,), knot.timestep, dtype=time_dtype, device=device)
        try:
            version = x._version if watched else None
        except RuntimeError:  # made in the inference mode
            version = None
        out = call(x.to(dtype) if cast else x, t)
        if version is not None and x._version != version:
            raise ValueError(
                "the network changes its input in place, which is the state of the sampler; let "
                "it change a copy, x.clone()"
            )
        if type(out) is not Tensor:
            out = prediction_tensor(out)
        # another shape would broadcast silently
        if out.shape != expected:
            require_same_shape("the network's output", out, "its input", x)
        return out

    kept, watched = Kept(evaluate), plain and not x.is_inference()
    return Run(
        x,
        evaluate if clip is None else clipped(kept, schedule.prediction, resolve_clip(clip)),
        noise,
        {Unconditional: lambda: guided.unconditional, Unclipped: lambda: kept.last},
        None if outputs is None else lambda k: outputs.parts[k][: shape[0]],  # conditional half
        dtype if clip is None else None,
    )


class Times:
    """The network's time inputs of all evaluations of a table, kept for the next run.

    A tensor that a network changes in place has a version other than 0, and is not used again. What
    it writes past autograd (``t.data``, ``t.numpy()``) is undone at the start of the next run.

    >>> Times([999.0, 0.0]).tensors(2, torch.int64, torch.device("cpu"))
    (tensor([999, 999]), tensor([0, 0]))
    """

    def __init__(self, timesteps: Sequence[float]) -> None:
        self.timesteps = timesteps
        self._kept: _KeptTimes | None = None

    def tensors(self, rows: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, ...]:
        """Return the tensor of each evaluation, shape (rows,), made in one upload."""
        kind, kept = (rows, dtype, device), self._kept
        if kept is None or kept.kind != kind or kept.memory._version:
            numbers = [[time] * rows for time in self.timesteps]
            with torch.inference_mode(False):  # tensors of that mode have no version
                whole = torch.tensor(numbers, dtype=dtype, device=device)
                memory = whole.clone()
                kept = self._kept = _KeptTimes(kind, whole, memory, memory.data, memory.unbind())
        else:
            kept.alias.copy_(kept.whole)  # does not count as a change: other runs may read
        return kept.rows


class _KeptTimes(NamedTuple):
    """``whole`` is read by nobody else; ``alias`` is ``memory`` with a version of its own."""

    kind: Any
    whole: Tensor
    memory: Tensor
    alias: Tensor
    rows: tuple[Tensor, ...]


class Kept:
    """An evaluation that keeps its last result.

    >>> kept = Kept(lambda x, knot: 2 * x)
    >>> kept(torch.ones(1), Knot(0, 0.6, 0.8)), kept.last
    (tensor([2.]), tensor([2.]))
    """

    def __init__(self, evaluate: Evaluate) -> None:
        self.evaluate = evaluate
        self.last: Tensor | None = None

    def __call__(self, x: Tensor, knot: Knot) -> Tensor:
        self.last = self.evaluate(x, knot)
        return self.last


class _Outputs:
    """A network that keeps its last output, split along the channels.

    A call returns the first part.
    """

    def __init__(self, network: Network, output_multiple: int) -> None:
        self.network, self.output_multiple = network, output_multiple
        self.parts: tuple[Tensor, ...] = ()

    def __call__(self, x: Tensor, t: Tensor, **conditioning: Any) -> Tensor:
        out = prediction_tensor(self.network(x, t, **conditioning))
        if self.output_multiple > 1 and (
            out.ndim < 2 or out.shape[1] != self.output_multiple * x.shape[1]
        ):
            raise ValueError(
                f"the network's output must have {self.output_multiple} times the {x.shape[1]} "
                "channels of its input, "
                f"got shape {tuple(out.shape)}"
            )
        self.parts = out.chunk(self.output_multiple, 1) if self.output_multiple > 1 else (out,)
        return self.parts[0]


class SeededNoise:
    """Standard normal noise with a seed of all 64 bits for each image; each call is a new draw.

    Args:
        seeds: One for each image; or one int, counted up modulo 2^64; or None for fresh seeds.
        draws: The draws of a run, as far as they are known. It does not change the numbers.

    Raises:
        ValueError: The number of seeds is wrong, or a seed has more than 64 bits.
        TypeError: A seed is not an integer.

    >>> torch.equal(
    ...     SeededNoise((2, 3), [5, 6], torch.device("cpu"))()[1],
    ...     SeededNoise((1, 3), 6, torch.device("cpu"))()[0],
    ... )
    True
    """

    def __init__(
        self,
        shape: tuple[int, ...],
        seeds: int | Sequence[int] | None,
        device: torch.device,
        draws: int = 0,
    ) -> None:
        self.seeds = _one_for_each(shape[0], seeds)
        self.shape, self.device, self.drawn, self.draws = shape, device, 0, draws
        self._first, self._ahead = 0, ()

    @cached_property
    def _draws(self) -> Draws:
        # index 0 for all: the noise depends on the seed, not on the position in the batch
        return Draws(
            self.seeds,
            [0] * self.shape[0],
            step=0,
            stream=Stream.SAMPLING_NOISE,
            device=self.device,
        )

    def __call__(self) -> Tensor:
        place = self.drawn - self._first
        if not 0 <= place < len(self._ahead):
            self._first, place = self.drawn, 0
            self._ahead = self._draw()
        self.drawn += 1
        return self._ahead[place]

    def _draw(self) -> Sequence[Tensor]:
        """Return the next draws: as many of a run's as are small together, made at once."""
        draws, sizes = self._draws.of(Stream.SAMPLING_NOISE, step=self.drawn), self.shape[1:]
        steps = min(self.draws - self.drawn, _DRAWN_AT_ONCE // math.prod(self.shape))
        if steps > 1 and draws.has_loops:
            return draws.normal_steps(steps, *sizes).unbind()
        return (draws.normal(*sizes),)

    def restart(self, seeds: int | Sequence[int] | None) -> None:
        """Begin again at the first draw, with new seeds in the memory of the old ones.

        >>> noise = SeededNoise((1, 3), 5, torch.device("cpu"))
        >>> first = noise()
        >>> noise.restart(5)
        >>> torch.equal(noise(), first)
        True
        """
        self.seeds = _one_for_each(self.shape[0], checked_seeds(seeds))
        self.rewind()
        self._draws.reseed(self.seeds)

    def rewind(self) -> None:
        """Begin again at the first draw."""
        self.drawn, self._first, self._ahead = 0, 0, ()

    @property
    def on_device(self) -> bool:
        """Whether the draws are made on the device from keys in its memory."""
        return self._draws.has_one_pass

    def uniform(self, *shape: int) -> Tensor:
        """Return numbers in [0, 1), shape (batch, *shape)."""
        self.drawn += 1
        return self._draws.of(Stream.SAMPLING_UNIFORM, step=self.drawn - 1).uniform(*shape)


def _one_for_each(batch: int, seeds: int | Sequence[int] | None) -> list[int]:
    if seeds is None:
        return [Generator().seed() for _ in range(batch)]
    try:
        count = len(seeds)  # type: ignore[arg-type]
    except TypeError:  # one number, also of numpy and of torch
        first = whole_seed(seeds)
        return [(first + k) % 2**64 for k in range(batch)]
    if count != batch:
        raise ValueError(f"need one seed for each of {batch} images, got {count}")
    return [whole_seed(seed) % 2**64 for seed in seeds]  # type: ignore[union-attr]


def checked_shape(shape_or_noise: Sequence[int] | Tensor) -> tuple[int, ...]:
    """Return the shape (batch, ...), or raise ValueError if it is invalid.

    >>> checked_shape([2, 3])
    (2, 3)
    """
    shape = tuple(shape_or_noise.shape if isinstance(shape_or_noise, Tensor) else shape_or_noise)
    try:
        sizes = tuple(whole_number("a size", n) for n in shape)
    except ValueError:
        sizes = ()
    if len(sizes) < 2 or min(sizes) < 1:
        raise ValueError(f"the shape must be (batch, ...) of positive integers, got {shape}")
    return sizes


def checked_seeds(seeds: Any) -> int | list[int] | None:
    """Return seeds as an int, a list of ints or None; raise ValueError if one is not an integer.

    >>> checked_seeds(torch.tensor([3, 4]))
    [3, 4]
    """
    if seeds is None:
        return None
    if isinstance(seeds, Tensor) or hasattr(seeds, "tolist"):
        seeds = seeds.tolist()
    if isinstance(seeds, Iterable) and not isinstance(seeds, str | bytes):
        return [whole_number(f"seeds[{i}]", seed) for i, seed in enumerate(seeds)]
    return whole_number("seeds", seeds)


def place(
    network: Network, start: Any, device: torch.device | str | None, dtype: torch.dtype | None
) -> tuple[torch.device, torch.dtype | None]:
    """Return the device and dtype of the network's input.

    The order is: explicit values, then those of the network's parameters, then the device of
    ``start``.

    >>> place(nn.Linear(2, 2).double(), (1, 2), None, None)
    (device(type='cpu'), torch.float64)
    """
    parameters = network.parameters() if isinstance(network, nn.Module) else ()
    parameter = next((p for p in parameters if p.is_floating_point()), None)
    if device is None:
        device = (
            parameter.device
            if parameter is not None
            else start.device
            if isinstance(start, Tensor)
            else "cpu"
        )
    if dtype is None and parameter is not None:
        dtype = parameter.dtype
    return torch.device(device), dtype


def without_gradients(steps: Iterator[T]) -> Iterator[T]:
    """Yield from ``steps``, which runs without gradients.

    The no-grad mode is entered for each step separately. So a generator that is not finished does
    not leave its caller without gradients.

    >>> list(without_gradients(iter([torch.is_grad_enabled()])))
    [True]
    """
    end = object()
    while True:
        with torch.no_grad():
            progress = next(steps, end)
        if progress is end:
            return
        yield progress  # type: ignore[misc]


def last(steps: Iterator[T]) -> T:
    """Return the last of ``steps``, which has at least one item.

    >>> last(iter("abc"))
    'c'
    """
    step = next(steps)
    for step in steps:  # noqa: B007
        pass
    return step
