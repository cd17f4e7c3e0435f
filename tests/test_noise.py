"""Kinds of noise: their moments, whether the target sees them, and that a sample's noise is its
own.
"""

from __future__ import annotations

import copy
import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import interpolate

from alphabar.noising import (
    NOISES,
    AdaptiveOffset,
    Chain,
    Gaussian,
    Immiscible,
    InputPerturbation,
    Noise,
    Noised,
    NoiseSchedule,
    Noising,
    Offset,
    Pyramid,
)
from alphabar.noising.noise import draw_kinds
from alphabar.noising.utils import rng
from alphabar.noising.utils.rng import Draws, stream_of
from oracles import SCHEDULES

EPSILON, V, FLOW = SCHEDULES["scaled_linear"], SCHEDULES["ztsnr"], NoiseSchedule.flow()
KINDS: dict[str, Any] = {
    **{name: make() for name, make in NOISES.items()},
    "offset random": Offset(0.5, random_strength=True, probability=0.5),
    "adaptive down": AdaptiveOffset(0.3, scale=-0.5),
    "adaptive random": AdaptiveOffset(0.5, scale=0.5, random_strength=True),
    "perturbation random": InputPerturbation(0.3, random_strength=True),
    "perturbation decaying": InputPerturbation(0.3, decay_steps=100),
    "chain": Chain((Pyramid(), Offset(0.2), InputPerturbation(0.1))),
}
ONLY_INPUT = {"input_perturbation", "perturbation random", "perturbation decaying"}
BATCH_WIDE = {name for name, kind in NOISES.items() if kind.batch_wide}


def batch_of(count: int, seed: int = 0) -> Tensor:
    return 0.5 + torch.randn(count, 3, 4, 5, generator=torch.Generator().manual_seed(seed))


def own(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def draws_of(*index: int, step: int = 0, stream: int = 9) -> Draws:
    return Draws(3, index or [0], step=step, stream=stream)


def implied(noised: Noised, x0: Tensor) -> Tensor:
    """The noise that x_t is made of."""
    alpha, sigma = noised.schedule.alpha_sigma(noised.t, x0)
    return (noised.x.double() - alpha * x0) / sigma


# the target


@pytest.mark.parametrize("schedule", [EPSILON, V, FLOW], ids=["epsilon", "v", "flow"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_target_is_made_of_what_the_kind_says(kind: str, schedule: NoiseSchedule) -> None:
    x0 = batch_of(16)
    t = torch.linspace(0.3, 1, 16) * schedule.curve.t_max
    noised = Noising(schedule, noise=KINDS[kind], seed=2)(
        x0, step=3, timesteps=t.long() if t[-1] > 1 else t
    )
    plain = Noising(schedule, seed=2)(x0, step=3, timesteps=noised.t)
    assert torch.equal(noised.target, schedule.target(x0, noised.noise, noised.t))
    assert KINDS[kind].changes_target is (kind not in ONLY_INPUT)
    seen, differs = implied(noised, x0), (noised.noise - plain.noise).abs().amax((1, 2, 3))
    if kind in ONLY_INPUT:
        assert torch.equal(noised.target, plain.target) and torch.equal(noised.noise, plain.noise)
        assert bool(((noised.x - plain.x).abs().amax((1, 2, 3)) > 1e-4).all())
    elif kind == "gaussian":
        assert torch.equal(noised.target, plain.target) and torch.equal(noised.x, plain.x)
    else:
        assert int((differs > 1e-3).sum()) >= 6  # a coin may have left some alone, or a permutation
        assert bool(((noised.x - plain.x).abs().amax((1, 2, 3)) > 1e-4)[differs > 1e-3].all())
    if kind not in ONLY_INPUT | {"chain"}:
        assert torch.allclose(seen, noised.noise.double(), rtol=0, atol=1e-4)


@pytest.mark.parametrize("kind", sorted(set(KINDS) - BATCH_WIDE))
@pytest.mark.parametrize(("world_size", "accumulate"), [(1, 4), (2, 2), (4, 1)])
def test_noise_does_not_depend_on_how_the_step_is_split(
    kind: str, world_size: int, accumulate: int
) -> None:
    x0, noising = batch_of(8), Noising(V, noise=KINDS[kind], seed=11)
    whole = copy.deepcopy(noising)(x0, step=4)
    for rank, micro in itertools.product(range(world_size), range(accumulate)):
        index = [(micro * 2 + k) * world_size + rank for k in range(2)]
        place = {
            "rank": rank,
            "world_size": world_size,
            "micro_batch": micro,
            "accumulate": accumulate,
        }
        part = noising(x0[index], step=4, **place)
        for name in ("x", "timesteps", "target", "weight", "noise", "t"):
            assert torch.equal(getattr(part, name), getattr(whole, name)[index]), name


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_latents(kind: str, dtype: torch.dtype) -> None:
    """Noise, times and targets are made in float32; only x_t is rounded, and its noise never to
    nothing.
    """
    x0 = batch_of(8).to(dtype)
    for schedule in (EPSILON, FLOW):
        noising = Noising(schedule, noise=KINDS[kind], seed=5).eval()
        first = torch.full((8,), schedule.curve.t_min + (0 if schedule is EPSILON else 0.01))
        first = first.long() if schedule is EPSILON else first
        for t in (None, first):
            half, full = noising(x0, step=1, timesteps=t), noising(x0.float(), step=1, timesteps=t)
            assert half.x.dtype == dtype and half.noise.dtype == half.target.dtype == torch.float32
            for name in ("timesteps", "noise", "target", "weight"):
                assert torch.equal(getattr(half, name), getattr(full, name)), name
            assert torch.equal(half.x, full.x.to(dtype))
        assert not torch.equal(half.x, x0)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_the_default_dtype_does_not_matter(kind: str, dtype: torch.dtype) -> None:
    """It is bfloat16 while Lightning runs a step in bf16-true."""
    x0, before = batch_of(8), torch.get_default_dtype()
    expected = Noising(FLOW, noise=KINDS[kind], seed=5)(x0, step=1)
    torch.set_default_dtype(dtype)
    try:
        noised = Noising(FLOW, noise=KINDS[kind], seed=5)(x0, step=1)
    finally:
        torch.set_default_dtype(before)
    for name in ("x", "timesteps", "target", "weight", "noise", "t"):
        a, b = getattr(noised, name), getattr(expected, name)
        assert a.dtype == b.dtype and torch.equal(a, b), name


# moments


def parts(kind: Noise, shape: tuple[int, ...], count: int = 4000) -> Tensor:
    return kind.draw(shape, draws_of(*range(count))).double()


def noises(kind: Any, shape: tuple[int, ...], count: int = 4000) -> Tensor:
    return Noising(V, noise=kind, seed=1)(torch.zeros(count, *shape), step=0).noise.double()


def assert_mean(values: Tensor, mean: float, spread: float) -> None:
    """``spread``: the standard deviation of one value; a correct one misses by 4.5 errors once in
    150 000.
    """
    assert abs(float(values.mean()) - mean) < 4.5 * spread / math.sqrt(values.numel())


def test_gaussian_noise_is_standard_normal() -> None:
    z = noises("gaussian", (3,)).flatten()
    for power, moment, spread in ((1, 0.0, 1.0), (2, 1.0, math.sqrt(2)), (4, 3.0, math.sqrt(96))):
        assert_mean(z**power, moment, spread)


def test_offset_is_one_number_per_channel() -> None:
    small, large = (Offset(s).draw((3, 6, 5), draws_of()) for s in (0.1, 0.4))
    assert torch.equal(small, 0.1 * draws_of().normal(3, 1, 1))
    assert torch.allclose(large, 4 * small)
    noise = torch.randn(1, 3, 6, 5, generator=own(1))
    assert torch.equal(Offset(0.1).apply(noise, small, noise), noise + small)


@pytest.mark.parametrize("strength", [0.0, 0.1, 1.0])
def test_offset_variance(strength: float) -> None:
    noise = noises(Offset(strength), (2, 4, 4), 2000)
    for sample, variance in (
        (noise.mean((2, 3)), 1 / 16 + strength**2),
        (noise[:, :, 0, 0], 1 + strength**2),
    ):
        assert_mean(sample**2, variance, variance * math.sqrt(2))
    # within a channel
    assert_mean(noise[:, 0, 0, 0] * noise[:, 0, 3, 3], strength**2, 1 + 2 * strength**2)
    assert_mean(noise[:, 0, 0, 0] * noise[:, 1, 0, 0], 0.0, 1 + strength**2)  # between channels


def test_offset_of_random_strength() -> None:
    s = 0.6
    part = parts(Offset(s, random_strength=True), (1, 2, 2)).flatten()
    assert_mean(part**2, s**2 / 3, s**2 * math.sqrt(3 / 5 - 1 / 9))
    # not one constant strength
    assert_mean(part**4, 3 * s**4 / 5, s**4 * math.sqrt(105 / 9 - 9 / 25))
    ratio = parts(Offset(s, random_strength=True), (2, 1, 1)) / parts(Offset(s), (2, 1, 1))
    assert (
        torch.allclose(ratio[:, 0], ratio[:, 1])
        and float(ratio.min()) > 0
        and float(ratio.max()) < 1
    )


def test_offset_with_a_probability() -> None:
    part = parts(Offset(1.0, probability=0.3), (2, 2, 2))
    assert torch.equal(part[:, 0] == 0, part[:, 1] == 0)
    assert_mean((part[:, 0] != 0).double(), 0.3, math.sqrt(0.21))
    assert_mean(part[:, 0] ** 2, 0.3, math.sqrt(0.9 - 0.09))


@pytest.mark.parametrize(("strength", "scale"), [(0.1, 0.5), (0.3, -0.5), (0.0, 1.0)])
def test_adaptive_offset(strength: float, scale: float) -> None:
    x0, noise, kind = (
        batch_of(6),
        torch.randn(6, 3, 4, 5, generator=own()),
        AdaptiveOffset(strength, scale),
    )
    part = kind.draw((3, 4, 5), draws_of(*range(6)))
    added = (kind.apply(noise, part, x0) - noise).double()
    for i, c in itertools.product(range(6), range(3)):
        s = max(0.0, strength + scale * abs(float(x0[i, c].double().mean())))
        assert torch.allclose(
            added[i, c], torch.full((4, 5), s * float(part[i, c]), dtype=torch.float64), atol=1e-6
        )
    assert_mean(parts(kind, (1, 1)) ** 2, 1.0, math.sqrt(2))
    # the clamp is reached
    assert (strength + scale * x0.mean((2, 3)).abs() < 0).any() == (scale < 0)


def test_adaptive_offset_of_flat_samples() -> None:
    x0 = torch.tensor([[2.0, -4.0]])
    out = AdaptiveOffset(0.1, 0.5).apply(torch.zeros(1, 2), torch.ones(1, 2), x0)
    assert out.tolist() == [pytest.approx([1.1, 2.1])]


@pytest.mark.parametrize("shape", [(3, 8, 6), (4, 33, 40), (2, 5, 7, 9), (3, 17), (1, 1, 5)])
def test_the_compiled_pyramid_has_the_same_bits(
    shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    kinds = [Pyramid(), Pyramid(iterations=1, discount=0.5), Pyramid(iterations=8, discount=0.9)]
    ours = [kind.draw(shape, draws_of(*range(9), step=2)) for kind in kinds]
    monkeypatch.setattr(rng, "loops", lambda: None)
    for kind, parts in zip(kinds, ours, strict=True):
        assert torch.equal(parts, kind.draw(shape, draws_of(*range(9), step=2)))


def reference_pyramid(shape: tuple[int, ...], kind: Pyramid, draws: Draws) -> tuple[Tensor, Tensor]:
    """The sum of the octaves of one sample as torch enlarges them, and the variance of each element
    from unit impulses.
    """
    mode = {1: "linear", 2: "bilinear", 3: "trilinear"}[len(shape) - 1]
    total, variance = (
        torch.zeros(shape, dtype=torch.float64),
        torch.ones(shape[1:], dtype=torch.float64),
    )
    for i in range(kind.iterations):
        r = 2 + 2 * float(draws.uniform())
        grid = [max(1, int(n / r**i)) for n in shape[1:]]
        octave = draws.normal(shape[0], *(max(1, n >> i) for n in shape[1:]))[0].double()
        octave = octave[(slice(None), *(slice(n) for n in grid))]
        total += kind.discount**i * interpolate(octave[None], size=shape[1:], mode=mode)[0]
        impulses = torch.eye(math.prod(grid), dtype=torch.float64).view(1, -1, *grid)
        variance += kind.discount ** (2 * i) * (
            interpolate(impulses, size=shape[1:], mode=mode)[0] ** 2
        ).sum(0)
        if 1 in grid:
            break
    return total, variance


@pytest.mark.parametrize("shape", [(2, 9), (3, 8, 8), (1, 16, 6), (2, 4, 6, 5)])
@pytest.mark.parametrize("kind", [Pyramid(), Pyramid(10, 0.9), Pyramid(1, 0.5)], ids=str)
def test_pyramid_is_enlarged_noise_of_unit_variance(shape: tuple[int, ...], kind: Pyramid) -> None:
    batch = kind.draw(shape, draws_of(*range(5)))
    for seed, part in enumerate(batch):
        total, variance = reference_pyramid(shape, kind, draws_of(seed))
        assert torch.allclose(part[:-1].double(), total, rtol=0, atol=1e-5)
        assert torch.allclose(part[-1].double(), variance.rsqrt(), rtol=1e-6, atol=0)
        noise = torch.randn(1, *shape, generator=own(seed + 9))
        expected = (noise[0].double() + total) / variance.sqrt()
        assert torch.allclose(
            kind.apply(noise, part[None], noise)[0].double(), expected, rtol=0, atol=1e-5
        )


def test_pyramid_variance_is_one_at_every_element() -> None:
    noise = noises(Pyramid(6, 0.8), (1, 6, 6), 3000)[:, 0]
    variance = (noise**2).mean(0)
    assert float((variance - 1).abs().max()) < 5 * math.sqrt(2 / 3000)
    assert float((noise[:, 2, 2] * noise[:, 2, 3]).mean()) > 0.1  # and neighbours have become alike


@pytest.mark.parametrize("step", [0, 25, 100, 1000])
def test_input_perturbation_decays_linearly(step: int) -> None:
    kind, full = InputPerturbation(0.2, decay_steps=100), InputPerturbation(0.2)
    expected = full.draw((3, 4), draws_of(step=step)) * max(0.0, 1 - step / 100)
    assert torch.allclose(kind.draw((3, 4), draws_of(step=step)), expected)
    x0 = batch_of(4)
    noising, plain = (
        Noising(EPSILON, noise=one, seed=3)(x0, step=step) for one in (kind, "gaussian")
    )
    assert torch.equal(noising.x, plain.x) is (step >= 100)


def test_input_perturbation_variance() -> None:
    gamma = 0.5
    assert_mean(parts(InputPerturbation(gamma), (3,)) ** 2, gamma**2, gamma**2 * math.sqrt(2))
    random = parts(InputPerturbation(gamma, random_strength=True), (1,))
    assert_mean(random**2, gamma**2 / 3, gamma**2 * math.sqrt(3 / 5 - 1 / 9))
    x0 = torch.zeros(3000, 2)
    noised = Noising(FLOW, noise=InputPerturbation(gamma))(x0, step=0, timesteps=torch.ones(3000))
    assert_mean(noised.x.double() ** 2, 1 + gamma**2, (1 + gamma**2) * math.sqrt(2))
    # the target's part is whole
    assert_mean(noised.x.double() * noised.noise, 1.0, math.sqrt(2 + gamma**2))
    assert_mean(noised.noise.double() ** 2, 1.0, math.sqrt(2))


@pytest.mark.parametrize("kind", sorted(set(KINDS) - BATCH_WIDE))
def test_parts_do_not_depend_on_the_batch(kind: str) -> None:
    """To the bit, also where shapes are odd and samples have pyramids of different grids."""
    kinds = Noising(EPSILON, noise=KINDS[kind]).noise.kinds
    for shape in ((3, 4, 5), (2, 17, 9)):
        whole = draw_kinds(kinds, shape, 5, list(range(23)), step=2)
        for index in ([0], [22], [3, 19, 7]):
            for part, row in zip(draw_kinds(kinds, shape, 5, index, step=2), whole, strict=True):
                assert torch.equal(part, row[index])


def test_kinds_are_independent_of_each_other() -> None:
    """Of one name too: the second has a stream of its own, and a kind's noise is the same in any
    chain.
    """
    one, two, other = draw_kinds(
        [Offset(1.0), Offset(1.0), AdaptiveOffset()], (3, 2), 0, list(range(4000)), step=0
    )
    for a, b in ((one, two), (one, other), (two, other)):
        assert_mean(a.double() * b.double(), 0.0, 1.0)
    (alone,) = draw_kinds([AdaptiveOffset()], (3, 2), 0, list(range(4000)), step=0)
    assert torch.equal(alone, other)
    assert len({stream_of(name, k) for name in NOISES for k in range(4)}) == 4 * len(NOISES)


# the assignment


@pytest.mark.parametrize("seed", range(5))
def test_immiscible_has_the_least_total_distance(seed: int) -> None:
    x0, noise = torch.randn(2, 5, 3, 2, generator=own(seed))
    assigned = Immiscible().apply(noise, torch.empty(5, 0), x0)

    def total(order: Any) -> float:
        return float((x0 - noise[list(order)]).double().flatten(1).norm(dim=1).sum())

    best = min(itertools.permutations(range(5)), key=total)
    assert torch.equal(assigned, noise[list(best)])


def test_immiscible_target_follows_the_permutation() -> None:
    x0 = 2 * batch_of(32)
    noised, plain = (
        Noising(EPSILON, noise=kind, seed=8)(x0, step=0) for kind in ("immiscible", "gaussian")
    )
    assert torch.equal(noised.target, noised.noise) and torch.equal(noised.t, plain.t)
    assert torch.equal(noised.x, EPSILON.add_noise(x0, noised.noise, noised.t))
    moved = [k for k in range(32) if not torch.equal(noised.noise[k], plain.noise[k])]
    assert len(moved) > 16
    # the same noises
    assert sorted(n.tolist() for n in noised.noise) == sorted(n.tolist() for n in plain.noise)


@pytest.mark.parametrize("accumulate", [1, 2, 4])
def test_immiscible_noises_do_not_depend_on_the_layout(accumulate: int) -> None:
    x0, noising = batch_of(8), Noising(EPSILON, noise="immiscible", seed=8)
    n = 8 // accumulate
    pieces = [
        noising(x0[m * n : (m + 1) * n], step=1, micro_batch=m, accumulate=accumulate)
        for m in range(accumulate)
    ]
    plain = Noising(EPSILON, seed=8)(x0, step=1)
    assert torch.equal(torch.cat([p.t for p in pieces]), plain.t)
    drawn = [n.tolist() for p in pieces for n in p.noise]
    assert sorted(drawn) == sorted(n.tolist() for n in plain.noise)


# chains


def test_a_chain_is_its_kinds_one_after_the_other() -> None:
    x0 = batch_of(8)
    both = Noising(EPSILON, noise=["input_perturbation", Offset(0.2)], seed=4)
    assert [kind.name for kind in both.noise.kinds] == ["offset", "input_perturbation"]
    drawn = both.draw(range(8), (3, 4, 5), step=2, total=8)
    offset, perturbation = drawn.parts
    noised = both(x0, step=2)
    assert torch.equal(noised.noise, drawn.noise + offset)
    assert torch.equal(noised.target, noised.noise)
    assert torch.equal(
        noised.x, EPSILON.add_noise(x0, drawn.noise + offset + perturbation, noised.t)
    )
    alone = Noising(EPSILON, noise=Offset(0.2), seed=4)(x0, step=2)
    assert torch.equal(alone.noise, noised.noise)
    assert torch.equal(
        Noising(EPSILON, noise=[Gaussian(), Offset(0.2)], seed=4)(x0, step=2).noise, alone.noise
    )


def test_order_counts_among_kinds_that_change_the_target() -> None:
    x0 = batch_of(4)
    one, other = (
        Noising(EPSILON, noise=c)(x0, step=0).noise
        for c in (["pyramid", "offset"], ["offset", "pyramid"])
    )
    assert not torch.allclose(one, other, atol=1e-3)


def test_given_noise_is_taken_as_it_is() -> None:
    x0, noise = batch_of(4), batch_of(4, seed=1)
    noised = Noising(EPSILON, noise=KINDS["chain"])(x0, step=0, noise=noise)
    assert torch.equal(noised.noise, noise) and torch.equal(
        noised.x, EPSILON.add_noise(x0, noise, noised.t)
    )


# bad input

BAD = {
    "offset": (lambda: Offset(-0.1), r"^noise offset strength must be at least 0, got -0\.1; 0\.05 to 0\.1 are usual$"),
    "offset nan": (lambda: Offset(math.nan), "^noise offset strength"),
    "offset inf": (lambda: Offset(math.inf), "^noise offset strength"),
    "probability": (lambda: Offset(probability=1.5), r"^the probability of a noise offset must lie in 0 \.\.\. 1, got 1\.5$"),
    "adaptive": (lambda: AdaptiveOffset(-1.0), "^noise offset strength"),
    "scale": (lambda: AdaptiveOffset(scale=math.inf), "^the scale of an adaptive noise offset must "
                                                      "be finite, got inf$"),
    "iterations": (lambda: Pyramid(iterations=0), r"^pyramid noise needs at least 1 iteration .*, got 0 and 0\.3"),
    "discount": (lambda: Pyramid(discount=1.1), "^pyramid noise needs"),
    "perturbation": (lambda: InputPerturbation(-1), r"^input perturbation strength must be at least 0, got -1; the paper uses 0\.1$"),
    "decay": (lambda: InputPerturbation(decay_steps=0), "^decay_steps of an input perturbation "
                                                        "must be at least 1, got 0$"),
    "empty": (lambda: Noising(EPSILON, noise=[]), "^a chain of noises needs at least one kind"),
    "name in list": (lambda: Noising(EPSILON, noise=["offset", "pyramd"]), r"^unknown noise 'pyramd'; did you mean 'pyramid'\?$"),
    "flat pyramid": (lambda: Noising(EPSILON, noise="pyramid")(torch.zeros(2, 3), step=0), "^pyramid noise needs samples with axes"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_settings_are_refused(name: str) -> None:
    make, message = BAD[name]
    with pytest.raises(ValueError, match=message):
        make()


def test_a_chain_is_of_kinds() -> None:
    with pytest.raises(
        TypeError, match=r"^a chain of noises is of Noise objects, got str; names go to Noising"
    ):
        Chain(("offset",))
