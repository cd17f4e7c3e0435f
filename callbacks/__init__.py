"""Lightning callbacks: previews, averaged weights, losses by noise level, the noise schedule beside
every checkpoint.
"""

from .ema import EMA
from .ema_weights import ema_weights
from .loss_by_snr import LossBySNR
from .previews.callback import ValidationSampling
from .schedule_checkpoint import ScheduleCheckpoint

__all__ = ["EMA", "LossBySNR", "ScheduleCheckpoint", "ValidationSampling", "ema_weights"]
