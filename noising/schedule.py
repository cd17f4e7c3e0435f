"""The noise schedule: a curve and a prediction type, all that a sampler must know about how a model was trained.

One frozen value is shared by the training loss, the samplers, the callbacks and the checkpoint, so that they cannot
disagree. It has no device, no dtype and no state; it compares, hashes and pickles by its numbers.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, get_type_hints

import torch
from torch import Tensor

from .continuous import Cosine, Flow, Karras, VarianceExploding, VariancePreserving
from .curves import Curve
from .discrete import Discrete
from .prediction import KarrasF, Prediction, resolve_prediction
from .registered import curve_from_config
from .shapes import require_same_shape

VERSION = 1  # of the config format


@dataclass(frozen=True)
class NoiseSchedule:
    """A curve x_t = α(t) x_0 + σ(t) ε together with what the network predicts on it.

    ``prediction`` is a name of ``PREDICTIONS`` or an object. Raises ValueError for an unknown name, and for a prediction
    that cannot determine x_0 at the terminal time (epsilon or score where α = 0).

    >>> schedule = NoiseSchedule.scaled_linear(0.00085, 0.012, prediction="v_prediction").zero_terminal_snr()
    >>> schedule.alpha(torch.tensor([0, 999]))
    tensor([0.9996, 0.0000])
    """

    curve: Curve
    prediction: Prediction

    def __init__(self, curve: Curve, prediction: str | Mapping[str, Any] | Prediction = "epsilon") -> None:
        object.__setattr__(self, "curve", curve)
        object.__setattr__(self, "prediction", resolve_prediction(prediction))
        self._require_well_posed()

    def _require_well_posed(self) -> None:
        end = torch.tensor(self.curve.t_max, dtype=torch.float64)
        alpha, sigma = self.curve.alpha(end), self.curve.sigma(end)
        if float(self.prediction.determinant(alpha, sigma)) == 0.0:
            raise ValueError(
                f"prediction {self.prediction.name!r} is ill-posed on a schedule with zero terminal SNR: at t = {self.curve.t_max:g} "
                "alpha is 0, x_t is pure noise, and the output says nothing of x_0; use with_prediction('v_prediction') "
                "(or 'sample', 'flow_prediction') before zero_terminal_snr()"
            )

    # -- constructors ------------------------------------------------------------------------------------------------

    @classmethod
    def linear(
        cls,
        beta_start: float = 0.0001,
        beta_end: float = 0.02,
        num_train_timesteps: int = 1000,
        prediction: str | Prediction = "epsilon",
    ) -> NoiseSchedule:
        """Return the linear beta schedule of DDPM (Ho et al. 2006.11239, §4).

        >>> NoiseSchedule.linear().curve.beta_end
        0.02
        """
        return cls(Discrete("linear", beta_start, beta_end, num_train_timesteps), prediction)

    @classmethod
    def scaled_linear(
        cls,
        beta_start: float = 0.00085,
        beta_end: float = 0.012,
        num_train_timesteps: int = 1000,
        prediction: str | Prediction = "epsilon",
    ) -> NoiseSchedule:
        """Return the schedule of Stable Diffusion, linear in sqrt(beta) (Rombach et al. 2112.10752).

        >>> round(NoiseSchedule.scaled_linear().sigma_ve(torch.tensor(999)).item(), 4)
        14.6146
        """
        return cls(Discrete("scaled_linear", beta_start, beta_end, num_train_timesteps), prediction)

    @classmethod
    def squaredcos_cap_v2(
        cls, num_train_timesteps: int = 1000, prediction: str | Prediction = "epsilon"
    ) -> NoiseSchedule:
        """Return the cosine schedule (Nichol & Dhariwal 2102.09672, eq. 17).

        >>> NoiseSchedule.squaredcos_cap_v2().snr(torch.tensor(499)).item() < 1.1
        True
        """
        return cls(Discrete("squaredcos_cap_v2", 0.0001, 0.02, num_train_timesteps), prediction)

    @classmethod
    def from_betas(cls, betas: Sequence[float] | Tensor, prediction: str | Prediction = "epsilon") -> NoiseSchedule:
        """Return the schedule of T given betas, each in (0, 1]; only the last may be 1.

        >>> NoiseSchedule.from_betas([0.1, 0.2, 0.3]).curve.num_train_timesteps
        3
        """
        values = betas.tolist() if isinstance(betas, Tensor) else betas
        return cls(Discrete(trained_betas=values), prediction)

    @classmethod
    def flow(
        cls, shift: float = 1.0, num_train_timesteps: int = 1000, prediction: str | Prediction = "flow_prediction"
    ) -> NoiseSchedule:
        """Return rectified flow with a static shift of the noise level (Esser et al. 2403.03206).

        >>> NoiseSchedule.flow(shift=3.0).sigma(torch.tensor(0.5)).item()
        0.75
        """
        return cls(Flow(shift=shift, num_train_timesteps=num_train_timesteps), prediction)

    @classmethod
    def karras(
        cls,
        sigma_min: float = 0.002,
        sigma_max: float = 80.0,
        sigma_data: float = 0.5,
        prediction: str | Prediction | None = None,
    ) -> NoiseSchedule:
        """Return EDM's schedule and, unless another is named, its prediction F (Karras et al. 2206.00364, table 1).

        >>> NoiseSchedule.karras().prediction
        KarrasF(sigma_data=0.5)
        """
        curve = Karras(sigma_min=sigma_min, sigma_max=sigma_max, sigma_data=sigma_data)
        return cls(curve, KarrasF(sigma_data) if prediction is None else prediction)

    @classmethod
    def variance_preserving(
        cls, beta_min: float = 0.1, beta_max: float = 20.0, prediction: str | Prediction = "epsilon"
    ) -> NoiseSchedule:
        """Return the VP SDE's schedule in continuous time (Song et al. 2011.13456, eq. 33).

        >>> NoiseSchedule.variance_preserving().curve.beta_max
        20.0
        """
        return cls(VariancePreserving(beta_min=beta_min, beta_max=beta_max), prediction)

    @classmethod
    def variance_exploding(
        cls, sigma_min: float = 0.01, sigma_max: float = 1348.0, prediction: str | Prediction = "score"
    ) -> NoiseSchedule:
        """Return the VE SDE's schedule in continuous time (Song et al. 2011.13456, eq. 30).

        >>> NoiseSchedule.variance_exploding().prediction.name
        'score'
        """
        return cls(VarianceExploding(sigma_min=sigma_min, sigma_max=sigma_max), prediction)

    @classmethod
    def cosine(cls, log_snr_shift: float = 0.0, prediction: str | Prediction = "v_prediction") -> NoiseSchedule:
        """Return the continuous cosine schedule with a log-SNR shift (2202.00512; 2301.11093, eq. 4).

        >>> NoiseSchedule.cosine().has_zero_terminal_snr
        True
        """
        return cls(Cosine(log_snr_shift=log_snr_shift), prediction)

    # -- transformations return new values ---------------------------------------------------------------------------

    def zero_terminal_snr(self) -> NoiseSchedule:
        """Return this schedule with α exactly 0 at the last timestep (Lin et al. 2305.08891, algorithm 1).

        >>> NoiseSchedule.linear(prediction="v_prediction").zero_terminal_snr().has_zero_terminal_snr
        True
        """
        return replace(self, curve=self.curve.zero_terminal_snr())

    def with_prediction(self, prediction: str | Prediction) -> NoiseSchedule:
        """Return this curve with another prediction type.

        >>> NoiseSchedule.linear().with_prediction("sample").prediction.name
        'sample'
        """
        return replace(self, prediction=resolve_prediction(prediction))

    # -- the curve -----------------------------------------------------------------------------------------------------

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
        """Return the time at which log SNR has this value."""
        return self.curve.time(log_snr)

    @property
    def num_train_timesteps(self) -> int:
        """The number of training timesteps; on continuous curves the scale of the network's time."""
        return self.curve.num_train_timesteps

    @property
    def alphas_cumprod(self) -> Tensor:
        """ᾱ = α² at every training index, float64 on the CPU."""
        return (
            self.curve.alpha(self.curve.time_at_index(torch.arange(self.num_train_timesteps, dtype=torch.float64))) ** 2
        )

    @property
    def has_zero_terminal_snr(self) -> bool:
        """Whether α is exactly 0 at the last time."""
        return float(self.curve.alpha(torch.tensor(self.curve.t_max, dtype=torch.float64))) == 0.0

    # -- noising and conversions -------------------------------------------------------------------------------------

    def levels(self, t: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        """Return α(t), σ(t) with shape (batch, 1, 1, ...) that broadcasts against ``like``.

        ``t`` is a scalar or has shape (batch,). The dtype is float32, or float64 where ``like`` or ``t`` is.
        """
        if t.ndim > 1 or (t.ndim == 1 and t.shape[0] not in (1, like.shape[0])):
            raise ValueError(f"timesteps must be a scalar or have shape ({like.shape[0]},), got {tuple(t.shape)}")
        if like.dtype == torch.float64:
            t = t.double()
        shape = (-1,) + (1,) * (like.ndim - 1) if t.ndim else ()
        t = t.to(like.device)
        return self.curve.alpha(t).view(shape), self.curve.sigma(t).view(shape)

    def add_noise(self, x0: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """Return x_t = α x_0 + σ ε in the dtype of ``x0``, computed in float32 or better.

        ``x0`` and ``noise`` have shape (batch, ...); ``timesteps`` are times of the curve, shape (batch,) or scalar.
        Raises ValueError for shapes that do not fit, and for times outside the schedule (seen on the CPU).

        >>> x = NoiseSchedule.flow().add_noise(torch.ones(2, 1), torch.zeros(2, 1), torch.tensor([0.0, 0.75]))
        >>> x.flatten().tolist()
        [1.0, 0.25]
        """
        require_same_shape("noise", noise, "x0", x0)
        alpha, sigma = self.levels(timesteps, x0)
        return (alpha * x0 + sigma * noise).to(x0.dtype)

    def target(self, x0: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """Return what the network should put out for this (x_0, ε, t), in float32 or better.

        >>> NoiseSchedule.flow().target(torch.ones(1, 1), torch.zeros(1, 1), torch.tensor([0.5]))
        tensor([[-1.]])
        """
        require_same_shape("noise", noise, "x0", x0)
        alpha, sigma = self.levels(timesteps, x0)
        return self.prediction.combine(x0.to(alpha.dtype), noise.to(alpha.dtype), alpha, sigma)

    def to_x0(self, out: Tensor, x_t: Tensor, timesteps: Tensor) -> Tensor:
        """Return the x_0 that the network's output implies.

        >>> schedule = NoiseSchedule.flow()
        >>> x0, e, t = torch.full((1, 1), 3.0), torch.full((1, 1), -1.0), torch.tensor([0.25])
        >>> schedule.to_x0(schedule.target(x0, e, t), schedule.add_noise(x0, e, t), t).item()
        3.0
        """
        alpha, sigma = self.levels(timesteps, x_t)
        return self.prediction.to_x0(out.to(alpha.dtype), x_t.to(alpha.dtype), alpha, sigma)

    def to_epsilon(self, out: Tensor, x_t: Tensor, timesteps: Tensor) -> Tensor:
        """Return the ε that the network's output implies."""
        alpha, sigma = self.levels(timesteps, x_t)
        return self.prediction.to_epsilon(out.to(alpha.dtype), x_t.to(alpha.dtype), alpha, sigma)

    def convert(self, out: Tensor, x_t: Tensor, timesteps: Tensor, to: str | Prediction) -> Tensor:
        """Return the network's output as another prediction type would have it.

        >>> schedule = NoiseSchedule.flow()
        >>> schedule.convert(torch.zeros(1, 1), torch.ones(1, 1), torch.tensor([0.5]), to="sample").item()
        1.0
        """
        alpha, sigma = self.levels(timesteps, x_t)
        out, x_t = out.to(alpha.dtype), x_t.to(alpha.dtype)
        x0, epsilon = self.prediction.to_x0(out, x_t, alpha, sigma), self.prediction.to_epsilon(out, x_t, alpha, sigma)
        return resolve_prediction(to).combine(x0, epsilon, alpha, sigma)

    # -- identity and storage ----------------------------------------------------------------------------------------

    @cached_property
    def fingerprint(self) -> str:
        """sha256 of the curve's values, the network's times and input scale, and the prediction type.

        Schedules that mean the same have the same fingerprint, whatever config they came from. The values are rounded to
        float32, so that the last bits of a platform's exp and log do not matter.

        >>> a, b = NoiseSchedule.scaled_linear(), NoiseSchedule.scaled_linear()
        >>> a.fingerprint == NoiseSchedule.from_betas(b.curve.betas()).fingerprint != NoiseSchedule.linear().fingerprint
        True
        """
        curve = self.curve
        index = torch.arange(curve.num_train_timesteps, dtype=torch.float64)
        t = curve.time_at_index(index)
        columns = (
            torch.stack([curve.alpha(t), curve.sigma(t), curve.timestep(t), curve.input_scale(t)]).float() + 0.0
        )  # + 0.0: no negative zeros
        values = columns.numpy().astype("<f4").tobytes()
        return hashlib.sha256(values + repr((self.prediction.to_config(), curve.is_discrete)).encode()).hexdigest()

    def to_config(self) -> dict[str, Any]:
        """Return plain JSON from which :meth:`from_config` makes an equal schedule.

        >>> NoiseSchedule.from_config(NoiseSchedule.flow(3.0).to_config()) == NoiseSchedule.flow(3.0)
        True
        """
        return {
            "version": VERSION,
            "curve": self.curve.to_config(),
            "prediction": self.prediction.to_config(),
            "fingerprint": self.fingerprint,
        }

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> NoiseSchedule:
        """Return the schedule of a config; raises ValueError where it is incomplete, unknown or contradicts its fingerprint."""
        if (
            not isinstance(config, Mapping)
            or not isinstance(config.get("curve"), Mapping)
            or "prediction" not in config
        ):
            raise ValueError(
                f"not a noise schedule config: expected the keys 'curve' and 'prediction', got {_shown(config)}"
            )
        if config.get("version", VERSION) != VERSION:
            raise ValueError(
                f"noise schedule config of version {config['version']}, this alphabar reads version {VERSION}; update alphabar"
            )
        schedule = cls(curve_from_config(config["curve"]), config["prediction"])
        written = config.get("fingerprint", schedule.fingerprint)
        if written != schedule.fingerprint:
            raise ValueError(
                f"the noise schedule config says fingerprint {written[:12]} but describes {schedule.fingerprint[:12]} ({schedule}); "
                "the file was edited or damaged: restore it, or remove its 'fingerprint' line to accept what it describes"
            )
        return schedule

    def save_pretrained(self, folder: str | os.PathLike[str], sampler: Any = None) -> Path:
        """Write ``scheduler_config.json``, which diffusers loads, and ``noise_schedule.json``, which says it exactly.

        ``sampler`` may be a Sampler: its class and spacing are written too. Without one the file names DDIM with trailing
        spacing (a flow: FlowMatchEuler). Returns the folder.

        >>> import tempfile
        >>> folder = NoiseSchedule.flow(3.0).save_pretrained(tempfile.mkdtemp())
        >>> NoiseSchedule.from_pretrained(folder) == NoiseSchedule.flow(3.0)
        True
        """
        from .pretrained import save_schedule

        return save_schedule(self, folder, sampler)

    @classmethod
    def from_pretrained(cls, folder: str | os.PathLike[str], subfolder: str | None = None) -> NoiseSchedule:
        """Read what :meth:`save_pretrained` wrote, or the ``scheduler_config.json`` of any diffusers pipeline.

        Raises FileNotFoundError where there is no such file, and ValueError for a corrupt one or for two that contradict.
        """
        from .pretrained import load_schedule

        return load_schedule(Path(folder, subfolder) if subfolder else Path(folder))

    def __str__(self) -> str:
        settings = {k: v for k, v in self.curve.to_config().items() if k != "kind" and v is not None}
        if "trained_betas" in settings:
            settings["trained_betas"] = f"{len(settings['trained_betas'])} values"
        words = ", ".join(f"{k}={v}" for k, v in settings.items())
        return f"{self.curve.kind}({words}) with {self.prediction.name} [{self.fingerprint[:12]}]"


# LightningCLI takes a dataclass's fields in the place of postponed annotations, and would not accept a prediction's name
NoiseSchedule.__init__.__annotations__.update(get_type_hints(NoiseSchedule.__init__))


def _shown(value: Any) -> str:
    return f"keys {sorted(map(str, value))}" if isinstance(value, Mapping) else repr(value)[:80]
