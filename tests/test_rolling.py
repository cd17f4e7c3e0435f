"""Sampling matrices: the full one is the Sampler; every one draws from the distribution of the data.

The data are frames of a Gaussian process. The exact denoiser of frames with a time each is linear,
so a sampler is a linear map of its noise and its known frames, and the mean and the covariance of
what it draws are known without sampling error.
"""

from __future__ import annotations

import pickle
from typing import Any

import pytest
import torch
from torch import Tensor

from alphabar.noising import NoiseSchedule
from alphabar.sampling import METHODS, DynamicThreshold, RollingSampler, Sampler, fit_table
from alphabar.sampling.rolling import resolve_matrix
from oracles import SCHEDULES
from registries import restored

SHAPE = (2, 3, 4, 2, 3)
FLOW, ZTSNR = NoiseSchedule.flow(), SCHEDULES["ztsnr"]
V = SCHEDULES["scaled_linear"].with_prediction("v_prediction")


def mixing(x: Tensor, t: Tensor, shift: float = 0.0, **_: Any) -> Tensor:
    """A network that mixes frames and looks at each one's time; it takes both shapes of times."""
    t = t[:, None].expand(-1, x.shape[2]) if t.ndim == 1 else t
    t = t.repeat_interleave(x.shape[2] // t.shape[1], 1).to(x.dtype)[:, None, :, None, None]
    mixed = 0.7 * x + 0.3 * x.roll(1, 2)
    return torch.tanh(1.1 * mixed + 0.1 + shift) * (0.4 + t / 1500)


# the full sequence


@pytest.mark.parametrize("method", METHODS)
def test_the_full_matrix_is_the_sampler(method: str) -> None:
    for schedule in (V, FLOW):
        try:
            sampler = Sampler(schedule, method, steps=5)
        except ValueError as error:  # a method for some schedules alone
            pytest.skip(str(error))
        rolling = RollingSampler(sampler, "full", chunks=2)
        one = sampler(mixing, SHAPE, seeds=[4, 5])
        torch.testing.assert_close(
            rolling(mixing, SHAPE, seeds=[4, 5]), one, rtol=1e-6, atol=1e-6 * float(one.abs().max())
        )


@pytest.mark.parametrize("clip", [None, 0.5, DynamicThreshold(ratio=0.9, max_value=2.0)], ids=str)
@pytest.mark.parametrize("method", ["ddim", "unclipped ddim", "heun", "ddpm", "euler_cfg_pp"])
def test_guidance_clipping_and_given_noise_too(method: str, clip: Any) -> None:
    options = {"use_clipped_model_output": False} if method.startswith("unclipped") else {}
    sampler = Sampler(ZTSNR, method.split()[-1], steps=4, **options)
    arguments: dict[str, Any] = {"clip": clip, "guidance_scale": 2.0, "guidance_rescale": 0.3}
    arguments |= {"conditioning": {"shift": 0.2}, "unconditional": {"shift": 0.0}, "seeds": 7}
    start = torch.randn(SHAPE, dtype=torch.float64)
    one, rolled = (
        [p.denoised for p in made.iterate(mixing, start, **arguments)]
        for made in (sampler, RollingSampler(sampler, "full", chunks=4))
    )
    torch.testing.assert_close(torch.stack(rolled), torch.stack(one), rtol=1e-6, atol=1e-6)


def test_brownian_noise_and_times() -> None:
    pytest.importorskip("torchsde")
    sampler = Sampler(ZTSNR, "dpmpp_2m_sde", steps=4)
    rolling = RollingSampler(sampler, "full", chunks=4)
    one, rolled = (s(mixing, SHAPE, seeds=3, noise="brownian") for s in (sampler, rolling))
    torch.testing.assert_close(rolled, one)


# every matrix


def seen_by(rolling: RollingSampler, **arguments: Any) -> list[list[float]]:
    """The times of the first sample in each network call."""
    seen: list[list[float]] = []

    def network(x: Tensor, t: Tensor) -> Tensor:
        assert t.shape == (2, 4) and torch.equal(t[0], t[1])
        seen.append(t[0].tolist())
        return mixing(x, t)

    rolling(network, SHAPE, seeds=0, **arguments)
    return seen


def test_the_times_of_a_roll_out() -> None:
    """Waiting chunks stand at the first time, finished ones at the least; heun calls twice a row."""
    euler = Sampler(FLOW, "euler", steps=2)
    assert seen_by(RollingSampler(euler, "pyramid", chunks=4)) == [
        [1000, 1000, 1000, 1000],
        [500, 1000, 1000, 1000],
        [0, 500, 1000, 1000],
        [0, 0, 500, 1000],
        [0, 0, 0, 500],
    ]
    known = torch.zeros(1, 3, 2, 2, 3)
    assert seen_by(RollingSampler(euler, "autoregressive", chunks=4), known=known) == [
        [0, 0, 1000, 1000],
        [0, 0, 500, 1000],
        [0, 0, 0, 1000],
        [0, 0, 0, 500],
    ]
    assert seen_by(
        RollingSampler(Sampler(V, "heun", steps=2), "pyramid:lag=2", chunks=4, context_time=10)
    )[3:5] == [[10, 999, 999, 999], [10, 499, 999, 999]]
    entries = [[0] * 4, [1, 0, 0, 0], [2, 0, 0, 0], [2, 1, 1, 1], [2, 2, 2, 2]]
    assert seen_by(RollingSampler(euler, torch.tensor(entries), chunks=4), known=known) == [
        [0, 0, 1000, 1000],
        [0, 0, 500, 500],
    ]


@pytest.mark.parametrize("method", ["dpmpp_2m_sde", "ddpm", "seeds_2"])
def test_noise_depends_on_neither_matrix_nor_batch(method: str) -> None:
    """A network that looks at one frame alone makes every matrix the same samples."""

    def alone(x: Tensor, t: Tensor) -> Tensor:
        return torch.tanh(x) * (0.4 + t[:, None, :, None, None] / 1500)

    sampler = Sampler(FLOW, method, steps=4)
    one = RollingSampler(sampler, "full", chunks=4)(alone, SHAPE, seeds=[8, 9])
    for matrix in ("pyramid", "pyramid:lag=3", "autoregressive"):
        rolling = RollingSampler(sampler, matrix, chunks=4)
        torch.testing.assert_close(rolling(alone, SHAPE, seeds=[8, 9]), one)
        torch.testing.assert_close(rolling(alone, (1, *SHAPE[1:]), seeds=[9]), one[1:])


def test_known_frames_are_kept_and_shape_the_rest() -> None:
    rolling = RollingSampler(Sampler(FLOW, "dpmpp_2m", steps=3), "pyramid", chunks=2)
    known = torch.randn(2, 3, 2, 2, 3)
    steps = list(rolling.iterate(mixing, SHAPE, known=known, seeds=0))
    assert len(steps) == 3 and [p.step for p in steps] == [1, 2, 3]
    assert torch.equal(steps[-1].x[:, :, :2], known)
    assert torch.equal(steps[0].denoised[:, :, :2], known)
    shown = []
    later = RollingSampler(rolling.sampler, "pyramid", chunks=2, context_time=0.25)
    later(lambda x, t: shown.append(x[:, :, :2]) or mixing(x, t), SHAPE, known=known, seeds=0)
    assert all(torch.equal(x, 0.75 * known) for x in shown) and len(shown) == 3
    other = rolling(mixing, SHAPE, known=known + 1, seeds=0)
    assert not torch.allclose(other[:, :, 2:], steps[-1].x[:, :, 2:])


# the exact answer

FRAMES, GIVEN = 6, 2


def covariance() -> Tensor:
    """Of a Gaussian process with a smooth and a rough part."""
    apart = torch.arange(FRAMES, dtype=torch.float64)[:, None] - torch.arange(FRAMES)
    return 0.7 * torch.exp(-((apart / 2.0) ** 2)) + 0.3 * torch.exp(-apart.abs())


def exact(schedule: NoiseSchedule) -> Any:
    """The best denoiser of frames with a time each: E[x_0 | x] = K A (A K A + S²)^-1 x."""
    K = covariance()

    def network(x: Tensor, t: Tensor) -> Tensor:
        assert torch.equal(t, t[:1].expand_as(t))
        times = t[0].double() / (1 if schedule.curve.is_discrete else 1000)
        A, S = schedule.alpha(times), schedule.sigma(times)
        gain = K @ A.diag() @ torch.linalg.inv(A.diag() @ K @ A.diag() + (S**2).diag())
        x0 = torch.einsum("ij,bcjhw->bcihw", gain, x)
        view = (1, 1, -1, 1, 1)
        epsilon = (x - A.view(view) * x0) / S.clamp(min=1e-12).view(view)
        return schedule.prediction.combine(x0, epsilon, A.view(view), S.view(view))

    return network


def errors(matrix: Any, steps: int, schedule: NoiseSchedule, **options: Any) -> tuple[float, float]:
    """The largest errors of the mean and of the covariance, given the first frames."""
    rolling = RollingSampler(
        Sampler(schedule, "heun", steps=steps, **options), matrix, chunks=FRAMES
    )
    K, network, new = covariance(), exact(schedule), FRAMES - GIVEN
    unit = torch.eye(FRAMES, dtype=torch.float64)
    size = (FRAMES, 1, FRAMES, 1, 1)
    no_frames = torch.zeros(1, 1, GIVEN, 1, 1, dtype=torch.float64)
    of_noise = rolling(network, unit.view(size), known=no_frames)[:, 0, GIVEN:, 0, 0].T
    of_known = rolling(
        network,
        torch.zeros(GIVEN, *size[1:], dtype=torch.float64),
        known=unit[:GIVEN, :GIVEN].view(GIVEN, 1, GIVEN, 1, 1),
    )[:, 0, GIVEN:, 0, 0].T
    mean = K[GIVEN:, :GIVEN] @ torch.linalg.inv(K[:GIVEN, :GIVEN])
    conditional = K[GIVEN:, GIVEN:] - mean @ K[:GIVEN, GIVEN:]
    assert of_noise.shape == (new, FRAMES)
    return (
        float((of_known - mean).abs().max()),
        float((of_noise @ of_noise.T - conditional).abs().max()),
    )


@pytest.mark.parametrize("matrix", ["full", "pyramid", "pyramid:lag=5", "autoregressive"])
def test_roll_outs_draw_from_the_conditional_distribution(matrix: str) -> None:
    """The mean is exact; the covariance is right to 0.0025 with 64 steps of heun, and twice as many
    steps leave less than a third of the error.
    """
    (mean, coarse), (again, fine) = (errors(matrix, steps, FLOW) for steps in (64, 128))
    assert max(mean, again) < 1e-12
    assert coarse < 2.5e-3
    assert fine < coarse / 3


def test_a_discrete_schedule_too() -> None:
    """Its least noise, σ = 0.03, is not 0: the mean is wrong by what clean frames at that time are."""
    sample = SCHEDULES["scaled_linear"].with_prediction("sample").zero_terminal_snr()
    (mean, coarse), (_, fine) = (errors("autoregressive", steps, sample) for steps in (64, 128))
    assert mean < 2e-3
    assert coarse < 0.03
    assert fine < 0.6 * coarse


# names and errors


def test_it_is_a_value_and_takes_matrices_from_outside() -> None:
    sampler = Sampler(FLOW, "euler", steps=3)
    rolling = RollingSampler(sampler, "pyramid:lag=2", chunks=4)
    again = pickle.loads(pickle.dumps(rolling))
    assert again.rows(4) == rolling.rows(4) and rolling.steps == 9
    assert torch.equal(again(mixing, SHAPE, seeds=1), rolling(mixing, SHAPE, seeds=1))
    with restored():
        from alphabar.sampling import MATRICES

        @MATRICES.register
        def backwards(chunks: int, steps: int) -> Any:
            return [row[::-1] for row in resolve_matrix("autoregressive", chunks, steps)]

        assert RollingSampler(sampler, "backwards", chunks=2).rows(2)[:3] == (
            (0, 0),
            (0, 1),
            (0, 2),
        )


@pytest.mark.parametrize(
    ("matrix", "options", "words"),
    [
        ("pyramids", {}, "unknown sampling matrix 'pyramids'; did you mean 'pyramid'"),
        ("full:lag=1", {}, "unknown option of sampling matrix full 'lag'"),
        ("pyramid:lag=-1", {}, "lag must be an integer of at least 0"),
        ([[0, 0], [3, 3]], {}, "rises by 0 or 1"),
        ([[0, 0], [1, 1]], {}, "goes from zeros to the 3 steps"),
        ([[0], [1], [2], [3]], {}, "a column for each of 2 chunks"),
        ("full", {"context_time": 2.0}, "context_time must be a time in 0 ... 1"),
    ],
)
def test_errors(matrix: Any, options: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        RollingSampler(Sampler(FLOW, "euler", steps=3), matrix, chunks=2, **options)


def test_errors_of_a_call() -> None:
    rolling = RollingSampler(Sampler(FLOW, "euler", steps=3), chunks=3)
    with pytest.raises(ValueError, match="4 long, does not divide into 3 chunks"):
        rolling(mixing, SHAPE)
    rolling = RollingSampler(Sampler(FLOW, "euler", steps=3), chunks=2)
    for wrong in ((2, 3, 1, 2, 3), (2, 3, 4, 2, 3), (3, 3, 2, 2, 3), (2, 3, 2, 2)):
        with pytest.raises(ValueError, match="known must be like x"):
            rolling(mixing, SHAPE, known=torch.zeros(wrong))
    with pytest.raises(TypeError, match="runs the table of a Sampler, got DPMAdaptive"):
        RollingSampler(Sampler(FLOW, "DPM adaptive"), chunks=2)


def test_a_fitted_table_keeps_its_guidance() -> None:
    table = fit_table(lambda x, t: torch.tanh(x), FLOW, 2, shape=(8,), seeds=16)
    rolling = RollingSampler(Sampler.from_table(table), "full", chunks=2, axis=1)
    with pytest.raises(ValueError, match="the table was fitted with"):
        rolling.iterate(mixing, (1, 8), guidance_scale=3.0)
