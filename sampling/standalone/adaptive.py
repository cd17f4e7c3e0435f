"""DPM adaptive: DPM-Solver-12 and -23 with an adaptive step size.

Source: Lu et al. 2206.00927, appendix C. A table cannot express it: the next knot depends on the
difference between two orders on the images, so the knots are not known before the run. But every
attempted step is linear, and is traced with the formulas of the tables when its knots are known.
One number is copied from the device for every attempt: the error.

In σ̄ = σ / α and λ = -log σ̄ the error of a step is, as in k-diffusion, whose results this
reproduces,

    E = || (x̄_low - x̄_high) / δ || / sqrt(N),
    δ = max(atol, rtol max(|x̄_low|, |x̄_low of the last accepted step|)),

with x̄ = x / α and the norm over all N numbers of the batch. The whole batch has one step size, so
an image depends on the other images of its batch, within the tolerance. The step size is set by
k-diffusion's PID controller, not by the paper's 0.9 h E^(-1/k).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from ...noising import NoiseSchedule
from ...noising.utils.validation import one_of, require
from ..guidance import Network
from ..inference import Run, last, prepare_run, without_gradients
from ..kernel import Progress, combine, perform
from ..knots import CLEAN, Knot, knot_at_half_log_snr, knots_at
from ..methods.dpm2 import ancestral_target
from ..methods.dpm_singlestep import dpm_solver_2, dpm_solver_3
from ..methods.steps import check_eta, first_order_update, first_order_update_epsilon, posterior_std
from ..tracing import Combination, Row, Trace
from .base import register_standalone


def dpm_solver_12(
    trace: Trace, s: Knot, n: Knot, x: Combination, e: Combination
) -> tuple[Combination, Combination]:
    """Return x_n by DPM-Solver-1 and by DPM-Solver-2 (2206.00927, appendix C)."""
    return first_order_update_epsilon(x, e, s, n), dpm_solver_2(trace, s, n, x, e)[0]


def dpm_solver_23(
    trace: Trace, s: Knot, n: Knot, x: Combination, e: Combination
) -> tuple[Combination, Combination]:
    """Return x_n by DPM-Solver-2 and by DPM-Solver-3 (2206.00927, appendix C).

    They share their first two evaluations.
    """
    low, e1 = dpm_solver_2(trace, s, n, x, e, r1=1 / 3)
    return low, dpm_solver_3(trace, s, n, x, e, e1)


@dataclass
class PIDController:
    """The step size in λ, from the errors of the last three steps.

    k-diffusion's PIDStepSizeController. The factor of the next size is between 0.2 and 2.6:

        1 + atan(E_1^-b1 E_2^-b2 E_3^-b3 - 1).

    >>> controller = PIDController(
    ...     0.05, pcoeff=0.0, icoeff=1.0, dcoeff=0.0, order=3.0, accept_safety=0.81
    ... )
    >>> controller.accepts(1e-3), round(controller.h, 4)
    (True, 0.123)
    """

    h: float
    pcoeff: float
    icoeff: float
    dcoeff: float
    order: float
    accept_safety: float
    inverse_errors: list[float] = field(default_factory=list)

    def accepts(self, error: float) -> bool:
        """Return whether a step with this error is accepted; set the size of the next attempt."""
        now = 1 / (error + 1e-8)
        if not self.inverse_errors:
            self.inverse_errors = [now, now]
        one_ago, two_ago = self.inverse_errors
        b1, b2, b3 = (
            self.pcoeff + self.icoeff + self.dcoeff,
            -(self.pcoeff + 2 * self.dcoeff),
            self.dcoeff,
        )
        factor = (now**b1 * one_ago**b2 * two_ago**b3) ** (1 / self.order)
        factor = 1 + math.atan(factor - 1)
        accepted = factor >= self.accept_safety
        if accepted:
            self.inverse_errors = [now, one_ago]
        self.h *= factor
        return accepted


class AdaptiveProgress(Progress):
    """The state of an adaptive run after an accepted step.

    As Progress, but ``steps`` is an estimate until the last step.

    Attributes:
        knot: The point reached.
        evaluations, accepted, rejected: The numbers of network calls and of accepted and rejected
            attempts.
        error: The error of the last step.
        h: The size in λ of the next attempt.
    """

    def __init__(
        self,
        x: Tensor,
        row: Row,
        basis: Sequence[Tensor],
        knot: Knot,
        counts: _Counts,
        error: float,
        h: float,
        to_go: int,
    ) -> None:
        super().__init__(counts.steps, counts.steps + to_go, x, row, basis)
        self.knot, self.error, self.h = knot, error, h
        self.evaluations, self.accepted, self.rejected = (
            counts.evaluations,
            counts.accepted,
            counts.rejected,
        )


@dataclass
class _Counts:
    steps: int = 0
    evaluations: int = 0
    accepted: int = 0
    rejected: int = 0


@register_standalone(
    "dpm_adaptive",
    order=3,
    source="2206.00927",
    evaluations=None,
    stochastic=False,
    aliases={"DPM adaptive": {"final": "sigma_min"}},
)
@dataclass(frozen=True)
class DPMAdaptive:
    """Draw samples with DPM-Solver-12 (``order`` 2) or -23 (``order`` 3) and an adaptive step size.

    Called like a Sampler. There is no number of steps; ``rtol`` and ``atol`` determine it. From a
    knot with α = 0 it takes one first-order step, to the training timestep before.

    Args:
        rtol, atol: The relative and absolute tolerance of the error.
        h_init: The first step size in λ.
        pcoeff, icoeff, dcoeff, accept_safety: Parameters of the controller.
        eta, s_noise: As in ancestral sampling.
        sigma_min, sigma_max: The run goes from ``sigma_max`` to ``sigma_min`` (σ / α, by default
            the schedule's).
        final: 'zero': end with the clean estimate at ``sigma_min``. 'sigma_min': end at
            ``sigma_min``, as in k-diffusion.
        max_evaluations: The maximum number of network calls.

    Raises:
        ValueError: An option is out of range.
        RuntimeError: The run needs more than ``max_evaluations`` calls, or the error is not finite.

    >>> sampler = DPMAdaptive(NoiseSchedule.scaled_linear(prediction="v_prediction"))
    >>> sampler(lambda x, t: -x, (2, 4, 8, 8), seeds=[0, 1]).shape
    torch.Size([2, 4, 8, 8])
    """

    name: ClassVar[str]
    steps: ClassVar[None] = None
    schedule: NoiseSchedule
    order: int = 3
    rtol: float = 0.05
    atol: float = 0.0078
    h_init: float = 0.05
    pcoeff: float = 0.0
    icoeff: float = 1.0
    dcoeff: float = 0.0
    accept_safety: float = 0.81
    eta: float = 0.0
    s_noise: float = 1.0
    sigma_min: float | None = None
    sigma_max: float | None = None
    final: str = "zero"
    max_evaluations: int = 1000

    def __post_init__(self) -> None:
        one_of("order", self.order, (2, 3))
        one_of("final", self.final, ("zero", "sigma_min"))
        check_eta(self.eta)
        for name in ("rtol", "atol", "h_init", "accept_safety", "max_evaluations"):
            require(getattr(self, name) > 0, name, "be positive", getattr(self, name))
        _ = self.ends  # invalid input fails here, before any work

    @property
    def ends(self) -> tuple[Knot, Knot]:
        """The first and last point of the adaptive part; the first has the most noise."""
        curve = self.schedule.curve
        index = torch.tensor([self.schedule.num_train_timesteps - 1, 0], dtype=torch.float64)
        first, end = knots_at(self.schedule, curve.time_at_index(index))
        for name, value in (("sigma_max", self.sigma_max), ("sigma_min", self.sigma_min)):
            fits = value is None or 0 < value < math.inf
            require(fits, name, "be positive and finite (it is σ / α)", value)
        if self.sigma_max is not None:
            first = knot_at_half_log_snr(self.schedule, -math.log(self.sigma_max))
        if self.sigma_min is not None:
            end = knot_at_half_log_snr(self.schedule, -math.log(self.sigma_min))
        if not end.sigma_ve < first.sigma_ve:
            raise ValueError(
                f"need sigma_min < sigma_max, got {end.sigma_ve:g} and {first.sigma_ve:g}"
            )
        return first, end

    def __call__(
        self, network: Network, shape_or_noise: Sequence[int] | Tensor, **arguments: Any
    ) -> Tensor:
        """Return samples, shape (batch, ...), float32 or better.

        Arguments as in ``Sampler.iterate``.
        """
        return last(self.iterate(network, shape_or_noise, **arguments)).x

    def iterate(
        self, network: Network, shape_or_noise: Sequence[int] | Tensor, **arguments: Any
    ) -> Iterator[AdaptiveProgress]:
        """Sample and yield after each accepted step. Arguments as in ``Sampler.iterate``."""
        run = prepare_run(self.schedule, self.ends[0], network, shape_or_noise, **arguments)
        return without_gradients(self.advance(run))

    def advance(self, run: Run) -> Iterator[AdaptiveProgress]:
        """Run from ``run.x`` at the first of :attr:`ends`."""
        (s, end), x, counts = self.ends, run.x, _Counts()
        pid = PIDController(
            self.h_init,
            self.pcoeff,
            self.icoeff,
            self.dcoeff,
            1.5 if self.eta else self.order,
            self.accept_safety,
        )
        if s.alpha == 0:
            n = self._after_terminal(end)
            x, row, basis = self._first_order(run, x, s, n, counts)
            s = n
            yield AdaptiveProgress(x, row, basis, s, counts, 0.0, pid.h, self._to_go(s, end, pid.h))
        x_low = x / s.alpha  # x̄ of the last accepted lower order
        while not _reached(s, end):
            basis, row, e = self._evaluate(run, x, s, counts)
            while True:
                n = (
                    end
                    if s.half_log_snr + pid.h >= end.half_log_snr
                    else self._knot(s.half_log_snr + pid.h)
                )
                d = self._target(s, n, end)
                low, high = self._attempt(run, x, e, s, d, counts)
                error = self._error(low / n.alpha, high / n.alpha, x_low, s)
                if pid.accepts(error):
                    break
                counts.rejected += 1
            x, x_low, s = self._renewed(run, high, n, d), low / n.alpha, n
            counts.accepted += 1
            counts.steps += 1
            yield AdaptiveProgress(
                x, row, basis, s, counts, error, pid.h, self._to_go(s, end, pid.h)
            )
        if self.final == "zero":
            x, row, basis = self._first_order(run, x, s, CLEAN, counts)
            yield AdaptiveProgress(x, row, basis, CLEAN, counts, 0.0, pid.h, 0)

    def _to_go(self, s: Knot, end: Knot, h: float) -> int:
        adaptive = 0 if _reached(s, end) else math.ceil((end.half_log_snr - s.half_log_snr) / h)
        return adaptive + (self.final == "zero")

    def _knot(self, half_log_snr: float) -> Knot:
        return knot_at_half_log_snr(self.schedule, half_log_snr)

    def _after_terminal(self, end: Knot) -> Knot:
        index = torch.tensor([self.schedule.num_train_timesteps - 2.0], dtype=torch.float64)
        (n,) = knots_at(self.schedule, self.schedule.curve.time_at_index(index))
        return n if end.sigma_ve < n.sigma_ve else end

    def _target(self, s: Knot, n: Knot, end: Knot) -> Knot:
        """Return the end point of the ODE step; the ancestral noise then raises x to n."""
        if not self.eta:
            return n
        d = ancestral_target(n, self.eta * posterior_std(s, n))
        # not below the end of the run
        return Knot(d.timestep, n.alpha, max(d.sigma, n.alpha * end.sigma_ve))

    def _renewed(self, run: Run, x: Tensor, n: Knot, d: Knot) -> Tensor:
        r = self.s_noise * math.sqrt(max(n.sigma**2 - d.sigma**2, 0.0))
        return x.add(run.noise().to(x.dtype), alpha=r) if self.eta and r else x

    def _first_order(
        self, run: Run, x: Tensor, s: Knot, n: Knot, counts: _Counts
    ) -> tuple[Tensor, Row, Sequence[Tensor]]:
        self._count(1, s, counts)
        counts.steps += 1
        trace, state = Trace(self.schedule, 1), Combination({0: 1.0})
        row = first_order_update(state, trace.denoise(state, s), s, n).row
        basis = [x]
        perform(trace.ops, basis, run.evaluate, _no_noise)
        return combine(row, basis), trace.denoised.row, basis

    def _evaluate(
        self, run: Run, x: Tensor, s: Knot, counts: _Counts
    ) -> tuple[Sequence[Tensor], Row, Tensor]:
        """Return the basis and row of D at s, and ε̂; all attempts from s share them."""
        self._count(1, s, counts)
        trace = Trace(self.schedule, 1)
        D, e = trace.evaluate(Combination({0: 1.0}), s)
        basis = [x]
        perform(trace.ops, basis, run.evaluate, _no_noise)
        return basis, D.row, combine(e.row, basis)

    def _attempt(
        self, run: Run, x: Tensor, e: Tensor, s: Knot, d: Knot, counts: _Counts
    ) -> tuple[Tensor, Tensor]:
        self._count(self.order - 1, s, counts)
        trace = Trace(self.schedule, 2)
        formula = dpm_solver_12 if self.order == 2 else dpm_solver_23
        low, high = formula(trace, s, d, Combination({0: 1.0}), Combination({1: 1.0}))
        basis = [x, e]
        perform(trace.ops, basis, run.evaluate, _no_noise)
        return combine(low.row, basis), combine(high.row, basis)

    def _error(self, low: Tensor, high: Tensor, low_before: Tensor, s: Knot) -> float:
        delta = (self.rtol * torch.maximum(low.abs(), low_before.abs())).clamp(min=self.atol)
        error = float(torch.linalg.vector_norm((low - high) / delta)) / low.numel() ** 0.5
        if not math.isfinite(error):
            raise RuntimeError(
                f"DPM adaptive: the error of a step from σ/α = {s.sigma_ve:g} is {error}; "
                "look for NaN or infinity in what the network puts out"
            )
        return error

    def _count(self, evaluations: int, s: Knot, counts: _Counts) -> None:
        counts.evaluations += evaluations
        if counts.evaluations > self.max_evaluations:
            raise RuntimeError(
                f"DPM adaptive needs more than max_evaluations = {self.max_evaluations} calls of "
                "the network: after "
                f"{counts.accepted} accepted and {counts.rejected} rejected steps it stands at σ/α "
                f"= {s.sigma_ve:g}; "
                f"raise max_evaluations, or rtol = {self.rtol:g} and atol = {self.atol:g}"
            )


def _reached(s: Knot, end: Knot) -> bool:
    return s.half_log_snr >= end.half_log_snr - 1e-5


def _no_noise(start: float, end: float) -> Tensor:
    raise AssertionError("the noise of an adaptive step is drawn when the step is accepted")
