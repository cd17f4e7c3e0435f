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
from .shaped import (
    SHAPED_TIMESTEPS,
    IndependentTimesteps,
    ShapedTimesteps,
    SharedTimesteps,
    StaircaseTimesteps,
    resolve_times,
)

__all__ = [
    "SHAPED_TIMESTEPS",
    "TIMESTEPS",
    "BetaTimesteps",
    "CosMapTimesteps",
    "CustomTimesteps",
    "IndependentTimesteps",
    "ListedTimesteps",
    "LogNormalSigmaTimesteps",
    "LogSNRTimesteps",
    "LogitNormalTimesteps",
    "LossSecondMoment",
    "ModeTimesteps",
    "NoiseLevelTimesteps",
    "QuantileTimesteps",
    "ReversedTimesteps",
    "ShapedTimesteps",
    "SharedTimesteps",
    "StaircaseTimesteps",
    "Timesteps",
    "UniformTimesteps",
    "WeightedTimesteps",
    "WithinNoiseLevels",
    "WithinTimesteps",
    "resolve_times",
    "resolve_timesteps",
]
