"""Triggers of previews: every n steps, epochs or a time interval, extra steps, and the end."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

from lightning.pytorch import Trainer

from ...noising.utils.validation import whole_number


@dataclass(frozen=True)
class Triggers:
    """When to draw previews. Steps are optimizer steps.

    Give at most one of the first three arguments. If none is given, previews are drawn every epoch.

    Args:
        every_n_train_steps: interval in steps.
        every_n_epochs: interval in epochs.
        train_time_interval: interval in time.
        extra_steps: additional steps with a preview; 0 is before training.
        at_end: also draw a preview at the end of fit.

    Raises:
        ValueError: more than one interval, or an invalid value.

    >>> triggers = Triggers(every_n_train_steps=500, extra_steps=(1, 10, 100))
    >>> [step for step in range(1001) if triggers.at_step(step)]
    [1, 10, 100, 500, 1000]
    """

    every_n_train_steps: int | None = None
    every_n_epochs: int | None = None
    train_time_interval: timedelta | None = None
    extra_steps: tuple[int, ...] = ()
    at_end: bool = False

    def __post_init__(self) -> None:
        names = ("every_n_train_steps", "every_n_epochs", "train_time_interval")
        given = [
            f"{name}={getattr(self, name)}" for name in names if getattr(self, name) is not None
        ]
        if len(given) > 1:
            raise ValueError(
                f"previews follow time, steps or epochs, not both; got {' and '.join(given)}, "
                "leave one out"
            )
        if not given:
            object.__setattr__(self, "every_n_epochs", 1)
        for name in names[:2]:
            if getattr(self, name) is not None:
                object.__setattr__(self, name, at_least_one(name, getattr(self, name)))
        interval = self.train_time_interval
        if interval is not None and not (
            isinstance(interval, timedelta) and interval > timedelta(0)
        ):
            raise ValueError(
                "train_time_interval must be a timedelta above 0, e.g. timedelta(hours=1), got "
                f"{interval!r}"
            )
        object.__setattr__(self, "extra_steps", _steps(self.extra_steps))

    def at_step(self, step: int) -> bool:
        """Return whether the step triggers require a preview after optimizer step ``step``."""
        n = self.every_n_train_steps
        return step in self.extra_steps or (n is not None and step > 0 and step % n == 0)

    def at_epoch(self, epoch: int) -> bool:
        """Return whether a preview is due at the end of ``epoch``, counted from 0.

        >>> [epoch for epoch in range(6) if Triggers(every_n_epochs=2).at_epoch(epoch)]
        [1, 3, 5]
        """
        n = self.every_n_epochs
        return n is not None and (epoch + 1) % n == 0

    def at_time(self, trainer: Trainer, seconds: float) -> bool:
        """Return whether the time interval has passed on rank 0.

        Every rank must call it, because clocks differ between ranks.
        """
        interval = self.train_time_interval
        if interval is None:
            return False
        return bool(trainer.strategy.broadcast(seconds >= interval.total_seconds()))


def is_last_epoch(trainer: Trainer) -> bool:
    """Return whether fit stops after this epoch, as far as is known at the end of the epoch.

    Unlike ``fit_loop.done``, it changes no state.

    >>> from types import SimpleNamespace
    >>> is_last_epoch(
    ...     SimpleNamespace(
    ...         should_stop=False, max_steps=-1, max_epochs=3, global_step=9, current_epoch=2
    ...     )
    ... )
    True
    """
    by_steps = trainer.max_steps not in (None, -1) and trainer.global_step >= trainer.max_steps
    by_epochs = trainer.max_epochs not in (None, -1) and trainer.current_epoch + 1 >= int(
        trainer.max_epochs or 0
    )
    return trainer.should_stop or by_steps or by_epochs


def at_least_one(name: str, value: Any) -> int:
    """Return ``value``, or raise ValueError unless it is an integer of at least 1.

    >>> at_least_one("steps", 0)
    Traceback (most recent call last):
    ValueError: steps must be an integer of at least 1, got 0
    """
    return whole_number(name, value, least=1)


def _steps(steps: Sequence[int]) -> tuple[int, ...]:
    try:
        return tuple(whole_number("a step", step, least=0) for step in steps)
    except ValueError:
        raise ValueError(
            f"extra_steps must be optimizer steps, 0 (before training) or more, got {list(steps)}"
        ) from None
