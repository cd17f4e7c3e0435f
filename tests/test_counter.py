"""Counter-based randomness: the published vectors, the same bits in any batch, and numbers that
look like chance.
"""

from __future__ import annotations

import itertools
import math
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from alphabar.noising import NoiseSchedule, Noising
from alphabar.noising.utils import philox
from alphabar.noising.utils import rng as counter
from alphabar.noising.utils.rng import Draws, Stream, permutation, whole_seed

WORD = 2**32 - 1
BACKENDS = pytest.mark.parametrize("xp", [np, torch], ids=["numpy", "torch"])
# Random123's kat_vectors, philox4x32 of 10 rounds: counter, key, words
KNOWN = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((WORD,) * 4, (WORD,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


def array(xp: ModuleType, values: Any) -> Any:
    return np.array(values, dtype=np.int64) if xp is np else torch.tensor(values, dtype=torch.int64)


def draws(
    index: Any = (0,), seed: Any = 0, step: int = 0, stream: int = 0, device: str = "cpu"
) -> Draws:
    return Draws(seed, index, step=step, stream=stream, device=device)


@pytest.fixture
def in_torch(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Make what is drawn on the CPU by torch, as compiled code does."""
    return lambda: monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)


# the function


@BACKENDS
@pytest.mark.parametrize(("words", "key", "expected"), KNOWN)
def test_known_answers(words: Any, key: Any, expected: Any, xp: ModuleType) -> None:
    block, index, step = (array(xp, [[word]]) for word in words[:3])
    # of one seed, and of a seed for each sample
    keys = (key, tuple(array(xp, [[word]]) for word in key))
    for each in keys:
        assert (
            tuple(int(w[0, 0]) & WORD for w in philox.words(each, block, index, step, words[3]))
            == expected
        )


def plain(block: int, index: int, step: int, stream: int, seed: int, rounds: int = 10) -> list[int]:
    """Philox4x32 word by word (Salmon et al. 2011, §4.3)."""
    x, key = [block, index, step, stream], [seed & WORD, seed >> 32]
    for _ in range(rounds):
        a, b = 0xD2511F53 * x[0], 0xCD9E8D57 * x[2]
        x = [(b >> 32) ^ x[1] ^ key[0], b & WORD, (a >> 32) ^ x[3] ^ key[1], a & WORD]
        key = [(key[0] + 0x9E3779B9) & WORD, (key[1] + 0xBB67AE85) & WORD]
    return x


def test_what_the_words_of_the_counter_are() -> None:
    seed, index, step, stream = 0x0123456789ABCDEF, [3, WORD], 2**31 + 5, 2**32 - 7
    bits = draws(index, seed, step, stream).bits(6)
    for row, i in zip(bits.tolist(), index, strict=True):
        for block in range(3):
            words = plain(block, i, step, stream, seed)
            pair = [value & (2**64 - 1) for value in row[2 * block : 2 * block + 2]]
            assert pair == [words[0] << 32 | words[1], words[2] << 32 | words[3]]


@pytest.mark.parametrize("shape", [(3, 4, 5), (1,), (7,), (), (2, 4100)])
@pytest.mark.parametrize("seeds", [11, list(range(50, 63))])
def test_numpy_and_torch_draw_the_same(shape: tuple[int, ...], seeds: Any, in_torch: Any) -> None:
    """Words and uniform numbers to the bit; the radius to the last one, where torch's √ on the CPU
    is a vendor's.
    """

    def drawn() -> list[Tensor]:
        source = draws(range(13), seeds, step=9, stream=5)
        uniform = [source.uniform(*shape), source.uniform(*shape, dtype=torch.float64)]
        return [source.bits(*shape), *uniform, source.normal(*shape)]

    *ours, normal = drawn()
    in_torch()
    *theirs, other = drawn()
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
    assert torch.allclose(normal, other, rtol=2.5e-7, atol=0)


@pytest.mark.parametrize("shape", [(3, 4, 5), (1,), (7,), (), (2, 4100)])
@pytest.mark.parametrize("seeds", [2**64 - 3, list(range(50, 63))])
def test_compiled_loops_draw_the_same_bits(
    shape: tuple[int, ...], seeds: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert counter.loops() is not None  # the tests install numba

    def drawn() -> list[Tensor]:
        source = draws(range(4, 30, 2), seeds, step=9, stream=5)
        out = source.normal(*shape, out=torch.empty(13, *shape))
        uniform = [source.uniform(*shape), source.uniform(*shape, dtype=torch.float64)]
        return [source.bits(*shape), *uniform, source.normal(*shape), out, source.of(6).normal(3)]

    ours = drawn()
    monkeypatch.setattr(counter, "loops", lambda: None)
    assert all(torch.equal(a, b) for a, b in zip(ours, drawn(), strict=True))


def test_loops_that_round_differently_are_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    from alphabar.noising.utils import compiled

    exact = compiled.normal

    def fused(out: np.ndarray, *counters: Any) -> None:
        exact(out, *counters)
        out[0, 0] = np.nextafter(out[0, 0], np.float32(9))

    assert counter.loops.__wrapped__() is compiled
    monkeypatch.setattr(compiled, "normal", fused)
    assert counter.loops.__wrapped__() is None


@pytest.mark.slow  # torch loads its shape functions
def test_other_devices_take_the_same_way() -> None:
    source = draws(range(3), [1, 2, 3], device="meta")
    assert (
        source.normal(4, 5).shape == (3, 4, 5)
        and source.uniform(2).device.type == source.bits(2).device.type == "meta"
    )
    noising = Noising(NoiseSchedule.flow(), noise=["offset", "pyramid", "input_perturbation"])
    drawn = noising.draw(range(3), (2, 8, 8), step=0, total=3, device="meta")
    assert drawn.noise.device.type == "meta" and drawn.t.device.type == "cpu"


@pytest.mark.parametrize("shape", [(5,), (4, 16, 16), (3, 90, 90)])
def test_a_sample_does_not_depend_on_its_batch(shape: tuple[int, ...]) -> None:
    """To the bit, wherever the batch is cut into parts for the cache."""
    index = [7, 0, WORD, 12345, *range(20, 60)]
    whole = draws(index).normal(*shape)
    for rows in ([0], [43], [2, 17], list(range(5, 40))):
        assert torch.equal(draws([index[k] for k in rows]).normal(*shape), whole[rows])


def test_a_call_goes_on_where_the_last_ended() -> None:
    source = draws(range(2))
    first, second = source.normal(6), source.normal(8)
    whole = draws(range(2)).normal(16)
    # from the next block on
    assert torch.equal(first, whole[:, :6]) and torch.equal(second, whole[:, 8:])


# normal numbers


def exact(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    u = ((first & 0x7FFFFFFF) + 0.5) / 2**31
    angle = math.pi * (second - (second >> 31 << 32)) / 2**32
    radius = np.sqrt(-2 * np.log(u)) * np.where(first >> 31, -1, 1)
    return np.stack([radius * np.cos(angle), radius * np.sin(angle)])


@BACKENDS
def test_normal_numbers_are_box_and_muller_s(xp: ModuleType) -> None:
    """Also at the ends of both words, where a logarithm of 0 or a negative square might lie."""
    ends = [0, 1, 2, 127, 2**23, 2**24 + 1, 2**30, 2**31 - 129, 2**31 - 65, 2**31 - 2, 2**31 - 1]
    ends = [*ends, *(2**31 + end for end in ends)]
    some = np.random.default_rng(0).integers(0, 2**32, (2, 200_000)).tolist()
    pairs = np.array([*itertools.product(ends, ends), *zip(*some, strict=True)], dtype=np.int64).T
    words = [array(xp, column[None].tolist()) for column in (*pairs, *pairs[::-1])]
    cosine, sine = (
        np.asarray(part)[0, 0].astype(np.float64) for part in philox.normal(xp, tuple(words))
    )
    expected = exact(*pairs)
    got = np.stack([cosine, sine])
    assert np.isfinite(got).all()
    # u is rounded to 24 bits: a small radius, where u is next to 1, moves by that over the radius
    assert (np.abs(got - expected) < 1e-6 + 2**-23 / np.hypot(*expected)).all()
    assert np.abs(got).max() == pytest.approx(math.sqrt(64 * math.log(2)), rel=1e-6)  # 6.66


def kolmogorov(values: Tensor) -> float:
    """√n times the distance to the uniform distribution; above 1.95 once in a thousand."""
    values = values.double().flatten().sort().values
    n = len(values)
    steps = torch.arange(n + 1, dtype=torch.float64) / n
    return max(float((values - steps[:-1]).max()), float((steps[1:] - values).max())) * math.sqrt(n)


def standard(values: Tensor) -> None:
    z = values.double().flatten()
    for power, moment, spread in (
        (1, 0.0, 1.0),
        (2, 1.0, math.sqrt(2)),
        (3, 0.0, math.sqrt(15)),
        (4, 3.0, math.sqrt(96)),
    ):
        assert abs(float((z**power).mean()) - moment) < 4.5 * spread / math.sqrt(z.numel()), power
    assert kolmogorov(torch.special.ndtr(z)) < 1.95


# along each word of the counter and each half of the key: 8 numbers for each of 4,000 values of it
ALONG = {
    "index": lambda: draws(range(4000)).normal(8),
    "index by 2^20": lambda: draws(range(0, 4000 << 20, 1 << 20)).normal(8),
    "element": lambda: draws(seed=3).normal(4000, 8)[0],
    "seed": lambda: draws([0] * 4000, range(4000)).normal(8),
    "seed by 2^32": lambda: draws([0] * 4000, range(5, 4000 << 32, 1 << 32)).normal(8),
    "step": lambda: torch.cat([draws(step=step).normal(8) for step in range(1500)]),
    "stream": lambda: torch.cat([draws(stream=stream).normal(8) for stream in range(1500)]),
}


def independent(z: Tensor) -> None:
    """Fail unless rows of 8 numbers are independent standard normal ones."""
    z = z.double()
    standard(z)
    for lag in (1, 2, 64):
        products = (z[lag:] * z[:-lag]).flatten()
        assert abs(float(products.mean())) < 4.5 / math.sqrt(len(products)), lag
    between = (z.T @ z) / len(z) - torch.diag(torch.full((8,), 1.0, dtype=torch.float64))
    assert float(between.fill_diagonal_(0).abs().max()) < 5 / math.sqrt(len(z))
    radius = (z[:, ::2] ** 2 + z[:, 1::2] ** 2) / 2  # of Box and Muller's pairs
    angle = torch.atan2(z[:, 1::2], z[:, ::2]) / (2 * math.pi) + 0.5
    assert kolmogorov(torch.exp(-radius)) < 1.95 and kolmogorov(angle) < 1.95


@pytest.mark.parametrize("along", ALONG)
def test_numbers_along_a_counter_are_independent(along: str) -> None:
    independent(ALONG[along]())


def of_few_rounds(rounds: int) -> Tensor:
    """8 numbers for each of 4,000 indices, from Philox of fewer rounds than ten."""
    rows = []
    for index in range(4000):
        words = [w for block in (0, 1) for w in plain(block, index, 0, 0, 9, rounds)]
        rows.append(words)
    columns = np.array(rows, dtype=np.int64).reshape(-1, 2, 4).transpose(2, 0, 1)
    pairs = np.stack(philox.normal(np, tuple(columns)))  # (cosine or sine, pair, index, block)
    return torch.as_tensor(pairs.transpose(2, 3, 1, 0).reshape(-1, 8).copy())


BROKEN = {
    "half of a seed is lost": lambda: draws([0] * 4000, [s & WORD for s in range(5, 4000 << 32, 1 << 32)]).normal(8),
    "a counter is used twice": lambda: torch.cat([draws(step=step // 2).normal(8) for step in range(1500)]),
    "a counter is used again later": lambda: draws([i % 64 for i in range(4000)]).normal(8),
    "three rounds": lambda: of_few_rounds(3),
    "one number for two elements": lambda: draws(range(4000)).normal(4).repeat_interleave(2, 1),
    "a variance of 1.06": lambda: 1.06**0.5 * draws(range(4000)).normal(8),
    "a mean of 0.03": lambda: 0.03 + draws(range(4000)).normal(8),
    "no tail": lambda: draws(range(4000)).normal(8).clamp(-2.5, 2.5),
}  # fmt: skip


@pytest.mark.parametrize("name", BROKEN)
def test_the_statistics_notice_a_broken_source(name: str) -> None:
    with pytest.raises(AssertionError):
        independent(BROKEN[name]())


def test_ten_rounds_by_the_statistics_and_seven_by_the_known_answers() -> None:
    """Seven rounds pass every known statistical test (Salmon et al. 2011, table 2)."""
    independent(of_few_rounds(10))
    for (block, index, step, stream), key, expected in KNOWN:
        seed = key[0] | key[1] << 32
        assert plain(block, index, step, stream, seed) == list(expected)
        assert plain(block, index, step, stream, seed, 7) != list(expected)


def test_uniform_numbers() -> None:
    for dtype, digits in ((torch.float32, 24), (torch.float64, 53)):
        u = draws(range(200), seed=1).uniform(500, dtype=dtype)
        assert u.dtype == dtype and float(u.min()) >= 0 and float(u.max()) < 1
        assert bool((u.double() * 2.0**digits).frac().eq(0).all())
        assert bool((u.double() * 2.0 ** (digits - 1)).frac().ne(0).any())  # every digit is used
        assert kolmogorov(u) < 1.95


def test_no_repeats_in_a_million() -> None:
    """Of 64 bits each: along samples, elements, steps, streams and seeds together."""
    drawn = [
        draws(range(1000), seed, step, stream).bits(250)
        for seed in (0, 2**32)
        for step in (0, 1)
        for stream in (0, 1)
    ]
    bits = torch.stack(drawn)
    assert bits.numel() == 2_000_000 and len(bits.unique()) == bits.numel()


@pytest.mark.parametrize("count", [1_000_000, pytest.param(10_000_000, marks=pytest.mark.slow)])
def test_no_two_of_many_keys_draw_the_same(count: int) -> None:
    """A number of 64 bits of each key (seed, step, index), of which one seed differs by high bits.

    Among 1e7 numbers of 64 random bits there are two equal ones once in 370,000 tries.
    """
    seeds, steps = (3, 3 + 2**32, 2**63), (0, 1, 2**31, 10**6)
    share = count // (len(seeds) * len(steps)) + 1
    drawn = [
        draws(range(0, 97 * share, 97), seed, step).bits(1) for seed in seeds for step in steps
    ]
    bits = torch.cat(drawn).flatten().sort().values
    assert bits.numel() >= count and bool((bits[1:] != bits[:-1]).all())


@pytest.mark.parametrize("bit", [0, 31, 32, 63])
def test_all_64_bits_of_a_training_seed_count(bit: int) -> None:
    x0, schedule = torch.zeros(2, 3, 4), NoiseSchedule.flow()
    one, other = (
        Noising(schedule, timesteps="stratified", seed=s)(x0, step=0) for s in (7, 7 ^ (1 << bit))
    )
    assert not torch.allclose(one.noise, other.noise, atol=0.1) and not torch.equal(one.t, other.t)


def test_seeds_are_torch_s() -> None:
    for seed, same in ((-1, 2**64 - 1), (-(2**63), 2**63), (np.int64(5), 5)):
        assert torch.equal(draws(seed=seed).normal(4), draws(seed=same).normal(4))
        assert torch.Generator().manual_seed(int(seed)).initial_seed() == same
    for wrong, error in (
        (2**64, ValueError),
        (-(2**63) - 1, ValueError),
        (1.0, TypeError),
        (False, TypeError),
        ("1", TypeError),
    ):
        with pytest.raises(error, match=r"^a seed (has|must)"):
            whole_seed(wrong)
        with pytest.raises(error, match=r"^a seed (has|must)"):
            Noising(NoiseSchedule.flow(), seed=wrong)


# permutations


@pytest.mark.parametrize("count", [1, 2, 7, 1000])
def test_permutations(count: int) -> None:
    orders = [permutation(3, count, step=step) for step in range(20)]
    for order in orders:
        assert order.sort().values.tolist() == list(range(count))
    assert len({tuple(order.tolist()) for order in orders}) > (count > 1)


def test_permutations_are_equally_frequent() -> None:
    n = 1200
    orders = [tuple(permutation(1, 4, step=step).tolist()) for step in range(n)]
    counts = [orders.count(order) for order in itertools.permutations(range(4))]
    # 23 degrees of freedom, p = 0.001
    assert sum((c - n / 24) ** 2 / (n / 24) for c in counts) < 49.7


# bad input

BAD = {
    "negative index": (lambda: draws([0, -1]), r"^the index of a sample must lie in 0 \.\.\. 2\^32 - 1, got -1$"),
    "large index": (lambda: draws([2**32, 0]), r"^the index of a sample must lie .* got 4294967296$"),
    "negative step": (lambda: draws(step=-1), r"^the step must lie in 0 \.\.\. 2\^32 - 1, got -1$"),
    "large step": (lambda: draws(step=2**32), r"^the step must lie in 0 \.\.\. 2\^32 - 1, got 4294967296$"),
    "too many": (
        lambda: draws(range(0), device="meta").normal(2**34 + 1),
        r"^a sample draws at most 2\^32 blocks of 4 numbers at a step, got 4294967297$",
    ),
    "step of a run": (lambda: Noising(NoiseSchedule.flow())(torch.zeros(1, 2), step=2**32), "^the step must lie in"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_counters_out_of_range(name: str) -> None:
    make, message = BAD[name]
    with pytest.raises(ValueError, match=message):
        make()


def test_streams_differ() -> None:
    assert len(
        {tuple(draws(stream=stream).normal(4).flatten().tolist()) for stream in Stream}
    ) == len(Stream)
    assert all(stream < 2**31 <= counter.stream_of("gaussian") for stream in Stream)
