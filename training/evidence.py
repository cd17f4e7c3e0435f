"""Where tools write what a model was trained with: tensors that mark it, metadata, configs, what lies beside a file."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..noising import NoiseSchedule
from ..noising.pretrained import CONFIG_NAME, EXACT_NAME, from_diffusers, read_json
from .checkpoints import SCHEDULE_KEY, read_checkpoint
from .safetensors_files import OWN_KEY, Header
from .sidecars import own_sidecar, sidecar_folder


@dataclass(frozen=True)
class Statement:
    """What one place says, as far as it says it. ``beside``: not in the file itself. ``problem``: why it cannot be so.

    >>> print(Statement("tensor v_pred", prediction="v_prediction"))
    v_prediction
    """

    source: str
    prediction: str | None = None
    zero_terminal_snr: bool | None = None
    schedule: NoiseSchedule | None = None
    note: str = ""
    beside: bool = False
    problem: str = ""

    def __str__(self) -> str:
        if self.schedule is not None:
            return str(self.schedule)
        snr = {True: "zero terminal SNR", False: "no zero terminal SNR", None: ""}[self.zero_terminal_snr]
        return ", ".join(filter(None, [self.prediction, snr, self.note])) or "cannot be read"


PREDICTIONS = {
    "epsilon": "epsilon",
    "eps": "epsilon",
    "v": "v_prediction",
    "v_prediction": "v_prediction",
    "x0": "sample",
    "sample": "sample",
    "flow_prediction": "flow_prediction",
}
"""The words of the field for prediction types."""


def _prediction(source: str, value: Any) -> Statement:
    name = PREDICTIONS.get(str(value).lower())
    return Statement(source, prediction=name, note="" if name else f"{value!r}, which is no prediction type known here")


def _zero_snr(source: str, value: Any) -> Statement:
    return Statement(source, zero_terminal_snr=str(value).lower() in ("true", "1"))


def _schedule(source: str, load: Callable[[], NoiseSchedule], beside: bool = False) -> Statement:
    try:
        schedule = load()
    except (ValueError, TypeError) as error:
        return Statement(source, beside=beside, problem=f"{source}: {error}")
    zero = schedule.has_zero_terminal_snr if schedule.curve.is_discrete else None
    return Statement(source, schedule.prediction.name, zero, schedule, beside=beside)


TENSORS: Mapping[str, Callable[[str], Statement]] = {
    "v_pred": lambda source: Statement(source, prediction="v_prediction"),
    "ztsnr": lambda source: Statement(source, zero_terminal_snr=True),
    "edm_mean": lambda source: Statement(source, note="an EDM model on scaled latents, as Playground 2.5"),
    "edm_vpred.sigma_max": lambda source: Statement(source, "v_prediction", note="on EDM noise levels, as CosXL"),
}
"""Tensors whose presence says something to ComfyUI, Forge or A1111."""

METADATA: Mapping[str, Callable[[str, str], Statement]] = {
    "modelspec.prediction_type": _prediction,
    "modelspec.predict_key": _prediction,
    "ss_zero_terminal_snr": _zero_snr,
    OWN_KEY: lambda source, text: _schedule(source, lambda: NoiseSchedule.from_config(json.loads(text))),
}
"""Metadata of safetensors files, as sd-scripts, OneTrainer, ComfyUI and alphabar write them."""

HYPERPARAMETERS: Mapping[str, Callable[[str, Any], Statement]] = {
    "prediction_type": _prediction,
    "parameterization": _prediction,  # of latent-diffusion
    "rescale_betas_zero_snr": _zero_snr,
}
"""Hyperparameters of training scripts, as Lightning keeps them in a checkpoint."""


def statements_of_safetensors(header: Header) -> list[Statement]:
    """Return what the tensors and the metadata of a safetensors file say.

    >>> header = Header({"v_pred": {}}, {"ss_zero_terminal_snr": "True"}, 0)
    >>> [str(statement) for statement in statements_of_safetensors(header)]
    ['v_prediction', 'zero terminal SNR']
    """
    said = [METADATA[key](f"metadata {key}", header.metadata[key]) for key in METADATA if key in header.metadata]
    return [*_marked(header.tensors), *said]


def statements_of_checkpoint(path: Path) -> list[Statement]:
    """Return what a checkpoint of Lightning, latent-diffusion or sd-scripts says in itself.

    >>> statements_of_checkpoint(Path("nowhere.ckpt"))
    Traceback (most recent call last):
    FileNotFoundError: no checkpoint at 'nowhere.ckpt'
    """
    checkpoint = read_checkpoint(path)
    found = []
    if SCHEDULE_KEY in checkpoint:
        config = checkpoint[SCHEDULE_KEY]
        found.append(_schedule(f"key {SCHEDULE_KEY}", lambda: NoiseSchedule.from_config(config)))
    weights = checkpoint.get("state_dict", checkpoint)
    found += _marked(weights if isinstance(weights, Mapping) else {})
    settings = checkpoint.get("hyper_parameters", {})
    settings = settings if isinstance(settings, Mapping) else {}
    return found + [HYPERPARAMETERS[k](f"hyperparameter {k}", settings[k]) for k in HYPERPARAMETERS if k in settings]


def statements_beside(path: Path) -> list[Statement]:
    """Return what folders and configs beside a model file say of it.

    >>> statements_beside(Path("nowhere.ckpt"))
    []
    """
    folders = [own_sidecar(path).local, sidecar_folder(path).local]
    if path.suffix == ".safetensors":  # a component of a diffusers pipeline: unet/diffusion_pytorch_model.safetensors
        folders.append(path.resolve().parent.parent / "scheduler")
    found = []
    for folder in dict.fromkeys(filter(None, folders)):
        found += statements_of_folder(folder, path.resolve().parent, beside=True)[0]
    config = path.with_suffix(".yaml")
    if config.is_file():  # of latent-diffusion or sgm; Forge and A1111 read these two words of it
        text = config.read_text(encoding="utf-8", errors="replace")
        word = re.search(r"^\s*parameterization:\s*[\"']?(\w+)", text, re.MULTILINE)
        scaling = re.search(r"target:\s*\S*\.(V|Eps)Scaling\b", text)
        named = {"V": "v", "Eps": "eps"}[scaling[1]] if scaling else word[1] if word else None
        if named is not None:
            found.append(Statement(config.name, PREDICTIONS.get(named), note="", beside=True))
    return found


def statements_of_folder(folder: Path, shown_from: Path, beside: bool = False) -> tuple[list[Statement], list[str]]:
    """Return what the two schedule files of a folder say, and what the config leaves to the defaults of a class.

    >>> statements_of_folder(Path("nowhere"), Path())
    ([], [])
    """
    found, left_out = [], []
    for name in (EXACT_NAME, CONFIG_NAME):
        path = folder / name
        if not path.is_file():
            continue
        source = path.relative_to(shown_from).as_posix() if path.is_relative_to(shown_from) else str(path)
        if name == EXACT_NAME:
            found.append(_schedule(source, lambda path=path: NoiseSchedule.from_config(read_json(path)), beside))
        else:
            statement = _schedule(source, lambda path=path: from_diffusers(read_json(path)), beside)
            found.append(statement)
            if statement.schedule is not None:
                config = read_json(path)
                left_out += _left_out(source, config)
                found += _spacing(source, config, beside)
    return found, left_out


def _marked(tensors: Iterable[str]) -> list[Statement]:
    names = set(tensors)
    return [TENSORS[name](f"tensor {name}") for name in TENSORS if name in names]


def _left_out(source: str, config: Mapping[str, Any]) -> list[str]:
    kind = str(config.get("_class_name", ""))
    needed = (
        ["shift"] if kind.startswith("FlowMatch") else ["beta_schedule", "beta_start", "beta_end", "prediction_type"]
    )
    lacking = [key for key in needed if key not in config]
    if config.get("trained_betas"):
        lacking = [key for key in lacking if not key.startswith("beta_")]
    of = kind or "whatever class reads it"
    return [f"{source} leaves out {', '.join(lacking)}: filled with the defaults of {of}"] if lacking else []


def _spacing(source: str, config: Mapping[str, Any], beside: bool) -> list[Statement]:
    spacing = config.get("timestep_spacing")
    if not config.get("rescale_betas_zero_snr") or spacing in (None, "trailing", "linspace"):
        return []
    problem = (
        f"{source}: rescale_betas_zero_snr with timestep_spacing={spacing!r}, which does not sample from the last "
        "timestep, the only one that is pure noise; use 'trailing' (2305.08891, section 3.3)"
    )
    return [Statement(f"{source}: timestep_spacing", note=str(spacing), beside=beside, problem=problem)]
