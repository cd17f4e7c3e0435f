"""Definitions from outside the tree: an installed package with an entry point, and a script, are
used everywhere by name.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

OUTSIDE = Path(__file__).parent / "outside_package"


def installed(folder: Path, module: str, source: str) -> Path:
    """Make what pip leaves of a package whose pyproject.toml has
    [project.entry-points."alphabar.plugins"].
    """
    info = folder / f"{module}-1.0.dist-info"
    info.mkdir(parents=True)
    (folder / f"{module}.py").write_text(source)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {module}\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[alphabar.plugins]\n{module} = {module}\n")
    return folder


def python(code: str, folder: Path) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join(filter(None, [str(folder), os.environ.get("PYTHONPATH")]))
    return subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": path},
    )


END_TO_END = """
import argparse, sys, torch
import alphabar.training
assert "alphabar_outside" not in sys.modules, "imports must not load plugins"
from alphabar.noising import Noising, NoiseSchedule
from alphabar.sampling import RollingSampler, Sampler
from alphabar.training import add_noising_arguments, noising_from_arguments
from alphabar.training.cli import main
from alphabar.training.flags.items import read_schedule

parser = argparse.ArgumentParser()
add_noising_arguments(parser)
text = " ".join(parser.format_help().split())
for name in ("outside_half", "outside_late", "stratified_outside_late", "outside_flicker", "outside_fourth", "outside_betas"):
    assert name in text, name
args = parser.parse_args(
    "--noise_schedule outside_circle --loss_weighting outside_half --timestep_density outside_late "
    "--noise outside_flicker --loss_type outside_fourth".split()
)
noising = noising_from_arguments(args)
noised = noising(torch.zeros(4, 3, 8, 8), step=0)
assert noised.loss(noised.x).isfinite() and noised.weight.tolist() == [0.5] * 4
assert noising.schedule.curve.kind == "outside_circle"
again = NoiseSchedule.from_config(noising.schedule.to_config())
assert again == noising.schedule
assert read_schedule("outside_betas").curve.beta_schedule == "outside_betas"

for grid in ("outside_halves", "outside_even"):
    sampler = Sampler(again, "outside_euler", 4, grid)
    x = sampler(lambda x, t: 0.1 * x, (2, 3, 8, 8), seeds=0)
    assert x.isfinite().all()
noised = Noising(again, timesteps="outside_mirrored:axis=tokens")(torch.zeros(2, 4, 8), step=0)
rolling = RollingSampler(sampler, "outside_pairs", chunks=4, axis="tokens")
assert rolling.steps == 5 and noised.timesteps.shape == (2, 4)
assert rolling(lambda x, t: 0.1 * x, (2, 4, 8), seeds=0).isfinite().all()
named = Sampler(NoiseSchedule.linear(), "Outside Euler outside_even", 4)
assert (named.method.name, named.grid) == ("outside_euler", "outside_even")
assert main(["samplers"]) == 0 and main(["samplers", "outside_euler"]) == 0
assert main(["plot", "weights", "outside_half", "--out", sys.argv[1] if len(sys.argv) > 1 else "w.png"]) == 0
"""


def test_a_package_from_outside_is_used_everywhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    source = (OUTSIDE / "alphabar_outside.py").read_text(encoding="utf-8")
    folder = installed(tmp_path / "site", "alphabar_outside", source)
    result = python(END_TO_END, folder)
    assert result.returncode == 0, result.stderr
    assert "outside_euler" in result.stdout and "outside_even" in result.stdout
    assert (tmp_path / "w.png").stat().st_size > 1000


def test_a_broken_package_is_a_warning(tmp_path: Path) -> None:
    folder = installed(tmp_path / "site", "alphabar_broken", "import nowhere_at_all\n")
    result = python("from alphabar.noising import WEIGHTINGS; print(len(WEIGHTINGS) > 20)", folder)
    assert result.stdout == "True\n"
    assert "the plugin 'alphabar_broken' (alphabar_broken) is left out, its import fails:" in (
        result.stderr
    )


def test_a_taken_name_is_an_error_and_a_cell_can_be_run_twice() -> None:
    code = """
from alphabar.noising import WEIGHTINGS, Scheme
def cell():
    class Half(Scheme):
        name = "mine"
        def numerator(self, alpha2, sigma2, det2):
            return 0.5 * det2
    return WEIGHTINGS.register(Half)
cell(); again = cell()
assert WEIGHTINGS["mine"] is again
class Other(Scheme):
    name = "p2"
try:
    WEIGHTINGS.register(Other)
except ValueError as error:
    print(error)
"""
    result = python(code, Path())
    wanted = "weighting 'p2' is registered already, by alphabar.noising.weighting.schemes.P2; choose another name\n"
    assert result.stdout == wanted, result.stderr
