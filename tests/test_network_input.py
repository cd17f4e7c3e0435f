"""What the network is handed: at the same (x_t, t) the same input and the same time, in training
and in sampling.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from lightning.pytorch import Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader

from alphabar.callbacks import ValidationSampling
from alphabar.noising import Flow, Noised, NoiseSchedule, Noising, Truncated
from alphabar.sampling import Sampler
from alphabar.training import DiffusionModule, add_noising_arguments, noising_from_arguments
from oracles import EVERY_SCHEDULE, allowed
from test_examples import load

KARRAS = NoiseSchedule.karras(sigma_data=0.5)
BASES = EVERY_SCHEDULE | {
    "karras_wide": NoiseSchedule.karras(sigma_data=2.0).shifted(3.0),
    "karras_part": KARRAS.truncated(t_min=0.5),
}
EVERY = [s for base in BASES.values() for s in allowed(base)]


class Call(NamedTuple):
    """One call of the network while a sampler runs, and where on the path it was: x_t and the time
    of the curve.
    """

    x: Tensor
    timesteps: Tensor
    x_t: Tensor
    t: Tensor


def calls_of_sampler(schedule: NoiseSchedule, start: Tensor, **options: Any) -> list[Call]:
    """Sample with Euler, which calls the network once a step at its state."""
    sampler, seen = Sampler(schedule, "euler", 4), []

    def network(x: Tensor, timesteps: Tensor) -> Tensor:
        seen.append((x, timesteps))
        return 0.1 * torch.ones_like(x)

    states = [sampler.init_noise_scale * start.to(torch.promote_types(start.dtype, torch.float32))]
    states += [progress.x for progress in sampler.iterate(network, start, **options)]
    calls = []
    for knot, x_t, (x, timesteps) in zip(sampler.knots[:-1], states[:-1], seen, strict=True):
        t = schedule.time(2 * torch.tensor([knot.half_log_snr], dtype=torch.float64))
        if knot.alpha == 0:
            t = torch.tensor([schedule.curve.t_max], dtype=torch.float64)
        if schedule.curve.is_discrete:
            assert abs(float(t - t.round())) < 1e-6
            t = t.round().long()
        calls.append(Call(x, timesteps, x_t, t.expand(len(start))))
    return calls


def close(a: Tensor, b: Tensor) -> bool:
    assert a.dtype == b.dtype and a.shape == b.shape
    tolerance = (
        1e-5
        if a.dtype in (torch.float32, torch.float64, torch.int64)
        else 2 * torch.finfo(a.dtype).eps
    )
    return torch.allclose(a.double(), b.double(), rtol=tolerance, atol=tolerance)


def noised_at(noising: Noising, call: Call, dtype: torch.dtype) -> Noised:
    """Noise x_0 = 0 with the noise that leads to the sampler's x_t."""
    sigma = noising.schedule.sigma(call.t.double()).view(-1, 1)
    return noising(
        torch.zeros(call.x_t.shape, dtype=dtype), step=0, timesteps=call.t, noise=call.x_t / sigma
    )


@pytest.mark.parametrize("schedule", EVERY, ids=lambda s: f"{s.curve.kind}-{s.prediction.name}")
def test_noising_hands_the_network_what_the_sampler_does(schedule: NoiseSchedule) -> None:
    start = torch.randn(3, 5, generator=torch.Generator().manual_seed(0))
    for call in calls_of_sampler(schedule, start):
        noised = noised_at(Noising(schedule).eval(), call, torch.float32)
        assert close(noised.x, call.x) and close(noised.timesteps, call.timesteps)
        assert close(noised.x_t, call.x_t)
        t = noised.t
        assert close(schedule.scale_model_input(call.x_t, t), call.x)
        assert close(schedule.model_timesteps(t), call.timesteps)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("base", ["karras", "flow", "ztsnr"])
def test_casts_are_alike(base: str, dtype: torch.dtype) -> None:
    schedule = BASES[base]
    start = torch.randn(3, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float32)
    start, options = (start.double(), {}) if dtype == torch.float64 else (start, {"dtype": dtype})
    for call in calls_of_sampler(schedule, start, **options):
        noised = noised_at(Noising(schedule).eval(), call, dtype)
        assert noised.x.dtype == dtype
        assert close(noised.x, call.x) and close(noised.timesteps, call.timesteps)


def test_the_scale_is_that_of_edm() -> None:
    noised = Noising(KARRAS)(torch.zeros(64, 2), step=0)
    c_in = 1 / (noised.t**2 + 0.5**2).sqrt()  # 2206.00364, table 1
    assert torch.allclose(noised.x, c_in[:, None] * noised.x_t)
    assert torch.allclose(noised.timesteps, noised.t.log() / 4, atol=1e-6)
    assert float(noised.x_t.abs().max()) > 10 > 4 > float(noised.x.abs().max())


@pytest.mark.parametrize("schedule", allowed(KARRAS), ids=lambda s: s.prediction.name)
def test_conversions_take_x_t(schedule: NoiseSchedule) -> None:
    x0 = torch.randn(16, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    noised = Noising(schedule)(x0, step=0)
    assert torch.equal(noised.x_t, schedule.add_noise(x0, noised.noise, noised.t))
    assert torch.allclose(
        schedule.to_x0(noised.target, noised.x_t, noised.t), x0, rtol=0, atol=1e-8
    )
    assert not torch.allclose(noised.x, noised.x_t)


def test_curves_without_a_scale_make_no_copy() -> None:
    for schedule in (
        NoiseSchedule.flow(),
        NoiseSchedule.linear(),
        NoiseSchedule.flow().truncated(t_max=0.5),
    ):
        noised = Noising(schedule)(torch.zeros(2, 3), step=0)
        assert (
            noised.x is noised.x_t
            and schedule.scale_model_input(noised.x_t, noised.t) is noised.x_t
        )
    assert not NoiseSchedule.flow().curve.scales_input
    assert KARRAS.curve.scales_input and BASES["karras_part"].curve.scales_input


def test_a_part_of_a_curve_scales_as_the_whole() -> None:
    class Flat(Flow):
        def input_scale(self, t: Tensor) -> Tensor:
            return 1 + t

    part = NoiseSchedule(Truncated(Flat(), 0.25, 1.0), "flow_prediction")
    noised = Noising(part)(torch.randn(8, 2), step=0)
    assert torch.allclose(noised.x, (1 + noised.t)[:, None] * noised.x_t)


@pytest.mark.parametrize(
    "timesteps", [torch.tensor(2.0), torch.tensor([2.0]), torch.tensor([2.0] * 3)]
)
def test_scale_takes_the_shapes_that_add_noise_takes(timesteps: Tensor) -> None:
    x_t = torch.ones(3, 1, 2)
    assert torch.allclose(
        KARRAS.scale_model_input(x_t, timesteps), torch.full((3, 1, 2), 4.25**-0.5)
    )


def test_scale_refuses_other_shapes() -> None:
    with pytest.raises(
        ValueError, match=r"^timesteps must be a scalar or have shape \(3,\), got \(2,\)$"
    ):
        KARRAS.scale_model_input(torch.ones(3, 1), torch.tensor([1.0, 2.0]))


# through all that trains and draws


class Probe(nn.Module):
    """A network that writes down what it is handed."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.calls = nn.Parameter(torch.zeros(1)), []

    def forward(self, x: Tensor, timesteps: Tensor, **conditioning: Any) -> Tensor:
        self.calls.append((x.detach().clone(), timesteps.clone()))
        return x * self.weight


@contextmanager
def heard(*noisings: Noising) -> Iterator[list[Noised]]:
    """Collect the batches whose losses are computed."""
    seen: list[Noised] = []
    stops = [
        noising.register_loss_hook(lambda noised, errors: seen.append(noised))
        for noising in noisings
    ]
    yield seen
    for stop in stops:
        stop()


def assert_as_a_sampler_would(probe: Probe, seen: list[Noised], schedule: NoiseSchedule) -> None:
    """That scale_model_input and model_timesteps are the sampler's is tested above."""
    assert len(seen) == len(probe.calls) > 0
    for (x, timesteps), noised in zip(probe.calls, seen, strict=True):
        assert close(x, schedule.scale_model_input(noised.x_t, noised.t))
        assert close(timesteps, schedule.model_timesteps(noised.t))


@pytest.mark.parametrize(
    "schedule", [KARRAS, NoiseSchedule.flow(3.0), BASES["ztsnr"]], ids=lambda s: s.curve.kind
)
def test_training_and_validation_step(schedule: NoiseSchedule, tmp_path: Path) -> None:
    probe = Probe()
    module = DiffusionModule(probe, Noising(schedule))
    data: Any = DataLoader(torch.randn(4, 3), batch_size=2)  # type: ignore[arg-type]
    trainer = Trainer(accelerator="cpu", max_steps=2, logger=False, enable_checkpointing=False,
                      enable_progress_bar=False, enable_model_summary=False, default_root_dir=tmp_path)  # fmt: skip
    with heard(module.noising, module.validation_noising) as seen:
        trainer.fit(module, data, data)
    validation = 2 * (1 + 8)  # two batches: val_loss and the noise levels
    assert len(seen) == validation + 2 + validation  # the sanity check, training, validation
    assert_as_a_sampler_would(probe, seen, schedule)


def by_flags(words: str) -> Noising:
    return noising_from_arguments(
        add_noising_arguments(argparse.ArgumentParser()).parse_args(words.split())
    )


def by_brightness(words: str) -> Noising:
    example = load("train_brightness")
    return example.settings(example.parse(words.split()))[0].noising


@pytest.mark.parametrize("make", [by_flags, by_brightness])
@pytest.mark.parametrize(
    "words",
    [
        "--noise_schedule karras:sigma_data=0.7",
        "--flow_shift 3",
        "--v_parameterization",
        "--noise_schedule karras",
    ],
)
def test_flags_and_example(words: str, make: Callable[[str], Noising]) -> None:
    noising, probe = make(words), Probe()
    with heard(noising) as seen:
        noised = noising(torch.randn(8, 3), step=0)
        noised.loss(probe(noised.x, noised.timesteps))
    assert_as_a_sampler_would(probe, seen, noising.schedule)


def test_fine_tuning_objective() -> None:
    noising, probe = Noising(KARRAS), Probe()
    objective = load("finetune_text_to_image").Objective(probe, noising)
    with heard(noising) as seen:
        objective(torch.randn(4, 2, 3, 3), {}, step=0, index=range(4), total=4)
    assert_as_a_sampler_would(probe, seen, KARRAS)


def test_previews(tmp_path: Path) -> None:
    probe = Probe()
    module = DiffusionModule(probe, Noising(KARRAS), sample_shape=(1, 4, 4))
    sampler = Sampler(KARRAS, "euler", 3)
    previews = ValidationSampling(
        sampler, num_images=2, every_n_train_steps=1, folder=tmp_path, seed=5
    )
    data: Any = DataLoader(torch.randn(2, 1, 4, 4), batch_size=2)  # type: ignore[arg-type]
    trainer = Trainer(accelerator="cpu", max_steps=1, logger=False, enable_checkpointing=False, callbacks=[previews],
                      enable_progress_bar=False, enable_model_summary=False, default_root_dir=tmp_path)  # fmt: skip
    trainer.fit(module, data)
    drawn = probe.calls[2:]  # after the trial of one step and the training step
    alone = Probe()
    alone.load_state_dict(probe.state_dict())
    sampler(alone, (2, 1, 4, 4), seeds=5)
    assert len(drawn) == len(alone.calls) == 3
    for (x, timesteps), (x_alone, timesteps_alone) in zip(drawn, alone.calls, strict=True):
        assert close(x, x_alone) and close(timesteps, timesteps_alone)
    assert 0.5 < float(drawn[0][0].std()) < 2  # and not the 80 of x_t


# what it is for


class MLP(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(2 + 16, 128), nn.SiLU(), nn.Linear(128, 128), nn.SiLU(), nn.Linear(128, 2)
        )

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        phase = t[:, None] * torch.linspace(0.5, 8, 8)
        return self.layers(torch.cat([x, phase.sin(), phase.cos()], 1))


@pytest.mark.slow
def test_an_mlp_learns_two_points_with_edm() -> None:
    """The loop of the README: with x_t in the place of c_in · x_t nearly no sample reaches the
    data.
    """
    points = torch.tensor([[0.5, -0.5], [-0.5, 0.5]])
    noising = Noising(KARRAS, timesteps="lognormal_sigma", seed=0)
    torch.manual_seed(0)
    network = MLP()
    optimizer = torch.optim.Adam(network.parameters(), 2e-3)
    steps = 1500
    for step in range(steps):
        x0 = points[torch.randint(2, (256,), generator=torch.Generator().manual_seed(step))]
        noised = noising(x0, step=step)
        loss = noised.loss(network(noised.x, noised.timesteps))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        for group in optimizer.param_groups:
            group["lr"] = 2e-3 * (1 - step / steps)
    samples = Sampler(KARRAS, "dpmpp_2m", 20, "karras")(network, (2000, 2), seeds=0)
    distance = torch.cdist(samples, points).min(1).values
    near = float((distance < 0.1).float().mean())
    print(f"near the data: {near:.1%}")
    assert near >= 0.95
    shares = torch.bincount(torch.cdist(samples, points).argmin(1), minlength=2) / 2000
    assert 0.4 < float(shares[0]) < 0.6
