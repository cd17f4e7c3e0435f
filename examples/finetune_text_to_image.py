"""Fine-tune a text-to-image pipeline of diffusers on any schedule and prediction type, with
accelerate: Stable Diffusion 1.x, 2.x, XL and 3.x, the whole network or a LoRA.

    accelerate launch examples/finetune_text_to_image.py \
        --pretrained_model_name_or_path path/or/hub-id --train_data_dir folder/with/metadata.jsonl \
        --prediction_type v_prediction --rescale_betas_zero_snr --output_dir runs/finetune

The schedule starts from the pipeline's own scheduler_config.json; what the flags say replaces it.
It is the same object in the loss, in the previews and in the saved pipeline, which
``DiffusionPipeline.from_pretrained`` loads with that scheduler. ``--rank N`` trains LoRA matrices
of that rank; the file says its schedule, and the call that loads it with its scheduler is printed.
A folder that holds a run is gone on with (``--resume_from_checkpoint latest``), or replaced
(``--overwrite_output_dir``), and never taken for an empty one.

All randomness (order of the data, crops, flips, empty captions, encoder, noise, timesteps) is a
function of the seed and of the position of an image in the run. So a run that was killed goes on to
the same losses, on any number of processes with the same number of images in a step. Dropout alone
depends on the batches of each process: it repeats on the same number of processes. A stream
(``--streaming``) has no index: a resumed run reads it again up to its position, without decoding.
The flags have the names of diffusers' scripts. ``--num_train_epochs`` counts passes over the data;
an optimizer step may hold images of two of them.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

try:
    import datasets
    from accelerate import Accelerator, DistributedType
    from accelerate.utils import set_seed
except ImportError as error:
    raise ImportError("this example needs more: pip install 'alphabar[finetune]'") from error
import huggingface_hub
import torch
from diffusers.optimization import get_scheduler
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset
from tqdm import tqdm

from alphabar.noising import Noising
from alphabar.noising.utils.atomic import require_writable, write_atomically
from alphabar.noising.utils.rng import Draws, mix, stream_of
from alphabar.sampling import Sampler
from alphabar.training import ModelEMA, Previews, add_noising_arguments, noising_from_arguments
from alphabar.training.diffusers_text_to_image import LORA_NAME, TextToImage, family_of, index_of
from alphabar.training.images import cropped
from alphabar.training.loops.objective import Objective
from alphabar.training.loops.positions import Positions, Shuffled, at_positions
from alphabar.training.loops.run_folder import RunFolder
from alphabar.training.model_card import loading_code, model_card

_DTYPES = {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
PROJECT = "finetune_text_to_image"  # in the trackers

FLAGS: dict[str, list[tuple[str, Any, Any, str]]] = {
    "model": [
        ("pretrained_model_name_or_path", str, ..., "a pipeline: a folder or a name on the hub"),
        ("revision", str, None, "revision of the pipeline on the hub"),
        ("variant", str, None, "variant of its files, e.g. fp16"),
        ("rank", int, 0, "train LoRA matrices of this rank; 0: the whole network"),
        ("lora_alpha", float, None, "scale of the LoRA is alpha / rank; none: the rank"),
        ("lora_dropout", float, 0.0, "dropout in the LoRA's layers"),
        ("lora_layers", str, None, "layers of the LoRA, with commas; none: the attention"),
        ("use_ema", bool, False, "keep an average of the weights, preview and save it"),
        ("gradient_checkpointing", bool, False, "save memory by computing activations again"),
        ("mixed_precision", sorted(_DTYPES), "no", "precision of the network's operations"),
        ("allow_tf32", bool, False, "allow TF32 in the matrix products of a GPU"),
    ],
    "data": [
        ("train_data_dir", str, None, "a folder of images, captions in its metadata.jsonl"),
        ("dataset_name", str, None, "a dataset of the hub, or what datasets.load_dataset reads"),
        ("dataset_config_name", str, None, "configuration of that dataset"),
        ("streaming", bool, False, "read the data as it comes, without a download"),
        ("shuffle_buffer_size", int, 1000, "images among which a stream is shuffled; 0: not"),
        ("image_column", str, "image", "column of the images"),
        ("caption_column", str, "text", "column of the captions (a list: one is drawn)"),
        ("max_train_samples", int, None, "train on this many of the images"),
        ("proportion_empty_prompts", float, 0.0, "share of captions left empty, for guidance"),
        ("resolution", int, 512, "size of the training images"),
        ("center_crop", bool, False, "crop the centre instead of a random place"),
        ("random_flip", bool, False, "flip half of the images"),
        ("dataloader_num_workers", int, 0, "processes that read images"),
    ],
    "training": [
        ("seed", int, 0, "seed of the data's order, crops, noise"),
        ("train_batch_size", int, 4, "images on each process"),
        ("gradient_accumulation_steps", int, 1, "batches in one optimizer step"),
        ("num_train_epochs", int, 100, "passes over the data"),
        ("max_train_steps", int, None, "optimizer steps, in place of --num_train_epochs"),
        ("learning_rate", float, 1e-5, "of AdamW"),
        ("scale_lr", bool, False, "multiply it by the number of images in a step"),
        ("lr_scheduler", str, "constant_with_warmup", "a name of diffusers.optimization"),
        ("lr_warmup_steps", int, 100, "optimizer steps of warm-up"),
        ("use_8bit_adam", bool, False, "AdamW of bitsandbytes, with states of 8 bits"),
        ("adam_beta1", float, 0.9, "decay of AdamW's mean"),
        ("adam_beta2", float, 0.999, "decay of AdamW's mean square"),
        ("adam_weight_decay", float, 1e-2, "weight decay of AdamW"),
        ("adam_epsilon", float, 1e-8, "epsilon of AdamW"),
        ("max_grad_norm", float, 1.0, "gradients are clipped to this norm"),
    ],
    "previews": [
        ("validation_prompts", list, [], "prompts that are previewed"),
        ("num_validation_images", int, None, "images of a preview; none: one for each prompt"),
        ("validation_steps", int, 500, "optimizer steps between previews"),
        ("validation_sampler", str, "DPM++ 2M", "sampler of the previews"),
        ("num_inference_steps", int, 25, "its steps"),
        ("guidance_scale", float, 7.5, "of the previews"),
        ("guidance_rescale", float, 0.7, "of the previews, 2305.08891 eq. 16"),
    ],
    "output": [
        ("output_dir", str, "runs/finetune", "where everything is written"),
        ("overwrite_output_dir", bool, False, "begin anew where it holds another run"),
        ("checkpointing_steps", int, 500, "optimizer steps between checkpoints"),
        ("checkpoints_total_limit", int, 2, "checkpoints that are kept; 0: all"),
        ("resume_from_checkpoint", str, None, "'latest', or a checkpoint of this run"),
        ("report_to", str, None, "trackers of accelerate: tensorboard, wandb, all"),
        ("push_to_hub", bool, False, "upload the result, with a model card"),
        ("hub_model_id", str, None, "repository on the hub; none: the name of --output_dir"),
        ("hub_token", str, None, "token of the hub; none: that of huggingface-cli login"),
        ("hub_private_repo", bool, False, "make the repository private"),
    ],
}


class _Help(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Prose as it stands, and the default of each flag."""


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=_Help)
    for title, flags in FLAGS.items():
        group = parser.add_argument_group(title)
        for name, kind, default, words in flags:
            options: dict[str, Any] = {"type": kind, "default": default}
            if kind is bool:
                options = {"action": "store_true"}
            elif kind is list:
                options = {"nargs": "*", "default": default}
            elif isinstance(kind, list):
                options = {"choices": kind, "default": default}
            if default is ...:
                options |= {"required": True, "default": None}
            group.add_argument(f"--{name}", help=words, **options)
    return add_noising_arguments(parser).parse_args(arguments)


# -- what is checked before any model is loaded ----------------------------------------------------


@dataclass(frozen=True)
class Plan:
    """What a run is, settled before any model is loaded."""

    args: argparse.Namespace
    noising: Noising
    sampler: Sampler
    folder: RunFolder
    optimizer: Any


_TIMES = ("timestep_density", "weighting_scheme", "timestep_sampling", "p_mean", "p_std")


def settle(args: argparse.Namespace) -> Plan:
    sizes = ("resolution", "train_batch_size", "gradient_accumulation_steps", "validation_steps")
    sizes += ("num_validation_images", "num_inference_steps")
    lengths = ("max_train_steps", "num_train_epochs", "max_train_samples", "checkpointing_steps")
    for name in (*sizes, *lengths):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            raise ValueError(f"--{name} must be at least 1, got {getattr(args, name)}")
    source, output = args.pretrained_model_name_or_path, Path(args.output_dir)
    lora = (args.lora_alpha, args.lora_layers, args.lora_dropout)
    if not 0 <= args.proportion_empty_prompts <= 1:
        raise ValueError("--proportion_empty_prompts must lie in 0 ... 1")
    if (args.train_data_dir is None) == (args.dataset_name is None):
        raise ValueError("give one of --train_data_dir and --dataset_name")
    if args.streaming and args.max_train_steps is None:
        raise ValueError("--streaming needs --max_train_steps: a stream does not say its length")
    if args.streaming and args.dataloader_num_workers > 1:
        raise ValueError("--streaming reads one stream: give --dataloader_num_workers 0 or 1")
    if any(lora) and not args.rank:
        raise ValueError("--lora_alpha, --lora_layers and --lora_dropout need --rank")
    if output.resolve() == Path(source).resolve():
        raise ValueError(f"--output_dir {args.output_dir!r} is the pipeline that is trained from")
    folder = RunFolder(output, ("model_index.json", LORA_NAME), ("previews/*",))
    folder.require_unused(args.resume_from_checkpoint, args.overwrite_output_dir)
    family = family_of(index_of(source, revision=args.revision)["_class_name"])
    if all(getattr(args, name) is None for name in _TIMES):
        vars(args).update(family.flags)
    noising = noising_from_arguments(args)
    # a schedule that the saved pipeline could not hold is refused here
    noising.schedule.scheduler_config()
    sampler = Sampler(noising.schedule, args.validation_sampler, steps=args.num_inference_steps)
    optimizer = optimizer_class(args.use_8bit_adam)
    require_writable(output)
    return Plan(args, noising, sampler, folder, optimizer)


def optimizer_class(of_8_bits: bool) -> Any:
    if not of_8_bits:
        return torch.optim.AdamW
    try:
        import bitsandbytes  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise ImportError("--use_8bit_adam needs bitsandbytes: pip install bitsandbytes") from error
    return bitsandbytes.optim.AdamW8bit


# -- data ------------------------------------------------------------------------------------------


class Captioned(Dataset[dict[str, Any]]):
    """Images and captions: item i is what the run sees at position i."""

    def __init__(self, args: argparse.Namespace) -> None:
        source: dict[str, Any] = {"path": args.dataset_name, "name": args.dataset_config_name}
        if args.train_data_dir:
            source = {"path": "imagefolder", "data_dir": args.train_data_dir}
        rows: Any = datasets.load_dataset(**source, split="train", streaming=args.streaming)
        names = rows.column_names or list(next(iter(rows)))
        for column in (args.image_column, args.caption_column):
            if column not in names:
                raise ValueError(
                    f"the data has the columns {names}, not {column!r}; name them with "
                    "--image_column and --caption_column (a folder's captions stand in "
                    'metadata.jsonl: {"file_name": ..., "text": ...})'
                )
        limit = args.max_train_samples
        if args.streaming:
            rows = rows.decode(False) if limit is None else rows.decode(False).take(limit)
            if args.shuffle_buffer_size:
                rows = rows.shuffle(args.seed, buffer_size=args.shuffle_buffer_size)
        else:
            if limit is not None and limit < len(rows):
                rows = rows.shuffle(args.seed).select(range(limit))
            self.order = Shuffled(len(rows), args.seed)
        self.args, self.rows = args, rows

    def __getitem__(self, position: int) -> dict[str, Any]:
        return self.prepared(position, self.rows[self.order[position][1]])

    def prepared(self, position: int, row: dict[str, Any]) -> dict[str, Any]:
        """Return the image, cropped and flipped, and the caption of a row."""
        args, image = self.args, row[self.args.image_column]
        captions = row[args.caption_column]
        if isinstance(image, dict):  # of a stream, which does not decode what it passes over
            image = datasets.Image().decode_example(cast(Any, image))
        draws = Draws(args.seed, [position], step=0, stream=stream_of("data"))
        left, top, flip, empty, which = draws.uniform(5)[0].tolist()
        if isinstance(captions, list):
            captions = captions[int(which * len(captions))]
        place = {} if args.center_crop else {"left": left, "top": top}
        flipped = args.random_flip and flip < 0.5
        pixels, sizes = cropped(cast(Any, image), args.resolution, **place, flip=flipped)
        caption = "" if empty < args.proportion_empty_prompts else str(captions)
        shown = {"pixels": pixels, "sizes": torch.tensor(sizes), "caption": caption}
        return {"position": position, **shown}


class Stream(IterableDataset[dict[str, Any]]):
    """The samples of a stream at the positions of these batches."""

    def __init__(self, data: Captioned, batches: Iterable[list[int]]) -> None:
        self.data, self.wanted = data, [position for batch in batches for position in batch]

    def _rows(self, epoch: int) -> Any:
        self.data.rows.set_epoch(epoch)
        return self.data.rows

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for position, row in at_positions(self._rows, self.wanted):
            yield self.data.prepared(position, row)


# -- the run ---------------------------------------------------------------------------------------


class Run:
    """One training run: the loop, its previews and its files."""

    def __init__(self, plan: Plan, accelerator: Accelerator) -> None:
        args = plan.args
        self.plan, self.args, self.accelerator = plan, args, accelerator
        self.positions = Positions(
            args.train_batch_size,
            args.gradient_accumulation_steps,
            accelerator.num_processes,
            accelerator.process_index,
        )
        self.data, total = Captioned(args), self.positions.total
        self.step, self.steps = 0, args.max_train_steps
        if self.steps is None:
            self.steps = math.ceil(args.num_train_epochs * self.data.order.samples / total)
        lora = {"r": args.rank, "lora_alpha": args.lora_alpha or args.rank}
        lora["lora_dropout"] = args.lora_dropout
        if args.lora_layers:
            lora["target_modules"] = args.lora_layers.split(",")
        self.model = TextToImage(
            args.pretrained_model_name_or_path,
            args.resolution,
            accelerator.device,
            _DTYPES[args.mixed_precision],
            lora=lora if args.rank else None,
            revision=args.revision,
            variant=args.variant,
        )
        if args.gradient_checkpointing:
            self.model.network.enable_gradient_checkpointing()
        objective = Objective(self.model.denoiser, plan.noising)
        self.learned = objective.learned()
        optimizer = plan.optimizer(
            objective.parameter_groups(),
            lr=args.learning_rate * (total if args.scale_lr else 1),
            betas=(args.adam_beta1, args.adam_beta2),
            weight_decay=args.adam_weight_decay,
            eps=args.adam_epsilon,
        )
        self.objective, self.optimizer = accelerator.prepare(objective, optimizer)
        self.rates = get_scheduler(
            args.lr_scheduler,
            self.optimizer,
            num_warmup_steps=args.lr_warmup_steps,
            num_training_steps=self.steps,
        )
        self.ema = ModelEMA(self.objective, "inverse_gamma") if args.use_ema else None
        self.average = self.ema.average if self.ema is not None else None
        self.previews = self._previews() if args.validation_prompts else None

    def _stateful(self) -> dict[str, Any]:
        parts = {
            "optimizer": self.optimizer.optimizer,
            "lr_scheduler": self.rates,
            "scaler": self.accelerator.scaler,
            "average": self.ema,
        }
        return {name: part for name, part in parts.items() if part is not None}

    def _same(self) -> dict[str, Any]:
        # a stream is shuffled otherwise in a worker
        workers = self.args.dataloader_num_workers if self.args.streaming else 0
        average = self.ema is not None
        seeds = [self.args.seed, self.plan.noising.seed]
        same = {"images in a step": self.positions.total, "average": average, "workers": workers}
        return {**same, "seeds": seeds, "samples": self.args.max_train_samples}

    def save(self) -> None:
        """Write where we are as one file on one process; every process calls it."""
        if self.accelerator.is_main_process:
            parts = {name: part.state_dict() for name, part in self._stateful().items()}
            objective = self.accelerator.unwrap_model(self.objective).trained_state()
            self.plan.folder.save(
                self.step,
                {"objective": objective, "state": parts, **self._same()},
                self.plan.noising.schedule,
                keep=self.args.checkpoints_total_limit,
            )
        self.accelerator.wait_for_everyone()

    def load(self, path: Path) -> None:
        parts = self.plan.folder.load(path, self.plan.noising.schedule, **self._same())
        objective = self.accelerator.unwrap_model(self.objective)
        objective.load_state_dict(parts["objective"], strict=False)
        for name, part in self._stateful().items():
            part.load_state_dict(parts["state"][name])
        self.step = parts["step"]
        self.accelerator.print(f"going on from {str(path)!r} at step {self.step}")

    # -- training ----------------------------------------------------------------------------------

    def _loader(self) -> Iterable[dict[str, Any]]:
        """Return this process's batches from this step on."""
        batches = self.positions.batches(self.step, self.steps)
        workers = self.args.dataloader_num_workers
        if self.args.streaming:
            stream = Stream(self.data, batches)
            return DataLoader(stream, self.positions.batch, num_workers=workers)
        return DataLoader(self.data, batch_sampler=cast(Any, batches), num_workers=workers)

    def train(self) -> None:
        """Train to the last step, with checkpoints and previews on the way."""
        if self.accelerator.is_main_process:
            aside = self.plan.folder.set_aside(self.step)
            if aside:
                print("later checkpoints are set aside:", ", ".join(path.name for path in aside))
        if self.previews is not None and self.step < self.steps:
            self.previews.try_out(self.model.denoiser, ema=self.average)
        quiet, losses = not self.accelerator.is_main_process, []
        with tqdm(total=self.steps, initial=self.step, disable=quiet) as bar:
            for batch in self._loader():
                with self.accelerator.accumulate(self.objective):
                    losses.append(self._learn(batch).detach())
                if self.accelerator.sync_gradients:
                    self._after_step(torch.stack(losses).mean(), bar)
                    losses = []

    def _learn(self, batch: dict[str, Any]) -> Tensor:
        position, total = batch["position"], self.positions.total
        index = (position - self.step * total).tolist()
        # dropout draws from torch's own generator
        torch.manual_seed(mix(self.args.seed, int(position[0])))
        options = {"step": 0, "stream": stream_of("vae"), "device": self.accelerator.device}
        latents = self.model.latents(
            batch["pixels"], Draws(self.args.seed, position, **options).normal
        )
        conditioning = self.model.conditioning(batch["caption"], batch["sizes"])
        loss = self.objective(latents, conditioning, step=self.step, index=index, total=total)
        self.accelerator.backward(loss)
        if self.accelerator.sync_gradients:
            self.accelerator.clip_grad_norm_(self.learned, self.args.max_grad_norm)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss

    def _after_step(self, loss: Tensor, bar: tqdm[Any]) -> None:
        rate = float(self.rates.get_last_lr()[0])  # of the step that is done
        self.rates.step()
        self.step += 1
        if self.ema is not None:
            self.ema.update(self.step)
        value = float(cast(Tensor, self.accelerator.reduce(loss, "mean")))
        self.accelerator.log({"train_loss": value, "lr": rate}, step=self.step)
        bar.update()
        bar.set_postfix(loss=f"{value:.4f}")
        if self.accelerator.is_main_process:
            self.plan.folder.log(self.step, loss=value, lr=rate)
        last = self.step == self.steps
        if self.step % self.args.checkpointing_steps == 0 or last:
            self.save()
        if self.previews is not None and (self.step % self.args.validation_steps == 0 or last):
            self.previews(self.model.denoiser, step=self.step, ema=self.average)

    # -- previews and the result -------------------------------------------------------------------

    def _previews(self) -> Previews:
        args = self.args
        return Previews(
            self.plan.sampler,
            schedule=self.plan.noising,
            shape=self.model.latent_shape,
            loop=self.accelerator,
            prompts=args.validation_prompts,
            num_images=args.num_validation_images,
            encode=self.model.conditioning,
            decode=self.model.decode,
            guidance_scale=args.guidance_scale,
            guidance_rescale=args.guidance_rescale,
            seed=args.seed,
            folder=self.plan.folder.path / "previews",
        )

    def facts(self) -> dict[str, str]:
        """Return what is trained on what, for the first lines and for the model card."""
        args, positions, noising = self.args, self.positions, self.plan.noising
        learned = sum(parameter.numel() for parameter in self.learned)
        what = f"a LoRA of rank {args.rank} in" if args.rank else "all of"
        images = None if args.streaming else self.data.order.samples
        passes = images and f", {self.steps * positions.total / images:.3g} epochs"
        return {
            "base model": f"{self.model.source} ({type(self.model.pipeline).__name__})",
            "trained": f"{what} the {self.model.family.network}, {learned:,} parameters",
            "data": f"{args.dataset_name or args.train_data_dir}, {images or 'a stream of'} images",
            "batch": f"{positions.total} images: {positions.batch} on each of "
            f"{positions.world_size} processes, accumulated {positions.accumulate} times",
            "steps": f"{self.steps}{passes or ''}",
            "noising": f"{noising.timesteps}, {noising.weighting}",
        }

    def announce(self) -> None:
        args, result = self.args, LORA_NAME if self.args.rank else "the pipeline"
        previews = f"previews every {args.validation_steps}" if self.previews else "no previews"
        plans = (
            f"a checkpoint every {args.checkpointing_steps} steps, {previews}, {result} at the end"
        )
        shown = self.facts() | {"schedule": str(self.plan.noising.schedule)}
        shown |= {"output": f"{self.plan.folder.path}: {plans}", "trackers": str(args.report_to)}
        for name, value in shown.items():
            self.accelerator.print(f"{name:<10} {value}")

    def save_result(self) -> None:
        """Write what diffusers loads, and a model card; upload them."""
        args, output, schedule = self.args, self.plan.folder.path, self.plan.noising.schedule
        with nullcontext() if self.average is None else self.average():
            result = self.model.save(output, schedule)
        base, pushed = args.pretrained_model_name_or_path, args.push_to_hub
        of_lora = base if args.rank else None
        source = args.hub_model_id if pushed else str(output)
        card = model_card(
            schedule,
            Path(source).name,
            loading_code(schedule, source, of_lora, self.model.absent),
            base_model=None if Path(base).exists() else base,
            tags=["lora"] if args.rank else [],
            facts=self.facts(),
            images=[f"previews/{x.name}" for x in sorted(output.glob("previews/step_*.png"))[-1:]],
        )
        write_atomically(output / "README.md", card)
        if pushed:
            huggingface_hub.upload_folder(
                repo_id=source,
                folder_path=output,
                commit_message=f"Trained to step {self.step}",
                ignore_patterns=["checkpoint-*", "replaced-*", "*.partial", f"{PROJECT}/*"],
                token=args.hub_token,
            )
        kept = [path.name for path in self.plan.folder.checkpoints]
        saved = [result.name, "scheduler/", "README.md", "losses.jsonl", *kept]
        saved += ["previews/index.html"] if self.previews else []
        print(f"\nsaved in {output}: {', '.join(saved)}")
        print(f"uploaded to https://huggingface.co/{source}" if pushed else "")
        print("The LoRA needs the scheduler beside it.\n" if args.rank else "")
        print(loading_code(schedule, output, of_lora, self.model.absent))


def main(arguments: Sequence[str] | None = None) -> Path:
    args = parse(arguments)
    plan = settle(args)
    checkpoint = plan.folder.find(args.resume_from_checkpoint)
    if args.allow_tf32:
        torch.backends.cuda.matmul.allow_tf32 = True
    accelerator = Accelerator(
        mixed_precision=args.mixed_precision,
        gradient_accumulation_steps=args.gradient_accumulation_steps,
        log_with=args.report_to.split(",") if args.report_to else None,
        project_dir=str(plan.folder.path),
        step_scheduler_with_optimizer=False,
    )
    kind, main = accelerator.distributed_type, accelerator.is_main_process
    if kind not in (DistributedType.NO, DistributedType.MULTI_GPU, DistributedType.MULTI_CPU):
        raise ValueError(f"this script trains on one process or with DDP, not with {kind}")
    if args.push_to_hub and main:  # a wrong token ends it here
        args.hub_model_id = huggingface_hub.create_repo(
            args.hub_model_id or plan.folder.path.name,
            exist_ok=True,
            private=args.hub_private_repo,
            token=args.hub_token,
        ).repo_id
    set_seed(args.seed)  # of the LoRA's first weights; training draws from counters
    plain = {k: v for k, v in vars(args).items() if isinstance(v, int | float | str)}
    accelerator.init_trackers(PROJECT, plain | {"hub_token": ""})
    if args.overwrite_output_dir and main:
        plan.folder.clear()
    run = Run(plan, accelerator)
    if checkpoint is not None:
        run.load(checkpoint)
    elif args.resume_from_checkpoint is not None:
        accelerator.print(f"no checkpoint in {args.output_dir!r}: training begins at step 0")
    accelerator.wait_for_everyone()  # all have read the checkpoint, or found none
    run.announce()
    run.train()
    if run.previews is not None:
        run.previews.close()
    accelerator.end_training()
    if main:
        run.save_result()
    return plan.folder.path


if __name__ == "__main__":
    main()
