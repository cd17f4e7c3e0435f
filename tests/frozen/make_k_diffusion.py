"""Make k_diffusion.json: what k-diffusion's twelve samplers give on a small nonlinear network, in float64.

    pip download --no-deps k-diffusion==0.1.1.post1 && unzip k_diffusion-*.whl -d FOLDER
    python tests/frozen/make_k_diffusion.py FOLDER/k_diffusion/sampling.py > tests/frozen/k_diffusion.json

Only the file sampling.py is run: the package imports much that the samplers do not need. The JSON holds

    "network"               the formula of D(x, σ), as a line of Python; A is "matrix", x has shape (batch, 3), σ (batch,)
    "x"                     the start, (2, 3), at the first sigma, in k-diffusion's coordinates (x / α)
    "sigmas"                the grid of all samplers that take one: 11 values, the last 0
    "sigma_min", "sigma_max"   the range of those that take none (dpm_fast, dpm_adaptive): the grid's least above 0, and largest
    "cases"                 a list of
        "name"              unique
        "sampler"           the function's name in k-diffusion
        "options"           its keyword arguments (dpm_fast's n among them; its grid follows from n)
        "x"                 the result, (2, 3)
        "noise"             the standard normal draws that were used, in their order: {"from": σ, "to": σ, "z": (2, 3)}. With
                            churn "from" is the grid's sigma and "to" the raised one. A draw may be used with factor 0
        "path"              for samplers with a noise_sampler: W(σ) of the one Brownian path in σ that gave all draws,
                            {"sigma": [...], "w": [(2, 3), ...]}, descending; z = (W(to) - W(from)) / sqrt(|to - from|). The
                            two draws of a step of dpmpp_sde begin at the same σ and overlap: they are not independent
        "info"              dpm_adaptive's counts: steps, nfe, n_accept, n_reject

Numbers are written with all their digits. In float64 nothing is lost, also not in k-diffusion's 0-dimensional tensors.
"""

from __future__ import annotations

import importlib.util
import inspect
import json
import math
import sys
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

MATRIX = [[0.9, -0.4, 0.2], [0.3, 0.7, -0.5], [-0.2, 0.4, 0.8]]
NETWORK = "0.8 * tanh(x @ A.T / s) + 0.1 * cos(x / s), s = sqrt(1 + σ²)"
SIGMA_MIN, SIGMA_MAX, STEPS, RHO = 0.03, 14.6, 10, 7.0
CHURN = {"s_churn": 3.0, "s_tmin": 0.1, "s_tmax": 8.0, "s_noise": 1.003}
CASES: list[tuple[str, str, dict[str, Any]]] = [
    ("euler", "sample_euler", {}),
    ("euler_churn", "sample_euler", CHURN),
    ("euler_churn_capped", "sample_euler", {"s_churn": 40.0}),
    ("euler_ancestral", "sample_euler_ancestral", {}),
    ("euler_ancestral_eta", "sample_euler_ancestral", {"eta": 0.6, "s_noise": 0.9}),
    ("heun", "sample_heun", {}),
    ("heun_churn", "sample_heun", CHURN),
    ("dpm_2", "sample_dpm_2", {}),
    ("dpm_2_churn", "sample_dpm_2", CHURN),
    ("dpm_2_ancestral", "sample_dpm_2_ancestral", {}),
    ("dpm_2_ancestral_eta", "sample_dpm_2_ancestral", {"eta": 0.6, "s_noise": 0.9}),
    ("lms", "sample_lms", {}),
    ("lms_2", "sample_lms", {"order": 2}),
    ("dpm_fast_9", "sample_dpm_fast", {"n": 9}),
    ("dpm_fast_10", "sample_dpm_fast", {"n": 10}),
    ("dpm_fast_11", "sample_dpm_fast", {"n": 11}),
    ("dpm_fast_10_eta", "sample_dpm_fast", {"n": 10, "eta": 1.0}),
    ("dpm_adaptive", "sample_dpm_adaptive", {}),
    ("dpm_adaptive_2", "sample_dpm_adaptive", {"order": 2}),
    ("dpm_adaptive_tight", "sample_dpm_adaptive", {"rtol": 1e-3, "atol": 1e-4, "h_init": 0.5}),
    (
        "dpm_adaptive_pid",
        "sample_dpm_adaptive",
        {"pcoeff": 0.2, "icoeff": 0.6, "dcoeff": 0.1, "h_init": 1.0},
    ),
    ("dpm_adaptive_eta", "sample_dpm_adaptive", {"eta": 1.0, "s_noise": 0.95}),
    ("dpm_adaptive_2_eta", "sample_dpm_adaptive", {"order": 2, "eta": 0.5, "rtol": 0.01}),
    ("dpmpp_2s_ancestral", "sample_dpmpp_2s_ancestral", {}),
    ("dpmpp_2s_ancestral_eta", "sample_dpmpp_2s_ancestral", {"eta": 0.6, "s_noise": 0.9}),
    ("dpmpp_sde", "sample_dpmpp_sde", {}),
    ("dpmpp_sde_eta", "sample_dpmpp_sde", {"eta": 0.6, "s_noise": 0.9, "r": 0.4}),
    ("dpmpp_2m", "sample_dpmpp_2m", {}),
    ("dpmpp_2m_sde", "sample_dpmpp_2m_sde", {}),
    ("dpmpp_2m_sde_eta", "sample_dpmpp_2m_sde", {"eta": 0.6, "s_noise": 0.9}),
    ("dpmpp_2m_sde_heun", "sample_dpmpp_2m_sde", {"solver_type": "heun"}),
    ("dpmpp_3m_sde", "sample_dpmpp_3m_sde", {}),
    ("dpmpp_3m_sde_eta", "sample_dpmpp_3m_sde", {"eta": 0.6, "s_noise": 0.9}),
]


def denoiser(x: Tensor, sigma: Tensor) -> Tensor:
    """D(x, σ) of NETWORK."""
    s = (1 + sigma**2).sqrt().view(-1, 1)
    return 0.8 * torch.tanh(x @ torch.tensor(MATRIX).T / s) + 0.1 * torch.cos(x / s)


def load(path: str) -> ModuleType:
    """The file sampling.py as a module, in a package that has of k-diffusion only what the file uses."""
    package, utils, odes = (
        ModuleType("k_diffusion"),
        ModuleType("k_diffusion.utils"),
        ModuleType("torchdiffeq"),
    )
    package.__path__ = []  # type: ignore[attr-defined]
    utils.append_dims = lambda x, count: x[(...,) + (None,) * (count - x.ndim)]  # type: ignore[attr-defined]
    odes.odeint = None  # type: ignore[attr-defined]
    package.utils = utils  # type: ignore[attr-defined]
    sys.modules |= {"k_diffusion": package, "k_diffusion.utils": utils, "torchdiffeq": odes}
    spec = importlib.util.spec_from_file_location("k_diffusion.sampling", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Path:
    """A noise sampler: one Brownian path in σ, drawn downwards as it is asked for, with a record of all."""

    def __init__(self, like: Tensor, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        self.like = like
        self.sigma: list[float] = []
        self.w: list[Tensor] = []
        self.calls: list[dict[str, Any]] = []

    def at(self, sigma: float) -> Tensor:
        for known, w in zip(self.sigma, self.w, strict=True):
            if math.isclose(known, sigma, rel_tol=1e-12):
                return w
        w = torch.zeros_like(self.like)
        if self.sigma:
            assert sigma < self.sigma[-1], "the path is drawn downwards"
            z = torch.randn(self.like.shape, generator=self.generator, dtype=self.like.dtype)
            w = self.w[-1] + math.sqrt(self.sigma[-1] - sigma) * z
        self.sigma.append(sigma)
        self.w.append(w)
        return w

    def __call__(self, start: Any, end: Any) -> Tensor:
        a, b = float(start), float(end)
        w = self.at(a)
        z = (self.at(b) - w) / math.sqrt(abs(b - a))
        self.calls.append({"from": a, "to": b, "z": z.tolist()})
        return z


def karras(low: float, high: float, steps: int) -> Tensor:
    ramp = torch.linspace(0, 1, steps)
    return torch.cat(
        [(high ** (1 / RHO) + ramp * (low ** (1 / RHO) - high ** (1 / RHO))) ** RHO, torch.zeros(1)]
    )


def churned(sigmas: Tensor, options: dict[str, Any], draws: list[Tensor]) -> list[dict[str, Any]]:
    """The draws that churn used, of one for every step (2206.00364, algorithm 2, line 4)."""
    used = []
    for sigma, z in zip(sigmas[:-1].tolist(), draws, strict=True):
        inside = options.get("s_tmin", 0.0) <= sigma <= options.get("s_tmax", math.inf)
        gamma = (
            min(options.get("s_churn", 0.0) / (len(sigmas) - 1), math.sqrt(2) - 1)
            if inside
            else 0.0
        )
        if gamma:
            used.append({"from": sigma, "to": sigma * (1 + gamma), "z": z.tolist()})
    return used


def case(
    module: ModuleType, name: str, sampler: str, options: dict[str, Any], x: Tensor, sigmas: Tensor
) -> dict[str, Any]:
    function = getattr(module, sampler)
    path, draws = Path(x, seed=len(name)), []
    generator = torch.Generator().manual_seed(7)

    def randn_like(like: Tensor) -> Tensor:
        draws.append(torch.randn(like.shape, generator=generator, dtype=like.dtype))
        return draws[-1]

    arguments: dict[str, Any] = dict(options, disable=True)
    stochastic = "noise_sampler" in inspect.signature(function).parameters
    if stochastic:
        arguments["noise_sampler"] = path
    adaptive = sampler == "sample_dpm_adaptive"
    if adaptive:
        arguments["return_info"] = True
    ranged = adaptive or sampler == "sample_dpm_fast"
    places = (float(sigmas[-2]), float(sigmas[0])) if ranged else (sigmas,)
    original, torch.randn_like = torch.randn_like, randn_like
    try:
        result = function(denoiser, x.clone(), *places, **arguments)
    finally:
        torch.randn_like = original
    found: dict[str, Any] = {"name": name, "sampler": sampler, "options": options}
    result, info = result if adaptive else (result, None)
    found["x"] = result.tolist()
    found["noise"] = path.calls if stochastic else churned(sigmas, options, draws) if draws else []
    if path.calls:
        found["path"] = {"sigma": path.sigma, "w": [w.tolist() for w in path.w]}
    if info is not None:
        found["info"] = info
    return found


def main() -> None:
    torch.set_default_dtype(torch.float64)
    module = load(sys.argv[1])
    sigmas = karras(SIGMA_MIN, SIGMA_MAX, STEPS)
    x = SIGMA_MAX * torch.tensor([[0.3, -1.1, 0.7], [-0.2, 0.9, 1.4]])
    with torch.no_grad():
        cases = [
            case(module, name, sampler, options, x, sigmas) for name, sampler, options in CASES
        ]
    head = {
        "made_by": "tests/frozen/make_k_diffusion.py, with k-diffusion 0.1.1.post1",
        "network": NETWORK,
        "matrix": MATRIX,
        "x": x.tolist(),
        "sigmas": sigmas.tolist(),
        "sigma_min": float(sigmas[-2]),
        "sigma_max": float(sigmas[0]),
    }
    body = ",\n".join(json.dumps(found, ensure_ascii=False) for found in cases)
    print(json.dumps(head, ensure_ascii=False, indent=1)[:-2] + f',\n "cases": [\n{body}\n]}}')


if __name__ == "__main__":
    main()
