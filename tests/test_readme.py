"""The README's Python is run as it stands, with small things in the place of the reader's own."""

import re
import warnings
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

from alphabar.noising import NoiseSchedule, Noising
from alphabar.sampling import Sampler

README = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1))

    def forward(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return self.scale * x


@pytest.mark.parametrize("number", range(len(BLOCKS)))
def test_readme(number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(
        "sys.argv", ["train.py", "--prediction_type", "v_prediction", "--rescale_betas_zero_snr"]
    )
    network = Network()
    schedule = NoiseSchedule.scaled_linear(prediction="v_prediction").zero_terminal_snr()
    names: dict[str, Any] = {
        "data": [torch.randn(2, 3, 8, 8) for _ in range(4)],
        "dataloader": DataLoader(cast(Any, torch.randn(4, 3, 8, 8)), batch_size=2),
        "network": network,
        "optimizer": torch.optim.SGD(network.parameters(), 0.1),
        "shape": (1, 3, 8, 8),
        "schedule": schedule,
        "noising": Noising(schedule),
        "Sampler": Sampler,
        "Noising": Noising,
    }
    code = (
        BLOCKS[number]
        .replace("max_steps=10_000", "max_steps=2")
        .replace("every_n_train_steps=500", "every_n_train_steps=2")
        .replace("step % 500", "step % 2")
    )
    with warnings.catch_warnings():
        warnings.filterwarnings("error", category=UserWarning, module="alphabar|README")
        warnings.filterwarnings("error", message="weighting")
        exec(compile(code, "README.md", "exec"), names)
    if "save_pretrained" in code:
        assert names["images"].shape == (4, 3, 64, 64)
        assert NoiseSchedule.from_pretrained("out/scheduler") == names["schedule"]
    if "trainer.fit" in code:
        assert list(tmp_path.rglob("step_00000002.png"))
        assert list(tmp_path.rglob("scheduler_config.json"))
    if "Previews(" in code:
        assert list(tmp_path.rglob("step_00000002_ema.png"))
    if "argparse" in code:
        assert names["noising"].schedule.has_zero_terminal_snr


def test_there_is_something_to_run() -> None:
    assert len(BLOCKS) >= 4
