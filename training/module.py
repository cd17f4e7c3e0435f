"""A LightningModule for any network, with the training loss and validation by noise level."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor, nn

from ..noising import NoiseSchedule, Noising
from ..noising.noising import prediction_tensor
from ..noising.utils.rng import Draws, stream_of
from .accumulation import Accumulation, full_batch, replicas, samples_of
from .loops.background import AT_THE_END, finish, pictures_of
from .loops.complaints import Complaints, Failure
from .networks import network_config
from .publishing.figures import publish_figure
from .publishing.loggers import takes_images
from .validation import (
    ErrorsAtLevels,
    LevelErrors,
    plot_validations,
    validation_noising,
    validation_times,
)


class DiffusionModule(LightningModule):
    """Train a network on the objective that ``noising`` defines.

    The noise and the time of a sample depend on its position in the optimizer step. They do not
    depend on the number of processes or on gradient accumulation, even if the batches have
    different sizes. See :meth:`global_index` for samplers that distribute samples differently from
    a DistributedSampler.

    Validation logs ``val_loss``, a low-variance estimate over uniform times, and the error at fixed
    noise levels on fixed noise, each apart: ``val_loss_by_snr/0_zero_SNR``,
    ``val_loss_by_snr/1_-10.0``, ..., and ``val_loss_by_snr/mean``. Loggers that take images get one
    plot of all levels, with earlier validations of this process. The error is unweighted, in the
    units of the target; see :mod:`alphabar.training.validation`. Each sample counts once: those
    that a DistributedSampler repeats are left out of ``val_loss_by_snr``, not of ``val_loss``.

    The checkpoint contains the config of a diffusers network and the sample shape, so that sampling
    needs only the checkpoint's own files.

    Args:
        network: called as ``network(x, timesteps, **conditioning)``; returns a tensor or an object
            with ``.sample``.
        noising: the schedule, weights, times and noise of the loss.
        learning_rate: learning rate of AdamW.
        sample_shape: shape of one sample without batch, for previews; default: the shape in the
            first training batch.
        input_key: key of the clean samples if the batch is a mapping; the other entries are the
            conditioning.
        label_key: the network's argument name for the second entry of a batch (samples, labels), as
            from ``TensorDataset(images, labels)``; "class_labels" for diffusers networks.
        encode: a function from the loader's batch to a batch of latents and conditioning, e.g. with
            a VAE and a text encoder, as ``{"images": latents, "encoder_hidden_states": text}`` or
            ``(latents, labels)``. It runs without gradients, in training and in validation. Its
            weights are neither trained nor in checkpoints. A module is moved to the device of the
            training; a function moves its own weights. What it draws itself is not repeated after
            a resume: take the mode of a VAE's posterior for that.
        label_dropout: share of the training labels that ``null_label`` replaces, for guidance. The
            choice depends on the noising's seed and on the position of a sample in the optimizer
            step, as its noise does.
        null_label: the label for "no class", e.g. the number of classes, or a tensor of the shape
            of one label, e.g. the embedding of the empty prompt. Previews take it as
            ``ValidationSampling(null_class=...)``.
        validation_levels: number of noise levels of the validation, at least 3. A validation batch
            costs as many calls of the network, and one for ``val_loss``. 0 logs ``val_loss`` alone.

    Raises:
        TypeError: ``noising`` is not a Noising, or ``encode`` cannot be called.
        ValueError: ``validation_levels`` is 1, 2 or negative; ``label_dropout`` is no share, or
            lacks ``label_key`` or ``null_label``.

    >>> class Net(nn.Module):
    ...     def forward(self, x, t):
    ...         return -x
    >>> schedule = NoiseSchedule.scaled_linear(prediction="v_prediction").zero_terminal_snr()
    >>> module = DiffusionModule(Net(), Noising(schedule, timesteps="stratified"))
    >>> module.predict(torch.ones(1, 1, 2, 2), torch.tensor([999])).mean().item()
    -1.0
    """

    _encode: Callable[[Any], Any] | None

    def __init__(
        self,
        network: nn.Module,
        noising: Noising,
        learning_rate: float = 1e-4,
        sample_shape: tuple[int, ...] | None = None,
        input_key: str = "images",
        label_key: str | None = None,
        encode: Callable[[Any], Any] | None = None,
        label_dropout: float = 0.0,
        null_label: int | Tensor | None = None,
        validation_levels: int = 8,
    ) -> None:
        super().__init__()
        if not isinstance(noising, Noising):
            raise TypeError(
                f"noising must be a Noising, got {type(noising).__name__}; e.g. "
                "Noising(NoiseSchedule.scaled_linear())"
            )
        if encode is not None and not callable(encode):
            raise TypeError(
                f"encode must be a function from batches to batches, got {type(encode).__name__}"
            )
        if not 0 <= label_dropout <= 1:
            raise ValueError(f"label_dropout must lie in 0 ... 1, got {label_dropout}; e.g. 0.1")
        if label_dropout and (label_key is None or null_label is None):
            raise ValueError(
                "label_dropout needs label_key=, the network's name for the labels, and null_label="
                ", the label for \"no class\"; e.g. label_key='class_labels', null_label=10"
            )
        self.network = network
        self.noising = noising
        self.learning_rate = learning_rate
        self.sample_shape = tuple(sample_shape) if sample_shape is not None else None
        self.input_key = input_key
        self.label_key = label_key
        # past nn.Module, which would train the weights of an encoder and save them
        object.__setattr__(self, "_encode", encode)
        self.label_dropout, self.null_label = float(label_dropout), null_label
        self._accumulation = Accumulation()
        if validation_levels:  # fails here, not in the first validation
            validation_times(noising.schedule, validation_levels)
        self.validation_levels = validation_levels
        # by dataloader: the sums of the running validation, its samples so far, and what was found
        self._at_levels: dict[int, ErrorsAtLevels] = {}
        self._validated: dict[int, int] = {}
        self._validations: dict[int, dict[int, LevelErrors]] = {}
        self._complaints = Complaints("DiffusionModule")
        self.validation_noising = validation_noising(noising)

    @property
    def schedule(self) -> NoiseSchedule:
        """The schedule of the training."""
        return self.noising.schedule

    def predict(self, x: Tensor, timesteps: Tensor, **conditioning: Any) -> Tensor:
        """Return the network's raw output for its input ``x``; the shape is that of ``x``.

        The input is ``Noised.x`` in training, or the input from a sampler.
        """
        return prediction_tensor(self.network(x, timesteps, **conditioning))

    def forward(self, x: Tensor, timesteps: Tensor, **conditioning: Any) -> Tensor:
        return self.predict(x, timesteps, **conditioning)

    def unpack(self, batch: Any) -> tuple[Tensor, dict[str, Any]]:
        """Return (x_0, conditioning) of a batch.

        A batch is a tensor, (x_0,), (x_0, mapping), (x_0, labels), or a mapping with ``input_key``;
        with ``encode``, it is what that returns. Override this method for other batches.

        Raises:
            ValueError: an entry has no name: labels without ``label_key``, or more than two
                entries.
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

    def _encoded(self, batch: Any) -> tuple[Tensor, dict[str, Any]]:
        """Return (x_0, conditioning) of a batch of the loader."""
        if self._encode is None:
            return self.unpack(batch)
        if isinstance(self._encode, nn.Module):
            weight = next(self._encode.parameters(), None)
            if weight is not None and weight.device != self.device:
                self._encode.to(self.device)
        with torch.no_grad():
            return self.unpack(self._encode(batch))

    def _with_dropped_labels(
        self, conditioning: dict[str, Any], step: int, index: Sequence[int]
    ) -> dict[str, Any]:
        """Return the conditioning with ``null_label`` in the place of some labels."""
        if not self.label_dropout:
            return conditioning
        labels = conditioning.get(self.label_key or "")
        if not isinstance(labels, Tensor) or labels.shape[:1] != (len(index),):
            raise ValueError(
                f"label_dropout needs {self.label_key!r} with a label for each of {len(index)} "
                f"samples; the batch has {', '.join(sorted(conditioning)) or 'no conditioning'}"
            )
        draws = Draws(self.noising.seed, index, step=step, stream=stream_of("label dropout"))
        dropped = (draws.uniform(dtype=torch.float64) < self.label_dropout).to(labels.device)
        null = torch.as_tensor(self.null_label, dtype=labels.dtype, device=labels.device)
        dropped = dropped.view(-1, *(1,) * (labels.ndim - 1))
        return conditioning | {str(self.label_key): torch.where(dropped, null, labels)}

    def global_index(self, start: int, batch: int) -> Sequence[int]:
        """Return the index of each sample of a batch inside the optimizer step.

        The index selects the noise of a sample. Training only needs that no two samples have the
        same index. By default, every rank takes each world_size-th sample, as with a
        DistributedSampler.

        Override this method if each rank takes whole batches and the noise must be the same as on
        one process: ``start * world_size + rank * batch + k`` for batches of equal size.

        Args:
            start: number of samples before this batch in the step, on this rank.
            batch: number of samples in the batch.
        """
        rank, world_size = replicas(self.trainer)
        return [(start + k) * world_size + rank for k in range(batch)]

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x0, conditioning = self._encoded(batch)
        self.sample_shape = self.sample_shape or tuple(x0.shape[1:])
        place = self._place(len(x0), batch_idx)
        conditioning = self._with_dropped_labels(conditioning, place["step"], place["index"])
        noised = self.noising(x0, **place)
        loss = noised.loss(self.predict(noised.x, noised.timesteps, **conditioning))
        self.log("train_loss", loss, prog_bar=True)
        return loss

    def _place(self, samples: int, batch_idx: int) -> dict[str, Any]:
        """Return the optimizer step, the indices of the batch's samples, and the step's size."""
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
        x0, conditioning = self._encoded(batch)
        # batch number as step: the same noise and times in every validation
        samples = len(x0)
        noised = self.validation_noising(
            x0,
            step=batch_idx,
            index=self.global_index(0, samples),
            total=samples * replicas(self.trainer)[1],
        )
        loss = noised.loss(self.predict(noised.x, noised.timesteps, **conditioning))
        self.log("val_loss", loss, prog_bar=True, sync_dist=True, batch_size=x0.shape[0])
        if self.validation_levels:
            self._add_levels(x0, conditioning, dataloader_idx)
        return loss

    # -- validation at fixed noise levels ----------------------------------------------------------

    def on_validation_epoch_start(self) -> None:
        self._at_levels, self._validated = {}, {}

    def _add_levels(self, x0: Tensor, conditioning: Mapping[str, Any], loader: int) -> None:
        sums = self._at_levels.get(loader)
        if sums is None:
            sums = self._at_levels[loader] = self._no_errors()
        start, batch = self._validated.get(loader, 0), len(x0)
        self._validated[loader] = start + batch
        rank, world_size = replicas(self.trainer)
        samples = samples_of(self.trainer.val_dataloaders, loader)
        repeated = [
            samples is not None and (start + k) * world_size + rank >= samples for k in range(batch)
        ]
        index = self.global_index(start, batch)
        sums.add(self.predict, x0, index, conditioning, [not one for one in repeated])

    def _no_errors(self) -> ErrorsAtLevels:
        return ErrorsAtLevels(self.validation_noising, self.validation_levels)

    def on_validation_epoch_end(self) -> None:
        loaders = len(self.trainer.num_val_batches) if self.validation_levels else 0
        for loader in range(loaders):  # also those of which this rank had no batch: others wait
            sums = self._at_levels.get(loader) or self._no_errors()
            found = sums.reduced()
            if not found.samples:
                continue
            prefix = "val_loss_by_snr" + (f"/dataloader_{loader}" if loader else "")
            self.log_dict(found.metrics(prefix), sync_dist=True)
            self._validations.setdefault(loader, {})[self.trainer.global_step] = found
            if self.trainer.is_global_zero:
                try:
                    self._publish(prefix, self._validations[loader])
                except Exception as error:
                    self._failed(error)
        self._at_levels = {}

    def _publish(self, tag: str, validations: Mapping[int, LevelErrors]) -> None:
        trainer = self.trainer
        loggers = [logger for logger in trainer.loggers if takes_images(logger)]
        plotted = importlib.util.find_spec("matplotlib") is not None
        if not loggers or not plotted or trainer.sanity_checking:
            return
        png = plot_validations(validations)
        lane, step = pictures_of(trainer), trainer.global_step
        publish_figure(lane, png, tag.replace("/", "_"), step, loggers, self._failed)

    def _failed(self, error: Exception) -> None:
        failure = Failure("the plot of the validation", error)
        self._complaints.tell(str(failure), failure.kind)

    def on_validation_end(self) -> None:
        if self.trainer.state.fn == TrainerFn.VALIDATING:  # otherwise at the end of fit
            self._finish()

    def on_fit_end(self) -> None:
        self._finish()

    def _finish(self) -> None:
        if self._validations:
            finish(self.trainer, pictures_of(self.trainer), AT_THE_END)
            self._complaints.sum_up()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        # no decay: a learned log-variance is a statistic of the loss, decay to 0 would bias it
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
