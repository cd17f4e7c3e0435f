"""Schedules on disk: what is written is read back equal, diffusers reads it the same, and damage is named."""

import json
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch

from alphabar.noising import NoiseSchedule
from alphabar.noising.files import require_writable, write_atomically
from alphabar.noising.pretrained import CONFIG_NAME, EXACT_NAME, from_diffusers, to_diffusers
from alphabar.sampling import Sampler

SCHEDULES = {
    "sd": NoiseSchedule.scaled_linear(),
    "v": NoiseSchedule.scaled_linear(prediction="v_prediction"),
    "ztsnr": NoiseSchedule.scaled_linear(prediction="v_prediction").zero_terminal_snr(),
    "sample": NoiseSchedule.linear(num_train_timesteps=500, prediction="sample"),
    "cosine": NoiseSchedule.squaredcos_cap_v2(prediction="v_prediction"),
    "betas": NoiseSchedule.from_betas([0.01, 0.02, 0.1, 0.3]),
    "flow": NoiseSchedule.flow(shift=3.0),
}


@pytest.mark.parametrize("name", SCHEDULES)
def test_round_trips(name: str, tmp_path: Path) -> None:
    schedule = SCHEDULES[name]
    schedule.save_pretrained(tmp_path / "scheduler")
    assert NoiseSchedule.from_pretrained(tmp_path, subfolder="scheduler") == schedule
    (tmp_path / "scheduler" / EXACT_NAME).unlink()  # from diffusers' file alone
    assert NoiseSchedule.from_pretrained(tmp_path / "scheduler").fingerprint == schedule.fingerprint
    assert NoiseSchedule.from_config(json.loads(json.dumps(schedule.to_config()))) == schedule


@pytest.mark.parametrize("name", [name for name in SCHEDULES if name != "flow"])
@pytest.mark.parametrize("kind", ["DDIMScheduler", "DDPMScheduler", "EulerDiscreteScheduler", "HeunDiscreteScheduler"])
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
    assert to_diffusers(schedule, Sampler(schedule, "heun").to_diffusers())["_class_name"] == "DDIMScheduler"
    assert to_diffusers(schedule, Sampler(schedule, "euler").to_diffusers())["_class_name"] == "EulerDiscreteScheduler"


def test_diffusers_reads_a_flow(tmp_path: Path) -> None:
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler.from_pretrained(SCHEDULES["flow"].save_pretrained(tmp_path))
    assert scheduler.config["shift"] == 3.0


def test_a_sampler_is_written_too(tmp_path: Path) -> None:
    schedule = SCHEDULES["v"]
    schedule.save_pretrained(tmp_path, sampler=Sampler(schedule, "DPM++ 2M Karras", 20))
    config = json.loads((tmp_path / CONFIG_NAME).read_text())
    assert config["_class_name"] == "DPMSolverMultistepScheduler"
    assert config["use_karras_sigmas"] is True
    assert diffusers.DPMSolverMultistepScheduler.from_pretrained(tmp_path).config["use_karras_sigmas"]


@pytest.mark.parametrize("kind", ["DDPM", "DDIM", "EulerDiscrete", "HeunDiscrete", "KDPM2Discrete", "LCM", "PNDM"])
def test_keys_left_out_mean_the_defaults_of_that_class(kind: str) -> None:
    scheduler: Any = getattr(diffusers, f"{kind}Scheduler")()
    ours = from_diffusers({"_class_name": f"{kind}Scheduler"}).alphas_cumprod
    assert torch.allclose(scheduler.alphas_cumprod.double(), ours, rtol=2e-4)


def test_contradicting_files_are_named(tmp_path: Path) -> None:
    SCHEDULES["v"].save_pretrained(tmp_path)
    (tmp_path / CONFIG_NAME).write_text(json.dumps(to_diffusers(SCHEDULES["sd"])))
    with pytest.raises(ValueError, match=r"contradict each other.*v_prediction.*epsilon.*remove the wrong one"):
        NoiseSchedule.from_pretrained(tmp_path)


def test_missing_and_corrupt_files(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"neither noise_schedule\.json nor scheduler_config\.json"):
        NoiseSchedule.from_pretrained(tmp_path)
    (tmp_path / CONFIG_NAME).write_text('{"_class_name": "DDIM')
    with pytest.raises(
        ValueError, match=r"scheduler_config\.json' is not valid JSON .* write it anew with save_pretrained"
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
        (edited(prediction="v_predicton"), "unknown prediction type 'v_predicton'; did you mean 'v_prediction'"),
        (edited(curve={"kind": "flwo"}), "unknown curve 'flwo'; did you mean 'flow'"),
        (edited(curve={"kind": "flow", "shfit": 3.0}), "unknown setting of a flow curve 'shfit'; did you mean 'shift'"),
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
    "schedule", [NoiseSchedule.linear(prediction="score"), NoiseSchedule.flow(prediction="v_prediction")], ids=str
)
def test_what_diffusers_cannot_say_is_refused(schedule: NoiseSchedule) -> None:
    with pytest.raises(ValueError, match="diffusers"):
        to_diffusers(schedule)


def test_a_failed_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
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
    with pytest.raises(OSError, match=r"cannot write to the output folder .*name a folder that can be written"):
        require_writable(tmp_path / "file" / "out")
