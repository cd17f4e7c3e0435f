"""Draw the images of a preview: batches to pixels, without a Trainer or side effects."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ...noising.noising import prediction_tensor
from ...sampling import Sampler
from ...sampling.guidance import guided_network
from ..diffusers_text_to_image import latent_scaling
from ..images import to_pixels
from ..loops.isolation import buffers_restored, evaluating, randomness_restored
from ..media.options import Media
from ..media.sounds import to_pcm
from ..media.videos import video_pixels
from .batches import require_rows, take_rows

SHOWN_AXES = (3, 4, 5)  # of sounds, images, videos
NAN_SQUARE = 4  # size in pixels; NaN is shown as a checkerboard, which no real image looks like


class Painted(NamedTuple):
    """Images, videos or sounds, and their share of NaN.

    ``pixels``: uint8 on the CPU, of images (n, 1 or 3, height, width), of videos (n, 1 or 3,
    frames, height, width), of sounds the bytes of :func:`to_pcm` (n, channels, 2 length). ``nan``:
    the fraction of NaN pixels in each.
    """

    pixels: Tensor
    nan: Tensor


@dataclass(frozen=True)
class Drawing:
    """The images to draw: number, seeds and conditions.

    Args:
        num_images: number of images.
        seed: image i has the seed ``seed + i``, if ``seeds`` is empty.
        conditioning: keyword arguments of the network; tensors have a row for each image, or one
            for all.
        unconditional: the same, without condition, for guidance.
        guidance_scale: scale of classifier-free guidance.
        guidance_rescale: rescaling of classifier-free guidance.
        seeds: image i has the seed ``seeds[i]``.
        media: how videos and sounds are shown.

    Raises:
        ValueError: the number of rows or seeds is wrong, or guidance is requested but not possible.

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
    seeds: tuple[int, ...] = ()
    media: Media = field(default_factory=Media)

    def __post_init__(self) -> None:
        if len(self.seeds) not in (0, self.num_images):
            raise ValueError(
                f"seeds must name one for each of {self.num_images} images, got {len(self.seeds)}"
            )
        require_rows("conditioning", self.conditioning, self.num_images)
        require_rows("unconditional", self.unconditional or {}, self.num_images)
        first = self.arguments([0], torch.device("cpu"))
        guided_network(
            lambda *_: None,
            first["conditioning"],
            first["unconditional"],
            self.guidance_scale,
            self.guidance_rescale,
            batch=1,
        )

    def seeds_of(self, images: Sequence[int]) -> list[int]:
        """Return the seeds of ``images``.

        >>> Drawing(3, seed=5).seeds_of([0, 2]), Drawing(2, seeds=(9, 1)).seeds_of([1])
        ([5, 7], [1])
        """
        return [self.seeds[i] if self.seeds else self.seed + i for i in images]

    def pixels(
        self,
        network: Callable[..., Any],
        sampler: Any,
        shape: tuple[int, ...],
        batches: Sequence[Sequence[int]],
        *,
        modules: Sequence[object] = (),
        device: torch.device | str = "cpu",
    ) -> Tensor:
        """Return the images of each batch, uint8 (batches, images, 1 or 3, height, width).

        Args:
            network: the network.
            sampler: the sampler.
            shape: shape of one sample.
            batches: image indices of each batch.
            modules: modules that are set to eval mode while drawing.
            device: device of the samples.
        """
        drawn = []
        with without_a_trace(device, modules):
            for batch in batches:
                drawn += [
                    part.pixels
                    for part in self.steps(network, sampler, shape, batch, device)
                    if part is not None
                ]
        return torch.stack(drawn)

    def steps(
        self,
        network: Callable[..., Any],
        sampler: Sampler,
        shape: tuple[int, ...],
        images: Sequence[int],
        device: torch.device | str = "cpu",
        *,
        decode: Callable[[Tensor], Tensor] | None = None,
        stop: int | None = None,
    ) -> Iterator[Painted | None]:
        """Sample ``images``; yield None after each step, and the finished images at the end.

        Run it inside :func:`without_a_trace`. ``stop``: number of steps after which to stop early.
        """
        device = torch.device(device)
        seeds = self.seeds_of(images)
        x = None
        arguments = self.arguments(images, device)
        for progress in sampler.iterate(
            network, (len(images), *shape), seeds=seeds, device=device, **arguments
        ):
            x = progress.x
            yield None
            if progress.step == stop:
                break
        assert x is not None  # there is at least one step
        if decode is not None:
            x = require_decoded(decode(x), len(images), self.media)
        yield paint(x)

    def arguments(self, images: Sequence[int], device: torch.device) -> dict[str, Any]:
        """Return the sampler's arguments for conditioning and guidance of ``images``."""
        return {
            "conditioning": take_rows(self.conditioning, images, device),
            "unconditional": None
            if self.unconditional is None
            else take_rows(self.unconditional, images, device),
            "guidance_scale": self.guidance_scale,
            "guidance_rescale": self.guidance_rescale,
        }


@contextmanager
def without_a_trace(
    device: torch.device | str, modules: Sequence[object]
) -> Generator[None, None, None]:
    """Set ``modules`` to eval mode and disable gradients inside the block; then restore all state.

    Restores random generators, train / eval flags, the gradient mode, compiled graphs and buffers.

    >>> with without_a_trace("cpu", []):
    ...     torch.is_grad_enabled()
    False
    """
    with (
        randomness_restored(device),
        evaluating(*modules),
        buffers_restored(*modules),
        # a graph compiled for previews would count against training's recompile limit
        torch.compiler.set_stance("force_eager"),
        # not inference_mode: tensors that a network caches must remain usable in training
        torch.no_grad(),
    ):
        yield


def paint(samples: Tensor) -> Painted:
    """Convert samples of images, videos or sounds to pixels or PCM, see :class:`Painted`.

    Pixels with NaN in any channel are shown as a checkerboard; NaN in a sound is silent.

    >>> paint(torch.full((1, 1, 8, 8), torch.nan)).pixels[0, 0, 0].tolist()
    [0, 0, 0, 0, 255, 255, 255, 255]
    """
    bad = samples.isnan()
    convert = {3: to_pcm, 5: video_pixels}.get(samples.ndim, to_pixels)
    if not bad.any():
        return Painted(convert(samples).cpu(), torch.zeros(len(samples)))
    pixels = convert(samples.masked_fill(bad, 0.0)).cpu()
    where = bad.any(1, keepdim=True).cpu()
    share = where.float().flatten(1).mean(1)
    if samples.ndim == 3:
        return Painted(pixels, share)
    height, width = pixels.shape[-2:]
    squares = torch.arange(height)[:, None] // NAN_SQUARE + torch.arange(width) // NAN_SQUARE
    chequered = (squares % 2 * 255).to(torch.uint8)
    return Painted(torch.where(where, chequered, pixels), share)


def require_decoded(decoded: Tensor, count: int, media: Media) -> Tensor:
    """Return what ``decode`` returned; raise ValueError if it cannot be shown.

    >>> require_decoded(torch.zeros(2, 3, 5, 8, 8), 2, Media()).shape
    torch.Size([2, 3, 5, 8, 8])
    """
    if decoded.ndim not in SHOWN_AXES or len(decoded) != count:
        raise ValueError(
            "decode= must return images of shape (n, channels, height, width) in [-1, 1], videos "
            "(n, channels, frames, height, width) or sounds (n, channels, length), one for each of "
            f"{count} samples, got {tuple(decoded.shape)}"
        )
    if decoded.ndim == 3 and media.sample_rate is None:
        raise ValueError(
            f"decode= returned sounds, of shape {tuple(decoded.shape)}; give their "
            "media=Media(sample_rate=...)"
        )
    return decoded


def in_slices(decode: Any, size: int, frames: int | None = None) -> Callable[[Tensor], Tensor]:
    """Return a function that decodes ``size`` latents at a time, and ``frames`` of them.

    ``decode`` is a function of latents or a diffusers VAE. A VAE gets the latents in its own dtype
    and scaled as in diffusers' pipelines: by its ``latents_mean`` and ``latents_std``, if it has
    them, ``scaling_factor`` and ``shift_factor``. ``frames``: latents of videos (n, channels,
    frames, height, width) are decoded this many frames at a time; None is all.

    >>> in_slices(lambda z: z.repeat(1, 1, 8, 8)[:, :3], size=1)(torch.zeros(2, 4, 8, 8)).shape
    torch.Size([2, 3, 64, 64])
    """
    function = _vae(decode) if hasattr(decode, "decode") else decode

    def sliced(latents: Tensor) -> Tensor:
        return torch.cat([frame_by_frame(part) for part in latents.split(size)])

    def frame_by_frame(latents: Tensor) -> Tensor:
        if frames is None or latents.ndim != 5:
            return prediction_tensor(function(latents))
        parts = [prediction_tensor(function(part)) for part in latents.split(frames, 2)]
        return torch.cat(parts, 2)

    return sliced


def _vae(vae: Any) -> Callable[[Tensor], Any]:
    decoded: Callable[[Tensor], Any] = vae.decode
    parameter = next(vae.parameters(), None) if isinstance(vae, nn.Module) else None

    def decode(latents: Tensor) -> Any:
        if parameter is not None:
            latents = latents.to(parameter.dtype)
        mean, scale = latent_scaling(vae, latents)
        return decoded(latents / scale + mean)

    return decode
