"""Training: a LightningModule, command-line flags, checkpoints that can be sampled from, the console command."""

from .arguments import add_noising_arguments, noising_from_arguments, schedule_from_arguments
from .checkpoints import schedule_from_checkpoint
from .loading import load_checkpoint
from .module import DiffusionModule

__all__ = [
    "DiffusionModule",
    "add_noising_arguments",
    "load_checkpoint",
    "noising_from_arguments",
    "schedule_from_arguments",
    "schedule_from_checkpoint",
]
