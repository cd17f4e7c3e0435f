"""Samplers that are no table of fixed coefficients, with the names they are known by.

Each is a class of its own, called as a ``Sampler`` is; its module says why it is no table.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from .adaptive import DPMAdaptive
from .learned_variance import LearnedVariance
from .repaint import RePaint
from .score_sde import PredictorCorrector
from .vq_diffusion import VQDiffusion


@dataclass(frozen=True)
class Outside:
    """A sampler that is no table: ``made_by(schedule, **options)`` returns one, and the facts are those of a ``Method``.

    ``evaluations`` is None where their number is not known before the run. ``called`` maps names of other software to the
    options that they stand for.

    >>> OUTSIDE["repaint"].made_by.__name__
    'RePaint'
    """

    name: str
    made_by: Callable[..., Any]
    order: int
    source: str
    evaluations: int | None = 1
    stochastic: bool = True
    called: Mapping[str, Mapping[str, Any]] = field(default_factory=dict, hash=False)

    @property
    def options(self) -> dict[str, Any]:
        """The options that it has, with their defaults."""
        parameters = list(inspect.signature(self.made_by).parameters.values())[1:]
        return {p.name: p.default for p in parameters}

    @property
    def documentation(self) -> str:
        """What it does, in words."""
        return inspect.getdoc(self.made_by) or ""


OUTSIDE: Mapping[str, Outside] = {
    entry.name: entry
    for entry in (
        Outside(
            "dpm_adaptive",
            DPMAdaptive,
            order=3,
            source="2206.00927",
            evaluations=None,
            stochastic=False,
            called={"DPM adaptive": {"final": "sigma_min"}},
        ),
        Outside(
            "score_sde_ve",
            PredictorCorrector,
            order=1,
            source="2011.13456",
            evaluations=2,
            called={"ScoreSdeVeScheduler": {"norm": "batch"}},
        ),
        Outside(
            "repaint",
            RePaint,
            order=1,
            source="2201.09865",
            called={"RePaintScheduler": {"eta": 0.0, "resample_clean": True, "grid": "leading"}},
        ),
        Outside("ddpm_learned_variance", LearnedVariance, order=1, source="2102.09672"),
        Outside("vq_diffusion", VQDiffusion, order=0, source="2111.14822", called={"VQDiffusionScheduler": {}}),
    )
}
"""Every sampler that is no table, by its name."""
