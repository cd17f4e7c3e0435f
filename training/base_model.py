"""The schedule of the model that a script fine-tunes, found by the flags that the script has for it."""

from __future__ import annotations

import argparse
from pathlib import Path

from ..noising import BETA_SCHEDULES, Discrete, NoiseSchedule

_MEND = "pass base=... to noising_from_arguments, or say the schedule, e.g. --noise_schedule scaled_linear"


def schedule_of_base_model(args: argparse.Namespace) -> NoiseSchedule | None:
    """Return the schedule that a script's own flags name: that of its pretrained model, or of train_unconditional's betas.

    ``--pretrained_model_name_or_path`` is a folder, or a repository on the hub, of which the scheduler's config is read (from the
    cache where it is there), at ``--revision``; nothing else is downloaded. None where no such flag is set. ValueError, saying
    what to pass, where there is no such config or it cannot be read.

    >>> schedule_of_base_model(argparse.Namespace(ddpm_beta_schedule="linear", ddpm_num_steps=500)).num_train_timesteps
    500
    """
    source = getattr(args, "pretrained_model_name_or_path", None)
    if not source:
        return _of_ddpm_flags(args)
    try:
        return NoiseSchedule.from_pretrained(_scheduler_folder(str(source), getattr(args, "revision", None)))
    except Exception as error:  # whatever the hub's client raises: the mend is the same
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise ValueError(
            f"no schedule is known of --pretrained_model_name_or_path {source} ({reason}); {_MEND}"
        ) from error


def _scheduler_folder(source: str, revision: str | None) -> Path:
    path = Path(source)
    if path.is_file():
        raise ValueError("it is a single file, which holds no scheduler_config.json")
    if path.is_dir():
        return path / "scheduler" if (path / "scheduler").is_dir() else path
    from huggingface_hub import hf_hub_download

    return Path(hf_hub_download(source, "scheduler/scheduler_config.json", revision=revision)).parent


def _of_ddpm_flags(args: argparse.Namespace) -> NoiseSchedule | None:
    """Return what diffusers' train_unconditional.py makes of its flags: DDPMScheduler with the betas' default ends."""
    name, count = getattr(args, "ddpm_beta_schedule", None), getattr(args, "ddpm_num_steps", None)
    if name is None or count is None:
        return None
    if name not in BETA_SCHEDULES:
        raise ValueError(f"--ddpm_beta_schedule {name} is not known here; {_MEND}")
    return NoiseSchedule(Discrete(name, 0.0001, 0.02, count))
