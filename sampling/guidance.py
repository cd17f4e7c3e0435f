"""Classifier-free guidance around a network. Tables know nothing of it: it changes what an evaluation returns."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from ..noising.noising import prediction_tensor

Network = Callable[..., Any]


def guide(out: Tensor, unconditional: Tensor, guidance_scale: float, guidance_rescale: float = 0.0) -> Tensor:
    """Return the guided output, u + w (c - u), pulled back to the conditional one's spread by ``guidance_rescale``.

    Shapes (batch, ...); float32 or better. Classifier-free guidance is Ho & Salimans 2207.12598, eq. 6, with w = 1 for no
    guidance; the rescale is Lin et al. 2305.08891, eq. 15 and 16, with φ = 0.7 there.

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


def guided_network(
    network: Network,
    conditioning: Mapping[str, Any],
    unconditional: Mapping[str, Any] | None,
    guidance_scale: float,
    guidance_rescale: float,
) -> Callable[[Tensor, Tensor], Tensor]:
    """Return (x, timesteps) -> raw output, with both halves of guidance in one batch of twice the size.

    Raises ValueError where guidance is asked for without an unconditional input, or the two do not have the same keys.

    >>> f = guided_network(lambda x, t, y: y, {"y": torch.ones(1, 2)}, {"y": torch.zeros(1, 2)}, 3.0, 0.0)
    >>> f(torch.zeros(1, 2), torch.zeros(1))
    tensor([[3., 3.]])
    """
    if guidance_scale == 1.0:
        return lambda x, t: prediction_tensor(network(x, t, **conditioning))
    if unconditional is None:
        raise ValueError(
            f"guidance_scale={guidance_scale} needs unconditional=..., the conditioning of the empty prompt "
            f"(keys {sorted(conditioning)}); or use guidance_scale=1"
        )
    if set(unconditional) != set(conditioning):
        raise ValueError(
            f"conditioning has the keys {sorted(conditioning)} and unconditional {sorted(unconditional)}; give both the same"
        )
    if not 0 <= guidance_rescale <= 1:
        raise ValueError(f"guidance_rescale must be between 0 and 1, got {guidance_rescale}; the paper uses 0.7")
    both = {key: _doubled(key, conditioning[key], unconditional[key]) for key in conditioning}

    def evaluate(x: Tensor, t: Tensor) -> Tensor:
        out = prediction_tensor(network(torch.cat([x, x]), torch.cat([t, t]), **both))
        conditional, empty = out.chunk(2)
        return guide(conditional, empty, guidance_scale, guidance_rescale)

    return evaluate


def _doubled(key: str, a: Any, b: Any) -> Any:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        if a.shape != b.shape:
            raise ValueError(
                f"conditioning {key!r} has shape {tuple(a.shape)} and its unconditional one {tuple(b.shape)}; give both the same"
            )
        return torch.cat([a, b])
    if isinstance(a, Mapping) and isinstance(b, Mapping):
        return {k: _doubled(f"{key}.{k}", a[k], b[k]) for k in a}
    return a


def _at_least_float32(x: Tensor) -> Tensor:
    return x if x.dtype in (torch.float32, torch.float64) else x.float()
