"""The page of previews in a real browser, without a window and without a server: what it shows, and
what it does not run.
"""

import base64
import dataclasses
import html
import io
import json
import os
import re
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from alphabar.training import Media
from alphabar.training.publishing.html import render
from alphabar.training.publishing.publish import Preview, publish

BROWSER = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
in_browser = pytest.mark.skipif(BROWSER is None, reason="needs chromium")
FLAGS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--hide-scrollbars",
    "--force-device-scale-factor=1",
    "--window-size=1200,800",
]
HOSTILE = (
    '</script><b id="bad">bold</b><img src=x onerror="document.title=1"> & \u2028 {{data}} \ud800'
)
PROMPTS = ("a cat", HOSTILE, "a cat")
SEEDS = (4, 4, 2**60)


def colour(step: int, weights: str, row: int) -> tuple[int, int, int]:
    """One that no other picture has, nor the page."""
    return 20 + step // 10, 130 + 40 * row, 200 if weights == "raw" else 60


def drawn(step: int, weights: str = "raw") -> Preview:
    colours = torch.tensor([colour(step, weights, row) for row in range(3)], dtype=torch.uint8)
    images = colours[:, :, None, None].expand(3, 3, 16, 16)
    return Preview(
        step, 1, weights, images, SEEDS, PROMPTS, "dpmpp_2m", 20, 1.0, "ab" * 32, 1.0, ""
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run") / "previews & <i>"
    for step in (1000, 500, 1500):
        for weights in ("raw", "ema"):
            assert publish(drawn(step, weights), str(folder), [], set()) == []
    return folder


@pytest.fixture
def browse(folder: Path, tmp_path: Path) -> Callable[..., str]:
    """Open the page and return its DOM, or what a screenshot says; ``keys`` are pressed first."""

    def browse(place: str = "", *flags: str, keys: str = "", page: Path | None = None) -> str:
        assert BROWSER is not None
        page = page or folder / "index.html"
        if keys:
            events = "".join(
                f"""document.dispatchEvent(new KeyboardEvent("keydown", {{key: "{key.split("+")[-1]}",
                shiftKey: {str("+" in key).lower()}, bubbles: true}}));"""
                for key in keys.split()
            )
            text = page.read_text().replace("</body>", f"<script>{events}</script></body>")
            page = page.with_name("keys.html")
            page.write_text(text)
        command = [
            BROWSER,
            *FLAGS,
            f"--user-data-dir={tmp_path / 'profile'}",
            *(flags or ["--dump-dom"]),
        ]
        result = subprocess.run(
            [*command, f"{page.as_uri()}#{place}"],
            capture_output=True,
            text=True,
            timeout=120,
            check=True,
        )
        return result.stdout

    return browse


class Texts(HTMLParser):
    """The elements of a page, each with its class, and the text in it."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.words.append(data)


def sources(page: str) -> list[str]:
    body = page[page.index("<main") : page.index("</main>")]
    return re.findall(r'<img [^>]*src="([^"]*)"', body)


def names(*wanted: tuple[int, str, int]) -> list[str]:
    return [
        f"images/step_{step:08d}/{weights}_{row:04d}_seed_{SEEDS[row]}.png"
        for step, weights, row in wanted
    ]


@in_browser
def test_rows_are_images_and_columns_are_steps(browse: Callable[..., str]) -> None:
    page = browse()
    assert sources(page) == names(
        *((step, "raw", row) for row in range(3) for step in (500, 1000, 1500))
    )
    headings = re.findall(r'class="column"[^>]*>(\d+)<', page)
    assert headings == ["500", "1000", "1500"]
    assert "seed 4" in page and f"seed {2**60}" in page  # not what a float makes of it
    assert (
        html.unescape(page[page.index("<title>") + 7 : page.index("</title>")]) == "previews & <i>"
    )


@in_browser
def test_prompts_are_text(browse: Callable[..., str]) -> None:
    found = Texts(browse())
    assert not [
        attributes
        for tag, attributes in found.tags
        if attributes.get("id") == "bad" or "onerror" in attributes
    ]
    assert any(word == HOSTILE.replace("\ud800", "?") for word in found.words)
    assert len([tag for tag, _ in found.tags if tag == "script"]) == 2


@in_browser
@pytest.mark.parametrize(
    ("place", "expected"),
    [
        ("view=one&b=1000:raw", [(1000, "raw", row) for row in range(3)]),
        ("view=one&weights=ema", [(1500, "ema", row) for row in range(3)]),
        ("view=one&b=1100:raw", [(1000, "raw", row) for row in range(3)]),
        ("view=compare", [(step, "raw", row) for row in range(3) for step in (500, 1500)]),
        (
            "view=compare&weights=both&a=1000:raw&b=1000:ema",
            [(1000, weights, row) for row in range(3) for weights in ("raw", "ema")],
        ),
        ("view=one&q=cat", [(1500, "raw", 0), (1500, "raw", 2)]),
        ("view=one&q=4+CAT", [(1500, "raw", 0)]),
        (
            "view=nonsense&weights=nonsense&how=constructor&q=4+cat",
            [(step, "raw", 0) for step in (500, 1000, 1500)],
        ),
    ],
)
def test_views(
    browse: Callable[..., str], place: str, expected: list[tuple[int, str, int]]
) -> None:
    assert sources(browse(place)) == names(*expected)


@in_browser
@pytest.mark.parametrize(
    ("place", "keys", "expected"),
    [
        ("view=one&q=4+cat", "ArrowLeft", [(1000, "raw", 0)]),
        ("view=one&q=4+cat", "ArrowLeft ArrowLeft ArrowLeft", [(500, "raw", 0)]),
        ("view=one&q=4+cat", "ArrowLeft ArrowRight", [(1500, "raw", 0)]),
        ("view=one&q=4+cat", "w", [(1500, "ema", 0)]),
        ("view=one&q=4+cat", "w w w", [(1500, "raw", 0)]),
        ("q=4+cat", "3 ArrowLeft", [(500, "raw", 0), (1000, "raw", 0)]),
        ("q=4+cat", "3 Shift+ArrowRight", [(1000, "raw", 0), (1500, "raw", 0)]),
        ("view=compare&q=4+cat", "1", [(step, "raw", 0) for step in (500, 1000, 1500)]),
    ],
)
def test_keys(
    browse: Callable[..., str], place: str, keys: str, expected: list[tuple[int, str, int]]
) -> None:
    assert sources(browse(place, keys=keys)) == names(*expected)


def places(picture: np.ndarray, wanted: tuple[int, int, int]) -> tuple[float, float] | None:
    """The middle (x, y) of what has this colour; None where nothing has."""
    rows, columns = np.nonzero((np.abs(picture.astype(int) - wanted) <= 1).all(-1))
    return (float(columns.mean()), float(rows.mean())) if len(rows) > 500 else None


def screenshot(browse: Callable[..., str], path: Path, place: str) -> np.ndarray:
    browse(place, f"--screenshot={path}")
    return np.asarray(Image.open(path).convert("RGB"))


@in_browser
def test_the_same_seed_is_seen_across_steps_side_by_side(
    browse: Callable[..., str], tmp_path: Path
) -> None:
    picture = screenshot(browse, tmp_path / "a.png", "view=steps")
    found = [
        [places(picture, colour(step, "raw", row)) for step in (500, 1000, 1500)]
        for row in range(3)
    ]
    middles = np.array(found, dtype=float)  # (row, step, xy); fails where a picture was not shown
    # one height for one seed
    np.testing.assert_allclose(np.ptp(middles[:, :, 1], axis=1), 0, atol=1)
    # one column for one step
    np.testing.assert_allclose(np.ptp(middles[:, :, 0], axis=0), 0, atol=1)
    assert (np.diff(middles[0, :, 0]) > 100).all() and (np.diff(middles[:, 0, 1]) > 100).all()
    assert places(picture, colour(500, "ema", 0)) is None
    both = screenshot(
        browse, tmp_path / "b.png", "view=compare&weights=both&a=500:raw&b=500:ema&how=wipe&cut=50"
    )
    (left, y), (right, same) = (
        places(both, colour(500, weights, 0)) or (0, 0) for weights in ("raw", "ema")
    )
    assert left and left < right and abs(y - same) <= 1  # the two halves of one picture


@in_browser
def test_light_and_dark_and_narrow(browse: Callable[..., str], tmp_path: Path) -> None:
    light = screenshot(browse, tmp_path / "a.png", "theme=light")
    dark = screenshot(browse, tmp_path / "b.png", "theme=dark")
    assert light[-60, -60].min() > 200 and dark[-60, -60].max() < 60
    browse("view=one", "--window-size=500,800", f"--screenshot={tmp_path / 'c.png'}")
    narrow = np.asarray(Image.open(tmp_path / "c.png").convert("RGB"))
    middles = [places(narrow, colour(1500, "raw", row)) for row in range(2)]
    assert narrow.shape[1] == 500 and None not in middles


@in_browser
def test_a_picture_that_is_gone_and_a_page_without_any(
    browse: Callable[..., str], tmp_path: Path
) -> None:
    publish(drawn(500), str(tmp_path), [], set())
    (tmp_path / drawn(500).image_names[0]).unlink()
    page = browse(
        "view=one", "--virtual-time-budget=2000", "--dump-dom", page=tmp_path / "index.html"
    )
    assert page.count('"picture missing"') == 1
    (tmp_path / "empty.html").write_text(render([], "empty"))
    assert "No previews yet" in browse(page=tmp_path / "empty.html")


@in_browser
def test_another_schedule_in_the_middle_is_marked(
    browse: Callable[..., str], tmp_path: Path
) -> None:
    previews = [drawn(500), dataclasses.replace(drawn(1000), fingerprint="cd" * 32), drawn(1500)]
    previews[2] = dataclasses.replace(previews[2], fingerprint="cd" * 32, sampler="euler")
    for preview in previews:
        publish(preview, str(tmp_path), [], set())
    page = browse(page=tmp_path / "index.html")
    assert re.findall(r'<small class="warn">([^<]*)<', page) == ["other schedule", "other sampler"]


def test_the_page_asks_nobody_for_anything(folder: Path) -> None:
    page = (folder / "index.html").read_text(encoding="utf-8")
    assert not re.search(r"https?://|//cdn|fetch\(|XMLHttpRequest|import\(|@import|url\(", page)
    found = Texts(page)
    assert not [
        tag
        for tag, attributes in found.tags
        if tag == "link" or ("src" in attributes and tag != "img")
    ]
    assert page.count("</script>") == 2


def test_the_data_of_the_page(folder: Path) -> None:
    page = (folder / "index.html").read_text(encoding="utf-8")
    text = page[page.index('type="application/json">') + 24 :].split("</script>")[0]
    # whatever the prompts are, no parser sees a tag
    assert not set("<>&") & set(text) and text.isascii()
    data = json.loads(text)
    assert [row["prompt"] for row in data["rows"]] == [
        prompt.replace("\ud800", "?") for prompt in PROMPTS
    ]
    assert [row["seed"] for row in data["rows"]] == ["4", "4", str(2**60)]
    steps = [(preview["step"], preview["weights"]) for preview in data["previews"]]
    assert steps == [(step, weights) for step in (500, 1000, 1500) for weights in ("raw", "ema")]


def test_equal_seeds_with_equal_prompts_have_rows_of_their_own() -> None:
    twice = dataclasses.replace(drawn(500), seeds=(1, 1, 1), captions=("", "", "x"))
    page = render(twice.records(), "t")
    data = json.loads(page[page.index('type="application/json">') + 24 :].split("</script>")[0])
    assert (
        len(data["rows"]) == 3 and list(data["previews"][0]["images"].values()) == twice.image_names
    )


def test_package_data_is_declared() -> None:
    """What lies beside the modules is in the wheel only where pyproject.toml names it."""
    root = Path(__file__).resolve().parent.parent
    text = (root / "pyproject.toml").read_text(encoding="utf-8")
    lying = {
        path.relative_to(root).as_posix()
        for package in ("noising", "sampling", "training", "callbacks")
        for path in (root / package).rglob("*")
        if path.suffix == ".html"
    }
    assert lying == {"training/publishing/page.html"}
    assert '"alphabar.training.publishing" = ["page.html"]' in text


@contextmanager
def opened(page: Path, profile: Path) -> Iterator[Callable[..., dict[str, Any]]]:
    """A browser with the page, whose clock runs; yields ``call(method, **parameters)`` of its
    DevTools protocol, over a pipe.
    """
    assert BROWSER is not None
    (theirs, ours), (answers, their_answers) = os.pipe(), os.pipe()
    pipes = f'exec "$0" "$@" 3<&{theirs} 4>&{their_answers}'
    command = [BROWSER, *FLAGS, f"--user-data-dir={profile}", "--remote-debugging-pipe"]
    process = subprocess.Popen(
        ["bash", "-c", pipes, *command],  # sh takes numbers of one digit
        pass_fds=(theirs, their_answers),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    os.close(theirs)
    os.close(their_answers)
    session: dict[str, str] = {}
    with open(ours, "wb", buffering=0) as requests, open(answers, "rb", buffering=0) as replies:
        rest, number = b"", 0

        def call(method: str, **parameters: Any) -> dict[str, Any]:
            nonlocal rest, number
            number += 1
            message = {"id": number, "method": method, "params": parameters, **session}
            requests.write(json.dumps(message).encode() + b"\0")
            while True:
                while b"\0" not in rest:
                    got = replies.read(1 << 20)
                    assert got, "the browser closed"
                    rest += got
                one, _, rest = rest.partition(b"\0")
                answer = json.loads(one)
                if answer.get("id") == number:
                    return answer["result"]

        try:
            target = call("Target.createTarget", url=page.as_uri())["targetId"]
            found = call("Target.attachToTarget", targetId=target, flatten=True)
            session["sessionId"] = found["sessionId"]
            yield call
        finally:
            process.terminate()
            process.wait(30)


@in_browser
def test_videos_play(tmp_path: Path) -> None:
    """Screenshots at different times show different frames, and each frame is seen."""
    colours = torch.tensor([[250, 0, 0], [0, 251, 0], [0, 0, 252], [253, 0, 254]])
    video = colours.to(torch.uint8).T[None, :, :, None, None].expand(1, 3, 4, 16, 16)
    preview = dataclasses.replace(
        drawn(500), images=video, seeds=(4,), captions=("",), media=Media(fps=3)
    )
    assert publish(preview, str(tmp_path), [], set()) == []
    seen: set[int] = set()
    with opened(tmp_path / "index.html", tmp_path / "profile") as call:
        for _ in range(60):
            shot = base64.b64decode(call("Page.captureScreenshot")["data"])
            with Image.open(io.BytesIO(shot)) as image:
                pixels = np.asarray(image.convert("RGB"))
            shown = [k for k in range(4) if (pixels == colours[k].numpy()).all(2).sum() > 10_000]
            assert len(shown) <= 1  # one frame at a time; none before the page is painted
            seen.update(shown)
            if len(seen) == 4:
                break
            time.sleep(0.1)
    assert seen == {0, 1, 2, 3}


@in_browser
def test_films_and_sounds_have_players(browse: Callable[..., str], tmp_path: Path) -> None:
    records = [
        record | {"video": f"images/{index}.mp4"}
        for index, record in enumerate(drawn(500).records())
    ]
    (tmp_path / "film.html").write_text(render(records, "films"))
    found = Texts(browse("view=one", page=tmp_path / "film.html"))
    films = [
        attributes["src"]
        for tag, attributes in found.tags
        if tag == "video" and "src" in attributes
    ]
    assert films == [f"images/{index}.mp4" for index in range(3)]
    for record in records:
        record["sound"] = record.pop("video").replace(".mp4", ".wav")
    page = tmp_path / "sound.html"
    click = "<script>document.querySelector('.picture').click()</script></body>"
    page.write_text(render(records, "sounds").replace("</body>", click))
    text = browse("view=one", page=page)
    assert re.search(r'<audio id="sound"[^>]* src="images/0.wav"', text)
    assert re.search(r'<video id="film"[^>]* hidden', text)
    assert sources(text) == names(*((500, "raw", row) for row in range(3)))
