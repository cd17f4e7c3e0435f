"""Kinds of loss and masks: closed forms, torch's and sd-scripts' own formulas, the direction of the
threshold, and shapes.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from alphabar.noising import (
    L1,
    L2,
    LOSSES,
    Huber,
    Loss,
    NoiseSchedule,
    Noising,
    PseudoHuber,
    SmoothL1,
)
from alphabar.noising.losses import THRESHOLDS, ThresholdLoss, resolve_loss
from oracles import SCHEDULES

ZTSNR, FLOW = SCHEDULES["ztsnr"], SCHEDULES["flow"]
THRESHOLDED: list[type[ThresholdLoss]] = [
    kind for kind in LOSSES.values() if issubclass(kind, ThresholdLoss)
]


def batch_of(count: int, seed: int = 0) -> Tensor:
    return torch.randn(
        count, 3, 4, 5, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
    )


# element by element

ERRORS = torch.tensor(
    [-30.0, -1.0, -0.1, -1e-3, 0.0, 1e-3, 0.05, 0.1, 0.7, 30.0], dtype=torch.float64
)
FORMULAS: dict[str, Callable[[Tensor, float], Tensor]] = {
    "l2": lambda d, c: torch.nn.functional.mse_loss(d, torch.zeros_like(d), reduction="none"),
    "l1": lambda d, c: torch.nn.functional.l1_loss(d, torch.zeros_like(d), reduction="none"),
    "huber": lambda d, c: torch.nn.functional.huber_loss(
        d, torch.zeros_like(d), reduction="none", delta=c
    ),
    "pseudo_huber": lambda d, c: (
        2 * c * ((d**2 + c**2).sqrt() - c)
    ),  # loss_type "huber" of sd-scripts
    "smooth_l1": lambda d, c: 2 * ((d**2 + c**2).sqrt() - c),  # loss_type "smooth_l1" of sd-scripts
    "contrastive": lambda d, c: d**2,  # the part of a sample's own target
}
ALONE = [name for name, kind in LOSSES.items() if not kind.batch_wide]
SMALL_AND_LARGE: dict[
    str, tuple[Callable[[float, float], float], Callable[[float, float], float]]
] = {
    "huber": (lambda d, c: d**2 / 2, lambda d, c: c * d),
    "pseudo_huber": (lambda d, c: d**2, lambda d, c: 2 * c * d),
    "smooth_l1": (lambda d, c: d**2 / c, lambda d, c: 2 * d),
}


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("c", [0.1, 0.7, 1.0])
def test_formulas(name: str, c: float) -> None:
    loss = LOSSES[name]()(ERRORS, torch.tensor(c, dtype=torch.float64))
    assert torch.allclose(loss, FORMULAS[name](ERRORS, c), rtol=1e-12, atol=1e-15)  # theirs cancels


@pytest.mark.parametrize("name", SMALL_AND_LARGE)
def test_quadratic_below_and_linear_above(name: str) -> None:
    small, large = SMALL_AND_LARGE[name]
    for c in (0.1, 0.5):
        got = LOSSES[name]()(
            torch.tensor([1e-4, 1e5], dtype=torch.float64), torch.tensor(c, dtype=torch.float64)
        )
        assert got.tolist() == pytest.approx([small(1e-4, c), large(1e5, c)], rel=1e-4)


@pytest.mark.parametrize("name", LOSSES)
def test_small_errors_survive_float32_and_zero_has_a_gradient(name: str) -> None:
    d = torch.tensor([0.0, 1e-6], requires_grad=True)
    loss = LOSSES[name]()(d, torch.tensor(1.0))
    exact = FORMULAS["huber" if name == "huber" else "l2" if name != "l1" else "l1"](
        torch.tensor([1e-6]).double(), 1.0
    )
    # √(d² + c²) - c would be 0
    assert float(loss[1].detach()) == pytest.approx(float(exact), rel=1e-3)
    loss.sum().backward()
    assert d.grad is not None
    assert float(d.grad[0]) == 0.0
    assert float(d.grad[1]) > 0


# the threshold

HUBER_C: dict[
    str, Callable[[float, float, float, float], float]
] = {  # sd-scripts' get_huber_threshold_if_needed
    "constant": lambda t, alpha_bar, c, scale: c * scale,
    "exponential": lambda t, alpha_bar, c, scale: math.exp(-(-math.log(c) / 1000) * t) * scale,
    "snr": lambda t, alpha_bar, c, scale: (
        (1 - c) / (1 + ((1 - alpha_bar) / alpha_bar) ** 0.5) ** 2 + c
    ),
}


def test_every_schedule_has_a_formula() -> None:
    assert set(HUBER_C) == set(THRESHOLDS)


@pytest.mark.parametrize("kind", THRESHOLDED)
@pytest.mark.parametrize("schedule", THRESHOLDS)
@pytest.mark.parametrize("c", [0.01, 0.1, 1.0])
def test_thresholds_of_sd_scripts(kind: type[ThresholdLoss], schedule: str, c: float) -> None:
    base, t = NoiseSchedule.scaled_linear(), torch.tensor([0, 1, 500, 998, 999])
    scale = 1.0 if schedule == "snr" else 1.5
    noised = Noising(base, loss=kind(c=c, schedule=schedule, scale=scale))(
        batch_of(5), step=0, timesteps=t
    )
    alphas_cumprod = base.alphas_cumprod[t].tolist()
    expected = [
        HUBER_C[schedule](i, a, c, scale) for i, a in zip(t.tolist(), alphas_cumprod, strict=True)
    ]
    assert noised.threshold is not None
    assert noised.threshold.shape == (5, 1, 1, 1)
    assert noised.threshold.flatten().tolist() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("kind", THRESHOLDED)
@pytest.mark.parametrize(
    "base", [ZTSNR, FLOW, NoiseSchedule.karras(), NoiseSchedule.variance_exploding()], ids=str
)
@pytest.mark.parametrize("schedule", ["snr", "exponential"])
def test_the_threshold_falls_from_clean_to_noise(
    kind: type[ThresholdLoss], base: NoiseSchedule, schedule: str
) -> None:
    """Not the other way: 1 (quadratic) where the sample is clean, c (linear) at pure noise, zero
    SNR included.
    """
    t = torch.linspace(base.curve.t_min, base.curve.t_max, 50, dtype=torch.float64)
    noised = Noising(base.with_prediction("v_prediction"), loss=kind(c=0.1, schedule=schedule))(
        torch.zeros(50, 2, dtype=torch.float64), step=0, timesteps=t
    )
    threshold = noised.threshold
    assert threshold is not None
    threshold = threshold.flatten()
    assert bool((threshold.diff() < 0).all())
    assert float(threshold[0]) > 0.9
    assert float(threshold[-1]) == pytest.approx(0.1, abs=1e-3)
    if base in (ZTSNR, FLOW) and schedule == "snr":
        assert float(threshold[-1]) == 0.1  # σ / α is infinite


def test_the_flow_s_snr_threshold_is_of_noise_over_signal() -> None:
    """σ / (1 - σ), not its inverse: with c = 0.1, 0.1 at σ = 1 and 0.91 at σ = 0.05."""
    noised = Noising(NoiseSchedule.flow(), loss=PseudoHuber(c=0.1))(
        torch.zeros(2, 2), step=0, timesteps=torch.tensor([1.0, 0.05])
    )
    assert noised.threshold is not None
    assert noised.threshold.flatten().tolist() == pytest.approx(
        [0.1, 0.9 * 0.95**2 + 0.1], rel=1e-5
    )


# through Noised


@pytest.mark.parametrize(
    "loss", [*ALONE, Huber(c=0.3, schedule="exponential", scale=2.0), SmoothL1(c=0.2)], ids=repr
)
@pytest.mark.parametrize("schedule", [ZTSNR, FLOW], ids=["ztsnr", "flow"])
def test_the_loss_of_a_batch(loss: str | Loss, schedule: NoiseSchedule) -> None:
    noising = Noising(schedule, weighting="v_like", loss=loss)
    seen: list[Tensor] = []
    noising.register_loss_hook(lambda noised, errors: seen.append(errors))
    noised, out = noising(batch_of(6), step=0), batch_of(6, seed=1)
    kind = resolve_loss(loss)
    by_hand = []
    for k in range(6):
        t = noised.t[k : k + 1].double()
        threshold = 0.0
        if isinstance(kind, ThresholdLoss):
            s = float(schedule.sigma(t) / schedule.alpha(t))
            fraction = float(t) / 1000 if schedule is ZTSNR else float(schedule.sigma(t))
            threshold = {
                "constant": kind.c * kind.scale,
                "exponential": kind.c**fraction * kind.scale,
                "snr": (1 - kind.c) / (1 + s) ** 2 + kind.c,
            }[kind.schedule]
        by_hand.append(float(FORMULAS[kind.name](out[k] - noised.target[k], threshold).mean()))
    assert seen == [] and noised.losses(out).tolist() == pytest.approx(
        [w * e for w, e in zip(noised.weight.tolist(), by_hand, strict=True)], rel=1e-6
    )
    assert seen[0].tolist() == pytest.approx(by_hand, rel=1e-6)  # before the weight
    assert float(noised.loss(out)) == pytest.approx(float(noised.losses(out).mean()), rel=1e-12)


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dtype_and_gradient(loss: str, dtype: torch.dtype) -> None:
    noised = Noising(ZTSNR, loss=loss)(
        batch_of(2).to(dtype), step=0, timesteps=torch.tensor([0, 999])
    )
    out = batch_of(2, seed=1).to(dtype).requires_grad_()
    losses = noised.losses(out)
    assert losses.dtype == torch.float32
    losses.mean().backward()
    assert out.grad is not None
    assert bool(out.grad.isfinite().all())
    assert float(out.grad.abs().max()) > 0


# masks


def masked(shape: tuple[int, ...]) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(7), dtype=torch.float64)


@pytest.mark.parametrize("loss", ["l2", "l1", "pseudo_huber"])
@pytest.mark.parametrize(
    "shape",
    [
        (6, 1, 4, 5),
        (6, 3, 4, 5),
        (1, 1, 4, 5),
        (6, 1, 1, 1),
        (6, 3, 1, 1),
        (1, 1, 1, 5),
        (1, 1, 1, 1),
    ],
)
def test_masks_that_broadcast(loss: str, shape: tuple[int, ...]) -> None:
    noised, out = (
        Noising(ZTSNR, weighting="v_like", loss=loss)(batch_of(6), step=0),
        batch_of(6, seed=1),
    )
    mask = masked(shape)
    full = mask.expand(6, 3, 4, 5)
    errors = noised.criterion(out - noised.target, noised.threshold)
    over_all = noised.weight * (full * errors).sum((1, 2, 3)) / 60
    over_area = noised.weight * (full * errors).sum((1, 2, 3)) / full.sum((1, 2, 3))
    assert torch.allclose(noised.losses(out, mask), over_all, rtol=1e-12, atol=0)
    assert torch.allclose(noised.losses(out, mask, over="mask"), over_area, rtol=1e-12, atol=0)
    assert float(noised.loss(out, mask, over="mask")) == pytest.approx(
        float(over_area.mean()), rel=1e-12
    )


def test_a_full_mask_is_no_mask_and_bool_is_0_or_1() -> None:
    noised, out = Noising(FLOW)(batch_of(3), step=0), batch_of(3, seed=1)
    full, some = torch.ones(3, 1, 4, 5, dtype=torch.bool), masked((3, 1, 4, 5)) > 0.5
    for over in ("all", "mask"):
        assert torch.allclose(
            noised.losses(out, full, over), noised.losses(out), rtol=1e-12, atol=0
        )
        assert torch.equal(noised.losses(out, some, over), noised.losses(out, some.float(), over))


@pytest.mark.parametrize("over", ["all", "mask"])
@pytest.mark.parametrize("loss", LOSSES)
def test_an_empty_mask_is_0_and_not_nan(over: Any, loss: str) -> None:
    noised, out = (
        Noising(ZTSNR, loss=loss)(batch_of(2), step=0),
        batch_of(2, seed=1).requires_grad_(),
    )
    mask = torch.zeros(2, 1, 4, 5)
    mask[1, :, 0] = 1.0
    losses = noised.losses(out, mask, over)
    assert float(losses[0].detach()) == 0.0
    assert float(losses[1].detach()) > 0
    losses.sum().backward()
    assert out.grad is not None
    assert float(out.grad[0].abs().max()) == 0.0
    assert bool((out.grad[1, :, 0] != 0).all())
    assert float(out.grad[1, :, 1:].abs().max()) == 0.0


def test_listeners_hear_the_masked_error() -> None:
    noising = Noising(FLOW, weighting="v_like")
    seen: list[Tensor] = []
    noising.register_loss_hook(lambda noised, errors: seen.append(errors))
    noised = noising(batch_of(1), step=0)
    mask = torch.zeros(1, 1, 4, 5)
    mask[..., 0] = 1
    for over in ("all", "mask"):
        noised.losses(noised.target + 2, mask, over)
    assert [errors.tolist() for errors in seen] == [pytest.approx([4 / 5]), pytest.approx([4.0])]


@pytest.mark.parametrize(
    "shape",
    [
        (6, 4, 5),
        (4, 5),
        (),
        (6, 2, 4, 5),
        (5, 1, 4, 5),
        (6, 1, 5, 4),
        (6, 1, 8, 10),
        (6, 1, 4, 5, 1),
    ],
)
def test_masks_of_other_shapes(shape: tuple[int, ...]) -> None:
    noised = Noising(ZTSNR)(batch_of(6), step=0)
    with pytest.raises(
        ValueError,
        match=r"^the mask must broadcast to the target, \(6, 3, 4, 5\), with as many axes, got ",
    ):
        noised.losses(noised.target, torch.ones(shape))


@pytest.mark.parametrize("value", [-0.1, 1.1, 255.0, math.nan, math.inf])
def test_masks_outside_0_and_1(value: float) -> None:
    noised = Noising(ZTSNR)(batch_of(2), step=0)
    mask = torch.ones(2, 1, 4, 5)
    mask[1, 0, 2, 2] = value
    with pytest.raises(ValueError, match=r"^the mask must lie in \[0, 1\], got values from "):
        noised.losses(noised.target, mask)


def test_integer_masks_and_unknown_means() -> None:
    noised = Noising(ZTSNR)(batch_of(2), step=0)
    with pytest.raises(
        ValueError,
        match=r"^the mask must be bool, or floating point in \[0, 1\], got torch.uint8; divide",
    ):
        noised.losses(noised.target, torch.ones(2, 1, 4, 5, dtype=torch.uint8))
    with pytest.raises(ValueError, match=r"^over must be 'all' or 'mask', got 'area'$"):
        noised.losses(noised.target, torch.ones(2, 1, 4, 5), over="area")


# names and bad input


@pytest.mark.parametrize("name", LOSSES)
def test_names_and_objects_resolve(name: str) -> None:
    loss = resolve_loss(name)
    assert loss.name == name
    assert resolve_loss(loss) is loss
    assert Noising(ZTSNR, loss=name).loss == loss


def test_the_default_is_the_squared_error() -> None:
    assert Noising(ZTSNR).loss == L2()
    assert Noising(ZTSNR)(batch_of(2), step=0).threshold is None
    assert L1() != L2()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: resolve_loss("hubber"), "unknown loss 'hubber'; did you mean 'huber'?"),
        (
            lambda: Noising(ZTSNR, loss="mse"),
            "unknown loss 'mse'; known: " + ", ".join(sorted(LOSSES)),
        ),
        (lambda: Huber(schedule="sn"), "unknown threshold schedule 'sn'; did you mean 'snr'?"),
        (
            lambda: PseudoHuber(c=0.0),
            "c and scale of loss 'pseudo_huber' must be positive and finite, got 0.0 and 1.0",
        ),
        (
            lambda: Huber(scale=math.inf),
            "c and scale of loss 'huber' must be positive and finite, got 1.0 and inf",
        ),
        (
            lambda: SmoothL1(c=2.0),
            "c of loss 'smooth_l1' must be at most 1 under schedule 'snr', which runs from 1 to c, "
            "got 2.0",
        ),
        (
            lambda: PseudoHuber(scale=2.0),
            "scale of loss 'pseudo_huber' is for the schedules 'constant' and 'exponential', got "
            "2.0 with 'snr'; "
            "sd-scripts ignores it there: leave it out",
        ),
        (
            lambda: Huber()(torch.ones(1), None),
            "this loss needs a threshold; give what its threshold(sigma_ve, fraction) returns",
        ),
    ],
)
def test_bad_losses(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError) as caught:
        make()
    assert str(caught.value) == message
