"""Continuous batching: images that stand at different evaluations of one table share a batch.

A table is a program: between two evaluations of the network it does linear operations on the state,
the outputs of the step and the draws. Here the vectors of all images are rows of registers, and the
coefficients of every evaluation are tensors on the device. Each image has the number of its next
evaluation, and the coefficients are gathered with these numbers. So a step is one network call for
all images, reads nothing from the device, and an image enters and leaves at any step.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import count
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...noising.utils.registry import lookup
from ...noising.utils.validation import require_same_shape, whole_number
from ..clipping import Change, clipped, resolve_clip
from ..guidance import Network, guided_network
from ..inference import SeededNoise, checked_shape, place
from ..kernel import Noise
from ..knots import Knot
from ..sampler import NOISE_SOURCES, Sampler
from ..table import Table
from ..tracing import Draw, Evaluation, Operation, Row, Unclipped, Unconditional


class Stand(NamedTuple):
    """An evaluation of a table: what is done from the one before it to the one after it.

    ``draws``: draws before it, pairs of a register and the draw. ``row``: its input. ``out``: the
    register of its output. ``beside``: registers of the operations that follow on it. ``after``:
    draws from it to the end of the step. ``carry``: the rows of the next state, if it is the last
    of its step. All indices are of registers.
    """

    knot: Knot
    draws: tuple[tuple[int, Draw], ...]
    row: Row
    out: int
    beside: tuple[tuple[int, Operation], ...]
    after: tuple[tuple[int, Draw], ...]
    carry: tuple[Row, ...] | None


def stands(table: Table) -> tuple[list[Stand], int, int]:
    """Return the evaluations of a table, and the registers of the state and of the operations.

    The state has the first registers, the results of a step's operations those after it.

    >>> from alphabar.noising import NoiseSchedule
    >>> made, state, operations = stands(Sampler(NoiseSchedule.linear(), "heun", 3).table)
    >>> [stand.out for stand in made], state, operations
    ([1, 2, 1, 2, 1], 1, 2)
    """
    state = max(len(step.carry) for step in table.steps)
    made: list[Stand] = []
    for step in table.steps:
        memory = 1 if not made else len(made[-1].carry or ())

        def placed(row: Row, memory: int = memory) -> Row:
            return tuple((k if k < memory else k - memory + state, c) for k, c in row)

        places = [k for k, op in enumerate(step.ops) if isinstance(op, Evaluation)]
        if not places:
            raise ValueError(f"{table.name} has a step without an evaluation of the network")
        results = [(state + k, op) for k, op in enumerate(step.ops)]
        for first, end in zip(places, [*places[1:], len(results)], strict=True):
            op = step.ops[first]
            assert isinstance(op, Evaluation)
            before = results[:first] if first == places[0] else []
            later = results[first + 1 : end]
            made.append(
                Stand(
                    op.knot,
                    tuple((k, one) for k, one in before if isinstance(one, Draw)),
                    placed(op.row),
                    state + first,
                    tuple((k, one) for k, one in later if not isinstance(one, Draw)),
                    tuple((k, one) for k, one in later if isinstance(one, Draw)),
                    tuple(map(placed, step.carry)) if end == len(results) else None,
                )
            )
    return made, state, max(len(step.ops) for step in table.steps)


class _Image(NamedTuple):
    """An image of a batch: its name, its noise, its inputs and the number of its evaluation."""

    name: int
    noise: Noise
    conditioning: Mapping[str, Any]
    unconditional: Mapping[str, Any] | None
    stand: int


class ContinuousBatch:
    """A batch of one sampler in which each image stands at its own step.

    An image is that of ``sampler(network, (1, *shape), seeds=[seed])``, within rounding, whatever
    else is in the batch.

    Args:
        sampler: A Sampler; samplers without a table have no rows to stand at.
        network: As in ``Sampler.iterate``. It is called with the images that are in the batch.
        slots: The largest number of images in the batch.
        shape: Of one image, without the batch.
        guidance_scale, guidance_rescale, device, dtype, clip, noise: As in ``Sampler.iterate``, the
            same for all images.

    Raises:
        TypeError: The sampler has no table.
        ValueError: An argument is invalid.

    >>> from alphabar.noising import NoiseSchedule
    >>> sampler = Sampler(NoiseSchedule.flow(), "dpmpp_2m", steps=3)
    >>> batch = ContinuousBatch(sampler, lambda x, t: -x, slots=2, shape=(4, 8, 8))
    >>> first = batch.add(seed=0)
    >>> batch.step()
    {}
    >>> second = batch.add(seed=1)
    >>> done = batch.step() | batch.step() | batch.step()
    >>> sorted(done) == [first, second], done[second].shape
    (True, torch.Size([4, 8, 8]))
    >>> alone = sampler(lambda x, t: -x, (1, 4, 8, 8), seeds=[1])[0]
    >>> torch.allclose(done[second], alone, atol=1e-6)
    True
    """

    def __init__(
        self,
        sampler: Sampler,
        network: Network,
        slots: int,
        shape: Sequence[int],
        *,
        guidance_scale: float = 1.0,
        guidance_rescale: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        clip: float | Change | None = None,
        noise: str = "independent",
    ) -> None:
        if not isinstance(sampler, Sampler):
            raise TypeError(
                f"a continuous batch needs a Sampler with a table, got {type(sampler).__name__}; "
                "call it with a batch that starts and ends together"
            )
        sampler._require_guidance(guidance_scale, guidance_rescale)
        self.sampler, self.network = sampler, network
        self.slots = whole_number("slots", slots, least=1)
        self.shape = checked_shape((1, *shape))[1:]
        self.device, dtype = place(network, None, device, dtype)
        self.dtype = torch.float32 if dtype is None else dtype
        self.guidance_scale, self.guidance_rescale = guidance_scale, guidance_rescale
        self._clip = None if clip is None else resolve_clip(clip)
        self._source = lookup("noise", noise, NOISE_SOURCES)
        self._stands, self._state, operations = stands(sampler.table)
        self._images: list[_Image] = []
        self._names = count()
        registers = self._state + operations + 1  # the last one takes what nobody reads
        self._tables = _Tables(self._stands, self._state, registers, self.device)
        self._registers = torch.zeros(registers, self.slots, *self.shape, device=self.device)
        self._at = torch.zeros(self.slots, dtype=torch.int64, device=self.device)
        self._rows = torch.arange(self.slots, device=self.device)
        time_dtype = torch.int64 if sampler._integer_timesteps else torch.float32
        times = [stand.knot.timestep for stand in self._stands]
        self._times = torch.tensor(times, dtype=time_dtype, device=self.device)
        self._guided: Any = None

    def __len__(self) -> int:
        return len(self._images)

    def add(
        self,
        seed: int | None = None,
        conditioning: Mapping[str, Any] | None = None,
        unconditional: Mapping[str, Any] | None = None,
    ) -> int:
        """Start an image at the first step, and return its name.

        Args:
            seed: Of its noise; None: a fresh one.
            conditioning, unconditional: As in ``Sampler.iterate``, for a batch of one image:
                tensors have one row. Other values are those of all images in the batch.

        Raises:
            ValueError: The batch is full, an input is missing, or it cannot share a batch with the
                images that are there; nothing changes then.
        """
        if len(self) == self.slots:
            raise ValueError(f"the batch is full: its {self.slots} slots hold an image each")
        seeds = None if seed is None else [whole_number("seed", seed)]
        drawn = SeededNoise((1, *self.shape), seeds, self.device)
        source = self._source(drawn, self.sampler.knots)
        image = _Image(next(self._names), source, conditioning or {}, unconditional, 0)
        images = [*self._images, image]
        self._guided = self._joined(images)
        with torch.no_grad():
            row = len(self)
            self._registers[:, row] = 0
            self._registers[0, row] = drawn()[0] * self.sampler.init_noise_scale
            self._at[row] = 0
        self._images = images
        return image.name

    @torch.no_grad()
    def step(self) -> dict[int, Tensor]:
        """Take every image over its next evaluation, in one call of the network.

        Returns:
            The finished samples by the names of their images, in the shape of an image. Their slots
            are free.

        Raises:
            ValueError: The network's output has another shape.
        """
        images, tables, n = self._images, self._tables, len(self)
        if not n:
            return {}
        registers, at, here = self._registers[:, :n], self._at[:n], self._rows[:n]
        self._draw(registers, [self._stands[image.stand].draws for image in images])
        x = _combined(tables.row, at, registers)
        times = self._times[at]
        if self._guided is None:
            self._guided = self._joined(images)
        out = self._evaluated(x, times)
        kinds = {Unconditional: self._guided.unconditional, Unclipped: self._unclipped}
        registers[tables.out[at], here] = out.to(registers.dtype)
        for kind, register in tables.beside.items():
            other = kinds[kind]
            registers[register[at], here] = (out if other is None else other).to(registers.dtype)
        self._draw(registers, [self._stands[image.stand].after for image in images])
        state = [_combined(pairs, at, registers) for pairs in tables.carry]
        for k, vector in enumerate(state):
            registers[k] = vector
        at += 1
        self._images = [image._replace(stand=image.stand + 1) for image in images]
        return self._finished()

    def _finished(self) -> dict[int, Tensor]:
        """Remove the images after their last evaluation; the last rows take their places."""
        done: dict[int, Tensor] = {}
        for row in reversed(range(len(self))):
            if self._images[row].stand < len(self._stands):
                continue
            done[self._images[row].name] = self._registers[0, row].clone()
            end = len(self) - 1
            if row != end:
                self._registers[:, row] = self._registers[:, end]
                self._at[row] = self._at[end]
                self._images[row] = self._images[end]
            self._images.pop()
            self._guided = None
        return done

    def _evaluated(self, x: Tensor, times: Tensor) -> Tensor:
        """Return the guided output; clip the rows one by one, as their α and σ differ."""
        out = self._guided(x.to(self.dtype), times)
        require_same_shape("the network's output", out, "its input", x)
        self._unclipped: Tensor | None = None
        if self._clip is None:
            return out
        self._unclipped, rows = out, []
        for k, image in enumerate(self._images):
            this = slice(k, k + 1)
            evaluate = clipped(
                lambda x, knot, this=this: out[this], self.sampler.schedule.prediction, self._clip
            )
            rows.append(evaluate(x[this], self._stands[image.stand].knot))
        return torch.cat(rows)

    def _draw(self, registers: Tensor, draws: Sequence[Sequence[tuple[int, Draw]]]) -> None:
        """Put the draws of each image into its registers."""
        for row, (image, wanted) in enumerate(zip(self._images, draws, strict=True)):
            for register, draw in wanted:
                registers[register, row] = image.noise(draw.start, draw.end)[0]

    def _joined(self, images: Sequence[_Image]) -> Any:
        """Return the guided network for these images."""
        without = [image.unconditional for image in images]
        halves = self.sampler._plan.has_halves
        used = self.guidance_scale != 1.0 or halves
        if used and any((one is None) != (without[0] is None) for one in without):
            raise ValueError(
                "unconditional=... is given for some images of the batch only; give it for all"
            )
        return guided_network(
            self.network,
            _joined([image.conditioning for image in images], "conditioning"),
            _joined([one for one in without if one is not None], "unconditional")
            if used and without[0] is not None
            else None,
            self.guidance_scale,
            self.guidance_rescale,
            len(images),
            halves,
        )


class _Tables:
    """The coefficients of all evaluations, on the device.

    ``row`` and each of ``carry``: the registers that some evaluation reads, with a coefficient for
    each evaluation. ``out`` and ``beside``: registers to write.
    """

    def __init__(
        self, made: Sequence[Stand], state: int, registers: int, device: torch.device
    ) -> None:
        def table(rows: Sequence[Row]) -> list[tuple[int, Tensor]]:
            dense = torch.zeros(len(made), registers, dtype=torch.float64)
            for k, row in enumerate(rows):
                for register, c in row:
                    dense[k, register] = c
            used = dense.any(0).nonzero().flatten().tolist()
            return [(k, dense[:, k].to(device, torch.float32)) for k in used]

        def stays(k: int) -> Row:
            return ((k, 1.0),)

        self.row = table([one.row for one in made])
        self.carry = [
            table(
                [
                    stays(k) if one.carry is None else one.carry[k] if k < len(one.carry) else ()
                    for one in made
                ]
            )
            for k in range(state)
        ]
        self.out = torch.tensor([one.out for one in made], device=device)
        kinds = {type(op) for one in made for _, op in one.beside}
        self.beside = {
            kind: torch.tensor(
                [
                    next((k for k, op in one.beside if isinstance(op, kind)), registers - 1)
                    for one in made
                ],
                device=device,
            )
            for kind in kinds
        }


def _combined(pairs: Sequence[tuple[int, Tensor]], at: Tensor, registers: Tensor) -> Tensor:
    """Return the combination of registers with the coefficients of each image's evaluation."""
    sizes = (-1,) + (1,) * (registers.ndim - 2)
    if not pairs:
        return torch.zeros_like(registers[0])
    k, coefficients = pairs[0]
    total = registers[k] * coefficients[at].view(sizes)
    for k, coefficients in pairs[1:]:
        total.addcmul_(registers[k], coefficients[at].view(sizes))
    return total


def _joined(given: Sequence[Mapping[str, Any]], where: str) -> dict[str, Any]:
    """Return the inputs of several images as those of one batch."""
    for one in given:
        if set(one) != set(given[0]):
            raise ValueError(
                f"{where} has the keys {sorted(one)} for one image and {sorted(given[0])} for "
                "another; give all the same"
            )
    return {
        key: _joined_values([one[key] for one in given], f"{where}[{key!r}]") for key in given[0]
    }


def _joined_values(values: Sequence[Any], where: str) -> Any:
    first = values[0]
    if isinstance(first, Mapping) and all(isinstance(value, Mapping) for value in values):
        return _joined(values, where)
    if all(isinstance(value, Tensor) and value.ndim and value.shape[0] == 1 for value in values):
        alike = {(value.shape, value.dtype, value.device) for value in values}
        if len(alike) == 1:
            return torch.cat(list(values))
    elif all(value is first for value in values) or not any(
        isinstance(value, Tensor) or value != first for value in values
    ):
        return first
    raise ValueError(
        f"{where} cannot be joined: give tensors of one row and the same shape, dtype and device "
        "for each image, or one value for all"
    )
