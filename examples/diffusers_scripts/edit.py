"""Put alphabar into a training script of diffusers: print the diff, to be read and applied.

    python examples/diffusers_scripts/edit.py diffusers/examples/text_to_image/train_text_to_image.py > alphabar.diff
    patch diffusers/examples/text_to_image/train_text_to_image.py < alphabar.diff

An edit finds its place by a few words of the script, not by line numbers, so that it holds over versions of diffusers; where a
place is not found, nothing is printed and the exit code is 1. Known: train_text_to_image.py, train_text_to_image_lora.py,
train_unconditional.py, train_dreambooth_sd3.py. Other scripts of diffusers have the same places: copy the edits of the nearest one.
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

EDITS: dict[str, tuple[Edit, ...]] = {
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
