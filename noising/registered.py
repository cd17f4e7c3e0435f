"""The registry of curves."""

from __future__ import annotations

from collections.abc import Mapping
from inspect import signature
from typing import Any

from .continuous import Cosine, Flow, Karras, SubVariancePreserving, VarianceExploding, VariancePreserving
from .curves import Curve
from .discrete import Discrete
from .registry import lookup
from .truncated import Truncated

CURVES: Mapping[str, type[Curve]] = {
    kind.kind: kind
    for kind in (Discrete, Flow, VariancePreserving, SubVariancePreserving, VarianceExploding, Karras, Cosine)
}
"""Every kind of curve by its name; a new one is a class in a file of its own, or beside its kin, and a word in this line."""


def curve_from_config(config: Mapping[str, Any]) -> Curve:
    """Return the curve of a config made by :meth:`Curve.to_config`.

    Raises ValueError for an unknown kind or key.

    >>> curve_from_config({"kind": "flow", "shift": 3.0})
    Flow(num_train_timesteps=1000, shift=3.0)
    """
    values = dict(config)
    kind = lookup("curve", values.pop("kind", None), {**CURVES, Truncated.kind: Truncated})
    for key in values:
        lookup(f"setting of a {kind.kind} curve", key, signature(kind).parameters)
    if kind is Truncated:
        if not isinstance(values.get("curve"), Mapping):
            raise ValueError(
                f"a truncated curve needs the config of what it is a part of under 'curve', got {sorted(values)}"
            )
        values["curve"] = curve_from_config(values["curve"])
    return kind(**values)
