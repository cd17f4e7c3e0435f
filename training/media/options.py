"""How previews of videos and sounds are shown."""

from __future__ import annotations

from dataclasses import dataclass

from ...noising.utils.validation import require, whole_number
from .videos import require_format


@dataclass(frozen=True)
class Media:
    """How previews of videos and sounds are shown; images need nothing of this.

    The samples, or what ``decode`` returns, tell what they are by their shape: (batch, channels,
    height, width) images, (batch, channels, frames, height, width) videos, (batch, channels,
    length) sounds. Pixels and amplitudes are in [-1, 1].

    A video is an animated PNG, without loss, which browsers play. A sound is a picture of its wave
    over its spectrogram, and a WAV file.

    Args:
        fps: frames of a video in a second.
        video_format: a second file of each video, 'webp' or 'mp4' (needs imageio and
            imageio-ffmpeg). The page plays the 'mp4'.
        sample_rate: samples of a sound in a second. Sounds need it.
        decode_frames: latent frames that ``decode`` gets at a time, by default all. For decoders
            that look at each frame alone; video VAEs look across frames and have their own tiling.

    Raises:
        ValueError: a value is out of range, or the format is unknown.
        ImportError: the format's package is not installed.

    >>> Media(fps=24, video_format="webp").sample_rate is None
    True
    """

    fps: float = 8.0
    video_format: str | None = None
    sample_rate: int | None = None
    decode_frames: int | None = None

    def __post_init__(self) -> None:
        require(0 < self.fps < float("inf"), "fps", "be positive", self.fps)
        if self.video_format is not None:
            require_format(self.video_format)
        for name in ("sample_rate", "decode_frames"):
            if getattr(self, name) is not None:
                whole = whole_number(name, getattr(self, name), least=1)
                object.__setattr__(self, name, whole)
