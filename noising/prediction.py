"""Prediction types: the network output as two coefficients.

On the path x_t = α x_0 + σ ε every prediction type is a linear combination

    out = c0(α, σ) x_0 + c1(α, σ) ε.

Together with x_t this is a 2x2 system with determinant det = c0 σ - c1 α. One solve gives every
conversion:

    x_0 = (σ out - c1 x_t) / det,        ε = (c0 x_t - α out) / det.

It also gives the weight of a loss: an error Δout at fixed x_t is an error Δx_0 = (σ / det) Δout.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from inspect import signature
from typing import Any, ClassVar

from .utils.config_reading import mapping, settings
from .utils.registry import lookup
from .utils.validation import require


@dataclass(frozen=True)
class Prediction(ABC):
    """Base class of a prediction type; a subclass defines the two coefficients.

    ``alpha`` and ``sigma`` are floats, or tensors that broadcast against ``x_t``.

    >>> v = PREDICTIONS["v_prediction"]()
    >>> v.coefficients(0.6, 0.8)
    (-0.8, 0.6)
    >>> v.to_x0(out=0.6 * 2.0 - 0.8 * 5.0, x_t=0.6 * 5.0 + 0.8 * 2.0, alpha=0.6, sigma=0.8)
    5.0
    """

    name: ClassVar[str]

    @abstractmethod
    def coefficients(self, alpha: Any, sigma: Any) -> tuple[Any, Any]:
        """Return (c0, c1) of out = c0 x_0 + c1 ε."""

    def determinant(self, alpha: Any, sigma: Any) -> Any:
        """Return det = c0 σ - c1 α; if it is 0, the output does not determine x_0."""
        c0, c1 = self.coefficients(alpha, sigma)
        return c0 * sigma - c1 * alpha

    def x0_coefficients(self, alpha: Any, sigma: Any) -> tuple[Any, Any]:
        """Return (p, q) of x_0 = p x_t + q out."""
        c0, c1 = self.coefficients(alpha, sigma)
        det = c0 * sigma - c1 * alpha
        return -c1 / det, sigma / det

    def combine(self, x0: Any, epsilon: Any, alpha: Any, sigma: Any) -> Any:
        """Return the output for this (x_0, ε): the training target."""
        c0, c1 = self.coefficients(alpha, sigma)
        return c0 * x0 + c1 * epsilon

    def to_x0(self, out: Any, x_t: Any, alpha: Any, sigma: Any) -> Any:
        """Return x_0 from this output and x_t."""
        c0, c1 = self.coefficients(alpha, sigma)
        return (sigma * out - c1 * x_t) / (c0 * sigma - c1 * alpha)

    def to_epsilon(self, out: Any, x_t: Any, alpha: Any, sigma: Any) -> Any:
        """Return ε from this output and x_t."""
        c0, c1 = self.coefficients(alpha, sigma)
        return (c0 * x_t - alpha * out) / (c0 * sigma - c1 * alpha)

    def to_config(self) -> str | dict[str, Any]:
        """Return the name, or the name with its parameters if there are any."""
        parameters = asdict(self)
        return {"name": self.name, **parameters} if parameters else self.name


@dataclass(frozen=True)
class Epsilon(Prediction):
    """The noise ε (Ho et al. 2006.11239, eq. 14).

    >>> Epsilon().coefficients(0.6, 0.8)
    (0.0, 1.0)
    """

    name: ClassVar[str] = "epsilon"

    def coefficients(self, alpha: Any, sigma: Any) -> tuple[Any, Any]:
        return 0.0, 1.0


@dataclass(frozen=True)
class Sample(Prediction):
    """The clean sample x_0 itself.

    >>> Sample().coefficients(0.6, 0.8)
    (1.0, 0.0)
    """

    name: ClassVar[str] = "sample"

    def coefficients(self, alpha: Any, sigma: Any) -> tuple[Any, Any]:
        return 1.0, 0.0


@dataclass(frozen=True)
class Velocity(Prediction):
    """v = α ε - σ x_0 (Salimans & Ho 2202.00512, appendix D).

    >>> Velocity().coefficients(0.6, 0.8)
    (-0.8, 0.6)
    """

    name: ClassVar[str] = "v_prediction"

    def coefficients(self, alpha: Any, sigma: Any) -> tuple[Any, Any]:
        return -sigma, alpha


@dataclass(frozen=True)
class FlowVelocity(Prediction):
    """u = ε - x_0, the velocity of the straight path.

    Sources: Lipman et al. 2210.02747; Esser et al. 2403.03206, eq. 2.

    >>> FlowVelocity().coefficients(0.2, 0.8)
    (-1.0, 1.0)
    """

    name: ClassVar[str] = "flow_prediction"

    def coefficients(self, alpha: Any, sigma: Any) -> tuple[Any, Any]:
        return -1.0, 1.0


@dataclass(frozen=True)
class Score(Prediction):
    """The score ∇ log p_t(x_t) = -ε / σ (Song et al. 2011.13456).

    >>> Score().coefficients(0.6, 0.8)
    (0.0, -1.25)
    """

    name: ClassVar[str] = "score"

    def coefficients(self, alpha: Any, sigma: Any) -> tuple[Any, Any]:
        return 0.0, -1.0 / sigma


@dataclass(frozen=True)
class KarrasF(Prediction):
    """EDM's network F with x_0 = c_skip x̄ + c_out F, x̄ = x_t / α.

    Source: Karras et al. 2206.00364, eq. 7 and table 1. With s = σ / α: c_skip = σ_d² / (s² + σ_d²)
    and c_out = s σ_d / sqrt(s² + σ_d²). Written in α² and σ², it is finite at α = 0.

    >>> c0, c1 = KarrasF(sigma_data=1.0).coefficients(
    ...     0.6, 0.8
    ... )  # with σ_d = 1 on a variance preserving path F = -v
    >>> round(c0, 12), round(c1, 12)
    (0.8, -0.6)

    ``negative``: the network outputs -F, as with prediction_type 'v_prediction' in diffusers' EDM
    classes and in Stable Video Diffusion.
    """

    name: ClassVar[str] = "karras"
    sigma_data: float = 0.5
    negative: bool = False

    def __post_init__(self) -> None:
        _require_positive("sigma_data", self.sigma_data, "EDM uses 0.5 for images in [-1, 1]")

    def coefficients(self, alpha: Any, sigma: Any) -> tuple[Any, Any]:
        d = self.sigma_data
        norm = (sigma**2 + (alpha * d) ** 2) ** 0.5  # α sqrt(s² + σ_d²)
        norm = -norm if self.negative else norm
        # F = ((1 - c_skip) x_0 - c_skip s ε) / c_out, c_skip = (α σ_d)² / norm², c_out = s σ_d α /
        # norm
        return sigma / (d * norm), -(alpha * d) / norm

    def to_config(self) -> dict[str, Any]:
        """Return the name and the parameters; ``negative`` only if it is set."""
        config = {"name": self.name, "sigma_data": self.sigma_data}
        return config | ({"negative": True} if self.negative else {})


@dataclass(frozen=True)
class Consistency(Prediction):
    """A consistency model's network F with x_0 = c_skip x̄ + c_out F, x̄ = x_t / α.

    Source: Song et al. 2303.01469, appendix C. With s = σ / α and m = sigma_min: c_skip = σ_d² /
    ((s - m)² + σ_d²) and c_out = (s - m) σ_d / sqrt(s² + σ_d²). At s = m the output has no effect:
    x_0 = x̄.

    >>> Consistency(sigma_data=0.5, sigma_min=0.002).to_x0(out=3.0, x_t=7.0, alpha=1.0, sigma=0.002)
    7.0
    """

    name: ClassVar[str] = "consistency"
    sigma_data: float = 0.5
    sigma_min: float = 0.002

    def __post_init__(self) -> None:
        _require_positive("sigma_data", self.sigma_data, "the paper uses 0.5")
        _require_positive("sigma_min", self.sigma_min, "the paper uses 0.002")

    def coefficients(self, alpha: Any, sigma: Any) -> tuple[Any, Any]:
        d = self.sigma_data
        above = sigma - alpha * self.sigma_min  # α (s - m)
        above = above + (above == 0) * 1e-30
        # F = ((1 - c_skip) x_0 - c_skip s ε) / c_out, written in α and σ
        scale = (sigma**2 + (alpha * d) ** 2) ** 0.5 / (above**2 + (alpha * d) ** 2)
        return scale * above / d, -scale * alpha * sigma * d / above


def _require_positive(name: str, value: float, advice: str) -> None:
    fits = 1e-12 <= value <= 1e12  # float32 holds the squares of these
    require(fits, name, "be positive", value, f"{advice}, and float32 holds 1e-12 to 1e12")


PREDICTIONS: Mapping[str, type[Prediction]] = {
    kind.name: kind
    for kind in (Epsilon, Sample, Velocity, FlowVelocity, Score, KarrasF, Consistency)
}
"""The prediction types by name; to add one, write a class above and list it here."""


def resolve_prediction(prediction: str | Mapping[str, Any] | Prediction) -> Prediction:
    """Return the prediction type for a name, a config or an object.

    Raises ValueError for an unknown name. The message gives the nearest name.

    >>> resolve_prediction("v_prediction")
    Velocity()
    >>> resolve_prediction({"name": "karras", "sigma_data": 1.0})
    KarrasF(sigma_data=1.0, negative=False)
    """
    if isinstance(prediction, Prediction):
        return prediction
    parameters = (
        mapping("the prediction type", prediction)
        if isinstance(prediction, Mapping)
        else {"name": prediction}
    )
    kind = lookup("prediction type", parameters.pop("name", None), PREDICTIONS)
    if not parameters:  # torch.compile cannot trace the reading of fields
        return kind()
    return kind(
        **settings(f"prediction type {kind.name}", kind, parameters, signature(kind).parameters)
    )
