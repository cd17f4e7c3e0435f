"""Build networks from configs: a checkpoint names its diffusers model in plain JSON.

Nothing is unpickled.
"""

from __future__ import annotations

import importlib
import inspect
import json
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook

from ..noising.utils.config_reading import mapping
from ..noising.utils.registry import shown, unknown

# upper limit in a network config: no width, number of layers or vocabulary is larger
LARGEST_SETTING = 1 << 20


def network_config(network: nn.Module) -> dict[str, Any] | None:
    """Return the JSON config of a diffusers model, or None for other networks.

    >>> network_config(nn.Linear(1, 1)) is None
    True
    """
    config = getattr(network, "config", None)
    if not isinstance(config, Mapping) or not type(network).__module__.startswith("diffusers."):
        return None
    # weights_only cannot load a FrozenDict
    plain = json.loads(json.dumps(dict(config), default=str))
    return {
        "_class_name": type(network).__name__,
        **{k: v for k, v in plain.items() if k != "_name_or_path"},
    }


def build_network(
    config: Mapping[str, Any], weights: Mapping[str, Tensor] | None = None
) -> nn.Module:
    """Return a new diffusers model with random weights, from the dict of :func:`network_config`.

    Only model classes of diffusers are looked up, so a config cannot run other code.

    Args:
        config: the network config.
        weights: the weights to load later. If the config's network is larger, it is rejected before
            memory is allocated.

    Raises:
        ValueError: the class is not a diffusers model, or the settings are not valid for it.

    >>> build_network({"_class_name": "Popen"})  # doctest: +ELLIPSIS
    Traceback (most recent call last):
    ValueError: unknown diffusers model 'Popen'; ...
    """
    import diffusers

    values = mapping("a network's config", config)
    for key, value in values.items():
        _require_small(key, value)
    name = values.get("_class_name")
    kind = (
        getattr(diffusers, name, None) if isinstance(name, str) and name in dir(diffusers) else None
    )
    if not (isinstance(kind, type) and issubclass(kind, diffusers.ModelMixin)):
        models = [n for n in dir(diffusers) if n.endswith("Model")]
        raise ValueError(unknown("diffusers model", name, models))
    for key, parameter in inspect.signature(kind).parameters.items():
        _require_number(key, values.get(key), parameter.default)
    make = cast(Any, kind).from_config
    if weights is None:
        return cast(nn.Module, make(values))
    try:
        with _no_larger_than(weights):
            _try_without_memory(make, values)
            return cast(nn.Module, make(values))
    except Exception as error:  # constructors raise any type of error for invalid settings
        raise ValueError(
            f"no {name} can be made of the network config: {_in_one_line(error)}"
        ) from error


def load_weights(network: nn.Module, weights: Mapping[str, Tensor], source: str) -> None:
    """Load ``weights`` into a network.

    Raises:
        ValueError: weights do not fit; the message names the first of them.

    >>> load_weights(nn.Linear(2, 1), {"weight": torch.ones(1, 2)}, "a.ckpt")
    Traceback (most recent call last):
    ValueError: the weights of a.ckpt do not fit Linear: ['bias'] are missing; name the network ...
    """
    own = {name: value for name, value in network.state_dict().items() if isinstance(value, Tensor)}
    problems = {
        "are missing": [name for name in own if name not in weights],
        "are of no part of it": [name for name in weights if name not in own],
        "have other shapes": [
            name for name in own if name in weights and own[name].shape != weights[name].shape
        ],
    }
    found = [f"{names[:3]} {words}" for words, names in problems.items() if names]
    if found:
        raise ValueError(
            f"the weights of {source} do not fit {type(network).__name__}: {', '.join(found)}; "
            "name the network that was trained"
        )
    network.load_state_dict(dict(weights))


def import_network(path: str) -> nn.Module:
    """Return the network that ``package.module:factory`` makes.

    This is for your own networks. Only the user may pass the name: it must not be read from a file.

    Raises:
        ValueError: the name is not valid, or the factory does not return a module.
        ImportError: the Python module does not exist.

    >>> import_network("torch.nn:Identity")
    Identity()
    """
    module, _, factory = path.partition(":")
    if not factory or not module:
        raise ValueError(f"a network is named as 'package.module:factory', got {path!r}")
    found = importlib.import_module(module)
    if not callable(getattr(found, factory, None)):
        names = [name for name, value in vars(found).items() if callable(value)]
        raise ValueError(unknown(f"factory of {module}", factory, names))
    network = getattr(found, factory)()
    if not isinstance(network, nn.Module):
        raise ValueError(f"{path!r} must make a torch.nn.Module, got {shown(network)}")
    return network


@contextmanager
def _no_larger_than(weights: Mapping[str, Tensor]) -> Generator[None, None, None]:
    """Stop building a network as soon as it clearly has more parameters than the given weights.

    >>> with _no_larger_than({"w": torch.ones(4)}):
    ...     _ = nn.Linear(100, 100)
    Traceback (most recent call last):
    ValueError: it has more parameters than the 4 weights that are there
    """
    whole = sum(value.numel() for value in weights.values())
    # some parameters are created and then replaced
    left = {"parameters": 2 * len(weights) + 16, "numbers": 2 * whole + 16}

    def count(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        if parameter is None:
            return
        left["parameters"] -= 1
        left["numbers"] -= parameter.numel()
        if min(left.values()) < 0:
            raise ValueError(f"it has more parameters than the {whole} weights that are there")

    hook = register_module_parameter_registration_hook(count)
    try:
        yield
    finally:
        hook.remove()


def _try_without_memory(make: Any, values: dict[str, Any]) -> None:
    try:
        with torch.device("meta"):
            make(values)
    except (NotImplementedError, RuntimeError):  # the constructor computes with its weights
        return


def _require_small(what: str, value: Any) -> None:
    if isinstance(value, Mapping):
        for key, part in mapping(what, value).items():
            _require_small(f"{what}.{key}", part)
    elif isinstance(value, list | tuple):
        if len(value) > 1000:
            raise ValueError(
                f"{what} of the network's config has {len(value)} entries, and no network has more "
                "than 1000"
            )
        for part in value:
            _require_small(what, part)
    elif isinstance(value, str) and len(value) <= 1000:
        return
    elif value is not None and not isinstance(value, bool | int | float):
        raise ValueError(
            f"{what} of the network's config must be a number or a word, got {shown(value)}"
        )
    elif value is not None and not abs(value) <= LARGEST_SETTING:
        raise ValueError(
            f"{what} of the network's config is {shown(value)}, and no network has more than "
            f"{LARGEST_SETTING}"
        )


def _require_number(what: str, value: Any, default: Any) -> None:
    """Raise ValueError for a non-number if the class has a number as default.

    The class may accept another type in its constructor, and then fail when it is called.
    """
    if isinstance(default, list | tuple) and isinstance(value, list | tuple):
        for part in value:
            _require_number(what, part, default[0] if default else None)
    elif (
        isinstance(default, int | float)
        and not isinstance(default, bool)
        and isinstance(value, bool | str)
    ):
        raise ValueError(f"{what} of the network's config must be a number, got {shown(value)}")
    elif isinstance(default, int) and isinstance(value, int) and value < 0 < default:
        raise ValueError(f"{what} of the network's config must not be negative, got {value}")


def _in_one_line(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return (text if isinstance(error, ValueError) else f"{type(error).__name__}: {text}")[:300]
