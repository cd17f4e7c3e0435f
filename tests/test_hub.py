"""Samplers and schedules from folders and repositories of the hub, without a network: the cache is
laid out as the hub's client does it.
"""

from __future__ import annotations

import json
import os
import warnings
from pathlib import Path
from typing import Any

import diffusers
import pytest

from alphabar.noising import NoiseSchedule
from alphabar.noising.io.files import CONFIG_NAME, EXACT_NAME
from alphabar.sampling import Sampler
from test_from_diffusers import STABLE_DIFFUSION

COMMIT = "0123456789abcdef0123456789abcdef01234567"
CONFIG = {"_class_name": "PNDMScheduler", "skip_prk_steps": True} | STABLE_DIFFUSION
SD = NoiseSchedule.scaled_linear()


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


def cached(cache: Path, name: str, files: dict[str, Any], revision: str = "main") -> Path:
    """A repository as it lies in the cache after a download."""
    repository = cache / f"models--{name.replace('/', '--')}"
    snapshot = repository / "snapshots" / COMMIT
    (repository / "refs").mkdir(parents=True, exist_ok=True)
    (repository / "refs" / revision).write_text(COMMIT)
    for path, content in files.items():
        (snapshot / path).parent.mkdir(parents=True, exist_ok=True)
        (snapshot / path).write_text(json.dumps(content))
    return cache


@pytest.mark.parametrize("subfolder", [None, "scheduler"])
def test_a_pipeline_of_the_hub(subfolder: str | None, tmp_path: Path) -> None:
    cache = cached(tmp_path, "someone/model", {f"scheduler/{CONFIG_NAME}": CONFIG})
    hub = {"cache_dir": cache, "local_files_only": True}
    assert NoiseSchedule.from_pretrained("someone/model", subfolder, **hub) == SD
    sampler = Sampler.from_pretrained("someone/model", subfolder, steps=10, **hub)
    peer: Any = diffusers.PNDMScheduler.from_pretrained(
        "someone/model", subfolder="scheduler", **hub
    )
    peer.set_timesteps(10)
    assert sampler.method.name == "plms" and sampler.steps == 10
    # theirs shows the second time twice, in the place of a first step of higher order
    assert sampler.timesteps == list(dict.fromkeys(map(float, peer.timesteps.tolist())))


def test_revisions_and_files_at_the_root(tmp_path: Path) -> None:
    flow = NoiseSchedule.flow(3.0)
    files = {EXACT_NAME: flow.to_config(), CONFIG_NAME: flow.scheduler_config()}
    cache = cached(tmp_path, "someone/model", files, revision="v2")
    hub = {"cache_dir": str(cache)}
    assert NoiseSchedule.from_pretrained("someone/model", revision="v2", **hub) == flow
    assert Sampler.from_pretrained("someone/model", revision="v2", steps=4, **hub).schedule == flow
    with pytest.raises(FileNotFoundError, match=r"revision 'v3'.*not asked or did not answer"):
        NoiseSchedule.from_pretrained("someone/model", revision="v3", **hub)


def test_what_is_not_there_is_said_with_what_was_tried(tmp_path: Path) -> None:
    with pytest.raises(
        FileNotFoundError,
        match=r"no folder 'someone/other', and no scheduler_config.json or scheduler/scheduler_"
        r"config.json in the hub repository 'someone/other'.*download it first, or go online",
    ):
        Sampler.from_pretrained("someone/other", cache_dir=tmp_path)
    for name in ("nowhere", "a/b/c", "../a/b", "/no/folder"):
        with pytest.raises(FileNotFoundError, match="neither a folder nor the name of a hub"):
            NoiseSchedule.from_pretrained(name)
    with pytest.raises(FileNotFoundError, match=r"no schedule in '.*' nor in '.*/scheduler'"):
        NoiseSchedule.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match="unknown option of the hub 'revison'; did you mean"):
        Sampler.from_pretrained("someone/model", revison="v2")


def test_an_unreachable_hub_is_asked_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub.errors import LocalEntryNotFoundError

    asked: list[bool] = []

    def unreachable(*_: Any, local_files_only: bool = False, **__: Any) -> str:
        asked.append(local_files_only)
        raise LocalEntryNotFoundError("no route to host")

    monkeypatch.setattr("huggingface_hub.hf_hub_download", unreachable)
    with pytest.raises(FileNotFoundError, match="no route to host"):
        NoiseSchedule.from_pretrained("someone/model", cache_dir=tmp_path)
    assert asked == [False, True, True, True]


def test_refusals_of_the_hub_are_said(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: Any, **__: Any) -> str:
        raise RuntimeError("401: gated\nask for access")

    monkeypatch.setattr("huggingface_hub.hf_hub_download", refused)
    with pytest.raises(FileNotFoundError, match="someone/model' on the hub: 401: gated ask for"):
        NoiseSchedule.from_pretrained("someone/model")


# local folders


WRITTEN = [
    Sampler(SD, "DPM++ 2M Karras", 8, rounding="nearest"),
    Sampler(SD.with_prediction("v_prediction").zero_terminal_snr(), "ddim", 8),
    Sampler(NoiseSchedule.flow(3.0), "FlowMatchEulerDiscreteScheduler", 8),
    Sampler(SD, "EulerDiscreteScheduler", 8),
    Sampler(SD, "UniPCMultistepScheduler", 8),
]


@pytest.mark.parametrize("sampler", WRITTEN, ids=lambda s: f"{s.name} {s.grid}")
def test_what_is_saved_is_read_again(sampler: Sampler, tmp_path: Path) -> None:
    folder = sampler.save_pretrained(tmp_path / "scheduler")
    assert folder == tmp_path / "scheduler"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        again = Sampler.from_pretrained(tmp_path, steps=sampler.steps)
    assert again.schedule == sampler.schedule
    assert again.sigmas == pytest.approx(sampler.sigmas, rel=1e-6)
    assert again.timesteps == pytest.approx(sampler.timesteps, abs=1e-6)
    name = json.loads((folder / CONFIG_NAME).read_text())["_class_name"]
    peer = getattr(diffusers, name).from_pretrained(folder)
    peer.set_timesteps(sampler.steps)
    assert peer.timesteps.tolist() == pytest.approx(sampler.timesteps, rel=1e-5, abs=1e-3)
    if hasattr(peer, "sigmas"):
        assert peer.sigmas.tolist() == pytest.approx(sampler.sigmas, rel=2e-5)


def test_what_no_class_is_is_not_written(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="the nearest, DPMSolverMultistepScheduler, differs: "):
        Sampler(SD, "res_multistep").save_pretrained(tmp_path / "scheduler")
    assert not (tmp_path / "scheduler").exists()
    Sampler(SD, "res_multistep").save_pretrained(tmp_path, nearest=True)
    assert Sampler.from_pretrained(tmp_path).method.name == "dpm_solver_multistep"


def test_a_schedule_alone_names_no_sampler(tmp_path: Path) -> None:
    (tmp_path / EXACT_NAME).write_text(json.dumps(SD.to_config()))
    with pytest.raises(FileNotFoundError, match=f"only {EXACT_NAME}, which says a schedule and no"):
        Sampler.from_pretrained(tmp_path)


BAD = {
    "an unknown class": ({"_class_name": "NoScheduler", "beta_schedule": "linear"}, "unknown"),
    "betas that are no numbers": ({**CONFIG, "trained_betas": [0.1, None]}, "trained_betas"),
    "a text for a number": ({**CONFIG, "beta_end": "0.012"}, "beta_end must be a finite number"),
    "a text for a flag": (
        {"_class_name": "EulerDiscreteScheduler", "use_karras_sigmas": "no"},
        "use_karras_sigmas must be true or false",
    ),
    "no class": ({"beta_schedule": "linear"}, "it has no _class_name"),
    "a list": ([1, 2], "needed, got a list of 2"),
    "a prediction that the class does not know": (
        {"_class_name": "PNDMScheduler", "prediction_type": "sample"},
        "PNDMScheduler: prediction_type 'sample' is not read with this schedule",
    ),
    "an order of no number": (
        {"_class_name": "DPMSolverMultistepScheduler", "solver_order": "two"},
        "order must be",
    ),
    "two grids": (
        {"_class_name": "HeunDiscreteScheduler", "use_karras_sigmas": True}
        | {"use_beta_sigmas": True},
        "takes one of use_karras_sigmas",
    ),
    "v on a flow": (
        {"_class_name": "DPMSolverMultistepScheduler", "use_flow_sigmas": True}
        | {"prediction_type": "v_prediction"},
        "prediction_type 'v_prediction' is not read with this flow",
    ),
}


@pytest.mark.parametrize("what", BAD)
def test_bad_files_are_refused_and_stay_as_they_are(what: str, tmp_path: Path) -> None:
    content, words = BAD[what]
    path = tmp_path / CONFIG_NAME
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=words) as refused:
        Sampler.from_pretrained(tmp_path)
    assert str(path) in str(refused.value)
    assert os.listdir(tmp_path) == [CONFIG_NAME] and json.loads(path.read_text()) == content


def test_numbers_of_steps_out_of_reach(tmp_path: Path) -> None:
    (tmp_path / CONFIG_NAME).write_text(json.dumps(CONFIG))
    for steps in (10**9, 0, -1):
        with pytest.raises(ValueError, match="steps must be between 1 and the 1000"):
            Sampler.from_pretrained(tmp_path, steps=steps)
    (tmp_path / CONFIG_NAME).write_text('{"_class_name": "DDIMScheduler", "beta_end": NaN}')
    with pytest.raises(ValueError, match="NaN is no JSON"):
        Sampler.from_pretrained(tmp_path)
