"""The noise schedule: a curve and a prediction type.

It holds all that a sampler must know about how a model was trained. The training loss, the
samplers, the callbacks and the checkpoint share one frozen value, so they cannot disagree. It has
no device, no dtype and no state. Schedules compare, hash and pickle by their numbers.
"""

# no postponed annotations here: LightningCLI reads the types of NoiseSchedule.__init__ from them
import hashlib
import os
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, replace
from difflib import get_close_matches
from functools import cached_property
from pathlib import Path
from typing import Any, overload

import torch
from torch import Tensor

from .axes import Axis, along
from .curves import curve_from_config
from .curves.base import LEAST_ALPHA, Curve
from .curves.shifts import resolution_shift, token_shift
from .curves.truncated import inward_time, times_at_levels, truncate
from .io.diffusers import from_diffusers, scheduler_of, to_diffusers
from .io.files import CONFIG_NAME, EXACT_NAME, read_configs, write_configs
from .io.hub import schedule_folder
from .named_schedules import Constructors
from .prediction import Prediction, resolve_prediction
from .utils.config_reading import mapping, whole, word
from .utils.registry import shown, unknown
from .utils.validation import require_same_shape

VERSION = 1  # version of the config format
_KEYS = ("version", "curve", "prediction", "fingerprint")


@dataclass(frozen=True)
class NoiseSchedule(Constructors):
    """A curve x_t = α(t) x_0 + σ(t) ε and the prediction type of the network.

    The constructors (``linear``, ``flow``, ...) are in ``named_schedules.py``. The transformations
    below return new values.

    Args:
        curve: the curve.
        prediction: a name of ``PREDICTIONS``, a config of a prediction type, or a ``Prediction``
            object.

    Raises:
        TypeError: if ``curve`` is not a Curve.
        ValueError: for an unknown name; for a prediction that cannot determine x_0 at the terminal
            time (epsilon or score where α = 0); for an α too small for float32 at the last
            timesteps.

    >>> schedule = NoiseSchedule.scaled_linear(
    ...     0.00085, 0.012, prediction="v_prediction"
    ... ).zero_terminal_snr()
    >>> schedule.alpha(torch.tensor([0, 999]))
    tensor([0.9996, 0.0000])
    """

    curve: Curve
    prediction: Prediction

    def __init__(
        self, curve: Curve, prediction: str | Mapping[str, Any] | Prediction = "epsilon"
    ) -> None:
        if not isinstance(curve, Curve):
            raise TypeError(_no_curve(curve))
        object.__setattr__(self, "curve", curve)
        object.__setattr__(self, "prediction", resolve_prediction(prediction))
        self._require_levels()
        self._require_well_posed()

    def _require_levels(self) -> None:
        count = self.curve.num_train_timesteps
        last = self.curve.time_at_index(
            torch.tensor([max(count - 2, 0), count - 1], dtype=torch.float64)
        )
        before, final = self.curve.alpha(last.clamp(self.curve.t_min, self.curve.t_max)).tolist()
        if min(before, final or before) < LEAST_ALPHA and count > 1:
            raise ValueError(
                f"alpha is {before:g} and {final:g} at the last two of {count} timesteps, less "
                f"than the {LEAST_ALPHA:g} that "
                "float32 holds with its powers; add less noise, or the same in fewer timesteps"
            )

    def _require_well_posed(self) -> None:
        end = torch.tensor(self.curve.t_max, dtype=torch.float64)
        alpha, sigma = self.curve.alpha(end), self.curve.sigma(end)
        if float(self.prediction.determinant(alpha, sigma)) == 0.0:
            raise ValueError(
                f"prediction {self.prediction.name!r} is ill-posed on a schedule with zero "
                f"terminal SNR: at t = {self.curve.t_max:g} "
                "alpha is 0, x_t is pure noise, and the output says nothing of x_0; use "
                "with_prediction('v_prediction') "
                "(or 'sample', 'flow_prediction') before zero_terminal_snr()"
            )

    # -- transformations return new values ---------------------------------------------------------

    def zero_terminal_snr(self) -> "NoiseSchedule":
        """Return this schedule with α exactly 0 at the last timestep.

        Source: Lin et al. 2305.08891, algorithm 1. It does not commute with :meth:`shifted`: each
        method acts on the schedule it is called on. CogVideoX shifts first.

        >>> NoiseSchedule.linear(
        ...     prediction="v_prediction"
        ... ).zero_terminal_snr().has_zero_terminal_snr
        True
        """
        return replace(self, curve=self.curve.zero_terminal_snr())

    def shifted(self, factor: float) -> "NoiseSchedule":
        """Return this schedule with σ / α multiplied by ``factor`` at every time.

        The log SNR decreases by 2 log(factor). The curve stays on its path, and α = 0 stays exactly
        0. On a flow this is the static shift, σ' = s σ / (1 + (s - 1) σ) (Esser et al. 2403.03206,
        eq. 23), and two shifts multiply. Variance preserving curves get SNR / s². On variance
        exploding curves σ is s times as large (EDM, whose time is σ: its range). ``shifts.py``
        computes the factor for a resolution.

        >>> NoiseSchedule.flow(shift=3.0).shifted(2.0) == NoiseSchedule.flow(shift=6.0)
        True
        """
        return replace(self, curve=self.curve.shifted(factor))

    def shifted_for_resolution(
        self, size: int | tuple[int, ...], base_size: int | tuple[int, ...]
    ) -> "NoiseSchedule":
        """Return this schedule, made for images of ``base_size``, shifted for ``size``.

        See :func:`resolution_shift`.

        >>> NoiseSchedule.cosine().shifted_for_resolution(128, 64).log_snr(
        ...     torch.tensor(0.5)
        ... ).item()  # 2 log(64 / 128)
        -1.386294...
        """
        return self.shifted(resolution_shift(size, base_size))

    def shifted_for_tokens(self, tokens: int, **line: Any) -> "NoiseSchedule":
        """Return this schedule shifted as in Flux for this number of image tokens.

        ``line``: options of :func:`token_shift`.

        >>> round(NoiseSchedule.flow().shifted_for_tokens(4096).curve.shift, 4)
        3.1582
        """
        return self.shifted(token_shift(tokens, **line))

    def truncated(
        self,
        t_min: float | None = None,
        t_max: float | None = None,
        *,
        log_snr_min: float | None = None,
        log_snr_max: float | None = None,
        noise_level_min: float | None = None,
        noise_level_max: float | None = None,
    ) -> "NoiseSchedule":
        """Return the part of this schedule from ``t_min`` to ``t_max``, both included.

        Use it for a model that is trained on these times only (an expert, a refiner). Every time
        keeps its α, its σ and its network time. Training times and sampling steps lie inside the
        part. On a flow, ``t_min`` and ``t_max`` are before the shift; the boundary of Wan 2.2 is a
        noise level, after it.

        Args:
            t_min: the first time; by default the start of the schedule.
            t_max: the last time; by default the end of the schedule.
            log_snr_min: the log SNR of the last time, in place of ``t_max``. On a discrete schedule
                the part has the timesteps inside the range.
            log_snr_max: the log SNR of the first time, in place of ``t_min``.
            noise_level_min: the noise level of the first time, in place of ``t_min``: σ after the
                shift on a flow (the network's timestep / 1000), σ / α on other curves.
            noise_level_max: the noise level of the last time, in place of ``t_max``.

        Raises:
            ValueError: if an end lies outside the schedule, if nothing is left, or if an end is
                given twice.

        >>> refiner = NoiseSchedule.scaled_linear().truncated(t_max=199)
        >>> refiner.num_train_timesteps, refiner.alphas_cumprod.shape
        (200, torch.Size([200]))
        >>> round(NoiseSchedule.flow().truncated(log_snr_min=0.0).curve.t_max, 6)
        0.5
        >>> flow = NoiseSchedule.flow(shift=12.0)
        >>> [
        ...     round(flow.sigma(torch.tensor(part.curve.t_min)).item(), 3)
        ...     for part in (flow.truncated(noise_level_min=0.875), flow.truncated(t_min=0.875))
        ... ]
        [0.875, 0.988]
        """
        first = self._end(
            True, t_min=t_min, log_snr_max=log_snr_max, noise_level_min=noise_level_min
        )
        last = self._end(
            False, t_max=t_max, log_snr_min=log_snr_min, noise_level_max=noise_level_max
        )
        return replace(self, curve=truncate(self.curve, first, last))

    def _end(self, least: bool, **ends: float | None) -> float:
        """Return the time of the end that is given by at most one name."""
        curve = self.curve
        given = [(name, value) for name, value in ends.items() if value is not None]
        if not given:
            return curve.t_min if least else curve.t_max
        (name, value), *others = given
        if others:
            raise ValueError(
                f"{name} and {others[0][0]} are the same end of the schedule; give one of the two"
            )
        if name.startswith("t_"):
            return float(value)
        if name.startswith("noise_level"):
            levels = (value, None) if least else (None, value)
            return times_at_levels(curve, *levels)[not least]
        return inward_time(curve, curve.time(torch.tensor([value], dtype=torch.float64)), least)

    def with_prediction(self, prediction: str | Prediction) -> "NoiseSchedule":
        """Return this schedule with another prediction type.

        >>> NoiseSchedule.linear().with_prediction("sample").prediction.name
        'sample'
        """
        return replace(self, prediction=resolve_prediction(prediction))

    # -- the curve ---------------------------------------------------------------------------------

    def alpha(self, t: Tensor) -> Tensor:
        """Return the signal level α(t); shape and device of ``t``."""
        return self.curve.alpha(t)

    def sigma(self, t: Tensor) -> Tensor:
        """Return the noise level σ(t); shape and device of ``t``."""
        return self.curve.sigma(t)

    def snr(self, t: Tensor) -> Tensor:
        """Return the signal-to-noise ratio α² / σ²."""
        return self.curve.snr(t)

    def log_snr(self, t: Tensor) -> Tensor:
        """Return λ(t) = log SNR."""
        return self.curve.log_snr(t)

    def sigma_ve(self, t: Tensor) -> Tensor:
        """Return σ / α, the ``sigmas`` of k-diffusion."""
        return self.curve.sigma_ve(t)

    def time(self, log_snr: Tensor) -> Tensor:
        """Return the time of this log SNR."""
        return self.curve.time(log_snr)

    @property
    def num_train_timesteps(self) -> int:
        """The number of training timesteps; on continuous curves, the scale of time."""
        return self.curve.num_train_timesteps

    @property
    def alphas_cumprod(self) -> Tensor:
        """ᾱ = α² at every training index, float64 on the CPU."""
        return (
            self.curve.alpha(
                self.curve.time_at_index(
                    torch.arange(self.num_train_timesteps, dtype=torch.float64)
                )
            )
            ** 2
        )

    @property
    def has_zero_terminal_snr(self) -> bool:
        """Whether α is exactly 0 at the last time."""
        return float(self.curve.alpha(torch.tensor(self.curve.t_max, dtype=torch.float64))) == 0.0

    # -- network inputs ----------------------------------------------------------------------------

    def scale_model_input(self, x_t: Tensor, timesteps: Tensor, axis: Axis | None = None) -> Tensor:
        """Return the network input for x_t; shape and dtype of ``x_t``.

        The input is x_t itself, or c_in · x_t on EDM's curve. Samplers pass the same input to the
        network, and ``Noised.x`` holds it. In your own loop, call
        ``network(schedule.scale_model_input(x_t, t), schedule.model_timesteps(t))``. The
        conversions (:meth:`to_x0`, ...) take x_t without the scale.

        ``timesteps``, ``axis``: as in :meth:`alpha_sigma`.

        >>> schedule, t = NoiseSchedule.karras(sigma_data=0.5), torch.tensor([1.2])
        >>> schedule.scale_model_input(torch.ones(1, 1), t)  # 1 / sqrt(1.2² + 0.5²)
        tensor([[0.7692]])
        """
        if not self.curve.scales_input:
            return x_t
        t = require_times(timesteps, x_t, axis)
        return (_like(self.curve.input_scale(t), x_t, axis) * x_t).to(x_t.dtype)

    def model_timesteps(self, timesteps: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """Return the time input of the network at these times; shape of ``timesteps``.

        ``timesteps``: times of the curve. The result is int64 for integer timesteps of a discrete
        schedule, else ``dtype``: 1000 σ on a flow, log(σ) / 4 on EDM's curve.

        >>> (
        ...     NoiseSchedule.flow().model_timesteps(torch.tensor([0.25])),
        ...     NoiseSchedule.linear().model_timesteps(torch.tensor([9])),
        ... )
        (tensor([250.]), tensor([9]))
        """
        time = self.curve.timestep(timesteps)
        return time.to(dtype) if time.is_floating_point() else time.long()

    # -- noising and conversions -------------------------------------------------------------------

    def alpha_sigma(
        self, t: Tensor, like: Tensor, axis: Axis | None = None
    ) -> tuple[Tensor, Tensor]:
        """Return α(t), σ(t) with shape (batch, 1, 1, ...) that broadcasts against ``like``.

        The dtype is float64 if ``like`` or ``t`` is float64, else float32.

        Args:
            t: times of the curve: a scalar, shape (batch,), or (batch, k) with ``axis``.
            like: shape (batch, ...).
            axis: the axis that k times of a sample run along, or its name in ``AXES``; k divides
                it.
        """
        t = require_times(t, like, axis)
        return _like(self.curve.alpha(t), like, axis), _like(self.curve.sigma(t), like, axis)

    def add_noise(
        self, x0: Tensor, noise: Tensor, timesteps: Tensor, axis: Axis | None = None
    ) -> Tensor:
        """Return x_t = α x_0 + σ ε in the dtype of ``x0``, computed in float32 or better.

        Args:
            x0: clean batch, shape (batch, ...).
            noise: ε, shape of ``x0``.
            timesteps, axis: times of the curve, as in :meth:`alpha_sigma`.

        Raises:
            ValueError: for shapes that do not match, and for times outside the schedule (checked on
                the CPU).

        >>> x = NoiseSchedule.flow().add_noise(
        ...     torch.ones(2, 1), torch.zeros(2, 1), torch.tensor([0.0, 0.75])
        ... )
        >>> x.flatten().tolist()
        [1.0, 0.25]
        >>> video, t = torch.ones(1, 1, 2, 1, 1), torch.tensor([[0.0, 0.75]])
        >>> NoiseSchedule.flow().add_noise(video, 0 * video, t, axis="frames").flatten().tolist()
        [1.0, 0.25]
        """
        require_same_shape("noise", noise, "x0", x0)
        alpha, sigma = self.alpha_sigma(timesteps, x0, axis)
        return (alpha * x0 + sigma * noise).to(x0.dtype)

    def target(
        self, x0: Tensor, noise: Tensor, timesteps: Tensor, axis: Axis | None = None
    ) -> Tensor:
        """Return the training target of the network for (x_0, ε, t), in float32 or better.

        >>> NoiseSchedule.flow().target(torch.ones(1, 1), torch.zeros(1, 1), torch.tensor([0.5]))
        tensor([[-1.]])
        """
        require_same_shape("noise", noise, "x0", x0)
        alpha, sigma = self.alpha_sigma(timesteps, x0, axis)
        return self.prediction.combine(x0.to(alpha.dtype), noise.to(alpha.dtype), alpha, sigma)

    def to_x0(
        self, out: Tensor, x_t: Tensor, timesteps: Tensor, axis: Axis | None = None
    ) -> Tensor:
        """Convert the network's output to x_0.

        >>> schedule = NoiseSchedule.flow()
        >>> x0, e, t = torch.full((1, 1), 3.0), torch.full((1, 1), -1.0), torch.tensor([0.25])
        >>> schedule.to_x0(schedule.target(x0, e, t), schedule.add_noise(x0, e, t), t).item()
        3.0
        """
        alpha, sigma = self.alpha_sigma(timesteps, x_t, axis)
        return self.prediction.to_x0(out.to(alpha.dtype), x_t.to(alpha.dtype), alpha, sigma)

    def to_epsilon(
        self, out: Tensor, x_t: Tensor, timesteps: Tensor, axis: Axis | None = None
    ) -> Tensor:
        """Convert the network's output to ε."""
        alpha, sigma = self.alpha_sigma(timesteps, x_t, axis)
        return self.prediction.to_epsilon(out.to(alpha.dtype), x_t.to(alpha.dtype), alpha, sigma)

    def convert(
        self,
        out: Tensor,
        x_t: Tensor,
        timesteps: Tensor,
        to: str | Prediction,
        axis: Axis | None = None,
    ) -> Tensor:
        """Convert the network's output to another prediction type.

        >>> schedule = NoiseSchedule.flow()
        >>> schedule.convert(
        ...     torch.zeros(1, 1), torch.ones(1, 1), torch.tensor([0.5]), to="sample"
        ... ).item()
        1.0
        """
        alpha, sigma = self.alpha_sigma(timesteps, x_t, axis)
        out, x_t = out.to(alpha.dtype), x_t.to(alpha.dtype)
        x0, epsilon = (
            self.prediction.to_x0(out, x_t, alpha, sigma),
            self.prediction.to_epsilon(out, x_t, alpha, sigma),
        )
        return resolve_prediction(to).combine(x0, epsilon, alpha, sigma)

    # -- identity and storage ----------------------------------------------------------------------

    @cached_property
    def fingerprint(self) -> str:
        """sha256 of curve values, network times, input scale and prediction type.

        Equivalent schedules have the same fingerprint, whatever config they are loaded from. The
        values are rounded to float32, so the last bits of a platform's exp and log do not matter.

        >>> a, b = NoiseSchedule.scaled_linear(), NoiseSchedule.scaled_linear()
        >>> a.fingerprint == NoiseSchedule.from_betas(
        ...     b.curve.betas()
        ... ).fingerprint != NoiseSchedule.linear().fingerprint
        True
        """
        curve = self.curve
        index = torch.arange(curve.num_train_timesteps, dtype=torch.float64)
        t = curve.time_at_index(index)
        # + 0.0 removes negative zeros
        columns = (
            torch.stack(
                [curve.alpha(t), curve.sigma(t), curve.timestep(t), curve.input_scale(t)]
            ).float()
            + 0.0
        )
        values = columns.numpy().astype("<f4").tobytes()
        return hashlib.sha256(
            values + repr((self.prediction.to_config(), curve.is_discrete)).encode()
        ).hexdigest()

    def to_config(self) -> dict[str, Any]:
        """Return plain JSON; :meth:`from_config` makes an equal schedule from it.

        >>> NoiseSchedule.from_config(NoiseSchedule.flow(3.0).to_config()) == NoiseSchedule.flow(
        ...     3.0
        ... )
        True
        """
        return {
            "version": VERSION,
            "curve": self.curve.to_config(),
            "prediction": self.prediction.to_config(),
            "fingerprint": self.fingerprint,
        }

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> "NoiseSchedule":
        """Return the schedule of a config.

        Raises ValueError if the config is incomplete, has unknown values, or contradicts its
        fingerprint.
        """
        if (
            not isinstance(config, Mapping)
            or not isinstance(config.get("curve"), Mapping)
            or not isinstance(config.get("prediction"), str | Mapping)
        ):
            raise ValueError(
                "not a noise schedule config: expected the keys 'curve' and 'prediction', got "
                f"{_shown(config)}"
            )
        config = mapping("a noise schedule config", config)
        if whole("version", config.get("version", VERSION)) != VERSION:
            raise ValueError(
                f"noise schedule config of version {shown(config['version'])}, this alphabar reads "
                f"version {VERSION}; update alphabar"
            )
        for key in config.keys() - set(_KEYS):
            warnings.warn(
                f"{unknown('key of a noise schedule config', key, _KEYS)}; it is left out",
                stacklevel=2,
            )
        try:
            schedule = cls(curve_from_config(config["curve"]), config["prediction"])
        except ValueError as error:
            if "fingerprint" not in config:
                raise
            raise ValueError(
                f"{error} (it has the fingerprint of a schedule: the file was edited or damaged)"
            ) from error
        written = word("fingerprint", config.get("fingerprint", schedule.fingerprint))
        if written != schedule.fingerprint:
            raise ValueError(
                f"the noise schedule config says fingerprint {written[:12]} but describes "
                f"{schedule.fingerprint[:12]} ({schedule}); "
                "the file was edited or damaged: restore it, or remove its 'fingerprint' line to "
                "accept what it describes"
            )
        return schedule

    def save_pretrained(
        self, folder: str | os.PathLike[str], sampler: Any = None, nearest: bool = False
    ) -> Path:
        """Write ``scheduler_config.json`` and ``noise_schedule.json``; return the folder.

        diffusers loads ``scheduler_config.json``. ``noise_schedule.json`` holds the exact schedule.

        Args:
            folder: the folder to write to.
            sampler: a Sampler of this schedule. The file then names a scheduler class of diffusers
                with the options of this sampler; set it to the same number of steps. Without a
                sampler the file names DDIM with trailing spacing (a flow: FlowMatchEuler).
            nearest: write the nearest class if no class matches the sampler, and log the
                differences.

        Raises:
            ValueError: if no class matches the sampler and ``nearest`` is False. The message names
                the nearest class and the differences.

        >>> import tempfile
        >>> folder = NoiseSchedule.flow(3.0).save_pretrained(tempfile.mkdtemp())
        >>> NoiseSchedule.from_pretrained(folder) == NoiseSchedule.flow(3.0)
        True
        """
        sampling = None if sampler is None else self._sampling_of(sampler, nearest)
        return write_configs(
            folder, {CONFIG_NAME: self.scheduler_config(sampling), EXACT_NAME: self.to_config()}
        )

    @classmethod
    def from_pretrained(
        cls,
        folder: str | os.PathLike[str],
        subfolder: str | None = None,
        tokens: int | None = None,
        **hub_options: Any,
    ) -> "NoiseSchedule":
        """Read the files of :meth:`save_pretrained`, or those of a diffusers pipeline.

        Args:
            folder: the folder that holds ``scheduler_config.json`` or ``noise_schedule.json``, or a
                repository of the Hugging Face hub ('stabilityai/stable-diffusion-xl-base-1.0'), of
                which only these files are downloaded.
            subfolder: a folder inside it; by default the folder itself, else its 'scheduler'.
            tokens: the number of image tokens, for a pipeline whose shift depends on it (Flux; see
                :func:`token_shift`).
            hub_options: ``revision``, ``token``, ``cache_dir``, ``local_files_only`` and
                ``force_download`` of the hub.

        Raises:
            FileNotFoundError: if there is no such file.
            ValueError: for a corrupt file, and for two files that contradict each other.
        """
        place = schedule_folder(folder, subfolder, **hub_options)
        loaded: dict[str, NoiseSchedule] = {}
        for name, config in read_configs(place).items():
            try:
                loaded[name] = (
                    cls.from_config(config)
                    if name == EXACT_NAME
                    else cls.from_diffusers(config, tokens)
                )
            except ValueError as error:
                raise ValueError(f"{str(place / name)!r}: {error}") from error
        first, *others = loaded.values()
        if others and not first._means_the_same(others[0]):
            raise ValueError(
                f"the two files in {str(place)!r} contradict each other: {EXACT_NAME} says "
                f"{first}, "
                f"{CONFIG_NAME} says {others[0]}; remove the wrong one"
            )
        return first

    def scheduler_config(self, sampling: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """Return the ``scheduler_config.json`` of diffusers as a dict of plain values.

        ``sampling``: the result of ``Sampler.to_diffusers``. Raises ValueError for a schedule that
        diffusers has no config for.

        >>> NoiseSchedule.flow(3.0).scheduler_config()["shift"]
        3.0
        """
        return to_diffusers(self.curve, self.prediction, sampling)

    @overload
    def to_diffusers(self, like: Mapping[str, Any]) -> dict[str, Any]: ...
    @overload
    def to_diffusers(self, like: Any = None) -> Any: ...
    def to_diffusers(self, like: Any = None) -> Any:
        """Return a scheduler of diffusers with this schedule: ``pipeline.scheduler = ...``.

        Its class is ``DDIMScheduler``, of a flow ``FlowMatchEulerDiscreteScheduler``. For the class
        of a sampler see ``Sampler.save_pretrained``, for the methods of alphabar in a pipeline
        ``Sampler.as_scheduler``.

        Args:
            like: a scheduler, whose class and sampling options are kept if it supports the
                schedule. A mapping is passed to :meth:`scheduler_config`, whose dict is returned.

        Raises:
            ValueError: diffusers has no scheduler for the schedule.

        >>> scheduler = NoiseSchedule.linear(prediction="v_prediction").to_diffusers()
        >>> type(scheduler).__name__, scheduler.config["prediction_type"]
        ('DDIMScheduler', 'v_prediction')
        """
        if isinstance(like, Mapping):
            return self.scheduler_config(like)
        return scheduler_of(self.curve, self.prediction, like)

    @classmethod
    def from_diffusers(cls, config: Any, tokens: int | None = None) -> "NoiseSchedule":
        """Return the schedule of a scheduler of diffusers, or of its config.

        Missing keys have the defaults of the config's class.

        Args:
            config: a scheduler object, or the content of scheduler_config.json.
            tokens: as in :meth:`from_pretrained`.

        Raises:
            ValueError: for a config that describes no schedule.

        >>> NoiseSchedule.from_diffusers({"_class_name": "LCMScheduler"}).curve.beta_start
        0.00085
        """
        return cls(*from_diffusers(config, tokens))

    def _sampling_of(self, sampler: Any, nearest: bool) -> Any:
        if not hasattr(sampler, "to_diffusers"):
            raise ValueError(
                f"sampler must be a Sampler, got {type(sampler).__name__}, which diffusers has no "
                "config for; save the schedule alone"
            )
        if sampler.schedule.fingerprint != self.fingerprint:
            raise ValueError(
                f"the sampler is made for {sampler.schedule}, and the schedule to save is {self}; "
                "make it for this one"
            )
        return sampler.to_diffusers(nearest=nearest)

    def _means_the_same(self, other: "NoiseSchedule") -> bool:
        """Compare as fingerprints do, but tolerate differences in the last digits.

        The betas of a shifted curve are written as numbers.
        """
        if self.fingerprint == other.fingerprint:
            return True
        facts = [(s.prediction, s.curve.is_discrete, s.num_train_timesteps) for s in (self, other)]
        return facts[0] == facts[1] and torch.allclose(
            self.alphas_cumprod, other.alphas_cumprod, rtol=1e-9, atol=1e-15
        )

    def __str__(self) -> str:
        curve = _in_words(self.curve.to_config())
        return f"{curve} with {self.prediction.name} [{self.fingerprint[:12]}]"


def require_times(t: Tensor, like: Tensor, axis: Axis | None = None) -> Tensor:
    """Return times on the device of ``like``; float64 if ``like`` is float64.

    Raises ValueError unless ``t`` is a scalar or has one time for each sample; with ``axis``, k
    times for each.

    >>> require_times(torch.tensor([1, 2]), torch.zeros(3, 1))
    Traceback (most recent call last):
    ValueError: timesteps must be a scalar or have shape (3,), got (2,)
    """
    axes = 1 if axis is None else 2
    if t.ndim not in (0, axes) or (t.ndim and t.shape[0] not in (1, like.shape[0])):
        wanted = f"({like.shape[0]},)" if axis is None else f"({like.shape[0]}, k)"
        more = "; times along an axis need axis=" if t.ndim == 2 and axis is None else ""
        raise ValueError(
            f"timesteps must be a scalar or have shape {wanted}, got {tuple(t.shape)}{more}"
        )
    return t.to(like.device, torch.float64 if like.dtype == torch.float64 else None)


def _like(level: Tensor, like: Tensor, axis: Axis | None) -> Tensor:
    return along(level, like.shape, axis) if level.ndim else level


def _in_words(config: Mapping[str, Any]) -> str:
    plain = {
        k: v
        for k, v in config.items()
        if v is not None and not (k.endswith("snr_shift_scale") and v == 1)
    }
    words = {
        k: _in_words(v)
        if isinstance(v, Mapping)
        else f"{len(v)} values"
        if isinstance(v, list)
        else v
        for k, v in plain.items()
    }
    return f"{words.pop('kind')}({', '.join(f'{k}={v}' for k, v in words.items())})"


def _no_curve(given: Any) -> str:
    """Return the error message for a value that is not a Curve.

    Most often the value is the name of a schedule.
    """
    made = [name for name, member in vars(Constructors).items() if isinstance(member, classmethod)]
    if not isinstance(given, str):
        return (
            f"curve must be a Curve, got {type(given).__name__}; e.g. NoiseSchedule.scaled_linear()"
        )
    near = get_close_matches(given, made, n=1)
    advice = (
        f"write NoiseSchedule.{near[0]}()"
        if near
        else f"the schedules are NoiseSchedule.{', '.join(sorted(made))}"
    )
    return f"a NoiseSchedule is made by name as a call, not from {given!r}; {advice}"


def _shown(value: Any) -> str:
    if not isinstance(value, Mapping):
        return shown(value)
    return f"keys {sorted(map(shown, value))}" if len(value) <= 20 else f"{len(value)} keys"
