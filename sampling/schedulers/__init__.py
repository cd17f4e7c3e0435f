"""The scheduler classes of diffusers over tables of alphabar: change the import, keep the script.

The names, arguments, config keys, files and images are those of diffusers; ``isinstance`` and
``from_config`` hold both ways, and a saved pipeline names the class of diffusers. No step waits for
the device, and ``add_noise`` and ``get_velocity`` are right at every training timestep.

Differences, each an error or a warning:

- A config that no table is (``invert_sigmas``, the EDM schedule of Stable Video Diffusion) is an
  error of the constructor.
- Zero terminal SNR with epsilon prediction noises, but is an error in ``set_timesteps``.
- PNDM on a grid whose gaps are not T // N takes its own grid, with a warning, and LMS that starts
  in the middle begins with order 1.
- ``LEFT_OUT`` names the classes without a drop-in, and why. diffusers is imported with the first
  class.

>>> from alphabar.sampling.schedulers import DDPMScheduler
>>> scheduler = DDPMScheduler(prediction_type="v_prediction", rescale_betas_zero_snr=True)
>>> scheduler.config.prediction_type, scheduler.schedule.has_zero_terminal_snr
('v_prediction', True)
>>> scheduler.set_timesteps(4)
>>> scheduler.timesteps.tolist()
[750, 500, 250, 0]
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ...noising.utils.registry import unknown
from ..interop.diffusers_classes import CLASSES

_EDM = "its schedule is EDM's; take Sampler.from_diffusers(config).as_scheduler()"
LEFT_OUT: Mapping[str, str] = {
    "CogVideoXDPMScheduler": "its step is given the outputs of earlier steps; take "
    "CogVideoXDDIMScheduler, or the sampler 'dpmpp_2m_sde'",
    "EDMEulerScheduler": _EDM,
    "EDMDPMSolverMultistepScheduler": _EDM,
    "CMStochasticIterativeScheduler": "its network takes 1000 times the time of EDM; take the "
    "sampler 'consistency' on NoiseSchedule.karras()",
}
"""The classes with a known sampler and no drop-in, and why."""

NAMES = tuple(name for name in CLASSES if name not in LEFT_OUT)
"""The names of the drop-ins."""


def __getattr__(name: str) -> Any:
    if name in LEFT_OUT:
        raise AttributeError(f"{name} has no drop-in here: {LEFT_OUT[name]}")
    if name.startswith("_"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if name not in NAMES:
        raise AttributeError(unknown("scheduler class", name, NAMES))
    from .drop_in import drop_in

    return drop_in(name)


def __dir__() -> list[str]:
    return sorted([*globals(), *NAMES])
