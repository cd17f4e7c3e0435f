"""The training loop that previews interrupt: its ranks, device, precision and trackers.

A loop of accelerate, of Lightning Fabric, of torch.distributed, or of a single process gives a
:class:`Loop`. ``callbacks`` makes one of a Trainer.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .forward import ForwardMode, guarded
from .wrappers import forward_mode_of_wrappers, is_of_fabric, unwrapped

Context = Callable[[], AbstractContextManager[Any]]


def no_average() -> AbstractContextManager[bool]:
    """Return a context in which the model has its own weights: there is no average.

    >>> with no_average() as used:
    ...     used
    False
    """
    return nullcontext(False)


@dataclass(frozen=True)
class LiveModel:
    """The model that trains, and how a preview calls it between training steps.

    Args:
        root: the outermost module, which the training step calls.
        module: the module inside the wrappers. Functions of the user may call its parts.
        predict: ``predict(x, timesteps, **conditioning)``.
        device: device of the samples.
        forward_mode: whether a forward is a collective.
        call: wraps a function that calls parts of the model.
        forward_context: context of a forward, as in training: autocast.
        convert_input: converts inputs of a forward to the precision of training.
        average: a context in which the model has its averaged weights. It yields whether there is
            an average.
        pipeline_context: context of a call of a pipeline.
    """

    root: nn.Module
    module: nn.Module
    predict: Callable[..., Any]
    device: torch.device
    forward_mode: ForwardMode = field(default_factory=ForwardMode)
    call: Callable[[Callable[..., Any]], Callable[..., Any]] = lambda function: function
    forward_context: Context = nullcontext
    convert_input: Callable[[Any], Any] = lambda value: value
    average: Callable[[], AbstractContextManager[bool]] = no_average
    pipeline_context: Context = nullcontext


@dataclass(frozen=True)
class Loop:
    """A training loop, as previews see it.

    Args:
        rank: index of this process.
        world_size: number of processes.
        device: device of this process, None if only the network says it.
        owner: the object that holds the trackers. Previews with the same owner publish one after
            another.
        trackers: returns the trackers that take images.
        share: (number of shares, index of this rank's share) of the images. By default every rank
            has a share.
        shows_progress: whether a progress bar may appear.
        autocast: context of the loop for forwards.
        convert_input: converts inputs to the precision of the loop. By default they get the dtype
            of a network that has a single one.

    >>> Loop().is_global_zero, Loop(rank=1, world_size=2).share_of_rank
    (True, (2, 1))
    """

    rank: int = 0
    world_size: int = 1
    device: torch.device | None = None
    owner: Any = field(default=None, repr=False)
    trackers: Callable[[], Sequence[Any]] = tuple
    share: tuple[int, int] | None = None
    shows_progress: bool = True
    autocast: Context | None = None
    convert_input: Callable[[Any], Any] | None = None

    @property
    def is_global_zero(self) -> bool:
        """Whether this is rank 0, which publishes."""
        return self.rank == 0

    @property
    def share_of_rank(self) -> tuple[int, int]:
        """(number of shares, index of this rank's share) of the images."""
        return self.share or (self.world_size, self.rank)

    def live(
        self,
        network: nn.Module,
        predict: Callable[..., Any] | None = None,
        average: Callable[[], AbstractContextManager[Any]] | None = None,
        exit_after: float | None = None,
    ) -> LiveModel:
        """Return how to call ``network``, which may be wrapped, between training steps.

        A copy on every rank is called without its wrapper: a wrapper exchanges buffers in every
        forward. A sharded network is called as it is.

        Raises:
            ValueError: a network of Fabric in another loop, which would have another precision.

        >>> Loop().live(nn.Linear(2, 2).half()).convert_input(torch.zeros(1)).dtype
        torch.float16
        """
        if is_of_fabric(network) and self.convert_input is None:
            raise ValueError("the network is set up by a Fabric; give the previews loop=fabric")
        mode = replace(forward_mode_of_wrappers(network), exit_after=exit_after)
        inner = unwrapped(network)
        called = network if mode.wrapped else inner
        parameter = next(inner.parameters(), torch.empty(0))
        device = self.device or parameter.device
        autocast = self.autocast or ambient_autocast(device)
        with autocast():
            mixed = torch.is_autocast_enabled(device.type)
        own = None if mixed else single_dtype(inner)
        return LiveModel(
            root=network,
            module=inner,
            predict=predict if predict is not None else called,
            device=device,
            forward_mode=mode,
            call=partial(guarded, mode=mode),
            forward_context=autocast,
            convert_input=self.convert_input or (lambda value: floats_to(own, value)),
            average=average or no_average,
            pipeline_context=autocast if mixed else nullcontext,
        )


def loop_of(given: Any = None) -> Loop:
    """Return the Loop of an ``Accelerator`` or a ``Fabric``; of None, that of torch.distributed.

    If torch.distributed is not initialized either, it is the loop of a single process.

    Raises:
        TypeError: the object is none of these.
        ValueError: its processes do not use torch.distributed.

    >>> loop_of().world_size
    1
    >>> loop_of("cuda")
    Traceback (most recent call last):
    TypeError: loop must be an Accelerator of accelerate, a Fabric of Lightning or None, got 'cuda'
    """
    if given is None or isinstance(given, Loop):
        return given or _of_torch()
    for kind in type(given).__mro__:  # no import: the user has imported the package
        if kind.__name__ in LOOPS:
            loop = LOOPS[kind.__name__](given)
            if loop.world_size > 1 and not dist.is_initialized():
                raise ValueError(
                    f"previews need torch.distributed, which this {kind.__name__} does not use; "
                    "use a backend of torch.distributed, or draw in a single process"
                )
            return loop
    raise TypeError(
        f"loop must be an Accelerator of accelerate, a Fabric of Lightning or None, got {given!r}"
    )


def _of_torch() -> Loop:
    if not dist.is_initialized():
        return Loop()
    return Loop(dist.get_rank(), dist.get_world_size())


def _of_accelerator(accelerator: Any) -> Loop:
    return Loop(
        accelerator.process_index,
        accelerator.num_processes,
        accelerator.device,
        owner=accelerator,
        trackers=lambda: accelerator.trackers,
        autocast=accelerator.autocast,
    )


def _of_fabric(fabric: Any) -> Loop:
    strategy = fabric.strategy
    share = None
    if fabric.world_size > 1:  # ranks of a tensor-parallel group draw the same share
        dealt = getattr(strategy, "distributed_sampler_kwargs", None)
        share = (dealt["num_replicas"], dealt["rank"]) if dealt else None
    return Loop(
        fabric.global_rank,
        fabric.world_size,
        fabric.device,
        owner=fabric,
        trackers=lambda: fabric.loggers,
        share=share,
        autocast=strategy.precision.forward_context,
        convert_input=strategy.precision.convert_input,
    )


LOOPS: dict[str, Callable[[Any], Loop]] = {"Accelerator": _of_accelerator, "Fabric": _of_fabric}
"""The Loop of an object, by the name of its class or of a base class."""


def ambient_autocast(device: torch.device) -> Context:
    """Return the autocast that is active now, as a context that can be entered later.

    >>> with torch.autocast("cpu", torch.bfloat16):
    ...     context = ambient_autocast(torch.device("cpu"))
    >>> with context():
    ...     torch.get_autocast_dtype("cpu"), torch.is_autocast_enabled("cpu")
    (torch.bfloat16, True)
    """
    if not torch.is_autocast_enabled(device.type):
        return nullcontext
    dtype = torch.get_autocast_dtype(device.type)
    return lambda: torch.autocast(device.type, dtype)


def single_dtype(network: nn.Module) -> torch.dtype | None:
    """Return the floating dtype of all parameters, or None if they have several or none.

    >>> single_dtype(nn.Linear(1, 1).bfloat16())
    torch.bfloat16
    """
    found = {p.dtype for p in network.parameters() if p.is_floating_point()}
    return found.pop() if len(found) == 1 else None


def floats_to(dtype: torch.dtype | None, value: Any) -> Any:
    """Convert floating tensors in a (nested) mapping, list or tuple to ``dtype``, unless None.

    >>> floats_to(torch.float16, {"x": [torch.ones(1), torch.arange(1)]})
    {'x': [tensor([1.], dtype=torch.float16), tensor([0])]}
    """
    if dtype is None:
        return value
    if isinstance(value, dict):
        return {key: floats_to(dtype, part) for key, part in value.items()}
    if type(value) in (list, tuple):
        return type(value)(floats_to(dtype, part) for part in value)
    return value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value
