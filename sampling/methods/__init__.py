"""The methods, by family; add a new file to the import below."""

# isort: off: the order of the registry
from . import (
    adams,
    cfg_pp,
    consistency,
    dpm2,
    dpm_singlestep,
    dpm_solver,
    euler,
    exponential,
    flow_sde,
    heun,
    sa_solver,
    score_sde,
    unipc,
)

# isort: on
from .base import METHODS, Method, register_method

__all__ = [
    "METHODS",
    "Method",
    "adams",
    "cfg_pp",
    "consistency",
    "dpm2",
    "dpm_singlestep",
    "dpm_solver",
    "euler",
    "exponential",
    "flow_sde",
    "heun",
    "register_method",
    "sa_solver",
    "score_sde",
    "unipc",
]
