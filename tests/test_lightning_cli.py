"""The LightningCLI example: objects from YAML, changed on the command line, printed and read again."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from lightning.pytorch.cli import LightningCLI

from alphabar.callbacks import ScheduleCheckpoint, ValidationSampling
from alphabar.noising import MinSNR, NoiseSchedule, Offset
from alphabar.training import schedule_from_checkpoint
from test_examples import EXAMPLES, load

CONFIG = str(EXAMPLES / "lightning_cli" / "config.yaml")
SHORT = [
    "--trainer.max_epochs=1",
    "--trainer.limit_train_batches=2",
    "--trainer.limit_val_batches=1",
    "--trainer.logger=false",
]


@pytest.fixture(autouse=True)
def started_by_its_own_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["main.py"])


def run(*arguments: str) -> LightningCLI:
    return load("lightning_cli/main").main(list(arguments))


def test_trains_and_saves_the_schedule(tmp_path: Path) -> None:
    cli = run("fit", "--config", CONFIG, *SHORT, f"--trainer.default_root_dir={tmp_path}")
    schedule = NoiseSchedule.scaled_linear(prediction="v_prediction").zero_terminal_snr()
    assert cli.model.noising.schedule == schedule
    assert cli.model.noising.timesteps.stratified
    checkpoint = next(tmp_path.rglob("*.ckpt"))
    assert schedule_from_checkpoint(checkpoint) == schedule
    assert list(tmp_path.rglob("scheduler/scheduler_config.json"))
    assert list(tmp_path.rglob("previews/step_*.png"))


def test_objects_and_names_from_the_command_line(tmp_path: Path) -> None:
    cli = run(
        "fit", "--config", CONFIG, *SHORT, f"--trainer.default_root_dir={tmp_path}", "--trainer.fast_dev_run=true",
        "--model.noising.weighting=alphabar.noising.MinSNR", "--model.noising.weighting.gamma=3", "--model.noising.weighting.floor=0.05",
        "--model.noising.noise=alphabar.noising.Offset", "--model.noising.noise.strength=0.2",
        "--model.noising.schedule.prediction=sample", "--trainer.callbacks+=ScheduleCheckpoint",
        "--trainer.callbacks.subfolder=elsewhere",
    )  # fmt: skip
    noising = cli.model.noising
    assert noising.weighting == MinSNR(gamma=3.0, floor=0.05) and noising.noise == Offset(0.2)
    assert noising.schedule.prediction.name == "sample"
    callbacks = cli.trainer.callbacks
    assert [c.subfolder for c in callbacks if isinstance(c, ScheduleCheckpoint)] == [
        "scheduler",
        "elsewhere",
    ]


@pytest.mark.slow  # every callback from YAML is with the fast tests
def test_two_previews_side_by_side_and_the_printed_config_says_the_same(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    more = [
        "--trainer.callbacks+=ValidationSampling",
        "--trainer.callbacks.sampler=euler",
        "--trainer.callbacks.every_n_train_steps=1",
    ]
    arguments = ["fit", "--config", CONFIG, *SHORT, f"--trainer.default_root_dir={tmp_path}", *more]
    with pytest.raises(SystemExit) as stop:
        run(*arguments, "--print_config")
    assert stop.value.code == 0
    printed = tmp_path / "printed.yaml"
    printed.write_text(capsys.readouterr().out)
    cli = run("fit", "--config", str(printed))
    previews = [c for c in cli.trainer.callbacks if isinstance(c, ValidationSampling)]
    assert [c.triggers.every_n_train_steps for c in previews] == [None, 1]
    assert len(list(tmp_path.rglob("previews/step_*.png"))) == 1
    assert len(list(tmp_path.rglob("previews_2/step_*.png"))) == 2
    first = {name: value.clone() for name, value in cli.model.state_dict().items()}
    again = run(*arguments[:-3], f"--trainer.default_root_dir={tmp_path / 'again'}")
    assert all(torch.equal(value, first[name]) for name, value in again.model.state_dict().items())


def test_every_callback_can_be_added(tmp_path: Path) -> None:
    more = [
        "EMA",
        "profiles=constant",
        "LossBySNR",
        "every_n_train_steps=1",
        "ValidationSampling",
        "weights=both",
    ]
    flags = [f"--trainer.callbacks{'.' if '=' in word else '+='}{word}" for word in more]
    cli = run("fit", "--config", CONFIG, *SHORT, f"--trainer.default_root_dir={tmp_path}", *flags)
    assert {"EMA", "LossBySNR", "ScheduleCheckpoint"} <= {
        type(c).__name__ for c in cli.trainer.callbacks
    }
    assert list(tmp_path.rglob("previews_2/step_*_ema.png"))
    assert list(tmp_path.rglob("loss_by_snr/step_*.png"))


def test_an_unknown_name_is_an_error_before_training(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises((SystemExit, ValueError)) as stop:
        run(
            "fit",
            "--config",
            CONFIG,
            *SHORT,
            "--model.noising.weighting=min_snrr",
            f"--trainer.default_root_dir={tmp_path}",
        )
    assert "did you mean 'min_snr'" in f"{stop.value} {capsys.readouterr().err}"
