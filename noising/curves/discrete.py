"""Discrete curves: T training timesteps with betas, as in DDPM and Stable Diffusion."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..utils.registry import lookup
from .base import (
    CURVES,
    MAX_TIMESTEPS,
    Curve,
    check_times,
    evaluation_dtype,
    require_count,
    require_factor,
)
from .betas import BETA_SCHEDULES

_CPU = torch.device("cpu")
LEAST_BETA = 1e-12  # σ = 1e-6: float32 still distinguishes α from σ
TRAINED = "trained_betas"  # the name of a schedule with explicit betas


@CURVES.register
@dataclass(frozen=True)
class Discrete(Curve):
    """T training timesteps with betas: α_t² = ᾱ_t = Π (1 - β_i), σ_t² = 1 - ᾱ_t.

    Source: Ho et al. 2006.11239, eq. 4. Times are indices 0 ... T - 1. Between them log SNR is
    piecewise linear; in an interval that ends in zero SNR, α is linear instead.

    Args:
        beta_schedule: a name of ``BETA_SCHEDULES``.
        beta_start: the first beta, for the schedules that use it.
        beta_end: the last beta, for the schedules that use it.
        num_train_timesteps: T.
        trained_betas: T explicit betas in place of a named schedule.
        rescale_betas_zero_snr: shift and scale α so that α at T - 1 is exactly 0 and the first α is
            kept (Lin et al. 2305.08891, algorithm 1).
        snr_shift_scale: divides the SNR before that rescaling, as CogVideoX does (2408.06072).
        rescaled_snr_shift_scale: divides the SNR after it; α = 0 stays 0.

    >>> curve = Discrete("scaled_linear", 0.00085, 0.012)
    >>> curve.sigma_ve(torch.tensor([0, 999]))
    tensor([ 0.0292, 14.6146])
    >>> curve.zero_terminal_snr().alpha(torch.tensor(999)).item()
    0.0
    """

    kind: ClassVar[str] = "discrete"
    is_discrete: ClassVar[bool] = True
    beta_schedule: str = "scaled_linear"
    beta_start: float = 0.00085
    beta_end: float = 0.012
    trained_betas: Sequence[float] | None = None
    rescale_betas_zero_snr: bool = False
    snr_shift_scale: float = 1.0
    rescaled_snr_shift_scale: float = 1.0
    # an instance attribute, not a field
    _tables: ClassVar[dict[tuple[str, int | None, torch.dtype], _Table]]

    def __post_init__(self) -> None:
        betas = self.trained_betas
        if betas is None:
            lookup("beta schedule", self.beta_schedule, BETA_SCHEDULES)
        else:
            if len(betas) > MAX_TIMESTEPS:
                raise ValueError(f"trained_betas must be at most {MAX_TIMESTEPS}, got {len(betas)}")
            betas = tuple(float(b) for b in betas)
            start, end = (betas[0], betas[-1]) if betas else (0.0, 0.0)
            self._set(beta_schedule=TRAINED, beta_start=start, beta_end=end)
            self._set(trained_betas=betas, num_train_timesteps=len(betas))
        usual = "1 is no shift, CogVideoX-2b uses 3"
        self._set(
            beta_start=float(self.beta_start),
            beta_end=float(self.beta_end),
            num_train_timesteps=require_count(self.num_train_timesteps, least=2),
            rescale_betas_zero_snr=bool(self.rescale_betas_zero_snr),
            snr_shift_scale=require_factor("snr_shift_scale", self.snr_shift_scale, usual),
            rescaled_snr_shift_scale=require_factor(
                "rescaled_snr_shift_scale", self.rescaled_snr_shift_scale
            ),
        )
        for name, value in (("beta_start", self.beta_start), ("beta_end", self.beta_end)):
            # scaled_linear takes the square root
            if not 0 <= value <= 1 and betas is None:
                raise ValueError(
                    f"betas must lie in (0, 1], got {value} as {name}; 0.0001 to 0.02 is usual"
                )
        _require_betas(self.betas())
        self._tabulate()

    def _set(self, **values: Any) -> None:
        for name, value in values.items():
            object.__setattr__(self, name, value)

    def _tabulate(self) -> None:
        # kept on the curve, by device and dtype: torch.compile then treats tables as inputs. With
        # another cache it would trace their creation, or share one constant between curves. Both
        # dtypes are made at once: a table that appears later would recompile
        exact = _table_f64(self)
        tables = {("cpu", None, d): exact.to(_CPU, d) for d in (torch.float64, torch.float32)}
        object.__setattr__(self, "_tables", tables)

    def _table(self, device: torch.device, dtype: torch.dtype) -> _Table:
        key = device.type, device.index, dtype
        if key in self._tables:
            return self._tables[key]
        table = self._tables["cpu", None, torch.float64].to(device, dtype)
        if not torch.compiler.is_compiling():
            self._tables[key] = table
        return table

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_tables"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._tabulate()

    def betas(self) -> Tensor:
        """Return the T betas as given, before any rescaling (float64, on the CPU)."""
        if self.trained_betas is not None:
            return torch.tensor(self.trained_betas, dtype=torch.float64)
        return BETA_SCHEDULES[self.beta_schedule](
            self.num_train_timesteps, self.beta_start, self.beta_end
        )

    @property
    def t_max(self) -> float:
        return float(self.num_train_timesteps - 1)

    def alpha(self, t: Tensor) -> Tensor:
        return self.alpha_sigma(t)[0]

    def sigma(self, t: Tensor) -> Tensor:
        return self.alpha_sigma(t)[1]

    def alpha_sigma(self, t: Tensor) -> tuple[Tensor, Tensor]:
        check_times(self, t)
        table = self._table(t.device, evaluation_dtype(t))
        if not t.is_floating_point():
            index = t.long()
            return table.alpha[index], table.sigma[index]
        t = t.to(table.alpha.dtype)
        k = t.floor().clamp(0, self.num_train_timesteps - 2).long()
        f = t - k
        # λ is linear inside an interval; an infinite λ is replaced, so that the unused branch stays
        # finite
        half = 0.5 * (table.log_snr[k] + f * (table.log_snr[k + 1] - table.log_snr[k]))
        alpha, sigma = torch.rsqrt(1 + torch.exp(-2 * half)), torch.rsqrt(1 + torch.exp(2 * half))
        to_zero = table.alpha[k + 1] == 0
        alpha = torch.where(to_zero, (1 - f) * table.alpha[k], alpha)
        sigma = torch.where(to_zero, (1 - alpha**2).sqrt(), sigma)
        nearest = t.round().long().clamp(0, self.num_train_timesteps - 1)
        on_table = t == nearest
        return torch.where(on_table, table.alpha[nearest], alpha), torch.where(
            on_table, table.sigma[nearest], sigma
        )

    def time(self, log_snr: Tensor) -> Tensor:
        table = self._table(log_snr.device, evaluation_dtype(log_snr))
        value = log_snr.to(table.alpha.dtype)
        descending = table.log_snr
        k = (torch.searchsorted(-descending, -value.contiguous(), right=True) - 1).clamp(
            0, self.num_train_timesteps - 2
        )
        f = ((descending[k] - value) / (descending[k] - descending[k + 1])).clamp(0, 1)
        to_zero = table.alpha[k + 1] == 0
        alpha = torch.rsqrt(1 + torch.exp(-value))
        f = torch.where(to_zero, (1 - alpha / table.alpha[k]).clamp(0, 1), f)
        return k + f

    def timestep(self, t: Tensor) -> Tensor:
        return t

    def time_at_index(self, index: Tensor) -> Tensor:
        return index

    def time_at_quantile(self, u: Tensor) -> Tensor:
        return (
            (u * self.num_train_timesteps)
            .ceil()
            .long()
            .sub(1)
            .clamp(0, self.num_train_timesteps - 1)
        )

    def zero_terminal_snr(self) -> Discrete:
        if not float(_table_f64(self).alpha[-1]):
            return self
        # all shifts so far
        before = self.snr_shift_scale * self.rescaled_snr_shift_scale
        return replace(
            self, rescale_betas_zero_snr=True, snr_shift_scale=before, rescaled_snr_shift_scale=1.0
        )

    def shifted(self, factor: float) -> Discrete:
        scale = require_factor("factor", factor) ** 2
        if self.rescale_betas_zero_snr:
            return replace(self, rescaled_snr_shift_scale=self.rescaled_snr_shift_scale * scale)
        return replace(self, snr_shift_scale=self.snr_shift_scale * scale)


def _require_betas(betas: Tensor) -> None:
    bad = ((betas >= LEAST_BETA) & (betas <= 1)).logical_not_().nonzero().flatten()
    if len(bad):
        i = int(bad[0])
        value = float(betas[i])
        advice = (
            f"below {LEAST_BETA:g} it adds no noise"
            if 0 < value < 1
            else "check beta_start and beta_end"
        )
        raise ValueError(f"betas must lie in (0, 1], got {value} at index {i}; {advice}")
    ones = (betas[:-1] == 1).any()
    if bool(ones):
        raise ValueError(
            "only the last beta may be 1 (zero terminal SNR); an earlier one leaves pure noise "
            "ever after"
        )


@dataclass(frozen=True)
class _Table:
    alpha: Tensor
    sigma: Tensor
    log_snr: Tensor  # finite: an infinite last value is replaced by one below all others

    def to(self, device: torch.device, dtype: torch.dtype) -> _Table:
        return _Table(
            *(column.to(device, dtype) for column in (self.alpha, self.sigma, self.log_snr))
        )


@lru_cache(maxsize=64)
def _table_f64(curve: Discrete) -> _Table:
    # not 1 - ᾱ, which cancels near t = 0
    log_alpha_bar = torch.cumsum(torch.log1p(-curve.betas()), 0)
    alpha, sigma = torch.exp(0.5 * log_alpha_bar), torch.sqrt(-torch.expm1(log_alpha_bar))
    alpha, sigma = _shifted(alpha, sigma, curve.snr_shift_scale)
    if curve.rescale_betas_zero_snr and float(alpha[-1]) > 0:
        # algorithm 1: α' = (α - α_T) α_0 / (α_0 - α_T); 1 - α'² is computed from 1 - α' to avoid
        # cancellation
        scale = alpha[0] / (alpha[0] - alpha[-1])
        rescaled = (alpha - alpha[-1]) * scale
        one_minus = sigma[0] ** 2 / (1 + alpha[0]) + (alpha[0] - alpha) * scale
        alpha, sigma = rescaled, torch.sqrt(one_minus * (1 + rescaled))
    alpha, sigma = _shifted(alpha, sigma, curve.rescaled_snr_shift_scale)
    log_snr = 2 * (alpha.log() - sigma.log())
    if float(alpha[-1]) == 0:
        sigma[-1] = 1.0  # rounding may leave 1 - 1e-16
        log_snr[-1] = log_snr[-2] - 2 * math.log(2) - 60.0
    return _Table(alpha, sigma, log_snr)


def _shifted(alpha: Tensor, sigma: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Return the levels whose SNR is 1 / scale of the given ones, on the VP path."""
    if scale == 1:
        return alpha, sigma
    norm = torch.hypot(alpha, math.sqrt(scale) * sigma)
    return alpha / norm, math.sqrt(scale) * sigma / norm
