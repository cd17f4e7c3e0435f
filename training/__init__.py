"""Training: LightningModule, command-line flags, checkpoints, weight averages, console command.

The checkpoints contain all that sampling needs.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .checkpoints.accelerate_states import save_schedule_with
    from .checkpoints.convert import convert_path
    from .checkpoints.inspect import inspect_path
    from .checkpoints.loading import load_checkpoint
    from .checkpoints.read import schedule_from_checkpoint
    from .checkpoints.safetensors import write_markers
    from .diff2flow import Diff2Flow
    from .ema.model import ModelEMA
    from .ema.posthoc import posthoc_ema, save_snapshot
    from .ema.profiles import (
        EMA_PROFILES,
        Constant,
        EMAProfile,
        HalfLife,
        InverseGamma,
        PowerFunction,
        Warmup,
    )
    from .flags.base_model import diffusers_scheduler
    from .flags.parsing import (
        add_noising_arguments,
        noising_from_arguments,
        schedule_from_arguments,
    )
    from .media.options import Media
    from .module import DiffusionModule
    from .previews.groups import PreviewConditions
    from .previews.previews import Previews
    from .publishing.settings import read_settings, sampler_from_settings

__all__ = [
    "EMA_PROFILES",
    "Constant",
    "Diff2Flow",
    "DiffusionModule",
    "EMAProfile",
    "HalfLife",
    "InverseGamma",
    "Media",
    "ModelEMA",
    "PowerFunction",
    "PreviewConditions",
    "Previews",
    "Warmup",
    "add_noising_arguments",
    "convert_path",
    "diffusers_scheduler",
    "inspect_path",
    "load_checkpoint",
    "noising_from_arguments",
    "posthoc_ema",
    "read_settings",
    "sampler_from_settings",
    "save_schedule_with",
    "save_snapshot",
    "schedule_from_arguments",
    "schedule_from_checkpoint",
    "write_markers",
]


# lazy: Lightning takes seconds and 200 MiB, torch.distributed.fsdp another; the console command and
# argparse scripts do not need them
_NAMES = {
    "checkpoints.accelerate_states": ("save_schedule_with",),
    "checkpoints.convert": ("convert_path",),
    "checkpoints.inspect": ("inspect_path",),
    "checkpoints.loading": ("load_checkpoint",),
    "checkpoints.read": ("schedule_from_checkpoint",),
    "checkpoints.safetensors": ("write_markers",),
    "diff2flow": ("Diff2Flow",),
    "ema.model": ("ModelEMA",),
    "ema.posthoc": ("posthoc_ema", "save_snapshot"),
    "ema.profiles": (
        "Constant",
        "EMAProfile",
        "EMA_PROFILES",
        "HalfLife",
        "InverseGamma",
        "PowerFunction",
        "Warmup",
    ),
    "flags.base_model": ("diffusers_scheduler",),
    "flags.parsing": ("add_noising_arguments", "noising_from_arguments", "schedule_from_arguments"),
    "media.options": ("Media",),
    "module": ("DiffusionModule",),
    "previews.groups": ("PreviewConditions",),
    "previews.previews": ("Previews",),
    "publishing.settings": ("read_settings", "sampler_from_settings"),
}
_PLACES = {name: module for module, names in _NAMES.items() for name in names}


def __getattr__(name: str) -> Any:
    if name not in _PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_PLACES[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
