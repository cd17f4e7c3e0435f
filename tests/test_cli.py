"""The commands ``alphabar samplers`` and ``alphabar plot``, and what every command does with what
it cannot do.
"""

from __future__ import annotations

import builtins
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from alphabar.noising import NoiseSchedule
from alphabar.sampling import GRIDS, METHODS
from alphabar.sampling.names import all_names
from alphabar.sampling.standalone import STANDALONE
from alphabar.training.cli.command import BROKEN_PIPE, COMMANDS, main
from alphabar.training.cli.plot import PICTURES
from alphabar.training.cli.samplers import columns, described, listing
from alphabar.training.flags.items import SCHEDULES, read_schedule


def row_of(name: str, text: str) -> str:
    """The row of a sampler, its wrapped names joined."""
    lines = text.splitlines()
    first = next(i for i, line in enumerate(lines) if line.split() and line.split()[0] == name)
    rest = lines[first + 1 :]
    count = next((i for i, line in enumerate(rest) if not line.startswith(" ")), len(rest))
    return " ".join([lines[first], *(line.strip() for line in rest[:count])])


def test_samplers_lists_every_one_with_its_facts(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["samplers"]) == 0
    text = capsys.readouterr().out
    names = all_names()
    for name, entry in {**METHODS, **STANDALONE}.items():
        row = row_of(name, text)
        cells = row.split()
        assert cells[1] == str(entry.order or "-")
        assert cells[2] == ("?" if entry.evaluations is None else str(entry.evaluations))
        assert (cells[3] == "yes") == entry.stochastic
        assert entry.source in row
        assert all(called in row for called in names[name])
    grids = re.search(r"^grids: (.*?)\n\n", text, re.DOTALL | re.MULTILINE)
    assert grids is not None
    assert re.split(r",\s+", grids[1]) == list(GRIDS)


@pytest.mark.parametrize("width", [60, 100, 200])
def test_the_listing_fits_its_width(width: int) -> None:
    lines = listing(width).splitlines()
    narrowest = 20 + max(
        len(line) - len(line.split("  ")[-1]) for line in lines if "  " in line.strip()
    )
    # a name is not cut, so that a line that holds one alone may be longer
    several = [line for line in lines if " " in line.split("  ")[-1].strip()]
    assert max(map(len, several)) <= max(width, narrowest)
    assert len(several) > 20


@pytest.mark.parametrize("columns", ["60", "80", "200"])
def test_no_name_is_cut_on_any_terminal(
    columns: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", columns)
    assert main(["samplers"]) == 0
    words = set(capsys.readouterr().out.replace(",", " ").split())
    assert {name for names in all_names().values() for name in names if " " not in name} <= words


def test_columns() -> None:
    assert (
        columns(("a", "bb", "c"), [("1", "2", "x y"), ("333", "4", "")], 40)
        == "a    bb  c\n1    2   x y\n333  4"
    )


@pytest.mark.parametrize("name", [*METHODS, *STANDALONE])
def test_samplers_describes_each(name: str) -> None:
    text = described(name)
    entry = {**METHODS, **STANDALONE}[name]
    assert f"{name}: " in text
    assert entry.documentation.splitlines()[0] in text
    assert all(option in text for option in entry.options)
    assert ">>>" not in text


@pytest.mark.parametrize("name", GRIDS)
def test_samplers_describes_each_grid(name: str) -> None:
    text = described(name)
    assert text.startswith(f"grid {name}\n\n")
    assert "final='" in text
    assert ">>>" not in text
    assert max(map(len, text.splitlines())) <= 140


def test_samplers_says_what_a_name_implies(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["samplers", "DPM++ 2M SDE Karras"]) == 0
    text = capsys.readouterr().out
    assert text.startswith(
        "dpmpp_2m_sde: order 2, 1 call of the network per step, draws noise; 2211.01095\n\n"
    )
    assert "'DPM++ 2M SDE Karras' implies: grid='karras'" in text
    assert "lcm: does not converge with the steps" in described("lcm")  # a method and a grid
    assert "dpm_adaptive: order 3, the network as often as it needs, draws no noise" in described(
        "DPM adaptive"
    )


def test_an_unknown_sampler_is_told_in_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["samplers", "DPM++ 2N"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("alphabar samplers: unknown method 'DPM++ 2N'; did you mean 'DPM++ 2M'")
    assert error.count("\n") == 1


# plot


def test_plot_grids(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "new" / "grids.png"
    assert (
        main(
            ["plot", "grids", "karras", "trailing", "--steps", "6", "--zero_snr", "--out", str(out)]
        )
        == 0
    )
    assert capsys.readouterr().out == f"{out}\n"
    assert out.read_bytes().startswith(b"\x89PNG")


def test_plot_table(tmp_path: Path) -> None:
    out = tmp_path / "table.svg"
    assert (
        main(
            [
                "plot",
                "table",
                "Euler a Karras",
                "--steps",
                "5",
                "--schedule",
                "flow",
                "--out",
                str(out),
            ]
        )
        == 0
    )
    assert "euler_ancestral: 5 steps" in re.sub(
        r"<!--\s*(.*?)\s*-->", r"\1", out.read_text(encoding="utf-8")
    )


@pytest.mark.parametrize(
    "arguments",
    [
        ["schedule"],
        ["schedule", "cosine", "flow:shift=3,t_max=0.5", "scaled_linear:zero_snr=true"],
        ["weights", "--prediction", "epsilon", "v_prediction"],
        ["weights", "min_snr:gamma=1", "min_snr:gamma=5", "--zero_snr"],
        ["timesteps"],
        ["timesteps", "uniform", "--schedule", "flow:shift=3"],
    ],
    ids=" ".join,
)
def test_plot_what_training_is_told(arguments: list[str], tmp_path: Path) -> None:
    out = tmp_path / "x.svg"
    assert main(["plot", *arguments, "--out", str(out)]) == 0
    words = out.read_text(encoding="utf-8")
    items = [word for word in arguments[1:] if ":" in word or word in ("cosine", "uniform")]
    assert all(
        item in words for item in items if arguments[arguments.index(item) - 1] != "--schedule"
    )


def test_plot_writes_where_it_stands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["plot", "grids", "trailing"]) == 0
    assert (tmp_path / "grids.png").is_file()


@pytest.mark.parametrize("name", SCHEDULES)
def test_schedules_by_name(name: str) -> None:
    schedule = read_schedule(name)
    assert schedule.curve.kind in (name, "discrete")


def test_schedules_from_a_folder(tmp_path: Path) -> None:
    schedule = NoiseSchedule.flow(shift=3.0)
    schedule.save_pretrained(tmp_path)
    assert read_schedule(str(tmp_path)) == schedule
    betas = NoiseSchedule.scaled_linear(prediction="v_prediction").zero_terminal_snr()
    assert read_schedule("scaled_linear", zero_snr=True) == betas


BAD: list[tuple[list[str], str]] = [
    (["grids", "karas"], "alphabar plot: unknown grid 'karas'; did you mean 'karras'?\n"),
    (
        ["grids", "--steps", "0"],
        "alphabar plot: steps must be between 1 and the 1000 training timesteps, got 0\n",
    ),
    (
        ["grids", "--schedule", "scaledlinear"],
        "alphabar plot: unknown schedule 'scaledlinear'; did you mean 'scaled_linear'?\n",
    ),
    (["grids", "--schedule", "./nowhere"], "alphabar plot: no schedule in 'nowhere': neither"),
    (
        ["grids", "--schedule", "karras", "--zero_snr"],
        "alphabar plot: a karras curve cannot be rescaled to zero terminal SNR",
    ),
    (["schedule", "flw"], "alphabar plot: unknown schedule 'flw'; did you mean 'flow'?\n"),
    (
        ["weights", "min_snr:gama=1"],
        "alphabar plot: unknown option of weighting min_snr 'gama'; did you mean 'gamma'?\n",
    ),
    (
        ["weights", "--zero_snr", "--prediction", "epsilon"],
        "alphabar plot: prediction 'epsilon' is ill-posed",
    ),
    (
        ["timesteps", "unifrm"],
        "alphabar plot: unknown timestep density 'unifrm'; did you mean 'uniform'?\n",
    ),
    (
        ["table", "Eulr"],
        "alphabar plot: unknown method 'Eulr'; did you mean 'Euler' or 'Euler a'?\n",
    ),
    (["table", "--grid", "karas"], "alphabar plot: unknown grid 'karas'; did you mean 'karras'?\n"),
    (["grids", "--out", "x.xyz"], "alphabar plot: Format 'xyz' is not supported"),
]


@pytest.mark.parametrize("number", range(len(BAD)))
def test_plot_refuses_in_one_line(
    number: int, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    arguments, message = BAD[number]
    assert main(["plot", *arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith(message)
    assert error.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_plot_without_matplotlib(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = builtins.__import__

    def without(name: str, *arguments: Any, **more: Any) -> Any:
        if name.split(".")[0] == "matplotlib":
            raise ImportError("no matplotlib")
        return real(name, *arguments, **more)

    monkeypatch.setattr(builtins, "__import__", without)
    assert main(["plot", "grids", "--out", str(tmp_path / "x.png")]) == 2
    assert capsys.readouterr().err == (
        "alphabar plot: pictures need matplotlib, which is not installed: pip install "
        "'alphabar[matplotlib]'\n"
    )


def test_every_kind_and_command_has_help(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in [
        ["--help"],
        *([name, "--help"] for name in COMMANDS),
        *(["plot", kind, "--help"] for kind in PICTURES),
    ]:
        with pytest.raises(SystemExit) as stop:
            main(arguments)
        assert stop.value.code == 0
        assert "usage: alphabar" in capsys.readouterr().out


# starting and ending


def run_alphabar(command: str, timeout: float = 120) -> subprocess.CompletedProcess[str]:
    """Run a shell line in which ``alphabar`` is the console command."""
    alphabar = f"{shlex.quote(sys.executable)} -m alphabar.training.cli"
    line = command.replace("alphabar ", f"{alphabar} ")
    return subprocess.run(["bash", "-c", line], capture_output=True, text=True, timeout=timeout)


@pytest.mark.slow  # the exit code is with the fast tests
def test_a_reader_that_goes_away_ends_it_quietly() -> None:
    result = run_alphabar("alphabar samplers | head -1; echo ${PIPESTATUS[@]}")
    assert result.stderr == ""
    first, statuses = result.stdout.splitlines()
    # head may still be there when the last line is written
    assert first.startswith("name") and statuses in ("0 0", f"{BROKEN_PIPE} 0")
    result = run_alphabar(
        "alphabar samplers --help | true; alphabar samplers euler > /dev/null; echo $?"
    )
    assert result.stderr == "" and result.stdout == "0\n"


def test_a_reader_that_is_gone_is_told_by_the_exit_code() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "wb") as closed:
        command = [sys.executable, "-m", "alphabar.training.cli", "samplers"]
        result = subprocess.run(
            command, stdout=closed, stderr=subprocess.PIPE, text=True, timeout=120
        )
    assert (result.returncode, result.stderr) == (BROKEN_PIPE, "")


HEAVY = (
    "lightning",
    "pytorch_lightning",
    "diffusers",
    "transformers",
    "matplotlib",
    "datasets",
    "accelerate",
    "PIL",
)


LINES = """
import argparse, sys
import alphabar.training as t
from alphabar.training.cli import main

try:
    main(["--help"])
except SystemExit:
    pass
assert "torch" not in sys.modules, "seconds, for a page of text"
main(["samplers"])
assert not [m for m in sys.modules if m.startswith(("alphabar.training.loops", "torch.distributed.fsdp"))]
main(["inspect", FOLDER])
p = argparse.ArgumentParser()
t.add_noising_arguments(p)
t.noising_from_arguments(p.parse_args([]))
print(sorted(HEAVY & sys.modules.keys()), file=sys.stderr)
"""


def test_what_needs_no_training_loads_no_lightning(tmp_path: Path) -> None:
    """One process runs all: what none of them loads, each of them does not load."""
    NoiseSchedule.flow(3.0).save_pretrained(tmp_path)
    code = f"FOLDER, HEAVY = {str(tmp_path)!r}, set({HEAVY!r})\n{LINES}"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0 and result.stderr == "[]\n", result.stderr


def test_the_module_is_where_it_was() -> None:
    import alphabar.training as training

    assert training.DiffusionModule.__name__ == "DiffusionModule"
    assert all(hasattr(training, name) for name in training.__all__)
    assert set(training.__all__) == set(training._PLACES) <= set(dir(training))
    with pytest.raises(
        AttributeError, match=r"module 'alphabar\.training' has no attribute 'DiffusionModul'"
    ):
        _ = training.DiffusionModul
