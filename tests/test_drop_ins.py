"""The drop-in classes: what diffusers' own classes do, with the same arguments, calls and files.

The oracle is always the class of diffusers with the same config, run by the same loop from the same
seed.
"""

from __future__ import annotations

import inspect
import json
import math
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from diffusers.schedulers import scheduling_dpmsolver_sde
from torch import Tensor

from alphabar.noising import NoiseSchedule
from alphabar.sampling import schedulers
from alphabar.sampling.schedulers.drop_in import LEFT_OUT, NAMES

SHAPE = (2, 4, 4, 4)
START = torch.randn(SHAPE, generator=torch.Generator().manual_seed(0))
CONFIGS: dict[str, dict[str, Any]] = {
    "defaults": {},
    "not clipped": {"clip_sample": False},
    "thresholding": {"thresholding": True},
    "karras": {"use_karras_sigmas": True},
    "exponential": {"use_exponential_sigmas": True},
    "beta": {"use_beta_sigmas": True},
    "lu": {"use_lu_lambdas": True},
    "trailing": {"timestep_spacing": "trailing"},
    "leading": {"timestep_spacing": "leading", "steps_offset": 1},
    "linspace": {"timestep_spacing": "linspace"},
    "zero SNR": {
        "rescale_betas_zero_snr": True,
        "prediction_type": "v_prediction",
        "timestep_spacing": "trailing",
    },
    "Stable Diffusion": {
        "beta_schedule": "scaled_linear",
        "beta_start": 0.00085,
        "beta_end": 0.012,
    },
    "sample": {"prediction_type": "sample"},
    "no alpha of 1": {"set_alpha_to_one": False},
    "fixed_large": {"variance_type": "fixed_large"},
    "order 3": {"solver_order": 3},
    "heun": {"solver_type": "heun"},
    "sigma_min": {"final_sigmas_type": "sigma_min"},
    "sde": {"algorithm_type": "sde-dpmsolver++"},
    "plms": {"skip_prk_steps": True},
    "flow sigmas": {
        "use_flow_sigmas": True,
        "prediction_type": "flow_prediction",
        "flow_shift": 3.0,
    },
    "shift": {"shift": 3.0},
    "shift to an end": {"shift": 2.0, "shift_terminal": 0.1},
    "stochastic": {"stochastic_sampling": True},
}
REFUSED = {
    ("DDIMInverseScheduler", "sample"): "do not say the noise",
    ("DPMSolverMultistepInverseScheduler", "karras"): "use_karras_sigmas=True is not supported",
    ("DPMSolverMultistepInverseScheduler", "exponential"): "is not supported",
    ("DPMSolverMultistepInverseScheduler", "beta"): "use_beta_sigmas=True is not supported",
    ("DPMSolverMultistepInverseScheduler", "trailing"): "is no grid here",
    ("DPMSolverMultistepInverseScheduler", "leading"): "is no grid here",
    ("DPMSolverMultistepInverseScheduler", "flow sigmas"): "does not know prediction_type",
    ("DPMSolverMultistepInverseScheduler", "sde"): "dpmsolver",
    ("DEISMultistepScheduler", "flow sigmas"): "it ends before the clean sample",
    ("SASolverScheduler", "flow sigmas"): "it ends before the clean sample",
}
# PNDM steps by T // N = 100 on a grid with gaps of 111, also from the middle of a step
APART = {("PNDMScheduler", "linspace")}
# the tables of these in float32: 1 - ᾱ at the first timestep is 8e-5 off, and the inverse starts there
LIMITS = {
    "DPMSolverMultistepInverseScheduler": 2e-4,
    "UnCLIPScheduler": 2e-3,
    "SASolverScheduler": 5e-5,
    "HeunDiscreteScheduler": 2e-5,
}
LIMIT = 1e-5


class SmoothPath:
    """A path whose increments do not depend on how it is divided, for DPMSolverSDEScheduler."""

    def __init__(self, x: Tensor, *_: Any) -> None:
        generator = torch.Generator().manual_seed(5)
        self.amplitudes = torch.randn(4, *x.shape, generator=generator)

    def at(self, sigma: Any) -> Tensor:
        return sum(a * math.sin((i + 1) * float(sigma)) for i, a in enumerate(self.amplitudes))  # type: ignore[return-value]

    def __call__(self, start: Any, end: Any) -> Tensor:
        return (self.at(start) - self.at(end)) / abs(float(start) - float(end)) ** 0.5


@pytest.fixture(autouse=True)
def quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scheduling_dpmsolver_sde, "BrownianTreeNoiseSampler", SmoothPath)
    diffusers.logging.set_verbosity_error()


def network(x: Tensor, t: Any) -> Tensor:
    return torch.tanh(0.5 * x + 0.001 * float(t)) - 0.1 * x


def in_a_pipeline(
    scheduler: Any, generator: Any, first: int = 0, x: Tensor = START, **more: Any
) -> list[Tensor]:
    """The loop that the pipelines of diffusers have; returns all that the steps return."""
    takes = inspect.signature(scheduler.step).parameters
    given = {"generator": generator} if "generator" in takes else {}
    x = x * float(getattr(scheduler, "init_noise_sigma", 1.0)) if first == 0 else x
    returned: list[Tensor] = []
    times = scheduler.timesteps
    for i, t in enumerate(times[first:], first):
        if "prev_timestep" in takes:
            given["prev_timestep"] = times[i + 1] if i + 1 < len(times) else None
        scaled = scheduler.scale_model_input(x, t) if hasattr(scheduler, "scale_model_input") else x
        result = scheduler.step(network(scaled, t), t, x, **given, **more, return_dict=False)
        x = result[0]
        returned += result
    return returned


def keys_of(name: str) -> set[str]:
    return set(inspect.signature(getattr(diffusers, name)).parameters)


def same(mine: Tensor, their: Tensor, limit: float) -> bool:
    return float((mine - their).abs().max()) <= limit * float(their.abs().max())


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("name", NAMES)
def test_a_class_samples_as_that_of_diffusers(name: str) -> None:
    peer_class, own_class = getattr(diffusers, name), getattr(schedulers, name)
    compared = 0
    for config, values in CONFIGS.items():
        if not set(values) <= keys_of(name) or (name, config) in APART:
            continue
        try:
            peer = peer_class(**values)
            as_made = dict(peer.config)
            peer.set_timesteps(10)  # may change the config
            generator = torch.Generator().manual_seed(1)
            theirs = in_a_pipeline(peer, generator)
        except (ValueError, NotImplementedError):  # the class has no such thing
            continue
        if (name, config) in REFUSED:
            with pytest.raises(ValueError, match=REFUSED[name, config]):
                own_class(**values).set_timesteps(10)
            continue
        own = own_class(**values)
        assert dict(own.config) | {"_use_default_values": 0} == as_made | {"_use_default_values": 0}
        own.set_timesteps(10)
        assert torch.allclose(own.timesteps.double(), peer.timesteps.double(), rtol=1e-5, atol=1e-2), config
        start = float(getattr(peer, "init_noise_sigma", 1.0))
        assert float(own.init_noise_sigma) == pytest.approx(start, rel=1e-5), config
        assert own.order == getattr(peer, "order", 1)
        if hasattr(peer, "sigmas"):
            assert torch.allclose(own.sigmas, peer.sigmas.float(), rtol=2e-4, atol=2e-6), config
        mine_from = torch.Generator().manual_seed(1)
        mine = in_a_pipeline(own, mine_from)
        limit = LIMITS.get(name, LIMIT)
        assert len(mine) == len(theirs)
        assert same(mine[-1 - (own._second is not None)], theirs[-1 - (own._second is not None)], limit), config
        assert all(same(a, b, max(limit, 1e-4)) for a, b in zip(mine, theirs, strict=True)), config
        assert torch.equal(mine_from.get_state(), generator.get_state()), config
        compared += 1
    assert compared >= 2


# LMSDiscreteScheduler in the middle takes coefficients of order 4 for fewer derivatives than 4
LATER = [name for name in NAMES if hasattr(getattr(diffusers, name), "set_begin_index") and not name.startswith("LMS")]


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("name", LATER)
def test_a_later_start_and_its_noise_are_those_of_diffusers(name: str) -> None:
    """Image to image: 20 steps, of which the last 8 run."""
    runs = []
    for home in (diffusers, schedulers):
        scheduler = getattr(home, name)()
        scheduler.set_timesteps(20)
        first = 12 * scheduler.order
        scheduler.set_begin_index(first)
        t = scheduler.timesteps[first : first + 1]
        noise = scheduler.scale_noise if "Flow" in name else scheduler.add_noise
        arguments = (START, t, 0 * START + 1) if "Flow" in name else (START, 0 * START + 1, t)
        x = noise(*arguments)
        runs.append([x, *in_a_pipeline(scheduler, torch.Generator().manual_seed(2), first, x)])
    theirs, mine = runs
    for a, b in zip(mine, theirs, strict=True):
        assert same(a, b, max(LIMITS.get(name, 0), 1e-4 if a is not mine[0] else LIMIT))
