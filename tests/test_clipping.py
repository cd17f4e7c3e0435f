"""Clipping x_0: diffusers' results, every prediction type, and that it touches nothing where there
is nothing to clip.
"""

from __future__ import annotations

from typing import Any

import diffusers
import pytest
import torch
from torch import Tensor

from alphabar.noising import PREDICTIONS, NoiseSchedule
from alphabar.sampling import METHODS, Knot, Sampler
from alphabar.sampling.clipping import Clip, DynamicThreshold, clipped, resolve_clip
from alphabar.sampling.inference import SeededNoise
from alphabar.sampling.kernel import run
from alphabar.sampling.standalone.adaptive import DPMAdaptive

LINEAR = NoiseSchedule.linear()
SHAPE = (2, 3, 4, 4)


def wild(x: Tensor, t: Tensor) -> Tensor:
    """A network whose x_0 often leaves -1 ... 1."""
    return torch.tanh(1.3 * x.roll(1, -1) + 0.2) * (1 + t.double().view(-1, 1, 1, 1) / 2000)


def start(seed: int = 0) -> Tensor:
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def exact(scheduler: Any, schedule: NoiseSchedule) -> Any:
    """A peer with its table in float64."""
    scheduler.alphas_cumprod = schedule.alphas_cumprod
    if hasattr(scheduler, "final_alpha_cumprod"):
        scheduler.final_alpha_cumprod = torch.tensor(1.0, dtype=torch.float64)
    return scheduler


def peer_run(scheduler: Any, x: Tensor, **options: Any) -> Tensor:
    for t in scheduler.timesteps.tolist():
        x = scheduler.step(
            wild(x, torch.full((2,), t, dtype=torch.float64)), t, x, **options
        ).prev_sample
    return x


PEER_OPTIONS = [
    ({"clip_sample": True}, Clip(1.0)),
    ({"clip_sample": True, "clip_sample_range": 0.7}, Clip(0.7)),
    (
        {"thresholding": True, "dynamic_thresholding_ratio": 0.9, "sample_max_value": 4.0},
        DynamicThreshold(0.9, 4.0),
    ),
    (
        {"thresholding": True, "dynamic_thresholding_ratio": 0.8, "sample_max_value": 1.2},
        DynamicThreshold(0.8, 1.2),
    ),
    ({"thresholding": True}, DynamicThreshold(max_value=1.0)),
]


@pytest.mark.parametrize("prediction", ["epsilon", "sample", "v_prediction"])
@pytest.mark.parametrize(("options", "clip"), PEER_OPTIONS)
def test_agreement_with_ddim(options: dict[str, Any], clip: Any, prediction: str) -> None:
    schedule = LINEAR.with_prediction(prediction)
    peer_options = {
        "clip_sample": False,
        "prediction_type": prediction,
        "timestep_spacing": "leading",
    } | options
    scheduler = exact(diffusers.DDIMScheduler(**peer_options), schedule)
    scheduler.set_timesteps(20)
    theirs = peer_run(scheduler, start(), use_clipped_model_output=True)
    sampler = Sampler(schedule, "ddim", 20, "leading")
    assert torch.allclose(sampler(wild, start(), clip=clip), theirs, rtol=1e-9, atol=1e-9)
    assert not torch.allclose(sampler(wild, start()), theirs, rtol=1e-2, atol=1e-2)


def drawing(module: Any, seeds: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a peer draw what seeds=... draw here."""
    noise = SeededNoise(SHAPE, seeds, torch.device("cpu"))

    def drawn(shape: Any, **_: Any) -> Tensor:
        return noise().double()

    monkeypatch.setattr(module, "randn_tensor", drawn)


@pytest.mark.parametrize("prediction", ["epsilon", "sample", "v_prediction"])
@pytest.mark.parametrize(("options", "clip"), PEER_OPTIONS)
@pytest.mark.parametrize("eta", [0.0, 0.6])
def test_agreement_with_ddim_that_keeps_its_noise(
    options: dict[str, Any], clip: Any, prediction: str, eta: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What DDIMScheduler's step does by default: x_0 is clipped, and ε stays that of the network's
    own output.
    """
    import diffusers.schedulers.scheduling_ddim as module

    schedule = LINEAR.with_prediction(prediction)
    peer_options = {
        "clip_sample": False,
        "prediction_type": prediction,
        "timestep_spacing": "leading",
    } | options
    scheduler = exact(diffusers.DDIMScheduler(**peer_options), schedule)
    scheduler.set_timesteps(20)
    drawing(module, (5, 6), monkeypatch)
    theirs = peer_run(scheduler, start(), eta=eta)
    kept = {"eta": eta, "use_clipped_model_output": False}
    ours = Sampler(schedule, "ddim", 20, "leading", **kept)(wild, start(), clip=clip, seeds=(5, 6))
    # where x_0 is close to x, ε = (x - α x_0) / σ loses digits: the sample prediction's, at σ =
    # 0.01
    assert torch.allclose(ours, theirs, rtol=1e-8, atol=1e-8)
    derived = Sampler(schedule, "ddim", 20, "leading", eta=eta)(
        wild, start(), clip=clip, seeds=(5, 6)
    )
    assert not torch.allclose(derived, theirs, rtol=1e-3, atol=1e-3)


def test_noise_that_is_kept_changes_nothing_without_clipping() -> None:
    for method in ("ddim", "ddim_inverse"):
        ours, plain = (
            Sampler(LINEAR, method, 8, use_clipped_model_output=derived)(wild, start())
            for derived in (False, True)
        )
        assert torch.allclose(ours, plain, rtol=1e-9, atol=1e-9)


def test_agreement_with_inverse_ddim() -> None:
    """DDIMInverseScheduler has no other way than to keep ε. It starts from an image, which lies
    inside the limit.
    """
    scheduler = exact(
        diffusers.DDIMInverseScheduler(clip_sample_range=0.7, timestep_spacing="leading"), LINEAR
    )
    scheduler.initial_alpha_cumprod = torch.tensor(1.0, dtype=torch.float64)
    scheduler.set_timesteps(10)
    image = start().clamp(-0.7, 0.7)
    theirs = peer_run(scheduler, image)
    ours = {
        derived: Sampler(LINEAR, "ddim_inverse", 10, "leading", use_clipped_model_output=derived)(
            wild, image, clip=0.7
        )
        for derived in (False, True)
    }
    assert torch.allclose(ours[False], theirs, rtol=1e-9, atol=1e-9)
    assert not torch.allclose(ours[True], theirs, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("options", [option for option, _ in PEER_OPTIONS])
def test_tcd_has_the_options_and_clips_nothing(
    options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """TCDScheduler takes clip_sample and thresholding, and no line of its step reads them: here
    that is no clip.
    """
    import diffusers.schedulers.scheduling_tcd as module

    scheduler = exact(
        diffusers.TCDScheduler(beta_schedule="linear", beta_start=1e-4, beta_end=0.02, **options),
        LINEAR,
    )
    scheduler.set_timesteps(4)
    drawing(module, (5, 6), monkeypatch)
    theirs = peer_run(scheduler, start(), eta=0.3)
    ours = Sampler(LINEAR, "tcd", 4, eta=0.3)(wild, start(), seeds=(5, 6))
    assert torch.allclose(ours, theirs, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(("options", "clip"), PEER_OPTIONS[::2])
def test_agreement_with_lcm(
    options: dict[str, Any], clip: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """x_0 is clipped before c_skip x is added, as here; the last of their steps stays a little
    below α = 1.
    """
    import diffusers.schedulers.scheduling_lcm as module

    config = {"beta_schedule": "linear", "beta_start": 1e-4, "beta_end": 0.02} | options
    scheduler = exact(diffusers.LCMScheduler(**config), LINEAR)
    scheduler.set_timesteps(4)
    drawing(module, (5, 6), monkeypatch)
    theirs = peer_run(scheduler, start())
    ours = Sampler(LINEAR, "lcm", 4)(wild, start(), seeds=(5, 6), clip=clip)
    assert torch.allclose(ours, theirs, rtol=1e-9, atol=1e-9)
    assert not torch.allclose(
        Sampler(LINEAR, "lcm", 4)(wild, start(), seeds=(5, 6)), theirs, rtol=1e-3, atol=1e-3
    )


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
@pytest.mark.parametrize(("options", "clip"), PEER_OPTIONS[::2])
def test_agreement_with_ddpm(
    options: dict[str, Any], clip: Any, prediction: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    import diffusers.schedulers.scheduling_ddpm as module

    schedule = LINEAR.with_prediction(prediction)
    peer_options = {
        "clip_sample": False,
        "prediction_type": prediction,
        "timestep_spacing": "trailing",
    } | options
    scheduler = exact(diffusers.DDPMScheduler(**peer_options), schedule)
    scheduler.set_timesteps(20)
    drawing(module, (5, 6), monkeypatch)
    theirs = peer_run(scheduler, start())
    ours = Sampler(schedule, "ddpm", 20)(wild, start(), seeds=[5, 6], clip=clip)
    assert torch.allclose(ours, theirs, rtol=1e-9, atol=1e-9)


def test_zero_terminal_snr_agrees_too() -> None:
    schedule = LINEAR.with_prediction("v_prediction").zero_terminal_snr()
    scheduler = diffusers.DDIMScheduler(
        clip_sample=True,
        prediction_type="v_prediction",
        timestep_spacing="trailing",
        rescale_betas_zero_snr=True,
    )
    scheduler = exact(scheduler, schedule)
    scheduler.set_timesteps(20)
    theirs = peer_run(scheduler, start(), use_clipped_model_output=True)
    assert torch.allclose(
        Sampler(schedule, "ddim", 20)(wild, start(), clip=1.0), theirs, rtol=1e-9, atol=1e-9
    )


# the fold into the raw output


INSIDE, NEAR_DATA, ZERO_SNR = (
    Knot(500.0, 0.6, 0.8),
    Knot(1.0, 0.999, 0.045, 0.3),
    Knot(999.0, 0.0, 1.0),
)
WELL_POSED = [
    (prediction, knot)
    for prediction in PREDICTIONS
    for knot in (INSIDE, NEAR_DATA, ZERO_SNR)
    if knot is not ZERO_SNR or prediction not in ("epsilon", "score")
]


@pytest.mark.parametrize(
    ("prediction", "knot"), WELL_POSED, ids=lambda value: str(getattr(value, "alpha", value))
)
@pytest.mark.parametrize("change", [Clip(0.4), DynamicThreshold(0.5)])
def test_the_clean_estimate_is_changed_and_x_is_kept(
    prediction: str, knot: Knot, change: Any
) -> None:
    kind = PREDICTIONS[prediction]()
    x, raw = start(1), 2 * start(2)
    out = clipped(lambda x, knot: raw, kind, change)(knot.input_scale * x, knot)
    x0 = kind.to_x0(out, x, knot.alpha, knot.sigma)
    before = kind.to_x0(raw, x, knot.alpha, knot.sigma)
    assert torch.allclose(x0, change(before), rtol=0, atol=1e-11)
    assert not torch.allclose(x0, before, atol=0.1)
    epsilon = kind.to_epsilon(out, x, knot.alpha, knot.sigma)
    assert torch.allclose(knot.alpha * x0 + knot.sigma * epsilon, x, rtol=0, atol=1e-11)


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_outputs_that_need_no_clipping_are_left_alone(prediction: str, dtype: torch.dtype) -> None:
    knot = Knot(500.0, 0.6, 0.8)
    raw = start().to(dtype)
    out = clipped(lambda x, knot: raw, PREDICTIONS[prediction](), Clip(1e3))(start(1).float(), knot)
    assert out.dtype == torch.float32
    assert torch.equal(out, raw.float())


# what is done to x_0


def test_dynamic_threshold_image_by_image() -> None:
    x0 = torch.stack([torch.linspace(-4, 4, 101), torch.linspace(-0.5, 0.5, 101)]).view(2, 1, 101)
    high, low = DynamicThreshold(0.5)(x0)
    assert float(high.max()) == 1.0
    s = float(x0[0].abs().quantile(0.5))
    assert torch.allclose(high, x0[0].clamp(-s, s) / s)
    assert torch.equal(low, x0[1])  # s is at least 1
    capped = DynamicThreshold(0.99, max_value=1.5)(x0)[0]
    assert torch.allclose(capped, x0[0].clamp(-1.5, 1.5) / 1.5)


# in a run


@pytest.mark.parametrize(
    "schedule",
    [LINEAR, NoiseSchedule.flow(3.0), NoiseSchedule.karras()],
    ids=lambda s: s.curve.kind,
)
@pytest.mark.parametrize("method", ["ddim", "dpmpp_2m", "heun", "unipc"])
def test_a_run_is_the_table_on_a_clipped_network(schedule: NoiseSchedule, method: str) -> None:
    assert method in METHODS
    sampler = Sampler(schedule, method, 6)

    def evaluate(x: Tensor, knot: Knot) -> Tensor:
        return wild(x, torch.full(x.shape[:1], knot.timestep))

    def clip_by_hand(x: Tensor, knot: Knot) -> Tensor:
        alpha, sigma, x_t = knot.alpha, knot.sigma, x / knot.input_scale
        x0 = schedule.prediction.to_x0(evaluate(x, knot), x_t, alpha, sigma).clamp(-0.5, 0.5)
        return schedule.prediction.combine(x0, (x_t - alpha * x0) / sigma, alpha, sigma)

    x = start() * sampler.init_noise_scale
    *_, by_hand = run(sampler.table, x, clip_by_hand, lambda a, b: torch.zeros(1))
    steps = list(sampler.iterate(wild, start(), clip=0.5))
    assert torch.allclose(steps[-1].x, by_hand.x, rtol=1e-6, atol=1e-6)
    assert all(float(progress.denoised.abs().max()) <= 0.5 + 1e-6 for progress in steps)


@pytest.mark.parametrize("method", ["ddim_inverse", "dpm_solver_inverse"])
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_inversion_from_the_clean_image_itself(prediction: str, method: str) -> None:
    """Where σ = 0 there is no output to fold the change into: x_0 is x, and is left as it is."""
    sampler = Sampler(LINEAR.with_prediction(prediction), method, 10, "trailing", final="zero")
    assert sampler.knots[0].sigma == 0.0
    assert sampler(wild, start(), clip=1.0).isfinite().all()


def test_samplers_that_are_no_tables_clip_as_well() -> None:
    steps = list(DPMAdaptive(LINEAR).iterate(wild, SHAPE, seeds=0, clip=0.5))
    # float32, at σ/α = 157
    assert all(float(progress.denoised.abs().max()) <= 0.5 + 1e-4 for progress in steps)
    assert float(steps[-1].x.abs().max()) <= 0.5 + 1e-5


def test_guidance_comes_first() -> None:
    def network(x: Tensor, t: Tensor, shift: Tensor) -> Tensor:
        return wild(x, t) + shift

    def mixed(x: Tensor, t: Tensor) -> Tensor:
        return torch.lerp(wild(x, t) - 0.5, wild(x, t) + 0.5, 4.0)

    shifts = {
        "conditioning": {"shift": torch.full((2, 1, 1, 1), 0.5)},
        "unconditional": {"shift": torch.full((2, 1, 1, 1), -0.5)},
    }
    sampler = Sampler(LINEAR, "dpmpp_2m", 6)
    guided = sampler(network, SHAPE, seeds=0, guidance_scale=4.0, clip=1.0, **shifts)
    assert torch.allclose(guided, sampler(mixed, SHAPE, seeds=0, clip=1.0), rtol=1e-5, atol=1e-5)
    assert float(guided.abs().max()) <= 1 + 1e-6


# bad input


def test_resolving() -> None:
    assert resolve_clip(2) == Clip(2.0)
    threshold = DynamicThreshold(0.99)
    assert resolve_clip(threshold) is threshold


@pytest.mark.parametrize("limit", [0.0, -1.0, float("nan")])
def test_bad_limits(limit: float) -> None:
    with pytest.raises(
        ValueError,
        match=rf"^clip must be a positive limit of \|x_0\|, got {limit}; images in \[-1, 1\] have 1.0$",
    ):
        Sampler(LINEAR)(wild, SHAPE, seeds=0, clip=limit)


@pytest.mark.parametrize("ratio", [0.0, 1.5, float("nan")])
def test_bad_ratios(ratio: float) -> None:
    with pytest.raises(
        ValueError,
        match=rf"^the ratio of a dynamic threshold must be in \(0, 1\], got {ratio}; Imagen uses 0.995$",
    ):
        DynamicThreshold(ratio)


def test_bad_max_value() -> None:
    with pytest.raises(
        ValueError, match=r"^max_value must be at least 1, the range of the data, got 0.5$"
    ):
        DynamicThreshold(max_value=0.5)


@pytest.mark.parametrize("name", ["DDIMScheduler", "DDIMParallelScheduler", "DDIMInverseScheduler"])
def test_a_class_name_clips_as_the_class(name: str) -> None:
    """The step of these classes keeps the network's own noise unless told otherwise; "ddim" takes
    what the clipped x_0 implies.
    """
    schedule = NoiseSchedule.scaled_linear()
    assert Sampler(schedule, name, 5).method_options["use_clipped_model_output"] is False
    assert (
        Sampler(schedule, name, 5, use_clipped_model_output=True).method_options[
            "use_clipped_model_output"
        ]
        is True
    )
    assert Sampler(schedule, "ddim", 5).method_options["use_clipped_model_output"] is True
