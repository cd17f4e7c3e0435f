"""Start a script as the two ranks of one run, on this machine's loopback, and wait for both."""

from __future__ import annotations

import os
import runpy
import socket
import sys
from multiprocessing import connection, get_context
from pathlib import Path

import numpy as np

PRELOADED = [
    "lightning.pytorch.callbacks",
    "lightning.pytorch.loggers",
    "torch.distributed.fsdp",
    "torch.distributed.checkpoint.state_dict",
    "torch.utils.tensorboard",
    "accelerate",
    "alphabar.callbacks",
    "alphabar.training.module",
    "alphabar.training.previews.previews",
]
"""What most scripts import, which takes seconds: once in the process that ranks are forked from."""


def run_two_ranks(
    script: Path, root: Path, *arguments: str, nodes: bool = False, timeout: float = 240
) -> list[int]:
    """Return the exit codes of ``script root arguments...`` as ranks 0 and 1; ``nodes``: each on a
    node of its own.

    What they print is in ``root/rank0.log`` and ``root/rank1.log``. None of them outlives the call.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = {**os.environ, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    context = get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    running = []
    for rank, log in enumerate(logs_of(root)):
        place = (
            {"NODE_RANK": str(rank), "LOCAL_RANK": "0"}
            if nodes
            else {"NODE_RANK": "0", "LOCAL_RANK": str(rank)}
        )
        command = [str(script), str(root), *arguments]
        process = context.Process(target=_run, args=(command, common | place, str(log)))
        process.start()
        running.append(process)
    try:
        waiting = {process.sentinel for process in running}
        while waiting and (ended := connection.wait(list(waiting), timeout=timeout)):
            waiting -= {*ended}
        if waiting:
            raise TimeoutError(f"a rank has not ended in {timeout} s:\n{last_words(root)}")
        return [process.exitcode or 0 for process in running]
    finally:
        for process in running:
            process.kill()
            process.join()


def _run(command: list[str], environment: dict[str, str], log: str) -> None:
    """Be what ``python command...`` is, with its output in ``log``."""
    out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(out, 1)
    os.dup2(out, 2)
    os.environ.clear()
    os.environ.update(environment)
    np.random.seed()  # not that of the process they are forked from, the same on both
    sys.argv = command
    sys.path.insert(0, str(Path(command[0]).parent))
    runpy.run_path(command[0], run_name="__main__")


def logs_of(root: Path) -> list[Path]:
    return [root / f"rank{rank}.log" for rank in range(2)]


def last_words(root: Path) -> str:
    """Return the end of what both printed, for the message of an assertion."""
    return "\n".join(log.read_text()[-3000:] for log in logs_of(root))
