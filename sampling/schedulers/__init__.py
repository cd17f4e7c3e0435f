"""The scheduler classes of diffusers over tables of alphabar: change the import, keep the script.

    from alphabar.sampling.schedulers import DDPMScheduler  # in place of diffusers

The classes have the names, arguments, config keys and files of diffusers.
"""

from __future__ import annotations

from typing import Any

from ...noising.utils.registry import unknown


def __getattr__(name: str) -> Any:
    from .drop_in import LEFT_OUT, NAMES, drop_in

    if name in NAMES:
        return drop_in(name)
    if name in LEFT_OUT:
        raise AttributeError(f"{name} has no drop-in here: {LEFT_OUT[name]}")
    raise AttributeError(unknown("scheduler class", name, NAMES))
