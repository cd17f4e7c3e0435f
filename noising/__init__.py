"""Noise schedules and what training needs of them: curves, prediction types, weights, timesteps, noise."""

from .curves import CURVES
from .curves.base import Curve
from .curves.betas import BETA_SCHEDULES
from .curves.continuous import Cosine, Flow, Karras, SubVariancePreserving, VarianceExploding, VariancePreserving
from .curves.discrete import Discrete
from .curves.shifts import resolution_shift, token_shift
from .curves.truncated import Truncated
from .losses import L1, L2, LOSSES, Huber, Loss, PseudoHuber, SmoothL1
from .noise import NOISES, AdaptiveOffset, Gaussian, Immiscible, InputPerturbation, Offset, Pyramid
from .noise_base import Chain, Noise
from .noising import Drawn, Noised, Noising
from .prediction import PREDICTIONS, Prediction
from .schedule import NoiseSchedule
from .timesteps import TIMESTEPS
from .timesteps.base import LogSNRTimesteps, QuantileTimesteps, Timesteps
from .timesteps.custom import (
    CustomTimesteps,
    ListedTimesteps,
    NoiseLevelTimesteps,
    ReversedTimesteps,
    WeightedTimesteps,
    WithinTimesteps,
)
from .timesteps.densities import (
    BetaTimesteps,
    CosMapTimesteps,
    LogitNormalTimesteps,
    LogNormalSigmaTimesteps,
    ModeTimesteps,
    UniformTimesteps,
)
from .timesteps.importance import LossSecondMoment
from .weighting import (
    EDM,
    P2,
    SNR,
    WEIGHTINGS,
    CosMap,
    Debiased,
    MinSNR,
    PerRange,
    PlainFlow,
    PlainV,
    PlainX0,
    SigmaSqrt,
    Sigmoid,
    SoftMinSNR,
    Uniform,
    VLike,
    Weighting,
)
from .weighting.learned import LearnedUncertainty

__all__ = [
    "BETA_SCHEDULES",
    "CURVES",
    "EDM",
    "L1",
    "L2",
    "LOSSES",
    "NOISES",
    "P2",
    "PREDICTIONS",
    "SNR",
    "TIMESTEPS",
    "WEIGHTINGS",
    "AdaptiveOffset",
    "BetaTimesteps",
    "Chain",
    "CosMap",
    "CosMapTimesteps",
    "Cosine",
    "Curve",
    "CustomTimesteps",
    "Debiased",
    "Discrete",
    "Drawn",
    "Flow",
    "Gaussian",
    "Huber",
    "Immiscible",
    "InputPerturbation",
    "Karras",
    "LearnedUncertainty",
    "ListedTimesteps",
    "LogNormalSigmaTimesteps",
    "LogSNRTimesteps",
    "LogitNormalTimesteps",
    "Loss",
    "LossSecondMoment",
    "MinSNR",
    "ModeTimesteps",
    "Noise",
    "NoiseLevelTimesteps",
    "NoiseSchedule",
    "Noised",
    "Noising",
    "Offset",
    "PerRange",
    "PlainFlow",
    "PlainV",
    "PlainX0",
    "Prediction",
    "PseudoHuber",
    "Pyramid",
    "QuantileTimesteps",
    "ReversedTimesteps",
    "SigmaSqrt",
    "Sigmoid",
    "SmoothL1",
    "SoftMinSNR",
    "SubVariancePreserving",
    "Timesteps",
    "Truncated",
    "Uniform",
    "UniformTimesteps",
    "VLike",
    "VarianceExploding",
    "VariancePreserving",
    "WeightedTimesteps",
    "Weighting",
    "WithinTimesteps",
    "resolution_shift",
    "token_shift",
]
