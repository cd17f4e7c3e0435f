"""Checkpoints of a model that is sharded between two processes: folders, each with its schedule in
it.
"""

import json
from pathlib import Path

import pytest
import torch

from alphabar.training import schedule_from_checkpoint
from alphabar.training.checkpoints.sidecars import own_sidecar, read_sidecar
from alphabar.training.cli import main
from callbacks_toy import SCHEDULE, files
from two_processes import last_words, run_two_ranks

SCRIPT = Path(__file__).parent / "sharded_training.py"

pytestmark = pytest.mark.slow  # two processes, sharded


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("sharded")
    assert run_two_ranks(SCRIPT, root) == [0, 0], last_words(root)
    return root


def test_every_folder_holds_its_schedule_and_goes_with_it(root: Path) -> None:
    inside = [
        f"step=6.ckpt/scheduler/{name}" for name in ("noise_schedule.json", "scheduler_config.json")
    ]
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
            assert (
                "step=6.ckpt' is of the noise schedule" in report[verb]
                and "with sample" in report[verb]
            )
