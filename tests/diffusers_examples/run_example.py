"""Run an example script of diffusers several times in one process; write what it logs, as JSON.

    python run_example.py PLAN.json RESULT.json

The plan is a list of {"mode", "script", "arguments"}. The modes: ``diffusers`` runs the script as it is;
``alphabar`` puts alphabar's scheduler classes in the place of those of diffusers; ``edited`` runs a script
with alphabar's Noising, which then gets the noise and the timesteps that the script draws by itself.
"""

import json
import runpy
import sys
import traceback
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from unittest.mock import patch

import datasets  # noqa: F401  (imported, as transformers is, before torchvision seems to be there)
import diffusers
import numpy as np
import peft  # noqa: F401
import torch
import torchvision_transforms
import transformers
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import set_seed
from torch.utils.tensorboard import SummaryWriter

from alphabar.noising import Noising
from alphabar.noising.noise import Chain
from alphabar.sampling import schedulers as drop_ins

CLASSES = ("DDPMScheduler", "DDIMScheduler", "PNDMScheduler")  # of training and of the previews
_own_at = Noising.at


def offer_torchvision():
    """Let ``from torchvision import transforms`` find the stand-in where torchvision is not installed."""
    transformers.utils.is_torchvision_available()  # remembers that it is not there
    if find_spec("torchvision") is None:
        module = ModuleType("torchvision")
        module.__spec__ = ModuleSpec("torchvision", None)
        module.transforms = torchvision_transforms
        sys.modules |= {"torchvision": module, "torchvision.transforms": torchvision_transforms}


def at_the_draws_of_the_script(self, x0, t, noise, parts=()):
    """Noise a batch with what the script draws, from the global generator in its order."""
    noise = torch.randn_like(x0)
    if isinstance(self.noise, Chain):  # of kinds that have a strength: offset and perturbation
        likes = (x0 if part.shape == x0.shape else torch.empty_like(part) for part in parts)
        draws = [torch.randn_like(like) for like in likes]
        parts = [kind.strength * one for kind, one in zip(self.noise.kinds, draws, strict=True)]
    t = torch.randint(0, self.schedule.num_train_timesteps, t.shape, device=t.device)
    return _own_at(self, x0, t, noise, parts)


def run(mode, script, arguments):
    """Run a script; return what it logs, and how often the scheduler or Noising of the mode noises."""
    result = {"losses": [], "images": [], "noised": 0, "error": None}
    log, add_images = Accelerator.log, SummaryWriter.add_images
    classes = {
        name: getattr(drop_ins if mode == "alphabar" else diffusers, name) for name in CLASSES
    }
    scheduler = classes["DDPMScheduler"]
    owner, name = (Noising, "at") if mode == "edited" else (scheduler, "add_noise")
    noise = at_the_draws_of_the_script if mode == "edited" else scheduler.add_noise

    def seen(self, values, *more, **options):
        result["losses"].append(values["loss" if "loss" in values else "train_loss"])
        return log(self, values, *more, **options)

    def looked_at(self, tag, images, *more, **options):
        result["images"].append(np.asarray(images, np.int64).ravel().tolist())
        return add_images(self, tag, images, *more, **options)

    def counted(*arguments, **options):
        result["noised"] += 1
        return noise(*arguments, **options)

    AcceleratorState._reset_state(reset_partial_state=True)
    set_seed(0)
    with (
        patch.object(Accelerator, "log", seen),
        patch.object(SummaryWriter, "add_images", looked_at),
        patch.multiple(diffusers, **classes),
        patch.object(owner, name, counted),
        patch.object(sys, "argv", [script, *arguments]),
    ):
        try:
            runpy.run_path(script, run_name="__main__")
        except BaseException:
            result["error"] = traceback.format_exc()
    return result


if __name__ == "__main__":
    plan, results = map(Path, sys.argv[1:])
    offer_torchvision()
    runs = json.loads(plan.read_text())
    results.write_text(json.dumps([run(**one) for one in runs]))
