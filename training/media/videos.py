"""Videos: samples to frames, frames to files that move and to a sheet that does not."""

from __future__ import annotations

import io
import math
import tempfile
from collections.abc import Callable, Mapping
from importlib import import_module
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...noising.utils.registry import lookup
from ..images import image_grid, to_pil, to_pixels

SHEET_FRAMES = 8  # of a video on its sheet
GIF_TICKS = 100  # per second; GIF counts time in them
GIF_SHORTEST = 2  # ticks of a frame; players show shorter frames for much longer


def video_pixels(samples: Tensor) -> Tensor:
    """Convert samples (n, channels, frames, height, width) to uint8 (n, 1 or 3, frames, ...).

    As ``to_pixels`` does; latents are scaled from the range of a whole video.

    >>> video_pixels(torch.zeros(2, 4, 5, 8, 8)).shape
    torch.Size([2, 3, 5, 8, 8])
    """
    # frames below each other are one image
    return to_pixels(samples.flatten(2, 3)).unflatten(2, tuple(samples.shape[2:4]))


def grid_frames(videos: Tensor) -> Tensor:
    """Return uint8 videos (n, channels, frames, height, width) as one, (frames, ..., channels).

    >>> grid_frames(torch.zeros(4, 3, 5, 8, 8, dtype=torch.uint8)).shape
    torch.Size([5, 22, 22, 3])
    """
    return torch.stack([image_grid(frame) for frame in videos.unbind(2)])


def contact_sheet(videos: Tensor) -> Tensor:
    """Return up to eight frames of each video, evenly spaced, a row for each; (height, width, ...).

    >>> contact_sheet(torch.zeros(4, 3, 5, 8, 8, dtype=torch.uint8)).shape
    torch.Size([42, 52, 3])
    """
    count = videos.shape[2]
    chosen = torch.linspace(0, count - 1, min(count, SHEET_FRAMES)).round().long()
    frames = videos[:, :, chosen].transpose(1, 2)
    return image_grid(frames.flatten(0, 1), columns=len(chosen))


def animation_bytes(frames: Tensor, fps: float, kind: str) -> bytes:
    """Return the content of a video file for uint8 frames (frames, height, width, 1 or 3).

    ``kind``: 'webp' (without loss), 'gif' (256 colours, at most 50 frames a second: more are left
    out) or 'mp4' (with loss).

    >>> animation_bytes(torch.zeros(2, 8, 8, 3, dtype=torch.uint8), 8.0, "gif")[:3]
    b'GIF'
    """
    return _FORMATS[kind](frames, fps)


def require_format(name: str) -> None:
    """Raise ValueError for an unknown file format of videos, ImportError if it cannot be written.

    >>> require_format("avi")
    Traceback (most recent call last):
    ValueError: unknown video_format 'avi'; known: mp4, webp
    """
    lookup("video_format", name, VIDEO_FORMATS)
    missing = [package for package in VIDEO_FORMATS[name] if find_spec(package) is None]
    if missing:
        raise ImportError(
            f"video_format={name!r} needs {' and '.join(missing)}: pip install 'alphabar[video]'; "
            "without video_format= videos are animated PNG files"
        )


def _webp(frames: Tensor, fps: float) -> bytes:
    return _by_pillow("WEBP", frames, 1000 / fps, lossless=True)


def _gif(frames: Tensor, fps: float) -> bytes:
    length = len(frames) * GIF_TICKS / fps
    count = max(1, min(len(frames), int(length / GIF_SHORTEST)))
    # each end is rounded, not each duration, so that errors do not add up
    ends = [math.floor(length * k / count + 0.5) for k in range(count + 1)]
    durations = [(end - start) * 1000 // GIF_TICKS for start, end in pairwise(ends)]
    return _by_pillow("GIF", frames[[k * len(frames) // count for k in range(count)]], durations)


def _by_pillow(
    kind: str, frames: Tensor, milliseconds: float | list[int], **options: object
) -> bytes:
    buffer, (first, *rest) = io.BytesIO(), map(to_pil, frames)
    first.save(
        buffer, kind, save_all=True, append_images=rest, duration=milliseconds, loop=0, **options
    )
    return buffer.getvalue()


def _mp4(frames: Tensor, fps: float) -> bytes:
    imageio: Any = import_module("imageio.v2")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "video.mp4")
        images = frames.expand(-1, -1, -1, 3).numpy()
        imageio.mimwrite(str(path), images, fps=fps, macro_block_size=2)  # players need even sizes
        return path.read_bytes()


_FORMATS: Mapping[str, Callable[[Tensor, float], bytes]] = {"webp": _webp, "gif": _gif, "mp4": _mp4}
VIDEO_FORMATS: Mapping[str, tuple[str, ...]] = {"webp": (), "mp4": ("imageio", "imageio_ffmpeg")}
"""File formats of ``Media(video_format=)`` and the packages that they need."""
