"""Noise schedules and what training needs of them: curves, prediction types, weights, timesteps, noise."""

from .betas import BETA_SCHEDULES
from .continuous import Cosine, Flow, Karras, SubVariancePreserving, VarianceExploding, VariancePreserving
from .curves import Curve
from .discrete import Discrete
from .noise import NOISES, Gaussian, Noise, Offset
from .noising import Noised, Noising
from .prediction import PREDICTIONS, Prediction
from .registered import CURVES
from .schedule import NoiseSchedule
from .shifts import resolution_shift, token_shift
from .timesteps import TIMESTEPS, Timesteps, UniformTimesteps
from .truncated import Truncated
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
    "Truncated",
    "Uniform",
    "UniformTimesteps",
    "VarianceExploding",
    "VariancePreserving",
    "Weighting",
    "resolution_shift",
    "token_shift",
]
