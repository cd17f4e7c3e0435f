"""Drawing the images of a preview: batches through a sampler to pixels. Knows no Trainer, and leaves no trace."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..sampling import Sampler
from ..sampling.guidance import guided_network
from ..training.images import to_pixels
from .guards import evaluating, randomness_restored
from .plan import require_rows, take_rows


@dataclass(frozen=True)
class Drawing:
    """Which images are drawn: their number, their seeds (image i: ``seed + i``), and under which conditions.

    ``conditioning`` and ``unconditional`` are keyword arguments of the network; tensors in them have a row for each
    image, or one for all. Raises ValueError where the rows do not fit, or guidance is asked for and cannot be had.

    >>> from alphabar.noising import NoiseSchedule
    >>> sampler = Sampler(NoiseSchedule.flow(), "euler", steps=4)
    >>> drawing = Drawing(num_images=3)
    >>> drawing.pixels(lambda x, t: x, sampler, (1, 8, 8), batches=[[0, 1], [2, 2]]).shape
    torch.Size([2, 2, 1, 8, 8])
    """

    num_images: int
    seed: int = 0
    conditioning: Mapping[str, Any] = field(default_factory=dict)
    unconditional: Mapping[str, Any] | None = None
    guidance_scale: float = 1.0
    guidance_rescale: float = 0.0

    def __post_init__(self) -> None:
        require_rows("conditioning", self.conditioning, self.num_images)
        require_rows("unconditional", self.unconditional or {}, self.num_images)
        first = self._arguments([0], torch.device("cpu"))
        guided_network(
            lambda *_: None,
            first["conditioning"],
            first["unconditional"],
            self.guidance_scale,
            self.guidance_rescale,
        )

    def pixels(
        self,
        network: Callable[..., Any],
        sampler: Sampler,
        shape: tuple[int, ...],
        batches: Sequence[Sequence[int]],
        *,
        modules: Sequence[object] = (),
        device: torch.device | str = "cpu",
        stop: int | None = None,
    ) -> Tensor:
        """Return the images of each batch, uint8 (batches, images, 1 or 3, height, width), on ``device``.

        ``shape``: of one sample. ``modules`` are in eval mode meanwhile. ``stop``: break off after so many steps.
        """
        device = torch.device(device)
        with (
            randomness_restored(device),
            evaluating(*modules),
            torch.compiler.set_stance("force_eager"),  # a graph for previews would count against training's limit
            torch.no_grad(),  # not inference_mode: tensors that a network caches must stay usable in training
        ):
            drawn = [self._sample(network, sampler, shape, batch, device, stop) for batch in batches]
        return torch.stack(drawn)

    def _sample(
        self,
        network: Callable[..., Any],
        sampler: Sampler,
        shape: tuple[int, ...],
        images: Sequence[int],
        device: torch.device,
        stop: int | None,
    ) -> Tensor:
        x = None
        seeds = [self.seed + i for i in images]
        arguments = self._arguments(images, device)
        for progress in sampler.iterate(network, (len(images), *shape), seeds=seeds, device=device, **arguments):
            x = progress.x
            if progress.step == stop:
                break
        assert x is not None  # there is at least one step
        return to_pixels(x)

    def _arguments(self, images: Sequence[int], device: torch.device) -> dict[str, Any]:
        return {
            "conditioning": take_rows(self.conditioning, images, device),
            "unconditional": None if self.unconditional is None else take_rows(self.unconditional, images, device),
            "guidance_scale": self.guidance_scale,
            "guidance_rescale": self.guidance_rescale,
        }
