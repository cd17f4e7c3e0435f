"""Lightning callbacks: previews while a model trains, and the noise schedule beside every checkpoint."""

from .ema_source import ema_weights
from .schedule_checkpoint import ScheduleCheckpoint
from .validation_sampling import ValidationSampling

__all__ = ["ScheduleCheckpoint", "ValidationSampling", "ema_weights"]
