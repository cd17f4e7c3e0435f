"""Schedulers and configs of diffusers as samplers: the same samples as the class, and the same config again."""

from __future__ import annotations

import inspect
import warnings
from typing import Any

import diffusers
import pytest

import test_agreement_diffusers as agreement
from alphabar.noising import NoiseSchedule
from alphabar.sampling import Sampler
from alphabar.sampling.interop.diffusers_classes import CLASSES, CLIPPED
from test_diffusers_configs import as_a_pipeline, distance, from_its_start

STABLE_DIFFUSION = {
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "timestep_spacing": "leading",
    "steps_offset": 1,
}
CONFIGS: dict[str, dict[str, Any]] = {
    "defaults": {},
    "karras": {"use_karras_sigmas": True},
    "exponential": {"use_exponential_sigmas": True},
    "trailing": {"timestep_spacing": "trailing"},
    "zero SNR": {
        "rescale_betas_zero_snr": True,
        "prediction_type": "v_prediction",
        "timestep_spacing": "trailing",
    },
    "Stable Diffusion": STABLE_DIFFUSION,
}
NOT_RUN = {
    "CogVideoXDPMScheduler": "its step wants the timestep before",
    "UnCLIPScheduler": "without its clipping it diverges in float32",
    "CMStochasticIterativeScheduler": "its config is not read as a sampler: its network's time",
}


@pytest.fixture(autouse=True)
def our_brownian_path(monkeypatch: pytest.MonkeyPatch) -> None:
    path = "diffusers.schedulers.scheduling_dpmsolver_sde.BrownianTreeNoiseSampler"
    monkeypatch.setattr(path, lambda *_, **__: agreement.Path())
    diffusers.logging.set_verbosity_error()


INVERSE = "DPMSolverMultistepInverseScheduler"


def keys_of(name: str) -> set[str]:
    return set(inspect.signature(getattr(diffusers, name)).parameters)


def made(name: str, config: str) -> Any:
    off = {key: False for key in ("clip_sample", "thresholding") if key in keys_of(name)}
    return getattr(diffusers, name)(**CONFIGS[config], **off)


READ = [
    (name, config)
    for name in CLASSES
    for config, values in CONFIGS.items()
    if name not in NOT_RUN and set(values) <= keys_of(name)
]
REFUSED = [(name, config) for name, config in READ if name == INVERSE and config != "defaults"]


@pytest.mark.parametrize(("name", "config"), [pair for pair in READ if pair not in REFUSED])
def test_a_scheduler_is_read_as_its_sampler(
    name: str, config: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    scheduler = made(name, config)
    if config == "zero SNR" and CLASSES[name].clamped:
        with pytest.warns(UserWarning, match="it starts at alpha = 0.00024, and the sampler at 0"):
            Sampler.from_diffusers(scheduler, 10)
        return
    sampler = Sampler.from_diffusers(scheduler, 10)
    theirs = as_a_pipeline(scheduler, 10, monkeypatch)
    assert distance(from_its_start(sampler, monkeypatch), theirs) < 5e-5


@pytest.mark.parametrize(("name", "config"), REFUSED)
def test_what_no_sampler_is_is_refused(name: str, config: str) -> None:
    with pytest.raises(ValueError, match=r"is no (grid|sampler) here"):
        Sampler.from_diffusers(made(name, config), 10)


@pytest.mark.parametrize("name", sorted(CLIPPED))
def test_clipping_is_told(name: str) -> None:
    assert inspect.signature(getattr(diffusers, name)).parameters["clip_sample"].default is True
    config = {"_class_name": name, "beta_schedule": "scaled_linear"}
    with pytest.warns(UserWarning, match=f"{name}: it clips the clean sample; .* clip=1.0 to"):
        Sampler.from_diffusers(config, 10)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Sampler.from_diffusers({**config, "clip_sample": False}, 10)


def test_no_other_class_clips_by_default() -> None:
    for name in CLASSES.keys() - CLIPPED - {"CogVideoXDDIMScheduler", "CogVideoXDPMScheduler"}:
        parameter = inspect.signature(getattr(diffusers, name)).parameters.get("clip_sample")
        assert parameter is None or parameter.default is False, name


@pytest.mark.parametrize("name", NOT_RUN)
def test_the_others_are_read_or_refused_in_words(name: str) -> None:
    scheduler = getattr(diffusers, name)()
    if "config" in NOT_RUN[name]:
        with pytest.raises(ValueError, match=r"CMStoch.* is not read as a sampler: its network"):
            Sampler.from_diffusers(scheduler)
    else:
        assert Sampler.from_diffusers(scheduler, 10).steps == 10


@pytest.mark.parametrize(
    "name", ["DDIMScheduler", "EulerDiscreteScheduler", "UniPCMultistepScheduler", "DDPMScheduler"]
)
def test_what_is_written_is_read_again(name: str) -> None:
    schedule = NoiseSchedule.scaled_linear()
    sampler = Sampler(schedule, name, 10)
    written = schedule.scheduler_config(sampler.to_diffusers())
    again = Sampler.from_diffusers(written, 10)
    assert again.schedule.fingerprint == schedule.fingerprint
    assert again.table == sampler.table and again.init_noise_scale == sampler.init_noise_scale
    assert schedule.scheduler_config(again.to_diffusers()) == written


def test_bad_configs_are_refused_in_words() -> None:
    with pytest.raises(ValueError, match="unknown scheduler class 'DDIMSheduler'; did you mean"):
        Sampler.from_diffusers({"_class_name": "DDIMSheduler", "beta_schedule": "linear"})
    with pytest.raises(
        ValueError, match="a scheduler of diffusers or its config is needed, got 'a/"
    ):
        Sampler.from_diffusers("a/folder")
    with pytest.raises(ValueError, match="not a diffusers scheduler config"):
        Sampler.from_diffusers({"steps": 5})
