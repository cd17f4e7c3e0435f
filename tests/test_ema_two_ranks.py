"""Averages and losses by SNR with two processes (gloo): DDP, FSDP1 and FSDP2, with whole and
sharded checkpoints.
"""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from two_processes import last_words, run_two_ranks

SCRIPT = Path(__file__).parent / "ema_two_ranks.py"
SCENARIOS = [
    "ddp:32-true",
    "fsdp1:32-true",
    "fsdp2:32-true",
    "fsdp1_sharded:32-true",
    "fsdp2_sharded:32-true",
    "fsdp1:bf16-true",
]
NAMES = [name.replace(":", "_") for name in SCENARIOS]
PARAMETERS = 192 * 7 + 7 + 7 * 11 + 11 + 11 * 7 + 7 + 7 * 192 + 192


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What two processes left behind, after all scenarios in one go (most of the time goes into
    starting them).
    """
    root = tmp_path_factory.mktemp("ema_two_ranks")
    assert run_two_ranks(SCRIPT, root, *SCENARIOS) == [0, 0], last_words(root)
    return root


@pytest.fixture(scope="module")
def ranks(root: Path) -> list[dict[str, Any]]:
    return [json.loads((root / f"rank{rank}.json").read_text()) for rank in range(2)]


@pytest.mark.parametrize("name", NAMES)
def test_training_is_untouched_by_averaging_and_drawing(
    ranks: list[dict[str, Any]], name: str
) -> None:
    for report in ranks:
        plain, averaged, resumed = report[name]["losses"]
        assert averaged == plain and len(plain) == 4
        assert resumed == plain[2:]
    assert ranks[0][name]["losses"] != ranks[1][name]["losses"]


@pytest.mark.parametrize("name", NAMES)
def test_averages_of_shards(ranks: list[dict[str, Any]], name: str) -> None:
    for report in ranks:
        assert report[name]["seen"] == 4
        assert report[name]["error"] < 1e-6  # float32, of bfloat16 weights too
        # as swapped into the model
        assert report[name]["worst"] < (1e-3 if "bf16" in name else 1e-6)
        assert report[name]["dtypes"] == ["torch.float32"]
        assert report[name]["resumed"]
    total = sum(report[name]["numel"] for report in ranks)
    assert total == PARAMETERS * (2 if name.startswith("ddp") else 1)


@pytest.mark.parametrize("name", [name for name in NAMES if "bf16" not in name])
def test_whole_averages_in_files_are_those_of_ddp(root: Path, name: str) -> None:
    for step in (2, 4):
        one, other = (_saved(root / which, step) for which in ("ddp_32-true", name))
        for first, second in zip(one["ema"]["averages"], other["ema"]["averages"], strict=True):
            assert (
                first["profile"] == second["profile"]
                and first["updates"] == second["updates"] == step
            )
            assert first["weights"].keys() == second["weights"].keys()
            for key, value in first["weights"].items():
                torch.testing.assert_close(second["weights"][key], value, rtol=1e-5, atol=1e-6)
        file = f"snapshots/ema_{step:08d}_0.2.safetensors"
        snapshot = load_file(root / name / file)
        assert all(
            torch.equal(snapshot[n], p) for n, p in other["ema"]["averages"][1]["weights"].items()
        )
        if "sharded" not in name:
            for key, value in other["ema"]["averages"][0]["weights"].items():
                assert torch.equal(other["state_dict"][key], value)
                torch.testing.assert_close(
                    other["current_model_state"][key], one["current_model_state"][key]
                )


@pytest.mark.parametrize("name", NAMES)
def test_losses_by_snr_are_those_of_both_ranks(ranks: list[dict[str, Any]], name: str) -> None:
    sums = torch.tensor(ranks[0][name]["own"]) + torch.tensor(ranks[1][name]["own"])
    metrics = ranks[0][name]["metrics"]
    assert list(metrics) == ["2", "4"] and ranks[1][name]["metrics"] == {}
    means = [(sums[row] / sums[0])[sums[0] > 0].tolist() for row in (1, 2)]
    assert list(metrics["4"].values()) == pytest.approx([*means[0], *means[1]], rel=1e-5)
    assert [report[name]["drawn"] for report in ranks] == [32, 32]


def _saved(folder: Path, step: int) -> dict[str, Any]:
    path = folder / f"{step}.ckpt"
    return torch.load(path / "meta.pt" if path.is_dir() else path, weights_only=True)
