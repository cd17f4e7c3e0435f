"""Run the table of a sampler with a time for each chunk, in the order of a sampling matrix."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from ...noising import NoiseSchedule
from ...noising.axes import Axis, require_chunks
from ...noising.timesteps.base import require_time
from ...noising.utils.registry import lookup
from ...noising.utils.validation import require_same_shape, whole_number
from ..clipping import Change, resolve_clip
from ..guidance import Network, guided_network
from ..inference import SeededNoise, checked_seeds, checked_shape, last, place, without_gradients
from ..kernel import Progress, combine
from ..knots import Knot, knots_at
from ..sampler import NOISE_SOURCES, Sampler
from ..table import Table
from ..tracing import Draw, Evaluation, Operation, Row, Step, Unclipped, Unconditional
from .matrices import SamplingMatrix, resolve_matrix


@dataclass(frozen=True, eq=False)
class RollingSampler:
    """Draw samples of which each chunk (frame, token) has its own noise level on the way.

    It runs the table of ``sampler`` unchanged, each chunk through all of its steps. The network is
    called with times of shape (batch, chunks). Chunks that are finished, or ``known``, are given to
    it as clean ones, at ``context_time``. With the matrix 'full' the samples are those of
    ``sampler``; with an exact denoiser, every matrix draws from the same distribution as steps
    grow. It is called like a ``Sampler``, and previews take it in place of one.

    Args:
        sampler: a Sampler; any method that has a table.
        matrix: a name of ``MATRICES`` ('full', 'pyramid', 'pyramid:lag=4', 'autoregressive'), a
            function of (chunks, steps), or the entries, see :func:`resolve_matrix`.
        chunks: number of chunks, which divides the axis.
        axis: the axis of x that the chunks lie along, or its name in ``AXES``.
        context_time: time of the curve that finished chunks are shown at, by default the least. A
            little more than that keeps long roll-outs stable (Chen et al. 2407.01392, §3.3); as
            there, a chunk is scaled by α and gets no noise.

    Raises:
        TypeError: ``sampler`` is not a Sampler.
        ValueError: the matrix does not fit the chunks and the steps of the sampler.

    >>> sampler = Sampler(NoiseSchedule.flow(), "euler", steps=4)
    >>> rolling = RollingSampler(sampler, "pyramid:lag=2", chunks=3)
    >>> rolling.steps
    8
    >>> frames = torch.zeros(2, 1, 1, 8, 8)  # the first one of three is known
    >>> video = rolling(lambda x, t: -x, (2, 1, 3, 8, 8), seeds=0, known=frames)
    >>> video.shape, torch.equal(video[:, :, :1], frames)
    (torch.Size([2, 1, 3, 8, 8]), True)
    """

    sampler: Sampler
    matrix: str | SamplingMatrix | Callable[..., Any] = "pyramid"
    chunks: int = field(kw_only=True)
    axis: Axis = field(default="frames", kw_only=True)
    context_time: float | None = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        if not isinstance(self.sampler, Sampler):
            raise TypeError(
                f"a rolling sampler runs the table of a Sampler, got {type(self.sampler).__name__}"
            )
        whole_number("chunks", self.chunks, least=1)
        rows = self.rows(self.chunks)
        if not isinstance(self.matrix, str) and not callable(self.matrix):
            object.__setattr__(self, "matrix", rows)
        if self.context_time is not None:
            require_time("context_time", self.context_time, self.schedule.curve)

    @property
    def schedule(self) -> NoiseSchedule:
        """The schedule of the sampler."""
        return self.sampler.schedule

    @property
    def name(self) -> str:
        """The name of the sampler's method."""
        return self.sampler.name

    @property
    def steps(self) -> int:
        """The number of rows that are run, if no chunk is known."""
        return len(self.rows(self.chunks)) - 1

    def rows(self, chunks: int) -> SamplingMatrix:
        """Return the sampling matrix of this number of chunks, the last ones of given entries.

        >>> sampler = Sampler(NoiseSchedule.flow(), "euler", steps=2)
        >>> RollingSampler(sampler, "autoregressive", chunks=2).rows(2)
        ((0, 0), (1, 0), (2, 0), (2, 1), (2, 2))
        """
        steps, matrix = len(self.sampler.table.steps), self.matrix
        if isinstance(matrix, tuple) and chunks < self.chunks:
            columns = [row[self.chunks - chunks :] for row in matrix]
            matrix = (*(a for a, b in pairwise(columns) if a != b), columns[-1])
        return resolve_matrix(matrix, chunks, steps)

    def __call__(
        self, network: Network, shape_or_noise: Sequence[int] | Tensor, **arguments: Any
    ) -> Tensor:
        """Return samples, shape (batch, ...), float32 or better.

        Arguments as in :meth:`iterate`.
        """
        return last(self.iterate(network, shape_or_noise, **arguments)).x

    def iterate(
        self,
        network: Network,
        shape_or_noise: Sequence[int] | Tensor,
        *,
        known: Tensor | None = None,
        seeds: int | Sequence[int] | None = None,
        conditioning: Mapping[str, Any] | None = None,
        unconditional: Mapping[str, Any] | None = None,
        guidance_scale: float = 1.0,
        guidance_rescale: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        clip: float | Change | None = None,
        noise: str = "independent",
    ) -> Iterator[Progress]:
        """Sample row by row. Arguments as in ``Sampler.iterate``, and ``known``.

        Args:
            network: ``network(x, timesteps, **conditioning)`` with timesteps of shape (batch,
                chunks).
            shape_or_noise: The shape (batch, ...), or standard normal noise to start from.
            known: The clean start of the axis, whole chunks of it, for all samples or with a row
                for each: conditioning frames. The samples begin with it. The matrix is that of the
                other chunks.
            seeds: As in ``Sampler.iterate``; so are ``conditioning``, ``unconditional``,
                ``guidance_scale``, ``guidance_rescale``, ``device``, ``dtype``, ``clip`` and
                ``noise``. Noise depends on the seed, the number of the
                draw in the table and the element, not on the matrix.

        Raises:
            ValueError: The axis does not divide into the chunks, or ``known`` does not fit.
        """
        self.sampler._require_guidance(guidance_scale, guidance_rescale)
        shape = checked_shape(shape_or_noise)
        axis = require_chunks(self.chunks, self.axis, shape)
        given = _known_chunks(known, shape, axis, shape[axis] // self.chunks)
        device, dtype = place(network, shape_or_noise, device, dtype)
        seeded = SeededNoise(shape, checked_seeds(seeds), device)
        table = self.sampler.table
        ops = [op for step in table.steps for op in step.ops]
        guided = guided_network(
            network,
            conditioning or {},
            unconditional,
            guidance_scale,
            guidance_rescale,
            shape[0],
            any(isinstance(op, Unconditional) for op in ops),
        )
        drawn = not isinstance(shape_or_noise, Tensor)
        start = seeded() if drawn else shape_or_noise.detach().to(device)
        start = start.to(torch.promote_types(start.dtype, torch.float32))
        curve = self.schedule.curve
        context_time = curve.t_min if self.context_time is None else float(self.context_time)
        context = knots_at(self.schedule, [context_time])[0]
        times = [op.knot.timestep for op in ops if isinstance(op, Evaluation)]
        integer = curve.is_discrete and all(t.is_integer() for t in [*times, context.timestep])
        run = _Run(
            table,
            axis,
            context,
            guided,
            start.dtype if dtype is None else dtype,
            torch.int64 if integer else torch.promote_types(start.dtype, torch.float32),
            None if clip is None else resolve_clip(clip),
            seeded,
            lookup("noise", noise, NOISE_SOURCES)(seeded, self.sampler.knots),
            [
                _Chunk([part], number=int(drawn))
                for part in (start * self.sampler.init_noise_scale).chunk(self.chunks, axis)
            ],
        )
        for chunk, clean in zip(run.chunks, given, strict=False):
            chunk.state = [clean.to(device, start.dtype).expand_as(chunk.state[0])]
            chunk.taken = len(table.steps)
        return without_gradients(run.rows(self.rows(self.chunks - len(given)), len(given)))


@dataclass
class _Chunk:
    """One chunk of x: its state and memory, the steps it has taken, and the number of its draws."""

    state: list[Tensor]
    taken: int = 0
    number: int = 0
    row: Row = ()
    basis: Sequence[Tensor] = ()

    @property
    def denoised(self) -> Tensor:
        """The last estimate of the clean chunk; a known one itself, 0 before the first step."""
        if self.basis:
            return combine(self.row, self.basis)
        return self.state[0] if self.taken else torch.zeros_like(self.state[0])


Request = tuple[Operation, Tensor | None]
"""What the steps of a chunk wait for: an operation, and the network's input if it is a call."""


@dataclass
class _Run:
    """One run. Its chunks advance one step a row, and share each network call."""

    table: Table
    axis: int
    context: Knot
    guided: Any
    dtype: torch.dtype
    time_dtype: torch.dtype
    change: Change | None
    seeded: SeededNoise
    source: Callable[[float, float], Tensor]
    chunks: list[_Chunk]
    _draws: dict[tuple[int, Draw], Sequence[Tensor]] = field(default_factory=dict)

    def rows(self, matrix: SamplingMatrix, known: int) -> Iterator[Progress]:
        """Run the rows for the chunks after the known ones, and yield after each."""
        for i, (before, after) in enumerate(pairwise(matrix)):
            self._advance([known + j for j, taken in enumerate(before) if taken < after[j]])
            yield _Rolled(i + 1, len(matrix) - 1, self._joined(), self.chunks, self.axis)

    def _joined(self) -> Tensor:
        return torch.cat([chunk.state[0] for chunk in self.chunks], self.axis)

    def _advance(self, moving: Sequence[int]) -> None:
        """Take the next step of these chunks: each network call is for all that wait for one."""
        self._draws.clear()
        steps = {j: self._step(j, self.table.steps[self.chunks[j].taken]) for j in moving}
        waiting = {j: next(step) for j, step in steps.items()}
        while waiting:
            outputs = self._evaluate(waiting)
            waiting = {
                j: request
                for j in waiting
                if (request := _next_evaluation(steps[j], outputs, j)) is not None
            }

    def _step(self, j: int, step: Step) -> Generator[Request, Tensor, None]:
        """Take one step of a chunk, as the kernel does; yields what it needs of the network."""
        chunk = self.chunks[j]
        basis = list(chunk.state)
        for op in step.ops:
            if isinstance(op, Draw):
                new = self._draw(chunk.number, op)[j]
                chunk.number += 1
            else:
                given = combine(op.row, basis) if isinstance(op, Evaluation) else None
                new = yield op, given
            basis.append(new.to(basis[0].dtype))
        chunk.row, chunk.basis = step.denoised, basis
        chunk.state = [combine(row, basis) for row in step.carry]
        chunk.taken += 1

    def _draw(self, number: int, op: Draw) -> Sequence[Tensor]:
        """Return the draw of this number, by chunks: the same as in the run of a Sampler."""
        if (number, op) not in self._draws:
            self.seeded.drawn = number
            noise = self.source(op.start, op.end)
            self._draws[number, op] = noise.chunk(len(self.chunks), self.axis)
        return self._draws[number, op]

    def _evaluate(self, waiting: Mapping[int, Request]) -> dict[type[Operation], Sequence[Tensor]]:
        """Call the network on x, in which the waiting chunks are as they ask for it."""
        inputs, knots, levels = [], [], []
        for j, chunk in enumerate(self.chunks):
            op, given = waiting.get(j, (None, None))
            if isinstance(op, Evaluation) and given is not None:
                knot = op.knot
                inputs.append(given)
                levels.append((op.p / knot.input_scale, op.q))
            else:
                done = chunk.taken == len(self.table.steps)
                knot = self.context if done else self.table.knots[chunk.taken]
                scale = knot.input_scale * (knot.alpha if done else 1.0)
                inputs.append(scale * chunk.state[0] if scale != 1.0 else chunk.state[0])
                levels.append((1.0, 0.0))  # clipping takes x for x_0, and leaves the output
            knots.append(knot)
        x = torch.cat(inputs, self.axis)
        times = torch.tensor([knot.timestep for knot in knots], dtype=torch.float64)
        t = times.to(self.time_dtype).to(x.device, non_blocking=True).repeat(len(x), 1)
        out = self.guided(x.to(self.dtype), t)
        require_same_shape("the network's output", out, "its input", x)
        beside = {Evaluation: out, Unconditional: self.guided.unconditional}
        if self.change is not None:
            beside[Evaluation] = self._clipped(out, x, levels, self.change)
        plain = beside[Evaluation]
        return {
            kind: (plain if one is None else one).chunk(len(self.chunks), self.axis)
            for kind, one in beside.items()
        } | {Unclipped: out.chunk(len(self.chunks), self.axis)}

    def _clipped(
        self, out: Tensor, x: Tensor, levels: Sequence[tuple[float, float]], change: Change
    ) -> Tensor:
        """Return the output whose clean estimate is the changed one, as ``clipping.clipped``."""
        out = out.to(torch.promote_types(out.dtype, x.dtype))
        size = x.shape[self.axis] // len(self.chunks)
        view = [-1 if k == self.axis else 1 for k in range(x.ndim)]
        p, q, inverse = (
            torch.tensor(column, dtype=torch.float64)
            .to(x.device, out.dtype)
            .repeat_interleave(size)
            .view(view)
            for column in zip(*((p, q, 1 / q if q else 0.0) for p, q in levels), strict=True)
        )
        x0 = p * x + q * out
        return out + (change(x0) - x0) * inverse


class _Rolled(Progress):
    """The state after a row; the estimate of the clean sample is put together on access."""

    def __init__(
        self, step: int, steps: int, x: Tensor, chunks: Sequence[_Chunk], axis: int
    ) -> None:
        super().__init__(step, steps, x, (), ())
        self._chunks, self._axis = [_Chunk(**vars(chunk)) for chunk in chunks], axis

    @cached_property
    def denoised(self) -> Tensor:
        """The last estimate of each clean chunk, 0 before its first step."""
        return torch.cat([chunk.denoised for chunk in self._chunks], self._axis)


def _next_evaluation(
    step: Generator[Request, Tensor, None],
    outputs: Mapping[type[Operation], Sequence[Tensor]],
    j: int,
) -> Request | None:
    """Hand a chunk its part of the outputs; return its next network call, None at its end."""
    try:
        op, given = step.send(outputs[Evaluation][j])
        while not isinstance(op, Evaluation):
            op, given = step.send(outputs[type(op)][j])
    except StopIteration:
        return None
    return op, given


def _known_chunks(
    known: Tensor | None, shape: Sequence[int], axis: int, size: int
) -> Sequence[Tensor]:
    """Return the chunks that are given, after checking their shape."""
    if known is None:
        return ()
    fits = known.ndim == len(shape) and all(
        k in ((1, n) if i == 0 else (n,)) or i == axis
        for i, (k, n) in enumerate(zip(known.shape, shape, strict=False))
    )
    if not fits or known.shape[axis] % size or not 0 < known.shape[axis] < shape[axis]:
        raise ValueError(
            f"known must be like x, {tuple(shape)}, but on axis {axis}: whole chunks of {size}, "
            f"and fewer than {shape[axis]} in all; got {tuple(known.shape)}"
        )
    return known.split(size, axis)
