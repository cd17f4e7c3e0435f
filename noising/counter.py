"""Counter-based randomness: the draw of sample i at step s is a function of (seed, s, i) and of nothing else.

So it is the same for 1 and N processes, for any accumulation, and after a resume; and the user's own use of the global
generators neither changes it nor is changed by it. Generators live on the CPU, so that every GPU model draws the same.
"""

from __future__ import annotations

import torch

_MASK = (1 << 64) - 1


def mix(*counters: int) -> int:
    """Return 64 well-mixed bits of a sequence of integers (the finaliser of splitmix64, Steele et al. 2014, chained).

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
    """Put a CPU generator at the start of the stream of these counters, and return it.

    torch keeps 32 bits of a CPU seed; the fold below keeps the well-mixed ones of both halves.

    >>> g = torch.Generator()
    >>> torch.equal(torch.rand(2, generator=seeded(g, 1, 2)), torch.rand(2, generator=seeded(g, 1, 2)))
    True
    """
    h = mix(*counters)
    return generator.manual_seed((h ^ (h >> 32)) & 0xFFFFFFFF)
