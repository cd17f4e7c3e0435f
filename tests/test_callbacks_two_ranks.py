"""Previews and schedules with two processes (gloo): the same losses, the same pixels, and nobody
left waiting.
"""

import json
from collections.abc import Callable, Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest

from alphabar.callbacks import ValidationSampling
from alphabar.training import schedule_from_checkpoint
from callbacks_toy import SCHEDULE, Units, files, fresh, grids, one_thread, train
from two_processes import last_words, run_two_ranks

SCRIPT = Path(__file__).parent / "callbacks_two_ranks.py"


pytestmark = pytest.mark.filterwarnings("ignore::Warning:lightning", "ignore::Warning:tensorboard")


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    with one_thread():
        yield


class Suite:
    """What two processes left behind, after all scenarios of a strategy in one go (most of the time
    goes into starting them).
    """

    def __init__(self, root: Path, kind: str) -> None:
        self.root, self.kind = root, kind
        (root / "file").touch()
        self.codes = run_two_ranks(SCRIPT, root, kind, nodes=kind == "nodes")
        reports = [root / f"rank{rank}.json" for rank in range(2)]
        assert all(report.exists() for report in reports), last_words(root)
        self.ranks: list[dict[str, Any]] = [json.loads(report.read_text()) for report in reports]

    def pictures(self, scenario: str) -> dict[str, bytes]:
        folder = self.root / scenario / "previews"
        return {path.name: path.read_bytes() for path in sorted(folder.glob("*.png"))}


@pytest.fixture(scope="module")
def suites(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Suite]:
    return lru_cache(maxsize=None)(lambda kind: Suite(tmp_path_factory.mktemp(kind), kind))


@pytest.fixture(scope="module")
def root(suites: Callable[[str], Suite]) -> Path:
    return suites("ddp").root


@pytest.fixture(scope="module")
def ranks(suites: Callable[[str], Suite]) -> list[dict[str, Any]]:
    return suites("ddp").ranks


# each kind starts two processes
FSDP1, NODES = (pytest.param(kind, marks=pytest.mark.slow) for kind in ("fsdp1", "nodes"))
KINDS = ["ddp", FSDP1, "fsdp2", NODES]
HARMLESS = [
    *(
        "units_raw",
        "units_both",
        "units_lost",
        "units_decoder",
        "units_nan",
        "units_late",
        "units_other_clock",
    )
]


@pytest.fixture(params=KINDS)
def suite(suites: Callable[[str], Suite], request: pytest.FixtureRequest) -> Suite:
    return suites(request.param)


# Every strategy


def test_every_process_ends_well(suite: Suite) -> None:
    # the rank that an error in a sharded forward befell would have stayed alive, and is ended
    assert suite.codes == ([0, 1] if suite.kind.startswith("fsdp") else [0, 0])


@pytest.mark.parametrize("scenario", HARMLESS)
def test_losses_are_bit_identical_under_every_strategy(
    suites: Callable[[str], Suite], suite: Suite, scenario: str
) -> None:
    for rank in range(2):
        report = suite.ranks[rank]
        assert report[scenario]["error"] is None
        assert (
            report[scenario]["losses"] == report["units_none"]["losses"]
            and len(report["units_none"]["losses"]) == 6
        )
        assert report[scenario]["weights"] == report["units_none"]["weights"]
        assert report[scenario]["held"] == report["units_none"]["held"]  # its shards, and no more
        assert report["units_none"]["losses"] == suites("ddp").ranks[rank]["units_none"]["losses"]


def test_weights_are_sharded_where_they_should_be(suite: Suite) -> None:
    whole = sum(weight.numel() for weight in fresh(Units).parameters())
    for report in suite.ranks:
        assert (max(report["units_raw"]["held"]) < whole) == suite.kind.startswith("fsdp")


def test_pixels_are_the_same_under_every_strategy(
    suites: Callable[[str], Suite], suite: Suite
) -> None:
    raw, both = suite.pictures("units_raw"), suite.pictures("units_both")
    assert list(raw) == [f"step_{step:08d}.png" for step in (0, 2, 4, 6)]
    assert list(both) == [
        f"step_{step:08d}{suffix}.png" for step in (2, 4, 6) for suffix in ("", "_ema")
    ]
    assert both == suites("ddp").pictures("units_both") and raw == suites("ddp").pictures(
        "units_raw"
    )
    for step in (2, 4, 6):
        name = f"step_{step:08d}"
        assert both[f"{name}.png"] == raw[f"{name}.png"] != both[f"{name}_ema.png"]


def test_pixels_under_every_strategy_are_those_of_one_process(suite: Suite, tmp_path: Path) -> None:
    assert suite.pictures("units_still") == alone(tmp_path)


@pytest.mark.slow
def test_ranks_of_a_tensor_parallel_group_draw_the_same(
    suites: Callable[[str], Suite], tmp_path: Path
) -> None:
    shown = suites("tp").pictures("units_still")
    assert len(shown) == 6 and {name: shown[name] for name in list(shown)[:3]} == alone(tmp_path)


def alone(root: Path) -> dict[str, bytes]:
    previews = ValidationSampling(
        "euler_ancestral", steps=2, every_n_train_steps=2, num_images=5, batch_size=2
    )
    train(root, previews, module=fresh(Units, learning_rate=0.0), max_epochs=1)
    return {path.name: path.read_bytes() for path in sorted((root / "previews").glob("*.png"))}


def test_one_rank_writes_and_writes_once(suite: Suite) -> None:
    raw = [[step, "raw", 5, ""] for step in (0, 2, 4, 6)]
    assert [report["units_raw"]["published"] for report in suite.ranks] == [raw, []]
    both = [[step, weights, 5, ""] for step in (2, 4, 6) for weights in ("raw", "ema")]
    assert [report["units_both"]["published"] for report in suite.ranks] == [both, []]


@pytest.mark.parametrize(
    ("scenario", "words"),
    [
        ("units_lost", "failed: rank 1: RuntimeError: the averages are lost (callbacks_toy.py:"),
        (
            "units_decoder",
            "failed: rank 1: RuntimeError: the decoder is broken (callbacks_two_ranks.py:",
        ),
    ],
)
def test_what_fails_outside_the_forwards_is_voted_on(
    suite: Suite, scenario: str, words: str
) -> None:
    told = [report[scenario]["warnings"] for report in suite.ranks]
    assert len(told[0]) == 3 and all(words in text for text in told[0]) and told[1] == []
    assert suite.pictures(scenario) == {}


def test_nan_is_shown_and_named(suite: Suite) -> None:
    note = "NaN in 2 of 5 images, 40.0% of the pixels"
    assert suite.ranks[0]["units_nan"]["published"] == [
        [2, "raw", 5, ""],
        [4, "raw", 5, note],
        [6, "raw", 5, note],
    ]
    assert [note in text for text in suite.ranks[0]["units_nan"]["warnings"]] == [True, True]


def test_time_runs_out_on_all_ranks_by_the_clock_of_rank_zero(suite: Suite) -> None:
    note = "4 of 5 images: max_seconds=1000.0 had passed"
    assert suite.ranks[0]["units_late"]["published"] == [[2, "raw", 4, note]]
    assert len(suite.ranks[0]["units_late"]["warnings"]) == 2
    assert (
        "step 4 finished no image in max_seconds=1000.0"
        in suite.ranks[0]["units_late"]["warnings"][0]
    )
    assert [entry[2:] for entry in suite.ranks[0]["units_other_clock"]["published"]] == [
        [5, ""]
    ] * 3


def test_sigterm_in_a_preview_stops_all_ranks_and_the_checkpoint_resumes(suite: Suite) -> None:
    for report in suite.ranks:
        seen = report["units_terminated"]
        assert seen["error"].startswith("SIGTERMException") and len(seen["losses"]) == 4
        assert seen["losses"] == report["units_none"]["losses"][:4]
        assert seen["again"]["error"] is None and len(seen["again"]["losses"]) == 2
    assert list(suite.pictures("units_terminated")) == ["step_00000002.png", "step_00000006.png"]


@pytest.mark.parametrize("kind", [FSDP1, "fsdp2"])
def test_an_error_in_a_sharded_forward_ends_training_on_both_ranks(
    suites: Callable[[str], Suite], kind: str
) -> None:
    errors = [report["units_severed"]["error"] for report in suites(kind).ranks]
    assert errors[1].startswith(
        "ShardedForwardError: RuntimeError: a bug on this rank (inside a forward of the sharded"
    )
    assert (
        errors[0].startswith("ShardedForwardError: ") and "another rank failed first" in errors[0]
    )


def test_nobody_waits_for_the_process_group(suite: Suite) -> None:
    for report in suite.ranks:
        assert {
            name: seen["seconds"] for name, seen in report.items() if seen["seconds"] > 30
        } == {}


# DDP


def test_a_rank_out_of_memory_halves_the_batch_of_all_and_changes_no_pixel(
    suites: Callable[[str], Suite],
) -> None:
    suite = suites("ddp")
    for scenario in ("memory", "memory_all"):
        for rank in range(2):
            report = suite.ranks[rank][scenario]
            assert (
                report["error"] is None
                and report["losses"] == suite.ranks[rank]["units_none"]["losses"]
            )
        assert (
            suite.pictures(scenario) == suite.pictures("enough")
            and len(suite.pictures("enough")) == 3
        )
        (told,) = suite.ranks[0][scenario]["warnings"]  # remembered: not again at the next preview
        assert told.startswith("a preview ran out of memory; it is drawn 2 at a time from now on")


@pytest.mark.parametrize(
    "scenario", ["previews", "failing", "failing_zero", "nan", "logger", "last"]
)
def test_losses_are_bit_identical(ranks: list[dict[str, Any]], scenario: str) -> None:
    for report in ranks:
        assert report[scenario]["error"] is None
        assert (
            report[scenario]["losses"] == report["none"]["losses"]
            and len(report["none"]["losses"]) == 6
        )
        assert report[scenario]["weights"] == report["none"]["weights"]
    assert ranks[0]["none"]["losses"] != ranks[1]["none"]["losses"]
    assert ranks[0]["none"]["weights"] == ranks[1]["none"]["weights"]


def test_pixels_are_those_of_one_process(root: Path, tmp_path: Path) -> None:
    settings: Any = {"steps": 2, "every_n_train_steps": 2, "num_images": 5, "batch_size": 2}
    alone = ValidationSampling("euler_ancestral", **settings)
    train(tmp_path, alone, module=fresh(learning_rate=0.0), max_epochs=1)
    names = [f"previews/step_{step:08d}.png" for step in (2, 4, 6)]
    assert grids(tmp_path) == grids(root / "still") == names
    for name in names:
        assert (tmp_path / name).read_bytes() == (root / "still" / name).read_bytes()
    assert (root / "previews" / names[0]).read_bytes() != (root / "still" / names[0]).read_bytes()


def test_an_error_on_one_rank_is_told_once_and_skips_the_preview_on_both(
    root: Path, ranks: list[dict[str, Any]]
) -> None:
    for scenario, rank, words in [
        ("failing", 1, "rank 1: RuntimeError: no memory left (callbacks_two_ranks.py:"),
        ("failing_zero", 0, "rank 0: RuntimeError: no memory left (callbacks_two_ranks.py:"),
    ]:
        told = ranks[0][scenario]["warnings"]
        assert len(told) == 3 and all(words in text for text in told), (scenario, rank)
        assert ranks[1][scenario]["warnings"] == []
        assert files(root / scenario) == []


def test_with_raise_both_ranks_stop_with_the_same_words(ranks: list[dict[str, Any]]) -> None:
    for scenario, words in [
        ("raise", "rank 1: RuntimeError: no memory"),
        ("logger_raise", "rank 0: RuntimeError: Broken"),
    ]:
        errors = [report[scenario]["error"] for report in ranks]
        assert errors[0] == errors[1] and errors[0].startswith(
            "RuntimeError: the preview at step 2 failed: "
        )
        assert words in errors[0]
        assert [len(report[scenario]["losses"]) for report in ranks] == [2, 2]


def test_shapes_that_differ_between_ranks_are_agreed_on(
    root: Path, ranks: list[dict[str, Any]]
) -> None:
    assert [report["buckets"]["error"] for report in ranks] == [None, None]
    assert len(grids(root / "buckets")) == 3


def test_rehearsal_writes_nothing(root: Path, ranks: list[dict[str, Any]]) -> None:
    assert [report["rehearsal"]["error"] for report in ranks] == [None, None]
    assert not (root / "rehearsal").exists()


def test_an_unwritable_folder_stops_both_before_training(ranks: list[dict[str, Any]]) -> None:
    for report in ranks:
        assert "Error: cannot write to the output folder" in report["unwritable"]["error"]
        assert report["unwritable"]["losses"] == []


def test_schedules_are_saved_once_and_refused_by_both(
    root: Path, ranks: list[dict[str, Any]]
) -> None:
    assert [report["saved"]["error"] for report in ranks] == [None, None]
    assert schedule_from_checkpoint(root / "saved/step=3.ckpt") == SCHEDULE
    assert [name for name in files(root / "saved") if "scheduler" in name] == [
        "scheduler/noise_schedule.json",
        "scheduler/scheduler_config.json",
    ]
    for report in ranks:
        assert (
            report["refused"]["error"].startswith("ValueError: ")
            and str(SCHEDULE) in report["refused"]["error"]
        )
        assert report["refused"]["losses"] == []
