"""Densities of training timesteps: base classes, published densities, importance sampling."""

from .base import (
    TIMESTEPS,
    LogSNRTimesteps,
    QuantileTimesteps,
    ReversedTimesteps,
    Timesteps,
    WithinNoiseLevels,
    WithinTimesteps,
    resolve_timesteps,
)
from .densities import (
    BetaTimesteps,
    CosMapTimesteps,
    CustomTimesteps,
    ListedTimesteps,
    LogitNormalTimesteps,
    LogNormalSigmaTimesteps,
    ModeTimesteps,
    NoiseLevelTimesteps,
    UniformTimesteps,
    WeightedTimesteps,
)
from .importance import LossSecondMoment

__all__ = [
    "TIMESTEPS",
    "BetaTimesteps",
    "CosMapTimesteps",
    "CustomTimesteps",
    "ListedTimesteps",
    "LogNormalSigmaTimesteps",
    "LogSNRTimesteps",
    "LogitNormalTimesteps",
    "LossSecondMoment",
    "ModeTimesteps",
    "NoiseLevelTimesteps",
    "QuantileTimesteps",
    "ReversedTimesteps",
    "Timesteps",
    "UniformTimesteps",
    "WeightedTimesteps",
    "WithinNoiseLevels",
    "WithinTimesteps",
    "resolve_timesteps",
]
