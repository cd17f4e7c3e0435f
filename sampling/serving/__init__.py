"""Sampling for many requests: batches whose images stand at different steps."""

from .continuous import ContinuousBatch

__all__ = ["ContinuousBatch"]
