"""The drop-in classes: what diffusers' own classes do, with the same arguments, calls and files.

The oracle is always the class of diffusers with the same config, run by the same loop from the same
seed.
"""

from __future__ import annotations

import inspect
import json
import math
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from diffusers.schedulers import scheduling_dpmsolver_sde
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from alphabar.sampling import schedulers
from alphabar.sampling.schedulers import LEFT_OUT, NAMES

SHAPE = (2, 4, 4, 4)
START = torch.randn(SHAPE, generator=torch.Generator().manual_seed(0))
CONFIGS: dict[str, dict[str, Any]] = {
    "defaults": {},
    "not clipped": {"clip_sample": False},
    "thresholding": {"thresholding": True},
    "karras": {"use_karras_sigmas": True},
    "exponential": {"use_exponential_sigmas": True},
    "beta": {"use_beta_sigmas": True},
    "lu": {"use_lu_lambdas": True},
    "trailing": {"timestep_spacing": "trailing"},
    "leading": {"timestep_spacing": "leading", "steps_offset": 1},
    "linspace": {"timestep_spacing": "linspace"},
    "zero SNR": {
        "rescale_betas_zero_snr": True,
        "prediction_type": "v_prediction",
        "timestep_spacing": "trailing",
    },
    "Stable Diffusion": {
        "beta_schedule": "scaled_linear",
        "beta_start": 0.00085,
        "beta_end": 0.012,
    },
    "sample": {"prediction_type": "sample"},
    "no alpha of 1": {"set_alpha_to_one": False},
    "fixed_large": {"variance_type": "fixed_large"},
    "order 3": {"solver_order": 3},
    "heun": {"solver_type": "heun"},
    "sigma_min": {"final_sigmas_type": "sigma_min"},
    "sde": {"algorithm_type": "sde-dpmsolver++"},
    "plms": {"skip_prk_steps": True},
    "flow sigmas": {
        "use_flow_sigmas": True,
        "prediction_type": "flow_prediction",
        "flow_shift": 3.0,
    },
    "shift": {"shift": 3.0},
    "shift to an end": {"shift": 2.0, "shift_terminal": 0.1},
    "stochastic": {"stochastic_sampling": True},
    "continuous": {"timestep_type": "continuous"},
}
REFUSED = {
    ("DDIMInverseScheduler", "sample"): "do not say the noise",
    ("DPMSolverMultistepInverseScheduler", "karras"): "use_karras_sigmas=True is not supported",
    ("DPMSolverMultistepInverseScheduler", "exponential"): "is not supported",
    ("DPMSolverMultistepInverseScheduler", "beta"): "use_beta_sigmas=True is not supported",
    ("DPMSolverMultistepInverseScheduler", "trailing"): "is no grid here",
    ("DPMSolverMultistepInverseScheduler", "leading"): "is no grid here",
    ("DPMSolverMultistepInverseScheduler", "flow sigmas"): "does not know prediction_type",
    ("DPMSolverMultistepInverseScheduler", "sde"): "dpmsolver",
}
# PNDM steps by T // N = 100 on a grid with gaps of 111, also from the middle of a step
APART = {("PNDMScheduler", "linspace")}
# the tables of these in float32: 1 - ᾱ at the first timestep is 8e-5 off, and the inverse starts there
LIMITS = {
    "DPMSolverMultistepInverseScheduler": 2e-4,
    "UnCLIPScheduler": 2e-3,
    "SASolverScheduler": 5e-5,
    "DPMSolverSDEScheduler": 2e-5,  # of its path
    "HeunDiscreteScheduler": 2e-5,
    "DEISMultistepScheduler": 1e-4,  # on flow sigmas; 1e-8 on levels in float64
}
LIMIT = 1e-5


class SmoothPath:
    """A path whose increments do not depend on how it is divided, for DPMSolverSDEScheduler."""

    def __init__(self, x: Tensor, *_: Any) -> None:
        generator = torch.Generator().manual_seed(5)
        self.amplitudes = torch.randn(4, *x.shape, generator=generator)

    def at(self, sigma: Any) -> Tensor:
        return sum(a * math.sin((i + 1) * float(sigma)) for i, a in enumerate(self.amplitudes))  # type: ignore[return-value]

    def __call__(self, start: Any, end: Any) -> Tensor:
        return (self.at(start) - self.at(end)) / abs(float(start) - float(end)) ** 0.5


@pytest.fixture(autouse=True)
def quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scheduling_dpmsolver_sde, "BrownianTreeNoiseSampler", SmoothPath)
    diffusers.logging.set_verbosity_error()


def network(x: Tensor, t: Any) -> Tensor:
    return torch.tanh(0.5 * x + 0.001 * float(t)) - 0.1 * x


def in_a_pipeline(
    scheduler: Any, generator: Any, first: int = 0, x: Tensor = START, **more: Any
) -> list[Tensor]:
    """The loop that the pipelines of diffusers have; returns all that the steps return."""
    takes = inspect.signature(scheduler.step).parameters
    given = {"generator": generator} if "generator" in takes else {}
    x = x * float(getattr(scheduler, "init_noise_sigma", 1.0)) if first == 0 else x
    returned: list[Tensor] = []
    times = scheduler.timesteps
    for i, t in enumerate(times[first:], first):
        if "prev_timestep" in takes:
            given["prev_timestep"] = times[i + 1] if i + 1 < len(times) else None
        scaled = scheduler.scale_model_input(x, t) if hasattr(scheduler, "scale_model_input") else x
        result = scheduler.step(network(scaled, t), t, x, **given, **more, return_dict=False)
        x = result[0]
        returned += result
    return returned


def keys_of(name: str) -> set[str]:
    return set(inspect.signature(getattr(diffusers, name)).parameters)


def same(mine: Tensor, their: Tensor, limit: float) -> bool:
    return float((mine - their).abs().max()) <= limit * float(their.abs().max())


QUICK = [  # the times of KDPM2 take diffusers a quarter of a second
    pytest.param(name, marks=pytest.mark.slow) if name.startswith("KDPM2") else name
    for name in NAMES
]


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("name", QUICK)
def test_a_class_samples_as_that_of_diffusers(name: str) -> None:
    peer_class, own_class = getattr(diffusers, name), getattr(schedulers, name)
    compared = 0
    for config, values in CONFIGS.items():
        if not set(values) <= keys_of(name) or (name, config) in APART:
            continue
        try:
            peer = peer_class(**values)
            as_made = dict(peer.config)
            peer.set_timesteps(10)  # may change the config
            generator = torch.Generator().manual_seed(1)
            theirs = in_a_pipeline(peer, generator)
        except (ValueError, NotImplementedError):  # the class has no such thing
            continue
        if (name, config) in REFUSED:
            with pytest.raises(ValueError, match=REFUSED[name, config]):
                own_class(**values).set_timesteps(10)
            continue
        own = own_class(**values)
        assert dict(own.config) | {"_use_default_values": 0} == as_made | {"_use_default_values": 0}
        own.set_timesteps(10)
        assert torch.allclose(
            own.timesteps.double(), peer.timesteps.double(), rtol=1e-5, atol=1e-2
        ), config
        start = float(getattr(peer, "init_noise_sigma", 1.0))
        assert float(own.init_noise_sigma) == pytest.approx(start, rel=1e-5), config
        assert own.order == getattr(peer, "order", 1)
        if hasattr(peer, "sigmas"):
            assert torch.allclose(own.sigmas, peer.sigmas.float(), rtol=2e-4, atol=2e-6), config
        mine_from = torch.Generator().manual_seed(1)
        mine = in_a_pipeline(own, mine_from)
        limit = LIMITS.get(name, LIMIT)
        assert len(mine) == len(theirs)
        assert same(
            mine[-1 - (own._second is not None)], theirs[-1 - (own._second is not None)], limit
        ), config
        assert all(same(a, b, max(limit, 1e-4)) for a, b in zip(mine, theirs, strict=True)), config
        assert torch.equal(mine_from.get_state(), generator.get_state()), config
        compared += 1
    assert compared >= 2


# LMSDiscreteScheduler in the middle takes coefficients of order 4 for fewer derivatives than 4
LATER = [
    name
    for name in NAMES
    if hasattr(getattr(diffusers, name), "set_begin_index") and not name.startswith("LMS")
]


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("name", LATER)
def test_a_later_start_and_its_noise_are_those_of_diffusers(name: str) -> None:
    """Image to image: 20 steps, of which the last 8 run."""
    runs = []
    for home in (diffusers, schedulers):
        scheduler = getattr(home, name)()
        scheduler.set_timesteps(20)
        first = 12 * scheduler.order
        scheduler.set_begin_index(first)
        t = scheduler.timesteps[first : first + 1]
        noise = scheduler.scale_noise if "Flow" in name else scheduler.add_noise
        arguments = (START, t, 0 * START + 1) if "Flow" in name else (START, 0 * START + 1, t)
        x = noise(*arguments)
        runs.append([x, *in_a_pipeline(scheduler, torch.Generator().manual_seed(2), first, x)])
    theirs, mine = runs
    for a, b in zip(mine, theirs, strict=True):
        assert same(a, b, max(LIMITS.get(name, 0), 1e-4 if a is not mine[0] else LIMIT))


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("name", NAMES)
def test_noise_is_right_at_every_training_timestep(name: str) -> None:
    scheduler = getattr(schedulers, name)()
    flow = "Flow" in name
    t = torch.arange(1000)
    x0, noise = (torch.randn(1000, 3, generator=torch.Generator().manual_seed(s)) for s in (1, 2))
    if flow:
        alpha, sigma = 1 - t / 1000, t / 1000
    else:
        alpha, sigma = (
            scheduler.alphas_cumprod.double() ** 0.5,
            (1 - scheduler.alphas_cumprod.double()) ** 0.5,
        )
    alpha, sigma = alpha[:, None], sigma[:, None]
    v = alpha * noise - sigma * x0
    x = alpha * x0 + sigma * noise
    if scheduler._in_sigma:
        x = x / alpha
    for _ in range(2):  # before and after sampling
        assert torch.allclose(
            scheduler.add_noise(x0, noise, t).double(), x.double(), rtol=2e-5, atol=1e-5
        )
        assert torch.allclose(scheduler.get_velocity(x0, noise, t).double(), v.double(), atol=1e-5)
        scheduler.set_timesteps(7)


def test_noise_in_half_precision_does_not_vanish() -> None:
    scheduler = schedulers.DDPMScheduler()
    x0 = torch.zeros(1, 1000, dtype=torch.bfloat16)
    noise = torch.randn(1, 1000).to(torch.bfloat16)
    t = torch.zeros(1, dtype=torch.long)
    assert not diffusers.DDPMScheduler().add_noise(x0, noise, t).any()
    assert float(scheduler.add_noise(x0, noise, t).std()) == pytest.approx(0.01, rel=0.1)


# configs and files


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("name", NAMES)
def test_configs_and_files_are_those_of_diffusers(name: str, tmp_path: Path) -> None:
    peer, own = getattr(diffusers, name), getattr(schedulers, name)
    assert inspect.signature(own.__init__) == inspect.signature(peer.__init__)
    for method in ("set_timesteps", "step"):
        assert inspect.signature(getattr(own, method)) == inspect.signature(getattr(peer, method))
    assert own._compatibles == peer._compatibles and issubclass(own, peer)
    arguments = {"num_train_timesteps": 500}
    peer(**arguments).save_pretrained(tmp_path / "peer")
    own(**arguments).save_pretrained(tmp_path / "own")
    files = [(tmp_path / who / "scheduler_config.json").read_bytes() for who in ("peer", "own")]
    assert files[0] == files[1]
    loaded = own.from_pretrained(tmp_path / "peer")
    assert type(loaded) is own
    assert loaded.config == peer.from_pretrained(tmp_path / "own").config

    for theirs, ours in ((peer(**arguments), own), (own(**arguments), peer)):
        assert ours.from_config(theirs.config).config["num_train_timesteps"] == 500


CHANGES = [
    ("PNDMScheduler", "DPMSolverMultistepScheduler"),
    ("DDIMScheduler", "DDIMInverseScheduler"),
    ("EulerDiscreteScheduler", "LCMScheduler"),
    ("DDPMScheduler", "HeunDiscreteScheduler"),
]


@pytest.mark.parametrize(("one", "other"), CHANGES)
def test_a_class_takes_the_config_of_another(one: str, other: str) -> None:
    values = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
    configs = [
        dict(getattr(to, other).from_config(getattr(by, one)(**values).config).config)
        for by in (diffusers, schedulers)
        for to in (diffusers, schedulers)
    ]
    for config in configs:
        config["_use_default_values"] = sorted(config["_use_default_values"])
    assert all(config == configs[0] for config in configs)


def test_it_is_copied_and_pickled() -> None:
    scheduler = schedulers.DPMSolverMultistepScheduler(use_karras_sigmas=True)
    scheduler.set_timesteps(5)
    again = pickle.loads(pickle.dumps(scheduler))
    assert type(again) is type(scheduler) and again.config == scheduler.config
    a, b = (in_a_pipeline(s, None)[-1] for s in (again, scheduler))
    assert torch.equal(a, b)


# training


def unet() -> Any:
    torch.manual_seed(0)
    return diffusers.UNet2DModel(
        sample_size=8,
        in_channels=3,
        out_channels=3,
        layers_per_block=1,
        block_out_channels=(8, 8),
        norm_num_groups=4,
        down_block_types=("DownBlock2D",) * 2,
        up_block_types=("UpBlock2D",) * 2,
    )


def losses(home: Any, rescale: bool, folder: Path) -> list[float]:
    """The loop of train_text_to_image.py, with --snr_gamma and --prediction_type."""
    network = unet()
    scheduler = home.DDPMScheduler(num_train_timesteps=100, rescale_betas_zero_snr=rescale)
    scheduler.register_to_config(prediction_type="v_prediction")
    optimizer = torch.optim.SGD(network.parameters(), lr=1e-3)
    generator = torch.Generator().manual_seed(0)
    found = []
    for _ in range(4):
        x0, noise = (torch.randn(4, 3, 8, 8, generator=generator) for _ in range(2))
        count = scheduler.config.num_train_timesteps
        t = torch.randint(0, count, (4,), generator=generator).long()
        out = network(scheduler.add_noise(x0, noise, t), t).sample
        target = scheduler.get_velocity(x0, noise, t)
        snr = diffusers.training_utils.compute_snr(scheduler, t)
        weight = torch.stack([snr, 5.0 * torch.ones_like(t)], dim=1).min(dim=1)[0] / (snr + 1)
        loss = ((out - target).square().mean(dim=(1, 2, 3)) * weight).mean()
        loss.backward()
        optimizer.step()
        found.append(float(loss.detach()))
    diffusers.DDPMPipeline(unet=network, scheduler=scheduler).save_pretrained(folder)
    return found


@pytest.mark.parametrize("rescale", [False, True])
def test_a_training_loop_has_the_same_losses_and_saves_the_same_pipeline(
    rescale: bool, tmp_path: Path
) -> None:
    mine = losses(schedulers, rescale, tmp_path / "own")
    assert mine == pytest.approx(losses(diffusers, rescale, tmp_path / "peer"), rel=1e-5)
    for file in ("model_index.json", "scheduler/scheduler_config.json"):
        assert (tmp_path / "own" / file).read_bytes() == (tmp_path / "peer" / file).read_bytes()
    config = json.loads((tmp_path / "own/scheduler/scheduler_config.json").read_text())
    assert config["_class_name"] == "DDPMScheduler"
    assert (
        config["prediction_type"] == "v_prediction" and config["rescale_betas_zero_snr"] is rescale
    )
    assert (
        type(diffusers.DDPMPipeline.from_pretrained(tmp_path / "own").scheduler)
        is diffusers.DDPMScheduler
    )
    again = schedulers.DDPMScheduler.from_pretrained(tmp_path / "peer", subfolder="scheduler")
    assert again.schedule.has_zero_terminal_snr is rescale


def test_a_table_that_a_script_replaces_is_followed() -> None:
    x0, noise = (torch.randn(1000, 3, generator=torch.Generator().manual_seed(s)) for s in (1, 2))
    pair = []
    for home in (diffusers, schedulers):
        scheduler = home.DDPMScheduler(prediction_type="v_prediction")
        scheduler.add_noise(x0, noise, torch.arange(1000))
        scheduler.alphas_cumprod = home.DDPMScheduler(rescale_betas_zero_snr=True).alphas_cumprod
        pair.append(scheduler.add_noise(x0, noise, torch.arange(1000)))
    assert torch.allclose(*pair, atol=1e-5)


def test_a_step_needs_no_set_timesteps() -> None:
    """Scripts estimate the clean sample at a timestep of training."""
    out = torch.randn(SHAPE, generator=torch.Generator().manual_seed(3))
    for t in (999, 500, 0):
        pair = [
            home.DDPMScheduler(clip_sample=False).step(
                out, t, START, generator=torch.Generator().manual_seed(0)
            )
            for home in (diffusers, schedulers)
        ]
        for key in ("prev_sample", "pred_original_sample"):
            assert same(pair[1][key], pair[0][key], 1e-5)


# arguments of step and set_timesteps


def test_eta_and_the_other_arguments_of_step() -> None:
    for eta in (0.0, 0.7):
        pair = []
        states = []
        for home in (diffusers, schedulers):
            scheduler = home.DDIMScheduler(clip_sample=True)
            scheduler.set_timesteps(8)
            generator = torch.Generator().manual_seed(4)
            states.append(generator.get_state)
            more = {"eta": eta, "use_clipped_model_output": True}
            pair.append(in_a_pipeline(scheduler, generator, **more))
        assert same(pair[1][-2], pair[0][-2], LIMIT), eta
        assert torch.equal(states[0](), states[1]())
    scheduler = schedulers.EulerDiscreteScheduler()
    scheduler.set_timesteps(3)
    with pytest.raises(ValueError, match=r"s_churn=1\.0 is not possible here; leave it at 0\.0"):
        scheduler.step(START, scheduler.timesteps[0], START, s_churn=1.0)
    with pytest.raises(TypeError, match="unknown argument of step 's_chrn'"):
        scheduler.step(START, scheduler.timesteps[0], START, s_chrn=1.0)


@pytest.mark.parametrize("clip", [False, True])
@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("DDPMScheduler", "learned_range"),
        ("DDPMScheduler", "learned"),
        ("UnCLIPScheduler", "learned_range"),
        ("DPMSolverMultistepScheduler", "learned_range"),
    ],
)
def test_a_learned_variance(
    name: str, kind: str, clip: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def doubled(x: Tensor, t: Any) -> Tensor:
        return torch.cat([network_before(x, t), torch.sigmoid(x)], dim=1)

    network_before = network
    monkeypatch.setitem(globals(), "network", doubled)
    pair = []
    for home in (diffusers, schedulers):
        key = "thresholding" if name.startswith("DPM") else "clip_sample"
        scheduler = getattr(home, name)(variance_type=kind, **{key: clip})
        scheduler.set_timesteps(8)
        x = START[:, :3]  # the solvers of diffusers take the first three channels
        pair.append(in_a_pipeline(scheduler, torch.Generator().manual_seed(4), x=x))
    limit = LIMITS.get(name, LIMIT)
    assert all(same(a, b, limit) for a, b in zip(pair[1], pair[0], strict=True))


GIVEN: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
    ("DDPMScheduler", {}, {"timesteps": [900, 500, 100, 3]}),
    ("DPMSolverMultistepScheduler", {}, {"timesteps": [900, 500, 100, 3]}),
    ("EulerDiscreteScheduler", {}, {"timesteps": [900, 500, 100, 3]}),
    ("EulerDiscreteScheduler", {}, {"sigmas": [14.0, 3.0, 0.4, 0.0]}),
    ("HeunDiscreteScheduler", {}, {"timesteps": [900, 500, 100, 3]}),
    ("LCMScheduler", {}, {"num_inference_steps": 4, "strength": 0.6}),
    ("LCMScheduler", {}, {"num_inference_steps": 4, "original_inference_steps": 20}),
    ("TCDScheduler", {}, {"num_inference_steps": 4, "original_inference_steps": 20}),
    ("FlowMatchEulerDiscreteScheduler", {"shift": 3.0}, {"sigmas": [1.0, 0.6, 0.2]}),
    ("FlowMatchEulerDiscreteScheduler", {"shift": 3.0}, {"timesteps": [1000.0, 700.0, 200.0]}),
    (
        "FlowMatchEulerDiscreteScheduler",
        {"use_dynamic_shifting": True},
        {"num_inference_steps": 5, "mu": 0.8},
    ),
    (
        "FlowMatchEulerDiscreteScheduler",
        {"use_dynamic_shifting": True, "time_shift_type": "linear", "shift_terminal": 0.1},
        {"sigmas": [1.0, 0.6, 0.2], "mu": 2.0},
    ),
    ("FlowMatchEulerDiscreteScheduler", {"use_karras_sigmas": True}, {"sigmas": [1.0, 0.6, 0.2]}),
    (
        "DPMSolverMultistepScheduler",
        {
            "use_flow_sigmas": True,
            "use_dynamic_shifting": True,
            "prediction_type": "flow_prediction",
        },
        {"num_inference_steps": 5, "mu": 0.8},
    ),
]


@pytest.mark.parametrize(("name", "config", "given"), GIVEN)
def test_given_timesteps_sigmas_and_shifts(name: str, config: Any, given: Any) -> None:
    pair = []
    for home in (diffusers, schedulers):
        scheduler = getattr(home, name)(**config)
        scheduler.set_timesteps(**given)
        pair.append((scheduler, in_a_pipeline(scheduler, torch.Generator().manual_seed(1))))
    (peer, theirs), (own, mine) = pair
    assert torch.allclose(own.timesteps.double(), peer.timesteps.double(), rtol=1e-5, atol=1e-2)
    assert all(same(a, b, LIMIT) for a, b in zip(mine, theirs, strict=True))


def test_a_list_of_generators_gives_the_images_of_each_seed_alone() -> None:
    scheduler = schedulers.EulerAncestralDiscreteScheduler()
    runs = []
    for seeds, x in (((3, 4), START), ((3,), START[:1]), ((4,), START[1:])):
        scheduler.set_timesteps(5)
        made = [torch.Generator().manual_seed(seed) for seed in seeds]
        runs.append(in_a_pipeline(scheduler, made, x=x)[-2])
    assert torch.allclose(runs[0], torch.cat(runs[1:]), rtol=1e-6)


# bad input


def test_bad_input_is_refused_in_words(tmp_path: Path) -> None:
    with pytest.raises(
        AttributeError, match="EDMEulerScheduler has no drop-in here: its schedule is EDM"
    ):
        _ = schedulers.EDMEulerScheduler
    with pytest.raises(AttributeError, match="did you mean 'DDPMScheduler'"):
        _ = schedulers.DDPMSheduler
    assert set(LEFT_OUT) | set(NAMES) <= set(dir(diffusers))
    with pytest.raises(ValueError, match="is a schedule of EDM: take Sampler"):
        schedulers.EulerDiscreteScheduler(
            timestep_type="continuous",
            prediction_type="v_prediction",
            use_karras_sigmas=True,
            sigma_min=0.002,
            sigma_max=700.0,
        )
    with pytest.raises(ValueError, match="does not know prediction_type 'flow_prediction'"):
        schedulers.DDIMScheduler(prediction_type="flow_prediction")
    with pytest.raises(
        ValueError, match="num_inference_steps must be at most 1000, got 1000000000"
    ):
        schedulers.DDPMScheduler().set_timesteps(10**9)
    with pytest.raises(ValueError, match="invert_sigmas"):
        schedulers.FlowMatchEulerDiscreteScheduler(invert_sigmas=True)
    with pytest.raises(ValueError, match="betas"):
        schedulers.DDPMScheduler(trained_betas=[0.1, float("nan"), 0.2])
    with pytest.raises(ValueError, match="beta_end"):
        schedulers.EulerDiscreteScheduler(beta_end=float("nan"))
    with pytest.raises(ValueError, match="'epsilon' is ill-posed"):
        schedulers.DDPMScheduler(rescale_betas_zero_snr=True).set_timesteps(5)
    scheduler = schedulers.DDIMScheduler()
    scheduler.set_timesteps(5)
    with pytest.raises(ValueError, match="timestep 431 is none of this scheduler's 5 timesteps"):
        scheduler.step(START, 431, START)
    (tmp_path / "scheduler_config.json").write_text("[1]")
    before = (tmp_path / "scheduler_config.json").read_bytes()
    with pytest.raises(
        ValueError, match=r"config of DDPMScheduler must be a mapping .* got a list"
    ):
        schedulers.DDPMScheduler.from_pretrained(tmp_path)
    assert (tmp_path / "scheduler_config.json").read_bytes() == before


def test_sampling_does_not_import_diffusers() -> None:
    code = "import sys, alphabar.sampling.schedulers; assert 'diffusers' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


# host syncs


class HostReads(TorchDispatchMode):
    """Count the operations that wait for a device or copy from or to it."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = str(func)
        if any(
            word in name
            for word in ("_local_scalar_dense", "nonzero", "lift_fresh", "_to_copy", "equal")
        ):
            self.found.append(name)
        return func(*args, **(kwargs or {}))


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("name", [name for name in NAMES if name != "DPMSolverSDEScheduler"])
def test_no_step_waits_for_the_device(name: str) -> None:
    """Without ``set_begin_index`` too: the scheduler knows its own timesteps by their memory.

    The path of DPMSolverSDEScheduler is torchsde's, on the host.
    """
    scheduler = getattr(schedulers, name)()
    scheduler.set_timesteps(6)
    with HostReads() as reads:
        in_a_pipeline_without_reads(scheduler)
    assert reads.found == []


def in_a_pipeline_without_reads(scheduler: Any) -> None:
    takes = inspect.signature(scheduler.step).parameters
    x, times = START, scheduler.timesteps
    for i, t in enumerate(times):
        given = (
            {"prev_timestep": times[i + 1]}
            if "prev_timestep" in takes and i < len(times) - 1
            else {}
        )
        scheduler.scale_model_input(x, t)
        x = scheduler.step(x, t, x, **given, return_dict=False)[0]


def test_the_counter_counts() -> None:
    peer = diffusers.EulerDiscreteScheduler()
    peer.set_timesteps(6)
    with HostReads() as reads:
        in_a_pipeline_without_reads(peer)
    assert reads.found


@pytest.mark.parametrize("name", ["DDPMScheduler", "EulerDiscreteScheduler"])
def test_a_schedule_that_is_registered_later_counts(name: str) -> None:
    values = {"rescale_betas_zero_snr": True, "prediction_type": "v_prediction"}
    values |= {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
    made, own = getattr(schedulers, name)(**values), getattr(schedulers, name)()
    own.register_to_config(**values)
    t = torch.tensor([998])
    for noised in (own.add_noise, own.get_velocity) if name[0] == "D" else (own.add_noise,):
        exact = getattr(made, noised.__name__)
        assert torch.equal(noised(START[:1], START[1:], t), exact(START[:1], START[1:], t))
    assert own.schedule == made.schedule
    assert torch.allclose(own.alphas_cumprod, made.alphas_cumprod, atol=1e-6)
    assert torch.allclose(own.betas, made.betas, atol=1e-4)  # theirs, in float32


@pytest.mark.parametrize("name", ["FlowMatchEulerDiscreteScheduler", "FlowMatchLCMScheduler"])
def test_a_shift_that_is_set_later(name: str) -> None:
    for config, shift in ((1.0, 3.0), (3.0, 1.0)):
        peer, own = (getattr(home, name)(shift=config) for home in (diffusers, schedulers))
        for scheduler in (peer, own):
            scheduler.set_shift(shift)
            scheduler.set_timesteps(4)
        assert torch.allclose(own.sigmas, peer.sigmas, atol=1e-5)


def test_what_set_timesteps_cannot_do_is_an_error() -> None:
    with pytest.raises(ValueError, match="num_train_timesteps=500"):
        schedulers.HeunDiscreteScheduler().set_timesteps(4, num_train_timesteps=500)
    scheduler = schedulers.FlowMatchLCMScheduler()
    scheduler.set_scale_factors([0.5, 0.75], "bicubic")
    with pytest.raises(ValueError, match="scale factors are not possible"):
        scheduler.set_timesteps(2)
    with pytest.warns(UserWarning, match="linspace of one step starts at timestep 0"):
        schedulers.EulerDiscreteScheduler().set_timesteps(1)
