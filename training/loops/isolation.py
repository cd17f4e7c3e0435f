"""Context managers that restore state that sampling during training may change, also on errors.

Lightning's ``isolate_rng`` does not restore after an exception. ``module.train()`` after a preview
would enable the dropout of parts that were frozen in eval mode.
"""

from __future__ import annotations

import random
import signal
import threading
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

LARGEST_BUFFER = 1 << 24  # bytes


@contextmanager
def randomness_restored(device: torch.device | str = "cpu") -> Generator[None, None, None]:
    """Restore the global generators of Python, numpy and torch after the block.

    For torch: the CPU generator and that of the accelerator named by ``device``.

    >>> torch.manual_seed(0).initial_seed()
    0
    >>> with randomness_restored():
    ...     _ = torch.rand(3), random.random()
    >>> a = torch.rand(1)
    >>> torch.equal(a, torch.rand(1, generator=torch.Generator().manual_seed(0)))
    True
    """
    # only the current device: a query of all devices would open a context on every visible GPU
    kind = torch.device(device).type
    accelerator = None if kind == "cpu" else torch.get_device_module(kind)
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    on_accelerator = accelerator.get_rng_state() if accelerator is not None else None
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])
        if accelerator is not None:
            accelerator.set_rng_state(on_accelerator)


@contextmanager
def evaluating(*roots: object) -> Generator[None, None, None]:
    """Set every submodule to eval mode inside the block, then restore each ``training`` flag.

    Objects that are not modules are ignored.

    >>> net = nn.Sequential(nn.Dropout(), nn.Dropout().eval())
    >>> with evaluating(net):
    ...     print([m.training for m in net])
    [False, False]
    >>> [m.training for m in net]
    [True, False]
    """
    flags = [
        (m, m.training) for root in roots if isinstance(root, nn.Module) for m in root.modules()
    ]
    try:
        # not eval(): some libraries do work in it (LoRA layers merge their weights), which
        # restoring the flags would not undo
        for module, _ in flags:
            module.training = False
        yield
    finally:
        for module, training in flags:
            module.training = training


@contextmanager
def buffers_restored(*roots: object) -> Generator[None, None, None]:
    """Restore the tensor and the values of every changed buffer after the block.

    Buffers above ``LARGEST_BUFFER`` bytes, such as quantized weights, are not copied: their tensor
    is restored, but not its values.

    >>> net = nn.BatchNorm1d(2)
    >>> with buffers_restored(net):
    ...     _ = net.num_batches_tracked.add_(5)
    >>> int(net.num_batches_tracked)
    0
    """
    kept = []
    for module in {
        id(m): m for root in roots if isinstance(root, nn.Module) for m in root.modules()
    }.values():
        for name, buffer in module._buffers.items():
            small = buffer is not None and buffer.numel() * buffer.element_size() <= LARGEST_BUFFER
            kept.append(
                (
                    module,
                    name,
                    buffer,
                    buffer.clone() if buffer is not None and small else None,
                    _version(buffer),
                )
            )
    try:
        yield
    finally:
        for module, name, buffer, values, version in kept:
            if module._buffers.get(name) is not buffer:
                module._buffers[name] = buffer
            if values is not None and _version(buffer) != version:
                with torch.no_grad():
                    buffer.copy_(values)


def _version(buffer: Any) -> int | None:
    """Return the number of in-place writes to a tensor; None if torch does not count them."""
    return None if buffer is None or buffer.is_inference() else buffer._version


@dataclass
class Termination:
    """State of a deferred SIGTERM.

    ``arrived``: this process received SIGTERM. ``agreed``: some rank received it, and all ranks
    know.
    """

    arrived: bool = False
    agreed: bool = False


@contextmanager
def sigterm_deferred(
    together: Callable[[], object] | None = None,
) -> Generator[Termination, None, None]:
    """Defer SIGTERM to the end of the block.

    A handler may call a collective, which could pair with a gather of another rank.

    Args:
        together: acts on the signal if ``agreed`` is set. Every rank calls it at the same place.
            By default only the processes that received the signal act on it.

    >>> with sigterm_deferred() as termination:
    ...     termination.arrived
    False
    """
    termination = Termination()
    # only the main thread can set signal handlers
    if threading.current_thread() is not threading.main_thread():
        yield termination
        return

    def note(*_: Any) -> None:
        termination.arrived = True

    before = signal.signal(signal.SIGTERM, note)
    try:
        yield termination
    finally:
        signal.signal(signal.SIGTERM, before if before is not None else signal.SIG_DFL)
        if termination.agreed and together is not None:
            together()
        elif termination.arrived:
            signal.raise_signal(signal.SIGTERM)
