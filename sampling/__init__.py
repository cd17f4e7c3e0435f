"""Samplers as tables: grids, methods, the kernel that runs them, guidance."""

from .clipping import Clip, DynamicThreshold
from .grids import GRIDS, make_knots
from .guidance import guide
from .kernel import Progress
from .knots import CLEAN, Knot, knots_at
from .making import make_sampler
from .methods.base import Method
from .names import METHODS, resolve_method
from .sampler import Sampler
from .standalone import OUTSIDE
from .standalone.adaptive import DPMAdaptive
from .standalone.learned_variance import LearnedVariance
from .standalone.repaint import RePaint
from .standalone.score_sde import PredictorCorrector
from .standalone.vq_diffusion import TokenSchedule, VQDiffusion
from .table import Combination, Table, Trace

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
