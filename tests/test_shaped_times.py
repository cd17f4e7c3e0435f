"""Times of shape (batch, k): equal ones are one time for the sample, bit for bit; each element is
noised, weighted and counted by its own; the draws depend on (seed, step, global index) alone.
"""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from alphabar.noising import (
    IndependentTimesteps,
    JointNoising,
    LearnedUncertainty,
    NoiseSchedule,
    Noising,
    SharedTimesteps,
    StaircaseTimesteps,
    UniformTimesteps,
)
from alphabar.noising.timesteps.shaped import resolve_times
from oracles import EVERY_SCHEDULE, SCHEDULES, allowed

FLOW, ZTSNR = SCHEDULES["flow"], SCHEDULES["ztsnr"]
SHAPE = (3, 2, 6, 3, 5)  # (batch, channels, frames, height, width)


def videos(dtype: torch.dtype = torch.float32, shape: tuple[int, ...] = SHAPE) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=dtype)


def output(x: Tensor) -> Tensor:
    return torch.sin(3 * x) - 0.2


# equal times


@pytest.mark.parametrize(
    "schedule",
    [s for base in EVERY_SCHEDULE.values() for s in allowed(base)],
    ids=lambda s: f"{s.curve.kind}-{s.prediction.name}",
)
def test_equal_times_are_one_time_bit_for_bit(schedule: NoiseSchedule) -> None:
    x0, mask = videos(), (videos() > 0.5)[:, :1]
    for weighting, loss, chunks in (
        ("min_snr", "l2", None),
        ("uniform", "pseudo_huber", 3),
        (LearnedUncertainty(weighting="edm", channels=8), "l2", 2),
    ):
        plain = Noising(schedule, weighting, "stratified", loss=loss).eval()
        density = SharedTimesteps(density="stratified", chunks=chunks)
        shaped = Noising(schedule, weighting, density, loss=loss).eval()
        for noising in (plain, shaped):
            for weight in noising.parameters():
                nn.init.constant_(weight, 0.1)
        one, several = plain(x0, step=5), shaped(x0, step=5)
        k = chunks or SHAPE[2]
        for name in ("x", "x_t", "target", "noise"):
            assert torch.equal(getattr(one, name), getattr(several, name)), name
        for name in ("t", "timesteps", "weight"):
            assert torch.equal(getattr(one, name)[:, None].expand(-1, k), getattr(several, name))
        out = output(one.x)
        assert torch.equal(one.losses(out), several.losses(out))
        for over in ("all", "mask"):
            assert torch.equal(one.losses(out, mask, over), several.losses(out, mask, over))


def test_times_of_one_axis_are_what_they_were() -> None:
    """A density of one time for each sample has no axis, and refuses k times."""
    noised = Noising(FLOW)(videos(), step=0)
    assert noised.axis is None and noised.counted is None and noised.t.shape == (3,)
    with pytest.raises(ValueError, match=r"must have shape \(3,\), one for each sample"):
        Noising(FLOW)(videos(), step=0, timesteps=torch.rand(3, 6))
    with pytest.raises(ValueError, match=r"got \(3, 6\); times along an axis need axis="):
        FLOW.add_noise(videos(), videos(), torch.rand(3, 6))


# each element by itself


@pytest.mark.filterwarnings("ignore:weighting 'min_snr' is 0")
@pytest.mark.parametrize(
    ("axis", "chunks"), [(2, None), ("frames", 3), (-1, 1), (-2, None), (-3, 2)], ids=str
)
def test_each_element_is_the_sample_of_its_time(axis: Any, chunks: int | None) -> None:
    x0 = videos()
    number = axis % 5 if isinstance(axis, int) else 2
    k = chunks or SHAPE[number]
    size = SHAPE[number] // k
    for schedule in (FLOW, ZTSNR, SCHEDULES["scaled_linear"], NoiseSchedule.karras()):
        density = IndependentTimesteps(axis=axis, chunks=chunks)
        noised = Noising(schedule, "min_snr", density, seed=3)(x0, step=1)
        out = output(noised.x)
        losses = noised.losses(out)
        assert noised.timesteps.shape == (3, k) and len(noised.t.unique()) > 1
        expected = []
        for j in range(k):
            part = slice(j * size, (j + 1) * size)
            index = (slice(None),) * number + (part,)
            alone = Noising(schedule, "min_snr").at(x0[index], noised.t[:, j], noised.noise[index])
            for name in ("x", "x_t", "target"):
                assert torch.equal(getattr(alone, name), getattr(noised, name)[index]), name
            assert torch.equal(alone.weight, noised.weight[:, j])
            assert torch.equal(alone.log_snr, noised.log_snr[:, j])
            expected.append(alone.losses(out[index]))
        torch.testing.assert_close(losses, torch.stack(expected).mean(0))
        t = noised.t
        again = (
            schedule.add_noise(x0, noised.noise, t, axis),
            schedule.target(x0, noised.noise, t, axis),
        )
        assert torch.equal(again[0], noised.x_t) and torch.equal(again[1], noised.target)
        back = schedule.to_x0(noised.target.double(), noised.x_t.double(), t.double(), axis)
        fits = (noised.log_snr > -3).all(1)  # elsewhere float32 lost x_0
        torch.testing.assert_close(back.float()[fits], x0[fits], rtol=0, atol=1e-4)


def test_an_objective_is_the_same_for_every_target() -> None:
    x0, guess = videos(torch.float64), videos(torch.float64).roll(1, 0)
    t = torch.rand(3, 6, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    t = 0.02 + 0.95 * t
    for base in (NoiseSchedule.cosine(), NoiseSchedule.flow()):
        losses = []
        for schedule in allowed(base):
            if schedule.prediction.name == "consistency":
                continue  # its network has no say at sigma_min, which rounds
            noising = Noising(schedule, "min_snr", "independent")
            noised = noising(x0, step=0, timesteps=t)
            epsilon = (noised.x_t - base.alpha_sigma(t, x0, 2)[0] * guess) / base.alpha_sigma(
                t, x0, 2
            )[1]
            losses.append(noised.losses(schedule.target(guess, epsilon, t, 2)))
        for other in losses[1:]:
            torch.testing.assert_close(other, losses[0], rtol=1e-12, atol=0)


def test_weights_far_apart_do_not_cancel() -> None:
    x0 = videos(shape=(2, 1, 4, 2, 2))
    noised = Noising(FLOW, timesteps="independent")(x0, step=0)
    noised = noised.replaced(weight=torch.tensor([[1e8, 1e-3, 2.0, 3.0], [5.0, 7e7, 1.0, 1.0]]))
    out = noised.target.clone()
    out[0, :, 1:] += 0.3
    out[1, :, 0] -= 0.1
    out.requires_grad_()
    errors = (out - noised.target).double().square().mean((1, 3, 4))
    expected = (noised.weight.double() * errors).mean(1)
    losses = noised.losses(out)
    torch.testing.assert_close(losses.double(), expected, rtol=1e-6, atol=0)
    (grad,), (exact,) = (torch.autograd.grad(loss.sum(), out) for loss in (losses, expected))
    torch.testing.assert_close(grad, exact.float(), rtol=1e-5, atol=0)


# what counts


def test_context_stands_at_the_least_time_and_does_not_count() -> None:
    """Where the score's target is infinite too: loss and gradient stay finite."""
    x0 = videos()
    schedule = NoiseSchedule.flow().truncated(t_max=0.9).with_prediction("score")
    noising = Noising(schedule, "uniform", IndependentTimesteps(context=2))
    noised = noising(x0, step=0)
    assert torch.equal(noised.x[:, :, :2], x0[:, :, :2]) and not noised.t[:, :2].any()
    assert not noised.target[:, :, :2].isfinite().any()
    assert noised.counted is not None and noised.counted.tolist() == [[False] * 2 + [True] * 4] * 3
    out = torch.zeros(SHAPE, requires_grad=True)
    loss = noised.losses(out)
    loss.sum().backward()
    assert out.grad is not None and out.grad.isfinite().all() and not out.grad[:, :, :2].any()
    errors = noised.target[:, :, 2:].square().mean((1, 3, 4))
    torch.testing.assert_close(loss, (noised.weight[:, 2:] * errors).mean(1))


def test_masks_and_counts_together() -> None:
    noised = Noising(FLOW, timesteps="independent")(videos(), step=0)
    noised = noised.replaced(weight=torch.tensor([[1.0, 2.0, 3.0, 4.0, 5.0, 6.0]]).repeat(3, 1))
    counted = torch.tensor([[False, True, True, True, True, True], [True] * 6, [False] * 6])
    noised = noised.replaced(counted=counted, weight=torch.where(counted, noised.weight, 0.0))
    mask = torch.zeros(3, 1, 6, 3, 5)
    mask[0, :, :3] = 1.0  # elements 0, 1, 2, of which 1 and 2 count; sample 1 has an empty mask
    out = noised.target + 2
    assert noised.losses(out).tolist() == pytest.approx([4 * 4, 3.5 * 4, 0])
    assert noised.losses(out, mask).tolist() == pytest.approx([(2 + 3) * 4 / 5, 0, 0])
    assert noised.losses(out, mask, "mask").tolist() == pytest.approx([2.5 * 4, 0, 0])
    assert noised.to("cpu").counted is counted


def test_a_staircase_counts_those_that_are_under_way() -> None:
    """Of them, each element has the times of the density; others are clean or pure noise."""
    for lag in (None, 0.1, 1.0):
        density = StaircaseTimesteps(density="stratified", lag=lag, axis="tokens")
        noised = Noising(FLOW, timesteps=density)(torch.zeros(4000, 5, 1), step=0)
        t, counted = noised.t, noised.counted
        assert counted is not None and bool(counted.any(1).all())
        assert bool((t.diff(dim=1) >= 0).all())
        assert set(t[~counted].tolist()) <= {0.0, 1.0}
        for j in range(5):
            own = t[:, j][counted[:, j]].sort().values
            even = (torch.arange(len(own)) + 0.5) / len(own)
            assert float((own - even).abs().max()) < 0.01


# draws


@pytest.mark.parametrize(
    "density",
    [
        IndependentTimesteps(density="stratified_logit_normal", context=1, context_probability=0.5),
        StaircaseTimesteps(density="stratified", chunks=3),
    ],
    ids=lambda d: d.name,
)
def test_draws_depend_on_neither_processes_nor_resume(density: Any) -> None:
    x0 = videos(shape=(8, 1, 6, 2, 2))
    names = ("x", "t", "weight", "noise", "counted")
    whole = Noising(ZTSNR, timesteps=density, noise="offset", seed=4)(x0, step=7)
    for rank in (0, 1):  # after a resume at step 7, in two micro-batches, as one of two processes
        noising = Noising(ZTSNR, timesteps=density, noise="offset", seed=4)
        mine = x0[rank::2]
        parts = [
            noising(part, step=7, rank=rank, world_size=2, accumulate=2) for part in mine.split(2)
        ]
        for name in names:
            rows = torch.cat([getattr(part, name) for part in parts])
            assert torch.equal(rows, getattr(whole, name)[rank::2]), name
    assert whole.counted is not None and whole.counted.any() and not whole.counted.all()
    drawn = Noising(ZTSNR, timesteps=density, noise="offset", seed=4).draw(
        range(8), (1, 6, 2, 2), step=7, total=8
    )
    at = Noising(ZTSNR, timesteps=density, noise="offset").at(
        x0, drawn.t, drawn.noise, drawn.parts, drawn.counted
    )
    assert all(torch.equal(getattr(at, name), getattr(whole, name)) for name in names)


def test_independent_times_are_stratified_over_all_elements() -> None:
    density = IndependentTimesteps(density=UniformTimesteps(stratified=True), axis="tokens")
    t = Noising(NoiseSchedule.flow(), timesteps=density)(torch.zeros(10, 7, 2), step=0).t
    assert torch.equal((70 * t.flatten()).ceil().sort().values, torch.arange(1.0, 71.0))


def test_kinds_of_noise_and_perturbations_keep_working() -> None:
    noising = Noising(FLOW, timesteps="independent", noise=["pyramid", "input_perturbation"])
    noised = noising(videos(), step=0)
    alpha, sigma = FLOW.alpha_sigma(noised.t, noised.x, 2)
    assert not torch.allclose(noised.x, alpha * videos() + sigma * noised.noise)
    assert torch.equal(noised.target, noised.noise - videos())


# modalities


def test_modalities_have_their_own_times_and_noise() -> None:
    def make(times: Any) -> JointNoising:
        video = Noising(FLOW, "min_snr:floor=0.1", IndependentTimesteps(context=1), seed=1)
        return JointNoising({"video": video, "sound": Noising(ZTSNR, seed=2)}, times)

    x0 = {"video": videos(), "sound": videos()[:, :, 0]}
    noised = make("independent")(x0, step=3)
    assert noised.x.keys() == noised.timesteps.keys() == x0.keys()
    alone = Noising(ZTSNR, seed=2)(x0["sound"], step=3)
    assert torch.equal(alone.x, noised["sound"].x) and torch.equal(alone.t, noised["sound"].t)
    assert not torch.equal(noised["video"].noise[:, :, 0], noised["sound"].noise)
    out, mask = {name: output(x) for name, x in noised.x.items()}, torch.ones(3, 1, 6, 3, 5)
    mask[..., 0] = 0.0
    each = noised["video"].losses(out["video"], mask), noised["sound"].losses(out["sound"])
    assert torch.equal(noised.losses(out, {"video": mask}), each[0] + each[1])
    assert torch.equal(noised.loss(out), noised.losses(out).mean())
    half = make("independent")({k: v[1:2] for k, v in x0.items()}, step=3, index=[1], total=3)
    assert all(torch.equal(half[name].x, noised[name].x[1:2]) for name in x0)

    both = {name: Noising(FLOW, seed=seed) for name, seed in (("a", 0), ("b", 1))}
    shared = JointNoising(both, times="shared")({"a": x0["sound"], "b": x0["video"]}, step=0)
    assert torch.equal(shared["a"].t, shared["b"].t)
    stairs = {
        k: Noising(FLOW, timesteps="staircase:axis=2,lag=1.0", seed=i) for i, k in enumerate("ab")
    }
    clips = {"a": videos(), "b": videos(shape=(3, 1, 6))}
    noised = JointNoising(stairs, times="shared")(clips, step=0)
    counted = noised["a"].counted
    assert counted is not None and not bool(counted.all())
    for name in "ab":
        assert torch.equal(noised[name].counted, counted)  # type: ignore[arg-type]
        assert torch.equal(noised[name].weight, counted.float())
        expected = stairs[name].at(clips[name], noised["a"].t, noised[name].noise, (), counted)
        out = output(clips[name])
        assert torch.equal(noised[name].losses(out), expected.losses(out))
    with pytest.raises(ValueError, match="must have the modalities a, b, got a"):
        JointNoising(both)({"a": x0["sound"]}, step=0)
    with pytest.raises(ValueError, match="equal ones would give equal noise"):
        JointNoising({"a": Noising(FLOW), "b": Noising(FLOW)})


@pytest.mark.parametrize(
    ("other", "words"),
    [
        (Noising(FLOW, timesteps="loss_second_moment", seed=1), "follow the losses of one"),
        (Noising(FLOW, timesteps="independent", seed=1), "a: uniform, b: independent with chunks"),
        (Noising(ZTSNR, seed=1), "the same times, got 0 ... 1, 0 ... 999"),
    ],
)
def test_times_that_cannot_be_shared(other: Noising, words: str) -> None:
    both = {"a": Noising(FLOW), "b": other}
    with pytest.raises(ValueError, match=re.escape(words)):
        JointNoising(both, times="shared")
    JointNoising(both)


# names and errors


def test_names() -> None:
    density = resolve_times("staircase:lag=0.5,axis=tokens,density=logit_normal:mean=1")
    assert isinstance(density, StaircaseTimesteps) and (density.lag, density.axis) == (
        0.5,
        "tokens",
    )
    assert resolve_times("stratified") == UniformTimesteps(stratified=True)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: resolve_times("independnt"), "unknown timestep density 'independnt'"),
        (lambda: IndependentTimesteps(axis="frame"), "did you mean 'frames'"),
        (lambda: IndependentTimesteps(density="loss_second_moment"), "go around other densities"),
        (lambda: SharedTimesteps(density=SharedTimesteps()), "around a density of one time"),
        (lambda: IndependentTimesteps(context_probability=2.0), "lie in 0 ... 1"),
        (lambda: StaircaseTimesteps(lag=0.0), r"lag must lie in \(0, 1\]"),
        (
            lambda: Noising(FLOW, timesteps="independent:chunks=4")(videos(), step=0),
            "6 long, does not divide into 4 chunks",
        ),
        (
            lambda: Noising(FLOW, timesteps="independent:context=6")(videos(), step=0),
            "be less than the 6 elements",
        ),
        (
            lambda: Noising(FLOW, timesteps="independent")(
                videos(), step=0, timesteps=torch.rand(3)
            ),
            r"must have shape \(3, k\), k times for each sample, got \(3,\)",
        ),
        (lambda: Noising(FLOW, timesteps="shared")(torch.zeros(2, 4), step=0), "has no axis 2"),
    ],
)
def test_errors(make: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        make()
