"""Noise schedules and what training needs of them: curves, prediction types, weights, timesteps, noise."""

from .betas import BETA_SCHEDULES
from .continuous import Cosine, Flow, Karras, SubVariancePreserving, VarianceExploding, VariancePreserving
from .curves import Curve
from .discrete import Discrete
from .importance import LossSecondMoment
from .losses import L1, L2, LOSSES, Huber, Loss, PseudoHuber, SmoothL1
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
    NoiseLevelTimesteps,
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
from .uncertainty import LearnedUncertainty
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
