"""One call for every logger that can show an image; Lightning's Logger has none of its own."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..training.images import to_pil


def log_image(logger: Any, tag: str, image: Tensor, step: int) -> bool:
    """Show a uint8 image (height, width, 1 or 3) in a Lightning logger; return False where that logger takes no images.

    A logger's own ``log_image`` (Weights & Biases) is preferred, then ``experiment.add_image`` (TensorBoard).

    >>> import torch
    >>> class Wandb:
    ...     def log_image(self, key, images, step):
    ...         print(key, images[0].size, step)
    >>> log_image(Wandb(), "previews", torch.zeros(2, 4, 3, dtype=torch.uint8), step=5)
    previews (4, 2) 5
    True
    >>> log_image(object(), "previews", torch.zeros(2, 4, 3, dtype=torch.uint8), step=5)
    False
    """
    own = getattr(logger, "log_image", None)
    if callable(own):
        own(key=tag, images=[to_pil(image)], step=step)
        return True
    add = getattr(getattr(logger, "experiment", None), "add_image", None)
    if callable(add):
        add(tag, image.cpu().numpy(), step, dataformats="HWC")
        return True
    return False
