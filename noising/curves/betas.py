"""Beta schedules: the T variances β_1 ... β_T of a discrete curve, by name.

A schedule that is defined by ᾱ(t) on t in [0, 1] has the betas β_i = 1 - ᾱ(i / T) / ᾱ((i - 1) / T)
(Nichol & Dhariwal 2102.09672, §3.2), capped at 0.999.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from ..utils.registry import Registry

MAX_BETA = 0.999

BETA_SCHEDULES: Registry[Callable[[int, float, float], Tensor]] = Registry("beta schedule")
"""The beta schedules by their names in diffusers: (T, beta_start, beta_end) -> T float64 betas.

The values are those of diffusers, with one exception: its 'laplace' uses α in place of α², and is
called 'laplace_diffusers' here."""


@BETA_SCHEDULES.register
def linear(n: int, start: float, end: float) -> Tensor:
    return torch.linspace(start, end, n, dtype=torch.float64)


@BETA_SCHEDULES.register
def scaled_linear(n: int, start: float, end: float) -> Tensor:
    return torch.linspace(start**0.5, end**0.5, n, dtype=torch.float64) ** 2


@BETA_SCHEDULES.register
def sigmoid(n: int, start: float, end: float) -> Tensor:
    # GeoDiff (Xu et al. 2203.02923): betas that follow a sigmoid from -6 to 6
    return torch.sigmoid(torch.linspace(-6, 6, n, dtype=torch.float64)) * (end - start) + start


@BETA_SCHEDULES.register
def squaredcos_cap_v2(n: int, start: float, end: float) -> Tensor:
    # Nichol & Dhariwal 2102.09672, eq. 17: ᾱ(t) = cos²((t + 0.008) / 1.008 π/2)
    return _of_alpha_bar(torch.cos((_times(n) + 0.008) / 1.008 * math.pi / 2) ** 2)


@BETA_SCHEDULES.register
def exp(n: int, start: float, end: float) -> Tensor:
    return torch.full((n,), -math.expm1(-12 / n), dtype=torch.float64)  # ᾱ(t) = e^(-12 t)


@BETA_SCHEDULES.register
def laplace(n: int, start: float, end: float) -> Tensor:
    alpha_bar = torch.sigmoid(_laplace_log_snr(n))
    alpha_bar[0] = 1.0  # the table then holds ᾱ(i / T) itself, not its ratio to ᾱ(0) = 0.999
    return _of_alpha_bar(alpha_bar)


@BETA_SCHEDULES.register
def laplace_diffusers(n: int, start: float, end: float) -> Tensor:
    return _of_alpha_bar(torch.sigmoid(_laplace_log_snr(n)).sqrt())  # α in place of ᾱ


def _laplace_log_snr(n: int) -> Tensor:
    # Hang et al. 2407.03297, Laplace schedule, μ = 0 and b = 1/2; 1e-6 keeps the ends finite
    distance = 0.5 - _times(n)
    return -0.5 * torch.where(distance < 0, -1.0, 1.0) * (1 - 2 * distance.abs() + 1e-6).log()


def _times(n: int) -> Tensor:
    return torch.arange(n + 1, dtype=torch.float64) / n


def _of_alpha_bar(alpha_bar: Tensor) -> Tensor:
    return (1 - alpha_bar[1:] / alpha_bar[:-1]).clamp(max=MAX_BETA)
