"""Start a script as the two ranks of one run, on this machine's loopback, and wait for both."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path


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
    running = []
    for rank, log in enumerate(logs_of(root)):
        place = (
            {"NODE_RANK": str(rank), "LOCAL_RANK": "0"}
            if nodes
            else {"NODE_RANK": "0", "LOCAL_RANK": str(rank)}
        )
        with log.open("w") as out:
            command = [sys.executable, str(script), str(root), *arguments]
            running.append(
                subprocess.Popen(
                    command, env={**common, **place}, stdout=out, stderr=subprocess.STDOUT
                )
            )
    try:
        return [process.wait(timeout=timeout) for process in running]
    finally:
        for process in running:
            process.kill()


def logs_of(root: Path) -> list[Path]:
    return [root / f"rank{rank}.log" for rank in range(2)]


def last_words(root: Path) -> str:
    """Return the end of what both printed, for the message of an assertion."""
    return "\n".join(log.read_text()[-3000:] for log in logs_of(root))
