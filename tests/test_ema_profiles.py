"""Profiles of averages, against closed forms and peers; averages made from snapshots, against those
kept directly.
"""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers.training_utils import EMAModel
from safetensors.torch import load_file, save_file
from scipy.integrate import quad

from alphabar.training import (
    EMA_PROFILES,
    Constant,
    EMAProfile,
    HalfLife,
    InverseGamma,
    PowerFunction,
    Warmup,
)
from alphabar.training.cli import main
from alphabar.training.ema.posthoc import (
    FORMAT,
    inner_product,
    plan_posthoc,
    posthoc_coefficients,
    posthoc_ema,
    read_snapshots,
    save_snapshot,
)
from alphabar.training.ema.profiles import (
    gamma_of_sigma_rel,
    resolve_ema_profile,
    sigma_rel_of_gamma,
)

STEPS = [*range(1, 40), 100, 1000, 100_000]


@pytest.mark.parametrize(
    ("profile", "settings"),
    [
        (Warmup(decay=0.99), {"decay": 0.99}),
        (InverseGamma(), {"decay": 0.9999, "use_ema_warmup": True}),
        (
            InverseGamma(inverse_gamma=5.0, power=0.75, decay=0.9, min_decay=0.3),
            {
                "decay": 0.9,
                "use_ema_warmup": True,
                "inv_gamma": 5.0,
                "power": 0.75,
                "min_decay": 0.3,
            },
        ),
        (Constant(decay=0.9), {"decay": 0.9, "min_decay": 0.9}),
    ],
)
def test_profiles_of_diffusers(profile: EMAProfile, settings: dict[str, Any]) -> None:
    peer = EMAModel([torch.nn.Parameter(torch.zeros(1))], **settings)
    assert [profile(t) for t in STEPS] == [peer.get_decay(t) for t in STEPS]


@pytest.mark.parametrize("sigma_rel", [0.01, 0.05, 0.1, 0.25])
def test_power_function_weighs_by_a_power_of_time(sigma_rel: float) -> None:
    """The share of step τ in the average at t is the integral of the density over (τ - 1, τ]."""
    profile, last = PowerFunction(sigma_rel=sigma_rel), 50
    share = np.zeros(last)
    for t in range(1, last + 1):
        share *= profile(t)
        share[t - 1] += 1 - profile(t)
    edges = (np.arange(last + 1) / last) ** (profile.gamma + 1)
    np.testing.assert_allclose(share, np.diff(edges), rtol=1e-11, atol=1e-300)


def test_sigma_rel_is_the_standard_deviation_of_the_density() -> None:
    for sigma_rel in (0.02, 0.05, 0.1, 0.2, 0.29, 0.3):
        gamma = gamma_of_sigma_rel(sigma_rel)
        mean = quad(lambda s, g=gamma: (g + 1) * s ** (g + 1), 0, 1)[0]
        square = quad(lambda s, g=gamma: (g + 1) * s ** (g + 2), 0, 1)[0]
        assert math.sqrt(square - mean**2) == pytest.approx(sigma_rel, rel=1e-6)
        assert sigma_rel_of_gamma(gamma) == pytest.approx(sigma_rel, rel=1e-12)
    # as the paper states them
    assert [round(gamma_of_sigma_rel(s), 2) for s in (0.05, 0.1)] == [16.97, 6.94]


def test_half_life() -> None:
    profile = HalfLife(half_life=100.0, rampup=0.05)
    assert math.prod(profile(t) for t in range(5001, 5101)) == pytest.approx(0.5)
    assert profile(40) == pytest.approx(0.5 ** (1 / 2))  # 5 % of 40 steps
    assert HalfLife(half_life=100.0, rampup=None)(40) == 0.5 ** (1 / 100)


@pytest.mark.parametrize("name", EMA_PROFILES)
def test_every_profile(name: str) -> None:
    profile = resolve_ema_profile(name)
    assert profile(1) == 0.0  # the first update takes the weights as they are
    decays = [profile(t) for t in STEPS]
    assert all(0 <= one < 1 for one in decays) and decays == sorted(decays)
    for t, steps in [(100, 7), (9, 9), (9, 20), (1000, 1)]:
        expected = math.prod(profile(s) for s in range(max(1, t - steps + 1), t + 1))
        assert profile(t, steps) == pytest.approx(expected, rel=1e-12)
    assert resolve_ema_profile(profile.to_config()) == profile
    assert profile.label.startswith(name) and "/" not in profile.label


@pytest.mark.parametrize(
    ("profile", "words"),
    [
        ("ema", "unknown EMA profile 'ema'"),
        ({"decay": 0.9}, "unknown EMA profile None"),
        (
            {"name": "constant", "sigma_rel": 0.1},
            "the EMA profile 'constant' has decay, got 'sigma_rel'",
        ),
        ({"name": "constant", "decay": 1.0}, "decay must be at least 0 and below 1, got 1.0"),
        (
            {"name": "power_function", "sigma_rel": 0.31},
            "sigma_rel must lie between 0 and 0.3, got 0.31",
        ),
        ({"name": "power_function", "sigma_rel": math.nan}, "sigma_rel must lie between"),
        ({"name": "half_life", "half_life": 0.0}, "half_life must be positive and finite, got 0.0"),
        (
            {"name": "inverse_gamma", "min_decay": 0.9, "decay": 0.5},
            "min_decay must not exceed decay",
        ),
    ],
)
def test_what_does_not_fit_is_named(profile: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        resolve_ema_profile(profile)


# -- post-hoc --------------------------------------------------------------------------------------


def test_inner_products_are_integrals() -> None:
    for t1, g1, t2, g2 in [
        (100, 6.94, 100, 16.97),
        (100, 6.94, 250, 16.97),
        (300, 6.94, 120, 0.5),
        (7, 0.0, 9, 3.0),
    ]:

        def product(s: float, t1: int = t1, g1: float = g1, t2: int = t2, g2: float = g2) -> float:
            return (g1 + 1) * s**g1 / t1 ** (g1 + 1) * (g2 + 1) * s**g2 / t2 ** (g2 + 1)

        integral = quad(product, 0, min(t1, t2), epsabs=0, epsrel=1e-11)[0]
        assert float(inner_product(t1, g1, t2, g2)) == pytest.approx(integral, rel=1e-9)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[float, torch.Tensor]]:
    """A random walk of 2000 steps, snapshots of two averages every 50, and others that were kept
    directly.
    """
    folder = tmp_path_factory.mktemp("snapshots")
    kept = {s: PowerFunction(sigma_rel=s) for s in (0.04, 0.05, 0.07, 0.1, 0.15, 0.2)}
    averages = {s: torch.zeros(6, dtype=torch.float64) for s in kept}
    weights, generator = torch.zeros(6, dtype=torch.float64), torch.Generator().manual_seed(0)
    for t in range(1, 2001):
        weights = weights + torch.randn(6, dtype=torch.float64, generator=generator)
        for s, profile in kept.items():
            averages[s] = torch.lerp(averages[s], weights, 1 - profile(t))
            if s in (0.05, 0.1) and t % 50 == 0:
                save_snapshot(
                    folder,
                    {"a": averages[s][:2], "b.c": averages[s][2:].view(2, 2)},
                    step=t,
                    sigma_rel=s,
                )
    return folder, averages


@pytest.mark.parametrize(
    ("sigma_rel", "near"), [(0.04, 5e-3), (0.07, 1e-3), (0.15, 1e-3), (0.2, 3e-3)]
)
def test_an_average_that_was_not_kept(run: Any, sigma_rel: float, near: float) -> None:
    folder, averages = run
    made, right = posthoc_ema(folder, sigma_rel), averages[sigma_rel]
    found = torch.cat([made["a"], made["b.c"].flatten()]).double()
    error = (found - right).norm() / right.norm()
    others = [(averages[s] - right).norm() / right.norm() for s in (0.05, 0.1)]
    assert error < near and error < min(others) / 20
    assert made["b.c"].shape == (2, 2) and made["a"].dtype == torch.float32


@pytest.mark.parametrize("step", [2000, 1000, 1030])
@pytest.mark.parametrize("sigma_rel", [0.05, 0.1])
def test_snapshots_come_back(run: Any, sigma_rel: float, step: int) -> None:
    folder, averages = run
    plan = plan_posthoc(folder, sigma_rel, step)
    assert all(snapshot.step <= step for snapshot in plan.snapshots)
    if step % 50 == 0:
        assert plan.error < 1e-6 and np.abs(plan.coefficients).max() == pytest.approx(1, abs=1e-6)
    if step == 2000:
        right = averages[sigma_rel]
        torch.testing.assert_close(
            posthoc_ema(folder, sigma_rel)["a"].double(), right[:2], rtol=1e-6, atol=1e-6
        )
    assert plan.coefficients.sum() == pytest.approx(1, abs=1e-9)


def test_the_fit_is_the_best_and_its_error_the_distance() -> None:
    steps, gammas, gamma = [400, 400, 800, 800], [6.94, 16.97] * 2, gamma_of_sigma_rel(0.15)
    x, error = posthoc_coefficients(steps, gammas, 800, gamma)
    times = (np.arange(800_000) + 0.5) / 1000
    density = lambda t, g: np.where(times < t, (g + 1) * times**g / float(t) ** (g + 1), 0)  # noqa: E731
    parts, wanted = (
        np.stack([density(t, g) for t, g in zip(steps, gammas, strict=True)]),
        density(800, gamma),
    )
    best = np.linalg.lstsq(parts.T, wanted, rcond=None)[0]
    np.testing.assert_allclose(x, best / best.sum(), rtol=1e-3)
    assert error == pytest.approx(
        np.linalg.norm(x @ parts - wanted) / np.linalg.norm(wanted), rel=1e-3
    )


def test_float16_snapshots(tmp_path: Path) -> None:
    path = save_snapshot(
        tmp_path, {"w": torch.tensor([0.1])}, step=7, sigma_rel=0.1, dtype="float16"
    )
    assert load_file(path)["w"].dtype == torch.float16
    assert posthoc_ema(tmp_path, 0.1)["w"].item() == pytest.approx(0.1, rel=1e-3)
    with pytest.raises(
        ValueError, match=r"weights \['w'\] hold NaN, infinity, or what float16 cannot hold"
    ):
        save_snapshot(tmp_path, {"w": torch.tensor([1e6])}, step=8, sigma_rel=0.1, dtype="float16")
    assert [found.step for found in read_snapshots(tmp_path)] == [7]


def test_tied_weights_are_written(tmp_path: Path) -> None:
    w = torch.arange(4.0)
    path = save_snapshot(tmp_path, {"a": w, "b": w, "c": w[:2]}, step=1, sigma_rel=0.1)
    assert {name: value.tolist() for name, value in load_file(path).items()} == {
        "a": [0, 1, 2, 3],
        "b": [0, 1, 2, 3],
        "c": [0, 1],
    }
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


def test_folders_that_do_not_serve(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no folder of snapshots at"):
        posthoc_ema(tmp_path / "none", 0.1)
    save_file({"w": torch.ones(1)}, tmp_path / "model.safetensors")
    with pytest.raises(FileNotFoundError, match="no snapshots in"):
        posthoc_ema(tmp_path, 0.1)
    save_snapshot(tmp_path, {"w": torch.ones(1)}, step=10, sigma_rel=0.1)
    for step in (9, 11):
        with pytest.raises(
            ValueError, match=f"step must lie between the snapshots' 10 and 10, got {step}"
        ):
            posthoc_ema(tmp_path, 0.1, step)
    save_snapshot(tmp_path, {"v": torch.ones(1)}, step=20, sigma_rel=0.1)
    with pytest.raises(ValueError, match=r"has other weights than .*\['v', 'w'\]"):
        posthoc_ema(tmp_path, 0.1)
    (tmp_path / "bad.safetensors").write_bytes(b"abc")
    with pytest.raises(ValueError, match=r"bad.safetensors' is damaged"):
        posthoc_ema(tmp_path, 0.1)


def test_command(run: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, _ = run
    out = tmp_path / "new" / "x.safetensors"
    assert main(["ema", str(folder), "--sigma_rel", "0.07", "--out", str(out)]) == 0
    said = capsys.readouterr().out
    assert (
        "sigma_rel 0.07 at step 2000 from 80 snapshots, off the profile that was asked for by 0."
        in said
    )
    assert "weights alone" in said and "--checkpoint" in said
    for name, value in posthoc_ema(folder, 0.07).items():
        assert torch.equal(load_file(out)[name], value)
    assert main(["ema", str(folder), "--sigma_rel", "0.05", "--out", str(out)]) == 0
    assert "exactly the average that was asked for" in capsys.readouterr().out
    assert main(["ema", str(folder), "--sigma_rel", "0.5", "--out", str(out)]) == 2
    assert main(["ema", str(tmp_path / "none"), "--sigma_rel", "0.1", "--out", str(out)]) == 2
    assert "sigma_rel must lie between" in capsys.readouterr().err


def test_an_average_that_the_snapshots_do_not_give_is_refused_unless_accepted(
    run: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, _ = run
    out = tmp_path / "x.safetensors"
    command = ["ema", str(folder), "--sigma_rel", "0.002", "--out", str(out)]
    assert main(command) == 2 and not out.exists()
    error = capsys.readouterr().err
    found = re.search(
        r"the nearest one is off by \d+% of its profile.* accept it with --max_error ([\d.]+)\n",
        error,
    )
    assert found is not None and error.count("\n") == 1
    assert main([*command, "--max_error", found[1]]) == 0
    assert out.is_file() and "off the profile that was asked for by" in capsys.readouterr().out


@pytest.mark.parametrize(
    "metadata",
    [{"step": "-1"}, {"step": "1" * 5000}, {"gamma": "nan"}, {"gamma": "-3"}, {"gamma": "x"}],
)
def test_snapshots_that_say_nonsense_are_named(tmp_path: Path, metadata: dict[str, str]) -> None:
    save_file(
        {"w": torch.ones(1)},
        tmp_path / "a.safetensors",
        {"format": FORMAT, "step": "1", "gamma": "7.0"} | metadata,
    )
    with pytest.raises(ValueError, match=r"a\.safetensors' is damaged"):
        read_snapshots(tmp_path)
