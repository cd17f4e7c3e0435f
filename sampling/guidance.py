"""Classifier-free guidance around a network.

Tables do not depend on it: guidance only changes the result of an evaluation.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from enum import Enum
from functools import partial
from types import NoneType
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from ..noising.noising import prediction_tensor
from ..noising.utils.validation import require

Network = Callable[..., Any]


def guide(
    out: Tensor, unconditional: Tensor, guidance_scale: float, guidance_rescale: float = 0.0
) -> Tensor:
    """Return the guided output u + w (c - u), rescaled towards the standard deviation of c.

    Shapes (batch, ...); float32 or better. Classifier-free guidance: Ho & Salimans 2207.12598, eq.
    6; w = 1 is no guidance. ``guidance_rescale`` is φ of Lin et al. 2305.08891, eq. 15 and 16; the
    paper uses 0.7.

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
    """A network with guidance: (x, timesteps) -> guided raw output.

    ``rows``: the rows that the network is given; timesteps have as many, or one for each image.
    ``unconditional`` is the unconditional half of the last output. Both halves use one network call
    with twice the batch if their inputs can be joined. Otherwise there are two calls: for objects,
    texts and numbers that differ, and for tensors that differ and have no row for each image. Two
    calls give the same result as one, whatever the network does with its arguments.
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
        self.rows = batch if self.both is None else 2 * batch

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        if self.both is not None:
            if t.shape[0] != self.rows:
                t = torch.cat([t, t])
            out, empty = prediction_tensor(self.network(torch.cat([x, x]), t, **self.both)).chunk(2)
        else:  # conditional half last: the network may keep state from its last call
            empty = prediction_tensor(self.network(x, t, **self.without))
            out = prediction_tensor(self.network(x, t, **self.conditioning))
        self.unconditional = empty
        return (
            out
            if self.guidance_scale == 1.0
            else guide(out, empty, self.guidance_scale, self.guidance_rescale)
        )


class Unguided:
    """A network without guidance: (x, timesteps) -> raw output, with no unconditional half."""

    unconditional: Tensor | None = None

    def __init__(self, network: Network, conditioning: Mapping[str, Any], batch: int) -> None:
        self.call, self.rows = partial(network, **conditioning), batch

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        return prediction_tensor(self.call(x, t))


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

    At a scale of 1 the unconditional half is evaluated only if ``halves`` is True and
    ``unconditional`` is given.

    Raises:
        ValueError: Guidance has no unconditional input, or the two inputs have different keys.

    >>> f = guided_network(
    ...     lambda x, t, y: y, {"y": torch.ones(1, 2)}, {"y": torch.zeros(1, 2)}, 3.0, 0.0, batch=1
    ... )
    >>> f(torch.zeros(1, 2), torch.zeros(1)), f.unconditional
    (tensor([[3., 3.]]), tensor([[0., 0.]]))
    """
    if guidance_scale == 1.0 and not (halves and unconditional is not None):
        return Unguided(network, conditioning, batch)
    if unconditional is None:
        raise ValueError(
            f"guidance_scale={guidance_scale} needs unconditional=..., the conditioning of the "
            "empty prompt "
            f"(keys {sorted(conditioning)}); or use guidance_scale=1"
        )
    fits, advice = 0 <= guidance_rescale <= 1, "the paper uses 0.7"
    require(fits, "guidance_rescale", "be between 0 and 1", guidance_rescale, advice)
    return Guided(network, conditioning, unconditional, guidance_scale, guidance_rescale, batch)


class _Apart(Exception):
    """The two halves of this argument cannot be joined in one batch."""


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
"""Types without rows: equal values in both halves can share one batch."""


def _joined(key: str, a: Any, b: Any, batch: int) -> Any:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return _joined_tensors(key, a, b, batch)
    kind = type(a)
    if kind is type(b):
        if kind is dict:
            return _joined_mappings(key, cast(Any, a), cast(Any, b), batch)
        # a list as long as the batch may hold one item per image
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
        if a is b or torch.equal(a, b):  # one value for all images
            return a
    raise _Apart


def _at_least_float32(x: Tensor) -> Tensor:
    return x if x.dtype in (torch.float32, torch.float64) else x.float()
