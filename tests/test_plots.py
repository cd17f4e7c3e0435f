"""Pictures: what is drawn is what the grids and the tables hold."""

from __future__ import annotations

import builtins
import math
from pathlib import Path
from typing import Any

import pytest
from matplotlib.axes import Axes
from PIL import Image

from alphabar.noising import NoiseSchedule
from alphabar.sampling import GRIDS, METHODS, Sampler, make_knots
from alphabar.sampling.plotting import COLOURS, coefficients, plot_grids, plot_table
from alphabar.sampling.table import Evaluation

SCALED = NoiseSchedule.scaled_linear(prediction="v_prediction")
ZTSNR = SCALED.zero_terminal_snr()
FLOW = NoiseSchedule.flow()


def named(axes: Axes) -> dict[str, tuple[list[float], list[float]]]:
    """The lines that have a label, as (x, y)."""
    lines = [line for line in axes.lines if not str(line.get_label()).startswith("_")]
    return {str(line.get_label()): (list(line.get_xdata()), list(line.get_ydata())) for line in lines}


def ticks(axis: Any) -> list[str]:
    return [label.get_text() for label in axis.get_ticklabels()]


def test_grids_draw_log_snr_against_the_step() -> None:
    figure = plot_grids(SCALED, ["trailing", "karras", {"grid": "karras", "rho": 3.0}], steps=8)
    curves, calls = figure.axes
    lines = named(curves)
    assert list(lines) == ["trailing", "karras", "karras (rho=3.0)"]
    for label, options in zip(
        lines, ({"grid": "trailing"}, {"grid": "karras"}, {"grid": "karras", "rho": 3.0}), strict=True
    ):
        x, y = lines[label]
        assert x == list(range(9))
        knots = make_knots(SCALED, 8, **options)
        assert y[:-1] == pytest.approx([2 * k.half_log_snr for k in knots[:-1]])
        assert math.isnan(y[-1])  # the clean end stands at the edge
    assert ticks(curves.yaxis)[-1] == "∞"
    assert "−∞" not in ticks(curves.yaxis)
    assert ticks(calls.yaxis) == ["trailing", "karras", "karras\n(rho=3.0)"]
    assert len(calls.lines) == 3 * 8 + 3  # a mark for each call of the network, a line for each grid


def test_zero_terminal_snr_stands_at_the_lower_edge() -> None:
    figure = plot_grids(ZTSNR, ["trailing"], steps=5)
    curves, calls = figure.axes
    assert math.isnan(named(curves)["trailing"][1][0])
    assert ticks(curves.yaxis)[0] == ticks(calls.xaxis)[0] == "−∞"
    assert "∞" not in ticks(calls.xaxis)
    lowest = min(float(x[0]) for x in (list(line.get_xdata()) for line in calls.lines) if len(x) == 1)
    assert all(float(value) > lowest for value in named(curves)["trailing"][1][1:-1])


def test_all_grids_at_once_are_told_apart() -> None:
    figure = plot_grids(FLOW, list(GRIDS), steps=6)
    lines = [line for line in figure.axes[0].lines if not str(line.get_label()).startswith("_")]
    styles = {(line.get_color(), line.get_marker()) for line in lines}
    assert len(styles) == len(GRIDS)
    assert {colour for colour, _ in styles} == set(COLOURS)


@pytest.mark.parametrize("name", ["euler", "dpmpp_2m", "heun", "dpmpp_sde", "lms", "unipc", "euler_ancestral_cfg_pp"])
def test_coefficients_are_those_of_the_table(name: str) -> None:
    table = Sampler(ZTSNR, name, steps=6).table
    rows = coefficients(table)
    assert all(len(values) == 6 for values in rows.values())
    for i, step in enumerate(table.steps):
        drawn = [values[i] for values in rows.values() if values[i] is not None]
        assert sorted(c for c in drawn if c) == sorted(c for _, c in step.carry[0])
        calls = sum(isinstance(op, Evaluation) for op in step.ops)
        assert sum(values[i] is not None for label, values in rows.items() if label.startswith("network")) == calls


def test_a_table_is_drawn() -> None:
    table = Sampler(SCALED, "dpmpp_2m", steps=6).table
    figure = table.plot()
    curve, weights = figure.axes
    assert named(curve)["dpmpp_2m"][1][:-1] == pytest.approx([2 * k.half_log_snr for k in table.knots[:-1]])
    lines = named(weights)
    assert list(lines) == ["x", "network", "memory 1"]
    assert lines["x"][0] == [1, 2, 3, 4, 5, 6]
    assert lines["memory 1"][0] == [2, 3, 4, 5, 6]  # the first step remembers nothing
    assert lines["x"][1] == pytest.approx([dict(step.carry[0])[0] for step in table.steps])
    assert weights.get_yscale() == "linear"


def test_large_coefficients_get_a_logarithmic_scale() -> None:
    schedule = NoiseSchedule.variance_exploding(prediction="epsilon")
    assert plot_table(Sampler(schedule, "euler", steps=6).table).axes[1].get_yscale() == "symlog"


@pytest.mark.parametrize("name", METHODS)
def test_every_method_can_be_drawn(name: str) -> None:
    labels = list(coefficients(Sampler(FLOW if name == "flow_heun" else SCALED, name, steps=5).table))
    assert labels[0] == "x" or name in ("consistency",)
    assert len(set(labels)) == len(labels)


@pytest.mark.parametrize("ending", ["png", "svg", "pdf"])
def test_pictures_are_written(tmp_path: Path, ending: str) -> None:
    for file, draw in (
        (tmp_path / f"grids.{ending}", lambda path: plot_grids(SCALED, steps=5, path=path)),
        (tmp_path / f"table.{ending}", lambda path: Sampler(ZTSNR, "dpmpp_sde", steps=5).table.plot(path)),
    ):
        draw(file)
        assert file.stat().st_size > 4000
        if ending == "png":
            with Image.open(file) as image:
                assert min(image.size) > 500
                assert len(image.convert("L").getcolors(256) or []) > 20  # something is on it


def test_nothing_is_imported_before_a_picture_is_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without(name: str, *arguments: Any, **more: Any) -> Any:
        if name.split(".")[0] == "matplotlib":
            raise ImportError("no matplotlib")
        return real(name, *arguments, **more)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(
        ImportError, match=r"^pictures need matplotlib, which is not installed: pip install 'alphabar\[matplotlib\]'$"
    ):
        plot_grids(SCALED)
    assert len(make_knots(SCALED, 5, "karras")) == 6


def test_bad_input() -> None:
    with pytest.raises(ValueError, match=r"^unknown grid 'karas'; did you mean 'karras'\?$"):
        plot_grids(SCALED, ["karas"])
    with pytest.raises(ValueError, match=r"^name at least one grid$"):
        plot_grids(SCALED, [])
