"""The schedule of the model that a diffusers script fine-tunes, and the scheduler that it saves."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from ...noising import BETA_SCHEDULES, Discrete, NoiseSchedule

_ADVICE = (
    "pass base=... to noising_from_arguments, or give the schedule, "
    "e.g. --noise_schedule scaled_linear"
)


def diffusers_scheduler(schedule: NoiseSchedule, like: Any = None) -> Any:
    """Return a diffusers scheduler with this schedule, for a pipeline that was trained on it.

    Args:
        schedule: the schedule of the training.
        like: the current scheduler of the pipeline. If its class supports the schedule, the class
            and its sampling options are kept. If the schedule ends in pure noise, the options that
            decide where sampling starts are not kept, so that sampling starts from pure noise.

    Raises:
        ValueError: diffusers has no config for the schedule.

    >>> from diffusers import DDPMScheduler
    >>> schedule = NoiseSchedule.linear(prediction="v_prediction").zero_terminal_snr()
    >>> scheduler = diffusers_scheduler(schedule, like=DDPMScheduler(clip_sample=False))
    >>> type(scheduler).__name__, scheduler.config.clip_sample, float(scheduler.alphas_cumprod[-1])
    ('DDPMScheduler', False, 0.0)
    """
    return schedule.to_diffusers(like)


def schedule_of_base_model(args: argparse.Namespace) -> NoiseSchedule | None:
    """Return the schedule from the script's own flags, or None if no such flag is set.

    ``--pretrained_model_name_or_path`` is a folder or a hub repository, at ``--revision``. Only its
    scheduler config is read, from the hub's cache if possible; nothing else is downloaded. Without
    that flag, the beta flags of train_unconditional define the schedule.

    Raises:
        ValueError: the config does not exist or cannot be read; the message says what to pass.

    >>> schedule_of_base_model(
    ...     argparse.Namespace(ddpm_beta_schedule="linear", ddpm_num_steps=500)
    ... ).num_train_timesteps
    500
    """
    source = getattr(args, "pretrained_model_name_or_path", None)
    if not source:
        return _of_ddpm_flags(args)
    try:
        return _of_pipeline(str(source), getattr(args, "revision", None))
    except Exception as error:  # any error of the hub's client has the same fix
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise ValueError(
            f"no schedule is known of --pretrained_model_name_or_path {source} ({reason}); "
            f"{_ADVICE}"
        ) from error


def _of_pipeline(source: str, revision: str | None) -> NoiseSchedule:
    path = Path(source)
    if path.is_file():
        raise ValueError("it is a single file, which holds no scheduler_config.json")
    return NoiseSchedule.from_pretrained(source, revision=revision)


def _of_ddpm_flags(args: argparse.Namespace) -> NoiseSchedule | None:
    """Return the schedule that diffusers' train_unconditional.py makes from its flags.

    It is DDPMScheduler with the default beta_start and beta_end.
    """
    name, count = getattr(args, "ddpm_beta_schedule", None), getattr(args, "ddpm_num_steps", None)
    if name is None or count is None:
        return None
    if name not in BETA_SCHEDULES:
        raise ValueError(f"--ddpm_beta_schedule {name} is not known here; {_ADVICE}")
    return NoiseSchedule(Discrete(name, 0.0001, 0.02, num_train_timesteps=count))
