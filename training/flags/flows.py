"""Flags of trainers of flows: --weighting_scheme, --timestep_sampling and their options.

diffusers' scripts for SD3 and Flux have the first, sd-scripts and musubi-tuner have both. A
weighting scheme is a weight of the loss or a density of timesteps; a sampling is a density of noise
levels.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import NamedTuple

from ...noising import (
    Curve,
    LogitNormalTimesteps,
    ModeTimesteps,
    NoiseLevelTimesteps,
    Timesteps,
    UniformTimesteps,
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
_SAMPLINGS = ("sigma", "uniform", "sigmoid", "shift", "flux_shift")
_USED_BY: Mapping[str, tuple[str, tuple[str, ...]]] = {
    # option: the flag that uses it, and with which values; (): with each
    "logit_mean": ("weighting_scheme", ("logit_normal",)),
    "logit_std": ("weighting_scheme", ("logit_normal",)),
    "mode_scale": ("weighting_scheme", ("mode",)),
    "training_shift": ("weighting_scheme", ()),
    "sigmoid_scale": ("timestep_sampling", ("sigmoid", "shift", "flux_shift")),
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
        help="as in kohya's Flux script: sigma (by --weighting_scheme), uniform (sigma uniform, "
        "whatever the shift), sigmoid "
        "(the same, sigmoid of a normal), shift (sigmoid, with the flow's shift); alphabar's own "
        "are --timestep_density",
    ),
    Option(
        ("--sigmoid_scale",), float, "spread of the normal of --timestep_sampling sigmoid and shift"
    ),
    Option(
        ("--training_shift",),
        float,
        "as in kohya's SD3 script: the shift of the sigmas that are trained, whatever the flow's; "
        "with it a larger --logit_mean "
        "is more noise, as in that script",
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
    said: Said, curve: Curve, timestep_range: tuple[float, float]
) -> Timesteps | None:
    """Return the density of --timestep_sampling or --weighting_scheme.

    Return None if alphabar's own flags set the density. With --training_shift, the density covers
    ``timestep_range``.
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
    for key, (flag, values) in _USED_BY.items():
        used = not own and by == flag and (not values or said.value(flag) in values)
        if key in said.given and not used:
            raise _unused(said, key, own)
    if own:
        return None
    if by == "timestep_sampling":
        return _of_sampling(said, sampling, curve)
    return _of_scheme(said, scheme.density, curve, timestep_range)


def _unused(said: Said, key: str, own: list[str]) -> ValueError:
    flag, values = _USED_BY[key]
    user = f"--{flag} {' or '.join(values)}".rstrip()
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


def _of_sampling(said: Said, sampling: str, curve: Curve) -> Timesteps:
    """Return the density of kohya's flux_train_utils.get_noisy_model_input_and_timesteps."""
    if not curve.is_flow:
        raise ValueError(
            f"--timestep_sampling {sampling} draws the sigmas of a flow, and this schedule is "
            f"{curve.kind}; give --timestep_density"
        )
    if sampling == "flux_shift":
        raise ValueError(
            "--timestep_sampling flux_shift takes another shift for each size of image, and a "
            "schedule has one; give --timestep_sampling shift --discrete_flow_shift 3.16, which "
            "is that of 1024 x 1024 (1.88 of 512 x 512)"
        )
    scale = said.value("sigmoid_scale", 1.0)
    normal = said.made("sigmoid_scale", lambda: LogitNormalTimesteps(std=scale))
    if sampling == "shift":
        return normal  # the schedule has the shift
    return NoiseLevelTimesteps(density=UniformTimesteps() if sampling == "uniform" else normal)


def _of_scheme(
    said: Said, name: str, curve: Curve, timestep_range: tuple[float, float]
) -> Timesteps | None:
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
        return density
    if not curve.is_flow:
        raise ValueError(
            f"{said.written('training_shift')} is for flows, and this schedule is {curve.kind}; "
            "leave it out"
        )
    low, high = (timestep / curve.num_train_timesteps for timestep in timestep_range)
    inner = density or UniformTimesteps()
    return said.made(
        "training_shift",
        lambda: NoiseLevelTimesteps(density=inner, shift=shift, low=low, high=high),
    )
