"""Publish previews in the background, on rank 0, without an error or a delay for the training."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from ..checkpoints.storage import Folder
from ..loops.background import AT_THE_END, Background, finish, pictures_of
from ..loops.collectives import on_rank_zero, raise_on_all_ranks
from ..loops.complaints import Complaints, Failure, warn_on_rank_zero
from ..loops.loop import Loop
from .publish import Preview, publish, try_out


class Publisher:
    """The folder and the trackers of the previews of one run.

    A thread of rank 0 writes and logs. Each kind of failure warns once, on the training thread.

    Args:
        folder: a path, or any URL that fsspec supports.
        loop: the training loop.
        who: name in the warnings.

    >>> publisher = Publisher("memory://alphabar-example/publisher", Loop())
    >>> publisher.try_out()
    >>> publisher.publish([])
    >>> publisher.finish(seconds=1.0)
    """

    def __init__(self, folder: str, loop: Loop, who: str = "Previews") -> None:
        self.folder, self.loop = folder, loop
        self._lane = pictures_of(loop.owner) if loop.owner is not None else Background()
        self._told: set[str] = set()
        # filled by the publishing thread: (step, failure)
        self._failed: list[tuple[int, Failure]] = []
        self._complaints = Complaints(who)

    def try_out(self) -> None:
        """Check the folder and the trackers before training. Every rank must call it.

        Raises:
            OSError: the folder cannot be written.
        """
        on_rank_zero(
            self.loop, lambda: self._note(0, try_out(self.folder, self.loop.trackers(), self._told))
        )
        self.complain("showing previews")

    def publish(self, previews: Sequence[Preview]) -> None:
        """Queue previews. Every rank must call it.

        If one place fails, the previews are still published to the other places.
        """
        on_rank_zero(self.loop, lambda: self._hand_over(previews))

    def _hand_over(self, previews: Sequence[Preview]) -> None:
        trackers = list(self.loop.trackers())
        for preview in previews:
            if self._lane.wait_for_room():
                self._lane.submit(
                    partial(self._show, preview, trackers), partial(self._lost, preview.step)
                )
            else:
                words = (
                    f"{self._lane.pending} others are still being published, "
                    "and none was finished for long"
                )
                self._lost(preview.step, TimeoutError(words))

    def write(self, name: str, text: str, step: int) -> None:
        """Queue a file of the folder. Every rank must call it."""
        folder = Folder.of(self.folder)
        on_rank_zero(
            self.loop,
            lambda: self._lane.submit(partial(folder.write, name, text), partial(self._lost, step)),
        )

    def _show(self, preview: Preview, trackers: Sequence[object]) -> None:
        self._note(preview.step, publish(preview, self.folder, trackers, self._told))

    def _lost(self, step: int, error: Exception) -> None:
        self._note(step, [Failure("its publication", error)])

    def _note(self, step: int, failures: Sequence[Failure]) -> None:
        self._failed += [(step, failure) for failure in failures]

    def complain(self, what: str | None = None) -> None:
        """Warn about background failures, on the training thread."""
        while self._failed:
            step, failure = self._failed.pop(0)
            self._complaints.tell(
                f"{what or f'publishing the preview at step {step}'} failed: {failure}",
                failure.kind,
            )

    def require_published(self) -> None:
        """Raise AgreedError on every rank if rank 0 could not publish. Every rank must call it."""
        finish(self.loop, self._lane, AT_THE_END)
        failed, self._failed = self._failed, []
        error = RuntimeError("; ".join(str(failure) for _, failure in failed)) if failed else None
        raise_on_all_ranks(error, self.loop.world_size)

    def finish(self, seconds: float) -> None:
        """Wait for pending previews on every rank. Every rank must call it."""
        finish(self.loop, self._lane, seconds)
        self.complain()
        if self._lane.pending:
            warn_on_rank_zero(
                f"{self._lane.pending} previews are still being published after {seconds:g} "
                "seconds; going on meanwhile"
            )

    def abandon(self, seconds: float) -> None:
        """Wait on this rank alone, after an error that other ranks may not have."""
        self._lane.wait(seconds)
        self.complain()

    def sum_up(self) -> None:
        """Warn with the counts of failures that occurred more than once."""
        self._complaints.sum_up()
