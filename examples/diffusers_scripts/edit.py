"""Put alphabar into a training script of diffusers or kohya: print the diff, to be read and applied.

    python examples/diffusers_scripts/edit.py diffusers/examples/text_to_image/train_text_to_image.py > alphabar.diff
    patch diffusers/examples/text_to_image/train_text_to_image.py < alphabar.diff

An edit finds its place by a few words of the script, not by line numbers, so that it holds over versions of the script; where a
place is not found, nothing is printed and the exit code is 1. Known: train_text_to_image.py, train_text_to_image_lora.py,
train_unconditional.py, train_dreambooth_sd3.py of diffusers; train_network.py, sdxl_train_network.py, flux_train_network.py of
sd-scripts, of which the last two need the first edited as well. Other scripts of diffusers have the same places: copy the edits of the
nearest one.
"""

from __future__ import annotations

import argparse
import difflib
import sys
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Edit:
    """Lines of ours before the first line that holds ``at``, or in the place of all from it to the one that holds ``until``.

    ``instead``: the words that stand for ``at`` inside its line, which is kept. ``after``: below that line, not before it.
    """

    at: str
    text: str = ""
    until: str | None = None
    instead: str | None = None
    after: bool = False


_IMPORT = Edit(
    "check_min_version(",
    "\nfrom alphabar.training import add_noising_arguments, diffusers_scheduler, noising_from_arguments\n",
    after=True,
)
_STEP = "step=global_step, micro_batch=step % args.gradient_accumulation_steps, accumulate=args.gradient_accumulation_steps"
_PARSE = Edit(
    "args = parser.parse_args()", instead="args = add_noising_arguments(parser).parse_args()"
)

_PREVIEW = Edit(
    "pipeline = pipeline.to(accelerator.device)",
    "pipeline.scheduler = diffusers_scheduler(noising_from_arguments(args).schedule, like=pipeline.scheduler)\n",
)
_TEXT_TO_IMAGE = (
    _IMPORT,
    _PARSE,
    Edit(
        "noise_scheduler = DDPMScheduler.from_pretrained(",
        "noising = noising_from_arguments(args)\n",
    ),
    _PREVIEW,
    Edit(
        "# Sample noise that we'll add",
        f"noised = noising(latents, {_STEP})\n\n",
        until="# Get the text embedding",
    ),
    Edit(
        "# Get the target for loss depending",
        "loss = noised.loss(unet(noised.x, noised.timesteps, encoder_hidden_states))\n\n",
        until="# Gather the losses across all processes",
    ),
)
_SAVED_PIPELINE = Edit(
    "pipeline.save_pretrained(args.output_dir)",
    "pipeline.scheduler = diffusers_scheduler(noising.schedule, like=pipeline.scheduler)\n",
)

_PARSE_KOHYA = Edit(
    "parser = setup_parser()", instead="parser = add_noising_arguments(setup_parser())"
)
_RETURNED = "target, timesteps, noised"

EDITS: dict[str, tuple[Edit, ...]] = {
    "train_network.py": (
        Edit(
            "class NetworkTrainer:",
            """\
            from alphabar.noising import Noised, NoiseSchedule
            from alphabar.training import add_noising_arguments, noising_from_arguments, write_markers


            """,
        ),
        _PARSE_KOHYA,
        Edit(
            "tokenize_strategy = self.get_tokenize_strategy(args)",
            """\
            scheduler = self.get_noise_scheduler(args, torch.device("cpu"))
            base = NoiseSchedule.from_diffusers({"_class_name": type(scheduler).__name__, **scheduler.config})
            self.noising = noising_from_arguments(args, base)
            # the previews and the metadata of the file read this one
            args.v_parameterization = self.noising.schedule.prediction.name == "v_prediction"

            """,
        ),
        Edit(
            "def get_noise_pred_and_target(",
            """\
            def noised(self, args, latents, is_train):
                if is_train:
                    return self.noising(latents, **self.position)
                # validation, at a timestep of the script's, with noise of the generator that it seeds
                curve = self.noising.schedule.curve
                timesteps = torch.full(latents.shape[:1], int(args.max_timestep), device=latents.device)
                if not curve.is_discrete:
                    timesteps = curve.time_at_noise_level(timesteps.double() / curve.num_train_timesteps)
                return self.noising.at(latents, timesteps, torch.randn_like(latents))

            """,
        ),
        Edit(
            "noise, noisy_latents, timesteps = train_util.get_noise_noisy_latents_and_timesteps(",
            """\
            noised = self.noised(args, latents, is_train)
            noisy_latents, timesteps = noised.x, noised.timesteps

            """,
            until="# ensure the hidden state will require grad",
        ),
        Edit(
            "if args.v_parameterization:",
            "target = noised.target\n\n",
            until="# differential output preservation",
        ),
        Edit("target, timesteps, None", instead=_RETURNED),
        Edit(
            "huber_c = train_util.get_huber_threshold_if_needed(",
            """\
            if not isinstance(weighting, Noised):
                raise TypeError(f"{type(self).__name__} draws its own noise: put alphabar into its script as well")
            mask = None
            if args.masked_loss or batch.get("alpha_masks") is not None:
                mask = apply_masked_loss(torch.ones_like(target), batch).clamp(0, 1)
            loss = weighting.losses(noise_pred, mask) * batch["loss_weights"]

            """,
            until="return loss.mean()",
        ),
        Edit(
            "loss = self.process_batch(",
            # no number of the micro-batch: a run that skips to its first step counts from there
            "self.position = dict(step=global_step, accumulate=args.gradient_accumulation_steps)\n",
        ),
        Edit(
            "if args.huggingface_repo_id is not None:",
            """\
            self.noising.schedule.save_pretrained(os.path.splitext(ckpt_file)[0] + ".scheduler")
            if ckpt_file.endswith(".safetensors"):
                write_markers(ckpt_file, self.noising.schedule, noising=self.noising)
            """,
        ),
    ),
    "sdxl_train_network.py": (
        Edit(
            "class SdxlNetworkTrainer(", "from alphabar.training import add_noising_arguments\n\n\n"
        ),
        _PARSE_KOHYA,
    ),
    "flux_train_network.py": (
        Edit(
            "class FluxNetworkTrainer(",
            """\
            from dataclasses import replace

            from alphabar.noising import token_shift
            from alphabar.training import add_noising_arguments


            """,
        ),
        _PARSE_KOHYA,
        Edit(
            "# Sample noise that we'll add to the latents",
            """\
            if args.timestep_sampling == "flux_shift" and hasattr(self.noising.timesteps, "shift"):
                # by the size of this batch, as in this script
                shift = token_shift((latents.shape[2] // 2) * (latents.shape[3] // 2))
                self.noising.timesteps = replace(self.noising.timesteps, shift=shift)
            noised = self.noised(args, latents, is_train)
            noisy_model_input, timesteps, sigmas = noised.x.to(weight_dtype), noised.timesteps, None
            bsz = latents.shape[0]

            """,
            until="# pack latents and get img_ids",
        ),
        Edit("target = noise - latents", instead="target = noised.target"),
        Edit("target, timesteps, weighting", instead=_RETURNED),
    ),
    "train_text_to_image.py": (*_TEXT_TO_IMAGE, _SAVED_PIPELINE),
    "train_text_to_image_lora.py": (
        *_TEXT_TO_IMAGE,
        Edit(
            "# Final inference",
            """\
            # a LoRA is saved without its pipeline: the schedule of the training lies beside it
            noising.schedule.save_pretrained(os.path.join(args.output_dir, "scheduler"))

            """,
        ),
    ),
    "train_unconditional.py": (
        _IMPORT,
        _PARSE,
        Edit(
            "optimizer = torch.optim.AdamW(",
            """\
            if args.prediction_type == "sample" and args.loss_weighting is None:
                args.loss_weighting = "snr"  # as this script weighs the loss of x_0
            noising = noising_from_arguments(args)
            noise_scheduler = diffusers_scheduler(noising.schedule, like=noise_scheduler)
            """,
        ),
        Edit(
            "# Sample noise that we'll add",
            f"noised = noising(clean_images, {_STEP})\n\n",
            until="with accelerator.accumulate(model):",
        ),
        Edit(
            "# Predict the noise residual",
            "loss = noised.loss(model(noised.x, noised.timesteps))\n\n",
            until="accelerator.backward(loss)",
        ),
    ),
    "train_dreambooth_sd3.py": (
        _IMPORT,
        Edit("if input_args is not None:", "add_noising_arguments(parser)\n"),
        _PREVIEW,
        Edit(
            "noise_scheduler_copy = copy.deepcopy(noise_scheduler)",
            "noising = noising_from_arguments(args)\n",
        ),
        Edit(
            "# Sample noise that we'll add",
            f"""\
            noised = noising(model_input, {_STEP})
            noisy_model_input, timesteps = noised.x, noised.timesteps

            """,
            until="# Predict the noise residual",
        ),
        Edit(
            "# Follow: Section 5 of",
            """\
            losses = noised.losses(model_pred)
            loss = losses.mean()
            if args.with_prior_preservation:
                instance_losses, prior_losses = losses.chunk(2)
                loss = instance_losses.mean() + args.prior_loss_weight * prior_losses.mean()

            """,
            until="accelerator.backward(loss)",
        ),
        _SAVED_PIPELINE,
    ),
}


def edited(source: str, edits: Sequence[Edit]) -> str:
    """Return the script with the edits; ValueError where a place is not found."""
    lines = source.splitlines(keepends=True)
    for edit in edits:
        lines = _with(lines, edit)
    return "".join(lines)


def _with(lines: list[str], edit: Edit) -> list[str]:
    first = _find(lines, edit.at, 0)
    if edit.instead is not None:
        return [*lines[:first], lines[first].replace(edit.at, edit.instead), *lines[first + 1 :]]
    indent = lines[first][: len(lines[first]) - len(lines[first].lstrip())]
    first += edit.after
    last = first if edit.until is None else _find(lines, edit.until, first + 1)
    ours = textwrap.indent(textwrap.dedent(edit.text), indent)
    return [*lines[:first], *ours.splitlines(keepends=True), *lines[last:]]


def _find(lines: list[str], words: str, start: int) -> int:
    found = next((i for i in range(start, len(lines)) if words in lines[i]), None)
    if found is None:
        raise ValueError(
            f"the script has no line with {words!r}; put alphabar's lines in by hand, see EDITS in {Path(__file__).name}"
        )
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("script", type=Path, help=f"one of {', '.join(EDITS)}")
    script = parser.parse_args(arguments).script
    if script.name not in EDITS:
        print(f"no edits are known for {script.name}; known: {', '.join(EDITS)}", file=sys.stderr)
        return 1
    before = script.read_text(encoding="utf-8")
    try:
        after = edited(before, EDITS[script.name])
    except ValueError as error:
        print(f"{script}: {error}", file=sys.stderr)
        return 1
    diff = difflib.unified_diff(
        before.splitlines(True), after.splitlines(True), f"a/{script.name}", f"b/{script.name}"
    )
    sys.stdout.writelines(diff)
    return 0


if __name__ == "__main__":
    sys.exit(main())
