"""Post-hoc EMA: make averages of any length from snapshots, after the training (EDM2, 2312.02696).

The source is Karras et al. 2312.02696. A power-function average at step t weights the model's
weights at time τ by p_{t,γ}(τ) = (γ+1) τ^γ / t^(γ+1) on [0, t] (eq. 121). Given snapshots i with
steps t_i and exponents γ_i, the combination Σ x_i \\hat θ_i has the density Σ x_i p_i. The
coefficients of the best fit to a wanted density p_r solve A x = b, where A_ij = <p_i, p_j> and
b_i = <p_i, p_r> (appendix C.3, algorithm 3), and

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
    """A snapshot of a power-function average: its path, ``step`` t and exponent ``gamma`` γ."""

    path: Path
    step: int
    gamma: float


@dataclass(frozen=True)
class PostHoc:
    """The combination of snapshots that best fits a wanted average, and the error of the fit.

    Args:
        snapshots: the snapshots of the combination.
        coefficients: one per snapshot, float64; the sum is 1.
        error: relative L2 distance of the densities, 0 for a perfect fit. It is large if the wanted
            average is shorter than the distance between snapshots.
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
    """Write a snapshot of a power-function average atomically; return its path.

    Args:
        folder: the folder to write to.
        weights: weights by name, on any device and of any dtype.
        step: optimizer steps so far.
        sigma_rel: length of the average, as a share of the training.
        dtype: dtype of the file, float32 or float16 (EDM2 stores float16).

    Raises:
        ValueError: float16 cannot represent a value.
        OSError: the folder cannot be written.

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
    """Write a safetensors file atomically: readers see the old or the new file, never a part.

    Raises:
        OSError: the file cannot be written, e.g. because the disk is full.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as folder:
        temporary = Path(folder, "whole")  # a file, not a buffer: weights are large
        try:
            save_file(_unshared(tensors), temporary, dict(metadata))
        except SafetensorError as error:  # not a subclass of OSError, but it has the same causes
            raise OSError(f"cannot write {str(path)!r}: {error}") from error
        with temporary.open("rb") as written:
            os.fsync(written.fileno())
        os.replace(temporary, path)
    return path


def read_snapshots(folder: str | os.PathLike[str]) -> tuple[Snapshot, ...]:
    """Return a folder's snapshots, sorted by step and gamma; ignore other safetensors files.

    Raises:
        FileNotFoundError: the folder does not exist or has no snapshot.
        ValueError: a file is damaged.

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
    """Return <p_{t1,γ1}, p_{t2,γ2}> (EDM2, eq. 151) in float64; the arguments are broadcast.

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
    """Return the snapshot coefficients for a wanted average, and the density's relative L2 error.

    EDM2, algorithm 3, in float64: the least-squares fit of the densities, scaled to sum 1.

    Args:
        steps: steps of the snapshots.
        gammas: exponents of the snapshots. No two snapshots may have the same step and gamma.
        step: step of the wanted average.
        gamma: exponent of the wanted average.

    >>> coefficients, error = posthoc_coefficients(
    ...     [100, 200, 200], [6.94, 6.94, 16.97], step=200, gamma=6.94
    ... )
    >>> coefficients.round(9).tolist(), round(error, 6)
    ([...0.0, 1.0, ...0.0], 0.0)
    """
    t, g = np.asarray(steps, dtype=np.float64), np.asarray(gammas, dtype=np.float64)
    # densities scaled to norm 1, so A has ones on its diagonal: same solution, better conditioned
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
    """Return the combination of a folder's snapshots for a wanted average.

    Snapshots after ``step`` are not used.

    Args:
        folder: the folder of the snapshots.
        sigma_rel: length of the average, as a share of the training.
        step: step of the average; default: the step of the last snapshot.

    Raises:
        FileNotFoundError: there are no snapshots.
        ValueError: ``step`` is before the first or after the last snapshot, or ``sigma_rel`` is out
            of range.
    """
    gamma = gamma_of_sigma_rel(sigma_rel)
    found = read_snapshots(folder)
    last = found[-1].step
    step = last if step is None else step
    # drop duplicates of (step, gamma)
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
    """Return the weights of a power-function average, combined from a folder of other snapshots.

    Args:
        folder: the folder of the snapshots.
        sigma_rel: length of the average, as a share of the training.
        step: step of the average; default: the step of the last snapshot.

    Returns:
        Float32 weights by name, summed in float64, for ``module.load_state_dict(weights,
        strict=False)``.

    Raises:
        FileNotFoundError: as in :func:`plan_posthoc`.
        ValueError: as in :func:`plan_posthoc`, or the snapshots are from different models.

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
    """Return the weighted sum of a plan's snapshots as float32, summed in float64."""
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
    """Return the tensors, cloned if they share memory: safetensors does not allow shared memory."""
    users = Counter(value.untyped_storage().data_ptr() for value in tensors.values())
    return {
        name: value.clone() if users[value.untyped_storage().data_ptr()] > 1 else value
        for name, value in tensors.items()
    }
