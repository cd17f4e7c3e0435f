"""Flags of the schedule: its betas, its flow shift, and what the network predicts."""

from __future__ import annotations

import argparse
from dataclasses import fields, replace

from ...noising import BETA_SCHEDULES, PREDICTIONS, PRESETS, Discrete, NoiseSchedule
from ...noising.utils.items import parse_item
from ...noising.utils.registry import lookup
from .base_model import schedule_of_base_model
from .items import SCHEDULES, read_schedule
from .options import SAYING_THE_SAME, Option, Said, contradiction

_BETAS = ("beta_schedule", "beta_start", "beta_end", "num_train_timesteps")


SCHEDULE_OPTIONS = (
    Option(
        ("--preset",),
        metavar="MODEL",
        help="the schedule, the density and the weighting of a published model: sd15, sdxl, flux, "
        "wan2.2/high, ... (alphabar inspect MODEL says what they are); --image_tokens for a shift "
        "by the size of the image; other flags replace parts of it",
    ),
    Option(
        ("--noise_schedule",),
        metavar="ITEM",
        help="a schedule by its name, flow:shift=3, karras:sigma_data=1, a preset (flux), "
        "or a folder with a scheduler_config.json (default: the base model's, or scaled_linear)",
    ),
    Option(("--beta_schedule",), choices=BETA_SCHEDULES, help="shape of the betas"),
    Option(("--beta_start",), float, "first beta"),
    Option(("--beta_end",), float, "last beta"),
    Option(("--num_train_timesteps",), int, "number of training timesteps"),
    Option(
        ("--flow_shift", "--discrete_flow_shift"),
        float,
        "train a rectified flow with this shift (SD3: 3)",
    ),
    Option(
        ("--schedule_shift",),
        float,
        "multiply sigma / alpha by this, e.g. size / 64 (2301.11093, eq. 4)",
    ),
    Option(
        ("--prediction_type",),
        choices=PREDICTIONS,
        help="what the network predicts (default: as the base model, or epsilon; on a flow "
        "flow_prediction)",
    ),
    Option(("--v_parameterization",), bool, "--prediction_type v_prediction"),
    Option(
        ("--sigma_data",),
        float,
        "spread of the data, for prediction karras and weighting edm (EDM: 0.5)",
    ),
    Option(
        ("--rescale_betas_zero_snr", "--zero_terminal_snr"),
        bool,
        "rescale the betas so that the last timestep is pure noise (2305.08891)",
    ),
)


_IN_ITEM = {  # options of a --noise_schedule item that also have a flag
    **{name: name for name in (*_BETAS, "sigma_data")},
    "shift": "flow_shift",
    "prediction": "prediction_type",
    "shifted": "schedule_shift",
    "zero_snr": "rescale_betas_zero_snr",
}


def read_schedule_flags(
    said: Said, args: argparse.Namespace, base: NoiseSchedule | None
) -> NoiseSchedule:
    """Return the schedule that the flags describe, by default the base model's.

    Raises:
        ValueError: flags contradict each other.
    """
    _refuse_said_twice(said)
    has_base = base is not None or "preset" in said.given
    schedule = _with_prediction(_on_curve(said, args, base), said, has_base)
    if "rescale_betas_zero_snr" in said.given:
        if schedule.prediction.name in ("epsilon", "score"):
            raise ValueError(
                f"{said.written('rescale_betas_zero_snr')} makes the last timestep pure noise, on "
                f"which prediction {schedule.prediction.name} is ill-posed; give "
                "--prediction_type v_prediction (or sample) as well"
            )
        schedule = said.made("rescale_betas_zero_snr", schedule.zero_terminal_snr)
    shift = said.value("schedule_shift")
    if shift is None:
        return schedule
    return said.made("schedule_shift", lambda: schedule.shifted(shift))


def _refuse_said_twice(said: Said) -> None:
    """Raise ValueError if a flag and the --noise_schedule item set an option differently."""
    _, options = parse_item(said.given.get("noise_schedule", ""))
    for option, key in _IN_ITEM.items():
        if option in options and said.given.get(key, options[option]) != options[option]:
            raise contradiction(said.written(key), said.written("noise_schedule"), SAYING_THE_SAME)


def _on_curve(said: Said, args: argparse.Namespace, base: NoiseSchedule | None) -> NoiseSchedule:
    betas = {name: said.given[name] for name in _BETAS if name in said.given}
    if "preset" in said.given:
        for key in ("noise_schedule", "flow_shift"):
            if key in said.given:
                raise contradiction(said.written("preset"), said.written(key))
        base = preset_schedule(said)
    if "flow_shift" in said.given:
        of_betas = [name for name in betas if name.startswith("beta_")]
        refused = [key for key in (*of_betas, "rescale_betas_zero_snr") if key in said.given]
        if "noise_schedule" in said.given and parse_item(said.given["noise_schedule"])[0] != "flow":
            refused.insert(0, "noise_schedule")
        if refused:
            raise ValueError(
                f"{said.written(refused[0])} does not go with {said.written('flow_shift')}: a flow "
                "has no betas and ends in pure noise already; leave it out"
            )
        return _flow(said)
    if "noise_schedule" in said.given:
        base = read_schedule(said.given["noise_schedule"])
    schedule = base or _schedule_of_script(said, args)
    if not betas:
        return schedule
    flag, curve = said.written(next(iter(betas))), schedule.curve
    if not isinstance(curve, Discrete):
        raise ValueError(
            f"{flag} does not go with a {curve.kind} schedule, which has no betas; leave it out"
        )
    if curve.trained_betas is not None and "beta_schedule" not in betas:
        raise ValueError(
            f"the base model's betas are given one by one; give --beta_schedule with {flag}"
        )
    return replace(schedule, curve=replace(curve, trained_betas=None, **betas))


def preset_schedule(said: Said) -> NoiseSchedule:
    """Return the schedule of --preset, at --image_tokens."""
    name, tokens = said.given["preset"], said.given.get("image_tokens")
    preset = said.made("preset", lambda: lookup("preset", name, PRESETS))
    at = None if preset.only_training_takes_tokens else tokens
    return said.made("preset", lambda: NoiseSchedule.preset(name, at))


def _flow(said: Said) -> NoiseSchedule:
    count = said.given.get("num_train_timesteps", 1000)
    return said.made("flow_shift", lambda: NoiseSchedule.flow(said.value("flow_shift"), count))


def _schedule_of_script(said: Said, args: argparse.Namespace) -> NoiseSchedule:
    """Return the script's own schedule, or a default, if no alphabar flag and no base sets one."""
    try:
        found = schedule_of_base_model(args)
    except ValueError:
        # scripts for flows have --flow_shift: their models are single files
        if "flow_shift" not in said.weak:
            raise
        found = None
    if found is not None:
        return found
    if "flow_shift" in said.weak:
        return _flow(said)
    return SCHEDULES.get(said.given.get("beta_schedule", ""), NoiseSchedule.scaled_linear)()


def _with_prediction(schedule: NoiseSchedule, said: Said, has_base: bool) -> NoiseSchedule:
    name = said.given.get("prediction_type")
    if "v_parameterization" in said.given:
        if name not in (None, "v_prediction"):
            raise contradiction(said.written("v_parameterization"), said.written("prediction_type"))
        name = "v_prediction"
    if name is None and not has_base and "noise_schedule" not in said.given:
        name = said.weak.get("prediction_type")
    kind = PREDICTIONS[name] if name is not None else type(schedule.prediction)
    sigma_data = said.value("sigma_data")
    if "sigma_data" not in (field.name for field in fields(kind)):
        return schedule if name is None else _predicting(schedule, name)
    if sigma_data is not None:
        return NoiseSchedule(schedule.curve, {"name": kind.name, "sigma_data": sigma_data})
    if isinstance(schedule.prediction, kind):
        return schedule
    raise ValueError(
        f"--prediction_type {name} needs --sigma_data, the standard deviation of the data; EDM "
        "uses 0.5 for images in [-1, 1]"
    )


def _predicting(schedule: NoiseSchedule, name: str) -> NoiseSchedule:
    try:
        return schedule.with_prediction(name)
    except ValueError as error:
        raise ValueError(
            f"--prediction_type {name} is ill-posed on this schedule, {schedule}, which ends in "
            "pure noise: the output would say nothing of x_0 there; give "
            "--prediction_type v_prediction (or sample; on a flow flow_prediction)"
        ) from error
