"""Loops over Philox words for the CPU, compiled by numba: the bits of philox.py, ten times as fast.

Importing this module needs numba (``pip install alphabar[fast]``); :func:`rng.loops` imports it if
that works. The compiled code is cached beside this file, or in numba's cache folder. numba does not
fuse a product and a sum into one rounding, so the formulas round as numpy does.

In all loops, ``low`` and ``high`` are the words of the keys, one for all samples or one for each,
``index`` the index of each sample, int64 all, and ``first`` the number of the first block. Arrays
of numbers have shape (batch, numbers of a sample) and are contiguous.
"""

# pyright: reportPossiblyUnboundVariable=false
# numba leaves out the branches of arguments that are None

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numba
import numpy as np
from numba import float32, int32, int64, uint32, uint64
from numba.core import types
from numba.extending import intrinsic

from .philox import COSINE, LOG, MULTIPLIERS, SINE, WEYL

_BLOCKS = 64  # blocks per chunk: the chunk stays in the cache, and the loops over it vectorise
_M0, _M1 = (np.uint64(word) for word in MULTIPLIERS)
_W0, _W1 = (np.uint32(word) for word in WEYL)
_L0, _L1, _L2, _L3 = (np.float32(c) for c in LOG)
_S0, _S1, _S2, _S3, _S4 = (np.float32(c) for c in SINE)
_C0, _C1, _C2, _C3, _C4 = (np.float32(c) for c in COSINE)
_NEARLY_ONE, _HALF = np.float32(1 - 2.0**-24), np.float32(0.5)
_ONE, _TWO = np.float32(1), np.float32(2)
_2_LOG_2, _QUARTER_TURN = np.float32(2 * math.log(2)), np.float32(2.0**-31)
_24_BITS = np.float32(2.0**-24)


def _jit(loop: Callable[..., Any]) -> Any:
    options = {"error_model": "numpy", "nogil": True}
    try:
        return numba.njit(cache=True, **options)(loop)
    except RuntimeError:  # no folder for the cache can be written
        return numba.njit(**options)(loop)


_inline = numba.njit(inline="always", error_model="numpy")


_intrinsic: Any = intrinsic


@_intrinsic
def _as_float(typing_context: Any, bits: Any) -> Any:
    """Return the float32 with these 32 bits."""

    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.bitcast(arguments[0], context.get_value_type(types.float32))

    return types.float32(types.uint32), code


@_intrinsic
def _as_bits(typing_context: Any, number: Any) -> Any:
    """Return the 32 bits of a float32."""

    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.bitcast(arguments[0], context.get_value_type(types.uint32))

    return types.uint32(types.float32), code


@_inline
def _words(block: Any, index: Any, step: Any, stream: Any, k0: Any, k1: Any) -> Any:
    """Return the four words of a block; see :func:`philox.words`."""
    x0, x1, x2, x3 = uint32(block), uint32(index), uint32(step), uint32(stream)
    for _ in range(10):
        p0, p1 = uint64(x0) * _M0, uint64(x2) * _M1
        high0, high1 = uint32(p0 >> uint64(32)), uint32(p1 >> uint64(32))
        x0, x1 = uint32(high1 ^ x1 ^ k0), uint32(p1)
        x2, x3 = uint32(high0 ^ x3 ^ k1), uint32(p0)
        k0, k1 = uint32(k0 + _W0), uint32(k1 + _W1)
    return x0, x1, x2, x3


@_inline
def _normal_pair(first: Any, second: Any) -> Any:
    """Return r cos φ and r sin φ of two words; see :func:`philox.normal`."""
    v = float32(int32(first & uint32(0x7FFFFFFF))) * _NEARLY_ONE + _HALF
    bits = _as_bits(v)
    m = _as_float((bits & uint32(0x7FFFFF)) | uint32(0x3F800000))
    s = (_TWO - m) / (m + _TWO)
    y = s * s
    log = ((y * _L0 + _L1) * y + _L2) * y + _L3
    r2 = float32(int32(157) - int32(bits >> uint32(23))) * _2_LOG_2 + log * s
    r = _as_float(_as_bits(np.sqrt(r2)) | (first & uint32(0x80000000)))
    t = float32(int32(second)) * _QUARTER_TURN
    y = t * t
    cosine = (((y * _C0 + _C1) * y + _C2) * y + _C3) * y + _C4
    sine = (((y * _S0 + _S1) * y + _S2) * y + _S3) * y + _S4
    return cosine * r, sine * t * r


@_inline
def _chunk(
    numbers: Any, block: Any, index: Any, step: Any, stream: Any, k0: Any, k1: Any, words: Any
) -> None:
    """Fill ``numbers``, shape (blocks, 4), with normal numbers from ``block`` on.

    ``words``: memory for the words, shape (4, blocks), uint32.
    """
    for j in range(_BLOCKS):
        words[0, j], words[1, j], words[2, j], words[3, j] = _words(
            block + j, index, step, stream, k0, k1
        )
    for j in range(_BLOCKS):
        a, b = _normal_pair(words[0, j], words[1, j])
        c, d = _normal_pair(words[2, j], words[3, j])
        numbers[j, 0], numbers[j, 1], numbers[j, 2], numbers[j, 3] = a, b, c, d


@_jit
def normal(
    start: int,
    stop: int,
    out: Any,
    low: Any,
    high: Any,
    index: Any,
    step: int,
    stream: int,
    first: int,
) -> None:
    """Fill ``out``, float32, with standard normal numbers, for samples ``start`` to ``stop``."""
    count = out.shape[1]
    words = np.empty((4, _BLOCKS), np.uint32)
    numbers = np.empty((_BLOCKS, 4), np.float32)
    flat = numbers.reshape(4 * _BLOCKS)
    for i in range(start, stop):
        k0, k1 = uint32(low[i % low.size]), uint32(high[i % high.size])
        for at in range(0, count, 4 * _BLOCKS):
            _chunk(numbers, int64(first + at // 4), index[i], step, stream, k0, k1, words)
            end = min(at + 4 * _BLOCKS, count)
            out[i, at:end] = flat[: end - at]


@_inline
def _squares(share: Any) -> Any:
    """Return the variance of (1 - s) a + s b for independent a and b of variance 1."""
    return (_ONE - share) * (_ONE - share) + share * share


@_inline
def _cells(places: Any, shares: Any, coarse: int, fine: int) -> None:
    """Fill the two cells around each of ``fine`` points, and the share of the second one."""
    scale = float32(coarse) * float32(1.0 / fine)
    for k in range(fine):
        at: Any = max((float32(k) + _HALF) * scale - _HALF, float32(0))
        below = min(int64(at), coarse - 1)
        above = min(below + 1, coarse - 1)
        places[0, k], places[1, k] = below, above
        shares[k] = at - float32(below) if above > below else float32(0)


@_jit
def _pyramid(
    parts: Any,
    k0: Any,
    k1: Any,
    index: Any,
    step: int,
    stream: int,
    iterations: int,
    discount: float,
    axes: int,
) -> None:
    """Fill ``parts``, shape (channels + 1, depth, height, width), for one sample."""
    channels, sizes = parts.shape[0] - 1, parts.shape[1:]
    # made here: the loops over arrays that came as arguments, and may overlap, do not vectorise
    words = np.empty((4, _BLOCKS), np.uint32)
    numbers = np.empty((_BLOCKS, 4), np.float32)
    octave = np.empty(channels * sizes[0] * sizes[1] * sizes[2] + 4 * _BLOCKS, np.float32)
    places = np.empty((3, 2, max(sizes)), np.int64)
    shares = np.empty((3, max(sizes)), np.float32)
    plane = np.empty((sizes[2], sizes[1]), np.float32)
    lines = np.empty((sizes[2], sizes[1]), np.float32)
    total = np.empty((sizes[2], sizes[1]), np.float32)
    grid, largest = np.empty(3, np.int64), np.empty(3, np.int64)
    flat = numbers.reshape(4 * _BLOCKS)
    variance = parts[channels]
    variance[:] = 1
    block = 0
    for i in range(iterations):
        four = _words(block, index, step, stream, k0, k1)
        r = _TWO + _TWO * (float32(four[0] >> uint32(8)) * _24_BITS)
        power = float32(1)
        for _ in range(i):
            power = power * r
        block += 1
        last = False
        for axis in range(3):
            largest[axis] = max(1, sizes[axis] >> i)
            grid[axis] = max(1, int64(float32(sizes[axis]) / power))
            _cells(places[axis], shares[axis], grid[axis], sizes[axis])
            last = last or (axis >= 3 - axes and grid[axis] == 1)
        count = channels * largest[0] * largest[1] * largest[2]
        for at in range(0, count, 4 * _BLOCKS):
            _chunk(numbers, int64(block + at // 4), index, step, stream, k0, k1, words)
            octave[at : at + 4 * _BLOCKS] = flat
        block += (count + 3) // 4
        factor, square = float32(discount**i), float32(discount ** (2 * i))
        cells = octave[:count].reshape((channels, largest[0], largest[1], largest[2]))
        if i == 0:  # a grid of all elements, of factor 1
            parts[:channels] = cells
        else:
            for c in range(channels):
                for z in range(sizes[0]):
                    z0, z1, sz = places[0, 0, z], places[0, 1, z], shares[0, z]
                    # with the heights side by side, the loops over them vectorise
                    for x in range(grid[2]):
                        column, line = plane[x], lines[x]
                        for y in range(grid[1]):
                            column[y] = (_ONE - sz) * cells[c, z0, y, x] + sz * cells[c, z1, y, x]
                        for y in range(sizes[1]):
                            sy = shares[1, y]
                            below = column[uint32(places[1, 0, y])]
                            above = column[uint32(places[1, 1, y])]
                            line[y] = (_ONE - sy) * below + sy * above
                    for x in range(sizes[2]):
                        left, right = lines[places[2, 0, x]], lines[places[2, 1, x]]
                        sx, row = shares[2, x], total[x]
                        for y in range(sizes[1]):
                            row[y] = factor * ((_ONE - sx) * left[y] + sx * right[y])
                    for y in range(sizes[1]):
                        row = parts[c, z, y]
                        for x in range(sizes[2]):
                            row[x] += total[x, y]
        for z in range(sizes[0]):
            for y in range(sizes[1]):
                spread = _squares(shares[0, z]) * _squares(shares[1, y])
                row = variance[z, y]
                for x in range(sizes[2]):
                    row[x] += square * (spread * _squares(shares[2, x]))
        if last:
            break
    row = variance.reshape(variance.size)
    for k in range(row.size):
        row[k] = _ONE / np.sqrt(row[k])


@_jit
def pyramid(
    start: int,
    stop: int,
    out: Any,
    low: Any,
    high: Any,
    index: Any,
    step: int,
    stream: int,
    iterations: int,
    discount: float,
    axes: int,
) -> None:
    """Fill ``out`` with the parts of pyramid noise; see :class:`noise.Pyramid`.

    ``out``: shape (batch, channels + 1, depth, height, width), float32, whose first 3 - ``axes``
    sizes after the channels are 1.
    """
    for i in range(start, stop):
        k0, k1 = uint32(low[i % low.size]), uint32(high[i % high.size])
        _pyramid(out[i], k0, k1, index[i], step, stream, iterations, discount, axes)


@_jit
def normal_steps(out: Any, low: Any, high: Any, index: Any, step: int, stream: int) -> None:
    """Fill ``out``, shape (steps, batch, numbers), with :func:`normal` from a first step on."""
    for k in range(out.shape[0]):
        normal(0, out.shape[1], out[k], low, high, index, step + k, stream, 0)


@_jit
def noised(
    start: int,
    stop: int,
    x0: Any,
    levels: Any,
    x_t: Any,
    target: Any,
    low: Any,
    high: Any,
    index: Any,
    step: int,
    stream: int,
    picks: Any,
    shift: Any,
    grids: Any,
    jitter: Any,
) -> None:
    """Fill ``x_t`` with α x_0 + σ ε_x and ``target`` with c0 x_0 + c1 ε_y; ε is not stored.

    The numbers of :func:`normal` are ε; ``shift`` and ``grids`` make ε_y of them, ``jitter`` makes
    ε_x of ε_y. Each of these, and ``picks``, may be None, and then costs nothing: numba compiles a
    loop for each choice.

    Args:
        start, stop: the samples.
        x0: clean batch, shape (batch, count), float32 like all arrays of levels and results.
        levels: α, σ, c0, c1 in the first four rows, shape (4 or more, batch).
        picks: (table, t, stream): draw uniform timesteps, ⌈T (1 - u)⌉ - 1 with the first u of
            :func:`uniform64` in this stream, fill ``t``, int64, with them and ``levels`` with these
            columns of the table, shape (4 or more, T).
        shift: what is added to each channel, shape (batch, channels).
        grids: pyramid noise: (stream, iterations, discount, axes, (channels, depth, height,
            width)).
        jitter: (stream, factor of each sample, shape (batch,), factor of all).
    """
    count = x0.shape[1]
    words = np.empty((4, _BLOCKS), np.uint32)
    numbers = np.empty((_BLOCKS, 4), np.float32)
    flat = numbers.reshape(4 * _BLOCKS)
    others = np.empty((_BLOCKS, 4), np.float32)
    other = others.reshape(4 * _BLOCKS)
    if grids is not None:
        channels, depth, height, width = grids[4]
        parts = np.empty((channels + 1, depth, height, width), np.float32)
        space = depth * height * width
        rough, factor = parts[:channels].reshape(count), parts[channels].reshape(space)
    for i in range(start, stop):
        k0, k1 = uint32(low[i % low.size]), uint32(high[i % high.size])
        if picks is not None:
            table, t = picks[0], picks[1]
            four = _words(0, index[i], step, picks[2], k0, k1)
            large, small = four[0] >> uint32(5), four[1] >> uint32(6)
            u = (large * 2.0**26 + small) * 2.0**-53
            t[i] = max(int64(np.ceil((1.0 - u) * table.shape[1])) - 1, 0)
            for row in range(levels.shape[0]):
                levels[row, i] = table[row, t[i]]
        alpha, sigma = levels[0, i], levels[1, i]
        c0, c1 = levels[2, i], levels[3, i]
        if grids is not None:
            _pyramid(parts, k0, k1, index[i], step, grids[0], grids[1], grids[2], grids[3])
        for at in range(0, count, 4 * _BLOCKS):
            _chunk(numbers, int64(at // 4), index[i], step, stream, k0, k1, words)
            end = min(at + 4 * _BLOCKS, count)
            if shift is not None:
                part, run, k = shift[i], count // shift.shape[1], at
                while k < end:  # channel by channel
                    channel = k // run
                    last = min(end, (channel + 1) * run)
                    flat[k - at : last - at] += part[channel]
                    k = last
            if grids is not None:
                k = at
                while k < end:
                    place = k % space
                    last = min(end, k + space - place)
                    for j in range(last - k):
                        e = flat[k - at + j] + rough[k + j]
                        flat[k - at + j] = e * factor[place + j]
                    k = last
            # a loop for each result: slices of few arrays vectorise
            clean, mixed, aim = x0[i, at:end], x_t[i, at:end], target[i, at:end]
            for k in range(end - at):
                aim[k] = c0 * clean[k] + c1 * flat[k]
            if jitter is not None:
                _chunk(others, int64(at // 4), index[i], step, jitter[0], k0, k1, words)
                share, strength = jitter[1][i], float32(jitter[2])
                for k in range(end - at):
                    flat[k] += other[k] * share * strength
            for k in range(end - at):
                mixed[k] = alpha * clean[k] + sigma * flat[k]


@_jit
def uniform32(
    out: Any, low: Any, high: Any, index: Any, step: int, stream: int, first: int
) -> None:
    """Fill ``out``, float32, with multiples of 2^-24 in [0, 1)."""
    count = out.shape[1]
    for i in range(out.shape[0]):
        k0, k1 = uint32(low[i % low.size]), uint32(high[i % high.size])
        for block in range((count + 3) // 4):
            four = _words(first + block, index[i], step, stream, k0, k1)
            for j in range(min(4, count - 4 * block)):
                out[i, 4 * block + j] = float32(four[j] >> uint32(8)) * _24_BITS


@_jit
def uniform64(
    out: Any, low: Any, high: Any, index: Any, step: int, stream: int, first: int
) -> None:
    """Fill ``out``, float64, with multiples of 2^-53 in [0, 1)."""
    count = out.shape[1]
    for i in range(out.shape[0]):
        k0, k1 = uint32(low[i % low.size]), uint32(high[i % high.size])
        for block in range((count + 1) // 2):
            four = _words(first + block, index[i], step, stream, k0, k1)
            for j in range(min(2, count - 2 * block)):
                large, small = four[2 * j] >> uint32(5), four[2 * j + 1] >> uint32(6)
                out[i, 2 * block + j] = (large * 2.0**26 + small) * 2.0**-53


@_jit
def bits64(out: Any, low: Any, high: Any, index: Any, step: int, stream: int, first: int) -> None:
    """Fill ``out``, int64, with 64 random bits in each number."""
    count = out.shape[1]
    for i in range(out.shape[0]):
        k0, k1 = uint32(low[i % low.size]), uint32(high[i % high.size])
        for block in range((count + 1) // 2):
            four = _words(first + block, index[i], step, stream, k0, k1)
            for j in range(min(2, count - 2 * block)):
                out[i, 2 * block + j] = int64(
                    uint64(four[2 * j]) << uint64(32) | uint64(four[2 * j + 1])
                )


_TILE = 2048  # numbers of a vector in a pass of combine: the results stay in the cache


@_intrinsic
def _vector(typing_context: Any, address: Any) -> Any:
    """Return the pointer to the float32 numbers at an address."""

    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.inttoptr(arguments[0], context.get_value_type(signature.return_type))

    return types.CPointer(types.float32)(types.int64), code


@_intrinsic
def _fma(typing_context: Any, a: Any, b: Any, c: Any) -> Any:
    """Return a b + c, rounded once: as torch does on processors with that instruction."""

    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.fma(*arguments)

    return types.float32(types.float32, types.float32, types.float32), code


@_jit
def _combine(addresses: Any, starts: Any, index: Any, coefficients: Any, count: int) -> None:
    given = addresses.size - starts.size + 1
    for at in range(0, count, _TILE):
        size = min(_TILE, count - at)
        for r in range(starts.size - 1):
            out = numba.carray(_vector(addresses[given + r] + 4 * at), (size,))
            j, end = starts[r], starts[r + 1]
            if j == end:
                out[:] = _HALF - _HALF
                continue
            a = numba.carray(_vector(addresses[index[j]] + 4 * at), (size,))
            c = coefficients[j]
            j += 1
            if c == _ONE and j < end:
                b = numba.carray(_vector(addresses[index[j]] + 4 * at), (size,))
                d = coefficients[j]
                j += 1
                for k in range(size):
                    out[k] = _fma(b[k], d, a[k])
            else:
                for k in range(size):
                    out[k] = a[k] * c
            while j < end:
                b = numba.carray(_vector(addresses[index[j]] + 4 * at), (size,))
                d = coefficients[j]
                j += 1
                for k in range(size):
                    out[k] = _fma(b[k], d, out[k])


def packed(rows: Sequence[Sequence[tuple[int, float]]]) -> Any:
    """Return the rows of :func:`combine` as it takes them."""
    starts = np.cumsum([0, *map(len, rows)])
    index = np.array([k for row in rows for k, _ in row], np.int64)
    return starts, index, np.array([c for row in rows for _, c in row], np.float32)


def combine(given: Sequence[Any], made: Sequence[Any], rows: Any) -> None:
    """Fill ``made`` with linear combinations of ``given``, in one pass over the memory.

    All are contiguous float32 tensors of one size. ``rows``: of :func:`packed`, pairs of an index
    and a coefficient for each result; the indices after those of ``given`` are earlier results.
    """
    addresses = [one.data_ptr() for one in (*given, *made)]
    if 0 in addresses:
        raise ValueError("a tensor without memory, fake or on the meta device, cannot be combined")
    _combine(np.array(addresses, np.int64), *rows, given[0].numel())
