"""The pages for readers hold: their Python runs, their commands parse, their links lead somewhere.

The blocks of a page are run in order in one namespace, with small things in the place of the
reader's own: ``network``, ``schedule``, ``noising``, ``data``, ``dataloader``, ``optimizer`` and
``shape``.
"""

import re
import shlex
import warnings
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from site_build import gallery, pictures, reference
from torch import Tensor, nn
from torch.utils.data import DataLoader

from alphabar.noising import NoiseSchedule, Noising
from alphabar.training.cli.command import parser_of_all
from registries import restored

ROOT = Path(__file__).parent.parent
GENERATED = ("reference", "gallery", "pictures", "figures", "_build")
PAGES = {
    page.relative_to(ROOT).as_posix(): page.read_text(encoding="utf-8")
    for page in [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
    if not {*page.relative_to(ROOT / "docs" if page.parent != ROOT else ROOT).parts} & {*GENERATED}
}
ELSEWHERE = {"docs/rollouts.md"}  # run by the tests of its subject
SMALLER = {
    "max_steps=10_000": "max_steps=2",
    "every_n_train_steps=500": "every_n_train_steps=2",
    "step % 500": "step % 2",
    "(4, 64, 64)": "(4, 8, 8)",
    "seeds=32": "seeds=4",
}
PRINTS = re.compile(r"```python\n((?:(?!```).)*?)```\n+```text\n(.*?)```", re.DOTALL)
"""A block and what it prints, shown directly below it."""
ARGUMENTS = ["train.py", "--prediction_type", "v_prediction", "--rescale_betas_zero_snr"]


def blocks(text: str, language: str) -> list[str]:
    """Return the code blocks of a language."""
    return re.findall(rf"^ *```{language}\n(.*?)^ *```", text, flags=re.DOTALL | re.MULTILINE)


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1))

    def forward(self, x: Tensor, t: Tensor, **conditioning: Any) -> Tensor:
        return self.scale * x


def given() -> dict[str, Any]:
    """Return what a page may use without making it."""
    network = Network()
    schedule = NoiseSchedule.scaled_linear(prediction="v_prediction").zero_terminal_snr()
    data = torch.randn(8, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    return {
        "torch": torch,
        "network": network,
        "schedule": schedule,
        "noising": Noising(schedule),
        "data": list(data.split(2)),
        "dataloader": DataLoader(cast(Any, data), batch_size=2),
        "optimizer": torch.optim.SGD(network.parameters(), 0.01),
        "shape": (1, 3, 8, 8),
    }


def any_loop_saves_and_samples(names: dict[str, Any], folder: Path) -> None:
    assert names["images"].shape == (4, 3, 64, 64)
    assert NoiseSchedule.from_pretrained(folder / "out/scheduler") == names["schedule"]


def loops_preview_the_average(names: dict[str, Any], folder: Path) -> None:
    assert list(folder.rglob("step_00000002_ema.png"))


def lightning_previews_and_saves(names: dict[str, Any], folder: Path) -> None:
    assert list(folder.rglob("step_00000002.png"))
    assert list(folder.rglob("scheduler_config.json"))


def flags_change_the_schedule(names: dict[str, Any], folder: Path) -> None:
    assert names["noising"].schedule.has_zero_terminal_snr


Check = Callable[[dict[str, Any], Path], None]
LEAVES: dict[str, Check] = {
    "README.md": any_loop_saves_and_samples,
    "docs/start/loop.md": any_loop_saves_and_samples,
    "docs/start/lightning.md": lightning_previews_and_saves,
    "docs/start/own_loop.md": loops_preview_the_average,
    "docs/start/scripts.md": flags_change_the_schedule,
}
"""What the blocks of a page leave behind, beside running."""


@pytest.fixture(autouse=True)
def what_a_page_registers_is_gone_afterwards() -> Iterator[None]:
    with restored():
        yield


@pytest.mark.parametrize(
    "page", [p for p, text in PAGES.items() if blocks(text, "python") and p not in ELSEWHERE]
)
def test_the_python_of_a_page_runs(
    page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ARGUMENTS)
    names = given()
    shown = dict(PRINTS.findall(PAGES[page]))
    for number, code in enumerate(blocks(PAGES[page], "python"), start=1):
        capsys.readouterr()
        expected = shown.get(code)
        for long, short in SMALLER.items():
            code = code.replace(long, short)
        with warnings.catch_warnings():
            warnings.filterwarnings("error", category=UserWarning, module=r"alphabar|.*\.md")
            warnings.filterwarnings("error", message="weighting")
            exec(compile(code, f"{page}, block {number}", "exec"), names)
        if expected is not None:
            assert capsys.readouterr().out == expected, f"{page}, block {number}"
    if page in LEAVES:
        LEAVES[page](names, tmp_path)


def test_there_is_something_to_run() -> None:
    assert set(LEAVES) | ELSEWHERE <= set(PAGES)
    assert sum(len(blocks(text, "python")) for text in PAGES.values()) >= 16


def commands(text: str) -> Iterator[list[str]]:
    """Yield the words after ``alphabar`` of each such command in the blocks of bash."""
    for block in blocks(text, "bash"):
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            words = words[: next((i for i, w in enumerate(words) if w in "|>&&;"), None)]
            if words and words[0] == "alphabar":
                yield words[1:]


@pytest.mark.parametrize("page", [p for p, text in PAGES.items() if any(commands(text))])
def test_the_commands_of_a_page_parse(page: str, capsys: pytest.CaptureFixture[str]) -> None:
    for words in commands(PAGES[page]):
        try:
            parser_of_all(words).parse_args(words)
        except SystemExit as left:
            assert left.code == 0, f"alphabar {shlex.join(words)}: {capsys.readouterr().err}"


def test_no_command_is_missed() -> None:
    """A block without a language would not be read."""
    for page, text in PAGES.items():
        for block in blocks(text, ""):
            assert not re.search(r"^\s*alphabar ", block, re.MULTILINE), (page, block)


@cache
def generated() -> frozenset[Path]:
    """Return the files below docs/ that a build of the site writes."""
    files = [*reference.files(), *gallery.files(), *pictures.files()]
    return frozenset(ROOT / "docs" / file for file in files)


def links(text: str) -> list[str]:
    """Return the targets of the links and pictures of a page that are not on the web."""
    prose = re.sub(r"^ *```.*?^ *```", "", text, flags=re.DOTALL | re.MULTILINE)
    targets = re.findall(r"\]\(([^)\s]+)\)", re.sub(r"`[^`\n]*`", "", prose))
    return [t.partition("#")[0] for t in targets if not re.match(r"[a-z]+:|#", t)]


@pytest.mark.parametrize("page", PAGES)
def test_the_links_of_a_page_lead_somewhere(page: str) -> None:
    for target in links(PAGES[page]):
        path = Path(ROOT, page).parent.joinpath(target).resolve()
        written = path.relative_to(ROOT).parts[:2] in {("docs", name) for name in GENERATED}
        assert path in generated() if written else path.exists(), f"{page}: {target}"


def test_scripts_in_commands_exist() -> None:
    for page, text in PAGES.items():
        for block in [*blocks(text, "bash"), *blocks(text, "")]:
            for script in re.findall(r"(?<![\w/.-])(?:examples|benchmarks|docs)/[\w/]+\.py", block):
                assert (ROOT / script).is_file(), f"{page}: {script}"


def test_every_public_name_is_documented() -> None:
    for package in reference.PACKAGES:
        for name in reference.public_names(package):
            assert reference.summary(package, name)


def test_links_to_generated_pages_are_those_that_are_written() -> None:
    files = {file.relative_to(ROOT / "docs").as_posix() for file in generated()}
    assert {"reference/noising/NoiseSchedule.md", "gallery/methods/unipc.md"} <= files
    assert {"reference/index.md", "gallery/grids/index.md"} <= files
