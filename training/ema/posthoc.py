"""Averages of weights of any length, made after the training from snapshots (post-hoc EMA, EDM2:
Karras et al. 2312.02696).

A power-function average at step t weighs the weights of time τ by p_{t,γ}(τ) = (γ+1) τ^γ / t^(γ+1)
on [0, t] (eq. 121). With snapshots i of steps t_i and exponents γ_i, the combination Σ x_i \\hat
θ_i has the density Σ x_i p_i. The coefficients that bring it nearest to a wanted density p_r solve
A x = b, where A_ij = <p_i, p_j> and b_i = <p_i, p_r> (appendix C.3, algorithm 3), and

    <p_{t1,γ1}, p_{t2,γ2}> = (γ1+1) (γ2+1) (t1/t2)^γ / ((γ1+γ2+1) max(t1, t2)),
    γ = γ2 where t1 < t2, else -γ1    (eq. 151).
"""

from __future__ import annotations

import os
import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ...noising.utils.registry import lookup
from .profiles import gamma_of_sigma_rel

FORMAT = "alphabar_ema"
SNAPSHOT_DTYPES: Mapping[str, torch.dtype] = {"float32": torch.float32, "float16": torch.float16}


@dataclass(frozen=True)
class Snapshot:
    """Where a snapshot of a power-function average lies, and which one it is: ``step`` t and
    ``gamma`` γ.
    """

    path: Path
    step: int
    gamma: float


@dataclass(frozen=True)
class PostHoc:
    """Which combination of snapshots is the wanted average, and how far its density is from the
    wanted one.

    ``coefficients``: one for each snapshot, float64, of sum 1. ``error``: the relative L2 distance
    of the densities, 0 for a perfect fit; it is large where the wanted average is shorter than the
    distance between snapshots.
    """

    snapshots: tuple[Snapshot, ...]
    coefficients: np.ndarray[Any, Any]
    error: float


def save_snapshot(
    folder: str | os.PathLike[str],
    weights: Mapping[str, Tensor],
    *,
    step: int,
    sigma_rel: float,
    dtype: str = "float32",
) -> Path:
    """Write a snapshot of a power-function average, whole or not at all, and return its path.

    ``weights``: by name, any devices and dtypes; written as ``dtype``, float32 or float16 (EDM2
    stores the latter). ``step``: optimizer steps so far. Raises ValueError for values that float16
    cannot hold, OSError for a folder that cannot be written.

    >>> save_snapshot(tempfile.mkdtemp(), {"w": torch.ones(2)}, step=500, sigma_rel=0.05).name
    'ema_00000500_0.05.safetensors'
    """
    kind = lookup("dtype of snapshots", dtype, SNAPSHOT_DTYPES)
    stored = {name: value.detach().to("cpu", kind).contiguous() for name, value in weights.items()}
    lost = [name for name, value in stored.items() if not bool(value.isfinite().all())]
    if lost:
        raise ValueError(
            f"weights {lost[:3]} hold NaN, infinity, or what {dtype} cannot hold; use "
            "dtype='float32'"
        )
    gamma = gamma_of_sigma_rel(sigma_rel)
    metadata = {
        "format": FORMAT,
        "step": str(step),
        "gamma": repr(gamma),
        "sigma_rel": repr(float(sigma_rel)),
    }
    return save_tensors(Path(folder, f"ema_{step:08d}_{sigma_rel:g}.safetensors"), stored, metadata)


def save_tensors(
    path: str | os.PathLike[str], tensors: Mapping[str, Tensor], metadata: Mapping[str, str]
) -> Path:
    """Write a safetensors file so that a reader sees the old file or the new one, never a part.

    Raises OSError where it cannot be written, a full disk included.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as folder:
        temporary = Path(folder, "whole")  # not through memory: weights are large
        try:
            save_file(_unshared(tensors), temporary, dict(metadata))
        except SafetensorError as error:  # which is no OSError, though it stands for one
            raise OSError(f"cannot write {str(path)!r}: {error}") from error
        with temporary.open("rb") as written:
            os.fsync(written.fileno())
        os.replace(temporary, path)
    return path


def read_snapshots(folder: str | os.PathLike[str]) -> tuple[Snapshot, ...]:
    """Return the snapshots in a folder, by step and then gamma; other safetensors files are passed
    over.

    Raises FileNotFoundError where there is no folder or no snapshot in it, ValueError for a damaged
    file.

    >>> folder = tempfile.mkdtemp()
    >>> path = save_snapshot(folder, {"w": torch.ones(2)}, step=500, sigma_rel=0.1)
    >>> [(found.step, round(found.gamma, 2)) for found in read_snapshots(folder)]
    [(500, 6.94)]
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"no folder of snapshots at {str(folder)!r}")
    found: list[Snapshot] = []
    for path in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(path, "pt") as file:
                metadata: dict[str, str] = file.metadata() or {}
            if metadata.get("format") == FORMAT:
                found.append(_snapshot(path, metadata))
        except (SafetensorError, KeyError, ValueError) as error:
            raise ValueError(
                f"{str(path)!r} is damaged ({error}); delete it, the others serve without it"
            ) from error
    if not found:
        raise FileNotFoundError(
            f"no snapshots in {str(folder)!r}; train with EMA(['power_function'], "
            "snapshot_every_n_steps=...)"
        )
    return tuple(sorted(found, key=lambda snapshot: (snapshot.step, snapshot.gamma)))


def _snapshot(path: Path, metadata: Mapping[str, str]) -> Snapshot:
    step, gamma = int(metadata["step"]), float(metadata["gamma"])
    if not 0 < step < 10**12 or not -0.5 < gamma < 1e12:
        raise ValueError(f"it says step {step} and gamma {gamma}")
    return Snapshot(path, step, gamma)


def inner_product(t1: Any, gamma1: Any, t2: Any, gamma2: Any) -> Any:
    """Return <p_{t1,γ1}, p_{t2,γ2}> (EDM2, eq. 151), float64; arguments are broadcast against each
    other.

    >>> float(inner_product(2.0, 0.0, 4.0, 0.0))  # ∫_0^2 1/2 · 1/4 dτ
    0.25
    """
    t1, gamma1, t2, gamma2 = (
        np.asarray(value, dtype=np.float64) for value in (t1, gamma1, t2, gamma2)
    )
    power = (t1 / t2) ** np.where(t1 < t2, gamma2, -gamma1)
    return (gamma1 + 1) * (gamma2 + 1) * power / ((gamma1 + gamma2 + 1) * np.maximum(t1, t2))


def posthoc_coefficients(
    steps: Sequence[int], gammas: Sequence[float], step: int, gamma: float
) -> tuple[np.ndarray[Any, Any], float]:
    """Return the coefficients of snapshots for a wanted average, and the relative L2 error of its
    density.

    EDM2, algorithm 3, in float64: the least-squares fit of the densities, scaled to sum 1.
    ``steps`` and ``gammas`` of the snapshots, which must differ from each other in one of the two.

    >>> coefficients, error = posthoc_coefficients(
    ...     [100, 200, 200], [6.94, 6.94, 16.97], step=200, gamma=6.94
    ... )
    >>> coefficients.round(9).tolist(), round(error, 6)
    ([...0.0, 1.0, ...0.0], 0.0)
    """
    t, g = np.asarray(steps, dtype=np.float64), np.asarray(gammas, dtype=np.float64)
    # by densities of norm 1, of which A has a diagonal of ones: the same solution from a better
    # conditioned system
    norm = np.sqrt(inner_product(t, g, t, g))
    norm_r = float(np.sqrt(inner_product(step, gamma, step, gamma)))
    A = inner_product(t[:, None], g[:, None], t[None], g[None]) / (norm[:, None] * norm[None])
    b = inner_product(t, g, step, gamma) / (norm * norm_r)
    x: np.ndarray[Any, Any] = np.linalg.lstsq(A, b, rcond=None)[0] * norm_r / norm
    x = x / x.sum()
    y = x * norm / norm_r
    return x, float(np.sqrt(max(0.0, 1 - 2 * y @ b + y @ A @ y)))


def plan_posthoc(
    folder: str | os.PathLike[str], sigma_rel: float, step: int | None = None
) -> PostHoc:
    """Return how the average of length ``sigma_rel`` at ``step`` (the last snapshot's by default)
    is made of a folder's.

    Later snapshots than ``step`` are not used. Raises FileNotFoundError where there are no
    snapshots, and ValueError for a step before the first or after the last of them and for a
    sigma_rel that no average has.
    """
    gamma = gamma_of_sigma_rel(sigma_rel)
    found = read_snapshots(folder)
    last = found[-1].step
    step = last if step is None else step
    # no pair twice
    used = tuple({(one.step, one.gamma): one for one in found if one.step <= step}.values())
    if not used or step > last:
        raise ValueError(
            f"step must lie between the snapshots' {found[0].step} and {last}, got {step}"
        )
    coefficients, error = posthoc_coefficients(
        [one.step for one in used], [one.gamma for one in used], step, gamma
    )
    return PostHoc(used, coefficients, error)


def posthoc_ema(
    folder: str | os.PathLike[str], sigma_rel: float, step: int | None = None
) -> dict[str, Tensor]:
    """Return the weights of a power-function average that was not kept, from a folder of snapshots
    of others.

    ``sigma_rel``: its length, as a share of the training. ``step``: its time, by default the last
    snapshot's. Float32 weights by name, summed in float64, for ``module.load_state_dict(weights,
    strict=False)``. Raises as :func:`plan_posthoc`, and ValueError for snapshots of different
    models.

    >>> folder = tempfile.mkdtemp()
    >>> for step in range(1, 9):
    ...     for sigma_rel in (0.05, 0.1):
    ...         path = save_snapshot(
    ...             folder, {"w": torch.full((2,), 3.0)}, step=step, sigma_rel=sigma_rel
    ...         )
    >>> posthoc_ema(folder, sigma_rel=0.07)["w"]
    tensor([3., 3.])
    """
    return combine(plan_posthoc(folder, sigma_rel, step))


def combine(plan: PostHoc) -> dict[str, Tensor]:
    """Return the combination of snapshots that a plan states, float32, summed in float64."""
    total: dict[str, Tensor] = {}
    for snapshot, x in zip(plan.snapshots, plan.coefficients.tolist(), strict=True):
        with safe_open(snapshot.path, "pt") as file:
            names = list(file.keys())
            if total and sorted(names) != sorted(total):
                raise ValueError(
                    f"{str(snapshot.path)!r} has other weights than "
                    f"{str(plan.snapshots[0].path)!r}: "
                    f"{sorted(set(names) ^ set(total))[:3]}; keep the snapshots of each model in a "
                    "folder of their own"
                )
            for name in names:
                value = x * file.get_tensor(name).double()
                total[name] = total[name] + value if name in total else value
    return {name: value.float() for name, value in total.items()}


def _unshared(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return tensors of which none shares memory with another, which the format does not allow."""
    users = Counter(value.untyped_storage().data_ptr() for value in tensors.values())
    return {
        name: value.clone() if users[value.untyped_storage().data_ptr()] > 1 else value
        for name, value in tensors.items()
    }
