"""Sounds: samples to 16 bit PCM, a WAV file, and a picture of the wave over its spectrogram.

Between ranks and threads sounds are the bytes of their PCM, uint8 (n, channels, 2 length): not
every backend of torch.distributed sends int16.
"""

from __future__ import annotations

import io
import wave

import torch
from torch import Tensor
from torch.nn import functional as F

LOUDEST = 2**15 - 1
WIDTH, WAVE_HEIGHT, BINS = 512, 97, 128
DECIBELS = 80.0  # below the loudest; black in the spectrogram


def to_pcm(samples: Tensor) -> Tensor:
    """Convert samples (n, channels, length) in [-1, 1] to bytes of PCM, (n, channels, 2 length).

    Values outside are clipped.

    >>> from_pcm(to_pcm(torch.tensor([[[0.0, 1.0, -3.0]]]))).tolist()
    [[[0, 32767, -32767]]]
    """
    pcm = (samples.float().clamp(-1, 1) * LOUDEST).round().to(torch.int16)
    return pcm.contiguous().view(torch.uint8)


def from_pcm(pcm: Tensor) -> Tensor:
    """Return the samples of :func:`to_pcm` as int16, (..., length)."""
    return pcm.contiguous().view(torch.int16)


def wav_bytes(pcm: Tensor, sample_rate: int) -> bytes:
    """Return the content of a WAV file for one sound, (channels, 2 length).

    >>> wav_bytes(to_pcm(torch.zeros(1, 2, 100))[0], 16000)[:4]
    b'RIFF'
    """
    buffer = io.BytesIO()
    with wave.open(buffer, "wb") as file:
        file.setnchannels(len(pcm))
        file.setsampwidth(2)
        file.setframerate(sample_rate)
        file.writeframes(from_pcm(pcm).T.contiguous().numpy().astype("<i2").tobytes())
    return buffer.getvalue()


def sound_pictures(pcm: Tensor) -> Tensor:
    """Return uint8 pictures (n, 1, height, width) of sounds (n, channels, 2 length).

    Above: the range of the wave in each column, the mean of the channels. Below: the magnitude of
    its short-time Fourier transform, the maximum of each column, from 0 at the bottom to half the
    sample rate, on a scale of 80 decibels below the loudest.

    >>> sound_pictures(to_pcm(torch.zeros(2, 1, 1000))).shape
    torch.Size([2, 1, 225, 512])
    """
    x = from_pcm(pcm).float().mean(1) / LOUDEST
    high = F.adaptive_max_pool1d(x[:, None], WIDTH)
    low = -F.adaptive_max_pool1d(-x[:, None], WIDTH)
    rows = torch.linspace(1, -1, WAVE_HEIGHT)[:, None]
    line = 1 / (WAVE_HEIGHT - 1)  # half the distance of two rows: silence is a line
    drawn = ((rows <= high + line) & (rows >= low - line)).float()
    size = 2 * (BINS - 1)
    hop = max(1, min(size // 2, x.shape[1] // WIDTH))  # windows of a long sound overlap by half
    spectrum = torch.stft(
        F.pad(x, (0, hop)),  # the last samples are in the middle of a window too
        size,
        hop_length=hop,
        window=torch.hann_window(size),
        pad_mode="constant",
        return_complex=True,
    ).abs()
    loudest = spectrum.amax((1, 2), keepdim=True).clamp_min(1e-6)
    decibels = 20 * (spectrum / loudest).clamp_min(1e-6).log10()
    grey = (1 + decibels / DECIBELS).clamp_min(0).flip(1)
    below = F.adaptive_max_pool1d(grey, WIDTH)
    return (torch.cat([drawn, below], 1)[:, None] * 255).round().to(torch.uint8)
