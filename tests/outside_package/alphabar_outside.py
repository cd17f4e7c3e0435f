"""A package outside the tree: one definition of each kind, each as small as it is in the library."""

from dataclasses import dataclass

import torch

from alphabar.noising import (
    BETA_SCHEDULES,
    CURVES,
    LOSSES,
    NOISES,
    SHAPED_TIMESTEPS,
    TIMESTEPS,
    WEIGHTINGS,
    Curve,
    Loss,
    Noise,
    QuantileTimesteps,
    Scheme,
    ShapedTimesteps,
)
from alphabar.sampling import MATRICES, register_method, register_sigma_grid, register_timestep_grid


@register_method(order=1, source="an example")
def outside_euler(trace, knots, i, x):
    s, n = knots[i], knots[i + 1]
    D, e = trace.evaluate(x, s)
    return [n.alpha * D + n.sigma * e]


@register_timestep_grid()
def outside_halves(schedule, points):
    return (schedule.num_train_timesteps - 1) * 0.5 ** torch.arange(points, dtype=torch.float64)


@register_sigma_grid()
def outside_even(points, low, high):
    return torch.linspace(high, low, points, dtype=torch.float64)


@BETA_SCHEDULES.register
def outside_betas(count, start, end):
    return torch.linspace(start, end, count, dtype=torch.float64) ** 1.0


@CURVES.register
@dataclass(frozen=True, kw_only=True)
class OutsideCurve(Curve):
    kind = "outside_circle"

    @property
    def t_max(self):
        return 0.99

    def alpha(self, t):
        return torch.cos(t * torch.pi / 2)

    def sigma(self, t):
        return torch.sin(t * torch.pi / 2)

    def time(self, log_snr):
        return torch.atan(torch.exp(-log_snr / 2)) * 2 / torch.pi

    def shifted(self, factor):
        raise ValueError("outside_circle has no shift")


@WEIGHTINGS.register
@dataclass(frozen=True, kw_only=True)
class OutsideWeighting(Scheme):
    name = "outside_half"

    def numerator(self, alpha2, sigma2, det2):
        return 0.5 * det2


@TIMESTEPS.register
@dataclass(frozen=True, kw_only=True)
class OutsideTimesteps(QuantileTimesteps):
    name = "outside_late"

    def quantile(self, u):
        return u**0.5


@SHAPED_TIMESTEPS.register
@dataclass(frozen=True, kw_only=True)
class OutsideShaped(ShapedTimesteps):
    name = "outside_mirrored"

    def shares(self, u, k):
        return torch.where(torch.arange(k) % 2 == 0, u, 1 - u)


@MATRICES.register
def outside_pairs(chunks, steps):
    rows = range(steps + (chunks - 1) // 2 + 1)
    return [[min(max(row - j // 2, 0), steps) for j in range(chunks)] for row in rows]


@NOISES.register
@dataclass(frozen=True)
class OutsideNoise(Noise):
    name = "outside_flicker"

    def draw(self, shape, draws):
        return 0.1 * draws.normal(*(1 for _ in shape))

    def apply(self, noise, part, x0):
        return noise + part


@LOSSES.register
@dataclass(frozen=True)
class OutsideLoss(Loss):
    name = "outside_fourth"

    def __call__(self, error, threshold):
        return error**4
