"""Claims about a model's training, from marker tensors, metadata, configs and sidecar folders."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ...noising import NoiseSchedule
from ...noising.io.files import CONFIG_NAME, EXACT_NAME
from ...noising.utils.config_reading import parse_json, read_json
from ...noising.utils.registry import shown
from .read import read_checkpoint, schedule_key
from .safetensors import OWN_KEY, Header
from .sidecars import own_sidecar, sidecar_folder

LARGEST_YAML = 1 << 20  # characters that are read; configs of models have a few thousand


@dataclass(frozen=True)
class Claim:
    """One claim about the schedule, from one source.

    Fields that the source does not state are None.

    Args:
        source: where the claim is from, e.g. a tensor, a metadata key or a file.
        prediction: name of the prediction type.
        zero_terminal_snr: whether the discrete schedule ends in pure noise.
        schedule: the whole schedule, if the source has one.
        note: text for the report.
        beside: True if the source is not in the model file itself.
        problem: why the claim cannot be correct.
        told: warnings from reading the source.

    >>> print(Claim("tensor v_pred", prediction="v_prediction"))
    v_prediction
    """

    source: str
    prediction: str | None = None
    zero_terminal_snr: bool | None = None
    schedule: NoiseSchedule | None = None
    note: str = ""
    beside: bool = False
    problem: str = ""
    told: tuple[str, ...] = ()

    def __str__(self) -> str:
        if self.schedule is not None:
            return str(self.schedule)
        snr = {True: "zero terminal SNR", False: "no zero terminal SNR", None: ""}[
            self.zero_terminal_snr
        ]
        note = self.note if self.note != self.prediction else ""
        return ", ".join(filter(None, [self.prediction, snr, note])) or "cannot be read"


PREDICTIONS = {
    "epsilon": "epsilon",
    "eps": "epsilon",
    "v": "v_prediction",
    "v_prediction": "v_prediction",
    "x0": "sample",
    "sample": "sample",
    "flow_prediction": "flow_prediction",
}
"""Names of prediction types in other tools, mapped to alphabar's names."""


def _prediction(source: str, value: Any) -> Claim:
    name = PREDICTIONS.get(value.lower()) if isinstance(value, str) else None
    return Claim(
        source,
        prediction=name,
        note="" if name else f"{shown(value)}, which is no prediction type known here",
    )


def _zero_snr(source: str, value: Any) -> Claim:
    if not isinstance(value, bool | int | str):
        return Claim(source, note=f"{shown(value)}, which is neither yes nor no")
    return Claim(source, zero_terminal_snr=str(value).lower() in ("true", "1"))


def _schedule(source: str, load: Callable[[], NoiseSchedule], beside: bool = False) -> Claim:
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            schedule = load()
    except ValueError as error:
        return Claim(source, beside=beside, problem=f"{source}: {error}")
    zero = schedule.has_zero_terminal_snr if schedule.curve.is_discrete else None
    told = tuple(f"{source}: {warning.message}" for warning in caught)
    return Claim(source, schedule.prediction.name, zero, schedule, beside=beside, told=told)


TENSORS: Mapping[str, Callable[[str], Claim]] = {
    "v_pred": lambda source: Claim(source, prediction="v_prediction"),
    "ztsnr": lambda source: Claim(source, zero_terminal_snr=True),
    "edm_mean": lambda source: Claim(
        source, note="an EDM model on scaled latents, as Playground 2.5"
    ),
    "edm_vpred.sigma_max": lambda source: Claim(
        source, "v_prediction", note="on EDM noise levels, as CosXL"
    ),
}
"""Marker tensors: their presence tells ComfyUI, Forge or A1111 how the model was trained."""

FLOWS = (
    "stable-diffusion-3",
    "flux",
    "chroma",
    "lumina",
    "sd3",
    "auraflow",
    "hunyuan-image",
    "qwen-image",
)
"""Prefixes of the architecture names whose models are flows."""


def _architecture(source: str, value: str) -> Claim:
    """Read an architecture name of sd-scripts, e.g. 'stable-diffusion-v2-768-v/lora'.

    Its other names do not state the prediction type, except for flows.
    """
    name = value.lower().split("/")[0]
    said = {"stable-diffusion-v2-768-v": "v_prediction", "stable-diffusion-v2-512": "epsilon"}.get(
        name
    )
    return Claim(source, "flow_prediction" if name.startswith(FLOWS) else said, note=value[:80])


def _base_model(source: str, value: str) -> Claim:
    """Read a base model version of sd-scripts: 'sd_v1' or 'sd_v2', with '_v' for v-prediction.

    Other models have names such as 'sdxl_base_v1-0', 'sd3_m' and 'flux1'.
    """
    name = value.lower()
    said = {
        "sd_v1": "epsilon",
        "sd_v2": "epsilon",
        "sd_v1_v": "v_prediction",
        "sd_v2_v": "v_prediction",
    }.get(name)
    return Claim(source, "flow_prediction" if name.startswith(FLOWS) else said, note=value[:80])


def _v_parameterization(source: str, value: str) -> Claim:
    return Claim(
        source, {"true": "v_prediction", "false": "epsilon"}.get(value.lower()), note=value[:80]
    )


def _as_it_is(source: str, value: str) -> Claim:
    return Claim(source, note=value[:80])


METADATA: Mapping[str, Callable[[str, str], Claim]] = {
    "modelspec.prediction_type": _prediction,
    "modelspec.predict_key": _prediction,
    "modelspec.architecture": _architecture,
    "ss_base_model_version": _base_model,
    "ss_v_parameterization": _v_parameterization,
    "ss_zero_terminal_snr": _zero_snr,
    OWN_KEY: lambda source, text: _schedule(
        source, lambda: NoiseSchedule.from_config(parse_json(text))
    ),
}
"""Metadata keys of safetensors files that state a prediction type or a schedule.

sd-scripts, OneTrainer, ComfyUI and alphabar write them.
"""

OF_TRAINING = (
    "modelspec.timestep_range",
    "ss_v2",
    "ss_min_snr_gamma",
    "ss_debiased_estimation",
    "ss_scale_v_pred_loss_like_noise_pred",
    "ss_v_pred_like_loss",
    "ss_noise_offset",
    "ss_noise_offset_random_strength",
    "ss_adaptive_noise_scale",
    "ss_multires_noise_iterations",
    "ss_multires_noise_discount",
    "ss_ip_noise_gamma",
    "ss_ip_noise_gamma_random_strength",
    "ss_loss_type",
    "ss_huber_schedule",
    "ss_huber_scale",
    "ss_huber_c",
    "ss_prior_loss_weight",
    "ss_min_timestep",
    "ss_max_timestep",
    "ss_weighting_scheme",
    "ss_logit_mean",
    "ss_logit_std",
    "ss_mode_scale",
    "ss_timestep_sampling",
    "ss_sigmoid_scale",
    "ss_discrete_flow_shift",
    "ss_training_shift",
    "ss_model_prediction_type",
    "ss_guidance_scale",
)
"""Metadata keys of sd-scripts that describe the loss.

Reports show them unchanged, unless the value is in ``SAYS_NOTHING``.
"""

SAYS_NOTHING = ("none", "false", "", "null")

HYPERPARAMETERS: Mapping[str, Callable[[str, Any], Claim]] = {
    "prediction_type": _prediction,
    "parameterization": _prediction,  # of latent-diffusion
    "rescale_betas_zero_snr": _zero_snr,
}
"""Hyperparameters of training scripts, as Lightning stores them in a checkpoint."""


def statements_of_safetensors(header: Header) -> list[Claim]:
    """Return the claims in the tensor names and the metadata of a safetensors file.

    >>> header = Header({"v_pred": {}}, {"ss_zero_terminal_snr": "True"}, 0)
    >>> [str(statement) for statement in statements_of_safetensors(header)]
    ['v_prediction', 'zero terminal SNR']
    """
    given = header.metadata
    said = [METADATA[key](f"metadata {key}", given[key]) for key in METADATA if key in given]
    if any(statement.prediction == "flow_prediction" for statement in said):
        # sd-scripts writes "epsilon" for every model not trained for v, Stable Diffusion 3 included
        said = [
            _open(s) if s.prediction == "epsilon" and "modelspec." in s.source else s for s in said
        ]
    if OWN_KEY not in given:
        said += _of_sd_scripts(given, _marked(header.tensors) + said)
    shown_too = [key for key in OF_TRAINING if given.get(key, "").lower() not in SAYS_NOTHING]
    return [
        *_marked(header.tensors),
        *said,
        *(_as_it_is(f"metadata {key}", given[key]) for key in shown_too),
    ]


BETAS_OF_SD_SCRIPTS = ("sd_v1", "sd_v2", "sdxl_")
"""The base models that sd-scripts trains on Stable Diffusion's betas, whatever its flags."""


def _of_sd_scripts(given: Mapping[str, str], said: Iterable[Claim]) -> list[Claim]:
    """Return the schedule that sd-scripts trained on, if its metadata define it.

    Its betas are fixed; ``--zero_terminal_snr`` rescales them. The prediction type of SDXL is in
    another key or a marker.
    """
    version, zero = given.get("ss_base_model_version", ""), given.get("ss_zero_terminal_snr")
    predictions = {claim.prediction for claim in said if claim.prediction}
    if not version.lower().startswith(BETAS_OF_SD_SCRIPTS) or zero is None or len(predictions) != 1:
        return []
    schedule = NoiseSchedule.scaled_linear(prediction=predictions.pop())
    if zero.lower() not in ("true", "1"):
        return [_schedule("metadata of sd-scripts", lambda: schedule)]
    try:
        rescaled = schedule.zero_terminal_snr()
    except ValueError:  # trained on epsilon, which does not define x_0 at the last timestep
        return []
    return [_schedule("metadata of sd-scripts", lambda: rescaled)]


def _open(statement: Claim) -> Claim:
    return replace(statement, prediction=None, note="epsilon, which sd-scripts writes of flows too")


def statements_of_checkpoint(path: Path) -> list[Claim]:
    """Return the claims inside a checkpoint of Lightning, latent-diffusion or sd-scripts.

    >>> statements_of_checkpoint(Path("nowhere.ckpt"))
    Traceback (most recent call last):
    FileNotFoundError: no checkpoint at 'nowhere.ckpt'
    """
    checkpoint = read_checkpoint(path)
    found = []
    key = schedule_key(checkpoint)
    if key is not None:
        found.append(_schedule(f"key {key}", lambda: NoiseSchedule.from_config(checkpoint[key])))
    weights = checkpoint.get("state_dict", checkpoint)
    found += _marked(weights if isinstance(weights, Mapping) else {})
    settings = checkpoint.get("hyper_parameters", {})
    settings = settings if isinstance(settings, Mapping) else {}
    return found + [
        HYPERPARAMETERS[k](f"hyperparameter {k}", settings[k])
        for k in HYPERPARAMETERS
        if k in settings
    ]


def statements_beside(path: Path) -> list[Claim]:
    """Return the claims in folders and configs beside a model file.

    >>> statements_beside(Path("nowhere.ckpt"))
    []
    """
    folders = [own_sidecar(path).local, sidecar_folder(path).local]
    # a component of a diffusers pipeline: unet/diffusion_pytorch_model.safetensors
    if path.suffix == ".safetensors":
        folders.append(path.resolve().parent.parent / "scheduler")
    found = []
    for folder in dict.fromkeys(filter(None, folders)):
        found += statements_of_folder(folder, path.resolve().parent, beside=True)[0]
    config = path.with_suffix(".yaml")
    if config.is_file():  # of latent-diffusion or sgm; Forge and A1111 read these two keys
        with config.open(encoding="utf-8", errors="replace") as file:
            text = file.read(LARGEST_YAML)
        word = re.search(r"^\s*parameterization:\s*[\"']?(\w+)", text, re.MULTILINE)
        scaling = re.search(r"target:\s*\S*\.(V|Eps)Scaling\b", text)
        named = {"V": "v", "Eps": "eps"}[scaling[1]] if scaling else word[1] if word else None
        if named is not None:
            found.append(Claim(config.name, PREDICTIONS.get(named), note="", beside=True))
    return found


def statements_of_folder(
    folder: Path, shown_from: Path, beside: bool = False
) -> tuple[list[Claim], list[str]]:
    """Return the claims of a folder's two schedule files, and the keys missing in the config.

    A missing key means that the config relies on the default of a class.

    >>> statements_of_folder(Path("nowhere"), Path())
    ([], [])
    """
    found, left_out = [], []
    for name in (EXACT_NAME, CONFIG_NAME):
        path = folder / name
        if not path.is_file():
            continue
        source = (
            path.relative_to(shown_from).as_posix()
            if path.is_relative_to(shown_from)
            else str(path)
        )
        if name == EXACT_NAME:
            found.append(
                _schedule(
                    source, lambda path=path: NoiseSchedule.from_config(read_json(path)), beside
                )
            )
        else:
            statement = _schedule(
                source, lambda path=path: NoiseSchedule.from_diffusers(read_json(path)), beside
            )
            found.append(statement)
            if statement.schedule is not None:
                config = read_json(path)
                left_out += _left_out(source, config)
                found += _spacing(source, config, beside)
    return found, left_out


def _marked(tensors: Iterable[str]) -> list[Claim]:
    names = set(tensors)
    return [TENSORS[name](f"tensor {name}") for name in TENSORS if name in names]


def _left_out(source: str, config: Mapping[str, Any]) -> list[str]:
    kind = str(config.get("_class_name", ""))
    needed = (
        ["shift"]
        if kind.startswith("FlowMatch")
        else ["beta_schedule", "beta_start", "beta_end", "prediction_type"]
    )
    lacking = [key for key in needed if key not in config]
    if config.get("trained_betas"):
        lacking = [key for key in lacking if not key.startswith("beta_")]
    of = kind or "whatever class reads it"
    return (
        [f"{source} leaves out {', '.join(lacking)}: filled with the defaults of {of}"]
        if lacking
        else []
    )


def _spacing(source: str, config: Mapping[str, Any], beside: bool) -> list[Claim]:
    spacing = config.get("timestep_spacing")
    if not config.get("rescale_betas_zero_snr") or spacing in (None, "trailing", "linspace"):
        return []
    problem = (
        f"{source}: rescale_betas_zero_snr with timestep_spacing={spacing!r}, which does not "
        "sample from the last "
        "timestep, the only one that is pure noise; use 'trailing' (2305.08891, section 3.3)"
    )
    return [Claim(f"{source}: timestep_spacing", note=str(spacing), beside=beside, problem=problem)]
