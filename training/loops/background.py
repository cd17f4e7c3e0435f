"""Background tasks: one queue and one thread, which exists only while there are tasks.

Work of one rank alone, such as writing images or calling a logger, must not delay its next
collective. Otherwise the other ranks wait there until the process group's timeout, and training
ends on all ranks. So rank 0 hands such work to a thread. A task owns its data: its tensors are
copies on the CPU. A task must not use the global generators, call a collective or change the model.

The thread ends when the queue is empty. So there is no idle thread when workers are forked or the
interpreter exits. It is a daemon thread: a logger that never returns does not keep the process
alive. If the thread is killed, each file is either complete or absent.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Any
from weakref import WeakKeyDictionary

from .collectives import Ranks, on_rank_zero

AT_THE_END = 300.0  # seconds to wait for pending tasks at the end of fit
BEFORE_A_CHECKPOINT = 60.0
AFTER_AN_ERROR = 10.0  # also after a signal: cluster schedulers kill soon after it
FOR_ROOM = 60.0  # seconds to wait for room in a full queue
_LOOK = 0.2

Task = Callable[[], object]


class Background:
    """A task queue and its thread. ``room`` counts pending tasks, including the running one.

    A task handles its own errors. An exception that leaves the task is passed to ``failed``.

    >>> lane = Background(room=2)
    >>> done = []
    >>> lane.submit(lambda: done.append("a"))
    >>> lane.submit(lambda: done.append("b"))
    >>> lane.wait(seconds=10), done
    (True, ['a', 'b'])
    """

    def __init__(self, room: int = 8) -> None:
        self.room = room
        self._tasks: deque[tuple[Task, Callable[[Exception], object]]] = deque()
        self._changed = threading.Condition()
        self._running = False
        self._thread: threading.Thread | None = None
        self._stuck: object = None  # first task of the queue when the last wait for room timed out

    def __reduce__(self) -> Any:
        return Background, (self.room,)  # tasks are not pickled

    @property
    def pending(self) -> int:
        """The number of unfinished tasks."""
        return len(self._tasks)

    def submit(
        self, task: Task, failed: Callable[[Exception], object] = lambda error: None
    ) -> None:
        """Add a task, also when the queue is full."""
        with self._changed:
            self._tasks.append((task, failed))
            if self._running:
                return
            self._running = True
        thread = threading.Thread(target=self._work, name="alphabar-background", daemon=True)
        try:
            thread.start()
        except RuntimeError:  # no thread can be started: run the tasks in this thread
            self._work()
        else:
            self._thread = thread

    def wait(self, seconds: float, left: int = 0) -> bool:
        """Wait until at most ``left`` tasks are unfinished; return False on a timeout.

        With ``left=0`` it also waits for the thread to end.

        Args:
            seconds: the timeout.
            left: number of unfinished tasks to wait for.

        Returns:
            True if at most ``left`` tasks are unfinished, False after a timeout.
        """
        deadline = time.monotonic() + seconds
        with self._changed:
            while len(self._tasks) > left:
                rest = deadline - time.monotonic()
                if rest <= 0:
                    return False
                self._changed.wait(min(rest, _LOOK))
        if left == 0 and self._thread is not None:
            self._thread.join(_LOOK)  # short: the thread returns after its last task
        return True

    def wait_for_room(self, seconds: float = FOR_ROOM) -> bool:
        """Wait up to ``seconds`` for room in the queue; return whether there is room.

        Does not wait if the previous wait timed out and the same task is still first.
        """
        head = self._tasks[0] if self._tasks else None
        if head is not None and head is self._stuck:
            seconds = 0.0
        found = self.wait(seconds, left=self.room - 1)
        self._stuck = None if found else head
        return found

    def _work(self) -> None:
        while True:
            with self._changed:
                if not self._tasks:
                    self._running = False
                    self._changed.notify_all()
                    return
                task, failed = self._tasks[0]
            try:
                task()
            except Exception as error:
                failed(error)
            with self._changed:
                self._tasks.popleft()
                self._changed.notify_all()


_PICTURES: WeakKeyDictionary[object, Background] = WeakKeyDictionary()


def pictures_of(owner: object) -> Background:
    """Return the publishing queue of a Trainer, or of another object that holds the loggers.

    All callbacks share it, so that no two threads call the same logger.
    """
    return _PICTURES.setdefault(owner, Background())


def finish(ranks: Ranks, lane: Background, seconds: float) -> None:
    """Wait on every rank until the queue of rank 0 is empty or ``seconds`` have passed.

    Every rank must call it. The ranks wait in ``patient_group``, not in the group of the training.
    """
    on_rank_zero(ranks, lambda: lane.wait(seconds))
