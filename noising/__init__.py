"""Noise schedules and what training needs of them: curves, prediction types, weights, timesteps, noise."""

from .continuous import Cosine, Flow, Karras, SubVariancePreserving, VarianceExploding, VariancePreserving
from .curves import Curve
from .discrete import BETA_SCHEDULES, Discrete
from .noise import NOISES, Gaussian, Noise, Offset
from .noising import Noised, Noising
from .prediction import PREDICTIONS, Prediction
from .registered import CURVES
from .schedule import NoiseSchedule
from .timesteps import TIMESTEPS, Timesteps, UniformTimesteps
from .weighting import SNR, WEIGHTINGS, MinSNR, Uniform, Weighting

__all__ = [
    "BETA_SCHEDULES",
    "CURVES",
    "NOISES",
    "PREDICTIONS",
    "SNR",
    "TIMESTEPS",
    "WEIGHTINGS",
    "Cosine",
    "Curve",
    "Discrete",
    "Flow",
    "Gaussian",
    "Karras",
    "MinSNR",
    "Noise",
    "NoiseSchedule",
    "Noised",
    "Noising",
    "Offset",
    "Prediction",
    "SubVariancePreserving",
    "Timesteps",
    "Uniform",
    "UniformTimesteps",
    "VarianceExploding",
    "VariancePreserving",
    "Weighting",
]
