"""Hooks for saving and removing checkpoints through a strategy, with the path.

Lightning has no hook that knows the path. Every save goes through the strategy: weights-only saves,
sharded saves and saves that the user calls. A link (``save_last="link"``) does not go through the
strategy. It needs no hook, because readers follow the link.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any


class SavesFollowed:
    """Wrap a strategy's ``save_checkpoint`` and ``remove_checkpoint`` with callbacks.

    All callbacks run on every rank. ``undo`` restores the strategy's own methods.

    Args:
        strategy: the Lightning strategy to wrap.
        saving: ``saving(checkpoint)`` runs before each save.
        saved: ``saved(path)`` runs after each save.
        removed: ``removed(path)`` runs before each removal, while the checkpoint still exists. It
            returns a function that runs after the removal.

    >>> class Strategy:
    ...     def save_checkpoint(self, checkpoint, filepath, storage_options=None):
    ...         print("saving", checkpoint, "to", filepath)
    ...
    ...     def remove_checkpoint(self, filepath):
    ...         print("removing", filepath)
    >>> strategy = Strategy()
    >>> followed = SavesFollowed(
    ...     strategy, lambda c: c.update(schedule=1), print, lambda path: lambda: print("gone")
    ... )
    >>> strategy.save_checkpoint({}, "a.ckpt")
    saving {'schedule': 1} to a.ckpt
    a.ckpt
    >>> strategy.remove_checkpoint("a.ckpt")
    removing a.ckpt
    gone
    >>> followed.undo()
    >>> strategy.remove_checkpoint("b.ckpt")
    removing b.ckpt
    """

    def __init__(
        self,
        strategy: Any,
        saving: Callable[[dict[str, Any]], object],
        saved: Callable[[str], object],
        removed: Callable[[str], Callable[[], object]],
    ) -> None:
        self._strategy = strategy
        save, remove = strategy.save_checkpoint, strategy.remove_checkpoint

        def save_checkpoint(
            checkpoint: dict[str, Any], filepath: Any, *more: Any, **named: Any
        ) -> None:
            saving(checkpoint)
            save(checkpoint, filepath, *more, **named)
            saved(os.fspath(filepath))

        def remove_checkpoint(filepath: Any) -> None:
            then = removed(os.fspath(filepath))
            remove(filepath)
            then()

        self._own = {"save_checkpoint": save_checkpoint, "remove_checkpoint": remove_checkpoint}
        self._before = {
            name: strategy.__dict__[name] for name in self._own if name in strategy.__dict__
        }
        strategy.__dict__.update(self._own)

    def undo(self) -> None:
        """Restore the strategy's methods, except those that other code has replaced since."""
        for name, own in self._own.items():
            if self._strategy.__dict__.get(name) is own:
                del self._strategy.__dict__[name]
                self._strategy.__dict__.update(
                    {name: self._before[name]} if name in self._before else {}
                )
