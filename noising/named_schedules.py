"""The named schedules: constructors of NoiseSchedule."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

from torch import Tensor

from .curves.base import Curve
from .curves.continuous import (
    Cosine,
    Flow,
    Karras,
    SubVariancePreserving,
    VarianceExploding,
    VariancePreserving,
)
from .curves.discrete import Discrete
from .prediction import KarrasF, Prediction
from .presets import PRESETS
from .utils.registry import lookup

S = TypeVar("S", bound="Constructors")


class Constructors:
    """The constructors of :class:`NoiseSchedule`.

    Each takes the settings of a curve and the ``prediction`` type, a name or an object.

    >>> from alphabar.noising import NoiseSchedule
    >>> NoiseSchedule.sigmoid(prediction="sample").prediction.name
    'sample'
    """

    if TYPE_CHECKING:

        def __init__(
            self, curve: Curve, prediction: str | Mapping[str, Any] | Prediction = ...
        ) -> None: ...

    @classmethod
    def preset(cls: type[S], name: str, tokens: int | None = None, steps: int | None = None) -> S:
        """Return the schedule of a published model: the one that its pipeline samples with.

        ``docs/presets.md`` lists the models, with the source of each number. An expert has its part
        of the schedule. :meth:`Noising.preset` adds the density and the weighting of the training.

        Args:
            name: a name of ``PRESETS``.
            tokens: image tokens, for a shift that depends on them; by default those of the
                pipeline's default size.
            steps: sampling steps, for a shift that depends on them (FLUX.2); by default the
                pipeline's.

        Raises:
            ValueError: for an unknown name, and for tokens that the shift does not depend on.

        >>> from alphabar.noising import NoiseSchedule
        >>> NoiseSchedule.preset("sd3") == NoiseSchedule.flow(shift=3.0)
        True
        >>> round(NoiseSchedule.preset("flux", tokens=1024).curve.shift, 4)
        1.8776
        """
        return cls(*lookup("preset", name, PRESETS).path(tokens, steps))

    @classmethod
    def linear(
        cls: type[S],
        beta_start: float = 0.0001,
        beta_end: float = 0.02,
        num_train_timesteps: int = 1000,
        prediction: str | Prediction = "epsilon",
    ) -> S:
        """Return the linear beta schedule of DDPM (Ho et al. 2006.11239, §4).

        >>> from alphabar.noising import NoiseSchedule
        >>> NoiseSchedule.linear().curve.beta_end
        0.02
        """
        return cls(
            Discrete("linear", beta_start, beta_end, num_train_timesteps=num_train_timesteps),
            prediction,
        )

    @classmethod
    def scaled_linear(
        cls: type[S],
        beta_start: float = 0.00085,
        beta_end: float = 0.012,
        num_train_timesteps: int = 1000,
        prediction: str | Prediction = "epsilon",
    ) -> S:
        """Return Stable Diffusion's schedule, linear in sqrt(beta) (Rombach et al. 2112.10752).

        >>> import torch
        >>> from alphabar.noising import NoiseSchedule
        >>> round(NoiseSchedule.scaled_linear().sigma_ve(torch.tensor(999)).item(), 4)
        14.6146
        """
        return cls(
            Discrete(
                "scaled_linear", beta_start, beta_end, num_train_timesteps=num_train_timesteps
            ),
            prediction,
        )

    @classmethod
    def squaredcos_cap_v2(
        cls: type[S], num_train_timesteps: int = 1000, prediction: str | Prediction = "epsilon"
    ) -> S:
        """Return the cosine schedule (Nichol & Dhariwal 2102.09672, eq. 17).

        >>> import torch
        >>> from alphabar.noising import NoiseSchedule
        >>> NoiseSchedule.squaredcos_cap_v2().snr(torch.tensor(499)).item() < 1.1
        True
        """
        return cls(
            Discrete("squaredcos_cap_v2", 0.0001, 0.02, num_train_timesteps=num_train_timesteps),
            prediction,
        )

    @classmethod
    def sigmoid(
        cls: type[S],
        beta_start: float = 0.0001,
        beta_end: float = 0.02,
        num_train_timesteps: int = 1000,
        prediction: str | Prediction = "epsilon",
    ) -> S:
        """Return the schedule of GeoDiff, with sigmoid betas (Xu et al. 2203.02923).

        >>> from alphabar.noising import NoiseSchedule
        >>> round(NoiseSchedule.sigmoid().alphas_cumprod[-1].item(), 7)
        3.97e-05
        """
        return cls(
            Discrete("sigmoid", beta_start, beta_end, num_train_timesteps=num_train_timesteps),
            prediction,
        )

    @classmethod
    def laplace(
        cls: type[S], num_train_timesteps: int = 1000, prediction: str | Prediction = "epsilon"
    ) -> S:
        """Return the Laplace schedule (Hang et al. 2407.03297; μ = 0, b = 1/2).

        Most of its times lie near log SNR 0. The schedule with this name in diffusers uses α in
        place of α². Here it is ``Discrete("laplace_diffusers")``, and
        :meth:`NoiseSchedule.from_pretrained` returns it for such a config.

        >>> import torch
        >>> from alphabar.noising import NoiseSchedule
        >>> schedule = NoiseSchedule.laplace()
        >>> [round(schedule.log_snr(torch.tensor(t)).item(), 3) for t in (249, 499, 749)]
        [0.347, -0.0, -0.347]
        """
        return cls(
            Discrete("laplace", 0.0001, 0.02, num_train_timesteps=num_train_timesteps), prediction
        )

    @classmethod
    def exp(
        cls: type[S], num_train_timesteps: int = 1000, prediction: str | Prediction = "epsilon"
    ) -> S:
        """Return the schedule ᾱ(t) = e^(-12 t), whose betas are all equal.

        >>> from alphabar.noising import NoiseSchedule
        >>> round(NoiseSchedule.exp().alphas_cumprod[499].log().item(), 6)
        -6.0
        """
        return cls(
            Discrete("exp", 0.0001, 0.02, num_train_timesteps=num_train_timesteps), prediction
        )

    @classmethod
    def from_betas(
        cls: type[S], betas: Sequence[float] | Tensor, prediction: str | Prediction = "epsilon"
    ) -> S:
        """Return the schedule with these T betas, each in (0, 1]; only the last may be 1.

        >>> from alphabar.noising import NoiseSchedule
        >>> NoiseSchedule.from_betas([0.1, 0.2, 0.3]).curve.num_train_timesteps
        3
        """
        values = betas.tolist() if isinstance(betas, Tensor) else betas
        return cls(Discrete(trained_betas=values), prediction)

    @classmethod
    def flow(
        cls: type[S],
        shift: float = 1.0,
        num_train_timesteps: int = 1000,
        prediction: str | Prediction = "flow_prediction",
    ) -> S:
        """Return rectified flow with a static shift of σ (Esser et al. 2403.03206).

        Times t are in [0, 1]; the network's time input is ``num_train_timesteps`` σ, as in
        diffusers: 0 to 1000.

        >>> import torch
        >>> from alphabar.noising import NoiseSchedule
        >>> NoiseSchedule.flow(shift=3.0).sigma(torch.tensor(0.5)).item()
        0.75
        """
        return cls(Flow(shift=shift, num_train_timesteps=num_train_timesteps), prediction)

    @classmethod
    def karras(
        cls: type[S],
        sigma_min: float = 0.002,
        sigma_max: float = 80.0,
        sigma_data: float = 0.5,
        prediction: str | Prediction | None = None,
    ) -> S:
        """Return EDM's schedule (Karras et al. 2206.00364, table 1).

        The prediction type is EDM's F, unless ``prediction`` is given.

        >>> from alphabar.noising import NoiseSchedule
        >>> NoiseSchedule.karras().prediction
        KarrasF(sigma_data=0.5, negative=False)
        """
        curve = Karras(sigma_min=sigma_min, sigma_max=sigma_max, sigma_data=sigma_data)
        return cls(curve, KarrasF(sigma_data) if prediction is None else prediction)

    @classmethod
    def variance_preserving(
        cls: type[S],
        beta_min: float = 0.1,
        beta_max: float = 20.0,
        prediction: str | Prediction = "epsilon",
    ) -> S:
        """Return the VP SDE's schedule in continuous time (Song et al. 2011.13456, eq. 33).

        >>> from alphabar.noising import NoiseSchedule
        >>> NoiseSchedule.variance_preserving().curve.beta_max
        20.0
        """
        return cls(VariancePreserving(beta_min=beta_min, beta_max=beta_max), prediction)

    @classmethod
    def sub_variance_preserving(
        cls: type[S],
        beta_min: float = 0.1,
        beta_max: float = 20.0,
        prediction: str | Prediction = "epsilon",
    ) -> S:
        """Return the sub-VP SDE's schedule in continuous time (Song et al. 2011.13456, eq. 29).

        >>> from alphabar.noising import NoiseSchedule
        >>> NoiseSchedule.sub_variance_preserving().curve.kind
        'sub_variance_preserving'
        """
        return cls(SubVariancePreserving(beta_min=beta_min, beta_max=beta_max), prediction)

    @classmethod
    def variance_exploding(
        cls: type[S],
        sigma_min: float = 0.01,
        sigma_max: float = 1348.0,
        prediction: str | Prediction = "score",
    ) -> S:
        """Return the VE SDE's schedule in continuous time (Song et al. 2011.13456, eq. 30).

        >>> from alphabar.noising import NoiseSchedule
        >>> NoiseSchedule.variance_exploding().prediction.name
        'score'
        """
        return cls(VarianceExploding(sigma_min=sigma_min, sigma_max=sigma_max), prediction)

    @classmethod
    def cosine(
        cls: type[S], log_snr_shift: float = 0.0, prediction: str | Prediction = "v_prediction"
    ) -> S:
        """Return the continuous cosine schedule with a log-SNR shift.

        Sources: 2202.00512; 2301.11093, eq. 4.

        >>> from alphabar.noising import NoiseSchedule
        >>> NoiseSchedule.cosine().has_zero_terminal_snr
        True
        """
        return cls(Cosine(log_snr_shift=log_snr_shift), prediction)
