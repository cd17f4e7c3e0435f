"""Previews of videos and sounds: what the files hold is what was sampled."""

import importlib.util
import io
import json
import sys
import types
import wave
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor, nn
from torch.utils.tensorboard import SummaryWriter

from alphabar.noising import NoiseSchedule, Noising
from alphabar.sampling import Sampler
from alphabar.training import Media, Previews, read_settings
from alphabar.training.images import image_grid, png_bytes, to_pixels
from alphabar.training.media import videos
from alphabar.training.media.sounds import from_pcm, sound_pictures, to_pcm, wav_bytes
from alphabar.training.media.videos import animation_bytes, contact_sheet, video_pixels
from alphabar.training.previews.render import Drawing, in_slices, paint
from alphabar.training.publishing.publish import Preview, publish

FLOW = NoiseSchedule.flow()
VIDEO, SOUND = (3, 5, 8, 12), (2, 4000)


def shrinking(x: Tensor, timesteps: Tensor) -> Tensor:
    return 0.5 * x


def frames_of(file: Any) -> list[np.ndarray[Any, Any]]:
    with Image.open(file) as image:
        frames = []
        for k in range(getattr(image, "n_frames", 1)):
            image.seek(k)
            frames.append(np.array(image.convert("RGB")))
    return frames


def show(folder: Path, shape: Sequence[int], media: Media | None = None, **settings: Any) -> None:
    with Previews(
        "euler", steps=2, schedule=FLOW, shape=shape, num_images=2, predict=shrinking,
        folder=folder, media=media, on_error="raise", **settings,
    ) as previews:  # fmt: skip
        network = nn.Linear(1, 1)
        previews.try_out(network)
        assert previews(network, step=500)


def records(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "previews.jsonl").read_text().splitlines()]


# videos


def test_every_frame_of_a_preview_is_the_sample(tmp_path: Path) -> None:
    show(tmp_path, VIDEO, Media(fps=12.5, video_format="webp"), seeds=[3, 2**40])
    drawn = Sampler(FLOW, "euler", 2)(shrinking, (2, *VIDEO), seeds=[3, 2**40])
    pixels = torch.stack([to_pixels(frame) for frame in drawn.unbind(2)], 2)
    for record, expected in zip(records(tmp_path), pixels, strict=True):
        for name in (record["image"], record["video"]):
            shown = frames_of(tmp_path / name)
            np.testing.assert_array_equal(shown, expected.permute(1, 2, 3, 0).numpy())
    with Image.open(tmp_path / records(tmp_path)[0]["image"]) as image:
        assert (image.info["duration"], image.info["loop"]) == (80.0, 0)
    grid = frames_of(tmp_path / "step_00000500.png")
    for k, frame in enumerate(grid):
        np.testing.assert_array_equal(frame, image_grid(pixels[:, :, k]).numpy())
    settings = read_settings(tmp_path / records(tmp_path)[1]["image"])
    assert (settings["seed"], settings["shape"]) == (2**40, list(VIDEO))
    with Image.open(tmp_path / "step_00000500.png") as image:
        assert "Size: 30x12" in image.text["parameters"]  # type: ignore[attr-defined]


def test_latents_of_a_video_have_one_scale_for_all_frames() -> None:
    latents = torch.randn(2, 4, 3, 6, 6, generator=torch.Generator().manual_seed(0))
    latents[:, :, 1] *= 5
    pixels = video_pixels(latents)
    assert pixels.shape == (2, 3, 3, 6, 6)
    assert pixels[:, :, 1].flatten(2).amin() == 0 and pixels[:, :, 0].amin() > 50


def test_nan_is_chequered_in_its_frame_alone() -> None:
    video = torch.zeros(2, 3, 4, 8, 8)
    video[1, 0, 2] = torch.nan
    pixels, share = paint(video)
    assert share.tolist() == [0.0, 0.25]
    clean = torch.ones_like(pixels, dtype=torch.bool)
    clean[1, :, 2] = False
    assert pixels[clean].unique().tolist() == [128]
    assert pixels[1, 0, 2].unique().tolist() == [0, 255]


def test_grey_videos_and_stills() -> None:
    grey = torch.arange(3, dtype=torch.uint8).view(3, 1, 1, 1).expand(3, 4, 4, 1) * 100
    shown = frames_of(io.BytesIO(png_bytes(grey, fps=4)))
    assert [frame[0, 0].tolist() for frame in shown] == [[0] * 3, [100] * 3, [200] * 3]
    sheet = contact_sheet(
        torch.arange(40, dtype=torch.uint8).view(1, 1, 40, 1, 1).expand(2, 1, 40, 4, 4)
    )
    assert sheet.shape == (2 * 6 + 2, 8 * 6 + 2, 1)
    assert sheet[3, 3::6, 0].tolist() == [0, 6, 11, 17, 22, 28, 33, 39]


@pytest.mark.parametrize("size", [1, 2, 5, 9])
def test_decoders_get_slices_of_frames(size: int) -> None:
    seen: list[tuple[int, ...]] = []

    def decode(latents: Tensor) -> Tensor:
        seen.append(tuple(latents.shape))
        return latents.repeat_interleave(2, -1)[:, :3]

    latents = torch.randn(2, 4, 5, 3, 3)
    decoded = in_slices(decode, 1, size)(latents)
    assert torch.equal(decoded, latents.repeat_interleave(2, -1)[:, :3])
    assert [shape[2] for shape in seen] == 2 * [len(part) for part in torch.arange(5).split(size)]


def test_a_preview_decodes_in_slices_of_frames(tmp_path: Path) -> None:
    longest = 0

    def decode(latents: Tensor) -> Tensor:
        nonlocal longest
        longest = max(longest, latents.shape[2])
        return latents[:, :3]

    show(tmp_path, (4, 5, 8, 12), Media(decode_frames=2), decode=decode)
    assert longest == 2
    assert len(frames_of(tmp_path / records(tmp_path)[0]["image"])) == 5


def test_mp4_is_written_by_imageio(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ImportError, match=r"video_format='mp4' needs imageio and imageio_ffmpeg"):
        monkeypatch.setattr(videos, "find_spec", lambda name: None)
        Media(video_format="mp4")
    monkeypatch.setattr(videos, "find_spec", lambda name: True)
    written: list[Any] = []

    def mimwrite(path: str, frames: Any, **options: Any) -> None:
        written.append((frames.shape, frames.dtype, options))
        Path(path).write_bytes(b"film")

    imageio = types.ModuleType("imageio.v2")
    imageio.mimwrite = mimwrite  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "imageio", types.ModuleType("imageio"))
    monkeypatch.setitem(sys.modules, "imageio.v2", imageio)
    show(tmp_path, VIDEO, Media(fps=12, video_format="mp4"))
    assert written == [((5, 8, 12, 3), np.uint8, {"fps": 12, "macro_block_size": 2})] * 2
    for record in records(tmp_path):
        assert record["video"].endswith(".mp4")
        assert (tmp_path / record["video"]).read_bytes() == b"film"


# sounds


def test_a_sound_is_a_picture_and_a_wav_file(tmp_path: Path) -> None:
    show(tmp_path, SOUND, Media(sample_rate=8000))
    drawn = Sampler(FLOW, "euler", 2)(shrinking, (2, *SOUND), seeds=0)
    for record, expected in zip(records(tmp_path), drawn, strict=True):
        with wave.open(str(tmp_path / record["sound"])) as file:
            assert (file.getnchannels(), file.getframerate(), file.getsampwidth()) == (2, 8000, 2)
            heard = np.frombuffer(file.readframes(4000), "<i2").reshape(4000, 2).T
        np.testing.assert_allclose(heard / 32767, expected.clamp(-1, 1), atol=1 / 32767)
        picture = frames_of(tmp_path / record["image"])[0]
        np.testing.assert_array_equal(
            picture[..., 0], sound_pictures(to_pcm(expected[None]))[0, 0].numpy()
        )
        assert read_settings(tmp_path / record["image"])["seed"] == record["seed"]


def test_the_picture_of_a_tone() -> None:
    """The wave fills its height, and the spectrogram has one line, at its frequency."""
    t = torch.arange(16000) / 16000
    tone = (0.5 * torch.sin(2 * torch.pi * 2000 * t)).view(1, 1, -1)
    picture = sound_pictures(to_pcm(tone))[0, 0].float()
    above, below = picture[:97], picture[97:]
    lit = (above.mean(1) == 255).nonzero().flatten()
    assert (lit.min().item(), lit.max().item()) == (24, 72)  # the middle half
    assert below[:, 20:-20].mean(1).argmax().item() == 127 - round(2000 / 8000 * 127)
    silence = sound_pictures(to_pcm(0 * tone))[0, 0, :97].float()
    assert silence.mean(1).nonzero().flatten().tolist() == [48]


def test_every_click_of_a_long_sound_is_in_its_spectrogram() -> None:
    length = 441_007
    clicks = [0, *range(40_000, 40_000 + 60 * 5_011, 5_011), length - 1]
    sound = torch.zeros(1, 1, length)
    sound[..., clicks] = 0.9
    below = sound_pictures(to_pcm(sound))[0, 0, 97:]
    for click in clicks:
        column = click * 512 // length
        assert below[:, max(0, column - 1) : column + 2].amin(0).max() > 200, click


def test_short_and_broken_sounds() -> None:
    sound = torch.tensor([[[0.5, torch.nan, 3.0]]])
    pixels, share = paint(sound)
    assert from_pcm(pixels).tolist() == [[[16384, 0, 32767]]]
    assert share.tolist() == pytest.approx([1 / 3])
    assert sound_pictures(pixels).shape == (1, 1, 225, 512)
    assert len(wav_bytes(pixels[0], 8000)) == 44 + 6


# what is refused


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (
            {"shape": (2, 4000)},
            r"give media=Media\(sample_rate=\.\.\.\) if they are sounds, or dec",
        ),
        ({"shape": (4000,)}, r"got \(4000,\); give decode="),
        ({"shape": (3, 2, 5, 8, 8)}, "give decode="),
        ({"shape": (3, 8, 8), "media": {"fps": 3}}, r"media must be Media\(\.\.\.\), got dict"),
    ],
)
def test_what_cannot_be_shown(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        Previews("euler", schedule=FLOW, **settings)


def test_decoded_sounds_need_their_rate() -> None:
    drawing, sampler = Drawing(1), Sampler(FLOW, "euler", 1)
    with pytest.raises(
        ValueError, match=r"returned sounds, of shape \(1, 3, 64\); give their media"
    ):
        list(drawing.steps(shrinking, sampler, (3, 8, 8), [0], decode=lambda x: x.flatten(2)))


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"fps": 0}, "fps must be positive, got 0"),
        ({"video_format": "avi"}, "unknown video_format 'avi'; known: mp4, webp"),
        ({"sample_rate": 0}, "sample_rate"),
        ({"decode_frames": 1.5}, "decode_frames"),
    ],
)
def test_bad_media(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        Media(**settings)


# training


def test_training_is_the_same_with_previews_of_videos(tmp_path: Path) -> None:
    def train(after: Callable[[nn.Module, int], object]) -> Tensor:
        torch.manual_seed(0)
        network = nn.Sequential(nn.Conv3d(3, 3, 1), nn.Dropout(0.5))
        noising, optimizer = Noising(FLOW, seed=1), torch.optim.Adam(network.parameters())
        for step in range(3):
            noised = noising(torch.ones(2, *VIDEO), step=step)
            noised.loss(network(noised.x)).backward()
            optimizer.step()
            optimizer.zero_grad()
            after(network, step)
        return torch.cat([p.detach().flatten() for p in network.parameters()])

    plain = train(lambda network, step: None)
    with Previews(
        "euler_ancestral", steps=2, schedule=FLOW, shape=VIDEO, num_images=1, folder=tmp_path,
        on_error="raise", predict=lambda x, t: -x,
    ) as previews:  # fmt: skip
        assert torch.equal(plain, train(lambda network, step: previews(network, step=step + 1)))
    assert len(list(tmp_path.glob("step_*.png"))) == 3


# loggers


def made(images: Tensor, **media: Any) -> Preview:
    count = len(images)
    return Preview(
        500, 1, "raw", images, tuple(range(count)), ("a cat",) * count, "euler", 2, 1.0, "ab", 0.1,
        "", media=Media(**media),
    )  # fmt: skip


CLIPS = torch.arange(2 * 3 * 4, dtype=torch.uint8).view(2, 3, 4, 1, 1).expand(2, 3, 4, 8, 8) * 9


class Fake:
    """Records its calls, whatever they are."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, tuple[Any, ...], dict[str, Any]]] = []

    def __getattr__(self, name: str) -> Any:
        if name not in self.methods:
            raise AttributeError(name)
        return lambda *args, **kwargs: self.calls.append((name, args, kwargs))

    methods: tuple[str, ...] = ()


def fake(name: str, *methods: str, **attributes: Any) -> Any:
    return type(name, (Fake,), {"methods": methods, **attributes})()


def test_tensorboard_shows_frames_side_by_side_and_plays_with_moviepy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    writer, told = fake("SummaryWriter", "add_image", "add_video"), set[str]()
    find = importlib.util.find_spec
    from alphabar.training.publishing import loggers

    monkeypatch.setattr(
        loggers, "find_spec", lambda name: None if name == "moviepy" else find(name)
    )
    with pytest.warns(
        UserWarning, match="SummaryWriter shows single frames of the videos; .*moviepy"
    ):
        assert publish(made(CLIPS), str(tmp_path), [writer], told) == []
    assert (
        publish(made(CLIPS), str(tmp_path), [writer], told) == []
    )  # told once: warnings are errors
    assert [name for name, _, _ in writer.calls] == ["add_image", "add_image"]
    np.testing.assert_array_equal(writer.calls[0][1][1], contact_sheet(CLIPS).numpy())
    monkeypatch.setattr(loggers, "find_spec", lambda name: True)
    assert publish(made(CLIPS, fps=5), str(tmp_path), [writer], told) == []
    name, (tag, shown, step), options = writer.calls[-1]
    assert (name, tag, step, options) == ("add_video", tmp_path.name, 500, {"fps": 5})
    assert shown.shape == (1, 4, 3, *image_grid(CLIPS[:, :, 0]).shape[:2])
    assert torch.equal(shown[0, 2].permute(1, 2, 0), image_grid(CLIPS[:, :, 2]))


def test_weights_and_biases_gets_the_frames_and_the_sound_files(tmp_path: Path) -> None:
    logger = fake("WandbLogger", "log_image", "log_video", "log_audio")
    assert publish(made(CLIPS, fps=5), str(tmp_path / "v"), [logger], set()) == []
    ((name, _, call),) = logger.calls
    assert (name, call["key"], call["step"], call["format"]) == ("log_video", "v", 500, ["gif"] * 2)
    assert call["caption"] == ["a cat (seed 0)", "a cat (seed 1)"]
    for gif, clip in zip(call["videos"], CLIPS, strict=True):
        np.testing.assert_array_equal(frames_of(gif), clip.permute(1, 2, 3, 0).numpy())
    sounds = to_pcm(torch.rand(2, 1, 400))
    logger.calls.clear()
    assert publish(made(sounds, sample_rate=8000), str(tmp_path / "s"), [logger], set()) == []
    (_, _, heard), (picture, _, _) = logger.calls
    assert picture == "log_image" and heard["sample_rate"] == [8000, 8000]
    for path, sound in zip(heard["audios"], sounds, strict=True):
        assert Path(path).read_bytes() == wav_bytes(sound, 8000)


def test_the_tracker_of_weights_and_biases(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wandb = types.ModuleType("wandb")
    wandb.Video = lambda data, caption, format: (frames_of(data), caption, format)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    tracker = fake("WandBTracker", "log_images", run=fake("Run", "log"))
    assert publish(made(CLIPS), str(tmp_path), [tracker], set()) == []
    ((_, (logged,), options),) = tracker.run.calls
    assert options == {"commit": False} and not tracker.calls
    (frames, caption, kind), _ = logged[tmp_path.name]
    assert len(frames) == 4 and (caption, kind) == ("a cat (seed 0)", "gif")


def test_tensorboard_plays_sounds(tmp_path: Path) -> None:
    sounds = to_pcm(torch.rand(2, 1, 400, generator=torch.Generator().manual_seed(0)) * 2 - 1)
    with SummaryWriter(str(tmp_path / "log")) as writer:
        assert publish(made(sounds, sample_rate=8000), str(tmp_path / "s"), [writer], set()) == []
    events = EventAccumulator(str(tmp_path / "log")).Reload()
    assert events.Tags()["images"] == ["s"] and sorted(events.Tags()["audio"]) == ["s/0", "s/1"]
    event = events.Audio("s/1")[0]
    assert (event.step, event.sample_rate, event.length_frames) == (500, 8000, 400)
    with wave.open(io.BytesIO(event.encoded_audio_string)) as file:
        heard = np.frombuffer(file.readframes(400), "<i2").astype(int)
    np.testing.assert_allclose(heard, from_pcm(sounds[1, 0]).numpy().astype(int), atol=2)


def test_gif_and_webp_have_every_frame() -> None:
    frames = CLIPS[0].permute(1, 2, 3, 0)
    for kind in ("gif", "webp"):
        shown = frames_of(io.BytesIO(animation_bytes(frames, 8.0, kind)))
        np.testing.assert_array_equal(shown, frames.numpy())


@pytest.mark.parametrize("fps", [8, 24, 30, 50, 60, 240])
def test_a_gif_lasts_as_long_as_its_video(fps: int) -> None:
    frames = torch.arange(100, dtype=torch.uint8).view(-1, 1, 1, 1).expand(-1, 8, 8, 3)
    durations = []
    with Image.open(io.BytesIO(animation_bytes(frames, fps, "gif"))) as image:
        for k in range(getattr(image, "n_frames", 1)):
            image.seek(k)
            durations.append(image.info["duration"])
    assert min(durations) >= 20 and sum(durations) == pytest.approx(100_000 / fps, abs=1000 / fps)
    assert len(durations) == min(100, 5000 // fps)
