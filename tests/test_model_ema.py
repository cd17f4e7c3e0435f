"""The averages of a network in a loop of one's own, and its schedule beside its checkpoints."""

import copy
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from lightning.fabric import Fabric
from torch import nn

from alphabar.noising import NoiseSchedule, Noising
from alphabar.training import (
    Constant,
    ModelEMA,
    PowerFunction,
    save_schedule_with,
    schedule_from_checkpoint,
)


def stepped(ema: ModelEMA, net: nn.Linear, values: list[float]) -> None:
    for step, value in enumerate(values, start=1):
        nn.init.constant_(net.weight, value)
        ema.update(step)


def linear(**settings: Any) -> nn.Linear:
    return nn.Linear(1, 1, bias=False, **settings)


def test_the_average_is_the_formula() -> None:
    net = linear()
    profiles = [Constant(decay=0.75), PowerFunction(sigma_rel=0.1)]
    ema = ModelEMA(net, profiles)
    stepped(ema, net, values := [1.0, 5.0, 2.0, 8.0])
    for index, profile in enumerate(profiles):
        expected = 0.0
        for step, value in enumerate(values, start=1):
            keep = profile(step)
            expected = keep * expected + (1 - keep) * value
        assert ema.weights(index)["weight"].item() == pytest.approx(expected, rel=1e-6)


def test_updates_are_of_steps_and_each_once() -> None:
    net, other = linear(), linear()
    every, often = ModelEMA(net, 0.5, every_n_steps=2, start_step=1), ModelEMA(other, 0.5)
    for step in (1, 1, 2, 3, 3, 4, 5):
        nn.init.constant_(net.weight, step)
        nn.init.constant_(other.weight, step)
        every.update(step)
        often.update(step)
    assert every.step == 5 and often.step == 5
    assert every.weights()["weight"].item() == 3 * 0.25 + 5 * 0.75
    assert often.weights()["weight"].item() == ((((1 + 2) / 2 + 3) / 2 + 4) / 2 + 5) / 2


def test_weights_come_back_bit_for_bit(tmp_path: Path) -> None:
    net = nn.Linear(64, 64).bfloat16()
    before = copy.deepcopy(net.state_dict())
    ema = ModelEMA(net, 0.9, device="cpu")
    with ema.average() as used:
        assert used is False
    ema.update(1)
    with torch.no_grad():
        net.weight.mul_(1.01)
    ema.update(2)
    after = copy.deepcopy(net.state_dict())
    with pytest.raises(KeyError), ema.average() as used:
        assert used is True and not torch.equal(net.weight, after["weight"])
        raise KeyError
    assert all(torch.equal(value, after[name]) for name, value in net.state_dict().items())
    assert not torch.equal(before["weight"], after["weight"])
    assert {value.dtype for value in ema.weights().values()} == {torch.float32}


def test_frozen_parameters_are_not_averaged() -> None:
    net = nn.Sequential(nn.Linear(1, 1), nn.Linear(1, 1))
    net[0].requires_grad_(False)
    ema = ModelEMA(net, 0.5)
    ema.update(1)
    assert list(ema.weights()) == ["1.weight", "1.bias"]


def test_a_copy_gets_the_average(tmp_path: Path) -> None:
    net = linear()
    ema = ModelEMA(net, 0.5)
    with pytest.raises(ValueError, match=r"^there is no average yet"):
        ema.copy_to(linear())
    stepped(ema, net, [1.0, 3.0])
    copied = linear(dtype=torch.float64)
    ema.copy_to(copied)
    assert copied.weight.item() == 2.0 and net.weight.item() == 3.0
    with pytest.raises(ValueError, match=r"^Sequential has no parameter 'weight', which is averag"):
        ema.copy_to(nn.Sequential(linear()))


def test_a_state_goes_on_where_it_was(tmp_path: Path) -> None:
    net = linear()
    whole, first = ModelEMA(net, ["warmup", 0.5]), ModelEMA(net, ["warmup", 0.5])
    stepped(first, net, [1.0, 3.0])
    torch.save(first.state_dict(), tmp_path / "ema.pt")
    again = ModelEMA(net, ["warmup", 0.5, 0.25], device="cpu")
    with pytest.warns(UserWarning, match="the state has no average constant_0.25"):
        again.load_state_dict(torch.load(tmp_path / "ema.pt", weights_only=True))
    for step, value in ((3, 9.0), (4, -1.0)):
        nn.init.constant_(net.weight, value)
        again.update(step)
    stepped(whole, net, [1.0, 3.0, 9.0, -1.0])
    for index in (0, 1):
        assert torch.equal(whole.weights(index)["weight"], again.weights(index)["weight"])


def test_wrapped_networks_have_the_names_of_their_own(tmp_path: Path) -> None:
    net = linear()
    fabric = Fabric(accelerator="cpu", devices=1)
    for wrapped in (fabric.setup(net), torch.compile(net), nn.DataParallel(net)):
        ema = ModelEMA(wrapped, 0.5)
        ema.update(1)
        assert list(ema.weights()) == ["weight"]


# The schedule


SCHEDULE = NoiseSchedule.scaled_linear(prediction="v_prediction")


@pytest.fixture
def accelerator() -> Accelerator:
    made = Accelerator(cpu=True)
    made._save_model_state_pre_hook.clear()
    made._load_model_state_pre_hook.clear()
    return made


def test_a_state_of_another_schedule_is_refused_or_told(
    tmp_path: Path, accelerator: Accelerator
) -> None:
    save_schedule_with(accelerator, Noising(SCHEDULE))
    accelerator.save_state(str(tmp_path / "state"))
    assert schedule_from_checkpoint(tmp_path / "state") == SCHEDULE
    accelerator.load_state(str(tmp_path / "state"))
    for mode, error in (("error", ValueError), ("warn", UserWarning)):
        accelerator._load_model_state_pre_hook.clear()
        save_schedule_with(accelerator, NoiseSchedule.flow(), on_mismatch=mode)  # pyright: ignore
        expect: Any = pytest.raises if mode == "error" else pytest.warns
        with expect(error, match=r"'.*state/scheduler' is of the noise schedule discrete.*flow"):
            accelerator.load_state(str(tmp_path / "state"))
    accelerator._load_model_state_pre_hook.clear()
    save_schedule_with(accelerator, NoiseSchedule.flow(), on_mismatch="ignore")
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*noise schedule")
        accelerator.load_state(str(tmp_path / "state"))


def test_a_state_without_a_schedule_is_told(tmp_path: Path, accelerator: Accelerator) -> None:
    accelerator.save_state(str(tmp_path / "state"))
    save_schedule_with(accelerator, SCHEDULE)
    with pytest.warns(UserWarning, match="does not say the noise schedule of the state"):
        accelerator.load_state(str(tmp_path / "state"))


def test_a_full_disk_does_not_lose_the_state(
    tmp_path: Path, accelerator: Accelerator, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("alphabar.training.checkpoints.accelerate_states.write_sidecar", full)
    save_schedule_with(accelerator, SCHEDULE)
    with pytest.warns(UserWarning, match="could not be written.*No space left"):
        accelerator.save_state(str(tmp_path / "state"))
    assert (tmp_path / "state" / "random_states_0.pkl").is_file()


def test_wrong_arguments_are_refused(accelerator: Accelerator) -> None:
    with pytest.raises(TypeError, match=r"^schedule must be the NoiseSchedule"):
        save_schedule_with(accelerator, None)
    with pytest.raises(ValueError, match="unknown on_mismatch 'wran'"):
        save_schedule_with(accelerator, SCHEDULE, on_mismatch="wran")  # pyright: ignore


def test_a_checkpoint_of_fabric_holds_the_schedule(tmp_path: Path) -> None:
    """A key of plain values is enough: schedule_from_checkpoint reads it."""
    fabric = Fabric(accelerator="cpu", devices=1)
    state = {"network": fabric.setup(linear()), "noise_schedule": SCHEDULE.to_config()}
    fabric.save(tmp_path / "last.ckpt", state)
    assert schedule_from_checkpoint(tmp_path / "last.ckpt") == SCHEDULE
