"""Pictures: what is drawn is what the schedules, weights, densities, grids and tables hold."""

from __future__ import annotations

import builtins
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from matplotlib.axes import Axes
from PIL import Image
from torch import Tensor, nn

from alphabar.noising import (
    CURVES,
    TIMESTEPS,
    WEIGHTINGS,
    MinSNR,
    NoiseSchedule,
    QuantileTimesteps,
    UniformTimesteps,
)
from alphabar.noising.timesteps.importance import SecondMoments
from alphabar.noising.utils.items import call_with_options, make_item, parse_item
from alphabar.sampling import GRIDS, METHODS, Sampler, make_knots
from alphabar.sampling.tracing import Evaluation
from alphabar.training.cli.plot import drawable
from alphabar.training.flags.items import SCHEDULES, read_schedule
from alphabar.training.plots.figure import COLOURS
from alphabar.training.plots.schedules import (
    densities_of,
    is_learned,
    plot_schedules,
    plot_timesteps,
    plot_weights,
)
from alphabar.training.plots.tables import coefficients, plot_grids, plot_table

SCALED = NoiseSchedule.scaled_linear(prediction="v_prediction")
ZTSNR = SCALED.zero_terminal_snr()
FLOW = NoiseSchedule.flow()


def named(axes: Axes) -> dict[str, tuple[list[float], list[float]]]:
    """The lines that have a label, as (x, y)."""
    lines = [line for line in axes.lines if not str(line.get_label()).startswith("_")]
    return {
        str(line.get_label()): (list(line.get_xdata()), list(line.get_ydata())) for line in lines
    }


def ticks(axis: Any) -> list[str]:
    return [label.get_text() for label in axis.get_ticklabels()]


def test_grids_draw_log_snr_against_the_step() -> None:
    figure = plot_grids(SCALED, ["trailing", "karras", {"grid": "karras", "rho": 3.0}], steps=8)
    curves, calls = figure.axes
    lines = named(curves)
    assert list(lines) == ["trailing", "karras", "karras (rho=3.0)"]
    for label, options in zip(
        lines,
        ({"grid": "trailing"}, {"grid": "karras"}, {"grid": "karras", "rho": 3.0}),
        strict=True,
    ):
        x, y = lines[label]
        assert x == list(range(9))
        knots = make_knots(SCALED, 8, **options)
        assert y[:-1] == pytest.approx([2 * k.half_log_snr for k in knots[:-1]])
        assert math.isnan(y[-1])  # the clean end stands at the edge
    assert ticks(curves.yaxis)[-1] == "∞"
    assert "−∞" not in ticks(curves.yaxis)
    assert ticks(calls.yaxis) == ["trailing", "karras", "karras\n(rho=3.0)"]
    # a mark for each call of the network, a line for each grid
    assert len(calls.lines) == 3 * 8 + 3


def test_zero_terminal_snr_stands_at_the_lower_edge() -> None:
    figure = plot_grids(ZTSNR, ["trailing"], steps=5)
    curves, calls = figure.axes
    assert math.isnan(named(curves)["trailing"][1][0])
    assert ticks(curves.yaxis)[0] == ticks(calls.xaxis)[0] == "−∞"
    assert "∞" not in ticks(calls.xaxis)
    lowest = min(
        float(x[0]) for x in (list(line.get_xdata()) for line in calls.lines) if len(x) == 1
    )
    assert all(float(value) > lowest for value in named(curves)["trailing"][1][1:-1])


def test_all_grids_at_once_are_told_apart() -> None:
    figure = plot_grids(FLOW, list(GRIDS), steps=6)
    lines = [line for line in figure.axes[0].lines if not str(line.get_label()).startswith("_")]
    styles = {(line.get_color(), line.get_marker()) for line in lines}
    assert len(styles) == len(GRIDS)
    assert {colour for colour, _ in styles} == set(COLOURS)


@pytest.mark.parametrize(
    "name", ["euler", "dpmpp_2m", "heun", "dpmpp_sde", "lms", "unipc", "euler_ancestral_cfg_pp"]
)
def test_coefficients_are_those_of_the_table(name: str) -> None:
    table = Sampler(ZTSNR, name, steps=6).table
    rows = coefficients(table)
    assert all(len(values) == 6 for values in rows.values())
    for i, step in enumerate(table.steps):
        drawn = [values[i] for values in rows.values() if values[i] is not None]
        assert sorted(c for c in drawn if c) == sorted(c for _, c in step.carry[0])
        calls = sum(isinstance(op, Evaluation) for op in step.ops)
        assert (
            sum(
                values[i] is not None
                for label, values in rows.items()
                if label.startswith("network")
            )
            == calls
        )


def test_a_table_is_drawn() -> None:
    table = Sampler(SCALED, "dpmpp_2m", steps=6).table
    figure = plot_table(table)
    curve, weights = figure.axes
    assert named(curve)["dpmpp_2m"][1][:-1] == pytest.approx(
        [2 * k.half_log_snr for k in table.knots[:-1]]
    )
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
    labels = list(
        coefficients(Sampler(FLOW if name == "flow_heun" else SCALED, name, steps=5).table)
    )
    assert labels[0] == "x" or name in ("consistency",)
    assert len(set(labels)) == len(labels)


@pytest.mark.parametrize("ending", ["png", "svg", "pdf"])
def test_pictures_are_written(tmp_path: Path, ending: str) -> None:
    for file, draw in (
        (tmp_path / f"grids.{ending}", lambda path: plot_grids(SCALED, steps=5, path=path)),
        (
            tmp_path / f"table.{ending}",
            lambda path: plot_table(Sampler(ZTSNR, "dpmpp_sde", steps=5).table, path),
        ),
        (
            tmp_path / f"schedule.{ending}",
            lambda path: plot_schedules({"sd": SCALED, "zero SNR": ZTSNR}, path),
        ),
        (
            tmp_path / f"weights.{ending}",
            lambda path: plot_weights(ZTSNR, {"min_snr": MinSNR()}, path=path),
        ),
        (
            tmp_path / f"timesteps.{ending}",
            lambda path: plot_timesteps(FLOW, {"uniform": UniformTimesteps()}, path),
        ),
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
        ImportError,
        match=r"^pictures need matplotlib, which is not installed: pip install 'alphabar\[matplotlib\]'$",
    ):
        plot_grids(SCALED)
    assert len(make_knots(SCALED, 5, "karras")) == 6


def test_bad_input() -> None:
    with pytest.raises(ValueError, match=r"^unknown grid 'karas'; did you mean 'karras'\?$"):
        plot_grids(SCALED, ["karas"])
    with pytest.raises(ValueError, match=r"^name at least one grid$"):
        plot_grids(SCALED, [])
    for draw, what in (
        (lambda: plot_schedules({}), "schedule"),
        (lambda: plot_weights(SCALED, {}), "weighting"),
        (lambda: plot_timesteps(SCALED, {}), "timestep density"),
    ):
        with pytest.raises(ValueError, match=f"^name at least one {what}$"):
            draw()


# schedules


def test_schedules_are_drawn_as_they_are() -> None:
    drawn = {
        "plain": SCALED,
        "zero": ZTSNR,
        "flow": NoiseSchedule.flow(shift=3.0),
        "edm": NoiseSchedule.karras(),
    }
    figure = plot_schedules(drawn)
    alpha, sigma, log_snr = (named(axes) for axes in figure.axes)
    assert list(alpha) == list(sigma) == list(log_snr) == list(drawn)
    for label, schedule in drawn.items():
        x, u = alpha[label][0], torch.tensor(alpha[label][0], dtype=torch.float64)
        assert (x[0], x[-1], x == sigma[label][0] == log_snr[label][0]) == (0.0, 1.0, True)
        curve = schedule.curve
        t = curve.time_at_quantile(u) if label == "edm" else u * curve.t_max
        assert alpha[label][1] == pytest.approx(schedule.alpha(t).tolist(), abs=1e-12)
        assert sigma[label][1] == pytest.approx(schedule.sigma(t).tolist(), rel=1e-12)
        ours, exact = torch.tensor(log_snr[label][1]).double(), schedule.log_snr(t)
        assert torch.allclose(ours[exact.isfinite()], exact[exact.isfinite()], rtol=1e-5)
        assert bool(ours[~exact.isfinite()].isnan().all())
    rings = [line for line in figure.axes[2].lines if len(list(line.get_xdata())) == 1]
    assert len(rings) == 3  # both ends of the flow, one of zero SNR
    at_noise = [line.get_markersize() for line in rings if list(line.get_xdata()) == [1.0]]
    assert len(set(at_noise)) == 2  # neither hides the other
    assert ticks(figure.axes[2].yaxis)[0] == "−∞"
    assert ticks(figure.axes[2].yaxis)[-1] == "∞"
    assert figure.axes[1].get_yscale() == "log"
    assert plot_schedules({"plain": SCALED}).axes[1].get_yscale() == "linear"


def test_a_part_is_drawn_where_it_lies() -> None:
    (x, _), *_ = named(plot_schedules({"part": SCALED.truncated(500, 999)}).axes[0]).values()
    assert x[0] == pytest.approx(0.5, abs=2e-3)
    assert x[-1] == 1.0


@pytest.mark.parametrize("kind", CURVES)
def test_every_curve_can_be_drawn(kind: str) -> None:
    schedule = NoiseSchedule(CURVES[kind](), "v_prediction")
    for axes in plot_schedules({kind: schedule, "shifted": schedule.shifted(2.0)}).axes:
        assert len(named(axes)) == 2


# weights


@pytest.mark.parametrize("name", drawable(WEIGHTINGS))
def test_weights_are_those_of_training(name: str) -> None:
    predictions, weighting = ["v_prediction", "sample", "flow_prediction"], WEIGHTINGS[name]()
    figure = plot_weights(ZTSNR, {name: weighting, "uniform": WEIGHTINGS["uniform"]()}, predictions)
    for axes, prediction in zip(figure.axes, predictions, strict=True):
        x, y = named(axes)[name]
        schedule = ZTSNR.with_prediction(prediction)
        t = schedule.time(torch.tensor(x, dtype=torch.float64))
        alpha, sigma = schedule.alpha(t), schedule.sigma(t)
        det = schedule.prediction.determinant(alpha, sigma)
        expected = weighting(alpha, sigma, det, schedule.curve.fraction(t))
        assert min(x) < -10
        assert y == pytest.approx(expected.tolist(), rel=1e-6)
        assert axes.get_yscale() == "log"
        assert set(named(axes)["uniform"][1]) == {1.0}


class Learned(nn.Module):
    floor = 0.0


class FollowsLosses(UniformTimesteps):
    def history(self) -> SecondMoments:
        return SecondMoments(2, 2, 0.1)


def test_what_is_learned_is_not_drawn() -> None:
    assert is_learned(Learned())
    with pytest.raises(
        ValueError, match=r"^weighting 'mine' is learned: what its weights are, only training says$"
    ):
        plot_weights(SCALED, {"mine": Learned()})
    with pytest.raises(ValueError, match=r"^timestep density 'mine' follows measured losses"):
        plot_timesteps(SCALED, {"mine": FollowsLosses()})

    def needs(gamma: float) -> MinSNR:
        return MinSNR(gamma=gamma)

    assert drawable({"learned": Learned, "needs": needs, "min_snr": MinSNR}) == ["min_snr"]
    assert drawable(TIMESTEPS)[0] == "uniform"
    assert "stratified" not in drawable(TIMESTEPS)  # the same density as uniform


# densities


class LogitNormal(QuantileTimesteps):
    def quantile(self, u: Tensor) -> Tensor:
        return torch.sigmoid(0.5 + math.sqrt(2) * torch.erfinv(2 * u - 1))


class HalfAtTheEnd(QuantileTimesteps):
    def quantile(self, u: Tensor) -> Tensor:
        return (2 * u).clamp(max=1.0)


def test_a_density_is_exact() -> None:
    (x, p), (log_snr, q) = densities_of(LogitNormal(), FLOW.curve)
    edges = torch.linspace(0, 1, len(x) + 1, dtype=torch.float64)
    cdf = torch.special.ndtr(torch.logit(edges) - 0.5)
    assert p.tolist() == pytest.approx((cdf.diff() * len(x)).tolist(), abs=1e-12)
    # on the straight flow log SNR is -2 logit(t): normal, of mean -1 and deviation 2
    steps = log_snr.diff().mean()
    ends = torch.cat([log_snr - steps / 2, log_snr[-1:] + steps / 2])
    shares = torch.special.ndtr((ends + 1) / 2).diff().abs() / steps.abs()
    assert q.tolist() == pytest.approx(shares.tolist(), abs=1e-10)
    assert float((q * steps.abs()).sum()) == pytest.approx(1.0, abs=1e-5)


def test_a_density_on_timesteps_is_the_probability_of_each() -> None:
    schedule = NoiseSchedule.linear(num_train_timesteps=10)
    (x, p), (log_snr, q) = densities_of(LogitNormal(), schedule.curve)
    edges = torch.special.ndtr(torch.logit(torch.linspace(0, 1, 11, dtype=torch.float64)) - 0.5)
    assert x.tolist() == pytest.approx([0.05 + 0.1 * k for k in range(10)])
    assert (p / 10).tolist() == pytest.approx(edges.diff().tolist(), abs=1e-12)
    levels = schedule.log_snr(torch.arange(10.0, dtype=torch.float64))
    assert log_snr.tolist() == levels.tolist()
    assert q[0].item() == pytest.approx(float(edges.diff()[0] / (levels[0] - levels[1])), rel=1e-9)
    assert q[4].item() == pytest.approx(
        float(edges.diff()[4] / ((levels[3] - levels[5]) / 2)), rel=1e-9
    )
    # zero SNR, and the interval that ends there, have no width
    assert len(densities_of(LogitNormal(), ZTSNR.curve)[1][0]) == 998


def test_a_mass_at_one_time_is_in_its_interval() -> None:
    (_, p), _ = densities_of(HalfAtTheEnd(), NoiseSchedule.flow().truncated(0.25, 1.0).curve)
    assert p[:-1].tolist() == pytest.approx([0.5] * (len(p) - 1), abs=1e-9)
    assert float(p.mean()) == pytest.approx(1.0)
    assert float(p[-1]) == pytest.approx(len(p) * 0.5 + 0.5)


@pytest.mark.parametrize("name", drawable(TIMESTEPS))
@pytest.mark.parametrize("schedule", [SCALED, ZTSNR, FLOW, NoiseSchedule.karras()], ids=str)
def test_every_density_can_be_drawn(name: str, schedule: NoiseSchedule) -> None:
    figure = plot_timesteps(schedule, {name: TIMESTEPS[name]()})
    _, y = named(figure.axes[0])[name]
    assert sum(y) / len(y) == pytest.approx(1.0, abs=1e-9)  # all of it is there
    assert min(y) >= 0
    assert list(named(figure.axes[1])) == [name]


# items


@pytest.mark.parametrize(
    ("text", "parsed"),
    [
        ("flow", ("flow", {})),
        (
            "a:b=1,c=2.5e-3,d=true,e=None,f=word",
            ("a", {"b": 1, "c": 0.0025, "d": True, "e": None, "f": "word"}),
        ),
        ("per_range:ranges=((0, 0.5, 2.0), (0.5, 1, 1)),elsewhere=3", None),
        ("C:/runs/a", ("C:/runs/a", {})),
        ("runs/a:shifted=2", ("runs/a", {"shifted": 2})),
        ("a:b=-1", ("a", {"b": -1})),
        ("a:", ("a", {})),
    ],
)
def test_items(text: str, parsed: Any) -> None:
    if parsed is None:
        parsed = ("per_range", {"ranges": ((0, 0.5, 2.0), (0.5, 1, 1)), "elsewhere": 3})
    assert parse_item(text) == parsed


@pytest.mark.parametrize("name", SCHEDULES)
def test_items_of_schedules(name: str, tmp_path: Path) -> None:
    plain = read_schedule(name)
    assert read_schedule(f"{name}:prediction=sample,shifted=2") == plain.with_prediction(
        "sample"
    ).shifted(2)
    plain = plain if plain.curve.kind in ("discrete", "flow") else FLOW
    if plain.prediction.name in ("epsilon", "flow_prediction"):
        plain.save_pretrained(tmp_path)
        assert read_schedule(f"{tmp_path}:shifted=1.5") == plain.shifted(1.5)


def test_transformations_act_in_their_order() -> None:
    first = read_schedule("scaled_linear:shifted=2,zero_snr=true,t_min=100")
    assert first == SCALED.shifted(2).zero_terminal_snr().truncated(t_min=100)
    assert read_schedule("scaled_linear:zero_snr=true,shifted=2") == ZTSNR.shifted(2)
    assert (
        read_schedule("scaled_linear:prediction=sample,zero_snr=true").prediction.name == "sample"
    )


BAD_ITEMS: list[tuple[Any, str]] = [
    (
        lambda: make_item("min_snrr", WEIGHTINGS),
        "^unknown weighting 'min_snrr'; did you mean 'min_snr'",
    ),
    (
        lambda: make_item("min_snr:gama=5", WEIGHTINGS),
        "^unknown option of weighting min_snr 'gama'; did you mean 'gamma'",
    ),
    (
        lambda: make_item("min_snr:gamma=big", WEIGHTINGS),
        "^weighting min_snr does not take gamma='big': ",
    ),
    (
        lambda: make_item("min_snr:gamma=0", WEIGHTINGS),
        "^snr gamma must be positive and finite, got 0; the paper uses 5",
    ),
    (
        lambda: call_with_options("x f", lambda gamma: gamma, {}),
        r"^x f needs gamma; write e\.g\. f:gamma=\.\.\.$",
    ),
    (
        lambda: parse_item("min_snr:gamma=1,floor"),
        "^option 'floor' of 'min_snr:gamma=1,floor' has no value",
    ),
    (
        lambda: parse_item("a:b=1,b=2"),
        "^option 'b' of 'a:b=1,b=2' is given twice; write name:option=value",
    ),
    (
        lambda: read_schedule("flow:shif=3"),
        "^unknown option of schedule flow 'shif'; did you mean 'shift'",
    ),
    (
        lambda: read_schedule("flow:shift=3,shiftd=2"),
        "^unknown option of schedule flow 'shiftd'; did you mean",
    ),
    (lambda: read_schedule("flow:shift=0"), "^shift must be positive and finite, got 0"),
    (lambda: read_schedule("./nowhere:shifted=2"), "no schedule in 'nowhere'"),
    (lambda: read_schedule("laplac"), "^unknown schedule 'laplac'; did you mean 'laplace'"),
]


@pytest.mark.parametrize("number", range(len(BAD_ITEMS)))
def test_bad_items(number: int) -> None:
    call, message = BAD_ITEMS[number]
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        call()
