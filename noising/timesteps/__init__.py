"""The densities over training time by their names; what a density is, base.py says."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

from ..utils.items import made
from .base import Timesteps
from .densities import (
    BetaTimesteps,
    CosMapTimesteps,
    LogitNormalTimesteps,
    LogNormalSigmaTimesteps,
    ModeTimesteps,
    UniformTimesteps,
)
from .importance import LossSecondMoment

_KINDS = (
    LogitNormalTimesteps,
    ModeTimesteps,
    CosMapTimesteps,
    BetaTimesteps,
    LogNormalSigmaTimesteps,
    LossSecondMoment,
)

TIMESTEPS: Mapping[str, Callable[[], Timesteps]] = {
    "uniform": UniformTimesteps,
    "stratified": partial(UniformTimesteps, stratified=True),
    **{kind.name: kind for kind in _KINDS},
    **{f"stratified_{kind.name}": partial(kind, stratified=True) for kind in _KINDS},
}
"""Every density by its name, and each with ``stratified_`` before it; a new one is a class and a word in this file."""


def resolve_timesteps(timesteps: str | Timesteps) -> Timesteps:
    """Return the density for a name, with options or without, or an object; an unknown name or option is a ValueError.

    >>> resolve_timesteps("stratified_logit_normal:mean=1")
    LogitNormalTimesteps(stratified=True, mean=1, std=1.0)
    """
    return timesteps if isinstance(timesteps, Timesteps) else made("timestep density", timesteps, TIMESTEPS)
