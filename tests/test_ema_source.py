"""Drawing with averaged weights, whoever keeps them: the right values, put back to the last bit,
training untouched.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.training_utils import EMAModel
from lightning.pytorch import Callback
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_avg_fn

from alphabar.callbacks import ema_weights
from callbacks_toy import Toy, fresh, one_thread, train, trainer, weights

pytestmark = pytest.mark.filterwarnings(
    "ignore::Warning:lightning", "ignore::FutureWarning:diffusers"
)


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    with one_thread():
        yield


class InTorch(Toy):
    """Keeps torch's AveragedModel of one part."""

    def __init__(self, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.ema_first = AveragedModel(self.first, avg_fn=get_ema_avg_fn(0.5))

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.ema_first.update_parameters(self.first)

    def averages(self) -> dict[str, torch.Tensor]:
        return {f"first.{name}": value for name, value in self.ema_first.module.named_parameters()}


class InDiffusers(Toy):
    """Keeps a diffusers EMAModel of one part."""

    def __init__(self, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.ema = EMAModel(self.last.parameters(), decay=0.5)

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.ema.step(self.last.parameters())

    def averages(self) -> dict[str, torch.Tensor]:
        names = [f"last.{name}" for name, _ in self.last.named_parameters()]
        return dict(zip(names, self.ema.shadow_params, strict=True))


class InScope(Toy):
    """Keeps averages as sgm does, and switches with its own ema_scope."""

    use_ema = True

    def __init__(self, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.model_ema = nn.Module()
        self.model_ema.register_buffer("num_updates", torch.tensor(0))
        self.shadow = {name: p.detach().clone() for name, p in self.first.named_parameters()}

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.model_ema.get_buffer("num_updates").add_(1)
        for name, p in self.first.named_parameters():
            self.shadow[name].lerp_(p.detach(), 0.5)

    @contextmanager
    def ema_scope(self, context: str | None = None) -> Iterator[None]:
        kept = {name: p.detach().clone() for name, p in self.first.named_parameters()}
        try:
            self.first.load_state_dict(self.shadow)
            yield
        finally:
            self.first.load_state_dict(kept)

    def averages(self) -> dict[str, torch.Tensor]:
        return {f"first.{name}": value for name, value in self.shadow.items()}


class Draw(Callback):
    """Look at the weights within the context, at every step; ``fail`` raises there."""

    def __init__(self, averages: Any, fail: bool = False) -> None:
        self.averages, self.fail = averages, fail
        self.seen: list[bool] = []

    def on_train_batch_start(
        self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int
    ) -> None:
        self.look(trainer, pl_module)

    def on_train_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.look(trainer, pl_module)

    def look(self, trainer: Any, module: Any) -> None:
        raw = {name: p.detach().clone() for name, p in module.named_parameters()}
        averages = {
            name: value.detach().clone() for name, value in self.averages(trainer, module).items()
        }
        try:
            with ema_weights(trainer, module) as used:
                self.seen.append(used)
                for name, p in module.named_parameters():
                    assert torch.equal(
                        p, averages[name] if used and name in averages else raw[name]
                    ), name
                if used and trainer.global_step > 1:
                    assert any(not torch.equal(averages[name], raw[name]) for name in averages)
                if self.fail:
                    raise KeyError("on purpose")
        except KeyError:
            assert self.fail
        assert all(torch.equal(p, raw[name]) for name, p in module.named_parameters())
        after = self.averages(trainer, module)
        assert all(torch.equal(after[name], value) for name, value in averages.items())


@pytest.mark.parametrize("fail", [False, True])
@pytest.mark.parametrize("kind", [InTorch, InDiffusers, InScope])
def test_averages_of_the_module_itself(tmp_path: Path, kind: type[Any], fail: bool) -> None:
    draw = Draw(lambda trainer, module: module.averages(), fail)
    module = train(tmp_path, draw, module=fresh(kind), max_epochs=1)
    assert draw.seen[:2] == [False, False] and all(draw.seen[2:]) and len(draw.seen) == 12
    assert weights(module) == weights(train(tmp_path, module=fresh(kind), max_epochs=1))


@pytest.mark.parametrize("first", [False, True])
def test_averages_of_lightning(tmp_path: Path, first: bool) -> None:
    from lightning.pytorch.callbacks import EMAWeightAveraging

    average: Any = EMAWeightAveraging(decay=0.5)
    draw = Draw(lambda trainer, module: dict(average._average_model.module.named_parameters()))
    callbacks = [average, draw] if first else [draw, average]
    module = train(tmp_path, *callbacks, max_epochs=1)
    assert draw.seen[0] is False and draw.seen[2] is True and len(draw.seen) == 12
    # the other way round, the average is not yet updated when it is drawn with
    assert draw.seen[1] is first
    assert weights(module) == weights(train(tmp_path, EMAWeightAveraging(decay=0.5), max_epochs=1))


def test_without_any_average_nothing_is_touched(tmp_path: Path) -> None:
    draw = Draw(lambda trainer, module: {})
    assert weights(train(tmp_path, draw, max_epochs=1)) == weights(train(tmp_path, max_epochs=1))
    assert draw.seen == [False] * 12


def test_an_average_of_nothing_known_is_named(tmp_path: Path) -> None:
    module = fresh()
    module.ema = EMAModel([nn.Parameter(torch.zeros(3, 5))])
    module.ema.optimization_step = 1
    with (
        pytest.raises(
            ValueError,
            match=r"Toy.ema averages 1 parameters, and no parts of the module .* ema_unet",
        ),
        ema_weights(trainer(tmp_path), module),
    ):
        pass


def test_twins_are_told_apart_by_name(tmp_path: Path) -> None:
    module = fresh()
    module.teacher, module.student = nn.Linear(2, 2), nn.Linear(2, 2)
    module.ema_student = AveragedModel(nn.Linear(2, 2))
    module.ema_student.n_averaged += 1
    with ema_weights(trainer(tmp_path), module) as used:
        assert used and torch.equal(module.student.weight, module.ema_student.module.weight)
        assert not torch.equal(module.teacher.weight, module.student.weight)
    module.ema_other = module.ema_student
    with (
        pytest.raises(ValueError, match="and 2 parts of the module have such"),
        ema_weights(trainer(tmp_path), module),
    ):
        pass
