"""Kernels for a GPU: Philox noise, the formulas of philox.py, one launch for a draw; combinations.

Importing this module needs triton, which torch's CUDA builds bring; :func:`rng.kernels` imports it
if that works. ``tl.philox`` is Philox4x32-10. The kernels forbid fused rounding, so they give the
bits of the CPU.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import torch
import triton  # pyright: ignore[reportMissingImports]
import triton.language as tl  # pyright: ignore[reportMissingImports]
from torch import Tensor

from .philox import COSINE, LOG, SINE

_TILE = 1024  # numbers of each vector in a program of combine
_BLOCKS = 256  # Philox blocks of four numbers in a program
_NEARLY_ONE = tl.constexpr(1 - 2.0**-24)
_2_LOG_2 = tl.constexpr(2 * math.log(2))
_QUARTER_TURN = tl.constexpr(2.0**-31)
_L0, _L1, _L2, _L3 = (tl.constexpr(c) for c in LOG)
_S0, _S1, _S2, _S3, _S4 = (tl.constexpr(c) for c in SINE)
_C0, _C1, _C2, _C3, _C4 = (tl.constexpr(c) for c in COSINE)


@triton.jit
def _pair(first, second):
    """Return r cos φ and r sin φ of two words; see :func:`philox.normal`."""
    a = first.to(tl.int32, bitcast=True)
    v = (a & 0x7FFFFFFF).to(tl.float32) * _NEARLY_ONE + 0.5
    bits = v.to(tl.int32, bitcast=True)
    m = ((bits & 0x7FFFFF) | 0x3F800000).to(tl.float32, bitcast=True)
    s = tl.div_rn(2.0 - m, m + 2.0)
    y = s * s
    log = ((y * _L0 + _L1) * y + _L2) * y + _L3
    r2 = (157 - (bits >> 23)).to(tl.float32) * _2_LOG_2 + log * s
    radius = tl.sqrt_rn(r2).to(tl.uint32, bitcast=True)
    sign = (first >> 31) << 31
    r = (radius | sign).to(tl.float32, bitcast=True)
    t = second.to(tl.int32, bitcast=True).to(tl.float32) * _QUARTER_TURN
    y = t * t
    cosine = (((y * _C0 + _C1) * y + _C2) * y + _C3) * y + _C4
    sine = (((y * _S0 + _S1) * y + _S2) * y + _S3) * y + _S4
    return cosine * r, sine * t * r


@triton.jit
def _numbers(
    keys, index, sample, chunk, step, stream, first, ONE_KEY: tl.constexpr, BLOCKS: tl.constexpr
):
    """Return 4 · BLOCKS standard normal numbers of a sample."""
    key = tl.load(keys) if ONE_KEY else tl.load(keys + sample)
    block = first + chunk.to(tl.int64) * BLOCKS + tl.arange(0, BLOCKS)
    w0, w1, w2, w3 = tl.philox(
        key,
        block.to(tl.uint32),
        (tl.load(index + sample) + tl.zeros_like(block)).to(tl.uint32),
        (step + tl.zeros_like(block)).to(tl.uint32),
        (stream + tl.zeros_like(block)).to(tl.uint32),
    )
    n0, n1 = _pair(w0, w1)
    n2, n3 = _pair(w2, w3)
    return tl.interleave(tl.interleave(n0, n2), tl.interleave(n1, n3))


@triton.jit(do_not_specialize=["step", "stream", "first", "count"])
def _normal(
    out, keys, index, step, stream, first, count, ONE_KEY: tl.constexpr, BLOCKS: tl.constexpr
):
    chunk, sample = tl.program_id(0), tl.program_id(1)
    numbers = _numbers(keys, index, sample, chunk, step, stream, first, ONE_KEY, BLOCKS)
    at = chunk.to(tl.int64) * 4 * BLOCKS + tl.arange(0, 4 * BLOCKS)
    tl.store(out + sample.to(tl.int64) * count + at, numbers, mask=at < count)


@triton.jit(do_not_specialize=["step", "stream", "count"])
def _noised(
    x0,
    levels,
    x_t,
    target,
    keys,
    index,
    step,
    stream,
    count,
    batch,
    ONE_KEY: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    chunk, sample = tl.program_id(0), tl.program_id(1)
    e = _numbers(keys, index, sample, chunk, step, stream, 0, ONE_KEY, BLOCKS)
    at = chunk.to(tl.int64) * 4 * BLOCKS + tl.arange(0, 4 * BLOCKS)
    inside = at < count
    place = sample.to(tl.int64) * count + at
    x = tl.load(x0 + place, mask=inside, other=0.0).to(tl.float32)
    alpha, sigma = tl.load(levels + sample), tl.load(levels + batch + sample)
    c0, c1 = tl.load(levels + 2 * batch + sample), tl.load(levels + 3 * batch + sample)
    tl.store(x_t + place, (alpha * x + sigma * e).to(x_t.dtype.element_ty), mask=inside)
    tl.store(target + place, c0 * x + c1 * e, mask=inside)


@triton.jit(do_not_specialize=["count"])
def _combine(
    given, made, coefficients, count, STARTS: tl.constexpr, INDEX: tl.constexpr, BLOCK: tl.constexpr
):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < count
    vectors = ()
    for i in tl.static_range(len(given)):
        vectors = vectors + (tl.load(given[i] + at, mask=inside, other=0.0).to(tl.float32),)  # noqa: RUF005
    for r in tl.static_range(len(STARTS) - 1):
        total = tl.zeros([BLOCK], tl.float32)
        for j in tl.static_range(STARTS[r], STARTS[r + 1]):
            total += coefficients[j] * vectors[INDEX[j]]
        tl.store(made[r] + at, total.to(made[r].dtype.element_ty), mask=inside)
        vectors = vectors + (total,)  # noqa: RUF005


def packed(rows: Sequence[Sequence[tuple[int, float]]]) -> Any:
    """Return the rows of :func:`combine` as it takes them."""
    starts = tuple(accumulate(map(len, rows), initial=0))
    pairs = [pair for row in rows for pair in row]
    return tuple(c for _, c in pairs), {"STARTS": starts, "INDEX": tuple(k for k, _ in pairs)}


def combine(given: Sequence[Tensor], made: Sequence[Tensor], rows: Any) -> None:
    """Fill ``made`` with linear combinations of ``given``, in one launch.

    All are contiguous tensors of one size and of any floating dtype; sums are in float32. ``rows``:
    of :func:`packed`, pairs of an index and a coefficient for each result; the indices after those
    of ``given`` are earlier results, before they are rounded to their dtype.
    """
    coefficients, structure = rows
    count = given[0].numel()
    with _on(given[0]):
        _combine[(-(-count // _TILE),)](  # pyright: ignore[reportIndexIssue]
            tuple(given),
            tuple(made),
            coefficients,
            count,
            **structure,
            BLOCK=_TILE,
            enable_fp_fusion=True,  # as torch's sums
        )


def normal(out: Tensor, keys: Tensor, index: Tensor, step: int, stream: int, first: int) -> None:
    """Fill ``out``, shape (batch, count), float32, with standard normal numbers.

    ``keys``: the 64 bits of one seed or of a seed for each sample; ``index``: the index of each
    sample; int64 on the device of ``out``. ``first``: number of the first block.
    """
    batch, count = out.shape
    options: dict[str, Any] = {"ONE_KEY": keys.numel() == 1, "BLOCKS": _BLOCKS}
    with _on(out):
        _normal[_grid(batch, count)](  # pyright: ignore[reportIndexIssue]
            out, keys, index, step, stream, first, count, **options, enable_fp_fusion=False
        )


def noised(
    x0: Tensor,
    levels: Tensor,
    x_t: Tensor,
    target: Tensor,
    keys: Tensor,
    index: Tensor,
    step: int,
    stream: int,
) -> None:
    """Fill ``x_t`` with α x_0 + σ ε and ``target`` with c0 x_0 + c1 ε; ε is not stored.

    ``x0``, ``x_t``, ``target``: shape (batch, count), contiguous. ``levels``: α, σ, c0,
    c1 of each sample, shape (4 or more, batch), float32, contiguous.
    """
    batch, count = x0.shape
    options: dict[str, Any] = {"ONE_KEY": keys.numel() == 1, "BLOCKS": _BLOCKS}
    with _on(x0):
        _noised[_grid(batch, count)](  # pyright: ignore[reportIndexIssue]
            x0,
            levels,
            x_t,
            target,
            keys,
            index,
            step,
            stream,
            count,
            batch,
            **options,
            enable_fp_fusion=False,
        )


def _grid(batch: int, count: int) -> tuple[int, int]:
    return -(-count // (4 * _BLOCKS)), batch


def _on(x: Tensor) -> Any:
    return torch.cuda.device(x.device)
