"""Where the pictures of a preview go: files, a page that shows them side by side, and every logger
that takes images.

Under the folder: ``step_00000500.png`` (``step_00000500_ema.png``), all images in one;
``images/step_00000500/`` ``raw_0003_seed_7.png``, image 3 of it, from seed 7; a line for each image
in ``previews.jsonl``; ``index.html``.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor

from ...training.checkpoints.storage import Folder
from ...training.images import image_grid, png_bytes
from ..support.complaints import Failure
from ..support.loggers import log_image, takes_images
from .html import PAGE_NAME, RECORDS_NAME, read_records, render


@dataclass(frozen=True)
class Preview:
    """The images of one preview, uint8 (n, channels, height, width), one or three channels, and how
    they were made.

    ``weights``: 'raw' or 'ema'. ``captions``: prompts, empty where there is none. ``sampler``,
    ``steps``, ``guidance_scale``: how it was sampled, in ``seconds``; ``fingerprint``: of the noise
    schedule. ``note``: what else there is to say, or ''. Raises ValueError unless there is a seed
    and a caption for each image.

    >>> import torch
    >>> images = torch.zeros(2, 3, 8, 8, dtype=torch.uint8)
    >>> preview = Preview(
    ...     500, 1, "raw", images, (0, 1), ("", ""), "dpmpp_2m", 20, 1.0, "ab12", 0.5, ""
    ... )
    >>> preview.grid_name, preview.image_names[1]
    ('step_00000500.png', 'images/step_00000500/raw_0001_seed_1.png')
    """

    step: int
    epoch: int
    weights: str
    images: Tensor
    seeds: tuple[int, ...]
    captions: tuple[str, ...]
    sampler: str
    steps: int | None
    guidance_scale: float
    fingerprint: str
    seconds: float
    note: str

    def __post_init__(self) -> None:
        if not len(self.images) == len(self.seeds) == len(self.captions):
            numbers = (
                f"{len(self.images)} images, {len(self.seeds)} seeds and "
                f"{len(self.captions)} captions"
            )
            raise ValueError(f"a preview has a seed and a caption for each image, got {numbers}")

    @property
    def grid_name(self) -> str:
        """The file of all images in one."""
        return f"step_{self.step:08d}{self.suffix}.png"

    @property
    def image_names(self) -> list[str]:
        """The files of the images, in order; the number tells images of one seed apart."""
        folder = f"images/step_{self.step:08d}"
        return [
            f"{folder}/{self.weights}_{i:04d}_seed_{seed}.png" for i, seed in enumerate(self.seeds)
        ]

    @property
    def suffix(self) -> str:
        """What is added to names where the weights are not those of training."""
        return "" if self.weights == "raw" else f"_{self.weights}"

    def records(self) -> list[dict[str, Any]]:
        """Return what is known of each image as plain JSON; NaN and infinity become None."""
        shared = {
            "step": self.step,
            "epoch": self.epoch,
            "weights": self.weights,
            "grid": self.grid_name,
            "sampler": self.sampler,
            "steps": self.steps,
            "guidance_scale": _finite(self.guidance_scale),
            "schedule": self.fingerprint,
            "seconds": _finite(self.seconds),
            "note": self.note,
        }
        each = zip(self.image_names, self.seeds, self.captions, strict=True)
        return [
            {"image": image, "index": index, "seed": seed, "prompt": caption} | shared
            for index, (image, seed, caption) in enumerate(each)
        ]


def publish(preview: Preview, folder: str, loggers: Sequence[Any], told: set[str]) -> list[Failure]:
    """Write a preview under ``folder`` (a path or any URL that fsspec knows) and show it in
    ``loggers``.

    Returns what failed; a place that fails does not keep the picture from the others. ``told``
    remembers the loggers of which it was said that they take no images. For rank 0 alone; on any
    thread, one at a time.

    >>> import tempfile, torch
    >>> images = torch.zeros(1, 3, 8, 8, dtype=torch.uint8)
    >>> preview = Preview(
    ...     500, 1, "raw", images, (0,), ("a cat",), "dpmpp_2m", 20, 1.0, "ab12", 0.5, ""
    ... )
    >>> publish(preview, "memory://alphabar-example/previews", loggers=[], told=set())
    []
    """
    place, images = Folder(folder), preview.images.cpu()
    grid = image_grid(images)
    singles = [image.permute(1, 2, 0).contiguous() for image in images]
    failed: list[Failure] = []

    def attempt(act: Callable[[], object]) -> None:
        try:
            act()
        # a store may raise anything, and the other places still get the images
        except Exception as error:
            found = Failure(folder, error)
            failed.extend([found] if str(found) not in map(str, failed) else [])

    attempt(lambda: place.write(preview.grid_name, png_bytes(grid)))
    attempt(lambda: _write_images(place, preview, singles))
    attempt(
        lambda: place.append(
            RECORDS_NAME, "".join(f"{json.dumps(record)}\n" for record in preview.records())
        )
    )
    attempt(
        lambda: place.write(
            PAGE_NAME, render(read_records(place.read(RECORDS_NAME) or b""), place.name)
        )
    )
    local = place.local if not failed else None
    for logger in loggers:
        name = type(logger).__name__
        try:
            path = local / preview.grid_name if local is not None else None
            tag = place.name + preview.suffix
            if (
                not log_image(logger, tag, grid, preview.step, singles, _captions(preview), path)
                and name not in told
            ):
                told.add(name)
                rank_zero_warn(f"{name} takes no images; previews are in {folder!r} alone")
        except Exception as error:
            failed.append(Failure(name, error))
    return failed


def try_out(folder: str, loggers: Sequence[Any], told: set[str]) -> list[Failure]:
    """Try what publishing needs, before training: the folder, the page of what is in it, and
    loggers that take images.

    Raises OSError for a folder that cannot be written. Says of which loggers there will be no
    images, and returns what failed of the others. A logger's own experiment is made here, on the
    thread that trains. For rank 0 alone.
    """
    place = Folder(folder)
    place.require_writable()
    render(read_records(place.read(RECORDS_NAME) or b""), place.name)
    failed: list[Failure] = []
    for logger in loggers:
        name = type(logger).__name__
        try:
            if not takes_images(logger) and name not in told:
                told.add(name)
                rank_zero_warn(f"{name} takes no images; previews are in {folder!r} alone")
        except Exception as error:
            failed.append(Failure(name, error))
    return failed


def _write_images(place: Folder, preview: Preview, singles: Sequence[Tensor]) -> None:
    for name, image in zip(preview.image_names, singles, strict=True):
        place.write(name, png_bytes(image))


def _captions(preview: Preview) -> list[str]:
    each = zip(preview.captions, preview.seeds, strict=True)
    return [f"{caption} (seed {seed})" if caption else f"seed {seed}" for caption, seed in each]


def _finite(number: float) -> float | None:
    return float(number) if math.isfinite(number) else None
