"""One Brownian path per image: increments add up, are standard normal, and make samples settle as
steps grow.
"""

import math

import pytest
import torch
from torch import Tensor

from alphabar.noising import NoiseSchedule
from alphabar.sampling import Knot, Sampler
from alphabar.sampling.inference import SeededNoise
from alphabar.sampling.noise_sources import BrownianNoise

CPU = torch.device("cpu")
KNOTS = [Knot(9, 0.1, 1.0), Knot(0, 1.0, 0.0)]
SCHEDULE = NoiseSchedule.scaled_linear(prediction="sample")


def noise_of(*seeds: int, size: int = 2000) -> BrownianNoise:
    return BrownianNoise(SeededNoise((len(seeds), size), seeds, CPU), KNOTS)


def test_increments_add_up_in_any_order() -> None:
    a, b = noise_of(3), noise_of(3)
    parts = 7**0.5 * a(10.0, 3.0) + 2**0.5 * a(3.0, 1.0)
    assert torch.allclose(9**0.5 * b(10.0, 1.0), parts, atol=1e-4)


def test_increments_are_standard_normal_and_independent() -> None:
    noise = noise_of(1, size=20_000)
    first, second = noise(10.0, 4.0)[0], noise(4.0, 0.5)[0]
    for z in (first, second):
        assert abs(float(z.mean())) < 5 / math.sqrt(20_000)
        assert float(z.var()) == pytest.approx(1, abs=5 * math.sqrt(2 / 20_000))
    assert abs(float((first * second).mean())) < 5 / math.sqrt(20_000)


@pytest.mark.parametrize("apart", [2**31, 2**32, 2**63])
def test_all_bits_of_a_seed_make_the_path(apart: int) -> None:
    one, other = noise_of(1)(10.0, 4.0), noise_of(1 + apart)(10.0, 4.0)
    assert abs(float((one * other).mean())) < 5 / math.sqrt(2000)


def test_an_image_does_not_depend_on_its_batch() -> None:
    assert torch.equal(noise_of(1, 2)(10.0, 4.0)[1], noise_of(2)(10.0, 4.0)[0])


def gaussian_network(x: Tensor, t: Tensor) -> Tensor:
    """E[x_0 | x_t] for x_0 ~ N(0, 0.5²)."""
    alpha, sigma = SCHEDULE.alpha(t).view(-1, 1), SCHEDULE.sigma(t).view(-1, 1)
    return 0.25 * alpha / (0.25 * alpha**2 + sigma**2) * x


def spread_between_step_counts(noise: str, method: str) -> float:
    few, many = (
        Sampler(SCHEDULE, method, steps, "karras")(gaussian_network, (1, 64), seeds=0, noise=noise)
        for steps in (60, 240)
    )
    return float((few - many).std())


@pytest.mark.parametrize("method", ["dpmpp_2m_sde", "dpmpp_sde", "euler_ancestral"])
def test_samples_settle_on_one_path_and_not_without(method: str) -> None:
    """What people say of ancestral and SDE samplers is true of independent draws."""
    independent, brownian = (
        spread_between_step_counts(noise, method) for noise in ("independent", "brownian")
    )
    assert independent > 0.3
    assert brownian < independent / 4


def test_zero_terminal_snr_starts_from_independent_noise() -> None:
    schedule = NoiseSchedule.scaled_linear(prediction="v_prediction").zero_terminal_snr()
    x = Sampler(schedule, "dpmpp_sde", 5)(lambda x, t: -x, (2, 3), seeds=[1, 2], noise="brownian")
    assert x.isfinite().all()


def test_unknown_source() -> None:
    with pytest.raises(ValueError, match="unknown noise 'brown'; did you mean 'brownian'"):
        Sampler(SCHEDULE, "euler_ancestral", 5)(gaussian_network, (1, 2), noise="brown")
