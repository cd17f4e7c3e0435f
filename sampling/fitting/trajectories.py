"""Runs of one network on many seeds, batch by batch, with what they store kept in files.

Memory holds one batch, whatever the number of seeds.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...noising import NoiseSchedule
from ..guidance import Network
from ..inference import Run, Times, place, prepare_run
from ..knots import Knot

Conditioning = Callable[[Sequence[int]], Mapping[str, Any]] | Mapping[str, Any] | None
"""Values for the network: a function of the seeds, or a mapping whose tensors with as many rows as
there are seeds have one for each seed; other values are for all.
"""

Total = Callable[[Tensor], Tensor]
"""Adds a tensor over ranks."""


class Scratch:
    """Arrays in files of a temporary folder, one row for each seed; removed when closed.

    >>> with Scratch() as scratch:
    ...     array = scratch.array((2, 3), torch.float32)
    ...     scratch.write(array, slice(0, 2), torch.ones(2, 3))
    ...     scratch.read(array, slice(1, 2), torch.device("cpu"))
    tensor([[1., 1., 1.]])
    """

    def __init__(self) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="alphabar_fit_")
        self._count = 0

    def __enter__(self) -> Scratch:
        return self

    def __exit__(self, *_: object) -> None:
        self._folder.cleanup()

    def array(self, shape: Sequence[int], dtype: torch.dtype) -> np.memmap[Any, Any]:
        """Return a new array of float32, or of float64 if ``dtype`` is."""
        self._count += 1
        kind = np.float64 if dtype == torch.float64 else np.float32
        path = Path(self._folder.name, str(self._count))
        return np.memmap(path, kind, "w+", shape=tuple(shape))

    @staticmethod
    def write(array: np.ndarray[Any, Any], place: Any, values: Tensor) -> None:
        """Set a part of an array."""
        array[place] = values.detach().cpu().numpy()

    @staticmethod
    def read(array: np.ndarray[Any, Any], place: Any, device: torch.device) -> Tensor:
        """Return a copy of a part of an array."""
        return torch.from_numpy(np.array(array[place])).to(device)


@dataclass(frozen=True)
class Model:
    """A network with everything that a call needs but the seeds.

    ``seeds`` are all seeds of the fit, those held out last.
    """

    network: Network
    schedule: NoiseSchedule
    shape: tuple[int, ...]
    seeds: tuple[int, ...]
    conditioning: Conditioning = None
    unconditional: Conditioning = None
    guidance_scale: float = 1.0
    batch_size: int = 16
    device: torch.device | str | None = None
    dtype: torch.dtype | None = None
    total: Total = field(default=lambda tensor: tensor)
    guidance_rescale: float = 0.0

    def batches(self, part: slice = slice(None)) -> Iterator[slice]:
        """Yield the places of the seeds of ``part``, a batch at a time."""
        first, last, _ = part.indices(len(self.seeds))
        for start in range(first, last, self.batch_size):
            yield slice(start, min(start + self.batch_size, last))

    @property
    def torch_device(self) -> torch.device:
        """The device of the network's input."""
        return place(self.network, None, self.device, self.dtype)[0]

    def arguments(self, batch: slice) -> dict[str, Any]:
        """Return the arguments of a sampler's call for these seeds."""
        return {
            "seeds": list(self.seeds[batch]),
            "conditioning": self._values(self.conditioning, batch) or {},
            "unconditional": self._values(self.unconditional, batch),
            "guidance_scale": self.guidance_scale,
            "guidance_rescale": self.guidance_rescale,
            "device": self.device,
            "dtype": self.dtype,
        }

    def size(self, batch: slice) -> tuple[int, ...]:
        """Return the shape of a batch."""
        return batch.stop - batch.start, *self.shape

    def run(self, batch: slice, knots: Sequence[Knot], x: Tensor | None = None) -> Run:
        """Return a run over ``knots``, the last of which is not evaluated.

        It starts at ``x``, shape (batch, values), or at the noise of the seeds.
        """
        return prepare_run(
            self.schedule,
            knots[0],
            self.network,
            self.size(batch) if x is None else x.view(self.size(batch)),
            times=Times([knot.timestep for knot in knots[:-1]]),
            integer_timesteps=self.schedule.curve.is_discrete
            and all(knot.timestep.is_integer() for knot in knots[:-1]),
            **self.arguments(batch),
        )

    def _values(self, values: Conditioning, batch: slice) -> Mapping[str, Any] | None:
        if values is None or callable(values):
            return None if values is None else values(self.seeds[batch])
        return {
            name: value[batch] if self._has_rows(value) else value for name, value in values.items()
        }

    def _has_rows(self, value: Any) -> bool:
        return isinstance(value, Tensor) and value.ndim > 0 and len(value) == len(self.seeds)


def require_finite(x: Tensor, whose: str, knot: Knot) -> Tensor:
    """Return ``x``; raise ValueError if it is not finite."""
    if not bool(x.isfinite().all()):
        raise ValueError(
            f"{whose} is not finite after the network's call at timestep {knot.timestep:g}; check "
            "the network, or give dtype=torch.float32"
        )
    return x


@dataclass(frozen=True)
class Teacher:
    """The teacher's trajectories: states (seeds, knots, values) and the moments of one seed.

    ``moments`` is the mean over the fit's seeds of the products of all states and estimates of a
    trajectory, in units of its end: shape (2 K + 1, 2 K + 1), the K + 1 states first, then the
    estimates D at all knots but the last. ``spread`` is the root mean square of the ends.
    """

    knots: tuple[Knot, ...]
    states: np.memmap[Any, Any]
    moments: np.ndarray[Any, Any]
    spread: float

    def at(self, batch: slice, knot: int, device: torch.device) -> Tensor:
        """Return the states (batch, values) at a knot."""
        return Scratch.read(self.states, (batch, knot), device)


def teacher_trajectories(
    teacher: Any, model: Model, fitted: int, scratch: Scratch, told: Callable[[int], object]
) -> Teacher:
    """Run the teacher once on every seed; ``told(seeds done)`` is called after each batch.

    The first ``fitted`` seeds count for the moments.
    """
    knots: tuple[Knot, ...] = teacher.knots
    K = len(knots) - 1
    states: np.memmap[Any, Any] | None = None
    moments = torch.zeros(2 * K + 1, 2 * K + 1, dtype=torch.float64)
    size = torch.zeros(2, dtype=torch.float64)
    for batch in model.batches():
        x = model.run(batch, knots).x.flatten(1)
        if states is None:
            states = scratch.array((len(model.seeds), K + 1, x.shape[1]), x.dtype)
            estimates = scratch.array((model.batch_size, K, x.shape[1]), x.dtype)
        scratch.write(states, (batch, 0), x)
        rows = batch.stop - batch.start
        for i, progress in enumerate(
            teacher.iterate(model.network, model.size(batch), **model.arguments(batch))
        ):
            x = require_finite(progress.x, "the teacher's sample", knots[i])
            scratch.write(states, (batch, i + 1), x.flatten(1))
            scratch.write(estimates, (slice(0, rows), i), progress.denoised.flatten(1))
        for k in range(batch.start, min(batch.stop, fitted)):
            both = np.concatenate([states[k], estimates[k - batch.start]]).astype(np.float64)
            end = float((both[K] ** 2).sum())
            moments += torch.from_numpy(both @ both.T / max(end, 1e-300))
            size += torch.tensor([end, both.shape[1]], dtype=torch.float64)
        told(batch.stop)
    assert states is not None
    squares, values = model.total(size).tolist()
    spread = max((squares / max(values, 1.0)) ** 0.5, 1e-6)
    return Teacher(knots, states, model.total(moments).numpy(), spread)
