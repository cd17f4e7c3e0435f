"""The parts of the callbacks that know no Trainer: who draws what, what is put back, what becomes a
picture.
"""

import random
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from lightning.pytorch.strategies import FSDPStrategy
from PIL import Image
from torch import nn

from alphabar.callbacks import PreviewConditions, ValidationSampling
from alphabar.callbacks.previews.triggers import Triggers, is_last_epoch
from alphabar.callbacks.support.strategies import forward_mode_of
from alphabar.noising import NoiseSchedule
from alphabar.sampling import Sampler
from alphabar.training.images import image_grid, png_bytes, to_pixels
from alphabar.training.loops import collectives
from alphabar.training.loops.collectives import errors_of_all_ranks
from alphabar.training.loops.forward import ForwardMode
from alphabar.training.loops.isolation import evaluating, randomness_restored
from alphabar.training.previews.batches import Plan, require_rows, take_rows
from alphabar.training.previews.conditioning import Conditions
from alphabar.training.previews.preview import require_equal_work
from alphabar.training.previews.render import Drawing
from alphabar.training.publishing.loggers import log_image

# Plans


@given(images=st.integers(1, 40), batch=st.integers(1, 9), world=st.integers(1, 6))
def test_every_image_is_drawn_in_the_same_batch_whatever_the_number_of_ranks(
    images: int, batch: int, world: int
) -> None:
    alone = Plan(images, batch, 1).batches(0)
    plan = Plan(images, batch, world)
    ranks = [plan.batches(rank) for rank in range(world)]
    assert {len(batches) for batches in ranks} == {plan.rounds}  # equal numbers of forwards
    dealt = [ranks[g % world][g // world] for g in range(plan.rounds * world)]
    assert dealt[: len(alone)] == alone
    assert all(batch == [images - 1] * len(batch) for batch in dealt[len(alone) :])
    assert plan.rounds == -(-len(alone) // world)  # and not one round more than needed
    assert plan.in_order(torch.tensor(ranks)).tolist() == list(range(images))


def test_images_do_not_depend_on_the_number_of_ranks() -> None:
    """The pixels themselves, of a network whose matrix products depend on the shape of the batch."""
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Flatten(),
        nn.Linear(192, 512),
        nn.Tanh(),
        nn.Linear(512, 192),
        nn.Unflatten(1, (3, 8, 8)),
    )
    sampler = Sampler(NoiseSchedule.scaled_linear(prediction="v_prediction"), "euler_ancestral", 5)
    drawing = Drawing(num_images=7, seed=11)

    def draw(world: int) -> torch.Tensor:
        plan = Plan(7, 2, world)
        own = [
            drawing.pixels(lambda x, t: net(x), sampler, (3, 8, 8), plan.batches(rank))
            for rank in range(world)
        ]
        return plan.in_order(torch.stack(own))

    alone = draw(1)
    assert len({image.numpy().tobytes() for image in alone}) == 7
    assert (
        torch.equal(alone, draw(2)) and torch.equal(alone, draw(3)) and torch.equal(alone, draw(5))
    )


def test_take_rows_keeps_what_is_no_tensor() -> None:
    note = object()
    taken = take_rows(
        {"text": torch.arange(6).view(3, 2), "one": torch.ones(1, 2), "note": note}, [2, 0, 2]
    )
    assert taken["text"].tolist() == [[4, 5], [0, 1], [4, 5]]
    assert taken["one"].shape == (3, 2) and taken["note"] is note


def test_rows_of_tensors_in_lists() -> None:
    """A list is walked as a mapping is: each image has its own rows, and what does not fit is
    refused.
    """
    values = {
        "parts": [torch.arange(3), (torch.ones(1, 2), "text")],
        "deep": {"list": [torch.arange(3) * 10]},
    }
    taken = take_rows(values, [2, 0])
    assert taken["parts"][0].tolist() == [2, 0]
    assert taken["parts"][1][0].shape == (2, 2) and taken["parts"][1][1] == "text"
    assert taken["deep"]["list"][0].tolist() == [20, 0]
    require_rows("conditioning", values, 3)
    with pytest.raises(
        ValueError, match=r"^conditioning 'parts' 0 must have a row for each of 4 images"
    ):
        require_rows("conditioning", values, 4)


def test_rows_of_encoded_texts_in_lists() -> None:
    conditions = Conditions(
        3,
        prompts=("a", "b"),
        encode=lambda texts: {"states": [torch.arange(len(texts)), torch.arange(len(texts)) * 10]},
    )
    conditioning, unconditional = conditions.encoded()
    assert [part.tolist() for part in conditioning["states"]] == [[0, 1, 0], [0, 10, 0]]
    assert unconditional is not None
    assert [part.tolist() for part in unconditional["states"]] == [[2, 2, 2], [20, 20, 20]]


# Guards


class Interrupted(BaseException):
    pass


def seed_all(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


@pytest.mark.parametrize("error", [None, RuntimeError, Interrupted])
def test_all_generators_are_restored(error: Any) -> None:
    seed_all(1)
    expected = random.random(), np.random.rand(), torch.rand(3).tolist()
    seed_all(1)
    try:
        with randomness_restored():
            seed_all(9)
            if error is not None:
                raise error
    except (RuntimeError, Interrupted):
        pass
    assert (random.random(), np.random.rand(), torch.rand(3).tolist()) == expected


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_the_generator_of_the_gpu_is_restored() -> None:
    torch.cuda.manual_seed(0)
    expected = torch.rand(3, device="cuda")
    torch.cuda.manual_seed(0)
    with randomness_restored("cuda"):
        torch.rand(100, device="cuda")
    assert torch.equal(torch.rand(3, device="cuda"), expected)


def test_flags_are_restored_one_by_one_and_eval_is_not_called() -> None:
    class Merging(nn.Linear):
        """As LoRA layers do: eval() changes the weights."""

        def train(self, mode: bool = True) -> Any:
            if not mode:
                self.weight.data.zero_()
            return super().train(mode)

    frozen = nn.Sequential(nn.Dropout(), nn.BatchNorm2d(2)).eval()
    frozen[1].train()
    net = nn.Sequential(nn.Dropout(), frozen, Merging(2, 2))
    before = [module.training for module in net.modules()]
    with pytest.raises(RuntimeError), evaluating(net, None, frozen):
        assert not any(module.training for module in net.modules())
        frozen.train()
        raise RuntimeError
    assert (
        [module.training for module in net.modules()]
        == before
        == [True, True, False, False, True, True]
    )
    assert float(net[2].weight.detach().abs().sum()) > 0


def test_drawing_leaves_no_trace_when_it_fails() -> None:
    net = nn.Sequential(nn.Dropout(), nn.Identity().eval())

    def fail(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        assert (
            not net[0].training
            and not torch.is_grad_enabled()
            and not torch.is_inference_mode_enabled()
        )
        torch.rand(1)
        raise RuntimeError("full")

    state = torch.get_rng_state()
    with pytest.raises(RuntimeError, match="full"):
        Drawing(2).pixels(
            fail, Sampler(NoiseSchedule.flow(), "euler", 2), (1, 4, 4), [[0, 1]], modules=[net]
        )
    assert torch.equal(torch.get_rng_state(), state)
    assert net[0].training and not net[1].training and torch.is_grad_enabled()


def test_errors_name_the_line_of_the_users_code() -> None:
    with pytest.raises(RuntimeError) as raised:
        nn.Linear(2, 3)(torch.zeros(1, 5))
    words = errors_of_all_ranks(raised.value)
    assert (
        words is not None
        and words.startswith("RuntimeError: mat1")
        and "(test_callbacks_parts.py:" in words
    )


# Pictures


def test_pixels_of_images() -> None:
    x = torch.tensor([-2.0, -1.0, -0.5, 0.0, 0.5, 0.999, 1.0, torch.inf]).view(1, 1, 2, 4)
    assert to_pixels(x).flatten().tolist() == [0, 0, 64, 128, 191, 255, 255, 255]
    assert to_pixels(x.bfloat16()).dtype == torch.uint8
    every = (torch.arange(256) / 127.5 - 1).view(1, 1, 16, 16)
    # an 8-bit image comes back as it was
    assert to_pixels(every).flatten().tolist() == list(range(256))


def test_pixels_of_latents_are_stretched_by_image_and_channel() -> None:
    x = torch.randn(2, 4, 5, 5) * torch.tensor([1.0, 20.0, 0.1, 3.0]).view(1, 4, 1, 1) + 7
    pixels = to_pixels(x)
    assert pixels.shape == (2, 3, 5, 5)
    assert pixels.amin((2, 3)).unique().tolist() == [0] and pixels.amax(
        (2, 3)
    ).unique().tolist() == [255]
    order = x[:, :3].flatten(2).argsort(-1)
    assert pixels.flatten(2).gather(2, order).int().diff(dim=-1).min() >= 0  # monotone
    assert torch.equal(to_pixels(x[:1]), pixels[:1])
    # a constant channel does not divide by 0
    assert to_pixels(torch.full((1, 4, 2, 2), 3.0)).unique().tolist() == [0]
    assert to_pixels(torch.randn(1, 2, 3, 3)).shape == (1, 1, 3, 3)


def test_nan_is_refused_and_other_shapes_too() -> None:
    x = torch.zeros(3, 1, 2, 2)
    x[1, 0, 1, 1] = torch.nan
    with pytest.raises(ValueError, match=r"samples \[1\] of 3 hold NaN"):
        to_pixels(x)
    with pytest.raises(ValueError, match=r"got \(3, 16, 8, 8\)"):
        to_pixels(torch.zeros(2, 3, 16, 8, 8))


def test_the_grid_holds_every_image_in_its_place(tmp_path: Path) -> None:
    images = torch.randint(0, 256, (5, 3, 4, 6), dtype=torch.uint8)
    grid = image_grid(images)
    assert grid.shape == (2 * (4 + 2) + 2, 3 * (6 + 2) + 2, 3)
    left = torch.full_like(grid, 128)
    for k, image in enumerate(images):
        top, start = 2 + k // 3 * 6, 2 + k % 3 * 8
        assert torch.equal(grid[top : top + 4, start : start + 6], image.permute(1, 2, 0))
        left[top : top + 4, start : start + 6] = grid[top : top + 4, start : start + 6]
    assert torch.equal(grid, left)  # all else is grey
    (tmp_path / "a.png").write_bytes(png_bytes(grid))
    np.testing.assert_array_equal(np.asarray(Image.open(tmp_path / "a.png")), grid.numpy())
    (tmp_path / "b.png").write_bytes(png_bytes(image_grid(images[:1, :1])))
    assert Image.open(tmp_path / "b.png").mode == "L"


def test_loggers_that_have_both_get_one_picture() -> None:
    class Both:
        calls: list[str] = []  # noqa: RUF012

        def log_image(self, **given: Any) -> None:
            self.calls.append("own")

        @property
        def experiment(self) -> Any:
            raise AssertionError("not asked for")

    assert log_image(
        Both(), "previews", torch.zeros(2, 2, 3, dtype=torch.uint8), 1
    ) and Both.calls == ["own"]


# When a preview is due


def test_epochs_are_counted_from_0_and_previews_from_1() -> None:
    assert [epoch for epoch in range(7) if Triggers(every_n_epochs=3).at_epoch(epoch)] == [2, 5]
    assert not any(Triggers(every_n_train_steps=3).at_epoch(epoch) for epoch in range(7))


@pytest.mark.parametrize(
    ("facts", "last"),
    [
        ({"max_steps": 9, "global_step": 9}, True),
        ({"max_steps": 9, "global_step": 8}, False),
        ({"max_epochs": 3, "current_epoch": 2}, True),
        ({"max_epochs": 3, "current_epoch": 1}, False),
        ({"should_stop": True}, True),
        ({}, False),
    ],
)
def test_the_last_epoch_is_known(facts: dict[str, Any], last: bool) -> None:
    usual = {
        "should_stop": False,
        "max_steps": -1,
        "max_epochs": -1,
        "global_step": 5,
        "current_epoch": 5,
    }
    assert is_last_epoch(cast(Any, SimpleNamespace(**(usual | facts)))) is last


def test_a_process_is_ended_only_where_that_is_asked_for() -> None:
    assert forward_mode_of(FSDPStrategy()).exit_after is None
    assert ValidationSampling().exit_after_error is None
    with pytest.raises(
        ValueError, match="exit_after_error must be seconds, at least 0, or None, got -1"
    ):
        ValidationSampling(exit_after_error=-1)


# Errors that all ranks raise


def test_what_fails_is_raised() -> None:
    with pytest.raises(ZeroDivisionError):
        collectives.call_on_all_ranks(lambda: 1 // 0)
    with pytest.raises(collectives.AgreedError, match="ValueError: no such colour"):
        collectives.raise_on_all_ranks(ValueError("no such colour"))


@pytest.mark.parametrize(("is_os_error", "kind"), [(True, OSError), (False, ValueError)])
def test_the_other_ranks_raise_the_kind_of_rank_0(
    is_os_error: bool, kind: type[Exception], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(collectives, "_from_rank_zero", lambda *_: (is_os_error, "no space left"))
    trainer = cast(Any, SimpleNamespace(is_global_zero=False))
    with pytest.raises(kind, match="no space left"):
        collectives.on_rank_zero(trainer, lambda: None)


def test_a_rank_without_an_error_raises_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(collectives, "errors_of_all_ranks", lambda *_: "rank 1: OSError: gone")
    with pytest.raises(collectives.AgreedError, match="rank 1: OSError: gone"):
        collectives.call_on_all_ranks(lambda: 3)


# Groups of arguments


def test_groups_are_the_same_as_keywords() -> None:
    when = {"every_n_train_steps": 3, "extra_steps": (0, 1), "at_end": True}
    what = {"classes": (1, 2), "null_class": 9, "guidance_scale": 2.0}
    by_name = ValidationSampling("euler", steps=2, **cast(Any, when | what))
    by_group = ValidationSampling(
        "euler",
        steps=2,
        triggers=Triggers(**cast(Any, when)),
        conditions=PreviewConditions(**cast(Any, what)),
    )
    assert by_name.triggers == by_group.triggers and by_name.state_key == by_group.state_key
    assert by_name.recipe.conditions == by_group.recipe.conditions
    assert by_name.recipe.guidance == by_group.recipe.guidance


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"triggers": Triggers(), "at_end": True},
            "^triggers= and at_end= are given; pass at_end in triggers$",
        ),
        (
            {"conditions": PreviewConditions(), "prompts": ["a"], "guidance_scale": 2.0},
            "^conditions= and prompts=, guidance_scale= are given; pass prompts, guidance_scale in conditions$",
        ),
        ({"triggers": 5}, r"^triggers must be Triggers\(\.\.\.\), got int$"),
    ],
)
def test_a_group_and_its_keywords_are_refused_together(arguments: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ValidationSampling("euler", **arguments)


def test_a_sharded_model_wants_equal_work_on_all_ranks() -> None:
    schedule = NoiseSchedule.flow()
    adaptive = Sampler(schedule, "DPM adaptive")
    require_equal_work(adaptive, ForwardMode())
    require_equal_work(Sampler(schedule, "score_sde_ve", 3), ForwardMode(sharded=True))
    with pytest.raises(
        ValueError, match=r"^dpm_adaptive chooses its number of steps on every rank"
    ):
        require_equal_work(adaptive, ForwardMode(sharded=True, wrapped=True))
