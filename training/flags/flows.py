"""Flags of trainers of flows: --weighting_scheme, --timestep_sampling and their options.

diffusers' scripts for SD3 and Flux have the first, sd-scripts and musubi-tuner have both. A
weighting scheme is a weight of the loss or a density of timesteps; a sampling is a density of noise
levels.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from typing import Any, NamedTuple

from ...noising import (
    Curve,
    LogitNormalTimesteps,
    ModeTimesteps,
    NoiseLevelTimesteps,
    Timesteps,
    UniformTimesteps,
    token_shift,
)
from .options import Option, Said, contradiction


class _Scheme(NamedTuple):
    """What --weighting_scheme selects."""

    weight: str = "uniform"
    weight_of_x0: str = "x0"
    density: str = "uniform"


_SCHEMES: Mapping[str, _Scheme] = {
    "none": _Scheme(),
    "uniform": _Scheme(),
    "sigma_sqrt": _Scheme("sigma_sqrt", "flow"),
    "cosmap": _Scheme("cosmap", "diffusers_cosmap_x0"),
    "logit_normal": _Scheme(density="logit_normal"),
    "mode": _Scheme(density="mode"),
}
# the line of log shift by image tokens, as options of token_shift
_TOKEN_SHIFTS: Mapping[str, Mapping[str, Any]] = {
    "flux_shift": {},
    "flux2_shift": {},
    "qwen_shift": {"max_tokens": 8192, "max_shift": 0.9},
    "krea2_shift": {"max_tokens": 6400},
}
_SHIFTS = ("shift", *_TOKEN_SHIFTS)
_SAMPLINGS = ("sigma", "uniform", "sigmoid", "logsnr", *_SHIFTS)
_LOGIT = {"weighting_scheme": ("logit_normal",), "timestep_sampling": ("logsnr",)}
_USED_BY: Mapping[str, Mapping[str, tuple[str, ...]]] = {
    # option: the flags that use it, each with the values that do; (): all
    "logit_mean": _LOGIT,
    "logit_std": _LOGIT,
    "mode_scale": {"weighting_scheme": ("mode",)},
    "training_shift": {"weighting_scheme": ()},
    "sigmoid_scale": {"timestep_sampling": ("sigmoid", *_SHIFTS)},
    "image_tokens": {"timestep_sampling": tuple(_TOKEN_SHIFTS)},
    "preserve_distribution_shape": {"timestep_sampling": _SAMPLINGS[1:]},
}
FLOW_OPTIONS = (
    Option(
        ("--weighting_scheme",),
        choices=tuple(_SCHEMES),
        help="as in diffusers' scripts for SD3 and Flux: a weight of the flow loss (sigma_sqrt, "
        "cosmap), or a density of "
        "timesteps (logit_normal, mode)",
    ),
    Option(
        ("--logit_mean",),
        float,
        "of --weighting_scheme logit_normal, as in diffusers' scripts: a larger one is LESS noise; "
        "alphabar's own, "
        "--timestep_density logit_normal:mean=..., has it the other way round, as the paper",
    ),
    Option(("--logit_std",), float, "of --weighting_scheme logit_normal"),
    Option(("--mode_scale",), float, "of --weighting_scheme mode (2403.03206, eq. 20)"),
    Option(
        ("--precondition_outputs",),
        int,
        "1, as in diffusers' SD3 script: the loss is that of the x_0 which a flow's output "
        "implies, i.e. sigma^2 times that of "
        "the output, and --weighting_scheme weighs it; 0: the loss of the output",
    ),
    Option(
        ("--timestep_sampling",),
        choices=_SAMPLINGS,
        help="as in sd-scripts and musubi-tuner: sigma (by --weighting_scheme), uniform (sigma "
        "uniform, whatever the shift), sigmoid (the same, sigmoid of a normal), shift (sigmoid, "
        "with the flow's shift), flux_shift, qwen_shift, ... (sigmoid, with a shift by "
        "--image_tokens), logsnr (log SNR normal, of --logit_mean and --logit_std); alphabar's own "
        "are --timestep_density",
    ),
    Option(
        ("--sigmoid_scale",),
        float,
        "spread of the normal of --timestep_sampling sigmoid and of the shifts",
    ),
    Option(
        ("--image_tokens",),
        int,
        "image tokens of the network, of --timestep_sampling flux_shift and the like (default: "
        "width / 16 times height / 16 of --resolution); images of other sizes get the same shift",
    ),
    Option(
        ("--preserve_distribution_shape",),
        bool,
        "as in musubi-tuner: --min_timestep and --max_timestep cut the density of "
        "--timestep_sampling to their range; without it, it is rescaled to the range",
    ),
    Option(
        ("--training_shift",),
        float,
        "as in kohya's SD3 script: the shift of the sigmas that are trained, whatever the flow's; "
        "with it a larger --logit_mean "
        "is more noise, as in that script; with --preset alone, the shift of its density",
    ),
)


def with_scheme(said: Said, prediction: str) -> Said:
    """Translate --weighting_scheme and --precondition_outputs to --loss_weighting."""
    on_x0 = bool(said.value("precondition_outputs")) and prediction == "flow_prediction"
    scheme = _scheme(said)
    weight = scheme.weight_of_x0 if on_x0 else scheme.weight
    if weight == "uniform":
        return said
    by_scheme = scheme.weight != "uniform"
    key = "weighting_scheme" if by_scheme else "precondition_outputs"
    if key not in said.given:  # made from a weak value, so it is weak
        return Said(said.given, {"loss_weighting": weight, **said.weak}, said.names)
    if by_scheme and said.given.get("loss_weighting", weight) != weight:
        raise contradiction(said.written(key), said.written("loss_weighting"))
    name = f"{said.written(key)}, which is --loss_weighting"
    return Said(
        {"loss_weighting": weight, **said.given}, said.weak, {"loss_weighting": name, **said.names}
    )


def _scheme(said: Said) -> _Scheme:
    return _SCHEMES[_one_of(said, "weighting_scheme", _SCHEMES, "none")]


def _one_of(said: Said, key: str, known: Collection[str], default: str) -> str:
    value = said.value(key, default)
    if value not in known:
        raise ValueError(f"unknown --{key} {value}; known: {', '.join(known)}")
    return value


def density_of_trainer(
    said: Said, curve: Curve, timestep_range: tuple[float, float], resolution: Any = None
) -> tuple[Timesteps | None, bool]:
    """Return the density of --timestep_sampling or --weighting_scheme.

    Args:
        said: the options of the command line.
        curve: the curve of the schedule.
        timestep_range: first timestep that is trained, and the one before which training ends.
        resolution: the script's --resolution, if it has one.

    Returns:
        The density, or None if alphabar's own flags set it, and whether it covers only
        ``timestep_range``.

    Raises:
        ValueError: flags contradict each other, or one is missing.
    """
    own = [
        said.written(key) for key in ("timestep_density", "p_mean", "p_std") if key in said.given
    ]
    scheme, sampling = _scheme(said), _one_of(said, "timestep_sampling", _SAMPLINGS, "sigma")
    by_sampling, by_scheme = sampling != "sigma", scheme.density != "uniform"
    theirs = [
        key
        for key, selects in (("timestep_sampling", by_sampling), ("weighting_scheme", by_scheme))
        if selects and key in said.given
    ]
    if theirs and len(theirs) + len(own) > 1:
        raise contradiction(*[*map(said.written, theirs), *own][:2])
    by = (
        "timestep_sampling"
        if by_sampling and theirs != ["weighting_scheme"]
        else "weighting_scheme"
    )
    for key, users in _USED_BY.items():
        used = not own and by in users and (not users[by] or said.value(by) in users[by])
        if key in said.given and not used:
            raise _unused(said, key, own)
    if own:
        return None, False
    count = curve.num_train_timesteps
    share = (timestep_range[0] / count, timestep_range[1] / count)
    if by == "timestep_sampling":
        return _of_sampling(said, sampling, curve, share, resolution)
    return _of_scheme(said, scheme.density, curve, share)


def _unused(said: Said, key: str, own: list[str]) -> ValueError:
    users = (f"--{flag} {' or '.join(values)}".rstrip() for flag, values in _USED_BY[key].items())
    user = ", or ".join(users)
    instead = f"contradicts {own[0]}" if own else "says nothing alone"
    item = ""
    if key.startswith("logit"):
        sign = "-" if key == "logit_mean" else ""
        item = (
            f", or --timestep_density logit_normal:{key[6:]}={sign}... , "
            "whose larger mean is more noise"
        )
    return ValueError(
        f"{said.written(key)} is an option of {user} and {instead}; give {user}{item}"
    )


def _of_sampling(
    said: Said, sampling: str, curve: Curve, share: tuple[float, float], resolution: Any
) -> tuple[Timesteps, bool]:
    """Return the density of σ of sd-scripts' and musubi-tuner's --timestep_sampling.

    sd-scripts: flux_train_utils.get_noisy_model_input_and_timesteps. musubi-tuner's function of the
    same name rescales σ to the range of timesteps.
    """
    if not curve.is_flow:
        raise ValueError(
            f"--timestep_sampling {sampling} draws the sigmas of a flow, and this schedule is "
            f"{curve.kind}; give --timestep_density"
        )
    if sampling == "logsnr":  # of a flow, logit σ = -log SNR / 2
        mean, std = (said.value(key, d) for key, d in (("logit_mean", 0.0), ("logit_std", 1.0)))
        inner = said.made("logit_std", lambda: LogitNormalTimesteps(mean=-mean / 2, std=std / 2))
    elif sampling == "uniform":
        inner = UniformTimesteps()
    else:
        scale = said.value("sigmoid_scale", 1.0)
        inner = said.made("sigmoid_scale", lambda: LogitNormalTimesteps(std=scale))
    cut = "preserve_distribution_shape" in said.given
    low, high = (0.0, 1.0) if cut else share
    shift = 1.0
    if sampling in _TOKEN_SHIFTS:
        shift = token_shift(_tokens(said, resolution), **_TOKEN_SHIFTS[sampling])
    elif sampling == "shift":
        if (low, high) == (0.0, 1.0):
            return inner, False  # the schedule has the shift
        shift = float(getattr(curve, "shift", 1.0))
    return NoiseLevelTimesteps(density=inner, shift=shift, low=low, high=high), not cut


def _tokens(said: Said, resolution: Any) -> int:
    """Return --image_tokens, or those of --resolution: one size, or width and height."""
    tokens = said.value("image_tokens")
    sides = [int(side) for side in re.findall(r"\d+", str(resolution or ""))]
    if tokens is None and not 1 <= len(sides) <= 2:
        raise ValueError(
            f"{said.written('timestep_sampling')} shifts by the number of image tokens; give "
            "--image_tokens, width / 16 times height / 16, e.g. 4096 for 1024 x 1024, or "
            "--resolution"
        )
    return (sides[0] // 16) * (sides[-1] // 16) if tokens is None else tokens


def _of_scheme(
    said: Said, name: str, curve: Curve, share: tuple[float, float]
) -> tuple[Timesteps | None, bool]:
    """Return the density of diffusers' compute_density_for_timestep_sampling.

    There, u indexes timesteps in descending order. With --training_shift, it is the density of
    kohya's sd3_train_utils.get_noisy_model_input_and_timesteps, where u is σ itself.
    """
    shift = said.value("training_shift")
    density: Timesteps | None = None
    if name == "logit_normal":
        mean = said.value("logit_mean", 0.0) * (1 if shift is not None else -1)
        std = said.value("logit_std", 1.0)
        density = said.made("logit_std", lambda: LogitNormalTimesteps(mean=mean, std=std))
    elif name == "mode":  # symmetric
        scale = said.value("mode_scale", 1.29)
        density = said.made("mode_scale", lambda: ModeTimesteps(scale=scale))
    if shift is None:
        return density, False
    if not curve.is_flow:
        raise ValueError(
            f"{said.written('training_shift')} is for flows, and this schedule is {curve.kind}; "
            "leave it out"
        )
    (low, high), inner = share, density or UniformTimesteps()
    return said.made(
        "training_shift",
        lambda: NoiseLevelTimesteps(density=inner, shift=shift, low=low, high=high),
    ), True
