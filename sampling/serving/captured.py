"""A whole sampling loop as one CUDA graph, for small networks and small batches.

There the host needs longer to launch the kernels of a step than the device to run them. A graph
launches all steps at once. It reads the start, the seeds and the conditioning from memory of its
own, to which each call copies them, and all else where it was at the capture.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ...noising.utils.validation import require_same_shape
from ..guidance import Network
from ..inference import SeededNoise, checked_shape, place
from ..kernel import final
from ..sampler import Sampler

_WARM_UPS = 3


class CapturedSampler:
    """A sampler, a network and a shape, captured as one CUDA graph and replayed at each call.

    The samples are those of the sampler with the same arguments. The network must do the same at
    every call, without reading values on the host, and its weights stay where they are (an update
    in place is seen).

    Args:
        sampler: A Sampler; the loops of samplers without a table depend on values.
        network, shape_or_noise: As in ``Sampler.iterate``. With a shape, each call draws its start
            from its seeds; with noise, each call needs noise of that shape.
        conditioning, unconditional: As in ``Sampler.iterate``. A call may replace their tensors.
        arguments: ``guidance_scale``, ``guidance_rescale``, ``device``, ``dtype`` and ``clip`` of
            ``Sampler.iterate``, the same at every call.

    Raises:
        TypeError: The sampler has no table.
        ValueError: The device is no CUDA device, or triton cannot draw noise on it.
        RuntimeError: The network does what a graph cannot hold.

    >>> from alphabar.noising import NoiseSchedule
    >>> sampler = Sampler(NoiseSchedule.flow(), "euler", steps=3)
    >>> CapturedSampler(sampler, lambda x, t: -x, (1, 4, 8, 8), device="cpu")
    Traceback (most recent call last):
    ValueError: CUDA graphs need a network on a CUDA device, got 'cpu'; call the sampler itself
    """

    def __init__(
        self,
        sampler: Sampler,
        network: Network,
        shape_or_noise: Sequence[int] | Tensor,
        *,
        conditioning: Mapping[str, Any] | None = None,
        unconditional: Mapping[str, Any] | None = None,
        device: torch.device | str | None = None,
        **arguments: Any,
    ) -> None:
        if not isinstance(sampler, Sampler):
            raise TypeError(
                f"only a Sampler with a table can be captured, got {type(sampler).__name__}; call "
                "it as it is"
            )
        shape = checked_shape(shape_or_noise)
        self.device, _ = place(network, shape_or_noise, device, None)
        _require_graphs(self.device)
        self._start = None
        if isinstance(shape_or_noise, Tensor):
            self._start = shape_or_noise.detach().to(self.device, copy=True)
        self._noise = SeededNoise(shape, 0, self.device)
        if not self._noise.on_device:
            raise ValueError(
                "a CUDA graph draws its noise with triton, which is missing or does not work here"
            )
        # the graph reads the tensors that these keep: a copy of the sampler keeps its times, which
        # other calls of the caller's replace
        sampler = copy.copy(sampler)
        self._read = sampler, network, arguments
        # one copy of both, so that tensors that they share are shared in the copies
        self._inputs = copy.deepcopy((dict(conditioning or {}), unconditional))

        def body() -> Tensor:
            self._noise.rewind()
            steps, x, evaluate, noise, beside = sampler._begun(
                network,
                shape if self._start is None else self._start,
                seeds=self._noise,
                conditioning=self._inputs[0],
                unconditional=self._inputs[1],
                device=self.device,
                **arguments,
            )
            return final(steps, [x], evaluate, noise, beside)

        with torch.no_grad():
            self._replay, self._samples = _captured(body)

    @torch.no_grad()
    def __call__(
        self,
        noise: Tensor | None = None,
        *,
        seeds: int | Sequence[int] | None = None,
        conditioning: Mapping[str, Any] | None = None,
        unconditional: Mapping[str, Any] | None = None,
    ) -> Tensor:
        """Return samples, shape (batch, ...).

        Args:
            noise: The start, if the sampler was captured with one.
            seeds: As in ``Sampler.iterate``.
            conditioning, unconditional: New values; by default those of the last call.

        Raises:
            ValueError: An argument does not fit what was captured.
        """
        if (noise is None) != (self._start is None):
            raise ValueError(
                "this sampler was captured for a drawn start; leave the noise out"
                if self._start is None
                else "this sampler was captured for a given start; give noise of its shape"
            )
        if noise is not None and self._start is not None:
            require_same_shape("noise", noise, "the captured start", self._start)
        pairs: list[tuple[Tensor, Tensor]] = []
        given = {"conditioning": conditioning, "unconditional": unconditional}
        for (name, new), old in zip(given.items(), self._inputs, strict=True):
            if new is not None:
                _pair(new, old, name, pairs)
        self._noise.restart(seeds)
        if noise is not None and self._start is not None:
            pairs.append((noise, self._start))
        for new, old in pairs:
            old.copy_(new)
        self._replay()
        return self._samples.clone()


def _require_graphs(device: torch.device) -> None:
    if device.type != "cuda":
        raise ValueError(
            f"CUDA graphs need a network on a CUDA device, got '{device}'; call the sampler itself"
        )


def _captured(body: Callable[[], Tensor]) -> tuple[Callable[[], Any], Tensor]:
    """Return the replay of a captured function, and the memory of its result."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # compiles kernels, makes handles and the kept tensors
        for _ in range(_WARM_UPS):
            body()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        samples = body()
    return graph.replay, samples


def _pair(new: Any, old: Any, where: str, pairs: list[tuple[Tensor, Tensor]]) -> None:
    """Append the tensors of new inputs and the captured ones that they replace."""
    if isinstance(new, Mapping) and isinstance(old, Mapping) and set(new) == set(old):
        for key in new:
            _pair(new[key], old[key], f"{where}[{key!r}]", pairs)
    elif isinstance(new, Tensor) and isinstance(old, Tensor):
        require_same_shape(where, new, "the captured one", old)
        pairs.append((new, old))
    elif isinstance(new, Tensor | Mapping) or isinstance(old, Tensor | Mapping) or new != old:
        raise ValueError(
            f"{where} is not what was captured: only tensors can be replaced, by tensors of the "
            "same shape; capture the sampler again"
        )
