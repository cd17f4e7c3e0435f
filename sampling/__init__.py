"""Samplers as tables: grids, methods, the kernel that runs them, guidance."""

from .adaptive import DPMAdaptive
from .clipping import Clip, DynamicThreshold
from .grids import GRIDS, make_knots
from .guidance import guide
from .kernel import Progress
from .knots import CLEAN, Knot, knots_at
from .learned_variance import LearnedVariance
from .making import make_sampler
from .methods import Method
from .names import METHODS, resolve_method
from .outside import OUTSIDE
from .repaint import RePaint
from .sampler import Sampler
from .score_sde import PredictorCorrector
from .table import Combination, Table, Trace
from .vq_diffusion import TokenSchedule, VQDiffusion

__all__ = [
    "CLEAN",
    "GRIDS",
    "METHODS",
    "OUTSIDE",
    "Clip",
    "Combination",
    "DPMAdaptive",
    "DynamicThreshold",
    "Knot",
    "LearnedVariance",
    "Method",
    "PredictorCorrector",
    "Progress",
    "RePaint",
    "Sampler",
    "Table",
    "TokenSchedule",
    "Trace",
    "VQDiffusion",
    "guide",
    "knots_at",
    "make_knots",
    "make_sampler",
    "resolve_method",
]
