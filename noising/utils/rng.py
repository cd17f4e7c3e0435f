"""Counter-based randomness: the draws of sample i at step s depend only on (seed, s, i).

So they are the same for 1 and N processes, for any accumulation, and after a resume. They do not
change the global generators, and the user's own use of those does not change them. The function is
Philox4x32-10 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3"): four counter
words of 32 bits and a key of 64 bits give four random words.

    key:      the 64 bits of the seed, low word first
    counter:  (block of four elements, index of the sample, step or number of the draw, stream)

The code uses integer arithmetic that numpy and torch share: numpy on the CPU, where its calls cost
half as much, torch on other devices and in compiled code. No library draws these numbers on every
device: torch's own Philox (``torch.func._random``) has no CPU kernel, numpy's is the 4x64 variant
and draws for one key at a time, and torchrng and the bindings of Random123 are not packaged for
every platform.

Normal numbers use the Box-Muller method, two words for each pair. Every operation (+, -, ·, /, √ in
float32) has exactly one IEEE 754 rounding, and log, sine and cosine are polynomials of these
operations. So the bits do not depend on the position in a batch, the processor or the device. They
are within 3e-6 + 2^-23 / r of exact arithmetic on the same words (measured: 9e-7), where r, up to
6.66, is the radius: polynomials and roundings make relative errors below 2e-7 of r and of the
direction, and u in r = √(-2 log u) has 24 bits. A compiler that rounds a product and a sum
together, or whose √ is off by a bit, stays within that bound too.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Iterator, Sequence
from enum import IntEnum
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor

_WORD = 0xFFFFFFFF
_MULTIPLIERS = 0xD2511F53, 0xCD9E8D57
_WEYL = 0x9E3779B9, 0xBB67AE85  # added to the key in each round
_CELLS = 16384  # blocks per tile on the CPU, so that their arrays stay in the cache

_MASK = (1 << 64) - 1
_Words = tuple[Any, Any, Any, Any]
_Formula = Callable[[ModuleType, _Words], tuple[Any, ...]]


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


def stream_of(name: str, number: int = 0) -> int:
    """Return the stream of a name, at least 2^31.

    ``number`` distinguishes streams of the same name.

    >>> stream_of("offset") != stream_of("offset", 1), stream_of("offset") >= 2**31
    (True, True)
    """
    hashed = 0x811C9DC5  # FNV-1a, written out so that torch.compile can trace it
    for letter in f"{name} {number}":
        hashed = (hashed ^ ord(letter)) * 0x01000193 & _WORD
    return 1 << 31 | hashed


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
        index: Sequence[int] | Tensor,
        *,
        step: int,
        stream: int,
        device: torch.device | str = "cpu",
    ) -> None:
        self.index = torch.as_tensor(index, dtype=torch.int64)
        self.step, self.stream, self.device = step, int(stream), torch.device(device)
        self._require_in_range()
        self._seeds = [
            whole_seed(seed) & _MASK for seed in (seeds if isinstance(seeds, Sequence) else [seeds])
        ]
        self._block = 0

    @property
    def batch(self) -> int:
        """The number of samples."""
        return self.index.shape[0]

    def normal(self, *shape: int, out: Tensor | None = None) -> Tensor:
        """Return standard normal numbers, shape (batch, *shape), float32.

        ``out``: a contiguous tensor for the result.

        >>> Draws(0, [0, 1], step=0, stream=0).normal(3, 4).shape
        torch.Size([2, 3, 4])
        """
        return self._filled(_normal, 4, torch.float32, shape, out)

    def uniform(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """Return numbers in [0, 1), shape (batch, *shape).

        They are multiples of 2^-24, or of 2^-53 in float64.

        >>> float(Draws(0, [0], step=0, stream=0).uniform(1000, dtype=torch.float64).max()) < 1
        True
        """
        if dtype == torch.float64:
            return self._filled(_uniform64, 2, dtype, shape)
        return self._filled(_uniform32, 4, torch.float32, shape)

    def bits(self, *shape: int) -> Tensor:
        """Return numbers of 64 random bits, shape (batch, *shape), int64."""
        return self._filled(_bits64, 2, torch.int64, shape)

    def _filled(
        self,
        formula: _Formula,
        each: int,
        dtype: torch.dtype,
        shape: Sequence[int],
        out: Tensor | None = None,
    ) -> Tensor:
        """Return ``formula`` of the next blocks; each block gives ``each`` numbers."""
        count = math.prod(shape)
        blocks = -(-count // each)
        first, self._block = self._block, self._block + blocks
        if self._block > 1 << 32:
            raise ValueError(
                f"a sample draws at most 2^32 blocks of {each} numbers at a step, got {self._block}"
            )
        whole = out if out is not None and count == each * blocks else None
        if whole is None:
            whole = torch.empty((self.batch, each * blocks), dtype=dtype, device=self.device)
        self._fill(whole.view(self.batch, blocks, 2, each // 2), formula, first)
        drawn = whole.view(self.batch, -1)[:, :count].reshape(self.batch, *shape)
        return drawn if out is None or whole is out else out.copy_(drawn)

    def _fill(self, out: Tensor, formula: _Formula, first: int) -> None:
        """Fill ``out``, shape (batch, blocks, 2, numbers of two words), from block ``first`` on."""
        blocks = out.shape[1]
        if out.device.type != "cpu" or torch.compiler.is_compiling():
            block = torch.arange(first, first + blocks, device=out.device)[None]
            index, step = (
                self.index.to(out.device)[:, None],
                torch.full((1, 1), self.step, device=out.device),
            )
            words = _words(self._key(slice(None), torch), block, index, step, self.stream)
            for j, numbers in enumerate(formula(torch, words)):
                out[..., j] = numbers.movedim(0, -1)
            return
        index, step, array = (
            self.index.numpy()[:, None],
            np.full((1, 1), self.step, dtype=np.int64),
            out.numpy(),
        )
        for rows, low, high in _tiles(self.batch, blocks):
            block = np.arange(first + low, first + high, dtype=np.int64)[None]
            words = _words(self._key(rows, np), block, index[rows], step, self.stream)
            for j, numbers in enumerate(formula(np, words)):
                for half in range(2):
                    array[rows, low:high, half, j] = numbers[half]

    def _key(self, rows: slice, xp: ModuleType) -> tuple[Any, Any]:
        """Return the key's words: two numbers, or two arrays (batch, 1) for one seed per sample."""
        if len(self._seeds) == 1:
            return self._seeds[0] & _WORD, self._seeds[0] >> 32
        low, high = (
            [seed & _WORD for seed in self._seeds[rows]],
            [seed >> 32 for seed in self._seeds[rows]],
        )
        if xp is np:
            return np.array(low)[:, None], np.array(high)[:, None]
        return torch.tensor(low, device=self.device)[:, None], torch.tensor(
            high, device=self.device
        )[:, None]

    def _require_in_range(self) -> None:
        low, high = 0, 0
        if self.index.device.type == "cpu" and self.batch and not torch.compiler.is_compiling():
            low, high = (int(end) for end in self.index.aminmax())
        for name, value in (
            ("the index of a sample", low),
            ("the index of a sample", high),
            ("the step", self.step),
        ):
            if not 0 <= value <= _WORD:
                raise ValueError(f"{name} must lie in 0 ... 2^32 - 1, got {value}")


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


def _words(
    key: tuple[Any, Any], block: Any, index: Any, step: Any, stream: int
) -> tuple[Any, Any, Any, Any]:
    """Return the four words of every block, int64 arrays (batch, blocks) of numpy or torch.

    Only the low 32 bits count. ``key``: two words, numbers or arrays (batch, 1). ``block``: (1,
    blocks), ``index``: (batch, 1), ``step``: (1, 1).
    """
    # before the third round, the halves hi(p1) ^ x1 ^ k0 and hi(p0) ^ x3 ^ k1 do not depend on both
    # block and sample: combine the smaller arrays first. A product may wrap to a negative int64
    # with the correct bits; the masks remove its sign
    (m0, m1), (w0, w1), (k0, k1) = _MULTIPLIERS, _WEYL, key
    p0, p1 = block * m0, step * m1
    x0, x1, x2, x3 = (
        (((p1 >> 32) ^ k0) & _WORD) ^ index,
        p1,
        (((p0 >> 32) ^ stream) & _WORD) ^ k1,
        p0,
    )
    p0, p1 = x0 * m0, x2 * m1
    x0, x1, x2, x3 = (
        ((p1 >> 32) ^ x1 ^ (k0 + w0)) & _WORD,
        p1,
        (((p0 >> 32) ^ (k1 + w1)) & _WORD) ^ (x3 & _WORD),
        p0,
    )
    p0, p1 = x0 * m0, x2 * m1
    x0 = p1 >> 32
    x0 ^= x1 ^ (k0 + 2 * w0)
    x0 &= _WORD
    x0, x1, x2, x3 = x0, p1, (((p0 >> 32) ^ (k1 + 2 * w1)) & _WORD) ^ (x3 & _WORD), p0
    for r in range(3, 10):
        x0 *= m0
        x2 *= m1
        high0, high2 = x2 >> 32, x0 >> 32
        high0 ^= x1
        high0 ^= k0 + r * w0
        high0 &= _WORD
        high2 ^= x3
        high2 ^= k1 + r * w1
        high2 &= _WORD
        x0, x1, x2, x3 = high0, x2, high2, x0
    return x0, x1, x2, x3


def _cast(x: Any, dtype: Any) -> Any:
    return x.to(dtype) if isinstance(x, Tensor) else x.astype(dtype)


def _normal(xp: ModuleType, words: _Words) -> tuple[Any, Any]:
    """Return r cos φ and r sin φ of pairs of words, float32.

    r² = -2 log u with u from 31 bits of the first word, so u >= 2^-32 and r <= 6.66. φ in [-π/2,
    π/2] comes from the second word, and the sign of r from the remaining bit.
    """
    first, second = _pairs(xp, words, xp.int32)
    t = _cast(second, xp.float32)
    # v = 2^31 u lies in [1/2, 2^31): the factor prevents rounding of the largest to 2^31
    v = _cast(first & 0x7FFFFFFF, xp.float32)
    v *= 1 - 2.0**-24
    v += 0.5
    # v = 2^e m, m in [1, 2): r² = 2 (30 - e) log 2 + 2 log(2 / m), both terms >= 0; the bits hold
    # e + 127
    bits = v.view(xp.int32)
    r2 = _cast(157 - (bits >> 23), xp.float32)
    r2 *= 2 * math.log(2)
    m = ((bits & 0x7FFFFF) | 0x3F800000).view(xp.float32)
    s = 2.0 - m
    m += 2.0
    s /= m
    y = s * s
    q = y * _LOG[0]  # 2 log(2 / m) = 4 artanh(s), s = (2 - m) / (2 + m) in (0, 1/3]
    for c in _LOG[1:-1]:
        q += c
        q *= y
    q += _LOG[-1]
    q *= s
    r2 += q
    r = (xp.sqrt(r2).view(xp.int32) | (first & -0x80000000)).view(xp.float32)
    t *= 2.0**-31  # φ = π t / 2
    y = t * t
    cosine, sine = y * _COSINE[0], y * _SINE[0]
    for c, d in zip(_COSINE[1:-1], _SINE[1:-1], strict=True):
        cosine += c
        cosine *= y
        sine += d
        sine *= y
    cosine += _COSINE[-1]
    sine += _SINE[-1]
    cosine *= r
    sine *= t
    sine *= r
    return cosine, sine


# near-minimax coefficients, highest power first: 4 artanh(√y) / √y to 7e-7, sin(π √y / 2) / √y to
# 7e-9, cos(π √y / 2) to 5e-8
_LOG = 0.6848259568214417, 0.7917383909225464, 1.3335222005844116, 3.9999992847442627
_SINE = (
    0.00015167852689046413,
    -0.004674157593399286,
    0.07968992739915848,
    -0.6459637880325317,
    1.5707963705062866,
)
_COSINE = (
    0.0008581906440667808,
    -0.020810628309845924,
    0.2536507546901703,
    -1.2336982488632202,
    0.9999999403953552,
)


def _uniform32(xp: ModuleType, words: _Words) -> tuple[Any, Any]:
    """Return a uniform number for each word, from its high 24 bits."""
    first, second = (
        _cast((word & _WORD) >> 8, xp.float32) * 2.0**-24 for word in _pairs(xp, words, xp.int64)
    )
    return first, second


def _uniform64(xp: ModuleType, words: _Words) -> tuple[Any]:
    """Return a uniform number for each pair of words: 27 bits of the first, 26 of the second."""
    first, second = _pairs(xp, words, xp.int64)
    high, low = _cast((first & _WORD) >> 5, xp.float64), _cast((second & _WORD) >> 6, xp.float64)
    return ((high * 2.0**26 + low) * 2.0**-53,)


def _bits64(xp: ModuleType, words: _Words) -> tuple[Any]:
    """Return both words of each pair."""
    first, second = _pairs(xp, words, xp.int64)
    return ((first << 32) | (second & _WORD),)


def _pairs(xp: ModuleType, words: _Words, dtype: Any) -> tuple[Any, Any]:
    """Return the first words of both pairs, shape (2, batch, blocks), and the second ones."""
    x0, x1, x2, x3 = (_cast(word, dtype) for word in words)
    return xp.stack([x0, x2]), xp.stack([x1, x3])


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
