"""Registries as they were: what a test or an example registers is gone afterwards."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from alphabar.noising import (
    BETA_SCHEDULES,
    CURVES,
    LOSSES,
    NOISES,
    PRESETS,
    SHAPED_TIMESTEPS,
    TIMESTEPS,
    WEIGHTINGS,
)
from alphabar.noising.utils.registry import Registry
from alphabar.sampling import GRIDS, MATRICES, METHODS, STANDALONE
from alphabar.training import EMA_PROFILES
from alphabar.training.cli.plot import PICTURES

REGISTRIES: tuple[Registry[Any], ...] = (
    *(BETA_SCHEDULES, CURVES, LOSSES, NOISES, PRESETS, SHAPED_TIMESTEPS, TIMESTEPS, WEIGHTINGS),
    *(GRIDS, MATRICES, METHODS, STANDALONE, EMA_PROFILES, PICTURES),
)


@contextmanager
def restored() -> Iterator[None]:
    before = [dict(registry._entries) for registry in REGISTRIES]
    try:
        yield
    finally:
        for registry, entries in zip(REGISTRIES, before, strict=True):
            if registry._entries != entries:
                registry._entries = entries
                registry.changes += 1
