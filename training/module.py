"""A LightningModule for any network: the loss line and a low-variance validation loss."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn

from ..noising import NoiseSchedule, Noising, Uniform
from ..noising.noising import prediction_tensor
from .accumulation import Accumulation, full_batch, replicas
from .networks import network_config

VALIDATION_SEED = (
    20_240_229  # any fixed number: validation noise is the same in every run and epoch
)


class DiffusionModule(LightningModule):
    """Train ``network`` on the objective that ``noising`` states.

    ``network`` is called as ``network(x, timesteps, **conditioning)`` and returns a tensor or an
    object with ``.sample``. ``noising``: the schedule, weights, times and noise of the loss.
    ``learning_rate``: of AdamW. ``sample_shape``: the shape of one sample without batch, for
    previews; recorded from the first training batch when not given. ``input_key``: where the clean
    samples lie in a mapping batch; its other entries are the conditioning. ``label_key``: the name
    under which the network takes the second entry of a batch (samples, labels), as of
    ``TensorDataset(images, labels)``: "class_labels" for networks of diffusers. The checkpoint
    carries the config of a diffusers network and the sample shape, so that it can be sampled from
    with nothing but its own files.

    Noise and times are those of the sample's place in the optimizer step, whatever the number of
    processes and the accumulation, also where batches are unequal. See :meth:`global_index` for
    samplers that do not deal out samples as a DistributedSampler.

    >>> class Net(nn.Module):
    ...     def forward(self, x, t):
    ...         return -x
    >>> schedule = NoiseSchedule.scaled_linear(prediction="v_prediction").zero_terminal_snr()
    >>> module = DiffusionModule(Net(), Noising(schedule, timesteps="stratified"))
    >>> module.predict(torch.ones(1, 1, 2, 2), torch.tensor([999])).mean().item()
    -1.0
    """

    def __init__(
        self,
        network: nn.Module,
        noising: Noising,
        learning_rate: float = 1e-4,
        sample_shape: tuple[int, ...] | None = None,
        input_key: str = "images",
        label_key: str | None = None,
    ) -> None:
        super().__init__()
        if not isinstance(noising, Noising):
            raise TypeError(
                f"noising must be a Noising, got {type(noising).__name__}; e.g. "
                "Noising(NoiseSchedule.scaled_linear())"
            )
        self.network = network
        self.noising = noising
        self.learning_rate = learning_rate
        self.sample_shape = tuple(sample_shape) if sample_shape is not None else None
        self.input_key = input_key
        self.label_key = label_key
        self._accumulation = Accumulation()
        self.validation_noising = Noising(
            noising.schedule, Uniform(), "stratified", seed=VALIDATION_SEED
        )

    @property
    def schedule(self) -> NoiseSchedule:
        """The schedule that is trained on."""
        return self.noising.schedule

    def predict(self, x: Tensor, timesteps: Tensor, **conditioning: Any) -> Tensor:
        """Return the network's raw output for its input ``x`` (``Noised.x``, or what a sampler
        hands it), shape of ``x``.
        """
        return prediction_tensor(self.network(x, timesteps, **conditioning))

    def forward(self, x: Tensor, timesteps: Tensor, **conditioning: Any) -> Tensor:
        return self.predict(x, timesteps, **conditioning)

    def unpack(self, batch: Any) -> tuple[Tensor, dict[str, Any]]:
        """Return (x_0, conditioning) of a batch: a tensor, (x_0,), (x_0, mapping), (x_0, labels),
        or a mapping with ``input_key``.

        Override it for other batches, e.g. to encode images to latents. ValueError for entries that
        have no name: labels without ``label_key``, or more than two entries.
        """
        if isinstance(batch, Tensor):
            return batch, {}
        if isinstance(batch, Mapping):
            if self.input_key not in batch:
                raise ValueError(
                    f"the batch has the keys {sorted(batch)}, not {self.input_key!r}; "
                    "give DiffusionModule the input_key, or override unpack"
                )
            return batch[self.input_key], {k: v for k, v in batch.items() if k != self.input_key}
        x0, *rest = batch
        if not rest:
            return x0, {}
        if len(rest) == 1 and isinstance(rest[0], Mapping):
            return x0, dict(rest[0])
        if len(rest) == 1 and self.label_key is not None:
            return x0, {self.label_key: rest[0]}
        what = f"entries beside the samples: {', '.join(map(_in_words, rest))}"
        raise ValueError(
            f"the batch has {what}, of which the network would see nothing; give DiffusionModule "
            "label_key='class_labels' "
            "(the network's name for the second entry), yield (samples, {name: value, ...}), or "
            "override unpack"
        )

    def global_index(self, start: int, batch: int) -> Sequence[int]:
        """Return the index of each of ``batch`` samples inside the optimizer step, of which
        ``start`` went before on this rank.

        Here: every rank takes each world_size-th sample, as with a DistributedSampler. The index
        says which noise a sample gets; that no two have the same is all that training needs.
        Override it where each rank has whole batches, and the noise is to be the same on one
        process: ``start * world_size + rank * batch + k`` for batches of equal size.
        """
        rank, world_size = replicas(self.trainer)
        return [(start + k) * world_size + rank for k in range(batch)]

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x0, conditioning = self.unpack(batch)
        self.sample_shape = self.sample_shape or tuple(x0.shape[1:])
        noised = self.noising(x0, **self._place(len(x0), batch_idx))
        loss = noised.loss(self.predict(noised.x, noised.timesteps, **conditioning))
        self.log("train_loss", loss, prog_bar=True)
        return loss

    def _place(self, samples: int, batch_idx: int) -> dict[str, Any]:
        """Return the optimizer step of a batch, the indices of its samples in it, and how many
        samples the step has.
        """
        trainer = self.trainer
        accumulate = trainer.accumulate_grad_batches
        start, full = self._accumulation.batch(
            trainer.global_step,
            (trainer.current_epoch, batch_idx),
            batch_idx % accumulate,
            samples,
            full_batch(trainer.train_dataloader),
        )
        total = full * accumulate * replicas(trainer)[1]
        return {
            "step": trainer.global_step,
            "index": self.global_index(start, samples),
            "total": total,
        }

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Tensor:
        x0, conditioning = self.unpack(batch)
        # the batch's number stands in for the step: the same noise and times at every validation
        samples = len(x0)
        noised = self.validation_noising(
            x0,
            step=batch_idx,
            index=self.global_index(0, samples),
            total=samples * replicas(self.trainer)[1],
        )
        loss = noised.loss(self.predict(noised.x, noised.timesteps, **conditioning))
        self.log("val_loss", loss, prog_bar=True, sync_dist=True, batch_size=x0.shape[0])
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        # a learned log-variance is a statistic of the loss: decay would pull it to 0 and bias it
        learned = [p for p in self.noising.parameters() if p.requires_grad]
        kept = set(learned)
        groups: list[dict[str, Any]] = [
            {"params": [p for p in self.parameters() if p.requires_grad and p not in kept]}
        ]
        if learned:
            groups.append({"params": learned, "weight_decay": 0.0})
        return torch.optim.AdamW(groups, lr=self.learning_rate)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["network"] = network_config(self.network)
        checkpoint["sample_shape"] = list(self.sample_shape) if self.sample_shape else None

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        shape = checkpoint.get("sample_shape")
        self.sample_shape = self.sample_shape or (tuple(shape) if shape else None)


def _in_words(entry: Any) -> str:
    return (
        f"a tensor of shape {tuple(entry.shape)}"
        if isinstance(entry, Tensor)
        else f"a {type(entry).__name__}"
    )
