"""Samplers as tables: grids, methods, the kernel that runs a table, and guidance."""

from .clipping import Clip, DynamicThreshold
from .fitting.fit import default_teacher, fit_table, table_error
from .fitting.provenance import Provenance
from .fitting.table_file import TABLE_NAME
from .grids import GRIDS, make_knots, register_grid, register_sigma_grid, register_timestep_grid
from .guidance import guide
from .kernel import Progress
from .knots import CLEAN, Knot, knots_at
from .methods import METHODS, Method, register_method
from .names import resolve_method
from .rolling import MATRICES, RollingSampler
from .rollouts.rollout import Rollout, Transition
from .sampler import Sampler, make_sampler
from .serving import CapturedSampler, ContinuousBatch
from .standalone import (
    STANDALONE,
    DPMAdaptive,
    LearnedVariance,
    PredictorCorrector,
    RePaint,
    TokenSchedule,
    VQDiffusion,
    register_standalone,
)
from .table import Table
from .tracing import Combination, Trace

__all__ = [
    "CLEAN",
    "GRIDS",
    "MATRICES",
    "METHODS",
    "STANDALONE",
    "TABLE_NAME",
    "CapturedSampler",
    "Clip",
    "Combination",
    "ContinuousBatch",
    "DPMAdaptive",
    "DynamicThreshold",
    "Knot",
    "LearnedVariance",
    "Method",
    "PredictorCorrector",
    "Progress",
    "Provenance",
    "RePaint",
    "RollingSampler",
    "Rollout",
    "Sampler",
    "Table",
    "TokenSchedule",
    "Trace",
    "Transition",
    "VQDiffusion",
    "default_teacher",
    "fit_table",
    "guide",
    "knots_at",
    "make_knots",
    "make_sampler",
    "register_grid",
    "register_method",
    "register_sigma_grid",
    "register_standalone",
    "register_timestep_grid",
    "resolve_method",
    "table_error",
]
