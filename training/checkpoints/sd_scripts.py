"""The metadata with which sd-scripts (kohya) says how it weighted the loss and drew the noise."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ...noising import Noising

WEIGHTINGS: Mapping[str, Mapping[str, str | bool]] = {
    "min_snr": {"ss_min_snr_gamma": "gamma"},
    "kohya_debiased_epsilon": {"ss_debiased_estimation": True},
    "kohya_debiased_v": {"ss_debiased_estimation": True},
    "kohya_scale_v_pred": {"ss_scale_v_pred_loss_like_noise_pred": True},
}
NOISES: Mapping[str, Mapping[str, str | bool]] = {
    "offset": {"ss_noise_offset": "strength", "ss_noise_offset_random_strength": "random_strength"},
    "adaptive_offset": {
        "ss_noise_offset": "strength",
        "ss_noise_offset_random_strength": "random_strength",
        "ss_adaptive_noise_scale": "scale",
    },
    "pyramid": {
        "ss_multires_noise_iterations": "iterations",
        "ss_multires_noise_discount": "discount",
    },
    "input_perturbation": {
        "ss_ip_noise_gamma": "strength",
        "ss_ip_noise_gamma_random_strength": "random_strength",
    },
}
LOSSES: Mapping[str, Mapping[str, str | bool]] = {
    "l1": {"ss_loss_type": "name"},
    "l2": {"ss_loss_type": "name"},
}
"""By our name: each key of sd-scripts, and our field with its value, or the value itself."""
KEYS = frozenset(
    key for table in (WEIGHTINGS, NOISES, LOSSES) for keys in table.values() for key in keys
)


def training_metadata(noising: Noising) -> dict[str, str]:
    """Return the metadata of sd-scripts for a training; what it has no key for is left out.

    >>> from alphabar.noising import NoiseSchedule
    >>> schedule = NoiseSchedule.scaled_linear()
    >>> training_metadata(Noising(schedule, weighting="min_snr", noise="offset"))["ss_noise_offset"]
    '0.1'
    """
    said: dict[str, str] = {}
    kinds: list[tuple[Mapping[str, Mapping[str, str | bool]], Any]] = [
        (WEIGHTINGS, noising.weighting),
        (LOSSES, noising.loss),
        *((NOISES, kind) for kind in noising.noise.kinds),
    ]
    for table, kind in kinds:
        if getattr(kind, "probability", 1.0) < 1 or getattr(kind, "decay_steps", None) is not None:
            continue  # sd-scripts has neither
        for key, value in table.get(kind.name, {}).items():
            said[key] = str(getattr(kind, value) if isinstance(value, str) else value)
    return said
