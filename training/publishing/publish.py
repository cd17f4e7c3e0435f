"""Publish the images of a preview: files, an HTML page, and every logger that takes images.

Videos are animated PNG files with the names of images. Sounds are pictures with a WAV file beside.

Files in the preview folder:

- ``step_00000500.png`` (EMA: ``step_00000500_ema.png``): the grid of all images.
- ``images/step_00000500/raw_0003_seed_7.png``: image 3 of the grid, from seed 7.
- ``images/step_00000500/raw_0003_seed_7.wav`` or ``.mp4``: its sound, or its video once more.
- ``previews.jsonl``: one line for each image.
- ``index.html``: a page that shows the images side by side.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from ..checkpoints.storage import Folder
from ..images import image_grid, png_bytes
from ..loops.complaints import Failure, warn_on_rank_zero
from ..media.options import Media
from ..media.sounds import from_pcm, sound_pictures, wav_bytes
from ..media.videos import animation_bytes, contact_sheet, grid_frames
from .html import PAGE_NAME, RECORDS_NAME, read_records, render
from .loggers import Recording, log_image, log_recording, takes_images
from .settings import png_texts


@dataclass(frozen=True)
class Preview:
    """The images, videos or sounds of one preview, and how they were sampled.

    Args:
        step: optimizer step.
        epoch: training epoch, None if it is not known.
        weights: 'raw' or 'ema'.
        images: uint8 (n, channels, height, width), with one or three channels; of videos (n,
            channels, frames, height, width); of sounds PCM bytes (n, channels, 2 length).
        seeds: one seed for each image.
        captions: one prompt for each image, '' if there is none.
        sampler: name of the sampler.
        steps: sampling steps, None if the sampler has no fixed number.
        guidance_scale: scale of the guidance.
        fingerprint: fingerprint of the noise schedule.
        seconds: duration of the preview.
        note: additional information, or ''.
        settings: what reproduces the images, without their seeds and prompts, as JSON values.
        media: rates and file formats of videos and sounds.

    Raises:
        ValueError: the numbers of images, seeds and captions differ, or sounds have no rate.

    >>> import torch
    >>> images = torch.zeros(2, 3, 8, 8, dtype=torch.uint8)
    >>> preview = Preview(
    ...     500, 1, "raw", images, (0, 1), ("", ""), "dpmpp_2m", 20, 1.0, "ab12", 0.5, ""
    ... )
    >>> preview.grid_name, preview.image_names[1]
    ('step_00000500.png', 'images/step_00000500/raw_0001_seed_1.png')
    """

    step: int
    epoch: int | None
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
    settings: Mapping[str, Any] = field(default_factory=dict)
    media: Media = field(default_factory=Media)

    def __post_init__(self) -> None:
        if self.images.ndim == 3 and self.media.sample_rate is None:
            raise ValueError("a preview of sounds needs media=Media(sample_rate=...)")
        if not len(self.images) == len(self.seeds) == len(self.captions):
            numbers = (
                f"{len(self.images)} images, {len(self.seeds)} seeds and "
                f"{len(self.captions)} captions"
            )
            raise ValueError(f"a preview has a seed and a caption for each image, got {numbers}")

    @property
    def grid_name(self) -> str:
        """The file name of the grid of all images."""
        return f"step_{self.step:08d}{self.suffix}.png"

    @property
    def image_names(self) -> list[str]:
        """The file names of the images, in order; the index distinguishes images of one seed."""
        folder = f"images/step_{self.step:08d}"
        return [
            f"{folder}/{self.weights}_{i:04d}_seed_{seed}.png" for i, seed in enumerate(self.seeds)
        ]

    @property
    def beside(self) -> tuple[str, str] | None:
        """The kind of the second file of each image, 'sound' or 'video', and its suffix."""
        if self.images.ndim == 3:
            return "sound", ".wav"
        if self.images.ndim == 5 and self.media.video_format is not None:
            return "video", f".{self.media.video_format}"
        return None

    @property
    def suffix(self) -> str:
        """The suffix of names: '' for raw weights, '_ema' for EMA weights."""
        return "" if self.weights == "raw" else f"_{self.weights}"

    def settings_of(self, index: int | None) -> dict[str, Any]:
        """Return the settings of one image, or of the grid for None; empty if they are not known.

        The grid has the seed and the prompt of its first image too, as in A1111.
        """
        if not self.settings or not self.seeds:
            return {}
        shared = {**self.settings, "step": self.step, "weights": self.weights}
        one = {"seed": self.seeds[index or 0], "prompt": self.captions[index or 0]}
        every = {"seeds": list(self.seeds), "prompts": list(self.captions)} if index is None else {}
        return shared | one | every

    def records(self) -> list[dict[str, Any]]:
        """Return a record for each image as JSON values; NaN and infinity become None."""
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
            {"image": image, "index": index, "seed": seed, "prompt": caption}
            | shared
            | ({self.beside[0]: _second(image, self.beside[1])} if self.beside else {})
            | ({"settings": self.settings_of(index)} if self.settings else {})
            for index, (image, seed, caption) in enumerate(each)
        ]


def publish(preview: Preview, folder: str, loggers: Sequence[Any], told: set[str]) -> list[Failure]:
    """Write a preview to ``folder`` and log it to ``loggers``; return the failures.

    If one place fails, the preview is still published to the others. Call it on rank 0 only, on any
    thread, but not on two threads at once.

    Args:
        preview: the preview.
        folder: a path, or any URL that fsspec supports.
        loggers: loggers of Lightning, trackers of accelerate, or SummaryWriters.
        told: names of the loggers for which the warning "takes no images" was given. It is updated.

    >>> import tempfile, torch
    >>> images = torch.zeros(1, 3, 8, 8, dtype=torch.uint8)
    >>> preview = Preview(
    ...     500, 1, "raw", images, (0,), ("a cat",), "dpmpp_2m", 20, 1.0, "ab12", 0.5, ""
    ... )
    >>> publish(preview, "memory://alphabar-example/previews", loggers=[], told=set())
    []
    """
    place = Folder(folder)
    shown = shown_of(preview.images.cpu())
    stills = shown.stills, _captions(preview)
    failed: list[Failure] = []

    def attempt(act: Callable[[], object]) -> None:
        try:
            act()
        # a remote store may raise any error; the other places must still get the images
        except Exception as error:
            found = Failure(folder, error)
            failed.extend([found] if str(found) not in map(str, failed) else [])

    fps = preview.media.fps
    texts = png_texts(preview.settings_of(None), shown.grid)
    attempt(lambda: place.write(preview.grid_name, png_bytes(shown.grid, texts, fps)))
    attempt(lambda: _write_images(place, preview, shown))
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
    tag, path = place.name + preview.suffix, local / preview.grid_name if local else None
    recording = _recording(preview, shown, tag, local)
    for logger in loggers:
        name = type(logger).__name__
        try:
            took = recording is not None and log_recording(logger, recording)
            if took and shown.moves:
                continue
            if not log_image(logger, tag, shown.still, preview.step, *stills, path):
                _tell(name, f"{name} takes no images; previews are in {folder!r} alone", told)
            elif shown.moves:
                words = f"{name} shows single frames of the videos; they move in {folder!r}"
                _tell(f"{name} videos", f"{words} (TensorBoard plays videos with moviepy)", told)
        except Exception as error:
            failed.append(Failure(name, error))
    return failed


def _tell(key: str, words: str, told: set[str]) -> None:
    if key not in told:
        told.add(key)
        warn_on_rank_zero(words)


def try_out(folder: str, loggers: Sequence[Any], told: set[str]) -> list[Failure]:
    """Check before training that publishing works; return the failures of loggers.

    Checks the folder, renders the page of the previews in it, and checks the loggers. Warns about
    loggers that take no images. A logger's ``experiment`` is created here, on the training thread.
    Call it on rank 0 only.

    Raises:
        OSError: the folder cannot be written.
    """
    place = Folder(folder)
    place.require_writable()
    render(read_records(place.read(RECORDS_NAME) or b""), place.name)
    failed: list[Failure] = []
    for logger in loggers:
        name = type(logger).__name__
        try:
            if not takes_images(logger):
                _tell(name, f"{name} takes no images; previews are in {folder!r} alone", told)
        except Exception as error:
            failed.append(Failure(name, error))
    return failed


@dataclass(frozen=True)
class Shown:
    """What the files and loggers of a preview show.

    Args:
        grid: the file of all images, uint8 (height, width, 1 or 3); of videos (frames, ...).
        singles: the files of the images, likewise.
        still: ``grid`` for loggers that take images; of videos frames side by side.
        stills: ``singles`` for such loggers.
    """

    grid: Tensor
    singles: Sequence[Tensor]
    still: Tensor
    stills: Sequence[Tensor]

    @property
    def moves(self) -> bool:
        """Whether these are videos."""
        return self.grid.ndim == 4


def shown_of(images: Tensor) -> Shown:
    """Return what is shown of the images of a ``Preview``.

    >>> import torch
    >>> shown = shown_of(torch.zeros(4, 3, 5, 8, 8, dtype=torch.uint8))
    >>> shown.grid.shape, shown.singles[0].shape, shown.still.shape
    (torch.Size([5, 22, 22, 3]), torch.Size([5, 8, 8, 3]), torch.Size([42, 52, 3]))
    """
    if images.ndim == 5:
        singles = [video.permute(1, 2, 3, 0).contiguous() for video in images]
        stills = [contact_sheet(video[None]) for video in images]
        return Shown(grid_frames(images), singles, contact_sheet(images), stills)
    pictures = sound_pictures(images) if images.ndim == 3 else images
    singles = [image.permute(1, 2, 0).contiguous() for image in pictures]
    grid = image_grid(pictures)
    return Shown(grid, singles, grid, singles)


def _write_images(place: Folder, preview: Preview, shown: Shown) -> None:
    media = preview.media
    for index, (name, image) in enumerate(zip(preview.image_names, shown.singles, strict=True)):
        texts = png_texts(preview.settings_of(index), image)
        place.write(name, png_bytes(image, texts, media.fps))
        if preview.beside is None:
            continue
        if preview.images.ndim == 3 and media.sample_rate is not None:
            content = wav_bytes(preview.images[index].cpu(), media.sample_rate)
        else:
            content = animation_bytes(image, media.fps, str(media.video_format))
        place.write(_second(name, preview.beside[1]), content)


def _second(name: str, suffix: str) -> str:
    return name.removesuffix(".png") + suffix


def _recording(preview: Preview, shown: Shown, tag: str, local: Path | None) -> Recording | None:
    common = {"tag": tag, "step": preview.step, "captions": _captions(preview)}
    if shown.moves:
        return Recording(parts=shown.singles, rate=preview.media.fps, grid=shown.grid, **common)
    if preview.beside is None:
        return None
    names = [_second(name, preview.beside[1]) for name in preview.image_names]
    paths = [str(local / name) for name in names] if local is not None else []
    rate = preview.media.sample_rate or 0
    return Recording(parts=list(from_pcm(preview.images.cpu())), rate=rate, paths=paths, **common)


def _captions(preview: Preview) -> list[str]:
    each = zip(preview.captions, preview.seeds, strict=True)
    return [f"{caption} (seed {seed})" if caption else f"seed {seed}" for caption, seed in each]


def _finite(number: float) -> float | None:
    return float(number) if math.isfinite(number) else None
