"""Context managers that put back what sampling during training may move, also when it fails.

Lightning's ``isolate_rng`` does not restore on exceptions, and ``module.train()`` after a preview would wake the
dropout of parts that were frozen in eval mode.
"""

from __future__ import annotations

import random
from collections.abc import Generator
from contextlib import contextmanager

import numpy as np
import torch
from torch import nn


@contextmanager
def randomness_restored(device: torch.device | str = "cpu") -> Generator[None, None, None]:
    """Restore the global generators of Python, numpy and torch (CPU, and the accelerator that ``device`` names).

    >>> torch.manual_seed(0).initial_seed()
    0
    >>> with randomness_restored():
    ...     _ = torch.rand(3), random.random()
    >>> a = torch.rand(1)
    >>> torch.equal(a, torch.rand(1, generator=torch.Generator().manual_seed(0)))
    True
    """
    # the current device alone: asking for all would open a context on every visible GPU
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
    """Put every submodule of these modules in eval mode, and give each its own flag back. Other objects are left alone.

    >>> net = nn.Sequential(nn.Dropout(), nn.Dropout().eval())
    >>> with evaluating(net):
    ...     print([m.training for m in net])
    [False, False]
    >>> [m.training for m in net]
    [True, False]
    """
    flags = [(m, m.training) for root in roots if isinstance(root, nn.Module) for m in root.modules()]
    try:
        # eval() is not called: some libraries hang work on it (LoRA layers merge their weights), which setting the
        # flags back would not undo
        for module, _ in flags:
            module.training = False
        yield
    finally:
        for module, training in flags:
            module.training = training
