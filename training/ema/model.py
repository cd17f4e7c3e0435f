"""EMA of a network in any training loop: plain torch, accelerate, Lightning Fabric."""

from __future__ import annotations

import warnings
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..loops.sharding import (
    Layout,
    clean_name,
    copy_values,
    require_parameters,
    reshard,
    values_swapped,
)
from ..loops.wrappers import unwrapped
from .averages import Averages, Profiles


class ModelEMA:
    """Average the trained weights of a network after optimizer steps.

    The averages are float32 or better, of the parameters that train. A network that is sharded
    (FSDP) is averaged shard by shard. The network keeps its own weights.

    ``accelerator.register_for_checkpointing(ema)`` saves and loads it with ``save_state``.

    Args:
        network: the network that trains, as the training calls it: prepared, wrapped or not.
        profiles: one or several names, mappings or objects of ``EMA_PROFILES``, or a decay
            (``0.999``). The first profile is the average that is used.
        every_n_steps: optimizer steps between updates. One update covers all steps since the last
            update, so the length of the average does not depend on this value.
        start_step: optimizer steps before averaging starts.
        device: device of the averages, e.g. 'cpu' to save memory. Default: that of the weights.

    Raises:
        ValueError: invalid profiles or numbers, or a wrapper that hides the parameters.

    >>> network = nn.Linear(1, 1, bias=False)
    >>> ema = ModelEMA(network, profiles=0.5)
    >>> for step, value in enumerate((1.0, 3.0), start=1):
    ...     _ = nn.init.constant_(network.weight, value)
    ...     ema.update(step)
    >>> with ema.average() as used:
    ...     used, network.weight.item()
    (True, 2.0)
    >>> network.weight.item()
    3.0
    """

    def __init__(
        self,
        network: nn.Module,
        profiles: Profiles = "power_function",
        *,
        every_n_steps: int = 1,
        start_step: int = 0,
        device: torch.device | str | None = None,
    ) -> None:
        require_parameters(network)
        self.network = network
        self._averages = Averages(profiles, every_n_steps, start_step, device)

    @property
    def step(self) -> int:
        """The optimizer step of the last update."""
        return self._averages.step

    def update(self, step: int) -> None:
        """Update the averages after optimizer step ``step``, counted from 1.

        Calls at a step that is not due or was updated already do nothing.
        """
        self._averages.update(self.network, unwrapped(self.network), step)

    @contextmanager
    def average(self) -> Generator[bool, None, None]:
        """Use the average in the network inside the block; yield whether there is one yet.

        The network's own weights are restored bit for bit, also after an error. Every rank of a
        sharded model must enter.
        """
        reshard(self.network)  # the averages belong to the sharded parameters
        pairs = self._averages.pairs(unwrapped(self.network))
        if not pairs:
            yield False
            return
        with values_swapped(self.network, pairs):
            yield True

    def weights(self, profile: int = 0) -> dict[str, Tensor]:
        """Return whole averaged parameters by name; empty before the first update.

        Every rank of a sharded model must call it.

        Args:
            profile: index of the profile.
        """
        averages = self._averages
        return averages.whole(self.network, unwrapped(self.network), averages.each[profile])

    def copy_to(self, network: nn.Module) -> None:
        """Copy the average into the parameters of ``network``, e.g. to save it after training.

        Every rank of a sharded model must call it.

        Raises:
            ValueError: there is no average yet, or ``network`` lacks one of its parameters.
        """
        found = self.weights()
        if not found:
            raise ValueError("there is no average yet; call update(step) after optimizer steps")
        own = {clean_name(name): weight for name, weight in unwrapped(network).named_parameters()}
        lacking = [name for name in found if name not in own]
        if lacking:
            raise ValueError(
                f"{type(network).__name__} has no parameter {lacking[0]!r}, which is averaged; "
                "give a network of the same architecture"
            )
        layout = Layout(network)
        copy_values([(own[name], layout.part(own[name], value)) for name, value in found.items()])

    def state_dict(self) -> dict[str, Any]:
        """Return the averages, with whole tensors. Every rank of a sharded model must call it."""
        return self._averages.state_dict(self.network, unwrapped(self.network))

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Load a :meth:`state_dict`. Every rank of a sharded model must call it.

        A profile that the state does not hold begins anew, with a warning.
        """
        missing = self._averages.load_state_dict(state, self.network, unwrapped(self.network))
        if missing:
            warnings.warn(
                f"the state has no average {', '.join(missing)}; it begins anew", stacklevel=2
            )
