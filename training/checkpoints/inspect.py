"""Find out how a model was trained: read every place that tools look at, and compare them.

Weights are never loaded. Of safetensors files only the header is read; checkpoints are
memory-mapped with ``weights_only=True``.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from ...noising import NoiseSchedule
from ..interfaces import described, interface_settings
from .claims import (
    Claim,
    statements_beside,
    statements_of_checkpoint,
    statements_of_folder,
    statements_of_safetensors,
)
from .read import SHARDED_NAME
from .safetensors import MARKERS, is_safetensors, read_header


@dataclass(frozen=True)
class Inspection:
    """Result of :func:`inspect_path`; ``str()`` is the report that ``alphabar inspect`` prints.

    Args:
        path: the path that was inspected.
        kind: what the path is.
        statements: all claims found.
        missing: what is missing, as text.
        contradictions: which claims contradict each other, as text.
    """

    path: str
    kind: str
    statements: tuple[Claim, ...]
    missing: tuple[str, ...]
    contradictions: tuple[str, ...]

    @property
    def schedule(self) -> NoiseSchedule | None:
        """The whole schedule, or None if no source has it or if claims contradict each other."""
        found = [s.schedule for s in self.statements if s.schedule is not None]
        return found[0] if found and not self.contradictions else None

    @property
    def prediction(self) -> str | None:
        """The prediction type's name, or None if no claim has it or if claims disagree."""
        return _only(s.prediction for s in self.statements)

    @property
    def zero_terminal_snr(self) -> bool | None:
        """Whether the discrete schedule ends in pure noise, or None as for :attr:`prediction`."""
        return _only(s.zero_terminal_snr for s in self.statements)

    @property
    def settings(self) -> dict[str, str]:
        """What to choose in each tool to sample as the model was trained; empty if not known."""
        return {} if self.schedule is None else interface_settings(self.schedule)

    def __str__(self) -> str:
        width = max((len(s.source) for s in self.statements), default=0)
        lines = [f"{self.path}: {self.kind}", f"trained with: {self._conclusion()}"]
        for title, items in (
            ("says", [f"{s.source:<{width}}  {s}" for s in self.statements]),
            ("missing", self.missing),
            ("contradicts", self.contradictions),
            *([("sample with", [*described(self.settings)])] if self.settings else []),
        ):
            lines += (
                [f"{title}:", *(f"  {item}" for item in items)] if items else [f"{title}: nothing"]
            )
        return "\n".join(lines)

    def _conclusion(self) -> str:
        if self.contradictions:
            return "not known, what is said contradicts itself"
        if self.schedule is not None:
            return str(self.schedule)
        snr = {True: ", zero terminal SNR", False: ", no zero terminal SNR", None: ""}[
            self.zero_terminal_snr
        ]
        return (
            f"{self.prediction}{snr}, on a schedule that is not said"
            if self.prediction
            else f"not known{snr}"
        )


def inspect_path(path: str | os.PathLike[str]) -> Inspection:
    """Return how a model file or folder was trained, according to its own data.

    Files and folders beside it are read too.

    Args:
        path: a ``.safetensors`` file, a checkpoint (``.ckpt``, ``.pt`` or a sharded one), a folder
            with a ``scheduler_config.json`` or a ``noise_schedule.json``, or a diffusers pipeline.

    Raises:
        FileNotFoundError: the path does not exist.
        ValueError: the path cannot be read.

    >>> import tempfile
    >>> folder = NoiseSchedule.flow(shift=3.0).save_pretrained(tempfile.mkdtemp())
    >>> inspection = inspect_path(folder)
    >>> inspection.prediction, inspection.missing, inspection.contradictions
    ('flow_prediction', (), ())
    """
    place = Path(path)
    if not place.exists():
        raise FileNotFoundError(f"nothing at {str(path)!r} to inspect")
    kind, statements, notes = _kind_of(place)(place)
    contradictions = [note for note in (s.problem for s in statements) if note]
    contradictions += _disagreements(statements)
    missing = [
        *notes(statements),
        *(text for s in statements for text in s.told),
        *_general(statements),
    ]
    return Inspection(str(path), kind, tuple(statements), tuple(missing), tuple(contradictions))


_T = TypeVar("_T")
_Notes = Callable[[Sequence[Claim]], list[str]]
_Read = tuple[str, list[Claim], _Notes]


def _kind_of(path: Path) -> Callable[[Path], _Read]:
    if path.is_dir():
        return _checkpoint if (path / SHARDED_NAME).is_file() else _folder
    return _safetensors if is_safetensors(path) else _checkpoint


def _safetensors(path: Path) -> _Read:
    header = read_header(path)
    layout = (
        "named as ComfyUI, Forge and A1111 read them"
        if header.for_interfaces
        else "not in one of their layouts"
    )
    found = [*statements_of_safetensors(header), *statements_beside(path)]

    def notes(statements: Sequence[Claim]) -> list[str]:
        missing = []
        v = "v_prediction" in (s.prediction for s in statements)
        zero = True in (s.zero_terminal_snr for s in statements)
        if header.for_interfaces and v and MARKERS[0] not in header.tensors:
            missing.append(
                "tensor v_pred: ComfyUI, Forge and A1111 take the model for epsilon; write_markers "
                "adds it"
            )
        if header.for_interfaces and v and zero and MARKERS[1] not in header.tensors:
            missing.append(
                "tensor ztsnr: they do not sample from pure noise, the last level; write_markers "
                "adds it"
            )
        if header.for_interfaces and zero and not v and MARKERS[1] in header.tensors:
            missing.append("tensor v_pred beside ztsnr: ComfyUI reads ztsnr only there")
        return missing

    return f"a safetensors file of {len(header.tensors)} tensors, {layout}", found, notes


def _checkpoint(path: Path) -> _Read:
    found = [*statements_of_checkpoint(path), *statements_beside(path)]
    kind = "the folder of a sharded checkpoint" if path.is_dir() else "a checkpoint"

    def notes(statements: Sequence[Claim]) -> list[str]:
        embedded = any(s.schedule is not None and not s.beside for s in statements)
        beside = any(s.schedule is not None and s.beside for s in statements)
        alone = (
            "embedded schedule: without the files beside it, this one does not say what it was "
            "trained with"
        )
        return [alone] if beside and not embedded else []

    return kind, found, notes


def _folder(path: Path) -> _Read:
    pipeline = (path / "model_index.json").is_file()
    place = path / "scheduler" if (path / "scheduler").is_dir() else path
    found, left_out = statements_of_folder(place, path)
    if not found and not pipeline:
        raise ValueError(
            f"{str(path)!r} holds nothing that says a noise schedule: no model_index.json, no "
            "scheduler_config.json and no "
            f"noise_schedule.json, neither in it nor in {str(path / 'scheduler')!r}; name a file "
            "in it"
        )
    kind = "a diffusers pipeline" if pipeline else "a folder with a noise schedule"
    return kind, found, lambda _: left_out


def _general(statements: Sequence[Claim]) -> list[str]:
    if not statements:
        return ["everything: neither prediction type nor schedule is said, and tools will guess"]
    missing = []
    if all(s.prediction is None for s in statements):
        missing.append("prediction type: tools will guess, most of them epsilon")
    if all(s.schedule is None for s in statements):
        missing.append(
            "schedule: nothing says the betas, or the shift; ScheduleCheckpoint and write_markers "
            "say them"
        )
    return missing


def _disagreements(statements: Sequence[Claim]) -> list[str]:
    aspects: list[tuple[str, Callable[[Claim], object]]] = [
        ("prediction type", lambda s: s.prediction),
        ("zero terminal SNR", lambda s: s.zero_terminal_snr),
        ("schedule", lambda s: s.schedule.fingerprint[:12] if s.schedule is not None else None),
    ]
    found = []
    for name, said in aspects:
        sources: dict[object, list[str]] = {}
        for statement in statements:
            if said(statement) is not None:
                sources.setdefault(said(statement), []).append(statement.source)
        if len(sources) > 1:
            sides = [f"{_word(value)} ({', '.join(where)})" for value, where in sources.items()]
            found.append(f"{name}: {' against '.join(sides)}")
    return found


def _word(value: object) -> str:
    return (
        {True: "yes", False: "no"}.get(value, str(value)) if isinstance(value, bool) else str(value)
    )


def _only(values: Iterable[_T | None]) -> _T | None:
    said = {value for value in values if value is not None}
    return said.pop() if len(said) == 1 else None
