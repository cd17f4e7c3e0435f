"""Work beside the training: tasks one after another on one thread, which is there only as long as
there are any.

What one rank does alone, writing pictures or calling a logger, must not keep it from its next
collective: the other ranks wait there until the process group's timeout and all end. So rank 0
hands such work to a thread. What a task uses is its own: tensors are copies on the CPU, and nothing
in a task draws from the global generators, meets another rank or changes the model.

The thread ends when nothing is left to do, so that none is idle when workers are forked or the
interpreter ends. It is a daemon: a logger that never returns does not keep the process alive, and
files are whole or absent wherever it is cut off.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Any
from weakref import WeakKeyDictionary

from lightning.pytorch import Trainer

from .collectives import on_rank_zero

AT_THE_END = 300.0  # seconds that the end of fit waits for what is left to do
BEFORE_A_CHECKPOINT = 60.0
AFTER_AN_ERROR = 10.0  # or after a signal: schedulers kill soon after it
FOR_ROOM = 60.0  # seconds that a full queue is waited for
_LOOK = 0.2

Task = Callable[[], object]


class Background:
    """A queue with room for ``room`` tasks, the one that runs included, and the thread that works
    it off.

    A task handles its own errors; what it lets through goes to ``failed``.

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
        self._stuck: object = None  # the task that a wait for room was given up for

    def __reduce__(self) -> Any:
        return Background, (self.room,)  # tasks do not travel to other processes

    @property
    def pending(self) -> int:
        """How many tasks are not finished."""
        return len(self._tasks)

    def submit(
        self, task: Task, failed: Callable[[Exception], object] = lambda error: None
    ) -> None:
        """Add a task, whether there is room or not."""
        with self._changed:
            self._tasks.append((task, failed))
            if self._running:
                return
            self._running = True
        thread = threading.Thread(target=self._work, name="alphabar-background", daemon=True)
        try:
            thread.start()
        except RuntimeError:  # no thread can be started: here and now
            self._work()
        else:
            self._thread = thread

    def wait(
        self, seconds: float, interrupted: Callable[[], bool] = lambda: False, left: int = 0
    ) -> bool:
        """Wait until no more than ``left`` tasks are unfinished; return whether that was so in
        time.

        Where none is left, the thread has ended as well.
        """
        deadline = time.monotonic() + seconds
        with self._changed:
            while len(self._tasks) > left:
                rest = deadline - time.monotonic()
                if rest <= 0 or interrupted():
                    return False
                self._changed.wait(min(rest, _LOOK))
        if left == 0 and self._thread is not None:
            self._thread.join(_LOOK)  # after its last task it only returns
        return True

    def wait_for_room(
        self, seconds: float = FOR_ROOM, interrupted: Callable[[], bool] = lambda: False
    ) -> bool:
        """Return whether there is room, within ``seconds``; at once where an earlier wait was in
        vain and nothing moved since.
        """
        head = self._tasks[0] if self._tasks else None
        if head is not None and head is self._stuck:
            seconds = 0.0
        found = self.wait(seconds, interrupted, left=self.room - 1)
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


_PICTURES: WeakKeyDictionary[Trainer, Background] = WeakKeyDictionary()


def pictures_of(trainer: Trainer) -> Background:
    """Return where pictures of this trainer are published: one thread for all callbacks, so that no
    logger is called by two.
    """
    return _PICTURES.setdefault(trainer, Background())


def finish(trainer: Trainer, lane: Background, seconds: float) -> None:
    """Wait on every rank, patiently, until rank 0 has worked its lane off or ``seconds`` have
    passed; every rank must call it.
    """
    on_rank_zero(trainer, lambda: lane.wait(seconds))
