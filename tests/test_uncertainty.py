"""Learned uncertainty: the optimum in closed form, one answer for every target, and parameters that
travel.
"""

from __future__ import annotations

import copy
import io
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning import Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader

from alphabar.noising import LearnedUncertainty, NoiseSchedule, Noising, PerRange, Uniform
from alphabar.noising.weighting.learned import LogVariance
from alphabar.training import DiffusionModule
from oracles import SCHEDULES, allowed

ZTSNR, FLOW = SCHEDULES["ztsnr"], SCHEDULES["flow"]
LEVELS = torch.tensor([0, 250, 500, 900, 999])


def batch_of(count: int) -> Tensor:
    return torch.randn(count, 3, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def module_of(noising: Noising) -> LogVariance:
    assert isinstance(noising.log_variance, LogVariance)
    return noising.log_variance


def learn(
    noising: Noising, x0: Tensor, prediction_error: Tensor, t: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Minimise the mean loss over u; return u, the weighted errors and the losses there."""
    optimizer = torch.optim.LBFGS(
        noising.parameters(),
        max_iter=500,
        tolerance_grad=1e-13,
        tolerance_change=0,
        line_search_fn="strong_wolfe",
    )

    def noised() -> Any:
        # the same noise at every evaluation
        return noising(x0, step=0, timesteps=t, index=range(len(x0)))

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = noised().loss(noised().target + prediction_error)
        loss.backward()
        return loss

    optimizer.step(closure)
    end = noised()
    errors = end.weight * (prediction_error**2).flatten(1).mean(1)
    return end.log_variance.detach(), errors, end.losses(end.target + prediction_error).detach()


@pytest.mark.parametrize("of", ["edm", "uniform", "v_like"])
@pytest.mark.parametrize("schedule", allowed(ZTSNR), ids=lambda s: s.prediction.name)
def test_the_optimum_is_the_expected_weighted_error(schedule: NoiseSchedule, of: str) -> None:
    """e^u = E[w error] at every noise level, where SNR is 0 too; the loss there is 1 + log E[w
    error].
    """
    noising = Noising(schedule, LearnedUncertainty(weighting=of)).double()
    each = 4  # samples at each level, of different error
    t = LEVELS.repeat_interleave(each)
    x0 = batch_of(len(t))
    error = batch_of(len(t)) * torch.linspace(0.2, 3.0, len(t), dtype=torch.float64)[:, None, None]
    u, errors, losses = learn(noising, x0, error, t)
    expected = errors.view(-1, each).mean(1)
    assert torch.allclose(
        u.view(-1, each).exp(), expected[:, None].expand(-1, each), rtol=1e-5, atol=0
    )
    assert torch.allclose(losses.view(-1, each).mean(1), 1 + expected.log(), rtol=0, atol=1e-8)


def test_the_static_weight_cancels_at_the_optimum() -> None:
    """So the gradient of the network is the same whatever scheme the uncertainty is made of."""
    gradients = []
    for of in ("edm", "uniform"):
        noising = Noising(ZTSNR, LearnedUncertainty(weighting=of)).double()
        x0, error = batch_of(len(LEVELS)), 0.1 * batch_of(len(LEVELS))
        learn(noising, x0, error, LEVELS)
        noised = noising(x0, step=0, timesteps=LEVELS, index=range(len(x0)))
        out = (noised.target + error).requires_grad_()
        noised.loss(out).backward()
        gradients.append(out.grad)
    assert torch.allclose(*gradients, rtol=1e-5, atol=0)
    # of log ||error||²
    relative = 2 * error / (error**2).flatten(1).sum(1)[:, None, None] / len(LEVELS)
    assert torch.allclose(gradients[0], relative, rtol=1e-5, atol=0)


def test_it_begins_as_the_scheme_it_is_made_of() -> None:
    x0, out = batch_of(8), 2 * batch_of(8)
    learned, plain = (
        Noising(FLOW, "learned_uncertainty")(x0, step=0),
        Noising(FLOW, "edm")(x0, step=0),
    )
    assert torch.equal(learned.losses(out), plain.losses(out))


def test_gradient_of_u_is_one_minus_the_relative_error() -> None:
    noising = Noising(FLOW, LearnedUncertainty(channels=4)).double()
    noised = noising(batch_of(1), step=0)
    loss = noised.loss(noised.target + 0.5)
    loss.backward()
    assert float(module_of(noising).bias.grad) == pytest.approx(
        1 - float(noised.weight) * 0.25, rel=1e-12
    )


def test_levels_are_told_apart_and_the_ends_are_finite() -> None:
    module = LogVariance().double()
    nn.init.normal_(module.weight, generator=torch.Generator().manual_seed(1))
    t = torch.arange(1000, dtype=torch.float64)
    u = module(ZTSNR.alpha(t), ZTSNR.sigma(t))
    assert bool(u.isfinite().all())
    assert len({round(v, 6) for v in u.tolist()}) == 1000
    ends = module(*torch.tensor([[1.0, 0.0], [0.0, 1.0]], dtype=torch.float64)).detach()
    assert bool(ends.isfinite().all())
    assert float(ends[0]) != float(ends[1])


def test_features_have_unit_variance_over_channels() -> None:
    """2312.02696, eq. 75: √2 cos(2π(f c + φ)) with f ~ N(0, 1), φ ~ U(0, 1)."""
    module = LogVariance(channels=20_000)
    assert float(module.frequencies.std()) == pytest.approx(2 * math.pi, rel=0.03)
    assert 0 <= float(module.phases.min()) < 0.01
    assert 2 * math.pi - 0.01 < float(module.phases.max()) < 2 * math.pi
    with torch.no_grad():
        module.weight.fill_(1 / 20_000)
    one = torch.ones(1)
    mean = float(module(one, one).detach())  # c_noise = 0: the mean of √2 cos(φ)
    assert mean == pytest.approx(float((math.sqrt(2) * module.phases.cos()).mean()), abs=1e-5)


def test_it_is_computed_in_float32_under_autocast() -> None:
    module = LogVariance()
    nn.init.normal_(module.weight, generator=torch.Generator().manual_seed(1))
    alpha, sigma = FLOW.alpha(torch.linspace(0.1, 1, 9)), FLOW.sigma(torch.linspace(0.1, 1, 9))
    plain = module(alpha, sigma)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(module(alpha, sigma), plain)
    assert plain.dtype == torch.float32
    assert module.bfloat16()(alpha, sigma).dtype == torch.float32


@pytest.mark.parametrize("over", ["all", "mask"])
def test_what_is_masked_teaches_nothing(over: Any) -> None:
    """The optimum of u under a mask is the error of the masked area, whichever mean is taken; an
    empty mask moves nothing.
    """
    noising = Noising(FLOW, LearnedUncertainty(weighting=Uniform())).double()
    noised = noising(batch_of(2), step=0, timesteps=torch.tensor([0.5, 0.5]))
    mask = torch.zeros(2, 1, 4)
    mask[0, :, 0] = 1
    error = torch.full_like(noised.target, 7.0)
    error[..., 0] = 2.0
    with torch.no_grad():
        module_of(noising).bias.fill_(math.log(4.0))  # the squared error of the area
    noised = noising(batch_of(2), step=0, timesteps=torch.tensor([0.5, 0.5]))
    losses = noised.losses(noised.target + error, mask, over)
    share = 0.25 if over == "all" else 1.0
    assert losses.tolist() == pytest.approx([share * (1 + math.log(4.0)), 0.0], rel=1e-12)
    losses.mean().backward()
    for parameter in noising.parameters():  # all take part, as DistributedDataParallel asks for
        assert parameter.grad is not None
        assert float(parameter.grad.abs().max()) < 1e-12


def test_what_weighs_nothing_teaches_nothing() -> None:
    """Where the weight is 0 the loss would else fall for ever with u: at zero SNR under SNR
    weights, and in a range of 0.
    """
    with pytest.warns(
        UserWarning, match=r"^weighting 'learned_uncertainty' is 0 at t = 999, where SNR is 0"
    ):
        noising = Noising(ZTSNR, LearnedUncertainty(weighting="snr")).double()
    ranges = Noising(ZTSNR, LearnedUncertainty(weighting=PerRange(((0.0, 0.5, 0.0),)))).double()
    for each, counted in ((noising, [1.0, 1.0, 0.0]), (ranges, [0.0, 1.0, 1.0])):
        module = module_of(each)
        with torch.no_grad():
            module.bias.fill_(-3.0)
        noised = each(batch_of(3), step=0, timesteps=torch.tensor([10, 700, 999]))
        losses = noised.losses(noised.target)
        assert losses.tolist() == [-3.0 * c for c in counted]
        losses.sum().backward()
        assert module.bias.grad is not None
        assert float(module.bias.grad) == sum(counted)


def test_it_is_trained_and_comes_back_with_the_checkpoint(tmp_path: Path) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.ones(()))

        def forward(self, x: Tensor, t: Tensor) -> Tensor:
            return self.scale * x

    def module() -> DiffusionModule:
        return DiffusionModule(Net(), Noising(ZTSNR, "learned_uncertainty"), learning_rate=1e-2)

    trained = module()
    trainer = Trainer(
        max_steps=5,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=tmp_path,
    )
    trainer.fit(trained, DataLoader(batch_of(8).float(), batch_size=4))  # type: ignore[arg-type]
    learned = module_of(trained.noising)
    assert float(learned.weight.detach().abs().max()) > 1e-3
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    fresh = module()
    fresh.load_state_dict(torch.load(tmp_path / "a.ckpt", weights_only=False)["state_dict"])
    for name, value in learned.state_dict().items():
        assert torch.equal(module_of(fresh.noising).state_dict()[name], value)


def test_parameters_take_part_in_every_loss() -> None:
    noising = Noising(ZTSNR, "learned_uncertainty")
    noised = noising(batch_of(2), step=0)
    noised.loss(noised.target + 1, mask=torch.zeros(2, 1, 1)).backward()
    assert [p.grad is not None for p in noising.parameters()] == [True, True]
    assert list(Noising(ZTSNR).parameters()) == []
    assert Noising(ZTSNR)(batch_of(2), step=0).log_variance is None


def test_listeners_hear_the_plain_error() -> None:
    noising = Noising(FLOW, "learned_uncertainty")
    seen: list[Tensor] = []
    noising.register_loss_hook(lambda noised, errors: seen.append(errors))
    noised = noising(batch_of(3), step=0)
    noised.loss(noised.target + 2)
    assert torch.allclose(seen[0], torch.full((3,), 4.0, dtype=torch.float64))
    assert not seen[0].requires_grad


def test_it_is_saved_loaded_copied_and_cast() -> None:
    source = Noising(ZTSNR, LearnedUncertainty(seed=1))
    nn.init.normal_(module_of(source).weight, generator=torch.Generator().manual_seed(2))
    file = io.BytesIO()
    torch.save(source.state_dict(), file)
    file.seek(0)
    other = Noising(ZTSNR, LearnedUncertainty(seed=2))
    x0, out = batch_of(5), 2 * batch_of(5)
    expected = source(x0, step=0).losses(out)
    assert not torch.equal(other(x0, step=0).losses(out), expected)
    other.load_state_dict(torch.load(file))
    assert torch.equal(other(x0, step=0).losses(out), expected)  # the features came along too
    assert torch.equal(copy.deepcopy(source)(x0, step=0).losses(out), expected)
    assert {p.dtype for p in source.double().parameters()} == {torch.float64}
    assert next(iter(source.to("meta").parameters())).device.type == "meta"


def test_neither_the_schedule_nor_the_global_generator_is_touched() -> None:
    before = torch.get_rng_state()
    one, same, other = (LogVariance(seed=seed) for seed in (0, 0, 1))
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(one.frequencies, same.frequencies)
    assert not torch.equal(one.frequencies, other.frequencies)


def test_the_module_optimizes_it_without_decay() -> None:
    network = nn.Linear(2, 2)
    module = DiffusionModule(network, Noising(ZTSNR, "learned_uncertainty"))
    first, second = module.configure_optimizers().param_groups
    assert {id(p) for p in first["params"]} == {id(p) for p in network.parameters()}
    assert {id(p) for p in second["params"]} == {id(p) for p in module.noising.parameters()}
    assert (first["weight_decay"], second["weight_decay"]) == (0.01, 0.0)
    assert "noising.log_variance.weight" in module.state_dict()
    assert len(DiffusionModule(network, Noising(ZTSNR)).configure_optimizers().param_groups) == 1


@pytest.mark.parametrize("channels", [0, -1])
def test_bad_channels(channels: int) -> None:
    with pytest.raises(
        ValueError, match=rf"^channels must be at least 1, got {channels}; the paper uses 128$"
    ):
        LearnedUncertainty(channels=channels)
