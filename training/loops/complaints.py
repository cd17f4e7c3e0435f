"""Warnings for background errors: the first error of each kind warns, later ones are counted."""

from __future__ import annotations

import errno
import warnings
from collections import Counter
from dataclasses import dataclass, field

import torch.distributed as dist


def warn_on_rank_zero(message: str) -> None:
    """Warn, if this process is rank 0 or the only one.

    >>> import warnings
    >>> with warnings.catch_warnings(record=True) as caught:
    ...     warn_on_rank_zero("the preview at step 5 finished no image")
    >>> str(caught[0].message)
    'the preview at step 5 finished no image'
    """
    if not dist.is_initialized() or dist.get_rank() == 0:
        warnings.warn(message, stacklevel=3)


@dataclass(frozen=True)
class Failure:
    """An error and its place, such as a file that was not written or a logger that failed.

    >>> failure = Failure("runs/previews", OSError(28, "No space left on device"))
    >>> str(failure), failure.kind
    ('runs/previews: OSError: [Errno 28] No space left on device', ('runs/previews', 'ENOSPC'))
    """

    place: str
    error: Exception

    @property
    def kind(self) -> tuple[str, str]:
        """(place, cause), without the step and the file name."""
        return self.place, _cause(self.error)

    def __str__(self) -> str:
        words = str(self.error)
        # an OSError whose message already names the place
        named = isinstance(self.error, OSError) and self.place in words
        return words if named else f"{self.place}: {type(self.error).__name__}: {words}"


@dataclass
class Complaints:
    """Warn about failures of ``who``, for one run on one rank.

    >>> import warnings
    >>> complaints = Complaints("EMA")
    >>> with warnings.catch_warnings(record=True) as caught:
    ...     warnings.simplefilter("always")
    ...     for step in (5, 10):
    ...         complaints.tell(
    ...             f"the snapshot at step {step} was not written: disk full",
    ...             ("runs/ema", "ENOSPC"),
    ...         )
    ...     complaints.sum_up()
    >>> [str(told.message) for told in caught][1]
    'EMA: 2 times in this run at runs/ema: ENOSPC'
    """

    who: str
    _counts: Counter[tuple[str, str]] = field(default_factory=Counter)

    def tell(self, message: str, kind: tuple[str, str]) -> None:
        """Count this kind of failure, and warn the first time."""
        self._counts[kind] += 1
        if self._counts[kind] == 1:
            warn_on_rank_zero(
                f"{message}; training goes on (more of this kind is counted, and told at the end)"
            )

    def sum_up(self) -> None:
        """Warn with the count of each kind that occurred more than once, and reset the counts."""
        for (place, cause), count in self._counts.items():
            if count > 1:
                warn_on_rank_zero(f"{self.who}: {count} times in this run at {place}: {cause}")
        self._counts.clear()


def _cause(error: BaseException) -> str:
    """Return the errno name of a system error, or the type name of the original error.

    An OSError without errno is a wrapper: its ``__cause__`` is used instead.
    """
    while isinstance(error, OSError) and error.errno is None and error.__cause__ is not None:
        error = error.__cause__
    number = getattr(error, "errno", None)
    return (
        errno.errorcode.get(number, str(number))
        if isinstance(number, int)
        else type(error).__name__
    )
