"""What every run of a network shares: where it happens, how its noise is drawn, and how the network
is called.

The table sampler and the samplers that are no tables take the same arguments and begin here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Generator, Tensor, nn

from ..noising import NoiseSchedule
from ..noising.noising import prediction_tensor
from ..noising.utils.rng import Draws, Stream, whole_seed
from ..noising.utils.validation import require_same_shape, whole_number
from .clipping import Change, clipped, resolve_clip
from .guidance import Network, guided_network
from .kernel import Beside, Evaluate
from .knots import Knot
from .tracing import Unclipped, Unconditional

T = TypeVar("T")


@dataclass(frozen=True)
class Run:
    """One run: ``x`` at the first knot, ``evaluate(x, knot)`` -> the guided, clipped output,
    ``noise()`` -> standard normal.

    ``beside``: what the last evaluation left besides, as ``kernel.perform`` takes it: its
    unconditional half where there is one, and what it was before clipping. ``head(k)`` returns the
    k-th part of the channels of the last output, for networks that put out more than their
    prediction.
    """

    x: Tensor
    evaluate: Evaluate
    noise: SeededNoise
    beside: Beside = field(default_factory=dict)
    head: Callable[[int], Tensor] | None = None


def prepare_run(
    schedule: NoiseSchedule,
    first: Knot,
    network: Network,
    shape_or_noise: Sequence[int] | Tensor,
    *,
    scale: float | None = None,
    integer_timesteps: bool = False,
    output_multiple: int = 1,
    halves: bool = False,
    seeds: int | Sequence[int] | None = None,
    conditioning: Mapping[str, Any] | None = None,
    unconditional: Mapping[str, Any] | None = None,
    guidance_scale: float = 1.0,
    guidance_rescale: float = 0.0,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    clip: float | Change | None = None,
) -> Run:
    """Return the run that starts at ``first``, the noise times ``scale`` (sqrt(α² + σ²) there).
    Raises ValueError for a bad shape.

    From ``seeds`` on these are the arguments that every sampler's call takes; ``Sampler.iterate``
    says what they mean. ``integer_timesteps``: the network is given integers as time.
    ``output_multiple``: its output has so many times the channels of its input, of which the first
    are the prediction. ``halves``: the unconditional half is of use without guidance as well.

    >>> run = prepare_run(
    ...     NoiseSchedule.flow(), Knot(1000.0, 0.0, 1.0), lambda x, t: -x, (2, 3), seeds=0
    ... )
    >>> run.evaluate(run.x, Knot(1000.0, 0.0, 1.0)).shape
    torch.Size([2, 3])
    """
    shape = checked_shape(shape_or_noise)
    device, dtype = place(network, shape_or_noise, device, dtype)
    noise = SeededNoise(shape, checked_seeds(seeds), device)
    outputs = _Outputs(network, output_multiple)
    guided = guided_network(
        outputs,
        conditioning or {},
        unconditional,
        guidance_scale,
        guidance_rescale,
        shape[0],
        halves,
    )
    start = shape_or_noise.detach().to(device) if isinstance(shape_or_noise, Tensor) else noise()
    spread = (first.alpha**2 + first.sigma**2) ** 0.5 if scale is None else scale
    x = start.to(torch.promote_types(start.dtype, torch.float32)) * spread
    time_dtype = torch.int64 if integer_timesteps else torch.promote_types(x.dtype, torch.float32)

    def evaluate(x: Tensor, knot: Knot) -> Tensor:
        time = int(knot.timestep) if integer_timesteps else knot.timestep
        out = guided(
            x.to(dtype or x.dtype), torch.full(x.shape[:1], time, dtype=time_dtype, device=device)
        )
        # it would broadcast silently
        require_same_shape("the network's output", out, "its input", x)
        return out

    kept = Kept(evaluate)
    return Run(
        x,
        evaluate if clip is None else clipped(kept, schedule.prediction, resolve_clip(clip)),
        noise,
        {Unconditional: lambda: guided.unconditional, Unclipped: lambda: kept.last},
        lambda k: outputs.parts[k][: shape[0]],  # of the conditional half
    )


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
    """A network that keeps its last output, split along the channels; a call returns the first
    part.
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
    """Standard normal noise in which every image has a seed of its own, all 64 bits of it; each
    call is another draw.

    ``seeds``: one for each image, or one that is counted up, modulo 2^64; none: fresh ones.
    ValueError for another number of them or more than 64 bits, TypeError for what is no integer.

    >>> torch.equal(
    ...     SeededNoise((2, 3), [5, 6], torch.device("cpu"))()[1],
    ...     SeededNoise((1, 3), 6, torch.device("cpu"))()[0],
    ... )
    True
    """

    def __init__(
        self, shape: tuple[int, ...], seeds: int | Sequence[int] | None, device: torch.device
    ) -> None:
        self.seeds = _one_for_each(shape[0], seeds)
        self.shape, self.device, self.drawn = shape, device, 0

    def __call__(self) -> Tensor:
        return self._next(Stream.SAMPLING_NOISE).normal(*self.shape[1:])

    def uniform(self, *shape: int) -> Tensor:
        """Return numbers in [0, 1), shape (batch, *shape)."""
        return self._next(Stream.SAMPLING_UNIFORM).uniform(*shape)

    def _next(self, stream: Stream) -> Draws:
        # an image is told from others by its seed, not by its place in the batch
        draws = Draws(
            self.seeds, [0] * len(self.seeds), step=self.drawn, stream=stream, device=self.device
        )
        self.drawn += 1
        return draws


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
    """Return the shape (batch, ...), or raise ValueError where it is none.

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
    """Return seeds as an int, a list of them or None, or raise ValueError where one is no integer.

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
    """Return the device and dtype of the network's input: as given, else those of its parameters,
    else the start's device.

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
    """Yield from ``steps``, which runs without gradients; the mode is entered anew for each step,
    so that a generator that is left halfway does not leave its caller without gradients.

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
    """Return the last of ``steps``, of which there is at least one.

    >>> last(iter("abc"))
    'c'
    """
    step = next(steps)
    for step in steps:  # noqa: B007
        pass
    return step
