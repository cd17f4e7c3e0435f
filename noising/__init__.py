"""Noise schedules and what training needs of them: curves, prediction types, weights, timesteps, noise."""

from .betas import BETA_SCHEDULES
from .continuous import Cosine, Flow, Karras, SubVariancePreserving, VarianceExploding, VariancePreserving
from .curves import Curve
from .discrete import Discrete
from .importance import LossSecondMoment
from .noise import NOISES, AdaptiveOffset, Gaussian, Immiscible, InputPerturbation, Offset, Pyramid
from .noise_base import Chain, Noise
from .noising import Drawn, Noised, Noising
from .prediction import PREDICTIONS, Prediction
from .registered import CURVES
from .schedule import NoiseSchedule
from .shifts import resolution_shift, token_shift
from .timesteps import TIMESTEPS
from .timesteps_base import LogSNRTimesteps, QuantileTimesteps, Timesteps
from .timesteps_custom import (
    CustomTimesteps,
    ListedTimesteps,
    ReversedTimesteps,
    WeightedTimesteps,
    WithinTimesteps,
)
from .timesteps_published import (
    BetaTimesteps,
    CosMapTimesteps,
    LogitNormalTimesteps,
    LogNormalSigmaTimesteps,
    ModeTimesteps,
    UniformTimesteps,
)
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
    "AdaptiveOffset",
    "BetaTimesteps",
    "Chain",
    "CosMapTimesteps",
    "Cosine",
    "Curve",
    "CustomTimesteps",
    "Discrete",
    "Drawn",
    "Flow",
    "Gaussian",
    "Immiscible",
    "InputPerturbation",
    "Karras",
    "ListedTimesteps",
    "LogNormalSigmaTimesteps",
    "LogSNRTimesteps",
    "LogitNormalTimesteps",
    "LossSecondMoment",
    "MinSNR",
    "ModeTimesteps",
    "Noise",
    "NoiseSchedule",
    "Noised",
    "Noising",
    "Offset",
    "Prediction",
    "Pyramid",
    "QuantileTimesteps",
    "ReversedTimesteps",
    "SubVariancePreserving",
    "Timesteps",
    "Truncated",
    "Uniform",
    "UniformTimesteps",
    "VarianceExploding",
    "VariancePreserving",
    "WeightedTimesteps",
    "Weighting",
    "WithinTimesteps",
    "resolution_shift",
    "token_shift",
]
