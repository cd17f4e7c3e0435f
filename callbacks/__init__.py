"""Lightning callbacks: previews, EMA weights, loss by noise level, schedule next to checkpoints."""

from .ema import EMA
from .ema_weights import ema_weights
from .loss_by_snr import LossBySNR
from .previews.callback import ValidationSampling
from .schedule_checkpoint import ScheduleCheckpoint

__all__ = ["EMA", "LossBySNR", "ScheduleCheckpoint", "ValidationSampling", "ema_weights"]
