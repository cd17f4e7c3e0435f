"""Training: LightningModule, command-line flags, checkpoints, weight averages, console command.

The checkpoints contain all that sampling needs.
"""

from typing import TYPE_CHECKING, Any

from .checkpoints.accelerate_states import save_schedule_with
from .checkpoints.convert import convert_path
from .checkpoints.inspect import inspect_path
from .checkpoints.loading import load_checkpoint
from .checkpoints.read import schedule_from_checkpoint
from .checkpoints.safetensors import write_markers
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
from .flags.parsing import add_noising_arguments, noising_from_arguments, schedule_from_arguments
from .media.options import Media
from .previews.groups import PreviewConditions
from .previews.previews import Previews
from .publishing.settings import read_settings, sampler_from_settings

if TYPE_CHECKING:
    from .module import DiffusionModule

__all__ = [
    "EMA_PROFILES",
    "Constant",
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


def __getattr__(name: str) -> Any:
    # lazy: Lightning takes seconds and 200 MiB; the console command and argparse scripts do not
    # need it
    if name != "DiffusionModule":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from .module import DiffusionModule

    return DiffusionModule
