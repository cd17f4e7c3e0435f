"""The folder of one training run with its checkpoints, for plain and accelerate loops.

A checkpoint is one file, complete or absent. It holds the schedule, and nothing in it is unpickled.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from ...noising import NoiseSchedule
from ...noising.utils.atomic import write_atomically
from ..checkpoints.read import SCHEDULE_KEY, schedule_of

CHECKPOINTS = "checkpoint-*.pt"
LOG = "losses.jsonl"


class RunFolder:
    """A folder that holds one run: ``checkpoint-0000500.pt`` and ``losses.jsonl``.

    Args:
        path: the folder.
        results: names of what a finished run leaves.
        others: patterns of other files of a run, which a new one would take for its own.

    >>> import tempfile
    >>> run = RunFolder(tempfile.mkdtemp())
    >>> schedule = NoiseSchedule.flow()
    >>> for step in (1, 2, 3):
    ...     saved = run.save(step, {"weights": torch.zeros(2)}, schedule, keep=2)
    >>> [path.name for path in run.checkpoints]
    ['checkpoint-0000002.pt', 'checkpoint-0000003.pt']
    >>> run.load(run.find("latest"), schedule)["step"]
    3
    >>> run.require_unused()
    Traceback (most recent call last):
    ValueError: ... holds a run already (checkpoint-0000002.pt, checkpoint-0000003.pt); ...
    """

    def __init__(
        self, path: str | os.PathLike[str], results: Sequence[str] = (), others: Sequence[str] = ()
    ) -> None:
        self.path, self.results = Path(path), tuple(results)
        self.leftovers = (CHECKPOINTS, LOG, *others)

    @property
    def checkpoints(self) -> list[Path]:
        """The checkpoints, by step."""
        return sorted(self.path.glob(CHECKPOINTS))

    def require_unused(self, resume: str | None = None, overwrite: bool = False) -> None:
        """Refuse a folder that holds a run, unless it is resumed or to be overwritten.

        Args:
            resume: "latest", or the path of a checkpoint.
            overwrite: the run in the folder is to be replaced.

        Raises:
            ValueError: the folder holds another run, or both options are given.
        """
        if resume and overwrite:
            raise ValueError(
                "--resume_from_checkpoint goes on with a run, --overwrite_output_dir begins anew; "
                "give one of them"
            )
        patterns = (*self.leftovers, *self.results)
        found = [path.name for pattern in patterns for path in sorted(self.path.glob(pattern))]
        # of a run that was killed before its first checkpoint, there is nothing to lose
        finished = any((self.path / name).exists() for name in self.results)
        resumed = (
            bool(self.checkpoints or not finished)
            if resume == "latest"
            else resume is not None and Path(resume).resolve().parent == self.path.resolve()
        )
        if found and not overwrite and not resumed:
            raise ValueError(
                f"--output_dir {str(self.path)!r} holds a run already ({', '.join(found[:4])}); go "
                "on with it by --resume_from_checkpoint latest, give another folder, or replace it "
                "by --overwrite_output_dir"
            )

    def clear(self) -> None:
        """Remove what an earlier run left that a new one would take for its own."""
        for path in [path for pattern in self.leftovers for path in self.path.glob(pattern)]:
            shutil.rmtree(path) if path.is_dir() else path.unlink()

    def find(self, wanted: str | None) -> Path | None:
        """Return the checkpoint of this path, the last one for "latest", or None.

        Raises:
            FileNotFoundError: there is no file of this path.
        """
        if wanted == "latest":
            return max(self.checkpoints, default=None)
        if wanted is not None and not Path(wanted).is_file():
            raise FileNotFoundError(
                f"no checkpoint at {wanted!r}; there are {[str(p) for p in self.checkpoints]}"
            )
        return Path(wanted) if wanted is not None else None

    def save(
        self, step: int, parts: Mapping[str, Any], schedule: NoiseSchedule, keep: int = 0
    ) -> Path:
        """Write a checkpoint, drop older ones but for ``keep`` (0: all), and return its path.

        Args:
            step: the number of the step.
            parts: state dicts of tensors and plain values.
            schedule: the schedule of the training.
            keep: number of checkpoints that are kept.
        """
        path = self.path / f"checkpoint-{step:07d}.pt"
        partial = path.with_suffix(".partial")
        torch.save({"step": step, SCHEDULE_KEY: schedule.to_config(), **parts}, partial)
        os.replace(partial, path)
        mine = [old for old in self.checkpoints if old.name <= path.name]
        for old in mine[:-keep] if keep else []:
            old.unlink()
        return path

    def load(self, path: Path, schedule: NoiseSchedule, **same: Any) -> dict[str, Any]:
        """Return the parts of a checkpoint, with its "step".

        Args:
            path: the checkpoint.
            schedule: the schedule of this run.
            same: other parts that must be equal to those of this run, by their names.

        Raises:
            ValueError: the checkpoint was trained on another schedule, or with other parts.
        """
        parts = torch.load(path, map_location="cpu", weights_only=True)
        trained = schedule_of(parts, path)
        differing = {name: parts.get(name) for name, now in same.items() if parts.get(name) != now}
        if trained.fingerprint != schedule.fingerprint or differing:
            raise ValueError(
                f"{str(path)!r} was trained on {trained}{_listed(differing)}, and this run is on "
                f"{schedule}{_listed({name: same[name] for name in differing})}; give the flags of "
                "that run"
            )
        return parts

    def set_aside(self, step: int) -> list[Path]:
        """Rename the checkpoints of steps after ``step``, and drop their losses; return new names.

        A run that resumes from ``step`` trains those steps again.
        """
        log = self.path / LOG
        if log.is_file():  # a kill may leave a part of a line
            lines = [one for one in log.read_text("utf-8").splitlines() if one.endswith("}")]
            kept = [line for line in lines if json.loads(line)["step"] <= step]
            write_atomically(log, "".join(f"{line}\n" for line in kept))
        later = [path for path in self.checkpoints if path.name > f"checkpoint-{step:07d}.pt"]
        return [
            path.replace(path.with_name(path.name.replace("checkpoint", "replaced")))
            for path in later
        ]

    def log(self, step: int, **values: float) -> None:
        """Append a line to ``losses.jsonl``.

        >>> import tempfile
        >>> run = RunFolder(tempfile.mkdtemp())
        >>> run.log(1, loss=0.5)
        >>> (run.path / "losses.jsonl").read_text()
        '{"step": 1, "loss": 0.5}\\n'
        """
        with open(self.path / LOG, "a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step, **values}) + "\n")


def _listed(values: Mapping[str, Any]) -> str:
    return "".join(f", {name}={value}" for name, value in values.items())
