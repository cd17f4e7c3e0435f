"""Publish a figure: to a file and to the loggers, by the background thread of rank 0."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from ...noising.utils.atomic import write_atomically
from ..loops.background import Background
from .loggers import log_image


def publish_figure(
    lane: Background,
    png: bytes,
    tag: str,
    step: int,
    loggers: Sequence[Any],
    failed: Callable[[Exception], object],
    path: Path | None = None,
) -> None:
    """Hand a figure to the publishing queue. Call it on rank 0 alone.

    Args:
        lane: the queue, see ``pictures_of``.
        png: the figure as a PNG file.
        tag: name of the image in the loggers.
        step: optimizer step.
        loggers: loggers of Lightning, trackers of accelerate, or SummaryWriters.
        failed: called with each error, on the thread of the queue.
        path: the file to write.

    Raises:
        TimeoutError: the queue is full. The next figure shows as much as this one.

    >>> import tempfile
    >>> from alphabar.training.plots.figure import new_figure, png_of
    >>> lane, path = Background(), Path(tempfile.mkdtemp(), "figure.png")
    >>> publish_figure(lane, png_of(new_figure(1, 1)), "figure", 5, [], print, path)
    >>> lane.wait(10), path.is_file()
    (True, True)
    """
    if lane.pending >= lane.room:
        raise TimeoutError("publishing lags behind, so that the plot is left out")
    image = torch.from_numpy(np.array(Image.open(io.BytesIO(png)).convert("RGB")))
    acts: list[Callable[[], object]] = []
    if path is not None:
        acts.append(partial(write_atomically, path, png))
    acts += [partial(log_image, logger, tag, image, step) for logger in loggers]

    def publish() -> None:
        for act in acts:
            try:
                act()
            except Exception as error:
                failed(error)

    lane.submit(publish)
