"""Following a strategy as it saves and removes checkpoints: Lightning has no hook that knows the
path.

Every save comes through the strategy, weights-only and sharded ones and those that a user asks for
among them; a link (``save_last="link"``) does not, and needs nothing, because it is followed on
reading.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any


class SavesFollowed:
    """Call ``saving(checkpoint)`` before a strategy saves, ``saved(path)`` after, ``removed(path)``
    around a removal.

    ``removed`` is called before, while the checkpoint is there, and returns what is to be done when
    it is gone. All are called on every rank. ``undo`` gives the strategy its own methods back.

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
        """Give the methods back; one that somebody else replaced since is left to them."""
        for name, own in self._own.items():
            if self._strategy.__dict__.get(name) is own:
                del self._strategy.__dict__[name]
                self._strategy.__dict__.update(
                    {name: self._before[name]} if name in self._before else {}
                )
