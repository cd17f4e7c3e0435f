"""Samplers that a table of fixed coefficients cannot express; each module gives the reason."""

from .adaptive import DPMAdaptive
from .base import STANDALONE, StandaloneEntry, register_standalone
from .langevin import PredictorCorrector
from .learned_variance import LearnedVariance
from .repaint import RePaint
from .vq_diffusion import TokenSchedule, VQDiffusion

__all__ = [
    "STANDALONE",
    "DPMAdaptive",
    "LearnedVariance",
    "PredictorCorrector",
    "RePaint",
    "StandaloneEntry",
    "TokenSchedule",
    "VQDiffusion",
    "register_standalone",
]
