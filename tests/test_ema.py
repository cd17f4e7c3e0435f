"""Averages while a model trains: exact values, training untouched, resumes to the last bit, also
where Lightning's break.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint, OnExceptionCheckpoint
from lightning.pytorch.loggers.logger import DummyLogger
from torch import Tensor, nn
from torch.utils.data import ConcatDataset, DataLoader

from alphabar.callbacks import EMA, ema_weights
from alphabar.training import EMA_PROFILES, Constant, EMAProfile, PowerFunction, posthoc_ema
from callbacks_toy import Toy, files, fresh, loader, one_thread, train, trainer, weights

pytestmark = pytest.mark.filterwarnings("ignore::Warning:lightning", "ignore::Warning:torch")


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    with one_thread():
        yield


def parameters(module: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in module.named_parameters() if p.requires_grad}


class Record(Callback):
    """The weights after every optimizer step, and those that validation sees."""

    def __init__(self) -> None:
        self.steps: dict[int, dict[str, Tensor]] = {}
        self.validated: dict[int, dict[str, Tensor]] = {}

    def on_train_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.steps[trainer.global_step] = parameters(pl_module)
        self.steps.pop(0, None)

    def on_validation_batch_end(
        self,
        trainer: Any,
        pl_module: Any,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        self.validated[trainer.global_step] = parameters(pl_module)


def expected(
    record: Record, profile: EMAProfile, every: int = 1, start: int = 0
) -> dict[str, Tensor]:
    """The average by its definition, in float64."""
    average: dict[str, Tensor] = {}
    for step in [s for s in sorted(record.steps) if s > start and (s - start) % every == 0]:
        beta = profile(step - start, every) if average else 0.0
        new = {name: p.double() for name, p in record.steps[step].items()}
        average = {name: beta * average.get(name, p) + (1 - beta) * p for name, p in new.items()}
    return average


def assert_near(found: dict[str, Tensor], right: dict[str, Tensor]) -> None:
    assert found.keys() == right.keys()
    for name, value in right.items():
        torch.testing.assert_close(found[name].double(), value, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("name", EMA_PROFILES)
@pytest.mark.parametrize("settings", [{}, {"every_n_steps": 3, "start_step": 2}])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_averages_of_optimizer_steps(
    tmp_path: Path, name: str, settings: dict[str, int], accumulate: int
) -> None:
    ema, record = EMA([name, Constant(decay=0.7)], **settings), Record()
    module = train(tmp_path, record, ema, accumulate_grad_batches=accumulate)
    assert len(record.steps) == 12 // accumulate
    every, start = settings.get("every_n_steps", 1), settings.get("start_step", 0)
    for average in ema._averages.each:
        assert_near(average.weights, expected(record, average.profile, every, start))
        assert average.updates == (12 // accumulate - start) // every
    assert weights(module) == weights(train(tmp_path, accumulate_grad_batches=accumulate))


def test_losses_are_bit_identical(tmp_path: Path) -> None:
    plain = train(tmp_path)
    averaged = train(tmp_path / "a", EMA(["constant", "warmup"]))
    assert averaged.losses == plain.losses and weights(averaged) == weights(plain)
    with_validation = [
        _validated(tmp_path, EMA(validate=False)),
        _validated(tmp_path, EMA(validate=True)),
    ]
    assert weights(with_validation[0]) == weights(with_validation[1])


class Validated(Toy):
    def validation_step(self, batch: Any, batch_idx: int) -> None:
        noised = self.noising(batch[0], step=0)
        self.log("val_loss", noised.loss(self.predict(noised.x, noised.timesteps)))

    def val_dataloader(self) -> Any:
        return loader(8, shuffle=False)


def _validated(root: Path, *callbacks: Any, **settings: Any) -> Toy:
    return train(root, *callbacks, module=fresh(Validated), **settings)


def test_validation_sees_the_average(tmp_path: Path) -> None:
    ema, record = EMA(Constant(decay=0.7)), Record()
    module = _validated(tmp_path, record, ema)
    assert_near(record.validated[12], expected(record, Constant(decay=0.7)))
    assert not torch.equal(record.validated[12]["first.weight"], record.steps[12]["first.weight"])
    assert all(torch.equal(p, record.steps[12][name]) for name, p in parameters(module).items())
    raw = Record()
    _validated(tmp_path, raw, EMA(Constant(decay=0.7), validate=False))
    assert all(torch.equal(p, raw.steps[12][name]) for name, p in raw.validated[12].items())


def test_before_the_first_update_the_weights_themselves_are_used(tmp_path: Path) -> None:
    ema, record = EMA(start_step=100), Record()
    module = _validated(tmp_path, record, ema)
    assert all(torch.equal(p, record.steps[12][name]) for name, p in record.validated[12].items())
    with ema_weights(trainer(tmp_path, ema), module) as used:
        assert not used


class Stop(Callback):
    """Fails at one place: like a kill, but in this process."""

    def __init__(self, step: int, hook: str = "on_train_batch_start") -> None:
        self.step = step
        setattr(self, hook, self.stop)

    def stop(self, trainer: Any, *rest: Any) -> None:
        if trainer.global_step == self.step and not trainer.sanity_checking:
            raise KeyError("killed")


def kept(folder: Path, **settings: Any) -> ModelCheckpoint:
    settings = {"filename": "{step}", "save_top_k": -1, "every_n_train_steps": 1, **settings}
    return ModelCheckpoint(folder, auto_insert_metric_name=False, **settings)


PROFILES = ["warmup", PowerFunction(sigma_rel=0.2)]


def same_batches() -> DataLoader[Any]:
    """Lightning goes on in the middle of an epoch with its first batch, so that all must be the
    same.
    """
    return DataLoader(ConcatDataset([loader(4).dataset] * 6), batch_size=4)


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("step", [3, 5])
def test_resume_is_bit_identical(tmp_path: Path, accumulate: int, step: int) -> None:
    def run(*callbacks: Any, **settings: Any) -> Toy:
        common: Any = {
            "enable_checkpointing": True,
            "accumulate_grad_batches": accumulate,
            "data": same_batches(),
        }
        return train(
            tmp_path, *callbacks, module=fresh(Validated, dropout=0.0), **common, **settings
        )

    whole, again = EMA(PROFILES), EMA(PROFILES)
    uncut = run(whole, kept(tmp_path / "uncut"))
    with pytest.raises(KeyError, match="killed"):
        run(EMA(PROFILES), Stop(step), kept(tmp_path / "cut"))
    path = tmp_path / "cut" / f"{step}.ckpt"
    resumed = run(again, ckpt_path=path)
    assert weights(resumed) == weights(uncut)
    assert (
        resumed.losses == uncut.losses[len(uncut.losses) - len(resumed.losses) :] and resumed.losses
    )
    for one, other in zip(whole._averages.each, again._averages.each, strict=True):
        assert one.updates == other.updates and one.weights.keys() == other.weights.keys()
        assert all(torch.equal(value, other.weights[name]) for name, value in one.weights.items())


def test_a_checkpoint_holds_the_average_where_models_are_loaded_from(tmp_path: Path) -> None:
    ema, record = EMA(Constant(decay=0.7)), Record()
    train(tmp_path, record, ema, kept(tmp_path), enable_checkpointing=True)
    saved = torch.load(tmp_path / "12.ckpt", weights_only=True)
    right = expected(record, Constant(decay=0.7))
    assert_near({name: saved["state_dict"][name] for name in right}, right)
    assert all(
        torch.equal(saved["current_model_state"][name], p) for name, p in record.steps[12].items()
    )
    assert saved["state_dict"].keys() == saved["current_model_state"].keys()
    assert "frozen.1.running_mean" in saved["state_dict"]
    assert (
        saved["state_dict"]["first.weight"].data_ptr()
        == saved["ema"]["averages"][0]["weights"]["first.weight"].data_ptr()
    )
    loaded = Toy.load_from_checkpoint(tmp_path / "12.ckpt")
    assert_near(parameters(loaded), right)
    module = fresh()
    trainer(tmp_path, EMA(Constant(decay=0.7))).validate(
        module, loader(), ckpt_path=tmp_path / "12.ckpt", verbose=False
    )
    assert_near(parameters(module), right)


@pytest.mark.parametrize("hook", ["on_validation_batch_end", "on_validation_epoch_end"])
def test_an_error_in_validation_exchanges_nothing(tmp_path: Path, hook: str) -> None:
    """Lightning's own average then writes the weights as state_dict and the average as
    current_model_state.
    """
    ema, record = EMA(Constant(decay=0.7)), Record()
    on_exception = OnExceptionCheckpoint(tmp_path, filename="failed")
    module = fresh(Validated)
    with pytest.raises(KeyError, match="killed"):
        train(
            tmp_path,
            record,
            Stop(6, hook),
            ema,
            on_exception,
            module=module,
            enable_checkpointing=True,
        )
    saved = torch.load(tmp_path / "failed.ckpt", weights_only=True)
    assert_near(
        {n: saved["state_dict"][n] for n in record.steps[6]}, expected(record, Constant(decay=0.7))
    )
    for name, p in record.steps[6].items():
        assert torch.equal(saved["current_model_state"][name], p)
        assert torch.equal(module.get_parameter(name), p)


class SaveInValidation(Callback):
    def __init__(self, path: Path) -> None:
        self.path = path

    def on_validation_batch_end(
        self,
        trainer: Any,
        pl_module: Any,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        if trainer.global_step:
            trainer.save_checkpoint(self.path)


def test_a_checkpoint_saved_during_validation(tmp_path: Path) -> None:
    ema, record = EMA(Constant(decay=0.7)), Record()
    _validated(tmp_path, record, ema, SaveInValidation(tmp_path / "inside.ckpt"), max_epochs=1)
    saved = torch.load(tmp_path / "inside.ckpt", weights_only=True)
    right = expected(record, Constant(decay=0.7))
    assert_near({n: saved["state_dict"][n] for n in right}, right)
    assert all(
        torch.equal(saved["current_model_state"][name], p) for name, p in record.steps[6].items()
    )
    assert_near(record.validated[6], right)


def test_bfloat16_models_have_float32_averages(tmp_path: Path) -> None:
    """Lightning's own average is rounded to bfloat16 by every validation."""
    ema, record = EMA(Constant(decay=0.9)), Record()
    module = fresh(Validated)
    train(
        tmp_path,
        record,
        ema,
        kept(tmp_path),
        module=module,
        precision="bf16-true",
        enable_checkpointing=True,
    )
    assert module.first.weight.dtype == torch.bfloat16
    right = expected(record, Constant(decay=0.9))
    (average,) = ema._averages.each
    for name, value in right.items():
        assert average.weights[name].dtype == torch.float32
        torch.testing.assert_close(average.weights[name].double(), value, rtol=1e-5, atol=1e-6)
    saved = torch.load(tmp_path / "12.ckpt", weights_only=True)
    assert all(
        torch.equal(saved["state_dict"][name], value) for name, value in average.weights.items()
    )
    again = EMA(Constant(decay=0.9))
    other = fresh(Validated)
    path = tmp_path / "12.ckpt"
    train(tmp_path, again, module=other, precision="bf16-true", ckpt_path=path, max_epochs=2)
    assert all(
        torch.equal(again._averages.each[0].weights[name], value)
        for name, value in average.weights.items()
    )
    assert weights(other) == weights(module)


def test_checkpoints_go_from_lightning_and_to_it(tmp_path: Path) -> None:
    theirs = EMAWeightAveraging(decay=0.7)
    train(tmp_path, theirs, kept(tmp_path / "theirs"), max_epochs=1, enable_checkpointing=True)
    path = tmp_path / "theirs/6.ckpt"
    saved = torch.load(path, weights_only=True)
    ema = EMA(Constant(decay=0.7))
    module = train(
        tmp_path,
        ema,
        kept(tmp_path / "ours"),
        ckpt_path=path,
        max_epochs=1,
        enable_checkpointing=True,
    )
    assert all(
        torch.equal(p, saved["current_model_state"][name]) for name, p in parameters(module).items()
    )
    assert all(
        torch.equal(p, saved["state_dict"][name]) for name, p in ema._averages.each[0].weights.items()
    )
    assert ema._averages.each[0].updates == 6
    ours = EMA(Constant(decay=0.7))
    record = Record()
    train(tmp_path, record, ours, kept(tmp_path / "ours"), max_epochs=1, enable_checkpointing=True)
    back = EMAWeightAveraging(decay=0.7)
    train(tmp_path, back, ckpt_path=tmp_path / "ours/6.ckpt", max_epochs=1)
    average: Any = back._average_model
    assert int(average.n_averaged) == 6
    for name, p in average.module.named_parameters():
        if name in ours._averages.each[0].weights:
            assert torch.equal(p, ours._averages.each[0].weights[name])


@pytest.mark.filterwarnings("always")
def test_other_profiles_after_a_resume(tmp_path: Path) -> None:
    train(tmp_path, EMA("warmup"), kept(tmp_path), max_epochs=1, enable_checkpointing=True)
    other = EMA(["constant", "warmup"])
    with pytest.warns(
        UserWarning, match=r"the checkpoint has no average constant_0.999; that one begins anew"
    ):
        train(tmp_path, other, ckpt_path=tmp_path / "6.ckpt")
    assert [average.updates for average in other._averages.each] == [6, 12]
    plain = tmp_path / "plain"
    train(tmp_path, kept(plain), max_epochs=1, enable_checkpointing=True)
    new = EMA("warmup")
    train(tmp_path, new, ckpt_path=plain / "6.ckpt")
    assert new._averages.each[0].updates == 6


class Draw(Callback):
    def __init__(self) -> None:
        self.seen: list[dict[str, Tensor]] = []

    def on_train_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        with ema_weights(trainer, pl_module) as used, ema_weights(trainer, pl_module) as again:
            assert used and again
            self.seen.append(parameters(pl_module))


@pytest.mark.parametrize("first", [False, True])
def test_drawing_does_not_depend_on_the_order_of_callbacks(tmp_path: Path, first: bool) -> None:
    ema, draw, record = EMA(Constant(decay=0.7)), Draw(), Record()
    module = train(tmp_path, record, *([ema, draw] if first else [draw, ema]))
    assert_near(draw.seen[-1], expected(record, Constant(decay=0.7)))
    assert len(draw.seen) == 12 and weights(module) == weights(train(tmp_path))


def test_after_training_the_model_has_its_own_weights(tmp_path: Path) -> None:
    ema, record = EMA(Constant(decay=0.7)), Record()
    module = fresh()
    fitted = trainer(tmp_path, record, ema)
    fitted.fit(module, loader())
    assert all(torch.equal(p, record.steps[12][name]) for name, p in parameters(module).items())
    with ema_weights(fitted, module) as used:
        assert used
        assert_near(parameters(module), expected(record, Constant(decay=0.7)))
    fitted.save_checkpoint(tmp_path / "end.ckpt")
    saved = torch.load(tmp_path / "end.ckpt", weights_only=True)
    assert all(
        torch.equal(saved["current_model_state"][name], p) for name, p in record.steps[12].items()
    )


class Tied(Toy):
    """Two names for one parameter, and a part that is compiled, whose names have a prefix."""

    def __init__(self, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.again = self.last
        self.last = torch.compile(self.last, backend="eager")


def test_tied_and_compiled_parts(tmp_path: Path) -> None:
    ema = EMA(Constant(decay=0.7))
    train(
        tmp_path, ema, kept(tmp_path), module=fresh(Tied), enable_checkpointing=True, max_epochs=1
    )
    state = torch.load(tmp_path / "6.ckpt", weights_only=True)
    average = ema._averages.each[0].weights
    assert {name for name in average if "frozen" not in name} == {
        "first.weight",
        "first.bias",
        "last.weight",
        "last.bias",
    }
    for key in ("last._orig_mod.weight", "again.weight"):
        assert torch.equal(state["state_dict"][key], average["last.weight"])
        assert not torch.equal(state["current_model_state"][key], average["last.weight"])
    again = EMA(Constant(decay=0.7))
    train(tmp_path, again, module=fresh(Tied), ckpt_path=tmp_path / "6.ckpt", max_epochs=1)
    assert all(torch.equal(again._averages.each[0].weights[name], p) for name, p in average.items())


class Thawing(Toy):
    def on_train_epoch_start(self) -> None:
        self.last.requires_grad_(self.current_epoch > 0)


def test_parts_that_begin_to_train_later_join(tmp_path: Path) -> None:
    ema, record = EMA(Constant(decay=0.7)), Record()
    train(tmp_path, record, ema, module=fresh(Thawing))
    assert_near(ema._averages.each[0].weights, expected(record, Constant(decay=0.7)))
    assert "last.weight" not in record.steps[6]


def test_snapshots(tmp_path: Path) -> None:
    two = [
        PowerFunction(sigma_rel=0.05),
        "warmup",
        PowerFunction(sigma_rel=0.1),
        PowerFunction(sigma_rel=0.2),
    ]
    ema, record = EMA(two, snapshot_every_n_steps=2), Record()
    module = train(tmp_path, record, ema)
    names = [
        f"ema/ema_{step:08d}_{s}.safetensors"
        for step in range(2, 13, 2)
        for s in ("0.05", "0.1", "0.2")
    ]
    assert files(tmp_path) == names
    assert_near(posthoc_ema(tmp_path / "ema", 0.1), expected(record, PowerFunction(sigma_rel=0.1)))
    assert posthoc_ema(tmp_path / "ema", 0.07).keys() == parameters(module).keys()
    assert weights(module) == weights(train(tmp_path / "plain"))
    train(tmp_path / "rehearsal", EMA(snapshot_every_n_steps=1), fast_dev_run=True)
    assert not (tmp_path / "rehearsal").exists()


@pytest.mark.filterwarnings("always")
def test_a_snapshot_that_cannot_be_written_is_a_warning(tmp_path: Path) -> None:
    class Gone(Callback):
        def on_train_batch_start(
            self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int
        ) -> None:
            (tmp_path / "here").rmdir() if (tmp_path / "here").is_dir() else None
            (tmp_path / "here").touch()

    ema = EMA(snapshot_every_n_steps=5, folder=tmp_path / "here")
    with pytest.warns(
        UserWarning, match="the snapshot at step 5 was not written: .*; training goes on"
    ):
        module = train(tmp_path, Gone(), ema)
    assert weights(module) == weights(train(tmp_path / "plain"))
    with pytest.raises(OSError, match="cannot write to the output folder"):
        train(tmp_path, ema)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"profiles": []}, "profiles must be one or more different ones, got none"),
        ({"profiles": ["warmup", "warmup"]}, "got warmup_0.9999, warmup_0.9999"),
        ({"profiles": "emaa"}, "unknown EMA profile 'emaa'"),
        ({"every_n_steps": 0}, "every_n_steps must be an integer of at least 1, got 0"),
        ({"start_step": -1}, "start_step must be an integer of at least 0, got -1"),
        (
            {"snapshot_every_n_steps": True},
            "snapshot_every_n_steps must be an integer of at least 1, got True",
        ),
        (
            {"snapshot_every_n_steps": 10, "every_n_steps": 4},
            "must be a multiple of every_n_steps, got 10 and 4; e.g. 12",
        ),
        ({"snapshot_dtype": "bfloat16"}, "unknown dtype of snapshots|unknown snapshot_dtype"),
    ],
)
def test_what_does_not_fit_is_named(arguments: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        EMA(**arguments)


@pytest.mark.parametrize("rival", [EMA, EMAWeightAveraging])
def test_two_that_average_are_refused(tmp_path: Path, rival: Any) -> None:
    with pytest.raises(ValueError, match="one callback can average the weights, got"):
        train(tmp_path, EMA("warmup"), rival())


def test_a_callback_begins_anew_with_another_trainer(tmp_path: Path) -> None:
    ema, record = EMA(Constant(decay=0.7)), Record()
    train(tmp_path, ema)
    train(tmp_path, record, ema, logger=DummyLogger())
    assert_near(ema._averages.each[0].weights, expected(record, Constant(decay=0.7)))
    assert ema._averages.each[0].updates == 12
