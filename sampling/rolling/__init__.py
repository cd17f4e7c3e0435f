"""Sampling with a time for each chunk: matrices of steps, and the sampler that runs them."""

from .matrices import MATRICES, SamplingMatrix, resolve_matrix, staggered
from .sampler import RollingSampler

__all__ = ["MATRICES", "RollingSampler", "SamplingMatrix", "resolve_matrix", "staggered"]
