"""Counter-based randomness: the draws of sample i at step s depend only on (seed, s, i).

So they are the same for 1 and N processes, for any accumulation, and after a resume. They do not
change the global generators, and the user's own use of those does not change them. The function is
Philox4x32-10 (see philox.py):

    key:      the 64 bits of the seed, low word first
    counter:  (block of four elements, index of the sample, step or number of the draw, stream)

No library draws these numbers on every device: torch's own Philox (``torch.func._random``) has no
CPU kernel, numpy's is the 4x64 variant and draws for one key at a time, and torchrng and the
bindings of Random123 are not packaged for every platform. On the CPU the loops of compiled.py draw
them if numba is installed, else numpy; on a GPU the kernels of triton_kernels.py if triton is
installed, else torch. All give the same bits.
"""

from __future__ import annotations

import math
import operator
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from enum import IntEnum
from functools import lru_cache
from itertools import pairwise
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from . import philox
from .philox import WORD, Formula

_CELLS = 16384  # blocks per tile of numpy, so that their arrays stay in the cache
_PART = 1 << 15  # numbers that are worth a thread of their own
_MASK = (1 << 64) - 1
MAX_SAMPLES = 65535
"""The samples that a GPU kernel draws for at once."""


class Kind(NamedTuple):
    """A kind of random number: the formula, the numbers of a block, and their dtype."""

    formula: Formula
    each: int
    dtype: torch.dtype
    array_dtype: Any


NORMAL = Kind(philox.normal, 4, torch.float32, np.float32)
UNIFORM32 = Kind(philox.uniform32, 4, torch.float32, np.float32)
UNIFORM64 = Kind(philox.uniform64, 2, torch.float64, np.float64)
BITS64 = Kind(philox.bits64, 2, torch.int64, np.int64)


class SymbolicRange(NamedTuple):
    """A range for compiled code: the ends of a ``range`` would become constants of the graph.

    >>> SymbolicRange(1, 5, 2).step
    2
    """

    start: int
    stop: int
    step: int


class Stream(IntEnum):
    """The purpose of a draw: the last word of the counter.

    Kinds of noise have streams derived from their names, from 2^31 on.
    """

    TRAINING_NOISE = 0
    TRAINING_TIME = 1
    STRATA = 2
    FEATURES = 3
    SAMPLING_NOISE = 4
    SAMPLING_UNIFORM = 5
    STRATA_ACROSS_STEPS = 6


def stream_of(name: str, number: int = 0) -> int:
    """Return the stream of a name, at least 2^31.

    ``number`` distinguishes streams of the same name.

    >>> stream_of("offset") != stream_of("offset", 1), stream_of("offset") >= 2**31
    (True, True)
    """
    if torch.compiler.is_compiling():  # it traces the loop, but no cache
        return _hashed(name, number)
    return _known_stream(name, number)


def _hashed(name: str, number: int) -> int:
    hashed = 0x811C9DC5  # FNV-1a
    for letter in f"{name} {number}":
        hashed = (hashed ^ ord(letter)) * 0x01000193 & WORD
    return 1 << 31 | hashed


_known_stream = lru_cache(maxsize=64)(_hashed)


def whole_seed(seed: Any) -> int:
    """Return a seed as an int.

    As in torch, -1 and 2^64 - 1 are the same seed: all 64 bits count, without a sign. Raises
    TypeError for a value that is not an integer, and ValueError for more than 64 bits.

    >>> import numpy
    >>> whole_seed(numpy.int64(3)), whole_seed(-1)
    (3, -1)
    >>> whole_seed(True)
    Traceback (most recent call last):
    TypeError: a seed must be an integer, got True
    """
    if isinstance(seed, bool | np.bool_) or not hasattr(seed, "__index__"):
        raise TypeError(f"a seed must be an integer, got {seed!r}")
    value = operator.index(seed)
    if not -(1 << 63) <= value < 1 << 64:
        raise ValueError(f"a seed has 64 bits, -2^63 ... 2^64 - 1, got {value}")
    return value


class Draws:
    """Random numbers for a batch, independent for each sample.

    Each call continues where the previous one ended.

    Args:
        seeds: one seed for all samples, or one for each sample.
        index: index of each sample, in 0 ... 2^32 - 1.
        step: step, in the same range.
        stream: stream, see :class:`Stream`.
        device: where the numbers are made.

    Raises:
        ValueError: for counters out of range (a tensor on a GPU is not checked).

    >>> one, both = Draws(7, [5], step=0, stream=1), Draws(7, [4, 5], step=0, stream=1)
    >>> (
    ...     torch.equal(one.normal(3, 8)[0], both.normal(3, 8)[1]),
    ...     torch.equal(one.uniform(), both.uniform()[1:]),
    ... )
    (True, True)
    """

    def __init__(
        self,
        seeds: int | Sequence[int],
        index: Sequence[int] | SymbolicRange | Tensor,
        *,
        step: int,
        stream: int,
        device: torch.device | str = "cpu",
    ) -> None:
        self.device = device if isinstance(device, torch.device) else torch.device(device)
        self.step, self.stream = step, int(stream)
        self._index, ends = _index(index)
        for name, value in (
            ("the index of a sample", ends[0]),
            ("the index of a sample", ends[1]),
            ("the step", step),
        ):
            if not 0 <= value <= WORD:
                raise ValueError(f"{name} must lie in 0 ... 2^32 - 1, got {value}")
        self._keys = [
            whole_seed(seed) & _MASK for seed in (seeds if isinstance(seeds, Sequence) else [seeds])
        ]
        # made at the first draw: the low and the high words of the keys for compiled.py, and the
        # keys and indices on the device for triton_kernels.py
        self._words: list[Any] = []
        self._uploaded: list[Tensor] = []
        self._range = index if isinstance(index, range) else None
        self._block = 0
        self._loops = _loops_of(self.device)

    def of(
        self, stream: int, *, step: int | None = None, device: torch.device | str | None = None
    ) -> Draws:
        """Return the draws of the same samples in another stream, and at another step.

        >>> draws = Draws(7, [5], step=0, stream=1)
        >>> draws.of(2).uniform() == Draws(7, [5], step=0, stream=2).uniform()
        tensor([True])
        """
        draws = object.__new__(Draws)
        draws.step = self.step if step is None else step
        draws.stream = int(stream)
        draws.device = self.device if device is None else torch.device(device)
        draws._index, draws._keys, draws._words = self._index, self._keys, self._words
        draws._uploaded = self._uploaded if draws.device == self.device else []
        draws._range = self._range
        draws._block = 0
        draws._loops = self._loops if device is None else _loops_of(draws.device)
        return draws

    def reseed(self, seeds: Sequence[int]) -> None:
        """Change the seed of each sample, here and in all draws made by :meth:`of`.

        The numbers of a captured CUDA graph change too: the keys on the device keep their place.

        >>> draws = Draws([7, 8], [5, 5], step=0, stream=1)
        >>> other = draws.of(2)
        >>> draws.reseed([9, 8])
        >>> torch.equal(other.normal(4), Draws([9, 8], [5, 5], step=0, stream=2).normal(4))
        True
        """
        if len(seeds) != len(self._keys):
            raise ValueError(f"need {len(self._keys)} seeds, got {len(seeds)}")
        self._keys[:] = [whole_seed(seed) & _MASK for seed in seeds]
        if self._words:
            self._words[0][:] = [key & WORD for key in self._keys]
            self._words[1][:] = [key >> 32 for key in self._keys]
        if self._uploaded:
            self._uploaded[0].copy_(torch.tensor(self._signed()))

    def _signed(self) -> list[int]:
        return [key - (1 << 64) if key >= 1 << 63 else key for key in self._keys]

    @property
    def index(self) -> Tensor:
        """The index of each sample, int64."""
        return torch.as_tensor(self._index)

    @property
    def batch(self) -> int:
        """The number of samples."""
        return self._index.shape[0]

    def normal(self, *shape: int, out: Tensor | None = None) -> Tensor:
        """Return standard normal numbers, shape (batch, *shape), float32.

        ``out``: a contiguous tensor for the result.

        >>> Draws(0, [0, 1], step=0, stream=0).normal(3, 4).shape
        torch.Size([2, 3, 4])
        """
        return self._filled(NORMAL, shape, out)

    def normal_steps(self, steps: int, *shape: int) -> Tensor:
        """Return the first numbers of :meth:`normal` at ``steps`` steps, the first one ``step``.

        Shape (steps, batch, *shape). For loops that draw little at each step.

        >>> draws = Draws(7, [5], step=3, stream=1)
        >>> torch.equal(draws.normal_steps(2, 4)[1], draws.of(1, step=4).normal(4))
        True
        """
        compiled = self._loops
        if compiled is None:
            drawn = [self.of(self.stream, step=self.step + k).normal(*shape) for k in range(steps)]
            return torch.stack(drawn)
        whole = np.empty((steps, self.batch, math.prod(shape)), np.float32)
        compiled.normal_steps(whole, *self._counters())
        return torch.from_numpy(whole.reshape(steps, self.batch, *shape))

    def uniform(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """Return numbers in [0, 1), shape (batch, *shape).

        They are multiples of 2^-24, or of 2^-53 in float64.

        >>> float(Draws(0, [0], step=0, stream=0).uniform(1000, dtype=torch.float64).max()) < 1
        True
        """
        return self._filled(UNIFORM64 if dtype == torch.float64 else UNIFORM32, shape)

    def skip(self, count: int) -> None:
        """Continue as if :meth:`normal` had drawn ``count`` numbers of each sample."""
        self._take(NORMAL, count)

    def bits(self, *shape: int) -> Tensor:
        """Return numbers of 64 random bits, shape (batch, *shape), int64."""
        return self._filled(BITS64, shape)

    @property
    def has_loops(self) -> bool:
        """Whether compiled loops draw these numbers on the CPU."""
        return self._loops is not None

    @property
    def has_one_pass(self) -> bool:
        """Whether :meth:`noised` works: with compiled loops, or with kernels on a GPU."""
        return self._loops is not None or self._kernels() is not None

    def noised(
        self,
        x0: Tensor,
        coefficients: Tensor,
        dtype: torch.dtype = torch.float32,
        shift: Tensor | None = None,
        grids: tuple[Any, ...] | None = None,
        jitter: tuple[Any, ...] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Return (α x_0 + σ ε_x, c0 x_0 + c1 ε_y) in one pass, which stores no noise.

        ε is that of :meth:`normal`; ε_x and ε_y are ε with the given parts, see
        :func:`compiled.noised`. Needs :attr:`has_one_pass`, and :attr:`has_loops` for parts. May be
        called once.

        Args:
            x0: clean batch, shape (batch, ...), contiguous; float32 on the CPU, of any floating
                dtype on a GPU.
            coefficients: α, σ, c0, c1 of each sample in the first four rows, float32.
            dtype: of α x_0 + σ ε_x, on a GPU; the other result is float32.
            shift: what is added to each channel, shape (batch, channels).
            grids: (stream, iterations, discount) of pyramid noise.
            jitter: (stream, factors or None, factor) of input perturbation.
        """
        if self._loops is not None:
            return self._noised(x0, coefficients.numpy(), None, shift, grids, jitter)
        kernels = self._kernels()
        assert kernels is not None
        x_t, target = torch.empty_like(x0, dtype=dtype), torch.empty_like(x0, dtype=torch.float32)
        flat = [one.view(self.batch, -1) for one in (x0.detach(), x_t, target)]
        self._take(NORMAL, flat[0].shape[1])
        kernels.noised(flat[0], coefficients.contiguous(), *flat[1:], *self._device_counters())
        return x_t, target

    def noised_at_uniform_times(
        self, x0: Tensor, table: Tensor, *parts: Any
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return (t, coefficients, *results of :meth:`noised`) in one pass, on the CPU.

        The timesteps t, int64, are those of :class:`UniformTimesteps`, and the coefficients are
        their columns of ``table``, shape (4 or more, T). Needs :attr:`has_loops`, and may be called
        once. ``parts``: shift, grids and jitter of :meth:`noised`.
        """
        batch = self.batch
        t, levels = np.empty(batch, np.int64), np.empty((table.shape[0], batch), np.float32)
        picks = table.numpy(), t, int(Stream.TRAINING_TIME)
        made = self._noised(x0, levels, picks, *parts)
        return torch.from_numpy(t), torch.from_numpy(levels), *made

    def _noised(
        self,
        x0: Tensor,
        levels: Any,
        picks: tuple[Any, ...] | None,
        shift: Tensor | None,
        grids: tuple[Any, ...] | None,
        jitter: tuple[Any, ...] | None,
    ) -> tuple[Tensor, Tensor]:
        batch, shape = self.batch, tuple(x0.shape)
        size = batch, x0.numel() // batch
        self._take(NORMAL, size[1])
        clean = (x0.detach() if x0.requires_grad else x0).numpy()
        x_t, target = np.empty(shape, np.float32), np.empty(shape, np.float32)
        if grids is not None:
            sizes = shape[2:]
            padded = (shape[1], *[1] * (3 - len(sizes)), *sizes)
            grids = *grids, len(sizes), padded
        if jitter is not None:
            stream, factors, factor = jitter
            ones = np.ones(batch, np.float32) if factors is None else factors.numpy()
            jitter = stream, ones, factor
        assert self._loops is not None
        _over_samples(
            self._loops.noised,
            size,
            clean.reshape(size),
            levels,
            x_t.reshape(size),
            target.reshape(size),
            *self._counters(),
            picks,
            None if shift is None else shift.numpy(),
            grids,
            jitter,
        )
        return torch.from_numpy(x_t), torch.from_numpy(target)

    def pyramid(self, shape: Sequence[int], iterations: int, discount: float) -> Tensor:
        """Return the parts of pyramid noise, shape (batch, channels + 1, *axes), in one pass.

        Needs :attr:`has_loops`, one to three axes after the channels, and may be called once.
        """
        compiled = self._loops
        assert compiled is not None
        channels, *sizes = shape
        padded = [1] * (3 - len(sizes)) + sizes
        parts = np.empty((self.batch, channels + 1, *padded), np.float32)
        work, options = (self.batch, math.prod(shape)), (iterations, discount, len(sizes))
        _over_samples(compiled.pyramid, work, parts, *self._counters(), *options)
        return torch.from_numpy(parts.reshape(self.batch, channels + 1, *sizes))

    def _filled(self, kind: Kind, shape: Sequence[int], out: Tensor | None = None) -> Tensor:
        """Return the next numbers of a kind, shape (batch, *shape)."""
        count = math.prod(shape)
        first, blocks = self._take(kind, count)
        compiled = self._loops
        if compiled is not None:
            whole = np.empty((self.batch, count), kind.array_dtype)
            if out is not None:
                whole = out.numpy().reshape(self.batch, count)
            if kind is NORMAL:
                _over_samples(compiled.normal, whole.shape, whole, *self._counters(), first)
            else:
                getattr(compiled, kind.formula.__name__)(whole, *self._counters(), first)
            return out if out is not None else torch.from_numpy(whole.reshape(self.batch, *shape))
        kernels = self._kernels() if kind is NORMAL and count else None
        if kernels is not None:
            made = out
            if made is None:  # in a step in half precision the default dtype is the network's
                made = torch.empty((self.batch, *shape), dtype=kind.dtype, device=self.device)
            kernels.normal(made.view(self.batch, count), *self._device_counters(), first)
            return made
        whole = out if out is not None and count == kind.each * blocks else None
        if whole is None:
            whole = torch.empty(
                (self.batch, kind.each * blocks), dtype=kind.dtype, device=self.device
            )
        self._fill(whole.view(self.batch, blocks, 2, kind.each // 2), kind.formula, first)
        drawn = whole.view(self.batch, -1)[:, :count].reshape(self.batch, *shape)
        return drawn if out is None or whole is out else out.copy_(drawn)

    def _take(self, kind: Kind, count: int) -> tuple[int, int]:
        """Count the blocks of ``count`` numbers; return the first one and their number."""
        blocks = -(-count // kind.each)
        first, self._block = self._block, self._block + blocks
        if self._block > 1 << 32:
            raise ValueError(
                f"a sample draws at most 2^32 blocks of {kind.each} numbers at a step, got "
                f"{self._block}"
            )
        return first, blocks

    def _kernels(self) -> ModuleType | None:
        if torch.compiler.is_compiling() or self.device.type != "cuda" or self.batch > MAX_SAMPLES:
            return None
        return kernels(self.device)

    def _device_counters(self) -> tuple[Any, ...]:
        """Return the counter words of triton_kernels.py, without the block."""
        if not self._uploaded:
            signed = self._signed()
            given = self._range
            numbers: dict[str, Any] = {"dtype": torch.int64, "device": self.device}
            if len(signed) == 1:  # made on the device: nothing is copied
                keys = torch.full((1,), signed[0], **numbers)
            else:
                keys = torch.tensor(signed).to(self.device, non_blocking=True)
            if given is not None:
                index = torch.arange(given.start, given.stop, given.step, **numbers)
            else:
                index = torch.as_tensor(self._index).to(self.device, non_blocking=True)
            self._uploaded += [keys, index]
        return *self._uploaded, self.step, self.stream

    def _counters(self) -> tuple[Any, ...]:
        """Return the counter words of compiled.py, without the block."""
        if not self._words:
            self._words += [
                np.array([key & WORD for key in self._keys], np.int64),
                np.array([key >> 32 for key in self._keys], np.int64),
            ]
        return *self._words, self._index, self.step, self.stream

    def _fill(self, out: Tensor, formula: Formula, first: int) -> None:
        """Fill ``out``, shape (batch, blocks, 2, numbers of two words), from block ``first`` on."""
        blocks = out.shape[1]
        if out.device.type != "cpu" or torch.compiler.is_compiling():
            block = torch.arange(first, first + blocks, device=out.device)[None]
            index, step = (
                torch.as_tensor(self._index, device=out.device)[:, None],
                torch.full((1, 1), self.step, device=out.device),
            )
            four = philox.words(self._key(slice(None), torch), block, index, step, self.stream)
            for j, numbers in enumerate(formula(torch, four)):
                out[..., j] = numbers.movedim(0, -1)
            return
        index, step, array = (
            np.asarray(self._index)[:, None],
            np.full((1, 1), self.step, dtype=np.int64),
            out.numpy(),
        )
        for rows, low, high in _tiles(self.batch, blocks):
            block = np.arange(first + low, first + high, dtype=np.int64)[None]
            four = philox.words(self._key(rows, np), block, index[rows], step, self.stream)
            for j, numbers in enumerate(formula(np, four)):
                for half in range(2):
                    array[rows, low:high, half, j] = numbers[half]

    def _key(self, rows: slice, xp: ModuleType) -> tuple[Any, Any]:
        """Return the key's words: two numbers, or two arrays (batch, 1) for one seed per sample."""
        if len(self._keys) == 1:
            return self._keys[0] & WORD, self._keys[0] >> 32
        low = [key & WORD for key in self._keys[rows]]
        high = [key >> 32 for key in self._keys[rows]]
        if xp is np:
            return np.array(low)[:, None], np.array(high)[:, None]
        low, high = (torch.tensor(words, device=self.device)[:, None] for words in (low, high))
        return low, high


def _index(index: Sequence[int] | SymbolicRange | Tensor) -> tuple[Any, tuple[int, int]]:
    """Return indices, as an array on the CPU or a tensor elsewhere, and their two ends.

    The values of a tensor on another device, or in compiled code, are not read: its ends are 0.
    """
    if torch.compiler.is_compiling():
        if isinstance(index, range | SymbolicRange):
            return torch.arange(index.start, index.stop, index.step), (0, 0)
        given = index if isinstance(index, Tensor) else list(index)
        return torch.as_tensor(given, dtype=torch.int64), (0, 0)
    if isinstance(index, Tensor) and index.device.type != "cpu":
        return index.to(torch.int64), (0, 0)
    if isinstance(index, range):
        return _of_range(index)
    array = np.asarray(index, dtype=np.int64)
    return array, (int(array.min()), int(array.max())) if array.size else (0, 0)


@lru_cache(maxsize=16)  # most steps have the same indices
def _of_range(index: range) -> tuple[Any, tuple[int, int]]:
    array = np.arange(index.start, index.stop, index.step, dtype=np.int64)
    return array, (min(index[0], index[-1]), max(index[0], index[-1])) if index else (0, 0)


@lru_cache(maxsize=1)
def loops() -> ModuleType | None:
    """Return the module of compiled loops, or None.

    None if numba is not installed, does not work here, or rounds differently than numpy.
    """
    try:
        from . import compiled

        made, index = np.empty((2, 64), np.float32), np.array([3, 4], np.int64)
        compiled.normal(0, 2, made, *np.array([[7], [9]]), index, 5, 6, 0)
        block, step = np.arange(16)[None], np.array([[5]])
        exact = philox.normal(np, philox.words((7, 9), block, index[:, None], step, 6))
        # exact[j][half] are the numbers 2 half + j of the blocks
        same = all(
            np.array_equal(made[:, 2 * half + j :: 4], exact[j][half])
            for half in range(2)
            for j in range(2)
        )
        return compiled if same else None
    except Exception:  # numba raises errors of many kinds on platforms that it does not support
        return None


def _loops_of(device: torch.device) -> ModuleType | None:
    return None if device.type != "cpu" or torch.compiler.is_compiling() else loops()


def _over_samples(loop: Callable[..., None], size: tuple[int, int], *arguments: Any) -> None:
    """Run ``loop(start, stop, *arguments)`` over all samples, in torch's number of threads.

    The loops hold no lock, and a sample's numbers depend on no other sample: the results are those
    of one thread. numba's own threads are not used: they end a process that calls them from two
    threads at once, or forks.

    ``size``: (batch, numbers of a sample).
    """
    batch, count = size
    parts = min(torch.get_num_threads(), batch, batch * count // _PART)
    if parts < 2:
        loop(0, batch, *arguments)
        return
    ends = [batch * k // parts for k in range(parts + 1)]
    try:
        pool = _threads(os.getpid())
        others = [pool.submit(loop, *part, *arguments) for part in pairwise(ends[1:])]
    except RuntimeError:  # the interpreter is ending, and starts no thread
        others, ends[1] = [], batch
    loop(0, ends[1], *arguments)
    for other in others:
        other.result()


@lru_cache(maxsize=1)
def _threads(process: int) -> ThreadPoolExecutor:
    """Return the threads of a process; a fork has none of its parent's."""
    return ThreadPoolExecutor(os.cpu_count(), thread_name_prefix="alphabar-noise")


@lru_cache(maxsize=64)
def kernels(device: torch.device) -> ModuleType | None:
    """Return the module of GPU kernels, or None.

    None if triton is not installed, does not work on this GPU, or rounds differently than philox.py
    on the CPU.
    """
    try:
        from . import triton_kernels

        index = torch.tensor([3, 4], device=device)
        made = torch.empty(2, 70, dtype=torch.float32, device=device)
        triton_kernels.normal(made, torch.tensor([(9 << 32) + 7], device=device), index, 5, 6, 1)
        exact = Draws((9 << 32) + 7, [3, 4], step=5, stream=6).normal(74)[:, 4:]
        return triton_kernels if torch.equal(made.cpu(), exact) else None
    except Exception:  # triton raises errors of many kinds on platforms that it does not support
        return None


def permutation(seed: int, count: int, *, step: int, group: int = 0) -> Tensor:
    """Return the permutation of ``count`` strata at a step, int64 on the CPU.

    Each ``group`` of strata has its own permutation.

    >>> permutation(0, 5, step=3).sort().values
    tensor([0, 1, 2, 3, 4])
    """
    return Draws(seed, [group], step=step, stream=Stream.STRATA).bits(count)[0].argsort(stable=True)


def _tiles(batch: int, blocks: int) -> Iterator[tuple[slice, int, int]]:
    """Yield the tiles (rows, first block, end) that are drawn in one pass."""
    rows, columns = max(1, _CELLS // max(1, blocks)), min(blocks, _CELLS)
    for row in range(0, batch, rows):
        for low in range(0, blocks, columns):
            yield slice(row, row + rows), low, min(low + columns, blocks)


def mix(*counters: int) -> int:
    """Return 64 well-mixed bits of a sequence of integers.

    This is the finaliser of splitmix64 (Steele et al. 2014), chained.

    >>> mix(0, 1, 2) == mix(0, 1, 2) != mix(0, 2, 1)
    True
    """
    h = 0
    for counter in counters:
        h = (h ^ (counter & _MASK)) + 0x9E3779B97F4A7C15 & _MASK
        h = (h ^ (h >> 30)) * 0xBF58476D1CE4E5B9 & _MASK
        h = (h ^ (h >> 27)) * 0x94D049BB133111EB & _MASK
        h ^= h >> 31
    return h


def seeded(generator: torch.Generator, *counters: int) -> torch.Generator:
    """Set a CPU generator to the start of the stream of these counters, and return it.

    Use it for functions that take a generator. torch keeps 32 bits of a CPU seed; the fold below
    mixes both halves into them.

    >>> g = torch.Generator()
    >>> torch.equal(
    ...     torch.rand(2, generator=seeded(g, 1, 2)), torch.rand(2, generator=seeded(g, 1, 2))
    ... )
    True
    """
    h = mix(*counters)
    return generator.manual_seed((h ^ (h >> 32)) & 0xFFFFFFFF)
