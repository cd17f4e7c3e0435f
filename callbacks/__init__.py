"""Lightning callbacks: previews, EMA weights, loss by noise level, schedule next to checkpoints."""

from ..training.media.options import Media
from ..training.previews.groups import PreviewConditions
from .ema import EMA
from .ema_weights import ema_weights
from .loss_by_snr import LossBySNR
from .previews.callback import ValidationSampling
from .previews.triggers import Triggers
from .schedule_checkpoint import ScheduleCheckpoint

__all__ = [
    "EMA",
    "LossBySNR",
    "Media",
    "PreviewConditions",
    "ScheduleCheckpoint",
    "Triggers",
    "ValidationSampling",
    "ema_weights",
]
