"""The kernels of a GPU, run on the CPU by triton's interpreter: the bits of the CPU's noise.

``make test-kernels`` installs triton and runs them; without it they are skipped.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from alphabar.noising import NoiseSchedule, Noising
from alphabar.noising.utils import rng

WITHOUT_TRITON = importlib.util.find_spec("triton") is None

PROGRAM = """
import itertools
from contextlib import nullcontext

import torch

from alphabar.noising.utils import rng, triton_kernels as kernels
from alphabar.noising.utils.rng import Draws

kernels._on = lambda x: nullcontext()  # there is no GPU to choose
counters = [(3, 5, 0), (2**32 - 1, 2**31 + 9, 77)]
for count, (step, stream, first), seeds in itertools.product(
    [7, 1024, 3000], counters, [[11], [2**64 - 5, 1, 2**40 + 3]]
):
    index = [4, 2**32 - 1, 0]
    draws = Draws(seeds, index, step=step, stream=stream)
    keys, places, *words = draws._device_counters()
    made = torch.empty(3, count)
    kernels.normal(made, keys, places, *words, first)
    draws._block = first
    assert torch.equal(made, draws.normal(count)), (count, step, seeds)
levels, x0 = torch.rand(5, 3), torch.randn(3, 1500)
for dtype in (torch.float32, torch.float16):  # the interpreter truncates to bfloat16
    clean = x0.to(dtype)
    made = [torch.empty(3, 1500, dtype=dtype), torch.empty(3, 1500)]
    draws = Draws(7, range(3), step=9, stream=0)
    kernels.noised(clean, levels, *made, *draws._device_counters())
    e = draws.normal(1500)
    alpha, sigma, c0, c1 = (row[:, None] for row in levels[:4])
    assert torch.equal(made[0], (alpha * clean.float() + sigma * e).to(dtype))
    assert torch.equal(made[1], c0 * clean.float() + c1 * e)
print("equal")
"""


@pytest.mark.skipif(WITHOUT_TRITON, reason="triton is not installed: make test-kernels")
def test_kernels_draw_the_bits_of_the_cpu(tmp_path: Path) -> None:
    program = tmp_path / "program.py"  # triton reads the choice of its interpreter once
    program.write_text(PROGRAM, encoding="utf-8")
    ran = subprocess.run(
        [sys.executable, str(program)],
        env=os.environ | {"TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert ran.stdout == "equal\n", ran.stderr


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_gpu_draws_the_bits_of_the_cpu(dtype: torch.dtype) -> None:
    assert rng.kernels(torch.device("cuda", 0)) is not None
    schedule = NoiseSchedule.scaled_linear(prediction="v_prediction")
    x0 = torch.randn(5, 4, 33, 7).to(dtype)
    noising = Noising(schedule, weighting="min_snr").eval()
    host, device = noising(x0, step=3), noising(x0.cuda(), step=3)
    for name in ("x", "timesteps", "target", "weight", "noise", "t"):
        assert torch.equal(getattr(host, name), getattr(device, name).cpu()), name
