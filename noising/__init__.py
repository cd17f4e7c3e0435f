"""Noise schedules and what training needs of them: curves, prediction types, weights, timesteps, noise."""

from .curves import BETA_SCHEDULES, CURVES, Curve, Discrete, Flow
from .noise import NOISES, Gaussian, Noise, Offset
from .noising import Noised, Noising
from .prediction import PREDICTIONS, Prediction
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
    "Curve",
    "Discrete",
    "Flow",
    "Gaussian",
    "MinSNR",
    "Noise",
    "NoiseSchedule",
    "Noised",
    "Noising",
    "Offset",
    "Prediction",
    "Timesteps",
    "Uniform",
    "UniformTimesteps",
    "Weighting",
]
