"""Several modalities of one sample, such as video and sound, each with its own times."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from torch import Tensor, nn

from .losses import Over
from .noising import Noised, Noising, counting
from .timesteps.shaped import ShapedTimesteps
from .utils.validation import one_of


@dataclass(frozen=True)
class JointNoised:
    """The noised batches of the modalities, by name; the loss is the sum of theirs.

    >>> import torch
    >>> from alphabar.noising import NoiseSchedule
    >>> one = Noising(NoiseSchedule.flow())(torch.zeros(2, 3), step=0)
    >>> JointNoised({"sound": one}).loss({"sound": one.target + 2}).item()
    4.0
    """

    parts: Mapping[str, Noised]

    def __getitem__(self, name: str) -> Noised:
        return self.parts[name]

    @property
    def x(self) -> dict[str, Tensor]:
        """The network's inputs."""
        return {name: part.x for name, part in self.parts.items()}

    @property
    def timesteps(self) -> dict[str, Tensor]:
        """The time inputs of the network."""
        return {name: part.timesteps for name, part in self.parts.items()}

    def losses(
        self,
        predictions: Mapping[str, Any],
        masks: Mapping[str, Tensor] | None = None,
        over: Over = "all",
    ) -> Tensor:
        """Return the loss of each sample, shape (batch,): the sum over modalities.

        Arguments as in :meth:`Noised.losses`, by modality; those without a mask have none. The
        weighting of each Noising says how much a modality counts.

        Raises:
            ValueError: if there is not one output for each modality.
        """
        _require_names("the outputs", predictions, self.parts)
        masks = masks or {}
        each = [
            part.losses(predictions[name], masks.get(name), over)
            for name, part in self.parts.items()
        ]
        return sum(each[1:], each[0])

    def loss(
        self,
        predictions: Mapping[str, Any],
        masks: Mapping[str, Tensor] | None = None,
        over: Over = "all",
    ) -> Tensor:
        """Return the mean of :meth:`losses`, a scalar to call ``backward`` on."""
        return self.losses(predictions, masks, over).mean()


class JointNoising(nn.Module):
    """Noise several modalities of the same samples, each by a Noising of its own.

    With independent times one network learns the joint, the conditional and the marginal
    distributions (Bao et al. 2303.06555). The times of a modality may have a shape of their own,
    e.g. one for each frame of the video and one for the sound.

    Args:
        modalities: a Noising for each modality, by name; with a seed of its own.
        times: "independent", or "shared": all modalities have the times of the first one, on curves
            with the same range of time; densities of the others are not used. Of k times for a
            sample, the same ones count in every loss, and the axes of all modalities divide into k.

    Raises:
        ValueError: if there is none, or two have the same seed, which would give them equal noise.
            With shared times also if the ranges of time differ, if only some modalities have k
            times for a sample, or different k, and if a density follows losses.

    >>> import torch
    >>> from alphabar.noising import NoiseSchedule
    >>> flow = NoiseSchedule.flow()
    >>> joint = JointNoising(
    ...     {
    ...         "video": Noising(flow.shifted(3.0), timesteps="independent:axis=frames", seed=0),
    ...         "sound": Noising(flow, seed=1),
    ...     }
    ... )
    >>> noised = joint(
    ...     {"video": torch.zeros(2, 3, 8, 4, 4), "sound": torch.zeros(2, 1, 64)}, step=0
    ... )
    >>> [tuple(t.shape) for t in noised.timesteps.values()]
    [(2, 8), (2,)]
    """

    def __init__(
        self,
        modalities: Mapping[str, Noising],
        times: Literal["independent", "shared"] = "independent",
    ) -> None:
        super().__init__()
        seeds = [noising.seed for noising in modalities.values()]
        if not seeds or len(set(seeds)) < len(seeds):
            raise ValueError(
                f"a joint noising needs modalities with a seed each, got the seeds {seeds}: equal "
                "ones would give equal noise"
            )
        self.modalities = nn.ModuleDict(modalities)
        self.times = one_of("times", times, ("independent", "shared"))
        if self.times == "shared":
            _require_shareable(modalities)

    def forward(self, x0: Mapping[str, Tensor], *, step: int, **place: Any) -> JointNoised:
        """Return the noised batches of this process at this optimizer step.

        Args:
            x0: the clean batch of each modality, with the same samples in the same order.
            step: number of the optimizer step.
            place: where the batch lies in the step, as in :meth:`Noising.forward`
                (``micro_batch``, ``index``, ...).

        Raises:
            ValueError: if there is not one batch for each modality, and as in
                :meth:`Noising.forward`.
        """
        _require_names("the batch", x0, self.modalities)
        parts: dict[str, Noised] = {}
        first: Noised | None = None
        for name, noising in self.modalities.items():
            t = None if first is None else first.t
            part = noising(x0[name], step=step, timesteps=t, **place)
            parts[name] = part if first is None else counting(part, first.counted)
            first = first or part if self.times == "shared" else None
        return JointNoised(parts)

    if TYPE_CHECKING:
        __call__ = forward


def _require_shareable(modalities: Mapping[str, Noising]) -> None:
    """Raise ValueError unless all modalities can have the times of the first one."""
    densities = {name: noising.timesteps for name, noising in modalities.items()}
    for name, density in densities.items():
        if density.measures_losses:
            raise ValueError(
                f"{density.name} timesteps of {name!r} follow the losses of one modality; shared "
                "times need another density, or times='independent'"
            )
    shapes = {
        density.chunks if isinstance(density, ShapedTimesteps) else "one"
        for density in densities.values()
    }
    if len(shapes) > 1:
        told = ", ".join(
            f"{name}: {density.name}"
            + (f" with chunks={density.chunks}" if isinstance(density, ShapedTimesteps) else "")
            for name, density in densities.items()
        )
        raise ValueError(
            f"shared times need the same number of times in every modality, got {told}; give all "
            "one time, or all k times with the same chunks"
        )
    curves = [noising.schedule.curve for noising in modalities.values()]
    ranges = [(curve.is_discrete, curve.t_min, curve.t_max) for curve in curves]
    if len(set(ranges)) > 1:
        told = ", ".join(f"{low:g} ... {high:g}" for _, low, high in ranges)
        raise ValueError(f"shared times need curves with the same times, got {told}")


def _require_names(what: str, given: Mapping[str, Any], modalities: Any) -> None:
    if set(given) != set(modalities):
        raise ValueError(
            f"{what} must have the modalities {', '.join(modalities)}, got {', '.join(given)}"
        )
