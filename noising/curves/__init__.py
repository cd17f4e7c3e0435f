"""Curves α(t), σ(t): the base class, the published kinds, and a curve from its config."""

from __future__ import annotations

from collections.abc import Mapping
from inspect import signature
from typing import Any

from ..utils.config_reading import mapping, settings
from ..utils.registry import lookup
from .base import CURVES, Curve
from .continuous import (
    Cosine,
    Flow,
    Karras,
    SubVariancePreserving,
    VarianceExploding,
    VariancePreserving,
)
from .discrete import Discrete
from .truncated import Truncated

__all__ = [
    "CURVES",
    "Cosine",
    "Curve",
    "Discrete",
    "Flow",
    "Karras",
    "SubVariancePreserving",
    "Truncated",
    "VarianceExploding",
    "VariancePreserving",
    "curve_from_config",
]


def curve_from_config(config: Mapping[str, Any]) -> Curve:
    """Return the curve of a config made by :meth:`Curve.to_config`.

    Raises ValueError for an unknown kind or key.

    >>> curve_from_config({"kind": "flow", "shift": 3.0})
    Flow(num_train_timesteps=1000, shift=3.0)
    """
    values = mapping("the curve", config)
    name = values.pop("kind", None)
    kind = Truncated if name == Truncated.kind else lookup("curve", name, CURVES)
    known = signature(kind).parameters
    values = settings(f"a {kind.kind} curve", kind, values, known)
    missing = [
        name
        for name, parameter in known.items()
        if parameter.default is parameter.empty and name not in values
    ]
    if missing:
        of = "the config of what it is a part of under 'curve', and " if kind is Truncated else ""
        raise ValueError(
            f"a {kind.kind} curve needs {of}{', '.join(map(repr, missing))}, got {sorted(values)}"
        )
    betas, count = values.get("trained_betas"), values.get("num_train_timesteps")
    if betas is not None and count not in (None, len(betas)):
        raise ValueError(
            f"num_train_timesteps says {count}, but there are {len(betas)} trained_betas; remove "
            "one of the two"
        )
    if kind is Truncated:
        whole = mapping("the curve of a truncated one", values["curve"])
        if whole.get("kind") == Truncated.kind:
            raise ValueError(
                "a part of a part of a curve is written as one part; give the whole curve under "
                "'curve'"
            )
        values["curve"] = curve_from_config(whole)
    return kind(**values)
