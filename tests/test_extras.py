"""What needs an optional package says which extra to install, and nothing else needs it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from test_packaging import pyproject

OPTIONAL = [
    *["POT", "accelerate", "bitsandbytes", "datasets", "imageio", "imageio_ffmpeg", "jsonargparse"],
    *["matplotlib", "moviepy", "numba", "ot", "peft", "sklearn", "tensorboard", "tensorboardX"],
    *["torchsde", "transformers", "triton", "wandb"],
]
"""Packages that alphabar does not need."""

USES = {
    "noise=optimal_transport": (
        "ot",
        "Noising(scaled, noise=OptimalTransport(regularization=0.1), seed=0)(torch.randn(2, 3, 4, 4))",
    ),
    "noise=brownian": (
        "brownian",
        "Sampler(scaled, 'DPM++ 2M SDE', 3)(lambda x, t: x, (1, 4), seeds=0, noise='brownian')",
    ),
    "a plot": ("matplotlib", "plot_grids(scaled)"),
    "a plot of a table": ("matplotlib", "plot_table(Sampler(scaled, 'euler', 3).table)"),
    "alphabar plot": ("matplotlib", "run(['plot', 'grids', '--out', 'grids.png'])"),
    "video_format": ("video", "Media(video_format='mp4')"),
    "lora": ("lora", "TextToImage('nowhere', 64, lora={'r': 4})"),
    "train_brightness.py": ("demo", "example('train_brightness')"),
    "train_flow.py": ("demo", "example('train_flow')"),
    "finetune_text_to_image.py": ("finetune", "example('finetune_text_to_image')"),
}
"""A use of an optional package, its extra, and the code."""

SCRIPT = """
import json, runpy, sys
import diffusers, lightning.pytorch, torch
for name in list(sys.modules):  # those two import what is installed
    if name.partition(".")[0] in {optional!r}:
        del sys.modules[name]
for name in {optional!r}:
    sys.modules[name] = None
from alphabar import noising, sampling, training, callbacks
for package in (noising, sampling, training, callbacks):
    for name in package.__all__:
        getattr(package, name)
from alphabar.noising import NoiseSchedule, Noising
from alphabar.noising.noise import OptimalTransport
from alphabar.sampling import Sampler
from alphabar.training.cli.command import parser_of_all
from alphabar.training.diffusers_text_to_image import TextToImage
from alphabar.training.media.options import Media
from alphabar.training.plots import plot_grids, plot_table

scaled = NoiseSchedule.scaled_linear()
noised = Noising(scaled, seed=0)(torch.randn(2, 3, 4, 4), step=0)  # without numba
said = {{"without": list(noised.x.shape)}}

def run(arguments):

    import alphabar.training.cli.plot as plot
    plot.run(parser_of_all(arguments).parse_args(arguments))

def example(name):
    runpy.run_path(f"{examples}/{{name}}.py")

for use, code in {uses!r}.items():
    try:
        exec(code)
        said[use] = "no error"
    except ImportError as error:
        said[use] = str(error)
print(json.dumps(said))
"""


@pytest.fixture(scope="module")
def said(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    examples = Path(__file__).parent.parent / "examples"
    uses = {use: code for use, (_, code) in USES.items()}
    script = SCRIPT.format(optional=OPTIONAL, uses=uses, examples=examples)
    folder = tmp_path_factory.mktemp("without_extras")
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=folder, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_training_needs_no_extra(said: dict[str, object]) -> None:
    assert said["without"] == [2, 3, 4, 4]


@pytest.mark.parametrize("use", USES)
def test_an_error_names_the_extra(use: str, said: dict[str, str]) -> None:
    extra, _ = USES[use]
    assert f"pip install 'alphabar[{extra}]'" in said[use]
    assert extra in pyproject()["project"]["optional-dependencies"]


def test_the_documentation_lists_every_extra() -> None:
    page = (Path(__file__).parent.parent / "docs" / "start" / "demo.md").read_text(encoding="utf-8")
    of_developers = {"dev", "docs", "release"}
    extras = {*pyproject()["project"]["optional-dependencies"]} - of_developers
    assert [extra for extra in sorted(extras) if f"`{extra}`" not in page] == []
