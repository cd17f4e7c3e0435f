"""RePaint: inpainting with a network not trained for it (Lugmayr et al. 2201.09865).

A table cannot express it: a mask decides for each element whether x is the network's result or the
known image with noise. The run also returns to higher noise many times (time travel), so that the
two parts become consistent. A step down from one knot to the next is linear and is traced with the
formula of the tables.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, ClassVar

import torch
from torch import Tensor

from ...noising import NoiseSchedule
from ...noising.utils.validation import require_same_shape, whole_number
from ..grids import Grid, make_knots
from ..guidance import Network
from ..inference import Run, last, without_gradients
from ..kernel import Progress, combine, perform
from ..knots import Knot
from ..methods.steps import check_eta, first_order_update, posterior_std, toward
from ..tracing import Combination, Row, Trace
from .base import register_standalone, run_over


def time_travel(
    steps: int, jump_length: int = 10, jump_n_sample: int = 10, resample_clean: bool = False
) -> tuple[int, ...]:
    """Return the order in which the knots are visited; 0 is the first, ``steps`` the clean one.

    The first time that the run reaches a level ``jump_length`` · k above the last noisy knot, it
    goes up ``jump_length`` levels and down again, ``jump_n_sample`` - 1 times (the paper's r and
    figure 9). ``resample_clean``: all of this is one level lower and includes the clean image, as
    in RePaintScheduler; algorithm 1, line 9, does it only for t > 1.

    >>> time_travel(4, jump_length=1, jump_n_sample=2)
    (0, 1, 0, 1, 2, 1, 2, 3, 2, 3, 4)
    >>> time_travel(3, jump_length=1, jump_n_sample=1)
    (0, 1, 2, 3)
    """
    left = {
        steps - 1 - level: jump_n_sample - 1 for level in range(0, steps - jump_length, jump_length)
    }
    place, places = 0, [0]
    while place < steps:
        place += 1
        places.append(place)
        turn = place - resample_clean
        if left.get(turn, 0):
            left[turn] -= 1
            places += range(place - 1, place - jump_length - 1, -1)
            place -= jump_length
    return tuple(places)


@register_standalone(
    "repaint",
    order=1,
    source="2201.09865",
    aliases={"RePaintScheduler": {"eta": 0.0, "resample_clean": True, "grid": "leading"}},
)
@dataclass(frozen=True)
class RePaint:
    """Fill in the unknown part of images.

    Called like a Sampler, with the additional arguments ``known=`` and ``mask=``. Works with any
    schedule and prediction type.

    Args:
        steps, grid: As in Sampler.
        jump_length, jump_n_sample, resample_clean: See :func:`time_travel`; the network is called
            for each step down.
        eta: 1 is DDPM, as in the paper; 0 is DDIM, the default of RePaintScheduler.
        use_clipped_model_output: As in DDIM; False with the clipping of RePaintScheduler.

    Raises:
        ValueError: An option is out of range.

    >>> image, mask = torch.ones(2, 1, 4, 4), torch.zeros(2, 1, 4, 4)
    >>> mask[..., :2] = 1
    >>> sampler = RePaint(
    ...     NoiseSchedule.scaled_linear(prediction="v_prediction"),
    ...     steps=5,
    ...     jump_length=1,
    ...     jump_n_sample=2,
    ... )
    >>> sampler(lambda x, t: -x, (2, 1, 4, 4), seeds=0, known=image, mask=mask)[0, 0, 0, :2]
    tensor([1., 1.])
    """

    name: ClassVar[str]
    needs: ClassVar[tuple[str, ...]] = ("known=", "mask=")
    schedule: NoiseSchedule
    steps: int = 250
    jump_length: int = 10
    jump_n_sample: int = 10
    eta: float = 1.0
    grid: str | Grid = "trailing"
    resample_clean: bool = False
    use_clipped_model_output: bool = True

    def __post_init__(self) -> None:
        for name in ("jump_length", "jump_n_sample"):
            object.__setattr__(self, name, whole_number(name, getattr(self, name), least=1))
        object.__setattr__(self, "steps", whole_number("steps", self.steps))
        check_eta(self.eta)
        _ = self.knots  # invalid input fails here, before any work
        if self.jump_n_sample > 1 and self.jump_length >= self.steps:
            raise ValueError(
                f"jump_length must be less than the {self.steps} steps, got {self.jump_length}; "
                "use more steps, or jump_n_sample=1 for no jumps"
            )

    @property
    def knots(self) -> tuple[Knot, ...]:
        """The steps + 1 points of the grid, the last one clean."""
        return make_knots(self.schedule, self.steps, self.grid)

    @property
    def visits(self) -> tuple[Knot, ...]:
        """The knots in visiting order; the network is called once for each step down."""
        knots = self.knots
        places = time_travel(self.steps, self.jump_length, self.jump_n_sample, self.resample_clean)
        return tuple(knots[place] for place in places)

    def __call__(
        self,
        network: Network,
        shape_or_noise: Sequence[int] | Tensor,
        *,
        known: Tensor,
        mask: Tensor,
        **arguments: Any,
    ) -> Tensor:
        """Return the images, shape (batch, ...), equal to ``known`` where ``mask`` is 1.

        Arguments as in :meth:`iterate`.
        """
        return last(self.iterate(network, shape_or_noise, known=known, mask=mask, **arguments)).x

    def iterate(
        self,
        network: Network,
        shape_or_noise: Sequence[int] | Tensor,
        *,
        known: Tensor,
        mask: Tensor,
        **arguments: Any,
    ) -> Iterator[Progress]:
        """Sample and yield after each step down or up. Other arguments as in ``Sampler.iterate``.

        Args:
            known: The images, in the shape of the samples.
            mask: 1 where the images are known, 0 where they are filled in (between: a blend). It
                has the shape of the samples, or 1 for some of its dimensions.

        Raises:
            ValueError: ``known`` or ``mask`` does not fit.
        """
        visits = self.visits
        run = run_over(self.schedule, visits, network, shape_or_noise, **arguments)
        require_same_shape("known", known, "the samples", run.x)
        return without_gradients(
            self.advance(run, visits, known.detach().to(run.x), checked_mask(mask, run.x))
        )

    def advance(
        self, run: Run, visits: Sequence[Knot], known: Tensor, mask: Tensor
    ) -> Iterator[Progress]:
        """Run from ``run.x`` at the first of ``visits``."""
        x, row, basis = run.x, ((0, 1.0),), [run.x]
        for i, (s, n) in enumerate(pairwise(visits)):
            if n.sigma_ve < s.sigma_ve:
                x, row, basis = self._down(run, x, s, n, known, mask)
            else:
                x = self._up(run, x, s, n)
            yield Progress(i + 1, len(visits) - 1, x, row, basis)

    def _down(
        self, run: Run, x: Tensor, s: Knot, n: Knot, known: Tensor, mask: Tensor
    ) -> tuple[Tensor, Row, Sequence[Tensor]]:
        """Return x_n (algorithm 1, lines 4 to 8), and the row and basis of D.

        The two parts share their noise, because they do not overlap.
        """
        z = run.noise().to(x.dtype) if n.sigma else torch.zeros_like(x)
        trace, state, noise = Trace(self.schedule, 2), Combination({0: 1.0}), Combination({1: 1.0})
        r = self.eta * posterior_std(s, n)
        D = trace.denoise(state, s)
        if self.use_clipped_model_output:
            row = first_order_update(state, D, s, n, r, r * noise).row
        else:
            row = toward(D, trace.unclipped(state, s)[1], n, r, r * noise).row
        basis = [x, z]
        perform(trace.ops, basis, run.evaluate, lambda start, end: z, run.beside)
        unknown = combine(row, basis)  # line 7
        # lines 5 and 8
        return (torch.lerp(unknown, n.alpha * known + n.sigma * z, mask), trace.denoised.row, basis)

    def _up(self, run: Run, x: Tensor, s: Knot, n: Knot) -> Tensor:
        """Return x at the noisier knot n by the forward chain from s (line 10), in one step."""
        a = n.alpha / s.alpha
        return a * x + math.sqrt(max(n.sigma**2 - (a * s.sigma) ** 2, 0.0)) * run.noise().to(
            x.dtype
        )


def checked_mask(mask: Tensor, x: Tensor) -> Tensor:
    """Return the mask in the dtype and shape of x.

    Raises ValueError if it does not fit or has values outside 0 ... 1.

    >>> checked_mask(torch.zeros(3, 1), torch.zeros(2, 1))
    Traceback (most recent call last):
    ValueError: mask must have the shape of the samples, (2, 1), or 1 in place of some of its ...
    """
    fits = mask.ndim == x.ndim and all(
        m in (1, n) for m, n in zip(mask.shape, x.shape, strict=True)
    )
    if not fits:
        raise ValueError(
            f"mask must have the shape of the samples, {tuple(x.shape)}, or 1 in place of some of "
            f"its numbers, got {tuple(mask.shape)}"
        )
    # on a GPU this check would need a host sync
    if mask.device.type == "cpu" and not bool(((mask >= 0) & (mask <= 1)).all()):
        raise ValueError(
            "mask must be 1 where the image is known and 0 where it is not, got values from "
            f"{float(mask.min()):g} to {float(mask.max()):g}"
        )
    return mask.detach().to(x).expand_as(x)
