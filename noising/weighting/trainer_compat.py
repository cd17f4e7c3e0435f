"""Weights of other trainers that differ from the scheme of the same name.

Use them to reproduce runs of these trainers. Each is a weight w on the squared error of one target,
``target``, as in their code, and is converted for the other targets (see base.py). Each docstring
says which scheme it really is, and how it differs from the scheme it is named after. The formulas
are theirs, written in α² and σ²: equal where theirs are finite, and finite where theirs divide 0 by
0. For example, the cap of SNR is moved outside: 1 / (min(SNR, 1000) + 1) = max(σ² / (α² + σ²), 1 /
1001).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, maximum, minimum

from .base import WEIGHTINGS, Scheme, require_positive
from .schemes import MinSNR, flow_determinant2

CAP = 1000.0  # the cap of SNR in sd-scripts and OneTrainer


@dataclass(frozen=True, kw_only=True)
class Peer(Scheme):
    """A weight of another trainer; ``target`` is the prediction type that it weights there."""

    target: ClassVar[str]


@WEIGHTINGS.register
@dataclass(frozen=True, kw_only=True)
class DiffusersMinSNRPlusOneV(MinSNR, Peer):
    """min(SNR, γ) / SNR + 1 on v, of diffusers' train_dreambooth_lora_sdxl.py.

    The advanced training scripts have it too. In fact w_x0 = (SNR + 1) (1 + min(1, γ / SNR)): the
    plain v loss times a factor in [1, 2]. The intended form divides by SNR + 1, which is
    ``min_snr``. At zero SNR their weight is 0 / 0, this one is the limit 2.

    >>> import torch
    >>> DiffusersMinSNRPlusOneV()(torch.tensor([0.0]), torch.tensor([1.0]), 1.0)
    tensor([2.])
    """

    name: ClassVar[str] = "diffusers_min_snr_plus_one_v"
    target: ClassVar[str] = "v_prediction"

    def numerator(self, alpha2: Tensor, sigma2: Tensor, det2: Tensor) -> Tensor:
        clipped = self.gamma * sigma2
        return (clipped / maximum(alpha2, clipped) + 1) * (alpha2 + sigma2)


@WEIGHTINGS.register
@dataclass(frozen=True, kw_only=True)
class DiffusersPixArtMinSNRV(MinSNR, Peer):
    """min(SNR + 1, γ) / (SNR + 1) on v, of diffusers' PixArt ControlNet script.

    In fact w_x0 = min(SNR + 1, γ), while ``min_snr`` is min(SNR, γ): this one keeps weight 1 at
    zero SNR.

    >>> import torch
    >>> DiffusersPixArtMinSNRV()(torch.tensor([0.0]), torch.tensor([1.0]), 1.0)
    tensor([1.])
    """

    name: ClassVar[str] = "diffusers_pixart_min_snr_v"
    target: ClassVar[str] = "v_prediction"

    def numerator(self, alpha2: Tensor, sigma2: Tensor, det2: Tensor) -> Tensor:
        return minimum(alpha2 + sigma2, self.gamma * sigma2)


@WEIGHTINGS.register
@dataclass(frozen=True, kw_only=True)
class DiffusersCosMapX0(Peer):
    """2 / (π (1 - 2σ + 2σ²)) on x_0, σ of the flow path, of diffusers' SD3 script.

    The flags are ``cosmap`` with ``--precondition_outputs 1``. In fact this is ``cosmap`` times σ²:
    the weight is meant for the flow loss, but there it is applied to the error of x_0.

    >>> import torch
    >>> DiffusersCosMapX0()(torch.tensor([0.5]), torch.tensor([0.5]), 0.5) * torch.pi  # on x_0
    tensor([4.])
    """

    name: ClassVar[str] = "diffusers_cosmap_x0"
    target: ClassVar[str] = "sample"

    def numerator(self, alpha2: Tensor, sigma2: Tensor, det2: Tensor) -> Tensor:
        return (2 / math.pi) * sigma2 * flow_determinant2(alpha2, sigma2) / (alpha2 + sigma2)


@WEIGHTINGS.register
@dataclass(frozen=True, kw_only=True)
class KohyaDebiasedEpsilon(Peer):
    """1 / √min(SNR, 1000) on epsilon, of sd-scripts and OneTrainer.

    The flag of sd-scripts is ``--debiased_estimation_loss``. In fact this is ``debiased`` except
    for the cap; above it, it is the plain epsilon loss over √1000.

    >>> import torch
    >>> KohyaDebiasedEpsilon()(torch.tensor([0.6]), torch.tensor([0.8]), -0.6)
    tensor([1.3333])
    """

    name: ClassVar[str] = "kohya_debiased_epsilon"
    target: ClassVar[str] = "epsilon"

    def numerator(self, alpha2: Tensor, sigma2: Tensor, det2: Tensor) -> Tensor:
        return maximum(alpha2.sqrt() * sigma2.sqrt(), alpha2 / CAP**0.5)


@WEIGHTINGS.register
@dataclass(frozen=True, kw_only=True)
class KohyaDebiasedV(Peer):
    """1 / (min(SNR, 1000) + 1) on v, of sd-scripts.

    The flags are ``--debiased_estimation_loss --v_parameterization``. In fact this is ``x0`` (w_x0
    = 1) up to the cap; above it, w_x0 = (SNR + 1) / 1001. The ``debiased`` of the paper is √SNR /
    (SNR + 1) on v: 0.428 at t = 500 of Stable Diffusion's schedule with zero terminal SNR, where
    this weight is 0.759.

    >>> import torch
    >>> KohyaDebiasedV()(torch.tensor([0.6]), torch.tensor([0.8]), 1.0)
    tensor([0.6400])
    """

    name: ClassVar[str] = "kohya_debiased_v"
    target: ClassVar[str] = "v_prediction"

    def numerator(self, alpha2: Tensor, sigma2: Tensor, det2: Tensor) -> Tensor:
        return maximum(sigma2, (alpha2 + sigma2) / (CAP + 1))


@WEIGHTINGS.register
@dataclass(frozen=True, kw_only=True)
class OneTrainerDebiasedV(Peer):
    """1 / √(min(SNR, 1000) + 1) on v, of OneTrainer (DEBIASED_ESTIMATION).

    In fact w_x0 = √(SNR + 1) up to the cap. The paper has √SNR (``debiased``), and sd-scripts has
    1.

    >>> import torch
    >>> OneTrainerDebiasedV()(torch.tensor([0.6]), torch.tensor([0.8]), 1.0)
    tensor([0.8000])
    """

    name: ClassVar[str] = "onetrainer_debiased_v"
    target: ClassVar[str] = "v_prediction"

    def numerator(self, alpha2: Tensor, sigma2: Tensor, det2: Tensor) -> Tensor:
        return (maximum(sigma2, (alpha2 + sigma2) / (CAP + 1)) * (alpha2 + sigma2)).sqrt()


@WEIGHTINGS.register
@dataclass(frozen=True, kw_only=True)
class OneTrainerP2V(Peer):
    """(2 + SNR)^-γ on v, of OneTrainer (P2).

    In fact w_x0 = (SNR + 1) / (SNR + 2)^γ. ``p2`` with k = 1 is SNR / (SNR + 1)^(1 + γ) on v, and 0
    at zero SNR.

    >>> import torch
    >>> OneTrainerP2V()(torch.tensor([0.0]), torch.tensor([1.0]), 1.0)
    tensor([0.5000])
    """

    name: ClassVar[str] = "onetrainer_p2_v"
    target: ClassVar[str] = "v_prediction"
    gamma: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        require_positive(self.name, gamma=self.gamma)

    def numerator(self, alpha2: Tensor, sigma2: Tensor, det2: Tensor) -> Tensor:
        return (alpha2 + sigma2) * (sigma2 / (2 * sigma2 + alpha2)) ** self.gamma


@WEIGHTINGS.register
@dataclass(frozen=True, kw_only=True)
class OneTrainerSigma(Peer):
    """σ on the flow loss, σ of the flow path, of OneTrainer (SIGMA). In fact w_x0 = 1 / σ.

    >>> import torch
    >>> OneTrainerSigma()(torch.tensor([0.75]), torch.tensor([0.25]), -1.0)
    tensor([0.2500])
    """

    name: ClassVar[str] = "onetrainer_sigma"
    target: ClassVar[str] = "flow_prediction"

    def numerator(self, alpha2: Tensor, sigma2: Tensor, det2: Tensor) -> Tensor:
        return (flow_determinant2(alpha2, sigma2) * sigma2).sqrt()


@WEIGHTINGS.register
@dataclass(frozen=True, kw_only=True)
class KohyaScaleVPred(Peer):
    """min(SNR, 1000) / (min(SNR, 1000) + 1) on v, of sd-scripts.

    The flag is ``--scale_v_pred_loss_like_noise_pred``. In fact this is ``snr``, the plain epsilon
    loss, except for the cap. With ``--min_snr_gamma`` sd-scripts applies both factors, so SNR /
    (SNR + 1) is applied once too often.

    >>> import torch
    >>> KohyaScaleVPred()(torch.tensor([0.6]), torch.tensor([0.8]), 1.0)
    tensor([0.3600])
    """

    name: ClassVar[str] = "kohya_scale_v_pred"
    target: ClassVar[str] = "v_prediction"

    def numerator(self, alpha2: Tensor, sigma2: Tensor, det2: Tensor) -> Tensor:
        return minimum(alpha2, (alpha2 + sigma2) * (CAP / (CAP + 1)))


@WEIGHTINGS.register
@dataclass(frozen=True, kw_only=True)
class KohyaVPredLike(Peer):
    """1 + k (c + 1) / c with c = min(SNR, 1000) on epsilon, of sd-scripts.

    The flag is ``--v_pred_like_loss k``. In fact this is ``v_like`` except for the cap.

    >>> import torch
    >>> KohyaVPredLike(strength=0.5)(torch.tensor([0.8]), torch.tensor([0.6]), -0.8)
    tensor([1.7812])
    """

    name: ClassVar[str] = "kohya_v_pred_like"
    target: ClassVar[str] = "epsilon"
    strength: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        require_positive(self.name, strength=self.strength)

    def numerator(self, alpha2: Tensor, sigma2: Tensor, det2: Tensor) -> Tensor:
        return alpha2 + self.strength * maximum(alpha2 + sigma2, alpha2 * (1 + 1 / CAP))
