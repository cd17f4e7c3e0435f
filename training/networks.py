"""Networks from their configs: a checkpoint says which diffusers model it holds in plain JSON, and nothing is unpickled."""

from __future__ import annotations

import importlib
import json
from collections.abc import Mapping
from typing import Any, cast

from torch import nn

from ..noising.registry import unknown


def network_config(network: nn.Module) -> dict[str, Any] | None:
    """Return the JSON config of a diffusers model, or None for other networks.

    >>> network_config(nn.Linear(1, 1)) is None
    True
    """
    config = getattr(network, "config", None)
    if not isinstance(config, Mapping) or not type(network).__module__.startswith("diffusers."):
        return None
    plain = json.loads(
        json.dumps(dict(config), default=str)
    )  # a FrozenDict would make the checkpoint unloadable with weights_only
    return {"_class_name": type(network).__name__, **{k: v for k, v in plain.items() if k != "_name_or_path"}}


def build_network(config: Mapping[str, Any]) -> nn.Module:
    """Return a new diffusers model, with random weights, from :func:`network_config`'s dict.

    Only model classes of diffusers are looked up, so a config cannot name other code. Raises ValueError for other names.

    >>> build_network({"_class_name": "Popen"})  # doctest: +ELLIPSIS
    Traceback (most recent call last):
    ValueError: unknown diffusers model 'Popen'; ...
    """
    import diffusers

    name = str(config.get("_class_name"))
    kind = getattr(diffusers, name, None) if name in dir(diffusers) else None
    if not (isinstance(kind, type) and issubclass(kind, diffusers.ModelMixin)):
        models = [n for n in dir(diffusers) if n.endswith("Model")]
        raise ValueError(unknown("diffusers model", name, models))
    return cast(nn.Module, cast(Any, kind).from_config(dict(config)))


def import_network(path: str) -> nn.Module:
    """Return the network that ``package.module:factory`` makes; for networks of your own, named by you and not by a file.

    >>> import_network("torch.nn:Identity")
    Identity()
    """
    module, _, factory = path.partition(":")
    if not factory:
        raise ValueError(f"a network is named as 'package.module:factory', got {path!r}")
    return getattr(importlib.import_module(module), factory)()
