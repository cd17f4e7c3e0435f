"""Sampling for many requests: batches at different steps, and loops captured in CUDA graphs."""

from .captured import CapturedSampler
from .continuous import ContinuousBatch

__all__ = ["CapturedSampler", "ContinuousBatch"]
