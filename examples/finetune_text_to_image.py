"""Fine-tune a text-to-image pipeline of diffusers on any schedule and prediction type, with
accelerate.

    accelerate launch examples/finetune_text_to_image.py \
        --pretrained_model_name_or_path path/or/hub-id --train_data_dir folder/with/metadata.jsonl \
        --prediction_type v_prediction --rescale_betas_zero_snr --output_dir runs/finetune

The schedule starts from the pipeline's own scheduler_config.json; what the flags say replaces it.
It is the same object in the loss, in the previews and in the saved pipeline, which
``DiffusionPipeline.from_pretrained`` loads with that scheduler. ``--rank N`` trains LoRA matrices
of that rank instead of the whole U-Net; the file says its schedule, and the call that loads it with
its scheduler is printed. A folder that holds a run is gone on with (``--resume_from_checkpoint
latest``), or replaced (``--overwrite_output_dir``), and never taken for an empty one. All
randomness (order of the data, crops, flips, encoder, noise, timesteps) is a function of the seed
and of counters, so a run that was killed goes on to the same losses. Pipelines with one text
encoder and a conditional U-Net (Stable Diffusion 1.x and 2.x and their relatives).
"""

from __future__ import annotations

import argparse
import json
import math
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import datasets
import diffusers
import numpy as np
import torch
from accelerate import Accelerator, DistributedType
from accelerate.utils import DataLoaderConfiguration, set_seed
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel, cast_training_params
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from alphabar.noising import NoiseSchedule, Noising
from alphabar.noising.io.files import CONFIG_NAME
from alphabar.noising.utils.atomic import require_writable, write_atomically
from alphabar.noising.utils.rng import seeded
from alphabar.sampling import Sampler
from alphabar.training import add_noising_arguments, noising_from_arguments, write_markers
from alphabar.training.checkpoints.read import SCHEDULE_KEY, schedule_of
from alphabar.training.images import image_grid, png_bytes, to_pixels

_AUGMENT, _ENCODE, _CAPTION = 101, 102, 103  # streams of the seed, beside those of the noising
_DTYPES = {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
LORA_NAME = "pytorch_lora_weights.safetensors"  # diffusers' own
_LORA_TARGETS = ["to_k", "to_q", "to_v", "to_out.0"]


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add(
        "--pretrained_model_name_or_path",
        required=True,
        help="a diffusers pipeline: a folder or a name on the hub",
    )
    add("--revision", default=None, help="revision of the pipeline on the hub")
    add(
        "--train_data_dir",
        default=None,
        help="a folder of images with a metadata.jsonl that holds their captions",
    )
    add(
        "--dataset_name",
        default=None,
        help="a dataset of the hub, or a folder that datasets.load_dataset reads",
    )
    add("--image_column", default="image", help="column of the images (default: %(default)s)")
    add("--caption_column", default="text", help="column of the captions (default: %(default)s)")
    add(
        "--proportion_empty_prompts",
        type=float,
        default=0.0,
        help="share of captions left empty, for guidance",
    )
    add(
        "--resolution",
        type=int,
        default=512,
        help="size of the training images (default: %(default)s)",
    )
    add("--center_crop", action="store_true", help="crop the centre instead of a random place")
    add("--random_flip", action="store_true", help="flip half of the images")
    add(
        "--output_dir",
        default="runs/finetune",
        help="where everything is written (default: %(default)s)",
    )
    add(
        "--seed",
        type=int,
        default=0,
        help="seed of the data's order, crops, noise (default: %(default)s)",
    )
    add(
        "--train_batch_size",
        type=int,
        default=4,
        help="images on each process (default: %(default)s)",
    )
    add(
        "--gradient_accumulation_steps",
        type=int,
        default=1,
        help="batches in one optimizer step (default: 1)",
    )
    add("--max_train_steps", type=int, default=1000, help="optimizer steps (default: %(default)s)")
    add("--learning_rate", type=float, default=1e-5, help="of AdamW (default: %(default)s)")
    add(
        "--lr_scheduler",
        default="constant_with_warmup",
        help="a name of diffusers.optimization (default: %(default)s)",
    )
    add(
        "--lr_warmup_steps",
        type=int,
        default=100,
        help="optimizer steps of warm-up (default: %(default)s)",
    )
    add(
        "--max_grad_norm",
        type=float,
        default=1.0,
        help="gradients are clipped to this norm (default: %(default)s)",
    )
    add(
        "--rank",
        type=int,
        default=0,
        help="train LoRA matrices of this rank (default: 0, the whole U-Net)",
    )
    add(
        "--use_ema", action="store_true", help="keep an average of the weights, preview and save it"
    )
    add(
        "--gradient_checkpointing",
        action="store_true",
        help="save memory by computing activations again",
    )
    add("--mixed_precision", default="no", choices=sorted(_DTYPES), help="(default: %(default)s)")
    add(
        "--checkpointing_steps",
        type=int,
        default=500,
        help="optimizer steps between checkpoints (default: 500)",
    )
    add(
        "--checkpoints_total_limit",
        type=int,
        default=2,
        help="checkpoints that are kept (default: %(default)s)",
    )
    add(
        "--resume_from_checkpoint",
        default=None,
        help="'latest', or the path of a checkpoint of this run",
    )
    add(
        "--overwrite_output_dir",
        action="store_true",
        help="begin anew where --output_dir holds another run",
    )
    add(
        "--dataloader_num_workers",
        type=int,
        default=0,
        help="processes that read images (default: %(default)s)",
    )
    add("--validation_prompts", nargs="*", default=[], help="prompts that are previewed")
    add(
        "--validation_steps",
        type=int,
        default=500,
        help="optimizer steps between previews (default: %(default)s)",
    )
    add(
        "--validation_sampler",
        default="DPM++ 2M",
        help="sampler of the previews (default: %(default)s)",
    )
    add("--num_inference_steps", type=int, default=25, help="its steps (default: %(default)s)")
    add("--guidance_scale", type=float, default=7.5, help="of the previews (default: %(default)s)")
    add(
        "--guidance_rescale",
        type=float,
        default=0.7,
        help="of the previews, 2305.08891 eq. 16 (default: 0.7)",
    )
    add(
        "--report_to",
        default=None,
        help="trackers of accelerate, e.g. tensorboard or wandb (default: none)",
    )
    return add_noising_arguments(parser).parse_args(arguments)


# -- what is checked before any model is loaded ----------------------------------------------------


@dataclass(frozen=True)
class Plan:
    """What a run is, settled before any model is loaded."""

    args: argparse.Namespace
    noising: Noising
    sampler: Sampler
    output: Path

    @property
    def schedule(self) -> NoiseSchedule:
        return self.noising.schedule


def settle(args: argparse.Namespace) -> Plan:
    for name in (
        "resolution",
        "train_batch_size",
        "gradient_accumulation_steps",
        "max_train_steps",
        "checkpointing_steps",
    ):
        if getattr(args, name) < 1:
            raise ValueError(f"--{name} must be at least 1, got {getattr(args, name)}")
    if not 0 <= args.proportion_empty_prompts <= 1:
        raise ValueError(
            f"--proportion_empty_prompts must lie in 0 ... 1, got {args.proportion_empty_prompts}"
        )
    if (args.train_data_dir is None) == (args.dataset_name is None):
        raise ValueError("give one of --train_data_dir and --dataset_name")
    noising = noising_from_arguments(args, schedule_of_pipeline(args))
    # a schedule that the saved pipeline could not hold is refused here
    noising.schedule.to_diffusers()
    sampler = Sampler(noising.schedule, args.validation_sampler, steps=args.num_inference_steps)
    output = Path(args.output_dir)
    require_unused(args, output)
    require_writable(output)
    return Plan(args, noising, sampler, output)


def require_unused(args: argparse.Namespace, output: Path) -> None:
    """Refuse a folder that holds a run, unless that run is gone on with or is to be replaced."""
    if output.resolve() == Path(args.pretrained_model_name_or_path).resolve():
        raise ValueError(
            f"--output_dir {str(output)!r} is the pipeline that is trained from; give another "
            "folder"
        )
    if args.resume_from_checkpoint and args.overwrite_output_dir:
        raise ValueError(
            "--resume_from_checkpoint goes on with a run, --overwrite_output_dir begins anew; give "
            "one of them"
        )
    found = [path.name for pattern in WRITTEN for path in sorted(output.glob(pattern))]
    if not found or args.overwrite_output_dir:
        return
    resumed = args.resume_from_checkpoint
    if resumed == "latest" and (
        checkpoints(output) or not any((output / name).exists() for name in RESULTS)
    ):
        return
    if resumed not in (None, "latest") and Path(resumed).resolve().parent == output.resolve():
        return
    raise ValueError(
        f"--output_dir {str(output)!r} holds a run already ({', '.join(found[:4])}); go on with it "
        "by "
        "--resume_from_checkpoint latest, give another folder, or replace it by "
        "--overwrite_output_dir"
    )


RESULTS = ("model_index.json", LORA_NAME)
# what tells that a folder holds a run
WRITTEN = ("checkpoint-*.pt", "losses.jsonl", "previews/step_*.png", *RESULTS)


def begin_anew(output: Path) -> None:
    """Remove what an earlier run left that this one would take for its own."""
    for pattern in ("checkpoint-*.pt", "losses.jsonl", "previews/step_*.png"):
        for path in output.glob(pattern):
            path.unlink()


def schedule_of_pipeline(args: argparse.Namespace) -> NoiseSchedule:
    source = args.pretrained_model_name_or_path
    if Path(source).is_dir():
        return NoiseSchedule.from_pretrained(source, subfolder="scheduler")
    config = diffusers.DDPMScheduler.load_config(
        source, subfolder="scheduler", revision=args.revision
    )
    return NoiseSchedule.from_diffusers(config[0] if isinstance(config, tuple) else config)


# -- data ------------------------------------------------------------------------------------------


class Captioned(Dataset[dict[str, Any]]):
    """Images and captions of a dataset; the crop and the flip of an image depend on the seed, the
    epoch and its index alone.
    """

    def __init__(self, args: argparse.Namespace) -> None:
        folder = {"path": "imagefolder", "data_dir": args.train_data_dir}
        self.rows = datasets.load_dataset(
            **folder if args.train_data_dir else {"path": args.dataset_name}, split="train"
        )
        for column in (args.image_column, args.caption_column):
            if column not in self.rows.column_names:
                raise ValueError(
                    f"the data has the columns {self.rows.column_names}, not {column!r}; name them "
                    "with --image_column and "
                    '--caption_column (a folder\'s captions stand in metadata.jsonl: {"file_name": '
                    '..., "text": ...})'
                )
        self.args, self.epoch = args, 0

    def __len__(self) -> int:
        return len(self.rows)

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __getitem__(self, index: int) -> dict[str, Any]:
        row = self.rows[index]
        draws = [self._draw(_AUGMENT, index, k) for k in range(3)]
        empty = self._draw(_CAPTION, index) < self.args.proportion_empty_prompts
        return {
            "pixels": self._pixels(row[self.args.image_column].convert("RGB"), *draws),
            "caption": "" if empty else str(row[self.args.caption_column]),
        }

    def _draw(self, *counters: int) -> float:
        return torch.rand(
            (), generator=seeded(torch.Generator(), self.args.seed, self.epoch, *counters)
        ).item()

    def _pixels(self, image: Image.Image, left: float, top: float, flip: float) -> Tensor:
        size = self.args.resolution
        scale = size / min(image.size)
        image = image.resize(
            (max(size, round(image.width * scale)), max(size, round(image.height * scale))),
            Image.Resampling.LANCZOS,
        )
        if self.args.center_crop:
            left = top = 0.5
        x, y = round(left * (image.width - size)), round(top * (image.height - size))
        pixels = np.array(image.crop((x, y, x + size, y + size)), dtype=np.float32)
        if self.args.random_flip and flip < 0.5:
            pixels = pixels[:, ::-1]
        return torch.from_numpy(pixels / 127.5 - 1).permute(2, 0, 1)


def collate(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    return {
        "pixels": torch.stack([row["pixels"] for row in rows]),
        "captions": [row["caption"] for row in rows],
    }


# -- models ----------------------------------------------------------------------------------------


class Objective(nn.Module):
    """The U-Net with its noising: one module, so that weights that a noising learns are averaged
    over processes as well.
    """

    def __init__(self, unet: nn.Module, noising: Noising) -> None:
        super().__init__()
        self.unet, self.noising = unet, noising

    def forward(
        self, latents: Tensor, text: Tensor, step: int, index: Sequence[int], total: int
    ) -> Tensor:
        noised = self.noising(latents, step=step, index=index, total=total)
        return noised.loss(self.unet(noised.x, noised.timesteps, encoder_hidden_states=text))


def load_pipeline(args: argparse.Namespace, **parts: Any) -> Any:
    return diffusers.DiffusionPipeline.from_pretrained(
        args.pretrained_model_name_or_path, revision=args.revision, **parts
    )


class Models:
    """The pipeline's frozen encoders and the U-Net that is trained."""

    def __init__(self, args: argparse.Namespace, device: torch.device) -> None:
        dtype = _DTYPES[args.mixed_precision]
        of_unet = dtype if args.rank else torch.float32  # weights that are trained stay in float32
        self.pipeline = load_pipeline(args, torch_dtype={"unet": of_unet, "default": dtype})
        lacking = [
            name
            for name in ("unet", "vae", "text_encoder", "tokenizer")
            if getattr(self.pipeline, name, None) is None
        ]
        if lacking or getattr(self.pipeline, "text_encoder_2", None) is not None:
            raise ValueError(
                f"{type(self.pipeline).__name__} cannot be trained here: it must have unet, vae, "
                "tokenizer and one text encoder"
                + (f", and lacks {', '.join(lacking)}" if lacking else "")
            )
        self.device, self.seed = device, args.seed
        self.vae = self.pipeline.vae.requires_grad_(False).eval().to(device)
        self.text_encoder = self.pipeline.text_encoder.requires_grad_(False).eval().to(device)
        self.unet = self.pipeline.unet.train().to(device)
        if args.rank:
            from peft import LoraConfig

            self.unet.requires_grad_(False)
            self.unet.add_adapter(
                LoraConfig(
                    r=args.rank,
                    lora_alpha=args.rank,
                    init_lora_weights="gaussian",
                    target_modules=_LORA_TARGETS,
                )
            )
            cast_training_params(self.unet, torch.float32)
        if args.gradient_checkpointing:
            self.unet.enable_gradient_checkpointing()

    @torch.no_grad()
    def latents(self, pixels: Tensor, step: int, index: Sequence[int]) -> Tensor:
        generators = [seeded(torch.Generator(), self.seed, _ENCODE, step, i) for i in index]
        posterior = self.vae.encode(pixels.to(self.device, self.vae.dtype)).latent_dist
        return posterior.sample(generators).float() * self.vae.config.scaling_factor

    @torch.no_grad()
    def embeddings(self, captions: Sequence[str]) -> Tensor:
        tokenizer = self.pipeline.tokenizer
        tokens = tokenizer(
            list(captions),
            padding="max_length",
            truncation=True,
            max_length=tokenizer.model_max_length,
            return_tensors="pt",
        )
        return self.text_encoder(tokens.input_ids.to(self.device))[0]

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        latents = latents.to(self.vae.dtype) / self.vae.config.scaling_factor
        return torch.cat([self.vae.decode(one[None]).sample.float() for one in latents])

    def latent_shape(self, resolution: int) -> tuple[int, int, int]:
        size = resolution // 2 ** (len(self.vae.config.block_out_channels) - 1)
        return self.unet.config.in_channels, size, size


# -- checkpoints: one file each, complete or absent, and nothing in it is unpickled ----------------


@dataclass
class Place:
    """Where in the run we are: optimizer steps done, epoch, batches of it that were used."""

    step: int = 0
    epoch: int = 0
    batch: int = 0


def trained_state(objective: nn.Module) -> dict[str, Tensor]:
    learned = {name for name, parameter in objective.named_parameters() if parameter.requires_grad}
    # what a noising remembers (loss history, learned weights) belongs to the run as well
    return {
        name: value
        for name, value in objective.state_dict().items()
        if name in learned or name.startswith("noising.")
    }


def checkpoints(output: Path) -> list[Path]:
    return sorted(output.glob("checkpoint-*.pt"))


def save_checkpoint(path: Path, parts: dict[str, Any], keep: int) -> None:
    partial = path.with_suffix(".partial")
    torch.save(parts, partial)
    os.replace(partial, path)
    mine = [old for old in checkpoints(path.parent) if old.name <= path.name]
    for old in mine[:-keep] if keep else []:
        old.unlink()


def set_aside(output: Path, step: int) -> list[Path]:
    """Rename the checkpoints of later steps, which a run that goes on from ``step`` leaves behind;
    return their new names.
    """
    later = [path for path in checkpoints(output) if path.name > f"checkpoint-{step:07d}.pt"]
    return [
        path.replace(path.with_name(path.name.replace("checkpoint", "replaced"))) for path in later
    ]


def find_checkpoint(plan: Plan) -> Path | None:
    wanted = plan.args.resume_from_checkpoint
    if wanted == "latest":
        return max(checkpoints(plan.output), default=None)
    if wanted is not None and not Path(wanted).is_file():
        raise FileNotFoundError(
            f"no checkpoint at {wanted!r}; there are {[str(p) for p in checkpoints(plan.output)]}"
        )
    return Path(wanted) if wanted is not None else None


# -- the run ---------------------------------------------------------------------------------------


class Run:
    """One training run: the loop, its previews and its files."""

    def __init__(self, plan: Plan, accelerator: Accelerator) -> None:
        args = plan.args
        self.plan, self.args, self.accelerator = plan, args, accelerator
        self.data = Captioned(args)
        self.models = Models(args, accelerator.device)
        objective = Objective(self.models.unet, plan.noising)
        learned = [parameter for parameter in objective.parameters() if parameter.requires_grad]
        statistics = list(plan.noising.parameters())  # of the loss: decay would bias them
        kept = set(statistics)
        groups = [
            {"params": [p for p in learned if p not in kept]},
            {"params": statistics, "weight_decay": 0.0},
        ]
        optimizer = torch.optim.AdamW(
            [group for group in groups if group["params"]], lr=args.learning_rate
        )
        loader = DataLoader(
            self.data,
            args.train_batch_size,
            shuffle=True,
            drop_last=len(self.data) >= args.train_batch_size * accelerator.num_processes,
            collate_fn=collate,
            num_workers=args.dataloader_num_workers,
            generator=torch.Generator().manual_seed(args.seed),
        )
        self.objective, self.optimizer, self.loader = accelerator.prepare(
            objective, optimizer, loader
        )
        self.learned = learned
        self.schedule = get_scheduler(
            args.lr_scheduler,
            self.optimizer,
            num_warmup_steps=args.lr_warmup_steps,
            num_training_steps=args.max_train_steps,
        )
        self.ema = EMAModel(learned, use_ema_warmup=True) if args.use_ema else None
        if self.ema is not None:
            self.ema.to(accelerator.device)
        self.place = Place()

    # -- resuming ----------------------------------------------------------------------------------

    def save(self) -> None:
        """Write where we are as one file on one process; every process calls it."""
        if self.accelerator.is_main_process:
            parts = {
                "place": vars(self.place),
                SCHEDULE_KEY: self.plan.schedule.to_config(),
                "objective": trained_state(self.accelerator.unwrap_model(self.objective)),
                "optimizer": self.optimizer.optimizer.state_dict(),
                "lr_scheduler": self.schedule.state_dict(),
                "scaler": self.accelerator.scaler.state_dict()
                if self.accelerator.scaler is not None
                else None,
                "ema": self.ema.state_dict() if self.ema is not None else None,
            }
            path = self.plan.output / f"checkpoint-{self.place.step:07d}.pt"
            save_checkpoint(path, parts, self.args.checkpoints_total_limit)
        self.accelerator.wait_for_everyone()

    def load(self, path: Path) -> None:
        parts = torch.load(path, map_location="cpu", weights_only=True)
        trained = schedule_of(parts, path)
        if trained.fingerprint != self.plan.schedule.fingerprint:
            raise ValueError(
                f"{str(path)!r} was trained on {trained}, and this run is on {self.plan.schedule}; "
                "give the flags of that run"
            )
        if (parts["ema"] is None) != (self.ema is None):
            raise ValueError(
                f"{str(path)!r} was trained {'with' if parts['ema'] else 'without'} --use_ema; do "
                "the same here"
            )
        self.accelerator.unwrap_model(self.objective).load_state_dict(
            parts["objective"], strict=False
        )
        self.optimizer.optimizer.load_state_dict(parts["optimizer"])
        self.schedule.load_state_dict(parts["lr_scheduler"])
        if self.accelerator.scaler is not None:
            self.accelerator.scaler.load_state_dict(parts["scaler"])
        if self.ema is not None:
            self.ema.load_state_dict(parts["ema"])
            self.ema.to(self.accelerator.device)
        self.place = Place(**parts["place"])

    def say_where_it_goes_on(self, path: Path) -> None:
        self.accelerator.print(f"going on from {str(path)!r} at step {self.place.step}")
        self.accelerator.wait_for_everyone()  # all have read it
        aside = (
            set_aside(self.plan.output, self.place.step) if self.accelerator.is_main_process else []
        )
        if aside:
            self.accelerator.print(
                f"later checkpoints are set aside: {', '.join(path.name for path in aside)}"
            )

    # -- training ----------------------------------------------------------------------------------

    def train(self) -> None:
        """Train to --max_train_steps, with checkpoints and previews on the way."""
        self._forget_later_losses()
        bar = tqdm(
            total=self.args.max_train_steps,
            initial=self.place.step,
            disable=not self.accelerator.is_main_process,
        )
        while self.place.step < self.args.max_train_steps:
            micro_batch, losses = 0, []
            for batch in self._batches():
                with self.accelerator.accumulate(self.objective):
                    loss = self._learn(batch, micro_batch)
                losses.append(loss.detach())
                micro_batch, self.place.batch = micro_batch + 1, self.place.batch + 1
                if not self.accelerator.sync_gradients:
                    continue
                self._after_step(torch.stack(losses).mean(), bar)
                micro_batch, losses = 0, []
                if self.place.step == self.args.max_train_steps:
                    break
            else:
                self.place.epoch, self.place.batch = self.place.epoch + 1, 0
        bar.close()

    def _batches(self) -> Iterator[dict[str, Any]]:
        """This epoch's batches that were not used yet."""
        self.data.set_epoch(self.place.epoch)
        self.loader.set_epoch(self.place.epoch)
        done = self.place.batch
        return iter(self.accelerator.skip_first_batches(self.loader, done) if done else self.loader)

    def _learn(self, batch: dict[str, Any], micro_batch: int) -> Tensor:
        step, args, processes = self.place.step, self.args, self.accelerator.num_processes
        # accelerate deals out whole batches; this is the first sample of this one in its optimizer
        # step
        first = (micro_batch * processes + self.accelerator.process_index) * args.train_batch_size
        index = range(first, first + len(batch["pixels"]))
        latents = self.models.latents(batch["pixels"], step, index)
        text = self.models.embeddings(batch["captions"])
        total = args.train_batch_size * processes * args.gradient_accumulation_steps
        loss = self.objective(latents, text, step, index, total)
        self.accelerator.backward(loss)
        if self.accelerator.sync_gradients:
            self.accelerator.clip_grad_norm_(self.learned, self.args.max_grad_norm)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss

    def _after_step(self, loss: Tensor, bar: tqdm[Any]) -> None:
        rate = self.schedule.get_last_lr()[0]  # of the step that is done
        self.schedule.step()
        if self.ema is not None:
            self.ema.step(self.learned)
        self.place.step += 1
        step, args = self.place.step, self.args
        value = float(cast(Tensor, self.accelerator.reduce(loss, "mean")))
        self.accelerator.log({"train_loss": value, "lr": rate}, step=step)
        bar.update()
        bar.set_postfix(loss=f"{value:.4f}")
        if self.accelerator.is_main_process:
            with open(self._losses, "a", encoding="utf-8") as file:
                file.write(json.dumps({"step": step, "loss": value, "lr": rate}) + "\n")
        if step % args.checkpointing_steps == 0 or step == args.max_train_steps:
            self.save()
        if args.validation_prompts and (
            step % args.validation_steps == 0 or step == args.max_train_steps
        ):
            self.preview()

    @property
    def _losses(self) -> Path:
        return self.plan.output / "losses.jsonl"

    def _forget_later_losses(self) -> None:
        """Drop the losses of steps after the checkpoint, which are trained again, and what a kill
        left of a line.
        """
        if self.accelerator.is_main_process and self._losses.is_file():
            lines = [
                line
                for line in self._losses.read_text(encoding="utf-8").splitlines()
                if line.endswith("}")
            ]
            kept = [line for line in lines if json.loads(line)["step"] <= self.place.step]
            write_atomically(self._losses, "".join(f"{line}\n" for line in kept))

    # -- previews and the result -------------------------------------------------------------------

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Put the average in the place of the weights, if there is one, and restore them whatever
        happens.
        """
        if self.ema is None:
            yield
            return
        self.ema.store(self.learned)
        self.ema.copy_to(self.learned)
        try:
            yield
        finally:
            self.ema.restore(self.learned)

    def preview(self) -> None:
        """Draw the prompts, each from its own seed, on all processes, with the sampler of the
        training schedule.
        """
        prompts, count = self.args.validation_prompts, self.accelerator.num_processes
        # the same number on each process; what is drawn twice is dropped
        share = math.ceil(len(prompts) / count)
        mine = [
            min(self.accelerator.process_index * share + k, len(prompts) - 1) for k in range(share)
        ]
        unet, was_training = self.models.unet, self.models.unet.training
        unet.eval()
        try:
            with self.averaged(), self.accelerator.autocast():
                images = [self._draw(prompts[i], seed=self.args.seed + i) for i in mine]
        finally:
            unet.train(was_training)
        pixels = self.accelerator.gather(torch.stack(images))[: len(prompts)]
        if self.accelerator.is_main_process:
            grid = image_grid(pixels.cpu())
            write_atomically(
                self.plan.output / "previews" / f"step_{self.place.step:07d}.png", png_bytes(grid)
            )

    def _draw(self, prompt: str, seed: int) -> Tensor:
        conditioning, unconditional = (
            {"encoder_hidden_states": self.models.embeddings([text])} for text in (prompt, "")
        )
        latents = self.plan.sampler(
            self.models.unet,
            (1, *self.models.latent_shape(self.args.resolution)),
            seeds=[seed],
            conditioning=conditioning,
            unconditional=unconditional,
            guidance_scale=self.args.guidance_scale,
            guidance_rescale=self.args.guidance_rescale,
            device=self.accelerator.device,
        )
        return to_pixels(self.models.decode(latents))[0]

    def save_result(self) -> None:
        """Write what diffusers loads: the whole pipeline, or the LoRA with its scheduler beside it."""
        self.accelerator.wait_for_everyone()
        if not self.accelerator.is_main_process:
            return
        schedule, output = self.plan.schedule, self.plan.output
        folder = schedule.save_pretrained(output / "scheduler")
        name = json.loads((folder / CONFIG_NAME).read_text(encoding="utf-8"))["_class_name"]
        with self.averaged():
            if self.args.rank:
                from peft.utils import get_peft_model_state_dict

                layers = get_peft_model_state_dict(self.models.unet)
                self.models.pipeline.save_lora_weights(output, unet_lora_layers=layers)
                write_markers(output / LORA_NAME, schedule)
                print(self._how_to_load(name))
                return
            scheduler = getattr(diffusers, name).from_pretrained(folder)
            unet = self.accelerator.unwrap_model(self.objective).unet
            # the frozen parts are written as they came, not in the precision of this training
            load_pipeline(self.args, unet=unet, scheduler=scheduler).save_pretrained(output)

    def _how_to_load(self, scheduler: str) -> str:
        base, folder = self.args.pretrained_model_name_or_path, str(self.plan.output)
        return (
            f"\nThe LoRA is trained on {self.plan.schedule}: it needs the scheduler beside it.\n\n"
            f"from diffusers import DiffusionPipeline, {scheduler}\n"
            f'scheduler = {scheduler}.from_pretrained({folder!r}, subfolder="scheduler")\n'
            f"pipeline = DiffusionPipeline.from_pretrained({base!r}, scheduler=scheduler)\n"
            f"pipeline.load_lora_weights({folder!r})\n"
        )


def main(arguments: Sequence[str] | None = None) -> Path:
    args = parse(arguments)
    plan = settle(args)
    checkpoint = find_checkpoint(plan)
    accelerator = Accelerator(
        mixed_precision=args.mixed_precision,
        gradient_accumulation_steps=args.gradient_accumulation_steps,
        dataloader_config=DataLoaderConfiguration(use_seedable_sampler=True, data_seed=args.seed),
        log_with=args.report_to,
        project_dir=str(plan.output),
        step_scheduler_with_optimizer=False,
    )
    if accelerator.distributed_type not in (
        DistributedType.NO,
        DistributedType.MULTI_GPU,
        DistributedType.MULTI_CPU,
    ):
        raise ValueError(
            "this script trains on one process or with DDP, not with "
            f"{accelerator.distributed_type}"
        )
    set_seed(args.seed)  # of the LoRA's first weights; training draws from counters
    accelerator.init_trackers("finetune_text_to_image")
    if args.overwrite_output_dir and accelerator.is_main_process:
        begin_anew(plan.output)
    run = Run(plan, accelerator)
    if checkpoint is not None:
        run.load(checkpoint)
        run.say_where_it_goes_on(checkpoint)
    elif args.resume_from_checkpoint is not None:
        accelerator.print(f"no checkpoint in {str(plan.output)!r}: training begins at step 0")
    run.train()
    run.save_result()
    accelerator.end_training()
    return plan.output


if __name__ == "__main__":
    main()
