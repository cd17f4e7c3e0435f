"""Log an image to any logger that supports images: of Lightning, accelerate, or a SummaryWriter.

A logger is identified by the name of its class or of a base class, so no logger package is
imported. For other loggers, ``log_image`` (the Weights & Biases signature) is tried first, then
``add_image`` of the logger or of its ``experiment`` (the TensorBoard signature).

Thread safety: a background thread logs images, one at a time. The training thread logs numbers, as
Lightning does. TensorBoard and Weights & Biases put both into their own locked queues. The clients
of MLflow and LitLogger hold no state that a call changes. Comet's experiment supports several
threads. CSVLogger collects rows without a lock, and it takes no images.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ..images import to_pil


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
