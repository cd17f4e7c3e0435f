"""Every option of every scheduler class of diffusers: read as the sampler that the class is, or
refused, or told; never in silence. The oracle is diffusers itself, run as a pipeline runs it.
"""

from __future__ import annotations

import inspect
import runpy
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from diffusers import schedulers as peers

import test_agreement_diffusers as agreement
from alphabar.noising import NoiseSchedule
from alphabar.sampling import Sampler
from alphabar.sampling.interop.diffusers_classes import CLASSES
from alphabar.sampling.interop.diffusers_reading import (
    NO_EFFECT,
    NO_SAMPLER,
    READ_HERE,
    REFUSED,
    STANDALONE_CLASSES,
    TOLD,
    options_of_class,
    sampler_arguments,
)
from test_diffusers_configs import as_a_pipeline, distance, from_its_start

STEPS, TOKENS = 7, 1024
SAME = 5e-5
FLOW = {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}
VALUES: dict[str, list[Any]] = {
    "num_train_timesteps": [500],
    "beta_start": [0.0005],
    "beta_end": [0.015],
    "beta_schedule": ["linear", "scaled_linear", "squaredcos_cap_v2"],
    "trained_betas": [torch.linspace(0.0005, 0.015, 1000).tolist()],
    "variance_type": ["fixed_small", "fixed_small_log", "fixed_large"],
    "clip_sample": [False],
    "clip_sample_range": [2.0],
    "prediction_type": ["epsilon", "v_prediction", "sample", "flow_prediction"],
    "thresholding": [False],
    "dynamic_thresholding_ratio": [0.9],
    "sample_max_value": [1.5],
    "timestep_spacing": ["linspace", "leading", "trailing"],
    "steps_offset": [1],
    "rescale_betas_zero_snr": [True],
    "set_alpha_to_one": [True, False],
    "snr_shift_scale": [2.0],
    "skip_prk_steps": [True],
    "interpolation_type": ["log_linear"],
    "use_karras_sigmas": [True],
    "use_exponential_sigmas": [True],
    "use_beta_sigmas": [True],
    "use_lu_lambdas": [True],
    "sigma_min": [0.05],
    "sigma_max": [10.0],
    "timestep_type": ["continuous"],
    "final_sigmas_type": ["zero", "sigma_min"],
    "noise_sampler_seed": [3],
    "solver_order": [1, 2, 3],
    "algorithm_type": [
        *("dpmsolver", "dpmsolver++", "sde-dpmsolver", "sde-dpmsolver++", "deis"),
        *("data_prediction", "noise_prediction"),
    ],
    "solver_type": ["midpoint", "heun", "logrho", "bh1", "bh2"],
    "lower_order_final": [True, False],
    "euler_at_final": [True],
    "use_flow_sigmas": [True],
    "flow_shift": [3.0],
    "lambda_min_clipped": [-5.1],
    "use_dynamic_shifting": [True],
    "time_shift_type": ["linear"],
    "predict_x0": [False],
    "disable_corrector": [[0, 1]],
    "solver_p": [peers.DDIMScheduler()],
    "tau_func": [lambda t: 0.5],
    "shift_terminal": [0.1],
    "predictor_order": [1, 3],
    "corrector_order": [1, 3],
    "original_inference_steps": [40],
    "timestep_scaling": [5.0],
    "shift": [3.0],
    "invert_sigmas": [True],
    "stochastic_sampling": [True],
    "base_shift": [0.6],
    "max_shift": [1.3],
    "base_image_seq_len": [300],
    "max_image_seq_len": [5000],
    "sigma_data": [1.0],
    "sigma_schedule": ["exponential"],
    "rho": [5.0],
    "upscale_mode": ["nearest"],
    "scale_factors": [[1.0] * 10],
    "eta": [1.0],
    "snr": [0.2],
    "correct_steps": [2],
    "sampling_eps": [1e-4],
}
"""Values of every option; a class is tried with those that it takes."""
BASES: list[dict[str, Any]] = [
    {},
    {"timestep_spacing": "trailing", "prediction_type": "v_prediction"},
    {"use_karras_sigmas": True, "final_sigmas_type": "sigma_min"},
    {"use_karras_sigmas": True},
    {"use_exponential_sigmas": True},
    {"use_beta_sigmas": True},
    FLOW,
    {**FLOW, "use_dynamic_shifting": True},
    {**FLOW, "use_karras_sigmas": True},
    {"use_dynamic_shifting": True},
    {"use_dynamic_shifting": True, "use_exponential_sigmas": True},
    {"sigma_schedule": "exponential"},
    {"sigma_min": 0.002, "sigma_max": 700.0, "use_karras_sigmas": True}
    | {"timestep_type": "continuous", "prediction_type": "v_prediction"},
]
"""What the options are tried beside; the first alone where the test is to be fast."""
FLOAT32 = {
    ("UnCLIPScheduler", None): "without its clipping it diverges in float32",
    ("DEISMultistepScheduler", "squaredcos_cap_v2"): "its table of the cosine betas is in float32",
    ("SASolverScheduler", "v_prediction"): "test_sa_solver_on_sigmas has its levels in float64",
    ("DPMSolverMultistepInverseScheduler", "sample"): "it divides by the sigma of t = 0",
}
"""Cases where the peer's own float32 is further from the exact numbers than ``SAME``."""
SOLVERS = (
    *("DEISMultistep", "DPMSolverMultistepScheduler", "DPMSolverSinglestep", "SASolver"),
    "UniPCMultistep",
)
FAILING: list[tuple[tuple[str, ...], dict[str, Any], str]] = [
    (
        SOLVERS,
        {"use_karras_sigmas": True, "beta_schedule": "squaredcos_cap_v2"},
        "it shows a time twice, and counts its steps by their times",
    ),
    (
        SOLVERS,
        {"use_flow_sigmas": True, "use_dynamic_shifting": True, "time_shift_type": "linear"},
        "it asserts the exponential kind",
    ),
    (("SASolver",), {**FLOW, "algorithm_type": "noise_prediction"}, "it lacks that conversion"),
]
"""Configs that the classes raise an error of their own for, or end in what is no number."""


@pytest.fixture(autouse=True)
def our_brownian_path(monkeypatch: pytest.MonkeyPatch) -> None:
    path = "diffusers.schedulers.scheduling_dpmsolver_sde.BrownianTreeNoiseSampler"
    monkeypatch.setattr(path, lambda *_, **__: agreement.Path())
    diffusers.logging.set_verbosity_error()


def keys_of(name: str) -> dict[str, Any]:
    parameters = inspect.signature(getattr(peers, name)).parameters
    return {key: p.default for key, p in parameters.items() if key != "kwargs"}


def on_exact_levels(scheduler: Any, sampler: Sampler) -> None:
    """Give a class that computes 1 - sigma in float32, which loses three digits at the start of a
    flow, the levels in float64; they must be its own to float32.
    """
    own, exact = scheduler.sigmas.double(), torch.tensor(sampler.sigmas, dtype=torch.float64)
    assert torch.allclose(own, exact, rtol=1e-6, atol=0)
    exact[-1] = exact[-2] if own[-1] == own[-2] else exact[-1]
    scheduler.sigmas = exact


def their_samples(
    name: str, config: dict[str, Any], sampler: Sampler, monkeypatch: pytest.MonkeyPatch
) -> torch.Tensor | None:
    """The samples of the class; None where it raises, or ends in what is no number."""
    try:
        scheduler = getattr(peers, name)(**config)
        setup = {}
        if config.get("use_dynamic_shifting"):
            line = {"base_shift": 0.5, "max_shift": 1.15}
            line |= {"base_image_seq_len": 256, "max_image_seq_len": 4096}
            b, m, low, high = (config.get(key, value) for key, value in line.items())
            setup = {"mu": b + (m - b) * (TOKENS - low) / (high - low)}
        set_timesteps = scheduler.set_timesteps

        def placed(steps: int) -> None:
            set_timesteps(steps, **setup)
            if config.get("use_flow_sigmas"):
                on_exact_levels(scheduler, sampler)

        scheduler.set_timesteps = placed
        samples = as_a_pipeline(scheduler, STEPS, monkeypatch)
    except (AssertionError, IndexError, ValueError, TypeError, AttributeError):
        return None
    return samples if bool(samples.isfinite().all()) else None


def outcome(name: str, config: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> str:
    """'same', 'told', 'refused', or how far apart the two are."""
    tokens = TOKENS if config.get("use_dynamic_shifting") else None
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            sampler = Sampler.from_diffusers({"_class_name": name, **config}, STEPS, tokens)
        except ValueError as error:
            assert len(str(error)) > 20
            return "refused"
    if caught:
        return "told"
    theirs = their_samples(name, config, sampler, monkeypatch)
    if theirs is None:
        failing = any(
            name.startswith(kinds) and values.items() <= config.items()
            for kinds, values, _ in FAILING
        )
        return "told" if failing or name in STANDALONE_CLASSES else "it fails, and nobody is told"
    apart = distance(from_its_start(sampler, monkeypatch), theirs)
    return "same" if apart < SAME else f"{apart:.1e} apart"


def cases(name: str, bases: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    keys = keys_of(name)
    off = {key: False for key in ("clip_sample", "thresholding") if key in keys}
    if name in NO_EFFECT:
        off = {key: value for key, value in off.items() if key not in NO_EFFECT[name]}
    for base in bases:
        if set(base) <= set(keys):
            yield {**off, **base}
            for key in keys:
                for value in VALUES[key]:
                    yield {**off, **base, key: value}


def wrong(
    name: str, bases: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> list[tuple[dict[str, Any], str]]:
    silent = []
    for config in cases(name, bases):
        said = outcome(name, config, monkeypatch)
        known = any(
            name == kind and (value is None or value in config.values())
            for kind, value in FLOAT32
            if "apart" in said or value is None
        )
        if said not in ("same", "told", "refused") and not known:
            short = {k: v for k, v in config.items() if not isinstance(v, list)}
            silent.append((short, said))
    return silent


READ = sorted({*CLASSES, *STANDALONE_CLASSES} - set(NO_SAMPLER))
NOT_RUN = {"CogVideoXDPMScheduler": "its step wants the timestep before"}
SLOW = ("KDPM2DiscreteScheduler", "KDPM2AncestralDiscreteScheduler")
RUN = [
    pytest.param(name, marks=pytest.mark.slow) if name in SLOW else name
    for name in READ
    if name not in NOT_RUN
]


@pytest.mark.parametrize("name", RUN)
def test_no_option_is_read_in_silence(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert wrong(name, BASES[:1], monkeypatch) == []


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in READ if name not in NOT_RUN])
def test_no_option_is_read_in_silence_beside_others(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert wrong(name, BASES[1:], monkeypatch) == []


@pytest.mark.parametrize("name", READ)
def test_the_tables_hold_every_option_of_every_class(name: str) -> None:
    """An option that diffusers adds fails here until it is read, refused or told."""
    assert {*options_of_class(name)} == {*keys_of(name)}
    assert {*keys_of(name)} <= {*VALUES}, "no value is tried"


@pytest.mark.parametrize("name", READ)
def test_the_defaults_of_options_without_effect(name: str) -> None:
    keys = keys_of(name)
    assert {key: keys[key] for key in NO_EFFECT.get(name, {})} == {
        key: default for key, (default, _) in NO_EFFECT.get(name, {}).items()
    }
    for table in (TOLD, REFUSED, READ_HERE):
        assert {*table.get(name, ())} <= {*keys}


def test_every_class_of_diffusers_is_read_or_refused_by_name() -> None:
    """A class that diffusers adds fails here."""
    classes = {
        name
        for name in dir(peers)
        if name.endswith("Scheduler") and inspect.isclass(getattr(peers, name))
    }
    assert classes == {*READ, *NO_SAMPLER}
    for name in NO_SAMPLER:
        with pytest.raises(ValueError, match=f"{name} is not read as a sampler: "):
            Sampler.from_diffusers({"_class_name": name})


def test_stable_video_diffusion_is_edm() -> None:
    """Its scheduler_config.json: sigmas from 700 to 0.002 at log(sigma) / 4, a network of -F."""
    config = {
        "_class_name": "EulerDiscreteScheduler",
        "beta_schedule": "scaled_linear",
        "prediction_type": "v_prediction",
        "sigma_max": 700.0,
        "sigma_min": 0.002,
        "steps_offset": 1,
        "timestep_spacing": "leading",
        "timestep_type": "continuous",
        "use_karras_sigmas": True,
    }
    sampler = Sampler.from_diffusers(config, 25)
    scheduler = peers.EulerDiscreteScheduler.from_config(config)
    scheduler.set_timesteps(25)
    assert sampler.timesteps == pytest.approx(scheduler.timesteps.tolist(), rel=1e-5)
    assert sampler.sigmas == pytest.approx(scheduler.sigmas.tolist(), rel=1e-5)
    assert sampler.init_noise_scale == pytest.approx(float(scheduler.init_noise_sigma), rel=1e-6)
    schedule = NoiseSchedule.from_diffusers(config)
    again = NoiseSchedule.from_config(schedule.to_config())
    assert again == schedule and schedule.prediction.to_config()["negative"] is True


def test_wide_readings_are_told_once_and_in_words() -> None:
    made = sampler_arguments(
        {"_class_name": "DDIMScheduler", "clip_sample": False, "skip_prk_steps": True, "eta": 0.0},
        10,
    )
    assert made.remarks == (
        "DDIMScheduler: it does not read skip_prk_steps=True, and the sampler is made without",
    )
    made = sampler_arguments({"_class_name": "LCMScheduler", "timestep_spacing": "trailing"}, 4)
    assert "without effect: timestep_spacing='trailing' (its times are" in made.remarks[0]


def test_the_page_of_the_classes_is_up_to_date() -> None:
    """``python docs/schedulers.py`` writes it."""
    path = Path(__file__).parent.parent / "docs" / "schedulers.py"
    found: dict[str, Any] = runpy.run_path(str(path))
    assert found["PAGE"].read_text(encoding="utf-8") == found["page"]()


WRITTEN = [
    (name, config)
    for name in READ
    for config in BASES[:1] + BASES[3:4] + BASES[6:7]
    if CLASSES.get(name, CLASSES["EDMEulerScheduler"]).written and set(config) <= set(keys_of(name))
    if name not in SLOW
]


@pytest.mark.parametrize(("name", "config"), WRITTEN, ids=str)
def test_what_is_read_is_written_and_read_again(name: str, config: dict[str, Any]) -> None:
    off = {key: False for key in ("clip_sample", "thresholding") if key in keys_of(name)}
    said = {"_class_name": name, **off, **config}
    if "Inverse" in name and config:
        with pytest.raises(ValueError, match="leave"):
            Sampler.from_diffusers(said, STEPS)
        return
    sampler = Sampler.from_diffusers(said, STEPS)
    written = sampler.schedule.scheduler_config(sampler.to_diffusers())
    assert written["_class_name"] == name
    again = Sampler.from_diffusers(written, STEPS)
    assert again == sampler
    assert again.schedule.scheduler_config(again.to_diffusers()) == written
