"""Previews with a fitted table: fitted to the model that trains, checked as it goes on, refitted.

The first preview fits a table of few steps to the network. Later previews check it on a few seeds
against a known method, which draws wherever the table is no better. All ranks fit together, each on
its own seeds, and have the same table.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from ...noising import NoiseSchedule
from ...noising.utils.validation import whole_number
from ...sampling import Sampler, fit_table
from ...sampling.fitting.fit import default_teacher, sampler_errors
from ...sampling.fitting.provenance import Provenance
from ...sampling.table import Table
from ..loops.complaints import warn_on_rank_zero
from ..loops.forward import ShardedForwardError
from ..previews.render import Drawing
from .ranks import FittingRanks

FALLBACK = "unipc"
"""The method until a table is fitted."""

DEFAULT_STEPS = 6
"""The number of network calls of a fitted table by default."""

FIT_SEEDS, HELD_OUT_SEEDS = 32, 16
"""Seeds of a fit, over all ranks. With more ranks than held-out seeds, one more for each rank."""

FIRST_SEED = 2**40
"""The first seed of fits: far from the seeds of images."""

CHECK_SEEDS = 4
"""Seeds of a check on each rank."""

CHECK_STEPS = 4
"""Steps of the check's reference, in numbers of steps of the table."""

CHECK_SHARE = 1 / 3
"""Network calls of checks, as a share of those of previews."""

GROWTH = 1.5
"""A drifted table is fitted again if training is this much longer than at its fit."""


@dataclass
class Fitting:
    """The fitted tables of a run of previews, one for each kind of weights.

    Args:
        schedule: the schedule of the training.
        steps: network calls of the table.
        refit_every: optimizer steps between two fits; None: when a check finds that the table is no
            better than the known method, and training is ``GROWTH`` times longer than at its fit.
        guidance_scale: guidance scale of the previews.

    Raises:
        ValueError: ``steps`` is less than 2, or more than the teacher's.

    >>> fitting = Fitting(NoiseSchedule.flow(), steps=4)
    >>> drawing = Drawing(num_images=2)
    >>> def network(x, t):
    ...     return torch.tanh(x)
    >>> sampler = fitting.sampler("raw", 100, network, (4,), drawing)
    >>> sampler.name, fitting.tables["raw"].provenance.training_step
    ('fitted', 100)
    """

    schedule: NoiseSchedule
    steps: int = DEFAULT_STEPS
    refit_every: int | None = None
    guidance_scale: float = 1.0
    tables: dict[str, Table] = field(default_factory=dict)
    note: str = ""
    """What the last preview was drawn with, in words."""
    _drifted: set[str] = field(default_factory=set)
    _tried: dict[str, int] = field(default_factory=dict)
    _credit: dict[str, float] = field(default_factory=dict)
    _given: dict[str, Table] = field(default_factory=dict)

    def __post_init__(self) -> None:
        most = default_teacher(self.schedule).steps
        self.steps = whole_number("steps", self.steps, least=2)
        if self.steps > most:
            raise ValueError(
                f"a fitted table has at most the {most} steps of its teacher, got {self.steps}; "
                "take a known method for so many"
            )
        if self.refit_every is not None:
            self.refit_every = whole_number("refit_every", self.refit_every, least=1)

    @property
    def fallback(self) -> Sampler:
        """The sampler until a table is fitted."""
        return Sampler(self.schedule, FALLBACK, self.steps)

    def sampler(
        self,
        weights: str,
        step: int,
        network: Callable[..., Any],
        shape: Sequence[int],
        drawing: Drawing,
        *,
        device: torch.device | str = "cpu",
        ranks: FittingRanks | None = None,
        batch_size: int = 16,
        stop: Callable[[], bool] = lambda: False,
    ) -> Sampler:
        """Return the sampler of this preview; fit or check the table first if that is due.

        Every rank must call it. A fit that fails warns, and the known method draws.

        Args:
            weights: 'raw' or 'ema'.
            step: the optimizer step.
            network: as in ``Sampler.iterate``.
            shape: shape of one sample.
            drawing: the images of the preview, for their conditions and the cost of a check.
            device: device of the samples.
            ranks: the ranks of the training; by default a single process.
            batch_size: samples in a network call.
            stop: whether to stop the fit, asked often.
        """
        ranks = ranks or FittingRanks()
        model = {
            "shape": tuple(shape),
            "guidance_scale": drawing.guidance_scale,
            "guidance_rescale": drawing.guidance_rescale,
            "batch_size": batch_size,
            "device": device,
            **_conditions(drawing, torch.device(device)),
        }
        drifted, table = weights in self._drifted, None
        try:
            with ranks.together(stop):
                if self._may_check(weights, drawing, ranks):
                    drifted = not self._still_helps(weights, step, network, model, ranks)
                if self._is_due(weights, step, drifted):
                    self._tried[weights] = step
                    table = self._fitted(step, network, model, ranks)
        except ShardedForwardError:  # other ranks wait in the forward
            raise
        except Exception as error:
            warn_on_rank_zero(
                f"the fit of a table at step {step} ended: {ranks.reasons(error)}; the preview is "
                "drawn without it"
            )
        else:  # on every rank, or on none
            (self._drifted.add if drifted else self._drifted.discard)(weights)
            if table is not None:
                self.tables[weights] = table
                self._drifted.discard(weights)
                self._credit[weights] = math.inf  # the next preview checks it
        return self._choice(weights)

    def _is_due(self, weights: str, step: int, drifted: bool) -> bool:
        last, table = self._tried.get(weights), self.tables.get(weights)
        if table is not None:
            last = max(last or 0, _provenance(table).training_step or 0)
        if last is None:
            return True
        if self.refit_every is not None:
            return step - last >= self.refit_every
        helps = table is not None and _provenance(table).helps and not drifted
        return not helps and step >= GROWTH * last and step > last

    def _fitted(
        self, step: int, network: Callable[..., Any], model: Mapping[str, Any], ranks: FittingRanks
    ) -> Table:
        return fit_table(
            network,
            self.schedule,
            self.steps,
            seeds=ranks.own_seeds(FIRST_SEED, FIT_SEEDS),
            held_out=ranks.own_seeds(2 * FIRST_SEED, HELD_OUT_SEEDS),
            training_step=step,
            sum_over_ranks=ranks.sum,
            progress=lambda done, total, what: ranks.look(),
            **model,
        )

    def _may_check(self, weights: str, drawing: Drawing, ranks: FittingRanks) -> bool:
        """Return whether a check is within its share of the network calls; count this preview."""
        table = self.tables.get(weights)
        if table is None or not _provenance(table).helps:
            return False
        cost = CHECK_SEEDS * (CHECK_STEPS + 2) * self.steps
        calls = self.steps * -(-drawing.num_images // ranks.shares)
        credit = min(self._credit.get(weights, math.inf), cost) + CHECK_SHARE * calls
        self._credit[weights] = credit - cost if credit >= cost else credit
        return credit >= cost

    def _still_helps(
        self,
        weights: str,
        step: int,
        network: Callable[..., Any],
        model: Mapping[str, Any],
        ranks: FittingRanks,
    ) -> bool:
        """Return whether the table is better than the known method on the network of now."""
        table = self.tables[weights]
        teacher = default_teacher(self.schedule)
        own, known = sampler_errors(
            [Sampler.from_table(table), known_sampler(table)],
            network,
            replace_steps(teacher, min(CHECK_STEPS * self.steps, teacher.steps)),
            # other seeds at each step: those that judge a table have not chosen it
            seeds=ranks.own_seeds(3 * FIRST_SEED + step * 2**10, CHECK_SEEDS * ranks.shares),
            sum_over_ranks=ranks.sum,
            **model,
        )
        return own < known

    def _choice(self, weights: str) -> Sampler:
        table = self.tables.get(weights)
        if table is None:
            self.note = f"drawn with {FALLBACK}: no table is fitted"
            return self.fallback
        made = _provenance(table)
        name, at = made.best_known[0], made.training_step
        if weights in self._drifted or not made.helps:
            verb = "table" if made.helps else "fit"
            self.note = f"drawn with {name}: the {verb} of step {at} is no better"
            return known_sampler(table)
        self.note = f"table of step {at}: error {made.error:.2g}, {name} {made.best_known[1]:.2g}"
        return Sampler.from_table(table)

    def new_files(self) -> dict[str, str]:
        """Return the tables fitted since the last call, as texts of files by name."""
        new = {w: table for w, table in self.tables.items() if self._given.get(w) is not table}
        self._given |= new
        return {
            f"fitted_{weights}_{self.steps}.json": table.to_json() for weights, table in new.items()
        }

    def state(self) -> dict[str, Any]:
        """Return the tables as plain JSON."""
        return {weights: table.to_config() for weights, table in self.tables.items()}

    def load(self, state: Mapping[str, Any]) -> None:
        """Take the tables of :meth:`state` that hold for this training, to be checked first."""
        for weights, config in state.items():
            table = Table.from_config(config)
            made = table.provenance
            if (
                made is not None
                and made.schedule.fingerprint == self.schedule.fingerprint
                and made.evaluations == self.steps
                and made.guidance_scale == self.guidance_scale
            ):
                self.tables[weights] = table


def _provenance(table: Table) -> Provenance:
    assert table.provenance is not None  # made by fit_table
    return table.provenance


def known_sampler(table: Table) -> Sampler:
    """Return the best known method at the fit of a table."""
    made = _provenance(table)
    method, _, grid = made.best_known[0].partition(", ")
    return Sampler(made.schedule, method, made.evaluations, grid)


def replace_steps(sampler: Sampler, steps: int) -> Sampler:
    """Return a sampler with another number of steps.

    >>> replace_steps(Sampler(NoiseSchedule.flow(), "heun", 8), 3).steps
    3
    """
    return Sampler(sampler.schedule, sampler.method, steps, sampler.grid, **dict(sampler.options))


def _conditions(drawing: Drawing, device: torch.device) -> dict[str, Any]:
    """Return conditioning and unconditional as functions of seeds: image ``seed % num_images``."""

    def rows(key: str) -> Callable[[Sequence[int]], Mapping[str, Any]]:
        return lambda seeds: drawing.arguments(
            [seed % drawing.num_images for seed in seeds], device
        )[key]

    return {
        "conditioning": rows("conditioning"),
        "unconditional": None if drawing.unconditional is None else rows("unconditional"),
    }
