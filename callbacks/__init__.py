"""Lightning callbacks: previews, averaged weights, losses by noise level, the noise schedule beside every checkpoint."""

from .ema import EMA
from .ema_source import ema_weights
from .loss_by_snr import LossBySNR
from .schedule_checkpoint import ScheduleCheckpoint
from .validation_sampling import ValidationSampling

__all__ = ["EMA", "LossBySNR", "ScheduleCheckpoint", "ValidationSampling", "ema_weights"]
