"""Running averages of the weights of a network, in float32, also of shards.

The callback ``EMA`` and :class:`~alphabar.training.ModelEMA` use them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from numbers import Real
from typing import Any, cast

import torch
from torch import Tensor, nn

from ...noising.utils.validation import whole_number
from ..loops.sharding import Layout, clean_name, local, reshard
from .profiles import EMAProfile, resolve_ema_profile

Pairs = Sequence[tuple[Tensor, Tensor]]
"""Pairs (live parameter or buffer, this rank's part of its average)."""

Profiles = (
    str
    | float
    | Mapping[str, Any]
    | EMAProfile
    | Sequence[str | float | Mapping[str, Any] | EMAProfile]
)


@dataclass
class Average:
    """One running average of the weights on this rank.

    Args:
        profile: the EMA profile.
        weights: this rank's part of each averaged parameter, by parameter name.
        updates: number of updates so far.
    """

    profile: EMAProfile
    weights: dict[str, Tensor] = field(default_factory=dict)
    updates: int = 0

    @torch.no_grad()
    def update(self, current: Mapping[str, Tensor], keep: float) -> None:
        """Set the average to ``keep * average + (1 - keep) * current``."""
        known = [name for name in current if name in self.weights] if self.updates else []
        for name in known:
            # a resume loads the averages before the model moves to its device
            self.weights[name] = self.weights[name].to(current[name].device)
        old = [self.weights[name] for name in known]
        new = [current[name].to(average.dtype) for name, average in zip(known, old, strict=True)]
        if old:
            torch._foreach_lerp_(old, new, 1 - keep)
        # first update: all parameters; later: parameters that started to train since
        for name in current.keys() - set(known):
            self.weights[name] = current[name].to(_average_dtype(current[name]), copy=True)
        self.updates += 1


class Averages:
    """Averages of one network, one for each profile. The first is the one that is used.

    The methods take ``root``, the outermost module, and ``module``, the module whose parameter
    names count. They are the same unless the model is wrapped.

    Args:
        profiles: one or several names, mappings or objects of ``EMA_PROFILES``, or a decay.
        every_n_steps: optimizer steps between updates.
        start_step: optimizer steps before averaging starts.
        device: device of the averages, by default that of the weights.

    Raises:
        ValueError: invalid profiles or numbers.

    >>> net = nn.Linear(1, 1)
    >>> averages = Averages(0.5)
    >>> averages.update(net, net, step=1), averages.update(net, net, step=1)
    (True, False)
    """

    def __init__(
        self,
        profiles: Profiles = "power_function",
        every_n_steps: int = 1,
        start_step: int = 0,
        device: torch.device | str | None = None,
    ) -> None:
        alone = isinstance(profiles, str | float | int | Real | Mapping | EMAProfile)
        several: list[Any] = [profiles] if alone else list(cast(Iterable[Any], profiles))
        self.profiles = tuple(resolve_ema_profile(profile) for profile in several)
        labels = [profile.label for profile in self.profiles]
        if not labels or len(set(labels)) < len(labels):
            raise ValueError(
                f"profiles must be one or more different ones, got {', '.join(labels) or 'none'}"
            )
        self.every_n_steps = whole_number("every_n_steps", every_n_steps, 1)
        self.start_step = whole_number("start_step", start_step, 0)
        self.device = device
        self.reset()

    def reset(self) -> None:
        """Begin anew."""
        self.each = [Average(profile) for profile in self.profiles]
        self.step = self.start_step  # optimizer step of the last update

    def tracked(self, module: nn.Module) -> Iterable[tuple[str, Tensor]]:
        """Return the averaged parameters: those that train now or trained before."""
        known = self.each[0].weights
        for name, weight in module.named_parameters():
            name = clean_name(name)
            if weight.is_floating_point() and (weight.requires_grad or name in known):
                yield name, weight

    def update(self, root: nn.Module, module: nn.Module, step: int) -> bool:
        """Update the averages for the optimizer steps since the last update, if it is time.

        Returns:
            Whether there was an update.
        """
        before = self.step
        if step - before < self.every_n_steps:
            return False
        reshard(root)
        current = {name: local(weight) for name, weight in self.tracked(module)}
        if self.device is not None:
            current = {name: weight.to(self.device) for name, weight in current.items()}
        for average in self.each:
            average.update(current, average.profile(step - self.start_step, step - before))
        self.step = step
        return True

    def pairs(self, module: nn.Module) -> Pairs:
        """Return pairs (live parameter, this rank's part of its first average).

        Empty before the first update.
        """
        known = self.each[0].weights
        return [(weight, known[name]) for name, weight in self.tracked(module) if name in known]

    def whole(self, root: nn.Module, module: nn.Module, average: Average) -> dict[str, Tensor]:
        """Return whole averaged tensors by name. Every rank of a sharded model must call it."""
        layout = Layout(root)
        tracked = [
            (name, weight) for name, weight in self.tracked(module) if name in average.weights
        ]
        return {name: layout.assemble(weight, average.weights[name]) for name, weight in tracked}

    def state_dict(self, root: nn.Module, module: nn.Module) -> dict[str, Any]:
        """Return plain values and whole tensors. Every rank of a sharded model must call it."""
        return {
            "step": self.step,
            "averages": [
                {
                    "profile": average.profile.to_config(),
                    "updates": average.updates,
                    "weights": self.whole(root, module, average),
                }
                for average in self.each
            ],
        }

    def load_state_dict(
        self, state: Mapping[str, Any], root: nn.Module, module: nn.Module
    ) -> list[str]:
        """Load a :meth:`state_dict`. Every rank of a sharded model must call it.

        Returns:
            The labels of profiles that the state does not hold. They begin anew.
        """
        self.reset()
        layout = Layout(root)
        weights = {clean_name(name): weight for name, weight in module.named_parameters()}
        self.step = int(state["step"])
        missing = []
        for average in self.each:
            config = average.profile.to_config()
            found = [entry for entry in state["averages"] if entry["profile"] == config]
            missing += [] if found else [average.profile.label]
            for entry in found:
                average.updates = int(entry["updates"])
                parts = {
                    name: layout.part(weights[name], whole)
                    for name, whole in entry["weights"].items()
                    if name in weights
                }
                average.weights = {
                    name: part.to(self.device, _average_dtype(part), copy=True)
                    for name, part in parts.items()
                }
        return missing


def _average_dtype(tensor: Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)
