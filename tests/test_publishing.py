"""Where previews go: files on a disk and in remote stores, lines that survive a kill, and loggers
of every kind.
"""

import dataclasses
import json
import warnings
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
import torch
from fsspec.implementations.memory import MemoryFileSystem
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from PIL import Image

from alphabar.training.checkpoints.storage import Folder
from alphabar.training.images import image_grid, png_bytes
from alphabar.training.publishing.html import read_records
from alphabar.training.publishing.loggers import LOGGERS
from alphabar.training.publishing.publish import Preview, publish
from callbacks_toy import files

GENERATOR = torch.Generator().manual_seed(0)
IMAGES = torch.randint(0, 256, (3, 3, 4, 6), dtype=torch.uint8, generator=GENERATOR)
PREVIEW = Preview(
    step=500,
    epoch=2,
    weights="raw",
    images=IMAGES,
    seeds=(7, 7, 2**60),
    captions=("a cat", "a dog", ""),
    sampler="dpmpp_2m",
    steps=20,
    guidance_scale=4.5,
    fingerprint="ab" * 32,
    seconds=1.25,
    note="",
)
NAMES = ["raw_0000_seed_7.png", "raw_0001_seed_7.png", f"raw_0002_seed_{2**60}.png"]


def preview(**changes: Any) -> Preview:
    return dataclasses.replace(PREVIEW, **changes)


@pytest.fixture(params=["path", "file", "memory", "moving"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """A folder of every kind of store."""
    return {
        "path": str(tmp_path / "run/previews"),
        "file": f"file://{tmp_path}/run/previews",
        "memory": f"memory://{tmp_path}/previews",
        "moving": f"moving://{tmp_path}/previews",
    }[request.param]


class Moving(MemoryFileSystem):
    """A remote store that knows files by renaming them, as SFTP does; what is uploaded is seen
    while it arrives.
    """

    protocol = "moving"
    store: dict[str, Any] = {}  # noqa: RUF012
    pseudo_dirs = [""]  # noqa: RUF012
    uploads: list[str] = []  # noqa: RUF012

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return MemoryFileSystem._strip_protocol(path.replace("moving://", "memory://"))

    def pipe_file(self, path: str, value: Any, mode: str = "overwrite", **more: Any) -> None:
        self.uploads.append(path)
        super().pipe_file(path, value, mode, **more)


fsspec.register_implementation("moving", Moving, clobber=True)


def names(place: str) -> list[str]:
    filesystem, root = fsspec.core.url_to_fs(place)
    return sorted(path[len(root) :].lstrip("/") for path in filesystem.find(root))


def pixels(content: bytes | None, tmp_path: Path) -> Any:
    (tmp_path / "read.png").write_bytes(content or b"")
    return np.asarray(Image.open(tmp_path / "read.png"))


# Files


def test_what_lies_in_the_folder(place: str, tmp_path: Path) -> None:
    assert publish(PREVIEW, place, [], set()) == []
    ema = preview(weights="ema", images=255 - IMAGES)
    assert publish(ema, place, [], set()) == []
    images = [f"images/step_00000500/{name}" for name in NAMES]
    both = images + [name.replace("raw", "ema") for name in images]
    assert names(place) == sorted(
        [*both, "index.html", "previews.jsonl", "step_00000500.png", "step_00000500_ema.png"]
    )
    folder = Folder(place)
    assert folder.read("step_00000500.png") == png_bytes(image_grid(IMAGES))
    for i, name in enumerate(images):
        np.testing.assert_array_equal(
            pixels(folder.read(name), tmp_path), IMAGES[i].permute(1, 2, 0).numpy()
        )
        shown = pixels(folder.read(name.replace("raw", "ema")), tmp_path)
        np.testing.assert_array_equal(shown, 255 - IMAGES[i].permute(1, 2, 0).numpy())


def test_a_line_says_all_about_an_image(place: str) -> None:
    publish(PREVIEW, place, [], set())
    publish(
        preview(step=1000, guidance_scale=float("nan"), note="half the steps"), place, [], set()
    )
    lines = [
        json.loads(line) for line in (Folder(place).read("previews.jsonl") or b"").splitlines()
    ]
    assert len(lines) == 6
    assert lines[1] == {
        "step": 500,
        "epoch": 2,
        "weights": "raw",
        "image": "images/step_00000500/raw_0001_seed_7.png",
        "grid": "step_00000500.png",
        "index": 1,
        "seed": 7,
        "prompt": "a dog",
        "sampler": "dpmpp_2m",
        "steps": 20,
        "guidance_scale": 4.5,
        "schedule": "ab" * 32,
        "seconds": 1.25,
        "note": "",
    }
    assert (
        lines[2]["seed"] == 2**60
        and lines[3]["guidance_scale"] is None
        and lines[3]["note"] == "half the steps"
    )
    assert all(
        Folder(place).has(line["image"]) and Folder(place).has(line["grid"]) for line in lines[:3]
    )


def test_grey_images_are_grey_files(tmp_path: Path) -> None:
    publish(preview(images=IMAGES[:, :1]), str(tmp_path), [], set())
    assert Image.open(tmp_path / "images/step_00000500" / NAMES[0]).mode == "L"


def test_names_sort_as_the_images_do() -> None:
    many = preview(
        images=IMAGES[:1].expand(12, -1, -1, -1),
        seeds=tuple(range(11, -1, -1)),
        captions=("",) * 12,
    )
    assert sorted(many.image_names) == many.image_names and len(set(many.image_names)) == 12
    assert preview(step=99).grid_name < preview(step=1000).grid_name


def test_seeds_and_captions_must_fit() -> None:
    with pytest.raises(ValueError, match="got 3 images, 2 seeds and 3 captions"):
        preview(seeds=(1, 2))


# Lines


def test_a_step_drawn_again_is_shown_once_as_it_was_drawn_last(place: str) -> None:
    publish(PREVIEW, place, [], set())
    publish(preview(step=1000), place, [], set())
    again = preview(images=IMAGES[:1], seeds=(3,), captions=("a cow",))
    publish(again, place, [], set())
    records = read_records(Folder(place).read("previews.jsonl") or b"")
    assert [(r["step"], r["prompt"]) for r in records] == [
        (500, "a cow"),
        (1000, "a cat"),
        (1000, "a dog"),
        (1000, ""),
    ]


@pytest.mark.parametrize("torn", [1, 50, 200])
def test_a_last_line_torn_by_a_kill_costs_that_line_alone(place: str, torn: int) -> None:
    publish(PREVIEW, place, [], set())
    whole = Folder(place).read("previews.jsonl") or b""
    Folder(place).write("previews.jsonl", whole[:-torn])
    expected = [0, 1] if torn > 1 else [0, 1, 2]  # where only the newline is lost, nothing is
    assert [r["index"] for r in read_records(whole[:-torn])] == expected
    assert publish(preview(step=1000), place, [], set()) == []
    records = read_records(Folder(place).read("previews.jsonl") or b"")
    assert [r["index"] for r in records if r["step"] == 500] == expected
    assert [r["index"] for r in records if r["step"] == 1000] == [0, 1, 2]


@pytest.mark.parametrize(
    "line", [b"\xff\xfe", b"[]", b"5", b"null", b'{"step": 1}', b'{"step": "x"}', b"[" * 100_000]
)
def test_lines_that_are_no_records_are_passed_over(line: bytes) -> None:
    good = json.dumps(PREVIEW.records()[0]).encode()
    assert len(read_records(b"\n".join([line, good, line]))) == 1


def test_raw_comes_before_ema_and_steps_in_order() -> None:
    lines = [
        preview(step=step, weights=weights).records()[0]
        for step in (1000, 500)
        for weights in ("ema", "raw")
    ]
    records = read_records("\n".join(map(json.dumps, lines)).encode())
    assert [(r["step"], r["weights"]) for r in records] == [
        (500, "raw"),
        (500, "ema"),
        (1000, "raw"),
        (1000, "ema"),
    ]


# Places that fail


def test_a_place_that_fails_is_told_and_costs_no_other(tmp_path: Path) -> None:
    (tmp_path / "previews").write_text("in the way")
    shown = Wandb()
    failed = publish(PREVIEW, str(tmp_path / "previews"), [Broken(), shown], set())
    assert all(
        str(failure).startswith(f"cannot write to '{tmp_path / 'previews'}': ")
        for failure in failed[:-1]
    )
    assert str(failed[-1]) == "Broken: ConnectionError: no network"
    assert len(shown.calls) == 1


def test_one_file_in_the_way_costs_that_file_alone(tmp_path: Path) -> None:
    (tmp_path / "step_00000500.png").mkdir()
    (failure,) = publish(PREVIEW, str(tmp_path), [], set())
    assert str(failure).startswith(
        f"cannot write to '{tmp_path}': "
    ) and "step_00000500.png" in str(failure)
    assert {"index.html", "previews.jsonl"} <= set(files(tmp_path)) and len(files(tmp_path)) == 5


def test_an_unknown_store_is_told() -> None:
    failed = publish(PREVIEW, "nowhere://bucket/previews", [], set())
    assert [str(failure) for failure in failed] == [
        "cannot reach 'nowhere://bucket/previews': Protocol not known: nowhere"
    ]


# Storage


def test_a_store_without_whole_uploads_gets_a_neighbour_that_is_moved() -> None:
    Moving.uploads.clear()
    Folder("moving://bucket/a").write("x/b.txt", "one")
    Folder("moving://bucket/a").write("x/b.txt", "two")
    assert Folder("moving://bucket/a").read("x/b.txt") == b"two"
    assert len(Moving.uploads) == 2 and all(
        path.startswith("/bucket/a/x/.b.txt.") for path in Moving.uploads
    )
    assert names("moving://bucket/a") == ["x/b.txt"]


def test_a_store_that_cannot_move_gets_the_file_all_the_same(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def mv(*_: Any, **__: Any) -> None:
        raise NotImplementedError

    monkeypatch.setattr(Moving, "mv", mv)
    Folder("moving://bucket/still").write("b.txt", "one")
    assert (
        names("moving://bucket/still") == ["b.txt"]
        and Folder("moving://bucket/still").read("b.txt") == b"one"
    )


@pytest.mark.parametrize("place", ["path", "memory"], indirect=True)
def test_folders(place: str) -> None:
    folder = Folder.of(place)
    folder.require_writable()
    assert folder.name == "previews" and names(place) == []
    (folder / "deep").write("a.txt", "x")
    assert folder.read("deep/a.txt") == b"x" and folder.has("deep/a.txt") and not folder.has("deep")
    assert folder.read("deep/b.txt") is None and not folder.has("b.txt")
    folder.remove("deep/b.txt")
    folder.remove("deep")
    assert names(place) == []


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("a file stands where the folder would go, which stops root as well")
    with pytest.raises(OSError, match="cannot write to the output folder"):
        Folder.of(tmp_path / "a").require_writable()


# Loggers: the signatures are those of lightning 2.6.6, mlflow 3.17 and comet_ml 3.58


class Fake:
    def __init__(self) -> None:
        self.calls: list[dict[str, Any]] = []


class Wandb(Fake):
    def log_image(
        self, key: str, images: list[Any], step: int | None = None, **kwargs: Any
    ) -> None:
        assert isinstance(images, list) and all(
            len(values) == len(images) for values in kwargs.values()
        )
        self.calls.append({"key": key, "images": images, "step": step, **kwargs})


class MlflowClient(Fake):
    def log_image(
        self,
        run_id: str,
        image: Any,
        artifact_file: str | None = None,
        key: str | None = None,
        step: int | None = None,
        timestamp: int | None = None,
        synchronous: bool | None = None,
    ) -> None:
        assert (artifact_file is None) != (key is None)
        self.calls.append({"key": key, "images": [image], "step": step, "run_id": run_id})


class CometExperiment(Fake):
    def log_image(
        self,
        image_data: Any,
        name: str | None = None,
        overwrite: bool = False,
        image_format: str = "png",
        image_scale: float = 1.0,
        image_shape: Any = None,
        image_colormap: Any = None,
        image_minmax: Any = None,
        image_channels: str = "last",
        copy_to_tmp: bool = True,
        step: int | None = None,
        annotations: Any = None,
        metadata: Any = None,
    ) -> None:
        self.calls.append({"key": name, "images": [image_data], "step": step})


class SummaryWriter(Fake):
    def add_image(
        self,
        tag: str,
        img_tensor: Any,
        global_step: Any = None,
        walltime: Any = None,
        dataformats: str = "CHW",
    ) -> None:
        assert dataformats == "HWC"
        self.calls.append(
            {"key": tag, "images": [Image.fromarray(img_tensor)], "step": global_step}
        )


class Lit(Fake):
    def log_file(self, path: str) -> None:
        self.calls.append({"path": path})


class Broken(Fake):
    def log_image(self, **given: Any) -> None:
        raise ConnectionError("no network")


def with_experiment(name: str, experiment: Any, **attributes: Any) -> Any:
    return type(name, (), {"experiment": experiment, **attributes})()


def named(name: str, kind: type[Fake]) -> Any:
    return type(name, (kind,), {})()


GRID = (18, 14)  # width and height of three images of 6 x 4, in two columns


@pytest.mark.parametrize("weights", ["raw", "ema"])
def test_loggers_are_shown_the_grid(tmp_path: Path, weights: str) -> None:
    mlflow, comet, writer, unknown, album = (
        MlflowClient(),
        CometExperiment(),
        SummaryWriter(),
        SummaryWriter(),
        Wandb(),
    )
    loggers = [
        with_experiment("MLFlowLogger", mlflow, run_id="run5"),
        with_experiment("CometLogger", comet),
        with_experiment("TensorBoardLogger", writer),
        with_experiment("SomeLogger", unknown),
        named("OtherLogger", type(album)),
    ]
    assert publish(preview(weights=weights), str(tmp_path / "mine"), loggers, set()) == []
    tag = {"raw": "mine", "ema": "mine_ema"}[weights]
    for calls in (mlflow.calls, comet.calls, writer.calls, unknown.calls, loggers[-1].calls):
        (call,) = calls
        assert (call["key"], call["step"], call["images"][0].size) == (tag, 500, GRID)
        np.testing.assert_array_equal(np.asarray(call["images"][0]), image_grid(IMAGES).numpy())
    assert mlflow.calls[0]["run_id"] == "run5"


def test_weights_and_biases_is_shown_every_image_with_its_caption(tmp_path: Path) -> None:
    class Mine(named("WandbLogger", Wandb).__class__):
        """A logger that inherits is known by what it inherits from."""

    logger = Mine()
    publish(PREVIEW, str(tmp_path), [logger], set())
    (call,) = logger.calls
    assert (
        call["caption"] == ["a cat (seed 7)", "a dog (seed 7)", f"seed {2**60}"]
        and call["step"] == 500
    )
    for image, expected in zip(call["images"], IMAGES, strict=True):
        np.testing.assert_array_equal(np.asarray(image), expected.permute(1, 2, 0).numpy())


def test_lit_logger_is_given_the_file_where_there_is_one(tmp_path: Path, recwarn: Any) -> None:
    logger, told = named("LitLogger", Lit), set[str]()
    publish(PREVIEW, f"file://{tmp_path}", [logger], told)
    assert [Path(call["path"]).read_bytes() for call in logger.calls] == [
        png_bytes(image_grid(IMAGES))
    ]
    assert not recwarn.list
    with pytest.warns(
        UserWarning, match="LitLogger takes no images; previews are in 'memory://a/b' alone"
    ):
        publish(PREVIEW, "memory://a/b", [logger], told)


def test_loggers_without_images_are_told_of_once(tmp_path: Path) -> None:
    told, loggers = (
        set[str](),
        [CSVLogger(tmp_path / "csv"), with_experiment("Plain", None), object()],
    )
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for step in (500, 1000):
            assert publish(preview(step=step), str(tmp_path / "p"), loggers, told) == []
    texts = [str(w.message) for w in caught]
    assert texts == [
        f"{name} takes no images; previews are in '{tmp_path / 'p'}' alone"
        for name in ("CSVLogger", "Plain", "object")
    ]


def test_tensorboard_itself(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    logger = TensorBoardLogger(tmp_path, name="run", version="a")
    for weights in ("raw", "ema"):
        assert publish(preview(weights=weights), str(tmp_path / "previews"), [logger], set()) == []
    logger.experiment.close()
    events = EventAccumulator(str(tmp_path / "run/a"), size_guidance={"images": 0})
    events.Reload()
    assert events.Tags()["images"] == ["previews", "previews_ema"]
    for tag in ("previews", "previews_ema"):
        (event,) = events.Images(tag)
        assert event.step == 500
        np.testing.assert_array_equal(
            pixels(event.encoded_image_string, tmp_path), image_grid(IMAGES).numpy()
        )


def test_every_logger_of_lightning_is_listed() -> None:
    from lightning.pytorch import loggers

    assert set(loggers.__all__) - {"Logger"} <= set(LOGGERS)
