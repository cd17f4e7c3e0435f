"""Levels: what noising needs of each time, i.e. coefficients, loss weight and threshold.

On a discrete schedule these are functions of the training timestep. So they are computed once for
all timesteps, and a batch gathers its rows.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from .curves.base import check_times
from .losses import Loss
from .schedule import NoiseSchedule
from .weighting import Weighting

WEIGHT, THRESHOLD = 4, 5
"""Rows of the levels."""


@dataclass(eq=False)
class LevelTable:
    """The levels of a schedule, for a weighting and a loss.

    >>> from alphabar.noising import L2, MinSNR
    >>> levels = LevelTable(NoiseSchedule.linear(), MinSNR(), L2())
    >>> levels.at(torch.tensor([0, 999]), torch.float32)[WEIGHT]
    tensor([5.0005e-04, 1.0000e+00])
    """

    schedule: NoiseSchedule
    weighting: Weighting
    loss: Loss
    # by device and dtype
    _tables: dict[tuple[str, int | None, torch.dtype], Tensor] = field(default_factory=dict)

    def is_of(self, schedule: NoiseSchedule, weighting: Weighting, loss: Loss) -> bool:
        """Return whether the table is made of these very objects."""
        return self.schedule is schedule and self.weighting is weighting and self.loss is loss

    def at(self, t: Tensor, dtype: torch.dtype, *, checked: bool = False) -> Tensor:
        """Return the levels at times of the curve, shape (5 or 6, batch).

        The rows are α, σ, c0, c1, the weight, and the threshold of a loss that has one.

        Args:
            t: times, shape (batch,).
            dtype: float32 or float64.
            checked: the times are known to lie on the curve.

        Raises:
            ValueError: for times outside the curve (checked on the CPU).
        """
        curve = self.schedule.curve
        if not curve.is_discrete or t.is_floating_point():
            return self._evaluated(t.to(torch.float64) if dtype == torch.float64 else t)
        if torch.compiler.is_compiling():  # a compiler fuses the formulas
            return self._evaluated(t if dtype == torch.float32 else t.double())
        if not checked:
            check_times(curve, t)
        index = t.to(torch.int64)
        return self.of(t.device, dtype)[:, index - int(curve.t_min) if curve.t_min else index]

    def of(self, device: torch.device, dtype: torch.dtype) -> Tensor:
        """Return the levels of all timesteps from ``t_min`` on, shape (5 or 6, T).

        They are kept, unless the weighting has parameters that train.
        """
        key = device.type, device.index, dtype
        if key in self._tables:
            return self._tables[key]
        curve = self.schedule.curve
        # what needs a gradient is told in validation too; what is kept serves training later
        with torch.inference_mode(False), torch.enable_grad():
            t = torch.arange(int(curve.t_min), int(curve.t_max) + 1)
            made = self._evaluated(t if dtype == torch.float32 else t.double()).to(device)
        if not made.requires_grad:
            self._tables[key] = made
        return made

    def _evaluated(self, t: Tensor) -> Tensor:
        curve = self.schedule.curve
        alpha, sigma = curve.alpha(t), curve.sigma(t)
        fraction = curve.fraction(t.to(alpha.dtype))
        c0, c1 = (
            torch.as_tensor(c, dtype=alpha.dtype, device=alpha.device).expand_as(alpha)
            for c in self.schedule.prediction.coefficients(alpha, sigma)
        )
        weight = self.weighting(alpha, sigma, c0 * sigma - c1 * alpha, fraction)
        threshold = self.loss.threshold(sigma / alpha, fraction)
        rows = [alpha, sigma, c0, c1, weight.expand_as(alpha)]
        return torch.stack(rows if threshold is None else [*rows, threshold])
