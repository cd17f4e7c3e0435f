"""One call for every logger that can show an image; Lightning's Logger has none of its own.

A logger is known by the name of its class or of one that it inherits from, so that no logger's
package is imported. Others are asked for ``log_image`` as Weights & Biases has it, then for
``experiment.add_image`` as TensorBoard has it.

Images are shown on a thread beside the training, one after another; numbers are logged on the
thread that trains, as Lightning itself does. Of Lightning's loggers TensorBoard's and Weights &
Biases' put both into queues of their own, which are locked; MLflow's client and LitLogger's hold no
state that a call changes; Comet's experiment is made for several threads. CSVLogger, which gathers
rows without a lock, takes no images.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ...training.images import to_pil


@dataclass(frozen=True)
class Picture:
    """What a logger is shown: a grid, uint8 (height, width, 1 or 3), and for those that take them
    the images in it.

    ``path``: the grid's file on the local disk, for loggers that take files.
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
    """Show a uint8 image (height, width, 1 or 3) in a Lightning logger; return False where that
    logger takes no images.

    ``images`` are what the image is a grid of, with their ``captions``, and ``path`` is its file on
    the local disk: of these a logger gets what it can show. What a logger raises is raised.

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
    if callable(getattr(getattr(logger, "experiment", None), "add_image", None)):
        return _tensorboard(logger, picture)
    return False


def takes_images(logger: Any) -> bool:
    """Return whether a logger can be shown images, as far as it tells without one; what it raises
    is raised.

    >>> takes_images(object())
    False
    """
    kind = next((kind.__name__ for kind in type(logger).__mro__ if kind.__name__ in LOGGERS), None)
    if LOGGERS.get(kind or "") is _none:
        return False
    experiment = (
        getattr(logger, "experiment", None) if kind or not hasattr(logger, "log_image") else None
    )
    return kind is not None or callable(
        getattr(logger, "log_image", None) or getattr(experiment, "add_image", None)
    )


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


def _tensorboard(logger: Any, picture: Picture) -> bool:
    logger.experiment.add_image(
        picture.tag, picture.grid.cpu().numpy(), picture.step, dataformats="HWC"
    )
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
    if picture.path is None:  # it uploads in the background: a temporary file would be gone by then
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
}
"""How each of Lightning's loggers is shown a picture; a new one is a function and a line."""
