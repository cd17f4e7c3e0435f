"""Importance sampling of timesteps by the second moment of the loss.

Source: Nichol & Dhariwal 2102.09672, §3.2. The objective E[L_t] over a density of times is a mean
over N bins of equal probability under that density. Bin k is drawn with

    p_k = (1 - ε) sqrt(E[L_k²]) / Σ_j sqrt(E[L_j²]) + ε / N

and weighted with 1 / (N p_k). The expectation stays the same, Σ_k p_k L_k / (N p_k) = Σ_k L_k / N,
for any estimate of the second moments. With a good estimate the variance is lower. E[L_k²] is the
mean over the last losses in bin k; until every bin has its full number of losses, p_k = 1 / N.
Inside a bin the density stays the same, so the bins need no grid of timesteps.

All ranks must draw with the same p. So each loss is exchanged between ranks when it is computed.
The losses enter the history, in the order of their global indices, when the next optimizer step
draws its first times. Therefore p depends neither on the number of processes nor on the
accumulation, and a checkpoint of one rank holds the losses of all ranks. The history stays on the
CPU, where times are drawn.

Cost on a GPU: an all-gather and a copy of 3 x batch numbers in the stream after each loss. Before
the host draws for the next step, it waits for that copy, i.e. for the last forward of the previous
step, not for its backward or its update. With gloo, which gathers on the CPU, the host waits in
each loss.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..curves.base import Curve
from ..utils.validation import require, whole_number
from .base import TIMESTEPS, LossHistory, Resampled, Timesteps, take_strata
from .densities import UniformTimesteps, bin_of


@TIMESTEPS.register
@dataclass(frozen=True, kw_only=True)
class LossSecondMoment(Timesteps):
    """Draw times in proportion to the root mean square of their losses, without bias.

    The losses are those of training, including the weights of the objective but not 1 / (N p). They
    are recorded if gradients are enabled and the Noising is in training mode. All ranks must
    compute the same number of losses, on batches of equal size.

    Args:
        density: the density that is resampled; it must not follow losses itself.
        bins: N, the number of bins of equal probability under ``density``; the paper has one for
            each of its timesteps.
        history_per_term: number of losses that each bin keeps.
        uniform_prob: ε, in (0, 1].

    Raises:
        ValueError: for numbers out of range, and for a ``density`` that follows losses.

    >>> from alphabar.noising import LogitNormalTimesteps
    >>> LossSecondMoment(density=LogitNormalTimesteps(), bins=50).within(0.1, 0.9)
    Traceback (most recent call last):
    ValueError: loss_second_moment timesteps go around other densities, not into them; give them ...
    """

    name: ClassVar[str] = "loss_second_moment"
    measures_losses: ClassVar[bool] = True
    density: Timesteps = field(default_factory=UniformTimesteps)
    bins: int = 100
    history_per_term: int = 10
    uniform_prob: float = 0.001

    def __post_init__(self) -> None:
        for name in ("bins", "history_per_term"):
            value = whole_number(f"{name} of {self.name} timesteps", getattr(self, name), least=1)
            object.__setattr__(self, name, value)
        p, advice = self.uniform_prob, "with 0 a bin of no loss is never seen again"
        require(0 < p <= 1, "uniform_prob", "lie in (0, 1]", p, advice)
        if self.density.measures_losses:
            raise ValueError(
                f"{self.name} timesteps do not go around {self.density.name}; give one of the two"
            )
        take_strata(self, self.density)

    def times(self, u: Tensor, curve: Curve) -> Tensor:
        """Return the times of ``density``; the history decides which u are drawn."""
        return self.density.times(u, curve)

    def check(self, curve: Curve) -> None:
        self.density.check(curve)

    def history(self) -> SecondMoments:
        return SecondMoments(self.bins, self.history_per_term, self.uniform_prob)


class SecondMoments(LossHistory):
    """The last losses of each bin.

    The checkpoint contains it. ``.to`` and a change of precision do not affect it.

    >>> history = SecondMoments(bins=2, history_per_term=1, uniform_prob=0.5)
    >>> history.record(0, torch.tensor([[0.0, 0, 3.0], [1.0, 1, 1.0]]))  # (global index, bin, loss)
    >>> history.commit(1)
    >>> history.probabilities()
    tensor([0.6250, 0.3750], dtype=torch.float64)
    """

    def __init__(self, bins: int, history_per_term: int, uniform_prob: float) -> None:
        super().__init__()
        self.uniform_prob = uniform_prob
        # not buffers: buffers would move to the GPU, lose digits in half precision, and DDP would
        # broadcast them
        self._losses = torch.zeros(bins, history_per_term, dtype=torch.float64)
        self._counts = torch.zeros(bins, dtype=torch.int64)
        self._pending: list[tuple[int, _Arriving]] = []

    # -- drawing -----------------------------------------------------------------------------------

    def probabilities(self) -> Tensor:
        """Return p, shape (bins,), float64."""
        bins, per_term = self._losses.shape
        root_mean_square = self._losses.square().mean(1).sqrt()
        total = float(root_mean_square.sum())
        if total == 0 or bool((self._counts < per_term).any()):
            return torch.full((bins,), 1 / bins, dtype=torch.float64)
        return (1 - self.uniform_prob) * root_mean_square / total + self.uniform_prob / bins

    def resample(self, u: Tensor) -> Resampled:
        """Return resampled u with their bins and weights.

        ``u``: uniform in (0, 1], shape (batch,). The result's u are shares of the density.

        >>> SecondMoments(4, 10, 0.001).resample(torch.tensor([0.1, 1.0], dtype=torch.float64)).bins
        tensor([0, 3])
        """
        p = self.probabilities()
        bins, inside = bin_of(p, u)
        return Resampled((bins + inside) / len(p), bins, (1 / (len(p) * p[bins])).float())

    # -- observing ---------------------------------------------------------------------------------

    def observe(
        self, step: int, index: Tensor, drawn: Resampled, weight: Tensor, errors: Tensor
    ) -> None:
        """Record the losses of these global indices at this step; shape (batch,).

        A loss is weight times error, without 1 / (N p).
        """
        if not (self.training and torch.is_grad_enabled()):
            return  # validation
        device = errors.device
        weight = weight.detach() / drawn.weight.to(device, non_blocking=True)
        places = torch.stack([index.double(), drawn.bins.double()])
        if device.type == "mps":  # mps has no float64
            weight, errors, device = weight.cpu(), errors.cpu(), torch.device("cpu")
        losses = (errors.detach().to(weight.dtype) * weight).double()
        self.record(
            step, torch.cat([places.to(device, non_blocking=True), losses[None]]).T.contiguous()
        )

    def record(self, step: int, rows: Tensor) -> None:
        """Add rows (global index, bin, loss), shape (batch, 3), of this rank and all others.

        The rows wait until their step ends. Every rank must call this equally often, with the same
        number of rows.
        """
        self._pending.append((step, _Arriving(_of_all_ranks(rows.double()))))

    def commit(self, step: int) -> None:
        """Add the losses that were recorded at other steps to the history."""
        done = [(s, rows.arrived()) for s, rows in self._pending if s != step]
        self._pending = [(s, rows) for s, rows in self._pending if s == step]
        for s in sorted({s for s, _ in done}):
            rows = torch.cat([rows for t, rows in done if t == s])
            self._take(rows[rows[:, 0].argsort(stable=True)])

    def _take(self, rows: Tensor) -> None:
        """Overwrite the oldest losses of each bin; rows are in the order of the global index."""
        if not len(rows):
            return
        first_of_index = torch.cat([torch.ones(1, dtype=torch.bool), rows[1:, 0] != rows[:-1, 0]])
        # drop losses that were computed twice, and non-finite ones
        rows = rows[first_of_index & rows[:, 2].isfinite()]
        rows = rows[rows[:, 1].argsort(stable=True)]
        bins, losses = rows[:, 1].long(), rows[:, 2]
        per_term = self._losses.shape[1]
        new = torch.bincount(bins, minlength=len(self._counts))
        turn = torch.arange(len(bins)) - (new.cumsum(0) - new)[bins]  # place in its bin
        last = turn >= (new - per_term)[bins]  # so that no slot is written twice
        self._losses[bins[last], (self._counts[bins] + turn)[last] % per_term] = losses[last]
        self._counts += new

    # -- the checkpoint ----------------------------------------------------------------------------

    def get_extra_state(self) -> dict[str, Tensor]:
        rows = [(step, arriving.arrived()) for step, arriving in self._pending]
        pending = [
            torch.cat([torch.full((len(r), 1), step, dtype=torch.float64), r], dim=1)
            for step, r in rows
        ]
        return {
            "losses": self._losses.clone(),
            "counts": self._counts.clone(),
            "pending": torch.cat(pending) if pending else torch.zeros(0, 4, dtype=torch.float64),
        }

    def set_extra_state(self, state: Mapping[str, Tensor]) -> None:
        shapes = tuple(self._losses.shape), tuple(state["losses"].shape)
        if shapes[0] != shapes[1]:
            raise ValueError(
                f"the checkpoint holds losses of {shapes[1][0]} bins with {shapes[1][1]} each, the "
                "density has "
                f"{shapes[0][0]} with {shapes[0][1]}; give bins and history_per_term as in the run "
                "that is resumed"
            )
        self._losses, self._counts = (
            state["losses"].cpu().double().clone(),
            state["counts"].cpu().long().clone(),
        )
        pending = state["pending"].cpu().double()
        steps = [int(step) for step in pending[:, 0].unique().tolist()]
        self._pending = [
            (step, _Arriving(pending[pending[:, 0] == step, 1:].clone())) for step in steps
        ]

    def __getstate__(self) -> dict[str, Any]:
        # a pending copy from a GPU can be neither copied nor pickled
        return self.__dict__ | {
            "_pending": [(step, _Arriving(rows.arrived().clone())) for step, rows in self._pending]
        }

    def extra_repr(self) -> str:
        bins, per_term = self._losses.shape
        return f"bins={bins}, history_per_term={per_term}, uniform_prob={self.uniform_prob}"


class _Arriving:
    """Rows that are being copied to the CPU; the host waits for them only on request."""

    def __init__(self, rows: Tensor) -> None:
        self._event: torch.cuda.Event | None = None
        if rows.is_cuda:
            self._rows = torch.empty(rows.shape, dtype=rows.dtype, pin_memory=True)
            self._rows.copy_(rows, non_blocking=True)
            self._event = torch.cuda.Event()
            self._event.record(torch.cuda.current_stream(rows.device))
        else:
            self._rows = rows.cpu()

    def arrived(self) -> Tensor:
        if self._event is not None:
            self._event.synchronize()
            self._event = None
        return self._rows


def _of_all_ranks(rows: Tensor) -> Tensor:
    """Return the rows of all processes, on the device that the backend gathers on.

    All processes must have rows of equal shape.
    """
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return rows
    world_size = torch.distributed.get_world_size()
    if world_size == 1:
        return rows
    if not rows.is_cuda or "nccl" not in str(torch.distributed.get_backend_config()):
        rows = rows.cpu()
    out = rows.new_empty(world_size * rows.shape[0], *rows.shape[1:])
    torch.distributed.all_gather_into_tensor(out, rows.contiguous())
    return out
