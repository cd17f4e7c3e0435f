"""Previews in loops without a Trainer: what ValidationSampling promises holds in each of them."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, PartialState
from lightning.fabric import Fabric
from lightning.fabric.loggers import TensorBoardLogger
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torch.utils.tensorboard import SummaryWriter

from alphabar.callbacks import ValidationSampling
from alphabar.noising import NoiseSchedule, Noising
from alphabar.sampling import Sampler, Table
from alphabar.training import (
    ModelEMA,
    Previews,
    read_settings,
    sampler_from_settings,
    schedule_from_checkpoint,
)
from alphabar.training.fitting import tables
from alphabar.training.images import to_pixels
from alphabar.training.loops import loop as loop_module
from alphabar.training.loops.forward import ForwardMode, ShardedForwardError
from alphabar.training.publishing.settings import settings_of_sampler
from callbacks_toy import files, one_thread
from loops_toy import ADAPTIVE, FITTED, SCHEDULE, SHAPE, STEPS, Net, fit_little, previews, train
from two_processes import last_words, run_two_ranks

SCRIPT = Path(__file__).parent / "loops_two_ranks.py"
KINDS = ["torch", "accelerate", "fabric"]
SHARDED = ["fsdp1", "fsdp2"]
pytestmark = pytest.mark.filterwarnings("ignore::Warning:lightning", "ignore::Warning:tensorboard")


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    with one_thread():
        yield


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What two processes left behind, after all scenarios in all kinds of loops."""
    root = tmp_path_factory.mktemp("loops")
    (root / "file").touch()
    codes = run_two_ranks(SCRIPT, root)
    assert codes == [0, 0], last_words(root)
    return root


@pytest.fixture(scope="module")
def ranks(root: Path) -> list[dict[str, Any]]:
    return [json.loads((root / f"rank{rank}.json").read_text()) for rank in range(2)]


def pictures(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.glob("*.png"))}


# Two processes


@pytest.mark.parametrize("kind", [*KINDS, *SHARDED])
def test_training_is_bit_identical(ranks: list[dict[str, Any]], kind: str) -> None:
    harmless = ["raw", "both", "failing", "failing_zero", "lost", "memory", "enough"]
    harmless += ["fitted", "fitted_failing"]
    for rank, report in enumerate(ranks):
        harmless = [name for name in harmless if name in report[kind]]
        plain = report[kind]["none"]
        assert plain["error"] is None and len(plain["losses"]) == STEPS
        assert plain["losses"] == report["torch"]["none"]["losses"]
        for scenario in harmless:
            seen = report[kind][scenario]
            assert seen["error"] is None, (scenario, seen["error"])
            assert seen["losses"] == plain["losses"], (rank, scenario)
            assert seen["weights"] == plain["weights"], (rank, scenario)
            assert seen["copied"] is (True if kind in SHARDED else None)
    assert ranks[0][kind]["none"]["losses"] != ranks[1][kind]["none"]["losses"]


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The pictures of one process, of weights that do not change."""
    folder, made = tmp_path_factory.mktemp("alone"), list[Previews]()

    def draw(network: Any, step: int, ema: ModelEMA) -> None:
        if step == 0:
            made.append(previews(folder, num_images=5))
        elif step % 2 == 0:
            assert made[0](network, step=step)

    train(Net(), draw=draw, rate=0.0)
    made[0].close()
    return pictures(folder)


@pytest.mark.parametrize("kind", [*KINDS, *SHARDED])
def test_pixels_are_those_of_one_process(root: Path, alone: dict[str, bytes], kind: str) -> None:
    assert list(alone) == [f"step_{step:08d}.png" for step in (2, 4, 6)]
    assert pictures(root / kind / "still") == alone
    assert pictures(root / kind / "raw").keys() == alone.keys()
    assert pictures(root / kind / "raw") != alone


@pytest.mark.parametrize("kind", ["torch", *SHARDED])
def test_a_table_is_fitted_by_all_ranks_together(
    root: Path, ranks: list[dict[str, Any]], kind: str
) -> None:
    for report in ranks:
        assert report[kind]["fitted"]["warnings"] == []
    table = Table.load(root / kind / "fitted" / "fitted_raw_3.json")
    assert table.provenance is not None and table.provenance.training_step == 2
    assert (table.provenance.seeds, table.provenance.held_out) == (4, 4)  # of both ranks
    lines = (root / kind / "fitted" / "previews.jsonl").read_text().splitlines()
    assert all("of step 2" in json.loads(line)["note"] for line in lines)


def test_a_fitted_table_is_that_of_one_process(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("FIT_SEEDS", "HELD_OUT_SEEDS", "fit_table"):
        monkeypatch.setattr(tables, name, getattr(tables, name))  # put back what fit_little sets
    fit_little()
    with previews(tmp_path, **FITTED) as made:
        made(Net(), step=2)
    one, two = (
        Table.load(folder / "fitted_raw_3.json")
        for folder in (tmp_path, root / "torch" / "fitted_still")
    )
    assert [knot.timestep for knot in one.knots] == [knot.timestep for knot in two.knots]
    for a, b in zip(one.steps, two.steps, strict=True):
        for row, other in zip(a.carry, b.carry, strict=True):
            assert [c for _, c in row] == pytest.approx([c for _, c in other], abs=1e-6)


def test_a_fit_that_fails_on_one_rank_ends_on_both(root: Path, ranks: list[dict[str, Any]]) -> None:
    (words,) = ranks[0]["torch"]["fitted_failing"]["warnings"][:1]
    assert "of a table at step 2 ended: rank 1: RuntimeError: no memory" in words
    assert ranks[1]["torch"]["fitted_failing"]["warnings"] == []
    assert not (root / "torch" / "fitted_failing" / "fitted_raw_3.json").exists()


def test_a_rank_that_stops_a_fit_lets_no_other_wait_in_a_forward(
    ranks: list[dict[str, Any]],
) -> None:
    for report in ranks:
        found = report["stopped_fit"]
        assert found["sampler"] == "unipc" and found["seconds"] < 20
    (words,) = ranks[0]["stopped_fit"]["words"]
    assert "rank 1: StoppedFit: it was told to stop" in words


def test_averages_draw_the_same_in_every_loop(root: Path) -> None:
    both = {kind: pictures(root / kind / "both") for kind in [*KINDS, *SHARDED]}
    assert all(shown == both["torch"] for shown in both.values())
    names = [f"step_{step:08d}{kind}.png" for step in (2, 4, 6) for kind in ("", "_ema")]
    assert list(both["torch"]) == names
    assert both["torch"][names[-1]] != both["torch"][names[-2]]


class Lightning(LightningModule):
    """The same network under a Trainer."""

    def __init__(self) -> None:
        super().__init__()
        self.net, self.schedule, self.sample_shape = Net(), SCHEDULE, SHAPE

    def predict(self, x: Tensor, timesteps: Tensor) -> Tensor:
        return self.net(x, timesteps)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.net(batch, torch.zeros(len(batch))).square().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.0)


def test_the_callback_draws_the_same(tmp_path: Path, alone: dict[str, bytes]) -> None:
    callback = ValidationSampling(
        "euler_ancestral",
        steps=2,
        num_images=5,
        batch_size=2,
        every_n_train_steps=2,
        folder=tmp_path / "previews",
        on_error="raise",
    )
    quiet: Any = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    Trainer(
        max_steps=6, accelerator="cpu", callbacks=[callback], enable_checkpointing=False, **quiet
    ).fit(Lightning(), DataLoader(torch.zeros(24, *SHAPE), 4))
    assert pictures(tmp_path / "previews") == alone


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("scenario", "words", "steps"),
    [
        ("failing", "rank 1: RuntimeError: no memory left (loops_two_ranks.py:", [4, 6]),
        ("failing_zero", "rank 0: RuntimeError: no memory left (loops_two_ranks.py:", [4, 6]),
        ("lost", "rank 1: RuntimeError: the averages are lost (loops_two_ranks.py:", [2, 4, 6]),
    ],
)
def test_an_error_on_one_rank_skips_the_preview_on_both(
    root: Path, ranks: list[dict[str, Any]], kind: str, scenario: str, words: str, steps: list[int]
) -> None:
    told = ranks[0][kind][scenario]["warnings"]
    assert len(told) == len(steps) and ranks[1][kind][scenario]["warnings"] == []
    for text, step in zip(told, steps, strict=True):
        assert text.startswith(f"the preview at step {step} failed: {words}")
    drawn = {f"step_{step:08d}.png" for step in {2, 4, 6} - set(steps)}
    assert pictures(root / kind / scenario).keys() == drawn


@pytest.mark.parametrize("kind", KINDS)
def test_with_raise_both_ranks_stop_with_the_same_words(
    ranks: list[dict[str, Any]], kind: str
) -> None:
    one, other = (report[kind]["raise"]["error"] for report in ranks)
    assert one == other
    assert one.startswith("RuntimeError: the preview at step 4 failed: rank 1: RuntimeError: no ")


@pytest.mark.parametrize("kind", KINDS)
def test_a_rank_out_of_memory_halves_the_batch_of_all(
    root: Path, ranks: list[dict[str, Any]], kind: str
) -> None:
    assert [len(report[kind]["memory"]["warnings"]) for report in ranks] == [1, 0]
    halved, enough = (root / kind / name / "images" for name in ("memory", "enough"))
    for name in files(halved):
        pixels = [_pixels(folder / name) for folder in (halved, enough)]
        assert torch.equal(*pixels)
    assert len(files(halved)) == 15 and files(halved) == files(enough)


@pytest.mark.parametrize("kind", KINDS)
def test_ranks_wait_for_one_that_makes_more_steps(
    root: Path, ranks: list[dict[str, Any]], kind: str, tmp_path: Path
) -> None:
    assert [report[kind]["adaptive"]["error"] for report in ranks] == [None, None]
    with previews(tmp_path, **ADAPTIVE) as made:
        for step in (2, 4, 6):
            made(Net(), step=step)
    assert pictures(root / kind / "adaptive") == pictures(tmp_path)
    assert len(pictures(tmp_path)) == 3


def test_the_time_of_a_rank_that_has_finished_counts(
    root: Path, ranks: list[dict[str, Any]]
) -> None:
    assert [report["torch"]["late"]["error"] for report in ranks] == [None, None]
    lines = (root / "torch" / "late" / "previews.jsonl").read_text().splitlines()
    first = json.loads(lines[0])
    assert first["step"] == 2 and "of 5 images: max_seconds=1000.0 had passed" in first["note"]


@pytest.mark.parametrize("kind", KINDS)
def test_an_unwritable_folder_stops_both_before_training(
    ranks: list[dict[str, Any]], kind: str
) -> None:
    for report in ranks:
        assert "Error: cannot write to the output folder" in report[kind]["unwritable"]["error"]
        assert report[kind]["unwritable"]["losses"] == []


def test_nobody_waits_for_the_process_group(ranks: list[dict[str, Any]]) -> None:
    for report in ranks:
        assert max(seen["seconds"] for kind in KINDS for seen in report[kind].values()) < 20


def test_a_state_of_accelerate_holds_averages_and_schedule(
    root: Path, ranks: list[dict[str, Any]]
) -> None:
    for report in ranks:
        seen = report["states"]
        assert seen["same"] and seen["step"] == 2
        assert seen["error"] is not None and str(NoiseSchedule.flow()) in seen["error"]
        assert str(SCHEDULE) in seen["error"]
    assert schedule_from_checkpoint(root / "kept") == SCHEDULE


# One process


@contextmanager
def accelerator(folder: Path, **settings: Any) -> Iterator[Accelerator]:
    """An Accelerator of its own: accelerate keeps the settings of the first for all."""
    AcceleratorState._reset_state(True)
    made = Accelerator(cpu=True, project_dir=folder, **settings)
    try:
        yield made
    finally:
        made.free_memory()
        AcceleratorState._reset_state(True)
        PartialState._reset_state()


def dtypes(folder: Path, loop: Any, net: Net, **settings: Any) -> tuple[set[Any], set[Any]]:
    """The dtypes of a layer's output in training and in previews."""
    seen: list[set[Any]] = []
    made = previews(folder, loop, on_error="raise", **settings)

    def draw(network: Any, step: int, ema: ModelEMA) -> None:
        if step == 1:
            seen.append(net.dtypes)
            net.dtypes = set()
            made.try_out(network)
            made(network, step=step)
            seen.append(net.dtypes)

    train(net, loop, draw=draw)
    made.close()
    return seen[0], seen[1]


def test_precision_is_that_of_training(tmp_path: Path) -> None:
    half = {torch.bfloat16}
    with accelerator(tmp_path, mixed_precision="bf16") as loop:
        assert dtypes(tmp_path, loop, Net()) == (half, half)
        part = Net()  # of a prepared network, such as the network in a module with the loss
        with previews(tmp_path, loop, on_error="raise") as made:
            made(part, step=7)
        assert part.dtypes == half
    for precision in ("bf16-mixed", "bf16-true"):
        fabric = Fabric(accelerator="cpu", devices=1, precision=precision)
        assert dtypes(tmp_path, fabric, Net()) == (half, half)
    with torch.autocast("cpu", torch.bfloat16):
        assert dtypes(tmp_path, None, Net()) == (half, half)
    assert dtypes(tmp_path, None, Net()) == ({torch.float32},) * 2


def test_a_network_in_half_precision_gets_its_dtype(tmp_path: Path) -> None:
    net = Net().bfloat16()
    with previews(tmp_path, on_error="raise") as made:
        made(net, step=1)
    assert net.dtypes == {torch.bfloat16}


def test_autocast_around_a_preview_does_not_reach_the_sampler(tmp_path: Path) -> None:
    """A preview inside an autocast block: only the network runs in it, not the arithmetic."""
    inside: list[bool] = []

    def decode(x: Tensor) -> Tensor:
        inside.append(torch.is_autocast_enabled("cpu"))
        return x

    with (
        previews(tmp_path, decode=decode, on_error="raise") as made,
        torch.autocast("cpu", torch.bfloat16),
    ):
        made(Net(), step=1)
    assert inside and not any(inside)


def test_a_compiled_network_runs_eagerly(tmp_path: Path) -> None:
    net = Net()
    calls: list[Any] = []

    def backend(graph: Any, inputs: Any) -> Any:
        calls.append(graph)
        return graph.forward

    with previews(tmp_path, on_error="raise") as made:
        made(torch.compile(net, backend=backend), step=1)
    assert net.dtypes and not calls


def test_a_network_of_fabric_needs_its_fabric(tmp_path: Path) -> None:
    network = Fabric(accelerator="cpu", devices=1).setup(Net())
    with previews(tmp_path) as made, pytest.raises(ValueError, match="give the previews loop=fab"):
        made(network, step=1)


@pytest.mark.parametrize(
    ("settings", "error", "words"),
    [
        ({"loop": "cuda"}, TypeError, "^loop must be an Accelerator of accelerate, a Fabric"),
        ({"schedule": None}, TypeError, "^schedule must be the NoiseSchedule .* got NoneType"),
        ({"shape": None}, ValueError, r"^previews need the shape of a sample; give shape="),
        ({"shape": (2, 3, 4, 8, 8)}, ValueError, "give decode="),
        ({"weights": "emma"}, ValueError, "unknown weights 'emma'; did you mean 'ema'"),
        ({"on_error": "rise"}, ValueError, "unknown on_error 'rise'; did you mean 'raise'"),
        ({"prompts": ["a"]}, ValueError, "^prompts need encode="),
        ({"exit_after_error": -1}, ValueError, "^exit_after_error must be seconds"),
        ({"max_seconds": 0}, ValueError, "^max_seconds must be above 0"),
    ],
)
def test_wrong_arguments_are_refused_at_once(
    tmp_path: Path, settings: Any, error: Any, words: str
) -> None:
    with pytest.raises(error, match=words):
        previews(**{"folder": tmp_path / "previews", **settings})
    assert not (tmp_path / "previews").exists()


def test_a_sampler_of_another_schedule_is_refused(tmp_path: Path) -> None:
    sampler = Sampler(NoiseSchedule.flow(), "euler", 2)
    with pytest.raises(ValueError, match="made for flow"):
        Previews(sampler, schedule=Noising(SCHEDULE), shape=SHAPE, folder=tmp_path)
    made = Previews(sampler, shape=SHAPE, folder=tmp_path)  # brings its own
    made.close()


def test_averages_are_asked_for_where_they_are_needed(tmp_path: Path) -> None:
    net = Net()
    ema = ModelEMA(net, 0.5)
    with previews(tmp_path, weights="ema") as made:
        with pytest.raises(ValueError, match="weights='ema' needs ema="):
            made(net, step=1)
        made.try_out(net, ema=ema.average)
        made(net, step=1, ema=ema.average)  # none yet
    with previews(tmp_path) as made:  # with ema=, it is drawn by default
        ema.update(1)
        made(net, step=2, ema=ema.average)
        made(net, step=3)
    lines = [json.loads(line) for line in (tmp_path / "previews.jsonl").read_text().splitlines()]
    seen = [(line["step"], line["weights"], line["note"]) for line in lines if line["index"] == 0]
    note = "there are no EMA weights yet: drawn with the raw ones"
    assert seen == [(1, "raw", note), (2, "ema", ""), (3, "raw", "")]


class Broken:
    def log_image(self, **given: Any) -> None:
        raise ConnectionError("no network")


def test_trackers_get_the_pictures(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    def tags(folder: Path) -> list[str]:
        events = EventAccumulator(str(folder))
        events.Reload()
        return events.Tags()["images"]

    with accelerator(tmp_path, log_with="tensorboard") as loop:
        loop.init_trackers("run")
        with previews(tmp_path / "a", loop) as made:
            made(Net(), step=1)
        loop.end_training()
    assert tags(tmp_path / "run") == ["a"]
    logger = TensorBoardLogger(tmp_path / "fabric")
    fabric = Fabric(accelerator="cpu", devices=1, loggers=logger)
    with previews(tmp_path / "b", fabric) as made:
        made(Net(), step=1)
    logger.finalize("success")
    assert tags(Path(logger.log_dir)) == ["b"]
    writer = SummaryWriter(tmp_path / "bare")
    with (  # a broken tracker: once, and the others go on
        pytest.warns(UserWarning) as caught,
        previews(tmp_path / "c", trackers=[Broken(), writer, object()]) as made,
    ):
        for step in (1, 2, 3):
            assert made(Net(), step=step)
    writer.close()
    assert tags(tmp_path / "bare") == ["c"] and len(pictures(tmp_path / "c")) == 3
    told = [str(one.message) for one in caught]
    assert sum("no network; training goes on" in text for text in told) == 1, told
    assert sum("3 times in this run at Broken" in text for text in told) == 1, told
    assert sum("object takes no images" in text for text in told) == 1, told


# Pipelines


def unet() -> Any:
    from diffusers import UNet2DModel

    blocks: Any = {"down_block_types": ("DownBlock2D",), "up_block_types": ("UpBlock2D",)}
    return UNet2DModel(
        sample_size=8, block_out_channels=(8,), norm_num_groups=2, layers_per_block=1, **blocks
    )


@pytest.mark.parametrize("wrapped", [False, True])
def test_a_pipeline_draws(tmp_path: Path, wrapped: bool) -> None:
    from diffusers import DDIMScheduler, DDPMPipeline

    net = unet()
    fabric = Fabric(accelerator="cpu", devices=1)
    network = fabric.setup(net) if wrapped else net
    theirs = DDIMScheduler(prediction_type="epsilon")
    common: Any = {"schedule": SCHEDULE, "num_images": 2, "folder": tmp_path, "on_error": "raise"}
    loop = fabric if wrapped else None

    def pipeline(module: nn.Module) -> Any:
        return DDPMPipeline(cast(Any, module), cast(Any, theirs))

    with Previews("ddim", steps=2, pipeline=pipeline, loop=loop, **common) as made:
        made.try_out(network)
        made(network, step=3)
    found = read_settings(tmp_path / "step_00000003.png")
    assert (found["pipeline"], found["scheduler"]) == ("DDPMPipeline", "DDIMScheduler")
    with pytest.raises(RuntimeError, match="holds none of the networks of Net"):
        Previews("ddim", steps=2, pipeline=pipeline(net), **common)(Net(), step=1)


# Settings


def _pixels(path: Path) -> Tensor:
    import numpy as np
    from PIL import Image

    return torch.from_numpy(np.array(Image.open(path))).permute(2, 0, 1)


def test_a_picture_holds_what_draws_it_again(tmp_path: Path) -> None:
    class Labelled(nn.Module):
        def forward(self, x: Tensor, timesteps: Tensor, label: Tensor) -> Tensor:
            return -x * label.view(-1, 1, 1, 1)

    def encode(texts: list[str]) -> dict[str, Any]:
        return {"label": torch.tensor([float(len(text)) / 4 for text in texts])}

    sampler = Sampler(SCHEDULE, "DPM++ 2M SDE Karras", 4, rho=5.0, eta=0.5)
    settings: Any = {"prompts": ["a \N{CAT}", "dogs, \\ud83d"], "negative_prompt": "x: y\nz"}
    with Previews(
        sampler,
        shape=SHAPE,
        seeds=[7, 2**63],
        batch_size=1,
        guidance_scale=2.5,
        guidance_rescale=0.5,
        encode=encode,
        folder=tmp_path,
        on_error="raise",
        **settings,
    ) as made:
        made(Labelled(), step=12)
    lines = [json.loads(line) for line in (tmp_path / "previews.jsonl").read_text().splitlines()]
    for line in lines:
        found = read_settings(tmp_path / line["image"])
        assert found == line["settings"] and found["step"] == 12 and found["weights"] == "raw"
        again = sampler_from_settings(found, SCHEDULE)
        assert again == sampler
        guidance = {name: found[name] for name in ("guidance_scale", "guidance_rescale")}
        drawn = again(
            Labelled(),
            (1, *found["shape"]),
            seeds=[found["seed"]],
            conditioning=encode([found["prompt"]]),
            unconditional=encode([found["negative_prompt"]]),
            **guidance,
        )
        assert torch.equal(to_pixels(drawn)[0], _pixels(tmp_path / line["image"]))
    grid = read_settings(tmp_path / "step_00000012.png")
    assert grid["seeds"] == [7, 2**63] and grid["prompts"] == settings["prompts"]
    with pytest.raises(ValueError, match="drawn on the schedule with fingerprint"):
        sampler_from_settings(grid, NoiseSchedule.flow())


def test_the_infotext_is_read_as_a1111_reads_it(tmp_path: Path) -> None:
    from PIL import Image

    with previews(tmp_path, classes=[3], class_key="y", predict=lambda x, t, y: -x) as made:
        made(Net(), step=5)
    (image,) = (tmp_path / "images").rglob("*seed_0.png")
    text: str = cast(Any, Image.open(image)).text["parameters"]
    *prompt, last = text.split("\n")
    assert prompt == ["y 3"]
    parts = dict(part.split(": ") for part in last.split(", "))
    assert parts == {
        "Steps": "2",
        "Sampler": "Euler a",
        "Schedule type": "trailing",
        "CFG scale": "1",
        "Seed": "0",
        "Size": "8x8",
        "Training step": "5",
        "Weights": "raw",
    }


@pytest.mark.parametrize(
    "make",
    [
        lambda: Sampler(SCHEDULE, "DDIMScheduler", 5),
        lambda: Sampler(SCHEDULE, "unipc", timesteps=[999, 750, 500, 250]),
        lambda: Sampler(SCHEDULE, "DPM adaptive", rtol=0.1),
        lambda: Sampler(SCHEDULE, "score_sde_ve", 7, correct_steps=2),
        lambda: Sampler(NoiseSchedule.flow(), "euler", 3, "beta"),
    ],
)
def test_samplers_survive_json(make: Any) -> None:
    sampler = make()
    settings = json.loads(json.dumps(settings_of_sampler(sampler)))
    again = sampler_from_settings(settings, sampler.schedule)
    assert type(again) is type(sampler) and settings_of_sampler(again) == settings
    if isinstance(sampler, Sampler):
        assert again == sampler


def test_what_json_cannot_hold_is_named() -> None:
    def own(schedule: NoiseSchedule, steps: int) -> Any:
        return Sampler(schedule, "euler", steps).knots

    settings = settings_of_sampler(Sampler(SCHEDULE, "euler", 3, own))
    assert settings["unsaved"] == ["grid"] and settings["grid"] is None
    with pytest.raises(ValueError, match="the file does not hold grid of euler"):
        sampler_from_settings(settings, SCHEDULE)


def test_files_without_settings_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"no image")
    with pytest.raises(ValueError, match="cannot be read as an image"):
        read_settings(tmp_path / "a.png")
    with pytest.raises(FileNotFoundError, match="no file at"):
        read_settings(tmp_path / "b.png")


def test_a_sharded_network_is_called_in_its_precision_and_its_errors_end_training(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    mode = ForwardMode(sharded=True, wrapped=True)
    monkeypatch.setattr(loop_module, "forward_mode_of_wrappers", lambda network: mode)
    model = loop_module.loop_of().live(Net().bfloat16())
    assert model.convert_input(torch.zeros(1)).dtype == torch.bfloat16
    with pytest.raises(ShardedForwardError, match="TypeError"):
        model.call(abs)("a")


def test_a_pipeline_is_that_of_the_network_of_the_call(tmp_path: Path) -> None:
    from diffusers import DDIMScheduler, DDPMPipeline

    nets, drawn = [unet(), unet()], list[int]()

    def pipeline(module: nn.Module) -> Any:
        torch.rand(1)  # as modules do that are initialized
        drawn.append(nets.index(module))
        return DDPMPipeline(cast(Any, module), cast(Any, DDIMScheduler()))

    settings: Any = {"schedule": NoiseSchedule.linear(), "num_images": 1, "folder": tmp_path}
    with Previews("ddim", steps=2, pipeline=pipeline, **settings) as made:
        before = torch.get_rng_state()
        for step, net in enumerate([nets[0], nets[0], nets[1]], start=1):
            made(net, step=step)
        assert torch.equal(torch.get_rng_state(), before)
    assert drawn == [0, 1]
