"""Checkpoints of a model that is sharded between two processes: folders, each with its schedule in it."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from alphabar.training import schedule_from_checkpoint
from alphabar.training.cli import main
from alphabar.training.sidecars import own_sidecar, read_sidecar
from callbacks_toy import SCHEDULE, files

SCRIPT = Path(__file__).parent / "sharded_training.py"


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("sharded")
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
        codes = [process.wait(timeout=200) for process in running]
    finally:
        for process in running:
            process.kill()
    assert codes == [0, 0], "\n".join(log.read_text()[-3000:] for log in logs)
    return root


def test_every_folder_holds_its_schedule_and_goes_with_it(root: Path) -> None:
    inside = [f"step=6.ckpt/scheduler/{name}" for name in ("noise_schedule.json", "scheduler_config.json")]
    found = files(root / "saved")
    assert {*inside, "step=6.ckpt/meta.pt", "scheduler/scheduler_config.json"} <= set(found)
    assert not [name for name in found if "step=3" in name]


def test_the_schedule_is_read_from_each_of_its_places(root: Path) -> None:
    path = root / "saved/step=6.ckpt"
    assert schedule_from_checkpoint(path) == SCHEDULE == read_sidecar(own_sidecar(path))
    meta = torch.load(path / "meta.pt", weights_only=True)
    del meta["noise_schedule"]
    torch.save(meta, path / "meta.pt")
    assert schedule_from_checkpoint(path) == SCHEDULE
    assert main(["inspect", str(path)]) == 0


def test_another_schedule_is_refused_on_every_rank(root: Path) -> None:
    for rank in range(2):
        report = json.loads((root / f"rank{rank}.json").read_text())
        assert report["saved"] is None and report["same"] is None
        for verb in ("fit", "validate"):
            assert "step=6.ckpt' is of the noise schedule" in report[verb] and "with sample" in report[verb]
