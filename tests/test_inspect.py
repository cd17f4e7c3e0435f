"""What files say of their schedule: read from headers, written without touching a weight, compared
in words.
"""

import json
import os
import re
import struct
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from alphabar.noising import LOSSES, NOISES, WEIGHTINGS, NoiseSchedule, Noising
from alphabar.noising.io.files import CONFIG_NAME, EXACT_NAME
from alphabar.noising.prediction import KarrasF
from alphabar.training import inspect_path, schedule_from_checkpoint, write_markers
from alphabar.training.checkpoints import sd_scripts
from alphabar.training.checkpoints.claims import OF_TRAINING
from alphabar.training.checkpoints.safetensors import MARKERS, METADATA_KEYS, OWN_KEY, read_header
from alphabar.training.cli import main
from callbacks_toy import files

EPSILON = NoiseSchedule.scaled_linear()
V = NoiseSchedule.scaled_linear(prediction="v_prediction")
ZERO = V.zero_terminal_snr()
FLOW = NoiseSchedule.flow(shift=3.0)
INTERFACE = {
    "model.diffusion_model.out.2.weight": torch.randn(4, 3),
    "first_stage_model.b": torch.randn(5).half(),
    "flags": torch.tensor([True, False, True]),  # three bytes: what follows is not aligned
}
DIFFUSERS = {"conv_in.weight": torch.randn(4, 3), "conv_in.bias": torch.randn(3).bfloat16()}


def model(
    path: Path, *markers: str, tensors: dict[str, torch.Tensor] = INTERFACE, **metadata: str
) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    empty = {name: torch.tensor([]) for name in markers}
    save_file(
        {**tensors, **empty},
        path,
        {key.replace("__", "."): value for key, value in metadata.items()},
    )
    return path


# Writing


@pytest.mark.parametrize(
    ("schedule", "markers", "metadata"),
    [
        (EPSILON, [], ("epsilon", "False")),
        (V, ["v_pred"], ("v", "False")),
        (ZERO, ["v_pred", "ztsnr"], ("v", "True")),
        (ZERO.with_prediction("sample"), [], (None, "True")),
        (FLOW, [], (None, None)),
        (
            NoiseSchedule.cosine(),
            [],
            ("v", None),
        ),  # no interface knows that curve, whatever v_pred says
    ],
)
@pytest.mark.parametrize("tensors", [INTERFACE, DIFFUSERS], ids=["interface", "diffusers"])
def test_markers_for_every_schedule(
    tmp_path: Path,
    schedule: NoiseSchedule,
    markers: list[str],
    metadata: Any,
    tensors: dict[str, torch.Tensor],
) -> None:
    path = model(
        tmp_path / "a.safetensors",
        *MARKERS,
        tensors=tensors,
        author="me",
        modelspec__prediction_type="old",
    )
    before = read_header(path)
    assert write_markers(path, schedule) == path
    loaded = load_file(path)
    assert set(loaded) == {*tensors, *(markers if tensors is INTERFACE else [])}
    for name, value in tensors.items():
        assert loaded[name].dtype == value.dtype and torch.equal(loaded[name], value)
    assert all(loaded[name].shape == (0,) for name in markers if name in loaded)
    with safe_open(path, "pt") as file:
        said = file.metadata()
    word, zero = metadata
    assert (
        said["author"] == "me" and NoiseSchedule.from_config(json.loads(said[OWN_KEY])) == schedule
    )
    assert (said.get("modelspec.prediction_type"), said.get("modelspec.predict_key")) == (
        word,
        word,
    )
    assert said.get("ss_zero_terminal_snr") == zero
    assert read_header(path).start % 8 == 0 and before.start % 8 == 0


def test_weights_are_copied_byte_for_byte_and_elsewhere_if_wished(tmp_path: Path) -> None:
    path = model(tmp_path / "a.safetensors")
    whole = path.read_bytes()
    out = write_markers(path, ZERO, tmp_path / "deep/b.safetensors")
    assert path.read_bytes() == whole
    assert out.read_bytes()[read_header(out).start :] == whole[read_header(path).start :]
    assert files(tmp_path) == ["a.safetensors", "deep/b.safetensors"]
    write_markers(write_markers(out, EPSILON), ZERO)
    assert set(read_header(out).metadata) == set(METADATA_KEYS)  # once and again leave the same
    os.symlink(out, tmp_path / "link.safetensors")
    write_markers(tmp_path / "link.safetensors", EPSILON)
    assert (tmp_path / "link.safetensors").is_symlink() and "v_pred" not in read_header(out).tensors


def test_a_write_that_fails_leaves_the_file(tmp_path: Path, monkeypatch: Any) -> None:
    path = model(tmp_path / "a.safetensors")
    whole = path.read_bytes()

    def full(*_: Any) -> None:
        raise OSError("no space left")

    monkeypatch.setattr("shutil.copyfileobj", full)
    with pytest.raises(OSError, match="no space left"):
        write_markers(path, ZERO)
    assert path.read_bytes() == whole and files(tmp_path) == ["a.safetensors"]


def test_a_marker_with_values_is_kept_or_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    save_file({**INTERFACE, "v_pred": torch.ones(2)}, path)
    assert load_file(write_markers(path, V, tmp_path / "b.safetensors"))["v_pred"].tolist() == [
        1,
        1,
    ]
    with pytest.raises(ValueError, match="a tensor 'v_pred' with values"):
        write_markers(path, EPSILON)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"abc",
        struct.pack("<Q", 2**60) + b"{}",
        struct.pack("<Q", 2) + b"[]",
        struct.pack("<Q", 9) + b'{"a": 1} ',
        struct.pack("<Q", 50) + b"{}",
        struct.pack("<Q", 56) + b'{"a":{"dtype":"F32","shape":[9],"data_offsets":[0,36]}} ',
    ],
)
def test_damaged_files_say_so(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.safetensors").write_bytes(content)
    for act in (read_header, inspect_path, lambda path: write_markers(path, V)):
        with pytest.raises(ValueError, match=r"a.safetensors' is damaged, or no safetensors file"):
            act(tmp_path / "a.safetensors")
    assert (tmp_path / "a.safetensors").read_bytes() == content


# Reading


@pytest.mark.parametrize("schedule", [EPSILON, V, ZERO, FLOW, NoiseSchedule.karras()])
def test_what_was_written_is_read_whole(tmp_path: Path, schedule: NoiseSchedule) -> None:
    path = write_markers(model(tmp_path / "a.safetensors"), schedule)
    found = inspect_path(path)
    assert found.schedule == schedule and found.prediction == schedule.prediction.name
    assert found.missing == () and found.contradictions == ()
    assert f"trained with: {schedule}" in str(found)


def config(folder: Path, **changes: Any) -> Path:
    """A diffusers pipeline whose scheduler says this; None leaves a key out."""
    plain = {
        "_class_name": "DDIMScheduler",
        "beta_schedule": "scaled_linear",
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "prediction_type": "v_prediction",
        "rescale_betas_zero_snr": True,
        "timestep_spacing": "trailing",
    }
    content = {key: value for key, value in {**plain, **changes}.items() if value is not None}
    (folder / "scheduler").mkdir(parents=True, exist_ok=True)
    (folder / "scheduler" / CONFIG_NAME).write_text(json.dumps(content))
    (folder / "model_index.json").write_text('{"_class_name": "StableDiffusionPipeline"}')
    return folder


def unsaid(tmp_path: Path, content: Any) -> Path:
    torch.save(content, tmp_path / "a.ckpt")
    return tmp_path / "a.ckpt"


def yaml(tmp_path: Path, text: str) -> Path:
    (tmp_path / "a.yaml").write_text(text)
    return model(tmp_path / "a.safetensors")


# how it is made; prediction, zero terminal SNR; what is missing; what contradicts
CASES: dict[str, tuple[Any, Any, list[str], list[str]]] = {
    "nothing": (lambda p: model(p / "a.safetensors"), (None, None), ["everything: neither"], []),
    "v_pred alone": (
        lambda p: model(p / "a.safetensors", "v_pred"),
        ("v_prediction", None),
        ["schedule: nothing"],
        [],
    ),
    "both markers": (
        lambda p: model(p / "a.safetensors", "v_pred", "ztsnr"),
        ("v_prediction", True),
        ["schedule: nothing"],
        [],
    ),
    "ztsnr alone": (
        lambda p: model(p / "a.safetensors", "ztsnr"),
        (None, True),
        ["tensor v_pred beside ztsnr", "prediction type: tools will guess", "schedule: nothing"],
        [],
    ),
    "metadata alone, as sd-scripts leaves a v model": (
        lambda p: model(
            p / "a.safetensors", modelspec__prediction_type="v", ss_zero_terminal_snr="True"
        ),
        ("v_prediction", True),
        ["tensor v_pred: ComfyUI", "tensor ztsnr: they do not", "schedule: nothing"],
        [],
    ),
    "no ztsnr, as OneTrainer leaves it": (
        lambda p: model(p / "a.safetensors", "v_pred", ss_zero_terminal_snr="True"),
        ("v_prediction", True),
        ["tensor ztsnr: they do not", "schedule: nothing"],
        [],
    ),
    "a LoRA": (
        lambda p: model(
            p / "a.safetensors",
            tensors=DIFFUSERS,
            ss_zero_terminal_snr="False",
            modelspec__predict_key="v",
        ),
        ("v_prediction", False),
        ["schedule: nothing"],
        [],
    ),
    "marker against metadata": (
        lambda p: model(p / "a.safetensors", "v_pred", modelspec__prediction_type="epsilon"),
        (None, None),
        ["schedule: nothing"],
        [
            "prediction type: v_prediction (tensor v_pred) against epsilon (metadata "
            "modelspec.prediction_type)"
        ],
    ),
    "marker against its sidecar": (
        lambda p: (
            EPSILON.save_pretrained(p / "scheduler")
            and model(p / "a.safetensors", "v_pred", "ztsnr")
        ),
        (None, None),
        [],
        [
            "prediction type: v_prediction (tensor v_pred) against epsilon "
            "(scheduler/noise_schedule.json, ",
            "zero terminal SNR: yes (tensor ztsnr) against no (scheduler/noise_schedule.json, ",
        ],
    ),
    "a yaml beside": (
        lambda p: yaml(p, "model:\n  params:\n    parameterization: 'v'\n"),
        ("v_prediction", None),
        ["tensor v_pred", "schedule: nothing"],
        [],
    ),
    "a yaml of sgm": (
        lambda p: yaml(
            p,
            "scaling_config:\n  target: sgm.modules.diffusionmodules.denoiser_scaling.EpsScaling\n",
        ),
        ("epsilon", None),
        ["schedule: nothing"],
        [],
    ),
    "a word nobody knows": (
        lambda p: model(p / "a.safetensors", modelspec__prediction_type="vv"),
        (None, None),
        ["prediction type: tools will guess", "schedule: nothing"],
        [],
    ),
    "a pipeline": (lambda p: config(p / "pipe"), ("v_prediction", True), [], []),
    "a component of a pipeline": (
        lambda p: model(config(p / "pipe") / "unet/model.safetensors", tensors=DIFFUSERS),
        ("v_prediction", True),
        [],
        [],
    ),
    "a pipeline without its scheduler": (
        lambda p: (config(p / "pipe") / "scheduler" / CONFIG_NAME).unlink() or p / "pipe",
        (None, None),
        ["everything: neither"],
        [],
    ),
    "keys left out": (
        lambda p: config(
            p / "pipe", prediction_type=None, beta_end=None, rescale_betas_zero_snr=False
        ),
        ("epsilon", False),
        [
            "scheduler/scheduler_config.json leaves out beta_end, prediction_type: filled with the "
            "defaults of DDIM"
        ],
        [],
    ),
    "zero terminal SNR that is not sampled from": (
        lambda p: config(p / "pipe", timestep_spacing="leading"),
        ("v_prediction", True),
        [],
        [
            "rescale_betas_zero_snr with timestep_spacing='leading', which does not sample from "
            "the last timestep"
        ],
    ),
    "epsilon with zero terminal SNR": (
        lambda p: config(p / "pipe", prediction_type="epsilon"),
        (None, None),
        ["prediction type", "schedule: nothing"],
        ["'epsilon' is ill-posed on a schedule with zero terminal SNR"],
    ),
    "two files that differ": (
        lambda p: (
            FLOW.save_pretrained(p)
            and config(p)
            and V.save_pretrained(p / "scheduler")
            and _exact(p, FLOW)
        ),
        (None, False),
        [],
        [
            "prediction type: flow_prediction (scheduler/noise_schedule.json) against v_prediction",
            "schedule: ",
        ],
    ),
    "an embedded schedule": (
        lambda p: unsaid(p, {"noise_schedule": ZERO.to_config(), "state_dict": {}}),
        ("v_prediction", True),
        [],
        [],
    ),
    "a damaged embedded schedule": (
        lambda p: unsaid(p, {"noise_schedule": {"curve": {}, "prediction": "v"}, "state_dict": {}}),
        (None, None),
        ["prediction type", "schedule: nothing"],
        ["key noise_schedule: "],
    ),
    "hyperparameters": (
        lambda p: unsaid(
            p, {"hyper_parameters": {"parameterization": "v", "rescale_betas_zero_snr": True}}
        ),
        ("v_prediction", True),
        ["schedule: nothing"],
        [],
    ),
    "hyperparameters against the schedule": (
        lambda p: unsaid(
            p,
            {
                "hyper_parameters": {"prediction_type": "epsilon"},
                "noise_schedule": ZERO.to_config(),
            },
        ),
        (None, True),
        [],
        [
            "prediction type: v_prediction (key noise_schedule) against epsilon (hyperparameter "
            "prediction_type)"
        ],
    ),
    "a checkpoint beside its folder": (
        lambda p: (
            V.save_pretrained(p / "scheduler") and unsaid(p, {"state_dict": {"w": torch.ones(2)}})
        ),
        ("v_prediction", False),
        ["embedded schedule: without the files beside it"],
        [],
    ),
    "markers in a ckpt": (
        lambda p: unsaid(p, {"state_dict": {"v_pred": torch.tensor([])}}),
        ("v_prediction", None),
        ["schedule: nothing"],
        [],
    ),
    "a LoRA of sd-scripts for SD 2.1 768": (
        lambda p: model(
            p / "a.safetensors",
            tensors=DIFFUSERS,
            ss_v2="True",
            ss_base_model_version="sd_v2_v",
            ss_min_snr_gamma="5.0",
            ss_noise_offset="None",
            modelspec__architecture="stable-diffusion-v2-768-v/lora",
        ),
        ("v_prediction", None),
        ["schedule: nothing"],
        [],
    ),
    "a LoRA of sd-scripts for SD 1.5": (
        lambda p: model(
            p / "a.safetensors",
            tensors=DIFFUSERS,
            ss_v2="False",
            ss_base_model_version="sd_v1",
            ss_zero_terminal_snr="False",
            modelspec__architecture="stable-diffusion-v1/lora",
            modelspec__prediction_type="epsilon",
        ),
        ("epsilon", False),
        [],  # its betas are fixed
        [],
    ),
    "a LoRA of sd-scripts for SDXL leaves it open": (
        lambda p: model(
            p / "a.safetensors",
            tensors=DIFFUSERS,
            ss_base_model_version="sdxl_base_v1-0",
            modelspec__architecture="stable-diffusion-xl-v1-base/lora",
        ),
        (None, None),
        ["prediction type: tools will guess", "schedule: nothing"],
        [],
    ),
    "a LoRA of sd-scripts for Flux": (
        lambda p: model(
            p / "a.safetensors",
            tensors=DIFFUSERS,
            ss_base_model_version="flux1",
            ss_discrete_flow_shift="3.1582",
            modelspec__architecture="flux-1-dev/lora",
        ),
        ("flow_prediction", None),
        ["schedule: nothing"],
        [],
    ),
    "Stable Diffusion 3, of which sd-scripts says epsilon": (
        lambda p: model(
            p / "a.safetensors",
            modelspec__architecture="stable-diffusion-3-m",
            modelspec__prediction_type="epsilon",
        ),
        ("flow_prediction", None),
        ["schedule: nothing"],
        [],
    ),
    "an architecture against the prediction type": (
        lambda p: model(
            p / "a.safetensors",
            tensors=DIFFUSERS,
            modelspec__architecture="stable-diffusion-v2-768-v/lora",
            modelspec__prediction_type="epsilon",
        ),
        (None, None),
        ["schedule: nothing"],
        [
            "prediction type: epsilon (metadata modelspec.prediction_type) against v_prediction "
            "(metadata modelspec.architecture)"
        ],
    ),
    "a pipeline whose class does not read a key": (
        lambda p: config(p / "pipe", _class_name="HeunDiscreteScheduler"),
        ("v_prediction", False),
        ["HeunDiscreteScheduler does not know rescale_betas_zero_snr=True"],
        [],
    ),
    "CosXL": (
        lambda p: model(p / "a.safetensors", "edm_vpred.sigma_max", "v_pred"),
        ("v_prediction", None),
        ["schedule: nothing"],
        [],
    ),
}


def _exact(folder: Path, schedule: NoiseSchedule) -> Path:
    (folder / "scheduler" / EXACT_NAME).write_text(json.dumps(schedule.to_config()))
    return folder


@pytest.mark.parametrize("case", CASES)
def test_what_is_said_missing_and_contradicted(
    tmp_path: Path, case: str, capsys: pytest.CaptureFixture[str]
) -> None:
    make, said, missing, contradictions = CASES[case]
    path = make(tmp_path)
    found = inspect_path(path)
    assert (found.prediction, found.zero_terminal_snr) == said
    for texts, expected in ((found.missing, missing), (found.contradictions, contradictions)):
        left = list(texts)
        for part in expected:
            (match,) = [text for text in left if part in text]
            left.remove(match)
        assert left == []
    if contradictions:
        with pytest.raises(SystemExit) as stop:
            main(["inspect", str(path)])
        assert stop.value.code == 1
    else:
        assert main(["inspect", str(path)]) == 0
    out = capsys.readouterr().out
    assert out.startswith(f"{found}\n")
    assert re.fullmatch(r"(the schedule of the presets: [\w., /-]+\n)?", out[len(f"{found}\n") :])


def test_the_report(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    model(
        Path("a.safetensors"), "v_pred", modelspec__prediction_type="v", ss_zero_terminal_snr="True"
    )
    assert main(["inspect", "a.safetensors"]) == 0
    assert capsys.readouterr().out == (
        "a.safetensors: a safetensors file of 4 tensors, named as ComfyUI, Forge and A1111 read "
        "them\n"
        "trained with: v_prediction, zero terminal SNR, on a schedule that is not said\n"
        "says:\n"
        "  tensor v_pred                       v_prediction\n"
        "  metadata modelspec.prediction_type  v_prediction\n"
        "  metadata ss_zero_terminal_snr       zero terminal SNR\n"
        "missing:\n"
        "  tensor ztsnr: they do not sample from pure noise, the last level; write_markers adds "
        "it\n"
        "  schedule: nothing says the betas, or the shift; ScheduleCheckpoint and write_markers "
        "say them\n"
        "contradicts: nothing\n"
    )


def test_what_sd_scripts_says_of_the_loss_is_shown(tmp_path: Path) -> None:
    said = {
        "ss_noise_offset": "0.05",
        "ss_min_snr_gamma": "5.0",
        "ss_prior_loss_weight": "1.0",
        "ss_ip_noise_gamma": "None",
    }
    text = str(
        inspect_path(
            model(
                tmp_path / "a.safetensors", tensors=DIFFUSERS, **said, ss_tag_frequency="x" * 10_000
            )
        )
    )
    for key, value in said.items():
        assert (f"metadata {key}" in text) is (value != "None")
    assert "0.05" in text and "5.0" in text and "says: nothing" not in text and len(text) < 2000


def test_what_cannot_be_inspected(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "text.ckpt").write_text("hello")
    for name, text in (
        ("nowhere", "nothing at"),
        ("empty", "holds nothing that says"),
        ("text.ckpt", "is damaged"),
    ):
        assert main(["inspect", str(tmp_path / name)]) == 2
        error = capsys.readouterr().err
        assert error.startswith("alphabar inspect: ") and text in error and error.count("\n") == 1


def test_no_weight_is_read(tmp_path: Path) -> None:
    path = write_markers(
        model(tmp_path / "a.safetensors", tensors={**INTERFACE, "w": torch.zeros(1 << 20)}), V
    )
    start = read_header(path).start
    content = bytearray(path.read_bytes())
    content[start:] = os.urandom(len(content) - start)
    path.write_bytes(bytes(content))
    assert inspect_path(path).schedule == V


def test_folders_of_alphabar_and_of_a_run(tmp_path: Path) -> None:
    ZERO.save_pretrained(tmp_path / "run/scheduler")
    for place in (tmp_path / "run", tmp_path / "run/scheduler"):
        found = inspect_path(place)
        assert found.schedule == ZERO and not found.missing and not found.contradictions
    torch.save({"state_dict": {}}, tmp_path / "run/a.ckpt")
    assert inspect_path(tmp_path / "run/a.ckpt").schedule == schedule_from_checkpoint(
        tmp_path / "run/a.ckpt"
    )


# What to choose in other tools


@pytest.mark.parametrize(
    ("schedule", "comfyui", "a1111", "diffusers"),
    [
        (
            EPSILON,
            r"'eps', zsnr=False\); .* karras$",
            "^Noise .* Default; ",
            "'epsilon', .*trailing",
        ),
        (V, "'v_prediction', zsnr=False", "^the tensor v_pred, .* Default; ", "DDIMScheduler"),
        (ZERO, "zsnr=True.* sgm_uniform$", "Zero Terminal SNR; .* SGM Uniform", "zero_snr=True"),
        (
            NoiseSchedule.from_betas(V.curve.betas(), "v_prediction"),
            "zsnr=False",
            "Default",
            "DDIM",
        ),
        (NoiseSchedule.linear(), "^cannot reproduce these betas", "^cannot", "'linear'"),
        (V.with_prediction("sample"), "'x0', zsnr=False", "^cannot .* type sample", "'sample'"),
        (FLOW, r"^ModelSamplingSD3\(shift=3\)", "of SD3", r"FlowMatchEuler.*shift=3.0\)"),
        (NoiseSchedule.flow(6.0), r"shift=6\)", "^cannot .* flow of shift 6", "shift=6.0"),
        (V.shifted(2.0), "^cannot", "^cannot", "trained_betas=..."),
        (NoiseSchedule.cosine(), "^cannot .* cosine curve", "^cannot", "^cannot reproduce it"),
        (
            NoiseSchedule.karras(0.002, 700.0, 1.0, KarrasF(1.0, negative=True)),
            r"ContinuousEDM\(sampling='v_prediction', sigma_max=700, sigma_min=0.002\)",
            "^cannot",
            "^cannot",
        ),
    ],
    ids=str,
)
def test_what_to_choose_elsewhere(
    tmp_path: Path, schedule: NoiseSchedule, comfyui: str, a1111: str, diffusers: str
) -> None:
    path = write_markers(model(tmp_path / "a.safetensors"), schedule)
    found = inspect_path(path)
    for words, expected in zip(found.settings.values(), (comfyui, a1111, diffusers), strict=True):
        assert re.search(expected, words), words
        assert words in str(found)


def test_nothing_is_chosen_where_the_schedule_is_not_known(tmp_path: Path) -> None:
    assert inspect_path(model(tmp_path / "a.safetensors", "v_pred")).settings == {}
    assert "sample with" not in str(inspect_path(model(tmp_path / "a.safetensors", "v_pred")))


def test_the_diffusers_line_is_a_call(tmp_path: Path) -> None:
    words = inspect_path(write_markers(model(tmp_path / "a.safetensors"), ZERO)).settings
    scheduler: Any = eval(words["diffusers"], {"DDIMScheduler": diffusers.DDIMScheduler})
    assert torch.allclose(scheduler.alphas_cumprod.double(), ZERO.alphas_cumprod, rtol=2e-4)


@pytest.mark.parametrize(
    ("metadata", "schedule"),
    [
        ({"ss_base_model_version": "sd_v1", "ss_zero_terminal_snr": "False"}, EPSILON),
        ({"ss_base_model_version": "sd_v2_v", "ss_zero_terminal_snr": "True"}, ZERO),
        (
            {"ss_base_model_version": "sdxl_base_v1-0", "ss_zero_terminal_snr": "True"}
            | {"modelspec__prediction_type": "v"},
            ZERO,
        ),
        ({"ss_base_model_version": "sdxl_base_v1-0", "ss_zero_terminal_snr": "True"}, None),
        ({"ss_base_model_version": "sd_v1", "ss_zero_terminal_snr": "True"}, None),
        ({"ss_base_model_version": "sd_v2_v"}, None),
        ({"ss_base_model_version": "flux1", "ss_zero_terminal_snr": "False"}, None),
    ],
    ids=str,
)
def test_sd_scripts_says_its_schedule_by_its_flags(
    tmp_path: Path, metadata: dict[str, str], schedule: NoiseSchedule | None
) -> None:
    """Its betas are Stable Diffusion's for every model but the flows."""
    path = model(tmp_path / "lora.safetensors", tensors=DIFFUSERS, **metadata)
    found = inspect_path(path)
    assert found.schedule == schedule and not found.contradictions
    if schedule is not None:  # what is written beside it says the same
        write_markers(path, schedule)
        assert inspect_path(path).schedule == schedule


def test_the_training_is_said_in_the_keys_of_sd_scripts(tmp_path: Path) -> None:
    noising = Noising(
        V, weighting="min_snr:gamma=3", noise=["adaptive_offset", "pyramid", "input_perturbation"]
    )
    path = model(tmp_path / "a.safetensors", ss_debiased_estimation="True", ss_v2="False")
    write_markers(path, V, noising=noising)
    said = read_header(path).metadata
    assert "ss_debiased_estimation" not in said and said["ss_v2"] == "False"
    adaptive, pyramid, perturbation = noising.noise.kinds
    assert {key: said[key] for key in said if key.startswith("ss_")} == {
        "ss_v2": "False",
        "ss_zero_terminal_snr": "False",
        "ss_min_snr_gamma": "3",
        "ss_loss_type": "l2",
        "ss_noise_offset": str(adaptive.strength),
        "ss_noise_offset_random_strength": "False",
        "ss_adaptive_noise_scale": str(adaptive.scale),
        "ss_multires_noise_iterations": str(pyramid.iterations),
        "ss_multires_noise_discount": str(pyramid.discount),
        "ss_ip_noise_gamma": str(perturbation.strength),
        "ss_ip_noise_gamma_random_strength": "False",
    }
    assert "metadata ss_min_snr_gamma" in str(inspect_path(path))
    assert inspect_path(path).schedule == V


def test_every_key_of_sd_scripts_that_is_written_is_shown() -> None:
    assert {*OF_TRAINING} >= sd_scripts.KEYS
    known = {"weighting": WEIGHTINGS, "noise": NOISES, "loss": LOSSES}
    tables = (sd_scripts.WEIGHTINGS, sd_scripts.NOISES, sd_scripts.LOSSES)
    for table, registry in zip(tables, known.values(), strict=True):
        assert {*table} <= {*registry}
