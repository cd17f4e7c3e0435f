"""Loss weightings: published schemes, those of other trainers, time ranges, a learned one."""

from . import trainer_compat  # registers the weightings of other trainers
from .base import WEIGHTINGS, Scheme, Weighting, resolve_weighting
from .learned import LearnedUncertainty
from .schemes import (
    EDM,
    P2,
    SNR,
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
)

__all__ = [
    "EDM",
    "P2",
    "SNR",
    "WEIGHTINGS",
    "CosMap",
    "Debiased",
    "LearnedUncertainty",
    "MinSNR",
    "PerRange",
    "PlainFlow",
    "PlainV",
    "PlainX0",
    "Scheme",
    "SigmaSqrt",
    "Sigmoid",
    "SoftMinSNR",
    "Uniform",
    "VLike",
    "Weighting",
    "resolve_weighting",
    "trainer_compat",
]
