"""alphabar convert: a model says its schedule to all tools afterwards, its weights are the same bytes,
and a killed run leaves the source as it was.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from safetensors.torch import load_file

from alphabar.noising import NoiseSchedule
from alphabar.noising.io.files import CONFIG_NAME, EXACT_NAME
from alphabar.training import convert_path, inspect_path
from alphabar.training.cli import main
from test_inspect import INTERFACE, ZERO, model

V = NoiseSchedule.scaled_linear(prediction="v_prediction")
SD: dict[str, Any] = {
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "prediction_type": "v_prediction",
}
LEADING = {"_class_name": "EulerDiscreteScheduler", "timestep_spacing": "leading"} | SD
LEADING |= {"rescale_betas_zero_snr": True, "interpolation_type": "linear"}


def pipeline(folder: Path, config: dict[str, Any]) -> Path:
    (folder / "scheduler").mkdir(parents=True)
    (folder / "unet").mkdir()
    index = {"_class_name": "DDPMPipeline", "scheduler": ["diffusers", config["_class_name"]]}
    (folder / "model_index.json").write_text(json.dumps(index))
    (folder / "unet" / "weights.bin").write_bytes(bytes(range(256)) * 64)
    (folder / "scheduler" / CONFIG_NAME).write_text(json.dumps(config))
    return folder


def content(path: Path) -> dict[str, bytes]:
    files = [path] if path.is_file() else [p for p in path.rglob("*") if p.is_file()]
    return {str(p.relative_to(path.parent)): p.read_bytes() for p in files}


def test_a_file_says_its_schedule_everywhere(tmp_path: Path) -> None:
    path = model(tmp_path / "a.safetensors", author="me")
    with pytest.raises(
        ValueError, match=r"does not say its noise schedule; say it with --schedule"
    ):
        convert_path(path, in_place=True)
    before = content(path)
    dry = convert_path(path, schedule=ZERO, dry_run=True)
    assert content(path) == before and os.listdir(tmp_path) == [path.name]
    assert dry.changes[:2] == ("tensor: v_pred added", "tensor: ztsnr added")
    assert "would be written to" in str(dry)
    made = convert_path(path, tmp_path / "b.safetensors", schedule=ZERO)
    assert made.changes == (*dry.changes[:-1], dry.changes[-1].replace("a.", "b."))
    assert content(path) == before
    found = inspect_path(made.target)
    assert found.schedule == ZERO and not found.missing and not found.contradictions
    weights = load_file(made.target)
    for name, tensor in INTERFACE.items():
        assert torch.equal(weights[name], tensor)
    assert NoiseSchedule.from_pretrained(tmp_path / "b.scheduler") == ZERO
    again = convert_path(made.target, in_place=True)
    assert again.changes == () and "nothing to convert" in str(again)
    assert content(Path(made.target)) == content(tmp_path / "b.safetensors")


def test_a_pipeline_starts_from_pure_noise(tmp_path: Path) -> None:
    folder = pipeline(tmp_path / "model", LEADING)
    assert inspect_path(folder).contradictions, "leading never visits the last timestep"
    before = content(folder)
    made = convert_path(folder, tmp_path / "fixed")
    assert content(folder) == before
    assert f"{CONFIG_NAME}: timestep_spacing 'leading' -> 'trailing'" in made.changes
    found = inspect_path(tmp_path / "fixed")
    assert found.schedule == ZERO and not found.contradictions and not found.missing
    config = json.loads((tmp_path / "fixed" / "scheduler" / CONFIG_NAME).read_text())
    assert config["_class_name"] == "EulerDiscreteScheduler"  # which reads all of it
    assert config["interpolation_type"] == "linear", "options of sampling are kept"
    peer = diffusers.EulerDiscreteScheduler.from_pretrained(tmp_path / "fixed" / "scheduler")
    peer.set_timesteps(10)
    assert int(peer.timesteps[0]) == 999
    weights = {k: v for k, v in content(tmp_path / "fixed").items() if "weights" in k}
    assert list(weights.values()) == [bytes(range(256)) * 64]
    assert convert_path(tmp_path / "fixed", in_place=True).changes == ()
    assert convert_path(tmp_path / "fixed", tmp_path / "copy").changes == ()
    assert inspect_path(tmp_path / "copy").schedule == ZERO
    with pytest.raises(ValueError, match="name a folder beside it"):
        convert_path(folder, folder / "inside")


def test_a_schedule_of_edm_leaves_no_key(tmp_path: Path) -> None:
    """Stable Video Diffusion's config, which EulerDiscreteScheduler reads as EDM."""
    edm = {"timestep_type": "continuous", "use_karras_sigmas": True}
    edm |= {"sigma_min": 0.002, "sigma_max": 700.0, "prediction_type": "v_prediction"}
    folder = pipeline(tmp_path / "model", SD | edm | {"_class_name": "EulerDiscreteScheduler"})
    convert_path(folder, in_place=True, schedule=ZERO)
    assert NoiseSchedule.from_pretrained(folder / "scheduler") == ZERO


def test_a_class_that_ignores_the_schedule_is_replaced(tmp_path: Path) -> None:
    """HeunDiscreteScheduler does not rescale its betas, whatever its config says."""
    folder = pipeline(tmp_path / "model", LEADING | {"_class_name": "HeunDiscreteScheduler"})
    made = convert_path(folder, in_place=True, schedule=ZERO)
    assert f"{CONFIG_NAME}: _class_name 'HeunDiscreteScheduler' -> 'DDIMScheduler'" in made.changes
    index = json.loads((folder / "model_index.json").read_text())
    assert index["scheduler"] == ["diffusers", "DDIMScheduler"], "the class that a pipeline loads"
    peer = diffusers.DDIMScheduler.from_pretrained(folder / "scheduler")
    assert float(peer.alphas_cumprod[-1]) == 0.0
    assert inspect_path(folder).schedule == ZERO


def test_a_checkpoint_gets_a_folder_beside_it(tmp_path: Path) -> None:
    path = tmp_path / "last.ckpt"
    torch.save({"state_dict": {}, "noise_schedule": ZERO.to_config()}, path)
    before = path.read_bytes()
    with pytest.raises(ValueError, match=r"'last.scheduler' beside it .* take --in-place"):
        convert_path(path, tmp_path / "other.ckpt")
    made = convert_path(path, in_place=True)
    assert path.read_bytes() == before and len(made.changes) == 1
    assert NoiseSchedule.from_pretrained(tmp_path / "last.scheduler") == ZERO
    assert convert_path(path, in_place=True).changes == ()


def test_what_contradicts_is_not_decided_here(tmp_path: Path) -> None:
    path = model(tmp_path / "a.safetensors", "v_pred", modelspec__prediction_type="epsilon")
    with pytest.raises(ValueError, match=r"contradicts itself \(prediction type: .*--schedule"):
        convert_path(path, in_place=True)
    convert_path(path, in_place=True, schedule=V)
    assert inspect_path(path).schedule == V


def test_nothing_is_overwritten(tmp_path: Path) -> None:
    path = model(tmp_path / "a.safetensors")
    other = model(tmp_path / "b.safetensors")
    before = content(other)
    with pytest.raises(ValueError, match="exists, and nothing is overwritten"):
        convert_path(path, other, schedule=V)
    with pytest.raises(ValueError, match=r"say where to write: --out PATH, or --in-place"):
        convert_path(path, schedule=V)
    with pytest.raises(ValueError, match="say where to write"):
        convert_path(path, tmp_path / "c", in_place=True, schedule=V)
    with pytest.raises(ValueError, match=r"must end in .safetensors"):
        convert_path(path, tmp_path / "c", schedule=V)
    with pytest.raises(FileNotFoundError):
        convert_path(tmp_path / "nowhere", in_place=True)
    assert content(other) == before


def _killed(path: Path, out: Path | None, call: int) -> None:
    """Convert, and be killed at the n-th renaming or removal of a file."""
    left = [call]

    def dying(function: Any) -> Any:
        def die(*arguments: Any, **named: Any) -> Any:
            left[0] -= 1
            if left[0] < 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*arguments, **named)

        return die

    os.replace, os.rename, os.unlink = dying(os.replace), dying(os.rename), dying(os.unlink)
    convert_path(path, out, in_place=out is None, schedule=ZERO)
    os._exit(0)


@pytest.mark.parametrize("kind", ["file", "folder", "both files"])
@pytest.mark.parametrize("in_place", [True, False])
def test_a_killed_run_leaves_one_schedule(kind: str, in_place: bool, tmp_path: Path) -> None:
    context, done, call = multiprocessing.get_context("fork"), False, 0
    for call in range(6):
        home = tmp_path / str(call)
        if kind == "file":
            path = model(home / "a.safetensors")
        else:
            path = pipeline(home / "model", {"_class_name": "DDIMScheduler"} | SD)
            if kind == "both files":
                V.save_pretrained(path / "scheduler")
        before = content(path)
        out = None if in_place else home / ("out" + path.suffix)
        child = context.Process(target=_killed, args=(path, out, call))
        child.start()
        child.join()
        done = child.exitcode == 0
        if in_place and kind != "file":
            assert NoiseSchedule.from_pretrained(path) in (V, ZERO)
        else:
            whole = content(path)
            assert whole == before or (in_place and inspect_path(path).schedule == ZERO)
            assert out is None or not out.exists() or inspect_path(out).schedule == ZERO
        if done:
            break
    assert done and call > 0, "it was killed before, and came to its end once"


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = model(tmp_path / "a.safetensors")
    item = ["--schedule", "scaled_linear:prediction=v_prediction", "--zero_snr"]
    assert main(["convert", str(path), *item]) == 2
    assert main(["convert", str(path), "--zero_snr", "--in-place"]) == 2
    assert "--zero_snr is for --schedule" in capsys.readouterr().err
    assert main(["convert", str(path), "--dry-run", *item]) == 0
    assert "tensor: v_pred added" in capsys.readouterr().out and len(os.listdir(tmp_path)) == 1
    assert main(["convert", str(path), "--in-place", *item]) == 0
    assert inspect_path(path).schedule == ZERO
    assert (tmp_path / "a.scheduler" / EXACT_NAME).is_file()
