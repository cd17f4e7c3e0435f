"""The kernels of a GPU, run on the CPU by triton's interpreter: noise and steps of the CPU.

``make test-kernels`` installs triton and runs them; without it they are skipped.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from alphabar.noising import NoiseSchedule, Noising
from alphabar.noising.utils import rng
from alphabar.sampling import CapturedSampler, Sampler
from alphabar.sampling.kernel import one_pass

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

STEPS = """
from contextlib import nullcontext

import torch

from alphabar.noising import NoiseSchedule
from alphabar.noising.utils import triton_kernels
from alphabar.sampling import METHODS, Sampler, kernel
from alphabar.sampling.tracing import Draw

triton_kernels._on = lambda x: nullcontext()  # there is no GPU to choose
passes = kernel.Passes(triton_kernels, True)
schedule = NoiseSchedule.scaled_linear(prediction="v_prediction")


def network(x, t):
    assert x.dtype == dtype
    return torch.tanh(1.3 * x.float() + 0.1) * (0.5 + t.view(-1, 1, 1, 1) / 2000)


def launched(*arguments):
    global launches
    launches += 1
    return combine(*arguments)


combine = triton_kernels.combine
triton_kernels.combine = launched
for name in METHODS:
    sampler = Sampler(schedule, name, 4)
    if not sampler.table.steps:
        continue
    for dtype in (torch.float32, torch.float16):
        _, x, *others = sampler._begun(network, (2, 3, 5, 7), seeds=3, dtype=dtype)
        exact = kernel.final(sampler._plan.steps, [x], *others)
        launches = 0
        fused = kernel.fused_steps(sampler.table, passes, dtype)
        _, x, *others = sampler._begun(network, (2, 3, 5, 7), seeds=3, dtype=dtype)
        made = kernel.final(fused, [x], *others)
        # in half precision a rounding of the network's input is seen
        close = 1e-6 if dtype == torch.float32 else 1e-2
        assert (made - exact).abs().max() <= close * max(1, exact.abs().max()), (name, dtype)
        draws_first = isinstance(sampler.table.steps[0].ops[0], Draw)  # and then evaluates
        most = sampler.table.evaluations + draws_first * len(sampler.table.steps)
        assert launches <= most, (name, launches)
print("equal")
"""

COMPILED = """
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile

from alphabar.noising.utils import triton_kernels as kernels

coefficients, structure = kernels.packed([[(0, 1.0), (1, 0.3)], [(0, 0.9), (1, 1.7)], [(2, 0.5)]])
signature = {
    "given": ("*fp32", "*bf16"),
    "made": ("*fp32", "*fp32", "*bf16"),
    "coefficients": ("fp32",) * len(coefficients),
    "count": "i32",
    **dict.fromkeys(("STARTS", "INDEX", "BLOCK"), "constexpr"),
}
constants = {(4,): structure["STARTS"], (5,): structure["INDEX"], (6,): 1024}
source = ASTSource(kernels._combine, signature, constants)
made = compile(source, target=GPUTarget("cuda", 80, 32)).asm
assert "ld.global" in made["ptx"] and made["cubin"]
print("equal")
"""


@pytest.mark.skipif(WITHOUT_TRITON, reason="triton is not installed: make test-kernels")
@pytest.mark.parametrize(
    ("program", "interpreted"),
    [(PROGRAM, "1"), (STEPS, "1"), (COMPILED, "0")],
    ids=["noise", "steps", "machine code"],
)
def test_kernels_give_the_numbers_of_the_cpu(
    program: str, interpreted: str, tmp_path: Path
) -> None:
    """Noise to the bit; the steps of every table within rounding, a launch for an evaluation."""
    file = tmp_path / "program.py"  # triton reads the choice of its interpreter once
    file.write_text(program, encoding="utf-8")
    ran = subprocess.run(
        [sys.executable, str(file)],
        env=os.environ | {"TRITON_INTERPRET": interpreted},
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


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
@pytest.mark.parametrize("name", ["ddim", "unipc", "dpmpp_sde", "stochastic_karras_ve"])
def test_a_gpu_runs_a_table_as_the_cpu_does(name: str) -> None:
    assert one_pass(torch.device("cuda", 0)) is not None
    sampler = Sampler(NoiseSchedule.scaled_linear(), name, 6)
    shape, seeds = (2, 4, 8, 8), [3, 4]
    network = nn.Conv2d(4, 4, 3, padding=1)

    def called(network: nn.Module) -> Any:
        return lambda x, t: 0.3 * torch.tanh(network(x))

    host = sampler(called(network), shape, seeds=seeds)
    network = network.cuda()
    device = sampler(called(network), shape, seeds=seeds, device="cuda")
    assert torch.allclose(host, device.cpu(), rtol=0, atol=1e-4)
    captured = CapturedSampler(sampler, called(network), shape, device="cuda")
    for again in (seeds, [8, 9]):
        exact = sampler(called(network), shape, seeds=again, device="cuda")
        assert torch.allclose(captured(seeds=again), exact, rtol=0, atol=1e-6)
