"""Previews and schedules with two processes (DDP, gloo): the same losses, the same pixels, and nobody left waiting."""

import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from alphabar.callbacks import ValidationSampling
from alphabar.training import schedule_from_checkpoint
from callbacks_toy import SCHEDULE, files, fresh, one_thread, train

SCRIPT = Path(__file__).parent / "callbacks_two_ranks.py"


pytestmark = pytest.mark.filterwarnings("ignore::Warning:lightning", "ignore::Warning:tensorboard")


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    with one_thread():
        yield


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What two processes left behind, after all scenarios in one go (most of the time goes into starting them)."""
    root = tmp_path_factory.mktemp("two_ranks")
    (root / "file").touch()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = {**os.environ, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "NODE_RANK": "0"}
    logs = [root / f"rank{rank}.log" for rank in range(2)]
    running = []
    for rank, log in enumerate(logs):
        with log.open("w") as out:
            command = [sys.executable, str(SCRIPT), str(root)]
            environment = {**common, "LOCAL_RANK": str(rank)}
            running.append(subprocess.Popen(command, env=environment, stdout=out, stderr=subprocess.STDOUT))
    try:
        codes = [process.wait(timeout=240) for process in running]
    finally:
        for process in running:
            process.kill()
    assert codes == [0, 0], "\n".join(log.read_text()[-3000:] for log in logs)
    return root


@pytest.fixture(scope="module")
def ranks(root: Path) -> list[dict[str, Any]]:
    return [json.loads((root / f"rank{rank}.json").read_text()) for rank in range(2)]


@pytest.mark.parametrize("scenario", ["previews", "failing", "failing_zero", "nan", "logger", "last"])
def test_losses_are_bit_identical(ranks: list[dict[str, Any]], scenario: str) -> None:
    for report in ranks:
        assert report[scenario]["error"] is None
        assert report[scenario]["losses"] == report["none"]["losses"] and len(report["none"]["losses"]) == 6
        assert report[scenario]["weights"] == report["none"]["weights"]
    assert ranks[0]["none"]["losses"] != ranks[1]["none"]["losses"]
    assert ranks[0]["none"]["weights"] == ranks[1]["none"]["weights"]


def test_pixels_are_those_of_one_process(root: Path, tmp_path: Path) -> None:
    settings: Any = {"steps": 2, "every_n_train_steps": 2, "num_images": 5, "batch_size": 2}
    alone = ValidationSampling("euler_ancestral", **settings)
    train(tmp_path, alone, module=fresh(learning_rate=0.0), max_epochs=1)
    names = [f"previews/step_{step:08d}.png" for step in (2, 4, 6)]
    assert files(tmp_path) == files(root / "still") == names
    for name in names:
        assert (tmp_path / name).read_bytes() == (root / "still" / name).read_bytes()
    assert (root / "previews" / names[0]).read_bytes() != (root / "still" / names[0]).read_bytes()


def test_an_error_on_one_rank_is_told_once_and_skips_the_preview_on_both(
    root: Path, ranks: list[dict[str, Any]]
) -> None:
    for scenario, rank, words in [
        ("failing", 1, "rank 1: RuntimeError: no memory left (callbacks_two_ranks.py:"),
        ("failing_zero", 0, "rank 0: RuntimeError: no memory left (callbacks_two_ranks.py:"),
        ("nan", 1, "rank 1: ValueError: samples"),
    ]:
        told = ranks[0][scenario]["warnings"]
        assert len(told) == 3 and all(words in text for text in told), (scenario, rank)
        assert ranks[1][scenario]["warnings"] == []
        assert files(root / scenario) == []


def test_with_raise_both_ranks_stop_with_the_same_words(ranks: list[dict[str, Any]]) -> None:
    for scenario, words in [
        ("raise", "rank 1: RuntimeError: no memory"),
        ("logger_raise", "rank 0: RuntimeError: Broken"),
    ]:
        errors = [report[scenario]["error"] for report in ranks]
        assert errors[0] == errors[1] and errors[0].startswith("RuntimeError: the preview at step 2 failed: ")
        assert words in errors[0]
        assert [len(report[scenario]["losses"]) for report in ranks] == [2, 2]


def test_nobody_waits_for_the_process_group(ranks: list[dict[str, Any]]) -> None:
    for report in ranks:
        assert {name: seen["seconds"] for name, seen in report.items() if seen["seconds"] > 30} == {}


def test_shapes_that_differ_between_ranks_are_agreed_on(root: Path, ranks: list[dict[str, Any]]) -> None:
    assert [report["buckets"]["error"] for report in ranks] == [None, None]
    assert len(files(root / "buckets")) == 3


def test_rehearsal_writes_nothing(root: Path, ranks: list[dict[str, Any]]) -> None:
    assert [report["rehearsal"]["error"] for report in ranks] == [None, None]
    assert not (root / "rehearsal").exists()


def test_an_unwritable_folder_stops_both_before_training(ranks: list[dict[str, Any]]) -> None:
    for report in ranks:
        assert "Error: cannot write to the output folder" in report["unwritable"]["error"]
        assert report["unwritable"]["losses"] == []


def test_schedules_are_saved_once_and_refused_by_both(root: Path, ranks: list[dict[str, Any]]) -> None:
    assert [report["saved"]["error"] for report in ranks] == [None, None]
    assert schedule_from_checkpoint(root / "saved/step=3.ckpt") == SCHEDULE
    assert [name for name in files(root / "saved") if "scheduler" in name] == [
        "scheduler/noise_schedule.json",
        "scheduler/scheduler_config.json",
    ]
    for report in ranks:
        assert report["refused"]["error"].startswith("ValueError: ") and str(SCHEDULE) in report["refused"]["error"]
        assert report["refused"]["losses"] == []
