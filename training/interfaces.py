"""What to choose in ComfyUI, in A1111 and Forge, and in diffusers to sample as a model was trained.

The interfaces have one table of betas, Stable Diffusion's, and two switches: the prediction type
and zero terminal SNR. A schedule that this does not give is named as such.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from ..noising import NoiseSchedule
from ..noising.curves.continuous import Flow, Karras
from ..noising.prediction import KarrasF

SD_BETAS = NoiseSchedule.scaled_linear(prediction="v_prediction")
NEAR = 1e-3
"""The relative difference of ᾱ that is still the same table: their tables are in float32, and
ᾱ = 4.9e-8 stands for zero (σ = 4519)."""
SCHEDULERS = {
    False: ("karras", "Karras"),
    True: ("sgm_uniform", "SGM Uniform"),  # Karras levels lie above σ = 100, where little happens
}
"""The scheduler of ComfyUI, and the schedule type of A1111: without and with zero terminal SNR."""
COMFYUI_SAMPLINGS = {"epsilon": "eps", "v_prediction": "v_prediction", "sample": "x0"}
KEYS = (
    *("prediction_type", "timestep_spacing", "rescale_betas_zero_snr", "beta_schedule"),
    *("beta_start", "beta_end", "shift", "use_flow_sigmas", "flow_shift"),
)


def interface_settings(schedule: NoiseSchedule) -> dict[str, str]:
    """Return what to choose for a schedule, by the name of the tool.

    The text begins with 'cannot' where a tool does not have the schedule.

    >>> schedule = NoiseSchedule.scaled_linear(prediction="v_prediction").zero_terminal_snr()
    >>> interface_settings(schedule)["ComfyUI"].split("; ")[0]
    "ModelSamplingDiscrete(sampling='v_prediction', zsnr=True)"
    >>> interface_settings(NoiseSchedule.linear())["ComfyUI"][:6]
    'cannot'
    """
    return {
        "ComfyUI": _comfyui(schedule),
        "A1111, Forge": _a1111(schedule),
        "diffusers": _diffusers(schedule),
    }


def _table(schedule: NoiseSchedule) -> bool | None:
    """Return whether the betas are Stable Diffusion's rescaled to zero SNR; None for others."""
    if not schedule.curve.is_discrete or schedule.num_train_timesteps != 1000:
        return None
    for zero, known in ((False, SD_BETAS), (True, SD_BETAS.zero_terminal_snr())):
        ours, theirs = schedule.alphas_cumprod, known.alphas_cumprod
        if torch.allclose(ours, theirs, rtol=NEAR, atol=1e-7):
            return zero
    return None


def _comfyui(schedule: NoiseSchedule) -> str:
    curve, prediction = schedule.curve, schedule.prediction
    if isinstance(curve, Flow) and prediction.name == "flow_prediction":
        return (
            f"ModelSamplingSD3(shift={curve.shift:g}) (Flux: the shift of ModelSamplingFlux is its "
            "logarithm); sampler euler, scheduler simple"
        )
    if isinstance(curve, Karras) and isinstance(prediction, KarrasF):
        known = {(1.0, True): "v_prediction", (0.5, False): "edm"}
        sampling = known.get((prediction.sigma_data, prediction.negative))
        if sampling is not None:
            return (
                f"ModelSamplingContinuousEDM(sampling={sampling!r}, sigma_max={curve.sigma_max:g}, "
                f"sigma_min={curve.sigma_min:g}); sampler dpmpp_2m, scheduler karras"
            )
    zero, sampling = _table(schedule), COMFYUI_SAMPLINGS.get(prediction.name)
    if zero is None or sampling is None:
        return f"cannot reproduce {_why(schedule)}: take alphabar's Sampler, or diffusers"
    return (
        f"ModelSamplingDiscrete(sampling={sampling!r}, zsnr={zero}); "
        f"sampler dpmpp_2m, scheduler {SCHEDULERS[zero][0]}"
    )


def _a1111(schedule: NoiseSchedule) -> str:
    curve, prediction = schedule.curve, schedule.prediction.name
    if isinstance(curve, Flow) and prediction == "flow_prediction" and curve.shift == 3.0:
        return "Sampling method Euler, Schedule type Simple (of SD3, whose shift is 3)"
    zero = _table(schedule)
    if zero is None or prediction not in ("epsilon", "v_prediction"):
        return f"cannot reproduce {_why(schedule)}"
    noise = "Zero Terminal SNR" if zero else "Default"
    v = (
        "the tensor v_pred, or a .yaml beside the file with parameterization: v; "
        if prediction == "v_prediction"
        else ""
    )
    return (
        f"{v}Noise schedule for sampling: {noise}; "
        f"Sampling method DPM++ 2M, Schedule type {SCHEDULERS[zero][1]}"
    )


def _diffusers(schedule: NoiseSchedule) -> str:
    try:
        config = schedule.scheduler_config()
    except ValueError as error:
        return f"cannot reproduce it: {error}"
    betas = "" if config.get("trained_betas") is None else ", trained_betas=..."
    said = ", ".join(f"{key}={config[key]!r}" for key in KEYS if key in config)
    return f"{config['_class_name']}({said}{betas})"


def _why(schedule: NoiseSchedule) -> str:
    """Return what the interfaces lack, in words."""
    prediction = schedule.prediction.name
    if isinstance(schedule.curve, Flow):
        return f"{prediction} on a flow of shift {schedule.curve.shift:g}"
    if not schedule.curve.is_discrete:
        return f"a {schedule.curve.kind} curve with {prediction}"
    if _table(schedule) is None:
        return "these betas, which are not Stable Diffusion's"
    return f"prediction type {prediction}"


def described(settings: dict[str, str]) -> Iterator[str]:
    """Yield a line for each tool.

    >>> print(*described({"a": "x", "bcd": "y"}), sep="\\n")
    a    x
    bcd  y
    """
    width = max(map(len, settings))
    yield from (f"{tool:<{width}}  {words}" for tool, words in settings.items())
