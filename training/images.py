"""Convert samples to images (pixels, a grid, a PNG) and images to samples."""

from __future__ import annotations

import io
import math
import os
from collections.abc import Mapping
from numbers import Integral
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from ..noising.utils.atomic import write_atomically

if TYPE_CHECKING:  # the console command needs no images
    from PIL import Image

BACKGROUND = 128  # mid grey: contrasts with black and with white images


def to_pixels(samples: Tensor) -> Tensor:
    """Convert samples (n, channels, height, width) to uint8 pixels (n, 1 or 3, height, width).

    Samples with one or three channels are images in [-1, 1]. This range is mapped to 0 ... 255;
    values outside are clipped. Samples with any other number of channels are latents, which have no
    fixed range: the first three channels are shown (the first one if there are two). Each channel
    of each image is scaled from its own minimum and maximum.

    Raises:
        ValueError: the shape is another one, or a sample contains NaN.

    >>> to_pixels(torch.tensor([-1.0, 0.0, 1.0, 7.0]).view(1, 1, 2, 2)).flatten().tolist()
    [0, 128, 255, 255]
    >>> to_pixels(torch.randn(2, 4, 8, 8)).shape
    torch.Size([2, 3, 8, 8])
    """
    require_image_shape(tuple(samples.shape[1:]))
    bad = samples.isnan().flatten(1).any(1).nonzero().flatten().tolist()
    if bad:
        raise ValueError(
            f"samples {bad} of {len(samples)} hold NaN; look at the loss and at the dtype that is "
            "sampled in"
        )
    x = samples.float()
    if x.shape[1] not in (1, 3):
        x = _stretched(x[:, :3] if x.shape[1] > 3 else x[:, :1])
    return ((x + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)


def cropped(
    image: Image.Image, size: int, left: float = 0.5, top: float = 0.5, flip: bool = False
) -> tuple[Tensor, list[int]]:
    """Return a square of an image in [-1, 1], and the sizes that SDXL takes as conditioning.

    Args:
        image: the image.
        size: side of the square; the shorter side of the image is resized to it.
        left, top: place of the square, 0 ... 1; 0.5 is the centre.
        flip: mirror the square.

    Returns:
        Pixels of shape (3, size, size), and (height, width, top, left, size, size): of the image,
        of the square's corner in the resized image, and of the square.

    >>> from PIL import Image
    >>> pixels, sizes = cropped(Image.new("RGB", (80, 40)), 20, left=1.0)
    >>> pixels.shape, pixels.max().item(), sizes
    (torch.Size([3, 20, 20]), -1.0, [40, 80, 0, 20, 20, 20])
    """
    from PIL import Image

    scale, original = size / min(image.size), [image.height, image.width]
    image = image.convert("RGB").resize(
        (max(size, round(image.width * scale)), max(size, round(image.height * scale))),
        Image.Resampling.LANCZOS,
    )
    x, y = round(left * (image.width - size)), round(top * (image.height - size))
    pixels = np.array(image.crop((x, y, x + size, y + size)), dtype=np.float32)
    if flip:  # the corner is that of the mirrored image
        pixels, x = pixels[:, ::-1], image.width - size - x
    return torch.from_numpy(pixels / 127.5 - 1).permute(2, 0, 1), [*original, y, x, size, size]


def require_image_shape(shape: tuple[int, ...]) -> None:
    """Raise ValueError unless ``shape``, without the batch, is (channels, height, width).

    >>> require_image_shape((16000,))
    Traceback (most recent call last):
    ValueError: a picture needs samples of shape (channels, height, width), got (16000,)
    """
    if len(shape) != 3 or not all(isinstance(n, Integral) and n > 0 for n in shape):
        raise ValueError(f"a picture needs samples of shape (channels, height, width), got {shape}")


def image_grid(pixels: Tensor, columns: int | None = None, margin: int = 2) -> Tensor:
    """Return uint8 images (n, channels, height, width) as one grid (height, width, channels).

    Images are placed row by row.

    Args:
        pixels: the images.
        columns: number of columns; default: those of the smallest square that holds all images.
        margin: width of the grey margin in pixels.

    >>> image_grid(torch.zeros(5, 3, 8, 8, dtype=torch.uint8)).shape
    torch.Size([22, 32, 3])
    """
    n, channels, height, width = pixels.shape
    columns = columns or math.ceil(math.sqrt(n))
    rows = math.ceil(n / columns)
    high, wide = height + margin, width + margin
    grid = torch.full(
        (channels, rows * high + margin, columns * wide + margin), BACKGROUND, dtype=torch.uint8
    )
    for k, image in enumerate(pixels):
        top, left = margin + k // columns * high, margin + k % columns * wide
        grid[:, top : top + height, left : left + width] = image
    return grid.permute(1, 2, 0).contiguous()


def to_pil(image: Tensor) -> Image.Image:
    """Convert a uint8 image (height, width, 1 or 3) to a PIL image, grey or RGB.

    >>> to_pil(torch.zeros(2, 4, 1, dtype=torch.uint8)).size
    (4, 2)
    """
    from PIL import Image

    array = image.cpu().numpy()
    return Image.fromarray(array[..., 0] if array.shape[-1] == 1 else array)


def png_bytes(image: Tensor, texts: Mapping[str, str] | None = None, fps: float = 8.0) -> bytes:
    """Return the content of a PNG file for a uint8 image (height, width, 1 or 3).

    Frames (frames, height, width, 1 or 3) give an animated PNG of ``fps`` frames a second, which
    repeats. ``texts`` are stored in the file by their keywords.

    >>> png_bytes(torch.zeros(2, 2, 3, dtype=torch.uint8))[:4]
    b'\\x89PNG'
    """
    from PIL.PngImagePlugin import PngInfo

    buffer, info = io.BytesIO(), PngInfo()
    for key, text in (texts or {}).items():
        # half a surrogate pair, which truncated text may end with, has no encoding
        info.add_text(key, text.encode(errors="replace").decode())
    first, *rest = map(to_pil, image if image.ndim == 4 else [image])
    options = {"append_images": rest, "duration": 1000 / fps, "loop": 0} if rest else {}
    first.save(buffer, format="PNG", pnginfo=info, save_all=bool(rest), **options)
    return buffer.getvalue()


def save_grid(samples: Tensor, path: str | os.PathLike[str]) -> Path:
    """Write samples (n, channels, height, width) as one PNG grid; return the path.

    >>> import tempfile
    >>> save_grid(torch.zeros(4, 1, 8, 8), Path(tempfile.mkdtemp(), "grid.png")).name
    'grid.png'
    """
    return write_atomically(path, png_bytes(image_grid(to_pixels(samples))))


def _stretched(x: Tensor) -> Tensor:
    low, high = x.amin((2, 3), keepdim=True), x.amax((2, 3), keepdim=True)
    return 2 * (x - low) / (high - low).clamp_min(torch.finfo(x.dtype).tiny) - 1
