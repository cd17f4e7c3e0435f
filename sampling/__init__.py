"""Samplers as tables: grids, methods, the kernel that runs them, guidance."""

from .grids import GRIDS, make_knots
from .guidance import guide
from .kernel import Progress
from .knots import CLEAN, Knot, knots_at
from .making import make_sampler
from .methods import Method
from .names import METHODS, resolve_method
from .sampler import Sampler
from .table import Combination, Table, Trace

__all__ = [
    "CLEAN",
    "GRIDS",
    "METHODS",
    "Combination",
    "Knot",
    "Method",
    "Progress",
    "Sampler",
    "Table",
    "Trace",
    "guide",
    "knots_at",
    "make_knots",
    "make_sampler",
    "resolve_method",
]
