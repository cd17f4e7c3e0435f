"""The noising options of other trainers' parsers: name, type, default and choices, as their scripts
add them.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from typing import Any

_SWITCH = {"action": "store_true"}
_NUMBER: dict[str, Any] = {"type": float, "default": None}
_BASE = {
    "--pretrained_model_name_or_path": {"type": str, "default": None},
    "--seed": {"type": int, "default": None},
}
_SD3 = {
    "--logit_mean": {"type": float, "default": 0.0},
    "--logit_std": {"type": float, "default": 1.0},
    "--mode_scale": {"type": float, "default": 1.29},
}
_SCHEMES = ["sigma_sqrt", "logit_normal", "mode", "cosmap"]

DIFFUSERS: Mapping[
    str, Mapping[str, Mapping[str, Any]]
] = {  # examples of huggingface/diffusers 0.3x
    "train_text_to_image.py": {
        **_BASE,
        "--input_perturbation": {"type": float, "default": 0},
        "--snr_gamma": _NUMBER,
        "--prediction_type": {"type": str, "default": None},
        "--noise_offset": {"type": float, "default": 0},
        "--dream_training": _SWITCH,
    },
    "train_text_to_image_sdxl.py": {
        **_BASE,
        "--timestep_bias_strategy": {
            "type": str,
            "default": "none",
            "choices": ["earlier", "later", "range", "none"],
        },
        "--snr_gamma": _NUMBER,
        "--prediction_type": {"type": str, "default": None},
        "--noise_offset": {"type": float, "default": 0},
    },
    "train_dreambooth_lora_sdxl.py": {
        **_BASE,
        "--snr_gamma": _NUMBER,
        "--do_edm_style_training": _SWITCH,
    },
    "train_unconditional.py": {
        "--prediction_type": {"type": str, "default": "epsilon", "choices": ["epsilon", "sample"]},
        "--ddpm_num_steps": {"type": int, "default": 1000},
        "--ddpm_num_inference_steps": {"type": int, "default": 1000},
        "--ddpm_beta_schedule": {"type": str, "default": "linear"},
    },
    "train_dreambooth_sd3.py": {
        **_BASE,
        **_SD3,
        "--weighting_scheme": {"type": str, "default": "logit_normal", "choices": _SCHEMES},
        "--precondition_outputs": {"type": int, "default": 1},
    },
    "train_dreambooth_lora_flux.py": {
        **_BASE,
        **_SD3,
        "--weighting_scheme": {"type": str, "default": "none", "choices": [*_SCHEMES, "none"]},
    },
}
_KOHYA = {  # library/train_util.py and library/custom_train_functions.py
    **_BASE,
    "--v_parameterization": _SWITCH,
    "--zero_terminal_snr": _SWITCH,
    "--min_snr_gamma": _NUMBER,
    "--scale_v_pred_loss_like_noise_pred": _SWITCH,
    "--v_pred_like_loss": _NUMBER,
    "--debiased_estimation_loss": _SWITCH,
    "--noise_offset": _NUMBER,
    "--noise_offset_random_strength": _SWITCH,
    "--adaptive_noise_scale": _NUMBER,
    "--multires_noise_iterations": {"type": int, "default": None},
    "--multires_noise_discount": {"type": float, "default": 0.3},
    "--ip_noise_gamma": _NUMBER,
    "--ip_noise_gamma_random_strength": _SWITCH,
    "--min_timestep": {"type": int, "default": None},
    "--max_timestep": {"type": int, "default": None},
    "--loss_type": {"type": str, "default": "l2", "choices": ["l1", "l2", "huber", "smooth_l1"]},
    "--huber_schedule": {
        "type": str,
        "default": "snr",
        "choices": ["constant", "exponential", "snr"],
    },
    "--huber_c": {"type": float, "default": 0.1},
    "--huber_scale": {"type": float, "default": 1.0},
}
KOHYA: Mapping[str, Mapping[str, Mapping[str, Any]]] = {
    "sdxl_train.py": _KOHYA,
    "sd3_train.py": {
        **_KOHYA,
        **_SD3,
        "--weighting_scheme": {"default": "uniform", "choices": [*_SCHEMES, "none", "uniform"]},
        "--training_shift": {"type": float, "default": 1.0},
    },
    "flux_train.py": {
        **_KOHYA,
        **_SD3,
        "--weighting_scheme": {"default": "none", "choices": [*_SCHEMES, "none"]},
        "--timestep_sampling": {
            "default": "sigma",
            "choices": ["sigma", "uniform", "sigmoid", "shift", "flux_shift"],
        },
        "--sigmoid_scale": {"type": float, "default": 1.0},
        "--model_prediction_type": {
            "default": "sigma_scaled",
            "choices": ["raw", "additive", "sigma_scaled"],
        },
        "--discrete_flow_shift": {"type": float, "default": 3.0},
    },
}
MUSUBI: Mapping[str, Mapping[str, Mapping[str, Any]]] = {  # hv_train_network.setup_parser_common
    "qwen_image_train_network.py": {
        **_SD3,
        "--seed": {"type": int, "default": None},
        "--weighting_scheme": {"default": "none", "choices": [*_SCHEMES, "none"]},
        "--timestep_sampling": {
            "default": "sigma",
            "choices": [
                "sigma",
                "uniform",
                "sigmoid",
                "shift",
                "flux_shift",
                "qwen_shift",
                "logsnr",
            ],
        },
        "--sigmoid_scale": {"type": float, "default": 1.0},
        "--discrete_flow_shift": {"type": float, "default": 1.0},
        "--min_timestep": {"type": int, "default": None},
        "--max_timestep": {"type": int, "default": None},
        "--preserve_distribution_shape": _SWITCH,
    }
}
PARSERS = {**DIFFUSERS, **KOHYA, **MUSUBI}


def parser_of(script: str) -> argparse.ArgumentParser:
    """Return a parser with the script's own noising options, before any of ours."""
    parser = argparse.ArgumentParser(script)
    for name, how in PARSERS[script].items():
        parser.add_argument(name, **dict(how))
    return parser


def named(script: str) -> Sequence[str]:
    return list(PARSERS[script])
