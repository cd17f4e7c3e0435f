"""The registry of weightings: the schemes of the literature, of other trainers, and those that are composed or learned."""

from __future__ import annotations

from collections.abc import Mapping

from ..utils.items import made
from .base import Weighting
from .learned import LearnedUncertainty
from .ranges import PerRange
from .schemes import (
    EDM,
    P2,
    SNR,
    CosMap,
    Debiased,
    MinSNR,
    PlainFlow,
    PlainV,
    PlainX0,
    SigmaSqrt,
    Sigmoid,
    SoftMinSNR,
    Uniform,
    VLike,
)
from .trainer_compat import (
    DiffusersCosMapX0,
    DiffusersMinSNRPlusOneV,
    DiffusersPixArtMinSNRV,
    KohyaDebiasedEpsilon,
    KohyaDebiasedV,
    KohyaScaleVPred,
    KohyaVPredLike,
    OneTrainerDebiasedV,
    OneTrainerP2V,
    OneTrainerSigma,
)

_PUBLISHED: tuple[type[Weighting], ...] = (
    *(Uniform, SNR, PlainV, PlainX0, PlainFlow, MinSNR, SoftMinSNR, Sigmoid),
    *(P2, Debiased, EDM, CosMap, SigmaSqrt, VLike),
)
_PEERS: tuple[type[Weighting], ...] = (
    *(DiffusersCosMapX0, DiffusersMinSNRPlusOneV, DiffusersPixArtMinSNRV, KohyaDebiasedEpsilon, KohyaDebiasedV),
    *(KohyaScaleVPred, KohyaVPredLike, OneTrainerDebiasedV, OneTrainerP2V, OneTrainerSigma),
)

WEIGHTINGS: Mapping[str, type[Weighting]] = {
    kind.name: kind for kind in (*_PUBLISHED, *_PEERS, PerRange, LearnedUncertainty)
}
"""Every weighting by its name; a new one is a class in the file of its kind and a word in this list."""


def resolve_weighting(weighting: str | Weighting) -> Weighting:
    """Return the weighting for a name, with options or without, or an object; an unknown name or option is a ValueError.

    >>> resolve_weighting("min_snr"), resolve_weighting("min_snr:gamma=3,floor=0.05")
    (MinSNR(floor=0.0, gamma=5.0), MinSNR(floor=0.05, gamma=3))
    """
    return weighting if isinstance(weighting, Weighting) else made("weighting", weighting, WEIGHTINGS)
