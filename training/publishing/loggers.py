"""Log an image to any logger that supports images: of Lightning, accelerate, or a SummaryWriter.

Videos and sounds go to TensorBoard and Weights & Biases; other loggers get an image of them.

A logger is identified by the name of its class or of a base class, so no logger package is
imported. For other loggers, ``log_image`` (the Weights & Biases signature) is tried first, then
``add_image`` of the logger or of its ``experiment`` (the TensorBoard signature).

Thread safety: a background thread logs images, one at a time. The training thread logs numbers, as
Lightning does. TensorBoard and Weights & Biases put both into their own locked queues. The clients
of MLflow and LitLogger hold no state that a call changes. Comet's experiment supports several
threads. CSVLogger collects rows without a lock, and it takes no images.
"""

from __future__ import annotations

import io
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from typing import Any

from torch import Tensor

from ..images import to_pil
from ..media.videos import animation_bytes


@dataclass(frozen=True)
class Picture:
    """An image grid to log.

    Args:
        tag: name of the image in the logger.
        grid: uint8 (height, width, 1 or 3).
        step: optimizer step.
        images: the single images of the grid, for loggers that take several images.
        captions: one caption for each of ``images``.
        path: the grid's file on the local disk, for loggers that take files.
    """

    tag: str
    grid: Tensor
    step: int
    images: Sequence[Tensor] = ()
    captions: Sequence[str] = ()
    path: str | None = None


def log_image(
    logger: Any,
    tag: str,
    image: Tensor,
    step: int,
    images: Sequence[Tensor] = (),
    captions: Sequence[str] = (),
    path: str | os.PathLike[str] | None = None,
) -> bool:
    """Log an image to a logger; return False if the logger takes no images.

    Each logger gets the arguments that it supports. Errors of the logger are raised unchanged.

    Args:
        logger: a logger of Lightning, a tracker of accelerate, or a SummaryWriter.
        tag: name of the image in the logger.
        image: uint8 (height, width, 1 or 3).
        step: optimizer step.
        images: the single images, if ``image`` is a grid.
        captions: one caption for each of ``images``.
        path: the file of ``image`` on the local disk.

    Returns:
        True if the logger took the image.

    >>> import torch
    >>> class Album:
    ...     def log_image(self, key, images, step):
    ...         print(key, images[0].size, step)
    >>> log_image(Album(), "previews", torch.zeros(2, 4, 3, dtype=torch.uint8), step=5)
    previews (4, 2) 5
    True
    >>> log_image(object(), "previews", torch.zeros(2, 4, 3, dtype=torch.uint8), step=5)
    False
    """
    picture = Picture(
        tag, image, step, images, captions, os.fspath(path) if path is not None else None
    )
    for kind in type(logger).__mro__:
        if kind.__name__ in LOGGERS:
            return LOGGERS[kind.__name__](logger, picture)
    if callable(getattr(logger, "log_image", None)):
        return _album(logger, picture)
    for writer in (logger, getattr(logger, "experiment", None)):
        if callable(getattr(writer, "add_image", None)):
            return _writer(writer, picture)
    return False


@dataclass(frozen=True)
class Recording:
    """Videos or sounds to log.

    Args:
        tag: name in the logger.
        step: optimizer step.
        parts: videos, uint8 (frames, height, width, 1 or 3), or sounds, int16 (channels, length).
        rate: frames or samples in a second.
        captions: one for each of ``parts``.
        grid: all videos side by side; None for sounds.
        paths: files of the sounds on the local disk, if there are any.
    """

    tag: str
    step: int
    parts: Sequence[Tensor]
    rate: float
    captions: Sequence[str]
    grid: Tensor | None = None
    paths: Sequence[str] = ()


def log_recording(logger: Any, recording: Recording) -> bool:
    """Log videos or sounds to a logger; return False if it cannot play them.

    TensorBoard plays videos if moviepy is installed. Errors of the logger are raised unchanged.

    >>> import torch
    >>> clip = torch.zeros(2, 8, 8, 3, dtype=torch.uint8)
    >>> log_recording(object(), Recording("previews", 5, [clip], 8.0, [""], grid=clip))
    False
    """
    for kind in type(logger).__mro__:
        if kind.__name__ in PLAYERS:
            return PLAYERS[kind.__name__](logger, recording)
    for writer in (logger, getattr(logger, "experiment", None)):
        if callable(getattr(writer, "add_video", None)):
            return _play_in_tensorboard(writer, recording)
    return False


def _play_in_tensorboard(writer: Any, recording: Recording) -> bool:
    tag, step = recording.tag, recording.step
    if recording.grid is None:
        for index, sound in enumerate(recording.parts):
            mono = sound.float().mean(0, keepdim=True) / 2**15
            writer.add_audio(f"{tag}/{index}", mono, step, sample_rate=int(recording.rate))
        return True
    if find_spec("moviepy") is None:  # add_video would print and drop the video
        return False
    frames = recording.grid.permute(0, 3, 1, 2).expand(-1, 3, -1, -1)
    writer.add_video(tag, frames[None], step, fps=recording.rate)
    return True


def _play_in_wandb(logger: Any, recording: Recording) -> bool:
    count, captions = len(recording.parts), list(recording.captions)
    common = {"key": recording.tag, "step": recording.step, "caption": captions}
    if recording.grid is not None:
        logger.log_video(videos=_gifs(recording), format=["gif"] * count, **common)
        return True
    sounds = list(recording.paths) or [sound.T.numpy() for sound in recording.parts]
    logger.log_audio(audios=sounds, sample_rate=[int(recording.rate)] * count, **common)
    return True


def _play_in_wandb_tracker(tracker: Any, recording: Recording) -> bool:
    if recording.grid is None:
        return False
    wandb: Any = import_module("wandb")
    each = zip(_gifs(recording), recording.captions, strict=True)
    videos = [wandb.Video(gif, caption=caption, format="gif") for gif, caption in each]
    tracker.run.log({recording.tag: videos}, commit=False)  # as _wandb_tracker
    return True


def _gifs(recording: Recording) -> list[io.BytesIO]:
    """Return the videos as files in memory: of arrays, Weights & Biases needs moviepy."""
    return [io.BytesIO(animation_bytes(v, recording.rate, "gif")) for v in recording.parts]


PLAYERS: Mapping[str, Callable[[Any, Recording], bool]] = {
    "WandbLogger": _play_in_wandb,
    "TensorBoardLogger": lambda logger, r: _play_in_tensorboard(logger.experiment, r),
    "TensorBoardTracker": lambda tracker, r: _play_in_tensorboard(tracker.writer, r),
    "WandBTracker": _play_in_wandb_tracker,
}
"""Function of each logger that plays videos or sounds; others show images of them."""


def takes_images(logger: Any) -> bool:
    """Return whether a logger takes images, as far as this is known without logging one.

    Errors of the logger are raised unchanged.

    >>> takes_images(object())
    False
    """
    kind = next((kind.__name__ for kind in type(logger).__mro__ if kind.__name__ in LOGGERS), None)
    if LOGGERS.get(kind or "") is _none:
        return False
    own = getattr(logger, "log_image", None) or getattr(logger, "add_image", None)
    experiment = getattr(logger, "experiment", None) if kind or own is None else None
    return kind is not None or callable(own or getattr(experiment, "add_image", None))


def _wandb(logger: Any, picture: Picture) -> bool:
    if not picture.images:
        return _album(logger, picture)
    images = [to_pil(image) for image in picture.images]
    logger.log_image(
        key=picture.tag, images=images, step=picture.step, caption=list(picture.captions)
    )
    return True


def _album(logger: Any, picture: Picture) -> bool:
    logger.log_image(key=picture.tag, images=[to_pil(picture.grid)], step=picture.step)
    return True


def _writer(writer: Any, picture: Picture) -> bool:
    writer.add_image(picture.tag, picture.grid.cpu().numpy(), picture.step, dataformats="HWC")
    return True


def _tensorboard(logger: Any, picture: Picture) -> bool:
    return _writer(logger.experiment, picture)


def _tensorboard_tracker(tracker: Any, picture: Picture) -> bool:
    return _writer(tracker.writer, picture)


def _wandb_tracker(tracker: Any, picture: Picture) -> bool:
    images = [to_pil(image) for image in picture.images or [picture.grid]]
    # without the step: the training has logged later steps meanwhile, and Weights & Biases drops
    # what goes back; so the images join the row that the training logs next
    tracker.log_images({picture.tag: images}, commit=False)
    return True


def _comet_tracker(tracker: Any, picture: Picture) -> bool:
    tracker.writer.log_image(to_pil(picture.grid), name=picture.tag, step=picture.step)
    return True


def _aim_tracker(tracker: Any, picture: Picture) -> bool:
    tracker.log_images({picture.tag: to_pil(picture.grid)}, step=picture.step)
    return True


def _clearml_tracker(tracker: Any, picture: Picture) -> bool:
    tracker.log_images({picture.tag: picture.grid.cpu().numpy()}, step=picture.step)
    return True


def _mlflow_tracker(tracker: Any, picture: Picture) -> bool:
    if picture.path is None:
        return False
    tracker.log_artifact(picture.path, picture.tag)
    return True


def _mlflow(logger: Any, picture: Picture) -> bool:
    logger.experiment.log_image(
        logger.run_id, to_pil(picture.grid), key=picture.tag, step=picture.step
    )
    return True


def _comet(logger: Any, picture: Picture) -> bool:
    logger.experiment.log_image(to_pil(picture.grid), name=picture.tag, step=picture.step)
    return True


def _file(logger: Any, picture: Picture) -> bool:
    if picture.path is None:  # no temporary file: the upload runs later, in the background
        return False
    logger.log_file(picture.path)
    return True


def _none(logger: Any, picture: Picture) -> bool:
    return False


LOGGERS: Mapping[str, Callable[[Any, Picture], bool]] = {
    "WandbLogger": _wandb,
    "TensorBoardLogger": _tensorboard,
    "MLFlowLogger": _mlflow,
    "CometLogger": _comet,
    "LitLogger": _file,
    "CSVLogger": _none,
    "TensorBoardTracker": _tensorboard_tracker,
    "WandBTracker": _wandb_tracker,
    "CometMLTracker": _comet_tracker,
    "AimTracker": _aim_tracker,
    "ClearMLTracker": _clearml_tracker,
    "MLflowTracker": _mlflow_tracker,
}
"""Image function of each logger of Lightning and each tracker of accelerate.

To add a logger, add a function and an entry here.
"""
