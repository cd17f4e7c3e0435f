"""The network and its noising as one module, for loops that average gradients over processes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from ...noising import NoiseSchedule, Noising


class Objective(nn.Module):
    """The loss of a network on noised samples.

    DistributedDataParallel averages the gradients of one module's forward. So weights that the
    noising learns belong into the same module as the network.

    Args:
        denoiser: called as ``denoiser(x, timesteps, **conditioning)``.
        noising: the noising.

    >>> import torch
    >>> from alphabar.noising import NoiseSchedule
    >>> class Net(nn.Module):
    ...     def forward(self, x, timesteps):
    ...         return 0 * x
    >>> objective = Objective(Net(), Noising(NoiseSchedule.flow()))
    >>> objective(torch.zeros(1, 4), {}, step=0, index=[0], total=1).shape
    torch.Size([])
    """

    def __init__(self, denoiser: nn.Module, noising: Noising) -> None:
        super().__init__()
        self.denoiser, self.noising = denoiser, noising

    def forward(self, x0: Tensor, conditioning: Mapping[str, Any], **place: Any) -> Tensor:
        """Return the mean loss of a batch; ``place`` is that of :meth:`Noising.forward`."""
        noised = self.noising(x0, **place)
        return noised.loss(self.denoiser(noised.x, noised.timesteps, **conditioning))

    def learned(self) -> list[nn.Parameter]:
        """Return the parameters that are trained."""
        return [parameter for parameter in self.parameters() if parameter.requires_grad]

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Return the groups for an optimizer.

        Weights of the noising do not decay: they are statistics of the loss, which decay biases.
        """
        statistics = list(self.noising.parameters())
        ids = {id(parameter) for parameter in statistics}
        network = [parameter for parameter in self.learned() if id(parameter) not in ids]
        groups = [{"params": network}, {"params": statistics, "weight_decay": 0.0}]
        return [group for group in groups if group["params"]]

    def trained_state(self) -> dict[str, Tensor]:
        """Return what a checkpoint must hold: what is trained, and the noising's memory of losses.

        Frozen weights, e.g. of the network around a LoRA, are left out.
        """
        learned = {name for name, parameter in self.named_parameters() if parameter.requires_grad}
        state = self.state_dict()
        return {n: x for n, x in state.items() if n in learned or n.startswith("noising.")}


def schedule_in(given: Any) -> NoiseSchedule:
    """Return the schedule of a training: ``given`` itself, or the one that it has.

    Raises:
        TypeError: it is not a schedule and has none.

    >>> schedule_in(Noising(NoiseSchedule.flow())) == NoiseSchedule.flow()
    True
    """
    found = getattr(given, "schedule", given)
    if not isinstance(found, NoiseSchedule):
        raise TypeError(
            "schedule must be the NoiseSchedule (or Noising) of the training, got "
            f"{type(given).__name__}; it says what the network predicts, and at which noise"
        )
    return found
