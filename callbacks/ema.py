"""EMA of the weights: several profiles, in float32, under DDP and FSDP, exact after a resume.

``EMA`` is not a subclass of Lightning's ``WeightAveraging``, for three reasons:

- The average of ``WeightAveraging`` is a deep copy of the LightningModule, which FSDP refuses.
- ``WeightAveraging`` writes to the average when it swaps weights. So bfloat16 models round it, and
  an error between two swaps leaves the average and the weights exchanged.
- ``WeightAveraging`` uses the average before its first update.

The checkpoint format is the same: ``state_dict`` holds the average and ``current_model_state`` the
weights. Each class reads the checkpoints of the other.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn
from torch import Tensor

from ..noising.utils.atomic import require_writable
from ..noising.utils.registry import lookup
from ..noising.utils.validation import whole_number
from ..training.ema.averages import Averages, Pairs, Profiles
from ..training.ema.posthoc import SNAPSHOT_DTYPES, save_snapshot
from ..training.ema.profiles import EMAProfile, PowerFunction
from ..training.loops.background import (
    AFTER_AN_ERROR,
    AT_THE_END,
    BEFORE_A_CHECKPOINT,
    Background,
    finish,
)
from ..training.loops.collectives import on_rank_zero
from ..training.loops.complaints import Complaints, Failure
from ..training.loops.sharding import (
    Layout,
    clean_name,
    is_sharded_state,
    local,
    require_parameters,
    reshard,
    values_swapped,
)
from .support.module_api import is_fast_dev_run
from .support.strategies import root_of

# a top-level key: the averages are tensors, and callback states should not contain tensors
STATE_KEY = "ema"


class EMA(Callback):
    """Average the trained weights after optimizer steps, and save the averages in checkpoints.

    What a checkpoint contains:

    - ``state_dict`` is the average of the first profile, so ``load_from_checkpoint`` and sampling
      use it. ``current_model_state`` holds the weights themselves. A resume continues from them bit
      for bit.
    - A sharded checkpoint (a folder) keeps the weights in ``state_dict`` and stores the whole
      averages next to them.
    - A weights-only checkpoint holds no average, because Lightning does not call callbacks for it.

    Parameters are averaged in float32 or higher precision. Buffers and frozen parameters are saved
    unchanged. The model keeps its own weights, also after training; :func:`ema_weights` samples
    with the average. Under FSDP each rank averages its shards. For a checkpoint, the whole averages
    are assembled one parameter at a time.

    Args:
        profiles: one or several names, mappings or objects of ``EMA_PROFILES``, or a decay
            (``0.999``). The first profile is the average that is used.
        every_n_steps: optimizer steps between updates. One update covers all steps since the last
            update, so the length of the average does not depend on this value.
        start_step: optimizer steps before averaging starts.
        validate: validate with the average. Before the first update, validation uses the weights
            themselves.
        snapshot_every_n_steps: steps between snapshots of each ``power_function`` average, counted
            from ``start_step``. ``alphabar ema`` and ``posthoc_ema`` compute averages of other
            lengths from the snapshots.
        folder: folder of the snapshots, by default ``ema`` in the log directory. A background
            thread of rank 0 writes them from a copy on the CPU. If a snapshot cannot be written,
            the callback warns.
        snapshot_dtype: float32 or float16.

    Raises:
        ValueError: invalid profiles or numbers, raised at once or before training starts. Before
            training also: two callbacks that average weights, or a strategy that hides the
            parameters.
        OSError: a folder that cannot be written.

    >>> EMA("warmup").profiles
    (Warmup(decay=0.9999),)
    >>> two = EMA(
    ...     [PowerFunction(sigma_rel=0.05), PowerFunction(sigma_rel=0.10)],
    ...     snapshot_every_n_steps=1000,
    ... )
    >>> EMA("constant", snapshot_every_n_steps=1000)
    Traceback (most recent call last):
    ValueError: snapshots are made of power_function averages, got constant_0.999; add ...
    """

    def __init__(
        self,
        profiles: Profiles = "power_function",
        *,
        every_n_steps: int = 1,
        start_step: int = 0,
        validate: bool = True,
        snapshot_every_n_steps: int | None = None,
        folder: str | os.PathLike[str] | None = None,
        snapshot_dtype: str = "float32",
    ) -> None:
        super().__init__()
        self._averages = Averages(profiles, every_n_steps, start_step)
        self.profiles = self._averages.profiles
        self.every_n_steps, self.start_step = every_n_steps, start_step
        self.validate = validate
        self.snapshot_every_n_steps = snapshot_every_n_steps
        if snapshot_every_n_steps is not None:
            _require_snapshots(
                _at_least("snapshot_every_n_steps", snapshot_every_n_steps, 1),
                every_n_steps,
                [profile.label for profile in self.profiles],
            )
        self.folder = Path(folder) if folder is not None else None
        self.snapshot_dtype = snapshot_dtype
        lookup("snapshot_dtype", snapshot_dtype, SNAPSHOT_DTYPES)
        self._validating: ExitStack | None = None
        # a separate queue, so that no logger delays it; each task holds a copy of all weights, so
        # the queue has room for one task per power_function profile
        self._lane = Background(
            room=max(1, sum(isinstance(profile, PowerFunction) for profile in self.profiles))
        )
        self._failed: list[tuple[int, Failure]] = []  # filled by the thread: (step, failure)
        self._complaints = Complaints("EMA")
        self._over = False

    # -- before training ---------------------------------------------------------------------------

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._over = False
        if stage == "fit" and trainer.global_step != self._averages.step:
            # a new run; a second fit of the same Trainer continues the averages
            self._averages.reset()

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        require_parameters(root_of(trainer, pl_module))
        callbacks: list[Any] = cast(Any, trainer).callbacks
        rivals = [c for c in callbacks if isinstance(c, EMA) or hasattr(c, "_average_model")]
        if len(rivals) > 1:
            names = ", ".join(type(callback).__name__ for callback in rivals)
            raise ValueError(
                f"one callback can average the weights, got {names}; EMA takes several profiles"
            )
        if self.snapshot_every_n_steps is not None and not is_fast_dev_run(trainer):
            folder = self._snapshot_folder(trainer)
            on_rank_zero(trainer, lambda: require_writable(folder))

    def _snapshot_folder(self, trainer: Trainer) -> Path:
        # log_dir is a collective: every rank must read it
        log_dir = trainer.log_dir or trainer.default_root_dir
        return self.folder if self.folder is not None else Path(log_dir, "ema")

    # -- updates -----------------------------------------------------------------------------------

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._catch_up(trainer, pl_module)
        self._complain()

    def _catch_up(self, trainer: Trainer, module: LightningModule) -> None:
        """Update the averages for the optimizer steps since the last update.

        Other callbacks may trigger this before ``on_train_batch_end`` of this callback.
        """
        before, step = self._averages.step, trainer.global_step
        if self._validating is not None:
            return
        updated = self._averages.update(root_of(trainer, module), module, step)
        n = self.snapshot_every_n_steps
        if updated and n is not None:
            start = self.start_step
            if (step - start) // n > (before - start) // n:
                self._snapshot(trainer, module)

    def _snapshot(self, trainer: Trainer, module: LightningModule) -> None:
        if is_fast_dev_run(trainer):
            return
        folder = self._snapshot_folder(trainer)
        for average in self._averages.each:
            if isinstance(average.profile, PowerFunction):
                # on all ranks
                whole = self._averages.whole(root_of(trainer, module), module, average)
                on_rank_zero(trainer, partial(self._hand_over, folder, whole, average.profile))

    def _hand_over(
        self, folder: Path, weights: Mapping[str, Tensor], profile: PowerFunction
    ) -> None:
        """Queue a CPU copy of these weights for writing in the background.

        A failure is recorded and not raised, because the other snapshots are useful without it.
        """
        step = self._averages.step
        try:
            if not self._lane.wait_for_room():
                raise TimeoutError("the snapshot before it is still being written")
            kind = SNAPSHOT_DTYPES[self.snapshot_dtype]
            frozen = {
                name: value.detach().to("cpu", kind, copy=True) for name, value in weights.items()
            }
            act = partial(
                save_snapshot,
                folder,
                frozen,
                step=step - self.start_step,
                sigma_rel=profile.sigma_rel,
            )
            self._lane.submit(
                partial(act, dtype=self.snapshot_dtype),
                lambda error: self._note(step, folder, error),
            )
        except Exception as error:
            self._note(step, folder, error)

    def _note(self, step: int, folder: Path, error: Exception) -> None:
        self._failed.append((step, Failure(str(folder), error)))

    def _complain(self) -> None:
        while self._failed:
            step, failure = self._failed.pop(0)
            self._complaints.tell(
                f"the snapshot at step {step} was not written: {failure}", failure.kind
            )

    def _finish(self, trainer: Trainer, seconds: float) -> None:
        """Wait for pending snapshots. Every rank must call it."""
        if self.snapshot_every_n_steps is not None and not is_fast_dev_run(trainer):
            finish(trainer, self._lane, seconds)
            self._complain()
            if self._lane.pending:
                rank_zero_warn(
                    f"EMA: a snapshot is still being written after {seconds:g} seconds; going on "
                    "without it"
                )

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._finish(trainer, AT_THE_END)
        self._complaints.sum_up()

    # -- the average in validation and sampling ----------------------------------------------------

    def ema_pairs(self, trainer: Trainer, module: LightningModule) -> Pairs:
        """Return pairs (live parameter, this rank's part of its average).

        Empty before the first update.
        """
        self._catch_up(trainer, module)
        return self._averages.pairs(module)

    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.validate and trainer.state.fn == TrainerFn.FITTING:
            self._swap_in(trainer, pl_module)

    def _swap_in(self, trainer: Trainer, module: LightningModule) -> None:
        root = root_of(trainer, module)
        reshard(root)
        pairs = self.ema_pairs(trainer, module)
        if pairs:
            self._validating = ExitStack()
            self._validating.enter_context(values_swapped(root, pairs))
        elif not trainer.sanity_checking:
            rank_zero_info("EMA has not been updated yet: validating with the weights themselves")

    def _swap_out(self) -> None:
        if self._validating is not None:
            stack, self._validating = self._validating, None
            stack.close()

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._swap_out()

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        self._swap_out()  # callbacks that save a checkpoint on an exception come later in the list
        self._over = True  # this rank has failed; other ranks may not have
        self._lane.wait(AFTER_AN_ERROR)
        self._complain()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._swap_out()

    # -- checkpoints -------------------------------------------------------------------------------

    def on_save_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        self._catch_up(trainer, pl_module)
        if not self._over:
            # a run that resumes from this checkpoint does not write these snapshots again
            self._finish(trainer, BEFORE_A_CHECKPOINT)
        if self._validating is not None:  # state_dict now holds the average
            self._swap_out()
            own = trainer.strategy.lightning_module_state_dict()
            checkpoint["state_dict"] = {
                k: v.clone() if isinstance(v, Tensor) else v for k, v in own.items()
            }
            self._swap_in(trainer, pl_module)
        root = root_of(trainer, pl_module)
        checkpoint[STATE_KEY] = saved = self._averages.state_dict(root, pl_module)
        state = checkpoint["state_dict"]
        first = saved["averages"][0]
        whole = first["weights"]
        if first["updates"] and not is_sharded_state(state):
            names = _names(pl_module)
            checkpoint["current_model_state"] = state
            # shares tensors with the entry above; torch.save writes shared tensors once
            checkpoint["state_dict"] = {
                key: whole.get(names.get(clean_name(key), ""), v) for key, v in state.items()
            }
            # the key that Lightning uses
            checkpoint["averaging_state"] = {"n_averaged": torch.tensor(first["updates"])}

    def on_load_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        if trainer.state.fn != TrainerFn.FITTING:
            return  # validation, test and prediction use the average, which is in state_dict
        self._averages.reset()
        root = root_of(trainer, pl_module)
        weights = [clean_name(name) for name, _ in pl_module.named_parameters()]
        saved = checkpoint.get(STATE_KEY) or _of_lightning(checkpoint, self.profiles[0], weights)
        if saved is None:
            rank_zero_info("the checkpoint holds no averages of the weights; they begin anew")
            return
        for label in self._averages.load_state_dict(saved, root, pl_module):
            rank_zero_warn(f"the checkpoint has no average {label}; that one begins anew")
        if "current_model_state" in checkpoint:
            _load_own(trainer, pl_module, Layout(root), checkpoint["current_model_state"])


@torch.no_grad()
def _load_own(
    trainer: Trainer, module: LightningModule, layout: Layout, state: Mapping[str, Any]
) -> None:
    """Load the model's own weights after ``state_dict`` (the average) was loaded."""
    if not trainer.strategy.restore_checkpoint_after_setup:
        trainer.strategy.load_model_state_dict({"state_dict": state}, strict=module.strict_loading)
        return
    # sharding strategies can load only from the file, so copy the values here
    own: dict[str, Tensor] = dict(module.named_parameters()) | dict(module.named_buffers())
    tensors = {clean_name(name): tensor for name, tensor in own.items()}
    for name, value in state.items():
        tensor = tensors.get(clean_name(name))
        if tensor is not None:
            local(tensor).copy_(layout.part(tensor, value))


def _of_lightning(
    checkpoint: Mapping[str, Any], profile: EMAProfile, names: list[str]
) -> dict[str, Any] | None:
    """Convert the state of a Lightning ``WeightAveraging`` checkpoint to the format of ``EMA``."""
    updates = int(checkpoint.get("averaging_state", {}).get("n_averaged", 0))
    if not updates or "current_model_state" not in checkpoint:
        return None
    state = {clean_name(name): value for name, value in checkpoint["state_dict"].items()}
    weights = {name: state[name] for name in names if name in state}
    average = {"profile": profile.to_config(), "updates": updates, "weights": weights}
    return {"step": checkpoint["global_step"], "averages": [average]}


def _names(module: LightningModule) -> dict[str, str]:
    """Return a map from every name of a parameter to its first name (tied weights have several)."""
    first = {id(weight): clean_name(name) for name, weight in module.named_parameters()}
    return {
        clean_name(n): first[id(weight)]
        for n, weight in module.named_parameters(remove_duplicate=False)
    }


def _at_least(name: str, value: Any, least: int) -> int:
    return whole_number(name, value, least)


def _require_snapshots(n: int, every_n_steps: int, labels: Sequence[str]) -> None:
    if not any(label.startswith(PowerFunction.name) for label in labels):
        raise ValueError(
            f"snapshots are made of power_function averages, got {', '.join(labels)}; add "
            "'power_function' to profiles"
        )
    if n % every_n_steps:
        raise ValueError(
            f"snapshot_every_n_steps must be a multiple of every_n_steps, got {n} and "
            f"{every_n_steps}; "
            f"e.g. {n - n % every_n_steps + every_n_steps}"
        )
