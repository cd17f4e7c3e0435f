"""Philox4x32-10 and the numbers made from its words, in operations that numpy and torch share.

Source: Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3". Four counter words of 32
bits and a key of 64 bits give four random words. The code uses integer arithmetic that numpy and
torch share: numpy on the CPU, where its calls cost half as much, torch on other devices and in
compiled code. ``compiled.py`` has the same formulas as loops.

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
from collections.abc import Callable
from types import ModuleType
from typing import Any

from torch import Tensor

WORD = 0xFFFFFFFF
"""The largest word of 32 bits."""
MULTIPLIERS = 0xD2511F53, 0xCD9E8D57
WEYL = 0x9E3779B9, 0xBB67AE85  # added to the key in each round

Words = tuple[Any, Any, Any, Any]
Formula = Callable[[ModuleType, Words], tuple[Any, ...]]


def words(
    key: tuple[Any, Any], block: Any, index: Any, step: Any, stream: int
) -> tuple[Any, Any, Any, Any]:
    """Return the four words of every block, int64 arrays (batch, blocks) of numpy or torch.

    Only the low 32 bits count. ``key``: two words, numbers or arrays (batch, 1). ``block``: (1,
    blocks), ``index``: (batch, 1), ``step``: (1, 1).
    """
    # before the third round, the halves hi(p1) ^ x1 ^ k0 and hi(p0) ^ x3 ^ k1 do not depend on both
    # block and sample: combine the smaller arrays first. A product may wrap to a negative int64
    # with the correct bits; the masks remove its sign
    (m0, m1), (w0, w1), (k0, k1) = MULTIPLIERS, WEYL, key
    p0, p1 = block * m0, step * m1
    x0, x1, x2, x3 = (
        (((p1 >> 32) ^ k0) & WORD) ^ index,
        p1,
        (((p0 >> 32) ^ stream) & WORD) ^ k1,
        p0,
    )
    p0, p1 = x0 * m0, x2 * m1
    x0, x1, x2, x3 = (
        ((p1 >> 32) ^ x1 ^ (k0 + w0)) & WORD,
        p1,
        (((p0 >> 32) ^ (k1 + w1)) & WORD) ^ (x3 & WORD),
        p0,
    )
    p0, p1 = x0 * m0, x2 * m1
    x0 = p1 >> 32
    x0 ^= x1 ^ (k0 + 2 * w0)
    x0 &= WORD
    x0, x1, x2, x3 = x0, p1, (((p0 >> 32) ^ (k1 + 2 * w1)) & WORD) ^ (x3 & WORD), p0
    for r in range(3, 10):
        x0 *= m0
        x2 *= m1
        high0, high2 = x2 >> 32, x0 >> 32
        high0 ^= x1
        high0 ^= k0 + r * w0
        high0 &= WORD
        high2 ^= x3
        high2 ^= k1 + r * w1
        high2 &= WORD
        x0, x1, x2, x3 = high0, x2, high2, x0
    return x0, x1, x2, x3


def _cast(x: Any, dtype: Any) -> Any:
    return x.to(dtype) if isinstance(x, Tensor) else x.astype(dtype)


def normal(xp: ModuleType, four: Words) -> tuple[Any, Any]:
    """Return r cos φ and r sin φ of pairs of words, float32.

    r² = -2 log u with u from 31 bits of the first word, so u >= 2^-32 and r <= 6.66. φ in [-π/2,
    π/2] comes from the second word, and the sign of r from the remaining bit.
    """
    first, second = _pairs(xp, four, xp.int32)
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
    q = y * LOG[0]  # 2 log(2 / m) = 4 artanh(s), s = (2 - m) / (2 + m) in (0, 1/3]
    for c in LOG[1:-1]:
        q += c
        q *= y
    q += LOG[-1]
    q *= s
    r2 += q
    r = (xp.sqrt(r2).view(xp.int32) | (first & -0x80000000)).view(xp.float32)
    t *= 2.0**-31  # φ = π t / 2
    y = t * t
    cosine, sine = y * COSINE[0], y * SINE[0]
    for c, d in zip(COSINE[1:-1], SINE[1:-1], strict=True):
        cosine += c
        cosine *= y
        sine += d
        sine *= y
    cosine += COSINE[-1]
    sine += SINE[-1]
    cosine *= r
    sine *= t
    sine *= r
    return cosine, sine


# near-minimax coefficients, highest power first: 4 artanh(√y) / √y to 7e-7, sin(π √y / 2) / √y to
# 7e-9, cos(π √y / 2) to 5e-8
LOG = 0.6848259568214417, 0.7917383909225464, 1.3335222005844116, 3.9999992847442627
SINE = (
    0.00015167852689046413,
    -0.004674157593399286,
    0.07968992739915848,
    -0.6459637880325317,
    1.5707963705062866,
)
COSINE = (
    0.0008581906440667808,
    -0.020810628309845924,
    0.2536507546901703,
    -1.2336982488632202,
    0.9999999403953552,
)


def uniform32(xp: ModuleType, four: Words) -> tuple[Any, Any]:
    """Return a uniform number for each word, from its high 24 bits."""
    first, second = (
        _cast((word & WORD) >> 8, xp.float32) * 2.0**-24 for word in _pairs(xp, four, xp.int64)
    )
    return first, second


def uniform64(xp: ModuleType, four: Words) -> tuple[Any]:
    """Return a uniform number for each pair of words: 27 bits of the first, 26 of the second."""
    first, second = _pairs(xp, four, xp.int64)
    high, low = _cast((first & WORD) >> 5, xp.float64), _cast((second & WORD) >> 6, xp.float64)
    return ((high * 2.0**26 + low) * 2.0**-53,)


def bits64(xp: ModuleType, four: Words) -> tuple[Any]:
    """Return both words of each pair."""
    first, second = _pairs(xp, four, xp.int64)
    return ((first << 32) | (second & WORD),)


def _pairs(xp: ModuleType, four: Words, dtype: Any) -> tuple[Any, Any]:
    """Return the first words of both pairs, shape (2, batch, blocks), and the second ones."""
    x0, x1, x2, x3 = (_cast(word, dtype) for word in four)
    return xp.stack([x0, x2]), xp.stack([x1, x3])
