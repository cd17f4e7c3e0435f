"""No step waits for the device: on torch's meta device, which has no values, a read is an error."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from counting import CountOperations
from torch import Tensor

from alphabar.noising import NOISES, NoiseSchedule, Noising
from alphabar.sampling import METHODS, Sampler
from alphabar.sampling.inference import SeededNoise

META = torch.device("meta")
# operations of torch in a step, the network's one included; noise counts as one
MOST = {
    "sa_solver": 40,
    "sa_solver_pece": 60,
    "unipc": 14,
    "unipc_3": 15,
    "stochastic_karras_ve": 60,
}


@pytest.mark.parametrize("name", METHODS)
def test_a_table_runs_without_host_reads(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(SeededNoise, "__call__", lambda self: torch.empty(self.shape, device=META))
    sampler = Sampler(NoiseSchedule.linear(), name, 6)
    steps = sampler.iterate(lambda x, t: x * 0.5, (2, 4, 8, 8), seeds=0, device=META)
    next(steps)
    with CountOperations() as counted:
        left = sum(1 for _ in steps)
    assert counted.reads == counted.copies == 0
    most = MOST[name] if name in MOST else 12 * sampler.method.evaluations
    assert counted.operations <= most * left


@pytest.mark.parametrize("name", [name for name, kind in NOISES.items() if not kind.batch_wide])
def test_noising_reads_nothing_after_the_first_batch(name: str) -> None:
    """Immiscible noise solves its assignment on the host, as it says."""
    noising = Noising(NoiseSchedule.linear(), weighting="min_snr", noise=name)
    x0 = torch.empty(3, 2, 8, 8, device=META)
    with pytest.raises(RuntimeError, match="meta tensors"):
        noising(x0, step=0)  # the values of the first batch are checked
    noising(x0, step=1)  # makes the tables of the device
    with CountOperations() as counted:
        noised = noising(x0, step=2)
        loss: Tensor | Any = noised.loss(noised.x)
    assert counted.reads == 0 and loss.device == META
