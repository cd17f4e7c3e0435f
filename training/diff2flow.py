"""Diff2Flow: an epsilon or v network as a flow network.

Source: Schusterbauer et al. 2506.02221, §3.2. A point of the flow path at noise level s,
x = (1 - s) x_0 + s ε, is a point of the diffusion path with the same SNR, but for a factor:

    α / σ = (1 - s) / s    (the time of the diffusion model, by SNR),
    x_d = (α + σ) x        (its input),
    u = ε - x_0            (the velocity, of the ε and x_0 that its output implies at x_d).

So a network that was trained on betas learns, and is sampled, on a straight path, from its own
weights on.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..noising import NoiseSchedule
from ..noising.curves.base import evaluation_dtype
from ..noising.noising import prediction_tensor
from ..noising.prediction import FlowVelocity


class Diff2Flow(nn.Module):
    """A network of a diffusion schedule that takes and returns what one of a flow does.

    Train it with a flow, sample it with the same flow, save ``network``:

        network = Diff2Flow(unet, NoiseSchedule.preset("sd15"))
        module = DiffusionModule(network, Noising(NoiseSchedule.flow(), timesteps="logit_normal"))

    Noise levels beyond the schedule's last timestep, which has a little signal unless its terminal
    SNR is 0, are those of that timestep: rescale the schedule (``zero_terminal_snr``) where the
    network was trained so.

    Args:
        network: called as ``network(x_d, timesteps, **conditioning)``; fractions of timesteps.
        schedule: the schedule that it was trained on, variance preserving.
        num_train_timesteps: the flow's scale of time: timesteps are num_train_timesteps · σ.

    Raises:
        ValueError: if the schedule is a flow, or scales its network's input (EDM).

    >>> network = Diff2Flow(nn.Identity(), NoiseSchedule.flow())
    Traceback (most recent call last):
    ValueError: Diff2Flow is for a network of betas, and this schedule is flow; it needs no bridge
    """

    def __init__(
        self, network: nn.Module, schedule: NoiseSchedule, num_train_timesteps: int = 1000
    ) -> None:
        super().__init__()
        if schedule.curve.is_flow or schedule.curve.scales_input:
            raise ValueError(
                f"Diff2Flow is for a network of betas, and this schedule is {schedule.curve.kind}; "
                + ("it needs no bridge" if schedule.curve.is_flow else "its input has a scale")
            )
        self.network = network
        self.schedule = schedule
        self.num_train_timesteps = num_train_timesteps
        curve = schedule.curve
        ends = torch.tensor([curve.t_max, curve.t_min], dtype=torch.float64)
        self._log_snrs = tuple(curve.log_snr(ends).tolist())

    def forward(self, x: Tensor, timesteps: Tensor, **conditioning: Any) -> Tensor:
        """Return the velocity ε - x_0, shape of ``x``.

        Args:
            x: a point of the flow path, shape (batch, ...).
            timesteps: 1000 σ of the flow, a scalar or shape (batch,).
            conditioning: passed to the network.
        """
        curve, time = self.schedule.curve, timesteps.to(evaluation_dtype(timesteps))
        s = time / self.num_train_timesteps
        log_snr = (2 * (torch.log1p(-s) - s.log())).clamp(*self._log_snrs)
        alpha, sigma = (
            level.to(x.device).view(-1, *[1] * (x.ndim - 1)) if level.ndim else level
            for level in curve.alpha_sigma_at(log_snr)
        )
        x_d = (alpha + sigma) * x
        t = curve.time(log_snr).clamp(curve.t_min, curve.t_max)
        at = self.schedule.model_timesteps(t, t.dtype)
        out = prediction_tensor(self.network(x_d.to(x.dtype), at, **conditioning))
        prediction, out = self.schedule.prediction, out.to(x_d.dtype)
        x0 = prediction.to_x0(out, x_d, alpha, sigma)
        epsilon = prediction.to_epsilon(out, x_d, alpha, sigma)
        return FlowVelocity().combine(x0, epsilon, alpha, sigma).to(x.dtype)
