"""Schedules on disk: what is written is read back equal, diffusers reads it the same, and damage is
named.
"""

import json
import math
import os
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch

from alphabar.noising import Discrete, NoiseSchedule
from alphabar.noising.io.files import CONFIG_NAME, EXACT_NAME
from alphabar.noising.utils.atomic import require_writable, write_atomically
from alphabar.sampling import Sampler

SCHEDULES = {
    "sd": NoiseSchedule.scaled_linear(),
    "v": NoiseSchedule.scaled_linear(prediction="v_prediction"),
    "ztsnr": NoiseSchedule.scaled_linear(prediction="v_prediction").zero_terminal_snr(),
    "sample": NoiseSchedule.linear(num_train_timesteps=500, prediction="sample"),
    "cosine": NoiseSchedule.squaredcos_cap_v2(prediction="v_prediction"),
    "betas": NoiseSchedule.from_betas([0.01, 0.02, 0.1, 0.3]),
    "flow": NoiseSchedule.flow(shift=3.0),
    "sigmoid": NoiseSchedule.sigmoid(),
    "exp": NoiseSchedule.exp(prediction="sample"),
    "laplace": NoiseSchedule.laplace(),
    "laplace_diffusers": NoiseSchedule(Discrete("laplace_diffusers")),
    "ends_in_one": NoiseSchedule.from_betas([0.01, 0.02, 0.1, 1.0], "v_prediction"),
    "shifted": NoiseSchedule.scaled_linear().shifted(1.7),
    "shifted_ztsnr": NoiseSchedule.scaled_linear(prediction="v_prediction")
    .shifted(1.7)
    .zero_terminal_snr(),
    "ztsnr_shifted": NoiseSchedule.scaled_linear(prediction="v_prediction")
    .zero_terminal_snr()
    .shifted(0.6),
}
BETAS = [name for name in SCHEDULES if name != "flow"]


@pytest.mark.parametrize("name", SCHEDULES)
def test_round_trips(name: str, tmp_path: Path) -> None:
    schedule = SCHEDULES[name]
    schedule.save_pretrained(tmp_path / "scheduler")
    assert NoiseSchedule.from_pretrained(tmp_path, subfolder="scheduler") == schedule
    (tmp_path / "scheduler" / EXACT_NAME).unlink()  # from diffusers' file alone
    again = NoiseSchedule.from_pretrained(tmp_path / "scheduler")
    assert again.prediction == schedule.prediction
    assert again.has_zero_terminal_snr == schedule.has_zero_terminal_snr
    if "shifted" in name:  # its betas are written as numbers
        assert torch.allclose(again.alphas_cumprod, schedule.alphas_cumprod, rtol=1e-11, atol=0)
    else:
        assert again.fingerprint == schedule.fingerprint
    assert NoiseSchedule.from_config(json.loads(json.dumps(schedule.to_config()))) == schedule


@pytest.mark.parametrize("name", BETAS)
@pytest.mark.parametrize(
    "kind", ["DDIMScheduler", "DDPMScheduler", "EulerDiscreteScheduler", "HeunDiscreteScheduler"]
)
def test_diffusers_reads_the_same_schedule(name: str, kind: str, tmp_path: Path) -> None:
    schedule = SCHEDULES[name]
    scheduler: Any = getattr(diffusers, kind).from_pretrained(schedule.save_pretrained(tmp_path))
    assert scheduler.config["prediction_type"] == schedule.prediction.name
    assert scheduler.config["timestep_spacing"] == "trailing"
    if schedule.has_zero_terminal_snr and kind == "HeunDiscreteScheduler":
        return  # which ignores rescale_betas_zero_snr
    theirs, ours = scheduler.alphas_cumprod.double(), schedule.alphas_cumprod
    end = -1 if schedule.has_zero_terminal_snr else None  # some put 2^-24 in the place of 0
    assert torch.allclose(theirs[:end], ours[:end], rtol=2e-4, atol=1e-9)
    assert not schedule.has_zero_terminal_snr or float(theirs[-1]) <= 2.0**-24


def test_a_class_that_ignores_zero_terminal_snr_is_not_named() -> None:
    schedule = SCHEDULES["ztsnr"]
    assert (
        schedule.scheduler_config({"_class_name": "HeunDiscreteScheduler"})["_class_name"]
        == "DDIMScheduler"
    )
    assert (
        schedule.scheduler_config({"_class_name": "EulerDiscreteScheduler"})["_class_name"]
        == "EulerDiscreteScheduler"
    )
    with pytest.raises(ValueError, match="no scheduler class of diffusers is this sampler"):
        Sampler(schedule, "heun").to_diffusers()
    # DDIM has α = 0 itself, where EulerDiscrete has 2^-12
    euler = Sampler(schedule, "euler", 20).to_diffusers()
    assert schedule.scheduler_config(euler)["_class_name"] == "DDIMScheduler"


NAMED = [
    "DDIMScheduler",
    "DDPMScheduler",
    "DEISMultistepScheduler",
    "DPMSolverMultistepScheduler",
    "DPMSolverSinglestepScheduler",
    "EulerDiscreteScheduler",
    "HeunDiscreteScheduler",
    "KDPM2DiscreteScheduler",
    "LCMScheduler",
    "LMSDiscreteScheduler",
    "PNDMScheduler",
    "SASolverScheduler",
    "TCDScheduler",
    "UniPCMultistepScheduler",
    "CogVideoXDDIMScheduler",
    "CogVideoXDPMScheduler",
]


@pytest.mark.parametrize("name", BETAS)
@pytest.mark.parametrize("kind", NAMED)
def test_the_class_that_is_named_reads_all_that_the_schedule_holds(
    name: str, kind: str, tmp_path: Path
) -> None:
    """Whichever class a sampler asks for: the file names it or another, and that one has the
    schedule's numbers.
    """
    schedule = SCHEDULES[name]
    config = schedule.scheduler_config({"_class_name": kind})
    scheduler: Any = getattr(diffusers, config["_class_name"]).from_config(config)
    assert config["_class_name"] in (kind, "DDIMScheduler")
    theirs, ours = scheduler.alphas_cumprod.double(), schedule.alphas_cumprod
    end = -1 if schedule.has_zero_terminal_snr else None
    assert torch.allclose(theirs[:end], ours[:end], rtol=2e-4, atol=1e-9)
    assert not schedule.has_zero_terminal_snr or float(theirs[-1]) <= 2.0**-24
    again = NoiseSchedule.from_diffusers(json.loads(json.dumps(config)))
    assert torch.allclose(again.alphas_cumprod, ours, rtol=1e-11, atol=0)
    assert again.has_zero_terminal_snr == schedule.has_zero_terminal_snr


def test_cogvideox_keeps_its_shift_by_name() -> None:
    schedule = (
        NoiseSchedule.scaled_linear(prediction="v_prediction").shifted(3**0.5).zero_terminal_snr()
    )
    config = schedule.scheduler_config({"_class_name": "CogVideoXDDIMScheduler"})
    assert config["snr_shift_scale"] == pytest.approx(3.0, rel=1e-15)
    assert (config["beta_schedule"], config["trained_betas"], config["rescale_betas_zero_snr"]) == (
        "scaled_linear",
        None,
        True,
    )
    assert NoiseSchedule.from_diffusers(config) == schedule
    plain = NoiseSchedule.scaled_linear().scheduler_config({"_class_name": "CogVideoXDPMScheduler"})
    assert plain["snr_shift_scale"] == 1.0  # the class's own default is 3
    assert "snr_shift_scale" not in schedule.scheduler_config()


@pytest.mark.parametrize(
    "kind",
    ["DPMSolverMultistep", "DPMSolverSinglestep", "DEISMultistep", "UniPCMultistep", "SASolver"],
)
def test_solvers_that_sample_a_flow(kind: str) -> None:
    config = SCHEDULES["flow"].scheduler_config({"_class_name": f"{kind}Scheduler"})
    scheduler = getattr(diffusers, config["_class_name"]).from_config(config)
    assert type(scheduler).__name__ == f"{kind}Scheduler"
    scheduler.set_timesteps(10)
    sigmas = scheduler.sigmas.double()[:-1]
    time = SCHEDULES["flow"].curve.time_at_noise_level(sigmas)
    # 1 to 1 / T
    assert torch.allclose(time.diff(), torch.full((9,), -0.0999, dtype=torch.float64), atol=1e-5)
    assert NoiseSchedule.from_diffusers(config) == SCHEDULES["flow"]


@pytest.mark.parametrize(
    ("sampling", "named"),
    [
        (
            {"_class_name": "DPMSolverMultistepScheduler", "use_karras_sigmas": True},
            "FlowMatchEulerDiscreteScheduler",
        ),
        ({"_class_name": "EulerDiscreteScheduler"}, "FlowMatchEulerDiscreteScheduler"),
        ({"_class_name": "DDIMScheduler"}, "FlowMatchEulerDiscreteScheduler"),
        ({"_class_name": "FlowMatchHeunDiscreteScheduler"}, "FlowMatchHeunDiscreteScheduler"),
        ({}, "FlowMatchEulerDiscreteScheduler"),
    ],
)
def test_a_class_that_ignores_the_flow_is_not_named(sampling: dict[str, Any], named: str) -> None:
    config = SCHEDULES["flow"].scheduler_config(sampling)
    scheduler = getattr(diffusers, config["_class_name"]).from_config(config)
    assert config["_class_name"] == named
    assert scheduler.config["shift"] == 3.0
    assert NoiseSchedule.from_diffusers(config) == SCHEDULES["flow"]


FLUX = {
    "_class_name": "FlowMatchEulerDiscreteScheduler",
    "base_image_seq_len": 256,
    "base_shift": 0.5,
    "max_image_seq_len": 4096,
    "max_shift": 1.15,
    "num_train_timesteps": 1000,
    "shift": 3.0,
    "use_dynamic_shifting": True,
}


def test_dynamic_shifting_needs_the_tokens(tmp_path: Path) -> None:
    with pytest.raises(
        ValueError,
        match=r"use_dynamic_shifting: its shift depends on the size of the image; give tokens=",
    ):
        NoiseSchedule.from_diffusers(FLUX)
    assert NoiseSchedule.from_diffusers(
        FLUX, tokens=1024
    ) == NoiseSchedule.flow().shifted_for_tokens(1024)
    other = NoiseSchedule.from_diffusers(
        FLUX | {"max_shift": 0.9, "time_shift_type": "linear"}, tokens=4096
    )
    assert other == NoiseSchedule.flow(shift=0.9)
    (tmp_path / CONFIG_NAME).write_text(json.dumps(FLUX))
    assert NoiseSchedule.from_pretrained(tmp_path, tokens=256).curve.shift == pytest.approx(
        math.exp(0.5)
    )
    for config in (FLUX | {"use_dynamic_shifting": False}, SCHEDULES["sd"].scheduler_config()):
        with pytest.raises(
            ValueError, match="tokens are for a config that says use_dynamic_shifting"
        ):
            NoiseSchedule.from_diffusers(config, tokens=256)


def test_configs_of_other_schedules() -> None:
    wan = {
        "_class_name": "UniPCMultistepScheduler",
        "use_flow_sigmas": True,
        "flow_shift": 5.0,
        "prediction_type": "flow_prediction",
    }
    assert NoiseSchedule.from_diffusers(wan) == NoiseSchedule.flow(shift=5.0)
    assert NoiseSchedule.from_diffusers(
        {"_class_name": "CogVideoXDDIMScheduler"}
    ).curve == Discrete(snr_shift_scale=3.0)
    peers = {"_class_name": "DDPMScheduler", "beta_schedule": "laplace"}
    assert NoiseSchedule.from_diffusers(peers).curve.beta_schedule == "laplace_diffusers"
    ignored = {"_class_name": "DDIMScheduler", "snr_shift_scale": 3.0}  # by that class too
    with pytest.warns(UserWarning, match="DDIMScheduler does not know snr_shift_scale=3.0"):
        assert NoiseSchedule.from_diffusers(ignored) == NoiseSchedule.from_diffusers(
            {"_class_name": "DDIMScheduler"}
        )
    edm = {"_class_name": "EDMEulerScheduler", "sigma_max": 50.0, "prediction_type": "epsilon"}
    assert NoiseSchedule.from_diffusers(edm) == NoiseSchedule.karras(sigma_max=50.0)
    with pytest.raises(
        ValueError,
        match=r"^a config of CosineDPMSolverMultistepScheduler does not say its noise schedule in a form that is known",
    ):
        NoiseSchedule.from_diffusers(
            {"_class_name": "CosineDPMSolverMultistepScheduler", "prediction_type": "epsilon"}
        )
    with pytest.raises(ValueError, match=r"^invert_sigmas runs time from noise to data"):
        NoiseSchedule.from_diffusers(
            {"_class_name": "FlowMatchEulerDiscreteScheduler", "invert_sigmas": True}
        )


def test_diffusers_reads_a_flow(tmp_path: Path) -> None:
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler.from_pretrained(
        SCHEDULES["flow"].save_pretrained(tmp_path)
    )
    assert scheduler.config["shift"] == 3.0


def test_a_sampler_is_written_too(tmp_path: Path) -> None:
    schedule = SCHEDULES["v"]
    schedule.save_pretrained(
        tmp_path, sampler=Sampler(schedule, "DPM++ 2M Karras", 20, rounding="nearest")
    )
    config = json.loads((tmp_path / CONFIG_NAME).read_text())
    assert config["_class_name"] == "DPMSolverMultistepScheduler"
    assert config["use_karras_sigmas"] is True
    assert diffusers.DPMSolverMultistepScheduler.from_pretrained(tmp_path).config[
        "use_karras_sigmas"
    ]


@pytest.mark.parametrize(
    "kind", ["DDPM", "DDIM", "EulerDiscrete", "HeunDiscrete", "KDPM2Discrete", "LCM", "PNDM"]
)
def test_keys_left_out_mean_the_defaults_of_that_class(kind: str) -> None:
    scheduler: Any = getattr(diffusers, f"{kind}Scheduler")()
    ours = NoiseSchedule.from_diffusers({"_class_name": f"{kind}Scheduler"}).alphas_cumprod
    assert torch.allclose(scheduler.alphas_cumprod.double(), ours, rtol=2e-4)


def test_contradicting_files_are_named(tmp_path: Path) -> None:
    SCHEDULES["v"].save_pretrained(tmp_path)
    (tmp_path / CONFIG_NAME).write_text(json.dumps(SCHEDULES["sd"].scheduler_config()))
    with pytest.raises(
        ValueError, match=r"contradict each other.*v_prediction.*epsilon.*remove the wrong one"
    ):
        NoiseSchedule.from_pretrained(tmp_path)


@pytest.mark.parametrize("name", ["sd", "shifted"])
def test_a_small_contradiction_is_one(name: str, tmp_path: Path) -> None:
    SCHEDULES[name].save_pretrained(tmp_path)
    other = NoiseSchedule.scaled_linear(beta_end=0.01200001)
    (tmp_path / CONFIG_NAME).write_text(
        json.dumps((other if name == "sd" else other.shifted(1.7)).scheduler_config())
    )
    with pytest.raises(ValueError, match="contradict each other"):
        NoiseSchedule.from_pretrained(tmp_path)


def test_the_betas_of_little_noise_are_exact() -> None:
    schedule = NoiseSchedule.scaled_linear().shifted(0.01)
    config = schedule.scheduler_config()
    exact = schedule.sigma(torch.zeros(1, dtype=torch.float64)).item() ** 2
    assert config["trained_betas"][0] == pytest.approx(exact, rel=1e-13, abs=0)


def test_missing_and_corrupt_files(tmp_path: Path) -> None:
    with pytest.raises(
        FileNotFoundError, match=r"neither noise_schedule\.json nor scheduler_config\.json"
    ):
        NoiseSchedule.from_pretrained(tmp_path)
    (tmp_path / CONFIG_NAME).write_text('{"_class_name": "DDIM')
    with pytest.raises(
        ValueError,
        match=r"scheduler_config\.json' is not valid JSON .* write it anew with save_pretrained",
    ):
        NoiseSchedule.from_pretrained(tmp_path)
    (tmp_path / CONFIG_NAME).write_text("[]")
    with pytest.raises(ValueError, match="not a diffusers scheduler config"):
        NoiseSchedule.from_pretrained(tmp_path)


def edited(**changes: Any) -> dict[str, Any]:
    return SCHEDULES["ztsnr"].to_config() | changes


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({}, "expected the keys 'curve' and 'prediction'"),
        ("flow", "expected the keys"),
        (edited(version=9), "version 9.*update alphabar"),
        (edited(prediction="sample"), "fingerprint .* edited or damaged"),
        (
            edited(prediction="v_predicton"),
            "unknown prediction type 'v_predicton'; did you mean 'v_prediction'",
        ),
        (edited(curve={"kind": "flwo"}), "unknown curve 'flwo'; did you mean 'flow'"),
        (
            edited(curve={"kind": "flow", "shfit": 3.0}),
            "unknown setting of a flow curve 'shfit'; did you mean 'shift'",
        ),
        (edited(prediction="epsilon"), "ill-posed"),
    ],
)
def test_damaged_configs(config: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        NoiseSchedule.from_config(config)


def test_an_edited_value_is_noticed() -> None:
    config = SCHEDULES["sd"].to_config()
    config["curve"]["beta_end"] = 0.0121
    with pytest.raises(ValueError, match=r"says fingerprint .* describes .*beta_end=0\.0121"):
        NoiseSchedule.from_config(config)


@pytest.mark.parametrize(
    "schedule",
    [NoiseSchedule.linear(prediction="score"), NoiseSchedule.flow(prediction="v_prediction")],
    ids=str,
)
def test_what_diffusers_cannot_say_is_refused(schedule: NoiseSchedule) -> None:
    with pytest.raises(ValueError, match="diffusers"):
        schedule.scheduler_config()


def test_a_failed_write_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_atomically(tmp_path / "a.json", "old")

    def fail(*_: Any) -> None:
        raise OSError("disk full")

    monkeypatch.setattr("os.replace", fail)
    with pytest.raises(OSError, match="disk full"):
        write_atomically(path, "new")
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]


def test_an_unwritable_folder_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(
        OSError, match=r"cannot write to the output folder .*name a folder that can be written"
    ):
        require_writable(tmp_path / "file" / "out")


def test_files_are_as_readable_as_the_umask_says(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        path = write_atomically(tmp_path / "a.json", "{}")
    finally:
        os.umask(before)
    assert path.stat().st_mode & 0o777 == 0o640


@pytest.mark.parametrize("name", SCHEDULES)
def test_a_schedule_is_a_scheduler_and_a_scheduler_a_schedule(name: str) -> None:
    schedule = SCHEDULES[name]
    scheduler = schedule.to_diffusers()
    assert {**scheduler.config} == {**scheduler.config, **schedule.scheduler_config()} | {
        key: value for key, value in scheduler.config.items() if key.startswith("_")
    }
    again = NoiseSchedule.from_diffusers(scheduler)
    assert again.prediction == schedule.prediction
    assert torch.allclose(again.alphas_cumprod, schedule.alphas_cumprod, rtol=1e-11, atol=0)
    like = schedule.to_diffusers(like=diffusers.EulerDiscreteScheduler(use_karras_sigmas=True))
    if name != "flow":
        assert like.config["use_karras_sigmas"] is True
    with pytest.raises(ValueError, match="a scheduler of diffusers or its config is needed"):
        schedule.to_diffusers(like=3)
