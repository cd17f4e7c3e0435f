"""Classifier-free guidance around a network. Tables know nothing of it: it changes what an
evaluation returns.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from enum import Enum
from types import NoneType
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from ..noising.noising import prediction_tensor

Network = Callable[..., Any]


def guide(
    out: Tensor, unconditional: Tensor, guidance_scale: float, guidance_rescale: float = 0.0
) -> Tensor:
    """Return the guided output, u + w (c - u), pulled back to the conditional one's spread by
    ``guidance_rescale``.

    Shapes (batch, ...); float32 or better. Classifier-free guidance is Ho & Salimans 2207.12598,
    eq. 6, with w = 1 for no guidance; the rescale is Lin et al. 2305.08891, eq. 15 and 16, with φ =
    0.7 there.

    >>> guide(torch.ones(1, 2), torch.zeros(1, 2), 3.0)
    tensor([[3., 3.]])
    """
    out, unconditional = _at_least_float32(out), _at_least_float32(unconditional)
    guided = torch.lerp(unconditional, out, guidance_scale)
    if not guidance_rescale:
        return guided
    axes = tuple(range(1, out.ndim))
    rescaled = guided * (out.std(axes, keepdim=True) / guided.std(axes, keepdim=True))  # eq. 15
    return torch.lerp(guided, rescaled, guidance_rescale)  # eq. 16


class Guided:
    """A network under guidance: (x, timesteps) -> its guided raw output. ``unconditional`` is that
    half of its last output.

    Both halves go through the network in one batch of twice the size where their inputs can be
    joined, and one after the other where they cannot: objects, texts and numbers that differ,
    tensors that have no row for each image and differ. A half of its own comes to the same result,
    whatever the network makes of its arguments.
    """

    def __init__(
        self,
        network: Network,
        conditioning: Mapping[str, Any],
        unconditional: Mapping[str, Any],
        guidance_scale: float,
        guidance_rescale: float,
        batch: int,
    ) -> None:
        self.network, self.conditioning, self.without = network, conditioning, unconditional
        self.guidance_scale, self.guidance_rescale = guidance_scale, guidance_rescale
        self.unconditional: Tensor | None = None
        try:
            with torch.no_grad():
                self.both: dict[str, Any] | None = _joined_mappings(
                    "", conditioning, unconditional, batch
                )
        except _Apart:
            self.both = None

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        if self.both is not None:
            out, empty = prediction_tensor(
                self.network(torch.cat([x, x]), torch.cat([t, t]), **self.both)
            ).chunk(2)
        else:  # the conditional half last: what the network keeps of its last call is of that one
            empty = prediction_tensor(self.network(x, t, **self.without))
            out = prediction_tensor(self.network(x, t, **self.conditioning))
        self.unconditional = empty
        return (
            out
            if self.guidance_scale == 1.0
            else guide(out, empty, self.guidance_scale, self.guidance_rescale)
        )


class Unguided:
    """A network without guidance: (x, timesteps) -> its raw output, of which no half is
    unconditional.
    """

    unconditional: Tensor | None = None

    def __init__(self, network: Network, conditioning: Mapping[str, Any]) -> None:
        self.network, self.conditioning = network, conditioning

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        return prediction_tensor(self.network(x, t, **self.conditioning))


def guided_network(
    network: Network,
    conditioning: Mapping[str, Any],
    unconditional: Mapping[str, Any] | None,
    guidance_scale: float,
    guidance_rescale: float,
    batch: int,
    halves: bool = False,
) -> Guided | Unguided:
    """Return (x, timesteps) -> raw output, guided, for x of ``batch`` rows.

    At a scale of 1 the unconditional half is evaluated only where ``halves`` asks for it and its
    input is given. Raises ValueError where guidance is asked for without an unconditional input, or
    the two do not have the same keys.

    >>> f = guided_network(
    ...     lambda x, t, y: y, {"y": torch.ones(1, 2)}, {"y": torch.zeros(1, 2)}, 3.0, 0.0, batch=1
    ... )
    >>> f(torch.zeros(1, 2), torch.zeros(1)), f.unconditional
    (tensor([[3., 3.]]), tensor([[0., 0.]]))
    """
    if guidance_scale == 1.0 and not (halves and unconditional is not None):
        return Unguided(network, conditioning)
    if unconditional is None:
        raise ValueError(
            f"guidance_scale={guidance_scale} needs unconditional=..., the conditioning of the "
            "empty prompt "
            f"(keys {sorted(conditioning)}); or use guidance_scale=1"
        )
    if not 0 <= guidance_rescale <= 1:
        raise ValueError(
            f"guidance_rescale must be between 0 and 1, got {guidance_rescale}; the paper uses 0.7"
        )
    return Guided(network, conditioning, unconditional, guidance_scale, guidance_rescale, batch)


class _Apart(Exception):
    """One batch cannot hold both halves of this argument."""


SHARED = (
    bool,
    int,
    float,
    complex,
    str,
    bytes,
    Enum,
    torch.dtype,
    torch.device,
    np.generic,
    NoneType,
)
"""Values without rows: where they are the same in both halves, one batch can have them."""


def _joined(key: str, a: Any, b: Any, batch: int) -> Any:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return _joined_tensors(key, a, b, batch)
    kind = type(a)
    if kind is type(b):
        if kind is dict:
            return _joined_mappings(key, cast(Any, a), cast(Any, b), batch)
        # a list as long as the batch may hold something for each image
        if kind in (list, tuple) and len(a) == len(b) != batch:
            return kind(
                _joined(f"{key}[{i}]", *pair, batch)
                for i, pair in enumerate(zip(a, b, strict=True))
            )
        if isinstance(a, SHARED) and a == b:
            return a
    raise _Apart


def _joined_mappings(
    key: str, a: Mapping[str, Any], b: Mapping[str, Any], batch: int
) -> dict[str, Any]:
    if set(a) != set(b):
        name = f"conditioning {key!r}" if key else "conditioning"
        raise ValueError(
            f"{name} has the keys {_shown(a)} and unconditional {_shown(b)}; give both the same"
        )
    return {k: _joined(f"{key}.{k}" if key else k, a[k], b[k], batch) for k in a}


def _shown(mapping: Mapping[Any, Any]) -> list[Any]:
    return sorted(mapping, key=str)


def _joined_tensors(key: str, a: Tensor, b: Tensor, batch: int) -> Tensor:
    rows = [tensor.ndim > 0 and tensor.shape[0] == batch for tensor in (a, b)]
    if rows[0] != rows[1]:
        raise ValueError(
            f"conditioning {key!r} has shape {tuple(a.shape)} and its unconditional one "
            f"{tuple(b.shape)}; give both the same"
        )
    alike = all(
        getattr(a, name) == getattr(b, name) for name in ("shape", "dtype", "device", "layout")
    )
    if alike and a.layout == torch.strided:
        if all(rows):
            return torch.cat([a, b])
        if a is b or torch.equal(a, b):  # one for all images
            return a
    raise _Apart


def _at_least_float32(x: Tensor) -> Tensor:
    return x if x.dtype in (torch.float32, torch.float64) else x.float()
