"""Shift factors for another resolution, for :meth:`NoiseSchedule.shifted`.

A large image is more redundant than a small one: averaged down to the small size, its noise is
weaker by the ratio of the sides. To keep the visible noise, σ / α must grow by that ratio,

    factor = sqrt(m / n) for m pixels instead of n,    log SNR less by log(m / n),

which is eq. 23 of Esser et al. (2403.03206) on a flow. On a variance preserving curve it is the
shifted schedule of Hoogeboom et al. (2301.11093, eq. 4), there with n = 64². CogVideoX divides SNR
by ``snr_shift_scale``: its factor is sqrt(snr_shift_scale). Flux uses e^μ with μ linear in the
number of tokens.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import TypeVar, cast

from torch import Tensor

from ..utils.validation import whole_number
from .base import require_factor

Level = TypeVar("Level", float, Tensor)


def resolution_shift(size: int | tuple[int, ...], base_size: int | tuple[int, ...]) -> float:
    """Return the factor sqrt(m / n) to use a schedule for ``base_size`` on images of ``size``.

    A size is (height, width), or the side of a square; in pixels or latents, the same unit for
    both. Raises ValueError for sizes that are not positive.

    >>> resolution_shift(128, 64), resolution_shift((1024, 2048), (512, 1024))
    (2.0, 2.0)
    """
    return math.sqrt(_pixels("size", size) / _pixels("base_size", base_size))


def _pixels(name: str, size: int | tuple[int, ...]) -> int:
    several = isinstance(size, Iterable) and getattr(size, "ndim", 1) > 0
    sides = [
        whole_number(name, side)
        for side in (cast(Iterable[int], size) if several else (size, size))
    ]
    if len(sides) != 2 or min(sides) < 1:
        raise ValueError(
            f"{name} must be a positive side or (height, width), got {size}; e.g. 1024 or (768, "
            "1344)"
        )
    return sides[0] * sides[1]


def shift_noise_level(sigma: Level, shift: float) -> Level:
    """Return the noise level of a flow path after a shift, σ' = s σ / (1 + (s - 1) σ).

    Source: Esser et al. 2403.03206, eq. 23. A float or a tensor.

    >>> shift_noise_level(0.5, 3.0)
    0.75
    """
    return shift * sigma / (1 + (shift - 1) * sigma)


def token_shift(
    tokens: int,
    base_tokens: int = 256,
    max_tokens: int = 4096,
    base_shift: float = 0.5,
    max_shift: float = 1.15,
    kind: str = "exponential",
    clamped: bool = False,
) -> float:
    """Return Flux's shift factor e^μ for a number of image tokens.

    μ is linear from ``base_shift`` at ``base_tokens`` to ``max_shift`` at ``max_tokens``, and, as
    published, beyond both: the factor grows with the exponential of the tokens. Images stay near
    the line's ends, videos do not. LTX-Video's line (1024, 4096, 0.95, 2.05) gives 7.8 at 4096
    tokens, and 386 at 15,004, which are ten seconds of 704 x 704. With ``clamped`` the shift stays
    at its ends. The defaults are those of Flux's config in diffusers (base_image_seq_len,
    max_image_seq_len, base_shift, max_shift).

    Args:
        tokens: number of image tokens of the network, (height / 16) · (width / 16) pixels for Flux.
        base_tokens: number of tokens at ``base_shift``.
        max_tokens: number of tokens at ``max_shift``.
        base_shift: μ at ``base_tokens``.
        max_shift: μ at ``max_tokens``.
        kind: the ``time_shift_type`` of diffusers: 'linear' uses μ itself as the factor.
        clamped: keep ``tokens`` between ``base_tokens`` and ``max_tokens``.

    Raises:
        ValueError: for numbers that define no line, for an unknown ``kind``, and for a factor out
            of range.

    >>> round(token_shift(4096), 4), round(token_shift(1024), 4)
    (3.1582, 1.8776)
    >>> round(token_shift(100_000, clamped=True), 4)
    3.1582
    """
    if tokens < 1 or not 0 < base_tokens < max_tokens:
        raise ValueError(
            f"need tokens >= 1 and 0 < base_tokens < max_tokens, got {tokens}, {base_tokens} and "
            f"{max_tokens}; Flux has 256 and 4096"
        )
    tokens = min(max(tokens, base_tokens), max_tokens) if clamped else tokens
    mu = base_shift + (tokens - base_tokens) * (max_shift - base_shift) / (max_tokens - base_tokens)
    if kind not in ("exponential", "linear"):
        raise ValueError(f"unknown kind of shift {kind!r}; 'exponential' takes e^mu, 'linear' mu")
    return require_factor(
        "the shift",
        math.exp(min(mu, 700.0)) if kind == "exponential" else mu,
        "check base_shift and max_shift",
    )


@dataclass(frozen=True)
class TokenLine:
    """The shift of :func:`token_shift` as a value: a function of the number of image tokens.

    >>> round(TokenLine(max_tokens=8192, max_shift=0.9)(4096), 4)
    2.0008
    """

    base_tokens: int = 256
    max_tokens: int = 4096
    base_shift: float = 0.5
    max_shift: float = 1.15
    clamped: bool = False

    def __call__(self, tokens: int) -> float:
        return token_shift(tokens, **asdict(self))

    def __str__(self) -> str:
        return (
            f"e^μ, μ from {self.base_shift:g} at {self.base_tokens} tokens to {self.max_shift:g} "
            f"at {self.max_tokens}"
        )


def empirical_token_shift(tokens: int, steps: int) -> float:
    """Return the shift that FLUX.2 samples with, by the image tokens and the number of steps.

    Source: black-forest-labs/flux2, src/flux2/sampling.py, ``compute_empirical_mu``: a line in the
    tokens at 10 steps and another at 200, and a line between them in the steps; above 4300 tokens
    the one at 200.

    >>> round(empirical_token_shift(4096, 50), 4), round(empirical_token_shift(4096, 10), 4)
    (7.5636, 9.5472)
    """
    if tokens < 1 or steps < 1:
        raise ValueError(f"need tokens >= 1 and steps >= 1, got {tokens} and {steps}")
    few, many = 8.73809524e-05 * tokens + 1.89833333, 0.00016927 * tokens + 0.45666666
    mu = many if tokens > 4300 else many + (few - many) * (200 - steps) / 190
    return require_factor("the shift", math.exp(min(mu, 700.0)), "take fewer tokens")
