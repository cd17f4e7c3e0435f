"""Tables that are fitted during training: when they are checked, given up and fitted again; and the
commands that fit and use them.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from alphabar.callbacks import ValidationSampling
from alphabar.noising import NoiseSchedule
from alphabar.sampling import Sampler, Table, fit_table
from alphabar.training import Previews, load_checkpoint, sampler_from_settings
from alphabar.training.cli import fit as fit_command
from alphabar.training.cli import main
from alphabar.training.fitting import tables
from alphabar.training.fitting.tables import Fitting, known_sampler
from alphabar.training.previews import rounds
from alphabar.training.previews.render import Drawing
from alphabar.training.publishing.settings import settings_of_sampler
from callbacks_toy import SCHEDULE, SHAPE, one_thread, train, weights
from loops_toy import Net
from tiny_checkpoint import checkpoint_of, unet, written

TEACHER = partial(Sampler, method="dpmpp_3m", steps=20)
pytestmark = pytest.mark.filterwarnings("ignore::Warning:lightning", "ignore::Warning:tensorboard")


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    with one_thread():
        yield


@pytest.fixture(autouse=True)
def _little(monkeypatch: pytest.MonkeyPatch) -> None:
    """Few seeds and a short search."""

    def fit(network: Any, schedule: NoiseSchedule, evaluations: int, **settings: Any) -> Table:
        made = {"teacher": TEACHER(schedule), "searches": 2, **settings}
        return fit_table(network, schedule, evaluations, **made)

    monkeypatch.setattr(tables, "fit_table", fit)
    monkeypatch.setattr(fit_command, "fit_table", fit)
    monkeypatch.setattr(tables, "FIT_SEEDS", 8)
    monkeypatch.setattr(tables, "HELD_OUT_SEEDS", 4)


class Points:
    """The exact network for data at two points ±1 of a small spread; counts its calls in samples."""

    def __init__(self, schedule: NoiseSchedule, spread: float = 0.2) -> None:
        self.schedule, self.spread, self.calls = schedule, spread, 0

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        self.calls += len(x)
        alpha, sigma = (a.double() for a in self.schedule.alpha_sigma(t / 1000, x))
        variance = alpha**2 * self.spread**2 + sigma**2
        mean = torch.tanh(alpha * x.double() / variance)
        x0 = mean + alpha * self.spread**2 / variance * (x - alpha * mean)
        epsilon = (x - alpha * x0) / sigma
        return self.schedule.prediction.combine(x0, epsilon, alpha, sigma).float()


def recorded(fitting: Fitting) -> Any:
    return fitting.tables["raw"].provenance


def recorded_step(table: Table) -> int | None:
    assert table.provenance is not None
    return table.provenance.training_step


FLOW = NoiseSchedule.flow()
DRAWING = Drawing(num_images=16)


def test_the_table_is_fitted_at_the_first_preview_and_kept_while_it_helps() -> None:
    fitting, network = Fitting(FLOW, steps=4), Points(FLOW)
    assert fitting.fallback.name == "unipc"
    first = fitting.sampler("raw", 100, network, (8,), DRAWING)
    assert first.name == "fitted" and first.steps == 4 and "table of step 100" in fitting.note
    kept = fitting.tables["raw"]
    for step in (200, 300, 400):
        assert fitting.sampler("raw", step, network, (8,), DRAWING) == first
    assert fitting.tables["raw"] is kept  # a network that does not change needs no other table
    # other weights have a table of their own
    fitting.sampler("ema", 400, Points(FLOW, 0.5), (8,), DRAWING)
    assert fitting.tables["ema"] != kept and set(fitting.new_files()) == {
        "fitted_raw_4.json",
        "fitted_ema_4.json",
    }
    assert fitting.new_files() == {}


def test_a_table_that_has_become_worse_is_given_up_and_fitted_again() -> None:
    fitting = Fitting(FLOW, steps=4)
    fitting.sampler("raw", 1000, Points(FLOW, 0.02), (8,), DRAWING)
    old = fitting.tables["raw"]
    other = Points(FLOW, 0.9)  # 1.2 times longer: not yet fitted again
    drawn = fitting.sampler("raw", 1200, other, (8,), DRAWING)
    assert fitting.tables["raw"] is old and "no better" in fitting.note
    assert drawn == known_sampler(old) and drawn.name != "fitted"
    again = fitting.sampler("raw", 1500, other, (8,), DRAWING)
    assert fitting.tables["raw"] is not old and "of step 1500" in fitting.note
    assert again == (
        Sampler.from_table(fitting.tables["raw"])
        if recorded(fitting).helps
        else known_sampler(fitting.tables["raw"])
    )


def test_refit_every() -> None:
    fitting, network = Fitting(FLOW, steps=3, refit_every=300), Points(FLOW)
    steps = []
    for step in range(100, 1000, 100):
        fitting.sampler("raw", step, network, (8,), DRAWING)
        steps += [recorded(fitting).training_step]
    assert sorted(set(steps)) == [100, 400, 700]


def test_checks_are_a_third_of_the_calls_of_previews() -> None:
    fitting, network = Fitting(FLOW, steps=3), Points(FLOW)
    fitting.sampler("raw", 100, network, (8,), DRAWING)
    network.calls, previews = 0, 400
    for step in range(previews):
        fitting.sampler("raw", 101 + step, network, (8,), DRAWING)
    drawn = previews * DRAWING.num_images * 3
    assert network.calls / drawn == pytest.approx(tables.CHECK_SHARE, rel=0.05)


@pytest.mark.parametrize("fault", ["not finite", "an error"])
def test_a_fit_that_fails_leaves_the_known_method(fault: str) -> None:
    fitting = Fitting(FLOW, steps=3)

    def network(x: Tensor, t: Tensor) -> Tensor:
        if fault == "an error":
            raise RuntimeError("no such layer")
        return x * math.nan

    with pytest.warns(UserWarning, match="of a table at step 7 ended: .*(finite|no such)"):
        assert fitting.sampler("raw", 7, network, (8,), DRAWING) == fitting.fallback
    assert fitting.note == "drawn with unipc: no table is fitted"
    fitting.sampler("raw", 8, network, (8,), DRAWING)  # not tried again at every preview
    with pytest.warns(UserWarning, match="at step 11"):
        fitting.sampler("raw", 11, network, (8,), DRAWING)


def test_a_fit_stops_when_it_is_told() -> None:
    fitting, network = Fitting(FLOW, steps=3), Points(FLOW)
    with pytest.warns(UserWarning, match="told to stop"):
        fitting.sampler("raw", 7, network, (8,), DRAWING, stop=lambda: network.calls > 100)
    assert not fitting.tables and 100 < network.calls < 500


def test_the_state_is_taken_only_by_the_same_training() -> None:
    fitting = Fitting(FLOW, steps=3)
    fitting.sampler("raw", 100, Points(FLOW), (8,), DRAWING)
    state = json.loads(json.dumps(fitting.state()))
    same = Fitting(FLOW, steps=3)
    same.load(state)
    assert same.tables == fitting.tables
    for other in (
        Fitting(FLOW, steps=4),
        Fitting(FLOW, steps=3, guidance_scale=2.0),
        Fitting(FLOW, steps=3, guidance_rescale=0.7),
        Fitting(NoiseSchedule.flow(shift=3.0), steps=3),
    ):
        other.load(state)
        assert not other.tables
    state["raw"]["version"] = 99
    with pytest.warns(UserWarning, match="not used: a table of version 99"):
        again = Fitting(FLOW, steps=3)
        again.load(state)
    assert not again.tables


def test_a_check_that_fails_draws_with_the_known_method() -> None:
    fitting = Fitting(FLOW, steps=3)
    fitting.sampler("raw", 100, Points(FLOW), (8,), DRAWING)

    def network(x: Tensor, t: Tensor) -> Tensor:
        raise RuntimeError("no such layer")

    with pytest.warns(UserWarning, match="the check of a table at step 200 ended"):
        drawn = fitting.sampler("raw", 200, network, (8,), DRAWING)
    assert drawn == known_sampler(fitting.tables["raw"]) and "not be checked" in fitting.note
    assert fitting.sampler("raw", 300, Points(FLOW), (8,), DRAWING).name == "fitted"


def test_a_fit_without_memory_is_tried_again_with_fewer_samples() -> None:
    fitting, network = Fitting(FLOW, steps=3), Points(FLOW)

    def small(x: Tensor, t: Tensor) -> Tensor:
        if len(x) > 4:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return network(x, t)

    with pytest.warns(UserWarning, match="OutOfMemoryError"):
        fitting.sampler("raw", 100, small, (8,), DRAWING, batch_size=8)
    assert fitting.sampler("raw", 110, small, (8,), DRAWING, batch_size=8).name == "fitted"


# in training


def test_the_callback_fits_trains_the_same_and_resumes(tmp_path: Path) -> None:
    plain = train(tmp_path / "plain", max_epochs=1)

    def previews(root: Path) -> ValidationSampling:
        return ValidationSampling(
            "fitted", 3, num_images=2, every_n_train_steps=2, on_error="raise", folder=root / "p"
        )

    first = previews(tmp_path)
    module = train(tmp_path, first, max_epochs=1)
    assert module.losses == plain.losses and weights(module) == weights(plain)
    lines = [json.loads(line) for line in (tmp_path / "p" / "previews.jsonl").open()]
    assert all(re.match("table of step|drawn with", line["note"]) for line in lines)
    table = Table.load(tmp_path / "p" / "fitted_raw_3.json")
    state = json.loads(json.dumps(first.state_dict()))
    assert Table.from_config(state["fitted"]["raw"]) == table
    resumed = previews(tmp_path / "resumed")

    def setup(trainer: Any, pl_module: Any, stage: str) -> None:
        ValidationSampling.setup(resumed, trainer, pl_module, stage)
        resumed.load_state_dict(state)

    resumed.setup = setup  # type: ignore[method-assign]
    train(tmp_path / "resumed", resumed, max_epochs=1)
    assert Table.from_config(resumed.state_dict()["fitted"]["raw"]) == table


def test_previews_of_a_loop_keep_their_tables_in_a_state(tmp_path: Path) -> None:
    def made(folder: str) -> Previews:
        return Previews(
            "fitted", 3, schedule=SCHEDULE, shape=SHAPE, num_images=2, folder=tmp_path / folder
        )

    net = Net()
    with made("a") as previews:
        previews(net, step=5)
        state = json.loads(json.dumps(previews.state_dict()))
    with made("b") as again:
        again.load_state_dict(state)
        again(net, step=6)
        assert again.state_dict() == state
    assert state["fitted"]["raw"]["provenance"]["training_step"] == 5
    assert (tmp_path / "a" / "fitted_raw_3.json").is_file()


def test_a_table_is_kept_though_no_image_was_finished(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    late = SimpleNamespace(monotonic=lambda: math.inf)
    monkeypatch.setattr(rounds, "time", late)
    with (
        pytest.warns(UserWarning, match="step 5 finished no image in max_seconds=1000"),
        Previews(
            "fitted", 3, schedule=SCHEDULE, shape=SHAPE, num_images=2, folder=tmp_path, max_seconds=1000.0
        ) as previews,
    ):  # fmt: skip
        previews(Net(), step=5)
    assert recorded_step(Table.load(tmp_path / "fitted_raw_3.json")) == 5


def test_a_table_that_cannot_be_written_is_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(self: Fitting) -> dict[str, str]:
        raise TypeError("no JSON")

    monkeypatch.setattr(Fitting, "new_files", broken)
    with (
        pytest.warns(UserWarning, match="preview at step 5 failed: TypeError: no JSON; training goes"),
        Previews(
            "fitted", 3, schedule=SCHEDULE, shape=SHAPE, num_images=2, folder=tmp_path
        ) as previews,
    ):  # fmt: skip
        previews(Net(), step=5)


def test_a_preview_names_the_file_of_its_table(tmp_path: Path) -> None:
    table = fit_table(Points(FLOW), FLOW, 3, shape=(8,), seeds=8, teacher=TEACHER(FLOW), searches=2)
    table.save(tmp_path / "fitted_ema_3.json")
    settings = json.loads(json.dumps(settings_of_sampler(Sampler.from_table(table))))
    with pytest.raises(
        ValueError, match=r"'fitted_ema_3.json'.*Sampler.from_table\(Table.load"
    ) as e:
        sampler_from_settings(settings | {"weights": "ema"}, FLOW)
    name = str(e.value).split("'")[1]
    again = Sampler.from_table(Table.load(tmp_path / name), FLOW)
    assert settings_of_sampler(again) == settings


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"steps": 1}, "steps must be .*2"),
        ({"steps": 100}, "at most the 80 steps of its teacher, got 100"),
        ({"sampler": "euler", "refit_every": 5}, "refit_every=5 is for sampler='fitted'"),
        ({"refit_every": 0}, "refit_every must be"),
        ({"pipeline": object(), "shape": None}, "alphabar fit"),
    ],
)
def test_wrong_arguments_are_refused_at_once(
    settings: dict[str, Any], words: str, tmp_path: Path
) -> None:
    given = {"sampler": "fitted", "schedule": SCHEDULE, "shape": SHAPE, "folder": tmp_path}
    with pytest.raises(ValueError, match=words):
        Previews(**{**given, **settings})


# commands


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return written(tmp_path_factory.mktemp("fit"), checkpoint_of(unet(num_class_embeds=4)))


GUIDED = ["--classes", "1", "2", "--null_class", "3", "--guidance_scale", "2"]


def test_the_command_fits_and_sampling_draws_with_it(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib")
    few = ["--seeds", "6", "--held_out", "2", "--evaluations", "2", "3", "--teacher_steps", "8"]
    assert main(["fit", str(checkpoint), *GUIDED, *few, "--device", "cpu"]) == 0
    said = capsys.readouterr().out
    folder = checkpoint.with_suffix(".scheduler")
    assert str(folder / "fitted_table_2.json") in said and (folder / "fitted_tables.png").is_file()
    table = Table.load(folder / "fitted_table_3.json")
    assert table.provenance is not None and table.provenance.guidance_scale == 2.0
    out = tmp_path / "out.png"
    draw = ["sample", str(checkpoint), "--num_images", "2", "--out", str(out), "--device", "cpu"]
    assert main([*draw, *GUIDED, "--method", "fitted", "--steps", "3"]) == 0
    network, labels = load_checkpoint(checkpoint).network, torch.tensor([1, 2])
    expected = Sampler.from_table(table)(
        network,
        (2, 1, 8, 8),
        seeds=0,
        conditioning={"class_labels": labels},
        unconditional={"class_labels": torch.full_like(labels, 3)},
        guidance_scale=2.0,
    )
    assert expected.isfinite().all() and out.is_file()
    other = [*GUIDED[:-1], "4"]
    for arguments, words in [
        ([*other, "--method", "fitted", "--steps", "3"], "guidance_scale=2, and this run has"),
        ([*GUIDED, "--method", "fitted"], "no fitted table of 6 steps beside"),
        ([*GUIDED, "--method", "fitted", "--grid", "karras"], "leave out --grid"),
        ([*GUIDED, "--table", str(folder / "fitted_table_3.json")], "is for --method fitted"),
    ]:
        assert main([*draw, *arguments]) == 2
        assert words in capsys.readouterr().err
    assert "fitted_table_2.json, fitted_table_3.json" in _error(
        capsys, [*draw, *GUIDED, "--method", "fitted"]
    )
    table_of = [*draw, *GUIDED, "--method", "fitted", "--table"]
    assert main([*table_of, str(folder / "fitted_table_2.json")]) == 0
    (tmp_path / "bad.json").write_text("{}")
    assert "is no fitted table" in _error(capsys, [*table_of, str(tmp_path / "bad.json")])


def _error(capsys: pytest.CaptureFixture[str], arguments: list[str]) -> str:
    capsys.readouterr()
    assert main(arguments) == 2
    return capsys.readouterr().err


def test_a_table_of_another_training_is_refused(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    table = fit_table(
        lambda x, t: torch.tanh(x), FLOW, 3, shape=(8,), seeds=8, teacher=TEACHER(FLOW), searches=2
    )
    path = table.save(tmp_path / "flow.json")
    arguments = ["sample", str(checkpoint), *GUIDED[:3], "--out", str(tmp_path / "out.png")]
    error = _error(capsys, [*arguments, "--method", "fitted", "--table", str(path)])
    assert "was fitted under the schedule" in error
