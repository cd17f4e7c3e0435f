"""Every example runs, short; on the digits that ship with scikit-learn as a folder of PNG files
too.
"""

import importlib.util
import json
import shutil
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import diffusers
import pytest
from PIL import Image

from alphabar.noising import NoiseSchedule
from alphabar.training.cli.command import main as command_line

EXAMPLES = Path(__file__).parent.parent / "examples"
V_ZERO_SNR = ["--prediction_type", "v_prediction", "--rescale_betas_zero_snr"]
SHORT = [
    "--max_steps",
    "2",
    "--batch_size",
    "2",
    "--num_samples",
    "4",
    "--sampling_steps",
    "2",
    "--preview_every",
    "1",
]


def load(name: str) -> ModuleType:
    path = EXAMPLES / f"{name}.py"
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def small(channels: int) -> diffusers.UNet2DModel:
    blocks: dict[str, Any] = {
        "down_block_types": ("DownBlock2D",) * 2,
        "up_block_types": ("UpBlock2D",) * 2,
    }
    size = {
        "block_out_channels": (8, 16),
        "layers_per_block": 1,
        "norm_num_groups": 8,
        "sample_size": 32,
    }
    return diffusers.UNet2DModel(in_channels=channels, out_channels=channels, **size, **blocks)


def brightness(network: Any = small) -> ModuleType:
    """The example with 16 discs, and with its own network where ``network`` is None."""
    example = load("train_brightness")
    discs = example.discs
    example.discs = lambda count, *rest: discs(min(count, 16), *rest)
    example.make_network = network or example.make_network
    return example


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run."""
    folder = tmp_path_factory.mktemp("trained")
    brightness().main([*V_ZERO_SNR, *SHORT, "--out", str(folder)])
    return folder


def test_brightness_leaves_what_the_readme_promises(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ratios = brightness().main([*V_ZERO_SNR, *SHORT, "--compare", "--out", str(tmp_path)])
    assert set(ratios) == {"v_prediction + zero terminal SNR", "epsilon, ordinary"}
    assert json.loads((tmp_path / "brightness.json").read_text()) == ratios
    for name in (
        "brightness.ckpt",
        "brightness.png",
        "scheduler/scheduler_config.json",
        "ordinary/brightness.ckpt",
    ):
        assert (tmp_path / name).is_file(), name
    assert len(list((tmp_path / "previews").glob("*.png"))) == 2
    scheduler = diffusers.DDIMScheduler.from_pretrained(tmp_path, subfolder="scheduler")
    assert scheduler.config["prediction_type"] == "v_prediction"
    assert scheduler.alphas_cumprod[-1] == 0
    assert NoiseSchedule.from_pretrained(tmp_path, subfolder="scheduler").has_zero_terminal_snr
    assert "epsilon, ordinary" in capsys.readouterr().out


def test_brightness_goes_on_from_its_checkpoint(trained: Path, tmp_path: Path) -> None:
    shutil.copytree(trained, tmp_path, dirs_exist_ok=True)
    first = json.loads((tmp_path / "brightness.json").read_text())
    # nothing is left to train
    assert brightness().main([*V_ZERO_SNR, *SHORT, "--out", str(tmp_path)]) == first


def test_brightness_refuses_another_schedule_in_the_same_folder(
    trained: Path, tmp_path: Path
) -> None:
    shutil.copytree(trained, tmp_path, dirs_exist_ok=True)
    with pytest.raises(ValueError, match=r"beta_end=0\.02"):
        brightness().main(
            [*V_ZERO_SNR, "--beta_end", "0.02", *SHORT, "--max_steps", "4", "--out", str(tmp_path)]
        )


def test_brightness_refuses_to_report_another_run_as_its_own(tmp_path: Path) -> None:
    example = brightness()
    example.require_same_run(example.parse([*V_ZERO_SNR, *SHORT]), tmp_path)
    (tmp_path / "brightness.ckpt").touch()
    example.require_same_run(
        example.parse([*V_ZERO_SNR, *SHORT, "--max_steps", "9", "--compare"]), tmp_path
    )
    for flags in (
        ["--snr_gamma", "5", "--loss_weight_floor", "0.1"],
        ["--seed", "1"],
        ["--channels", "3"],
    ):
        with pytest.raises(
            ValueError, match=rf"was trained with .*, and this run has .*{flags[0][2:]}={flags[1]}"
        ):
            example.main([*V_ZERO_SNR, *SHORT, *flags, "--out", str(tmp_path)])
    (tmp_path / "flags.json").unlink()
    with pytest.raises(ValueError, match="holds a checkpoint and no flags"):
        example.main([*V_ZERO_SNR, *SHORT, "--out", str(tmp_path)])


@pytest.mark.parametrize("channels", ["1", pytest.param("3", marks=pytest.mark.slow)])
def test_brightness_on_a_folder_of_images(tmp_path: Path, channels: str) -> None:
    from sklearn.datasets import load_digits

    (tmp_path / "data").mkdir()
    for i, digit in enumerate(load_digits().images[:40]):
        Image.fromarray((digit * 255 / 16).astype("uint8")).save(tmp_path / "data" / f"{i}.png")
    flags = [
        *V_ZERO_SNR,
        *SHORT,
        "--preview_every",
        "2",
        "--data",
        str(tmp_path / "data"),
        "--channels",
        channels,
        "--out",
        str(tmp_path / "run"),
    ]
    assert brightness(None if channels == "3" else small).main(flags)
    assert (tmp_path / "run" / "brightness.ckpt").is_file()


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--rescale_betas_zero_snr"], "ill-posed"),
        ([*V_ZERO_SNR, "--data", "nowhere"], "no folder of images at 'nowhere'"),
    ],
)
def test_brightness_says_what_is_wrong(tmp_path: Path, flags: list[str], words: str) -> None:
    with pytest.raises((ValueError, OSError), match=words):
        load("train_brightness").main([*flags, *SHORT, "--out", str(tmp_path)])


def test_plain_loop(tmp_path: Path) -> None:
    load("plain_loop").main(["--steps", "2", "--out", str(tmp_path)])
    assert (tmp_path / "squares.png").is_file()
    scheduler = diffusers.DPMSolverMultistepScheduler.from_pretrained(
        tmp_path, subfolder="scheduler"
    )
    assert scheduler.config["prediction_type"] == "v_prediction"
    assert len((EXAMPLES / "plain_loop.py").read_text().splitlines()) < 60


def test_flow(tmp_path: Path) -> None:
    """Train and go on; then the second command of its docstring, on what the first has left."""
    example = load("train_flow")
    example.make_network = lambda: diffusers.UNet2DModel(
        sample_size=8, in_channels=1, out_channels=1, block_out_channels=(8,), norm_num_groups=4, layers_per_block=1,
        down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",), num_class_embeds=example.NO_CLASS + 1,
    )  # fmt: skip
    for steps in ("1", "2"):
        flags = ["--max_steps", steps, "--batch_size", "2", "--preview_every", "1"]
        checkpoint = example.main([*flags, "--out", str(tmp_path)])
    for name in ("previews/step_00000002_ema.png", "loss_by_snr/step_00000002.png", "tensorboard"):
        assert (tmp_path / name).exists(), name
    (command,) = [
        line.split() for line in str(example.__doc__).splitlines() if "alphabar sample" in line
    ]
    command[2:3] = [str(checkpoint)]
    command[-1:] = ["2", "--steps", "2", "--out", str(tmp_path / "samples.png")]
    assert command_line(command[1:]) == 0
    with Image.open(tmp_path / "samples.png") as image:
        assert image.size[0] > 8
    schedule = NoiseSchedule.from_pretrained(tmp_path, subfolder="scheduler")
    assert schedule.prediction.name == "flow_prediction"
